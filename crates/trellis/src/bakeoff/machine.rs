//! A machine of the user's own in each mode: from the start of the process to its power-off, or until it says something.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::args::BakeoffArgs;
use super::run::Outcome;
use crate::bench::mode::{Mode, QEMU, find_in_path, kvm_is_usable};
use crate::bench::predict::statistics;
use crate::bench::session::SessionError;
use crate::control::{Request, client};
use crate::progress::Progress;

/// How often a run is looked at.
const POLL: Duration = Duration::from_millis(5);
/// Bytes of output that are kept to look for a text in, and for the last words.
const KEPT: usize = 64 << 10;

/// Runs the machine in all modes that can.
///
/// # Errors
/// Only when the user interrupts.
pub fn all(
    args: &BakeoffArgs,
    progress: &Progress,
    interrupted: &Arc<AtomicBool>,
) -> Result<Vec<(&'static Mode, Outcome)>, SessionError> {
    let modes = args.modes();
    let mut outcomes: Vec<(&'static Mode, Outcome)> =
        modes.into_iter().map(|mode| (mode, Outcome::default())).collect();
    let count = outcomes.len();
    for run in 0..args.runs() {
        for n in 0..count {
            let (mode, outcome) = &mut outcomes[if run % 2 == 0 { n } else { count - 1 - n }];
            progress.at(&format!("run {} of {} ({})", run + 1, args.runs(), mode.name));
            if outcome.skipped.is_none() && outcome.error.is_none() {
                one_run(args, mode, outcome, interrupted)?;
            }
            progress.advance(1);
        }
    }
    Ok(outcomes)
}

fn one_run(
    args: &BakeoffArgs,
    mode: &Mode,
    outcome: &mut Outcome,
    interrupted: &Arc<AtomicBool>,
) -> Result<(), SessionError> {
    let run = tempfile::tempdir()
        .map_err(|error| error.to_string())
        .and_then(|directory| command(args, mode, directory.path()).map(|command| (directory, command)));
    let (directory, command) = match run {
        Ok(run) => run,
        Err(reason) => {
            outcome.skipped = Some(reason);
            return Ok(());
        }
    };
    match watch(args, command, directory.path(), mode.engine().is_some(), interrupted) {
        Ok((seconds, statistics)) => {
            outcome.times.push(seconds);
            let sum = outcome.statistics.take();
            // Each run is a machine of its own: the last one's statistics stand for its own time.
            outcome.statistics = statistics.map(|now| (Value::Null, now)).or(sum);
            Ok(())
        }
        Err(SessionError::Interrupted) => Err(SessionError::Interrupted),
        Err(error) => {
            outcome.error = Some(error.to_string());
            Ok(())
        }
    }
}

/// The command of a machine in a mode.
fn command(args: &BakeoffArgs, mode: &Mode, directory: &Path) -> Result<Command, String> {
    match (mode.engine(), mode.accelerator()) {
        (Some(engine), _) => trellis(args, engine, directory),
        (_, Some(accelerator)) => qemu(args, accelerator),
        _ => Err("a whole machine does not run natively".to_owned()),
    }
}

fn trellis(args: &BakeoffArgs, engine: &str, directory: &Path) -> Result<Command, String> {
    let program = std::env::current_exe().map_err(|error| format!("cannot find this program: {error}"))?;
    let mut command = Command::new(program);
    command.args(["boot", "--engine", engine, "--serial", "stdio", "--no-reboot", "--memory", &args.memory]);
    command.args(["--cpus", &args.cpus.to_string()]);
    if engine == "bt" {
        command.args(super::PROFILE);
    }
    let mut stats = std::ffi::OsString::from("--stats=");
    stats.push(directory.join("stats"));
    command.arg(stats).arg("--control").arg(directory.join("control"));
    for (option, value) in [("--kernel", &args.kernel), ("--initrd", &args.initrd)] {
        if let Some(value) = value {
            command.arg(option).arg(value);
        }
    }
    if let Some(append) = &args.append {
        command.args(["--append", append]);
    }
    for disk in &args.disk {
        let mut spec = disk.clone().into_os_string();
        spec.push(",ro");
        command.arg("--disk").arg(spec);
    }
    Ok(command)
}

fn qemu(args: &BakeoffArgs, accelerator: &str) -> Result<Command, String> {
    let program = find_in_path(QEMU).ok_or_else(|| format!("{QEMU} is not installed"))?;
    if accelerator == "kvm" {
        kvm_is_usable()?;
    }
    let mut command = Command::new(program);
    command.args(["-accel", accelerator, "-cpu", "max", "-no-reboot", "-nodefaults", "-display", "none"]);
    command.args(["-serial", "stdio", "-m", &args.memory, "-smp", &args.cpus.to_string()]);
    for (option, value) in [("-kernel", &args.kernel), ("-initrd", &args.initrd)] {
        if let Some(value) = value {
            command.arg(option).arg(value);
        }
    }
    if let Some(append) = &args.append {
        command.args(["-append", append]);
    }
    for disk in &args.disk {
        let path = disk.to_str().ok_or("a disk's path is no text")?;
        // A comma in a value is doubled.
        let path = path.replace(',', ",,");
        command.args(["-drive", &format!("file={path},format=raw,if=virtio,read-only=on")]);
    }
    Ok(command)
}

/// Runs it to its end, or until the text appears. Returns seconds, and the statistics if it keeps any.
fn watch(
    args: &BakeoffArgs,
    mut command: Command,
    directory: &Path,
    has_statistics: bool,
    interrupted: &AtomicBool,
) -> Result<(f64, Option<Value>), SessionError> {
    let start = Instant::now();
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().map_err(|error| SessionError::NotStarted(error.to_string()))?;
    let mut machine = Machine::new(child, args.until.clone());
    let deadline = start + Duration::from_secs_f64(args.timeout);
    loop {
        if interrupted.load(Ordering::Relaxed) {
            return Err(SessionError::Interrupted);
        }
        if let Some(seen) = machine.seen() {
            let socket = directory.join("control");
            let statistics = has_statistics.then(|| statistics(&socket).ok()).flatten();
            if has_statistics {
                // It is killed if it does not want to.
                let _ = client::ask(socket.to_str(), &Request::Quit);
            }
            return Ok(((seen - start).as_secs_f64(), statistics));
        }
        if let Some(status) = machine.ended() {
            let seconds = start.elapsed().as_secs_f64();
            return if status && args.until.is_none() {
                let text = std::fs::read_to_string(directory.join("stats")).ok();
                Ok((seconds, text.and_then(|text| serde_json::from_str(&text).ok())))
            } else if status {
                Err(SessionError::Ended(format!(
                    "without having said {:?}",
                    args.until.as_deref().unwrap_or("")
                )))
            } else {
                Err(SessionError::Ended(machine.last_words()))
            };
        }
        if Instant::now() >= deadline {
            let said = machine.last_words();
            return Err(SessionError::TimedOut(
                Duration::from_secs_f64(args.timeout).as_secs(),
                format!("; its last words: {said}"),
            ));
        }
        std::thread::sleep(POLL);
    }
}

/// What it has said so far.
#[derive(Default)]
struct Heard {
    text: Vec<u8>,
    seen: Option<Instant>,
}

/// A machine's process; killed when it is dropped.
struct Machine {
    child: Child,
    serial: Arc<Mutex<Heard>>,
    errors: Arc<Mutex<Heard>>,
    readers: Vec<JoinHandle<()>>,
}

impl Machine {
    fn new(mut child: Child, until: Option<String>) -> Self {
        let (serial, errors) = (Arc::<Mutex<Heard>>::default(), Arc::<Mutex<Heard>>::default());
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            let heard = Arc::clone(&serial);
            readers.push(std::thread::spawn(move || listen(pipe, until.as_deref(), &heard)));
        }
        if let Some(pipe) = child.stderr.take() {
            let heard = Arc::clone(&errors);
            readers.push(std::thread::spawn(move || listen(pipe, None, &heard)));
        }
        Self { child, serial, errors, readers }
    }

    fn seen(&self) -> Option<Instant> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner).seen
    }

    /// Whether it has ended, and well. What it said is complete then.
    fn ended(&mut self) -> Option<bool> {
        let status = self.child.try_wait().ok().flatten()?;
        self.readers.drain(..).for_each(|reader| drop(reader.join()));
        Some(status.success())
    }

    /// The last line of its messages, else of its serial line.
    fn last_words(&self) -> String {
        let last = |heard: &Mutex<Heard>| {
            let heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
            let text = String::from_utf8_lossy(&heard.text).into_owned();
            text.lines().map(str::trim).rfind(|line| !line.is_empty()).map(str::to_owned)
        };
        let said = last(&self.errors).or_else(|| last(&self.serial)).unwrap_or_else(|| "nothing".to_owned());
        said.trim_start_matches("trellis: error: ").to_owned()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself; the readers end with its pipes.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Keeps the last of what comes, and notes when the text is in it.
fn listen(mut pipe: impl Read, until: Option<&str>, heard: &Mutex<Heard>) {
    let mut bytes = [0; 4096];
    while let Ok(len @ 1..) = pipe.read(&mut bytes) {
        let mut heard = heard.lock().unwrap_or_else(PoisonError::into_inner);
        heard.text.extend_from_slice(&bytes[..len]);
        if let (Some(wanted), None) = (until.map(str::as_bytes), heard.seen) {
            // What is new, and as much before it as the text may begin in.
            let from = heard.text.len().saturating_sub(len + wanted.len());
            if heard.text[from..].windows(wanted.len().max(1)).any(|window| window == wanted) {
                heard.seen = Some(Instant::now());
            }
        }
        let excess = heard.text.len().saturating_sub(KEPT);
        heard.text.drain(..excess);
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        bakeoff: BakeoffArgs,
    }

    fn run(words: &[&str], script: &str) -> Result<(f64, Option<Value>), SessionError> {
        let args = Line::parse_from(std::iter::once("bakeoff").chain(words.iter().copied())).bakeoff;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        let directory = tempfile::tempdir().unwrap();
        watch(&args, command, directory.path(), false, &AtomicBool::new(false))
    }

    #[test]
    fn run_ends_at_power_off_or_at_the_text() {
        assert!(run(&[], "exit 0").is_ok());
        let (seconds, _) =
            run(&["--until", "login:"], "echo Debian; printf 'log'; printf 'in: '; exec sleep 60").unwrap();
        assert!(seconds < 30.0);
    }

    #[test]
    fn run_that_fails_says_why() {
        let error = run(&[], "echo 'trellis: error: no such kernel' >&2; exit 1").unwrap_err();
        assert_eq!(error, SessionError::Ended("no such kernel".to_owned()));
        let error = run(&["--until", "login:"], "exit 0").unwrap_err().to_string();
        assert!(error.contains("login:"), "{error}");
        let error = run(&["--timeout", "0.3"], "echo booting; exec sleep 60").unwrap_err().to_string();
        assert!(error.contains("booting"), "{error}");
    }

    #[test]
    fn machines_do_not_run_natively() {
        let args = Line::parse_from(["bakeoff", "--kernel", "k"]).bakeoff;
        let native = crate::bench::mode::MODES.iter().find(|mode| !mode.needs_kernel()).unwrap();
        assert!(command(&args, native, Path::new("/")).unwrap_err().contains("natively"));
    }
}
