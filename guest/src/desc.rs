//! GDT, IDT and task-state segments. The GDT's order serves SYSRET and SYSEXIT (SDM 2B; APM 2 6.1).

use crate::mem::Page;
use core::arch::asm;

/// Kernel 64-bit code.
pub const KCS: u16 = 0x08;
/// Kernel data.
pub const KDS: u16 = 0x10;
/// User 32-bit code, RPL 3.
pub const UCS32: u16 = 0x1b;
/// User data, RPL 3.
pub const UDS: u16 = 0x23;
/// User 64-bit code, RPL 3.
pub const UCS: u16 = 0x2b;
/// Kernel 32-bit code.
pub const KCS32: u16 = 0x38;
/// Kernel 16-bit code, base 0, limit 64 KiB.
#[allow(dead_code)]
pub const KCS16: u16 = 0x40;
/// Kernel 16-bit data, base 0, limit 64 KiB.
#[allow(dead_code)]
pub const KDS16: u16 = 0x48;
/// 64-bit TSS of the boot processor.
pub const TSS: u16 = 0x50;
/// 32-bit TSS used in legacy mode.
pub const TSS32: u16 = 0x60;
/// First of the free slots.
pub const FREE: u16 = 0x88;
/// First TSS of the application processors.
pub const AP_TSS: u16 = 0x100;

/// Number of descriptors.
pub const GDT_LEN: usize = 96;

/// The global descriptor table.
#[repr(C, align(64))]
pub struct Gdt(pub [u64; GDT_LEN]);

const fn initial() -> Gdt {
    let mut g = [0; GDT_LEN];
    g[1] = 0x00AF_9B00_0000_FFFF;
    g[2] = 0x00CF_9300_0000_FFFF;
    g[3] = 0x00CF_FB00_0000_FFFF;
    g[4] = 0x00CF_F300_0000_FFFF;
    g[5] = 0x00AF_FB00_0000_FFFF;
    g[6] = 0x00CF_F300_0000_FFFF;
    g[7] = 0x00CF_9B00_0000_FFFF;
    g[8] = 0x0000_9B00_0000_FFFF;
    g[9] = 0x0000_9300_0000_FFFF;
    Gdt(g)
}

#[unsafe(no_mangle)]
static mut GDT: Gdt = initial();

/// Operand of LGDT and LIDT.
#[repr(C, packed)]
pub struct Pointer {
    /// Size minus one.
    pub limit: u16,
    /// Linear address.
    pub base: u64,
}

#[repr(C, align(8))]
struct AlignedPointer(Pointer);

core::arch::global_asm!(
    ".section .data",
    ".balign 8",
    ".global GDT_POINTER",
    "GDT_POINTER: .short {n} * 8 - 1",
    ".quad GDT",
    ".section .text",
    n = const GDT_LEN
);

/// An IDT of 256 long-mode gates.
#[repr(C, align(4096))]
pub struct Idt(pub [u64; 512]);
/// The IDT of long mode.
pub static mut IDT: Idt = Idt([0; 512]);

/// A 64-bit TSS with an I/O bitmap (SDM 3A 8.7; APM 2 12.2.5).
#[repr(C, packed)]
pub struct Tss64 {
    _r0: u32,
    /// RSP0 to RSP2.
    pub rsp: [u64; 3],
    _r1: u64,
    /// IST1 to IST7.
    pub ist: [u64; 7],
    _r2: u64,
    _r3: u16,
    /// Offset of the I/O bitmap.
    pub iomap: u16,
    /// The bitmap, all ones.
    pub bitmap: [u8; 8193],
}

#[repr(C, align(4096))]
struct TssPage(Tss64);
static mut TSS_BSP: TssPage = TssPage(Tss64 {
    _r0: 0,
    rsp: [0; 3],
    _r1: 0,
    ist: [0; 7],
    _r2: 0,
    _r3: 0,
    iomap: 104,
    bitmap: [0xff; 8193],
});

const STACK_PAGES: usize = 2;
static mut STACKS: [Page; STACK_PAGES * 8] = [Page::ZERO; STACK_PAGES * 8];

/// The task-state segment of the boot processor.
pub fn tss() -> *mut Tss64 {
    unsafe { &raw mut TSS_BSP.0 }
}

/// Address of the GDT.
pub fn gdt_base() -> u64 {
    (&raw const GDT) as u64
}

/// Writes a descriptor slot by selector.
pub fn set_gdt(selector: u16, value: u64) {
    unsafe { (gdt_base() as *mut u64).add(usize::from(selector >> 3)).write_volatile(value) };
}

/// Reads a descriptor slot by selector.
pub fn get_gdt(selector: u16) -> u64 {
    unsafe { (gdt_base() as *const u64).add(usize::from(selector >> 3)).read_volatile() }
}

