//! The root in which real programs run: one list of entries, laid as a directory for the host and as an initramfs for
//! guests, so that both have the same files at the same paths.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rustix::fs::StatVfsMountFlags;
use tempfile::TempDir;

use super::guest::base_archive;
use crate::image::cpio::Archive;
use crate::image::programs::{BINARIES, LIBRARIES, Programs};

/// What a native root must leave free: the programs' own files, which are some 30 MiB.
const SPARE_LEN: u64 = 96 << 20;

/// Which root a program is run in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// Nothing but the benchmark program.
    Bare,
    /// Beside it the real programs.
    Programs,
    /// Beside it the programs of macrobenchmarks.
    Macro,
    /// No operating system: the guest of single operations. Natively the program does what a process can.
    Metal,
}

/// The root in both forms, of which a run may need one only; removed with it.
#[derive(Debug)]
pub struct ProgramRoot {
    /// For native runs.
    pub directory: Option<PathBuf>,
    /// For guests.
    pub initrd: Option<PathBuf>,
    /// What a reader of the times must know.
    pub notes: Vec<String>,
    _directories: Vec<TempDir>,
}

/// Something in a root; parents come first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A directory.
    Directory(String),
    /// A symbolic link, and what it says.
    Link(String, String),
    /// A file that may be executed, and its content.
    File(String, Vec<u8>),
}

impl ProgramRoot {
    /// Lays the root in the forms that are wanted.
    ///
    /// # Errors
    /// The cache cannot be read, or the files cannot be written.
    pub fn lay(programs: &Programs, natively: bool, for_guests: bool) -> anyhow::Result<Self> {
        Self::of_entries(&entries(programs)?, natively, for_guests)
    }

    /// The same of any entries.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn of_entries(entries: &[Entry], natively: bool, for_guests: bool) -> anyhow::Result<Self> {
        let mut root = Self { directory: None, initrd: None, notes: Vec::new(), _directories: Vec::new() };
        if natively {
            root.lay_directory(entries)?;
        }
        if for_guests {
            let place = temporary(None)?;
            let initrd = place.path().join("initrd");
            fs::write(&initrd, initramfs(entries))
                .with_context(|| format!("cannot write {}", initrd.display()))?;
            root.initrd = Some(initrd);
            root._directories.push(place);
        }
        Ok(root)
    }

    /// In memory if this host has a file system there that is large enough and lets programs be executed.
    fn lay_directory(&mut self, entries: &[Entry]) -> anyhow::Result<()> {
        let memory = Path::new("/dev/shm");
        let in_memory = if can_hold_programs(memory, total_len(entries) + SPARE_LEN) {
            temporary(Some(memory)).ok()
        } else {
            None
        };
        if in_memory.is_none() {
            self.notes.push(
                "native real programs have their files on a disk's file system, guests in memory: /dev/shm is too small \
                 here, or executes nothing"
                    .to_owned(),
            );
        }
        let place = in_memory.map_or_else(|| temporary(None), Ok)?;
        let directory = place.path().join("root");
        lay_entries(entries, &directory)
            .with_context(|| format!("cannot lay the programs' root in {}", directory.display()))?;
        self.directory = Some(directory);
        self._directories.push(place);
        Ok(())
    }
}

fn temporary(parent: Option<&Path>) -> anyhow::Result<TempDir> {
    let made = parent.map_or_else(
        || TempDir::with_prefix("trellis-bench-"),
        |parent| TempDir::with_prefix_in("trellis-bench-", parent),
    );
    made.context("cannot make a temporary directory")
}

/// Whether programs in `directory` may be executed, and `len` bytes are free.
fn can_hold_programs(directory: &Path, len: u64) -> bool {
    rustix::fs::statvfs(directory).is_ok_and(|data| {
        let free = data.f_bavail.saturating_mul(data.f_frsize);
        free >= len && !data.f_flag.contains(StatVfsMountFlags::NOEXEC)
    })
}

