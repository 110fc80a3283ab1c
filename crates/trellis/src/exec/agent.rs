//! The guest's end of `trellis exec`: process 1 of the guest, out of the host's own file of this program.
//!
//! It starts the command, carries its input and output over the channel, passes signals on, and tells how it ended. The
//! command has pipes, as in a shell's pipeline, and a process group of its own; where the host's input and output are a
//! terminal, one of the guest's and a session.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, wait};

use super::protocol::{BLOCK, PORT, Start, kind, read_frame, write_frame};

/// How long the port may take to appear.
const PORT_PATIENCE: Duration = Duration::from_secs(30);
/// How often a stream of a command that has ended is looked at for what is left in it.
const LOOK: Duration = Duration::from_millis(10);

/// What is to be run, for the process that becomes it.
const START_FILE: &str = "/dev/shm/trellis.start";

type Port = Arc<Mutex<File>>;

/// Runs the agent; ends the machine.
pub fn run(arguments: &[OsString]) -> ExitCode {
    match (arguments, std::process::id()) {
        ([], 1) => {}
        ([file], own) if own != 1 && file == START_FILE => return super::child::run(Path::new(file)),
        _ => {
            crate::terminal::tell("trellis: error: exec-agent is for the inside of trellis exec\n");
            return ExitCode::from(2);
        }
    }
    if let Err(error) = serve() {
        eprintln!("trellis: the agent in the guest failed: {error}");
    }
    rustix::fs::sync();
    // The host ends us at once; this is for the case that it does not.
    let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    ExitCode::FAILURE
}

fn serve() -> io::Result<()> {
    for (kind, place, options) in
        [("devpts", "/dev/pts", c"gid=5,mode=620,ptmxmode=666"), ("tmpfs", "/dev/shm", c"mode=1777")]
    {
        let _there = std::fs::create_dir_all(place);
        let _without = rustix::mount::mount(kind, place, kind, rustix::mount::MountFlags::empty(), options);
    }
    // As udev makes them.
    for (name, target) in [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")]
    {
        let _there = std::os::unix::fs::symlink(target, Path::new("/dev").join(name));
    }
    let port = OpenOptions::new().read(true).write(true).open(find_port()?)?;
    let mut input = port.try_clone()?;
    let port = Arc::new(Mutex::new(port));
    send(&port, kind::READY, &[])?;
    let (what, data) = read_frame(&mut input)?;
    if what != kind::START {
        return Err(io::Error::other("the host did not say what to run"));
    }
    let start: Start = serde_json::from_slice(&data).map_err(io::Error::other)?;
    let status = supervise(spawn(&start)?, &port, input)?;
    rustix::fs::sync();
    send(&port, kind::EXIT, &[status])?;
    // Until the host has read it and ends the machine.
    std::thread::sleep(Duration::from_secs(10));
    Ok(())
}

fn send(port: &Port, kind: u8, data: &[u8]) -> io::Result<()> {
    write_frame(&mut *port.lock().unwrap_or_else(PoisonError::into_inner), kind, data)
}

/// The device of the channel.
fn find_port() -> io::Result<PathBuf> {
    let begun = Instant::now();
    loop {
        for entry in std::fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            let name = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if name.trim() == PORT {
                return Ok(Path::new("/dev").join(entry.file_name()));
            }
        }
        if begun.elapsed() > PORT_PATIENCE {
            return Err(io::Error::other("the channel to the host is not there"));
        }
        std::thread::sleep(LOOK);
    }
}

/// The command, and the terminal that it has.
struct Started {
    child: Child,
    terminal: Option<File>,
}

/// Starts what becomes the command ([`super::child`]).
fn spawn(start: &Start) -> io::Result<Started> {
    std::fs::write(START_FILE, serde_json::to_vec(start)?)?;
    let mut command = Command::new("/proc/self/exe");
    command.arg(super::AGENT).arg(START_FILE);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let Some(size) = start.terminal else {
        return Ok(Started { child: command.process_group(0).spawn()?, terminal: None });
    };
    let (terminal, other) = open_terminal(size)?;
    command.stdin(other.try_clone()?).stdout(other.try_clone()?);
    if start.terminal_errors {
        command.stderr(other);
    }
    Ok(Started { child: command.spawn()?, terminal: Some(terminal) })
}

/// A terminal: our side and the command's.
fn open_terminal((columns, rows): (u16, u16)) -> io::Result<(File, OwnedFd)> {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let other = rustix::fs::open(ptsname(&ours, Vec::new())?, flags, Mode::empty())?;
    set_size(&ours, columns, rows);
    Ok((File::from(ours), other))
}

fn set_size(terminal: impl AsFd, columns: u16, rows: u16) {
    let size = rustix::termios::Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
    // A terminal that is gone has no size.
    let _gone = rustix::termios::tcsetwinsize(terminal, size);
}

