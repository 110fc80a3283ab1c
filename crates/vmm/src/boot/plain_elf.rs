//! An ELF without any boot protocol's mark: entered where its header says.
//!
//! ELF64 is entered in 64-bit mode, ELF32 in 32-bit protected mode, with a Linux zero page in RSI, so that Linux's
//! `vmlinux` (whose entry follows the Linux protocol) boots as well.

use super::bzimage::below_4g;
use super::state::{Selectors, gpr};
use super::zeropage::ZeroPage;
use super::{BootError, EntryMode, InitialState, Loader, Protocol, cmdline, e820, elf};

/// Linux's COMMAND_LINE_SIZE on x86, less the terminating zero.
const CMDLINE_MAX: u16 = 2047;

/// Places segments, initrd, command line and zero page.
pub(super) fn load(mut loader: Loader<'_>) -> Result<InitialState, BootError> {
    let source = loader.source;
    let elf = elf::Elf::parse(&source.kernel)?;
    if elf.is_user_program {
        return Err(BootError::Unsupported {
            what: "it is a program for Linux, not a kernel",
            advice: "give a Linux bzImage, a kernel in ELF or a multiboot image",
        });
    }
    let entry = elf.checked_entry()?;
    let text = cmdline::terminated(&source.cmdline, CMDLINE_MAX.into())?;
    loader.put_segments(&elf)?;
    let (initrd, initrd_size) = loader.put_initrd(u64::MAX)?;
    let line = loader.put(&text, 16, "the command line")?;
    let map = e820::memory_map(loader.memory(), loader.platform);
    let mut page = ZeroPage::new(&map, loader.platform, loader.rsdp);
    page.own_setup_header(CMDLINE_MAX.into());
    page.ramdisk(below_4g(initrd), below_4g(initrd_size));
    page.command_line(below_4g(line), None);
    let zero_page = loader.put(page.bytes(), 0x1000, "the zero page")?;
    let mode = if elf.class64 { EntryMode::Long64 } else { EntryMode::Protected32 };
    Ok(loader.enter(Protocol::Elf, mode, Selectors::Linux, entry)?.with(gpr::RSI, zero_page))
}
