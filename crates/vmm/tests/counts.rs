//! Counts that do not depend on the machine: what one operation of a small bare-metal workload costs an engine in callouts,
//! misses and exits, and what a guest instruction costs in host instructions. `counts.txt` beside this file has them; the
//! test fails when one gets worse by more than the file says.
//!
//! Workloads are those of `guest/src/nano.rs`, which sees no timer: each is run twice, and the difference of the two runs
//! divided by the difference of their operations is what an operation costs, without boot and warming up. Host
//! instructions are read from the golden translations of `bt`, which another test keeps true.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vmm::boot::Protocol;
use vmm::{ClockMode, EngineKind, Outcome, Vm, VmConfig};

use common::{Capture, contract_guest};

/// How much worse a count may be: so much of the old one, and so much more. Operations are counted exactly, but a vCPU
/// that is told something (a request, a clock) leaves the cache once more.
const TOLERANCE: f64 = 0.02;
const SLACK: f64 = 0.01;
/// Operations of both runs, in iterations.
const RUNS: [u64; 2] = [200, 1200];
/// How the file is made anew.
const UPDATE: &str = "TRELLIS_COUNTS=write cargo test -p vmm --test counts";

/// A workload and the operations of its iteration.
const WORKLOADS: &[(&str, u64)] = &[
    ("nano-syscall", 64),
    ("nano-in", 64),
    ("nano-cr8wr", 64),
    ("nano-callret", 64),
    ("nano-pgfault", 64),
    ("nano-divzero", 64),
    ("nano-ptemod", 64),
    ("nano-cpuid", 64),
    ("nano-rdtsc", 64),
    ("nano-vmcall", 64),
    ("nano-mmio", 64),
    ("nano-invlpg", 64),
    ("nano-cr3wr", 64),
    ("nano-wrmsr", 64),
    ("count-sweep", 512),
    ("count-spaces", 64),
    ("count-patch", 64),
    ("count-indirect", 64),
];

/// The columns of a workload under the translator: counters of its report that cost time.
const COUNTERS: &[&str] = &["callouts", "TC entries", "TC misses", "jump-cache refills", "TLB misses"];

/// Counts by what they count; all are better when smaller.
type Counts = BTreeMap<String, f64>;

/// Runs a workload and returns the totals by name.
fn totals(
    engine: EngineKind,
    clock: ClockMode,
    workload: &str,
    iterations: u64,
) -> BTreeMap<&'static str, u64> {
    let output = Capture::default();
    let source = contract_guest(Protocol::Pvh, format!("nano={workload}:{iterations}"));
    let config = VmConfig {
        engine,
        clock,
        isa_debug_exit: true,
        timeout: Some(Duration::from_secs(300)),
        serial: output.sink(),
        ..VmConfig::new(source)
    };
    let mut vm = Vm::new(config).unwrap();
    let outcome = vm.run().unwrap();
    let text = output.text();
    assert_eq!(outcome, Outcome::DebugExit(0x10), "{text}");
    assert!(text.contains(&format!("PASS {workload}")), "{text}");
    let stats = vm.stats();
    let mut totals = BTreeMap::from([
        ("instructions", stats.instructions()),
        ("exits", stats.exits().iter().map(|(_, count)| count).sum()),
    ]);
    let report = stats.engine();
    for name in COUNTERS {
        let counter = report.counters.iter().find(|counter| counter.name == *name);
        totals.extend(counter.map(|counter| (*name, counter.value)));
    }
    totals
}

/// What one operation costs.
fn per_operation(counts: &mut Counts, engine: EngineKind, clock: ClockMode, name: &str) {
    for (workload, operations) in WORKLOADS {
        let [few, many] = RUNS.map(|iterations| totals(engine, clock, workload, iterations));
        let all = ((RUNS[1] - RUNS[0]) * operations) as f64;
        for (what, count) in &many {
            let each = (*count as f64 - few[what] as f64) / all;
            counts.insert(format!("{name} {workload}: {what} per operation"), each.max(0.0));
        }
    }
}

