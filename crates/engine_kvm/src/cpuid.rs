//! CPUID under KVM: the instruction is executed inside the kernel, from a table that is made here of our model.
//!
//! Instructions run on the host's processor (or in KVM's emulator), so the model is cut down to what KVM supports. What the guest is told of
//! speculation is the host's: our models announce a processor that is not affected, which holds for translated code only.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use x86::cpuid::{CpuModel, CpuidContext, CpuidResult, Feature, Info};

use crate::error::KvmError;
use crate::{trial, vm};

/// Features that are ours, whatever KVM says: interrupt controllers, counts of processors, registers that KVM leaves to us.
const OURS: &[Feature] = &[
    Feature::Apic,
    Feature::X2apic,
    Feature::TscDeadline,
    Feature::TscAdjust,
    Feature::Mtrr,
    Feature::Mce,
    Feature::Mca,
    Feature::Ht,
    Feature::CmpLegacy,
    Feature::Topoext,
    Feature::Hypervisor,
];

/// Features that are not announced under KVM: what they promise is of our models' processors, or KVM does not do it as we do.
const NEVER: &[Feature] = &[Feature::ArchCapabilities, Feature::Monitor];

const KVM_LEAVES: std::ops::Range<u32> = 0x4000_0000..0x4001_0000;

/// Leaves with feature bits.
const FEATURE_LEAVES: &[(u32, u32)] = &[
    (1, 0),
    (6, 0),
    (7, 0),
    (7, 1),
    (0xd, 1),
    (0x8000_0001, 0),
    (0x8000_0007, 0),
    (0x8000_0008, 0),
    (0x8000_0021, 0),
];

/// Cuts the model down to what this host's KVM supports. What it shows to guests whether we want it or not stays (`trial`): a guest will use it.
///
/// # Errors
/// When there is no KVM, or it lacks what the user asked for by name.
pub fn limit(model: &mut CpuModel) -> Result<(), KvmError> {
    let kvm = vm::open()?;
    let table = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::refused("its list of CPU features"))?;
    let shown = trial::shown_cpuid(&kvm, FEATURE_LEAVES)?;
    let both = |leaf, subleaf| {
        let mut words = supported(&table, leaf, subleaf).words();
        if let Some(at) = FEATURE_LEAVES.iter().position(|l| *l == (leaf, subleaf)) {
            words.iter_mut().zip(shown[at].words()).for_each(|(word, shown)| *word |= shown);
        }
        words.into()
    };
    limit_to(model, &both)
}

/// As [`limit`], to what `kvm` says of each leaf and subleaf.
///
/// # Errors
/// When it lacks what the user asked for by name.
pub fn limit_to(model: &mut CpuModel, kvm: &dyn Fn(u32, u32) -> CpuidResult) -> Result<(), KvmError> {
    let lacks = |info: &Info| {
        let ours = OURS.contains(&info.feature) || KVM_LEAVES.contains(&info.leaf);
        let there = kvm(info.leaf, info.subleaf).register(info.register) >> info.bit & 1 != 0;
        NEVER.contains(&info.feature) || !ours && !there
    };
    let gone = model.take_away(lacks);
    let missed: Vec<&str> = gone.iter().filter(|f| model.insists_on(**f)).map(|f| f.name()).collect();
    if missed.is_empty() { Ok(()) } else { Err(KvmError::Features(missed.join(", "))) }
}

fn supported(table: &CpuId, leaf: u32, subleaf: u32) -> CpuidResult {
    let of = |e: &&kvm_cpuid_entry2| {
        e.function == leaf && (e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0 || e.index == subleaf)
    };
    table
        .as_slice()
        .iter()
        .find(of)
        .map_or_else(CpuidResult::default, |e| [e.eax, e.ebx, e.ecx, e.edx].into())
}

/// Leaves whose subleaves differ, and how many subleaves are looked at.
const WITH_SUBLEAVES: &[(u32, u32)] = &[(4, 8), (7, 2), (0xb, 2), (0xd, 64), (0x1f, 2), (0x8000_001d, 8)];

