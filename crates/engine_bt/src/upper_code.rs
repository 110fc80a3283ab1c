//! Pages of the upper half in which translated code is found by linear address: by jumps that tables know, and by links between pages.
//!
//! INV-UP-1: each such page is here with its frame. A kernel flushes everything more often than it moves its code (INVPCID of all contexts, CR4.PGE
//! cleared and set), and finding thousands of targets again costs far more than to walk the tables once for every page: if all of them
//! still lie where they did, code stays known, as if it had been looked up right behind the flush.

use guestmem::Gfn;
use rustc_hash::FxHashMap;

/// Pages remembered at most.
const MAX_PAGES: usize = 1 << 14;

/// Where a page of code was when it was last looked up.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Place {
    gfn: Gfn,
    user: bool,
}

/// The pages.
#[derive(Debug, Default)]
pub struct UpperCode {
    pages: FxHashMap<u64, Place>,
    /// Not all of them are here, or one of them is in two frames.
    lost: bool,
}

impl UpperCode {
    /// Code in the page at `la`, executed with `user`'s rights, was found in a frame.
    pub fn note(&mut self, la: u64, gfn: Gfn, user: bool) {
        let place = Place { gfn, user };
        let page = la & !0xfff;
        if self.pages.len() >= MAX_PAGES && !self.pages.contains_key(&page) {
            self.lost = true;
            return;
        }
        self.lost |= self.pages.insert(page, place).is_some_and(|before| before != place);
    }

    /// Whether anything may be known of code in a page; and if so, that is not so any more.
    pub fn remove(&mut self, la: u64) -> bool {
        self.pages.remove(&(la & !0xfff)).is_some() || self.lost
    }

    /// Nothing is known of any.
    pub fn clear(&mut self) {
        self.pages.clear();
        self.lost = false;
    }

    /// Whether all pages are where they were; `find` says in which frame the page at an address is, for who has a user's rights or not.
    pub fn still(&self, mut find: impl FnMut(u64, bool) -> Option<Gfn>) -> bool {
        !self.lost && self.pages.iter().all(|(&page, place)| find(page, place.user) == Some(place.gfn))
    }
}

/// Where the mapping of code may have changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UpperChange {
    /// Nowhere.
    None,
    /// In the page at this address.
    Page(u64),
    /// In more than one page, or anywhere.
    Anything,
}

impl UpperChange {
    /// In this page too, if it is one of the upper half.
    pub const fn add(&mut self, la: u64) {
        let page = la & !0xfff;
        *self = match *self {
            same if page >> 63 == 0 => same,
            Self::None => Self::Page(page),
            Self::Page(other) if other == page => Self::Page(page),
            _ => Self::Anything,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: u64 = 0xffff_ffff_8123_4000;

    #[test]
    fn pages_are_still_there_until_one_moves_or_goes() {
        let mut code = UpperCode::default();
        code.note(PAGE + 0x123, Gfn(7), false);
        code.note(PAGE + 0x1000, Gfn(9), true);
        let map = |page, user| match (page, user) {
            (PAGE, false) => Some(Gfn(7)),
            (0xffff_ffff_8123_5000, true) => Some(Gfn(9)),
            _ => None,
        };
        assert!(code.still(map));
        assert!(!code.still(|page, user| map(page, user).filter(|gfn| gfn.0 != 9)));
        assert!(!code.still(|_, _| Some(Gfn(7))));
        assert!(code.remove(PAGE + 0x1fff) && !code.remove(PAGE + 0x1fff));
        assert!(code.still(|_, _| Some(Gfn(7))));
    }

    #[test]
    fn changes_of_one_page_stay_one() {
        let mut change = UpperChange::None;
        change.add(0x7fff_ffff_f000);
        assert_eq!(change, UpperChange::None);
        change.add(PAGE + 5);
        change.add(PAGE + 9);
        assert_eq!(change, UpperChange::Page(PAGE));
        change.add(PAGE + 0x1000);
        assert_eq!(change, UpperChange::Anything);
    }

    #[test]
    fn page_in_two_frames_and_too_many_pages_are_not_still_there() {
        let mut code = UpperCode::default();
        code.note(PAGE, Gfn(7), false);
        code.note(PAGE, Gfn(8), false);
        assert!(!code.still(|_, _| Some(Gfn(8))));
        assert!(code.remove(PAGE + 0x5000));
        code.clear();
        (0..=MAX_PAGES as u64).for_each(|n| code.note(PAGE.wrapping_sub(n << 12), Gfn(7), false));
        assert!(!code.still(|_, _| Some(Gfn(7))));
        code.clear();
        assert!(code.still(|_, _| None));
    }
}
