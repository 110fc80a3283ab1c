//! The interpreter's vCPU as `vector` sees it.

use x86::state::{FpuArea, sreg};
use x86::{Exception, bits::rflags};

use crate::cpu::{CodeSize, Cpu, FLAT, FLAT_STACK};
use crate::flags::LazyFlags;
use crate::vector::{Control, VectorCpu};

impl Cpu {
    /// The index of a segment for memory accesses: the flat ones in 64-bit code.
    fn access_segment(&self, segment: usize) -> u8 {
        match (self.code_size, segment) {
            (CodeSize::Bits64, sreg::SS) => FLAT_STACK,
            (CodeSize::Bits64, sreg::ES | sreg::CS | sreg::DS) => FLAT,
            #[expect(clippy::cast_possible_truncation, reason = "0 to 5")]
            _ => segment as u8 & 7,
        }
    }
}

impl VectorCpu for Cpu {
    fn gpr(&self, i: usize) -> u64 {
        self.gpr[i & 15]
    }

    fn set_gpr(&mut self, i: usize, value: u64) {
        self.gpr[i & 15] = value;
    }

    fn rflags(&self) -> u64 {
        Self::rflags(self)
    }

    fn set_status_flags(&mut self, flags: u64) {
        self.flags = LazyFlags::from_rflags(flags & rflags::STATUS);
    }

    fn fpu(&mut self) -> &mut FpuArea {
        self.fpu_touched = true;
        &mut self.s.fpu
    }

    fn control(&self) -> Control {
        Control {
            cr0: self.s.cr0,
            cr4: self.s.cr4,
            xcr0: self.s.xcr0,
            xss: self.s.msr.xss,
            efer: self.s.msr.efer,
            cpl: self.s.cpl,
            code64: self.code_size == CodeSize::Bits64,
            real_or_v86: !self.s.protected() || self.s.v86(),
            rip: self.start_rip,
        }
    }

    fn selector(&self, segment: usize) -> u16 {
        self.s.seg.get(segment).map_or(0, |s| s.selector)
    }

    fn read(&mut self, segment: usize, offset: u64, data: &mut [u8]) -> Result<(), Exception> {
        let seg = self.access_segment(segment);
        self.read_bytes(seg, offset, data)
    }

    fn write(&mut self, segment: usize, offset: u64, data: &[u8]) -> Result<(), Exception> {
        let seg = self.access_segment(segment);
        self.write_bytes(seg, offset, data)
    }

    fn probe_write(&mut self, segment: usize, offset: u64, len: usize) -> Result<(), Exception> {
        let seg = self.access_segment(segment);
        Self::probe_write(self, seg, offset, len).map(|_| ())
    }

    fn linear(&self, segment: usize, offset: u64) -> u64 {
        let seg = self.access_segment(segment);
        self.seg_base[usize::from(seg)].wrapping_add(offset) & self.linear_mask
    }
}
