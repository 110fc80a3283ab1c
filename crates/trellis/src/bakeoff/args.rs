//! The options of `trellis bakeoff`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueHint};

use crate::bench::args::parse_mode;
use crate::bench::catalog;
use crate::bench::mode::{self, Mode};
use crate::options::parse_timeout;

/// The report, if no place is named.
const DEFAULT_REPORT: &str = "trellis-bakeoff.html";
/// `--runs` of a command, and of a machine.
const RUNS: u32 = 3;
const MACHINE_RUNS: u32 = 1;
/// Largest `--runs`.
const MAX_RUNS: i64 = 1000;

/// `trellis bakeoff …`.
#[derive(Args, Clone, Debug)]
pub struct BakeoffArgs {
    /// What to compare: native, interp, bt, kvm, tcg, qemu-kvm
    #[arg(long, value_name = "MODE,…", value_delimiter = ',', value_parser = parse_mode, default_value = mode::DEFAULT)]
    pub modes: Vec<&'static Mode>,
    /// Runs in each mode, of a command one after the other in one guest [default: 3; of a machine 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MAX_RUNS))]
    pub runs: Option<u32>,
    /// Give a run, or a boot, up after so many seconds
    #[arg(long, value_name = "SECONDS", default_value = "120", value_parser = parse_timeout, allow_hyphen_values = true)]
    pub timeout: f64,
    /// A file or directory of this host that the command needs; at the same place in the guest
    #[arg(long, value_name = "PATH", value_hint = ValueHint::AnyPath)]
    pub with: Vec<PathBuf>,
    /// A file that the command reads as its standard input
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub input: Option<PathBuf>,
    /// Memory of the guests
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_memory)]
    pub memory: String,
    /// CPUs of the guests; with one, the native run is kept on one too
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u32).range(1..=16))]
    pub cpus: u32,
    /// Linux kernel of the guests [default: the image debian]; without a command, of your own machine
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk of your own machine
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "command")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line of your own machine
    #[arg(long, value_name = "TEXT", conflicts_with = "command", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Disk of your own machine, a raw image; it is opened for reading only, each mode sees it as it is
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "command")]
    pub disk: Vec<PathBuf>,
    /// The work of your own machine is done when this appears on its serial line [default: when it powers off]
    #[arg(long, value_name = "TEXT", conflicts_with = "command")]
    pub until: Option<String>,
    /// Names of addresses: System.map, /proc/kallsyms, or an ELF file [default: those of the kernel and of the command]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub symbols: Vec<PathBuf>,
    /// Print only JSON on standard output
    #[arg(long)]
    pub json: bool,
    /// Where to write the report, a page for a browser [default: trellis-bakeoff.html; none with --json]
    #[arg(long, value_name = "FILE.html", value_hint = ValueHint::FilePath)]
    pub report: Option<PathBuf>,
    /// Write no report
    #[arg(long, conflicts_with = "report")]
    pub no_report: bool,
    /// Instead of a command: one of `trellis bench`'s own benchmarks, so many iterations of it
    #[arg(long, value_name = "NAME:N", value_parser = parse_bench, conflicts_with = "command")]
    pub bench: Option<(String, u64)>,
    /// A program of this host and its arguments
    #[arg(last = true, value_name = "CMD", value_hint = ValueHint::CommandWithArguments)]
    pub command: Vec<OsString>,
}

/// A benchmark that needs no other program, and a number.
fn parse_bench(text: &str) -> Result<(String, u64), String> {
    let (name, count) = text.split_once(':').ok_or("write NAME:N, as in forkwait:2000")?;
    let fits = |benchmark: &&catalog::Benchmark| {
        !benchmark.is_real() && !benchmark.is_macro() && !benchmark.is_nano()
    };
    if !catalog::BENCHMARKS.iter().filter(fits).any(|benchmark| benchmark.name == name) {
        let names: Vec<&str> =
            catalog::BENCHMARKS.iter().filter(fits).map(|benchmark| benchmark.name).collect();
        return Err(format!(
            "there is no benchmark '{name}' that runs alone; there are {}",
            names.join(", ")
        ));
    }
    let count = count.parse().ok().filter(|count| *count > 0);
    count.map(|count| (name.to_owned(), count)).ok_or_else(|| format!("'{text}' has no number of iterations"))
}

/// A size that `--memory` of a machine takes.
fn parse_memory(text: &str) -> Result<String, String> {
    crate::options::parse_memory(text).map(|_| text.to_owned())
}

impl BakeoffArgs {
    /// Where the report is to be written, and whether that place was asked for.
    #[must_use]
    pub fn report_file(&self) -> Option<(PathBuf, bool)> {
        match &self.report {
            Some(file) => Some((file.clone(), true)),
            None if self.no_report || self.json => None,
            None => Some((PathBuf::from(DEFAULT_REPORT), false)),
        }
    }

    /// Whether it is a machine of the user's own that runs.
    #[must_use]
    pub fn is_machine(&self) -> bool {
        self.command.is_empty() && self.bench.is_none()
    }

    /// How many runs.
    #[must_use]
    pub fn runs(&self) -> u32 {
        self.runs.unwrap_or(if self.is_machine() { MACHINE_RUNS } else { RUNS })
    }

    /// The modes, each once.
    #[must_use]
    pub fn modes(&self) -> Vec<&'static Mode> {
        let mut modes: Vec<&'static Mode> = Vec::new();
        for mode in &self.modes {
            if !modes.iter().any(|known| known.name == mode.name) {
                modes.push(mode);
            }
        }
        modes
    }
}
