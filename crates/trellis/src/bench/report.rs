//! The result, in the form of `--json`.

use serde::Serialize;

use super::args::Plan;
use super::catalog::{Benchmark, Native};
use super::compare::Comparison;
use super::guest::{MEMORY, Place};
use super::host::Host;
use super::matrix::{Cell, Measured, ModeResult, PRIVILEGED};
use super::mode::{Mode, REFERENCE};
use super::stats;
use crate::model::table::Predicted;

/// Version of the form; it grows when a reader of the old would misunderstand.
pub const FORMAT: u32 = 1;
/// Guest time may differ from host time by so many percent…
const MAX_DRIFT: f64 = 2.0;
/// …or so many milliseconds, which a busy host may need to wake the reader of the marks.
const WAKE_UP_MS: f64 = 3.0;
/// Unit of what runs in an operating system.
pub const NANOSECONDS: &str = "ns/op";
/// Unit of single operations.
pub const CYCLES: &str = "cycles/op";

/// A whole run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// Version of this form.
    pub format: u32,
    /// Version of the program.
    pub trellis: &'static str,
    /// The host.
    pub host: Host,
    /// How it was measured.
    pub settings: Settings,
    /// The modes.
    pub modes: Vec<ModeRow>,
    /// Benchmark by benchmark, mode by mode.
    pub rows: Vec<Row>,
    /// What a reader must know.
    pub notes: Vec<String>,
    /// What the cost model says of modes that were not measured, if it was asked.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub predictions: Vec<Predicted>,
    /// Beside an older result, if one was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub comparison: Option<Comparison>,
}

/// How it was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Settings {
    /// Runs of each cell.
    pub runs: u32,
    /// Milliseconds that a run was to last.
    pub target_ms: u64,
    /// Whether `--quick` was given.
    pub quick: bool,
    /// Memory of guests.
    pub guest_memory: &'static str,
    /// CPUs of guests.
    pub guest_cpus: u32,
    /// Kernel of guests.
    pub guest_kernel: Option<String>,
}

/// A mode.
#[derive(Clone, Debug, Serialize)]
pub struct ModeRow {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub about: &'static str,
    /// What ran the program.
    pub version: String,
    /// Why it was left out.
    pub skipped: Option<String>,
    /// Seconds from the start of the process to the program's first answer (for guests, through the boot of the kernel).
    pub boot_seconds: Option<f64>,
    /// Geometric mean of the rows' percent of native.
    pub percent_of_native: Option<f64>,
    /// The same of the real programs alone.
    pub real_programs_percent_of_native: Option<f64>,
    /// The largest median deviation of guest time from host time, in percent.
    pub guest_time_deviation_percent: Option<f64>,
}

/// A benchmark in a mode.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The benchmark.
    pub benchmark: &'static str,
    /// Its group.
    pub group: &'static str,
    /// Whether it counts in the mean of the real programs.
    #[serde(skip)]
    pub is_in_real_mean: bool,
    /// Whether it counts in the mean of all.
    #[serde(skip)]
    pub is_in_mean: bool,
    /// The mode.
    pub mode: &'static str,
    /// Median of the runs.
    pub value: Option<f64>,
    /// Its unit.
    pub unit: &'static str,
    /// What one operation is.
    pub operation: &'static str,
    /// Native time by this time.
    pub percent_of_native: Option<f64>,
    /// Largest minus smallest run, in percent of the median.
    pub spread: Option<f64>,
    /// The runs, in order.
    pub samples: Vec<f64>,
    /// Iterations of a run.
    pub iterations: u64,
    /// Median of guest time against host time, in percent.
    pub guest_time_deviation_percent: Option<f64>,
    /// Why there is no value although nothing failed.
    pub skipped: Option<String>,
    /// What failed.
    pub error: Option<String>,
    /// What failed was an answer in time.
    pub timed_out: bool,
}

