//! The I/O APIC (82093AA datasheet 290566-001, version 0x20 with the EOI register of later chips): 24 input lines, each with
//! a redirection entry that makes it a message to the local APICs.
//!
//! Lines are logical levels from the devices: polarity is stored and has no effect (every board line here is true when asserted).
//!
//! Invariant INV-IOAPIC-1: a level-triggered entry with remote IRR clear, not masked, whose line is high has been offered to
//! the local APICs after the last change of entry or line.
//!
//! Threading: one mutex, held while a message is delivered (order: IO-APIC → local APIC). Local APICs call
//! [`EoiSink::eoi`] without their lock.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use x86::addr::Gpa;

use super::LineState;
use super::lapic::{Apics, Delivery, DestMode, EoiSink, Msg};
use crate::bus::{MmioDevice, lock};
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};

/// Number of input lines.
pub const PINS: usize = 24;
/// Where the registers are.
pub const IOAPIC_BASE: Gpa = Gpa(0xfec0_0000);
/// Bytes the registers take.
pub const IOAPIC_LEN: u64 = 0x1000;

const NAME: &str = "ioapic";
const STATE_VERSION: u32 = 1;
const VERSION: u32 = 23 << 16 | 0x20;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Vector, modes, polarity, trigger, mask, destination; delivery status and remote IRR are read-only (82093AA 3.2.4).
const WRITABLE: u64 = 0xff00_0000_0001_afff;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct State {
    select: u8,
    id: u8,
    entries: [u64; PINS],
    lines: [bool; PINS],
}

impl Default for State {
    fn default() -> Self {
        Self { select: 0, id: 0, entries: [MASKED; PINS], lines: [false; PINS] }
    }
}

/// The I/O APIC. Shareable across threads.
pub struct IoApic {
    apics: Arc<Apics>,
    state: Mutex<State>,
}

fn message(entry: u64) -> Msg {
    let [vector, .., dest] = entry.to_le_bytes();
    let [low, high, ..] = entry.to_le_bytes();
    let mode = u32::from_le_bytes([low, high, 0, 0]);
    Msg {
        dest: u32::from(dest),
        wide: false,
        dest_mode: if entry & 1 << 11 != 0 { DestMode::Logical } else { DestMode::Physical },
        delivery: Delivery::from_bits(mode >> 8),
        vector,
        assert: true,
        level_triggered: is_level(entry),
    }
}

/// Only fixed and lowest-priority entries can be level-triggered: the rest are edges whatever bit 15 says (82093AA 3.2.4).
const fn is_level(entry: u64) -> bool {
    entry & LEVEL != 0 && entry >> 8 & 7 <= 1
}

impl IoApic {
    /// An IO-APIC that sends to `apics` and hears their EOIs.
    pub fn new(apics: Arc<Apics>) -> Arc<Self> {
        let ioapic = Arc::new(Self { apics, state: Mutex::new(State::default()) });
        let sink: Arc<dyn EoiSink> = Arc::<Self>::clone(&ioapic);
        ioapic.apics.set_eoi_sink(Arc::downgrade(&sink));
        ioapic
    }

    /// Drives input line `pin`.
    pub fn set_line(&self, pin: usize, level: bool) {
        let mut state = lock(&self.state);
        let Some(line) = state.lines.get_mut(pin) else { return };
        let rising = level && !*line;
        *line = level;
        if rising {
            self.offer(&mut state, pin);
        }
    }

    /// What would become of an edge on `pin` now.
    pub fn line_state(&self, pin: usize) -> LineState {
        let state = lock(&self.state);
        match state.entries.get(pin) {
            Some(&entry) if entry & MASKED == 0 => {
                let pending = entry & REMOTE_IRR != 0 || self.apics.is_pending(&message(entry));
                if pending { LineState::Pending } else { LineState::Free }
            }
            _ => LineState::Masked,
        }
    }

    /// Sends the message of a line that is high, unless it is masked (an edge is lost then) or in service.
    fn offer(&self, state: &mut State, pin: usize) {
        let entry = state.entries[pin];
        if entry & MASKED != 0 || entry & REMOTE_IRR != 0 {
            return;
        }
        let taken = self.apics.deliver(&message(entry));
        if taken && is_level(entry) {
            state.entries[pin] |= REMOTE_IRR;
        }
    }

