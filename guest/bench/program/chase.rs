//! Dependent loads over working sets from 4 KiB to 256 MiB, in pages of 4 KiB and of 2 MiB.

use core::arch::asm;

use crate::{Bench, Ctx, Mem, huge, no_teardown, sys};

pub const BENCHES: &[Bench] = &[
    bench("chase-4k", || setup(1 << 12)),
    bench("chase-16k", || setup(1 << 14)),
    bench("chase-256k", || setup(1 << 18)),
    bench("chase-1m", || setup(1 << 20)),
    bench("chase-16m", || setup(1 << 24)),
    bench("chase-64m", || setup(1 << 26)),
    bench("huge-4k", || huge_setup(1 << 12)),
    bench("huge-16k", || huge_setup(1 << 14)),
    bench("huge-64k", || huge_setup(1 << 16)),
    bench("huge-256k", || huge_setup(1 << 18)),
    bench("huge-1m", || huge_setup(1 << 20)),
    bench("huge-4m", || huge_setup(1 << 22)),
    bench("huge-16m", || huge_setup(1 << 24)),
    bench("huge-64m", || huge_setup(1 << 26)),
    bench("huge-256m", || huge_setup(1 << 28)),
];

/// Loads of one iteration.
const LOADS: u64 = 1024;
const LINE: usize = 64;

pub const fn bench(name: &'static str, setup: fn() -> Result<Ctx, &'static str>) -> Bench {
    Bench { name, ops: LOADS, setup, run: chase, teardown: no_teardown }
}

/// A ring over `len` bytes in pages of 4 KiB, whatever the kernel would like better.
pub fn setup(len: usize) -> Result<Ctx, &'static str> {
    let at = sys::map(len, sys::READ_WRITE).ok_or("not enough memory")?;
    let mem = Mem { at, len };
    // A kernel without transparent huge pages does not know the advice, and needs none.
    sys::advise(at, len, sys::MADV_NOHUGEPAGE);
    Ok(ring(Ctx { mem, ..Ctx::default() }, 0, len))
}

/// The same in pages of 2 MiB; the last one is only used in part if `len` is smaller.
fn huge_setup(len: usize) -> Result<Ctx, &'static str> {
    let (mem, start) = huge::map(len)?;
    Ok(ring(Ctx { mem, ..Ctx::default() }, start, len))
}

/// A ring through all cache lines in an order that no prefetcher guesses: a linear congruential sequence of full period.
fn ring(mut ctx: Ctx, start: usize, len: usize) -> Ctx {
    let lines = len / LINE;
    let first = ctx.mem.at.wrapping_add(start);
    for i in 0..lines {
        let next = i.wrapping_mul(0x2545_f491 & !3 | 1).wrapping_add(0x9e37_79b9 | 1) & (lines - 1);
        // SAFETY: both lines are inside the mapping.
        unsafe { first.add(i * LINE).cast::<*mut u8>().write(first.add(next * LINE)) };
    }
    ctx.place = first as usize;
    ctx
}

/// Goes on where the last run ended, so that short runs see all lines too.
fn chase(ctx: &mut Ctx, n: u64) -> u64 {
    let mut at = ctx.place as *mut u8;
    // SAFETY: all pointers of the ring point into it.
    unsafe {
        asm!("2:", "mov {p}, [{p}]", "mov {p}, [{p}]", "mov {p}, [{p}]", "mov {p}, [{p}]",
             "mov {p}, [{p}]", "mov {p}, [{p}]", "mov {p}, [{p}]", "mov {p}, [{p}]", "dec {i}", "jnz 2b",
             p = inout(reg) at, i = inout(reg) n.max(1) * (LOADS / 8) => _, options(nostack));
    }
    ctx.place = at as usize;
    (at as usize % LINE) as u64
}
