//! `--compare`: this result beside one that was saved, perhaps by another version of the program on another host.
//!
//! What both have is compared, by name and unit. Two runs are two states of the host, so a ratio says something only where
//! the samples of one lie wholly on one side of the other's; and it is the percent of native that takes the host's mood out.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::mode::REFERENCE;
use super::report::{FORMAT, Report, Row};
use super::stats::geometric_mean;
use super::table::{align, percent, value};
use crate::prepare::PrepareError;

/// How far native may be off its old time, on average, for times to be compared.
const SAME_HOST: f64 = 1.05;

/// A saved result, as far as it is needed; what another version left out is not missed.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Old {
    format: u32,
    trellis: String,
    host: OldHost,
    settings: OldSettings,
    rows: Vec<OldRow>,
    /// The file.
    #[serde(skip)]
    name: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct OldHost {
    cpu: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct OldSettings {
    quick: bool,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct OldRow {
    benchmark: String,
    mode: String,
    value: Option<f64>,
    unit: String,
    percent_of_native: Option<f64>,
    samples: Vec<f64>,
}

/// What became of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Every sample is below every old one.
    Faster,
    /// Every sample is above every old one.
    Slower,
    /// The samples overlap.
    Same,
    /// Too few samples for a word.
    Unsure,
}

impl Verdict {
    fn of(old: &[f64], new: &[f64]) -> Self {
        if old.len() < 2 || new.len() < 2 {
            return Self::Unsure;
        }
        let range = |samples: &[f64]| {
            samples.iter().fold((f64::MAX, f64::MIN), |(low, high), &x| (x.min(low), x.max(high)))
        };
        let ((old_low, old_high), (low, high)) = (range(old), range(new));
        match () {
            () if high < old_low => Self::Faster,
            () if low > old_high => Self::Slower,
            () => Self::Same,
        }
    }

    /// In words.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Faster => "faster",
            Self::Slower => "slower",
            Self::Same => "within the spread",
            Self::Unsure => "one run only",
        }
    }
}

/// A row of both.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// The benchmark.
    pub benchmark: String,
    /// The mode.
    pub mode: String,
    /// The unit of both values.
    pub unit: String,
    /// The old value.
    pub old: f64,
    /// The new value.
    pub new: f64,
    /// New by old: below 1 is faster.
    pub ratio: f64,
    /// Percent of native of both.
    pub percent_of_native: Option<(f64, f64)>,
    /// What may be said of it.
    pub verdict: Verdict,
}

/// The comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Comparison {
    /// The old result's file.
    pub file: String,
    /// What both have.
    pub rows: Vec<Compared>,
    /// What a reader must know.
    pub notes: Vec<String>,
}

impl Old {
    /// Reads a saved result.
    ///
    /// # Errors
    /// The file cannot be read, or is none.
    pub fn read(file: &Path) -> Result<Self, PrepareError> {
        let name = file.display().to_string();
        let text = std::fs::read_to_string(file)
            .map_err(|error| PrepareError::Usage(format!("cannot read the result {name}: {error}")))?;
        let old: Self = serde_json::from_str(&text)
            .map_err(|error| PrepareError::Usage(format!("{name} is no result of trellis bench: {error}")))?;
        if old.rows.is_empty() {
            return Err(PrepareError::Usage(format!("{name} is no result of trellis bench: it has no rows")));
        }
        Ok(Self { name, ..old })
    }

    fn row(&self, row: &Row) -> Option<&OldRow> {
        let mut rows = self.rows.iter();
        rows.find(|old| old.benchmark == row.benchmark && old.mode == row.mode && old.unit == row.unit)
    }

    /// Compares.
    #[must_use]
    pub fn compare(&self, new: &Report) -> Comparison {
        let compared = |row: &Row| {
            let old = self.row(row)?;
            let (before, now) = old.value.zip(row.value)?;
            Some(Compared {
                benchmark: old.benchmark.clone(),
                mode: old.mode.clone(),
                unit: old.unit.clone(),
                old: before,
                new: now,
                ratio: now / before,
                percent_of_native: old.percent_of_native.zip(row.percent_of_native),
                verdict: Verdict::of(&old.samples, &row.samples),
            })
        };
        let rows: Vec<Compared> = new.rows.iter().filter_map(compared).collect();
        Comparison { file: self.name.clone(), notes: self.notes(new, &rows), rows }
    }

    fn notes(&self, new: &Report, rows: &[Compared]) -> Vec<String> {
        let mut notes = Vec::new();
        if self.format != FORMAT || self.trellis != new.trellis {
            notes.push(format!(
                "{} is of trellis {}, form {}; this is {}, form {FORMAT}: only rows of the same name and unit are compared.",
                self.name,
                if self.trellis.is_empty() { "?" } else { &self.trellis },
                self.format,
                new.trellis
            ));
        }
        if self.host.cpu != new.host.cpu {
            notes.push(format!("{} was measured on {}: compare percentages only.", self.name, self.host.cpu));
        }
        notes.extend(other_mood(rows));
        if self.settings.quick != new.settings.quick {
            notes.push("One of the two was --quick, in which real programs have less to do.".to_owned());
        }
        let only_old = self.rows.iter().filter(|old| old.value.is_some()).count().saturating_sub(rows.len());
        let only_new = new.rows.iter().filter(|row| row.value.is_some()).count().saturating_sub(rows.len());
        if only_old + only_new > 0 {
            notes
                .push(format!("{only_old} rows are in the old result only, {only_new} in the new one only."));
        }
        notes
    }
}

