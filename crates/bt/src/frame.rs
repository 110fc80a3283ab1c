//! The contract between translated code and the engine that runs it: where things are, relative to GS.
//!
//! Host RSP is the host's own stack while fragments run, so signals and calls out of the cache need no care; pairs of calls lie on it (`lower::pair`). Guest RAX…R12
//! live in the host registers of the same name, but guest RSP lives in host R13; guest R13, R14 and R15 live in the frame. Host R14
//! and R15 are scratch: dead between guest instructions. Guest x87 and vector registers live in the host's while [`FP_LOADED`] is 1,
//! else in the area that [`FP_AREA`] points at.
//!
//! Guest flags at every fragment boundary are in the frame (INV-BT-1), as LAHF and SETO leave them: AH in the high byte, OF in the low.

#![expect(clippy::cast_possible_truncation, reason = "masked to the number of sets")]

/// Guest registers RAX…R15, eight bytes each.
pub const GPR: i32 = 0;
/// RIP to go on at, when a fragment exits.
pub const RIP: i32 = 0x80;
/// Status flags, 16 bits.
pub const FLAGS: i32 = 0x88;
/// Number of the site that called out.
pub const SITE: i32 = 0x8c;
/// Not zero: leave the cache at the next poll. Set by any thread, cleared by the engine outside of fragments.
pub const ALARM: i32 = 0x90;
/// Number of the exit that was taken plus one, to chain it.
pub const EXIT: i32 = 0x94;
/// Address of the pending-signals word.
pub const SIGNALS: i32 = 0x98;
/// Address of the code that leaves the cache, with RIP in the frame.
pub const LEAVE: i32 = 0xa0;
/// Address of the code that calls out for an instruction, and comes back. As with [`REFILL`], [`LOOKUP`] and [`TAKE_EXIT`], it is called, and what it
/// must know (the number of the site, or of the exit) stands behind the call.
pub const CALLOUT: i32 = 0xa8;
/// Address of the code that loads the guest's x87 and vector registers.
pub const FP_LOAD: i32 = 0xb0;
/// Linear bases of FS and GS, and the one SWAPGS exchanges.
pub const FS_BASE: i32 = 0xb8;
/// See [`FS_BASE`].
pub const GS_BASE: i32 = 0xc0;
/// See [`FS_BASE`].
pub const KERNEL_GS_BASE: i32 = 0xc8;
/// The engine's own context pointer.
pub const ENGINE: i32 = 0xd0;
/// Linear address of the access that missed.
pub const ADDRESS: i32 = 0xd8;
/// RIP of the first byte of the page that executes, in fragments that do not know it ([`crate::Facts::page_rip`]).
pub const PAGE_RIP: i32 = 0xe0;
/// RFLAGS without the arithmetic flags.
pub const SYSFLAGS: i32 = 0xe8;
/// Which segments [`MODE_SYSCALL`], [`MODE_SYSRET`] and [`MODE_IRET`] have put in CS and SS since the engine last looked, or 0.
pub const MODE: i32 = 0xf0;
/// 1 while the guest's x87 and vector registers are in the host's.
pub const FP_LOADED: i32 = 0xf4;
/// Address of the XSAVE area.
pub const FP_AREA: i32 = 0xf8;
/// Components of the area.
pub const FP_MASK: i32 = 0x100;
/// The host's MXCSR while Rust runs.
pub const HOST_MXCSR: i32 = 0x104;
/// IA32_LSTAR.
pub const LSTAR: i32 = 0x108;
/// What SYSCALL leaves of [`SYSFLAGS`].
pub const SYSCALL_KEEP: i32 = 0x110;
/// What SYSCALL leaves of [`FLAGS`].
pub const SYSCALL_KEEP_STATUS: i32 = 0x118;
/// Guest TSC minus host TSC.
pub const TSC_OFFSET: i32 = 0x120;
/// IA32_TSC_AUX.
pub const TSC_AUX: i32 = 0x128;
/// Temporaries of one guest instruction.
pub const TEMP: i32 = 0x130;
/// Address of the code that leaves the cache by an exit whose number stands behind the call.
pub const TAKE_EXIT: i32 = 0x2f8;
/// Addresses of the code that looks a jump target up, by variant.
pub const LOOKUP: i32 = 0x150;
/// Addresses of the code that fills the TLB for a read or a write, by variant: `REFILL + 16 * variant + 8 * write`.
pub const REFILL: i32 = 0x168;
/// The same for groups of accesses: they go on behind the number of the site if the entry is there already.
pub const REFILL_GROUP: i32 = 0x300;
/// The second-level TLB.
pub const SECOND_TLB: i32 = 0x198;
/// Context numbers of the lower and the upper half of the address space.
pub const CONTEXT: i32 = 0x1a0;
/// The same for where code is: the upper half's changes only when code there has moved.
pub const CODE_CONTEXT: i32 = 0xb40;
/// Host address of machine memory.
pub const MEMORY: i32 = 0x1b0;
/// Where the next displacement of a filled TLB entry is logged, lower and upper half, and where the logs end.
pub const TLB_LOG: i32 = 0x1b8;
/// See [`TLB_LOG`].
pub const TLB_LOG_END: i32 = 0x1c8;
/// The same for entries of the jump cache.
pub const JUMP_LOG: i32 = 0x1d8;
/// See [`JUMP_LOG`].
pub const JUMP_LOG_END: i32 = 0x1e8;
/// The second-level jump table.
pub const SECOND_JUMPS: i32 = 0x1f8;
/// TLB refills served by the second level, jumps found there: for the statistics.
pub const COUNT_REFILLS: i32 = 0x200;
/// See [`COUNT_REFILLS`].
pub const COUNT_LOOKUPS: i32 = 0x208;

