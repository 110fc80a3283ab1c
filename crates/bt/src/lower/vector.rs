//! x87, MMX, SSE, AVX and AVX-512: the guest's registers are the host's while [`frame::FP_LOADED`] says so, and instructions are themselves again.
//!
//! This holds only while all exceptions are masked ([`super::FpLevel`]), so nothing here can trap on the host: alignment is checked inline, control words
//! are looked at before they are loaded.

use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind};

use super::scratch::Scratch;
use super::{FpLevel, Lowering};
use crate::emit::{S0, S1, cc};
use crate::frame;

/// The six exception masks in the x87 control word, and those in MXCSR (SDM 1 8.1.5, 10.2.3).
const FCW_MASKS: u32 = 0x3f;
const MXCSR_MASKS: u32 = 0x1f80;
/// Bits of MXCSR that may be loaded without a fault on every host, and without AMD's misaligned mode.
const MXCSR_PLAIN: u32 = 0xffff;

/// What an instruction needs, if it may be executed as it is.
fn level(i: &Instruction) -> Option<FpLevel> {
    use CpuidFeature as F;
    use Mnemonic as M;
    let state = matches!(
        i.mnemonic(),
        M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Fldenv
            | M::Fnstenv
            | M::Frstor
            | M::Fnsave
            | M::Fldcw
            | M::Ldmxcsr
            | M::Vldmxcsr
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Fdisi
            | M::Fndisi
            | M::Feni
            | M::Fneni
            | M::Fsetpm
            | M::Fnsetpm
    );
    if state || i.is_vsib() {
        return None;
    }
    let mut all: Option<FpLevel> = None;
    for f in i.cpuid_features() {
        let this = match f {
            F::FPU | F::FPU287 | F::FPU387 | F::MMX | F::CMOV => FpLevel::X87,
            F::SSE | F::SSE2 | F::SSE3 | F::SSSE3 | F::SSE4_1 | F::SSE4_2 => FpLevel::Sse,
            F::AES | F::PCLMULQDQ | F::SHA | F::GFNI => FpLevel::Sse,
            F::AVX | F::AVX2 | F::FMA | F::F16C | F::VAES | F::VPCLMULQDQ | F::AVX_VNNI => FpLevel::Avx,
            F::AVX512F | F::AVX512VL | F::AVX512BW | F::AVX512DQ | F::AVX512CD | F::AVX512_IFMA => {
                FpLevel::Avx512
            }
            F::AVX512_VBMI | F::AVX512_VBMI2 | F::AVX512_VNNI | F::AVX512_BITALG => FpLevel::Avx512,
            F::AVX512_VPOPCNTDQ | F::AVX512_BF16 => FpLevel::Avx512,
            _ => return None,
        };
        all = all.max(Some(this));
    }
    let by_encoding = match i.encoding() {
        EncodingKind::Legacy => FpLevel::X87,
        EncodingKind::VEX => FpLevel::Avx,
        EncodingKind::EVEX => FpLevel::Avx512,
        _ => return None,
    };
    all.map(|l| l.max(by_encoding))
}

/// Whether the memory operand must be aligned to its size (SDM 1 table 14-22).
fn must_align(i: &Instruction, size: usize) -> bool {
    use Mnemonic as M;
    if i.encoding() == EncodingKind::Legacy {
        let any = matches!(
            i.mnemonic(),
            M::Movups
                | M::Movupd
                | M::Movdqu
                | M::Lddqu
                | M::Pcmpestri
                | M::Pcmpestrm
                | M::Pcmpistri
                | M::Pcmpistrm
        );
        return size == 16 && !any;
    }
    matches!(
        i.mnemonic(),
        M::Vmovaps
            | M::Vmovapd
            | M::Vmovdqa
            | M::Vmovdqa32
            | M::Vmovdqa64
            | M::Vmovntps
            | M::Vmovntpd
            | M::Vmovntdq
            | M::Vmovntdqa
    )
}

/// Whether the instruction's memory operand may share a check with others, and if so, whether it must be aligned.
pub(super) fn group_access(i: &Instruction, facts: super::Facts) -> Option<bool> {
    let done_here = level(i).is_some_and(|l| l <= facts.fp) && (0..i.op_count()).all(|n| plain_operand(i, n));
    let memory = i.memory_size();
    done_here.then(|| must_align(i, memory.size()))
}

