//! ELF executables for x86 (System V gABI chapters 4 and 5): headers, loadable segments, notes.

use super::BootError;
use super::bytes::{align_up, array, u16_at, u32_at, u64_at};

const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
/// Owner and type of the note with the 32-bit entry point (Xen `elfnote.h`).
const XEN_OWNER: &[u8] = b"Xen\0";
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// A part of the file to be placed in memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Segment<'a> {
    /// Physical address.
    pub paddr: u64,
    /// Virtual address.
    pub vaddr: u64,
    /// The bytes from the file.
    pub data: &'a [u8],
    /// Bytes in memory, at least as many; the rest is zero.
    pub size: u64,
}

/// A checked ELF file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Elf<'a> {
    /// ELFCLASS64 rather than ELFCLASS32.
    pub class64: bool,
    /// `e_entry` as it stands in the file.
    pub entry: u64,
    /// The non-empty PT_LOAD segments.
    pub segments: Vec<Segment<'a>>,
    /// Address in the Xen PHYS32_ENTRY note.
    pub pvh_entry: Option<u64>,
    /// It asks for a dynamic loader in /lib: a program for an operating system. (FreeBSD's kernels name `/red/herring`.)
    pub is_user_program: bool,
}

/// One program header, widened to 64 bits.
struct ProgramHeader {
    kind: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    file_size: u64,
    mem_size: u64,
    align: u64,
}

/// Whether the file claims to be ELF.
pub(super) fn is_elf(image: &[u8]) -> bool {
    image.starts_with(b"\x7fELF")
}

fn malformed(what: &'static str, value: u64) -> BootError {
    BootError::Malformed { format: "ELF", what, value }
}

fn truncated(image: &[u8], what: &'static str, needed: u64) -> BootError {
    BootError::Truncated { what, needed, len: image.len() as u64 }
}

impl<'a> Elf<'a> {
    /// Reads the headers and finds the segments.
    pub fn parse(image: &'a [u8]) -> Result<Self, BootError> {
        let header = || truncated(image, "the ELF header", 64);
        let [_, _, _, _, class, data, ..] = array::<16>(image, 0).ok_or_else(header)?;
        let class64 = match class {
            1 => false,
            2 => true,
            other => return Err(malformed("class", other.into())),
        };
        if data != 1 {
            return Err(malformed("byte order", data.into()));
        }
        let kind = u16_at(image, 16).ok_or_else(header)?;
        if kind != ET_EXEC && kind != ET_DYN {
            return Err(malformed("file type (neither executable nor position-independent)", kind.into()));
        }
        let machine = u16_at(image, 18).ok_or_else(header)?;
        // Some 32-bit kernels are linked by 64-bit tools that only change the class.
        if machine != EM_X86_64 && (class64 || machine != EM_386) {
            return Err(malformed("machine", machine.into()));
        }
        let (entry, table, sizes) = if class64 {
            (u64_at(image, 24), u64_at(image, 32), 54)
        } else {
            (u32_at(image, 24).map(u64::from), u32_at(image, 28).map(u64::from), 42)
        };
        let (entry, table) = (entry.ok_or_else(header)?, table.ok_or_else(header)?);
        let entry_size = u16_at(image, sizes).ok_or_else(header)?;
        let count = u16_at(image, sizes + 2).ok_or_else(header)?;
        let mut elf = Self { class64, entry, segments: Vec::new(), pvh_entry: None, is_user_program: false };
        for index in 0..u64::from(count) {
            elf.add(image, &program_header(image, class64, table, entry_size, index)?)?;
        }
        if elf.segments.is_empty() {
            return Err(malformed("number of loadable segments", 0));
        }
        Ok(elf)
    }

    fn add(&mut self, image: &'a [u8], header: &ProgramHeader) -> Result<(), BootError> {
        match header.kind {
            PT_LOAD if header.mem_size > 0 => {
                if header.file_size > header.mem_size {
                    return Err(malformed("segment size in memory (less than in the file)", header.mem_size));
                }
                let data = contents(image, header, "a loadable ELF segment")?;
                let (paddr, vaddr, size) = (header.paddr, header.vaddr, header.mem_size);
                self.segments.push(Segment { paddr, vaddr, data, size });
            }
            PT_INTERP => {
                let path = contents(image, header, "the ELF interpreter's name")?;
                self.is_user_program |= path.starts_with(b"/lib");
            }
            PT_NOTE if self.pvh_entry.is_none() => {
                let notes = contents(image, header, "the ELF note segment")?;
                self.pvh_entry = find_pvh_entry(notes, if header.align == 8 { 8 } else { 4 });
            }
            _ => {}
        }
        Ok(())
    }

    /// The physical address of the entry point: `e_entry` is a virtual address, so the segment that contains it
    /// tells; some kernels (Linux) put a physical address there, which no segment's virtual range contains.
    pub fn physical_entry(&self) -> u64 {
        let inside = |s: &&Segment| self.entry.checked_sub(s.vaddr).is_some_and(|offset| offset < s.size);
        match self.segments.iter().find(inside) {
            Some(s) => s.paddr.wrapping_add(self.entry - s.vaddr),
            None => self.entry,
        }
    }

    /// The physical entry point, which must lie in a segment and below 4 GiB.
    pub fn checked_entry(&self) -> Result<u64, BootError> {
        self.check_entry(self.physical_entry())
    }

