//! ACPI fixed hardware (ACPI 6.5, chapter 4.8): PM1a event and control registers, the PM timer, the system
//! control interrupt, and the reset register at port 0xcf9.
//!
//! The block sits at port 0x600 as in QEMU's chipsets: event 0x600–0x603, control 0x604–0x605, timer
//! 0x608–0x60b. The machine is always in ACPI mode (SCI_EN reads as 1, FADT SMI_CMD is 0).
//! S5 is SLP_TYP 0, as in QEMU, so that a bare `out 0x604, 0x2000` powers the machine off.

use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};

use super::{PowerControl, TimeBase, unfit};
use crate::bus::{Bus, Overlap, PortDevice, lock};
use crate::clock::{Ns, Timer, TimerTarget};
use crate::irq::IrqLine;
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};

/// First port of the block: FADT PM1a_EVT_BLK, four bytes.
pub const PM1A_EVT: u16 = 0x600;
/// FADT PM1a_CNT_BLK, two bytes.
pub const PM1A_CNT: u16 = 0x604;
/// FADT PM_TMR_BLK, four bytes.
pub const PM_TMR: u16 = 0x608;
/// The system control interrupt's line (FADT SCI_INT): level-triggered.
pub const SCI_GSI: u32 = 9;
/// Frequency of the PM timer in Hz.
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// The reset register (FADT RESET_REG), a byte.
pub const RESET_PORT: u16 = 0xcf9;
/// What to write to it (FADT RESET_VALUE).
pub const RESET_VALUE: u8 = 0x06;
/// SLP_TYP of soft-off, for the `_S5` package of the DSDT.
pub const SLP_TYP_S5: u8 = 0;

const TMR_STS: u16 = 1 << 0;
const PWRBTN_STS: u16 = 1 << 8;
const WAK_STS: u16 = 1 << 15;
/// Status bits there are: timer, bus master, global, power and sleep button, RTC, wake.
const STS_BITS: u16 = TMR_STS | 1 << 4 | 1 << 5 | PWRBTN_STS | 1 << 9 | 1 << 10 | WAK_STS;
/// Enable bits there are.
const EN_BITS: u16 = TMR_STS | 1 << 5 | PWRBTN_STS | 1 << 9 | 1 << 10;
const SCI_EN: u16 = 1;
/// Control bits that are kept: BM_RLD and SLP_TYP. GBL_RLS and SLP_EN read as 0.
const CNT_BITS: u16 = 1 << 1 | 7 << 10;
const SLP_EN: u16 = 1 << 13;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct PmState {
    /// Status but TMR_STS, which follows the timer.
    status: u16,
    enable: u16,
    control: u16,
    /// Half-periods of the timer when the guest last cleared TMR_STS.
    seen_half: u64,
}

/// The PM1a block and PM timer.
pub struct AcpiPm {
    state: PmState,
    /// 24 or 32.
    timer_bits: u32,
    time: TimeBase,
    timer: Timer,
    sci: IrqLine,
    power: Arc<dyn PowerControl>,
}

impl AcpiPm {
    const NAME: &'static str = "acpi-pm";
    const VERSION: u32 = 1;

