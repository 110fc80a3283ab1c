//! The user's terminal: typed bytes to the guest, the guest's bytes to the screen, and the keys that are ours.
//!
//! On a terminal it is raw: every byte, Ctrl-C too, goes to the guest, but for the Ctrl-A keys. Without one (pipes, CI) bytes
//! pass as they are, and the end of input does not end the guest.
//!
//! Threads: one reads standard input, one waits for signals. Both live until the process ends; their callbacks must not
//! block for long. The writer may be used from any thread.

mod escape;
mod raw;
mod writer;

use std::io::{self, IsTerminal as _};
use std::sync::Arc;
use std::thread;

use signal_hook::consts::signal::{
    SIGALRM, SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH,
};
use signal_hook::iterator::Signals;

use escape::{EscapeFilter, Key, Typed};
pub use raw::{RawMode, reenter, restore};
pub use writer::{ConsoleWriter, FileWriter, stop_waiting, stop_waiting_after, tell};

const HELP: &str = "\n\
    Ctrl-A X       quit\n\
    Ctrl-A S       statistics so far\n\
    Ctrl-A D       the VGA text screen\n\
    Ctrl-A Ctrl-A  send Ctrl-A to the guest\n\
    Ctrl-A H       this help\n\
    Everything else, Ctrl-C too, goes to the guest.\n";

/// Why the user, or the system, wants the run to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuitReason {
    /// Ctrl-A X.
    Key,
    /// A signal, by its number.
    Signal(i32),
}

impl QuitReason {
    /// The exit status: quitting is no failure; a signal is told as shells tell it.
    #[must_use]
    pub fn exit_status(self) -> u8 {
        match self {
            Self::Key => 0,
            Self::Signal(number) => u8::try_from(128 + number).unwrap_or(u8::MAX),
        }
    }
}

/// Takes typed bytes, in order.
pub type InputHandler = Box<dyn FnMut(&[u8]) + Send>;
/// Takes the wish to end the run: why, and whether at once.
pub type QuitHandler = Arc<dyn Fn(QuitReason, Haste) -> Ending + Send + Sync>;

/// How much time there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Haste {
    /// The guest may shut down first, if it can.
    MayWait,
    /// None.
    AtOnce,
}

/// What became of a wish to end the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest was asked to shut down; the next wish is more urgent.
    Asked,
    /// The run is ending.
    Now,
}
/// Takes columns and rows.
pub type ResizeHandler = Box<dyn FnMut(u16, u16) + Send>;

/// Where the terminal's events go.
pub struct Handlers {
    /// Bytes for the guest, in order.
    pub input: InputHandler,
    /// The run is to end. Not called again after it said [`Ending::Now`]: a further wish ends the process on the spot.
    pub quit: QuitHandler,
    /// Ctrl-A S.
    pub stats: Box<dyn Fn() + Send>,
    /// Ctrl-A D.
    pub screen: Box<dyn Fn() + Send>,
    /// The window has now so many columns and rows.
    pub resize: ResizeHandler,
}

/// The running terminal. Dropping it restores the settings; the threads stay, without effect on them.
#[derive(Debug)]
pub struct Console {
    raw: Option<RawMode>,
}

impl Console {
    /// Makes the terminal raw where there is one, and starts the threads. With `read_input` false (no device of the
    /// guest reads the terminal) the terminal stays as it is, and Ctrl-C ends the run.
    ///
    /// # Errors
    /// Threads or signal handlers cannot be made, or the terminal refuses its settings.
    pub fn start(handlers: Handlers, read_input: bool) -> io::Result<Self> {
        let Handlers { input, quit, stats, screen, resize } = handlers;
        let raw = if read_input { RawMode::enter()? } else { None };
        let console = Self { raw };
        spawn_signal_thread(Arc::clone(&quit), resize)?;
        if read_input && (console.is_raw() || !io::stdin().is_terminal()) {
            let mut reader = Reader {
                input,
                quit,
                stats,
                screen,
                filter: console.is_raw().then(EscapeFilter::default),
                quitting: false,
            };
            thread::Builder::new().name("terminal-input".to_owned()).spawn(move || reader.run())?;
        }
        Ok(console)
    }

