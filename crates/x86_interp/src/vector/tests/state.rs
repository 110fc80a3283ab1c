//! FXSAVE, XSAVE and their kin.

use x86::Exception;
use x86::bits::efer;

use super::super::layout::{self, at, layout};
use super::super::xgetbv1;
use super::{Mock, Random};

const BASE: u64 = 0x10_0000;
const SAVE: usize = 0x1000;

const FXSAVE: &[u8] = &[0x0f, 0xae, 0x00];
const FXSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x00];
const FXRSTOR: &[u8] = &[0x0f, 0xae, 0x08];
const XSAVE: &[u8] = &[0x0f, 0xae, 0x20];
const XRSTOR: &[u8] = &[0x0f, 0xae, 0x28];
const XSAVEC: &[u8] = &[0x0f, 0xc7, 0x20];
const XSAVES: &[u8] = &[0x0f, 0xc7, 0x28];
const XRSTORS: &[u8] = &[0x0f, 0xc7, 0x18];

/// A mock with random FP state that executes XSAVE instructions on the second page, with all components asked for.
fn mock(seed: u64) -> Mock {
    let mut m = Mock::new(BASE);
    let mut random = Random(seed);
    random.fill(&mut m.fpu.0[at::ST..at::LEGACY_END]);
    for st in 0..8 {
        let end = at::ST + 16 * st;
        m.fpu.0[end + 10..end + 16].fill(0);
    }
    for c in layout().components.iter().skip(2).filter(|c| c.size != 0) {
        random.fill(&mut m.fpu.0[c.offset..c.offset + c.size]);
    }
    m.set_mxcsr(0x1fa0);
    layout::put(&mut m.fpu, at::MXCSR_MASK, &layout().mxcsr_mask.to_le_bytes());
    m.fpu.0[at::FTW] = 0x5a;
    layout::put(&mut m.fpu, at::FIP, &0x7fff_1234_5678u64.to_le_bytes());
    m.gpr[0] = BASE + SAVE as u64;
    m.gpr[2] = u64::MAX;
    m
}

/// Uses RAX as address and mask at once: only its low half counts as the mask.
fn all_components(m: &mut Mock) {
    m.gpr[1] = BASE + SAVE as u64;
    m.gpr[0] = u64::MAX;
}

fn by_rcx(code: &[u8]) -> Vec<u8> {
    let mut code = code.to_vec();
    *code.last_mut().unwrap() |= 1;
    code
}

fn header(m: &Mock, at: usize) -> u64 {
    u64::from_le_bytes(m.memory[SAVE + at..SAVE + at + 8].try_into().unwrap())
}

#[test]
fn fxsave_and_fxrstor_round_trip() {
    let mut m = mock(1);
    m.memory.fill(0xee);
    m.run(FXSAVE64).unwrap();
    assert_eq!(m.memory[SAVE..SAVE + 416], m.fpu.0[..416]);
    assert!(m.memory[SAVE + 416..].iter().all(|&b| b == 0xee), "nothing behind the registers");
    let saved = m.fpu.clone();
    m.fpu.0[..416].fill(0);
    m.run(FXRSTOR).unwrap();
    assert!(m.fpu.0[..416] == saved.0[..416]);
    m.gpr[0] += 8;
    assert_eq!(m.run(FXSAVE), Err(Exception::GP0));
}

#[test]
fn fxsave_outside_64_bit_mode_has_eight_xmm_registers() {
    let mut m = mock(2);
    m.control.code64 = false;
    m.memory.fill(0xee);
    m.run_as(32, FXSAVE).unwrap();
    assert_eq!(m.memory[SAVE..SAVE + 288], m.fpu.0[..288]);
    assert!(m.memory[SAVE + 288..].iter().all(|&b| b == 0xee));
    let saved = m.fpu.clone();
    m.memory[SAVE + 288..SAVE + 416].fill(0x11);
    m.run_as(32, FXRSTOR).unwrap();
    assert!(m.fpu == saved);
}

#[test]
fn fast_fxsave_leaves_xmm_out_at_cpl0() {
    let mut m = mock(3);
    m.control.efer = efer::FFXSR;
    m.control.cpl = 0;
    m.run(FXSAVE64).unwrap();
    assert!(m.memory[SAVE + 160..SAVE + 416].iter().all(|&b| b == 0));
    assert_eq!(m.memory[SAVE..SAVE + 160], m.fpu.0[..160]);
}