impl Report {
    /// Puts together what was measured.
    #[must_use]
    pub fn new(plan: &Plan, place: &Place, measured: Measured) -> Self {
        let Measured { mut cells, modes, notes: said } = measured;
        cells.iter_mut().for_each(|row| compare_results(&plan.modes, row));
        let host = Host::now();
        let tables = plan.benchmarks.iter().zip(&cells);
        let rows: Vec<Row> = tables.flat_map(|(b, row)| rows_of(b, &plan.modes, row, host.tsc_hz)).collect();
        let modes: Vec<ModeRow> =
            plan.modes.iter().zip(modes).map(|(mode, result)| mode_row(mode, result, &rows)).collect();
        let allowed = MAX_DRIFT.max(WAKE_UP_MS / (plan.target.as_secs_f64() * 1e3) * 100.0);
        let mut notes = notes(&modes, &rows, allowed);
        notes.extend(place.programs.iter().flat_map(|programs| programs.notes.clone()));
        notes.extend(plan.left_out.iter().cloned().chain(said));
        Self {
            format: FORMAT,
            trellis: env!("CARGO_PKG_VERSION"),
            host,
            settings: Settings {
                runs: plan.runs,
                target_ms: u64::try_from(plan.target.as_millis()).unwrap_or(u64::MAX),
                quick: plan.quick,
                guest_memory: MEMORY,
                guest_cpus: 1,
                guest_kernel: place.guest.as_ref().map(|guest| guest.kernel_name.clone()),
            },
            modes,
            rows,
            notes,
            predictions: Vec::new(),
            comparison: None,
        }
    }

    /// As JSON.
    #[must_use]
    pub fn json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("the report is plain data");
        text.push('\n');
        text
    }

    /// Whether something was measured and nothing failed.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.rows.iter().any(|row| row.value.is_some()) && self.rows.iter().all(|row| row.error.is_none())
    }

    /// The row of a benchmark in a mode.
    #[must_use]
    pub fn row(&self, benchmark: &str, mode: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.benchmark == benchmark && row.mode == mode)
    }
}

/// A mode that computes something else than the first mode that ran is wrong.
fn compare_results(modes: &[&Mode], row: &mut [Cell]) {
    let first = row.iter().zip(modes).find_map(|(cell, mode)| Some((cell.check.clone()?, mode.name)));
    let Some((expected, reference)) = first else { return };
    for cell in row {
        match &cell.check {
            Some(check) if *check != expected && cell.error.is_none() => {
                cell.error = Some(format!("wrong result: {check}, but {expected} in {reference}"));
            }
            _ => {}
        }
    }
}

fn rows_of(benchmark: &'static Benchmark, modes: &[&'static Mode], cells: &[Cell], tsc_hz: f64) -> Vec<Row> {
    let (unit, scale) = if benchmark.is_nano() { (CYCLES, tsc_hz / 1e9) } else { (NANOSECONDS, 1.0) };
    let native = modes.iter().zip(cells).find(|(mode, _)| mode.name == REFERENCE);
    let native = native.and_then(|(_, cell)| cell.value()).filter(|_| benchmark.native == Native::Same);
    let row = |(mode, cell): (&&'static Mode, &Cell)| {
        let value = cell.value();
        Row {
            benchmark: benchmark.name,
            group: benchmark.group,
            is_in_real_mean: benchmark.is_in_real_mean(),
            mode: mode.name,
            is_in_mean: benchmark.is_in_mean(),
            value: value.map(|value| value * scale),
            unit,
            operation: benchmark.operation,
            percent_of_native: native.zip(value).map(|(native, value)| native / value * 100.0),
            spread: value.and_then(|_| stats::spread_percent(&cell.samples)),
            samples: cell.samples.iter().map(|sample| sample * scale).collect(),
            iterations: cell.count,
            guest_time_deviation_percent: stats::median(&cell.deviations),
            skipped: cell.skipped.clone(),
            error: cell.error.clone(),
            timed_out: cell.timed_out,
        }
    };
    modes.iter().zip(cells).map(row).collect()
}

