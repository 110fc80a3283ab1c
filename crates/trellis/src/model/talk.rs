//! What VMware's talk TA68 (VMworld 2007, "A Complex Picture Emerges") said of four programs, "very rounded", and our prediction beside it.

use serde::Serialize;

use super::costs::{PROCESSORS, Processor};
use super::events::Events;
use super::predict::{Prediction, Technique, predict};

/// The talk's systems: Bob's, Victor's, Nat's.
pub const SYSTEMS: [Technique; 3] = [Technique::Translation, Technique::Shadow, Technique::Nested];

/// A row of the talk's table.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Said {
    /// The program; the benchmark of ours has the same name.
    pub benchmark: &'static str,
    /// Percent of native, by [`SYSTEMS`].
    pub percent: [f64; 3],
}

/// The table.
pub const TABLE: [Said; 4] = [
    Said { benchmark: "sum", percent: [95.0, 95.0, 95.0] },
    Said { benchmark: "getppid", percent: [25.0, 95.0, 95.0] },
    Said { benchmark: "forkwait", percent: [15.0, 5.0, 85.0] },
    Said { benchmark: "memsweep", percent: [85.0, 85.0, 40.0] },
];

/// The processor that we take for a system: the talk compares "apples" and "oranges" too.
#[must_use]
pub fn processor(technique: Technique) -> &'static Processor {
    let name = if technique == Technique::Nested { "Opteron 'Barcelona'" } else { "Pentium 4 672" };
    PROCESSORS.iter().find(|processor| processor.name == name).unwrap_or(&PROCESSORS[0])
}

/// A row of the table with our predictions.
#[must_use]
pub fn row(benchmark: &str, events: &Events, native: f64) -> Option<(Said, [Prediction; 3])> {
    let said = TABLE.into_iter().find(|said| said.benchmark == benchmark)?;
    Some((said, SYSTEMS.map(|technique| predict(events, native, technique, processor(technique)))))
}

/// How far the prediction is from what was said, in words; nothing if the bounds hold it or it is off by less than a quarter.
#[must_use]
pub fn verdict(said: f64, prediction: &Prediction) -> &'static str {
    let inside = prediction.percent_low <= said && said <= prediction.percent;
    let near = |percent: f64| (percent / said).ln().abs() < 1.25f64.ln();
    if inside || near(prediction.percent) || near(prediction.percent_low) {
        ""
    } else if prediction.percent > said {
        "above the talk"
    } else {
        "below the talk"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systems_run_on_processors_that_can() {
        assert!(processor(Technique::Nested).has_nested_paging);
        assert_eq!(processor(Technique::Shadow).name, "Pentium 4 672");
    }

    #[test]
    fn reasoning_of_the_talk_follows_from_events() {
        // A system call and nothing else: the translator alone suffers.
        let call = Events { system_calls: 1.0, returns: 1.0, ..Events::default() };
        let (said, [translation, shadow, nested]) = row("getppid", &call, 700.0).unwrap();
        assert_eq!(said.percent, [25.0, 95.0, 95.0]);
        assert!(translation.percent < 30.0 && shadow.percent > 99.0 && nested.percent > 99.0);
        // A walk each time: nested paging alone does.
        let sweep = Events { walks: 1.0, ..Events::default() };
        let (_, [translation, shadow, nested]) = row("memsweep", &sweep, 40.0).unwrap();
        assert!(translation.percent > 99.0 && shadow.percent > 99.0);
        assert!(nested.percent_low < 40.0 && nested.percent > 40.0);
        assert!(row("nosuch", &sweep, 1.0).is_none());
    }

    #[test]
    fn verdict_is_silent_within_a_quarter_or_the_bounds() {
        let prediction = |percent_low, percent| Prediction {
            technique: Technique::Nested,
            processor: "x",
            percent_low,
            percent,
            terms: Vec::new(),
        };
        assert_eq!(verdict(40.0, &prediction(10.0, 60.0)), "");
        assert_eq!(verdict(25.0, &prediction(30.0, 30.0)), "");
        assert_eq!(verdict(15.0, &prediction(30.0, 30.0)), "above the talk");
        assert_eq!(verdict(95.0, &prediction(30.0, 60.0)), "below the talk");
    }
}
