//! Bad input on the command line: each gets one clear line on standard error and the right exit status.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn trellis(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_trellis"));
    command.args(arguments).env_remove("TRELLIS_LOG").output().expect("the program starts")
}

/// Asserts status and one line that contains every one of `parts`.
fn assert_error(arguments: &[&str], status: i32, parts: &[&str]) {
    let output = trellis(arguments);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{arguments:?}: {text}");
    assert_eq!(text.lines().count(), 1, "{arguments:?}: {text}");
    assert!(text.starts_with("trellis: error: "), "{arguments:?}: {text}");
    for part in parts {
        assert!(text.contains(part), "{arguments:?}: {part:?} is not in {text}");
    }
    assert!(output.stdout.is_empty(), "{arguments:?}");
}

#[test]
fn usage_errors_end_with_2() {
    let cases: &[(&[&str], &[&str])] = &[
        (&["bot"], &["did you mean 'boot'"]),
        (&["boot", "--memroy", "1G"], &["--memroy", "did you mean '--memory'"]),
        (&["boot", "--kernal=x"], &["did you mean '--kernel'"]),
        (&["boot", "--memory", "0"], &["--memory", "too little"]),
        (&["boot", "--memory", "1B"], &["too little"]),
        (&["boot", "--memory", "lots"], &["512M"]),
        (&["boot", "--cpus", "0"], &["from 1 to 16"]),
        (&["boot", "--cpus", "1000"], &["from 1 to 16"]),
        (&["boot", "--memory", "12345B"], &["too little"]),
        (&["boot", "--memory", "3000001B"], &["whole pages"]),
        (&["boot", "--cpus", "17"], &["from 1 to 16"]),
        (&["boot", "--cpus", "abc"], &["from 1 to 16"]),
        (&["boot", "--cpu", "maks"], &["did you mean 'max'"]),
        (&["boot", "--cpu", "max,+avx5124f"], &["did you mean 'avx512f'"]),
        (&["boot", "--timeout", "-1"], &["seconds"]),
        (&["boot", "--timeout", "abc"], &["seconds"]),
        (&["boot", "--disk", "x,rx"], &["'rx'"]),
        (&["boot", "--name", "a b"], &["no name for a machine"]),
        (&["type", "\\q"], &["stands for no key"]),
        (&["boot", "--engine", "interpreter"], &["interp"]),
        (&["boot", "--vga", "txt"], &["did you mean 'text'"]),
        (&["boot", "--serial", "stdoi"], &["did you mean 'stdio'"]),
        (&["boot", "--timeout", "0"], &["seconds"]),
        (&["boot", "debain"], &["did you mean 'debian'"]),
        (&["boot", "debian", "--kernel", "k"], &["give one of them"]),
        (&["boot", "--gdb", "tcp::1234", "--kernel", "k"], &["--gdb=:1234"]),
        (&["boot", "--gdb", "1234"], &["--gdb=1234"]),
        (&["boot", "--balloon", "128M"], &["--balloon=128M"]),
        (&["image", "fetch", "debain"], &["did you mean 'debian'"]),
        (&["image", "fetch", "debian", "--arch", "i386", "--flavour", "cloud"], &["686-pae"]),
        (&["image", "fetch", "debian", "--suite", "x"], &["--mirror"]),
        (&["run", "/nonexistent/vm.toml"], &["/nonexistent/vm.toml"]),
        (&["boot", "contract", "--trace", "fragment"], &["did you mean 'fragments'"]),
        (&["boot", "contract", "--trace-range", "2-1"], &["ends before it begins"]),
        (&["boot", "contract", "--engine", "interp", "--trace", "exits"], &["--engine bt"]),
        (&["boot", "contract", "--clock", "icount", "--perf-map"], &["--perf-map", "--engine bt"]),
        (&["dump"], &["--bytes"]),
    ];
    for (arguments, parts) in cases {
        assert_error(arguments, 2, parts);
    }
}

#[test]
fn what_the_host_cannot_give_ends_with_1() {
    assert_error(&["boot", "contract", "--memory", "1024T"], 1, &["more than this host has"]);
    assert_error(&["boot", "contract", "--engine", "bt", "--clock", "icount"], 1, &["--engine interp"]);
    // What this host has decides the others (`choice`).
    assert_error(&["boot", "contract", "--engine", "bt", "--mmu", "hardware"], 2, &["use --mmu software"]);
    assert_error(
        &["boot", "contract", "--virtual-exec", "software", "--virtual-mmu", "hardware"],
        2,
        &["--engine kvm"],
    );
    assert_error(&["boot", "contract", "--engine", "kvm", "--clock", "icount"], 2, &["--engine interp"]);
    assert_error(&["boot", "--engine", "bt", "--virtual-exec", "software"], 2, &["--virtual-exec"]);
    if !engine_kvm::probe::host().is_hardware() {
        assert_error(&["boot", "contract", "--virtual-exec", "hardware"], 1, &["kvm"]);
    }
    assert_error(&["boot", "contract", "--serial", "file:/nonexistent/x"], 1, &["/nonexistent/x"]);
    assert_error(&["boot", "contract", "--trace", "/nonexistent/x"], 1, &["/nonexistent/x"]);
    assert_error(&["boot", "contract", "--jitdump=/nonexistent"], 1, &["/nonexistent/jit-"]);
    assert_error(&["dump", "--bytes", "06"], 1, &["no 64-bit instruction"]);
    assert_error(&["dump", "--file", "/nonexistent/x"], 1, &["/nonexistent/x"]);
    assert_error(&["boot", "contract", "--stats=/nonexistent/x"], 1, &["/nonexistent/x"]);
    assert_error(&["boot", "contract", "--clock", "icount", "--cpus", "2"], 1, &["exactly one CPU"]);
    assert_error(&["boot", "--kernel", "/bin/sh"], 1, &["a program for Linux, not a kernel"]);
}

