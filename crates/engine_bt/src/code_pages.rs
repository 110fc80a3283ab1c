//! Pages of guest code as they were read last, for the next fragment of them. Code that is translated is seldom in the host's caches, for the guest does
//! not read it, and a page has many fragments.
//!
//! INV-PAGES-1: a page that was kept need not be what is in memory: nobody tells of writes to lines that are not traced. So what a fragment begins with is
//! read again ([`FRESH`]), and everything that it was made of is compared once its lines are traced.

use guestmem::Gfn;

use crate::cache::NO_FRAME;

/// Bytes of a page.
pub type Bytes = Box<[u8; 4096]>;

/// Pages kept, a power of two.
const SLOTS: usize = 64;
/// So many bytes, from the line where a unit begins, are read again: nearly all units, and all that check themselves.
pub const FRESH: usize = 256;

const _: () = assert!(FRESH >= bt::unit::MAX_CHECKED_BYTES + 64 + bt::unit::MAX_LEN);

/// A page, and its version before it was read.
struct Slot {
    gfn: Gfn,
    version: u32,
    bytes: Option<Bytes>,
}

/// The pages kept.
pub struct CodePages(Vec<Slot>);

impl Default for CodePages {
    fn default() -> Self {
        Self((0..SLOTS).map(|_| Slot { gfn: NO_FRAME, version: 0, bytes: None }).collect())
    }
}

impl CodePages {
    fn slot(&mut self, gfn: Gfn) -> &mut Slot {
        #[expect(clippy::cast_possible_truncation, reason = "masked")]
        let slot = gfn.0 as usize & (SLOTS - 1);
        &mut self.0[slot]
    }

    /// Room for a frame's bytes, and whether they are in it.
    pub fn take(&mut self, gfn: Gfn, version: u32) -> (Bytes, bool) {
        let slot = self.slot(gfn);
        let kept = (slot.gfn, slot.version) == (gfn, version);
        match slot.bytes.take() {
            Some(bytes) => (bytes, kept),
            None => (Box::new([0; 4096]), false),
        }
    }

    /// Keeps what [`CodePages::take`] gave, filled.
    pub fn keep(&mut self, gfn: Gfn, version: u32, bytes: Bytes) {
        *self.slot(gfn) = Slot { gfn, version, bytes: Some(bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_is_kept_until_its_version_is_another_or_its_place_is_taken() {
        let mut pages = CodePages::default();
        let other = Gfn(7 + SLOTS as u64);
        let (mut bytes, kept) = pages.take(Gfn(7), 1);
        assert!(!kept);
        bytes[5] = 9;
        pages.keep(Gfn(7), 1, bytes);
        let (bytes, kept) = pages.take(Gfn(7), 1);
        assert!(kept && bytes[5] == 9);
        assert!(!pages.take(Gfn(7), 1).1, "somebody has it");
        pages.keep(Gfn(7), 1, bytes);
        let (bytes, kept) = pages.take(Gfn(7), 2);
        assert!(!kept);
        pages.keep(Gfn(7), 2, bytes);
        assert!(!pages.take(other, 2).1);
    }
}
