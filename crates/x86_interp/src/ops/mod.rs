//! The instructions that are executed by hand-written code: one generic handler per operation, made concrete for
//! each operand width and form. `decode::build` picks the handler once, when an instruction is decoded.

pub mod alu;
pub mod bits;
pub mod branch;
pub mod legacy;
pub mod mov;
pub mod mul_div;
pub mod shift;
pub mod stack;
pub mod string;

use guestmem::Scalar;
use x86::Exception;

use crate::cpu::{Cpu, PAGE_RIP, Step};
use crate::flags::LazyFlags;

/// Executes one decoded instruction.
pub type Handler = fn(&mut Cpu, &Op) -> Step;

/// A decoded instruction: the handler and what it needs.
#[derive(Clone, Copy)]
pub struct Op {
    /// Who executes it.
    pub run: Handler,
    /// Immediate, branch target relative to the page, or an index into a slab.
    pub imm: u64,
    /// Displacement of the memory operand.
    pub disp: u64,
    /// The effective address (of a branch: the target) is cut to this.
    pub amask: u64,
    /// Offset of the first byte in its page.
    pub ip: u16,
    /// Length in bytes.
    pub len: u8,
    /// First register operand (8-bit AH…BH are 20…23).
    pub a: u8,
    /// Second register operand.
    pub b: u8,
    /// Base register of the memory operand, or ZERO, or PAGE_RIP.
    pub base: u8,
    /// Index register, or ZERO.
    pub index: u8,
    /// log2 of the index's factor.
    pub scale: u8,
    /// Segment index (see `cpu::FLAT`).
    pub seg: u8,
    /// What the handler makes of it: a condition, a prefix.
    pub extra: u8,
}

impl Op {
    /// Effective address of the memory operand.
    #[inline(always)]
    pub fn ea(&self, cpu: &Cpu) -> u64 {
        let base = cpu.gpr[usize::from(self.base & 31)];
        let index = cpu.gpr[usize::from(self.index & 31)];
        base.wrapping_add(index << (self.scale & 3)).wrapping_add(self.disp) & self.amask
    }

    /// RIP of this instruction.
    #[inline(always)]
    pub fn rip(&self, cpu: &Cpu) -> u64 {
        cpu.gpr[usize::from(PAGE_RIP)].wrapping_add(u64::from(self.ip)) & cpu.linear_mask
    }

    /// RIP of the next instruction.
    #[inline(always)]
    pub fn next_rip(&self, cpu: &Cpu) -> u64 {
        let end = u64::from(self.ip) + u64::from(self.len);
        cpu.gpr[usize::from(PAGE_RIP)].wrapping_add(end) & cpu.linear_mask
    }

    /// Target of a direct branch.
    #[inline(always)]
    pub fn target(&self, cpu: &Cpu) -> u64 {
        cpu.gpr[usize::from(PAGE_RIP)].wrapping_add(self.imm) & self.amask
    }
}

/// An operand width.
pub trait Width: 'static {
    /// The memory type.
    type T: Scalar;
    /// Width in bits.
    const BITS: u32;
    /// 64 minus the width.
    const SHIFT: u32 = 64 - Self::BITS;
    /// The low bits.
    const MASK: u64 = u64::MAX >> Self::SHIFT;
    /// Width in bytes.
    const BYTES: usize = (Self::BITS / 8) as usize;
    /// Reads a register, zero-extended.
    fn get(cpu: &Cpu, r: u8) -> u64;
    /// Writes a register's low part (32-bit writes clear the upper half: SDM 1 3.4.1.1).
    fn set(cpu: &mut Cpu, r: u8, value: u64);
}

/// 8 bits.
pub struct W8;
/// 16 bits.
pub struct W16;
/// 32 bits.
pub struct W32;
/// 64 bits.
pub struct W64;

impl Width for W8 {
    type T = u8;
    const BITS: u32 = 8;
    #[inline(always)]
    fn get(cpu: &Cpu, r: u8) -> u64 {
        if r < 16 { cpu.gpr[usize::from(r)] & 0xff } else { cpu.gpr[usize::from(r & 3)] >> 8 & 0xff }
    }
    #[inline(always)]
    fn set(cpu: &mut Cpu, r: u8, value: u64) {
        if r < 16 {
            let g = &mut cpu.gpr[usize::from(r)];
            *g = *g & !0xff | value & 0xff;
        } else {
            let g = &mut cpu.gpr[usize::from(r & 3)];
            *g = *g & !0xff00 | (value & 0xff) << 8;
        }
    }
}

impl Width for W16 {
    type T = u16;
    const BITS: u32 = 16;
    #[inline(always)]
    fn get(cpu: &Cpu, r: u8) -> u64 {
        cpu.gpr[usize::from(r & 31)] & 0xffff
    }
    #[inline(always)]
    fn set(cpu: &mut Cpu, r: u8, value: u64) {
        let g = &mut cpu.gpr[usize::from(r & 31)];
        *g = *g & !0xffff | value & 0xffff;
    }
}

impl Width for W32 {
    type T = u32;
    const BITS: u32 = 32;
    #[inline(always)]
    fn get(cpu: &Cpu, r: u8) -> u64 {
        cpu.gpr[usize::from(r & 31)] & 0xffff_ffff
    }
    #[inline(always)]
    fn set(cpu: &mut Cpu, r: u8, value: u64) {
        cpu.gpr[usize::from(r & 31)] = value & 0xffff_ffff;
    }
}

