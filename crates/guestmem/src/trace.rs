//! Traces: noticing writes to pages that decoded or translated code was made from.
//!
//! Every guest page has a version and a mask of its 64-byte lines that code was decoded from.
//!
//! - Who decodes calls [`GuestMemory::trace_code`] for the lines first, then reads the bytes, and remembers the version.
//! - While a page has traced lines, no vCPU holds a fast permission to write it (INV-TR-1): setting the first
//!   line invalidates them with [`Invalidation::WriteProtect`], and granting one checks [`GuestMemory::is_traced`].
//! - Slow writers store, then call [`GuestMemory::note_write`]. If traced lines were hit the version changes, the lines hit
//!   are cleared, and every holder is told which they were. Who keeps one version for a page finds its decoded code stale;
//!   who knows on which lines each piece of code depends drops only those that depend on a line that was hit.
//! - A page where writes often go to lines without code becomes [`GuestMemory::share_page`]d: translated code may write it without
//!   the slow way if it looks at the lines before each write ([`TRACE_LINES`] in [`GuestMemory::trace_table`]).
//!
//! Why no write is missed: the decoder sets its line (a locked OR, a full fence) before it reads the bytes; a slow writer
//! stores the bytes and fences before it reads the lines. So either the decoder sees the new bytes or the writer sees the
//! line (Dekker). Fast writers are excluded by INV-TR-1, whose invalidation waits for the other vCPU's
//! next instruction boundary. Lines are cleared after every holder was told (INV-TR-3): who finds one cleared has been told, and drops his code before
//! he writes there himself; who traces lines meanwhile waits until they are cleared, and traces them again. Writers that look at the lines first are excluded in the same manner: the next new
//! line of a shared page ends the sharing and is followed by that wait (INV-TR-2), after which all of them have written what they looked up before.
//! All this stands in [`crate::protocol`], where a model checker tries every order of it.

use crate::protocol::Everybody;
use crate::{Gfn, Gpa, GuestMemory, Invalidation};

/// Bytes in a traced line.
pub const LINE: u64 = 64;

/// Bytes from one frame's entry of [`GuestMemory::trace_table`] to the next.
pub const TRACE_STRIDE: usize = size_of::<crate::map::Entry>();
/// Where in it the mask of the lines with code stands, eight bytes.
pub const TRACE_LINES: usize = std::mem::offset_of!(crate::map::Entry, trace.code_lines);
/// Where in it stands whether lines without code may be written after a look at the mask, four bytes.
pub const TRACE_SHARED: usize = std::mem::offset_of!(crate::map::Entry, trace.shared);

/// The mask of the lines that `len_bytes` (at least 1) from `offset` touch, cut off at the end of the page.
#[must_use]
pub const fn lines(offset: usize, len_bytes: usize) -> u64 {
    let first = offset as u64 / LINE;
    let end = offset as u64 + len_bytes as u64 - 1;
    let last = if end > 4095 { 63 } else { end / LINE };
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

/// Everybody, about one frame.
struct Frame<'a> {
    mem: &'a GuestMemory,
    gfn: Gfn,
    /// Who has seen to it himself.
    me: Option<u64>,
}

impl Everybody for Frame<'_> {
    fn write_protect(&self) {
        self.mem.invalidate(&(self.gfn..Gfn(self.gfn.0 + 1)), Invalidation::WriteProtect, self.me);
    }

    fn code_changed(&self, lines: u64) {
        self.mem.tell_code_changed(self.gfn, lines);
    }
}

impl GuestMemory {
    /// The version of the page's code; changes with each write to a traced line. 0 for what is not RAM.
    #[inline(always)]
    pub fn code_version(&self, gfn: Gfn) -> u32 {
        self.entry(gfn).map_or(0, |e| e.trace.version())
    }

    /// The lines of a page that are traced.
    pub fn traced_lines(&self, gfn: Gfn) -> u64 {
        self.entry(gfn).map_or(0, |e| e.trace.lines())
    }

    /// Whether `lines` of a page are traced, and everybody respects it; who clears them after this call began tells of it. True for what is not RAM.
    pub fn is_line_traced(&self, gfn: Gfn, lines: u64) -> bool {
        self.entry(gfn).is_none_or(|e| e.trace.are_traced(lines, &self.unsettled))
    }

