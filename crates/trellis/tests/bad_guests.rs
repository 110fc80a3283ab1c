//! Guests that mean no good, and hosts that give no more: the program ends in time with the right status, whatever runs.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

const PATIENCE: Duration = Duration::from_secs(20);
const BASE: u32 = 0x10_0000;

/// A multiboot image (Multiboot 0.6.96, 3.1) whose code, at [`BASE`] + 0x20, is `code`.
fn image(code: &[u8]) -> Vec<u8> {
    let (magic, flags) = (0x1bad_b002u32, 1u32 << 16);
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let words = [magic, flags, checksum, BASE, BASE, 0, 0, BASE + 0x20];
    words.iter().flat_map(|word| word.to_le_bytes()).chain(code.iter().copied()).collect()
}

const CLI_SPIN: &[u8] = &[0xfa, 0xeb, 0xfe];
const CLI_HLT: &[u8] = &[0xfa, 0xf4, 0xeb, 0xfd];
/// `lidt` of zeroes, then a breakpoint.
const TRIPLE_FAULT: &[u8] = &[0x0f, 0x01, 0x1d, 0, 0, 0x20, 0, 0xcc];
/// `mov edx, 0x3f8; mov al, 'x'; l: out dx, al; jmp l`
const FLOOD: &[u8] = &[0xba, 0xf8, 0x03, 0, 0, 0xb0, b'x', 0xee, 0xeb, 0xfd];
/// For every page from 0xa0000 to 4 GiB in steps of 0x1010 bytes, but for RAM: a write of nonsense and a read.
#[rustfmt::skip]
const MMIO_NONSENSE: &[u8] = &[
    0xbf, 0x00, 0x00, 0x0a, 0x00,       // mov edi, 0xa0000
    // next:
    0x81, 0xff, 0x00, 0x00, 0x10, 0x00, // cmp edi, 0x100000
    0x72, 0x0d,                         // jb touch
    0x81, 0xff, 0x00, 0x00, 0x80, 0x00, // cmp edi, 0x800000 (8 MiB of RAM)
    0x73, 0x05,                         // jae touch
    0xbf, 0x00, 0x00, 0x80, 0x00,       // mov edi, 0x800000
    // touch:
    0x69, 0xc9, 0x0d, 0x66, 0x19, 0x00, // imul ecx, ecx, 0x19660d
    0x81, 0xc1, 0x5f, 0xf3, 0x6e, 0x3c, // add ecx, 0x3c6ef35f
    0x89, 0x0f,                         // mov [edi], ecx
    0x8b, 0x07,                         // mov eax, [edi]
    0x88, 0x6f, 0x03,                   // mov [edi + 3], ch
    0x81, 0xc7, 0x10, 0x10, 0x00, 0x00, // add edi, 0x1010
    0x73, 0xcc,                         // jnc next
    0x66, 0xba, 0x04, 0x06,             // mov dx, 0x604
    0xb8, 0x00, 0x20, 0x00, 0x00,       // mov eax, 0x2000
    0x66, 0xef,                         // out dx, ax: power off
    0xeb, 0xfe,                         // jmp $
];

struct Guest {
    home: tempfile::TempDir,
    kernel: PathBuf,
}

impl Guest {
    fn new(code: &[u8]) -> Self {
        let home = tempfile::tempdir().unwrap();
        let kernel = home.path().join("guest");
        fs::write(&kernel, image(code)).unwrap();
        Self { home, kernel }
    }

    fn command(&self, options: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trellis"));
        command
            .args(["boot", "--virtual-exec", "software", "--memory", "8M", "--kernel"])
            .arg(&self.kernel)
            .args(options);
        command.env_remove("TRELLIS_LOG").env("TRELLIS_RUNTIME_DIR", self.home.path());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command
    }

    /// Status and standard error.
    fn run(&self, options: &[&str]) -> (Option<i32>, String) {
        finish(self.command(options).spawn().unwrap())
    }
}

/// Waits for the end; a program that does not end fails the test.
fn finish(mut child: Child) -> (Option<i32>, String) {
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("the program hangs");
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut text = String::new();
    child.stderr.take().map(|mut stderr| stderr.read_to_string(&mut text).unwrap());
    (status.code(), text)
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// A pipe that is full soon, and its reader, who sleeps.
fn unread_pipe() -> (io::PipeReader, Stdio) {
    let (reader, writer) = io::pipe().unwrap();
    (reader, Stdio::from(OwnedFd::from(writer)))
}

#[test]
fn triple_fault_is_told_with_status_3() {
    let (status, text) = Guest::new(TRIPLE_FAULT).run(&[]);
    assert_eq!(status, Some(3));
    assert!(text.contains("triple fault") && text.lines().count() == 1, "{text}");
}

#[test]
fn guests_that_never_end_are_timed_out() {
    for code in [CLI_SPIN, CLI_HLT, FLOOD] {
        let (status, text) = Guest::new(code).run(&["--timeout", "0.3"]);
        assert_eq!((status, text.as_str()), (Some(124), "trellis: time-out\n"));
    }
    let (status, text) = Guest::new(CLI_HLT).run(&["--clock", "icount", "--serial", "none"]);
    assert_eq!(status, Some(1), "{text}");
    assert!(text.contains("nothing can wake it"), "{text}");
}

#[test]
fn signals_end_a_guest_that_spins_with_interrupts_off() {
    let guest = Guest::new(CLI_SPIN);
    for (wish, status) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129), (Signal::USR1, 138)] {
        let child = guest.command(&[]).spawn().unwrap();
        wait_running(&guest);
        signal(&child, wish);
        assert_eq!(finish(child), (Some(status), String::new()), "{wish:?}");
    }
}

