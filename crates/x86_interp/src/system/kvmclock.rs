//! kvmclock: the paravirtual clock that Linux takes at once, without calibrating (Linux
//! Documentation/virt/kvm/x86/msr.rst, include/asm/pvclock-abi.h).

use guestmem::Gpa;
use x86::Exception;

use crate::cpu::Cpu;

/// The TSC is stable across vCPUs (PVCLOCK_TSC_STABLE_BIT).
const TSC_STABLE: u8 = 1;

/// Nanoseconds per TSC tick as pvclock wants it: ticks are shifted by `shift`, then multiplied by `mul / 2^32`.
fn scale(hz: u64) -> (u32, i8) {
    let mut shift = 0i8;
    let mut hz = hz.max(1);
    // mul = 10^9 * 2^32 / hz must fit 32 bits with its top bit set.
    while hz <= 1_000_000_000 {
        hz *= 2;
        shift += 1;
    }
    while hz > 2_000_000_000 {
        hz /= 2;
        shift -= 1;
    }
    let mul = (1_000_000_000u128 << 32) / u128::from(hz);
    // A shifted value is ticks * 2^shift, so the frequency scales with it.
    (u32::try_from(mul).unwrap_or(u32::MAX), shift)
}

/// Writes the time structure of this vCPU, if the guest has registered one.
pub fn update_system_time(cpu: &mut Cpu) {
    let register = cpu.s.msr.kvm_system_time;
    if register & 1 == 0 {
        return;
    }
    let (mul, shift) = scale(cpu.io.tsc_hz());
    // The two clocks are one (CpuIo::system_time_ns belongs to CpuIo::tsc), so the pair is consistent.
    let now = cpu.io.system_time_ns();
    let tsc = cpu.tsc();
    cpu.kvmclock_version = cpu.kvmclock_version.wrapping_add(2) & !1;
    let mut data = [0u8; 32];
    data[0..4].copy_from_slice(&cpu.kvmclock_version.to_le_bytes());
    data[8..16].copy_from_slice(&tsc.to_le_bytes());
    data[16..24].copy_from_slice(&now.to_le_bytes());
    data[24..28].copy_from_slice(&mul.to_le_bytes());
    data[28] = shift.to_le_bytes()[0];
    data[29] = TSC_STABLE;
    // A guest that names memory that is not RAM gets no clock.
    let _ = cpu.mem.write(Gpa(register & !1), &data);
}

/// Writes the wall-clock structure: UTC at system time 0.
pub fn write_wall_clock(cpu: &mut Cpu, gpa: u64) {
    let boot = cpu.io.wall_ns().saturating_sub(cpu.io.system_time_ns());
    let mut data = [0u8; 12];
    data[0..4].copy_from_slice(&2u32.to_le_bytes());
    let seconds = u32::try_from(boot / 1_000_000_000).unwrap_or(u32::MAX);
    let nanoseconds = u32::try_from(boot % 1_000_000_000).unwrap_or(0);
    data[4..8].copy_from_slice(&seconds.to_le_bytes());
    data[8..12].copy_from_slice(&nanoseconds.to_le_bytes());
    let _ = cpu.mem.write(Gpa(gpa & !1), &data);
}

/// VMCALL, VMMCALL: no hypercall is implemented (-KVM_ENOSYS), and none at all outside of level 0 (-KVM_EPERM).
pub fn hypercall(cpu: &mut Cpu) -> Result<(), Exception> {
    let code: i64 = if cpu.cpl() == 0 { -1000 } else { -1 };
    cpu.gpr[0] = code as u64;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::scale;

    #[test]
    fn scale_of_common_frequencies_is_exact_to_a_part_per_million() {
        for hz in [1_000_000_000u64, 2_596_100_000, 999_999_999, 4_200_000_000, 10_000_000] {
            let (mul, shift) = scale(hz);
            let ticks = u128::from(hz);
            let shifted = if shift >= 0 { ticks << shift } else { ticks >> -shift };
            let ns = (shifted * u128::from(mul)) >> 32;
            assert!(ns.abs_diff(1_000_000_000) < 1000, "{hz}: {ns}");
        }
    }
}
