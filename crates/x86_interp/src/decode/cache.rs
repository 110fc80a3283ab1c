//! Decoded code by guest physical page and code size.
//!
//! A page's instructions are decoded in runs, from where control enters to an unconditional transfer, and the
//! instructions of a run stand next to each other. `index` says for each byte of the page which decoded instruction
//! starts there. A page whose version changed (see `guestmem::trace`) is stale and is decoded anew.

use std::collections::HashMap;

use guestmem::Gfn;

use crate::cpu::CodeSize;
use crate::ops::Op;

/// What a decoded page is known by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PageKey {
    /// The guest frame.
    pub gfn: Gfn,
    /// Default operand and address size.
    pub size: CodeSize,
}

/// The decoded code of one page.
pub struct Page {
    /// Its key.
    pub key: PageKey,
    /// The page's version when it was decoded.
    pub version: u32,
    /// For each byte: 1 + the number in `ops` of the instruction that starts there, or 0.
    index: Box<[u16; 4096]>,
    /// Decoded instructions, run by run.
    pub ops: Vec<Op>,
}

/// `ops` beyond this and the page starts again: indices are 16 bits, and jumps into the middle of instructions could
/// otherwise fill it without end.
const MAX_OPS: usize = 12_000;

impl Page {
    fn new(key: PageKey, version: u32) -> Self {
        Self { key, version, index: Box::new([0; 4096]), ops: Vec::new() }
    }

    /// The decoded instruction at `offset`.
    #[inline(always)]
    pub fn at(&self, offset: usize) -> Option<usize> {
        usize::from(self.index[offset & 4095]).checked_sub(1)
    }

    /// Forgets everything, under a new version.
    pub fn reset(&mut self, version: u32) {
        self.version = version;
        self.index.fill(0);
        self.ops.clear();
    }

    /// Whether another run fits.
    pub fn is_full(&self) -> bool {
        self.ops.len() > MAX_OPS
    }

    /// Adds an instruction that starts at `offset`.
    pub fn push(&mut self, offset: usize, op: Op) {
        self.ops.push(op);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "bounded by MAX_OPS plus one page of instructions"
        )]
        let number = self.ops.len() as u16;
        self.index[offset & 4095] = number;
    }

    /// Adds a pseudo-instruction that ends a run.
    pub fn end_run(&mut self, op: Op) {
        self.ops.push(op);
    }
}

/// Decoded pages; all are forgotten when there are too many.
pub struct DecodeCache {
    max_pages: usize,
    pages: Vec<Page>,
    by_key: HashMap<PageKey, usize>,
    total_ops: usize,
}

/// Some 48 bytes each: 100 MiB at most.
const MAX_TOTAL_OPS: usize = 2_000_000;
/// 8 KiB of index each: 64 MiB at most.
const MAX_PAGES: usize = 8192;

impl Default for DecodeCache {
    fn default() -> Self {
        Self { max_pages: MAX_PAGES, pages: Vec::new(), by_key: HashMap::new(), total_ops: 0 }
    }
}

impl DecodeCache {
    /// Keeps at most so many pages: for who translates what is executed often.
    pub const fn limit(&mut self, pages: usize) {
        self.max_pages = pages;
    }

    /// The number of the page, made if need be.
    pub fn page(&mut self, key: PageKey, version: u32) -> usize {
        if let Some(&at) = self.by_key.get(&key) {
            return at;
        }
        self.pages.push(Page::new(key, version));
        self.by_key.insert(key, self.pages.len() - 1);
        self.pages.len() - 1
    }

    /// A page by number.
    #[inline(always)]
    pub fn get(&self, at: usize) -> Option<&Page> {
        self.pages.get(at)
    }

    /// A page by number, to decode into.
    pub fn get_mut(&mut self, at: usize) -> Option<&mut Page> {
        self.pages.get_mut(at)
    }

    /// Tells that `ops` were decoded.
    pub fn count(&mut self, ops: usize) {
        self.total_ops += ops;
    }

    /// Whether it is time to forget everything.
    pub fn is_full(&self) -> bool {
        self.total_ops > MAX_TOTAL_OPS || self.pages.len() > self.max_pages
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.pages.clear();
        self.by_key.clear();
        self.total_ops = 0;
    }
}
