//! The MC146818 real-time clock with 128 bytes of CMOS memory (Motorola MC146818A datasheet, 1984; the
//! PC's use of the memory: "IBM PC AT Technical Reference", and what SeaBIOS and QEMU keep there).
//!
//! The time is [`Clock::wall_ns`](crate::clock::Clock::wall_ns) plus an offset that changes when the guest
//! sets the clock. While the guest holds the clock (register B SET, or the divider in reset) the time
//! registers are plain memory. The flags of register C are computed when they are looked at; timers run
//! only for interrupts that are enabled. A periodic interrupt that is not acknowledged merges with the
//! next: register C can hold only one.
//!
// DEVIATION: a date that does not exist (month 13, 31 February) reads back as the day it overflows into.
// Daylight saving (register B DSE) and the square wave (SQWE) are stored without effect.

use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};

use super::{BytePorts, LegacyGate, TimeBase, attach_ports, unfit};
use crate::bus::{Bus, Overlap, lock};
use crate::clock::{Ns, Timer, TimerTarget};
use crate::irq::IrqLine;
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};

const SECOND_NS: i64 = 1_000_000_000;
/// UIP is set from 244 µs before an update cycle to its end, 1984 µs long (datasheet, "Update Cycle").
const UPDATE_NS: i64 = 2_228_000;
const PERIODIC_HZ: u64 = 32_768;
/// Most seconds looked at for an alarm: every possible alarm comes once a day.
const DAY: i64 = 86_400;

const REG_A: usize = 0x0a;
const REG_B: usize = 0x0b;
const REG_C: usize = 0x0c;
const REG_D: usize = 0x0d;
const CENTURY: usize = 0x32;
const TIME_REGS: [usize; 8] = [0, 2, 4, 6, 7, 8, 9, CENTURY];

const B_SET: u8 = 0x80;
const B_BINARY: u8 = 0x04;
const B_24H: u8 = 0x02;
/// PF, AF and UF in C, and their enables in B at the same bits.
const PF: u8 = 0x40;
const AF: u8 = 0x20;
const UF: u8 = 0x10;

/// What the CMOS memory says about the machine.
#[derive(Clone, Copy, Debug)]
pub struct CmosConfig {
    /// RAM from address 0 to the hole below 4 GiB, in bytes.
    pub ram_below_4g: u64,
    /// RAM above 4 GiB, in bytes.
    pub ram_above_4g: u64,
    /// Number of CPUs.
    pub cpus: u8,
}

impl CmosConfig {
    #[expect(clippy::cast_possible_truncation, reason = "sizes are clamped to their fields")]
    fn bytes(self) -> Vec<u8> {
        let mut cmos = vec![0u8; 128];
        let mut put = |at: usize, value: u64, len: usize| {
            cmos[at..at + len].copy_from_slice(&value.to_le_bytes()[..len]);
        };
        let extended_kb = (self.ram_below_4g.saturating_sub(1 << 20) >> 10).min(0xffff);
        put(0x14, 0x06, 1); // equipment: FPU, PS/2 mouse, VGA
        put(0x15, 640, 2);
        put(0x17, extended_kb, 2);
        put(0x30, extended_kb, 2);
        put(0x34, (self.ram_below_4g.saturating_sub(16 << 20) >> 16).min(0xffff), 2);
        put(0x5b, (self.ram_above_4g >> 16).min(0xff_ffff), 3);
        put(0x5f, u64::from(self.cpus.saturating_sub(1)), 1);
        put(0x3d, 0x02, 1); // boot from the first hard disk
        let sum: u16 = cmos[0x10..0x2e].iter().map(|&byte| u16::from(byte)).sum();
        cmos[0x2e] = (sum >> 8) as u8;
        cmos[0x2f] = sum as u8;
        cmos[REG_A] = 0x26;
        cmos[REG_B] = B_24H;
        cmos
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct RtcState {
    /// 128 bytes. Time registers are valid only while the clock is held.
    cmos: Vec<u8>,
    index: u8,
    nmi_masked: bool,
    /// Guest's clock minus wall clock, in ns.
    offset_ns: i64,
    /// Second up to which UF and AF were computed.
    seen_second: i64,
    /// Periodic tick up to which PF was computed.
    seen_tick: u64,
}

/// The real-time clock: ports 0x70–0x71, IRQ 8.
pub struct Rtc {
    state: RtcState,
    time: TimeBase,
    timer: Timer,
    line: IrqLine,
    legacy: Arc<LegacyGate>,
}

impl Rtc {
    const NAME: &'static str = "rtc";
    const VERSION: u32 = 1;

    /// A clock that shows wall-clock time (UTC). `line` is IRQ 8; it is dead while `legacy` is taken by the HPET.
    pub fn new(
        time: TimeBase,
        line: IrqLine,
        legacy: Arc<LegacyGate>,
        config: CmosConfig,
    ) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|weak: &Weak<Mutex<Self>>| {
            let timer = time.timer(weak, 0);
            let state = RtcState {
                cmos: config.bytes(),
                index: 0,
                nmi_masked: false,
                offset_ns: 0,
                seen_second: 0,
                seen_tick: 0,
            };
            let mut rtc = Self { state, time, timer, line, legacy };
            rtc.state.seen_second = rtc.rtc_ns().div_euclid(SECOND_NS);
            Mutex::new(rtc)
        })
    }

