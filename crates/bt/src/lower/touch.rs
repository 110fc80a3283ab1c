//! Instructions that do nothing but reach a device: the engine does them without the interpreter.

use iced_x86::{Code, Instruction, OpKind, Register};

/// What such an instruction does. Registers are general ones, by number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Touch {
    /// IN of `size` bytes from a port, or from that in DX.
    PortRead {
        /// The port, if it is named.
        port: Option<u8>,
        /// Bytes.
        size: u8,
    },
    /// OUT, likewise.
    PortWrite {
        /// The port, if it is named.
        port: Option<u8>,
        /// Bytes.
        size: u8,
    },
    /// RDMSR.
    MsrRead,
    /// WRMSR.
    MsrWrite,
    /// MOV from CR8 to a register.
    PriorityRead(u8),
    /// MOV to CR8.
    PriorityWrite(u8),
    /// A move from memory to so many bytes of a register: 4 clear the upper half, 8 are all.
    Load {
        /// To which register.
        to: u8,
        /// How much of it changes.
        width: u8,
    },
    /// A move of a register to memory.
    Store(u8),
}

impl Touch {
    /// What an instruction does, if it is one of those.
    pub(super) fn of(i: &Instruction) -> Option<Self> {
        let register = |n| number(i.op_register(n));
        let port = |n| (i.op_kind(n) == OpKind::Immediate8).then(|| i.immediate8());
        let size = |n| i.op_register(n).size() as u8;
        Some(match i.code() {
            Code::In_AL_imm8
            | Code::In_AX_imm8
            | Code::In_EAX_imm8
            | Code::In_AL_DX
            | Code::In_AX_DX
            | Code::In_EAX_DX => Self::PortRead { port: port(1), size: size(0) },
            Code::Out_imm8_AL
            | Code::Out_imm8_AX
            | Code::Out_imm8_EAX
            | Code::Out_DX_AL
            | Code::Out_DX_AX
            | Code::Out_DX_EAX => Self::PortWrite { port: port(0), size: size(1) },
            Code::Rdmsr => Self::MsrRead,
            Code::Wrmsr => Self::MsrWrite,
            Code::Mov_r64_cr if i.op1_register() == Register::CR8 => Self::PriorityRead(register(0)?),
            Code::Mov_cr_r64 if i.op0_register() == Register::CR8 => Self::PriorityWrite(register(1)?),
            Code::Mov_r8_rm8
            | Code::Mov_r16_rm16
            | Code::Mov_r32_rm32
            | Code::Mov_r64_rm64
            | Code::Movzx_r32_rm8
            | Code::Movzx_r32_rm16
                if i.op1_kind() == OpKind::Memory =>
            {
                Self::Load { to: register(0)?, width: size(0) }
            }
            Code::Mov_rm8_r8 | Code::Mov_rm16_r16 | Code::Mov_rm32_r32 | Code::Mov_rm64_r64
                if i.op0_kind() == OpKind::Memory =>
            {
                Self::Store(register(1)?)
            }
            _ => return None,
        })
    }
}

/// The number of a general register whose lowest bits are meant.
fn number(r: Register) -> Option<u8> {
    let high = matches!(r, Register::AH | Register::BH | Register::CH | Register::DH);
    (!high).then(|| r.full_register().number() as u8)
}
