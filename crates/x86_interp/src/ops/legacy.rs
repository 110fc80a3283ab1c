//! Instructions of 16- and 32-bit code only: decimal adjust, BOUND, ARPL, SALC; and LAHF, SAHF, the flag instructions.

use guestmem::Scalar;
use x86::Exception;
use x86::bits::rflags;

use super::{Handler, Op, W8, W16, Width, by_word_width};
use crate::cpu::{Cpu, Step};
use crate::flags::{LazyFlags, sign_extend};

const AL: u8 = 0;
const AH: u8 = 20;

/// Sets SF, ZF, PF from AL, and CF and AF as given; OF is undefined (clear).
fn set_decimal_flags(cpu: &mut Cpu, cf: bool, af: bool) {
    let base = LazyFlags::logic(W8::get(cpu, AL), W8::SHIFT).to_rflags();
    let bits = if cf { rflags::CF } else { 0 } | if af { rflags::AF } else { 0 };
    cpu.flags = LazyFlags::from_rflags(base | bits);
}

fn decimal_adjust(cpu: &mut Cpu, subtract: bool) -> Step {
    let old = W8::get(cpu, AL);
    let (old_cf, old_af) = (cpu.flags.cf(), cpu.flags.af());
    let apply = |v: u64, by: u64| if subtract { v.wrapping_sub(by) } else { v.wrapping_add(by) };
    let mut al = old;
    let mut cf = false;
    let af = old & 15 > 9 || old_af;
    if af {
        let wide = apply(al, 6);
        cf = old_cf || wide > 0xff;
        al = wide & 0xff;
    }
    if old > 0x99 || old_cf {
        al = apply(al, 0x60) & 0xff;
        cf = true;
    }
    W8::set(cpu, AL, al);
    set_decimal_flags(cpu, cf, af);
    Ok(())
}

/// DAA.
pub fn daa(cpu: &mut Cpu, _: &Op) -> Step {
    decimal_adjust(cpu, false)
}

/// DAS.
pub fn das(cpu: &mut Cpu, _: &Op) -> Step {
    decimal_adjust(cpu, true)
}

fn ascii_adjust(cpu: &mut Cpu, by: u64) -> Step {
    let adjust = W8::get(cpu, AL) & 15 > 9 || cpu.flags.af();
    if adjust {
        let ax = W16::get(cpu, 0).wrapping_add(by);
        W16::set(cpu, 0, ax);
    }
    let al = W8::get(cpu, AL) & 15;
    W8::set(cpu, AL, al);
    set_decimal_flags(cpu, adjust, adjust);
    Ok(())
}

/// AAA.
pub fn aaa(cpu: &mut Cpu, _: &Op) -> Step {
    ascii_adjust(cpu, 0x106)
}

/// AAS.
pub fn aas(cpu: &mut Cpu, _: &Op) -> Step {
    ascii_adjust(cpu, 0u64.wrapping_sub(0x106))
}

/// AAM: #DE for base 0.
pub fn aam(cpu: &mut Cpu, op: &Op) -> Step {
    let base = op.imm & 0xff;
    if base == 0 {
        return Err(Exception::DE.into());
    }
    let al = W8::get(cpu, AL);
    W8::set(cpu, AH, al / base);
    W8::set(cpu, AL, al % base);
    set_decimal_flags(cpu, false, false);
    Ok(())
}

/// AAD.
pub fn aad(cpu: &mut Cpu, op: &Op) -> Step {
    let al = W8::get(cpu, AL).wrapping_add(W8::get(cpu, AH).wrapping_mul(op.imm & 0xff)) & 0xff;
    W16::set(cpu, 0, al);
    set_decimal_flags(cpu, false, false);
    Ok(())
}

/// SALC (undocumented D6).
pub fn salc(cpu: &mut Cpu, _: &Op) -> Step {
    let value = if cpu.flags.cf() { 0xff } else { 0 };
    W8::set(cpu, AL, value);
    Ok(())
}

/// LAHF.
pub fn lahf(cpu: &mut Cpu, _: &Op) -> Step {
    let value = cpu.flags.to_rflags() & 0xd5 | rflags::FIXED;
    W8::set(cpu, AH, value);
    Ok(())
}

/// SAHF.
pub fn sahf(cpu: &mut Cpu, _: &Op) -> Step {
    let of = cpu.flags.to_rflags() & rflags::OF;
    cpu.flags = LazyFlags::from_rflags(W8::get(cpu, AH) & 0xd5 | of);
    Ok(())
}

/// CLC.
pub fn clc(cpu: &mut Cpu, _: &Op) -> Step {
    cpu.flags.set_cf(false);
    Ok(())
}

/// STC.
pub fn stc(cpu: &mut Cpu, _: &Op) -> Step {
    cpu.flags.set_cf(true);
    Ok(())
}

/// CMC.
pub fn cmc(cpu: &mut Cpu, _: &Op) -> Step {
    let cf = cpu.flags.cf();
    cpu.flags.set_cf(!cf);
    Ok(())
}

/// CLD.
pub fn cld(cpu: &mut Cpu, _: &Op) -> Step {
    cpu.system_flags &= !rflags::DF;
    Ok(())
}

/// STD.
pub fn std(cpu: &mut Cpu, _: &Op) -> Step {
    cpu.system_flags |= rflags::DF;
    Ok(())
}

fn bound<W: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let ea = op.ea(cpu);
    let low = cpu.read::<W::T>(op.seg, ea)?.to_u64();
    let high = cpu.read::<W::T>(op.seg, ea.wrapping_add(W::BYTES as u64) & op.amask)?.to_u64();
    let signed = |v| sign_extend(v, W::SHIFT) as i64;
    let index = signed(W::get(cpu, op.a));
    if index < signed(low) || index > signed(high) { Err(Exception::BR.into()) } else { Ok(()) }
}

/// Handler of BOUND.
pub fn select_bound(bits: u32) -> Handler {
    by_word_width!(bits, bound)
}

/// What ARPL makes of `old` with the RPL of `op.b`, and the flags; the value only if it changes.
fn adjusted(cpu: &Cpu, op: &Op, old: u64) -> (Option<u64>, LazyFlags) {
    let rpl = W16::get(cpu, op.b) & 3;
    let raise = old & 3 < rpl;
    let zf = if raise { rflags::ZF } else { 0 };
    let flags = LazyFlags::from_rflags(cpu.flags.to_rflags() & !rflags::ZF | zf);
    (raise.then_some(old & !3 | rpl), flags)
}

fn arpl_exists(cpu: &Cpu) -> Step {
    if !cpu.s.protected() || cpu.s.v86() { Err(Exception::UD.into()) } else { Ok(()) }
}

/// ARPL with a register destination.
pub fn arpl_reg(cpu: &mut Cpu, op: &Op) -> Step {
    arpl_exists(cpu)?;
    let (value, flags) = adjusted(cpu, op, W16::get(cpu, op.a));
    if let Some(value) = value {
        W16::set(cpu, op.a, value);
    }
    cpu.flags = flags;
    Ok(())
}

/// ARPL with a memory destination: read first, and written only if it changes (SDM 2A ARPL), which page faults show.
pub fn arpl_mem(cpu: &mut Cpu, op: &Op) -> Step {
    arpl_exists(cpu)?;
    let ea = op.ea(cpu);
    let old = cpu.read::<u16>(op.seg, ea)?;
    let (value, flags) = adjusted(cpu, op, old.into());
    if let Some(value) = value {
        cpu.write::<u16>(op.seg, ea, u16::from_u64(value))?;
    }
    cpu.flags = flags;
    cpu.wrote()
}
