//! A 16550A UART (National Semiconductor PC16550D datasheet, 1995).
//!
//! Way of the data: a byte the guest transmits goes to the sink at once and is flushed; a byte for the
//! guest waits with the host until [`Serial::has_room`], enters the receive FIFO by [`Serial::receive`],
//! and raises the line. Reads of the line status do not cost more than the exit.
//!
//! Own code instead of `vm-superio`: that one has no receive time-out interrupt, no modem-status deltas,
//! no trigger levels and a FIFO that is not 16 bytes deep, all of which drivers' probing looks at.
//!
//! **When the host may send.** A UART driver clears the receive FIFO when it opens the port, so input
//! that comes earlier would be lost (a script piped into `trellis boot`). The port is open for input
//! only while the guest listens: its received-data interrupt has been enabled for [`LISTEN_NS`] (longer
//! than the moment in which drivers probe that bit), or it polls for input (reads the line status again
//! and again without transmitting). It is what flow control does on a real line.
//!
//! **Blocking.** The sink is written with the device locked. A sink whose reader stalls (a full pipe)
//! stops the vCPU that writes until the reader goes on, as a paused terminal should; an error of the
//! sink is counted and the byte dropped.
//!
// DEVIATION: bytes are transmitted in no time, and the interrupt line does not depend on MCR OUT2. A guest
// that measures the line rate would notice the first, none is known to notice the second.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};

use super::{BytePorts, TimeBase, attach_ports, unfit};
use crate::bus::{Bus, Overlap, lock};
use crate::clock::{Timer, TimerTarget};
use crate::irq::IrqLine;
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};

/// First port of COM1, on IRQ 4.
pub const COM1: u16 = 0x3f8;
/// First port of COM2, on IRQ 3.
pub const COM2: u16 = 0x2f8;
/// Depth of the FIFOs.
const FIFO: usize = 16;
/// How long the received-data interrupt must be enabled before input flows.
pub const LISTEN_NS: u64 = 1_000_000;
/// Reads of the line status in a row that count as polling for input.
const POLLS: u8 = 8;

const TIMER_TIMEOUT: u32 = 0;
const TIMER_LISTEN: u32 = 1;

const IER_RDA: u8 = 0x01;
const IER_THRE: u8 = 0x02;
const IER_LINE: u8 = 0x04;
const IER_MODEM: u8 = 0x08;
const LSR_DR: u8 = 0x01;
const LSR_OE: u8 = 0x02;
const LSR_BI: u8 = 0x10;
/// THR and transmitter empty: always.
const LSR_IDLE: u8 = 0x60;
const LCR_DLAB: u8 = 0x80;
const MCR_LOOP: u8 = 0x10;
/// CTS, DSR and DCD: a terminal is there.
const MSR_CONNECTED: u8 = 0xb0;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SerialState {
    ier: u8,
    /// FIFO control bits 0 (enable), 6 and 7 (trigger level).
    fcr: u8,
    lcr: u8,
    mcr: u8,
    /// Overrun and break bits of the line status.
    errors: u8,
    /// Modem status: inputs and their deltas.
    msr: u8,
    scratch: u8,
    divisor: u16,
    rx: VecDeque<u8>,
    /// The transmitter-empty interrupt waits to be seen.
    thre: bool,
    /// Received data lay untouched for four character times.
    timeout: bool,
    /// The guest has had its received-data interrupt enabled for long enough.
    listening: bool,
    /// Reads of the line status since the last transmission.
    polls: u8,
}

impl Default for SerialState {
    fn default() -> Self {
        Self {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            errors: 0,
            msr: MSR_CONNECTED,
            scratch: 0,
            divisor: 12,
            rx: VecDeque::new(),
            thre: true,
            timeout: false,
            listening: false,
            polls: 0,
        }
    }
}

impl SerialState {
    fn fifos(&self) -> bool {
        self.fcr & 1 != 0
    }

    fn depth(&self) -> usize {
        if self.fifos() { FIFO } else { 1 }
    }

    fn trigger(&self) -> usize {
        if self.fifos() { [1, 4, 8, 14][usize::from(self.fcr >> 6)] } else { 1 }
    }

