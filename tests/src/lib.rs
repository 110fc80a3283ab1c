//! Support for the whole-machine tests in `tests/tests`: starting the built program, feeding it, reading it, waiting for it.
//!
//! The program is the one named by `TRELLIS_BINARY` (`cargo xtask test` sets it to the release build), else the one beside
//! the test program's own profile. What a test needs and cannot have fails it; nothing is left out silently.

pub mod guest;
pub mod pty;
pub mod qcow2;
pub mod rsp;
pub mod shell;

use std::io::{Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

/// The program under test.
///
/// # Panics
/// When it has not been built.
#[must_use]
pub fn trellis() -> PathBuf {
    let path = std::env::var_os("TRELLIS_BINARY").map_or_else(beside_the_tests, PathBuf::from);
    assert!(path.is_file(), "{} is not there; run `cargo xtask test`, or build it first", path.display());
    path
}

/// `target/PROFILE/trellis`, seen from `target/PROFILE/deps/TEST`.
fn beside_the_tests() -> PathBuf {
    let own = std::env::current_exe().expect("a program knows its name");
    own.ancestors().nth(2).expect("tests lie two directories deep").join("trellis")
}

/// `arguments`, with a software engine where they name none: these tests are of ours, and the same on hosts with hardware virtualization.
fn with_software<'a>(arguments: &[&'a str]) -> Vec<&'a str> {
    let names = |a: &&str| a.starts_with("--engine") || a.starts_with("--virtual-exec");
    match arguments {
        ["boot", rest @ ..] if !rest.iter().any(names) => {
            [&["boot", "--virtual-exec", "software"], rest].concat()
        }
        _ => arguments.to_vec(),
    }
}

/// A file of a fetched image.
///
/// # Panics
/// When the image has not been fetched.
#[must_use]
pub fn image_file(image: &str, file: &str) -> PathBuf {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let cache =
        cache.unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache"));
    let path = cache.join("trellis/images").join(image).join(file);
    assert!(path.is_file(), "{} is not there; fetch it with: trellis image fetch {image}", path.display());
    path
}

/// A running machine whose output is collected with the time of each chunk.
pub struct Machine {
    child: Child,
    chunks: Receiver<(Instant, Vec<u8>)>,
    output: Vec<u8>,
    /// When each byte of `output` arrived: the length then, and the time.
    arrivals: Vec<(usize, Instant)>,
    input: Option<Box<dyn std::io::Write + Send>>,
    started: Instant,
}

/// A machine that has ended.
pub struct Ended {
    /// The program's exit status.
    pub status: Option<i32>,
    /// Everything on standard output.
    pub output: String,
    /// Everything on standard error.
    pub errors: String,
    /// From start to end.
    pub took: Duration,
}

impl Machine {
    /// Starts `trellis` with `arguments`, standard input being empty.
    #[must_use]
    pub fn start(arguments: &[&str]) -> Self {
        Self::start_stressed(arguments, "")
    }

    /// The same with stress knobs of the translator (docs/testing.md).
    #[must_use]
    pub fn start_stressed(arguments: &[&str], knobs: &str) -> Self {
        let mut command = Command::new(trellis());
        command.env("TRELLIS_BT", knobs);
        command
            .args(with_software(arguments))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.env_remove("TRELLIS_LOG").spawn().expect("the program starts");
        let stdout = child.stdout.take().expect("a pipe");
        Self::around(child, stdout, None)
    }

    /// Starts another program, which starts `trellis`, standard input being empty.
    #[must_use]
    pub fn start_program(program: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.env_remove("TRELLIS_LOG").spawn().expect("the program starts");
        let stdout = child.stdout.take().expect("a pipe");
        Self::around(child, stdout, None)
    }

    /// Starts it on a pseudo-terminal.
    #[must_use]
    pub fn start_on_terminal(arguments: &[&str]) -> Self {
        let (child, master) = pty::spawn(&trellis(), &with_software(arguments));
        let input = master.try_clone().expect("a descriptor can be duplicated");
        Self::around(child, master, Some(Box::new(input)))
    }

    /// Starts another program on a pseudo-terminal.
    #[must_use]
    pub fn start_program_on_terminal(program: &Path, arguments: &[&str]) -> Self {
        let (child, master) = pty::spawn(program, arguments);
        let input = master.try_clone().expect("a descriptor can be duplicated");
        Self::around(child, master, Some(Box::new(input)))
    }

    fn around(
        child: Child,
        mut from: impl Read + Send + 'static,
        input: Option<Box<dyn std::io::Write + Send>>,
    ) -> Self {
        let (sender, chunks) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                if sender.send((Instant::now(), buffer[..count].to_vec())).is_err() {
                    return;
                }
            }
        });
        Self { child, chunks, output: Vec::new(), arrivals: Vec::new(), input, started: Instant::now() }
    }

    /// Types on the terminal.
    ///
    /// # Panics
    /// When the machine has no terminal.
    pub fn send(&mut self, text: &str) {
        let input = self.input.as_mut().expect("only machines on a terminal can be typed at");
        input.write_all(text.as_bytes()).expect("the terminal takes input");
    }

    /// Waits until the output contains `text`; returns when the end of it arrived.
    ///
    /// # Panics
    /// When it does not come in time, or the program ends without it.
    pub fn expect(&mut self, text: &str, patience: Duration) -> Instant {
        let deadline = Instant::now() + patience;
        loop {
            let found = find(&self.output, text.as_bytes());
            if let Some(at) = found {
                let end = at + text.len();
                let arrived = self.arrivals.iter().find(|(len, _)| *len >= end);
                return arrived.map_or_else(Instant::now, |(_, when)| *when);
            }
            match self.chunks.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((when, chunk)) => self.take(when, &chunk),
                Err(RecvTimeoutError::Timeout) => {
                    panic!("no {text:?} within {patience:?} in:\n{}", self.text())
                }
                Err(RecvTimeoutError::Disconnected) => panic!("ended without {text:?}:\n{}", self.text()),
            }
        }
    }

    fn take(&mut self, when: Instant, chunk: &[u8]) {
        self.output.extend_from_slice(chunk);
        self.arrivals.push((self.output.len(), when));
    }

    /// The output so far.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }

    /// Waits for the end of the program.
    ///
    /// # Panics
    /// When it does not end in time.
    #[must_use]
    pub fn finish(mut self, patience: Duration) -> Ended {
        let deadline = Instant::now() + patience;
        let status = self.wait(deadline);
        let took = self.started.elapsed();
        while let Ok((when, chunk)) = self.chunks.recv_timeout(Duration::from_secs(2)) {
            self.take(when, &chunk);
        }
        let mut errors = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            // What was written before the end is there.
            let _ = stderr.read_to_string(&mut errors);
        }
        Ended { status: status.code(), output: self.text(), errors, took }
    }

    fn wait(&mut self, deadline: Instant) -> ExitStatus {
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                return status;
            }
            while let Ok((when, chunk)) = self.chunks.try_recv() {
                self.take(when, &chunk);
            }
            assert!(Instant::now() < deadline, "the program does not end:\n{}", self.text());
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Gone already, unless a test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs `trellis` to its end.
#[must_use]
pub fn run(arguments: &[&str], patience: Duration) -> Ended {
    Machine::start(arguments).finish(patience)
}

/// A path as an argument.
///
/// # Panics
/// When it is not UTF-8.
#[must_use]
pub fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// Where `needle` begins.
fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len().max(1)).position(|window| window == needle)
}
