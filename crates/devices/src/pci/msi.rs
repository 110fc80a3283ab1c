//! MSI: up to 32 messages from configuration space, 64-bit and maskable (PCI 3.0 6.8.1).

use std::sync::{Arc, Mutex, OnceLock};

use crate::bus::lock;
use crate::irq::IrqSink;

/// What the capability in configuration space says.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Control {
    pub enabled: bool,
    pub bus_master: bool,
    pub address: u64,
    pub data: u16,
    /// Vectors enabled, 1–32 (a power of two).
    pub vectors: u8,
    pub mask: u32,
}

#[derive(Default)]
struct State {
    control: Control,
    pending: u32,
}

/// The MSI capability of a function.
#[derive(Default)]
pub struct Msi {
    state: Mutex<State>,
    sink: OnceLock<Arc<dyn IrqSink>>,
}

/// One MSI message, as a device holds it. May be fired from any thread.
#[derive(Clone)]
pub struct MsiVector {
    msi: Arc<Msi>,
    index: u8,
}

impl MsiVector {
    /// Signals the vector: sends its message, or notes it as pending while masked. Lost when MSI is off.
    pub fn fire(&self) {
        self.msi.fire(self.index);
    }
}

impl Msi {
    /// Whether the guest switched MSI on: then INTx is not used.
    pub fn enabled(&self) -> bool {
        lock(&self.state).control.enabled
    }

    /// Vector `index`; when the guest enabled fewer vectors, the excess ones share the last.
    pub fn vector(self: &Arc<Self>, index: u8) -> MsiVector {
        MsiVector { msi: Arc::clone(self), index }
    }

    /// See [`MsiVector::fire`].
    pub fn fire(&self, index: u8) {
        let message = lock(&self.state).fire(index);
        self.send(message);
    }

    pub(super) fn connect(&self, sink: Arc<dyn IrqSink>) {
        let _ = self.sink.set(sink);
    }

    pub(super) fn set_control(&self, control: Control) {
        let messages: Vec<_> = {
            let mut state = lock(&self.state);
            if state.control == control {
                return;
            }
            state.control = control;
            let ready = state.pending & !control.mask;
            (0..32u8).filter(|i| ready >> i & 1 != 0).filter_map(|i| state.fire(i)).collect()
        };
        messages.into_iter().for_each(|m| self.send(Some(m)));
    }

    pub(super) fn pending(&self) -> u32 {
        lock(&self.state).pending
    }

    pub(super) fn restore(&self, pending: u32, control: Control) {
        *lock(&self.state) = State { control, pending };
    }

    fn send(&self, message: Option<(u64, u32)>) {
        if let (Some((address, data)), Some(sink)) = (message, self.sink.get()) {
            sink.msi(address, data);
        }
    }
}

impl State {
    fn fire(&mut self, index: u8) -> Option<(u64, u32)> {
        let c = self.control;
        if !c.enabled || !c.bus_master {
            return None;
        }
        let index = index.min(c.vectors.clamp(1, 32) - 1);
        let bit = 1u32 << index;
        if c.mask & bit != 0 {
            self.pending |= bit;
            return None;
        }
        self.pending &= !bit;
        // The low bits of the data are the function's to choose (PCI 3.0 6.8.1.6).
        let low = u16::from(c.vectors.clamp(1, 32) - 1);
        Some((c.address, u32::from(c.data & !low | u16::from(index))))
    }
}