    /// Ends the level-triggered interrupts of `vector`; a line that is still high interrupts again.
    pub fn end(&self, vector: u8) {
        let mut state = lock(&self.state);
        for pin in 0..PINS {
            let entry = state.entries[pin];
            if entry & REMOTE_IRR != 0 && entry.to_le_bytes()[0] == vector {
                state.entries[pin] &= !REMOTE_IRR;
                if state.lines[pin] {
                    self.offer(&mut state, pin);
                }
            }
        }
    }

    fn read_register(state: &State) -> u32 {
        match state.select {
            0 | 2 => u32::from(state.id) << 24,
            1 => VERSION,
            n => Self::entry_half(n).map_or(0, |(pin, high)| {
                let [a, b, c, d, e, f, g, h] = state.entries[pin].to_le_bytes();
                u32::from_le_bytes(if high { [e, f, g, h] } else { [a, b, c, d] })
            }),
        }
    }

    /// The entry, and whether its high half, that a register index means.
    fn entry_half(select: u8) -> Option<(usize, bool)> {
        let index = select.checked_sub(0x10)?;
        let pin = usize::from(index / 2);
        (pin < PINS).then_some((pin, index & 1 != 0))
    }

    fn write_register(&self, state: &mut State, value: u32) {
        if state.select == 0 {
            state.id = value.to_le_bytes()[3] & 0xf;
        }
        let Some((pin, high)) = Self::entry_half(state.select) else { return };
        let (shift, half) = if high { (32, 0xffff_ffff_u64 << 32) } else { (0, 0xffff_ffff) };
        let old = state.entries[pin];
        let writable = WRITABLE & half;
        let mut new = old & !writable | u64::from(value) << shift & writable;
        if !is_level(new) {
            new &= !REMOTE_IRR; // An edge-triggered entry has none; guests clear a stuck one by switching the mode.
        }
        state.entries[pin] = new;
        if is_level(new) && state.lines[pin] {
            self.offer(state, pin);
        }
    }

    /// Reads the register page.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        for (at, byte) in (offset..).zip(data) {
            let register = match at & 0xfc {
                0x00 => u32::from(state.select),
                0x10 => Self::read_register(&state),
                _ => 0,
            };
            *byte = (register >> (8 * (at & 3)) & 0xff).to_le_bytes()[0];
        }
    }

    /// Writes the register page. IOWIN takes whole dwords; IOREGSEL and EOI are one byte.
    pub fn mmio_write(&self, offset: u64, data: &[u8]) {
        let Some(&first) = data.first() else { return };
        match (offset & 0xff, data) {
            (0x00, _) => lock(&self.state).select = first,
            (0x10, &[a, b, c, d, ..]) => {
                self.write_register(&mut lock(&self.state), u32::from_le_bytes([a, b, c, d]));
            }
            (0x40, _) => self.end(first),
            _ => {}
        }
    }

    /// Reset: everything masked. Lines stay as the devices drive them.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        *state = State { lines: state.lines, ..State::default() };
    }

    /// The state now.
    pub fn save_state(&self) -> StateBlob {
        to_blob(NAME, STATE_VERSION, &*lock(&self.state))
    }

    /// Takes on a saved state. Nothing is delivered: what was, is in the local APICs' states.
    ///
    /// # Errors
    /// When the blob does not fit; nothing changed then.
    pub fn restore_state(&self, blob: &StateBlob) -> Result<(), RestoreError> {
        let mut saved: State = from_blob(NAME, STATE_VERSION, blob)?;
        saved.id &= 0xf;
        for entry in &mut saved.entries {
            *entry &= WRITABLE | REMOTE_IRR;
            if !is_level(*entry) {
                *entry &= !REMOTE_IRR;
            }
        }
        *lock(&self.state) = saved;
        Ok(())
    }
}

impl EoiSink for IoApic {
    fn eoi(&self, vector: u8) {
        self.end(vector);
    }
}

impl Snapshot for Arc<IoApic> {
    fn save(&self) -> StateBlob {
        self.save_state()
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.restore_state(blob)
    }
}

/// The IO-APIC's registers as the bus holds them: put at [`IOAPIC_BASE`].
pub struct IoApicMmio(pub Arc<IoApic>);

impl MmioDevice for IoApicMmio {
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.mmio_read(offset, data);
    }
    fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        self.0.mmio_write(offset, data);
    }
}

#[cfg(test)]
#[path = "ioapic_tests.rs"]
mod tests;
