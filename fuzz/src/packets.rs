//! What a guest sends to the router of user-mode networking is any bytes, mostly packets: it answers or drops.
//!
//! Nothing leaves this process but to a listener and a socket of its own on the loopback: the network is restricted, and
//! ports are set last.

use std::net::{TcpListener, UdpSocket};

use hostnet::user::{UserNet, UserOptions};
use hostnet::{Backend, Header, Offloads};

use crate::input::Input;

const GUEST: [u8; 4] = [10, 0, 2, 15];
const ROUTER: [u8; 4] = [10, 0, 2, 2];
const ROUTER6: [u8; 16] = [0xfe, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
const GUEST6: [u8; 16] = [0xfe, 0xc0, 0, 0, 0, 0, 0, 0, 0x50, 0x54, 0, 0xff, 0xfe, 0x12, 0x34, 0x56];
/// Frames of one input.
const FRAMES: usize = 24;
const ETHERNET: usize = 14;

/// Where packets may go.
struct Ends {
    tcp: TcpListener,
    udp: UdpSocket,
}

/// Sends the frames that the input describes.
pub fn target(data: &[u8]) {
    thread_local! {
        static ENDS: Ends = {
            let tcp = TcpListener::bind("127.0.0.1:0").expect("a port");
            tcp.set_nonblocking(true).expect("a listener can do that");
            let udp = UdpSocket::bind("127.0.0.1:0").expect("a port");
            udp.set_nonblocking(true).expect("a socket can do that");
            Ends { tcp, udp }
        };
    }
    ENDS.with(|ends| run(ends, &mut Input::new(data)));
}

fn run(ends: &Ends, input: &mut Input<'_>) {
    let options = UserOptions { restrict: true, ..UserOptions::default() };
    let mut net = UserNet::new(&options).expect("no ports are asked for");
    let bits = input.byte();
    net.start(Offloads { checksum: bits & 1 != 0, tso4: bits & 2 != 0, tso6: bits & 4 != 0 });
    let mut streams = Vec::new();
    let mut back = Vec::new();
    let mut last = Vec::new();
    for _ in 0..FRAMES {
        let mut frame = if input.byte() & 7 == 0 { std::mem::take(&mut last) } else { make(input, &back) };
        mutate(input, &mut frame);
        aim(ends, &mut frame);
        let header = Header { flags: input.byte() & 1, gso_type: input.byte() & 5, ..Header::default() };
        net.send(&header, &frame);
        last = frame;
        if input.byte() & 1 == 0 {
            net.work();
        }
        if let Ok((stream, _)) = ends.tcp.accept() {
            let _ = stream.set_nonblocking(true);
            streams.push(stream);
        }
        if input.byte() & 15 == 0 {
            streams.pop();
        }
        let mut drain = [0; 2048];
        for stream in &streams {
            use std::io::{Read as _, Write as _};
            let mut stream = stream;
            let _ = stream.read(&mut drain);
            let _ = stream.write(&drain[..usize::from(input.byte())]);
        }
        if let Ok((len, from)) = ends.udp.recv_from(&mut drain) {
            let _ = ends.udp.send_to(&drain[..len], from);
        }
        let mut frame = Vec::new();
        while net.receive(&mut frame).is_some() {
            assert!(frame.len() <= hostnet::MAX_FRAME);
            back.clone_from(&frame);
            frame.clear();
        }
        let mut list = Vec::new();
        let _ = net.sleep_on(true, &mut list);
    }
    // What is left of connections must not outlast the input: others use the same ports.
    drop(net);
    while ends.tcp.accept().is_ok() {}
}

/// A frame that is mostly what a guest would send; `back` is what came last.
fn make(input: &mut Input<'_>, back: &[u8]) -> Vec<u8> {
    let mut payload = vec![0; usize::from(input.below(200))];
    input.fill(&mut payload);
    match input.byte() % 8 {
        0 => ethernet(0x0806, &arp(input)),
        1 => ipv4(17, &udp(68, 67, &dhcp(input))),
        2 => ipv4(17, &udp(input.half() | 1, 9, &payload)),
        3 => ipv4(1, &with_sum(&[&[8, 0, 0, 0, 1, 2, 3, 4][..], &payload].concat(), 2)),
        4 => ipv6(58, &[&[input.byte(), 0, 0, 0, 0, 0, 0, 0][..], &ROUTER6, &payload].concat()),
        5 => ipv6(if input.byte() & 1 == 0 { 6 } else { 17 }, &tcp(input, back, &payload)),
        _ => ipv4(6, &tcp(input, back, &payload)),
    }
}

fn mutate(input: &mut Input<'_>, frame: &mut Vec<u8>) {
    let times = match input.byte() & 7 {
        0..4 => 0,
        4..7 => 1,
        _ => 12,
    };
    for _ in 0..times {
        let at = usize::from(input.half());
        if let Some(len @ 1..) = Some(frame.len()) {
            frame[at % len] = input.byte();
        }
    }
    if input.byte() & 31 == 0 {
        frame.truncate(usize::from(input.half()) % (frame.len() + 1));
    }
    if input.byte() & 63 == 0 {
        frame.resize(frame.len() + usize::from(input.half() >> 1), 0);
    }
}

/// Sets the ports of what may be a packet to the host's loopback.
fn aim(ends: &Ends, frame: &mut [u8]) {
    let port = |tcp: bool| {
        let address = if tcp { ends.tcp.local_addr() } else { ends.udp.local_addr() };
        address.expect("it has one").port().to_be_bytes()
    };
    let mut places = Vec::new();
    if let Some(first) = frame.get(ETHERNET) {
        places.push(ETHERNET + usize::from(first & 15) * 4 + 2);
    }
    places.push(ETHERNET + 40 + 2);
    let tcp = frame.get(ETHERNET + 9) == Some(&6) || frame.get(ETHERNET + 6) == Some(&6);
    let dhcp = frame.get(ETHERNET + 22..ETHERNET + 24) == Some(&[0, 67]);
    for at in places {
        if let (false, Some(to)) = (dhcp, frame.get_mut(at..at + 2)) {
            to.copy_from_slice(&port(tcp));
        }
    }
}

fn ethernet(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x52, 0x55, 10, 0, 2, 2, 0x52, 0x54, 0, 0x12, 0x34, 0x56];
    frame.extend(kind.to_be_bytes());
    frame.extend(payload);
    frame
}

