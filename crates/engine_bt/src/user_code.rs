//! Where user code is, for every process at once: the table of code pages (which frame an address space has at a page, as the guest's tables
//! said), and behind it the table of fragments by frame and offset. A new process finds what others had translated as soon as its code
//! pages are known; each of them comes to Rust once, not each jump target.
//!
//! 16- and 32-bit code of every level is here too, because its kernels lie in the lower half, which an address-space switch empties. Rights are in the tag
//! of a code page, and in those of 16- and 32-bit fragments.
//!
//! Read by `trellis_bt_lookup_2` to `_5`. Fragments that reach into a second page are in neither: two pages decide about them.
//!
//! INV-TAB-2: an entry of the table of code pages was made from the guest's tables under the context number in its tag, and goes with the event
//! that takes that translation back. An entry of the table of fragments stays right until code memory is emptied (INV-TC-3): whatever
//! becomes of the fragment, its entry leads out of the cache or to where it moved (INV-TC-1).

#![expect(clippy::cast_possible_truncation, reason = "masked to the number of entries")]

use bt::{Variant, frame};
use guestmem::Gfn;

use crate::exec::Frame;
use crate::huge;

/// Tag, and what it stands for.
type Entry = [u64; 2];

/// Both tables.
pub struct UserCode {
    frame: Frame,
    pages: Box<[Entry]>,
    /// Dropped before the table that it works on.
    collapser: huge::Collapser,
    fragments: huge::Table<2>,
    busy: bool,
    /// Places in `fragments` that were filled, up to [`FEW`].
    filled: Vec<u32>,
}

/// So many fragments are forgotten one by one; more, all at once.
const FEW: usize = 4096;

impl UserCode {
    /// Empty tables.
    ///
    /// # Errors
    /// When the host has no memory.
    pub fn new(frame: Frame) -> rustix::io::Result<Self> {
        let pages = vec![[frame::NO_CODE_PAGE, 0]; frame::CODE_PAGE_ENTRIES as usize].into_boxed_slice();
        let fragments = huge::Table::new(frame::FRAGMENT_ENTRIES as usize, false)?;
        frame.set(frame::CODE_PAGES, pages.as_ptr() as u64);
        frame.set(frame::FRAGMENTS, fragments.as_ptr() as u64);
        let (filled, collapser) = (Vec::with_capacity(FEW), huge::Collapser::default());
        Ok(Self { frame, pages, collapser, fragments, busy: false, filled })
    }

    /// What fragments rely on from now on: those made for something else are not found.
    pub fn set_environment(&self, environment: u8) {
        self.frame.set(frame::FRAGMENT_TAG, frame::fragment_tag(environment));
    }

    /// The same for 16- and 32-bit code with these rights.
    pub fn set_legacy_environment(&self, variant: Variant, environment: u8) {
        let tag = frame::legacy_fragment_tag(environment, variant);
        self.frame.set(frame::LEGACY_FRAGMENT_TAGS + 8 * variant as i32, tag);
    }

    /// Remembers the frame of the code page at `rip` in the current address space for who has these rights, and the fragment there.
    pub fn set(&mut self, rip: u64, gfn: Gfn, code: u64, variant: Variant, legacy: bool) {
        let context = self.frame.get(frame::CONTEXT);
        let page = rip & !0xfff;
        if let Some(e) = self.pages.get_mut(frame::code_page_set(page, context) as usize) {
            let rights = if variant == Variant::User { 0 } else { frame::SUPERVISOR_PAGE };
            *e = [page | context | rights, gfn.0 << 12];
        }
        let address = gfn.0 << 12 | rip & 0xfff;
        let tags =
            if legacy { frame::LEGACY_FRAGMENT_TAGS + 8 * variant as i32 } else { frame::FRAGMENT_TAG };
        let tag = address | self.frame.get(tags);
        let set = frame::fragment_set(address) as usize;
        let Some([first, second]) =
            self.fragments.get_mut(set..set + 2).and_then(|s| s.as_chunks_mut().0.first_mut())
        else {
            return;
        };
        if first[0] != tag {
            *second = *first;
            if self.filled.len() < FEW {
                self.filled.push(set as u32);
            }
        }
        *first = [tag, code];
        if self.filled.len() == FEW && !std::mem::replace(&mut self.busy, true) {
            self.fragments.becomes_busy(&mut self.collapser);
        }
    }

    /// Where the 64-bit user code at `rip` in the current address space is, if both tables know it.
    pub fn find(&self, rip: u64) -> Option<u64> {
        self.find_tagged(rip, 0, frame::FRAGMENT_TAG)
    }

    /// Where the 16- or 32-bit code at `rip` in the current address space is for who has these rights, if both tables know it.
    pub fn find_legacy(&self, rip: u64, variant: Variant) -> Option<u64> {
        let rights = if variant == Variant::User { 0 } else { frame::SUPERVISOR_PAGE };
        self.find_tagged(rip, rights, frame::LEGACY_FRAGMENT_TAGS + 8 * variant as i32)
    }

    fn find_tagged(&self, rip: u64, rights: u64, tag_field: i32) -> Option<u64> {
        let context = self.frame.get(frame::CONTEXT);
        let page = rip & !0xfff;
        let [tag, at] = *self.pages.get(frame::code_page_set(page, context) as usize)?;
        if tag != page | context | rights {
            return None;
        }
        let address = at | rip & 0xfff;
        let tag = address | self.frame.get(tag_field);
        let set = frame::fragment_set(address) as usize;
        self.fragments.get(set..set + 2)?.iter().find(|f| f[0] == tag).map(|f| f[1])
    }

    /// Forgets what is at the page of an address, in every context.
    pub fn forget_page(&mut self, la: u64) {
        let page = la & !0xfff;
        // The low bits of the number are the page's, whatever the context.
        let first = frame::code_page_set(page, 0) as usize % frame::CODE_PAGE_CONTEXTS;
        let places = self.pages.iter_mut().skip(first).step_by(frame::CODE_PAGE_CONTEXTS);
        for e in places.filter(|e| e[0] & !(0xfff | frame::SUPERVISOR_PAGE) == page) {
            e[0] = frame::NO_CODE_PAGE;
        }
    }

    /// Forgets what is at every page.
    pub fn forget_pages(&mut self) {
        self.pages.fill([frame::NO_CODE_PAGE, 0]);
    }

    /// Forgets the fragments in a range of host addresses (INV-TC-3).
    pub fn forget_code(&mut self, range: &std::ops::Range<u64>) {
        let forget = |e: &mut Entry| {
            if range.contains(&e[1]) {
                *e = [0, 0];
            }
        };
        if self.filled.len() == FEW {
            return self.fragments.iter_mut().for_each(forget);
        }
        for &set in &self.filled {
            let place = self.fragments.get_mut(set as usize..set as usize + 2);
            place.into_iter().flatten().for_each(forget);
        }
    }

    /// Forgets all fragments.
    pub fn forget_fragments(&mut self) {
        if self.filled.len() == FEW {
            self.fragments.fill([0, 0]);
        }
        for set in self.filled.drain(..) {
            if let Some(place) = self.fragments.get_mut(set as usize..set as usize + 2) {
                place.fill([0, 0]);
            }
        }
    }
}
