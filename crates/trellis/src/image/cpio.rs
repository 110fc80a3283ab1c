//! Writer of the `newc` cpio format, the only one the Linux kernel unpacks as an initramfs
//! (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`).
//!
//! The archive is left uncompressed: decompression is the most expensive thing an interpreted guest can do at boot.

/// `S_IFREG` and its neighbours of `stat(2)`, as they stand in `c_mode`.
const MODE_FILE: u32 = 0o100_000;
const MODE_DIRECTORY: u32 = 0o040_000;
const MODE_SYMLINK: u32 = 0o120_000;
const MODE_CHAR_DEVICE: u32 = 0o020_000;

/// When everything was last changed: 2000-01-01. Some programs take files of the year 1970 for broken.
const MTIME: u32 = 946_684_800;

/// An archive under construction, in memory.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the directory `name` (without a leading slash; parents first).
    pub fn directory(&mut self, name: &str) {
        self.entry(name, MODE_DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// Adds the regular file `name` with permission bits `mode`.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, MODE_FILE | mode, (0, 0), content);
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, name: &str, target: &str) {
        self.entry(name, MODE_SYMLINK | 0o777, (0, 0), target.as_bytes());
    }

    /// Adds a character device node.
    pub fn char_device(&mut self, name: &str, mode: u32, major: u32, minor: u32) {
        self.entry(name, MODE_CHAR_DEVICE | mode, (major, minor), &[]);
    }

    /// Ends the archive and returns its bytes.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).expect("no file of an initramfs is 4 GiB long");
        let name_size = u32::try_from(name.len() + 1).expect("names are short");
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let fields = [self.entries, mode, 0, 0, 1, MTIME, size, 0, 0, major, minor, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_empty_is_the_trailer() {
        let bytes = Archive::new().finish();
        assert!(bytes.starts_with(b"070701"));
        assert_eq!(&bytes[110..120], b"TRAILER!!!");
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn file_header_and_content_are_aligned() {
        let mut archive = Archive::new();
        archive.file("init", 0o755, b"hello");
        let bytes = archive.finish();
        assert_eq!(&bytes[14..22], b"000081ED"); // c_mode: S_IFREG | 0755
        assert_eq!(&bytes[54..62], b"00000005"); // c_filesize
        assert_eq!(&bytes[94..102], b"00000005"); // c_namesize: "init" and its NUL
        assert_eq!(&bytes[110..115], b"init\0");
        assert_eq!(&bytes[116..121], b"hello");
        assert_eq!(&bytes[124..130], b"070701");
    }

    #[test]
    fn device_carries_its_numbers() {
        let mut archive = Archive::new();
        archive.char_device("dev/console", 0o600, 5, 1);
        let bytes = archive.finish();
        assert_eq!(&bytes[14..22], b"00002180");
        assert_eq!(&bytes[78..94], b"0000000500000001");
    }
}
