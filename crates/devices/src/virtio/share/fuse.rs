//! A FUSE server, as virtio-fs carries it (virtio 1.2 5.11; Linux `include/uapi/linux/fuse.h`, protocol 7.31): one request
//! in, one answer out.
//!
//! The client is hostile, as in [`super::p9`], and what is said there of the host's files holds here.
//! - INV-FUSE-1: at most [`MAX_NODES`] nodes and [`MAX_HANDLES`] handles, an open file each.
//!
//! Not there: extended attributes, locks beyond the guest, DAX, creation of device nodes.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Mode, OFlags, RawDir, RenameFlags, SeekFrom, Stat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::FileServer;
use super::host::{Place, Tree, Wanted, When, name};
use super::wire::{Reader, directory_type};

const MAX_NODES: usize = 1 << 19;
const MAX_HANDLES: usize = 1 << 16;
const ROOT: u64 = 1;
/// Bytes of `struct fuse_in_header` and `struct fuse_out_header`.
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;
/// Most pages of 4 KiB in a request's data.
const MAX_PAGES: u16 = 128;
pub(super) const MAX_REQUEST: u32 = 4096 * (MAX_PAGES as u32) + 4096;
/// How long the guest may believe names and attributes, in seconds: of a tree that is not to change meanwhile, and others.
const STATIC_SECONDS: u64 = 86_400;
const OTHER_SECONDS: u64 = 1;

/// Requests.
mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
}

/// Bits of FUSE_SETATTR.
mod set {
    pub const MODE: u32 = 1;
    pub const UID: u32 = 2;
    pub const GID: u32 = 4;
    pub const SIZE: u32 = 8;
    pub const ATIME: u32 = 0x10;
    pub const MTIME: u32 = 0x20;
    pub const ATIME_NOW: u32 = 0x80;
    pub const MTIME_NOW: u32 = 0x100;
}

#[derive(Debug)]
struct Node {
    place: Place,
    lookups: u64,
}

#[derive(Debug)]
struct Handle {
    node: u64,
    file: OwnedFd,
    flags: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct SavedNode {
    number: u64,
    lookups: u64,
    path: Vec<u8>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct SavedHandle {
    number: u64,
    node: u64,
    flags: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    nodes: Vec<SavedNode>,
    handles: Vec<SavedHandle>,
    next_node: u64,
    next_handle: u64,
}

/// The server of a shared directory.
#[derive(Debug)]
pub(super) struct Server {
    tree: Tree,
    read_only: bool,
    is_static: bool,
    nodes: BTreeMap<u64, Node>,
    /// The node of a file, so that each has one.
    known: BTreeMap<(u64, u64), u64>,
    handles: BTreeMap<u64, Handle>,
    next_node: u64,
    next_handle: u64,
}

/// An answer's bytes behind its header; `None` where the client expects none.
type Answer = Result<Option<Vec<u8>>, Errno>;

/// Little-endian numbers, one behind the other.
#[derive(Default)]
struct Out(Vec<u8>);

impl Out {
    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }
    fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
    #[expect(clippy::unnecessary_wraps, reason = "what every operation ends with")]
    fn done(self) -> Answer {
        Ok(Some(self.0))
    }
}

fn low(value: impl TryInto<u64>) -> u32 {
    value.try_into().ok().map_or(0, |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0))
}

fn bits(value: i64) -> u64 {
    u64::from_le_bytes(value.to_le_bytes())
}

/// A string that ends with NUL.
fn text<'a>(r: &mut Reader<'a>) -> Result<&'a [u8], Errno> {
    let end = r.0.iter().position(|&byte| byte == 0).ok_or(Errno::INVAL)?;
    let text = r.bytes(end)?;
    r.bytes(1)?;
    Ok(text)
}

/// The name of an entry (INV-9P-1).
fn entry<'a>(r: &mut Reader<'a>) -> Result<&'a [u8], Errno> {
    super::wire::checked_name(text(r)?)
}

