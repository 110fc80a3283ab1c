//! What the scratch registers still hold from one instruction to the next: the difference of a group, and guest registers that live in the frame.
//!
//! A chain of computations through R13…R15 would otherwise wait for its own store at every step. The frame always has the value too; what is
//! remembered here is only ever read. Whatever does not say that it keeps something has clobbered both registers.

use iced_x86::{Instruction, OpKind, Register};

use super::Lowering;
use super::registers::{Borrowed, frame_slot, host_number, in_frame, rename};
use crate::emit::{Op, S0, S1};

/// What is in [`S0`] and [`S1`].
#[derive(Clone, Copy, Default)]
pub(super) struct Scratch {
    /// The group whose difference is in [`S1`].
    pub delta: Option<u8>,
    guests: [Option<Register>; 2],
    /// Which of the two was used last.
    recent: u8,
}

const HOSTS: [u8; 2] = [S0, S1];

impl Scratch {
    /// The scratch register with a guest register's value.
    pub fn find(&self, guest: Register) -> Option<u8> {
        let guest = guest.full_register();
        HOSTS.into_iter().zip(self.guests).find(|(_, g)| *g == Some(guest)).map(|(host, _)| host)
    }

    /// [`S0`] holds something else now.
    pub const fn lose_s0(&mut self) {
        self.guests[0] = None;
    }

    /// [`S1`] holds a group's difference.
    pub const fn hold_delta(&mut self, group: usize) {
        // There are at most [`crate::frame::MAX_GROUPS`].
        self.delta = Some(group as u8);
        self.guests[1] = None;
    }

    /// `host` holds the value of `guest`, and nothing else does.
    pub fn hold(&mut self, host: u8, guest: Register) {
        self.lose(guest);
        let slot = u8::from(host == S1);
        if slot == 1 {
            self.delta = None;
        }
        self.guests[usize::from(slot)] = Some(guest.full_register());
        self.recent = slot;
    }

    /// The value of `guest` in the frame is another now.
    pub fn lose(&mut self, guest: Register) {
        for g in self.guests.iter_mut().filter(|g| **g == Some(guest.full_register())) {
            *g = None;
        }
    }

    /// In which order to take the scratch registers for the frame's registers that `i` names, first come first served.
    fn order(&self, i: &Instruction) -> [u8; 2] {
        let mut named = (0..i.op_count())
            .filter(|&n| i.op_kind(n) == OpKind::Register && in_frame(i.op_register(n)))
            .map(|n| i.op_register(n).full_register());
        let first = named.next();
        let second = named.find(|&r| Some(r) != first);
        let wanted = match (first.and_then(|r| self.find(r)), second.and_then(|r| self.find(r))) {
            (Some(host), _) => host,
            (None, Some(S0)) => S1,
            (None, Some(_)) => S0,
            (None, None) => HOSTS[self.victim()],
        };
        if wanted == S0 { [S0, S1] } else { [S1, S0] }
    }

    /// Which of the two is missed least.
    const fn victim(&self) -> usize {
        let full = [self.guests[0].is_some(), self.guests[1].is_some() || self.delta.is_some()];
        match full {
            [false, _] => 0,
            [true, false] => 1,
            [true, true] => 1 - self.recent as usize,
        }
    }
}

impl Lowering<'_, '_> {
    /// An instruction on registers only, its operands renamed. False: it cannot be encoded.
    pub(super) fn on_registers(&mut self, i: &Instruction) -> bool {
        if !self.look.renamed {
            self.kept = self.held;
            return self.asm.instruction(i);
        }
        let order = self.held.order(i);
        let Some((renamed, used)) = rename(i, &order, &mut self.room.info) else { return false };
        self.load_borrowed(&used);
        if !self.asm.instruction(&renamed) {
            return false;
        }
        self.store_borrowed(&used);
        self.kept = self.held;
        for b in used.iter() {
            self.kept.hold(b.host, b.guest);
        }
        true
    }

    /// MOV of 64 bits between a register and one of the frame.
    pub(super) fn frame_move(&mut self, i: &Instruction) -> bool {
        if i.op0_kind() != OpKind::Register
            || i.op1_kind() != OpKind::Register
            || i.op0_register().size() != 8
        {
            return false;
        }
        let (to, from) = (i.op0_register(), i.op1_register());
        self.kept = self.held;
        match (in_frame(to), in_frame(from)) {
            (true, false) => {
                self.asm.store(frame_slot(to), host_number(from));
                self.kept.lose(to);
            }
            (false, true) => self.register_to(host_number(to), from),
            _ => return false,
        }
        true
    }

    /// Loads what an instruction reads of the registers it borrows, as far as they do not hold it.
    pub(super) fn load_borrowed(&mut self, used: &[Borrowed]) {
        for b in used.iter().filter(|b| b.load && self.held.find(b.guest) != Some(b.host)) {
            self.asm.gs(Op::Mov, b.host, frame_slot(b.guest));
        }
    }

    /// Stores what an instruction wrote of the registers it borrowed.
    pub(super) fn store_borrowed(&mut self, used: &[Borrowed]) {
        for b in used.iter().filter(|b| b.store) {
            self.asm.store(frame_slot(b.guest), b.host);
        }
    }

    /// A guest register's value into a host register.
    pub(super) fn register_to(&mut self, to: u8, r: Register) {
        match self.held.find(r) {
            Some(host) => self.asm.mov(to, host),
            None if in_frame(r) => self.asm.load(to, frame_slot(r)),
            None => self.asm.mov(to, host_number(r)),
        }
    }
}
