//! The benchmarks by name. What they do is written in `guest/bench/program`.

use std::fmt::Write as _;

use super::mode;

/// A benchmark.
#[derive(Debug)]
pub struct Benchmark {
    /// Its name, on the command line and in the program.
    pub name: &'static str,
    /// What one operation is: values are nanoseconds per operation.
    pub operation: &'static str,
    /// What it does, in a line.
    pub about: &'static str,
    /// The group it belongs to: [`REAL_PROGRAMS`] or one of the others.
    pub group: &'static str,
    /// Takes long to prepare: not under `--quick`.
    pub is_slow: bool,
}

/// The group of the programs that people run, which have a root and a mean of their own.
pub const REAL_PROGRAMS: &str = "real programs";
/// The one of the group that is not in its mean: it is the cost of starting a program alone, over and over.
const OUT_OF_THE_MEAN: &str = "exec-pie";

impl Benchmark {
    /// Whether it runs real programs out of packages.
    #[must_use]
    pub fn is_real(&self) -> bool {
        self.group == REAL_PROGRAMS
    }

    /// Whether it counts in the mean of the real programs.
    #[must_use]
    pub fn is_in_real_mean(&self) -> bool {
        self.is_real() && self.name != OUT_OF_THE_MEAN
    }
}

/// A group of benchmarks under construction.
struct Group(&'static str);

impl Group {
    const fn benchmark(&self, name: &'static str, operation: &'static str, about: &'static str) -> Benchmark {
        Benchmark { name, operation, about, group: self.0, is_slow: false }
    }
}

const USER: Group = Group("user code");
const KERNEL: Group = Group("into the kernel");
const PROCESSES: Group = Group("processes");
const MEMORY: Group = Group("memory");
const STRINGS: Group = Group("string instructions");
const FLOAT: Group = Group("floating point");
const SMC: Group = Group("self-modifying code");
const PROGRAMS: Group = Group("programs");
const REAL: Group = Group(REAL_PROGRAMS);

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
    MEMORY.benchmark("chase-64k", "load", "dependent loads over 64 KiB"),
    MEMORY.benchmark("chase-4m", "load", "dependent loads over 4 MiB"),
    Benchmark { is_slow: true, ..MEMORY.benchmark("chase-256m", "load", "dependent loads over 256 MiB") },
    MEMORY.benchmark("memcpy", "byte", "64 KiB by SSE2"),
    STRINGS.benchmark("rep-movsb", "byte", "4 KiB by one instruction"),
    STRINGS.benchmark("rep-movsb-short", "byte", "24 bytes by one instruction"),
    STRINGS.benchmark("rep-stosb", "byte", "4 KiB by one instruction"),
    STRINGS.benchmark("repne-scasb", "byte", "4 KiB by one instruction"),
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
];

/// What `--list` prints.
#[must_use]
pub fn list() -> String {
    let mut text = String::from("Benchmarks (one operation in parentheses):\n");
    let mut last_group = "";
    for Benchmark { name, operation, about, group, is_slow } in BENCHMARKS {
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
