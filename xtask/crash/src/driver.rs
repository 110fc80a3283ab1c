//! A driver of a virtio disk: real rings in guest memory, registers through the BAR, completions by looking (virtio 1.2
//! 2.7, 4.1, 5.2).

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use devices::pci::PciDevice as _;
use devices::virtio::{Flavor, VirtioDevice, VirtioPci};
use guestmem::{Gpa, GuestMemory};

const RAM: u64 = 4 << 20;
const BAR: usize = 4;
const NOTIFY: u64 = 0x3000;
const QUEUES: u16 = 2;
const QUEUE_SIZE: u16 = 128;
/// Queue n's rings, and its requests' bytes.
const RINGS: u64 = 0x1_0000;
const DATA: u64 = 0x10_0000;
/// Header, status and data of a request.
const SPACE: u64 = 0x4000;
const VERSION_1: u64 = 1 << 32;
const FLUSH: u64 = 1 << 9;
const MQ: u64 = 1 << 12;
const WRITE_ZEROES: u64 = 1 << 14;
const PATIENCE: Duration = Duration::from_secs(30);

/// What is asked of the disk.
pub enum Request {
    /// Data, from a sector on.
    Write {
        /// Where.
        sector: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Zeros, and the storage may go.
    Zeroes {
        /// Where.
        sector: u64,
        /// How many.
        sectors: u32,
    },
    /// Everything is to be durable.
    Flush,
}

struct Ring {
    added: u16,
    seen: u16,
}

/// The driver.
pub struct Driver {
    device: VirtioPci,
    memory: Arc<GuestMemory>,
    rings: Vec<Ring>,
    next: usize,
}

impl Driver {
    /// Starts `device`, with FLUSH if `flush` says so.
    pub fn new(device: Box<dyn VirtioDevice>, flush: bool) -> anyhow::Result<Self> {
        let memory = GuestMemory::new(RAM)?;
        let device = VirtioPci::new(device, Arc::clone(&memory), Flavor::Modern);
        let mut driver = Self { device, memory, rings: Vec::new(), next: 0 };
        driver.set(20, 1, 0);
        driver.set(20, 1, 3);
        let features = VERSION_1 | MQ | WRITE_ZEROES | if flush { FLUSH } else { 0 };
        for (half, value) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            driver.set(8, 4, half);
            driver.set(12, 4, value);
        }
        driver.set(20, 1, 11);
        ensure!(driver.get(20) & 8 != 0, "the disk refuses the features");
        for queue in 0..QUEUES {
            let at = RINGS + u64::from(queue) * 0x4000;
            driver.set(22, 2, queue.into());
            driver.set(24, 2, QUEUE_SIZE.into());
            for (register, address) in [(32, at), (40, at + 0x1000), (48, at + 0x2000)] {
                driver.set(register, 8, address);
            }
            driver.set(28, 2, 1);
            driver.rings.push(Ring { added: 0, seen: 0 });
        }
        driver.set(20, 1, 15);
        Ok(driver)
    }

    fn set(&mut self, register: u64, len: usize, value: u64) {
        self.device.bar_write(BAR, register, &value.to_le_bytes()[..len]);
    }

    fn get(&mut self, register: u64) -> u8 {
        let mut byte = [0];
        self.device.bar_read(BAR, register, &mut byte);
        byte[0]
    }

    fn put(&self, at: u64, bytes: &[u8]) -> anyhow::Result<()> {
        self.memory.write(Gpa(at), bytes).map_err(|_| anyhow::anyhow!("no memory at {at:#x}"))
    }

    fn half(&self, at: u64) -> anyhow::Result<u16> {
        self.memory.load_gpa(Gpa(at)).context("the rings are in memory")
    }

    /// Hands a request to the next queue. At most 40 may be under way in each.
    pub fn submit(&mut self, request: Request) -> anyhow::Result<()> {
        let queue = self.next;
        self.next = (queue + 1) % self.rings.len();
        let (rings, slot) = (RINGS + queue as u64 * 0x4000, self.rings[queue].added % 40);
        let at = DATA + queue as u64 * 0x10_0000 + u64::from(slot) * SPACE;
        let (kind, sector, data) = match request {
            Request::Write { sector, data } => (1u32, sector, data),
            Request::Zeroes { sector, sectors } => {
                let range = [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &1u32.to_le_bytes()];
                (13, 0, range.concat())
            }
            Request::Flush => (4, 0, Vec::new()),
        };
        self.put(at, &u64::from(kind).to_le_bytes())?;
        self.put(at + 8, &sector.to_le_bytes())?;
        self.put(at + 16, &[0xff])?;
        self.put(at + 0x1000, &data)?;
        let mut pieces = vec![(at, 16, 0u16)];
        if !data.is_empty() {
            pieces.push((at + 0x1000, u32::try_from(data.len())?, 0));
        }
        pieces.push((at + 16, 1, 2));
        let first = slot * 3;
        for (n, &(gpa, len, flags)) in (0u16..).zip(&pieces) {
            let more = usize::from(n) + 1 < pieces.len();
            let descriptor = [
                &gpa.to_le_bytes()[..],
                &len.to_le_bytes(),
                &(flags | u16::from(more)).to_le_bytes(),
                &(first + n + 1).to_le_bytes(),
            ];
            self.put(rings + u64::from(first + n) * 16, &descriptor.concat())?;
        }
        let added = self.rings[queue].added;
        self.put(rings + 0x1004 + 2 * u64::from(added % QUEUE_SIZE), &first.to_le_bytes())?;
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.rings[queue].added = added.wrapping_add(1);
        self.put(rings + 0x1002, &self.rings[queue].added.to_le_bytes())?;
        self.device.bar_write(BAR, NOTIFY + 4 * queue as u64, &(u16::try_from(queue)?).to_le_bytes());
        Ok(())
    }

    /// Waits for everything; says whether all went well.
    pub fn finish(&mut self) -> anyhow::Result<bool> {
        let (mut well, start) = (true, Instant::now());
        for queue in 0..self.rings.len() {
            let rings = RINGS + queue as u64 * 0x4000;
            while self.rings[queue].seen != self.rings[queue].added {
                if self.half(rings + 0x2002)? == self.rings[queue].seen {
                    if start.elapsed() > PATIENCE {
                        bail!("the disk does not answer");
                    }
                    std::thread::yield_now();
                    continue;
                }
                let element = rings + 0x2004 + 8 * u64::from(self.rings[queue].seen % QUEUE_SIZE);
                let slot = self.half(element)? / 3;
                let at = DATA + queue as u64 * 0x10_0000 + u64::from(slot) * SPACE;
                let status: u8 = self.memory.load_gpa(Gpa(at + 16)).context("the status is in memory")?;
                well &= status == 0;
                self.rings[queue].seen = self.rings[queue].seen.wrapping_add(1);
            }
        }
        Ok(well)
    }
}