    /// The block. `wide_timer` makes the PM timer 32 bits wide (FADT flag TMR_VAL_EXT) instead of 24.
    pub fn new(
        time: TimeBase,
        sci: IrqLine,
        power: Arc<dyn PowerControl>,
        wide_timer: bool,
    ) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|weak: &Weak<Mutex<Self>>| {
            let timer = time.timer(weak, 0);
            let timer_bits = if wide_timer { 32 } else { 24 };
            let mut pm = Self { state: PmState::default(), timer_bits, time, timer, sci, power };
            pm.state.seen_half = pm.half();
            Mutex::new(pm)
        })
    }

    /// Puts the block on the bus.
    ///
    /// # Errors
    /// When a port is taken.
    pub fn attach(this: &Arc<Mutex<Self>>, bus: &Bus) -> Result<(), Overlap> {
        bus.add_ports(PM1A_EVT, 12, Arc::clone(this) as _)
    }

    /// The state after a machine reset.
    pub fn reset(&mut self) {
        self.state = PmState { seen_half: self.half(), ..PmState::default() };
        self.update();
    }

    /// The user pressed the power button: the guest may shut down. False where nobody listens: the guest has not enabled the
    /// button's event (4.8.3.2.1), or no operating system runs yet.
    pub fn power_button(&mut self) -> bool {
        self.state.status |= PWRBTN_STS;
        self.update();
        self.state.enable & PWRBTN_STS != 0
    }

    fn ticks(&self) -> u64 {
        self.time.now().to_ticks(PM_TIMER_HZ)
    }

    /// TMR_STS is set whenever the timer's top bit toggles.
    fn half(&self) -> u64 {
        self.ticks() >> (self.timer_bits - 1)
    }

    #[expect(clippy::cast_possible_truncation, reason = "the timer wraps at its width")]
    fn timer_value(&self) -> u32 {
        (self.ticks() & ((1 << self.timer_bits) - 1)) as u32
    }

    fn status(&self) -> u16 {
        self.state.status | if self.half() == self.state.seen_half { 0 } else { TMR_STS }
    }

    /// Drives the SCI and arms the timer for TMR_STS when the guest waits for it.
    fn update(&mut self) {
        let raised = self.status() & self.state.enable;
        self.sci.set(raised != 0);
        if self.state.enable & TMR_STS != 0 && raised & TMR_STS == 0 {
            let tick = (self.half() + 1) << (self.timer_bits - 1);
            self.timer.set(Ns::from_ticks(tick, PM_TIMER_HZ));
        } else {
            self.timer.cancel();
        }
    }

    /// The block as bytes, all of one moment.
    fn image(&self) -> [u8; 12] {
        let mut image = [0; 12];
        image[0..2].copy_from_slice(&self.status().to_le_bytes());
        image[2..4].copy_from_slice(&self.state.enable.to_le_bytes());
        image[4..6].copy_from_slice(&(self.state.control | SCI_EN).to_le_bytes());
        image[8..12].copy_from_slice(&self.timer_value().to_le_bytes());
        image
    }

    fn write_byte(&mut self, offset: u16, byte: u8) {
        let shift = 8 * u32::from(offset & 1);
        let (value, mask) = (u16::from(byte) << shift, 0xff_u16 << shift);
        match offset & !1 {
            0 => {
                self.state.status &= !value;
                if value & TMR_STS != 0 {
                    self.state.seen_half = self.half();
                }
            }
            2 => self.state.enable = (self.state.enable & !mask | value) & EN_BITS,
            4 => {
                self.state.control = (self.state.control & !mask | value) & CNT_BITS;
                if value & SLP_EN != 0 {
                    self.sleep();
                }
            }
            _ => {}
        }
    }

    /// SLP_EN was written. Only soft-off exists; any other state is left at once, as if woken.
    fn sleep(&mut self) {
        if self.state.control >> 10 & 7 == u16::from(SLP_TYP_S5) {
            self.power.power_off();
        } else {
            self.state.status |= WAK_STS;
        }
    }
}

impl PortDevice for AcpiPm {
    fn port_read(&mut self, offset: u16, size: u8) -> u32 {
        let image = self.image();
        let bytes = image.iter().skip(usize::from(offset)).take(usize::from(size.min(4)));
        bytes.rev().fold(0, |value, &byte| value << 8 | u32::from(byte))
    }

    fn port_write(&mut self, offset: u16, size: u8, value: u32) {
        for (at, byte) in (offset..).zip(value.to_le_bytes()).take(usize::from(size)) {
            self.write_byte(at, byte);
        }
        self.update();
    }
}

impl TimerTarget for Mutex<AcpiPm> {
    fn fire(&self, _id: u32) {
        lock(self).update();
    }
}

impl Snapshot for AcpiPm {
    fn save(&self) -> StateBlob {
        to_blob(Self::NAME, Self::VERSION, &self.state)
    }

    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        let state: PmState = from_blob(Self::NAME, Self::VERSION, blob)?;
        if state.status & !STS_BITS != 0 || state.enable & !EN_BITS != 0 || state.control & !CNT_BITS != 0 {
            return Err(unfit(Self::NAME, "reserved bits are set"));
        }
        self.state = state;
        self.update();
        Ok(())
    }
}

/// The reset control register at [`RESET_PORT`] (82371AB 4.1.6). The PCI host, which owns the ports around
/// it, passes its byte accesses on.
pub struct ResetRegister {
    value: u8,
    power: Arc<dyn PowerControl>,
}

impl ResetRegister {
    const NAME: &'static str = "reset-register";
    const VERSION: u32 = 1;

    /// The register, asking `power` for a reset.
    pub fn new(power: Arc<dyn PowerControl>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { value: 0, power }))
    }

    /// The state after a machine reset.
    pub fn reset(&mut self) {
        self.value = 0;
    }
}

impl PortDevice for ResetRegister {
    fn port_read(&mut self, _offset: u16, _size: u8) -> u32 {
        u32::from(self.value)
    }

