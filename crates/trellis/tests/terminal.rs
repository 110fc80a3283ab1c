//! The terminal on a real pseudo-terminal: raw while the machine runs, as it was found after every kind of end.
//!
//! The test program starts itself as the child, under `setsid --ctty`, so that the pseudo-terminal is the child's own.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use trellis::terminal::{Console, Ending, Handlers};

const CHILD: &str = "TRELLIS_TERMINAL_CHILD";
const PATIENCE: Duration = Duration::from_secs(20);

/// What the child does: reports every event on its output; `p` as input panics.
#[test]
fn child_process_of_the_other_tests() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let (sender, receiver) = mpsc::channel();
    let (input, quit, resize, screen) = (sender.clone(), sender.clone(), sender.clone(), sender.clone());
    let handlers = Handlers {
        input: Box::new(move |bytes| drop(input.send(format!("input {bytes:02x?}")))),
        quit: std::sync::Arc::new(move |reason, _haste| {
            drop(quit.send(format!("quit {}", reason.exit_status())));
            Ending::Now
        }),
        stats: Box::new(move || drop(sender.send("stats".to_owned()))),
        screen: Box::new(move || drop(screen.send("screen".to_owned()))),
        resize: Box::new(move |columns, rows| drop(resize.send(format!("resize {columns}x{rows}")))),
    };
    let console = Console::start(handlers, true).unwrap();
    let mut writer = console.writer();
    writeln!(writer, "process {} raw {} READY", std::process::id(), console.is_raw()).unwrap();
    for event in receiver {
        writeln!(writer, "<{event}>").unwrap();
        if event == "input [70]" {
            thread::spawn(|| panic!("as asked")).join().unwrap_err();
            writeln!(writer, "<panicked>").unwrap();
        }
        if event.starts_with("quit") {
            return;
        }
    }
}

/// The child on a pseudo-terminal.
struct Session {
    child: Child,
    master: File,
    slave: File,
    output: String,
    chunks: mpsc::Receiver<String>,
}

impl Session {
    fn start() -> Self {
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait"]).arg(std::env::current_exe().unwrap());
        command.args(["--exact", "child_process_of_the_other_tests", "--nocapture"]).env(CHILD, "1");
        let mut session = Self::of(&mut command);
        session.expect("raw true READY");
        session
    }

    /// A command on a pseudo-terminal.
    fn of(command: &mut Command) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let slave = rustix::fs::open(
            name,
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY,
            rustix::fs::Mode::empty(),
        );
        let slave = File::from(slave.unwrap());
        tcsetwinsize(&slave, Winsize { ws_col: 100, ws_row: 30, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        let stdio = || Stdio::from(OwnedFd::from(slave.try_clone().unwrap()));
        let child = command.stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn().unwrap();
        let master = File::from(master);
        let chunks = read_in_background(master.try_clone().unwrap());
        Self { child, master, slave, output: String::new(), chunks }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.master.write_all(bytes).unwrap();
    }

    /// Waits for `text` in the output.
    fn expect(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.output.contains(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.chunks.recv_timeout(left) {
                Ok(chunk) => self.output.push_str(&chunk),
                Err(_) => panic!("no {text:?} in {:?}", self.output),
            }
        }
    }

    fn is_canonical(&self) -> bool {
        tcgetattr(&self.slave)
            .unwrap()
            .local_modes
            .contains(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    fn expect_canonical(&self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.is_canonical() {
            assert!(Instant::now() < deadline, "the terminal stays raw: {:?}", self.output);
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Sends a signal to the process that said READY (setsid may have forked).
    fn signal(&self, signal: Signal) {
        let words: Vec<&str> = self.output.split_whitespace().collect();
        let process = words.iter().skip_while(|word| **word != "process").nth(1).unwrap();
        let process = Pid::from_raw(process.parse().unwrap()).unwrap();
        rustix::process::kill_process(process, signal).unwrap();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The child may have ended long ago.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_in_background(mut master: File) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count) = master.read(&mut buffer) {
            if count == 0 || sender.send(String::from_utf8_lossy(&buffer[..count]).into_owned()).is_err() {
                return;
            }
        }
    });
    receiver
}

#[test]
fn terminal_is_raw_until_the_quit_key() {
    let mut session = Session::start();
    assert!(!session.is_canonical());
    session.send(b"\x03");
    session.expect("<input [03]>");
    session.send(b"\x01s\x01d\x01\x01");
    session.expect("<stats>");
    session.expect("<screen>");
    session.expect("<input [01]>");
    session.send(b"\x01h");
    session.expect("this help");
    session.send(b"\x01x");
    session.expect("<quit 0>");
    session.expect_canonical();
}

#[test]
fn terminal_is_restored_by_a_panic() {
    let mut session = Session::start();
    session.send(b"p");
    session.expect("<panicked>");
    session.expect_canonical();
}

#[test]
fn terminal_is_restored_by_signals() {
    for (signal, status) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)] {
        let mut session = Session::start();
        session.signal(signal);
        session.expect(&format!("<quit {status}>"));
        session.expect_canonical();
    }
}

#[test]
fn window_size_reaches_the_callback() {
    let mut session = Session::start();
    tcsetwinsize(&session.master, Winsize { ws_col: 91, ws_row: 33, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    session.expect("<resize 91x33>");
}

#[test]
fn pipes_pass_bytes_and_their_end_does_not_quit() {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child_process_of_the_other_tests", "--nocapture"]).env(CHILD, "1");
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"\x01x").unwrap(); // and closed at once
    let chunks = read_in_background(File::from(OwnedFd::from(child.stdout.take().unwrap())));
    let mut output = String::new();
    while !output.contains("<input [01, 78]>") {
        output.push_str(&chunks.recv_timeout(PATIENCE).unwrap());
    }
    thread::sleep(Duration::from_millis(100));
    assert!(child.try_wait().unwrap().is_none(), "the end of input ended the run: {output}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn top_gives_the_terminal_back_by_every_key_and_signal_that_ends_it() {
    let home = tempfile::tempdir().unwrap();
    for end in [&b"q"[..], b"\x03", b"\x1b", b""] {
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait", env!("CARGO_BIN_EXE_trellis"), "top", "-d", "0.2"]);
        let mut session = Session::of(command.env("TRELLIS_RUNTIME_DIR", home.path()).env("TERM", "xterm"));
        // Of the line that says how to start one; between its words the cursor is moved.
        session.expect("running;");
        assert!(!session.is_canonical());
        if end.is_empty() {
            let leader = rustix::termios::tcgetpgrp(&session.master).unwrap();
            rustix::process::kill_process_group(leader, Signal::TERM).unwrap();
        } else {
            session.send(end);
        }
        session.expect_canonical();
        // The screen that was there before, and the cursor.
        session.expect("\x1b[?1049l");
        session.expect("\x1b[?25h");
        session.child.wait().unwrap();
    }
}
