//! The benchmarks by name. What they do is written in `guest/bench/program`.

use std::fmt::Write as _;

use super::mode;

/// A benchmark.
#[derive(Clone, Copy, Debug)]
pub struct Benchmark {
    /// Its name, on the command line and in the program.
    pub name: &'static str,
    /// What one operation is.
    pub operation: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    /// The group it belongs to: [`REAL_PROGRAMS`], [`CHASE`], [`NANO`] or one of the others.
    pub group: &'static str,
    /// Not under `--quick`.
    pub is_slow: bool,
    /// What a process of the host can do of it.
    pub native: Native,
    /// Bytes that a pointer chase goes round in, and the size of its pages.
    pub chase: Option<(u64, PageSize)>,
}

/// What a process of the host can do of a benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Native {
    /// The same.
    Same,
    /// The nearest thing, through the host's kernel: a number to look at and no measure of the other modes.
    ByItsKernel,
    /// Nothing: it needs privilege.
    Absent,
}

/// The pages of a pointer chase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 2 MiB.
    Huge,
}

/// The group of the programs that people run, which have a root and a mean of their own.
pub const REAL_PROGRAMS: &str = "real programs";
/// The group of whole jobs, which have a root of their own too.
pub const MACRO: &str = "macrobenchmarks";
/// The group of the curve over working sets; three points of it are in the group `memory`.
pub const CHASE: &str = "pointer chase";
/// The group of single operations, in a guest without an operating system.
pub const NANO: &str = "single operations, bare metal";
/// The one of the group that is not in its mean: it is the cost of starting a program alone, over and over.
const OUT_OF_THE_MEAN: &str = "exec-pie";

impl Benchmark {
    /// Whether it runs real programs out of packages.
    #[must_use]
    pub fn is_real(&self) -> bool {
        self.group == REAL_PROGRAMS
    }

    /// Whether it is a whole job of programs out of packages.
    #[must_use]
    pub fn is_macro(&self) -> bool {
        self.group == MACRO
    }

    /// Whether it runs in the guest without an operating system; its values are cycles of the host's counter.
    #[must_use]
    pub fn is_nano(&self) -> bool {
        self.group == NANO
    }

    /// Whether it counts in the mean of all: curves and single operations do not, for they would be half of it.
    #[must_use]
    pub fn is_in_mean(&self) -> bool {
        self.group != CHASE && !self.is_nano()
    }

    /// Whether it counts in the mean of the real programs.
    #[must_use]
    pub fn is_in_real_mean(&self) -> bool {
        self.is_real() && self.name != OUT_OF_THE_MEAN
    }

    const fn slow(self) -> Self {
        Self { is_slow: true, ..self }
    }
}