/// A root with merged `/usr`, as distributions have it.
fn entries(programs: &Programs) -> anyhow::Result<Vec<Entry>> {
    let mut entries: Vec<Entry> = ["usr", BINARIES, "usr/lib", LIBRARIES, "usr/lib64"]
        .map(|name| Entry::Directory(name.to_owned()))
        .into();
    let links = [("bin", BINARIES), ("lib", "usr/lib"), ("lib64", "usr/lib64")];
    entries.extend(links.map(|(name, target)| Entry::Link(name.to_owned(), target.to_owned())));
    let files = programs.read().context("cannot read the real programs")?;
    entries.extend(files.into_iter().map(|(path, content)| Entry::File(path, content)));
    Ok(entries)
}

fn total_len(entries: &[Entry]) -> u64 {
    let len = |entry: &Entry| if let Entry::File(_, content) = entry { content.len() as u64 } else { 0 };
    entries.iter().map(len).sum()
}

fn lay_entries(entries: &[Entry], root: &Path) -> std::io::Result<()> {
    fs::create_dir(root)?;
    // A guest's is a device; here nothing reads back what is written to it.
    let null = root.join("dev/null");
    fs::create_dir(root.join("dev"))?;
    fs::write(&null, [])?;
    fs::set_permissions(&null, fs::Permissions::from_mode(0o666))?;
    for entry in entries {
        match entry {
            Entry::Directory(path) => fs::create_dir(root.join(path))?,
            Entry::Link(path, target) => symlink(target, root.join(path))?,
            Entry::File(path, content) => {
                let path = root.join(path);
                fs::write(&path, content)?;
                fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
            }
        }
    }
    Ok(())
}

/// The root with the benchmark program as `/init`.
fn initramfs(entries: &[Entry]) -> Vec<u8> {
    let mut archive: Archive = base_archive();
    for entry in entries {
        match entry {
            Entry::Directory(path) => archive.directory(path),
            Entry::Link(path, target) => archive.symlink(path, target),
            Entry::File(path, content) => archive.file(path, 0o755, content),
        }
    }
    archive.finish()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A directory with two files in the place of the programs.
    pub(crate) fn programs(directory: &Path) -> Programs {
        let files = ["usr/bin/true", "usr/lib/x86_64-linux-gnu/libc.so.6"].map(str::to_owned);
        for file in &files {
            let path = directory.join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("content of {file}")).unwrap();
        }
        Programs { directory: directory.to_owned(), files: files.into(), packages: Vec::new() }
    }

    #[test]
    fn both_forms_hold_the_same_files() {
        let directory = tempfile::tempdir().unwrap();
        let programs = programs(directory.path());
        let root = ProgramRoot::lay(&programs, true, true).unwrap();
        let initrd = fs::read(root.initrd.as_ref().unwrap()).unwrap();
        for (name, content) in programs.read().unwrap() {
            let native = root.directory.as_ref().unwrap().join(&name);
            assert_eq!(fs::read(&native).unwrap(), content);
            assert_eq!(fs::metadata(&native).unwrap().permissions().mode() & 0o777, 0o755);
            let holds = |part: &[u8]| initrd.windows(part.len()).any(|window| window == part);
            assert!(holds(name.as_bytes()) && holds(&content), "{name}");
        }
        assert!(root.directory.as_ref().unwrap().join("bin/true").is_file(), "a link to usr/bin");
    }

    #[test]
    fn forms_that_nobody_wants_are_not_laid() {
        let directory = tempfile::tempdir().unwrap();
        let root = ProgramRoot::lay(&programs(directory.path()), false, false).unwrap();
        assert!(root.directory.is_none() && root.initrd.is_none() && root.notes.is_empty());
    }

    #[test]
    fn place_without_room_is_not_taken() {
        assert!(!can_hold_programs(Path::new("/"), u64::MAX));
        assert!(!can_hold_programs(Path::new("/nonexistent"), 1));
    }
}
