//! A VM of KVM: its descriptor, and guest memory as memory slots.
//!
//! Slots are as large as the RAM ranges of the machine, and fixed: a machine page that changes behind a guest page (sharing, swapping) would
//! have to be taken out of its slot first, for which there is no holder yet.

#![expect(unsafe_code, reason = "tells the kernel where guest memory is")]

use std::io;
use std::sync::Arc;

use guestmem::{Gpa, GuestMemory};
use kvm_bindings::{
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_SREGS2, KVM_CAP_X86_MSR_FILTER, KVM_CAP_X86_USER_SPACE_MSR,
    KVM_MSR_EXIT_REASON_VALID_MASK, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, MsrFilterDefaultAction, VmFd};

use crate::error::KvmError;
use crate::{msr, trial};

/// What we cannot do without, by its number and in words.
const NEEDED: &[(u32, &str)] = &[
    (Cap::UserMemory as u32, "KVM_CAP_USER_MEMORY"),
    (Cap::ImmediateExit as u32, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::VcpuEvents as u32, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs as u32, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave as u32, "KVM_CAP_XSAVE"),
    (Cap::Xcrs as u32, "KVM_CAP_XCRS"),
    (KVM_CAP_X86_USER_SPACE_MSR, "KVM_CAP_X86_USER_SPACE_MSR"),
    (KVM_CAP_X86_MSR_FILTER, "KVM_CAP_X86_MSR_FILTER"),
    (KVM_CAP_SREGS2, "KVM_CAP_SREGS2"),
];

/// Three pages that Intel's processors without unrestricted guests need for real mode (`KVM_SET_TSS_ADDR`); below the BIOS, where no
/// device of ours is.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// Opens `/dev/kvm`.
///
/// # Errors
/// With what to do about it.
pub fn open() -> Result<Kvm, KvmError> {
    Kvm::new().map_err(|error| {
        let why = io::Error::from_raw_os_error(error.errno());
        let advice = match error.errno() {
            libc::ENOENT => "this host has no KVM (no module, or a container without the device); use --engine bt",
            libc::EACCES | libc::EPERM => "add yourself to its group (`ls -l /dev/kvm` shows it, usually kvm) and log in anew, or use --engine bt",
            libc::ENODEV | libc::ENXIO => "no module stands behind it (load kvm_intel or kvm_amd); use --engine bt",
            _ => "use --engine bt",
        };
        KvmError::Open { why, advice }
    })
}

/// A VM. The memory lives as long as it does.
pub struct KvmVm {
    pub(crate) fd: VmFd,
    /// The guest's time-stamp counter can differ from the host's.
    pub(crate) has_tsc_offset: bool,
    mem: Arc<GuestMemory>,
}

impl KvmVm {
    /// A VM with this memory and no vCPUs.
    ///
    /// # Errors
    /// When KVM is not there, is too old, or refuses.
    pub fn new(mem: Arc<GuestMemory>) -> Result<Arc<Self>, KvmError> {
        let kvm = open()?;
        for &(capability, name) in NEEDED {
            if kvm.check_extension_raw(capability.into()) <= 0 {
                return Err(KvmError::Lacks(name));
            }
        }
        let fd = kvm.create_vm().map_err(KvmError::refused("a new VM"))?;
        // Only Intel's needs it; others may refuse.
        if let Err(error) = fd.set_tss_address(TSS_ADDRESS) {
            tracing::debug!("KVM_SET_TSS_ADDR: {error}");
        }
        let mut exits = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..kvm_enable_cap::default() };
        exits.args[0] = u64::from(KVM_MSR_EXIT_REASON_VALID_MASK);
        fd.enable_cap(&exits).map_err(KvmError::refused("exits for model-specific registers"))?;
        // Without it KVM turns what it cannot emulate above level 0 into #UD.
        let mut failures =
            kvm_enable_cap { cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE, ..kvm_enable_cap::default() };
        failures.args[0] = 1;
        if let Err(error) = fd.enable_cap(&failures) {
            tracing::debug!("KVM_CAP_EXIT_ON_EMULATION_FAILURE: {error}");
        }
        fd.set_msr_filter(MsrFilterDefaultAction::DENY, &msr::filter())
            .map_err(KvmError::refused("a filter of model-specific registers"))?;
        let vm = Self { fd, has_tsc_offset: trial::has_tsc_offset(&kvm)?, mem };
        vm.give_memory()?;
        Ok(Arc::new(vm))
    }

    fn give_memory(&self) -> Result<(), KvmError> {
        for (slot, range) in (0u32..).zip(self.mem.ram()) {
            let Some(hva) = self.mem.hva(Gpa(range.start)) else { continue };
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: range.start,
                memory_size: range.end - range.start,
                userspace_addr: self.mem.host_base() as u64 + hva.0,
            };
            // SAFETY: RAM ranges are contiguous in machine memory as it was made (their pages have not been moved: nothing does), which stays mapped as
            // long as `self.mem` lives (INV-GM-1); nobody has references into it.
            unsafe { self.fd.set_user_memory_region(region) }.map_err(KvmError::refused("guest memory"))?;
        }
        Ok(())
    }
}
