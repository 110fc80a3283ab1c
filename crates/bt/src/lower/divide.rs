//! DIV and IDIV with an inline check: what would raise #DE, and signed divisions that are not plainly harmless, are interpreted. So
//! translated code never divides by zero on the host.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::Lowering;
use crate::emit::{Op, RAX, RDX, S0, S1, cc};

impl Lowering<'_, '_> {
    pub(super) fn divide(&mut self, i: &Instruction, live_before: u32) -> bool {
        let memory = i.op0_kind() == OpKind::Memory;
        let size = if memory { i.memory_size().size() } else { i.op0_register().size() };
        let signed = i.mnemonic() == Mnemonic::Idiv;
        let high_byte = matches!(i.op0_register(), Register::AH | Register::CH | Register::DH | Register::BH);
        if signed && size < 4 || !memory && high_byte {
            return false;
        }
        let first = self.room.misses.len();
        // All flags are undefined afterwards, but the interpreter may have to show them if it raises #DE.
        self.spill(live_before | crate::unit::STATUS);
        if memory {
            if self.own_operand(i, 0, size, false, false).is_none() {
                return false;
            }
            self.asm.load_sized(size, S1, S0, S1);
        } else {
            self.register_to(S1, i.op0_register());
        }
        if signed {
            self.check_signed(size)
        } else {
            self.check_unsigned(size)
        }
        self.divide_by_s1(size, signed);
        self.in_host = false;
        self.complete(first, false);
        true
    }

    /// The quotient fits if the upper half of the dividend is below the divisor (which is then not 0).
    fn check_unsigned(&mut self, size: usize) {
        match size {
            8 => self.asm.op(Op::Cmp, RDX, S1),
            4 => self.asm.op32(Op::Cmp, RDX, S1),
            2 => {
                self.asm.bytes(&[0x66]);
                self.asm.op32(Op::Cmp, RDX, S1);
            }
            _ => {
                self.asm.mov(S0, RAX);
                self.asm.shr(S0, 8);
                self.asm.cmp8(S0, S1);
            }
        }
        let slow = self.asm.jcc(cc::AE);
        self.interpret_if(slow);
    }

    /// The quotient fits if the dividend is a sign-extended RAX and the divisor neither 0 nor -1.
    fn check_signed(&mut self, size: usize) {
        if size == 8 {
            self.asm.mov(S0, RAX);
            self.asm.sar(S0, 63);
            self.asm.op(Op::Cmp, S0, RDX);
        } else {
            self.asm.op32(Op::Mov, S0, RAX);
            self.asm.sar32(S0, 31);
            self.asm.op32(Op::Cmp, S0, RDX);
        }
        let wide = self.asm.jcc(cc::NE);
        self.interpret_if(wide);
        if size == 8 {
            self.asm.lea(S0, S1, None, 1);
            self.asm.cmp_imm(S0, 1);
        } else {
            self.asm.lea32(S0, S1, None, 1);
            self.asm.group1_32(7, S0, 1);
        }
        let odd = self.asm.jcc(cc::BE);
        self.interpret_if(odd);
    }

    /// DIV or IDIV by [`S1`].
    fn divide_by_s1(&mut self, size: usize, signed: bool) {
        let modrm = if signed { 0xff } else { 0xf7 };
        match size {
            8 => self.asm.bytes(&[0x49, 0xf7, modrm]),
            4 => self.asm.bytes(&[0x41, 0xf7, modrm]),
            2 => self.asm.bytes(&[0x66, 0x41, 0xf7, modrm]),
            _ => self.asm.bytes(&[0x41, 0xf6, modrm]),
        }
    }
}
