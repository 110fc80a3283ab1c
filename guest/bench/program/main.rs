//! The benchmark programs of `trellis bench`: one static program without a C library. The same file runs as an ordinary
//! process and as process 1 of a guest; `guest/bench/src/lib.rs` has the protocol.
#![no_std]
#![no_main]

mod chase;
mod command;
mod cpu;
mod float;
mod heavy;
mod huge;
mod kernel;
mod memory;
mod nano;
mod output;
mod process;
mod real;
mod real_data;
mod runtime;
mod smc;
mod spawn;
mod sys;
mod text;

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// One benchmark.
pub struct Bench {
    pub name: &'static str,
    /// Operations of one iteration.
    pub ops: u64,
    /// Makes what the work needs; not measured, and kept as long as the same benchmark is run again.
    pub setup: fn() -> Result<Ctx, &'static str>,
    /// The work: so many iterations. Returns a digest of the last one, which does not depend on their number.
    pub run: fn(&mut Ctx, u64) -> u64,
    /// Undoes what `setup` did beyond its memory.
    pub teardown: fn(&mut Ctx),
}

/// What a benchmark works on.
#[derive(Default)]
pub struct Ctx {
    pub mem: Mem,
    pub fds: [i32; 4],
    pub pid: isize,
    /// Address at which the next run goes on.
    pub place: usize,
    /// Operations of one iteration where [`Bench::ops`] does not know.
    pub ops: u64,
    /// Digests what the work left behind, after the second mark; the digest of `run` does not count then.
    pub digest: Option<fn(&mut Ctx) -> u64>,
}

/// A piece of mapped memory, unmapped on drop.
pub struct Mem {
    pub at: *mut u8,
    pub len: usize,
}

impl Default for Mem {
    fn default() -> Self {
        Self { at: core::ptr::null_mut(), len: 0 }
    }
}

impl Drop for Mem {
    fn drop(&mut self) {
        if self.len != 0 {
            sys::unmap(self.at, self.len);
        }
    }
}

impl Mem {
    /// The memory as `T`s, for types of which every bit pattern is a value.
    pub fn slice<T: Copy>(&mut self) -> &mut [T] {
        // SAFETY: mapped read-write, page-aligned, owned by `self`; `T` is an integer or float type here.
        unsafe { core::slice::from_raw_parts_mut(self.at.cast(), self.len / size_of::<T>()) }
    }
}

/// Nothing to undo.
pub fn no_teardown(_: &mut Ctx) {}

/// Nothing to set up.
pub fn no_setup() -> Result<Ctx, &'static str> {
    Ok(Ctx::default())
}

/// Zeroed memory of `len` bytes, every page of it present.
pub fn with_memory(len: usize) -> Result<Ctx, &'static str> {
    let at = sys::map(len, sys::READ_WRITE).ok_or("not enough memory")?;
    for page in (0..len).step_by(4096) {
        // SAFETY: inside the mapping.
        unsafe { at.add(page).write_volatile(0) };
    }
    Ok(Ctx { mem: Mem { at, len }, ..Ctx::default() })
}

/// The path that this program was started by.
static PATH: AtomicUsize = AtomicUsize::new(0);

pub fn own_path() -> usize {
    PATH.load(Ordering::Relaxed)
}

/// How much real programs are given to do, in percent.
static SIZE: AtomicU64 = AtomicU64::new(100);

pub fn size_percent() -> u64 {
    SIZE.load(Ordering::Relaxed)
}

const SUITES: &[&[Bench]] = &[
    cpu::BENCHES,
    kernel::BENCHES,
    process::BENCHES,
    memory::BENCHES,
    chase::BENCHES,
    float::BENCHES,
    smc::BENCHES,
    text::BENCHES,
    real::BENCHES,
    heavy::BENCHES,
    nano::BENCHES,
];

fn find(name: &str) -> Option<&'static Bench> {
    if name == command::BENCH.name {
        return Some(&command::BENCH);
    }
    SUITES.iter().copied().flatten().find(|bench| bench.name == name)
}

/// The first Rust code: `stack` is as the kernel left it (argc, argv…).
extern "C" fn start(stack: *const usize) -> ! {
    // SAFETY: System V ABI: argc, then argc pointers to strings, then NULL.
    let (argc, path, word) = unsafe { (*stack, *stack.add(1), *stack.add(2)) };
    PATH.store(path, Ordering::Relaxed);
    // A kernel hands its process 1 the words of its command line that it does not know.
    let init = sys::call3(sys::SYS_GETPID, 0, 0, 0) == 1;
    if argc == 2 && !init {
        process::child(word as *const u8);
    }
    if argc == 4 && !init {
        // `run NAME N`: without marks, for who looks at the whole process. SAFETY: as above.
        let (name, count) = unsafe { (*stack.add(3), *stack.add(4)) };
        sys::exit(alone(word_at(name), word_at(count)));
    }
    if argc > 2 && !init {
        // `root DIRECTORY`. SAFETY: as above.
        let directory = unsafe { *stack.add(3) };
        if !spawn::enter_root(directory) {
            sys::write_all(2, b"there is no such root\n");
            sys::exit(1);
        }
    }
    if init {
        PATH.store(c"/init".as_ptr() as usize, Ordering::Relaxed);
        if !output::use_debug_port() {
            sys::write_all(1, b"bench: no permission for the debug port\n");
            quit(true);
        }
        spawn::be_in_root();
    }
    output::line(format_args!("READY"));
    serve();
    quit(init)
}

