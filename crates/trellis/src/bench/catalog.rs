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
    /// Takes long to prepare: not under `--quick`.
    pub is_slow: bool,
}

const fn benchmark(name: &'static str, operation: &'static str, about: &'static str) -> Benchmark {
    Benchmark { name, operation, about, is_slow: false }
}

/// All benchmarks, in the program's order.
pub const BENCHMARKS: &[Benchmark] = &[
    benchmark("sum", "addition", "64-bit loop in registers"),
    benchmark("callret", "call", "direct call and return"),
    benchmark("fnptr", "call", "calls through function pointers, four targets"),
    benchmark("switch", "instruction", "interpreter of a stack machine, a jump table"),
    benchmark("divide", "division", "64-bit divisions"),
    benchmark("branchy", "element", "data-dependent branches that cannot be predicted"),
    benchmark("getppid", "call", "system call that does nothing"),
    benchmark("pipe-rw", "byte", "a byte into a pipe and out of it, one process"),
    benchmark("pgfault", "page", "mmap of 64 pages, touch each, munmap"),
    benchmark("mprotect", "toggle", "a page read-only, writable again, written"),
    benchmark("divzero", "signal", "divide by zero to a signal handler"),
    benchmark("forkwait", "process", "fork, exit, wait"),
    benchmark("vforkexec", "process", "vfork, execve of a static program, exit, wait"),
    benchmark("ctxswitch", "switch", "two processes and two pipes on one CPU"),
    benchmark("shell", "command", "pipe, fork, execve, 20 writes, counted by the parent, wait"),
    benchmark("files", "file", "create, write 3000 bytes, read, remove, in memory"),
    benchmark("memsweep", "page", "a word of every page of 32 MiB"),
    benchmark("chase-64k", "load", "dependent loads over 64 KiB"),
    benchmark("chase-4m", "load", "dependent loads over 4 MiB"),
    Benchmark { is_slow: true, ..benchmark("chase-256m", "load", "dependent loads over 256 MiB") },
    benchmark("memcpy", "byte", "64 KiB by SSE2"),
    benchmark("rep-movsb", "byte", "4 KiB by one instruction"),
    benchmark("rep-movsb-short", "byte", "24 bytes by one instruction"),
    benchmark("rep-stosb", "byte", "4 KiB by one instruction"),
    benchmark("repne-scasb", "byte", "4 KiB by one instruction"),
    benchmark("matmul-sse2", "multiply-add", "double matrices of 48 × 48"),
    benchmark("matmul-avx2", "multiply-add", "the same with AVX2 and FMA"),
    benchmark("nbody-sse2", "pair", "five bodies, double"),
    benchmark("nbody-x87", "pair", "the same with x87"),
    benchmark("smc-patch", "call", "an immediate patched, the code called"),
    benchmark("smc-data", "call", "data written beside code in its page, the code called"),
    benchmark("smc-emit", "function", "64 functions written, each called ten times"),
    benchmark("sha256", "byte", "SHA-256"),
    benchmark("lz", "byte", "LZ77 compression of text"),
    benchmark("unlz", "byte", "its decompression"),
    benchmark("huffman", "byte", "Huffman coding of text"),
    benchmark("qsort", "word", "quicksort of 2048 words"),
    benchmark("hashtable", "access", "open addressing, insertions and searches"),
    benchmark("compile", "expression", "expressions read, folded, turned into stack code"),
    benchmark("search", "byte", "a pattern in text, byte by byte"),
];

/// What `--list` prints.
#[must_use]
pub fn list() -> String {
    let mut text = String::from("Benchmarks (one operation in parentheses):\n");
    for Benchmark { name, operation, about, is_slow } in BENCHMARKS {
        let slow = if *is_slow { "; not under --quick" } else { "" };
        // Writing to a string cannot fail.
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
}
