//! What the server does on the host: every step begins at an open file or directory and takes one name.
//!
//! - INV-9P-1: a name has one component, is not `..`, and is never followed when it is a symbolic link. So nothing outside of
//!   the shared directory is reached, whatever the host's programs or the guest move or replace meanwhile: links are the
//!   guest's own to follow, in its own tree.
//! - INV-9P-2: only regular files and directories are opened. What a pipe, socket or device means is the guest's kernel's
//!   affair, and opening one of the host's could wait for ever or have effects.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps};
use rustix::io::Errno;

/// A place in the shared tree, held open (`O_PATH`).
#[derive(Debug)]
pub(super) struct Place {
    pub fd: OwnedFd,
    pub stat: Stat,
}

/// What a client wants a file's attributes to be; what is `None` stays as it is.
#[derive(Debug)]
pub(super) struct Wanted {
    pub mode: Option<u32>,
    pub owner: Option<u32>,
    pub group: Option<u32>,
    pub size: Option<u64>,
    pub accessed: Option<When>,
    pub modified: Option<When>,
}

/// A time that a client sets.
#[derive(Clone, Copy, Debug)]
pub(super) enum When {
    Now,
    At { seconds: u64, nanos: u64 },
}

/// As utimensat(2) takes it.
fn timespec(when: Option<When>) -> Timespec {
    let fixed = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
    match when {
        None => fixed(rustix::fs::UTIME_OMIT),
        Some(When::Now) => fixed(rustix::fs::UTIME_NOW),
        Some(When::At { seconds, nanos }) => {
            // A number of nanoseconds that is none must not mean something else.
            let tv_nsec = i64::try_from(nanos).unwrap_or(0).clamp(0, 999_999_999);
            Timespec { tv_sec: i64::from_le_bytes(seconds.to_le_bytes()), tv_nsec }
        }
    }
}

/// The tree.
#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
    path: OsString,
    device: u64,
    /// `/proc/self/fd`: the way to open what is held by `O_PATH` only.
    descriptors: OwnedFd,
}

const HELD: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

fn os(name: &[u8]) -> &OsStr {
    OsStr::from_bytes(name)
}

pub(super) fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

fn place(fd: OwnedFd) -> Result<Place, Errno> {
    let stat = rustix::fs::fstat(&fd)?;
    Ok(Place { fd, stat })
}

impl Tree {
    pub fn open(path: &Path) -> Result<Self, Errno> {
        let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::openat(CWD, path, directory, Mode::empty())?;
        let device = rustix::fs::fstat(&root)?.st_dev;
        let descriptors = rustix::fs::openat(CWD, "/proc/self/fd", directory, Mode::empty())?;
        let tree = Self { root, path: OsString::new(), device, descriptors };
        let path = tree.path_of(&tree.root)?;
        Ok(Self { path, ..tree })
    }

    pub fn root(&self) -> Result<Place, Errno> {
        place(self.root.try_clone().map_err(|_| Errno::MFILE)?)
    }

    /// Number of a file that differs between the file systems below the root.
    pub fn number(&self, device: u64, inode: u64) -> u64 {
        if device == self.device {
            inode
        } else {
            inode ^ device.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 << 63
        }
    }

    /// The entry `name` of a directory (INV-9P-1).
    pub fn step(from: &OwnedFd, name: &[u8]) -> Result<Place, Errno> {
        place(rustix::fs::openat(from, os(name), HELD, Mode::empty())?)
    }

    /// A place by its path below the root, for restoring; links are not followed.
    pub fn find(&self, path: &[u8]) -> Result<Place, Errno> {
        if path.is_empty() {
            return self.root();
        }
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        place(rustix::fs::openat2(&self.root, os(path), HELD, Mode::empty(), resolve)?)
    }

    fn path_of(&self, fd: &OwnedFd) -> Result<OsString, Errno> {
        let path = rustix::fs::readlinkat(&self.descriptors, fd.as_raw_fd().to_string(), Vec::new())?;
        Ok(OsString::from_vec(path.into_bytes()))
    }

