//! Calls and returns in pairs, so that the host's return predictor serves the guest's returns.
//!
//! A guest call pushes its return address on the host's stack (beside what it pushes on the guest's) and calls its target's fragment; the host's
//! return address is the *landing* behind that call, which goes on where the guest's return address says. A guest return compares the address that it read
//! from the guest's stack with the pair on top: the same, and the host returns to the landing; another, and every pair is dropped and
//! the target looked up. So the guest's stack decides, and pairs only say where its address was translated.
//!
//! INV-PAIR-1: all pairs were pushed with the rights and in the address space that are in force, and no translation was taken back since. Whoever changes
//! rights (SYSCALL, SYSRET, IRET), the address space or a translation (in assembly), or goes on after Rust changed anything, drops them. Calls and returns with
//! AC set leave them alone, so one pushed without it is never popped with it.
//!
//! INV-PAIR-2: below the first pair lies one of the engine's: guest address 0, and code that leaves. So RSP never leaves what [`frame::PAIRS`] and
//! [`frame::PAIRS_END`] bound, whatever the guest returns to.

use super::branch::in_page;
use super::{Lowering, SiteKind, Variant};
use crate::emit::{Fixup, HOST_SP, Op, S0, S1, cc};
use crate::frame;

/// The offset in the page of a call's return address.
#[derive(Clone, Copy)]
pub(super) struct Landing(u64);

/// What stands behind the straight line, for what is seldom.
pub(super) enum Seldom {
    /// There is no room for one more pair.
    NoRoom {
        /// The jump that is taken then.
        jump: Fixup,
        /// Where the code goes on without the others.
        back: usize,
    },
    /// A return whose pair is not on top, or that is to poll.
    Return {
        /// The jumps that are taken then.
        jumps: [Fixup; 2],
        /// The number of the site.
        site: u32,
        variant: Variant,
    },
}

impl Lowering<'_, '_> {
    /// Whether calls and returns here have pairs.
    pub(super) const fn has_pairs(&self) -> bool {
        self.facts.legacy.is_none() && !matches!(self.variant, Variant::SupervisorAc)
    }

    /// The guest's half of a call's pair, if it is to have one, behind the push on the guest's stack, which may have the address in a register. Clobbers flags
    /// and both scratch registers.
    pub(super) fn push_pair(&mut self, next: u64, held: Option<u8>) -> Option<Landing> {
        if !self.has_pairs() || !in_page(next) {
            return None;
        }
        self.asm.gs(Op::Cmp, HOST_SP, frame::PAIRS_END);
        let jump = self.asm.jcc(cc::BE);
        self.room.seldom.push(Seldom::NoRoom { jump, back: self.asm.here() });
        let known = self.facts.page_rip.and_then(|rip| i32::try_from(rip.wrapping_add(next) as i64).ok());
        match (known, held) {
            (Some(rip), _) => self.asm.push_imm(rip),
            (None, Some(register)) => self.asm.push(register),
            (None, None) => {
                self.rip_to(S0, next);
                self.asm.push(S0);
            }
        }
        Some(Landing(next))
    }

    /// Behind the host's call: the guest has returned, [`S0`] is its RIP.
    pub(super) fn land(&mut self, Landing(next): Landing) {
        self.asm.drop_top();
        if self.facts.page_rip.is_none() {
            self.asm.lea(S1, S0, None, -(next as i32));
            self.asm.store(frame::PAGE_RIP, S1);
        }
        self.link_to(next);
    }

    /// Takes the guest's half of a pair back, where its call is not made.
    pub(super) fn drop_pair(&mut self) {
        self.asm.drop_top();
    }

    /// Drops all pairs: they were pushed in another world.
    pub(super) fn drop_pairs(&mut self) {
        self.asm.load(HOST_SP, frame::PAIRS);
    }

    /// Returns to the guest address in [`S0`] if the pair on top is its call's; else the engine drops all and looks the address up, also where `poll` says so.
    /// Clobbers flags.
    pub(super) fn return_by_pair(&mut self, poll: Fixup, popped: i8) {
        self.asm.cmp_below_top(S0);
        let other = self.asm.jcc(cc::NE);
        self.asm.ret();
        let site = self.site(SiteKind::Branch { popped });
        self.room.seldom.push(Seldom::Return { jumps: [poll, other], site, variant: self.variant });
    }

    /// What is seldom, behind the straight line.
    pub(super) fn finish_seldom(&mut self) {
        let mut all = std::mem::take(&mut self.room.seldom);
        for seldom in all.drain(..) {
            match seldom {
                Seldom::NoRoom { jump, back } => {
                    self.asm.bind(jump);
                    self.drop_pairs();
                    self.asm.jmp_to(back);
                }
                Seldom::Return { jumps, site, variant } => {
                    jumps.into_iter().for_each(|jump| self.asm.bind(jump));
                    self.asm.call_gs(frame::RETURN + 8 * variant as i32);
                    self.asm.bytes(&site.to_le_bytes());
                }
            }
        }
        self.room.seldom = all;
    }
}
