//! What every engine is to the machine around it: traits, exits and their accounting.
//!
//! A vCPU thread calls [`Vcpu::run`] in a loop; the engine comes back with a [`VcpuExit`]. Everything a vCPU
//! does to devices goes through [`CpuIo`], and everything the outside does to a vCPU goes through [`Signals`].

pub mod account;
pub mod cost;
pub mod debug;
pub mod exits;
pub mod host_tsc;
pub mod io;
pub mod profile;
pub mod report;
pub mod signals;

pub use debug::{Debug, DebugStop};
pub use exits::{Cause, ExitStats, VcpuExit};
pub use io::CpuIo;
pub use report::Report;
pub use signals::Signals;

use x86::CpuState;

/// One virtual CPU as an engine runs it.
pub trait Vcpu: Send {
    /// Executes guest instructions until something concerns the machine. `budget` bounds the number of
    /// instructions (exactly, at the next instruction boundary that takes interrupts), for `--clock icount`.
    fn run(&mut self, budget: u64) -> VcpuExit;
    /// The architectural state, complete and up to date.
    fn save(&mut self) -> CpuState;
    /// Takes on a state; everything derived from the old one is forgotten.
    fn restore(&mut self, state: &CpuState);
    /// What a debugger outside of the guest wants from now on; replaces what it wanted before. It may have written code.
    fn set_debug(&mut self, debug: &Debug);
    /// The signals that would wake the vCPU from [`VcpuExit::Halted`] now (an interrupt does not while RFLAGS.IF is clear).
    fn wake_mask(&self) -> u32;
    /// Instructions executed so far.
    fn instructions(&self) -> u64;
    /// Counted exits and other events.
    fn stats(&self) -> &ExitStats;
    /// What the engine says of its own work, beyond exits. It is asked while the vCPU stands still.
    fn report(&self) -> Report {
        Report::default()
    }
    /// Why the last [`Vcpu::run`] gave [`VcpuExit::Failed`], in one line.
    fn failure(&self) -> Option<String> {
        None
    }
}
