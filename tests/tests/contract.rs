//! The embedded contract suite on the assembled machine.

use std::time::Duration;

use machine_tests::{Ended, run};

const PATIENCE: Duration = Duration::from_secs(300);

/// Runs the suite; every test must pass or skip itself for one of `skips`.
fn assert_suite(arguments: &[&str], skips: &[&str]) -> Ended {
    let all = [&["boot", "contract"], arguments].concat();
    let ended = run(&all, PATIENCE);
    let failed: Vec<&str> = ended.output.lines().filter(|line| line.starts_with("FAIL")).collect();
    assert!(failed.is_empty(), "{arguments:?}: {failed:#?}");
    assert_eq!(ended.status, Some(0), "{arguments:?}: {}{}", ended.output, ended.errors);
    let passed = ended.output.lines().filter(|line| line.starts_with("PASS")).count();
    assert!(passed >= 80, "{arguments:?}: only {passed} tests");
    for line in ended.output.lines().filter(|line| line.starts_with("SKIP")) {
        assert!(skips.iter().any(|skip| line.contains(skip)), "{arguments:?}: {line}");
    }
    ended
}

/// Reasons that one processor has: no second one, and features that not every host or vendor has.
const COMMON: &[&str] = &["PKU", "vendor", "Intel", "AMD", "not announced", "no "];

#[test]
fn suite_passes_on_one_cpu() {
    let _ended = assert_suite(&[], &[COMMON, &["one processor", "marker"]].concat());
}

#[test]
fn suite_passes_on_two_cpus() {
    let _ended = assert_suite(&["--cpus", "2"], &[COMMON, &["marker"]].concat());
}

#[test]
fn suite_passes_when_saved_and_restored_in_the_middle() {
    let ended = assert_suite(&["--cpus", "2", "--save-at-marker"], COMMON);
    let skipped = ended.output.lines().find(|line| line.starts_with("SKIP snapshot."));
    assert_eq!(skipped, None, "the snapshot tests must run here");
}

/// Tests that need time to pass within one instruction, or seconds of it.
const NOT_COUNTED: &str = "skip=irq.rep_interrupted,irq.scan_interrupted,irq.rtc_";

#[test]
fn counted_time_gives_the_same_run_twice() {
    let arguments = ["boot", "contract", "--clock", "icount", "--append", NOT_COUNTED];
    let (first, second) = (run(&arguments, PATIENCE), run(&arguments, PATIENCE));
    assert_eq!(first.status, Some(0), "{}{}", first.output, first.errors);
    assert!(first.output == second.output, "first run:\n{}\nsecond run:\n{}", first.output, second.output);
}
