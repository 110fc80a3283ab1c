//! What is seen on standard error while it measures: a bar with the time left on a terminal, a line a benchmark elsewhere.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The display.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    plain: bool,
}

impl Progress {
    /// A display fit for what standard error is.
    #[must_use]
    pub fn new() -> Self {
        let plain = !std::io::stderr().is_terminal();
        let target = if plain { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(0), target);
        let style = ProgressStyle::with_template(
            "{spinner} {wide_msg} [{bar:24}] {percent:>3}% {elapsed:>3}, {eta:>3} left",
        );
        bar.set_style(style.expect("the template is well-formed").progress_chars("=> "));
        if !plain {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        Self { bar, plain }
    }

    /// How many measurements there will be.
    pub fn set_total(&self, steps: u64) {
        self.bar.set_length(steps);
    }

    /// What is done now.
    pub fn at(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    /// So many measurements are done, or will not be.
    pub fn advance(&self, steps: u64) {
        self.bar.inc(steps);
    }

    /// A line that stays on the screen.
    pub fn line(&self, text: &str) {
        self.bar.suspend(|| eprintln!("trellis: {text}"));
    }

    /// A line for those who see no bar.
    pub fn plain_line(&self, text: &str) {
        if self.plain {
            eprintln!("trellis: {text}");
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
