//! Linux bzImage: protocol 2.00 and later, loaded high (Linux `Documentation/arch/x86/boot.rst`).
//!
//! The file is a real-mode part (boot sector, setup header, setup code), which we only read, and a protected-mode
//! part, which we place and enter at its start (32-bit) or 200H behind it (64-bit).

use guestmem::{Gpa, HOLE_START};

use super::bytes::{align_up, array, u16_at, u32_at, u64_at};
use super::state::{Selectors, gpr};
use super::zeropage::{SETUP_HEADER, ZeroPage};
use super::{BootError, EntryMode, InitialState, Loader, Protocol, cmdline, e820, layout};

/// The file must reach to the end of the header's version for it to be recognised.
pub(super) const MIN_HEADER: usize = 0x208;
const SECTOR: usize = 512;
const LOADED_HIGH: u8 = 1;
/// `code32_start`, since protocol 2.00: where the setup code jumps in protected mode. Ours replaces it; a file that has
/// nothing there has no kernel but its real-mode code.
const CODE32_START: usize = 0x214;
const KEEP_SEGMENTS: u8 = 1 << 6;
const CAN_USE_HEAP: u8 = 1 << 7;
const XLF_KERNEL_64: u16 = 1;
/// The 64-bit entry's distance from the start of the protected-mode part.
const ENTRY_64: u64 = 0x200;
/// `initrd_addr_max` of kernels before protocol 2.03.
const OLD_INITRD_MAX: u32 = 0x37ff_ffff;
/// `cmdline_size` of kernels before protocol 2.06.
const OLD_CMDLINE_MAX: u32 = 255;

/// The fields of the setup header that matter, with the defaults of older protocols.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct SetupHeader<'a> {
    /// Protocol version, major in the high byte.
    version: u16,
    /// The header itself, from offset 1F1H.
    raw: &'a [u8],
    /// The protected-mode part.
    payload: &'a [u8],
    loadflags: u8,
    initrd_addr_max: u32,
    kernel_alignment: u64,
    relocatable: bool,
    xloadflags: u16,
    cmdline_size: u32,
    pref_address: Option<u64>,
    init_size: u64,
}

/// Whether the file has the boot flag and the setup header's magic.
pub(super) fn is_bzimage(image: &[u8]) -> bool {
    array(image, 0x202) == Some(*b"HdrS") && u16_at(image, 0x1fe) == Some(0xaa55)
}

fn malformed(what: &'static str, value: u64) -> BootError {
    BootError::Malformed { format: "Linux setup", what, value }
}

impl<'a> SetupHeader<'a> {
    /// Reads the header of a file that [`is_bzimage`].
    pub fn parse(image: &'a [u8]) -> Result<Self, BootError> {
        let cut = |what, needed: usize| BootError::Truncated {
            what,
            needed: needed as u64,
            len: image.len() as u64,
        };
        let setup_sects = match image.get(SETUP_HEADER) {
            Some(0) | None => 4,
            Some(&n) => usize::from(n),
        };
        let setup = (setup_sects + 1) * SECTOR;
        let short = || cut("the bzImage's setup part", setup);
        // Every field read below lies in the first two sectors.
        let payload = image.get(setup..).filter(|p| !p.is_empty()).ok_or_else(short)?;
        let version = u16_at(image, 0x206).ok_or_else(short)?;
        if !(0x200..0x300).contains(&version) {
            return Err(malformed("boot protocol version", version.into()));
        }
        let since = |v: u16| version >= v;
        let byte = |at: usize| image.get(at).copied().ok_or_else(short);
        let long = |at: usize| u32_at(image, at).ok_or_else(short);
        let alignment = if since(0x205) { u64::from(long(0x230)?) } else { 0 };
        let alignment = if alignment == 0 { 0x10_0000 } else { alignment };
        if !alignment.is_power_of_two() {
            return Err(malformed("kernel_alignment", alignment));
        }
        if since(0x204) {
            let paragraphs = usize::try_from(long(0x1f4)?).unwrap_or(usize::MAX);
            // The size is rounded up to paragraphs, the file need not be.
            let needed = paragraphs.saturating_mul(16).saturating_add(setup);
            if needed.saturating_sub(15) > image.len() {
                return Err(cut("the bzImage's protected-mode part", needed));
            }
        }
        let header_end = (0x202 + usize::from(byte(0x201)?)).clamp(0x228, setup);
        Ok(Self {
            version,
            raw: image.get(SETUP_HEADER..header_end).ok_or_else(short)?,
            payload,
            loadflags: byte(0x211)?,
            initrd_addr_max: if since(0x203) { long(0x22c)? } else { OLD_INITRD_MAX },
            kernel_alignment: alignment,
            relocatable: since(0x205) && byte(0x234)? != 0,
            xloadflags: if since(0x20c) { u16_at(image, 0x236).ok_or_else(short)? } else { 0 },
            cmdline_size: if since(0x206) { long(0x238)? } else { OLD_CMDLINE_MAX },
            pref_address: if since(0x20a) { u64_at(image, 0x258) } else { None },
            init_size: if since(0x20a) { long(0x260)?.into() } else { 0 },
        })
    }

    /// The file has a 64-bit entry (XLF_KERNEL_64).
    pub fn has_64bit_entry(&self) -> bool {
        self.xloadflags & XLF_KERNEL_64 != 0 && self.payload.len() as u64 > ENTRY_64
    }