/// Selectors of ES, CS, SS, DS, FS, GS, four bytes each.
pub const SELECTORS: i32 = 0x218;

/// The same as [`LOOKUP`] for 16- and 32-bit code.
pub const LOOKUP_LEGACY: i32 = 0x800;
/// Linear bases of ES, CS, SS, DS, FS, GS for 16- and 32-bit code, eight bytes each.
pub const SEGMENT_BASES: i32 = 0x820;
/// For each of these segments, where accesses to it must end at the latest: reads, then writes, eight bytes each. An access whose offset and size
/// exceed that is the interpreter's.
pub const SEGMENT_ENDS: i32 = 0x850;
/// Linear address of the first whole page within CS.
pub const CODE_START: i32 = 0x8b0;
/// Bytes of whole pages from there on (4 GiB at most).
pub const CODE_SIZE: i32 = 0x8b8;
/// What the tags of the second-level jump table have besides RIP, context and class: the number of the environment of 16- and 32-bit code, by variant, in
/// bits 32 to 39.
pub const ENVIRONMENTS: i32 = 0x8c0;

/// Selectors of CS and SS that SYSCALL loads, then those of SYSRET to 64-bit code, four bytes each.
pub const SYSCALL_SELECTORS: i32 = 0x338;
/// CR2.
pub const CR2: i32 = 0x330;
/// Host address at which translated code goes on behind an instruction that the interpreter did.
pub const DONE: i32 = 0x230;
/// Host address minus guest address of the pages that groups of accesses have checked, one per group of a fragment.
pub const DELTAS: i32 = 0x238;
/// How many groups a fragment can have.
pub const MAX_GROUPS: usize = 24;

