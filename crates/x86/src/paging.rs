//! Page tables: the walk of all paging modes (SDM 3A chapter 4), generic over one `Gpa → Gpa` step, so that a
//! nested guest's two-dimensional walk is the same code with the nested walk as its step.
//!
//! The walk reads entries through [`WalkMemory`], checks rights, and sets accessed and dirty bits with
//! LOCK CMPXCHG as a processor does; when an entry changed under it, it starts again.

use crate::addr::{Gpa, Gva};
use crate::bits::{cr0, cr4, efer};
use crate::exception::pf;

/// The walker's view of physical memory.
pub trait WalkMemory {
    /// Why a step failed (for a nested guest: a nested page fault). Plain guests use [`std::convert::Infallible`]-like types.
    type Fault;
    /// One `Gpa → Gpa` step: the identity for a plain guest, a nested walk for a nested one.
    ///
    /// # Errors
    /// When the step faults.
    fn step(&mut self, gpa: Gpa, write: bool) -> Result<Gpa, Self::Fault>;
    /// Loads a 4-byte entry; all ones where nothing answers.
    fn load32(&mut self, gpa: Gpa) -> u32;
    /// Loads an 8-byte entry; all ones where nothing answers.
    fn load64(&mut self, gpa: Gpa) -> u64;
    /// LOCK CMPXCHG of an entry of 4 or 8 bytes. False if it did not hold `old`.
    fn update(&mut self, gpa: Gpa, bytes: u8, old: u64, new: u64) -> bool;
}

/// Why memory is accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AccessKind {
    /// A data read.
    Read,
    /// A data write (or the read of a read-modify-write).
    Write,
    /// An instruction fetch.
    Fetch,
}

/// Rights with which memory is accessed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// Read, write or fetch.
    pub kind: AccessKind,
    /// A user-mode access: CPL 3 and no implicit supervisor access (SDM 3A 4.6).
    pub user: bool,
    /// EFLAGS.AC for an explicit supervisor access (SMAP override); false for implicit ones.
    pub ac: bool,
}

/// Which tables and rules apply: all of CR0, CR3, CR4, EFER that the walk needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Paging {
    /// How many levels of which format.
    pub mode: Mode,
    /// Physical address of the root table (for PAE: unused, the PDPTEs are registers).
    pub root: Gpa,
    /// PDPTE registers of PAE paging.
    pub pdpte: [u64; 4],
    /// CR0.WP
    pub wp: bool,
    /// CR4.PSE (32-bit paging).
    pub pse: bool,
    /// EFER.NXE
    pub nxe: bool,
    /// CR4.SMEP
    pub smep: bool,
    /// CR4.SMAP
    pub smap: bool,
    /// Whether 1-GByte pages are announced.
    pub gbpages: bool,
    /// Physical address bits (MAXPHYADDR), 36 to 52.
    pub phys_bits: u8,
}

/// Paging modes (SDM 3A 4.1.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// CR0.PG = 0.
    Off,
    /// Two levels of 4-byte entries.
    Bits32,
    /// Three levels of 8-byte entries, the top one in registers.
    Pae,
    /// Four levels.
    Level4,
    /// Five levels.
    Level5,
}

impl Paging {
    /// The rules that the control registers set.
    #[must_use]
    pub fn new(s: &crate::CpuState, phys_bits: u8, gbpages: bool) -> Self {
        let mode = if s.cr0 & cr0::PG == 0 {
            Mode::Off
        } else if s.cr4 & cr4::PAE == 0 {
            Mode::Bits32
        } else if s.msr.efer & efer::LMA == 0 {
            Mode::Pae
        } else if s.cr4 & cr4::LA57 != 0 {
            Mode::Level5
        } else {
            Mode::Level4
        };
        let root = match mode {
            Mode::Bits32 => s.cr3 & 0xffff_f000,
            _ => s.cr3 & 0x000f_ffff_ffff_f000,
        };
        Self {
            mode,
            root: Gpa(root),
            pdpte: s.pdpte,
            wp: s.cr0 & cr0::WP != 0,
            pse: s.cr4 & cr4::PSE != 0,
            nxe: s.msr.efer & efer::NXE != 0,
            smep: s.cr4 & cr4::SMEP != 0,
            smap: s.cr4 & cr4::SMAP != 0,
            gbpages,
            phys_bits,
        }
    }
}

