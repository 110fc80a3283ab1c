//! 16- and 32-bit instructions in the forms that 64-bit code has too, so that what follows need not know where they came from: INC and DEC by their long
//! forms, MOV with an absolute address as one with a ModRM byte, branch targets as signed offsets from the page's first byte.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind};

/// How bytes become instructions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Decoding {
    /// 16, 32 or 64: the code segment's size.
    pub bits: u32,
    /// AMD's decoding of operand-size prefixes on branches.
    pub amd: bool,
}

impl Decoding {
    /// A decoder of `bytes`, the first of which is at `ip`.
    #[must_use]
    pub fn decoder(self, bytes: &[u8], ip: u64) -> Decoder<'_> {
        let options = if self.amd { DecoderOptions::AMD } else { DecoderOptions::NONE };
        Decoder::with_ip(self.bits, bytes, ip, options)
    }
}

/// The same instruction as 64-bit code would have it.
#[must_use]
pub fn normal(mut i: Instruction, bits: u32) -> Instruction {
    if bits == 64 {
        return i;
    }
    i.set_code(long_form(i.code()));
    let offset = match i.op0_kind() {
        OpKind::NearBranch32 => i64::from(i.near_branch32().cast_signed()).cast_unsigned(),
        // A 16-bit segment has at most 64 KiB here, and EIP is cut to 16 bits: the offset is right modulo 64 KiB.
        OpKind::NearBranch16 if bits == 16 => i64::from(i.near_branch16().cast_signed()).cast_unsigned(),
        _ => return i,
    };
    i.set_op0_kind(OpKind::NearBranch64);
    i.set_near_branch64(offset);
    i
}

/// The encoding of the same operation with the same operands that 64-bit code has.
const fn long_form(code: Code) -> Code {
    match code {
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        Code::Cmp_rm8_imm8_82 => Code::Cmp_rm8_imm8,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(bits: u32, bytes: &[u8], ip: u64) -> Instruction {
        normal(Decoder::with_ip(bits, bytes, ip, DecoderOptions::NONE).decode(), bits)
    }

    #[test]
    fn branches_back_before_the_page_are_negative() {
        // jmp $-20h; jmp near the same; call with a prefix of the other size.
        assert_eq!(decoded(32, &[0xeb, 0xde], 0x10).near_branch_target().cast_signed(), -0x10);
        assert_eq!(decoded(16, &[0xeb, 0xde], 0x10).near_branch_target().cast_signed(), -0x10);
        assert_eq!(
            decoded(16, &[0x66, 0xe8, 0xda, 0xff, 0xff, 0xff], 0x10).near_branch_target().cast_signed(),
            -0x10
        );
        assert!(crate::unit::is_narrow_branch(&decoded(32, &[0x66, 0xe9, 0, 0], 0x10)));
    }

    #[test]
    fn short_forms_become_long_ones() {
        assert_eq!(decoded(32, &[0x43], 0).code(), Code::Inc_rm32);
        assert_eq!(decoded(32, &[0xa1, 0, 0, 0, 0xc0], 0).code(), Code::Mov_r32_rm32);
        assert_eq!(decoded(32, &[0xa1, 0, 0, 0, 0xc0], 0).memory_displacement64(), 0xc000_0000);
    }
}
