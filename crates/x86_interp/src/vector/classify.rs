//! Decides, once per decoded instruction, whether it is this module's, what gates it and how it is done.

use iced_x86::{
    CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, MemorySize, Mnemonic, OpAccess,
    OpCodeOperandKind, OpCodeTableKind, OpKind, Register, RoundingControl,
};

use super::address::Address;
use super::check::Class;
use super::fast::{self, Fast, Source};
use super::gather::Gather;
use super::masked::{ElementMask, Masked};
use super::run::{Memory, Native};
use super::scalar::Scalar;
use super::xsave::Xsave;
use super::{Kind, VectorOp, host, stub, x87};

/// Operand classes that an encoding can name.
#[derive(Clone, Copy, Default)]
struct Operands {
    mmx: bool,
    vector: bool,
    opmask: bool,
}

fn operands(i: &Instruction) -> Operands {
    use OpCodeOperandKind as K;
    let mut o = Operands::default();
    for op in 0..i.op_count() {
        match i.op_code().op_kind(op) {
            K::mm_or_mem | K::mm_reg | K::mm_rm => o.mmx = true,
            K::k_or_mem | K::k_reg | K::kp1_reg | K::k_rm | K::k_vvvv => o.opmask = true,
            K::xmm_or_mem
            | K::xmm_reg
            | K::xmm_rm
            | K::xmm_vvvv
            | K::xmmp3_vvvv
            | K::xmm_is4
            | K::xmm_is5
            | K::ymm_or_mem
            | K::ymm_reg
            | K::ymm_rm
            | K::ymm_vvvv
            | K::ymm_is4
            | K::ymm_is5
            | K::zmm_or_mem
            | K::zmm_reg
            | K::zmm_rm
            | K::zmm_vvvv
            | K::zmmp3_vvvv => o.vector = true,
            _ => {}
        }
    }
    o
}

/// Whether the encoding names a vector register, perhaps as the alternative to memory.
pub(super) fn names_vector(i: &Instruction) -> bool {
    operands(i).vector
}

/// Features whose legacy-encoded instructions are this module's.
fn is_ours(f: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        f,
        F::FPU
            | F::FPU287
            | F::FPU287XL_ONLY
            | F::FPU387
            | F::FPU387SL_ONLY
            | F::CYRIX_FPU
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::SSE4A
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
            | F::GFNI
            | F::FXSR
            | F::XSAVE
            | F::XSAVEOPT
            | F::XSAVEC
            | F::XSAVES
            | F::ADX
            | F::POPCNT
            | F::LZCNT
            | F::BMI1
            | F::BMI2
            | F::MOVBE
            | F::RDRAND
            | F::RDSEED
    )
}

/// Of those features, but an ordinary instruction: the interpreter's.
fn is_plain(m: Mnemonic) -> bool {
    matches!(
        m,
        Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetchw
            | Mnemonic::Prefetch
            | Mnemonic::Sfence
            | Mnemonic::Lfence
            | Mnemonic::Mfence
            | Mnemonic::Pause
            | Mnemonic::Clflush
            | Mnemonic::Monitor
            | Mnemonic::Mwait
            | Mnemonic::Xgetbv
            | Mnemonic::Xsetbv
    )
}

pub(super) fn prepare(i: &Instruction) -> Option<VectorOp> {
    let encoding = i.op_code().encoding();
    let ours = match encoding {
        EncodingKind::Legacy => {
            i.mnemonic() == Mnemonic::Wait
                || i.cpuid_features().iter().any(|&f| is_ours(f)) && !is_plain(i.mnemonic())
        }
        _ => true,
    };
    if !ours || i.is_invalid() {
        return None;
    }
    let kind = if host::can_execute(i) { kind(i).unwrap_or(Kind::Undefined) } else { Kind::Undefined };
    let (align, align_unless_mm) = alignment(i, encoding);
    Some(VectorOp {
        class: class(i, encoding, &kind),
        len: u8::try_from(i.len()).unwrap_or(15),
        align,
        align_unless_mm,
        address: Address::new(i),
        kind,
    })
}

