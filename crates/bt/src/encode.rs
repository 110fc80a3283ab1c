//! The encodings of the instructions that code is full of. iced-x86 encodes everything, and takes several times as long; it does what is not in the table
//! here. What is encoded here has the bytes that iced-x86 would give it.

#![expect(clippy::cast_possible_truncation, reason = "bytes of numbers")]

use std::sync::LazyLock;

use iced_x86::{Code, Instruction, OpKind, Register};

/// Which operands stand where.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
enum Form {
    /// Not known here.
    #[default]
    Other,
    /// `r/m, reg`
    RmReg,
    /// `reg, r/m`, and perhaps a constant.
    RegRm,
    /// `r/m`, or with a constant or CL; the opcode goes on in place of `reg`.
    Rm,
    /// The register's number is part of the opcode.
    InOpcode,
    /// The accumulator, which the opcode implies, and a constant.
    Accumulator,
}

/// An encoding.
#[derive(Clone, Copy, Default, Debug)]
struct Shape {
    form: Form,
    /// 0, or the prefix that belongs to the opcode, or that of 16-bit operands.
    prefix: u8,
    wide: bool,
    /// Of the opcodes that begin with 0F.
    second_map: bool,
    opcode: u8,
    /// What stands in place of `reg`.
    extension: u8,
    /// Bytes of the constant.
    constant: u8,
}

/// Bytes of an instruction: those up to the SIB byte, and displacement and constant.
#[derive(Clone, Copy, Default, Debug)]
pub struct Encoded {
    /// The first bytes, from the lowest on.
    pub head: u64,
    /// How many.
    pub head_len: usize,
    /// The others.
    pub tail: u64,
    /// How many.
    pub tail_len: usize,
}

static SHAPES: LazyLock<Vec<Shape>> = LazyLock::new(|| {
    let mut shapes = Shapes(vec![Shape::default(); Code::values().len()]);
    shapes.fill();
    shapes.0
});

struct Shapes(Vec<Shape>);

impl Shapes {
    fn one(&mut self, code: usize, shape: Shape) {
        if let Some(place) = self.0.get_mut(code) {
            *place = shape;
        }
    }

    /// The codes for 16, 32 and 64 bits, which follow each other. `constant`: bytes of the 32-bit form's.
    fn three(&mut self, first: usize, shape: Shape) {
        let narrow = shape.constant.min(2);
        self.one(first, Shape { prefix: 0x66, constant: narrow, ..shape });
        self.one(first + 1, shape);
        self.one(first + 2, Shape { wide: true, ..shape });
    }

    /// The codes for 8, 16, 32 and 64 bits, which follow each other.
    fn four(&mut self, first: Code, shape: Shape) {
        self.one(first as usize, Shape { constant: shape.constant.min(1), ..shape });
        self.three(first as usize + 1, Shape { opcode: shape.opcode + 1, ..shape });
    }

    fn fill(&mut self) {
        self.fill_arithmetic();
        self.fill_moves();
        self.fill_shifts();
        self.fill_second_map();
        self.fill_vectors();
    }