/// A successful translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// Where the accessed byte lies (before a nested walk's last step).
    pub gpa: Gpa,
    /// log2 of the page size: 12, 21, 22 or 30.
    pub page_shift: u32,
    /// User-mode accesses are allowed.
    pub user: bool,
    /// Writes are allowed by every level (CR0.WP aside).
    pub writable: bool,
    /// The leaf is dirty, so that a write needs no further update.
    pub dirty: bool,
    /// Instruction fetches are allowed.
    pub executable: bool,
    /// The leaf is global (CR4.PGE aside).
    pub global: bool,
}

/// A failed translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WalkError<F> {
    /// #PF with this error code.
    PageFault(u16),
    /// A step failed.
    Step(F),
}

const P: u64 = 1;
const RW: u64 = 2;
const US: u64 = 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// One table format: where a level's index lies and how wide entries are.
struct Format {
    levels: u32,
    index_bits: u32,
    entry_bytes: u8,
}

impl Mode {
    const fn format(self) -> Format {
        match self {
            Self::Off => Format { levels: 0, index_bits: 0, entry_bytes: 8 },
            Self::Bits32 => Format { levels: 2, index_bits: 10, entry_bytes: 4 },
            Self::Pae => Format { levels: 2, index_bits: 9, entry_bytes: 8 },
            Self::Level4 => Format { levels: 4, index_bits: 9, entry_bytes: 8 },
            Self::Level5 => Format { levels: 5, index_bits: 9, entry_bytes: 8 },
        }
    }
}

/// Translates `gva` for `access`, setting accessed and dirty bits.
///
/// # Errors
/// A page fault with its error code, or the fault of a step.
pub fn walk<M: WalkMemory>(
    mem: &mut M,
    paging: &Paging,
    gva: Gva,
    access: Access,
) -> Result<Translation, WalkError<M::Fault>> {
    loop {
        if let Some(translation) = try_walk(mem, paging, gva, access)? {
            return Ok(translation);
        }
    }
}

/// Rights gathered on the way down.
struct Rights {
    user: bool,
    writable: bool,
    executable: bool,
}

impl Rights {
    fn narrow(&mut self, entry: u64, nxe: bool) {
        self.user &= entry & US != 0;
        self.writable &= entry & RW != 0;
        self.executable &= !(nxe && entry & NX != 0);
    }
}

fn try_walk<M: WalkMemory>(
    mem: &mut M,
    paging: &Paging,
    gva: Gva,
    access: Access,
) -> Result<Option<Translation>, WalkError<M::Fault>> {
    let mut rights = Rights { user: true, writable: true, executable: true };
    if paging.mode == Mode::Off {
        let gpa = Gpa(gva.0 & 0xffff_ffff);
        return Ok(Some(translation(gpa, 12, &rights, true, false)));
    }
    let format = paging.mode.format();
    let mut table = paging.root;
    if paging.mode == Mode::Pae {
        let pdpte = paging.pdpte[(gva.0 >> 30 & 3) as usize];
        if pdpte & P == 0 {
            return Err(fault(paging, access, 0));
        }
        table = Gpa(pdpte & FRAME);
    }
    for level in (0..format.levels).rev() {
        let shift = 12 + level * format.index_bits;
        let index = gva.0 >> shift & ((1 << format.index_bits) - 1);
        let at = table.add(index * u64::from(format.entry_bytes));
        let at = mem.step(at, false).map_err(WalkError::Step)?;
        let entry = load(mem, at, format.entry_bytes);
        if entry & P == 0 {
            return Err(fault(paging, access, 0));
        }
        let leaf = level == 0 || is_large(paging, level, entry);
        if entry & reserved(paging, level, leaf) != 0 {
            return Err(fault(paging, access, pf::PRESENT | pf::RSVD));
        }
        rights.narrow(entry, paging.nxe);
        if !leaf {
            if entry & A == 0 && !mem.update(at, format.entry_bytes, entry, entry | A) {
                return Ok(None);
            }
            table = Gpa(entry & FRAME);
            continue;
        }
        if !permitted(paging, &rights, access) {
            return Err(fault(paging, access, pf::PRESENT));
        }
        let set = if access.kind == AccessKind::Write { A | D } else { A };
        if entry & set != set && !mem.update(at, format.entry_bytes, entry, entry | set) {
            return Ok(None);
        }
        let dirty = (entry | set) & D != 0;
        let gpa = leaf_address(paging, shift, entry, gva);
        return Ok(Some(translation(gpa, shift, &rights, dirty, entry & G != 0)));
    }
    // `levels` is at least 2 for every mode but Off, and level 0 is always a leaf.
    Err(fault(paging, access, 0))
}

