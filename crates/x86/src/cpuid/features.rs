//! One [`Feature`] per CPUID bit that this project knows, where the bit stands, and who may announce it.
//!
//! The table is the single place that says what we implement: a feature's [`Class`] decides whether a model announces
//! it always, when the host has it, only when asked for, or never. Bit positions: SDM 2A "CPUID", APM 3 appendix E,
//! Linux `Documentation/virt/kvm/x86/cpuid.rst` for the hypervisor leaves. Names are QEMU's, aliases Linux's and
//! other spellings; `_`, `.` and `-` are one character when a name is looked up.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A register that CPUID returns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the manual's names")]
pub enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Who may announce a feature.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    /// Implemented without regard to the host, without instructions that user code could miss: in every model.
    Platform,
    /// Implemented without regard to the host, but with instructions of its own: in `max` and `host`, else on request.
    Soft,
    /// Runs natively, so the host must have it: in `max` and `host` where it has, else on request.
    Native,
    /// Implemented without regard to the host, but announced only on request.
    OptIn,
    /// Known by name and not implemented: never announced.
    Never,
}

/// Whose processors have the bit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Maker {
    /// Everyone's.
    Any,
    /// AMD's and Hygon's.
    Amd,
    /// Intel's (and those that follow it).
    Intel,
}

/// What the table knows about a feature.
#[derive(Clone, Copy, Debug)]
pub struct Info {
    /// The feature itself.
    pub feature: Feature,
    /// QEMU's name.
    pub name: &'static str,
    /// Other spellings, separated by spaces.
    pub aliases: &'static str,
    /// CPUID leaf (EAX).
    pub leaf: u32,
    /// CPUID subleaf (ECX).
    pub subleaf: u32,
    /// The register that the leaf returns the bit in.
    pub register: Register,
    /// Bit, 0 to 31.
    pub bit: u8,
    /// Who may announce it.
    pub class: Class,
    /// Whose processors have it.
    pub maker: Maker,
}

macro_rules! features {
    ($($variant:ident $name:literal $aliases:literal $leaf:literal/$sub:literal $reg:ident $bit:literal $class:ident $maker:ident;)*) => {
        /// A CPUID bit. The order is that of the table and no part of any format: snapshots carry names.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u8)]
        pub enum Feature {
            $(
                #[doc = concat!("`", $name, "`: CPUID ", stringify!($leaf), ".", stringify!($sub), " ", stringify!($reg), " bit ", stringify!($bit), ".")]
                $variant,
            )*
        }

        /// Every feature, in the order of [`Feature`].
        pub const TABLE: &[Info] = &[
            $(Info {
                feature: Feature::$variant, name: $name, aliases: $aliases, leaf: $leaf, subleaf: $sub,
                register: Register::$reg, bit: $bit, class: Class::$class, maker: Maker::$maker,
            },)*
        ];
    };
}

