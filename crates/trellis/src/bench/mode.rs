//! The modes: ways to run the program. A new engine is a line of [`MODES`].

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;

use super::guest::{METAL_CMDLINE, METAL_CPUS, METAL_MEMORY, Place};
use super::root::Root;

/// What `--modes` is when it is not given.
pub const DEFAULT: &str = "native,interp,bt,tcg";

/// A way to run the program.
#[derive(Debug)]
pub struct Mode {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    /// A process of this host.
    Native,
    /// A guest of ours under this engine.
    Trellis(&'static str),
    /// A guest of QEMU under this accelerator.
    Qemu(&'static str),
}

/// The program of QEMU.
pub const QEMU: &str = "qemu-system-x86_64";
/// Why a guest cannot be started.
const NO_KERNEL: &str = "there is no kernel";
const NO_PROGRAMS: &str = "there are no real programs";

/// All modes.
pub const MODES: &[Mode] = &[
    Mode { name: "native", about: "a process of this host", kind: Kind::Native },
    Mode { name: "interp", about: "trellis --engine interp", kind: Kind::Trellis("interp") },
    Mode { name: "bt", about: "trellis --engine bt", kind: Kind::Trellis("bt") },
    Mode { name: "kvm", about: "trellis --engine kvm", kind: Kind::Trellis("kvm") },
    Mode { name: "tcg", about: "QEMU -accel tcg -cpu max, if installed", kind: Kind::Qemu("tcg") },
    Mode { name: "qemu-kvm", about: "QEMU -accel kvm -cpu max, if installed", kind: Kind::Qemu("kvm") },
];

/// The mode that the others are compared with.
pub const REFERENCE: &str = "native";

impl Mode {
    /// The engine of ours that runs it, if one does.
    #[must_use]
    pub fn engine(&self) -> Option<&'static str> {
        if let Kind::Trellis(engine) = self.kind { Some(engine) } else { None }
    }

    /// Whether QEMU runs it, and with which accelerator.
    #[must_use]
    pub fn accelerator(&self) -> Option<&'static str> {
        if let Kind::Qemu(accelerator) = self.kind { Some(accelerator) } else { None }
    }

    /// Whether the program runs in a guest.
    #[must_use]
    pub fn needs_kernel(&self) -> bool {
        !matches!(self.kind, Kind::Native)
    }

    /// The command that starts the program in a root. Commands to the program go to its standard input, answers and marks come on
    /// its standard error, a guest's serial line on its standard output.
    ///
    /// # Errors
    /// Why this host cannot do it, in a line.
    pub fn command(&self, place: &Place, root: Root) -> Result<Command, String> {
        match self.kind {
            Kind::Native => native(place, root),
            Kind::Trellis(engine) => trellis(engine, place, root),
            Kind::Qemu(accelerator) => qemu(accelerator, place, root),
        }
    }

    /// What runs the program, with its version.
    #[must_use]
    pub fn version(&self) -> String {
        match self.kind {
            Kind::Native => "native".to_owned(),
            Kind::Trellis(_) => concat!("trellis ", env!("CARGO_PKG_VERSION")).to_owned(),
            Kind::Qemu(_) => qemu_version(),
        }
    }
}

fn native(place: &Place, root: Root) -> Result<Command, String> {
    let mut command = Command::new(&place.program);
    command.current_dir(&place.scratch);
    if matches!(root, Root::Programs | Root::Macro) {
        let programs = place.root(root).and_then(|programs| programs.directory.as_ref());
        command.arg("root").arg(programs.ok_or(NO_PROGRAMS)?);
    }
    Ok(command)
}

