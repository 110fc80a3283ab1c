//! SMBIOS 2.8 (DMTF DSP0134): BIOS and system information, so that guests know what they run on.
//!
//! The BIOS date is SeaBIOS's, because Linux derives behaviour from its year: from 2015 (Intel) or 2021 on, it expects
//! the real-time clock's alarm as an ACPI event, which this chipset does not raise.

use super::table::{Table, checksum};

const ENTRY_BYTES: u8 = 31;
/// The structures follow the entry point at a multiple of 16.
const STRUCTURES: u32 = 32;
const BIOS_DATE: &str = "04/01/2014";
/// BIOS characteristics: not supported (7.1.1); extension byte 2: virtual machine (7.1.2.2).
const CHARACTERISTICS: u64 = 1 << 3;
const VIRTUAL_MACHINE: u8 = 1 << 4;
const WAKE_UP_POWER_SWITCH: u8 = 6;

/// Entry point and structures as they stand at `base`, which is 16-byte aligned.
#[must_use]
pub fn tables(base: u32) -> Vec<u8> {
    let structures = [bios(), system(), structure(127, 2, &[], &[])];
    let longest = structures.iter().map(Vec::len).max().unwrap_or(0);
    let count = structures.len();
    let body = structures.concat();
    let word = |v: usize| u16::try_from(v).unwrap_or(u16::MAX);
    let mut t = Table::default();
    t.bytes(b"_SM_").u8(0).u8(ENTRY_BYTES).u8(2).u8(8).u16(word(longest)).zeros(6);
    t.bytes(b"_DMI_").u8(0).u16(word(body.len())).u32(base + STRUCTURES).u16(word(count)).u8(0x28);
    t.0[21] = checksum(&t.0[16..]);
    t.0[4] = checksum(&t.0);
    t.zeros(1).bytes(&body);
    t.0
}

/// A structure (6.1.2) with its strings.
fn structure(kind: u8, handle: u16, fields: &[u8], strings: &[&str]) -> Vec<u8> {
    let mut t = Table::default();
    t.u8(kind).u8(u8::try_from(4 + fields.len()).unwrap_or(u8::MAX)).u16(handle).bytes(fields);
    for string in strings {
        t.bytes(string.as_bytes()).u8(0);
    }
    t.zeros(if strings.is_empty() { 2 } else { 1 });
    t.0
}

fn bios() -> Vec<u8> {
    let mut t = Table::default();
    t.u8(1).u8(2).u16(0xf000).u8(3).u8(0).u64(CHARACTERISTICS).u8(0).u8(VIRTUAL_MACHINE);
    t.u8(0).u8(1).u8(0xff).u8(0xff); // BIOS 0.1; no embedded controller
    structure(0, 0, &t.0, &["Trellis", env!("CARGO_PKG_VERSION"), BIOS_DATE])
}

fn system() -> Vec<u8> {
    let mut t = Table::default();
    t.u8(1).u8(2).u8(3).u8(0).zeros(16).u8(WAKE_UP_POWER_SWITCH).u8(0).u8(0);
    structure(1, 1, &t.0, &["Trellis", "Trellis PC", env!("CARGO_PKG_VERSION")])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_point_sums_to_zero_in_both_parts() {
        let t = tables(0xf_1000);
        assert_eq!((&t[..4], &t[16..21]), (&b"_SM_"[..], &b"_DMI_"[..]));
        assert_eq!((checksum(&t[..31]), checksum(&t[16..31])), (0, 0));
        assert_eq!(usize::from(u16::from_le_bytes([t[22], t[23]])), t.len() - 32);
        assert_eq!((t[32], t[33], t[t.len() - 6..].to_vec()), (0, 0x18, vec![127, 4, 2, 0, 0, 0]));
    }
}
