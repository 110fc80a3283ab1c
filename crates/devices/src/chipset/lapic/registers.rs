//! The APIC's registers: what a read shows and a write does (SDM 3A 11.4, 11.5, 11.8, 11.12).
//!
//! Plain state without locks or callbacks; consequences elsewhere are collected in [`Effects`].

use serde::{Deserialize, Serialize};

use super::delivery::{Delivery, DestMode, Msg, Shorthand};
use super::{Ack, ApicModel, BASE_BSP, BASE_ENABLE, DEFAULT_BASE, Gp, Mode, mode_of, timer::TimerRegs};
use crate::clock::Clock;

pub(super) const LVT_TIMER: usize = 0;
const LVT_LINT0: usize = 3;
const LVT_LINT1: usize = 4;
const LVT_ERROR: usize = 5;
pub(super) const LVT_MASKED: u32 = 1 << 16;
const LVT_REMOTE_IRR: u32 = 1 << 14;
const LVT_LEVEL: u32 = 1 << 15;
const LVT_MODE_NMI: u32 = 4 << 8;
const LVT_MODE_EXTINT: u32 = 7 << 8;
/// Writable bits per entry: timer, thermal, performance, LINT0, LINT1, error (SDM 3A figure 11-8).
const LVT_WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
/// Delivery status and (LINT pins) remote IRR: read-only, so a write of them is no reserved bit.
const LVT_READ_ONLY: [u32; 6] = [0x1000, 0x1000, 0x1000, 0x5000, 0x5000, 0x1000];
const SVR_ENABLE: u32 = 1 << 8;
/// Vector, enable, focus processor checking (ignored).
const SVR_WRITABLE: u32 = 0x3ff;
/// Version 0x14, six LVT entries (SDM 3A figure 11-7); EOI-broadcast suppression is not announced.
const VERSION: u32 = 5 << 16 | 0x14;
const ESR_SEND_ILLEGAL: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;
/// Bits of the low ICR half that exist; bit 12 (delivery status) is read-only and always idle.
const ICR_LOW: u32 = 0x000c_cfff;

/// What a register access causes outside of this APIC.
#[derive(Default)]
pub(super) struct Effects {
    pub eoi: Option<u8>,
    pub ipi: Option<(Shorthand, Msg)>,
    pub nmi: bool,
    pub timer_changed: bool,
}

/// 256 bits, one per vector.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Vectors([u32; 8]);

impl Vectors {
    const fn get(&self, v: u8) -> bool {
        self.0[(v >> 5) as usize] >> (v & 31) & 1 != 0
    }
    fn assign(&mut self, v: u8, on: bool) {
        let bit = 1 << (v & 31);
        let word = &mut self.0[usize::from(v >> 5)];
        *word = if on { *word | bit } else { *word & !bit };
    }
    fn highest(&self) -> Option<u8> {
        (0..8u8).rev().find_map(|i| {
            let top = self.0[usize::from(i)].checked_ilog2()?;
            Some(i << 5 | top.to_le_bytes()[0])
        })
    }
}

/// All state of one APIC.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Registers {
    pub id: u32,
    /// IA32_APIC_BASE.
    pub base: u64,
    tpr: u8,
    /// Logical id, xAPIC format (8 bits).
    ldr: u8,
    /// Model: bits 31:28 of DFR.
    dfr: u8,
    svr: u32,
    irr: Vectors,
    isr: Vectors,
    tmr: Vectors,
    esr: u32,
    esr_pending: u32,
    icr: u64,
    pub lvt: [u32; 6],
    pub timer: TimerRegs,
    /// Levels of the LINT pins.
    pub lint: [bool; 2],
    /// An ExtINT message from the IO-APIC waits for its acknowledge.
    extint: bool,
}

