//! ACPI tables (ACPI 6.4 chapter 5): RSDP, RSDT, XSDT, FADT, FACS, DSDT, MADT, HPET, and MCFG where there is ECAM.
//!
//! The machine is always in ACPI mode: SMI_CMD is 0, so the chipset's PM1 control register must show SCI_EN set.
//! Power off: write SLP_TYP 0 with SLP_EN (2000H) to port 604H. Reset: write 6 to port CF9H.

use super::dsdt;
use super::table::{Table, checksum};
use super::{HPET, IO_APIC, IO_APIC_ID, LOCAL_APIC, SCI};
use crate::boot::Platform;

/// Bytes of an RSDP of revision 2.
const RSDP_BYTES: usize = 36;
/// Bytes of a table header.
const HEADER_BYTES: usize = 36;
/// The FACS wants 64-byte alignment (5.2.10), so every table gets it.
const ALIGN: usize = 64;

/// PM1a event block: status and enable, 16 bits each.
pub const PM1A_EVT: u16 = 0x600;
/// PM1a control register.
pub const PM1A_CNT: u16 = 0x604;
/// PM timer, 32 bits at 3.579545 MHz.
pub const PM_TMR: u16 = 0x608;
/// Reset control register and the value that resets.
pub const RESET: (u16, u8) = (0xcf9, 6);

/// FADT flags (table 5.10): WBINVD works, C1 on every CPU, no fixed sleep button, 32-bit PM timer, reset register.
/// Power button (bit 4) clear: there is a fixed one.
const FADT_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 5 | 1 << 8 | 1 << 10;
/// IA-PC boot architecture flags (table 5.11): legacy devices, 8042; and no VGA.
const BOOT_ARCH: u16 = 1 << 0 | 1 << 1;
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
/// CMOS index of the century.
const RTC_CENTURY: u8 = 0x32;
/// MPS INTI flags (table 5.26): active high with edge or level trigger.
const ACTIVE_HIGH_EDGE: u16 = 0b0101;
const ACTIVE_HIGH_LEVEL: u16 = 0b1101;
/// HPET event timer block: vendor 8086H, legacy replacement, 64-bit counter, 3 comparators, revision 1.
const HPET_ID: u32 = 0x8086_a201;

/// All tables as they stand at physical address `base`, which is 64-byte aligned; the RSDP comes first.
#[must_use]
pub fn tables(platform: &Platform, base: u32) -> Vec<u8> {
    let mut area = Area { base, bytes: vec![0; ALIGN] };
    let facs = area.add(&facs());
    let dsdt = area.add(&sdt(*b"DSDT", 2, &dsdt::aml(platform)));
    let mut roots = vec![
        area.add(&sdt(*b"FACP", 5, &fadt(platform, facs, dsdt))),
        area.add(&sdt(*b"APIC", 3, &madt(platform))),
        area.add(&sdt(*b"HPET", 1, &hpet())),
    ];
    if let Some(ecam) = platform.ecam {
        roots.push(area.add(&sdt(*b"MCFG", 1, &mcfg(ecam))));
    }
    let narrow: Vec<u8> = roots.iter().flat_map(|a| a.to_le_bytes()).collect();
    let wide: Vec<u8> = roots.iter().flat_map(|&a| u64::from(a).to_le_bytes()).collect();
    let rsdt = area.add(&sdt(*b"RSDT", 1, &narrow));
    let xsdt = area.add(&sdt(*b"XSDT", 1, &wide));
    area.bytes[..RSDP_BYTES].copy_from_slice(&rsdp(rsdt, xsdt));
    area.bytes
}

/// Tables one after another.
struct Area {
    base: u32,
    bytes: Vec<u8>,
}

impl Area {
    fn add(&mut self, table: &[u8]) -> u32 {
        let at = self.bytes.len().next_multiple_of(ALIGN);
        self.bytes.resize(at, 0);
        self.bytes.extend_from_slice(table);
        self.base.saturating_add(u32::try_from(at).unwrap_or(u32::MAX))
    }
}

/// A table with its header (5.2.6).
fn sdt(signature: [u8; 4], revision: u8, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(HEADER_BYTES + body.len()).unwrap_or(u32::MAX);
    let mut t = Table::default();
    t.bytes(&signature).u32(len).u8(revision).u8(0);
    t.bytes(b"TRLLIS").bytes(b"TRELLIS ").u32(1).bytes(b"TRLS").u32(1).bytes(body);
    t.0[9] = checksum(&t.0);
    t.0
}

