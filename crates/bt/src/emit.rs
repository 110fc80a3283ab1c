//! A small assembler for what translated code needs around the guest's own instructions.
//!
//! Registers are numbers 0 to 15. `gs(disp)` operands address the frame.

#![expect(clippy::cast_possible_truncation, reason = "displacements within a fragment")]

/// Host scratch register.
pub const S0: u8 = 14;
/// Host scratch register.
pub const S1: u8 = 15;
/// Host register of guest RSP.
pub const SP: u8 = 13;

/// Machine code under construction.
#[derive(Default)]
pub struct Asm {
    /// The bytes so far.
    pub code: Vec<u8>,
}

/// A 32-bit displacement to fill in when its target is known.
#[derive(Clone, Copy, Debug)]
pub struct Fixup(usize);

const fn low3(r: u8) -> u8 {
    r & 7
}

impl Asm {
    /// Offset of the next byte.
    #[must_use]
    pub fn here(&self) -> usize {
        self.code.len()
    }

    /// Appends bytes.
    pub fn bytes(&mut self, b: &[u8]) {
        self.code.extend_from_slice(b);
    }

    fn imm32(&mut self, v: i32) {
        self.bytes(&v.to_le_bytes());
    }

    const fn rex(w: bool, reg: u8, index: u8, base: u8) -> u8 {
        0x40 | (w as u8) << 3 | (reg >> 3) << 2 | (index >> 3) << 1 | base >> 3
    }

    /// `opcode reg, gs:[disp]` (or the reverse, as the opcode says), 64 bits if `wide`.
    fn gs_op(&mut self, wide: bool, opcode: &[u8], reg: u8, disp: i32) {
        self.bytes(&[0x65, Self::rex(wide, reg, 0, 0)]);
        self.bytes(opcode);
        // ModRM with SIB and no base: an absolute 32-bit displacement.
        self.bytes(&[low3(reg) << 3 | 4, 0x25]);
        self.imm32(disp);
    }

    /// `opcode reg, gs:[index + disp]`.
    fn gs_index_op(&mut self, wide: bool, opcode: u8, reg: u8, index: u8, disp: i32) {
        self.bytes(&[0x65, Self::rex(wide, reg, 0, index), opcode, 0x80 | low3(reg) << 3 | low3(index)]);
        debug_assert!(low3(index) != 4, "would need a SIB byte");
        self.imm32(disp);
    }

