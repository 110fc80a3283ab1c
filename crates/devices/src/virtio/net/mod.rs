//! The network device (virtio 1.2 section 5.1), one pair of queues, on a [`hostnet::Backend`] of the host.
//!
//! Way of the data: the driver notifies → the vCPU wakes the device's thread and goes on → [`Worker`] takes frames out of the
//! transmit queue and gives them to the backend; what the backend has for the guest it puts into the receive queue. While
//! the thread is awake the driver is asked not to notify, and one interrupt tells of all that a round moved.
//!
//! No control queue: receive modes cannot be set, so every frame is passed to the driver, which filters as the specification
//! allows (5.1.6.5.1). Frames in flight are lost when a machine is saved and restored, and so are the backend's connections.

mod transfer;

use std::io;
use std::sync::Arc;

use hostnet::Offloads;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Activation, ActiveQueue, DeviceKind, DeviceState, VirtioDevice, feature, read_config};
use crate::bus::lock;
use crate::net::worker::Worker;
use crate::net::{CardOptions, Doorbell};
pub use crate::net::{Mac, Plug};
use crate::snapshot::RestoreError;
use transfer::Transfer;

const QUEUE_SIZES: [u16; 2] = [1024, 1024];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Feature bits (5.1.3).
mod bit {
    pub const CSUM: u64 = 1;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const MAC: u64 = 1 << 5;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const GUEST_TSO6: u64 = 1 << 8;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const HOST_TSO6: u64 = 1 << 12;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
}

/// `VIRTIO_NET_S_LINK_UP` (5.1.4).
const LINK_UP: u16 = 1;

#[derive(Serialize, Deserialize)]
struct State {
    mac: Mac,
    features: u64,
}

/// A virtio network card.
pub struct Net {
    name: String,
    mac: Mac,
    offloads: Offloads,
    features: u64,
    options: CardOptions,
    transfer: Arc<Transfer>,
    worker: Worker,
}

impl Net {
    /// A card named `name` with the address `mac`.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn new(name: &str, mac: Mac, plug: &Plug, options: CardOptions) -> io::Result<Self> {
        let offloads = if options.offload { lock(plug).offloads() } else { Offloads::default() };
        let transfer = Arc::new(Transfer::new(options));
        let worker = Worker::start(name, Arc::clone(&transfer) as _, plug)?;
        Ok(Self { name: name.to_owned(), mac, offloads, features: 0, options, transfer, worker })
    }

    /// What the driver lets us leave to it.
    fn accepts(features: u64) -> Offloads {
        let checksum = features & bit::GUEST_CSUM != 0;
        Offloads {
            checksum,
            // 5.1.3.1: each requires GUEST_CSUM.
            tso4: checksum && features & bit::GUEST_TSO4 != 0,
            tso6: checksum && features & bit::GUEST_TSO6 != 0,
        }
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 1, transitional_id: 0x1000, class: 0x02_0000 }
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        let only = |offered: bool, bits: u64| if offered { bits } else { 0 };
        bit::MAC
            | bit::MRG_RXBUF
            | bit::STATUS
            | only(self.offloads.checksum, bit::CSUM | bit::GUEST_CSUM)
            | only(self.offloads.tso4, bit::HOST_TSO4 | bit::GUEST_TSO4)
            | only(self.offloads.tso6, bit::HOST_TSO6 | bit::GUEST_TSO6)
    }

    /// With the event index a driver rings only when it is asked to, whatever the card may want.
    fn withheld(&self) -> u64 {
        if self.options.combine { 0 } else { feature::EVENT_IDX }
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_net_config` (5.1.4): the address and the link's status.
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        config[..6].copy_from_slice(&self.mac);
        let status = if self.transfer.is_up() { LINK_UP } else { 0 };
        config[6..].copy_from_slice(&status.to_le_bytes());
        read_config(&config, offset, data);
    }

    /// Drivers from before virtio 1.0 may set the address; where it is the driver's (5.1.4.1 forbids it to newer ones).
    fn config_write(&mut self, offset: u64, data: &[u8]) {
        if self.features & feature::VERSION_1 != 0 {
            return;
        }
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(self.mac.len());
        for (to, byte) in self.mac[from..].iter_mut().zip(data) {
            *to = *byte;
        }
    }

    fn activate(&mut self, activation: Activation) {
        self.features = activation.features;
        let mut queues = activation.queues.into_iter();
        let [receive, transmit]: [Option<ActiveQueue>; 2] = std::array::from_fn(|_| queues.next().flatten());
        let merges = self.features & bit::MRG_RXBUF != 0;
        let long_header = merges || self.features & feature::VERSION_1 != 0;
        self.transfer.begin(transfer::Driver {
            receive,
            transmit,
            merges,
            header_len: if long_header { 12 } else { 10 },
            accepts: Self::accepts(self.features),
            interrupt: activation.interrupt,
        });
        self.worker.wake();
    }

    fn reset(&mut self) {
        self.transfer.end();
        self.features = 0;
    }

    fn notify(&mut self, queue: u16) {
        match (queue, self.options.doorbell) {
            (TRANSMIT, Doorbell::Vcpu) => self.worker.serve(),
            (RECEIVE | TRANSMIT, _) => self.worker.wake(),
            _ => {}
        }
    }

    fn save(&self) -> DeviceState {
        let state = State { mac: self.mac, features: self.features };
        let data = serde_json::to_value(state).expect("plain data serialises");
        DeviceState { queues: self.transfer.positions().to_vec(), data }
    }

    fn restore(&mut self, data: &Value) -> Result<(), RestoreError> {
        let state = State::deserialize(data)
            .map_err(|source| RestoreError::Damaged { name: self.name.clone(), source })?;
        self.reset();
        self.mac = state.mac;
        self.features = state.features;
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.transfer.counters()
    }

    fn shutdown(&mut self) {
        self.worker.stop();
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        self.shutdown();
    }
}
