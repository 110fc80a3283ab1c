//! Exceptions: control registers, alignment, unmasked floating-point exceptions, faults in the middle.

use x86::Exception;
use x86::bits::{cr0, cr4};

use super::super::VectorCpu;
use super::super::layout::{self, at, layout};
use super::Mock;

const BASE: u64 = 0x10_0000;

fn mock() -> Mock {
    let mut m = Mock::new(BASE);
    m.gpr[0] = BASE + 0x100;
    m
}

const ADDPS: &[u8] = &[0x0f, 0x58, 0x08]; // addps xmm1, [rax]
const FLD1: &[u8] = &[0xd9, 0xe8];
const PADDB_MMX: &[u8] = &[0x0f, 0xfc, 0xc1];
const VADDPS: &[u8] = &[0xc5, 0xf4, 0x58, 0xca]; // vaddps ymm1, ymm1, ymm2
const VADDPS_ZMM: &[u8] = &[0x62, 0xf1, 0x74, 0x48, 0x58, 0xca];
const WAIT: &[u8] = &[0x9b];
const ANDN: &[u8] = &[0xc4, 0xe2, 0x70, 0xf2, 0xc2];

#[test]
fn control_registers_gate_each_class() {
    let with = |change: fn(&mut Mock), code: &[u8]| {
        let mut m = mock();
        change(&mut m);
        m.run(code)
    };
    let ts: fn(&mut Mock) = |m| m.control.cr0 |= cr0::TS;
    let em: fn(&mut Mock) = |m| m.control.cr0 |= cr0::EM;
    for code in [ADDPS, FLD1, PADDB_MMX, WAIT] {
        assert_eq!(with(ts, code), Err(Exception::NM), "{code:02x?}");
    }
    assert_eq!(with(em, ADDPS), Err(Exception::UD));
    assert_eq!(with(em, PADDB_MMX), Err(Exception::UD));
    assert_eq!(with(em, FLD1), Err(Exception::NM));
    assert_eq!(with(em, WAIT), Ok(()));
    assert_eq!(with(|m| m.control.cr0 = cr0::PE | cr0::TS, WAIT), Ok(()), "WAIT needs MP");
    assert_eq!(with(|m| m.control.cr4 &= !cr4::OSFXSR, ADDPS), Err(Exception::UD));
    assert_eq!(with(|m| m.control.cr4 &= !cr4::OSFXSR, PADDB_MMX), Ok(()));
    // #UD comes before #NM.
    assert_eq!(with(|m| m.control.cr0 |= cr0::TS | cr0::EM, ADDPS), Err(Exception::UD));
    let popcnt = &[0xf3, 0x0f, 0xb8, 0xc1];
    assert_eq!(with(|m| m.control.cr0 |= cr0::TS | cr0::EM, popcnt), Ok(()));
}

#[test]
fn vex_needs_xcr0_and_protected_mode() {
    if !is_x86_feature_detected!("avx2") {
        return eprintln!("skipped: the host has no AVX2");
    }
    let with = |change: fn(&mut Mock), code: &[u8]| {
        let mut m = mock();
        change(&mut m);
        m.run(code)
    };
    assert_eq!(with(|_| {}, VADDPS), Ok(()));
    assert_eq!(with(|m| m.control.cr4 &= !cr4::OSXSAVE, VADDPS), Err(Exception::UD));
    assert_eq!(with(|m| m.control.xcr0 = 3, VADDPS), Err(Exception::UD));
    assert_eq!(with(|m| m.control.real_or_v86 = true, VADDPS), Err(Exception::UD));
    assert_eq!(with(|m| m.control.real_or_v86 = true, ANDN), Err(Exception::UD));
    assert_eq!(with(|m| m.control.xcr0 = 1, ANDN), Ok(()), "BMI needs no vector state");
    assert_eq!(with(|m| m.control.cr0 |= cr0::TS, VADDPS), Err(Exception::NM));
    if layout().avx512 {
        assert_eq!(with(|_| {}, VADDPS_ZMM), Ok(()));
        assert_eq!(with(|m| m.control.xcr0 = 7, VADDPS_ZMM), Err(Exception::UD));
    }
}

