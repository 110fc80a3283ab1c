//! Accounts as they are shown: a [`Row`] for each cause, a [`Table`] of them with the time that they are parts of.

use std::borrow::Cow;
use std::collections::HashMap;

use crate::account::{Calibration, Entry};

/// How a cost is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Basis {
    /// Every exit was timed.
    Measured,
    /// Some were.
    Sampled,
    /// Counted here, timed elsewhere: what one takes was measured by itself.
    Calibrated,
    /// Only counted; the time is in the guest's.
    Counted,
}

impl Basis {
    /// The name for programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Measured => "measured",
            Self::Sampled => "sampled",
            Self::Calibrated => "calibrated",
            Self::Counted => "counted",
        }
    }
}

/// A cause's line.
#[derive(Clone, PartialEq, Debug)]
pub struct Row {
    /// What sort of cause.
    pub kind: &'static str,
    /// Which.
    pub cause: Cow<'static, str>,
    /// How often.
    pub count: u64,
    /// How often it was timed.
    pub measured: u64,
    /// How many exits `cycles` is known for.
    known: u64,
    /// Ticks of those.
    cycles: f64,
    calibrated: bool,
}

#[expect(clippy::cast_precision_loss, reason = "for people, and below 2^53")]
const fn float(n: u64) -> f64 {
    n as f64
}

impl Row {
    /// An account's.
    #[must_use]
    pub fn of(kind: &'static str, cause: impl Into<Cow<'static, str>>, entry: &Entry) -> Self {
        let average = entry.average();
        let known = if average.is_some() { entry.count } else { 0 };
        let cycles = average.unwrap_or(0.0) * float(entry.count);
        let (count, measured) = (entry.count, entry.measured);
        Self { kind, cause: cause.into(), count, measured, known, cycles, calibrated: false }
    }

    /// Of what was counted by others.
    #[must_use]
    pub fn counted(kind: &'static str, cause: impl Into<Cow<'static, str>>, count: u64) -> Self {
        Self { kind, cause: cause.into(), count, measured: 0, known: 0, cycles: 0.0, calibrated: false }
    }

    /// Of what takes so many ticks, as was measured by itself.
    #[must_use]
    pub fn calibrated(
        kind: &'static str,
        cause: impl Into<Cow<'static, str>>,
        count: u64,
        each: f64,
    ) -> Self {
        let row = Self::counted(kind, cause, count);
        Self { known: count, cycles: each * float(count), calibrated: true, ..row }
    }

    /// Ticks that one takes on the average; None: unknown.
    #[must_use]
    pub fn average(&self) -> Option<f64> {
        (self.known > 0).then(|| self.cycles / float(self.known))
    }

    /// Ticks that all of them took; None: unknown.
    #[must_use]
    pub fn total(&self) -> Option<f64> {
        self.average().map(|each| each * float(self.count))
    }

    /// How the cost is known.
    #[must_use]
    pub const fn basis(&self) -> Basis {
        match self {
            _ if self.calibrated => Basis::Calibrated,
            _ if self.measured == 0 => Basis::Counted,
            _ if self.measured < self.count => Basis::Sampled,
            _ => Basis::Measured,
        }
    }

    fn add(&mut self, other: &Self) {
        self.count += other.count;
        self.measured += other.measured;
        self.known += other.known;
        self.cycles += other.cycles;
        self.calibrated |= other.calibrated;
    }
}

/// Adds rows to rows, by kind and cause.
pub fn add_rows(to: &mut Vec<Row>, rows: &[Row]) {
    let place = |r: &Row| (r.kind, r.cause.clone());
    let mut places: HashMap<_, _> = to.iter().enumerate().map(|(at, r)| (place(r), at)).collect();
    for row in rows {
        match places.get(&place(row)).and_then(|&at| to.get_mut(at)) {
            Some(mine) => mine.add(row),
            None => {
                places.insert(place(row), to.len());
                to.push(row.clone());
            }
        }
    }
}

/// Where a vCPU's time went, or that of several.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Table {
    /// Ticks that the vCPUs did not sleep.
    pub busy: f64,
    /// Ticks of those in which their threads waited for a CPU of the host.
    pub waiting: f64,
    /// The rows that happened, by descending total.
    pub rows: Vec<Row>,
    /// Spans that began.
    pub events: u64,
    /// Spans that were timed.
    pub measurements: u64,
}

impl Table {
    /// Puts rows in order; those that did not happen are left out.
    #[must_use]
    pub fn new(busy: f64, rows: Vec<Row>, measurements: u64) -> Self {
        let events = rows.iter().filter(|r| !r.calibrated).map(|r| r.count).sum();
        let mut rows: Vec<_> = rows.into_iter().filter(|r| r.count > 0).collect();
        let key = |r: &Row| (r.total().unwrap_or(-1.0), float(r.count));
        rows.sort_by(|a, b| key(b).partial_cmp(&key(a)).unwrap_or(std::cmp::Ordering::Equal));
        Self { busy, waiting: 0.0, rows, events, measurements }
    }

    /// Ticks of all rows whose cost is known.
    #[must_use]
    pub fn accounted(&self) -> f64 {
        self.rows.iter().filter_map(Row::total).sum()
    }

    /// The rest: what the guest had. Sampled rows are estimates, so it may come out a little below none; then it is none.
    #[must_use]
    pub fn guest(&self) -> f64 {
        (self.busy - self.waiting - self.accounted()).max(0.0)
    }

    /// Percent of the time that the vCPUs did not sleep.
    #[must_use]
    pub fn percent(&self, ticks: f64) -> Option<f64> {
        (self.busy > 0.0).then(|| 100.0 * ticks / self.busy)
    }

    /// Ticks that accounting itself took: counted spans and timed ones, times what each takes on this host.
    #[must_use]
    pub fn overhead(&self) -> f64 {
        let c = Calibration::get();
        float(self.events) * c.event + float(self.measurements) * (c.measurement - c.event).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_add_by_cause_and_unknown_costs_are_taken_as_the_known_average() {
        let mut rows = vec![Row::calibrated("switch", "there", 10, 5.0), Row::counted("exit", "hlt", 3)];
        let others = [
            Row::calibrated("switch", "there", 10, 7.0),
            Row::counted("switch", "there", 5),
            Row::counted("miss", "there", 1),
        ];
        add_rows(&mut rows, &others);
        assert_eq!(rows.len(), 3);
        assert_eq!((rows[0].count, rows[0].average(), rows[0].total()), (25, Some(6.0), Some(150.0)));
        assert_eq!((rows[1].total(), rows[1].basis()), (None, Basis::Counted));
    }

    #[test]
    fn table_is_sorted_and_the_rest_is_the_guests() {
        let rows = vec![
            Row::counted("exit", "hlt", 3),
            Row::calibrated("a", "small", 1, 10.0),
            Row::calibrated("a", "great", 2, 20.0),
            Row::counted("exit", "never", 0),
        ];
        let t = Table::new(200.0, rows, 0);
        let causes: Vec<_> = t.rows.iter().map(|r| &*r.cause).collect();
        assert_eq!(causes, ["great", "small", "hlt"]);
        assert!((t.accounted() - 50.0).abs() < 1e-9 && (t.guest() - 150.0).abs() < 1e-9);
        assert_eq!(t.percent(50.0), Some(25.0));
        assert_eq!(Table::default().percent(1.0), None);
    }
}
