//! The router, asked by a guest that the test plays: frames in, frames out.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::wire::{
    ArpPacket, ArpRepr, DhcpMessageType, DhcpPacket, DhcpRepr, EthernetAddress, EthernetFrame,
    EthernetProtocol, HardwareAddress, IpCidr, IpProtocol, Ipv4Packet, Ipv4Repr, UdpPacket, UdpRepr,
};

use super::*;

const GUEST6: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0x15);
const GUEST_MAC: Mac = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// A guest's end: smoltcp on the router's frames. Answers checksums only where they are whole, so no offloads.
struct Guest<'a>(&'a mut UserNet);

struct Taken(Vec<u8>);
impl RxToken for Taken {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}
struct Giving<'a>(&'a mut UserNet);
impl TxToken for Giving<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.send(&Header::default(), &frame);
        result
    }
}
impl Device for Guest<'_> {
    type RxToken<'a>
        = Taken
    where
        Self: 'a;
    type TxToken<'a>
        = Giving<'a>
    where
        Self: 'a;
    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Taken, Giving<'_>)> {
        let mut frame = Vec::new();
        self.0.receive(&mut frame).map(|_| (Taken(frame), Giving(self.0)))
    }
    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Giving<'_>> {
        Some(Giving(self.0))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

/// A guest with a TCP stack.
struct Client {
    net: UserNet,
    interface: Interface,
    sockets: SocketSet<'static>,
    begin: Instant,
}

impl Client {
    fn new(options: &UserOptions) -> Self {
        let mut net = UserNet::new(options).unwrap();
        net.start(Offloads::default());
        let mac = HardwareAddress::Ethernet(EthernetAddress(GUEST_MAC));
        let zero = smoltcp::time::Instant::ZERO;
        let mut interface = Interface::new(Config::new(mac), &mut Guest(&mut net), zero);
        interface.update_ip_addrs(|list| {
            list.push(IpCidr::new(GUEST.into(), 24)).unwrap();
            list.push(IpCidr::new(GUEST6.into(), 64)).unwrap();
        });
        interface.routes_mut().add_default_ipv6_route(GATEWAY6).unwrap();
        interface.routes_mut().add_default_ipv4_route(GATEWAY).unwrap();
        Self { net, interface, sockets: SocketSet::new(Vec::new()), begin: Instant::now() }
    }

    fn socket(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 65_536]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    fn connect(&mut self, to: (impl Into<smoltcp::wire::IpAddress>, u16), port: u16) -> SocketHandle {
        let handle = self.socket();
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket.connect(self.interface.context(), (to.0.into(), to.1), port).unwrap();
        handle
    }

    /// Runs both sides until `done`.
    fn until(&mut self, what: &str, mut done: impl FnMut(&mut SocketSet<'static>) -> bool) {
        let start = Instant::now();
        while !done(&mut self.sockets) {
            assert!(start.elapsed() < Duration::from_secs(20), "no {what}");
            let micros = i64::try_from(self.begin.elapsed().as_micros()).unwrap();
            let at = smoltcp::time::Instant::from_micros(micros);
            self.interface.poll(at, &mut Guest(&mut self.net), &mut self.sockets);
            self.net.work();
        }
    }

    fn state(sockets: &mut SocketSet<'static>, handle: SocketHandle) -> tcp::State {
        sockets.get::<tcp::Socket<'_>>(handle).state()
    }
}

/// An IPv4 frame of the guest.
fn frame(from: Ipv4Addr, to: Ipv4Addr, protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 34 + payload.len()];
    let mut ethernet = EthernetFrame::new_unchecked(&mut frame);
    ethernet.set_dst_addr(EthernetAddress(GATEWAY_MAC));
    ethernet.set_src_addr(EthernetAddress(GUEST_MAC));
    ethernet.set_ethertype(EthernetProtocol::Ipv4);
    let repr = Ipv4Repr {
        src_addr: from,
        dst_addr: to,
        next_header: protocol,
        payload_len: payload.len(),
        hop_limit: 64,
    };
    repr.emit(&mut Ipv4Packet::new_unchecked(&mut frame[14..]), &ChecksumCapabilities::default());
    frame[34..].copy_from_slice(payload);
    frame
}

fn udp_frame(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let mut datagram = vec![0; 8 + payload.len()];
    UdpRepr { src_port: from.1, dst_port: to.1 }.emit(
        &mut UdpPacket::new_unchecked(&mut datagram),
        &from.0.into(),
        &to.0.into(),
        payload.len(),
        |buffer| buffer.copy_from_slice(payload),
        &ChecksumCapabilities::default(),
    );
    frame(from.0, to.0, IpProtocol::Udp, &datagram)
}

