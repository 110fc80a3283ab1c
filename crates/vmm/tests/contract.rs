//! The contract suite of `guest/` on the whole machine.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use vmm::boot::Protocol;
use vmm::{ClockMode, EngineKind, Outcome, Vm, VmConfig};

use common::{Capture, contract_guest};

fn suite(engine: EngineKind, protocol: Protocol, cpus: u32, clock: ClockMode) -> (Outcome, String, u64) {
    let output = Capture::default();
    let source = contract_guest(protocol, String::new());
    let config = VmConfig {
        engine,
        cpus,
        clock,
        isa_debug_exit: true,
        save_at_marker: true,
        timeout: Some(Duration::from_secs(300)),
        serial: output.sink(),
        ..VmConfig::new(source)
    };
    let mut vm = Vm::new(config).unwrap();
    let outcome = vm.run().unwrap();
    let text = output.text();
    (outcome, text, vm.stats().instructions())
}

fn assert_all_pass(engine: EngineKind, protocol: Protocol, cpus: u32) {
    let (outcome, text, _) = suite(engine, protocol, cpus, ClockMode::Host);
    let failed: Vec<&str> = text.lines().filter(|line| line.starts_with("FAIL")).collect();
    assert!(failed.is_empty(), "{outcome:?}\n{}\nlast lines:\n{}", failed.join("\n"), tail(&text));
    assert_eq!(outcome, Outcome::DebugExit(0x10), "last lines:\n{}", tail(&text));
}

fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(8)..].join("\n")
}

#[test]
fn contract_suite_passes_by_pvh() {
    assert_all_pass(EngineKind::Interp, Protocol::Pvh, 1);
}

#[test]
fn contract_suite_passes_by_multiboot_with_two_vcpus() {
    assert_all_pass(EngineKind::Interp, Protocol::Multiboot, 2);
}

#[test]
fn contract_suite_is_reproducible_with_icount() {
    let first = suite(EngineKind::Interp, Protocol::Pvh, 1, ClockMode::Icount);
    let second = suite(EngineKind::Interp, Protocol::Pvh, 1, ClockMode::Icount);
    assert_eq!(first, second);
}

#[test]
fn translated_all_tests_pass() {
    assert_all_pass(EngineKind::Bt, Protocol::Pvh, 1);
}

#[test]
fn translated_all_tests_pass_with_two_vcpus() {
    assert_all_pass(EngineKind::Bt, Protocol::Multiboot, 2);
}

/// The suite on the translator with one and two vCPUs in a process of its own, with stress knobs (`engine_bt::Knobs`).
fn assert_all_pass_under(knobs: &str) {
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "translated_all_tests_pass", "translated_all_tests_pass_with_two_vcpus"])
        .env("TRELLIS_BT", knobs)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "TRELLIS_BT={knobs}:\n{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(text.contains("2 passed"), "the suite ran:\n{text}");
}

macro_rules! stressed {
    ($($name:ident: $knobs:literal),* $(,)?) => {
        $(#[test]
        fn $name() {
            assert_all_pass_under($knobs);
        })*
    };
}

stressed! {
    translated_all_tests_pass_without_interpreted_code: "warm=0",
    translated_all_tests_pass_instruction_by_instruction: "warm=0,unit=1",
    translated_all_tests_pass_in_short_units: "warm=0,unit=3",
    translated_all_tests_pass_without_links: "warm=0,chain=off",
    translated_all_tests_pass_with_interpreted_vectors: "warm=0,fp=off",
    translated_all_tests_pass_in_a_tiny_cache: "warm=0,code=64K",
    translated_all_tests_pass_with_a_forgetful_tlb: "warm=0,tlb=off,chain=off",
    translated_all_tests_pass_adapted_at_once: "warm=0,adapt=1",
    translated_all_tests_pass_in_adapted_forms: "warm=0,adapt=all",
    translated_all_tests_pass_without_adaptation: "warm=0,adapt=off",
    translated_all_tests_pass_without_helpers: "warm=0,helpers=off",
    translated_all_tests_pass_with_trapped_time_stamps: "rdtsc=trap",
    translated_all_tests_pass_when_all_is_forgotten: "warm=0,forget=40",
    translated_all_tests_pass_with_a_tlb_of_one_entry: "warm=0,tlb=one",
    translated_all_tests_pass_with_fragments_made_again: "warm=0,again=4,chain=off",
    translated_all_tests_pass_with_full_logs: "warm=0,log=1",
    translated_all_tests_pass_without_trust_in_address_spaces: "warm=0,context=off",
    translated_all_tests_pass_when_code_is_evicted: "warm=0,evict=200",
    translated_all_tests_pass_in_a_tiny_cache_with_evictions: "warm=0,code=64K,evict=200",
    translated_all_tests_pass_when_code_checks_itself: "warm=0,check=on",
    translated_all_tests_pass_when_code_checks_itself_and_is_evicted: "warm=0,check=on,evict=200,unit=3",
}
