//! A 9P2000.L server: one message in, one answer out.
//!
//! The client is hostile: it may send any bytes, use numbers of files that there are not, ask for more than fits. What it
//! does wrong is an error number. Files of the host may change, vanish or be replaced by links at any time: a fid holds the
//! file that it was walked to, not its name ([`super::host`]).
//! - INV-9P-3: at most [`MAX_FIDS`] fids, each of at most two open files; answers of at most the agreed message size.
//!
//! Not there: extended attributes, locks beyond the guest (each is granted), creation of device nodes.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, RenameFlags, SeekFrom};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::FileServer;
use super::host::{Place, Tree, Wanted, When, kind, name};
use super::wire::{HEADER_BYTES, Reader, Writer, directory_type};

/// Largest message: what Linux can send through a queue of 128 buffers, and its header.
pub(super) const MAX_MESSAGE: u32 = (512 << 10) + 24;
const MIN_MESSAGE: u32 = 4096;
const MAX_FIDS: usize = 1 << 16;
const MAX_WALK: u16 = 16;
/// The error answer.
const RLERROR: u8 = 7;

/// Requests; an answer's type is one more.
mod t {
    pub const STATFS: u8 = 8;
    pub const LOPEN: u8 = 12;
    pub const LCREATE: u8 = 14;
    pub const SYMLINK: u8 = 16;
    pub const MKNOD: u8 = 18;
    pub const READLINK: u8 = 22;
    pub const GETATTR: u8 = 24;
    pub const SETATTR: u8 = 26;
    pub const READDIR: u8 = 40;
    pub const FSYNC: u8 = 50;
    pub const LOCK: u8 = 52;
    pub const GETLOCK: u8 = 54;
    pub const LINK: u8 = 70;
    pub const MKDIR: u8 = 72;
    pub const RENAMEAT: u8 = 74;
    pub const UNLINKAT: u8 = 76;
    pub const VERSION: u8 = 100;
    pub const ATTACH: u8 = 104;
    pub const FLUSH: u8 = 108;
    pub const WALK: u8 = 110;
    pub const READ: u8 = 116;
    pub const WRITE: u8 = 118;
    pub const CLUNK: u8 = 120;
    pub const REMOVE: u8 = 122;
}

/// Open flags as Linux writes them in 9P (`include/net/9p/9p.h`): those of x86.
mod open {
    pub const ACCESS: u32 = 3;
    pub const EXCL: u32 = 0o200;
    pub const TRUNC: u32 = 0o1000;
    pub const APPEND: u32 = 0o2000;
    pub const DIRECTORY: u32 = 0o20_0000;
}

/// Bits of Tsetattr.
mod set {
    pub const MODE: u32 = 1;
    pub const UID: u32 = 2;
    pub const GID: u32 = 4;
    pub const SIZE: u32 = 8;
    pub const ATIME: u32 = 0x10;
    pub const MTIME: u32 = 0x20;
    pub const ATIME_SET: u32 = 0x80;
    pub const MTIME_SET: u32 = 0x100;
}

/// What the client has a number for.
#[derive(Debug)]
struct Fid {
    place: Place,
    file: Option<(OwnedFd, u32)>,
}

/// A fid in a snapshot: where it is, and how it is open.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct SavedFid {
    number: u32,
    path: Vec<u8>,
    flags: Option<u32>,
}

/// A server's state in a snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    message_bytes: u32,
    fids: Vec<SavedFid>,
}

/// The server of a shared directory.
#[derive(Debug)]
pub(super) struct Server {
    tree: Tree,
    read_only: bool,
    message_bytes: u32,
    fids: BTreeMap<u32, Fid>,
}

type Answer = Result<Writer, Errno>;

fn open_flags(flags: u32) -> Result<OFlags, Errno> {
    let mut to = match flags & open::ACCESS {
        0 => OFlags::RDONLY,
        1 => OFlags::WRONLY,
        2 => OFlags::RDWR,
        _ => return Err(Errno::INVAL),
    };
    // Append is not passed on: the client says where it writes.
    for (bit, flag) in
        [(open::EXCL, OFlags::EXCL), (open::TRUNC, OFlags::TRUNC), (open::DIRECTORY, OFlags::DIRECTORY)]
    {
        if flags & bit != 0 {
            to |= flag;
        }
    }
    Ok(to)
}

impl Server {
    pub const fn new(tree: Tree, read_only: bool) -> Self {
        Self { tree, read_only, message_bytes: MAX_MESSAGE, fids: BTreeMap::new() }
    }

