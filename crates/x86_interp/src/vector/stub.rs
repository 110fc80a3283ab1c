//! Builds the host code that executes one guest instruction: pure, executes nothing.
//!
//! A stub is a function of one argument (RDI, the frame): it loads the vector and opmask registers that the instruction
//! names from the area, general registers and flags from the frame, executes the instruction with its memory operand at
//! the frame's bounce buffer, and stores what was written. x87 and MMX state is loaded and stored whole, by
//! FXRSTOR64 and FXSAVE64. Registers that the instruction does not name are neither loaded nor stored.
//!
//! INV-VEC-1: a stub is straight-line code that ends in RET, clobbers only registers that the System V convention
//! lets it clobber, touches memory only in the frame, the area and below RSP, and restores MXCSR and the x87 state.
//! It holds because the one instruction that comes from the guest is of this module's (no branch, no system
//! instruction, no stack), its memory operand is replaced, and its general registers are renamed.

use iced_x86::{
    Code, CodeSize, Encoder, EncodingKind, Instruction, InstructionInfo, InstructionInfoFactory,
    MemoryOperand, OpAccess, OpCodeOperandKind, OpKind, Register, RflagsBits,
};

use super::layout::{Layout, at, layout};
use super::native::{self, MAX_STUB, frame};

/// Where a general register of the guest goes.
#[derive(Clone, Copy, Debug)]
pub(super) struct GprUse {
    /// Index in the frame.
    pub slot: u8,
    /// The guest's register, 0 to 15.
    pub register: u8,
    /// AH to BH: bits 15:8 of `register`.
    pub high: bool,
    /// The instruction writes it.
    pub write: bool,
}

/// A stub with what its caller has to know.
#[derive(Debug)]
pub(super) struct Stub {
    pub code: native::Code,
    /// In the order of the operands; written back in reverse, so that the first of two equal destinations wins
    /// (MULX, SDM 2B).
    pub gprs: Box<[GprUse]>,
    /// Loads the flags.
    pub reads_flags: bool,
    /// Stores the flags.
    pub writes_flags: bool,
    /// Runs under the area's MXCSR.
    pub mxcsr: bool,
    /// Loads and stores the x87 state.
    pub x87: bool,
}

const FRAME: Register = Register::RDI;
const AREA: Register = Register::RSI;
const BOUNCE: Register = Register::R11;
/// Registers of the frame's slots.
const SLOTS: [Register; 6] =
    [Register::RAX, Register::RCX, Register::RDX, Register::R8, Register::R9, Register::R10];

struct Emit {
    encoder: Encoder,
    len: usize,
}

impl Emit {
    fn put(&mut self, i: &Instruction) -> Option<()> {
        self.len += self.encoder.encode(i, self.len as u64).ok()?;
        (self.len <= MAX_STUB).then_some(())
    }

    fn bare(&mut self, code: Code) -> Option<()> {
        self.put(&Instruction::with(code))
    }

    fn memory(&mut self, code: Code, base: Register, offset: i64) -> Option<()> {
        self.put(&Instruction::with1(code, MemoryOperand::with_base_displ(base, offset)).ok()?)
    }

    fn load(&mut self, code: Code, r: Register, base: Register, offset: i64) -> Option<()> {
        self.put(&Instruction::with2(code, r, MemoryOperand::with_base_displ(base, offset)).ok()?)
    }

    fn store(&mut self, code: Code, base: Register, offset: i64, r: Register) -> Option<()> {
        self.put(&Instruction::with2(code, MemoryOperand::with_base_displ(base, offset), r).ok()?)
    }

    /// `r = insert(r, [area + offset], 1)`
    fn insert(&mut self, code: Code, r: Register, offset: usize) -> Option<()> {
        let m = MemoryOperand::with_base_displ(AREA, i64::try_from(offset).ok()?);
        self.put(&Instruction::with4(code, r, r, m, 1u32).ok()?)
    }

