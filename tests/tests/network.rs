//! Networks of a Linux guest: the router of this process, forwarded ports, and a wire between two machines.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use machine_tests::{Ended, Machine, run, text};

/// A boot takes a fraction of this on an idle host.
const PATIENCE: Duration = Duration::from_secs(240);

const IMAGE: &str = "debian-cloud-amd64";

/// Asks for an address, and sets what it gets.
const DHCP: &str = "printf '#!/bin/sh\\n[ $1 = bound ] && ip addr add $ip/$mask dev eth0 && ip route add default via $router \
                    && echo GOT $ip/$mask $router $dns\\n' > /s; chmod +x /s; ip link set eth0 up; \
                    udhcpc -i eth0 -n -q -s /s 2> /dev/null;";

fn append(commands: &str) -> String {
    assert!(!commands.contains('"') && commands.len() < 1500, "does not fit a command line");
    format!("console=ttyS0 quiet trellis.run=\"{commands}\"")
}

fn run_in_guest(commands: &str, options: &[&str]) -> Ended {
    run_in(IMAGE, commands, options)
}

fn run_in(image: &str, commands: &str, options: &[&str]) -> Ended {
    let append = append(commands);
    run(&[&["boot", image, "--engine", "bt", "--append", &append], options].concat(), PATIENCE)
}

/// Bytes that no program makes by chance.
fn data(len: u32) -> Vec<u8> {
    (0..len / 4).flat_map(|i| i.wrapping_mul(0x9e37_79b9).rotate_left(7).to_le_bytes()).collect()
}

/// A server for one connection, on a port of the loopback.
fn server<T: Send + 'static>(serve: impl FnOnce(TcpStream) -> T + Send + 'static) -> (u16, JoinHandle<T>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("it has one").port();
    (port, std::thread::spawn(move || serve(listener.accept().expect("a connection").0)))
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port").port()
}

#[test]
fn guest_gets_an_address_and_carries_megabytes_both_ways() {
    carries_megabytes(IMAGE, "user", "virtio-net.0: notifications");
}

#[test]
fn card_without_its_switches_carries_the_same() {
    carries_megabytes(
        IMAGE,
        "user,combine=off,suppress=off,offload=off,doorbell=vcpu",
        "virtio-net.0: notifications",
    );
}

#[test]
#[ignore = "long: the generic kernel"]
fn e1000_carries_megabytes_both_ways() {
    carries_megabytes("debian-generic-amd64", "user,model=e1000", "e1000.0: notifications");
}

#[test]
#[ignore = "long: the generic kernel"]
fn e1000_without_its_switches_carries_the_same() {
    let net = "user,model=e1000,suppress=off,offload=off,doorbell=vcpu";
    carries_megabytes("debian-generic-amd64", net, "e1000.0: notifications");
}

/// Address, name server, echo, refusal, and data there and back.
fn carries_megabytes(image: &str, net: &str, counters: &str) {
    let content = data(16 << 20);
    let given = content.clone();
    let (gives, giver) = server(move |mut stream| stream.write_all(&given).is_ok());
    let (takes, taker) = server(|mut stream| {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).expect("data");
        all
    });
    let names = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let asks = names.local_addr().expect("it has one").port();
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((len @ 4.., from)) = names.recv_from(&mut buffer) {
            // The question as an answer: there is no such name (RFC 1035 4.1.1).
            (buffer[2], buffer[3]) = (buffer[2] | 0x80, buffer[3] & 0xf0 | 3);
            let _gone = names.send_to(&buffer[..len], from);
        }
    });
    let ended = run_in(
        image,
        &format!(
            "{DHCP} nc 10.0.2.2 {gives} < /dev/null > /tmp/b; ls -l /tmp/b; nc 10.0.2.2 {takes} < /tmp/b; \
             nslookup no.such.name 10.0.2.2:{asks}; ping -c 1 -q 10.0.2.2 | grep loss; \
             nc 10.0.2.2 {} < /dev/null || echo refused",
            free_port()
        ),
        &["--net", net, "--stats"],
    );
    assert_eq!(ended.status, Some(0), "{}{}", ended.output, ended.errors);
    for part in ["GOT 10.0.2.15/24 10.0.2.2 10.0.2.3", "16777216", "NXDOMAIN", " 0% packet loss", "refused"] {
        assert!(ended.output.contains(part), "no {part:?} in:\n{}", ended.output);
    }
    assert!(giver.join().expect("it ended"), "the guest did not take all");
    assert!(taker.join().expect("it ended") == content, "what came back is not what was sent");
    assert!(ended.errors.contains(counters), "{}", ended.errors);
}