    /// `mov reg, gs:[disp]`
    pub fn load(&mut self, reg: u8, disp: i32) {
        self.gs_op(true, &[0x8b], reg, disp);
    }
    /// `mov reg32, gs:[disp]`
    pub fn load32(&mut self, reg: u8, disp: i32) {
        self.gs_op(false, &[0x8b], reg, disp);
    }
    /// `mov gs:[disp], reg`
    pub fn store(&mut self, disp: i32, reg: u8) {
        self.gs_op(true, &[0x89], reg, disp);
    }
    /// `mov dword gs:[disp], imm`
    pub fn store_imm32(&mut self, disp: i32, value: u32) {
        self.gs_op(false, &[0xc7], 0, disp);
        self.bytes(&value.to_le_bytes());
    }
    /// `mov reg, gs:[index + disp]`
    pub fn load_index(&mut self, reg: u8, index: u8, disp: i32) {
        self.gs_index_op(true, 0x8b, reg, index, disp);
    }
    /// `xor reg, gs:[index + disp]`
    pub fn xor_index(&mut self, reg: u8, index: u8, disp: i32) {
        self.gs_index_op(true, 0x33, reg, index, disp);
    }
    /// `cmp gs:[index + disp], reg`
    pub fn cmp_index(&mut self, index: u8, disp: i32, reg: u8) {
        self.gs_index_op(true, 0x39, reg, index, disp);
    }
    /// `jmp gs:[index + disp]`
    pub fn jmp_index(&mut self, index: u8, disp: i32) {
        self.gs_index_op(false, 0xff, 4, index, disp);
    }
    /// `cmp gs:[disp], reg`
    pub fn cmp_gs(&mut self, disp: i32, reg: u8) {
        self.gs_op(true, &[0x39], reg, disp);
    }
    /// `test gs:[disp], reg32`
    pub fn test_gs32(&mut self, disp: i32, reg: u8) {
        self.gs_op(false, &[0x85], reg, disp);
    }
    /// `jmp gs:[disp]`
    pub fn jmp_gs(&mut self, disp: i32) {
        self.gs_op(false, &[0xff], 4, disp);
    }
    /// `call gs:[disp]`
    pub fn call_gs(&mut self, disp: i32) {
        self.gs_op(false, &[0xff], 2, disp);
    }
    /// `mov to, from`
    pub fn mov(&mut self, to: u8, from: u8) {
        self.bytes(&[Self::rex(true, from, 0, to), 0x89, 0xc0 | low3(from) << 3 | low3(to)]);
    }
    /// `mov reg, imm` in the shortest form.
    pub fn mov_imm(&mut self, reg: u8, value: u64) {
        if let Ok(v) = u32::try_from(value) {
            self.bytes(&[Self::rex(false, 0, 0, reg), 0xb8 | low3(reg)]);
            self.bytes(&v.to_le_bytes());
        } else if let Ok(v) = i32::try_from(value as i64) {
            self.bytes(&[Self::rex(true, 0, 0, reg), 0xc7, 0xc0 | low3(reg)]);
            self.imm32(v);
        } else {
            self.bytes(&[Self::rex(true, 0, 0, reg), 0xb8 | low3(reg)]);
            self.bytes(&value.to_le_bytes());
        }
    }
    /// `lea to, [base + index * 2^scale + disp]`; `index` None for none.
    pub fn lea(&mut self, to: u8, base: u8, index: Option<(u8, u8)>, disp: i32) {
        let (i, scale) = index.unwrap_or((4, 0));
        let x = if index.is_some() { i } else { 0 };
        self.bytes(&[Self::rex(true, to, x, base), 0x8d, 0x80 | low3(to) << 3 | 4]);
        self.bytes(&[scale << 6 | low3(i) << 3 | low3(base)]);
        self.imm32(disp);
    }
    /// `mov [base + index], reg`, 64 bits.
    pub fn store_sum(&mut self, base: u8, index: u8, reg: u8) {
        self.bytes(&[Self::rex(true, reg, index, base), 0x89, 0x44 | low3(reg) << 3]);
        self.bytes(&[low3(index) << 3 | low3(base), 0]);
    }
    /// `mov reg, [base + index]`, 64 bits.
    pub fn load_sum(&mut self, reg: u8, base: u8, index: u8) {
        self.bytes(&[Self::rex(true, reg, index, base), 0x8b, 0x44 | low3(reg) << 3]);
        self.bytes(&[low3(index) << 3 | low3(base), 0]);
    }
    /// `mov reg32, reg32`: clears the upper half.
    pub fn zero_extend(&mut self, reg: u8) {
        self.bytes(&[Self::rex(false, reg, 0, reg), 0x89, 0xc0 | low3(reg) << 3 | low3(reg)]);
    }
    /// `shr reg, n`
    pub fn shr(&mut self, reg: u8, n: u8) {
        self.bytes(&[Self::rex(true, 0, 0, reg), 0xc1, 0xe8 | low3(reg), n]);
    }
    /// `shl reg32, n`
    pub fn shl32(&mut self, reg: u8, n: u8) {
        self.bytes(&[Self::rex(false, 0, 0, reg), 0xc1, 0xe0 | low3(reg), n]);
    }
    /// `and reg32, imm`
    pub fn and32(&mut self, reg: u8, imm: u32) {
        self.bytes(&[Self::rex(false, 0, 0, reg), 0x81, 0xe0 | low3(reg)]);
        self.bytes(&imm.to_le_bytes());
    }
    /// `xor to, from`
    pub fn xor(&mut self, to: u8, from: u8) {
        self.bytes(&[Self::rex(true, from, 0, to), 0x31, 0xc0 | low3(from) << 3 | low3(to)]);
    }
    /// `cmp reg, imm32`
    pub fn cmp_imm(&mut self, reg: u8, imm: i32) {
        self.bytes(&[Self::rex(true, 0, 0, reg), 0x81, 0xf8 | low3(reg)]);
        self.imm32(imm);
    }
    /// `test reg, reg`
    pub fn test(&mut self, reg: u8) {
        self.bytes(&[Self::rex(true, reg, 0, reg), 0x85, 0xc0 | low3(reg) << 3 | low3(reg)]);
    }
    /// `mov r32, [reg]` into the same register.
    pub fn deref32(&mut self, reg: u8) {
        debug_assert!(reg == S1, "encoded for R15");
        self.bytes(&[0x45, 0x8b, 0x3f]);
    }
    /// `jcc target`, to be filled in.
    pub fn jcc(&mut self, cc: u8) -> Fixup {
        self.bytes(&[0x0f, 0x80 | cc]);
        self.imm32(0);
        Fixup(self.here() - 4)
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
        self.mov(S0, 0);
        // lahf; seto al; mov gs:[disp], ax
        self.bytes(&[0x9f, 0x0f, 0x90, 0xc0, 0x65, 0x66, 0x89, 0x04, 0x25]);
        self.imm32(disp);
        self.mov(0, S0);
    }

    /// Frame → host flags. Uses `scratch`.
    pub fn restore_flags(&mut self, disp: i32, scratch: u8) {
        self.mov(scratch, 0);
        // movzx eax, word gs:[disp]; add al, 0x7f; sahf
        self.bytes(&[0x65, 0x0f, 0xb7, 0x04, 0x25]);
        self.imm32(disp);
        self.bytes(&[0x04, 0x7f, 0x9e]);
        self.mov(0, scratch);
    }
}