fn mode_row(mode: &'static Mode, result: ModeResult, rows: &[Row]) -> ModeRow {
    let own = || rows.iter().filter(|row| row.mode == mode.name);
    let percents: Vec<f64> =
        own().filter(|row| row.is_in_mean).filter_map(|row| row.percent_of_native).collect();
    let real = own().filter(|row| row.is_in_real_mean).filter_map(|row| row.percent_of_native);
    let deviations = own().filter_map(|row| row.guest_time_deviation_percent);
    ModeRow {
        name: mode.name,
        about: mode.about,
        version: mode.version(),
        skipped: result.skipped,
        boot_seconds: stats::median(&result.boots),
        percent_of_native: stats::geometric_mean(&percents),
        real_programs_percent_of_native: stats::geometric_mean(&real.collect::<Vec<_>>()),
        guest_time_deviation_percent: deviations.max_by(|a, b| a.abs().total_cmp(&b.abs())),
    }
}

/// `allowed` is how many percent guest time may be off host time; the native clock is the host's.
fn notes(modes: &[ModeRow], rows: &[Row], allowed: f64) -> Vec<String> {
    let mut notes = Vec::new();
    for mode in modes {
        if let Some(reason) = &mode.skipped {
            notes.push(format!("{} is left out: {reason}", mode.name));
        }
    }
    notes.extend(modes.iter().filter_map(|mode| incomplete_mean(mode, rows)));
    let mut skipped: Vec<LeftOut> = Vec::new();
    for row in rows {
        if let Some(error) = &row.error {
            notes.push(format!("{} ({}) failed: {error}", row.benchmark, row.mode));
        } else if let (Some(reason), false) = (&row.skipped, is_left_out(modes, row)) {
            left_out(&mut skipped, row, reason);
        }
        match row.guest_time_deviation_percent {
            Some(percent) if row.mode != REFERENCE && percent.abs() > allowed => {
                notes.push(format!(
                    "{} ({}): guest time is {percent:+.1} % off host time",
                    row.benchmark, row.mode
                ));
            }
            _ => {}
        }
    }
    notes.extend(skipped.iter().map(LeftOut::line));
    notes
}

/// Rows of a mode that have no value for one reason.
struct LeftOut<'a> {
    mode: &'a str,
    reason: &'a str,
    benchmarks: Vec<&'a str>,
}

impl LeftOut<'_> {
    fn line(&self) -> String {
        let verb = if self.benchmarks.len() == 1 { "is" } else { "are" };
        format!("{} ({}) {verb} left out: {}", self.benchmarks.join(", "), self.mode, self.reason)
    }
}

/// What a process never does needs no words.
fn left_out<'a>(all: &mut Vec<LeftOut<'a>>, row: &'a Row, reason: &'a str) {
    if reason == PRIVILEGED {
        return;
    }
    match all.iter_mut().find(|known| known.mode == row.mode && known.reason == reason) {
        Some(known) => known.benchmarks.push(row.benchmark),
        None => all.push(LeftOut { mode: row.mode, reason, benchmarks: vec![row.benchmark] }),
    }
}

/// A mean of real programs of which some have no value cannot be compared with one of all.
fn incomplete_mean(mode: &ModeRow, rows: &[Row]) -> Option<String> {
    let counted = || rows.iter().filter(|row| row.mode == mode.name && row.is_in_real_mean);
    let (all, there) = (counted().count(), counted().filter(|row| row.percent_of_native.is_some()).count());
    (there > 0 && there < all)
        .then(|| format!("{}: the mean of the real programs is of {there} of {all} only", mode.name))
}