    fn everybody(&self, gfn: Gfn, me: Option<u64>) -> Frame<'_> {
        Frame { mem: self, gfn, me }
    }

    /// Traces `lines` of a page for the holder `me`. Call before reading the bytes, and outside of the guest: it waits for other vCPUs if they may
    /// write those lines the fast way, and true means that `me` must take back its own permissions too.
    pub fn trace_code(&self, gfn: Gfn, lines: u64, me: Option<u64>) -> bool {
        let entry = self.entry(gfn);
        entry.is_some_and(|e| e.trace.trace(lines, &self.unsettled, &self.everybody(gfn, me)))
    }

    /// The page is code no more, as it seems: no line of it is traced from now on, and everybody is told that all of it changed.
    pub fn untrace(&self, gfn: Gfn) {
        if let Some(entry) = self.entry(gfn) {
            entry.trace.clear(u64::MAX, &self.unsettled, &self.everybody(gfn, None));
        }
    }

    /// From now on writes to lines of the page that are not traced need not take the slow way.
    pub fn share_page(&self, gfn: Gfn) {
        if let Some(entry) = self.entry(gfn) {
            entry.trace.share();
        }
    }

    /// Whether [`GuestMemory::share_page`] was called for the page.
    pub fn is_shared(&self, gfn: Gfn) -> bool {
        self.entry(gfn).is_some_and(|e| e.trace.is_shared())
    }

    /// Where the traces of all frames stand, [`TRACE_STRIDE`] bytes each: for engines that look at them in code of their own. Valid as long as
    /// the memory is.
    pub fn trace_table(&self) -> *const u8 {
        self.entries.as_ptr().cast()
    }

    /// Whether writes to the page must take the slow way.
    #[inline(always)]
    pub fn is_traced(&self, gfn: Gfn) -> bool {
        self.entry(gfn).is_some_and(|e| e.trace.lines() != 0)
    }

    /// After a slow write of `len_bytes` at `gpa` (within one page). True if code was hit.
    pub fn note_write(&self, gpa: Gpa, len_bytes: usize) -> bool {
        let gfn = gpa.gfn();
        let Some(entry) = self.entry(gfn) else { return false };
        let hit = lines(gpa.page_offset(), len_bytes.max(1));
        entry.trace.note_write(hit, &self.unsettled, &self.everybody(gfn, None))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

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

    #[test]
    fn note_write_clears_only_the_lines_hit() {
        let mem = GuestMemory::new(1 << 20).unwrap();
        let gfn = Gfn(3);
        mem.trace_code(gfn, 0b110, None);
        assert!(mem.note_write(Gpa(0x3040), 1));
        assert!(mem.is_traced(gfn));
        assert!(!mem.note_write(Gpa(0x3040), 1));
        assert!(mem.note_write(Gpa(0x3080), 1));
        assert!(!mem.is_traced(gfn));
    }

    #[derive(Default)]
    struct Told(std::sync::Mutex<Vec<(Gfn, u64)>>, std::sync::atomic::AtomicU32);

    impl crate::Holder for Told {
        fn invalidate(&self, _gfns: std::ops::Range<Gfn>, _what: Invalidation) {
            self.1.fetch_add(1, Ordering::SeqCst);
        }
        fn code_changed(&self, gfn: Gfn, lines: u64) {
            self.0.lock().unwrap().push((gfn, lines));
        }
        fn id(&self) -> u64 {
            7
        }
    }

    #[test]
    fn holders_are_told_the_lines_and_wait_for_a_new_one_of_a_shared_page() {
        let mem = GuestMemory::new(1 << 20).unwrap();
        let told = std::sync::Arc::new(Told::default());
        let holder: std::sync::Arc<dyn crate::Holder> = told.clone();
        mem.register(std::sync::Arc::downgrade(&holder));
        let waits = || told.1.load(Ordering::SeqCst);
        mem.trace_code(Gfn(2), 1, None);
        mem.trace_code(Gfn(2), 2, None);
        assert_eq!(waits(), 1);
        mem.share_page(Gfn(2));
        assert!(mem.is_line_traced(Gfn(2), 2) && !mem.is_line_traced(Gfn(2), 4));
        mem.trace_code(Gfn(2), 4, None);
        assert_eq!(waits(), 2);
        assert!(!mem.is_shared(Gfn(2)), "until it is earned again");
        mem.trace_code(Gfn(2), 8, None);
        assert_eq!(waits(), 2);
        mem.note_write(Gpa(0x2000 + 127), 2);
        assert_eq!(*told.0.lock().unwrap(), [(Gfn(2), 0b110)]);
    }
}
