//! Sockets between guest and host.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use guestmem::Gpa;

use super::driver::*;
use crate::bus::lock;
use crate::snapshot::Snapshot;
use crate::virtio::Flavor;
use crate::virtio::vsock::{Endpoint, Vsock, VsockPlug};

const CID: u64 = 42;
/// Receive buffers begin here, [`BUFFER`] bytes each.
const BUFFERS: u64 = DATA + 0x1_0000;
const BUFFER: u64 = 0x1100;
const STREAM: u16 = 1;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;

/// A device on a socket at `path`, and its plug.
pub fn device(path: &Path) -> (Vsock, VsockPlug) {
    let _ = std::fs::remove_file(path);
    let endpoint = Endpoint::new(UnixListener::bind(path).unwrap(), path).unwrap();
    let plug = Arc::new(Mutex::new(endpoint));
    (Vsock::new("vsock", CID as u32, &plug).unwrap(), plug)
}

/// A packet as the guest sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    host_port: u32,
    guest_port: u32,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
    data: Vec<u8>,
}

/// The guest's driver.
struct Guest {
    rig: Rig,
    rings: Vec<Ring>,
    path: PathBuf,
    buffers: u64,
    _directory: tempfile::TempDir,
}

impl Guest {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let (device, _plug) = device(&path);
        let rig = Rig::new(Box::new(device), Flavor::Modern);
        let mut guest = Self { rings: rig.start(EVENT_IDX, 3), rig, path, buffers: 0, _directory: directory };
        (0..8).for_each(|_| guest.offer());
        guest
    }

    /// Offers one more receive buffer.
    fn offer(&mut self) {
        let at = BUFFERS + self.buffers % 64 * BUFFER;
        self.buffers += 1;
        self.rings[0].add(&[(at, BUFFER as u32, true)]);
        self.rings[0].kick(&self.rig);
    }

    /// The next packet; its buffer is offered again.
    fn receive(&mut self) -> Packet {
        let (head, len) = self.rings[0].wait();
        let mut address = [0; 8];
        self.rig.memory.read(Gpa(self.rings[0].desc + 16 * u64::from(head)), &mut address).unwrap();
        let mut raw = vec![0; len as usize];
        self.rig.memory.read(Gpa(u64::from_le_bytes(address)), &mut raw).unwrap();
        self.offer();
        let word = |at: usize| u32::from_le_bytes(raw[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(8), word(24)), (2, CID as u32, len - 44), "{raw:?}");
        Packet {
            host_port: word(16),
            guest_port: word(20),
            op: (word(28) >> 16) as u16,
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
            data: raw[44..].to_vec(),
        }
    }

    fn expect(&mut self, op: u16) -> Packet {
        let packet = self.receive();
        assert_eq!(packet.op, op, "{packet:?}");
        packet
    }

    fn send(&mut self, packet: &Packet) {
        self.send_as(packet, CID, 2, STREAM, packet.data.len() as u32);
    }

    fn send_as(&mut self, packet: &Packet, from: u64, to: u64, kind: u16, len: u32) {
        let mut raw = [from.to_le_bytes(), to.to_le_bytes()].concat();
        raw.extend([packet.guest_port, packet.host_port, len].map(u32::to_le_bytes).concat());
        raw.extend([kind.to_le_bytes(), packet.op.to_le_bytes()].concat());
        raw.extend([packet.flags, packet.buf_alloc, packet.fwd_cnt].map(u32::to_le_bytes).concat());
        raw.extend(&packet.data);
        self.rig.memory.write(Gpa(DATA), &raw).unwrap();
        self.rings[1].add(&[(DATA, raw.len() as u32, false)]);
        self.rings[1].kick(&self.rig);
        self.rings[1].wait();
    }

    /// A program of the host that has asked for `port`, and the request.
    fn called(&mut self, port: u32) -> (UnixStream, Packet) {
        let mut client = UnixStream::connect(&self.path).unwrap();
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        let request = self.expect(REQUEST);
        assert_eq!(request.guest_port, port);
        (client, request)
    }

    /// The same, agreed to.
    fn connected(&mut self, port: u32) -> (BufReader<UnixStream>, Packet) {
        let (client, request) = self.called(port);
        let answer = Packet { op: RESPONSE, buf_alloc: 1 << 16, fwd_cnt: 0, ..request };
        self.send(&answer);
        let mut client = BufReader::new(client);
        let mut line = String::new();
        client.read_line(&mut line).unwrap();
        assert_eq!(line, format!("OK {}\n", answer.host_port));
        (client, answer)
    }

    fn counter(&self, name: &str) -> u64 {
        let counters = lock(&self.rig.device).counters();
        counters.into_iter().find(|(n, _)| *n == name).unwrap().1
    }
}

