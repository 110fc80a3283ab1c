//! The gdb stub: the protocol byte by byte on a small kernel, the real gdb if it is installed, and bad input.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use machine_tests::rsp::{Rsp, hex};
use machine_tests::{Ended, Machine, guest, run, text};

const PATIENCE: Duration = Duration::from_secs(120);
/// Numbers of registers in the description of x86-64.
const RAX: usize = 0;
const RIP: usize = 16;
const EFLAGS: usize = 17;
const CS: usize = 18;
/// Where the kernel maps itself a second time.
const HIGH: u64 = 0xffff_ffff_8000_0000;

/// A directory with the 64-bit kernel of `tests/guests`, and its symbols.
struct Kernel {
    directory: tempfile::TempDir,
    symbols: String,
}

impl Kernel {
    /// # Panics
    /// Without gcc and binutils.
    fn build() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests/build.sh");
        let built = Command::new("sh").arg(script).arg(directory.path()).output().expect("a shell");
        assert!(
            built.status.success(),
            "gcc and binutils are needed: {}",
            String::from_utf8_lossy(&built.stderr)
        );
        let nm = Command::new("nm").arg(directory.path().join("kernel64.elf")).output().expect("binutils");
        Self { symbols: String::from_utf8_lossy(&nm.stdout).into_owned(), directory }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("kernel64.elf")
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("gdb")
    }

    fn symbol(&self, name: &str) -> u64 {
        let line = self.symbols.lines().find(|line| line.ends_with(&format!(" {name}")));
        let address = line.and_then(|line| line.split(' ').next()).expect("a symbol of the kernel");
        u64::from_str_radix(address, 16).expect("hexadecimal")
    }

    /// Starts it; it waits for the debugger.
    fn start(&self, options: &[&str]) -> Machine {
        let place = format!("--gdb={},arch=x86-64", text(&self.socket()));
        let kernel = self.path();
        let common = ["boot", "--memory", "32M", "--kernel", text(&kernel), "--gdb-wait", &place];
        Machine::start(&[&common[..], options].concat())
    }
}

fn passed(ended: &Ended) {
    assert!(ended.output.contains("0123456789ABC\nOK"), "{}{}", ended.output, ended.errors);
    assert_eq!(ended.status, Some(0), "{}", ended.errors);
}

#[test]
fn breakpoints_registers_memory_and_steps_work_from_the_first_instruction() {
    let kernel = Kernel::build();
    for engine in ["interp", "bt"] {
        tour(&kernel, kernel.start(&["--engine", engine]));
    }
}

/// Through the whole kernel, from its first instruction to its end.
fn tour(kernel: &Kernel, machine: Machine) {
    let mut gdb = Rsp::connect(&kernel.socket());
    assert!(gdb.ask("qSupported:swbreak+;hwbreak+").contains("qXfer:features:read+"));
    assert!(gdb.ask("?").starts_with("T05thread:"));
    let description = gdb.ask("qXfer:features:read:target.xml:0,ffff");
    for part in ["i386:x86-64", "\"fs_base\"", "\"cr3\"", "\"xmm15\"", "</target>"] {
        assert!(description.contains(part), "{part} in {description}");
    }
    // Nothing has run.
    assert_eq!(gdb.register(RIP), kernel.symbol("_start"));
    // Both kinds of breakpoint, at both addresses of the kernel.
    let (high, syscall) = (kernel.symbol("high") + HIGH, kernel.symbol("syscall_entry"));
    gdb.command(&format!("Z1,{high:x},1"));
    gdb.command(&format!("Z0,{syscall:x},1"));
    let code = gdb.memory(syscall, 16);
    let stop = gdb.ask("vCont;c");
    assert!(stop.starts_with("T05") && stop.contains("hwbreak:;"), "{stop}");
    assert_eq!((gdb.register(RIP), gdb.register(CS)), (high, 16));
    // Memory through the page tables; a breakpoint is not in it.
    assert_eq!(gdb.memory(syscall + HIGH, 16), code);
    assert!(gdb.memory(0x2000_0000, 1).starts_with('E'), "the hole at 512 MiB");
    assert!(gdb.memory(0x8000_0000_0000, 1).starts_with('E'), "no canonical address");
    // The end of 32 MiB: what is there is read.
    assert_eq!(gdb.memory(0x1ff_fffe, 4).len(), 4);
    // One instruction: LIDT.
    let stop = gdb.ask("vCont;s:1");
    assert!(stop.starts_with("T05thread:"), "{stop}");
    assert_eq!(gdb.register(RIP), high + 7);
    let stop = gdb.ask("vCont;c");
    assert!(stop.contains("swbreak:;"), "{stop}");
    assert_eq!(gdb.register(RIP), syscall);
    // Registers are written, and read only ones are refused. The second SYSCALL looks at EAX.
    assert_eq!(gdb.register(RAX), 0);
    gdb.command(&format!("P{RAX:x}={}", hex(&5u64.to_le_bytes())));
    assert_eq!(gdb.register(RAX), 5);
    gdb.command(&format!("P{RAX:x}={}", hex(&0u64.to_le_bytes())));
    assert!(gdb.ask(&format!("P{CS:x}=33000000")).starts_with('E'));
    assert_eq!(gdb.register(EFLAGS) & 0x302, 2, "neither TF nor IF");
    let all = gdb.ask("g");
    gdb.command(&format!("G{all}"));
    assert_eq!(gdb.ask("g"), all);
    // The breakpoint is hit as often as it is passed.
    gdb.command(&format!("z0,{syscall:x},1"));
    gdb.ask("vCont;s:1");
    gdb.command(&format!("Z0,{syscall:x},1"));
    assert!(gdb.ask("vCont;c").contains("swbreak:;"));
    assert_eq!((gdb.register(RIP), gdb.register(RAX)), (syscall, 1));
    gdb.command(&format!("z0,{syscall:x},1"));
    gdb.command(&format!("z1,{high:x},1"));
    assert_eq!(gdb.ask("vCont;c"), "W00", "the machine's end");
    passed(&machine.finish(PATIENCE));
}

