//! The matrix benchmarks × modes: each cell is calibrated, then all modes of a benchmark are measured in turn, forth and
//! back (A B C C B A A B C …), so that what else the host does, and what changes steadily, meets all of them alike.
//!
//! A mode has one session, which lives through all benchmarks of one root; one that times out or dies is started again for
//! the next benchmark. The modes that are not measured wait in the guest for a command and cost next to nothing.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use super::args::Plan;
use super::catalog::{Benchmark, Native};
use super::guest::Place;
use super::mode::{Mode, REFERENCE};
use super::root::Root;
use super::session::{Answer, Sample, Session, SessionError};
use super::{stats, table};
use crate::progress::Progress;

/// Calibration multiplies the count of iterations by at most this.
const MAX_GROWTH: f64 = 50.0;
/// Why a process does not do an operation.
pub const PRIVILEGED: &str = "it is the kernel's to do";
/// Steps of a calibration at most.
const MAX_STEPS: u32 = 12;

/// What a benchmark gave in a mode.
#[derive(Clone, Debug, Default)]
pub struct Cell {
    /// Nanoseconds per operation, one a run.
    pub samples: Vec<f64>,
    /// Guest time against host time in percent, one a run.
    pub deviations: Vec<f64>,
    /// How long the runs took together.
    pub spent: Duration,
    /// Digest of what was computed.
    pub check: Option<String>,
    /// Iterations a run.
    pub count: u64,
    /// The program cannot do it here: why.
    pub skipped: Option<String>,
    /// It failed: why.
    pub error: Option<String>,
    /// It failed by giving no answer in time.
    pub timed_out: bool,
}

/// What became of a mode.
#[derive(Clone, Debug, Default)]
pub struct ModeResult {
    /// Seconds from the start of the process to the program's first answer, for each start.
    pub boots: Vec<f64>,
    /// Why it was left out.
    pub skipped: Option<String>,
}

/// All that was measured: `cells[benchmark][mode]`, `modes[mode]`.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    /// By benchmark and mode, in the plan's order.
    pub cells: Vec<Vec<Cell>>,
    /// By mode, in the plan's order.
    pub modes: Vec<ModeResult>,
    /// What the sessions said about themselves, each once.
    pub notes: Vec<String>,
}

/// The run.
pub struct Matrix<'a> {
    plan: &'a Plan,
    place: &'a Place,
    progress: &'a Progress,
    interrupted: &'a Arc<AtomicBool>,
    sessions: Vec<Option<(Root, Session)>>,
    modes: Vec<ModeResult>,
    /// By mode: the roots in which it does not start although it may in others, and why.
    without: Vec<Vec<(Root, String)>>,
    notes: Vec<String>,
}

impl<'a> Matrix<'a> {
    /// Nothing is started yet.
    #[must_use]
    pub fn new(
        plan: &'a Plan,
        place: &'a Place,
        progress: &'a Progress,
        interrupted: &'a Arc<AtomicBool>,
    ) -> Self {
        let sessions = plan.modes.iter().map(|_| None).collect();
        let modes = vec![ModeResult::default(); plan.modes.len()];
        let without = vec![Vec::new(); plan.modes.len()];
        let notes = Vec::new();
        Self { plan, place, progress, interrupted, sessions, modes, without, notes }
    }

    /// Measures everything.
    ///
    /// # Errors
    /// Only when the user interrupts.
    pub fn run(&mut self) -> Result<Measured, SessionError> {
        let mut cells = Vec::new();
        for benchmark in self.plan.benchmarks.clone() {
            let row = self.row(benchmark)?;
            let left = self.progress.time_left().map_or_else(String::new, |left| format!(" ({left})"));
            self.progress.plain_line(&format!("{}{left}", table::line(benchmark, &self.plan.modes, &row)));
            cells.push(row);
        }
        Ok(Measured { cells, modes: std::mem::take(&mut self.modes), notes: std::mem::take(&mut self.notes) })
    }

