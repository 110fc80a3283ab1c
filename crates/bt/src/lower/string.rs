//! String instructions. REP MOVS and REP STOS run whole pages at once, and poll between them; single MOVS, STOS and LODS are plain accesses.
//! CMPS, SCAS, INS, OUTS and REP LODS are interpreted. The direction flag is clear in translated code (the engine sees to it).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::Lowering;
use crate::emit::{Op, RAX, RCX, RDI, RSI, S0, S1, cc};
use crate::frame;

const SOURCE: i32 = frame::TEMP;
const LEFT: i32 = frame::TEMP + 8;
const NEXT_SOURCE: i32 = frame::TEMP + 16;

/// Element size, if the operands are the usual ones: 64-bit addresses, no segment with a base.
fn element(i: &Instruction) -> Option<usize> {
    let plain = (0..i.op_count())
        .all(|n| matches!(i.op_kind(n), OpKind::Register | OpKind::MemorySegRSI | OpKind::MemoryESRDI));
    let flat = !matches!(i.memory_segment(), Register::FS | Register::GS);
    (plain && flat).then(|| i.memory_size().size()).filter(|s| matches!(s, 1 | 2 | 4 | 8))
}

impl Lowering<'_, '_> {
    pub(super) fn string(&mut self, i: &Instruction, live_before: u32) -> bool {
        let Some(size) = element(i) else { return false };
        let repeated = i.has_rep_prefix();
        match i.mnemonic() {
            _ if i.has_repne_prefix() => return false,
            Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq if repeated => {
                self.repeat(size, true, live_before);
            }
            Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq if repeated => {
                self.repeat(size, false, live_before);
            }
            _ if repeated => return false,
            Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq => {
                self.move_one(size, live_before);
            }
            Mnemonic::Stosb | Mnemonic::Stosw | Mnemonic::Stosd | Mnemonic::Stosq => {
                let miss = self.element_at(RDI, size, true, live_before);
                self.asm.store_sized(size, S0, S1, RAX);
                self.asm.lea(RDI, RDI, None, size as i32);
                self.complete(miss, false);
            }
            Mnemonic::Lodsb | Mnemonic::Lodsw | Mnemonic::Lodsd | Mnemonic::Lodsq => {
                let miss = self.element_at(RSI, size, false, live_before);
                self.load_accumulator(size);
                self.asm.lea(RSI, RSI, None, size as i32);
                self.complete(miss, false);
            }
            _ => return false,
        }
        true
    }

    fn element_at(&mut self, pointer: u8, size: usize, write: bool, live_before: u32) -> usize {
        self.spill(live_before);
        let retry = self.asm.here();
        self.asm.mov(S0, pointer);
        self.check(size, write, retry)
    }

    /// `mov al/ax/eax/rax, [S0 + S1]`
    fn load_accumulator(&mut self, size: usize) {
        match size {
            1 => self.asm.bytes(&[0x43, 0x8a, 0x04, 0x3e]),
            2 => self.asm.bytes(&[0x66, 0x43, 0x8b, 0x04, 0x3e]),
            _ => self.asm.load_sized(size, RAX, S0, S1),
        }
    }

    fn move_one(&mut self, size: usize, live_before: u32) {
        let first = self.misses.len();
        self.spill(live_before);
        let retry = self.asm.here();
        self.asm.mov(S0, RSI);
        self.check(size, false, retry);
        self.asm.load_sized(size, S0, S0, S1);
        self.asm.store(SOURCE, S0);
        // Each access tries again by itself: the two pages may want the same TLB entry.
        let retry = self.asm.here();
        self.asm.mov(S0, RDI);
        self.check(size, true, retry);
        self.asm.lea(S0, S0, Some((S1, 0)), 0);
        // The index is of no use any more: S1 takes the value.
        self.asm.load(S1, SOURCE);
        self.store_element(size);
        self.asm.lea(RSI, RSI, None, size as i32);
        self.asm.lea(RDI, RDI, None, size as i32);
        self.complete(first, false);
    }

