//! The board's own devices: interrupt controllers, timers, clock, serial port, keyboard, power, display.
//!
//! Pattern of every device here: a struct that holds its wiring (lines, clock, timers, sinks) beside one
//! plain serde state, shared as `Arc<Mutex<Device>>`. The same `Arc` is put on the bus, saved and
//! restored, and is the timers' target (`impl TimerTarget for Mutex<Device>`). A device with 8-bit
//! registers says what an absolute port means ([`BytePorts`]); [`attach_ports`] puts it on the bus,
//! which may take several ranges, and splits wider accesses into bytes as the ISA bridge does.
//!
//! Lock order: device → [`pic::Pic`] / IO-APIC → local APIC. Callbacks out of a device (interrupt lines,
//! [`PowerControl`], room callbacks) run with the device's lock held and must not lock it again.

pub mod acpi_pm;
pub mod debug_ports;
pub mod fw_cfg;
pub mod hpet;
pub mod i8042;
pub mod ioapic;
pub mod irq_router;
pub mod lapic;
pub mod pic;
pub mod pit;
pub mod port92;
mod ps2;
pub mod rtc;
pub mod serial;
pub mod text_screen;
pub mod vga;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::bus::{Bus, Overlap, PortDevice, lock};
use crate::clock::{Clock, Ns, Timer, TimerQueue, TimerTarget};
use crate::snapshot::RestoreError;

/// What a device may ask of the machine as a whole. Called with the device's lock held: the receiver
/// notes the wish and returns; it does not stop the machine from within.
pub trait PowerControl: Send + Sync {
    /// The guest powered the machine off (ACPI S5).
    fn power_off(&self);
    /// The guest reset the machine (i8042, port 0x92, port 0xcf9).
    fn reset(&self);
    /// The guest wrote `value` to the isa-debug-exit port.
    fn debug_exit(&self, value: u32);
    /// The guest wrote `value` to the save marker port: a test asks for save → restore → continue here.
    fn save_marker(&self, value: u32);
}

/// The clock and the deadlines of a machine, as its devices share them.
#[derive(Clone)]
pub struct TimeBase {
    /// Guest time.
    pub clock: Arc<dyn Clock>,
    /// Deadlines of all devices.
    pub timers: Arc<TimerQueue>,
}

impl TimeBase {
    /// Guest time now.
    #[must_use]
    pub fn now(&self) -> Ns {
        self.clock.now()
    }

    /// A timer that calls the device behind `target`.
    pub fn timer<D>(&self, target: &std::sync::Weak<Mutex<D>>, id: u32) -> Timer
    where
        Mutex<D>: TimerTarget,
        D: 'static,
    {
        let weak: std::sync::Weak<dyn TimerTarget> = target.clone();
        self.timers.timer(weak, id)
    }
}

/// A device with 8-bit registers, addressed by absolute port.
pub trait BytePorts: Send {
    /// IN from `port`.
    fn read8(&mut self, port: u16) -> u8;
    /// OUT to `port`.
    fn write8(&mut self, port: u16, value: u8);
}

/// One port range of a [`BytePorts`] device, as the bus holds it.
pub struct PortWindow<D> {
    base: u16,
    device: Arc<Mutex<D>>,
}

impl<D: BytePorts> PortDevice for PortWindow<D> {
    fn port_read(&mut self, offset: u16, size: u8) -> u32 {
        let mut device = lock(&self.device);
        let first = self.base.wrapping_add(offset);
        (0..size.min(4))
            .fold(0, |value, i| value | u32::from(device.read8(first.wrapping_add(u16::from(i)))) << (8 * i))
    }

    fn port_write(&mut self, offset: u16, size: u8, value: u32) {
        let mut device = lock(&self.device);
        let first = self.base.wrapping_add(offset);
        for (port, byte) in (0..u16::from(size.min(4))).zip(value.to_le_bytes()) {
            device.write8(first.wrapping_add(port), byte);
        }
    }
}

/// Lets `device` answer the port `ranges` (first port, count).
///
/// # Errors
/// When a port is taken.
pub fn attach_ports<D: BytePorts + 'static>(
    bus: &Bus,
    device: &Arc<Mutex<D>>,
    ranges: &[(u16, u16)],
) -> Result<(), Overlap> {
    for &(base, count) in ranges {
        bus.add_ports(base, count, Arc::new(Mutex::new(PortWindow { base, device: Arc::clone(device) })))?;
    }
    Ok(())
}