fn class(i: &Instruction, encoding: EncodingKind, kind: &Kind) -> Class {
    let o = operands(i);
    match (encoding, kind) {
        (_, Kind::X87(x)) => match x {
            x87::X87::Emms => Class::Mmx,
            x87::X87::Wait => Class::Wait,
            x87::X87::LoadControl | x87::X87::LoadEnvironment(_) | x87::X87::Restore(_) => Class::X87,
            _ => Class::X87NoWait,
        },
        (_, Kind::Nop) => Class::X87NoWait,
        (EncodingKind::Legacy, Kind::Xsave(Xsave::Ldmxcsr | Xsave::Stmxcsr)) => Class::Sse,
        (_, Kind::Xsave(Xsave::Ldmxcsr | Xsave::Stmxcsr)) => Class::Vex,
        (_, Kind::Xsave(Xsave::Fxsave | Xsave::Fxrstor)) => Class::Fxsave,
        (_, Kind::Xsave(_)) => Class::Xsave,
        (EncodingKind::Legacy, _) if is_x87(i) => Class::X87,
        (EncodingKind::Legacy, _) => match (o.mmx, o.vector) {
            (true, true) => Class::SseMmx,
            (true, false) => Class::Mmx,
            (false, true) => Class::Sse,
            (false, false) => Class::Free,
        },
        (EncodingKind::EVEX, _) => Class::Evex,
        (_, Kind::ZeroUpper | Kind::ZeroAll) => Class::Vex,
        _ if o.opmask => Class::Evex,
        _ if o.vector => Class::Vex,
        _ => Class::VexGpr,
    }
}

/// An x87 instruction: opcode D8 to DF of the one-byte map (0F DB is PAND).
pub(super) fn is_x87(i: &Instruction) -> bool {
    let c = i.op_code();
    let one_byte = c.encoding() == EncodingKind::Legacy && c.table() == OpCodeTableKind::Normal;
    one_byte && (0xd8..=0xdf).contains(&(x87_escape(i)))
}

fn x87_escape(i: &Instruction) -> u32 {
    let c = i.op_code();
    // Opcodes of registers-only forms are two bytes long.
    if c.op_code_len() == 2 { c.op_code() >> 8 } else { c.op_code() }
}

/// Alignment of the memory operand, and whether AMD's misaligned mode lifts it (SDM 1 table 14-22, APM 1 4.3.2).
fn alignment(i: &Instruction, encoding: EncodingKind) -> (u8, bool) {
    use Mnemonic as M;
    if !has_memory(i) {
        return (1, false);
    }
    let size = u8::try_from(i.memory_size().size()).unwrap_or(1).max(1);
    match (encoding, i.mnemonic()) {
        (
            EncodingKind::Legacy,
            M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpestri
            | M::Pcmpestri64
            | M::Pcmpestrm
            | M::Pcmpestrm64
            | M::Pcmpistri
            | M::Pcmpistrm,
        ) => (1, false),
        (
            EncodingKind::Legacy,
            M::Movaps | M::Movapd | M::Movdqa | M::Movntps | M::Movntpd | M::Movntdq | M::Movntdqa,
        ) => (16, false),
        (EncodingKind::Legacy, _) if size == 16 && operands(i).vector => (16, true),
        (
            EncodingKind::VEX | EncodingKind::EVEX,
            M::Vmovaps
            | M::Vmovapd
            | M::Vmovdqa
            | M::Vmovdqa32
            | M::Vmovdqa64
            | M::Vmovntps
            | M::Vmovntpd
            | M::Vmovntdq
            | M::Vmovntdqa,
        ) => (size, false),
        _ => (1, false),
    }
}

fn has_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|op| i.op_kind(op) == OpKind::Memory)
}

fn number(r: Register) -> u8 {
    u8::try_from(r.number()).unwrap_or(0)
}

/// Number of the register that is operand `op`.
fn register(i: &Instruction, op: u32) -> Option<u8> {
    (i.op_kind(op) == OpKind::Register).then(|| number(i.op_register(op)))
}

fn kind(i: &Instruction) -> Option<Kind> {
    if let Some(k) = state_kind(i) {
        return Some(k);
    }
    if let Some(g) = gather(i) {
        return g.map(|g| Kind::Gather(Box::new(g)));
    }
    if let Some(m) = masked(i) {
        return Some(Kind::Masked(Box::new(m)));
    }
    if let Some(s) = Scalar::new(i) {
        return Some(Kind::Scalar(s));
    }
    if let Some(f) = fast(i) {
        return Some(Kind::Fast(f));
    }
    native(i).map(|n| Kind::Native(Box::new(n)))
}