features! {
    // Leaf 1, EDX.
    Fpu "fpu" "" 1/0 Edx 0 Platform Any;
    Vme "vme" "" 1/0 Edx 1 Platform Any;
    De "de" "" 1/0 Edx 2 Platform Any;
    Pse "pse" "" 1/0 Edx 3 Platform Any;
    Tsc "tsc" "" 1/0 Edx 4 Platform Any;
    Msr "msr" "" 1/0 Edx 5 Platform Any;
    Pae "pae" "" 1/0 Edx 6 Platform Any;
    Mce "mce" "" 1/0 Edx 7 Platform Any;
    Cx8 "cx8" "" 1/0 Edx 8 Platform Any;
    Apic "apic" "" 1/0 Edx 9 Platform Any;
    Sep "sep" "sysenter" 1/0 Edx 11 Platform Any;
    Mtrr "mtrr" "" 1/0 Edx 12 Platform Any;
    Pge "pge" "" 1/0 Edx 13 Platform Any;
    Mca "mca" "" 1/0 Edx 14 Platform Any;
    Cmov "cmov" "" 1/0 Edx 15 Platform Any;
    Pat "pat" "" 1/0 Edx 16 Platform Any;
    Pse36 "pse36" "" 1/0 Edx 17 Platform Any;
    Psn "pn" "psn" 1/0 Edx 18 Never Any;
    Clfsh "clflush" "clfsh" 1/0 Edx 19 Platform Any;
    Ds "ds" "dts" 1/0 Edx 21 Never Any;
    Acpi "acpi" "" 1/0 Edx 22 Never Any;
    Mmx "mmx" "" 1/0 Edx 23 Platform Any;
    Fxsr "fxsr" "" 1/0 Edx 24 Platform Any;
    Sse "sse" "" 1/0 Edx 25 Platform Any;
    Sse2 "sse2" "" 1/0 Edx 26 Platform Any;
    Ss "ss" "" 1/0 Edx 27 Never Any;
    // Announced only with more than one vCPU (SDM 2A: package may hold more than one logical processor).
    Ht "ht" "htt" 1/0 Edx 28 Platform Any;
    Tm "tm" "" 1/0 Edx 29 Never Any;
    Ia64 "ia64" "" 1/0 Edx 30 Never Any;
    Pbe "pbe" "" 1/0 Edx 31 Never Any;
    // Leaf 1, ECX. Bit 27, OSXSAVE, mirrors CR4.
    Sse3 "pni" "sse3" 1/0 Ecx 0 Native Any;
    Pclmulqdq "pclmulqdq" "pclmuldq pclmul" 1/0 Ecx 1 Native Any;
    Dtes64 "dtes64" "" 1/0 Ecx 2 Never Any;
    Monitor "monitor" "mwait" 1/0 Ecx 3 OptIn Any;
    DsCpl "ds-cpl" "" 1/0 Ecx 4 Never Any;
    Vmx "vmx" "" 1/0 Ecx 5 Never Any;
    Smx "smx" "" 1/0 Ecx 6 Never Any;
    Est "est" "eist" 1/0 Ecx 7 Never Any;
    Tm2 "tm2" "" 1/0 Ecx 8 Never Any;
    Ssse3 "ssse3" "" 1/0 Ecx 9 Native Any;
    Cid "cid" "" 1/0 Ecx 10 Never Any;
    Fma "fma" "fma3" 1/0 Ecx 12 Native Any;
    Cx16 "cx16" "cmpxchg16b" 1/0 Ecx 13 Native Any;
    Xtpr "xtpr" "" 1/0 Ecx 14 Never Any;
    Pdcm "pdcm" "" 1/0 Ecx 15 Never Any;
    Pcid "pcid" "" 1/0 Ecx 17 Platform Any;
    Dca "dca" "" 1/0 Ecx 18 Never Any;
    Sse41 "sse4.1" "sse41" 1/0 Ecx 19 Native Any;
    Sse42 "sse4.2" "sse42" 1/0 Ecx 20 Native Any;
    X2apic "x2apic" "" 1/0 Ecx 21 Platform Any;
    Movbe "movbe" "" 1/0 Ecx 22 Native Any;
    Popcnt "popcnt" "" 1/0 Ecx 23 Native Any;
    TscDeadline "tsc-deadline" "tsc-deadline-timer tscdeadline" 1/0 Ecx 24 Platform Any;
    Aes "aes" "aesni" 1/0 Ecx 25 Native Any;
    Xsave "xsave" "" 1/0 Ecx 26 Native Any;
    Avx "avx" "" 1/0 Ecx 28 Native Any;
    F16c "f16c" "" 1/0 Ecx 29 Native Any;
    Rdrand "rdrand" "" 1/0 Ecx 30 Native Any;
    Hypervisor "hypervisor" "" 1/0 Ecx 31 Platform Any;
    // Leaf 6.
    Arat "arat" "" 6/0 Eax 2 Platform Any;
    // Leaf 7.0, EBX.
    Fsgsbase "fsgsbase" "" 7/0 Ebx 0 Soft Any;
    TscAdjust "tsc_adjust" "" 7/0 Ebx 1 Platform Any;
    Sgx "sgx" "" 7/0 Ebx 2 Never Intel;
    Bmi1 "bmi1" "" 7/0 Ebx 3 Native Any;
    Hle "hle" "" 7/0 Ebx 4 Never Any;
    Avx2 "avx2" "" 7/0 Ebx 5 Native Any;
    FdpExcptnOnly "fdp-excptn-only" "" 7/0 Ebx 6 Native Any;
    Smep "smep" "" 7/0 Ebx 7 Platform Any;
    Bmi2 "bmi2" "" 7/0 Ebx 8 Native Any;
    Erms "erms" "" 7/0 Ebx 9 Platform Any;
    Invpcid "invpcid" "" 7/0 Ebx 10 Platform Any;
    Rtm "rtm" "tsx" 7/0 Ebx 11 Never Any;
    Pqm "pqm" "cqm rdt-m" 7/0 Ebx 12 Never Any;
    ZeroFcsFds "zero-fcs-fds" "" 7/0 Ebx 13 Native Any;
    Mpx "mpx" "" 7/0 Ebx 14 Never Any;
    Pqe "pqe" "rdt-a" 7/0 Ebx 15 Never Any;
    Avx512f "avx512f" "" 7/0 Ebx 16 Native Any;
    Avx512dq "avx512dq" "" 7/0 Ebx 17 Native Any;
    Rdseed "rdseed" "" 7/0 Ebx 18 Native Any;
    Adx "adx" "" 7/0 Ebx 19 Native Any;
    Smap "smap" "" 7/0 Ebx 20 Platform Any;
    Avx512ifma "avx512ifma" "" 7/0 Ebx 21 Native Any;
    Pcommit "pcommit" "" 7/0 Ebx 22 Never Any;
    Clflushopt "clflushopt" "" 7/0 Ebx 23 Soft Any;
    Clwb "clwb" "" 7/0 Ebx 24 Soft Any;
    IntelPt "intel-pt" "pt" 7/0 Ebx 25 Never Intel;
    Avx512pf "avx512pf" "" 7/0 Ebx 26 Never Any;
    Avx512er "avx512er" "" 7/0 Ebx 27 Never Any;
    Avx512cd "avx512cd" "" 7/0 Ebx 28 Native Any;
    Sha "sha-ni" "sha" 7/0 Ebx 29 Native Any;
    Avx512bw "avx512bw" "" 7/0 Ebx 30 Native Any;
    Avx512vl "avx512vl" "" 7/0 Ebx 31 Native Any;
    // Leaf 7.0, ECX.
    Prefetchwt1 "prefetchwt1" "" 7/0 Ecx 0 Never Any;
    Avx512vbmi "avx512vbmi" "" 7/0 Ecx 1 Native Any;
    Umip "umip" "" 7/0 Ecx 2 Platform Any;
    Pku "pku" "pke ospke" 7/0 Ecx 3 Never Any;
    Waitpkg "waitpkg" "" 7/0 Ecx 5 Never Any;
    Avx512vbmi2 "avx512vbmi2" "" 7/0 Ecx 6 Native Any;
    CetSs "cet-ss" "shstk" 7/0 Ecx 7 Never Any;
    Gfni "gfni" "" 7/0 Ecx 8 Native Any;
    Vaes "vaes" "" 7/0 Ecx 9 Native Any;
    Vpclmulqdq "vpclmulqdq" "" 7/0 Ecx 10 Native Any;
    Avx512vnni "avx512vnni" "" 7/0 Ecx 11 Native Any;
    Avx512bitalg "avx512bitalg" "" 7/0 Ecx 12 Native Any;
    Avx512vpopcntdq "avx512-vpopcntdq" "avx512vpopcntdq" 7/0 Ecx 14 Native Any;
    La57 "la57" "" 7/0 Ecx 16 Never Any;
    Rdpid "rdpid" "" 7/0 Ecx 22 Soft Any;
    KeyLocker "kl" "key-locker" 7/0 Ecx 23 Never Any;
    BusLockDetect "bus-lock-detect" "" 7/0 Ecx 24 Never Any;
    Cldemote "cldemote" "" 7/0 Ecx 25 Never Any;
    Movdiri "movdiri" "" 7/0 Ecx 27 Never Any;
    Movdir64b "movdir64b" "" 7/0 Ecx 28 Never Any;
    Enqcmd "enqcmd" "" 7/0 Ecx 29 Never Any;
    Pks "pks" "" 7/0 Ecx 31 Never Any;
    // Leaf 7.0, EDX.
    Avx5124vnniw "avx512-4vnniw" "" 7/0 Edx 2 Never Any;
    Avx5124fmaps "avx512-4fmaps" "" 7/0 Edx 3 Never Any;
    Fsrm "fsrm" "" 7/0 Edx 4 Platform Any;
    Uintr "uintr" "" 7/0 Edx 5 Never Any;
    Avx512vp2intersect "avx512-vp2intersect" "avx512vp2intersect" 7/0 Edx 8 Native Any;
    MdClear "md-clear" "" 7/0 Edx 10 OptIn Any;
    Serialize "serialize" "" 7/0 Edx 14 Never Any;
    Tsxldtrk "tsx-ldtrk" "tsxldtrk" 7/0 Edx 16 Never Any;
    Pconfig "pconfig" "" 7/0 Edx 18 Never Any;
    ArchLbr "arch-lbr" "" 7/0 Edx 19 Never Any;
    CetIbt "cet-ibt" "ibt" 7/0 Edx 20 Never Any;
    AmxBf16 "amx-bf16" "" 7/0 Edx 22 Never Any;
    Avx512fp16 "avx512-fp16" "avx512fp16" 7/0 Edx 23 Native Any;
    AmxTile "amx-tile" "amx" 7/0 Edx 24 Never Any;
    AmxInt8 "amx-int8" "" 7/0 Edx 25 Never Any;
    // SPEC_CTRL.IBRS and PRED_CMD.IBPB. On Intel in every model, because Enhanced IBRS needs it.
    SpecCtrl "spec-ctrl" "" 7/0 Edx 26 Platform Intel;
    Stibp "stibp" "" 7/0 Edx 27 OptIn Intel;
    FlushL1d "flush-l1d" "" 7/0 Edx 28 Never Any;
    ArchCapabilities "arch-capabilities" "" 7/0 Edx 29 Platform Intel;
    Ssbd "ssbd" "" 7/0 Edx 31 OptIn Intel;
    // Leaf 7.1.
    Sha512 "sha512" "" 7/1 Eax 0 Native Any;
    Sm3 "sm3" "" 7/1 Eax 1 Native Any;
    Sm4 "sm4" "" 7/1 Eax 2 Native Any;
    RaoInt "rao-int" "" 7/1 Eax 3 Never Any;
    AvxVnni "avx-vnni" "" 7/1 Eax 4 Native Any;
    Avx512bf16 "avx512-bf16" "avx512bf16" 7/1 Eax 5 Native Any;
    Cmpccxadd "cmpccxadd" "" 7/1 Eax 7 Never Any;
    Fred "fred" "" 7/1 Eax 17 Never Any;
    Lkgs "lkgs" "" 7/1 Eax 18 Never Any;
    Wrmsrns "wrmsrns" "" 7/1 Eax 19 Never Any;
    AmxFp16 "amx-fp16" "" 7/1 Eax 21 Never Any;
    Hreset "hreset" "" 7/1 Eax 22 Never Any;
    AvxIfma "avx-ifma" "" 7/1 Eax 23 Native Any;
    Lam "lam" "" 7/1 Eax 26 Never Any;
    Msrlist "msrlist" "" 7/1 Eax 27 Never Any;
    AvxVnniInt8 "avx-vnni-int8" "" 7/1 Edx 4 Native Any;
    AvxNeConvert "avx-ne-convert" "" 7/1 Edx 5 Native Any;
    AmxComplex "amx-complex" "" 7/1 Edx 8 Never Any;
    AvxVnniInt16 "avx-vnni-int16" "" 7/1 Edx 10 Native Any;
    Prefetchiti "prefetchiti" "" 7/1 Edx 14 Never Any;
    Avx10 "avx10" "" 7/1 Edx 19 Never Any;
    // Leaf 0xd.1.
    Xsaveopt "xsaveopt" "" 0xd/1 Eax 0 Native Any;
    Xsavec "xsavec" "" 0xd/1 Eax 1 Native Any;
    Xgetbv1 "xgetbv1" "" 0xd/1 Eax 2 Native Any;
    Xsaves "xsaves" "" 0xd/1 Eax 3 Native Any;
    // KVM's leaf 0x40000001, EAX.
    KvmNopIoDelay "kvm-nopiodelay" "" 0x4000_0001/0 Eax 1 Platform Any;
    KvmClock "kvmclock" "kvm-clock" 0x4000_0001/0 Eax 3 Platform Any;
    KvmAsyncPf "kvm-asyncpf" "" 0x4000_0001/0 Eax 4 Never Any;
    KvmStealTime "kvm-steal-time" "" 0x4000_0001/0 Eax 5 Never Any;
    KvmPvEoi "kvm-pv-eoi" "" 0x4000_0001/0 Eax 6 Never Any;
    KvmPvUnhalt "kvm-pv-unhalt" "" 0x4000_0001/0 Eax 7 Never Any;
    KvmPvTlbFlush "kvm-pv-tlb-flush" "" 0x4000_0001/0 Eax 9 Never Any;
    KvmPvIpi "kvm-pv-ipi" "" 0x4000_0001/0 Eax 11 Never Any;
    KvmPollControl "kvm-poll-control" "" 0x4000_0001/0 Eax 12 Never Any;
    KvmClockStable "kvmclock-stable-bit" "" 0x4000_0001/0 Eax 24 Platform Any;
    // Leaf 0x80000001, EDX. AMD's copies of leaf 1's bits are made when the leaf is read.
    Syscall "syscall" "" 0x8000_0001/0 Edx 11 Platform Any;
    Nx "nx" "xd" 0x8000_0001/0 Edx 20 Platform Any;
    Mmxext "mmxext" "" 0x8000_0001/0 Edx 22 Native Amd;
    FxsrOpt "fxsr-opt" "ffxsr" 0x8000_0001/0 Edx 25 Never Amd;
    Pdpe1gb "pdpe1gb" "" 0x8000_0001/0 Edx 26 Platform Any;
    Rdtscp "rdtscp" "" 0x8000_0001/0 Edx 27 Soft Any;
    Lm "lm" "x86-64" 0x8000_0001/0 Edx 29 Platform Any;
    Amd3dnowext "3dnowext" "" 0x8000_0001/0 Edx 30 Never Amd;
    Amd3dnow "3dnow" "" 0x8000_0001/0 Edx 31 Never Amd;
    // Leaf 0x80000001, ECX.
    LahfLm "lahf-lm" "lahf" 0x8000_0001/0 Ecx 0 Native Any;
    // Announced only with more than one vCPU, like `ht`.
    CmpLegacy "cmp-legacy" "" 0x8000_0001/0 Ecx 1 Platform Amd;
    Svm "svm" "" 0x8000_0001/0 Ecx 2 Never Amd;
    Extapic "extapic" "" 0x8000_0001/0 Ecx 3 Never Amd;
    Cr8Legacy "cr8legacy" "cr8-legacy" 0x8000_0001/0 Ecx 4 Never Amd;
    Lzcnt "abm" "lzcnt" 0x8000_0001/0 Ecx 5 Native Any;
    Sse4a "sse4a" "" 0x8000_0001/0 Ecx 6 Native Amd;
    // MXCSR.MM is not modelled, so misaligned SSE operands always fault.
    Misalignsse "misalignsse" "" 0x8000_0001/0 Ecx 7 Never Amd;
    Prefetchw "3dnowprefetch" "prefetchw" 0x8000_0001/0 Ecx 8 Soft Any;
    Osvw "osvw" "" 0x8000_0001/0 Ecx 9 Never Amd;
    Ibs "ibs" "" 0x8000_0001/0 Ecx 10 Never Amd;
    Xop "xop" "" 0x8000_0001/0 Ecx 11 Native Amd;
    Skinit "skinit" "" 0x8000_0001/0 Ecx 12 Never Amd;
    Wdt "wdt" "" 0x8000_0001/0 Ecx 13 Never Amd;
    Lwp "lwp" "" 0x8000_0001/0 Ecx 15 Never Amd;
    Fma4 "fma4" "" 0x8000_0001/0 Ecx 16 Native Amd;
    Tce "tce" "" 0x8000_0001/0 Ecx 17 Never Amd;
    NodeidMsr "nodeid-msr" "" 0x8000_0001/0 Ecx 19 Never Amd;
    Tbm "tbm" "" 0x8000_0001/0 Ecx 21 Native Amd;
    Topoext "topoext" "" 0x8000_0001/0 Ecx 22 Platform Amd;
    PerfctrCore "perfctr-core" "" 0x8000_0001/0 Ecx 23 Never Amd;
    PerfctrNb "perfctr-nb" "" 0x8000_0001/0 Ecx 24 Never Amd;
    Monitorx "monitorx" "mwaitx" 0x8000_0001/0 Ecx 29 Never Amd;
    // Leaf 0x80000007, EDX.
    Invtsc "invtsc" "invariant-tsc constant-tsc nonstop-tsc" 0x8000_0007/0 Edx 8 Platform Any;
    // Leaf 0x80000008, EBX.
    Clzero "clzero" "" 0x8000_0008/0 Ebx 0 Native Amd;
    Xsaveerptr "xsaveerptr" "" 0x8000_0008/0 Ebx 2 Native Amd;
    Invlpgb "invlpgb" "" 0x8000_0008/0 Ebx 3 Never Amd;
    Rdpru "rdpru" "" 0x8000_0008/0 Ebx 4 Never Amd;
    Mcommit "mcommit" "" 0x8000_0008/0 Ebx 8 Never Amd;
    Wbnoinvd "wbnoinvd" "" 0x8000_0008/0 Ebx 9 Platform Any;
    AmdIbpb "ibpb" "" 0x8000_0008/0 Ebx 12 OptIn Amd;
    AmdIbrs "ibrs" "" 0x8000_0008/0 Ebx 14 OptIn Amd;
    AmdStibp "amd-stibp" "" 0x8000_0008/0 Ebx 15 OptIn Amd;
    AmdSsbd "amd-ssbd" "" 0x8000_0008/0 Ebx 24 OptIn Amd;
    VirtSsbd "virt-ssbd" "" 0x8000_0008/0 Ebx 25 Never Amd;
    AmdSsbNo "amd-no-ssb" "ssb-no" 0x8000_0008/0 Ebx 26 Platform Amd;
    AmdPsfd "amd-psfd" "psfd" 0x8000_0008/0 Ebx 28 OptIn Amd;
    BtcNo "btc-no" "" 0x8000_0008/0 Ebx 29 Platform Amd;
    // Leaf 0x80000021, EAX and ECX.
    NoNestedDataBp "no-nested-data-bp" "" 0x8000_0021/0 Eax 0 Platform Amd;
    LfenceSerializing "lfence-always-serializing" "" 0x8000_0021/0 Eax 2 Platform Amd;
    NullSelClrBase "null-sel-clr-base" "null-sel-clears-base" 0x8000_0021/0 Eax 6 Platform Amd;
    AutoIbrs "auto-ibrs" "autoibrs" 0x8000_0021/0 Eax 8 Platform Amd;
    NoSmmCtl "no-smm-ctl-msr" "" 0x8000_0021/0 Eax 9 Platform Amd;
    SrsoNo "srso-no" "" 0x8000_0021/0 Eax 29 Platform Amd;
    SrsoUserKernelNo "srso-user-kernel-no" "" 0x8000_0021/0 Eax 30 Platform Amd;
    TsaSqNo "tsa-sq-no" "" 0x8000_0021/0 Ecx 1 Platform Amd;
    TsaL1No "tsa-l1-no" "" 0x8000_0021/0 Ecx 2 Platform Amd;
}