    /// One benchmark in all modes.
    fn row(&mut self, benchmark: &Benchmark) -> Result<Vec<Cell>, SessionError> {
        let mut row = vec![Cell::default(); self.plan.modes.len()];
        for (index, cell) in row.iter_mut().enumerate() {
            if benchmark.native == Native::Absent && self.plan.modes[index].name == REFERENCE {
                cell.skipped = Some(PRIVILEGED.to_owned());
                self.progress.advance(1);
                continue;
            }
            self.say(benchmark, index, "calibrating");
            if let Err(error) = self.calibrate(benchmark, index, cell) {
                self.fail(index, cell, error)?;
            }
            self.progress.advance(1);
        }
        for run in 0..self.plan.runs {
            for index in in_turn(row.len(), run) {
                let cell = &mut row[index];
                let may_go_on = cell.samples.is_empty() || cell.spent <= self.plan.patience;
                if cell.error.is_none() && cell.skipped.is_none() && may_go_on {
                    self.say(benchmark, index, "measuring");
                    match self.measure_apart(benchmark, index, cell.count) {
                        Ok(answer) => take(cell, answer),
                        Err(error) => self.fail(index, cell, error)?,
                    }
                }
                self.progress.advance(1);
            }
        }
        Ok(row)
    }

    fn say(&self, benchmark: &Benchmark, index: usize, what: &str) {
        self.progress.at(&format!("{what} {} ({})", benchmark.name, self.plan.modes[index].name));
    }

    /// Notes a failure; the session is not used again.
    fn fail(&mut self, index: usize, cell: &mut Cell, error: SessionError) -> Result<(), SessionError> {
        self.sessions[index] = None;
        if error == SessionError::Interrupted {
            return Err(error);
        }
        cell.timed_out = matches!(error, SessionError::TimedOut(..));
        if self.modes[index].skipped.is_none() {
            cell.error = Some(error.to_string());
        } else {
            cell.skipped = Some("the mode is not available".to_owned());
        }
        Ok(())
    }

    /// Finds how many iterations last about as long as wanted.
    fn calibrate(
        &mut self,
        benchmark: &Benchmark,
        index: usize,
        cell: &mut Cell,
    ) -> Result<(), SessionError> {
        cell.count = 1;
        for _ in 0..MAX_STEPS {
            match self.measure(benchmark, index, cell.count)? {
                Answer::Skipped(reason) => {
                    cell.skipped = Some(reason);
                    return Ok(());
                }
                Answer::Done(sample) => match next_count(cell.count, &sample, self.plan.target) {
                    Some(count) => cell.count = count,
                    None => return Ok(()),
                },
            }
        }
        Ok(())
    }

    fn measure(&mut self, benchmark: &Benchmark, index: usize, count: u64) -> Result<Answer, SessionError> {
        let size_percent = self.plan.size_percent;
        self.session(index, root_of(benchmark))?.measure(benchmark.name, count, size_percent)
    }

    /// What was calibrated.
    fn measure_apart(
        &mut self,
        benchmark: &Benchmark,
        index: usize,
        count: u64,
    ) -> Result<Answer, SessionError> {
        let size_percent = self.plan.size_percent;
        self.session(index, root_of(benchmark))?.measure_apart(benchmark.name, count, size_percent)
    }

    /// The session of a mode in a root, started if need be; one in the other root is ended. A mode that does not start is
    /// left out from then on.
    fn session(&mut self, index: usize, root: Root) -> Result<&mut Session, SessionError> {
        if let Some(reason) = &self.modes[index].skipped {
            return Err(SessionError::NotStarted(reason.clone()));
        }
        if let Some((_, reason)) = self.without[index].iter().find(|(other, _)| *other == root) {
            return Err(SessionError::NotStarted(reason.clone()));
        }
        if self.sessions[index].as_ref().is_none_or(|(other, _)| *other != root) {
            self.sessions[index] = None;
            let mode = self.plan.modes[index];
            self.progress.at(&format!("starting {}", mode.name));
            match self.start(mode, root) {
                Ok(session) => self.started(index, root, session),
                Err(error) => return Err(self.not_started(index, root, error)),
            }
        }
        let (_, session) = self.sessions[index].as_mut().expect("it was started just now");
        Ok(session)
    }

    /// A boot with the real programs takes longer, for they are in its initramfs: it counts if there is no other.
    fn started(&mut self, index: usize, root: Root, session: Session) {
        if root == Root::Bare || self.plan.is_all_real() {
            self.modes[index].boots.push(session.boot.as_secs_f64());
        }
        for note in &session.notes {
            let note = format!("{}: {note}", self.plan.modes[index].name);
            if !self.notes.contains(&note) {
                self.notes.push(note);
            }
        }
        self.sessions[index] = Some((root, session));
    }

    fn not_started(&mut self, index: usize, root: Root, error: SessionError) -> SessionError {
        if error == SessionError::Interrupted {
            return error;
        }
        if root != Root::Bare && self.plan.benchmarks.iter().any(|benchmark| root_of(benchmark) != root) {
            self.without[index].push((root, error.to_string()));
        } else {
            self.progress.line(&format!("{} is left out: {error}", self.plan.modes[index].name));
            self.modes[index].skipped = Some(error.to_string());
        }
        error
    }

