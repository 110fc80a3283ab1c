//! Random initial states: registers, FP and SIMD state, memory.

use x86::bits::rflags;

use crate::generate::Roles;
use crate::rng::Rng;
use crate::state::{AREA, CODE, CODE_BYTES, DATA, DATA_BYTES, Mode, READ_ONLY_BYTES, Registers, components};

/// Mostly in the middle of a page; sometimes so that code crosses into the second, or out of the mapped ones.
pub fn start(rng: &mut Rng) -> u64 {
    match rng.below(20) {
        0 => 0x1000 - rng.below(40),
        1 => CODE_BYTES as u64 - 1 - rng.below(30),
        _ => rng.below(0x100),
    }
}

/// Which registers point into the data and which hold small values.
pub fn roles(rng: &mut Rng, mode: Mode) -> Roles {
    let count = if mode == Mode::Long { 16 } else { 8 };
    let mut others: Vec<u32> = (0..count).filter(|n| ![1, 4, 6, 7].contains(n)).collect();
    for n in 0..others.len() {
        let to = rng.below(others.len() as u64) as usize;
        others.swap(n, to);
    }
    let mut pointers = vec![4, 6, 7];
    pointers.extend(&others[..if mode == Mode::Long { 3 } else { 1 }]);
    if rng.chance(50) && !pointers.contains(&5) {
        pointers.push(5);
    }
    let mut indices = vec![1];
    indices.extend(
        others.iter().rev().take(if mode == Mode::Long { 3 } else { 1 }).filter(|n| !pointers.contains(n)),
    );
    Roles { mode, pointers, indices }
}

/// Registers by their roles.
pub fn initial(rng: &mut Rng, roles: &Roles) -> Registers {
    let mut gpr = [0u64; 16];
    for value in &mut gpr {
        *value = rng.value();
    }
    // So that divisions often succeed.
    if rng.chance(40) {
        gpr[2] = if rng.chance(50) { 0 } else { u64::MAX };
    }
    for &n in &roles.indices {
        let small = rng.below(48);
        gpr[n as usize] = if rng.chance(20) { 0u64.wrapping_sub(small) } else { small };
    }
    if rng.chance(20) {
        gpr[1] = rng.value();
    }
    for &n in &roles.pointers {
        gpr[n as usize] = DATA
            + match rng.below(12) {
                0 => rng.below(DATA_BYTES as u64 + READ_ONLY_BYTES as u64),
                1 => 0x1000 * (1 + rng.below(4)) - rng.below(32),
                2 => DATA_BYTES as u64 + rng.below(64),
                3 => 0x1000 + rng.below(0x2000),
                _ => 0x1000 + (rng.below(0x2000) & !63),
            };
    }
    if roles.mode == Mode::Compat {
        for value in &mut gpr {
            *value &= 0xffff_ffff;
        }
        gpr[8..].fill(0);
    }
    let mut flags = rflags::IF | rflags::FIXED | rng.next() & rflags::STATUS;
    for (percent, flag) in [(15, rflags::DF), (2, rflags::AC), (1, rflags::TF)] {
        if rng.chance(percent) {
            flags |= flag;
        }
    }
    Registers { gpr, rip: CODE, rflags: flags, fpu: area(rng) }
}

/// FP and SIMD state.
fn area(rng: &mut Rng) -> Box<[u8; AREA]> {
    let mut area = Box::new([0u8; AREA]);
    let mut fcw = 0x37fu16;
    if rng.chance(30) {
        fcw = 0x7f | (rng.next() as u16 & 0x0f00);
    }
    if rng.chance(8) {
        fcw &= !(rng.next() as u16 & 0x3f);
    }
    let mut fsw = (rng.next() as u16) & 0x7f00;
    if rng.chance(20) {
        fsw |= rng.next() as u16 & 0x7f;
    }
    // ES and B follow from the unmasked exceptions (SDM 1 8.1.3.3).
    fsw &= !0x8080;
    if fsw & !fcw & 0x3f != 0 {
        fsw |= 0x8080;
    }
    area[0..2].copy_from_slice(&fcw.to_le_bytes());
    area[2..4].copy_from_slice(&fsw.to_le_bytes());
    area[4] = if rng.chance(50) { 0xff } else { rng.next() as u8 };
    let mut mxcsr = 0x1f80u32;
    if rng.chance(30) {
        mxcsr |= rng.next() as u32 & 0xe07f;
    }
    if rng.chance(8) {
        mxcsr &= !(rng.next() as u32 & 0x1f80);
    }
    area[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    for n in 0..8 {
        let at = 32 + 16 * n;
        let exponent: u16 = match rng.below(4) {
            0 => 0x3fff + rng.below(70) as u16,
            1 => *rng.pick(&[0, 1, 0x7ffe, 0x7fff]),
            2 => 0x3fff - rng.below(70) as u16,
            _ => rng.next() as u16,
        };
        let sign = (rng.next() as u16 & 1) << 15;
        let significand = if rng.chance(70) { rng.next() | 1 << 63 } else { rng.value() };
        area[at..at + 8].copy_from_slice(&significand.to_le_bytes());
        area[at + 8..at + 10].copy_from_slice(&(exponent | sign).to_le_bytes());
    }
    for n in 0..16 {
        area[160 + 16 * n..176 + 16 * n].copy_from_slice(&rng.lane16());
    }
    for (bit, at, len) in components() {
        for lane in area[at..at + len].chunks_mut(16) {
            let bytes = rng.lane16();
            lane.copy_from_slice(&bytes[..lane.len()]);
        }
        if bit == 5 && rng.chance(30) {
            for k in area[at..at + len].chunks_mut(8) {
                k.copy_from_slice(&(rng.next() & rng.next() & 0xff).to_le_bytes());
            }
        }
    }
    area
}

/// `len` bytes of data in which registers are found again.
pub fn memory(rng: &mut Rng, regs: &Registers, len: usize) -> Vec<u8> {
    // A few different pieces, repeated: cheap, and equal operands are found.
    let mut pieces = Vec::new();
    for _ in 0..24 {
        let mut piece = rng.lane16();
        if rng.chance(15) {
            piece[..8].copy_from_slice(&regs.gpr[0].to_le_bytes());
            piece[8..].copy_from_slice(&regs.gpr[2].to_le_bytes());
        } else if rng.chance(10) {
            piece[..4].copy_from_slice(&regs.gpr[0].to_le_bytes()[..4]);
            piece[4..8].copy_from_slice(&regs.gpr[2].to_le_bytes()[..4]);
        } else if rng.chance(10) {
            piece[..8].copy_from_slice(&(DATA + rng.below(DATA_BYTES as u64)).to_le_bytes());
        }
        pieces.push(piece);
    }
    (0..len / 16).flat_map(|_| *rng.pick(&pieces)).collect()
}
