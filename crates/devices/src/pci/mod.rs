//! PCI, bus 0: configuration space, functions, base address registers, INTx, MSI and MSI-X.
//!
//! Way of the data: a guest writes ports 0xcf8/0xcfc (or the ECAM window) → [`PciHost`] finds the function and
//! calls [`PciDevice::config_write`] → afterwards the host compares where the function's base address registers
//! want to be with what it put on the [`Bus`](crate::bus::Bus), and moves them. An access to a mapped register
//! goes Bus → window → MSI-X table, or [`PciDevice::bar_read`] / [`PciDevice::bar_write`].
//!
//! Locks, in order: host → function → (INTx, MSI, MSI-X state) → interrupt router. A device never calls the host
//! while it is locked, and [`MsixVector::fire`], [`MsiVector::fire`] and [`Intx::set`] may be called with the
//! device's lock held or from any other thread.
//!
//! How to build a device: make a [`PciFunction`] from a [`PciIdentity`], add BARs, capabilities and vectors, keep it
//! in your device, implement [`PciDevice`], and give `Arc<Mutex<Device>>` to [`PciHost::add`].
//!
//! Source: PCI Local Bus Specification 3.0 (cited as "PCI 3.0").

mod bridge;
mod function;
mod host;
mod intx;
mod msi;
mod msix;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};

pub use bridge::{HostBridge, ISA_BRIDGE, IsaBridge, PirqRoutes};
pub use function::{BarKind, FunctionState, PciFunction, PciIdentity};
pub use host::{Ecam, MMIO_HOLE, PciError, PciHost, PciPorts, RESERVED, gsi_of_intx, link_of_intx};
pub use intx::{Intx, IntxSink, NO_WIRE};
pub use msi::{Msi, MsiVector};
pub use msix::{Msix, MsixVector};

/// Where a function sits on bus 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, serde::Serialize, serde::Deserialize)]
pub struct Bdf {
    /// Device number, 0–31.
    pub device: u8,
    /// Function number, 0–7.
    pub function: u8,
}

/// A type-0 function as the bus sees it. Only [`PciDevice::function`] and [`PciDevice::function_mut`] must be given;
/// what is not overridden behaves like plain configuration space.
pub trait PciDevice: Send {
    /// The function's configuration space, BARs and interrupts.
    fn function(&self) -> &PciFunction;
    /// The same, to change.
    fn function_mut(&mut self) -> &mut PciFunction;

    /// A guest reads `data.len()` bytes (1, 2 or 4, never across a dword) of configuration space.
    /// Override to compute a field; begin with `self.function().config_read(offset, data)`.
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.function().config_read(offset, data);
    }

    /// A guest writes configuration space. Override to act on a field; begin with
    /// `self.function_mut().config_write(offset, data)`, which obeys the write masks.
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.function_mut().config_write(offset, data);
    }

    /// The configuration space was replaced by a snapshot's: act on it as after a write.
    fn config_restored(&mut self) {}

    /// The bus is reset. Override to reset the device too; begin with `self.function_mut().reset()`.
    fn reset(&mut self) {
        self.function_mut().reset();
    }

    /// A guest reads BAR `bar` at `offset`, at most 8 bytes. Never called for the MSI-X table and its pending bits.
    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        let _ = (bar, offset);
        data.fill(0xff);
    }

    /// A guest writes BAR `bar` at `offset`, at most 8 bytes. Never called for the MSI-X table and its pending bits.
    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        let _ = (bar, offset, data);
    }
}

/// A function as the host holds it.
pub type SharedPci = Arc<Mutex<dyn PciDevice>>;
