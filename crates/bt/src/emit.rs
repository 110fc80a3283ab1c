//! A small assembler for what translated code needs around the guest's own instructions.
//!
//! Registers are numbers 0 to 15. `gs(disp)` operands address the frame.

#![expect(clippy::cast_possible_truncation, reason = "displacements within a fragment")]

use iced_x86::{Encoder, Instruction};

use crate::encode::Encoded;

/// Host scratch register.
pub const S0: u8 = 14;
/// Host scratch register.
pub const S1: u8 = 15;
/// Host register of guest RSP.
pub const SP: u8 = 13;
/// The host's own stack pointer.
pub const HOST_SP: u8 = 4;
/// RAX, RCX, RDX, RSI, RDI, as the string and system instructions name them.
pub const RAX: u8 = 0;
/// See [`RAX`].
pub const RCX: u8 = 1;
/// See [`RAX`].
pub const RDX: u8 = 2;
/// See [`RAX`].
pub const RSI: u8 = 6;
/// See [`RAX`].
pub const RDI: u8 = 7;
/// See [`RAX`].
pub const R11: u8 = 11;

/// Condition codes, as in Jcc.
pub mod cc {
    /// Below.
    pub const B: u8 = 2;
    /// Above or equal.
    pub const AE: u8 = 3;
    /// Equal.
    pub const E: u8 = 4;
    /// Not equal.
    pub const NE: u8 = 5;
    /// Below or equal.
    pub const BE: u8 = 6;
    /// Above.
    pub const A: u8 = 7;
}

/// Two-operand operations by their opcode `reg, r/m`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "named as the instructions")]
pub enum Op {
    Add = 0x03,
    Or = 0x0b,
    And = 0x23,
    Sub = 0x2b,
    Xor = 0x33,
    Cmp = 0x3b,
    Test = 0x85,
    Mov = 0x8b,
}

/// Machine code under construction.
pub struct Asm {
    /// The bytes so far.
    pub code: Vec<u8>,
    encoder: Box<Encoder>,
    /// The host has BMI2.
    bmi2: bool,
}

/// A 32-bit displacement to fill in when its target is known.
#[derive(Clone, Copy, Debug)]
pub struct Fixup(usize);

const fn low3(r: u8) -> u8 {
    r & 7
}

/// The first bytes of an instruction: prefixes to SIB byte, or the byte behind.
#[derive(Clone, Copy, Default)]
struct Head {
    bytes: u64,
    len: usize,
}

impl Head {
    const fn of(byte: u8) -> Self {
        Self { bytes: byte as u64, len: 1 }
    }

    /// With a REX prefix, needed or not.
    fn with_rex(rex: u8, opcode: u8) -> Self {
        let mut head = Self::of(rex);
        head.push(opcode);
        head
    }

    const fn push(&mut self, byte: u8) {
        self.bytes |= (byte as u64) << (8 * self.len);
        self.len += 1;
    }

    #[inline(always)]
    fn opcode(&mut self, rex: u8, opcode: &[u8]) {
        if rex != 0x40 {
            self.push(rex);
        }
        opcode.iter().for_each(|&byte| self.push(byte));
    }
}

impl Asm {
    /// Code into `code`, which is empty, for a host with or without BMI2.
    #[must_use]
    pub fn within(mut code: Vec<u8>, encoder: Option<Box<Encoder>>, bmi2: bool) -> Self {
        code.reserve(1024);
        let encoder = encoder.unwrap_or_else(|| Box::new(Encoder::new(64)));
        Self { code, encoder, bmi2 }
    }

    /// What [`Asm::within`] took.
    #[must_use]
    pub fn into_parts(self) -> (Vec<u8>, Box<Encoder>) {
        (self.code, self.encoder)
    }

    /// Offset of the next byte.
    #[must_use]
    pub fn here(&self) -> usize {
        self.code.len()
    }

    /// Appends bytes.
    pub fn bytes(&mut self, b: &[u8]) {
        self.code.extend_from_slice(b);
    }

    /// Appends the lowest `len` bytes of `bytes`, eight at most. A copy of a known length costs less than one of few bytes.
    fn short(&mut self, bytes: u64, len: usize) {
        let end = self.code.len() + len;
        self.code.extend_from_slice(&bytes.to_le_bytes());
        self.code.truncate(end);
    }

