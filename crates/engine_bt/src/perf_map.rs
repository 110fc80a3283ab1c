//! What tells Linux's `perf` about fragments.
//!
//! A **perf map** is a text file `/tmp/perf-PID.map` of lines `START SIZE NAME` in hexadecimal (linux `tools/perf/Documentation/jit-interface.txt`).
//! `perf report` reads it at the end, so it says what is in code memory now: when code memory is used anew, the old lines go.
//!
//! A **jitdump** (`tools/perf/Documentation/jitdump-specification.txt`, version 1) has every fragment with its bytes and the time it was made, so
//! that `perf inject --jit` can tell what was where when a sample was taken, and `perf annotate` shows its instructions. perf finds the file
//! because this process maps it executable.

#![expect(unsafe_code, reason = "maps the jitdump, which is how perf finds it")]

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// A file of a profile cannot be made.
#[derive(Debug)]
pub struct ProfileError {
    /// The file.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

impl std::fmt::Display for ProfileError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cannot write {} for perf: {}", self.path.display(), self.source)
    }
}

impl std::error::Error for ProfileError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// The files of a process: one for all its vCPUs.
pub struct Profile {
    map: Option<PerfMap>,
    dump: Option<JitDump>,
}

impl Profile {
    /// Opens what is wanted: the perf map, and a jitdump in a directory.
    ///
    /// # Errors
    /// When a file cannot be made.
    pub fn open(map: bool, dump_directory: Option<&Path>) -> Result<Self, ProfileError> {
        let pid = std::process::id();
        let open = |path: PathBuf| {
            fresh_file(&path).map(|file| (file, path.clone())).map_err(|source| ProfileError { path, source })
        };
        // The directory is perf's, not the user's TMPDIR.
        let map = map.then(|| open(PathBuf::from(format!("/tmp/perf-{pid}.map")))).transpose()?;
        let dump = match dump_directory {
            Some(directory) => {
                let (file, path) = open(directory.join(format!("jit-{pid}.dump")))?;
                Some(JitDump::new(file, pid).map_err(|source| ProfileError { path, source })?)
            }
            None => None,
        };
        Ok(Self { map: map.map(|(file, _)| PerfMap { file, lines: BTreeMap::new() }), dump })
    }

    /// A fragment was made. A file that cannot be written any more ends there: the guest goes on.
    pub fn add(&mut self, address: u64, code: &[u8], name: &str) {
        let written = self.map.as_mut().map_or(Ok(()), |map| map.add(address, code.len() as u64, name));
        keep(&mut self.map, written);
        let written = self.dump.as_mut().map_or(Ok(()), |dump| dump.add(address, code, name));
        keep(&mut self.dump, written);
    }

    /// The fragments at these addresses are no more.
    pub fn forget(&mut self, addresses: &Range<u64>) {
        let written = self.map.as_mut().map_or(Ok(()), |map| map.forget(addresses));
        keep(&mut self.map, written);
    }
}

fn keep<T>(file: &mut Option<T>, written: io::Result<()>) {
    if let Err(error) = written {
        tracing::warn!("a file for perf is not written any more: {error}");
        *file = None;
    }
}

/// A new file, never one that somebody else put there: these are well-known names in shared directories.
fn fresh_file(path: &Path) -> io::Result<File> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

struct PerfMap {
    file: File,
    /// Sizes and names by address.
    lines: BTreeMap<u64, (u64, String)>,
}

impl PerfMap {
    fn add(&mut self, address: u64, len: u64, name: &str) -> io::Result<()> {
        self.lines.insert(address, (len, name.to_owned()));
        self.file.write_all(map_line(address, len, name).as_bytes())
    }

    fn forget(&mut self, addresses: &Range<u64>) -> io::Result<()> {
        let gone: Vec<u64> = self.lines.range(addresses.clone()).map(|(address, _)| *address).collect();
        if gone.is_empty() {
            return Ok(());
        }
        for address in gone {
            self.lines.remove(&address);
        }
        let text: String = self.lines.iter().map(|(at, (len, name))| map_line(*at, *len, name)).collect();
        self.file.set_len(0)?;
        io::Seek::rewind(&mut self.file)?;
        self.file.write_all(text.as_bytes())
    }
}

fn map_line(address: u64, len: u64, name: &str) -> String {
    format!("{address:x} {len:x} {name}\n")
}

/// `JiTD`, as the writing machine has it.
const MAGIC: u32 = 0x4a69_5444;
const VERSION: u32 = 1;
const FILE_HEADER_BYTES: u32 = 40;
/// EM_X86_64.
const MACHINE: u32 = 62;
const CODE_LOAD: u32 = 0;
const CODE_CLOSE: u32 = 3;
const RECORD_HEADER_BYTES: usize = 16;
const MARKER_BYTES: usize = 4096;

