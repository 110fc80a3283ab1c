//! PUSH, POP, LEAVE.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::Lowering;
use super::memory::Operand;
use super::registers::{frame_slot, host_number, in_frame};
use super::scratch::Scratch;
use super::segment;
use crate::emit::{Op, S0, S1, SP};
use crate::frame;

/// RBP.
const BP: u8 = 5;

/// Bytes that an instruction pushes or pops, parameters that RET drops set aside.
pub(super) fn item(i: &Instruction) -> usize {
    match i.code() {
        Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Retnd | Code::Retnd_imm16 => 4,
        Code::Retnq | Code::Retnq_imm16 => 8,
        _ => i.stack_pointer_increment().unsigned_abs() as usize,
    }
}

impl Lowering<'_, '_> {
    pub(super) fn push(&mut self, i: &Instruction, live_before: u32) -> bool {
        match i.code() {
            Code::Push_r64 | Code::Push_r32 | Code::Push_r16 => {
                let r = i.op0_register();
                let value =
                    if in_frame(r) { Value::Frame(frame_slot(r)) } else { Value::Host(host_number(r)) };
                self.push_one(i, value, live_before);
            }
            Code::Pushq_imm32
            | Code::Pushq_imm8
            | Code::Pushd_imm32
            | Code::Pushd_imm8
            | Code::Push_imm16
            | Code::Pushw_imm8 => {
                self.push_one(i, Value::Immediate(i.immediate(0) as i32), live_before);
            }
            Code::Push_rm64 | Code::Push_rm32 | Code::Push_rm16 if i.op0_kind() == OpKind::Memory => {
                let first = self.room.misses.len();
                self.spill(live_before);
                if self.own_operand(i, 0, item(i), false, false).is_none() {
                    return false;
                }
                self.asm.load_sized(item(i), S0, S0, S1);
                self.asm.store(frame::TEMP, S0);
                self.push_value(i, Value::Frame(frame::TEMP), 0);
                self.complete(first, false);
            }
            _ => return self.push_selector(i, live_before),
        }
        true
    }

    /// PUSH of a segment register: 16 bits are written, whatever the stack pointer moves by (SDM 2B PUSH).
    fn push_selector(&mut self, i: &Instruction, live_before: u32) -> bool {
        let r = i.op0_register();
        let Some(n) = segment::number(r).filter(|_| i.op0_kind() == OpKind::Register && item(i) < 8) else {
            return false;
        };
        self.spill(live_before);
        let first = self.room.misses.len();
        let retry = self.asm.here();
        if !self.stack_address(-(item(i) as i32), 2, true) {
            return false;
        }
        self.check(2, true, retry);
        self.asm.lea(S0, S0, Some((S1, 0)), 0);
        self.asm.load32(S1, frame::SELECTORS + 4 * n);
        self.store_element(2);
        self.move_stack(-(item(i) as i32));
        self.complete(first, false);
        true
    }

    /// An instruction that does nothing but push a value.
    pub(super) fn push_one(&mut self, i: &Instruction, value: Value, live_before: u32) {
        let pushed = self.push_value(i, value, live_before);
        self.complete(pushed.first, false);
    }

    /// The linear address `disp` above the stack pointer into [`S0`], checked for an access of `size` bytes.
    pub(super) fn stack_address(&mut self, disp: i32, size: usize, write: bool) -> bool {
        match self.facts.legacy {
            None => self.asm.lea(S0, SP, None, disp),
            Some(l) => {
                if disp == 0 {
                    self.asm.op32(Op::Mov, S0, SP);
                } else {
                    self.asm.lea32(S0, SP, None, disp);
                }
                if !l.wide_stack {
                    self.asm.zero_extend16(S0);
                }
                return self.add_base(Register::SS, size, write);
            }
        }
        true
    }

    /// Moves the stack pointer. Flags stay.
    pub(super) fn move_stack(&mut self, by: i32) {
        match self.facts.legacy {
            None => self.asm.lea(SP, SP, None, by),
            Some(l) if l.wide_stack => self.asm.lea32(SP, SP, None, by),
            Some(_) => self.asm.lea16(SP, SP, by),
        }
    }

