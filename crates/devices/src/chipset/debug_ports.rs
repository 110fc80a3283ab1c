//! Ports by which guests talk to whoever watches the machine.
//!
//! - 0x402 (firmware's debug console) and 0xe9 (Bochs' "port E9 hack"): a written byte goes to a sink; a
//!   read gives 0xe9, by which guests recognise the port.
//! - 0x80 and 0xed: POST codes, which also serve as I/O delays.
//! - 0xf4: isa-debug-exit as in QEMU; 0xf5: save marker, at which a test saves and restores the machine.

use std::io::Write;
use std::sync::{Arc, Mutex};

use super::{BytePorts, PowerControl, attach_ports};
use crate::bus::{Bus, Overlap, PortDevice};
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};

/// Ports 0x402 and 0xe9. It has no state.
pub struct DebugConsole {
    sink: Box<dyn Write + Send>,
}

impl DebugConsole {
    /// A console that writes into `sink`, unbuffered; what the sink refuses is dropped.
    pub fn new(sink: Box<dyn Write + Send>) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { sink }))
    }

    /// Puts the console on the bus.
    ///
    /// # Errors
    /// When a port is taken.
    pub fn attach(this: &Arc<Mutex<Self>>, bus: &Bus) -> Result<(), Overlap> {
        attach_ports(bus, this, &[(0x402, 1), (0xe9, 1)])
    }
}

impl BytePorts for DebugConsole {
    fn read8(&mut self, _port: u16) -> u8 {
        0xe9
    }

    fn write8(&mut self, _port: u16, value: u8) {
        // Nobody can be told of an error here: the console is the place to tell it.
        let _dropped = self.sink.write_all(&[value]).and_then(|()| self.sink.flush());
    }
}

/// Ports 0x80 and 0xed: the last POST code.
pub struct PostPorts {
    code: u8,
}

impl PostPorts {
    const NAME: &'static str = "post";
    const VERSION: u32 = 1;

    /// No code yet.
    pub fn new() -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { code: 0 }))
    }

    /// Puts the ports on the bus.
    ///
    /// # Errors
    /// When a port is taken.
    pub fn attach(this: &Arc<Mutex<Self>>, bus: &Bus) -> Result<(), Overlap> {
        attach_ports(bus, this, &[(0x80, 1), (0xed, 1)])
    }

    /// The last code written.
    #[must_use]
    pub fn code(&self) -> u8 {
        self.code
    }
}

impl BytePorts for PostPorts {
    fn read8(&mut self, _port: u16) -> u8 {
        self.code
    }

    fn write8(&mut self, _port: u16, value: u8) {
        self.code = value;
    }
}

impl Snapshot for PostPorts {
    fn save(&self) -> StateBlob {
        to_blob(Self::NAME, Self::VERSION, &self.code)
    }

    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.code = from_blob(Self::NAME, Self::VERSION, blob)?;
        Ok(())
    }
}

/// isa-debug-exit (port 0xf4, 1, 2 or 4 bytes wide) and the save marker (0xf5). It has no state.
pub struct ExitPort {
    exit: bool,
    marker: bool,
    power: Arc<dyn PowerControl>,
}

impl ExitPort {
    /// The pair; `exit` and `marker` say which of the two is there.
    pub fn new(power: Arc<dyn PowerControl>, exit: bool, marker: bool) -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self { exit, marker, power }))
    }

    /// Puts the pair on the bus: four ports from 0xf4.
    ///
    /// # Errors
    /// When a port is taken.
    pub fn attach(this: &Arc<Mutex<Self>>, bus: &Bus) -> Result<(), Overlap> {
        bus.add_ports(0xf4, 4, Arc::clone(this) as _)
    }
}

impl PortDevice for ExitPort {
    fn port_read(&mut self, _offset: u16, _size: u8) -> u32 {
        if self.exit || self.marker { 0 } else { u32::MAX }
    }

    fn port_write(&mut self, offset: u16, size: u8, value: u32) {
        let value = if size >= 4 { value } else { value & ((1 << (8 * u32::from(size))) - 1) };
        match offset {
            0 if self.exit => self.power.debug_exit(value),
            1 if self.marker => self.power.save_marker(value),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Wishes;
    use super::*;
    use crate::bus::lock;

    #[test]
    fn exit_port_32_bit_write_carries_its_value() {
        let wishes = Arc::new(Wishes::default());
        let bus = Bus::default();
        ExitPort::attach(&ExitPort::new(Arc::clone(&wishes) as _, true, true), &bus).unwrap();
        bus.port_write(0xf4, 4, 0x1234_5678);
        bus.port_write(0xf4, 1, 0x110);
        bus.port_write(0xf5, 1, 7);
        bus.port_write(0xf6, 2, 9);
        assert_eq!(wishes.take(), ["exit 0x12345678", "exit 0x10", "marker 0x7"]);
        assert_eq!(bus.port_read(0xf4, 4), 0);
    }

    #[test]
    fn exit_port_not_asked_for_does_nothing() {
        let wishes = Arc::new(Wishes::default());
        let port = ExitPort::new(Arc::clone(&wishes) as _, false, false);
        lock(&port).port_write(0, 4, 1);
        assert_eq!(lock(&port).port_read(0, 4), u32::MAX);
        assert!(wishes.take().is_empty());
    }

    #[test]
    fn post_ports_read_back_last_code() {
        let bus = Bus::default();
        let post = PostPorts::new();
        PostPorts::attach(&post, &bus).unwrap();
        bus.port_write(0x80, 1, 0x55);
        assert_eq!(bus.port_read(0xed, 1), 0x55);
        let blob = lock(&post).save();
        bus.port_write(0x80, 1, 0);
        lock(&post).restore(&blob).unwrap();
        assert_eq!(lock(&post).code(), 0x55);
    }

    #[test]
    fn debug_console_is_recognised_and_writes() {
        let bus = Bus::default();
        DebugConsole::attach(&DebugConsole::new(Box::new(std::io::sink())), &bus).unwrap();
        assert_eq!(bus.port_read(0x402, 1), 0xe9);
        bus.port_write(0xe9, 1, u32::from(b'x'));
    }
}
