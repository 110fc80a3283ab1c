//! Where everything is in guest physical memory at the kernel's first instruction.
//!
//! | address | what | written by |
//! |---|---|---|
//! | `0` | interrupt vector table, pointing to stubs | `firmware::bios_data` |
//! | `0x400` | BIOS data area | `firmware::bios_data` |
//! | `0x500..0x9fc00` | free RAM; the boot loader's own structures from `0x10000` up, around the kernel | here |
//! | `0x9fc00..0xa0000` | extended BIOS data area | `firmware::bios_data` |
//! | `0xa0000..0xc0000` | VGA memory, no RAM | |
//! | `0xe0000..0xf0000` | ACPI tables, RSDP first | `firmware::acpi` |
//! | `0xf0000..0xf1000` | MP floating pointer and configuration table | `firmware::mptable` |
//! | `0xf1000..0xf2000` | SMBIOS | `firmware::smbios` |
//! | `0xfe000..0x100000` | interrupt stubs, reset vector | `firmware::bios_data` |
//! | `0x100000..` | kernel where it wants to be; multiboot modules behind it | |
//! | `..` top of RAM below 3 GiB | initrd, as high as the kernel allows | |
//! | `0xc0000000..0x100000000` | no RAM: PCI windows from `0xe0000000`, IO-APIC, HPET, local APIC | |
//! | `0x100000000..` | the rest of the RAM | |
//!
//! The boot loader's own structures are: GDT, stack, page tables (64-bit entry), command line, and the protocol's
//! information structure. They lie in memory that the map calls usable, as the protocols want it: the kernel
//! copies what it needs before it reuses the memory. They stand at `0x10000` and above because small kernels put
//! their processors' start-up code below.

use std::ops::Range;

use guestmem::{Gpa, GuestMemory, HOLE_END, HOLE_START};

use super::BootError;
use super::bytes::align_up;

/// Extended BIOS data area, 1 KiB; the end of usable conventional memory.
pub const EBDA: u64 = 0x9_fc00;
/// ACPI tables; the RSDP is the first of them, where a scan of E0000H to FFFFFH finds it (ACPI 6.4 5.2.5.1).
pub const ACPI_TABLES: Range<u64> = 0xe_0000..0xf_0000;
/// MP floating pointer structure, followed by the configuration table (MP 1.4 4.1 has it searched here).
pub const MP_TABLE: Range<u64> = 0xf_0000..0xf_1000;
/// SMBIOS entry point and structures.
pub const SMBIOS: Range<u64> = 0xf_1000..0xf_2000;
/// Real-mode stubs; segment F000H, offset E000H.
pub const BIOS_STUBS: Range<u64> = 0xf_e000..0x10_0000;
/// Start of extended memory.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// From here to 4 GiB the memory map says reserved: IO-APIC, HPET, local APIC, MSI, ROM.
pub const IO_RESERVED: u64 = 0xfec0_0000;
/// First choice for the boot loader's own structures.
const LOW_START: u64 = 0x1_0000;
/// Second choice, when the kernel occupies the first.
const LOW_FALLBACK: u64 = 0x1000;
/// Identity page tables: PML4, PDPT, four page directories.
pub(super) const PAGE_TABLE_BYTES: u64 = 6 * 4096;

/// Which guest memory is taken already.
pub(super) struct Claims<'a> {
    mem: &'a GuestMemory,
    usable: Vec<Range<u64>>,
    taken: Vec<(Range<u64>, &'static str)>,
}

impl<'a> Claims<'a> {
    /// Nothing is taken but what is not usable RAM.
    pub fn new(mem: &'a GuestMemory) -> Self {
        let conventional = std::iter::once(0..EBDA);
        let extended = mem.ram().iter().map(|r| r.start.max(HIGH_MEMORY)..r.end);
        let usable = conventional.chain(extended).filter(|r| r.start < r.end).collect();
        Self { mem, usable, taken: Vec::new() }
    }

