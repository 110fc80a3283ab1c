//! Virtio devices, version 1.2, on PCI.
//!
//! Way of the data: a guest's access to a BAR → [`pci::VirtioPci`] (registers, features, interrupts) →
//! [`VirtioDevice::notify`] → the device takes chains from its [`ActiveQueue`]s, works, gives them back and signals
//! through [`interrupt::Interrupt`].
//!
//! Threads and locks: the transport and the device behind it are locked by the vCPU that accesses them. A device that works
//! in another thread (the disk) or is fed from one (the console) shares its queues with it under a lock of its own,
//! taken after the transport's; interrupts may be raised from any thread and take no lock of the transport.
//!
//! Source: OASIS Virtual I/O Device (VIRTIO) Version 1.2 (cited as "virtio 1.2").

pub mod active;
pub mod balloon;
pub mod block;
pub mod chain;
pub mod channel;
pub mod console;
pub mod interrupt;
mod legacy;
pub mod net;
pub mod pci;
mod pool;
pub mod queue;
mod registers;
pub mod rng;
pub mod share;
#[cfg(test)]
mod tests;
pub mod vsock;

use std::sync::Arc;

use guestmem::GuestMemory;
use serde_json::Value;

use crate::snapshot::RestoreError;
pub use active::ActiveQueue;
pub use pci::{Flavor, VirtioPci};

/// Feature bits that every device shares (virtio 1.2 chapter 6).
pub mod feature {
    /// `VIRTIO_F_ANY_LAYOUT`: only for the legacy interface, where it had to be said.
    pub const ANY_LAYOUT: u64 = 1 << 27;
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VIRTIO_F_VERSION_1`.
    pub const VERSION_1: u64 = 1 << 32;
}

/// A kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceKind {
    /// Virtio device id (virtio 1.2 chapter 5).
    pub id: u16,
    /// PCI device id with the legacy interface (virtio 1.2 4.1.2).
    pub transitional_id: u16,
    /// PCI class code, `0xCCSSPP`.
    pub class: u32,
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Guest memory.
    pub memory: Arc<GuestMemory>,
    /// Its queues; `None` for one that the driver did not set up.
    pub queues: Vec<Option<ActiveQueue>>,
    /// What was negotiated, both device and common bits.
    pub features: u64,
    /// For configuration changes.
    pub interrupt: Arc<interrupt::Interrupt>,
}

/// A device's own state for a snapshot.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DeviceState {
    /// How far each queue has come, in order; `None` for one that is not active.
    pub queues: Vec<Option<queue::Position>>,
    /// Everything else.
    pub data: Value,
}

/// A virtio device, whatever the transport.
pub trait VirtioDevice: Send {
    /// What it is.
    fn kind(&self) -> DeviceKind;

    /// Stable name of this very device in snapshots and statistics, e.g. `virtio-blk.0`.
    fn name(&self) -> &str;

    /// Feature bits of this kind of device that it offers (the transport adds the common ones).
    fn features(&self) -> u64;

    /// Common feature bits that it does not want offered.
    fn withheld(&self) -> u64 {
        0
    }

    /// The largest size of each of its queues, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads its configuration structure; `data` is zero beforehand, and what lies beyond the structure stays so.
    fn config_read(&self, offset: u64, data: &mut [u8]);

    /// Writes its configuration structure.
    fn config_write(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The driver is ready. Called once between two resets. Work that is already available must be found.
    fn activate(&mut self, activation: Activation);

    /// Back to the beginning. On return nothing of the device touches guest memory or raises an interrupt.
    fn reset(&mut self);

    /// The driver notified `queue`, which may not exist or not be active.
    fn notify(&mut self, queue: u16);

    /// The state, after work in flight has come to rest: save devices before memory, with the vCPUs stopped.
    fn save(&self) -> DeviceState;

    /// Takes on `data` of a saved state; called on a device that is reset, before it is activated again.
    ///
    /// # Errors
    /// When it is damaged or does not fit; the device is unchanged then.
    fn restore(&mut self, data: &Value) -> Result<(), RestoreError>;

    /// Named counters with their values, for the statistics.
    fn counters(&self) -> Vec<(&'static str, u64)>;

    /// Finishes what is in flight, starts nothing more, and makes what was written durable. Idempotent.
    fn shutdown(&mut self) {}
}

/// Copies the part of a configuration structure that an access touches.
pub(crate) fn read_config(structure: &[u8], offset: u64, data: &mut [u8]) {
    let Some(from) = usize::try_from(offset).ok().and_then(|o| structure.get(o..)) else { return };
    let len = from.len().min(data.len());
    data[..len].copy_from_slice(&from[..len]);
}
