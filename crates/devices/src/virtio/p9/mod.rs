//! A directory of the host in the guest: virtio-9p (device id 9; the transport is described in QEMU's
//! `docs/specs/` and Linux `net/9p/trans_virtio.c`, not in virtio 1.2), protocol 9P2000.L.
//!
//! Way of the data: a message in the readable part of a chain → [`server`], in a thread of its own → its answer in the
//! writable part. [`host`] is what touches the host's files, `wire` the bytes.

mod host;
mod server;
#[cfg(test)]
mod tests;
mod wire;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use guestmem::GuestMemory;
use serde::Deserialize;
use serde_json::Value;

use self::host::Tree;
use self::server::{MAX_MESSAGE, Server, State};
use super::chain::Chain;
use super::pool::{Pool, Work};
use super::{Activation, DeviceKind, DeviceState, VirtioDevice, read_config};
use crate::bus::lock;
use crate::snapshot::RestoreError;

const QUEUE_SIZES: [u16; 1] = [128];
/// `VIRTIO_9P_MOUNT_TAG`: the configuration has the name to mount.
const F_MOUNT_TAG: u64 = 1;
/// Longest tag.
pub const MAX_TAG: usize = 64;

/// A directory that cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The host refuses.
    #[error("cannot share the directory {}: {source}", path.display())]
    Host {
        /// The directory.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

#[derive(Debug, Default)]
struct Counters {
    requests: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
}

struct Worker {
    server: Arc<Mutex<Server>>,
    counters: Arc<Counters>,
    message: Vec<u8>,
}

impl Work for Worker {
    fn execute(&mut self, memory: &GuestMemory, chain: &Chain) -> u32 {
        let mut reader = chain.reader(memory).limited(u64::from(MAX_MESSAGE));
        self.message.resize(usize::try_from(reader.remaining()).unwrap_or(0), 0);
        let read = reader.read(&mut self.message).unwrap_or(0);
        let answer = lock(&self.server).answer(&self.message[..read]);
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        self.counters.bytes_in.fetch_add(read as u64, Ordering::Relaxed);
        let mut writer = chain.writer(memory);
        if writer.remaining() < answer.len() as u64 {
            // No room for the answer: nothing sensible can be said.
            return 0;
        }
        let written = writer.write(&answer).unwrap_or(0);
        self.counters.bytes_out.fetch_add(written as u64, Ordering::Relaxed);
        u32::try_from(written).unwrap_or(0)
    }
}

/// A shared directory.
pub struct Share {
    name: String,
    tag: String,
    server: Arc<Mutex<Server>>,
    counters: Arc<Counters>,
    pool: Pool,
}

impl Share {
    /// Shares `path` as `tag`. `synchronous`: requests complete within the notification, for `--clock icount`.
    ///
    /// # Errors
    /// When it is no directory, or there is no thread to be had.
    pub fn new(
        name: &str,
        path: &Path,
        tag: &str,
        read_only: bool,
        synchronous: bool,
    ) -> Result<Self, ShareError> {
        let host = |source| ShareError::Host { path: path.to_owned(), source };
        allow_many_files();
        let tree = Tree::open(path).map_err(|errno| host(errno.into()))?;
        let server = Arc::new(Mutex::new(Server::new(tree, read_only)));
        let counters = Arc::<Counters>::default();
        let worker = Box::new(Worker {
            server: Arc::clone(&server),
            counters: Arc::clone(&counters),
            message: Vec::new(),
        });
        let pool = if synchronous {
            Pool::synchronous(worker)
        } else {
            Pool::threads(vec![worker], name).map_err(host)?
        };
        Ok(Self { name: name.to_owned(), tag: tag.to_owned(), server, counters, pool })
    }
}

/// A guest that keeps names of files in its cache has each of them open here.
fn allow_many_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    // What the host does not allow, the guest finds out as an error of a file.
    let _refused = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
}

impl VirtioDevice for Share {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 9, transitional_id: 0x1009, class: 0x01_8000 }
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        F_MOUNT_TAG
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// `struct virtio_9p_config`: length of the tag, the tag.
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let tag = &self.tag.as_bytes()[..self.tag.len().min(MAX_TAG)];
        let mut structure = u16::try_from(tag.len()).unwrap_or(0).to_le_bytes().to_vec();
        structure.extend_from_slice(tag);
        read_config(&structure, offset, data);
    }

    fn activate(&mut self, activation: Activation) {
        self.pool.start(activation.queues);
    }

    fn reset(&mut self) {
        self.pool.reset();
        lock(&self.server).reset();
    }

    fn notify(&mut self, queue: u16) {
        self.pool.kick(usize::from(queue));
    }

    fn save(&self) -> DeviceState {
        let queues = self.pool.drain();
        let state = lock(&self.server).save();
        DeviceState { queues, data: serde_json::to_value(state).expect("plain data serialises") }
    }

    fn restore(&mut self, data: &Value) -> Result<(), RestoreError> {
        let state = State::deserialize(data)
            .map_err(|source| RestoreError::Damaged { name: self.name.clone(), source })?;
        self.reset();
        lock(&self.server).restore(&state);
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let c = &self.counters;
        vec![("requests", of(&c.requests)), ("bytes_in", of(&c.bytes_in)), ("bytes_out", of(&c.bytes_out))]
    }

    fn shutdown(&mut self) {
        if let Err(error) = self.pool.stop() {
            tracing::error!(share = self.name, %error, "could not stop sharing");
        }
    }
}