    fn fill_arithmetic(&mut self) {
        let shape = |form, opcode| Shape { form, opcode, ..Shape::default() };
        let first = [
            Code::Add_rm8_r8,
            Code::Or_rm8_r8,
            Code::Adc_rm8_r8,
            Code::Sbb_rm8_r8,
            Code::And_rm8_r8,
            Code::Sub_rm8_r8,
            Code::Xor_rm8_r8,
            Code::Cmp_rm8_r8,
        ];
        for (n, code) in (0u8..).zip(first) {
            let at = |more: usize| Code::try_from(code as usize + more).unwrap_or_default();
            self.four(at(0), shape(Form::RmReg, n << 3));
            self.four(at(4), shape(Form::RegRm, n << 3 | 2));
            self.four(at(8), Shape { constant: 4, ..shape(Form::Accumulator, n << 3 | 4) });
            let group = Shape { extension: n, ..shape(Form::Rm, 0x81) };
            let more = usize::from(n);
            let byte = Shape { opcode: 0x80, constant: 1, ..group };
            self.one(Code::Add_rm8_imm8 as usize + more, byte);
            self.three(Code::Add_rm16_imm16 as usize + 3 * more, Shape { constant: 4, ..group });
            self.three(Code::Add_rm16_imm8 as usize + 3 * more, Shape { opcode: 0x83, constant: 1, ..group });
        }
        self.four(Code::Test_rm8_r8, shape(Form::RmReg, 0x84));
        self.four(Code::Test_AL_imm8, Shape { constant: 4, ..shape(Form::Accumulator, 0xa8) });
        self.one(Code::Test_rm8_imm8 as usize, Shape { constant: 1, ..shape(Form::Rm, 0xf6) });
        self.three(Code::Test_rm16_imm16 as usize, Shape { constant: 4, ..shape(Form::Rm, 0xf7) });
        let unary = [
            (Code::Not_rm8, Code::Not_rm16, 0xf6, 2),
            (Code::Neg_rm8, Code::Neg_rm16, 0xf6, 3),
            (Code::Inc_rm8, Code::Inc_rm16, 0xfe, 0),
            (Code::Dec_rm8, Code::Dec_rm16, 0xfe, 1),
        ];
        for (byte, other, opcode, extension) in unary {
            self.one(byte as usize, Shape { extension, ..shape(Form::Rm, opcode) });
            self.three(other as usize, Shape { extension, ..shape(Form::Rm, opcode + 1) });
        }
        self.three(Code::Imul_r16_rm16_imm16 as usize, Shape { constant: 4, ..shape(Form::RegRm, 0x69) });
        self.three(Code::Imul_r16_rm16_imm8 as usize, Shape { constant: 1, ..shape(Form::RegRm, 0x6b) });
    }

    fn fill_moves(&mut self) {
        let shape = |form, opcode| Shape { form, opcode, ..Shape::default() };
        self.four(Code::Mov_rm8_r8, shape(Form::RmReg, 0x88));
        self.four(Code::Mov_r8_rm8, shape(Form::RegRm, 0x8a));
        self.one(Code::Mov_r32_imm32 as usize, Shape { constant: 4, ..shape(Form::InOpcode, 0xb8) });
        self.one(Code::Mov_rm8_imm8 as usize, Shape { constant: 1, ..shape(Form::Rm, 0xc6) });
        self.three(Code::Mov_rm16_imm16 as usize, Shape { constant: 4, ..shape(Form::Rm, 0xc7) });
        let wide = Shape { wide: true, ..shape(Form::RegRm, 0x63) };
        self.one(Code::Movsxd_r64_rm32 as usize, wide);
    }

    fn fill_shifts(&mut self) {
        let kinds = [
            (Code::Rol_rm8_imm8, Code::Rol_rm16_imm8, 0xc0, 1),
            (Code::Rol_rm8_1, Code::Rol_rm16_1, 0xd0, 0),
            (Code::Rol_rm8_CL, Code::Rol_rm16_CL, 0xd2, 0),
        ];
        for (byte, other, opcode, constant) in kinds {
            for n in 0..8 {
                let shape = Shape { form: Form::Rm, opcode, extension: n, constant, ..Shape::default() };
                self.one(byte as usize + usize::from(n), shape);
                self.three(other as usize + 3 * usize::from(n), Shape { opcode: opcode + 1, ..shape });
            }
        }
    }