#[test]
fn reserved_mxcsr_bits_raise_gp() {
    let mut m = mock(4);
    m.memory[SAVE..SAVE + 4].copy_from_slice(&0x8000_1f80u32.to_le_bytes());
    assert_eq!(m.run(&[0x0f, 0xae, 0x10]), Err(Exception::GP0), "ldmxcsr");
    m.memory[SAVE..SAVE + 4].copy_from_slice(&0x1fbfu32.to_le_bytes());
    m.run(&[0x0f, 0xae, 0x10]).unwrap();
    assert_eq!(m.mxcsr(), 0x1fbf);
    let before = m.fpu.clone();
    m.memory[SAVE + 24..SAVE + 28].copy_from_slice(&0x8000_1f80u32.to_le_bytes());
    assert_eq!(m.run(FXRSTOR), Err(Exception::GP0));
    all_components(&mut m);
    assert_eq!(m.run(&by_rcx(XRSTOR)), Err(Exception::GP0));
    assert!(m.fpu == before);
}

#[test]
fn xsave_and_xrstor_round_trip() {
    if layout().supported & 4 == 0 {
        return eprintln!("skipped: the host has no XSAVE");
    }
    let mut m = mock(5);
    all_components(&mut m);
    m.run(&by_rcx(XSAVE)).unwrap();
    assert_eq!(header(&m, 512), layout().supported);
    assert_eq!(header(&m, 520), 0);
    for c in layout().components.iter().skip(2).filter(|c| c.size != 0) {
        assert_eq!(m.memory[SAVE + c.offset..SAVE + c.offset + c.size], m.fpu.0[c.offset..c.offset + c.size]);
    }
    let saved = m.fpu.clone();
    m.fpu.0[..512].fill(0);
    m.fpu.0[576..].fill(0);
    m.run(&by_rcx(XRSTOR)).unwrap();
    assert!(m.fpu == saved);
    // A component that XSTATE_BV leaves out is initialized; one not asked for stays.
    m.memory[SAVE + 512] &= !2;
    m.gpr[0] = !4;
    m.run(&by_rcx(XRSTOR)).unwrap();
    assert!(m.fpu.0[160..416].iter().all(|&b| b == 0));
    assert_eq!(m.mxcsr(), 0x1fa0, "MXCSR is loaded all the same");
    assert!(m.fpu.0[576..] == saved.0[576..]);
}

#[test]
fn xrstor_checks_the_header() {
    if layout().supported & 4 == 0 {
        return eprintln!("skipped: the host has no XSAVE");
    }
    let mut m = mock(6);
    all_components(&mut m);
    m.run(&by_rcx(XSAVE)).unwrap();
    for (at, value) in [(519, 0x80), (520, 1), (528, 1), (535, 1)] {
        let old = std::mem::replace(&mut m.memory[SAVE + at], value);
        assert_eq!(m.run(&by_rcx(XRSTOR)), Err(Exception::GP0), "byte {at}");
        m.memory[SAVE + at] = old;
    }
    m.run(&by_rcx(XRSTOR)).unwrap();
    m.gpr[1] += 16;
    assert_eq!(m.run(&by_rcx(XRSTOR)), Err(Exception::GP0), "alignment");
    m.control.cr4 = 0;
    assert_eq!(m.run(&by_rcx(XRSTOR)), Err(Exception::UD));
}

#[test]
fn xsavec_compacts_and_leaves_initial_components_out() {
    if !is_x86_feature_detected!("xsavec") || layout().supported & 4 == 0 {
        return eprintln!("skipped: the host has no XSAVEC");
    }
    let mut m = mock(7);
    all_components(&mut m);
    m.memory.fill(0xee);
    let avx = layout().components[2];
    m.fpu.0[avx.offset..avx.offset + avx.size].fill(0);
    m.run(&by_rcx(XSAVEC)).unwrap();
    assert_eq!(header(&m, 512), layout().supported & !4);
    assert_eq!(header(&m, 520), layout().supported | 1 << 63);
    assert!(m.memory[SAVE + 576..SAVE + 576 + 256].iter().all(|&b| b == 0xee), "AVX is initial: not written");
    m.memory[SAVE + 528..SAVE + 576].fill(0);
    let saved = m.fpu.clone();
    m.fpu.0[..512].fill(0x3);
    m.fpu.0[576..].fill(0x3);
    m.run(&by_rcx(XRSTOR)).unwrap();
    for (i, c) in layout().components.iter().enumerate().skip(2) {
        assert!(
            m.fpu.0[c.offset..c.offset + c.size] == saved.0[c.offset..c.offset + c.size],
            "component {i}"
        );
    }
    assert!(m.fpu.0[..160] == saved.0[..160]);
}

