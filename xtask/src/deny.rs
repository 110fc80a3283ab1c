//! `cargo xtask deny`: what may be depended on. cargo-deny does it by `deny.toml` where it is installed; elsewhere the
//! part of it that needs nothing but `cargo metadata` is done here: licences and sources, by the same file.

use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::steps::{Step, cargo, root, step};

/// The task by itself.
pub fn run() -> anyhow::Result<()> {
    let step = as_step()?;
    ensure!(step.passed, "dependencies break the rules of deny.toml");
    Ok(())
}

/// As a step of the ladders.
pub fn as_step() -> anyhow::Result<Step> {
    if is_installed() {
        return step("cargo deny", cargo(&["deny", "--offline", "check", "licenses", "bans", "sources"]));
    }
    println!(
        "\n==> dependencies: cargo-deny is not installed; checking licences and sources by cargo metadata"
    );
    let start = std::time::Instant::now();
    let problems = check(&metadata()?, &rules()?);
    problems.iter().for_each(|problem| println!("{problem}"));
    let passed = problems.is_empty();
    println!("==> dependencies: {}", if passed { "ok" } else { "FAILED" });
    Ok(Step {
        name: "dependencies (built-in check)".to_owned(),
        took: start.elapsed(),
        results: Vec::new(),
        passed,
    })
}

fn is_installed() -> bool {
    let mut command: Command = cargo(&["deny", "--version"]);
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

fn metadata() -> anyhow::Result<Value> {
    let output = cargo(&["metadata", "--format-version", "1", "--locked"]).output()?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Licences that `deny.toml` allows.
fn rules() -> anyhow::Result<Vec<String>> {
    let text = std::fs::read_to_string(root().join("deny.toml")).context("deny.toml")?;
    let file: toml::Value = toml::from_str(&text)?;
    let allowed = file.get("licenses").and_then(|l| l.get("allow")).and_then(toml::Value::as_array);
    let allowed = allowed.context("deny.toml has no licenses.allow")?;
    Ok(allowed.iter().filter_map(|l| l.as_str().map(str::to_owned)).collect())
}

/// One line per package that breaks a rule.
fn check(metadata: &Value, allowed: &[String]) -> Vec<String> {
    let packages = metadata["packages"].as_array().map_or(&[][..], |packages| packages);
    packages.iter().filter_map(|package| problem(package, allowed)).collect()
}

fn problem(package: &Value, allowed: &[String]) -> Option<String> {
    let name = format!("{} {}", package["name"].as_str()?, package["version"].as_str().unwrap_or("?"));
    match package["source"].as_str() {
        None => return None, // ours
        Some(source) if source.starts_with("registry+") || source.starts_with("sparse+") => {}
        Some(source) => return Some(format!("{name}: from {source}, not from the registry")),
    }
    match package["license"].as_str() {
        Some(text) if satisfied(text, allowed) => None,
        Some(text) => Some(format!("{name}: licence '{text}' is not among those of deny.toml")),
        None => Some(format!("{name}: says no licence")),
    }
}

/// Whether an SPDX expression can be satisfied by the licences allowed. `/` is the old spelling of OR.
fn satisfied(expression: &str, allowed: &[String]) -> bool {
    let text = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = text.split_whitespace().collect();
    let mut at = 0;
    any(&words, &mut at, allowed) && at == words.len()
}

fn any(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let mut holds = all(words, at, allowed);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        holds |= all(words, at, allowed);
    }
    holds
}

fn all(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let mut holds = one(words, at, allowed);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        holds &= one(words, at, allowed);
    }
    holds
}

fn one(words: &[&str], at: &mut usize, allowed: &[String]) -> bool {
    let Some(&word) = words.get(*at) else { return false };
    *at += 1;
    if word == "(" {
        let holds = any(words, at, allowed);
        *at += 1; // the closing parenthesis
        return holds;
    }
    let mut name = word.to_owned();
    if words.get(*at) == Some(&"WITH") {
        name = format!("{word} WITH {}", words.get(*at + 1).copied().unwrap_or_default());
        *at += 2;
    }
    allowed.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_judged_by_their_operators() {
        let allowed = ["MIT", "Apache-2.0", "Apache-2.0 WITH LLVM-exception"].map(str::to_owned);
        for good in [
            "MIT",
            "GPL-3.0 OR MIT",
            "MIT/GPL-2.0",
            "(MIT OR GPL-2.0) AND Apache-2.0",
            "Apache-2.0 WITH LLVM-exception",
        ] {
            assert!(satisfied(good, &allowed), "{good}");
        }
        for bad in ["", "GPL-3.0", "MIT AND GPL-3.0", "Apache-2.0 WITH other", "MIT)"] {
            assert!(!satisfied(bad, &allowed), "{bad}");
        }
    }

    #[test]
    fn packages_from_elsewhere_are_refused() {
        let package = serde_json::json!({ "name": "x", "version": "1.0.0", "source": "git+https://host.example/x", "license": "MIT" });
        assert!(problem(&package, &["MIT".to_owned()]).is_some_and(|text| text.contains("registry")));
    }
}