fn open_flags(flags: u32) -> Result<OFlags, Errno> {
    // Linux's own numbers; append is not passed on, since the client says where it writes.
    let access = match flags & 3 {
        0 => OFlags::RDONLY,
        1 => OFlags::WRONLY,
        2 => OFlags::RDWR,
        _ => return Err(Errno::INVAL),
    };
    Ok(if flags & OFlags::TRUNC.bits() != 0 { access | OFlags::TRUNC } else { access })
}

impl Server {
    pub const fn new(tree: Tree, read_only: bool, is_static: bool) -> Self {
        Self {
            tree,
            read_only,
            is_static,
            nodes: BTreeMap::new(),
            known: BTreeMap::new(),
            handles: BTreeMap::new(),
            next_node: ROOT + 1,
            next_handle: 1,
        }
    }

    fn dispatch(&mut self, opcode: u32, node: u64, mut r: Reader<'_>, room: usize) -> Answer {
        let r = &mut r;
        match opcode {
            op::INIT => self.init(r),
            op::LOOKUP => {
                let wanted = entry(r)?;
                let place = Tree::step(self.directory(node)?, wanted)?;
                self.entry_out(place)?.done()
            }
            op::FORGET => {
                self.forget(node, r.u64()?);
                Ok(None)
            }
            op::BATCH_FORGET => {
                let (count, _) = (r.u32()?, r.u32()?);
                for _ in 0..count {
                    let (node, lookups) = (r.u64()?, r.u64()?);
                    self.forget(node, lookups);
                }
                Ok(None)
            }
            op::INTERRUPT => Ok(None),
            op::DESTROY => {
                self.reset();
                Out::default().done()
            }
            op::GETATTR => self.getattr(node),
            op::SETATTR => self.setattr(node, r),
            op::READLINK => {
                let target = rustix::fs::readlinkat(&self.place(node)?.fd, "", Vec::new())?;
                Out::default().raw(target.as_bytes()).done()
            }
            op::OPEN | op::OPENDIR => self.open(node, r),
            op::RELEASE | op::RELEASEDIR => {
                self.handles.remove(&r.u64()?).ok_or(Errno::BADF)?;
                Out::default().done()
            }
            op::READ => self.read(r, room),
            op::WRITE => self.write(r),
            op::READDIR => self.readdir(r, room),
            op::FSYNC | op::FSYNCDIR => {
                let (handle, flags) = (r.u64()?, r.u32()?);
                let file = self.file(handle)?;
                if flags & 1 != 0 {
                    rustix::fs::fdatasync(file)?
                } else {
                    rustix::fs::fsync(file)?
                }
                Out::default().done()
            }
            op::STATFS => self.statfs(node),
            op::CREATE => self.create(node, r),
            op::MKNOD | op::MKDIR | op::SYMLINK => self.make(opcode, node, r),
            op::LINK => self.link(node, r),
            op::UNLINK | op::RMDIR => {
                self.writable()?;
                let how = if opcode == op::RMDIR { AtFlags::REMOVEDIR } else { AtFlags::empty() };
                rustix::fs::unlinkat(self.directory(node)?, name(entry(r)?), how)?;
                Out::default().done()
            }
            op::RENAME | op::RENAME2 => self.rename(opcode, node, r),
            op::LSEEK => self.lseek(r),
            op::FALLOCATE => self.fallocate(r),
            // The client then does without: attributes, locks, access checks, flushes.
            _ => Err(Errno::NOSYS),
        }
    }

    // ---- nodes --------------------------------------------------------------------------------------------

    fn place(&self, node: u64) -> Result<&Place, Errno> {
        self.nodes.get(&node).map(|node| &node.place).ok_or(Errno::STALE)
    }

    fn directory(&self, node: u64) -> Result<&OwnedFd, Errno> {
        Ok(&self.place(node)?.fd)
    }

