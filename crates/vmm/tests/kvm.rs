//! The contract suite on this host's KVM.
//!
//! A KVM without hardware virtualization cannot do all of the architecture: what it cannot is listed by name in
//! `guest/known-kvm-software-differences.txt`. A test that ends the machine costs one run: the next goes on behind it. Those that are listed as
//! fatal are left out where KVM has no hardware, since each takes its whole time; `TRELLIS_KVM_ALL=1` runs them too.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use engine_kvm::probe;
use vmm::boot::Protocol;
use vmm::{EngineKind, Outcome, Vm, VmConfig};

use common::{Capture, contract_guest};

const KNOWN: &str = include_str!("../../../guest/known-kvm-software-differences.txt");
/// One test may take so long; one that hangs is taken for one that ends the machine.
const LIMIT: Duration = Duration::from_secs(15);

/// How a test ended.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Verdict {
    Passed,
    Skipped,
    Failed(String),
    /// The machine ended in it.
    Fatal(String),
}

/// Runs the suite behind test `after` without those in `skip`; what it printed, and how it ended.
fn run(engine: EngineKind, cpus: u32, after: Option<&str>, skip: &str) -> (String, String) {
    let output = Capture::default();
    // With two vCPUs what needs two; the rest would take as long again.
    let (protocol, only) = if cpus == 1 { (Protocol::Pvh, "") } else { (Protocol::Multiboot, "smp.") };
    let source =
        contract_guest(protocol, format!("after={} only={only} skip={skip}", after.unwrap_or_default()));
    let config = VmConfig {
        engine,
        cpus,
        memory_bytes: 64 << 20,
        isa_debug_exit: true,
        save_at_marker: true,
        timeout: Some(LIMIT),
        serial: output.sink(),
        ..VmConfig::new(source)
    };
    let (mut vm, mut lines) = (Vm::new(config).unwrap(), 0);
    let end = loop {
        match vm.run() {
            Ok(Outcome::DebugExit(_)) => break String::new(),
            Ok(Outcome::Timeout) if output.text().lines().count() > lines => {
                lines = output.text().lines().count()
            }
            Ok(outcome) => break format!("{outcome:?}"),
            Err(error) => break error.to_string(),
        }
    };
    (output.text(), end)
}

/// The verdicts in a run's output, in order.
fn verdicts(text: &str) -> Vec<(String, Verdict)> {
    let line = |line: &str| {
        let (kind, rest) = line.trim_end().split_once(' ')?;
        let (name, what) = rest.split_once(": ").unwrap_or((rest, ""));
        let verdict = match kind {
            "PASS" => Verdict::Passed,
            "SKIP" => Verdict::Skipped,
            "FAIL" => Verdict::Failed(what.to_owned()),
            _ => return None,
        };
        Some((name.to_owned(), verdict))
    };
    text.lines().filter_map(line).collect()
}

/// The listed tests that end the machine, with commas, if they are to be left out.
fn left_out() -> String {
    if !probe::host().is_software() || std::env::var_os("TRELLIS_KVM_ALL").is_some() {
        return String::new();
    }
    let fatal = known().into_iter().filter(|(_, (kind, _))| *kind == "fatal").map(|(name, _)| name);
    fatal.collect::<Vec<_>>().join(",")
}

