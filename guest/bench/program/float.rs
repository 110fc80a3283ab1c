//! Floating point: SSE2, AVX2 with FMA, x87.

use core::arch::asm;
use core::arch::x86_64::*;

use crate::{Bench, Ctx, no_setup, no_teardown, with_memory};

const SIDE: usize = 48;

pub const BENCHES: &[Bench] = &[
    Bench {
        name: "matmul-sse2",
        ops: (SIDE * SIDE * SIDE) as u64,
        setup: matrices,
        run: matmul,
        teardown: no_teardown,
    },
    Bench {
        name: "matmul-avx2",
        ops: (SIDE * SIDE * SIDE) as u64,
        setup: avx_matrices,
        run: matmul_avx,
        teardown: no_teardown,
    },
    Bench { name: "nbody-sse2", ops: 100, setup: no_setup, run: nbody, teardown: no_teardown },
    Bench { name: "nbody-x87", ops: 100, setup: no_setup, run: nbody_x87, teardown: no_teardown },
];

fn matrices() -> Result<Ctx, &'static str> {
    let mut ctx = with_memory((3 * SIDE * SIDE * 8).next_multiple_of(4096))?;
    for (i, x) in ctx.mem.slice::<f64>()[..2 * SIDE * SIDE].iter_mut().enumerate() {
        *x = (i % 17) as f64 * 0.25 - 1.5;
    }
    Ok(ctx)
}

/// CPUID 1: OSXSAVE, AVX and FMA; XCR0: SSE and AVX state; CPUID 7: AVX2.
fn has_avx2() -> bool {
    let leaf1 = __cpuid(1).ecx;
    if leaf1 & (1 << 27) == 0 || leaf1 & (1 << 28) == 0 || leaf1 & (1 << 12) == 0 {
        return false;
    }
    let xcr0: u32;
    // SAFETY: OSXSAVE says that XGETBV is there.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") xcr0, out("edx") _, options(nomem, nostack)) };
    xcr0 & 6 == 6 && __cpuid_count(7, 0).ebx & (1 << 5) != 0
}

fn avx_matrices() -> Result<Ctx, &'static str> {
    if has_avx2() { matrices() } else { Err("the processor has no AVX2 and FMA") }
}

fn digest(matrix: &[f64]) -> u64 {
    matrix.iter().fold(0, |hash: u64, x| hash.rotate_left(5) ^ x.to_bits())
}

fn parts(ctx: &mut Ctx) -> (&[f64], &[f64], &mut [f64]) {
    let (inputs, rest) = ctx.mem.slice::<f64>().split_at_mut(2 * SIDE * SIDE);
    let (a, b) = inputs.split_at(SIDE * SIDE);
    (a, b, &mut rest[..SIDE * SIDE])
}

fn matmul(ctx: &mut Ctx, n: u64) -> u64 {
    let (a, b, c) = parts(ctx);
    for _ in 0..n {
        c.fill(0.0);
        for (row_a, row_c) in a.chunks_exact(SIDE).zip(c.chunks_exact_mut(SIDE)) {
            for (&x, row_b) in row_a.iter().zip(b.chunks_exact(SIDE)) {
                row_c.iter_mut().zip(row_b).for_each(|(out, &y)| *out += x * y);
            }
        }
        core::hint::black_box(&mut *c);
    }
    digest(c)
}

fn matmul_avx(ctx: &mut Ctx, n: u64) -> u64 {
    let (a, b, c) = parts(ctx);
    for _ in 0..n {
        // SAFETY: `avx_matrices` found AVX2 and FMA; the slices have SIDE × SIDE elements.
        unsafe { multiply_avx(a, b, c) };
    }
    digest(c)
}

/// # Safety
/// The processor has AVX2 and FMA; each slice has SIDE × SIDE elements.
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply_avx(a: &[f64], b: &[f64], c: &mut [f64]) {
    for i in 0..SIDE {
        for j in (0..SIDE).step_by(8) {
            let (mut low, mut high) = (_mm256_setzero_pd(), _mm256_setzero_pd());
            for k in 0..SIDE {
                // SAFETY: i, k < SIDE and j + 8 <= SIDE.
                unsafe {
                    let x = _mm256_broadcast_sd(a.get_unchecked(i * SIDE + k));
                    let y = b.as_ptr().add(k * SIDE + j);
                    low = _mm256_fmadd_pd(x, _mm256_loadu_pd(y), low);
                    high = _mm256_fmadd_pd(x, _mm256_loadu_pd(y.add(4)), high);
                }
            }
            // SAFETY: as above.
            unsafe {
                let out = c.as_mut_ptr().add(i * SIDE + j);
                _mm256_storeu_pd(out, low);
                _mm256_storeu_pd(out.add(4), high);
            }
        }
    }
}

