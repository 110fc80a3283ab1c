//! The keyboard controller (Intel 8042 as programmed in the IBM PC AT and PS/2; "PS/2 Hardware Interface
//! Technical Reference", Keyboard and Auxiliary Device Controller): ports 0x60 and 0x64, IRQ 1 and 12.
//!
//! Way of the data: the terminal types with [`I8042::type_char`] or [`I8042::key`] → the keyboard queues
//! set-2 bytes → the controller translates them to set 1 and puts one at a time into its output buffer,
//! raising the line. Input that the guest cannot take yet is refused, not lost.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

pub use super::ps2::{Key, key_for};
use super::ps2::{Keyboard, Mouse, translate};
use super::{A20, BytePorts, PowerControl, attach_ports, unfit};
use crate::bus::{Bus, Overlap};
use crate::irq::IrqLine;
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};

/// Controller command byte.
const CCB_KEYBOARD_IRQ: u8 = 0x01;
const CCB_MOUSE_IRQ: u8 = 0x02;
const CCB_SYSTEM: u8 = 0x04;
const CCB_KEYBOARD_OFF: u8 = 0x10;
const CCB_MOUSE_OFF: u8 = 0x20;
const CCB_TRANSLATE: u8 = 0x40;

/// Status register.
const STATUS_FULL: u8 = 0x01;
const STATUS_COMMAND: u8 = 0x08;
const STATUS_UNLOCKED: u8 = 0x10;
const STATUS_MOUSE: u8 = 0x20;

/// Output port.
const OUT_NO_RESET: u8 = 0x01;
const OUT_A20: u8 = 0x02;

