//! Shifts, rotates and double shifts (SDM 2). Where a flag is undefined we do as current processors do: OF of multi-bit
//! shifts follows the same formula as for one bit.

use super::{Dest, Form, Handler, Imm, Mem, Op, RegA, Source, W8, Width, by_width, by_word_width};
use crate::cpu::{Cpu, Step};
use crate::flags::{LazyFlags, sign_extend};

/// A shift by a count that was masked to 5 or 6 bits and is not zero.
pub trait Shift: 'static {
    /// Result and flags of `a`, with the flags before.
    fn apply<W: Width>(a: u64, count: u32, flags: LazyFlags) -> (u64, LazyFlags);
}

/// SHL.
pub struct Shl;
/// SHR.
pub struct Shr;
/// SAR.
pub struct Sar;
/// ROL.
pub struct Rol;
/// ROR.
pub struct Ror;
/// RCL.
pub struct Rcl;
/// RCR.
pub struct Rcr;

const fn top<W: Width>(v: u64) -> bool {
    v >> (W::BITS - 1) & 1 != 0
}

impl Shift for Shl {
    #[inline(always)]
    fn apply<W: Width>(a: u64, count: u32, _: LazyFlags) -> (u64, LazyFlags) {
        // Counts reach 31 for 8 and 16 bits.
        let wide = u128::from(a) << count;
        #[expect(clippy::cast_possible_truncation, reason = "the low part is the result")]
        let r = wide as u64 & W::MASK;
        let cf = wide >> W::BITS & 1 != 0;
        (r, LazyFlags::with_cf_of(r, W::SHIFT, cf, top::<W>(r) != cf))
    }
}

impl Shift for Shr {
    #[inline(always)]
    fn apply<W: Width>(a: u64, count: u32, _: LazyFlags) -> (u64, LazyFlags) {
        let r = a >> count;
        let cf = a >> (count - 1) & 1 != 0;
        (r, LazyFlags::with_cf_of(r, W::SHIFT, cf, top::<W>(r) != (top::<W>(r << 1 & W::MASK))))
    }
}

impl Shift for Sar {
    #[inline(always)]
    fn apply<W: Width>(a: u64, count: u32, _: LazyFlags) -> (u64, LazyFlags) {
        let wide = sign_extend(a, W::SHIFT) as i64;
        let r = (wide >> count) as u64 & W::MASK;
        let cf = wide >> (count - 1) & 1 != 0;
        (r, LazyFlags::with_cf_of(r, W::SHIFT, cf, false))
    }
}

impl Shift for Rol {
    #[inline(always)]
    fn apply<W: Width>(a: u64, count: u32, mut flags: LazyFlags) -> (u64, LazyFlags) {
        let n = count % W::BITS;
        let r = if n == 0 { a } else { (a << n | a >> (W::BITS - n)) & W::MASK };
        let cf = r & 1 != 0;
        flags.set_cf_of(cf, top::<W>(r) != cf);
        (r, flags)
    }
}

impl Shift for Ror {
    #[inline(always)]
    fn apply<W: Width>(a: u64, count: u32, mut flags: LazyFlags) -> (u64, LazyFlags) {
        let n = count % W::BITS;
        let r = if n == 0 { a } else { (a >> n | a << (W::BITS - n)) & W::MASK };
        flags.set_cf_of(top::<W>(r), top::<W>(r) != top::<W>(r << 1 & W::MASK));
        (r, flags)
    }
}

/// The operand with CF above it, as a number of BITS + 1 bits.
fn with_carry<W: Width>(a: u64, cf: bool) -> u128 {
    u128::from(a) | u128::from(cf) << W::BITS
}

fn rotate_through<W: Width>(a: u64, left: u32, flags: LazyFlags) -> (u64, bool) {
    let wide = with_carry::<W>(a, flags.cf());
    let size = W::BITS + 1;
    let mask = (1u128 << size) - 1;
    let r = if left == 0 { wide } else { (wide << left | wide >> (size - left)) & mask };
    #[expect(clippy::cast_possible_truncation, reason = "the low part is the result")]
    let low = r as u64 & W::MASK;
    (low, r >> W::BITS & 1 != 0)
}

impl Shift for Rcl {
    fn apply<W: Width>(a: u64, count: u32, mut flags: LazyFlags) -> (u64, LazyFlags) {
        let n = count % (W::BITS + 1);
        if n == 0 {
            return (a, flags);
        }
        let (r, cf) = rotate_through::<W>(a, n, flags);
        flags.set_cf_of(cf, top::<W>(r) != cf);
        (r, flags)
    }
}

impl Shift for Rcr {
    fn apply<W: Width>(a: u64, count: u32, mut flags: LazyFlags) -> (u64, LazyFlags) {
        let n = count % (W::BITS + 1);
        if n == 0 {
            return (a, flags);
        }
        let (r, cf) = rotate_through::<W>(a, W::BITS + 1 - n, flags);
        flags.set_cf_of(cf, top::<W>(r) != top::<W>(r << 1 & W::MASK));
        (r, flags)
    }
}