/// x, y, z, their velocities, mass: sun and four planets, roughly.
type Body = [f64; 7];
const BODIES: [Body; 5] = [
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 39.47],
    [4.84, -1.16, -0.10, 0.606, 2.811, -0.025, 0.0377],
    [8.34, 4.12, -0.40, -1.010, 1.825, 0.008, 0.0113],
    [12.89, -15.11, -0.22, 1.082, 0.868, -0.010, 0.0017],
    [15.37, -25.92, 0.18, 0.979, 0.594, -0.034, 0.0020],
];
const STEP: f64 = 0.01;

fn square_root(x: f64) -> f64 {
    // SAFETY: SSE2 is part of x86-64.
    unsafe { _mm_cvtsd_f64(_mm_sqrt_sd(_mm_set_sd(0.0), _mm_set_sd(x))) }
}

fn pair(a: &mut Body, b: &mut Body) {
    let d = [a[0] - b[0], a[1] - b[1], a[2] - b[2]];
    let square = d[0] * d[0] + d[1] * d[1] + d[2] * d[2];
    let magnitude = STEP / (square * square_root(square));
    let (mass_a, mass_b) = (a[6], b[6]);
    for i in 0..3 {
        a[3 + i] -= d[i] * mass_b * magnitude;
        b[3 + i] += d[i] * mass_a * magnitude;
    }
}

fn steps(n: u64, pair: fn(&mut Body, &mut Body)) -> u64 {
    let mut bodies = BODIES;
    for _ in 0..n {
        bodies = core::hint::black_box(BODIES);
        for _ in 0..10 {
            for i in 0..5 {
                let (head, tail) = bodies.split_at_mut(i + 1);
                tail.iter_mut().for_each(|other| pair(&mut head[i], other));
            }
            for body in &mut bodies {
                (0..3).for_each(|i| body[i] += STEP * body[3 + i]);
            }
        }
    }
    digest(bodies.as_flattened())
}

fn nbody(_: &mut Ctx, n: u64) -> u64 {
    steps(n, pair)
}

fn nbody_x87(_: &mut Ctx, n: u64) -> u64 {
    steps(n, pair_x87)
}

fn pair_x87(a: &mut Body, b: &mut Body) {
    // SAFETY: reads and writes the two bodies; leaves the x87 stack empty, as it was.
    unsafe {
        asm!(
            "fld qword ptr [{a}]", "fsub qword ptr [{b}]",
            "fld qword ptr [{a} + 8]", "fsub qword ptr [{b} + 8]",
            "fld qword ptr [{a} + 16]", "fsub qword ptr [{b} + 16]", // dz dy dx
            "fld st(0)", "fmul st(0), st(0)",
            "fld st(2)", "fmul st(0), st(0)", "faddp",
            "fld st(3)", "fmul st(0), st(0)", "faddp", // d² dz dy dx
            "fld st(0)", "fsqrt", "fmulp", "fdivr qword ptr [{step}]", // magnitude dz dy dx
            "fmul st(3), st(0)", "fmul st(2), st(0)", "fmulp",
            "fld st(0)", "fmul qword ptr [{b} + 48]", "fsubr qword ptr [{a} + 40]", "fstp qword ptr [{a} + 40]",
            "fmul qword ptr [{a} + 48]", "fadd qword ptr [{b} + 40]", "fstp qword ptr [{b} + 40]",
            "fld st(0)", "fmul qword ptr [{b} + 48]", "fsubr qword ptr [{a} + 32]", "fstp qword ptr [{a} + 32]",
            "fmul qword ptr [{a} + 48]", "fadd qword ptr [{b} + 32]", "fstp qword ptr [{b} + 32]",
            "fld st(0)", "fmul qword ptr [{b} + 48]", "fsubr qword ptr [{a} + 24]", "fstp qword ptr [{a} + 24]",
            "fmul qword ptr [{a} + 48]", "fadd qword ptr [{b} + 24]", "fstp qword ptr [{b} + 24]",
            a = in(reg) a, b = in(reg) b, step = in(reg) &raw const STEP_X87,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _,
            out("st(6)") _, out("st(7)") _, options(nostack)
        );
    }
}

static STEP_X87: f64 = STEP;