    fn file(&self, handle: u64) -> Result<&OwnedFd, Errno> {
        self.handles.get(&handle).map(|handle| &handle.file).ok_or(Errno::BADF)
    }

    fn writable(&self) -> Result<(), Errno> {
        if self.read_only { Err(Errno::ROFS) } else { Ok(()) }
    }

    /// Bits of `struct fuse_init_in` and `struct fuse_init_out` as in `fuse.h`.
    fn init(&mut self, r: &mut Reader<'_>) -> Answer {
        /// ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES, PARALLEL_DIROPS, MAX_PAGES.
        const WANTED: u32 = 1 | 1 << 3 | 1 << 5 | 1 << 18 | 1 << 22;
        const CACHE_SYMLINKS: u32 = 1 << 23;
        let (major, minor, readahead, flags) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
        if major != 7 || minor < 27 {
            return Err(Errno::PROTO);
        }
        self.reset();
        let place = self.tree.root()?;
        self.known.insert((place.stat.st_dev, place.stat.st_ino), ROOT);
        self.nodes.insert(ROOT, Node { place, lookups: 1 });
        let wanted = WANTED | if self.is_static { CACHE_SYMLINKS } else { 0 };
        let out = Out::default().u32(7).u32(31).u32(readahead).u32(flags & wanted);
        // max_background and congestion_threshold, max_write, time_gran, max_pages and map_alignment.
        let out = out.u32(16 | 12 << 16).u32(u32::from(MAX_PAGES) * 4096).u32(1).u32(u32::from(MAX_PAGES));
        out.raw(&[0; 32]).done()
    }

    fn forget(&mut self, number: u64, lookups: u64) {
        let Some(node) = self.nodes.get_mut(&number).filter(|_| number != ROOT) else { return };
        node.lookups = node.lookups.saturating_sub(lookups);
        if node.lookups == 0
            && let Some(node) = self.nodes.remove(&number)
        {
            self.known.remove(&(node.place.stat.st_dev, node.place.stat.st_ino));
        }
    }

    /// `struct fuse_entry_out` of a place that the guest learns of.
    fn entry_out(&mut self, place: Place) -> Result<Out, Errno> {
        let stat = place.stat;
        let key = (stat.st_dev, stat.st_ino);
        let number = match self.known.get(&key) {
            Some(&number) => number,
            None if self.nodes.len() >= MAX_NODES => return Err(Errno::NFILE),
            None => {
                let number = self.next_node;
                self.next_node += 1;
                self.nodes.insert(number, Node { place, lookups: 0 });
                self.known.insert(key, number);
                number
            }
        };
        if let Some(node) = self.nodes.get_mut(&number) {
            node.lookups = node.lookups.saturating_add(1);
        }
        let valid = self.valid_seconds();
        let out = Out::default().u64(number).u64(0).u64(valid).u64(valid).u32(0).u32(0);
        Ok(self.attr(out, &stat))
    }

    const fn valid_seconds(&self) -> u64 {
        if self.is_static { STATIC_SECONDS } else { OTHER_SECONDS }
    }

    /// `struct fuse_attr`.
    fn attr(&self, out: Out, s: &Stat) -> Out {
        let out = out.u64(self.tree.number(s.st_dev, s.st_ino)).u64(bits(s.st_size)).u64(bits(s.st_blocks));
        let out = out.u64(bits(s.st_atime)).u64(bits(s.st_mtime)).u64(bits(s.st_ctime));
        let out = out.u32(low(s.st_atime_nsec)).u32(low(s.st_mtime_nsec)).u32(low(s.st_ctime_nsec));
        let out = out.u32(s.st_mode).u32(low(s.st_nlink)).u32(s.st_uid).u32(s.st_gid);
        out.u32(low(s.st_rdev)).u32(low(bits(s.st_blksize))).u32(0)
    }

    // ---- attributes ---------------------------------------------------------------------------------------

