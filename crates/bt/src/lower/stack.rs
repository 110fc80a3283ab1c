//! PUSH, POP, LEAVE.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::Lowering;
use super::memory::Operand;
use super::registers::{frame_slot, host_number, in_frame};
use crate::emit::{S0, S1, SP};
use crate::frame;

/// RBP.
const BP: u8 = 5;

impl Lowering<'_, '_> {
    pub(super) fn push(&mut self, i: &Instruction, live_before: u32) -> bool {
        match i.code() {
            Code::Push_r64 => {
                let r = i.op0_register();
                let value =
                    if in_frame(r) { Value::Frame(frame_slot(r)) } else { Value::Host(host_number(r)) };
                self.push_one(i, value, live_before);
            }
            Code::Pushq_imm32 | Code::Pushq_imm8 => {
                self.push_one(i, Value::Immediate(i.immediate(0) as i32), live_before);
            }
            Code::Push_rm64 if i.op0_kind() == OpKind::Memory => {
                let first = self.misses.len();
                self.spill(live_before);
                if self.own_operand(i, 0, 8, false, false).is_none() {
                    return false;
                }
                self.asm.load_sum(S0, S0, S1);
                self.asm.store(frame::TEMP, S0);
                self.push_value(i, Value::Frame(frame::TEMP), 0);
                self.complete(first, false);
            }
            _ => return false,
        }
        true
    }

    /// An instruction that does nothing but push a value.
    pub(super) fn push_one(&mut self, i: &Instruction, value: Value, live_before: u32) {
        let first = self.push_value(i, value, live_before);
        self.complete(first, false);
    }

    /// Pushes a value, with a check shared with others if there are any. What the frame holds of it stays there until the push is done. The
    /// number of its first miss.
    pub(super) fn push_value(&mut self, i: &Instruction, value: Value, live_before: u32) -> usize {
        let grouped = self.grouped(i, live_before);
        let mut to = grouped.unwrap_or_else(|| {
            self.spill(live_before);
            let retry = self.asm.here();
            self.asm.lea(S0, SP, None, -8);
            Operand::checked(self.check(8, true, retry))
        });
        let first = to.first;
        let register = if let Value::Host(r) = value { Some(r) } else { None };
        // All but a register needs a scratch register beside the operand's own.
        let mut scratch = S0;
        if register.is_none() && to.uses(S0) {
            self.asm.lea(S0, to.base, to.index.map(|x| (x, 0)), to.disp);
            to = Operand { base: S0, index: None, disp: 0, first };
            scratch = S1;
        }
        match self.immediate(value) {
            Some(v) => self.asm.store_imm_to(to.place(), v),
            None => {
                let from = register.unwrap_or(scratch);
                match value {
                    Value::Frame(slot) => self.asm.load(from, slot),
                    Value::Rip(offset) => self.rip_to(from, offset),
                    Value::Host(_) | Value::Immediate(_) => {}
                }
                self.asm.store_to(to.place(), from);
            }
        }
        self.asm.lea(SP, SP, None, -8);
        first
    }

    /// The value as an immediate, if it is one that fits.
    fn immediate(&self, value: Value) -> Option<i32> {
        match value {
            Value::Immediate(v) => Some(v),
            Value::Rip(offset) => i32::try_from(self.facts.page_rip?.wrapping_add(offset) as i64).ok(),
            Value::Host(_) | Value::Frame(_) => None,
        }
    }

    /// The operand at the top of the stack, to be read.
    pub(super) fn stack_top(&mut self, i: &Instruction, live_before: u32) -> Operand {
        self.grouped(i, live_before).unwrap_or_else(|| {
            self.spill(live_before);
            let retry = self.asm.here();
            self.asm.mov(S0, SP);
            Operand::checked(self.check(8, false, retry))
        })
    }

    pub(super) fn pop(&mut self, i: &Instruction, live_before: u32) -> bool {
        if i.code() != Code::Pop_r64 {
            return false;
        }
        let r = i.op0_register();
        let top = self.stack_top(i, live_before);
        let host = if in_frame(r) { S0 } else { host_number(r) };
        self.asm.load_from(host, top.place());
        if in_frame(r) {
            self.asm.store(frame_slot(r), S0);
        }
        if r != Register::RSP {
            self.asm.lea(SP, SP, None, 8);
        }
        self.complete(top.first, false);
        true
    }

    /// LEAVE.
    pub(super) fn leave_frame(&mut self, i: &Instruction, live_before: u32) -> bool {
        if i.code() != Code::Leaveq {
            return false;
        }
        self.spill(live_before);
        let retry = self.asm.here();
        self.asm.mov(S0, BP);
        let miss = self.check(8, false, retry);
        self.asm.load_sum(S0, S0, S1);
        self.asm.lea(SP, BP, None, 8);
        self.asm.mov(BP, S0);
        self.complete(miss, false);
        true
    }
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
