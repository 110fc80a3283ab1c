//! The benchmark programs as bytes: one static Linux ELF64 that runs on the host and as process 1 of a guest.
//!
//! Its source is `guest/bench/program`; `docs/bench.md` says what each benchmark does. The program reads commands, a line
//! each, on standard input and answers with lines and marks, on standard error where it is an ordinary process and on the
//! debug console (port 0xe9) where it is process 1:
//!
//! | command | answer |
//! |---|---|
//! | (start) | `READY` |
//! | `list` | `NAME name` for each benchmark, `END` |
//! | `run NAME N [SIZE]` | setup, [`MARK_START`], N iterations, [`MARK_END`], `DONE NAME ops NANOSECONDS check`; or `SKIP NAME reason`, `ERR reason` |
//! | `quit` | exits, or powers the machine off |
//!
//! `ops` is how many of the benchmark's operations the iterations were, the nanoseconds are by the program's own clock (`-`
//! if it has none: the bare-metal guest of `guest/src/nano.rs` speaks the same protocol), and
//! `check` is a digest of what was computed, the same wherever the program runs right. SIZE, a percentage, says how much
//! real programs are given to do; the others do not look at it.
//!
//! The name `command` is no benchmark: it stands for the command that lies in the root (`guest/bench/program/command.rs`), and before its `DONE`
//! comes a line `CPU nanoseconds`.
//!
//! Real programs are found in the root of process 1. An ordinary process that is started as `PROGRAM root DIRECTORY` makes
//! that directory its root first; a line `NOTE …` before `READY` says if it cannot, and what it does instead.

/// The program.
pub static PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/bench.elf"));
/// The byte that stands directly before the work.
pub const MARK_START: u8 = 1;
/// The byte that stands directly after the work.
pub const MARK_END: u8 = 2;

#[cfg(test)]
mod tests {
    use super::PROGRAM;

    #[test]
    fn program_is_a_static_elf64() {
        assert_eq!(&PROGRAM[..6], b"\x7fELF\x02\x01");
        assert_eq!(PROGRAM[16], 2, "ET_EXEC");
        let headers = usize::from(PROGRAM[56]);
        let interpreter = (0..headers).any(|n| PROGRAM[64 + 56 * n] == 3); // PT_INTERP
        assert!(!interpreter);
    }
}