fn net(options: &UserOptions) -> UserNet {
    let mut net = UserNet::new(options).unwrap();
    net.start(Offloads::default());
    net
}

/// The next frame for the guest.
fn next(net: &mut UserNet) -> Vec<u8> {
    let start = Instant::now();
    loop {
        let mut frame = Vec::new();
        if net.receive(&mut frame).is_some() {
            return frame;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "no frame came");
        std::thread::sleep(Duration::from_micros(200));
        net.work();
    }
}

/// Source, destination and payload of a datagram, whose checksums are right.
fn datagram(frame: &[u8]) -> ((Ipv4Addr, u16), (Ipv4Addr, u16), Vec<u8>) {
    let ip = Ipv4Packet::new_checked(&frame[14..]).unwrap();
    assert!(ip.verify_checksum());
    let (from, to) = (ip.src_addr(), ip.dst_addr());
    let udp = UdpPacket::new_checked(ip.payload()).unwrap();
    assert!(udp.verify_checksum(&from.into(), &to.into()));
    ((from, udp.src_port()), (to, udp.dst_port()), udp.payload().to_vec())
}

fn dhcp(
    net: &mut UserNet,
    message_type: DhcpMessageType,
    requested: Option<Ipv4Addr>,
) -> (DhcpMessageType, Vec<u8>) {
    let none = Ipv4Addr::UNSPECIFIED;
    let request = DhcpRepr {
        message_type,
        transaction_id: 7,
        secs: 0,
        client_hardware_address: EthernetAddress(GUEST_MAC),
        client_ip: none,
        your_ip: none,
        server_ip: none,
        router: None,
        subnet_mask: None,
        relay_agent_ip: none,
        broadcast: false,
        requested_ip: requested,
        client_identifier: None,
        server_identifier: None,
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    };
    let mut bytes = vec![0; request.buffer_len()];
    request.emit(&mut DhcpPacket::new_unchecked(&mut bytes)).unwrap();
    net.send(&Header::default(), &udp_frame((none, 68), (Ipv4Addr::BROADCAST, 67), &bytes));
    let (from, to, reply) = datagram(&next(net));
    assert_eq!((from, to), ((GATEWAY, 67), (Ipv4Addr::BROADCAST, 68)));
    let packet = DhcpPacket::new_checked(&reply[..]).unwrap();
    (DhcpRepr::parse(&packet).unwrap().message_type, reply)
}

#[test]
fn guest_gets_its_address_and_no_other() {
    let mut net = net(&UserOptions::default());
    assert_eq!(dhcp(&mut net, DhcpMessageType::Discover, None).0, DhcpMessageType::Offer);
    let (kind, reply) = dhcp(&mut net, DhcpMessageType::Request, Some(GUEST));
    let packet = DhcpPacket::new_checked(&reply[..]).unwrap();
    let lease = DhcpRepr::parse(&packet).unwrap();
    assert_eq!(kind, DhcpMessageType::Ack);
    assert_eq!((lease.your_ip, lease.router, lease.subnet_mask), (GUEST, Some(GATEWAY), Some(NETMASK)));
    assert_eq!(lease.dns_servers.unwrap()[..], [NAME_SERVER]);
    let other = Ipv4Addr::new(192, 168, 1, 5);
    assert_eq!(dhcp(&mut net, DhcpMessageType::Request, Some(other)).0, DhcpMessageType::Nak);
}

#[test]
fn arp_is_answered_for_router_and_name_server_only() {
    let mut net = net(&UserOptions::default());
    for (target, answered) in
        [(GATEWAY, true), (NAME_SERVER, true), (GUEST, false), (Ipv4Addr::new(10, 0, 2, 9), false)]
    {
        let request = ArpRepr::EthernetIpv4 {
            operation: smoltcp::wire::ArpOperation::Request,
            source_hardware_addr: EthernetAddress(GUEST_MAC),
            source_protocol_addr: GUEST,
            target_hardware_addr: EthernetAddress([0; 6]),
            target_protocol_addr: target,
        };
        let mut bytes = vec![0; 14 + request.buffer_len()];
        request.emit(&mut ArpPacket::new_unchecked(&mut bytes[14..]));
        let mut ethernet = EthernetFrame::new_unchecked(&mut bytes);
        ethernet.set_src_addr(EthernetAddress(GUEST_MAC));
        ethernet.set_ethertype(EthernetProtocol::Arp);
        net.send(&Header::default(), &bytes);
        assert_eq!(net.receive(&mut Vec::new()).is_some(), answered, "{target}");
    }
}