    /// `mov [S0], S1` in `size` bytes.
    pub(super) fn store_element(&mut self, size: usize) {
        match size {
            1 => self.asm.bytes(&[0x45, 0x88, 0x3e]),
            2 => self.asm.bytes(&[0x66, 0x45, 0x89, 0x3e]),
            4 => self.asm.bytes(&[0x45, 0x89, 0x3e]),
            _ => self.asm.store_at(S0, 0, S1),
        }
    }

    /// REP MOVS (`copy`) or REP STOS: in each turn as many elements as lie in the pages where the pointers are.
    fn repeat(&mut self, size: usize, copy: bool, live_before: u32) {
        let first = self.misses.len();
        let shift = size.trailing_zeros() as u8;
        self.spill(live_before);
        let turn = self.asm.here();
        self.asm.test(RCX);
        let done = self.asm.jcc(cc::E);
        if copy {
            self.asm.mov(S0, RSI);
            self.check(size, false, turn);
            self.asm.lea(S0, S0, Some((S1, 0)), 0);
            self.asm.store(SOURCE, S0);
        }
        // Each access tries again by itself: the two pages may want the same TLB entry.
        let retry = self.asm.here();
        self.asm.mov(S0, RDI);
        self.check(size, true, retry);
        self.asm.lea(S0, S0, Some((S1, 0)), 0);
        self.asm.store(frame::TEMP + 24, S0);
        self.room(copy);
        if shift > 0 {
            self.asm.shr(S0, shift);
        }
        // S0: elements in this turn.
        self.asm.op(Op::Cmp, S0, RCX);
        // cmova r14, rcx
        self.asm.bytes(&[0x4c, 0x0f, 0x47, 0xf1]);
        self.asm.mov(S1, RCX);
        self.asm.op(Op::Sub, S1, S0);
        self.asm.store(LEFT, S1);
        if copy {
            self.asm.lea(S1, RSI, Some((S0, shift)), 0);
            self.asm.store(NEXT_SOURCE, S1);
        }
        self.asm.lea(S1, RDI, Some((S0, shift)), 0);
        self.asm.mov(RCX, S0);
        if copy {
            self.asm.load(RSI, SOURCE);
        }
        self.asm.load(RDI, frame::TEMP + 24);
        self.rep(size, copy);
        self.asm.mov(RDI, S1);
        if copy {
            self.asm.load(RSI, NEXT_SOURCE);
        }
        self.asm.load(RCX, LEFT);
        self.asm.test(RCX);
        let done_too = self.asm.jcc(cc::E);
        self.poll_here();
        self.asm.jmp_to(turn);
        self.asm.bind(done);
        self.asm.bind(done_too);
        self.complete(first, false);
    }

    /// Bytes up to the end of the page that ends first, into [`S0`].
    fn room(&mut self, copy: bool) {
        self.asm.op32(Op::Mov, S0, RDI);
        self.asm.and32(S0, 4095);
        if copy {
            self.asm.op32(Op::Mov, S1, RSI);
            self.asm.and32(S1, 4095);
            self.asm.op32(Op::Cmp, S0, S1);
            // cmovb r14d, r15d
            self.asm.bytes(&[0x45, 0x0f, 0x42, 0xf7]);
        }
        // 4096 - n: neg r14d; add r14d, 4096
        self.asm.bytes(&[0x41, 0xf7, 0xde]);
        self.asm.group1_32(0, S0, 4096);
    }

    fn rep(&mut self, size: usize, copy: bool) {
        let opcode = if copy { 0xa4 } else { 0xaa };
        match size {
            1 => self.asm.bytes(&[0xf3, opcode]),
            2 => self.asm.bytes(&[0xf3, 0x66, opcode + 1]),
            4 => self.asm.bytes(&[0xf3, opcode + 1]),
            _ => self.asm.bytes(&[0xf3, 0x48, opcode + 1]),
        }
    }
}