    /// Interrupt identification by priority (datasheet table 4).
    fn iir(&self) -> u8 {
        let enabled = |bit: u8| self.ier & bit != 0;
        let cause = if enabled(IER_LINE) && self.errors != 0 {
            0x06
        } else if enabled(IER_RDA) && self.rx.len() >= self.trigger() {
            0x04
        } else if enabled(IER_RDA) && self.timeout && !self.rx.is_empty() {
            0x0c
        } else if enabled(IER_THRE) && self.thre {
            0x02
        } else if enabled(IER_MODEM) && self.msr & 0x0f != 0 {
            0x00
        } else {
            0x01
        };
        cause | if self.fifos() { 0xc0 } else { 0 }
    }

    fn push(&mut self, byte: u8) {
        if self.rx.len() < self.depth() {
            self.rx.push_back(byte);
        } else {
            self.errors |= LSR_OE;
            if !self.fifos() {
                self.rx[0] = byte;
            }
        }
    }

    /// Sets the modem inputs (bits 7:4) and the deltas that follow.
    fn set_modem_inputs(&mut self, inputs: u8) {
        let changed = (self.msr ^ inputs) & 0xf0;
        // RI counts only when it ends.
        let ring_ended = changed & 0x40 != 0 && inputs & 0x40 == 0;
        let deltas = (changed >> 4) & 0x0b | u8::from(ring_ended) << 2;
        self.msr = inputs & 0xf0 | self.msr & 0x0f | deltas;
    }

    fn modem_inputs(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CONNECTED;
        }
        let mcr = self.mcr;
        (mcr & 2) << 3 | (mcr & 1) << 5 | (mcr & 4) << 4 | (mcr & 8) << 4
    }

    fn write_fcr(&mut self, value: u8) {
        if (self.fcr ^ value) & 1 != 0 || value & 0x02 != 0 {
            self.rx.clear();
            self.timeout = false;
        }
        self.fcr = if value & 1 != 0 { value & 0xc1 } else { 0 };
    }

    /// Four characters of start bit, data, parity and stop bits, at 1.8432 MHz / 16 / divisor.
    fn timeout_ns(&self) -> u64 {
        let bits = u64::from(1 + 5 + (self.lcr & 3) + (self.lcr >> 2 & 1) + 1 + (self.lcr >> 3 & 1));
        4 * bits * u64::from(self.divisor.max(1)) * 1_000_000_000 / 115_200
    }
}

/// Called, with the UART locked, when it may accept input after it could not: wake the reader and return.
pub type RoomCallback = Box<dyn Fn() + Send>;

/// One serial port of eight registers.
pub struct Serial {
    name: String,
    state: SerialState,
    time: TimeBase,
    timeout: Timer,
    listen: Timer,
    line: IrqLine,
    sink: Box<dyn Write + Send>,
    lost_bytes: u64,
    on_room: Option<RoomCallback>,
    had_room: bool,
}

impl Serial {
    const VERSION: u32 = 1;

    /// A UART called `name` in snapshots (`com1`), interrupting on `line` and transmitting into `sink`.
    pub fn new(name: &str, time: TimeBase, line: IrqLine, sink: Box<dyn Write + Send>) -> Arc<Mutex<Self>> {
        Arc::new_cyclic(|weak: &Weak<Mutex<Self>>| {
            Mutex::new(Self {
                name: name.to_owned(),
                state: SerialState::default(),
                timeout: time.timer(weak, TIMER_TIMEOUT),
                listen: time.timer(weak, TIMER_LISTEN),
                time,
                line,
                sink,
                lost_bytes: 0,
                on_room: None,
                had_room: false,
            })
        })
    }

    /// Puts the UART on the bus at `base` ([`COM1`], [`COM2`]).
    ///
    /// # Errors
    /// When a port is taken.
    pub fn attach(this: &Arc<Mutex<Self>>, bus: &Bus, base: u16) -> Result<(), Overlap> {
        attach_ports(bus, this, &[(base, 8)])
    }

    /// The state after a machine reset. Input that the guest did not read is gone.
    pub fn reset(&mut self) {
        self.state = SerialState::default();
        self.timeout.cancel();
        self.listen.cancel();
        self.update();
    }

