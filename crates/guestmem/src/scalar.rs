//! Single-instruction accesses to machine memory: the only place that dereferences it.
//!
//! Guest memory is shared with other vCPUs, devices and other processes, so no Rust reference to it may
//! exist, and racing plain Rust accesses would be undefined. Each access here is one host instruction in an
//! `asm!` block: a race gives what the hardware gives.

#![expect(
    unsafe_code,
    reason = "raw accesses to guest RAM; each is bounds-checked by the caller in this crate"
)]

use std::arch::asm;

mod sealed {
    pub trait Sealed {}
}

/// An integer that one x86 instruction loads, stores or exchanges.
pub trait Scalar: sealed::Sealed + Copy + Eq + Default + 'static {
    /// Size in bytes.
    const SIZE: usize;
    /// Zero-extended value.
    fn to_u64(self) -> u64;
    /// The low bytes of `value`.
    fn from_u64(value: u64) -> Self;

    /// # Safety
    /// `p..p+SIZE` must be readable (INV-GM-1 plus a bounds check).
    #[doc(hidden)]
    unsafe fn load(p: *const u8) -> Self;
    /// # Safety
    /// `p..p+SIZE` must be writable (INV-GM-1 plus a bounds check).
    #[doc(hidden)]
    unsafe fn store(p: *mut u8, value: Self);
    /// LOCK CMPXCHG: returns the value found, which equals `old` when `new` was stored.
    /// # Safety
    /// As [`Scalar::store`].
    #[doc(hidden)]
    unsafe fn cmpxchg(p: *mut u8, old: Self, new: Self) -> Self;
}

macro_rules! scalar {
    ($t:ty, $class:ident, $modifier:literal, $acc:tt) => {
        impl sealed::Sealed for $t {}
        impl Scalar for $t {
            const SIZE: usize = size_of::<$t>();
            #[inline(always)]
            fn to_u64(self) -> u64 {
                u64::from(self)
            }
            #[inline(always)]
            #[allow(clippy::cast_possible_truncation, reason = "taking the low bytes is the purpose")]
            fn from_u64(value: u64) -> Self {
                value as Self
            }
            #[inline(always)]
            unsafe fn load(p: *const u8) -> Self {
                let value: $t;
                // SAFETY: the caller guarantees that the bytes are readable; the block only reads them.
                unsafe {
                    asm!(concat!("mov {0", $modifier, "}, [{1}]"), out($class) value, in(reg) p,
                        options(nostack, preserves_flags, readonly));
                }
                value
            }
            #[inline(always)]
            unsafe fn store(p: *mut u8, value: Self) {
                // SAFETY: the caller guarantees that the bytes are writable, and no Rust object lives there.
                unsafe {
                    asm!(concat!("mov [{0}], {1", $modifier, "}"), in(reg) p, in($class) value,
                        options(nostack, preserves_flags));
                }
            }
            #[inline(always)]
            unsafe fn cmpxchg(p: *mut u8, old: Self, new: Self) -> Self {
                let found: $t;
                // SAFETY: as for `store`.
                unsafe {
                    asm!(concat!("lock cmpxchg [{0}], {1", $modifier, "}"), in(reg) p, in($class) new,
                        inout($acc) old => found, options(nostack));
                }
                found
            }
        }
    };
}
scalar!(u8, reg_byte, "", "al");
scalar!(u16, reg, ":x", "ax");
scalar!(u32, reg, ":e", "eax");
scalar!(u64, reg, ":r", "rax");

/// LOCK CMPXCHG16B. Returns the value found.
///
/// # Safety
/// `p..p+16` must be writable and `p` 16-byte aligned.
pub(crate) unsafe fn cmpxchg16b(p: *mut u8, old: u128, new: u128) -> u128 {
    let [mut low, mut high] = halves(old);
    let [new_low, new_high] = halves(new);
    // SAFETY: the caller guarantees the bytes; RBX, which LLVM reserves, is swapped in and out. The registers are named
    // because `reg` may be RBX.
    unsafe {
        asm!("xchg rsi, rbx", "lock cmpxchg16b [rdi]", "xchg rsi, rbx",
            in("rdi") p, inout("rsi") new_low => _, in("rcx") new_high,
            inout("rax") low, inout("rdx") high, options(nostack));
    }
    u128::from(high) << 64 | u128::from(low)
}

#[expect(clippy::cast_possible_truncation, reason = "splitting in halves is the purpose")]
fn halves(v: u128) -> [u64; 2] {
    [v as u64, (v >> 64) as u64]
}

/// Copies out of machine memory, as a string move would.
///
/// # Safety
/// `src..src+dst.len()` must be readable machine memory.
pub(crate) unsafe fn copy_out(src: *const u8, dst: &mut [u8]) {
    // SAFETY: the source is readable by the caller's word, the destination by its type; both are disjoint,
    // because no Rust object lives in machine memory.
    unsafe {
        asm!("rep movsb", inout("rcx") dst.len() => _, inout("rsi") src => _, inout("rdi") dst.as_mut_ptr() => _,
            options(nostack, preserves_flags));
    }
}

/// Copies into machine memory.
///
/// # Safety
/// `dst..dst+src.len()` must be writable machine memory.
pub(crate) unsafe fn copy_in(dst: *mut u8, src: &[u8]) {
    // SAFETY: as in `copy_out`.
    unsafe {
        asm!("rep movsb", inout("rcx") src.len() => _, inout("rsi") src.as_ptr() => _, inout("rdi") dst => _,
            options(nostack, preserves_flags));
    }
}

/// Fills machine memory with a byte.
///
/// # Safety
/// `dst..dst+len` must be writable machine memory.
pub(crate) unsafe fn fill(dst: *mut u8, len: usize, value: u8) {
    // SAFETY: as in `copy_in`.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, in("al") value, inout("rdi") dst => _,
            options(nostack, preserves_flags));
    }
}

/// Copies within machine memory (the ranges may overlap; the copy goes upwards byte by byte).
///
/// # Safety
/// Both ranges must be machine memory.
pub(crate) unsafe fn copy_within(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: as in `copy_in`; REP MOVSB defines overlapping copies.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rsi") src => _, inout("rdi") dst => _,
            options(nostack, preserves_flags));
    }
}
