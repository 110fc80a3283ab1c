//! The memory map that the guest is told, in the form of BIOS INT 15H function E820H (ACPI 6.4 15.1).

use guestmem::{GuestMemory, HOLE_END};

use super::Platform;
use super::layout::{EBDA, HIGH_MEMORY, IO_RESERVED};

/// What a range is, with its E820 number.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Kind {
    /// RAM.
    Usable = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One range of the map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// First address.
    pub start: u64,
    /// Address after the last.
    pub end: u64,
    /// What it is.
    pub kind: Kind,
}

impl Entry {
    /// Bytes in the range.
    #[must_use]
    pub const fn len_bytes(&self) -> u64 {
        self.end - self.start
    }
}

/// First address after the RAM below the hole.
#[must_use]
pub fn low_ram_end(mem: &GuestMemory) -> u64 {
    mem.ram().iter().filter(|r| r.start < HOLE_END).map(|r| r.end).max().unwrap_or(0)
}

/// The map, ascending and without overlaps.
///
/// The hole below 4 GiB is not reported as reserved but for its top: Linux up to 6.1 takes away from the PCI
/// host bridge's windows whatever the map calls reserved, and then finds no room for the devices' registers.
#[must_use]
pub fn memory_map(mem: &GuestMemory, platform: &Platform) -> Vec<Entry> {
    let entry = |start, end, kind| Entry { start, end, kind };
    let mut map = vec![
        entry(0, EBDA, Kind::Usable),
        entry(EBDA, 0xa_0000, Kind::Reserved),
        entry(0xa_0000, HIGH_MEMORY, Kind::Reserved),
    ];
    let low_end = low_ram_end(mem);
    if low_end > HIGH_MEMORY {
        map.push(entry(HIGH_MEMORY, low_end, Kind::Usable));
    }
    if let Some(ecam) = platform.ecam {
        map.push(entry(ecam.base, ecam.base + ecam.len_bytes(), Kind::Reserved));
    }
    map.push(entry(IO_RESERVED, HOLE_END, Kind::Reserved));
    map.extend(mem.ram().iter().filter(|r| r.start >= HOLE_END).map(|r| entry(r.start, r.end, Kind::Usable)));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(size: u64) -> Vec<Entry> {
        memory_map(&GuestMemory::new(size).unwrap(), &Platform::default())
    }

    #[test]
    fn map_is_ascending_and_disjoint() {
        for size in [1 << 20, 16 << 20, 3 << 30, 5 << 30] {
            let map = map(size);
            assert!(map.iter().all(|e| e.start < e.end));
            assert!(map.windows(2).all(|w| w[0].end <= w[1].start), "{map:x?}");
        }
    }

    #[test]
    fn usable_memory_is_ram_less_the_first_megabytes_holes() {
        let usable =
            |size| map(size).iter().filter(|e| e.kind == Kind::Usable).map(Entry::len_bytes).sum::<u64>();
        assert_eq!(usable(1 << 20), 0x9_fc00);
        assert_eq!(usable(16 << 20), (15 << 20) + 0x9_fc00);
        assert_eq!(usable(5 << 30), (5 << 30) - (1 << 20) + 0x9_fc00);
    }

    #[test]
    fn pci_window_is_not_reserved() {
        assert!(!map(4 << 30).iter().any(|e| e.start < 0xfec0_0000 && e.end > 0xe000_0000));
    }
}
