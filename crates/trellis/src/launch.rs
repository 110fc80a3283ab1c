//! The seam between the program and the machine: assembles a `vmm` machine out of what [`crate::prepare`] prepared, runs it
//! on a [`Console`], and turns the reason of its end into an exit status.
//!
//! Who has the terminal: with `--vga text` on a terminal the display is drawn there ([`crate::display`]) and keys go to the
//! PS/2 keyboard; otherwise it is the serial port's. Without a terminal the serial port has standard input and output, and
//! a display shows its last screen at the end.

use std::fs::File;
use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use vmm::boot::{self, BootSource, Protocol};
use vmm::gdb::Stub;
use vmm::{ClockMode, Outcome, Sink, Stats, TraceWhat, Vm, VmConfig, VmHandle};

use crate::control::{Info, server};
use crate::display::{self, Display};
use crate::gdb::{self, GdbTarget};
use crate::metrics;
use crate::options::{ClockChoice, StatsTarget, VgaChoice};
use crate::prepare::{Module, Output, Prepared};
use crate::terminal::{
    Console, ConsoleWriter, Ending, FileWriter, Handlers, Haste, InputHandler, QuitHandler, QuitReason,
    stop_waiting, stop_waiting_after, tell,
};

/// What the contract suite writes to the exit port when all its tests passed.
const CONTRACT_PASSED: u32 = 0x10;
/// How long the input thread waits for the guest before it looks again.
const ROOM_WAIT: Duration = Duration::from_secs(1);

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The guest powered off, or reset itself under `--no-reboot`.
    GuestDone,
    /// The guest wrote this to port 0xf4 under `--isa-debug-exit`.
    DebugExit(u32),
    /// The contract suite ended: whether all its tests passed.
    Contract(bool),
    /// A vCPU shut down by a triple fault.
    TripleFault,
    /// `--timeout` ran out.
    TimeOut,
    /// The guest waits for an interrupt that cannot come.
    Stuck,
    /// The user or the system ended it.
    Quit(QuitReason),
}

impl End {
    /// The exit status of the program; the operating system keeps its low eight bits, as it does for QEMU.
    #[must_use]
    pub fn exit_status(self) -> u8 {
        match self {
            Self::GuestDone | Self::Contract(true) => 0,
            Self::Contract(false) | Self::Stuck => 1,
            Self::DebugExit(value) => (value << 1 | 1).to_le_bytes()[0],
            Self::TripleFault => 3,
            Self::TimeOut => 124, // as timeout(1)
            Self::Quit(reason) => reason.exit_status(),
        }
    }
}

/// Why the user ended the run, once he did.
type Reason = Arc<Mutex<Option<QuitReason>>>;

/// Runs the machine to its end.
///
/// # Errors
/// A fault of the host; what the guest does is a status.
pub fn launch(prepared: Prepared) -> anyhow::Result<ExitCode> {
    let wiring = Wiring::of(&prepared);
    let (is_contract, stats) = (prepared.is_contract, prepared.stats.clone());
    let timeout = prepared.timeout_seconds.map(Duration::from_secs_f64);
    let gdb = Gdb { target: prepared.gdb.clone(), wait: prepared.gdb_wait };
    let gdb_place = gdb.bind()?;
    let socket = server::bind(prepared.name.as_deref(), &prepared.control).map_err(anyhow::Error::msg)?;
    let info = info(&prepared);
    let metrics = prepared.metrics.map(metrics::bind).transpose().map_err(anyhow::Error::msg)?;
    let grace = prepared.extras.grace();
    let mut vm = Vm::new(config(prepared, &wiring)?)?;
    let handle = vm.handle();
    let name = socket.as_ref().map(|socket| socket.name().to_owned());
    let labels = Info { name: name.unwrap_or_else(|| format!("vm-{}", std::process::id())), ..info.clone() };
    metrics.map(|bound| bound.serve(handle.clone(), labels)).transpose()?;
    let _control = socket.map(|socket| socket.serve(handle.clone(), info)).transpose()?;
    let stub = gdb_place.map(|place| gdb.serve(place, &handle)).transpose()?;
    let reason = Reason::default();
    let console = Console::start(
        handlers(&handle, &wiring, quit_handler(&handle, &reason, grace)),
        wiring.reads_input(),
    )
    .context("cannot set up the terminal")?;
    let display =
        (wiring.display == display::Way::Live).then(|| Display::start(handle.clone())).transpose()?;
    if let Some(limit) = timeout {
        stop_waiting_after(limit);
    }
    let outcome = vm.run();
    drop(display);
    if wiring.display == display::Way::AtEnd {
        // A reader who has gone away does not want it.
        let _gone = ConsoleWriter::new().write_all(handle.screendump().as_bytes());
    }
    drop(console);
    if let Some(target) = &stats {
        report(&vm.stats(), target)?;
    }
    let end = end_of(outcome?, is_contract, &reason);
    if let Some((stub, _place)) = stub {
        stub.end(end.exit_status());
    }
    Ok(ExitCode::from(end.exit_status()))
}