#[test]
fn legacy_sse_operand_unaligned_raises_gp() {
    let mut m = mock();
    m.gpr[0] += 8;
    assert_eq!(m.run(ADDPS), Err(Exception::GP0));
    assert_eq!(m.run(&[0x0f, 0x28, 0x08]), Err(Exception::GP0), "movaps");
    assert_eq!(m.run(&[0x0f, 0x10, 0x08]), Ok(()), "movups");
    assert_eq!(m.run(&[0x66, 0x0f, 0x3a, 0x63, 0x08, 0]), Ok(()), "pcmpistri");
    if is_x86_feature_detected!("avx") {
        assert_eq!(m.run(&[0xc5, 0xf4, 0x58, 0x08]), Ok(()), "vaddps ymm1, ymm1, [rax]");
        assert_eq!(m.run(&[0xc5, 0xfc, 0x28, 0x08]), Err(Exception::GP0), "vmovaps ymm1, [rax]");
    }
    if layout().mxcsr_mask & 1 << 17 != 0 {
        m.set_mxcsr(0x1f80 | 1 << 17);
        assert_eq!(m.run(ADDPS), Ok(()), "misaligned mode");
        assert_eq!(m.run(&[0x0f, 0x28, 0x08]), Err(Exception::GP0), "movaps all the same");
    }
}

fn single(x: f32) -> u128 {
    u128::from(x.to_bits())
}

#[test]
fn unmasked_divide_by_zero_raises_xm_and_keeps_registers() {
    let divss = &[0xf3, 0x0f, 0x5e, 0xc1]; // divss xmm0, xmm1
    let mut m = mock();
    m.set_xmm(0, single(1.0));
    m.set_mxcsr(0x1f80 & !(1 << 9));
    assert_eq!(m.run(divss), Err(Exception::XM));
    assert_eq!(m.xmm(0), single(1.0));
    assert_eq!(m.mxcsr(), 0x1f80 & !(1 << 9) | 4);
    m.control.cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!(m.run(divss), Err(Exception::UD));
    m.set_mxcsr(0x1f80);
    assert_eq!(m.run(divss), Ok(()));
    assert_eq!(m.xmm(0), single(f32::INFINITY));
    assert_eq!(m.mxcsr(), 0x1f84);
}

#[test]
fn unmasked_precision_alone_raises_xm_with_inexact_results_only() {
    let addss = &[0xf3, 0x0f, 0x58, 0xc1];
    let mut m = mock();
    m.set_mxcsr(0x0f80);
    m.set_xmm(0, single(1.0));
    m.set_xmm(1, single(1.0));
    assert_eq!(m.run(addss), Ok(()));
    assert_eq!(m.xmm(0), single(2.0));
    m.set_xmm(1, single(1e-20));
    assert_eq!(m.run(addss), Err(Exception::XM));
    assert_eq!(m.xmm(0), single(2.0));
    assert_eq!(m.mxcsr(), 0x0fa0);
}

#[test]
fn precomputation_exception_suppresses_the_others() {
    // divps: one element divides by zero, another is inexact; zero divide is unmasked.
    let mut m = mock();
    m.set_xmm(0, single(1.0) | single(1.0) << 32 | single(1.0) << 64 | single(1.0) << 96);
    m.set_xmm(1, single(0.0) | single(3.0) << 32 | single(1.0) << 64 | single(1.0) << 96);
    m.set_mxcsr(0x1d80);
    assert_eq!(m.run(&[0x0f, 0x5e, 0xc1]), Err(Exception::XM));
    assert_eq!(m.mxcsr(), 0x1d84);
}

#[test]
fn unmasked_underflow_is_raised_by_exact_tiny_results() {
    let mulss = &[0xf3, 0x0f, 0x59, 0xc1];
    let mut m = mock();
    m.set_mxcsr(0x1f80 & !(1 << 11));
    m.set_xmm(0, single(f32::MIN_POSITIVE));
    m.set_xmm(1, single(0.5));
    assert_eq!(m.run(mulss), Err(Exception::XM));
    assert_eq!(m.mxcsr() & 0x3f, 0x10, "underflow, exact");
    m.set_mxcsr(0x1f80);
    assert_eq!(m.run(mulss), Ok(()));
    assert_eq!(m.mxcsr() & 0x3f, 0, "masked: only if inexact");
    assert_eq!(m.xmm(0), single(f32::MIN_POSITIVE / 2.0));
}

