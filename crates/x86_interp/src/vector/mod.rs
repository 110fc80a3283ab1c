//! x87, MMX, SSE to AVX-512, AES, SHA and their kin, and the scalar extensions that are not worth writing by hand
//! (POPCNT, BMI, ADX, CRC32, …): one guest instruction at a time, executed by the host.
//!
//! The way of an instruction: [`prepare`] resolves it once to a [`VectorOp`]: what gates it ([`check`]), where its
//! memory operand lies ([`address`]) and how it is done. The commonest moves and integer operations are plain Rust
//! on the area's bytes ([`fast`], [`scalar`]); whatever moves state as such (FXSAVE, XSAVE, FNSTENV: [`xsave`], [`x87`]), and
//! gathers, scatters and masked moves ([`masked`], [`gather`]) are Rust too; the rest is a stub ([`stub`]) that loads
//! the registers it names, executes the instruction itself with its memory operand in a bounce buffer, and stores what
//! it wrote ([`run`], [`native`]). So fidelity is the host's own.
//!
//! Invariants: INV-VEC-1 (a stub is harmless: [`stub`]), INV-VEC-2 (the area's contents are always whole, its header
//! means nothing: [`layout`]), INV-VEC-3 (a handle is valid for one generation of one thread: [`native`]). Guest MXCSR
//! and x87 control word are never in force while Rust runs. No instruction changes state when it raises an exception,
//! but gathers and scatters, whose completed elements stay done (SDM 2C VGATHERDPS).
//!
//! Threads: a [`VectorOp`] may be used by any thread; code memory is the thread's own. Cost here: about 20 ns a stub, 130 ns
//! with x87 state, 8 ns a fast one (`tests::hostile::cost_of_typical_instructions` prints it).

mod address;
mod check;
mod classify;
mod fast;
mod gather;
mod host;
mod layout;
mod masked;
mod native;
mod run;
mod scalar;
mod stub;
mod x87;
mod xsave;

#[cfg(test)]
mod tests;

use iced_x86::Instruction;
use x86::Exception;
use x86::state::FpuArea;

use address::Address;
use check::Class;
pub use layout::{exceptions_masked, host_components, prepare_restore, upper_registers};
pub use native::warm_up;
pub use xsave::{CompactedPiece, compacted_pieces, xgetbv1};

/// What this module must know of control registers and mode.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Control {
    /// CR0.
    pub cr0: u64,
    /// CR4.
    pub cr4: u64,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// Privilege level, 0 to 3.
    pub cpl: u8,
    /// In 64-bit code, not in compatibility or legacy mode.
    pub code64: bool,
    /// In real-address or virtual-8086 mode.
    pub real_or_v86: bool,
    /// Offset of this instruction in CS.
    pub rip: u64,
}

/// A vCPU as this module sees it.
pub trait VectorCpu {
    /// General register `i` (0 to 15), all 64 bits.
    fn gpr(&self, i: usize) -> u64;
    /// Sets general register `i` (0 to 15), all 64 bits.
    fn set_gpr(&mut self, i: usize, value: u64);
    /// RFLAGS.
    fn rflags(&self) -> u64;
    /// Sets CF, PF, AF, ZF, SF and OF from these bits of `flags`, and nothing else.
    fn set_status_flags(&mut self, flags: u64);
    /// FP and SIMD state.
    fn fpu(&mut self) -> &mut FpuArea;
    /// Control registers and mode.
    fn control(&self) -> Control;
    /// Selector of segment register `segment` (ES 0 to GS 5).
    fn selector(&self, segment: usize) -> u16;
    /// Reads `data.len()` bytes (at most 4096) through segment and paging; may cross a page.
    ///
    /// # Errors
    /// The exception that the access raises.
    fn read(&mut self, segment: usize, offset: u64, data: &mut [u8]) -> Result<(), Exception>;
    /// Writes `data` (at most 4096 bytes): all of it, or nothing and an exception.
    ///
    /// # Errors
    /// The exception that the access raises.
    fn write(&mut self, segment: usize, offset: u64, data: &[u8]) -> Result<(), Exception>;
    /// Raises what a write of `len` bytes would raise.
    ///
    /// # Errors
    /// The exception that the access raises.
    fn probe_write(&mut self, segment: usize, offset: u64, len: usize) -> Result<(), Exception>;
    /// The linear address, for checks of alignment.
    fn linear(&self, segment: usize, offset: u64) -> u64;
}

