//! Predictions as text.

use serde::Serialize;

use super::costs::{PROCESSORS, Processor};
use super::events::Events;
use super::predict::{Prediction, Technique, predict};
use super::talk;
use crate::bench::table::align;

/// The techniques and processors that tables show.
const SHOWN: [(Technique, &str); 8] = [
    (Technique::Classical, "Pentium 4 672"),
    (Technique::Translation, "Pentium 4 672"),
    (Technique::Shadow, "Pentium 4 672"),
    (Technique::Shadow, "Core 2 Duo"),
    (Technique::Shadow, "Sandy Bridge"),
    (Technique::Nested, "Opteron 'Barcelona'"),
    (Technique::Nested, "Sandy Bridge"),
    (Technique::Nested, "EPYC (Zen)"),
];

/// What is predicted of one workload.
#[derive(Clone, Debug, Serialize)]
pub struct Predicted {
    /// Its name.
    pub name: String,
    /// What one operation is.
    pub operation: String,
    /// Native cycles of an operation, on this host.
    pub native_cycles: f64,
    /// What was counted in an operation.
    pub events: Events,
    /// By technique and processor.
    pub predictions: Vec<Prediction>,
}

impl Predicted {
    /// Predicts for a workload of which an operation takes so many cycles natively.
    #[must_use]
    pub fn new(name: &str, operation: &str, events: Events, native_cycles: f64) -> Self {
        let of = |(technique, name): (Technique, &str)| {
            let processor: Option<&Processor> = PROCESSORS.iter().find(|processor| processor.name == name);
            processor.map(|processor| predict(&events, native_cycles, technique, processor))
        };
        let predictions = SHOWN.into_iter().filter_map(of).collect();
        Self { name: name.to_owned(), operation: operation.to_owned(), native_cycles, events, predictions }
    }

    /// The prediction for a technique on a processor.
    #[must_use]
    pub fn find(&self, technique: Technique, processor: &str) -> Option<&Prediction> {
        self.predictions.iter().find(|p| p.technique == technique && p.processor == processor)
    }
}

/// The percentage, or the two bounds of it.
#[must_use]
pub fn percent(prediction: &Prediction) -> String {
    let (low, high) = (prediction.percent_low, prediction.percent);
    if high - low < 0.5 { rounded(high) } else { format!("{}-{}", rounded(low), rounded(high)) }
}

fn rounded(percent: f64) -> String {
    if percent < 9.95 { format!("{percent:.1}") } else { format!("{percent:.0}") }
}

/// All predictions, the events they come from, and the talk's table if its programs are among them. Empty for none.
#[must_use]
pub fn render(all: &[Predicted]) -> String {
    if all.is_empty() {
        return String::new();
    }
    let mut text = String::from(
        "Prediction, not measurement: percent of native = native cycles / (native cycles + events × published costs).\n\
         Where there are two numbers, the page walker's own caches are empty, or always hit.\n",
    );
    text.push_str(&align(&predictions(all)));
    text.push_str("\nWhat was counted in one operation (interpreter, one CPU), and the dearest of it:\n");
    text.push_str(&align(&counts(all)));
    let talk = said(all);
    if talk.len() > 1 {
        text.push_str("\nThe talk of 2007 (TA68) and this model: Bob's system translates, Victor's has VT-x, Nat's nested paging.\n");
        text.push_str(&align(&talk));
    }
    text
}

fn predictions(all: &[Predicted]) -> Vec<Vec<String>> {
    let mut head = vec!["predicted".to_owned(), String::new()];
    head.extend(all.iter().map(|one| one.name.clone()));
    let mut lines = vec![head];
    for (n, (technique, processor)) in SHOWN.iter().enumerate() {
        let mut line = vec![technique.name().to_owned(), (*processor).to_owned()];
        line.extend(all.iter().map(|one| one.predictions.get(n).map_or_else(String::new, percent)));
        lines.push(line);
    }
    lines
}

fn counts(all: &[Predicted]) -> Vec<Vec<String>> {
    let mut lines = vec![{
        let mut head = vec!["counted".to_owned(), String::new()];
        head.extend(all.iter().map(|one| format!("{} ({})", one.name, one.operation)));
        head
    }];
    let mut native = vec!["native cycles, here".to_owned(), String::new()];
    native.extend(all.iter().map(|one| count(one.native_cycles)));
    lines.push(native);
    for (n, (name, _)) in Events::default().rows().iter().enumerate() {
        let row: Vec<f64> = all.iter().map(|one| one.events.rows()[n].1).collect();
        if row.iter().any(|value| *value >= 0.0005) {
            lines.push(
                [(*name).to_owned(), String::new()].into_iter().chain(row.into_iter().map(count)).collect(),
            );
        }
    }
    for (technique, processor) in [(Technique::Shadow, "Core 2 Duo"), (Technique::Nested, "Sandy Bridge")] {
        let dearest = |one: &Predicted| {
            let term = one.find(technique, processor)?.terms.first()?;
            let share = term.cycles() / one.native_cycles * 100.0;
            (share >= 0.5).then(|| format!("{} +{share:.0} %", term.event))
        };
        let mut line = vec![format!("dearest, {}", technique.name()), String::new()];
        line.extend(all.iter().map(|one| dearest(one).unwrap_or_else(|| "-".to_owned())));
        lines.push(line);
    }
    lines
}

/// The talk's rows: what it said, what we predict, and a word where they differ.
fn said(all: &[Predicted]) -> Vec<Vec<String>> {
    let mut head = vec!["percent of native".to_owned(), String::new()];
    for technique in talk::SYSTEMS {
        head.push(format!("{}: said", technique.name()));
        head.push("predicted".to_owned());
        head.push(String::new());
    }
    let mut lines = vec![head];
    for said in talk::TABLE {
        let Some(one) = all.iter().find(|one| one.name == said.benchmark) else { continue };
        let Some((_, predictions)) = talk::row(said.benchmark, &one.events, one.native_cycles) else {
            continue;
        };
        let mut line = vec![said.benchmark.to_owned(), String::new()];
        for (said, prediction) in said.percent.iter().zip(&predictions) {
            line.push(format!("{said:.0}"));
            line.push(percent(prediction));
            line.push(talk::verdict(*said, prediction).to_owned());
        }
        lines.push(line);
    }
    lines
}

/// Some three digits.
fn count(value: f64) -> String {
    match value {
        v if v >= 99.95 => format!("{v:.0}"),
        v if v >= 0.995 => format!("{v:.1}"),
        v if v >= 0.0005 => format!("{v:.3}"),
        _ => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_hold_predictions_counts_and_what_the_talk_said() {
        let events = Events { system_calls: 1.0, returns: 1.0, instructions: 250.0, ..Events::default() };
        let text = render(&[Predicted::new("getppid", "call", events, 300.0)]);
        assert!(text.starts_with("Prediction, not measurement"), "{text}");
        assert!(text.contains("nested paging        EPYC (Zen)"), "{text}");
        assert!(text.contains("getppid (call)") && text.contains("binary translation: said"), "{text}");
        assert!(text.contains("below the talk"), "{text}");
        assert_eq!(render(&[]), "");
        assert!(!render(&[Predicted::new("gzip", "byte", events, 300.0)]).contains("The talk of 2007"));
    }
}
