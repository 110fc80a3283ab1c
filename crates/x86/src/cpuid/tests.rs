//! Tests of models and leaves: on this host, and on an Intel host made up here.

use super::*;
use crate::bits::{cr4, efer};

/// A host that announces every feature of class `Native` that Intel's processors have, with their XSAVE layout.
pub(super) fn intel_host() -> Host {
    host_with(*b"GenuineIntel", 0x000c_06f2, |_| true)
}

fn host_with(vendor: [u8; 12], signature: u32, has: impl Fn(Feature) -> bool) -> Host {
    let word = |i: usize| u32::from_le_bytes([vendor[i], vendor[i + 1], vendor[i + 2], vendor[i + 3]]);
    let bits = |leaf: u32, subleaf: u32| {
        let mut words = [0u32; 4];
        for i in TABLE.iter().filter(|i| i.leaf == leaf && i.subleaf == subleaf && has(i.feature)) {
            words[i.register as usize] |= 1 << i.bit;
        }
        CpuidResult::from(words)
    };
    let read = |leaf: u32, subleaf: u32| match (leaf, subleaf) {
        (0, _) => [0x1f, word(0), word(8), word(4)].into(),
        (1, _) => CpuidResult { eax: signature, ecx: bits(1, 0).ecx | 1 << 27, ..bits(1, 0) },
        (0xd, 0) => [0xe7, 0xa80, 0xa80, 0].into(),
        (0xd, 2) => [256, 576, 0, 0].into(),
        (0xd, 5) => [64, 1088, 0, 0].into(),
        (0xd, 6) => [512, 1152, 2, 0].into(),
        (0xd, 7) => [1024, 1664, 2, 0].into(),
        (0x8000_0000, _) => [0x8000_0021, 0, 0, 0].into(),
        (0x8000_0008, _) => CpuidResult { eax: 0x3034, ..bits(leaf, 0) },
        _ => bits(leaf, subleaf),
    };
    Host::read(&read, OsState { avx: true, avx512: true })
}

fn amd_host() -> Host {
    host_with(*b"AuthenticAMD", 0x00a1_0f11, |_| true)
}

fn context(vcpus: u32, apic_id: u32) -> CpuidContext {
    CpuidContext { apic_id, vcpus, cr4: 0, xcr0: 1, xss: 0, tsc_hz: 2_596_124_000, apic_enabled: true }
}

fn max() -> CpuModel {
    CpuModel::parse("max").expect("max exists on every host")
}

#[test]
fn parse_empty_is_max() {
    let model = CpuModel::parse("").expect("the default");
    assert_eq!(model.spec(), "max");
    assert_eq!(model, max());
}

#[test]
fn parse_unknown_names_suggests_the_nearest() {
    let message = |spec: &str| CpuModel::parse(spec).expect_err(spec).to_string();
    assert!(message("mx").contains("did you mean `max`"), "{}", message("mx"));
    assert!(message("x86-64-v5").contains("did you mean `x86-64-v"), "{}", message("x86-64-v5"));
    assert!(message("max,+avx22").contains("did you mean `avx2`"), "{}", message("max,+avx22"));
    assert!(message("max,avx2").contains("neither +feature nor -feature"));
    assert!(message("max,+la57").contains("not implemented"));
    assert!(message("max,+ü").contains("unknown CPU feature"));
    assert!(message("max,ü").contains("neither"));
}

#[test]
fn parse_adds_and_removes_in_order_with_dependents() {
    let host = intel_host();
    let parse = |spec: &str| CpuModel::parse_for(spec, &host).expect(spec);
    let no_avx = parse("max,-avx");
    assert!(!no_avx.has(Feature::Avx2) && !no_avx.has(Feature::Avx512f) && no_avx.has(Feature::Sse42));
    let v1 = parse("x86-64-v1,+avx2");
    assert!(
        v1.has(Feature::Avx2) && v1.has(Feature::Xsave) && v1.has(Feature::Sse42) && !v1.has(Feature::Fma)
    );
    assert!(!parse("max,+avx2,-avx2").has(Feature::Avx2));
    assert!(parse("max,-sse4_2,+sse4.2").has(Feature::Sse42));
    assert!(parse("max,monitor=on").has(Feature::Monitor));
    assert!(!parse("max,hypervisor=off").has(Feature::KvmClock));
}

#[test]
fn parse_levels_announce_the_psabi_sets() {
    let host = intel_host();
    let parse = |spec: &str| CpuModel::parse_for(spec, &host).expect(spec);
    let sets = [
        ("v1", Feature::Sse2, Feature::Sse3),
        ("x86-64-v2", Feature::Sse42, Feature::Avx),
        ("v3", Feature::Movbe, Feature::Avx512f),
        ("x86-64-v4", Feature::Avx512vl, Feature::Avx512vnni),
    ];
    for (spec, last, next) in sets {
        let model = parse(spec);
        assert!(model.has(last) && !model.has(next), "{spec}");
        assert!(
            model.has(Feature::Nx) && model.has(Feature::X2apic) && model.has(Feature::KvmClock),
            "{spec}"
        );
        assert!(!model.has(Feature::Rdtscp) && !model.has(Feature::Fsgsbase), "{spec}");
    }
}

