//! Starting a kernel without firmware: recognise what it is, place it and what it needs in guest memory, and say how
//! the bootstrap processor's registers stand at its first instruction.
//!
//! Way of the data: [`BootSource`] → `recognise` → one loader (`bzimage`, `pvh`, `elf`, `multiboot`) →
//! guest memory and [`InitialState`] → the vCPU. [`load`] also writes the tables of [`crate::firmware`].
//!
//! Which protocol: a bzImage is started by the Linux protocol, in 64-bit mode where it has such an entry; an ELF with
//! Xen's PVH note by PVH; else an image with a multiboot header by multiboot; else an ELF is entered where it says.
//! [`BootSource::protocol`] overrides that.
//!
//! Every byte of kernel and initrd is untrusted: fields are read with bounds checks and added with overflow checks,
//! and whatever does not fit is a [`BootError`]. The same memory may be loaded again after a reset: nothing relies
//! on memory being zero.

mod bytes;
mod bzimage;
mod cmdline;
pub mod e820;
mod elf;
mod error;
pub mod layout;
mod multiboot;
mod plain_elf;
mod pvh;
#[cfg(test)]
mod samples;
pub mod state;
mod zeropage;

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::sync::Arc;

use guestmem::{Gpa, GuestMemory};

pub use error::BootError;
pub use state::{EntryMode, InitialState, SegmentState, Segments, TableRegister};

use layout::{Claims, PAGE_TABLE_BYTES};
use state::{Environment, GDT_BYTES, Selectors};

/// More CPUs than this do not fit in the tables.
pub const MAX_CPUS: u32 = 16;
/// ACPI and MP tables lie below 1 MiB.
const MIN_MEMORY: u64 = layout::HIGH_MEMORY;
const STACK_BYTES: u64 = 0x1000;

/// A boot protocol.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Protocol {
    /// Linux bzImage, 64-bit entry (`boot.rst`, "64-bit Boot Protocol").
    Linux64,
    /// Linux bzImage, 32-bit entry (`boot.rst`, "32-bit Boot Protocol").
    Linux32,
    /// Xen's PVH entry: 32-bit, `hvm_start_info` in EBX (`xen/include/public/arch-x86/hvm/start_info.h`).
    Pvh,
    /// ELF at its own entry point: 64-bit or 32-bit mode by its class, a Linux zero page in RSI.
    Elf,
    /// Multiboot 0.6.96: 32-bit, information structure in EBX.
    Multiboot,
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Linux64 => "Linux 64-bit",
            Self::Linux32 => "Linux 32-bit",
            Self::Pvh => "PVH",
            Self::Elf => "ELF",
            Self::Multiboot => "multiboot",
        })
    }
}

/// A file for the kernel beside its initrd.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Module {
    /// Contents.
    pub data: Vec<u8>,
    /// Its own command line.
    pub cmdline: String,
}

/// What to boot.
#[derive(Clone, Debug, Default)]
pub struct BootSource {
    /// The kernel file.
    pub kernel: Vec<u8>,
    /// The regular file that `kernel` was read from: it is read again at a reset, and not kept in memory meanwhile.
    pub kernel_file: Option<Arc<File>>,
    /// What multiboot kernels get as the first word of their command line, as other loaders do it: the file's name.
    pub kernel_name: String,
    /// Initial RAM disk; for multiboot and PVH the first module.
    pub initrd: Option<Vec<u8>>,
    /// Further modules (multiboot, PVH).
    pub modules: Vec<Module>,
    /// Command line without the kernel's name.
    pub cmdline: String,
    /// Use this protocol rather than the preferred one.
    pub protocol: Option<Protocol>,
}

impl BootSource {
    /// Lets go of what can be read again.
    pub(crate) fn let_go(&mut self) {
        if self.kernel_file.is_some() {
            self.kernel = Vec::new();
        }
    }

    /// Reads again what was let go.
    pub(crate) fn recall(&mut self) -> Result<(), BootError> {
        if let (Some(file), true) = (&self.kernel_file, self.kernel.is_empty()) {
            let mut file = &**file;
            let read = file.rewind().and_then(|()| file.read_to_end(&mut self.kernel));
            read.map_err(|error| BootError::Again(error.to_string()))?;
        }
        Ok(())
    }

    /// The initrd, then the other modules, with their command lines.
    fn all_modules(&self) -> impl Iterator<Item = (&[u8], &str)> {
        let initrd = self.initrd.iter().map(|data| (&data[..], ""));
        initrd.chain(self.modules.iter().map(|m| (&m.data[..], &m.cmdline[..])))
    }
}