#[test]
fn unmasked_x87_exception_is_raised_by_the_next_waiting_instruction() {
    let mut m = mock();
    layout::put(&mut m.fpu, at::FCW, &0x37bu16.to_le_bytes()); // zero divide unmasked
    m.run(FLD1).unwrap();
    m.run(&[0xd9, 0xee]).unwrap(); // fldz
    m.control.rip = 0x40_2000;
    m.run(&[0xd8, 0xf9]).unwrap(); // fdivr st0, st1: 1 / 0
    m.control.rip = 0x40_3000;
    let fsw = layout::u16_at(&m.fpu, at::FSW);
    assert_eq!(fsw & 0x8084, 0x8084, "ES, B and ZE");
    assert_eq!(m.run(FLD1), Err(Exception::MF));
    assert_eq!(m.run(WAIT), Err(Exception::MF));
    assert_eq!(m.run(PADDB_MMX), Err(Exception::MF));
    m.run(&[0xdf, 0xe0]).unwrap(); // fnstsw ax
    assert_eq!(m.gpr[0] & 0xffff, u64::from(fsw));
    assert_eq!(layout::u64_at(&m.fpu, at::FIP), 0x40_2000);
    m.run(&[0xdb, 0xe2]).unwrap(); // fnclex
    m.run(FLD1).unwrap();
}

#[test]
fn x87_store_with_unmasked_exception_leaves_memory() {
    let mut m = mock();
    m.memory[0x100..0x104].copy_from_slice(&[0x55; 4]);
    layout::put(&mut m.fpu, at::FCW, &0x37eu16.to_le_bytes()); // invalid unmasked
    m.run(&[0xd9, 0x18]).unwrap(); // fstp dword [rax] of an empty register
    assert_eq!(m.memory[0x100..0x104], [0x55; 4]);
    assert_eq!(m.run(WAIT), Err(Exception::MF));
}

#[test]
fn x87_store_to_absent_page_does_not_pop() {
    let mut m = mock();
    m.run(FLD1).unwrap();
    let before = m.fpu.clone();
    m.absent[0] = true;
    assert_eq!(m.run(&[0xd9, 0x18]), Err(Exception::pf(6)));
    assert!(m.fpu == before);
}

#[test]
fn x87_pointers_are_the_guests() {
    let mut m = mock();
    m.control.rip = 0x1234_5678_9abc;
    m.run(&[0xd9, 0x40, 0x10]).unwrap(); // fld dword [rax+16]
    assert_eq!(layout::u64_at(&m.fpu, at::FIP), 0x1234_5678_9abc);
    assert_eq!(layout::u64_at(&m.fpu, at::FDP), BASE + 0x110);
    m.control.code64 = false;
    m.control.rip = 0x7000;
    m.run_as(32, &[0xd9, 0x40, 0x10]).unwrap();
    assert_eq!(layout::u64_at(&m.fpu, at::FIP), 0x33_0000_7000);
    assert_eq!(layout::u64_at(&m.fpu, at::FDP), 0x2b_0000_0000 | (BASE + 0x110));
    // fnstenv [rax], 32-bit protected mode
    m.run_as(32, &[0xd9, 0x30]).unwrap();
    assert_eq!(m.memory[0x10c..0x110], 0x7000u32.to_le_bytes());
    assert_eq!(m.memory[0x110..0x112], 0x33u16.to_le_bytes());
    assert_eq!(m.memory[0x118..0x11a], 0x2bu16.to_le_bytes());
}

#[test]
fn gather_fault_in_the_middle_keeps_what_is_done() {
    if !is_x86_feature_detected!("avx2") {
        return eprintln!("skipped: the host has no AVX2");
    }
    // vpgatherdd xmm1, [rax + xmm2*4], xmm3
    let code = &[0xc4, 0xe2, 0x61, 0x90, 0x0c, 0x90];
    let mut m = mock();
    for (i, v) in [11u32, 22, 33, 44].into_iter().enumerate() {
        m.memory[0x100 + 4 * i..0x104 + 4 * i].copy_from_slice(&v.to_le_bytes());
    }
    m.memory[0x1100..0x1104].copy_from_slice(&99u32.to_le_bytes());
    m.set_xmm(1, u128::MAX);
    m.set_xmm(2, 1 | 0x400 << 32 | 3 << 64);
    m.set_xmm(3, 0x8000_0000 | 0x8000_0000 << 32 | 0x7fff_ffff << 64 | 0xffff_ffff << 96);
    m.absent[1] = true;
    assert_eq!(m.run(code), Err(Exception::pf(4)));
    assert_eq!(m.xmm(1), u128::MAX - 0xffff_ffff + 22);
    assert_eq!(m.xmm(3), 0xffff_ffff << 32 | 0xffff_ffff << 96);
    m.absent[1] = false;
    m.run(code).unwrap();
    assert_eq!(m.xmm(1), 22 | 99 << 32 | 0xffff_ffff << 64 | 11 << 96);
    assert_eq!(m.xmm(3), 0);
    // Equal registers are #UD: no instruction for the decoder.
    assert!(super::decode(64, &[0xc4, 0xe2, 0x61, 0x90, 0x14, 0x90]).is_invalid());
}