/// Instructions that move state.
fn state_kind(i: &Instruction) -> Option<Kind> {
    use Mnemonic as M;
    use x87::X87 as C;
    let wide = matches!(i.memory_size(), MemorySize::FpuEnv28 | MemorySize::FpuState108);
    Some(match i.mnemonic() {
        M::Wait => Kind::X87(C::Wait),
        M::Fninit => Kind::X87(C::Init),
        M::Fnclex => Kind::X87(C::Clear),
        M::Fnstsw if has_memory(i) => Kind::X87(C::StoreStatus),
        M::Fnstsw => Kind::X87(C::StoreStatusAx),
        M::Fnstcw => Kind::X87(C::StoreControl),
        M::Fldcw => Kind::X87(C::LoadControl),
        M::Fnstenv => Kind::X87(C::StoreEnvironment(wide)),
        M::Fldenv => Kind::X87(C::LoadEnvironment(wide)),
        M::Fnsave => Kind::X87(C::Save(wide)),
        M::Frstor => Kind::X87(C::Restore(wide)),
        M::Emms => Kind::X87(C::Emms),
        M::Fneni | M::Fndisi | M::Fnsetpm => Kind::Nop,
        M::Fxsave | M::Fxsave64 => Kind::Xsave(Xsave::Fxsave),
        M::Fxrstor | M::Fxrstor64 => Kind::Xsave(Xsave::Fxrstor),
        M::Ldmxcsr | M::Vldmxcsr => Kind::Xsave(Xsave::Ldmxcsr),
        M::Stmxcsr | M::Vstmxcsr => Kind::Xsave(Xsave::Stmxcsr),
        M::Xsave | M::Xsave64 => Kind::Xsave(Xsave::Save { optimized: false }),
        M::Xsaveopt | M::Xsaveopt64 => Kind::Xsave(Xsave::Save { optimized: true }),
        M::Xsavec | M::Xsavec64 => Kind::Xsave(Xsave::SaveCompacted { supervisor: false }),
        M::Xsaves | M::Xsaves64 => Kind::Xsave(Xsave::SaveCompacted { supervisor: true }),
        M::Xrstor | M::Xrstor64 => Kind::Xsave(Xsave::Restore),
        M::Xrstors | M::Xrstors64 => Kind::Xsave(Xsave::RestoreSupervisor),
        M::Vzeroupper => Kind::ZeroUpper,
        M::Vzeroall => Kind::ZeroAll,
        _ => return None,
    })
}

/// Sizes of index and element of a gather or scatter.
fn gather_sizes(m: Mnemonic) -> Option<(bool, u8, u8)> {
    use Mnemonic as M;
    Some(match m {
        M::Vpgatherdd | M::Vgatherdps => (false, 4, 4),
        M::Vpgatherdq | M::Vgatherdpd => (false, 4, 8),
        M::Vpgatherqd | M::Vgatherqps => (false, 8, 4),
        M::Vpgatherqq | M::Vgatherqpd => (false, 8, 8),
        M::Vpscatterdd | M::Vscatterdps => (true, 4, 4),
        M::Vpscatterdq | M::Vscatterdpd => (true, 4, 8),
        M::Vpscatterqd | M::Vscatterqps => (true, 8, 4),
        M::Vpscatterqq | M::Vscatterqpd => (true, 8, 8),
        _ => return None,
    })
}

/// A gather or scatter; `Some(None)`: one with a forbidden combination of registers, which is #UD.
fn gather(i: &Instruction) -> Option<Option<Gather>> {
    let (scatter, index_size, element) = gather_sizes(i.mnemonic())?;
    let data_op = u32::from(scatter);
    let (data, index) = (i.op_register(data_op), i.memory_index());
    let evex = i.op_code().encoding() == EncodingKind::EVEX;
    let lanes = |r: Register, size: u8| u8::try_from(r.size() / usize::from(size)).unwrap_or(0);
    let g = Gather {
        scatter,
        data: number(data),
        index: number(index),
        opmask: evex.then(|| number(i.op_mask())),
        mask: if evex { 0 } else { number(i.op_register(2)) },
        index_size,
        element,
        count: lanes(index, index_size).min(lanes(data, element)),
        vector: u8::try_from(data.size()).unwrap_or(16),
    };
    let forbidden = if evex {
        i.op_mask() == Register::None || !scatter && g.data == g.index
    } else {
        g.data == g.index || g.data == g.mask || g.mask == g.index
    };
    Some((!forbidden).then_some(g))
}