/// Host instructions on the straight line per guest instruction, of each golden file.
fn per_instruction(counts: &mut Counts) {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../bt/golden");
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines = || text.lines().filter(|line| line.starts_with("guest: "));
        let cost = |line: &str| -> u64 {
            let (_, cost) = line.rsplit_once(": ").unwrap();
            cost.split(' ').next().unwrap().parse().unwrap()
        };
        let (host, guest): (u64, usize) = (lines().map(cost).sum(), lines().count());
        let name = path.file_stem().unwrap().to_string_lossy().into_owned();
        counts.insert(
            format!("golden {name}: host instructions per guest instruction"),
            host as f64 / guest as f64,
        );
    }
}

fn measure() -> Counts {
    let mut counts = Counts::new();
    per_instruction(&mut counts);
    per_operation(&mut counts, EngineKind::Bt, ClockMode::Host, "bt");
    per_operation(&mut counts, EngineKind::Interp, ClockMode::Icount, "interp");
    counts
}

const HEAD: &str = "# Counts that do not depend on the machine, smaller is better: crates/vmm/tests/counts.rs measures them and says how
# much worse they may get. If a change is meant to make one worse: TRELLIS_COUNTS=write cargo test -p vmm --test counts,
# look at the difference, and say why in the commit's message.
";

fn render(counts: &Counts) -> String {
    counts.iter().fold(HEAD.to_owned(), |mut text, (name, count)| {
        let _ = writeln!(text, "{count:.3} {name}");
        text
    })
}

fn parse(text: &str) -> Counts {
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    let entry = |line: &str| {
        let (count, name) = line.split_once(' ').unwrap();
        (name.to_owned(), count.parse().unwrap())
    };
    lines.map(entry).collect()
}

/// The lines about what got worse, and what cannot be compared.
fn complaints(old: &Counts, new: &Counts) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, count) in new {
        match old.get(name) {
            None => lines.push(format!("{name}: not in the file")),
            Some(before) if *count > before * (1.0 + TOLERANCE) + SLACK => {
                lines.push(format!("{name}: {count:.3}, was {before:.3}"));
            }
            Some(_) => {}
        }
    }
    lines.extend(
        old.keys().filter(|name| !new.contains_key(*name)).map(|name| format!("{name}: no longer measured")),
    );
    lines
}

#[test]
fn counts_are_no_worse_than_the_file_says() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/counts.txt");
    let new = measure();
    if std::env::var("TRELLIS_COUNTS").as_deref() == Ok("write") {
        return std::fs::write(file, render(&new)).unwrap();
    }
    let old = parse(&std::fs::read_to_string(file).unwrap());
    for (name, count) in &new {
        if old.get(name).is_some_and(|before| count * (1.0 + TOLERANCE) + SLACK < *before) {
            eprintln!("better than the file: {name}: {count:.3}, was {:.3}; {UPDATE}", old[name]);
        }
    }
    let worse = complaints(&old, &new);
    assert!(
        worse.is_empty(),
        "counts got worse by more than {} % and {SLACK}:\n{}\nIf that is meant: {UPDATE}, look at the difference, and say why in the commit",
        TOLERANCE * 100.0,
        worse.join("\n")
    );
}

#[test]
fn worse_new_and_lost_counts_are_complaints() {
    let counts =
        |pairs: &[(&str, f64)]| pairs.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect::<Counts>();
    let old = counts(&[("a", 1.0), ("b", 0.0), ("c", 5.0), ("lost", 1.0)]);
    let same = counts(&[("a", 1.02), ("b", 0.009), ("c", 1.0), ("lost", 1.0)]);
    assert!(complaints(&old, &same).is_empty());
    let worse = counts(&[("a", 1.04), ("b", 0.02), ("c", 5.0), ("new", 1.0)]);
    let names: Vec<String> =
        complaints(&old, &worse).iter().map(|line| line.split(':').next().unwrap().to_owned()).collect();
    assert_eq!(names, ["a", "b", "new", "lost"]);
    assert_eq!(parse(&render(&worse)), worse);
}
