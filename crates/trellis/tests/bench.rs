//! `trellis bench` as a user runs it, as far as no kernel is needed.

use std::process::{Command, Output};

fn bench(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trellis"));
    command.arg("bench").args(arguments).env_remove("TRELLIS_LOG").output().expect("the program starts")
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
    let known: Vec<&str> =
        trellis::bench::catalog::BENCHMARKS.iter().map(|benchmark| benchmark.name).collect();
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
        if answer.contains("SKIP") {
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
            .args(["bench", "--modes", "native", "--quick", "--runs", "1", "--only", only])
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
        .args(["bench", "--only", "sum", "--modes", "native,kvm,tcg", "--quick", "--runs", "1", "--kernel"])
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