/// Carries everything to and fro until the command has ended; says its status.
fn supervise(started: Started, port: &Port, input: File) -> io::Result<u8> {
    let Started { mut child, terminal } = started;
    let ended = Arc::new(AtomicBool::new(false));
    let group = Pid::from_raw(i32::try_from(child.id()).unwrap_or(0))
        .ok_or_else(|| io::Error::other("the command has no process"))?;
    let mut pumps = Vec::new();
    if let Some(stream) = child.stdout.take() {
        pumps.push(pump(stream, kind::STDOUT, port, &ended));
    }
    if let Some(terminal) = &terminal {
        pumps.push(pump(terminal.try_clone()?, kind::STDOUT, port, &ended));
    }
    if let Some(stream) = child.stderr.take() {
        pumps.push(pump(stream, kind::STDERR, port, &ended));
    }
    let stdin: Option<Box<dyn Write + Send>> = match (&terminal, child.stdin.take()) {
        (Some(terminal), _) => Some(Box::new(terminal.try_clone()?)),
        (None, Some(pipe)) => Some(Box::new(pipe)),
        (None, None) => None,
    };
    let passed_on = std::thread::Builder::new().name("input".to_owned());
    let answers = Arc::clone(port);
    passed_on.spawn(move || pass_on(input, answers, stdin, terminal, group))?;
    let status = wait_for(group)?;
    ended.store(true, Ordering::SeqCst);
    for pump in pumps {
        let _panicked = pump.join();
    }
    Ok(status)
}

/// Waits for the command, and meanwhile for whatever else ends: process 1 inherits orphans.
fn wait_for(command: Pid) -> io::Result<u8> {
    loop {
        let Some((pid, status)) = wait(WaitOptions::empty())? else { continue };
        if pid == command {
            let by_signal = status.terminating_signal().map(|signal| 128 + signal);
            let status = status.exit_status().or(by_signal).unwrap_or(1);
            return Ok(u8::try_from(status & 0xff).unwrap_or(1));
        }
    }
}

/// Sends what comes out of a stream. Ends with the stream, or when the command has ended and nothing is left in it: a
/// program that it left behind must not hold us.
fn pump(
    mut stream: impl Read + AsFd + Send + 'static,
    what: u8,
    port: &Port,
    ended: &Arc<AtomicBool>,
) -> JoinHandle<()> {
    let (port, ended) = (Arc::clone(port), Arc::clone(ended));
    std::thread::spawn(move || {
        let mut block = vec![0; BLOCK];
        loop {
            let last = ended.load(Ordering::SeqCst);
            let limit =
                rustix::time::Timespec { tv_sec: 0, tv_nsec: i64::try_from(LOOK.as_nanos()).unwrap_or(0) };
            let ready = poll(&mut [PollFd::new(&stream, PollFlags::IN)], Some(&limit)).unwrap_or(0);
            if ready == 0 {
                if last {
                    return;
                }
                continue;
            }
            match stream.read(&mut block) {
                Ok(0) => return,
                Ok(len) => {
                    if send(&port, what, &block[..len]).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    })
}

/// Hands input and signals of the host to the command.
fn pass_on(
    mut from: File,
    port: Port,
    stdin: Option<Box<dyn Write + Send>>,
    terminal: Option<File>,
    group: Pid,
) {
    // Signals must not wait behind input that the command does not read.
    // The host sends no more than a window of what was not taken.
    let (to, waiting) = std::sync::mpsc::channel::<Vec<u8>>();
    let mut to = Some(to);
    std::thread::spawn(move || {
        let mut stdin = stdin;
        while let Ok(data) = waiting.recv() {
            if stdin.as_mut().is_some_and(|stdin| stdin.write_all(&data).is_err()) {
                stdin = None;
            }
            let taken = u32::try_from(data.len()).unwrap_or(u32::MAX).to_le_bytes();
            let _gone = send(&port, kind::TAKEN, &taken);
        }
    });
    while let Ok((what, data)) = read_frame(&mut from) {
        match (what, &data[..]) {
            (kind::STDIN, []) => to = None,
            (kind::STDIN, _) => {
                if let Some(to) = &to {
                    let _gone = to.send(data);
                }
            }
            (kind::SIZE, &[c0, c1, r0, r1]) => {
                if let Some(terminal) = &terminal {
                    set_size(terminal, u16::from_le_bytes([c0, c1]), u16::from_le_bytes([r0, r1]));
                }
            }
            (kind::SIGNAL, &[number]) => {
                if let Some(signal) = Signal::from_named_raw(i32::from(number)) {
                    let _ended = kill_process_group(group, signal);
                }
            }
            _ => {}
        }
    }
}
