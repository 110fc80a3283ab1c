//! Programs out of a distribution's packages, with the shared libraries they ask for and nothing else: for `trellis bench` a shell,
//! file and text tools, the C compiler proper and the assembler ([`BENCH`]); for soak runs stress-ng ([`STRESS`]), for networks iperf3 ([`NETWORK`]).
//!
//! They are kept in the image cache like kernels, as a directory laid out as a root with merged `/usr`: `usr/bin`,
//! `usr/lib/x86_64-linux-gnu`, `usr/lib64`. No file of the host's own installation is taken.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};

use super::apt::{Apt, Package};
use super::cache::{Cache, FileEntry, Manifest, PackageEntry, write_file};
use super::error::{ImageError, IoContext as _};
use super::{Arch, Distribution, Progress, Sources, elf, initramfs};

/// A program's name here, and where packages have it; `*` is one directory of any name.
type Place = (&'static str, &'static [&'static str]);

/// Programs that are fetched together.
#[derive(Debug)]
pub struct Selection {
    /// The name in the cache.
    name: &'static str,
    /// What and how it is laid; a cached directory with another word is built anew.
    layout: &'static str,
    /// What they are, to be said while they are fetched.
    what: &'static str,
    /// The packages that hold the programs, each with its names in different releases.
    packages: &'static [&'static [&'static str]],
    programs: &'static [Place],
}

/// What `trellis bench` runs.
pub const BENCH: Selection = Selection {
    name: "bench-programs-amd64",
    layout: "programs-1",
    what: "the real programs (about 25 MiB)",
    packages: PACKAGES,
    programs: PROGRAMS,
};

/// What its macrobenchmarks run.
pub const MACRO: Selection = Selection {
    name: "macro-programs-amd64",
    layout: "macro-1",
    what: "the programs of macrobenchmarks (about 40 MiB)",
    packages: &[
        &["dash"],
        &["coreutils"],
        &["make"],
        &["cpp"],
        &["binutils-x86-64-linux-gnu", "binutils"],
        &["bzip2"],
        &["xz-utils"],
        &["perl-base"],
        &["sqlite3"],
        &["nginx", "nginx-light"],
        &["wrk"],
        &["libc6"],
    ],
    programs: &[
        ("dash", &["usr/bin/dash", "bin/dash"]),
        ("rm", &["usr/bin/rm", "bin/rm"]),
        ("make", &["usr/bin/make"]),
        ("cc1", &["usr/libexec/gcc/x86_64-linux-gnu/*/cc1", "usr/lib/gcc/x86_64-linux-gnu/*/cc1"]),
        ("as", &["usr/bin/x86_64-linux-gnu-as", "usr/bin/as"]),
        ("ld", &["usr/bin/x86_64-linux-gnu-ld.bfd", "usr/bin/x86_64-linux-gnu-ld", "usr/bin/ld"]),
        ("bzip2", &["usr/bin/bzip2", "bin/bzip2"]),
        ("xz", &["usr/bin/xz"]),
        ("perl", &["usr/bin/perl"]),
        ("sqlite3", &["usr/bin/sqlite3"]),
        ("nginx", &["usr/sbin/nginx"]),
        ("wrk", &["usr/bin/wrk"]),
    ],
};

/// stress-ng.
pub const STRESS: Selection = Selection {
    name: "stress-programs-amd64",
    layout: "stress-1",
    what: "stress-ng (about 15 MiB)",
    packages: &[&["stress-ng"], &["libc6"]],
    programs: &[("stress-ng", &["usr/bin/stress-ng"])],
};

/// iperf3.
pub const NETWORK: Selection = Selection {
    name: "network-programs-amd64",
    layout: "network-1",
    what: "iperf3 (about 5 MiB)",
    packages: &[&["iperf3"], &["libc6"]],
    programs: &[("iperf3", &["usr/bin/iperf3"])],
};

/// Where the programs are in it.
pub const BINARIES: &str = "usr/bin";
/// Where their libraries are.
pub const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
/// Where their loader is, which they name as `/lib64/ld-linux-x86-64.so.2`.
pub const LOADER: &str = "usr/lib64/ld-linux-x86-64.so.2";

const PACKAGES: &[&[&str]] = &[
    &["coreutils"],
    &["dash"],
    &["findutils"],
    &["grep"],
    &["gzip"],
    &["cpp"],
    &["binutils-x86-64-linux-gnu", "binutils"],
    &["libc6"],
];

const PROGRAMS: &[Place] = &[
    ("dash", &["usr/bin/dash", "bin/dash"]),
    ("true", &["usr/bin/true", "bin/true"]),
    ("ls", &["usr/bin/ls", "bin/ls"]),
    ("mkdir", &["usr/bin/mkdir", "bin/mkdir"]),
    ("rm", &["usr/bin/rm", "bin/rm"]),
    ("sort", &["usr/bin/sort", "bin/sort"]),
    ("sha256sum", &["usr/bin/sha256sum", "bin/sha256sum"]),
    ("find", &["usr/bin/find", "bin/find"]),
    ("grep", &["usr/bin/grep", "bin/grep"]),
    ("gzip", &["usr/bin/gzip", "bin/gzip"]),
    ("cc1", &["usr/libexec/gcc/x86_64-linux-gnu/*/cc1", "usr/lib/gcc/x86_64-linux-gnu/*/cc1"]),
    ("as", &["usr/bin/x86_64-linux-gnu-as", "usr/bin/as"]),
];

/// Where packages have libraries, and the loader.
const LIBRARY_PLACES: &[&str] = &[LIBRARIES, "lib/x86_64-linux-gnu", "usr/lib", "lib", "usr/lib64", "lib64"];
const LOADER_NAME: &str = "ld-linux-x86-64.so.2";

/// The programs, ready to be copied.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The directory they are in.
    pub directory: PathBuf,
    /// The paths of the files in it.
    pub files: Vec<String>,
    /// The packages with their versions.
    pub packages: Vec<PackageEntry>,
}

impl Programs {
    fn cached(cache: &Cache, selection: &Selection) -> Option<Self> {
        let manifest = cache.load(selection.name).filter(|manifest| manifest.flavour == selection.layout)?;
        let files = manifest.files.into_iter().map(|file| file.name).collect();
        Some(Self { directory: cache.image_directory(selection.name), files, packages: manifest.packages })
    }

    /// The bytes of all files.
    ///
    /// # Errors
    /// The cache cannot be read.
    pub fn read(&self) -> Result<Vec<(String, Vec<u8>)>, ImageError> {
        let read = |name: &String| {
            let path = self.directory.join(name);
            fs::read(&path).at("reading", &path).map(|content| (name.clone(), content))
        };
        self.files.iter().map(read).collect()
    }

    /// The version of package `name`, or of the first whose name begins so.
    #[must_use]
    pub fn version(&self, name: &str) -> Option<&str> {
        let of = |package: &&PackageEntry| package.name == name;
        let like = |package: &&PackageEntry| package.name.starts_with(name);
        let found = self.packages.iter().find(of).or_else(|| self.packages.iter().find(like));
        found.map(|package| package.version.as_str())
    }
}

/// The programs: from the cache, or fetched now. `progress` is made only if something is to be fetched.
///
/// # Errors
/// See [`ImageError`].
pub fn ensure(selection: &Selection, progress: impl FnOnce() -> Progress) -> Result<Programs, ImageError> {
    let cache = Cache::of_user()?;
    if let Some(programs) = Programs::cached(&cache, selection) {
        return Ok(programs);
    }
    let progress = progress();
    progress.line(&format!(
        "fetching {} first (once; kept in {})",
        selection.what,
        cache.image_directory(selection.name).display()
    ));
    fetch(selection, &cache, &progress)
}

fn fetch(selection: &Selection, cache: &Cache, progress: &Progress) -> Result<Programs, ImageError> {
    let _lock = cache.lock()?;
    if let Some(programs) = Programs::cached(cache, selection) {
        // Somebody else fetched them while this process waited for the lock.
        return Ok(programs);
    }
    let sources = Sources::Host;
    progress.stage(&format!("refreshing package lists for {}", selection.what));
    let directory = cache.apt_directory(&super::state_key(Arch::Amd64, &sources));
    let mut apt = Apt::new(&directory, Arch::Amd64, &sources)?;
    apt.update(progress)?;
    let packages = resolve(selection, &apt)?;
    let scratch = cache.scratch()?;
    let tree = scratch.path().join("tree");
    let entries = super::download(&apt, &packages, scratch.path(), &tree, progress)?;
    progress.stage(&format!("laying {}", selection.what));
    let built = scratch.path().join("image");
    build(selection, sources.distribution(), entries, &tree, &built)?;
    cache.install(&built, selection.name)?;
    Programs::cached(cache, selection)
        .ok_or(ImageError::BadPackage { package: selection.name.to_owned(), what: "readable manifest" })
}

/// The packages of the programs, and those of their libraries.
fn resolve(selection: &Selection, apt: &Apt) -> Result<Vec<Package>, ImageError> {
    let mut packages = Vec::new();
    for names in selection.packages {
        packages.push(apt.first_of(&names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>())?);
    }
    let mut next = 0;
    while next < packages.len() {
        for alternatives in packages[next].depends.clone() {
            let wanted: Vec<String> = alternatives.into_iter().filter(|name| is_wanted(name)).collect();
            let known = |name: &String| packages.iter().any(|package| package.name == *name);
            if wanted.is_empty() || wanted.iter().any(known) {
                continue;
            }
            // A virtual package is in no source under its own name; if its library is needed, `build` says so.
            for name in wanted {
                if let Some(package) = apt.show(&name)? {
                    packages.push(package);
                    break;
                }
            }
        }
        next += 1;
    }
    Ok(packages)
}

/// Whether a dependency may hold a library, the compiler or the assembler.
fn is_wanted(name: &str) -> bool {
    let holds = ["lib", "zlib1g", "cpp", "binutils-x86-64"].iter().any(|prefix| name.starts_with(prefix));
    holds && !["-dev", "-dbg", "-doc", "-data"].iter().any(|suffix| name.ends_with(suffix))
}

/// Picks the programs, and the libraries that they and their libraries ask for, out of an unpacked tree.
fn build(
    selection: &Selection,
    distribution: Distribution,
    packages: Vec<PackageEntry>,
    tree: &Path,
    built: &Path,
) -> Result<(), ImageError> {
    for directory in [BINARIES, LIBRARIES, "usr/lib64"] {
        let path = built.join(directory);
        fs::create_dir_all(&path).at("creating", &path)?;
    }
    let mut files = BTreeMap::new();
    let mut queue = VecDeque::new();
    for (name, places) in selection.programs {
        let places: Vec<PathBuf> = places.iter().flat_map(|place| expand(tree, place)).collect();
        queue.push_back((format!("{BINARIES}/{name}"), (*name).to_owned(), places));
    }
    queue.push_back((LOADER.to_owned(), LOADER_NAME.to_owned(), library_places(tree, LOADER_NAME)));
    while let Some((path, name, places)) = queue.pop_front() {
        if files.contains_key(&path) {
            continue;
        }
        let content = read_first(tree, &name, &places)?;
        let needed =
            elf::needed(&content).ok_or(ImageError::NoFile { file: name, what: "as an ELF64 file" })?;
        files.insert(path.clone(), write_file(built, &path, &content)?);
        for library in needed.into_iter().filter(|library| library != LOADER_NAME) {
            let places = library_places(tree, &library);
            queue.push_back((format!("{LIBRARIES}/{library}"), library, places));
        }
    }
    write_manifest(selection, distribution, packages, files.into_values().collect(), built)
}

fn write_manifest(
    selection: &Selection,
    distribution: Distribution,
    packages: Vec<PackageEntry>,
    files: Vec<FileEntry>,
    built: &Path,
) -> Result<(), ImageError> {
    let manifest = Manifest {
        format: initramfs::FORMAT,
        name: selection.name.to_owned(),
        distribution: distribution.name().to_owned(),
        arch: Arch::Amd64,
        flavour: selection.layout.to_owned(),
        release: String::new(),
        append: String::new(),
        packages,
        files,
        disk: None,
    };
    let text = serde_json::to_string_pretty(&manifest).expect("a manifest is plain data");
    write_file(built, "manifest.json", text.as_bytes()).map(drop)
}

/// The paths that `pattern` stands for, at most one `*` in it.
fn expand(tree: &Path, pattern: &str) -> Vec<PathBuf> {
    let Some((before, after)) = pattern.split_once("/*/") else {
        return vec![tree.join(pattern)];
    };
    let entries = fs::read_dir(tree.join(before)).into_iter().flatten().filter_map(Result::ok);
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path().join(after)).collect();
    paths.sort();
    paths
}

fn library_places(tree: &Path, name: &str) -> Vec<PathBuf> {
    // A name with a slash would be a path of the builder's machine.
    let plain = !name.contains('/');
    LIBRARY_PLACES.iter().filter(|_| plain).map(|place| tree.join(place).join(name)).collect()
}

/// The first of `places` that is a file of `tree`: a link that leads out of it would be a file of the host.
fn read_first(tree: &Path, name: &str, places: &[PathBuf]) -> Result<Vec<u8>, ImageError> {
    let tree = tree.canonicalize().at("reading", tree)?;
    let found = places.iter().filter_map(|place| place.canonicalize().ok());
    let inside = found.into_iter().find(|path| path.starts_with(&tree) && path.is_file());
    match inside {
        Some(path) => fs::read(&path).at("reading", &path),
        None => Err(ImageError::NoFile { file: name.to_owned(), what: "the file" }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::elf::tests::example;

    fn put(tree: &Path, path: &str, content: &[u8]) {
        fs::create_dir_all(tree.join(path).parent().unwrap()).unwrap();
        fs::write(tree.join(path), content).unwrap();
    }

    /// Packages of a distribution without merged /usr, whose `sort` needs a library that needs another.
    fn unpacked(tree: &Path) {
        for (name, places) in PROGRAMS {
            let place = places.last().unwrap().replace('*', "12");
            let needed: &[&str] = if *name == "sort" { &["liba.so.1"] } else { &["libc.so.6"] };
            put(tree, &place, &example(needed));
        }
        let library = |name: &str| format!("lib/x86_64-linux-gnu/{name}");
        put(tree, &library("liba.so.1.0"), &example(&["libb.so.2", "libc.so.6"]));
        std::os::unix::fs::symlink("liba.so.1.0", tree.join(library("liba.so.1"))).unwrap();
        put(tree, &format!("{LIBRARIES}/libb.so.2"), &example(&[]));
        put(tree, &library("libc.so.6"), &example(&[LOADER_NAME]));
        put(tree, &library("libunused.so.6"), &example(&[]));
        put(tree, &library(LOADER_NAME), &example(&[]));
    }

    #[test]
    fn build_takes_programs_and_exactly_their_libraries() {
        let directory = tempfile::tempdir().unwrap();
        let (tree, cache) = (directory.path().join("tree"), Cache::at(&directory.path().join("cache")));
        unpacked(&tree);
        let _lock = cache.lock().unwrap();
        let built = directory.path().join("built");
        build(&BENCH, Distribution::Debian, Vec::new(), &tree, &built).unwrap();
        cache.install(&built, BENCH.name).unwrap();
        let programs = Programs::cached(&cache, &BENCH).unwrap();
        let mut libraries: Vec<&str> =
            programs.files.iter().filter_map(|file| file.strip_prefix(&format!("{LIBRARIES}/"))).collect();
        libraries.sort_unstable();
        assert_eq!(libraries, ["liba.so.1", "libb.so.2", "libc.so.6"]);
        assert_eq!(programs.files.len(), PROGRAMS.len() + 3 + 1);
        assert!(programs.read().unwrap().iter().any(|(name, content)| name == LOADER && !content.is_empty()));
    }

    #[test]
    fn missing_library_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        unpacked(&tree);
        fs::remove_file(tree.join(LIBRARIES).join("libb.so.2")).unwrap();
        let error =
            build(&BENCH, Distribution::Debian, Vec::new(), &tree, &directory.path().join("b")).unwrap_err();
        assert!(error.to_string().contains("libb.so.2"), "{error}");
    }

    #[test]
    fn link_out_of_the_tree_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        put(&tree, "x", b"");
        put(directory.path(), "host", b"the host's");
        std::os::unix::fs::symlink(directory.path().join("host"), tree.join("link")).unwrap();
        assert!(read_first(&tree, "link", &[tree.join("link")]).is_err());
        assert!(library_places(&tree, "../../etc/passwd").is_empty());
    }

    #[test]
    fn only_packages_of_libraries_and_tools_are_followed() {
        assert!(is_wanted("libgmp10") && is_wanted("cpp-12") && is_wanted("zlib1g"));
        assert!(!is_wanted("dpkg") && !is_wanted("libc6-dev") && !is_wanted("gcc-12-base"));
    }

    #[test]
    fn cached_directory_of_another_layout_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        let _lock = cache.lock().unwrap();
        let (tree, built) = (directory.path().join("tree"), directory.path().join("built"));
        unpacked(&tree);
        build(&BENCH, Distribution::Debian, Vec::new(), &tree, &built).unwrap();
        let text = fs::read_to_string(built.join("manifest.json")).unwrap();
        fs::write(built.join("manifest.json"), text.replace(BENCH.layout, "programs-0")).unwrap();
        cache.install(&built, BENCH.name).unwrap();
        assert!(cache.load(BENCH.name).is_some() && Programs::cached(&cache, &BENCH).is_none());
    }
}