#[test]
fn parse_refuses_what_the_host_lacks() {
    let old = host_with(*b"GenuineIntel", 0x306a9, |f| !matches!(f, Feature::Avx512f | Feature::Movbe));
    let message = CpuModel::parse_for("x86-64-v4", &old).expect_err("no AVX-512").to_string();
    assert!(message.contains("avx512f") && message.contains("movbe"), "{message}");
    assert!(CpuModel::parse_for("max,+movbe", &old).is_err());
    assert!(CpuModel::parse_for("x86-64-v3,-movbe", &old).is_ok());
    let max = CpuModel::parse_for("max", &old).expect("max exists everywhere");
    assert!(!max.has(Feature::Avx512bw) && max.xcr0_mask() == 7);
    assert!(CpuModel::parse_for("max,+topoext", &old).expect_err("AMD's").to_string().contains("Amd"));
    assert!(CpuModel::parse_for("max", &intel_host()).expect("max").check_on(&old).is_err());
}

#[test]
fn max_announces_only_what_the_host_or_the_vmm_has() {
    for host in [Host::get(), &intel_host(), &amd_host()] {
        let model = CpuModel::parse_for("max", host).expect("max exists on every host");
        for feature in model.features().iter() {
            match feature.info().class {
                Class::Platform | Class::Soft => {}
                Class::Native => assert!(host.features.has(feature), "{}", feature.name()),
                Class::OptIn | Class::Never => panic!("{} announced", feature.name()),
            }
            assert!(feature.requires().iter().all(|&r| model.has(r)), "{}", feature.name());
        }
    }
}

#[test]
fn leaf_d_is_the_hosts_layout() {
    use std::arch::x86_64::__cpuid_count;
    let model = max();
    if !model.has(Feature::Xsave) {
        eprintln!("skipped: this host has no XSAVE");
        return;
    }
    let ctx = CpuidContext { xcr0: model.xcr0_mask(), ..context(1, 0) };
    for index in (2..64u32).filter(|i| model.xcr0_mask() >> i & 1 != 0) {
        let (ours, host) = (model.cpuid(0xd, index, &ctx), __cpuid_count(0xd, index));
        assert_eq!(
            [ours.eax, ours.ebx, ours.ecx & 2],
            [host.eax, host.ebx, host.ecx & 2],
            "component {index}"
        );
    }
    let all = model.cpuid(0xd, 0, &ctx);
    assert_eq!(all.ebx, all.ecx);
    assert_eq!(u64::from(all.eax) | u64::from(all.edx) << 32, model.xcr0_mask());
    assert_eq!(u64::from(all.eax) & !u64::from(__cpuid_count(0xd, 0).eax), 0);
    assert_eq!(model.cpuid(0xd, 0, &context(1, 0)).ebx, 576, "x87 alone");
    assert!(all.ecx as usize <= crate::state::FPU_BYTES);
    assert_eq!(model.cpuid(0xd, 9, &ctx), CpuidResult::default(), "PKRU is not announced");
}

#[test]
fn leaf_d_sizes_follow_xcr0() {
    let model = CpuModel::parse_for("max", &intel_host()).expect("max");
    let sizes = |xcr0| {
        let ctx = CpuidContext { xcr0, ..context(1, 0) };
        (model.cpuid(0xd, 0, &ctx).ebx, model.cpuid(0xd, 1, &ctx).ebx)
    };
    assert_eq!(sizes(3), (576, 576));
    assert_eq!(sizes(7), (832, 832));
    assert_eq!(sizes(0xe7), (2688, 576 + 256 + 64 + 512 + 1024));
    assert_eq!(
        CpuModel::parse_for("max,-xsave", &intel_host()).expect("max").cpuid(0xd, 0, &context(1, 0)).eax,
        0
    );
}

