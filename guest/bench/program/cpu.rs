//! User-mode integer code and control flow.

use core::arch::asm;
use core::hint::black_box;

use crate::{Bench, Ctx, no_setup, no_teardown, with_memory};

pub const BENCHES: &[Bench] = &[
    Bench { name: "sum", ops: 1000, setup: no_setup, run: sum, teardown: no_teardown },
    Bench { name: "callret", ops: 1000, setup: no_setup, run: call_ret, teardown: no_teardown },
    Bench { name: "fnptr", ops: 1024, setup: no_setup, run: function_pointers, teardown: no_teardown },
    Bench { name: "switch", ops: 4 * 200, setup: no_setup, run: switch, teardown: no_teardown },
    Bench { name: "divide", ops: 1000, setup: no_setup, run: divide, teardown: no_teardown },
    Bench { name: "branchy", ops: 4096, setup: branchy_setup, run: branchy, teardown: no_teardown },
];

fn sum(_: &mut Ctx, n: u64) -> u64 {
    let mut total = 0u64;
    for _ in 0..n {
        // SAFETY: registers only.
        unsafe {
            asm!("xor {t:e}, {t:e}", "2: add {t}, {i}", "dec {i}", "jnz 2b", t = out(reg) total, i = inout(reg) 1000u64 => _,
                 options(nomem, nostack));
        }
    }
    total
}

fn call_ret(_: &mut Ctx, n: u64) -> u64 {
    let mut total = 0u64;
    for _ in 0..n {
        // SAFETY: calls within the block; the stack is as before at its end.
        unsafe {
            asm!("xor {t:e}, {t:e}", "2: call 3f", "dec {i}", "jnz 2b", "jmp 4f", "3: add {t}, {i}", "ret", "4:",
                 t = out(reg) total, i = inout(reg) 1000u64 => _);
        }
    }
    total
}

#[inline(never)]
fn add3(x: u64) -> u64 {
    x.wrapping_add(3)
}
#[inline(never)]
fn times5(x: u64) -> u64 {
    x.wrapping_mul(5)
}
#[inline(never)]
fn rotate(x: u64) -> u64 {
    x.rotate_left(7)
}
#[inline(never)]
fn flip(x: u64) -> u64 {
    !x
}

fn function_pointers(_: &mut Ctx, n: u64) -> u64 {
    let table: [fn(u64) -> u64; 4] = black_box([add3, times5, rotate, flip]);
    let mut value = 0;
    for _ in 0..n {
        value = 1u64;
        for i in 0..1024usize {
            value = table[(i ^ (i >> 3)) & 3](value);
        }
    }
    value
}

/// An interpreter of a stack machine: one instruction a byte, operands follow.
fn switch(_: &mut Ctx, n: u64) -> u64 {
    // acc = 0; counter = 200; loop: acc = (acc + 7) ^ counter; dec counter; jump if not zero
    const CODE: &[u8] = &[0, 200, 1, 7, 2, 3, 4, 2, 5];
    let code = black_box(CODE);
    let mut result = 0;
    for _ in 0..n {
        let (mut pc, mut acc, mut counter) = (0usize, 0u64, 0u64);
        result = loop {
            let op = code[pc];
            match op {
                0 => {
                    counter = u64::from(code[pc + 1]);
                    pc += 2;
                }
                1 => {
                    acc = acc.wrapping_add(u64::from(code[pc + 1]));
                    pc += 2;
                }
                2 => {
                    acc ^= counter << 3;
                    pc += 1;
                }
                3 => {
                    counter -= 1;
                    pc += 1;
                }
                4 => pc = if counter != 0 { usize::from(code[pc + 1]) } else { pc + 2 },
                5 => break acc,
                6 => {
                    acc = acc.rotate_left(5);
                    pc += 1;
                }
                _ => {
                    acc = acc.wrapping_mul(31);
                    pc += 1;
                }
            }
        };
    }
    result
}

fn divide(_: &mut Ctx, n: u64) -> u64 {
    let mut total = 0u64;
    for _ in 0..n {
        total = 0;
        for i in 1..=1000u64 {
            total += black_box(0x1234_5678_9abc_u64) / black_box(i);
        }
    }
    total
}

fn branchy_setup() -> Result<Ctx, &'static str> {
    let mut ctx = with_memory(4096 * 4)?;
    let mut seed = 12345u32;
    for slot in ctx.mem.slice::<u32>() {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *slot = seed >> 8;
    }
    Ok(ctx)
}

/// Data-dependent branches that no predictor knows.
fn branchy(ctx: &mut Ctx, n: u64) -> u64 {
    let mut total = 0u64;
    for _ in 0..n {
        total = 0;
        for &value in black_box(ctx.mem.slice::<u32>()).iter() {
            if value & 1 != 0 {
                total = black_box(total + 3);
            } else if value & 6 == 2 {
                total = black_box(total ^ 0x55);
            }
        }
    }
    total
}