#[test]
fn scatter_fault_clears_the_mask_of_done_elements() {
    if !layout().avx512 {
        return eprintln!("skipped: the host has no AVX-512");
    }
    // vpscatterdd [rax + zmm2*4]{k1}, zmm1
    let code = &[0x62, 0xf2, 0x7d, 0x49, 0xa0, 0x0c, 0x90];
    let mut m = mock();
    layout::set_vector(&mut m.fpu, 1, &[7; 64], false);
    m.set_xmm(2, 1 | 0x400 << 32 | 3 << 64);
    layout::set_opmask(&mut m.fpu, 1, 0xffff_0007);
    m.absent[1] = true;
    assert_eq!(m.run(code), Err(Exception::pf(6)));
    assert_eq!(layout::opmask(&m.fpu, 1), 6);
    assert_eq!(m.memory[0x104..0x108], [7; 4]);
    assert_eq!(m.memory[0x10c..0x110], [0; 4]);
}

#[test]
fn masked_out_elements_neither_fault_nor_are_written() {
    if !layout().avx512 {
        return eprintln!("skipped: the host has no AVX-512");
    }
    let mut m = mock();
    m.absent[1] = true;
    m.gpr[0] = BASE + 0x1000 - 8;
    layout::set_opmask(&mut m.fpu, 1, 3);
    layout::set_vector(&mut m.fpu, 1, &[9; 64], false);
    // vmovdqu32 [rax]{k1}, zmm1
    m.run(&[0x62, 0xf1, 0x7e, 0x49, 0x7f, 0x08]).unwrap();
    assert_eq!(m.writes, [(0xff8, 8)]);
    // vaddps zmm1{k1}, zmm1, [rax]
    m.run(&[0x62, 0xf1, 0x74, 0x49, 0x58, 0x08]).unwrap();
    // vpmovqd [rax]{k1}, zmm1; the mask covers eight dwords
    m.writes.clear();
    m.run(&[0x62, 0xf2, 0x7e, 0x49, 0x35, 0x08]).unwrap();
    assert_eq!(m.writes, [(0xff8, 8)]);
    // vpcompressd [rax]{k2}, zmm1: two elements, though the last is the 16th
    layout::set_opmask(&mut m.fpu, 2, 0x8001);
    m.run(&[0x62, 0xf2, 0x7d, 0x4a, 0x8b, 0x08]).unwrap();
    // vpexpandd zmm1{k2}, [rax]
    m.run(&[0x62, 0xf2, 0x7d, 0x4a, 0x89, 0x08]).unwrap();
    layout::set_opmask(&mut m.fpu, 1, 7);
    assert_eq!(m.run(&[0x62, 0xf1, 0x7e, 0x49, 0x7f, 0x08]), Err(Exception::pf(6)));
    assert_eq!(m.run(&[0x62, 0xf1, 0x74, 0x49, 0x58, 0x08]), Err(Exception::pf(4)));
    // vpermd zmm1{k1}, zmm1, [rax] does not suppress faults.
    layout::set_opmask(&mut m.fpu, 1, 1);
    assert_eq!(m.run(&[0x62, 0xf2, 0x75, 0x49, 0x36, 0x08]), Err(Exception::pf(4)));
}

#[test]
fn vmaskmov_and_maskmovdqu_touch_what_the_mask_says() {
    let mut m = mock();
    m.absent[1] = true;
    m.gpr[7] = BASE + 0x1000 - 8;
    m.gpr[0] = BASE + 0x1000 - 8;
    m.set_xmm(1, u128::MAX / 3);
    m.set_xmm(2, 0x80 | 0x80 << 56);
    m.run(&[0x66, 0x0f, 0xf7, 0xca]).unwrap(); // maskmovdqu xmm1, xmm2
    assert_eq!(m.writes, [(0xff8, 1), (0xfff, 1)]);
    if is_x86_feature_detected!("avx2") {
        m.set_xmm(2, 0x8000_0000);
        // vpmaskmovd xmm3, xmm2, [rax]
        m.run(&[0xc4, 0xe2, 0x69, 0x8c, 0x18]).unwrap();
        assert_eq!(m.xmm(3), u128::from(u32::from_le_bytes(m.memory[0xff8..0xffc].try_into().unwrap())));
        m.set_xmm(2, 0x8000_0000 << 64);
        assert_eq!(m.run(&[0xc4, 0xe2, 0x69, 0x8c, 0x18]), Err(Exception::pf(4)));
        assert_eq!(
            m.run(&[0xc4, 0xe2, 0x69, 0x8e, 0x18]),
            Err(Exception::pf(6)),
            "vpmaskmovd [rax], xmm2, xmm3"
        );
    }
}

