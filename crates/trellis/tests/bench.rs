//! `trellis bench` as a user runs it, as far as no kernel is needed.

use std::process::{Command, Output};

fn bench(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trellis"));
    // The report is written to the current directory.
    let directory = tempfile::tempdir().expect("there is room");
    command.arg("bench").args(arguments).current_dir(directory.path());
    command.env_remove("TRELLIS_LOG").output().expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn json_of_a_quick_native_run_is_whole() {
    let output = bench(&["--only", "sum", "--modes", "native", "--quick", "--json", "--runs", "3"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("nothing but JSON");
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 1);
    let row = &rows[0];
    assert_eq!((row["benchmark"].as_str(), row["mode"].as_str()), (Some("sum"), Some("native")));
    assert_eq!((row["unit"].as_str(), row["percent_of_native"].as_f64()), (Some("ns/op"), Some(100.0)));
    assert!(row["value"].as_f64().unwrap() > 0.0 && row["spread"].as_f64().unwrap() >= 0.0);
    assert_eq!(row["samples"].as_array().unwrap().len(), 3);
    assert!(report["host"]["cpu"].is_string() && report["modes"][0]["version"].is_string());
}

#[test]
fn every_benchmark_of_the_program_is_in_the_catalogue() {
    let output = bench(&["--list"]);
    assert!(output.status.success());
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("bench");
    std::fs::write(&program, guest_bench::PROGRAM).unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let mut child = Command::new(&program);
    let script = format!("echo list | {}", program.display());
    let answer = Command::new("/bin/sh").args(["-c", &script]).output().unwrap();
    let names: Vec<String> = text(&answer.stderr)
        .lines()
        .filter_map(|line| line.strip_prefix("NAME ").map(str::to_owned))
        .collect();
    let known = trellis::bench::catalog::BENCHMARKS.iter();
    let known: Vec<&str> = known
        .filter(|benchmark| benchmark.native != trellis::bench::catalog::Native::Absent)
        .map(|benchmark| benchmark.name)
        .collect();
    assert_eq!(names, known);
    // A word on its command line makes it a child of a benchmark, which ends at once.
    assert_eq!(child.arg("quit").status().unwrap().code(), Some(7));
}

#[test]
fn results_do_not_depend_on_the_count() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("bench");
    std::fs::write(&program, guest_bench::PROGRAM).unwrap();
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    for benchmark in trellis::bench::catalog::BENCHMARKS.iter().filter(|benchmark| !benchmark.is_slow) {
        let name = benchmark.name;
        let script = format!("printf 'run {name} 1\\nrun {name} 3\\n' | {}", program.display());
        let answer = Command::new("/bin/sh").args(["-c", &script]).current_dir(&directory).output().unwrap();
        let answer = text(&answer.stderr);
        if answer.contains("SKIP") || answer.contains("ERR no benchmark") {
            continue;
        }
        let checks: Vec<&str> = answer
            .lines()
            .filter(|line| line.contains("DONE"))
            .filter_map(|line| line.rsplit(' ').next())
            .collect();
        assert_eq!(checks.len(), 2, "{answer}");
        assert_eq!(checks[0], checks[1], "{answer}");
    }
}

/// The program started in `root`, given `commands`; what it answers.
fn in_root(root: &std::path::Path, commands: &str) -> Output {
    let program = root.join("bench");
    std::fs::write(&program, guest_bench::PROGRAM).expect("the root can be written");
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o700))
        .expect("the root can be written");
    let script = format!("printf '{commands}' | {} root {}", program.display(), root.display());
    Command::new("/bin/sh").args(["-c", &script]).output().expect("there is a shell")
}

#[test]
fn root_without_programs_is_a_skip() {
    let root = tempfile::tempdir().unwrap();
    let answer = text(&in_root(root.path(), "run gzip 1\\n").stderr);
    assert!(answer.contains("SKIP gzip the real programs are not in this root"), "{answer}");
}

#[test]
fn real_program_that_fails_is_an_error_and_no_time() {
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("usr/bin")).unwrap();
    std::os::unix::fs::symlink("usr/bin", root.path().join("bin")).unwrap();
    // The benchmark program itself, whose status with one word is 7; the others are not there, which is 127.
    for name in ["cc1", "ls"] {
        std::fs::write(root.path().join("usr/bin").join(name), guest_bench::PROGRAM).unwrap();
    }
    let answer = text(&in_root(root.path(), "run exec-pie 1\\nrun gunzip 1\\n").stderr);
    assert!(answer.contains("ERR exec-pie: a program of its work ended with wait status"), "{answer}");
    assert!(answer.contains("ERR gunzip: a program of its preparation ended with wait status"), "{answer}");
    assert!(!answer.contains("DONE"), "{answer}");
}

#[test]
fn real_programs_that_cannot_be_fetched_are_left_out_with_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let without_apt = |only: &str| {
        Command::new(env!("CARGO_BIN_EXE_trellis"))
            .args(["bench", "--no-report", "--modes", "native", "--quick", "--runs", "1", "--only", only])
            .env("PATH", directory.path())
            .env("XDG_CACHE_HOME", directory.path())
            .output()
            .unwrap()
    };
    let output = without_apt("sum,gzip,cc1-o2");
    let (table, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{errors}");
    let line = "real programs are left out: apt-get is not installed here, so packages cannot be fetched";
    assert_eq!(table.lines().filter(|other| *other == line).count(), 1, "{table}");
    assert_eq!(errors.matches(line).count(), 1, "{errors}");
    assert!(table.lines().any(|line| line.starts_with("sum ")) && !table.contains("gzip "), "{table}");
    assert!(!without_apt("gzip").status.success(), "nothing was measured");
}