/// Count in CL.
pub struct Cl;
impl Source for Cl {
    #[inline(always)]
    fn load<W: Width>(cpu: &mut Cpu, _: &Op) -> Result<u64, x86::Exception> {
        Ok(W8::get(cpu, 1))
    }
}

fn shift<W: Width, O: Shift, D: Dest, C: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let mask = if W::BITS == 64 { 63 } else { 31 };
    #[expect(clippy::cast_possible_truncation, reason = "masked to 6 bits")]
    let count = (C::load::<W8>(cpu, op)? & mask) as u32;
    // A memory operand is written back (and must be writable) even when the count is zero.
    D::modify::<W>(cpu, op, |a, flags| if count == 0 { (a, flags) } else { O::apply::<W>(a, count, flags) })
}

/// Handler of a shift or rotate; `by_cl`: the count is in CL, else it is the immediate.
pub fn select_shift<O: Shift>(bits: u32, memory: bool, by_cl: bool) -> Handler {
    match (memory, by_cl) {
        (false, false) => by_width!(bits, shift, O, RegA, Imm),
        (false, true) => by_width!(bits, shift, O, RegA, Cl),
        (true, false) => by_width!(bits, shift, O, Mem, Imm),
        (true, true) => by_width!(bits, shift, O, Mem, Cl),
    }
}

/// SHLD: bits of `b` enter from the right.
fn shld<W: Width>(a: u64, b: u64, count: u32) -> (u64, LazyFlags) {
    if W::BITS == 16 {
        // Counts above 16 are undefined; processors go on with `a` again.
        let wide = a << 32 | b << 16 | a;
        let r = wide << count >> 32 & 0xffff;
        let cf = wide >> (48 - count) & 1 != 0;
        return (r, LazyFlags::with_cf_of(r, W::SHIFT, cf, top::<W>(r) != top::<W>(a)));
    }
    let r = (a << count | shr_or_zero(b, W::BITS - count)) & W::MASK;
    let cf = a >> (W::BITS - count) & 1 != 0;
    (r, LazyFlags::with_cf_of(r, W::SHIFT, cf, top::<W>(r) != top::<W>(a)))
}

fn shr_or_zero(v: u64, count: u32) -> u64 {
    v.checked_shr(count).unwrap_or(0)
}

/// SHRD: bits of `b` enter from the left.
fn shrd<W: Width>(a: u64, b: u64, count: u32) -> (u64, LazyFlags) {
    let wide = if W::BITS == 16 {
        // For counts above 16 processors go on with `a` again.
        u128::from(a) | u128::from(b) << 16 | u128::from(a) << 32
    } else {
        u128::from(a) | u128::from(b) << W::BITS
    };
    #[expect(clippy::cast_possible_truncation, reason = "the low part is the result")]
    let r = (wide >> count) as u64 & W::MASK;
    let cf = wide >> (count - 1) & 1 != 0;
    (r, LazyFlags::with_cf_of(r, W::SHIFT, cf, top::<W>(r) != top::<W>(a)))
}

fn double_shift<W: Width, const LEFT: bool, D: Dest, C: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let mask = if W::BITS == 64 { 63 } else { 31 };
    #[expect(clippy::cast_possible_truncation, reason = "masked to 6 bits")]
    let count = (C::load::<W8>(cpu, op)? & mask) as u32;
    let b = W::get(cpu, op.b);
    D::modify::<W>(cpu, op, |a, flags| match (count, LEFT) {
        (0, _) => (a, flags),
        (_, true) => shld::<W>(a, b, count),
        (_, false) => shrd::<W>(a, b, count),
    })
}

fn left<W: Width, D: Dest, C: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    double_shift::<W, true, D, C>(cpu, op)
}

fn right<W: Width, D: Dest, C: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    double_shift::<W, false, D, C>(cpu, op)
}

/// Handler of SHLD or SHRD.
pub fn select_double(bits: u32, is_left: bool, form: Form, by_cl: bool) -> Option<Handler> {
    Some(match (form, is_left, by_cl) {
        (Form::RR, true, false) => by_word_width!(bits, left, RegA, Imm),
        (Form::RR, true, true) => by_word_width!(bits, left, RegA, Cl),
        (Form::MR, true, false) => by_word_width!(bits, left, Mem, Imm),
        (Form::MR, true, true) => by_word_width!(bits, left, Mem, Cl),
        (Form::RR, false, false) => by_word_width!(bits, right, RegA, Imm),
        (Form::RR, false, true) => by_word_width!(bits, right, RegA, Cl),
        (Form::MR, false, false) => by_word_width!(bits, right, Mem, Imm),
        (Form::MR, false, true) => by_word_width!(bits, right, Mem, Cl),
        _ => return None,
    })
}
