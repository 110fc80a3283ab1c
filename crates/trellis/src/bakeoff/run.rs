//! A command in each mode: the same root everywhere, runs in turn forth and back, the engine's statistics before and after.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use super::args::BakeoffArgs;
use crate::bench::guest::Place;
use crate::bench::mode::{MODES, Mode};
use crate::bench::predict::{CENSUS, statistics};
use crate::bench::root::Root;
use crate::bench::session::{Answer, Session, SessionError};
use crate::model::events::Events;
use crate::progress::Progress;

/// The benchmark program's name for the command in its root.
const COMMAND: &str = "command";

/// What a mode gave.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Seconds of each run, by the host's clock.
    pub times: Vec<f64>,
    /// CPU seconds of each run, as the system that ran it says.
    pub cpu: Vec<f64>,
    /// Seconds from the start of the process to the first answer; of a whole machine: none.
    pub boot: Option<f64>,
    /// Why there is nothing although nothing failed.
    pub skipped: Option<String>,
    /// What failed.
    pub error: Option<String>,
    /// Statistics of the engine before the first run and after the last.
    pub statistics: Option<(Value, Value)>,
}

impl Outcome {
    /// All runs together.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.times.iter().sum()
    }
}

/// A mode under way.
struct Lane {
    mode: &'static Mode,
    session: Option<Session>,
    directory: Option<TempDir>,
    outcome: Outcome,
    before: Option<Value>,
}

impl Lane {
    fn socket(&self) -> Option<PathBuf> {
        self.directory.as_ref().map(|directory| directory.path().join("control"))
    }

    fn statistics(&self) -> Option<Value> {
        statistics(&self.socket()?).ok()
    }
}

/// Runs the command in all modes.
///
/// # Errors
/// Only when the user interrupts.
pub fn all(
    args: &BakeoffArgs,
    place: &Place,
    progress: &Progress,
    interrupted: &Arc<AtomicBool>,
) -> Result<Vec<(&'static Mode, Outcome)>, SessionError> {
    let timeout = Duration::from_secs_f64(args.timeout);
    let mut lanes: Vec<Lane> = args.modes().into_iter().map(Lane::new).collect();
    for lane in &mut lanes {
        progress.at(&format!("starting {}", lane.mode.name));
        match start(lane, place, timeout, interrupted) {
            Ok(session) => {
                lane.outcome.boot = lane.mode.needs_kernel().then_some(session.boot.as_secs_f64());
                lane.session = Some(session);
                lane.before = lane.statistics();
            }
            Err(SessionError::Interrupted) => return Err(SessionError::Interrupted),
            Err(SessionError::NotStarted(reason)) => lane.outcome.skipped = Some(reason),
            Err(error) => lane.outcome.error = Some(error.to_string()),
        }
        progress.advance(1);
    }
    let count = lanes.len();
    for run in 0..args.runs() {
        for n in 0..count {
            let lane = &mut lanes[if run % 2 == 0 { n } else { count - 1 - n }];
            progress.at(&format!("run {} of {} ({})", run + 1, args.runs(), lane.mode.name));
            one_run(lane)?;
            progress.advance(1);
        }
    }
    Ok(lanes.into_iter().map(finish).collect())
}

impl Lane {
    fn new(mode: &'static Mode) -> Self {
        Self { mode, session: None, directory: None, outcome: Outcome::default(), before: None }
    }
}

/// Starts the mode; an engine of ours with a control socket, the translator with samples.
fn start(
    lane: &mut Lane,
    place: &Place,
    timeout: Duration,
    interrupted: &Arc<AtomicBool>,
) -> Result<Session, SessionError> {
    let mut command = lane.mode.command(place, Root::Programs).map_err(SessionError::NotStarted)?;
    if let Some(engine) = lane.mode.engine() {
        let directory = tempfile::tempdir().map_err(|error| SessionError::NotStarted(error.to_string()))?;
        command.arg("--control").arg(directory.path().join("control"));
        if engine == "bt" {
            command.args(super::PROFILE);
        }
        lane.directory = Some(directory);
    }
    Session::start(command, timeout, interrupted)
}

