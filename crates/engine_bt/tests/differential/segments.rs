//! Segments of 16- and 32-bit programs: flat as systems have them, or anywhere, of any length and kind.

use crate::machine::{Segments, descriptor};
use crate::rng::Rng;
use crate::state::{CODE, DATA};

/// Segments, and whether those of data begin where the data does.
pub struct Chosen {
    pub descriptors: Segments,
    pub based: bool,
}

const CODE_KIND: u8 = 0x1b;
const DATA_KIND: u8 = 0x13;
const READ_ONLY: u8 = 0x11;
const EXPAND_DOWN: u8 = 0x17;

/// The segments of a program at level 0 or 3.
pub fn choose(rng: &mut Rng, supervisor: bool) -> Chosen {
    let level = if supervisor { 0 } else { 0x60 };
    let flat = descriptor(0, u32::MAX, DATA_KIND | level, true);
    let (data, code) = (DATA as u32, CODE as u32);
    let bits16 = rng.chance(30);
    let based = bits16 || rng.chance(35);
    let some = |rng: &mut Rng| {
        let limit = *rng.pick(&[0xffff, 0x4fff, 0x3fff, 0x1fff, 0x17ff, 0xffff_ffff, 0x2003]);
        let base = data.wrapping_add(*rng.pick(&[0, 0, 0, 0x800, 0x1000, 0u32.wrapping_sub(0x1000)]));
        match rng.below(14) {
            0 => descriptor(base, limit, READ_ONLY | level, true),
            1 => descriptor(base, 0xfff, EXPAND_DOWN | level, rng.chance(50)),
            2 => flat,
            _ => descriptor(base, limit, DATA_KIND | level, true),
        }
    };
    let mut descriptors = [flat; 6];
    for d in &mut descriptors[4..] {
        *d = some(rng);
    }
    let mut cs = descriptor(0, u32::MAX, CODE_KIND | level, true);
    if based {
        for d in &mut descriptors[..4] {
            *d = some(rng);
        }
        let big = rng.chance(if bits16 { 20 } else { 80 });
        let limit = *rng.pick(&[0xffff, 0xffff_ffff, 0x4fff, 0x2fff]);
        descriptors[2] = descriptor(data, limit, DATA_KIND | level, big);
        let limit = *rng.pick(&[0xffff, 0xffff, 0x2fff, 0x1fff, 0x1abc]);
        let base = code.wrapping_sub(*rng.pick(&[0, 0, 0x1000, 0x800, 0xf0]));
        cs = descriptor(base, limit, CODE_KIND | level, !bits16);
        if !bits16 && rng.chance(30) {
            cs = descriptor(*rng.pick(&[0, 0xf000_0000, 0xf000_0123]), u32::MAX, CODE_KIND | level, true);
        }
    }
    descriptors[1] = cs;
    Chosen { descriptors: Segments { bits16, descriptors }, based }
}
