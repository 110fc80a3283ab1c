//! Addresses of 16- and 32-bit code: effective addresses cut to their size, segments, and operands that need the byte registers AH to BH.
//!
//! INV-LEG-1: while 16- or 32-bit code runs translated, the upper halves of RAX to RDI are clear (the engine enters it only so, and what is
//! translated writes 32 bits, which clears them, or fewer, which keeps them). So a 32-bit register is its 64-bit register.
//!
//! DS, ES and SS cost nothing where [`super::Legacy::flat_data`] says that they are flat. An access by any other segment compares its end with the frame's
//! ([`frame::SEGMENT_ENDS`]), which is 0 if the segment cannot be used that way, and the limit plus 1 else; segments that expand down have 0 too. What
//! exceeds that is done, and refused if need be, by the interpreter.

use iced_x86::{Instruction, OpKind, Register};

use super::Lowering;
use super::memory::Operand;
use super::registers::{host_number, rename};
use super::scratch::Scratch;
use crate::emit::{Op, S0, S1, cc};
use crate::frame;

/// The displacement of a memory operand, as a signed number of 32 bits.
pub(super) const fn displacement(i: &Instruction) -> i32 {
    i.memory_displacement32().cast_signed()
}

/// Size in bits of the address of an explicit memory operand.
pub(super) fn address_bits(i: &Instruction) -> usize {
    match (i.memory_base(), i.memory_index()) {
        (Register::None, Register::None) => i.memory_displ_size() as usize * 8,
        (Register::None, index) => index.size() * 8,
        (base, _) => base.size() * 8,
    }
}

/// Number of a segment register.
pub(super) const fn number(segment: Register) -> Option<i32> {
    Some(match segment {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::DS => 3,
        Register::FS => 4,
        Register::GS => 5,
        _ => return None,
    })
}

fn is_high_byte(r: Register) -> bool {
    matches!(r, Register::AH | Register::CH | Register::DH | Register::BH)
}

/// Whether a register operand is AH, CH, DH or BH, which no instruction can name that also names R8 to R15.
pub(super) fn names_high_byte(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && is_high_byte(i.op_register(n)))
}

impl Lowering<'_, '_> {
    /// The linear address of the memory operand into [`S0`], checked for an access of `size` bytes. May use [`S1`] and flags.
    pub(super) fn segmented_address(&mut self, i: &Instruction, size: usize, write: bool) -> bool {
        self.effective_legacy(i, displacement(i)) && self.add_base(i.memory_segment(), size, write)
    }

    /// Base + index * scale + `disp`, cut to the size of the address, into [`S0`]. Flags and [`S1`] stay.
    pub(super) fn effective_legacy(&mut self, i: &Instruction, disp: i32) -> bool {
        let bits = address_bits(i);
        let host = |r: Register| (r != Register::None).then(|| host_number(r));
        let (base, index) = (host(i.memory_base()), host(i.memory_index()));
        let scale = i.memory_index_scale().trailing_zeros() as u8;
        match (base, index) {
            _ if !matches!(bits, 16 | 32) => return false,
            (None, None) => {
                let mask = if bits == 16 { 0xffff } else { 0xffff_ffff };
                self.asm.mov_imm(S0, u64::from(disp.cast_unsigned()) & mask);
                return true;
            }
            (None, Some(x)) => self.asm.lea32_scaled(S0, x, scale, disp),
            (Some(b), None) if disp == 0 => self.asm.op32(Op::Mov, S0, b),
            (Some(b), x) => self.asm.lea32(S0, b, x.map(|x| (x, scale)), disp),
        }
        if bits == 16 {
            self.asm.zero_extend16(S0);
        }
        true
    }

    /// Whether accesses by a segment need neither check nor base.
    pub(super) fn is_flat(&self, segment: Register) -> bool {
        let data = matches!(segment, Register::DS | Register::ES | Register::SS);
        data && self.facts.legacy.is_none_or(|l| l.flat_data)
    }

    /// Makes the offset in [`S0`] a linear address, if `size` bytes there lie within the segment; else the interpreter does the instruction. Flags
    /// are in the frame or dead.
    pub(super) fn add_base(&mut self, segment: Register, size: usize, write: bool) -> bool {
        if self.is_flat(segment) {
            return true;
        }
        let Some(n) = number(segment) else { return false };
        self.held = Scratch::default();
        self.asm.lea(S1, S0, None, size as i32);
        self.asm.gs(Op::Cmp, S1, frame::SEGMENT_ENDS + 16 * n + if write { 8 } else { 0 });
        let beyond = self.asm.jcc(cc::A);
        self.interpret_if(beyond);
        self.asm.gs32(Op::Add, S0, frame::SEGMENT_BASES + 8 * n);
        true
    }

    /// LEA.
    pub(super) fn lea_legacy(&mut self, i: &Instruction) -> bool {
        if !self.effective_legacy(i, displacement(i)) {
            return false;
        }
        let to = host_number(i.op0_register());
        match i.op0_register().size() {
            2 => self.asm.mov16(to, S0),
            4 => self.asm.op32(Op::Mov, to, S0),
            _ => return false,
        }
        self.kept = self.held;
        self.kept.lose_s0();
        true
    }

    /// An instruction with AH, CH, DH or BH and a memory operand: the host address is in one of the old registers meanwhile, because those
    /// cannot be named beside a new one (SDM 2A 2.2.1.2).
    pub(super) fn with_high_byte(
        &mut self,
        i: &Instruction,
        needs: bool,
        touches: bool,
        operand: Operand,
    ) -> bool {
        // Beside AH, DIL cannot be named, and these instructions have no implicit operands in it.
        let Some((mut renamed, borrowed)) = rename(i, &[], &mut self.room.info) else { return false };
        let edi = (0..i.op_count())
            .any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).full_register() == Register::RDI);
        if edi || !borrowed.is_empty() {
            return false;
        }
        let host = host_number(Register::RDI);
        self.asm.lea(S0, operand.base, operand.index.map(|x| (x, 0)), operand.disp);
        super::ident::set_memory(
            &mut renamed,
            Operand { base: host, index: None, disp: 0, first: operand.first },
        );
        if needs && !self.in_host {
            self.asm.restore_flags_on_stack(frame::FLAGS);
        }
        self.asm.xchg(S0, host);
        let ok = self.asm.instruction(&renamed);
        self.asm.xchg(S0, host);
        if touches || needs {
            self.in_host = true;
        }
        let flags_in_host = self.in_host;
        self.complete(operand.first, flags_in_host);
        ok
    }
}
