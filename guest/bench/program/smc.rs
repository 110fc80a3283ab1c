//! Self-modifying code.

use crate::{Bench, Ctx, Mem, no_teardown, sys};

pub const BENCHES: &[Bench] = &[
    Bench { name: "smc-patch", ops: 1, setup: code_page, run: patch_and_call, teardown: no_teardown },
    Bench { name: "smc-data", ops: 1, setup: code_page, run: data_beside_code, teardown: no_teardown },
    Bench { name: "smc-emit", ops: 64, setup: code_page, run: emit, teardown: no_teardown },
];

fn code_page() -> Result<Ctx, &'static str> {
    let at = sys::map(4096, sys::READ_WRITE_EXEC).ok_or("no memory both writable and executable")?;
    let mut ctx = Ctx { mem: Mem { at, len: 4096 }, ..Ctx::default() };
    ctx.mem.slice::<u8>()[..6].copy_from_slice(&[0xb8, 0, 0, 0, 0, 0xc3]); // mov eax, imm32; ret
    Ok(ctx)
}

fn function(ctx: &Ctx, offset: usize) -> extern "C" fn() -> u32 {
    // SAFETY: a complete function stands at that offset of the page.
    unsafe { core::mem::transmute(ctx.mem.at.add(offset)) }
}

/// The immediate of an instruction is changed and the instruction executed.
fn patch_and_call(ctx: &mut Ctx, n: u64) -> u64 {
    let code = function(ctx, 0);
    let mut wrong = 0;
    for i in 0..n {
        // SAFETY: inside the page.
        unsafe { ctx.mem.at.add(1).cast::<u32>().write_unaligned(i as u32) };
        wrong += u64::from(code() != i as u32);
    }
    wrong
}

/// Data that shares a page with code is written, and the code executed.
fn data_beside_code(ctx: &mut Ctx, n: u64) -> u64 {
    // SAFETY: inside the page.
    unsafe { ctx.mem.at.add(1).cast::<u32>().write_unaligned(5) };
    let code = function(ctx, 0);
    let mut wrong = 0;
    for i in 0..n {
        // SAFETY: inside the page, far from the code.
        unsafe { ctx.mem.at.add(2048).cast::<u64>().write_volatile(i) };
        wrong += u64::from(code() != 5);
    }
    wrong
}

/// As a just-in-time compiler: 64 functions are written one after another and each called ten times.
fn emit(ctx: &mut Ctx, n: u64) -> u64 {
    let mut total = 0;
    for _ in 0..n {
        total = 0;
        for slot in 0..64usize {
            let [a, b, c, d] = (slot as u32 * 3).to_le_bytes();
            ctx.mem.slice::<u8>()[slot * 16..][..6].copy_from_slice(&[0xb8, a, b, c, d, 0xc3]);
            let code = function(ctx, slot * 16);
            total += (0..10).map(|_| u64::from(code())).sum::<u64>();
        }
    }
    total
}