/// Root pointer (5.2.5.3).
fn rsdp(rsdt: u32, xsdt: u32) -> Vec<u8> {
    let mut t = Table::default();
    t.bytes(b"RSD PTR ").u8(0).bytes(b"TRLLIS").u8(2).u32(rsdt);
    t.u32(36).u64(xsdt.into()).u8(0).zeros(3);
    t.0[8] = checksum(&t.0[..20]);
    t.0[32] = checksum(&t.0);
    t.0
}

/// Firmware ACPI control structure (5.2.10).
fn facs() -> Vec<u8> {
    let mut t = Table::default();
    t.bytes(b"FACS").u32(64).zeros(24).u8(2).zeros(31);
    t.0
}

/// A generic address (5.2.3.2) in I/O space; `access` is 1 for bytes to 3 for dwords.
fn io(t: &mut Table, port: u16, bits: u8, access: u8) {
    t.u8(1).u8(bits).u8(0).u8(access).u64(port.into());
}

/// Fixed description table, revision 5 (5.2.9), without its header.
fn fadt(platform: &Platform, facs: u32, dsdt: u32) -> Vec<u8> {
    let mut t = Table::default();
    t.u32(facs).u32(dsdt).u8(0).u8(0).u16(SCI.into());
    t.u32(0).zeros(4); // SMI_CMD, ACPI_ENABLE, ACPI_DISABLE, S4BIOS_REQ, PSTATE_CNT
    t.u32(PM1A_EVT.into()).u32(0).u32(PM1A_CNT.into()).u32(0).u32(0).u32(PM_TMR.into()).u32(0).u32(0);
    t.u8(4).u8(2).u8(0).u8(4).u8(0).u8(0).u8(0).u8(0); // lengths: PM1_EVT, PM1_CNT, PM2, PM_TMR, GPE0, GPE1; GPE1_BASE, CST_CNT
    t.u16(0xfff).u16(0xfff); // P_LVL2_LAT, P_LVL3_LAT: no C2, no C3
    t.u16(0).u16(0).u8(0).u8(0).u8(0).u8(0).u8(RTC_CENTURY); // FLUSH, DUTY, alarms
    t.u16(if platform.vga { BOOT_ARCH } else { BOOT_ARCH | BOOT_ARCH_NO_VGA }).u8(0).u32(FADT_FLAGS);
    io(&mut t, RESET.0, 8, 1);
    t.u8(RESET.1).u16(0).u8(1); // RESET_VALUE, ARM_BOOT_ARCH, minor version
    t.u64(0).u64(dsdt.into()); // X_FIRMWARE_CTRL is 0 as FIRMWARE_CTRL is not (table 5.9)
    io(&mut t, PM1A_EVT, 32, 2);
    t.zeros(12);
    io(&mut t, PM1A_CNT, 16, 2);
    t.zeros(12).zeros(12); // PM1b control, PM2
    io(&mut t, PM_TMR, 32, 3);
    t.zeros(12).zeros(12); // GPE0, GPE1
    t.zeros(12).zeros(12); // sleep control and status: only without the fixed hardware
    t.0
}

/// Multiple APIC description table (5.2.12) without its header.
fn madt(platform: &Platform) -> Vec<u8> {
    let mut t = Table::default();
    t.u32(LOCAL_APIC).u32(1); // PCAT_COMPAT: there are 8259s
    for cpu in (0..=u8::MAX).take(usize::try_from(platform.cpus).unwrap_or(0)) {
        t.u8(0).u8(8).u8(cpu).u8(cpu).u32(1);
    }
    t.u8(1).u8(12).u8(IO_APIC_ID).u8(0).u32(IO_APIC).u32(0);
    let mut source_override = |irq: u8, gsi: u32, flags: u16| {
        t.u8(2).u8(10).u8(0).u8(irq).u32(gsi).u16(flags);
    };
    source_override(0, 2, ACTIVE_HIGH_EDGE);
    source_override(SCI, SCI.into(), ACTIVE_HIGH_LEVEL);
    t.u8(4).u8(6).u8(0xff).u16(0).u8(1); // NMI at LINT1 of every CPU
    t.0
}

/// HPET description table (IA-PC HPET 1.0a 3.2.4) without its header.
fn hpet() -> Vec<u8> {
    let mut t = Table::default();
    t.u32(HPET_ID).u8(0).u8(64).u8(0).u8(0).u64(HPET.into());
    t.u8(0).u16(0x80).u8(0); // number, shortest period of the main counter, page protection
    t.0
}

