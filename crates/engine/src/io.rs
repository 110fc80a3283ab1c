//! The whole boundary from a vCPU to the devices.

use x86::addr::Gpa;

/// An access that the device refuses with #GP (MSRs only).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GeneralProtection;

/// What a vCPU asks of the machine. One object for all vCPUs; `vcpu` says who asks.
pub trait CpuIo: Send + Sync {
    /// IN of 1, 2 or 4 bytes.
    fn port_in(&self, vcpu: usize, port: u16, size: u8) -> u32;
    /// OUT of 1, 2 or 4 bytes.
    fn port_out(&self, vcpu: usize, port: u16, size: u8, value: u32);
    /// Read of memory that is not RAM (1 to 64 bytes, within one page).
    fn mmio_read(&self, vcpu: usize, gpa: Gpa, data: &mut [u8]);
    /// Write of memory that is not RAM, or of ROM.
    fn mmio_write(&self, vcpu: usize, gpa: Gpa, data: &[u8]);
    /// The vector of the interrupt that the vCPU takes now: the INTA cycle. None if it went away.
    fn acknowledge_interrupt(&self, vcpu: usize) -> Option<u8>;
    /// CR8: the task-priority class, 0 to 15.
    fn cr8(&self, vcpu: usize) -> u64;
    /// Sets CR8 (the value is 0 to 15).
    fn set_cr8(&self, vcpu: usize, value: u64);
    /// RDMSR of a local-APIC register: IA32_APIC_BASE, IA32_TSC_DEADLINE, 0x800 to 0x8ff.
    ///
    /// # Errors
    /// When the register does not exist now.
    fn apic_msr_read(&self, vcpu: usize, index: u32) -> Result<u64, GeneralProtection>;
    /// WRMSR of such a register.
    ///
    /// # Errors
    /// When the register or the value is refused.
    fn apic_msr_write(&self, vcpu: usize, index: u32, value: u64) -> Result<(), GeneralProtection>;
    /// The clock's time-stamp counter, before the vCPU's offset.
    fn tsc(&self) -> u64;
    /// What [`CpuIo::tsc`] adds to the host's RDTSC as long as the vCPU runs, if it is nothing but that.
    fn tsc_delta(&self) -> Option<u64> {
        None
    }
    /// Frequency of the time-stamp counter in Hz.
    fn tsc_hz(&self) -> u64;
    /// Guest time in nanoseconds that belongs to [`CpuIo::tsc`] (for kvmclock).
    fn system_time_ns(&self) -> u64;
    /// UTC in nanoseconds since 1970 (for kvmclock's wall clock).
    fn wall_ns(&self) -> u64;
    /// The vCPU's TSC offset changed (IA32_TSC, IA32_TSC_ADJUST): armed TSC deadlines move.
    fn tsc_offset_changed(&self, vcpu: usize, offset: u64);
    /// INIT was taken: the local APIC is reset with it.
    fn apic_init(&self, vcpu: usize);
}
