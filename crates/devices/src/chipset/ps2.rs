//! What hangs on the two ports of the [`i8042`](super::i8042): a PS/2 keyboard and a PS/2 mouse
//! ("PS/2 Hardware Interface Technical Reference", Keyboard and Mouse; scan code tables: Microsoft
//! "Keyboard Scan Code Specification" 1.3a).

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const TEST_PASSED: u8 = 0xaa;

/// Bytes a device holds for the controller. Twice the 16 of real ones.
pub(super) const QUEUE: usize = 32;
/// Keys and movements fill the queue only so far: an answer to a command always finds room.
const EVENTS: usize = QUEUE - 8;
/// Most bytes one typed character makes: modifier and key, down and up, in set 2.
const PER_CHAR: usize = 6;

/// A key, by its set-1 make code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Set-1 make code, 0x01–0x7f.
    pub code: u8,
    /// Whether an 0xe0 precedes it.
    pub extended: bool,
}

impl Key {
    /// Left shift.
    pub const SHIFT: Self = Self::plain(0x2a);
    /// Left control.
    pub const CTRL: Self = Self::plain(0x1d);
    /// Left alt.
    pub const ALT: Self = Self::plain(0x38);
    /// Cursor up.
    pub const UP: Self = Self::extended(0x48);
    /// Cursor down.
    pub const DOWN: Self = Self::extended(0x50);
    /// Cursor left.
    pub const LEFT: Self = Self::extended(0x4b);
    /// Cursor right.
    pub const RIGHT: Self = Self::extended(0x4d);
    /// Home.
    pub const HOME: Self = Self::extended(0x47);
    /// End.
    pub const END: Self = Self::extended(0x4f);
    /// Page up.
    pub const PAGE_UP: Self = Self::extended(0x49);
    /// Page down.
    pub const PAGE_DOWN: Self = Self::extended(0x51);
    /// Insert.
    pub const INSERT: Self = Self::extended(0x52);
    /// Delete.
    pub const DELETE: Self = Self::extended(0x53);

    /// The key of a one-byte make code.
    #[must_use]
    pub const fn plain(code: u8) -> Self {
        Self { code, extended: false }
    }

    /// The key of a make code after 0xe0.
    #[must_use]
    pub const fn extended(code: u8) -> Self {
        Self { code, extended: true }
    }

    /// F1 to F12.
    #[must_use]
    pub const fn function(n: u8) -> Option<Self> {
        match n {
            1..=10 => Some(Self::plain(0x3a + n)),
            11 | 12 => Some(Self::plain(0x4c + n)),
            _ => None,
        }
    }
}

/// First make code of a run of neighbouring keys, and what they type without and with shift (US layout).
const LAYOUT: [(u8, &str, &str); 4] = [
    (0x02, "1234567890-=", "!@#$%^&*()_+"),
    (0x10, "qwertyuiop[]", "QWERTYUIOP{}"),
    (0x1e, "asdfghjkl;'`", "ASDFGHJKL:\"~"),
    (0x2b, "\\zxcvbnm,./", "|ZXCVBNM<>?"),
];

/// The key that types `c` on a US keyboard, and the modifier it needs. None for what it cannot type.
#[must_use]
pub fn key_for(c: char) -> Option<(Key, Option<Key>)> {
    let special = match c {
        '\r' | '\n' => 0x1c,
        '\t' => 0x0f,
        '\x08' | '\x7f' => 0x0e,
        '\x1b' => 0x01,
        ' ' => 0x39,
        _ => 0,
    };
    if special != 0 {
        return Some((Key::plain(special), None));
    }
    if ('\x01'..='\x1a').contains(&c) {
        let letter = char::from(b'a' + u8::try_from(u32::from(c)).ok()? - 1);
        return key_for(letter).map(|(key, _)| (key, Some(Key::CTRL)));
    }
    LAYOUT.iter().find_map(|(first, plain, shifted)| {
        let at = |row: &str| row.chars().zip(*first..).find(|&(there, _)| there == c).map(|(_, code)| code);
        let unshifted = at(plain).map(|code| (Key::plain(code), None));
        unshifted.or_else(|| at(shifted).map(|code| (Key::plain(code), Some(Key::SHIFT))))
    })
}

