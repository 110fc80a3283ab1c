//! The block device (virtio 1.2 section 5.2) on an image of the host.
//!
//! A request queue for each vCPU. [`image`] is the host's file, `request` what a request does to it, the pool's threads do it. The write cache is the host's page cache, and qcow2's tables in memory: a completed flush survives the end of this
//! process, however it ends, and the host's; on a raw image a completed write survives that of the process too. When the
//! driver turns the cache off (`writeback` = 0, or no FLUSH negotiated), every write is made durable before it completes:
//! virtio's way to say "force unit access".

pub mod image;
mod request;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use image::{Image, ImageError, ImageFormat, ImageOptions, SECTOR_BYTES};
use request::{Counters, Executor, ID_BYTES, MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZERO_SECTORS};

use super::pool::{Pool, Work};
use super::{Activation, DeviceKind, DeviceState, VirtioDevice, read_config};
use crate::snapshot::RestoreError;

const QUEUE_SIZE: u16 = 256;
/// How many requests of a disk the host works on at a time.
const THREADS: usize = 4;
/// Most queues of a disk.
pub const MAX_QUEUES: u16 = 16;
/// Most data segments: what a chain of the queue's size holds beside header and status.
const SEG_MAX: u32 = 254;

/// Feature bits (5.2.3).
mod bit {
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const CONFIG_WCE: u64 = 1 << 11;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Offset of `writeback` in the configuration.
const WRITEBACK_AT: u64 = 32;
/// Length of the configuration up to the fields of WRITE_ZEROES.
const CONFIG_BYTES: usize = 60;

/// What a disk is made of.
#[derive(Clone, Debug)]
pub struct BlockOptions {
    /// The image, which may be used before and after by other disks.
    pub image: Arc<Image>,
    /// Requests complete within the notification, for `--clock icount`.
    pub synchronous: bool,
    /// The disk's serial number, cut off after 20 bytes.
    pub serial: String,
    /// Request queues, 1 to [`MAX_QUEUES`]: as many as there are vCPUs.
    pub queues: u16,
}

impl BlockOptions {
    /// A disk with threads of its own and one queue.
    #[must_use]
    pub fn new(image: &Arc<Image>) -> Self {
        Self { image: Arc::clone(image), synchronous: false, serial: "trellis".to_owned(), queues: 1 }
    }

    /// The same on a writable raw image that is opened for it.
    ///
    /// # Errors
    /// When the image cannot be used.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        Ok(Self::new(&Arc::new(Image::open(&ImageOptions::new(path))?)))
    }
}

#[derive(Serialize, Deserialize)]
struct State {
    sectors: u64,
    read_only: bool,
    writeback: bool,
    features: u64,
}

/// A virtio disk.
pub struct Block {
    name: String,
    sectors: u64,
    read_only: bool,
    queue_sizes: Vec<u16>,
    writeback: bool,
    /// Negotiated features, 0 before.
    features: u64,
    image: Arc<Image>,
    /// Every write is to be durable before it completes.
    write_through: Arc<AtomicBool>,
    counters: Arc<Counters>,
    pool: Pool,
}

