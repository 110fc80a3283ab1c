//! Bootable images out of distribution packages: fetched by apt as an ordinary user, completed by an initramfs of our
//! own, kept in the user's cache.
//!
//! The way of the data: [`spec`] names the packages → [`apt`] refreshes, resolves and downloads on a private state →
//! `dpkg-deb` unpacks → [`modules`] picks drivers → [`initramfs`] builds, through [`cpio`] → [`cache`] keeps.
//! [`rootfs`] adds a disk with a whole system. [`programs`] fetches in the same way what `trellis bench` runs.

pub mod apt;
pub mod cache;
pub mod cpio;
pub mod elf;
pub mod error;
pub mod initramfs;
pub mod list;
pub mod modules;
pub mod programs;
pub mod root;
pub mod rootfs;
pub mod spec;
pub mod tiny_init;

use std::fs;
use std::path::{Path, PathBuf};

pub use crate::progress::Progress;
pub use apt::Sources;
pub use cache::{Cache, Manifest};
pub use error::ImageError;
pub use spec::{Arch, Distribution, ImageSpec};

use apt::{Apt, Package};
use cache::{FileEntry, PackageEntry, sha256, write_file};
use error::IoContext as _;
use modules::{ModuleSet, WANTED};

/// A kernel that is ready to boot.
#[derive(Clone, Debug)]
pub struct Image {
    /// What it is made of.
    pub manifest: Manifest,
    /// Its directory.
    pub directory: PathBuf,
    /// The kernel file.
    pub kernel: PathBuf,
    /// The initramfs that ends in a shell; `None` for what is no Linux.
    pub initrd: Option<PathBuf>,
    /// The disk with the whole system, if it has one.
    pub disk: Option<PathBuf>,
}

impl Image {
    fn cached(cache: &Cache, name: &str) -> Option<Self> {
        let manifest = cache.load(name)?;
        let directory = cache.image_directory(name);
        let initrd =
            manifest.files.iter().any(|file| file.name == "initrd").then(|| directory.join("initrd"));
        let disk = manifest.disk.as_ref().map(|disk| directory.join(disk));
        Some(Self { kernel: directory.join("vmlinuz"), manifest, directory, initrd, disk })
    }
}

/// The default image: from the cache, or fetched now.
///
/// # Errors
/// See [`ImageError`].
pub fn ensure_debian(progress: impl FnOnce() -> Progress) -> Result<Image, ImageError> {
    ensure(&ImageSpec::default_debian(), progress)
}

/// The image of `spec`: from the cache, or fetched now. `progress` is made only if something is to be fetched.
///
/// # Errors
/// See [`ImageError`].
pub fn ensure(spec: &ImageSpec, progress: impl FnOnce() -> Progress) -> Result<Image, ImageError> {
    let cache = Cache::of_user()?;
    if let Some(image) = Image::cached(&cache, &spec.name()) {
        return Ok(image);
    }
    let progress = progress();
    progress.line(&format!(
        "fetching {} first (once; it is kept in {})",
        spec.name(),
        cache.image_directory(&spec.name()).display()
    ));
    fetch(spec, &Sources::Host, &progress)
}

/// As [`ensure`], with a module in its initramfs that images fetched by earlier versions of this program lack.
///
/// # Errors
/// See [`ImageError`].
pub fn ensure_module(
    spec: &ImageSpec,
    module: &str,
    progress: impl Fn() -> Progress,
) -> Result<Image, ImageError> {
    let image = ensure(spec, &progress)?;
    let Some(initrd) = &image.initrd else { return Ok(image) };
    if root::has_module(&fs::read(initrd).at("reading", initrd)?, module) {
        return Ok(image);
    }
    let progress = progress();
    progress.line(&format!("fetching {} again (once), for its driver '{module}'", spec.name()));
    fetch_anew(spec, &Sources::Host, &progress, true)
}

/// Fetches the image of `spec` into the cache, unless what is there is what apt would fetch.
///
/// # Errors
/// See [`ImageError`].
pub fn fetch(spec: &ImageSpec, sources: &Sources, progress: &Progress) -> Result<Image, ImageError> {
    if spec.rootfs {
        return rootfs::fetch(spec, sources, &rootfs::RootfsOptions::default(), progress);
    }
    fetch_anew(spec, sources, progress, false)
}

