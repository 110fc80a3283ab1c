//! The host's files in a guest, commands of the host in a VM, and disks that outlive the program.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use machine_tests::{run, text, trellis};

/// A boot takes a fraction of this on an idle host.
const PATIENCE: Duration = Duration::from_secs(240);
const IMAGE: &str = "debian-cloud-amd64";

/// `trellis exec` with a software engine and two CPUs.
fn exec(options: &[&str], command: &[&str]) -> Command {
    let mut exec = Command::new(trellis());
    exec.args(["exec", "--engine", "bt", "--cpus", "2", "--timeout", "200"]);
    exec.args(options).arg("--").args(command);
    exec
}

fn output_of(mut command: Command, input: &[u8]) -> Output {
    let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().expect("it starts");
    let mut stdin = child.stdin.take().expect("a pipe");
    let input = input.to_vec();
    let writer = std::thread::spawn(move || {
        // A command that does not read is free not to.
        let _closed = stdin.write_all(&input);
    });
    let output = child.wait_with_output().expect("it ends");
    writer.join().expect("written");
    output
}

fn shown(output: &Output) -> String {
    format!(
        "{:?}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn exec_answers_with_the_kernel_of_the_guest() {
    let output = output_of(exec(&[], &["uname", "-a"]), b"");
    assert!(output.status.success(), "{}", shown(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("cloud-amd64"), "{}", shown(&output));
}

#[test]
fn exec_keeps_output_errors_and_status_apart() {
    let script = "echo out; echo err >&2; exit 7";
    let output = output_of(exec(&[], &["sh", "-c", script]), b"");
    assert_eq!(output.status.code(), Some(7), "{}", shown(&output));
    assert_eq!((&output.stdout[..], &output.stderr[..]), (&b"out\n"[..], &b"err\n"[..]));
}

#[test]
fn exec_carries_any_bytes_to_the_end_of_input() {
    let data: Vec<u8> =
        (0..600_000u32).map(|i| (i.wrapping_mul(0x9e37_79b9) >> 13).to_le_bytes()[0]).collect();
    let output = output_of(exec(&[], &["cat"]), &data);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(output.stdout == data, "{} bytes of {} came back", output.stdout.len(), data.len());
}

#[test]
fn exec_of_what_cannot_run_ends_as_a_shell_does() {
    let output = output_of(exec(&[], &["there-is-no-such-command"]), b"");
    assert_eq!(output.status.code(), Some(127), "{}", shown(&output));
    assert!(String::from_utf8_lossy(&output.stderr).contains("command not found"), "{}", shown(&output));
    let output = output_of(exec(&[], &["/etc/passwd"]), b"");
    assert_eq!(output.status.code(), Some(126), "{}", shown(&output));
}

#[test]
fn exec_changes_what_it_may_and_nothing_else() {
    let directory = tempfile::tempdir().expect("a directory");
    let (open, closed) = (directory.path().join("open"), directory.path().join("closed"));
    for path in [&open, &closed] {
        std::fs::create_dir(path).expect("a directory");
        std::fs::write(path.join("kept"), b"kept").expect("a file");
    }
    let script = format!(
        "cd {0} && pwd && echo new > made && mv made moved && rm kept && cd {1} && rm kept && echo x > made && cat made",
        text(&open),
        text(&closed)
    );
    let mut command = exec(&["--rw", text(&open)], &["sh", "-ec", &script]);
    command.current_dir(&open);
    let output = output_of(command, b"");
    assert!(output.status.success(), "{}", shown(&output));
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{}\nx\n", text(&open)));
    assert_eq!(std::fs::read(open.join("moved")).expect("it was made"), b"new\n");
    assert!(!open.join("kept").exists());
    assert_eq!(std::fs::read(closed.join("kept")).expect("it is still there"), b"kept");
    assert!(!closed.join("made").exists());
}

/// Waits for a line of a child's output.
fn wait_for_line(child: &mut Child, line: &str) -> BufReader<std::process::ChildStdout> {
    let mut reader = BufReader::new(child.stdout.take().expect("a pipe"));
    let mut seen = String::new();
    while seen.trim_end() != line {
        seen.clear();
        assert_ne!(reader.read_line(&mut seen).expect("it is text"), 0, "no line {line:?}");
    }
    reader
}

#[test]
fn exec_passes_signals_on() {
    let script = "trap 'echo got it; exit 3' TERM; echo ready; while :; do sleep 0.05; done";
    let mut command = exec(&[], &["sh", "-c", script]);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("it starts");
    let mut reader = wait_for_line(&mut child, "ready");
    let kill = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().expect("kill is there");
    assert!(kill.success());
    let mut rest = String::new();
    reader.read_line(&mut rest).expect("it is text");
    assert_eq!((rest.as_str(), child.wait().expect("it ends").code()), ("got it\n", Some(3)));
}

#[test]
fn exec_on_a_terminal_gives_the_command_one() {
    let script =
        "trap 'echo INT; exit 9' INT; tty; stty size; test -t 2 && echo READY; while :; do sleep 0.05; done";
    let arguments = ["exec", "--engine", "bt", "--timeout", "200", "--", "sh", "-c", script];
    let (mut child, mut terminal) = machine_tests::pty::spawn(&trellis(), &arguments);
    let mut output = Vec::new();
    let mut block = [0; 1024];
    while !String::from_utf8_lossy(&output).contains("READY") {
        let count = terminal.read(&mut block).expect("it runs");
        output.extend(&block[..count]);
    }
    // Ctrl-C.
    terminal.write_all(b"\x03").expect("it reads");
    // The other side is closed at the end, which a terminal tells as an error.
    while let Ok(count @ 1..) = terminal.read(&mut block) {
        output.extend(&block[..count]);
    }
    let output = String::from_utf8_lossy(&output);
    assert_eq!(child.wait().expect("it ends").code(), Some(9), "{output}");
    assert!(output.contains("/dev/pts/") && output.contains("25 100") && output.contains("INT"), "{output}");
}

#[test]
fn exec_takes_limits_and_groups_along_and_has_named_descriptors() {
    let script = "cat /dev/fd/0; ulimit -Sn; id -G; echo error > /dev/stderr";
    let here =
        Command::new("sh").args(["-c", "ulimit -Sn 777; ulimit -Sn; id -G"]).output().expect("sh is there");
    let exec = format!(
        "ulimit -Sn 777; exec {} exec --engine bt --timeout 200 -- sh -c '{script}'",
        text(&trellis())
    );
    let mut command = Command::new("sh");
    command.args(["-c", &exec]);
    let output = output_of(command, b"input\n");
    assert_eq!(output.status.code(), Some(0), "{}", shown(&output));
    assert_eq!(output.stdout, [b"input\n", &here.stdout[..]].concat(), "{}", shown(&output));
    assert_eq!(output.stderr, b"error\n");
}

#[test]
fn exec_killed_leaves_nothing_behind() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut command = exec(&[], &["sh", "-c", "echo ready; sleep 100"]);
    command.env("TMPDIR", directory.path()).env("XDG_RUNTIME_DIR", directory.path());
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("it starts");
    let _reader = wait_for_line(&mut child, "ready");
    child.kill().expect("killed");
    child.wait().expect("it ends");
    let left: Vec<_> = std::fs::read_dir(directory.path()).expect("it is there").collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn share_shows_a_directory_and_keeps_what_is_written() {
    let directory = tempfile::tempdir().expect("a directory");
    let content: Vec<u8> = (0..1u32 << 18).flat_map(|i| i.wrapping_mul(0x9e37_79b9).to_le_bytes()).collect();
    std::fs::write(directory.path().join("file"), &content).expect("a file");
    let (share, fixed) =
        (format!("{}:work", text(directory.path())), format!("{}:fixed:ro", text(directory.path())));
    let commands = "modprobe virtiofs; mkdir -p /a /b; mount -t virtiofs work /a; mount -t virtiofs fixed /b; \
                    cp /a/file /a/copy; sync; cmp /a/file /b/copy && echo same; touch /b/x || echo refused";
    let append = format!("console=ttyS0 quiet trellis.run=\"{commands}\"");
    let ended = run(&["boot", IMAGE, "--append", &append, "--share", &share, "--share", &fixed], PATIENCE);
    assert!(ended.output.contains("same") && ended.output.contains("refused"), "{}", ended.output);
    assert!(std::fs::read(directory.path().join("copy")).expect("it was made") == content);
    assert!(!directory.path().join("x").exists());
}

#[test]
fn snapshot_keeps_the_disk_as_it_was() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("d.img");
    std::fs::write(&path, vec![b'a'; 1 << 20]).expect("a file");
    let commands = "dd if=/dev/zero of=/dev/vda bs=4k count=16 conv=fsync 2>/dev/null; \
                    echo 3 > /proc/sys/vm/drop_caches; \
                    cmp -n 65536 /dev/vda /dev/zero && echo written; dd if=/dev/vda bs=1 skip=65536 count=3 2>/dev/null";
    let append = format!("console=ttyS0 quiet trellis.run=\"{commands}\"");
    let ended = run(&["boot", IMAGE, "--append", &append, "--disk", text(&path), "--snapshot"], PATIENCE);
    assert!(ended.output.contains("written") && ended.output.contains("aaa"), "{}", ended.output);
    assert!(std::fs::read(&path).expect("it is there") == vec![b'a'; 1 << 20], "the image was written");
}

/// The last block that the guest reported as flushed must be on the disk after the program was killed.
#[test]
fn killed_machine_keeps_what_the_guest_had_flushed() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("d.img");
    for life in 0..3u32 {
        std::fs::write(&path, vec![0; 4 << 20]).expect("a file");
        let commands = "n=1; while :; do printf %06d $n > /b; \
                        dd if=/b of=/dev/vda bs=4k seek=$n conv=fsync 2>/dev/null; echo F=$n.; n=$((n+1)); done";
        let append = format!("console=ttyS0 quiet trellis.run=\"{commands}\"");
        let mut command = Command::new(trellis());
        command.args(["boot", IMAGE, "--engine", "bt", "--timeout", "200", "--append", &append]);
        command.args(["--disk", text(&path)]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("it starts");
        let last = flushes_until_killed(&mut child, Duration::from_millis(300 + 170 * u64::from(life)));
        check_blocks(&path, last);
    }
}

/// Kills the machine some time after its first flush; the number of its last.
fn flushes_until_killed(child: &mut Child, life: Duration) -> usize {
    let mut reader = BufReader::new(child.stdout.take().expect("a pipe"));
    let (mut last, mut first, mut killed) = (0, None, false);
    let mut line = Vec::new();
    while reader.read_until(b'.', &mut line).expect("a pipe") > 0 {
        let said = String::from_utf8_lossy(&line).into_owned();
        if let Some((_, number)) = said.rsplit_once("F=")
            && let Some(number) = number.strip_suffix('.')
        {
            last = number.parse().unwrap_or(last);
            first.get_or_insert_with(Instant::now);
        }
        if !killed && first.is_some_and(|first| first.elapsed() > life) {
            child.kill().expect("killed");
            killed = true;
        }
        line.clear();
    }
    child.wait().expect("it ends");
    assert!(killed && last > 1, "the guest reported {last} flushes");
    last
}

fn check_blocks(path: &Path, last: usize) {
    let disk = std::fs::read(path).expect("it is there");
    println!("killed after flush {last}");
    for n in 1..=last.min(1023) {
        assert_eq!(disk[n * 4096..n * 4096 + 6], *format!("{n:06}").as_bytes(), "block {n} of {last}");
    }
}

/// A guest that lists, reads and writes while the host's programs change everything under it: it goes on, and reaches nothing
/// outside of the directory.
#[test]
fn share_whose_files_change_and_become_links_harms_nobody() {
    let home = tempfile::tempdir().expect("a directory");
    let (shared, outside) = (home.path().join("shared"), home.path().join("outside"));
    for directory in [&shared, &outside] {
        std::fs::create_dir(directory).expect("a directory");
    }
    std::fs::write(outside.join("secret"), b"SECRET").expect("a file");
    let stop = AtomicBool::new(false);
    let rounds = AtomicU64::new(0);
    let share = format!("{}:work", text(&shared));
    let commands = "modprobe virtiofs; mkdir /w; mount -t virtiofs work /w; cd /w; n=0; while [ $n -lt 40 ]; do n=$((n+1)); \
                    ls -lR . > /dev/null; cat f d/f l l/secret g; echo guest > f; mkdir d; echo guest > d/g; rm -f g; mv f g; \
                    ln -s /etc/x y; rm -f y; done > /out 2> /dev/null; grep -c SECRET /out; echo ROUNDS=$n";
    let append = format!("console=ttyS0 quiet trellis.run=\"{commands}\"");
    let ended = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::SeqCst) {
                disturb(&shared, &outside);
                rounds.fetch_add(1, Ordering::SeqCst);
            }
        });
        let end = StopOnDrop(&stop);
        let ended = run(&["boot", IMAGE, "--engine", "bt", "--append", &append, "--share", &share], PATIENCE);
        drop(end);
        ended
    });
    println!("the host changed everything {} times", rounds.load(Ordering::SeqCst));
    assert!(ended.output.contains("ROUNDS=40"), "{}\n{}", ended.output, ended.errors);
    // What grep counted: nothing of the file outside came through.
    assert!(ended.output.lines().any(|line| line.trim() == "0"), "{}", ended.output);
    assert_eq!(std::fs::read(outside.join("secret")).expect("it is there"), b"SECRET");
    assert_eq!(std::fs::read_dir(&outside).expect("it is there").count(), 1, "the guest wrote outside");
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Files change, vanish, become directories and links that lead out. What fails, the guest was quicker at.
fn disturb(shared: &Path, outside: &Path) {
    let place = |name: &str| shared.join(name);
    drop(std::fs::write(place("f"), b"host"));
    drop(std::os::unix::fs::symlink(outside, place("l")));
    drop(std::fs::create_dir(place("d")));
    drop(std::fs::write(place("d/f"), vec![b'h'; 9000]));
    drop(std::fs::OpenOptions::new().write(true).open(place("g")).map(|file| file.set_len(1)));
    drop(std::fs::remove_dir_all(place("d")));
    drop(std::os::unix::fs::symlink(outside, place("d")));
    drop(std::fs::remove_file(place("f")));
    drop(std::os::unix::fs::symlink(outside.join("secret"), place("f")));
    drop(std::fs::remove_file(place("d")));
    drop(std::fs::rename(place("f"), place("g")));
    drop(std::fs::remove_file(place("l")));
    drop(std::fs::remove_file(place("g")));
}
