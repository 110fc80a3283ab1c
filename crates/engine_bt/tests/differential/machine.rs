//! The machine that both engines get: two pages of code, data around it, and a small supervisor in the upper half.

use std::sync::Arc;

use engine::io::GeneralProtection;
use engine::{CpuIo, Signals};
use guestmem::{Gpa, GuestMemory};
use x86::cpuid::CpuModel;
use x86::{Attr, CpuState, Segment, TableRegister};
use x86_interp::Parts;

use crate::handlers;
use crate::state::{CODE, CODE_BYTES, DATA, DATA_BYTES, READ_ONLY_BYTES, Registers, component_mask};

/// The supervisor's 2 MiB: guest physical 0.
pub const HIGH: u64 = 0xffff_8000_0000_0000;
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
/// Descriptors of 16- and 32-bit code: behind the others in the GDT.
const SEGMENTS: u64 = GDT + 0x50;
/// The stack of all exceptions.
pub const STACK_TOP: u64 = 0xc000;
/// 16 bytes for each vector.
pub const HANDLERS: u64 = 0xc000;
const COMMON: u64 = 0xc400;
const SYSCALLS: [u64; 2] = [0xd000, 0xd800];
/// What the supervisor's GS points at.
const PER_CPU: u64 = 0xe000;
/// How many exceptions go on, and at offset 8 where.
pub const COUNTER: u64 = 0xe100;
const KERNEL_STACK_TOP: u64 = 0x1_0000;
/// Physical addresses of code and data.
pub const CODE_GPA: u64 = 0x20_0000;
const DATA_GPA: u64 = 0x21_0000;
const MEMORY: u64 = 4 << 20;
/// Vectors that leave an error code (SDM 3A table 6-1).
const WITH_ERROR: u32 = 1 << 8 | 1 << 10 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 14 | 1 << 17 | 1 << 21;

/// What is compared, as physical ranges.
pub const COMPARED: [(u64, usize); 3] =
    [(0x1000, 0xf000), (CODE_GPA, CODE_BYTES), (DATA_GPA, DATA_BYTES + READ_ONLY_BYTES)];

/// Frames that are mapped twice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Alias {
    None,
    /// The last writable data page is the first one.
    Data,
    /// The second data page is the first page of code: whoever writes there changes the code.
    Code,
}

/// How the machine is set up for a case.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Privilege level of the code: 0 or 3.
    pub supervisor: bool,
    /// The code may write itself.
    pub code_writable: bool,
    /// Which of the five data pages are user pages (supervisor code only; user code has them all).
    pub user_pages: u8,
    /// What the second and the last writable data page are: pages of their own, or the frame of another.
    pub alias: Alias,
    /// CR4.SMAP.
    pub smap: bool,
    /// CR0.TS.
    pub task_switched: bool,
    /// Accessed and dirty bits of data pages are clear at first.
    pub fresh: bool,
    /// So many exceptions go on at the item that [`crate::program::Program::resume`] names.
    pub survive: u32,
    /// Which system-call entry.
    pub syscall: usize,
    /// IA32_FMASK.
    pub sfmask: u64,
    /// Bases of FS and GS.
    pub bases: [u64; 2],
    /// 16- or 32-bit code with these segments.
    pub segments: Option<Segments>,
}

/// The segments of 16- and 32-bit code, as descriptors.
#[derive(Clone, Copy, Debug)]
pub struct Segments {
    /// 16-bit code.
    pub bits16: bool,
    /// ES, CS, SS, DS, FS, GS.
    pub descriptors: [u64; 6],
}

/// A descriptor of a present segment: `kind` is type, S and DPL; `big` is D/B. Limits of a MiB or more are in pages.
pub fn descriptor(base: u32, limit: u32, kind: u8, big: bool) -> u64 {
    let (limit, pages) = if limit >= 1 << 20 { (limit >> 12, 1u64) } else { (limit, 0) };
    let (base, limit) = (u64::from(base), u64::from(limit));
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | u64::from(kind | 0x80) << 40
        | (limit >> 16) << 48
        | u64::from(big) << 54
        | pages << 55
        | (base >> 24) << 56
}

impl Setup {
    /// What an instruction pointer is cut to.
    pub fn pointer_mask(&self) -> u64 {
        if self.segments.is_some() { 0xffff_ffff } else { u64::MAX }
    }

    /// Linear base of the code.
    pub fn code_base(&self) -> u64 {
        self.segments.map_or(0, |s| Segment::from_descriptor(0, s.descriptors[1]).base)
    }
}

/// Memory contents and start of a case.
pub struct Image<'a> {
    pub setup: &'a Setup,
    pub regs: &'a Registers,
    pub code: &'a [u8],
    pub data: &'a [u8],
    pub read_only: &'a [u8],
    pub resume: u64,
}

/// No devices; time stands still.
struct NoDevices;

