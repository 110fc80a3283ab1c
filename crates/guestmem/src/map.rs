//! The map from guest pages to machine pages, and the memory itself.

#![expect(unsafe_code, reason = "maps and unmaps the machine memory")]

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock, Weak};

use x86::addr::{PAGE_MASK, PAGE_SIZE};

use crate::protocol::{PageTrace, Unsettled};
use crate::{Gfn, Gpa, Holder};

/// First byte of the hole for devices below 4 GiB.
pub const HOLE_START: u64 = 0xC000_0000;
/// First byte after the hole.
pub const HOLE_END: u64 = 1 << 32;
/// Legacy VGA memory is no RAM (IBM PC memory map).
const VGA: std::ops::Range<u64> = 0xA_0000..0xC_0000;

/// An offset into this VM's machine memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
#[repr(transparent)]
pub struct Hva(pub u64);

/// The machine page behind a guest page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Page {
    /// Its first byte.
    pub hva: Hva,
    /// False for ROM: guest writes are dropped.
    pub writable: bool,
}

/// Guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Not a whole number of pages, or none.
    #[error("guest memory of {0:#x} bytes is not a positive multiple of 4096")]
    Size(u64),
    /// The host refused.
    #[error("cannot get {size:#x} bytes of guest memory from the host: {source}")]
    Host {
        /// Bytes asked for.
        size: u64,
        /// Why not.
        #[source]
        source: rustix::io::Errno,
    },
}

/// What is known of a frame. Translated code reads it (`trace`).
#[repr(C)]
pub(crate) struct Entry {
    /// Hva of the page | flags, or 0.
    map: AtomicU64,
    pub(crate) trace: PageTrace,
}

const PRESENT: u64 = 1;
const READ_ONLY: u64 = 2;

/// A VM's memory. See the crate's documentation.
pub struct GuestMemory {
    base: NonNull<u8>,
    len: u64,
    file: File,
    pub(crate) entries: Vec<Entry>,
    ram: Vec<std::ops::Range<u64>>,
    pub(crate) holders: RwLock<Vec<Weak<dyn Holder>>>,
    pub(crate) unsettled: Unsettled,
}

// SAFETY: `base` is only used for accesses that are single instructions on shared memory (see `scalar`); all
// other fields are Sync by themselves.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl GuestMemory {
    /// A VM's RAM of `size` bytes: from 0 to the hole below 4 GiB, the rest from 4 GiB, without the VGA window.
    ///
    /// # Errors
    /// When `size` is no positive multiple of a page or the host has not that much address space.
    pub fn new(size: u64) -> Result<Arc<Self>, MemoryError> {
        if size == 0 || size & PAGE_MASK != 0 {
            return Err(MemoryError::Size(size));
        }
        let host = |source| MemoryError::Host { size, source };
        let len = usize::try_from(size).map_err(|_| MemoryError::Size(size))?;
        let fd = rustix::fs::memfd_create("trellis-ram", rustix::fs::MemfdFlags::CLOEXEC).map_err(host)?;
        rustix::fs::ftruncate(&fd, size).map_err(host)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice; nothing else refers to it.
        let base = unsafe {
            use rustix::mm::{MapFlags, ProtFlags, mmap};
            let prot = ProtFlags::READ | ProtFlags::WRITE;
            mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED | MapFlags::NORESERVE, &fd, 0)
                .map_err(host)?
        };
        let base = NonNull::new(base.cast::<u8>()).ok_or(host(rustix::io::Errno::NOMEM))?;
        let low = size.min(HOLE_START);
        let high = size - low;
        let ranges = [0..low.min(VGA.start), VGA.end..low, HOLE_END..HOLE_END + high];
        let ram: Vec<_> = ranges.into_iter().filter(|r| !r.is_empty()).collect();
        let frames = ram.last().map_or(0, |r| r.end / PAGE_SIZE);
        let entries = (0..frames)
            .map(|gfn| {
                let gpa = gfn * PAGE_SIZE;
                let hva = if gpa < HOLE_END { gpa } else { gpa - HOLE_END + low };
                let mapped = ram.iter().any(|r| r.contains(&gpa));
                let map = AtomicU64::new(if mapped { hva | PRESENT } else { 0 });
                Entry { map, trace: PageTrace::default() }
            })
            .collect();
        let file = File::from(fd);
        let (holders, unsettled) = (RwLock::new(Vec::new()), Unsettled::default());
        Ok(Arc::new(Self { base, len: size, file, entries, ram, holders, unsettled }))
    }

    /// The ranges of guest physical addresses that are RAM, ascending.
    pub fn ram(&self) -> &[std::ops::Range<u64>] {
        &self.ram
    }

    /// Bytes of machine memory.
    pub fn len_bytes(&self) -> u64 {
        self.len
    }

    /// The memfd behind the machine memory; [`Hva`] is an offset into it.
    pub fn memfd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Bytes of machine memory that the host really holds (for the statistics).
    pub fn resident_bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.file.metadata().map_or(0, |m| m.blocks() * 512)
    }

    #[inline(always)]
    pub(crate) fn entry(&self, gfn: Gfn) -> Option<&Entry> {
        self.entries.get(usize::try_from(gfn.0).ok()?)
    }

    /// The machine page behind a guest page, if it is RAM or ROM.
    #[inline(always)]
    pub fn page(&self, gfn: Gfn) -> Option<Page> {
        let map = self.entry(gfn)?.map.load(Ordering::Acquire);
        (map & PRESENT != 0).then_some(Page { hva: Hva(map & !PAGE_MASK), writable: map & READ_ONLY == 0 })
    }

    /// The byte of machine memory behind a guest address.
    #[inline(always)]
    pub fn hva(&self, gpa: Gpa) -> Option<Hva> {
        Some(Hva(self.page(gpa.gfn())?.hva.0 | gpa.0 & PAGE_MASK))
    }

    /// Makes a page ROM for the guest (or RAM again).
    pub fn set_read_only(&self, gfn: Gfn, read_only: bool) {
        let Some(entry) = self.entry(gfn) else { return };
        if read_only {
            entry.map.fetch_or(READ_ONLY, Ordering::SeqCst);
            // Not only the right to write: what lost that is taken for traced.
            self.invalidate(&(gfn..Gfn(gfn.0 + 1)), crate::Invalidation::Unmap, None);
        } else {
            entry.map.fetch_and(!READ_ONLY, Ordering::SeqCst);
        }
    }

    /// Host address of the machine memory's first byte, for engines that access it by generated code. It stays valid as
    /// long as the memory does (INV-GM-1).
    pub fn host_base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The host address of `hva` if `size` bytes from there are machine memory.
    #[inline(always)]
    pub(crate) fn pointer(&self, hva: Hva, size: usize) -> Option<*mut u8> {
        let room = self.len.checked_sub(size as u64)?;
        if hva.0 > room {
            return None;
        }
        // SAFETY: hva.0 + size <= len, and base..base+len is one live mapping (INV-GM-1).
        Some(unsafe { self.base.as_ptr().add(usize::try_from(hva.0).ok()?) })
    }
}

impl Drop for GuestMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this address and length, and nobody can use it any more:
        // every access goes through `&self`.
        let unmapped =
            unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), usize::try_from(self.len).unwrap_or(0)) };
        debug_assert!(unmapped.is_ok(), "INV-GM-1: the mapping was ours");
    }
}
