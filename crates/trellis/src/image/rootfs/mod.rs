//! A whole distribution on a disk: `trellis image fetch debian --rootfs`.
//!
//! The way of the data: [`super::apt`] refreshes the lists and fetches the kernel, as for every image → [`sources`] says where
//! packages come from, here and in the guest → [`bootstrap`] lets mmdebstrap build the tree in a namespace where we are root →
//! `customize.sh`, its last hook, sets the system up and makes the file system by `mke2fs -d`, so that nothing is mounted → the
//! disk lies in the cache beside its kernel, and belongs to the guest from then on.
//!
//! The disk comes in on the hook's standard input: in a user namespace another user runs the hook, who may not pass the
//! directories above the cache, but may open again what is open.

mod bootstrap;
mod sources;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use vmm::ImageFormat;

use super::apt::Apt;
use super::cache::{Cache, Manifest};
use super::error::{ImageError, IoContext as _};
use super::{Image, ImageSpec, Progress, Sources, cpio};

/// The root directory's own label: who looks for it finds it on any controller.
pub const LABEL: &str = "trellis-root";
/// The size of a disk unless another is asked for.
pub const DEFAULT_BYTES: u64 = 8 << 30;
/// The smallest that the system fits on, with room to install something.
const LEAST_BYTES: u64 = 1 << 30;
/// What the tree takes while it is built.
const TREE_BYTES: u64 = 1200 << 20;
/// The guest's name of itself.
const HOSTNAME: &str = "debian";

const CUSTOMIZE: &str = include_str!("customize.sh");
const INIT: &[u8] = include_bytes!("init.sh");

/// What is wanted.
#[derive(Clone, Debug)]
pub struct RootfsOptions {
    /// Size of the disk.
    pub size_bytes: u64,
    /// How its bytes lie in its file.
    pub format: ImageFormat,
    /// Packages beyond those of every image.
    pub include: Vec<String>,
    /// Files of public keys that may log in by ssh; without any the user's own.
    pub ssh_keys: Vec<PathBuf>,
    /// A disk that is there gives way.
    pub anew: bool,
}

impl Default for RootfsOptions {
    fn default() -> Self {
        Self {
            size_bytes: DEFAULT_BYTES,
            format: ImageFormat::Raw,
            include: Vec::new(),
            ssh_keys: Vec::new(),
            anew: false,
        }
    }
}

/// The image of `spec` with its disk: from the cache, or built now.
///
/// # Errors
/// See [`ImageError`].
pub fn fetch(
    spec: &ImageSpec,
    sources: &Sources,
    options: &RootfsOptions,
    progress: &Progress,
) -> Result<Image, ImageError> {
    check(options)?;
    let cache = Cache::of_user()?;
    let _lock = cache.lock()?;
    if let Some(image) = Image::cached(&cache, &spec.name()).filter(|_| !options.anew) {
        return Ok(image);
    }
    let keys = public_keys(&options.ssh_keys)?;
    let tools = bootstrap::Tools::find()?;
    let scratch = cache.scratch()?;
    let work = scratch.path().join("work");
    fs::create_dir(&work).at("creating", &work)?;
    check_room(&std::env::temp_dir(), TREE_BYTES, "TMPDIR")?;
    check_room(scratch.path(), TREE_BYTES, "XDG_CACHE_HOME")?;
    let mut apt = Apt::new(&cache.apt_directory(&super::state_key(spec.arch, sources)), spec.arch, sources)?;
    let built = scratch.path().join("image");
    let (mut manifest, tree) =
        super::build_kernel(spec, sources, &mut apt, scratch.path(), &built, progress)?;
    let tool = tools.mmdebstrap(&apt, scratch.path(), progress)?;
    pack_modules(&tree, &work.join("modules.tar"))?;
    let archive = sources::Archive::of(&apt, sources)?;
    let write = |name: &str, text: &str| fs::write(work.join(name), text).at("writing", &work.join(name));
    write("sources.list", &archive.guest_lines())?;
    write("apt.conf", &archive.guest_proxies())?;
    write("authorized_keys", &keys)?;
    let lines = work.join("host.list");
    fs::write(&lines, archive.host_lines()).at("writing", &lines)?;
    let raw = built.join("disk.img");
    let disk = make_disk(&raw, options.size_bytes)?;
    let plan = bootstrap::Plan {
        tool: &tool,
        work: &work,
        lines: &lines,
        suite: archive.suite(),
        proxies: archive.host_proxies(),
        include: &options.include,
        hook: CUSTOMIZE,
        environment: [("TRELLIS_NAME", HOSTNAME), ("TRELLIS_LABEL", LABEL)],
    };
    tools.run(&plan, &disk, progress)?;
    drop(disk);
    manifest.disk = Some(finish_disk(raw, options.format, progress)?);
    manifest.append = format!("console=ttyS0 root=LABEL={LABEL}");
    super::write_manifest(&manifest, &built)?;
    cache.install(&built, &spec.name())?;
    Image::cached(&cache, &spec.name())
        .ok_or(ImageError::BadPackage { package: spec.name(), what: "readable manifest" })
}

