//! Compiles the contract suite (`guest/src`) with the same rustc, for the host target, and leaves the ELF in OUT_DIR.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    // Asked at run time: a build script from a shared target folder may serve another checkout.
    let manifest = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it for build scripts");
    let source = Path::new(&manifest).join("../src");
    println!("cargo::rerun-if-changed={}", source.display());
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("contract.elf");
    let rustc = std::env::var_os("RUSTC").expect("cargo sets RUSTC");
    let status = Command::new(rustc)
        .arg(source.join("main.rs"))
        .args(["--edition", "2024", "--crate-type", "bin", "--crate-name", "contract"])
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .args(["-C", "panic=abort", "-C", "relocation-model=static", "-C", "code-model=small"])
        .args(["-C", "opt-level=2", "-C", "no-redzone=yes", "-C", "target-cpu=x86-64", "-C", "strip=debuginfo"])
        .args(["-C", "force-unwind-tables=no", "-C", "codegen-units=4"])
        .arg("-C")
        .arg(format!(
            "link-args=-nostartfiles -nostdlib -static -no-pie -Wl,-T,{},--build-id=none,-z,max-page-size=4096,-z,noexecstack,-z,norelro",
            source.join("link.ld").display()
        ))
        .arg("-o")
        .arg(&out)
        .status()
        .expect("rustc can be started");
    assert!(status.success(), "the contract guest does not compile");
}
