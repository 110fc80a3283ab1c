//! One running copy of the program, as a process or in a guest: commands go in, marks and answers come out.
//!
//! A reader thread takes the time at which a mark arrives; nothing else stands between the mark and the clock. What comes
//! on the same channel and is no answer (an error message of the VMM) and the last of the serial line explain a failure.

use std::io::{Read, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use guest_bench::{MARK_END, MARK_START};

/// How often a wait looks whether the user wants to stop.
const POLL: Duration = Duration::from_millis(100);
/// Bytes of the serial line that are kept.
const TAIL_LEN: usize = 2048;
/// How often a measurement is tried whose marks come together.
const ATTEMPTS: u32 = 5;
/// Longest answer; the rest of a line is dropped.
const MAX_LINE: usize = 1024;

/// What comes from the program.
#[derive(Debug, PartialEq)]
enum Event {
    /// The mark before the work.
    Start(Instant),
    /// The mark after the work.
    End(Instant),
    /// A line of text.
    Line(String),
}

/// What a measurement gave.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// It ran.
    Done(Sample),
    /// The program cannot do it here: why.
    Skipped(String),
}

/// A measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// From mark to mark, on the host's clock.
    pub host_ns: f64,
    /// The same by the program's own clock, if it has one.
    pub guest_ns: Option<f64>,
    /// CPU time of the work, if the program told.
    pub cpu_ns: Option<f64>,
    /// Operations done.
    pub ops: f64,
    /// Digest of what was computed.
    pub check: String,
}

/// Why a session is of no more use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// It took longer than allowed.
    #[error("no answer within {0} s{1}")]
    TimedOut(u64, String),
    /// The process, or the machine, came to an end.
    #[error("it ended: {0}")]
    Ended(String),
    /// It could not be started.
    #[error("it does not start: {0}")]
    NotStarted(String),
    /// Something that is no answer.
    #[error("it answered: {0}")]
    Nonsense(String),
    /// The user wants to stop.
    #[error("interrupted")]
    Interrupted,
}

/// A running copy of the program.
#[derive(Debug)]
pub struct Session {
    child: Child,
    commands: Option<ChildStdin>,
    events: Receiver<Event>,
    serial: Arc<Mutex<Vec<u8>>>,
    /// Lines that were no answers.
    messages: Vec<String>,
    interrupted: Arc<AtomicBool>,
    timeout: Duration,
    /// From the start of the process to its first answer.
    pub boot: Duration,
    /// What the program said about itself before that.
    pub notes: Vec<String>,
}

impl Session {
    /// Starts `command` and waits until the program is ready.
    ///
    /// # Errors
    /// It does not get that far.
    pub fn start(
        mut command: Command,
        timeout: Duration,
        interrupted: &Arc<AtomicBool>,
    ) -> Result<Self, SessionError> {
        let start = Instant::now();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(|error| {
            SessionError::NotStarted(format!("{}: {error}", command.get_program().display()))
        })?;
        let (sender, events) = mpsc::channel();
        let serial = Arc::new(Mutex::new(Vec::new()));
        if let Some(marks) = child.stderr.take() {
            thread::spawn(move || read_events(marks, &sender));
        }
        if let Some(output) = child.stdout.take() {
            let serial = Arc::clone(&serial);
            thread::spawn(move || keep_tail(output, &serial));
        }
        let commands = child.stdin.take();
        let (interrupted, messages) = (Arc::clone(interrupted), Vec::new());
        let (boot, notes) = (Duration::ZERO, Vec::new());
        let mut session =
            Self { child, commands, events, serial, messages, interrupted, timeout, boot, notes };
        let deadline = start + timeout;
        while session.line(deadline)? != "READY" {}
        session.boot = start.elapsed();
        let noted = session.messages.iter().filter_map(|line| line.strip_prefix("NOTE "));
        session.notes = noted.map(str::to_owned).collect();
        Ok(session)
    }

    /// As [`Session::measure`], with enough to do that it can be seen. Marks that come together nevertheless, for the host was too busy to let
    /// us read the first in time, are no measurement where the program has no clock of its own: it is repeated.
    ///
    /// # Errors
    /// The session is of no more use.
    pub fn measure_apart(
        &mut self,
        name: &str,
        count: u64,
        size_percent: u32,
    ) -> Result<Answer, SessionError> {
        for _ in 0..ATTEMPTS {
            match self.measure(name, count, size_percent)? {
                Answer::Done(sample) if sample.host_ns <= 0.0 && sample.guest_ns.is_none() => {}
                answer => return Ok(answer),
            }
        }
        Ok(Answer::Skipped("this host is too busy to see when it begins and when it ends".to_owned()))
    }

