//! Makes instructions: from the list of all encodings, with random operands that mostly point into the data.

use iced_x86::{
    Code, CpuidFeature, EncodingKind, Instruction, OpCodeOperandKind as K, OpKind, Register, RoundingControl,
};
use x86::cpuid::{CpuModel, Gate};

use crate::excluded;
use crate::rng::Rng;
use crate::state::{CODE, DATA, DATA_BYTES, Mode};

/// Instructions of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub enum Group {
    Integer,
    X87,
    Sse,
    Avx,
    Avx512,
}

pub const GROUPS: [Group; 5] = [Group::Integer, Group::X87, Group::Sse, Group::Avx, Group::Avx512];

/// The encodings that this host and our model have, by group.
pub struct Catalogue {
    pub mode: Mode,
    groups: Vec<(Group, Vec<Code>)>,
}

fn group_of(code: Code) -> Group {
    let features = code.cpuid_features();
    let is = |f: &[CpuidFeature]| features.iter().any(|x| f.contains(x));
    let vector_operand = code.op_code().op_kinds().iter().any(|k| {
        let name = format!("{k:?}");
        name.contains("mm_") || name.contains("mmp3") || name.starts_with("k_") || name.starts_with("kp1")
    });
    match code.op_code().encoding() {
        EncodingKind::EVEX => Group::Avx512,
        _ if is(&[CpuidFeature::FPU, CpuidFeature::FPU287, CpuidFeature::FPU387, CpuidFeature::SSE3])
            && !vector_operand =>
        {
            Group::X87
        }
        EncodingKind::VEX if format!("{:?}", code.mnemonic()).starts_with('K') => Group::Avx512,
        EncodingKind::VEX if vector_operand => Group::Avx,
        EncodingKind::Legacy if vector_operand => Group::Sse,
        _ if is(&[CpuidFeature::SSE, CpuidFeature::SSE2, CpuidFeature::MMX]) => Group::Sse,
        _ if is(&[CpuidFeature::AVX]) => Group::Avx,
        _ => Group::Integer,
    }
}

impl Catalogue {
    pub fn new(mode: Mode) -> Self {
        let model = CpuModel::parse("max").unwrap();
        let mut groups: Vec<_> = GROUPS.iter().map(|g| (*g, Vec::new())).collect();
        for code in Code::values() {
            if excluded::reason(code, mode.bits()).is_some() {
                continue;
            }
            let mut i = Instruction::default();
            i.set_code(code);
            if model.gate(&i) == Gate::Announced {
                let group = group_of(code);
                groups.iter_mut().find(|g| g.0 == group).unwrap().1.push(code);
            }
        }
        Self { mode, groups }
    }

    pub fn codes(&self, group: Group) -> &[Code] {
        &self.groups.iter().find(|g| g.0 == group).unwrap().1
    }
}

/// What the registers of a case are for.
pub struct Roles {
    pub mode: Mode,
    /// Registers that point into the data.
    pub pointers: Vec<u32>,
    /// Registers with small values.
    pub indices: Vec<u32>,
}

const GPR64: [Register; 16] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSP,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];
const GPR8: [Register; 20] = [
    Register::AL,
    Register::CL,
    Register::DL,
    Register::BL,
    Register::SPL,
    Register::BPL,
    Register::SIL,
    Register::DIL,
    Register::R8L,
    Register::R9L,
    Register::R10L,
    Register::R11L,
    Register::R12L,
    Register::R13L,
    Register::R14L,
    Register::R15L,
    Register::AH,
    Register::CH,
    Register::DH,
    Register::BH,
];

/// General register `n` with `bits` bits.
fn gpr(n: u32, bits: u32) -> Register {
    match bits {
        16 => Register::AX + n,
        32 => Register::EAX + n,
        _ => GPR64[n as usize],
    }
}

impl Roles {
    fn count(&self) -> u32 {
        if self.mode == Mode::Long { 16 } else { 8 }
    }

    /// A register to compute with: seldom one that something depends on.
    fn any(&self, rng: &mut Rng) -> u32 {
        for _ in 0..6 {
            let n = rng.below(self.count().into()) as u32;
            if n != 4 && !self.pointers.contains(&n) || rng.chance(12) {
                return n;
            }
        }
        0
    }

