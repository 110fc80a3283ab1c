//! The Ctrl-A keys: a state machine from typed bytes to guest input and commands. Pure, so that it can be tested.

/// The escape key, Ctrl-A.
const ESCAPE: u8 = 0x01;

/// What a command key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// Ctrl-A X.
    Quit,
    /// Ctrl-A H, or an unknown key.
    Help,
    /// Ctrl-A S.
    Stats,
    /// Ctrl-A D.
    Screen,
    /// Ctrl-A C: kept for a monitor.
    Monitor,
}

/// What the typed bytes mean, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Typed {
    /// Bytes for the guest.
    Input(Vec<u8>),
    /// A command.
    Key(Key),
}

/// Remembers a Ctrl-A between two reads.
#[derive(Debug, Default)]
pub struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    /// Splits `bytes` into input and commands.
    pub fn feed(&mut self, bytes: &[u8]) -> Vec<Typed> {
        let mut typed = Vec::new();
        let mut input = Vec::new();
        for &byte in bytes {
            if !self.escaped {
                if byte == ESCAPE {
                    self.escaped = true;
                } else {
                    input.push(byte);
                }
                continue;
            }
            self.escaped = false;
            let key = match byte {
                ESCAPE | b'a' => {
                    input.push(ESCAPE);
                    continue;
                }
                b'x' | b'X' | 0x18 => Key::Quit,
                b's' | b'S' => Key::Stats,
                b'd' | b'D' => Key::Screen,
                b'c' | b'C' => Key::Monitor,
                _ => Key::Help,
            };
            if !input.is_empty() {
                typed.push(Typed::Input(std::mem::take(&mut input)));
            }
            typed.push(Typed::Key(key));
        }
        if !input.is_empty() {
            typed.push(Typed::Input(input));
        }
        typed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(bytes: &[u8]) -> Vec<Typed> {
        EscapeFilter::default().feed(bytes)
    }

    #[test]
    fn plain_bytes_and_control_c_reach_the_guest() {
        assert_eq!(feed(b"ls\r\x03"), [Typed::Input(b"ls\r\x03".to_vec())]);
    }

    #[test]
    fn escape_keys_are_taken_out() {
        assert_eq!(
            feed(b"a\x01xb"),
            [Typed::Input(b"a".to_vec()), Typed::Key(Key::Quit), Typed::Input(b"b".to_vec())]
        );
        assert_eq!(feed(b"\x01h\x01s"), [Typed::Key(Key::Help), Typed::Key(Key::Stats)]);
        assert_eq!(feed(b"\x01d"), [Typed::Key(Key::Screen)]);
        assert_eq!(feed(b"\x01?"), [Typed::Key(Key::Help)]);
    }

    #[test]
    fn escape_twice_sends_one() {
        assert_eq!(feed(b"\x01\x01"), [Typed::Input(vec![1])]);
    }

    #[test]
    fn escape_is_remembered_between_reads() {
        let mut filter = EscapeFilter::default();
        assert_eq!(filter.feed(b"\x01"), []);
        assert_eq!(filter.feed(b"X"), [Typed::Key(Key::Quit)]);
    }
}
