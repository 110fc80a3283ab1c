//! Which instructions a model has, and what the others mean.
//!
//! An instruction that a processor does not announce is usually undefined (#UD). Some encodings were valid on older
//! processors and keep that meaning where the newer one is not announced: prefixes that were ignored, and hints in the
//! space that was reserved for NOPs. The decoder's list of CPUID features per instruction is mapped to ours here; the
//! engines ask once per decoded instruction, so this is not written for speed.

use iced_x86::{CodeSize, CpuidFeature, Instruction, Mnemonic};

use super::features::Feature;
use super::model::CpuModel;

/// What an instruction is on a model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Gate {
    /// The processor has it. (It may still fault for other reasons: mode, privilege, control registers.)
    Announced,
    /// #UD.
    Undefined,
    /// What processors without the feature do with these bytes.
    Older(OlderMeaning),
}

/// The meaning of an encoding on processors that are older than the instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OlderMeaning {
    /// TZCNT is BSF behind an ignored REP prefix (SDM 2B "TZCNT").
    Bsf,
    /// LZCNT is BSR behind an ignored REP prefix (SDM 2A "LZCNT").
    Bsr,
    /// A hint in the NOP space (0F 0D, 0F 18 to 0F 1F): no operation, no memory access, no fault.
    Nop,
    /// WBNOINVD is WBINVD behind an ignored REP prefix (SDM 2C "WBNOINVD").
    Wbinvd,
}

/// What one of the decoder's CPUID features asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Needs {
    /// Every processor that we model has it.
    Nothing,
    /// One of our features.
    Feature(Feature),
    /// Nothing that we model announces it.
    Never,
}

impl CpuModel {
    /// What `instruction` is on this model. VMCALL and VMMCALL count as announced where the hypervisor leaf is: the
    /// engine answers a hypercall with -KVM_ENOSYS (-1000) in RAX, as KVM's guests expect of a hypercall that is not
    /// implemented (Linux's ptp_kvm makes one without asking).
    #[must_use]
    pub fn gate(&self, instruction: &Instruction) -> Gate {
        let mnemonic = instruction.mnemonic();
        if matches!(mnemonic, Mnemonic::Vmcall | Mnemonic::Vmmcall) && self.has(Feature::Hypervisor) {
            return Gate::Announced;
        }
        // The decoder does not say that these are optional in 64-bit mode (SDM 2A "LAHF", 2B "SAHF").
        let lahf64 = matches!(mnemonic, Mnemonic::Lahf | Mnemonic::Sahf)
            && instruction.code_size() == CodeSize::Code64;
        if lahf64 && !self.has(Feature::LahfLm) {
            return Gate::Undefined;
        }
        // A list means all of its features, but for CPUID groups that the decoder already folded into one name.
        let announced = instruction.cpuid_features().iter().all(|&f| match needs(f) {
            Needs::Nothing => true,
            Needs::Feature(feature) => self.has(feature),
            Needs::Never => false,
        });
        if announced {
            return Gate::Announced;
        }
        older_meaning(mnemonic).map_or(Gate::Undefined, Gate::Older)
    }
}