/// Memory-mapped PCI configuration space of segment 0, buses 0 to `buses` - 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Ecam {
    /// First address, a multiple of 1 MiB in the hole below 4 GiB and outside the PCI memory window.
    pub base: u64,
    /// Number of buses, 1 MiB each.
    pub buses: u8,
}

impl Ecam {
    /// Length of the window.
    #[must_use]
    pub const fn len_bytes(&self) -> u64 {
        (self.buses as u64) << 20
    }
}

/// What the guest's tables say of the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Platform {
    /// Number of CPUs, 1 to [`MAX_CPUS`]; APIC identifiers count from 0.
    pub cpus: u32,
    /// There is a VGA adapter in text mode 3.
    pub vga: bool,
    /// Configuration space in memory.
    pub ecam: Option<Ecam>,
}

impl Default for Platform {
    fn default() -> Self {
        Self { cpus: 1, vga: true, ecam: None }
    }
}

/// Writes firmware tables, kernel, initrd and boot information to `mem`.
///
/// # Errors
/// When a file is not what it should be or does not fit; `mem` may then be partly written.
pub fn load(mem: &GuestMemory, source: &BootSource, platform: &Platform) -> Result<InitialState, BootError> {
    let have = mem.len_bytes();
    if have < MIN_MEMORY {
        return Err(BootError::MemoryTooSmall { have, needed: MIN_MEMORY });
    }
    if !(1..=MAX_CPUS).contains(&platform.cpus) {
        return Err(BootError::Cpus { cpus: platform.cpus, max: MAX_CPUS });
    }
    let protocol = recognise(source)?;
    let rsdp = crate::firmware::write(mem, platform)?;
    let loader = Loader { source, platform, rsdp, claims: Claims::new(mem) };
    match protocol {
        Protocol::Linux64 | Protocol::Linux32 => bzimage::load(loader, protocol),
        Protocol::Pvh => pvh::load(loader),
        Protocol::Elf => plain_elf::load(loader),
        Protocol::Multiboot => multiboot::load(loader),
    }
}

/// The protocol to use for a kernel file.
///
/// # Errors
/// When the file is no kernel, or does not offer the protocol that was asked for.
pub fn recognise(source: &BootSource) -> Result<Protocol, BootError> {
    let image = &source.kernel[..];
    let offered = offers(image)?;
    match source.protocol {
        None => Ok(offered[0]),
        Some(wanted) if offered.contains(&wanted) => Ok(wanted),
        Some(wanted) => Err(BootError::Protocol { wanted, offers: describe(&offered) }),
    }
}

/// The protocols that the file offers, the preferred one first; never empty.
fn offers(image: &[u8]) -> Result<Vec<Protocol>, BootError> {
    if image.is_empty() {
        return Err(BootError::Empty);
    }
    if bzimage::is_bzimage(image) {
        let header = bzimage::SetupHeader::parse(image)?;
        return Ok(if header.has_64bit_entry() {
            vec![Protocol::Linux64, Protocol::Linux32]
        } else {
            vec![Protocol::Linux32]
        });
    }
    let multiboot = multiboot::find_header(image);
    if elf::is_elf(image) {
        // A multiboot image with the a.out fields need not be a proper ELF.
        return match (elf::Elf::parse(image), multiboot) {
            (Ok(elf), multiboot) => {
                let mut offered = Vec::new();
                offered.extend(elf.pvh_entry.map(|_| Protocol::Pvh));
                offered.extend(multiboot.map(|_| Protocol::Multiboot));
                offered.push(Protocol::Elf);
                Ok(offered)
            }
            (Err(_), Some(header)) if header.has_addresses() => Ok(vec![Protocol::Multiboot]),
            (Err(error), _) => Err(error),
        };
    }
    match multiboot {
        Some(header) if header.has_addresses() => Ok(vec![Protocol::Multiboot]),
        Some(_) => {
            Err(BootError::NotAKernel { found: "a multiboot header, but no ELF and no load addresses in it" })
        }
        None => Err(unknown(image)),
    }
}

fn describe(offered: &[Protocol]) -> &'static str {
    match offered {
        [Protocol::Linux64, ..] => "Linux (64-bit and 32-bit)",
        [Protocol::Linux32, ..] => "Linux (32-bit)",
        [Protocol::Pvh, Protocol::Multiboot, ..] => "PVH, multiboot and ELF",
        [Protocol::Pvh, ..] => "PVH and ELF",
        [Protocol::Multiboot, Protocol::Elf] => "multiboot and ELF",
        [Protocol::Multiboot, ..] => "multiboot",
        _ => "ELF",
    }
}

