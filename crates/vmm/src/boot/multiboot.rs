//! Multiboot 0.6.96: a 32-bit kernel with a marked header in its first 8 KiB, entered in protected mode without
//! paging, EAX holding the loader's magic and EBX the address of the information structure.
//!
//! The image is an ELF (of either class; ELF64 is entered in 32-bit mode too, as GRUB does), or anything whose header
//! has the load addresses ("a.out kludge", flag 16), which then count instead of the ELF headers.

use guestmem::Gpa;

use super::bytes::u32_at;
use super::bzimage::below_4g;
use super::state::{Selectors, gpr};
use super::{BootError, EntryMode, InitialState, Loader, Protocol, cmdline, e820, elf, layout};

/// The header lies within this many bytes of the file (3.1).
const SEARCH: usize = 8192;
const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u64 = 0x2bad_b002;
/// Header flags 0 to 15 are requirements (3.1.2): page-aligned modules, memory information, video mode. We always
/// give the first two; without VGA there is no video information, which a kernel must bear.
const KNOWN_REQUIREMENTS: u32 = 0b111;
const REQUIREMENTS: u32 = 0xffff;
const HAS_ADDRESSES: u32 = 1 << 16;

const INFO_MEMORY: u32 = 1 << 0;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
const INFO_FRAMEBUFFER: u32 = 1 << 12;
/// The information structure (3.3) with the framebuffer fields.
const INFO_BYTES: usize = 120;
const MMAP_ENTRY_BYTES: u32 = 24;
const LOADER_NAME: &str = "trellis";
/// Modules always begin at a page, asked for or not.
const MODULE_ALIGN: u64 = 0x1000;

/// The header of a multiboot image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Header {
    /// Where it stands in the file.
    offset: usize,
    flags: u32,
    /// header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr: valid with flag 16.
    addresses: [u32; 5],
}

impl Header {
    /// The header tells where the image is to be loaded.
    pub fn has_addresses(&self) -> bool {
        self.flags & HAS_ADDRESSES != 0
    }
}

/// The first header with a right checksum at a multiple of 4.
pub(super) fn find_header(image: &[u8]) -> Option<Header> {
    let window = &image[..image.len().min(SEARCH)];
    (0..window.len()).step_by(4).find_map(|offset| {
        let word = |i: usize| u32_at(window, offset + 4 * i);
        if word(0)? != HEADER_MAGIC || word(0)?.wrapping_add(word(1)?).wrapping_add(word(2)?) != 0 {
            return None;
        }
        let flags = word(1)?;
        let mut addresses = [0; 5];
        if flags & HAS_ADDRESSES != 0 {
            for (i, address) in addresses.iter_mut().enumerate() {
                *address = word(3 + i)?;
            }
        }
        Some(Header { offset, flags, addresses })
    })
}

/// Places the image, modules and information.
pub(super) fn load(mut loader: Loader<'_>) -> Result<InitialState, BootError> {
    let source = loader.source;
    let missing = BootError::NotAKernel { found: "no multiboot header in the first 8 KiB" };
    let header = find_header(&source.kernel).ok_or(missing)?;
    if header.flags & REQUIREMENTS & !KNOWN_REQUIREMENTS != 0 {
        return Err(malformed("flags (asking for unknown features)", header.flags));
    }
    let entry = if header.has_addresses() {
        put_raw(&mut loader, &header)?
    } else {
        let elf = elf::Elf::parse(&source.kernel)?;
        loader.put_segments(&elf)?;
        elf.checked_entry()?
    };
    let info = put_info(&mut loader)?;
    let state = loader.enter(Protocol::Multiboot, EntryMode::Protected32, Selectors::Plain, entry)?;
    Ok(state.with(gpr::RAX, LOADER_MAGIC).with(gpr::RBX, info))
}

fn malformed(what: &'static str, value: u32) -> BootError {
    BootError::Malformed { format: "multiboot", what, value: value.into() }
}

