//! `cargo xtask long`: what takes too long for every change.

use crate::ladder;
use crate::steps::{cargo, step, summary};

/// Images that only the long suite boots.
const IMAGES: &[&str] =
    &["debian-cloud-amd64", "debian-generic-amd64", "debian-686-pae-i386", "debian-memtest86+-amd64"];

/// Cases of each mode that the differential tests run, from a new seed.
const DIFFERENTIAL_CASES: &str = "1000000";

/// Programs per stress knob that the translator's differential tests run, from a new seed.
const TRANSLATOR_CASES: &str = "300000";

/// Runs the long suite: the machine tests marked `#[ignore = "long: …"]`, and the differential tests with more cases.
pub fn run() -> anyhow::Result<()> {
    let mut steps = vec![ladder::build()?];
    if steps[0].passed {
        for image in IMAGES {
            steps.push(ladder::fetch(image)?);
        }
        // The distribution's test has a step, and a cache, of its own.
        steps.push(ladder::machine_tests(&[
            "--ignored",
            "--skip",
            "debian_boots_to_login",
            "--skip",
            "disks_beside_qemu",
        ])?);
        steps.extend(ladder::distribution_steps()?);
        let mut differential = cargo(&["test", "--release", "--package", "x86_interp", "--no-fail-fast"]);
        differential.env("TRELLIS_CASES", DIFFERENTIAL_CASES);
        steps.push(step("differential tests, long", differential)?);
        let mut translator = cargo(&["test", "--release", "--package", "engine_bt", "--no-fail-fast"]);
        translator.env("TRELLIS_CASES", TRANSLATOR_CASES);
        steps.push(step("differential tests of the translator, long", translator)?);
    }
    summary(&steps)
}
