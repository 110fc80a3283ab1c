//! The threads that run vCPUs, and the vCPUs' registers at power-on.
//!
//! A thread owns its vCPU while the machine runs and gives it back when [`Control::stopping`] says so; then the run thread
//! may look into it.

use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use devices::clock::{Clock, TimerQueue};
use engine::signals::Signal;
use engine::{Signals, Vcpu, VcpuExit};
use x86::state::Activity;
use x86::{Attr, CpuState, Segment};

use crate::boot::{InitialState, SegmentState};
use crate::clock::GuestClock;
use crate::control::{Control, Event};

/// Longest sleep of a halted vCPU. A wake-up is never missed; this is for peace of mind.
const NAP: Duration = Duration::from_secs(1);
/// With `icount`: instructions between two looks at the timers. The clock stands still in between.
const SLICE: u64 = 1000;
/// With `icount`: so many deadlines in a row that do not wake a vCPU whose interrupts are off mean that nothing will.
const FUTILE_DEADLINES: u32 = 100_000;

/// Posts [`Event::Panic`] when its thread panics, so that nobody waits for it.
pub(crate) struct Alarm(pub Arc<Control>);

impl Drop for Alarm {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.post(Event::Panic);
        }
    }
}

/// What drives time with `icount`.
pub(crate) struct Icount {
    pub clock: Arc<GuestClock>,
    pub timers: Arc<TimerQueue>,
    /// Input from outside may wake the vCPU.
    pub input: bool,
}

/// A vCPU about to run.
pub(crate) struct Seat {
    pub index: usize,
    pub vcpu: Box<dyn Vcpu>,
    pub signals: Arc<Signals>,
    pub control: Arc<Control>,
    pub icount: Option<Icount>,
    /// Time that the vCPU slept.
    pub asleep: Duration,
}

/// What a thread gives back.
pub(crate) struct Left {
    pub vcpu: Box<dyn Vcpu>,
    /// How long it slept.
    pub asleep: Duration,
    /// CPU time that the thread had, as the host's kernel says.
    pub cpu: Duration,
    /// How long it waited for a CPU of the host.
    pub waiting: Duration,
}

/// How long this thread was ready to run and did not, as the host's kernel says (Linux, Documentation/scheduler/sched-stats.rst); zero where it does not.
fn waiting_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let word = text.split_whitespace().nth(1);
    Duration::from_nanos(word.and_then(|ns| ns.parse().ok()).unwrap_or(0))
}

/// CPU time of this thread.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

impl Seat {
    /// Starts the thread.
    pub fn spawn(self) -> io::Result<JoinHandle<Left>> {
        Builder::new().name(format!("vcpu{}", self.index)).spawn(move || self.run())
    }

    fn run(mut self) -> Left {
        let _alarm = Alarm(Arc::clone(&self.control));
        match self.icount.take() {
            None => self.run_on_host_time(),
            Some(icount) => self.run_by_instructions(&icount),
        }
        Left { vcpu: self.vcpu, asleep: self.asleep, cpu: cpu_time(), waiting: waiting_time() }
    }

    fn run_on_host_time(&mut self) {
        while !self.control.stopping() {
            match self.vcpu.run(u64::MAX) {
                VcpuExit::Kicked | VcpuExit::Budget => {}
                VcpuExit::Halted => self.sleep(self.vcpu.wake_mask() | Signal::KICK.0),
                VcpuExit::TripleFault => self.control.post(Event::TripleFault(self.index)),
                VcpuExit::Debug(stop) => self.control.post(Event::Debug(self.index, stop)),
                VcpuExit::Failed => self.fail(),
            }
        }
    }

    fn fail(&self) {
        let why = self.vcpu.failure().unwrap_or_else(|| "the engine gave no reason".to_owned());
        self.control.post(Event::Failed(why));
    }

    fn sleep(&mut self, mask: u32) {
        let from = Instant::now();
        self.signals.wait(mask, NAP);
        self.asleep += from.elapsed();
    }

