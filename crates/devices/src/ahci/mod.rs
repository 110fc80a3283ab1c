//! An AHCI host bus adapter with SATA disks and CD-ROMs behind it, for guests that have no virtio drivers.
//!
//! Way of the data: a guest builds a command in memory and sets its bit in a port's command-issue register ([`registers`]) → the
//! port's thread takes it ([`port`]), reads its FIS, and executes it: a disk's command ([`ata`]) or a CD-ROM's packet ([`atapi`]),
//! whose data goes through the command's list of places ([`transfer`]) → a FIS with the outcome is put into guest memory and the
//! interrupt raised.
//!
//! A guest may say anything: places that are no memory, lists of any length, addresses that change meanwhile. All of that is read
//! piece by piece as it is used, nothing is sized by it, and what cannot be done is an error bit in a register.
//!
//! Locks: a port's state, then interrupts ([`Lines`]), then the router. A port's thread holds none of them while it uses guest
//! memory and the host's file.
//! - INV-AHCI-1: a port has at most one command under way (`busy`), and reports CR until it is done: who has waited for CR = 0
//!   finds no DMA any more. Reset, save and stop wait for the same.
//!
//! Source: Serial ATA AHCI 1.3.1 (cited as "AHCI"), ATA8-ACS, MMC-5, SPC-3.

mod ata;
mod atapi;
mod port;
mod registers;
#[cfg(test)]
mod tests;
mod transfer;

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use guestmem::GuestMemory;
use serde::{Deserialize, Serialize};

use crate::bus::lock;
use crate::pci::{BarKind, FunctionState, Intx, Msi, PciDevice, PciFunction, PciIdentity};
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};
use crate::virtio::block::Image;
use port::{Port, PortState};
use registers::{PORT_BYTES, PORTS_AT, global};

/// Most drives of a controller (AHCI 3.1.1).
pub const MAX_DRIVES: usize = 32;
/// The register block, ABAR.
const BAR: usize = 5;
const BAR_BYTES: u64 = 0x2000;
const NAME: &str = "ahci";
const STATE_VERSION: u32 = 1;

/// What is behind a port.
#[derive(Clone, Debug)]
pub struct Drive {
    /// The image, which may be used before and after by other drives.
    pub image: Arc<Image>,
    /// A CD-ROM with the image as its medium, instead of a disk.
    pub cdrom: bool,
    /// Serial number, cut off after 20 bytes.
    pub serial: String,
}

/// Interrupts of all ports: the global status register and what leads to the guest.
struct Lines {
    state: Mutex<LinesState>,
    intx: Arc<Intx>,
    msi: Arc<Msi>,
    sent: AtomicU32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct LinesState {
    /// GHC.IE.
    enabled: bool,
    /// IS: a bit for each port that has an enabled event.
    pending: u32,
    /// The ports whose events are enabled and there.
    asserting: u32,
}

impl Lines {
    /// A port's events changed: `asserting` says whether one that is enabled is there, `new` whether one has just come.
    fn port(&self, port: usize, asserting: bool, new: bool) {
        let mut state = lock(&self.state);
        let bit = 1 << port;
        state.asserting = state.asserting & !bit | if asserting { bit } else { 0 };
        state.pending |= state.asserting & bit;
        self.settle(&state, asserting && new);
    }

    /// A guest writes IS: ones clear, but not what still asserts (AHCI 3.1.3).
    fn clear(&self, bits: u32) {
        let mut state = lock(&self.state);
        state.pending = state.pending & !bits | state.asserting;
        self.settle(&state, false);
    }

    fn enable(&self, on: bool) {
        let mut state = lock(&self.state);
        let rises = on && !state.enabled && state.pending != 0;
        state.enabled = on;
        self.settle(&state, rises);
    }

    fn settle(&self, state: &LinesState, new: bool) {
        let level = state.enabled && state.pending != 0;
        self.intx.set(level);
        if level && new {
            self.sent.fetch_add(1, Ordering::Relaxed);
            self.msi.fire(0);
        }
    }

