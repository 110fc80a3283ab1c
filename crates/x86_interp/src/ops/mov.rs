//! MOV, MOVZX, MOVSX, LEA, CMOVcc, SETcc, BSWAP, CBW…CQO, XLAT, MOVBE (SDM 2).

use guestmem::Scalar;

use super::{Form, Handler, Imm, Mem, Op, RegB, Source, W8, W16, W32, Width, by_width, by_word_width};
use crate::cpu::{Cpu, Step};
use crate::flags::sign_extend;

fn to_reg<W: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = S::load::<W>(cpu, op)?;
    W::set(cpu, op.a, value);
    Ok(())
}

fn to_mem<W: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = S::load::<W>(cpu, op)?;
    let ea = op.ea(cpu);
    cpu.write(op.seg, ea, W::T::from_u64(value))?;
    cpu.wrote()
}

/// Handler of MOV.
pub fn select_mov(bits: u32, form: Form) -> Option<Handler> {
    Some(match form {
        Form::RR => by_width!(bits, to_reg, RegB),
        Form::RM => by_width!(bits, to_reg, Mem),
        Form::RI => by_width!(bits, to_reg, Imm),
        Form::MR => by_width!(bits, to_mem, RegB),
        Form::MI => by_width!(bits, to_mem, Imm),
        _ => return None,
    })
}

fn movzx<W: Width, F: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = S::load::<F>(cpu, op)?;
    W::set(cpu, op.a, value);
    Ok(())
}

fn movsx<W: Width, F: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = sign_extend(S::load::<F>(cpu, op)?, F::SHIFT);
    W::set(cpu, op.a, value);
    Ok(())
}

/// Handler of MOVZX from `from` bits to `bits`.
pub fn select_movzx(bits: u32, from: u32, form: Form) -> Option<Handler> {
    Some(match (form, from) {
        (Form::RR, 8) => by_word_width!(bits, movzx, W8, RegB),
        (Form::RM, 8) => by_word_width!(bits, movzx, W8, Mem),
        (Form::RR, 16) => by_word_width!(bits, movzx, W16, RegB),
        (Form::RM, 16) => by_word_width!(bits, movzx, W16, Mem),
        _ => return None,
    })
}

/// Handler of MOVSX and MOVSXD from `from` bits to `bits`.
pub fn select_movsx(bits: u32, from: u32, form: Form) -> Option<Handler> {
    Some(match (form, from) {
        (Form::RR, 8) => by_word_width!(bits, movsx, W8, RegB),
        (Form::RM, 8) => by_word_width!(bits, movsx, W8, Mem),
        (Form::RR, 16) => by_word_width!(bits, movsx, W16, RegB),
        (Form::RM, 16) => by_word_width!(bits, movsx, W16, Mem),
        (Form::RR, 32) => by_word_width!(bits, movsx, W32, RegB),
        (Form::RM, 32) => by_word_width!(bits, movsx, W32, Mem),
        _ => return None,
    })
}

fn lea<W: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let ea = op.ea(cpu);
    W::set(cpu, op.a, ea);
    Ok(())
}

/// Handler of LEA.
pub fn select_lea(bits: u32) -> Handler {
    by_word_width!(bits, lea)
}

/// CMOVcc: the source is read whatever the condition, and a 32-bit destination is zero-extended either way.
fn cmov<W: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = S::load::<W>(cpu, op)?;
    let kept = W::get(cpu, op.a);
    W::set(cpu, op.a, if cpu.flags.condition(op.extra) { value } else { kept });
    Ok(())
}

/// Handler of CMOVcc.
pub fn select_cmov(bits: u32, form: Form) -> Option<Handler> {
    Some(match form {
        Form::RR => by_word_width!(bits, cmov, RegB),
        Form::RM => by_word_width!(bits, cmov, Mem),
        _ => return None,
    })
}

fn set_reg(cpu: &mut Cpu, op: &Op) -> Step {
    let value = u64::from(cpu.flags.condition(op.extra));
    W8::set(cpu, op.a, value);
    Ok(())
}

fn set_mem(cpu: &mut Cpu, op: &Op) -> Step {
    let ea = op.ea(cpu);
    let value = u8::from(cpu.flags.condition(op.extra));
    cpu.write(op.seg, ea, value)?;
    cpu.wrote()
}

/// Handler of SETcc.
pub fn select_set(form: Form) -> Option<Handler> {
    match form {
        Form::R => Some(set_reg),
        Form::M => Some(set_mem),
        _ => None,
    }
}

fn swap<W: Width>(value: u64) -> u64 {
    value.swap_bytes() >> W::SHIFT
}

fn bswap<W: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    // BSWAP of a 16-bit register is undefined; processors give zero (SDM 2A BSWAP).
    let value = if W::BITS == 16 { 0 } else { swap::<W>(W::get(cpu, op.a)) };
    W::set(cpu, op.a, value);
    Ok(())
}

/// Handler of BSWAP.
pub fn select_bswap(bits: u32) -> Handler {
    by_word_width!(bits, bswap)
}

fn movbe_load<W: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = Mem::load::<W>(cpu, op)?;
    W::set(cpu, op.a, swap::<W>(value));
    Ok(())
}

fn movbe_store<W: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = swap::<W>(W::get(cpu, op.b));
    let ea = op.ea(cpu);
    cpu.write(op.seg, ea, W::T::from_u64(value))?;
    cpu.wrote()
}

/// Handler of MOVBE.
pub fn select_movbe(bits: u32, form: Form) -> Option<Handler> {
    Some(match form {
        Form::RM => by_word_width!(bits, movbe_load),
        Form::MR => by_word_width!(bits, movbe_store),
        _ => return None,
    })
}

/// CBW, CWDE, CDQE: `W` is the destination.
fn extend_accumulator<W: Width>(cpu: &mut Cpu, _: &Op) -> Step {
    let half = W::SHIFT + W::BITS / 2;
    let value = sign_extend(W::get(cpu, 0), half);
    W::set(cpu, 0, value);
    Ok(())
}

/// CWD, CDQ, CQO.
fn extend_to_d<W: Width>(cpu: &mut Cpu, _: &Op) -> Step {
    let sign = sign_extend(W::get(cpu, 0), W::SHIFT) >> 63;
    W::set(cpu, 2, 0u64.wrapping_sub(sign));
    Ok(())
}

/// Handler of CBW (16), CWDE (32), CDQE (64).
pub fn select_extend_accumulator(bits: u32) -> Handler {
    by_word_width!(bits, extend_accumulator)
}

/// Handler of CWD (16), CDQ (32), CQO (64).
pub fn select_extend_to_d(bits: u32) -> Handler {
    by_word_width!(bits, extend_to_d)
}

/// XLATB: the builder gives RBX as base; AL is added here.
pub fn xlat(cpu: &mut Cpu, op: &Op) -> Step {
    let ea = cpu.gpr[usize::from(op.base & 31)].wrapping_add(cpu.gpr[0] & 0xff) & op.amask;
    let value: u8 = cpu.read(op.seg, ea)?;
    W8::set(cpu, 0, u64::from(value));
    Ok(())
}

/// NOP, prefetches, hints.
pub fn nop(_: &mut Cpu, _: &Op) -> Step {
    Ok(())
}
