//! What a debugger outside of the guest wants of this vCPU, in the form that the run loop asks it.
//!
//! Breakpoints are compared before an instruction. Single steps and watchpoint hits leave a stop behind, which is reported
//! before the next; [`Cpu::careful`] holds while anything is armed, so that somebody looks behind every instruction that
//! matters: `Interp::run_carefully`, or `Interp::attend` for another engine. INV-DEBUG-1 (see [`engine::debug`]): the guest
//! sees nothing of it.
//!
//! DEVIATION: accesses of the processor itself (descriptor tables, page tables, interrupt frames) do not hit watchpoints,
//! as in other machines' stubs; debuggers do not expect it.

use engine::Debug;
use engine::debug::{DebugStop, Watchpoint};
use x86::addr::PAGE_MASK;

use crate::cpu::Cpu;

/// What is armed, and a stop that waits to be reported.
#[derive(Default)]
pub struct DebugState {
    wanted: Debug,
    stop: Option<DebugStop>,
    armed: bool,
    stepwise: bool,
    /// A step begins: a breakpoint at its first instruction has had its say.
    passing: bool,
}

impl DebugState {
    fn arm(&mut self, wanted: &Debug) {
        self.wanted = wanted.clone();
        self.stop = None;
        self.armed = wanted.is_armed();
        self.stepwise = wanted.step.is_some() || self.watches();
        self.passing = wanted.step.is_some();
    }

    /// Whether anything is.
    #[inline(always)]
    pub const fn is_armed(&self) -> bool {
        self.armed
    }

    /// Whether every instruction matters, wherever it is.
    #[inline(always)]
    pub const fn is_stepwise(&self) -> bool {
        self.stepwise
    }

    /// Whether data accesses matter.
    pub const fn watches(&self) -> bool {
        !self.wanted.watchpoints.is_empty()
    }

    /// Whether a step is in progress that interrupts are not to disturb.
    pub const fn holds_interrupts(&self) -> bool {
        self.wanted.step.is_some()
    }

    /// Whether to stop before the instruction at the linear address `la`.
    pub fn breaks_at(&self, la: u64) -> bool {
        !self.passing && self.wanted.breakpoints().binary_search(&la).is_ok()
    }

    /// Whether there is one in the page of `la`.
    pub fn breaks_in_page(&self, la: u64) -> bool {
        let breakpoints = self.wanted.breakpoints();
        let first = breakpoints.partition_point(|&b| b < la & !PAGE_MASK);
        breakpoints.get(first).is_some_and(|&b| b <= la | PAGE_MASK)
    }

    /// An instruction is done, or an exception was delivered: RIP is `rip` now.
    #[inline(always)]
    pub fn note_step(&mut self, rip: u64) {
        self.passing = false;
        if self.stepwise
            && self.stop.is_none()
            && self.wanted.step.as_ref().is_some_and(|range| !range.contains(&rip))
        {
            self.stop = Some(DebugStop::Step);
        }
    }

    /// The current instruction reads or writes `len` bytes at the linear address `la`.
    #[inline(always)]
    pub fn note_access(&mut self, la: u64, len: usize, write: bool) {
        if self.watches() {
            self.compare(la, len, write);
        }
    }

    #[cold]
    fn compare(&mut self, la: u64, len: usize, write: bool) {
        let hit = |w: &&Watchpoint| w.kind.takes(write) && w.touched_by(la, len as u64);
        if let Some(w) = self.wanted.watchpoints.iter().find(hit) {
            self.stop = Some(DebugStop::Watch { address: la.max(w.start), kind: w.kind });
        }
    }

    /// The current instruction did not complete: its accesses will come again.
    pub const fn forget_access(&mut self) {
        self.stop = None;
    }

    /// The stop to report.
    pub const fn take_stop(&mut self) -> Option<DebugStop> {
        self.stop.take()
    }
}

impl Cpu {
    /// Arms what a debugger wants. It may have written code without a trace of it in this engine.
    pub fn set_debug(&mut self, wanted: &Debug) {
        self.debug.arm(wanted);
        self.code_changed = true;
        self.derive_variant();
        self.derive_poll_mask();
    }
}
