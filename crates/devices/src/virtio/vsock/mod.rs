//! The socket device (virtio 1.2 section 5.10): programs of the guest and of the host talk through sockets, without a network.
//!
//! On the host's side stands a unix socket with the convention of Firecracker and Cloud Hypervisor ([`hub`] tells it). Way of
//! the data: the driver notifies → the vCPU wakes the device's thread and goes on → `worker` takes packets out of the
//! transmit queue, gives them to the hub, and puts what the hub has for the guest into the receive queue.
//!
//! Streams only. Connections do not survive a save and restore of the machine: the driver is told by an event that they are
//! gone (5.10.6.7).

mod connection;
mod hub;
mod packet;
mod worker;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Activation, DeviceKind, DeviceState, VirtioDevice, read_config};
use crate::snapshot::RestoreError;
use worker::{Transfer, Worker};

/// The smallest address of a guest; those below mean hypervisor, local, host (5.10.4).
pub const FIRST_CID: u32 = 3;
/// The largest: `VMADDR_CID_ANY` is none.
pub const LAST_CID: u32 = u32::MAX - 1;

const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;
/// `VIRTIO_VSOCK_F_STREAM`.
const F_STREAM: u64 = 1;

/// The socket of the host that programs connect to. Dropping it removes the file.
#[derive(Debug)]
pub struct Endpoint {
    listener: UnixListener,
    path: PathBuf,
}

impl Endpoint {
    /// An endpoint on a `listener` at `path`.
    ///
    /// # Errors
    /// When the listener cannot be told not to wait.
    pub fn new(listener: UnixListener, path: &Path) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path: path.to_owned() })
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        // Somebody may have been tidier than we.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Where a device is plugged in. It outlives the device: a reset of the machine makes another one.
pub type VsockPlug = Arc<Mutex<Endpoint>>;

#[derive(Serialize, Deserialize)]
struct State {
    cid: u32,
}

/// A virtio socket device.
pub struct Vsock {
    name: String,
    cid: u32,
    transfer: Arc<Transfer>,
    worker: Worker,
    /// The driver must be told that its connections are gone.
    is_restored: bool,
}

impl Vsock {
    /// A device named `name` for the guest `cid`.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn new(name: &str, cid: u32, plug: &VsockPlug) -> io::Result<Self> {
        let transfer = Arc::<Transfer>::default();
        let worker = Worker::start(name, cid.into(), &transfer, plug)?;
        Ok(Self { name: name.to_owned(), cid, transfer, worker, is_restored: false })
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 19, transitional_id: 0, class: 0x02_8000 }
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        F_STREAM
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_vsock_config` (5.10.4).
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_config(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        let mut queues = activation.queues.into_iter();
        let queues = std::array::from_fn(|_| queues.next().flatten());
        self.transfer.begin(queues, std::mem::take(&mut self.is_restored));
        self.worker.wake();
    }

    fn reset(&mut self) {
        self.transfer.end();
        self.worker.wake();
    }

    fn notify(&mut self, queue: u16) {
        if matches!(queue, RECEIVE | TRANSMIT | EVENT) {
            self.worker.wake();
        }
    }

    fn save(&self) -> DeviceState {
        let data = serde_json::to_value(State { cid: self.cid }).expect("plain data serialises");
        DeviceState { queues: self.transfer.positions().to_vec(), data }
    }

    fn restore(&mut self, data: &Value) -> Result<(), RestoreError> {
        let state = State::deserialize(data)
            .map_err(|source| RestoreError::Damaged { name: self.name.clone(), source })?;
        if state.cid != self.cid {
            let why = format!("its address was {}, this one's is {}", state.cid, self.cid);
            return Err(RestoreError::Unfit { name: self.name.clone(), why });
        }
        self.reset();
        self.is_restored = true;
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.transfer.counters()
    }

    fn shutdown(&mut self) {
        self.worker.stop();
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        self.shutdown();
    }
}
