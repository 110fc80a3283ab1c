//! Memory: many pages, dependent loads, copies, string instructions.

use core::arch::asm;

use crate::{Bench, Ctx, no_teardown, with_memory};

pub const BENCHES: &[Bench] = &[
    Bench { name: "memsweep", ops: 8192, setup: sweep_setup, run: sweep, teardown: no_teardown },
    Bench {
        name: "chase-64k",
        ops: 1024,
        setup: || chase_setup(64 << 10),
        run: chase,
        teardown: no_teardown,
    },
    Bench { name: "chase-4m", ops: 1024, setup: || chase_setup(4 << 20), run: chase, teardown: no_teardown },
    Bench {
        name: "chase-256m",
        ops: 1024,
        setup: || chase_setup(256 << 20),
        run: chase,
        teardown: no_teardown,
    },
    Bench { name: "memcpy", ops: 65536, setup: || copy_setup(1 << 17), run: copy, teardown: no_teardown },
    Bench {
        name: "rep-movsb",
        ops: 4096,
        setup: || copy_setup(1 << 13),
        run: rep_movsb,
        teardown: no_teardown,
    },
    Bench {
        name: "rep-movsb-short",
        ops: 64 * 24,
        setup: || copy_setup(1 << 13),
        run: short_movsb,
        teardown: no_teardown,
    },
    Bench {
        name: "rep-stosb",
        ops: 4096,
        setup: || copy_setup(1 << 13),
        run: rep_stosb,
        teardown: no_teardown,
    },
    Bench {
        name: "repne-scasb",
        ops: 4096,
        setup: || copy_setup(1 << 13),
        run: repne_scasb,
        teardown: no_teardown,
    },
];

fn sweep_setup() -> Result<Ctx, &'static str> {
    with_memory(32 << 20)
}

/// A word of every page of 32 MiB: read and written.
fn sweep(ctx: &mut Ctx, n: u64) -> u64 {
    for _ in 0..n {
        for page in (0..ctx.mem.len).step_by(4096) {
            // SAFETY: inside the mapping, aligned.
            unsafe {
                let word = ctx.mem.at.add(page).cast::<u64>();
                word.write_volatile(word.read_volatile() + 1);
            }
        }
    }
    ctx.mem.len as u64
}

/// A ring through all cache lines in an order that no prefetcher guesses: a linear congruential sequence of full period.
fn chase_setup(len: usize) -> Result<Ctx, &'static str> {
    let ctx = with_memory(len)?;
    let lines = len / 64;
    for i in 0..lines {
        let next = i.wrapping_mul(0x2545_f491 & !3 | 1).wrapping_add(0x9e37_79b9 | 1) & (lines - 1);
        // SAFETY: both lines are inside the mapping.
        unsafe { ctx.mem.at.add(i * 64).cast::<*mut u8>().write(ctx.mem.at.add(next * 64)) };
    }
    Ok(ctx)
}

fn chase(ctx: &mut Ctx, n: u64) -> u64 {
    // Goes on where the last run ended, so that short runs see all lines too. The place is kept in the second word.
    let place = ctx.mem.at.wrapping_add(8).cast::<*mut u8>();
    // SAFETY: all pointers of the ring point into the mapping.
    unsafe {
        let mut at = if (*place).is_null() { ctx.mem.at } else { *place };
        asm!("2:", "mov {p}, [{p}]", "mov {p}, [{p}]", "mov {p}, [{p}]", "mov {p}, [{p}]",
             "mov {p}, [{p}]", "mov {p}, [{p}]", "mov {p}, [{p}]", "mov {p}, [{p}]", "dec {i}", "jnz 2b",
             p = inout(reg) at, i = inout(reg) n.max(1) * 128 => _, options(nostack));
        *place = at;
        (at as usize & 63) as u64
    }
}

fn copy_setup(len: usize) -> Result<Ctx, &'static str> {
    let mut ctx = with_memory(len)?;
    let half = len / 2;
    for (i, byte) in ctx.mem.slice::<u8>()[..half].iter_mut().enumerate() {
        *byte = (i % 251) as u8 + 1;
    }
    Ok(ctx)
}

fn halves(ctx: &Ctx) -> (*mut u8, *mut u8, usize) {
    let half = ctx.mem.len / 2;
    (ctx.mem.at, ctx.mem.at.wrapping_add(half), half)
}

/// 64 KiB by SSE2 loads and stores.
fn copy(ctx: &mut Ctx, n: u64) -> u64 {
    let (from, to, len) = halves(ctx);
    for _ in 0..n {
        // SAFETY: the halves do not overlap.
        unsafe {
            asm!("2:", "movups xmm0, [{f} + {i}]", "movups xmm1, [{f} + {i} + 16]", "movups [{t} + {i}], xmm0",
                 "movups [{t} + {i} + 16], xmm1", "add {i}, 32", "jnz 2b",
                 f = in(reg) from.add(len), t = in(reg) to.add(len), i = inout(reg) -(len as isize) => _,
                 out("xmm0") _, out("xmm1") _, options(nostack));
        }
    }
    // SAFETY: inside the mapping.
    u64::from(unsafe { *to.add(len - 1) })
}

fn movsb(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: callers pass halves of one mapping.
    unsafe {
        asm!("rep movsb", inout("rsi") from => _, inout("rdi") to => _, inout("rcx") len => _, options(nostack));
    }
}

fn rep_movsb(ctx: &mut Ctx, n: u64) -> u64 {
    let (from, to, len) = halves(ctx);
    (0..n).for_each(|_| movsb(from, to, len));
    // SAFETY: inside the mapping.
    u64::from(unsafe { *to.add(len - 1) })
}

/// 64 copies of 24 bytes.
fn short_movsb(ctx: &mut Ctx, n: u64) -> u64 {
    let (from, to, _) = halves(ctx);
    for _ in 0..n {
        for i in 0..64 {
            movsb(from.wrapping_add(i * 24), to.wrapping_add(i * 24), 24);
        }
    }
    // SAFETY: inside the mapping.
    u64::from(unsafe { *to.add(64 * 24 - 1) })
}

fn rep_stosb(ctx: &mut Ctx, n: u64) -> u64 {
    let (_, to, len) = halves(ctx);
    for _ in 0..n {
        // SAFETY: the upper half of the mapping.
        unsafe {
            asm!("rep stosb", inout("rdi") to => _, inout("rcx") len => _, in("al") 0x33u8, options(nostack));
        }
    }
    // SAFETY: inside the mapping.
    u64::from(unsafe { *to.add(len - 1) })
}

fn repne_scasb(ctx: &mut Ctx, n: u64) -> u64 {
    let (from, _, len) = halves(ctx);
    let mut left = 0usize;
    for _ in 0..n {
        // SAFETY: reads the lower half, which has no zero byte.
        unsafe {
            asm!("repne scasb", inout("rdi") from => _, inout("rcx") len => left, in("al") 0u8, options(nostack));
        }
    }
    left as u64
}