impl Feature {
    /// The table's row.
    #[must_use]
    pub fn info(self) -> &'static Info {
        &TABLE[self as usize]
    }

    /// QEMU's name.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.info().name
    }

    /// The feature with this name or alias, in any spelling of its separators and case.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        let wanted = normal(name);
        TABLE
            .iter()
            .find(|i| {
                normal(i.name) == wanted || i.aliases.split(' ').any(|a| !a.is_empty() && normal(a) == wanted)
            })
            .map(|i| i.feature)
    }

    /// The known name nearest to `name`, if one is near.
    #[must_use]
    pub fn nearest(name: &str) -> Option<&'static str> {
        nearest(name, TABLE.iter().flat_map(|i| std::iter::once(i.name).chain(i.aliases.split(' '))))
    }

    /// Features without which this one has no meaning (SDM 1 chapters 12 to 15, each instruction's CPUID column).
    #[must_use]
    pub fn requires(self) -> &'static [Self] {
        use Feature::*;
        match self {
            Sse => &[Fxsr],
            Sse2 => &[Sse],
            Sse3 | Aes | Pclmulqdq | Sha | Gfni => &[Sse2],
            Ssse3 | Sse4a => &[Sse3],
            Sse41 => &[Ssse3],
            Sse42 => &[Sse41],
            Xsave => &[Fxsr],
            Xsaveopt | Xsavec | Xgetbv1 | Xsaveerptr => &[Xsave],
            Xsaves => &[Xsavec],
            Avx => &[Xsave, Sse42],
            F16c | Fma | Fma4 | Xop | Avx2 => &[Avx],
            Vaes => &[Avx, Aes],
            Vpclmulqdq => &[Avx, Pclmulqdq],
            AvxVnni | AvxIfma | AvxVnniInt8 | AvxNeConvert | AvxVnniInt16 | Sha512 | Sm3 | Sm4 => &[Avx2],
            Avx512f => &[Avx2, Fma, F16c],
            Avx512dq | Avx512ifma | Avx512cd | Avx512bw | Avx512vl | Avx512vnni | Avx512vpopcntdq
            | Avx512vp2intersect => &[Avx512f],
            Avx512vbmi | Avx512vbmi2 | Avx512bitalg | Avx512bf16 | Avx512fp16 => &[Avx512bw],
            Cx16 => &[Cx8],
            Mmxext => &[Mmx],
            X2apic | Arat => &[Apic],
            TscDeadline => &[Apic, Tsc],
            Rdtscp | TscAdjust | Invtsc => &[Tsc],
            Pse36 => &[Pse],
            Nx => &[Pae],
            Lm => &[Pae, Msr],
            Syscall => &[Msr],
            Pcid | Pdpe1gb | LahfLm | Fsgsbase => &[Lm],
            Mca => &[Mce],
            Clflushopt | Clwb => &[Clfsh],
            KvmClock => &[Hypervisor, Msr, Tsc],
            KvmNopIoDelay => &[Hypervisor],
            KvmClockStable => &[KvmClock],
            AutoIbrs => &[Msr],
            _ => &[],
        }
    }
}