/// The 8042's translation of a set-2 byte into set 1.
const SET_2_TO_1: [u8; 128] = [
    0xff, 0x43, 0x41, 0x3f, 0x3d, 0x3b, 0x3c, 0x58, 0x64, 0x44, 0x42, 0x40, 0x3e, 0x0f, 0x29, 0x59, //
    0x65, 0x38, 0x2a, 0x70, 0x1d, 0x10, 0x02, 0x5a, 0x66, 0x71, 0x2c, 0x1f, 0x1e, 0x11, 0x03, 0x5b, //
    0x67, 0x2e, 0x2d, 0x20, 0x12, 0x05, 0x04, 0x5c, 0x68, 0x39, 0x2f, 0x21, 0x14, 0x13, 0x06, 0x5d, //
    0x69, 0x31, 0x30, 0x23, 0x22, 0x15, 0x07, 0x5e, 0x6a, 0x72, 0x32, 0x24, 0x16, 0x08, 0x09, 0x5f, //
    0x6b, 0x33, 0x25, 0x17, 0x18, 0x0b, 0x0a, 0x60, 0x6c, 0x34, 0x35, 0x26, 0x27, 0x19, 0x0c, 0x61, //
    0x6d, 0x73, 0x28, 0x74, 0x1a, 0x0d, 0x62, 0x6e, 0x3a, 0x36, 0x1c, 0x1b, 0x75, 0x2b, 0x63, 0x76, //
    0x55, 0x56, 0x77, 0x78, 0x79, 0x7a, 0x0e, 0x7b, 0x7c, 0x4f, 0x7d, 0x4b, 0x47, 0x7e, 0x7f, 0x6f, //
    0x52, 0x53, 0x50, 0x4c, 0x4d, 0x48, 0x01, 0x45, 0x57, 0x4e, 0x51, 0x4a, 0x37, 0x49, 0x46, 0x54,
];

/// Translates one byte of a keyboard in set 2, but for the break prefix 0xf0, which the controller holds.
pub(super) fn translate(byte: u8) -> u8 {
    match byte {
        0x83 => 0x41,
        0x84 => 0x54,
        _ => SET_2_TO_1.get(usize::from(byte)).copied().unwrap_or(byte),
    }
}

/// The set-2 make code of a set-1 make code.
fn to_set_2(code: u8) -> u8 {
    match code {
        0x41 => 0x83,
        0x54 => 0x84,
        _ => (0..).zip(SET_2_TO_1).find(|&(_, set_1)| set_1 == code).map_or(0, |(set_2, _)| set_2),
    }
}

/// A keyboard with 102 keys.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Keyboard {
    pub(super) queue: VecDeque<u8>,
    scanning: bool,
    /// Scan code set: 1 or 2.
    set: u8,
    leds: u8,
    typematic: u8,
    /// Command that waits for its argument.
    command: Option<u8>,
    last_sent: u8,
}

impl Default for Keyboard {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            scanning: true,
            set: 2,
            leds: 0,
            typematic: 0x2b,
            command: None,
            last_sent: 0,
        }
    }
}

impl Keyboard {
    pub(super) fn next_byte(&mut self) -> Option<u8> {
        let byte = self.queue.pop_front()?;
        self.last_sent = byte;
        Some(byte)
    }

    fn reply(&mut self, bytes: &[u8]) {
        push(&mut self.queue, bytes);
    }

    pub(super) fn leds(&self) -> u8 {
        self.leds
    }

    /// Whether a typed character would reach the guest now.
    pub(super) fn has_room(&self) -> bool {
        self.scanning && self.queue.len() + PER_CHAR <= EVENTS
    }

    /// A key goes down or up. Returns whether the guest will hear of it.
    pub(super) fn key(&mut self, key: Key, pressed: bool) -> bool {
        if !self.scanning || self.queue.len() + 3 > EVENTS {
            return false;
        }
        if key.extended {
            self.queue.push_back(0xe0);
        }
        match (self.set, pressed) {
            (1, _) => self.queue.push_back(key.code & 0x7f | if pressed { 0 } else { 0x80 }),
            (_, true) => self.queue.push_back(to_set_2(key.code)),
            (_, false) => self.queue.extend([0xf0, to_set_2(key.code)]),
        }
        true
    }

    /// Types a character. Returns false, and does nothing, when there is no room for it now; a character
    /// that no key types is swallowed.
    pub(super) fn type_char(&mut self, c: char) -> bool {
        if !self.has_room() {
            return false;
        }
        if let Some((key, modifier)) = key_for(c) {
            modifier.map(|modifier| self.key(modifier, true));
            self.key(key, true);
            self.key(key, false);
            modifier.map(|modifier| self.key(modifier, false));
        }
        true
    }

    fn set_defaults(&mut self) {
        let queue = std::mem::take(&mut self.queue);
        *self = Self { queue, last_sent: self.last_sent, leds: self.leds, ..Self::default() };
    }