impl Width for W64 {
    type T = u64;
    const BITS: u32 = 64;
    #[inline(always)]
    fn get(cpu: &Cpu, r: u8) -> u64 {
        cpu.gpr[usize::from(r & 31)]
    }
    #[inline(always)]
    fn set(cpu: &mut Cpu, r: u8, value: u64) {
        cpu.gpr[usize::from(r & 31)] = value;
    }
}

/// Where a source operand comes from.
pub trait Source: 'static {
    /// Its value, zero-extended.
    fn load<W: Width>(cpu: &mut Cpu, op: &Op) -> Result<u64, Exception>;
}

/// Register `b`.
pub struct RegB;
/// Register `a` (a single register operand).
pub struct RegA;
/// The immediate.
pub struct Imm;
/// The memory operand.
pub struct Mem;

impl Source for RegB {
    #[inline(always)]
    fn load<W: Width>(cpu: &mut Cpu, op: &Op) -> Result<u64, Exception> {
        Ok(W::get(cpu, op.b))
    }
}
impl Source for RegA {
    #[inline(always)]
    fn load<W: Width>(cpu: &mut Cpu, op: &Op) -> Result<u64, Exception> {
        Ok(W::get(cpu, op.a))
    }
}
impl Source for Imm {
    #[inline(always)]
    fn load<W: Width>(_: &mut Cpu, op: &Op) -> Result<u64, Exception> {
        Ok(op.imm & W::MASK)
    }
}
impl Source for Mem {
    #[inline(always)]
    fn load<W: Width>(cpu: &mut Cpu, op: &Op) -> Result<u64, Exception> {
        let ea = op.ea(cpu);
        cpu.read::<W::T>(op.seg, ea).map(Scalar::to_u64)
    }
}

/// Where a result goes that depends on the old value there.
pub trait Dest: 'static {
    /// Replaces the value by what `f` makes of it (the old value, masked, and the flags before), and the flags.
    fn modify<W: Width>(cpu: &mut Cpu, op: &Op, f: impl Fn(u64, LazyFlags) -> (u64, LazyFlags)) -> Step;
}

/// The memory operand under a LOCK prefix.
pub struct Locked;

impl Dest for RegA {
    #[inline(always)]
    fn modify<W: Width>(cpu: &mut Cpu, op: &Op, f: impl Fn(u64, LazyFlags) -> (u64, LazyFlags)) -> Step {
        let (value, flags) = f(W::get(cpu, op.a), cpu.flags);
        W::set(cpu, op.a, value);
        cpu.flags = flags;
        Ok(())
    }
}

impl Dest for Mem {
    #[inline(always)]
    fn modify<W: Width>(cpu: &mut Cpu, op: &Op, f: impl Fn(u64, LazyFlags) -> (u64, LazyFlags)) -> Step {
        let ea = op.ea(cpu);
        let place = cpu.place(op.seg, ea, W::BYTES)?;
        let old: W::T = cpu.place_load(&place);
        let (value, flags) = f(old.to_u64(), cpu.flags);
        cpu.place_store(&place, W::T::from_u64(value));
        cpu.flags = flags;
        cpu.wrote()
    }
}

impl Dest for Locked {
    fn modify<W: Width>(cpu: &mut Cpu, op: &Op, f: impl Fn(u64, LazyFlags) -> (u64, LazyFlags)) -> Step {
        let ea = op.ea(cpu);
        let place = cpu.place(op.seg, ea, W::BYTES)?;
        let mut old: W::T = cpu.place_load(&place);
        loop {
            let (value, flags) = f(old.to_u64(), cpu.flags);
            let found = cpu.place_cmpxchg(&place, old, W::T::from_u64(value));
            if found == old {
                cpu.flags = flags;
                return cpu.wrote();
            }
            old = found;
        }
    }
}

/// Picks the instance of a generic handler for a width in bits.
macro_rules! by_width {
    ($bits:expr, $f:ident $(, $g:ty)*) => {
        match $bits {
            8 => $f::<$crate::ops::W8 $(, $g)*> as $crate::ops::Handler,
            16 => $f::<$crate::ops::W16 $(, $g)*>,
            32 => $f::<$crate::ops::W32 $(, $g)*>,
            _ => $f::<$crate::ops::W64 $(, $g)*>,
        }
    };
}
pub(crate) use by_width;

/// Picks the instance of a generic handler for a width of 16, 32 or 64 bits.
macro_rules! by_word_width {
    ($bits:expr, $f:ident $(, $g:ty)*) => {
        match $bits {
            16 => $f::<$crate::ops::W16 $(, $g)*> as $crate::ops::Handler,
            32 => $f::<$crate::ops::W32 $(, $g)*>,
            _ => $f::<$crate::ops::W64 $(, $g)*>,
        }
    };
}
pub(crate) use by_word_width;

/// How an instruction's first two operands lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// Register only.
    R,
    /// Memory only.
    M,
    /// Immediate only.
    I,
    /// Register, register.
    RR,
    /// Register, memory.
    RM,
    /// Memory, register.
    MR,
    /// Register, immediate.
    RI,
    /// Memory, immediate.
    MI,
    /// None, or something else.
    Other,
}