/// What a file that is no kernel looks like.
fn unknown(image: &[u8]) -> BootError {
    const COMPRESSED: [(&[u8], &str, &str); 6] = [
        (b"\x1f\x8b", "gzip", "gunzip"),
        (b"\xfd7zXZ\0", "xz", "unxz"),
        (b"BZh", "bzip2", "bunzip2"),
        (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
        (b"\x02\x21\x4c\x18", "lz4", "unlz4"),
        (b"\x04\x22\x4d\x18", "lz4", "unlz4"),
    ];
    const KNOWN: [(&[u8], &str); 6] = [
        (b"MZ", "it looks like an EFI or DOS program"),
        (b"#!", "it looks like a script"),
        (b"070701", "it looks like an initramfs (cpio archive)"),
        (b"!<arch>\n", "it looks like an archive or a Debian package"),
        (b"QFI\xfb", "it looks like a qcow2 disk image"),
        (b"\x27\x05\x19\x56", "it looks like a U-Boot image"),
    ];
    if let Some(&(_, format, tool)) = COMPRESSED.iter().find(|(magic, ..)| image.starts_with(magic)) {
        return BootError::Compressed { format, tool };
    }
    if let Some(&(_, found)) = KNOWN.iter().find(|(magic, _)| image.starts_with(magic)) {
        return BootError::NotAKernel { found };
    }
    if image.len() < bzimage::MIN_HEADER {
        return BootError::TooShort { len: image.len() };
    }
    let found = if image.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) {
        "it looks like a boot sector or disk image (give a disk image with --disk)"
    } else {
        "no Linux setup header, ELF magic or multiboot header found"
    };
    BootError::NotAKernel { found }
}

/// What every loader works with.
struct Loader<'a> {
    source: &'a BootSource,
    platform: &'a Platform,
    /// Address of the ACPI root pointer.
    rsdp: u64,
    claims: Claims<'a>,
}

impl Loader<'_> {
    fn memory(&self) -> &GuestMemory {
        self.claims.memory()
    }

    /// Places boot information in conventional memory.
    fn put(&mut self, data: &[u8], align: u64, what: &'static str) -> Result<u64, BootError> {
        let at = self.claims.low(data.len() as u64, align, what)?;
        self.memory().write(Gpa(at), data)?;
        Ok(at)
    }

    /// Takes the memory of an ELF's segments and fills it.
    fn put_segments(&mut self, elf: &elf::Elf<'_>) -> Result<(), BootError> {
        for segment in &elf.segments {
            self.claims.kernel(segment.paddr, segment.size, "the kernel's ELF segment")?;
        }
        for segment in &elf.segments {
            let mem = self.memory();
            mem.write(Gpa(segment.paddr), segment.data)?;
            let zero = segment.size - segment.data.len() as u64;
            mem.fill(Gpa(segment.paddr + segment.data.len() as u64), zero, 0)?;
        }
        Ok(())
    }

    /// Places the initrd as high as possible below `limit`; its address and size, or zeros.
    fn put_initrd(&mut self, limit: u64) -> Result<(u64, u64), BootError> {
        let Some(initrd) = self.source.initrd.as_deref().filter(|i| !i.is_empty()) else { return Ok((0, 0)) };
        let at = self.claims.below(initrd.len() as u64, limit, "the initrd")?;
        self.memory().write(Gpa(at), initrd)?;
        Ok((at, initrd.len() as u64))
    }

    /// GDT, stack and, for 64-bit mode, page tables; then the registers.
    fn enter(
        &mut self,
        protocol: Protocol,
        mode: EntryMode,
        selectors: Selectors,
        rip: u64,
    ) -> Result<InitialState, BootError> {
        let gdt = self.claims.low(GDT_BYTES.into(), 16, "the GDT")?;
        let stack = self.claims.low(STACK_BYTES, 16, "the boot stack")? + STACK_BYTES;
        let mut pml4 = 0;
        if mode == EntryMode::Long64 {
            pml4 = self.claims.low(PAGE_TABLE_BYTES, 0x1000, "the boot page tables")?;
            layout::write_identity_map(self.memory(), pml4)?;
        }
        let state = InitialState::new(protocol, mode, selectors, rip, Environment { gdt, stack, pml4 });
        self.memory().write(Gpa(gdt), &state.gdt())?;
        Ok(state)
    }
}

#[cfg(test)]
mod tests;