    /// `entry`, if it lies in a segment and below 4 GiB.
    pub fn check_entry(&self, entry: u64) -> Result<u64, BootError> {
        let inside = |s: &Segment| entry.checked_sub(s.paddr).is_some_and(|offset| offset < s.size);
        if entry > u64::from(u32::MAX) || !self.segments.iter().any(inside) {
            return Err(malformed("entry point (in no loadable segment below 4 GiB)", entry));
        }
        Ok(entry)
    }
}

fn program_header(
    image: &[u8],
    class64: bool,
    table: u64,
    entry_size: u16,
    index: u64,
) -> Result<ProgramHeader, BootError> {
    let minimum = if class64 { 56 } else { 32 };
    if u64::from(entry_size) < minimum {
        return Err(malformed("program header size", entry_size.into()));
    }
    let start = table.saturating_add(index * u64::from(entry_size));
    let cut = || truncated(image, "the ELF program header table", start.saturating_add(minimum));
    let at = usize::try_from(start).map_err(|_| cut())?;
    let field = |o64: usize, o32: usize| {
        let value = if class64 {
            u64_at(image, at.saturating_add(o64))
        } else {
            u32_at(image, at.saturating_add(o32)).map(u64::from)
        };
        value.ok_or_else(cut)
    };
    Ok(ProgramHeader {
        kind: u32_at(image, at).ok_or_else(cut)?,
        offset: field(8, 4)?,
        vaddr: field(16, 8)?,
        paddr: field(24, 12)?,
        file_size: field(32, 16)?,
        mem_size: field(40, 20)?,
        align: field(48, 28)?,
    })
}

fn contents<'a>(image: &'a [u8], header: &ProgramHeader, what: &'static str) -> Result<&'a [u8], BootError> {
    let end = header.offset.saturating_add(header.file_size);
    let range = usize::try_from(header.offset).ok().zip(usize::try_from(end).ok());
    range.and_then(|(start, end)| image.get(start..end)).ok_or_else(|| truncated(image, what, end))
}

/// The address in the first XEN_ELFNOTE_PHYS32_ENTRY note; name and descriptor are padded to `align` bytes.
fn find_pvh_entry(notes: &[u8], align: u64) -> Option<u64> {
    let mut rest = notes;
    while let (Some(name_size), Some(size), Some(kind)) = (u32_at(rest, 0), u32_at(rest, 4), u32_at(rest, 8))
    {
        let padded = |at: usize, len: u32| {
            usize::try_from(align_up((at as u64).checked_add(u64::from(len))?, align)?).ok()
        };
        let name = rest.get(12..12usize.checked_add(usize::try_from(name_size).ok()?)?)?;
        let start = padded(12, name_size)?;
        let descriptor = rest.get(start..start.checked_add(usize::try_from(size).ok()?)?)?;
        if name == XEN_OWNER && kind == XEN_ELFNOTE_PHYS32_ENTRY {
            return match descriptor.len() {
                4 => u32_at(descriptor, 0).map(u64::from),
                _ => u64_at(descriptor, 0),
            };
        }
        rest = rest.get(padded(start, size)?..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::super::samples::{self, PAYLOAD};
    use super::*;

    #[test]
    fn parse_both_classes_finds_segment_and_entry() {
        for class64 in [false, true] {
            let image = samples::elf(class64, 0x20_0000, false);
            let elf = Elf::parse(&image).unwrap();
            assert_eq!(elf.class64, class64);
            assert_eq!(elf.segments.len(), 1);
            assert_eq!((elf.segments[0].paddr, elf.segments[0].size), (0x20_0000, 0x2000));
            assert!(elf.segments[0].data.ends_with(PAYLOAD));
            assert_eq!((elf.checked_entry().unwrap(), elf.pvh_entry), (0x20_0000 + 0x10, None));
        }
    }

    #[test]
    fn parse_with_note_finds_pvh_entry() {
        for class64 in [false, true] {
            let image = samples::elf(class64, 0x20_0000, true);
            assert_eq!(Elf::parse(&image).unwrap().pvh_entry, Some(0x20_0020));
        }
    }

    #[test]
    fn physical_entry_of_higher_half_kernel_is_translated() {
        let image = samples::elf(true, 0x20_0000, false);
        let mut elf = Elf::parse(&image).unwrap();
        elf.segments[0].vaddr = 0xffff_ffff_8020_0000;
        elf.entry = 0xffff_ffff_8020_0040;
        assert_eq!(elf.checked_entry().unwrap(), 0x20_0040);
        elf.entry = 0x20_0080;
        assert_eq!(elf.checked_entry().unwrap(), 0x20_0080);
        elf.entry = 0x10;
        assert!(matches!(elf.checked_entry(), Err(BootError::Malformed { .. })));
    }

    #[test]
    fn parse_truncated_anywhere_is_an_error() {
        for class64 in [false, true] {
            let image = samples::elf(class64, 0x20_0000, true);
            for len in 0..image.len() {
                assert!(Elf::parse(&image[..len]).is_err(), "{len}");
            }
        }
    }

    #[test]
    fn find_pvh_entry_in_nonsense_ends() {
        assert_eq!(find_pvh_entry(&[0xff; 64], 4), None);
        assert_eq!(find_pvh_entry(&[0; 64], 4), None);
    }
}
