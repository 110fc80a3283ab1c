//! The guest's VGA text display in the user's terminal, and the terminal's keys on the guest's keyboard.

use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use vmm::{Key, TextScreen, Typed, VmHandle, render_ansi};

use crate::terminal::ConsoleWriter;

/// Time between two looks at the display: 20 Hz.
const FRAME: Duration = Duration::from_millis(50);

/// How the display is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Not at all.
    None,
    /// Drawn on the terminal as it changes.
    Live,
    /// Its last screen as text when the run is over.
    AtEnd,
}

/// The thread that draws. Dropping it draws the last screen and leaves the cursor below it.
pub struct Display {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Display {
    /// Starts drawing.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn start(handle: VmHandle) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let run = move || {
            let mut painter = Painter { handle, shown: None, generation: None };
            while !stopped.load(Ordering::SeqCst) {
                painter.paint();
                std::thread::park_timeout(FRAME);
            }
            painter.paint();
            painter.finish();
        };
        let thread = Builder::new().name("display".to_owned()).spawn(run)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Display {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A panic was printed; the screen is all that is lost.
            let _ = thread.join();
        }
    }
}

struct Painter {
    handle: VmHandle,
    shown: Option<TextScreen>,
    generation: Option<u64>,
}

impl Painter {
    fn paint(&mut self) {
        let generation = self.handle.screen_generation();
        if self.generation == Some(generation) {
            return;
        }
        let Some(screen) = self.handle.text_screen() else { return };
        self.generation = Some(generation);
        write(&render_ansi(&screen, self.shown.as_ref()));
        self.shown = Some(screen);
    }

    /// The terminal as others expect it: plain colours, a cursor, below the picture.
    fn finish(&self) {
        let below = self.shown.as_ref().map_or(1, |screen| screen.rows);
        write(&format!("\x1b[0m\x1b[?25h\x1b[{below};1H\r\n"));
    }
}

/// A terminal that has gone away is no reason to stop the guest.
fn write(text: &str) {
    let _gone = ConsoleWriter::new().write_all(text.as_bytes());
}

/// Turns what a terminal sends into keys: characters, and the usual control sequences (ECMA-48 CSI, xterm) of keys
/// without a character.
#[derive(Default)]
pub struct Keys {
    /// A character of several bytes that is not complete.
    partial: Vec<u8>,
}

impl Keys {
    /// The keys that `bytes` stand for. A sequence is recognised when it comes in one piece, as terminals send it; a lone
    /// ESC is the Escape key.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Typed> {
        self.partial.extend(bytes);
        let bytes = std::mem::take(&mut self.partial);
        let mut keys = Vec::new();
        let mut rest = &bytes[..];
        while let Some(&first) = rest.first() {
            if let Some((key, len)) = sequence(rest) {
                keys.push(Typed::Key(key));
                rest = &rest[len..];
                continue;
            }
            let len = match first {
                0..0x80 => 1,
                0xc0..0xe0 => 2,
                0xe0..0xf0 => 3,
                0xf0.. => 4,
                _ => 1,
            };
            let Some(character) = rest.get(..len) else {
                self.partial = rest.to_vec();
                break;
            };
            if let Ok(text) = std::str::from_utf8(character) {
                keys.extend(text.chars().map(Typed::Char));
            }
            rest = &rest[len..];
        }
        keys
    }
}

/// The key whose control sequence `bytes` begin with, and its length.
fn sequence(bytes: &[u8]) -> Option<(Key, usize)> {
    const SEQUENCES: &[(&[u8], Key)] = &[
        (b"[A", Key::UP),
        (b"[B", Key::DOWN),
        (b"[C", Key::RIGHT),
        (b"[D", Key::LEFT),
        (b"[H", Key::HOME),
        (b"[F", Key::END),
        (b"[1~", Key::HOME),
        (b"[2~", Key::INSERT),
        (b"[3~", Key::DELETE),
        (b"[4~", Key::END),
        (b"[5~", Key::PAGE_UP),
        (b"[6~", Key::PAGE_DOWN),
        (b"OA", Key::UP),
        (b"OB", Key::DOWN),
        (b"OC", Key::RIGHT),
        (b"OD", Key::LEFT),
        (b"OH", Key::HOME),
        (b"OF", Key::END),
        // F1 to F12 in set 1.
        (b"OP", Key::plain(0x3b)),
        (b"OQ", Key::plain(0x3c)),
        (b"OR", Key::plain(0x3d)),
        (b"OS", Key::plain(0x3e)),
        (b"[15~", Key::plain(0x3f)),
        (b"[17~", Key::plain(0x40)),
        (b"[18~", Key::plain(0x41)),
        (b"[19~", Key::plain(0x42)),
        (b"[20~", Key::plain(0x43)),
        (b"[21~", Key::plain(0x44)),
        (b"[23~", Key::plain(0x57)),
        (b"[24~", Key::plain(0x58)),
    ];
    let rest = bytes.strip_prefix(b"\x1b")?;
    SEQUENCES.iter().find(|(text, _)| rest.starts_with(text)).map(|&(text, key)| (key, text.len() + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_sequences_and_a_lone_escape_become_keys() {
        let mut keys = Keys::default();
        assert_eq!(keys.feed(b"a\x1b[Ab"), [Typed::Char('a'), Typed::Key(Key::UP), Typed::Char('b')]);
        assert_eq!(keys.feed(b"\x1b"), [Typed::Char('\x1b')]);
        assert_eq!(keys.feed(b"\x1b[24~"), [Typed::Key(Key::plain(0x58))]);
    }

    #[test]
    fn character_in_two_pieces_is_put_together() {
        let mut keys = Keys::default();
        assert_eq!(keys.feed(&[0xc3]), []);
        assert_eq!(keys.feed(&[0xa4, b'x']), [Typed::Char('ä'), Typed::Char('x')]);
        assert_eq!(keys.feed(&[0xff, 0x80, 0x80, 0x80]), []);
    }
}
