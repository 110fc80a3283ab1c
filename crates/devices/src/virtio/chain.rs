//! A descriptor chain as a device uses it: private copies of its segments, and a cursor that reads or writes them.

use guestmem::{Gpa, GuestMemory, Unbacked};

/// Most segments a chain may have. Linux makes chains of up to its queue's size, or of a few hundred with indirect tables.
pub const MAX_SEGMENTS: u32 = 1024;

/// A piece of guest memory. It does not wrap around the address space, but it need not be RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub gpa: Gpa,
    /// Length in bytes; may be 0.
    pub len: u32,
}

/// A chain taken from a queue. Reused from one request to the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chain {
    /// Its first descriptor: the name under which it goes back.
    pub head: u16,
    /// What the device may read.
    pub readable: Vec<Segment>,
    /// What the device may write.
    pub writable: Vec<Segment>,
}

impl Chain {
    pub(super) fn begin(&mut self, head: u16) {
        self.head = head;
        self.readable.clear();
        self.writable.clear();
    }

    /// A cursor at the first readable byte.
    #[must_use]
    pub fn reader<'a>(&'a self, mem: &'a GuestMemory) -> Cursor<'a> {
        Cursor::new(mem, &self.readable)
    }

    /// A cursor at the first writable byte.
    #[must_use]
    pub fn writer<'a>(&'a self, mem: &'a GuestMemory) -> Cursor<'a> {
        Cursor::new(mem, &self.writable)
    }
}

/// A place in a list of segments.
#[derive(Clone)]
pub struct Cursor<'a> {
    mem: &'a GuestMemory,
    segments: &'a [Segment],
    /// Bytes of `segments[0]` that are done.
    offset: u32,
    /// Bytes left in all.
    left: u64,
}

impl<'a> Cursor<'a> {
    fn new(mem: &'a GuestMemory, segments: &'a [Segment]) -> Self {
        let left = segments.iter().map(|s| u64::from(s.len)).sum();
        Self { mem, segments, offset: 0, left }
    }

    /// Bytes from here to the end.
    #[must_use]
    pub const fn remaining(&self) -> u64 {
        self.left
    }

    /// Cuts the end off, so that `len` bytes (or what there is) remain.
    #[must_use]
    pub fn limited(mut self, len: u64) -> Self {
        self.left = self.left.min(len);
        self
    }

    /// The next piece of at most `len` bytes that lies in one segment.
    fn piece(&mut self, len: usize) -> Option<(Gpa, usize)> {
        if self.left == 0 {
            return None;
        }
        loop {
            let (first, rest) = self.segments.split_first()?;
            let room = first.len - self.offset;
            if room == 0 {
                (self.segments, self.offset) = (rest, 0);
                continue;
            }
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            let now = room.min(len).min(u32::try_from(self.left).unwrap_or(u32::MAX));
            let gpa = first.gpa.add(u64::from(self.offset));
            self.offset += now;
            self.left -= u64::from(now);
            return Some((gpa, now as usize));
        }
    }

    /// Reads until `data` is full or the segments end; says how many bytes there were.
    ///
    /// # Errors
    /// When a segment is not RAM.
    pub fn read(&mut self, data: &mut [u8]) -> Result<usize, Unbacked> {
        let mut done = 0;
        while done < data.len() {
            let Some((gpa, now)) = self.piece(data.len() - done) else { break };
            self.mem.read(gpa, &mut data[done..done + now])?;
            done += now;
        }
        Ok(done)
    }

    /// Writes until `data` or the segments end; says how many bytes went in.
    ///
    /// # Errors
    /// When a segment is not RAM.
    pub fn write(&mut self, data: &[u8]) -> Result<usize, Unbacked> {
        let mut done = 0;
        while done < data.len() {
            let Some((gpa, now)) = self.piece(data.len() - done) else { break };
            self.mem.write(gpa, &data[done..done + now])?;
            done += now;
        }
        Ok(done)
    }

    /// Moves on by `len` bytes, or to the end.
    pub fn skip(&mut self, len: u64) {
        let mut left = len.min(self.left);
        while left > 0 {
            let Some((_, now)) = self.piece(usize::try_from(left).unwrap_or(usize::MAX)) else { break };
            left -= now as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursor_over_pieces_and_empty_segments_is_seamless() {
        let mem = GuestMemory::new(1 << 16).unwrap();
        let segments =
            [(0xff0, 0x20), (0x3000, 0), (0x4000, 5)].map(|(gpa, len)| Segment { gpa: Gpa(gpa), len });
        let data: Vec<u8> = (1..=0x25).collect();
        assert_eq!(Cursor::new(&mem, &segments).write(&data), Ok(0x25));
        let mut back = [0; 64];
        let mut reader = Cursor::new(&mem, &segments).limited(0x24);
        reader.skip(3);
        assert_eq!(reader.remaining(), 0x21);
        assert_eq!(reader.read(&mut back), Ok(0x21));
        assert_eq!(back[..0x21], data[3..0x24]);
        assert_eq!(reader.read(&mut back), Ok(0));
    }

    #[test]
    fn cursor_outside_ram_is_an_error() {
        let mem = GuestMemory::new(1 << 16).unwrap();
        let segments = [Segment { gpa: Gpa(0xfff0), len: u32::MAX }];
        assert_eq!(Cursor::new(&mem, &segments).write(&[1; 17]), Err(Unbacked(Gpa(0x1_0000))));
        assert_eq!(Cursor::new(&mem, &segments).read(&mut [0; 17]), Err(Unbacked(Gpa(0x1_0000))));
    }
}