/// The initramfs that starts the system on the disk: the image's own with another `/init`.
#[must_use]
pub fn initramfs(initrd: &[u8]) -> Vec<u8> {
    let mut archive = cpio::Archive::new();
    archive.file("init", 0o755, INIT);
    let mut whole = initrd.to_vec();
    whole.resize(whole.len().next_multiple_of(4), 0);
    whole.extend(archive.finish());
    whole
}

fn check(options: &RootfsOptions) -> Result<(), ImageError> {
    if options.size_bytes < LEAST_BYTES || !options.size_bytes.is_multiple_of(4096) {
        return Err(ImageError::Unknown(format!(
            "a disk of {} MiB is too small for the system; give at least --size {}G",
            options.size_bytes >> 20,
            LEAST_BYTES >> 30
        )));
    }
    let spelled = |name: &str| {
        name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.:".contains(&b))
    };
    match options.include.iter().find(|name| !spelled(name)) {
        Some(name) => Err(ImageError::Unknown(format!(
            "'{name}' is no name of a package; write --include gcc,make (names as apt has them)"
        ))),
        None => Ok(()),
    }
}

/// Refuses to begin what would end in the middle.
fn check_room(directory: &Path, needed_bytes: u64, variable: &'static str) -> Result<(), ImageError> {
    let Ok(room) = rustix::fs::statvfs(directory) else { return Ok(()) };
    let free_bytes = room.f_bavail.saturating_mul(room.f_frsize);
    if free_bytes >= needed_bytes {
        return Ok(());
    }
    Err(ImageError::NoRoom { directory: directory.to_owned(), needed_bytes, free_bytes, variable })
}

/// The text of `authorized_keys`: the files that are named, or the user's own public keys.
fn public_keys(named: &[PathBuf]) -> Result<String, ImageError> {
    let mut text = String::new();
    for path in named {
        let keys = fs::read_to_string(path).at("reading the public key", path)?;
        if keys.contains("PRIVATE KEY") {
            return Err(ImageError::Unknown(format!(
                "{} is a private key; name the public one, {}.pub",
                path.display(),
                path.display()
            )));
        }
        text += keys.trim_end();
        text.push('\n');
    }
    if named.is_empty() {
        let home = PathBuf::from(std::env::var_os("HOME").unwrap_or_default());
        for name in ["id_ed25519.pub", "id_ecdsa.pub", "id_rsa.pub"] {
            // Who has none logs in on the console.
            text += &fs::read_to_string(home.join(".ssh").join(name)).unwrap_or_default();
        }
    }
    Ok(text)
}

/// The kernel's modules, as they are to lie in the guest.
fn pack_modules(tree: &Path, to: &Path) -> Result<(), ImageError> {
    let Some(from) = ["usr/lib/modules", "lib/modules"].iter().find(|path| tree.join(path).is_dir()) else {
        return Ok(());
    };
    let mut command = Command::new("tar");
    command.arg("-C").arg(tree).args(["--transform=s,^lib/,usr/lib/,", "--owner=0", "--group=0", "-cf"]);
    let output = command.arg(to).arg(from).output().at("running", Path::new("tar"))?;
    if output.status.success() {
        return Ok(());
    }
    let detail = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    Err(ImageError::Tool { program: "tar", status: output.status.to_string(), detail })
}

/// A file of zeros that anybody may write who has it open: see the module's text. It is the user's alone when it is finished.
fn make_disk(path: &Path, size_bytes: u64) -> Result<File, ImageError> {
    let mut open = fs::OpenOptions::new();
    let file = open.read(true).write(true).create_new(true).mode(0o600).open(path).at("creating", path)?;
    file.set_permissions(fs::Permissions::from_mode(0o666)).at("setting the mode of", path)?;
    file.set_len(size_bytes).at("sizing", path)?;
    Ok(file)
}