impl Lowering<'_, '_> {
    pub(super) fn vector(&mut self, i: &Instruction, live_before: u32, reads: bool) -> bool {
        match i.mnemonic() {
            Mnemonic::Fldcw => return self.load_control(i, live_before, FpLevel::X87),
            Mnemonic::Ldmxcsr => return self.load_control(i, live_before, FpLevel::Sse),
            _ => {}
        }
        if level(i).is_none_or(|l| l > self.facts.fp) {
            return false;
        }
        if (0..i.op_count()).any(|n| !plain_operand(i, n)) {
            return false;
        }
        let super::Look { written, touches, memory, .. } = self.look;
        let needs = reads || touches && live_before & !written != 0;
        if !self.fp_loaded {
            self.spill(live_before);
            self.load_fp();
        }
        if memory {
            return self.vector_memory(i, live_before, needs, touches);
        }
        if self.facts.legacy.is_some() && matches!(i.mnemonic(), Mnemonic::Vzeroupper | Mnemonic::Vzeroall) {
            self.zero_eight(i.mnemonic() == Mnemonic::Vzeroall);
            return true;
        }
        if needs {
            self.need_flags();
        }
        let done = self.on_registers(i);
        self.in_host |= done && touches;
        done
    }

    fn vector_memory(&mut self, i: &Instruction, live_before: u32, needs: bool, touches: bool) -> bool {
        let memory = i.memory_size();
        let size = if memory.is_broadcast() { memory.element_size() } else { memory.size() };
        if !(1..=64).contains(&size) {
            return false;
        }
        let write = self.look.writes;
        let aligned = must_align(i, size);
        let Some(operand) = self.operand(i, live_before, size, write, aligned) else { return false };
        self.with_operand(i, needs, touches, operand)
    }

    /// VZEROUPPER and VZEROALL of 16- and 32-bit code leave registers 8 to 15 alone (SDM 2C VZEROALL): a VEX instruction for each of the others.
    fn zero_eight(&mut self, all: bool) {
        for n in 0..8u8 {
            if all {
                // vxorps xmm, xmm, xmm
                self.asm.bytes(&[0xc5, 0x80 | (15 - n) << 3, 0x57, 0xc0 | n << 3 | n]);
            } else {
                // vmovaps xmm, xmm
                self.asm.bytes(&[0xc5, 0xf8, 0x28, 0xc0 | n << 3 | n]);
            }
        }
    }

    /// Sees to it that the guest's registers are in the host's. Guest flags are in the frame or dead.
    fn load_fp(&mut self) {
        self.asm.cmp_gs32_imm8(frame::FP_LOADED, 0);
        let loaded = self.asm.jcc(cc::NE);
        self.asm.call_gs(frame::FP_LOAD);
        self.asm.bind(loaded);
        self.held = Scratch::default();
        self.fp_loaded = true;
    }

    /// FLDCW and LDMXCSR: only values that mask all exceptions are loaded here.
    fn load_control(&mut self, i: &Instruction, live_before: u32, needs: FpLevel) -> bool {
        if self.facts.fp < needs {
            return false;
        }
        let first = self.room.misses.len();
        self.spill(live_before);
        if !self.fp_loaded {
            self.load_fp();
        }
        let x87 = needs == FpLevel::X87;
        if self.own_operand(i, 0, if x87 { 2 } else { 4 }, false, false).is_none() {
            return false;
        }
        self.asm.load_sized(if x87 { 2 } else { 4 }, S0, S0, S1);
        self.asm.store(frame::TEMP, S0);
        let masks = if x87 { FCW_MASKS } else { MXCSR_MASKS };
        if !x87 {
            self.asm.test_imm(S0, !(MXCSR_PLAIN as i32));
            let reserved = self.asm.jcc(cc::NE);
            self.interpret_if(reserved);
        }
        self.asm.and32(S0, masks);
        self.asm.group1_32(7, S0, masks);
        let unmasked = self.asm.jcc(cc::NE);
        self.interpret_if(unmasked);
        if x87 {
            self.asm.control_gs(&[0xd9], 5, frame::TEMP);
        } else {
            self.asm.control_gs(&[0x0f, 0xae], 2, frame::TEMP);
        }
        self.complete(first, false);
        true
    }
}

/// Operands other than implicit memory.
fn plain_operand(i: &Instruction, n: u32) -> bool {
    matches!(
        i.op_kind(n),
        OpKind::Register
            | OpKind::Memory
            | OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}
