//! PUSH, POP, LEAVE.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::Lowering;
use super::registers::{frame_slot, host_number, in_frame};
use crate::emit::{S0, S1, SP};
use crate::frame;

/// RBP.
const BP: u8 = 5;

impl Lowering<'_> {
    pub(super) fn push(&mut self, i: &Instruction, live_before: u32) -> bool {
        match i.code() {
            Code::Push_r64 => {
                let r = i.op0_register();
                let value =
                    if in_frame(r) { Value::Frame(frame_slot(r)) } else { Value::Host(host_number(r)) };
                self.push_grouped(i, value, live_before);
            }
            Code::Pushq_imm32 | Code::Pushq_imm8 => {
                self.push_grouped(i, Value::Immediate(i.immediate(0) as i32), live_before);
            }
            Code::Push_rm64 if i.op0_kind() == OpKind::Memory => {
                let first = self.misses.len();
                self.spill(live_before);
                if self.own_operand(i, 0, 8, false, false).is_none() {
                    return false;
                }
                self.asm.load_sum(S0, S0, S1);
                self.asm.store(frame::TEMP, S0);
                self.push_value(Value::Frame(frame::TEMP), 0);
                self.complete(first, false);
            }
            _ => return false,
        }
        true
    }

    /// Pushes a value, with a check shared with others if there are any.
    pub(super) fn push_grouped(&mut self, i: &Instruction, value: Value, live_before: u32) {
        let Some(operand) = self.grouped(i, live_before) else {
            return self.push_value(value, live_before);
        };
        let at = (operand.base, operand.index, operand.disp);
        match value {
            Value::Host(r) => self.asm.store_to(at, r),
            Value::Immediate(v) => self.asm.store_imm_to(at, v),
            Value::Frame(slot) => {
                self.asm.load(S0, slot);
                self.asm.store_to(at, S0);
            }
        }
        self.asm.lea(SP, SP, None, -8);
    }

    /// Pushes a value. What the frame holds of it stays there until the push is done.
    pub(super) fn push_value(&mut self, value: Value, live_before: u32) {
        self.spill(live_before);
        let retry = self.asm.here();
        self.asm.lea(S0, SP, None, -8);
        let miss = self.check(8, true, retry);
        match value {
            Value::Host(r) => self.asm.store_sum(S0, S1, r),
            Value::Frame(at) => {
                self.asm.lea(S0, S0, Some((S1, 0)), 0);
                self.asm.load(S1, at);
                self.asm.store_at(S0, 0, S1);
            }
            Value::Immediate(v) => {
                self.asm.lea(S0, S0, Some((S1, 0)), 0);
                self.asm.store_imm_at(S0, 0, v);
            }
        }
        self.asm.lea(SP, SP, None, -8);
        self.complete(miss, false);
    }

    pub(super) fn pop(&mut self, i: &Instruction, live_before: u32) -> bool {
        if i.code() != Code::Pop_r64 {
            return false;
        }
        let r = i.op0_register();
        if let Some(operand) = self.grouped(i, live_before) {
            let at = (operand.base, operand.index, operand.disp);
            let host = if in_frame(r) { S0 } else { host_number(r) };
            self.asm.load_from(host, at);
            if in_frame(r) {
                self.asm.store(frame_slot(r), S0);
            }
            self.asm.lea(SP, SP, None, 8);
            return true;
        }
        self.spill(live_before);
        let retry = self.asm.here();
        self.asm.mov(S0, SP);
        let miss = self.check(8, false, retry);
        if r == Register::RSP {
            self.asm.load_sum(SP, S0, S1);
        } else {
            let host = if in_frame(r) { S0 } else { host_number(r) };
            self.asm.load_sum(host, S0, S1);
            if in_frame(r) {
                self.asm.store(frame_slot(r), S0);
            }
            self.asm.lea(SP, SP, None, 8);
        }
        self.complete(miss, false);
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
}
