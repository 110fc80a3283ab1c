//! The high precision event timers ("IA-PC HPET Specification" 1.0a): one 64-bit counter at 100 MHz and
//! three comparators, as in QEMU, at [`BASE`].
//!
//! The counter is a function of the clock; each comparator holds one deadline. A comparator fires when
//! the counter *equals* it: one that is written in the past waits for the counter to come round, as the
//! specification has it. Missed periods of an edge-triggered timer follow the policy of [`Backlog`].
//!
// DEVIATION: no FSB (message-signalled) interrupts: Tn_FSB_INT_DEL_CAP is 0, which every driver checks.

use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};
use x86::addr::Gpa;

use super::{Backlog, LegacyGate, LineState, MIN_TICK_NS, TimeBase, unfit};
use crate::bus::{Bus, MmioDevice, Overlap, lock};
use crate::clock::{Ns, Timer, TimerTarget};
use crate::irq::IrqSink;
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};

/// Where the registers are.
pub const BASE: Gpa = Gpa(0xfed0_0000);
/// Length of the register block in bytes.
pub const LEN: u64 = 0x400;
/// Period of the main counter in femtoseconds.
pub const PERIOD_FS: u32 = 10_000_000;

const TICK_NS: u64 = 10;
const TIMERS: usize = 3;
/// GSIs a comparator can be routed to: 2, 8 and 16–23.
const ROUTES: u32 = 0x00ff_0104;
/// GCAP_ID: vendor 0x8086, legacy routes, 64-bit counter, three timers, revision 1.
const CAPABILITIES: u64 = (PERIOD_FS as u64) << 32 | 0x8086_a201;

const CONF_ENABLE: u64 = 1;
const CONF_LEGACY: u64 = 2;

const TN_LEVEL: u64 = 1 << 1;
const TN_ENABLE: u64 = 1 << 2;
const TN_PERIODIC: u64 = 1 << 3;
const TN_SET_VALUE: u64 = 1 << 6;
const TN_32BIT: u64 = 1 << 8;
const TN_ROUTE: u64 = 0x1f << 9;
const TN_WRITABLE: u64 = TN_LEVEL | TN_ENABLE | TN_PERIODIC | TN_SET_VALUE | TN_32BIT | TN_ROUTE;
/// Periodic-capable, 64 bits wide, and the routes.
const TN_CAPS: u64 = (ROUTES as u64) << 32 | 0x30;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Comparator {
    /// Writable bits of Tn_CONF.
    config: u64,
    compare: u64,
    period: u64,
    backlog: Backlog,
    /// Counter value up to which matches were accounted for.
    seen: u64,
}

impl Comparator {
    fn has(&self, bit: u64) -> bool {
        self.config & bit != 0
    }

    fn mask(&self) -> u64 {
        if self.has(TN_32BIT) { u64::from(u32::MAX) } else { u64::MAX }
    }

    /// Ticks from counter value `from` to the next match: 1 to 2^32 or 2^64 - 1.
    fn distance(&self, from: u64) -> u64 {
        let mask = self.mask();
        match self.compare.wrapping_sub(from) & mask {
            0 => mask.saturating_add(1),
            ticks => ticks,
        }
    }

    fn period(&self) -> u64 {
        self.period & self.mask()
    }

    /// Matches between the last look and `counter`; moves a periodic comparator on.
    fn take_matches(&mut self, counter: u64) -> u64 {
        let distance = self.distance(self.seen);
        let passed = counter.wrapping_sub(self.seen);
        self.seen = counter;
        if passed < distance {
            return 0;
        }
        if !self.has(TN_PERIODIC) || self.period() == 0 {
            return 1;
        }
        let matches = (passed - distance) / self.period() + 1;
        self.compare = self.compare.wrapping_add(matches.wrapping_mul(self.period())) & self.mask();
        matches
    }

    fn write_config(&mut self, value: u64) {
        self.config = value & TN_WRITABLE;
        self.compare &= self.mask();
    }

