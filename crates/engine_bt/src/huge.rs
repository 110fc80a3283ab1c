//! Memory in huge pages, where the host has any: translated code and tables are large and used all over, so with small pages the host's processor spends
//! much of its time on finding them. A host without huge pages gives small ones.

#![expect(unsafe_code, reason = "maps memory")]

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// Size of a huge page.
pub const PAGE: usize = 2 << 20;

/// A host whose memory is in pieces takes longer than this for a huge page, and is not asked again.
const PATIENCE: Duration = Duration::from_millis(40);

/// Address space of `len` bytes, from a multiple of [`PAGE`] on, that nothing may access yet.
///
/// # Errors
/// When there is none.
pub fn reserve(len: usize) -> rustix::io::Result<*mut u8> {
    let len = len.next_multiple_of(4096);
    let room = len + PAGE;
    // SAFETY: a fresh mapping at an address of the kernel's choice.
    let p = unsafe { mmap_anonymous(std::ptr::null_mut(), room, ProtFlags::empty(), MapFlags::PRIVATE)? };
    let p = p.cast::<u8>();
    let before = p.align_offset(PAGE);
    let behind = room - before - len;
    // SAFETY: both ends lie in the mapping, and nothing uses them.
    unsafe {
        if before > 0 {
            munmap(p.cast(), before)?;
        }
        if behind > 0 {
            munmap(p.add(before + len).cast(), behind)?;
        }
        Ok(p.add(before))
    }
}

/// Zeroed memory of `len` bytes for this process alone; the first `busy` bytes in huge pages, if the host gives them to who asks.
///
/// # Errors
/// When the host has no memory.
pub fn zeroed(len: usize, busy: usize) -> rustix::io::Result<NonNull<u8>> {
    let place = reserve(len)?;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the place was just reserved and nothing uses it; advice changes no content.
    let p = unsafe {
        let p = mmap_anonymous(place.cast(), len, access, MapFlags::PRIVATE | MapFlags::FIXED)?;
        let _refused = madvise(p, busy.next_multiple_of(PAGE).min(len), Advice::LinuxHugepage);
        p
    };
    NonNull::new(p.cast()).ok_or(rustix::io::Errno::NOMEM)
}

/// A table of plain words, zeroed at first.
pub struct Table<const N: usize> {
    start: NonNull<[u64; N]>,
    len: usize,
}

// SAFETY: plain memory that belongs to this object alone.
unsafe impl<const N: usize> Send for Table<N> {}

impl<const N: usize> Table<N> {
    /// A table of `len` entries, `busy` or not yet.
    ///
    /// # Errors
    /// When the host has no memory.
    pub fn new(len: usize, busy: bool) -> rustix::io::Result<Self> {
        let bytes = len * size_of::<[u64; N]>();
        Ok(Self { start: zeroed(bytes, if busy { bytes } else { 0 })?.cast(), len })
    }

    /// All of it is used from now on.
    pub fn becomes_busy(&self, collapser: &mut Collapser) {
        let start = self.start.as_ptr().cast::<u8>();
        for page in 0..self.len * size_of::<[u64; N]>() / PAGE {
            // SAFETY: whole huge pages of our own mapping.
            collapser.ask(unsafe { start.add(page * PAGE) });
        }
    }
}

impl<const N: usize> Deref for Table<N> {
    type Target = [[u64; N]];

    fn deref(&self) -> &[[u64; N]] {
        // SAFETY: `len` entries of our own mapping; any bytes are valid words.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<const N: usize> DerefMut for Table<N> {
    fn deref_mut(&mut self) -> &mut [[u64; N]] {
        // SAFETY: as above, and borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<const N: usize> Drop for Table<N> {
    fn drop(&mut self) {
        // SAFETY: our own mapping, not used after this.
        let _unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.len * size_of::<[u64; N]>()) };
    }
}

/// Turns memory that was filled into huge pages, on a thread of its own: the host copies two megabytes each time, and waits for all its
/// processors first. Advice in advance would take memory that is never used, and does nothing for shared memory.
#[derive(Default)]
pub struct Collapser {
    worker: Option<(Sender<usize>, JoinHandle<()>)>,
    ends: Arc<AtomicBool>,
}

impl Collapser {
    /// Asks for the huge page at `at`, some time. The memory must stay mapped as long as this object lives.
    pub fn ask(&mut self, at: *mut u8) {
        if self.worker.is_none() {
            let (sender, receiver) = channel();
            let ends = Arc::clone(&self.ends);
            let thread = std::thread::Builder::new().name("huge pages".into());
            let Ok(thread) = thread.spawn(move || work(&receiver, &ends)) else { return };
            self.worker = Some((sender, thread));
        }
        if let Some((sender, _)) = &self.worker {
            // A worker that gave up does not listen.
            let _gave_up = sender.send(at as usize);
        }
    }
}

impl Drop for Collapser {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some((sender, thread)) = self.worker.take() {
            drop(sender);
            let _panicked = thread.join();
        }
    }
}

fn work(asked: &Receiver<usize>, ends: &AtomicBool) {
    while let Ok(at) = asked.recv() {
        let start = Instant::now();
        // SAFETY: advice changes no content, and the memory is mapped while the collapser lives.
        let refused = unsafe { libc::madvise(at as *mut _, PAGE, libc::MADV_COLLAPSE) } != 0;
        if refused || start.elapsed() > PATIENCE || ends.load(Ordering::Relaxed) {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_memory_begins_at_a_huge_page() {
        for len in [1, 4096, PAGE, 3 * PAGE + 4096] {
            let at = reserve(len).unwrap();
            assert_eq!(at.align_offset(PAGE), 0);
            // SAFETY: all of what was just reserved, and no more: another mapping of the test's process would be missed.
            unsafe { munmap(at.cast(), len.next_multiple_of(4096)).unwrap() };
        }
    }

    #[test]
    fn tables_are_zero_at_first_and_keep_what_is_in_them_when_they_become_busy() {
        for busy in [false, true] {
            let mut collapser = Collapser::default();
            let mut table = Table::<2>::new(2 * PAGE / 16, busy).unwrap();
            assert!(table.iter().all(|e| *e == [0, 0]));
            for (e, n) in table.iter_mut().zip(1..) {
                *e = [n, !n];
            }
            table.becomes_busy(&mut collapser);
            // It waits for its thread, which may have refused.
            drop(collapser);
            assert!(table.iter().zip(1..).all(|(e, n)| *e == [n, !n]));
        }
    }
}