/// Loads the image by the header's addresses (3.1.3); its entry point.
fn put_raw(loader: &mut Loader<'_>, header: &Header) -> Result<u64, BootError> {
    let image = &loader.source.kernel;
    let [header_addr, load_addr, load_end, bss_end, entry] = header.addresses;
    let before = header_addr.checked_sub(load_addr).ok_or_else(|| malformed("load_addr", load_addr))?;
    let first = usize::try_from(before).ok().and_then(|before| header.offset.checked_sub(before));
    let first = first.ok_or_else(|| malformed("header_addr", header_addr))?;
    let end = if load_end == 0 {
        image.len()
    } else {
        let len = load_end.checked_sub(load_addr).ok_or_else(|| malformed("load_end_addr", load_end))?;
        usize::try_from(len).map_or(usize::MAX, |len| first.saturating_add(len))
    };
    let data = image.get(first..end).ok_or(BootError::Truncated {
        what: "the multiboot image",
        needed: end as u64,
        len: image.len() as u64,
    })?;
    let start = u64::from(load_addr);
    let data_end = start + data.len() as u64;
    let total_end = data_end.max(bss_end.into());
    if !(start..total_end).contains(&entry.into()) {
        return Err(malformed("entry_addr", entry));
    }
    loader.claims.kernel(start, total_end - start, "the multiboot kernel")?;
    loader.memory().write(Gpa(start), data)?;
    loader.memory().fill(Gpa(data_end), total_end - data_end, 0)?;
    Ok(entry.into())
}

/// Writes the information structure (3.3) and what it points to; its address.
fn put_info(loader: &mut Loader<'_>) -> Result<u64, BootError> {
    let source = loader.source;
    let (modules, count) = put_modules(loader)?;
    let text = match &source.kernel_name[..] {
        "" => source.cmdline.clone(),
        name if source.cmdline.is_empty() => name.to_owned(),
        name => format!("{name} {}", source.cmdline),
    };
    let cmdline = loader.put(&cmdline::terminated(&text, cmdline::MAX)?, 16, "the command line")?;
    let name = loader.put(&cmdline::terminated(LOADER_NAME, cmdline::MAX)?, 16, "the boot loader's name")?;
    let map = e820::memory_map(loader.memory(), loader.platform);
    let mut entries = Vec::new();
    for entry in &map {
        entries.extend_from_slice(&(MMAP_ENTRY_BYTES - 4).to_le_bytes());
        entries.extend_from_slice(&entry.start.to_le_bytes());
        entries.extend_from_slice(&entry.len_bytes().to_le_bytes());
        entries.extend_from_slice(&(entry.kind as u32).to_le_bytes());
    }
    let memory_map = loader.put(&entries, 16, "the memory map")?;

    let mut info = [0; INFO_BYTES];
    let mut put = |at: usize, value: u32| info[at..at + 4].copy_from_slice(&value.to_le_bytes());
    let high = e820::low_ram_end(loader.memory()).saturating_sub(layout::HIGH_MEMORY);
    let mut flags = INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME;
    put(4, below_4g(layout::EBDA >> 10));
    put(8, below_4g(high >> 10));
    put(16, below_4g(cmdline));
    put(20, count);
    put(24, below_4g(modules));
    put(44, below_4g(entries.len() as u64));
    put(48, below_4g(memory_map));
    put(64, below_4g(name));
    if loader.platform.vga {
        flags |= INFO_FRAMEBUFFER; // EGA text, 80 by 25, 16 bits a cell
        put(88, 0xb_8000);
        put(96, 160);
        put(100, 80);
        put(104, 25);
        put(108, 2 << 8 | 16); // framebuffer_type, framebuffer_bpp
    }
    put(0, flags);
    loader.put(&info, 16, "the multiboot information")
}

/// Places the modules behind the kernel, page-aligned, and their list; its address and length.
fn put_modules(loader: &mut Loader<'_>) -> Result<(u64, u32), BootError> {
    let source = loader.source;
    let mut list = Vec::new();
    let mut count = 0;
    for (data, text) in source.all_modules() {
        let from = loader.claims.end_of_kernel();
        let at = loader.claims.above(data.len() as u64, MODULE_ALIGN, from, "the module")?;
        loader.memory().write(Gpa(at), data)?;
        let text = loader.put(&cmdline::terminated(text, cmdline::MAX)?, 1, "a module's command line")?;
        for field in [at, at + data.len() as u64, text, 0] {
            list.extend_from_slice(&below_4g(field).to_le_bytes());
        }
        count += 1;
    }
    if count == 0 {
        return Ok((0, 0));
    }
    Ok((loader.put(&list, 16, "the module list")?, count))
}