/// Fetches the image, with `anew` even if the cached one is of the same packages.
fn fetch_anew(
    spec: &ImageSpec,
    sources: &Sources,
    progress: &Progress,
    anew: bool,
) -> Result<Image, ImageError> {
    let cache = Cache::of_user()?;
    let _lock = cache.lock()?;
    progress.stage(&format!("refreshing package lists for {}", spec.arch));
    let mut apt = Apt::new(&cache.apt_directory(&state_key(spec.arch, sources)), spec.arch, sources)?;
    apt.update(progress)?;
    let distribution = sources.distribution();
    let packages = resolve(&apt, spec, distribution)?;
    if let Some(image) =
        Image::cached(&cache, &spec.name()).filter(|image| !anew && is_current(&image.manifest, &packages))
    {
        return Ok(image);
    }
    let scratch = cache.scratch()?;
    let tree = scratch.path().join("tree");
    let entries = download(&apt, &packages, scratch.path(), &tree, progress)?;
    progress.stage("building the initramfs");
    let built = scratch.path().join("image");
    let manifest = build(spec, distribution, entries, &tree, &built)?;
    write_manifest(&manifest, &built)?;
    cache.install(&built, &spec.name())?;
    progress.percent(100.0);
    Image::cached(&cache, &spec.name())
        .ok_or(ImageError::BadPackage { package: spec.name(), what: "readable manifest" })
}

/// The kernel and initramfs of `spec` in the directory `built`, and the tree that they were unpacked to.
fn build_kernel(
    spec: &ImageSpec,
    sources: &Sources,
    apt: &mut Apt,
    scratch: &Path,
    built: &Path,
    progress: &Progress,
) -> Result<(Manifest, PathBuf), ImageError> {
    progress.stage(&format!("refreshing package lists for {}", spec.arch));
    apt.update(progress)?;
    let distribution = sources.distribution();
    let packages = resolve(apt, spec, distribution)?;
    let tree = scratch.join("tree");
    let entries = download(apt, &packages, scratch, &tree, progress)?;
    Ok((build(spec, distribution, entries, &tree, built)?, tree))
}

/// The name of apt's private state: lists of different sources must not mix.
fn state_key(arch: Arch, sources: &Sources) -> String {
    match sources {
        Sources::Host => arch.name().to_owned(),
        Sources::Mirror { url, suite } => {
            let hash = sha256(format!("{url} {}", suite.as_deref().unwrap_or("")).as_bytes());
            format!("{arch}-{}", &hash[..12])
        }
    }
}

/// The packages to download, the kernel's first: a meta-package gives way to the versioned packages it depends on.
fn resolve(apt: &Apt, spec: &ImageSpec, distribution: Distribution) -> Result<Vec<Package>, ImageError> {
    let first = apt.first_of(&spec.packages(distribution))?;
    if !spec.is_linux() {
        return Ok(vec![first]);
    }
    let mut packages: Vec<Package> = vec![first];
    let mut next = 0;
    while next < packages.len() {
        for alternatives in packages[next].depends.clone() {
            let wanted: Vec<String> = alternatives.into_iter().filter(|name| is_kernel_part(name)).collect();
            let known = wanted.iter().any(|name| packages.iter().any(|package| package.name == *name));
            if !wanted.is_empty() && !known {
                packages.push(apt.first_of(&wanted)?);
            }
        }
        next += 1;
    }
    packages.retain(|package| !is_meta(package));
    packages.push(apt.first_of(&["busybox-static".to_owned()])?);
    Ok(packages)
}

/// Whether a package only names another kernel image.
fn is_meta(package: &Package) -> bool {
    package.depends.iter().flatten().any(|name| name.starts_with("linux-image-"))
}

/// Whether a dependency is a piece of the kernel: Ubuntu splits modules from the image, newer Debian the binary.
fn is_kernel_part(name: &str) -> bool {
    ["linux-image-", "linux-modules-", "linux-binary-"].iter().any(|prefix| name.starts_with(prefix))
}

/// Whether a cached image was made of exactly these packages.
fn is_current(manifest: &Manifest, packages: &[Package]) -> bool {
    let same = |(entry, package): (&PackageEntry, &Package)| {
        entry.name == package.name && entry.version == package.version
    };
    manifest.packages.len() == packages.len() && manifest.packages.iter().zip(packages).all(same)
}

/// Downloads and unpacks `packages` into `tree`.
fn download(
    apt: &Apt,
    packages: &[Package],
    scratch: &Path,
    tree: &Path,
    progress: &Progress,
) -> Result<Vec<PackageEntry>, ImageError> {
    let mut entries = Vec::new();
    for package in packages {
        progress.stage(&format!("fetching {} {}", package.name, package.version));
        let file = apt.download(package, scratch, progress)?;
        let content = fs::read(&file).at("reading", &file)?;
        entries.push(PackageEntry {
            name: package.name.clone(),
            version: package.version.clone(),
            sha256: sha256(&content),
        });
        progress.stage(&format!("unpacking {}", package.name));
        apt::unpack(&file, tree)?;
    }
    Ok(entries)
}

