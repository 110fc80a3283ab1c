//! What a fragment was made of: the guest bytes, by range and by a hash of them.
//!
//! When code is written, the fragments that depend on the lines hit are suspended, and compared with memory when they are wanted again. The hash has
//! 64 bits of a product of 128: two contents that meet in it by accident are not to be expected, and a guest that makes them
//! on purpose executes its own old code.

use bt::Fragment;
use guestmem::trace::lines;
use guestmem::{GuestMemory, Hva};

use crate::cache::{Key, NO_FRAME};

/// Ranges of a page that are kept apart; more are joined with what lies between.
const RANGES: usize = 4;

/// What is known of a fragment that checks itself.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// The hash of all its bytes, those that it takes from memory included, when it was last looked at; None: it was not.
    pub sample: Option<u64>,
    /// Bytes from its first that it takes from memory.
    pub variable: u128,
}

/// The bytes of a fragment.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    ranges: [(u16, u16); RANGES],
    /// Bytes at the start of the next page.
    second: u16,
    hash: u64,
}

impl Source {
    /// The bytes that `fragment` was made of: `page`'s, and some of `next` if it reaches there.
    pub fn new(fragment: &Fragment, page: &[u8; 4096], next: &[u8]) -> Self {
        let second = u16::try_from(next.len()).unwrap_or(u16::MAX);
        let mut s = Self { ranges: join(&fragment.ranges), second, hash: 0 };
        let mut bytes = s.gather(|(from, to), bytes| {
            bytes.extend_from_slice(page.get(usize::from(from)..usize::from(to)).unwrap_or_default());
        });
        bytes.extend_from_slice(next);
        s.hash = hash_fixed(&mut bytes, fragment.variable);
        s
    }

    /// The lines of its page that it depends on.
    pub fn lines(&self) -> u64 {
        let filled = self.ranges.iter().filter(|r| r.0 < r.1);
        filled.fold(0, |mask, &(from, to)| mask | lines(usize::from(from), usize::from(to - from)))
    }

    /// The bytes of all ranges; `read` appends those of one.
    fn gather(&self, read: impl Fn((u16, u16), &mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(512);
        self.ranges.iter().filter(|r| r.0 < r.1).for_each(|range| read(*range, &mut bytes));
        bytes
    }

    /// The bytes that are in memory now.
    fn now(&self, mem: &GuestMemory, key: &Key) -> Option<Vec<u8>> {
        let page = mem.page(key.gfn)?.hva;
        let mut bytes = self.gather(|(from, to), bytes| {
            let at = bytes.len();
            bytes.resize(at + usize::from(to - from), 0);
            mem.read_machine(Hva(page.0 + u64::from(from)), &mut bytes[at..]);
        });
        if key.second != NO_FRAME {
            let mut part = vec![0; usize::from(self.second)];
            mem.read_machine(mem.page(key.second)?.hva, &mut part);
            bytes.extend(part);
        }
        Some(bytes)
    }

    /// Whether memory holds what the fragment was made of, but for the bytes that it takes from there.
    pub fn is_unchanged(&self, mem: &GuestMemory, key: &Key, variable: u128) -> bool {
        self.now(mem, key).is_some_and(|mut bytes| hash_fixed(&mut bytes, variable) == self.hash)
    }

    /// The hash of all its bytes as they are now, to compare with [`Check::sample`].
    pub fn sample(&self, mem: &GuestMemory, key: &Key) -> u64 {
        self.now(mem, key).map_or(0, |bytes| hash(&bytes))
    }
}

/// The hash without the bytes that are taken from memory.
fn hash_fixed(bytes: &mut [u8], variable: u128) -> u64 {
    for (n, byte) in bytes.iter_mut().enumerate().take(128) {
        if variable >> n & 1 != 0 {
            *byte = 0;
        }
    }
    hash(bytes)
}

/// At most [`RANGES`] ranges that cover those given, ascending; empty ones at the end.
fn join(all: &[(u16, u16)]) -> [(u16, u16); RANGES] {
    let mut joined = Vec::with_capacity(all.len());
    joined.extend(all.iter().copied().filter(|r| r.0 < r.1));
    joined.sort_unstable();
    joined.dedup_by(|r, last| {
        let touches = r.0 <= last.1;
        last.1 = if touches { last.1.max(r.1) } else { last.1 };
        touches
    });
    while joined.len() > RANGES {
        let gap = |n: &usize| joined.get(n + 1).zip(joined.get(*n)).map_or(u16::MAX, |(b, a)| b.0 - a.1);
        let at = (0..joined.len() - 1).min_by_key(gap).unwrap_or(0);
        let (_, end) = joined.remove(at + 1);
        if let Some(r) = joined.get_mut(at) {
            r.1 = end;
        }
    }
    let mut ranges = [(0, 0); RANGES];
    ranges.iter_mut().zip(joined).for_each(|(to, from)| *to = from);
    ranges
}

/// Eight bytes at a time, each folded into a product of 128 bits.
fn hash(bytes: &[u8]) -> u64 {
    const A: u64 = 0x9e37_79b9_7f4a_7c15;
    const B: u64 = 0xd6e8_feb8_6659_fd93;
    let fold = |a: u64, b: u64| {
        let product = u128::from(a) * u128::from(b);
        #[expect(clippy::cast_possible_truncation, reason = "both halves are used")]
        let folded = product as u64 ^ (product >> 64) as u64;
        folded
    };
    let (whole, rest) = bytes.as_chunks::<8>();
    let mut last = [0; 8];
    last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    let words = whole.iter().chain([&last]).map(|c| u64::from_le_bytes(*c));
    fold(
        words.fold(bytes.len() as u64 ^ B, |h, w| fold(h ^ w ^ A, B.rotate_left(17) | 1) ^ w.rotate_left(32)),
        A,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn join_covers_what_is_given_in_few_ranges() {
        assert_eq!(join(&[(5, 9), (1, 3), (8, 12), (0, 0)]), [(1, 3), (5, 12), (0, 0), (0, 0)]);
        let many = [(0, 1), (10, 11), (12, 13), (30, 31), (50, 51), (90, 91)];
        assert_eq!(join(&many), [(0, 13), (30, 31), (50, 51), (90, 91)]);
    }

    #[test]
    fn hash_depends_on_every_byte_and_on_the_length() {
        let mut seen = std::collections::HashSet::new();
        let mut bytes = [0; 40];
        assert!(seen.insert(hash(&bytes)) && seen.insert(hash(&bytes[..39])));
        for n in 0..40 {
            for bit in 0..8 {
                bytes[n] = 1 << bit;
                assert!(seen.insert(hash(&bytes)), "byte {n}");
            }
            bytes[n] = 0;
        }
    }
}
