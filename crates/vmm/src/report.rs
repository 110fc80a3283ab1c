//! How an engine's report is shown: as a table for people, as JSON for programs. It knows units and forms, but none of the names.

use std::fmt::{self, Write as _};
use std::time::Duration;

use engine::Report;
use engine::report::{Breakdown, Counter, Form, Unit};
use serde_json::{Map, Value, json};

/// Rows of a breakdown that the table shows; JSON has all.
const ROWS: usize = 24;
const NAME: usize = 34;
const VALUE: usize = 14;

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Writes the table; nothing for an engine that says nothing. `busy` is the time that the vCPUs did not sleep.
pub(crate) fn table(report: &Report, busy: Duration, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    if report.counters.is_empty() && report.breakdowns.is_empty() {
        return Ok(());
    }
    writeln!(f, "engine")?;
    for counter in report.counters.iter().filter(|c| c.value > 0) {
        writeln!(f, "  {:<NAME$}{:>VALUE$}", counter.name, amount(counter))?;
    }
    for ratio in &report.ratios {
        if let Some(value) = report.quotient(ratio, nanoseconds(busy)) {
            let unit = if ratio.form == Form::Percent { " %" } else { "" };
            writeln!(f, "  {:<NAME$}{:>VALUE$}", ratio.name, format!("{value:.1}{unit}"))?;
        }
    }
    report.breakdowns.iter().try_for_each(|b| breakdown(b, f))
}

fn breakdown(b: &Breakdown, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let mut rows: Vec<_> = b.rows.iter().filter(|(_, n)| **n > 0).collect();
    if rows.is_empty() {
        return Ok(());
    }
    rows.sort_by_key(|(_, n)| std::cmp::Reverse(**n));
    writeln!(f, "{}", b.name)?;
    let others = rows.split_off(rows.len().min(ROWS));
    for (kind, n) in rows {
        writeln!(f, "  {kind:<NAME$}{n:>VALUE$}")?;
    }
    if !others.is_empty() {
        let name = format!("{} others", others.len());
        writeln!(f, "  {name:<NAME$}{:>VALUE$}", others.iter().map(|(_, n)| **n).sum::<u64>())?;
    }
    Ok(())
}

/// A counter's value with its unit.
fn amount(counter: &Counter) -> String {
    #[expect(clippy::cast_precision_loss, reason = "for people")]
    let value = counter.value as f64;
    match counter.unit {
        Unit::Count => counter.value.to_string(),
        Unit::Bytes => format!("{:.1} KiB", value / 1024.0),
        Unit::Nanoseconds => format!("{:.3} s", value / 1e9),
    }
}

/// A name as a key, as in `host_code_made_bytes`.
fn key(name: &str, unit: Unit) -> String {
    let words = name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '_' });
    let mut key: String = words.collect();
    match unit {
        Unit::Count => {}
        Unit::Bytes => key.push_str("_bytes"),
        Unit::Nanoseconds => key.push_str("_ns"),
    }
    key
}

/// Everything in it, for programs.
pub(crate) fn to_json(report: &Report, busy: Duration) -> Value {
    let mut all = Map::new();
    for counter in &report.counters {
        all.insert(key(counter.name, counter.unit), json!(counter.value));
    }
    for ratio in &report.ratios {
        let mut name = key(ratio.name, Unit::Count);
        if ratio.form == Form::Percent {
            let _ = write!(name, "_percent");
        }
        all.insert(name, json!(report.quotient(ratio, nanoseconds(busy))));
    }
    for b in &report.breakdowns {
        all.insert(key(b.name, Unit::Count), json!(b.rows));
    }
    Value::Object(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::report::{Base, Ratio};

    struct Shown(Report);

    impl fmt::Display for Shown {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            table(&self.0, Duration::from_millis(2), f)
        }
    }

    fn report() -> Report {
        let mut r = Report::default();
        r.count("translation time", Unit::Nanoseconds, 1_500_000);
        r.count("code made", Unit::Bytes, 3072);
        r.count("never", Unit::Count, 0);
        let of = &["translation time"];
        r.ratios.push(Ratio { name: "of the time", of, by: Base::BusyTime, form: Form::Percent });
        let rows = (0..30u64).map(|n| (format!("kind {n}"), n)).collect();
        r.breakdowns.push(Breakdown { name: "by kind", rows });
        r
    }

    #[test]
    fn table_shows_what_happened_in_units_and_the_greatest_kinds() {
        let text = Shown(report()).to_string();
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["translation", "time", "0.002", "s"]);
        assert_eq!(lines[2], ["code", "made", "3.0", "KiB"]);
        assert_eq!(lines[3], ["of", "the", "time", "75.0", "%"]);
        assert_eq!(lines[5], ["kind", "29", "29"]);
        assert_eq!(lines[5 + ROWS], ["5", "others", "15"]);
        assert!(!text.contains("never") && !text.contains("kind 0"), "{text}");
        assert_eq!(Shown(Report::default()).to_string(), "");
    }

    #[test]
    fn json_has_everything_under_keys_with_units() {
        let json = to_json(&report(), Duration::ZERO);
        assert_eq!(json["translation_time_ns"], 1_500_000);
        assert_eq!(json["code_made_bytes"], 3072);
        assert_eq!(json["never"], 0);
        assert!(json["of_the_time_percent"].is_null());
        assert_eq!(json["by_kind"]["kind 29"], 29);
    }
}
