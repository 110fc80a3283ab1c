//! The options of `trellis bench`, and the plan they make.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, ValueHint};

use super::catalog::{self, Benchmark};
use super::mode::{self, Mode};
use crate::options::parse_timeout;

/// How long one measurement is to last, and under `--quick`.
const TARGET: Duration = Duration::from_millis(300);
const QUICK_TARGET: Duration = Duration::from_millis(60);
/// How much real programs are given to do, in percent, and under `--quick`.
const SIZE_PERCENT: u32 = 100;
const QUICK_SIZE_PERCENT: u32 = 25;
/// The report, if no place is named.
const DEFAULT_REPORT: &str = "trellis-bench.html";
/// `--runs`, and under `--quick`.
const RUNS: u32 = 5;
const QUICK_RUNS: u32 = 3;
/// Under `--quick` a benchmark is not run again in a mode that has been at it for so long.
const QUICK_PATIENCE: Duration = Duration::from_millis(800);
/// Largest `--runs`.
const MAX_RUNS: i64 = 1000;

/// `trellis bench …`.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// Only these benchmarks, or all that begin so ('nano-*'); --list shows them [default: all]
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = parse_benchmark)]
    pub only: Vec<Wanted>,
    /// What to compare: native, interp, bt, kvm, tcg, qemu-kvm
    #[arg(long, value_name = "MODE,…", value_delimiter = ',', value_parser = parse_mode,
          default_value = mode::DEFAULT)]
    pub modes: Vec<&'static Mode>,
    /// Measurements of each benchmark in each mode [default: 5; with --quick 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MAX_RUNS))]
    pub runs: Option<u32>,
    /// Short measurements, fewer of what takes long, and not every benchmark
    #[arg(long)]
    pub quick: bool,
    /// Print only JSON on standard output
    #[arg(long)]
    pub json: bool,
    /// Write the result to this file, as JSON
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub save: Option<PathBuf>,
    /// Compare with a result that was saved
    #[arg(long, value_name = "OLD.json", value_hint = ValueHint::FilePath)]
    pub compare: Option<PathBuf>,
    /// Where to write the report, a page for a browser [default: beside --save's file, else trellis-bench.html; none with --json]
    #[arg(long, value_name = "FILE.html", value_hint = ValueHint::FilePath)]
    pub report: Option<PathBuf>,
    /// Write no report
    #[arg(long, action = ArgAction::SetTrue, conflicts_with = "report")]
    pub no_report: bool,
    /// Give a measurement, or a boot, up after so many seconds
    #[arg(long, value_name = "SECONDS", default_value = "300", value_parser = parse_timeout, allow_hyphen_values = true)]
    pub timeout: f64,
    /// Linux kernel of the guests [default: the image debian]
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub kernel: Option<PathBuf>,
    /// Predict from counted events what other ways of virtualization would make of it (needs native; runs each once more)
    #[arg(long)]
    pub predict: bool,
    /// Show the benchmarks and modes
    #[arg(long)]
    pub list: bool,
}

/// What `--only` names: the benchmarks whose name is this, or begins so.
#[derive(Clone, Debug)]
pub struct Wanted {
    name: String,
    is_prefix: bool,
}

impl Wanted {
    fn includes(&self, benchmark: &Benchmark) -> bool {
        if self.is_prefix { benchmark.name.starts_with(&self.name) } else { benchmark.name == self.name }
    }
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The benchmarks, in the catalogue's order.
    pub benchmarks: Vec<&'static Benchmark>,
    /// The modes, in the order of the command line.
    pub modes: Vec<&'static Mode>,
    /// Measurements of each.
    pub runs: u32,
    /// How long a measurement is to last.
    pub target: Duration,
    /// A benchmark whose runs in a mode have taken longer than this together is not run there again.
    pub patience: Duration,
    /// After which it is given up.
    pub timeout: Duration,
    /// Whether `--quick` was given.
    pub quick: bool,
    /// How much real programs are given to do, in percent.
    pub size_percent: u32,
    /// What was asked for and is left out, with the reason; see [`Plan::leave_out`].
    pub left_out: Vec<String>,
}

impl Plan {
    /// Whether benchmarks of a group are among them.
    #[must_use]
    pub fn has(&self, group: &str) -> bool {
        self.benchmarks.iter().any(|benchmark| benchmark.group == group)
    }

    /// Whether there is nothing else.
    #[must_use]
    pub fn is_all_real(&self) -> bool {
        self.benchmarks.iter().all(|benchmark| benchmark.is_real())
    }

    /// Measurements and calibrations.
    #[must_use]
    pub fn steps(&self) -> u64 {
        (self.benchmarks.len() * self.modes.len()) as u64 * u64::from(self.runs + 1)
    }

    /// Whether a guest with an operating system is among what is measured.
    #[must_use]
    pub fn needs_kernel(&self) -> bool {
        let in_linux = self.benchmarks.iter().any(|benchmark| !benchmark.is_nano());
        in_linux && self.modes.iter().any(|mode| mode.needs_kernel())
    }

    /// Leaves a group out, for its programs cannot be had. Returns the line that says so.
    pub fn leave_out(&mut self, group: &str, reason: &str) -> &str {
        self.benchmarks.retain(|benchmark| benchmark.group != group);
        self.left_out.push(format!("{group} are left out: {reason}"));
        self.left_out.last().map_or("", String::as_str)
    }
}

