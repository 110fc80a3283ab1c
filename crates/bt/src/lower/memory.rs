//! Access lowering, scheme S: a software TLB lookup in front of every memory operand.
//!
//! The one place that knows how a guest address becomes a host address. One compare covers the tag and the crossing of a page (or, for
//! operands that must be aligned, the alignment). INV-MEM-1: an access that missed tries again by itself, never together with another of its
//! instruction, so that two pages that want the same entry cannot drive each other out for ever. A miss leaves the straight line; the engine fills the entry, and the instruction starts again at
//! its address computation, or the interpreter does it.

use iced_x86::{Instruction, Mnemonic, Register};

use super::registers::{frame_slot, host_number, in_frame};
use super::{Lowering, SiteKind};
use crate::emit::{Fixup, S0, S1, cc};
use crate::frame;

/// Where a missed access goes on after the interpreter did its instruction.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Done {
    /// At this offset, with the guest's flags in the host's or not.
    At(usize, bool),
    /// It was a control transfer: leave.
    Leave,
}

/// What a miss stands for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    /// An access: the tags that were compared, and where to try again.
    Access { tags: i32, retry: usize, write: bool },
    /// An inline check failed: the interpreter does the instruction.
    Check,
}

/// A memory access whose miss code stands behind the fragment.
pub(super) struct Miss {
    jump: Fixup,
    what: What,
    pub done: Done,
    site: u32,
    variant: i32,
    fp_loaded: bool,
}

impl Lowering<'_> {
    /// The linear address of the memory operand into [`S0`]. May use [`S1`]; flags stay.
    pub(super) fn address(&mut self, i: &Instruction) -> bool {
        if !self.effective(i) {
            return false;
        }
        let segment = match i.memory_segment() {
            Register::FS => frame::FS_BASE,
            Register::GS => frame::GS_BASE,
            _ => return true,
        };
        if i.mnemonic() != Mnemonic::Lea {
            self.asm.load(S1, segment);
            self.asm.lea(S0, S0, Some((S1, 0)), 0);
        }
        true
    }

    fn effective(&mut self, i: &Instruction) -> bool {
        let (base, index) = (i.memory_base(), i.memory_index());
        let scale = i.memory_index_scale().trailing_zeros() as u8;
        if base == Register::RIP {
            let target = i.memory_displacement64();
            if self.reachable(target) {
                self.rip_to(S0, target);
            }
            return self.reachable(target);
        }
        let Ok(disp) = i32::try_from(i.memory_displacement64() as i64) else { return false };
        let sizes_ok = [base, index].iter().all(|r| *r == Register::None || r.is_gpr() && r.size() >= 4);
        if !sizes_ok || i.memory_displ_size() == 4 && base == Register::None && index == Register::None {
            return false;
        }
        let index = match index {
            Register::None => None,
            r if in_frame(r) => {
                self.asm.load(S1, frame_slot(r));
                Some((S1, scale))
            }
            r => Some((host_number(r), scale)),
        };
        let base = match base {
            Register::None => None,
            r if in_frame(r) => {
                self.asm.load(S0, frame_slot(r));
                Some(S0)
            }
            r => Some(host_number(r)),
        };
        match (base, index) {
            (Some(b), x) => self.asm.lea(S0, b, x, disp),
            (None, Some((x, scale))) => self.asm.lea_scaled(S0, x, scale, disp),
            (None, None) => self.asm.mov_imm(S0, i64::from(disp) as u64),
        }
        let narrow =
            [i.memory_base(), i.memory_index()].iter().any(|r| r.size() == 4 && *r != Register::None);
        if narrow {
            self.asm.zero_extend(S0);
        }
        true
    }

    /// From the linear address in [`S0`] to a host address `S0 + S1`. Clobbers flags. `retry` is where the address computation
    /// began. The number of its miss.
    pub(super) fn check(&mut self, size: usize, write: bool, retry: usize) -> usize {
        self.check_aligned(size, write, retry, false)
    }

    /// As [`Lowering::check`]; `aligned`: a misaligned address misses too.
    pub(super) fn check_aligned(&mut self, size: usize, write: bool, retry: usize, aligned: bool) -> usize {
        let variant = self.variant as i32;
        let table = frame::TLB + variant * frame::TLB_STRIDE;
        let tags = table + if write { 8 } else { 0 };
        let asm = &mut self.asm;
        asm.rotate_to(S1, S0, 7);
        asm.and32(S1, (frame::TLB_ENTRIES - 1) << 5);
        asm.xor_index(S0, S1, tags);
        let jump = if aligned {
            asm.test_imm(S0, -4096 | (size as i32 - 1));
            asm.jcc(cc::NE)
        } else {
            asm.cmp_imm(S0, 4096 - size as i32);
            asm.jcc(cc::A)
        };
        asm.load_index(S1, S1, table + 16);
        self.in_host = false;
        let site = self.site(SiteKind::Access { size: size as u8, write });
        let what = What::Access { tags, retry, write };
        let fp_loaded = self.fp_loaded;
        self.misses.push(Miss { jump, what, done: Done::Leave, site, variant, fp_loaded });
        self.misses.len() - 1
    }

    /// The instruction leaves the straight line by `jump` and is done by the interpreter. Guest flags must be in the frame. The number
    /// of its miss.
    pub(super) fn interpret_if(&mut self, jump: Fixup) -> usize {
        let site = self.site(SiteKind::Callout);
        let fp_loaded = self.fp_loaded;
        self.misses.push(Miss { jump, what: What::Check, done: Done::Leave, site, variant: 0, fp_loaded });
        self.misses.len() - 1
    }

    /// The instruction of the misses from number `from` on is complete here.
    pub(super) fn complete(&mut self, from: usize, flags_in_host: bool) {
        let here = self.asm.here();
        for m in self.misses.iter_mut().skip(from) {
            m.done = Done::At(here, flags_in_host);
        }
    }

    /// Out-of-line code: misses call out and retry, or find their instruction done.
    pub(super) fn finish_misses(&mut self) {
        let mut leaves = Vec::new();
        for m in std::mem::take(&mut self.misses) {
            self.asm.bind(m.jump);
            match m.what {
                What::Access { tags, retry, write } => {
                    // The XOR undoes itself: the address again.
                    self.asm.xor_index(S0, S1, tags);
                    self.asm.store_imm32(frame::SITE, m.site);
                    self.asm.call_gs(frame::REFILL + 16 * m.variant + 8 * i32::from(write));
                    if m.fp_loaded {
                        self.asm.call_gs(frame::FP_LOAD);
                    }
                    // 0: filled, try again; 1: the interpreter did the instruction; 2: leave.
                    self.asm.cmp_imm(S1, 1);
                    let again = self.asm.jcc(cc::B);
                    self.asm.bind_to(again, retry);
                    leaves.push(self.asm.jcc(cc::A));
                }
                What::Check => {
                    self.asm.store_imm32(frame::SITE, m.site);
                    self.asm.call_gs(frame::CALLOUT);
                    if m.fp_loaded {
                        self.asm.call_gs(frame::FP_LOAD);
                    }
                    self.asm.test(S1);
                    leaves.push(self.asm.jcc(cc::NE));
                }
            }
            match m.done {
                Done::Leave => leaves.push(self.asm.jmp()),
                Done::At(at, flags_in_host) => {
                    if flags_in_host {
                        self.asm.restore_flags(frame::FLAGS, S0);
                    }
                    self.asm.jmp_to(at);
                }
            }
        }
        for f in std::mem::take(&mut leaves) {
            self.asm.bind(f);
        }
        self.asm.jmp_gs(frame::LEAVE);
    }
}
