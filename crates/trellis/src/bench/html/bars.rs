//! Bars: percent of native a group of benchmarks, and cycles of single operations.

use super::class;
use super::svg::{Anchor, Scale, Svg, decades};
use crate::bench::mode::REFERENCE;
use crate::bench::report::{Report, Row};
use crate::bench::table::{percent, value};

const WIDTH: f64 = 560.0;
/// Where bars begin and end; the names are before, the values behind.
const LEFT: f64 = 124.0;
const RIGHT: f64 = 500.0;
const BAR: f64 = 11.0;
const GAP: f64 = 9.0;
const HEAD: f64 = 20.0;
/// The end of the linear scale, in percent: three rows of four end below it.
const LINEAR_END: f64 = 150.0;

/// How long a bar is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// In proportion to the percentage.
    Linear,
    /// To its logarithm.
    Log,
}

impl Form {
    fn class(self) -> &'static str {
        match self {
            Self::Linear => "plot linear",
            Self::Log => "plot log",
        }
    }
}

/// A group in percent of native; `None` if no mode has any. `low` is the smallest percentage of the page, so that all
/// logarithmic scales are alike.
#[must_use]
pub fn percentages(report: &Report, group: &str, form: Form, low: f64) -> Option<String> {
    let modes = modes_with(report, group, |row| row.percent_of_native.is_some() && row.mode != REFERENCE);
    let benchmarks = benchmarks_of(report, group);
    if modes.is_empty() {
        return None;
    }
    let height = HEAD + benchmarks.len() as f64 * (BAR * modes.len() as f64 + GAP);
    let mut svg = Svg::new(WIDTH, height);
    let places = [LEFT, RIGHT];
    let (scale, ticks) = match form {
        Form::Linear => {
            (Scale::linear([0.0, LINEAR_END], places), vec![0.0, 25.0, 50.0, 75.0, 100.0, 125.0, 150.0])
        }
        Form::Log => {
            let ticks = decades(low, 1000.0);
            (Scale::log([ticks[0], 1000.0], places), ticks)
        }
    };
    grid(&mut svg, &scale, &ticks, height, |tick| format!("{tick} %"));
    svg.line("native-line", [scale.place(100.0), HEAD - 4.0], [scale.place(100.0), height]);
    let mut y = HEAD;
    for benchmark in benchmarks {
        let middle = y + BAR * modes.len() as f64 / 2.0;
        svg.text("name", [LEFT - 8.0, middle + 4.0], Anchor::End, benchmark);
        for mode in &modes {
            if let Some(row) = report.row(benchmark, mode) {
                percentage(&mut svg, &scale, row, y);
            }
            y += BAR;
        }
        y += GAP;
    }
    Some(svg.finish(form.class(), &format!("{group}: percent of native by benchmark and mode")))
}

fn percentage(svg: &mut Svg, scale: &Scale, row: &Row, y: f64) {
    let Some(share) = row.percent_of_native else {
        let why = if row.timed_out {
            "timed out"
        } else if row.error.is_some() {
            "failed"
        } else {
            "not here"
        };
        return svg.text("value faint", [LEFT + 3.0, y + 8.5], Anchor::Start, why);
    };
    let end = scale.place(share);
    svg.bar(class(row.mode), [LEFT, y, end - LEFT, BAR - 2.0], &title(row));
    let mut label = end;
    if let Some((low, high)) = range(row, share) {
        label = scale.place(high).max(end);
        whisker(svg, scale.place(low), label, y);
    }
    let beyond = if scale.is_beyond(share) { "▸ " } else { "" };
    svg.text("value", [label + 4.0, y + 8.5], Anchor::Start, &format!("{beyond}{}", percent(share)));
}

/// The percentages of the slowest and the fastest run.
fn range(row: &Row, share: f64) -> Option<(f64, f64)> {
    let value = row.value?;
    let (low, high) = row.samples.iter().fold((f64::MAX, f64::MIN), |(l, h), &x| (x.min(l), x.max(h)));
    (row.samples.len() > 1 && low > 0.0).then(|| (share * value / high, share * value / low))
}

fn whisker(svg: &mut Svg, low: f64, high: f64, y: f64) {
    let middle = y + (BAR - 2.0) / 2.0;
    if high - low >= 2.0 {
        svg.line("whisker", [low, middle], [high, middle]);
        svg.line("whisker", [low, middle - 2.0], [low, middle + 2.0]);
        svg.line("whisker", [high, middle - 2.0], [high, middle + 2.0]);
    }
}

