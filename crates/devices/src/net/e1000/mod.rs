//! Intel's 82540EM, a Gigabit Ethernet card that every system since 2002 has a driver for: QEMU's and others' `e1000`.
//!
//! Way of the data: the driver writes descriptors and a tail register → the vCPU wakes the card's thread and goes on →
//! [`transmit`] gathers packets and gives them to the backend, checksums and segmentation included; what the backend has
//! goes through [`receive`] into the driver's buffers → causes of interrupts are collected, and the pin is pulled when ITR
//! lets it. Each register that a driver touches is an exit, and it touches some for each interrupt: that is what virtio
//! was made to avoid.
//!
//! What there is not: wake-up, management, packet split, big-endian mode, loopback, changes of the EEPROM.
//! DEVIATION: the timers that delay single packets (RDTR, RADV, TIDV, TADV) have no effect: a round of the thread ends with
//! one interrupt for all that it moved, and ITR works.
//!
//! Source: Intel, PCI/PCI-X Family of Gigabit Ethernet Controllers Software Developer's Manual, 317453 revision 4.0; sections
//! cited here are its.

mod eeprom;
mod phy;
mod receive;
mod regs;
mod ring;
mod segment;
mod state;
mod stats;
#[cfg(test)]
mod tests;
mod transmit;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use guestmem::GuestMemory;
use hostnet::{Backend, Header, MAX_FRAME, Mac, Offloads};
use serde::{Deserialize, Serialize};

use super::worker::Worker;
use super::{Card, CardOptions, Doorbell, Plug, Round};
use crate::bus::lock;
use crate::pci::{BarKind, FunctionState, PciDevice, PciFunction, PciIdentity};
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};
use eeprom::Eeprom;
use receive::Delivery;
use regs::{cause, rctl, tctl};
use state::{Effect, Pin, State};
use transmit::Surroundings;

const INTEL: u16 = 0x8086;
const DEVICE: u16 = 0x100e;
const REGISTERS_BAR: usize = 0;
const REGISTERS_BYTES: u64 = 0x2_0000;
/// IOADDR and IODATA (13.2.1), by which drivers reset the card.
const PORTS_BAR: usize = 1;
const PORTS: u64 = 64;
const IO_DATA: u64 = 4;
const STATE_VERSION: u32 = 1;
/// Most descriptors, or frames, of one round.
const ROUND: usize = 256;

/// What vCPUs and the card's thread share.
struct Shared {
    state: Mutex<State>,
    /// The frame under way to the guest; empty when there is none.
    frame: Mutex<Vec<u8>>,
    memory: Arc<GuestMemory>,
    pin: Pin,
    options: CardOptions,
    offloads: Offloads,
    /// The guest lets the card reach memory.
    master: AtomicBool,
    started: AtomicBool,
    sent: AtomicU64,
    bytes_out: AtomicU64,
    received: AtomicU64,
    bytes_in: AtomicU64,
    dropped: AtomicU64,
    backend: Mutex<Vec<(&'static str, u64)>>,
}

/// An 82540EM in a PCI slot.
pub struct E1000 {
    name: String,
    function: PciFunction,
    shared: Arc<Shared>,
    worker: Worker,
    /// IOADDR.
    io_address: u32,
    touches: u64,
    notifications: u64,
}

#[derive(Serialize, Deserialize)]
struct Saved {
    function: FunctionState,
    io_address: u32,
    state: State,
}

fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

impl E1000 {
    /// A card named `name` with the address `mac`.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn new(
        name: &str,
        mac: Mac,
        plug: &Plug,
        options: CardOptions,
        memory: Arc<GuestMemory>,
    ) -> io::Result<Self> {
        let mut function = PciFunction::new(PciIdentity {
            vendor: INTEL,
            device: DEVICE,
            class: 0x02_0000,
            revision: 2,
            subsystem_vendor: INTEL,
            subsystem: DEVICE,
        });
        function.set_interrupt_pin(1);
        function.add_bar(REGISTERS_BAR, BarKind::Memory32, REGISTERS_BYTES);
        function.add_bar(PORTS_BAR, BarKind::Io, PORTS);
        let offloads = if options.offload { lock(plug).offloads() } else { Offloads::default() };
        let shared = Arc::new(Shared {
            state: Mutex::new(State::new(Eeprom::new(mac, DEVICE, INTEL))),
            frame: Mutex::default(),
            memory,
            pin: Arc::clone(function.intx()),
            options,
            offloads,
            master: AtomicBool::new(false),
            started: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            received: AtomicU64::new(0),
            bytes_in: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            backend: Mutex::default(),
        });
        let worker = Worker::start(name, Arc::clone(&shared) as _, plug)?;
        let name = name.to_owned();
        Ok(Self { name, function, shared, worker, io_address: 0, touches: 0, notifications: 0 })
    }