    /// NOPs up to an offset that is at most five bytes away (SDM 2B NOP, recommended sequences).
    pub fn pad_to(&mut self, offset: usize) {
        const NOPS: [&[u8]; 6] = [
            &[],
            &[0x90],
            &[0x66, 0x90],
            &[0x0f, 0x1f, 0],
            &[0x0f, 0x1f, 0x40, 0],
            &[0x0f, 0x1f, 0x44, 0, 0],
        ];
        let missing = offset.saturating_sub(self.here());
        self.bytes(NOPS[missing.min(5)]);
    }

    fn imm32(&mut self, v: i32) {
        self.bytes(&v.to_le_bytes());
    }

    /// Appends an instruction; false (and nothing appended) if it has no encoding.
    pub fn instruction(&mut self, i: &Instruction) -> bool {
        if let Some(e) = Encoded::of(i) {
            self.short(e.head, e.head_len);
            self.short(e.tail, e.tail_len);
            return true;
        }
        let mark = self.code.len();
        self.encoder.set_buffer(std::mem::take(&mut self.code));
        let ok = self.encoder.encode(i, 0).is_ok();
        self.code = self.encoder.take_buffer();
        if !ok {
            self.code.truncate(mark);
        }
        ok
    }

    const fn rex(w: bool, reg: u8, index: u8, base: u8) -> u8 {
        0x40 | (w as u8) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3
    }

    fn opcode(&mut self, rex: u8, opcode: &[u8]) {
        let mut head = Head::default();
        head.opcode(rex, opcode);
        self.short(head.bytes, head.len);
    }

    /// `opcode reg, gs:[disp]` (or the reverse, as the opcode says), 64 bits if `wide`.
    fn gs_op(&mut self, wide: bool, opcode: &[u8], reg: u8, disp: i32) {
        let mut head = Head::of(0x65);
        head.opcode(Self::rex(wide, reg, 0, 0), opcode);
        // ModRM with SIB and no base: an absolute 32-bit displacement.
        head.push(low3(reg) << 3 | 4);
        head.push(0x25);
        self.with_disp32(head, disp);
    }

    /// `opcode reg, gs:[index * 2^scale + disp]`; without scale the index is a base.
    fn gs_index_op(&mut self, wide: bool, opcode: u8, reg: u8, (index, scale): (u8, u8), disp: i32) {
        let mut head = Head::of(0x65);
        if scale == 0 {
            debug_assert!(low3(index) != 4, "would need a SIB byte");
            head.opcode(Self::rex(wide, reg, 0, index), &[opcode]);
            head.push(0x80 | low3(reg) << 3 | low3(index));
        } else {
            head.opcode(Self::rex(wide, reg, index, 0), &[opcode]);
            head.push(low3(reg) << 3 | 4);
            head.push(scale << 6 | low3(index) << 3 | 5);
        }
        self.with_disp32(head, disp);
    }

    /// Appends first bytes and a displacement.
    fn with_disp32(&mut self, head: Head, disp: i32) {
        let end = self.code.len() + head.len + 4;
        let all = u128::from(head.bytes) | u128::from(disp as u32) << (8 * head.len);
        self.code.extend_from_slice(&all.to_le_bytes());
        self.code.truncate(end);
    }