    /// Tn_COMPARATOR ("Periodic mode": with Tn_VAL_SET_CNF the accumulator, else the period).
    fn write_compare(&mut self, value: u64) {
        let value = value & self.mask();
        if !self.has(TN_PERIODIC) || self.has(TN_SET_VALUE) {
            self.compare = value;
        }
        if self.has(TN_PERIODIC) {
            self.period = value;
        }
        self.config &= !TN_SET_VALUE;
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct HpetState {
    config: u64,
    /// GINTR_STA: level-triggered timers that interrupt.
    status: u64,
    /// Counter while halted; while running, counter minus clock ticks.
    offset: u64,
    timers: [Comparator; TIMERS],
}

/// The timer block.
pub struct Hpet {
    state: HpetState,
    time: TimeBase,
    deadlines: [Timer; TIMERS],
    sink: Arc<dyn IrqSink>,
    legacy: Arc<LegacyGate>,
}

impl Hpet {
    const NAME: &'static str = "hpet";
    const VERSION: u32 = 1;

    /// A halted HPET. While the guest sets LEG_RT_CNF, `legacy` cuts PIT and RTC off.
    pub fn new(time: TimeBase, sink: Arc<dyn IrqSink>, legacy: Arc<LegacyGate>) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|weak: &Weak<Mutex<Self>>| {
            let deadlines = [0, 1, 2].map(|id| time.timer(weak, id));
            Mutex::new(Self { state: HpetState::default(), time, deadlines, sink, legacy })
        })
    }

    /// Puts the HPET on the bus.
    ///
    /// # Errors
    /// When the memory range is taken.
    pub fn attach(this: &Arc<Mutex<Self>>, bus: &Bus) -> Result<(), Overlap> {
        bus.add_mmio(BASE, LEN, Arc::clone(this) as _)
    }

    /// The state after a machine reset.
    pub fn reset(&mut self) {
        for index in 0..TIMERS {
            self.clear_status(index);
            self.deadlines[index].cancel();
        }
        self.state = HpetState::default();
        self.legacy.set(false);
    }

    fn is_running(&self) -> bool {
        self.state.config & CONF_ENABLE != 0
    }

    fn clock_ticks(&self) -> u64 {
        self.time.now().0 / TICK_NS
    }

    fn counter(&self) -> u64 {
        let ticks = if self.is_running() { self.clock_ticks() } else { 0 };
        self.state.offset.wrapping_add(ticks)
    }

    /// The line of a timer (HPET 1.0a 2.3.5 and Tn_INT_ROUTE_CNF).
    fn gsi(&self, index: usize) -> Option<u32> {
        let legacy = self.state.config & CONF_LEGACY != 0;
        match (legacy, index) {
            (true, 0) => Some(2),
            (true, 1) => Some(8),
            _ => {
                let route = (self.state.timers[index].config & TN_ROUTE) >> 9;
                (u64::from(ROUTES) >> route & 1 != 0).then(|| u32::try_from(route).unwrap_or(0))
            }
        }
    }

    fn interrupt(&mut self, index: usize) {
        let timer = &self.state.timers[index];
        let (level, enabled) = (timer.has(TN_LEVEL), timer.has(TN_ENABLE));
        if level {
            self.state.status |= 1 << index;
        }
        let Some(gsi) = self.gsi(index).filter(|_| enabled) else { return };
        if !level {
            self.sink.set_gsi(gsi, false);
        }
        self.sink.set_gsi(gsi, true);
        if !level {
            self.sink.set_gsi(gsi, false);
        }
    }

    fn clear_status(&mut self, index: usize) {
        if self.state.status >> index & 1 != 0 {
            self.state.status &= !(1 << index);
            if let Some(gsi) = self.gsi(index) {
                self.sink.set_gsi(gsi, false);
            }
        }
    }

    /// Delivers what is due on a timer and sets its deadline.
    fn service(&mut self, index: usize) {
        if !self.is_running() {
            self.deadlines[index].cancel();
            return;
        }
        let counter = self.counter();
        let timer = &mut self.state.timers[index];
        let matches = timer.take_matches(counter);
        if timer.has(TN_LEVEL) || !timer.has(TN_ENABLE) {
            timer.backlog.clear();
            timer.backlog.owe(matches.min(1));
        } else {
            timer.backlog.owe(matches);
        }
        if timer.backlog.settle(LineState::Free) {
            self.interrupt(index);
        }
        self.arm(index, counter);
    }

