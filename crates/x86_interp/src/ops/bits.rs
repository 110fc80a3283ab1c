//! BT, BTS, BTR, BTC, BSF, BSR, CMPXCHG8B, CMPXCHG16B (SDM 2).

use guestmem::{Hva, Scalar};
use x86::Exception;
use x86::bits::rflags;

use super::{Form, Handler, Imm, Op, RegB, Source, W32, W64, Width, by_word_width};
use crate::cpu::{Cpu, Step};
use crate::flags::{LazyFlags, sign_extend};
use crate::memory::{Place, Target};

/// What happens to the bit.
#[derive(Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the manual's mnemonics")]
pub enum BitOp {
    Test,
    Set,
    Reset,
    Complement,
}

impl BitOp {
    const fn apply(self, value: u64, bit: u64) -> u64 {
        match self {
            Self::Test => value,
            Self::Set => value | bit,
            Self::Reset => value & !bit,
            Self::Complement => value ^ bit,
        }
    }

    const fn from_extra(extra: u8) -> Self {
        match extra & 3 {
            0 => Self::Test,
            1 => Self::Set,
            2 => Self::Reset,
            _ => Self::Complement,
        }
    }
}

fn bit_reg<W: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let index = S::load::<W>(cpu, op)? & u64::from(W::BITS - 1);
    let value = W::get(cpu, op.a);
    let what = BitOp::from_extra(op.extra);
    cpu.flags.set_cf(value >> index & 1 != 0);
    if what != BitOp::Test {
        W::set(cpu, op.a, what.apply(value, 1 << index));
    }
    Ok(())
}

/// A memory operand with a register index reaches beyond the operand: the index is signed (SDM 2A BT).
fn bit_mem<W: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let raw = S::load::<W>(cpu, op)?;
    let by_register = op.extra & 0x80 != 0;
    let mut ea = op.ea(cpu);
    if by_register {
        let signed = sign_extend(raw, W::SHIFT) as i64;
        let word = signed >> W::BITS.trailing_zeros();
        ea = ea.wrapping_add((word * W::BYTES as i64) as u64) & op.amask;
    }
    let index = raw & u64::from(W::BITS - 1);
    let what = BitOp::from_extra(op.extra);
    if what == BitOp::Test {
        let value = cpu.read::<W::T>(op.seg, ea)?.to_u64();
        cpu.flags.set_cf(value >> index & 1 != 0);
        return Ok(());
    }
    // Always by LOCK CMPXCHG, which is right without the prefix too.
    let place = cpu.place(op.seg, ea, W::BYTES)?;
    let mut old: W::T = cpu.place_load(&place);
    loop {
        let new = what.apply(old.to_u64(), 1 << index);
        let found = cpu.place_cmpxchg(&place, old, W::T::from_u64(new));
        if found == old {
            cpu.flags.set_cf(old.to_u64() >> index & 1 != 0);
            return cpu.wrote();
        }
        old = found;
    }
}

/// Handler of BT and its kin; the builder puts [`BitOp`] into `extra`, with bit 7 for a register index.
pub fn select_bit(bits: u32, form: Form) -> Option<Handler> {
    Some(match form {
        Form::RR => by_word_width!(bits, bit_reg, RegB),
        Form::RI => by_word_width!(bits, bit_reg, Imm),
        Form::MR => by_word_width!(bits, bit_mem, RegB),
        Form::MI => by_word_width!(bits, bit_mem, Imm),
        _ => return None,
    })
}

fn scan<W: Width, const REVERSE: bool, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = S::load::<W>(cpu, op)?;
    // A zero source leaves the destination as it was (APM 3 BSF; Intel processors do so too); a 32-bit one is not even
    // zero-extended.
    if value != 0 {
        let bit = if REVERSE { 63 - value.leading_zeros() } else { value.trailing_zeros() };
        W::set(cpu, op.a, u64::from(bit));
    }
    let zero = if value == 0 { rflags::ZF } else { 0 };
    let others = cpu.flags.to_rflags() & !rflags::ZF;
    cpu.flags = LazyFlags::from_rflags(others | zero);
    Ok(())
}

fn forward<W: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    scan::<W, false, S>(cpu, op)
}

fn reverse<W: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    scan::<W, true, S>(cpu, op)
}

/// Handler of BSF (or BSR, if `is_reverse`).
pub fn select_scan(bits: u32, is_reverse: bool, form: Form) -> Option<Handler> {
    use super::Mem;
    Some(match (form, is_reverse) {
        (Form::RR, false) => by_word_width!(bits, forward, RegB),
        (Form::RM, false) => by_word_width!(bits, forward, Mem),
        (Form::RR, true) => by_word_width!(bits, reverse, RegB),
        (Form::RM, true) => by_word_width!(bits, reverse, Mem),
        _ => return None,
    })
}

/// CMPXCHG8B.
pub fn cmpxchg8b(cpu: &mut Cpu, op: &Op) -> Step {
    let ea = op.ea(cpu);
    let place = cpu.place(op.seg, ea, 8)?;
    let old = W32::get(cpu, 2) << 32 | W32::get(cpu, 0);
    let new = W32::get(cpu, 1) << 32 | W32::get(cpu, 3);
    let found: u64 = cpu.place_cmpxchg(&place, old, new);
    finish_exchange(cpu, found == old);
    if found != old {
        W32::set(cpu, 0, found);
        W32::set(cpu, 2, found >> 32);
    }
    cpu.wrote()
}

fn finish_exchange(cpu: &mut Cpu, equal: bool) {
    let others = cpu.flags.to_rflags() & !rflags::ZF;
    cpu.flags = LazyFlags::from_rflags(others | if equal { rflags::ZF } else { 0 });
}

/// CMPXCHG16B: the operand must be aligned, whatever the mode (SDM 2A CMPXCHG16B).
#[expect(clippy::cast_possible_truncation, reason = "splits 128 bits in halves")]
pub fn cmpxchg16b(cpu: &mut Cpu, op: &Op) -> Step {
    let ea = op.ea(cpu);
    let la = cpu.linear(op.seg, ea, 16, true)?;
    if la & 15 != 0 {
        return Err(Exception::GP0.into());
    }
    let place = cpu.place(op.seg, ea, 16)?;
    let old = u128::from(W64::get(cpu, 2)) << 64 | u128::from(W64::get(cpu, 0));
    let new = u128::from(W64::get(cpu, 1)) << 64 | u128::from(W64::get(cpu, 3));
    let found = exchange16(cpu, &place, old, new);
    finish_exchange(cpu, found == old);
    if found != old {
        W64::set(cpu, 0, found as u64);
        W64::set(cpu, 2, (found >> 64) as u64);
    }
    cpu.wrote()
}

fn exchange16(cpu: &mut Cpu, place: &Place, old: u128, new: u128) -> u128 {
    let (hva, gpa): (Hva, _) = match *place {
        Place::Direct(hva) => (hva, None),
        Place::Slow { first: Target::Ram(hva, gpa), .. } => (hva, Some(gpa)),
        // Device memory answers no locked 16-byte access; it reads as all ones.
        Place::Slow { .. } => return u128::MAX,
    };
    let found = cpu.mem.cmpxchg16(hva, old, new);
    if let Some(gpa) = gpa {
        cpu.note_write(gpa, 16);
    }
    found
}