/// A word of the command line.
fn word_at(address: usize) -> &'static str {
    // SAFETY: the kernel's strings end with a zero and live as long as the process.
    let word = unsafe { core::ffi::CStr::from_ptr(address as *const core::ffi::c_char) };
    word.to_str().unwrap_or("")
}

/// One benchmark and nothing else; the exit status.
fn alone(name: &str, count: &str) -> usize {
    let (Some(bench), Ok(count)) = (find(name), count.parse()) else {
        sys::write_all(2, b"bench: no such benchmark, or no number\n");
        return 2;
    };
    match (bench.setup)() {
        Ok(mut ctx) => {
            (bench.run)(&mut ctx, count);
            0
        }
        Err(reason) => {
            sys::write_all(2, reason.as_bytes());
            1
        }
    }
}

fn quit(init: bool) -> ! {
    if init {
        sys::call(sys::SYS_REBOOT, [0xfee1_dead, 0x2812_1969, 0x4321_fedc, 0, 0, 0]); // power off
    }
    sys::exit(0)
}

/// Carries out commands until `quit` or the end of input.
fn serve() {
    let mut current: Option<(&'static Bench, Ctx)> = None;
    let (mut bytes, mut len) = ([0u8; 128], 0);
    loop {
        let mut byte = [0u8];
        if sys::read(0, &mut byte) != 1 {
            return;
        }
        if byte[0] != b'\n' {
            if len < bytes.len() {
                bytes[len] = byte[0];
                len += 1;
            }
            continue;
        }
        let line = core::str::from_utf8(&bytes[..len]).unwrap_or("");
        len = 0;
        let mut words = line.split_ascii_whitespace();
        let (command, name, count, size) = (words.next(), words.next(), words.next(), words.next());
        let size = size.map_or(Ok(100), str::parse);
        match (command, name, count) {
            (Some("quit"), ..) => return,
            (Some("list"), ..) => list(),
            (Some("run"), Some(name), Some(count)) => match (find(name), count.parse(), size) {
                (Some(bench), Ok(count), Ok(size @ 1..=100)) => {
                    if size != SIZE.swap(size, Ordering::Relaxed) {
                        end(&mut current);
                    }
                    run(&mut current, bench, count);
                }
                _ => output::line(format_args!("ERR no benchmark or no number")),
            },
            (None, ..) => {}
            _ => output::line(format_args!("ERR unknown command")),
        }
    }
}

fn list() {
    for bench in SUITES.iter().copied().flatten() {
        output::line(format_args!("NAME {}", bench.name));
    }
    output::line(format_args!("END"));
}

/// Undoes the setup of the last benchmark.
fn end(current: &mut Option<(&'static Bench, Ctx)>) {
    if let Some((old, mut ctx)) = current.take() {
        (old.teardown)(&mut ctx);
    }
}

fn run(current: &mut Option<(&'static Bench, Ctx)>, bench: &'static Bench, count: u64) {
    if current.as_ref().is_none_or(|(now, _)| now.name != bench.name) {
        end(current);
        match (bench.setup)() {
            Ok(ctx) => *current = Some((bench, ctx)),
            Err(reason) => return output::line(format_args!("SKIP {} {reason}", bench.name)),
        }
    }
    if report_failure(bench, "its preparation") {
        return end(current);
    }
    let Some((_, ctx)) = current else { return };
    output::byte(1);
    let start = sys::now_ns();
    let check = (bench.run)(ctx, count);
    let finish = sys::now_ns();
    output::byte(2);
    if report_failure(bench, "its work") {
        return;
    }
    let check = ctx.digest.map_or(check, |digest| digest(ctx));
    let ops = count * if ctx.ops == 0 { bench.ops } else { ctx.ops };
    output::line(format_args!("DONE {} {ops} {} {check:x}", bench.name, finish - start));
}

/// Says if a program failed; then there is no time.
fn report_failure(bench: &Bench, when: &str) -> bool {
    let failure = spawn::take_failure();
    if let Some(status) = failure {
        output::line(format_args!(
            "ERR {}: a program of {when} ended with wait status {status:#x}",
            bench.name
        ));
    }
    failure.is_some()
}
