//! Where fetched images live: one directory an image below `$XDG_CACHE_HOME/trellis/images`, described by a
//! `manifest.json`, put in place by one rename so that a reader sees all of it or nothing.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::error::{ImageError, IoContext as _};
use super::initramfs;
use super::spec::Arch;

/// One package that went into an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackageEntry {
    /// Name.
    pub name: String,
    /// Version.
    pub version: String,
    /// SHA-256 of the package file.
    pub sha256: String,
}

/// One file of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Name within the image's directory.
    pub name: String,
    /// Length.
    pub len_bytes: u64,
    /// SHA-256.
    pub sha256: String,
}

/// The content of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the initramfs builder, [`initramfs::FORMAT`].
    pub format: u32,
    /// Name of the image.
    pub name: String,
    /// Whose packages these are.
    pub distribution: String,
    /// Architecture.
    pub arch: Arch,
    /// Flavour.
    pub flavour: String,
    /// `uname -r` of the kernel; empty where it is no Linux.
    pub release: String,
    /// The kernel command line to boot it with.
    pub append: String,
    /// The packages.
    pub packages: Vec<PackageEntry>,
    /// The files.
    pub files: Vec<FileEntry>,
    /// The disk that holds the whole system, if it has one. Guests write to it, so that nothing is said of its content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
}

impl Manifest {
    /// The version to show: of the kernel package, which comes first.
    #[must_use]
    pub fn version(&self) -> &str {
        self.packages.first().map_or("", |package| package.version.as_str())
    }

    /// Bytes on disk.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.len_bytes).sum()
    }
}

/// The cache of one user.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The cache that the environment points to.
    ///
    /// # Errors
    /// Neither `XDG_CACHE_HOME` nor `HOME` is set.
    pub fn of_user() -> Result<Self, ImageError> {
        let absolute =
            |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
        base.map(|base| Self::at(&base.join("trellis"))).ok_or(ImageError::NoCacheDirectory)
    }

    /// The cache below `root`.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The directory of image `name`.
    #[must_use]
    pub fn image_directory(&self, name: &str) -> PathBuf {
        self.images().join(name)
    }

    /// apt's private state for `key` (architecture and sources).
    #[must_use]
    pub fn apt_directory(&self, key: &str) -> PathBuf {
        self.root.join("apt").join(key)
    }

    /// Takes the lock that keeps two fetches apart; it ends with the returned file.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub fn lock(&self) -> Result<File, ImageError> {
        let images = self.images();
        fs::create_dir_all(&images).at("creating", &images)?;
        let path = self.root.join("lock");
        let file = File::create(&path).at("creating", &path)?;
        file.lock().at("locking", &path)?;
        self.remove_leftovers();
        Ok(file)
    }

    /// A fresh directory on the cache's own file system, for building an image in.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub fn scratch(&self) -> Result<tempfile::TempDir, ImageError> {
        let images = self.images();
        tempfile::Builder::new().prefix(".new-").tempdir_in(&images).at("creating a directory in", &images)
    }

    /// Puts the finished directory `built` in the place of image `name`.
    ///
    /// # Errors
    /// The cache cannot be written.
    pub fn install(&self, built: &Path, name: &str) -> Result<(), ImageError> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        let target = self.image_directory(name);
        if target.exists() && renameat_with(CWD, built, CWD, &target, RenameFlags::EXCHANGE).is_ok() {
            return Ok(());
        }
        if target.exists() {
            // A file system that cannot exchange: the gap is short, and a reader in it fetches again.
            fs::remove_dir_all(&target).at("removing", &target)?;
        }
        fs::rename(built, &target).at("renaming to", &target)
    }

    /// The manifest of image `name` if it is whole and of this program's format. A disk is the guest's: it stays, whichever program built it.
    #[must_use]
    pub fn load(&self, name: &str) -> Option<Manifest> {
        let directory = self.image_directory(name);
        let text = fs::read_to_string(directory.join("manifest.json")).ok()?;
        let manifest: Manifest = serde_json::from_str(&text).ok()?;
        let whole = |file: &FileEntry| {
            fs::metadata(directory.join(&file.name)).is_ok_and(|data| data.len() == file.len_bytes)
        };
        let disk = manifest.disk.as_ref().is_none_or(|disk| directory.join(disk).is_file());
        let fits = (manifest.disk.is_some() || manifest.format == initramfs::FORMAT) && manifest.name == name;
        (fits && disk && manifest.files.iter().all(whole)).then_some(manifest)
    }

    /// All whole images, by name.
    #[must_use]
    pub fn list(&self) -> Vec<Manifest> {
        let entries = fs::read_dir(self.images()).into_iter().flatten().filter_map(Result::ok);
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names.iter().filter(|name| !name.starts_with('.')).filter_map(|name| self.load(name)).collect()
    }

    /// What an image's disk takes on this host; what was never written takes nothing.
    #[must_use]
    pub fn disk_bytes(&self, manifest: &Manifest) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        let path = manifest.disk.as_ref().map(|disk| self.image_directory(&manifest.name).join(disk));
        path.and_then(|path| fs::metadata(path).ok()).map_or(0, |data| data.blocks() * 512)
    }

    fn images(&self) -> PathBuf {
        self.root.join("images")
    }

    /// Removes what a killed fetch left behind; called with the lock held.
    fn remove_leftovers(&self) {
        for entry in fs::read_dir(self.images()).into_iter().flatten().filter_map(Result::ok) {
            if entry.file_name().to_string_lossy().starts_with(".new-") {
                // Best effort: it costs disk space, nothing else.
                let _ = fs::remove_dir_all(entry.path());
            }
        }
    }
}