/// The table of code pages of user code.
pub const CODE_PAGES: i32 = 0x480;
/// The table of fragments of user code by frame.
pub const FRAGMENTS: i32 = 0x488;
/// What the tags in [`FRAGMENTS`] have besides the address: [`fragment_tag`] of the current environment.
pub const FRAGMENT_TAG: i32 = 0x490;
/// Addresses of the code that does an instruction without Rust, or calls out for it; called as [`CALLOUT`].
pub const HELPERS: std::ops::Range<i32> = 0x400..0x440;
/// Of [`HELPERS`]: IRETQ.
pub const IRET: i32 = 0x400;
/// Of [`HELPERS`]: CPUID.
pub const DO_CPUID: i32 = 0x408;
/// Of [`HELPERS`]: XSAVEC and XSAVES, XRSTOR and XRSTORS. [`crate::emit::S0`] is the linear address, S1 the displacement of the TLB of who accesses.
pub const DO_XSAVE: i32 = 0x410;
/// See [`DO_XSAVE`].
pub const DO_XRSTOR: i32 = 0x418;
/// Of [`HELPERS`]: MOV to CR3 of the value in S0.
pub const DO_SWITCH: i32 = 0x420;
/// Of [`HELPERS`]: INVLPG of the address in S0.
pub const DO_INVLPG: i32 = 0x428;
/// Of [`HELPERS`]: RDMSR.
pub const DO_RDMSR: i32 = 0x430;
/// Of [`HELPERS`]: WRMSR.
pub const DO_WRMSR: i32 = 0x438;
/// XCR0, if the host has all its components and IA32_XSS is 0, else 0: four bytes.
pub const XCR0: i32 = 0x498;
/// Bits that a value for CR3 may not have.
pub const CR3_RESERVED: i32 = 0x4a0;
/// Host address of [`XSTATE`].
pub const XSTATE_ADDRESS: i32 = 0x4a8;
/// Instructions that [`HELPERS`] did: for the statistics, in the order of [`HELPERS`] from [`DO_CPUID`] on, eight bytes each.
pub const COUNT_HELPED: i32 = 0x4b0;
/// Where the logs of the lower half begin: TLB and jumps.
pub const LOG_STARTS: i32 = 0x4f0;
/// How the guest's vector registers may be loaded where few are in use (the engine's), and where opmasks and registers 16 to 31 lie in the area; four bytes
/// each.
pub const FP_QUICK: i32 = 0x4e0;
/// Data-segment registers (bits, by number) that translated code loaded with 0 since the engine last looked; four bytes.
pub const NULLED: i32 = 0x4ec;
/// Two compacted formats (SDM 1 13.4.3), one without and one with x87 state: [`XSTATE_VALID`] with the components, the size in bytes, and from 16 on the
/// pieces: of what component (a mask), at what offset, how many bytes, and where in [`FP_AREA`]; four bytes each. A mask of 0 ends the list.
pub const XSTATE_FORMATS: i32 = 0x600;
/// Bytes of a format.
pub const XSTATE_FORMAT_STRIDE: i32 = 0x100;
/// Pieces of a format: the last ends the list.
pub const XSTATE_PIECES: usize = 15;
/// Beside components: the format is one.
pub const XSTATE_VALID: u32 = 1 << 31;
/// Levels that IRETQ may return to in the cache (bit 0, bit 3), and [`IRET_SMAP`].
pub const IRET_ALLOWED: i32 = 0x440;
/// Limit of the GDT.
pub const GDT_LIMIT: i32 = 0x444;
/// Linear address of the GDT.
pub const GDT_BASE: i32 = 0x448;
/// Descriptors of CS and of SS (0: a null SS) that IRETQ found, while [`MODE`] is [`MODE_IRET`].
pub const IRET_DESCRIPTORS: i32 = 0x450;
/// CR0, CR3, CR4.
pub const CR0: i32 = 0x460;
/// See [`CR0`].
pub const CR3: i32 = 0x468;
/// See [`CR0`].
pub const CR4: i32 = 0x470;
/// In [`IRET_ALLOWED`]: AC matters at level 0.
pub const IRET_SMAP: u32 = 1 << 4;
/// RFLAGS.AC.
pub const AC: u32 = 1 << 18;
/// Addresses of the code that brings an access that crosses pages together, by variant: `SPLIT + 16 * variant + 8 * write`. It is called with the
/// linear address in S0 and the size in S1, and comes back behind a jump and the number of the site with S0 + S1 at [`BOUNCE`].
pub const SPLIT: i32 = 0x900;
/// Address of the code that writes [`BOUNCE`] back. Flags stay.
pub const JOIN: i32 = 0x930;
/// Host address of [`BOUNCE`].
pub const BOUNCE_ADDRESS: i32 = 0x938;
/// Host addresses of the bytes on the first and on the second page.
pub const SPLIT_HOSTS: i32 = 0x940;
/// How many bytes lie there, four bytes each.
pub const SPLIT_COUNTS: i32 = 0x950;
/// Accesses that were brought together, for the statistics.
pub const COUNT_SPLITS: i32 = 0x958;
/// Checks of groups that fail without Rust until one comes to Rust, so that it learns which often fail; four bytes.
pub const SAMPLE: i32 = 0x960;
/// The bytes of an access that crosses pages.
pub const BOUNCE: i32 = 0x980;

