//! ADD, OR, ADC, SBB, AND, SUB, XOR, CMP, TEST, INC, DEC, NEG, NOT, XADD, CMPXCHG, XCHG (SDM 2).

use guestmem::Scalar;

use super::{Dest, Form, Handler, Imm, Locked, Mem, Op, RegA, RegB, Source, Width, by_width};
use crate::cpu::{Cpu, Step, Stop};
use crate::flags::LazyFlags;

/// A two-operand operation on masked values.
pub trait Binary: 'static {
    /// Result and flags of `a` and `b`, with the flags before.
    fn apply<W: Width>(a: u64, b: u64, flags: LazyFlags) -> (u64, LazyFlags);
}

macro_rules! binary {
    ($name:ident, |$a:ident, $b:ident, $flags:ident, $w:ident| $body:expr) => {
        #[doc = concat!("The operation of ", stringify!($name), ".")]
        pub struct $name;
        impl Binary for $name {
            #[inline(always)]
            fn apply<$w: Width>($a: u64, $b: u64, $flags: LazyFlags) -> (u64, LazyFlags) {
                $body
            }
        }
    };
}

binary!(Add, |a, b, _f, W| {
    let r = a.wrapping_add(b) & W::MASK;
    (r, LazyFlags::add(a, b, r, W::SHIFT))
});
binary!(Adc, |a, b, f, W| {
    let r = a.wrapping_add(b).wrapping_add(u64::from(f.cf())) & W::MASK;
    (r, LazyFlags::add(a, b, r, W::SHIFT))
});
binary!(Sub, |a, b, _f, W| {
    let r = a.wrapping_sub(b) & W::MASK;
    (r, LazyFlags::sub(a, b, r, W::SHIFT))
});
binary!(Sbb, |a, b, f, W| {
    let r = a.wrapping_sub(b).wrapping_sub(u64::from(f.cf())) & W::MASK;
    (r, LazyFlags::sub(a, b, r, W::SHIFT))
});
binary!(And, |a, b, _f, W| {
    let r = a & b;
    (r, LazyFlags::logic(r, W::SHIFT))
});
binary!(Or, |a, b, _f, W| {
    let r = a | b;
    (r, LazyFlags::logic(r, W::SHIFT))
});
binary!(Xor, |a, b, _f, W| {
    let r = a ^ b;
    (r, LazyFlags::logic(r, W::SHIFT))
});

/// A one-operand operation on a masked value.
pub trait Unary: 'static {
    /// Result and flags of `a`, with the flags before.
    fn apply<W: Width>(a: u64, flags: LazyFlags) -> (u64, LazyFlags);
}

macro_rules! unary {
    ($name:ident, |$a:ident, $flags:ident, $w:ident| $body:expr) => {
        #[doc = concat!("The operation of ", stringify!($name), ".")]
        pub struct $name;
        impl Unary for $name {
            #[inline(always)]
            fn apply<$w: Width>($a: u64, $flags: LazyFlags) -> (u64, LazyFlags) {
                $body
            }
        }
    };
}

unary!(Inc, |a, f, W| {
    let r = a.wrapping_add(1) & W::MASK;
    (r, LazyFlags::add(a, 1, r, W::SHIFT).keeping_cf(f))
});
unary!(Dec, |a, f, W| {
    let r = a.wrapping_sub(1) & W::MASK;
    (r, LazyFlags::sub(a, 1, r, W::SHIFT).keeping_cf(f))
});
unary!(Neg, |a, _f, W| {
    let r = 0u64.wrapping_sub(a) & W::MASK;
    (r, LazyFlags::sub(0, a, r, W::SHIFT))
});
unary!(Not, |a, f, W| (!a & W::MASK, f));

fn binary<W: Width, O: Binary, D: Dest, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let b = S::load::<W>(cpu, op)?;
    D::modify::<W>(cpu, op, |a, flags| O::apply::<W>(a, b, flags))
}

fn compare<W: Width, O: Binary, D: Source, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let a = D::load::<W>(cpu, op)?;
    let b = S::load::<W>(cpu, op)?;
    cpu.flags = O::apply::<W>(a, b, cpu.flags).1;
    Ok(())
}

fn unary<W: Width, O: Unary, D: Dest>(cpu: &mut Cpu, op: &Op) -> Step {
    D::modify::<W>(cpu, op, |a, flags| O::apply::<W>(a, flags))
}

/// Handler of a two-operand operation.
pub fn select_binary<O: Binary>(bits: u32, form: Form, locked: bool) -> Option<Handler> {
    Some(match (form, locked) {
        (Form::RR, false) => by_width!(bits, binary, O, RegA, RegB),
        (Form::RM, false) => by_width!(bits, binary, O, RegA, Mem),
        (Form::RI, false) => by_width!(bits, binary, O, RegA, Imm),
        (Form::MR, false) => by_width!(bits, binary, O, Mem, RegB),
        (Form::MI, false) => by_width!(bits, binary, O, Mem, Imm),
        (Form::MR, true) => by_width!(bits, binary, O, Locked, RegB),
        (Form::MI, true) => by_width!(bits, binary, O, Locked, Imm),
        _ => return None,
    })
}