/// Moves under a mask that need no stub.
fn masked(i: &Instruction) -> Option<Masked> {
    use Mnemonic as M;
    let size = u8::try_from(i.memory_size().size()).unwrap_or(0);
    let to_memory = i.op_kind(0) == OpKind::Memory;
    let element = match i.mnemonic() {
        M::Vmaskmovps | M::Vpmaskmovd => 4,
        M::Vmaskmovpd | M::Vpmaskmovq => 8,
        M::Maskmovdqu | M::Vmaskmovdqu => {
            return Some(Masked::Bytes { src: register(i, 1)?, mask: register(i, 2)? });
        }
        M::Maskmovq => return Some(Masked::BytesMmx { src: register(i, 1)?, mask: register(i, 2)? }),
        M::Vpcompressb => return compress(i, 1, size),
        M::Vpcompressw => return compress(i, 2, size),
        M::Vcompressps | M::Vpcompressd => return compress(i, 4, size),
        M::Vcompresspd | M::Vpcompressq => return compress(i, 8, size),
        M::Vmovdqu8
        | M::Vmovdqu16
        | M::Vmovdqu32
        | M::Vmovdqu64
        | M::Vmovdqa32
        | M::Vmovdqa64
        | M::Vmovups
        | M::Vmovupd
        | M::Vmovaps
        | M::Vmovapd
            if to_memory && i.op_mask() != Register::None =>
        {
            return Some(Masked::Move { src: register(i, 1)?, size, mask: element_mask(i)? });
        }
        _ => return None,
    };
    Some(if to_memory {
        Masked::Store { mask: register(i, 1)?, src: register(i, 2)?, size, element }
    } else {
        Masked::Load { dst: register(i, 0)?, mask: register(i, 1)?, size, element }
    })
}

fn compress(i: &Instruction, element: u8, size: u8) -> Option<Masked> {
    if i.op_kind(0) != OpKind::Memory {
        return None;
    }
    let opmask = if i.op_mask() == Register::None { 0 } else { number(i.op_mask()) };
    let source = i.op_register(1).size();
    Some(Masked::Compress {
        src: register(i, 1)?,
        opmask,
        size: u8::try_from(source).ok()?.max(size),
        element,
    })
}

/// How the opmask of `i` governs its memory operand, if it does.
fn element_mask(i: &Instruction) -> Option<ElementMask> {
    use Mnemonic as M;
    if i.op_mask() == Register::None || !has_memory(i) {
        return None;
    }
    let memory = i.memory_size();
    let size = if memory.is_broadcast() { memory.element_size() } else { memory.size() };
    let element = match i.mnemonic() {
        // These name the parts that are multiplied, but the mask is per sum.
        M::Vpdpbusd | M::Vpdpbusds | M::Vpdpwssd | M::Vpdpwssds | M::Vdpbf16ps => 4,
        M::Vexpandps | M::Vpexpandd => 4,
        M::Vexpandpd | M::Vpexpandq | M::Vpmuludq | M::Vpmuldq => 8,
        M::Vpexpandb => 1,
        M::Vpexpandw => 2,
        _ => memory.element_size(),
    };
    let packed = matches!(
        i.mnemonic(),
        M::Vexpandps | M::Vexpandpd | M::Vpexpandb | M::Vpexpandw | M::Vpexpandd | M::Vpexpandq
    );
    let name = format!("{:?}", i.mnemonic());
    let lanes = if memory.is_broadcast() {
        broadcast_bits(memory)? / 8 / element
    } else if name.starts_with("Vbroadcast") || name.starts_with("Vpbroadcast") {
        i.op_register(0).size() / element
    } else {
        size / element
    };
    Some(ElementMask {
        register: number(i.op_mask()),
        element: u8::try_from(element).ok()?,
        lanes: u8::try_from(lanes.max(1)).ok()?,
        suppress: suppresses_faults(i),
        packed,
    })
}

