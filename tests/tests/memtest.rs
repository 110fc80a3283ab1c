//! memtest86+ from its Debian package, on the serial console.

use std::time::Duration;

use machine_tests::Machine;

const IMAGE: &str = "debian-memtest86+-amd64";

/// Boots it with 16 MiB on an engine and waits until `text` is on its screen.
fn run_until(engine: &str, text: &str, patience: Duration) -> String {
    let mut machine = Machine::start(&["boot", IMAGE, "--memory", "16M", "--engine", engine]);
    machine.expect(text, patience);
    machine.text()
}

#[test]
fn a_pass_finds_no_error_in_16_mib_translated() {
    let screen = run_until("bt", "Pass:  1", Duration::from_secs(600));
    assert_no_errors(&screen);
}

#[test]
fn tests_0_to_6_find_no_error_in_16_mib_interpreted() {
    // The screen is redrawn every other second, so short tests may not show on it. They run in order, and test 6 is a
    // long one: where it shows, all before it have ended.
    let screen = run_until("interp", "#6  [", Duration::from_secs(600));
    assert_no_errors(&screen);
}

/// The counter on the screen never left 0.
fn assert_no_errors(screen: &str) {
    let mut counts = screen.match_indices("Errors: ").map(|(at, word)| &screen[at + word.len()..]);
    assert!(counts.clone().next().is_some(), "no error counter in:\n{screen}");
    assert!(counts.all(|rest| rest.starts_with('0')), "errors in:\n{screen}");
}

#[test]
#[ignore = "long: every test of a pass"]
fn full_pass_finds_no_error_in_16_mib() {
    let screen = run_until("interp", "Pass:  1", Duration::from_secs(3 * 3600));
    assert_no_errors(&screen);
}