/// Handler of CMP (`O` = Sub) or TEST (`O` = And).
pub fn select_compare<O: Binary>(bits: u32, form: Form) -> Option<Handler> {
    Some(match form {
        Form::RR => by_width!(bits, compare, O, RegA, RegB),
        Form::RM => by_width!(bits, compare, O, RegA, Mem),
        Form::RI => by_width!(bits, compare, O, RegA, Imm),
        Form::MR => by_width!(bits, compare, O, Mem, RegB),
        Form::MI => by_width!(bits, compare, O, Mem, Imm),
        _ => return None,
    })
}

/// Handler of a one-operand operation.
pub fn select_unary<O: Unary>(bits: u32, form: Form, locked: bool) -> Option<Handler> {
    Some(match (form, locked) {
        (Form::R, false) => by_width!(bits, unary, O, RegA),
        (Form::M, false) => by_width!(bits, unary, O, Mem),
        (Form::M, true) => by_width!(bits, unary, O, Locked),
        _ => return None,
    })
}

/// Finds a place for writing, reads it.
fn open<W: Width>(cpu: &mut Cpu, op: &Op) -> Result<(crate::memory::Place, u64), Stop> {
    let ea = op.ea(cpu);
    let place = cpu.place(op.seg, ea, W::BYTES)?;
    let old: W::T = cpu.place_load(&place);
    Ok((place, old.to_u64()))
}

fn xadd_reg<W: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let (a, b) = (W::get(cpu, op.a), W::get(cpu, op.b));
    let (sum, flags) = Add::apply::<W>(a, b, cpu.flags);
    W::set(cpu, op.b, a);
    W::set(cpu, op.a, sum);
    cpu.flags = flags;
    Ok(())
}

/// XADD on memory; always by LOCK CMPXCHG, which is right without the prefix too.
fn xadd_mem<W: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let (place, mut old) = open::<W>(cpu, op)?;
    let b = W::get(cpu, op.b);
    loop {
        let (sum, flags) = Add::apply::<W>(old, b, cpu.flags);
        let found = cpu.place_cmpxchg(&place, W::T::from_u64(old), W::T::from_u64(sum)).to_u64();
        if found == old {
            W::set(cpu, op.b, old);
            cpu.flags = flags;
            return cpu.wrote();
        }
        old = found;
    }
}

/// Handler of XADD.
pub fn select_xadd(bits: u32, form: Form) -> Option<Handler> {
    Some(match form {
        Form::RR => by_width!(bits, xadd_reg),
        Form::MR => by_width!(bits, xadd_mem),
        _ => return None,
    })
}

fn cmpxchg_reg<W: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let (accumulator, found) = (W::get(cpu, 0), W::get(cpu, op.a));
    cpu.flags = Sub::apply::<W>(accumulator, found, cpu.flags).1;
    if accumulator == found {
        let b = W::get(cpu, op.b);
        W::set(cpu, op.a, b);
    } else {
        W::set(cpu, 0, found);
    }
    Ok(())
}

/// CMPXCHG on memory; always atomic. The destination is written either way, so it needs the right to write.
fn cmpxchg_mem<W: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let ea = op.ea(cpu);
    let place = cpu.place(op.seg, ea, W::BYTES)?;
    let accumulator = W::get(cpu, 0);
    let b = W::get(cpu, op.b);
    let found = cpu.place_cmpxchg(&place, W::T::from_u64(accumulator), W::T::from_u64(b)).to_u64();
    cpu.flags = Sub::apply::<W>(accumulator, found, cpu.flags).1;
    if accumulator != found {
        W::set(cpu, 0, found);
    }
    cpu.wrote()
}

/// Handler of CMPXCHG.
pub fn select_cmpxchg(bits: u32, form: Form) -> Option<Handler> {
    Some(match form {
        Form::RR => by_width!(bits, cmpxchg_reg),
        Form::MR => by_width!(bits, cmpxchg_mem),
        _ => return None,
    })
}

fn xchg_reg<W: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let (a, b) = (W::get(cpu, op.a), W::get(cpu, op.b));
    W::set(cpu, op.a, b);
    W::set(cpu, op.b, a);
    Ok(())
}

/// XCHG with memory is locked with or without the prefix.
fn xchg_mem<W: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let (place, mut old) = open::<W>(cpu, op)?;
    let b = W::get(cpu, op.b);
    loop {
        let found = cpu.place_cmpxchg(&place, W::T::from_u64(old), W::T::from_u64(b)).to_u64();
        if found == old {
            W::set(cpu, op.b, old);
            return cpu.wrote();
        }
        old = found;
    }
}

/// Handler of XCHG; the builder puts the register of a memory form into `b`.
pub fn select_xchg(bits: u32, form: Form) -> Option<Handler> {
    Some(match form {
        Form::RR => by_width!(bits, xchg_reg),
        Form::MR | Form::RM => by_width!(bits, xchg_mem),
        _ => return None,
    })
}
