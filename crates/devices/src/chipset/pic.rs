//! Two cascaded 8259A interrupt controllers (Intel 8259A datasheet 231468-003) with the edge/level
//! registers of the PC bridges (ELCR, 82371SB 2.6.3).
//!
//! The slave's output is the master's line 2. [`Pic::output`] is the level of the master's INT pin; each
//! change of it is told to a [`PicOutput`], which the machine wires to the boot CPU's LINT0. `INTA` is
//! [`Pic::ack`].
//!
// DEVIATION: an edge stays latched in IRR until it is acknowledged, even when the line drops again (the
// real chip then answers INTA with the spurious vector 7). Devices may therefore pulse a line; a guest
// would notice only spurious interrupts that it does not get.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::{BytePorts, LineState, attach_ports, unfit};
use crate::bus::{Bus, Overlap};
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};

/// Who hears of the PIC's INT pin. Called with the PIC locked.
pub trait PicOutput: Send + Sync {
    /// The pin is now at `level`. It is a level: after an acknowledge with another interrupt waiting it
    /// stays high and no call is made.
    fn intr(&self, level: bool);
}

const CASCADE: u8 = 2;
const SPURIOUS: u8 = 7;

/// Where the initialisation sequence stands (datasheet, "Initialization Command Words").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum Init {
    #[default]
    Done,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Chip {
    /// Levels of the input pins.
    lines: u8,
    irr: u8,
    isr: u8,
    imr: u8,
    /// Line with the highest priority: moves with the rotate commands.
    top: u8,
    /// Vector of line 0.
    base: u8,
    init: Init,
    icw4_follows: bool,
    single: bool,
    /// ICW1 LTIM: all lines level-triggered.
    level_mode: bool,
    /// Lines made level-triggered by ELCR.
    elcr: u8,
    /// OCW3: reads of the command port give ISR instead of IRR.
    read_isr: bool,
    poll: bool,
    special_mask: bool,
    special_nested: bool,
    auto_eoi: bool,
    rotate_auto_eoi: bool,
}

impl Chip {
    fn is_level(&self, line: u8) -> bool {
        self.level_mode || self.elcr >> line & 1 != 0
    }

    fn set_line(&mut self, line: u8, level: bool) {
        let bit = 1 << (line & 7);
        let rising = level && self.lines & bit == 0;
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
        if rising {
            self.irr |= bit;
        } else if !level && self.is_level(line & 7) {
            self.irr &= !bit;
        }
    }

    /// The first line of `mask` in order of priority, and its rank (0 is the highest).
    fn first(&self, mask: u8) -> Option<(u8, u8)> {
        (0..8).map(|rank| (rank, (rank + self.top) & 7)).find(|&(_, line)| mask >> line & 1 != 0)
    }

    /// The line that asks for service now ("Fully Nested Mode", "Special Mask Mode").
    fn pending(&self, ignore_in_service: u8) -> Option<u8> {
        let (rank, line) = self.first(self.irr & !self.imr)?;
        let mut in_service = self.isr & !ignore_in_service;
        if self.special_mask {
            in_service &= !self.imr;
        }
        match self.first(in_service) {
            Some((busy, _)) if busy <= rank => None,
            _ => Some(line),
        }
    }

