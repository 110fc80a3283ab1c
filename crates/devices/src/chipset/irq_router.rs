//! The board's interrupt wiring: which line goes to which controllers.
//!
//! | line | 8259 | IO-APIC |
//! |---|---|---|
//! | GSI n, n in 1, 3–15 | IRQ n | pin n |
//! | GSI 2 (ISA line 0, the PIT) | IRQ 0 | pin 2 |
//! | 8259 output | – | pin 0, and LINT0 of every local APIC |
//! | GSI 16–23 | – | pin 16–23 |
//! | PCI link 0–7 | the IRQ that PIRQ (link & 3) is routed to | pin 16 + link, and the pin of that IRQ |
//!
//! Invariant INV-IRQ-1: a shared line is high exactly while a device or a PCI link that drives it is: links count the
//! functions that pull them (each reports only changes, INV-INTX-1).
//!
//! Locks: router → 8259 → IO-APIC → local APIC. [`PicWire`] stands apart from the router because the 8259 calls it while
//! it is locked.
//!
//! Restoring: first the devices and [`PciHost`](crate::pci::PciHost) (whose functions pull their links again), then the
//! router, the 8259, the IO-APIC and last the local APICs, so that each one's saved state has the last word.
//!
//! Assembly: [`Apics`], [`IoApic`], [`PicWire`], [`Pic`] with that wire, [`IrqRouter`].

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::LineState;
use super::ioapic::{IoApic, PINS};
use super::lapic::{Ack, Apics};
use super::pic::{Pic, PicOutput};
use crate::bus::lock;
use crate::irq::IrqSink;
use crate::pci::{IntxSink, PirqRoutes};
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};

const NAME: &str = "irq-router";
const VERSION: u32 = 1;
/// PCI interrupt links.
const LINKS: usize = 8;

/// The pair of 8259s as the board sees them.
pub trait Intr8259: Send + Sync {
    /// Drives input `irq` (0–15).
    fn set_irq(&self, irq: u8, level: bool);
    /// Interrupt acknowledge: the vector (that of IRQ 7 when nothing is pending any more).
    fn inta(&self) -> u8;
    /// The level of the output to the processor.
    fn output(&self) -> bool;
    /// What would become of an edge on input `irq` now.
    fn line_state(&self, irq: u8) -> LineState;
}

impl Intr8259 for Mutex<Pic> {
    fn set_irq(&self, irq: u8, level: bool) {
        lock(self).set_irq(irq, level);
    }
    fn inta(&self) -> u8 {
        lock(self).ack()
    }
    fn output(&self) -> bool {
        lock(self).output()
    }
    fn line_state(&self, irq: u8) -> LineState {
        lock(self).line_state(irq)
    }
}

/// The 8259's output pin: to LINT0 of every local APIC and to IO-APIC pin 0.
pub struct PicWire {
    ioapic: Arc<IoApic>,
    apics: Arc<Apics>,
}

impl PicWire {
    /// A wire to these controllers.
    #[must_use]
    pub const fn new(ioapic: Arc<IoApic>, apics: Arc<Apics>) -> Self {
        Self { ioapic, apics }
    }
}

impl PicOutput for PicWire {
    fn intr(&self, level: bool) {
        self.ioapic.set_line(0, level);
        self.apics.set_lint(0, level);
    }
}

#[derive(Default)]
struct Lines {
    /// What the device on each GSI drives.
    device: [bool; PINS],
    /// Functions that pull each PCI link.
    pulls: [u32; LINKS],
    /// ISA interrupt of PIRQ A–D.
    routes: [Option<u8>; 4],
}

#[derive(Serialize, Deserialize)]
struct Saved {
    device: [bool; PINS],
}

/// The wiring between devices and interrupt controllers.
pub struct IrqRouter {
    pic: Arc<dyn Intr8259>,
    ioapic: Arc<IoApic>,
    apics: Arc<Apics>,
    lines: Mutex<Lines>,
}

impl IrqRouter {
    /// Wires the controllers up; `pic` (usually the shared [`Pic`]) has a [`PicWire`] on its output.
    pub fn new(pic: Arc<dyn Intr8259>, ioapic: Arc<IoApic>, apics: Arc<Apics>) -> Arc<Self> {
        Arc::new(Self { pic, ioapic, apics, lines: Mutex::new(Lines::default()) })
    }

    /// The local APICs.
    pub const fn apics(&self) -> &Arc<Apics> {
        &self.apics
    }