/// Bits of the vector that an embedded broadcast fills.
fn broadcast_bits(m: MemorySize) -> Option<usize> {
    let name = format!("{m:?}");
    let digits: String = name.strip_prefix("Broadcast")?.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// Whether masked-out elements do not fault. The others (exception types E4NF and E5NF: shuffles, packs, insertions, permutations
/// and shifts by a register's count, SDM 2A 2.8) access the whole operand.
fn suppresses_faults(i: &Instruction) -> bool {
    use Mnemonic as M;
    let shift = matches!(
        i.mnemonic(),
        M::Vpsllw
            | M::Vpslld
            | M::Vpsllq
            | M::Vpsrlw
            | M::Vpsrld
            | M::Vpsrlq
            | M::Vpsraw
            | M::Vpsrad
            | M::Vpsraq
    );
    if shift {
        // By a count in memory; words by an immediate too.
        return i.op_kind(2) != OpKind::Memory && !matches!(i.mnemonic(), M::Vpsllw | M::Vpsrlw | M::Vpsraw);
    }
    let name = format!("{:?}", i.mnemonic());
    let permutes = [
        "Vinsert", "Vperm", "Vpunpck", "Vunpck", "Vpack", "Vshuf", "Vpshufb", "Vpshufd", "Vpshufh", "Vpshufl",
    ];
    !permutes.iter().any(|p| name.starts_with(p))
        && !matches!(
            i.mnemonic(),
            M::Valignd
                | M::Valignq
                | M::Vpalignr
                | M::Vpmaddwd
                | M::Vpmaddubsw
                | M::Vpmultishiftqb
                | M::Vdbpsadbw
                | M::Vmovddup
                | M::Vmovshdup
                | M::Vmovsldup
                | M::Vpconflictd
                | M::Vpconflictq
                | M::Vgf2p8affineqb
                | M::Vgf2p8affineinvqb
                | M::Vpmulhrsw
        )
}

/// A vector register's number if the Rust paths reach it.
fn low16(i: &Instruction, op: u32) -> Option<u8> {
    register(i, op).filter(|&n| n < 16)
}

fn source(i: &Instruction, op: u32) -> Option<Source> {
    if i.op_kind(op) == OpKind::Memory { Some(Source::Memory) } else { low16(i, op).map(Source::Register) }
}

/// Instructions with a path in Rust.
fn fast(i: &Instruction) -> Option<Fast> {
    let legacy = i.op_code().encoding() == EncodingKind::Legacy;
    if i.op_mask() != Register::None || operands(i).mmx || i.memory_size().is_broadcast() {
        return None;
    }
    let zero = !legacy;
    whole_move(i, zero).or_else(|| scalar_move(i, zero)).or_else(|| operation(i, legacy))
}

fn whole_move(i: &Instruction, zero: bool) -> Option<Fast> {
    use Mnemonic as M;
    match i.mnemonic() {
        M::Movups
        | M::Movupd
        | M::Movaps
        | M::Movapd
        | M::Movdqu
        | M::Movdqa
        | M::Lddqu
        | M::Movntps
        | M::Movntpd
        | M::Movntdq
        | M::Movntdqa
        | M::Vmovups
        | M::Vmovupd
        | M::Vmovaps
        | M::Vmovapd
        | M::Vmovdqu
        | M::Vmovdqa
        | M::Vlddqu
        | M::Vmovntps
        | M::Vmovntpd
        | M::Vmovntdq
        | M::Vmovntdqa
        | M::Vmovdqu8
        | M::Vmovdqu16
        | M::Vmovdqu32
        | M::Vmovdqu64
        | M::Vmovdqa32
        | M::Vmovdqa64 => {}
        _ => return None,
    }
    let vector = if i.op_kind(0) == OpKind::Register { 0 } else { 1 };
    let len = u8::try_from(i.op_register(vector).size()).ok()?;
    Some(match (register(i, 0), register(i, 1)) {
        (Some(dst), Some(src)) => Fast::Copy { dst, src, len, zero },
        (Some(dst), None) => Fast::Load { dst, len, zero },
        (None, Some(src)) => Fast::Store { src, len },
        (None, None) => return None,
    })
}

fn scalar_move(i: &Instruction, zero: bool) -> Option<Fast> {
    use Mnemonic as M;
    let memory = |op: u32| i.op_kind(op) == OpKind::Memory;
    let (len, at) = match i.mnemonic() {
        M::Movss | M::Vmovss | M::Movd | M::Vmovd => (4, 0),
        M::Movsd | M::Vmovsd | M::Movq | M::Vmovq | M::Movlps | M::Movlpd | M::Vmovlps | M::Vmovlpd => (8, 0),
        M::Movhps | M::Movhpd | M::Vmovhps | M::Vmovhpd => (8, 8),
        _ => return None,
    };
    if memory(0) {
        return Some(Fast::StoreLow { src: low16(i, 1)?, at, len });
    }
    match i.mnemonic() {
        M::Movlps | M::Movlpd | M::Vmovlps | M::Vmovlpd | M::Movhps | M::Movhpd | M::Vmovhps | M::Vmovhpd => {
            let (last, keep) = (i.op_count() - 1, i.op_count() - 2);
            let half = Fast::LoadHalf { dst: low16(i, 0)?, keep: low16(i, keep)?, high: at == 8, zero };
            memory(last).then_some(half)
        }
        _ if i.op_register(0).is_gpr() => Some(Fast::ToGpr { gpr: register(i, 0)?, src: low16(i, 1)?, len }),
        _ if memory(1) => Some(Fast::LoadLow { dst: low16(i, 0)?, len, zero }),
        _ if i.op_register(1).is_gpr() => {
            Some(Fast::FromGpr { dst: low16(i, 0)?, gpr: register(i, 1)?, len, zero })
        }
        M::Movq | M::Vmovq => Some(Fast::CopyLow { dst: low16(i, 0)?, src: low16(i, 1)?, zero }),
        M::Movd | M::Vmovd => None,
        _ => {
            let (keep, low) = if i.op_count() == 3 { (1, 2) } else { (0, 1) };
            Some(Fast::Merge { dst: low16(i, 0)?, keep: low16(i, keep)?, low: low16(i, low)?, len, zero })
        }
    }
}

fn operation(i: &Instruction, legacy: bool) -> Option<Fast> {
    let zero = !legacy;
    if matches!(i.mnemonic(), Mnemonic::Pmovmskb | Mnemonic::Vpmovmskb) {
        let len = u8::try_from(i.op_register(1).size()).ok()?;
        return Some(Fast::ByteMask { gpr: register(i, 0)?, src: low16(i, 1)?, len });
    }
    if !i.op_register(0).is_vector_register() {
        return None;
    }
    let dst = low16(i, 0)?;
    let len = u8::try_from(i.op_register(0).size()).ok()?;
    if let Some(f) = fast::lanes(i.mnemonic()) {
        let (a, b) = if legacy { (0, 1) } else { (1, 2) };
        return (i.op_count() == b + 1).then_some(Fast::Binary {
            f,
            dst,
            a: low16(i, a)?,
            b: source(i, b)?,
            len,
            zero,
        });
    }
    let f = fast::immediate(i.mnemonic())?;
    let last = i.op_count() - 1;
    if i.op_kind(last) != OpKind::Immediate8 {
        return None;
    }
    Some(Fast::Shift { f, dst, a: source(i, last - 1)?, imm: i.immediate8(), len, zero })
}

fn native(i: &Instruction) -> Option<Native> {
    let stub = stub::build(i)?;
    let mut memory = None;
    if has_memory(i) {
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(i);
        let op = (0..i.op_count()).find(|&op| i.op_kind(op) == OpKind::Memory)?;
        let access = info.op_access(op);
        memory = Some(Memory {
            size: Memory::size_of(i.memory_size())?,
            read: matches!(
                access,
                OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            ),
            write: matches!(
                access,
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            ),
            mask: element_mask(i),
        });
    }
    // VRCP14 raises nothing either but heeds flush-to-zero (SDM 2C VRCP14PS).
    let suppressed = i.suppress_all_exceptions()
        || i.rounding_control() != RoundingControl::None
        || matches!(
            i.mnemonic(),
            Mnemonic::Vrcp14ps | Mnemonic::Vrcp14pd | Mnemonic::Vrcp14ss | Mnemonic::Vrcp14sd
        );
    Some(Native {
        stub,
        memory,
        fop: if is_x87(i) { stub::guest_fop(i) } else { 0 },
        is_x87: is_x87(i),
        suppressed,
    })
}