fn translation(gpa: Gpa, page_shift: u32, rights: &Rights, dirty: bool, global: bool) -> Translation {
    let &Rights { user, writable, executable } = rights;
    Translation { gpa, page_shift, user, writable, dirty, executable, global }
}

fn load<M: WalkMemory>(mem: &mut M, at: Gpa, bytes: u8) -> u64 {
    if bytes == 4 { u64::from(mem.load32(at)) } else { mem.load64(at) }
}

/// Whether a non-leaf level's entry maps a large page.
fn is_large(paging: &Paging, level: u32, entry: u64) -> bool {
    entry & PS != 0
        && match (paging.mode, level) {
            (Mode::Bits32, 1) => paging.pse,
            (_, 1) => true,
            (_, 2) => paging.gbpages,
            _ => false,
        }
}

/// Bits that must be zero in a present entry (SDM 3A 4.3 to 4.5: tables 4-5 to 4-20).
fn reserved(paging: &Paging, level: u32, leaf: bool) -> u64 {
    if paging.mode == Mode::Bits32 {
        // PSE-36: a 4-MByte page's bits 13–20 are address bits 32–39; beyond MAXPHYADDR and bit 21 they are reserved.
        let large = leaf && level == 1;
        return if large { 1 << 21 | pse36_reserved(paging.phys_bits) } else { 0 };
    }
    let above = FRAME & !((1u64 << paging.phys_bits) - 1);
    let nx = if paging.nxe { 0 } else { NX };
    // Bits 52–62 are ignored in IA-32e entries but reserved with PAE paging (table 4-10, 4-11).
    let pae = if paging.mode == Mode::Pae { 0x7ff << 52 } else { 0 };
    let low = match (leaf, level) {
        (true, 1) => 0x1f_e000,
        (true, 2) => 0x3fff_e000,
        // PS where no large page exists.
        (false, 2) if paging.mode != Mode::Pae => PS,
        (false, 3 | 4) => PS,
        _ => 0,
    };
    above | nx | pae | low
}

/// Reserved address bits 13–20 of a PSE-36 entry for a physical address width.
const fn pse36_reserved(phys_bits: u8) -> u64 {
    let extra = if phys_bits > 40 { 8 } else { phys_bits.saturating_sub(32) };
    0x1f_e000 & !(((1u64 << extra) - 1) << 13)
}

fn leaf_address(paging: &Paging, shift: u32, entry: u64, gva: Gva) -> Gpa {
    let offset = gva.0 & ((1 << shift) - 1);
    let frame = if paging.mode == Mode::Bits32 && shift == 22 {
        entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32
    } else {
        entry & FRAME & !((1 << shift) - 1)
    };
    Gpa(frame | offset)
}

/// Access rights (SDM 3A 4.6.1).
fn permitted(paging: &Paging, rights: &Rights, access: Access) -> bool {
    if access.user {
        return rights.user
            && match access.kind {
                AccessKind::Read => true,
                AccessKind::Write => rights.writable,
                AccessKind::Fetch => rights.executable,
            };
    }
    match access.kind {
        AccessKind::Fetch => rights.executable && !(rights.user && paging.smep),
        kind => {
            !(rights.user && paging.smap && !access.ac)
                && (kind == AccessKind::Read || rights.writable || !paging.wp)
        }
    }
}

