//! Executing one block request (virtio 1.2 5.2.6).
//!
//! A request is a 16-byte header, data, and a status byte at the very end of the writable part; how the driver cuts it into
//! segments is its business. Data goes through a bounce buffer of bounded size, so that a long request costs no memory.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use guestmem::GuestMemory;

use super::image::{Image, SECTOR_BYTES};
use crate::virtio::chain::{Chain, Cursor};
use crate::virtio::pool::Work;

/// Request types (5.2.6).
mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// Length of the identification string (5.2.6).
pub(super) const ID_BYTES: usize = 20;
/// Most data in one request. UEFI asks for up to 1 GiB at a time, nothing known asks for more.
const MAX_DATA: u64 = 1 << 30;
/// Most ranges in one discard request.
pub(super) const MAX_RANGES: usize = 32;
/// Most sectors in a discarded range (1 GiB).
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Most sectors in the one range of a write-zeroes request (64 MiB): where the host's file system cannot punch holes they
/// are all written, and a reset waits for it.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 17;
const RANGE_BYTES: usize = 16;
/// Flag of a write-zeroes range: storage may be given back.
const UNMAP: u32 = 1;
/// Size of the bounce buffer.
const BOUNCE_BYTES: usize = 128 << 10;

/// What the status byte says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// Why a request fails. What the guest did wrong and what the host could not do look the same to the guest.
enum Failure {
    Driver,
    Unsupported,
    Host(io::Error),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

impl From<guestmem::Unbacked> for Failure {
    fn from(_: guestmem::Unbacked) -> Self {
        Self::Driver
    }
}

/// What the device did, for the statistics.
#[derive(Debug, Default)]
pub struct Counters {
    requests: AtomicU64,
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    discards: AtomicU64,
    failures: AtomicU64,
    bytes_read: AtomicU64,
    bytes_written: AtomicU64,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

impl Counters {
    /// Names and values.
    #[must_use]
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        [
            ("requests", &self.requests),
            ("reads", &self.reads),
            ("writes", &self.writes),
            ("flushes", &self.flushes),
            ("discards", &self.discards),
            ("failures", &self.failures),
            ("bytes_read", &self.bytes_read),
            ("bytes_written", &self.bytes_written),
        ]
        .map(|(name, value)| (name, value.load(Ordering::Relaxed)))
        .to_vec()
    }
}

/// The header of a request.
struct Header {
    kind: u32,
    sector: u64,
}

/// Executes requests on an image.
pub(super) struct Executor {
    image: Arc<Image>,
    id: [u8; ID_BYTES],
    write_through: Arc<AtomicBool>,
    counters: Arc<Counters>,
    bounce: Vec<u8>,
}

impl Work for Executor {
    fn execute(&mut self, memory: &GuestMemory, chain: &Chain) -> u32 {
        let (durable, counters) = (self.write_through.load(Ordering::SeqCst), Arc::clone(&self.counters));
        self.request(memory, chain, durable, &counters)
    }
}

impl Executor {
    /// `write_through`: whether every write is to be durable before it completes.
    pub fn new(
        image: &Arc<Image>,
        id: [u8; ID_BYTES],
        write_through: Arc<AtomicBool>,
        counters: Arc<Counters>,
    ) -> Self {
        Self { image: Arc::clone(image), id, write_through, counters, bounce: vec![0; BOUNCE_BYTES] }
    }

    /// Executes the request in `chain`; says how many bytes of it were written, the status included.
    fn request(&mut self, mem: &GuestMemory, chain: &Chain, durable: bool, counters: &Counters) -> u32 {
        count(&counters.requests, 1);
        let writer = chain.writer(mem);
        let Some(data_room) = writer.remaining().checked_sub(1) else {
            // No place for a status: nothing can be said (5.2.6.1 asks for one).
            count(&counters.failures, 1);
            return 0;
        };
        let mut input = writer.clone().limited(data_room);
        let mut done = 0;
        let status = match self.dispatch(chain.reader(mem), &mut input, &mut done, durable, counters) {
            Ok(()) => Status::Ok,
            Err(failure) => {
                count(&counters.failures, 1);
                self.explain(failure)
            }
        };
        let mut at_end = writer;
        at_end.skip(data_room);
        let told = at_end.write(&[status as u8]).is_ok();
        // Only a prefix of the buffer may be reported as written (2.7.8.2): up to the status only if the data is whole.
        let whole = told && done == data_room;
        u32::try_from(if whole { done + 1 } else { done }).unwrap_or(u32::MAX)
    }

    fn explain(&self, failure: Failure) -> Status {
        match failure {
            Failure::Driver => Status::IoError,
            Failure::Unsupported => Status::Unsupported,
            Failure::Host(error) => {
                tracing::debug!(image = %self.image.path().display(), %error, "disk request failed");
                Status::IoError
            }
        }
    }

