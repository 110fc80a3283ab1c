//! Guest registers to host registers.

use std::ops::{Deref, DerefMut};

use iced_x86::{EncodingKind, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register};

use crate::emit::{S0, S1, SP};
use crate::frame;
use crate::look::{gpr_number, is_write};

/// A guest register of the frame that an instruction uses, in a scratch register meanwhile.
#[derive(Clone, Copy, Default)]
pub(super) struct Borrowed {
    pub guest: Register,
    pub host: u8,
    pub load: bool,
    pub store: bool,
}

/// The registers that an instruction borrows: few.
#[derive(Default)]
pub(super) struct Borrowing {
    all: [Borrowed; 4],
    count: usize,
}

impl Borrowing {
    fn push(&mut self, borrowed: Borrowed) {
        if let Some(place) = self.all.get_mut(self.count) {
            *place = borrowed;
            self.count += 1;
        }
    }
}

impl Deref for Borrowing {
    type Target = [Borrowed];

    fn deref(&self) -> &[Borrowed] {
        &self.all[..self.count]
    }
}

impl DerefMut for Borrowing {
    fn deref_mut(&mut self) -> &mut [Borrowed] {
        &mut self.all[..self.count]
    }
}

/// Guest registers that live in the frame.
pub(super) const fn in_frame(r: Register) -> bool {
    matches!(gpr_number(r), 13..=15)
}

pub(super) const fn frame_slot(r: Register) -> i32 {
    frame::GPR + 8 * (gpr_number(r) & 15) as i32
}

/// The host register number of a guest register that is not in the frame.
pub(super) const fn host_number(r: Register) -> u8 {
    match gpr_number(r) {
        4 => SP,
        number => number & 15,
    }
}

/// Register `number` in the size of `like`.
fn sized(number: u8, like: Register) -> Register {
    let base = match like.size() {
        8 => Register::RAX,
        4 => Register::EAX,
        2 => Register::AX,
        _ => {
            // AL…BL are followed by AH…BH, then SPL…R15L.
            return if number < 4 {
                Register::AL + u32::from(number)
            } else {
                Register::SPL + u32::from(number - 4)
            };
        }
    };
    base + u32::from(number)
}

/// The instruction with its general register operands renamed, and the frame registers with the scratch registers that stand for
/// them. None if there are not enough of those, or a register cannot be renamed.
pub(super) fn rename(
    i: &Instruction,
    scratch: &[u8],
    info: &mut InstructionInfoFactory,
) -> Option<(Instruction, Borrowing)> {
    let mut renamed = *i;
    let mut used = Borrowing::default();
    for n in 0..i.op_count() {
        if i.op_kind(n) != OpKind::Register || !i.op_register(n).is_gpr() {
            continue;
        }
        let r = i.op_register(n);
        let number = if in_frame(r) {
            let guest = r.full_register();
            match used.iter().find(|b| b.guest == guest) {
                Some(b) => b.host,
                None => {
                    let host = *scratch.get(used.len())?;
                    used.push(Borrowed { guest, host, load: false, store: false });
                    host
                }
            }
        } else if r.full_register() == Register::RSP && r != Register::AH {
            SP
        } else {
            continue;
        };
        renamed.set_op_register(n, sized(number, r));
    }
    if !used.is_empty() {
        for u in info.info(i).used_registers() {
            let guest = u.register().full_register();
            if let Some(b) = used.iter_mut().find(|b| b.guest == guest) {
                let write = is_write(u.access());
                b.store |= write;
                // A write of 32 or 64 bits leaves nothing of the old value.
                b.load |= u.access() != OpAccess::Write || u.register().size() < 4;
            }
        }
    }
    Some((renamed, used))
}

/// The same for an instruction whose memory operand is read, and nothing else read is of the frame but one register, with the operand's value in
/// [`S1`] instead: [`S0`] and then [`S1`] take what it writes, as instructions of several operands read before they write. None if it is not
/// of that kind.
pub(super) fn rename_value(
    i: &Instruction,
    info: &mut InstructionInfoFactory,
) -> Option<(Instruction, Borrowing)> {
    if i.encoding() != EncodingKind::VEX {
        return None;
    }
    let mut renamed = *i;
    let mut used = Borrowing::default();
    let mut written = [S0, S1].into_iter();
    for n in 0..i.op_count() {
        let access = info.info(i).op_access(n);
        if i.op_kind(n) == OpKind::Memory {
            let like = match i.memory_size().size() {
                8 => Register::R15,
                4 => Register::R15D,
                _ => return None,
            };
            renamed.set_op_kind(n, OpKind::Register);
            renamed.set_op_register(n, like);
            continue;
        }
        if i.op_kind(n) != OpKind::Register {
            continue;
        }
        let r = i.op_register(n);
        if !in_frame(r) {
            renamed.set_op_register(n, sized(host_number(r), r));
            continue;
        }
        let guest = r.full_register();
        let (host, load, store) = match access {
            OpAccess::Read => (S0, true, false),
            // Two writes of one register: of MULX the first operand's counts (SDM 2B MULX).
            OpAccess::Write => match used.iter().find(|b| b.store && b.guest == guest) {
                Some(b) => (b.host, false, true),
                None => (written.next()?, false, true),
            },
            _ => return None,
        };
        renamed.set_op_register(n, sized(host, r));
        used.push(Borrowed { guest, host, load, store });
    }
    Some((renamed, used))
}