    /// The path of a place below the root, for saving; `None` if it has none any more.
    pub fn relative(&self, fd: &OwnedFd) -> Option<Vec<u8>> {
        let path = self.path_of(fd).ok()?;
        let below = Path::new(&path).strip_prefix(Path::new(&self.path)).ok()?;
        Some(below.as_os_str().as_bytes().to_vec())
    }

    /// Opens what is held (INV-9P-2).
    pub fn reopen(&self, place: &Place, flags: OFlags) -> Result<OwnedFd, Errno> {
        match kind(&place.stat) {
            FileType::RegularFile | FileType::Directory => {}
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::ACCESS),
        }
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        rustix::fs::openat(&self.descriptors, place.fd.as_raw_fd().to_string(), flags, Mode::empty())
    }

    /// Sets attributes.
    pub fn set_attributes(&self, place: &Place, wanted: &Wanted) -> Result<(), Errno> {
        if let Some(mode) = wanted.mode {
            self.chmod(place, mode)?;
        }
        if wanted.owner.is_some() || wanted.group.is_some() {
            let owner = wanted.owner.map(rustix::fs::Uid::from_raw_unchecked);
            let group = wanted.group.map(rustix::fs::Gid::from_raw_unchecked);
            rustix::fs::chownat(&place.fd, "", owner, group, AtFlags::EMPTY_PATH)?;
        }
        if let Some(size) = wanted.size {
            if kind(&place.stat) == FileType::Directory {
                return Err(Errno::ISDIR);
            }
            rustix::fs::ftruncate(self.reopen(place, OFlags::WRONLY)?, size)?;
        }
        if wanted.accessed.is_some() || wanted.modified.is_some() {
            let (last_access, last_modification) = (timespec(wanted.accessed), timespec(wanted.modified));
            self.set_times(place, &Timestamps { last_access, last_modification })?;
        }
        Ok(())
    }

    /// Makes and opens a file that is not there yet. An existing name could be a pipe or a link.
    pub fn create(
        directory: &OwnedFd,
        wanted: &[u8],
        flags: OFlags,
        mode: u32,
    ) -> Result<(OwnedFd, Place), Errno> {
        let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(directory, os(wanted), flags, Mode::from_raw_mode(mode & 0o7777))?;
        // The file itself, not what may stand at its name by now.
        let held = rustix::fs::fstat(&file)?;
        let place = Self::step(directory, wanted)?;
        if (place.stat.st_dev, place.stat.st_ino) != (held.st_dev, held.st_ino) {
            return Err(Errno::STALE);
        }
        Ok((file, place))
    }

    /// Makes what `mode` says: a file, a pipe or a socket. Device nodes are not for guests.
    pub fn make_node(directory: &OwnedFd, wanted: &[u8], mode: u32, umask: u32) -> Result<(), Errno> {
        let kind = FileType::from_raw_mode(mode);
        if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
            return Err(Errno::PERM);
        }
        rustix::fs::mknodat(directory, os(wanted), kind, Mode::from_raw_mode(mode & !umask & 0o7777), 0)
    }

    fn chmod(&self, place: &Place, mode: u32) -> Result<(), Errno> {
        let name = place.fd.as_raw_fd().to_string();
        rustix::fs::chmodat(&self.descriptors, name, Mode::from_raw_mode(mode & 0o7777), AtFlags::empty())
    }

    fn set_times(&self, place: &Place, times: &Timestamps) -> Result<(), Errno> {
        let name = place.fd.as_raw_fd().to_string();
        rustix::fs::utimensat(&self.descriptors, name, times, AtFlags::empty())
    }

    pub fn link(&self, place: &Place, directory: impl AsFd, name: &[u8]) -> Result<(), Errno> {
        let from = place.fd.as_raw_fd().to_string();
        rustix::fs::linkat(&self.descriptors, from, directory, os(name), AtFlags::SYMLINK_FOLLOW)
    }
}

pub(super) fn name(bytes: &[u8]) -> &OsStr {
    os(bytes)
}
