//! One vCPU as the interpreter holds it: the architectural state in the form in which it is fastest to use, and what
//! is derived from it.

use std::sync::Arc;

use engine::{CpuIo, ExitStats, Signals};
use guestmem::GuestMemory;
use iced_x86::Instruction;
use x86::bits::{cr0, cr4, dr, rflags};
use x86::cpuid::CpuModel;
use x86::paging::Paging;
use x86::state::{Activity, InterruptShadow, sreg};
use x86::{CpuState, Exception, Segment};

use crate::census::Census;
use crate::debug::DebugState;
use crate::flags::LazyFlags;
use crate::holder::VcpuHolder;
use crate::intercept::Intercepts;
use crate::tlb::Tlb;
use crate::vector::VectorOp;

/// Index in [`Cpu::gpr`] of a register that is always zero: addresses without base or index use it.
pub const ZERO: u8 = 16;
/// Index in [`Cpu::gpr`] of RIP at the first byte of the page that executes: the base of RIP-relative addresses.
pub const PAGE_RIP: u8 = 17;
/// Segment index of flat 64-bit data accesses (base 0, no limit).
pub const FLAT: u8 = 6;
/// Segment index of flat 64-bit stack accesses: as [`FLAT`], but a non-canonical address is #SS.
pub const FLAT_STACK: u8 = 7;

/// Why an instruction does not simply fall through to the next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// A control transfer: [`Cpu::rip`] is the target. The instruction is complete.
    Jump,
    /// Complete, but something changed that the run depends on (mode, code bytes, signals): start a new run at
    /// [`Cpu::rip`].
    Resync,
    /// Complete and falls through, but code was written: start a new run at the next instruction.
    CodeWritten,
    /// Not complete, to be executed again later (an interruptible string instruction).
    Again,
    /// The end of the decoded run, not an instruction: [`Cpu::rip`] is the next.
    EndOfRun,
    /// A fault: the instruction had no effect.
    Fault(Exception),
}

impl From<Exception> for Stop {
    fn from(e: Exception) -> Self {
        Self::Fault(e)
    }
}

/// Result of one instruction.
pub type Step = Result<(), Stop>;

/// Default operand and address size of the code segment.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CodeSize {
    /// Real, V86, 16-bit protected.
    Bits16,
    /// 32-bit protected, compatibility.
    Bits32,
    /// 64-bit.
    Bits64,
}

impl CodeSize {
    /// 16, 32 or 64.
    pub const fn bits(self) -> u32 {
        match self {
            Self::Bits16 => 16,
            Self::Bits32 => 32,
            Self::Bits64 => 64,
        }
    }
}

/// One vCPU. Handlers of instructions take `&mut Cpu`; the decoded code lives outside of it.
pub struct Cpu {
    /// RAX…R15, then [`ZERO`] and [`PAGE_RIP`]; 32 entries so that a masked index needs no bounds check.
    pub gpr: [u64; 32],
    /// Arithmetic flags.
    pub flags: LazyFlags,
    /// RFLAGS without the arithmetic flags.
    pub system_flags: u64,
    /// The next instruction's RIP, exact whenever a run starts and in system instructions.
    pub rip: u64,
    /// RIP of the current instruction, exact in system instructions only.
    pub start_rip: u64,
    /// Everything else. `s.gpr`, `s.rip` and `s.rflags` are stale here; [`Cpu::save`] fills them in.
    pub s: CpuState,

    /// Linear bases, by segment index; those of ES, CS, SS, DS count as 0 in 64-bit code.
    pub seg_base: [u64; 8],
    /// Reads (bit 0) and writes (bit 1) need no segment check.
    pub seg_fast: [u8; 8],
    /// Linear addresses are cut to this: 32 bits outside of 64-bit code.
    pub linear_mask: u64,
    /// Stack addresses are cut to this.
    pub stack_mask: u64,
    /// Size of the running code.
    pub code_size: CodeSize,
    /// Which rights accesses have: 0 supervisor, 1 supervisor with AC, 2 user.
    pub variant: usize,
    /// What the walk needs.
    pub paging: Paging,
    /// Signals that can be acted on now.
    pub poll_mask: u32,

    /// The software TLB.
    pub tlb: Tlb,
    /// Guest memory.
    pub mem: Arc<GuestMemory>,
    /// The machine.
    pub io: Arc<dyn CpuIo>,
    /// What the outside says.
    pub signals: Arc<Signals>,
    /// Our end of the invalidation protocol.
    pub holder: Arc<VcpuHolder>,
    /// What CPUID announces.
    pub model: Arc<CpuModel>,
    /// This vCPU's number.
    pub index: usize,
    /// How many there are.
    pub vcpus: usize,
    /// Counted events.
    pub stats: ExitStats,
    /// Instructions completed before the current run.
    pub instructions: u64,
    /// Counts what a hypervisor on hardware would do, if somebody wants to know.
    pub census: Option<Box<Census>>,
    /// Entries that the last walk read, while there is a census.
    pub last_steps: u64,
    /// Events that somebody wants to see before they take effect.
    pub intercepts: Intercepts,

