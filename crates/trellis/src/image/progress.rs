//! What the user sees while an image is fetched: a bar on a terminal, one line a stage elsewhere.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A progress display on standard error.
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
        let bar = ProgressBar::with_draw_target(Some(100), target);
        let style =
            ProgressStyle::with_template("{spinner} {wide_msg} [{bar:24}] {percent:>3}% {elapsed:>3}")
                .expect("the template is well-formed");
        bar.set_style(style.progress_chars("=> "));
        if !plain {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        Self { bar, plain }
    }

    /// A display that shows nothing.
    #[must_use]
    pub fn hidden() -> Self {
        Self { bar: ProgressBar::hidden(), plain: false }
    }

    /// Begins a stage.
    pub fn stage(&self, message: &str) {
        self.bar.set_position(0);
        self.bar.set_message(message.to_owned());
        if self.plain {
            crate::terminal::tell(&format!("trellis: {message}\n"));
        }
    }

    /// How far the stage is, 0 to 100.
    pub fn percent(&self, percent: f64) {
        let steps = (0..100u64).rev().find(|step| percent > *step as f64).map_or(0, |step| step + 1);
        self.bar.set_position(steps);
    }

    /// A line that stays on the screen.
    pub fn line(&self, message: &str) {
        self.bar.suspend(|| crate::terminal::tell(&format!("trellis: {message}\n")));
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