/// Encodings that mean something without their feature; all others are undefined.
fn older_meaning(mnemonic: Mnemonic) -> Option<OlderMeaning> {
    match mnemonic {
        Mnemonic::Tzcnt => Some(OlderMeaning::Bsf),
        Mnemonic::Lzcnt => Some(OlderMeaning::Bsr),
        Mnemonic::Wbnoinvd => Some(OlderMeaning::Wbinvd),
        // 0F 1E (SDM 2A "ENDBR32", "ENDBR64"; 2B "RDSSPD/RDSSPQ": a NOP on processors without CET).
        Mnemonic::Endbr32 | Mnemonic::Endbr64 | Mnemonic::Rdsspd | Mnemonic::Rdsspq => {
            Some(OlderMeaning::Nop)
        }
        // 0F 1C /0 (SDM 2A "CLDEMOTE").
        Mnemonic::Cldemote => Some(OlderMeaning::Nop),
        // 0F 0D: NOPs on every processor with long mode (APM 3 "PREFETCHW"; SDM 2B "PREFETCHW").
        Mnemonic::Prefetch | Mnemonic::Prefetchw | Mnemonic::Prefetchwt1 => Some(OlderMeaning::Nop),
        // 0F 18 /6 and /7 (SDM 2B "PREFETCHh").
        Mnemonic::Prefetchit0 | Mnemonic::Prefetchit1 => Some(OlderMeaning::Nop),
        // 0F 1A and 0F 1B (SDM 1 17.4: NOPs where MPX is not supported or not enabled).
        Mnemonic::Bndcl
        | Mnemonic::Bndcu
        | Mnemonic::Bndcn
        | Mnemonic::Bndmk
        | Mnemonic::Bndmov
        | Mnemonic::Bndldx
        | Mnemonic::Bndstx => Some(OlderMeaning::Nop),
        _ => None,
    }
}

/// Our feature for each of the decoder's. Its documentation gives the CPUID bit of each, which is the citation.
fn needs(feature: CpuidFeature) -> Needs {
    unnamed(feature)
        .or_else(|| base_feature(feature))
        .or_else(|| vector_feature(feature))
        .unwrap_or(Needs::Never)
}

/// Features of every processor with long mode, that have no bit of their own.
fn unnamed(feature: CpuidFeature) -> Option<Needs> {
    use CpuidFeature as C;
    match feature {
        C::INTEL8086
        | C::INTEL186
        | C::INTEL286
        | C::INTEL386
        | C::INTEL486
        | C::CPUID
        | C::MULTIBYTENOP
        | C::PAUSE
        | C::RDPMC
        | C::FPU287
        | C::FPU387 => Some(Needs::Nothing),
        // One generation's or one maker's instructions, whose encodings others do not have (8086 POP CS, LOADALL, UMOV,
        // MOV TR, ICEBP of Cyrix and VIA), RSM outside of SMM, and what is not implemented.
        C::INTEL8086_ONLY
        | C::INTEL286_ONLY
        | C::INTEL386_ONLY
        | C::INTEL386_A0_ONLY
        | C::INTEL486_A_ONLY
        | C::UMOV
        | C::IA64
        | C::MOV_TR
        | C::SMM
        | C::FPU287XL_ONLY
        | C::FPU387SL_ONLY
        | C::CL1INVMB
        | C::KNC
        | C::UDBG
        | C::CYRIX_D3NOW
        | C::CYRIX_FPU
        | C::CYRIX_SMM
        | C::CYRIX_SMINT
        | C::CYRIX_SMINT_0F7E
        | C::CYRIX_SHR
        | C::CYRIX_DDI
        | C::CYRIX_EMMI
        | C::CYRIX_DMI
        | C::CENTAUR_AIS
        | C::PADLOCK_ACE
        | C::PADLOCK_PHE
        | C::PADLOCK_PMM
        | C::PADLOCK_RNG
        | C::PADLOCK_GMI
        | C::PADLOCK_UNDOC
        | C::D3NOW
        | C::D3NOWEXT
        | C::HLE
        | C::HLE_or_RTM
        | C::RTM
        | C::TSXLDTRK
        | C::SGX1
        | C::OSS
        | C::VMX
        | C::INVEPT
        | C::INVVPID
        | C::SMX
        | C::SVM
        | C::SKINIT
        | C::SKINIT_or_SVM
        | C::SEV_ES
        | C::SEV_SNP
        | C::RMPQUERY
        | C::TDX
        | C::TSE
        | C::INVLPGB
        | C::MCOMMIT
        | C::RDPRU
        | C::MONITORX
        | C::LWP
        | C::KL
        | C::AESKLE
        | C::WIDE_KL
        | C::UINTR
        | C::HRESET
        | C::FRED
        | C::LKGS
        | C::MSRLIST
        | C::WRMSRNS
        | C::PCONFIG
        | C::PCOMMIT
        | C::PTWRITE
        | C::ENQCMD
        | C::MOVDIRI
        | C::MOVDIR64B
        | C::SERIALIZE
        | C::WAITPKG
        | C::CLDEMOTE
        | C::PREFETCHITI
        | C::PREFETCHWT1
        | C::PKU
        | C::MPX
        | C::CET_IBT
        | C::CET_SS
        | C::RAO_INT
        | C::CMPCCXADD
        | C::AMX_BF16
        | C::AMX_TILE
        | C::AMX_INT8
        | C::AMX_FP16
        | C::AMX_COMPLEX
        | C::AVX512_4FMAPS
        | C::AVX512_4VNNIW
        | C::AVX512ER
        | C::AVX512PF => Some(Needs::Never),
        _ => None,
    }
}

