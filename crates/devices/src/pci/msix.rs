//! MSI-X: a table of messages in a BAR, with masks and pending bits (PCI 3.0 6.8.2).
//!
//! Invariant INV-MSIX-1: a message leaves only while MSI-X is enabled, the function is bus master and neither the function
//! nor the vector is masked; an event meanwhile sets the pending bit, and clearing the last mask sends it once.

use std::sync::{Arc, Mutex, OnceLock};

use crate::bus::lock;
use crate::irq::IrqSink;

/// Bytes of a table entry: address low, address high, data, vector control.
const ENTRY_BYTES: usize = 16;
const VECTOR_MASKED: u32 = 1;

/// What the configuration space says about the whole function.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Control {
    pub enabled: bool,
    pub masked: bool,
    pub bus_master: bool,
}

struct State {
    /// Raw dwords of every entry.
    table: Vec<[u32; 4]>,
    pending: Vec<bool>,
    control: Control,
}

/// The MSI-X structures of a function.
pub struct Msix {
    state: Mutex<State>,
    sink: OnceLock<Arc<dyn IrqSink>>,
}

/// One vector, as a device holds it. May be fired from any thread.
#[derive(Clone)]
pub struct MsixVector {
    msix: Arc<Msix>,
    index: u16,
}

impl MsixVector {
    /// Signals the vector: sends its message, or notes it as pending while masked. Lost when MSI-X is off.
    pub fn fire(&self) {
        self.msix.fire(self.index);
    }
}

impl Msix {
    pub(super) fn new(vectors: u16) -> Self {
        let count = usize::from(vectors);
        Self {
            state: Mutex::new(State {
                table: vec![[0, 0, 0, VECTOR_MASKED]; count],
                pending: vec![false; count],
                control: Control::default(),
            }),
            sink: OnceLock::new(),
        }
    }

    /// Number of vectors.
    pub fn len(&self) -> usize {
        lock(&self.state).table.len()
    }

    /// Whether there are no vectors (never so for a capability that exists).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether the guest switched MSI-X on: then INTx is not used.
    pub fn enabled(&self) -> bool {
        lock(&self.state).control.enabled
    }

    /// Vector `index`. One beyond the table never sends anything.
    pub fn vector(self: &Arc<Self>, index: u16) -> MsixVector {
        MsixVector { msix: Arc::clone(self), index }
    }

    /// See [`MsixVector::fire`].
    pub fn fire(&self, index: u16) {
        let message = {
            let mut state = lock(&self.state);
            state.fire(usize::from(index))
        };
        self.send(message);
    }

    pub(super) fn connect(&self, sink: Arc<dyn IrqSink>) {
        let _ = self.sink.set(sink);
    }

    pub(super) fn set_control(&self, control: Control) {
        let messages = {
            let mut state = lock(&self.state);
            if state.control == control {
                return;
            }
            state.control = control;
            state.flush()
        };
        messages.into_iter().for_each(|m| self.send(Some(m)));
    }

    fn send(&self, message: Option<(u64, u32)>) {
        if let (Some((address, data)), Some(sink)) = (message, self.sink.get()) {
            sink.msi(address, data);
        }
    }

    /// Reads table bytes. Aligned dwords and quadwords are what the specification allows; other sizes read their bytes.
    pub(super) fn table_read(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        for (at, byte) in (offset..).zip(data) {
            *byte = state.table_byte(at).unwrap_or(0);
        }
    }

    /// Writes table bytes, and sends what becomes unmasked.
    pub(super) fn table_write(&self, offset: u64, data: &[u8]) {
        let messages = {
            let mut state = lock(&self.state);
            for (at, &byte) in (offset..).zip(data) {
                state.set_table_byte(at, byte);
            }
            state.flush()
        };
        messages.into_iter().for_each(|m| self.send(Some(m)));
    }

    /// Reads pending bits; writes to them are ignored (PCI 3.0 6.8.2.10).
    pub(super) fn pba_read(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        for (at, byte) in (offset..).zip(data) {
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            *byte = (0..8usize).fold(0, |bits, i| {
                bits | u8::from(state.pending.get(first.saturating_add(i)).copied().unwrap_or(false)) << i
            });
        }
    }

    pub(super) fn save(&self) -> (Vec<[u32; 4]>, Vec<bool>) {
        let state = lock(&self.state);
        (state.table.clone(), state.pending.clone())
    }

    /// Whether a saved state has the right shape.
    pub(super) fn fits(&self, table: &[[u32; 4]], pending: &[bool]) -> bool {
        let len = self.len();
        table.len() == len && pending.len() == len
    }

    /// Takes on a state that [`Msix::fits`]; the control bits follow from the configuration space.
    pub(super) fn restore(&self, table: &[[u32; 4]], pending: &[bool], control: Control) {
        let mut state = lock(&self.state);
        table.clone_into(&mut state.table);
        pending.clone_into(&mut state.pending);
        for entry in &mut state.table {
            entry[0] &= !3;
            entry[3] &= VECTOR_MASKED;
        }
        state.control = control;
    }
}

impl State {
    fn fire(&mut self, index: usize) -> Option<(u64, u32)> {
        let entry = *self.table.get(index)?;
        if !self.control.enabled || !self.control.bus_master {
            return None;
        }
        if self.control.masked || entry[3] & VECTOR_MASKED != 0 {
            self.pending[index] = true;
            return None;
        }
        self.pending[index] = false;
        Some((u64::from(entry[1]) << 32 | u64::from(entry[0]), entry[2]))
    }

    /// Messages of all pending vectors that nothing masks any more.
    fn flush(&mut self) -> Vec<(u64, u32)> {
        if !self.control.enabled || !self.control.bus_master || self.control.masked {
            return Vec::new();
        }
        (0..self.table.len())
            .filter(|&i| self.pending[i])
            .collect::<Vec<_>>()
            .into_iter()
            .filter_map(|i| self.fire(i))
            .collect()
    }

    fn locate(&self, at: u64) -> Option<(usize, usize, u32)> {
        let at = usize::try_from(at).ok()?;
        let entry = at / ENTRY_BYTES;
        let shift = u32::try_from(at % 4).ok()? * 8;
        (entry < self.table.len()).then_some((entry, at % ENTRY_BYTES / 4, shift))
    }

    fn table_byte(&self, at: u64) -> Option<u8> {
        let (entry, dword, shift) = self.locate(at)?;
        Some((self.table[entry][dword] >> shift & 0xff).to_le_bytes()[0])
    }

    fn set_table_byte(&mut self, at: u64, byte: u8) {
        let Some((entry, dword, shift)) = self.locate(at) else { return };
        // Address bits 1:0 must read as zero and only the mask bit of vector control exists (PCI 3.0 6.8.2.7–9).
        let writable = match dword {
            0 => !3,
            3 => VECTOR_MASKED,
            _ => u32::MAX,
        } & 0xff << shift;
        let slot = &mut self.table[entry][dword];
        *slot = *slot & !writable | u32::from(byte) << shift & writable;
    }
}
