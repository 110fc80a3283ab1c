//! A small virtio driver: all it does goes through ports, MMIO and guest memory.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use guestmem::{Gpa, GuestMemory};

use crate::bus::{Bus, lock};
use crate::irq::IrqSink;
use crate::pci::{Bdf, IntxSink, PciHost};
use crate::virtio::{Flavor, VirtioDevice, VirtioPci};

pub const RAM: u64 = 4 << 20;
/// Queue n's structures begin here, plus n times [`QUEUE_SPACE`].
const QUEUES: u64 = 0x10_0000;
const QUEUE_SPACE: u64 = 0x1_0000;
/// Where tests put data.
pub const DATA: u64 = 0x20_0000;

pub const VERSION_1: u64 = 1 << 32;
pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;

/// Records interrupts.
#[derive(Default)]
pub struct Board {
    pub messages: Mutex<Vec<(u64, u32)>>,
    pub pins: AtomicI32,
}

impl IrqSink for Board {
    fn set_gsi(&self, _gsi: u32, _level: bool) {}
    fn msi(&self, address: u64, data: u32) {
        lock(&self.messages).push((address, data));
    }
}

impl IntxSink for Board {
    fn pull(&self, _link: u8, asserted: bool) {
        self.pins.fetch_add(if asserted { 1 } else { -1 }, Ordering::SeqCst);
    }
}

/// A machine with one virtio device.
pub struct Rig {
    pub bus: Arc<Bus>,
    pub host: Arc<PciHost>,
    pub board: Arc<Board>,
    pub memory: Arc<GuestMemory>,
    pub device: Arc<Mutex<VirtioPci>>,
    pub bdf: Bdf,
}

/// A piece of a chain: address, length, device-writable.
pub type Piece = (u64, u32, bool);

impl Rig {
    pub fn new(device: Box<dyn VirtioDevice>, flavor: Flavor) -> Self {
        Self::with_memory(device, flavor, GuestMemory::new(RAM).unwrap())
    }

    pub fn with_memory(device: Box<dyn VirtioDevice>, flavor: Flavor, memory: Arc<GuestMemory>) -> Self {
        let (bus, board) = (Arc::new(Bus::default()), Arc::new(Board::default()));
        let host = PciHost::new(&bus, board.clone(), board.clone(), std::iter::once(0..RAM).collect());
        let device = Arc::new(Mutex::new(VirtioPci::new(device, memory.clone(), flavor)));
        let bdf = host.add(None, device.clone()).unwrap();
        host.place_bars().unwrap();
        Self { bus, host, board, memory, device, bdf }
    }

    // ---- configuration space --------------------------------------------------------------------------------