/// A name without case and without its separators, so that `sse4_2`, `SSE4.2` and `sse42` are one.
fn normal(name: &str) -> String {
    name.chars().filter(|c| !matches!(c, '_' | '-' | '.')).map(|c| c.to_ascii_lowercase()).collect()
}

/// The candidate with the smallest edit distance, if that is at most a third of the name's length (at least 2).
pub(super) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    // A name longer than any that exists is near to none; the bound keeps hostile input cheap.
    if name.len() > 64 {
        return None;
    }
    let name = normal(name);
    candidates
        .filter(|c| !c.is_empty())
        .map(|c| (distance(&name, &normal(c)), c))
        .min_by_key(|&(d, _)| d)
        .filter(|&(d, _)| d <= (name.len() / 3).max(2))
        .map(|(_, c)| c)
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &cb) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(ca != cb);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// A set of features.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct FeatureSet([u64; 4]);

const _: () = assert!(TABLE.len() <= 256);

impl FeatureSet {
    /// No feature.
    #[must_use]
    pub const fn new() -> Self {
        Self([0; 4])
    }

    /// Whether the set has it.
    #[must_use]
    pub const fn has(&self, feature: Feature) -> bool {
        self.0[feature as usize / 64] >> (feature as usize % 64) & 1 != 0
    }

