//! Small kernels of the classic kind (`tests/guests`): what hobby systems and boot loaders rely on, without ACPI and
//! without paravirtualization, loaded in every form that multiboot 1 has. They run on QEMU as well.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use machine_tests::{Ended, run, text};

const PATIENCE: Duration = Duration::from_secs(120);

fn guests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("guests")
}

/// The kernels, built.
///
/// # Panics
/// Without gcc.
fn build() -> tempfile::TempDir {
    let out = tempfile::tempdir().expect("a directory");
    let built = Command::new("sh").arg(guests().join("build.sh")).arg(out.path()).output().expect("a shell");
    assert!(
        built.status.success(),
        "gcc and binutils are needed: {}",
        String::from_utf8_lossy(&built.stderr)
    );
    out
}

fn boot(kernel: &Path, append: &str, options: &[&str]) -> Ended {
    let source = guests().join("kernel32.c");
    let modules = format!("{} one,{} two", text(&source), text(&source));
    let common =
        ["boot", "--memory", "32M", "--kernel", text(kernel), "--append", append, "--initrd", &modules];
    run(&[&common[..], options].concat(), PATIENCE)
}

#[test]
fn protected_mode_kernel_passes_in_every_multiboot_form() {
    let out = build();
    for file in ["kernel32.elf", "kernel32-noflags.elf", "kernel32-aout.elf", "kernel32-aout.bin"] {
        let ended = boot(&out.path().join(file), "end=exit", &["--isa-debug-exit"]);
        assert!(ended.output.contains("ALL PASSED"), "{file}: {}{}", ended.output, ended.errors);
        assert!(ended.output.contains("PASS multiboot modules"), "{file}: {}", ended.output);
        assert_eq!(ended.status, Some(1), "{file}");
    }
}

#[test]
fn protected_mode_kernel_ends_every_way() {
    let out = build();
    let kernel = out.path().join("kernel32.elf");
    for (end, status) in [("acpi", 0), ("kbd", 0), ("cf9", 0), ("port92", 0), ("triple", 3)] {
        let ended = boot(&kernel, &format!("end={end}"), &["--no-reboot"]);
        assert_eq!(ended.status, Some(status), "{end}: {}{}", ended.output, ended.errors);
    }
}

#[test]
fn long_mode_kernel_comes_from_either_elf_class() {
    let out = build();
    for file in ["kernel64.elf", "kernel64-elf32.elf"] {
        let ended = boot(&out.path().join(file), "", &[]);
        assert!(ended.output.contains("0123456789ABC\nOK"), "{file}: {}{}", ended.output, ended.errors);
    }
}