    /// Runs `count` iterations of the benchmark `name`, which if it is a real program is given `size_percent` to do.
    ///
    /// # Errors
    /// The session is of no more use.
    pub fn measure(&mut self, name: &str, count: u64, size_percent: u32) -> Result<Answer, SessionError> {
        let deadline = Instant::now() + self.timeout;
        self.send(&format!("run {name} {count} {size_percent}\n"))?;
        let (mut start, mut end, mut cpu_ns) = (None, None, None);
        loop {
            match self.next(deadline)? {
                Event::Start(at) => start = Some(at),
                Event::End(at) => end = Some(at),
                Event::Line(line) => {
                    if let Some(told) = line.strip_prefix("CPU ") {
                        cpu_ns = told.parse().ok();
                        continue;
                    }
                    match parse_answer(&line, name, start.zip(end)) {
                        Some(Err(SessionError::Nonsense(line))) => return Err(self.nonsense(&line)),
                        Some(Ok(Answer::Done(sample))) => {
                            return Ok(Answer::Done(Sample { cpu_ns, ..sample }));
                        }
                        Some(answer) => return answer,
                        None => {}
                    }
                    self.messages.push(line);
                }
            }
        }
    }

    fn send(&mut self, command: &str) -> Result<(), SessionError> {
        let sent = self.commands.as_mut().map(|pipe| pipe.write_all(command.as_bytes()));
        match sent {
            Some(Ok(())) => Ok(()),
            _ => Err(self.ended()),
        }
    }

    /// The next answer line; marks are passed over, other lines too, but kept.
    fn line(&mut self, deadline: Instant) -> Result<String, SessionError> {
        loop {
            match self.next(deadline)? {
                Event::Line(line) if line == "READY" => return Ok(line),
                Event::Line(line) => self.messages.push(line),
                Event::Start(_) | Event::End(_) => {}
            }
        }
    }