    /// A byte from the controller.
    pub(super) fn write(&mut self, value: u8) {
        if let Some(command) = self.command.take()
            && value < 0xed
        {
            return self.argument(command, value);
        }
        match value {
            0xed | 0xf0 | 0xf3 => {
                self.command = Some(value);
                self.reply(&[ACK]);
            }
            0xee => self.reply(&[0xee]),
            0xf2 => self.reply(&[ACK, 0xab, 0x83]),
            0xf4 => {
                self.queue.clear();
                self.scanning = true;
                self.reply(&[ACK]);
            }
            0xf5 | 0xf6 => {
                self.queue.clear();
                self.set_defaults();
                self.scanning = value == 0xf6;
                self.reply(&[ACK]);
            }
            // Key types of set 3: nothing to set.
            0xf7..=0xfa => self.reply(&[ACK]),
            0xfe => self.queue.push_front(self.last_sent),
            0xff => {
                *self = Self::default();
                self.reply(&[ACK, TEST_PASSED]);
            }
            _ => self.reply(&[RESEND]),
        }
        self.queue.truncate(QUEUE);
    }

    fn argument(&mut self, command: u8, value: u8) {
        match (command, value) {
            (0xed, _) => self.leds = value & 7,
            (0xf3, _) => self.typematic = value & 0x7f,
            (0xf0, 0) => return self.reply(&[ACK, self.set]),
            (0xf0, 1 | 2) => self.set = value,
            // DEVIATION: no scan code set 3; a driver that asks reads back the set there is.
            _ => {}
        }
        self.reply(&[ACK]);
    }

    pub(super) fn is_valid(&self) -> bool {
        self.queue.len() <= QUEUE && matches!(self.set, 1 | 2)
    }
}

/// Appends as much as fits.
fn push(queue: &mut VecDeque<u8>, bytes: &[u8]) {
    if queue.len() + bytes.len() <= QUEUE {
        queue.extend(bytes);
    }
}

/// A two-axis mouse with three buttons.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Mouse {
    pub(super) queue: VecDeque<u8>,
    reporting: bool,
    remote: bool,
    wrap: bool,
    double_scale: bool,
    resolution: u8,
    sample_rate: u8,
    buttons: u8,
    /// Movement not yet reported.
    dx: i32,
    dy: i32,
    command: Option<u8>,
}

impl Default for Mouse {
    fn default() -> Self {
        Self {
            queue: VecDeque::new(),
            reporting: false,
            remote: false,
            wrap: false,
            double_scale: false,
            resolution: 2,
            sample_rate: 100,
            buttons: 0,
            dx: 0,
            dy: 0,
            command: None,
        }
    }
}

impl Mouse {
    pub(super) fn next_byte(&mut self) -> Option<u8> {
        self.queue.pop_front()
    }

    fn reply(&mut self, bytes: &[u8]) {
        push(&mut self.queue, bytes);
    }

    /// The mouse moves by (`dx` right, `dy` up) with `buttons` held (bit 0 left, 1 right, 2 middle).
    pub(super) fn moved(&mut self, dx: i32, dy: i32, buttons: u8) {
        self.dx = self.dx.saturating_add(dx).clamp(-0x1_0000, 0x1_0000);
        self.dy = self.dy.saturating_add(dy).clamp(-0x1_0000, 0x1_0000);
        self.buttons = buttons & 7;
        if self.reporting && !self.remote && self.queue.len() + 3 <= EVENTS {
            self.report();
        }
    }

    /// One movement packet; what exceeds its nine bits is left for the next.
    fn report(&mut self) {
        let (dx, dy) = (self.dx.clamp(-256, 255), self.dy.clamp(-256, 255));
        self.dx -= dx;
        self.dy -= dy;
        let flags = self.buttons | 0x08 | u8::from(dx < 0) << 4 | u8::from(dy < 0) << 5;
        self.reply(&[flags, dx.to_le_bytes()[0], dy.to_le_bytes()[0]]);
    }

    /// A byte from the controller.
    pub(super) fn write(&mut self, value: u8) {
        if self.wrap && !matches!(value, 0xec | 0xff) {
            return self.reply(&[value]);
        }
        if let Some(command) = self.command.take() {
            match command {
                0xe8 => self.resolution = value & 3,
                _ => self.sample_rate = value,
            }
            return self.reply(&[ACK]);
        }
        match value {
            0xff => {
                *self = Self::default();
                return self.reply(&[ACK, TEST_PASSED, 0]);
            }
            0xe9 => return self.reply_status(),
            0xf2 => return self.reply(&[ACK, 0]),
            0xeb => {
                self.reply(&[ACK]);
                return self.report();
            }
            0xf6 => *self = Self { queue: std::mem::take(&mut self.queue), ..Self::default() },
            0xe6 | 0xe7 => self.double_scale = value == 0xe7,
            0xe8 | 0xf3 => self.command = Some(value),
            0xea => self.remote = false,
            0xf0 => self.remote = true,
            0xec | 0xee => self.wrap = value == 0xee,
            0xf4 | 0xf5 => self.reporting = value == 0xf4,
            _ => return self.reply(&[RESEND]),
        }
        self.reply(&[ACK]);
    }

