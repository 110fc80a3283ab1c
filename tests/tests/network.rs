//! Networks of a Linux guest: the router of this process, forwarded ports, and a wire between two machines.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
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
    let append = append(commands);
    run(&[&["boot", IMAGE, "--engine", "bt", "--append", &append], options].concat(), PATIENCE)
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
    let ended = run_in_guest(
        &format!(
            "{DHCP} nc 10.0.2.2 {gives} < /dev/null > /tmp/b; ls -l /tmp/b; nc 10.0.2.2 {takes} < /tmp/b; \
             nslookup no.such.name 10.0.2.2:{asks}; ping -c 1 -q 10.0.2.2 | grep loss; \
             nc 10.0.2.2 {} < /dev/null || echo refused",
            free_port()
        ),
        &["--net", "user", "--stats"],
    );
    assert_eq!(ended.status, Some(0), "{}{}", ended.output, ended.errors);
    for part in ["GOT 10.0.2.15/24 10.0.2.2 10.0.2.3", "16777216", "NXDOMAIN", " 0% packet loss", "refused"] {
        assert!(ended.output.contains(part), "no {part:?} in:\n{}", ended.output);
    }
    assert!(giver.join().expect("it ended"), "the guest did not take all");
    assert!(taker.join().expect("it ended") == content, "what came back is not what was sent");
    assert!(ended.errors.contains("virtio-net.0: notifications"), "{}", ended.errors);
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