/// The A20 gate, shared by the i8042 and port 0x92.
///
// DEVIATION: the gate is only observable: physical address bit 20 is never masked, as on every CPU that
// dropped the A20M# pin. Only real-mode programs that count on the wrap at 1 MiB would notice.
#[derive(Debug)]
pub struct A20(AtomicBool);

impl Default for A20 {
    fn default() -> Self {
        Self(AtomicBool::new(true))
    }
}

impl A20 {
    /// Whether the guest last asked for the gate to be open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Opens or closes the gate.
    pub fn set(&self, open: bool) {
        self.0.store(open, Ordering::Relaxed);
    }
}

/// Whether the HPET has taken over the lines of PIT (IRQ 0) and RTC (IRQ 8): HPET 1.0a 2.3.5, LEG_RT_CNF.
#[derive(Debug, Default)]
pub struct LegacyGate(AtomicBool);

impl LegacyGate {
    /// Whether PIT and RTC are cut off.
    #[must_use]
    pub fn taken(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Cuts PIT and RTC off, or connects them again.
    pub fn set(&self, taken: bool) {
        self.0.store(taken, Ordering::Relaxed);
    }
}

/// What becomes of a tick that is put on an interrupt line now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineState {
    /// It becomes a new interrupt.
    Free,
    /// It would merge with one that the guest has not taken yet.
    Pending,
    /// Nobody listens.
    Masked,
}

/// Asks for the state of a tick line; called with the timer device's lock held.
pub type LineProbe = Box<dyn Fn() -> LineState + Send>;

/// Ticks that a periodic timer owes the guest.
///
/// Policy: a tick that could not be delivered when it was due (the VMM came late, or the guest had not
/// taken the one before) is owed, up to [`Backlog::MAX`]; owed ticks are delivered one at a time, at
/// most at twice the programmed rate, so that a guest that counts ticks keeps time without a storm.
/// A guest that masked the line is owed nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backlog(u32);

impl Backlog {
    /// Most ticks ever owed (10 s at 100 Hz): beyond that, time is lost.
    pub const MAX: u32 = 1000;

    /// `ticks` more are owed.
    pub fn owe(&mut self, ticks: u64) {
        let ticks = u32::try_from(ticks).unwrap_or(u32::MAX);
        self.0 = self.0.saturating_add(ticks).min(Self::MAX);
    }

    /// Ticks owed.
    #[must_use]
    pub fn owed(self) -> u32 {
        self.0
    }

    /// Nothing is owed any more.
    pub fn clear(&mut self) {
        self.0 = 0;
    }

    /// Settles one tick as `line` allows: true means "deliver one now".
    pub fn settle(&mut self, line: LineState) -> bool {
        if self.0 == 0 || line == LineState::Pending {
            return false;
        }
        self.0 = if line == LineState::Masked { 0 } else { self.0 - 1 };
        true
    }
}

/// Shortest time between two ticks that a periodic timer delivers, in ns: no guest can make the VMM spin.
pub const MIN_TICK_NS: u64 = 100_000;

/// A restore error for a value out of range.
fn unfit(name: &str, why: &str) -> RestoreError {
    RestoreError::Unfit { name: name.to_owned(), why: why.to_owned() }
}

#[cfg(test)]
pub(crate) mod testing {
    //! What the tests of this room share.

    use super::*;
    use crate::clock::ManualClock;
    use crate::irq::{IrqLine, IrqSink};

    /// Counts rising edges and remembers the level, per line.
    #[derive(Default)]
    pub struct Lines(pub Mutex<[(bool, u32); 24]>);

    impl IrqSink for Lines {
        fn set_gsi(&self, gsi: u32, level: bool) {
            let line = &mut lock(&self.0)[gsi as usize];
            if level && !line.0 {
                line.1 += 1;
            }
            line.0 = level;
        }
        fn msi(&self, _address: u64, _data: u32) {}
    }

