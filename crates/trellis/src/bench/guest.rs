//! Where the program is run from: a file for the host, a kernel and an initramfs for guests.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tempfile::TempDir;

use super::root::{ProgramRoot, Root};
use crate::image;
use crate::image::cpio::Archive;
use crate::prepare::PrepareError;
use crate::progress::Progress;

/// Guest memory.
pub const MEMORY: &str = "512M";
/// Memory and CPUs of the guest without an operating system, and its command line.
pub const METAL_MEMORY: &str = "64M";
/// One interrupts the other.
pub const METAL_CPUS: &str = "2";
/// It waits for commands.
pub const METAL_CMDLINE: &str = "nano=serve";
/// The guest's command line: nothing is printed that would disturb; a panic ends the run.
pub const CMDLINE: &str = "console=ttyS0 quiet panic=-1";

/// The files of a run; removed with it.
#[derive(Debug)]
pub struct Place {
    /// The program, executable on this host.
    pub program: PathBuf,
    /// Directory in which the native program makes its files: in memory if this host has `/dev/shm`, as a guest's is.
    pub scratch: PathBuf,
    /// What guests boot.
    pub guest: Option<GuestFiles>,
    /// The image of the guest without an operating system.
    pub metal: PathBuf,
    /// The root of real programs, if any is to be run.
    pub programs: Option<ProgramRoot>,
    /// The root of macrobenchmarks, if any is to be run.
    pub jobs: Option<ProgramRoot>,
    /// What guests with an operating system are given.
    pub size: GuestSize,
    _directories: Vec<TempDir>,
}

/// What a guest is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestSize {
    /// Memory, as options say it.
    pub memory: String,
    /// CPUs.
    pub cpus: u32,
    /// Kernel command line.
    pub cmdline: String,
}

impl Default for GuestSize {
    fn default() -> Self {
        Self { memory: MEMORY.to_owned(), cpus: 1, cmdline: CMDLINE.to_owned() }
    }
}

/// What guests boot.
#[derive(Debug)]
pub struct GuestFiles {
    /// The kernel.
    pub kernel: PathBuf,
    /// Its name and version for the report.
    pub kernel_name: String,
    /// The initramfs whose `/init` is the program.
    pub initrd: PathBuf,
}

impl Place {
    /// Writes the files; the kernel is fetched if it is wanted and not there.
    ///
    /// # Errors
    /// No temporary directory, no kernel.
    pub fn prepare(with_guest: bool, kernel: Option<&Path>) -> anyhow::Result<Self> {
        let directory =
            TempDir::with_prefix("trellis-bench-").context("cannot make a temporary directory")?;
        let program = directory.path().join("bench");
        fs::write(&program, guest_bench::PROGRAM)
            .and_then(|()| fs::set_permissions(&program, fs::Permissions::from_mode(0o700)))
            .with_context(|| format!("cannot write {}", program.display()))?;
        let metal = directory.path().join("metal");
        fs::write(&metal, guest_embed::CONTRACT)
            .with_context(|| format!("cannot write {}", metal.display()))?;
        let mut directories = Vec::new();
        let memory = TempDir::with_prefix_in("trellis-bench-", "/dev/shm").ok();
        let scratch = memory.as_ref().unwrap_or(&directory).path().to_owned();
        let guest = if with_guest { Some(guest_files(kernel, directory.path())?) } else { None };
        directories.extend(memory);
        directories.push(directory);
        Ok(Self {
            program,
            scratch,
            guest,
            metal,
            programs: None,
            jobs: None,
            size: GuestSize::default(),
            _directories: directories,
        })
    }

    /// A root with programs.
    #[must_use]
    pub fn root(&self, root: Root) -> Option<&ProgramRoot> {
        match root {
            Root::Programs => self.programs.as_ref(),
            Root::Macro => self.jobs.as_ref(),
            Root::Bare | Root::Metal => None,
        }
    }

    /// The initramfs of a root.
    #[must_use]
    pub fn initrd(&self, root: Root) -> Option<&Path> {
        match root {
            Root::Bare => self.guest.as_ref().map(|guest| guest.initrd.as_path()),
            Root::Programs | Root::Macro => self.root(root)?.initrd.as_deref(),
            Root::Metal => None,
        }
    }
}

fn guest_files(kernel: Option<&Path>, directory: &Path) -> anyhow::Result<GuestFiles> {
    let (kernel, kernel_name) = match kernel {
        Some(file) if file.is_file() => (file.to_owned(), file.display().to_string()),
        Some(file) => {
            return Err(PrepareError::Usage(format!("there is no kernel {}", file.display())).into());
        }
        None => {
            let image = image::ensure_debian(Progress::new).context("no kernel for the guests")?;
            (image.kernel.clone(), format!("{} {}", image.manifest.name, image.manifest.version()))
        }
    };
    let initrd = directory.join("initrd");
    fs::write(&initrd, initramfs()).with_context(|| format!("cannot write {}", initrd.display()))?;
    Ok(GuestFiles { kernel, kernel_name, initrd })
}

/// The initramfs of the bare root.
fn initramfs() -> Vec<u8> {
    base_archive().finish()
}

/// The program as `/init`, and the devices that it and the kernel open.
pub(super) fn base_archive() -> Archive {
    let mut archive = Archive::new();
    archive.directory("dev");
    archive.char_device("dev/console", 0o600, 5, 1);
    archive.char_device("dev/null", 0o666, 1, 3);
    archive.file("init", 0o755, guest_bench::PROGRAM);
    archive
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn initramfs_holds_program_and_console() {
        let bytes = initramfs();
        let holds = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
        assert!(holds(b"init\0") && holds(b"dev/console\0") && holds(guest_bench::PROGRAM));
    }

    #[test]
    fn missing_kernel_is_a_usage_error() {
        let error = Place::prepare(true, Some(Path::new("/nonexistent/vmlinuz"))).unwrap_err();
        assert!(matches!(error.downcast_ref(), Some(PrepareError::Usage(_))), "{error}");
    }
}