    fn any8(&self, rng: &mut Rng) -> Register {
        if self.mode == Mode::Compat {
            return *rng.pick(&[GPR8[0], GPR8[1], GPR8[2], GPR8[3], GPR8[16], GPR8[17], GPR8[18], GPR8[19]]);
        }
        if rng.chance(25) { GPR8[16 + rng.below(4) as usize] } else { GPR8[self.any(rng) as usize] }
    }

    /// A memory operand of `size` bytes. `vsib`: the first register of the index's class.
    fn memory(&self, rng: &mut Rng, i: &mut Instruction, size: usize, vsib: Option<Register>) {
        let long = self.mode == Mode::Long;
        let bits = if long && rng.chance(6) { 32 } else { self.mode.bits() };
        let unit = if rng.chance(85) { size.clamp(1, 64) as i64 } else { 1 };
        let disp = (rng.below(256) as i64 - 128) / unit * unit;
        i.set_memory_displacement64(disp.cast_unsigned());
        i.set_memory_displ_size(if bits == 64 { 8 } else { 4 });
        if (-128..128).contains(&disp) && rng.chance(80) {
            i.set_memory_displ_size(1);
        }
        if let Some(first) = vsib {
            i.set_memory_base(gpr(*rng.pick(&self.pointers), self.mode.bits()));
            i.set_memory_index(first + rng.below(8) as u32);
            i.set_memory_index_scale(1 << rng.below(4));
            return;
        }
        let near_data = DATA.wrapping_add(rng.below(DATA_BYTES as u64 - 64) & !(unit as u64 - 1));
        match rng.below(20) {
            0 | 1 if long => {
                i.set_memory_base(Register::RIP);
                i.set_memory_displ_size(8);
                let wide = rng.chance(4);
                i.set_memory_displacement64(if wide { CODE + rng.below(0x2000) } else { near_data });
            }
            2 => {
                i.set_memory_displ_size(if bits == 64 { 8 } else { 4 });
                i.set_memory_displacement64(near_data);
            }
            3 => {
                // Anything: mostly a fault.
                i.set_memory_base(gpr(rng.below(self.count().into()) as u32, bits));
            }
            4..8 => {
                i.set_memory_base(gpr(*rng.pick(&self.pointers), bits));
                let index = *rng.pick(&self.indices);
                i.set_memory_index(gpr(if index == 4 { 1 } else { index }, bits));
                i.set_memory_index_scale(1 << rng.below(4));
            }
            8 => {
                let index = *rng.pick(&self.pointers);
                i.set_memory_index(gpr(if index == 4 { 6 } else { index }, bits));
                i.set_memory_index_scale(1);
                i.set_memory_displ_size(if bits == 64 { 8 } else { 4 });
            }
            _ => i.set_memory_base(gpr(*rng.pick(&self.pointers), bits)),
        }
        if rng.chance(4) {
            let choice = [Register::ES, Register::CS, Register::SS, Register::DS, Register::GS];
            i.set_segment_prefix(*rng.pick(&choice));
        }
    }
}

/// A random instance of `code`; None if its operands came out impossible.
pub fn instance(rng: &mut Rng, roles: &Roles, code: Code) -> Instruction {
    let oc = code.op_code();
    let mut i = Instruction::default();
    i.set_code(code);
    let has_memory_form = oc.op_kinds().iter().any(|k| format!("{k:?}").contains("mem"));
    let memory = has_memory_form && rng.chance(55);
    for n in 0..oc.op_count() {
        operand(rng, roles, &mut i, n, oc.op_kind(n), memory);
    }
    decorate(rng, &mut i);
    i
}

fn register(i: &mut Instruction, n: u32, r: Register) {
    i.set_op_kind(n, OpKind::Register);
    i.set_op_register(n, r);
}

/// How many vector registers the encoding reaches.
fn vectors(roles: &Roles, i: &Instruction) -> u64 {
    match (roles.mode, i.code().op_code().encoding()) {
        (Mode::Compat, _) => 8,
        (_, EncodingKind::EVEX) => 32,
        _ => 16,
    }
}

