//! A disk image of the host: opened, locked while a machine uses it, read and written in bytes.
//!
//! Way of the data: a request ([`super::request`]) → [`Image`] → the host's file as it is ([`raw`]), or qcow2 ([`qcow2`]).
//! An image is opened once and outlives the resets of its machine; any number of threads may use it at a time.
//!
//! What a file is, is never guessed from what a guest can write: a qcow2 header in a file that is called raw would give the
//! guest every file of the host that the header names. The name decides, or the user.

mod check;
mod held;
mod host_file;
mod qcow2;
mod raw;
#[cfg(test)]
pub(crate) mod tests;

use std::io;
use std::path::{Path, PathBuf};
#[cfg(test)]
use std::sync::Arc;

use host_file::HostFile;
use qcow2::Qcow2Image;
use raw::RawImage;

/// Bytes in a sector, the unit of the whole protocol whatever the block size (virtio 1.2 5.2.4).
pub const SECTOR_BYTES: u64 = 512;
/// What a qcow2 file begins with (qcow2 specification, "Header").
const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// How an image's bytes lie in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// As the guest sees them.
    Raw,
    /// QEMU's format: clusters, made when they are written; perhaps on top of a backing file.
    Qcow2,
}

impl ImageFormat {
    /// Its name, as options have it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Which image, and how it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageOptions {
    /// A regular file or block device.
    pub path: PathBuf,
    /// Nothing is written, and several machines may share the image.
    pub read_only: bool,
    /// Its format; by its name if that is not said.
    pub format: Option<ImageFormat>,
    /// What is written goes to a temporary file and is lost at the end; the image may be shared.
    pub snapshot: bool,
}

impl ImageOptions {
    /// A writable image, its format by its name.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), read_only: false, format: None, snapshot: false }
    }
}

