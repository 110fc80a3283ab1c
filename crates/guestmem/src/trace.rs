//! Traces: noticing writes to pages that decoded or translated code was made from.
//!
//! Every guest page has a version and a mask of its 64-byte lines that code was decoded from.
//!
//! - Who decodes calls [`GuestMemory::trace_code`] for the lines first, then reads the bytes, and remembers the version.
//! - While a page has traced lines, no vCPU holds a fast permission to write it (INV-TR-1): setting the first
//!   line invalidates them with [`Invalidation::WriteProtect`], and granting one checks [`GuestMemory::is_traced`].
//! - Slow writers store, then call [`GuestMemory::note_write`]. If a traced line was hit the version changes, all
//!   lines are cleared, and everybody's decoded code of that page is stale: its version differs.
//!
//! Why no write is missed: the decoder sets its line (a locked OR, a full fence) before it reads the bytes; a slow writer
//! stores the bytes and fences before it reads the lines. So either the decoder sees the new bytes or the writer sees the
//! line (Dekker). Fast writers are excluded by INV-TR-1, whose invalidation waits for the other vCPU's
//! next instruction boundary.

use std::sync::atomic::{Ordering, fence};

use crate::{Gfn, Gpa, GuestMemory, Invalidation};

/// Bytes in a traced line.
pub const LINE: u64 = 64;

/// The mask of the lines that `len_bytes` (at least 1) from `offset` touch, cut off at the end of the page.
#[must_use]
pub const fn lines(offset: usize, len_bytes: usize) -> u64 {
    let first = offset as u64 / LINE;
    let end = offset as u64 + len_bytes as u64 - 1;
    let last = if end > 4095 { 63 } else { end / LINE };
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

impl GuestMemory {
    /// The version of the page's code; changes with each write to a traced line. 0 for what is not RAM.
    #[inline(always)]
    pub fn code_version(&self, gfn: Gfn) -> u32 {
        self.entry(gfn).map_or(0, |e| e.version.load(Ordering::Acquire))
    }

    /// Traces `lines` of a page for the holder `me`. Call before reading the bytes.
    pub fn trace_code(&self, gfn: Gfn, lines: u64, me: Option<u64>) {
        let Some(entry) = self.entry(gfn) else { return };
        if entry.code_lines.load(Ordering::SeqCst) & lines == lines {
            return;
        }
        if entry.code_lines.fetch_or(lines, Ordering::SeqCst) == 0 {
            self.invalidate(&(gfn..Gfn(gfn.0 + 1)), Invalidation::WriteProtect, me);
        }
    }

    /// Whether writes to the page must take the slow way.
    #[inline(always)]
    pub fn is_traced(&self, gfn: Gfn) -> bool {
        self.entry(gfn).is_some_and(|e| e.code_lines.load(Ordering::SeqCst) != 0)
    }

    /// After a slow write of `len_bytes` at `gpa` (within one page). True if code was hit.
    pub fn note_write(&self, gpa: Gpa, len_bytes: usize) -> bool {
        let Some(entry) = self.entry(gpa.gfn()) else { return false };
        fence(Ordering::SeqCst);
        if entry.code_lines.load(Ordering::SeqCst) & lines(gpa.page_offset(), len_bytes.max(1)) == 0 {
            return false;
        }
        // The version changes before the lines are cleared: whoever finds the page untraced and gets a fast
        // permission has already made every older decoding stale.
        entry.version.fetch_add(1, Ordering::SeqCst);
        entry.code_lines.store(0, Ordering::SeqCst);
        self.tell_code_changed(gpa.gfn());
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_range_cover_it() {
        assert_eq!(lines(0, 1), 1);
        assert_eq!(lines(63, 2), 3);
        assert_eq!(lines(4095, 1), 1 << 63);
        assert_eq!(lines(4090, 15), 1 << 63);
        assert_eq!(lines(0, 4096), u64::MAX);
    }

    #[test]
    fn note_write_hit_line_changes_version() {
        let mem = GuestMemory::new(1 << 20).unwrap();
        let gfn = Gfn(3);
        let before = mem.code_version(gfn);
        mem.trace_code(gfn, lines(128, 4), None);
        assert!(mem.is_traced(gfn));
        assert!(!mem.note_write(Gpa(0x3000), 8));
        assert_eq!(mem.code_version(gfn), before);
        assert!(mem.note_write(Gpa(0x3000 + 130), 1));
        assert_ne!(mem.code_version(gfn), before);
        assert!(!mem.is_traced(gfn));
    }
}
