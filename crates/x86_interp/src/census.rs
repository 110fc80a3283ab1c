//! A count of what a hypervisor on hardware would have to do for this guest: for the cost model of `trellis bakeoff`.
//!
//! The interpreter sees every walk of the page tables and every system instruction; a census adds what it does not keep itself: how many
//! walks a TLB of [`TLB_ENTRIES`] would need, and what shadow page tables would have to be told. It is off unless somebody asks for it, and
//! changes nothing that the guest can see.
//!
//! - **Walks.** Entries filled into the interpreter's own TLB, which is larger, are taken back first in, first out, so that at most
//!   [`TLB_ENTRIES`] are valid. A large page counts as one entry of [`LARGE_ENTRIES`], although it is kept in pieces.
//! - **Shadow fills** (hidden page faults). A shadow table has an entry for each entry of a guest's table that was walked since it was last
//!   written; the first walk to one that is not there is a fill. So is the first write through an entry that was filled by a read of a page that
//!   is not dirty, for a shadow page table must see the guest's dirty bit set.
//! - **Traced writes.** Frames that walks come through are tables, and writes to them are traced. After [`FLOOD`] writes without a fill
//!   through it, a frame is taken for data: the rest of its shadow goes, and writes to it are free until it is walked again. That is
//!   the rule of Linux's KVM (`detect_write_flooding` in `arch/x86/kvm/mmu/mmu.c`), there for upper tables, here for all.
//!
//! Cost: a map's lookup for each walk and system instruction, nothing for accesses that hit the TLB.

use std::collections::{BTreeMap, HashMap, VecDeque};

use engine::Report;
use engine::report::{Breakdown, Unit};
use iced_x86::{Instruction, Mnemonic, Register};
use x86::addr::Gpa;

/// Data translations that the imagined TLB holds: the second level of a Nehalem, and the L2 of a Barcelona, have 512 for 4-KiB pages.
pub const TLB_ENTRIES: usize = 512;
/// Translations of large pages (32 in the Nehalem's first level).
pub const LARGE_ENTRIES: usize = 32;
/// Writes in a row after which a table is taken for data.
pub const FLOOD: u32 = 3;
/// Tables that are remembered at most: a guest may make any page one.
const MAX_TABLES: usize = 1 << 16;

/// What is known of a guest's page that holds a table.
struct Table {
    /// Entries that the shadow has, by number; for tables of 4-byte entries, of the first 512.
    shadowed: [u64; 8],
    /// Those of them that may be written through.
    writable: [u64; 8],
    /// Writes since the last fill through it.
    writes: u32,
}

/// What a walk came through.
#[derive(Clone, Copy, Default)]
pub struct Steps {
    /// Addresses of the entries, from the root.
    pub at: [u64; 8],
    /// How many.
    pub len: usize,
}

impl Steps {
    /// One more entry was read.
    pub fn push(&mut self, at: Gpa) {
        if let Some(place) = self.at.get_mut(self.len) {
            *place = at.0;
            self.len += 1;
        }
    }
}

/// The count.
#[derive(Default)]
pub struct Census {
    resident: VecDeque<(usize, u64)>,
    large: VecDeque<u64>,
    tables: HashMap<u64, Table>,
    instructions: HashMap<(Mnemonic, Register), u64>,
    walks: u64,
    code_walks: u64,
    large_walks: u64,
    steps: u64,
    shadow_fills: u64,
    traced_writes: u64,
}

impl Census {
    /// Whether writes to a frame are traced.
    pub fn is_table(&self, gfn: u64) -> bool {
        self.tables.contains_key(&gfn)
    }

    /// A walk came through `steps`, for a write or not. Returns the frames that are tables from now on.
    pub fn walked(&mut self, steps: &Steps, write: bool) -> Vec<u64> {
        let mut new = Vec::new();
        let mut missing = false;
        let at = steps.at.get(..steps.len).unwrap_or_default();
        for (n, at) in at.iter().enumerate() {
            let (gfn, entry) = (at >> 12, at >> 3 & 511);
            if !self.tables.contains_key(&gfn) {
                if self.tables.len() >= MAX_TABLES {
                    self.tables.clear();
                }
                self.tables.insert(gfn, Table { shadowed: [0; 8], writable: [0; 8], writes: 0 });
                new.push(gfn);
            }
            let Some(table) = self.tables.get_mut(&gfn) else { continue };
            let (word, bit) = ((entry / 64) as usize, 1 << (entry % 64));
            let needed = if write && n + 1 == steps.len { &mut table.writable } else { &mut table.shadowed };
            let there = needed[word] & bit != 0;
            needed[word] |= bit;
            table.shadowed[word] |= bit;
            if !there {
                table.writes = 0;
                missing = true;
            }
        }
        self.shadow_fills += u64::from(missing);
        new
    }