    fn next(&mut self, deadline: Instant) -> Result<Event, SessionError> {
        loop {
            if self.interrupted.load(Ordering::Relaxed) {
                return Err(SessionError::Interrupted);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let said =
                    self.last_words().map_or_else(String::new, |line| format!("; its last words: {line}"));
                return Err(SessionError::TimedOut(self.timeout.as_secs(), said));
            }
            match self.events.recv_timeout(left.min(POLL)) {
                Ok(event) => return Ok(event),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.ended()),
            }
        }
    }

    /// The end of the process, in its own words if it said any.
    fn ended(&mut self) -> SessionError {
        while let Ok(event) = self.events.recv_timeout(POLL) {
            if let Event::Line(line) = event {
                self.messages.push(line);
            }
        }
        let status = self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        SessionError::Ended(self.last_words().unwrap_or(status))
    }

    /// An answer that is none, with what was said before it: a program of a real one's may have said why it failed.
    fn nonsense(&self, line: &str) -> SessionError {
        let said = self.last_words().map_or_else(String::new, |words| format!("; its last words: {words}"));
        SessionError::Nonsense(format!("{line}{said}"))
    }

    /// The last line that was no answer, or the last of the serial line.
    fn last_words(&self) -> Option<String> {
        let serial = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
        let serial = String::from_utf8_lossy(&serial).into_owned();
        let said = self.messages.last().map(|line| line.trim_start_matches("trellis: error: "));
        said.or_else(|| serial.lines().map(str::trim).rfind(|line| !line.is_empty())).map(str::to_owned)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // It may have ended by itself; the reader threads end with its pipes.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The answer that a line is; `None` for a line of somebody else.
fn parse_answer(
    line: &str,
    name: &str,
    marks: Option<(Instant, Instant)>,
) -> Option<Result<Answer, SessionError>> {
    let nonsense = || Some(Err(SessionError::Nonsense(line.to_owned())));
    let mut words = line.split(' ');
    let (kind, about) = (words.next()?, words.next());
    match kind {
        "DONE" if about == Some(name) => {
            let ops = words.next().and_then(|word| word.parse::<f64>().ok());
            let guest_ns = match words.next() {
                Some("-") => Some(None),
                word => word.and_then(|word| word.parse::<f64>().ok()).map(Some),
            };
            match (ops, guest_ns, words.next(), marks) {
                (Some(ops), Some(guest_ns), Some(check), Some((start, end))) if ops > 0.0 && end >= start => {
                    let host_ns = (end - start).as_secs_f64() * 1e9;
                    Some(Ok(Answer::Done(Sample {
                        host_ns,
                        guest_ns,
                        cpu_ns: None,
                        ops,
                        check: check.to_owned(),
                    })))
                }
                _ => nonsense(),
            }
        }
        "SKIP" if about == Some(name) => Some(Ok(Answer::Skipped(words.collect::<Vec<_>>().join(" ")))),
        "DONE" | "SKIP" | "ERR" => nonsense(),
        _ => None,
    }
}

/// Turns bytes into events until the pipe ends.
fn read_events(mut pipe: impl Read, events: &Sender<Event>) {
    let (mut bytes, mut line) = ([0; 4096], Vec::new());
    while let Ok(len) = pipe.read(&mut bytes) {
        let now = Instant::now();
        if len == 0 || !split_events(&bytes[..len], now, &mut line, events) {
            return;
        }
    }
}

/// Returns whether somebody still listens.
fn split_events(bytes: &[u8], now: Instant, line: &mut Vec<u8>, events: &Sender<Event>) -> bool {
    bytes.iter().all(|&byte| match byte {
        MARK_START => events.send(Event::Start(now)).is_ok(),
        MARK_END => events.send(Event::End(now)).is_ok(),
        b'\n' => {
            let text = String::from_utf8_lossy(line).trim_end().to_owned();
            line.clear();
            events.send(Event::Line(text)).is_ok()
        }
        _ => {
            if line.len() < MAX_LINE {
                line.push(byte);
            }
            true
        }
    })
}

/// Keeps the last bytes of a pipe until it ends.
fn keep_tail(mut pipe: impl Read, tail: &Mutex<Vec<u8>>) {
    let mut bytes = [0; 1024];
    while let Ok(len) = pipe.read(&mut bytes) {
        if len == 0 {
            return;
        }
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.extend_from_slice(&bytes[..len]);
        let excess = tail.len().saturating_sub(TAIL_LEN);
        tail.drain(..excess);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marks() -> Option<(Instant, Instant)> {
        let start = Instant::now();
        Some((start, start + Duration::from_millis(5)))
    }

    #[test]
    fn done_line_is_a_sample() {
        let Some(Ok(Answer::Done(sample))) = parse_answer("DONE sum 1000 4900000 7a314", "sum", marks())
        else {
            panic!("no sample");
        };
        assert_eq!((sample.ops, sample.guest_ns, sample.check.as_str()), (1000.0, Some(4.9e6), "7a314"));
        assert!((sample.host_ns - 5e6).abs() < 1.0);
    }

    #[test]
    fn other_lines_are_skips_nonsense_or_messages() {
        let skip = parse_answer("SKIP a no AVX2 here", "a", None);
        assert_eq!(skip, Some(Ok(Answer::Skipped("no AVX2 here".to_owned()))));
        for line in ["DONE sum 1000 5 x", "DONE other 1 2 3", "ERR no benchmark", "DONE sum"] {
            assert!(
                matches!(parse_answer(line, "sum", None), Some(Err(SessionError::Nonsense(_)))),
                "{line}"
            );
        }
        assert_eq!(parse_answer("qemu: warning", "sum", marks()), None);
        assert_eq!(parse_answer("", "sum", marks()), None);
    }

    #[test]
    fn bytes_become_events_across_reads() {
        let (sender, receiver) = mpsc::channel();
        let (now, mut line) = (Instant::now(), Vec::new());
        assert!(split_events(b"REA", now, &mut line, &sender));
        assert!(split_events(b"DY\r\n\x01\x02x", now, &mut line, &sender));
        drop(sender);
        let events: Vec<Event> = receiver.iter().collect();
        assert_eq!(events, [Event::Line("READY".to_owned()), Event::Start(now), Event::End(now)]);
        assert_eq!(line, b"x");
    }

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    fn start(script: &str, timeout_ms: u64) -> Result<Session, SessionError> {
        Session::start(shell(script), Duration::from_millis(timeout_ms), &Arc::default())
    }

    #[test]
    fn program_that_ends_says_why() {
        let error = start("echo 'trellis: error: no such engine' >&2; exit 1", 20_000).unwrap_err();
        assert_eq!(error, SessionError::Ended("no such engine".to_owned()));
        let error = start("echo Kernel panic; sleep 0.3; exit 3", 20_000).unwrap_err();
        assert_eq!(error, SessionError::Ended("Kernel panic".to_owned()));
    }

    #[test]
    fn notes_before_the_first_answer_are_kept() {
        let session = start("echo NOTE no root >&2; echo other >&2; echo READY >&2; exec sleep 60", 20_000);
        assert_eq!(session.unwrap().notes, ["no root"]);
    }

    #[test]
    fn failure_comes_with_the_words_of_the_program_that_failed() {
        let script = "echo READY >&2; read run; echo 'cc1: error: no space' >&2; echo 'ERR a: failed' >&2; exec sleep 60";
        let error = start(script, 20_000).unwrap().measure("a", 1, 100).unwrap_err();
        assert_eq!(error.to_string(), "it answered: ERR a: failed; its last words: cc1: error: no space");
    }

    #[test]
    fn marks_that_come_together_are_no_measurement_without_a_clock() {
        let answers = |clock: &str| {
            let script = format!(
                r"echo READY >&2; while read run; do printf '\001\002DONE a 5 {clock} x\n' >&2; done"
            );
            start(&script, 20_000).unwrap().measure_apart("a", 1, 100).unwrap()
        };
        assert!(matches!(answers("-"), Answer::Skipped(why) if why.contains("too busy")));
        assert!(matches!(answers("4000"), Answer::Done(sample) if sample.guest_ns == Some(4000.0)));
    }

    #[test]
    fn program_that_hangs_times_out() {
        assert!(matches!(start("exec sleep 60", 300), Err(SessionError::TimedOut(..))));
        let mut session = start("echo READY >&2; exec sleep 60", 1000).unwrap();
        assert!(matches!(session.measure("sum", 1, 100), Err(SessionError::TimedOut(..))));
    }

    #[test]
    fn interrupt_ends_a_wait() {
        let interrupted = Arc::new(AtomicBool::new(true));
        let error =
            Session::start(shell("exec sleep 60"), Duration::from_secs(60), &interrupted).unwrap_err();
        assert_eq!(error, SessionError::Interrupted);
    }
}