impl Registers {
    pub fn new(id: u32) -> Self {
        Self {
            id,
            base: DEFAULT_BASE | BASE_ENABLE | if id == 0 { BASE_BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: 0xf,
            svr: 0xff,
            irr: Vectors::default(),
            isr: Vectors::default(),
            tmr: Vectors::default(),
            esr: 0,
            esr_pending: 0,
            icr: 0,
            lvt: [LVT_MASKED; 6],
            timer: TimerRegs::default(),
            lint: [false; 2],
            extint: false,
        }
    }

    /// State after INIT (SDM 3A 11.4.7.3): as after power-up, but for the id and IA32_APIC_BASE.
    pub fn init_reset(&mut self, fx: &mut Effects) {
        let mut fresh = Self::new(self.id);
        fresh.base = self.base;
        fresh.lint = self.lint;
        fresh.timer.tsc_offset = self.timer.tsc_offset;
        *self = fresh;
        fx.timer_changed = true;
    }

    pub fn set_virtual_wire(&mut self) {
        self.svr = SVR_ENABLE | 0xff;
        self.lvt[LVT_LINT0] = LVT_MODE_EXTINT;
        self.lvt[LVT_LINT1] = LVT_MODE_NMI;
    }

    /// Drops what no sequence of writes could have made (for states from outside).
    pub fn sanitise(&mut self) {
        self.dfr &= 0xf;
        self.svr &= SVR_WRITABLE;
        for set in [&mut self.irr, &mut self.isr, &mut self.tmr] {
            set.0[0] &= !0xffff;
        }
        for (lvt, mask) in self.lvt.iter_mut().zip(LVT_WRITABLE) {
            *lvt &= mask | LVT_REMOTE_IRR;
        }
        self.timer.divide &= 0xb;
        if self.lvt[LVT_TIMER] >> 17 & 3 >= 2 {
            self.timer.expiry = None;
        } else {
            self.timer.deadline = 0;
        }
    }

    pub fn mode(&self) -> Mode {
        mode_of(self.base).unwrap_or(Mode::Disabled)
    }

    fn software_enabled(&self) -> bool {
        self.svr & SVR_ENABLE != 0
    }

    // ---- priorities (SDM 3A 11.8.3) -------------------------------------------------------------------------

    pub const fn tpr(&self) -> u8 {
        self.tpr
    }

    pub fn set_tpr(&mut self, tpr: u8) {
        self.tpr = tpr;
    }

    pub fn ppr(&self) -> u8 {
        let servicing = self.isr.highest().unwrap_or(0);
        if self.tpr >> 4 >= servicing >> 4 { self.tpr } else { servicing & 0xf0 }
    }

    fn deliverable(&self) -> Option<u8> {
        self.irr.highest().filter(|v| v >> 4 > self.ppr() >> 4 && self.mode() != Mode::Disabled)
    }

    /// An external interrupt waits: by message, or the 8259 pulls LINT0 and LINT0 passes it on. A disabled APIC's LINT0 is
    /// the processor's INTR pin (SDM 3A 11.4.3).
    fn external(&self) -> bool {
        let lint0 = self.lvt[LVT_LINT0];
        let passes = self.mode() == Mode::Disabled || lint0 & (LVT_MASKED | 0x700) == LVT_MODE_EXTINT;
        self.extint || self.lint[0] && passes
    }

    pub fn has_interrupt(&self) -> bool {
        self.external() || self.deliverable().is_some()
    }

    pub fn ack(&mut self) -> Option<Ack> {
        if self.external() {
            self.extint = false;
            return Some(Ack::ExtInt);
        }
        let vector = self.deliverable()?;
        self.irr.assign(vector, false);
        self.isr.assign(vector, true);
        Some(Ack::Vector(vector))
    }

    fn eoi(&mut self, fx: &mut Effects) {
        let Some(vector) = self.isr.highest() else { return };
        self.isr.assign(vector, false);
        if !self.tmr.get(vector) {
            return;
        }
        fx.eoi = Some(vector);
        for pin in 0..2 {
            let lvt = &mut self.lvt[LVT_LINT0 + pin];
            if *lvt & LVT_REMOTE_IRR != 0 && lvt.to_le_bytes()[0] == vector {
                *lvt &= !LVT_REMOTE_IRR;
                if self.lint[pin] {
                    self.raise_lint(pin, fx);
                }
            }
        }
    }

    /// Whether the vector waits in IRR.
    pub const fn requested(&self, vector: u8) -> bool {
        self.irr.get(vector)
    }

    // ---- incoming -------------------------------------------------------------------------------------------

    /// Takes a fixed interrupt. A software-disabled APIC ignores it (SDM 3A 11.4.7.2).
    pub fn accept(&mut self, vector: u8, level_triggered: bool, fx: &mut Effects) -> bool {
        if self.mode() == Mode::Disabled || !self.software_enabled() {
            return false;
        }
        if vector < 16 {
            self.error(ESR_RECEIVE_ILLEGAL, fx);
            return false;
        }
        self.irr.assign(vector, true);
        self.tmr.assign(vector, level_triggered);
        true
    }

    pub fn latch_extint(&mut self) {
        self.extint |= self.mode() != Mode::Disabled;
    }

    pub fn set_lint(&mut self, pin: usize, level: bool, fx: &mut Effects) {
        let Some(line) = self.lint.get_mut(pin) else { return };
        let rising = level && !*line;
        *line = level;
        if rising {
            self.raise_lint(pin, fx);
        }
    }

    /// A LINT pin has gone (or still is) high: by its LVT entry. ExtINT needs no latch, see [`Registers::external`].
    fn raise_lint(&mut self, pin: usize, fx: &mut Effects) {
        if self.mode() == Mode::Disabled {
            fx.nmi |= pin == 1;
            return;
        }
        let lvt = self.lvt[LVT_LINT0 + pin];
        if lvt & LVT_MASKED != 0 {
            return;
        }
        match lvt & 0x700 {
            0 if lvt & (LVT_LEVEL | LVT_REMOTE_IRR) == LVT_LEVEL => {
                self.lvt[LVT_LINT0 + pin] |= LVT_REMOTE_IRR;
                self.accept(lvt.to_le_bytes()[0], true, fx);
            }
            0 if lvt & LVT_LEVEL == 0 => {
                self.accept(lvt.to_le_bytes()[0], false, fx);
            }
            LVT_MODE_NMI => fx.nmi = true,
            _ => {}
        }
    }

    /// Notes an error, and raises the error interrupt when it is a new one (SDM 3A 11.5.3).
    fn error(&mut self, bit: u32, fx: &mut Effects) {
        let new = self.esr_pending & bit == 0;
        self.esr_pending |= bit;
        let lvt = self.lvt[LVT_ERROR];
        // An error entry with an illegal vector ends here: its own error is pending then already or gets noted once.
        if new && lvt & LVT_MASKED == 0 {
            self.accept(lvt.to_le_bytes()[0], false, fx);
        }
    }

    // ---- register page --------------------------------------------------------------------------------------

    fn x2apic_ldr(&self) -> u32 {
        self.id >> 4 << 16 | 1 << (self.id & 15)
    }

    /// Registers that xAPIC and x2APIC have in common, by their offset in the page; `None` if there is none.
    fn read_common(&self, offset: u64, clock: &dyn Clock) -> Option<u32> {
        let word = |set: &Vectors| set.0[usize::try_from(offset >> 4 & 7).unwrap_or(0)];
        Some(match offset {
            0x030 => VERSION,
            0x080 => u32::from(self.tpr),
            0x0a0 => u32::from(self.ppr()),
            0x0f0 => self.svr,
            0x100..=0x170 => word(&self.isr),
            0x180..=0x1f0 => word(&self.tmr),
            0x200..=0x270 => word(&self.irr),
            0x280 => self.esr,
            0x320..=0x370 => self.lvt[usize::try_from((offset - 0x320) >> 4).unwrap_or(0)],
            0x380 => self.timer.initial,
            0x390 => self.read_current_count(clock),
            0x3e0 => self.timer.divide,
            _ => return None,
        })
    }

    /// `offset` is a multiple of 16 below 4096.
    pub fn mmio_read(&mut self, offset: u64, clock: &dyn Clock, fx: &mut Effects) -> u32 {
        let [_, _, _, _, high @ ..] = self.icr.to_le_bytes();
        match offset {
            0x020 => self.id << 24,
            0x090 | 0x0b0 | 0x0c0 => 0, // arbitration priority, EOI, remote read
            0x0d0 => u32::from(self.ldr) << 24,
            0x0e0 => u32::from(self.dfr) << 28 | 0x0fff_ffff,
            0x300 => self.icr_low(),
            0x310 => u32::from_le_bytes(high),
            _ => self.read_common(offset, clock).unwrap_or_else(|| {
                self.error(ESR_ILLEGAL_REGISTER, fx);
                0
            }),
        }
    }

    fn icr_low(&self) -> u32 {
        let [a, b, c, d, ..] = self.icr.to_le_bytes();
        u32::from_le_bytes([a, b, c, d])
    }

    /// `offset` is a multiple of 16 below 4096.
    pub fn mmio_write(
        &mut self,
        offset: u64,
        value: u32,
        clock: &dyn Clock,
        model: ApicModel,
        fx: &mut Effects,
    ) {
        let [low, _, _, top] = value.to_le_bytes();
        match offset {
            0x080 => self.tpr = low,
            0x0b0 => self.eoi(fx),
            0x0d0 => self.ldr = top,
            0x0e0 => self.dfr = top >> 4,
            0x0f0 => self.write_svr(value),
            0x280 => self.latch_errors(),
            0x300 => {
                self.icr = self.icr & !0xffff_ffff | u64::from(value & ICR_LOW);
                self.send_icr(fx);
            }
            0x310 => self.icr = self.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32,
            0x320..=0x370 => {
                self.write_lvt(usize::try_from((offset - 0x320) >> 4).unwrap_or(0), value, model, fx);
            }
            0x380 => self.write_initial_count(value, clock, fx),
            0x3e0 => self.write_divide(value, clock, fx),
            // Read-only registers. The id is read-only too on all processors of the last decades (SDM 3A 11.4.6).
            0x020 | 0x030 | 0x090 | 0x0a0 | 0x0c0 | 0x100..=0x270 | 0x390 => {}
            _ => self.error(ESR_ILLEGAL_REGISTER, fx),
        }
    }

    // ---- x2APIC MSRs (SDM 3A table 11-6) --------------------------------------------------------------------

    pub fn msr_read(&mut self, index: u32, clock: &dyn Clock, _fx: &mut Effects) -> Result<u64, Gp> {
        match index {
            0x802 => Ok(u64::from(self.id)),
            0x80d => Ok(u64::from(self.x2apic_ldr())),
            0x830 => Ok(self.icr),
            _ => self.read_common(u64::from(index & 0xff) << 4, clock).map(u64::from).ok_or(Gp),
        }
    }

    pub fn msr_write(
        &mut self,
        index: u32,
        value: u64,
        clock: &dyn Clock,
        model: ApicModel,
        fx: &mut Effects,
    ) -> Result<(), Gp> {
        if index == 0x830 {
            // Bit 12 does not exist here, but writing it is harmless on hardware.
            if value & 0xffff_ffff & !u64::from(ICR_LOW | 1 << 12) != 0 {
                return Err(Gp);
            }
            self.icr = value & !(1 << 12);
            self.send_icr(fx);
            return Ok(());
        }
        let value = u32::try_from(value).map_err(|_| Gp)?;
        let [low, ..] = value.to_le_bytes();
        let only = |mask: u32| if value & !mask == 0 { Ok(()) } else { Err(Gp) };
        match index {
            0x808 => {
                only(0xff)?;
                self.tpr = low;
            }
            0x80b => {
                only(0)?;
                self.eoi(fx);
            }
            0x80f => {
                only(SVR_WRITABLE)?;
                self.write_svr(value);
            }
            0x828 => {
                only(0)?;
                self.latch_errors();
            }
            0x832..=0x837 => {
                let entry = usize::try_from(index - 0x832).map_err(|_| Gp)?;
                only(LVT_WRITABLE[entry] | LVT_READ_ONLY[entry])?;
                self.write_lvt(entry, value, model, fx);
            }
            0x838 => self.write_initial_count(value, clock, fx),
            0x83e => {
                only(0xb)?;
                self.write_divide(value, clock, fx);
            }
            0x83f => {
                only(0xff)?;
                let msg = Msg { vector: low, ..Msg::default() };
                self.send(Shorthand::Myself, msg, fx);
            }
            _ => return Err(Gp),
        }
        Ok(())
    }

    // ---- writes with consequences ---------------------------------------------------------------------------

    /// Switching the APIC off masks every LVT entry (SDM 3A 11.4.7.2).
    fn write_svr(&mut self, value: u32) {
        self.svr = value & SVR_WRITABLE;
        if !self.software_enabled() {
            self.lvt.iter_mut().for_each(|lvt| *lvt |= LVT_MASKED);
        }
    }

    /// A write to ESR shows the errors since the last one (SDM 3A 11.5.3).
    fn latch_errors(&mut self) {
        self.esr = std::mem::take(&mut self.esr_pending);
    }

    fn write_lvt(&mut self, entry: usize, value: u32, model: ApicModel, fx: &mut Effects) {
        let mut writable = LVT_WRITABLE[entry];
        if entry == LVT_TIMER && !model.tsc_deadline {
            writable &= !(1 << 18);
        }
        let old = self.lvt[entry];
        let mut new = value & writable | old & LVT_REMOTE_IRR;
        if !self.software_enabled() {
            new |= LVT_MASKED;
        }
        if new & LVT_LEVEL == 0 {
            new &= !LVT_REMOTE_IRR;
        }
        self.lvt[entry] = new;
        match entry {
            LVT_TIMER => self.timer_lvt_changed(old, fx),
            // A level-triggered pin that is high interrupts as soon as it may.
            LVT_LINT0 | LVT_LINT1
                if new & (LVT_LEVEL | 0x700) == LVT_LEVEL && self.lint[entry - LVT_LINT0] =>
            {
                self.raise_lint(entry - LVT_LINT0, fx);
            }
            _ => {}
        }
    }

    /// Sends what the ICR says (SDM 3A 11.6.1).
    fn send_icr(&mut self, fx: &mut Effects) {
        let low = self.icr_low();
        let [vector, ..] = low.to_le_bytes();
        let [_, _, _, _, d0, d1, d2, d3] = self.icr.to_le_bytes();
        let x2apic = self.mode() == Mode::X2Apic;
        let shorthand = match low >> 18 & 3 {
            0 => Shorthand::None,
            1 => Shorthand::Myself,
            2 => Shorthand::All,
            _ => Shorthand::Others,
        };
        let msg = Msg {
            dest: if x2apic { u32::from_le_bytes([d0, d1, d2, d3]) } else { u32::from(d3) },
            wide: x2apic,
            dest_mode: if low & 1 << 11 != 0 { DestMode::Logical } else { DestMode::Physical },
            delivery: Delivery::from_bits(low >> 8),
            vector,
            assert: low & 1 << 14 != 0,
            // The trigger mode matters only for INIT level de-assert: fixed IPIs are edges (SDM 3A 11.6.1).
            level_triggered: low & 1 << 15 != 0 && Delivery::from_bits(low >> 8) == Delivery::Init,
        };
        self.send(shorthand, msg, fx);
    }

    fn send(&mut self, shorthand: Shorthand, msg: Msg, fx: &mut Effects) {
        let needs_vector = matches!(msg.delivery, Delivery::Fixed | Delivery::Lowest);
        if needs_vector && msg.vector < 16 {
            self.error(ESR_SEND_ILLEGAL, fx);
        } else if self.mode() != Mode::Disabled {
            fx.ipi = Some((shorthand, msg));
        }
    }

    // ---- destinations (SDM 3A 11.6.2) -----------------------------------------------------------------------

    /// Whether the message is for this APIC.
    pub fn matches(&self, msg: &Msg) -> bool {
        if self.mode() == Mode::Disabled {
            return false;
        }
        if msg.dest == if msg.wide { u32::MAX } else { 0xff } {
            return true;
        }
        match (msg.dest_mode, self.mode()) {
            (DestMode::Physical, _) => msg.dest == self.id,
            (DestMode::Logical, Mode::X2Apic) => {
                let ldr = self.x2apic_ldr();
                ldr >> 16 == msg.dest >> 16 && ldr & msg.dest & 0xffff != 0
            }
            (DestMode::Logical, _) => u8::try_from(msg.dest).is_ok_and(|dest| match self.dfr {
                0xf => self.ldr & dest != 0,
                0 => (dest >> 4 == 0xf || dest >> 4 == self.ldr >> 4) && self.ldr & dest & 0xf != 0,
                _ => false,
            }),
        }
    }

    /// Priority of this processor for lowest-priority delivery; `None` if it takes no interrupts.
    pub fn arbitration(&self) -> Option<u8> {
        (self.mode() != Mode::Disabled && self.software_enabled()).then(|| self.ppr())
    }
}
