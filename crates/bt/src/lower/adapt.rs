//! Adapted forms of instructions whose innocent form often fails ([`crate::hints`]).
//!
//! **Direct**: the address goes to the frame, for the engine to see whether the site is still guilty, and the instruction calls out; no lookup is
//! tried in front, nothing is refilled.
//!
//! **Halves**: the straight line stays as it is, so that accesses within a page lose nothing. Where its check fails because the
//! access crosses, it goes on in a second form behind the fragment: `SPLIT` finds both pages in the TLB and copies the bytes into
//! [`frame::BOUNCE`]; the same instruction works on the copy; `JOIN` copies it back if the instruction writes. INV-ADAPT-1: between the
//! two nothing else happens, and only instructions that write all the bytes of their operand, and lock nothing, have this form: no byte is
//! written that the instruction itself does not write.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::memory::Halves;
use super::scratch::Scratch;
use super::{Lowering, SiteKind, vector};
use crate::emit::{S0, S1};
use crate::frame;
use crate::hints::Form;
use crate::unit::{STATUS, Unit};

/// Bytes of an operand at most: the copy has so much room.
const MAX_SIZE: usize = 64;

/// An instruction whose second form is still to be made.
pub(super) struct Pending {
    /// Its number in the unit.
    number: usize,
    live_before: u32,
    reads: bool,
    /// The miss that leads there.
    miss: usize,
    /// Where the first form is complete, and what holds there.
    done: usize,
    in_host: bool,
    fp_loaded: bool,
    variant: super::Variant,
}

/// Which form of an access is being made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Making {
    /// The innocent one.
    Plain,
    /// That within a page, of an access that has a second form.
    First,
    /// The second.
    Second,
}

/// Whether the instruction has one memory operand, which is named, and does nothing unusual.
fn has_plain_operand(i: &Instruction, facts: super::Facts, look: super::Look) -> bool {
    let named = (0..i.op_count()).filter(|n| i.op_kind(*n) == OpKind::Memory).count() == 1;
    let bits = matches!(i.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && i.op1_kind() == OpKind::Register;
    let known = look.ident || vector::group_access(i, facts).is_some();
    named && known && !bits && i.mnemonic() != Mnemonic::Lea && !i.has_rep_prefix() && !i.has_repne_prefix()
}

/// Whether an instruction may work on a copy of its operand (INV-ADAPT-1).
fn may_have_halves(i: &Instruction, facts: super::Facts, look: super::Look) -> bool {
    let stack = matches!(i.mnemonic(), Mnemonic::Push | Mnemonic::Pop | Mnemonic::Leave) && !look.memory;
    let locks = i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg;
    let masks = i.has_op_mask()
        || matches!(
            i.mnemonic(),
            Mnemonic::Vmaskmovps | Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovd | Mnemonic::Vpmaskmovq
        );
    // What a masked load leaves out may be copied all the same; if it cannot, the interpreter does the load.
    stack || has_plain_operand(i, facts, look) && !locks && !(masks && look.writes)
}

impl Lowering<'_, '_> {
    /// The instruction in the form that the hints ask for, if they ask for any and it exists.
    pub(super) fn adapted(&mut self, i: &Instruction, live_before: u32, reads: bool) -> bool {
        if self.hints.is_empty() || self.facts.legacy.is_some() {
            return false;
        }
        let wants = |form| self.hints.has(self.current, form);
        if wants(Form::Direct) && has_plain_operand(i, self.facts, self.look) {
            return self.direct(i);
        }
        wants(Form::Halves) && may_have_halves(i, self.facts, self.look) && self.halves(i, live_before, reads)
    }

    /// Calls out, with the address in the frame.
    fn direct(&mut self, i: &Instruction) -> bool {
        let size = i.memory_size();
        let size = if size.is_broadcast() { size.element_size() } else { size.size() };
        if !(1..=MAX_SIZE).contains(&size) {
            return false;
        }
        let mark = self.mark();
        let write = self.look.writes;
        self.spill(STATUS);
        if !self.address(i, size, write) {
            self.back_to(mark);
            return false;
        }
        self.asm.store(frame::ADDRESS, S0);
        self.callouts += 1;
        self.call_engine(frame::CALLOUT, SiteKind::Direct { size: size as u8, write });
        true
    }

    /// The first form; the second is made behind the fragment.
    fn halves(&mut self, i: &Instruction, live_before: u32, reads: bool) -> bool {
        let (variant, first) = (self.variant, self.room.misses.len());
        self.making = Making::First;
        let done = self.lower(i, live_before, reads);
        self.making = Making::Plain;
        let accesses: Vec<usize> =
            (first..self.room.misses.len()).filter(|n| self.miss_may_have_halves(*n)).collect();
        if let (true, &[miss]) = (done, &accesses[..]) {
            self.room.halves.push(Pending {
                number: self.number,
                live_before,
                reads,
                miss,
                done: self.asm.here(),
                in_host: self.in_host,
                fp_loaded: self.fp_loaded,
                variant,
            });
        }
        done
    }

    /// The second forms, behind the straight line.
    pub(super) fn finish_halves(&mut self, unit: &Unit) {
        let mut halves = std::mem::take(&mut self.room.halves);
        for p in halves.drain(..) {
            let Some(i) = unit.instructions.get(p.number) else { continue };
            let Some(site) = self.miss_site(p.miss) else { continue };
            let mark = self.mark();
            let at = self.asm.here();
            self.begin(p.number);
            (self.code, self.touch) = (i.code(), None);
            (self.current, self.next) = (i.ip(), i.next_ip());
            (self.variant, self.in_host, self.fp_loaded) = (p.variant, false, site.fp_loaded);
            (self.held, self.kept) = (Scratch::default(), Scratch::default());
            self.making = Making::Second;
            let first = self.room.misses.len();
            let done = self.lower(i, p.live_before, p.reads);
            self.making = Making::Plain;
            let Some(halves) = self.second.take().filter(|_| done) else {
                self.back_to(mark);
                continue;
            };
            if self.look.writes || i.mnemonic() == Mnemonic::Push {
                self.asm.call_gs(frame::JOIN);
            }
            debug_assert_eq!((self.in_host, self.fp_loaded), (p.in_host, p.fp_loaded));
            let end = self.asm.here();
            self.asm.jmp_to(p.done);
            for miss in first..self.room.misses.len() {
                self.complete_one(miss, end, p.in_host);
            }
            self.complete_halves(halves, end, p.in_host);
            self.lead_to_halves(p.miss, at);
        }
        self.room.halves = halves;
    }

    /// In the second form, in place of a check: from the linear address in [`S0`] to the copy at `S0 + S1`. The first byte
    /// of what the engine calls again if it could do nothing is at `retry`.
    pub(super) fn split(&mut self, size: usize, write: bool, retry: usize) -> usize {
        let first = self.room.misses.len();
        self.asm.mov_imm(S1, size as u64);
        let site = self.site(SiteKind::Split { size: size as u8, write });
        self.second = Some(Halves { site });
        self.asm.call_gs(frame::SPLIT + 16 * self.variant as i32 + 8 * i32::from(write));
        self.asm.jmp_to(retry);
        self.asm.bytes(&site.to_le_bytes());
        self.in_host = false;
        first
    }
}