    fn port_write(&mut self, _offset: u16, _size: u8, value: u32) {
        let byte = value.to_le_bytes()[0];
        // RST_CPU (bit 2) going up resets; SYS_RST (bit 1) says how hard.
        let reset = byte & !self.value & 0x04 != 0;
        self.value = byte & 0x02;
        if reset {
            self.power.reset();
        }
    }
}

impl Snapshot for ResetRegister {
    fn save(&self) -> StateBlob {
        to_blob(Self::NAME, Self::VERSION, &self.value)
    }

    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.value = from_blob::<u8>(Self::NAME, Self::VERSION, blob)? & 0x02;
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "parts of a random word")]
mod tests {
    use super::super::testing::{Bench, Noise, Wishes};
    use super::*;

    fn pm(bench: &Bench, wide: bool) -> (Arc<Wishes>, Arc<Mutex<AcpiPm>>) {
        let wishes = Arc::new(Wishes::default());
        (Arc::clone(&wishes), AcpiPm::new(bench.time.clone(), bench.line(SCI_GSI), wishes, wide))
    }

    #[test]
    fn slp_en_with_s5_powers_off() {
        let bench = Bench::new();
        let (wishes, pm) = pm(&bench, true);
        lock(&pm).port_write(4, 2, 0x2000);
        assert_eq!(wishes.take(), ["off"]);
        lock(&pm).port_write(4, 2, 0x2400);
        assert!(wishes.take().is_empty());
        assert_eq!(lock(&pm).port_read(0, 2), 0x8000);
        assert_eq!(lock(&pm).port_read(4, 2), 0x0401, "SCI_EN is always set, SLP_EN never");
    }

    #[test]
    fn pm_timer_counts_at_its_frequency() {
        let bench = Bench::new();
        let (_, wide) = pm(&bench, true);
        let (_, narrow) = pm(&bench, false);
        bench.run(10_000_000_000);
        assert_eq!(lock(&wide).port_read(8, 4), 35_795_450);
        assert_eq!(lock(&narrow).port_read(8, 4), 35_795_450 & 0xff_ffff);
    }

    #[test]
    fn timer_overflow_enabled_raises_sci_until_cleared() {
        let bench = Bench::new();
        let (_, pm) = pm(&bench, false);
        lock(&pm).port_write(2, 2, 1);
        bench.run(2_343_000_000);
        assert!(!bench.lines.level(9));
        bench.run(2_000_000);
        assert!(bench.lines.level(9));
        lock(&pm).port_write(0, 2, 1);
        assert!(!bench.lines.level(9));
        bench.run(2_344_000_000);
        assert!(bench.lines.level(9));
    }

    #[test]
    fn power_button_enabled_raises_sci() {
        let bench = Bench::new();
        let (_, pm) = pm(&bench, true);
        assert!(!lock(&pm).power_button(), "nobody listens");
        assert!(!bench.lines.level(9));
        lock(&pm).port_write(3, 1, 1);
        assert!(lock(&pm).power_button());
        assert!(bench.lines.level(9));
        lock(&pm).port_write(1, 1, 1);
        assert!(!bench.lines.level(9));
    }

    #[test]
    fn reset_register_bit_2_resets() {
        let wishes = Arc::new(Wishes::default());
        let register = ResetRegister::new(Arc::clone(&wishes) as _);
        lock(&register).port_write(0, 1, 2);
        assert!(wishes.take().is_empty());
        lock(&register).port_write(0, 1, u32::from(RESET_VALUE));
        assert_eq!(wishes.take(), ["reset"]);
        let blob = lock(&register).save();
        lock(&register).restore(&blob).unwrap();
        assert_eq!(lock(&register).port_read(0, 1), 2);
    }

    #[test]
    fn restore_armed_overflow_interrupts() {
        let bench = Bench::new();
        let (_, a) = pm(&bench, false);
        lock(&a).port_write(2, 2, 1);
        let blob = lock(&a).save();
        drop(a);
        let (_, b) = pm(&bench, false);
        lock(&b).restore(&blob).unwrap();
        bench.run(2_400_000_000);
        assert!(bench.lines.level(9));
        let mut bad = blob;
        bad.data["enable"] = 2.into();
        assert!(lock(&b).restore(&bad).is_err());
    }

    #[test]
    fn nonsense_writes_are_survived() {
        let bench = Bench::new();
        let (_, pm) = pm(&bench, true);
        let mut noise = Noise(7);
        for _ in 0..20_000 {
            let word = noise.next();
            let (offset, size) = ((word >> 32) as u16 % 12, 1 << (word >> 48 & 3).min(2));
            lock(&pm).port_write(offset, size, word as u32);
            lock(&pm).port_read(offset, size);
            bench.stall(word >> 40);
        }
    }
}
