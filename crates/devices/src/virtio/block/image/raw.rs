//! A raw image: the guest's bytes are the file's.

use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};

use super::host_file::HostFile;
use super::write_zeros;

/// A raw image.
#[derive(Debug)]
pub(super) struct RawImage {
    host: HostFile,
    read_only: bool,
}

impl RawImage {
    pub const fn new(host: HostFile, read_only: bool) -> Self {
        Self { host, read_only }
    }

    pub const fn len_bytes(&self) -> u64 {
        self.host.len_bytes
    }

    pub fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.host.read(offset, data)
    }

    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.host.file.write_all_at(data, offset)
    }

    pub fn sync(&self) -> io::Result<()> {
        self.host.file.sync_data()
    }

    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.punch(offset, len).map(|_done| ())
    }

    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap && self.punch(offset, len)? {
            return Ok(());
        }
        write_zeros(offset, len, |at, zeros| self.write(at, zeros))
    }

    /// False where the file system cannot.
    fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        use rustix::io::Errno;
        debug_assert!(!self.read_only, "requests that write are refused before");
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            return match fallocate(&self.host.file, flags, offset, len) {
                Ok(()) => Ok(true),
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL | Errno::PERM) => Ok(false),
                Err(e) => Err(e.into()),
            };
        }
    }
}