    /// EXT bit of error codes, set while an event is delivered.
    pub ext: u16,
    /// A write of the current instruction hit decoded code.
    pub code_written: bool,
    /// Some write hit decoded code since another engine last looked.
    pub code_changed: bool,
    /// Something may have changed [`CpuState::fpu`] since another engine last looked.
    pub fpu_touched: bool,
    /// Something that CPUID tells may have changed since another engine last looked: CR4, XCR0, IA32_XSS, IA32_APIC_BASE.
    pub cpuid_changed: bool,
    /// The current instruction delivered an interrupt itself, so the single-step trap does not follow it.
    pub trap_suppressed: bool,
    /// Debug conditions of the current instruction (DR6 bits), delivered after it.
    pub pending_debug: u64,
    /// What a debugger outside of the guest wants.
    pub debug: DebugState,
    /// Instructions whose handlers need the decoded form.
    pub instruction_slab: Vec<Instruction>,
    /// Instructions executed natively.
    pub vector_slab: Vec<VectorOp>,
    /// The guest's RAM pages for which kvmclock is updated (the structure's version counter).
    pub kvmclock_version: u32,
}

impl Cpu {
    /// The full RFLAGS.
    pub fn rflags(&self) -> u64 {
        self.system_flags | self.flags.to_rflags()
    }

    /// Sets RFLAGS as a whole; the caller has checked which bits may change.
    pub fn set_rflags(&mut self, value: u64) {
        self.flags = LazyFlags::from_rflags(value);
        self.system_flags = value & rflags::ALL & !rflags::STATUS | rflags::FIXED;
        self.s.rflags = self.system_flags;
        self.derive_variant();
        self.derive_poll_mask();
    }

    /// Whether a bit of the system flags is set.
    #[inline(always)]
    pub const fn system_flag(&self, flag: u64) -> bool {
        self.system_flags & flag != 0
    }

    /// I/O privilege level.
    pub const fn iopl(&self) -> u8 {
        (self.system_flags >> 12 & 3) as u8
    }

    /// The architectural state, complete.
    pub fn save(&self) -> CpuState {
        let mut s = self.s.clone();
        s.gpr.copy_from_slice(&self.gpr[..16]);
        s.rip = self.rip;
        s.rflags = self.rflags();
        s
    }

    /// Takes on a state and derives everything anew.
    pub fn load(&mut self, state: &CpuState) {
        self.s = state.clone();
        self.gpr = [0; 32];
        self.gpr[..16].copy_from_slice(&state.gpr);
        self.rip = state.rip;
        self.start_rip = state.rip;
        self.code_written = false;
        self.fpu_touched = true;
        self.cpuid_changed = true;
        self.pending_debug = 0;
        self.set_rflags(state.rflags);
        self.derive_all();
        self.tlb.flush_all();
    }

    /// Privilege level of the running code.
    #[inline(always)]
    pub const fn cpl(&self) -> u8 {
        self.s.cpl
    }

    /// Sets the privilege level.
    pub fn set_cpl(&mut self, cpl: u8) {
        self.s.cpl = cpl;
        self.derive_variant();
    }

    /// After anything that the derived fields depend on.
    pub fn derive_all(&mut self) {
        self.derive_paging();
        self.derive_segments();
        self.derive_variant();
        self.derive_poll_mask();
    }

    /// After CR0, CR3, CR4, EFER or the PDPTEs changed.
    pub fn derive_paging(&mut self) {
        self.s.rflags = self.system_flags;
        self.paging =
            Paging::new(&self.s, self.model.phys_bits(), self.model.has(x86::cpuid::Feature::Pdpe1gb));
        self.derive_variant();
    }

    /// After a segment register, CR0.PE, EFER.LMA or RFLAGS.VM changed.
    pub fn derive_segments(&mut self) {
        self.s.rflags = self.system_flags;
        let cs = self.s.seg[sreg::CS];
        self.code_size = if self.s.code64() {
            CodeSize::Bits64
        } else if cs.attr.db() && self.s.protected() && !self.s.v86() || cs.attr.db() {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        };
        let long = self.code_size == CodeSize::Bits64;
        self.linear_mask = if long { u64::MAX } else { 0xffff_ffff };
        self.stack_mask = if long {
            u64::MAX
        } else if self.s.seg[sreg::SS].attr.db() {
            0xffff_ffff
        } else {
            0xffff
        };
        for i in 0..6 {
            let seg = self.s.seg[i];
            let flat = long && i != sreg::FS && i != sreg::GS;
            self.seg_base[i] = if flat { 0 } else { seg.base };
            self.seg_fast[i] = if long { 3 } else { self.fast_rights(i, &seg) };
        }
        self.seg_base[usize::from(FLAT)] = 0;
        self.seg_base[usize::from(FLAT_STACK)] = 0;
        self.seg_fast[usize::from(FLAT)] = 3;
        self.seg_fast[usize::from(FLAT_STACK)] = 3;
    }