    /// Bytes of a page that may be a table were written. Returns whether it is one no more.
    pub fn written(&mut self, gpa: Gpa, len: usize) -> bool {
        let gfn = gpa.0 >> 12;
        let Some(table) = self.tables.get_mut(&gfn) else { return false };
        self.traced_writes += 1;
        table.writes += 1;
        let last = (gpa.0 & 4095) + (len as u64).max(1) - 1;
        for entry in (gpa.0 >> 3 & 511)..=(last >> 3).min(511) {
            let keep = !(1 << (entry % 64));
            table.shadowed[(entry / 64) as usize] &= keep;
            table.writable[(entry / 64) as usize] &= keep;
        }
        let data = table.writes >= FLOOD;
        if data {
            self.tables.remove(&gfn);
        }
        data
    }

    /// Code was walked for.
    pub fn fetched(&mut self, steps: &Steps) {
        self.code_walks += 1;
        self.steps += steps.len as u64;
    }

    /// The TLB was filled at `slot`, with this tag, for a page of `1 << shift` bytes. Returns the slot that has to go, and its tag.
    pub fn filled(&mut self, slot: usize, tag: u64, shift: u32, steps: u64) -> Option<(usize, u64)> {
        if shift > 12 {
            let page = tag & !((1 << shift) - 1) | tag & 0xfff;
            if !self.large.contains(&page) {
                self.large.push_back(page);
                if self.large.len() > LARGE_ENTRIES {
                    self.large.pop_front();
                }
                self.large_walks += 1;
                self.walks += 1;
                self.steps += steps;
            }
            return None;
        }
        self.walks += 1;
        self.steps += steps;
        self.resident.push_back((slot, tag));
        (self.resident.len() > TLB_ENTRIES).then(|| self.resident.pop_front()).flatten()
    }

    /// A system instruction is executed.
    pub fn executes(&mut self, i: &Instruction) {
        // MOV with a segment register is none that any hypervisor sees.
        let is_system = |r: Register| r.is_cr() || r.is_dr();
        let mut register = Register::None;
        if i.mnemonic() == Mnemonic::Mov {
            register = i.op0_register();
            if !is_system(register) {
                // Reads of control registers trap nowhere that matters here.
                return;
            }
        }
        *self.instructions.entry((i.mnemonic(), register)).or_default() += 1;
    }

    /// Adds what was counted to a report.
    pub fn report(&self, report: &mut Report) {
        let counts = [
            ("page walks", self.walks),
            ("page walks to large pages", self.large_walks),
            ("page walks of code", self.code_walks),
            ("entries read by page walks", self.steps),
            ("shadow fills", self.shadow_fills),
            ("traced table writes", self.traced_writes),
        ];
        counts.iter().for_each(|(name, n)| report.count(name, Unit::Count, *n));
        let mut rows = BTreeMap::new();
        for ((mnemonic, register), n) in &self.instructions {
            let name = if *register == Register::None {
                format!("{mnemonic:?}")
            } else {
                format!("{mnemonic:?} {register:?}")
            };
            *rows.entry(name.to_uppercase()).or_default() += n;
        }
        report.breakdowns.push(Breakdown { name: "system instructions", rows });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(at: &[u64]) -> Steps {
        let mut steps = Steps::default();
        at.iter().for_each(|at| steps.push(Gpa(*at)));
        steps
    }

    fn count(census: &Census, name: &str) -> u64 {
        let mut report = Report::default();
        census.report(&mut report);
        report.get(name)
    }

    #[test]
    fn first_walk_to_an_entry_fills_the_shadow_and_a_write_to_it_takes_it_out() {
        let mut census = Census::default();
        let way = steps(&[0x1000, 0x2008, 0x3010, 0x4018]);
        assert_eq!(census.walked(&way, false), [1, 2, 3, 4]);
        assert!(census.walked(&way, false).is_empty());
        assert_eq!(count(&census, "shadow fills"), 1);
        // The first write through it is another.
        census.walked(&way, true);
        census.walked(&way, true);
        assert_eq!(count(&census, "shadow fills"), 2);
        assert!(!census.written(Gpa(0x4018), 8) && !census.written(Gpa(0x9000), 8));
        census.walked(&way, true);
        assert_eq!((count(&census, "shadow fills"), count(&census, "traced table writes")), (3, 1));
    }

    #[test]
    fn table_that_is_written_again_and_again_is_data() {
        let mut census = Census::default();
        census.walked(&steps(&[0x1000]), false);
        let ends: Vec<bool> = (0..4).map(|n| census.written(Gpa(0x1000 + n * 8), 8)).collect();
        assert_eq!(ends, [false, false, true, false]);
        assert_eq!(count(&census, "traced table writes"), u64::from(FLOOD));
        assert!(!census.is_table(1));
    }

    #[test]
    fn imagined_tlb_is_smaller_and_large_pages_are_one_entry() {
        let mut census = Census::default();
        let out: Vec<_> =
            (0..TLB_ENTRIES + 2).filter_map(|n| census.filled(n, n as u64 * 4096 + 1, 12, 4)).collect();
        assert_eq!(out, [(0, 1), (1, 4097)]);
        for piece in 0..512 {
            assert_eq!(census.filled(piece, (512 + piece as u64) * 4096 + 1, 21, 3), None);
        }
        assert_eq!(count(&census, "page walks to large pages"), 1);
        assert_eq!(count(&census, "page walks"), TLB_ENTRIES as u64 + 3);
    }
}