/// Most controller answers that wait behind the output buffer.
const MAX_REPLIES: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Output {
    byte: u8,
    from_mouse: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct I8042State {
    /// Internal RAM; byte 0 is the command byte.
    ram: [u8; 32],
    /// Output buffer, while full.
    output: Option<Output>,
    /// Byte last in the output buffer: what an early read gives again.
    last: u8,
    replies: VecDeque<Output>,
    /// Command that waits for its data byte.
    command: Option<u8>,
    last_write_was_command: bool,
    /// The keyboard sent the break prefix, which translation folds into the next byte.
    break_next: bool,
    /// Output port as written, but for the A20 bit.
    output_port: u8,
    keyboard: Keyboard,
    mouse: Mouse,
    /// The A20 gate, which port 0x92 shares.
    a20: bool,
}

impl I8042State {
    /// As firmware leaves it: keyboard on, translated and interrupting, mouse off.
    fn new() -> Self {
        let mut ram = [0; 32];
        ram[0] = CCB_KEYBOARD_IRQ | CCB_SYSTEM | CCB_MOUSE_OFF | CCB_TRANSLATE;
        Self {
            ram,
            output: None,
            last: 0,
            replies: VecDeque::new(),
            command: None,
            last_write_was_command: false,
            break_next: false,
            output_port: 0xcd,
            keyboard: Keyboard::default(),
            mouse: Mouse::default(),
            a20: true,
        }
    }
}

/// The controller with its keyboard and mouse.
pub struct I8042 {
    state: I8042State,
    keyboard_line: IrqLine,
    mouse_line: IrqLine,
    a20: Arc<A20>,
    power: Arc<dyn PowerControl>,
    on_room: Option<super::serial::RoomCallback>,
    had_room: bool,
}

impl I8042 {
    const NAME: &'static str = "i8042";
    const VERSION: u32 = 1;

    /// A controller on IRQ 1 (`keyboard_line`) and IRQ 12 (`mouse_line`).
    pub fn new(
        keyboard_line: IrqLine,
        mouse_line: IrqLine,
        a20: Arc<A20>,
        power: Arc<dyn PowerControl>,
    ) -> Arc<Mutex<Self>> {
        let state = I8042State::new();
        Arc::new(Mutex::new(Self {
            state,
            keyboard_line,
            mouse_line,
            a20,
            power,
            on_room: None,
            had_room: true,
        }))
    }

    /// Puts the controller on the bus.
    ///
    /// # Errors
    /// When a port is taken.
    pub fn attach(this: &Arc<Mutex<Self>>, bus: &Bus) -> Result<(), Overlap> {
        attach_ports(bus, this, &[(0x60, 1), (0x64, 1)])
    }

    /// The state after a machine reset.
    pub fn reset(&mut self) {
        self.state = I8042State::new();
        self.a20.set(true);
        self.update();
    }

    /// Who is told, with the controller locked, when a character may be typed again.
    pub fn set_room_callback(&mut self, callback: super::serial::RoomCallback) {
        self.on_room = Some(callback);
    }

    /// Whether [`I8042::type_char`] would reach the guest now.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.ccb() & CCB_KEYBOARD_OFF == 0 && self.state.keyboard.has_room()
    }

    /// Types an ASCII character: presses and releases the keys that make it on a US keyboard. Returns
    /// false when there is no room for it now: try again after the room callback.
    pub fn type_char(&mut self, c: char) -> bool {
        let typed = self.has_room() && self.state.keyboard.type_char(c);
        self.update();
        typed
    }

    /// A key goes down or up. Returns whether the guest will hear of it.
    pub fn key(&mut self, key: Key, pressed: bool) -> bool {
        let heard = self.has_room() && self.state.keyboard.key(key, pressed);
        self.update();
        heard
    }

    /// The mouse moves by (`dx` right, `dy` up) with `buttons` held (bit 0 left, 1 right, 2 middle).
    pub fn move_mouse(&mut self, dx: i32, dy: i32, buttons: u8) {
        self.state.mouse.moved(dx, dy, buttons);
        self.update();
    }

    /// The keyboard's lights: bit 0 scroll lock, 1 num lock, 2 caps lock.
    #[must_use]
    pub fn leds(&self) -> u8 {
        self.state.keyboard.leds()
    }

    fn ccb(&self) -> u8 {
        self.state.ram[0]
    }

    /// Fills the output buffer with what comes next, and drives the lines.
    fn update(&mut self) {
        if self.state.output.is_none() {
            self.state.output = self.next_output();
            if let Some(output) = self.state.output {
                self.state.last = output.byte;
            }
        }
        let ccb = self.ccb();
        let (full, mouse) = self.state.output.map_or((false, false), |output| (true, output.from_mouse));
        self.keyboard_line.set(full && !mouse && ccb & CCB_KEYBOARD_IRQ != 0);
        self.mouse_line.set(full && mouse && ccb & CCB_MOUSE_IRQ != 0);
        let room = self.has_room();
        if room
            && !self.had_room
            && let Some(callback) = &self.on_room
        {
            callback();
        }
        self.had_room = room;
    }

    fn next_output(&mut self) -> Option<Output> {
        let ccb = self.ccb();
        if let Some(reply) = self.state.replies.pop_front() {
            return Some(reply);
        }
        if ccb & CCB_KEYBOARD_OFF == 0
            && let Some(byte) = self.next_keyboard_byte(ccb & CCB_TRANSLATE != 0)
        {
            return Some(Output { byte, from_mouse: false });
        }
        if ccb & CCB_MOUSE_OFF != 0 {
            return None;
        }
        self.state.mouse.next_byte().map(|byte| Output { byte, from_mouse: true })
    }

    fn next_keyboard_byte(&mut self, translated: bool) -> Option<u8> {
        loop {
            let byte = self.state.keyboard.next_byte()?;
            if !translated {
                return Some(byte);
            }
            if byte == 0xf0 {
                self.state.break_next = true;
                continue;
            }
            let released = std::mem::take(&mut self.state.break_next);
            return Some(translate(byte) | if released { 0x80 } else { 0 });
        }
    }

    fn reply(&mut self, byte: u8, from_mouse: bool) {
        if self.state.replies.len() < MAX_REPLIES {
            self.state.replies.push_back(Output { byte, from_mouse });
        }
    }

    fn status(&self) -> u8 {
        let output = match self.state.output {
            None => 0,
            Some(output) if output.from_mouse => STATUS_FULL | STATUS_MOUSE,
            Some(_) => STATUS_FULL,
        };
        let command = if self.state.last_write_was_command { STATUS_COMMAND } else { 0 };
        output | command | STATUS_UNLOCKED | self.ccb() & CCB_SYSTEM
    }

    fn output_port(&self) -> u8 {
        let full = match self.state.output {
            None => 0,
            Some(output) if output.from_mouse => 0x20,
            Some(_) => 0x10,
        };
        let a20 = if self.a20.is_open() { OUT_A20 } else { 0 };
        self.state.output_port & !(OUT_A20 | 0x30) | a20 | full | OUT_NO_RESET
    }

    fn write_output_port(&mut self, value: u8) {
        self.state.output_port = value;
        self.a20.set(value & OUT_A20 != 0);
        if value & OUT_NO_RESET == 0 {
            self.power.reset();
        }
    }

    /// Port 0x64.
    fn write_command(&mut self, command: u8) {
        self.state.command = None;
        self.state.last_write_was_command = true;
        match command {
            0x20..=0x3f => self.reply(self.state.ram[usize::from(command & 0x1f)], false),
            0x60..=0x7f | 0xd1..=0xd4 => self.state.command = Some(command),
            0xa7 => self.state.ram[0] |= CCB_MOUSE_OFF,
            0xa8 => self.state.ram[0] &= !CCB_MOUSE_OFF,
            0xa9 | 0xab => self.reply(0, false),
            0xaa => {
                self.state.ram[0] |= CCB_SYSTEM;
                self.reply(0x55, false);
            }
            0xad => self.state.ram[0] |= CCB_KEYBOARD_OFF,
            0xae => self.state.ram[0] &= !CCB_KEYBOARD_OFF,
            // Input port: keyboard not locked, display is colour.
            0xc0 => self.reply(0xa0, false),
            0xd0 => self.reply(self.output_port(), false),
            0xdd | 0xdf => self.a20.set(command == 0xdf),
            // Pulse output lines; bit 0 low pulses the reset line.
            0xf0..=0xff if command & 1 == 0 => self.power.reset(),
            _ => {}
        }
    }

    /// Port 0x60.
    fn write_data(&mut self, value: u8) {
        self.state.last_write_was_command = false;
        match self.state.command.take() {
            Some(command @ 0x60..=0x7f) => self.state.ram[usize::from(command & 0x1f)] = value,
            Some(0xd1) => self.write_output_port(value),
            Some(0xd2) => self.reply(value, false),
            Some(0xd3) => self.reply(value, true),
            Some(_) => {
                self.state.ram[0] &= !CCB_MOUSE_OFF;
                self.state.mouse.write(value);
            }
            None => {
                // Sending to the keyboard turns its port on.
                self.state.ram[0] &= !CCB_KEYBOARD_OFF;
                self.state.break_next = false;
                self.state.keyboard.write(value);
            }
        }
    }

    fn read_data(&mut self) -> u8 {
        if self.state.output.take().is_some() {
            // The line drops before the next byte raises it: an edge for each byte.
            self.keyboard_line.set(false);
            self.mouse_line.set(false);
        }
        self.state.last
    }
}

