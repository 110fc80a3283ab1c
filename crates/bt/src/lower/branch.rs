//! Control flow: direct jumps are linked by the engine within the page; other targets are looked up inline.
//!
//! INV-BT-2: every cycle of fragments polls. A jump that goes back, or anywhere by register or memory, leaves the cache if the alarm is set; who
//! only goes forward comes to an end.

use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind};

use x86::decode::condition;

use super::pair::Landing;
use super::stack::{self, Value};
use super::{Exit, Lowering, SiteKind};
use crate::emit::{Asm, Fixup, Op, S0, S1, SP, cc};
use crate::frame;
use crate::unit::{self, STATUS};

/// Where an exit's stub is jumped at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Entry {
    /// A link to be: the engine patches this jump.
    Link,
    /// A poll: leaves, and is never patched.
    Poll,
}

/// A way out of the fragment whose stub stands behind it.
pub(super) struct PendingExit {
    jump: Fixup,
    target: u64,
    entry: Entry,
    variant: super::Variant,
    plain: bool,
}

/// Whether a whole instruction lies at an offset of this page, so that a jump there may be linked.
pub(super) const fn in_page(offset: u64) -> bool {
    offset < 4096 && !unit::may_cross(offset)
}

impl Lowering<'_, '_> {
    /// A control transfer other than a conditional jump. False: not done here.
    pub(super) fn terminator(&mut self, i: &Instruction, live_after: u32) -> bool {
        if self.checked.is_some() && super::checked::variable(i).is_some() {
            return self.variable_jump(i);
        }
        if unit::is_narrow_branch(i) || !self.reachable(i.near_branch_target()) {
            return false;
        }
        match i.flow_control() {
            FlowControl::UnconditionalBranch if i.is_jmp_short_or_near() => {
                let live_after = if self.is_bounded() { STATUS } else { live_after };
                self.leave_to(i.near_branch_target(), live_after);
            }
            FlowControl::Call if i.is_call_near() => self.call(i),
            FlowControl::IndirectBranch if i.is_jmp_near_indirect() => return self.jump_indirect(i),
            FlowControl::IndirectCall if i.is_call_near_indirect() => return self.call_indirect(i),
            FlowControl::Return if i.mnemonic() == Mnemonic::Ret => self.ret(i),
            _ => return self.system_transfer(i),
        }
        true
    }

    /// Whether a jump from the current instruction may close a loop. Offsets beyond the page's ends are signed.
    pub(super) const fn is_backward(&self, offset: u64) -> bool {
        offset as i64 <= self.current as i64
    }

    fn exit(&mut self, jump: Fixup, target: u64, entry: Entry) {
        let variant = self.variant;
        self.room.pending.push(PendingExit { jump, target, entry, variant, plain: false });
    }

    /// A jump (to be bound) that is taken when the alarm is set. Clobbers flags.
    pub(super) fn poll(&mut self) -> Fixup {
        self.asm.cmp_gs32_imm8(frame::ALARM, 0);
        self.asm.jcc(cc::NE)
    }

    /// Leaves before the current instruction if the alarm is set. Clobbers flags: they are in the frame or dead.
    pub(super) fn poll_here(&mut self) {
        self.poll_at(self.current);
    }

    /// Leaves with RIP at `offset` if the alarm is set. Clobbers flags.
    pub(super) fn poll_at(&mut self, offset: u64) {
        let poll = self.poll();
        self.exit(poll, offset, Entry::Poll);
    }

    /// Goes on at a known place of the page's address range (an offset; it may lie outside of the page).
    pub(super) fn leave_to(&mut self, offset: u64, live: u32) {
        self.transfer(offset, live, None);
    }