    fn arm(&self, index: usize, counter: u64) {
        let timer = &self.state.timers[index];
        if !timer.has(TN_ENABLE) && !timer.has(TN_LEVEL) {
            self.deadlines[index].cancel();
            return;
        }
        let mut ticks = timer.distance(counter);
        let min_ticks = MIN_TICK_NS / TICK_NS;
        if timer.has(TN_PERIODIC) && timer.period() != 0 {
            if timer.period() < min_ticks {
                ticks = ticks.max(min_ticks);
            }
            if timer.backlog.owed() > 0 {
                ticks = ticks.min((timer.period() / 2).max(min_ticks));
            }
        }
        let at = self.clock_ticks().saturating_add(ticks).saturating_mul(TICK_NS);
        self.deadlines[index].set(Ns(at));
    }

    fn service_all(&mut self) {
        (0..TIMERS).for_each(|index| self.service(index));
    }

    fn read_register(&self, register: u64) -> u64 {
        let index = usize::try_from((register.wrapping_sub(0x100)) / 0x20).unwrap_or(usize::MAX);
        match register {
            0x000 => CAPABILITIES,
            0x010 => self.state.config,
            0x020 => self.state.status,
            0x0f0 => self.counter(),
            _ => match (self.state.timers.get(index), register & 0x1f) {
                (Some(timer), 0x00) => timer.config | TN_CAPS,
                (Some(timer), 0x08) => timer.compare,
                _ => 0,
            },
        }
    }

    /// Writes the bits of `mask` of a register.
    fn write_register(&mut self, register: u64, value: u64, mask: u64) {
        self.service_all();
        let merged = self.read_register(register) & !mask | value & mask;
        match register {
            0x010 => self.write_config(merged),
            0x020 => (0..TIMERS).filter(|i| (value & mask) >> i & 1 != 0).for_each(|i| self.clear_status(i)),
            0x0f0 => {
                let ticks = if self.is_running() { self.clock_ticks() } else { 0 };
                self.state.offset = merged.wrapping_sub(ticks);
                self.state.timers.iter_mut().for_each(|timer| timer.seen = merged);
            }
            0x100.. => self.write_timer(register, merged, value & mask),
            _ => {}
        }
        self.service_all();
    }

    fn write_config(&mut self, value: u64) {
        let counter = self.counter();
        (0..TIMERS).for_each(|index| self.clear_line_before_rerouting(index));
        self.state.config = value & (CONF_ENABLE | CONF_LEGACY);
        let ticks = if self.is_running() { self.clock_ticks() } else { 0 };
        self.state.offset = counter.wrapping_sub(ticks);
        self.state.timers.iter_mut().for_each(|timer| timer.seen = counter);
        self.legacy.set(value & CONF_LEGACY != 0);
    }

    /// A level-triggered line must not stay up on a pin that the timer leaves.
    fn clear_line_before_rerouting(&mut self, index: usize) {
        if self.state.status >> index & 1 != 0
            && let Some(gsi) = self.gsi(index)
        {
            self.sink.set_gsi(gsi, false);
        }
    }

    fn write_timer(&mut self, register: u64, merged: u64, written: u64) {
        let index = usize::try_from((register - 0x100) / 0x20).unwrap_or(usize::MAX);
        if index >= TIMERS {
            return;
        }
        let counter = self.counter();
        match register & 0x1f {
            0x00 => {
                self.clear_line_before_rerouting(index);
                self.state.timers[index].write_config(merged);
                let timer = &self.state.timers[index];
                if !timer.has(TN_LEVEL) {
                    self.state.status &= !(1 << index);
                } else if timer.has(TN_ENABLE)
                    && self.state.status >> index & 1 != 0
                    && let Some(gsi) = self.gsi(index)
                {
                    self.sink.set_gsi(gsi, true);
                }
            }
            // In periodic mode a half write must not carry the accumulator into the period.
            0x08 if self.state.timers[index].has(TN_PERIODIC) => {
                self.state.timers[index].write_compare(written);
            }
            0x08 => self.state.timers[index].write_compare(merged),
            _ => {}
        }
        let timer = &mut self.state.timers[index];
        timer.seen = counter;
        timer.backlog.clear();
    }
}