    pub fn config(&self, offset: u16, len: usize) -> u64 {
        let mut data = [0; 8];
        self.host.config_read(self.bdf, offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    pub fn set_config(&self, offset: u16, len: usize, value: u64) {
        self.host.config_write(self.bdf, offset, &value.to_le_bytes()[..len]);
    }

    /// Offset of the capability with this id (and, for virtio's, this `cfg_type`).
    pub fn capability(&self, id: u64, cfg_type: Option<u64>) -> u16 {
        let mut at = self.config(0x34, 1) as u16;
        while at != 0 {
            if self.config(at, 1) == id && cfg_type.is_none_or(|t| self.config(at + 3, 1) == t) {
                return at;
            }
            at = self.config(at + 1, 1) as u16;
        }
        panic!("no capability {id} {cfg_type:?}");
    }

    pub fn bar(&self, index: u16) -> u64 {
        self.config(0x10 + 4 * index, 4) & !15
    }

    /// Address of the structure that a virtio capability points at.
    pub fn structure(&self, cfg_type: u64) -> u64 {
        let at = self.capability(9, Some(cfg_type));
        self.bar(self.config(at + 4, 1) as u16) + self.config(at + 8, 4)
    }

    pub fn enable_msix(&self) {
        let at = self.capability(0x11, None);
        let table = self.bar((self.config(at + 4, 4) & 7) as u16) + (self.config(at + 4, 4) & !7);
        let vectors = (self.config(at + 2, 2) & 0x7ff) + 1;
        for v in 0..vectors {
            self.write(table + 16 * v, 8, 0xfee0_0000);
            self.write(table + 16 * v + 8, 4, 0x40 + v);
            self.write(table + 16 * v + 12, 4, 0);
        }
        self.set_config(4, 2, 6);
        self.set_config(at + 2, 2, 0x8000);
    }

    // ---- MMIO -----------------------------------------------------------------------------------------------

    pub fn read(&self, address: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        assert!(self.bus.mmio_read(Gpa(address), &mut data[..len]), "nobody at {address:#x}");
        u64::from_le_bytes(data)
    }

    pub fn write(&self, address: u64, len: usize, value: u64) {
        assert!(self.bus.mmio_write(Gpa(address), &value.to_le_bytes()[..len]), "nobody at {address:#x}");
    }

    pub fn common(&self, offset: u64, len: usize) -> u64 {
        self.read(self.structure(1) + offset, len)
    }

    pub fn set_common(&self, offset: u64, len: usize, value: u64) {
        self.write(self.structure(1) + offset, len, value);
    }

    pub fn isr(&self) -> u64 {
        self.read(self.structure(3), 1)
    }

    // ---- a driver's life ------------------------------------------------------------------------------------

    /// Virtio 1.2 3.1.1 up to FEATURES_OK; says what was agreed.
    pub fn negotiate(&self, wanted: u64) -> u64 {
        self.set_common(20, 1, 0);
        assert_eq!(self.common(20, 1), 0);
        self.set_common(20, 1, 1);
        self.set_common(20, 1, 3);
        let mut offered = 0;
        for half in 0..2 {
            self.set_common(0, 4, half);
            offered |= self.common(4, 4) << (32 * half);
        }
        let chosen = offered & wanted;
        for half in 0..2 {
            self.set_common(8, 4, half);
            self.set_common(12, 4, chosen >> (32 * half) & 0xffff_ffff);
        }
        self.set_common(20, 1, 11);
        assert_eq!(self.common(20, 1), 11, "FEATURES_OK refused");
        chosen
    }

    /// Sets queue `index` up with `size` entries (0: as offered) and MSI-X vector `index + 1`.
    pub fn queue(&self, index: u16, size: u16, features: u64) -> Ring {
        self.set_common(22, 2, index.into());
        if size != 0 {
            self.set_common(24, 2, size.into());
        }
        let size = self.common(24, 2) as u16;
        let base = QUEUES + u64::from(index) * QUEUE_SPACE;
        let (desc, avail, used) = (base, base + 0x4000, base + 0x8000);
        self.memory.fill(Gpa(base), QUEUE_SPACE, 0).unwrap();
        for (at, address) in [(32, desc), (40, avail), (48, used)] {
            self.set_common(at, 4, address & 0xffff_ffff);
            self.set_common(at + 4, 4, address >> 32);
        }
        self.set_common(26, 2, u64::from(index) + 1);
        self.set_common(28, 2, 1);
        assert_eq!(self.common(28, 2), 1);
        let notify = self.capability(9, Some(2));
        let doorbell = self.structure(2) + self.common(30, 2) * self.config(notify + 16, 4);
        let memory = self.memory.clone();
        let event_idx = features & EVENT_IDX != 0;
        Ring { memory, index, size, desc, avail, used, doorbell, event_idx, next: 0, idx: 0, seen: 0 }
    }

    pub fn driver_ok(&self) {
        self.set_common(20, 1, 15);
        // In a hostile test the device may have found its rings broken already.
        assert_eq!(self.common(20, 1) & !64, 15);
    }

    /// Negotiates all of `wanted`, sets `queues` queues up and starts.
    pub fn start(&self, wanted: u64, queues: u16) -> Vec<Ring> {
        let features = self.negotiate(wanted | VERSION_1);
        self.set_common(16, 2, 0);
        let rings = (0..queues).map(|q| self.queue(q, 0, features)).collect();
        self.driver_ok();
        rings
    }
}

/// The driver's side of a queue. Uses descriptors round robin, so a test must not have more than its size in flight.
pub struct Ring {
    memory: Arc<GuestMemory>,
    pub index: u16,
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    doorbell: u64,
    event_idx: bool,
    next: u16,
    idx: u16,
    seen: u16,
}

impl Ring {
    pub fn put(&self, at: u64, gpa: u64, len: u32, flags: u16, next: u16) {
        let mut raw = gpa.to_le_bytes().to_vec();
        raw.extend(len.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        self.memory.write(Gpa(at), &raw).unwrap();
    }

    /// Fills descriptors and makes the chain available, without a notification. Returns its head.
    pub fn add(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.next;
        for (i, &(gpa, len, writable)) in pieces.iter().enumerate() {
            let last = i + 1 == pieces.len();
            let next = (self.next + 1) % self.size;
            let flags = u16::from(!last) | u16::from(writable) << 1;
            self.put(self.desc + 16 * u64::from(self.next), gpa, len, flags, next);
            self.next = next;
        }
        self.publish(head);
        head
    }

    /// The same through an indirect table at `table`.
    pub fn add_indirect(&mut self, table: u64, pieces: &[Piece]) -> u16 {
        let head = self.next;
        for (i, &(gpa, len, writable)) in (0u16..).zip(pieces) {
            let last = usize::from(i) + 1 == pieces.len();
            let flags = u16::from(!last) | u16::from(writable) << 1;
            self.put(table + 16 * u64::from(i), gpa, len, flags, i + 1);
        }
        self.put(self.desc + 16 * u64::from(head), table, 16 * pieces.len() as u32, 4, 0);
        self.next = (self.next + 1) % self.size;
        self.publish(head);
        head
    }

    pub fn publish(&mut self, head: u16) {
        let slot = u64::from(self.idx % self.size);
        self.memory.write(Gpa(self.avail + 4 + 2 * slot), &head.to_le_bytes()).unwrap();
        self.idx = self.idx.wrapping_add(1);
        self.memory.write(Gpa(self.avail + 2), &self.idx.to_le_bytes()).unwrap();
    }

    /// Whether the device wants to be notified of the last chain.
    pub fn wants_kick(&self) -> bool {
        std::sync::atomic::fence(Ordering::SeqCst);
        if self.event_idx {
            let at = self.used + 4 + 8 * u64::from(self.size);
            self.load(at) == self.idx.wrapping_sub(1)
        } else {
            self.load(self.used) & 1 == 0
        }
    }

    pub fn kick(&self, rig: &Rig) {
        rig.write(self.doorbell, 2, self.index.into());
    }

    pub fn load(&self, at: u64) -> u16 {
        self.memory.load_gpa(Gpa(at)).unwrap()
    }

    /// Asks for an interrupt at the next completion (EVENT_IDX).
    pub fn want_interrupt(&self, used_event: u16) {
        let at = self.avail + 4 + 2 * u64::from(self.size);
        self.memory.write(Gpa(at), &used_event.to_le_bytes()).unwrap();
    }

    pub fn used_idx(&self) -> u16 {
        self.load(self.used + 2)
    }

    /// The next completion: head and bytes written.
    pub fn take(&mut self) -> Option<(u16, u32)> {
        if self.used_idx() == self.seen {
            return None;
        }
        let at = Gpa(self.used + 4 + 8 * u64::from(self.seen % self.size));
        self.seen = self.seen.wrapping_add(1);
        let element: u64 = self.memory.load_gpa(at).unwrap();
        Some((element as u16, (element >> 32) as u32))
    }

    /// Waits for the next completion.
    pub fn wait(&mut self) -> (u16, u32) {
        eventually("a completion", || self.take())
    }
}

/// Polls for something that another thread brings about.
pub fn eventually<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = poll() {
            return found;
        }
        assert!(start.elapsed() < Duration::from_secs(20), "no {what} came");
        std::thread::sleep(Duration::from_micros(200));
    }
}