    /// As [`Lowering::leave_to`]; by a host call, if there is a landing.
    fn transfer(&mut self, offset: u64, live: u32, landing: Option<Landing>) {
        self.spill(live);
        let backward = self.is_backward(offset);
        if !in_page(offset) && !self.links_pages(offset) {
            if self.is_bounded() {
                return self.leave_bounded(offset);
            }
            self.rip_to(S0, offset);
            // Whoever goes forward only cannot come back without a jump that polls.
            return self.look_up(None, backward || self.facts.page_rip.is_some(), landing);
        }
        if backward {
            self.poll_at(offset);
        }
        let Some(landing) = landing else { return self.link_to(offset) };
        self.leave_entry_alone(1);
        let call = self.asm.call();
        self.exit(call, offset, Entry::Link);
        self.land(landing);
    }

    /// A jump that the engine links.
    pub(super) fn link_to(&mut self, offset: u64) {
        self.leave_entry_alone(1);
        let jump = self.asm.jmp();
        self.exit(jump, offset, Entry::Link);
    }

    /// Before a jump that the engine may link, with so many bytes of opcode: the engine puts a jump over the first bytes of a fragment that is
    /// closed, and puts back what was there, so no link may lie in them.
    fn leave_entry_alone(&mut self, opcode: usize) {
        self.asm.pad_to(self.inner + super::ENTRY_BYTES - opcode);
    }

    /// Whether a jump to another page may be linked: in kernel code, until the mapping of some code in the upper half changes.
    fn links_pages(&self, offset: u64) -> bool {
        self.facts.page_rip.is_some_and(|rip| rip >> 63 == 1) && i32::try_from(offset as i64).is_ok()
    }

    /// A conditional jump; the straight line goes on where it is not taken. `reads`: the flags. False: not done here.
    pub(super) fn conditional_jump(&mut self, i: &Instruction, reads: bool) -> bool {
        match unit::count(i) {
            // It may have to be executed once more, and would count once more.
            Some(_) if self.is_bounded() && !in_page(i.near_branch_target()) => return false,
            Some(count) => self.conditional_by_count(i, count, reads),
            None => self.conditional_by_flags(i),
        }
        true
    }

    /// LOOP and JRCXZ decide as they are: RCX is in its own register, and they write no flags. `reads`: ZF.
    fn conditional_by_count(&mut self, i: &Instruction, (opcode, narrow): (u8, bool), reads: bool) {
        const JUMP_BYTES: u8 = 5;
        if reads {
            self.need_flags();
        }
        let (held, in_host) = (self.held, self.in_host);
        self.asm.jump_by_count(opcode, narrow, JUMP_BYTES);
        let not_taken = self.asm.jmp();
        let target = i.near_branch_target();
        let live = self.targets.live(target);
        self.leave_to(target, live);
        self.asm.bind(not_taken);
        self.in_host = in_host;
        (self.held, self.kept) = (held, held);
    }

    fn conditional_by_flags(&mut self, i: &Instruction) {
        self.need_flags();
        let held = self.held;
        let target = i.near_branch_target();
        let live = self.targets.live(target);
        let code = condition(i);
        // Out of a segment that ends somewhere, the instruction may have to be executed once more, with all flags.
        let live = if self.is_bounded() && !in_page(target) { STATUS } else { live };
        if live == 0 && in_page(target) && !self.is_backward(target) {
            self.leave_entry_alone(2);
            let jump = self.asm.jcc(code);
            self.kept = held;
            return self.exit(jump, target, Entry::Link);
        }
        let not_taken = self.asm.jcc(code ^ 1);
        if in_page(target) && self.is_backward(target) {
            self.spill(live);
            // The loop's own way: one compare, and one jump that the engine links.
            self.asm.cmp_gs32_imm8(frame::ALARM, 0);
            let jump = self.asm.jcc(cc::E);
            self.exit(jump, target, Entry::Link);
            let poll = self.asm.jmp();
            self.exit(poll, target, Entry::Poll);
        } else {
            self.leave_to(target, live);
        }
        self.asm.bind(not_taken);
        self.in_host = true;
        (self.held, self.kept) = (held, held);
    }