/// `--gdb` and `--gdb-wait`.
struct Gdb {
    target: Option<GdbTarget>,
    wait: bool,
}

impl Gdb {
    fn bind(&self) -> anyhow::Result<Option<gdb::Bound>> {
        let bound = self.target.as_ref().map(|target| gdb::bind(&target.place));
        bound.transpose().map_err(anyhow::Error::msg)
    }

    /// Serves gdb from now on; says where.
    fn serve(&self, mut place: gdb::Bound, handle: &VmHandle) -> anyhow::Result<(Stub, gdb::Bound)> {
        let listener = place.take().context("the place for gdb is served already")?;
        let arch = self.target.as_ref().and_then(|target| target.arch);
        let stub = Stub::start(listener, handle.clone(), self.wait, arch)
            .context("cannot start the thread that serves gdb")?;
        let waits = if self.wait { "; nothing runs before" } else { "" };
        tell(&format!("trellis: gdb can attach by: target remote {}{waits}\n", place.address));
        Ok((stub, place))
    }
}

/// What `trellis list` shows of the machine.
fn info(prepared: &Prepared) -> Info {
    let (guest, cpus, memory_bytes) = (prepared.kernel_name.clone(), prepared.cpus, prepared.memory_bytes);
    let engine = prepared.engine.name().to_owned();
    Info { guest, cpus, engine, memory_bytes, ..Info::default() }
}

/// Who gets the terminal.
struct Wiring {
    serial_input: bool,
    display: display::Way,
}

impl Wiring {
    fn of(prepared: &Prepared) -> Self {
        let display = match prepared.vga {
            VgaChoice::None => display::Way::None,
            VgaChoice::Text if std::io::stdout().is_terminal() => display::Way::Live,
            VgaChoice::Text => display::Way::AtEnd,
        };
        let serial_input = matches!(prepared.serial, Output::Stdio) && display != display::Way::Live;
        Self { serial_input, display }
    }

    fn reads_input(&self) -> bool {
        self.serial_input || self.display == display::Way::Live
    }

    /// The writer behind `output`; the terminal is not written to while the display is drawn on it.
    fn sink(&self, output: Output) -> Option<Sink> {
        match output {
            Output::Stdio if self.display == display::Way::Live => None,
            Output::Stdio => Some(Box::new(ConsoleWriter::new())),
            Output::File(file) => Some(Box::new(FileWriter(file))),
            Output::None => None,
        }
    }
}

/// The machine that was asked for.
fn config(prepared: Prepared, wiring: &Wiring) -> anyhow::Result<VmConfig> {
    let source = boot_source(
        prepared.kernel_name,
        (prepared.kernel, prepared.kernel_file),
        prepared.modules,
        prepared.append,
    )?;
    let inside = prepared.inside;
    let trace_what = inside.trace.as_ref().map(|trace| TraceWhat {
        events: trace.events,
        engine: trace.engine,
        range: inside.trace_range.unwrap_or_default(),
    });
    let trace_what = trace_what.unwrap_or_default();
    Ok(VmConfig {
        memory_bytes: prepared.memory_bytes,
        cpus: prepared.cpus,
        cpu: prepared.cpu,
        engine: prepared.engine,
        disks: prepared.disks,
        shares: prepared.shares,
        nets: prepared.nets,
        vsock: prepared.vsock,
        balloon: prepared.extras.balloon,
        rtc: prepared.extras.rtc_base(),
        serial: wiring.sink(prepared.serial),
        debugcon: wiring.sink(prepared.debugcon),
        vga: prepared.vga == VgaChoice::Text,
        isa_debug_exit: prepared.isa_debug_exit,
        no_reboot: prepared.no_reboot,
        timeout: prepared.timeout_seconds.map(Duration::from_secs_f64),
        clock: match prepared.clock {
            ClockChoice::Host => ClockMode::Host,
            ClockChoice::Icount => ClockMode::Icount,
        },
        // The contract suite tests it.
        save_at_marker: prepared.save_at_marker || prepared.is_contract,
        input: wiring.reads_input(),
        trace: inside.trace.map(|_| trace_sink(prepared.trace_file)),
        trace_what,
        perf_map: inside.perf_map,
        jitdump: inside.jitdump,
        sampling_hz: inside.profile,
        ..VmConfig::new(source)
    })
}

/// Where the trace goes: a file, or standard error.
fn trace_sink(file: Option<File>) -> Sink {
    match file {
        Some(file) => Box::new(FileWriter(file)),
        None => Box::new(std::io::stderr()),
    }
}

/// Initrd or modules, as the kernel's protocol has them.
fn boot_source(
    kernel_name: String,
    (kernel, file): (Vec<u8>, Option<File>),
    modules: Vec<Module>,
    cmdline: String,
) -> anyhow::Result<BootSource> {
    let mut source =
        BootSource { kernel, kernel_file: file.map(Arc::new), kernel_name, cmdline, ..BootSource::default() };
    let protocol = boot::recognise(&source).with_context(|| format!("cannot boot {}", source.kernel_name))?;
    let mut modules = modules.into_iter();
    if protocol != Protocol::Multiboot {
        source.initrd = modules.next().map(|module| module.content);
    }
    source.modules =
        modules.map(|module| boot::Module { data: module.content, cmdline: module.command_line }).collect();
    Ok(source)
}