    /// Who is told when there is room for input.
    pub fn set_room_callback(&mut self, callback: RoomCallback) {
        self.on_room = Some(callback);
    }

    /// Whether [`Serial::receive`] would accept a byte now.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let state = &self.state;
        let open = state.listening || state.polls >= POLLS;
        open && state.mcr & MCR_LOOP == 0 && state.rx.len() < state.depth()
    }

    /// Input from the host's side of the line. Returns how many bytes were accepted (0 while there is no
    /// room); the rest is to be offered again after the room callback.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        if !self.has_room() {
            return 0;
        }
        let count = bytes.len().min(self.state.depth() - self.state.rx.len());
        self.state.rx.extend(&bytes[..count]);
        self.data_moved();
        self.update();
        count
    }

    /// A break condition on the line: a NUL byte with the break bit.
    pub fn receive_break(&mut self) {
        self.state.push(0);
        self.state.errors |= LSR_BI;
        self.data_moved();
        self.update();
    }

    /// Bytes that the sink did not take.
    #[must_use]
    pub fn lost_bytes(&self) -> u64 {
        self.lost_bytes
    }

    /// The receive FIFO changed: the time-out starts anew.
    fn data_moved(&mut self) {
        self.state.timeout = false;
        if self.state.fifos() && !self.state.rx.is_empty() {
            self.timeout.set(self.time.now().after(self.state.timeout_ns()));
        } else {
            self.timeout.cancel();
        }
    }

    fn update(&mut self) {
        self.line.set(self.state.iir() & 1 == 0);
        let room = self.has_room();
        if room
            && !self.had_room
            && let Some(callback) = &self.on_room
        {
            callback();
        }
        self.had_room = room;
    }

    fn transmit(&mut self, byte: u8) {
        self.state.polls = 0;
        self.state.thre = true;
        if self.state.mcr & MCR_LOOP != 0 {
            self.state.push(byte);
            self.data_moved();
        } else if self.sink.write_all(&[byte]).and_then(|()| self.sink.flush()).is_err() {
            self.lost_bytes += 1;
        }
    }

    fn write_ier(&mut self, value: u8) {
        let value = value & 0x0f;
        let risen = value & !self.state.ier;
        if risen & IER_THRE != 0 {
            self.state.thre = true;
        }
        self.state.ier = value;
        if value & IER_RDA == 0 {
            self.state.listening = false;
            self.listen.cancel();
        } else if risen & IER_RDA != 0 {
            self.listen.set(self.time.now().after(LISTEN_NS));
        }
    }

    fn read_lsr(&mut self) -> u8 {
        let state = &mut self.state;
        state.polls = state.polls.saturating_add(1);
        LSR_IDLE | std::mem::take(&mut state.errors) | if state.rx.is_empty() { 0 } else { LSR_DR }
    }

    fn read_rbr(&mut self) -> u8 {
        let byte = self.state.rx.pop_front().unwrap_or(0);
        self.data_moved();
        byte
    }
}

impl BytePorts for Serial {
    fn read8(&mut self, port: u16) -> u8 {
        let dlab = self.state.lcr & LCR_DLAB != 0;
        let [low, high] = self.state.divisor.to_le_bytes();
        let value = match port & 7 {
            0 if dlab => low,
            0 => self.read_rbr(),
            1 if dlab => high,
            1 => self.state.ier,
            2 => {
                let iir = self.state.iir();
                if iir & 0x0f == 0x02 {
                    self.state.thre = false;
                }
                iir
            }
            3 => self.state.lcr,
            4 => self.state.mcr,
            5 => self.read_lsr(),
            6 => {
                let msr = self.state.msr;
                self.state.msr &= 0xf0;
                msr
            }
            _ => self.state.scratch,
        };
        self.update();
        value
    }

