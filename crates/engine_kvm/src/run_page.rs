//! The page that the kernel and a vCPU share (`struct kvm_run`). The kernel writes it during `KVM_RUN`, other threads of ours write
//! `immediate_exit` at any time: there are no references into it, only loads and stores by raw pointer.

#![expect(unsafe_code, reason = "raw access to memory shared with the kernel")]

use std::ptr::NonNull;
use std::sync::atomic::AtomicU8;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

use crate::exit::{self, Exit};

/// The page of one vCPU.
///
/// INV-KVM-2: it is mapped as long as the vCPU's descriptor is open; a [`RunPage`] lives beside that, and no longer.
pub struct RunPage {
    page: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the mapping belongs to the process; a vCPU and its page move between threads together.
unsafe impl Send for RunPage {}

impl RunPage {
    /// The page of `fd`, of `len` bytes.
    pub fn of(fd: &mut VcpuFd, len: usize) -> Self {
        Self { page: NonNull::from(fd.get_kvm_run()), len }
    }

    /// Where `immediate_exit` stands, for [`crate::kick`].
    pub fn exit_flag(&self) -> NonNull<AtomicU8> {
        // SAFETY: a field of the mapped structure (INV-KVM-2); AtomicU8 has the layout of u8.
        unsafe { NonNull::new_unchecked((&raw mut (*self.page.as_ptr()).immediate_exit).cast()) }
    }

    /// What made `KVM_RUN` return.
    pub fn exit(&self) -> Exit {
        // SAFETY: mapped (INV-KVM-2). The kernel does not write now, and a torn `immediate_exit` cannot be: it is a byte.
        exit::decode(&unsafe { self.page.as_ptr().read_volatile() })
    }

    /// `KVM_RUN` was interrupted: there is no exit to act on.
    pub fn set_reason_interrupted(&self) {
        // SAFETY: INV-KVM-2.
        unsafe { (&raw mut (*self.page.as_ptr()).exit_reason).write_volatile(kvm_bindings::KVM_EXIT_INTR) }
    }

    /// Asks for an exit as soon as an interrupt could be taken.
    pub fn request_window(&self, wanted: bool) {
        // SAFETY: INV-KVM-2.
        unsafe { (&raw mut (*self.page.as_ptr()).request_interrupt_window).write_volatile(u8::from(wanted)) }
    }

    /// Whether the guest would take an interrupt now. Valid after an exit.
    pub fn takes_interrupts(&self) -> bool {
        // SAFETY: INV-KVM-2.
        unsafe {
            (&raw const (*self.page.as_ptr()).ready_for_interrupt_injection).read_volatile() != 0
                && self.interrupt_flag()
        }
    }

    /// RFLAGS.IF. Valid after an exit.
    pub fn interrupt_flag(&self) -> bool {
        // SAFETY: INV-KVM-2.
        unsafe { (&raw const (*self.page.as_ptr()).if_flag).read_volatile() != 0 }
    }

    /// CR8. Valid after an exit.
    pub fn cr8(&self) -> u64 {
        // SAFETY: INV-KVM-2.
        unsafe { (&raw const (*self.page.as_ptr()).cr8).read_volatile() }
    }

    /// CR8 from the next entry on.
    pub fn set_cr8(&self, value: u64) {
        // SAFETY: INV-KVM-2.
        unsafe { (&raw mut (*self.page.as_ptr()).cr8).write_volatile(value) }
    }

    /// `data.len()` bytes from `at` in the page, cut off at its end.
    pub fn read(&self, at: usize, data: &mut [u8]) {
        let len = data.len().min(self.len.saturating_sub(at));
        // SAFETY: at + len lies in the mapping, which `data` cannot overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.page.as_ptr().cast::<u8>().add(at.min(self.len)),
                data.as_mut_ptr(),
                len,
            )
        }
    }

    /// Writes `data` at `at` in the page, cut off at its end.
    pub fn write(&self, at: usize, data: &[u8]) {
        let len = data.len().min(self.len.saturating_sub(at));
        // SAFETY: as in `read`.
        unsafe {
            std::ptr::copy_nonoverlapping(
                data.as_ptr(),
                self.page.as_ptr().cast::<u8>().add(at.min(self.len)),
                len,
            )
        }
    }
}
