//! Giving machine pages back to the host: the guest says that it does not need what is in them (a balloon, free page
//! reporting).
//!
//! To everybody else this is a device writing zeros: the machine page behind a guest page keeps its [`Hva`], an offset into
//! the memfd, so nobody's translation becomes wrong; the next access finds a page of zeros that the host's kernel puts there.
//! Code that was made of the page is stale, as after any write of a device ([`crate::trace`]).

use std::ops::Range;

use rustix::fs::{FallocateFlags, fallocate};
use x86::addr::PAGE_SIZE;

use crate::{Gfn, Gpa, GuestMemory, Hva};

impl GuestMemory {
    /// Empties the pages of `gfns` that are RAM (not ROM) and gives them back to the host; says how many they were. They read as
    /// zeros from now on.
    ///
    /// # Errors
    /// When the host refuses; pages before that are empty, those behind are as they were.
    pub fn discard(&self, gfns: Range<Gfn>) -> rustix::io::Result<u64> {
        let mut done = 0;
        let mut next = gfns.start.0;
        while next < gfns.end.0 {
            let Some(first) = self.discardable(next) else {
                // Beyond the last frame there is nothing; a guest may name a range of 2^52.
                if next >= self.entries.len() as u64 {
                    break;
                }
                next += 1;
                continue;
            };
            let more = (next + 1..gfns.end.0).zip(1..);
            let run = more.take_while(|&(gfn, n)| {
                self.discardable(gfn).is_some_and(|hva| hva.0 == first.0 + n * PAGE_SIZE)
            });
            let pages = 1 + run.count() as u64;
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(self.memfd(), flags, first.0, pages * PAGE_SIZE)?;
            for gfn in next..next + pages {
                self.note_write(Gpa(gfn * PAGE_SIZE), PAGE_BYTES);
            }
            done += pages;
            next += pages;
        }
        Ok(done)
    }

    fn discardable(&self, gfn: u64) -> Option<Hva> {
        self.page(Gfn(gfn)).filter(|page| page.writable).map(|page| page.hva)
    }
}

const PAGE_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::lines;

    #[test]
    fn discarded_pages_read_as_zeros_and_are_the_hosts() {
        let mem = GuestMemory::new(4 << 20).unwrap();
        mem.fill(Gpa(1 << 20), 3 << 20, 7).unwrap();
        let before = mem.resident_bytes();
        assert_eq!(mem.discard(Gfn(0x100)..Gfn(0x300)), Ok(0x200));
        assert_eq!(before - mem.resident_bytes(), 2 << 20);
        assert_eq!(mem.load_gpa::<u64>(Gpa(0x10_0ff8)), Some(0));
        assert_eq!(mem.load_gpa::<u8>(Gpa(0x30_0000)), Some(7));
        mem.write(Gpa(0x20_0000), &[1]).unwrap();
        assert_eq!(mem.load_gpa::<u16>(Gpa(0x20_0000)), Some(1));
    }

    #[test]
    fn code_of_a_discarded_page_is_stale() {
        let mem = GuestMemory::new(1 << 20).unwrap();
        mem.trace_code(Gfn(3), lines(128, 4), None);
        let before = mem.code_version(Gfn(3));
        mem.discard(Gfn(2)..Gfn(5)).unwrap();
        assert_ne!(mem.code_version(Gfn(3)), before);
        assert!(!mem.is_traced(Gfn(3)));
    }

    #[test]
    fn what_is_no_ram_is_passed_over() {
        let mem = GuestMemory::new(2 << 20).unwrap();
        mem.set_read_only(Gfn(0xf0), true);
        mem.set_read_only(Gfn(0x9f), true);
        // 0xa0..0xc0 is the VGA window, 0xf0 and 0x9f are ROM, 0x200 is the end.
        assert_eq!(mem.discard(Gfn(0x9e)..Gfn(0x201)), Ok(1 + 0x140 - 1));
        assert_eq!(mem.discard(Gfn(0x200)..Gfn(u64::MAX >> 12)), Ok(0));
        // A range that is none.
        assert_eq!(mem.discard(Gfn(5)..Gfn(3)), Ok(0));
    }
}