    /// Pushes a value, with a check shared with others if there are any. What the frame holds of it stays there until the push is done.
    pub(super) fn push_value(&mut self, i: &Instruction, value: Value, live_before: u32) -> Pushed {
        let size = item(i);
        let grouped = self.grouped(i, live_before);
        let mut to = grouped.unwrap_or_else(|| {
            self.spill(live_before);
            let first = self.room.misses.len();
            let retry = self.asm.here();
            self.stack_address(-(size as i32), size, true);
            self.check(size, true, retry);
            Operand::checked(first)
        });
        let first = to.first;
        let register = if let Value::Host(r) = value { Some(r) } else { None };
        // All but a register needs a scratch register beside the operand's own.
        let mut scratch = S0;
        let immediate = self.immediate(value);
        if register.is_none() && immediate.is_none() && to.uses(S0) {
            self.asm.lea(S0, to.base, to.index.map(|x| (x, 0)), to.disp);
            to = Operand { base: S0, index: None, disp: 0, first };
            scratch = S1;
            (self.held, self.kept) = (Scratch::default(), Scratch::default());
        }
        let mut held = None;
        match immediate {
            Some(v) => self.asm.store_imm_to(size, to.place(), v),
            None => {
                let from = register.unwrap_or(scratch);
                match value {
                    Value::Frame(slot) => self.asm.load(from, slot),
                    Value::Rip(offset) => {
                        self.pointer_to(from, offset);
                        held = Some(from);
                    }
                    Value::Host(_) | Value::Immediate(_) => {}
                }
                self.asm.store_to(size, to.place(), from);
            }
        }
        self.move_stack(-(size as i32));
        Pushed { first, held }
    }

    /// The value as an immediate, if it is one that fits.
    fn immediate(&self, value: Value) -> Option<i32> {
        match (value, self.facts.legacy) {
            (Value::Immediate(v), _) => Some(v),
            (Value::Rip(offset), None) => {
                i32::try_from(self.facts.page_rip?.wrapping_add(offset) as i64).ok()
            }
            (Value::Rip(offset), Some(l)) if l.flat_code => {
                Some((self.facts.page_rip?.wrapping_add(offset) as u32).cast_signed())
            }
            _ => None,
        }
    }

    /// The operand at the top of the stack, to be read.
    pub(super) fn stack_top(&mut self, i: &Instruction, live_before: u32) -> Operand {
        let size = item(i);
        self.grouped(i, live_before).unwrap_or_else(|| {
            self.spill(live_before);
            let first = self.room.misses.len();
            let retry = self.asm.here();
            self.stack_address(0, size, false);
            self.check(size, false, retry);
            Operand::checked(first)
        })
    }

    pub(super) fn pop(&mut self, i: &Instruction, live_before: u32) -> bool {
        let r = i.op0_register();
        let stack_pointer = r.full_register() == Register::RSP;
        match i.code() {
            Code::Pop_r64 | Code::Pop_r32 => {}
            Code::Pop_r16 if self.facts.legacy.is_some() && !stack_pointer => {}
            _ => return false,
        }
        let top = self.stack_top(i, live_before);
        let host = if in_frame(r) { S0 } else { host_number(r) };
        self.asm.load_from(r.size(), host, top.place());
        if in_frame(r) {
            self.asm.store(frame_slot(r), S0);
        }
        if !stack_pointer {
            self.move_stack(r.size() as i32);
        }
        self.complete(top.first, false);
        true
    }

    /// LEAVE.
    pub(super) fn leave_frame(&mut self, i: &Instruction, live_before: u32) -> bool {
        let size = match i.code() {
            Code::Leaveq => 8,
            Code::Leaved if self.facts.legacy.is_some_and(|l| l.wide_stack && l.flat_data) => 4,
            _ => return false,
        };
        self.spill(live_before);
        let retry = self.asm.here();
        if size == 8 {
            self.asm.mov(S0, BP);
        } else {
            self.asm.op32(Op::Mov, S0, BP);
        }
        let miss = self.check(size, false, retry);
        self.asm.load_sized(size, S0, S0, S1);
        if size == 8 {
            self.asm.lea(SP, BP, None, 8);
        } else {
            self.asm.lea32(SP, BP, None, 4);
        }
        self.asm.mov(BP, S0);
        self.complete(miss, false);
        true
    }
}

/// How something was pushed.
pub(super) struct Pushed {
    /// The number of its first miss.
    first: usize,
    /// The scratch register that still has it, if it is an address of code.
    pub held: Option<u8>,
}

/// What is pushed.
#[derive(Clone, Copy)]
pub(super) enum Value {
    /// A host register.
    Host(u8),
    /// Eight bytes of the frame.
    Frame(i32),
    /// A sign-extended immediate.
    Immediate(i32),
    /// The RIP of an offset in the page.
    Rip(u64),
}