#[test]
fn tcp_carries_data_both_ways_and_its_end() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let echo = std::thread::spawn(move || {
        let (mut stream, _) = server.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        stream.write_all(&all).unwrap();
        all.len()
    });
    let data: Vec<u8> =
        (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24).to_le_bytes()[0]).collect();
    let mut client = Client::new(&UserOptions::default());
    let handle = client.connect((GATEWAY, port), 40_000);
    let (mut sent, mut back) = (0, Vec::new());
    client.until("echo", |sockets| {
        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        if socket.can_send() && sent < data.len() {
            sent += socket.send_slice(&data[sent..]).unwrap();
            if sent == data.len() {
                socket.close();
            }
        }
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), back.extend_from_slice(bytes))).unwrap();
        }
        back.len() == data.len()
    });
    assert!(back == data);
    assert_eq!(echo.join().unwrap(), data.len());
    client.until("end", |sockets| {
        matches!(Client::state(sockets, handle), tcp::State::TimeWait | tcp::State::Closed)
    });
    client.until("end of the flow", |_| true);
    client.net.work();
    assert_eq!(client.net.counters()[0], ("tcp_connections", 1));
    let mut flows = 0;
    client.net.tcp.interests(|_, _, _| flows += 1);
    assert_eq!(flows, 0, "the connection is forgotten");
}

#[test]
fn tcp_goes_by_ipv6_too() {
    let Ok(server) = TcpListener::bind("[::1]:0") else {
        eprintln!("skipped: this host has no IPv6 loopback");
        return;
    };
    let port = server.local_addr().unwrap().port();
    let mut client = Client::new(&UserOptions::default());
    let handle = client.connect((GATEWAY6, port), 40_000);
    let mut sent = false;
    client.until("connection", |sockets| {
        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        if socket.can_send() && !sent {
            sent = socket.send_slice(&[5; 30_000]).unwrap() == 30_000;
            socket.close();
        }
        sent
    });
    let (mut stream, _) = server.accept().unwrap();
    stream.set_nonblocking(true).unwrap();
    let mut all = Vec::new();
    client.until("data", |_| {
        let _more = stream.read_to_end(&mut all);
        all.len() == 30_000
    });
    // Nobody there, and an address of IPv4 behind it: refused, nothing asked for.
    let refused = client.connect((GATEWAY6, 1), 40_001);
    let mapped = client.connect((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), port), 40_002);
    client.until("refusals", |sockets| {
        [refused, mapped].iter().all(|&handle| Client::state(sockets, handle) == tcp::State::Closed)
    });
}

#[test]
fn guest_finds_router_and_prefix_by_itself() {
    use smoltcp::wire::{Icmpv6Packet, Icmpv6Repr, NdiscRepr};
    let mut net = net(&UserOptions::default());
    let (from, to) = (Ipv6Addr::UNSPECIFIED, Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2));
    let ask = |net: &mut UserNet, from: Ipv6Addr, to: Ipv6Addr, hop_limit: u8, repr: &Icmpv6Repr<'_>| {
        let mut bytes = vec![0; 54 + repr.buffer_len()];
        let mut ethernet = EthernetFrame::new_unchecked(&mut bytes);
        ethernet.set_src_addr(EthernetAddress(GUEST_MAC));
        ethernet.set_ethertype(EthernetProtocol::Ipv6);
        let ip = smoltcp::wire::Ipv6Repr {
            src_addr: from,
            dst_addr: to,
            next_header: IpProtocol::Icmpv6,
            payload_len: repr.buffer_len(),
            hop_limit,
        };
        ip.emit(&mut smoltcp::wire::Ipv6Packet::new_unchecked(&mut bytes[14..]));
        let mut icmp = Icmpv6Packet::new_unchecked(&mut bytes[54..]);
        repr.emit(&from, &to, &mut icmp, &ChecksumCapabilities::default());
        net.send(&Header::default(), &bytes);
        let mut answer = Vec::new();
        net.receive(&mut answer).map(|_| answer)
    };
    let solicit = Icmpv6Repr::Ndisc(NdiscRepr::RouterSolicit { lladdr: None });
    assert!(ask(&mut net, from, to, 64, &solicit).is_none(), "it came through a router");
    let answer = ask(&mut net, from, to, 255, &solicit).unwrap();
    let icmp = Icmpv6Packet::new_checked(&answer[54..]).unwrap();
    let (source, target) = (icmp6::LINK_LOCAL, Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1));
    let Ok(Icmpv6Repr::Ndisc(NdiscRepr::RouterAdvert { prefix_info: Some(prefix), .. })) =
        Icmpv6Repr::parse(&source, &target, &icmp, &ChecksumCapabilities::default())
    else {
        panic!("{answer:x?}");
    };
    assert_eq!((prefix.prefix, prefix.prefix_len), (Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0), 64));
    // Whether its address is free; and where the name server is.
    let who = |target_addr| Icmpv6Repr::Ndisc(NdiscRepr::NeighborSolicit { target_addr, lladdr: None });
    assert!(ask(&mut net, from, to, 255, &who(GUEST6)).is_none());
    assert!(ask(&mut net, GUEST6, to, 255, &who(GUEST6)).is_none());
    let answer = ask(&mut net, GUEST6, to, 255, &who(NAME_SERVER6)).unwrap();
    assert_eq!(answer[6..12], GATEWAY_MAC);
    let echo = Icmpv6Repr::EchoRequest { ident: 1, seq_no: 2, data: b"hello" };
    let answer = ask(&mut net, GUEST6, GATEWAY6, 64, &echo).unwrap();
    assert_eq!((answer[54], &answer[62..]), (129, &b"hello"[..]));
}