impl BenchArgs {
    /// Where the report is to be written, and whether that place was asked for.
    #[must_use]
    pub fn report_file(&self) -> Option<(PathBuf, bool)> {
        match (&self.report, &self.save) {
            (Some(file), _) => Some((file.clone(), true)),
            _ if self.no_report || self.json => None,
            (None, Some(save)) => Some((save.with_extension("html"), false)),
            (None, None) => Some((PathBuf::from(DEFAULT_REPORT), false)),
        }
    }

    /// The plan, without what was named twice.
    #[must_use]
    pub fn plan(&self) -> Plan {
        let wanted = |benchmark: &&'static Benchmark| match self.only.as_slice() {
            [] => !(self.quick && benchmark.is_slow),
            only => only.iter().any(|wanted| wanted.includes(benchmark)),
        };
        let mut modes: Vec<&'static Mode> = Vec::new();
        for mode in &self.modes {
            if !modes.iter().any(|known| known.name == mode.name) {
                modes.push(mode);
            }
        }
        Plan {
            benchmarks: catalog::BENCHMARKS.iter().filter(wanted).collect(),
            modes,
            runs: self.runs.unwrap_or(if self.quick { QUICK_RUNS } else { RUNS }),
            patience: if self.quick { QUICK_PATIENCE } else { Duration::MAX },
            target: if self.quick { QUICK_TARGET } else { TARGET },
            timeout: Duration::from_secs_f64(self.timeout),
            quick: self.quick,
            size_percent: if self.quick { QUICK_SIZE_PERCENT } else { SIZE_PERCENT },
            left_out: Vec::new(),
        }
    }
}

/// Benchmarks by name.
fn parse_benchmark(text: &str) -> Result<Wanted, String> {
    let names = || catalog::BENCHMARKS.iter().map(|benchmark| benchmark.name);
    let (name, is_prefix) = text.strip_suffix('*').map_or((text, false), |prefix| (prefix, true));
    let wanted = Wanted { name: name.to_owned(), is_prefix };
    let any = catalog::BENCHMARKS.iter().any(|benchmark| wanted.includes(benchmark));
    any.then_some(wanted).ok_or_else(|| unknown("benchmark", text, names().collect()))
}

/// A mode by its name.
pub(crate) fn parse_mode(name: &str) -> Result<&'static Mode, String> {
    let names = || mode::MODES.iter().map(|mode| mode.name);
    mode::MODES.iter().find(|mode| mode.name == name).ok_or_else(|| unknown("mode", name, names().collect()))
}

fn unknown(what: &str, name: &str, known: Vec<&str>) -> String {
    format!("there is no {what} '{name}'; there are {}", known.join(", "))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        bench: BenchArgs,
    }

    fn parse(arguments: &[&str]) -> Result<BenchArgs, String> {
        let all = std::iter::once("bench").chain(arguments.iter().copied());
        Command::try_parse_from(all).map(|command| command.bench).map_err(|error| error.to_string())
    }

    #[test]
    fn plan_keeps_the_catalogues_order_and_drops_doubles() {
        let plan = parse(&["--only", "getppid,sum", "--modes", "tcg,native,tcg"]).unwrap().plan();
        assert_eq!(plan.benchmarks.iter().map(|b| b.name).collect::<Vec<_>>(), ["sum", "getppid"]);
        assert_eq!(plan.modes.iter().map(|m| m.name).collect::<Vec<_>>(), ["tcg", "native"]);
        assert_eq!((plan.runs, plan.target), (5, TARGET));
    }

    #[test]
    fn quick_leaves_out_what_is_slow_unless_named() {
        assert!(!parse(&["--quick"]).unwrap().plan().benchmarks.iter().any(|b| b.is_slow));
        assert_eq!(parse(&["--quick", "--only", "chase-256m"]).unwrap().plan().benchmarks.len(), 1);
    }

    #[test]
    fn star_is_all_that_begin_so() {
        let plan = parse(&["--only", "nano-*,sum"]).unwrap().plan();
        assert_eq!(plan.benchmarks.len(), 17);
        assert!(plan.needs_kernel() && !parse(&["--only", "nano-*"]).unwrap().plan().needs_kernel());
    }

    #[test]
    fn report_stands_where_it_was_asked_for_or_beside_the_result() {
        let file = |arguments: &[&str]| parse(arguments).unwrap().report_file();
        assert_eq!(file(&[]), Some(("trellis-bench.html".into(), false)));
        assert_eq!(file(&["--save", "a/old.json"]), Some(("a/old.html".into(), false)));
        assert_eq!(file(&["--report", "b.html", "--json"]), Some(("b.html".into(), true)));
        assert_eq!(file(&["--json"]), None);
        assert_eq!(file(&["--no-report"]), None);
    }

    #[test]
    fn real_programs_can_be_left_out() {
        let mut plan = parse(&["--only", "sum,gzip", "--quick"]).unwrap().plan();
        assert!(plan.has(catalog::REAL_PROGRAMS) && !plan.is_all_real() && plan.size_percent < 100);
        let line = plan.leave_out(catalog::REAL_PROGRAMS, "no network").to_owned();
        assert_eq!(line, "real programs are left out: no network");
        assert_eq!(plan.left_out, [line]);
        assert_eq!(plan.benchmarks.iter().map(|b| b.name).collect::<Vec<_>>(), ["sum"]);
    }

    #[test]
    fn unknown_names_list_what_there_is() {
        assert!(parse(&["--only", "sum,nosuch"]).unwrap_err().contains("getppid"));
        assert!(parse(&["--modes", "vmware"]).unwrap_err().contains("interp"));
        assert!(parse(&["--runs", "0"]).is_err());
        assert!(parse(&["--timeout", "-1"]).is_err());
    }
}