    fn call(&mut self, i: &Instruction) {
        self.spill(STATUS);
        let target = i.near_branch_target();
        if self.is_bounded() && !in_page(target) {
            return self.call_bounded(i);
        }
        let pushed = self.push_value(i, Value::Rip(i.next_ip()), 0);
        let landing = self.push_pair(i.next_ip(), pushed.held);
        self.transfer(target, 0, landing);
    }

    /// DEVIATION: if the target is not canonical, the return address was pushed (RSP is put back) before the exception, as AMD's processors
    /// do and Intel's do not (SDM 2A CALL).
    fn call_indirect(&mut self, i: &Instruction) -> bool {
        // The spill stays if the rest is undone.
        self.spill(STATUS);
        let mark = self.mark();
        if !self.target_to_s0(i) {
            self.back_to(mark);
            return false;
        }
        // The push needs both scratch registers.
        self.asm.store(frame::TEMP, S0);
        let pushed = self.push_value(i, Value::Rip(i.next_ip()), 0);
        let landing = self.push_pair(i.next_ip(), pushed.held);
        self.asm.load(S0, frame::TEMP);
        self.look_up(self.facts.legacy.is_none().then_some(-8), true, landing);
        true
    }

    fn jump_indirect(&mut self, i: &Instruction) -> bool {
        // The spill stays if the rest is undone.
        self.spill(STATUS);
        let mark = self.mark();
        if !self.target_to_s0(i) {
            self.back_to(mark);
            return false;
        }
        self.leave_indirect(self.facts.legacy.is_none().then_some(0), true);
        true
    }

    /// An indirect target into [`S0`].
    fn target_to_s0(&mut self, i: &Instruction) -> bool {
        if self.facts.legacy.is_some() {
            return self.legacy_target_to_s0(i);
        }
        if i.op0_kind() == OpKind::Register {
            self.register_to(S0, i.op0_register());
            return i.op0_register().size() == 8;
        }
        if i.memory_size().size() != 8 || self.own_operand(i, 0, 8, false, false).is_none() {
            return false;
        }
        self.asm.load_sum(S0, S0, S1);
        true
    }

    fn ret(&mut self, i: &Instruction) {
        self.spill(STATUS);
        if self.facts.legacy.is_some() {
            return self.legacy_ret(i);
        }
        if stack::item(i) != 8 {
            return self.interpret_transfer();
        }
        let more = if i.code() == Code::Retnq_imm16 { i32::from(i.immediate16()) } else { 0 };
        if more > i32::from(i8::MAX) - 8 {
            return self.interpret_transfer();
        }
        let top = self.stack_top(i, 0);
        self.asm.load_from(8, S0, top.place());
        self.asm.lea(SP, SP, None, 8 + more);
        let poll = self.poll();
        let popped = 8 + more as i8;
        if self.has_pairs() {
            self.return_by_pair(poll, popped);
        } else {
            self.inline_lookup(Some(popped), Some(poll), None);
        }
    }

    /// Goes on at the guest address in [`S0`]: inline lookup, if `polls` after a poll. `popped`: what the instruction added to RSP, if it is one
    /// that faults itself when the address is not canonical.
    pub(super) fn leave_indirect(&mut self, popped: Option<i8>, polls: bool) {
        self.look_up(popped, polls, None);
    }

    /// As [`Lowering::leave_indirect`]; by a host call, if there is a landing.
    fn look_up(&mut self, popped: Option<i8>, polls: bool, landing: Option<Landing>) {
        let poll = polls.then(|| self.poll());
        self.inline_lookup(popped, poll, landing);
    }