#[test]
fn forwarded_port_reaches_the_guest() {
    let port = free_port();
    let append = append(&format!("{DHCP} echo READY; nc -l -p 7 -e cat; echo DONE"));
    let forward = format!("tcp:{port}:7");
    let mut machine =
        Machine::start(&["boot", IMAGE, "--engine", "bt", "--append", &append, "--forward", &forward]);
    machine.expect("READY", PATIENCE);
    let content = data(1 << 20);
    let start = Instant::now();
    // The guest listens some moments after it has said so, and refuses until then.
    let back = loop {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the forwarded port");
        let (mut writer, sent) = (stream.try_clone().expect("a socket"), content.clone());
        let writes = std::thread::spawn(move || {
            let _refused = writer.write_all(&sent);
            let _refused = writer.shutdown(std::net::Shutdown::Write);
        });
        let mut back = Vec::new();
        let _refused = stream.read_to_end(&mut back);
        writes.join().expect("it ended");
        if !back.is_empty() {
            break back;
        }
        assert!(start.elapsed() < PATIENCE, "the guest does not answer");
        std::thread::sleep(Duration::from_millis(100));
    };
    assert!(back == content, "{} bytes came back", back.len());
    let ended = machine.finish(PATIENCE);
    assert!(ended.output.contains("DONE"), "{}", ended.output);
}

#[test]
fn two_machines_are_linked() {
    let directory = tempfile::tempdir().expect("a directory");
    let net = format!("socket={}", text(&directory.path().join("link")));
    let append_of = |commands: &str| append(&format!("ip link set eth0 up; {commands}"));
    let listens = append_of("ip addr add 192.168.9.1/24 dev eth0; nc -l -p 9 > /tmp/b; sha256sum /tmp/b");
    let first = Machine::start(&[
        "boot",
        IMAGE,
        "--engine",
        "bt",
        "--append",
        &listens,
        "--net",
        &net,
        "--timeout",
        "200",
    ]);
    let sends = append_of(
        "ip addr add 192.168.9.2/24 dev eth0; head -c 4000000 /dev/urandom > /tmp/b; sha256sum /tmp/b; \
         for i in 1 2 3 4 5 6 7 8 9; do nc 192.168.9.1 9 < /tmp/b && break; sleep 1; done",
    );
    let second = run(&["boot", IMAGE, "--engine", "bt", "--append", &sends, "--net", &net], PATIENCE);
    let ended = first.finish(PATIENCE);
    let sum = |output: &str| {
        output.lines().find(|line| line.trim_end().ends_with("/tmp/b")).map(|line| line.trim().to_owned())
    };
    assert!(sum(&second.output).is_some(), "{}", second.output);
    assert_eq!(sum(&second.output), sum(&ended.output), "{}\n{}", second.output, ended.output);
}

#[test]
fn guest_finds_its_ipv6_address_and_reaches_this_host() {
    let Ok(listener) = TcpListener::bind("[::1]:0") else {
        eprintln!("skipped: this host has no IPv6 loopback");
        return;
    };
    let port = listener.local_addr().expect("it has one").port();
    let giver = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        stream.write_all(&data(1 << 20)).is_ok()
    });
    let ended = run_in_guest(
        &format!(
            "ip link set eth0 up; for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do \
             ip -6 addr show dev eth0 | grep fec0 | grep -vq tentative && break; sleep 1; done; \
             nc fec0::2 {port} < /dev/null > /tmp/b; ls -l /tmp/b; ping -c 1 -q fec0::3 | grep loss"
        ),
        &["--net", "user"],
    );
    assert_eq!(ended.status, Some(0), "{}{}", ended.output, ended.errors);
    for part in ["1048576", " 0% packet loss"] {
        assert!(ended.output.contains(part), "no {part:?} in:\n{}", ended.output);
    }
    assert!(giver.join().expect("it ended"), "the guest did not take all");
}

