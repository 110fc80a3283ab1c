//! What a debugger outside of the guest wants of a vCPU: [`struct@Debug`], and how the vCPU answers: [`DebugStop`].
//!
//! INV-DEBUG-1: nothing of this can be seen from inside. No byte of guest memory, no debug register, no flag and no
//! counter changes; an engine compares addresses before an instruction (breakpoints) and with each access (watchpoints).
//!
//! Cost: none while nothing is armed. An engine may run instruction by instruction while something is.

use std::ops::Range;

/// Which accesses a watchpoint stops at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WatchKind {
    /// Reads, those of read-modify-writes too.
    Read,
    /// Writes, whether they change the value or not.
    Write,
    /// Both.
    Access,
}

impl WatchKind {
    /// Whether it stops at a write, or at a read.
    #[must_use]
    pub const fn takes(self, write: bool) -> bool {
        match self {
            Self::Read => !write,
            Self::Write => write,
            Self::Access => true,
        }
    }
}

/// Bytes of the linear address space that are watched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Watchpoint {
    /// Linear address of the first byte.
    pub start: u64,
    /// How many.
    pub len_bytes: u64,
    /// Which accesses.
    pub kind: WatchKind,
}

impl Watchpoint {
    /// Whether `len_bytes` at linear address `la` touch it.
    #[must_use]
    pub const fn touched_by(&self, la: u64, len_bytes: u64) -> bool {
        // By differences: either range may end at the top of the address space.
        la.wrapping_sub(self.start) < self.len_bytes || self.start.wrapping_sub(la) < len_bytes
    }
}

/// What is armed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Debug {
    breakpoints: Vec<u64>,
    /// Accesses to stop after.
    pub watchpoints: Vec<Watchpoint>,
    /// Stop after one instruction (also from a breakpoint), or after the first that ends with RIP outside of this range. Interrupts wait meanwhile,
    /// unless the vCPU waits for one itself.
    pub step: Option<Range<u64>>,
}

impl Debug {
    /// Stops before the instructions at these linear addresses.
    #[must_use]
    pub fn with_breakpoints(addresses: impl IntoIterator<Item = u64>) -> Self {
        let mut breakpoints: Vec<u64> = addresses.into_iter().collect();
        breakpoints.sort_unstable();
        breakpoints.dedup();
        Self { breakpoints, ..Self::default() }
    }

    /// The breakpoints, ascending.
    #[must_use]
    pub fn breakpoints(&self) -> &[u64] {
        &self.breakpoints
    }

    /// Whether anything is.
    #[must_use]
    pub const fn is_armed(&self) -> bool {
        self.step.is_some() || !self.breakpoints.is_empty() || !self.watchpoints.is_empty()
    }
}

/// Why a vCPU stopped for the debugger.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DebugStop {
    /// There is a breakpoint on the next instruction.
    Breakpoint,
    /// The step is done.
    Step,
    /// The last instruction touched a watchpoint.
    Watch {
        /// The first byte of it that was touched.
        address: u64,
        /// The kind of the watchpoint.
        kind: WatchKind,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watchpoint_is_touched_by_any_overlap_also_at_the_top() {
        let at = |start, len_bytes| Watchpoint { start, len_bytes, kind: WatchKind::Write };
        assert!(at(0x1004, 4).touched_by(0x1000, 5) && at(0x1004, 4).touched_by(0x1007, 1));
        assert!(!at(0x1004, 4).touched_by(0x1000, 4) && !at(0x1004, 4).touched_by(0x1008, 8));
        assert!(at(u64::MAX, 1).touched_by(u64::MAX - 7, 8) && !at(u64::MAX, 1).touched_by(0, 8));
    }

    #[test]
    fn breakpoints_are_sorted_and_single() {
        assert_eq!(Debug::with_breakpoints([5, 1, 5]).breakpoints(), [1, 5]);
    }
}
