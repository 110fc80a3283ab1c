//! Executes an instruction through its stub: memory operand in, registers in, call, exceptions, registers out, memory
//! operand out.

use iced_x86::MemorySize;
use x86::Exception;
use x86::bits::{cr4, rflags};
use x86::state::FpuArea;

use super::layout::{self, at};
use super::native::{self, Frame};
use super::stub::Stub;
use super::{Control, VectorCpu, VectorOp, masked};

/// An instruction with a stub.
#[derive(Debug)]
pub(super) struct Native {
    pub stub: Stub,
    pub memory: Option<Memory>,
    /// x87: the guest's FOP.
    pub fop: u16,
    /// An MMX or x87 instruction that records no instruction pointer may still have a memory operand; a real x87
    /// instruction records it as FDP.
    pub is_x87: bool,
    /// All SIMD exceptions are suppressed (EVEX.b of register forms, SDM 2A 2.7.12), as if masked.
    pub suppressed: bool,
}

/// The memory operand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    /// Bytes, 1 to 64.
    pub size: u8,
    pub read: bool,
    pub write: bool,
    /// An EVEX opmask says which elements are accessed.
    pub mask: Option<masked::ElementMask>,
}

impl Memory {
    /// Bytes of an operand of this type, if the bounce buffer holds them.
    pub fn size_of(size: MemorySize) -> Option<u8> {
        let n = if size.is_broadcast() { size.element_size() } else { size.size() };
        u8::try_from(n).ok().filter(|n| (1..=64).contains(n))
    }
}

/// Exception flags and masks of MXCSR (SDM 1 10.2.3).
const FLAGS: u32 = 0x3f;
const MASKS: u32 = 0x1f80;
const FTZ: u32 = 1 << 15;
const UNDERFLOW: u32 = 1 << 4;
/// Invalid, denormal, zero divide: found before the result is computed (SDM 1 11.5.2).
const PRE: u32 = 7;

pub(super) fn execute<C: VectorCpu>(n: &Native, op: &VectorOp, cpu: &mut C) -> Result<(), Exception> {
    let mut frame = Frame::new();
    let mut offset = 0;
    if let Some(m) = &n.memory {
        offset = op.operand(cpu)?;
        prepare_memory(n, m, op, cpu, offset, &mut frame)?;
    }
    load_gprs(n, cpu, &mut frame);
    if n.stub.x87 || n.stub.mxcsr {
        run_with_exceptions(n, op, cpu, offset, &mut frame)?;
    } else {
        native::call(&n.stub.code, &mut frame, cpu.fpu());
    }
    if let Some(m) = &n.memory
        && m.write
    {
        write_memory(n, m, op, cpu, offset, &frame)?;
    }
    store_gprs(n, cpu, &frame);
    Ok(())
}

fn prepare_memory<C: VectorCpu>(
    n: &Native,
    m: &Memory,
    op: &VectorOp,
    cpu: &mut C,
    offset: u64,
    frame: &mut Frame,
) -> Result<(), Exception> {
    let size = usize::from(m.size);
    if m.read {
        match m.mask {
            Some(mask) => mask.read(op, cpu, offset, &mut frame.bounce[..size])?,
            None => cpu.read(op.segment(), offset, &mut frame.bounce[..size])?,
        }
    }
    if m.write && (n.stub.x87 || n.stub.mxcsr) {
        match m.mask {
            Some(mask) => mask.probe_write(op, cpu, offset, size)?,
            None => cpu.probe_write(op.segment(), offset, size)?,
        }
    }
    Ok(())
}

fn write_memory<C: VectorCpu>(
    n: &Native,
    m: &Memory,
    op: &VectorOp,
    cpu: &mut C,
    offset: u64,
    frame: &Frame,
) -> Result<(), Exception> {
    // An unmasked invalid, zero-divide, overflow or underflow exception leaves memory as it is (SDM 1 8.5); it was
    // raised by this instruction, which does not execute with one pending.
    if n.is_x87 && layout::u16_at(cpu.fpu(), at::FSW) & !layout::u16_at(cpu.fpu(), at::FCW) & 0x1f != 0 {
        return Ok(());
    }
    let data = &frame.bounce[..usize::from(m.size)];
    match m.mask {
        Some(mask) => mask.write(op, cpu, offset, data),
        None => cpu.write(op.segment(), offset, data),
    }
}

fn load_gprs<C: VectorCpu>(n: &Native, cpu: &C, frame: &mut Frame) {
    for g in &n.stub.gprs {
        let value = cpu.gpr(usize::from(g.register));
        if let Some(slot) = frame.gpr.get_mut(usize::from(g.slot)) {
            *slot = if g.high { value >> 8 } else { value };
        }
    }
    if n.stub.reads_flags {
        frame.flags = cpu.rflags() & rflags::STATUS | rflags::FIXED | rflags::IF;
    }
}