    /// Which accesses through a segment need no check: those to present, flat 4-GiB segments of the right type.
    fn fast_rights(&self, index: usize, seg: &Segment) -> u8 {
        let attr = seg.attr;
        if seg.limit != u32::MAX || !attr.present() || attr.is_expand_down() {
            return 0;
        }
        let real = !self.s.protected() || self.s.v86();
        let read = real || attr.is_readable();
        let write = (real && index != sreg::CS) || attr.is_writable();
        u8::from(read) | u8::from(write) << 1
    }

    /// After CPL, RFLAGS.AC, CR0.AM, CR4.SMAP or DR7 changed.
    pub fn derive_variant(&mut self) {
        let ac = self.system_flag(rflags::AC);
        self.variant = if self.s.cpl == 3 { 2 } else { usize::from(self.s.cr4 & cr4::SMAP != 0 && ac) };
        let slow = self.alignment_checked() || self.data_breakpoints_armed() || self.debug.watches();
        self.tlb.force_slow(slow);
    }

    /// Unaligned accesses raise #AC (SDM 3A 6.15).
    pub fn alignment_checked(&self) -> bool {
        self.s.cpl == 3 && self.system_flag(rflags::AC) && self.s.cr0 & cr0::AM != 0
    }

    /// A data or I/O breakpoint is enabled in DR7.
    pub const fn data_breakpoints_armed(&self) -> bool {
        let dr7 = self.s.dr7;
        let mut i = 0;
        while i < 4 {
            if dr7 >> (2 * i) & 3 != 0 && dr7 >> (16 + 4 * i) & 3 != 0 {
                return true;
            }
            i += 1;
        }
        false
    }

    /// The code at RIP may not be translated, nor run without a look at each boundary: [`Cpu::stepwise`], or breakpoints of
    /// a debugger somewhere.
    #[inline(always)]
    pub fn careful(&self) -> bool {
        self.debug.is_armed() || self.stepwise()
    }

    /// Instructions have to be executed one at a time: single step, breakpoints of the guest, watchpoints, a shadow that
    /// ends.
    #[inline(always)]
    pub fn stepwise(&self) -> bool {
        self.system_flags & (rflags::TF | rflags::RF) != 0
            || self.s.dr7 & dr::DR7_ENABLES != 0
            || self.s.shadow != InterruptShadow::None
            || self.pending_debug != 0
            || self.debug.is_stepwise()
    }

    /// After RFLAGS.IF, the interrupt shadow, NMI blocking or the activity changed.
    pub fn derive_poll_mask(&mut self) {
        use engine::signals::Signal;
        let mut mask = Signal::INIT.0 | Signal::KICK.0 | Signal::INVALIDATE.0;
        if self.s.activity == Activity::WaitForSipi {
            mask |= Signal::SIPI.0;
        } else if self.s.activity != Activity::Shutdown {
            if self.system_flag(rflags::IF) && self.s.shadow == InterruptShadow::None {
                mask |= Signal::INTERRUPT.0;
            }
            if !self.s.nmi_blocked && self.s.shadow != InterruptShadow::MovSs {
                mask |= Signal::NMI.0;
            }
        }
        if self.debug.holds_interrupts() && self.s.activity == Activity::Running {
            mask &= !(Signal::INTERRUPT.0 | Signal::NMI.0);
        }
        self.poll_mask = mask;
    }

    /// Whether a signal waits that can be acted on.
    #[inline(always)]
    pub fn poll(&self) -> bool {
        self.signals.pending() & self.poll_mask != 0
    }

    /// A near jump: checks the target and makes it the next RIP (SDM 2A JMP).
    #[inline(always)]
    pub fn jump(&mut self, target: u64) -> Step {
        if self.code_size == CodeSize::Bits64 {
            if !x86::bits::is_canonical(target) {
                return Err(Exception::GP0.into());
            }
        } else if target > u64::from(self.s.seg[sreg::CS].limit) {
            return Err(Exception::GP0.into());
        }
        self.rip = target;
        Err(Stop::Jump)
    }

    /// What a handler that wrote memory ends with.
    #[inline(always)]
    pub const fn wrote(&self) -> Step {
        if self.code_written { Err(Stop::CodeWritten) } else { Ok(()) }
    }

    /// The guest's time-stamp counter.
    pub fn tsc(&self) -> u64 {
        self.io.tsc().wrapping_add(self.s.msr.tsc_offset)
    }
}