    /// `[area + offset] = extract(r, 1)`
    fn extract(&mut self, code: Code, offset: usize, r: Register) -> Option<()> {
        let m = MemoryOperand::with_base_displ(AREA, i64::try_from(offset).ok()?);
        self.put(&Instruction::with3(code, m, r, 1u32).ok()?)
    }
}

/// A vector register that the instruction names.
#[derive(Clone, Copy, Debug)]
struct VectorUse {
    number: usize,
    /// Bytes of the widest operand that names it.
    width: usize,
    write: bool,
}

fn xmm(n: usize) -> Register {
    Register::XMM0 + u32::try_from(n).unwrap_or(0)
}
fn ymm(n: usize) -> Register {
    Register::YMM0 + u32::try_from(n).unwrap_or(0)
}
fn zmm(n: usize) -> Register {
    Register::ZMM0 + u32::try_from(n).unwrap_or(0)
}

fn writes(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

fn is_vector(r: Register) -> bool {
    r.is_xmm() || r.is_ymm() || r.is_zmm()
}

fn vector_uses(i: &Instruction, info: &InstructionInfo) -> Vec<VectorUse> {
    let mut uses: Vec<VectorUse> = Vec::new();
    let mut note = |r: Register, width: usize, write: bool| {
        let number = r.number();
        match uses.iter_mut().find(|u| u.number == number) {
            Some(u) => {
                u.width = u.width.max(width);
                u.write |= write;
            }
            None => uses.push(VectorUse { number, width, write }),
        }
    };
    let mut named = Vec::new();
    for op in 0..i.op_count() {
        if i.op_kind(op) == OpKind::Register && is_vector(i.op_register(op)) {
            let r = i.op_register(op);
            named.push(r.number());
            note(r, r.size(), writes(info.op_access(op)));
        }
    }
    for used in info.used_registers() {
        let r = used.register();
        if is_vector(r) {
            // Implied: XMM0 of BLENDV, SHA256RNDS2, PCMPxSTRM (which may be an operand as well).
            let width = if named.contains(&r.number()) { 0 } else { r.size() };
            note(r, width, writes(used.access()));
        }
    }
    uses
}

fn load_vector(e: &mut Emit, l: &Layout, legacy: bool, u: VectorUse) -> Option<()> {
    let n = u.number;
    if n >= 16 {
        return e.load(Code::EVEX_Vmovups_zmm_k1z_zmmm512, zmm(n), AREA, i64::try_from(l.hi16(n)).ok()?);
    }
    let offset = i64::try_from(at::XMM + 16 * n).ok()?;
    if legacy {
        return e.load(Code::Movups_xmm_xmmm128, xmm(n), AREA, offset);
    }
    e.load(Code::VEX_Vmovups_xmm_xmmm128, xmm(n), AREA, offset)?;
    if u.width > 16 {
        e.insert(Code::VEX_Vinsertf128_ymm_ymm_xmmm128_imm8, ymm(n), l.ymm_hi(n))?;
    }
    if u.width > 32 {
        e.insert(Code::EVEX_Vinsertf64x4_zmm_k1z_zmm_ymmm256_imm8, zmm(n), l.zmm_hi(n))?;
    }
    Some(())
}

fn store_vector(e: &mut Emit, l: &Layout, legacy: bool, u: VectorUse) -> Option<()> {
    let n = u.number;
    if n >= 16 {
        return e.store(Code::EVEX_Vmovups_zmmm512_k1z_zmm, AREA, i64::try_from(l.hi16(n)).ok()?, zmm(n));
    }
    let offset = i64::try_from(at::XMM + 16 * n).ok()?;
    if legacy {
        return e.store(Code::Movups_xmmm128_xmm, AREA, offset, xmm(n));
    }
    // VEX and EVEX zero what is above their vector length: the upper parts are stored always.
    e.store(Code::VEX_Vmovups_xmmm128_xmm, AREA, offset, xmm(n))?;
    e.extract(Code::VEX_Vextractf128_xmmm128_ymm_imm8, l.ymm_hi(n), ymm(n))?;
    if l.avx512 {
        e.extract(Code::EVEX_Vextractf64x4_ymmm256_k1z_zmm_imm8, l.zmm_hi(n), zmm(n))?;
    }
    Some(())
}

/// The register of the same class as `r` in slot `slot` (3 to 5: R8 to R10).
fn renamed(r: Register, slot: usize) -> Option<Register> {
    let n = u32::try_from(slot).ok()?.checked_sub(3)?;
    Some(match r.size() {
        8 => Register::R8 + n,
        4 => Register::R8D + n,
        2 => Register::R8W + n,
        1 => Register::R8L + n,
        _ => return None,
    })
}

/// RAX, RCX, RDX as slots 0 to 2: registers that instructions imply.
fn implied_slot(r: Register) -> Option<u8> {
    match r.full_register() {
        Register::RAX => Some(0),
        Register::RCX => Some(1),
        Register::RDX => Some(2),
        _ => None,
    }
}

/// Renames the general registers of `i` and lists them. None: an instruction this module cannot run.
fn rename_gprs(i: &mut Instruction, info: &InstructionInfo) -> Option<Vec<GprUse>> {
    let mut uses = Vec::new();
    let mut slot = 3usize;
    let op_code = i.op_code();
    for op in 0..i.op_count() {
        if i.op_kind(op) != OpKind::Register || !i.op_register(op).is_gpr() {
            continue;
        }
        let r = i.op_register(op);
        let write = writes(info.op_access(op));
        let high = matches!(r, Register::AH | Register::BH | Register::CH | Register::DH);
        let register = u8::try_from(r.full_register().number()).ok()?;
        let fixed = matches!(
            op_code.op_kind(op),
            OpCodeOperandKind::al
                | OpCodeOperandKind::cl
                | OpCodeOperandKind::ax
                | OpCodeOperandKind::dx
                | OpCodeOperandKind::eax
                | OpCodeOperandKind::rax
        );
        if high && write || slot > 5 {
            return None;
        }
        if fixed {
            uses.push(GprUse { slot: implied_slot(r)?, register, high, write });
        } else {
            i.set_op_register(op, renamed(r, slot)?);
            uses.push(GprUse { slot: u8::try_from(slot).ok()?, register, high, write });
            slot += 1;
        }
    }
    Some(uses)
}

/// Adds the implied general registers (PCMPESTRI, MULX): those used that are neither operands nor part of an address.
fn implied_gprs(original: &Instruction, info: &InstructionInfo, uses: &mut Vec<GprUse>) -> Option<()> {
    for used in info.used_registers() {
        let r = used.register();
        if !r.is_gpr() {
            continue;
        }
        let full = r.full_register();
        let operand = (0..original.op_count()).any(|op| {
            original.op_kind(op) == OpKind::Register && original.op_register(op).full_register() == full
        });
        let address =
            original.memory_base().full_register() == full || original.memory_index().full_register() == full;
        match implied_slot(full) {
            Some(slot) => {
                // MULX reads RDX even where RDX is an operand or in the address as well.
                let write = writes(used.access()) && !operand;
                match uses.iter_mut().find(|u| u.slot == slot) {
                    Some(u) => u.write |= write,
                    None => uses.push(GprUse { slot, register: slot, high: false, write }),
                }
            }
            None if operand || address => {}
            None => return None,
        }
    }
    Some(())
}

/// The instruction with its memory operand at `[R11]`.
fn redirect_memory(i: &mut Instruction) {
    if (0..i.op_count()).any(|op| i.op_kind(op) == OpKind::Memory) {
        i.set_memory_base(BOUNCE);
        i.set_memory_index(Register::None);
        i.set_memory_index_scale(1);
        i.set_memory_displ_size(0);
        i.set_memory_displacement64(0);
    }
    i.set_segment_prefix(Register::None);
}

/// Whether `i` can depend on MXCSR or change it: everything but the packed integer instructions, which all begin with P.
fn uses_mxcsr(i: &Instruction) -> bool {
    let name = format!("{:?}", i.mnemonic());
    let name = name.strip_prefix('V').unwrap_or(&name);
    !(name.starts_with('P') || name.starts_with('K') || name.starts_with("Aes") || name.starts_with("Sha"))
}

struct Uses {
    vectors: Vec<VectorUse>,
    /// Opmask registers: number, written.
    masks: Vec<(usize, bool)>,
    gprs: Vec<GprUse>,
    flags: (bool, bool),
    legacy: bool,
    mxcsr: bool,
    x87: bool,
}

fn uses_of(original: &Instruction, rewritten: &mut Instruction) -> Option<Uses> {
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(original);
    let encoding = original.op_code().encoding();
    let legacy = encoding == EncodingKind::Legacy;
    let vectors = vector_uses(original, info);
    let mut masks: Vec<(usize, bool)> = Vec::new();
    let mut mm_or_st = (0..original.op_count()).any(|op| {
        use OpCodeOperandKind as K;
        matches!(original.op_code().op_kind(op), K::mm_or_mem | K::mm_reg | K::mm_rm)
    });
    for used in info.used_registers() {
        let r = used.register();
        mm_or_st |= r.is_mm() || r.is_st();
        if r.is_k() && r != Register::K0
            || r == Register::K0 && (0..original.op_count()).any(|o| original.op_register(o) == r)
        {
            match masks.iter_mut().find(|m| m.0 == r.number()) {
                Some(m) => m.1 |= writes(used.access()),
                None => masks.push((r.number(), writes(used.access()))),
            }
        }
    }
    let mut gprs = rename_gprs(rewritten, info)?;
    implied_gprs(original, info, &mut gprs)?;
    let (read, modified) = (original.rflags_read(), original.rflags_modified());
    let all =
        RflagsBits::CF | RflagsBits::PF | RflagsBits::AF | RflagsBits::ZF | RflagsBits::SF | RflagsBits::OF;
    let flags = (read != 0 || modified & all != 0, modified & all != 0);
    let x87 = mm_or_st || super::classify::is_x87(original);
    // Of a conversion from memory to a general register no vector register is left, but its encoding names one.
    let simd = super::classify::names_vector(original);
    let mxcsr = simd && (x87 || uses_mxcsr(original));
    Some(Uses { vectors, masks, gprs, flags, legacy, mxcsr, x87 })
}

impl Uses {
    fn kmov(l: &Layout, load: bool) -> Code {
        match (l.kmovq, load) {
            (true, true) => Code::VEX_Kmovq_kr_km64,
            (true, false) => Code::VEX_Kmovq_m64_kr,
            (false, true) => Code::VEX_Kmovw_kr_km16,
            (false, false) => Code::VEX_Kmovw_m16_kr,
        }
    }

    fn prologue(&self, e: &mut Emit, l: &Layout) -> Option<()> {
        e.load(Code::Mov_r64_rm64, AREA, FRAME, frame::AREA)?;
        if self.mxcsr || self.x87 {
            e.memory(Code::Stmxcsr_m32, FRAME, frame::HOST_MXCSR)?;
        }
        if self.x87 {
            e.memory(Code::Fxrstor64_m512byte, AREA, 0)?;
        } else {
            if self.mxcsr {
                e.memory(Code::Ldmxcsr_m32, AREA, 24)?;
            }
            for &u in &self.vectors {
                load_vector(e, l, self.legacy, u)?;
            }
        }
        for &(n, _) in &self.masks {
            let k = Register::K0 + u32::try_from(n).ok()?;
            e.load(Self::kmov(l, true), k, AREA, i64::try_from(l.opmask(n)).ok()?)?;
        }
        for g in &self.gprs {
            let slot = usize::from(g.slot);
            e.load(Code::Mov_r64_rm64, SLOTS[slot], FRAME, frame::GPR + 8 * i64::try_from(slot).ok()?)?;
        }
        e.load(Code::Lea_r64_m, BOUNCE, FRAME, frame::BOUNCE)?;
        if self.flags.0 {
            e.memory(Code::Push_rm64, FRAME, frame::FLAGS)?;
            e.bare(Code::Popfq)?;
        }
        Some(())
    }

    fn epilogue(&self, e: &mut Emit, l: &Layout) -> Option<()> {
        if self.flags.1 {
            e.bare(Code::Pushfq)?;
            e.memory(Code::Pop_rm64, FRAME, frame::FLAGS)?;
        }
        for g in self.gprs.iter().filter(|g| g.write) {
            let slot = usize::from(g.slot);
            e.store(Code::Mov_rm64_r64, FRAME, frame::GPR + 8 * i64::try_from(slot).ok()?, SLOTS[slot])?;
        }
        for &(n, _) in self.masks.iter().filter(|m| m.1) {
            let k = Register::K0 + u32::try_from(n).ok()?;
            e.store(Self::kmov(l, false), AREA, i64::try_from(l.opmask(n)).ok()?, k)?;
        }
        if self.x87 {
            e.memory(Code::Fxsave64_m512byte, AREA, 0)?;
            e.bare(Code::Fninit)?;
        } else {
            for &u in self.vectors.iter().filter(|u| u.write) {
                store_vector(e, l, self.legacy, u)?;
            }
            if self.mxcsr {
                e.memory(Code::Stmxcsr_m32, AREA, 24)?;
            }
            if !self.legacy && !self.vectors.is_empty() {
                e.bare(Code::VEX_Vzeroupper)?;
            }
        }
        if self.mxcsr || self.x87 {
            e.memory(Code::Ldmxcsr_m32, FRAME, frame::HOST_MXCSR)?;
        }
        e.bare(Code::Retnq)
    }
}

/// FOP as the processor records it: the low three bits of the first opcode byte and the second (SDM 1 8.1.9).
fn fop(bytes: &[u8]) -> u16 {
    bytes
        .windows(2)
        .find(|w| (0xd8..=0xdf).contains(&w[0]))
        .map_or(0, |w| u16::from(w[0] & 7) << 8 | u16::from(w[1]))
}

/// FOP of the guest's x87 instruction, encoded again as it was.
pub(super) fn guest_fop(i: &Instruction) -> u16 {
    let bitness = match i.code_size() {
        CodeSize::Code16 => 16,
        CodeSize::Code32 => 32,
        CodeSize::Code64 | CodeSize::Unknown => 64,
    };
    let mut encoder = Encoder::new(bitness);
    match encoder.encode(i, i.ip()) {
        Ok(_) => fop(&encoder.take_buffer()),
        Err(_) => 0,
    }
}

/// Builds the stub of `instruction`. None: it cannot be run this way.
pub(super) fn build(instruction: &Instruction) -> Option<Stub> {
    let mut rewritten = *instruction;
    let uses = uses_of(instruction, &mut rewritten)?;
    redirect_memory(&mut rewritten);
    let l = layout();
    let mut e = Emit { encoder: Encoder::new(64), len: 0 };
    uses.prologue(&mut e, l)?;
    e.put(&rewritten)?;
    uses.epilogue(&mut e, l)?;
    let bytes = e.encoder.take_buffer();
    Some(Stub {
        gprs: uses.gprs.into(),
        reads_flags: uses.flags.0,
        writes_flags: uses.flags.1,
        mxcsr: uses.mxcsr,
        x87: uses.x87,
        code: native::Code::new(bytes.into()),
    })
}
