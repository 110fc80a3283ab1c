//! The pointer chase over working sets: against native, and in nanoseconds.

use super::class;
use super::svg::{Anchor, Scale, Svg, decades};
use crate::bench::catalog::{BENCHMARKS, PageSize};
use crate::bench::mode::REFERENCE;
use crate::bench::report::Report;
use crate::bench::table::duration;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 540.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 262.0;
/// The working sets of the axis.
const SETS: [u64; 9] =
    [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20];

/// What is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Time by native time.
    Slowdown,
    /// Time of a load.
    Time,
}

/// A mode's curve: working sets and values.
struct Curve {
    mode: &'static str,
    points: Vec<(u64, f64)>,
}

fn curves(report: &Report, pages: PageSize, what: What) -> Vec<Curve> {
    let sets =
        || BENCHMARKS.iter().filter_map(|b| Some((b.name, b.chase.filter(|(_, size)| *size == pages)?.0)));
    let curve = |mode: &'static str| {
        let value = |name: &str, mode: &str| report.row(name, mode).and_then(|row| row.value);
        let point = |(name, len)| {
            let time: f64 = value(name, mode)?;
            match what {
                What::Time => Some((len, time)),
                What::Slowdown => Some((len, time / value(name, REFERENCE)?)),
            }
        };
        let mut points: Vec<(u64, f64)> = sets().filter_map(point).collect();
        points.sort_by_key(|(len, _)| *len);
        Curve { mode, points }
    };
    let modes = report.modes.iter().map(|mode| mode.name);
    let modes = modes.filter(|mode| what == What::Time || *mode != REFERENCE);
    modes.map(curve).filter(|curve| !curve.points.is_empty()).collect()
}

/// The smallest and largest value of both page sizes, so that the plots beside each other have one scale.
fn extremes(report: &Report, what: What) -> Option<[f64; 2]> {
    let both = [PageSize::Small, PageSize::Huge].map(|pages| curves(report, pages, what));
    let values = || both.iter().flatten().flat_map(|curve| &curve.points).map(|(_, value)| *value);
    let (low, high) = values().fold((f64::MAX, f64::MIN), |(low, high), x| (x.min(low), x.max(high)));
    (low <= high && low > 0.0).then_some([low, high])
}

/// One plot; `None` if nothing was measured.
#[must_use]
pub fn plot(report: &Report, pages: PageSize, what: What) -> Option<String> {
    let curves = curves(report, pages, what);
    let [low, high] = extremes(report, what)?;
    if curves.is_empty() {
        return None;
    }
    let mut svg = Svg::new(WIDTH, HEIGHT);
    let ticks = ticks(low.min(1.0), high);
    let y = Scale::log([ticks[0], ticks[ticks.len() - 1]], [BOTTOM, TOP]);
    let x = Scale::log([SETS[0] as f64, SETS[SETS.len() - 1] as f64], [LEFT + 8.0, RIGHT]);
    for tick in &ticks {
        let at = y.place(*tick);
        svg.line("grid", [LEFT, at], [RIGHT, at]);
        svg.text("tick", [LEFT - 6.0, at + 3.5], Anchor::End, &name(*tick, what));
    }
    if what == What::Slowdown {
        svg.line("native-line", [LEFT, y.place(1.0)], [RIGHT, y.place(1.0)]);
    }
    for len in SETS {
        let at = x.place(len as f64);
        svg.line("grid", [at, TOP], [at, BOTTOM + 4.0]);
        svg.text("tick", [at, BOTTOM + 16.0], Anchor::Middle, &size(len));
    }
    svg.text("axis", [f64::midpoint(LEFT, RIGHT), BOTTOM + 33.0], Anchor::Middle, "working set");
    for curve in curves {
        let point = |(len, value): &(u64, f64)| {
            let title = match what {
                What::Time => format!("{}, {}: {}", curve.mode, size(*len), duration(*value)),
                What::Slowdown => format!("{}, {}: {value:.2} × native", curve.mode, size(*len)),
            };
            ([x.place(*len as f64), y.place(*value)], title)
        };
        svg.curve(class(curve.mode), &curve.points.iter().map(point).collect::<Vec<_>>());
    }
    Some(svg.finish("plot", "pointer chase by working set"))
}

/// 1, 2, 5, 10, … from at or below `low` to at or above `high`.
fn ticks(low: f64, high: f64) -> Vec<f64> {
    let all: Vec<f64> = decades(low, high).iter().flat_map(|ten| [1.0, 2.0, 5.0].map(|n| n * ten)).collect();
    let first = all.iter().rposition(|tick| *tick <= low * 1.000_1).unwrap_or(0);
    let last = all.iter().position(|tick| *tick >= high).unwrap_or(all.len() - 1);
    all[first..=last.max(first + 1).min(all.len() - 1)].to_vec()
}

fn name(tick: f64, what: What) -> String {
    let tick = (tick * 1e6).round() / 1e6;
    match what {
        What::Time => format!("{tick} ns"),
        What::Slowdown => format!("{tick} ×"),
    }
}

fn size(len: u64) -> String {
    if len >= 1 << 20 { format!("{} MiB", len >> 20) } else { format!("{} KiB", len >> 10) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_enclose_what_is_drawn() {
        assert_eq!(ticks(1.0, 30.0).len(), 6, "1 2 5 10 20 50");
        let around = ticks(0.7, 3.0);
        assert!(around[0] <= 0.7 && *around.last().unwrap() >= 3.0, "{around:?}");
        assert!(ticks(1.0, 1.0).len() > 1);
    }
}
