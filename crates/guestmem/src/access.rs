//! Reading and writing guest memory by machine or guest physical address.

#![expect(unsafe_code, reason = "turns bounds-checked offsets into raw accesses")]

use x86::addr::{PAGE_MASK, PAGE_SIZE};

use crate::scalar::{self, Scalar};
use crate::{Gpa, GuestMemory, Hva};

/// An access to guest physical memory hit something that is not RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no RAM behind guest physical address {:#x}", .0.0)]
pub struct Unbacked(pub Gpa);

impl GuestMemory {
    /// Loads from machine memory; zero outside of it (which no mapped page can cause, INV-GM-2).
    #[inline(always)]
    pub fn load<T: Scalar>(&self, hva: Hva) -> T {
        match self.pointer(hva, T::SIZE) {
            // SAFETY: `pointer` checked the bounds.
            Some(p) => unsafe { T::load(p) },
            None => T::default(),
        }
    }

    /// Stores to machine memory. The caller sees to traces.
    #[inline(always)]
    pub fn store<T: Scalar>(&self, hva: Hva, value: T) {
        if let Some(p) = self.pointer(hva, T::SIZE) {
            // SAFETY: `pointer` checked the bounds.
            unsafe { T::store(p, value) }
        }
    }

    /// LOCK CMPXCHG in machine memory: the value found, equal to `old` if `new` was stored.
    #[inline(always)]
    pub fn cmpxchg<T: Scalar>(&self, hva: Hva, old: T, new: T) -> T {
        match self.pointer(hva, T::SIZE) {
            // SAFETY: `pointer` checked the bounds.
            Some(p) => unsafe { T::cmpxchg(p, old, new) },
            None => T::default(),
        }
    }

    /// LOCK CMPXCHG16B in machine memory at a 16-byte boundary; the value found.
    pub fn cmpxchg16(&self, hva: Hva, old: u128, new: u128) -> u128 {
        match self.pointer(hva, 16) {
            // SAFETY: `pointer` checked the bounds; the mapping is page-aligned, so the offset decides alignment.
            Some(p) if hva.0 & 15 == 0 => unsafe { scalar::cmpxchg16b(p, old, new) },
            _ => 0,
        }
    }

    /// Copies `len` bytes within machine memory, upwards byte by byte as REP MOVSB does. Nothing if out of bounds.
    pub fn copy_machine(&self, dst: Hva, src: Hva, len: usize) {
        if let (Some(d), Some(s)) = (self.pointer(dst, len), self.pointer(src, len)) {
            // SAFETY: `pointer` checked the bounds of both.
            unsafe { scalar::copy_within(d, s, len) }
        }
    }

    /// Fills `len` bytes of machine memory. Nothing if out of bounds.
    pub fn fill_machine(&self, dst: Hva, len: usize, value: u8) {
        if let Some(d) = self.pointer(dst, len) {
            // SAFETY: `pointer` checked the bounds.
            unsafe { scalar::fill(d, len, value) }
        }
    }

    /// Copies out of machine memory. Nothing if out of bounds.
    pub fn read_machine(&self, src: Hva, data: &mut [u8]) {
        if let Some(s) = self.pointer(src, data.len()) {
            // SAFETY: `pointer` checked the bounds.
            unsafe { scalar::copy_out(s, data) }
        }
    }

    /// Copies into machine memory. Nothing if out of bounds. The caller sees to traces.
    pub fn write_machine(&self, dst: Hva, data: &[u8]) {
        if let Some(d) = self.pointer(dst, data.len()) {
            // SAFETY: `pointer` checked the bounds.
            unsafe { scalar::copy_in(d, data) }
        }
    }

    /// Reads RAM page by page.
    ///
    /// # Errors
    /// At the first byte that is not RAM; what lies before it has been read.
    pub fn read(&self, gpa: Gpa, data: &mut [u8]) -> Result<(), Unbacked> {
        let mut at = gpa;
        let mut rest = data;
        while !rest.is_empty() {
            let hva = self.hva(at).ok_or(Unbacked(at))?;
            let (now, later) = rest.split_at_mut(rest.len().min(room(at)));
            self.read_machine(hva, now);
            at = at.add(now.len() as u64);
            rest = later;
        }
        Ok(())
    }