fn ipv4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let [h, l] = u16::try_from(20 + payload.len()).unwrap_or(0).to_be_bytes();
    let mut packet = vec![0x45, 0, h, l, 0, 0, 0, 0, 64, protocol, 0, 0];
    packet.extend(GUEST);
    packet.extend(ROUTER);
    let mut packet = with_sum(&packet, 10);
    packet.extend(payload);
    ethernet(0x0800, &packet)
}

fn ipv6(protocol: u8, payload: &[u8]) -> Vec<u8> {
    let [h, l] = u16::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    let mut packet = vec![0x60, 0, 0, 0, h, l, protocol, 255];
    packet.extend(GUEST6);
    packet.extend(ROUTER6);
    packet.extend(payload);
    ethernet(0x86dd, &packet)
}

fn with_sum(bytes: &[u8], at: usize) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let mut sum: u32 =
        bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let [h, l] = (!sum as u16).to_be_bytes();
    (bytes[at], bytes[at + 1]) = (h, l);
    bytes
}

fn udp(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(8 + payload.len()).unwrap_or(0);
    let mut datagram: Vec<u8> = [from, to, len, 0].iter().flat_map(|n| n.to_be_bytes()).collect();
    datagram.extend(payload);
    datagram
}

/// A segment: one that begins a connection, or one that goes on where the last answer stands.
fn tcp(input: &mut Input<'_>, back: &[u8], payload: &[u8]) -> Vec<u8> {
    let port = 1024 + u16::from(input.byte() & 3);
    let answer = back.get(ETHERNET + 20..ETHERNET + 40);
    let number =
        |at: usize| answer.map_or(0, |a| u32::from_be_bytes([a[at], a[at + 1], a[at + 2], a[at + 3]]));
    let (flags, sequence, ack) = match input.byte() & 7 {
        0 | 1 => (2, 1000, 0),
        2 => (input.byte(), u32::from(input.half()), u32::from(input.half())),
        3 => (0x11, number(8), number(4).wrapping_add(1)),
        4 => (4, number(8), number(4)),
        _ => (0x18, number(8), number(4).wrapping_add(u32::from(input.byte() & 1))),
    };
    let mut segment = port.to_be_bytes().to_vec();
    segment.extend([0, 9]);
    segment.extend(sequence.to_be_bytes());
    segment.extend(ack.to_be_bytes());
    let options = usize::from(input.byte() & 3);
    segment.extend([((5 + options) << 4) as u8, flags, input.byte(), input.byte(), 0, 0, 0, 0]);
    for _ in 0..options * 4 {
        segment.push(input.byte() & 15);
    }
    if flags & 2 == 0 {
        segment.extend(payload);
    }
    segment
}

fn arp(input: &mut Input<'_>) -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1 + (input.byte() & 1), 0x52, 0x54, 0, 0x12, 0x34, 0x56];
    packet.extend(GUEST);
    packet.extend([0; 6]);
    packet.extend([10, 0, 2, input.byte() & 7]);
    packet
}

fn dhcp(input: &mut Input<'_>) -> Vec<u8> {
    let mut message = vec![0; 236];
    message[..4].copy_from_slice(&[1, 1, 6, 0]);
    message.extend([99, 130, 83, 99, 53, 1, 1 + (input.byte() & 7)]);
    for _ in 0..input.byte() & 15 {
        message.push(input.byte());
    }
    message.push(255);
    message
}