/// An image that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The host refused to open it.
    #[error("cannot open disk image {}: {source}{}", path.display(), hint(path, *read_only, source))]
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
    #[error("disk image {} is in use{}; end that first, or use a copy{}", path.display(), holder.map_or_else(
        || " by another process".to_owned(), |pid| format!(" by process {pid}")),
        if *read_only { "" } else { " or snapshot=on for both" })]
    Busy {
        /// The image.
        path: PathBuf,
        /// Who holds the lock, if the host says.
        holder: Option<u32>,
        /// Whether it was to be read only.
        read_only: bool,
    },
    /// A directory, a pipe, a terminal.
    #[error("disk image {} is neither a regular file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Nothing in it.
    #[error("disk image {} is empty; make one with e.g. `truncate -s 1G {}`", .0.display(), .0.display())]
    Empty(PathBuf),
    /// Not whole sectors, and to be written.
    #[error(
        "disk image {} has {len} bytes, not whole sectors of 512; pad it with `truncate -s %512 {}` or attach it read-only",
        path.display(), path.display()
    )]
    PartialSector {
        /// The image.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
    },
    /// Its content says qcow2, and nobody else does.
    #[error(
        "disk image {} begins like qcow2 but is not named so; say format=qcow2 if you trust it, format=raw if not",
        .0.display()
    )]
    WhichFormat(PathBuf),
    /// A qcow2 file that is none, or that refers to what cannot be used.
    #[error("cannot use disk image {} as {}: {why}", path.display(), format.name())]
    Format {
        /// The image.
        path: PathBuf,
        /// What it was to be.
        format: ImageFormat,
        /// What is wrong with it.
        why: String,
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

fn hint(path: &Path, read_only: bool, source: &io::Error) -> String {
    match source.kind() {
        io::ErrorKind::NotFound if !read_only => {
            format!("; make one with `truncate -s 1G {}`", path.display())
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if !read_only => {
            "; attach it read-only (,ro) or make it writable".to_owned()
        }
        io::ErrorKind::ResourceBusy => "; unmount it, or attach it read-only (,ro)".to_owned(),
        io::ErrorKind::ExecutableFileBusy => "; it is swap or a running program, name another".to_owned(),
        _ => String::new(),
    }
}

#[derive(Debug)]
enum Medium {
    Raw(RawImage),
    Qcow2(Box<Qcow2Image>),
    /// A host with moods.
    #[cfg(test)]
    Moody(Arc<tests::Moody>),
}

/// An open, locked image. The lock ends with it, and with the process, however that ends.
#[derive(Debug)]
pub struct Image {
    medium: Medium,
    path: PathBuf,
    /// Bytes that the guest has; the last sector may be partial where nothing is written.
    len_bytes: u64,
    read_only: bool,
}

impl Image {
    /// Opens and locks an image, and what it is based on.
    ///
    /// # Errors
    /// When it is missing, busy, empty, damaged, of a wrong kind or of an odd length.
    pub fn open(options: &ImageOptions) -> Result<Self, ImageError> {
        let path = &options.path;
        let file = HostFile::open(path, options.read_only || options.snapshot)?;
        let format = decide(options, &file)?;
        let medium = match (format, options.snapshot) {
            (ImageFormat::Raw, false) => Medium::Raw(RawImage::new(file, options.read_only)),
            (ImageFormat::Qcow2, false) => {
                Medium::Qcow2(Box::new(Qcow2Image::open(file, options.read_only)?))
            }
            (format, true) => Medium::Qcow2(Box::new(Qcow2Image::overlay(file, format)?)),
        };
        let len_bytes = match &medium {
            Medium::Raw(raw) => raw.len_bytes(),
            Medium::Qcow2(image) => image.len_bytes(),
            #[cfg(test)]
            Medium::Moody(_) => 0,
        };
        if len_bytes == 0 {
            return Err(ImageError::Empty(path.clone()));
        }
        if !options.read_only && !len_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(ImageError::PartialSector { path: path.clone(), len: len_bytes });
        }
        Ok(Self { medium, path: path.clone(), len_bytes, read_only: options.read_only })
    }

    /// Makes an empty qcow2 image of `len_bytes`, where nothing is yet.
    ///
    /// # Errors
    /// The host's.
    pub fn make_qcow2(path: &Path, len_bytes: u64) -> Result<(), ImageError> {
        qcow2::make(path, len_bytes).map_err(|source| ImageError::Host { path: path.to_owned(), source })
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
    pub fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        match &self.medium {
            Medium::Raw(raw) => raw.read(offset, data),
            Medium::Qcow2(image) => image.read(offset, data),
            #[cfg(test)]
            Medium::Moody(moody) => moody.read(offset, data),
        }
    }

    /// Writes.
    ///
    /// # Errors
    /// The host's. The range may be written in part then.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        match &self.medium {
            Medium::Raw(raw) => raw.write(offset, data),
            Medium::Qcow2(image) => image.write(offset, data),
            #[cfg(test)]
            Medium::Moody(moody) => moody.write(offset, data),
        }
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// The host's.
    pub fn sync(&self) -> io::Result<()> {
        match &self.medium {
            _ if self.read_only => Ok(()),
            Medium::Raw(raw) => raw.sync(),
            Medium::Qcow2(image) => image.sync(),
            #[cfg(test)]
            Medium::Moody(_) => Ok(()),
        }
    }

    /// Gives the host its storage back where it can; the bytes read as zeros then, or as before.
    ///
    /// # Errors
    /// The host's, but for "cannot": it is a hint.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        match &self.medium {
            Medium::Raw(raw) => raw.discard(offset, len),
            Medium::Qcow2(image) => image.discard(offset, len),
            #[cfg(test)]
            Medium::Moody(_) => Ok(()),
        }
    }

    /// Zeros, with storage given back if `unmap` says so.
    ///
    /// # Errors
    /// The host's.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        match &self.medium {
            Medium::Raw(raw) => raw.write_zeroes(offset, len, unmap),
            Medium::Qcow2(image) => image.write_zeroes(offset, len, unmap),
            #[cfg(test)]
            Medium::Moody(_) => Ok(()),
        }
    }
}

/// The format: what the user says, else what the name says, else raw, unless the content contradicts.
fn decide(options: &ImageOptions, file: &HostFile) -> Result<ImageFormat, ImageError> {
    if let Some(format) = options.format {
        return Ok(format);
    }
    let extension = options.path.extension().and_then(|name| name.to_str()).unwrap_or_default();
    if extension.eq_ignore_ascii_case("qcow2") {
        return Ok(ImageFormat::Qcow2);
    }
    let mut magic = [0; 4];
    file.read(0, &mut magic).map_err(|source| ImageError::Host { path: options.path.clone(), source })?;
    if magic == QCOW2_MAGIC {
        return Err(ImageError::WhichFormat(options.path.clone()));
    }
    Ok(ImageFormat::Raw)
}

/// Writes zeros by way of `write`, piece by piece.
fn write_zeros(offset: u64, len: u64, write: impl Fn(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
    const BLOCK_BYTES: usize = 64 << 10;
    let zeros = [0; BLOCK_BYTES];
    let mut done = 0;
    while done < len {
        let now = usize::try_from(len - done).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES);
        write(offset + done, &zeros[..now])?;
        done += now as u64;
    }
    Ok(())
}