    /// Puts the clock on the bus.
    ///
    /// # Errors
    /// When a port is taken.
    pub fn attach(this: &Arc<Mutex<Self>>, bus: &Bus) -> Result<(), Overlap> {
        attach_ports(bus, this, &[(0x70, 2)])
    }

    /// RESET#: interrupt enables and flags are cleared; time and memory stay (datasheet, "RESET").
    pub fn reset(&mut self) {
        self.catch_up();
        self.state.cmos[REG_B] &= !(PF | AF | UF | 0x08);
        self.state.cmos[REG_C] = 0;
        self.state.nmi_masked = false;
        self.update();
    }

    /// Whether the guest masked NMI with bit 7 of port 0x70.
    #[must_use]
    pub fn nmi_masked(&self) -> bool {
        self.state.nmi_masked
    }

    /// The shutdown status byte (0x0f): what firmware shall do after a reset.
    #[must_use]
    pub fn shutdown_status(&self) -> u8 {
        self.state.cmos[0x0f]
    }

    /// Sets CMOS byte `index` (0x0e–0x7f), for boot protocols that come after firmware.
    pub fn set_cmos(&mut self, index: u8, value: u8) {
        if (0x0e..0x80).contains(&index) {
            self.state.cmos[usize::from(index)] = value;
        }
    }

    /// Sets the clock ahead of the wall clock's UTC by so much, as a user does who wants another time zone or another day.
    pub fn set_offset_ns(&mut self, offset_ns: i64) {
        self.state.offset_ns = offset_ns;
        self.state.seen_second = self.rtc_ns().div_euclid(SECOND_NS);
        self.update();
    }

    /// The guest's clock, in ns since 1970.
    fn rtc_ns(&self) -> i64 {
        i64::try_from(self.time.clock.wall_ns()).unwrap_or(i64::MAX).saturating_add(self.state.offset_ns)
    }

    /// Whether the time stands still and its registers are memory.
    fn is_held(&self) -> bool {
        self.state.cmos[REG_B] & B_SET != 0 || self.state.cmos[REG_A] & 0x60 == 0x60
    }