fn one_run(lane: &mut Lane) -> Result<(), SessionError> {
    let Some(session) = &mut lane.session else { return Ok(()) };
    match session.measure(COMMAND, 1, 100) {
        Ok(Answer::Done(sample)) => {
            // A busy host lets us see the marks of a short command together; the program's own clock is there then.
            let own = sample.guest_ns.filter(|_| sample.host_ns <= 0.0);
            lane.outcome.times.push(own.unwrap_or(sample.host_ns) / 1e9);
            lane.outcome.cpu.extend(sample.cpu_ns.map(|cpu| cpu / 1e9));
        }
        Ok(Answer::Skipped(reason)) => {
            lane.outcome.skipped = Some(reason);
            lane.session = None;
        }
        Err(SessionError::Interrupted) => return Err(SessionError::Interrupted),
        Err(error) => {
            lane.outcome.error = Some(in_words(&error.to_string()));
            lane.session = None;
        }
    }
    Ok(())
}

fn finish(mut lane: Lane) -> (&'static Mode, Outcome) {
    if lane.session.is_some() && !lane.outcome.times.is_empty() {
        lane.outcome.statistics = lane.before.take().zip(lane.statistics());
    }
    (lane.mode, lane.outcome)
}

/// What the benchmark program says of a wait status, as a user knows it.
#[must_use]
pub fn in_words(error: &str) -> String {
    let status = error.split_once("wait status 0x").map(|(_, rest)| rest);
    let digits = status.map(|rest| rest.split(|c: char| !c.is_ascii_hexdigit()).next().unwrap_or(""));
    let Some(status) = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok()) else {
        return error.to_owned();
    };
    let said = error.split_once("its last words: ").map_or_else(String::new, |(_, said)| format!(": {said}"));
    match (status & 0x7f, status >> 8) {
        (0, 127) => format!("the command could not be started (status 127){said}"),
        (0, status) => format!("the command ended with status {status}{said}"),
        (signal, _) => format!("the command was ended by signal {signal}{said}"),
    }
}

/// What one run of the command does, counted in an interpreted guest.
///
/// # Errors
/// It cannot be counted: why.
pub fn count(
    args: &BakeoffArgs,
    place: &Place,
    interrupted: &Arc<AtomicBool>,
) -> Result<Events, SessionError> {
    let mode = MODES.iter().find(|mode| mode.engine() == Some("interp"));
    let mode = mode.ok_or_else(|| SessionError::NotStarted("there is no interpreter".to_owned()))?;
    let mut command = mode.command(place, Root::Programs).map_err(SessionError::NotStarted)?;
    let directory = tempfile::tempdir().map_err(|error| SessionError::NotStarted(error.to_string()))?;
    let socket = directory.path().join("control");
    command.env(CENSUS.0, CENSUS.1).args(["--clock", "icount", "--control"]).arg(&socket);
    let mut session = Session::start(command, Duration::from_secs_f64(args.timeout), interrupted)?;
    let before = statistics(&socket)?;
    match session.measure(COMMAND, 1, 100)? {
        Answer::Done(_) => {}
        Answer::Skipped(reason) => return Err(SessionError::NotStarted(reason)),
    }
    let after = statistics(&socket)?;
    Events::between(&before, &after, 1.0).ok_or_else(|| SessionError::Nonsense("no census".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_told_in_words() {
        let error = |status: &str, said: &str| {
            in_words(&format!(
                "it answered: ERR command: a program of its work ended with wait status {status}{said}"
            ))
        };
        assert_eq!(
            error("0x300", "; its last words: no such file"),
            "the command ended with status 3: no such file"
        );
        assert_eq!(error("0xb", ""), "the command was ended by signal 11");
        assert!(error("0x7f00", "").contains("could not be started"));
        assert_eq!(in_words("no answer within 5 s"), "no answer within 5 s");
    }
}
