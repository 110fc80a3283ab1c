//! A Linux guest and the machine's smaller devices: the power button behind signals, the clock, the balloon, sockets.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use machine_tests::{run, text, trellis};

/// A boot takes a fraction of this on an idle host.
const PATIENCE: Duration = Duration::from_secs(240);
const IMAGE: &str = "debian-cloud-amd64";

fn append(commands: &str) -> String {
    format!("console=ttyS0 quiet trellis.run=\"{commands}\"")
}

/// A guest that runs `commands`; its lines are read as they come.
struct Guest {
    child: Child,
    lines: BufReader<ChildStdout>,
    seen: String,
}

impl Guest {
    fn start(commands: &str, options: &[&str]) -> Self {
        let mut command = Command::new(trellis());
        command.args(["boot", IMAGE, "--engine", "bt", "--timeout", "230", "--append", &append(commands)]);
        command.args(options).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("it starts");
        let lines = BufReader::new(child.stdout.take().expect("a pipe"));
        Self { child, lines, seen: String::new() }
    }

    /// Reads until a line begins with `word`; says the rest of that line.
    fn until(&mut self, word: &str) -> String {
        loop {
            let mut line = Vec::new();
            let count = self.lines.read_until(b'\n', &mut line).expect("a pipe");
            assert_ne!(count, 0, "no {word:?} in:\n{}", self.seen);
            let line = String::from_utf8_lossy(&line).into_owned();
            self.seen.push_str(&line);
            if let Some(rest) = line.strip_prefix(word) {
                return rest.trim().to_owned();
            }
        }
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").args([name, &self.child.id().to_string()]).status();
        assert!(sent.expect("kill is there").success());
    }

    /// Reads to the end; the exit status, and how long it took.
    fn end(mut self) -> (Option<i32>, Duration, String) {
        let from = Instant::now();
        let mut rest = Vec::new();
        self.lines.read_to_end(&mut rest).expect("a pipe");
        let status = self.child.wait().expect("it ends").code();
        (status, from.elapsed(), String::from_utf8_lossy(&rest).into_owned())
    }

    /// Guest memory that the process really has, in KiB.
    fn resident_kib(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).expect("Linux says it");
        line.trim_end_matches("kB").trim().parse().expect("a number")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _gone = self.child.kill();
    }
}

#[test]
fn sigterm_presses_the_power_button_and_the_guest_shuts_down() {
    let mut guest = Guest::start("echo READY; sleep 300", &["--shutdown-grace", "200"]);
    guest.until("READY");
    guest.signal("-TERM");
    let (status, _, output) = guest.end();
    assert_eq!(status, Some(0), "{output}");
    assert!(output.contains("trellis: power button"), "{output}");
}

#[test]
fn guest_that_does_not_shut_down_is_ended_after_the_grace_or_at_once() {
    // It hears the button and does nothing.
    let deaf = "rm /etc/acpi/PWRF/*; echo READY; sleep 300";
    let mut guest = Guest::start(deaf, &["--shutdown-grace", "2"]);
    guest.until("READY");
    guest.signal("-TERM");
    let (status, took, output) = guest.end();
    assert_eq!(status, Some(143), "{output}");
    assert!(took >= Duration::from_millis(1900), "{took:?}");
    let mut guest = Guest::start(deaf, &["--shutdown-grace", "200"]);
    guest.until("READY");
    guest.signal("-INT");
    std::thread::sleep(Duration::from_millis(300));
    guest.signal("-TERM");
    let (status, took, output) = guest.end();
    assert_eq!(status, Some(143), "{output}");
    assert!(took < Duration::from_secs(100), "{took:?}");
}

#[test]
fn guest_that_has_no_driver_for_the_button_is_ended_at_once() {
    let mut guest = Guest::start("rmmod button; echo READY; sleep 300", &[]);
    guest.until("READY");
    guest.signal("-TERM");
    let (status, _, output) = guest.end();
    assert_eq!(status, Some(143), "{output}");
}

#[test]
fn clock_shows_what_was_asked_for_and_runs() {
    let append = append("date +D=%s; hwclock -u; echo; sleep 2; date +D=%s");
    let ended = run(&["boot", IMAGE, "--append", &append, "--rtc", "base=2001-09-09T01:46:40"], PATIENCE);
    let seconds = ended.output.lines().filter_map(|line| line.strip_prefix("D=")?.trim().parse::<u64>().ok());
    let seconds: Vec<u64> = seconds.collect();
    let [first, second] = seconds[..] else { panic!("{}", ended.output) };
    assert!((1_000_000_000..1_000_000_240).contains(&first) && second >= first + 2, "{}", ended.output);
    assert!(ended.output.contains("Sep  9 01:"), "{}", ended.output);
}

#[test]
fn clock_is_the_hosts() {
    let append = append("hwclock -s -u; date +D=%s");
    let ended = run(&["boot", IMAGE, "--append", &append], PATIENCE);
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_secs();
    let said: Option<u64> =
        ended.output.lines().find_map(|line| line.strip_prefix("D=")?.trim().parse().ok());
    let said = said.unwrap_or_else(|| panic!("{}", ended.output));
    assert!(said <= now + 2 && said + 240 > now, "{said} at {now}");
}

