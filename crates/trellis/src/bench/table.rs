//! The result as text.

use super::catalog::{self, Benchmark};
use super::matrix::Cell;
use super::mode::{Mode, REFERENCE};
use super::report::{CYCLES, ModeRow, Report, Row};
use super::stats;

/// The table, what it was measured on, and the notes.
#[must_use]
pub fn render(report: &Report) -> String {
    let shown: Vec<&str> =
        report.modes.iter().filter(|mode| mode.skipped.is_none()).map(|mode| mode.name).collect();
    let mut lines = vec![header(&shown)];
    let mut benchmarks: Vec<&str> = report.rows.iter().map(|row| row.benchmark).collect();
    benchmarks.dedup();
    let mut last_group = "";
    for name in benchmarks {
        let rows: Vec<Option<&Row>> = shown.iter().map(|mode| report.row(name, mode)).collect();
        let first = rows.iter().flatten().next();
        let group = first.map_or("", |row| row.group);
        if group != last_group && first.is_some_and(|row| !row.is_in_mean) {
            lines.push(vec![String::new()]);
            lines.push(vec![heading(group)]);
        } else if last_group != group && is_apart(last_group) {
            lines.push(vec![String::new()]);
        }
        last_group = group;
        let operation = rows.iter().flatten().next().map_or("", |row| row.operation);
        let mut line = vec![name.to_owned(), operation.to_owned()];
        rows.iter().zip(&shown).for_each(|(row, mode)| line.extend(row_cells(*row, *mode == REFERENCE)));
        lines.push(line);
    }
    if report.rows.iter().any(|row| row.is_in_real_mean) {
        lines.push(means(report, &shown, "geometric mean, real programs", |mode| {
            mode.real_programs_percent_of_native
        }));
    }
    lines.push(means(report, &shown, "geometric mean", |mode| mode.percent_of_native));
    let mut text = align(&lines);
    text.push('\n');
    text.push_str(
        &report.comparison.as_ref().map_or_else(String::new, |comparison| comparison.render() + "\n"),
    );
    let predicted = crate::model::table::render(&report.predictions);
    if !predicted.is_empty() {
        text.push_str(&predicted);
        text.push('\n');
    }
    footer(report).into_iter().chain(report.notes.clone()).for_each(|line| {
        text.push_str(&line);
        text.push('\n');
    });
    text
}

/// Whether a group stands apart, with a heading.
fn is_apart(group: &str) -> bool {
    matches!(group, catalog::CHASE | catalog::NANO)
}

/// The heading of a group that is not in the means.
fn heading(group: &str) -> String {
    match group {
        catalog::NANO => format!("{group}: cycles of the host's counter; not in the means"),
        _ => format!("{group}: not in the means"),
    }
}

fn header(modes: &[&str]) -> Vec<String> {
    let mut line = vec!["benchmark".to_owned(), "per".to_owned()];
    for mode in modes {
        line.push((*mode).to_owned());
        if *mode != REFERENCE {
            line.push("of native".to_owned());
        }
        line.push("spread".to_owned());
    }
    line
}

/// Value, percent of native unless it is native, spread.
fn row_cells(row: Option<&Row>, is_reference: bool) -> Vec<String> {
    let value = match row {
        Some(row) if row.timed_out => "timed out".to_owned(),
        Some(row) if row.error.is_some() => "failed".to_owned(),
        Some(row) => row.value.map_or_else(|| "-".to_owned(), |number| self::value(number, row.unit)),
        None => "-".to_owned(),
    };
    let spread = row.and_then(|row| row.spread).map_or_else(String::new, |spread| format!("{spread:.0} %"));
    let percent = row.and_then(|row| row.percent_of_native).map_or_else(String::new, percent);
    if is_reference { vec![value, spread] } else { vec![value, percent, spread] }
}

/// A line of one percentage a mode.
fn means(
    report: &Report,
    shown: &[&str],
    name: &str,
    value: impl Fn(&ModeRow) -> Option<f64>,
) -> Vec<String> {
    let mut line = vec![name.to_owned(), String::new()];
    for mode in report.modes.iter().filter(|mode| shown.contains(&mode.name)) {
        line.push(String::new());
        if mode.name != REFERENCE {
            line.push(value(mode).map_or_else(String::new, percent));
        }
        line.push(String::new());
    }
    line
}

/// What it was measured on.
fn footer(report: &Report) -> Vec<String> {
    let host = &report.host;
    let mut lines = vec![format!(
        "Host: {}, {} CPUs, Linux {}{}, load average {:.1}.",
        host.cpu,
        host.cpus,
        host.kernel,
        if host.is_virtual { ", itself virtual" } else { "" },
        host.load_average
    )];
    let settings = &report.settings;
    if let Some(kernel) = &settings.guest_kernel {
        lines.push(format!("Guests: {kernel}, 1 CPU, {}.", settings.guest_memory));
    }
    for mode in report.modes.iter().filter(|mode| mode.name != REFERENCE && mode.skipped.is_none()) {
        let boot =
            mode.boot_seconds.map_or_else(String::new, |seconds| format!(", {seconds:.2} s to its start"));
        let clock = mode.guest_time_deviation_percent;
        let clock =
            clock.map_or_else(String::new, |percent| format!(", guest time at most {percent:+.1} % off"));
        lines.push(format!("{}: {} ({}){boot}{clock}.", mode.name, mode.version, mode.about));
    }
    lines.push(format!(
        "Medians of {} runs of about {} ms, taken in turn, forth and back; spread is largest minus smallest by the median.",
        settings.runs, settings.target_ms
    ));
    lines
}