/// The table for `KVM_SET_CPUID2`. KVM itself mirrors OSXSAVE, the local APIC's enable bit and the sizes of leaf 0DH.
#[must_use]
pub fn entries(model: &CpuModel, index: usize, vcpus: usize, tsc_hz: u64) -> Vec<kvm_cpuid_entry2> {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let ctx = CpuidContext {
        apic_id: number(index),
        vcpus: number(vcpus),
        xcr0: 1,
        tsc_hz,
        apic_enabled: true,
        ..CpuidContext::default()
    };
    let read = |leaf, subleaf| model.cpuid(leaf, subleaf, &ctx);
    let mut entries = Vec::new();
    for first in [0, KVM_LEAVES.start, 0x8000_0000u32] {
        let last = read(first, 0).eax;
        if first != 0 && last < first {
            continue;
        }
        for leaf in first..=last.min(first + 0xff) {
            match WITH_SUBLEAVES.iter().find(|w| w.0 == leaf) {
                None => entries.push(entry(leaf, 0, 0, read(leaf, 0))),
                Some(&(_, count)) => {
                    let all = (0..count).map(|subleaf| (subleaf, read(leaf, subleaf)));
                    let used = all.filter(|&(subleaf, r)| subleaf == 0 || r != CpuidResult::default());
                    entries.extend(
                        used.map(|(subleaf, r)| entry(leaf, subleaf, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, r)),
                    );
                }
            }
        }
    }
    // What is absent reads as zero; the first leaf of each range says how far it goes.
    entries.retain(|e| e.function & 0xffff == 0 || [e.eax, e.ebx, e.ecx, e.edx] != [0; 4]);
    entries
}

fn entry(function: u32, index: u32, flags: u32, r: CpuidResult) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 {
        function,
        index,
        flags,
        eax: r.eax,
        ebx: r.ebx,
        ecx: r.ecx,
        edx: r.edx,
        padding: [0; 3],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(entries: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
        let e = entries.iter().find(|e| e.function == leaf && e.index == subleaf)?;
        Some([e.eax, e.ebx, e.ecx, e.edx])
    }

    #[test]
    fn table_says_what_the_model_says() {
        let model = CpuModel::parse("max").unwrap();
        let table = entries(&model, 3, 4, 2_600_000_000);
        assert!(table.len() <= KVM_MAX_CPUID_ENTRIES);
        let ctx = CpuidContext {
            apic_id: 3,
            vcpus: 4,
            xcr0: 1,
            tsc_hz: 2_600_000_000,
            apic_enabled: true,
            ..CpuidContext::default()
        };
        for (leaf, subleaf) in [
            (0, 0),
            (1, 0),
            (7, 0),
            (0xd, 0),
            (0xd, 1),
            (0x4000_0000, 0),
            (0x4000_0001, 0),
            (0x8000_0001, 0),
            (0x8000_0008, 0),
        ] {
            assert_eq!(
                of(&table, leaf, subleaf),
                Some(model.cpuid(leaf, subleaf, &ctx).words()),
                "{leaf:#x}.{subleaf}"
            );
        }
        assert_eq!(of(&table, 1, 0).unwrap()[1] >> 24, 3, "the APIC ID");
        let indexed = |e: &&kvm_cpuid_entry2| e.function == 0xd;
        assert!(table.iter().filter(indexed).all(|e| e.flags == KVM_CPUID_FLAG_SIGNIFCANT_INDEX));
    }

    #[test]
    fn model_is_cut_down_to_what_kvm_supports_but_for_what_is_ours() {
        let mut model = CpuModel::parse("max").unwrap();
        // A KVM with SSE2 and little else.
        let kvm = |leaf, _| match leaf {
            1 => CpuidResult { edx: 0x078b_fbff, ecx: 1 << 13, ..CpuidResult::default() },
            0x8000_0001 => CpuidResult { edx: 0x2000_0800, ..CpuidResult::default() },
            _ => CpuidResult::default(),
        };
        limit_to(&mut model, &kvm).unwrap();
        for kept in
            [Feature::Sse2, Feature::Cx16, Feature::Lm, Feature::X2apic, Feature::Hypervisor, Feature::Apic]
        {
            assert!(model.has(kept), "{}", kept.name());
        }
        for gone in [
            Feature::Sse3,
            Feature::Avx2,
            Feature::Fsgsbase,
            Feature::Smep,
            Feature::AutoIbrs,
            Feature::Rdtscp,
        ] {
            assert!(!model.has(gone), "{}", gone.name());
        }
        assert_eq!(model.xcr0_mask(), 0);
    }

    #[test]
    fn what_was_asked_for_by_name_is_missed() {
        let nothing = |_, _| CpuidResult::default();
        let refused =
            |spec: &str| limit_to(&mut CpuModel::parse(spec).unwrap(), &nothing).map_err(|e| e.to_string());
        assert!(refused("x86-64-v2").unwrap_err().contains("popcnt"));
        assert!(refused("max,+cx16").is_err() && refused("max").is_ok());
    }
}