    fn getattr(&self, node: u64) -> Answer {
        let stat = rustix::fs::fstat(&self.place(node)?.fd)?;
        let out = Out::default().u64(self.valid_seconds()).u32(0).u32(0);
        self.attr(out, &stat).done()
    }

    fn setattr(&mut self, node: u64, r: &mut Reader<'_>) -> Answer {
        self.writable()?;
        let (valid, _, _handle, size, _) = (r.u32()?, r.u32()?, r.u64()?, r.u64()?, r.u64()?);
        let (atime, mtime, _) = (r.u64()?, r.u64()?, r.u64()?);
        let (atime_nanos, mtime_nanos, _) = (r.u32()?, r.u32()?, r.u32()?);
        let (mode, _, uid, gid) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
        let given = |bit: u32| valid & bit != 0;
        let time = |bit, now, seconds, nanos: u32| {
            let at = When::At { seconds, nanos: nanos.into() };
            given(bit).then_some(if given(now) { When::Now } else { at })
        };
        let wanted = Wanted {
            mode: given(set::MODE).then_some(mode),
            owner: given(set::UID).then_some(uid),
            group: given(set::GID).then_some(gid),
            size: given(set::SIZE).then_some(size),
            accessed: time(set::ATIME, set::ATIME_NOW, atime, atime_nanos),
            modified: time(set::MTIME, set::MTIME_NOW, mtime, mtime_nanos),
        };
        self.tree.set_attributes(self.place(node)?, &wanted)?;
        self.getattr(node)
    }

    fn statfs(&self, node: u64) -> Answer {
        let s = rustix::fs::fstatfs(&self.place(node)?.fd)?;
        let out = Out::default().u64(s.f_blocks).u64(s.f_bfree).u64(s.f_bavail).u64(s.f_files).u64(s.f_ffree);
        let out = out.u32(low(bits(s.f_bsize))).u32(low(bits(s.f_namelen))).u32(low(bits(s.f_frsize)));
        out.raw(&[0; 28]).done()
    }

    // ---- files --------------------------------------------------------------------------------------------

    fn check_flags(&self, flags: u32) -> Result<OFlags, Errno> {
        if flags & (3 | OFlags::TRUNC.bits()) != 0 {
            self.writable()?;
        }
        open_flags(flags)
    }

    /// `struct fuse_open_out` of a file that is open now.
    fn handle_out(&mut self, out: Out, node: u64, file: OwnedFd, flags: u32) -> Result<Out, Errno> {
        /// `FOPEN_KEEP_CACHE`: what the guest has read of it is still true.
        const KEEP_CACHE: u32 = 1 << 1;
        if self.handles.len() >= MAX_HANDLES {
            return Err(Errno::NFILE);
        }
        let number = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(number, Handle { node, file, flags: flags & !OFlags::TRUNC.bits() });
        Ok(out.u64(number).u32(if self.is_static { KEEP_CACHE } else { 0 }).u32(0))
    }

    fn open(&mut self, node: u64, r: &mut Reader<'_>) -> Answer {
        let flags = r.u32()?;
        let to = self.check_flags(flags)?;
        let file = self.tree.reopen(self.place(node)?, to)?;
        self.handle_out(Out::default(), node, file, flags)?.done()
    }

    fn create(&mut self, node: u64, r: &mut Reader<'_>) -> Answer {
        self.writable()?;
        let (flags, mode, umask, _) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
        let wanted = entry(r)?;
        let directory = self.directory(node)?;
        let to = open_flags(flags)? - OFlags::TRUNC;
        let (file, place) = Tree::create(directory, wanted, to, mode & !umask)?;
        let key = (place.stat.st_dev, place.stat.st_ino);
        let out = self.entry_out(place)?;
        let number = self.known.get(&key).copied().ok_or(Errno::STALE)?;
        self.handle_out(out, number, file, flags)?.done()
    }