    /// Adds it.
    pub const fn insert(&mut self, feature: Feature) {
        self.0[feature as usize / 64] |= 1 << (feature as usize % 64);
    }

    /// Takes it away.
    pub const fn remove(&mut self, feature: Feature) {
        self.0[feature as usize / 64] &= !(1 << (feature as usize % 64));
    }

    /// The features in the table's order.
    pub fn iter(&self) -> impl Iterator<Item = Feature> + '_ {
        TABLE.iter().map(|i| i.feature).filter(|&f| self.has(f))
    }

    /// Adds the feature and, transitively, what it needs.
    pub fn insert_closed(&mut self, feature: Feature) {
        self.insert(feature);
        for &needed in feature.requires() {
            if !self.has(needed) {
                self.insert_closed(needed);
            }
        }
    }

    /// Takes away every feature whose needs are not met, until all are.
    pub fn close(&mut self) {
        loop {
            let broken: Vec<Feature> =
                self.iter().filter(|f| f.requires().iter().any(|&n| !self.has(n))).collect();
            if broken.is_empty() {
                return;
            }
            for feature in broken {
                self.remove(feature);
            }
        }
    }
}

impl FromIterator<Feature> for FeatureSet {
    fn from_iter<I: IntoIterator<Item = Feature>>(features: I) -> Self {
        let mut set = Self::new();
        for feature in features {
            set.insert(feature);
        }
        set
    }
}

