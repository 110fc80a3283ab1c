//! A few kills in each format; `cargo xtask crash` does it a thousand times.

use std::process::Command;

#[test]
fn twenty_kills_lose_nothing_that_was_flushed() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_crash")).args(["--kills", "20"]).output().expect("it starts");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(said.matches("20 kills").count(), 2, "{said}");
}