    /// The inline lookup. `poll`: a jump to the way out of line.
    fn inline_lookup(&mut self, popped: Option<i8>, poll: Option<Fixup>, landing: Option<Landing>) {
        let class = frame::jump_class(self.variant, self.facts.legacy.is_some());
        let rips = frame::JUMPS + class * frame::JUMP_STRIDE;
        self.asm.rotate_to(S1, S0, 10);
        self.asm.op32(Op::Xor, S1, S0);
        self.asm.and32(S1, frame::JUMP_MASK);
        self.asm.cmp_index8(S1, rips, S0);
        let other = self.asm.jcc(cc::NE);
        match landing {
            Some(landing) => {
                self.asm.call_index8(S1, rips + frame::JUMP_HOSTS);
                self.land(landing);
            }
            None => self.asm.jmp_index8(S1, rips + frame::JUMP_HOSTS),
        }
        self.asm.bind(other);
        if let Some(poll) = poll {
            self.asm.bind(poll);
        }
        if landing.is_some() {
            self.drop_pair();
        }
        self.lookup(popped);
    }

    /// Looks the address in [`S0`] up in the second-level table, or leaves.
    fn lookup(&mut self, popped: Option<i8>) {
        let site = popped.map_or(u32::MAX, |popped| self.site(SiteKind::Branch { popped }));
        let lookups = if self.facts.legacy.is_some() { frame::LOOKUP_LEGACY } else { frame::LOOKUP };
        self.asm.call_gs(lookups + 8 * self.variant as i32);
        self.asm.bytes(&site.to_le_bytes());
    }

    /// Where groups whose check failed go on: in code without groups.
    pub(super) fn finish_plain_exits(&mut self) {
        let mut emitted: Vec<(u16, usize)> = Vec::new();
        let mut exits = std::mem::take(&mut self.room.plain_exits);
        for n in exits.drain(..) {
            let Some(guest) = self.miss_site(n).map(|s| s.guest) else { continue };
            let known = emitted.iter().find(|(g, _)| *g == guest).map(|e| e.1);
            let at = known.unwrap_or_else(|| {
                let at = self.asm.here();
                let jump = self.asm.jmp();
                let variant = self.miss_variant(n);
                let target = u64::from(guest);
                self.room.pending.push(PendingExit {
                    jump,
                    target,
                    entry: Entry::Link,
                    variant,
                    plain: true,
                });
                emitted.push((guest, at));
                at
            });
            self.complete_one(n, at, false);
        }
        self.room.plain_exits = exits;
    }

    /// The stubs of all exits: where a jump that is not linked leads, and a poll that found the alarm set.
    pub(super) fn finish_exits(&mut self) {
        let mut stubs: Vec<(u64, super::Variant, bool, usize)> = Vec::new();
        let mut pending = std::mem::take(&mut self.room.pending);
        for p in pending.drain(..) {
            if p.entry == Entry::Link {
                self.asm.bind(p.jump);
                self.take_exit(Some(Asm::place(p.jump) as u32), p.target, p.variant, p.plain);
                continue;
            }
            let same = stubs.iter().find(|s| (s.0, s.1, s.2) == (p.target, p.variant, p.plain)).map(|s| s.3);
            if let Some(at) = same {
                self.asm.bind_to(p.jump, at);
            } else {
                self.asm.bind(p.jump);
                stubs.push((p.target, p.variant, p.plain, self.asm.here()));
                self.take_exit(None, p.target, p.variant, p.plain);
            }
        }
        self.room.pending = pending;
    }

    /// The interpreter does the current instruction, and the fragment is left.
    pub(super) fn interpret_transfer(&mut self) {
        self.callout();
        self.asm.jmp_gs(frame::LEAVE);
    }

    /// Leaves by an exit.
    pub(super) fn take_exit(
        &mut self,
        place: Option<u32>,
        target: u64,
        variant: super::Variant,
        plain: bool,
    ) {
        let number = self.exit_base + self.room.exits.len() as u32;
        let stub = self.asm.here() as u32;
        self.room.exits.push(Exit { place, stub, target: target as i32, variant, plain });
        self.asm.call_gs(frame::TAKE_EXIT);
        self.asm.bytes(&number.to_le_bytes());
    }
}
