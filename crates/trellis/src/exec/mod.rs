//! `trellis exec`: a command of this host, in a VM of its own that sees the host's files and cannot change them.
//!
//! The guest's root file system is the host's, shared read-only by virtio-fs with an overlay in the guest's memory on top; `--rw`
//! directories are shared writable. Process 1 is this very program ([`agent`]), which starts the command and speaks with us
//! over a channel ([`protocol`]). What the command says comes out here, what is typed and signals go in, and its exit status
//! is ours.

pub mod agent;
mod child;
pub mod protocol;

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, IsTerminal as _, Read as _, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::{Args, ValueHint};
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use vmm::boot::BootSource;
use vmm::{Outcome, ShareOptions, ShareProtocol, Vm, VmConfig, VmHandle};

use crate::choice::{self, Wish};
use crate::image::root::{RootPlan, TAG};
use crate::image::{self, ImageSpec, Progress};
use crate::options::{
    ClockChoice, EngineChoice, MAX_CPUS, MmuChoice, parse_cpus, parse_memory, parse_timeout,
};
use crate::prepare::PrepareError;
use crate::terminal;
use protocol::{BLOCK, Frames, PORT, Start, frame, kind};

/// The word that makes this program the agent.
pub const AGENT: &str = "exec-agent";
/// Guest memory without `--memory`: the command's files that it writes lie in it, too.
const MEMORY_BYTES: u64 = 1 << 30;
/// CPUs without `--cpus`, at most.
const MOST_CPUS: usize = 4;
/// Standard input that is under way at most, in bytes.
const WINDOW: usize = 1 << 20;
/// How long a command may take to end after a signal that asks it to.
const GRACE: Duration = Duration::from_secs(5);
/// What is kept of the guest's console, for the case that it fails.
const CONSOLE_BYTES: usize = 4096;

/// The options of `trellis exec`.
#[derive(Args, Debug)]
pub struct ExecArgs {
    /// A directory that the command may change; again for more
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    rw: Vec<PathBuf>,
    /// Number of CPUs [default: those of this host, up to 4]
    #[arg(long, value_name = "N", value_parser = parse_cpus)]
    cpus: Option<u32>,
    /// Guest memory; files that the command writes elsewhere than in --rw lie in it [default: 1G]
    #[arg(long, short = 'm', value_name = "SIZE", value_parser = parse_memory)]
    memory: Option<u64>,
    /// What executes guest instructions [default: auto]
    #[arg(long)]
    engine: Option<EngineChoice>,
    /// End after so many seconds, with status 124
    #[arg(long, value_name = "SECONDS", value_parser = parse_timeout)]
    timeout: Option<f64>,
    /// The command and its arguments; behind -- if it could be taken for an option
    #[arg(required = true, trailing_var_arg = true, value_name = "COMMAND", value_hint = ValueHint::CommandWithArguments)]
    command: Vec<OsString>,
}

impl ExecArgs {
    /// The command and its arguments.
    #[must_use]
    pub fn command(&self) -> &[OsString] {
        &self.command
    }
}

/// What the threads of a run share.
#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    handle: OnceLock<VmHandle>,
    /// Held while a frame is sent, so that frames of two threads do not mix.
    sending: Mutex<()>,
}

