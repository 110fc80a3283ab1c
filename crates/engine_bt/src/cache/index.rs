//! Fragments by the hash of what they are known by: open addressing, eight bytes for each.
//!
//! Whoever looks up touches one line of the table, and the entries of those whose hash is the same in 32 bits: the one that he wants. (A table of numbers
//! alone asks the entries more often, all of them when it grows, and keeps its control bytes elsewhere.)

#![expect(clippy::cast_possible_truncation, reason = "hashes and numbers have 32 bits")]

use crate::huge::{PAGE, Table};

/// Places at first.
const FIRST: usize = 1 << 13;

/// Numbers by hash.
pub struct Index {
    /// The hash in the upper half and the number plus one in the lower; 0 is an empty place. A power of two of them, never full.
    table: Table<1>,
    len: usize,
}

impl Index {
    /// An empty index.
    ///
    /// # Errors
    /// When the host has no memory.
    pub fn new() -> rustix::io::Result<Self> {
        Ok(Self { table: Self::places(FIRST)?, len: 0 })
    }

    fn places(count: usize) -> rustix::io::Result<Table<1>> {
        Table::new(count, count * size_of::<u64>() >= PAGE)
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.table.len() * size_of::<u64>()
    }

    const fn packed(hash: u64, number: u32) -> u64 {
        hash << 32 | (number as u64 + 1)
    }

    /// The first place for a hash: that of its lowest bits.
    fn home(&self, hash: u64) -> usize {
        hash as u32 as usize & (self.table.len() - 1)
    }

    const fn number(place: u64) -> u32 {
        (place as u32).wrapping_sub(1)
    }

    /// The number with this hash that `is_it`.
    #[inline]
    pub fn find(&self, hash: u64, is_it: impl Fn(u32) -> bool) -> Option<u32> {
        let mask = self.table.len() - 1;
        let mut at = self.home(hash);
        loop {
            let [place] = self.table[at];
            if place == 0 {
                return None;
            }
            if place >> 32 == hash & 0xffff_ffff && is_it(Self::number(place)) {
                return Some(Self::number(place));
            }
            at = (at + 1) & mask;
        }
    }

    /// Adds a number that is not there. Without memory for more it is not added, and will not be found.
    pub fn insert(&mut self, hash: u64, number: u32) {
        let places = self.table.len();
        if self.len >= places / 4 * 3 {
            match Self::places(places * 2) {
                Ok(table) => self.move_to(table),
                Err(_) if self.len + 1 == places => return,
                Err(_) => {}
            }
        }
        self.put(Self::packed(hash, number));
        self.len += 1;
    }

    fn move_to(&mut self, table: Table<1>) {
        let old = std::mem::replace(&mut self.table, table);
        old.iter().filter(|[place]| *place != 0).for_each(|[place]| self.put(*place));
    }

    fn put(&mut self, packed: u64) {
        let mask = self.table.len() - 1;
        let mut at = self.home(packed >> 32);
        while self.table[at] != [0] {
            at = (at + 1) & mask;
        }
        self.table[at] = [packed];
    }

    /// Takes a number out, if it is there. Those behind it move up, so that nobody meets a gap before what he looks for.
    pub fn remove(&mut self, hash: u64, number: u32) {
        let mask = self.table.len() - 1;
        let wanted = Self::packed(hash, number);
        let mut gap = self.home(hash);
        while self.table[gap] != [wanted] {
            if self.table[gap] == [0] {
                return;
            }
            gap = (gap + 1) & mask;
        }
        let mut at = gap;
        loop {
            at = (at + 1) & mask;
            let [place] = self.table[at];
            if place == 0 {
                break;
            }
            // Who is at home between the gap and here stays.
            let home = self.home(place >> 32);
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(gap) & mask) {
                self.table[gap] = [place];
                gap = at;
            }
        }
        self.table[gap] = [0];
        self.len -= 1;
    }

    /// Takes all out.
    pub fn clear(&mut self) {
        self.table.fill([0]);
        self.len = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_finds_what_is_in_it_and_nothing_else() {
        let mut index = Index::new().unwrap();
        let mut model = std::collections::HashMap::new();
        let mut seed = 0x1234_5678_9abc_def1_u64;
        for round in 0..60_000_u32 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let number = (seed >> 32) as u32 % 20_000;
            // Many share a home, and some all bits.
            let hash = u64::from(number % 3000) * 7;
            if model.remove(&number).is_some() {
                index.remove(hash, number);
                index.remove(hash, number);
            } else {
                index.insert(hash, number);
                model.insert(number, hash);
            }
            if round % 1000 == 999 {
                for number in 0..20_000 {
                    let hash = u64::from(number % 3000) * 7;
                    let found = index.find(hash, |n| n == number);
                    assert_eq!(found, model.get(&number).map(|_| number));
                }
            }
        }
        assert_eq!(index.len, model.len());
        assert!(index.bytes() > FIRST * 8, "it grew");
        index.clear();
        assert_eq!(index.find(7, |_| true), None);
    }
}
