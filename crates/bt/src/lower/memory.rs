//! Access lowering, scheme S: a software TLB lookup in front of memory operands.
//!
//! The one place that knows how a guest address becomes a host address. One compare covers the tag and the crossing of a page (or, for
//! operands that must be aligned, the alignment). A miss leaves the straight line; the engine fills the entry, and the access starts again at
//! its address computation, or the interpreter does the instruction. INV-MEM-1: an access that missed tries again by itself, never together with
//! another of its instruction, so that two pages that want the same entry cannot drive each other out for ever.
//!
//! Accesses off one base share a check ([`super::group`]).

use iced_x86::{Instruction, Mnemonic, Register};

use super::adapt::Making;
use super::registers::{frame_slot, host_number, in_frame};
use super::{Lowering, SiteKind};
use crate::emit::{Fixup, S0, S1, cc};
use crate::frame;

/// Bytes of a write that may pass at most: they lie in two lines.
const MAX_PASS: usize = 64;

/// What a miss stands for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    /// An access: its refill code, and where to try again.
    Access { refill: i32, retry: usize },
    /// One that writes. Its bytes, and where it goes on if they lie in a traced page but not in lines with code; no bytes: it may not.
    Write { refill: i32, retry: usize, size: u8, pass: usize },
    /// An inline check failed: the interpreter does the instruction.
    Check,
}

/// A memory access whose miss code stands behind the fragment.
pub(super) struct Miss {
    jump: Fixup,
    what: What,
    /// Where the instruction is complete, if control falls through it.
    done: Option<usize>,
    site: u32,
    variant: super::Variant,
}

/// The access of a second form: its site.
#[derive(Clone, Copy)]
pub(super) struct Halves {
    pub site: u32,
}

/// A host memory operand.
#[derive(Clone, Copy)]
pub(super) struct Operand {
    pub base: u8,
    pub index: Option<u8>,
    pub disp: i32,
    /// The number of the first miss of the instruction.
    pub first: usize,
}

impl Operand {
    /// Behind a check of its own: [`S0`] + [`S1`].
    pub const fn checked(first: usize) -> Self {
        Self { base: S0, index: Some(S1), disp: 0, first }
    }

    /// As the assembler takes it.
    pub const fn place(&self) -> (u8, Option<u8>, i32) {
        (self.base, self.index, self.disp)
    }

    pub fn uses(&self, register: u8) -> bool {
        self.base == register || self.index == Some(register)
    }
}

impl Lowering<'_, '_> {
    /// The linear address of the memory operand into [`S0`], for an access of `size` bytes. May use [`S1`]; flags stay, but of 16- and 32-bit code.
    pub(super) fn address(&mut self, i: &Instruction, size: usize, write: bool) -> bool {
        if self.facts.legacy.is_some() {
            return self.segmented_address(i, size, write);
        }
        let Ok(disp) = i32::try_from(i.memory_displacement64() as i64) else {
            return i.memory_base() == Register::RIP && self.rip_operand(i);
        };
        if !self.effective(i, disp) {
            return false;
        }
        self.add_segment(i);
        true
    }

    fn rip_operand(&mut self, i: &Instruction) -> bool {
        let target = i.memory_displacement64();
        if self.reachable(target) {
            self.rip_to(S0, target);
            self.add_segment(i);
        }
        self.reachable(target)
    }

    fn add_segment(&mut self, i: &Instruction) {
        let segment = match i.memory_segment() {
            Register::FS => frame::FS_BASE,
            Register::GS => frame::GS_BASE,
            _ => return,
        };
        if i.mnemonic() != Mnemonic::Lea {
            self.asm.load(S1, segment);
            self.asm.lea(S0, S0, Some((S1, 0)), 0);
        }
    }