    /// Its name in statistics and snapshots.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Named counters.
    #[must_use]
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let shared = &*self.shared;
        let now = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut all = vec![
            ("notifications", self.notifications),
            ("interrupts", lock(&shared.state).interrupts()),
            ("touches", self.touches),
            ("packets_out", now(&shared.sent)),
            ("bytes_out", now(&shared.bytes_out)),
            ("packets_in", now(&shared.received)),
            ("bytes_in", now(&shared.bytes_in)),
            ("dropped", now(&shared.dropped)),
        ];
        all.extend(lock(&shared.backend).iter().copied());
        all
    }

    /// Ends the card's thread; nothing more is moved. Call before the process ends.
    pub fn shutdown(&mut self) {
        self.worker.stop();
    }

    /// Registers are dwords (13.1); of a wider or narrower access the dword is what counts.
    fn read(&mut self, offset: u32) -> u32 {
        lock(&self.shared.state).read(offset & !3, &self.shared.pin)
    }

    fn write(&mut self, offset: u32, value: u32) {
        // Without distances kept, each cause interrupts as soon as the driver is ready for it.
        let unthrottled = !self.shared.options.suppress && offset & !3 == regs::ITR;
        let value = if unthrottled { 0 } else { value };
        let effect = lock(&self.shared.state).write(offset & !3, value, &self.shared.pin);
        match effect {
            Effect::None => {}
            Effect::Wake => self.worker.wake(),
            Effect::Ring => {
                self.notifications += 1;
                let sends = offset & !3 == regs::TDT;
                match self.shared.options.doorbell {
                    Doorbell::Vcpu if sends => self.worker.serve(),
                    _ => self.worker.wake(),
                }
            }
        }
    }
}

impl PciDevice for E1000 {
    fn function(&self) -> &PciFunction {
        &self.function
    }

    fn function_mut(&mut self) -> &mut PciFunction {
        &mut self.function
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.function.config_write(offset, data);
        self.config_restored();
    }

    fn config_restored(&mut self) {
        if self.shared.master.swap(self.function.bus_master(), Ordering::SeqCst) != self.function.bus_master()
        {
            self.worker.wake();
        }
    }

    fn reset(&mut self) {
        lock(&self.shared.state).reset(&self.shared.pin);
        self.io_address = 0;
        self.function.reset();
        self.config_restored();
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        self.touches += 1;
        let value = match (bar, offset & !3) {
            (REGISTERS_BAR, at) => self.read(u32::try_from(at).unwrap_or(u32::MAX)),
            (PORTS_BAR, 0) => self.io_address,
            (PORTS_BAR, IO_DATA) => self.read(self.io_address),
            _ => 0,
        };
        data.fill(0);
        let bytes = value.to_le_bytes();
        let from = bytes.get((offset & 3) as usize..).unwrap_or_default();
        for (to, byte) in data.iter_mut().zip(from) {
            *to = *byte;
        }
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        self.touches += 1;
        let mut bytes = [0; 4];
        for (to, byte) in bytes.iter_mut().zip(data) {
            *to = *byte;
        }
        let value = u32::from_le_bytes(bytes);
        match (bar, offset & !3) {
            (REGISTERS_BAR, at) => self.write(u32::try_from(at).unwrap_or(u32::MAX), value),
            (PORTS_BAR, 0) => self.io_address = value,
            (PORTS_BAR, IO_DATA) => self.write(self.io_address, value),
            _ => {}
        }
    }
}

impl Shared {
    /// The backend hears once of a driver: this card asks nothing of it that could change.
    fn start(&self, backend: &mut dyn Backend) {
        if !self.started.swap(true, Ordering::SeqCst) {
            backend.start(Offloads::default());
        }
    }

    fn may_move(&self) -> bool {
        self.master.load(Ordering::SeqCst)
    }
}