#[test]
fn leaf_b_gives_the_topology_of_each_size() {
    for (vcpus, shift) in [(1, 0), (3, 2), (16, 4)] {
        for apic_id in [0, vcpus - 1] {
            let ctx = context(vcpus, apic_id);
            for host in [intel_host(), amd_host()] {
                let model = CpuModel::parse_for("max", &host).expect("max");
                assert_eq!(model.cpuid(0xb, 0, &ctx).words(), [0, 1, 0x100, apic_id]);
                assert_eq!(model.cpuid(0xb, 1, &ctx).words(), [shift, vcpus, 0x201, apic_id]);
                assert_eq!(model.cpuid(0xb, 2, &ctx).words(), [0, 0, 2, apic_id]);
                let leaf_1 = model.cpuid(1, 0, &ctx);
                assert_eq!(leaf_1.ebx >> 24, apic_id);
                assert_eq!(leaf_1.ebx >> 16 & 0xff, vcpus);
                assert_eq!(leaf_1.edx >> 28 & 1 != 0, vcpus > 1, "HTT");
            }
            let amd = CpuModel::parse_for("max", &amd_host()).expect("max");
            assert_eq!(amd.cpuid(0x8000_0008, 0, &ctx).ecx, shift << 12 | (vcpus - 1));
            assert_eq!(amd.cpuid(0x8000_001e, 0, &ctx).words(), [apic_id, apic_id, 0, 0]);
            assert_eq!(amd.cpuid(0x8000_001d, 3, &ctx).eax >> 14, vcpus - 1, "L3 shared by all");
            assert_eq!(amd.cpuid(0x8000_001d, 2, &ctx).eax >> 14, 0, "L2 of one core");
            let intel = CpuModel::parse_for("max", &intel_host()).expect("max");
            assert_eq!(intel.cpuid(4, 3, &ctx).eax >> 14, ((1 << shift) - 1) << 12 | ((1 << shift) - 1));
        }
    }
}

#[test]
fn leaf_1_mirrors_cr4_and_apic_base() {
    let model = CpuModel::parse_for("max", &amd_host()).expect("max");
    let ctx = context(2, 1);
    assert_eq!(model.cpuid(1, 0, &ctx).ecx >> 27 & 1, 0);
    assert_eq!(model.cpuid(1, 0, &CpuidContext { cr4: cr4::OSXSAVE, ..ctx }).ecx >> 27 & 1, 1);
    let hidden = CpuidContext { apic_enabled: false, ..ctx };
    for leaf in [1, 0x8000_0001] {
        assert_eq!(model.cpuid(leaf, 0, &ctx).edx >> 9 & 1, 1);
        assert_eq!(model.cpuid(leaf, 0, &hidden).edx >> 9 & 1, 0);
    }
}

#[test]
fn leaves_beyond_the_last_follow_the_vendor() {
    let ctx = context(4, 2);
    let amd = CpuModel::parse_for("max", &amd_host()).expect("max");
    let intel = CpuModel::parse_for("max", &intel_host()).expect("max");
    for leaf in [0x20, 0x1234, 0x2000_0000, 0x8000_0100, 0xc000_0000, u32::MAX] {
        assert_eq!(amd.cpuid(leaf, 1, &ctx), CpuidResult::default());
        assert_eq!(intel.cpuid(leaf, 1, &ctx), intel.cpuid(0x1f, 1, &ctx));
    }
}

#[test]
fn hypervisor_leaf_is_kvms_and_can_be_hidden() {
    let ctx = context(1, 0);
    let base = max().cpuid(0x4000_0000, 0, &ctx);
    assert_eq!(base.words(), [0x4000_0010, 0x4b4d_564b, 0x564b_4d56, 0x4d]);
    assert_eq!(max().cpuid(0x4000_0001, 0, &ctx).words(), [1 << 24 | 1 << 3 | 1 << 1, 0, 0, 0]);
    assert_eq!(max().cpuid(0x4000_0010, 0, &ctx).words(), [2_596_124, 1_000_000, 0, 0]);
    let hidden = CpuModel::parse_for("max,-hypervisor", &amd_host()).expect("max");
    assert_eq!(hidden.cpuid(0x4000_0000, 0, &ctx), CpuidResult::default());
    assert_eq!(hidden.cpuid(1, 0, &ctx).ecx >> 31, 0);
}

#[test]
fn leaf_15_gives_the_tsc_within_2_ppm() {
    let intel = CpuModel::parse_for("max", &intel_host()).expect("max");
    for tsc_hz in [1_000_000_000u64, 1_999_999_999, 2_596_124_000, 2_599_998_000, 3_700_000_001, 800_000_123]
    {
        let r = intel.cpuid(0x15, 0, &CpuidContext { tsc_hz, ..context(1, 0) });
        let product = u64::from(r.ecx / 1000) * u64::from(r.ebx);
        assert!(product <= u64::from(u32::MAX), "Linux multiplies in 32 bits");
        let error = (u64::from(r.ecx) * u64::from(r.ebx) / u64::from(r.eax)).abs_diff(tsc_hz);
        assert!(error * 500_000 <= tsc_hz, "{tsc_hz}: off by {error}");
    }
}

