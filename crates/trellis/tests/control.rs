//! The control socket of a running machine: commands, and clients that mean no good.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);
const BASE: u32 = 0x10_0000;

/// A multiboot image (Multiboot 0.6.96, 3.1) whose code, at [`BASE`] + 0x20, is `code`.
fn image(code: &[u8]) -> Vec<u8> {
    let (magic, flags) = (0x1bad_b002u32, 1u32 << 16);
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let words = [magic, flags, checksum, BASE, BASE, 0, 0, BASE + 0x20];
    words.iter().flat_map(|word| word.to_le_bytes()).chain(code.iter().copied()).collect()
}

/// Writes "Hi" to the top left of the VGA text screen, then spins.
#[rustfmt::skip]
const HI: &[u8] = &[
    0xb8, 0x00, 0x80, 0x0b, 0x00,             // mov eax, 0xb8000
    0x66, 0xc7, 0x00, 0x48, 0x07,             // mov word [eax], 'H' grey
    0x66, 0xc7, 0x40, 0x02, 0x69, 0x07,       // mov word [eax + 2], 'i' grey
    0xeb, 0xfe,                               // jmp $
];

/// A home for sockets, of this test alone.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trellis"));
        command.args(arguments).env_remove("TRELLIS_LOG").env("TRELLIS_RUNTIME_DIR", self.0.path());
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Output of a command that must succeed.
    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?}: {text}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The one line of a command that must fail.
    fn error(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), text.lines().count()), (Some(1), 1), "{arguments:?}: {text}");
        text
    }

    /// Starts a machine and waits until it can be reached.
    fn start(&self, name: &str, code: &[u8]) -> Machine {
        self.start_with(name, code, &[])
    }

    fn start_with(&self, name: &str, code: &[u8], more: &[&str]) -> Machine {
        let kernel = self.0.path().join(format!("{name}.kernel"));
        fs::write(&kernel, image(code)).unwrap();
        let kernel = kernel.to_str().unwrap();
        let arguments = [
            "boot",
            "--virtual-exec",
            "software",
            "--kernel",
            kernel,
            "--memory",
            "8M",
            "--name",
            name,
            "--timeout",
            "50",
        ];
        let child =
            self.command(&arguments).args(more).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let socket = self.0.path().join("trellis").join(format!("{name}.sock"));
        let machine = Machine { child, socket };
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(&machine.socket).is_err() {
            assert!(Instant::now() < deadline, "the machine opens no socket");
            std::thread::sleep(Duration::from_millis(5));
        }
        machine
    }
}

struct Machine {
    child: Child,
    socket: PathBuf,
}

