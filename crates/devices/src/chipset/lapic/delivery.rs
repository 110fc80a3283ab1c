//! Interrupt messages between IPIs, the IO-APIC, MSIs and the local APICs (SDM 3A 11.6, 11.11).

use std::sync::{Arc, OnceLock, Weak};

use super::{ApicModel, Lapic};
use crate::bus::lock;
use crate::clock::{Clock, TimerQueue};
use crate::irq::CpuSignal;

/// How a message acts on its destination (bits 10:8 of ICR, redirection entries and MSI data).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Delivery {
    /// The vector, to every destination.
    #[default]
    Fixed,
    /// The vector, to the destination of the lowest priority.
    Lowest,
    /// System-management interrupt: ignored.
    Smi,
    /// Nothing.
    Reserved,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up.
    Startup,
    /// The 8259 has the vector.
    ExtInt,
}

impl Delivery {
    /// From the low three bits.
    #[must_use]
    pub const fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::Lowest,
            2 => Self::Smi,
            3 => Self::Reserved,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            _ => Self::ExtInt,
        }
    }
}

/// How a destination is meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DestMode {
    /// An APIC id.
    #[default]
    Physical,
    /// A set of APICs by their logical ids.
    Logical,
}

/// An interrupt message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Msg {
    /// Destination: 8 bits, or 32 when `wide`; all ones is everyone.
    pub dest: u32,
    /// The destination is in x2APIC format.
    pub wide: bool,
    /// How `dest` is meant.
    pub dest_mode: DestMode,
    /// What it does.
    pub delivery: Delivery,
    /// Vector.
    pub vector: u8,
    /// Level bit: assert (1) or de-assert (0); matters for INIT only.
    pub assert: bool,
    /// Trigger mode: its EOI is broadcast to the IO-APIC.
    pub level_triggered: bool,
}

impl Msg {
    /// The message of an MSI write (SDM 3A 11.11.1–2); `None` when the address is not the APICs'.
    #[must_use]
    pub fn from_msi(address: u64, data: u32) -> Option<Self> {
        if address >> 20 != 0xfee {
            return None;
        }
        let [vector, ..] = data.to_le_bytes();
        let [_, a1, a2, ..] = address.to_le_bytes();
        let logical = address & 1 << 2 != 0;
        let mut delivery = Delivery::from_bits(data >> 8);
        // Redirection hint with a logical destination: one of them (SDM 3A 11.11.1).
        if address & 1 << 3 != 0 && logical && delivery == Delivery::Fixed {
            delivery = Delivery::Lowest;
        }
        Some(Self {
            dest: u32::from(a1 >> 4 | a2 << 4),
            wide: false,
            dest_mode: if logical { DestMode::Logical } else { DestMode::Physical },
            delivery,
            vector,
            assert: data & 1 << 14 != 0,
            level_triggered: data & 1 << 15 != 0,
        })
    }
}

/// Destination shorthand of the ICR (bits 19:18).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shorthand {
    None,
    Myself,
    All,
    Others,
}

/// Who hears the end of level-triggered interrupts: the IO-APIC. Called without APIC locks.
pub trait EoiSink: Send + Sync {
    /// A local APIC ended the level-triggered interrupt `vector`.
    fn eoi(&self, vector: u8);
}

/// All local APICs of the machine and the bus between them. APIC ids are vCPU numbers.
pub struct Apics {
    lapics: Vec<Arc<Lapic>>,
    eoi_sink: OnceLock<Weak<dyn EoiSink>>,
}

impl Apics {
    /// One APIC for each vCPU's signal.
    pub fn new(
        model: ApicModel,
        clock: &Arc<dyn Clock>,
        timers: &Arc<TimerQueue>,
        signals: Vec<Arc<dyn CpuSignal>>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            lapics: (0u32..)
                .zip(signals)
                .map(|(id, signal)| Lapic::new(id, model, Arc::clone(clock), timers, signal, Weak::clone(me)))
                .collect(),
            eoi_sink: OnceLock::new(),
        })
    }

    /// Tells who hears EOIs. Once, when the machine is assembled.
    pub fn set_eoi_sink(&self, sink: Weak<dyn EoiSink>) {
        let _ = self.eoi_sink.set(sink);
    }

    /// All APICs, by vCPU number.
    pub fn lapics(&self) -> &[Arc<Lapic>] {
        &self.lapics
    }

    /// One vCPU's APIC.
    pub fn lapic(&self, vcpu: usize) -> Option<&Arc<Lapic>> {
        self.lapics.get(vcpu)
    }

    /// Delivers a message. Says whether an APIC took it.
    pub fn deliver(&self, msg: &Msg) -> bool {
        let matching = self.lapics.iter().filter(|l| lock(&l.inner).regs.matches(msg));
        if msg.delivery == Delivery::Lowest {
            // Equal priorities: the lowest id.
            let best = matching.filter_map(|l| Some((lock(&l.inner).regs.arbitration()?, l)));
            return best.min_by_key(|&(priority, l)| (priority, l.id)).is_some_and(|(_, l)| l.accept(msg));
        }
        matching.fold(false, |taken, l| l.accept(msg) | taken)
    }

    /// Whether a destination of `msg` has not taken the vector of an earlier one yet, so that another would merge with it.
    pub fn is_pending(&self, msg: &Msg) -> bool {
        let fixed = matches!(msg.delivery, Delivery::Fixed | Delivery::Lowest);
        fixed
            && self.lapics.iter().any(|l| {
                let inner = lock(&l.inner);
                inner.regs.matches(msg) && inner.regs.requested(msg.vector)
            })
    }

    /// Delivers a message-signalled interrupt. A write to another address is not for the APICs and is dropped.
    pub fn msi(&self, address: u64, data: u32) {
        match Msg::from_msi(address, data) {
            Some(msg) => {
                self.deliver(&msg);
            }
            None => tracing::debug!("MSI to {address:#x} is not for the APICs"),
        }
    }

    pub(super) fn send_ipi(&self, from: &Lapic, (shorthand, msg): (Shorthand, Msg)) {
        // INIT and start-up to oneself are not valid (SDM 3A table 11-3).
        let to_self = !matches!(msg.delivery, Delivery::Init | Delivery::Startup);
        match shorthand {
            Shorthand::None => {
                self.deliver(&msg);
            }
            Shorthand::Myself if to_self => {
                from.accept(&msg);
            }
            Shorthand::Myself => {}
            Shorthand::All | Shorthand::Others => {
                let include = shorthand == Shorthand::All && to_self;
                self.lapics
                    .iter()
                    .filter(|l| include || l.id != from.id)
                    .filter(|l| lock(&l.inner).regs.matches(&Msg { dest: u32::MAX, wide: true, ..msg }))
                    .for_each(|l| {
                        l.accept(&msg);
                    });
            }
        }
    }

    pub(super) fn broadcast_eoi(&self, vector: u8) {
        if let Some(sink) = self.eoi_sink.get().and_then(Weak::upgrade) {
            sink.eoi(vector);
        }
    }

    /// Drives the LINT pin of every APIC: pin 0 is the 8259's output, pin 1 NMI.
    pub fn set_lint(&self, pin: usize, level: bool) {
        self.lapics.iter().for_each(|l| l.set_lint(pin, level));
    }

    /// Hard reset of all APICs.
    pub fn reset(&self) {
        self.lapics.iter().for_each(|l| l.reset());
    }
}