#[test]
fn tcp_is_refused_where_the_host_is() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    for (options, to) in [
        (UserOptions::default(), (GATEWAY, nobody)),
        (UserOptions::default(), (NAME_SERVER, 54)),
        (UserOptions::default(), (Ipv4Addr::new(127, 0, 0, 1), nobody)),
    ] {
        let mut client = Client::new(&options);
        if to.0.is_loopback() {
            // smoltcp sends it to the router like any other.
            client.connect(to, 40_000);
            for _ in 0..100 {
                client.until("", |_| true);
                client.net.work();
            }
            assert_eq!(client.net.tcp.opened, 0);
            continue;
        }
        let handle = client.connect(to, 40_000);
        client.until("refusal", |sockets| Client::state(sockets, handle) == tcp::State::Closed);
        assert_eq!(client.net.tcp.refused, 1);
    }
}

#[test]
fn loopback_off_keeps_the_host_out_of_reach() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut client = Client::new(&UserOptions { loopback: false, ..UserOptions::default() });
    let handle = client.connect((GATEWAY, port), 40_000);
    client.until("refusal", |sockets| Client::state(sockets, handle) == tcp::State::Closed);
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn forwarded_port_leads_to_the_guest() {
    let forward = Forward::parse(&format!("tcp:{}:22", free_port())).unwrap();
    let mut client = Client::new(&UserOptions { forwards: vec![forward], ..UserOptions::default() });
    let handle = client.socket();
    client.sockets.get_mut::<tcp::Socket<'_>>(handle).listen(22).unwrap();
    let mut outside = TcpStream::connect(("127.0.0.1", forward.port)).unwrap();
    outside.write_all(b"knock").unwrap();
    let mut heard = Vec::new();
    client.until("knock", |sockets| {
        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        if socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), heard.extend_from_slice(bytes))).unwrap();
            socket.send_slice(b"who").unwrap();
            socket.close();
        }
        heard == b"knock"
    });
    client.until("end", |sockets| Client::state(sockets, handle) == tcp::State::FinWait2);
    let mut answer = String::new();
    outside.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "who");
    assert!(
        UserNet::new(&UserOptions { forwards: vec![forward], ..UserOptions::default() })
            .err()
            .unwrap()
            .to_string()
            .contains("another port")
    );
}