    fn reply_status(&mut self) {
        let flags = u8::from(self.remote) << 6
            | u8::from(self.reporting) << 5
            | u8::from(self.double_scale) << 4
            | (self.buttons & 1) << 2
            | (self.buttons & 2) >> 1
            | (self.buttons & 4) >> 1;
        self.reply(&[ACK, flags, self.resolution, self.sample_rate]);
    }

    pub(super) fn is_valid(&self) -> bool {
        let moved = |d: i32| d.unsigned_abs() <= 0x1_0000;
        self.queue.len() <= QUEUE && moved(self.dx) && moved(self.dy) && self.buttons < 8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(queue: &mut VecDeque<u8>) -> Vec<u8> {
        queue.drain(..).collect()
    }

    #[test]
    fn every_key_survives_the_way_through_set_2() {
        for code in (0x01..=0x53).chain([0x57, 0x58]) {
            assert_eq!(translate(to_set_2(code)), code, "{code:#x}");
        }
    }

    #[test]
    fn key_for_ascii_covers_all_printable() {
        for byte in 0x20..0x7f_u8 {
            assert!(key_for(char::from(byte)).is_some(), "{byte:#x}");
        }
        assert_eq!(key_for('?'), Some((Key::plain(0x35), Some(Key::SHIFT))));
        assert_eq!(key_for('\x03'), Some((Key::plain(0x2e), Some(Key::CTRL))));
        assert_eq!(key_for('é'), None);
    }

    #[test]
    fn type_char_in_set_2_presses_and_releases() {
        let mut keyboard = Keyboard::default();
        assert!(keyboard.type_char('A'));
        assert_eq!(drain(&mut keyboard.queue), [0x12, 0x1c, 0xf0, 0x1c, 0xf0, 0x12]);
        assert!(keyboard.key(Key::UP, false));
        assert_eq!(drain(&mut keyboard.queue), [0xe0, 0xf0, 0x75]);
    }

    #[test]
    fn command_while_keys_are_unread_is_answered() {
        let mut keyboard = Keyboard::default();
        while keyboard.type_char('x') {}
        while keyboard.key(Key::UP, true) {}
        keyboard.write(0xf2);
        let sent = drain(&mut keyboard.queue);
        assert_eq!(sent[sent.len() - 3..], [0xfa, 0xab, 0x83]);
        assert!(sent.len() <= QUEUE);
    }

    #[test]
    fn keyboard_commands_answer_as_documented() {
        let mut keyboard = Keyboard::default();
        for (bytes, answer) in [
            (&[0xff][..], &[0xfa, 0xaa][..]),
            (&[0xf2], &[0xfa, 0xab, 0x83]),
            (&[0xee], &[0xee]),
            (&[0xed, 0x07], &[0xfa, 0xfa]),
            (&[0xf3, 0x00], &[0xfa, 0xfa]),
            (&[0xf0, 0x00], &[0xfa, 0xfa, 0x02]),
            (&[0xf0, 0x01], &[0xfa, 0xfa]),
            (&[0xf5], &[0xfa]),
            (&[0x12], &[0xfe]),
        ] {
            bytes.iter().for_each(|&byte| keyboard.write(byte));
            assert_eq!(drain(&mut keyboard.queue), answer, "{bytes:x?}");
        }
        assert!(!keyboard.type_char('a'), "disabled");
    }

    #[test]
    fn mouse_commands_and_movement_answer_as_documented() {
        let mut mouse = Mouse::default();
        for (bytes, answer) in [
            (&[0xff][..], &[0xfa, 0xaa, 0x00][..]),
            (&[0xf2], &[0xfa, 0x00]),
            (&[0xf3, 80], &[0xfa, 0xfa]),
            (&[0xe8, 3], &[0xfa, 0xfa]),
            (&[0xe9], &[0xfa, 0x00, 3, 80]),
            (&[0xee, 0x12, 0xec], &[0xfa, 0x12, 0xfa]),
            (&[0xf4], &[0xfa]),
        ] {
            bytes.iter().for_each(|&byte| mouse.write(byte));
            assert_eq!(drain(&mut mouse.queue), answer, "{bytes:x?}");
        }
        mouse.moved(-3, 5, 1);
        assert_eq!(drain(&mut mouse.queue), [0x19, 0xfd, 5]);
    }
}
