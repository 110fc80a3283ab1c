//! Near control transfers (SDM 2). Far ones are in `system::far`.

use guestmem::Scalar;

use super::{Form, Handler, Mem, Op, RegA, Source, W16, W32, W64, Width, by_word_width};
use crate::cpu::{Cpu, Step};

fn jmp_direct(cpu: &mut Cpu, op: &Op) -> Step {
    let target = op.target(cpu);
    cpu.jump(target)
}

fn jcc<const CC: u8>(cpu: &mut Cpu, op: &Op) -> Step {
    if cpu.flags.condition(CC) {
        let target = op.target(cpu);
        return cpu.jump(target);
    }
    Ok(())
}

/// Handler of Jcc.
pub fn select_jcc(cc: u8) -> Handler {
    const ALL: [Handler; 16] = [
        jcc::<0>, jcc::<1>, jcc::<2>, jcc::<3>, jcc::<4>, jcc::<5>, jcc::<6>, jcc::<7>, jcc::<8>, jcc::<9>,
        jcc::<10>, jcc::<11>, jcc::<12>, jcc::<13>, jcc::<14>, jcc::<15>,
    ];
    ALL[usize::from(cc & 15)]
}

fn jmp<W: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let target = S::load::<W>(cpu, op)?;
    cpu.jump(target)
}

/// Handler of near JMP.
pub fn select_jmp(bits: u32, form: Form) -> Option<Handler> {
    Some(match form {
        Form::R => by_word_width!(bits, jmp, RegA),
        Form::M => by_word_width!(bits, jmp, Mem),
        Form::Other => jmp_direct,
        _ => return None,
    })
}

/// The return address is pushed only if the target is valid, and the target taken only if the push worked.
#[inline(always)]
fn call_to<W: Width>(cpu: &mut Cpu, op: &Op, target: u64) -> Step {
    let jumped = cpu.jump(target);
    if let Err(crate::cpu::Stop::Fault(_)) = jumped {
        return jumped;
    }
    let next = op.next_rip(cpu);
    cpu.push::<W>(next)?;
    if cpu.code_written { Err(crate::cpu::Stop::Resync) } else { jumped }
}

fn call_direct<W: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let target = op.target(cpu);
    call_to::<W>(cpu, op, target)
}

fn call<W: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let target = S::load::<W>(cpu, op)?;
    call_to::<W>(cpu, op, target)
}

/// Handler of near CALL.
pub fn select_call(bits: u32, form: Form) -> Option<Handler> {
    Some(match form {
        Form::R => by_word_width!(bits, call, RegA),
        Form::M => by_word_width!(bits, call, Mem),
        Form::Other => by_word_width!(bits, call_direct),
        _ => return None,
    })
}

/// RET; `imm` bytes of parameters are dropped.
fn ret<W: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let target = cpu.peek::<W>(0)?;
    let jumped = cpu.jump(target);
    if let Err(crate::cpu::Stop::Fault(_)) = jumped {
        return jumped;
    }
    cpu.drop_stack(W::BYTES as u64 + op.imm);
    jumped
}

/// Handler of near RET.
pub fn select_ret(bits: u32) -> Handler {
    by_word_width!(bits, ret)
}

/// Decrements the count register of an address size.
fn count_down(cpu: &mut Cpu, address_bits: u8) -> u64 {
    match address_bits {
        16 => {
            let c = W16::get(cpu, 1).wrapping_sub(1) & W16::MASK;
            W16::set(cpu, 1, c);
            c
        }
        32 => {
            let c = W32::get(cpu, 1).wrapping_sub(1) & W32::MASK;
            W32::set(cpu, 1, c);
            c
        }
        _ => {
            let c = W64::get(cpu, 1).wrapping_sub(1);
            W64::set(cpu, 1, c);
            c
        }
    }
}

/// The count register of an address size.
fn count(cpu: &Cpu, address_bits: u8) -> u64 {
    match address_bits {
        16 => W16::get(cpu, 1),
        32 => W32::get(cpu, 1),
        _ => W64::get(cpu, 1),
    }
}

/// LOOP, LOOPE, LOOPNE: `extra` is the address size, `b` 0 for LOOP, 1 for LOOPE, 2 for LOOPNE.
pub fn loop_(cpu: &mut Cpu, op: &Op) -> Step {
    let before = cpu.gpr[1];
    let left = count_down(cpu, op.extra);
    let goes_on = match op.b {
        0 => true,
        1 => cpu.flags.zf(),
        _ => !cpu.flags.zf(),
    };
    if left == 0 || !goes_on {
        return Ok(());
    }
    let target = op.target(cpu);
    let jumped = cpu.jump(target);
    if let Err(crate::cpu::Stop::Fault(_)) = jumped {
        cpu.gpr[1] = before;
    }
    jumped
}

/// JCXZ, JECXZ, JRCXZ: `extra` is the address size.
pub fn jcxz(cpu: &mut Cpu, op: &Op) -> Step {
    if count(cpu, op.extra) != 0 {
        return Ok(());
    }
    let target = op.target(cpu);
    cpu.jump(target)
}

/// Where a far pointer in memory is: offset of `W`, then the selector.
pub fn far_pointer<W: Width>(cpu: &mut Cpu, op: &Op) -> Result<(u16, u64), x86::Exception> {
    let ea = op.ea(cpu);
    let offset = cpu.read::<W::T>(op.seg, ea)?.to_u64();
    let selector: u16 = cpu.read(op.seg, ea.wrapping_add(W::BYTES as u64) & op.amask)?;
    Ok((selector, offset))
}