impl Card for Shared {
    fn transmit(&self, backend: &mut dyn Backend) -> Round {
        self.start(backend);
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        // What ITR held back may be due.
        state.settle(&self.pin);
        let control = state.get(regs::TCTL);
        if !self.may_move() || control & tctl::EN == 0 {
            return Round::Idle;
        }
        let tag_type = state.tag_type();
        let mut causes = 0;
        let mut end = Round::More;
        for _ in 0..ROUND {
            let mut around = Surroundings {
                memory: &self.memory,
                backend,
                offloads: self.offloads,
                statistics: &mut state.statistics,
                pad: control & tctl::PSP != 0,
                tag_type,
            };
            let Some(taken) = state.transmit.take(&mut around) else {
                end = Round::Idle;
                break;
            };
            count(&self.sent, taken.packets);
            count(&self.bytes_out, taken.bytes);
            count(&self.dropped, taken.dropped);
            causes |= if taken.reported { cause::TXDW } else { 0 };
            if !self.options.suppress && taken.reported {
                state.raise(cause::TXDW, &self.pin);
            }
            causes |= if state.transmit.ring.filled() == 0 { cause::TXQE } else { 0 };
        }
        if causes != 0 {
            state.raise(causes, &self.pin);
        }
        end
    }

    fn receive(&self, backend: &mut dyn Backend) -> Round {
        lock(&self.backend).clone_from(&backend.counters());
        let mut frame = lock(&self.frame);
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        let mut end = Round::More;
        let mut causes = 0;
        for _ in 0..ROUND {
            if frame.is_empty() && !next_frame(backend, &mut frame) {
                end = Round::Idle;
                break;
            }
            let enabled = self.may_move() && state.get(regs::RCTL) & rctl::EN != 0;
            if !enabled {
                count(&self.dropped, 1);
                frame.clear();
                continue;
            }
            let len = frame.len();
            let mut receive = state.receive;
            let mut statistics = std::mem::take(&mut state.statistics);
            let delivery = receive.deliver(&mut frame, &state.filter(), &self.memory, &mut statistics);
            (state.receive, state.statistics) = (receive, statistics);
            match delivery {
                Delivery::Done => {
                    count(&self.received, 1);
                    count(&self.bytes_in, len);
                    causes |= cause::RXT0;
                    if receive.runs_low(state.get(regs::RCTL)) {
                        causes |= cause::RXDMT0;
                    }
                    if !self.options.suppress {
                        state.raise(causes, &self.pin);
                    }
                }
                Delivery::Refused => count(&self.dropped, 1),
                Delivery::NoRoom => {
                    end = Round::NoRoom;
                    break;
                }
            }
            frame.clear();
        }
        if causes != 0 {
            state.raise(causes, &self.pin);
        }
        end
    }

    fn note_link(&self, up: bool) {
        let mut state = lock(&self.state);
        if std::mem::replace(&mut state.link, up) != up {
            state.raise(cause::LSC, &self.pin);
        }
    }

    fn deadline(&self) -> Option<Duration> {
        lock(&self.state).wait()
    }
}

/// Takes the backend's next frame.
fn next_frame(backend: &mut dyn Backend, frame: &mut Vec<u8>) -> bool {
    frame.clear();
    let header: Option<Header> = backend.receive(frame);
    if header.is_none() || frame.len() > MAX_FRAME {
        frame.clear();
    }
    !frame.is_empty()
}

impl Snapshot for E1000 {
    /// The frame that waits for buffers is lost, as frames may be.
    fn save(&self) -> StateBlob {
        let saved = Saved {
            function: self.function.save(),
            io_address: self.io_address,
            state: lock(&self.shared.state).clone(),
        };
        to_blob(&self.name, STATE_VERSION, &saved)
    }

    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        let saved: Saved = from_blob(&self.name, STATE_VERSION, blob)?;
        let unfit = |why: String| RestoreError::Unfit { name: self.name.clone(), why };
        if !saved.state.is_whole() {
            return Err(unfit("its registers are not those of this card".to_owned()));
        }
        self.function.fits(&saved.function).map_err(unfit)?;
        let restored = self.function.restore(&saved.function);
        debug_assert!(restored.is_ok(), "it fits");
        self.io_address = saved.io_address;
        {
            let mut state = lock(&self.shared.state);
            *state = saved.state;
            self.shared.pin.set(false);
            state.settle(&self.shared.pin);
        }
        lock(&self.shared.frame).clear();
        self.config_restored();
        self.worker.wake();
        Ok(())
    }
}

impl Drop for E1000 {
    fn drop(&mut self) {
        self.shutdown();
    }
}
