//! What an engine says of its own work: named counters, ratios of them, counts by kind.
//!
//! The machine adds the reports of its vCPUs and of its lives, and shows them; it needs to know none of the names. Nothing here is touched
//! while a guest runs: an engine makes its report when it is asked.

use std::collections::BTreeMap;

use crate::cost::{Row, add_rows};
use crate::profile::Profile;

/// What a counter counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unit {
    /// Things or events.
    Count,
    /// Bytes.
    Bytes,
    /// Nanoseconds.
    Nanoseconds,
}

/// A number with a name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Counter {
    /// In words, as in `fragments made`.
    pub name: &'static str,
    /// Its unit.
    pub unit: Unit,
    /// How many.
    pub value: u64,
    /// How much there is now, not how much there was in all: it ends with the vCPU.
    pub gauge: bool,
}

/// What a ratio's denominator is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Base {
    /// A sum of counters.
    Counters(&'static [&'static str]),
    /// Nanoseconds that the vCPUs did not sleep.
    BusyTime,
}

/// How a ratio is shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Form {
    /// As it is.
    Plain,
    /// Times a hundred.
    Percent,
}

/// A quotient of counters, made when it is shown: reports add, quotients do not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ratio {
    /// In words.
    pub name: &'static str,
    /// The counters whose sum is divided.
    pub of: &'static [&'static str],
    /// By what.
    pub by: Base,
    /// How it is shown.
    pub form: Form,
}

/// Counts by kind.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Breakdown {
    /// In words, as in `callouts by instruction`.
    pub name: &'static str,
    /// The kinds.
    pub rows: BTreeMap<String, u64>,
}

/// An engine's account of its work.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Report {
    /// What [`crate::Vcpu::instructions`] leaves out is most of them: only interpreted ones are counted.
    pub interpreted_only: bool,
    /// The counters, in the order to show.
    pub counters: Vec<Counter>,
    /// The ratios, in the order to show.
    pub ratios: Vec<Ratio>,
    /// The breakdowns, in the order to show.
    pub breakdowns: Vec<Breakdown>,
    /// What its exits cost, beside those of [`crate::ExitStats`].
    pub costs: Vec<Row>,
    /// Where samples found it, if any were taken.
    pub profile: Option<Box<Profile>>,
}

impl Report {
    /// Adds a counter.
    pub fn count(&mut self, name: &'static str, unit: Unit, value: u64) {
        self.counters.push(Counter { name, unit, value, gauge: false });
    }

    /// Adds a counter of what there is now.
    pub fn gauge(&mut self, name: &'static str, unit: Unit, value: u64) {
        self.counters.push(Counter { name, unit, value, gauge: true });
    }

    /// A counter's value, 0 if there is none.
    #[must_use]
    pub fn get(&self, name: &str) -> u64 {
        self.counters.iter().find(|c| c.name == name).map_or(0, |c| c.value)
    }

    /// A ratio's value as it is shown; None where the denominator is 0.
    #[must_use]
    pub fn quotient(&self, ratio: &Ratio, busy_ns: u64) -> Option<f64> {
        let sum = |names: &[&str]| names.iter().map(|name| self.get(name)).sum::<u64>();
        let by = match ratio.by {
            Base::Counters(names) => sum(names),
            Base::BusyTime => busy_ns,
        };
        #[expect(clippy::cast_precision_loss, reason = "for people")]
        let plain = |n: u64| n as f64;
        let scale = if ratio.form == Form::Percent { 100.0 } else { 1.0 };
        (by > 0).then(|| scale * plain(sum(ratio.of)) / plain(by))
    }

    /// Adds another vCPU's report, or another life's.
    pub fn add(&mut self, other: &Self) {
        self.interpreted_only |= other.interpreted_only;
        for theirs in &other.counters {
            match self.counters.iter_mut().find(|c| c.name == theirs.name) {
                Some(mine) => mine.value += theirs.value,
                None => self.counters.push(theirs.clone()),
            }
        }
        for theirs in &other.ratios {
            if self.ratios.iter().all(|r| r.name != theirs.name) {
                self.ratios.push(theirs.clone());
            }
        }
        for theirs in &other.breakdowns {
            match self.breakdowns.iter_mut().find(|b| b.name == theirs.name) {
                Some(mine) => {
                    theirs.rows.iter().for_each(|(k, n)| *mine.rows.entry(k.clone()).or_default() += n);
                }
                None => self.breakdowns.push(theirs.clone()),
            }
        }
        add_rows(&mut self.costs, &other.costs);
        if let Some(theirs) = &other.profile {
            self.profile.get_or_insert_default().add(theirs);
        }
    }

    /// The report of a vCPU that is no more: what it had is gone, what it did stays.
    #[must_use]
    pub fn ended(mut self) -> Self {
        self.counters.iter_mut().filter(|c| c.gauge).for_each(|c| c.value = 0);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(made: u64, bytes: u64, kinds: &[(&str, u64)]) -> Report {
        let mut r = Report::default();
        r.count("made", Unit::Count, made);
        r.gauge("memory", Unit::Bytes, bytes);
        let rows = kinds.iter().map(|(k, n)| ((*k).to_owned(), *n)).collect();
        r.breakdowns.push(Breakdown { name: "kinds", rows });
        r
    }

    #[test]
    fn reports_add_by_name_and_gauges_end_with_the_vcpu() {
        let mut sum = report(2, 100, &[("a", 1)]).ended();
        sum.add(&report(3, 50, &[("a", 2), ("b", 5)]));
        assert_eq!((sum.get("made"), sum.get("memory"), sum.get("none")), (5, 50, 0));
        assert_eq!(sum.breakdowns[0].rows, BTreeMap::from([("a".to_owned(), 3), ("b".to_owned(), 5)]));
    }

    #[test]
    fn ratio_without_denominator_is_none() {
        let r = report(3, 50, &[]);
        let ratio = |by| Ratio { name: "r", of: &["made"], by, form: Form::Percent };
        assert_eq!(r.quotient(&ratio(Base::BusyTime), 300), Some(1.0));
        assert_eq!(r.quotient(&ratio(Base::BusyTime), 0), None);
        assert_eq!(r.quotient(&ratio(Base::Counters(&["memory"])), 0), Some(6.0));
    }
}
