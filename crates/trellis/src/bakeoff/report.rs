//! The result: what each mode took and why.

use serde::Serialize;

use super::account::{Account, Profile};
use super::explain::{Explanation, explain};
use super::hot::{self, Function, Names};
use super::run::Outcome;
use crate::bench::host::Host;
use crate::bench::mode::{Mode, REFERENCE};
use crate::bench::stats;
use crate::model::table::Predicted;

/// Version of the JSON.
const FORMAT: u32 = 1;
/// Functions that are shown.
const FUNCTIONS: usize = 12;

/// All of it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Bakeoff {
    /// Version of this form.
    pub format: u32,
    /// The command, or what machine.
    pub workload: String,
    /// The host.
    pub host: Option<Host>,
    /// CPU time of a native run: what the explanations and the prediction begin with.
    pub native_cpu_seconds: Option<f64>,
    /// The modes, in the order of the command line.
    pub modes: Vec<ModeResult>,
    /// What other ways of virtualization would make of it.
    pub predicted: Option<Predicted>,
    /// What a reader must know.
    pub notes: Vec<String>,
    /// What follows from the numbers.
    pub advice: Vec<String>,
}

/// A mode.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ModeResult {
    /// Its name.
    pub name: &'static str,
    /// Seconds of each run.
    pub times: Vec<f64>,
    /// Their median.
    pub seconds: Option<f64>,
    /// Largest minus smallest, in percent of the median.
    pub spread: Option<f64>,
    /// Native time by this time.
    pub percent_of_native: Option<f64>,
    /// Seconds of the guest's boot, which are in no run.
    pub boot_seconds: Option<f64>,
    /// Why it was left out.
    pub skipped: Option<String>,
    /// What failed.
    pub error: Option<String>,
    /// Where the time of all runs went.
    pub explanation: Option<Explanation>,
    /// Where the samples were.
    pub profile: Option<Profile>,
    /// The guest functions with the most samples.
    pub functions: Vec<Function>,
}

/// What a native run takes.
#[derive(Clone, Copy, Debug, Default)]
struct Native {
    /// By the clock.
    seconds: Option<f64>,
    /// Of CPU time.
    cpu: Option<f64>,
}

impl ModeResult {
    /// The result of a mode whose runs took so long; a native run takes `native`.
    #[must_use]
    pub fn of_times(name: &'static str, times: &[f64], native: Option<f64>) -> Self {
        let seconds = stats::median(times);
        Self {
            name,
            times: times.to_vec(),
            seconds,
            spread: stats::spread_percent(times),
            percent_of_native: native.zip(seconds).map(|(native, seconds)| native / seconds * 100.0),
            ..Self::default()
        }
    }

    fn new(mode: &Mode, outcome: Outcome, native: Native, is_machine: bool, names: &Names) -> Self {
        let mut result = Self::of_times(mode.name, &outcome.times, native.seconds);
        if let Some((before, after)) = &outcome.statistics {
            let account = Account::between(before, after);
            // Of a whole machine the last run's statistics are there, else those of all runs together.
            let explained =
                if is_machine { outcome.times.last().copied().unwrap_or(0.0) } else { outcome.seconds() };
            let runs = if is_machine { 1.0 } else { outcome.times.len() as f64 };
            result.explanation = Some(explain(explained, &account, native.cpu.map(|cpu| cpu * runs)));
            result.functions = account
                .profile
                .as_ref()
                .map_or_else(Vec::new, |p| hot::functions(&p.sites, names, FUNCTIONS));
            result.profile = account.profile;
        }
        result.boot_seconds = outcome.boot;
        (result.skipped, result.error) = (outcome.skipped, outcome.error);
        result
    }
}

impl Bakeoff {
    /// Puts together what was measured.
    #[must_use]
    pub fn new(
        workload: String,
        outcomes: Vec<(&'static Mode, Outcome)>,
        is_machine: bool,
        names: &Names,
    ) -> Self {
        let native = outcomes.iter().find(|(mode, _)| mode.name == REFERENCE);
        let native = native.map_or_else(Native::default, |(_, outcome)| Native {
            seconds: stats::median(&outcome.times),
            cpu: stats::median(&outcome.cpu).or_else(|| stats::median(&outcome.times)),
        });
        let modes: Vec<ModeResult> = outcomes
            .into_iter()
            .map(|(mode, outcome)| ModeResult::new(mode, outcome, native, is_machine, names))
            .collect();
        let native_cpu_seconds = native.cpu;
        Self {
            format: FORMAT,
            workload,
            host: Some(Host::now()),
            native_cpu_seconds,
            modes,
            ..Self::default()
        }
    }

    /// As JSON.
    #[must_use]
    pub fn json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).expect("the result is plain data");
        text.push('\n');
        text
    }

    /// Whether something was measured and nothing failed.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.modes.iter().any(|mode| mode.seconds.is_some())
            && self.modes.iter().all(|mode| mode.error.is_none())
    }
}
