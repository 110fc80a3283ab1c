//! What firmware leaves in memory for an operating system: ACPI tables, MP table, SMBIOS, BIOS data area, interrupt
//! stubs. There is no firmware code: BIOS services are not available (the stubs say so to the caller).
//!
//! Where each stands: [`crate::boot::layout`].

pub mod acpi;
pub mod bios_data;
mod dsdt;
pub mod mptable;
pub mod smbios;
mod table;

use guestmem::{Gpa, GuestMemory, Unbacked};

use crate::boot::Platform;
use crate::boot::layout::{ACPI_TABLES, MP_TABLE, SMBIOS};

/// Physical address of the local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Physical address of the IO-APIC; its inputs are the global system interrupts 0 to 23.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The IO-APIC's identifier, as its register says after reset.
pub const IO_APIC_ID: u8 = 0;
/// Physical address of the HPET.
pub const HPET: u32 = 0xfed0_0000;
/// The ACPI interrupt, level-triggered and active high.
pub const SCI: u8 = 9;
/// PCI devices on bus 0.
const PCI_DEVICES: u8 = 32;

/// The global system interrupt of `pin` (0 for INTA) of PCI device `device`: the IO-APIC's inputs 16 to 23 in turn.
#[must_use]
pub const fn pci_gsi(device: u8, pin: u8) -> u8 {
    16 + (device.wrapping_add(pin) & 7)
}

/// The ISA interrupt of the same pin when the 8259s are in use: as the chipset's routing registers stand after reset.
#[must_use]
pub const fn pci_isa_irq(device: u8, pin: u8) -> u8 {
    [10, 10, 11, 11][(device.wrapping_add(pin) & 3) as usize]
}

/// Writes everything for at most [`crate::boot::MAX_CPUS`] CPUs; the address of the ACPI root pointer.
///
/// # Errors
/// When guest memory has less than 1 MiB.
pub fn write(mem: &GuestMemory, platform: &Platform) -> Result<u64, Unbacked> {
    mem.fill(Gpa(0xe_0000), 0x2_0000, 0)?;
    bios_data::write(mem, platform)?;
    mem.write(Gpa(ACPI_TABLES.start), &acpi::tables(platform, below_1m(ACPI_TABLES.start)))?;
    mem.write(Gpa(MP_TABLE.start), &mptable::table(platform, below_1m(MP_TABLE.start)))?;
    mem.write(Gpa(SMBIOS.start), &smbios::tables(below_1m(SMBIOS.start)))?;
    Ok(ACPI_TABLES.start)
}

fn below_1m(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::{Ecam, MAX_CPUS};

    #[test]
    fn interrupt_routes_are_the_pci_hosts() {
        for device in 0..PCI_DEVICES {
            for pin in 0..4 {
                assert_eq!(u32::from(pci_gsi(device, pin)), devices::pci::gsi_of_intx(device, pin + 1));
            }
        }
    }

    #[test]
    fn largest_tables_fit_in_their_places() {
        let ecam = Some(Ecam { base: 0xd000_0000, buses: 1 });
        let platform = Platform { cpus: MAX_CPUS, vga: true, ecam };
        let fits = |len: usize, range: std::ops::Range<u64>| {
            assert!(len as u64 <= range.end - range.start, "{len:#x}")
        };
        fits(acpi::tables(&platform, 0xe_0000).len(), ACPI_TABLES);
        fits(mptable::table(&platform, 0xf_0000).len(), MP_TABLE);
        fits(smbios::tables(0xf_1000).len(), SMBIOS);
    }
}
