//! Control flow of 16- and 32-bit code.
//!
//! RIP is a linear address wherever translated code and the engine's tables name it; EIP is that without CS's base. Where CS is flat, they are the same
//! and no target is out of bounds. Else ([`Lowering::is_bounded`]) code runs translated only in pages that lie within the segment as a whole
//! ([`frame::CODE_START`]), and every jump to another page looks whether its target does: if not, the interpreter executes it.

use iced_x86::{Code, Instruction, OpKind};

use super::Lowering;
use super::scratch::Scratch;
use super::stack::{self, Value};
use crate::emit::{Fixup, Op, S0, S1, cc};
use crate::frame;

/// What 16- and 32-bit code may rely on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts")]
pub struct Legacy {
    /// Operands and addresses have 16 bits unless a prefix says otherwise, and so has IP (CS.D is clear; the segment ends within 64 KiB).
    pub bits16: bool,
    /// CS begins at 0 and has 4 GiB.
    pub flat_code: bool,
    /// So do DS, ES and SS, and they may be read and written.
    pub flat_data: bool,
    /// The stack pointer is ESP, not SP (SS.B).
    pub wide_stack: bool,
}

/// Operand size of a direct branch: what it cuts EIP to, and what CALL pushes.
const fn has_16_bits(code: Code) -> bool {
    matches!(
        code,
        Code::Call_rel16
            | Code::Jmp_rel16
            | Code::Jmp_rel8_16
            | Code::Jo_rel16
            | Code::Jno_rel16
            | Code::Jb_rel16
            | Code::Jae_rel16
            | Code::Je_rel16
            | Code::Jne_rel16
            | Code::Jbe_rel16
            | Code::Ja_rel16
            | Code::Js_rel16
            | Code::Jns_rel16
            | Code::Jp_rel16
            | Code::Jnp_rel16
            | Code::Jl_rel16
            | Code::Jge_rel16
            | Code::Jle_rel16
            | Code::Jg_rel16
            | Code::Jo_rel8_16
            | Code::Jno_rel8_16
            | Code::Jb_rel8_16
            | Code::Jae_rel8_16
            | Code::Je_rel8_16
            | Code::Jne_rel8_16
            | Code::Jbe_rel8_16
            | Code::Ja_rel8_16
            | Code::Js_rel8_16
            | Code::Jns_rel8_16
            | Code::Jp_rel8_16
            | Code::Jnp_rel8_16
            | Code::Jl_rel8_16
            | Code::Jge_rel8_16
            | Code::Jle_rel8_16
            | Code::Jg_rel8_16
    )
}

impl Lowering<'_, '_> {
    /// CS ends somewhere, or does not begin at 0.
    pub(super) fn is_bounded(&self) -> bool {
        self.facts.legacy.is_some_and(|l| !l.flat_code)
    }

    /// What the guest calls the instruction pointer at an offset in the page, into a register. Clobbers flags where CS is not flat.
    pub(super) fn pointer_to(&mut self, register: u8, offset: u64) {
        self.rip_to(register, offset);
        if self.is_bounded() {
            self.asm.gs32(Op::Sub, register, frame::SEGMENT_BASES + 8);
        }
    }

    /// A jump (to be bound) that is taken if the linear address in [`S0`] does not lie in a page within CS. Uses [`S1`] and flags.
    fn outside(&mut self) -> Fixup {
        self.held = Scratch::default();
        self.asm.op32(Op::Mov, S1, S0);
        self.asm.gs32(Op::Sub, S1, frame::CODE_START);
        self.asm.gs(Op::Cmp, S1, frame::CODE_SIZE);
        self.asm.jcc(cc::AE)
    }

    /// The linear address of a direct jump's target in another page into [`S0`].
    fn bounded_target(&mut self, offset: u64) {
        self.rip_to(S0, offset);
        if !self.falls && has_16_bits(self.code) {
            self.asm.gs32(Op::Sub, S0, frame::SEGMENT_BASES + 8);
            self.asm.zero_extend16(S0);
            self.asm.gs32(Op::Add, S0, frame::SEGMENT_BASES + 8);
        }
    }

    /// Goes on in another page. Guest flags are in the frame.
    pub(super) fn leave_bounded(&mut self, offset: u64) {
        self.bounded_target(offset);
        let outside = self.outside();
        if self.falls {
            // Fetching the next instruction may fault, not this one.
            self.leave_indirect(None, true);
            self.asm.bind(outside);
            self.asm.store(frame::RIP, S0);
            self.asm.jmp_gs(frame::LEAVE);
        } else {
            self.interpret_if(outside);
            self.leave_indirect(None, true);
        }
    }

    /// CALL of another page: the target is checked before the push.
    pub(super) fn call_bounded(&mut self, i: &Instruction) {
        self.bounded_target(i.near_branch_target());
        let outside = self.outside();
        self.interpret_if(outside);
        self.asm.store(frame::TEMP, S0);
        self.push_value(i, Value::Rip(i.next_ip()), 0);
        self.asm.load(S0, frame::TEMP);
        self.leave_indirect(None, true);
    }

    /// The EIP in [`S0`] becomes a linear address; out of bounds, the interpreter does the instruction.
    fn linear_target(&mut self) {
        if self.is_bounded() {
            self.asm.gs32(Op::Add, S0, frame::SEGMENT_BASES + 8);
            let outside = self.outside();
            self.interpret_if(outside);
        }
    }

    /// An indirect target, linear, into [`S0`]. Guest flags are in the frame.
    pub(super) fn legacy_target_to_s0(&mut self, i: &Instruction) -> bool {
        let register = i.op0_kind() == OpKind::Register;
        let size = if register { i.op0_register().size() } else { i.memory_size().size() };
        if !matches!(size, 2 | 4) {
            return false;
        }
        if register {
            self.register_to(S0, i.op0_register());
            if size == 2 {
                self.asm.zero_extend16(S0);
            }
        } else {
            if self.own_operand(i, 0, size, false, false).is_none() {
                return false;
            }
            self.asm.load_sized(size, S0, S0, S1);
        }
        self.linear_target();
        true
    }

    /// RET. Guest flags are in the frame.
    pub(super) fn legacy_ret(&mut self, i: &Instruction) {
        let size = stack::item(i);
        let more = if i.op_count() > 0 { i32::from(i.immediate16()) } else { 0 };
        if size > 4 {
            return self.interpret_transfer();
        }
        let top = self.stack_top(i, 0);
        if size == 4 {
            self.asm.load_from(4, S0, top.place());
        } else {
            // Never grouped.
            self.asm.load_sized(2, S0, S0, S1);
        }
        self.linear_target();
        self.move_stack(size as i32 + more);
        self.leave_indirect(None, true);
    }
}