fn trellis(engine: &str, place: &Place, root: Root) -> Result<Command, String> {
    let program = std::env::current_exe().map_err(|error| format!("cannot find this program: {error}"))?;
    let mut command = Command::new(program);
    command.args([
        "boot",
        "--engine",
        engine,
        "--serial",
        "stdio",
        "--debugcon",
        "file:/dev/stderr",
        "--no-reboot",
    ]);
    if root == Root::Metal {
        command.args(["contract", "--memory", METAL_MEMORY, "--cpus", METAL_CPUS, "--append", METAL_CMDLINE]);
        return Ok(command);
    }
    let guest = place.guest.as_ref().ok_or(NO_KERNEL)?;
    let initrd = place.initrd(root).ok_or(NO_PROGRAMS)?;
    let size = &place.size;
    command.args(["--memory", &size.memory, "--cpus", &size.cpus.to_string(), "--append", &size.cmdline]);
    command.arg("--kernel").arg(&guest.kernel).arg("--initrd").arg(initrd);
    Ok(command)
}

fn qemu(accelerator: &str, place: &Place, root: Root) -> Result<Command, String> {
    let program = find_in_path(QEMU).ok_or_else(|| format!("{QEMU} is not installed"))?;
    if accelerator == "kvm" {
        kvm_is_usable()?;
    }
    let mut command = Command::new(program);
    command.args(["-accel", accelerator, "-cpu", "max", "-no-reboot", "-nodefaults", "-display", "none"]);
    command.args(["-serial", "stdio", "-chardev", "file,id=marks,path=/dev/stderr", "-device"]);
    command.arg("isa-debugcon,iobase=0xe9,chardev=marks");
    if root == Root::Metal {
        command.args(["-m", METAL_MEMORY, "-smp", METAL_CPUS, "-append", METAL_CMDLINE]);
        command.arg("-kernel").arg(&place.metal);
        return Ok(command);
    }
    let guest = place.guest.as_ref().ok_or(NO_KERNEL)?;
    let initrd = place.initrd(root).ok_or(NO_PROGRAMS)?;
    let size = &place.size;
    command.args(["-m", &size.memory, "-smp", &size.cpus.to_string(), "-append", &size.cmdline]);
    command.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(initrd);
    Ok(command)
}

/// Why QEMU could not use the kernel's KVM, in words of ours.
///
/// # Errors
/// One line.
pub fn kvm_is_usable() -> Result<(), String> {
    let opened = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    opened.map(drop).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "this host has no /dev/kvm".to_owned(),
        _ => format!("/dev/kvm cannot be used: {error}"),
    })
}

/// The file of that name in `PATH`.
pub fn find_in_path(name: &str) -> Option<PathBuf> {
    let path: OsString = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|file| file.is_file())
}

/// The first line of `--version`.
fn qemu_version() -> String {
    let output = Command::new(QEMU).arg("--version").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
    text.lines().next().unwrap_or("QEMU").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_modes_exist_and_begin_with_the_reference() {
        let names: Vec<&str> = DEFAULT.split(',').collect();
        assert_eq!(names[0], REFERENCE);
        assert!(names.iter().all(|name| MODES.iter().any(|mode| mode.name == *name)));
    }

    #[test]
    fn guests_without_a_kernel_are_refused_with_a_reason() {
        let place = Place::prepare(false, None).unwrap();
        let interp = MODES.iter().find(|mode| mode.name == "interp").unwrap();
        assert!(interp.command(&place, Root::Bare).unwrap_err().contains("kernel"));
    }

    #[test]
    fn real_programs_run_in_their_root_natively() {
        let directory = tempfile::tempdir().unwrap();
        let mut place = Place::prepare(false, None).unwrap();
        let native = MODES.iter().find(|mode| mode.name == REFERENCE).unwrap();
        assert!(native.command(&place, Root::Programs).is_err());
        place.programs = Some(
            super::super::root::ProgramRoot::lay(
                &super::super::root::tests::programs(directory.path()),
                true,
                false,
            )
            .unwrap(),
        );
        let command = native.command(&place, Root::Programs).unwrap();
        assert_eq!(command.get_args().next().unwrap(), "root");
        assert_eq!(native.command(&place, Root::Bare).unwrap().get_args().count(), 0);
    }
}