/// The verdict of every test on KVM.
fn suite_on_kvm(cpus: u32) -> BTreeMap<String, Verdict> {
    let skip = left_out();
    if !skip.is_empty() {
        println!("left out, as listed: {skip}");
    }
    let names: Vec<String> =
        verdicts(&run(EngineKind::Interp, cpus, None, &skip).0).into_iter().map(|v| v.0).collect();
    let least = if cpus == 1 { 300 } else { 15 };
    assert!(names.len() > least, "the interpreter runs the whole suite: {}", names.len());
    let mut all = BTreeMap::new();
    let mut last: Option<String> = None;
    loop {
        let (text, end) = run(EngineKind::Kvm, cpus, last.as_deref(), &skip);
        assert!(text.contains("Trellis contract suite"), "it did not start: {end}\n{text}");
        for (name, verdict) in verdicts(&text) {
            last = Some(name.clone());
            all.insert(name, verdict);
        }
        if end.is_empty() && !text.contains("\n0 passed, 1 failed") {
            break;
        }
        // A run that ended by a trap in the harness has told its test.
        let next = match &last {
            None => names.first(),
            Some(name) => names.iter().skip_while(|n| *n != name).nth(1),
        };
        if !end.is_empty() {
            let Some(next) = next else { break };
            println!("FATAL {next}: {end}");
            all.insert(next.clone(), Verdict::Fatal(end));
            last = Some(next.clone());
        }
        if last.as_ref() == names.last() {
            break;
        }
    }
    for name in &names {
        assert!(all.contains_key(name), "{name} did not run");
    }
    all
}

/// The list: name to kind and reason.
fn known() -> BTreeMap<&'static str, (&'static str, &'static str)> {
    let lines = KNOWN.lines().filter(|l| !l.starts_with('#') && !l.is_empty());
    lines
        .map(|l| {
            let (kind, rest) = l.split_once(' ').unwrap();
            let (name, reason) = rest.split_once(": ").unwrap();
            assert!(matches!(kind, "fail" | "fatal" | "race") && !reason.is_empty(), "{l}");
            (name, (kind, reason))
        })
        .collect()
}

/// Whether a difference is listed, by its name or by that of its group (`irq.*`).
fn is_listed(known: &BTreeMap<&str, (&str, &str)>, name: &str) -> bool {
    let group = name.split('.').next().unwrap_or_default();
    known.contains_key(name) || known.contains_key(format!("{group}.*").as_str())
}

/// What a KVM without hardware may not do has to be in the list. For a real KVM there is none: what fails is printed.
fn check(cpus: u32) {
    let host = probe::host();
    if host.device != probe::Device::Works {
        println!("SKIP: /dev/kvm makes no VM here: {:?}", host.device);
        return;
    }
    let all = suite_on_kvm(cpus);
    let known = known();
    let count = |what: fn(&Verdict) -> bool| all.values().filter(|v| what(v)).count();
    let passed = count(|v| *v == Verdict::Passed);
    println!(
        "{cpus} vCPUs: {passed} passed, {} skipped, {} differ",
        count(|v| *v == Verdict::Skipped),
        count(bad)
    );
    for (name, (kind, reason)) in &known {
        if *kind != "race" && all.get(*name) == Some(&Verdict::Passed) && host.is_software() {
            println!("listed but passes: {name} ({reason})");
        }
    }
    let mut surprises = Vec::new();
    for (name, verdict) in all.iter().filter(|(_, v)| bad(v)) {
        if !host.is_software() || !is_listed(&known, name) {
            println!("not listed: {name}: {verdict:?}");
            surprises.push(name.clone());
        }
    }
    assert!(passed > all.len() / 3, "only {passed} tests passed");
    if host.is_software() {
        assert!(surprises.is_empty(), "differences that are not listed: {}", surprises.join(", "));
    }
}

fn bad(v: &Verdict) -> bool {
    matches!(v, Verdict::Failed(_) | Verdict::Fatal(_))
}

#[test]
fn contract_suite_on_kvm_differs_only_as_listed() {
    check(1);
}

#[test]
fn contract_suite_on_kvm_with_two_vcpus_differs_only_as_listed() {
    check(2);
}

#[test]
fn known_differences_name_existing_tests() {
    for name in known().keys() {
        let (group, test) = name.split_once('.').unwrap();
        let file = format!("{}/../../guest/src/{group}.rs", env!("CARGO_MANIFEST_DIR"));
        let source = std::fs::read_to_string(&file).unwrap();
        assert!(test == "*" || source.contains(&format!("fn {test}()")), "{name} does not exist");
    }
}
