//! String instructions. Single MOVS, STOS, LODS, CMPS and SCAS are plain accesses. Repeated ones run on the host, in turns of as many elements as
//! lie in the pages where the pointers are; between two turns the registers and flags say how far it got (SDM 2B REP), and the alarm is
//! polled. An element that crosses pages, a device, a fault are the interpreter's, from there on.
//! INS, OUTS and unusual operands call out. The direction flag is clear in translated code (the engine sees to it).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{Facts, Lowering};
use crate::emit::{Op, RAX, RCX, RDI, RSI, S0, S1, cc};
use crate::frame;

/// Host addresses at which a turn begins.
const SOURCE: i32 = frame::TEMP;
const TARGET: i32 = frame::TEMP + 8;
/// Elements behind the turn.
const LEFT: i32 = frame::TEMP + 16;

/// A string instruction.
#[derive(Clone, Copy)]
struct Form {
    /// Of the form with bytes; the others' is the next.
    opcode: u8,
    /// It reads at RSI.
    source: bool,
    /// It accesses RDI's place: to write, or to compare.
    target: Option<bool>,
}

impl Form {
    const fn of(mnemonic: Mnemonic) -> Option<Self> {
        use Mnemonic as M;
        let (opcode, source, target) = match mnemonic {
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => (0xa4, true, Some(true)),
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => (0xa6, true, Some(false)),
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => (0xaa, false, Some(true)),
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => (0xac, true, None),
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => (0xae, false, Some(false)),
            _ => return None,
        };
        Some(Self { opcode, source, target })
    }

    const fn compares(self) -> bool {
        matches!(self.target, Some(false))
    }
}

/// Element size, if the operands are the usual ones: addresses of 64 bits (in 32-bit code, of 32), no segment with a base.
fn element(i: &Instruction, facts: Facts) -> Option<usize> {
    let plain = |kind| match facts.legacy {
        None => matches!(kind, OpKind::Register | OpKind::MemorySegRSI | OpKind::MemoryESRDI),
        Some(l) => {
            l.flat_data && matches!(kind, OpKind::Register | OpKind::MemorySegESI | OpKind::MemoryESEDI)
        }
    };
    let segment = i.memory_segment();
    let flat = !matches!(segment, Register::FS | Register::GS)
        && (facts.legacy.is_none() || segment != Register::CS);
    ((0..i.op_count()).all(|n| plain(i.op_kind(n))) && flat)
        .then(|| i.memory_size().size())
        .filter(|s| matches!(s, 1 | 2 | 4 | 8))
}

impl Lowering<'_, '_> {
    pub(super) fn string(&mut self, i: &Instruction, live_before: u32) -> bool {
        let (Some(size), Some(form)) = (element(i, self.facts), Form::of(i.mnemonic())) else { return false };
        match (i.has_rep_prefix(), i.has_repne_prefix()) {
            (false, false) => self.once(form, size, live_before),
            (true, false) => self.repeat(form, size, cc::NE, live_before),
            (false, true) if form.compares() => self.repeat(form, size, cc::E, live_before),
            _ => return false,
        }
        true
    }

    fn once(&mut self, form: Form, size: usize, live_before: u32) {
        match (form.source, form.target) {
            (true, Some(write)) => self.two_places(size, write, live_before),
            (true, None) => {
                let miss = self.element_at(RSI, size, false, live_before);
                self.load_accumulator(size);
                self.advance(RSI, size);
                self.complete(miss, false);
            }
            (_, write) => {
                let write = write == Some(true);
                let miss = self.element_at(RDI, size, write, live_before);
                if write {
                    self.asm.store_sized(size, S0, S1, RAX);
                } else {
                    self.asm.cmp_sized(size, RAX, S0, S1);
                }
                self.advance(RDI, size);
                self.complete(miss, !write);
                self.in_host = !write;
            }
        }
    }

    fn element_at(&mut self, pointer: u8, size: usize, write: bool, live_before: u32) -> usize {
        self.spill(live_before);
        let retry = self.asm.here();
        self.asm.mov(S0, pointer);
        self.check(size, write, retry)
    }

    fn advance(&mut self, pointer: u8, size: usize) {
        self.asm.lea(pointer, pointer, None, size as i32);
        self.cut(pointer);
    }

    /// A pointer of 32-bit code behind the last byte of 4 GiB is 0 (INV-LEG-1). Flags stay.
    fn cut(&mut self, pointer: u8) {
        if self.facts.legacy.is_some() {
            self.asm.zero_extend(pointer);
        }
    }

    /// `mov al/ax/eax/rax, [S0 + S1]`
    fn load_accumulator(&mut self, size: usize) {
        match size {
            1 => self.asm.bytes(&[0x43, 0x8a, 0x04, 0x3e]),
            2 => self.asm.bytes(&[0x66, 0x43, 0x8b, 0x04, 0x3e]),
            _ => self.asm.load_sized(size, RAX, S0, S1),
        }
    }