#[test]
fn watchpoints_stop_behind_the_access_and_written_memory_is_the_guests() {
    let kernel = Kernel::build();
    let machine = kernel.start(&["--timeout", "100"]);
    let mut gdb = Rsp::connect(&kernel.socket());
    let (error, cr2) = (kernel.symbol("last_error"), kernel.symbol("last_cr2"));
    gdb.command(&format!("Z2,{cr2:x},8"));
    let stop = gdb.ask("vCont;c");
    assert!(stop.contains(&format!("watch:{cr2:x};")), "{stop}");
    assert_eq!(gdb.memory(cr2, 8), hex(&0x2000_0123u64.to_le_bytes()), "the write is done");
    gdb.command(&format!("z2,{cr2:x},8"));
    // The kernel compares it with the error code: read, and not written before.
    gdb.command(&format!("Z3,{error:x},8"));
    let stop = gdb.ask("vCont;c");
    assert!(stop.contains(&format!("rwatch:{error:x};")), "{stop}");
    gdb.command(&format!("z3,{error:x},8"));
    // What the debugger writes is what the guest reads: MEMORY_KIB is compared with 600 after INT 12H.
    let memory = kernel.symbol("memory_kib");
    gdb.command(&format!("Z2,{memory:x},2"));
    assert!(gdb.ask("vCont;c").contains("watch:"));
    gdb.command(&format!("M{memory:x},2:0100"));
    gdb.command(&format!("z2,{memory:x},2"));
    gdb.command("D");
    let ended = machine.finish(PATIENCE);
    assert!(ended.output.contains("0123456789!"), "{}", ended.output);
}

#[test]
fn interrupt_detach_attach_again_and_kill() {
    let directory = tempfile::tempdir().expect("a directory");
    let (kernel, socket) = (directory.path().join("spin"), directory.path().join("gdb"));
    std::fs::write(&kernel, guest::multiboot(guest::SPIN)).expect("a file");
    let place = format!("--gdb=unix:{}", text(&socket));
    let options = ["boot", "--cpus", "2", "--memory", "16M", "--kernel", text(&kernel), &place];
    let machine = Machine::start(&options);
    let mut gdb = Rsp::connect(&socket);
    assert!(gdb.ask("qXfer:features:read:target.xml:0,ffff").contains("<architecture>i386<"));
    assert_eq!(gdb.ask("qfThreadInfo"), "m01,02");
    gdb.send("vCont;c");
    std::thread::sleep(Duration::from_millis(100));
    gdb.raw(&[3]);
    let stop = gdb.receive();
    assert!(stop.starts_with("T02thread:01;"), "{stop}");
    assert_eq!(gdb.register(8), 0x10_0020, "it spins");
    // The second CPU waits for its start; it has registers all the same.
    gdb.command("Hg2");
    assert_eq!(gdb.register(8), 0xfff0);
    gdb.command("D");
    drop(gdb);
    let mut gdb = Rsp::connect(&socket);
    assert!(gdb.ask("?").starts_with("T05"));
    // A client that goes without a word while the guest runs.
    gdb.send("vCont;c");
    drop(gdb);
    // One that speaks nonsense.
    let mut gdb = Rsp::connect(&socket);
    gdb.send("mffffffffffffffff,20000");
    gdb.raw(b"GET / HTTP/1.0\r\n\r\n$$$#00\x03\xff}}}*");
    drop(gdb);
    let mut gdb = Rsp::connect(&socket);
    assert!(gdb.ask("?").starts_with("T05"));
    // As gdb says it; the older `k` has no answer.
    gdb.command("vKill;1");
    let ended = machine.finish(PATIENCE);
    assert_eq!(ended.status, Some(0), "{}", ended.errors);
    assert!(!socket.exists(), "the socket is removed");
}