#[test]
fn files_missing_or_empty_end_with_1() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = |name: &str, content: &[u8]| {
        let path = directory.path().join(name);
        fs::write(&path, content).expect("written");
        path.to_str().expect("UTF-8").to_owned()
    };
    let (empty, odd, kernel) = (file("empty", b""), file("odd.img", &[0; 700]), file("kernel", &[0; 4096]));
    assert_error(&["boot", "--kernel", "/nonexistent/k"], 1, &["/nonexistent/k", "--kernel"]);
    assert_error(&["boot", "--kernel", &empty], 1, &["is empty"]);
    assert_error(&["boot", "--kernel", "/"], 1, &["is a directory"]);
    assert_error(&["boot", "--kernel", &kernel, "--initrd", "/nonexistent/i"], 1, &["/nonexistent/i"]);
    assert_error(
        &["boot", "--kernel", &kernel, "--initrd", "/dev/zero", "--memory", "4M"],
        1,
        &["larger than guest memory"],
    );
    assert_error(&["boot", "contract", "--disk", "/nonexistent/d"], 1, &["/nonexistent/d"]);
    assert_error(&["boot", "contract", "--disk", &empty], 1, &["is empty"]);
    assert_error(&["boot", "contract", "--disk", &odd], 1, &["sectors"]);
}

#[test]
fn disk_in_use_ends_with_1() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("d.img");
    fs::write(&path, [0; 4096]).expect("written");
    let held = fs::File::open(&path).expect("opened");
    held.lock().expect("locked");
    let name = path.to_str().expect("UTF-8");
    assert_error(&["boot", "contract", "--disk", name], 1, &["in use"]);
    assert_error(&["boot", "contract", "--disk", &format!("{name},ro")], 1, &["in use"]);
}

#[test]
fn mistakes_in_a_file_name_the_line() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("vm.toml");
    let name = path.to_str().expect("UTF-8");
    let cases: &[(&str, &str)] = &[
        ("cpus = 2\nmemroy = '1G'\n", ":2: there is no key 'memroy'; did you mean 'memory'?"),
        ("monitor.virtual_exec = 'softwear'\n", "did you mean 'software'"),
        ("cpus = 1000\n", "from 1 to 16"),
        ("kernel = [\n", ":1:"),
        ("memory = true\n", "a number or a string is needed in 'memory'"),
        ("cpus = 1\n[monitor]\nvirtual_exec = 3\n", ":3:"),
        ("cpu = 'max,+avx5124f'\n", "did you mean 'avx512f'"),
    ];
    for (text, part) in cases {
        fs::write(&path, text).expect("written");
        assert_error(&["run", name], 2, &[name, part]);
    }
    fs::write(&path, "kernel = 'missing'\n").expect("written");
    let kernel = directory.path().join("missing");
    assert_error(&["run", name], 1, &[kernel.to_str().expect("UTF-8")]);
}

#[test]
fn fetch_without_apt_or_home_says_so() {
    let run = |change: &dyn Fn(&mut Command), parts: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trellis"));
        command.args(["image", "fetch", "debian"]);
        change(&mut command);
        let output = command.output().expect("the program starts");
        let text = String::from_utf8_lossy(&output.stderr);
        let last = text.lines().last().unwrap_or_default();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(last.starts_with("trellis: error: "), "{text}");
        parts.iter().for_each(|part| assert!(last.contains(part), "{part:?} is not in {last}"));
    };
    let directory = tempfile::tempdir().expect("a directory");
    let set = |command: &mut Command, cache: &Path| {
        command.env("XDG_CACHE_HOME", cache);
    };
    run(
        &|command| set(command.env("PATH", "/nonexistent"), directory.path()),
        &["apt-get is not installed", "--kernel"],
    );
    let unset = |command: &mut Command| {
        command.env_remove("HOME").env_remove("XDG_CACHE_HOME");
    };
    run(&unset, &["XDG_CACHE_HOME"]);
    run(&|command| set(command, Path::new("/proc/nonexistent")), &["/proc/nonexistent"]);
}

#[test]
fn help_teaches_with_examples() {
    for arguments in [&["--help"][..], &["boot", "--help"], &["run", "--help"], &["image", "fetch", "--help"]]
    {
        let output = trellis(arguments);
        assert!(output.status.success());
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("xample") || text.contains("A file looks like this"), "{text}");
    }
    assert_eq!(trellis(&[]).status.code(), Some(2));
}

#[test]
fn pipes_without_a_partner_are_not_waited_for() {
    let directory = tempfile::tempdir().expect("a directory");
    let pipe = directory.path().join("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status().expect("mkfifo starts");
    assert!(made.success());
    let name = pipe.to_str().expect("UTF-8");
    assert_error(&["boot", "--kernel", name], 1, &["nobody writes"]);
    assert_error(&["run", name], 2, &["nobody writes"]);
    assert_error(&["boot", "contract", "--serial", &format!("file:{name}")], 1, &["nobody reads"]);
    // One that comes late is waited for.
    let script = "(sleep 0.2; echo no kernel at all) > \"$1\" & exec \"$0\" boot --kernel \"$1\"";
    let mut late = Command::new("sh");
    late.args(["-c", script, env!("CARGO_BIN_EXE_trellis"), name]);
    let text = String::from_utf8(late.output().expect("sh starts").stderr).expect("UTF-8");
    assert!(text.contains("only 17 bytes"), "{text}");
}

#[test]
fn cpu_help_lists_models_and_features() {
    let output = trellis(&["boot", "--cpu", "help"]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("x86-64-v3"));
}
