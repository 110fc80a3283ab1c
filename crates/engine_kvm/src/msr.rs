//! Which model-specific registers KVM holds. All others it is told to refuse (`KVM_X86_SET_MSR_FILTER` with a default of "deny"), and it asks
//! us instead (`KVM_CAP_X86_USER_SPACE_MSR`): their meaning is `x86_interp::system::msr`'s, for every engine.
//!
//! KVM holds those that the processor uses by itself: system calls, page attributes, speculation control.

use kvm_ioctls::{MsrFilterRange, MsrFilterRangeFlags};
use x86::bits::msr;
use x86::cpuid::{CpuModel, Feature};
use x86::state::Msrs;

/// First register and count of each range that KVM handles.
pub const HELD: &[(u32, u32)] = &[
    (msr::SPEC_CTRL, 2),
    (msr::SYSENTER_CS, 3),
    (msr::PAT, 1),
    (msr::XSS, 1),
    (msr::EFER, 5),
    (msr::FS_BASE, 4),
];

/// Whether KVM handles the register.
#[must_use]
pub fn is_held(index: u32) -> bool {
    HELD.iter().any(|&(first, count)| index.wrapping_sub(first) < count)
}

/// A bitmap with a one for each register of the longest range.
const ALLOWED: [u8; 1] = [0xff];

/// The filter's ranges: what KVM may handle.
#[must_use]
pub fn filter() -> Vec<MsrFilterRange<'static>> {
    let flags = MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE;
    HELD.iter()
        .map(|&(base, msr_count)| MsrFilterRange { flags, base, msr_count, bitmap: &ALLOWED })
        .collect()
}

/// A register of KVM's that is part of the state: where it stands in [`Msrs`].
pub struct Slot {
    /// Its number.
    pub index: u32,
    /// Its place.
    pub place: fn(&mut Msrs) -> &mut u64,
}

/// Registers that every model has. EFER and the bases of FS and GS go with the segments.
const ALWAYS: &[Slot] = &[
    Slot { index: msr::SYSENTER_CS, place: |m| &mut m.sysenter_cs },
    Slot { index: msr::SYSENTER_ESP, place: |m| &mut m.sysenter_esp },
    Slot { index: msr::SYSENTER_EIP, place: |m| &mut m.sysenter_eip },
    Slot { index: msr::PAT, place: |m| &mut m.pat },
    Slot { index: msr::STAR, place: |m| &mut m.star },
    Slot { index: msr::LSTAR, place: |m| &mut m.lstar },
    Slot { index: msr::CSTAR, place: |m| &mut m.cstar },
    Slot { index: msr::SFMASK, place: |m| &mut m.sfmask },
    Slot { index: msr::KERNEL_GS_BASE, place: |m| &mut m.kernel_gs_base },
];
const TSC_AUX: Slot = Slot { index: msr::TSC_AUX, place: |m| &mut m.tsc_aux };
const SPEC_CTRL: Slot = Slot { index: msr::SPEC_CTRL, place: |m| &mut m.spec_ctrl };
const XSS: Slot = Slot { index: msr::XSS, place: |m| &mut m.xss };

/// The registers of KVM's that are part of a vCPU's state, with this model.
#[must_use]
pub fn slots(model: &CpuModel) -> Vec<&'static Slot> {
    let mut slots: Vec<_> = ALWAYS.iter().collect();
    slots.extend(model.has(Feature::Rdtscp).then_some(&TSC_AUX));
    slots.extend((model.spec_ctrl_mask() != 0).then_some(&SPEC_CTRL));
    slots.extend((model.xss_mask() != 0).then_some(&XSS));
    slots
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_is_held_and_has_its_own_place() {
        let mut msrs = Msrs::default();
        for slot in ALWAYS.iter().chain([&TSC_AUX, &SPEC_CTRL, &XSS]) {
            assert!(is_held(slot.index), "{:#x}", slot.index);
            assert_eq!(
                std::mem::replace((slot.place)(&mut msrs), u64::from(slot.index)) & 0xffff,
                match slot.index {
                    msr::PAT => (slot.place)(&mut Msrs::default()).to_owned() & 0xffff,
                    _ => 0,
                }
            );
        }
        let placed = ALWAYS.iter().all(|slot| *(slot.place)(&mut msrs) == u64::from(slot.index));
        assert!(placed, "no two share a place");
    }

    #[test]
    fn time_apic_and_paravirtual_clock_are_ours() {
        for index in [
            msr::TSC,
            msr::TSC_ADJUST,
            msr::TSC_DEADLINE,
            msr::APIC_BASE,
            0x808,
            msr::KVM_SYSTEM_TIME_NEW,
            0x12,
        ] {
            assert!(!is_held(index), "{index:#x}");
        }
    }

    #[test]
    fn bitmap_covers_the_longest_range() {
        assert!(HELD.iter().all(|&(_, count)| count.div_ceil(8) as usize <= ALLOWED.len()));
        assert_eq!(filter().len(), HELD.len());
    }
}