impl Machine {
    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn end(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended long ago.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Instructions executed, or what a translator counts of them.
fn instructions(stats: &serde_json::Value) -> u64 {
    stats["instructions"].as_u64().or_else(|| stats["interpreted_instructions"].as_u64()).unwrap()
}

#[test]
fn commands_reach_the_only_machine_and_quit_ends_it() {
    let home = Home::new();
    assert!(home.error(&["stat"]).contains("no machine is running"));
    assert_eq!(home.ok(&["list", "--json"]).trim(), "[]");
    let mut machine = home.start("web", HI);
    let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(machine.socket.parent().unwrap()), 0o700);
    let deadline = Instant::now() + PATIENCE;
    while home.ok(&["screendump"]).lines().next() != Some("Hi") {
        assert!(Instant::now() < deadline, "the screen stays empty");
    }
    assert!(home.ok(&["list"]).contains("web.kernel"));
    assert!(home.ok(&["stat", "web"]).contains("instructions"));
    let stats: serde_json::Value = serde_json::from_str(&home.ok(&["stat", "--json"])).unwrap();
    assert!(instructions(&stats) > 0);
    home.ok(&["type", "hello\\n"]);
    home.ok(&["type", "web", "--serial", "hello\\n"]);
    assert!(home.error(&["powerdown"]).contains("does not listen"));
    assert!(home.error(&["balloon"]).contains("--balloon"));
    assert!(home.error(&["quit", "wob"]).contains("did you mean 'web'"));
    let taken = home.error(&["boot", "contract", "--name", "web"]);
    assert!(taken.contains("is running; choose another --name"));
    let _other = home.start("other", HI);
    assert!(home.error(&["stat"]).contains("other, web"));
    home.ok(&["quit", "web"]);
    assert_eq!(machine.end(), Some(0));
    assert!(!machine.socket.exists());
}

#[test]
fn paused_machine_stands_still_answers_and_quits() {
    let home = Home::new();
    // in al, 0x80; jmp back: translated code counts no instructions, but each access to a port is interpreted.
    let mut machine = home.start("still", &[0xe4, 0x80, 0xeb, 0xfc]);
    home.ok(&["pause"]);
    assert!(home.ok(&["list"]).contains("(paused)"));
    let count = || -> u64 {
        std::thread::sleep(Duration::from_millis(150)); // statistics are kept for a tenth of a second
        instructions(&serde_json::from_str(&home.ok(&["stat", "--json"])).unwrap())
    };
    let before = count();
    assert_eq!(count(), before);
    home.ok(&["resume"]);
    assert!(home.error(&["resume"]).contains("not paused"));
    assert!(count() > before);
    home.ok(&["pause"]);
    home.ok(&["quit"]);
    assert_eq!(machine.end(), Some(0));
}

#[test]
fn nmi_without_a_handler_shuts_the_machine_down() {
    let home = Home::new();
    let mut machine = home.start("nmi", &[0x0f, 0x01, 0x1d, 0, 0, 0x20, 0, 0xeb, 0xfe]); // lidt [zeroes]; jmp $
    std::thread::sleep(Duration::from_millis(100));
    home.ok(&["nmi"]);
    assert_eq!(machine.end(), Some(3));
}

#[test]
fn hostile_clients_do_not_harm_the_machine() {
    let home = Home::new();
    let machine = home.start("victim", HI);
    // Silent ones, ones that hang up, one that never ends its line, one that never reads.
    let _silent: Vec<_> = (0..4).map(|_| machine.connect()).collect();
    drop((0..50).map(|_| machine.connect()).collect::<Vec<_>>());
    let mut endless = machine.connect();
    let refused = (0..1000).any(|_| endless.write_all(&[b'x'; 4096]).is_err());
    assert!(refused, "a line without end is read for ever");
    let mut deaf = machine.connect();
    deaf.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    for _ in 0..10_000 {
        if deaf.write_all(b"{\"command\":\"screendump\"}\n").is_err() {
            break;
        }
    }
    // Nonsense gets an answer, and the connection goes on.
    let mut stream = free_connection(&machine);
    for nonsense in [&b"hello\n"[..], b"{}\n", b"\xff\xff\n", b"{\"command\":\"statz\"}\n", b"[[[[\n"] {
        stream.get_mut().write_all(nonsense).unwrap();
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        let answer: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(answer["ok"], false, "{line}");
        assert!(answer["error"].is_string(), "{line}");
    }
    drop(stream);
    assert!(home.ok(&["stat"]).contains("instructions"));
    home.ok(&["quit"]);
}

/// A connection that is served. Those who hung up may take a place for a while.
fn free_connection(machine: &Machine) -> BufReader<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (mut stream, mut line) = (BufReader::new(machine.connect()), String::new());
        let asked = stream.get_mut().write_all(b"{}\n").is_ok();
        let told = asked && stream.read_line(&mut line).is_ok() && !line.is_empty();
        if told && !line.contains("too many clients") {
            return stream;
        }
        assert!(Instant::now() < deadline, "no connection is served: {line}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn clients_beyond_the_limit_are_told_so() {
    let home = Home::new();
    let machine = home.start("full", HI);
    let mut held: Vec<UnixStream> = Vec::new();
    let mut told = String::new();
    for _ in 0..40 {
        let mut stream = machine.connect();
        stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let mut bytes = [0; 200];
        if let Ok(count) = stream.read(&mut bytes) {
            told = String::from_utf8_lossy(&bytes[..count]).into_owned();
            break;
        }
        held.push(stream);
    }
    assert!(told.contains("too many clients"), "{told:?} after {}", held.len());
    drop(held);
    let deadline = Instant::now() + PATIENCE;
    while !home.run(&["quit"]).status.success() {
        assert!(Instant::now() < deadline, "the machine is not free again");
    }
}

#[test]
fn socket_path_is_as_asked_and_names_are_checked() {
    let home = Home::new();
    let usage = home.run(&["boot", "contract", "--name", "a/b"]);
    assert_eq!(usage.status.code(), Some(2));
    let file = home.0.path().join("file");
    fs::write(&file, "mine").unwrap();
    let name = file.to_str().unwrap();
    assert!(home.error(&["boot", "contract", "--control", name]).contains("no socket"));
    assert!(home.error(&["boot", "contract", "--control", "/nonexistent/s"]).contains("/nonexistent/s"));
    assert_eq!(fs::read(&file).unwrap(), b"mine");
    assert!(home.error(&["stat", "/nonexistent/s"]).contains("/nonexistent/s"));
}

/// What is at a path of the metrics' port.
fn fetch(port: u16, request: &str) -> String {
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request.as_bytes()).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

/// A port that is free now.
fn free_port() -> u16 {
    std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

#[test]
fn statistics_say_what_exits_cost_by_cpu() {
    let home = Home::new();
    let _machine = home.start("web", HI);
    let text = home.ok(&["stat"]);
    assert!(text.contains("exits by cause") && text.contains("the guest, which is the rest"), "{text}");
    // It answers before it runs.
    let deadline = Instant::now() + PATIENCE;
    let accounting = loop {
        let stats: serde_json::Value = serde_json::from_str(&home.ok(&["stat", "--json"])).unwrap();
        let accounting = stats["vcpus"][0]["accounting"].clone();
        if accounting["exits"].as_array().is_some_and(|rows| !rows.is_empty()) {
            break accounting;
        }
        assert!(Instant::now() < deadline, "{accounting}");
    };
    assert!(accounting["busy_cycles"].as_u64().unwrap() > 0, "{accounting}");
    assert!(accounting["overhead"]["percent"].as_f64().unwrap() < 10.0, "{accounting}");
}

#[test]
fn top_shows_every_machine_once_and_says_when_there_is_none() {
    let home = Home::new();
    assert_eq!(home.ok(&["top", "--once"]), "no machine is running; start one with: trellis boot\n");
    let mut web = home.start("web", HI);
    let text = home.ok(&["top", "--once", "-d", "0.3"]);
    assert!(text.contains("web ") && text.contains("web: exits by cause"), "{text}");
    // It spins, and whatever the host lets it have of a CPU, it does not sleep.
    let line = text.lines().find(|line| line.starts_with("web ")).unwrap();
    let load: f64 = line.split_whitespace().nth(4).unwrap().parse().unwrap();
    assert!(load > 50.0, "{text}");
    let _db = home.start("db", HI);
    let watched = home.command(&["top", "-b", "-n", "3", "-d", "1"]).stdout(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    web.child.kill().unwrap();
    web.end();
    let output = watched.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("db: exits by cause"), "{text}");
    assert_eq!(text.matches("NAME").count(), 3, "{text}");
    assert!(text.contains("the machine 'web' has ended"), "{text}");
}

#[test]
fn metrics_are_scraped_while_the_machine_runs() {
    let home = Home::new();
    let port = free_port();
    let _machine = home.start_with("web", HI, &["--metrics", &format!("127.0.0.1:{port}")]);
    let page = fetch(port, "GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n");
    let (head, body) = page.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n") && head.contains("text/plain; version=0.0.4"), "{head}");
    let mut typed = std::collections::HashMap::new();
    let mut samples = 0;
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(typed.insert(name, kind).is_none(), "{name} twice");
            assert_eq!(name.ends_with("_total"), kind == "counter", "{line}");
        } else if !line.starts_with("# HELP ") {
            let name = line.split(['{', ' ']).next().unwrap();
            assert!(typed.contains_key(name) && name.starts_with("trellis_"), "{line}");
            line.rsplit(' ').next().unwrap().parse::<f64>().unwrap();
            samples += 1;
        }
    }
    assert!(samples > 20 && body.contains("trellis_vm_info{name=\"web\""), "{body}");
    let busy = |body: &str| -> f64 {
        let line =
            body.lines().find(|l| l.starts_with("trellis_vcpu_busy_seconds_total{vcpu=\"0\"}")).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let before = busy(body);
    std::thread::sleep(Duration::from_millis(400));
    assert!(busy(&fetch(port, "GET /metrics HTTP/1.0\r\n\r\n")) > before);
    assert!(fetch(port, "GET /etc HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 404"));
    assert!(fetch(port, "nonsense\r\n\r\n").starts_with("HTTP/1.1 400"));
    // The port is taken now.
    let address = format!("127.0.0.1:{port}");
    let error = home.error(&["boot", "contract", "--metrics", &address]);
    assert!(error.contains(&address) && error.contains("choose another"), "{error}");
}

#[test]
fn machine_that_dies_while_it_is_asked_is_told_in_a_line() {
    let home = Home::new();
    let mut machine = home.start("web", HI);
    let pid = rustix::process::Pid::from_child(&machine.child);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let asking = home.command(&["stat"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    machine.child.kill().unwrap();
    machine.end();
    let output = asking.wait_with_output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), text.lines().count()), (Some(1), 1), "{text}");
    assert!(text.contains("'web' has ended") || text.contains("'web' has hung up"), "{text}");
}