fn is_left_out(modes: &[ModeRow], row: &Row) -> bool {
    modes.iter().any(|mode| mode.name == row.mode && mode.skipped.is_some())
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::bench::{catalog::BENCHMARKS, mode::MODES};

    /// Two benchmarks in native, interp and a mode that is not there.
    pub fn example() -> Report {
        example_of(&BENCHMARKS[..2])
    }

    /// The same of any two benchmarks.
    pub fn example_of(benchmarks: &'static [Benchmark]) -> Report {
        let plan = Plan {
            benchmarks: benchmarks.iter().collect(),
            modes: MODES[..3].iter().collect(),
            runs: 2,
            target: Duration::from_millis(60),
            patience: Duration::MAX,
            timeout: Duration::from_secs(1),
            quick: true,
            size_percent: 25,
            left_out: vec!["real programs are left out: no network".to_owned()],
        };
        let cell = |samples: &[f64], check: &str| Cell {
            samples: samples.to_vec(),
            deviations: vec![-0.5; samples.len()],
            check: Some(check.to_owned()),
            count: 7,
            ..Cell::default()
        };
        let absent = || Cell { skipped: Some("the mode is not available".to_owned()), ..Cell::default() };
        let cells = vec![
            vec![cell(&[1.0, 3.0], "a"), cell(&[40.0, 40.0], "a"), absent()],
            vec![cell(&[2.0, 2.0], "b"), cell(&[40.0, 40.0], "c"), absent()],
        ];
        let mut modes = vec![ModeResult { boots: vec![1.5], skipped: None }; 2];
        modes.push(ModeResult { boots: Vec::new(), skipped: Some("not built yet".to_owned()) });
        Report::new(
            &plan,
            &Place::prepare(false, None).unwrap(),
            Measured { cells, modes, notes: vec!["native: by the loader".to_owned()] },
        )
    }

    #[test]
    fn rows_have_value_percent_and_spread() {
        let report = example();
        let row = report.row("sum", "interp").unwrap();
        assert_eq!((row.value, row.percent_of_native, row.spread), (Some(40.0), Some(5.0), Some(0.0)));
        assert_eq!(report.row("sum", "native").unwrap().spread, Some(100.0));
        assert_eq!(report.row("sum", "bt").unwrap().value, None);
    }

    #[test]
    fn wrong_result_is_a_failure() {
        let report = example();
        let error = report.row("callret", "interp").unwrap().error.clone().unwrap();
        assert!(error.contains("wrong result: c, but b in native"), "{error}");
        assert!(!report.is_good());
        assert!(report.notes.iter().any(|note| note == "bt is left out: not built yet"));
        assert!(report.notes.iter().any(|note| note == "real programs are left out: no network"));
        assert!(report.notes.iter().any(|note| note == "native: by the loader"));
        assert_eq!(report.notes.len(), 4, "{:?}", report.notes);
    }

    #[test]
    fn real_programs_have_a_mean_of_their_own_which_says_if_it_is_incomplete() {
        let first = BENCHMARKS.iter().position(|benchmark| benchmark.is_in_real_mean()).unwrap();
        // The second row of the example computes something else in interp, so it has no value there.
        let report = example_of(&BENCHMARKS[first..first + 2]);
        let interp = &report.modes[1];
        assert!((interp.real_programs_percent_of_native.unwrap() - 5.0).abs() < 1e-9);
        let note = "interp: the mean of the real programs is of 1 of 2 only";
        assert!(report.notes.iter().any(|line| line == note), "{:?}", report.notes);
        assert_eq!(example().modes[1].real_programs_percent_of_native, None);
    }

    #[test]
    fn json_has_the_promised_keys() {
        let value: serde_json::Value = serde_json::from_str(&example().json()).unwrap();
        let row = &value["rows"][1];
        assert_eq!(row["benchmark"], "sum");
        assert_eq!(row["mode"], "interp");
        assert_eq!(row["value"], 40.0);
        assert_eq!(row["unit"], "ns/op");
        assert_eq!(row["percent_of_native"], 5.0);
        assert_eq!(row["spread"], 0.0);
        assert!(value["rows"][2]["value"].is_null());
        assert!(value["host"]["cpu"].is_string() && value["modes"][1]["version"].is_string());
    }
}
