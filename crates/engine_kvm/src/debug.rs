//! A debugger's wishes as `KVM_SET_GUEST_DEBUG`: breakpoints and watchpoints in the processor's four debug registers (the guest's own stay as
//! they are, INV-DEBUG-1), steps by the trap flag.
//!
//! Four are all there are. Watchpoints come first; breakpoints that find no place are looked for by stepping, which is slow but exact.
//! DEVIATION: a watchpoint beyond the fourth is not armed, one of reads stops at writes too (x86 has no other), and the processor looks for
//! watchpoints after an instruction only: who needs more takes `--engine bt`.

use engine::debug::{Debug, DebugStop, WatchKind};
use kvm_bindings::{KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, kvm_guest_debug};
use x86::bits::dr;

/// What a debug register is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Free,
    Breakpoint,
    Watch { start: u64, kind: WatchKind },
}

/// What is armed.
#[derive(Clone, Debug)]
pub struct Armed {
    wanted: Debug,
    places: [Place; 4],
    addresses: [u64; 4],
    dr7: u64,
    /// Step through everything.
    steps: bool,
    /// The first instruction runs whatever is armed at it.
    passing: bool,
}

/// DR7: what an access has to be (SDM 3B 18.2.4).
const ON_WRITE: u64 = 1;
const ON_ACCESS: u64 = 3;

const fn length_bits(len: u64) -> u64 {
    match len {
        1 => 0,
        2 => 1,
        8 => 2,
        _ => 3,
    }
}

/// A range in naturally aligned pieces that a debug register can watch.
fn pieces(start: u64, len_bytes: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let (at, left) = (start.wrapping_add(done), len_bytes.checked_sub(done).filter(|left| *left > 0)?);
        let len = [8u64, 4, 2, 1].into_iter().find(|len| at % len == 0 && *len <= left).unwrap_or(1);
        done += len;
        Some((at, len))
    })
}

impl Armed {
    /// What `wanted` needs.
    #[must_use]
    pub fn new(wanted: &Debug) -> Self {
        let mut armed = Self {
            wanted: wanted.clone(),
            places: [Place::Free; 4],
            addresses: [0; 4],
            dr7: dr::DR7_FIXED,
            steps: wanted.step.is_some(),
            passing: wanted.step.is_some(),
        };
        for watch in &wanted.watchpoints {
            let on = if watch.kind == WatchKind::Write { ON_WRITE } else { ON_ACCESS };
            for (at, len) in pieces(watch.start, watch.len_bytes).take(5) {
                let place = Place::Watch { start: at.max(watch.start), kind: watch.kind };
                if !armed.take(at, place, on | length_bits(len) << 2) {
                    tracing::warn!(
                        "a watchpoint at {at:#x} finds no debug register and is not armed; --engine bt has as many as you like"
                    );
                }
            }
        }
        for &at in wanted.breakpoints() {
            if !armed.take(at, Place::Breakpoint, 0) {
                armed.steps = true;
            }
        }
        armed
    }

    fn take(&mut self, address: u64, place: Place, bits: u64) -> bool {
        let Some(i) = self.places.iter().position(|p| *p == Place::Free) else { return false };
        (self.places[i], self.addresses[i]) = (place, address);
        self.dr7 |= 1 << (2 * i) | bits << (16 + 4 * i);
        true
    }

    /// For `KVM_SET_GUEST_DEBUG`.
    #[must_use]
    pub fn request(&self) -> kvm_guest_debug {
        let mut request = kvm_guest_debug::default();
        if !self.wanted.is_armed() {
            return request;
        }
        request.control = KVM_GUESTDBG_ENABLE;
        if self.steps {
            request.control |= KVM_GUESTDBG_SINGLESTEP;
        }
        // Stepping looks at breakpoints itself: one in a register would stop before the step away from it.
        let watches = self.places.iter().any(|p| matches!(p, Place::Watch { .. }));
        if watches || !self.steps && self.places.contains(&Place::Breakpoint) {
            request.control |= KVM_GUESTDBG_USE_HW_BP;
            request.arch.debugreg[..4].copy_from_slice(&self.addresses);
            request.arch.debugreg[7] = self.enabled();
        }
        request
    }

    fn enabled(&self) -> u64 {
        let mut dr7 = self.dr7;
        if self.steps {
            for (i, _) in self.places.iter().enumerate().filter(|(_, p)| **p == Place::Breakpoint) {
                dr7 &= !(3 << (2 * i));
            }
        }
        dr7
    }

