//! Who must be told before a guest page's machine page changes or is written behind their back.

use std::ops::Range;
use std::sync::{PoisonError, Weak};

use crate::{Gfn, GuestMemory};

/// What a holder has to give up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Invalidation {
    /// The machine page changes: forget every translation to it.
    Unmap,
    /// Writes must be seen from now on: forget every permission to write.
    WriteProtect,
}

/// Somebody who remembers translations (in the manner of Linux's `mmu_notifier`).
pub trait Holder: Send + Sync {
    /// Returns only when nothing of this holder uses the old translations of `gfns` any more.
    /// May be called from any thread, and while that thread's own vCPU waits for others.
    fn invalidate(&self, gfns: Range<Gfn>, what: Invalidation);
    /// Code in `lines` (`trace`) of a frame was written: what was made from them is stale. Does not wait; may be called from any thread.
    fn code_changed(&self, _gfn: Gfn, _lines: u64) {}
    /// A number that tells holders apart.
    fn id(&self) -> u64;
}

impl GuestMemory {
    /// From now on `holder` is told. A dropped holder is forgotten.
    pub fn register(&self, holder: Weak<dyn Holder>) {
        let mut holders = self.holders.write().unwrap_or_else(PoisonError::into_inner);
        holders.retain(|h| h.strong_count() > 0);
        holders.push(holder);
    }

    /// Tells every holder that code of a frame was written.
    pub(crate) fn tell_code_changed(&self, gfn: Gfn, lines: u64) {
        let list = self.holders.read().unwrap_or_else(PoisonError::into_inner);
        for holder in list.iter().filter_map(Weak::upgrade) {
            holder.code_changed(gfn, lines);
        }
    }

    /// Tells every holder but the one with id `except` (who has seen to it himself).
    pub fn invalidate(&self, gfns: &Range<Gfn>, what: Invalidation, except: Option<u64>) {
        let holders: Vec<_> = {
            let list = self.holders.read().unwrap_or_else(PoisonError::into_inner);
            list.iter().filter_map(Weak::upgrade).collect()
        };
        for holder in holders.iter().filter(|h| Some(h.id()) != except) {
            holder.invalidate(gfns.clone(), what);
        }
    }
}
