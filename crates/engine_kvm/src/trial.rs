//! Two or three instructions in a VM of their own, to find out what a KVM does rather than what it says.
//!
//! With hardware virtualization a guest's time-stamp counter has an offset (SDM 3C 25.6.5, APM 2 15.30.5), and CPUID returns what KVM was told. A KVM
//! without may take the offset and let the guest read the host's counter all the same, and may show the host's features whatever its table says,
//! since user code, which runs natively, would see them anyway.

#![expect(unsafe_code, reason = "tells the kernel where a page is")]

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2, kvm_regs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use x86::CpuState;
use x86::cpuid::CpuidResult;
use x86_interp::host_tsc::rdtsc;

use crate::error::KvmError;
use crate::transfer::refused;
use crate::{raw, registers};

/// RDTSC; HLT.
const READ_COUNTER: [u8; 3] = [0x0f, 0x31, 0xf4];
/// CPUID; HLT.
const READ_CPUID: [u8; 3] = [0x0f, 0xa2, 0xf4];
const CODE_AT: u64 = 0x1000;
/// Far from anything that a host counts in its life.
const OFFSET: u64 = 1 << 62;

#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// A VM with one page of code, in real mode.
struct Trial {
    vcpu: VcpuFd,
    _vm: VmFd,
    /// Dropped after the VM.
    _page: Box<Page>,
}

impl Trial {
    fn new(kvm: &Kvm, code: [u8; 3]) -> Result<Self, KvmError> {
        let mut page = Box::new(Page([0; 4096]));
        page.0[..code.len()].copy_from_slice(&code);
        let vm = kvm.create_vm().map_err(KvmError::refused("a new VM"))?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: CODE_AT,
            memory_size: 4096,
            userspace_addr: (&raw mut *page) as u64,
        };
        // SAFETY: a page of ours, to which nobody else has a reference and which outlives the VM.
        unsafe { vm.set_user_memory_region(region) }.map_err(KvmError::refused("guest memory"))?;
        let vcpu = vm.create_vcpu(0).map_err(KvmError::refused("a new vCPU"))?;
        Ok(Self { vcpu, _vm: vm, _page: page })
    }

    /// Runs the code with EAX and ECX; the registers at its HLT. None where KVM does not want to: what is wrong comes out when the guest runs.
    fn run(&self, eax: u32, ecx: u32) -> Result<Option<kvm_regs>, KvmError> {
        let mut state = CpuState::reset();
        state.sipi(u8::try_from(CODE_AT >> 12).unwrap_or(0));
        (state.gpr[0], state.gpr[1]) = (u64::from(eax), u64::from(ecx));
        raw::set_system_registers(&self.vcpu, &registers::system(&state, 0, 0xfee0_0900))
            .map_err(refused("the segments"))?;
        self.vcpu
            .set_regs(&registers::general(&state))
            .map_err(KvmError::refused("the general registers"))?;
        if raw::run(&self.vcpu).is_err() {
            return Ok(None);
        }
        self.vcpu.get_regs().map(Some).map_err(KvmError::refused("the general registers"))
    }
}

/// Whether a guest's time-stamp counter can differ from the host's.
pub fn has_tsc_offset(kvm: &Kvm) -> Result<bool, KvmError> {
    let trial = Trial::new(kvm, READ_COUNTER)?;
    if raw::set_tsc_offset(&trial.vcpu, OFFSET).is_err() {
        // KVM before 5.16; all of those had hardware.
        return Ok(true);
    }
    let before = rdtsc();
    let regs = trial.run(0, 0)?;
    Ok(!regs.is_some_and(|regs| is_hosts(regs.rdx << 32 | regs.rax & 0xffff_ffff, before, rdtsc())))
}

/// Whether a counter read between two readings of the host's is the host's.
const fn is_hosts(guest: u64, before: u64, after: u64) -> bool {
    before <= guest && guest <= after
}

/// What CPUID shows of `leaves` (leaf, subleaf) when the table says nothing but zeros.
pub fn shown_cpuid(kvm: &Kvm, leaves: &[(u32, u32)]) -> Result<Vec<CpuidResult>, KvmError> {
    let trial = Trial::new(kvm, READ_CPUID)?;
    let entry = |function, index, eax| {
        let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        kvm_cpuid_entry2 { function, index, flags, eax, ..kvm_cpuid_entry2::default() }
    };
    let mut table = vec![entry(0, 0, 0x1f), entry(0x8000_0000, 0, 0x8000_0021)];
    table.extend(leaves.iter().map(|&(leaf, subleaf)| entry(leaf, subleaf, 0)));
    let table = CpuId::from_entries(&table).map_err(|_| KvmError::Lacks("room for the CPUID table"))?;
    trial.vcpu.set_cpuid2(&table).map_err(KvmError::refused("a CPUID table"))?;
    let low = |word: u64| u32::try_from(word & 0xffff_ffff).unwrap_or(0);
    let of = |regs: kvm_regs| CpuidResult::from([regs.rax, regs.rbx, regs.rcx, regs.rdx].map(low));
    leaves
        .iter()
        .map(|&(leaf, subleaf)| Ok(trial.run(leaf, subleaf)?.map_or_else(CpuidResult::default, of)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offset_tells_the_guests_counter_from_the_hosts() {
        assert!(is_hosts(1000, 900, 1100));
        assert!(!is_hosts(OFFSET + 1000, 900, 1100) && !is_hosts(0, 900, 1100));
    }

    #[test]
    fn trial_on_this_host_runs_to_its_end() {
        let Ok(kvm) = crate::vm::open() else {
            println!("SKIP: /dev/kvm does not open here");
            return;
        };
        let regs = Trial::new(&kvm, READ_COUNTER).unwrap().run(7, 0).unwrap().unwrap();
        assert_eq!(regs.rip, u64::try_from(READ_COUNTER.len()).unwrap(), "behind HLT, from CS's base");
        assert_eq!(shown_cpuid(&kvm, &[(1, 0), (7, 0)]).unwrap().len(), 2);
    }
}