/// A benchmark as a line of the log.
#[must_use]
pub fn line(benchmark: &Benchmark, modes: &[&Mode], cells: &[Cell]) -> String {
    let part = |(mode, cell): (&&Mode, &Cell)| {
        let value = match (&cell.error, stats::median(&cell.samples)) {
            (Some(error), _) => format!("failed ({error})"),
            (None, Some(value)) => duration(value),
            (None, None) => "-".to_owned(),
        };
        format!("{} {value}", mode.name)
    };
    let parts: Vec<String> = modes.iter().zip(cells).map(part).collect();
    format!("{}: {}", benchmark.name, parts.join(", "))
}

/// A number of a unit in three or four digits.
#[must_use]
pub fn value(number: f64, unit: &str) -> String {
    match unit {
        CYCLES => format!("{number:.*} cyc", usize::from(number < 100.0)),
        _ => duration(number),
    }
}

/// Nanoseconds in three or four digits with a fitting unit.
#[must_use]
pub fn duration(ns: f64) -> String {
    let (value, unit) = match ns {
        ns if ns < 1e3 => (ns, "ns"),
        ns if ns < 1e6 => (ns / 1e3, "µs"),
        ns if ns < 1e9 => (ns / 1e6, "ms"),
        ns => (ns / 1e9, "s"),
    };
    let decimals = if value < 1.0 {
        3
    } else if value < 10.0 {
        2
    } else {
        usize::from(value < 100.0)
    };
    format!("{value:.decimals$} {unit}")
}

/// A percentage with as many digits as it is worth.
#[must_use]
pub fn percent(percent: f64) -> String {
    let decimals = if percent < 1.0 { 2 } else { usize::from(percent < 10.0) };
    format!("{percent:.decimals$} %")
}

/// Columns as wide as their widest field: the first two to the left, the others to the right.
#[must_use]
pub fn align(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let field = |line: &[String], column: usize| line.get(column).map_or(0, |text| text.chars().count());
    // A heading is a line of one field, which no column waits for.
    let rows = || lines.iter().filter(|line| line.len() > 1);
    let widths: Vec<usize> =
        (0..columns).map(|column| rows().map(|line| field(line, column)).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for line in lines {
        let fields = line.iter().zip(&widths).enumerate().map(|(column, (field, &width))| match column {
            0 | 1 => format!("{field:width$}"),
            _ => format!("{field:>width$}"),
        });
        text.push_str(fields.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::catalog::BENCHMARKS;
    use crate::bench::report::tests::{example, example_of};

    #[test]
    fn table_has_a_line_a_benchmark() {
        let text = render(&example());
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("benchmark") && lines[0].contains("interp") && !lines[0].contains("bt"));
        assert!(lines[1].contains("2.00 ns") && lines[1].contains("5.0 %"), "{text}");
        assert!(lines[2].contains("failed"), "{text}");
        assert!(lines[3].starts_with("geometric mean"));
        assert!(text.contains("bt is left out: not built yet"), "{text}");
    }

    #[test]
    fn row_that_did_not_end_says_so() {
        let mut report = example();
        report.rows[1].timed_out = true;
        report.rows[1].error = Some("no answer within 1 s".to_owned());
        assert!(render(&report).lines().nth(1).unwrap().contains("timed out"));
    }

    #[test]
    fn groups_out_of_the_mean_have_a_heading() {
        let first = BENCHMARKS.iter().position(|benchmark| benchmark.is_nano()).unwrap();
        let text = render(&example_of(&BENCHMARKS[first..first + 2]));
        let at =
            text.lines().position(|line| line.starts_with("single operations, bare metal: cycles")).unwrap();
        assert!(text.lines().nth(at + 1).unwrap().contains(" cyc"), "{text}");
        assert!(!render(&example()).contains("not in the means"));
    }

    #[test]
    fn mean_of_real_programs_is_a_line_of_its_own() {
        let first = BENCHMARKS.iter().position(|benchmark| benchmark.is_in_real_mean()).unwrap();
        let text = render(&example_of(&BENCHMARKS[first..first + 2]));
        let line = text.lines().find(|line| line.starts_with("geometric mean, real programs")).unwrap();
        assert!(line.contains("5.0 %"), "{text}");
        assert!(!render(&example()).contains("geometric mean, real programs"));
    }

    #[test]
    fn durations_choose_their_unit() {
        let cases = [
            (0.25, "0.250 ns"),
            (12.34, "12.3 ns"),
            (999.0, "999 ns"),
            (1500.0, "1.50 µs"),
            (2.5e7, "25.0 ms"),
            (3e9, "3.00 s"),
        ];
        for (ns, expected) in cases {
            assert_eq!(duration(ns), expected);
        }
    }

    #[test]
    fn columns_are_aligned() {
        let lines =
            vec![vec!["a".into(), "b".into(), "1".into()], vec!["long".into(), "x".into(), "µ10".into()]];
        assert_eq!(align(&lines), "a     b    1\nlong  x  µ10\n");
    }
}