    fn periodic_ticks(&self) -> Option<u64> {
        match self.state.cmos[REG_A] & 0x0f {
            0 => None,
            rate @ (1 | 2) => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    /// Brings register C up to now.
    fn catch_up(&mut self) {
        if let Some(period) = self.periodic_ticks() {
            let tick = self.time.now().to_ticks(PERIODIC_HZ) / period;
            if tick != self.state.seen_tick {
                self.state.seen_tick = tick;
                self.state.cmos[REG_C] |= PF;
            }
        }
        if self.is_held() {
            return;
        }
        let second = self.rtc_ns().div_euclid(SECOND_NS);
        let passed = second.saturating_sub(self.state.seen_second).clamp(0, DAY);
        if passed > 0 {
            self.state.cmos[REG_C] |= UF;
            if self.state.cmos[REG_C] & AF == 0
                && (second - passed + 1..=second).any(|at| self.alarm_matches(at))
            {
                self.state.cmos[REG_C] |= AF;
            }
        }
        self.state.seen_second = second;
    }

    fn alarm_matches(&self, second: i64) -> bool {
        let day = second.rem_euclid(DAY);
        let hit = |register: usize, value: i64| {
            let alarm = self.state.cmos[register];
            let wanted = if register == 5 { self.decode_hour(alarm) } else { self.decode(alarm) };
            alarm >= 0xc0 || wanted == value
        };
        hit(1, day % 60) && hit(3, day / 60 % 60) && hit(5, day / 3600)
    }

    /// Drives the line and arms the timer for the next enabled event.
    fn update(&mut self) {
        let enabled = self.state.cmos[REG_B] & (PF | AF | UF);
        let raised = self.state.cmos[REG_C] & enabled;
        self.state.cmos[REG_C] = self.state.cmos[REG_C] & 0x7f | u8::from(raised != 0) << 7;
        if !self.legacy.taken() {
            self.line.set(raised != 0);
        }
        // A flag that is up already cannot rise again before register C is read.
        let periodic = enabled & PF & !raised != 0;
        let clock = enabled & (AF | UF) & !raised != 0 && !self.is_held();
        let next = [periodic.then(|| self.next_periodic()).flatten(), clock.then(|| self.next_second())];
        match next.iter().flatten().min() {
            Some(&at) => self.timer.set(at),
            None => self.timer.cancel(),
        }
    }

    fn next_periodic(&self) -> Option<Ns> {
        let period = self.periodic_ticks()?;
        let tick = (self.time.now().to_ticks(PERIODIC_HZ) / period + 1).saturating_mul(period);
        Some(Ns::from_ticks(tick, PERIODIC_HZ))
    }

    fn next_second(&self) -> Ns {
        let left = SECOND_NS - self.rtc_ns().rem_euclid(SECOND_NS);
        self.time.now().after(left.unsigned_abs())
    }

    fn decode(&self, value: u8) -> i64 {
        let value = i64::from(value);
        if self.state.cmos[REG_B] & B_BINARY != 0 { value } else { (value >> 4) * 10 + (value & 15) }
    }

    fn decode_hour(&self, value: u8) -> i64 {
        if self.state.cmos[REG_B] & B_24H != 0 {
            return self.decode(value);
        }
        self.decode(value & 0x7f) % 12 + if value & 0x80 != 0 { 12 } else { 0 }
    }

    fn encode(&self, value: i64) -> u8 {
        let value = u8::try_from(value.rem_euclid(100)).unwrap_or(0);
        if self.state.cmos[REG_B] & B_BINARY != 0 { value } else { (value / 10) << 4 | (value % 10) }
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.state.cmos[REG_B] & B_24H != 0 {
            return self.encode(hour);
        }
        let twelve = if hour % 12 == 0 { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { 0x80 } else { 0 }
    }

    /// Writes the running time into the registers.
    fn store_time(&mut self) {
        let second = self.rtc_ns().div_euclid(SECOND_NS);
        let (days, day) = (second.div_euclid(DAY), second.rem_euclid(DAY));
        let (year, month, date) = civil_from_days(days);
        let values = [
            self.encode(day % 60),
            self.encode(day / 60 % 60),
            self.encode_hour(day / 3600),
            self.encode((days + 4).rem_euclid(7) + 1),
            self.encode(date),
            self.encode(month),
            self.encode(year % 100),
            self.encode(year / 100),
        ];
        for (register, value) in TIME_REGS.into_iter().zip(values) {
            self.state.cmos[register] = value;
        }
    }

    /// Lets the clock run on from the registers, `fraction_ns` into their second.
    fn load_time(&mut self, fraction_ns: i64) {
        let get = |register: usize| self.decode(self.state.cmos[register]);
        let hour = self.decode_hour(self.state.cmos[4]);
        let days = days_from_civil(get(CENTURY) * 100 + get(9), get(8).clamp(1, 12), get(7).max(1));
        let second = days * DAY + hour * 3600 + get(2) * 60 + get(0);
        self.state.offset_ns = 0;
        let wall = self.rtc_ns();
        self.state.offset_ns =
            second.saturating_mul(SECOND_NS).saturating_add(fraction_ns).saturating_sub(wall);
        self.state.seen_second = second;
    }

    fn read_register(&mut self) -> u8 {
        let index = usize::from(self.state.index & 0x7f);
        match index {
            REG_A => {
                let fraction = self.rtc_ns().rem_euclid(SECOND_NS);
                let updating = !self.is_held() && fraction >= SECOND_NS - UPDATE_NS;
                self.state.cmos[REG_A] | u8::from(updating) << 7
            }
            REG_C => {
                self.catch_up();
                self.update();
                let flags = std::mem::take(&mut self.state.cmos[REG_C]);
                self.update();
                flags
            }
            REG_D => 0x80,
            _ => {
                if TIME_REGS.contains(&index) && !self.is_held() {
                    self.store_time();
                }
                self.state.cmos[index]
            }
        }
    }

    fn write_register(&mut self, value: u8) {
        let index = usize::from(self.state.index & 0x7f);
        self.catch_up();
        match index {
            REG_A => {
                let divider_released = self.state.cmos[REG_A] & 0x60 == 0x60 && value & 0x60 != 0x60;
                // The first update comes half a second after the divider starts (datasheet, "DV").
                let fraction = if divider_released { SECOND_NS / 2 } else { 0 };
                self.change_mode(REG_A, value & 0x7f, fraction);
            }
            REG_B => {
                let value = if value & B_SET != 0 { value & !UF } else { value };
                self.change_mode(REG_B, value, self.rtc_ns().rem_euclid(SECOND_NS));
            }
            REG_C | REG_D => {}
            _ if TIME_REGS.contains(&index) && !self.is_held() => {
                let fraction = self.rtc_ns().rem_euclid(SECOND_NS);
                self.store_time();
                self.state.cmos[index] = value;
                self.load_time(fraction);
            }
            _ => self.state.cmos[index] = value,
        }
        self.update();
    }

    /// Writes a control register; stops or starts the clock as it says.
    fn change_mode(&mut self, register: usize, value: u8, fraction_ns: i64) {
        let was_held = self.is_held();
        if !was_held {
            self.store_time();
        }
        let same_format = register == REG_A || (self.state.cmos[REG_B] ^ value) & (B_BINARY | B_24H) == 0;
        self.state.cmos[register] = value;
        if was_held && !self.is_held() {
            self.load_time(fraction_ns);
        } else if !was_held && self.is_held() && !same_format {
            // One write stopped the clock and changed the format: hold the time in the new one.
            self.store_time();
        }
        if register == REG_A
            && let Some(period) = self.periodic_ticks()
        {
            self.state.seen_tick = self.time.now().to_ticks(PERIODIC_HZ) / period;
        }
    }
}

/// Proleptic Gregorian date of a day counted from 1970-01-01: (year, month, day).
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// The inverse of [`civil_from_days`]; a day beyond the month's end runs on.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

impl BytePorts for Rtc {
    fn read8(&mut self, port: u16) -> u8 {
        if port & 1 == 0 { 0xff } else { self.read_register() }
    }

    fn write8(&mut self, port: u16, value: u8) {
        if port & 1 == 0 {
            self.state.index = value & 0x7f;
            self.state.nmi_masked = value & 0x80 != 0;
        } else {
            self.write_register(value);
        }
    }
}

impl TimerTarget for Mutex<Rtc> {
    fn fire(&self, _id: u32) {
        let mut rtc = lock(self);
        rtc.catch_up();
        rtc.update();
    }
}

impl Snapshot for Rtc {
    fn save(&self) -> StateBlob {
        to_blob(Self::NAME, Self::VERSION, &self.state)
    }

    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        let state: RtcState = from_blob(Self::NAME, Self::VERSION, blob)?;
        if state.cmos.len() != 128 || state.index > 0x7f {
            return Err(unfit(Self::NAME, "CMOS is not 128 bytes, or the index is beyond it"));
        }
        self.state = state;
        self.update();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, hammer_ports};
    use super::*;

    fn rtc(bench: &Bench) -> Arc<Mutex<Rtc>> {
        let config = CmosConfig { ram_below_4g: 512 << 20, ram_above_4g: 1 << 30, cpus: 2 };
        Rtc::new(bench.time.clone(), bench.line(8), Arc::default(), config)
    }

    fn get(rtc: &Mutex<Rtc>, register: u8) -> u8 {
        lock(rtc).write8(0x70, register);
        lock(rtc).read8(0x71)
    }

    fn set(rtc: &Mutex<Rtc>, register: u8, value: u8) {
        lock(rtc).write8(0x70, register);
        lock(rtc).write8(0x71, value);
    }

    fn date(rtc: &Mutex<Rtc>) -> [u8; 8] {
        [0x32, 9, 8, 7, 4, 2, 0, 6].map(|register| get(rtc, register))
    }

    // The test clock's wall time starts at 1 700 000 000 s: Tuesday 2023-11-14 22:13:20 UTC.

    #[test]
    fn time_reads_as_bcd_binary_and_12_hours() {
        let bench = Bench::new();
        let rtc = rtc(&bench);
        assert_eq!(date(&rtc), [0x20, 0x23, 0x11, 0x14, 0x22, 0x13, 0x20, 3]);
        set(&rtc, 0x0b, 0x06);
        assert_eq!(date(&rtc), [20, 23, 11, 14, 22, 13, 20, 3]);
        set(&rtc, 0x0b, 0x00);
        assert_eq!(get(&rtc, 4), 0x90, "10 pm");
    }

    #[test]
    fn setting_the_clock_moves_it_and_it_runs_on() {
        let bench = Bench::new();
        let rtc = rtc(&bench);
        set(&rtc, 0x0b, 0x82);
        for (register, value) in
            [(0x32, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x58)]
        {
            set(&rtc, register, value);
        }
        bench.run(10_000_000_000);
        assert_eq!(get(&rtc, 0), 0x58, "held");
        set(&rtc, 0x0b, 0x02);
        bench.run(3_000_000_000);
        assert_eq!(date(&rtc), [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x01, 7], "a Saturday");
    }

    #[test]
    fn divider_release_first_update_after_half_a_second() {
        let bench = Bench::new();
        let rtc = rtc(&bench);
        set(&rtc, 0x0a, 0x76);
        set(&rtc, 0, 0x10);
        set(&rtc, 0x0a, 0x26);
        bench.run(499_000_000);
        assert_eq!(get(&rtc, 0), 0x10);
        assert_eq!(get(&rtc, 0x0a) & 0x80, 0x80, "update in progress");
        bench.run(2_000_000);
        assert_eq!(get(&rtc, 0), 0x11);
        assert_eq!(get(&rtc, 0x0a) & 0x80, 0);
    }

    #[test]
    fn periodic_interrupt_acknowledged_comes_1024_times_a_second() {
        let bench = Bench::new();
        let rtc = rtc(&bench);
        set(&rtc, 0x0b, 0x42);
        for _ in 0..1000 {
            bench.run(1_000_000);
            if bench.lines.level(8) {
                assert_eq!(get(&rtc, 0x0c) & 0xc0, 0xc0);
            }
        }
        assert!((990..=1000).contains(&bench.lines.edges(8)), "polled every ms: {}", bench.lines.edges(8));
        bench.run(1_000_000_000);
        let edges = bench.lines.edges(8);
        bench.run(1_000_000_000);
        assert_eq!(bench.lines.edges(8), edges, "no new edge before register C is read");
    }

    #[test]
    fn alarm_at_its_time_interrupts_once() {
        let bench = Bench::new();
        let rtc = rtc(&bench);
        for (register, value) in [(1, 0x30), (3, 0xff), (5, 0xff)] {
            set(&rtc, register, value);
        }
        set(&rtc, 0x0b, 0x22);
        get(&rtc, 0x0c);
        bench.run(9_900_000_000);
        assert!(!bench.lines.level(8));
        bench.run(200_000_000);
        assert!(bench.lines.level(8));
        assert_eq!(get(&rtc, 0x0c) & 0xa0, 0xa0);
        assert!(!bench.lines.level(8));
    }

    #[test]
    fn update_flag_without_interrupt_can_be_polled() {
        let bench = Bench::new();
        let rtc = rtc(&bench);
        get(&rtc, 0x0c);
        assert_eq!(get(&rtc, 0x0c), 0);
        bench.stall(1_000_000_000);
        assert_eq!(get(&rtc, 0x0c) & 0x90, 0x10);
    }

    #[test]
    fn cmos_tells_memory_sizes() {
        let bench = Bench::new();
        let rtc = rtc(&bench);
        let word = |low: u8| u16::from_le_bytes([get(&rtc, low), get(&rtc, low + 1)]);
        assert_eq!(word(0x15), 640);
        assert_eq!(word(0x17), 0xffff);
        assert_eq!(word(0x34), (512 - 16) * 16);
        assert_eq!(word(0x5b), 1 << 14);
        set(&rtc, 0x0f, 0x0a);
        assert_eq!(lock(&rtc).shutdown_status(), 0x0a);
    }

    #[test]
    fn civil_dates_round_trip() {
        for days in (-800_000..3_000_000).step_by(97) {
            let (year, month, day) = civil_from_days(days);
            assert_eq!(days_from_civil(year, month, day), days);
        }
        assert_eq!(civil_from_days(11_016), (2000, 2, 29));
    }

    #[test]
    fn restore_keeps_the_guests_offset() {
        let bench = Bench::new();
        let a = rtc(&bench);
        set(&a, 9, 0x50);
        let blob = lock(&a).save();
        let b = rtc(&bench);
        lock(&b).restore(&blob).unwrap();
        assert_eq!(date(&b), date(&a));
        let mut bad = blob;
        bad.data["cmos"] = serde_json::json!([1, 2]);
        assert!(lock(&b).restore(&bad).is_err());
    }

    #[test]
    fn nonsense_writes_are_survived() {
        let bench = Bench::new();
        let rtc = rtc(&bench);
        hammer_ports(&bench, &rtc, &[0x70, 0x71], 20_000);
    }
}
