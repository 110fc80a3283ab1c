//! Ways out: the guest's to standard output and files, ours to standard error.
//!
//! `INV-OUT-1`: once the run is to end, no write waits for a reader. A guest's byte is written by its vCPU; while the reader
//! of a full pipe sleeps, so does the vCPU, which is right as long as the machine runs, but must not keep it from ending.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// The run is to end.
static ENDING: AtomicBool = AtomicBool::new(false);
/// When it will end by `--timeout`.
static DEADLINE: Mutex<Option<Instant>> = Mutex::new(None);

/// How often a writer that waits looks whether it still should.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };
/// What goes out in one piece: not more than a pipe or terminal that has room at all takes without waiting.
const PIECE: usize = 256;

/// The run is to end: no output waits for its reader from now on; what he does not take is lost.
pub fn stop_waiting() {
    ENDING.store(true, Ordering::SeqCst);
}

/// As [`stop_waiting`], after `limit`.
pub fn stop_waiting_after(limit: Duration) {
    *DEADLINE.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now().checked_add(limit);
}

fn is_ending() -> bool {
    let deadline = || *DEADLINE.lock().unwrap_or_else(PoisonError::into_inner);
    ENDING.load(Ordering::SeqCst) || deadline().is_some_and(|at| Instant::now() >= at)
}

/// Writes as much of `bytes` as goes in one piece; a reader who has gone away takes everything.
fn write_some(output: impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    let piece = &bytes[..bytes.len().min(PIECE)];
    loop {
        let ready = match poll(&mut [PollFd::new(&output, PollFlags::OUT)], Some(&NOW)) {
            Ok(0) if is_ending() => return Ok(bytes.len()),
            Ok(0) => poll(&mut [PollFd::new(&output, PollFlags::OUT)], Some(&LOOK)),
            ready => ready,
        };
        match ready {
            Ok(0) | Err(Errno::INTR) => continue,
            // Whatever poll says, the write tells.
            Ok(_) | Err(_) => {}
        }
        match rustix::io::write(&output, piece) {
            Ok(count) => return Ok(count),
            Err(Errno::INTR | Errno::AGAIN) => {}
            // `trellis boot | head`, a closed window: the guest goes on.
            Err(Errno::PIPE | Errno::IO) => return Ok(bytes.len()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// The guest's way to standard output: unbuffered, and deaf to a reader that has gone away.
#[derive(Debug, Default)]
pub struct ConsoleWriter(());

impl ConsoleWriter {
    /// Standard output, before or after the console has started.
    #[must_use]
    pub const fn new() -> Self {
        Self(())
    }
}

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_some(io::stdout(), bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The guest's way to a file, which may be a pipe or a device.
#[derive(Debug)]
pub struct FileWriter(pub File);

impl Write for FileWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_some(&self.0, bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Says something to the user on standard error. That nobody hears it is no reason to end, let alone to panic.
pub fn tell(text: &str) {
    let _unheard = io::stderr().lock().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_pipe_is_waited_for_until_the_run_is_to_end() {
        let (_unread, pipe) = io::pipe().unwrap();
        let mut writer = FileWriter(File::from(std::os::fd::OwnedFd::from(pipe)));
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            writer.write_all(&[b'x'; 1 << 20]).unwrap();
            sender.send(()).unwrap();
        });
        receiver.recv_timeout(Duration::from_millis(200)).unwrap_err();
        stop_waiting_after(Duration::ZERO);
        receiver.recv_timeout(Duration::from_secs(20)).unwrap();
        thread.join().unwrap();
    }

    #[test]
    fn reader_who_has_gone_is_no_error() {
        let (reader, pipe) = io::pipe().unwrap();
        drop(reader);
        FileWriter(File::from(std::os::fd::OwnedFd::from(pipe))).write_all(b"hello").unwrap();
    }
}