    /// Where the protected-mode part goes, and the range it will use until it has told the kernel of its memory
    /// (`boot.rst`, `init_size`; a relocatable kernel moves itself up to `pref_address`).
    fn place(&self) -> Result<(u64, std::ops::Range<u64>), BootError> {
        let too_high = |address| malformed("preferred load address", address);
        let preferred = self.pref_address.unwrap_or(layout::HIGH_MEMORY);
        let load = if self.relocatable {
            align_up(preferred.max(layout::HIGH_MEMORY), self.kernel_alignment)
                .ok_or_else(|| too_high(preferred))?
        } else {
            layout::HIGH_MEMORY
        };
        let start = load.max(preferred);
        if start >= HOLE_START {
            return Err(too_high(start));
        }
        let file_end = load + self.payload.len() as u64;
        // Kernels that do not tell decompress themselves to a few times their size.
        let size = if self.init_size == 0 { self.payload.len() as u64 * 3 } else { self.init_size };
        Ok((load, load.min(start)..(start + size).max(file_end)))
    }
}

/// Places kernel, initrd, command line and zero page.
pub(super) fn load(mut loader: Loader<'_>, protocol: Protocol) -> Result<InitialState, BootError> {
    let source = loader.source;
    let header = SetupHeader::parse(&source.kernel)?;
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(BootError::Unsupported {
            what: "it is a zImage, which runs in the first 640 KiB",
            advice: "build the kernel as a bzImage",
        });
    }
    if u32_at(&source.kernel, CODE32_START) == Some(0) {
        return Err(BootError::Unsupported {
            what: "it has no protected-mode entry: it is real-mode code that calls a BIOS, and this machine has none",
            advice: "give a kernel that starts in protected mode: a Linux bzImage, an ELF or a multiboot image",
        });
    }
    let limit = usize::try_from(header.cmdline_size).unwrap_or(cmdline::MAX).min(cmdline::MAX);
    let text = cmdline::terminated(&source.cmdline, limit)?;
    let (at, runtime) = header.place()?;
    loader.claims.kernel(runtime.start, runtime.end - runtime.start, "the kernel (with its init_size)")?;
    loader.memory().write(Gpa(at), header.payload)?;
    let (initrd, initrd_size) = loader.put_initrd(u64::from(header.initrd_addr_max) + 1)?;

    let map = e820::memory_map(loader.memory(), loader.platform);
    let mut page = ZeroPage::new(&map, loader.platform, loader.rsdp);
    page.setup_header(header.raw);
    // Neither is ours to set: the first is for kernels with our segments, the second for the real-mode part.
    page.loadflags(header.loadflags & !(KEEP_SEGMENTS | CAN_USE_HEAP));
    page.code32_start(below_4g(at));
    page.ramdisk(below_4g(initrd), below_4g(initrd_size));
    let zero_page = loader.claims.low(page.bytes().len() as u64, 0x1000, "the zero page")?;
    let line = loader.put(&text, 16, "the command line")?;
    let old = if header.version < 0x202 { u16::try_from(line.wrapping_sub(zero_page)).ok() } else { None };
    page.command_line(below_4g(line), old);
    loader.memory().write(Gpa(zero_page), page.bytes())?;

    let (mode, entry) = match protocol {
        Protocol::Linux64 => (EntryMode::Long64, at + ENTRY_64),
        _ => (EntryMode::Protected32, at),
    };
    Ok(loader.enter(protocol, mode, Selectors::Linux, entry)?.with(gpr::RSI, zero_page))
}

/// An address that the claims have put below 4 GiB.
pub(super) fn below_4g(address: u64) -> u32 {
    debug_assert!(u32::try_from(address).is_ok(), "claimed below 4 GiB");
    u32::try_from(address).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    #[test]
    fn place_relocatable_kernel_at_preferred_address() {
        let image = samples::bzimage();
        let header = SetupHeader::parse(&image).unwrap();
        assert!(header.has_64bit_entry());
        assert_eq!(header.place().unwrap(), (0x100_0000, 0x100_0000..0x140_0000));
    }

    #[test]
    fn place_fixed_kernel_at_one_megabyte() {
        let mut image = samples::bzimage();
        image[0x234] = 0;
        let header = SetupHeader::parse(&image).unwrap();
        assert_eq!(header.place().unwrap(), (0x10_0000, 0x10_0000..0x140_0000));
    }

    #[test]
    fn parse_old_protocol_ignores_later_fields() {
        let mut image = samples::bzimage();
        image[0x206..0x208].copy_from_slice(&0x201u16.to_le_bytes());
        let header = SetupHeader::parse(&image).unwrap();
        assert!(!header.has_64bit_entry() && !header.relocatable);
        assert_eq!((header.initrd_addr_max, header.cmdline_size), (OLD_INITRD_MAX, OLD_CMDLINE_MAX));
        assert_eq!(
            header.place().unwrap(),
            (0x10_0000, 0x10_0000..0x10_0000 + header.payload.len() as u64 * 3)
        );
    }

    #[test]
    fn parse_truncated_anywhere_is_an_error() {
        let image = samples::bzimage();
        for len in MIN_HEADER..image.len() - 15 {
            let error = SetupHeader::parse(&image[..len]);
            assert!(matches!(error, Err(BootError::Truncated { .. })), "{len}: {error:?}");
        }
    }

    #[test]
    fn parse_bad_fields_are_errors() {
        for (at, value) in [(0x207, 9u8), (0x230, 3), (0x1f7, 0x7f)] {
            let mut image = samples::bzimage();
            image[at] = value;
            assert!(SetupHeader::parse(&image).is_err(), "{at:#x}");
        }
        let mut image = samples::bzimage();
        image[0x258..0x260].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(SetupHeader::parse(&image).unwrap().place().is_err());
    }
}
