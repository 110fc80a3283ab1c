//! What can go wrong between a package mirror and a bootable image; each message says what to do next.

use std::io;
use std::path::{Path, PathBuf};

/// Why an image could not be fetched, built or listed. Every message is one line.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// A program that fetching relies on is not installed.
    #[error(
        "{program} is not installed here, so packages cannot be fetched; name a kernel with --kernel (for example /boot/vmlinuz-*)"
    )]
    NoProgram {
        /// `apt-get`, `apt-cache` or `dpkg-deb`.
        program: &'static str,
    },
    /// The package sources cannot be reached.
    #[error("the package sources cannot be reached ({detail}); check the network, or give --mirror URL")]
    NoNetwork {
        /// apt's own words.
        detail: String,
    },
    /// apt knows no such package.
    #[error(
        "no package source has {wanted} for {arch}{detail}; see `trellis image list`, or give --mirror URL"
    )]
    NoPackage {
        /// The package names that were tried.
        wanted: String,
        /// Debian's name of the architecture.
        arch: &'static str,
        /// apt's own words in parentheses, or nothing.
        detail: String,
    },
    /// An image name or flavour that does not exist.
    #[error("{0}")]
    Unknown(String),
    /// A program failed.
    #[error("{program} failed ({status}): {detail}")]
    Tool {
        /// The program.
        program: &'static str,
        /// Its exit status.
        status: String,
        /// Its last words.
        detail: String,
    },
    /// The host's file system refused.
    #[error("{action} {}: {source}{}", .path.display(), hint(.source))]
    Io {
        /// What was being done, as in "writing".
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A package without what it should hold.
    #[error("package {package} holds no {what}; choose another flavour (see `trellis image list`)")]
    BadPackage {
        /// The package.
        package: String,
        /// What was looked for.
        what: &'static str,
    },
    /// The packages that were fetched lack a file.
    #[error("no package that was fetched holds {what} {file}; this distribution may keep it elsewhere")]
    NoFile {
        /// The file's name.
        file: String,
        /// What it should be.
        what: &'static str,
    },
    /// A program that building a system relies on is not installed.
    #[error("{program} is not installed here, so no system can be built; install the package {package}")]
    NoTool {
        /// The program.
        program: &'static str,
        /// The package that has it.
        package: &'static str,
    },
    /// Files of a system belong to several users, and we are one.
    #[error(
        "building a system needs root, user namespaces (the package uidmap, and your lines in /etc/subuid and /etc/subgid), or the packages fakechroot and fakeroot; provide one of them"
    )]
    NoRights,
    /// A disk without the room that is needed.
    #[error(
        "building takes {} MiB in {}, which has {} MiB left; free some, or set {variable} to another directory",
        needed_bytes >> 20, directory.display(), free_bytes >> 20
    )]
    NoRoom {
        /// Where.
        directory: PathBuf,
        /// How much is needed.
        needed_bytes: u64,
        /// How much there is.
        free_bytes: u64,
        /// What chooses another place.
        variable: &'static str,
    },
    /// A disk was full in the middle, or the image too small.
    #[error(
        "the system did not fit: the disk is full, or the image too small; free some space, set TMPDIR or XDG_CACHE_HOME to another disk, or give a larger --size"
    )]
    Full,
    /// A disk image could not be made.
    #[error("{0}")]
    Disk(String),
    /// There is no place to keep images.
    #[error("no place to keep images: neither XDG_CACHE_HOME nor HOME is set; set one of them")]
    NoCacheDirectory,
}

impl ImageError {
    /// The message without its advice, where that is about a kernel: other files than kernels are fetched, too.
    #[must_use]
    pub fn cause(&self) -> String {
        match self {
            Self::NoProgram { program } => {
                format!("{program} is not installed here, so packages cannot be fetched")
            }
            Self::NoNetwork { detail } => format!("the package sources cannot be reached ({detail})"),
            Self::NoPackage { wanted, arch, detail } => {
                format!("no package source has {wanted} for {arch}{detail}")
            }
            other => other.to_string(),
        }
    }
}

/// What to do about the commonest host errors.
fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; set XDG_CACHE_HOME to a directory you can write"
        }
        io::ErrorKind::StorageFull => "; free some space, or set XDG_CACHE_HOME to another disk",
        _ => "",
    }
}

/// Adds the action and the path to an [`io::Error`].
pub(crate) trait IoContext<T> {
    /// `result.at("reading", path)`.
    fn at(self, action: &'static str, path: &Path) -> Result<T, ImageError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn at(self, action: &'static str, path: &Path) -> Result<T, ImageError> {
        self.map_err(|source| ImageError::Io { action, path: path.to_owned(), source })
    }
}
