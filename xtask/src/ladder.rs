//! `cargo xtask test`: everything that must hold before a change lands.
//!
//! Unit and differential tests run with debug assertions (profile `dev`, optimised a little); the machine tests run the
//! release build of the program, as a user would. What a test needs from outside (Debian's kernels) is fetched here,
//! and what cannot be fetched fails the run instead of being left out.

use std::process::Command;

use anyhow::{Context as _, ensure};

use crate::steps::{Step, cargo, step, summary, target_directory, trellis_binary};

/// Images that the machine tests boot.
const IMAGES: &[&str] = &["debian-cloud-amd64", "debian-memtest86+-amd64"];

/// What the distribution's test uses beyond what every disk has.
const DISTRIBUTION_PACKAGES: &str = "gcc,libc6-dev,iperf3,stress-ng,fio";

/// Runs the ladders.
pub fn run() -> anyhow::Result<()> {
    let mut steps = vec![build()?];
    if steps[0].passed {
        steps.push(crate::deny::as_step()?);
        steps.push(step(
            "unit and differential tests",
            cargo(&["test", "--workspace", "--exclude", "machine_tests", "--no-fail-fast"]),
        )?);
        steps.push(model_check()?);
        for image in IMAGES {
            steps.push(fetch(image)?);
        }
        steps.push(machine_tests(&[])?);
    }
    summary(&steps)
}

/// Builds the program as users do.
pub fn build() -> anyhow::Result<Step> {
    step("release build", cargo(&["build", "--release", "--package", "trellis"]))
}

/// The model check of the trace protocol. Its configuration concerns every crate, so what is built for it lies apart.
fn model_check() -> anyhow::Result<Step> {
    let mut command = cargo(&["test", "--package", "guestmem", "--test", "model", "--profile", "model"]);
    command
        .env("RUSTFLAGS", "--cfg loom")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("CARGO_TARGET_DIR", target_directory().join("loom"));
    step("model check", command)
}

/// The machine tests, with further arguments for the test programs.
pub fn machine_tests(arguments: &[&str]) -> anyhow::Result<Step> {
    let mut command = cargo(&["test", "--package", "machine_tests", "--no-fail-fast"]);
    command.args(["--", "--test-threads=2"]).args(arguments).env("TRELLIS_BINARY", trellis_binary());
    step("machine tests", command)
}

/// The distribution's disk, and the test that works in it. Both have a cache of their own: a disk of the user's is his.
pub fn distribution() -> anyhow::Result<()> {
    let mut steps = vec![build()?];
    if steps[0].passed {
        steps.extend(distribution_steps()?);
    }
    summary(&steps)
}

/// Disks measured beside QEMU's, in the distribution's guest.
pub fn disks() -> anyhow::Result<()> {
    let mut steps = vec![build()?];
    if steps[0].passed {
        let cache = target_directory().join("distribution");
        steps.push(fetch_distribution(&cache)?);
        let mut measure = cargo(&["test", "--package", "machine_tests", "--test", "disk_speed"]);
        measure.args(["--", "--ignored", "--nocapture"]).env("TRELLIS_BINARY", trellis_binary());
        steps.push(step("disks", fetch_into(measure, &cache))?);
    }
    summary(&steps)
}

fn fetch_distribution(cache: &std::path::Path) -> anyhow::Result<Step> {
    let mut fetch = Command::new(trellis_binary());
    fetch.args(["image", "fetch", "debian", "--rootfs", "--size", "4G", "--include", DISTRIBUTION_PACKAGES]);
    step("image debian-rootfs-amd64", fetch_into(fetch, cache))
}

/// The steps of [`distribution`] after the build.
pub fn distribution_steps() -> anyhow::Result<Vec<Step>> {
    let cache = target_directory().join("distribution");
    let fetch = fetch_distribution(&cache)?;
    if !fetch.passed {
        return Ok(vec![fetch]);
    }
    let mut test = cargo(&["test", "--package", "machine_tests", "--test", "distribution"]);
    test.args(["--", "--ignored"]).env("TRELLIS_BINARY", trellis_binary());
    Ok(vec![fetch, step("distribution", fetch_into(test, &cache))?])
}

fn fetch_into(mut command: Command, cache: &std::path::Path) -> Command {
    command.env("XDG_CACHE_HOME", cache);
    command
}

/// Fetches an image unless it is there.
pub fn fetch(image: &str) -> anyhow::Result<Step> {
    if is_cached(image)? {
        return step(&format!("image {image} (cached)"), Command::new("true"));
    }
    let mut command = Command::new(trellis_binary());
    command.args(["image", "fetch", image]);
    step(&format!("image {image}"), command)
}

fn is_cached(image: &str) -> anyhow::Result<bool> {
    let output = Command::new(trellis_binary()).args(["image", "list", "--json"]).output()?;
    ensure!(
        output.status.success(),
        "trellis image list failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let list: serde_json::Value =
        serde_json::from_slice(&output.stdout).context("trellis image list --json")?;
    Ok(contains_cached(&list, image))
}

/// Whether the list shows `image` as fetched.
fn contains_cached(list: &serde_json::Value, image: &str) -> bool {
    list["cached"].as_array().is_some_and(|images| images.iter().any(|entry| entry["name"] == image))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cached_images_are_those_under_cached() {
        let list = serde_json::json!({ "cached": [{ "name": "a" }], "fetchable": [{ "name": "b" }] });
        assert!(contains_cached(&list, "a") && !contains_cached(&list, "b"));
    }
}