    fn start(&self, mode: &Mode, root: Root) -> Result<Session, SessionError> {
        let command = mode.command(self.place, root).map_err(SessionError::NotStarted)?;
        Session::start(command, self.plan.timeout, self.interrupted)
    }
}

/// The root that a benchmark runs in.
pub(super) fn root_of(benchmark: &Benchmark) -> Root {
    match benchmark {
        benchmark if benchmark.is_real() => Root::Programs,
        benchmark if benchmark.is_macro() => Root::Macro,
        benchmark if benchmark.is_nano() => Root::Metal,
        _ => Root::Bare,
    }
}

/// Every second run goes through the modes the other way round.
fn in_turn(modes: usize, run: u32) -> impl Iterator<Item = usize> {
    (0..modes).map(move |n| if run.is_multiple_of(2) { n } else { modes - 1 - n })
}

/// The count to try next; `None` if this one lasts long enough.
pub(super) fn next_count(count: u64, sample: &Sample, target: Duration) -> Option<u64> {
    // A reader that is woken late sees both marks at once; the guest's clock is good enough here.
    let ratio = target.as_secs_f64() * 1e9 / sample.host_ns.max(sample.guest_ns.unwrap_or(0.0)).max(1.0);
    if ratio < 1.5 {
        return None;
    }
    let grown = count.saturating_mul(times(ratio.min(MAX_GROWTH)));
    (grown > count).then_some(grown)
}

/// A small positive number, rounded.
fn times(ratio: f64) -> u64 {
    (1..=100u64).rev().find(|n| *n as f64 <= ratio + 0.5).unwrap_or(1)
}

/// Adds a run to its cell.
fn take(cell: &mut Cell, answer: Answer) {
    match answer {
        Answer::Skipped(reason) => cell.skipped = Some(reason),
        Answer::Done(sample) => {
            cell.samples.push(sample.host_ns / sample.ops);
            cell.spent += Duration::try_from_secs_f64(sample.host_ns / 1e9).unwrap_or_default();
            cell.deviations.extend(sample.guest_ns.map(|guest_ns| (guest_ns / sample.host_ns - 1.0) * 100.0));
            if cell.check.as_ref().is_some_and(|check| *check != sample.check) {
                cell.error = Some(format!(
                    "computed {} and then {}",
                    cell.check.clone().unwrap_or_default(),
                    sample.check
                ));
            }
            cell.check = Some(sample.check);
        }
    }
}

impl Cell {
    /// The median of the runs, unless it failed.
    #[must_use]
    pub fn value(&self) -> Option<f64> {
        if self.error.is_some() { None } else { stats::median(&self.samples) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(host_ns: f64, check: &str) -> Sample {
        Sample { host_ns, guest_ns: Some(host_ns * 0.99), cpu_ns: None, ops: 10.0, check: check.to_owned() }
    }

    #[test]
    fn calibration_grows_towards_the_target() {
        let target = Duration::from_millis(60);
        assert_eq!(next_count(1, &sample(100.0, ""), target), Some(50));
        assert_eq!(next_count(100, &sample(6e6, ""), target), Some(1000));
        assert_eq!(next_count(100, &sample(45e6, ""), target), None);
        assert_eq!(next_count(1, &sample(9e9, ""), target), None);
        assert_eq!(next_count(u64::MAX, &sample(1.0, ""), target), None);
    }

    #[test]
    fn modes_are_measured_forth_and_back() {
        let order: Vec<usize> = (0..3).flat_map(|run| in_turn(3, run)).collect();
        assert_eq!(order, [0, 1, 2, 2, 1, 0, 0, 1, 2]);
    }

    #[test]
    fn cell_collects_times_per_operation() {
        let mut cell = Cell::default();
        take(&mut cell, Answer::Done(sample(1000.0, "a")));
        take(&mut cell, Answer::Done(sample(3000.0, "a")));
        assert_eq!(cell.value(), Some(200.0));
        assert!((cell.deviations[0] + 1.0).abs() < 1e-6);
    }

    #[test]
    fn cell_with_changing_results_has_no_value() {
        let mut cell = Cell::default();
        take(&mut cell, Answer::Done(sample(1000.0, "a")));
        take(&mut cell, Answer::Done(sample(1000.0, "b")));
        assert_eq!(cell.value(), None);
    }
}