    /// INTA for `line`.
    fn acknowledge(&mut self, line: u8) {
        let bit = 1 << line;
        if !self.is_level(line) {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_auto_eoi {
            self.top = (line + 1) & 7;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.start_init(value);
        } else if value & 0x08 != 0 {
            self.write_ocw3(value);
        } else {
            self.write_ocw2(value);
        }
    }

    /// ICW1. The edge latches are cleared; the pins keep their levels.
    fn start_init(&mut self, value: u8) {
        let level_mode = value & 0x08 != 0;
        *self = Self {
            lines: self.lines,
            elcr: self.elcr,
            base: self.base,
            init: Init::Icw2,
            icw4_follows: value & 1 != 0,
            single: value & 2 != 0,
            level_mode,
            irr: if level_mode { self.lines } else { self.lines & self.elcr },
            ..Self::default()
        };
    }

    fn write_ocw3(&mut self, value: u8) {
        self.poll = value & 0x04 != 0;
        if value & 0x02 != 0 {
            self.read_isr = value & 1 != 0;
        }
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let named = value & 7;
        match value >> 5 {
            0 => self.rotate_auto_eoi = false,
            4 => self.rotate_auto_eoi = true,
            command @ (1 | 5) => {
                let masked = if self.special_mask { self.imr } else { 0 };
                if let Some((_, line)) = self.first(self.isr & !masked) {
                    self.isr &= !(1 << line);
                    if command == 5 {
                        self.top = (line + 1) & 7;
                    }
                }
            }
            3 => self.isr &= !(1 << named),
            6 => self.top = (named + 1) & 7,
            7 => {
                self.isr &= !(1 << named);
                self.top = (named + 1) & 7;
            }
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        let after_icw3 = if self.icw4_follows { Init::Icw4 } else { Init::Done };
        match self.init {
            Init::Done => self.imr = value,
            Init::Icw2 => {
                self.base = value & 0xf8;
                self.init = if self.single { after_icw3 } else { Init::Icw3 };
            }
            Init::Icw3 => self.init = after_icw3,
            Init::Icw4 => {
                self.special_nested = value & 0x10 != 0;
                self.auto_eoi = value & 0x02 != 0;
                self.init = Init::Done;
            }
        }
    }

    fn is_valid(&self) -> bool {
        self.top < 8 && self.base & 7 == 0
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct PicState {
    master: Chip,
    slave: Chip,
    /// Level of INT as it was last told.
    intr: bool,
}

/// The PC's interrupt controller pair: ports 0x20–0x21, 0xa0–0xa1, 0x4d0–0x4d1.
pub struct Pic {
    state: PicState,
    output: Arc<dyn PicOutput>,
}

impl Pic {
    const NAME: &'static str = "pic";
    const VERSION: u32 = 1;

    /// A PIC after power-on, whose INT pin goes to `output`.
    pub fn new(output: Arc<dyn PicOutput>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { state: PicState::default(), output }))
    }

    /// Puts the PIC on the bus.
    ///
    /// # Errors
    /// When a port is taken.
    pub fn attach(this: &Arc<Mutex<Self>>, bus: &Bus) -> Result<(), Overlap> {
        attach_ports(bus, this, &[(0x20, 2), (0xa0, 2), (0x4d0, 2)])
    }

    /// The state after a machine reset; the pins keep their levels.
    pub fn reset(&mut self) {
        let fresh = |old: &Chip| Chip { lines: old.lines, ..Chip::default() };
        self.state.master = fresh(&self.state.master);
        self.state.slave = fresh(&self.state.slave);
        self.update();
    }

    /// What a PC's firmware leaves behind: vectors 0x08 and 0x70, all lines masked but timer, keyboard,
    /// cascade, clock and mouse. For boot protocols that come after firmware.
    pub fn firmware_init(&mut self) {
        for (port, vector, icw3, mask) in [(0x20, 0x08, 0x04, 0xf8), (0xa0, 0x70, 0x02, 0xee)] {
            self.write8(port, 0x11);
            self.write8(port + 1, vector);
            self.write8(port + 1, icw3);
            self.write8(port + 1, 0x01);
            self.write8(port + 1, mask);
        }
    }

    /// Sets the level of ISA line `line` (0–15; line 2 is the cascade and is ignored).
    pub fn set_irq(&mut self, line: u8, level: bool) {
        match line {
            CASCADE => return,
            0..8 => self.state.master.set_line(line, level),
            8..16 => self.state.slave.set_line(line - 8, level),
            _ => return,
        }
        self.update();
    }

    /// Level of the INT pin.
    #[must_use]
    pub fn output(&self) -> bool {
        self.state.intr
    }

    /// INTA: takes the interrupt with the highest priority and returns its vector; with none left, the
    /// spurious vector of line 7 (or 15), which sets no in-service bit.
    pub fn ack(&mut self) -> u8 {
        let vector = match self.master_pending() {
            Some(CASCADE) => {
                self.state.master.acknowledge(CASCADE);
                let slave = &mut self.state.slave;
                let line = slave.pending(0);
                if let Some(line) = line {
                    slave.acknowledge(line);
                }
                slave.base | line.unwrap_or(SPURIOUS)
            }
            Some(line) => {
                self.state.master.acknowledge(line);
                self.state.master.base | line
            }
            None => self.state.master.base | SPURIOUS,
        };
        self.update();
        vector
    }

    /// What becomes of an edge on `line` now.
    #[must_use]
    pub fn line_state(&self, line: u8) -> LineState {
        let (chip, bit) = match line {
            0..8 => (&self.state.master, 1u8 << line),
            8..16 => (&self.state.slave, 1u8 << (line - 8)),
            _ => return LineState::Masked,
        };
        let cascade_cut = line >= 8 && self.state.master.imr & (1 << CASCADE) != 0;
        if chip.imr & bit != 0 || cascade_cut {
            LineState::Masked
        } else if chip.irr & bit != 0 {
            LineState::Pending
        } else {
            LineState::Free
        }
    }

    fn master_pending(&self) -> Option<u8> {
        let master = &self.state.master;
        master.pending(if master.special_nested { 1 << CASCADE } else { 0 })
    }

    /// Carries the slave's output to the master and the master's to the CPU.
    fn update(&mut self) {
        let slave = self.state.slave.pending(0).is_some();
        let bit = 1 << CASCADE;
        let master = &mut self.state.master;
        // The slave's INT drops and rises again between two of its interrupts: following its level
        // gives the master the same requests as its edges would.
        master.irr = if slave { master.irr | bit } else { master.irr & !bit };
        master.lines = if slave { master.lines | bit } else { master.lines & !bit };
        let intr = self.master_pending().is_some();
        if intr != self.state.intr {
            self.state.intr = intr;
            self.output.intr(intr);
        }
    }

    /// A read in poll mode acts as INTA (datasheet, "Poll Command").
    fn poll(&mut self, is_slave: bool) -> u8 {
        let pending = if is_slave { self.state.slave.pending(0) } else { self.master_pending() };
        let chip = if is_slave { &mut self.state.slave } else { &mut self.state.master };
        chip.poll = false;
        pending.map_or(0, |line| {
            chip.acknowledge(line);
            0x80 | line
        })
    }
}

impl BytePorts for Pic {
    fn read8(&mut self, port: u16) -> u8 {
        match port {
            0x4d0 => return self.state.master.elcr,
            0x4d1 => return self.state.slave.elcr,
            _ => {}
        }
        let is_slave = port & 0x80 != 0;
        let chip = if is_slave { &self.state.slave } else { &self.state.master };
        let value = match (chip.poll, port & 1) {
            (true, _) => self.poll(is_slave),
            (false, 1) => chip.imr,
            _ if chip.read_isr => chip.isr,
            _ => chip.irr,
        };
        self.update();
        value
    }

    fn write8(&mut self, port: u16, value: u8) {
        // Timer, keyboard, cascade, clock and FPU lines are always edge-triggered.
        match port {
            0x4d0 => self.state.master.elcr = value & 0xf8,
            0x4d1 => self.state.slave.elcr = value & 0xde,
            _ => {
                let chip = if port & 0x80 != 0 { &mut self.state.slave } else { &mut self.state.master };
                if port & 1 != 0 { chip.write_data(value) } else { chip.write_command(value) }
            }
        }
        self.update();
    }
}

impl Snapshot for Pic {
    fn save(&self) -> StateBlob {
        to_blob(Self::NAME, Self::VERSION, &self.state)
    }

    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        let state: PicState = from_blob(Self::NAME, Self::VERSION, blob)?;
        if !state.master.is_valid() || !state.slave.is_valid() {
            return Err(unfit(Self::NAME, "priority or vector base out of range"));
        }
        self.state = state;
        self.update();
        self.output.intr(self.state.intr);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, hammer_ports};
    use super::*;
    use crate::bus::lock;

    #[derive(Default)]
    struct Pin(Mutex<Vec<bool>>);
    impl PicOutput for Pin {
        fn intr(&self, level: bool) {
            lock(&self.0).push(level);
        }
    }

    fn pic() -> (Arc<Pin>, Pic) {
        let pin = Arc::new(Pin::default());
        let mut pic = Pic { state: PicState::default(), output: Arc::clone(&pin) as _ };
        for (port, base, icw3) in [(0x20, 0x30, 4), (0xa0, 0x38, 2)] {
            pic.write8(port, 0x11);
            pic.write8(port + 1, base);
            pic.write8(port + 1, icw3);
            pic.write8(port + 1, 1);
        }
        (pin, pic)
    }

    #[test]
    fn ack_several_pending_follows_priority() {
        let (pin, mut pic) = pic();
        pic.set_irq(4, true);
        pic.set_irq(9, true);
        pic.set_irq(1, true);
        assert_eq!(pic.ack(), 0x31);
        assert!(!pic.output(), "line 1 in service holds the others back");
        pic.write8(0x20, 0x20);
        assert_eq!(pic.ack(), 0x39);
        pic.write8(0xa0, 0x20);
        pic.write8(0x20, 0x20);
        assert_eq!(pic.ack(), 0x34);
        pic.write8(0x20, 0x64);
        assert!(!pic.output());
        assert_eq!(*lock(&pin.0), [true, false, true, false, true, false]);
    }

    #[test]
    fn ack_line_withdrawn_is_spurious() {
        let (_, mut pic) = pic();
        pic.write8(0x4d0, 0x20);
        pic.set_irq(5, true);
        pic.set_irq(5, false);
        assert_eq!(pic.ack(), 0x37);
        pic.write8(0x20, 0x0b);
        assert_eq!(pic.read8(0x20), 0, "no in-service bit");
    }

    #[test]
    fn level_line_after_eoi_interrupts_again_until_lowered() {
        let (_, mut pic) = pic();
        pic.write8(0x4d1, 0x04);
        pic.set_irq(10, true);
        assert_eq!(pic.ack(), 0x3a);
        pic.write8(0xa0, 0x20);
        pic.write8(0x20, 0x20);
        assert!(pic.output());
        pic.set_irq(10, false);
        assert!(!pic.output());
    }

    #[test]
    fn edge_line_held_high_interrupts_once() {
        let (_, mut pic) = pic();
        pic.set_irq(3, true);
        assert_eq!(pic.ack(), 0x33);
        pic.write8(0x20, 0x20);
        pic.set_irq(3, true);
        assert!(!pic.output());
        pic.set_irq(3, false);
        pic.set_irq(3, true);
        assert!(pic.output());
    }

    #[test]
    fn rotate_on_eoi_makes_line_lowest() {
        let (_, mut pic) = pic();
        pic.set_irq(1, true);
        pic.ack();
        pic.write8(0x20, 0xa0);
        pic.set_irq(1, false);
        pic.set_irq(1, true);
        pic.set_irq(5, true);
        assert_eq!(pic.ack(), 0x35, "line 2 is the highest now, line 1 the lowest");
    }

    #[test]
    fn special_mask_masked_in_service_lets_lower_through() {
        let (_, mut pic) = pic();
        pic.set_irq(1, true);
        pic.ack();
        pic.set_irq(6, true);
        assert!(!pic.output());
        pic.write8(0x21, 0x02);
        pic.write8(0x20, 0x68);
        assert_eq!(pic.ack(), 0x36);
    }

    #[test]
    fn auto_eoi_leaves_nothing_in_service() {
        let (_, mut pic) = pic();
        pic.write8(0x20, 0x11);
        for v in [0x30, 4, 3] {
            pic.write8(0x21, v);
        }
        pic.set_irq(1, true);
        assert_eq!(pic.ack(), 0x31);
        pic.write8(0x20, 0x0b);
        assert_eq!(pic.read8(0x20), 0);
    }

    #[test]
    fn poll_read_acknowledges() {
        let (_, mut pic) = pic();
        pic.set_irq(6, true);
        pic.write8(0x20, 0x0c);
        assert_eq!(pic.read8(0x20), 0x86);
        assert!(!pic.output());
        pic.write8(0x20, 0x0c);
        assert_eq!(pic.read8(0x20), 0);
    }

    #[test]
    fn special_nested_second_slave_interrupt_nests() {
        let (_, mut pic) = pic();
        pic.set_irq(12, true);
        pic.ack();
        pic.set_irq(8, true);
        assert!(!pic.output());
        pic.write8(0x20, 0x11);
        for v in [0x30, 4, 0x11] {
            pic.write8(0x21, v);
        }
        assert_eq!(pic.ack(), 0x38);
    }

    #[test]
    fn restore_saved_state_continues() {
        let (_, mut a) = pic();
        a.set_irq(14, true);
        let (_, mut b) = pic();
        b.restore(&a.save()).unwrap();
        assert_eq!(b.ack(), 0x3e);
        let mut blob = a.save();
        blob.data["master"]["top"] = 9.into();
        assert!(b.restore(&blob).is_err());
    }

    #[test]
    fn nonsense_writes_are_survived() {
        let (_, pic) = pic();
        let pic = Mutex::new(pic);
        hammer_ports(&Bench::new(), &pic, &[0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1], 20_000);
        (0..1000).for_each(|_| {
            lock(&pic).ack();
        });
    }
}
