//! MUL, IMUL, DIV, IDIV (SDM 2). SF, ZF, AF and PF are undefined after them; we set them from the low result.

use x86::Exception;

use super::{Form, Handler, Imm, Mem, Op, RegA, RegB, Source, W8, W16, Width, by_width, by_word_width};
use crate::cpu::{Cpu, Step};
use crate::flags::{LazyFlags, sign_extend};

/// Puts a double-width result into AX or rDX:rAX.
#[expect(clippy::cast_possible_truncation, reason = "splits the product in halves")]
fn set_double<W: Width>(cpu: &mut Cpu, product: u128) {
    if W::BITS == 8 {
        W16::set(cpu, 0, product as u64);
    } else {
        W::set(cpu, 0, product as u64 & W::MASK);
        W::set(cpu, 2, (product >> W::BITS) as u64 & W::MASK);
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the low half")]
fn mul<W: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let b = S::load::<W>(cpu, op)?;
    let product = u128::from(W::get(cpu, 0)) * u128::from(b);
    set_double::<W>(cpu, product);
    let over = product >> W::BITS != 0;
    cpu.flags = LazyFlags::with_cf_of(product as u64 & W::MASK, W::SHIFT, over, over);
    Ok(())
}

/// Signed product and whether it does not fit the width.
#[expect(clippy::cast_possible_truncation, reason = "the low half")]
fn signed_product<W: Width>(a: u64, b: u64) -> (i128, bool) {
    let product = i128::from(sign_extend(a, W::SHIFT) as i64) * i128::from(sign_extend(b, W::SHIFT) as i64);
    let low = sign_extend(product as u64, W::SHIFT) as i64;
    (product, i128::from(low) != product)
}

#[expect(clippy::cast_possible_truncation, reason = "the low half")]
fn imul<W: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let b = S::load::<W>(cpu, op)?;
    let (product, over) = signed_product::<W>(W::get(cpu, 0), b);
    set_double::<W>(cpu, product as u128);
    cpu.flags = LazyFlags::with_cf_of(product as u64 & W::MASK, W::SHIFT, over, over);
    Ok(())
}

/// IMUL r, r/m.
#[expect(clippy::cast_possible_truncation, reason = "the low half")]
fn imul2<W: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let b = S::load::<W>(cpu, op)?;
    let (product, over) = signed_product::<W>(W::get(cpu, op.a), b);
    W::set(cpu, op.a, product as u64 & W::MASK);
    cpu.flags = LazyFlags::with_cf_of(product as u64 & W::MASK, W::SHIFT, over, over);
    Ok(())
}

/// IMUL r, r/m, imm.
#[expect(clippy::cast_possible_truncation, reason = "the low half")]
fn imul3<W: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let a = S::load::<W>(cpu, op)?;
    let b = Imm::load::<W>(cpu, op)?;
    let (product, over) = signed_product::<W>(a, b);
    W::set(cpu, op.a, product as u64 & W::MASK);
    cpu.flags = LazyFlags::with_cf_of(product as u64 & W::MASK, W::SHIFT, over, over);
    Ok(())
}

/// AX or rDX:rAX.
fn double<W: Width>(cpu: &Cpu) -> u128 {
    if W::BITS == 8 {
        u128::from(W16::get(cpu, 0))
    } else {
        u128::from(W::get(cpu, 2)) << W::BITS | u128::from(W::get(cpu, 0))
    }
}

fn set_quotient<W: Width>(cpu: &mut Cpu, quotient: u64, remainder: u64) {
    if W::BITS == 8 {
        W8::set(cpu, 0, quotient);
        W8::set(cpu, 20, remainder);
    } else {
        W::set(cpu, 0, quotient);
        W::set(cpu, 2, remainder);
    }
}

#[expect(clippy::cast_possible_truncation, reason = "checked against the width")]
fn div<W: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let divisor = u128::from(S::load::<W>(cpu, op)?);
    let dividend = double::<W>(cpu);
    let Some(quotient) = dividend.checked_div(divisor) else { return Err(Exception::DE.into()) };
    if quotient > u128::from(W::MASK) {
        return Err(Exception::DE.into());
    }
    set_quotient::<W>(cpu, quotient as u64, (dividend % divisor) as u64);
    Ok(())
}

#[expect(clippy::cast_possible_truncation, reason = "checked against the width")]
fn idiv<W: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let divisor = i128::from(sign_extend(S::load::<W>(cpu, op)?, W::SHIFT) as i64);
    let unused = 128 - 2 * W::BITS;
    let dividend = ((double::<W>(cpu) << unused) as i128) >> unused;
    let Some(quotient) = dividend.checked_div(divisor) else { return Err(Exception::DE.into()) };
    if i128::from(sign_extend(quotient as u64, W::SHIFT) as i64) != quotient {
        return Err(Exception::DE.into());
    }
    set_quotient::<W>(cpu, quotient as u64 & W::MASK, (dividend % divisor) as u64 & W::MASK);
    Ok(())
}

/// The four operations on the accumulator.
#[derive(Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the manual's mnemonics")]
pub enum Kind {
    Mul,
    Imul,
    Div,
    Idiv,
}

/// Handler of a one-operand multiplication or division.
pub fn select(kind: Kind, bits: u32, form: Form) -> Option<Handler> {
    Some(match (kind, form) {
        (Kind::Mul, Form::R) => by_width!(bits, mul, RegA),
        (Kind::Mul, Form::M) => by_width!(bits, mul, Mem),
        (Kind::Imul, Form::R) => by_width!(bits, imul, RegA),
        (Kind::Imul, Form::M) => by_width!(bits, imul, Mem),
        (Kind::Div, Form::R) => by_width!(bits, div, RegA),
        (Kind::Div, Form::M) => by_width!(bits, div, Mem),
        (Kind::Idiv, Form::R) => by_width!(bits, idiv, RegA),
        (Kind::Idiv, Form::M) => by_width!(bits, idiv, Mem),
        _ => return None,
    })
}

/// Handler of IMUL with two or three operands.
pub fn select_imul(bits: u32, form: Form, immediate: bool) -> Option<Handler> {
    Some(match (form, immediate) {
        (Form::RR, false) => by_word_width!(bits, imul2, RegB),
        (Form::RM, false) => by_word_width!(bits, imul2, Mem),
        (Form::RR, true) => by_word_width!(bits, imul3, RegB),
        (Form::RM, true) => by_word_width!(bits, imul3, Mem),
        _ => return None,
    })
}
