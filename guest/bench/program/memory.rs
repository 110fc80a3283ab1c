//! Memory: many pages, copies, string instructions; dependent loads are in `chase.rs`.

use core::arch::asm;

use crate::{Bench, Ctx, chase, no_teardown, with_memory};

pub const BENCHES: &[Bench] = &[
    Bench { name: "memsweep", ops: 8192, setup: sweep_setup, run: sweep, teardown: no_teardown },
    chase::bench("chase-64k", || chase::setup(64 << 10)),
    chase::bench("chase-4m", || chase::setup(4 << 20)),
    chase::bench("chase-256m", || chase::setup(256 << 20)),
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