/// The error code (SDM 3A 4.7): `base` has P and RSVD.
fn fault<F>(paging: &Paging, access: Access, base: u16) -> WalkError<F> {
    let write = if access.kind == AccessKind::Write { pf::WRITE } else { 0 };
    let user = if access.user { pf::USER } else { 0 };
    // I/D is only reported where fetches have rights of their own.
    let nx_possible = paging.nxe && paging.mode != Mode::Bits32;
    let fetch = if access.kind == AccessKind::Fetch && (nx_possible || paging.smep) { pf::FETCH } else { 0 };
    WalkError::PageFault(base | write | user | fetch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    struct Mem(HashMap<u64, u64>);
    impl WalkMemory for Mem {
        type Fault = std::convert::Infallible;
        fn step(&mut self, gpa: Gpa, _: bool) -> Result<Gpa, Self::Fault> {
            Ok(gpa)
        }
        fn load32(&mut self, gpa: Gpa) -> u32 {
            u32::try_from(*self.0.get(&gpa.0).unwrap_or(&0)).unwrap_or(u32::MAX)
        }
        fn load64(&mut self, gpa: Gpa) -> u64 {
            *self.0.get(&gpa.0).unwrap_or(&0)
        }
        fn update(&mut self, gpa: Gpa, _: u8, old: u64, new: u64) -> bool {
            self.0.get(&gpa.0) == Some(&old) && self.0.insert(gpa.0, new).is_some()
        }
    }

    fn level4() -> Paging {
        Paging {
            mode: Mode::Level4,
            root: Gpa(0x1000),
            pdpte: [0; 4],
            wp: true,
            pse: false,
            nxe: true,
            smep: true,
            smap: true,
            gbpages: true,
            phys_bits: 40,
        }
    }

    const READ: Access = Access { kind: AccessKind::Read, user: false, ac: false };

    fn tables(leaf: u64) -> Mem {
        Mem(HashMap::from([(0x1000, 0x2007), (0x2000, 0x3007), (0x3000, 0x4007), (0x4008, leaf)]))
    }

    #[test]
    fn walk_write_sets_accessed_and_dirty() {
        let mut mem = tables(0x9007);
        let t =
            walk(&mut mem, &level4(), Gva(0x1234), Access { kind: AccessKind::Write, user: true, ac: false });
        assert_eq!(t.unwrap().gpa, Gpa(0x9234));
        assert_eq!(mem.0[&0x4008], 0x9067);
        assert_eq!(mem.0[&0x1000], 0x2027);
    }

    #[test]
    fn walk_faults_have_exact_codes() {
        let pf = |mem: &mut Mem, access| match walk(mem, &level4(), Gva(0x1000), access) {
            Err(WalkError::PageFault(code)) => code,
            other => panic!("{other:?}"),
        };
        let user_write = Access { kind: AccessKind::Write, user: true, ac: false };
        let fetch = Access { kind: AccessKind::Fetch, user: false, ac: false };
        assert_eq!(pf(&mut tables(0), user_write), 6);
        assert_eq!(pf(&mut tables(0x9005), user_write), 7);
        assert_eq!(pf(&mut tables(0x9007), READ), 1, "SMAP");
        assert_eq!(pf(&mut tables(0x9007), fetch), 0x11, "SMEP");
        assert_eq!(pf(&mut tables(NX | 0x9003), fetch), 0x11, "NX");
        assert_eq!(pf(&mut tables(1 << 45 | 0x9003), READ), 9, "reserved");
    }

    #[test]
    fn walk_large_page_keeps_offset() {
        let mut mem = tables(0);
        mem.0.insert(0x3000, 0x20_0083);
        let t = walk(&mut mem, &level4(), Gva(0x12345), READ).unwrap();
        assert_eq!((t.gpa, t.page_shift), (Gpa(0x21_2345), 21));
    }
}
