//! Interrupt wiring: lines, message-signalled interrupts and the signal into a vCPU.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// What an interrupt controller tells a vCPU. The receiver may be asleep in HLT: it is woken.
/// Called with device locks held, so it must not call back into a device.
pub trait CpuSignal: Send + Sync {
    /// The local APIC's (or, with the LAPIC in virtual-wire mode, the PIC's) output to the core changed:
    /// the vCPU must ask [`crate::chipset::lapic::Lapic`] again at its next instruction boundary.
    fn interrupt_pending(&self, pending: bool);
    /// A non-maskable interrupt.
    fn nmi(&self);
    /// INIT: the vCPU goes to wait-for-SIPI.
    fn init(&self);
    /// Start-up IPI with its vector (start address is `vector << 12`).
    fn sipi(&self, vector: u8);
}

/// The sink of wired interrupts: the board's ISA lines 0–15 and the IO-APIC's global lines 0–23.
pub trait IrqSink: Send + Sync {
    /// Sets the level of global system interrupt `gsi` (ISA line n is GSI n but for line 0, which is GSI 2).
    fn set_gsi(&self, gsi: u32, level: bool);
    /// Delivers a message-signalled interrupt (SDM 3A 11.11: address 0xFEEx_xxxx).
    fn msi(&self, address: u64, data: u32);
}

/// One wired interrupt line as a device holds it. Remembers the level, so that only changes travel: the device's lock is held while it is set.
#[derive(Clone)]
pub struct IrqLine {
    sink: Arc<dyn IrqSink>,
    gsi: u32,
    /// The level, or [`UNKNOWN`].
    level: Arc<AtomicU8>,
}

/// Nothing has travelled yet.
const UNKNOWN: u8 = 2;

impl IrqLine {
    /// The line `gsi` of `sink`.
    pub fn new(sink: Arc<dyn IrqSink>, gsi: u32) -> Self {
        Self { sink, gsi, level: Arc::new(AtomicU8::new(UNKNOWN)) }
    }

    /// Drives the line. Level-triggered devices hold it; edge-triggered ones call [`IrqLine::pulse`].
    pub fn set(&self, level: bool) {
        let new = u8::from(level);
        if self.level.load(Ordering::Relaxed) != new {
            self.level.store(new, Ordering::Relaxed);
            self.sink.set_gsi(self.gsi, level);
        }
    }

    /// Low, high, low: one edge.
    pub fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}
