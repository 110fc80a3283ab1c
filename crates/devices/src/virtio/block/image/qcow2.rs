//! qcow2 through the crate `imago`, in its synchronous form: plain calls from the disk's own threads, no runtime.
//!
//! What the guest wrote since its last flush is in the file's clusters and in tables that `imago` keeps in memory; a flush
//! writes the tables in an order that leaves the file sound at every moment (reference counts before what refers to them),
//! then syncs. A process that dies loses at most what was not flushed, and some clusters that nothing refers to.
//!
//! - INV-QCOW-0: whatever may change tables, or write them out, has the image alone. Two threads at once could write out a
//!   reference to a cluster whose count, made meanwhile, is still in memory; a kill at that moment gives the cluster away
//!   twice. (Seen, once in two thousand kills.) Reading is shared, and so is waiting for the host's disk.
//!
//! A file may be anything: hostile, damaged, changed by others while it is used.
//! - INV-QCOW-1: what a header names (backing files) is opened here, read-only, locked, at most [`MAX_CHAIN`] deep and no file
//!   twice; data files are refused.
//! - INV-QCOW-2: a panic of the crate ends here: the image is broken from then on, and every request an I/O error.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::{Qcow2, Qcow2OpenBuilder};
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, StorageOpenOptions,
};

use super::check::{check_header, check_tables};
use super::held::{Held, HeldFile};
use super::host_file::{HostFile, Identity};
use super::{ImageError, ImageFormat, write_zeros};

type Storage = HeldFile;
type Access = FormatAccess<Storage>;

/// Most files in a chain of backing files.
const MAX_CHAIN: usize = 64;
/// Most blocks of reference counts that an image needs: what imago takes, too.
const MAX_COUNT_BLOCKS: u64 = 4 << 20;
/// What an image says of itself once the crate has panicked on it.
const BROKEN: &str = "its structure contradicts itself";

/// An open qcow2 image, with everything below it.
#[derive(Debug)]
pub(super) struct Qcow2Image {
    /// INV-QCOW-0. `None` once it is being dropped.
    access: Option<RwLock<Access>>,
    /// INV-QCOW-3; nothing is held of a temporary image.
    held: Option<Arc<Held>>,
    broken: AtomicBool,
    len_bytes: u64,
}

/// Opens what an image refers to.
#[derive(Clone, Debug)]
struct Gate {
    /// The files from the top down to here.
    chain: Vec<Identity>,
}

impl ImplicitOpenGate<Storage> for Gate {
    fn open_format<F: FormatDriverBuilder<Storage>>(&mut self, builder: F) -> io::Result<Access> {
        Ok(FormatAccess::new(builder.open(self.clone())?))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<Storage> {
        let path = options.get_filename().map(Path::to_owned).unwrap_or_default();
        if options.get_writable() {
            return Err(io::Error::other("it keeps its data in another file, which is not supported"));
        }
        // Before it is opened, for who has it open has it locked.
        let known = std::fs::metadata(&path).map(|file| (file.dev(), file.ino()));
        if known.is_ok_and(|identity| self.chain.contains(&identity)) {
            return Err(io::Error::other("the chain of backing files is a loop"));
        }
        let host = HostFile::open(&path, true).map_err(io::Error::other)?;
        if self.chain.contains(&host.identity) {
            return Err(io::Error::other("the chain of backing files is a loop"));
        }
        if self.chain.len() >= MAX_CHAIN {
            return Err(io::Error::other(format!(
                "more than {MAX_CHAIN} backing files on top of each other"
            )));
        }
        self.chain.push(host.identity);
        Storage::new(host.file, options, 0..0)
    }
}

/// The file as `imago` has it.
fn storage(file: File, path: PathBuf, writable: bool) -> io::Result<Storage> {
    Storage::new(file, StorageOpenOptions::new().filename(path).write(writable), 0..0)
}

/// Where the L1 table of an image lies (qcow2 specification, "Header": 36 entries, 40 offset). A header that says nonsense is
/// refused by what opens the image.
fn l1_table(host: &HostFile) -> io::Result<Range<u64>> {
    let mut header = [0; 48];
    host.read(0, &mut header)?;
    let [.., s0, s1, s2, s3, o0, o1, o2, o3, o4, o5, o6, o7] = header;
    let (entries, offset) =
        (u32::from_be_bytes([s0, s1, s2, s3]), u64::from_be_bytes([o0, o1, o2, o3, o4, o5, o6, o7]));
    Ok(offset..offset.saturating_add(8 * u64::from(entries)))
}

/// Runs what may panic on a malformed image.
fn caught<R>(work: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_panic| Err(io::Error::other(BROKEN)))
}

