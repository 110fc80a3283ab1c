//! What other threads ask of a vCPU and tell it: the part of a [`crate::Holder`] that every engine needs.
//!
//! A request is queued, the vCPU is signalled, and the requester waits until the vCPU has worked off its queue or is
//! not in the guest: outside, it uses no translation and works off the queue before it goes back in. A vCPU that waits for
//! others is outside itself, so two that wait for each other cannot lock up (INV-HOLD-1).

use std::ops::Range;
use std::sync::PoisonError;

use crate::sync::{AtomicBool, AtomicU64, Mutex, Ordering, spin_loop, yield_now};
use crate::{Gfn, Invalidation};

/// Translations to give up.
pub type Request = (Range<Gfn>, Invalidation);

/// The requests to one vCPU, and what it was told of code.
#[derive(Debug, Default)]
pub struct Requests {
    queue: Mutex<Vec<Request>>,
    asked: AtomicU64,
    done: AtomicU64,
    in_guest: AtomicBool,
    /// Frames whose code was written, with the lines, if somebody wants to know.
    written: Mutex<Option<Vec<(Gfn, u64)>>>,
    any_written: AtomicBool,
}

/// Frames remembered as written; more are told as one that means all.
const MAX_WRITTEN: usize = 256;
/// Spins before a waiting thread lets others run.
const SPINS: u32 = 100;
/// Stands for every frame.
pub const ALL_FRAMES: Gfn = Gfn(u64::MAX);

impl Requests {
    /// The vCPU goes into the guest. It must call [`Requests::take`] before it uses a translation.
    pub fn enter(&self) {
        self.in_guest.store(true, Ordering::SeqCst);
    }

    /// The vCPU uses no translation from here to the next [`Requests::enter`].
    pub fn leave(&self) {
        self.in_guest.store(false, Ordering::SeqCst);
    }

    /// The requests so far; after acting on them the vCPU calls [`Requests::done`] with the number returned.
    pub fn take(&self) -> (u64, Vec<Request>) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        (self.asked.load(Ordering::SeqCst), std::mem::take(&mut *queue))
    }

    /// All requests up to `number` have been acted on.
    pub fn done(&self, number: u64) {
        self.done.store(number, Ordering::SeqCst);
    }

    /// Has the vCPU give up translations, and waits for it. `signal` makes it look.
    pub fn ask(&self, request: Request, signal: impl FnOnce()) {
        let number = {
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.push(request);
            self.asked.fetch_add(1, Ordering::SeqCst) + 1
        };
        signal();
        let mut spins = 0u32;
        while self.in_guest.load(Ordering::SeqCst) && self.done.load(Ordering::SeqCst) < number {
            spins += 1;
            if spins > SPINS {
                yield_now();
            }
            spin_loop();
        }
    }

    /// From now on frames whose code is written are remembered for [`Requests::take_written`].
    pub fn watch_code(&self) {
        *self.written.lock().unwrap_or_else(PoisonError::into_inner) = Some(Vec::new());
    }

    /// Remembers that code in `lines` of a frame was written, if the vCPU wants to know; `signal` makes it look.
    pub fn code_changed(&self, gfn: Gfn, lines: u64, signal: impl FnOnce()) {
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
        signal();
    }

    /// Whether [`Requests::take_written`] would tell of any.
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
}