struct JitDump {
    file: File,
    pid: u32,
    index: u64,
    /// The mapping that perf sees.
    marker: NonNull<u8>,
}

// SAFETY: nobody reads or writes the marker; it is only unmapped, once.
unsafe impl Send for JitDump {}

impl JitDump {
    fn new(mut file: File, pid: u32) -> io::Result<Self> {
        let mut header = Vec::new();
        for word in [MAGIC, VERSION, FILE_HEADER_BYTES, MACHINE, 0, pid] {
            header.extend(word.to_ne_bytes());
        }
        header.extend(now().to_ne_bytes());
        header.extend(0u64.to_ne_bytes());
        file.write_all(&header)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice, which nothing accesses.
        let marker = unsafe {
            mmap(
                std::ptr::null_mut(),
                MARKER_BYTES,
                ProtFlags::READ | ProtFlags::EXEC,
                MapFlags::PRIVATE,
                &file,
                0,
            )?
        };
        let marker = NonNull::new(marker.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { file, pid, index: 0, marker })
    }

    fn add(&mut self, address: u64, code: &[u8], name: &str) -> io::Result<()> {
        let thread = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        let mut body = Vec::with_capacity(40 + name.len() + 1 + code.len());
        body.extend(self.pid.to_ne_bytes());
        body.extend(thread.to_ne_bytes());
        for word in [address, address, code.len() as u64, self.index] {
            body.extend(word.to_ne_bytes());
        }
        body.extend(name.bytes());
        body.push(0);
        body.extend(code);
        self.index += 1;
        self.record(CODE_LOAD, &body)
    }

    fn record(&mut self, kind: u32, body: &[u8]) -> io::Result<()> {
        let len = u32::try_from(RECORD_HEADER_BYTES + body.len()).map_err(io::Error::other)?;
        let mut record = Vec::with_capacity(RECORD_HEADER_BYTES + body.len());
        record.extend(kind.to_ne_bytes());
        record.extend(len.to_ne_bytes());
        record.extend(now().to_ne_bytes());
        record.extend(body);
        self.file.write_all(&record)
    }
}

impl Drop for JitDump {
    fn drop(&mut self) {
        let _lost = self.record(CODE_CLOSE, &[]);
        // SAFETY: our own mapping, which nobody uses.
        let _unmapped = unsafe { munmap(self.marker.as_ptr().cast(), MARKER_BYTES) };
    }
}

/// Nanoseconds of the clock that `perf record -k mono` uses.
fn now() -> u64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    t.tv_sec.unsigned_abs() * 1_000_000_000 + t.tv_nsec.unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("trellis-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    #[test]
    fn map_says_what_is_in_code_memory_now() {
        let directory = directory("map");
        let path = directory.join("m");
        let mut map = PerfMap { file: fresh_file(&path).unwrap(), lines: BTreeMap::new() };
        map.add(0x1000, 0x20, "guest:k:ffffffff81000000").unwrap();
        map.add(0x9000, 0x30, "guest:u:401000").unwrap();
        let text = || std::fs::read_to_string(&path).unwrap();
        assert_eq!(text(), "1000 20 guest:k:ffffffff81000000\n9000 30 guest:u:401000\n");
        map.forget(&(0x1000..0x2000)).unwrap();
        map.add(0x1000, 0x10, "guest:k:0").unwrap();
        assert_eq!(text(), "9000 30 guest:u:401000\n1000 10 guest:k:0\n");
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn jitdump_has_header_records_and_close() {
        let directory = directory("jit");
        let path = directory.join("j");
        let mut dump = JitDump::new(fresh_file(&path).unwrap(), 77).unwrap();
        dump.add(0x1234, &[0x90, 0xc3], "guest:u:1").unwrap();
        drop(dump);
        let bytes = std::fs::read(&path).unwrap();
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!([word(0), word(4), word(8), word(12), word(20)], [0x4a69_5444, 1, 40, 62, 77]);
        let len = 16 + 40 + 10 + 2;
        assert_eq!((word(40), word(44)), (CODE_LOAD, len));
        assert_eq!(u64::from_ne_bytes(bytes[72..80].try_into().unwrap()), 0x1234);
        assert_eq!(&bytes[96..106], b"guest:u:1\0");
        assert_eq!(&bytes[106..108], [0x90, 0xc3]);
        assert_eq!((word(108), word(112), bytes.len()), (CODE_CLOSE, 16, 124));
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_link_in_the_way_is_not_followed() {
        let directory = directory("link");
        let (victim, path) = (directory.join("victim"), directory.join("map"));
        std::fs::write(&victim, "keep").unwrap();
        std::os::unix::fs::symlink(&victim, &path).unwrap();
        fresh_file(&path).unwrap().write_all(b"x").unwrap();
        assert_eq!(std::fs::read_to_string(&victim).unwrap(), "keep");
        std::fs::remove_dir_all(directory).unwrap();
    }
}