    /// Writes RAM page by page as a device would: traces are honoured, ROM is not written.
    ///
    /// # Errors
    /// At the first byte that is not RAM; what lies before it has been written.
    pub fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), Unbacked> {
        let mut at = gpa;
        let mut rest = data;
        while !rest.is_empty() {
            let page = self.page(at.gfn()).ok_or(Unbacked(at))?;
            let (now, later) = rest.split_at(rest.len().min(room(at)));
            if page.writable {
                self.write_machine(Hva(page.hva.0 | at.0 & PAGE_MASK), now);
                self.note_write(at, now.len());
            }
            at = at.add(now.len() as u64);
            rest = later;
        }
        Ok(())
    }

    /// Fills RAM, as [`GuestMemory::write`].
    ///
    /// # Errors
    /// At the first byte that is not RAM.
    pub fn fill(&self, gpa: Gpa, len: u64, value: u8) -> Result<(), Unbacked> {
        let block = [value; 4096];
        let mut done = 0;
        while done < len {
            let at = gpa.add(done);
            let now = (len - done).min(room(at) as u64);
            self.write(at, &block[..usize::try_from(now).unwrap_or(0)])?;
            done += now;
        }
        Ok(())
    }

    /// Loads a little-endian integer from RAM; it must not cross a page.
    pub fn load_gpa<T: Scalar>(&self, gpa: Gpa) -> Option<T> {
        Some(self.load(self.hva(gpa)?))
    }
}

/// Bytes from `gpa` to the end of its page.
fn room(gpa: Gpa) -> usize {
    usize::try_from(PAGE_SIZE - (gpa.0 & PAGE_MASK)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Gfn, HOLE_END};

    #[test]
    fn read_crossing_pages_gives_what_was_written() {
        let mem = GuestMemory::new(1 << 20).unwrap();
        let data: Vec<u8> = (0..9000u32).map(|i| i.to_le_bytes()[0]).collect();
        mem.write(Gpa(4000), &data).unwrap();
        let mut back = vec![0; 9000];
        mem.read(Gpa(4000), &mut back).unwrap();
        assert_eq!(back, data);
        assert_eq!(mem.load_gpa::<u32>(Gpa(4001)), Some(0x0403_0201));
    }

    #[test]
    fn vga_window_and_end_are_no_ram() {
        let mem = GuestMemory::new(2 << 20).unwrap();
        assert_eq!(mem.write(Gpa(0x9_fffe), &[1; 4]), Err(Unbacked(Gpa(0xa_0000))));
        assert_eq!(mem.read(Gpa(2 << 20), &mut [0; 1]), Err(Unbacked(Gpa(2 << 20))));
        assert!(mem.page(Gfn(u64::MAX >> 12)).is_none());
    }

    #[test]
    fn ram_above_the_hole_is_reachable() {
        let mem = GuestMemory::new((3 << 30) + (1 << 20)).unwrap();
        mem.write(Gpa(HOLE_END + 8), &[7]).unwrap();
        assert_eq!(mem.load_gpa::<u8>(Gpa(HOLE_END + 8)), Some(7));
        assert!(mem.page(Gpa(0xC000_0000).gfn()).is_none());
    }

    #[test]
    fn rom_ignores_writes() {
        let mem = GuestMemory::new(1 << 20).unwrap();
        mem.write(Gpa(0xf_0000), &[1]).unwrap();
        mem.set_read_only(Gfn(0xf0), true);
        mem.write(Gpa(0xf_0000), &[2]).unwrap();
        assert_eq!(mem.load_gpa::<u8>(Gpa(0xf_0000)), Some(1));
    }

    #[test]
    fn cmpxchg16_exchanges_when_equal() {
        let mem = GuestMemory::new(4096).unwrap();
        assert_eq!(mem.cmpxchg16(Hva(16), 0, 5 << 64 | 3), 0);
        assert_eq!(mem.cmpxchg16(Hva(16), 1, 0), 5 << 64 | 3);
        assert_eq!((mem.load::<u64>(Hva(16)), mem.load::<u64>(Hva(24))), (3, 5));
    }

    #[test]
    fn out_of_bounds_hva_is_harmless() {
        let mem = GuestMemory::new(4096).unwrap();
        mem.store::<u64>(Hva(4089), 1);
        mem.store::<u64>(Hva(u64::MAX), 1);
        assert_eq!(mem.load::<u64>(Hva(4092)), 0);
    }
}
