//! A file or block device of the host, locked while it is open.
//!
//! Locking is by `flock`: exclusive for who writes, shared for who reads. It belongs to the open file, so that it ends with
//! the process, however that ends, and `/proc/locks` says whose it is. (OFD locks would do the same, but do not say whose.)

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::ImageError;

/// Which file it is, whatever its names.
pub(super) type Identity = (u64, u64);

/// An open, locked file.
#[derive(Debug)]
pub(super) struct HostFile {
    pub file: File,
    pub path: PathBuf,
    pub identity: Identity,
    pub len_bytes: u64,
}

impl HostFile {
    /// Opens and locks it.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, ImageError> {
        let at = || path.to_owned();
        let host = |source| ImageError::Host { path: at(), source };
        let refused = |source| ImageError::Open { path: at(), read_only, source };
        // Looked at first: opening a pipe would wait for its other end, opening a device may have effects.
        let kind = std::fs::metadata(path).map_err(refused)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::Kind(at()));
        }
        let mut open = OpenOptions::new();
        // O_EXCL refuses a block device that is mounted (open(2)); O_NONBLOCK, should it have become a pipe meanwhile.
        let exclusive = if kind.is_block_device() && !read_only {
            rustix::fs::OFlags::EXCL
        } else {
            rustix::fs::OFlags::empty()
        };
        let flags = i32::try_from((exclusive | rustix::fs::OFlags::NONBLOCK).bits()).unwrap_or(0);
        let file = open.read(true).write(!read_only).custom_flags(flags).open(path).map_err(refused)?;
        let metadata = file.metadata().map_err(host)?;
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return Err(ImageError::Kind(at()));
        }
        match if read_only { file.try_lock_shared() } else { file.try_lock() } {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(ImageError::Busy { path: at(), holder: lock_holder(metadata.ino()), read_only });
            }
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
                tracing::warn!("the file system of disk image {} cannot lock it", path.display());
            }
            Err(TryLockError::Error(source)) => return Err(host(source)),
        }
        // Seeking also knows the size of a block device.
        let len_bytes = (&file).seek(SeekFrom::End(0)).map_err(host)?;
        Ok(Self { file, path: at(), identity: (metadata.dev(), metadata.ino()), len_bytes })
    }

    /// Reads; beyond the end come zeros.
    pub fn read(&self, mut offset: u64, mut data: &mut [u8]) -> io::Result<()> {
        while !data.is_empty() {
            match self.file.read_at(data, offset) {
                Ok(0) => {
                    data.fill(0);
                    return Ok(());
                }
                Ok(now) => {
                    data = data.get_mut(now..).unwrap_or_default();
                    offset += now as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// The process that holds a `flock` on an inode, by `/proc/locks`
/// (`1: FLOCK  ADVISORY  WRITE 1234 08:01:5678 0 EOF`).
fn lock_holder(inode: u64) -> Option<u32> {
    let locks = std::fs::read_to_string("/proc/locks").ok()?;
    let suffix = format!(":{inode}");
    locks.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        let [_, "FLOCK", _, _, pid, file, ..] = fields[..] else { return None };
        // A process of another namespace has no number here.
        file.ends_with(&suffix).then(|| pid.parse().ok()).flatten().filter(|&pid| pid != 0)
    })
}