/// Where the traces of guest memory's frames stand (`guestmem::trace`).
pub const TRACES: i32 = 0xb00;
/// Where a write that need not be traced goes on.
pub const PASS: i32 = 0xb08;
/// Writes to traced pages that passed: for the statistics.
pub const COUNT_PASSED: i32 = 0xb10;
/// Host RSP with no pair of a call on the stack but the engine's own, and the lowest where another may be pushed (`lower::pair`).
pub const PAIRS: i32 = 0xb18;
/// See [`PAIRS`].
pub const PAIRS_END: i32 = 0xb20;
/// Addresses of the code that goes on at the guest address in [`crate::emit::S0`] where the pair on top is another's, or the alarm is set; as [`LOOKUP`].
pub const RETURN: i32 = 0xb28;
/// What fragments that check themselves have read of their guest code ([`crate::unit::MAX_CHECKED_BYTES`], and up to 7 before and behind).
pub const CODE_COPY: i32 = 0xb80;
/// Entries of fragments that check themselves until the engine looks at them, four bytes each.
pub const COUNTERS: i32 = 0xc00;
/// How many there are.
pub const COUNTERS_COUNT: usize = 256;
/// The same for 16- and 32-bit code, by variant: [`legacy_fragment_tag`].
pub const LEGACY_FRAGMENT_TAGS: i32 = 0x8d8;

/// [`MODE`]: SYSCALL's segments.
pub const MODE_SYSCALL: u32 = 1;
/// [`MODE`]: SYSRET's segments.
pub const MODE_SYSRET: u32 = 2;
/// [`MODE`]: IRETQ's segments, from [`SELECTORS`] and [`IRET_DESCRIPTORS`].
pub const MODE_IRET: u32 = 3;

/// Entries of the jump cache of one class.
pub const JUMP_ENTRIES: u32 = 65536;
/// What a hash of a target is masked with to be an entry's number. One bit is left out, so that with eight bytes a number every other half of a cache
/// line has guest RIPs, and the half behind it their host addresses: a lookup touches one line.
pub const JUMP_MASK: u32 = (2 * JUMP_ENTRIES - 1) & !(JUMP_HOSTS as u32 / 8);
/// Bytes from a guest RIP to its host address.
pub const JUMP_HOSTS: i32 = 32;
/// Bytes from one class's jump cache to the next.
pub const JUMP_STRIDE: i32 = 16 * JUMP_ENTRIES as i32;
/// The software TLB: entries of 32 bytes: read tag, write tag, host page, host minus guest address.
pub const TLB: i32 = 0x1000;
/// Entries per variant.
pub const TLB_ENTRIES: u32 = 4096;
/// Bytes from one variant's table to the next.
pub const TLB_STRIDE: i32 = 32 * TLB_ENTRIES as i32;
/// Entries of each log of filled entries, four bytes each.
pub const LOG_ENTRIES: u32 = 16384;
/// The logs: TLB lower, TLB upper, jumps lower, jumps upper.
pub const LOGS: i32 = TLB + VARIANTS * TLB_STRIDE;
/// The guest frames of the TLB's entries, eight bytes each.
pub const FRAMES: i32 = LOGS + 4 * 4 * LOG_ENTRIES as i32;
/// What CPUID says, by leaf and subleaf: entries of 32 bytes, of which the first 24 are leaf, subleaf, EAX, EBX, ECX, EDX.
pub const CPUID: i32 = FRAMES + 8 * VARIANTS * TLB_ENTRIES as i32;
/// How many there are.
pub const CPUID_ENTRIES: u64 = 256;
/// An XSAVE image on its way to or from guest memory. Aligned to 64 bytes.
pub const XSTATE: i32 = CPUID + 32 * CPUID_ENTRIES as i32;
/// Bytes of it.
pub const XSTATE_BYTES: i32 = 4096;
/// How many pages INVLPG has dropped since the engine last looked, and from 8 on which.
pub const INVALIDATED: i32 = XSTATE + XSTATE_BYTES;
/// How many there may be.
pub const INVALIDATED_ROOM: u32 = 64;
/// Hashed GiBs from which a large page was filled, of the lower and the upper half.
pub const LARGE: i32 = INVALIDATED + 8 + 8 * INVALIDATED_ROOM as i32;
/// Addresses of the two filters of pages that code may have been found in by address.
pub const PAGE_FILTERS: i32 = LARGE + 16;
/// Address spaces whose translations live on, by the low bits of their PCID: the PCID with [`KEPT_VALID`], the context number, what [`LARGE`] is there, and eight
/// bytes to spare.
pub const KEPT: i32 = PAGE_FILTERS + 16;
/// How many there can be.
pub const KEPT_ENTRIES: u64 = 16;
/// Bytes of one.
pub const KEPT_STRIDE: i32 = 32;
/// In [`KEPT`]: the entry is one.
pub const KEPT_VALID: u64 = 1 << 63;
/// The jump caches: for each class ([`jump_class`]) guest RIPs and host addresses, by halves of cache lines.
pub const JUMPS: i32 = (KEPT + KEPT_STRIDE * KEPT_ENTRIES as i32 + 63) & !63;
/// Bytes from the start that 64-bit code uses all over. The rest is the jump caches of 16- and 32-bit code.
pub const BUSY: usize = (JUMPS + VARIANTS * JUMP_STRIDE) as usize;
/// Size of a frame in bytes.
pub const SIZE: usize = (JUMPS + JUMP_CLASSES * JUMP_STRIDE) as usize;

