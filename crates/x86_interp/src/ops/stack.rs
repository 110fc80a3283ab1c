//! PUSH, POP, ENTER, LEAVE, PUSHA, POPA (SDM 2). Their segment is SS; the builder puts its index into `seg`, for
//! `PUSH`/`POP` of memory into `extra`, because `seg` is the memory operand's.

use guestmem::Scalar;
use x86::Exception;

use super::{Form, Handler, Imm, Mem, Op, RegA, Source, Width, by_word_width};
use crate::cpu::{CodeSize, Cpu, FLAT_STACK, Step};

const RSP: usize = 4;
const RBP: usize = 5;

impl Cpu {
    /// Segment index of stack accesses.
    #[inline(always)]
    pub fn stack_segment(&self) -> u8 {
        if self.code_size == CodeSize::Bits64 { FLAT_STACK } else { 2 }
    }

    /// The stack pointer as an offset into SS.
    #[inline(always)]
    pub fn stack_pointer(&self) -> u64 {
        self.gpr[RSP] & self.stack_mask
    }

    /// Sets the stack pointer; bits beyond the stack's size stay as they are.
    #[inline(always)]
    pub fn set_stack_pointer(&mut self, value: u64) {
        self.gpr[RSP] = self.gpr[RSP] & !self.stack_mask | value & self.stack_mask;
    }

    /// Pushes one item.
    #[inline(always)]
    pub fn push<W: Width>(&mut self, value: u64) -> Result<(), Exception> {
        let to = self.stack_pointer().wrapping_sub(W::BYTES as u64) & self.stack_mask;
        self.write(self.stack_segment(), to, W::T::from_u64(value))?;
        self.set_stack_pointer(to);
        Ok(())
    }

    /// Reads the item at `depth` bytes above the stack pointer.
    #[inline(always)]
    pub fn peek<W: Width>(&mut self, depth: u64) -> Result<u64, Exception> {
        let from = self.stack_pointer().wrapping_add(depth) & self.stack_mask;
        self.read::<W::T>(self.stack_segment(), from).map(Scalar::to_u64)
    }

    /// Moves the stack pointer up.
    #[inline(always)]
    pub fn drop_stack(&mut self, bytes: u64) {
        self.set_stack_pointer(self.stack_pointer().wrapping_add(bytes));
    }
}

fn push<W: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = S::load::<W>(cpu, op)?;
    cpu.push::<W>(value)?;
    cpu.wrote()
}

/// Handler of PUSH.
pub fn select_push(bits: u32, form: Form) -> Option<Handler> {
    Some(match form {
        Form::R => by_word_width!(bits, push, RegA),
        Form::M => by_word_width!(bits, push, Mem),
        Form::I => by_word_width!(bits, push, Imm),
        _ => return None,
    })
}

fn pop_reg<W: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.peek::<W>(0)?;
    cpu.drop_stack(W::BYTES as u64);
    W::set(cpu, op.a, value);
    Ok(())
}

/// POP to memory: an address based on RSP sees it after the increment (SDM 2B POP).
fn pop_mem<W: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let value = cpu.peek::<W>(0)?;
    let before = cpu.gpr[RSP];
    cpu.drop_stack(W::BYTES as u64);
    let ea = op.ea(cpu);
    if let Err(e) = cpu.write(op.seg, ea, W::T::from_u64(value)) {
        cpu.gpr[RSP] = before;
        return Err(e.into());
    }
    cpu.wrote()
}

/// Handler of POP.
pub fn select_pop(bits: u32, form: Form) -> Option<Handler> {
    Some(match form {
        Form::R => by_word_width!(bits, pop_reg),
        Form::M => by_word_width!(bits, pop_mem),
        _ => return None,
    })
}

fn leave<W: Width>(cpu: &mut Cpu, _: &Op) -> Step {
    let frame = cpu.gpr[RBP] & cpu.stack_mask;
    let value = cpu.read::<W::T>(cpu.stack_segment(), frame)?.to_u64();
    cpu.set_stack_pointer(frame.wrapping_add(W::BYTES as u64));
    W::set(cpu, 5, value);
    Ok(())
}

/// Handler of LEAVE.
pub fn select_leave(bits: u32) -> Handler {
    by_word_width!(bits, leave)
}

/// ENTER: `imm` is the size, `extra` the nesting level (SDM 2A ENTER).
fn enter<W: Width>(cpu: &mut Cpu, op: &Op) -> Step {
    let size = W::BYTES as u64;
    let level = u64::from(op.extra & 31);
    let mask = cpu.stack_mask;
    let segment = cpu.stack_segment();
    let mut sp = cpu.stack_pointer().wrapping_sub(size) & mask;
    let old_frame = W::get(cpu, 5);
    cpu.write(segment, sp, W::T::from_u64(old_frame))?;
    let frame = sp;
    let mut from = cpu.gpr[RBP] & mask;
    for _ in 1..level {
        from = from.wrapping_sub(size) & mask;
        let link = cpu.read::<W::T>(segment, from)?;
        sp = sp.wrapping_sub(size) & mask;
        cpu.write(segment, sp, link)?;
    }
    if level > 0 {
        sp = sp.wrapping_sub(size) & mask;
        cpu.write(segment, sp, W::T::from_u64(frame))?;
    }
    sp = sp.wrapping_sub(op.imm) & mask;
    // The page that the new stack pointer names must be writable.
    cpu.place(segment, sp, W::BYTES)?;
    W::set(cpu, 5, frame | cpu.gpr[RSP] & !mask);
    cpu.set_stack_pointer(sp);
    cpu.wrote()
}

/// Handler of ENTER.
pub fn select_enter(bits: u32) -> Handler {
    by_word_width!(bits, enter)
}

fn pusha<W: Width>(cpu: &mut Cpu, _: &Op) -> Step {
    let before = cpu.gpr[RSP];
    // All eight must fit before the first is pushed: a fault leaves no trace but memory (SDM 2B PUSHA).
    for r in 0..8 {
        let value = if r == 4 { before } else { W::get(cpu, r) };
        if let Err(e) = cpu.push::<W>(value & W::MASK) {
            cpu.gpr[RSP] = before;
            return Err(e.into());
        }
    }
    cpu.wrote()
}

fn popa<W: Width>(cpu: &mut Cpu, _: &Op) -> Step {
    let mut values = [0; 8];
    for (i, value) in values.iter_mut().enumerate() {
        *value = cpu.peek::<W>((i * W::BYTES) as u64)?;
    }
    cpu.drop_stack(8 * W::BYTES as u64);
    for (r, &value) in (0..8u8).rev().zip(&values) {
        if r != 4 {
            W::set(cpu, r, value);
        }
    }
    Ok(())
}

/// Handler of PUSHA.
pub fn select_pusha(bits: u32) -> Handler {
    by_word_width!(bits, pusha)
}

/// Handler of POPA.
pub fn select_popa(bits: u32) -> Handler {
    by_word_width!(bits, popa)
}