impl MmioDevice for Hpet {
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        // The counter is read often (it is a clock source) and needs no timer brought up to date.
        if !matches!(offset & !7, 0 | 0xf0) {
            self.service_all();
        }
        let mut register = u64::MAX;
        let mut bytes = [0; 8];
        for (at, byte) in (offset..).zip(data) {
            if at & !7 != register {
                register = at & !7;
                bytes = self.read_register(register).to_le_bytes();
            }
            *byte = bytes.get(usize::try_from(at & 7).unwrap_or(0)).copied().unwrap_or(0);
        }
    }

    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        let mut rest = data;
        let mut at = offset;
        while !rest.is_empty() {
            let shift = at & 7;
            let room = usize::try_from(8 - shift).unwrap_or(8);
            let (now, later) = rest.split_at(rest.len().min(room));
            let (value, mask) = now
                .iter()
                .rev()
                .fold((0u64, 0u64), |(value, mask), &byte| (value << 8 | u64::from(byte), mask << 8 | 0xff));
            self.write_register(at & !7, value << (8 * shift), mask << (8 * shift));
            rest = later;
            at = at.wrapping_add(now.len() as u64);
        }
    }
}

impl TimerTarget for Mutex<Hpet> {
    fn fire(&self, id: u32) {
        lock(self).service(usize::try_from(id).unwrap_or(0) % TIMERS);
    }
}