/// The place of a leaf and subleaf in [`CPUID`] (`key`: the subleaf in the upper half).
#[must_use]
pub const fn cpuid_entry(key: u64) -> i32 {
    let set = key.wrapping_mul(CPUID_HASH) >> (64 - CPUID_ENTRIES.trailing_zeros());
    CPUID + 32 * set as i32
}

/// Odd, with its bits spread.
pub const CPUID_HASH: u64 = 0x9e37_79b9_7f4a_7c15;

/// The key of an empty entry of [`CPUID`] (given by its displacement): one that belongs to another (INV-TAG-1).
#[must_use]
pub const fn no_leaf(entry: i32) -> u64 {
    if entry == cpuid_entry(0) { 1 } else { 0 }
}

/// Where the TLB entry of the page of a linear address stands, for who has the rights of this number ([`crate::Variant`]).
#[must_use]
pub const fn tlb_entry(la: u64, variant: i32) -> i32 {
    TLB + variant * TLB_STRIDE + 32 * ((la >> 12) as i32 & (TLB_ENTRIES as i32 - 1))
}

/// Where the guest frame of the TLB entry at a displacement stands.
#[must_use]
pub const fn frame_of(entry: i32) -> i32 {
    FRAMES + (entry - TLB) / 4
}

/// Rights with which accesses are made: supervisor, supervisor with AC, user.
pub const VARIANTS: i32 = 3;
/// Kinds of code that have a jump cache each.
pub const JUMP_CLASSES: i32 = 2 * VARIANTS;

/// Which jump cache code asks: by rights, and 16- and 32-bit code another than 64-bit code, which may lie at the same address.
#[must_use]
pub const fn jump_class(variant: crate::Variant, legacy: bool) -> i32 {
    variant as i32 + if legacy { VARIANTS } else { 0 }
}

/// The tag of an empty TLB entry (given by its displacement): a page that belongs to another set, so that no access asks this entry for it.
/// INV-TAG-1: there is no value that a guest could not ask for, so what marks an empty place must be what nobody asks this place for.
#[must_use]
pub const fn no_page(entry: i32) -> u64 {
    let set = ((entry - TLB) / 32) as u64 & (TLB_ENTRIES as u64 - 1);
    !(set << 12)
}

/// The tag of an empty entry of the jump cache (given by its displacement): an address that belongs to another (INV-TAG-1); 0 but for the first, so that
/// memory that was never used is empty.
#[must_use]
pub const fn no_target(entry: i32) -> u64 {
    let set = ((entry - JUMPS) / 8) & JUMP_MASK as i32;
    (set == 0) as u64
}

/// The tag of an empty entry of the second-level jump table: bits 63 and 47 of a tag are those of a canonical address, and equal (INV-TAG-1).
pub const NO_SECOND_TAG: u64 = 1 << 63;

/// The number of a jump target in the jump cache, as the inline lookup computes it.
#[must_use]
pub const fn jump_set(rip: u64) -> u32 {
    ((rip ^ rip.rotate_right(10)) & JUMP_MASK as u64) as u32
}

/// Where the entries of a class's jump cache stand.
pub fn jump_entries(class: i32) -> impl Iterator<Item = i32> {
    let half = JUMP_HOSTS / 8;
    (0..JUMP_ENTRIES as i32).map(move |n| JUMPS + class * JUMP_STRIDE + 8 * (n % half + n / half * 2 * half))
}

/// Entries of the second-level jump table.
pub const SECOND_JUMP_ENTRIES: u64 = 1 << 17;

/// The number of a target in the second-level jump table.
#[must_use]
pub const fn second_set(rip: u64, context: u64) -> u64 {
    (rip ^ (rip >> 15) ^ (context << 6)) & (SECOND_JUMP_ENTRIES - 1)
}

/// The tag in the second-level jump table: RIP, with the context and the class in the bits that a canonical address has to spare. Only canonical
/// addresses are looked up: another would meet an entry of another context or class. RIPs of 16- and 32-bit code are linear addresses of 32 bits, which
/// leaves room for the number of their environment.
#[must_use]
pub const fn second_tag(rip: u64, context: u64, class: u64, environment: u8) -> u64 {
    rip ^ (context << 48 | class << 60 | (environment as u64) << 32)
}

