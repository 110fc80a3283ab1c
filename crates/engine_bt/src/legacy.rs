//! 16- and 32-bit code: what its segments are, for translations and in the frame, and its instruction pointer, which is a linear address in the frame and in
//! the tables.
//!
//! INV-LEG-1 (`bt::lower::segment`): such code is entered only while the upper halves of RAX to RDI are clear. They can be otherwise only after a
//! change from 64-bit code that did not write them.

use bt::{Legacy, frame};
use x86::state::sreg;
use x86::{Attr, Segment};
use x86_interp::cpu::{CodeSize, Cpu};

use crate::exec::Frame;

/// The whole address space.
const ALL: u64 = 1 << 32;

/// What an instruction may change that a fragment of 16- or 32-bit code relies on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Mode {
    facts: Legacy,
    code: Segment,
}

/// See [`Mode`].
pub fn mode(cpu: &Cpu) -> Option<Mode> {
    Some(Mode { facts: facts(cpu)?, code: cpu.s.seg[sreg::CS] })
}

/// What translations of the code at RIP may rely on; None for 64-bit code.
pub fn facts(cpu: &Cpu) -> Option<Legacy> {
    let seg = &cpu.s.seg;
    let flat = |n: usize| seg[n].base == 0 && cpu.seg_fast[n] == 3;
    (cpu.code_size != CodeSize::Bits64).then(|| Legacy {
        bits16: cpu.code_size == CodeSize::Bits16,
        flat_code: seg[sreg::CS].base == 0
            && seg[sreg::CS].limit == u32::MAX
            && cpu.code_size == CodeSize::Bits32,
        flat_data: flat(sreg::DS) && flat(sreg::ES) && flat(sreg::SS),
        wide_stack: cpu.stack_mask == 0xffff_ffff,
    })
}

/// The linear addresses of the pages that lie in CS as a whole: the first, and how many bytes from there on.
fn code_pages(cpu: &Cpu) -> (u64, u64) {
    let cs = &cpu.s.seg[sreg::CS];
    let limit = match cpu.code_size {
        CodeSize::Bits16 => cs.limit.min(0xffff),
        _ => cs.limit,
    };
    let base = cs.base & 0xffff_ffff;
    let skipped = base.wrapping_neg() & 0xfff;
    let bytes = (u64::from(limit) + 1).saturating_sub(skipped) & !0xfff;
    ((base + skipped) & 0xffff_ffff, bytes)
}

/// Whether 16- or 32-bit code at a linear address may run translated: its page lies in CS as a whole.
pub fn may_run(cpu: &Cpu, linear: u64) -> bool {
    if cpu.code_size == CodeSize::Bits64 {
        return true;
    }
    let (start, bytes) = code_pages(cpu);
    linear.wrapping_sub(start) & 0xffff_ffff < bytes
}

/// Whether the state is one that 16- or 32-bit code at RIP can be translated for.
pub fn eligible(cpu: &Cpu) -> bool {
    cpu.gpr[..8].iter().fold(0, |all, r| all | r) < ALL && may_run(cpu, linear_rip(cpu))
}

/// The linear address of the next instruction.
pub fn linear_rip(cpu: &Cpu) -> u64 {
    match cpu.code_size {
        CodeSize::Bits64 => cpu.rip,
        _ => cpu.s.seg[sreg::CS].base.wrapping_add(cpu.rip) & 0xffff_ffff,
    }
}

/// What the guest's instruction pointer is at a linear address.
pub fn pointer(cpu: &Cpu, linear: u64) -> u64 {
    match cpu.code_size {
        CodeSize::Bits64 => linear,
        _ => linear.wrapping_sub(cpu.s.seg[sreg::CS].base) & 0xffff_ffff,
    }
}

/// Where accesses to a segment must end so that no check can fail: reads, and writes.
fn ends(cpu: &Cpu, n: usize) -> [u64; 2] {
    let seg = &cpu.s.seg[n];
    let end = u64::from(seg.limit) + 1;
    let real = !cpu.s.protected() || cpu.s.v86();
    let attr: Attr = seg.attr;
    if attr.is_expand_down() || !real && !attr.present() {
        return [0; 2];
    }
    let read = real || attr.is_readable();
    let write = if real { n != sreg::CS } else { attr.is_writable() };
    [if read { end } else { 0 }, if write { end } else { 0 }]
}

/// The segments into the frame.
pub fn fill(cpu: &Cpu, frame: &Frame) {
    for (n, at) in (0..6).zip((0..).step_by(8)) {
        frame.set(frame::SEGMENT_BASES + at, cpu.s.seg[n].base & 0xffff_ffff);
        let [read, write] = ends(cpu, n);
        frame.set(frame::SEGMENT_ENDS + 2 * at, read);
        frame.set(frame::SEGMENT_ENDS + 2 * at + 8, write);
    }
    let (start, bytes) = code_pages(cpu);
    frame.set(frame::CODE_START, start);
    frame.set(frame::CODE_SIZE, bytes);
}
