//! Which pages may have entries in a table that can only be searched as a whole.

const WORDS: usize = PageFilter::WORDS;
/// Bits set at which it says yes too often.
const CROWDED: usize = WORDS * 64 / 8;

/// Hashed pages. It may say yes for a page that was never added, never no for one that was.
pub struct PageFilter {
    words: Box<[u64; WORDS]>,
    set: usize,
}

impl PageFilter {
    /// Words of a filter.
    pub const WORDS: usize = 1024;

    /// Where the words are, for assembly that looks as [`PageFilter::has`] does.
    pub fn address(&self) -> u64 {
        self.words.as_ptr() as u64
    }

    /// A filter without pages.
    pub fn new() -> Self {
        Self { words: Box::new([0; WORDS]), set: 0 }
    }

    const fn bit(address: u64) -> (usize, u64) {
        let hash = (address >> 12) ^ (address >> 28);
        ((hash >> 6) as usize & (WORDS - 1), 1 << (hash & 63))
    }

    /// Adds the page of an address.
    pub fn add(&mut self, address: u64) {
        let (word, bit) = Self::bit(address);
        self.set += usize::from(self.words[word] & bit == 0);
        self.words[word] |= bit;
    }

    /// Whether the page of an address may be one of those.
    pub fn has(&self, address: u64) -> bool {
        let (word, bit) = Self::bit(address);
        self.words[word] & bit != 0
    }

    /// Whether it is time to begin anew.
    pub const fn is_crowded(&self) -> bool {
        self.set > CROWDED
    }

    /// Forgets all pages.
    pub fn clear(&mut self) {
        self.words.fill(0);
        self.set = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_were_added_are_there_until_cleared() {
        let mut f = PageFilter::new();
        let pages = (0..20_000u64).map(|n| n << 12 | 0x7f00_0000_0123);
        assert!(pages.clone().all(|p| !f.has(p)));
        pages.clone().for_each(|p| f.add(p));
        assert!(pages.clone().all(|p| f.has(p & !0xfff)));
        assert!(f.is_crowded());
        f.clear();
        assert!(!f.is_crowded() && pages.clone().all(|p| !f.has(p)));
    }
}