#[test]
fn compacted_image_matches_the_hosts() {
    if !is_x86_feature_detected!("xsavec") || layout().supported & 4 == 0 {
        return eprintln!("skipped: the host has no XSAVEC");
    }
    let base = super::oracle::data_base();
    let mut m = mock(8);
    m.base = base;
    all_components(&mut m);
    m.gpr[1] = base + SAVE as u64;
    let mask = layout().supported & 0xe7;
    m.gpr[0] = mask;
    m.gpr[2] = 0;
    for code in [XSAVEC, XSAVE] {
        let (code, mut host) = (by_rcx(code), m.clone());
        let mut ours = m.clone();
        ours.run(&code).unwrap();
        super::oracle::run(&code, &mut host.gpr, &mut host.flags, &mut host.fpu, mask, &mut host.memory);
        let different: Vec<_> = (0..ours.memory.len())
            .filter(|&i| ours.memory[i] != host.memory[i])
            .map(|i| i.wrapping_sub(SAVE))
            // The XMM registers' reserved tail and the x87 pointers differ between hosts.
            .filter(|&i| !(at::FOP..at::MXCSR).contains(&i))
            .collect();
        assert_eq!(different, Vec::<usize>::new(), "{code:02x?}");
    }
}

#[test]
fn xsaves_and_xrstors_are_privileged_and_compacted() {
    if !is_x86_feature_detected!("xsaves") {
        return eprintln!("skipped: the host has no XSAVES");
    }
    let mut m = mock(9);
    all_components(&mut m);
    assert_eq!(m.run(&by_rcx(XSAVES)), Err(Exception::GP0));
    m.control.cpl = 0;
    m.run(&by_rcx(XSAVES)).unwrap();
    let saved = m.fpu.clone();
    m.fpu.0[..416].fill(0);
    m.run(&by_rcx(XRSTORS)).unwrap();
    assert!(m.fpu == saved);
    // The standard format is refused.
    m.memory[SAVE + 512..SAVE + 576].fill(0);
    assert_eq!(m.run(&by_rcx(XRSTORS)), Err(Exception::GP0));
}

#[test]
fn xgetbv1_tells_what_is_in_use() {
    let mut m = Mock::new(BASE);
    assert_eq!(xgetbv1(&m.fpu, 7), 0);
    m.set_xmm(3, 1);
    assert_eq!(xgetbv1(&m.fpu, 7), 2);
    m.set_xmm(3, 0);
    m.set_mxcsr(0x1fa0);
    assert_eq!(xgetbv1(&m.fpu, 7), 2);
    m.run(&[0xd9, 0xe8]).unwrap(); // fld1
    assert_eq!(xgetbv1(&m.fpu, 7), 3);
}

#[test]
fn environments_round_trip_in_every_format() {
    for (code64, real, prefix) in [
        (true, false, &[][..]),
        (true, false, &[0x66][..]),
        (false, false, &[][..]),
        (false, true, &[][..]),
        (false, true, &[0x66][..]),
    ] {
        let bitness = if code64 { 64 } else { 32 };
        let mut m = mock(10);
        m.control.code64 = code64;
        m.control.real_or_v86 = real;
        layout::put(&mut m.fpu, at::FIP, &0x1234u64.to_le_bytes());
        layout::put(&mut m.fpu, at::FDP, &0x4321u64.to_le_bytes());
        layout::put(&mut m.fpu, at::FSW, &0x2900u16.to_le_bytes());
        let saved = m.fpu.clone();
        let save = [prefix, &[0xdd, 0x30]].concat();
        let restore = [prefix, &[0xdd, 0x20]].concat();
        m.run_as(bitness, &save).unwrap();
        assert_eq!(layout::u16_at(&m.fpu, at::FCW), 0x37f);
        assert_eq!(m.fpu.0[at::FTW], 0, "FNSAVE initializes");
        m.run_as(bitness, &restore).unwrap();
        assert!(m.fpu.0[at::FCW..at::FOP] == saved.0[at::FCW..at::FOP], "{code64} {real} {prefix:x?}");
        assert!(m.fpu.0[at::FIP..at::MXCSR] == saved.0[at::FIP..at::MXCSR], "{code64} {real} {prefix:x?}");
        assert!(m.fpu.0[at::ST..at::XMM] == saved.0[at::ST..at::XMM], "{code64} {real} {prefix:x?}");
    }
}

#[test]
fn xsave_to_an_absent_page_is_a_write_fault_and_writes_nothing() {
    if layout().supported & 4 == 0 {
        return eprintln!("skipped: the host has no XSAVE");
    }
    let mut m = mock(11);
    all_components(&mut m);
    m.gpr[1] += 0x1000 - 0x400;
    m.absent[2] = true;
    let fits = layout().components.iter().all(|c| c.offset + c.size <= 0x400);
    if !fits {
        assert_eq!(m.run(&by_rcx(XSAVE)), Err(Exception::pf(6)));
        assert!(m.writes.is_empty());
    }
    m.absent[1] = true;
    assert_eq!(m.run(&by_rcx(XSAVE)), Err(Exception::pf(6)));
}