    /// Base + index * scale + `disp` (for RIP: the target) into [`S0`].
    pub(super) fn effective(&mut self, i: &Instruction, disp: i32) -> bool {
        if self.facts.legacy.is_some() {
            return self.effective_legacy(i, disp);
        }
        let (base, index) = (i.memory_base(), i.memory_index());
        let scale = i.memory_index_scale().trailing_zeros() as u8;
        if base == Register::RIP {
            let target = i64::from(disp) as u64;
            if self.reachable(target) {
                self.rip_to(S0, target);
            }
            return self.reachable(target);
        }
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
        // What must be aligned does not cross pages.
        if self.making == Making::Second && !aligned {
            return self.split(size, write, retry);
        }
        let halves = self.making == Making::First && !aligned;
        let size8 = size as u8;
        let kind = if halves {
            SiteKind::Halves { size: size8, write }
        } else {
            SiteKind::Access { size: size8, write }
        };
        self.lookup_tag(write);
        let jump = if aligned {
            self.asm.test_imm(S0, -4096 | (size as i32 - 1));
            self.asm.jcc(cc::NE)
        } else {
            self.asm.cmp_imm(S0, 4096 - size as i32);
            self.asm.jcc(cc::A)
        };
        self.asm.load_index(S1, S1, self.table() + 16);
        let miss = self.missed(jump, kind, retry, write);
        // Who may pass has not been asked whether its address is aligned.
        if !aligned && size <= MAX_PASS {
            self.may_pass(miss, size as u8);
        }
        miss
    }

    /// The access of a miss may go on here if it writes `size` bytes to lines of a traced page that are not code; with a size of 0 it may not.
    pub(super) fn may_pass(&mut self, miss: usize, size: u8) {
        let here = self.asm.here();
        if let Some(Miss { what: What::Write { size: s, pass, .. }, .. }) = self.room.misses.get_mut(miss) {
            (*s, *pass) = (size, here);
        }
    }

    /// Host minus guest address of the page of the linear address in [`S0`] into [`S1`], if `len` bytes from there lie in the page (and, if `aligned`,
    /// the address is a multiple of 16). The number of the first of its misses.
    pub(super) fn check_range(
        &mut self,
        len: usize,
        write: bool,
        retry: usize,
        aligned: bool,
        own: super::Own,
    ) -> usize {
        let first = self.room.misses.len();
        let kind = SiteKind::Group { size: len as u16, write, own };
        self.lookup_tag(write);
        self.asm.cmp_imm(S0, 4096 - len as i32);
        let jump = self.asm.jcc(cc::A);
        self.missed(jump, kind, retry, write);
        if aligned {
            self.asm.test_imm(S0, 15);
            let jump = self.asm.jcc(cc::NE);
            self.missed(jump, kind, retry, write);
        }
        self.asm.load_index(S1, S1, self.table() + 24);
        first
    }

    const fn table(&self) -> i32 {
        frame::TLB + self.variant as i32 * frame::TLB_STRIDE
    }

    /// Linear address and tag, compared by XOR, into [`S0`]; the entry's offset into [`S1`].
    fn lookup_tag(&mut self, write: bool) {
        let tags = self.table() + if write { 8 } else { 0 };
        self.asm.rotate_to(S1, S0, 7);
        self.asm.and32(S1, (frame::TLB_ENTRIES - 1) << 5);
        self.asm.xor_index(S0, S1, tags);
        self.in_host = false;
    }

    fn missed(&mut self, jump: Fixup, kind: SiteKind, retry: usize, write: bool) -> usize {
        let site = self.site(kind);
        let elsewhere = matches!(kind, SiteKind::Group { .. } | SiteKind::Halves { .. });
        let refills = if elsewhere { frame::REFILL_GROUP } else { frame::REFILL };
        let refill = refills + 16 * self.variant as i32 + 8 * i32::from(write);
        let what = if write && !elsewhere {
            What::Write { refill, retry, size: 0, pass: 0 }
        } else {
            What::Access { refill, retry }
        };
        self.room.misses.push(Miss { jump, what, done: None, site, variant: self.variant });
        self.room.misses.len() - 1
    }

