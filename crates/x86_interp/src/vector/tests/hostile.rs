//! Nonsense: random bytes in every mode, on random state, must neither panic nor crash, and an exception must leave
//! the registers as they were.

use x86::Exception;

use super::super::layout::layout;
use super::super::{Kind, execute, prepare};
use super::{Mock, Random, decode};

const BASE: u64 = 0x1000;

/// Random bytes that are likely to be one of our instructions.
fn random_code(random: &mut Random) -> [u8; 15] {
    let mut code = [0u8; 15];
    for b in &mut code {
        *b = random.next().to_le_bytes()[0];
    }
    let mut at = 0;
    if random.below(3) == 0 {
        code[0] = [0x66, 0xf2, 0xf3, 0x67, 0x64][usize::try_from(random.below(5)).unwrap()];
        at = 1;
    }
    match random.below(6) {
        0 => code[at] = 0xd8 + code[at] % 8,
        1 => code[at] = 0x0f,
        2 => (code[at], code[at + 1]) = (0x0f, [0x38, 0x3a, 0xae, 0xc7][usize::from(code[at + 1] & 3)]),
        3 => code[at] = [0xc4, 0xc5][usize::from(code[at] & 1)],
        // EVEX with the fixed bits right.
        4 => {
            code[at] = 0x62;
            code[at + 1] &= 0xf7;
            code[at + 2] |= 4;
        }
        _ => {}
    }
    code
}

fn random_mock(random: &mut Random) -> Mock {
    let mut m = Mock::new(BASE);
    random.fill(&mut m.fpu.0);
    for r in &mut m.gpr {
        // Mostly within memory.
        *r = if random.below(4) == 0 { random.number() } else { BASE + random.below(0x4000) };
    }
    if random.below(2) == 0 {
        m.gpr[0] &= !63;
    }
    m.absent[2] = random.below(2) == 0;
    m.control.cpl = [0, 3][usize::try_from(random.below(2)).unwrap()];
    m
}

#[test]
fn random_bytes_on_random_state_neither_panic_nor_crash() {
    let count: u64 = std::env::var("VECTOR_HOSTILE").ok().and_then(|v| v.parse().ok()).unwrap_or(200_000);
    let mut random = Random(42);
    let (mut executed, mut raised) = (0, 0);
    for _ in 0..count {
        let code = random_code(&mut random);
        let bitness = [16, 32, 64][usize::try_from(random.below(3)).unwrap()];
        let i = decode(bitness, &code);
        let Some(op) = prepare(&i) else { continue };
        let mut m = random_mock(&mut random);
        m.control.code64 = bitness == 64;
        let before = m.clone();
        match execute(&op, &mut m) {
            Ok(()) => executed += 1,
            Err(e) => {
                raised += 1;
                assert!(m.gpr == before.gpr, "{i}: {e:?} changed a register");
                let partial = matches!(op.kind, Kind::Gather(_)) || e == Exception::XM;
                let same = m.fpu.0[32..512] == before.fpu.0[32..512] && m.fpu.0[576..] == before.fpu.0[576..];
                // FXSAVE and XSAVE family: pages that fault late are probed first.
                assert!(partial || same, "{:?}: {e:?} changed the state", i.code());
            }
        }
        assert_eq!(m.fpu.0.len(), 4096);
    }
    println!("{executed} executed, {raised} raised");
    assert!(executed * 50 > count, "{executed} executed");
}

#[test]
fn every_single_exception_mask_leaves_state_alone_when_raised() {
    let mut random = Random(7);
    let mut raised = 0;
    // addps, mulps, divps, subps, sqrtps, cvttps2dq, vdivps zmm
    let codes: [&[u8]; 7] = [
        &[0x0f, 0x58, 0xc1],
        &[0x0f, 0x59, 0xc1],
        &[0x0f, 0x5e, 0xc1],
        &[0x0f, 0x5c, 0xc1],
        &[0x0f, 0x51, 0xc1],
        &[0xf3, 0x0f, 0x5b, 0xc1],
        &[0x62, 0xf1, 0x7c, 0x48, 0x5e, 0xc1],
    ];
    for _ in 0..20_000 {
        let mut m = Mock::new(BASE);
        random.fill(&mut m.fpu.0[160..512]);
        for c in layout().components.iter().skip(2).filter(|c| c.size != 0) {
            random.fill(&mut m.fpu.0[c.offset..c.offset + c.size]);
        }
        let guest = u32::try_from(random.below(0x1_0000)).unwrap() & !0x3f;
        m.set_mxcsr(guest);
        let before = m.fpu.clone();
        let code = codes[usize::try_from(random.below(if layout().avx512 { 7 } else { 6 })).unwrap()];
        let result = m.run(code);
        let (masks, flags) = (guest >> 7 & 0x3f, m.mxcsr() & 0x3f);
        match result {
            Err(e) => {
                raised += 1;
                assert_eq!(e, Exception::XM);
                assert_ne!(flags & !masks, 0, "an unmasked flag is set");
                assert!(m.fpu.0[32..512] == before.0[32..512] && m.fpu.0[576..] == before.0[576..]);
            }
            Ok(()) => assert_eq!(flags & !masks, 0, "no unmasked flag is set: {flags:#x} {guest:#x}"),
        }
        assert_eq!(m.mxcsr() & !0x3f, guest, "controls stay");
    }
    assert!(raised > 1000);
}

/// `cargo test --release -- --ignored --nocapture cost`: nanoseconds an instruction.
#[test]
#[ignore = "prints times"]
fn cost_of_typical_instructions() {
    let cases: [(&str, &[u8]); 9] = [
        ("movups xmm0, [rax]", &[0x0f, 0x10, 0x00]),
        ("pxor xmm0, xmm1", &[0x66, 0x0f, 0xef, 0xc1]),
        ("pcmpeqb xmm0, xmm1", &[0x66, 0x0f, 0x74, 0xc1]),
        ("addsd xmm0, xmm1", &[0xf2, 0x0f, 0x58, 0xc1]),
        ("vpaddsb ymm0, ymm1, ymm2", &[0xc5, 0xf5, 0xec, 0xc2]),
        ("vaddps zmm1, zmm1, zmm2", &[0x62, 0xf1, 0x74, 0x48, 0x58, 0xca]),
        ("popcnt eax, ecx", &[0xf3, 0x0f, 0xb8, 0xc1]),
        ("fadd st0, st1", &[0xd8, 0xc1]),
        ("fxsave [rax]", &[0x0f, 0xae, 0x00]),
    ];
    for (name, code) in cases {
        let mut m = Mock::new(BASE);
        m.gpr[0] = BASE;
        let Some(op) = prepare(&decode(64, code)) else { continue };
        if matches!(op.kind, Kind::Undefined) {
            continue;
        }
        let batch = |m: &mut Mock| {
            let start = std::time::Instant::now();
            for _ in 0..50_000 {
                m.gpr[0] = BASE;
                execute(&op, m).unwrap();
                m.writes.clear();
            }
            start.elapsed().as_secs_f64() * 2e4
        };
        let best = (0..20).map(|_| batch(&mut m)).fold(f64::INFINITY, f64::min);
        println!("{name}: {best:.1} ns");
    }
}
