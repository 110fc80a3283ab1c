//! `--predict`: counts what each benchmark does in an interpreted guest with a census, and asks the cost model what that would cost elsewhere.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde_json::Value;

use super::args::Plan;
use super::catalog::Benchmark;
use super::guest::Place;
use super::matrix::{next_count, root_of};
use super::mode::{MODES, Mode, REFERENCE};
use super::report::Report;
use super::root::Root;
use super::session::{Answer, Session, SessionError};
use crate::control::client;
use crate::model::events::Events;
use crate::model::table::Predicted;
use crate::progress::Progress;

/// How long the counted work is to last in the interpreter.
const TARGET: Duration = Duration::from_millis(500);
/// Steps until it does.
const MAX_STEPS: u32 = 6;
/// The environment variable that asks for a census, and its value.
pub const CENSUS: (&str, &str) = ("TRELLIS_INTERP", "census");
/// The mode that counts.
const COUNTING: &str = "interp";

/// Predicts for every benchmark of the report that has a native value of its own. What cannot be counted is a note.
///
/// # Errors
/// Only when the user interrupts.
pub fn predict(
    plan: &Plan,
    place: &Place,
    report: &Report,
    progress: &Progress,
    interrupted: &Arc<AtomicBool>,
) -> Result<(Vec<Predicted>, Vec<String>), SessionError> {
    let (mut all, mut notes) = (Vec::new(), Vec::new());
    let mut counter = Counter { plan, place, interrupted, session: None };
    for benchmark in plan.benchmarks.iter().filter(|benchmark| !benchmark.is_nano()) {
        // The run that other work on the host disturbed least; they are in the unit of the value.
        let row = report.row(benchmark.name, REFERENCE).filter(|row| row.value.is_some());
        let native = row.and_then(|row| row.samples.iter().copied().min_by(f64::total_cmp));
        let Some(nanoseconds) = native else {
            notes.push(format!("{}: nothing is predicted without a native time", benchmark.name));
            continue;
        };
        progress.at(&format!("counting {}", benchmark.name));
        match counter.count(benchmark) {
            Ok(events) => {
                let cycles = nanoseconds * report.host.tsc_hz / 1e9;
                all.push(Predicted::new(benchmark.name, benchmark.operation, events, cycles));
            }
            Err(SessionError::Interrupted) => return Err(SessionError::Interrupted),
            Err(error) => {
                counter.session = None;
                notes.push(format!("{}: nothing is predicted: {error}", benchmark.name));
            }
        }
    }
    Ok((all, notes))
}

/// An interpreted guest with a census, and its control socket.
struct Counter<'a> {
    plan: &'a Plan,
    place: &'a Place,
    interrupted: &'a Arc<AtomicBool>,
    session: Option<(Root, Session, tempfile::TempDir)>,
}

impl Counter<'_> {
    fn count(&mut self, benchmark: &Benchmark) -> Result<Events, SessionError> {
        let size = self.plan.size_percent;
        let (session, socket) = self.session(root_of(benchmark))?;
        let mut count = 1;
        for _ in 0..MAX_STEPS {
            let sample = sample(session.measure(benchmark.name, count, size)?)?;
            match next_count(count, &sample, TARGET) {
                Some(more) => count = more,
                None => break,
            }
        }
        let before = statistics(&socket)?;
        let sample = sample(session.measure(benchmark.name, count, size)?)?;
        let after = statistics(&socket)?;
        Events::between(&before, &after, sample.ops)
            .ok_or_else(|| SessionError::Nonsense("no census in the statistics".to_owned()))
    }

    fn session(&mut self, root: Root) -> Result<(&mut Session, std::path::PathBuf), SessionError> {
        if self.session.as_ref().is_none_or(|(other, ..)| *other != root) {
            self.session = None;
            let not_started = |error: String| SessionError::NotStarted(error);
            let directory = tempfile::tempdir().map_err(|error| not_started(error.to_string()))?;
            let mode: &Mode = MODES
                .iter()
                .find(|mode| mode.name == COUNTING)
                .ok_or_else(|| not_started("no interpreter".to_owned()))?;
            let mut command = mode.command(self.place, root).map_err(not_started)?;
            // Guest time goes with instructions: an interpreter is slow, and would count an interrupt of the timer more often.
            command.args(["--clock", "icount"]);
            command.env(CENSUS.0, CENSUS.1).arg("--control").arg(directory.path().join("control"));
            let session = Session::start(command, self.plan.timeout, self.interrupted)?;
            self.session = Some((root, session, directory));
        }
        let (_, session, directory) = self.session.as_mut().expect("it was started just now");
        Ok((session, directory.path().join("control")))
    }
}

fn sample(answer: Answer) -> Result<super::session::Sample, SessionError> {
    match answer {
        Answer::Done(sample) => Ok(sample),
        Answer::Skipped(reason) => Err(SessionError::Nonsense(reason)),
    }
}

/// The statistics of the machine behind a control socket.
///
/// # Errors
/// It does not answer.
pub fn statistics(socket: &Path) -> Result<Value, SessionError> {
    let text = client::stats_json(socket.to_str()).map_err(SessionError::Ended)?;
    serde_json::from_str(&text).map_err(|error| SessionError::Nonsense(error.to_string()))
}
