//! The 8254 programmable interval timer (Intel 8254 datasheet 231164-005) and system control port B
//! (port 0x61: speaker gate and data, refresh toggle, OUT2).
//!
//! Nothing counts here: each channel remembers the tick at which it was loaded, and OUT and the counter
//! are functions of the clock. Only channel 0 holds a timer, for the rising edges of its OUT, which are
//! IRQ 0. Missed edges of the periodic modes follow the policy of [`Backlog`].

use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};

use super::{
    Backlog, BytePorts, LegacyGate, LineProbe, LineState, MIN_TICK_NS, TimeBase, attach_ports, unfit,
};
use crate::bus::{Bus, Overlap, lock};
use crate::clock::{Ns, Timer, TimerTarget};
use crate::irq::IrqLine;
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};

/// Input clock of all three channels, in Hz.
pub const PIT_HZ: u64 = 1_193_182;

/// Ticks in [`MIN_TICK_NS`].
const MIN_TICKS: u64 = PIT_HZ * MIN_TICK_NS / 1_000_000_000;
/// Channel 1's period on a PC: one DRAM refresh every 18 ticks (15.1 µs), seen in port 0x61 bit 4.
const REFRESH_TICKS: u64 = 18;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Channel {
    /// 0–5.
    mode: u8,
    bcd: bool,
    /// Control word RW1:RW0: 1 low byte, 2 high byte, 3 low then high.
    access: u8,
    /// Count register: 1–0x10000.
    reload: u32,
    /// Whether `reload` was written since the control word.
    loaded: bool,
    /// Count in effect: 1–0x10000.
    count: u32,
    /// Tick at which the counting element took `count`; none while it does not count.
    start: Option<u64>,
    /// Ticks counted when the gate stopped it (modes 0 and 4).
    held: Option<u64>,
    /// Modes 2 and 3: the count that takes effect at a tick, the end of the running period.
    next: Option<(u64, u32)>,
    gate: bool,
    /// Low byte of a count whose high byte is to come.
    write_low: Option<u8>,
    /// The next read of a two-byte count gives its high byte.
    read_high: bool,
    count_latch: Option<u16>,
    status_latch: Option<u8>,
    /// Rising edges of OUT since `start` that were accounted for.
    edges: u64,
}

impl Channel {
    /// Mode 3 with the longest period, as firmware leaves channel 0.
    fn new(gate: bool) -> Self {
        Self {
            mode: 3,
            bcd: false,
            access: 3,
            reload: 0x10000,
            loaded: true,
            count: 0x10000,
            start: gate.then_some(0),
            held: None,
            next: None,
            gate,
            write_low: None,
            read_high: false,
            count_latch: None,
            status_latch: None,
            edges: 0,
        }
    }

    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn n(&self) -> u64 {
        u64::from(self.count)
    }

    fn elapsed(&self, now: u64) -> Option<u64> {
        self.held.or(self.start.map(|start| now.saturating_sub(start)))
    }

    /// Lets a count take effect whose time has come. Returns the rising edges of OUT since the last call.
    fn take_edges(&mut self, now: u64) -> u64 {
        let mut fresh = 0;
        if let Some((at, count)) = self.next
            && now >= at
        {
            fresh = self.edges_until(at).saturating_sub(self.edges);
            (self.start, self.count, self.next, self.edges) = (Some(at), count, None, 0);
        }
        let total = self.edges_until(now);
        fresh += total.saturating_sub(self.edges);
        self.edges = total;
        fresh
    }

    fn edges_until(&self, now: u64) -> u64 {
        let Some(d) = self.elapsed(now) else { return 0 };
        match self.mode {
            0 | 1 => u64::from(d >= self.n()),
            2 | 3 => d / self.n(),
            _ => u64::from(d > self.n()),
        }
    }

    /// Tick of the next rising edge of OUT.
    fn next_edge(&self) -> Option<u64> {
        let start = self.start.filter(|_| self.held.is_none())?;
        let ticks = match self.mode {
            2 | 3 => self.edges.saturating_add(1).saturating_mul(self.n()),
            _ if self.edges > 0 => return None,
            0 | 1 => self.n(),
            _ => self.n() + 1,
        };
        Some(start.saturating_add(ticks))
    }