    /// `op reg, gs:[disp]`, 64 bits.
    pub fn gs(&mut self, op: Op, reg: u8, disp: i32) {
        self.gs_op(true, &[op as u8], reg, disp);
    }
    /// `op reg32, gs:[disp]`.
    pub fn gs32(&mut self, op: Op, reg: u8, disp: i32) {
        self.gs_op(false, &[op as u8], reg, disp);
    }
    /// `mov reg, gs:[disp]`
    pub fn load(&mut self, reg: u8, disp: i32) {
        self.gs(Op::Mov, reg, disp);
    }
    /// `mov reg32, gs:[disp]`
    pub fn load32(&mut self, reg: u8, disp: i32) {
        self.gs32(Op::Mov, reg, disp);
    }
    /// `movzx reg32, word gs:[disp]`
    pub fn load16(&mut self, reg: u8, disp: i32) {
        self.gs_op(false, &[0x0f, 0xb7], reg, disp);
    }
    /// `mov gs:[disp], reg`
    pub fn store(&mut self, disp: i32, reg: u8) {
        self.gs_op(true, &[0x89], reg, disp);
    }
    /// `mov gs:[disp], reg32`
    pub fn store32(&mut self, disp: i32, reg: u8) {
        self.gs_op(false, &[0x89], reg, disp);
    }
    /// `mov gs:[disp], reg16`
    pub fn store16(&mut self, disp: i32, reg: u8) {
        self.code.push(0x66);
        self.store32(disp, reg);
    }
    /// `mov dword gs:[disp], imm`
    pub fn store_imm32(&mut self, disp: i32, value: u32) {
        self.gs_op(false, &[0xc7], 0, disp);
        self.bytes(&value.to_le_bytes());
    }
    /// `and gs:[disp], reg`
    pub fn and_to(&mut self, disp: i32, reg: u8) {
        self.gs_op(true, &[0x21], reg, disp);
    }
    /// `and word gs:[disp], reg16`
    pub fn and_to16(&mut self, disp: i32, reg: u8) {
        self.code.push(0x66);
        self.gs_op(false, &[0x21], reg, disp);
    }
    /// `or dword gs:[disp], imm` or, with `and`, `and dword gs:[disp], imm`.
    pub fn change_bits32(&mut self, and: bool, disp: i32, imm: u32) {
        self.gs_op(false, &[0x81], if and { 4 } else { 1 }, disp);
        self.bytes(&imm.to_le_bytes());
    }
    /// `test dword gs:[disp], imm`
    pub fn test_bits32(&mut self, disp: i32, imm: u32) {
        self.gs_op(false, &[0xf7], 0, disp);
        self.bytes(&imm.to_le_bytes());
    }
    /// `mov reg, gs:[index + disp]`
    pub fn load_index(&mut self, reg: u8, index: u8, disp: i32) {
        self.gs_index_op(true, 0x8b, reg, (index, 0), disp);
    }
    /// `xor reg, gs:[index + disp]`
    pub fn xor_index(&mut self, reg: u8, index: u8, disp: i32) {
        self.gs_index_op(true, 0x33, reg, (index, 0), disp);
    }
    /// `cmp gs:[index * 8 + disp], reg`
    pub fn cmp_index8(&mut self, index: u8, disp: i32, reg: u8) {
        self.gs_index_op(true, 0x39, reg, (index, 3), disp);
    }
    /// `jmp gs:[index * 8 + disp]`
    pub fn jmp_index8(&mut self, index: u8, disp: i32) {
        self.gs_index_op(false, 0xff, 4, (index, 3), disp);
    }
    /// `cmp dword gs:[disp], imm8`
    pub fn cmp_gs32_imm8(&mut self, disp: i32, imm: u8) {
        self.gs_op(false, &[0x83], 7, disp);
        self.code.push(imm);
    }
    /// `sub dword gs:[disp], 1`
    pub fn count_down(&mut self, disp: i32) {
        self.gs_op(false, &[0x83], 5, disp);
        self.code.push(1);
    }
    /// `movsxd reg, dword gs:[disp]`
    pub fn load_signed32(&mut self, reg: u8, disp: i32) {
        self.gs_op(true, &[0x63], reg, disp);
    }
    /// `cmp gs:[disp], imm` in `size` bytes (1, 2, 4).
    pub fn cmp_gs(&mut self, size: usize, disp: i32, imm: u32) {
        if size == 2 {
            self.code.push(0x66);
        }
        self.gs_op(false, &[if size == 1 { 0x80 } else { 0x81 }], 7, disp);
        self.bytes(&imm.to_le_bytes()[..size]);
    }
    /// `cmp [base + disp], imm` in `size` bytes (1, 2, 4).
    pub fn cmp_at(&mut self, size: usize, base: u8, disp: i32, imm: u32) {
        if size == 2 {
            self.code.push(0x66);
        }
        self.memory_op(false, &[if size == 1 { 0x80 } else { 0x81 }], 7, base, None, disp);
        self.bytes(&imm.to_le_bytes()[..size]);
    }
    /// `jmp gs:[disp]`
    pub fn jmp_gs(&mut self, disp: i32) {
        self.gs_op(false, &[0xff], 4, disp);
    }
    /// `call gs:[index * 8 + disp]`
    pub fn call_index8(&mut self, index: u8, disp: i32) {
        self.gs_index_op(false, 0xff, 2, (index, 3), disp);
    }
    /// `push reg`
    pub fn push(&mut self, reg: u8) {
        self.opcode(Self::rex(false, 0, 0, reg), &[0x50 | low3(reg)]);
    }
    /// `push imm`, sign-extended to 64 bits.
    pub fn push_imm(&mut self, imm: i32) {
        self.bytes(&[0x68]);
        self.imm32(imm);
    }
    /// `cmp [rsp + 8], reg`
    pub fn cmp_below_top(&mut self, reg: u8) {
        self.memory_op(true, &[0x39], reg, HOST_SP, Some((HOST_SP, 0)), 8);
    }
    /// `lea rsp, [rsp + 8]`
    pub fn drop_top(&mut self) {
        self.memory_op(true, &[0x8d], HOST_SP, HOST_SP, Some((HOST_SP, 0)), 8);
    }
    /// `ret`
    pub fn ret(&mut self) {
        self.bytes(&[0xc3]);
    }
    /// `call rel32`, to be linked as a jump.
    pub fn call(&mut self) -> Fixup {
        self.bytes(&[0xe8]);
        self.imm32(0);
        Fixup(self.here() - 4)
    }
    /// `call gs:[disp]`
    pub fn call_gs(&mut self, disp: i32) {
        self.gs_op(false, &[0xff], 2, disp);
    }
    /// `opcode gs:[disp]` with an opcode extension: for x87 and MXCSR control words.
    pub fn control_gs(&mut self, opcode: &[u8], extension: u8, disp: i32) {
        self.gs_op(false, opcode, extension, disp);
    }
    /// `op to, from`, 64 bits.
    pub fn op(&mut self, op: Op, to: u8, from: u8) {
        self.opcode(Self::rex(true, to, 0, from), &[op as u8, 0xc0 | low3(to) << 3 | low3(from)]);
    }
    /// `op to32, from32`
    pub fn op32(&mut self, op: Op, to: u8, from: u8) {
        self.opcode(Self::rex(false, to, 0, from), &[op as u8, 0xc0 | low3(to) << 3 | low3(from)]);
    }
    /// `op to8, from8`, where neither needs an old high-byte register.
    pub fn cmp8(&mut self, to: u8, from: u8) {
        self.bytes(&[Self::rex(false, to, 0, from), 0x3a, 0xc0 | low3(to) << 3 | low3(from)]);
    }
    /// `mov to, from`
    pub fn mov(&mut self, to: u8, from: u8) {
        self.op(Op::Mov, to, from);
    }
    /// `mov reg, imm` in the shortest form.
    pub fn mov_imm(&mut self, reg: u8, value: u64) {
        if let Ok(v) = u32::try_from(value) {
            self.opcode(Self::rex(false, 0, 0, reg), &[0xb8 | low3(reg)]);
            self.bytes(&v.to_le_bytes());
        } else if let Ok(v) = i32::try_from(value as i64) {
            self.opcode(Self::rex(true, 0, 0, reg), &[0xc7, 0xc0 | low3(reg)]);
            self.imm32(v);
        } else {
            self.opcode(Self::rex(true, 0, 0, reg), &[0xb8 | low3(reg)]);
            self.bytes(&value.to_le_bytes());
        }
    }
    /// ModRM, SIB and displacement of `[base + index * 2^scale + disp]`, behind the first bytes.
    fn memory(&mut self, mut head: Head, reg: u8, base: u8, index: Option<(u8, u8)>, disp: i32) {
        let short = i8::try_from(disp).is_ok();
        let none = disp == 0 && low3(base) != 5;
        let mode = match (none, short) {
            (true, _) => 0,
            (_, true) => 0x40,
            _ => 0x80,
        };
        match index {
            None if low3(base) != 4 => head.push(mode | low3(reg) << 3 | low3(base)),
            None => {
                head.push(mode | low3(reg) << 3 | 4);
                head.push(0x24);
            }
            Some((i, scale)) => {
                head.push(mode | low3(reg) << 3 | 4);
                head.push(scale << 6 | low3(i) << 3 | low3(base));
            }
        }
        if mode == 0x40 {
            head.push(disp as u8);
        }
        if mode == 0x80 {
            self.with_disp32(head, disp);
        } else {
            self.short(head.bytes, head.len);
        }
    }
    fn memory_op(
        &mut self,
        wide: bool,
        opcode: &[u8],
        reg: u8,
        base: u8,
        index: Option<(u8, u8)>,
        disp: i32,
    ) {
        let mut head = Head::default();
        head.opcode(Self::rex(wide, reg, index.map_or(0, |(i, _)| i), base), opcode);
        self.memory(head, reg, base, index, disp);
    }
    /// `lea to, [base + index * 2^scale + disp]`; `index` None for none.
    pub fn lea(&mut self, to: u8, base: u8, index: Option<(u8, u8)>, disp: i32) {
        if index.is_none() && disp == 0 {
            return self.mov(to, base);
        }
        self.memory_op(true, &[0x8d], to, base, index, disp);
    }
    /// `lea to32, [base + index * 2^scale + disp]`
    pub fn lea32(&mut self, to: u8, base: u8, index: Option<(u8, u8)>, disp: i32) {
        self.memory_op(false, &[0x8d], to, base, index, disp);
    }
    /// `lea to, [index * 2^scale + disp]`
    pub fn lea_scaled(&mut self, to: u8, index: u8, scale: u8, disp: i32) {
        self.opcode(Self::rex(true, to, index, 0), &[0x8d, low3(to) << 3 | 4]);
        self.code.push(scale << 6 | low3(index) << 3 | 5);
        self.imm32(disp);
    }
    /// `mov reg, [base + index]`, 64 bits.
    pub fn load_sum(&mut self, reg: u8, base: u8, index: u8) {
        self.memory_op(true, &[0x8b], reg, base, Some((index, 0)), 0);
    }
    /// `mov [base + disp], reg`, 64 bits.
    pub fn store_at(&mut self, base: u8, disp: i32, reg: u8) {
        self.memory_op(true, &[0x89], reg, base, None, disp);
    }
    /// `mov reg, [base + index]` in `size` bytes (1, 2, 4, 8), zero-extended.
    pub fn load_sized(&mut self, size: usize, reg: u8, base: u8, index: u8) {
        let at = Some((index, 0));
        match size {
            1 => self.memory_op(false, &[0x0f, 0xb6], reg, base, at, 0),
            2 => self.memory_op(false, &[0x0f, 0xb7], reg, base, at, 0),
            4 => self.memory_op(false, &[0x8b], reg, base, at, 0),
            _ => self.memory_op(true, &[0x8b], reg, base, at, 0),
        }
    }
    /// `mov [base + index], reg` in `size` bytes.
    pub fn store_sized(&mut self, size: usize, base: u8, index: u8, reg: u8) {
        let at = Some((index, 0));
        match size {
            1 => {
                // A REX prefix always, so that numbers 4 to 7 are SPL to DIL.
                let head = Head::with_rex(Self::rex(false, reg, index, base), 0x88);
                self.memory(head, reg, base, at, 0);
            }
            2 => {
                self.code.push(0x66);
                self.memory_op(false, &[0x89], reg, base, at, 0);
            }
            4 => self.memory_op(false, &[0x89], reg, base, at, 0),
            _ => self.memory_op(true, &[0x89], reg, base, at, 0),
        }
    }
    /// `cmp reg, [base + index]` in `size` bytes; a byte is the register's lowest.
    pub fn cmp_sized(&mut self, size: usize, reg: u8, base: u8, index: u8) {
        let at = Some((index, 0));
        match size {
            1 => {
                // A REX prefix always, so that numbers 4 to 7 are SPL to DIL.
                let head = Head::with_rex(Self::rex(false, reg, index, base), 0x3a);
                self.memory(head, reg, base, at, 0);
            }
            2 => {
                self.code.push(0x66);
                self.memory_op(false, &[0x3b], reg, base, at, 0);
            }
            4 => self.memory_op(false, &[0x3b], reg, base, at, 0),
            _ => self.memory_op(true, &[0x3b], reg, base, at, 0),
        }
    }
    /// `cmp to, from` in `size` bytes; a byte is the lowest of a register that needs no old high-byte register.
    pub fn cmp_registers(&mut self, size: usize, to: u8, from: u8) {
        match size {
            1 => self.cmp8(to, from),
            2 => {
                self.code.push(0x66);
                self.op32(Op::Cmp, to, from);
            }
            4 => self.op32(Op::Cmp, to, from),
            _ => self.op(Op::Cmp, to, from),
        }
    }
    /// `mov [operand], reg` of 2, 4 or 8 bytes.
    pub fn store_to(&mut self, size: usize, (base, index, disp): (u8, Option<u8>, i32), reg: u8) {
        if size == 2 {
            self.code.push(0x66);
        }
        self.memory_op(size == 8, &[0x89], reg, base, index.map(|x| (x, 0)), disp);
    }
    /// `mov reg, [operand]` of 2 (the rest of the register stays), 4 or 8 bytes.
    pub fn load_from(&mut self, size: usize, reg: u8, (base, index, disp): (u8, Option<u8>, i32)) {
        if size == 2 {
            self.code.push(0x66);
        }
        self.memory_op(size == 8, &[0x8b], reg, base, index.map(|x| (x, 0)), disp);
    }
    /// `mov [operand], imm` of 2, 4 or 8 bytes (then 32 bits, sign-extended).
    pub fn store_imm_to(&mut self, size: usize, (base, index, disp): (u8, Option<u8>, i32), imm: i32) {
        if size == 2 {
            self.code.push(0x66);
        }
        self.memory_op(size == 8, &[0xc7], 0, base, index.map(|x| (x, 0)), disp);
        self.bytes(&imm.to_le_bytes()[..size.min(4)]);
    }
    /// `lea to16, [base + disp]`: the rest of the register stays.
    pub fn lea16(&mut self, to: u8, base: u8, disp: i32) {
        self.code.push(0x66);
        self.lea32(to, base, None, disp);
    }
    /// `lea to32, [index * 2^scale + disp]`
    pub fn lea32_scaled(&mut self, to: u8, index: u8, scale: u8, disp: i32) {
        self.opcode(Self::rex(false, to, index, 0), &[0x8d, low3(to) << 3 | 4]);
        self.code.push(scale << 6 | low3(index) << 3 | 5);
        self.imm32(disp);
    }
    /// `movzx reg32, reg16`
    pub fn zero_extend16(&mut self, reg: u8) {
        self.opcode(Self::rex(false, reg, 0, reg), &[0x0f, 0xb7, 0xc0 | low3(reg) << 3 | low3(reg)]);
    }
    /// `mov to16, from16`: the rest of the register stays.
    pub fn mov16(&mut self, to: u8, from: u8) {
        self.code.push(0x66);
        self.op32(Op::Mov, to, from);
    }
    /// `xchg a, b`, 64 bits.
    pub fn xchg(&mut self, a: u8, b: u8) {
        self.bytes(&[Self::rex(true, a, 0, b), 0x87, 0xc0 | low3(a) << 3 | low3(b)]);
    }
    /// `mov reg32, reg32`: clears the upper half.
    pub fn zero_extend(&mut self, reg: u8) {
        self.op32(Op::Mov, reg, reg);
    }
    /// `rorx to, from, n`, or `mov` and `ror`.
    pub fn rotate_to(&mut self, to: u8, from: u8, n: u8) {
        if self.bmi2 {
            let b3 = |r: u8| if r > 7 { 0u8 } else { 0x80 };
            let xb = 0x40 | if from > 7 { 0 } else { 0x20 };
            self.bytes(&[0xc4, b3(to) | xb | 3, 0xfb, 0xf0, 0xc0 | low3(to) << 3 | low3(from), n]);
        } else {
            self.mov(to, from);
            self.bytes(&[Self::rex(true, 0, 0, to), 0xc1, 0xc8 | low3(to), n]);
        }
    }
    /// `shr reg, n`
    pub fn shr(&mut self, reg: u8, n: u8) {
        self.bytes(&[Self::rex(true, 0, 0, reg), 0xc1, 0xe8 | low3(reg), n]);
    }
    /// `sar reg, n`
    pub fn sar(&mut self, reg: u8, n: u8) {
        self.bytes(&[Self::rex(true, 0, 0, reg), 0xc1, 0xf8 | low3(reg), n]);
    }
    /// `sar reg32, n`
    pub fn sar32(&mut self, reg: u8, n: u8) {
        self.bytes(&[Self::rex(false, 0, 0, reg), 0xc1, 0xf8 | low3(reg), n]);
    }
    /// `shl reg, n`
    pub fn shl(&mut self, reg: u8, n: u8) {
        self.bytes(&[Self::rex(true, 0, 0, reg), 0xc1, 0xe0 | low3(reg), n]);
    }
    /// `group1 reg32, imm`: ADD 0, OR 1, AND 4, SUB 5, XOR 6, CMP 7.
    pub fn group1_32(&mut self, extension: u8, reg: u8, imm: u32) {
        let rex = Self::rex(false, 0, 0, reg);
        if let Ok(short) = i8::try_from(imm as i32) {
            self.opcode(rex, &[0x83, 0xc0 | extension << 3 | low3(reg), short as u8]);
        } else {
            self.opcode(rex, &[0x81, 0xc0 | extension << 3 | low3(reg)]);
            self.bytes(&imm.to_le_bytes());
        }
    }
    /// `and reg32, imm`
    pub fn and32(&mut self, reg: u8, imm: u32) {
        self.group1_32(4, reg, imm);
    }
    /// `cmp reg, imm32`
    pub fn cmp_imm(&mut self, reg: u8, imm: i32) {
        self.bytes(&[Self::rex(true, 0, 0, reg), 0x81, 0xf8 | low3(reg)]);
        self.imm32(imm);
    }
    /// `test reg, imm32` (sign-extended)
    pub fn test_imm(&mut self, reg: u8, imm: i32) {
        self.bytes(&[Self::rex(true, 0, 0, reg), 0xf7, 0xc0 | low3(reg)]);
        self.imm32(imm);
    }
    /// `test reg, reg`
    pub fn test(&mut self, reg: u8) {
        self.op(Op::Test, reg, reg);
    }
    /// `cmp dword [reg], 0`
    pub fn cmp_deref32_zero(&mut self, reg: u8) {
        self.memory_op(false, &[0x83], 7, reg, None, 0);
        self.code.push(0);
    }
    /// `jcc target`, to be filled in.
    pub fn jcc(&mut self, cc: u8) -> Fixup {
        self.bytes(&[0x0f, 0x80 | cc]);
        self.imm32(0);
        Fixup(self.here() - 4)
    }
    /// LOOP, LOOPE, LOOPNE or JRCXZ, by their opcode, over the next `bytes`; `narrow`: of ECX.
    pub fn jump_by_count(&mut self, opcode: u8, narrow: bool, bytes: u8) {
        if narrow {
            self.code.push(0x67);
        }
        self.bytes(&[opcode, bytes]);
    }
    /// `jmp target`, to be filled in.
    pub fn jmp(&mut self) -> Fixup {
        self.bytes(&[0xe9]);
        self.imm32(0);
        Fixup(self.here() - 4)
    }
    /// Makes a jump go to `target`.
    pub fn bind_to(&mut self, fixup: Fixup, target: usize) {
        let from = fixup.0 + 4;
        let rel = (target as i64 - from as i64) as i32;
        self.code[fixup.0..from].copy_from_slice(&rel.to_le_bytes());
    }
    /// Makes a jump go here.
    pub fn bind(&mut self, fixup: Fixup) {
        let here = self.here();
        self.bind_to(fixup, here);
    }
    /// Jumps back to a known place.
    pub fn jmp_to(&mut self, target: usize) {
        let f = self.jmp();
        self.bind_to(f, target);
    }
    /// Offset of a jump's displacement, for patching later.
    #[must_use]
    pub const fn place(fixup: Fixup) -> usize {
        fixup.0
    }

    /// Host flags → frame. Uses [`S0`].
    pub fn spill_flags(&mut self, disp: i32) {
        self.mov(S0, RAX);
        // lahf; seto al
        self.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
        self.store16(disp, RAX);
        self.mov(RAX, S0);
    }

    /// Frame → host flags. Uses no register.
    pub fn restore_flags_on_stack(&mut self, disp: i32) {
        self.bytes(&[0x50]);
        self.load16(RAX, disp);
        self.bytes(&[0x04, 0x7f, 0x9e, 0x58]);
    }

    /// Frame → host flags. Uses `scratch`.
    pub fn restore_flags(&mut self, disp: i32, scratch: u8) {
        self.mov(scratch, RAX);
        self.load16(RAX, disp);
        // add al, 0x7f; sahf
        self.bytes(&[0x04, 0x7f, 0x9e]);
        self.mov(RAX, scratch);
    }
}
