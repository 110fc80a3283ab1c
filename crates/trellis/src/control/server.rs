//! The machine's end of the control socket.
//!
//! Threads: one accepts, one a client serves; they die with the process. What a client sends is untrusted: a line has a
//! limit, a half sent line and an unread answer have a time limit, there is a limit to clients, and what stops the machine
//! for a moment (statistics, pausing) is paced, so that no client slows it noticeably.

use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder};
use std::time::{Duration, Instant};

use vmm::{Paused, Stats, Typed, VmHandle};

use super::{
    Answer, COMMANDS, ControlTarget, Info, Request, SUFFIX, directories, is_stale, own_directory, sockets,
};
use crate::{extras, suggest};

/// The longest request.
const MAX_LINE_LEN: usize = 64 << 10;
/// Clients at a time.
const MAX_CLIENTS: usize = 16;
/// A client that says nothing for so long is let go.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// A client must read an answer in so long.
const WRITE_LIMIT: Duration = Duration::from_secs(5);
/// Statistics younger than this are told again.
const STATS_AGE: Duration = Duration::from_millis(100);
/// How long a guest may take to say how it uses its memory.
const STATS_PATIENCE: Duration = Duration::from_millis(500);
/// The pace of requests that stop the machine.
const PACE: Duration = Duration::from_millis(20);

/// The socket of a running machine; dropping it removes the file.
#[derive(Debug)]
pub struct Server(());

/// The file to be removed at the end, whatever the end: there is one machine in a process.
static SOCKET: Mutex<Option<PathBuf>> = Mutex::new(None);

/// Removes the socket's file, if there is one.
pub fn remove_socket() {
    if let Some(path) = guard(&SOCKET).take() {
        // Somebody may have been tidier than we.
        let _ = std::fs::remove_file(path);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        remove_socket();
    }
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A socket that nobody serves yet.
#[derive(Debug)]
pub struct Bound {
    listener: UnixListener,
    path: PathBuf,
    name: String,
}

/// Makes the socket of the machine `name` (or `vm-PID`), if one is wanted and can be had: that the user's own directory is
/// missing keeps no machine from running.
///
/// # Errors
/// One line: a machine of that name runs already, or the path that was asked for cannot be had.
pub fn bind(name: Option<&str>, target: &ControlTarget) -> Result<Option<Bound>, String> {
    let called = name.map_or_else(|| format!("vm-{}", std::process::id()), str::to_owned);
    match target {
        ControlTarget::None => Ok(None),
        ControlTarget::Path(path) => bind_path(path, "control socket")
            .map(|listener| Some(Bound { listener, path: path.clone(), name: called })),
        ControlTarget::Default => {
            if name.is_some() && directories().iter().any(|directory| is_taken(directory, &called)) {
                return Err(format!("a machine named '{called}' is running; choose another --name"));
            }
            let mut refusals = Vec::new();
            for directory in directories() {
                match bind_in(&directory, &called) {
                    Ok(bound) => return Ok(Some(bound)),
                    Err(error) => refusals.push(format!("{}: {error}", directory.display())),
                }
            }
            crate::terminal::tell(&format!("trellis: no control socket: {}\n", refusals.join("; ")));
            Ok(None)
        }
    }
}

fn is_taken(directory: &Path, name: &str) -> bool {
    UnixStream::connect(directory.join(format!("{name}{SUFFIX}"))).is_ok()
}

/// A socket in a directory of ours. The directory is locked meanwhile: two that start at once do not take each other's
/// new socket for a stale one.
fn bind_in(directory: &Path, name: &str) -> io::Result<Bound> {
    let lock = own_directory(directory)?;
    lock.lock()?;
    for (_, path) in sockets(directory) {
        if is_stale(&path) {
            // Whoever removed it first has done our work.
            let _ = std::fs::remove_file(path);
        }
    }
    let path = directory.join(format!("{name}{SUFFIX}"));
    let listener = UnixListener::bind(&path)?;
    Ok(Bound { listener, path, name: name.to_owned() })
}

/// A socket where the user wants it.
pub(crate) fn bind_path(path: &Path, what: &str) -> Result<UnixListener, String> {
    let shown = path.display();
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        if !metadata.file_type().is_socket() {
            return Err(format!("the {what} {shown} exists and is no socket; name another path"));
        }
        if !is_stale(path) {
            return Err(format!("the {what} {shown} belongs to a running program; name another path"));
        }
        // Binding tells if it could not be removed.
        let _ = std::fs::remove_file(path);
    }
    UnixListener::bind(path).map_err(|error| format!("cannot make the {what} {shown}: {error}"))
}