    fn fill_second_map(&mut self) {
        let shape = |form, opcode| Shape { form, opcode, second_map: true, ..Shape::default() };
        for n in 0..16 {
            let more = usize::from(n);
            self.three(Code::Cmovo_r16_rm16 as usize + 3 * more, shape(Form::RegRm, 0x40 + n));
            self.one(Code::Seto_rm8 as usize + more, shape(Form::Rm, 0x90 + n));
        }
        self.three(Code::Imul_r16_rm16 as usize, shape(Form::RegRm, 0xaf));
        self.three(Code::Movzx_r16_rm8 as usize, shape(Form::RegRm, 0xb6));
        self.three(Code::Movzx_r16_rm16 as usize, shape(Form::RegRm, 0xb7));
        self.three(Code::Movsx_r16_rm8 as usize, shape(Form::RegRm, 0xbe));
        self.three(Code::Movsx_r16_rm16 as usize, shape(Form::RegRm, 0xbf));
        let bits = Shape { constant: 1, extension: 4, ..shape(Form::Rm, 0xba) };
        self.three(Code::Bt_rm16_imm8 as usize, bits);
    }

    fn fill_vectors(&mut self) {
        let loads = [
            (Code::Movups_xmm_xmmm128, 0, 0x10),
            (Code::Movss_xmm_xmmm32, 0xf3, 0x10),
            (Code::Movsd_xmm_xmmm64, 0xf2, 0x10),
            (Code::Movaps_xmm_xmmm128, 0, 0x28),
            (Code::Movapd_xmm_xmmm128, 0x66, 0x28),
            (Code::Movdqa_xmm_xmmm128, 0x66, 0x6f),
            (Code::Movdqu_xmm_xmmm128, 0xf3, 0x6f),
            (Code::Movd_xmm_rm32, 0x66, 0x6e),
            (Code::Movq_xmm_xmmm64, 0xf3, 0x7e),
            (Code::Pxor_xmm_xmmm128, 0x66, 0xef),
            (Code::Xorps_xmm_xmmm128, 0, 0x57),
            (Code::Addsd_xmm_xmmm64, 0xf2, 0x58),
            (Code::Mulsd_xmm_xmmm64, 0xf2, 0x59),
            (Code::Subsd_xmm_xmmm64, 0xf2, 0x5c),
            (Code::Divsd_xmm_xmmm64, 0xf2, 0x5e),
            (Code::Ucomisd_xmm_xmmm64, 0x66, 0x2e),
            (Code::Punpcklqdq_xmm_xmmm128, 0x66, 0x6c),
        ];
        let stores = [
            (Code::Movups_xmmm128_xmm, 0, 0x11),
            (Code::Movss_xmmm32_xmm, 0xf3, 0x11),
            (Code::Movsd_xmmm64_xmm, 0xf2, 0x11),
            (Code::Movaps_xmmm128_xmm, 0, 0x29),
            (Code::Movdqa_xmmm128_xmm, 0x66, 0x7f),
            (Code::Movdqu_xmmm128_xmm, 0xf3, 0x7f),
            (Code::Movd_rm32_xmm, 0x66, 0x7e),
            (Code::Movq_xmmm64_xmm, 0x66, 0xd6),
            (Code::Movhps_m64_xmm, 0, 0x17),
        ];
        let shape =
            |form, prefix, opcode| Shape { form, prefix, opcode, second_map: true, ..Shape::default() };
        for (code, prefix, opcode) in loads {
            self.one(code as usize, shape(Form::RegRm, prefix, opcode));
        }
        for (code, prefix, opcode) in stores {
            self.one(code as usize, shape(Form::RmReg, prefix, opcode));
        }
        for (code, form, opcode) in
            [(Code::Movq_xmm_rm64, Form::RegRm, 0x6e), (Code::Movq_rm64_xmm, Form::RmReg, 0x7e)]
        {
            self.one(code as usize, Shape { wide: true, ..shape(form, 0x66, opcode) });
        }
    }
}

/// A register operand: its number, and whether it must have a REX prefix. None if it cannot have one.
fn register(r: Register) -> Option<(u8, u8)> {
    let rex = match r {
        Register::AH | Register::CH | Register::DH | Register::BH => return None,
        Register::SPL | Register::BPL | Register::SIL | Register::DIL => 0x40,
        _ => 0,
    };
    // Of a byte register, the number is not that of the encoding.
    let number = r.number() as u8;
    Some((if r.is_gpr8() && number >= 4 { number - 4 } else { number }, rex))
}

