//! The differentiated definition block: what the operating system cannot find out by itself, in AML (ACPI 6.4
//! chapters 6, 9, 19 and 20).
//!
//! In ASL: `\_S5`, `\_PIC`, and in `\_SB` the processors `C000`…, the PCI host bridge `PCI0` with the ISA bridge's
//! devices, the HPET, and the motherboard's own registers.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, IO, If, Memory32Fixed, Method, Name, Package,
    PackageBuilder, Path, ResourceTemplate, Return, Scope, Store,
};
use acpi_tables::{Aml, AmlSink};

use super::{HPET, IO_APIC, LOCAL_APIC, PCI_DEVICES, pci_gsi, pci_isa_irq};
use crate::boot::Platform;

/// An IRQ descriptor without flags: edge-triggered, active high (6.4.2.1).
struct Irq(u8);

impl Aml for Irq {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.byte(0x22);
        sink.word(1 << self.0);
    }
}

/// Objects that were encoded already.
struct Encoded(Vec<u8>);

impl Aml for Encoded {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn encode(objects: &[&dyn Aml]) -> Encoded {
    let mut bytes = Vec::new();
    objects.iter().for_each(|o| o.to_aml_bytes(&mut bytes));
    Encoded(bytes)
}

fn name(path: &str, value: &dyn Aml) -> Name {
    Name::new(Path::new(path), value)
}

fn device(path: &str, children: Vec<&dyn Aml>) -> Encoded {
    encode(&[&Device::new(Path::new(path), children)])
}

/// The block's AML.
pub(super) fn aml(platform: &Platform) -> Vec<u8> {
    let mut system: Vec<Encoded> = (0..platform.cpus).map(processor).collect();
    system.push(pci_host(platform));
    system.push(hpet());
    system.push(motherboard(platform));
    let system: Vec<&dyn Aml> = system.iter().map(|o| -> &dyn Aml { o }).collect();
    // SLP_TYP for soft-off in both PM1 control registers.
    let off = name("_S5_", &Package::new(vec![&0u8, &0u8, &0u8, &0u8]));
    let picm = name("PICM", &0u8);
    let store = Store::new(&Path::new("PICM"), &Arg(0)).to_encoded();
    let pic = Method::new(Path::new("_PIC"), 1, false, vec![&store]).to_encoded();
    encode(&[&off, &picm, &pic, &Scope::new(Path::new("_SB_"), system)]).0
}

/// Encoding as a method, for objects that borrow temporaries.
trait ToEncoded: Aml {
    fn to_encoded(&self) -> Encoded;
}

impl<T: Aml> ToEncoded for T {
    fn to_encoded(&self) -> Encoded {
        let mut bytes = Vec::new();
        self.to_aml_bytes(&mut bytes);
        Encoded(bytes)
    }
}

/// A processor device (8.4); its _UID is the MADT's.
fn processor(index: u32) -> Encoded {
    device(&format!("C{index:03X}"), vec![&name("_HID", &"ACPI0007"), &name("_UID", &index)])
}

fn pci_host(platform: &Platform) -> Encoded {
    let last_bus = platform.ecam.map_or(255, |e| u16::from(e.buses.saturating_sub(1)));
    let memory = |min: u32, max: u32, kind| AddressSpace::<u32>::new_memory(kind, true, min, max, None);
    let resources = name(
        "_CRS",
        &ResourceTemplate::new(vec![
            &AddressSpace::<u16>::new_bus_number(0, last_bus),
            &IO::new(0xcf8, 0xcf8, 1, 8),
            &AddressSpace::<u16>::new_io(0, 0xcf7, None),
            &AddressSpace::<u16>::new_io(0xd00, 0xffff, None),
            &memory(0xa_0000, 0xb_ffff, AddressSpaceCacheable::Cacheable),
            &memory(0xe000_0000, 0xfebf_ffff, AddressSpaceCacheable::NotCacheable),
        ]),
    );
    let apic = name("PRTA", &routes(pci_gsi));
    let legacy = name("PRTP", &routes(pci_isa_irq));
    let table = [Path::new("PRTA"), Path::new("PRTP")].map(|p| Return::new(&p).to_encoded());
    let choose = If::new(&Path::new("PICM"), vec![&table[0]]).to_encoded();
    let routing = Method::new(Path::new("_PRT"), 0, false, vec![&choose, &table[1]]).to_encoded();
    device(
        "PCI0",
        vec![
            &name("_HID", &EISAName::new("PNP0A03")),
            &name("_UID", &0u8),
            &name("_BBN", &0u8),
            &resources,
            &apic,
            &legacy,
            &routing,
            &isa_bridge(),
        ],
    )
}

/// A routing table (6.2.13): for each pin the interrupt, without link devices.
fn routes(interrupt: impl Fn(u8, u8) -> u8) -> PackageBuilder {
    let mut table = PackageBuilder::new();
    for device in 0..PCI_DEVICES {
        for pin in 0..4 {
            let address = u32::from(device) << 16 | 0xffff;
            table.add_element(&Package::new(vec![&address, &pin, &0u8, &interrupt(device, pin)]));
        }
    }
    table
}

/// The ISA bridge at 00:01.0 and what stands behind it.
fn isa_bridge() -> Encoded {
    let io = |first: u16, len: u8| IO::new(first, first, 1, len);
    let legacy = |path: &str, id: &str, resources: Vec<&dyn Aml>| {
        let (hid, crs) = (name("_HID", &EISAName::new(id)), name("_CRS", &ResourceTemplate::new(resources)));
        device(path, vec![&hid, &crs])
    };
    let serial = device(
        "COM1",
        vec![
            &name("_HID", &EISAName::new("PNP0501")),
            &name("_UID", &1u8),
            &name("_CRS", &ResourceTemplate::new(vec![&io(0x3f8, 8), &Irq(4)])),
        ],
    );
    device(
        "ISA_",
        vec![
            &name("_ADR", &0x1_0000u32),
            &legacy("PIC_", "PNP0000", vec![&io(0x20, 2), &io(0xa0, 2), &io(0x4d0, 2), &Irq(2)]),
            &legacy("PIT_", "PNP0100", vec![&io(0x40, 4), &Irq(0)]),
            &legacy("RTC_", "PNP0B00", vec![&io(0x70, 2), &Irq(8)]),
            &legacy("KBD_", "PNP0303", vec![&io(0x60, 1), &io(0x64, 1), &Irq(1)]),
            &legacy("MOU_", "PNP0F13", vec![&Irq(12)]),
            &legacy("SPK_", "PNP0800", vec![&io(0x61, 1)]),
            &serial,
        ],
    )
}

fn hpet() -> Encoded {
    let resources = ResourceTemplate::new(vec![&Memory32Fixed::new(false, HPET, 0x400)]).to_encoded();
    device(
        "HPET",
        vec![&name("_HID", &EISAName::new("PNP0103")), &name("_UID", &0u8), &name("_CRS", &resources)],
    )
}

/// Registers that no other device owns, so that nothing is put on top of them (PNP0C02).
fn motherboard(platform: &Platform) -> Encoded {
    let io_apic = Memory32Fixed::new(true, IO_APIC, 0x1000);
    let local_apic = Memory32Fixed::new(true, LOCAL_APIC, 0x1000);
    let ports = IO::new(super::acpi::PM1A_EVT, super::acpi::PM1A_EVT, 1, 0x10);
    let ecam = platform.ecam.map(|e| {
        let narrow = |v: u64| u32::try_from(v).unwrap_or(0);
        Memory32Fixed::new(true, narrow(e.base), narrow(e.len_bytes()))
    });
    let mut resources: Vec<&dyn Aml> = vec![&ports, &io_apic, &local_apic];
    resources.extend(ecam.iter().map(|e| -> &dyn Aml { e }));
    device(
        "MBRD",
        vec![
            &name("_HID", &EISAName::new("PNP0C02")),
            &name("_UID", &0u8),
            &name("_CRS", &ResourceTemplate::new(resources)),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contains(bytes: &[u8], part: &[u8]) -> bool {
        bytes.windows(part.len()).any(|w| w == part)
    }

    #[test]
    fn processors_are_numbered_from_zero() {
        let bytes = aml(&Platform { cpus: 16, ..Platform::default() });
        assert!(contains(&bytes, b"C000") && contains(&bytes, b"C00F") && !contains(&bytes, b"C010"));
    }

    #[test]
    fn soft_off_is_sleep_type_zero() {
        assert!(contains(&aml(&Platform::default()), b"\x08_S5_\x12\x06\x04\x00\x00\x00\x00"));
    }

    #[test]
    fn routing_table_has_every_pin() {
        let bytes = routes(pci_gsi).to_encoded().0;
        // Device 3, INTB: (3 + 1) % 8 + 16 = 20.
        assert!(contains(&bytes, &[4, 0x0c, 0xff, 0xff, 3, 0, 1, 0, 0x0a, 20]));
        assert_eq!(bytes.windows(2).filter(|w| w == b"\xff\xff").count(), 128);
    }
}