impl Bound {
    /// What the machine is called.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Serves the machine behind `handle`. The rest of `info` is filled in.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn serve(self, handle: VmHandle, info: Info) -> io::Result<Server> {
        *guard(&SOCKET) = Some(self.path);
        let server = Server(());
        let info = Info { name: self.name, pid: std::process::id(), ..info };
        let machine = Arc::new(Served {
            handle,
            info,
            started: Instant::now(),
            paused: Mutex::default(),
            is_paused: AtomicBool::new(false),
            stats: Mutex::default(),
            clients: AtomicUsize::new(0),
        });
        let listener = self.listener;
        Builder::new().name("control".to_owned()).spawn(move || accept(&listener, &machine))?;
        Ok(server)
    }
}

/// The machine, as clients see it.
struct Served {
    handle: VmHandle,
    info: Info,
    started: Instant,
    paused: Mutex<Option<Paused>>,
    /// The same, to be seen while somebody waits for the machine to stop.
    is_paused: AtomicBool,
    stats: Mutex<Option<(Instant, Stats)>>,
    clients: AtomicUsize,
}

/// Counts a client for as long as it is served.
struct Client(Arc<Served>);

impl Drop for Client {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::SeqCst);
    }
}

fn accept(listener: &UnixListener, machine: &Arc<Served>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else {
            // No descriptors left, say.
            thread::sleep(Duration::from_millis(100));
            continue;
        };
        machine.clients.fetch_add(1, Ordering::SeqCst);
        let client = Client(Arc::clone(machine));
        if machine.clients.load(Ordering::SeqCst) > MAX_CLIENTS {
            refuse(stream);
            continue;
        }
        // Without a thread the client is let go.
        let _ = Builder::new().name("control-client".to_owned()).spawn(move || serve(stream, &client.0));
    }
}

/// Tells a client that there are too many; never waits for it.
fn refuse(mut stream: UnixStream) {
    if stream.set_nonblocking(true).is_ok() {
        // It may have gone, or not read.
        let _ = stream.write_all(&line(&Answer::failed("too many clients; try again later")));
    }
}

fn line(answer: &Answer) -> Vec<u8> {
    let mut line = serde_json::to_vec(answer).unwrap_or_else(|_| br#"{"ok":false}"#.to_vec());
    line.push(b'\n');
    line
}

/// Serves one client to its end.
fn serve(mut stream: UnixStream, machine: &Served) {
    let limits = stream.set_read_timeout(Some(IDLE_LIMIT)).and(stream.set_write_timeout(Some(WRITE_LIMIT)));
    if limits.is_err() || !is_ours(&stream) {
        return;
    }
    let mut lines = Lines::default();
    loop {
        let answer = match lines.next(&mut stream) {
            Ok(Some(text)) if text.trim_ascii().is_empty() => continue,
            Ok(Some(text)) => match read(&text) {
                Ok(Request::Quit) => {
                    // First the answer: the process may end before it is written.
                    if stream.write_all(&line(&Answer::done())).is_ok() {
                        machine.quit();
                    }
                    continue;
                }
                Ok(request) => machine.answer(request),
                Err(error) => Answer::failed(error),
            },
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                // As above.
                let _ = stream.write_all(&line(&Answer::failed(error.to_string())));
                return;
            }
            Ok(None) | Err(_) => return,
        };
        if stream.write_all(&line(&answer)).is_err() {
            return;
        }
    }
}