impl Encoded {
    /// The bytes of an instruction in 64-bit code. None: it is not known here.
    #[must_use]
    pub fn of(i: &Instruction) -> Option<Self> {
        let shape = SHAPES[i.code() as usize];
        let prefixes = i.has_lock_prefix() || i.has_rep_prefix() || i.has_repne_prefix();
        if shape.form == Form::Other || prefixes || i.segment_prefix() != Register::None {
            return None;
        }
        let (rm_kind, rm, reg) = match shape.form {
            Form::RmReg => (i.op0_kind(), i.op0_register(), register(i.op1_register())?),
            Form::RegRm => (i.op1_kind(), i.op1_register(), register(i.op0_register())?),
            _ => (i.op0_kind(), i.op0_register(), (shape.extension, 0)),
        };
        let mut e = Self::default();
        let rex = reg.1 | u8::from(shape.wide) << 3 | (reg.0 >> 3) << 2;
        match (shape.form, rm_kind) {
            (Form::Accumulator, _) => e.begin(shape, rex, shape.opcode),
            (_, OpKind::Memory) => e.with_memory(i, shape, rex, reg.0 & 7)?,
            _ => {
                let (number, more) = register(rm)?;
                let rex = rex | more | number >> 3;
                if shape.form == Form::InOpcode {
                    e.begin(shape, rex, shape.opcode | number & 7);
                } else {
                    e.begin(shape, rex, shape.opcode);
                    e.push(0xc0 | (reg.0 & 7) << 3 | number & 7);
                }
            }
        }
        if shape.constant != 0 {
            let constant = u64::from(i.immediate32()) & ((1 << (8 * shape.constant)) - 1);
            e.tail |= constant << (8 * e.tail_len);
            e.tail_len += usize::from(shape.constant);
        }
        Some(e)
    }

    const fn push(&mut self, byte: u8) {
        self.head |= (byte as u64) << (8 * self.head_len);
        self.head_len += 1;
    }

    /// Prefixes and opcode.
    const fn begin(&mut self, shape: Shape, rex: u8, opcode: u8) {
        if shape.prefix != 0 {
            self.push(shape.prefix);
        }
        if rex != 0 {
            self.push(0x40 | rex);
        }
        if shape.second_map {
            self.push(0x0f);
        }
        self.push(opcode);
    }

    /// With a memory operand off a 64-bit register.
    fn with_memory(&mut self, i: &Instruction, shape: Shape, rex: u8, reg: u8) -> Option<()> {
        let (base, index) = (i.memory_base(), i.memory_index());
        if !base.is_gpr64() || i.memory_index_scale() != 1 {
            return None;
        }
        let base = base.number() as u8;
        let disp = i.memory_displacement64().cast_signed();
        let mode = match (i.memory_displ_size(), i8::try_from(disp)) {
            (0, Ok(0)) if base & 7 != 5 => 0,
            (1, Ok(_)) => 0x40,
            (8, _) if i32::try_from(disp).is_ok() => 0x80,
            _ => return None,
        };
        let rex = rex | base >> 3;
        if index == Register::None {
            self.begin(shape, rex, shape.opcode);
            self.push(mode | reg << 3 | base & 7);
            if base & 7 == 4 {
                self.push(0x24);
            }
        } else {
            let index =
                if index.is_gpr64() && index != Register::RSP { index.number() as u8 } else { return None };
            self.begin(shape, rex | (index >> 3) << 1, shape.opcode);
            self.push(mode | reg << 3 | 4);
            self.push((index & 7) << 3 | base & 7);
        }
        match mode {
            0 => {}
            0x40 => (self.tail, self.tail_len) = (u64::from(disp as u8), 1),
            _ => (self.tail, self.tail_len) = (u64::from(disp as u32), 4),
        }
        Some(())
    }

