//! Guests that mean harm take a bounded amount of the host's memory (the contract suite's `hostile` and `smc` groups, and endless new
//! code in a cache that is often full).

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::time::Duration;

use vmm::boot::{BootSource, Protocol};
use vmm::{EngineKind, Outcome, Vm, VmConfig};

/// Memory of the guest in MiB.
const GUEST_MIB: u64 = 64;

/// Peak of this process's resident memory in MiB.
fn peak_mib() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() >> 10
}

fn run(engine: EngineKind, only: &str) {
    let source = BootSource {
        kernel: guest_embed::CONTRACT.to_vec(),
        kernel_name: "contract".to_owned(),
        cmdline: format!("only={only}"),
        protocol: Some(Protocol::Pvh),
        ..BootSource::default()
    };
    let config = VmConfig {
        engine,
        memory_bytes: GUEST_MIB << 20,
        isa_debug_exit: true,
        timeout: Some(Duration::from_secs(300)),
        serial: Some(Box::new(std::io::sink())),
        ..VmConfig::new(source)
    };
    let outcome = Vm::new(config).unwrap().run().unwrap();
    assert_eq!(outcome, Outcome::DebugExit(0x10), "{engine:?}, {only}");
}

/// Runs the groups twice and says what the process had at most.
fn peak_after(engine: EngineKind) -> u64 {
    for _ in 0..2 {
        for only in ["hostile.", "smc.", "paging."] {
            run(engine, only);
        }
    }
    peak_mib()
}

#[test]
fn interpreter_peak() {
    let peak = peak_after(EngineKind::Interp);
    println!("peak {peak} MiB");
    assert!(peak < GUEST_MIB + 100, "{peak} MiB");
}

#[test]
fn translator_peak() {
    let peak = peak_after(EngineKind::Bt);
    println!("peak {peak} MiB");
    // Code memory of 64 MiB that need not be touched, tables, and what the interpreter has.
    assert!(peak < GUEST_MIB + 200, "{peak} MiB");
}

/// Each in a process of its own, since a process has one peak: with a code memory of 1 MiB, which is full again and again.
#[test]
fn translator_with_little_code_memory_takes_little() {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "translator_peak", "--nocapture"])
        .env("TRELLIS_BT", "warm=0,code=1024K")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let peak: u64 = text.split("peak ").nth(1).unwrap().split_whitespace().next().unwrap().parse().unwrap();
    println!("{peak} MiB");
    assert!(peak < GUEST_MIB + 100, "{peak} MiB");
}
