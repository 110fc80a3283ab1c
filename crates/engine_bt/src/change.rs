//! Code that changes: what becomes of fragments whose guest code was written.
//!
//! A write to traced lines suspends the fragments that depend on them; what is wanted again is compared with memory first. A place where this
//! happens often gets a fragment that checks itself and needs no trace ([decision 0017]); when it has not changed for long, it is traced again.
//!
//! Why no change is missed: a fragment is live only if its lines were traced before its bytes were compared, and every write to them from then on is
//! told to this vCPU, which suspends it before it enters the cache again (INV-SMC-1).
//!
//! [decision 0017]: ../../../docs/decisions/0017-code-that-changes.md

use bt::Checked;
use guestmem::{Gfn, Gpa};
use x86_interp::holder::ALL_FRAMES;

use crate::cache::{Key, State};
use crate::{BtVcpu, frame};

/// Frames whose innocent writes are counted, by hash.
pub const INNOCENT: usize = 256;
/// So many writes that hit no code let others pass.
const SHARE_AFTER: u8 = 8;
/// So many writes to a page's code, none of it executed in between, and the page is taken for data.
const DATA_AFTER: u8 = 3;

/// The counter of a fragment's entries. Those that share one are looked at more often.
const fn counter_of(fragment: u32) -> u8 {
    fragment.to_le_bytes()[0]
}

impl BtVcpu {
    /// Somebody (this vCPU, if `own`) wrote to `lines` of a frame that code was made from. No fragment runs. More may be told of than before.
    pub(crate) fn code_written(&mut self, gfn: Gfn, lines: u64, own: bool) {
        let count = if gfn == ALL_FRAMES {
            let mem = std::sync::Arc::clone(&self.interp.cpu().mem);
            self.cache.suspend_changed(|gfn| mem.code_version(gfn))
        } else {
            self.cache.suspend(gfn, lines)
        };
        self.bt.suspended += count as u64;
        if !own {
            return;
        }
        self.written_in_a_row = if self.written_last == gfn { self.written_in_a_row + 1 } else { 1 };
        self.written_last = gfn;
        if self.written_in_a_row >= DATA_AFTER && gfn != ALL_FRAMES {
            self.written_in_a_row = 0;
            let mem = std::sync::Arc::clone(&self.interp.cpu().mem);
            // A string instruction would come here at each line.
            if mem.is_traced(gfn) {
                mem.untrace(gfn);
            }
        }
    }

    /// Code of a frame is executed.
    pub(crate) fn note_code(&mut self, gfn: Gfn) {
        if self.written_last == gfn {
            self.written_in_a_row = 0;
        }
    }

    /// Makes a fragment that is wanted ready to be entered. False: it is gone.
    pub(crate) fn make_ready(&mut self, fragment: u32) -> bool {
        if self.cache.is_ready(fragment) {
            return true;
        }
        let unchanged = self.cache.state(fragment) != State::Suspended || self.compare(fragment);
        if !unchanged && let Some(key) = self.cache.key(fragment) {
            self.adapt.forget(key.gfn);
        }
        if !unchanged || !self.cache.resume(fragment) {
            self.cache.discard(fragment);
            return false;
        }
        self.note_moved(fragment);
        true
    }

    /// Whether a suspended fragment's bytes are the same, and traced again.
    fn compare(&mut self, fragment: u32) -> bool {
        let Some((key, source)) = self.cache.source(fragment) else { return false };
        self.note_code(key.gfn);
        self.places.note_change(&key);
        if self.places.changes_often(&key) {
            // The next one will check itself.
            self.bt.dropped += 1;
            return false;
        }
        let cpu = self.interp.cpu();
        cpu.trace_code(key.gfn, source.lines());
        cpu.trace_code(key.second, 1);
        let unchanged = source.is_unchanged(&cpu.mem, &key, 0);
        self.apply_events();
        self.bt.resumed += u64::from(unchanged);
        self.bt.dropped += u64::from(!unchanged);
        unchanged
    }

    /// What a fragment at `key` that checks itself needs to know. `fragment`: the number that it gets.
    pub(crate) fn check_of(&mut self, key: &Key, fragment: u32) -> Option<Checked> {
        let cpu = self.interp.cpu();
        let page = cpu.mem.page(key.gfn)?;
        let host = (cpu.mem.host_base() as u64).wrapping_add(page.hva.0);
        self.bt.checked += 1;
        Some(Checked { host, counter: counter_of(fragment) })
    }

    /// A fragment that checks itself left: its bytes differ from those that it was made of, or it is time to see whether they still change.
    pub(crate) fn look_at(&mut self, fragment: u32) {
        let mem = std::sync::Arc::clone(&self.interp.cpu().mem);
        let Some((key, source)) = self.cache.source(fragment) else { return };
        let Some(check) = self.cache.check_mut(fragment) else { return };
        if !source.is_unchanged(&mem, &key, check.variable) {
            self.bt.check_failures += 1;
            self.cache.discard(fragment);
            return;
        }
        let sample = source.sample(&mem, &key);
        let rested = check.sample.replace(sample) == Some(sample);
        let window = self.places.window(&key);
        if rested && !self.knobs.check {
            self.bt.acquitted += 1;
            self.places.acquit(&key);
            self.cache.discard(fragment);
        }
        self.frame.set32(frame::COUNTERS + 4 * i32::from(counter_of(fragment)), window);
    }

    /// A write of translated code did not hit code, but its page is traced.
    pub(crate) fn note_innocent(&mut self, gpa: Gpa) {
        let gfn = gpa.gfn();
        #[expect(clippy::cast_possible_truncation, reason = "masked")]
        let slot = (gfn.0 ^ gfn.0 >> 8) as usize & (INNOCENT - 1);
        let count = &mut self.innocent[slot];
        *count = count.saturating_add(1);
        if *count >= SHARE_AFTER {
            *count = 0;
            self.bt.shared_pages += 1;
            self.interp.cpu().mem.share_page(gfn);
        }
    }

    /// Nothing leads to what was emptied (INV-TC-3).
    pub(crate) fn wipe_emptied(&mut self) {
        for range in self.cache.take_emptied() {
            self.tables.forget_code(&range);
            self.note_gone(&range);
        }
    }
}