    impl Lines {
        pub fn level(&self, gsi: usize) -> bool {
            lock(&self.0)[gsi].0
        }
        pub fn edges(&self, gsi: usize) -> u32 {
            lock(&self.0)[gsi].1
        }
    }

    /// A machine of nothing but time and lines.
    pub struct Bench {
        pub clock: Arc<ManualClock>,
        pub time: TimeBase,
        pub lines: Arc<Lines>,
    }

    impl Bench {
        pub fn new() -> Self {
            let clock = Arc::new(ManualClock::new(0));
            let time = TimeBase { clock: Arc::clone(&clock) as _, timers: Arc::default() };
            Self { clock, time, lines: Arc::default() }
        }

        pub fn line(&self, gsi: u32) -> IrqLine {
            IrqLine::new(Arc::clone(&self.lines) as _, gsi)
        }

        /// Time passes, deadline by deadline.
        pub fn run(&self, ns: u64) {
            let end = self.clock.now().0 + ns;
            while let Some(at) = self.time.timers.next_deadline().filter(|at| at.0 <= end) {
                self.clock.advance(at.0.saturating_sub(self.clock.now().0));
                self.time.timers.run_due(self.clock.now());
            }
            self.clock.advance(end - self.clock.now().0);
        }

        /// Time passes in one step: every deadline comes late.
        pub fn stall(&self, ns: u64) {
            self.clock.advance(ns);
            self.time.timers.run_due(self.clock.now());
        }
    }

    /// Remembers what the guest wished of the machine.
    #[derive(Default)]
    pub struct Wishes(Mutex<Vec<String>>);

    impl Wishes {
        pub fn take(&self) -> Vec<String> {
            std::mem::take(&mut lock(&self.0))
        }
    }

    impl PowerControl for Wishes {
        fn power_off(&self) {
            lock(&self.0).push("off".to_owned());
        }
        fn reset(&self) {
            lock(&self.0).push("reset".to_owned());
        }
        fn debug_exit(&self, value: u32) {
            lock(&self.0).push(format!("exit {value:#x}"));
        }
        fn save_marker(&self, value: u32) {
            lock(&self.0).push(format!("marker {value:#x}"));
        }
    }

    /// A reproducible stream of nonsense (xorshift64).
    pub struct Noise(pub u64);

    impl Noise {
        pub fn next(&mut self) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0
        }
    }

    /// Writes nonsense to `ports` and reads them back, while time passes.
    pub fn hammer_ports<D: BytePorts>(bench: &Bench, device: &Mutex<D>, ports: &[u16], rounds: u32) {
        let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
        for _ in 0..rounds {
            let word = noise.next();
            let port = ports[usize::try_from(word >> 32).unwrap() % ports.len()];
            lock(device).write8(port, word.to_le_bytes()[0]);
            lock(device).read8(port);
            if word & 0xf00 == 0 {
                bench.stall((word >> 16) & 0xff_ffff);
            }
        }
    }
}

#[cfg(test)]
mod restore_tests;

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(Vec<(u16, u8)>);
    impl BytePorts for Echo {
        fn read8(&mut self, port: u16) -> u8 {
            port.to_le_bytes()[0]
        }
        fn write8(&mut self, port: u16, value: u8) {
            self.0.push((port, value));
        }
    }

    #[test]
    fn attach_ports_wide_access_splits_into_bytes() {
        let bus = Bus::default();
        let echo = Arc::new(Mutex::new(Echo(Vec::new())));
        attach_ports(&bus, &echo, &[(0x20, 2), (0xa0, 2)]).unwrap();
        bus.port_write(0xa0, 2, 0x1234);
        assert_eq!(lock(&echo).0, [(0xa0, 0x34), (0xa1, 0x12)]);
        assert_eq!(bus.port_read(0x20, 2), 0x2120);
    }

    #[test]
    fn backlog_masked_line_forgets_what_is_owed() {
        let mut backlog = Backlog::default();
        backlog.owe(5000);
        assert_eq!(backlog.owed(), Backlog::MAX);
        assert!(!backlog.settle(LineState::Pending));
        assert!(backlog.settle(LineState::Free));
        assert!(backlog.settle(LineState::Masked));
        assert_eq!(backlog.owed(), 0);
    }
}