/// Whether the table of reference counts covers the file, but for the last block of counts, which a killed writer may not
/// have entered yet. Where one is missing further down, imago 0.2.6 looks for a place for it without end.
fn check_counts(host: &HostFile) -> io::Result<()> {
    let mut header = [0; 104];
    host.read(0, &mut header)?;
    let word =
        |at: usize| header.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes);
    let half = |at: usize| word(at) >> 32;
    let (version, cluster_bits, table, clusters) = (half(4), half(20), word(48), half(56));
    let order = if version == 2 { 4 } else { word(96) >> 32 };
    if !(9..=21).contains(&cluster_bits) || order > 6 {
        // Refused by what opens it.
        return Ok(());
    }
    let in_a_block = 8u64 << cluster_bits >> order;
    let needed = host.len_bytes.div_ceil(1 << cluster_bits).div_ceil(in_a_block);
    let needed = needed.saturating_sub(1).max(1);
    let uncovered =
        || io::Error::other("its reference counts do not cover the file; try qemu-img check -r all");
    if needed > (clusters << cluster_bits) / 8 || needed > MAX_COUNT_BLOCKS {
        return Err(uncovered());
    }
    let mut entries = vec![0; usize::try_from(needed * 8).map_err(io::Error::other)?];
    host.read(table, &mut entries)?;
    let missing = entries.chunks_exact(8).any(|entry| entry.iter().all(|&byte| byte == 0));
    if missing { Err(uncovered()) } else { Ok(()) }
}

/// Opens an image; gives what it holds back beside it.
fn open_qcow2(host: HostFile, writable: bool) -> io::Result<(Access, Arc<Held>)> {
    let mut table = 0..0;
    check_header(&host)?;
    if writable {
        check_counts(&host)?;
        check_tables(&host)?;
        table = l1_table(&host)?;
    }
    let gate = Gate { chain: vec![host.identity] };
    let options = StorageOpenOptions::new().filename(host.path).write(writable);
    let storage = Storage::new(host.file, options, table)?;
    let held = storage.held();
    let builder: Qcow2OpenBuilder<Storage> = Qcow2::builder(storage);
    Ok((FormatAccess::new(builder.write(writable).open(gate)?), held))
}

fn open_raw(host: HostFile) -> io::Result<Access> {
    let builder = Raw::builder(storage(host.file, host.path, false)?);
    Ok(FormatAccess::new(builder.open(DenyImplicitOpenGate::default())?))
}

/// A temporary image on top of `base`, in a file without a name.
fn on_top(base: Access) -> io::Result<Access> {
    let size = base.size().next_multiple_of(super::SECTOR_BYTES);
    let file = tempfile::tempfile()?;
    let top = Qcow2::<Storage>::create_builder(storage(file, PathBuf::from("/overlay"), true)?);
    let open = |image| Ok(Qcow2::builder(image).backing(Some(base)));
    let qcow2 = top.size(size).create_open(DenyImplicitOpenGate::default(), open)?;
    Ok(FormatAccess::new(qcow2))
}

/// Makes an empty image.
pub(super) fn make(path: &Path, len_bytes: u64) -> io::Result<()> {
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    let image = Qcow2::<Storage>::create_builder(storage(file, path.to_owned(), true)?);
    image.size(len_bytes).create()
}

