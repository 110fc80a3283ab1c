//! The trace protocol of one page ([`crate::trace`] says what it is for and why it holds), apart from memory and vCPUs so that a model checker can
//! run it (`tests/model.rs`).

use crate::sync::{AtomicU32, AtomicU64, Ordering, fence, yield_now};

/// Everybody who remembers translations of a page or code made of it, as one page's protocol sees them.
pub trait Everybody {
    /// Returns only when nobody but the caller writes the page the fast way, nor after a look at its lines before this call.
    fn write_protect(&self);
    /// Tells everybody that code in `lines` changed; does not wait.
    fn code_changed(&self, lines: u64);
}

/// How many of a VM's threads have set lines that not everybody respects yet, or are about to clear lines that they have told of (lower half), and
/// how many ever did (upper half).
#[derive(Debug, Default)]
pub struct Unsettled(AtomicU64);

impl Unsettled {
    const COUNT: u64 = 0xffff_ffff;

    /// A number that is the same as long as nobody enters; None if somebody is in.
    fn quiet(&self) -> Option<u64> {
        let now = self.0.load(Ordering::SeqCst);
        (now & Self::COUNT == 0).then_some(now)
    }

    fn enter(&self) {
        self.0.fetch_add(Self::COUNT + 2, Ordering::SeqCst);
    }

    fn leave(&self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// What is known of a page's code. Translated code reads it.
#[derive(Debug)]
#[repr(C)]
pub struct PageTrace {
    version: AtomicU32,
    /// Lines without code may be written after a look at the mask.
    pub(crate) shared: AtomicU32,
    pub(crate) code_lines: AtomicU64,
}

impl Default for PageTrace {
    fn default() -> Self {
        Self { version: AtomicU32::new(1), shared: AtomicU32::new(0), code_lines: AtomicU64::new(0) }
    }
}

impl PageTrace {
    /// Changes with each write to a traced line.
    #[inline(always)]
    pub fn version(&self) -> u32 {
        self.version.load(Ordering::Acquire)
    }

    /// The lines that are traced.
    #[inline(always)]
    pub fn lines(&self) -> u64 {
        self.code_lines.load(Ordering::SeqCst)
    }

    /// Whether there was a moment at which `lines` were traced, and everybody respected it: whoever clears them tells of it after that moment.
    pub fn are_traced(&self, lines: u64, unsettled: &Unsettled) -> bool {
        // One look before or after would not do: lines seen set may be cleared, all told, before the look behind it; lines may be set behind the
        // look before it, and not be respected yet.
        let quiet = unsettled.quiet();
        quiet.is_some() && self.lines() & lines == lines && unsettled.quiet() == quiet
    }

    /// Traces `lines`; true if everybody had to be told.
    pub fn trace(&self, lines: u64, unsettled: &Unsettled, everybody: &impl Everybody) -> bool {
        let mut waited = false;
        // Another may set the same lines and still wait for writers, or be about to clear them.
        while !self.are_traced(lines, unsettled) {
            // Who sees our lines sees that we are not done, too.
            unsettled.enter();
            let old = self.code_lines.fetch_or(lines, Ordering::SeqCst);
            if old == 0 || old & lines != lines && self.shared.swap(0, Ordering::SeqCst) != 0 {
                everybody.write_protect();
                waited = true;
            }
            unsettled.leave();
            while unsettled.quiet().is_none() {
                yield_now();
            }
        }
        waited
    }

    /// Tells everybody that code in `lines` changed, then traces them no more.
    pub fn clear(&self, lines: u64, unsettled: &Unsettled, everybody: &impl Everybody) {
        unsettled.enter();
        // The version changes before the lines are cleared: whoever finds the line untraced and gets a fast
        // permission has already made every older decoding stale.
        self.version.fetch_add(1, Ordering::SeqCst);
        everybody.code_changed(lines);
        self.code_lines.fetch_and(!lines, Ordering::SeqCst);
        unsettled.leave();
    }

    /// After a slow write to `lines`; true if code was hit.
    pub fn note_write(&self, lines: u64, unsettled: &Unsettled, everybody: &impl Everybody) -> bool {
        fence(Ordering::SeqCst);
        let hit = self.lines() & lines != 0;
        if hit {
            self.clear(lines, unsettled, everybody);
        }
        hit
    }

    /// From now on lines that are not traced may be written after a look at them.
    pub fn share(&self) {
        self.shared.store(1, Ordering::SeqCst);
    }

    /// Whether [`PageTrace::share`] holds.
    pub fn is_shared(&self) -> bool {
        self.shared.load(Ordering::SeqCst) != 0
    }
}
