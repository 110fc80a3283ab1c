//! Guest memory as the debugger sees it: by the vCPU's own translation, with every right, and without a trace. Neither
//! accessed and dirty bits change nor CR2, and devices are not touched (a read may have an effect), so only RAM and ROM are
//! there.

use std::convert::Infallible;

use guestmem::GuestMemory;
use x86::addr::{Gpa, Gva, PAGE_MASK, PAGE_SIZE};
use x86::paging::{Access, AccessKind, WalkMemory, walk};

use crate::debug::AddressSpace;

/// A read by the supervisor, SMAP overridden: what is mapped at all can be read so. Writes go by it too: a debugger may
/// write what the guest may not.
const ANY: Access = Access { kind: AccessKind::Read, user: false, ac: true };

/// Page tables that are only looked at.
struct Tables<'a>(&'a GuestMemory);

impl WalkMemory for Tables<'_> {
    type Fault = Infallible;

    fn step(&mut self, gpa: Gpa, _write: bool) -> Result<Gpa, Infallible> {
        Ok(gpa)
    }

    fn load32(&mut self, gpa: Gpa) -> u32 {
        self.0.load_gpa(gpa).unwrap_or(u32::MAX)
    }

    fn load64(&mut self, gpa: Gpa) -> u64 {
        self.0.load_gpa(gpa).unwrap_or(u64::MAX)
    }

    fn update(&mut self, _gpa: Gpa, _bytes: u8, _old: u64, _new: u64) -> bool {
        true
    }
}

impl AddressSpace {
    fn translate(&self, la: u64) -> Option<Gpa> {
        let la = la & self.mask;
        if self.mask == u64::MAX && !x86::bits::is_canonical(la) {
            return None;
        }
        walk(&mut Tables(&self.memory), &self.paging, Gva(la), ANY).ok().map(|t| t.gpa)
    }

    /// Pieces of a range that each lie in one page: linear address, range of the bytes.
    fn pieces(start: u64, len: usize) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
        let mut done = 0;
        std::iter::from_fn(move || {
            let la = start.wrapping_add(done as u64);
            #[expect(clippy::cast_possible_truncation, reason = "at most a page")]
            let room = (PAGE_SIZE - (la & PAGE_MASK)) as usize;
            let piece = done..len.min(done + room);
            done = piece.end;
            (!piece.is_empty()).then_some((la, piece))
        })
    }

    /// Reads at a linear address: what can be read, up to the first page that cannot.
    pub fn read(&self, start: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        for (la, piece) in Self::pieces(start, len) {
            match self.translate(la).and_then(|gpa| self.memory.hva(gpa)) {
                Some(hva) => self.memory.read_machine(hva, &mut data[piece]),
                None => {
                    data.truncate(piece.start);
                    break;
                }
            }
        }
        data
    }

    /// Writes at a linear address, all or nothing. Code that was decoded from there is stale then.
    pub fn write(&self, start: u64, data: &[u8]) -> bool {
        let place = |la| self.translate(la).and_then(|gpa| Some((gpa, self.memory.hva(gpa)?)));
        if Self::pieces(start, data.len()).any(|(la, _)| place(la).is_none()) {
            return false;
        }
        for (la, piece) in Self::pieces(start, data.len()) {
            if let Some((gpa, hva)) = place(la) {
                let bytes = &data[piece];
                self.memory.write_machine(hva, bytes);
                self.memory.note_write(gpa, bytes.len());
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_split_at_pages_and_wrap_at_the_top() {
        let pieces: Vec<_> = AddressSpace::pieces(0x1ffe, 0x1004).collect();
        assert_eq!(pieces, [(0x1ffe, 0..2), (0x2000, 2..0x1002), (0x3000, 0x1002..0x1004)]);
        let pieces: Vec<_> = AddressSpace::pieces(u64::MAX, 2).collect();
        assert_eq!(pieces, [(u64::MAX, 0..1), (0, 1..2)]);
        assert_eq!(AddressSpace::pieces(5, 0).count(), 0);
    }
}
