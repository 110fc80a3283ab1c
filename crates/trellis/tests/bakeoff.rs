//! `trellis bakeoff` as a user runs it: a bare-metal guest as a machine of his own, commands natively, and bad input. No kernel is needed.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn bakeoff(directory: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trellis"));
    // The report is written to the current directory.
    command.arg("bakeoff").args(arguments).current_dir(directory);
    command.env_remove("TRELLIS_LOG").output().expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The bare-metal guest as a file: with `nano=NAME:N` it does an operation so often and ends, with `nano=serve` it waits for ever.
fn guest(directory: &Path) -> PathBuf {
    let file = directory.join("guest");
    std::fs::write(&file, guest_embed::CONTRACT).expect("there is room");
    file
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&output.stderr)))
}

fn mode<'a>(result: &'a Value, name: &str) -> &'a Value {
    let modes = result["modes"].as_array().expect("there are modes");
    modes.iter().find(|mode| mode["name"] == name).expect("the mode is there")
}

#[test]
fn machine_is_run_and_explained_in_each_mode() {
    let directory = tempfile::tempdir().unwrap();
    let guest = guest(directory.path());
    let kernel = guest.to_str().unwrap();
    let arguments = [
        "--kernel",
        kernel,
        "--append",
        "nano=nano-in:500",
        "--memory",
        "64M",
        "--modes",
        "native,interp,bt",
    ];
    let output = bakeoff(directory.path(), &[&arguments[..], &["--json", "--timeout", "60"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    let result = json(&output);
    assert!(mode(&result, "native")["skipped"].as_str().unwrap().contains("natively"));
    for name in ["interp", "bt"] {
        let mode = mode(&result, name);
        let explanation = &mode["explanation"];
        let seconds = explanation["seconds"].as_f64().unwrap();
        assert!(seconds > 0.0 && mode["times"].as_array().unwrap().len() == 1);
        let parts = explanation["parts"].as_array().unwrap();
        let sum: f64 = parts.iter().map(|part| part["seconds"].as_f64().unwrap()).sum();
        let rest = explanation["unexplained"].as_f64().unwrap();
        assert!((sum + rest - seconds).abs() < 1e-6, "{name}: parts and remainder are the whole");
        // 32,000 reads of a port are the work.
        let rows = parts.iter().flat_map(|part| part["rows"].as_array().unwrap());
        let reads: f64 =
            rows.filter(|row| row["cause"] == "port-read").map(|row| row["count"].as_f64().unwrap()).sum();
        assert!((32_000.0..33_000.0).contains(&reads), "{name}: {reads}");
    }
}

#[test]
fn machine_that_never_ends_times_out_and_the_rest_runs() {
    let directory = tempfile::tempdir().unwrap();
    let guest = guest(directory.path());
    let kernel = guest.to_str().unwrap();
    let arguments = [
        "--kernel",
        kernel,
        "--append",
        "nano=serve",
        "--memory",
        "64M",
        "--modes",
        "bt,interp",
        "--timeout",
        "2",
    ];
    let output = bakeoff(directory.path(), &arguments);
    assert_eq!(output.status.code(), Some(1));
    let shown = text(&output.stdout);
    assert_eq!(shown.matches("timed out").count(), 2, "{shown}");
    assert!(shown.contains("no answer within 2 s"), "{shown}");
    assert!(directory.path().join("trellis-bakeoff.html").is_file());
}

#[test]
fn command_runs_natively_and_a_mode_that_is_not_there_is_a_line() {
    let directory = tempfile::tempdir().unwrap();
    let guest = guest(directory.path());
    let mut command = Command::new(env!("CARGO_BIN_EXE_trellis"));
    command.args(["bakeoff", "--json", "--runs", "2", "--modes", "native,tcg", "--kernel"]).arg(&guest);
    command.args(["--", "/bin/sh", "-c", "exit 0"]).current_dir(directory.path()).env("PATH", "/nonexistent");
    let output = command.output().expect("the program starts");
    let result = json(&output);
    assert!(mode(&result, "tcg")["skipped"].as_str().unwrap().contains("not installed"));
    let native = mode(&result, "native");
    if native["skipped"].as_str().is_some_and(|why| why.contains("change its root")) {
        eprintln!("skipped: this host lets no process change its root");
        return;
    }
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(native["times"].as_array().unwrap().len(), 2);
    assert!(native["seconds"].as_f64().unwrap() > 0.0);
}

#[test]
fn command_that_fails_says_its_status() {
    let directory = tempfile::tempdir().unwrap();
    let output =
        bakeoff(directory.path(), &["--no-report", "--modes", "native", "--", "/bin/sh", "-c", "exit 3"]);
    let shown = text(&output.stdout);
    if shown.contains("change its root") {
        eprintln!("skipped: this host lets no process change its root");
        return;
    }
    assert_eq!(output.status.code(), Some(1));
    assert!(shown.contains("native failed: the command ended with status 3"), "{shown}");
}

#[test]
fn bad_input_is_one_line_and_status_two() {
    let directory = tempfile::tempdir().unwrap();
    for (arguments, wanted) in [
        (&["--modes", "vmware", "--", "true"][..], "there is no mode 'vmware'; there are native"),
        (&[], "what is to be run?"),
        (&["--modes", "native", "--", "/nonexistent/program"], "there is no program '/nonexistent/program'"),
        (&["--modes", "native", "--", "/etc/passwd"], "no 64-bit program and no script"),
        (&["--kernel", "/nonexistent/vmlinuz"], "there is no file /nonexistent/vmlinuz"),
        (&["--modes", "native", "--input", "/nonexistent/x", "--", "/bin/sh"], "cannot read /nonexistent/x"),
        (&["--timeout", "-1", "--", "/bin/sh"], "--timeout"),
        (&["--memory", "lots", "--", "/bin/sh"], "--memory"),
    ] {
        let output = bakeoff(directory.path(), arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {said}");
        assert!(said.contains(wanted), "{arguments:?}: {said}");
    }
}

#[test]
fn report_that_cannot_be_written_is_a_line_and_the_table_is_there() {
    let directory = tempfile::tempdir().unwrap();
    let guest = guest(directory.path());
    let kernel = guest.to_str().unwrap();
    let arguments = ["--kernel", kernel, "--append", "nano=nano-in:5", "--memory", "64M", "--modes", "bt"];
    let output = bakeoff(directory.path(), &[&arguments[..], &["--report", "/nonexistent/x.html"]].concat());
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("cannot write the report /nonexistent/x.html"));
    assert!(text(&output.stdout).contains("bt: where"), "{}", text(&output.stdout));
}

/// The census behind the cost model: 20 iterations of 64 system calls are what they are, and page walks are counted.
#[test]
fn census_counts_what_the_guest_does() {
    let directory = tempfile::tempdir().unwrap();
    let count = |census: bool| {
        let stats = directory.path().join("stats");
        let mut command = Command::new(env!("CARGO_BIN_EXE_trellis"));
        command.args([
            "boot",
            "contract",
            "--engine",
            "interp",
            "--memory",
            "64M",
            "--append",
            "nano=nano-syscall:20",
        ]);
        command.arg(format!("--stats={}", stats.display())).env_remove("TRELLIS_INTERP");
        if census {
            command.env("TRELLIS_INTERP", "census");
        }
        let output = command.output().expect("the program starts");
        assert!(output.status.success(), "{}", text(&output.stderr));
        let text = std::fs::read_to_string(stats).expect("statistics were written");
        serde_json::from_str::<Value>(&text).expect("they are JSON")
    };
    let counted = count(true);
    let events =
        trellis::model::events::Events::between(&Value::Null, &counted, 1.0).expect("there is a census");
    assert!((1280.0..1400.0).contains(&events.system_calls), "{events:?}");
    assert!(events.returns >= 1280.0 && events.walks > 10.0 && events.shadow_fills > 3.0, "{events:?}");
    assert!(count(false)["engine"].get("page_walks").is_none(), "nobody asked");
}
