//! Pages and address spaces: every test that touches paging builds its own [`Space`].

use crate::boot::BOOT_PML4;
use crate::cpu;

/// Present.
pub const P: u64 = 1;
/// Writable.
pub const W: u64 = 2;
/// User.
pub const U: u64 = 4;
/// Accessed.
pub const A: u64 = 1 << 5;
/// Dirty.
pub const D: u64 = 1 << 6;
/// Page size.
pub const PS: u64 = 1 << 7;
/// Global.
pub const G: u64 = 1 << 8;
/// No execute.
pub const NX: u64 = 1 << 63;
/// The address bits of an entry.
pub const ADDR: u64 = 0x000f_ffff_ffff_f000;

/// Where the tests map their pages: PML4 slot 1, absent from the boot address space.
pub const WIN: u64 = 0x80_0000_0000;
/// User alias of physical memory, see [`crate::boot`].
pub const ALIAS: u64 = 0x4000_0000;
/// 4 MiB of physical memory, 4 MiB aligned, for tests with large pages.
pub const BIG: u64 = 0x0200_0000;

/// A 4 KiB page of 512 entries.
#[repr(C, align(4096))]
pub struct Page(pub [u64; 512]);
impl Page {
    /// A page of zeros.
    pub const ZERO: Page = Page([0; 512]);
}

const POOL_PAGES: usize = 96;
static mut POOL: [Page; POOL_PAGES] = [Page::ZERO; POOL_PAGES];
static mut POOL_USED: usize = 0;

/// Gives all pages back; the runner calls it between tests.
pub fn reset_pool() {
    unsafe { POOL_USED = 0 };
}

/// A zeroed page, identity mapped: its address is virtual and physical.
pub fn page() -> u64 {
    unsafe {
        assert!(POOL_USED < POOL_PAGES, "page pool empty");
        let p = (&raw mut POOL).cast::<Page>().add(POOL_USED);
        POOL_USED += 1;
        p.write_bytes(0, 1);
        p as u64
    }
}

/// Two pages that are neighbours; 8 KiB.
pub fn pages(n: usize) -> u64 {
    let first = page();
    for _ in 1..n {
        page();
    }
    first
}

/// Volatile 64-bit read.
pub fn rd(va: u64) -> u64 {
    unsafe { (va as *const u64).read_volatile() }
}
/// Volatile 64-bit write.
pub fn wr(va: u64, v: u64) {
    unsafe { (va as *mut u64).write_volatile(v) };
}
/// Volatile 32-bit read.
pub fn rd32(va: u64) -> u32 {
    unsafe { (va as *const u32).read_volatile() }
}
/// Volatile 32-bit write.
pub fn wr32(va: u64, v: u32) {
    unsafe { (va as *mut u32).write_volatile(v) };
}
/// Volatile byte read.
pub fn rd8(va: u64) -> u8 {
    unsafe { (va as *const u8).read_volatile() }
}
/// Volatile byte write.
pub fn wr8(va: u64, v: u8) {
    unsafe { (va as *mut u8).write_volatile(v) };
}
/// Copies bytes to an address.
pub fn put(va: u64, bytes: &[u8]) {
    for (i, b) in bytes.iter().enumerate() {
        wr8(va + i as u64, *b);
    }
}
/// Calls machine code at an address as `extern "C" fn() -> u64`.
pub fn call(va: u64) -> u64 {
    let f: extern "C" fn() -> u64 = unsafe { core::mem::transmute(va as *const ()) };
    f()
}
/// Machine code: `mov eax, v; ret`.
pub fn code_returning(v: u32) -> [u8; 6] {
    let b = v.to_le_bytes();
    [0xb8, b[0], b[1], b[2], b[3], 0xc3]
}

/// A four-level address space that shares the boot mappings.
#[derive(Clone, Copy)]
pub struct Space {
    /// Physical address of the PML4.
    pub root: u64,
}

impl Space {
    /// A copy of the boot address space, not yet active.
    pub fn new() -> Self {
        let root = page();
        unsafe { (root as *mut u64).write(BOOT_PML4.0[0]) };
        Space { root }
    }

    /// A new space, made current.
    pub fn active() -> Self {
        let s = Self::new();
        cpu::set_cr3(s.root);
        s
    }

    /// Address of the entry for `va` at `level` (1 is the page table), making the tables above it.
    pub fn entry(&self, va: u64, level: u32) -> u64 {
        let mut table = self.root;
        let mut l = 4;
        loop {
            let e = table + (va >> (12 + 9 * (l - 1)) & 511) * 8;
            if l == level {
                return e;
            }
            if rd(e) & P == 0 {
                wr(e, page() | P | W | U);
            }
            table = rd(e) & ADDR;
            l -= 1;
        }
    }

    /// Maps one 4 KiB page.
    pub fn map(&self, va: u64, pa: u64, flags: u64) {
        wr(self.entry(va, 1), pa | flags);
        cpu::invlpg(va);
    }

    /// Maps a large page: level 2 is 2 MiB, level 3 is 1 GiB.
    pub fn map_large(&self, va: u64, pa: u64, flags: u64, level: u32) {
        wr(self.entry(va, level), pa | flags | PS);
        cpu::invlpg(va);
    }

    /// The leaf entry of a 4 KiB mapping.
    pub fn pte(&self, va: u64) -> u64 {
        rd(self.entry(va, 1))
    }
}