    /// Interrupts wait: a step is wanted.
    #[must_use]
    pub const fn holds_interrupts(&self) -> bool {
        self.wanted.step.is_some()
    }

    /// Breakpoints are looked for by stepping.
    #[must_use]
    pub fn looks_by_stepping(&self) -> bool {
        self.steps && !self.wanted.breakpoints().is_empty()
    }

    /// Whether to stop before the instruction at linear address `pc` without running.
    #[must_use]
    pub fn stops_before(&self, pc: u64) -> bool {
        !self.passing && self.steps && self.wanted.breakpoints().binary_search(&pc).is_ok()
    }

    /// What a debug exit means: the linear address and RIP that come next, and DR6. None: run on.
    pub fn stop(&mut self, pc: u64, rip: u64, dr6: u64) -> Option<DebugStop> {
        self.passing = false;
        for (i, place) in self.places.iter().enumerate().filter(|(i, _)| dr6 >> i & 1 != 0) {
            match *place {
                Place::Watch { kind, .. } => {
                    return Some(DebugStop::Watch { address: self.addresses[i], kind });
                }
                Place::Breakpoint => return Some(DebugStop::Breakpoint),
                Place::Free => {}
            }
        }
        if self.wanted.breakpoints().binary_search(&pc).is_ok() {
            return Some(DebugStop::Breakpoint);
        }
        let step = self.wanted.step.as_ref()?;
        (!step.contains(&rip)).then_some(DebugStop::Step)
    }
}

impl Default for Armed {
    fn default() -> Self {
        Self::new(&Debug::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::debug::Watchpoint;

    fn watch(start: u64, len_bytes: u64, kind: WatchKind) -> Watchpoint {
        Watchpoint { start, len_bytes, kind }
    }

    #[test]
    fn nothing_wanted_disarms() {
        assert_eq!(Armed::default().request().control, 0);
    }

    #[test]
    fn four_breakpoints_are_in_registers_and_the_fifth_makes_steps() {
        let mut armed = Armed::new(&Debug::with_breakpoints([0x10, 0x20, 0x30, 0x40]));
        let request = armed.request();
        assert_eq!(request.control, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP);
        assert_eq!((request.arch.debugreg[1], request.arch.debugreg[7]), (0x20, 0x455));
        assert_eq!(armed.stop(0x20, 0x20, 0xffff_0ff2), Some(DebugStop::Breakpoint));
        let mut many = Armed::new(&Debug::with_breakpoints([0x10, 0x20, 0x30, 0x40, 0x50]));
        assert_eq!(many.request().control, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP);
        assert!(many.stops_before(0x50) && !many.stops_before(0x51));
        assert_eq!(many.stop(0x44, 0x44, dr::DR6_BS), None);
        assert_eq!(many.stop(0x50, 0x50, dr::DR6_BS), Some(DebugStop::Breakpoint));
    }

    #[test]
    fn watchpoint_is_split_into_aligned_pieces() {
        assert_eq!(pieces(0x1003, 6).collect::<Vec<_>>(), [(0x1003, 1), (0x1004, 4), (0x1008, 1)]);
        let mut wanted = Debug::default();
        wanted.watchpoints.push(watch(0x1004, 8, WatchKind::Write));
        let mut armed = Armed::new(&wanted);
        let request = armed.request();
        assert_eq!(request.arch.debugreg[..2], [0x1004, 0x1008]);
        // Two of four bytes, on writes.
        assert_eq!(request.arch.debugreg[7], 0x400 | 0b101 | 0xdd << 16);
        let stop = DebugStop::Watch { address: 0x1008, kind: WatchKind::Write };
        assert_eq!(armed.stop(0x77, 0x77, 0xffff_0ff2), Some(stop));
    }

    #[test]
    fn step_passes_the_breakpoint_it_stands_on_and_ends_outside_of_its_range() {
        let mut wanted = Debug::with_breakpoints([0x10, 0x18]);
        wanted.step = Some(0x10..0x20);
        let mut armed = Armed::new(&wanted);
        assert!(!armed.stops_before(0x10) && armed.holds_interrupts());
        assert_eq!(armed.stop(0x14, 0x14, dr::DR6_BS), None);
        assert_eq!(armed.stop(0x18, 0x18, dr::DR6_BS), Some(DebugStop::Breakpoint));
        assert_eq!(armed.stop(0x20, 0x20, dr::DR6_BS), Some(DebugStop::Step));
        assert_eq!(armed.request().control, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP);
    }
}