/// General-purpose, system and x87 features.
fn base_feature(feature: CpuidFeature) -> Option<Needs> {
    use CpuidFeature as C;
    let ours = match feature {
        C::X64 => Feature::Lm,
        C::FPU => Feature::Fpu,
        C::ADX => Feature::Adx,
        C::BMI1 => Feature::Bmi1,
        C::BMI2 => Feature::Bmi2,
        C::TBM => Feature::Tbm,
        C::LZCNT => Feature::Lzcnt,
        C::POPCNT => Feature::Popcnt,
        C::MOVBE => Feature::Movbe,
        C::CMOV => Feature::Cmov,
        C::CX8 => Feature::Cx8,
        C::CMPXCHG16B => Feature::Cx16,
        C::CLFSH => Feature::Clfsh,
        C::CLFLUSHOPT => Feature::Clflushopt,
        C::CLWB => Feature::Clwb,
        C::CLZERO => Feature::Clzero,
        C::PREFETCHW => Feature::Prefetchw,
        C::WBNOINVD => Feature::Wbnoinvd,
        C::FSGSBASE => Feature::Fsgsbase,
        C::FXSR => Feature::Fxsr,
        C::INVPCID => Feature::Invpcid,
        C::MONITOR => Feature::Monitor,
        C::MSR => Feature::Msr,
        C::RDPID => Feature::Rdpid,
        C::RDRAND => Feature::Rdrand,
        C::RDSEED => Feature::Rdseed,
        C::RDTSCP => Feature::Rdtscp,
        C::TSC => Feature::Tsc,
        C::SEP => Feature::Sep,
        C::SMAP => Feature::Smap,
        C::SYSCALL => Feature::Syscall,
        C::XSAVE => Feature::Xsave,
        C::XSAVEC => Feature::Xsavec,
        C::XSAVEOPT => Feature::Xsaveopt,
        C::XSAVES => Feature::Xsaves,
        _ => return None,
    };
    Some(Needs::Feature(ours))
}