/// The balloon of the machine `name`, by `trellis balloon`.
fn balloon(home: &Path, arguments: &[&str]) -> String {
    let output =
        Command::new(trellis()).arg("balloon").args(arguments).env("TRELLIS_RUNTIME_DIR", home).output();
    let output = output.expect("it starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let from = Instant::now();
    while !done() {
        assert!(from.elapsed() < PATIENCE, "{what} did not come");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn memory_that_the_guest_frees_is_the_hosts_again() {
    let commands =
        "dd if=/dev/zero of=/f bs=1M count=160 2>/dev/null; echo FULL; sleep 1; rm /f; echo FREED; sleep 300";
    let mut guest = Guest::start(commands, &["--balloon", "--memory", "384M"]);
    guest.until("FULL");
    let full = guest.resident_kib();
    guest.until("FREED");
    let mut now = full;
    eventually("the memory", || {
        now = guest.resident_kib();
        // Linux reports blocks of 2 MiB that are free as a whole: not all that was freed.
        now + (80 << 10) < full
    });
    println!("resident: {full} KiB with a file of 160 MiB, {now} KiB after its end");
}

#[test]
fn balloon_takes_memory_and_gives_it_back() {
    let home = tempfile::tempdir().expect("a directory");
    let directory = text(home.path()).to_owned();
    let mut command = Command::new(trellis());
    command.args(["boot", IMAGE, "--engine", "bt", "--timeout", "230", "--balloon=32M,reporting=off"]);
    command.args(["--append", &append("echo READY; sleep 300")]).env("TRELLIS_RUNTIME_DIR", &directory);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("it starts");
    let lines = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut guest = Guest { child, lines, seen: String::new() };
    guest.until("READY");
    let taken = |mebibytes: u32| {
        let line = format!("taken from the guest{mebibytes:>12} MiB");
        eventually(&line, || balloon(home.path(), &[]).contains(&line));
    };
    taken(32);
    balloon(home.path(), &["--size", "100M"]);
    taken(100);
    balloon(home.path(), &["--size", "0"]);
    taken(0);
    assert!(balloon(home.path(), &[]).contains("guest: free"));
}

/// Answers one connection with every byte turned over.
fn turn_over(listener: &UnixListener) -> usize {
    let (mut stream, _) = listener.accept().expect("the guest calls");
    let mut all = Vec::new();
    stream.read_to_end(&mut all).expect("data");
    let turned: Vec<u8> = all.iter().map(|byte| !byte).collect();
    stream.write_all(&turned).expect("the guest reads");
    all.len()
}

/// Calls the guest's port 5000, says `data`, and takes what comes back.
fn call(socket: &Path, data: &[u8]) -> Vec<u8> {
    let mut stream = UnixStream::connect(socket).expect("the machine listens");
    stream.write_all(b"CONNECT 5000\n").expect("it reads");
    let mut reader = BufReader::new(stream.try_clone().expect("a descriptor"));
    let mut line = String::new();
    reader.read_line(&mut line).expect("text");
    assert!(line.starts_with("OK "), "{line:?}");
    let sent = data.to_vec();
    let writing =
        std::thread::spawn(move || stream.write_all(&sent).and_then(|()| stream.shutdown(Shutdown::Write)));
    let mut back = Vec::new();
    reader.read_to_end(&mut back).expect("data");
    writing.join().expect("written").expect("written");
    back
}

#[test]
fn programs_of_guest_and_host_talk_through_sockets() {
    let directory = tempfile::tempdir().expect("a directory");
    let socket = directory.path().join("s");
    let listener = UnixListener::bind(directory.path().join("s_7000")).expect("a socket");
    let answering = std::thread::spawn(move || turn_over(&listener));
    // The program is the host's, in the host's own root.
    let peer = env!("CARGO_BIN_EXE_vsock_peer");
    let commands = format!("modprobe virtiofs; mkdir /h; mount -t virtiofs host /h; chroot /h {peer}");
    let vsock = format!("cid=17,socket={}", text(&socket));
    let mut guest = Guest::start(&commands, &["--vsock", &vsock, "--share", "/:host:ro", "--cpus", "2"]);
    assert_eq!(guest.until("CALLED"), "2097152 true");
    assert_eq!(answering.join().expect("it answered"), 2 << 20);
    assert_eq!(guest.until("REFUSED"), "true");
    guest.until("SERVING");
    let large: Vec<u8> = (0..3u32 << 18).flat_map(|i| i.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    std::thread::scope(|scope| {
        let (one, two) = (scope.spawn(|| call(&socket, &large)), scope.spawn(|| call(&socket, b"few")));
        assert!(one.join().expect("talked") == large && two.join().expect("talked") == b"few");
    });
    assert_eq!(call(&socket, b""), b"");
    let (status, _, output) = guest.end();
    assert_eq!(status, Some(0), "{output}");
    assert!(output.contains("ended with status 0"), "{output}");
    assert!(!socket.exists(), "the socket is removed");
}