    fn read(&self, r: &mut Reader<'_>, room: usize) -> Answer {
        let (handle, offset, size) = (r.u64()?, r.u64()?, r.u32()?);
        let most = usize::try_from(size.min(MAX_REQUEST)).unwrap_or(0).min(room);
        let mut data = vec![0; most];
        let len = rustix::io::pread(self.file(handle)?, &mut data[..], offset)?;
        data.truncate(len);
        Ok(Some(data))
    }

    fn write(&self, r: &mut Reader<'_>) -> Answer {
        self.writable()?;
        let (handle, offset, size, _) = (r.u64()?, r.u64()?, r.u32()?, r.u32()?);
        r.bytes(16)?;
        let data = r.bytes(usize::try_from(size).map_err(|_| Errno::INVAL)?)?;
        let done = rustix::io::pwrite(self.file(handle)?, data, offset)?;
        Out::default().u32(low(done as u64)).u32(0).done()
    }

    fn readdir(&self, r: &mut Reader<'_>, room: usize) -> Answer {
        let (handle, offset, size) = (r.u64()?, r.u64()?, r.u32()?);
        let room = usize::try_from(size.min(MAX_REQUEST)).unwrap_or(0).min(room);
        let Handle { node, file, .. } = self.handles.get(&handle).ok_or(Errno::BADF)?;
        let device = self.place(*node)?.stat.st_dev;
        rustix::fs::seek(file, SeekFrom::Start(offset))?;
        let mut buffer = [MaybeUninit::uninit(); 16 << 10];
        let mut entries = RawDir::new(file, &mut buffer);
        let mut out = Out::default();
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let text = entry.file_name().to_bytes();
            let padded = (24 + text.len()).next_multiple_of(8);
            if out.0.len() + padded > room {
                break;
            }
            let kind = u32::from(directory_type(entry.file_type()));
            out = out.u64(self.tree.number(device, entry.ino())).u64(entry.next_entry_cookie());
            out = out.u32(low(text.len() as u64)).u32(kind).raw(text);
            out = out.raw(&[0; 8][..padded - 24 - text.len()]);
        }
        out.done()
    }

    fn lseek(&self, r: &mut Reader<'_>) -> Answer {
        let (handle, offset, whence) = (r.u64()?, r.u64()?, r.u32()?);
        let to = match whence {
            3 => SeekFrom::Data(offset),
            4 => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        Out::default().u64(rustix::fs::seek(self.file(handle)?, to)?).done()
    }

    fn fallocate(&self, r: &mut Reader<'_>) -> Answer {
        self.writable()?;
        let (handle, offset, length, mode) = (r.u64()?, r.u64()?, r.u64()?, r.u32()?);
        let mode = rustix::fs::FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        rustix::fs::fallocate(self.file(handle)?, mode, offset, length)?;
        Out::default().done()
    }

    // ---- names --------------------------------------------------------------------------------------------

    /// Directories, pipes and the like, symbolic links.
    fn make(&mut self, what: u32, node: u64, r: &mut Reader<'_>) -> Answer {
        self.writable()?;
        let directory = self.directory(node)?;
        let wanted = match what {
            op::SYMLINK => {
                let wanted = entry(r)?;
                rustix::fs::symlinkat(name(text(r)?), directory, name(wanted))?;
                wanted
            }
            op::MKDIR => {
                let (mode, umask) = (r.u32()?, r.u32()?);
                let wanted = entry(r)?;
                let mode = Mode::from_raw_mode(mode & !umask & 0o7777);
                rustix::fs::mkdirat(directory, name(wanted), mode)?;
                wanted
            }
            _ => {
                let (mode, _, umask, _) = (r.u32()?, r.u32()?, r.u32()?, r.u32()?);
                let wanted = entry(r)?;
                Tree::make_node(directory, wanted, mode, umask)?;
                wanted
            }
        };
        let place = Tree::step(directory, wanted)?;
        self.entry_out(place)?.done()
    }

    fn link(&mut self, node: u64, r: &mut Reader<'_>) -> Answer {
        self.writable()?;
        let (old, wanted) = (r.u64()?, entry(r)?);
        let directory = self.directory(node)?;
        self.tree.link(self.place(old)?, directory, wanted)?;
        let place = Tree::step(directory, wanted)?;
        self.entry_out(place)?.done()
    }

    fn rename(&mut self, opcode: u32, node: u64, r: &mut Reader<'_>) -> Answer {
        self.writable()?;
        let to = r.u64()?;
        let flags = if opcode == op::RENAME2 { (r.u32()?, r.u32()?).0 } else { 0 };
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        // A whiteout is a device node.
        if flags.contains(RenameFlags::WHITEOUT) {
            return Err(Errno::INVAL);
        }
        let (old, new) = (entry(r)?, entry(r)?);
        let (from, to) = (self.directory(node)?, self.directory(to)?);
        rustix::fs::renameat_with(from, name(old), to, name(new), flags)?;
        Out::default().done()
    }
}

