//! `trellis`: runs unmodified x86 operating systems in an ordinary process. See the library for everything.

use std::process::ExitCode;

fn main() -> ExitCode {
    trellis::run(std::env::args_os())
}
