//! Requests that `kvm-ioctls` has not (Linux `Documentation/virt/kvm/api.rst`; numbers from `include/uapi/linux/kvm.h`).

#![expect(unsafe_code, reason = "ioctl")]

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr, kvm_interrupt, kvm_sregs2};

const KVM_RUN: libc::c_ulong = 0xae80;
const KVM_INTERRUPT: libc::c_ulong = 0x4004_ae86;
const KVM_GET_SREGS2: libc::c_ulong = 0x8140_aecc;
const KVM_SET_SREGS2: libc::c_ulong = 0x4140_aecd;
const KVM_SET_DEVICE_ATTR: libc::c_ulong = 0x4018_aee1;

fn done(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Runs the vCPU until an exit or a signal (`ErrorKind::Interrupted`).
pub fn run(vcpu: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: KVM_RUN takes no argument; it changes the vCPU's shared page and guest memory, to neither of which there are references.
    done(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_RUN, 0) })
}

/// The vCPU takes this interrupt at its next entry. Only without interrupt controllers in the kernel.
pub fn interrupt(vcpu: &impl AsRawFd, vector: u8) -> io::Result<()> {
    let argument = kvm_interrupt { irq: u32::from(vector) };
    // SAFETY: the kernel reads the argument, which lives as long as the call.
    done(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_INTERRUPT, &raw const argument) })
}

/// Segments, tables, control registers, with the PDPTEs.
pub fn system_registers(vcpu: &impl AsRawFd) -> io::Result<kvm_sregs2> {
    let mut registers = kvm_sregs2::default();
    // SAFETY: the request's number carries the structure's size (0x140), which the kernel fills.
    done(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_SREGS2, &raw mut registers) })?;
    Ok(registers)
}

/// Sets what [`system_registers`] gets.
pub fn set_system_registers(vcpu: &impl AsRawFd, registers: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: the kernel reads the structure, whose size (0x140) the request's number carries.
    done(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SREGS2, std::ptr::from_ref(registers)) })
}

/// The guest's time-stamp counter is the host's plus this, wrapping.
pub fn set_tsc_offset(vcpu: &impl AsRawFd, offset: u64) -> io::Result<()> {
    let attribute = kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: (&raw const offset) as u64,
    };
    // SAFETY: the kernel reads the attribute and, at its address, the eight bytes of `offset`; both live as long as the call.
    done(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &raw const attribute) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_carry_the_sizes_of_their_structures() {
        let size = |request: libc::c_ulong| usize::try_from(request >> 16 & 0x3fff).unwrap();
        assert_eq!(size(KVM_GET_SREGS2), size_of::<kvm_sregs2>());
        assert_eq!(size(KVM_SET_SREGS2), size_of::<kvm_sregs2>());
        assert_eq!(size(KVM_SET_DEVICE_ATTR), size_of::<kvm_device_attr>());
        assert_eq!(size(KVM_INTERRUPT), size_of::<kvm_interrupt>());
    }
}