#[test]
fn masks_follow_features() {
    let amd = CpuModel::parse_for("max", &amd_host()).expect("max");
    assert_eq!(amd.efer_mask(), efer::SCE | efer::LME | efer::LMA | efer::NXE | EFER_AIBRSE);
    assert_eq!(amd.cr4_mask() & (cr4::LA57 | cr4::VMXE | cr4::PKE), 0);
    assert_ne!(amd.cr4_mask() & cr4::SMEP, 0);
    assert_eq!((amd.spec_ctrl_mask(), amd.pred_cmd_mask(), amd.arch_capabilities()), (0, 0, None));
    assert_eq!(amd.xcr0_mask(), 0xe7);
    let without =
        CpuModel::parse_for("max,-nx,-smep,-avx512f,-auto-ibrs,+ibpb,+ibrs", &amd_host()).expect("max");
    assert_eq!(without.efer_mask(), efer::SCE | efer::LME | efer::LMA);
    assert_eq!(without.cr4_mask() & cr4::SMEP, 0);
    assert_eq!((without.xcr0_mask(), without.spec_ctrl_mask(), without.pred_cmd_mask()), (7, 1, 1));
    let intel = CpuModel::parse_for("max", &intel_host()).expect("max");
    assert_eq!(intel.efer_mask() & EFER_AIBRSE, 0);
    assert_eq!((intel.spec_ctrl_mask(), intel.pred_cmd_mask()), (1, 1));
    assert!(intel.arch_capabilities().is_some_and(|v| v & 3 == 3));
}

#[test]
fn brand_names_the_model_or_the_host() {
    let text = |model: &CpuModel| {
        let words = (0x8000_0002..=0x8000_0004).flat_map(|l| model.cpuid(l, 0, &context(1, 0)).words());
        let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).take_while(|&b| b != 0).collect();
        String::from_utf8(bytes).expect("ASCII")
    };
    assert_eq!(text(&max()), "Trellis Virtual CPU (max)");
    assert_eq!(text(&CpuModel::parse("host").expect("host")), Host::get().identity.brand);
}

#[test]
fn model_survives_serialisation() {
    let model = CpuModel::parse("max,+monitor").expect("model");
    let text = serde_json::to_string(&model).expect("serialises");
    let back: CpuModel = serde_json::from_str(&text).expect("deserialises");
    assert_eq!(back, model);
    back.check_host().expect("it is the same host");
    assert!(serde_json::from_str::<CpuModel>(&text.replace("\"monitor\"", "\"vmx\"")).is_err());
}

#[test]
fn leaves_that_ignore_the_subleaf_do() {
    let models = [
        max(),
        CpuModel::parse_for("max", &intel_host()).expect("max"),
        CpuModel::parse_for("max,-hypervisor", &amd_host()).expect("amd"),
        CpuModel::parse_for("x86-64-v1,-lm", &amd_host()).expect("v1"),
    ];
    let leaves = (0..0x40).chain(0x4000_0000..0x4000_0020).chain(0x8000_0000..0x8000_0040);
    let known: Vec<u32> = leaves.filter(|&leaf| super::ignores_subleaf(leaf)).collect();
    assert_eq!(known.len(), 15);
    for (model, leaf) in models.iter().flat_map(|m| known.iter().map(move |l| (m, *l))) {
        let first = model.cpuid(leaf, 0, &context(2, 1));
        for subleaf in [1, 2, 3, 64, 0xffff_0000, u32::MAX] {
            assert_eq!(model.cpuid(leaf, subleaf, &context(2, 1)), first, "{leaf:#x}");
        }
    }
}

#[test]
fn cpuid_never_panics() {
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut broken = CpuModel::parse_for("max", &intel_host()).expect("max");
    broken.identity.brand = "x".repeat(1000);
    broken.identity.phys_bits = 255;
    broken.identity.xsave =
        vec![XsaveComponent { index: 200, size: u32::MAX, offset: u32::MAX, align64: true }; 5];
    let models = [
        max(),
        CpuModel::parse_for("max", &intel_host()).expect("max"),
        CpuModel::parse_for("x86-64-v1,-lm", &amd_host()).expect("v1"),
        broken,
    ];
    let low = |v: u64| u32::try_from(v & 0xffff_ffff).expect("32 bits");
    for model in &models {
        for base in [0u32, 0x4000_0000, 0x8000_0000, 0xc000_0000] {
            for leaf in base..base + 0x30 {
                for subleaf in [0, 1, 2, 7, 63, 64, u32::MAX, low(next())] {
                    let ctx = CpuidContext {
                        apic_id: low(next()),
                        vcpus: low(next()) >> (next() & 31),
                        cr4: next(),
                        xcr0: next(),
                        xss: next(),
                        tsc_hz: next() >> (next() & 63),
                        apic_enabled: next() & 1 != 0,
                    };
                    let _ = model.cpuid(leaf, subleaf, &ctx);
                    let _ = model.cpuid(low(next()), subleaf, &ctx);
                }
            }
        }
        assert!(!model.summary().is_empty());
    }
    assert!(CpuModel::help().len() > 8);
}