/// The control socket comes with the machine, the signal handlers soon after it.
fn wait_running(guest: &Guest) {
    let sockets = guest.home.path().join("trellis");
    let deadline = Instant::now() + PATIENCE;
    while fs::read_dir(&sockets).is_ok_and(|mut entries| entries.next().is_none()) || !sockets.exists() {
        assert!(Instant::now() < deadline, "no machine runs");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(300));
}

#[test]
fn reader_that_sleeps_keeps_no_machine_from_ending() {
    let guest = Guest::new(FLOOD);
    let (_unread, output) = unread_pipe();
    let child = guest.command(&["--timeout", "0.5"]).stdout(output).spawn().unwrap();
    assert_eq!(finish(child).0, Some(124));
    let (_unread, output) = unread_pipe();
    let child = guest.command(&[]).stdout(output).spawn().unwrap();
    wait_running(&guest);
    signal(&child, Signal::TERM);
    assert_eq!(finish(child).0, Some(143));
}

#[test]
fn output_that_takes_nothing_is_survived() {
    let guest = Guest::new(FLOOD);
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    let timeout = ["--timeout", "0.3", "--stats"];
    assert_eq!(finish(guest.command(&timeout).stdout(full()).spawn().unwrap()).0, Some(124));
    assert_eq!(finish(guest.command(&timeout).stderr(full()).spawn().unwrap()).0, Some(124));
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let closed = Stdio::from(OwnedFd::from(writer));
    assert_eq!(finish(guest.command(&timeout).stdout(closed).spawn().unwrap()).0, Some(124));
    let screen = ["--timeout", "0.3", "--vga", "text", "--serial", "none"];
    assert_eq!(finish(guest.command(&screen).stdout(full()).spawn().unwrap()).0, Some(124));
    let missing = Command::new(env!("CARGO_BIN_EXE_trellis"))
        .args(["boot", "--kernel", "/nonexistent"])
        .stderr(full())
        .status()
        .unwrap();
    assert_eq!(missing.code(), Some(1), "a full standard error is no reason to panic");
}

#[test]
fn memory_beyond_the_limit_of_files_is_one_line() {
    let guest = Guest::new(FLOOD);
    let mut limited = Command::new("sh");
    limited.args([
        "-c",
        "ulimit -f 1; exec \"$0\" \"$@\"",
        env!("CARGO_BIN_EXE_trellis"),
        "boot",
        "--kernel",
    ]);
    limited.arg(&guest.kernel).args(["--control", "none", "--timeout", "0.3"]);
    let child = limited.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let (status, text) = finish(child);
    assert_eq!((status, text.lines().count()), (Some(1), 1), "{text}");
}

#[test]
fn nonsense_in_every_page_of_device_memory_is_survived() {
    let (status, text) = Guest::new(MMIO_NONSENSE).run(&["--no-reboot", "--timeout", "15"]);
    assert!(!text.contains("internal error") && !text.contains("panicked"), "{text}");
    assert_eq!(status, Some(0), "{text}");
}

/// Random bytes as code, in ring 0 and without any handler: it ends soon, by a triple fault, a halt or the time-out.
#[test]
fn random_code_is_survived() {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    for seed in 0..24 {
        let mut byte = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        };
        let code: Vec<u8> = (0..64 << 10).map(|_| byte()).collect();
        let guest = Guest::new(&code);
        let (status, text) = guest.run(&["--no-reboot", "--serial", "none", "--timeout", "0.1"]);
        assert!(matches!(status, Some(0 | 3 | 124)), "seed {seed}: {status:?}: {text}");
        assert!(text.lines().count() <= 1, "seed {seed}: {text}");
    }
}

#[test]
fn kernels_cut_short_are_one_line() {
    let home = tempfile::tempdir().unwrap();
    let whole = guest_embed::CONTRACT;
    let kernel = home.path().join("cut");
    let lengths = (1..64 << 10).step_by(4099).chain([whole.len() / 2]);
    for len in lengths {
        fs::write(&kernel, &whole[..len]).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_trellis"));
        command.args(["boot", "--virtual-exec", "software", "--control", "none", "--kernel"]).arg(&kernel);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let (status, text) = finish(child.unwrap());
        assert_eq!((status, text.lines().count()), (Some(1), 1), "{len}: {text}");
    }
}
