//! A raw disk image: a file or block device of the host, locked while a machine uses it.
//!
//! Locking is by `flock`: exclusive for a writable image, shared for a read-only one. It ends with the process, however
//! that ends.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate};

/// Bytes in a sector, the unit of the whole protocol whatever the block size (virtio 1.2 5.2.4).
pub const SECTOR_BYTES: u64 = 512;
const BLOCK_BYTES: usize = 64 << 10;

/// An image that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The host refused to open it.
    #[error("cannot open disk image {}: {source}{}", path.display(), hint(*read_only, source))]
    Open {
        /// The image.
        path: PathBuf,
        /// Whether it was to be opened for reading only.
        read_only: bool,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Another machine uses it.
    #[error("disk image {} is in use{}", path.display(), holder.map_or_else(
        || " by another process".to_owned(), |pid| format!(" by process {pid}")))]
    Busy {
        /// The image.
        path: PathBuf,
        /// Who holds the lock, if the host says.
        holder: Option<u32>,
    },
    /// A directory, a pipe, a terminal.
    #[error("disk image {} is neither a regular file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Nothing in it.
    #[error("disk image {} is empty; make one with e.g. `truncate -s 1G {}`", .0.display(), .0.display())]
    Empty(PathBuf),
    /// Not whole sectors, and to be written.
    #[error(
        "disk image {} has {len} bytes, not a multiple of 512; pad it with `truncate -s %512 {}` or attach it read-only",
        path.display(), path.display()
    )]
    PartialSector {
        /// The image.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
    /// The host failed.
    #[error("cannot use disk image {}: {source}", path.display())]
    Host {
        /// The image.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

fn hint(read_only: bool, source: &io::Error) -> &'static str {
    let denied = matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem);
    if denied && !read_only { "; attach it read-only or make it writable" } else { "" }
}

/// An open, locked image.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    /// Bytes that the host has; the last sector may be partial in a read-only image.
    len_bytes: u64,
    read_only: bool,
}

impl Image {
    /// Opens and locks an image.
    ///
    /// # Errors
    /// When it is missing, busy, empty, of a wrong kind or of an odd length.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, ImageError> {
        let at = || path.to_owned();
        let file = OpenOptions::new().read(true).write(!read_only).open(path).map_err(|source| {
            if source.kind() == io::ErrorKind::IsADirectory {
                return ImageError::Kind(at());
            }
            ImageError::Open { path: at(), read_only, source }
        })?;
        let host = |source| ImageError::Host { path: at(), source };
        let metadata = file.metadata().map_err(host)?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(ImageError::Kind(at()));
        }
        match if read_only { file.try_lock_shared() } else { file.try_lock() } {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(ImageError::Busy { path: at(), holder: lock_holder(metadata.ino()) });
            }
            Err(TryLockError::Error(source)) => return Err(host(source)),
        }
        // Seeking also knows the size of a block device.
        let len_bytes = (&file).seek(SeekFrom::End(0)).map_err(host)?;
        if len_bytes == 0 {
            return Err(ImageError::Empty(at()));
        }
        if !read_only && !len_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(ImageError::PartialSector { path: at(), len: len_bytes });
        }
        Ok(Self { file, path: at(), len_bytes, read_only })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sectors of 512 bytes; a partial last one counts and reads as filled up with zeros.
    #[must_use]
    pub const fn sectors(&self) -> u64 {
        self.len_bytes.div_ceil(SECTOR_BYTES)
    }

    /// Whether writing is refused.
    #[must_use]
    pub const fn read_only(&self) -> bool {
        self.read_only
    }

    /// Reads; beyond the end of the host's file come zeros.
    ///
    /// # Errors
    /// The host's.
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

    /// Writes.
    ///
    /// # Errors
    /// The host's.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, offset)
    }

    /// Makes what was written durable (`fdatasync`).
    ///
    /// # Errors
    /// The host's.
    pub fn sync(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.file.sync_data() }
    }

    /// Gives the host its storage back where it can; the bytes read as zeros then, or as before.
    ///
    /// # Errors
    /// The host's, but for "cannot": it is a hint.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.punch(offset, len).map(|_done| ())
    }

    /// Zeros, with storage given back if `unmap` says so.
    ///
    /// # Errors
    /// The host's.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if unmap && self.punch(offset, len)? {
            return Ok(());
        }
        let zeros = [0; BLOCK_BYTES];
        let mut done = 0;
        while done < len {
            let now = usize::try_from(len - done).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES);
            self.write(offset + done, &zeros[..now])?;
            done += now as u64;
        }
        Ok(())
    }

    /// False where the file system cannot.
    fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        use rustix::io::Errno;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        loop {
            return match fallocate(&self.file, flags, offset, len) {
                Ok(()) => Ok(true),
                Err(Errno::INTR) => continue,
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL | Errno::PERM) => Ok(false),
                Err(e) => Err(e.into()),
            };
        }
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
        file.ends_with(&suffix).then(|| pid.parse().ok()).flatten()
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A file of its own for each test, gone with it.
    pub(crate) struct Scratch(pub PathBuf);

    impl Scratch {
        pub(crate) fn new(name: &str, data: &[u8]) -> Self {
            let path = std::env::temp_dir().join(format!("trellis-{}-{name}.img", std::process::id()));
            std::fs::write(&path, data).unwrap();
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    #[test]
    fn open_busy_image_names_its_holder() {
        let file = Scratch::new("busy", &[1; 512]);
        let first = Image::open(&file.0, false).unwrap();
        let error = Image::open(&file.0, true).unwrap_err();
        let pid = std::process::id();
        assert!(
            matches!(error, ImageError::Busy { holder, .. } if holder.is_none_or(|p| p == pid)),
            "{error}"
        );
        assert!(error.to_string().contains("is in use by "));
        drop(first);
        let shared = Image::open(&file.0, true).unwrap();
        assert!(Image::open(&file.0, true).is_ok());
        assert!(matches!(Image::open(&file.0, false), Err(ImageError::Busy { .. })));
        drop(shared);
    }

    #[test]
    fn open_odd_images_gives_clear_errors() {
        let file = Scratch::new("odd", &[7; 700]);
        let error = Image::open(&file.0, false).unwrap_err();
        assert!(error.to_string().contains("700 bytes, not a multiple of 512"), "{error}");
        let image = Image::open(&file.0, true).unwrap();
        assert_eq!(image.sectors(), 2);
        let mut sector = [1; 512];
        image.read(512, &mut sector).unwrap();
        assert_eq!((sector[187], sector[188]), (7, 0));
        let empty = Scratch::new("empty", &[]);
        assert!(matches!(Image::open(&empty.0, false), Err(ImageError::Empty(_))));
        assert!(matches!(Image::open(&std::env::temp_dir(), true), Err(ImageError::Kind(_))));
        assert!(matches!(Image::open(&std::env::temp_dir(), false), Err(ImageError::Kind(_))));
        assert!(matches!(Image::open(Path::new("/nonexistent/x"), true), Err(ImageError::Open { .. })));
    }

    #[test]
    fn write_zeroes_and_discard_read_as_zeros() {
        let file = Scratch::new("zeroes", &[9; 8192]);
        let image = Image::open(&file.0, false).unwrap();
        image.write_zeroes(512, 512, false).unwrap();
        image.write_zeroes(4096, 4096, true).unwrap();
        let mut all = [1; 8192];
        image.read(0, &mut all).unwrap();
        assert!(all[..512].iter().chain(&all[1024..4096]).all(|&b| b == 9));
        assert!(all[512..1024].iter().chain(&all[4096..]).all(|&b| b == 0));
    }
}
