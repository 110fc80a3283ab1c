//! The host's file under a qcow2 image, with one thing added: entries of the L1 table are held back until a flush.
//!
//! `imago` 0.2.6 writes the L1 entry of a new L2 table at once, while the count of the table's cluster is still in memory. A
//! process that is killed between leaves a file whose L1 table refers to a free cluster; the next one gives that cluster away
//! again, and data overwrites the table. (Seen in two of five runs on fresh images, at their first or second kill.)
//!
//! - INV-QCOW-3: an entry reaches the file after the counts and tables that it refers to: [`Held::release`] is called when they
//!   are written. Until then the crate reads the L1 table from its own memory. What is not flushed may be lost; what an
//!   unwritten entry refers to is at most leaked.
//!
//! The table's place is that of the header when the image is opened. A table that grows moves, and is written as it was before;
//! tables of full length (all that `qemu-img` makes) never do.
#![expect(
    unsafe_code,
    reason = "the trait's methods for unaligned access are unsafe; they are passed on as they come"
)]

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use imago::file::File;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageOpenOptions};

use crate::bus::lock;

/// L1 entries that wait: bounded by the table's length.
#[derive(Debug)]
pub(super) struct Held {
    file: std::fs::File,
    entries: Mutex<BTreeMap<u64, Vec<u8>>>,
}

impl Held {
    pub fn is_empty(&self) -> bool {
        lock(&self.entries).is_empty()
    }

    /// Writes what waits. What fails goes on waiting.
    pub fn release(&self) -> io::Result<()> {
        let mut entries = lock(&self.entries);
        while let Some(entry) = entries.first_entry() {
            self.file.write_all_at(entry.get(), *entry.key())?;
            entry.remove();
        }
        Ok(())
    }
}

/// The file.
#[derive(Debug)]
pub(super) struct HeldFile {
    inner: File,
    /// Where the L1 table is; empty where nothing is held.
    table: Range<u64>,
    held: Arc<Held>,
}

impl HeldFile {
    /// A file whose L1 table lies at `table`.
    pub fn new(file: std::fs::File, options: StorageOpenOptions, table: Range<u64>) -> io::Result<Self> {
        let held = Arc::new(Held { file: file.try_clone()?, entries: Mutex::default() });
        Ok(Self { inner: File::from_open_file(file, options)?, table, held })
    }

    /// What waits.
    pub fn held(&self) -> Arc<Held> {
        Arc::clone(&self.held)
    }

    /// Takes a write to the table; says whether it did.
    fn hold(&self, bufv: &IoVector<'_>, offset: u64) -> bool {
        let within = offset >= self.table.start && offset.saturating_add(bufv.len()) <= self.table.end;
        if !within {
            return false;
        }
        // Entries come one by one; a longer write is one that the crate makes once, of a whole table.
        let mut bytes = vec![0; usize::try_from(bufv.len()).unwrap_or(0)];
        bufv.copy_into_slice(&mut bytes);
        lock(&self.held.entries).insert(offset, bytes);
        true
    }
}

impl fmt::Display for HeldFile {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(formatter)
    }
}

impl Storage for HeldFile {
    fn mem_align(&self) -> usize {
        self.inner.mem_align()
    }

    fn req_align(&self) -> usize {
        self.inner.req_align()
    }

    fn zero_align(&self) -> usize {
        self.inner.zero_align()
    }

    fn discard_align(&self) -> usize {
        self.inner.discard_align()
    }

    fn size(&self) -> io::Result<u64> {
        self.inner.size()
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        self.inner.resolve_relative_path(relative)
    }

    fn get_filename(&self) -> Option<PathBuf> {
        self.inner.get_filename()
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: the caller's promises are those that the inner file asks for; our alignments are its own.
        unsafe { self.inner.pure_readv(bufv, offset) }
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        if self.hold(&bufv, offset) {
            return Ok(());
        }
        // SAFETY: as for reading.
        unsafe { self.inner.pure_writev(bufv, offset) }
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as for reading.
        unsafe { self.inner.pure_write_zeroes(offset, length) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as for reading.
        unsafe { self.inner.pure_write_allocated_zeroes(offset, length) }
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: as for reading.
        unsafe { self.inner.pure_discard(offset, length) }
    }

    fn flush(&self) -> io::Result<()> {
        Storage::flush(&self.inner)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn settle_writes(&self) -> io::Result<()> {
        self.inner.settle_writes()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        // SAFETY: as for reading.
        unsafe { self.inner.invalidate_cache() }
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        self.inner.get_storage_helper()
    }

    fn resize(&self, new_size: u64, mode: PreallocateMode) -> io::Result<()> {
        self.inner.resize(new_size, mode)
    }
}