    fn dispatch(
        &mut self,
        mut from: Cursor<'_>,
        to: &mut Cursor<'_>,
        done: &mut u64,
        durable: bool,
        counters: &Counters,
    ) -> Result<(), Failure> {
        let header = read_header(&mut from)?;
        match header.kind {
            kind::IN => self.read(header.sector, to, done, counters),
            kind::OUT => self.write(header.sector, &mut from, durable, counters),
            kind::FLUSH => {
                count(&counters.flushes, 1);
                Ok(self.image.sync()?)
            }
            kind::GET_ID => {
                *done = to.write(&self.id)? as u64;
                Ok(())
            }
            kind::DISCARD | kind::WRITE_ZEROES => self.ranges(header.kind, &mut from, durable, counters),
            _ => Err(Failure::Unsupported),
        }
    }

    /// The byte offset of a transfer, if it lies within the disk.
    fn place(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let end = sector.checked_add(len.div_ceil(SECTOR_BYTES)).ok_or(Failure::Driver)?;
        if len > MAX_DATA || !len.is_multiple_of(SECTOR_BYTES) || end > self.image.sectors() {
            return Err(Failure::Driver);
        }
        Ok(sector * SECTOR_BYTES)
    }

    fn writable(&self) -> Result<(), Failure> {
        if self.image.read_only() { Err(Failure::Driver) } else { Ok(()) }
    }

    fn read(
        &mut self,
        sector: u64,
        to: &mut Cursor<'_>,
        done: &mut u64,
        counters: &Counters,
    ) -> Result<(), Failure> {
        let mut offset = self.place(sector, to.remaining())?;
        count(&counters.reads, 1);
        count(&counters.bytes_read, to.remaining());
        while to.remaining() > 0 {
            let now = usize::try_from(to.remaining()).unwrap_or(BOUNCE_BYTES).min(BOUNCE_BYTES);
            let block = &mut self.bounce[..now];
            self.image.read(offset, block)?;
            to.write(block)?;
            *done += now as u64;
            offset += now as u64;
        }
        Ok(())
    }

    fn write(
        &mut self,
        sector: u64,
        from: &mut Cursor<'_>,
        durable: bool,
        counters: &Counters,
    ) -> Result<(), Failure> {
        self.writable()?;
        let mut offset = self.place(sector, from.remaining())?;
        count(&counters.writes, 1);
        count(&counters.bytes_written, from.remaining());
        while from.remaining() > 0 {
            let now = usize::try_from(from.remaining()).unwrap_or(BOUNCE_BYTES).min(BOUNCE_BYTES);
            let block = &mut self.bounce[..now];
            from.read(block)?;
            self.image.write(offset, block)?;
            offset += now as u64;
        }
        if durable { Ok(self.image.sync()?) } else { Ok(()) }
    }

    /// Discard and write zeroes: a list of ranges, all checked before the first takes effect.
    fn ranges(
        &self,
        kind: u32,
        from: &mut Cursor<'_>,
        durable: bool,
        counters: &Counters,
    ) -> Result<(), Failure> {
        self.writable()?;
        let mut raw = [0; MAX_RANGES * RANGE_BYTES];
        let len = from.remaining();
        let most = if kind == kind::DISCARD { raw.len() } else { RANGE_BYTES };
        if len == 0 || len > most as u64 || !len.is_multiple_of(RANGE_BYTES as u64) {
            return Err(Failure::Driver);
        }
        let len = from.read(&mut raw)?;
        let mut list = Vec::with_capacity(MAX_RANGES);
        for range in raw[..len].chunks_exact(RANGE_BYTES) {
            list.push(self.range(kind, range)?);
        }
        count(&counters.discards, 1);
        for (offset, len, unmap) in list {
            if kind == kind::DISCARD {
                self.image.discard(offset, len)?;
            } else {
                self.image.write_zeroes(offset, len, unmap)?;
            }
        }
        if durable { Ok(self.image.sync()?) } else { Ok(()) }
    }

    /// Offset and length in bytes and the unmap flag of `struct virtio_blk_discard_write_zeroes`; 5.2.6.2 on the flags.
    fn range(&self, kind: u32, raw: &[u8]) -> Result<(u64, u64, bool), Failure> {
        let word = |at: usize| le32(raw, at);
        let (sector, sectors, flags) = (u64::from(word(4)) << 32 | u64::from(word(0)), word(8), word(12));
        let allowed = if kind == kind::WRITE_ZEROES { UNMAP } else { 0 };
        if flags & !allowed != 0 {
            return Err(Failure::Unsupported);
        }
        if sectors > if kind == kind::DISCARD { MAX_DISCARD_SECTORS } else { MAX_ZERO_SECTORS } {
            return Err(Failure::Driver);
        }
        let len = u64::from(sectors) * SECTOR_BYTES;
        Ok((self.place(sector, len)?, len, flags & UNMAP != 0))
    }
}

fn le32(raw: &[u8], at: usize) -> u32 {
    raw.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn read_header(from: &mut Cursor<'_>) -> Result<Header, Failure> {
    let mut raw = [0; 16];
    if from.read(&mut raw)? < raw.len() {
        return Err(Failure::Driver);
    }
    let sector = u64::from(le32(&raw, 12)) << 32 | u64::from(le32(&raw, 8));
    Ok(Header { kind: le32(&raw, 0), sector })
}
