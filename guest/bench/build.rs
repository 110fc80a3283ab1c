//! Compiles the benchmark program (`program/`) with the same rustc, for the host target, and leaves the ELF in OUT_DIR.
//!
//! It uses neither std nor a C library, so it builds wherever the workspace builds, and is the same file everywhere.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    // Asked for now, not at compile time: two checkouts may share a target directory, and so this program.
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    let source = Path::new(&manifest).join("program");
    println!("cargo::rerun-if-changed={}", source.display());
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("bench.elf");
    let rustc = std::env::var_os("RUSTC").expect("cargo sets RUSTC");
    let status = Command::new(rustc)
        .arg(source.join("main.rs"))
        .args(["--edition", "2024", "--crate-type", "bin", "--crate-name", "bench"])
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .args(["-C", "panic=abort", "-C", "relocation-model=static", "-C", "code-model=small"])
        .args(["-C", "opt-level=3", "-C", "target-cpu=x86-64", "-C", "strip=debuginfo"])
        .args(["-C", "force-unwind-tables=no", "-C", "codegen-units=1"])
        .args([
            "-C",
            "link-args=-nostartfiles -nostdlib -static -no-pie -Wl,--build-id=none,-z,noexecstack,-z,norelro",
        ])
        .arg("-o")
        .arg(&out)
        .status()
        .expect("rustc can be started");
    assert!(status.success(), "the benchmark program does not compile");
}