    /// The vector that `vcpu` is about to enter, from its local APIC or the 8259. `None` when the interrupt has gone.
    pub fn ack(&self, vcpu: usize) -> Option<u8> {
        match self.apics.lapic(vcpu)?.ack()? {
            Ack::Vector(vector) => Some(vector),
            Ack::ExtInt => {
                let vector = self.pic.inta();
                // An IO-APIC pin in ExtINT mode knows only edges: the 8259's next interrupt is a new one.
                if self.pic.output() {
                    self.ioapic.set_line(0, false);
                    self.ioapic.set_line(0, true);
                }
                Some(vector)
            }
        }
    }

    /// What would become of an edge on ISA line `gsi` now, at the controller that would take it: for timers that owe ticks
    /// ([`LineProbe`](super::LineProbe)). Takes no router lock, so any device may ask while it is locked.
    pub fn line_state(&self, gsi: u32) -> LineState {
        let pin = usize::try_from(gsi).unwrap_or(PINS);
        let irq = isa_irq(pin).and_then(|irq| u8::try_from(irq).ok());
        let pic = irq.map_or(LineState::Masked, |irq| self.pic.line_state(irq));
        match (pic, self.ioapic.line_state(pin)) {
            (LineState::Free, _) | (_, LineState::Free) => LineState::Free,
            (LineState::Pending, _) | (_, LineState::Pending) => LineState::Pending,
            _ => LineState::Masked,
        }
    }

    /// Brings everything that GSI `gsi` (1–15) drives to its level.
    fn settle_isa(&self, lines: &Lines, gsi: usize) {
        let Some(irq) = isa_irq(gsi).and_then(|irq| u8::try_from(irq).ok()) else { return };
        let level = lines.device[gsi] || lines.pci_pulls(irq);
        self.pic.set_irq(irq, level);
        self.ioapic.set_line(gsi, level);
    }

    fn settle_link(&self, lines: &Lines, link: usize) {
        let pin = 16 + link;
        self.ioapic.set_line(pin, lines.device[pin] || lines.pulls[link] > 0);
    }

    /// The state now: levels of the devices' lines. PCI functions pull their links again when they are restored.
    pub fn save_state(&self) -> StateBlob {
        to_blob(NAME, VERSION, &Saved { device: lock(&self.lines).device })
    }

    /// Takes on a saved state. Restore the controllers afterwards: their states say what has been seen of it.
    ///
    /// # Errors
    /// When the blob does not fit; nothing changed then.
    pub fn restore_state(&self, blob: &StateBlob) -> Result<(), RestoreError> {
        let saved: Saved = from_blob(NAME, VERSION, blob)?;
        lock(&self.lines).device = saved.device;
        Ok(())
    }
}

/// The 8259 input that an ISA GSI drives.
const fn isa_irq(gsi: usize) -> Option<usize> {
    match gsi {
        2 => Some(0),
        1 | 3..=15 => Some(gsi),
        _ => None,
    }
}

impl Lines {
    /// Whether a PCI link that is routed to ISA interrupt `irq` is pulled.
    fn pci_pulls(&self, irq: u8) -> bool {
        (0..LINKS).any(|link| self.pulls[link] > 0 && self.routes[link & 3] == Some(irq))
    }
}

impl IrqSink for IrqRouter {
    fn set_gsi(&self, gsi: u32, level: bool) {
        let Ok(gsi) = usize::try_from(gsi) else { return };
        let mut lines = lock(&self.lines);
        let Some(line) = lines.device.get_mut(gsi) else { return };
        *line = level;
        match gsi {
            16.. => self.settle_link(&lines, gsi - 16),
            _ => self.settle_isa(&lines, gsi),
        }
    }

    fn msi(&self, address: u64, data: u32) {
        self.apics.msi(address, data);
    }
}

impl IntxSink for IrqRouter {
    fn pull(&self, link: u8, asserted: bool) {
        let link = usize::from(link) % LINKS;
        let mut lines = lock(&self.lines);
        let count = &mut lines.pulls[link];
        *count = if asserted { count.saturating_add(1) } else { count.saturating_sub(1) };
        self.settle_link(&lines, link);
        if let Some(irq) = lines.routes[link & 3] {
            self.settle_isa(&lines, usize::from(irq));
        }
    }
}

impl PirqRoutes for IrqRouter {
    fn route(&self, pirq: u8, irq: Option<u8>) {
        let mut lines = lock(&self.lines);
        let Some(route) = lines.routes.get_mut(usize::from(pirq)) else { return };
        let old = std::mem::replace(route, irq.filter(|i| (3..16).contains(i)));
        for irq in [old, *route].into_iter().flatten() {
            self.settle_isa(&lines, usize::from(irq));
        }
    }
}

impl Snapshot for Arc<IrqRouter> {
    fn save(&self) -> StateBlob {
        self.save_state()
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.restore_state(blob)
    }
}

#[cfg(test)]
#[path = "irq_router_tests.rs"]
mod tests;
