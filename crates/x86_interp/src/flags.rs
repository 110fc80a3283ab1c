//! Lazy arithmetic flags: an instruction leaves its result and its carries; a flag is worked out when it is read.
//!
//! `result` is sign-extended to 64 bits. In `aux`, bit 63 is the carry out of the top bit (CF), bit 62 the carry into it
//! (so OF is their exclusive or), bit 3 the carry out of bit 3 (AF). Two corrections let any combination be stored:
//! bits 8–15 are XORed into the byte whose parity is PF, bit 16 into the sign that is SF.

use x86::bits::rflags;

/// The six arithmetic flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LazyFlags {
    result: u64,
    aux: u64,
}

const CARRY: u64 = 1 << 63;
const INTO_TOP: u64 = 1 << 62;
const HALF: u64 = 1 << 3;
const SIGN_FIX: u64 = 1 << 16;

/// `aux` for carries (or borrows) of every bit of an operation of `64 - shift` bits.
#[inline(always)]
const fn pack(carries: u64, shift: u32) -> u64 {
    (carries << shift) & (CARRY | INTO_TOP) | carries & HALF
}

/// Sign-extends the low `64 - shift` bits.
#[inline(always)]
pub const fn sign_extend(value: u64, shift: u32) -> u64 {
    (((value << shift) as i64) >> shift) as u64
}

impl LazyFlags {
    /// The flags in an RFLAGS value.
    pub const fn from_rflags(f: u64) -> Self {
        // Not zero and not negative, low byte zero (even parity); corrected from there.
        let result = if f & rflags::ZF != 0 { 0 } else { 0x100 };
        let cf = f & rflags::CF;
        let of = f >> 11 & 1;
        let parity_fix = if f & rflags::PF != 0 { 0 } else { 1 << 8 };
        let sign_fix = if f & rflags::SF != 0 { SIGN_FIX } else { 0 };
        let aux = cf << 63 | (cf ^ of) << 62 | (f >> 4 & 1) << 3 | parity_fix | sign_fix;
        Self { result, aux }
    }

    /// The flags as bits of RFLAGS.
    pub const fn to_rflags(self) -> u64 {
        self.cf() as u64
            | (self.pf() as u64) << 2
            | (self.af() as u64) << 4
            | (self.zf() as u64) << 6
            | (self.sf() as u64) << 7
            | (self.of() as u64) << 11
    }

    /// Carry.
    #[inline(always)]
    pub const fn cf(self) -> bool {
        self.aux & CARRY != 0
    }
    /// Overflow.
    #[inline(always)]
    pub const fn of(self) -> bool {
        (self.aux ^ self.aux << 1) & CARRY != 0
    }
    /// Zero.
    #[inline(always)]
    pub const fn zf(self) -> bool {
        self.result == 0
    }
    /// Sign.
    #[inline(always)]
    pub const fn sf(self) -> bool {
        (self.result >> 63 ^ self.aux >> 16 & 1) != 0
    }
    /// Adjust: the carry out of bit 3.
    #[inline(always)]
    pub const fn af(self) -> bool {
        self.aux & HALF != 0
    }
    /// Parity of the low byte.
    #[inline(always)]
    pub const fn pf(self) -> bool {
        let b = (self.result ^ self.aux >> 8) & 0xff;
        let nibble = (b ^ b >> 4) & 15;
        0x9669 >> nibble & 1 != 0
    }

    /// After `a + b (+ carry) = r`, all masked to the width.
    #[inline(always)]
    pub const fn add(a: u64, b: u64, r: u64, shift: u32) -> Self {
        Self { result: sign_extend(r, shift), aux: pack((a & b) | ((a | b) & !r), shift) }
    }

    /// After `a - b (- borrow) = r`, all masked to the width.
    #[inline(always)]
    pub const fn sub(a: u64, b: u64, r: u64, shift: u32) -> Self {
        Self { result: sign_extend(r, shift), aux: pack((!a & b) | ((!a | b) & r), shift) }
    }

    /// After AND, OR, XOR, TEST: CF = OF = 0 (AF undefined: clear).
    #[inline(always)]
    pub const fn logic(r: u64, shift: u32) -> Self {
        Self { result: sign_extend(r, shift), aux: 0 }
    }

    /// `self` with the CF of `old` (INC, DEC).
    #[inline(always)]
    pub const fn keeping_cf(self, old: Self) -> Self {
        let of = (self.aux ^ self.aux << 1) & CARRY;
        let cf = old.aux & CARRY;
        Self { result: self.result, aux: cf | (cf ^ of) >> 1 | self.aux & HALF }
    }

    /// A result with CF and OF given, AF clear (shifts, multiplications).
    #[inline(always)]
    pub const fn with_cf_of(r: u64, shift: u32, cf: bool, of: bool) -> Self {
        let cf = cf as u64;
        Self { result: sign_extend(r, shift), aux: cf << 63 | (cf ^ of as u64) << 62 }
    }

    /// Only CF and OF change (rotates).
    #[inline(always)]
    pub const fn set_cf_of(&mut self, cf: bool, of: bool) {
        let cf = cf as u64;
        self.aux = self.aux & !(CARRY | INTO_TOP) | cf << 63 | (cf ^ of as u64) << 62;
    }

    /// Only CF changes (STC, BT, …).
    #[inline(always)]
    pub const fn set_cf(&mut self, cf: bool) {
        let of = self.of();
        self.set_cf_of(cf, of);
    }

    /// Condition code `cc` of Jcc, SETcc, CMOVcc (SDM 1 appendix B).
    #[inline(always)]
    pub const fn condition(self, cc: u8) -> bool {
        let holds = match cc >> 1 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() || self.sf() != self.of(),
        };
        holds != (cc & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::cast_possible_truncation, reason = "bytes are taken out of words")]

    use super::*;

    #[test]
    fn every_combination_survives_the_round_trip() {
        for bits in 0..64u64 {
            let pick = |i: u64, flag: u64| if bits >> i & 1 != 0 { flag } else { 0 };
            let f = pick(0, rflags::CF)
                | pick(1, rflags::PF)
                | pick(2, rflags::AF)
                | pick(3, rflags::ZF)
                | pick(4, rflags::SF)
                | pick(5, rflags::OF);
            assert_eq!(LazyFlags::from_rflags(f).to_rflags(), f);
        }
    }

    #[test]
    fn add_and_sub_of_bytes_match_the_definition() {
        for a in 0..=255u64 {
            for b in 0..=255u64 {
                let r = a.wrapping_add(b) & 0xff;
                let f = LazyFlags::add(a, b, r, 56);
                assert_eq!(f.cf(), a + b > 255);
                assert_eq!(f.of(), i16::from(a as i8) + i16::from(b as i8) != i16::from(r as i8));
                assert_eq!(f.af(), (a & 15) + (b & 15) > 15);
                assert_eq!(f.pf(), (r as u8).count_ones().is_multiple_of(2));
                let r = a.wrapping_sub(b) & 0xff;
                let f = LazyFlags::sub(a, b, r, 56);
                assert_eq!(f.cf(), a < b);
                assert_eq!(f.of(), i16::from(a as i8) - i16::from(b as i8) != i16::from(r as i8));
                assert_eq!(f.af(), a & 15 < b & 15);
                assert_eq!((f.zf(), f.sf()), (r == 0, r >> 7 != 0));
            }
        }
    }
}
