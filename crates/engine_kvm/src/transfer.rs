//! Moves a vCPU's state to KVM and back: the requests around the conversions of [`crate::registers`].

#![expect(unsafe_code, reason = "KVM_SET_XSAVE reads as much as KVM says")]

use std::io;

use kvm_bindings::{Msrs, kvm_msr_entry, kvm_vcpu_events, kvm_xcrs};
use kvm_ioctls::VcpuFd;
use x86::CpuState;
use x86::cpuid::CpuModel;
use x86::state::Msrs as OurMsrs;

use crate::error::KvmError;
use crate::msr::Slot;
use crate::{msr, raw, registers};

/// What of a state depends on the model.
pub struct Layout {
    slots: Vec<&'static Slot>,
    /// Bits of XCR0 that may be set; 0 without XSAVE.
    xcr0_mask: u64,
}

/// What belongs to a state but is the machine's.
#[derive(Clone, Copy)]
pub struct Apic {
    pub base: u64,
    pub cr8: u64,
}

impl Layout {
    pub fn of(model: &CpuModel) -> Self {
        Self { slots: msr::slots(model), xcr0_mask: model.xcr0_mask() }
    }

    fn msrs(&self, state: &OurMsrs) -> Result<Msrs, KvmError> {
        let mut copy = state.clone();
        let entry = |slot: &&Slot| kvm_msr_entry {
            index: slot.index,
            data: *(slot.place)(&mut copy),
            ..kvm_msr_entry::default()
        };
        let entries: Vec<kvm_msr_entry> = self.slots.iter().map(entry).collect();
        Msrs::from_entries(&entries).map_err(|_| KvmError::Lacks("room for a list of MSRs"))
    }

    /// Gives KVM everything that it holds of `s`.
    pub fn push(&self, fd: &VcpuFd, s: &CpuState, apic: Apic) -> Result<(), KvmError> {
        raw::set_system_registers(fd, &registers::system(s, apic.cr8, apic.base))
            .map_err(refused("the segments and control registers"))?;
        fd.set_regs(&registers::general(s)).map_err(KvmError::refused("the general registers"))?;
        if self.xcr0_mask != 0 {
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
            xcrs.xcrs[0].value = s.xcr0;
            fd.set_xcrs(&xcrs).map_err(KvmError::refused("XCR0"))?;
        }
        let xsave = registers::fpu(&s.fpu, self.xcr0_mask);
        // SAFETY: the area is 4096 bytes, which KVM reads; more only with components that a process has to ask the host's kernel for (AMX), which
        // this one does not.
        unsafe { fd.set_xsave(&xsave) }.map_err(KvmError::refused("the FP state"))?;
        self.push_msrs(fd, &s.msr)?;
        fd.set_debug_regs(&registers::debug(s)).map_err(KvmError::refused("the debug registers"))?;
        fd.set_vcpu_events(&registers::events(s)).map_err(KvmError::refused("the interrupt state"))
    }

    fn push_msrs(&self, fd: &VcpuFd, state: &OurMsrs) -> Result<(), KvmError> {
        let list = self.msrs(state)?;
        let set = fd.set_msrs(&list).map_err(KvmError::refused("MSRs"))?;
        match list.as_slice().get(set) {
            Some(first) => Err(KvmError::Msr { index: first.index, value: first.data }),
            None => Ok(()),
        }
    }

    /// Takes from KVM everything that it holds, into `s`. What comes back are the events in flight.
    pub fn pull(&self, fd: &VcpuFd, s: &mut CpuState) -> Result<kvm_vcpu_events, KvmError> {
        registers::take_general(s, &fd.get_regs().map_err(KvmError::refused("the general registers"))?);
        let system = raw::system_registers(fd).map_err(refused("the segments and control registers"))?;
        registers::take_system(s, &system);
        if self.xcr0_mask != 0 {
            let xcrs = fd.get_xcrs().map_err(KvmError::refused("XCR0"))?;
            s.xcr0 = xcrs.xcrs.iter().find(|x| x.xcr == 0).map_or(1, |x| x.value);
        }
        registers::take_fpu(&mut s.fpu, &fd.get_xsave().map_err(KvmError::refused("the FP state"))?);
        let mut list = self.msrs(&s.msr)?;
        let got = fd.get_msrs(&mut list).map_err(KvmError::refused("MSRs"))?;
        if let Some(first) = list.as_slice().get(got) {
            return Err(KvmError::Msr { index: first.index, value: first.data });
        }
        for (slot, entry) in self.slots.iter().zip(list.as_slice()) {
            *(slot.place)(&mut s.msr) = entry.data;
        }
        registers::take_debug(s, &fd.get_debug_regs().map_err(KvmError::refused("the debug registers"))?);
        let events = fd.get_vcpu_events().map_err(KvmError::refused("the interrupt state"))?;
        registers::take_events(s, &events);
        Ok(events)
    }
}

pub fn refused(what: &'static str) -> impl Fn(io::Error) -> KvmError {
    move |source| KvmError::Refused { what, source }
}