    /// Level of the OUT pin (datasheet, "Mode Definitions").
    fn out(&self, now: u64) -> bool {
        let Some(d) = self.elapsed(now) else { return self.mode != 0 };
        match self.mode {
            0 => d >= self.n(),
            1 => d >= self.n() || self.start.is_some_and(|start| now < start),
            2 => d % self.n() != self.n() - 1 || self.n() == 1,
            3 => d % self.n() < self.n().div_ceil(2),
            _ => d != self.n(),
        }
    }

    /// The counting element, in the channel's number system.
    #[expect(clippy::cast_possible_truncation, reason = "the counting element has 16 bits")]
    fn counter(&self, now: u64) -> u16 {
        let n = self.n();
        let modulus = if self.bcd { 10_000 } else { 0x10000 };
        let value = match (self.elapsed(now), self.mode) {
            (None, _) => u64::from(self.reload),
            (Some(d), 2) => n - d % n,
            (Some(d), 3) => (n - (d % n * 2) % n) & !1,
            (Some(d), _) => n + modulus - d % modulus,
        } % modulus;
        if self.bcd { to_bcd(value as u16) } else { value as u16 }
    }

    fn status(&self, now: u64) -> u8 {
        let null = !self.loaded || self.next.is_some() || self.start.is_some_and(|start| now < start);
        u8::from(self.out(now)) << 7
            | u8::from(null) << 6
            | self.access << 4
            | self.mode << 1
            | u8::from(self.bcd)
    }

    fn set_control(&mut self, value: u8) {
        let mode = value >> 1 & 7;
        *self = Self {
            mode: if mode > 5 { mode & 3 } else { mode },
            bcd: value & 1 != 0,
            access: value >> 4 & 3,
            reload: self.reload,
            count: self.count,
            loaded: false,
            start: None,
            ..Self::new(self.gate)
        };
    }

    fn write(&mut self, value: u8, now: u64) {
        match (self.access, self.write_low) {
            (1, _) => self.load(u16::from(value), now),
            (2, _) => self.load(u16::from(value) << 8, now),
            (_, Some(low)) => {
                self.write_low = None;
                self.load(u16::from_le_bytes([low, value]), now);
            }
            _ => {
                self.write_low = Some(value);
                if self.mode == 0 {
                    (self.start, self.held) = (None, None);
                }
            }
        }
    }

    /// A new count was written; it is loaded on the next clock.
    fn load(&mut self, raw: u16, now: u64) {
        self.reload = match (raw, self.bcd) {
            (0, false) => 0x10000,
            (0, true) => 10_000,
            (raw, false) => u32::from(raw),
            (raw, true) => from_bcd(raw).max(1),
        };
        self.loaded = true;
        match self.mode {
            0 | 4 => {
                self.begin(now);
                self.held = (!self.gate).then_some(0);
            }
            2 | 3 if self.gate => match self.start {
                Some(start) if now >= start => {
                    let periods = (now - start) / self.n() + 1;
                    self.next = Some((start.saturating_add(periods.saturating_mul(self.n())), self.reload));
                }
                _ => self.begin(now),
            },
            _ => {}
        }
    }

    fn begin(&mut self, now: u64) {
        self.count = self.reload;
        (self.start, self.held, self.next, self.edges) = (Some(now + 1), None, None, 0);
    }

    /// The GATE pin (datasheet, "Gate Pin Operations Summary").
    fn set_gate(&mut self, gate: bool, now: u64) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match (self.mode, gate) {
            (0 | 4, false) => self.held = self.elapsed(now),
            (0 | 4, true) => {
                if let Some(counted) = self.held.take() {
                    self.start = Some(now.saturating_sub(counted));
                }
            }
            (_, true) if self.loaded => self.begin(now),
            (2 | 3, false) => (self.start, self.next) = (None, None),
            _ => {}
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.status_latch.take() {
            return status;
        }
        let value = self.count_latch.unwrap_or_else(|| self.counter(now));
        let [low, high] = value.to_le_bytes();
        let first_of_two = self.access == 3 && !self.read_high;
        self.read_high = first_of_two;
        if !first_of_two {
            self.count_latch = None;
        }
        if first_of_two || self.access == 1 { low } else { high }
    }

    fn latch_count(&mut self, now: u64) {
        if self.count_latch.is_none() {
            self.count_latch = Some(self.counter(now));
        }
    }