impl FileServer for Server {
    fn reset(&mut self) {
        self.nodes.clear();
        self.known.clear();
        self.handles.clear();
    }

    fn answer(&mut self, message: &[u8], room: usize) -> Vec<u8> {
        let mut r = Reader(message);
        let header = |r: &mut Reader<'_>| Ok::<_, Errno>((r.u32()?, r.u32()?, r.u64()?, r.u64()?));
        let Ok((len, opcode, unique, node)) = header(&mut r) else { return Vec::new() };
        let whole = usize::try_from(len).is_ok_and(|len| (IN_HEADER..=message.len()).contains(&len));
        let answer = if whole {
            let fields = Reader(&message[IN_HEADER..len as usize]);
            self.dispatch(opcode, node, fields, room.saturating_sub(OUT_HEADER))
        } else {
            Err(Errno::INVAL)
        };
        let (error, data) = match answer {
            Ok(None) => return Vec::new(),
            Ok(Some(data)) => (0, data),
            Err(errno) => (-errno.raw_os_error(), Vec::new()),
        };
        let len = low((OUT_HEADER + data.len()) as u64);
        let mut bytes = Out::default().u32(len).raw(&error.to_le_bytes()).u64(unique).0;
        bytes.extend(data);
        bytes
    }

    /// Where every node is by now. One that has no name any more is gone after a restore.
    fn save(&self) -> Value {
        let node = |(&number, node): (&u64, &Node)| {
            Some(SavedNode { number, lookups: node.lookups, path: self.tree.relative(&node.place.fd)? })
        };
        let handle = |(&number, handle): (&u64, &Handle)| SavedHandle {
            number,
            node: handle.node,
            flags: handle.flags,
        };
        let state = State {
            nodes: self.nodes.iter().filter_map(node).collect(),
            handles: self.handles.iter().map(handle).collect(),
            next_node: self.next_node,
            next_handle: self.next_handle,
        };
        serde_json::to_value(state).expect("plain data serialises")
    }

    fn restore(&mut self, state: &Value) -> Result<(), serde_json::Error> {
        let state = State::deserialize(state)?;
        self.reset();
        for saved in state.nodes.into_iter().take(MAX_NODES) {
            let Ok(place) = self.tree.find(&saved.path) else { continue };
            self.known.insert((place.stat.st_dev, place.stat.st_ino), saved.number);
            self.nodes.insert(saved.number, Node { place, lookups: saved.lookups });
        }
        for saved in state.handles.into_iter().take(MAX_HANDLES) {
            let opened = self.check_flags(saved.flags).and_then(|to| {
                let place = self.place(saved.node)?;
                self.tree.reopen(place, to)
            });
            let Ok(file) = opened else { continue };
            self.handles.insert(saved.number, Handle { node: saved.node, file, flags: saved.flags });
        }
        self.next_node = state.next_node.max(self.nodes.keys().last().map_or(ROOT, |last| *last) + 1);
        self.next_handle = state.next_handle.max(self.handles.keys().last().map_or(0, |last| *last) + 1);
        Ok(())
    }
}