/// Makes the directory of an image out of an unpacked tree.
fn build(
    spec: &ImageSpec,
    distribution: Distribution,
    packages: Vec<PackageEntry>,
    tree: &Path,
    built: &Path,
) -> Result<Manifest, ImageError> {
    fs::create_dir_all(built).at("creating", built)?;
    let package = packages.first().map_or_else(|| spec.name(), |package| package.name.clone());
    let kernel = find_kernel(spec, tree).ok_or(ImageError::BadPackage { package, what: "kernel" })?;
    let content = fs::read(&kernel).at("reading", &kernel)?;
    let mut files = vec![write_file(built, "vmlinuz", &content)?];
    let mut release = String::new();
    if spec.is_linux() {
        let name = kernel.file_name().unwrap_or_default().to_string_lossy();
        release = name.trim_start_matches("vmlinuz-").to_owned();
        files.extend(build_initramfs(spec, &release, tree, built)?);
    }
    Ok(Manifest {
        format: initramfs::FORMAT,
        name: spec.name(),
        distribution: distribution.name().to_owned(),
        arch: spec.arch,
        flavour: spec.flavour.clone(),
        release,
        append: if spec.is_linux() { "console=ttyS0" } else { "console=ttyS0,115200" }.to_owned(),
        packages,
        files,
        disk: None,
    })
}

/// Puts the manifest into an image's directory, which makes it whole.
fn write_manifest(manifest: &Manifest, built: &Path) -> Result<(), ImageError> {
    let text = serde_json::to_string_pretty(manifest).expect("a manifest is plain data");
    write_file(built, "manifest.json", text.as_bytes()).map(drop)
}

/// Builds both initramfs files of a Linux kernel.
fn build_initramfs(
    spec: &ImageSpec,
    release: &str,
    tree: &Path,
    built: &Path,
) -> Result<[FileEntry; 2], ImageError> {
    let busybox =
        ["bin/busybox", "usr/bin/busybox"].iter().map(|path| tree.join(path)).find(|path| path.is_file());
    let busybox =
        busybox.ok_or(ImageError::BadPackage { package: "busybox-static".to_owned(), what: "busybox" })?;
    let busybox = fs::read(&busybox).at("reading", &busybox)?;
    let directories = ["lib/modules", "usr/lib/modules"].map(|path| tree.join(path).join(release));
    let modules = match directories.iter().find(|path| path.is_dir()) {
        Some(directory) => ModuleSet::collect(directory, WANTED)?,
        None => ModuleSet::default(),
    };
    Ok([
        write_file(built, "initrd", &initramfs::shell(&busybox, release, &modules))?,
        write_file(built, "initrd-min", &initramfs::minimal(spec.arch))?,
    ])
}

/// The kernel in an unpacked tree.
fn find_kernel(spec: &ImageSpec, tree: &Path) -> Option<PathBuf> {
    let fits = |name: &str| match (spec.is_linux(), spec.arch) {
        (true, _) => name.starts_with("vmlinuz-"),
        (false, Arch::Amd64) => name.starts_with("memtest86+") && name.ends_with("x64.bin"),
        (false, Arch::I386) => name.starts_with("memtest86+") && name.ends_with("ia32.bin"),
    };
    let entries = fs::read_dir(tree.join("boot")).ok()?.filter_map(Result::ok);
    entries
        .map(|entry| entry.path())
        .find(|path| path.file_name().and_then(|name| name.to_str()).is_some_and(fits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_parts_are_told_from_other_dependencies() {
        assert!(is_kernel_part("linux-image-6.1.0-56-cloud-amd64"));
        assert!(is_kernel_part("linux-modules-6.8.0-31-generic"));
        assert!(!is_kernel_part("linux-base"));
        assert!(!is_kernel_part("kmod"));
    }

    #[test]
    fn build_without_a_kernel_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let error = build(
            &ImageSpec::default_debian(),
            Distribution::Debian,
            Vec::new(),
            directory.path(),
            &directory.path().join("image"),
        )
        .unwrap_err();
        assert!(error.to_string().contains("holds no kernel"), "{error}");
    }

    #[test]
    fn build_makes_a_whole_image() {
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        for (path, content) in [
            ("boot/vmlinuz-6.1", "kernel"),
            ("usr/bin/busybox", "busybox"),
            ("lib/modules/6.1/kernel/virtio_blk.ko", "x"),
        ] {
            fs::create_dir_all(tree.join(path).parent().unwrap()).unwrap();
            fs::write(tree.join(path), content).unwrap();
        }
        let cache = Cache::at(&directory.path().join("cache"));
        let _lock = cache.lock().unwrap();
        let built = directory.path().join("built");
        let manifest =
            build(&ImageSpec::default_debian(), Distribution::Debian, Vec::new(), &tree, &built).unwrap();
        write_manifest(&manifest, &built).unwrap();
        cache.install(&built, "debian-cloud-amd64").unwrap();
        let image = Image::cached(&cache, "debian-cloud-amd64").unwrap();
        assert_eq!(image.manifest.release, "6.1");
        assert!(image.initrd.is_some());
    }

    #[test]
    fn state_keys_of_different_sources_differ() {
        let mirror = Sources::Mirror { url: "http://m/debian".to_owned(), suite: None };
        assert_eq!(state_key(Arch::I386, &Sources::Host), "i386");
        assert_ne!(state_key(Arch::I386, &mirror), "i386");
    }
}