fn title(row: &Row) -> String {
    let number = row.value.map_or_else(String::new, |number| value(number, row.unit));
    let share =
        row.percent_of_native.map_or_else(String::new, |share| format!(", {} of native", percent(share)));
    let spread = row.spread.map_or_else(String::new, |spread| format!(", spread {spread:.0} %"));
    format!("{} ({}): {number} per {}{share}{spread}", row.benchmark, row.mode, row.operation)
}

/// A group's values themselves on a logarithmic scale, in drawings of about equal length; `None` if there are none.
#[must_use]
pub fn values(report: &Report, group: &str, drawings: usize) -> Option<Vec<String>> {
    let all = || report.rows.iter().filter(|row| row.group == group).filter_map(|row| row.value);
    let (low, high) = all().fold((f64::MAX, f64::MIN), |(low, high), x| (x.min(low), x.max(high)));
    if low > high || low <= 0.0 {
        return None;
    }
    let ticks = decades(low.min(1.0), high);
    let benchmarks: Vec<Vec<&Row>> =
        benchmarks_of(report, group).into_iter().map(|name| rows_with_value(report, name)).collect();
    let each = benchmarks.len().div_ceil(drawings).max(1);
    Some(benchmarks.chunks(each).map(|part| values_of(part, &ticks, group)).collect())
}

fn rows_with_value<'a>(report: &'a Report, benchmark: &str) -> Vec<&'a Row> {
    let modes = report.modes.iter();
    modes.filter_map(|mode| report.row(benchmark, mode.name)).filter(|row| row.value.is_some()).collect()
}

fn values_of(benchmarks: &[Vec<&Row>], ticks: &[f64], group: &str) -> String {
    let bars: usize = benchmarks.iter().map(Vec::len).sum();
    let height = HEAD + bars as f64 * BAR + benchmarks.len() as f64 * GAP;
    let mut svg = Svg::new(WIDTH, height);
    let scale = Scale::log([ticks[0], ticks[ticks.len() - 1]], [LEFT, RIGHT]);
    grid(&mut svg, &scale, ticks, height, short);
    let mut y = HEAD;
    for rows in benchmarks {
        let middle = y + BAR * rows.len() as f64 / 2.0;
        let name = rows.first().map_or("", |row| row.benchmark);
        svg.text("name", [LEFT - 8.0, middle + 4.0], Anchor::End, name);
        for (row, number) in rows.iter().filter_map(|row| Some((row, row.value?))) {
            let end = scale.place(number);
            svg.bar(class(row.mode), [LEFT, y, end - LEFT, BAR - 2.0], &title(row));
            svg.text("value", [end + 4.0, y + 8.5], Anchor::Start, &rounded(number));
            y += BAR;
        }
        y += GAP;
    }
    svg.finish("plot", &format!("{group} by mode"))
}

/// The tick's number and a vertical line.
fn grid(svg: &mut Svg, scale: &Scale, ticks: &[f64], height: f64, name: impl Fn(f64) -> String) {
    for tick in ticks {
        let x = scale.place(*tick);
        svg.line("grid", [x, HEAD - 4.0], [x, height]);
        svg.text("tick", [x, HEAD - 8.0], Anchor::Middle, &name(tidy(*tick)));
    }
}

/// A power of ten without the dust of its making.
fn tidy(tick: f64) -> f64 {
    (tick * 1e6).round() / 1e6
}

fn short(number: f64) -> String {
    match number {
        n if n >= 1e6 => format!("{} M", n / 1e6),
        n if n >= 1e3 => format!("{} k", n / 1e3),
        n => format!("{n}"),
    }
}

/// Some three digits.
fn rounded(number: f64) -> String {
    match number {
        n if n < 10.0 => format!("{n:.1}"),
        n if n < 1e4 => format!("{n:.0}"),
        n if n < 1e6 => format!("{:.0} k", n / 1e3),
        n => format!("{:.1} M", n / 1e6),
    }
}

/// The modes with a row of the group that fits, in order.
fn modes_with(report: &Report, group: &str, fits: impl Fn(&Row) -> bool) -> Vec<&'static str> {
    let has = |mode: &str| report.rows.iter().any(|row| row.group == group && row.mode == mode && fits(row));
    report.modes.iter().map(|mode| mode.name).filter(|mode| has(mode)).collect()
}

fn benchmarks_of(report: &Report, group: &str) -> Vec<&'static str> {
    let mut names: Vec<&str> =
        report.rows.iter().filter(|row| row.group == group).map(|row| row.benchmark).collect();
    names.dedup();
    names
}
