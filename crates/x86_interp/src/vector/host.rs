//! Which instructions the host can execute. What the *guest* is told it can is the CPUID model's business.

use std::sync::OnceLock;

use iced_x86::{CpuidFeature, Instruction};

macro_rules! detect {
    ($feature:expr; $($name:ident => $($text:tt)|+),* $(,)?) => {
        match $feature {
            $(CpuidFeature::$name => { $(is_x86_feature_detected!($text))&&+ })*
            CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 | CpuidFeature::INTEL8086
            | CpuidFeature::INTEL186 | CpuidFeature::INTEL286 | CpuidFeature::INTEL386 | CpuidFeature::INTEL486
            | CpuidFeature::X64 | CpuidFeature::CMOV | CpuidFeature::MMX | CpuidFeature::SSE | CpuidFeature::SSE2
            | CpuidFeature::FXSR => true,
            _ => false,
        }
    };
}

fn has(feature: CpuidFeature) -> bool {
    detect! { feature;
        SSE3 => "sse3", SSSE3 => "ssse3", SSE4_1 => "sse4.1", SSE4_2 => "sse4.2", SSE4A => "sse4a",
        AES => "aes", PCLMULQDQ => "pclmulqdq", SHA => "sha", GFNI => "gfni", VAES => "vaes",
        VPCLMULQDQ => "vpclmulqdq", POPCNT => "popcnt", LZCNT => "lzcnt", BMI1 => "bmi1", BMI2 => "bmi2",
        ADX => "adx", MOVBE => "movbe", RDRAND => "rdrand", RDSEED => "rdseed", TBM => "tbm",
        AVX => "avx", AVX2 => "avx2", FMA => "fma", F16C => "f16c",
        AVX512F => "avx512f", AVX512CD => "avx512cd", AVX512BW => "avx512bw", AVX512DQ => "avx512dq",
        AVX512VL => "avx512vl", AVX512_IFMA => "avx512ifma", AVX512_VBMI => "avx512vbmi",
        AVX512_VBMI2 => "avx512vbmi2", AVX512_VNNI => "avx512vnni", AVX512_BITALG => "avx512bitalg",
        AVX512_VPOPCNTDQ => "avx512vpopcntdq", AVX512_BF16 => "avx512bf16", AVX512_FP16 => "avx512fp16",
        AVX512_VP2INTERSECT => "avx512vp2intersect",
        XSAVE => "xsave", XSAVEOPT => "xsaveopt", XSAVEC => "xsavec", XSAVES => "xsaves",
        AVX_VNNI => "avxvnni", AVX_IFMA => "avxifma", AVX_NE_CONVERT => "avxneconvert",
        AVX_VNNI_INT8 => "avxvnniint8", AVX_VNNI_INT16 => "avxvnniint16",
        SHA512 => "sha512", SM3 => "sm3", SM4 => "sm4",
    }
}

/// Whether the host can execute `instruction`.
pub(super) fn can_execute(instruction: &Instruction) -> bool {
    static CACHE: OnceLock<Vec<(CpuidFeature, bool)>> = OnceLock::new();
    let cache = CACHE.get_or_init(|| CpuidFeature::values().map(|f| (f, has(f))).collect());
    instruction
        .cpuid_features()
        .iter()
        .all(|&f| cache.get(f as usize).is_some_and(|&(feature, present)| feature == f && present))
}
