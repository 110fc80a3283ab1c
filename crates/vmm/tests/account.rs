//! What `--stats` says of costs, of guests whose exits are known: the counts are exact, every cost that is measured is more than
//! nothing, and together they are no more than the time that passed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use serde_json::Value;
use vmm::boot::Protocol;
use vmm::{EngineKind, Outcome, Vm, VmConfig};

use common::{Capture, contract_guest};

/// Operations of the guest's workloads in an iteration (`guest/src/nano.rs`).
const OPERATIONS: u64 = 64;
/// As many digits in both, and in their operations: the guest prints them, and each character takes a port.
const RUNS: [u64; 2] = [1600, 3200];

/// The statistics of so many iterations of a workload.
fn statistics(engine: EngineKind, workload: &str, iterations: u64) -> Value {
    let output = Capture::default();
    let source = contract_guest(Protocol::Pvh, format!("nano={workload}:{iterations}"));
    let config = VmConfig {
        engine,
        isa_debug_exit: true,
        timeout: Some(Duration::from_secs(300)),
        serial: output.sink(),
        ..VmConfig::new(source)
    };
    let mut vm = Vm::new(config).unwrap();
    let outcome = vm.run().unwrap();
    assert_eq!(outcome, Outcome::DebugExit(0x10), "{}", output.text());
    vm.stats().to_json()
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// The row of a cause, if it happened.
fn row<'a>(accounting: &'a Value, kind: &str, cause: &str) -> Option<&'a Value> {
    accounting["exits"].as_array().unwrap().iter().find(|r| r["kind"] == kind && r["cause"] == cause)
}

/// The interpreter's WRMSR takes some ten cycles, as many as the time-stamp counter's own cost is uncertain by: it may read as nothing.
fn is_cheap(row: &Value) -> bool {
    row["kind"] == "exit" && row["cause"] == "msr"
}

/// What must be true of every account. By how much its rows are more than the time that passed, as a factor.
fn check(accounting: &Value) -> f64 {
    let busy = number(&accounting["busy_cycles"]);
    let mut sum = number(&accounting["guest_cycles"]);
    for r in accounting["exits"].as_array().unwrap() {
        assert!(number(&r["count"]) >= 1.0, "{r}");
        if number(&r["measured"]) > 0.0 && !is_cheap(r) {
            assert!(number(&r["total_cycles"]) > 0.0 && number(&r["average_cycles"]) > 0.0, "{r}");
        }
        sum += r["total_cycles"].as_f64().unwrap_or(0.0);
    }
    assert!(busy > 0.0, "{accounting:#}");
    let overhead = &accounting["overhead"];
    assert!(number(&overhead["measurements"]) > 0.0 && number(&overhead["percent"]) > 0.0, "{overhead}");
    sum / busy
}

/// Checks a machine's account and its vCPU's, of runs of some ten milliseconds. Sampled rows are estimates of two hundred samples then, and calibrated ones
/// of how the host was a moment before: what else runs on it may spoil one run, but not each of five. What is measured takes a little longer than what is not.
fn check_runs(mut run: impl FnMut() -> Value) -> Value {
    let mut factors = Vec::new();
    for _ in 0..5 {
        let stats = run();
        let factor = check(&stats["accounting"]).max(check(&stats["vcpus"][0]["accounting"]));
        if factor <= 1.1 {
            return stats;
        }
        factors.push(factor);
    }
    panic!("rows are more than the time that passed: {factors:?}")
}

/// Runs a workload twice: `kind` and `cause` must have happened once more for each operation more.
fn counts_each(engine: EngineKind, workload: &str, kind: &str, cause: &str) {
    let [few, many] = RUNS.map(|iterations| check_runs(|| statistics(engine, workload, iterations)));
    let count = |stats: &Value| row(&stats["accounting"], kind, cause).map_or(0.0, |r| number(&r["count"]));
    let expected = (RUNS[1] - RUNS[0]) * OPERATIONS;
    assert_eq!(count(&many) - count(&few), expected as f64, "{engine:?} {workload}: {kind} {cause}");
    let r = row(&many["accounting"], kind, cause).unwrap();
    assert!(number(&r["measured"]) >= 16.0, "{r}");
    let costs = number(&r["average_cycles"]) > 1.0 && number(&r["share_percent"]) > 0.0;
    assert!(costs || is_cheap(r), "{r}");
}

#[test]
fn port_reads_are_counted_exactly_and_cost_something() {
    for engine in [EngineKind::Interp, EngineKind::Bt] {
        counts_each(engine, "nano-in", "exit", "port-read");
    }
    counts_each(EngineKind::Bt, "nano-in", "callout", "IN AL, DX");
}

#[test]
fn system_instructions_of_both_engines_have_costs() {
    counts_each(EngineKind::Interp, "nano-cpuid", "exit", "cpuid");
    counts_each(EngineKind::Interp, "nano-wrmsr", "exit", "msr");
    counts_each(EngineKind::Bt, "nano-wrmsr", "callout", "WRMSR");
    // A callout has the instruction's meaning in it, which is no row of its own.
    let stats = statistics(EngineKind::Bt, "nano-wrmsr", RUNS[0]);
    assert_eq!(row(&stats["accounting"], "exit", "msr").unwrap()["basis"], "counted");
}

#[test]
fn faults_and_device_memory_are_told_from_what_is_around_them() {
    counts_each(EngineKind::Bt, "nano-pgfault", "exit", "true-page-fault");
    counts_each(EngineKind::Interp, "nano-pgfault", "exit", "true-page-fault");
    let stats = statistics(EngineKind::Bt, "nano-pgfault", RUNS[0]);
    let faults = number(&row(&stats["accounting"], "miss", "fault").unwrap()["count"]);
    // The first ones are those of cold code.
    assert!(faults >= 0.99 * (RUNS[0] * OPERATIONS) as f64, "{faults}");
}