    fn dispatch(&mut self, kind: u8, r: Reader<'_>) -> Answer {
        match kind {
            t::VERSION => self.version(r),
            t::ATTACH => self.attach(r),
            t::WALK => self.walk(r),
            t::CLUNK | t::REMOVE => self.clunk(r, kind),
            t::FLUSH => Ok(Writer::new()),
            t::LOPEN => self.lopen(r),
            t::LCREATE => self.lcreate(r),
            t::READ => self.read(r),
            t::WRITE => self.write(r),
            t::FSYNC => self.fsync(r),
            t::READDIR => self.readdir(r),
            t::GETATTR => self.getattr(r),
            t::SETATTR => self.setattr(r),
            t::STATFS => self.statfs(r),
            t::READLINK => self.readlink(r),
            t::MKDIR | t::MKNOD | t::SYMLINK => self.make(kind, r),
            t::LINK => self.link(r),
            t::RENAMEAT => self.renameat(r),
            t::UNLINKAT => self.unlinkat(r),
            t::LOCK => self.lock(r),
            t::GETLOCK => self.getlock(r),
            // Authentication, attributes, and renaming by fid, for which Linux has other ways.
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    // ---- fids ---------------------------------------------------------------------------------------------

    fn fid(&self, number: u32) -> Result<&Fid, Errno> {
        self.fids.get(&number).ok_or(Errno::BADF)
    }

    fn file(&self, number: u32) -> Result<&OwnedFd, Errno> {
        self.fid(number)?.file.as_ref().map(|(file, _)| file).ok_or(Errno::BADF)
    }

    fn writable(&self) -> Result<(), Errno> {
        if self.read_only { Err(Errno::ROFS) } else { Ok(()) }
    }

    fn put_qid(&self, w: &mut Writer, place: &Place) {
        let stat = &place.stat;
        // Version 0: the client keeps nothing that depends on it unless it is told to.
        w.u8(qid_type(kind(stat))).u32(0).u64(self.tree.number(stat.st_dev, stat.st_ino));
    }

    fn version(&mut self, mut r: Reader<'_>) -> Answer {
        let (size, version) = (r.u32()?, r.string()?);
        if size < MIN_MESSAGE {
            return Err(Errno::INVAL);
        }
        self.reset();
        self.message_bytes = size.min(MAX_MESSAGE);
        let mut w = Writer::new();
        let known: &[u8] = if version == b"9P2000.L" { version } else { b"unknown" };
        w.u32(self.message_bytes).string(known);
        Ok(w)
    }

    fn attach(&mut self, mut r: Reader<'_>) -> Answer {
        let number = r.u32()?;
        let place = self.tree.root()?;
        let mut w = Writer::new();
        self.put_qid(&mut w, &place);
        self.insert(number, place)?;
        Ok(w)
    }

    fn insert(&mut self, number: u32, place: Place) -> Result<(), Errno> {
        if self.fids.len() >= MAX_FIDS {
            return Err(Errno::NFILE);
        }
        if self.fids.contains_key(&number) {
            return Err(Errno::BADF);
        }
        self.fids.insert(number, Fid { place, file: None });
        Ok(())
    }

    fn walk(&mut self, mut r: Reader<'_>) -> Answer {
        let (from, to, count) = (r.u32()?, r.u32()?, r.u16()?);
        if count > MAX_WALK {
            return Err(Errno::INVAL);
        }
        let start = &self.fid(from)?.place.fd;
        let (mut w, mut done, mut end) = (Writer::new(), 0u16, None::<Place>);
        w.u16(0);
        for n in 0..count {
            let wanted = r.name()?;
            match Tree::step(end.as_ref().map_or(start, |place| &place.fd), wanted) {
                Ok(place) => {
                    self.put_qid(&mut w, &place);
                    end = Some(place);
                    done += 1;
                }
                Err(errno) if n == 0 => return Err(errno),
                Err(_) => break,
            }
        }
        if done == count {
            let place = match end {
                Some(place) => place,
                None => {
                    let fd = start.try_clone().map_err(|_| Errno::MFILE)?;
                    Place { stat: rustix::fs::fstat(&fd)?, fd }
                }
            };
            if from == to {
                self.fids.remove(&from);
            }
            self.insert(to, place)?;
        }
        let mut whole = Writer::new();
        whole.u16(done);
        whole.raw(&w.finish(0, 0)[HEADER_BYTES + 2..]);
        Ok(whole)
    }

    /// Tremove, too, lets go of its fid; it does not remove, since a file may have many names: Linux unlinks by name.
    fn clunk(&mut self, mut r: Reader<'_>, kind: u8) -> Answer {
        self.fids.remove(&r.u32()?).ok_or(Errno::BADF)?;
        if kind == t::REMOVE { Err(Errno::OPNOTSUPP) } else { Ok(Writer::new()) }
    }

    // ---- files --------------------------------------------------------------------------------------------

    /// Whether flags ask for more than reading.
    fn check_flags(&self, flags: u32) -> Result<OFlags, Errno> {
        if flags & (open::ACCESS | open::TRUNC | open::APPEND) != 0 {
            self.writable()?;
        }
        open_flags(flags)
    }

    fn lopen(&mut self, mut r: Reader<'_>) -> Answer {
        let (number, flags) = (r.u32()?, r.u32()?);
        let to = self.check_flags(flags)? - OFlags::EXCL;
        let fid = self.fid(number)?;
        let file = self.tree.reopen(&fid.place, to)?;
        let mut w = Writer::new();
        self.put_qid(&mut w, &fid.place);
        w.u32(0);
        if let Some(fid) = self.fids.get_mut(&number) {
            fid.file = Some((file, flags & !open::TRUNC));
        }
        Ok(w)
    }

    fn lcreate(&mut self, mut r: Reader<'_>) -> Answer {
        self.writable()?;
        let (number, wanted, flags, mode) = (r.u32()?, r.name()?, r.u32()?, r.u32()?);
        let directory = &self.fid(number)?.place.fd;
        let to = open_flags(flags)? - OFlags::TRUNC - OFlags::DIRECTORY;
        let (file, place) = Tree::create(directory, wanted, to, mode)?;
        let mut w = Writer::new();
        self.put_qid(&mut w, &place);
        w.u32(0);
        self.fids.insert(number, Fid { place, file: Some((file, flags & !open::TRUNC)) });
        Ok(w)
    }

    /// Most data in an answer.
    fn room(&self, count: u32) -> usize {
        let most = usize::try_from(self.message_bytes).unwrap_or(0).saturating_sub(HEADER_BYTES + 4);
        most.min(usize::try_from(count).unwrap_or(usize::MAX))
    }

    fn read(&mut self, mut r: Reader<'_>) -> Answer {
        let (number, offset, count) = (r.u32()?, r.u64()?, r.u32()?);
        let file = self.file(number)?;
        let mut w = Writer::new();
        w.data(self.room(count), |data| rustix::io::pread(file, data, offset))?;
        Ok(w)
    }

    fn write(&mut self, mut r: Reader<'_>) -> Answer {
        self.writable()?;
        let (number, offset, count) = (r.u32()?, r.u64()?, r.u32()?);
        let data = r.bytes(usize::try_from(count).map_err(|_| Errno::INVAL)?)?;
        let done = rustix::io::pwrite(self.file(number)?, data, offset)?;
        let mut w = Writer::new();
        w.u32(u32::try_from(done).unwrap_or(0));
        Ok(w)
    }

    fn fsync(&mut self, mut r: Reader<'_>) -> Answer {
        let number = r.u32()?;
        let only_data = r.u32().is_ok_and(|value| value != 0);
        let file = self.file(number)?;
        if only_data {
            rustix::fs::fdatasync(file)?
        } else {
            rustix::fs::fsync(file)?
        }
        Ok(Writer::new())
    }

    fn readdir(&mut self, mut r: Reader<'_>) -> Answer {
        let (number, offset, count) = (r.u32()?, r.u64()?, r.u32()?);
        let fid = self.fid(number)?;
        if kind(&fid.place.stat) != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let (file, device, room) = (self.file(number)?, fid.place.stat.st_dev, self.room(count));
        rustix::fs::seek(file, SeekFrom::Start(offset))?;
        let mut buffer = [MaybeUninit::uninit(); 16 << 10];
        let mut entries = RawDir::new(file, &mut buffer);
        let mut list = Writer::new();
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let text = entry.file_name().to_bytes();
            if list.len() - HEADER_BYTES + 13 + 8 + 1 + 2 + text.len() > room {
                break;
            }
            let path = self.tree.number(device, entry.ino());
            list.u8(qid_type(entry.file_type())).u32(0).u64(path);
            list.u64(entry.next_entry_cookie()).u8(directory_type(entry.file_type())).string(text);
        }
        let list = list.finish(0, 0);
        let mut w = Writer::new();
        w.u32(u32::try_from(list.len() - HEADER_BYTES).unwrap_or(0)).raw(&list[HEADER_BYTES..]);
        Ok(w)
    }

    // ---- attributes ---------------------------------------------------------------------------------------

    fn getattr(&mut self, mut r: Reader<'_>) -> Answer {
        /// `P9_GETATTR_BASIC`.
        const BASIC: u64 = 0x7ff;
        let fid = self.fid(r.u32()?)?;
        let s = rustix::fs::fstat(&fid.place.fd)?;
        let mut w = Writer::new();
        w.u64(BASIC);
        self.put_qid(&mut w, &fid.place);
        w.u32(s.st_mode).u32(s.st_uid).u32(s.st_gid).u64(s.st_nlink).u64(s.st_rdev);
        let bits = |value: i64| u64::from_le_bytes(value.to_le_bytes());
        w.u64(bits(s.st_size)).u64(bits(s.st_blksize)).u64(bits(s.st_blocks));
        w.u64(bits(s.st_atime)).u64(s.st_atime_nsec);
        w.u64(bits(s.st_mtime)).u64(s.st_mtime_nsec);
        w.u64(bits(s.st_ctime)).u64(s.st_ctime_nsec);
        w.u64(0).u64(0).u64(0).u64(0);
        Ok(w)
    }

    fn setattr(&mut self, mut r: Reader<'_>) -> Answer {
        self.writable()?;
        let (number, valid, mode) = (r.u32()?, r.u32()?, r.u32()?);
        let (uid, gid, size) = (r.u32()?, r.u32()?, r.u64()?);
        let mut time = || Ok::<_, Errno>((r.u64()?, r.u64()?));
        let (atime, mtime) = (time()?, time()?);
        let given = |bit: u32| valid & bit != 0;
        let time = |bit, explicit, (seconds, nanos)| {
            given(bit).then_some(if given(explicit) { When::At { seconds, nanos } } else { When::Now })
        };
        let wanted = Wanted {
            mode: given(set::MODE).then_some(mode),
            owner: given(set::UID).then_some(uid),
            group: given(set::GID).then_some(gid),
            size: given(set::SIZE).then_some(size),
            accessed: time(set::ATIME, set::ATIME_SET, atime),
            modified: time(set::MTIME, set::MTIME_SET, mtime),
        };
        self.tree.set_attributes(&self.fid(number)?.place, &wanted)?;
        Ok(Writer::new())
    }

    fn statfs(&mut self, mut r: Reader<'_>) -> Answer {
        let s = rustix::fs::fstatfs(&self.fid(r.u32()?)?.place.fd)?;
        let mut w = Writer::new();
        let word = |value: i64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
        w.u32(word(s.f_type)).u32(word(s.f_bsize));
        w.u64(s.f_blocks).u64(s.f_bfree).u64(s.f_bavail).u64(s.f_files).u64(s.f_ffree);
        w.u64(0).u32(word(s.f_namelen));
        Ok(w)
    }

    // ---- names --------------------------------------------------------------------------------------------

    fn readlink(&mut self, mut r: Reader<'_>) -> Answer {
        let target = rustix::fs::readlinkat(&self.fid(r.u32()?)?.place.fd, "", Vec::new())?;
        let mut w = Writer::new();
        w.string(target.as_bytes());
        Ok(w)
    }

    /// Directories, pipes and the like, symbolic links.
    fn make(&mut self, what: u8, mut r: Reader<'_>) -> Answer {
        self.writable()?;
        let (number, wanted) = (r.u32()?, r.name()?);
        let directory = &self.fid(number)?.place.fd;
        match what {
            t::SYMLINK => rustix::fs::symlinkat(name(r.string()?), directory, name(wanted))?,
            t::MKDIR => {
                rustix::fs::mkdirat(directory, name(wanted), Mode::from_raw_mode(r.u32()? & 0o7777))?;
            }
            _ => Tree::make_node(directory, wanted, r.u32()?, 0)?,
        }
        let mut w = Writer::new();
        self.put_qid(&mut w, &Tree::step(directory, wanted)?);
        Ok(w)
    }

    fn link(&mut self, mut r: Reader<'_>) -> Answer {
        self.writable()?;
        let (directory, number, wanted) = (r.u32()?, r.u32()?, r.name()?);
        self.tree.link(&self.fid(number)?.place, &self.fid(directory)?.place.fd, wanted)?;
        Ok(Writer::new())
    }

    fn renameat(&mut self, mut r: Reader<'_>) -> Answer {
        self.writable()?;
        let (from, old, to, new) = (r.u32()?, r.name()?, r.u32()?, r.name()?);
        let (from, to) = (&self.fid(from)?.place.fd, &self.fid(to)?.place.fd);
        rustix::fs::renameat_with(from, name(old), to, name(new), RenameFlags::empty())?;
        Ok(Writer::new())
    }

    fn unlinkat(&mut self, mut r: Reader<'_>) -> Answer {
        /// `AT_REMOVEDIR` of Linux.
        const DIRECTORY: u32 = 0x200;
        self.writable()?;
        let (number, wanted, flags) = (r.u32()?, r.name()?, r.u32()?);
        let how = if flags & DIRECTORY != 0 { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        rustix::fs::unlinkat(&self.fid(number)?.place.fd, name(wanted), how)?;
        Ok(Writer::new())
    }

    /// The guest's kernel keeps its programs apart by itself; between guest and host nothing is locked, as with QEMU.
    fn lock(&mut self, mut r: Reader<'_>) -> Answer {
        self.file(r.u32()?)?;
        let mut w = Writer::new();
        w.u8(0);
        Ok(w)
    }

    fn getlock(&mut self, mut r: Reader<'_>) -> Answer {
        /// `P9_LOCK_TYPE_UNLCK`.
        const NONE: u8 = 2;
        self.file(r.u32()?)?;
        r.u8()?;
        let (start, length, process, client) = (r.u64()?, r.u64()?, r.u32()?, r.string()?);
        let mut w = Writer::new();
        w.u8(NONE).u64(start).u64(length).u32(process).string(client);
        Ok(w)
    }
}

impl FileServer for Server {
    fn reset(&mut self) {
        self.fids.clear();
        self.message_bytes = MAX_MESSAGE;
    }

    fn answer(&mut self, message: &[u8], _room: usize) -> Vec<u8> {
        let mut reader = Reader(message);
        let header = |r: &mut Reader<'_>| Ok::<_, Errno>((r.u32()?, r.u8()?, r.u16()?));
        let (size, kind, tag) = header(&mut reader).unwrap_or((0, 0, u16::MAX));
        let answer = if usize::try_from(size).is_ok_and(|size| size <= message.len() && size >= HEADER_BYTES)
        {
            self.dispatch(kind, Reader(&message[HEADER_BYTES..size as usize]))
        } else {
            Err(Errno::INVAL)
        };
        match answer {
            Ok(writer) => writer.finish(kind.wrapping_add(1), tag),
            Err(errno) => {
                let mut writer = Writer::new();
                writer.u32(u32::try_from(errno.raw_os_error()).unwrap_or(5));
                writer.finish(RLERROR, tag)
            }
        }
    }

    /// Where every fid is by now. One whose file has no name any more is not saved: it is gone after a restore.
    fn save(&self) -> Value {
        let saved = |(&number, fid): (&u32, &Fid)| {
            let path = self.tree.relative(&fid.place.fd)?;
            Some(SavedFid { number, path, flags: fid.file.as_ref().map(|(_, flags)| *flags) })
        };
        let fids = self.fids.iter().filter_map(saved).collect();
        let state = State { message_bytes: self.message_bytes, fids };
        serde_json::to_value(state).expect("plain data serialises")
    }

    /// Finds every fid's file again; those that are gone stay away, and the guest gets an error for them.
    fn restore(&mut self, state: &Value) -> Result<(), serde_json::Error> {
        let state = State::deserialize(state)?;
        self.reset();
        self.message_bytes = state.message_bytes.clamp(MIN_MESSAGE, MAX_MESSAGE);
        for saved in state.fids.iter().take(MAX_FIDS) {
            let Ok(place) = self.tree.find(&saved.path) else { continue };
            let opened = |flags: u32| {
                let to = self.check_flags(flags).ok()? - OFlags::EXCL;
                Some((self.tree.reopen(&place, to).ok()?, flags))
            };
            let file = saved.flags.and_then(opened);
            self.fids.insert(saved.number, Fid { place, file });
        }
        Ok(())
    }
}

const fn qid_type(kind: FileType) -> u8 {
    match kind {
        FileType::Directory => 0x80,
        FileType::Symlink => 2,
        _ => 0,
    }
}
