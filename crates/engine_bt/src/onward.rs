//! From a callout straight to another fragment: behind an instruction that jumped, faulted or changed the mode, or that took translations back,
//! translated code goes on at the RIP where the guest is now, without the way through the dispatcher.
//!
//! INV-ON-1: whoever goes on does what the dispatcher does between two fragments: nothing waits that could be acted on, what the interpreter
//! did to translations and to code is taken over, the mode can be translated, and the target was found under the facts that hold now. The
//! fragment that called out is not returned to: it may be gone.

use bt::frame;
use x86::bits::is_canonical;

use crate::exec::action;
use crate::{BtVcpu, legacy, state};

impl BtVcpu {
    /// Where translated code goes on now that the interpreter is at RIP: at the fragment there, or out of the cache. Fills the frame. The
    /// [`action`].
    pub(crate) fn go_on(&mut self) -> u64 {
        let may = self.may_go_on();
        state::fill(self.interp.cpu(), &self.frame, self.counter);
        let found = if may { self.fragment_here() } else { None };
        self.observers.refused = found.is_none();
        let Some(code) = found else { return action::LEAVE };
        self.bt.onward += 1;
        self.frame.set(frame::DONE, code);
        action::ELSEWHERE
    }

    /// What happens between two fragments. False: the dispatcher has to see to something.
    pub(crate) fn may_go_on(&mut self) -> bool {
        if self.interp.cpu().poll() {
            return false;
        }
        self.absorb();
        state::drop_resume_flag(self.interp.cpu());
        if !state::eligible(self.interp.cpu()) || self.is_stepped() {
            return false;
        }
        self.stress();
        self.unlink_if_remapped();
        true
    }

    /// Host address of the code at RIP, if the second-level table knows it; the frame is filled.
    fn fragment_here(&mut self) -> Option<u64> {
        let cpu = self.interp.cpu();
        let rip = legacy::linear_rip(cpu);
        let facts = state::facts(cpu, self.host, self.counter);
        let is_legacy = facts.legacy.is_some();
        let known = if is_legacy { self.tables.legacy_environment(facts.variant) } else { self.environment };
        let same = self.environments.number(facts) == Some(known);
        // Only canonical addresses have tags of their own (`bt::frame::second_tag`).
        if same && is_canonical(rip) { self.tables.find_jump(rip, facts.variant, is_legacy) } else { None }
    }
}