impl CpuIo for NoDevices {
    fn port_in(&self, _: usize, _: u16, _: u8) -> u32 {
        u32::MAX
    }
    fn port_out(&self, _: usize, _: u16, _: u8, _: u32) {}
    fn mmio_read(&self, _: usize, _: Gpa, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: usize, _: Gpa, _: &[u8]) {}
    fn acknowledge_interrupt(&self, _: usize) -> Option<u8> {
        None
    }
    fn cr8(&self, _: usize) -> u64 {
        0
    }
    fn set_cr8(&self, _: usize, _: u64) {}
    fn apic_msr_read(&self, _: usize, _: u32) -> Result<u64, GeneralProtection> {
        Ok(0xfee0_0900)
    }
    fn apic_msr_write(&self, _: usize, _: u32, _: u64) -> Result<(), GeneralProtection> {
        Ok(())
    }
    fn tsc(&self) -> u64 {
        0x1234_5678_9abc
    }
    fn tsc_hz(&self) -> u64 {
        1_000_000_000
    }
    fn system_time_ns(&self) -> u64 {
        0
    }
    fn wall_ns(&self) -> u64 {
        0
    }
    fn tsc_offset_changed(&self, _: usize, _: u64) {}
    fn apic_init(&self, _: usize) {}
}

/// Memory and signals of one engine.
pub struct Machine {
    pub mem: Arc<GuestMemory>,
    pub signals: Arc<Signals>,
}

impl Machine {
    pub fn new() -> Self {
        Self { mem: GuestMemory::new(MEMORY).unwrap(), signals: Arc::new(Signals::default()) }
    }

    pub fn parts(&self) -> Parts {
        Parts {
            index: 0,
            vcpus: 1,
            mem: Arc::clone(&self.mem),
            io: Arc::new(NoDevices),
            signals: Arc::clone(&self.signals),
            model: Arc::new(CpuModel::parse("max").unwrap()),
        }
    }

    /// Everything that is compared.
    pub fn snapshot(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(0x18000);
        for (at, len) in COMPARED {
            let start = out.len();
            out.resize(start + len, 0);
            self.mem.read(Gpa(at), &mut out[start..]).unwrap();
        }
        out
    }

    /// Lays the image; the state to start from.
    pub fn lay(&self, image: &Image<'_>) -> CpuState {
        assert_eq!((image.code.len(), image.data.len()), (CODE_BYTES, DATA_BYTES));
        let mut low = vec![0u8; 0x10000];
        lay_tables(&mut low, image.setup);
        lay_supervisor(&mut low, image);
        self.mem.write(Gpa(0), &low).unwrap();
        self.mem.write(Gpa(CODE_GPA), image.code).unwrap();
        self.mem.write(Gpa(DATA_GPA), image.data).unwrap();
        self.mem.write(Gpa(DATA_GPA + DATA_BYTES as u64), image.read_only).unwrap();
        registers(image)
    }
}

/// Where an address of the lower half or the supervisor's lies in physical memory.
pub fn physical(la: u64) -> Option<u64> {
    let within = |from: u64, len: u64| la.checked_sub(from).filter(|o| *o < len);
    within(CODE, CODE_BYTES as u64).map(|o| CODE_GPA + o).or_else(|| within(HIGH, 0x20_0000))
}

