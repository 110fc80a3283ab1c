//! A stack that is being written before it becomes the current one: interrupt and call frames.

use guestmem::Scalar;
use x86::paging::{Access, AccessKind};
use x86::{Exception, Segment};

use crate::cpu::Cpu;

/// Pushes to `ss:sp` with the rights of level `cpl`, without touching the registers until the caller commits.
pub struct Frame {
    /// The stack segment.
    pub ss: Segment,
    /// The stack pointer so far.
    pub sp: u64,
    /// Stack addresses are cut to this.
    pub mask: u64,
    /// In 64-bit mode there is no segment check.
    pub long: bool,
    /// Level that the accesses are made with.
    pub cpl: u8,
    /// Error code of #SS: 0 for the current stack, the selector for one that is being loaded.
    pub error: u16,
}

impl Frame {
    /// The current stack.
    pub fn current(cpu: &Cpu) -> Self {
        let long = cpu.code_size == crate::cpu::CodeSize::Bits64;
        Self {
            ss: cpu.s.seg[x86::state::sreg::SS],
            sp: cpu.gpr[4],
            mask: cpu.stack_mask,
            long,
            cpl: cpu.cpl(),
            error: cpu.ext,
        }
    }

    /// A stack in 64-bit mode.
    pub const fn long(ss: Segment, sp: u64, cpl: u8, ext: u16) -> Self {
        Self { ss, sp, mask: u64::MAX, long: true, cpl, error: ext }
    }

    /// A stack of a segment that is about to be loaded.
    pub fn new(cpu: &Cpu, ss: Segment, sp: u64, cpl: u8) -> Self {
        let mask = if ss.attr.db() { 0xffff_ffff } else { 0xffff };
        Self { ss, sp, mask, long: false, cpl, error: cpu.selector_error(ss.selector) }
    }

    fn linear(&self, offset: u64, size: usize) -> Result<u64, Exception> {
        let fault = Exception::ss(self.error);
        let last = offset.wrapping_add(size as u64 - 1);
        if self.long {
            let ok = x86::bits::is_canonical(offset) && x86::bits::is_canonical(last);
            return if ok { Ok(offset) } else { Err(fault) };
        }
        let limit = u64::from(self.ss.limit);
        let ok =
            if self.ss.attr.is_expand_down() { offset > limit && last <= self.mask } else { last <= limit };
        if ok { Ok(self.ss.base.wrapping_add(offset) & 0xffff_ffff) } else { Err(fault) }
    }

    const fn access(&self, kind: AccessKind) -> Access {
        Access { kind, user: self.cpl == 3, ac: false }
    }

    /// Pushes an item.
    pub fn push<T: Scalar>(&mut self, cpu: &mut Cpu, value: u64) -> Result<(), Exception> {
        let to = self.sp.wrapping_sub(T::SIZE as u64) & self.mask;
        let la = self.linear(to, T::SIZE)?;
        cpu.linear_write(la, T::from_u64(value), self.access(AccessKind::Write))?;
        self.sp = self.sp & !self.mask | to;
        Ok(())
    }

    /// Pushes an item of 2, 4 or 8 bytes.
    pub fn push_sized(&mut self, cpu: &mut Cpu, bytes: u64, value: u64) -> Result<(), Exception> {
        match bytes {
            2 => self.push::<u16>(cpu, value),
            4 => self.push::<u32>(cpu, value),
            _ => self.push::<u64>(cpu, value),
        }
    }

    /// Pops an item of 2, 4 or 8 bytes.
    pub fn pop_sized(&mut self, cpu: &mut Cpu, bytes: u64) -> Result<u64, Exception> {
        let from = self.sp & self.mask;
        #[expect(clippy::cast_possible_truncation, reason = "2, 4 or 8")]
        let la = self.linear(from, bytes as usize)?;
        let access = self.access(AccessKind::Read);
        let value = match bytes {
            2 => u64::from(cpu.linear_read::<u16>(la, access)?),
            4 => u64::from(cpu.linear_read::<u32>(la, access)?),
            _ => cpu.linear_read(la, access)?,
        };
        self.sp = self.sp & !self.mask | self.sp.wrapping_add(bytes) & self.mask;
        Ok(value)
    }
}
