//! The program on this host's KVM, as far as that goes; where none makes VMs each test says SKIP.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::{Command, Output, Stdio};

use engine_kvm::probe::{self, Device};

fn trellis(arguments: &[&str], knobs: &str) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trellis"));
    command.args(arguments).env_remove("TRELLIS_LOG").env("TRELLIS_KVM", knobs).stdin(Stdio::null());
    command.output().unwrap()
}

fn makes_vms() -> bool {
    let works = probe::host().device == Device::Works;
    if !works {
        println!("SKIP: /dev/kvm makes no VM here: {:?}", probe::host().device);
    }
    works
}

const BOOT: &[&str] = &[
    "boot",
    "contract",
    "--engine",
    "kvm",
    "--memory",
    "64M",
    "--timeout",
    "60",
    "--append",
    "only=integer.mul",
];

#[test]
fn contract_tests_run_and_exits_are_counted_by_reason() {
    if !makes_vms() {
        return;
    }
    let output = trellis(&[BOOT, &["--stats"]].concat(), "");
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(out.contains("PASS integer.mul") && output.status.success(), "{out}{err}");
    assert!(err.contains("KVM exits by reason") && err.contains("kvm-run KVM_RUN"), "{err}");
}

/// The guest is compiled code with SSE in it, which a KVM without hardware cannot emulate at level 0.
#[test]
fn failed_emulation_is_one_line_with_the_instruction_when_it_is_not_interpreted() {
    if !makes_vms() || !probe::host().is_software() {
        println!("SKIP: only a KVM without hardware fails so");
        return;
    }
    let output = trellis(BOOT, "interpret=off");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), err.lines().count()), (Some(1), 1), "{err}");
    assert!(err.contains("cannot emulate") && err.contains("no hardware virtualization behind it"), "{err}");
}

#[test]
fn host_tells_and_automatic_follows() {
    let page = trellis(&["host"], "");
    let json = trellis(&["host", "--json"], "");
    let (page, json) = (String::from_utf8(page.stdout).unwrap(), String::from_utf8(json.stdout).unwrap());
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let engine = if probe::host().is_hardware() { "kvm" } else { "bt" };
    assert_eq!(json["automatic"]["engine"], engine);
    assert!(page.contains(&format!("takes the engine {engine}")), "{page}");
}
