//! Starting programs, one step at a time, with their time and result.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};

/// The workspace's root.
pub fn root() -> PathBuf {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    here.parent().map_or_else(|| here.clone(), PathBuf::from)
}

/// Where cargo puts what it builds.
pub fn target_directory() -> PathBuf {
    let named = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let named = named.map(|path| if path.is_absolute() { path } else { root().join(path) });
    named.unwrap_or_else(|| root().join("target"))
}

/// A cargo command in the workspace.
pub fn cargo(arguments: &[&str]) -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(arguments).current_dir(root());
    command
}

/// The release build of the program.
pub fn trellis_binary() -> PathBuf {
    target_directory().join("release/trellis")
}

/// What a step left behind.
pub struct Step {
    /// What it was.
    pub name: String,
    /// How long it took.
    pub took: Duration,
    /// The closing lines of the test programs in it (`test result: …`).
    pub results: Vec<String>,
    /// Whether it ended with status 0.
    pub passed: bool,
}

/// Runs `command`, showing its output, and keeps the lines that test programs close with.
pub fn step(name: &str, mut command: Command) -> anyhow::Result<Step> {
    println!("\n==> {name}: {}", shown(&command));
    let start = Instant::now();
    command.stdout(Stdio::piped()).stdin(Stdio::null());
    let mut child = command.spawn().with_context(|| format!("cannot start {}", shown(&command)))?;
    let stdout = child.stdout.take().context("the output is a pipe")?;
    let mut results = Vec::new();
    let mut line = Vec::new();
    let mut reader = BufReader::new(stdout);
    while reader.read_until(b'\n', &mut line)? > 0 {
        let text = String::from_utf8_lossy(&line);
        print!("{text}");
        if text.starts_with("test result:") {
            results.push(text.trim_end().to_owned());
        }
        line.clear();
    }
    let status = child.wait()?;
    let took = start.elapsed();
    println!(
        "==> {name}: {} after {:.1} s",
        if status.success() { "ok" } else { "FAILED" },
        took.as_secs_f64()
    );
    Ok(Step { name: name.to_owned(), took, results, passed: status.success() })
}

fn shown(command: &Command) -> String {
    let program = PathBuf::from(command.get_program());
    let name = program.file_name().unwrap_or(command.get_program()).to_string_lossy().into_owned();
    command.get_args().fold(name, |text, argument| text + " " + &quoted(argument))
}

fn quoted(argument: &OsStr) -> String {
    let text = argument.to_string_lossy();
    if text.contains(char::is_whitespace) { format!("'{text}'") } else { text.into_owned() }
}

/// Prints every step with its time, and the test programs' own closing lines at the very end.
pub fn summary(steps: &[Step]) -> anyhow::Result<()> {
    println!("\n{:<44} {:>8}  result", "step", "seconds");
    for step in steps {
        let result = if step.passed { "ok" } else { "FAILED" };
        println!("{:<44} {:>8.1}  {result}", step.name, step.took.as_secs_f64());
    }
    println!();
    let numbers = |word: &str| -> u64 {
        steps.iter().flat_map(|s| &s.results).filter_map(|line| count_before(line, word)).sum()
    };
    let (passed, failed, ignored) = (numbers("passed"), numbers("failed"), numbers("ignored"));
    for line in steps.iter().flat_map(|s| &s.results) {
        println!("{line}");
    }
    let bad: Vec<&str> = steps.iter().filter(|s| !s.passed).map(|s| &s.name[..]).collect();
    let verdict = if bad.is_empty() { "ok" } else { "FAILED" };
    println!("all ladders: {verdict}. {passed} passed; {failed} failed; {ignored} ignored");
    ensure!(bad.is_empty(), "failed: {}", bad.join(", "));
    Ok(())
}

/// The number before `word` in a closing line.
fn count_before(line: &str, word: &str) -> Option<u64> {
    let words: Vec<&str> =
        line.split(|c: char| c.is_whitespace() || c == ';').filter(|w| !w.is_empty()).collect();
    let at = words.iter().position(|w| *w == word)?;
    words.get(at.checked_sub(1)?)?.parse().ok()
}

/// The workspace of the fuzz targets.
const FUZZ: &str = "fuzz/Cargo.toml";

/// Formatting, clippy, documentation.
pub fn lint() -> anyhow::Result<()> {
    let mut documentation = cargo(&["doc", "--workspace", "--no-deps", "--quiet"]);
    documentation.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links");
    let steps = [
        step("formatting", cargo(&["fmt", "--all", "--check"]))?,
        step(
            "clippy",
            cargo(&["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]),
        )?,
        step("documentation", documentation)?,
        // The fuzz targets are a workspace of their own.
        step("formatting of the fuzz targets", cargo(&["fmt", "--manifest-path", FUZZ, "--check"]))?,
        step(
            "clippy of the fuzz targets",
            cargo(&[
                "clippy",
                "--manifest-path",
                FUZZ,
                "--lib",
                "--tests",
                "--quiet",
                "--",
                "-D",
                "warnings",
            ]),
        )?,
    ];
    let bad: Vec<&str> = steps.iter().filter(|s| !s.passed).map(|s| &s.name[..]).collect();
    ensure!(bad.is_empty(), "failed: {}", bad.join(", "));
    Ok(())
}

/// Builds programs of the workspace and starts the last of them, named as its package.
pub fn tool(packages: &[&str], options: &[String]) -> anyhow::Result<()> {
    let mut build = cargo(&["build", "--release", "--quiet"]);
    build.args(packages.iter().flat_map(|package| ["--package", package]));
    let status = build.status()?;
    ensure!(status.success(), "the build ended with {status}");
    let name = packages.last().context("a tool is named")?;
    let status = Command::new(target_directory().join("release").join(name)).args(options).status()?;
    ensure!(status.success(), "{name} ended with {status}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read_from_closing_lines() {
        let line =
            "test result: ok. 33 passed; 0 failed; 2 ignored; 0 measured; 0 filtered out; finished in 1.20s";
        assert_eq!(count_before(line, "passed"), Some(33));
        assert_eq!(count_before(line, "ignored"), Some(2));
        assert_eq!(count_before(line, "nothing"), None);
    }
}