fn operand(rng: &mut Rng, roles: &Roles, i: &mut Instruction, n: u32, kind: K, memory: bool) {
    let bits = roles.mode.bits();
    let vector = |rng: &mut Rng, i: &Instruction| rng.below(vectors(roles, i)) as u32;
    let address = if bits == 64 && rng.chance(95) || bits == 32 && rng.chance(1) { 64 } else { 32 };
    let address = if bits == 32 { 32 } else { address };
    let mem = |rng: &mut Rng, i: &mut Instruction, vsib| {
        i.set_op_kind(n, OpKind::Memory);
        let size = i.memory_size().size();
        roles.memory(rng, i, size, vsib);
    };
    match kind {
        K::mem => mem(rng, i, None),
        K::mem_vsib32x | K::mem_vsib64x => mem(rng, i, Some(Register::XMM0)),
        K::mem_vsib32y | K::mem_vsib64y => mem(rng, i, Some(Register::YMM0)),
        K::mem_vsib32z | K::mem_vsib64z => mem(rng, i, Some(Register::ZMM0)),
        K::mem_offs => {
            i.set_op_kind(n, OpKind::Memory);
            i.set_memory_displ_size(bits / 8);
            i.set_memory_displacement64(DATA + rng.below(DATA_BYTES as u64 - 8));
        }
        K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem | K::mm_or_mem | K::xmm_or_mem
            if memory =>
        {
            mem(rng, i, None);
        }
        K::ymm_or_mem | K::zmm_or_mem | K::k_or_mem if memory => mem(rng, i, None),
        K::r8_or_mem | K::r8_reg | K::r8_opcode => {
            let r = roles.any8(rng);
            register(i, n, r);
        }
        K::r16_or_mem | K::r16_reg | K::r16_reg_mem | K::r16_rm | K::r16_opcode => {
            register(i, n, gpr(roles.any(rng), 16));
        }
        K::r32_or_mem | K::r32_reg | K::r32_reg_mem | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
            register(i, n, gpr(roles.any(rng), 32));
        }
        K::r64_or_mem | K::r64_reg | K::r64_reg_mem | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
            register(i, n, gpr(roles.any(rng), 64));
        }
        K::seg_reg => register(i, n, *rng.pick(&[Register::ES, Register::CS, Register::SS, Register::DS])),
        K::k_or_mem | K::k_reg | K::k_rm | K::k_vvvv => register(i, n, Register::K0 + rng.below(8) as u32),
        K::kp1_reg => register(i, n, Register::K0 + 2 * rng.below(4) as u32),
        K::mm_or_mem | K::mm_reg | K::mm_rm => register(i, n, Register::MM0 + rng.below(8) as u32),
        K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
            let r = vector(rng, i);
            register(i, n, Register::XMM0 + r);
        }
        K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
            let r = vector(rng, i);
            register(i, n, Register::YMM0 + r);
        }
        K::zmm_or_mem | K::zmm_reg | K::zmm_rm | K::zmm_vvvv => {
            let r = vector(rng, i);
            register(i, n, Register::ZMM0 + r);
        }
        K::xmmp3_vvvv => register(i, n, Register::XMM0 + 4 * rng.below(4) as u32),
        K::zmmp3_vvvv => register(i, n, Register::ZMM0 + 4 * rng.below(4) as u32),
        K::es => register(i, n, Register::ES),
        K::cs => register(i, n, Register::CS),
        K::ss => register(i, n, Register::SS),
        K::ds => register(i, n, Register::DS),
        K::fs => register(i, n, Register::FS),
        K::gs => register(i, n, Register::GS),
        K::al => register(i, n, Register::AL),
        K::cl => register(i, n, Register::CL),
        K::ax => register(i, n, Register::AX),
        K::dx => register(i, n, Register::DX),
        K::eax => register(i, n, Register::EAX),
        K::rax => register(i, n, Register::RAX),
        K::st0 => register(i, n, Register::ST0),
        K::sti_opcode => register(i, n, Register::ST0 + rng.below(8) as u32),
        K::seg_rSI => {
            i.set_op_kind(n, if address == 64 { OpKind::MemorySegRSI } else { OpKind::MemorySegESI })
        }
        K::es_rDI => i.set_op_kind(n, if address == 64 { OpKind::MemoryESRDI } else { OpKind::MemoryESEDI }),
        K::seg_rDI => {
            i.set_op_kind(n, if address == 64 { OpKind::MemorySegRDI } else { OpKind::MemorySegEDI })
        }
        K::seg_rBX_al => {
            i.set_op_kind(n, OpKind::Memory);
            i.set_memory_base(gpr(3, address));
            i.set_memory_index(Register::AL);
        }
        K::br16_1 | K::br32_1 | K::br64_1 | K::br16_2 | K::br32_4 | K::br64_4 => {
            i.set_op_kind(n, if bits == 64 { OpKind::NearBranch64 } else { OpKind::NearBranch32 });
        }
        _ => immediate(rng, i, n, kind),
    }
}