impl Qcow2Image {
    /// Opens a qcow2 image.
    pub fn open(host: HostFile, read_only: bool) -> Result<Self, ImageError> {
        let path = host.path.clone();
        Self::make(&path, ImageFormat::Qcow2, || {
            let (access, held) = open_qcow2(host, !read_only)?;
            Ok((access, Some(held)))
        })
    }

    /// A temporary image on top of one that is only read.
    pub fn overlay(host: HostFile, format: ImageFormat) -> Result<Self, ImageError> {
        let path = host.path.clone();
        Self::make(&path, format, || {
            let access = on_top(match format {
                ImageFormat::Raw => open_raw(host)?,
                ImageFormat::Qcow2 => open_qcow2(host, false)?.0,
            })?;
            Ok((access, None))
        })
    }

    fn make(
        path: &Path,
        format: ImageFormat,
        open: impl FnOnce() -> io::Result<(Access, Option<Arc<Held>>)>,
    ) -> Result<Self, ImageError> {
        let (access, held) = caught(open).map_err(|error| {
            // Whatever a header contains may stand in it.
            let why = error.to_string().escape_debug().to_string().replace("\\\"", "\"").replace("\\'", "'");
            ImageError::Format { path: path.to_owned(), format, why }
        })?;
        let len_bytes = access.size();
        Ok(Self { access: Some(RwLock::new(access)), held, broken: AtomicBool::new(false), len_bytes })
    }

    pub const fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// INV-QCOW-2.
    fn with<R>(&self, work: impl FnOnce(&RwLock<Access>) -> io::Result<R>) -> io::Result<R> {
        let Some(access) = self.access.as_ref().filter(|_| !self.broken.load(Ordering::SeqCst)) else {
            return Err(io::Error::other(BROKEN));
        };
        catch_unwind(AssertUnwindSafe(|| work(access))).unwrap_or_else(|_panic| {
            self.broken.store(true, Ordering::SeqCst);
            Err(io::Error::other(BROKEN))
        })
    }

    fn shared<R>(&self, work: impl FnOnce(&Access) -> io::Result<R>) -> io::Result<R> {
        self.with(|access| work(&access.read().unwrap_or_else(PoisonError::into_inner)))
    }

    fn alone<R>(&self, work: impl FnOnce(&mut Access) -> io::Result<R>) -> io::Result<R> {
        self.with(|access| work(&mut access.write().unwrap_or_else(PoisonError::into_inner)))
    }

    pub fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.shared(|access| access.read(data, offset))
    }

    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.alone(|access| access.write(data, offset))
    }

    pub fn sync(&self) -> io::Result<()> {
        self.alone(|access| self.flush(access))?;
        self.shared(Access::sync)
    }

    /// Writes out the tables, and then what refers to them.
    fn flush(&self, access: &mut Access) -> io::Result<()> {
        access.flush()?;
        let Some(held) = self.held.as_ref().filter(|held| !held.is_empty()) else { return Ok(()) };
        // For a host that loses its power, too. Seldom: a table covers half a gigabyte.
        access.sync()?;
        held.release()
    }

    /// Whole clusters become zeros without storage. Version 2 of the format cannot say that: nothing happens there.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let done = self.alone(|access| access.discard_to_any(offset, len));
        done.or_else(|error| if is_unsupported(&error) { Ok(()) } else { Err(error) })
    }

    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let done = if unmap {
            self.alone(|access| access.discard_to_zero(offset, len))
        } else {
            self.alone(|access| access.write_zeroes(offset, len))
        };
        match done {
            Err(error) if is_unsupported(&error) => {
                write_zeros(offset, len, |at, zeros| self.write(at, zeros))
            }
            other => other,
        }
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
}

impl Drop for Qcow2Image {
    fn drop(&mut self) {
        // What is still in memory goes out, in order.
        let access = self.access.take().filter(|_| !self.broken.load(Ordering::SeqCst));
        let _broken = catch_unwind(AssertUnwindSafe(|| {
            let Some(access) = access else { return };
            let mut access = access.into_inner().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = self.flush(&mut access) {
                tracing::warn!(%error, "the last tables of a disk image could not be written");
            }
        }));
    }
}