/// An instruction of this module, resolved. Made once per decoded instruction.
#[derive(Debug)]
pub struct VectorOp {
    class: Class,
    /// Length of the instruction in bytes.
    len: u8,
    /// The memory operand must be aligned to this many bytes (1: need not), else #GP(0).
    align: u8,
    /// The alignment is not asked for when MXCSR.MM is set (AMD's misaligned SSE mode, APM 1 4.3.2).
    align_unless_mm: bool,
    address: Address,
    kind: Kind,
}

/// How an instruction is done.
#[derive(Debug)]
enum Kind {
    Undefined,
    Nop,
    Fast(fast::Fast),
    Scalar(scalar::Scalar),
    Native(Box<run::Native>),
    X87(x87::X87),
    Xsave(xsave::Xsave),
    Gather(Box<gather::Gather>),
    Masked(Box<masked::Masked>),
    ZeroUpper,
    ZeroAll,
}

/// Resolves `instruction`. None: not an instruction of this module. One that the host cannot execute raises #UD when
/// executed.
#[must_use]
pub fn prepare(instruction: &Instruction) -> Option<VectorOp> {
    classify::prepare(instruction)
}

/// Executes the instruction. Does not advance RIP.
///
/// # Errors
/// The exception it raises; state is then as before (see the module's doc for gathers).
#[inline]
pub fn execute<C: VectorCpu>(op: &VectorOp, cpu: &mut C) -> Result<(), Exception> {
    if let Kind::Undefined = op.kind {
        return Err(Exception::UD);
    }
    check::check(op.class, cpu)?;
    match &op.kind {
        Kind::Fast(f) => fast::execute(*f, op, cpu),
        Kind::Scalar(s) => scalar::execute(*s, op, cpu),
        Kind::Native(n) => run::execute(n, op, cpu),
        Kind::X87(x) => x87::execute(*x, op, cpu),
        Kind::Xsave(x) => xsave::execute(*x, op, cpu),
        Kind::Gather(g) => gather::execute(g, op, cpu),
        Kind::Masked(m) => masked::execute(m, op, cpu),
        Kind::ZeroUpper | Kind::ZeroAll => {
            zero_registers(cpu, matches!(op.kind, Kind::ZeroAll));
            Ok(())
        }
        Kind::Nop | Kind::Undefined => Ok(()),
    }
}

/// VZEROUPPER and VZEROALL: registers 0 to 15, in other modes 0 to 7 (SDM 2C).
fn zero_registers<C: VectorCpu>(cpu: &mut C, all: bool) {
    let count = if cpu.control().code64 { 16 } else { 8 };
    for i in 0..count {
        if all {
            layout::set_vector(cpu.fpu(), i, &[0; 16], true);
        } else {
            layout::zero_above_128(cpu.fpu(), i);
        }
    }
}

impl VectorOp {
    /// The offset of the memory operand in its segment, with its alignment checked.
    #[inline(always)]
    fn operand<C: VectorCpu>(&self, cpu: &mut C) -> Result<u64, Exception> {
        let offset = self.address.offset(cpu, self.len);
        if self.align > 1 {
            let misaligned = cpu.linear(self.segment(), offset) & u64::from(self.align - 1) != 0;
            if misaligned && !(self.align_unless_mm && layout::mxcsr(cpu.fpu()) & 1 << 17 != 0) {
                return Err(Exception::GP0);
            }
        }
        Ok(offset)
    }

    #[inline(always)]
    fn segment(&self) -> usize {
        usize::from(self.address.segment)
    }
}