fn request(port: u32) -> Packet {
    Packet {
        host_port: port,
        guest_port: 5000,
        op: REQUEST,
        flags: 0,
        buf_alloc: 1 << 16,
        fwd_cnt: 0,
        data: Vec::new(),
    }
}

#[test]
fn host_calls_and_both_talk_and_hang_up() {
    let mut guest = Guest::new();
    let (mut client, to_host) = guest.connected(1234);
    guest.send(&Packet { op: RW, data: b"hello from the guest\n".to_vec(), ..to_host.clone() });
    let mut line = String::new();
    client.read_line(&mut line).unwrap();
    assert_eq!(line, "hello from the guest\n");
    client.get_mut().write_all(b"and from the host").unwrap();
    let got = guest.expect(RW);
    assert_eq!(
        (&got.data[..], got.host_port, got.fwd_cnt),
        (&b"and from the host"[..], to_host.host_port, 21)
    );
    // The host's program leaves; the guest agrees.
    drop(client);
    let mut flags = 0;
    while flags != 3 {
        flags = guest.expect(SHUTDOWN).flags;
    }
    guest.send(&Packet { op: RST, ..to_host });
    eventually("end", || (guest.counter("connections_now") == 0).then_some(()));
}

#[test]
fn guest_calls_a_program_of_the_host_or_nobody() {
    let mut guest = Guest::new();
    guest.send(&request(80));
    assert_eq!(guest.expect(RST).guest_port, 5000);
    let mut name = guest.path.clone().into_os_string();
    name.push("_80");
    let listener = UnixListener::bind(name).unwrap();
    guest.send(&request(80));
    guest.expect(RESPONSE);
    let (mut server, _) = listener.accept().unwrap();
    guest.send(&Packet { op: RW, data: b"question".to_vec(), ..request(80) });
    // It says all and leaves; what it said arrives first.
    guest.send(&Packet { op: SHUTDOWN, flags: 3, ..request(80) });
    let mut all = Vec::new();
    server.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"question");
    guest.expect(RST);
    assert_eq!(guest.counter("connections"), 1);
}

