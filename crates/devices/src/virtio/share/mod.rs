//! A directory of the host in the guest, by virtio-fs (virtio 1.2 5.11) or virtio-9p (device id 9, protocol 9P2000.L; its
//! transport is described in Linux `net/9p/trans_virtio.c`, not in virtio 1.2): one for kernels of today, Debian's cloud kernel
//! among them, the other for those from before Linux 5.4.
//!
//! Way of the data: a message in the readable part of a chain → [`fuse`] or [`p9`], in a thread of its own → its answer in the
//! writable part. [`host`] is what touches the host's files, `wire` the bytes.

mod fuse;
#[cfg(test)]
mod fuse_tests;
mod host;
mod p9;
#[cfg(test)]
mod p9_tests;
mod wire;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use guestmem::GuestMemory;
use serde_json::Value;

use self::host::Tree;
use super::chain::Chain;
use super::pool::{Pool, Work};
use super::{Activation, DeviceKind, DeviceState, VirtioDevice, read_config};
use crate::bus::lock;
use crate::snapshot::RestoreError;

/// 9P has one queue; FUSE one for what must not wait, and one for everything else (5.11.2).
const P9_QUEUES: [u16; 1] = [128];
const FUSE_QUEUES: [u16; 2] = [128, 128];
/// `VIRTIO_9P_MOUNT_TAG`: the configuration has the name to mount.
const F_MOUNT_TAG: u64 = 1;
/// Longest tag: the field of virtio-fs.
pub const MAX_TAG: usize = 36;
/// Longest message of either protocol.
const MAX_MESSAGE: u32 =
    if p9::MAX_MESSAGE > fuse::MAX_REQUEST { p9::MAX_MESSAGE } else { fuse::MAX_REQUEST };

/// How the guest gets at the directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShareProtocol {
    /// virtio-fs: `mount -t virtiofs TAG DIR`.
    #[default]
    Fuse,
    /// virtio-9p: `mount -t 9p -o trans=virtio,version=9p2000.L TAG DIR`.
    P9,
}

/// What is shared, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareOptions {
    /// The directory.
    pub path: PathBuf,
    /// The name that the guest mounts it by, at most [`MAX_TAG`] bytes.
    pub tag: String,
    /// The guest may not change it.
    pub read_only: bool,
    /// How the guest gets at it.
    pub protocol: ShareProtocol,
    /// It does not change while the guest runs: the guest may believe what it has seen.
    pub is_static: bool,
}

/// A protocol's server.
trait FileServer: Send {
    /// Answers a message in at most `room` bytes; without bytes, there is no answer.
    fn answer(&mut self, message: &[u8], room: usize) -> Vec<u8>;
    /// Forgets its client.
    fn reset(&mut self);
    /// What its client knows.
    fn save(&self) -> Value;
    /// The same again; unchanged on an error.
    fn restore(&mut self, state: &Value) -> Result<(), serde_json::Error>;
}

type SharedServer = Arc<Mutex<Box<dyn FileServer>>>;

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
    server: SharedServer,
    counters: Arc<Counters>,
    message: Vec<u8>,
}

impl Work for Worker {
    fn execute(&mut self, memory: &GuestMemory, chain: &Chain) -> u32 {
        let mut reader = chain.reader(memory).limited(u64::from(MAX_MESSAGE));
        self.message.resize(usize::try_from(reader.remaining()).unwrap_or(0), 0);
        let read = reader.read(&mut self.message).unwrap_or(0);
        let room = chain.writer(memory).remaining();
        let room = usize::try_from(room).unwrap_or(usize::MAX);
        let answer = lock(&self.server).answer(&self.message[..read], room);
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
    protocol: ShareProtocol,
    server: SharedServer,
    counters: Arc<Counters>,
    pool: Pool,
}

impl Share {
    /// Shares a directory. `synchronous`: requests complete within the notification, for `--clock icount`.
    ///
    /// # Errors
    /// When it is no directory, or there is no thread to be had.
    pub fn new(name: &str, options: &ShareOptions, synchronous: bool) -> Result<Self, ShareError> {
        let host = |source| ShareError::Host { path: options.path.clone(), source };
        allow_many_files();
        let tree = Tree::open(&options.path).map_err(|errno| host(errno.into()))?;
        let server: Box<dyn FileServer> = match options.protocol {
            ShareProtocol::Fuse => Box::new(fuse::Server::new(tree, options.read_only, options.is_static)),
            ShareProtocol::P9 => Box::new(p9::Server::new(tree, options.read_only)),
        };
        let server: SharedServer = Arc::new(Mutex::new(server));
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
        let (name, tag) = (name.to_owned(), options.tag.clone());
        Ok(Self { name, tag, protocol: options.protocol, server, counters, pool })
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
        match self.protocol {
            // virtio-fs has no legacy interface.
            ShareProtocol::Fuse => DeviceKind { id: 26, transitional_id: 0, class: 0x01_8000 },
            ShareProtocol::P9 => DeviceKind { id: 9, transitional_id: 0x1009, class: 0x01_8000 },
        }
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        if self.protocol == ShareProtocol::P9 { F_MOUNT_TAG } else { 0 }
    }

    fn queue_sizes(&self) -> &[u16] {
        match self.protocol {
            ShareProtocol::Fuse => &FUSE_QUEUES,
            ShareProtocol::P9 => &P9_QUEUES,
        }
    }

    /// `struct virtio_fs_config` (5.11.4): tag, number of queues beside the first. `struct virtio_9p_config`: length of the
    /// tag, tag.
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let tag = &self.tag.as_bytes()[..self.tag.len().min(MAX_TAG)];
        let mut structure = match self.protocol {
            ShareProtocol::Fuse => Vec::new(),
            ShareProtocol::P9 => u16::try_from(tag.len()).unwrap_or(0).to_le_bytes().to_vec(),
        };
        structure.extend_from_slice(tag);
        if self.protocol == ShareProtocol::Fuse {
            structure.resize(MAX_TAG, 0);
            structure.extend(1u32.to_le_bytes());
        }
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
        DeviceState { queues, data: lock(&self.server).save() }
    }

    fn restore(&mut self, data: &Value) -> Result<(), RestoreError> {
        self.pool.reset();
        lock(&self.server)
            .restore(data)
            .map_err(|source| RestoreError::Damaged { name: self.name.clone(), source })
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
