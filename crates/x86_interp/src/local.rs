//! Pages of the upper half that are not global. A kernel has few of them (Linux leaves some behind where it unmapped a page of its direct map and
//! mapped it again), but uses them in every address space, and each load of CR3 drops them (SDM 3A 4.10.4.1).
//!
//! They are walked again then, instead of being dropped: a processor may load any translation at any time, so what the tables still say
//! may stay (SDM 3A 4.10.2.3). Without this, a load of CR3 would have to drop the whole upper half with them.

use x86::addr::PAGE_MASK;
use x86::paging::Translation;

/// Pages remembered; if there are more, the upper half is dropped.
const MAX_PAGES: usize = 64;
/// Loads of CR3 that a page stays for, so that one that is used no more ends being walked again.
const MAX_TURNS: u32 = 256;

/// A page with entries.
#[derive(Clone, Copy, Debug)]
pub struct LocalPage {
    /// Its linear address.
    pub la: u64,
    /// What its entries rely on.
    pub translation: Translation,
    /// Loads of CR3 that it has outlived.
    turns: u32,
}

impl LocalPage {
    /// Whether its entries may stay, now that the tables say `now`.
    pub fn agrees(&self, now: &Translation) -> bool {
        let was = &self.translation;
        let rights = |t: &Translation| (t.page_shift, t.user, t.writable, t.executable, t.global);
        was.gpa.gfn() == now.gpa.gfn() && rights(was) == rights(now) && (now.dirty || !was.dirty)
    }
}

/// The pages with entries.
#[derive(Debug, Default)]
pub struct LocalPages {
    pages: Vec<LocalPage>,
    /// There were more.
    pub many: bool,
}

impl LocalPages {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty() && !self.many
    }

    /// An entry was made for `la`.
    pub fn add(&mut self, la: u64, translation: &Translation) {
        let la = la & !PAGE_MASK;
        let room = self.pages.len() < MAX_PAGES;
        match self.pages.iter_mut().find(|p| p.la == la) {
            // It may be dirty now, and was not.
            Some(page) if page.agrees(translation) => page.translation.dirty |= translation.dirty,
            None if room => self.pages.push(LocalPage { la, translation: *translation, turns: 0 }),
            // Two translations of one page may live side by side until the next flush: that drops both.
            _ => self.many = true,
        }
    }

    /// The page has no entries any more.
    pub fn remove(&mut self, la: u64) {
        self.pages.retain(|p| p.la != la & !PAGE_MASK);
    }

    /// All pages, each of which is to be walked again and [`LocalPages::keep`] told, or dropped.
    pub fn take(&mut self) -> Vec<LocalPage> {
        self.many = false;
        std::mem::take(&mut self.pages)
    }

    /// The entries of a page stay. False: it has stayed for long.
    pub fn keep(&mut self, page: LocalPage) -> bool {
        let stays = page.turns < MAX_TURNS;
        if stays {
            self.pages.push(LocalPage { turns: page.turns + 1, ..page });
        }
        stays
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86::addr::Gpa;

    const LA: u64 = 0xffff_8000_0000_5000;

    fn at(gpa: u64, dirty: bool) -> Translation {
        let rights = (true, true);
        Translation {
            gpa: Gpa(gpa),
            page_shift: 12,
            user: false,
            writable: rights.0,
            dirty,
            executable: rights.1,
            global: false,
        }
    }

    #[test]
    fn page_agrees_with_what_its_entries_rely_on_only() {
        let mut pages = LocalPages::default();
        pages.add(LA + 8, &at(0x1008, false));
        pages.add(LA, &at(0x1000, true));
        let all = pages.take();
        assert_eq!((all.len(), all[0].la), (1, LA));
        assert!(all[0].agrees(&at(0x1ff8, true)));
        assert!(!all[0].agrees(&at(0x1000, false)), "an entry may have the right to write");
        assert!(!all[0].agrees(&at(0x2000, true)));
        assert!(!all[0].agrees(&Translation { writable: false, ..at(0x1000, true) }));
        assert!(!all[0].agrees(&Translation { global: true, ..at(0x1000, true) }));
    }

    #[test]
    fn too_many_pages_and_two_translations_of_one_are_many() {
        let mut pages = LocalPages::default();
        (0..MAX_PAGES as u64).for_each(|n| pages.add(LA + (n << 12), &at(n << 12, false)));
        assert!(!pages.many);
        pages.add(LA - 0x1000, &at(0, false));
        assert!(pages.many);
        pages.take();
        assert!(pages.is_empty());
        pages.add(LA, &at(0x1000, false));
        pages.add(LA, &at(0x2000, false));
        assert!(pages.many);
    }

    #[test]
    fn page_that_is_used_no_more_ends() {
        let mut pages = LocalPages::default();
        pages.add(LA, &at(0x1000, false));
        let turns = (0..).take_while(|_| pages.take().into_iter().all(|p| pages.keep(p))).count();
        assert_eq!(turns, MAX_TURNS as usize);
        assert!(pages.is_empty());
    }
}