impl Snapshot for Hpet {
    fn save(&self) -> StateBlob {
        to_blob(Self::NAME, Self::VERSION, &self.state)
    }

    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        let state: HpetState = from_blob(Self::NAME, Self::VERSION, blob)?;
        let timer_fits =
            |timer: &Comparator| timer.config & !TN_WRITABLE == 0 && timer.backlog.owed() <= Backlog::MAX;
        if state.config & !3 != 0 || state.status & !7 != 0 || !state.timers.iter().all(timer_fits) {
            return Err(unfit(Self::NAME, "reserved bits are set, or a backlog is out of range"));
        }
        self.state = state;
        self.legacy.set(self.state.config & CONF_LEGACY != 0);
        let counter = self.counter();
        for index in 0..TIMERS {
            if self.is_running() {
                self.arm(index, counter);
            } else {
                self.deadlines[index].cancel();
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, Noise};
    use super::*;

    fn hpet(bench: &Bench) -> Arc<Mutex<Hpet>> {
        Hpet::new(bench.time.clone(), Arc::clone(&bench.lines) as _, Arc::default())
    }

    fn read(hpet: &Mutex<Hpet>, offset: u64) -> u64 {
        let mut data = [0; 8];
        lock(hpet).mmio_read(offset, &mut data);
        u64::from_le_bytes(data)
    }

    fn write(hpet: &Mutex<Hpet>, offset: u64, value: u64) {
        lock(hpet).mmio_write(offset, &value.to_le_bytes());
    }

    fn write32(hpet: &Mutex<Hpet>, offset: u64, value: u32) {
        lock(hpet).mmio_write(offset, &value.to_le_bytes());
    }

    #[test]
    fn counter_runs_only_while_enabled() {
        let bench = Bench::new();
        let hpet = hpet(&bench);
        assert_eq!(read(&hpet, 0) >> 32, 10_000_000);
        assert_eq!(read(&hpet, 0) & 0xffff_ffff, 0x8086_a201);
        bench.run(1000);
        assert_eq!(read(&hpet, 0xf0), 0);
        write(&hpet, 0x10, 1);
        bench.run(1000);
        assert_eq!(read(&hpet, 0xf0), 100);
        write(&hpet, 0x10, 0);
        bench.run(1000);
        assert_eq!(read(&hpet, 0xf0), 100);
        write(&hpet, 0xf0, 0x1_0000_0000);
        let mut high = [0; 4];
        lock(&hpet).mmio_read(0xf4, &mut high);
        assert_eq!(high, [1, 0, 0, 0]);
    }

    #[test]
    fn one_shot_fires_at_match_on_legacy_route() {
        let bench = Bench::new();
        let hpet = hpet(&bench);
        write(&hpet, 0x10, 3);
        write32(&hpet, 0x100, 0x104);
        write32(&hpet, 0x108, 1000);
        bench.run(9_990);
        assert_eq!(bench.lines.edges(2), 0);
        bench.run(20);
        assert_eq!(bench.lines.edges(2), 1);
        bench.run(1_000_000_000);
        assert_eq!(bench.lines.edges(2), 1);
        assert!(lock(&hpet).legacy.taken());
    }

    #[test]
    fn comparator_in_the_past_waits() {
        let bench = Bench::new();
        let hpet = hpet(&bench);
        write(&hpet, 0x10, 3);
        write32(&hpet, 0x100, 0x104);
        bench.run(1_000_000);
        write32(&hpet, 0x108, 10);
        bench.run(1_000_000_000);
        assert_eq!(bench.lines.edges(2), 0);
        bench.run(42_000_000_000);
        assert_eq!(bench.lines.edges(2), 1, "32 bits come round after 42.9 s");
    }

    #[test]
    fn periodic_set_as_linux_does_ticks() {
        let bench = Bench::new();
        let hpet = hpet(&bench);
        write(&hpet, 0x10, 3);
        write32(&hpet, 0x100, 0x14c);
        write32(&hpet, 0x108, 100_000);
        bench.run(1000);
        write32(&hpet, 0x108, 100_000);
        bench.run(100_500_000);
        assert_eq!(bench.lines.edges(2), 100);
        bench.stall(10_000_000);
        assert_eq!(bench.lines.edges(2), 101);
        bench.run(100_000_000);
        assert_eq!(bench.lines.edges(2), 210, "what the stall cost is made up for");
    }

    #[test]
    fn level_timer_holds_line_until_status_cleared() {
        let bench = Bench::new();
        let hpet = hpet(&bench);
        write(&hpet, 0x140, TN_ENABLE | TN_LEVEL | 20 << 9);
        write(&hpet, 0x148, 50);
        write(&hpet, 0x10, 1);
        bench.run(1000);
        assert!(bench.lines.level(20));
        assert_eq!(read(&hpet, 0x20), 4);
        write(&hpet, 0x20, 4);
        assert!(!bench.lines.level(20));
    }

    #[test]
    fn restore_running_timer_fires() {
        let bench = Bench::new();
        let a = hpet(&bench);
        write(&a, 0x10, 3);
        write32(&a, 0x120, 0x104);
        write32(&a, 0x128, 1000);
        let blob = lock(&a).save();
        drop(a);
        let b = hpet(&bench);
        lock(&b).restore(&blob).unwrap();
        bench.run(20_000);
        assert_eq!(bench.lines.edges(8), 1);
        let mut bad = blob;
        bad.data["config"] = 4.into();
        assert!(lock(&b).restore(&bad).is_err());
    }

    #[test]
    fn nonsense_writes_are_survived() {
        let bench = Bench::new();
        let hpet = hpet(&bench);
        let mut noise = Noise(42);
        for _ in 0..20_000 {
            let word = noise.next();
            let offset = (word >> 40) % (LEN - 16);
            let offset =
                if word & 1 == 0 { offset } else { [0x10, 0xf0, 0x100, 0x108][(word >> 8 & 3) as usize] };
            let data = noise.next().to_le_bytes();
            let len = 1 << (word >> 4 & 3);
            lock(&hpet).mmio_write(offset, &data[..len]);
            lock(&hpet).mmio_read(offset, &mut [0; 8][..len]);
            bench.stall(word >> 52);
        }
        lock(&hpet).mmio_write(LEN - 4, &[0xff; 4]);
    }
}