/// Connects to a machine that listens, as soon as it does.
fn peer(path: &std::path::Path) -> UnixStream {
    let start = Instant::now();
    loop {
        if let Ok(stream) = UnixStream::connect(path) {
            return stream;
        }
        assert!(start.elapsed() < PATIENCE, "the machine does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn send_frame(stream: &mut UnixStream, frame: &[u8]) -> std::io::Result<()> {
    let len = u32::try_from(frame.len()).expect("it is short");
    stream.write_all(&[&len.to_be_bytes()[..], frame].concat())
}

/// An answer to an ARP request or an echo request of IPv4: the same with both ends exchanged.
fn answer(frame: &[u8]) -> Option<Vec<u8>> {
    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
    let mut back = frame.to_vec();
    back[..6].copy_from_slice(&frame[6..12]);
    back[6..12].copy_from_slice(&MAC);
    match frame.get(12..14)? {
        // ARP: an answer, from us, for what was asked.
        [8, 6] if frame.get(21) == Some(&1) => {
            back[21] = 2;
            back[22..28].copy_from_slice(&MAC);
            back[28..32].copy_from_slice(frame.get(38..42)?);
            back[32..42].copy_from_slice(frame.get(22..32)?);
        }
        // An echo request becomes a reply; the checksum grows by what the kind shrinks (RFC 1624).
        [8, 0] if frame.get(23) == Some(&1) && frame.get(34) == Some(&8) => {
            back[26..30].copy_from_slice(&frame[30..34]);
            back[30..34].copy_from_slice(&frame[26..30]);
            back[34] = 0;
            let sum = u32::from(u16::from_be_bytes([frame[36], frame[37]])) + 0x0800;
            let sum = u16::try_from((sum & 0xffff) + (sum >> 16)).expect("folded");
            back[36..38].copy_from_slice(&sum.to_be_bytes());
        }
        _ => return None,
    }
    Some(back)
}

#[test]
fn peer_that_sends_garbage_floods_and_vanishes_is_survived() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("link");
    let net = format!("socket={}", text(&path));
    let append = append(
        "ip link set eth0 up; ip addr add 192.168.9.1/24 dev eth0; echo READY; \
         until ping -c 1 -W 1 192.168.9.2 > /dev/null; do :; done; echo ANSWERED; cat /proc/net/dev",
    );
    let mut machine =
        Machine::start(&["boot", IMAGE, "--engine", "bt", "--append", &append, "--net", &net, "--stats"]);
    machine.expect("READY", PATIENCE);
    // A flood of noise, to everybody and to somebody, from one who does not listen.
    let mut flood = peer(&path);
    flood.set_write_timeout(Some(Duration::from_secs(20))).expect("a socket can do that");
    let noise = data(1600);
    for n in 0..20_000usize {
        let mut frame = noise[n % 64..][..1 + n * 7 % 1500].to_vec();
        if let Some(to) = frame.get_mut(..6) {
            to.fill(0xff);
        }
        if let (Some(kind), true) = (frame.get_mut(12..14), n % 2 == 0) {
            kind.copy_from_slice(if n % 4 == 0 { &[8, 0] } else { &[0x86, 0xdd] });
        }
        if send_frame(&mut flood, &frame).is_err() {
            break;
        }
    }
    // No frame at all: the machine ends the connection.
    let _full = flood.write_all(&[0xff; 64]);
    let mut rest = Vec::new();
    let _reset = flood.read_to_end(&mut rest);
    // One that goes in the middle of a frame.
    let mut half = peer(&path);
    half.write_all(&[0, 0, 4, 0, 1, 2, 3]).expect("it is taken");
    drop(half);
    // And one that behaves.
    let mut good = peer(&path);
    let stop = std::thread::spawn(move || {
        let mut len = [0; 4];
        while good.read_exact(&mut len).is_ok() {
            let mut frame = vec![0; u32::from_be_bytes(len) as usize];
            if good.read_exact(&mut frame).is_err() {
                return;
            }
            if let Some(back) = answer(&frame) {
                let _gone = send_frame(&mut good, &back);
            }
        }
    });
    let ended = machine.finish(PATIENCE);
    assert!(ended.output.contains("ANSWERED"), "{}{}", ended.output, ended.errors);
    assert_eq!(ended.status, Some(0), "{}", ended.errors);
    stop.join().expect("it ended with the machine");
}

#[test]
fn networks_that_cannot_be_are_refused_in_one_line() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let forward = format!("tcp:{}:22", taken.local_addr().expect("it has one").port());
    for (options, status, expected) in [
        (&["--net", "tap=a-name-that-is-too-long"][..], 1, "TAP"),
        (&["--net", "socket=/proc/nowhere/x"], 1, "cannot link"),
        (&["--forward", &forward], 1, "another port"),
        (&["--net", "usr"], 2, "did you mean 'user'"),
        (&["--net", "none", "--forward", "tcp:1:1"], 2, "--net none"),
        (&["--net", "user", "--clock", "icount"], 2, "--clock host"),
    ] {
        let ended = run(&[&["boot", "contract"], options].concat(), PATIENCE);
        assert_eq!(ended.status, Some(status), "{options:?}: {}", ended.errors);
        assert!(ended.errors.contains(expected), "{options:?}: {}", ended.errors);
    }
}
