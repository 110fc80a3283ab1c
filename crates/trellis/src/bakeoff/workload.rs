//! A command of this host and what it needs, as entries of a root that the host and every guest see alike.
//!
//! The program is looked up as a shell would; a script brings its interpreter. Shared libraries are those that the program's own loader says
//! it would take (`ld.so --list`, which is what ldd asks). Arguments that name files, `--with`'s paths, and the working directory
//! are at the same places. Nothing else of the host is there.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

use super::args::BakeoffArgs;
use crate::bench::mode::find_in_path;
use crate::bench::root::Entry;
use crate::image::elf;
use crate::prepare::PrepareError;

/// Where a benchmark of ours lies.
const BENCH: &str = "/bakeoff/bench";
/// Interpreters of interpreters.
const MAX_SCRIPTS: u32 = 4;
/// What a root may hold: it lies in the guest's memory.
const MAX_LEN: u64 = 1 << 30;

/// What is to be run, and where.
#[derive(Clone, Debug)]
pub struct Workload {
    /// What the root holds.
    pub entries: Vec<Entry>,
    /// The program's file.
    pub program: Vec<u8>,
    /// The command, for people.
    pub name: String,
}

/// Files under collection, by their path in the root.
#[derive(Default)]
struct Collection {
    files: BTreeMap<PathBuf, Vec<u8>>,
    directories: Vec<PathBuf>,
    len: u64,
}

impl Workload {
    /// Finds everything that a command needs.
    ///
    /// # Errors
    /// There is no such program, or a file of it cannot be read: one line.
    pub fn new(args: &BakeoffArgs) -> anyhow::Result<Self> {
        if let Some((name, count)) = &args.bench {
            return Ok(Self::of_bench(name, *count, args.cpus));
        }
        let [name, arguments @ ..] = args.command.as_slice() else { bail!("no command") };
        let program = find_program(name)?;
        let here = std::env::current_dir().context("there is no working directory")?;
        let mut collection = Collection::default();
        collection.directories.push(here.clone());
        collection.program(&program, 0)?;
        for path in arguments.iter().map(|argument| here.join(argument)).filter(|path| path.is_file()) {
            collection.file(&path)?;
        }
        for path in &args.with {
            collection.tree(&here.join(path))?;
        }
        let content = collection.files.get(&program).cloned().unwrap_or_default();
        let mut words = vec![pin(args.cpus), here.as_os_str().as_bytes(), program.as_os_str().as_bytes()];
        words.extend(args.command.iter().map(|word| word.as_bytes()));
        let input = args.input.as_ref().map(|file| read(file)).transpose()?.unwrap_or_default();
        let shown: Vec<String> =
            args.command.iter().map(|word| word.to_string_lossy().into_owned()).collect();
        Ok(Self { entries: collection.entries(&words, input), program: content, name: shown.join(" ") })
    }

    /// A benchmark of ours, as a command.
    fn of_bench(name: &str, count: u64, cpus: u32) -> Self {
        let program = guest_bench::PROGRAM.to_vec();
        let mut collection = Collection::default();
        collection.files.insert(PathBuf::from(BENCH), program.clone());
        let count = count.to_string();
        let words = ["/tmp", BENCH, "bench", "run", name, &count].map(str::as_bytes);
        let words: Vec<&[u8]> = std::iter::once(pin(cpus)).chain(words).collect();
        Self {
            entries: collection.entries(&words, Vec::new()),
            program,
            name: format!("bench run {name} {count}"),
        }
    }

    /// Bytes of all files.
    #[must_use]
    pub fn len(&self) -> u64 {
        let len = |entry: &Entry| if let Entry::File(_, content) = entry { content.len() as u64 } else { 0 };
        self.entries.iter().map(len).sum()
    }

    /// Whether there are none: never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// The word that keeps the native run on one CPU.
const fn pin(cpus: u32) -> &'static [u8] {
    if cpus == 1 { b"pin" } else { b"" }
}

/// A program by name or path.
fn find_program(name: &OsStr) -> anyhow::Result<PathBuf> {
    let has_slash = name.as_bytes().contains(&b'/');
    let found = if has_slash {
        Some(PathBuf::from(name)).filter(|path| path.is_file())
    } else {
        name.to_str().and_then(find_in_path)
    };
    let path = found.ok_or_else(|| {
        let place = if has_slash { "" } else { " in PATH" };
        PrepareError::Usage(format!("there is no program '{}'{place} on this host", name.display()))
    })?;
    std::path::absolute(&path).with_context(|| format!("cannot find {}", path.display()))
}

fn read(path: &Path) -> anyhow::Result<Vec<u8>> {
    fs::read(path)
        .map_err(|error| PrepareError::Usage(format!("cannot read {}: {error}", path.display())).into())
}