#[test]
fn client_that_talks_nonsense_or_is_refused_finds_the_end() {
    let mut guest = Guest::new();
    for line in ["GET / HTTP/1.0\n", "CONNECT\n", "CONNECT x\n", "CONNECT 4294967296\n", &"x".repeat(100)] {
        let mut client = UnixStream::connect(&guest.path).unwrap();
        client.write_all(line.as_bytes()).unwrap();
        // A reset is an end, too.
        assert!(client.read(&mut [0; 8]).map_or(true, |count| count == 0), "{line}");
    }
    let (mut client, asked) = guest.called(7);
    guest.send(&Packet { op: RST, ..asked });
    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn guest_that_breaks_the_rules_loses_its_connection() {
    let mut guest = Guest::new();
    // More than there is room for, from a program that does not read: kernel buffers take some, then ours, then it ends.
    let (_client, to_host) = guest.connected(1);
    let mut sent = 0;
    let broken = loop {
        guest.send(&Packet { op: RW, data: vec![7; 0x4000], ..to_host.clone() });
        sent += 0x4000u32;
        assert!(sent < 64 << 20, "nothing bounds it");
        match guest.rings[0].take() {
            Some(_) if guest.counter("connections_now") == 0 => break true,
            _ => {}
        }
    };
    assert!(broken);
    let mut guest = Guest::new();
    let (_client, to_host) = guest.connected(1);
    // A second answer, an operation that there is not.
    for op in [RESPONSE, 99] {
        guest.send(&Packet { op, ..to_host.clone() });
        guest.expect(RST);
    }
    // From somebody else; to somebody else; no stream; longer than it is.
    guest.send_as(&request(1), 43, 2, STREAM, 0);
    guest.send_as(&request(1), CID, 2, STREAM, 100);
    for (to, kind) in [(9, STREAM), (2, 2)] {
        guest.rig.memory.fill(Gpa(BUFFERS), 64 * BUFFER, 0).unwrap();
        guest.send_as(&request(1), CID, to, kind, 0);
        guest.rings[0].wait();
        guest.offer();
    }
    assert_eq!(guest.counter("connections_now"), 0);
}

#[test]
fn flood_of_requests_is_bounded() {
    let mut guest = Guest::new();
    let mut name = guest.path.clone().into_os_string();
    name.push("_80");
    let _listener = UnixListener::bind(name).unwrap();
    // The listener's queue is bounded, too, and nobody waits for it.
    for port in 0..600 {
        guest.send(&Packet { guest_port: 10_000 + port, ..request(80) });
        while guest.rings[0].take().is_some() {
            guest.offer();
        }
    }
    assert!(guest.counter("connections_now") <= 256);
    assert!(guest.counter("refused") >= 344);
}

#[test]
fn data_of_the_host_waits_for_credit() {
    let mut guest = Guest::new();
    let (mut client, to_host) = guest.connected(1);
    let data: Vec<u8> = (0..200_000u32).map(|i| (i >> 3) as u8).collect();
    let sent = data.clone();
    let writer = std::thread::spawn(move || client.get_mut().write_all(&sent).map(|()| client));
    let mut got = Vec::new();
    while got.len() < data.len() {
        let packet = guest.receive();
        match packet.op {
            RW => got.extend(packet.data),
            // It asks for credit.
            7 => {
                assert_eq!(got.len() % (1 << 16), 0, "exactly what there was room for came");
                let fwd_cnt = got.len() as u32;
                guest.send(&Packet { op: CREDIT_UPDATE, fwd_cnt, ..to_host.clone() });
            }
            _ => panic!("{packet:?}"),
        }
    }
    assert!(got == data);
    drop(writer.join().unwrap().unwrap());
}

#[test]
fn restored_guest_is_told_that_its_connections_are_gone() {
    let mut guest = Guest::new();
    let (mut client, _) = guest.connected(1);
    let blob = lock(&guest.rig.device).save();
    let other = guest.path.with_extension("2");
    let (device, _plug) = device(&other);
    let next = Rig::with_memory(Box::new(device), Flavor::Modern, guest.rig.memory.clone());
    lock(&next.device).restore(&blob).unwrap();
    next.host.remap();
    guest.rig.memory.write(Gpa(DATA), &[0xff; 4]).unwrap();
    guest.rings[2].add(&[(DATA, 4, true)]);
    guest.rings[2].kick(&next);
    assert_eq!(guest.rings[2].wait(), (0, 4));
    assert_eq!(guest.rig.memory.load_gpa::<u32>(Gpa(DATA)), Some(0));
    // Another address is another machine.
    let mut bad = blob;
    bad.data["device"]["data"]["cid"] = 3.into();
    lock(&next.device).restore(&bad).unwrap_err();
    lock(&guest.rig.device).shutdown();
    guest.rig.set_common(20, 1, 0);
    drop(guest);
    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
}
