//! How other threads make this vCPU give up translations (`guestmem::Holder`).
//!
//! A request is queued, the vCPU is signalled, and the requester waits until the vCPU has worked off its queue or is
//! not in the guest: outside, it uses no translation and works off the queue before it goes back in. A vCPU that waits for
//! others is outside itself, so two that wait for each other cannot lock up (INV-HOLD-1).

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use engine::Signals;
use engine::signals::Signal;
use guestmem::{Gfn, Holder, Invalidation};

/// The part of a vCPU that other threads see.
pub struct VcpuHolder {
    id: u64,
    signals: Arc<Signals>,
    queue: Mutex<Vec<(Range<Gfn>, Invalidation)>>,
    asked: AtomicU64,
    done: AtomicU64,
    in_guest: AtomicBool,
    /// Frames whose code was written, with the lines, if somebody wants to know.
    written: Mutex<Option<Vec<(Gfn, u64)>>>,
    any_written: AtomicBool,
}

/// Frames remembered as written; more are told as one that means all.
const MAX_WRITTEN: usize = 256;
/// Stands for every frame.
pub const ALL_FRAMES: Gfn = Gfn(u64::MAX);

impl VcpuHolder {
    /// The holder of the vCPU with these signals; `id` is unique in its VM.
    pub fn new(id: u64, signals: Arc<Signals>) -> Self {
        Self {
            id,
            signals,
            queue: Mutex::default(),
            asked: AtomicU64::new(0),
            done: AtomicU64::new(0),
            in_guest: AtomicBool::new(false),
            written: Mutex::new(None),
            any_written: AtomicBool::new(false),
        }
    }

    /// The vCPU goes into the guest. It must call [`VcpuHolder::take`] before it uses a translation.
    pub fn enter(&self) {
        self.in_guest.store(true, Ordering::SeqCst);
    }

    /// The vCPU uses no translation from here to the next [`VcpuHolder::enter`].
    pub fn leave(&self) {
        self.in_guest.store(false, Ordering::SeqCst);
    }

    /// From now on frames whose code is written are remembered for [`VcpuHolder::take_written`], and the vCPU is signalled.
    pub fn watch_code(&self) {
        *self.written.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
    }

    /// Whether [`VcpuHolder::take_written`] would tell of any.
    pub fn has_written(&self) -> bool {
        self.any_written.load(Ordering::SeqCst)
    }

    /// The frames whose code was written since the last call, with the lines that were hit ([`ALL_FRAMES`]: too many to remember).
    pub fn take_written(&self) -> Vec<(Gfn, u64)> {
        if !self.any_written.swap(false, Ordering::SeqCst) {
            return Vec::new();
        }
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        written.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// The requests so far; after acting on them the vCPU calls [`VcpuHolder::done`] with the number returned.
    pub fn take(&self) -> (u64, Vec<(Range<Gfn>, Invalidation)>) {
        self.signals.take(Signal::INVALIDATE);
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        (self.asked.load(Ordering::SeqCst), std::mem::take(&mut *queue))
    }

    /// All requests up to `number` have been acted on.
    pub fn done(&self, number: u64) {
        self.done.store(number, Ordering::SeqCst);
    }
}

impl Holder for VcpuHolder {
    fn invalidate(&self, gfns: Range<Gfn>, what: Invalidation) {
        let number = {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.push((gfns, what));
            self.asked.fetch_add(1, Ordering::SeqCst) + 1
        };
        self.signals.raise(Signal::INVALIDATE);
        let mut spins = 0u32;
        while self.in_guest.load(Ordering::SeqCst) && self.done.load(Ordering::SeqCst) < number {
            spins += 1;
            if spins > 100 {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }

    fn code_changed(&self, gfn: Gfn, lines: u64) {
        let mut written = self.written.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(list) = written.as_mut() else { return };
        if let Some((_, hit)) = list.iter_mut().find(|w| w.0 == gfn) {
            *hit |= lines;
        } else if list.len() >= MAX_WRITTEN {
            *list = vec![(ALL_FRAMES, u64::MAX)];
        } else {
            list.push((gfn, lines));
        }
        drop(written);
        self.any_written.store(true, Ordering::SeqCst);
        self.signals.raise(Signal::INVALIDATE);
    }

    fn id(&self) -> u64 {
        self.id
    }
}
