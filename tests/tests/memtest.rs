//! memtest86+ from its Debian package, on the serial console.

use std::time::Duration;

use machine_tests::Machine;

const IMAGE: &str = "debian-memtest86+-amd64";

/// Boots it with 16 MiB and waits until `text` is on its screen.
fn run_until(text: &str, patience: Duration) -> String {
    let mut machine = Machine::start(&["boot", IMAGE, "--memory", "16M"]);
    machine.expect(text, patience);
    machine.text()
}

/// Numbers of the tests that were started, in order.
fn tests_begun(screen: &str) -> Vec<u32> {
    let mut numbers: Vec<u32> = screen
        .match_indices('#')
        .filter_map(|(at, _)| screen[at + 1..].split(|c: char| !c.is_ascii_digit()).next()?.parse().ok())
        .collect();
    numbers.dedup();
    numbers
}

#[test]
fn tests_0_to_3_find_no_error_in_16_mib() {
    // The screen is redrawn every other second, so short tests may not show on it. They run in order, and test 6 is a
    // long one: where it shows, all before it have ended.
    let screen = run_until("#6  [", Duration::from_secs(600));
    let begun = tests_begun(&screen);
    assert!(begun.is_sorted() && begun.first() == Some(&0), "{begun:?}");
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
    let screen = run_until("Pass:  1", Duration::from_secs(3 * 3600));
    assert_no_errors(&screen);
}