    /// The memory that claims are made on.
    pub fn memory(&self) -> &'a GuestMemory {
        self.mem
    }

    /// Takes `start..start+size` for the kernel, where it must be. Parts of the kernel may overlap one another.
    pub fn kernel(&mut self, start: u64, size: u64, what: &'static str) -> Result<(), BootError> {
        let end = start.saturating_add(size);
        if start == u64::MAX || !self.usable.iter().any(|r| r.start <= start && end <= r.end) {
            let (ram, advice) = (self.describe(), advice(start, end));
            return Err(BootError::OutsideRam { what, start, end, ram, advice });
        }
        self.taken.push((start..end, what));
        Ok(())
    }

    /// First address after everything taken in extended memory below 4 GiB.
    pub fn end_of_kernel(&self) -> u64 {
        self.taken.iter().map(|(r, _)| r.end).filter(|&e| e <= HOLE_END).max().unwrap_or(0).max(HIGH_MEMORY)
    }

    /// Takes `size` bytes of conventional memory at a multiple of the power of two `align`.
    pub fn low(&mut self, size: u64, align: u64, what: &'static str) -> Result<u64, BootError> {
        let place = self
            .upwards(size, align, LOW_START, EBDA)
            .or_else(|| self.upwards(size, align, LOW_FALLBACK, EBDA));
        let start = place.ok_or(BootError::NoRoom { what, size, from: LOW_FALLBACK, limit: EBDA })?;
        self.taken.push((start..start + size, what));
        Ok(start)
    }

    /// Takes the lowest free `size` bytes from `from` on in RAM below 4 GiB.
    pub fn above(&mut self, size: u64, align: u64, from: u64, what: &'static str) -> Result<u64, BootError> {
        let limit = super::e820::low_ram_end(self.mem);
        let start = self.upwards(size, align, from.max(HIGH_MEMORY), limit).ok_or(BootError::NoRoom {
            what,
            size,
            from,
            limit,
        })?;
        self.taken.push((start..start + size, what));
        Ok(start)
    }

    /// Takes the highest free `size` bytes below `limit` in extended memory below 4 GiB, page-aligned.
    pub fn below(&mut self, size: u64, limit: u64, what: &'static str) -> Result<u64, BootError> {
        let limit = limit.min(super::e820::low_ram_end(self.mem));
        let none = BootError::NoRoom { what, size, from: self.end_of_kernel(), limit };
        let mut end = limit;
        loop {
            let start = match end.checked_sub(size) {
                Some(start) if start & !0xfff >= HIGH_MEMORY => start & !0xfff,
                _ => return Err(none),
            };
            match self.conflict(&(start..start + size)) {
                None => {
                    self.taken.push((start..start + size, what));
                    return Ok(start);
                }
                Some(taken) => end = taken.start,
            }
        }
    }

    /// The lowest free place of `size` bytes in `from..limit`.
    fn upwards(&self, size: u64, align: u64, from: u64, limit: u64) -> Option<u64> {
        let mut at = align_up(from, align)?;
        loop {
            let end = at.checked_add(size)?;
            if end > limit {
                return None;
            }
            match self.conflict(&(at..end)) {
                None => return Some(at),
                Some(taken) => at = align_up(taken.end, align)?,
            }
        }
    }

    /// Something taken that overlaps `range`.
    fn conflict(&self, range: &Range<u64>) -> Option<&Range<u64>> {
        self.taken.iter().map(|(r, _)| r).find(|r| r.start < range.end && range.start < r.end)
    }

    /// The usable RAM in words, for messages.
    fn describe(&self) -> String {
        let ranges: Vec<_> = self.usable.iter().map(|r| format!("{:#x}..{:#x}", r.start, r.end)).collect();
        ranges.join(", ")
    }
}

/// What helps a kernel that is not in RAM.
fn advice(start: u64, end: u64) -> String {
    if start >= HIGH_MEMORY && end <= HOLE_START {
        format!("give the guest at least {} MiB of memory", end.div_ceil(1 << 20))
    } else {
        "relink the kernel to an address that is".to_owned()
    }
}

/// Writes page tables that map the first 4 GiB to themselves with 2 MiB pages (SDM 3A 4.5); the PML4 is at `base`.
pub(super) fn write_identity_map(mem: &GuestMemory, base: u64) -> Result<(), BootError> {
    const TABLE: u64 = 3; // present, writable
    const LARGE: u64 = 0x83; // and page size
    let mut tables = Vec::with_capacity(usize::try_from(PAGE_TABLE_BYTES).unwrap_or(0));
    let mut page = |entries: &mut dyn Iterator<Item = u64>| {
        let start = tables.len();
        entries.for_each(|e| tables.extend_from_slice(&e.to_le_bytes()));
        tables.resize(start + 4096, 0);
    };
    page(&mut std::iter::once((base + 0x1000) | TABLE));
    page(&mut (0..4).map(|i| (base + 0x2000 + i * 0x1000) | TABLE));
    for directory in 0..4 {
        page(&mut (0..512).map(|i| (directory << 30 | i << 21) | LARGE));
    }
    mem.write(Gpa(base), &tables)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_claims_avoid_the_kernel() {
        let mem = GuestMemory::new(1 << 20).unwrap();
        let mut claims = Claims::new(&mem);
        claims.kernel(0x1_0000, 0x8_0000, "kernel").unwrap();
        assert_eq!(claims.low(0x1000, 0x1000, "page").unwrap(), 0x9_0000);
        assert_eq!(claims.low(0xf000, 0x1000, "pages").unwrap(), 0x1000);
        assert!(matches!(claims.low(0xff00, 16, "big"), Err(BootError::NoRoom { .. })));
    }

    #[test]
    fn kernel_outside_usable_ram_is_refused() {
        let mem = GuestMemory::new(16 << 20).unwrap();
        let mut claims = Claims::new(&mem);
        for (start, size) in [
            (0x9_fb00, 0x200),
            (0xe_0000, 16),
            (0xff_f000, 0x1001),
            (16 << 20, 1),
            (u64::MAX, 1),
            (1 << 20, u64::MAX),
        ] {
            assert!(
                matches!(claims.kernel(start, size, "k"), Err(BootError::OutsideRam { .. })),
                "{start:#x}"
            );
        }
        claims.kernel(1 << 20, 15 << 20, "all").unwrap();
    }

    #[test]
    fn below_goes_under_what_is_taken() {
        let mem = GuestMemory::new(16 << 20).unwrap();
        let mut claims = Claims::new(&mem);
        claims.kernel(0xf0_0000, 0x10_0000, "kernel").unwrap();
        assert_eq!(claims.below(0x1001, u64::MAX, "initrd").unwrap(), 0xef_e000);
        assert_eq!(claims.below(0x1000, 0x80_0000, "low").unwrap(), 0x7f_f000);
        assert!(matches!(claims.below(15 << 20, u64::MAX, "big"), Err(BootError::NoRoom { .. })));
    }

    #[test]
    fn identity_map_translates_every_address_to_itself() {
        let mem = GuestMemory::new(1 << 20).unwrap();
        write_identity_map(&mem, 0x1_0000).unwrap();
        for va in [0u64, 0x1234_5678, 0xfee0_0000, 0xffff_ffff] {
            let entry =
                |table: u64, index: u64| mem.load_gpa::<u64>(Gpa((table & !0xfff) + index * 8)).unwrap();
            let pde = entry(entry(entry(0x1_0000, 0), va >> 30), va >> 21 & 511);
            assert_eq!(pde, va & !0x1f_ffff | 0x83);
        }
    }
}