/// A group of benchmarks under construction.
struct Group(&'static str);

impl Group {
    const fn benchmark(&self, name: &'static str, operation: &'static str, about: &'static str) -> Benchmark {
        let native = Native::Same;
        Benchmark { name, operation, about, group: self.0, is_slow: false, native, chase: None }
    }

    const fn chase(&self, name: &'static str, len: u64, pages: PageSize, about: &'static str) -> Benchmark {
        Benchmark { chase: Some((len, pages)), ..self.benchmark(name, "load", about) }
    }
}

/// A single operation of the bare-metal guest.
const fn nano(name: &'static str, native: Native, about: &'static str) -> Benchmark {
    Benchmark { native, ..Group(NANO).benchmark(name, "operation", about) }
}

const USER: Group = Group("user code");
const KERNEL: Group = Group("into the kernel");
const PROCESSES: Group = Group("processes");
const MEMORY: Group = Group("memory");
const STRINGS: Group = Group("string instructions");
const CURVE: Group = Group(CHASE);
const FLOAT: Group = Group("floating point");
const SMC: Group = Group("self-modifying code");
const PROGRAMS: Group = Group("programs");
const REAL: Group = Group(REAL_PROGRAMS);
const JOBS: Group = Group(MACRO);

/// All benchmarks, in the program's order.
pub const BENCHMARKS: &[Benchmark] = &[
    USER.benchmark("sum", "addition", "64-bit loop in registers"),
    USER.benchmark("callret", "call", "direct call and return"),
    USER.benchmark("fnptr", "call", "calls through function pointers, four targets"),
    USER.benchmark("switch", "instruction", "interpreter of a stack machine, a jump table"),
    USER.benchmark("divide", "division", "64-bit divisions"),
    USER.benchmark("branchy", "element", "data-dependent branches that cannot be predicted"),
    KERNEL.benchmark("getppid", "call", "system call that does nothing"),
    KERNEL.benchmark("pipe-rw", "byte", "a byte into a pipe and out of it, one process"),
    KERNEL.benchmark("pgfault", "page", "mmap of 64 pages, touch each, munmap"),
    KERNEL.benchmark("mprotect", "toggle", "a page read-only, writable again, written"),
    KERNEL.benchmark("divzero", "signal", "divide by zero to a signal handler"),
    PROCESSES.benchmark("forkwait", "process", "fork, exit, wait"),
    PROCESSES.benchmark("vforkexec", "process", "vfork, execve of a static program, exit, wait"),
    PROCESSES.benchmark("ctxswitch", "switch", "two processes and two pipes on one CPU"),
    PROCESSES.benchmark("shell", "command", "pipe, fork, execve, 20 writes, counted by the parent, wait"),
    PROCESSES.benchmark("files", "file", "create, write 3000 bytes, read, remove, in memory"),
    MEMORY.benchmark("memsweep", "page", "a word of every page of 32 MiB"),
    MEMORY.chase("chase-64k", 64 << 10, PageSize::Small, "dependent loads over 64 KiB"),
    MEMORY.chase("chase-4m", 4 << 20, PageSize::Small, "dependent loads over 4 MiB"),
    MEMORY.chase("chase-256m", 256 << 20, PageSize::Small, "dependent loads over 256 MiB").slow(),
    MEMORY.benchmark("memcpy", "byte", "64 KiB by SSE2"),
    STRINGS.benchmark("rep-movsb", "byte", "4 KiB by one instruction"),
    STRINGS.benchmark("rep-movsb-short", "byte", "24 bytes by one instruction"),
    STRINGS.benchmark("rep-stosb", "byte", "4 KiB by one instruction"),
    STRINGS.benchmark("repne-scasb", "byte", "4 KiB by one instruction"),
    CURVE.chase("chase-4k", 4 << 10, PageSize::Small, "dependent loads over 4 KiB"),
    CURVE.chase("chase-16k", 16 << 10, PageSize::Small, "dependent loads over 16 KiB").slow(),
    CURVE.chase("chase-256k", 256 << 10, PageSize::Small, "dependent loads over 256 KiB"),
    CURVE.chase("chase-1m", 1 << 20, PageSize::Small, "dependent loads over 1 MiB"),
    CURVE.chase("chase-16m", 16 << 20, PageSize::Small, "dependent loads over 16 MiB"),
    CURVE.chase("chase-64m", 64 << 20, PageSize::Small, "dependent loads over 64 MiB").slow(),
    CURVE.chase("huge-4k", 4 << 10, PageSize::Huge, "dependent loads over 4 KiB in 2 MiB pages").slow(),
    CURVE.chase("huge-16k", 16 << 10, PageSize::Huge, "dependent loads over 16 KiB in 2 MiB pages").slow(),
    CURVE.chase("huge-64k", 64 << 10, PageSize::Huge, "dependent loads over 64 KiB in 2 MiB pages"),
    CURVE.chase("huge-256k", 256 << 10, PageSize::Huge, "dependent loads over 256 KiB in 2 MiB pages").slow(),
    CURVE.chase("huge-1m", 1 << 20, PageSize::Huge, "dependent loads over 1 MiB in 2 MiB pages"),
    CURVE.chase("huge-4m", 4 << 20, PageSize::Huge, "dependent loads over 4 MiB in 2 MiB pages"),
    CURVE.chase("huge-16m", 16 << 20, PageSize::Huge, "dependent loads over 16 MiB in 2 MiB pages"),
    CURVE.chase("huge-64m", 64 << 20, PageSize::Huge, "dependent loads over 64 MiB in 2 MiB pages").slow(),
    CURVE.chase("huge-256m", 256 << 20, PageSize::Huge, "dependent loads over 256 MiB in 2 MiB pages").slow(),
    FLOAT.benchmark("matmul-sse2", "multiply-add", "double matrices of 48 × 48"),
    FLOAT.benchmark("matmul-avx2", "multiply-add", "the same with AVX2 and FMA"),
    FLOAT.benchmark("nbody-sse2", "pair", "five bodies, double"),
    FLOAT.benchmark("nbody-x87", "pair", "the same with x87"),
    SMC.benchmark("smc-patch", "call", "an immediate patched, the code called"),
    SMC.benchmark("smc-data", "call", "data written beside code in its page, the code called"),
    SMC.benchmark("smc-emit", "function", "64 functions written, each called ten times"),
    PROGRAMS.benchmark("sha256", "byte", "SHA-256"),
    PROGRAMS.benchmark("lz", "byte", "LZ77 compression of text"),
    PROGRAMS.benchmark("unlz", "byte", "its decompression"),
    PROGRAMS.benchmark("huffman", "byte", "Huffman coding of text"),
    PROGRAMS.benchmark("qsort", "word", "quicksort of 2048 words"),
    PROGRAMS.benchmark("hashtable", "access", "open addressing, insertions and searches"),
    PROGRAMS.benchmark("compile", "expression", "expressions read, folded, turned into stack code"),
    PROGRAMS.benchmark("search", "byte", "a pattern in text, byte by byte"),
    REAL.benchmark("bin-true", "process", "a shell that runs /bin/true again and again"),
    REAL.benchmark("sh-loop", "turn", "a shell's loop: arithmetic, case, parameters, a function"),
    REAL.benchmark("sh-files", "file", "a shell makes and reads 1000 files; mkdir, rm -r"),
    REAL.benchmark("find-grep", "file", "find, and grep -r, over a tree of 3200 files"),
    REAL.benchmark("sort", "line", "sort of 100,000 lines"),
    REAL.benchmark("gzip", "byte", "gzip of 1 MiB of text"),
    REAL.benchmark("gunzip", "byte", "gzip -d of 4 MiB of text"),
    REAL.benchmark("sha256sum", "byte", "sha256sum of 12 MiB"),
    REAL.benchmark("cc1-o0", "copy", "gcc's cc1 -O0 of four copies of 190 lines of C"),
    REAL.benchmark("cc1-o2", "copy", "gcc's cc1 -O2 of two copies"),
    REAL.benchmark("as", "copy", "as of forty copies of what cc1 makes of them"),
    REAL.benchmark(
        "exec-pie",
        "process",
        "fork and execve of ls, dynamically linked and PIE; not in the group's mean",
    ),
    JOBS.benchmark("make", "file", "make of six C files: cc1 -O1, as, ld").slow(),
    JOBS.benchmark("bzip2", "byte", "bzip2 of 1 MiB of text").slow(),
    JOBS.benchmark("xz", "byte", "xz of 512 KiB of text").slow(),
    JOBS.benchmark("perl", "byte", "perl: words of 1 MiB of text counted, sorted, changed").slow(),
    JOBS.benchmark("sqlite", "row", "sqlite3: 30,000 rows, an index, updates, joins, in memory").slow(),
    JOBS.benchmark(
        "draw",
        "pixel",
        "a picture of 640 × 480 pixels in memory: gradient, discs, lines, a copy",
    )
    .slow(),
    JOBS.benchmark("web-process", "request", "wrk against nginx with four processes, files of 8 KiB").slow(),
    JOBS.benchmark("web-thread", "request", "wrk against nginx with one process and four threads").slow(),
    nano("nano-syscall", Native::ByItsKernel, "SYSCALL and SYSRET; natively getppid"),
    nano("nano-in", Native::Absent, "IN from a port of the serial line"),
    nano("nano-cr8wr", Native::Absent, "MOV to CR8"),
    nano("nano-callret", Native::Same, "CALL and RET"),
    nano("nano-pgfault", Native::ByItsKernel, "page fault and back; natively a signal"),
    nano("nano-divzero", Native::ByItsKernel, "divide error and back; natively a signal"),
    nano("nano-ptemod", Native::Absent, "page-table entry changed, INVLPG, page read"),
    nano("nano-cpuid", Native::Same, "CPUID"),
    nano("nano-rdtsc", Native::Same, "RDTSC"),
    nano("nano-vmcall", Native::Absent, "VMCALL, or VMMCALL on AMD"),
    nano("nano-ipi", Native::Absent, "interrupt to another CPU that runs, until it has counted it"),
    nano(
        "nano-hlt-wake",
        Native::Absent,
        "interrupt to a CPU that is halted, until it answers: two that wake each other",
    ),
    nano("nano-mmio", Native::Absent, "load from a register of the local APIC"),
    nano("nano-invlpg", Native::Absent, "INVLPG"),
    nano("nano-cr3wr", Native::Absent, "MOV to CR3"),
    nano("nano-wrmsr", Native::Absent, "WRMSR to LSTAR"),
];

/// What `--list` prints.
#[must_use]
pub fn list() -> String {
    let mut text = String::from("Benchmarks (one operation in parentheses):\n");
    let mut last_group = "";
    for Benchmark { name, operation, about, group, is_slow, .. } in BENCHMARKS {
        if *group != last_group {
            // Writing to a string cannot fail.
            let _ = writeln!(text, " {group}:");
            last_group = group;
        }
        let slow = if *is_slow { "; not under --quick" } else { "" };
        let _ = writeln!(text, "  {name:16} {about} ({operation}){slow}");
    }
    text.push_str("Modes:\n");
    for mode in mode::MODES {
        let _ = writeln!(text, "  {:16} {}", mode.name, mode.about);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn list_names_every_benchmark_and_mode() {
        let text = list();
        assert!(BENCHMARKS.iter().all(|benchmark| text.contains(benchmark.name)));
        assert!(mode::MODES.iter().all(|mode| text.contains(mode.name)));
    }

    #[test]
    fn groups_stand_together_and_the_list_names_each_once() {
        let mut groups: Vec<&str> = BENCHMARKS.iter().map(|benchmark| benchmark.group).collect();
        groups.dedup();
        let text = list();
        for group in &groups {
            assert_eq!(groups.iter().filter(|other| *other == group).count(), 1, "{group}");
            assert_eq!(text.lines().filter(|line| *line == format!(" {group}:")).count(), 1, "{group}");
        }
        let real = text.split(" real programs:\n").nth(1).unwrap();
        assert!(real.trim_start().starts_with("bin-true") && real.contains("exec-pie"), "{text}");
    }

    #[test]
    fn mean_of_real_programs_leaves_bare_execution_out() {
        let real = BENCHMARKS.iter().filter(|benchmark| benchmark.is_real()).count();
        let counted = BENCHMARKS.iter().filter(|benchmark| benchmark.is_in_real_mean()).count();
        assert_eq!((real, counted), (12, 11));
    }
}