/// PCI Express memory-mapped configuration table (PCI Firmware 3.2 4.1.2) without its header.
fn mcfg(ecam: crate::boot::Ecam) -> Vec<u8> {
    let mut t = Table::default();
    t.u64(0).u64(ecam.base).u16(0).u8(0).u8(ecam.buses.saturating_sub(1)).u32(0);
    t.0
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::Ecam;

    const BASE: u32 = 0xe_0000;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    /// The tables by signature, found as an operating system does, from the RSDT.
    fn walk(platform: &Platform) -> Vec<(String, Vec<u8>)> {
        let area = tables(platform, BASE);
        let at = |address: u32| usize::try_from(address - BASE).unwrap();
        let table = |address: u32| {
            let bytes = &area[at(address)..at(address + u32_at(&area, at(address) + 4))];
            (String::from_utf8(bytes[..4].to_vec()).unwrap(), bytes.to_vec())
        };
        let mut all = vec![table(u32_at(&area, 16)), table(u32_at(&area, 24))];
        let roots: Vec<u32> = all[0].1[36..].chunks(4).map(|c| u32_at(c, 0)).collect();
        all.extend(roots.into_iter().map(table));
        let fadt = all.iter().find(|(s, _)| s == "FACP").unwrap().1.clone();
        all.extend([table(u32_at(&fadt, 36)), table(u32_at(&fadt, 40))]);
        all
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let platform = Platform { cpus: 16, vga: true, ecam: Some(Ecam { base: 0xd000_0000, buses: 1 }) };
        let all = walk(&platform);
        let names: Vec<_> = all.iter().map(|(s, _)| &s[..]).collect();
        assert_eq!(names, ["RSDT", "XSDT", "FACP", "APIC", "HPET", "MCFG", "FACS", "DSDT"]);
        for (name, bytes) in all.iter().filter(|(s, _)| s != "FACS") {
            assert_eq!(checksum(bytes), 0, "{name}");
        }
    }

    #[test]
    fn root_pointer_sums_to_zero_in_both_parts() {
        let area = tables(&Platform::default(), BASE);
        assert_eq!(&area[..8], b"RSD PTR ");
        assert_eq!((checksum(&area[..20]), checksum(&area[..36])), (0, 0));
    }

    #[test]
    fn fadt_has_revision_5_size_and_registers() {
        let fadt = walk(&Platform::default())[2].1.clone();
        assert_eq!((fadt.len(), fadt[8], fadt[46]), (268, 5, SCI));
        assert_eq!([56, 64, 76].map(|o| u32_at(&fadt, o)), [0x600, 0x604, 0x608]);
        assert_eq!((fadt[88], fadt[89], fadt[91], fadt[108]), (4, 2, 4, 0x32));
        assert_eq!((fadt[109], u32_at(&fadt, 112)), (3, 0x525));
        assert_eq!((u32_at(&fadt, 120), fadt[128], fadt[131]), (0xcf9, 6, 1));
        assert_eq!((u32_at(&fadt, 140), u32_at(&fadt, 152)), (u32_at(&fadt, 40), 0x600));
        assert_eq!((u32_at(&fadt, 176), u32_at(&fadt, 212)), (0x604, 0x608));
    }

    #[test]
    fn madt_has_an_entry_a_cpu_and_the_overrides() {
        let madt = walk(&Platform { cpus: 3, ..Platform::default() })[3].1.clone();
        let mut entries = Vec::new();
        let mut rest = &madt[44..];
        while let [kind, len, ..] = rest {
            entries.push((*kind, rest[..usize::from(*len)].to_vec()));
            rest = &rest[usize::from(*len)..];
        }
        let of =
            |kind| entries.iter().filter(|(k, _)| *k == kind).map(|(_, e)| e.clone()).collect::<Vec<_>>();
        assert_eq!(of(0).iter().map(|e| e[3]).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(of(1).len(), 1);
        assert_eq!(of(2), [vec![2, 10, 0, 0, 2, 0, 0, 0, 5, 0], vec![2, 10, 0, 9, 9, 0, 0, 0, 13, 0]]);
        assert_eq!(of(4), [[4, 6, 255, 0, 0, 1]]);
    }

    /// Writes the tables where the variable says, to be looked at with `iasl -d`.
    #[test]
    fn dump_tables_when_asked() {
        let Some(directory) = std::env::var_os("TRELLIS_DUMP_ACPI") else { return };
        let platform = Platform { cpus: 16, vga: true, ecam: Some(Ecam { base: 0xd000_0000, buses: 1 }) };
        for (name, bytes) in walk(&platform) {
            std::fs::write(std::path::Path::new(&directory).join(format!("{name}.dat")), bytes).unwrap();
        }
    }
}
