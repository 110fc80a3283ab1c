//! Effective addresses of memory operands, resolved once per decoded instruction (SDM 1 3.7.5).

use iced_x86::{CodeSize, Instruction, OpKind, Register};

use super::VectorCpu;

/// A memory operand without the values of its registers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Address {
    /// Segment register, ES 0 to GS 5.
    pub segment: u8,
    base: Base,
    /// Index register, or [`NONE`]. A vector index (VSIB) is left to the caller.
    index: u8,
    pub scale: u8,
    displacement: u64,
    /// Address size: 0xffff, 0xffff_ffff or all ones.
    pub mask: u64,
}

const NONE: u8 = 0xff;

#[derive(Clone, Copy, Debug)]
enum Base {
    None,
    Gpr(u8),
    /// Relative to the next instruction.
    Rip,
}

fn size_mask(bytes: usize) -> u64 {
    match bytes {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    }
}

fn gpr(r: Register) -> Option<u8> {
    r.is_gpr().then(|| u8::try_from(r.full_register().number()).ok()).flatten()
}

/// The memory operand's segment. 64-bit code ignores overrides but FS and GS (APM 2 4.5.3): the base register decides.
fn segment(i: &Instruction) -> u8 {
    let long = i.code_size() == CodeSize::Code64;
    let stack = matches!(i.memory_base(), Register::RSP | Register::RBP | Register::ESP | Register::EBP);
    match i.memory_segment() {
        Register::ES | Register::CS | Register::SS | Register::DS if long => 3 - u8::from(stack),
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::FS => 4,
        Register::GS => 5,
        _ => 3,
    }
}

impl Address {
    /// The address of `instruction`'s memory operand; something harmless if it has none.
    pub fn new(instruction: &Instruction) -> Self {
        if let Some(rdi) = (0..instruction.op_count()).find_map(|i| match instruction.op_kind(i) {
            OpKind::MemorySegRDI => Some(8),
            OpKind::MemorySegEDI => Some(4),
            OpKind::MemorySegDI => Some(2),
            _ => None,
        }) {
            return Self {
                segment: segment(instruction),
                base: Base::Gpr(7),
                index: NONE,
                scale: 1,
                displacement: 0,
                mask: size_mask(rdi),
            };
        }
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let displacement = instruction.memory_displacement64();
        let mut mask = size_mask(instruction.memory_displ_size() as usize);
        let mut place = Base::None;
        let mut offset = displacement;
        match base {
            Register::RIP | Register::EIP => {
                // iced gives the sum with the address it decoded at; the cached instruction may run elsewhere.
                offset = displacement.wrapping_sub(instruction.next_ip());
                mask = size_mask(base.size());
                place = Base::Rip;
            }
            _ => {
                if let Some(n) = gpr(base) {
                    place = Base::Gpr(n);
                    mask = size_mask(base.size());
                }
            }
        }
        let index_gpr = gpr(index);
        if index_gpr.is_some() && base == Register::None {
            mask = size_mask(index.size());
        }
        Self {
            segment: segment(instruction),
            base: place,
            index: index_gpr.unwrap_or(NONE),
            scale: u8::try_from(instruction.memory_index_scale()).unwrap_or(1),
            displacement: offset,
            mask,
        }
    }

    /// The offset within the segment.
    #[inline(always)]
    pub fn offset<C: VectorCpu>(&self, cpu: &C, len: u8) -> u64 {
        self.unmasked(cpu, len) & self.mask
    }

    /// Base, scalar index and displacement, not yet cut to the address size.
    #[inline(always)]
    pub fn unmasked<C: VectorCpu>(&self, cpu: &C, len: u8) -> u64 {
        let mut sum = self.displacement;
        match self.base {
            Base::None => {}
            Base::Gpr(n) => sum = sum.wrapping_add(cpu.gpr(usize::from(n & 15))),
            Base::Rip => sum = sum.wrapping_add(cpu.control().rip).wrapping_add(u64::from(len)),
        }
        if self.index != NONE {
            let index = cpu.gpr(usize::from(self.index & 15));
            sum = sum.wrapping_add(index.wrapping_mul(u64::from(self.scale)));
        }
        sum
    }
}