fn store_gprs<C: VectorCpu>(n: &Native, cpu: &mut C, frame: &Frame) {
    for g in n.stub.gprs.iter().rev().filter(|g| g.write) {
        if let Some(&value) = frame.gpr.get(usize::from(g.slot)) {
            cpu.set_gpr(usize::from(g.register), value);
        }
    }
    if n.stub.writes_flags {
        cpu.set_status_flags(frame.flags & rflags::STATUS);
    }
}

/// Runs under the guest's rounding and x87 control, with SIMD exceptions masked; then finds out which would have been
/// raised.
fn run_with_exceptions<C: VectorCpu>(
    n: &Native,
    op: &VectorOp,
    cpu: &mut C,
    offset: u64,
    frame: &mut Frame,
) -> Result<(), Exception> {
    let control = cpu.control();
    let guest = layout::mxcsr(cpu.fpu()) & layout::layout().mxcsr_mask;
    // A mask bit that is clear while no flag of it can arise costs nothing but the copy.
    let before = (n.stub.mxcsr && !n.suppressed && guest & MASKS != MASKS).then(|| cpu.fpu().clone());
    let bounce = frame.bounce;
    let mut raised = run_once(n, op, cpu, &control, offset, frame, run_value(guest, n.suppressed));
    if let Some(before) = before {
        if guest & UNDERFLOW << 7 == 0 {
            // Unmasked underflow means "tiny", even if exact (SDM 1 4.9.1.5): flush-to-zero reports every tiny result.
            // The results are the first run's: instructions that raise no underflow are not flushed.
            let after = cpu.fpu().clone();
            *cpu.fpu() = before.clone();
            let mut again = Frame::new();
            again.bounce = bounce;
            load_gprs(n, cpu, &mut again);
            let probe = run_once(n, op, cpu, &control, offset, &mut again, run_value(guest, false) | FTZ);
            *cpu.fpu() = after;
            raised = raised & !UNDERFLOW | probe & UNDERFLOW;
        }
        let unmasked = raised & !(guest >> 7) & FLAGS;
        if unmasked != 0 {
            *cpu.fpu() = before;
            let flags = if unmasked & PRE != 0 { raised & PRE } else { raised };
            layout::set_mxcsr(cpu.fpu(), guest | flags);
            let enabled = control.cr4 & cr4::OSXMMEXCPT != 0;
            return Err(if enabled { Exception::XM } else { Exception::UD });
        }
    }
    layout::set_mxcsr(cpu.fpu(), guest | raised);
    Ok(())
}

/// MXCSR to run with: exceptions masked, no flags. Flush-to-zero works with masked underflow only (SDM 1 10.2.3.3).
const fn run_value(guest: u32, suppressed: bool) -> u32 {
    let quiet = guest & !FLAGS | MASKS;
    if guest & UNDERFLOW << 7 == 0 && !suppressed { quiet & !FTZ } else { quiet }
}

/// One call; returns the flags raised in MXCSR.
fn run_once<C: VectorCpu>(
    n: &Native,
    op: &VectorOp,
    cpu: &mut C,
    control: &Control,
    offset: u64,
    frame: &mut Frame,
    mxcsr: u32,
) -> u32 {
    let (cs, ds) = (cpu.selector(1), cpu.selector(op.segment()));
    let area = cpu.fpu();
    layout::set_mxcsr(area, mxcsr);
    if !n.stub.x87 {
        native::call(&n.stub.code, frame, area);
        return layout::mxcsr(area) & FLAGS;
    }
    layout::normalize_x87(area);
    let old = layout::bytes::<18>(area, at::FOP);
    native::call(&n.stub.code, frame, area);
    let pointers = Pointers { offset, cs, ds, code64: control.code64, rip: control.rip };
    set_pointers(n, area, old, &pointers);
    layout::mxcsr(area) & FLAGS
}

struct Pointers {
    offset: u64,
    cs: u16,
    ds: u16,
    code64: bool,
    rip: u64,
}

/// Records the guest's instruction and data pointer (SDM 1 8.1.8); hosts differ in when they save theirs, and theirs are
/// the stub's anyway. FCS and FDS are kept outside 64-bit mode only, in the 32-bit layout of FXSAVE. The opcode is
/// recorded with an unmasked exception only (SDM 1 8.1.9).
fn set_pointers(n: &Native, area: &mut FpuArea, old: [u8; 18], p: &Pointers) {
    layout::put(area, at::FOP, &old);
    if !n.is_x87 {
        return;
    }
    if layout::x87_pending(area) {
        layout::put(area, at::FOP, &n.fop.to_le_bytes());
    }
    let far = |offset: u64, selector: u16| {
        if p.code64 { offset } else { offset & 0xffff_ffff | u64::from(selector) << 32 }
    };
    layout::put(area, at::FIP, &far(p.rip, p.cs).to_le_bytes());
    if n.memory.is_some() {
        layout::put(area, at::FDP, &far(p.offset, p.ds).to_le_bytes());
    }
}
