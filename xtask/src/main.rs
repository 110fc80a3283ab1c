//! The project's own tasks: `cargo xtask test` and its kin.
//!
//! It depends on none of the project's crates, so that it is built in seconds; what needs them (lockstep, soak, the
//! machine tests) is a program of its own that is built and started from here.

mod deny;
#[cfg(test)]
mod docs;
mod ladder;
mod long;
mod steps;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Tests, checks and tools of the project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// All test ladders but fuzzing and the long ones (see docs/testing.md)
    Test,
    /// The long suite: generic and 686-pae kernels, memtest86+'s full pass, a long differential run
    Long,
    /// Builds a Debian system on a disk (once), boots it and works in it: login, apt, ssh, gcc, iperf3, stress-ng
    Distribution,
    /// Measures disks with fio in that system, beside QEMU's on the same images
    Disks,
    /// Formatting, clippy with warnings denied, documentation
    Lint,
    /// Licences, duplicate and foreign-source dependencies, by cargo-deny where it is installed
    Deny,
    /// Runs stress-ng --verify in a Debian guest for as long as one likes
    #[command(disable_help_flag = true)]
    Soak {
        /// Options of the tool; --help shows them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Kills a process that writes to a virtio disk, a thousand times, and looks for what it had flushed
    #[command(disable_help_flag = true)]
    Crash {
        /// Options of the tool; --help shows them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Measures networks with iperf3: cards, switches, networks, and QEMU beside them in the same run
    #[command(disable_help_flag = true)]
    Net {
        /// Options of the tool; --help shows them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
    /// Runs a guest on QEMU and on the interpreter, instruction by instruction, up to the first difference
    #[command(disable_help_flag = true)]
    Lockstep {
        /// Options of the tool; --help shows them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Test => ladder::run(),
        Task::Long => long::run(),
        Task::Distribution => ladder::distribution(),
        Task::Disks => ladder::disks(),
        Task::Lint => steps::lint(),
        Task::Deny => deny::run(),
        Task::Soak { options } => steps::tool(&["trellis", "soak"], &options),
        Task::Crash { options } => steps::tool(&["crash"], &options),
        Task::Net { options } => steps::tool(&["trellis", "net"], &options),
        Task::Lockstep { options } => steps::tool(&["lockstep"], &options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