/// A line if the host itself was faster or slower, by its own programs, and everything with it.
fn other_mood(rows: &[Compared]) -> Option<String> {
    let native: Vec<f64> = rows.iter().filter(|row| row.mode == REFERENCE).map(|row| row.ratio).collect();
    let ratio = geometric_mean(&native)?;
    (!(1.0 / SAME_HOST..=SAME_HOST).contains(&ratio)).then(|| {
        format!("Native itself takes {ratio:.2} of its old time: the host was in another state, so compare percentages of native.")
    })
}

impl Comparison {
    /// As a table.
    #[must_use]
    pub fn render(&self) -> String {
        let head = ["benchmark", "mode", "old", "new", "new/old", "old of native", "new of native", ""];
        let mut lines = vec![head.map(str::to_owned).to_vec()];
        for row in &self.rows {
            let (before, now) = row
                .percent_of_native
                .map_or_else(Default::default, |(before, now)| (percent(before), percent(now)));
            lines.push(vec![
                row.benchmark.clone(),
                row.mode.clone(),
                value(row.old, &row.unit),
                value(row.new, &row.unit),
                format!("{:.2}", row.ratio),
                before,
                now,
                row.verdict.word().to_owned(),
            ]);
        }
        let count = |verdict| self.rows.iter().filter(|row| row.verdict == verdict).count();
        let mut text = format!("\nCompared with {}:\n{}", self.file, align(&lines));
        let (faster, slower) = (count(Verdict::Faster), count(Verdict::Slower));
        text += &format!(
            "{faster} faster and {slower} slower (all runs on one side of the old ones), {} of {} within the spread or of one run.\n",
            self.rows.len() - faster - slower,
            self.rows.len()
        );
        self.notes.iter().for_each(|note| text += &format!("{note}\n"));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::tests::example;

    fn old(text: &str) -> Result<Old, PrepareError> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Old::read(file.path())
    }

    #[test]
    fn own_result_compares_with_itself() {
        let report = example();
        let comparison = old(&report.json()).unwrap().compare(&report);
        assert_eq!(comparison.rows.len(), 3);
        assert!(comparison.rows.iter().all(|row| row.ratio == 1.0 && row.verdict == Verdict::Same));
        assert!(comparison.notes.is_empty(), "{:?}", comparison.notes);
        assert!(comparison.render().contains("0 faster and 0 slower"));
    }

    #[test]
    fn other_version_is_one_line_and_what_matches_is_compared() {
        let text = r#"{"format": 0, "trellis": "0.0.9", "rows": [
            {"benchmark": "sum", "mode": "interp", "unit": "ns/op", "value": 80, "samples": [79, 80, 81], "new": 1},
            {"benchmark": "sum", "mode": "native", "unit": "s", "value": 80},
            {"benchmark": "gone", "mode": "interp", "unit": "ns/op", "value": 1}]}"#;
        let comparison = old(text).unwrap().compare(&example());
        assert_eq!(comparison.rows.len(), 1);
        assert_eq!((comparison.rows[0].ratio, comparison.rows[0].verdict), (0.5, Verdict::Faster));
        assert_eq!(comparison.notes.iter().filter(|note| note.contains("trellis 0.0.9, form 0")).count(), 1);
        assert!(
            comparison.notes.iter().any(|note| note.starts_with("2 rows are in the old result only, 2 in")),
            "{:?}",
            comparison.notes
        );
    }

    #[test]
    fn host_in_another_state_is_a_line() {
        let text =
            r#"{"format": 1, "rows": [{"benchmark": "sum", "mode": "native", "unit": "ns/op", "value": 4}]}"#;
        let comparison = old(text).unwrap().compare(&example());
        assert!(
            comparison.notes.iter().any(|note| note.starts_with("Native itself takes 0.50")),
            "{:?}",
            comparison.notes
        );
    }

    #[test]
    fn overlapping_samples_say_nothing() {
        assert_eq!(Verdict::of(&[1.0, 2.0], &[1.9, 3.0]), Verdict::Same);
        assert_eq!(Verdict::of(&[1.0, 2.0], &[2.1, 3.0]), Verdict::Slower);
        assert_eq!(Verdict::of(&[1.0], &[2.1, 3.0]), Verdict::Unsure);
    }

    #[test]
    fn what_is_no_result_is_refused() {
        for text in ["", "[]", "{\"rows\": []}", "{\"rows\": 7}"] {
            assert!(
                matches!(old(text), Err(PrepareError::Usage(line)) if line.contains("no result")),
                "{text}"
            );
        }
        assert!(matches!(Old::read(Path::new("/nonexistent/a")), Err(PrepareError::Usage(_))));
    }
}