/// Whether a tag of the second-level jump table belongs to code in the page at a linear address.
#[must_use]
pub const fn tag_is_in(tag: u64, page: u64) -> bool {
    let canonical = 0x0000_ffff_ffff_f000;
    let legacy = tag & canonical & 0xffff_ffff == page && (tag >> 60 & 7) >= VARIANTS as u64;
    legacy || tag & canonical == page & canonical
}

/// Entries of the table of code pages: address of the page with the context number in its low bits, and the frame's address.
pub const CODE_PAGE_ENTRIES: u64 = 1 << 12;

/// The number of a page in the table of code pages.
#[must_use]
pub const fn code_page_set(page: u64, context: u64) -> u64 {
    (page >> 12 ^ context << 5) & (CODE_PAGE_ENTRIES - 1)
}

/// From one place where a page may stand in the table of code pages to the next.
pub const CODE_PAGE_CONTEXTS: usize = 1 << 5;

/// The tag of an empty entry of the table of code pages: no canonical address, and only such are asked for (INV-TAG-1).
pub const NO_CODE_PAGE: u64 = 1 << 63;

/// Entries of the table of fragments. A place has two: the last and the one before.
pub const FRAGMENT_ENTRIES: u64 = 1 << 18;

/// The first of the two entries for the code at a guest physical address.
#[must_use]
pub const fn fragment_set(address: u64) -> u64 {
    let mixed = (address ^ address >> 16) & 0xffff_ffff;
    (((mixed * FRAGMENT_HASH) & 0xffff_ffff) >> (32 - FRAGMENT_ENTRIES.trailing_zeros())) & !1
}

/// Odd, with its bits spread.
pub const FRAGMENT_HASH: u64 = 0x9e37_79b1;

/// What the tag of a fragment has besides its guest physical address (below 2^52). Never 0, the tag of an empty entry.
#[must_use]
pub const fn fragment_tag(environment: u8) -> u64 {
    1 << 63 | (environment as u64) << 52
}

/// The same of 16- or 32-bit code with these rights.
#[must_use]
pub const fn legacy_fragment_tag(environment: u8, variant: crate::Variant) -> u64 {
    fragment_tag(environment) | (variant as u64 + 1) << 60
}

/// In the tag of a code page: code at level 0 may be fetched there, which says nothing about other levels. Addresses in the table are canonical and of
/// the lower half.
pub const SUPERVISOR_PAGE: u64 = 1 << 62;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jump_entries_are_what_targets_ask_for() {
        let asked: std::collections::BTreeSet<_> =
            (0..1 << 16).map(|n| JUMPS + 8 * jump_set(n * 0x9e37_79b9) as i32).collect();
        let entries: std::collections::BTreeSet<_> = jump_entries(0).collect();
        assert!(entries.is_superset(&asked) && asked.len() > entries.len() / 2);
        assert!(entries.iter().all(|at| at & JUMP_HOSTS == 0) && entries.len() == JUMP_ENTRIES as usize);
    }

    #[test]
    fn tags_of_empty_entries_are_asked_for_elsewhere() {
        for variant in 0..VARIANTS {
            for set in 0..TLB_ENTRIES as i32 {
                let tag = no_page(TLB + variant * TLB_STRIDE + 32 * set);
                assert_ne!((tag >> 12) & (u64::from(TLB_ENTRIES) - 1), set as u64);
            }
        }
        for class in 0..JUMP_CLASSES {
            for at in jump_entries(class) {
                assert_ne!(jump_set(no_target(at)), ((at - JUMPS - class * JUMP_STRIDE) / 8) as u32);
            }
        }
        for entry in (CPUID..XSTATE).step_by(32) {
            assert_ne!(cpuid_entry(no_leaf(entry)), entry);
        }
        for (rip, context) in [(1u64 << 63, 0), (0, 4095), (0x7fff_ffff_ffff, 4095), (u64::MAX << 47, 1)] {
            let canonical = ((rip.cast_signed() << 16) >> 16).cast_unsigned();
            for class in 0..6 {
                assert_ne!(second_tag(canonical, context, class, 0), NO_SECOND_TAG);
                assert_ne!(second_tag(canonical & 0xffff_ffff, context, class, 255), NO_SECOND_TAG);
            }
        }
    }
}
