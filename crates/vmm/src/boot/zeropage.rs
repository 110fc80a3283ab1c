//! Linux's `struct boot_params`, the "zero page" (Linux `Documentation/arch/x86/zero-page.rst`).

use super::Platform;
use super::e820::Entry;

/// Its size.
pub(super) const BYTES: usize = 0x1000;
/// The setup header's place, the same as in the kernel file (`boot.rst`, "The Real-Mode Kernel Header").
pub(super) const SETUP_HEADER: usize = 0x1f1;
/// The setup header must end before `edd_mbr_sig_buffer`.
pub(super) const SETUP_HEADER_END: usize = 0x290;
const EXT_MEM_K: usize = 0x002;
const ACPI_RSDP_ADDR: usize = 0x070;
const ALT_MEM_K: usize = 0x1e0;
const E820_ENTRIES: usize = 0x1e8;
const E820_TABLE: usize = 0x2d0;
const E820_MAX: usize = 128;
const BOOT_FLAG: usize = 0x1fe;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const CODE32_START: usize = 0x214;
const RAMDISK_IMAGE: usize = 0x218;
const CMD_LINE_PTR: usize = 0x228;
const KERNEL_ALIGNMENT: usize = 0x230;
const CMDLINE_SIZE: usize = 0x238;
/// A boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;

/// A zero page being filled in.
pub(super) struct ZeroPage(Box<[u8; BYTES]>);

impl ZeroPage {
    /// All that does not depend on the kernel.
    pub fn new(map: &[Entry], platform: &Platform, rsdp: u64) -> Self {
        let mut page = Self(Box::new([0; BYTES]));
        if platform.vga {
            page.screen_info();
        }
        page.put(ACPI_RSDP_ADDR, &rsdp.to_le_bytes());
        page.memory(map);
        page
    }

    /// With the setup header of a bzImage: the file's bytes from [`SETUP_HEADER`] on.
    pub fn setup_header(&mut self, header: &[u8]) {
        let len = header.len().min(SETUP_HEADER_END - SETUP_HEADER);
        self.put(SETUP_HEADER, &header[..len]);
        self.put(TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    }

    /// With a setup header for a kernel that comes without one (an ELF).
    pub fn own_setup_header(&mut self, cmdline_max: u32) {
        self.put(BOOT_FLAG, &0xaa55u16.to_le_bytes());
        self.put(HEADER_MAGIC, b"HdrS");
        self.put(VERSION, &0x020fu16.to_le_bytes());
        self.put(TYPE_OF_LOADER, &[LOADER_UNDEFINED, 1]); // and LOADED_HIGH
        self.put(KERNEL_ALIGNMENT, &0x100_0000u32.to_le_bytes());
        self.put(CMDLINE_SIZE, &cmdline_max.to_le_bytes());
    }

    /// Where the protected-mode kernel is.
    pub fn code32_start(&mut self, address: u32) {
        self.put(CODE32_START, &address.to_le_bytes());
    }

    /// The initrd; both numbers are below 4 GiB.
    pub fn ramdisk(&mut self, address: u32, size: u32) {
        self.put(RAMDISK_IMAGE, &address.to_le_bytes());
        self.put(RAMDISK_IMAGE + 4, &size.to_le_bytes());
    }

    /// The command line. Kernels before protocol 2.02 find it by magic and its distance from the zero page.
    pub fn command_line(&mut self, address: u32, old: Option<u16>) {
        self.put(CMD_LINE_PTR, &address.to_le_bytes());
        if let Some(offset) = old {
            self.put(0x20, &0xa33fu16.to_le_bytes());
            self.put(0x22, &offset.to_le_bytes());
        }
    }

    /// The loader's own flag bits, beside what the kernel file says.
    pub fn loadflags(&mut self, flags: u8) {
        self.put(LOADFLAGS, &[flags]);
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0[..]
    }

    /// VGA text mode 3: 80 by 25, 16-line font (Linux `struct screen_info`).
    fn screen_info(&mut self) {
        self.put(0x06, &[3, 80]); // orig_video_mode, orig_video_cols
        self.put(0x0a, &3u16.to_le_bytes()); // orig_video_ega_bx: 256 KiB
        self.put(0x0e, &[25, 1]); // orig_video_lines, orig_video_isVGA
        self.put(0x10, &16u16.to_le_bytes()); // orig_video_points
    }

    fn memory(&mut self, map: &[Entry]) {
        for (i, entry) in map.iter().take(E820_MAX).enumerate() {
            let at = E820_TABLE + i * 20;
            self.put(at, &entry.start.to_le_bytes());
            self.put(at + 8, &entry.len_bytes().to_le_bytes());
            self.put(at + 16, &(entry.kind as u32).to_le_bytes());
        }
        self.put(E820_ENTRIES, &[u8::try_from(map.len().min(E820_MAX)).unwrap_or(0)]);
        let extended =
            map.iter().find(|e| e.start == super::layout::HIGH_MEMORY).map_or(0, Entry::len_bytes) >> 10;
        let extended = u32::try_from(extended).unwrap_or(u32::MAX);
        self.put(ALT_MEM_K, &extended.to_le_bytes());
        self.put(EXT_MEM_K, &u16::try_from(extended).unwrap_or(0xfc00).to_le_bytes());
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }
}