#[test]
fn udp_goes_out_and_its_answer_comes_back_whole() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut net = net(&UserOptions::default());
    net.send(&Header::default(), &udp_frame((GUEST, 5000), (GATEWAY, port), b"question"));
    let mut buffer = [0; 64];
    let (len, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"question");
    server.send_to(b"answer", from).unwrap();
    let (from_guest, to, payload) = datagram(&next(&mut net));
    assert_eq!((from_guest, to, &payload[..]), ((GATEWAY, port), (GUEST, 5000), &b"answer"[..]));
    // A stranger's is not let in.
    let stranger = UdpSocket::bind("127.0.0.1:0").unwrap();
    stranger.send_to(b"psst", from).unwrap();
    // What is longer than the network's packets comes in pieces that fit.
    server.send_to(&[7; 4000], from).unwrap();
    let pieces: Vec<Vec<u8>> = (0..3).map(|_| next(&mut net)).collect();
    let mut whole = Vec::new();
    for (index, piece) in pieces.iter().enumerate() {
        let ip = Ipv4Packet::new_checked(&piece[14..]).unwrap();
        assert!(ip.verify_checksum() && usize::from(ip.total_len()) <= 1500);
        assert_eq!((usize::from(ip.frag_offset()), ip.more_frags()), (whole.len(), index < 2));
        whole.extend_from_slice(ip.payload());
    }
    assert_eq!(whole.len(), 4008);
    assert_eq!(whole[8..], [7; 4000]);
    // And so do the guest's.
    let mut long = udp_frame((GUEST, 5000), (GATEWAY, port), &[9; 3992]).split_off(34);
    let rest = long.split_off(2400);
    for (at, part) in [(2400, &rest), (0, &long)] {
        let mut piece = frame(GUEST, GATEWAY, IpProtocol::Udp, part);
        let mut ip = Ipv4Packet::new_unchecked(&mut piece[14..]);
        ip.set_ident(77);
        ip.set_more_frags(at == 0);
        ip.set_frag_offset(at);
        ip.fill_checksum();
        net.send(&Header::default(), &piece);
    }
    let mut buffer = [0; 5000];
    let (len, _) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(buffer[..len], [9; 3992]);
}

#[test]
fn forwarded_udp_is_answered_to_who_asked() {
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let forward = Forward::parse(&format!("udp:{port}:5353")).unwrap();
    let mut net = net(&UserOptions { forwards: vec![forward], ..UserOptions::default() });
    let asker = UdpSocket::bind("127.0.0.1:0").unwrap();
    asker.send_to(b"question", ("127.0.0.1", port)).unwrap();
    let (from, to, payload) = datagram(&next(&mut net));
    assert_eq!((from.0, to, &payload[..]), (GATEWAY, (GUEST, 5353), &b"question"[..]));
    net.send(&Header::default(), &udp_frame(to, from, b"answer"));
    let mut buffer = [0; 64];
    let (len, _) = asker.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..len], b"answer");
}

#[test]
fn garbage_and_floods_neither_panic_nor_pile_up() {
    let mut net = net(&UserOptions::default());
    let mut seed = 0x1234_5678_9abc_def1u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let protocols = [IpProtocol::Tcp, IpProtocol::Udp, IpProtocol::Icmp, IpProtocol::Unknown(99)];
    for round in 0..30_000u64 {
        let noise: Vec<u8> = (0..random() % 90).map(|_| random().to_le_bytes()[0]).collect();
        // To where nobody is: no packet leaves this host.
        let to = if random() & 1 == 0 { GATEWAY } else { Ipv4Addr::new(10, 0, 2, random().to_le_bytes()[0]) };
        let mut bytes = match random() % 4 {
            0 => noise,
            1 => udp_frame((GUEST, (round & 0xffff) as u16), (to, 1), &noise),
            2 => udp_frame((GUEST, 68), (to, 67), &noise),
            _ => frame(GUEST, to, protocols[(random() % 4) as usize], &noise),
        };
        if bytes.len() > 20 && random() & 1 == 0 {
            let at = usize::from((random() & 0xffff) as u16) % bytes.len();
            bytes[at] = random().to_le_bytes()[0];
        }
        net.send(&Header::default(), &bytes);
        if round % 64 == 0 {
            net.work();
        }
    }
    let waiting = std::iter::from_fn(|| net.receive(&mut Vec::new())).count();
    assert!(waiting <= 1024, "{waiting} frames");
    let mut sockets = 0;
    net.tcp.interests(|_, _, _| sockets += 1);
    net.udp.sockets(|_| sockets += 1);
    assert!(sockets <= 320 + 256, "{sockets} sockets");
}

#[test]
fn syn_flood_is_bounded_and_the_next_guest_begins_anew() {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let mut client = Client::new(&UserOptions::default());
    for index in 0..600 {
        client.connect((GATEWAY, port), 10_000 + index);
        client.until("", |_| true);
        client.net.work();
    }
    for _ in 0..50 {
        let at = smoltcp::time::Instant::from_millis(1);
        client.interface.poll(at, &mut Guest(&mut client.net), &mut client.sockets);
        client.net.work();
    }
    let mut flows = 0;
    client.net.tcp.interests(|_, _, _| flows += 1);
    assert!((1..=320).contains(&flows), "{flows}");
    client.net.start(Offloads::default());
    let mut left = 0;
    client.net.tcp.interests(|_, _, _| left += 1);
    assert_eq!(left, 0);
    drop(server);
}