    /// MOVS (`write`) and CMPS.
    fn two_places(&mut self, size: usize, write: bool, live_before: u32) {
        let first = self.room.misses.len();
        self.spill(live_before);
        let retry = self.asm.here();
        self.asm.mov(S0, RSI);
        self.check(size, false, retry);
        self.asm.load_sized(size, S0, S0, S1);
        self.asm.store(SOURCE, S0);
        // Each access tries again by itself: the two pages may want the same TLB entry (INV-MEM-1).
        let retry = self.asm.here();
        self.asm.mov(S0, RDI);
        self.check(size, write, retry);
        if write {
            self.asm.lea(S0, S0, Some((S1, 0)), 0);
            // The index is of no use any more: S1 takes the value.
            self.asm.load(S1, SOURCE);
            self.store_element(size);
        } else {
            self.asm.load_sized(size, S1, S0, S1);
            self.asm.load(S0, SOURCE);
            self.asm.cmp_registers(size, S0, S1);
        }
        self.advance(RSI, size);
        self.advance(RDI, size);
        self.complete(first, !write);
        self.in_host = !write;
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

    /// A repeated instruction. One that compares ends where the condition `until` holds. With a count of zero the flags stay what they were,
    /// so both ways have them in the frame.
    fn repeat(&mut self, form: Form, size: usize, until: u8, live_before: u32) {
        let first = self.room.misses.len();
        self.spill(live_before);
        let turn = self.asm.here();
        self.asm.test(RCX);
        let mut done = vec![self.asm.jcc(cc::E)];
        // Each access tries again by itself: the two pages may want the same TLB entry (INV-MEM-1).
        if form.source {
            self.host_place(RSI, SOURCE, size, false);
        }
        if let Some(write) = form.target {
            self.host_place(RDI, TARGET, size, write);
        }
        self.turn_length(form, size);
        self.on_host(form, size, until);
        if form.compares() {
            if live_before != 0 {
                // Leaves the host's as they are.
                self.asm.spill_flags(frame::FLAGS);
            }
            done.push(self.asm.jcc(until));
        }
        self.asm.test(RCX);
        done.push(self.asm.jcc(cc::E));
        self.poll_here();
        self.asm.jmp_to(turn);
        for fixup in done {
            self.asm.bind(fixup);
        }
        self.complete(first, false);
    }

    /// Where a pointer's element is on the host, into the frame.
    fn host_place(&mut self, pointer: u8, to: i32, size: usize, write: bool) {
        let retry = self.asm.here();
        self.asm.mov(S0, pointer);
        let miss = self.check(size, write, retry);
        // The turn writes more than was asked for.
        self.may_pass(miss, 0);
        self.asm.lea(S0, S0, Some((S1, 0)), 0);
        self.asm.store(to, S0);
    }

    /// How many elements the turn has, into [`S0`]: all, or what lies before the page's end (of the page that ends first). What is
    /// behind it into [`LEFT`].
    fn turn_length(&mut self, form: Form, size: usize) {
        let (a, b) = if form.source { (RSI, form.target.map(|_| RDI)) } else { (RDI, None) };
        self.asm.op32(Op::Mov, S0, a);
        self.asm.and32(S0, 4095);
        if let Some(b) = b {
            self.asm.op32(Op::Mov, S1, b);
            self.asm.and32(S1, 4095);
            self.asm.op32(Op::Cmp, S0, S1);
            // cmovb r14d, r15d
            self.asm.bytes(&[0x45, 0x0f, 0x42, 0xf7]);
        }
        // 4096 - n: neg r14d; add r14d, 4096
        self.asm.bytes(&[0x41, 0xf7, 0xde]);
        self.asm.group1_32(0, S0, 4096);
        if size > 1 {
            self.asm.shr(S0, size.trailing_zeros() as u8);
        }
        self.asm.op(Op::Cmp, S0, RCX);
        // cmova r14, rcx
        self.asm.bytes(&[0x4c, 0x0f, 0x47, 0xf1]);
        self.asm.mov(S1, RCX);
        self.asm.op(Op::Sub, S1, S0);
        self.asm.store(LEFT, S1);
    }

    /// The instruction itself on [`S0`] elements at their host addresses; then the guest's pointers and count behind them. Flags are the
    /// last comparison's.
    fn on_host(&mut self, form: Form, size: usize, until: u8) {
        self.asm.mov(RCX, S0);
        // What the pointers are ahead of the host's.
        if form.source {
            self.asm.mov(S0, RSI);
            self.asm.gs(Op::Sub, S0, SOURCE);
            self.asm.load(RSI, SOURCE);
        }
        if form.target.is_some() {
            self.asm.mov(S1, RDI);
            self.asm.gs(Op::Sub, S1, TARGET);
            self.asm.load(RDI, TARGET);
        }
        self.asm.bytes(&[if until == cc::E { 0xf2 } else { 0xf3 }]);
        match size {
            1 => self.asm.bytes(&[form.opcode]),
            2 => self.asm.bytes(&[0x66, form.opcode + 1]),
            4 => self.asm.bytes(&[form.opcode + 1]),
            _ => self.asm.bytes(&[0x48, form.opcode + 1]),
        }
        if form.source {
            self.asm.lea(RSI, RSI, Some((S0, 0)), 0);
            self.cut(RSI);
        }
        if form.target.is_some() {
            self.asm.lea(RDI, RDI, Some((S1, 0)), 0);
            self.cut(RDI);
        }
        self.asm.load(S0, LEFT);
        self.asm.lea(RCX, RCX, Some((S0, 0)), 0);
        self.cut(RCX);
    }
}