/// Ends the run. With time the guest's power button is pressed first, where the guest listens to it, and it has `grace` from
/// there.
fn quit_handler(handle: &VmHandle, reason: &Reason, grace: Duration) -> QuitHandler {
    let (handle, reason) = (handle.clone(), Arc::clone(reason));
    Arc::new(move |why, haste| {
        let (ours, reason) = (handle.clone(), Arc::clone(&reason));
        let end = move || {
            reason.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(why);
            stop_waiting();
            ours.quit();
        };
        if haste == Haste::AtOnce || grace.is_zero() || !handle.power_button() {
            end();
            return Ending::Now;
        }
        tell(&format!(
            "trellis: the guest is asked to shut down, and ended in {} s; a second signal ends it at once\n",
            grace.as_secs_f64()
        ));
        let later = std::thread::Builder::new().name("grace".to_owned()).spawn(move || {
            std::thread::sleep(grace);
            end();
        });
        if later.is_err() {
            // Without a thread nothing else would end it.
            handle.quit();
            return Ending::Now;
        }
        Ending::Asked
    })
}

fn handlers(handle: &VmHandle, wiring: &Wiring, quit: QuitHandler) -> Handlers {
    let input: InputHandler = if wiring.display == display::Way::Live {
        let (handle, mut keys) = (handle.clone(), display::Keys::default());
        Box::new(move |bytes| {
            // A keyboard that nobody reads loses keys, as real ones do.
            let _lost = handle.type_keys(&keys.feed(bytes));
        })
    } else {
        serial_input(handle.clone())
    };
    let (stats, screen, resize) = (handle.clone(), handle.clone(), handle.clone());
    Handlers {
        input,
        quit,
        stats: Box::new(move || {
            if let Some(stats) = stats.stats() {
                tell(&format!("\n{stats}"));
            }
        }),
        // Cooked for a raw terminal: its output is processed.
        screen: Box::new(move || tell(&format!("\n{}", screen.screendump()))),
        resize: Box::new(move |columns, rows| resize.resize(columns, rows)),
    }
}

/// Bytes for COM1. From a pipe, all arrive: the pipe waits until the guest reads. From a terminal, what a guest leaves unread
/// by the tens of kilobytes is lost, so that the Ctrl-A keys stay alive.
fn serial_input(handle: VmHandle) -> InputHandler {
    let waits = !std::io::stdin().is_terminal();
    Box::new(move |bytes| {
        let mut left = bytes;
        loop {
            left = &left[handle.serial_input(left)..];
            if left.is_empty() || !waits {
                return;
            }
            handle.wait_serial_room(ROOM_WAIT);
        }
    })
}

fn end_of(outcome: Outcome, is_contract: bool, reason: &Reason) -> End {
    match outcome {
        Outcome::PoweredOff | Outcome::Reset => End::GuestDone,
        Outcome::DebugExit(value) if is_contract => End::Contract(value == CONTRACT_PASSED),
        Outcome::DebugExit(value) => End::DebugExit(value),
        Outcome::TripleFault { vcpu, rip } => {
            tell(&format!("trellis: triple fault: CPU {vcpu} shut down, its RIP is {rip:#x}\n"));
            End::TripleFault
        }
        Outcome::Timeout => {
            tell("trellis: time-out\n");
            End::TimeOut
        }
        Outcome::Stuck { rip } => {
            tell(&format!(
                "trellis: the guest halted at RIP {rip:#x} and nothing can wake it; ended (with --clock host it would wait for ever)\n"
            ));
            End::Stuck
        }
        Outcome::Quit => {
            let reason = reason.lock().unwrap_or_else(PoisonError::into_inner).unwrap_or(QuitReason::Key);
            End::Quit(reason)
        }
    }
}

/// Prints or writes the statistics.
fn report(stats: &Stats, target: &StatsTarget) -> anyhow::Result<()> {
    match target {
        StatsTarget::Print => tell(&stats.to_string()),
        StatsTarget::File(path) => std::fs::write(path, format!("{:#}\n", stats.to_json()))
            .with_context(|| format!("cannot write the statistics to {}", path.display()))?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_statuses_are_as_documented() {
        let ends = [
            (End::GuestDone, 0),
            (End::DebugExit(0), 1),
            (End::DebugExit(0x10), 33),
            (End::DebugExit(0x8000_0080), 1),
            (End::Contract(true), 0),
            (End::Contract(false), 1),
            (End::TripleFault, 3),
            (End::TimeOut, 124),
            (End::Stuck, 1),
            (End::Quit(QuitReason::Key), 0),
        ];
        for (end, status) in ends {
            assert_eq!(end.exit_status(), status, "{end:?}");
        }
    }
}
