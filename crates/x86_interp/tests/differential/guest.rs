//! Runs a case in the interpreter: code of level 3 under a small supervisor whose exception handlers halt.

use engine::{Vcpu, VcpuExit};
use guestmem::Gpa;
use x86::{Attr, CpuState, Segment, TableRegister};

use crate::common::Mini;
use crate::state::{
    CODE, CODE_BYTES, DATA, DATA_BYTES, Mode, Outcome, READ_ONLY_BYTES, Registers, component_mask, normalise,
};

/// The supervisor's 2 MiB: guest physical 0, in the upper half of the address space, where user code cannot reach.
const HIGH: u64 = 0xffff_8000_0000_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PDPT_HIGH: u64 = 0x3000;
const PD: u64 = 0x4000;
const PD_HIGH: u64 = 0x5000;
const PT_CODE: u64 = 0x6000;
const PT_DATA: u64 = 0x7000;
const GDT: u64 = 0x8000;
const IDT: u64 = 0x9000;
const TSS: u64 = 0xa000;
const STACK_TOP: u64 = 0xc000;
/// One HLT for each vector.
const HANDLERS: u64 = 0xc000;
const CODE_GPA: u64 = 0x20_0000;
const DATA_GPA: u64 = 0x21_0000;
/// Vectors that leave an error code (SDM 3A table 6-1).
const WITH_ERROR: u32 = 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17 | 1 << 21;
/// Instructions (and repetitions) that a case may take.
const BUDGET: u64 = 200_000;

/// The machine.
pub struct Guest {
    mini: Mini,
    base: CpuState,
}

impl Guest {
    pub fn new() -> Self {
        let mini = Mini::new(8 << 20);
        let base = lay_supervisor(&mini);
        Self { mini, base }
    }

    /// Runs `code` from `regs`; None if it takes too long.
    pub fn run(
        &mut self,
        mode: Mode,
        regs: &Registers,
        code: &[u8],
        data: &[u8],
        read_only: &[u8],
    ) -> Option<Outcome> {
        assert_eq!((code.len(), data.len(), read_only.len()), (CODE_BYTES, DATA_BYTES, READ_ONLY_BYTES));
        let mem = &self.mini.mem;
        mem.write(Gpa(CODE_GPA), code).unwrap();
        mem.write(Gpa(DATA_GPA), data).unwrap();
        mem.write(Gpa(DATA_GPA + DATA_BYTES as u64), read_only).unwrap();
        let mut s = self.base.clone();
        s.gpr = regs.gpr;
        s.rip = regs.rip;
        s.rflags = regs.rflags;
        s.fpu.0 = *regs.fpu;
        let code_attr = if mode == Mode::Long { 0xa0fb } else { 0xc0fb };
        s.seg[1] = Segment { selector: mode.cs(), base: 0, limit: u32::MAX, attr: Attr(code_attr) };
        self.mini.vcpu.restore(&s);
        match self.mini.vcpu.run(BUDGET) {
            VcpuExit::Halted => Some(self.outcome(mode)),
            VcpuExit::Budget => None,
            other => panic!("the interpreter left with {other:?} at {:#x}", self.mini.vcpu.save().rip),
        }
    }

    /// Reads the exception frame.
    fn outcome(&mut self, mode: Mode) -> Outcome {
        let s = self.mini.vcpu.save();
        let vector = s.rip.wrapping_sub(HIGH + HANDLERS + 1) as u8;
        assert!(vector < 32, "halted at {:#x}", s.rip);
        let has_error = WITH_ERROR >> vector & 1 != 0;
        let mem = &self.mini.mem;
        let word = |n: u64| mem.load_gpa::<u64>(Gpa(STACK_TOP - 8 * n)).unwrap();
        assert_eq!(s.gpr[4], HIGH + STACK_TOP - if has_error { 48 } else { 40 }, "frame of vector {vector}");
        let mut regs = Registers { gpr: s.gpr, rip: word(5), rflags: word(3), fpu: Box::new(s.fpu.0) };
        regs.gpr[4] = word(2);
        normalise(&mut regs.fpu, mode);
        let mut data = vec![0; DATA_BYTES];
        mem.read(Gpa(DATA_GPA), &mut data).unwrap();
        let error = if has_error { word(6) } else { 0 };
        let cr2 = if vector == 14 { s.cr2 } else { 0 };
        Outcome { regs, vector, error, cr2, data }
    }
}

/// Tables, handlers and the state that every case starts from.
fn lay_supervisor(mini: &Mini) -> CpuState {
    let put = |at: u64, value: u64| mini.mem.write(Gpa(at), &value.to_le_bytes()).unwrap();
    // Present, writable, user, accessed, dirty; supervisor and NX where it says so.
    const USER: u64 = 0x67;
    const NX: u64 = 1 << 63;
    put(PML4, PDPT | USER);
    put(PML4 + 8 * 256, PDPT_HIGH | 0x63);
    put(PDPT, PD | USER);
    put(PDPT_HIGH, PD_HIGH | 0x63);
    put(PD_HIGH, 0xe3);
    put(PD + 8 * (CODE >> 21), PT_CODE | USER);
    put(PD + 8 * (DATA >> 21), PT_DATA | USER);
    for i in 0..CODE_BYTES as u64 >> 12 {
        put(PT_CODE + 8 * i, (CODE_GPA + (i << 12)) | 0x65);
    }
    for i in 0..DATA_BYTES as u64 >> 12 {
        put(PT_DATA + 8 * i, (DATA_GPA + (i << 12)) | USER | NX);
    }
    put(PT_DATA + 8 * (DATA_BYTES as u64 >> 12), (DATA_GPA + DATA_BYTES as u64) | 0x65 | NX);
    put(GDT + 0x10, 0x00af_9b00_0000_ffff);
    put(TSS + 4, HIGH + STACK_TOP);
    for vector in 0..32 {
        let at = HIGH + HANDLERS + vector;
        // Interrupt gate; INT3 and INTO may be used by user code, as Linux has it.
        let dpl = if vector == 3 || vector == 4 { 0xee } else { 0x8e };
        put(IDT + 16 * vector, at & 0xffff | 0x10 << 16 | dpl << 40 | (at >> 16 & 0xffff) << 48);
        put(IDT + 16 * vector + 8, at >> 32);
        mini.mem.write(Gpa(HANDLERS + vector), &[0xf4]).unwrap();
    }
    let mut s = CpuState::reset();
    let data = Segment { selector: 0x2b, base: 0, limit: u32::MAX, attr: Attr(0xc0f3) };
    s.seg = [data; 6];
    let null = Segment { selector: 0, base: 0, limit: 0, attr: Attr(0) };
    s.seg[4] = null;
    s.seg[5] = null;
    s.tr = Segment { selector: 0x40, base: HIGH + TSS, limit: 0x67, attr: Attr(0x8b) };
    mini.mem.write(Gpa(TSS + 0x66), &0x68u16.to_le_bytes()).unwrap();
    s.gdtr = TableRegister { base: HIGH + GDT, limit: 0x7f };
    s.idtr = TableRegister { base: HIGH + IDT, limit: 0x1ff };
    s.cr0 = 0x8005_0033;
    s.cr3 = PML4;
    s.cr4 = 0x0004_06a0;
    s.xcr0 = component_mask();
    s.msr.efer = 0xd01;
    s.cpl = 3;
    s
}