    fn write8(&mut self, port: u16, value: u8) {
        let dlab = self.state.lcr & LCR_DLAB != 0;
        let state = &mut self.state;
        match port & 7 {
            0 if dlab => state.divisor = state.divisor & 0xff00 | u16::from(value),
            0 => {
                self.transmit(value);
                // The line drops and rises with each byte: an edge-triggered PIC must see it.
                if self.state.ier & IER_THRE != 0 {
                    self.line.set(false);
                }
            }
            1 if dlab => state.divisor = state.divisor & 0x00ff | u16::from(value) << 8,
            1 => self.write_ier(value),
            2 => state.write_fcr(value),
            3 => state.lcr = value,
            4 => {
                state.mcr = value & 0x1f;
                let inputs = state.modem_inputs();
                state.set_modem_inputs(inputs);
            }
            7 => state.scratch = value,
            _ => {}
        }
        self.update();
    }
}

impl TimerTarget for Mutex<Serial> {
    fn fire(&self, id: u32) {
        let mut serial = lock(self);
        if id == TIMER_TIMEOUT {
            serial.state.timeout = true;
        } else {
            serial.state.listening = serial.state.ier & IER_RDA != 0;
        }
        serial.update();
    }
}

impl Snapshot for Serial {
    fn save(&self) -> StateBlob {
        to_blob(&self.name, Self::VERSION, &self.state)
    }

    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        let state: SerialState = from_blob(&self.name, Self::VERSION, blob)?;
        if state.rx.len() > FIFO {
            return Err(unfit(&self.name, "more bytes than the receive FIFO holds"));
        }
        self.state = state;
        if !self.state.timeout {
            self.data_moved();
        }
        if self.state.ier & IER_RDA != 0 && !self.state.listening {
            self.listen.set(self.time.now().after(LISTEN_NS));
        }
        self.update();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, hammer_ports};
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[derive(Clone, Default)]
    struct Out(Arc<Mutex<Vec<u8>>>);
    impl Write for Out {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            lock(&self.0).extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn serial(bench: &Bench) -> (Out, Arc<Mutex<Serial>>) {
        let out = Out::default();
        let serial = Serial::new("com1", bench.time.clone(), bench.line(4), Box::new(out.clone()));
        (out, serial)
    }

    fn read(serial: &Mutex<Serial>, register: u16) -> u8 {
        lock(serial).read8(COM1 + register)
    }

    fn write(serial: &Mutex<Serial>, register: u16, value: u8) {
        lock(serial).write8(COM1 + register, value);
    }

    /// Opens the port as a driver would: FIFOs with `trigger`, received-data interrupt.
    fn open(bench: &Bench, serial: &Mutex<Serial>, trigger: u8) {
        write(serial, 2, trigger << 6 | 7);
        write(serial, 3, 3);
        write(serial, 4, 0x0b);
        write(serial, 1, IER_RDA);
        bench.run(LISTEN_NS);
    }

    #[test]
    fn transmit_byte_reaches_sink_and_interrupts() {
        let bench = Bench::new();
        let (out, serial) = serial(&bench);
        write(&serial, 1, IER_THRE);
        assert_eq!(read(&serial, 2), 0x02);
        assert_eq!(read(&serial, 2), 0x01, "reading the cause clears it");
        write(&serial, 0, b'x');
        assert!(bench.lines.level(4));
        assert_eq!(*lock(&out.0), b"x");
        let edges = bench.lines.edges(4);
        write(&serial, 0, b'y');
        assert_eq!(bench.lines.edges(4), edges + 1);
    }

    #[test]
    fn receive_before_the_guest_listens_waits() {
        let bench = Bench::new();
        let (_, serial) = serial(&bench);
        let calls = Arc::new(AtomicU32::new(0));
        let seen = Arc::clone(&calls);
        lock(&serial).set_room_callback(Box::new(move || {
            seen.fetch_add(1, Ordering::Relaxed);
        }));
        assert_eq!(lock(&serial).receive(b"hello"), 0);
        write(&serial, 1, 0x0f);
        write(&serial, 1, 0);
        bench.run(10 * LISTEN_NS);
        assert_eq!(lock(&serial).receive(b"hello"), 0, "a probe is no listener");
        open(&bench, &serial, 0);
        assert_eq!(calls.load(Ordering::Relaxed), 1);
        assert_eq!(lock(&serial).receive(b"hello"), 5);
        assert!(bench.lines.level(4));
        let bytes: Vec<u8> = (0..5).map(|_| read(&serial, 0)).collect();
        assert_eq!(bytes, b"hello");
        assert!(!bench.lines.level(4));
    }

    #[test]
    fn polling_guest_without_interrupts_gets_input() {
        let bench = Bench::new();
        let (_, serial) = serial(&bench);
        for _ in 0..4 {
            read(&serial, 5);
            write(&serial, 0, b'.');
        }
        assert!(!lock(&serial).has_room(), "it polls for output");
        (0..POLLS).for_each(|_| assert_eq!(read(&serial, 5), 0x60));
        assert_eq!(lock(&serial).receive(b"ab"), 1, "no FIFO: one byte");
        assert_eq!(read(&serial, 5), 0x61);
        assert_eq!(read(&serial, 0), b'a');
    }

    #[test]
    fn receive_below_trigger_interrupts_after_timeout() {
        let bench = Bench::new();
        let (_, serial) = serial(&bench);
        open(&bench, &serial, 3);
        assert_eq!(lock(&serial).receive(b"abc"), 3);
        assert!(!bench.lines.level(4));
        bench.run(5_000_000);
        assert_eq!(read(&serial, 2), 0xcc);
        read(&serial, 0);
        assert_eq!(read(&serial, 2), 0xc1);
        assert_eq!(lock(&serial).receive(&[0; 20]), 14, "16 deep");
        assert_eq!(read(&serial, 2), 0xc4);
        assert!(!lock(&serial).has_room());
    }

    #[test]
    fn loopback_returns_bytes_and_modem_lines() {
        let bench = Bench::new();
        let (out, serial) = serial(&bench);
        write(&serial, 2, 1);
        write(&serial, 4, 0x1a);
        assert_eq!(read(&serial, 6) & 0xf0, 0x90, "as Linux probes it");
        for byte in 0..17 {
            write(&serial, 0, byte);
        }
        assert_eq!(read(&serial, 5), 0x63, "overrun");
        let count = (0..100).take_while(|_| read(&serial, 5) & 1 != 0 && read(&serial, 0) < 17).count();
        assert_eq!(count, 16);
        assert!(lock(&out.0).is_empty());
    }

    #[test]
    fn modem_status_change_sets_delta_until_read() {
        let bench = Bench::new();
        let (_, serial) = serial(&bench);
        write(&serial, 1, IER_MODEM);
        write(&serial, 4, 0x10);
        assert_eq!(read(&serial, 2), 0x00);
        assert_eq!(read(&serial, 6), 0x0b);
        assert_eq!(read(&serial, 6), 0x00);
        assert_eq!(read(&serial, 2), 0x01);
    }

    #[test]
    fn divisor_latch_and_scratch_keep_their_values() {
        let bench = Bench::new();
        let (_, serial) = serial(&bench);
        write(&serial, 3, 0x83);
        write(&serial, 0, 0x34);
        write(&serial, 1, 0x12);
        assert_eq!((read(&serial, 0), read(&serial, 1)), (0x34, 0x12));
        write(&serial, 3, 0x03);
        assert_eq!(read(&serial, 1), 0);
        write(&serial, 7, 0xa5);
        assert_eq!(read(&serial, 7), 0xa5);
    }

    #[test]
    fn restore_unread_input_is_read_after() {
        let bench = Bench::new();
        let (_, a) = serial(&bench);
        open(&bench, &a, 0);
        lock(&a).receive(b"hi");
        let blob = lock(&a).save();
        let (_, b) = serial(&bench);
        lock(&b).restore(&blob).unwrap();
        assert!(bench.lines.level(4));
        assert_eq!((read(&b, 0), read(&b, 0)), (b'h', b'i'));
        let mut bad = blob;
        bad.data["rx"] = serde_json::json!(vec![0; 17]);
        assert!(lock(&b).restore(&bad).is_err());
    }

    #[test]
    fn nonsense_writes_are_survived() {
        let bench = Bench::new();
        let (_, serial) = serial(&bench);
        let ports: Vec<u16> = (COM1..COM1 + 8).collect();
        hammer_ports(&bench, &serial, &ports, 20_000);
        lock(&serial).receive(&[0; 64]);
    }
}