    fn run_by_instructions(&mut self, icount: &Icount) {
        let mut futile = 0;
        while !self.control.stopping() {
            let now = icount.clock.now();
            icount.timers.run_due(now);
            let left = icount.timers.next_deadline().map_or(SLICE, |at| at.0.saturating_sub(now.0));
            let before = self.vcpu.instructions();
            let exit = self.vcpu.run(left.clamp(1, SLICE));
            icount.clock.advance(self.vcpu.instructions().wrapping_sub(before));
            match exit {
                VcpuExit::Kicked | VcpuExit::Budget => futile = 0,
                VcpuExit::Halted => self.idle(icount, &mut futile),
                VcpuExit::TripleFault => self.control.post(Event::TripleFault(self.index)),
                VcpuExit::Debug(stop) => self.control.post(Event::Debug(self.index, stop)),
                VcpuExit::Failed => self.fail(),
            }
        }
    }

    /// Time jumps to the next deadline.
    fn idle(&mut self, icount: &Icount, futile: &mut u32) {
        let mask = self.vcpu.wake_mask() | Signal::KICK.0;
        if self.signals.pending() & mask != 0 {
            *futile = 0;
            return;
        }
        if mask & Signal::INTERRUPT.0 == 0 {
            *futile += 1;
        }
        match icount.timers.next_deadline() {
            Some(at) if *futile < FUTILE_DEADLINES => {
                icount.clock.advance(at.0.saturating_sub(icount.clock.now().0));
            }
            None if icount.input && mask & Signal::INTERRUPT.0 != 0 => self.sleep(mask),
            _ => self.control.post(Event::Stuck),
        }
    }
}

/// IA32_MTRR_DEF_TYPE as firmware leaves it: enabled, fixed ranges too, write-back (SDM 3A 12.11.2.1).
const MTRR_ENABLED_WRITE_BACK: u64 = 0xc06;
const WRITE_BACK: u64 = 0x0606_0606_0606_0606;
const WRITE_PROTECT: u64 = 0x0505_0505_0505_0505;
/// The hole below 4 GiB: base 3 GiB, 1 GiB long, uncacheable, valid.
const HOLE_BASE: u64 = guestmem::HOLE_START;
const MTRR_VALID: u64 = 1 << 11;

/// What firmware does to every processor.
fn after_firmware(phys_bits: u8) -> CpuState {
    let mut state = CpuState::reset();
    state.cr0 = x86::bits::cr0::ET;
    state.msr.mtrr_def_type = MTRR_ENABLED_WRITE_BACK;
    // 64K and first 16K register: RAM; the second 16K one: VGA, uncacheable; 4K ones: ROM.
    for (register, types) in state.msr.mtrr_fixed.iter_mut().enumerate() {
        *types = [WRITE_BACK, WRITE_BACK, 0].get(register).copied().unwrap_or(WRITE_PROTECT);
    }
    let size_mask = ((1 << phys_bits.clamp(36, 52)) - 1) & !((guestmem::HOLE_END - HOLE_BASE) - 1);
    state.msr.mtrr_variable[0] = HOLE_BASE;
    state.msr.mtrr_variable[1] = size_mask | MTRR_VALID;
    state
}

/// An application processor as firmware leaves it: waiting for its start-up IPI.
pub(crate) fn application_processor(phys_bits: u8) -> CpuState {
    CpuState { activity: Activity::WaitForSipi, ..after_firmware(phys_bits) }
}

fn segment(s: SegmentState) -> Segment {
    Segment { selector: s.selector, attr: Attr(s.attributes), limit: s.limit, base: s.base }
}

/// The bootstrap processor at the kernel's first instruction.
pub(crate) fn bootstrap_processor(entry: &InitialState, phys_bits: u8) -> CpuState {
    let mut state = after_firmware(phys_bits);
    let s = &entry.segments;
    state.gpr = entry.gprs;
    state.rip = entry.rip;
    state.rflags = entry.rflags;
    state.seg = [s.es, s.cs, s.ss, s.ds, s.fs, s.gs].map(segment);
    state.ldtr = segment(s.ldtr);
    state.tr = segment(s.tr);
    state.gdtr = x86::TableRegister { base: entry.gdtr.base, limit: entry.gdtr.limit };
    state.idtr = x86::TableRegister { base: entry.idtr.base, limit: entry.idtr.limit };
    state.cr0 = entry.cr0;
    state.cr3 = entry.cr3;
    state.cr4 = entry.cr4;
    state.msr.efer = entry.efer;
    state
}