    /// Whether every key goes to the guest.
    #[must_use]
    pub fn is_raw(&self) -> bool {
        self.raw.is_some()
    }

    /// Standard output for the guest.
    #[must_use]
    pub fn writer(&self) -> ConsoleWriter {
        ConsoleWriter::new()
    }

    /// Columns and rows of the terminal, if output is one.
    #[must_use]
    pub fn size(&self) -> Option<(u16, u16)> {
        window_size()
    }
}

fn wait_readable() {
    use rustix::event::{PollFd, PollFlags, poll};
    let stdin = io::stdin();
    // Whatever poll says, the next read tells.
    let _ = poll(&mut [PollFd::new(&stdin, PollFlags::IN)], None);
}

/// The input thread.
struct Reader {
    input: InputHandler,
    quit: QuitHandler,
    stats: Box<dyn Fn() + Send>,
    screen: Box<dyn Fn() + Send>,
    /// `None` without a terminal: bytes pass as they are.
    filter: Option<EscapeFilter>,
    quitting: bool,
}

impl Reader {
    /// Reads until the end of input.
    fn run(&mut self) {
        let mut buffer = [0; 4096];
        loop {
            match rustix::io::read(io::stdin(), &mut buffer) {
                Ok(0) => return,
                Ok(count) => self.deliver(&buffer[..count]),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => wait_readable(),
                Err(error) => {
                    tracing::debug!("standard input ends: {error}");
                    return;
                }
            }
        }
    }

    fn deliver(&mut self, bytes: &[u8]) {
        let Some(filter) = &mut self.filter else {
            (self.input)(bytes);
            return;
        };
        for typed in filter.feed(bytes) {
            match typed {
                Typed::Input(bytes) => (self.input)(&bytes),
                Typed::Key(Key::Quit) => self.quit(),
                Typed::Key(Key::Stats) => (self.stats)(),
                Typed::Key(Key::Screen) => (self.screen)(),
                Typed::Key(Key::Help) => tell(HELP),
                Typed::Key(Key::Monitor) => {
                    tell(
                        "\ntrellis: the monitor is another program: trellis list shows how this machine is called\n",
                    );
                }
            }
        }
    }

    fn quit(&mut self) {
        if self.quitting {
            end_now(QuitReason::Key);
        }
        self.quitting = true;
        stop_waiting();
        (self.quit)(QuitReason::Key, Haste::AtOnce);
    }
}

/// The machine does not react: leave without it. The status says failure even for the key.
fn end_now(reason: QuitReason) -> ! {
    restore();
    crate::control::server::remove_socket();
    tell("trellis: the machine did not end in time; ended at once\n");
    std::process::exit(match reason {
        QuitReason::Key => 1,
        QuitReason::Signal(_) => i32::from(reason.exit_status()),
    });
}

/// Starts the thread that turns signals into calls.
fn spawn_signal_thread(quit: QuitHandler, mut resize: ResizeHandler) -> io::Result<()> {
    let mut signals =
        Signals::new([SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2, SIGALRM, SIGWINCH, SIGCONT])?;
    let run = move || {
        let (mut asked, mut quitting) = (false, false);
        for signal in signals.forever() {
            match signal {
                SIGWINCH => {
                    if let Some((columns, rows)) = window_size() {
                        resize(columns, rows);
                    }
                }
                SIGCONT => raw::reenter(),
                _ if quitting => end_now(QuitReason::Signal(signal)),
                _ => {
                    let polite = matches!(signal, SIGTERM | SIGINT | SIGHUP) && !asked;
                    let haste = if polite { Haste::MayWait } else { Haste::AtOnce };
                    match quit(QuitReason::Signal(signal), haste) {
                        Ending::Asked => asked = true,
                        Ending::Now => quitting = true,
                    }
                }
            }
        }
    };
    thread::Builder::new().name("signals".to_owned()).spawn(run).map(drop)
}

/// Columns and rows of the terminal that standard output is.
pub fn window_size() -> Option<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(io::stdout()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quit_by_key_is_no_failure() {
        assert_eq!(QuitReason::Key.exit_status(), 0);
        assert_eq!(QuitReason::Signal(SIGTERM).exit_status(), 143);
    }
}
