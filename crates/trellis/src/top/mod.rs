//! `trellis top`: what the running machines do, live.
//!
//! Way of the data: [`rates`] asks every machine through its control socket, in a thread of its own so that one that does not answer keeps nobody
//! from quitting, and makes rates of what was counted since it was last asked → [`view`] draws them on the terminal, or [`plain`] writes them as text where
//! there is none, or where text was asked for.

mod plain;
mod rates;
mod view;

use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread::Builder;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};

use rates::{Frame, Watcher};
use view::View;

/// How soon a key is acted on.
const KEY_WAIT: Duration = Duration::from_millis(50);

/// The options of `trellis top`.
#[derive(Args, Clone, Debug)]
pub struct TopArgs {
    /// One frame as text, of the rates of one delay
    #[arg(long)]
    once: bool,
    /// Frames as text, one after another, as for a file
    #[arg(long, short)]
    batch: bool,
    /// End after so many frames
    #[arg(long, short = 'n', value_name = "N", value_parser = parse_iterations, allow_hyphen_values = true)]
    iterations: Option<u64>,
    /// Seconds between two frames, 0.1 to 3600
    #[arg(long, short, value_name = "SECONDS", default_value = "1", value_parser = parse_delay, allow_hyphen_values = true)]
    delay: Duration,
}

fn parse_delay(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{}' is no delay; give seconds from 0.1 to 3600", text.escape_debug());
    let seconds = text.parse::<f64>().map_err(|_| wrong())?;
    if (0.1..=3600.0).contains(&seconds) { Ok(Duration::from_secs_f64(seconds)) } else { Err(wrong()) }
}

fn parse_iterations(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{}' is no number of frames; give 1 or more", text.escape_debug());
    text.parse().ok().filter(|&n| n > 0).ok_or_else(wrong)
}

/// Runs it to its end.
///
/// # Errors
/// When the terminal cannot be used.
pub fn run(top: &TopArgs) -> anyhow::Result<ExitCode> {
    let limit = if top.once { Some(1) } else { top.iterations };
    if top.once || top.batch || !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return in_text(top.delay, limit);
    }
    let frames = watch(top.delay)?;
    let quit = Arc::new(AtomicBool::new(false));
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&quit)).context("cannot watch for signals")?;
    }
    // From here on panics restore the terminal, too.
    let mut terminal = ratatui::try_init().context("cannot use the terminal; try trellis top --once")?;
    let result = on_terminal(&mut terminal, &frames, &quit, limit);
    ratatui::restore();
    result.map(|()| ExitCode::SUCCESS)
}

/// Frames as text; a reader that has gone away is an end.
fn in_text(delay: Duration, limit: Option<u64>) -> anyhow::Result<ExitCode> {
    let mut watcher = Watcher::default();
    // What the first frame's rates are of.
    watcher.look();
    let mut shown = 0;
    while limit.is_none_or(|limit| shown < limit) {
        std::thread::sleep(delay);
        let text = plain::text(&watcher.look());
        let mut stdout = io::stdout().lock();
        let separator = if shown > 0 { "\n" } else { "" };
        match stdout.write_all(format!("{separator}{text}").as_bytes()).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
            other => other?,
        }
        shown += 1;
    }
    Ok(ExitCode::SUCCESS)
}

/// Looks at the machines every so often, in a thread that ends with the process.
fn watch(delay: Duration) -> io::Result<Receiver<Frame>> {
    let (to, from) = sync_channel(1);
    Builder::new().name("watcher".to_owned()).spawn(move || {
        let mut watcher = Watcher::default();
        while to.send(watcher.look()).is_ok() {
            std::thread::sleep(delay);
        }
    })?;
    Ok(from)
}

fn on_terminal(
    terminal: &mut ratatui::DefaultTerminal,
    frames: &Receiver<Frame>,
    quit: &AtomicBool,
    limit: Option<u64>,
) -> anyhow::Result<()> {
    let mut view = View::default();
    let mut shown = 0;
    terminal.draw(|area| view.draw(area))?;
    while !quit.load(Ordering::SeqCst) && limit.is_none_or(|limit| shown < limit) {
        let mut changed = true;
        match frames.recv_timeout(KEY_WAIT) {
            Ok(frame) => {
                view.show(frame);
                shown += 1;
            }
            Err(RecvTimeoutError::Timeout) => changed = false,
            Err(RecvTimeoutError::Disconnected) => anyhow::bail!("the thread that watches has ended"),
        }
        while event::poll(Duration::ZERO)? {
            changed = true;
            match event::read()? {
                Event::Key(key) if key.kind == KeyEventKind::Release => {}
                Event::Key(key) => match key.code {
                    KeyCode::Char('q') | KeyCode::Esc => return Ok(()),
                    KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(()),
                    KeyCode::Down | KeyCode::Char('j') => view.select(1),
                    KeyCode::Up | KeyCode::Char('k') => view.select(-1),
                    _ => {}
                },
                _ => {}
            }
        }
        if changed {
            terminal.draw(|area| view.draw(area))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_are_seconds_within_reason() {
        assert_eq!(parse_delay("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["", "0", "-1", "nan", "inf", "1e9", "x"] {
            assert!(parse_delay(bad).unwrap_err().contains("0.1 to 3600"), "{bad}");
        }
    }
}
