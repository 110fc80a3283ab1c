//! Instructions that Rust has no word for: control registers, MSRs, ports, CPUID.

use core::arch::asm;

macro_rules! control_register {
    ($read:ident, $write:ident, $name:literal) => {
        #[doc = concat!("Reads ", $name, ".")]
        #[inline(always)]
        pub fn $read() -> u64 {
            let v;
            unsafe { asm!(concat!("mov {}, ", $name), out(reg) v, options(nostack)) };
            v
        }
        #[doc = concat!("Writes ", $name, ".")]
        #[inline(always)]
        pub fn $write(v: u64) {
            unsafe { asm!(concat!("mov ", $name, ", {}"), in(reg) v, options(nostack)) };
        }
    };
}
control_register!(cr0, set_cr0, "cr0");
control_register!(cr2, set_cr2, "cr2");
control_register!(cr3, set_cr3, "cr3");
control_register!(cr4, set_cr4, "cr4");
control_register!(cr8, set_cr8, "cr8");
control_register!(dr0, set_dr0, "dr0");
control_register!(dr1, set_dr1, "dr1");
control_register!(dr6, set_dr6, "dr6");
control_register!(dr7, set_dr7, "dr7");

macro_rules! port {
    ($read:ident, $write:ident, $ty:ty, $reg:tt) => {
        #[doc = "Reads an I/O port."]
        #[inline(always)]
        pub fn $read(port: u16) -> $ty {
            let v;
            unsafe { asm!(concat!("in ", $reg, ", dx"), out($reg) v, in("dx") port, options(nostack)) };
            v
        }
        #[doc = "Writes an I/O port."]
        #[inline(always)]
        pub fn $write(port: u16, v: $ty) {
            unsafe { asm!(concat!("out dx, ", $reg), in($reg) v, in("dx") port, options(nostack)) };
        }
    };
}
port!(inb, outb, u8, "al");
port!(inw, outw, u16, "ax");
port!(inl, outl, u32, "eax");

/// Reads an MSR.
#[inline(always)]
pub fn rdmsr(msr: u32) -> u64 {
    let (lo, hi): (u32, u32);
    unsafe { asm!("rdmsr", in("ecx") msr, out("eax") lo, out("edx") hi, options(nostack)) };
    u64::from(hi) << 32 | u64::from(lo)
}

/// Writes an MSR.
#[inline(always)]
pub fn wrmsr(msr: u32, v: u64) {
    unsafe { asm!("wrmsr", in("ecx") msr, in("eax") v as u32, in("edx") (v >> 32) as u32, options(nostack)) };
}

/// The four registers of a CPUID leaf.
#[derive(Clone, Copy)]
pub struct Leaf {
    /// EAX.
    pub a: u32,
    /// EBX.
    pub b: u32,
    /// ECX.
    pub c: u32,
    /// EDX.
    pub d: u32,
}

/// Executes CPUID.
pub fn cpuid(leaf: u32, sub: u32) -> Leaf {
    let r = core::arch::x86_64::__cpuid_count(leaf, sub);
    Leaf { a: r.eax, b: r.ebx, c: r.ecx, d: r.edx }
}

/// CPUID, all zero when the leaf is beyond the maximum.
pub fn leaf(leaf: u32, sub: u32) -> Leaf {
    if cpuid(leaf & 0xffff_0000, 0).a < leaf { Leaf { a: 0, b: 0, c: 0, d: 0 } } else { cpuid(leaf, sub) }
}

/// Reads the time-stamp counter.
#[inline(always)]
pub fn rdtsc() -> u64 {
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// RFLAGS.
#[inline(always)]
pub fn rflags() -> u64 {
    let v;
    unsafe { asm!("pushfq", "pop {}", out(reg) v) };
    v
}

/// Invalidates the translation of one address.
#[inline(always)]
pub fn invlpg(va: u64) {
    unsafe { asm!("invlpg [{}]", in(reg) va, options(nostack)) };
}

/// True on a CPU whose vendor string is GenuineIntel.
pub fn is_intel() -> bool {
    cpuid(0, 0).b == 0x756e_6547
}

/// True on AMD and Hygon.
pub fn is_amd() -> bool {
    let l = cpuid(0, 0);
    l.b == 0x6874_7541 || l.b == 0x6f67_7948
}

/// Physical address width in bits.
pub fn phys_bits() -> u32 {
    match leaf(0x8000_0008, 0).a & 0xff {
        0 => 36,
        n => n,
    }
}

macro_rules! feature {
    ($($name:ident = $leaf:expr, $sub:expr, $reg:ident, $bit:expr;)*) => {
        $(#[doc = concat!("CPUID announces ", stringify!($name), ".")]
        #[allow(dead_code)]
        pub fn $name() -> bool { leaf($leaf, $sub).$reg >> $bit & 1 != 0 })*
    };
}
feature! {
    has_nx = 0x8000_0001, 0, d, 20;
    has_1g = 0x8000_0001, 0, d, 26;
    has_rdtscp = 0x8000_0001, 0, d, 27;
    has_svm = 0x8000_0001, 0, c, 2;
    has_vmx = 1, 0, c, 5;
    has_pcid = 1, 0, c, 17;
    has_x2apic = 1, 0, c, 21;
    has_tsc_deadline = 1, 0, c, 24;
    has_xsave = 1, 0, c, 26;
    has_avx = 1, 0, c, 28;
    has_cx16 = 1, 0, c, 13;
    has_rdrand = 1, 0, c, 30;
    has_monitor = 1, 0, c, 3;
    has_sep = 1, 0, d, 11;
    has_pat = 1, 0, d, 16;
    has_fsgsbase = 7, 0, b, 0;
    has_smep = 7, 0, b, 7;
    has_invpcid = 7, 0, b, 10;
    has_smap = 7, 0, b, 20;
    has_umip = 7, 0, c, 2;
    has_pku = 7, 0, c, 3;
    has_rdpid = 7, 0, c, 22;
    has_bmi1 = 7, 0, b, 3;
    has_xsaveopt = 0xd, 1, a, 0;
    has_xgetbv1 = 0xd, 1, a, 2;
}