impl Block {
    /// A disk named `name`.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn new(name: &str, options: &BlockOptions) -> Result<Self, ImageError> {
        let image = &options.image;
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        let (write_through, counters) = (Arc::<AtomicBool>::default(), Arc::<Counters>::default());
        let worker = || -> Box<dyn Work> {
            Box::new(Executor::new(image, id, Arc::clone(&write_through), Arc::clone(&counters)))
        };
        let pool = if options.synchronous {
            Pool::synchronous(worker())
        } else {
            let workers = std::iter::repeat_with(worker).take(THREADS).collect();
            Pool::threads(workers, name)
                .map_err(|source| ImageError::Host { path: image.path().to_owned(), source })?
        };
        Ok(Self {
            name: name.to_owned(),
            sectors: image.sectors(),
            read_only: image.read_only(),
            queue_sizes: vec![QUEUE_SIZE; usize::from(options.queues.clamp(1, MAX_QUEUES))],
            writeback: true,
            features: 0,
            image: Arc::clone(image),
            write_through,
            counters,
            pool,
        })
    }

    /// 5.2.5.2: without FLUSH, or with the cache turned off, writes are durable when they complete.
    fn settle_cache(&self) {
        let through = if self.features & bit::CONFIG_WCE != 0 {
            !self.writeback
        } else {
            self.features & bit::FLUSH == 0
        };
        self.write_through.store(through, Ordering::SeqCst);
    }

    /// `struct virtio_blk_config` (5.2.4).
    fn config(&self) -> [u8; CONFIG_BYTES] {
        let mut c = [0; CONFIG_BYTES];
        let mut put = |at: usize, bytes: &[u8]| c[at..at + bytes.len()].copy_from_slice(bytes);
        let ranges = u32::try_from(MAX_RANGES).unwrap_or(1);
        put(0, &self.sectors.to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &512u32.to_le_bytes()); // blk_size
        put(24, &[3, 0]); // physical blocks of 2^3 logical ones: the host's pages
        put(26, &8u16.to_le_bytes()); // min_io_size in blocks
        put(32, &[u8::from(self.writeback)]);
        put(34, &u16::try_from(self.queue_sizes.len()).unwrap_or(1).to_le_bytes()); // num_queues
        put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
        put(40, &ranges.to_le_bytes());
        put(44, &8u32.to_le_bytes()); // discard_sector_alignment
        put(48, &MAX_ZERO_SECTORS.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]); // write_zeroes_may_unmap
        c
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 2, transitional_id: 0x1001, class: 0x01_0000 }
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn features(&self) -> u64 {
        let always = bit::SEG_MAX | bit::BLK_SIZE | bit::FLUSH | bit::TOPOLOGY | bit::CONFIG_WCE;
        let several = if self.queue_sizes.len() > 1 { bit::MQ } else { 0 };
        always | several | if self.read_only { bit::RO } else { bit::DISCARD | bit::WRITE_ZEROES }
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.config(), offset, data);
    }

    fn config_write(&mut self, offset: u64, data: &[u8]) {
        if let (WRITEBACK_AT, &[value]) = (offset, data)
            && self.features & bit::CONFIG_WCE != 0
        {
            self.writeback = value & 1 != 0;
            self.settle_cache();
        }
    }

    fn activate(&mut self, activation: Activation) {
        self.features = activation.features;
        self.settle_cache();
        self.pool.start(activation.queues);
    }

    fn reset(&mut self) {
        self.pool.reset();
        self.features = 0;
        self.writeback = true;
    }

    fn notify(&mut self, queue: u16) {
        self.pool.kick(usize::from(queue));
    }

    fn save(&self) -> DeviceState {
        let queues = self.pool.drain();
        let state = State {
            sectors: self.sectors,
            read_only: self.read_only,
            writeback: self.writeback,
            features: self.features,
        };
        DeviceState { queues, data: serde_json::to_value(state).expect("plain data serialises") }
    }

    fn restore(&mut self, data: &Value) -> Result<(), RestoreError> {
        let state = State::deserialize(data)
            .map_err(|source| RestoreError::Damaged { name: self.name.clone(), source })?;
        if (state.sectors, state.read_only) != (self.sectors, self.read_only) {
            let why = format!(
                "it was a disk of {} sectors{}, this one has {}{}",
                state.sectors,
                if state.read_only { ", read-only" } else { "" },
                self.sectors,
                if self.read_only { ", read-only" } else { "" },
            );
            return Err(RestoreError::Unfit { name: self.name.clone(), why });
        }
        self.reset();
        self.writeback = state.writeback;
        self.features = state.features;
        Ok(())
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.list()
    }

    fn shutdown(&mut self) {
        if let Err(error) = self.pool.stop().and_then(|()| self.image.sync()) {
            tracing::error!(disk = self.name, %error, "could not make the disk durable");
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.shutdown();
    }
}