    /// All bytes.
    #[cfg(test)]
    fn bytes(&self) -> Vec<u8> {
        let (head, tail) = (self.head.to_le_bytes(), self.tail.to_le_bytes());
        [&head[..self.head_len], &tail[..self.tail_len]].concat()
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Encoder};

    use super::*;

    /// With another register of its kind in place of each, as translations have them.
    fn renamed(i: &Instruction, by: u32) -> Instruction {
        let mut renamed = *i;
        for n in (0..i.op_count()).filter(|&n| i.op_kind(n) == OpKind::Register) {
            let r = i.op_register(n);
            if r.is_gpr64() || r.is_gpr32() || r.is_gpr16() {
                let first = if r.is_gpr64() {
                    Register::RAX
                } else if r.is_gpr32() {
                    Register::EAX
                } else {
                    Register::AX
                };
                renamed.set_op_register(n, first + (r.number() as u32 + by) % 16);
            }
        }
        renamed
    }

    /// With host operands of all kinds in place of a memory operand.
    fn operands(i: &Instruction) -> Vec<Instruction> {
        if (0..i.op_count()).all(|n| i.op_kind(n) != OpKind::Memory) {
            return vec![*i];
        }
        let mut all = Vec::new();
        for base in 0..16u32 {
            for index in [None, Some(15u32), Some(0)] {
                for (disp, size) in [(0i64, 0), (0, 1), (-128, 1), (127, 1), (128, 8), (-0x1234_5678, 8)] {
                    let mut with = *i;
                    with.set_segment_prefix(Register::None);
                    with.set_memory_base(Register::RAX + base);
                    with.set_memory_index(index.map_or(Register::None, |x| Register::RAX + x));
                    with.set_memory_index_scale(1);
                    with.set_memory_displacement64(disp.cast_unsigned());
                    with.set_memory_displ_size(size);
                    all.push(with);
                }
            }
        }
        all
    }

    #[test]
    fn what_is_encoded_has_the_bytes_that_iced_gives_it() {
        let mut encoder = Encoder::new(64);
        let mut seen = std::collections::HashSet::new();
        let mut seed = 0x1234_5678_9abc_def1_u64;
        for round in 0..120_000 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let mut bytes = [0; 24];
            bytes[8..16].copy_from_slice(&seed.to_le_bytes());
            bytes[16..].copy_from_slice(&seed.rotate_left(23).to_le_bytes());
            // Of each opcode, with each prefix.
            let prefixes: [&[u8]; 8] =
                [&[], &[0x66], &[0x48], &[0x45], &[0xf2], &[0xf3], &[0x66, 0x4c], &[0x40]];
            let prefix = prefixes[round / 256 % 8];
            let second: &[u8] = if round / 2048 % 2 == 1 { &[0x0f] } else { &[] };
            let opcode = [(round % 256) as u8];
            let start = 8 - prefix.len() - second.len() - 1;
            bytes[start..8].copy_from_slice(&[prefix, second, &opcode].concat());
            let i = Decoder::new(64, &bytes[start..], DecoderOptions::NONE).decode();
            if i.is_invalid() || Encoded::of(&operands(&i)[0]).is_none() {
                continue;
            }
            seen.insert(i.code());
            for with in operands(&i).into_iter().chain((1..16).map(|by| operands(&renamed(&i, by))[0])) {
                let Some(e) = Encoded::of(&with) else { continue };
                // Another register than the one that the opcode implies: nobody asks for that.
                if encoder.encode(&with, 0).is_err() {
                    let _part = encoder.take_buffer();
                    continue;
                }
                assert_eq!(e.bytes(), encoder.take_buffer(), "{with} ({:?})", with.code());
            }
        }
        let unseen: Vec<_> = Code::values()
            .filter(|&c| SHAPES[c as usize].form != Form::Other && !seen.contains(&c))
            .collect();
        assert_eq!(unseen, [], "each code that is known was seen");
    }
}
