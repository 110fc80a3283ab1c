//! The APIC timer (SDM 3A 11.5.4): one-shot, periodic, TSC-deadline.
//!
//! Nothing ticks: the current count is computed from the time of the next expiry.

use serde::{Deserialize, Serialize};

use super::registers::{Effects, LVT_MASKED, LVT_TIMER, Registers};
use crate::clock::{Clock, Ns};

/// Input clock of the timer: 1 GHz, as KVM's. It is announced nowhere (CPUID 15H stays 0 here): guests calibrate it
/// against the PIT, the PM timer or the TSC.
pub const TIMER_HZ: u64 = 1_000_000_000;
pub(super) const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// DEVIATION: a periodic timer fires at most every 10 µs, so that a guest cannot keep a host thread busy. Guests ask for
/// milliseconds; KVM's limit is 200 µs.
const SHORTEST_PERIOD_NS: u64 = 10_000;

/// Bits 18:17 of the timer's LVT entry.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    OneShot,
    Periodic,
    Deadline,
    Reserved,
}

/// Timer registers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct TimerRegs {
    pub initial: u32,
    pub divide: u32,
    /// When the count reaches zero; `None` when stopped.
    pub expiry: Option<Ns>,
    /// IA32_TSC_DEADLINE; 0 when disarmed.
    pub deadline: u64,
    pub tsc_offset: u64,
}

impl TimerRegs {
    /// Divide configuration (SDM 3A figure 11-10): bits 3, 1, 0; 111 divides by 1, 000 by 2.
    fn divisor(&self) -> u64 {
        1 << ((self.divide & 3 | self.divide >> 1 & 4).wrapping_add(1) & 7)
    }

    fn period_ns(&self) -> u64 {
        u64::from(self.initial) * self.divisor()
    }
}

impl Registers {
    fn timer_mode(&self) -> Mode {
        match self.lvt[LVT_TIMER] >> 17 & 3 {
            0 => Mode::OneShot,
            1 => Mode::Periodic,
            2 => Mode::Deadline,
            _ => Mode::Reserved,
        }
    }

    pub(super) fn read_current_count(&self, clock: &dyn Clock) -> u32 {
        let Some(expiry) = self.timer.expiry else { return 0 };
        let now = clock.now().0;
        let left = match expiry.0.checked_sub(now) {
            Some(left) => left,
            // Expired, but its interrupt has not been raised yet: a periodic timer counts its next period already.
            None if self.timer_mode() == Mode::Periodic => {
                let period = self.timer.period_ns().max(1);
                period - (now - expiry.0) % period
            }
            None => 0,
        };
        u32::try_from(left.div_ceil(self.timer.divisor())).unwrap_or(u32::MAX)
    }

    pub(super) fn write_initial_count(&mut self, value: u32, clock: &dyn Clock, fx: &mut Effects) {
        if matches!(self.timer_mode(), Mode::Deadline | Mode::Reserved) {
            return; // SDM 3A 11.5.4.1: the initial count is ignored in this mode
        }
        self.timer.initial = value;
        self.timer.expiry = (value != 0).then(|| clock.now().after(self.timer.period_ns()));
        fx.timer_changed = true;
    }

    /// A running count goes on from where it is, at the new rate.
    pub(super) fn write_divide(&mut self, value: u32, clock: &dyn Clock, fx: &mut Effects) {
        let left = u64::from(self.read_current_count(clock));
        self.timer.divide = value & 0xb;
        if self.timer.expiry.is_some() {
            self.timer.expiry = Some(clock.now().after(left * self.timer.divisor()));
            fx.timer_changed = true;
        }
    }

    /// Called after the timer's LVT entry changed from `old`: changing to or from TSC-deadline mode disarms the timer.
    // DEVIATION: a change between one-shot and periodic should disarm too (SDM 3A 11.5.4.1). As in KVM and QEMU it does not:
    // small kernels start the count first and choose the mode afterwards.
    pub(super) fn timer_lvt_changed(&mut self, old: u32, fx: &mut Effects) {
        let deadline = |lvt: u32| lvt >> 17 & 3 >= 2;
        if deadline(old) != deadline(self.lvt[LVT_TIMER]) || self.timer_mode() == Mode::Reserved {
            self.timer.initial = 0;
            self.timer.expiry = None;
            self.timer.deadline = 0;
            fx.timer_changed = true;
        }
    }

    pub(super) fn read_deadline(&self) -> u64 {
        if self.timer_mode() == Mode::Deadline { self.timer.deadline } else { 0 }
    }

    /// Arms (or with 0 disarms) the deadline; in other modes the write is ignored (SDM 3A 11.5.4.1). One that has passed
    /// interrupts at once.
    pub(super) fn write_deadline(&mut self, value: u64, clock: &dyn Clock, fx: &mut Effects) {
        if self.timer_mode() == Mode::Deadline {
            self.timer.deadline = value;
            fx.timer_changed = true;
            self.timer_due(clock, fx);
        }
    }

    /// Raises what has expired and moves on to the next expiry.
    pub(super) fn timer_due(&mut self, clock: &dyn Clock, fx: &mut Effects) {
        fx.timer_changed = true;
        let now = clock.now();
        if self.timer.deadline != 0 {
            if clock.tsc().wrapping_add(self.timer.tsc_offset) >= self.timer.deadline {
                self.timer.deadline = 0;
                self.raise_timer(fx);
            }
            return;
        }
        let Some(expiry) = self.timer.expiry.filter(|&at| at <= now) else { return };
        self.timer.expiry = (self.timer_mode() == Mode::Periodic && self.timer.initial != 0).then(|| {
            // Periods that were missed altogether are one interrupt, as IRR is one bit.
            let period = self.timer.period_ns();
            let next = now.after(period - (now.0 - expiry.0) % period);
            Ns(next.0.max(expiry.0.saturating_add(SHORTEST_PERIOD_NS)).max(now.0 + 1))
        });
        self.raise_timer(fx);
    }

    fn raise_timer(&mut self, fx: &mut Effects) {
        let lvt = self.lvt[LVT_TIMER];
        if lvt & LVT_MASKED == 0 {
            self.accept(lvt.to_le_bytes()[0], false, fx);
        }
    }

    /// When [`Registers::timer_due`] must be called.
    pub(super) fn next_wake(&self, clock: &dyn Clock) -> Option<Ns> {
        if self.timer.deadline == 0 {
            return self.timer.expiry;
        }
        let (host, now) = (clock.tsc(), clock.now());
        let left = self.timer.deadline.saturating_sub(host.wrapping_add(self.timer.tsc_offset));
        // At least one nanosecond away, so that rounding can never make the queue spin.
        Some(clock.tsc_deadline(host.saturating_add(left)).max(now.after(1)))
    }
}