fn put(low: &mut [u8], at: u64, value: u64) {
    low[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
}

fn lay_tables(low: &mut [u8], setup: &Setup) {
    const USER: u64 = 4;
    const WRITE: u64 = 2;
    /// Present, accessed, dirty.
    const USED: u64 = 0x61;
    const NX: u64 = 1 << 63;
    put(low, PML4, PDPT | USED | WRITE | USER);
    put(low, PML4 + 8 * 256, PDPT_HIGH | USED | WRITE);
    put(low, PDPT, PD | USED | WRITE | USER);
    put(low, PDPT_HIGH, PD_HIGH | USED | WRITE);
    put(low, PD_HIGH, 0xe3);
    put(low, PD + 8 * (CODE >> 21), PT_CODE | USED | WRITE | USER);
    put(low, PD + 8 * (DATA >> 21), PT_DATA | USED | WRITE | USER);
    let level = if setup.supervisor { 0 } else { USER };
    let write = if setup.code_writable { WRITE } else { 0 };
    for i in 0..CODE_BYTES as u64 >> 12 {
        put(low, PT_CODE + 8 * i, (CODE_GPA + (i << 12)) | USED | level | write);
    }
    let used = if setup.fresh { 1 } else { USED };
    for i in 0..=DATA_BYTES as u64 >> 12 {
        let level = if setup.supervisor && setup.user_pages >> i & 1 == 0 { 0 } else { USER };
        let write = if i < DATA_BYTES as u64 >> 12 { WRITE } else { 0 };
        let frame = match (setup.alias, i) {
            (Alias::Data, 3) => DATA_GPA,
            (Alias::Code, 1) => CODE_GPA,
            _ => DATA_GPA + (i << 12),
        };
        put(low, PT_DATA + 8 * i, frame | used | write | level | NX);
    }
}

fn lay_supervisor(low: &mut [u8], image: &Image<'_>) {
    put(low, GDT + 0x10, 0x00af_9b00_0000_ffff);
    put(low, GDT + 0x18, 0x00cf_9300_0000_ffff);
    put(low, GDT + 0x20, 0x00cf_fb00_0000_ffff);
    put(low, GDT + 0x28, 0x00cf_f300_0000_ffff);
    put(low, GDT + 0x30, 0x00af_fb00_0000_ffff);
    for (n, d) in image.setup.segments.iter().flat_map(|s| &s.descriptors).enumerate() {
        put(low, SEGMENTS + 8 * n as u64, *d);
    }
    put(low, TSS + 4, HIGH + KERNEL_STACK_TOP);
    put(low, TSS + 0x24, HIGH + STACK_TOP);
    low[TSS as usize + 0x66] = 0x68;
    for vector in 0..32u64 {
        let stub = HANDLERS + 16 * vector;
        let at = HIGH + stub;
        // Interrupt gates with the first interrupt stack; INT3 and INTO may be used by user code, as Linux has it.
        let attributes = if vector == 3 || vector == 4 { 0xee01 } else { 0x8e01u64 };
        put(low, IDT + 16 * vector, at & 0xffff | 0x10 << 16 | attributes << 32 | (at >> 16 & 0xffff) << 48);
        put(low, IDT + 16 * vector + 8, at >> 32);
        let mut code = Vec::new();
        if WITH_ERROR >> vector & 1 == 0 {
            code.extend([0x6a, 0]);
        }
        code.extend([0x6a, vector as u8, 0xe9]);
        let next = stub + code.len() as u64 + 4;
        code.extend(((COMMON - next) as u32).to_le_bytes());
        low[stub as usize..stub as usize + code.len()].copy_from_slice(&code);
    }
    for (at, code) in
        [(COMMON, handlers::common()), (SYSCALLS[0], handlers::sysret()), (SYSCALLS[1], handlers::iret())]
    {
        low[at as usize..at as usize + code.len()].copy_from_slice(code);
    }
    put(low, PER_CPU, HIGH + KERNEL_STACK_TOP);
    put(low, COUNTER, image.setup.survive.into());
    put(low, COUNTER + 8, image.resume.wrapping_sub(image.setup.code_base()) & image.setup.pointer_mask());
}

fn registers(image: &Image<'_>) -> CpuState {
    let setup = image.setup;
    let mut s = CpuState::reset();
    let (cs, ss, dpl) = if setup.supervisor { (0x10, 0x18, 0) } else { (0x33, 0x2b, 0x60) };
    let data = Segment { selector: ss, base: 0, limit: u32::MAX, attr: Attr(0xc093 | dpl) };
    s.seg = [data; 6];
    s.seg[1] = Segment { selector: cs, attr: Attr(0xa09b | dpl), ..data };
    let null = Segment { selector: 0, base: 0, limit: 0, attr: Attr(0) };
    s.seg[4] = Segment { base: setup.bases[0], ..null };
    s.seg[5] = Segment { base: setup.bases[1], ..null };
    s.tr = Segment { selector: 0x40, base: HIGH + TSS, limit: 0x67, attr: Attr(0x8b) };
    s.gdtr = TableRegister { base: HIGH + GDT, limit: 0x7f };
    for (n, d) in setup.segments.iter().flat_map(|s| s.descriptors).enumerate() {
        let rpl = if setup.supervisor { 0 } else { 3 };
        s.seg[n] = Segment::from_descriptor(((SEGMENTS - GDT) as u16 + 8 * n as u16) | rpl, d);
    }
    s.idtr = TableRegister { base: HIGH + IDT, limit: 0x1ff };
    s.cr0 = 0x8005_0033 | u64::from(setup.task_switched) << 3;
    s.cr3 = PML4;
    s.cr4 = 0x0005_06a0 | u64::from(setup.smap) << 21;
    s.xcr0 = component_mask();
    s.msr.efer = 0xd01;
    s.msr.star = 0x0023_0010 << 32;
    s.msr.lstar = HIGH + SYSCALLS[setup.syscall];
    s.msr.sfmask = setup.sfmask;
    s.msr.kernel_gs_base = HIGH + PER_CPU;
    s.cpl = if setup.supervisor { 0 } else { 3 };
    s.gpr = image.regs.gpr;
    s.rip = image.regs.rip.wrapping_sub(setup.code_base()) & setup.pointer_mask();
    s.rflags = image.regs.rflags;
    s.fpu.0 = *image.regs.fpu;
    s
}

/// The physical address of a byte of [`Machine::snapshot`].
pub fn compared_address(mut at: usize) -> u64 {
    for (from, len) in COMPARED {
        if at < len {
            return from + at as u64;
        }
        at -= len;
    }
    0
}

/// Whether a byte is the low one of a data page's entry.
pub fn is_data_entry(address: u64) -> bool {
    address & !0xfff == PT_DATA && address & 7 == 0
}

/// Where data lies in physical memory.
pub fn data_physical(la: u64) -> Option<u64> {
    la.checked_sub(DATA).filter(|o| *o < DATA_BYTES as u64).map(|o| DATA_GPA + o)
}