#[test]
#[ignore = "fetches packages"]
fn real_programs_compute_the_same_whatever_the_count() {
    let names: Vec<&str> = trellis::bench::catalog::BENCHMARKS
        .iter()
        .filter(|benchmark| benchmark.is_real())
        .map(|benchmark| benchmark.name)
        .collect();
    let programs =
        trellis::image::programs::ensure(&trellis::image::programs::BENCH, trellis::image::Progress::hidden)
            .unwrap();
    let root = trellis::bench::root::ProgramRoot::lay(&programs, true, false).unwrap();
    let directory = root.directory.as_ref().unwrap();
    for name in names {
        let answer = in_root(directory, &format!("run {name} 1 25\\nrun {name} 3 25\\n"));
        let answer = text(&answer.stderr);
        let checks: Vec<&str> = answer
            .lines()
            .filter(|line| line.contains("DONE"))
            .filter_map(|line| line.rsplit(' ').next())
            .collect();
        assert!(checks.len() == 2 && checks[0] == checks[1], "{answer}");
    }
}

#[test]
fn unknown_names_are_one_line_that_lists_what_there_is() {
    for (arguments, expected) in [
        (["--only", "nosuch"], "getppid"),
        (["--modes", "vmware"], "interp"),
        (["--kernel", "/nonexistent/k"], "/nonexistent/k"),
    ] {
        let output = bench(&arguments);
        let line = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(line.lines().count() == 1 && line.contains(expected), "{line}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn modes_that_are_not_there_are_left_out_with_a_line() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("kernel");
    std::fs::write(&kernel, "no kernel").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_trellis"))
        .args([
            "bench",
            "--no-report",
            "--only",
            "sum",
            "--modes",
            "native,kvm,tcg",
            "--quick",
            "--runs",
            "1",
        ])
        .arg("--kernel")
        .arg(&kernel)
        .env("PATH", directory.path())
        .output()
        .unwrap();
    let table = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(
        table.contains("tcg is left out: it does not start: qemu-system-x86_64 is not installed"),
        "{table}"
    );
    assert!(table.contains("kvm is left out:"), "{table}");
    assert!(table.lines().any(|line| line.starts_with("sum ")), "{table}");
}

#[test]
fn single_operations_need_no_kernel() {
    let only = "nano-cpuid,nano-ptemod,nano-hlt-wake";
    let output = bench(&["--only", only, "--modes", "native,interp,bt", "--quick", "--runs", "2", "--json"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("nothing but JSON");
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 9);
    for row in rows {
        assert_eq!(row["unit"], "cycles/op");
        let is_there = row["mode"] != "native" || row["benchmark"] == "nano-cpuid";
        assert_eq!(row["value"].as_f64().is_some_and(|value| value > 0.0), is_there, "{row}");
        assert!(row["error"].is_null(), "{row}");
    }
    assert!(report["modes"][1]["percent_of_native"].is_null(), "they are in no mean");
    assert_eq!(report["notes"].as_array().unwrap().len(), 0, "{report}");
}

#[test]
fn result_is_saved_and_compared_and_the_report_stands_beside() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name).display().to_string();
    let arguments = ["--only", "sum", "--modes", "native", "--quick", "--runs", "2", "--save"];
    let first = bench(&[&arguments[..], &[&file("a.json")]].concat());
    assert!(first.status.success(), "{}", text(&first.stderr));
    let said = text(&first.stderr);
    assert!(said.contains(&format!("result: {}", file("a.json"))), "{said}");
    assert!(said.contains(&format!("report: {}", file("a.html"))), "{said}");
    let page = std::fs::read_to_string(file("a.html")).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.contains("sum"));

    let second = bench(&[&arguments[..], &[&file("b.json"), "--compare", &file("a.json")]].concat());
    let table = text(&second.stdout);
    assert!(second.status.success(), "{}", text(&second.stderr));
    assert!(
        table.contains("Compared with") && table.contains("of 1 within the spread or of one run"),
        "{table}"
    );
    let saved: serde_json::Value = serde_json::from_slice(&std::fs::read(file("b.json")).unwrap()).unwrap();
    assert_eq!(saved["comparison"]["rows"].as_array().unwrap().len(), 1);
}

#[test]
fn report_that_cannot_be_written_is_one_line_and_the_table_is_printed() {
    let arguments =
        ["--only", "sum", "--modes", "native", "--quick", "--runs", "1", "--report", "/nonexistent/a.html"];
    let output = bench(&arguments);
    let (table, errors) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1), "it was asked for: {errors}");
    assert_eq!(errors.matches("cannot write the report /nonexistent/a.html").count(), 1, "{errors}");
    assert!(table.lines().any(|line| line.starts_with("sum ")), "{table}");
}

#[test]
fn what_is_no_result_is_refused_before_anything_is_measured() {
    let output = bench(&["--only", "sum", "--modes", "native", "--compare", "/nonexistent/old.json"]);
    let line = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{line}");
    assert!(line.lines().count() == 1 && line.contains("/nonexistent/old.json"), "{line}");
    assert!(output.stdout.is_empty());
}

#[test]
fn guest_that_never_answers_is_given_up_and_the_rest_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("kernel");
    // It runs for a while and says nothing that the bench would understand.
    std::fs::write(&kernel, guest_embed::CONTRACT).unwrap();
    let kernel = kernel.display().to_string();
    let arguments =
        ["--only", "sum,callret", "--modes", "interp,native", "--quick", "--runs", "1", "--timeout", "1"];
    let output = bench(&[&arguments[..], &["--kernel", &kernel]].concat());
    let table = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(table.contains("interp is left out: no answer within 1 s"), "{table}");
    assert!(table.lines().any(|line| line.starts_with("callret ")), "{table}");
}