#[derive(Default)]
struct State {
    ready: bool,
    status: Option<u8>,
    /// A signal that asks for the end, and was passed on.
    asked: Option<i32>,
    under_way: usize,
    console: VecDeque<u8>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`.
    fn wait(&self, done: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        while !done(&state) {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    fn change(&self, with: impl FnOnce(&mut State)) {
        with(&mut self.lock());
        self.changed.notify_all();
    }

    /// Sends a frame; waits for the guest to take it.
    fn send(&self, kind: u8, data: &[u8]) {
        let _one_at_a_time = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(handle) = self.handle.get() else { return };
        let bytes = frame(kind, data);
        let mut left = &bytes[..];
        while !left.is_empty() && self.lock().status.is_none() {
            let taken = handle.channel_send(left);
            left = &left[taken..];
            if taken == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }

    /// A frame of the guest. What it says is the command's output, and nothing else is believed of it.
    fn receive(&self, kind: u8, data: &[u8]) {
        match kind {
            kind::READY => self.change(|state| state.ready = true),
            // Who closed his end of a pipe does not want it.
            kind::STDOUT => {
                let mut out = io::stdout().lock();
                let _gone = out.write_all(data).and_then(|()| out.flush());
            }
            kind::STDERR => {
                let _gone = io::stderr().lock().write_all(data);
            }
            kind::TAKEN => {
                let taken = data.try_into().map_or(0, u32::from_le_bytes);
                let taken = usize::try_from(taken).unwrap_or(usize::MAX);
                self.change(|state| state.under_way = state.under_way.saturating_sub(taken));
            }
            kind::EXIT => {
                self.change(|state| state.status = Some(data.first().copied().unwrap_or(1)));
                self.quit();
            }
            _ => {}
        }
    }

    fn quit(&self) {
        if let Some(handle) = self.handle.get() {
            handle.quit();
        }
    }
}

/// What the guest writes to the channel.
struct FromGuest {
    shared: Arc<Shared>,
    frames: Frames,
}

impl Write for FromGuest {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let shared = Arc::clone(&self.shared);
        if self.frames.take(bytes, |kind, data| shared.receive(kind, data)).is_err() {
            // Not our agent: nothing of it can be understood any more.
            shared.quit();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The guest's serial line: its end is kept.
struct Console(Arc<Shared>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock();
        state.console.extend(bytes);
        let beyond = state.console.len().saturating_sub(CONSOLE_BYTES);
        state.console.drain(..beyond);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs the command; its exit status is ours.
///
/// # Errors
/// A fault of the host, or of the guest before the command began.
pub fn run(args: &ExecArgs) -> anyhow::Result<ExitCode> {
    let start = what_to_run(&args.command)?;
    let has_terminal = start.terminal.is_some();
    let shared = Arc::<Shared>::default();
    let mut vm = Vm::new(machine(args, &shared)?)?;
    let _first = shared.handle.set(vm.handle());
    watch_signals(&shared)?;
    let input = Arc::clone(&shared);
    std::thread::Builder::new().name("input".to_owned()).spawn(move || {
        let start = serde_json::to_vec(&start).expect("bytes and numbers");
        drop(input.wait(|state| state.ready));
        input.send(kind::START, &start);
        if has_terminal {
            // Every key is the command's from here on; what the terminal refuses, it does as it did.
            let _raw = terminal::RawMode::enter().map(|raw| raw.map(std::mem::forget));
        }
        pass_input(&input);
    })?;
    let outcome = vm.run()?;
    drop(vm);
    terminal::restore();
    let state = shared.lock();
    match (state.status, state.asked, outcome) {
        (Some(status), _, _) => Ok(ExitCode::from(status)),
        (None, Some(signal), _) => Ok(ExitCode::from(u8::try_from(128 + signal).unwrap_or(1))),
        (None, None, Outcome::Timeout) => {
            terminal::tell("trellis: time-out\n");
            Ok(ExitCode::from(124))
        }
        (None, None, outcome) => {
            let console: Vec<u8> = state.console.iter().copied().collect();
            let console = String::from_utf8_lossy(&console).escape_debug().to_string();
            anyhow::bail!(
                "the guest ended ({outcome:?}) before the command did; its console ends with: {console}"
            )
        }
    }
}

fn what_to_run(command: &[OsString]) -> anyhow::Result<Start> {
    let directory = std::env::current_dir().context("there is no working directory")?;
    let umask = rustix::process::umask(rustix::fs::Mode::empty());
    rustix::process::umask(umask);
    Ok(Start {
        command: command.iter().map(|word| word.as_bytes().to_vec()).collect(),
        environment: std::env::vars_os().map(|(k, v)| (k.into_vec(), v.into_vec())).collect(),
        directory: directory.into_os_string().into_vec(),
        user: rustix::process::getuid().as_raw(),
        group: rustix::process::getgid().as_raw(),
        groups: rustix::process::getgroups()?.into_iter().map(rustix::process::Gid::as_raw).collect(),
        umask: umask.as_raw_mode(),
        limits: child::limits(),
        terminal: terminal_size(),
        terminal_errors: io::stderr().is_terminal(),
    })
}

/// Columns and rows, if both input and output are a terminal: then the command gets one, too.
fn terminal_size() -> Option<(u16, u16)> {
    let both = io::stdin().is_terminal() && io::stdout().is_terminal();
    both.then(|| terminal::window_size().unwrap_or((80, 24)))
}

/// The machine: our kernel, the host's root, the directories that may be changed.
fn machine(args: &ExecArgs, shared: &Arc<Shared>) -> anyhow::Result<VmConfig> {
    let engine = args.engine.unwrap_or(EngineChoice::Auto);
    let wish = Wish { engine, mmu: MmuChoice::Auto, clock: ClockChoice::Host, translator: false };
    let engine = choice::decide(wish, engine_kvm::probe::host())?.engine;
    let program = std::env::current_exe().context("this program's own file is not known")?;
    let program = program.to_str().filter(|path| !path.contains(char::is_whitespace));
    let program = program.context("this program lies at a path with blanks; call it by another")?;
    let mut plan = RootPlan {
        overlay: true,
        hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        program: format!("{program} {AGENT}"),
        mounts: Vec::new(),
    };
    let mut shares = vec![ShareOptions {
        path: "/".into(),
        tag: TAG.to_owned(),
        read_only: true,
        protocol: ShareProtocol::Fuse,
        // A command sees the files as they were when it began.
        is_static: true,
    }];
    for (n, directory) in args.rw.iter().enumerate() {
        let (share, place) = writable(directory, n)?;
        plan.mounts.push((share.tag.clone(), place, true));
        shares.push(share);
    }
    let image = image::ensure_module(&ImageSpec::default_debian(), "overlay", Progress::new)?;
    let read = |path: &Path| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let initrd = read(image.initrd.as_deref().context("the image has no initrd")?)?;
    let source = BootSource {
        kernel: read(&image.kernel)?,
        kernel_name: image.manifest.name.clone(),
        cmdline: "console=ttyS0 quiet panic=-1".to_owned(),
        initrd: Some(plan.initramfs(&initrd)),
        ..BootSource::default()
    };
    let cpus = std::thread::available_parallelism().map_or(1, |count| count.get().min(MOST_CPUS));
    Ok(VmConfig {
        memory_bytes: args.memory.unwrap_or(MEMORY_BYTES),
        cpus: args.cpus.unwrap_or_else(|| u32::try_from(cpus).unwrap_or(1).min(MAX_CPUS)),
        engine,
        shares,
        serial: Some(Box::new(Console(Arc::clone(shared)))),
        channel: Some((
            PORT.to_owned(),
            Box::new(FromGuest { shared: Arc::clone(shared), frames: Frames::default() }),
        )),
        no_reboot: true,
        timeout: args.timeout.map(Duration::from_secs_f64),
        ..VmConfig::new(source)
    })
}

/// A directory that may be changed, and where it lies in the root.
fn writable(directory: &Path, number: usize) -> anyhow::Result<(ShareOptions, String)> {
    let path = directory.canonicalize().with_context(|| format!("cannot share {}", directory.display()))?;
    ensure!(path.is_dir(), "cannot share {}: it is no directory", directory.display());
    if path == Path::new("/") {
        let why = "--rw / would let the command change everything; name the directories that it may change";
        return Err(PrepareError::Usage(why.to_owned()).into());
    }
    let place = path.to_str().with_context(|| format!("the name of {} is no text", directory.display()))?;
    let place = place.to_owned();
    let tag = format!("trellis.rw{number}");
    let protocol = ShareProtocol::Fuse;
    Ok((ShareOptions { path, tag, read_only: false, protocol, is_static: false }, place))
}

/// Standard input, until it ends.
fn pass_input(shared: &Shared) {
    let (mut stdin, mut block) = (io::stdin().lock(), vec![0; BLOCK]);
    loop {
        drop(shared.wait(|state| state.under_way < WINDOW));
        match stdin.read(&mut block) {
            Ok(len) => {
                shared.change(|state| state.under_way += len);
                shared.send(kind::STDIN, &block[..len]);
                if len == 0 {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return shared.send(kind::STDIN, &[]),
        }
    }
}

/// Tells the guest how large the terminal is by now.
fn send_size(shared: &Shared) {
    if let Some((columns, rows)) = terminal_size().filter(|_| shared.lock().ready) {
        shared.send(kind::SIZE, &[columns.to_le_bytes(), rows.to_le_bytes()].concat());
    }
}

/// Passes signals on. Who asks twice for the end, or finds that the command does not follow, gets the end of the machine.
fn watch_signals(shared: &Arc<Shared>) -> anyhow::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([
        SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGWINCH, SIGCONT,
    ])?;
    let shared = Arc::clone(shared);
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for signal in signals.forever() {
            match signal {
                SIGWINCH => {
                    send_size(&shared);
                    continue;
                }
                SIGCONT => {
                    terminal::reenter();
                    continue;
                }
                _ => {}
            }
            let (ready, again) = {
                let mut state = shared.lock();
                let asks = !matches!(signal, SIGUSR1 | SIGUSR2);
                let again = asks && state.asked.is_some();
                if asks {
                    state.asked.get_or_insert(signal);
                }
                (state.ready, again)
            };
            if again || !ready {
                shared.quit();
                continue;
            }
            shared.send(kind::SIGNAL, &[u8::try_from(signal).unwrap_or(0)]);
            let (after, asked) = (Arc::clone(&shared), shared.lock().asked.is_some());
            let grace = move || {
                std::thread::sleep(GRACE);
                after.quit();
            };
            if asked && std::thread::Builder::new().spawn(grace).is_err() {
                shared.quit();
            }
        }
    })?;
    Ok(())
}