/// Writes `content` as file `name` of `directory` and describes it.
pub(crate) fn write_file(directory: &Path, name: &str, content: &[u8]) -> Result<FileEntry, ImageError> {
    let path = directory.join(name);
    fs::write(&path, content).at("writing", &path)?;
    Ok(FileEntry { name: name.to_owned(), len_bytes: content.len() as u64, sha256: sha256(content) })
}

/// SHA-256 in hexadecimal.
pub(crate) fn sha256(content: &[u8]) -> String {
    Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn build(cache: &Cache, content: &[u8]) {
        let lock = cache.lock().unwrap();
        let scratch = cache.scratch().unwrap();
        let built = scratch.path().join("image");
        fs::create_dir(&built).unwrap();
        let file = write_file(&built, "vmlinuz", content).unwrap();
        let manifest = Manifest {
            format: initramfs::FORMAT,
            name: "debian-test-amd64".to_owned(),
            distribution: "debian".to_owned(),
            arch: Arch::Amd64,
            flavour: "test".to_owned(),
            release: "6.1".to_owned(),
            append: String::new(),
            packages: vec![PackageEntry {
                name: "p".to_owned(),
                version: "1".to_owned(),
                sha256: String::new(),
            }],
            files: vec![file],
            disk: None,
        };
        fs::write(built.join("manifest.json"), serde_json::to_string(&manifest).unwrap()).unwrap();
        cache.install(&built, "debian-test-amd64").unwrap();
        drop(lock);
    }

    #[test]
    fn install_replaces_an_older_image() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        assert!(cache.list().is_empty());
        build(&cache, b"one");
        build(&cache, b"three");
        assert_eq!(cache.list()[0].len_bytes(), 5);
        assert_eq!(cache.load("debian-test-amd64").unwrap().version(), "1");
    }

    #[test]
    fn truncated_image_is_not_loaded() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        build(&cache, b"kernel");
        fs::write(cache.image_directory("debian-test-amd64").join("vmlinuz"), b"ker").unwrap();
        assert!(cache.load("debian-test-amd64").is_none());
    }

    #[test]
    fn only_images_with_a_disk_outlive_their_format() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        build(&cache, b"kernel");
        let image = cache.image_directory("debian-test-amd64");
        let mut manifest = cache.load("debian-test-amd64").unwrap();
        manifest.format -= 1;
        let rewrite = |manifest: &Manifest| {
            fs::write(image.join("manifest.json"), serde_json::to_string(manifest).unwrap()).unwrap();
        };
        rewrite(&manifest);
        assert!(cache.load("debian-test-amd64").is_none());
        manifest.disk = Some("disk.img".to_owned());
        rewrite(&manifest);
        assert!(cache.load("debian-test-amd64").is_none(), "its disk is not there");
        fs::write(image.join("disk.img"), b"the guest's").unwrap();
        assert!(cache.load("debian-test-amd64").is_some());
    }

    #[test]
    fn lock_removes_leftovers_of_a_killed_fetch() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path());
        fs::create_dir_all(directory.path().join("images/.new-abc/x")).unwrap();
        drop(cache.lock().unwrap());
        assert!(!directory.path().join("images/.new-abc").exists());
    }

    #[test]
    fn sha256_is_hexadecimal() {
        assert!(sha256(b"").starts_with("e3b0c44298fc1c14"));
    }
}