/// MMX, SSE, AVX, AVX-512 and the cryptographic instructions.
fn vector_feature(feature: CpuidFeature) -> Option<Needs> {
    use CpuidFeature as C;
    let ours = match feature {
        C::MMX => Feature::Mmx,
        C::SSE => Feature::Sse,
        C::SSE2 => Feature::Sse2,
        C::SSE3 => Feature::Sse3,
        C::SSSE3 => Feature::Ssse3,
        C::SSE4_1 => Feature::Sse41,
        C::SSE4_2 => Feature::Sse42,
        C::SSE4A => Feature::Sse4a,
        C::AES => Feature::Aes,
        C::PCLMULQDQ => Feature::Pclmulqdq,
        C::SHA => Feature::Sha,
        C::GFNI => Feature::Gfni,
        C::AVX => Feature::Avx,
        C::AVX2 => Feature::Avx2,
        C::F16C => Feature::F16c,
        C::FMA => Feature::Fma,
        C::FMA4 => Feature::Fma4,
        C::XOP => Feature::Xop,
        C::VAES => Feature::Vaes,
        C::VPCLMULQDQ => Feature::Vpclmulqdq,
        C::AVX_VNNI => Feature::AvxVnni,
        C::AVX_IFMA => Feature::AvxIfma,
        C::AVX_NE_CONVERT => Feature::AvxNeConvert,
        C::AVX_VNNI_INT8 => Feature::AvxVnniInt8,
        C::AVX_VNNI_INT16 => Feature::AvxVnniInt16,
        C::SHA512 => Feature::Sha512,
        C::SM3 => Feature::Sm3,
        C::SM4 => Feature::Sm4,
        C::AVX512F => Feature::Avx512f,
        C::AVX512VL => Feature::Avx512vl,
        C::AVX512BW => Feature::Avx512bw,
        C::AVX512CD => Feature::Avx512cd,
        C::AVX512DQ => Feature::Avx512dq,
        C::AVX512_BF16 => Feature::Avx512bf16,
        C::AVX512_BITALG => Feature::Avx512bitalg,
        C::AVX512_FP16 => Feature::Avx512fp16,
        C::AVX512_IFMA => Feature::Avx512ifma,
        C::AVX512_VBMI => Feature::Avx512vbmi,
        C::AVX512_VBMI2 => Feature::Avx512vbmi2,
        C::AVX512_VNNI => Feature::Avx512vnni,
        C::AVX512_VP2INTERSECT => Feature::Avx512vp2intersect,
        C::AVX512_VPOPCNTDQ => Feature::Avx512vpopcntdq,
        _ => return None,
    };
    Some(Needs::Feature(ours))
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;
    use crate::cpuid::tests::intel_host;

    fn gate_of(spec: &str, code: &[u8]) -> Gate {
        let instruction = Decoder::new(64, code, DecoderOptions::NONE).decode();
        assert!(!instruction.is_invalid(), "{code:02x?}");
        model(spec).gate(&instruction)
    }

    fn model(spec: &str) -> CpuModel {
        CpuModel::parse_for(spec, &intel_host()).expect("model of the test")
    }

    #[test]
    fn every_feature_of_the_decoder_is_mapped() {
        for feature in CpuidFeature::values() {
            let known =
                unnamed(feature).or_else(|| base_feature(feature)).or_else(|| vector_feature(feature));
            assert!(known.is_some(), "{feature:?} is not mapped");
            if let Some(Needs::Feature(ours)) = known {
                assert_ne!(
                    ours.info().class,
                    crate::cpuid::Class::Never,
                    "{feature:?} can never be announced"
                );
            }
        }
    }

    #[test]
    fn gate_v1_hides_what_is_newer() {
        let undefined: [&[u8]; 9] = [
            &[0xc5, 0xfc, 0x58, 0xc1],             // vaddps ymm0, ymm0, ymm1
            &[0xf3, 0x0f, 0xb8, 0xc1],             // popcnt eax, ecx
            &[0x0f, 0x38, 0xf0, 0x00],             // movbe eax, [rax]
            &[0x66, 0x0f, 0x38, 0x17, 0xc1],       // ptest xmm0, xmm1
            &[0x0f, 0xc7, 0xf0],                   // rdrand eax
            &[0x0f, 0x01, 0xf9],                   // rdtscp
            &[0xf3, 0x0f, 0xc7, 0xf8],             // rdpid rax
            &[0x66, 0x0f, 0xae, 0x38],             // clflushopt [rax]
            &[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1], // vaddps zmm0, zmm0, zmm1
        ];
        for code in undefined {
            assert_eq!(gate_of("x86-64-v1", code), Gate::Undefined, "{code:02x?}");
        }
        assert_eq!(gate_of("x86-64-v1", &[0x0f, 0x58, 0xc1]), Gate::Announced, "addps");
        assert_eq!(gate_of("x86-64-v3", undefined[0]), Gate::Announced, "vaddps ymm");
        assert_eq!(gate_of("x86-64-v3", undefined[8]), Gate::Undefined, "vaddps zmm");
    }

    #[test]
    fn gate_keeps_the_older_meaning() {
        let nop: [&[u8]; 5] = [
            &[0xf3, 0x0f, 0x1e, 0xfa],       // endbr64
            &[0xf3, 0x48, 0x0f, 0x1e, 0xc8], // rdsspq rax
            &[0x0f, 0x1c, 0x00],             // cldemote [rax]
            &[0x0f, 0x0d, 0x08],             // prefetchw [rax]
            &[0x0f, 0x0d, 0x10],             // prefetchwt1 [rax]
        ];
        for code in nop {
            assert_eq!(gate_of("x86-64-v1", code), Gate::Older(OlderMeaning::Nop), "{code:02x?}");
        }
        assert_eq!(gate_of("x86-64-v1", &[0xf3, 0x0f, 0xbc, 0xc1]), Gate::Older(OlderMeaning::Bsf));
        assert_eq!(gate_of("x86-64-v1", &[0xf3, 0x0f, 0xbd, 0xc1]), Gate::Older(OlderMeaning::Bsr));
        assert_eq!(gate_of("max,-wbnoinvd", &[0xf3, 0x0f, 0x09]), Gate::Older(OlderMeaning::Wbinvd));
        assert_eq!(gate_of("x86-64-v3", &[0xf3, 0x0f, 0xbc, 0xc1]), Gate::Announced);
        assert_eq!(gate_of("x86-64-v1", &[0xf3, 0x90]), Gate::Announced, "pause");
        assert_eq!(gate_of("x86-64-v1", &[0x0f, 0x1f, 0x00]), Gate::Announced, "nop [rax]");
        let bndmov = &[0x66, 0x0f, 0x1a, 0xc1];
        assert_eq!(gate_of("x86-64-v1", bndmov), Gate::Announced, "reserved nop without DecoderOptions::MPX");
        let instruction = Decoder::new(64, bndmov, DecoderOptions::MPX).decode();
        assert_eq!(model("max").gate(&instruction), Gate::Older(OlderMeaning::Nop));
    }

    #[test]
    fn gate_of_lahf_depends_on_the_mode() {
        let v1 = model("x86-64-v1");
        for code in [[0x9e], [0x9f]] {
            assert_eq!(v1.gate(&Decoder::new(64, &code, DecoderOptions::NONE).decode()), Gate::Undefined);
            assert_eq!(v1.gate(&Decoder::new(32, &code, DecoderOptions::NONE).decode()), Gate::Announced);
            assert_eq!(gate_of("x86-64-v2", &code), Gate::Announced);
        }
    }

    #[test]
    fn gate_of_what_is_never_announced_is_undefined() {
        let never: [&[u8]; 6] = [
            &[0xc7, 0xf8, 0, 0, 0, 0], // xbegin
            &[0x0f, 0x01, 0xd8],       // vmrun
            &[0x0f, 0x01, 0xee],       // rdpkru
            &[0x0f, 0x01, 0xe8],       // serialize
            &[0x0f, 0x01, 0xc2],       // vmlaunch
            &[0x0f, 0xaa],             // rsm
        ];
        for code in never {
            assert_eq!(gate_of("max", code), Gate::Undefined, "{code:02x?}");
        }
        assert_eq!(gate_of("max", &[0x0f, 0x01, 0xc8]), Gate::Undefined, "monitor");
        assert_eq!(gate_of("max,+monitor", &[0x0f, 0x01, 0xc8]), Gate::Announced, "monitor");
    }

    #[test]
    fn gate_of_a_hypercall_follows_the_hypervisor_leaf() {
        for code in [&[0x0f, 0x01, 0xc1], &[0x0f, 0x01, 0xd9]] {
            assert_eq!(gate_of("max", code), Gate::Announced);
            assert_eq!(gate_of("max,-hypervisor", code), Gate::Undefined);
        }
    }
}
