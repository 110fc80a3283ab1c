//! The host's stack in the proof of INV-BT-3: calls and returns in pairs (`bt::lower::pair`, INV-PAIR-2).
//!
//! The straight line pushes a guest address only where RSP was compared with the end of the room, or is where no pair is; calls with nothing but that
//! address above what it found, or takes it back; and returns only with RSP as it found it, if R14 is the address of the pair on top. So whoever
//! enters another fragment leaves whole pairs behind, and the host returns only behind a call.

use bt::frame;
use bt::listing::frame_field;
use iced_x86::{Code, FlowControl, Instruction, OpKind, Register};

/// What is known of the host's stack.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Pairs {
    /// A guest address lies on top of what the fragment found.
    address: bool,
    /// There is room for a pair.
    room: bool,
    /// The flags say whether there is room.
    end_compared: bool,
    /// The flags say whether R14 is the address of the pair on top.
    top_compared: bool,
    /// It is.
    equal: bool,
}

/// What an instruction does with the host's stack.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Does {
    /// Nothing that is followed here.
    Nothing,
    /// Something that has been followed here.
    Moves,
    /// Another fragment runs, and returns here.
    Calls,
}

/// A call by the jump cache.
pub fn calls_by_cache(i: &Instruction) -> bool {
    i.is_call_near_indirect() && i.memory_segment() == Register::GS && i.memory_index() == Register::R15
}

/// Whether an instruction may name RSP because this module follows it.
pub fn follows(i: &Instruction) -> bool {
    let to_rsp = i.op0_kind() == OpKind::Register && i.op0_register() == Register::RSP;
    let field = frame_field(i);
    match i.code() {
        Code::Pushq_imm32 => true,
        Code::Push_r64 => matches!(i.op0_register(), Register::R14 | Register::R15),
        Code::Lea_r64_m => to_rsp && is_second_word(i),
        Code::Mov_r64_rm64 => drops_all(i),
        Code::Cmp_r64_rm64 => to_rsp && field == Some(frame::PAIRS_END),
        Code::Cmp_rm64_r64 => compares_top(i),
        Code::Call_rel32_64 | Code::Retnq => true,
        _ => calls_by_cache(i),
    }
}

/// `mov rsp, gs:[PAIRS]`
pub fn drops_all(i: &Instruction) -> bool {
    i.code() == Code::Mov_r64_rm64
        && i.op0_register() == Register::RSP
        && frame_field(i) == Some(frame::PAIRS)
}

/// `cmp [rsp + 8], r14`
pub fn compares_top(i: &Instruction) -> bool {
    i.code() == Code::Cmp_rm64_r64
        && i.op0_kind() == OpKind::Memory
        && is_second_word(i)
        && i.op1_register() == Register::R14
}

fn is_second_word(i: &Instruction) -> bool {
    i.memory_base() == Register::RSP
        && i.memory_index() == Register::None
        && i.memory_displacement64() == 8
        && i.memory_segment() != Register::GS
}

impl Pairs {
    /// Follows an instruction. `link`: the engine may lead its jump to another fragment.
    pub fn step(&mut self, i: &Instruction, link: bool) -> Result<Does, &'static str> {
        let before = *self;
        (self.end_compared, self.top_compared, self.equal) = (false, false, false);
        let need = |holds: bool, why| if holds { Ok(Does::Moves) } else { Err(why) };
        match i.code() {
            _ if !follows(i) => {
                let leaves = link
                    || matches!(i.flow_control(), FlowControl::IndirectBranch | FlowControl::IndirectCall)
                        && frame_field(i) != Some(frame::LEAVE);
                if i.code() == Code::Jne_rel32_64 && before.top_compared {
                    self.equal = true;
                }
                if i.code() == Code::Jbe_rel32_64 && before.end_compared {
                    self.room = true;
                }
                if before.address && leaves { Err("half a pair is left") } else { Ok(Does::Nothing) }
            }
            Code::Lea_r64_m => {
                self.address = false;
                need(before.address, "nothing to drop")
            }
            Code::Mov_r64_rm64 => {
                (self.address, self.room) = (false, true);
                Ok(Does::Moves)
            }
            Code::Cmp_r64_rm64 => {
                self.end_compared = true;
                Ok(Does::Moves)
            }
            Code::Cmp_rm64_r64 => {
                self.top_compared = true;
                need(!before.address, "half a pair is compared")
            }
            Code::Retnq => need(before.equal && !before.address, "a return that was not compared"),
            Code::Pushq_imm32 | Code::Push_r64 => {
                (self.address, self.room) = (true, false);
                need(before.room && !before.address, "a pair without room")
            }
            _ if before.address && (link || calls_by_cache(i)) => Ok(Does::Calls),
            _ => Err("a call without its pair"),
        }
    }

    /// What is known where a conditional jump leads. `self`: in front of the jump.
    pub fn jumped(self) -> Self {
        Self { end_compared: false, top_compared: false, equal: false, ..self }
    }

    /// What is known where ways come together.
    pub fn meet(&mut self, other: &Self) -> Result<(), &'static str> {
        let same = self.address == other.address;
        *self = Self { address: self.address, room: self.room && other.room, ..Self::default() };
        if same { Ok(()) } else { Err("half a pair on one way only") }
    }

    /// Whether half a pair lies on the stack.
    pub const fn is_half(&self) -> bool {
        self.address
    }
}