/// Gives the disk its format and its rights; says what it is called.
fn finish_disk(raw: PathBuf, format: ImageFormat, progress: &Progress) -> Result<String, ImageError> {
    let private = |path: &Path| {
        fs::set_permissions(path, fs::Permissions::from_mode(0o600)).at("setting the mode of", path)
    };
    private(&raw)?;
    if format == ImageFormat::Raw {
        return Ok(name_of(&raw));
    }
    progress.stage("writing the disk as qcow2");
    let qcow2 = raw.with_extension("qcow2");
    let disk = |error: vmm::ImageError| ImageError::Disk(error.to_string());
    let from = File::open(&raw).at("opening", &raw)?;
    let len = from.metadata().at("reading", &raw)?.len();
    vmm::Image::make_qcow2(&qcow2, len).map_err(disk)?;
    private(&qcow2)?;
    let to = vmm::Image::open(&vmm::ImageOptions::new(&qcow2)).map_err(disk)?;
    copy_data(&from, len, progress, |offset, data| to.write(offset, data).at("writing", &qcow2))
        .and_then(|()| to.sync().at("writing", &qcow2))?;
    fs::remove_file(&raw).at("removing", &raw)?;
    Ok(name_of(&qcow2))
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Hands over what is in a file, but not its zeros.
fn copy_data(
    from: &File,
    len: u64,
    progress: &Progress,
    mut write: impl FnMut(u64, &[u8]) -> Result<(), ImageError>,
) -> Result<(), ImageError> {
    const BLOCK_BYTES: u64 = 1 << 20;
    let mut block = vec![0; 1 << 20];
    let mut offset = 0;
    while offset < len {
        // Holes are skipped; a file system that knows none has data everywhere.
        match rustix::fs::seek(from, rustix::fs::SeekFrom::Data(offset)) {
            Ok(data) => offset = data / BLOCK_BYTES * BLOCK_BYTES,
            Err(rustix::io::Errno::NXIO) => break,
            Err(_) => {}
        }
        let now = usize::try_from((len - offset).min(BLOCK_BYTES)).unwrap_or_default();
        let block = &mut block[..now];
        from.read_exact_at(block, offset).at("reading", Path::new("the disk"))?;
        if block.iter().any(|&byte| byte != 0) {
            write(offset, block)?;
        }
        offset += now as u64;
        progress.percent(offset as f64 * 100.0 / len as f64);
    }
    Ok(())
}

/// What the guest's first owner should know.
#[must_use]
pub fn greeting(image: &Image, manifest: &Manifest) -> String {
    let disk = manifest.disk.as_deref().unwrap_or_default();
    // The short name, where there is one.
    let short = manifest.name.trim_end_matches("-amd64");
    let is_known = ImageSpec::from_name(short).is_ok_and(|spec| spec.name() == manifest.name);
    format!(
        "boot it with: trellis boot {} --cpus 2 --memory 1G\nits disk is {}; what the guest writes stays there (--snapshot: not)\n\
         log in on the console as root, without a password; by ssh with a key only\n",
        if is_known { short } else { &manifest.name },
        image.directory.join(disk).display(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_that_cannot_be_are_refused() {
        let with = |size_bytes, name: &str| RootfsOptions {
            size_bytes,
            include: vec![name.to_owned()],
            ..RootfsOptions::default()
        };
        assert!(check(&with(DEFAULT_BYTES, "libc6-dev")).is_ok());
        assert!(check(&with(1 << 20, "gcc")).unwrap_err().to_string().contains("--size 1G"));
        for name in ["", "-x", "a b", "$(id)", "Gcc"] {
            assert!(check(&with(DEFAULT_BYTES, name)).is_err(), "{name}");
        }
    }

    #[test]
    fn private_key_is_not_put_into_a_guest() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("id");
        fs::write(&path, "-----BEGIN OPENSSH PRIVATE KEY-----\n").unwrap();
        assert!(public_keys(&[path]).unwrap_err().to_string().contains("id.pub"));
        let path = directory.path().join("id.pub");
        fs::write(&path, "ssh-ed25519 AAAA me").unwrap();
        assert_eq!(public_keys(&[path]).unwrap(), "ssh-ed25519 AAAA me\n");
    }

    #[test]
    fn data_is_copied_and_holes_are_not() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10 << 20).unwrap();
        file.write_all_at(b"here", 5 << 20).unwrap();
        let mut written = Vec::new();
        copy_data(&file, 10 << 20, &Progress::hidden(), |offset, data| {
            written.push((offset, data.len(), data.starts_with(b"here")));
            Ok(())
        })
        .unwrap();
        assert_eq!(written, [(5 << 20, 1 << 20, true)]);
    }

    #[test]
    fn room_that_is_not_there_is_said_before_the_work() {
        let error = check_room(Path::new("/"), u64::MAX, "TMPDIR").unwrap_err().to_string();
        assert!(error.contains("TMPDIR") && !error.contains('\n'), "{error}");
    }
}