    fn latch_status(&mut self, now: u64) {
        if self.status_latch.is_none() {
            self.status_latch = Some(self.status(now));
        }
    }

    fn is_valid(&self) -> bool {
        let counts = [self.reload, self.count, self.next.map_or(1, |(_, count)| count)];
        self.mode <= 5
            && (1..=3).contains(&self.access)
            && counts.iter().all(|count| (1..=0x10000).contains(count))
            // Centuries: so that no sum of ticks can overflow.
            && [self.start, self.held, self.next.map(|(at, _)| at), Some(self.edges)]
                .iter()
                .flatten()
                .all(|&ticks| ticks < 1 << 62)
    }
}

fn to_bcd(value: u16) -> u16 {
    (value % 10) | (value / 10 % 10) << 4 | (value / 100 % 10) << 8 | (value / 1000 % 10) << 12
}

/// A digit above 9 counts as its value.
fn from_bcd(raw: u16) -> u32 {
    let raw = u32::from(raw);
    ((raw & 15) + (raw >> 4 & 15) * 10 + (raw >> 8 & 15) * 100 + (raw >> 12) * 1000).min(10_000)
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PitState {
    channels: [Channel; 3],
    /// Port 0x61 bits 3:0 as written.
    port_b: u8,
    backlog: Backlog,
}

impl PitState {
    fn new() -> Self {
        Self {
            channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
            port_b: 0,
            backlog: Backlog::default(),
        }
    }
}

/// The PC's interval timer: ports 0x40–0x43 and 0x61.
pub struct Pit {
    state: PitState,
    time: TimeBase,
    timer: Timer,
    line: IrqLine,
    legacy: Arc<LegacyGate>,
    probe: Option<LineProbe>,
}

impl Pit {
    const NAME: &'static str = "pit";
    const VERSION: u32 = 1;

    /// A PIT as firmware leaves it. `line` is IRQ 0 (GSI 2); it is dead while `legacy` is taken by the HPET.
    pub fn new(time: TimeBase, line: IrqLine, legacy: Arc<LegacyGate>) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|weak: &Weak<Mutex<Self>>| {
            let timer = time.timer(weak, 0);
            let mut pit = Self { state: PitState::new(), time, timer, line, legacy, probe: None };
            pit.reset();
            Mutex::new(pit)
        })
    }

    /// Lets the PIT see whether the guest has taken the tick before (see [`Backlog`]). Without a probe
    /// every tick counts as taken.
    pub fn set_probe(&mut self, probe: LineProbe) {
        self.probe = Some(probe);
    }

    /// Puts the PIT on the bus.
    ///
    /// # Errors
    /// When a port is taken.
    pub fn attach(this: &Arc<Mutex<Self>>, bus: &Bus) -> Result<(), Overlap> {
        attach_ports(bus, this, &[(0x40, 4), (0x61, 1)])
    }

    /// The state after a machine reset.
    pub fn reset(&mut self) {
        self.state = PitState::new();
        let now = self.now();
        self.state.channels[..2].iter_mut().for_each(|channel| channel.start = Some(now));
        self.line.set(false);
        self.arm(now);
    }

    fn now(&self) -> u64 {
        self.time.now().to_ticks(PIT_HZ)
    }

    /// Delivers what is due and arms the timer for what comes next.
    fn service(&mut self) {
        let now = self.now();
        let state = &mut self.state;
        let fresh = state.channels[0].take_edges(now);
        state.backlog.owe(fresh);
        let line = self.probe.as_ref().map_or(LineState::Free, |probe| probe());
        if self.state.backlog.settle(line) {
            self.tick();
        }
        self.arm(now);
    }

    fn tick(&self) {
        if !self.legacy.taken() {
            self.line.set(false);
            self.line.set(true);
        }
    }

    fn arm(&self, now: u64) {
        let channel = &self.state.channels[0];
        let mut next = channel.next_edge();
        if channel.is_periodic() && channel.n() < MIN_TICKS {
            next = next.map(|at| at.max(now + MIN_TICKS));
        }
        if self.state.backlog.owed() > 0 {
            let catch_up = now + (channel.n() / 2).max(MIN_TICKS);
            next = Some(next.map_or(catch_up, |at| at.min(catch_up)));
        }
        match next {
            Some(at) => self.timer.set(Ns::from_ticks(at, PIT_HZ)),
            None => self.timer.cancel(),
        }
    }

    /// Does `change` to channel 0, carrying a change of its OUT pin to the interrupt line.
    fn change_channel_0(&mut self, now: u64, change: impl FnOnce(&mut Channel)) {
        self.service();
        let channel = &mut self.state.channels[0];
        let before = channel.out(now);
        change(channel);
        let after = channel.out(now);
        if !before && after {
            self.tick();
        } else if before && !after {
            self.line.set(false);
        }
        if !self.state.channels[0].is_periodic() || self.state.channels[0].start.is_none() {
            self.state.backlog.clear();
        }
        self.arm(now);
    }

    fn change(&mut self, index: usize, now: u64, change: impl FnOnce(&mut Channel)) {
        if index == 0 {
            self.change_channel_0(now, change);
        } else {
            self.state.channels[index].take_edges(now);
            change(&mut self.state.channels[index]);
        }
    }

    fn write_control(&mut self, value: u8, now: u64) {
        let index = usize::from(value >> 6);
        if index == 3 {
            self.read_back(value, now);
        } else if value & 0x30 == 0 {
            self.settle(index, now).latch_count(now);
        } else {
            self.change(index, now, |channel| channel.set_control(value));
        }
    }

    fn read_back(&mut self, value: u8, now: u64) {
        for index in (0..3).filter(|index| value >> (index + 1) & 1 != 0) {
            let channel = self.settle(index, now);
            if value & 0x20 == 0 {
                channel.latch_count(now);
            }
            if value & 0x10 == 0 {
                channel.latch_status(now);
            }
        }
    }

    /// The channel, with every count in effect that should be. Channel 0's edges stay owed.
    fn settle(&mut self, index: usize, now: u64) -> &mut Channel {
        let fresh = self.state.channels[index].take_edges(now);
        if index == 0 {
            self.state.backlog.owe(fresh);
        }
        &mut self.state.channels[index]
    }

    fn read_port_b(&mut self, now: u64) -> u8 {
        let out2 = self.settle(2, now).out(now);
        let refresh = (now / REFRESH_TICKS) & 1 != 0;
        self.state.port_b | u8::from(refresh) << 4 | u8::from(out2) << 5
    }
}