/// Builds an 8-byte descriptor. `flags` is the high nibble (G, D/B, L, AVL).
pub const fn descriptor(base: u32, limit: u32, access: u8, flags: u8) -> u64 {
    let (b, l) = (base as u64, limit as u64);
    (l & 0xffff)
        | (b & 0xff_ffff) << 16
        | (access as u64) << 40
        | (l >> 16 & 0xf) << 48
        | ((flags & 0xf) as u64) << 52
        | (b >> 24) << 56
}

/// Writes a 16-byte system descriptor.
pub fn set_system(selector: u16, base: u64, limit: u32, access: u8) {
    set_gdt(selector, descriptor(base as u32, limit, access, 0));
    set_gdt(selector + 8, base >> 32);
}

/// A gate of the IDT, decoded enough for the tests.
pub fn set_gate(vector: u8, handler: u64, selector: u16, ist: u8, access: u8) {
    let lo = (handler & 0xffff)
        | u64::from(selector) << 16
        | u64::from(ist) << 32
        | u64::from(access) << 40
        | (handler >> 16 & 0xffff) << 48;
    set_gate_raw(vector, lo, handler >> 32);
}

/// Writes the two words of a gate.
pub fn set_gate_raw(vector: u8, lo: u64, hi: u64) {
    unsafe {
        let p = (&raw mut IDT).cast::<u64>().add(usize::from(vector) * 2);
        p.write_volatile(lo);
        p.add(1).write_volatile(hi);
    }
}

/// Reads the two words of a gate.
pub fn gate_raw(vector: u8) -> (u64, u64) {
    unsafe {
        let p = (&raw const IDT).cast::<u64>().add(usize::from(vector) * 2);
        (p.read_volatile(), p.add(1).read_volatile())
    }
}

/// Address of the IDT.
pub fn idt_base() -> u64 {
    (&raw const IDT) as u64
}

/// The interrupt stack that an exception or interrupt uses.
pub const fn ist_of(vector: u8) -> u8 {
    match vector {
        2 => 2,
        8 => 3,
        1 => 4,
        18 => 6,
        0..32 => 1,
        _ => 5,
    }
}

/// Puts GDT, IDT and TSS into their initial state. The TSS stays marked busy.
pub fn reset() {
    unsafe {
        let init = initial();
        for (i, d) in init.0.iter().enumerate() {
            if i * 8 < usize::from(AP_TSS) {
                set_gdt((i * 8) as u16, *d);
            }
        }
        set_system(TSS, tss() as u64, size_of::<Tss64>() as u32 - 1, 0x8b);
        for v in 0..=255u8 {
            set_gate(
                v,
                crate::traps::stub(v),
                KCS,
                ist_of(v),
                if v == 0x80 || v == 3 || v == 4 { 0xee } else { 0x8e },
            );
        }
        let t = tss();
        let top = |i: usize| (&raw const STACKS) as u64 + ((i + 1) * STACK_PAGES * 4096) as u64;
        (&raw mut (*t).rsp).write_unaligned([top(0); 3]);
        (&raw mut (*t).ist).write_unaligned([top(1), top(2), top(3), top(4), top(5), top(6), top(7)]);
        (&raw mut (*t).iomap).write_unaligned(104);
        let map = (&raw mut (*t).bitmap).cast::<u8>();
        map.write_bytes(0xff, 8193);
        lidt(idt_base(), 4095);
        lgdt(gdt_base(), (GDT_LEN * 8 - 1) as u16);
    }
}

/// Loads the task register for the first time.
pub fn load_tr() {
    set_system(TSS, tss() as u64, size_of::<Tss64>() as u32 - 1, 0x89);
    unsafe { asm!("ltr {:x}", in(reg) TSS) };
}

/// Loads the IDT register.
pub fn lidt(base: u64, limit: u16) {
    let p = AlignedPointer(Pointer { limit, base });
    unsafe { asm!("lidt [{}]", in(reg) &p) };
}

/// Loads the GDT register.
pub fn lgdt(base: u64, limit: u16) {
    let p = AlignedPointer(Pointer { limit, base });
    unsafe { asm!("lgdt [{}]", in(reg) &p) };
}

/// Reads the GDT register.
pub fn sgdt() -> (u64, u16) {
    let mut p = AlignedPointer(Pointer { limit: 0, base: 0 });
    unsafe { asm!("sgdt [{}]", in(reg) &mut p) };
    (p.0.base, p.0.limit)
}

/// Reads the IDT register.
pub fn sidt() -> (u64, u16) {
    let mut p = AlignedPointer(Pointer { limit: 0, base: 0 });
    unsafe { asm!("sidt [{}]", in(reg) &mut p) };
    (p.0.base, p.0.limit)
}