impl std::fmt::Debug for FeatureSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.iter().map(Feature::name)).finish()
    }
}

impl Serialize for FeatureSet {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(self.iter().map(Feature::name))
    }
}

impl<'de> Deserialize<'de> for FeatureSet {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let names = Vec::<String>::deserialize(d)?;
        names
            .iter()
            .map(|n| {
                Feature::by_name(n).filter(|f| f.info().class != Class::Never).ok_or_else(|| {
                    serde::de::Error::custom(format!("CPU feature `{n}` is not implemented here"))
                })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_order_is_that_of_the_enum() {
        for (i, info) in TABLE.iter().enumerate() {
            assert_eq!(info.feature as usize, i, "{}", info.name);
        }
    }

    #[test]
    fn table_names_and_bits_are_unique() {
        let mut names = std::collections::BTreeSet::new();
        let mut bits = std::collections::BTreeSet::new();
        for i in TABLE {
            for name in std::iter::once(i.name).chain(i.aliases.split(' ')).filter(|n| !n.is_empty()) {
                assert!(
                    names.insert(normal(name)) || Feature::by_name(name) == Some(i.feature),
                    "{name} twice"
                );
            }
            assert!(bits.insert((i.leaf, i.subleaf, i.register as u8, i.bit)), "bit of {} twice", i.name);
            assert!(i.bit < 32);
        }
    }

    #[test]
    fn by_name_accepts_every_spelling() {
        for name in ["sse4_2", "sse4.2", "SSE42", "sse4-2"] {
            assert_eq!(Feature::by_name(name), Some(Feature::Sse42));
        }
        assert_eq!(Feature::by_name("tsc_deadline_timer"), Some(Feature::TscDeadline));
        assert_eq!(Feature::by_name("tsc-deadline"), Some(Feature::TscDeadline));
        assert_eq!(Feature::by_name("lzcnt"), Some(Feature::Lzcnt));
        assert_eq!(Feature::by_name(""), None);
    }

    #[test]
    fn nearest_suggests_what_is_near_only() {
        assert_eq!(Feature::nearest("avx22"), Some("avx2"));
        assert_eq!(Feature::nearest("fsgsbas"), Some("fsgsbase"));
        assert_eq!(Feature::nearest("xyzzyplughxyzzy"), None);
        assert_eq!(Feature::nearest(&"a".repeat(1 << 20)), None);
    }

    #[test]
    fn set_close_removes_dependents() {
        let mut set: FeatureSet = TABLE.iter().map(|i| i.feature).collect();
        set.remove(Feature::Xsave);
        set.close();
        for gone in [Feature::Avx, Feature::Avx2, Feature::Avx512bitalg, Feature::Vaes, Feature::Xsaves] {
            assert!(!set.has(gone), "{}", gone.name());
        }
        assert!(set.has(Feature::Sse42));
    }
}