impl BytePorts for Pit {
    fn read8(&mut self, port: u16) -> u8 {
        let now = self.now();
        match port {
            0x40..=0x42 => self.settle(usize::from(port - 0x40), now).read(now),
            0x61 => self.read_port_b(now),
            _ => 0xff,
        }
    }

    fn write8(&mut self, port: u16, value: u8) {
        let now = self.now();
        match port {
            0x40..=0x42 => self.change(usize::from(port - 0x40), now, |channel| channel.write(value, now)),
            0x43 => self.write_control(value, now),
            0x61 => {
                self.state.port_b = value & 0x0f;
                self.settle(2, now).set_gate(value & 1 != 0, now);
            }
            _ => {}
        }
    }
}

impl TimerTarget for Mutex<Pit> {
    fn fire(&self, _id: u32) {
        lock(self).service();
    }
}

impl Snapshot for Pit {
    fn save(&self) -> StateBlob {
        to_blob(Self::NAME, Self::VERSION, &self.state)
    }

    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        let state: PitState = from_blob(Self::NAME, Self::VERSION, blob)?;
        if !state.channels.iter().all(Channel::is_valid) || state.backlog.owed() > Backlog::MAX {
            return Err(unfit(Self::NAME, "mode, access, count or backlog out of range"));
        }
        self.state = state;
        self.arm(self.now());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, hammer_ports};
    use super::*;
    use std::sync::atomic::{AtomicU8, Ordering};

    const TICKS_1000: u64 = 838_096; // ns, just past 1000 ticks

    fn pit(bench: &Bench) -> Arc<Mutex<Pit>> {
        Pit::new(bench.time.clone(), bench.line(2), Arc::default())
    }

    fn program(pit: &Mutex<Pit>, channel: u8, mode: u8, count: u16) {
        let mut pit = lock(pit);
        pit.write8(0x43, channel << 6 | 0x30 | mode << 1);
        pit.write8(0x40 + u16::from(channel), count.to_le_bytes()[0]);
        pit.write8(0x40 + u16::from(channel), count.to_le_bytes()[1]);
    }

    fn count(pit: &Mutex<Pit>, channel: u8) -> u16 {
        let mut pit = lock(pit);
        pit.write8(0x43, channel << 6);
        let port = 0x40 + u16::from(channel);
        u16::from_le_bytes([pit.read8(port), pit.read8(port)])
    }

    #[test]
    fn mode_2_one_second_at_100_hz_gives_100_ticks() {
        let bench = Bench::new();
        let pit = pit(&bench);
        program(&pit, 0, 2, 11932);
        let before = bench.lines.edges(2);
        bench.run(1_000_000_000);
        assert_eq!(bench.lines.edges(2) - before, 99, "1193182 / 11932 = 99.998");
    }

    #[test]
    fn mode_0_counts_down_once_and_wraps() {
        let bench = Bench::new();
        let pit = pit(&bench);
        program(&pit, 0, 0, 1000);
        let before = bench.lines.edges(2);
        assert!(!bench.lines.level(2));
        bench.run(TICKS_1000 / 2);
        assert!((499..=502).contains(&count(&pit, 0)));
        bench.run(TICKS_1000 / 2 + 2000);
        assert_eq!(bench.lines.edges(2) - before, 1);
        assert!(count(&pit, 0) > 0xfff0, "the counter goes on from 0xffff");
        bench.run(1_000_000_000);
        assert_eq!(bench.lines.edges(2) - before, 1);
    }

    #[test]
    fn stall_of_many_periods_delivers_backlog_without_storm() {
        let bench = Bench::new();
        let pit = pit(&bench);
        program(&pit, 0, 2, 11932);
        bench.run(1_000_000);
        let before = bench.lines.edges(2);
        bench.stall(200_000_000);
        assert_eq!(bench.lines.edges(2) - before, 1, "20 are due, one comes");
        bench.run(5_000_000);
        assert_eq!(bench.lines.edges(2) - before, 2, "the next after half a period");
        bench.run(795_000_000);
        assert_eq!(bench.lines.edges(2) - before, 100, "all are made up for");
    }

    #[test]
    fn tick_not_taken_is_owed_and_masked_is_dropped() {
        let bench = Bench::new();
        let pit = pit(&bench);
        let state = Arc::new(AtomicU8::new(1));
        let seen = Arc::clone(&state);
        lock(&pit).set_probe(Box::new(move || match seen.load(Ordering::Relaxed) {
            0 => LineState::Free,
            1 => LineState::Pending,
            _ => LineState::Masked,
        }));
        program(&pit, 0, 2, 11932);
        let before = bench.lines.edges(2);
        bench.run(100_500_000);
        assert_eq!(bench.lines.edges(2), before);
        assert_eq!(lock(&pit).state.backlog.owed(), 10);
        state.store(0, Ordering::Relaxed);
        bench.run(200_000_000);
        assert_eq!(bench.lines.edges(2) - before, 30);
        state.store(2, Ordering::Relaxed);
        bench.stall(100_000_000);
        assert_eq!(lock(&pit).state.backlog.owed(), 0);
    }

    #[test]
    fn shortest_period_does_not_spin() {
        let bench = Bench::new();
        let pit = pit(&bench);
        program(&pit, 0, 2, 1);
        let before = bench.lines.edges(2);
        bench.run(100_000_000);
        assert!(bench.lines.edges(2) - before <= 1010);
    }

    #[test]
    fn channel_2_mode_0_shows_out_in_port_61() {
        let bench = Bench::new();
        let pit = pit(&bench);
        lock(&pit).write8(0x61, 1);
        program(&pit, 2, 0, 1000);
        assert_eq!(lock(&pit).read8(0x61) & 0x20, 0);
        bench.run(TICKS_1000 + 1000);
        assert_eq!(lock(&pit).read8(0x61) & 0x20, 0x20);
    }

    #[test]
    fn channel_2_gate_low_holds_mode_0() {
        let bench = Bench::new();
        let pit = pit(&bench);
        lock(&pit).write8(0x61, 1);
        program(&pit, 2, 0, 1000);
        bench.run(TICKS_1000 / 2);
        lock(&pit).write8(0x61, 0);
        let held = count(&pit, 2);
        bench.run(1_000_000_000);
        assert_eq!(count(&pit, 2), held);
        lock(&pit).write8(0x61, 1);
        bench.run(TICKS_1000 / 2 + 2000);
        assert_eq!(lock(&pit).read8(0x61) & 0x20, 0x20);
    }

    #[test]
    fn mode_1_starts_at_gate_and_mode_5_strobes() {
        let bench = Bench::new();
        let pit = pit(&bench);
        program(&pit, 2, 1, 1000);
        assert_eq!(lock(&pit).read8(0x61) & 0x20, 0x20);
        lock(&pit).write8(0x61, 1);
        bench.run(2000);
        assert_eq!(lock(&pit).read8(0x61) & 0x20, 0);
        bench.run(TICKS_1000);
        assert_eq!(lock(&pit).read8(0x61) & 0x20, 0x20);
        lock(&pit).write8(0x61, 0);
        program(&pit, 2, 5, 1000);
        lock(&pit).write8(0x61, 1);
        let ticks = (0..3000).filter(|_| {
            bench.run(420);
            lock(&pit).read8(0x61) & 0x20 == 0
        });
        assert!((1..=3).contains(&ticks.count()), "low for one clock");
    }

    #[test]
    fn mode_3_is_high_half_the_time() {
        let bench = Bench::new();
        let pit = pit(&bench);
        lock(&pit).write8(0x61, 1);
        program(&pit, 2, 3, 1000);
        bench.run(2000);
        let high = (0..1000).filter(|_| {
            bench.run(8381);
            lock(&pit).read8(0x61) & 0x20 != 0
        });
        let high = high.count();
        assert!((490..=510).contains(&high), "{high}");
    }

    #[test]
    fn mode_2_new_count_takes_effect_after_period() {
        let bench = Bench::new();
        let pit = pit(&bench);
        program(&pit, 0, 2, 1000);
        bench.run(TICKS_1000 / 2);
        let before = bench.lines.edges(2);
        lock(&pit).write8(0x40, 0xd0);
        lock(&pit).write8(0x40, 0x07);
        bench.run(TICKS_1000 / 2 + 2000);
        assert_eq!(bench.lines.edges(2) - before, 1);
        bench.run(TICKS_1000 + 10_000);
        assert_eq!(bench.lines.edges(2) - before, 1);
        bench.run(TICKS_1000);
        assert_eq!(bench.lines.edges(2) - before, 2);
    }

    #[test]
    fn read_back_status_then_count() {
        let bench = Bench::new();
        let pit = pit(&bench);
        program(&pit, 0, 2, 1000);
        bench.run(10_000);
        let mut pit = lock(&pit);
        pit.write8(0x43, 0xc2);
        assert_eq!(pit.read8(0x40), 0x80 | 0x30 | 2 << 1);
        let latched = u16::from_le_bytes([pit.read8(0x40), pit.read8(0x40)]);
        assert!((985..=992).contains(&latched), "{latched}");
    }

    #[test]
    fn bcd_counts_in_decimal() {
        let bench = Bench::new();
        let pit = pit(&bench);
        lock(&pit).write8(0x61, 1);
        lock(&pit).write8(0x43, 0xb5);
        lock(&pit).write8(0x42, 0x00);
        lock(&pit).write8(0x42, 0x10);
        bench.run(2000);
        let value = count(&pit, 2);
        assert!((0x990..=0x1000).contains(&value), "{value:#x}");
    }

    #[test]
    fn refresh_bit_toggles() {
        let bench = Bench::new();
        let pit = pit(&bench);
        let a = lock(&pit).read8(0x61) & 0x10;
        bench.run(15_100);
        assert_ne!(lock(&pit).read8(0x61) & 0x10, a);
    }

    #[test]
    fn restore_running_channel_ticks_on() {
        let bench = Bench::new();
        let a = pit(&bench);
        program(&a, 0, 2, 11932);
        let blob = lock(&a).save();
        drop(a);
        let b = pit(&bench);
        lock(&b).restore(&blob).unwrap();
        let before = bench.lines.edges(2);
        bench.run(100_500_000);
        assert_eq!(bench.lines.edges(2) - before, 10);
        let mut bad = blob;
        bad.data["channels"][0]["count"] = 0.into();
        assert!(lock(&b).restore(&bad).is_err());
    }

    #[test]
    fn nonsense_writes_are_survived() {
        let bench = Bench::new();
        let pit = pit(&bench);
        hammer_ports(&bench, &pit, &[0x40, 0x41, 0x42, 0x43, 0x43, 0x61], 20_000);
    }
}
