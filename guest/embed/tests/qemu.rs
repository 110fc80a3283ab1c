//! Boots the contract suite under QEMU's TCG by both protocols; what fails must stand in `known-qemu-differences.txt`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const KNOWN: &str = include_str!("../../known-qemu-differences.txt");
const MULTIBOOT_MAGIC: [u8; 4] = 0x1BAD_B002_u32.to_le_bytes();

/// Test name to kind (`fail`, `fatal`, `race`, `intel`).
fn known() -> HashMap<&'static str, &'static str> {
    KNOWN
        .lines()
        .filter(|l| !l.starts_with('#') && !l.is_empty())
        .map(|l| {
            let (kind, rest) = l.split_once(' ').expect("kind and name");
            let (name, reason) = rest.split_once(": ").expect("a reason");
            assert!(!reason.is_empty(), "{name} has no reason");
            (name, kind)
        })
        .collect()
}

fn have_qemu() -> bool {
    let found = Command::new("qemu-system-x86_64")
        .arg("--version")
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|s| s.success());
    if !found {
        eprintln!("SKIP: qemu-system-x86_64 is not installed");
    }
    found
}

fn image(name: &str, bytes: &[u8]) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::write(&path, bytes).expect("the temporary directory is writable");
    path
}

/// Without the multiboot magic QEMU takes the PVH entry.
fn pvh_image() -> Vec<u8> {
    let mut bytes = guest_embed::CONTRACT.to_vec();
    let at = bytes.windows(4).position(|w| w == MULTIBOOT_MAGIC).expect("a multiboot header");
    bytes[at..at + 4].fill(0);
    bytes
}

fn run(kernel: &Path, cpu: &str, cpus: &str) -> (String, Option<i32>) {
    let skip: Vec<&str> = known().iter().filter(|(_, k)| **k == "fatal").map(|(n, _)| *n).collect();
    let out = Command::new("timeout")
        .args(["240", "qemu-system-x86_64", "-accel", "tcg", "-cpu", cpu, "-m", "64", "-smp", cpus])
        .args(["-display", "none", "-serial", "stdio", "-monitor", "none", "-no-reboot"])
        .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=1"])
        .arg("-kernel")
        .arg(kernel)
        .args(["-append", &format!("skip={}", skip.join(","))])
        .stdin(Stdio::null())
        .output()
        .expect("QEMU starts");
    (String::from_utf8_lossy(&out.stdout).replace('\r', ""), out.status.code())
}

fn check(kernel: &Path, cpu: &str, cpus: &str, protocol: &str) {
    let (text, status) = run(kernel, cpu, cpus);
    assert!(text.contains(&format!("boot by {protocol}")), "booted otherwise:\n{text}");
    let summary =
        text.lines().rev().find(|l| l.ends_with(" failed")).unwrap_or_else(|| panic!("no summary:\n{text}"));
    let passed: usize = summary.split(' ').next().expect("a word").parse().expect("a number");
    assert!(passed >= 300, "only {summary}");
    assert!(matches!(status, Some(33 | 35)), "exit status {status:?}");
    let intel = cpu.contains("GenuineIntel");
    let known = known();
    let surprises: Vec<&str> = text
        .lines()
        .filter_map(|l| l.strip_prefix("FAIL "))
        .filter(|l| match known.get(l.split(':').next().unwrap_or("")) {
            Some(&"intel") => !intel,
            Some(_) => false,
            None => true,
        })
        .collect();
    assert!(surprises.is_empty(), "failed and not in known-qemu-differences.txt:\n{}", surprises.join("\n"));
}

#[test]
fn contract_suite_multiboot_two_cpus_passes() {
    if have_qemu() {
        check(&image("multiboot.elf", guest_embed::CONTRACT), "max", "2", "multiboot");
    }
}

#[test]
fn contract_suite_pvh_one_cpu_passes() {
    if have_qemu() {
        check(&image("pvh.elf", &pvh_image()), "max", "1", "pvh");
    }
}

#[test]
fn contract_suite_intel_vendor_passes() {
    if have_qemu() {
        check(&image("intel.elf", guest_embed::CONTRACT), "max,vendor=GenuineIntel", "2", "multiboot");
    }
}

#[test]
fn known_differences_name_existing_tests() {
    for name in known().keys() {
        let (group, test) = name.split_once('.').expect("group.test");
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../src/{group}.rs"));
        let source = std::fs::read_to_string(&file).expect("the group's file");
        assert!(source.contains(&format!("fn {test}()")), "{name} does not exist");
    }
}
