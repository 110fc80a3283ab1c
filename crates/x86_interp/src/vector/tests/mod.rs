//! Tests of this module: against the host, executed another way (`differential`), and against the manuals
//! (`exceptions`, `state`), and with nonsense (`hostile`).

mod differential;
mod exceptions;
mod hostile;
mod oracle;
mod state;

use iced_x86::{Decoder, DecoderOptions, Instruction};
use x86::Exception;
use x86::bits::{cr0, cr4, rflags};
use x86::state::FpuArea;

use super::{Control, VectorCpu, execute, prepare};

/// Pages of memory.
const PAGES: usize = 4;
const PAGE: usize = 4096;

/// A vCPU with a flat memory of a few pages from `base` on, some of them absent.
#[derive(Clone)]
struct Mock {
    gpr: [u64; 16],
    flags: u64,
    fpu: Box<FpuArea>,
    control: Control,
    base: u64,
    memory: Vec<u8>,
    absent: [bool; PAGES],
    /// Bytes read and written, to see what was touched.
    writes: Vec<(usize, usize)>,
}

impl Mock {
    fn new(base: u64) -> Self {
        let control = Control {
            cr0: cr0::PE | cr0::NE | cr0::MP,
            cr4: cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE,
            xcr0: super::layout::layout().supported,
            code64: true,
            cpl: 3,
            rip: 0x40_1000,
            ..Control::default()
        };
        Self {
            gpr: [0; 16],
            flags: 2,
            fpu: Box::default(),
            control,
            base,
            memory: vec![0; PAGES * PAGE],
            absent: [false; PAGES],
            writes: Vec::new(),
        }
    }

    /// Decodes and executes one instruction of 64-bit code.
    fn run(&mut self, bytes: &[u8]) -> Result<(), Exception> {
        self.run_as(64, bytes)
    }

    fn run_as(&mut self, bitness: u32, bytes: &[u8]) -> Result<(), Exception> {
        let i = decode(bitness, bytes);
        let op = prepare(&i).expect("an instruction of this module");
        execute(&op, self)
    }

    fn range(&self, offset: u64, len: usize, write: bool) -> Result<usize, Exception> {
        let error = if write { 6 } else { 4 };
        let at = usize::try_from(offset.wrapping_sub(self.base)).map_err(|_| Exception::pf(error))?;
        if at >= self.memory.len() || at + len > self.memory.len() {
            return Err(Exception::pf(error));
        }
        let absent = (at / PAGE..=(at + len.max(1) - 1) / PAGE).any(|p| self.absent[p]);
        if absent { Err(Exception::pf(error)) } else { Ok(at) }
    }

    fn xmm(&self, i: usize) -> u128 {
        super::layout::xmm(&self.fpu, i)
    }

    fn set_xmm(&mut self, i: usize, v: u128) {
        super::layout::set_xmm(&mut self.fpu, i, v);
    }

    fn mxcsr(&self) -> u32 {
        super::layout::mxcsr(&self.fpu)
    }

    fn set_mxcsr(&mut self, v: u32) {
        super::layout::set_mxcsr(&mut self.fpu, v);
    }
}

fn decode(bitness: u32, bytes: &[u8]) -> Instruction {
    Decoder::with_ip(bitness, bytes, 0x40_1000, DecoderOptions::NONE).decode()
}

impl VectorCpu for Mock {
    fn gpr(&self, i: usize) -> u64 {
        self.gpr[i]
    }
    fn set_gpr(&mut self, i: usize, value: u64) {
        self.gpr[i] = value;
    }
    fn rflags(&self) -> u64 {
        self.flags
    }
    fn set_status_flags(&mut self, flags: u64) {
        self.flags = self.flags & !rflags::STATUS | flags & rflags::STATUS;
    }
    fn fpu(&mut self) -> &mut FpuArea {
        &mut self.fpu
    }
    fn control(&self) -> Control {
        self.control
    }
    fn selector(&self, segment: usize) -> u16 {
        [0x10, 0x33, 0x2b, 0x2b, 0, 0][segment]
    }
    fn read(&mut self, _: usize, offset: u64, data: &mut [u8]) -> Result<(), Exception> {
        let at = self.range(offset, data.len(), false)?;
        data.copy_from_slice(&self.memory[at..at + data.len()]);
        Ok(())
    }
    fn write(&mut self, _: usize, offset: u64, data: &[u8]) -> Result<(), Exception> {
        let at = self.range(offset, data.len(), true)?;
        self.memory[at..at + data.len()].copy_from_slice(data);
        self.writes.push((at, data.len()));
        Ok(())
    }
    fn probe_write(&mut self, _: usize, offset: u64, len: usize) -> Result<(), Exception> {
        self.range(offset, len, true).map(|_| ())
    }
    fn linear(&self, _: usize, offset: u64) -> u64 {
        offset
    }
}

/// A small generator (SplitMix64), so that a seed replays.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let v = self.number().to_le_bytes();
            chunk.copy_from_slice(&v[..chunk.len()]);
        }
    }

    /// Bits that are interesting as integers and as floating point.
    fn number(&mut self) -> u64 {
        let sign = self.next() & 0x8000_0000_8000_0000;
        match self.below(8) {
            0 => self.below(256),
            1 => (f64::from(u32::try_from(self.below(100_000)).unwrap()) / 7.0).to_bits() | sign,
            2 | 3 => {
                let single = |r: &mut Self| {
                    let f = f32::from(u16::try_from(r.below(60000)).unwrap()) / 13.0;
                    u64::from(f.to_bits())
                };
                (single(self) | single(self) << 32) | sign
            }
            4 => {
                [0, u64::MAX, 0x7ff0_0000_0000_0000, 0x7f80_0000_ff80_0000, 1 << 63, 1, 0x7fc0_0000_7f80_0001]
                    [usize::try_from(self.below(7)).unwrap()]
            }
            5 => self.next() & 0x000f_ffff_007f_ffff,
            _ => self.next(),
        }
    }
}
