//! Raw mode of the terminal, and the promise that it ends.
//!
//! `INV-TTY-1`: whenever the process ends other than by SIGKILL, the terminal is as it was found. The saved settings stand
//! in one place, [`SAVED`]; the guard's drop, the panic hook and the signal thread all restore from there, and whoever
//! comes first takes them out.

use std::io::{self, IsTerminal as _};
use std::sync::{Mutex, Once, PoisonError};

use rustix::termios::{LocalModes, OptionalActions, OutputModes, Termios, tcgetattr, tcgetpgrp, tcsetattr};

/// The settings as they were found, while the terminal is raw.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Makes the terminal raw for as long as it lives.
#[derive(Debug)]
pub struct RawMode(());

impl RawMode {
    /// Makes standard input raw if it is a terminal and we are in its foreground.
    ///
    /// # Errors
    /// The terminal refuses its settings.
    pub fn enter() -> io::Result<Option<Self>> {
        if !in_foreground() {
            return Ok(None);
        }
        install_panic_hook();
        let found = tcgetattr(io::stdin())?;
        *saved() = Some(found.clone());
        tcsetattr(io::stdin(), OptionalActions::Now, &raw(&found))?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal its settings back; does nothing if it has them, or if it is another's by now.
pub fn restore() {
    if let Some(found) = saved().take()
        && in_foreground()
    {
        // Nothing is left to be done if a vanished terminal refuses.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &found);
    }
}

/// Makes the terminal raw again after it was stopped and continued.
pub fn reenter() {
    if let Some(found) = saved().as_ref()
        && in_foreground()
    {
        // As above.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &raw(found));
    }
}

/// Whether standard input is a terminal that is ours to read and to change: from the background of its job control that
/// would stop the process. A terminal that controls no session of ours has no job control over us.
fn in_foreground() -> bool {
    match tcgetpgrp(io::stdin()) {
        Ok(group) => group == rustix::process::getpgrp(),
        Err(_) => io::stdin().is_terminal(),
    }
}

/// `found`, raw; but output keeps its processing, so that guests that end lines with a bare LF look right.
fn raw(found: &Termios) -> Termios {
    let mut raw = found.clone();
    raw.make_raw();
    raw.output_modes = found.output_modes | OutputModes::OPOST;
    debug_assert!(!raw.local_modes.contains(LocalModes::ISIG), "Ctrl-C is for the guest");
    raw
}

fn saved() -> std::sync::MutexGuard<'static, Option<Termios>> {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A panic in any thread restores the terminal before its message is printed.
fn install_panic_hook() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |information| {
            restore();
            before(information);
        }));
    });
}
