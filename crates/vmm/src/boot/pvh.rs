//! Xen's PVH direct boot: an ELF with a PHYS32_ENTRY note is entered in 32-bit protected mode without paging, EBX
//! pointing to `hvm_start_info` version 1 (Xen `docs/misc/pvh.pandoc`, `public/arch-x86/hvm/start_info.h`).

use guestmem::Gpa;

use super::state::{Selectors, gpr};
use super::{BootError, EntryMode, InitialState, Loader, Protocol, cmdline, e820, elf};

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;

/// Places segments, modules and start information.
pub(super) fn load(mut loader: Loader<'_>) -> Result<InitialState, BootError> {
    let source = loader.source;
    let elf = elf::Elf::parse(&source.kernel)?;
    let missing = BootError::Protocol { wanted: Protocol::Pvh, offers: "ELF" };
    let entry = elf.check_entry(elf.pvh_entry.ok_or(missing)?)?;
    let text = cmdline::terminated(&source.cmdline, cmdline::MAX)?;
    loader.put_segments(&elf)?;
    let (modules, module_count) = put_modules(&mut loader)?;
    let cmdline = loader.put(&text, 16, "the command line")?;
    let map = e820::memory_map(loader.memory(), loader.platform);
    let mut entries = Vec::new();
    for entry in &map {
        entries.extend_from_slice(&entry.start.to_le_bytes());
        entries.extend_from_slice(&entry.len_bytes().to_le_bytes());
        entries.extend_from_slice(&u64::from(entry.kind as u32).to_le_bytes()); // type, reserved
    }
    let memmap = loader.put(&entries, 16, "the memory map")?;
    let mut info = Vec::new();
    for word in [MAGIC, VERSION, 0, module_count] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    for address in [modules, cmdline, loader.rsdp, memmap] {
        info.extend_from_slice(&address.to_le_bytes());
    }
    info.extend_from_slice(&(map.len() as u64).to_le_bytes()); // memmap_entries, reserved
    let info = loader.put(&info, 16, "the start information")?;
    Ok(loader.enter(Protocol::Pvh, EntryMode::Protected32, Selectors::Plain, entry)?.with(gpr::RBX, info))
}

/// Places the modules high and their list; its address and length.
fn put_modules(loader: &mut Loader<'_>) -> Result<(u64, u32), BootError> {
    let source = loader.source;
    let mut list = Vec::new();
    let mut count = 0;
    for (data, text) in source.all_modules() {
        let at = loader.claims.below(data.len() as u64, u64::MAX, "the initrd or module")?;
        loader.memory().write(Gpa(at), data)?;
        let text = match text {
            "" => 0,
            text => loader.put(&cmdline::terminated(text, cmdline::MAX)?, 1, "a module's command line")?,
        };
        for field in [at, data.len() as u64, text, 0] {
            list.extend_from_slice(&field.to_le_bytes());
        }
        count += 1;
    }
    if count == 0 {
        return Ok((0, 0));
    }
    Ok((loader.put(&list, 16, "the module list")?, count))
}
