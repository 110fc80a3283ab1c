//! MP floating pointer structure and configuration table (Intel MultiProcessor Specification 1.4, chapter 4), for
//! systems that have no ACPI.

use super::table::{Table, checksum};
use super::{IO_APIC, IO_APIC_ID, LOCAL_APIC, PCI_DEVICES, SCI, pci_gsi};
use crate::boot::Platform;

/// Version register of local APICs and IO-APIC, low byte.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;
/// Bus identifiers: a PCI bus's is its number.
const PCI_BUS: u8 = 0;
const ISA_BUS: u8 = 1;
/// Interrupt types (table 4-10).
const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;
/// Polarity and trigger: as the bus has it; active high and level-triggered.
const CONFORMS: u16 = 0;
const HIGH_LEVEL: u16 = 0b1101;
/// Family 6, as CPUID 1 EAX; FPU and APIC, as CPUID 1 EDX.
const CPU_SIGNATURE: u32 = 0x600;
const CPU_FEATURES: u32 = 0x201;
const FLOATING_BYTES: u32 = 16;

/// Both structures as they stand at `base`, which is 16-byte aligned; the floating pointer comes first.
#[must_use]
pub fn table(platform: &Platform, base: u32) -> Vec<u8> {
    let mut t = Table::default();
    t.bytes(b"_MP_").u32(base + FLOATING_BYTES).u8(1).u8(4).u8(0);
    t.zeros(5); // configuration table present; virtual wire mode
    t.0[10] = checksum(&t.0);
    t.bytes(&configuration(platform));
    t.0
}

fn configuration(platform: &Platform) -> Vec<u8> {
    let mut entries = Entries::default();
    entries.processors(platform.cpus);
    entries.add(1).u8(PCI_BUS).bytes(b"PCI   ");
    entries.add(1).u8(ISA_BUS).bytes(b"ISA   ");
    entries.add(2).u8(IO_APIC_ID).u8(IO_APIC_VERSION).u8(1).u32(IO_APIC);
    entries.io_interrupts();
    entries.local(EXT_INT, 0);
    entries.local(NMI, 1);
    let len = u16::try_from(44 + entries.table.0.len()).unwrap_or(u16::MAX);
    let mut t = Table::default();
    t.bytes(b"PCMP").u16(len).u8(4).u8(0).bytes(b"TRELLIS ").bytes(b"PC          ");
    t.u32(0).u16(0).u16(entries.count).u32(LOCAL_APIC).u16(0).u8(0).u8(0).bytes(&entries.table.0);
    t.0[7] = checksum(&t.0);
    t.0
}

#[derive(Default)]
struct Entries {
    table: Table,
    count: u16,
}

impl Entries {
    fn add(&mut self, kind: u8) -> &mut Table {
        self.count += 1;
        self.table.u8(kind)
    }

    fn processors(&mut self, cpus: u32) {
        for cpu in (0..=u8::MAX).take(usize::try_from(cpus).unwrap_or(0)) {
            let flags = if cpu == 0 { 3 } else { 1 }; // enabled; bootstrap processor
            let entry = self.add(0).u8(cpu).u8(LOCAL_APIC_VERSION).u8(flags);
            entry.u32(CPU_SIGNATURE).u32(CPU_FEATURES).u64(0);
        }
    }

    /// ISA interrupts at the pins of their number but for the timer at pin 2, then the PCI pins (4.3.4, D.3).
    fn io_interrupts(&mut self) {
        for irq in (0..16).filter(|&irq| irq != 2) {
            let pin = if irq == 0 { 2 } else { irq };
            let flags = if irq == SCI { HIGH_LEVEL } else { CONFORMS };
            self.add(3).u8(INT).u16(flags).u8(ISA_BUS).u8(irq).u8(IO_APIC_ID).u8(pin);
        }
        self.add(3).u8(EXT_INT).u16(CONFORMS).u8(ISA_BUS).u8(0).u8(IO_APIC_ID).u8(0);
        for device in 0..PCI_DEVICES {
            for pin in 0..4 {
                let input = pci_gsi(device, pin);
                self.add(3).u8(INT).u16(CONFORMS).u8(PCI_BUS).u8(device << 2 | pin).u8(IO_APIC_ID).u8(input);
            }
        }
    }

    /// A local interrupt of every CPU.
    fn local(&mut self, kind: u8, lint: u8) {
        self.add(4).u8(kind).u16(CONFORMS).u8(ISA_BUS).u8(0).u8(0xff).u8(lint);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_parts_sum_to_zero_and_agree_in_length() {
        for cpus in 1..=16 {
            let t = table(&Platform { cpus, ..Platform::default() }, 0xf_0000);
            let (pointer, config) = t.split_at(16);
            assert_eq!((&pointer[..4], &config[..4]), (&b"_MP_"[..], &b"PCMP"[..]));
            assert_eq!((checksum(pointer), checksum(config)), (0, 0));
            assert_eq!(u32::from_le_bytes(pointer[4..8].try_into().unwrap()), 0xf_0010);
            assert_eq!(usize::from(u16::from_le_bytes([config[4], config[5]])), config.len());
        }
    }

    #[test]
    fn entries_are_counted_and_well_formed() {
        let t = table(&Platform { cpus: 2, ..Platform::default() }, 0xf_0000);
        let config = &t[16..];
        let (mut at, mut count, mut timer) = (44, 0, None);
        while at < config.len() {
            let len = if config[at] == 0 { 20 } else { 8 };
            if config[at..at + 6] == [3, INT, 0, 0, ISA_BUS, 0] {
                timer = Some(config[at + 7]);
            }
            at += len;
            count += 1;
        }
        assert_eq!((at, count), (config.len(), u16::from_le_bytes([config[34], config[35]])));
        assert_eq!(timer, Some(2));
    }
}