#[test]
fn breakpoints_outlive_a_reset_of_the_guest() {
    let directory = tempfile::tempdir().expect("a directory");
    let (kernel, socket) = (directory.path().join("reset"), directory.path().join("gdb"));
    let code = [guest::out(0xcf9, 1, 6), guest::SPIN.to_vec()].concat();
    std::fs::write(&kernel, guest::multiboot(&code)).expect("a file");
    let place = format!("--gdb={}", text(&socket));
    let options = ["boot", "--memory", "16M", "--kernel", text(&kernel), &place, "-S"];
    let machine = Machine::start(&options);
    let mut gdb = Rsp::connect(&socket);
    gdb.command("Z0,100020,1");
    for _ in 0..3 {
        assert!(gdb.ask("vCont;c").contains("swbreak:;"));
        assert_eq!(gdb.register(8), 0x10_0020);
        assert!(gdb.ask("vCont;s:1;c").starts_with("T05"));
        assert_eq!(gdb.register(8), 0x10_0025);
    }
    gdb.send("k");
    assert_eq!(machine.finish(PATIENCE).status, Some(0));
}

#[test]
fn timeout_ends_a_guest_that_waits_for_gdb() {
    let kernel = Kernel::build();
    let ended = kernel.start(&["--timeout", "0.5"]).finish(PATIENCE);
    assert_eq!(ended.status, Some(124), "{}", ended.errors);
    assert!(ended.errors.contains("target remote"), "{}", ended.errors);
}

#[test]
fn gdb_itself_debugs_a_kernel_with_symbols() {
    if Command::new("gdb").arg("--version").output().is_err() {
        eprintln!("left out: gdb is not installed");
        return;
    }
    let kernel = Kernel::build();
    let machine = kernel.start(&[]);
    while !kernel.socket().exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
    let remote = format!("target remote {}", text(&kernel.socket()));
    let commands = [
        "set confirm off",
        &remote,
        "break syscall_entry",
        "continue",
        "print/x $cs",
        "info registers rip eflags cr0 efer fs_base xmm0",
        "x/2i $pc",
        "stepi",
        "info symbol $pc",
        "delete",
        "watch *(long*)&return_to",
        "continue",
        "delete",
        "hbreak exception",
        "continue",
        "backtrace 1",
        "delete",
        "continue",
    ];
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-batch"]).arg(kernel.path());
    commands.iter().for_each(|command| {
        gdb.args(["-ex", command]);
    });
    let said = gdb.output().expect("gdb runs");
    let said = String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr);
    for part in [
        "Breakpoint 1, ",
        "$1 = 0x10",
        "fs_base",
        "user_end + 2",
        "New value = ",
        "in exception ()",
        "exited normally",
    ] {
        assert!(said.contains(part), "no {part:?} in:\n{said}");
    }
    passed(&machine.finish(PATIENCE));
}

#[test]
fn places_that_cannot_be_had_are_told_in_one_line() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    let cases = [
        (format!("--gdb={port}"), 1, "already in use"),
        ("--gdb=192.0.2.77:1234".to_owned(), 1, "192.0.2.77"),
        ("--gdb=/nonexistent/gdb".to_owned(), 1, "/nonexistent/gdb"),
        ("--gdb=12x".to_owned(), 2, "12x"),
        ("--gdb=1234,arch=arm".to_owned(), 2, "arm"),
    ];
    for (option, status, part) in cases {
        let ended = run(&["boot", "contract", &option], PATIENCE);
        assert_eq!(ended.status, Some(status), "{option}: {}", ended.errors);
        assert!(ended.errors.contains(part), "{option}: {}", ended.errors);
        assert_eq!(ended.errors.trim_end().lines().count(), 1, "{option}: {}", ended.errors);
    }
}