    /// The instruction leaves the straight line by `jump` and is done by the interpreter. Guest flags must be in the frame. The number
    /// of its miss.
    pub(super) fn interpret_if(&mut self, jump: Fixup) -> usize {
        let site = self.site(SiteKind::Callout);
        self.room.misses.push(Miss { jump, what: What::Check, done: None, site, variant: self.variant });
        self.room.misses.len() - 1
    }

    /// The instruction of the misses from number `from` on is complete here; those of groups go on elsewhere.
    pub(super) fn complete(&mut self, from: usize, flags_in_host: bool) {
        let here = self.asm.here();
        for n in from..self.room.misses.len() {
            if !self.room.plain_exits.contains(&n) {
                self.complete_one(n, here, flags_in_host);
            }
        }
    }

    /// Where translated code goes on after miss `n` if its access is not simply tried again.
    pub(super) fn complete_one(&mut self, n: usize, at: usize, flags_in_host: bool) {
        if let Some(m) = self.room.misses.get_mut(n) {
            m.done = Some(at);
            let number = (m.site - self.site_base) as usize;
            if let Some(site) = self.room.sites.get_mut(number) {
                site.done = at as u16;
                site.flags_in_host = flags_in_host;
            }
        }
    }

    /// Whether the access of a miss was lowered so that it may go on in a second form.
    pub(super) fn miss_may_have_halves(&self, n: usize) -> bool {
        self.miss_site(n).is_some_and(|s| matches!(s.kind, SiteKind::Halves { .. }))
    }

    /// A miss of an access that crosses goes on in the second form.
    pub(super) fn lead_to_halves(&mut self, n: usize, at: usize) {
        self.complete_one(n, at, false);
    }

    /// Where translated code goes on behind an access that the interpreter did for the second form.
    pub(super) fn complete_halves(&mut self, halves: Halves, at: usize, flags_in_host: bool) {
        if let Some(site) = self.room.sites.get_mut((halves.site - self.site_base) as usize) {
            site.done = at as u16;
            site.flags_in_host = flags_in_host;
        }
    }

    /// The site of a miss.
    pub(super) fn miss_site(&self, n: usize) -> Option<super::Site> {
        let number = self.room.misses.get(n)?.site - self.site_base;
        self.room.sites.get(number as usize).copied()
    }

    /// Rights where a miss is.
    pub(super) fn miss_variant(&self, n: usize) -> super::Variant {
        self.room.misses.get(n).map_or(self.variant, |m| m.variant)
    }

    /// Out-of-line code: misses call out and retry, or find their instruction done.
    pub(super) fn finish_misses(&mut self) {
        let mut misses = std::mem::take(&mut self.room.misses);
        for m in misses.drain(..) {
            self.asm.bind(m.jump);
            match m.what {
                What::Access { refill, retry } => {
                    self.asm.call_gs(refill);
                    self.asm.jmp_to(retry);
                    self.asm.bytes(&m.site.to_le_bytes());
                    if let (true, Some(at)) = (refill >= frame::REFILL_GROUP, m.done) {
                        self.asm.jmp_to(at);
                    }
                }
                What::Write { refill, retry, size, pass } => {
                    self.asm.call_gs(refill);
                    self.asm.jmp_to(retry);
                    self.asm.bytes(&m.site.to_le_bytes());
                    // Not executed: test al, size.
                    self.asm.bytes(&[0xa8, size]);
                    if size != 0 {
                        self.asm.jmp_to(pass);
                    }
                }
                What::Check => {
                    self.asm.call_gs(frame::CALLOUT);
                    self.asm.bytes(&m.site.to_le_bytes());
                    match m.done {
                        Some(at) => self.asm.jmp_to(at),
                        // A control transfer: the interpreter is elsewhere now, so the engine leaves and this is not reached.
                        None => self.asm.jmp_gs(frame::LEAVE),
                    }
                }
            }
        }
        self.room.misses = misses;
    }
}