impl BytePorts for I8042 {
    fn read8(&mut self, port: u16) -> u8 {
        if port & 4 != 0 {
            return self.status();
        }
        let byte = self.read_data();
        self.update();
        byte
    }

    fn write8(&mut self, port: u16, value: u8) {
        if port & 4 != 0 {
            self.write_command(value)
        } else {
            self.write_data(value)
        }
        self.update();
    }
}

impl Snapshot for I8042 {
    fn save(&self) -> StateBlob {
        let state = I8042State { a20: self.a20.is_open(), ..self.state.clone() };
        to_blob(Self::NAME, Self::VERSION, &state)
    }

    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        let state: I8042State = from_blob(Self::NAME, Self::VERSION, blob)?;
        if !state.keyboard.is_valid() || !state.mouse.is_valid() || state.replies.len() > MAX_REPLIES {
            return Err(unfit(Self::NAME, "a queue is too long or a mode unknown"));
        }
        self.a20.set(state.a20);
        self.state = state;
        self.update();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, Wishes, hammer_ports};
    use super::*;
    use crate::bus::lock;

    struct Set {
        bench: Bench,
        wishes: Arc<Wishes>,
        a20: Arc<A20>,
        device: Arc<Mutex<I8042>>,
    }

    fn set() -> Set {
        let bench = Bench::new();
        let wishes = Arc::new(Wishes::default());
        let a20 = Arc::new(A20::default());
        let device = I8042::new(bench.line(1), bench.line(12), Arc::clone(&a20), Arc::clone(&wishes) as _);
        Set { bench, wishes, a20, device }
    }

    fn read_all(device: &Mutex<I8042>) -> Vec<u8> {
        let mut device = lock(device);
        let mut bytes = Vec::new();
        while device.read8(0x64) & STATUS_FULL != 0 {
            bytes.push(device.read8(0x60));
        }
        bytes
    }

    fn command(device: &Mutex<I8042>, bytes: &[u8]) {
        lock(device).write8(0x64, bytes[0]);
        bytes[1..].iter().for_each(|&byte| lock(device).write8(0x60, byte));
    }

    #[test]
    fn typed_char_arrives_translated_with_an_edge_a_byte() {
        let set = set();
        assert!(lock(&set.device).type_char('A'));
        assert!(set.bench.lines.level(1));
        assert_eq!(read_all(&set.device), [0x2a, 0x1e, 0x9e, 0xaa]);
        assert_eq!(set.bench.lines.edges(1), 4);
        lock(&set.device).key(Key::UP, false);
        assert_eq!(read_all(&set.device), [0xe0, 0xc8]);
    }

    #[test]
    fn self_test_and_interface_tests_pass() {
        let set = set();
        for (code, answer) in [(0xaa, 0x55), (0xab, 0), (0xa9, 0), (0x20, 0x65)] {
            command(&set.device, &[code]);
            assert_eq!(read_all(&set.device), [answer], "{code:#x}");
        }
    }

    #[test]
    fn keyboard_reset_identify_through_controller() {
        let set = set();
        lock(&set.device).write8(0x60, 0xff);
        assert_eq!(read_all(&set.device), [0xfa, 0xaa]);
        lock(&set.device).write8(0x60, 0xf2);
        assert_eq!(read_all(&set.device), [0xfa, 0xab, 0x41], "translated");
        command(&set.device, &[0x60, 0x04]);
        lock(&set.device).write8(0x60, 0xf2);
        assert_eq!(read_all(&set.device), [0xfa, 0xab, 0x83]);
        assert!(!set.bench.lines.level(1));
    }

    #[test]
    fn mouse_answers_on_its_line() {
        let set = set();
        command(&set.device, &[0x60, 0x47]);
        command(&set.device, &[0xd4, 0xff]);
        assert!(set.bench.lines.level(12));
        assert_eq!(lock(&set.device).read8(0x64) & 0x21, 0x21);
        assert_eq!(read_all(&set.device), [0xfa, 0xaa, 0x00]);
        command(&set.device, &[0xd3, 0x5a]);
        assert_eq!(lock(&set.device).read8(0x64) & 0x21, 0x21, "the loop that drivers probe with");
        assert_eq!(read_all(&set.device), [0x5a]);
    }

    #[test]
    fn reset_and_a20_by_output_port_and_pulse() {
        let set = set();
        command(&set.device, &[0xfe]);
        assert_eq!(set.wishes.take(), ["reset"]);
        command(&set.device, &[0xd1, 0xdd]);
        assert!(!set.a20.is_open());
        command(&set.device, &[0xd0]);
        assert_eq!(read_all(&set.device)[0] & 3, 1);
        command(&set.device, &[0xd1, 0xdf]);
        assert!(set.a20.is_open());
        command(&set.device, &[0xd1, 0x02]);
        assert_eq!(set.wishes.take(), ["reset"]);
    }

    #[test]
    fn disabled_keyboard_refuses_input_until_enabled() {
        let set = set();
        command(&set.device, &[0xad]);
        assert!(!lock(&set.device).type_char('a'));
        let called = Arc::new(A20::default());
        called.set(false);
        let seen = Arc::clone(&called);
        lock(&set.device).set_room_callback(Box::new(move || seen.set(true)));
        command(&set.device, &[0xae]);
        assert!(called.is_open());
        assert!(lock(&set.device).type_char('a'));
    }

    #[test]
    fn restore_unread_keys_are_read_after() {
        let a = set();
        lock(&a.device).type_char('q');
        let blob = lock(&a.device).save();
        let b = set();
        lock(&b.device).restore(&blob).unwrap();
        assert!(b.bench.lines.level(1));
        assert_eq!(read_all(&b.device), [0x10, 0x90]);
        let mut bad = blob;
        bad.data["keyboard"]["set"] = 7.into();
        assert!(lock(&b.device).restore(&bad).is_err());
    }

    #[test]
    fn nonsense_writes_are_survived() {
        let set = set();
        hammer_ports(&set.bench, &set.device, &[0x60, 0x64], 20_000);
        lock(&set.device).move_mouse(i32::MAX, i32::MIN, 0xff);
        lock(&set.device).move_mouse(i32::MAX, i32::MIN, 0xff);
    }
}