#[test]
fn addresses_wrap_and_follow_rip() {
    let mut m = mock();
    m.memory[0x200..0x204].copy_from_slice(&1.5f32.to_bits().to_le_bytes());
    // movss xmm0, [rip + disp], decoded at another address than it runs at
    m.control.rip = BASE + 0x10;
    m.run(&[0xf3, 0x0f, 0x10, 0x05, 0xe8, 0x01, 0, 0]).unwrap();
    assert_eq!(m.xmm(0), single(1.5));
    // addss xmm0, [eax + ebx]: 32-bit address arithmetic
    m.gpr[0] = 0xffff_ffff_0000_0000 | (BASE + 0x300);
    m.gpr[3] = 0xffff_ff00;
    m.run(&[0x67, 0xf3, 0x0f, 0x58, 0x04, 0x18]).unwrap();
    assert_eq!(m.xmm(0), single(3.0));
    // 16-bit code: addss xmm0, [bx + si]
    m.base = 0;
    m.gpr[3] = 0xffff;
    m.gpr[6] = 0x201;
    m.run_as(16, &[0xf3, 0x0f, 0x58, 0x00]).unwrap();
    assert_eq!(m.xmm(0), single(4.5));
    assert_eq!(m.selector(3), 0x2b);
}

#[test]
fn rdrand_gives_numbers_and_carry() {
    if !is_x86_feature_detected!("rdrand") {
        return eprintln!("skipped: the host has no RDRAND");
    }
    let mut m = mock();
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..8 {
        m.run(&[0x48, 0x0f, 0xc7, 0xf1]).unwrap(); // rdrand rcx
        if m.flags & 1 != 0 {
            seen.insert(m.gpr[1]);
        }
    }
    assert!(seen.len() > 1);
}

#[test]
fn code_memory_that_is_full_starts_over() {
    let mut m = mock();
    // Distinct immediates make distinct stubs: more than the memory holds.
    let ops: Vec<_> = (0..=255u8)
        .flat_map(|a| (0..16u8).map(move |b| [0x66, 0x0f, 0x3a, 0x0f, 0xc0 | (b & 7) << 3 | b >> 1, a]))
        .map(|code| super::prepare(&super::decode(64, &code)).unwrap())
        .collect();
    for _ in 0..2 {
        for op in &ops {
            super::execute(op, &mut m).unwrap();
        }
    }
}

#[test]
fn an_op_is_shared_between_threads() {
    let op = super::prepare(&super::decode(64, &[0xf2, 0x0f, 0x58, 0xc1])).unwrap(); // addsd xmm0, xmm1
    std::thread::scope(|scope| {
        for n in 0..4u32 {
            let op = &op;
            scope.spawn(move || {
                let mut m = mock();
                m.set_xmm(1, u128::from(f64::from(n).to_bits()));
                for _ in 0..1000 {
                    super::execute(op, &mut m).unwrap();
                }
                assert_eq!(m.xmm(0), u128::from((f64::from(n) * 1000.0).to_bits()));
            });
        }
    });
}

#[test]
fn fld_and_sse_work_in_16_and_32_bit_code() {
    let mut m = mock();
    m.base = 0;
    m.control.code64 = false;
    m.memory[0x20..0x28].copy_from_slice(&2.5f64.to_le_bytes());
    m.gpr[3] = 0x1_0000;
    m.gpr[6] = 0x20;
    m.run_as(16, &[0xdd, 0x00]).unwrap(); // fld qword [bx+si]
    m.run_as(16, &[0x67, 0xdd, 0x1d, 0x30, 0, 0, 0]).unwrap(); // fstp qword [0x30] with a 32-bit address
    assert_eq!(m.memory[0x30..0x38], 2.5f64.to_le_bytes());
    m.run_as(32, &[0xf2, 0x0f, 0x2c, 0x0e]).unwrap(); // cvttsd2si ecx, [esi]
    assert_eq!(m.gpr[1], 2);
    m.run_as(32, &[0x66, 0x0f, 0x6e, 0xf9]).unwrap(); // movd xmm7, ecx
    assert_eq!(m.xmm(7), 2);
}
