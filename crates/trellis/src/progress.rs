//! What the user sees on standard error while something takes long: a bar on a terminal, a line a stage elsewhere.

use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar of a stage's percent.
const STAGES: &str = "{spinner} {wide_msg} [{bar:24}] {percent:>3}% {elapsed:>3}";
/// A bar of steps that take about equally long.
const STEPS: &str = "{spinner} {wide_msg} [{bar:24}] {percent:>3}% {elapsed:>3}, {eta:>3} left";

/// A progress display on standard error.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    plain: bool,
    start: Instant,
}

impl Progress {
    /// A display of stages, each from 0 to 100 percent.
    #[must_use]
    pub fn new() -> Self {
        Self::with(STAGES, 100)
    }

    /// A display of so many steps, with the time that is left.
    #[must_use]
    pub fn of_steps(steps: u64) -> Self {
        Self::with(STEPS, steps)
    }

    /// A display that shows nothing.
    #[must_use]
    pub fn hidden() -> Self {
        Self { bar: ProgressBar::hidden(), plain: false, start: Instant::now() }
    }

    fn with(template: &str, len: u64) -> Self {
        let plain = !std::io::stderr().is_terminal();
        let target = if plain { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(len), target);
        let style = ProgressStyle::with_template(template).expect("the template is well-formed");
        bar.set_style(style.progress_chars("=> "));
        if !plain {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        Self { bar, plain, start: Instant::now() }
    }

    /// Begins a stage.
    pub fn stage(&self, message: &str) {
        self.bar.set_position(0);
        self.bar.set_message(message.to_owned());
        self.plain_line(message);
    }

    /// How far the stage is, 0 to 100.
    pub fn percent(&self, percent: f64) {
        let steps = (0..100u64).rev().find(|step| percent > *step as f64).map_or(0, |step| step + 1);
        self.bar.set_position(steps);
    }

    /// What is done now.
    pub fn at(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    /// So many steps are done, or will not be.
    pub fn advance(&self, steps: u64) {
        self.bar.inc(steps);
    }

    /// How much time the steps that are left will take if they take as long as those that are done, in words.
    #[must_use]
    pub fn time_left(&self) -> Option<String> {
        time_left(self.start.elapsed(), self.bar.position(), self.bar.length()?)
    }

    /// A line that stays on the screen.
    pub fn line(&self, message: &str) {
        self.bar.suspend(|| crate::terminal::tell(&format!("trellis: {message}\n")));
    }

    /// A line for those who see no bar.
    pub fn plain_line(&self, message: &str) {
        if self.plain {
            self.line(message);
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// `None` before the first step and after the last.
fn time_left(elapsed: Duration, done: u64, all: u64) -> Option<String> {
    if done == 0 || done >= all {
        return None;
    }
    let seconds = elapsed.as_secs_f64() * (all - done) as f64 / done as f64;
    Some(if seconds < 99.5 {
        format!("about {seconds:.0} s left")
    } else {
        format!("about {:.0} min left", seconds / 60.0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_follows_the_steps_done() {
        let after = |seconds, done, all| time_left(Duration::from_secs(seconds), done, all);
        assert_eq!(after(5, 0, 10), None);
        assert_eq!(after(10, 1, 3), Some("about 20 s left".to_owned()));
        assert_eq!(after(60, 1, 11), Some("about 10 min left".to_owned()));
        assert_eq!(after(60, 10, 10), None);
    }
}