impl Collection {
    /// A program with its interpreter or its libraries.
    fn program(&mut self, path: &Path, depth: u32) -> anyhow::Result<()> {
        self.file(path)?;
        let content = self.files.get(path).map(Vec::as_slice).unwrap_or_default();
        if let Some(interpreter) = interpreter(content) {
            if depth >= MAX_SCRIPTS {
                bail!("{} is a script of a script of a script", path.display());
            }
            for word in interpreter {
                // `#!/usr/bin/env python3` brings both.
                let found = if word.as_bytes().contains(&b'/') {
                    Some(PathBuf::from(&word))
                } else {
                    word.to_str().and_then(find_in_path)
                };
                if let Some(program) = found.filter(|program| program.is_file()) {
                    self.program(&program, depth + 1)?;
                }
            }
            return Ok(());
        }
        match elf::needed(content) {
            None => Err(PrepareError::Usage(format!(
                "{} is no 64-bit program and no script; guests could not run it",
                path.display()
            ))
            .into()),
            Some(needed) if needed.is_empty() && loader(content).is_none() => Ok(()),
            Some(_) => self.libraries(path, loader(content)),
        }
    }

    /// What the program's loader says that it would take.
    fn libraries(&mut self, path: &Path, loader: Option<PathBuf>) -> anyhow::Result<()> {
        let Some(loader) = loader else { return Ok(()) };
        self.file(&loader)?;
        let output = Command::new(&loader).arg("--list").arg(path).env("LC_ALL", "C").output();
        let output = output.with_context(|| format!("cannot ask {} for libraries", loader.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        for line in text.lines() {
            if let Some((name, _)) = line.split_once("=> not found") {
                bail!("{} needs {}, which this host lacks", path.display(), name.trim());
            }
            if let Some(library) = library(line) {
                self.file(&library)?;
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path) -> anyhow::Result<()> {
        if self.files.contains_key(path) {
            return Ok(());
        }
        let content = read(path)?;
        self.len += content.len() as u64;
        if self.len > MAX_LEN {
            bail!(PrepareError::Usage(format!("the command needs more than {} MiB of files", MAX_LEN >> 20)));
        }
        self.files.insert(path.to_owned(), content);
        Ok(())
    }

    /// A file, or all below a directory.
    fn tree(&mut self, path: &Path) -> anyhow::Result<()> {
        if !path.is_dir() {
            return self.file(path);
        }
        self.directories.push(path.to_owned());
        let listed = fs::read_dir(path)
            .map_err(|error| PrepareError::Usage(format!("cannot read {}: {error}", path.display())))?;
        for entry in listed {
            let entry = entry.with_context(|| format!("cannot read {}", path.display()))?.path();
            let kind = fs::metadata(&entry).map(|metadata| metadata.file_type());
            match kind {
                Ok(kind) if kind.is_dir() && !entry.is_symlink() => self.tree(&entry)?,
                Ok(kind) if kind.is_file() => self.file(&entry)?,
                // Links to nowhere, sockets, links to directories (which may lead round).
                _ => {}
            }
        }
        Ok(())
    }

    /// The entries of the root, parents first.
    fn entries(self, words: &[&[u8]], input: Vec<u8>) -> Vec<Entry> {
        let mut directories: BTreeMap<String, ()> = BTreeMap::new();
        let mut add = |path: &Path| {
            for parent in path.ancestors().filter_map(in_root) {
                directories.insert(parent, ());
            }
        };
        ["/bakeoff", "/tmp", "/proc"].iter().for_each(|path| add(Path::new(path)));
        self.directories.iter().for_each(|path| add(path));
        self.files.keys().filter_map(|path| path.parent()).for_each(&mut add);
        // The initramfs of guests has it already, with the devices.
        directories.remove("dev");
        let mut entries: Vec<Entry> = directories.into_keys().map(Entry::Directory).collect();
        let files =
            self.files.into_iter().filter_map(|(path, content)| Some(Entry::File(in_root(&path)?, content)));
        entries.extend(files);
        let mut command = words.join(&0);
        command.push(0);
        entries.push(Entry::File("bakeoff/command".to_owned(), command));
        entries.push(Entry::File("bakeoff/input".to_owned(), input));
        entries
    }
}

/// A path of the host as one of the root.
fn in_root(path: &Path) -> Option<String> {
    let clean = path.strip_prefix("/").ok()?;
    let text = clean.to_str()?;
    (!text.is_empty()).then(|| text.to_owned())
}

/// The words behind `#!`.
fn interpreter(content: &[u8]) -> Option<Vec<OsString>> {
    let line = content.strip_prefix(b"#!")?;
    let line = line.split(|byte| *byte == b'\n').next()?;
    let words = line.split(|byte| matches!(byte, b' ' | b'\t')).filter(|word| !word.is_empty());
    Some(words.map(|word| OsStr::from_bytes(word).to_owned()).collect())
}

/// The loader that an ELF64 file names (PT_INTERP).
fn loader(content: &[u8]) -> Option<PathBuf> {
    const PT_INTERP: u32 = 3;
    let segment = elf::segments(content)?.into_iter().find(|segment| segment.kind == PT_INTERP)?;
    let start = usize::try_from(segment.offset).ok()?;
    let mut name = Vec::new();
    content.get(start..)?.take(segment.len.min(4096)).read_to_end(&mut name).ok()?;
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Some(PathBuf::from(OsStr::from_bytes(&name[..end])))
}

/// The file in a line of `ld.so --list`: `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)`, or the path alone.
fn library(line: &str) -> Option<PathBuf> {
    let place = line.split_once("=> ").map_or(line, |(_, place)| place).trim();
    let path = place.rsplit_once(" (").map_or(place, |(path, _)| path);
    path.starts_with('/').then(|| PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        bakeoff: BakeoffArgs,
    }

    fn workload(words: &[&str]) -> anyhow::Result<Workload> {
        Workload::new(&Line::parse_from(std::iter::once("bakeoff").chain(words.iter().copied())).bakeoff)
    }

    fn has(workload: &Workload, wanted: &str) -> bool {
        workload.entries.iter().any(|entry| matches!(entry, Entry::File(path, _) if path.contains(wanted)))
    }

    #[test]
    fn program_brings_loader_libraries_and_named_files() {
        let own = std::env::current_exe().unwrap();
        let found = workload(&["--", own.to_str().unwrap(), "/etc/hostname", "--list"]).unwrap();
        assert!(has(&found, "ld-linux") && has(&found, "libc.so"));
        assert!(has(&found, "bakeoff/command") && has(&found, "bakeoff/input"));
        assert_eq!(has(&found, "etc/hostname"), Path::new("/etc/hostname").is_file());
        let place =
            |wanted: &str| found.entries.iter().position(|entry| *entry == Entry::Directory(wanted.into()));
        assert!(place("proc").is_some());
        let parents = found.entries.iter().filter_map(|entry| match entry {
            Entry::Directory(path) => Some(path.as_str()),
            _ => None,
        });
        let parents: Vec<&str> = parents.collect();
        assert!(parents.iter().enumerate().all(|(n, path)| {
            path.rsplit_once('/').is_none_or(|(parent, _)| parents[..n].contains(&parent))
        }));
    }

    #[test]
    fn benchmark_of_ours_is_a_command() {
        let found = workload(&["--bench", "forkwait:7"]).unwrap();
        let command = Entry::File(
            "bakeoff/command".into(),
            b"pin\0/tmp\0/bakeoff/bench\0bench\0run\0forkwait\x007\0".to_vec(),
        );
        assert!(found.entries.contains(&command) && has(&found, "bakeoff/bench"));
        for bad in ["forkwait", "forkwait:0", "gzip:3", "nosuch:1"] {
            assert!(Line::try_parse_from(["bakeoff", "--bench", bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn scripts_bring_their_interpreter() {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("run");
        fs::write(&script, "#!/bin/sh -e\nexit 0\n").unwrap();
        let found = workload(&["--", script.to_str().unwrap()]).unwrap();
        assert!(has(&found, "bin/sh") && has(&found, "libc.so"));
        assert_eq!(interpreter(b"#! /usr/bin/env\tpython3\nx").unwrap(), ["/usr/bin/env", "python3"]);
    }

    #[test]
    fn what_cannot_run_is_a_usage_error_in_a_line() {
        for words in [&["--", "/nonexistent/x"][..], &["--", "no-such-program"], &["--", "/etc/passwd"]] {
            let error = workload(words).unwrap_err();
            assert!(matches!(error.downcast_ref(), Some(PrepareError::Usage(_))), "{error:#}");
            assert!(!error.to_string().contains('\n'));
        }
        assert!(workload(&["--with", "/nonexistent", "--", "/bin/sh"]).is_err());
    }

    #[test]
    fn lines_of_the_loader_name_files() {
        let file = |line| library(line).map(|path| path.display().to_string());
        assert_eq!(file("\tlibc.so.6 => /lib/libc.so.6 (0x00007f)").as_deref(), Some("/lib/libc.so.6"));
        assert_eq!(
            file("\t/lib64/ld-linux-x86-64.so.2 (0x7f)").as_deref(),
            Some("/lib64/ld-linux-x86-64.so.2")
        );
        assert_eq!(file("\tlinux-vdso.so.1 (0x7f)"), None);
    }
}
