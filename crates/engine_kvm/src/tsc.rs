//! Whether a guest's time-stamp counter can differ from the host's. Every processor with hardware virtualization has an offset for it (SDM 3C 25.6.5,
//! APM 2 15.30.5); a KVM without may take the offset and let the guest read the host's counter all the same. So it is tried.

#![expect(unsafe_code, reason = "tells the kernel where a page is")]

use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::Kvm;
use x86::CpuState;
use x86_interp::host_tsc::rdtsc;

use crate::error::KvmError;
use crate::transfer::refused;
use crate::{raw, registers};

/// RDTSC; HLT.
const CODE: [u8; 3] = [0x0f, 0x31, 0xf4];
const CODE_AT: u64 = 0x1000;
/// Far from anything that a host counts in its life.
const OFFSET: u64 = 1 << 62;

#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// Runs two instructions in a VM of their own. True where KVM does not want to run them: what comes then is told when the guest runs.
pub fn has_offset(kvm: &Kvm) -> Result<bool, KvmError> {
    let mut page = Box::new(Page([0; 4096]));
    page.0[..CODE.len()].copy_from_slice(&CODE);
    let vm = kvm.create_vm().map_err(KvmError::refused("a new VM"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: CODE_AT,
        memory_size: 4096,
        userspace_addr: (&raw mut *page) as u64,
    };
    // SAFETY: a page of ours, which nobody else has and which outlives the VM (it is dropped after `vm` and `vcpu`).
    unsafe { vm.set_user_memory_region(region) }.map_err(KvmError::refused("guest memory"))?;
    let vcpu = vm.create_vcpu(0).map_err(KvmError::refused("a new vCPU"))?;
    let mut state = CpuState::reset();
    state.sipi(u8::try_from(CODE_AT >> 12).unwrap_or(0));
    raw::set_system_registers(&vcpu, &registers::system(&state, 0, 0xfee0_0900)).map_err(refused("the segments"))?;
    vcpu.set_regs(&registers::general(&state)).map_err(KvmError::refused("the general registers"))?;
    if raw::set_tsc_offset(&vcpu, OFFSET).is_err() {
        // KVM before 5.16; all of those had hardware.
        return Ok(true);
    }
    let before = rdtsc();
    if raw::run(&vcpu).is_err() {
        return Ok(true);
    }
    let regs = vcpu.get_regs().map_err(KvmError::refused("the general registers"))?;
    Ok(!is_hosts(counter(&regs), before, rdtsc()))
}

const fn counter(regs: &kvm_regs) -> u64 {
    regs.rdx << 32 | regs.rax & 0xffff_ffff
}

/// Whether a counter read between two readings of the host's is the host's.
const fn is_hosts(guest: u64, before: u64, after: u64) -> bool {
    before <= guest && guest <= after
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offset_tells_the_guests_counter_from_the_hosts() {
        assert!(is_hosts(1000, 900, 1100));
        assert!(!is_hosts(OFFSET + 1000, 900, 1100) && !is_hosts(0, 900, 1100));
    }
}
