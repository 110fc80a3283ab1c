//! Where code memory has room: segments that are filled one after another and emptied one at a time.
//!
//! While one segment is filled, the next to be emptied is on probation: its fragments' entries lead out of the cache, and who is entered all the same
//! moves to the segment that is being filled. What is left is what nobody entered for so long. The next is the one with most dropped code, if
//! that is half of it, so that code that changes often takes its own space again and again; else the one that was filled longest ago.

/// How many segments code memory has, at most and at least.
const SEGMENTS: (usize, usize) = (4, 16);
/// A segment holds the largest fragment several times.
const SMALLEST: usize = 16 << 10;
/// Code begins here: a place of 0 is none.
const FIRST: usize = 16;

/// A part of code memory.
#[derive(Default)]
struct Segment {
    /// Bytes from its start that were given out.
    used: usize,
    /// Bytes of it that dropped fragments take.
    dead: usize,
    /// When it was opened, by [`Segments::openings`].
    opened: u64,
    /// Fragments put here; some may have moved away since.
    fragments: Vec<u32>,
}

/// All segments.
pub struct Segments {
    size: usize,
    segments: Vec<Segment>,
    current: usize,
    next: Option<usize>,
    openings: u64,
}

impl Segments {
    /// The segments of `len` bytes of code memory.
    pub fn new(len: usize) -> Self {
        let count = (len / SMALLEST).clamp(SEGMENTS.0, SEGMENTS.1);
        let mut s =
            Self { size: (len / count) & !15, segments: Vec::new(), current: 0, next: None, openings: 0 };
        s.segments.resize_with(count, Segment::default);
        s.clear();
        s
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        for s in &mut self.segments {
            *s = Segment::default();
        }
        self.current = 0;
        self.next = None;
        self.openings = 0;
        self.open(0);
    }

    fn open(&mut self, number: usize) {
        self.openings += 1;
        self.current = number;
        if let Some(s) = self.segments.get_mut(number) {
            *s = Segment {
                used: if number == 0 { FIRST } else { 0 },
                opened: self.openings,
                ..Segment::default()
            };
        }
    }

    /// Where `len` bytes for a fragment can be put in the segment that is being filled.
    pub fn room(&mut self, len: usize, fragment: u32) -> Option<usize> {
        let s = self.segments.get_mut(self.current)?;
        let at = s.used.next_multiple_of(16);
        if at.checked_add(len)? > self.size {
            return None;
        }
        s.used = at + len;
        s.fragments.push(fragment);
        Some(self.current * self.size + at)
    }

    /// Whether a fragment of this size can ever be put anywhere.
    pub const fn fits(&self, len: usize) -> bool {
        len + FIRST <= self.size
    }

    /// The segment that an offset in code memory lies in.
    pub const fn of(&self, at: usize) -> usize {
        at / self.size
    }

    /// Whether fragments at this offset are on probation.
    pub fn is_on_probation(&self, at: usize) -> bool {
        self.next == Some(self.of(at))
    }

    /// A fragment at `at` was dropped.
    pub fn note_dead(&mut self, at: usize, len: usize) {
        let number = self.of(at);
        if let Some(s) = self.segments.get_mut(number) {
            s.dead += len;
        }
    }

    /// The segment to fill next, and the fragments that were put there and must be gone before [`Segments::advance`].
    pub fn take_next(&mut self) -> (usize, Vec<u32>) {
        let unused = self.segments.iter().position(|s| s.opened == 0);
        let next = self.next.or(unused).unwrap_or((self.current + 1) % self.segments.len());
        let fragments = self.segments.get_mut(next).map(|s| std::mem::take(&mut s.fragments));
        (next, fragments.unwrap_or_default())
    }

    /// Fills segment `next` from now on. The fragments that are on probation from now on.
    pub fn advance(&mut self, next: usize) -> &[u32] {
        self.open(next);
        self.next = None;
        if self.segments.iter().any(|s| s.opened == 0) {
            return &[];
        }
        let others = || self.segments.iter().enumerate().filter(|(n, _)| *n != self.current);
        let waste = others().max_by_key(|(_, s)| s.dead).filter(|(_, s)| s.dead >= self.size / 2);
        self.next = waste.or_else(|| others().min_by_key(|(_, s)| s.opened)).map(|(n, _)| n);
        self.next.and_then(|n| self.segments.get(n)).map_or(&[], |s| &s.fragments)
    }

    /// Offsets of a segment in code memory.
    pub const fn range(&self, number: usize) -> std::ops::Range<usize> {
        number * self.size..(number + 1) * self.size
    }

    /// Bytes given out.
    pub fn used(&self) -> usize {
        self.segments.iter().map(|s| s.used).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(s: &mut Segments) {
        let mut n = 0;
        while s.room(1000, n).is_some() {
            n += 1;
        }
    }

    #[test]
    fn oldest_segment_is_next_when_all_are_filled() {
        let mut s = Segments::new(64 << 10);
        for expected in [1, 2, 3] {
            fill(&mut s);
            let (next, gone) = s.take_next();
            assert_eq!((next, gone.len()), (expected, 0));
            assert_eq!(s.advance(next).is_empty(), expected != 3);
        }
        assert!(s.is_on_probation(100) && !s.is_on_probation(20_000));
        fill(&mut s);
        let (next, gone) = s.take_next();
        assert_eq!((next, gone.len()), (0, 16));
    }

    #[test]
    fn segment_of_dropped_code_is_next_before_older_ones() {
        let mut s = Segments::new(64 << 10);
        for _ in 0..3 {
            fill(&mut s);
            let next = s.take_next().0;
            s.advance(next);
        }
        s.note_dead(2 * (16 << 10) + 100, 9000);
        let next = s.take_next().0;
        s.advance(next);
        assert_eq!(s.take_next().0, 2);
        assert!(s.range(2).contains(&s.room(10, 1).map_or(0, |_| 2 * (16 << 10))));
    }

    #[test]
    fn too_large_code_fits_nowhere() {
        let s = Segments::new(64 << 10);
        assert!(s.fits(16_000) && !s.fits(16 << 10));
    }
}