    fn reset(&self) {
        let mut state = lock(&self.state);
        *state = LinesState::default();
        self.settle(&state, false);
    }
}

#[derive(Serialize, Deserialize)]
struct State {
    function: FunctionState,
    lines: LinesState,
    ports: Vec<PortState>,
}

/// The controller.
pub struct Ahci {
    function: PciFunction,
    lines: Arc<Lines>,
    ports: Vec<Port>,
}

impl Ahci {
    /// A controller with `drives`, in the order of its ports. With `synchronous` commands complete within the register write.
    ///
    /// # Errors
    /// When no thread can be had.
    ///
    /// # Panics
    /// With more than [`MAX_DRIVES`].
    pub fn new(drives: &[Drive], memory: &Arc<GuestMemory>, synchronous: bool) -> io::Result<Self> {
        assert!(drives.len() <= MAX_DRIVES, "the caller counts");
        // 82801IB (ICH9) in AHCI mode, as QEMU has it: every driver knows it.
        let mut function = PciFunction::new(PciIdentity {
            vendor: 0x8086,
            device: 0x2922,
            class: 0x01_0601,
            revision: 2,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        function.set_interrupt_pin(1);
        function.add_bar(BAR, BarKind::Memory32, BAR_BYTES);
        let msi = function.add_msi(1);
        let intx = Arc::clone(function.intx());
        let lines = Arc::new(Lines { state: Mutex::default(), intx, msi, sent: AtomicU32::new(0) });
        let port = |(index, drive)| Port::new(index, drive, memory, &lines, synchronous);
        let ports = drives.iter().enumerate().map(port).collect::<io::Result<_>>()?;
        Ok(Self { function, lines, ports })
    }

    /// Ends commands under way and makes what was written durable.
    pub fn shutdown(&mut self) {
        for port in &mut self.ports {
            port.stop();
        }
    }

    /// Names and values for the statistics.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let sum = |index: usize| self.ports.iter().map(|port| port.counters()[index]).sum();
        vec![
            ("commands", sum(0)),
            ("bytes_read", sum(1)),
            ("bytes_written", sum(2)),
            ("failures", sum(3)),
            ("interrupts", self.lines.sent.load(Ordering::Relaxed).into()),
        ]
    }

    fn global_read(&self, register: u64) -> u32 {
        let lines = *lock(&self.lines.state);
        let last = u32::try_from(self.ports.len().max(1) - 1).unwrap_or(0);
        match register {
            global::CAP => global::CAPABILITIES | last,
            global::GHC => global::GHC_AE | if lines.enabled { global::GHC_IE } else { 0 },
            global::IS => lines.pending,
            global::PI => u32::try_from((1u64 << self.ports.len()) - 1).unwrap_or(u32::MAX),
            global::VS => global::VERSION,
            _ => 0,
        }
    }

    fn global_write(&mut self, register: u64, value: u32) {
        match register {
            global::GHC if value & global::GHC_HR != 0 => self.reset_registers(),
            global::GHC => self.lines.enable(value & global::GHC_IE != 0),
            global::IS => self.lines.clear(value),
            _ => {}
        }
    }

    /// What GHC.HR and a bus reset do (AHCI 10.4.3); done when it returns.
    fn reset_registers(&mut self) {
        self.ports.iter().for_each(Port::reset);
        self.lines.reset();
    }

    fn port_at(&self, offset: u64) -> Option<(&Port, u64)> {
        let at = offset.checked_sub(PORTS_AT)?;
        let port = self.ports.get(usize::try_from(at / PORT_BYTES).ok()?)?;
        Some((port, at % PORT_BYTES))
    }

    fn read32(&self, offset: u64) -> u32 {
        match self.port_at(offset) {
            Some((port, register)) => port.read(register),
            None => self.global_read(offset),
        }
    }
}

impl PciDevice for Ahci {
    fn function(&self) -> &PciFunction {
        &self.function
    }

    fn function_mut(&mut self) -> &mut PciFunction {
        &mut self.function
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.function.config_write(offset, data);
        let master = self.function.bus_master();
        self.ports.iter().for_each(|port| port.set_bus_master(master));
    }

    fn config_restored(&mut self) {
        let master = self.function.bus_master();
        self.ports.iter().for_each(|port| port.set_bus_master(master));
    }

    fn reset(&mut self) {
        self.reset_registers();
        self.function.reset();
        self.ports.iter().for_each(|port| port.set_bus_master(false));
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar != BAR {
            return;
        }
        for (at, byte) in (offset..).zip(data) {
            let word = self.read32(at & !3).to_le_bytes();
            *byte = word[usize::try_from(at & 3).unwrap_or(0)];
        }
    }

    /// Registers are written by dwords (AHCI 3: "software should access them by their size"); other widths are ignored, but for
    /// whole quadwords, which are two.
    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        if bar != BAR || !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return;
        }
        for (at, word) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            match self.port_at(at) {
                Some((port, register)) => port.write(register, value),
                None => self.global_write(at, value),
            }
        }
    }
}

impl Snapshot for Ahci {
    fn save(&self) -> StateBlob {
        // The ports first: what they finish now changes the interrupts.
        let ports = self.ports.iter().map(Port::save).collect();
        let state = State { function: self.function.save(), lines: *lock(&self.lines.state), ports };
        to_blob(NAME, STATE_VERSION, &state)
    }

    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        let state: State = from_blob(NAME, STATE_VERSION, blob)?;
        let unfit = |why: String| RestoreError::Unfit { name: NAME.to_owned(), why };
        if state.ports.len() != self.ports.len() {
            return Err(unfit(format!(
                "{} drives, this controller has {}",
                state.ports.len(),
                self.ports.len()
            )));
        }
        for (port, saved) in self.ports.iter().zip(&state.ports) {
            port.fits(saved).map_err(unfit)?;
        }
        self.function.restore(&state.function).map_err(unfit)?;
        let master = self.function.bus_master();
        *lock(&self.lines.state) = state.lines;
        for (port, saved) in self.ports.iter().zip(state.ports) {
            port.set_bus_master(master);
            port.restore(saved);
        }
        Ok(())
    }
}

impl Drop for Ahci {
    fn drop(&mut self) {
        self.shutdown();
    }
}
