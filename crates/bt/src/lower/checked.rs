//! Fragments that check themselves: for code that changes so often that tracing its writes costs more than comparing it at each entry.
//!
//! Such a fragment compares the bytes it was made of with those in memory whenever it is entered, and leaves by its stale exit if they differ. It
//! relies on nothing else of the page, and ends with the first instruction that may write memory (`unit::form_checked`), so what it executes is
//! what stood there when it was entered (INV-CHECK-1). Constants of moves and displacements of direct jumps and calls are not compared: they are
//! taken from memory, eight aligned bytes at a time together with what is compared of those, as a processor may fetch them that sees another's
//! aligned store either whole or not at all (APM 2 7.6.1).
//!
//! A counter in the frame sends it to the engine by the same exit from time to time, which looks whether the code still changes.

use iced_x86::{Code, Instruction, OpKind};

use super::Lowering;
use super::registers::{frame_slot, host_number, in_frame};
use super::stack::Value;
use crate::emit::{Fixup, S0, S1, cc};
use crate::frame;
use crate::unit::{STATUS, Unit};

/// Where a fragment finds what it compares.
#[derive(Clone, Copy, Debug)]
pub struct Checked {
    /// Host address of the page.
    pub host: u64,
    /// Which of the [`frame::COUNTERS`] counts its entries.
    pub counter: u8,
}

/// Where the constant of an instruction stands in it, if it is taken from memory: offset and length.
pub(super) fn variable(i: &Instruction) -> Option<(usize, usize)> {
    let len = match i.code() {
        Code::Mov_r64_imm64 => 8,
        Code::Mov_r32_imm32 | Code::Call_rel32_64 | Code::Jmp_rel32_64 => 4,
        Code::Mov_rm32_imm32 | Code::Mov_rm64_imm32 if i.op0_kind() == OpKind::Register => 4,
        _ => return None,
    };
    Some((i.len() - len, len))
}

/// The unit's bytes, counted from its first, that are taken from memory.
pub(super) fn variable_bytes(unit: &Unit) -> u128 {
    let start = unit.instructions.first().map_or(0, Instruction::ip);
    unit.instructions.iter().fold(0, |mask, i| match variable(i) {
        Some((at, len)) => mask | ((1u128 << len) - 1) << (i.ip() - start + at as u64),
        None => mask,
    })
}

impl Lowering<'_, '_> {
    /// Compares the unit's bytes; the jumps that are taken if they differ. Flags are in the frame here.
    pub(super) fn check_bytes(&mut self, unit: &Unit) -> Vec<Fixup> {
        let (Some(checked), Some(first)) = (self.checked, unit.instructions.first()) else {
            return Vec::new();
        };
        let mut failed = Vec::new();
        self.asm.count_down(frame::COUNTERS + 4 * i32::from(checked.counter));
        failed.push(self.asm.jcc(cc::B));
        let start = first.ip() as usize;
        let variable = variable_bytes(unit);
        let base = start & !7;
        self.asm.mov_imm(S0, checked.host.wrapping_add(base as u64));
        let is_fixed = |at: usize| at >= start && at < unit.end && variable >> (at - start) & 1 == 0;
        for chunk in (base..unit.end).step_by(8) {
            let bytes = chunk.max(start)..(chunk + 8).min(unit.end);
            let copied = !bytes.clone().all(is_fixed);
            let place = (chunk - base) as i32;
            if copied {
                self.asm.load_from(8, S1, (S0, None, place));
                self.asm.store(frame::CODE_COPY + place, S1);
            }
            let mut at = bytes.start;
            while at < bytes.end {
                let Some(size) =
                    [4, 2, 1].into_iter().find(|n| at + n <= bytes.end && (at..at + n).all(is_fixed))
                else {
                    at += 1;
                    continue;
                };
                let value = self.targets.reader.page()[at..at + size]
                    .iter()
                    .rev()
                    .fold(0, |v, b| v << 8 | u32::from(*b));
                let disp = (at - base) as i32;
                if copied {
                    self.asm.cmp_gs(size, frame::CODE_COPY + disp, value);
                } else {
                    self.asm.cmp_at(size, S0, disp, value);
                }
                failed.push(self.asm.jcc(cc::NE));
                at += size;
            }
        }
        failed
    }

    /// Where the current instruction's constant was copied to.
    fn copied(&self, at: usize) -> i32 {
        let start = self.room.map.first().map_or(0, |place| i32::from(place.guest));
        frame::CODE_COPY + self.current as i32 + at as i32 - (start & !7)
    }

    /// A move of a constant that is taken from memory.
    pub(super) fn variable_move(&mut self, i: &Instruction) -> bool {
        let Some((at, _)) = variable(i) else { return false };
        let from = self.copied(at);
        let to = i.op0_register();
        let host = if in_frame(to) { S0 } else { host_number(to) };
        match i.code() {
            Code::Mov_r64_imm64 => self.asm.load(host, from),
            Code::Mov_rm64_imm32 => self.asm.load_signed32(host, from),
            _ => self.asm.load32(host, from),
        }
        if in_frame(to) {
            self.asm.store(frame_slot(to), S0);
        }
        true
    }

    /// A jump or call whose displacement is taken from memory.
    pub(super) fn variable_jump(&mut self, i: &Instruction) -> bool {
        let Some((at, _)) = variable(i) else { return false };
        self.spill(STATUS);
        if i.code() == Code::Call_rel32_64 {
            self.push_value(i, Value::Rip(i.next_ip()), 0);
        }
        self.rip_to(S0, i.next_ip());
        self.asm.load_signed32(S1, self.copied(at));
        self.asm.lea(S0, S0, Some((S1, 0)), 0);
        self.leave_indirect(None, true);
        true
    }
}
