//! Builds the initramfs of a fetched kernel: busybox, the drivers of virtual hardware, and our `/init`.

use super::cpio::Archive;
use super::modules::ModuleSet;
use super::spec::Arch;
use super::tiny_init;

/// The shell script that the kernel starts as process 1.
const INIT: &[u8] = include_bytes!("init.sh");

const POWER_BUTTON: &[u8] = b"#!/bin/sh\necho 'trellis: power button' > /dev/console\nsync\npoweroff -f\n";

/// Version of what this module builds; a cached image with another one is built anew.
pub const FORMAT: u32 = 3;

const DIRECTORIES: &[&str] = &[
    "bin",
    "sbin",
    "usr",
    "usr/bin",
    "usr/sbin",
    "etc",
    "dev",
    "proc",
    "sys",
    "root",
    "run",
    "tmp",
    "mnt",
    "lib",
    "lib/modules",
];

/// An initramfs that ends in a shell, for kernel release `release`.
#[must_use]
pub fn shell(busybox: &[u8], release: &str, modules: &ModuleSet) -> Vec<u8> {
    let mut archive = Archive::new();
    DIRECTORIES.iter().for_each(|name| archive.directory(name));
    device_nodes(&mut archive);
    archive.file("init", 0o755, INIT);
    archive.file("bin/busybox", 0o755, busybox);
    archive.symlink("bin/sh", "busybox");
    // What acpid does about the power button, by the names that busybox gives it.
    archive.directory("etc/acpi");
    archive.directory("etc/acpi/PWRF");
    archive.file("etc/acpi/PWRF/00000080", 0o755, POWER_BUTTON);
    archive.file("etc/passwd", 0o644, b"root::0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    let directory = format!("lib/modules/{release}");
    archive.directory(&directory);
    for module in modules.iter() {
        archive.file(&format!("{directory}/{}.ko", module.name), 0o644, &module.content);
    }
    archive.file(&format!("{directory}/modules.dep"), 0o644, modules.modules_dep().as_bytes());
    archive.file(&format!("{directory}/modules.alias"), 0o644, modules.modules_alias().as_bytes());
    archive.finish()
}

/// An initramfs whose `/init` says `REACHED-INIT` and powers off.
#[must_use]
pub fn minimal(arch: Arch) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.directory("dev");
    device_nodes(&mut archive);
    archive.file("init", 0o755, &tiny_init::elf(arch));
    archive.finish()
}

/// The nodes that must be there before devtmpfs is mounted: the kernel opens `/dev/console` for process 1.
fn device_nodes(archive: &mut Archive) {
    archive.char_device("dev/console", 0o600, 5, 1);
    archive.char_device("dev/null", 0o666, 1, 3);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shell_initramfs_holds_init_and_busybox() {
        let bytes = shell(b"BUSYBOX", "6.1", &ModuleSet::default());
        let text = String::from_utf8_lossy(&bytes);
        for part in [
            "init\0",
            "bin/busybox\0",
            "BUSYBOX",
            "dev/console\0",
            "lib/modules/6.1/modules.dep\0",
            "TRAILER!!!",
        ] {
            assert!(text.contains(part), "{part}");
        }
    }

    #[test]
    fn minimal_initramfs_is_small() {
        assert!(minimal(Arch::Amd64).len() < 1200);
        assert!(minimal(Arch::I386).len() < 1200);
    }
}