fn immediate(rng: &mut Rng, i: &mut Instruction, n: u32, kind: K) {
    let value = rng.value();
    let enter = i.mnemonic() == iced_x86::Mnemonic::Enter;
    match kind {
        K::imm8_const_1 => {
            i.set_op_kind(n, OpKind::Immediate8);
            i.set_immediate8(1);
        }
        K::imm4_m2z => {
            i.set_op_kind(n, OpKind::Immediate8);
            i.set_immediate8(value as u8 & 15);
        }
        K::imm8 if n > 0 && matches!(i.op_kind(n - 1), OpKind::Immediate8 | OpKind::Immediate16) => {
            i.set_op_kind(n, OpKind::Immediate8_2nd);
            i.set_immediate8_2nd(if enter { value as u8 & 3 } else { value as u8 });
        }
        K::imm8 => {
            i.set_op_kind(n, OpKind::Immediate8);
            i.set_immediate8(value as u8);
        }
        K::imm8sex16 => {
            i.set_op_kind(n, OpKind::Immediate8to16);
            i.set_immediate8to16(i16::from(value as i8));
        }
        K::imm8sex32 => {
            i.set_op_kind(n, OpKind::Immediate8to32);
            i.set_immediate8to32(i32::from(value as i8));
        }
        K::imm8sex64 => {
            i.set_op_kind(n, OpKind::Immediate8to64);
            i.set_immediate8to64(i64::from(value as i8));
        }
        K::imm16 => {
            i.set_op_kind(n, OpKind::Immediate16);
            i.set_immediate16(if enter || i.is_stack_instruction() {
                value as u16 & 0xff
            } else {
                value as u16
            });
        }
        K::imm32 => {
            i.set_op_kind(n, OpKind::Immediate32);
            i.set_immediate32(value as u32);
        }
        K::imm32sex64 => {
            i.set_op_kind(n, OpKind::Immediate32to64);
            i.set_immediate32to64(i64::from(value as i32));
        }
        K::imm64 => {
            i.set_op_kind(n, OpKind::Immediate64);
            i.set_immediate64(value);
        }
        other => panic!("{:?} has an operand {other:?} that is not generated", i.code()),
    }
}

/// Prefixes, opmasks, broadcast, rounding.
fn decorate(rng: &mut Rng, i: &mut Instruction) {
    let oc = i.code().op_code();
    let is_memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    if oc.can_use_lock_prefix() && i.op0_kind() == OpKind::Memory && rng.chance(40) {
        i.set_has_lock_prefix(true);
    }
    if oc.can_use_rep_prefix() && rng.chance(60) {
        i.set_has_rep_prefix(true);
    } else if oc.can_use_repne_prefix() && rng.chance(60) {
        i.set_has_repne_prefix(true);
    }
    let mask = Register::K1 + rng.below(7) as u32;
    if oc.require_op_mask_register() || oc.can_use_op_mask_register() && rng.chance(50) {
        i.set_op_mask(mask);
        if oc.can_use_zeroing_masking() && i.op0_kind() == OpKind::Register && rng.chance(40) {
            i.set_zeroing_masking(true);
        }
    }
    if is_memory {
        if oc.can_broadcast() && rng.chance(40) {
            i.set_is_broadcast(true);
        }
    } else if oc.can_use_rounding_control() && rng.chance(30) {
        use RoundingControl as R;
        i.set_rounding_control(*rng.pick(&[R::RoundToNearest, R::RoundDown, R::RoundUp, R::RoundTowardZero]));
    } else if oc.can_suppress_all_exceptions() && rng.chance(20) {
        i.set_suppress_all_exceptions(true);
    }
}