/// `INV-CTL-1`: the user of this process, or root, is at the other end.
fn is_ours(stream: &UnixStream) -> bool {
    rustix::net::sockopt::socket_peercred(stream)
        .is_ok_and(|peer| peer.uid.is_root() || peer.uid == rustix::process::geteuid())
}

/// Splits what a client sends into lines.
#[derive(Default)]
struct Lines {
    buffer: Vec<u8>,
}

impl Lines {
    /// The next line without its end; `None` at the end of input.
    fn next(&mut self, stream: &mut UnixStream) -> io::Result<Option<Vec<u8>>> {
        let deadline = Instant::now() + IDLE_LIMIT;
        let mut looked_at = 0;
        loop {
            if let Some(at) = self.buffer[looked_at..].iter().position(|&byte| byte == b'\n') {
                let rest = self.buffer.split_off(looked_at + at + 1);
                let mut text = std::mem::replace(&mut self.buffer, rest);
                text.pop();
                return Ok(Some(text));
            }
            looked_at = self.buffer.len();
            if looked_at > MAX_LINE_LEN {
                let text = format!("a request has at most {MAX_LINE_LEN} bytes");
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            if Instant::now() > deadline {
                return Ok(None);
            }
            let mut chunk = [0; 4096];
            match stream.read(&mut chunk) {
                Ok(0) => return Ok(None),
                Ok(count) => self.buffer.extend(&chunk[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The request that a line is.
fn read(text: &[u8]) -> Result<Request, String> {
    let value: serde_json::Value =
        serde_json::from_slice(text).map_err(|error| format!("no JSON: {error}"))?;
    let Some(command) = value.get("command").and_then(serde_json::Value::as_str).map(str::to_owned) else {
        return Err(format!("a request is an object with a \"command\": {}", COMMANDS.join(", ")));
    };
    if !COMMANDS.contains(&command.as_str()) {
        let hint = suggest::did_you_mean(&command, COMMANDS.iter().copied())
            .unwrap_or_else(|| format!("; commands are {}", COMMANDS.join(", ")));
        return Err(format!("there is no command '{}'{hint}", command.escape_debug()));
    }
    serde_json::from_value(value).map_err(|error| format!("{command}: {error}"))
}

impl Served {
    fn answer(&self, request: Request) -> Answer {
        match request {
            Request::Help => {
                let names = COMMANDS.iter().map(|&name| name.to_owned()).collect();
                Answer { commands: Some(names), ..Answer::done() }
            }
            Request::Info => Answer { info: Some(self.info()), ..Answer::done() },
            Request::Screendump => Answer { text: Some(self.handle.screendump()), ..Answer::done() },
            Request::Stats => self.stats(),
            Request::Quit => {
                self.quit();
                Answer::done()
            }
            Request::Powerdown if self.handle.power_button() => Answer::done(),
            Request::Powerdown => Answer::failed(
                "the guest does not listen to its power button (Linux: module button, and acpid or systemd); trellis quit ends it at once",
            ),
            Request::Balloon { size } => self.balloon(size),
            Request::Nmi => {
                self.handle.nmi();
                Answer::done()
            }
            Request::Type { text, serial } => self.type_text(&text, serial),
            Request::Pause => self.pause(),
            Request::Resume => {
                let paused = guard(&self.paused).take();
                self.is_paused.store(false, Ordering::SeqCst);
                if paused.is_some() { Answer::done() } else { Answer::failed("the machine is not paused") }
            }
        }
    }

    fn info(&self) -> Info {
        let paused = self.is_paused.load(Ordering::SeqCst);
        Info { seconds: self.started.elapsed().as_secs(), paused, ..self.info.clone() }
    }

    /// Statistics need the machine to stop for a moment: not more often than [`STATS_AGE`].
    fn stats(&self) -> Answer {
        let mut kept = guard(&self.stats);
        if kept.as_ref().is_none_or(|(at, _)| at.elapsed() > STATS_AGE) {
            match self.handle.stats() {
                Some(stats) => *kept = Some((Instant::now(), stats)),
                None => return Answer::failed("the machine has ended"),
            }
        }
        match kept.as_ref() {
            Some((_, stats)) => {
                Answer { text: Some(stats.to_string()), stats: Some(stats.to_json()), ..Answer::done() }
            }
            None => Answer::failed("there are no statistics"),
        }
    }

    fn balloon(&self, size: Option<u64>) -> Answer {
        const NONE: &str = "the machine has no balloon; start it with --balloon";
        if let Some(bytes) = size {
            if bytes >= self.info.memory_bytes {
                let memory = self.info.memory_bytes >> 20;
                return Answer::failed(format!("the guest has {memory} MiB; give a smaller size"));
            }
            if !self.handle.set_balloon(bytes) {
                return Answer::failed(NONE);
            }
        }
        let Some(report) = self.handle.balloon_report(STATS_PATIENCE) else { return Answer::failed(NONE) };
        Answer { text: Some(extras::balloon_text(&report)), balloon: Some(report), ..Answer::done() }
    }

    fn type_text(&self, text: &str, serial: bool) -> Answer {
        let typed = if serial {
            // A serial line's Enter is a carriage return.
            self.handle.serial_input(text.replace('\n', "\r").as_bytes())
        } else {
            self.handle.type_keys(&text.chars().map(Typed::Char).collect::<Vec<_>>())
        };
        Answer { typed: Some(typed), ..Answer::done() }
    }

    fn pause(&self) -> Answer {
        let mut paused = guard(&self.paused);
        thread::sleep(PACE);
        if paused.is_none() {
            *paused = self.handle.pause();
        }
        self.is_paused.store(paused.is_some(), Ordering::SeqCst);
        if paused.is_some() { Answer::done() } else { Answer::failed("the machine has ended") }
    }

    fn quit(&self) {
        crate::terminal::stop_waiting();
        self.handle.quit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_that_make_no_sense_are_told_why() {
        for (text, part) in [
            (&b"hello"[..], "no JSON"),
            (b"\xff\xfe", "no JSON"),
            (b"[1]", "\"command\""),
            (b"{\"command\":7}", "\"command\""),
            (b"{\"command\":\"statz\"}", "did you mean 'stats'"),
            (b"{\"command\":\"reboot!\\u0007\"}", "commands are"),
            (b"{\"command\":\"type\"}", "text"),
            (b"{\"command\":\"type\",\"text\":3}", "type:"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(part) && !error.contains(['\n', '\u{7}']), "{error}");
        }
        let deep = [b"[".repeat(60_000), b"]".repeat(60_000)].concat();
        read(&deep).unwrap_err();
    }

    #[test]
    fn lines_are_split_and_bounded() {
        let (mut there, mut here) = UnixStream::pair().unwrap();
        there.write_all(b"one\ntwo\n").unwrap();
        let mut lines = Lines::default();
        assert_eq!(lines.next(&mut here).unwrap().as_deref(), Some(&b"one"[..]));
        assert_eq!(lines.next(&mut here).unwrap().as_deref(), Some(&b"two"[..]));
        let writer = thread::spawn(move || there.write_all(&vec![b'x'; MAX_LINE_LEN * 2]));
        assert_eq!(lines.next(&mut here).unwrap_err().kind(), io::ErrorKind::InvalidData);
        drop(here);
        let _gone = writer.join().unwrap();
    }

    #[test]
    fn stale_socket_is_cleaned_and_a_live_one_is_not() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join("trellis");
        let one = bind_in(&directory, "one").unwrap();
        drop(UnixListener::bind(directory.join("dead.sock")).unwrap());
        let _two = bind_in(&directory, "two").unwrap();
        let names: Vec<_> = sockets(&directory).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["one", "two"]);
        assert!(bind_in(&directory, "one").is_err() && is_taken(&directory, "one"));
        drop(one);
        bind_in(&directory, "one").unwrap();
    }

    #[test]
    fn path_that_is_no_socket_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("file");
        std::fs::write(&path, "keep me").unwrap();
        assert!(bind_path(&path, "socket").unwrap_err().contains("no socket"));
        assert!(bind_path(&home.path().join("a/b"), "socket").unwrap_err().contains("a/b"));
        assert_eq!(std::fs::read(&path).unwrap(), b"keep me");
    }
}
