//! Port and memory-mapped I/O: who answers which address.

use std::sync::{Arc, Mutex, RwLock};

use x86::addr::Gpa;

/// A device that answers I/O ports. `offset` counts from the first port it was registered at.
pub trait PortDevice: Send {
    /// A read of `size` bytes (1, 2 or 4). Unused upper bits of the result are ignored.
    fn port_read(&mut self, offset: u16, size: u8) -> u32;
    /// A write of `size` bytes (1, 2 or 4).
    fn port_write(&mut self, offset: u16, size: u8, value: u32);
}

/// A device that answers memory-mapped I/O. `offset` counts from the start of its range; the range of
/// one call never leaves what was registered.
pub trait MmioDevice: Send {
    /// A read of `data.len()` bytes (1, 2, 4, 8; rarely up to 64 for SIMD accesses).
    fn mmio_read(&mut self, offset: u64, data: &mut [u8]);
    /// A write of `data.len()` bytes.
    fn mmio_write(&mut self, offset: u64, data: &[u8]);
}

/// A port device as the bus holds it.
pub type SharedPort = Arc<Mutex<dyn PortDevice>>;
/// A memory-mapped device as the bus holds it.
pub type SharedMmio = Arc<Mutex<dyn MmioDevice>>;

/// A registered range could not be added because another device answers there.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("I/O range {start:#x}+{len:#x} overlaps the one at {other:#x}")]
pub struct Overlap {
    /// First address asked for.
    pub start: u64,
    /// Its length in bytes.
    pub len: u64,
    /// First address of the range already there.
    pub other: u64,
}

struct Range<D: ?Sized> {
    start: u64,
    len: u64,
    device: Arc<Mutex<D>>,
}

impl<D: ?Sized> Clone for Range<D> {
    fn clone(&self) -> Self {
        Self { start: self.start, len: self.len, device: Arc::clone(&self.device) }
    }
}

/// Sorted, non-overlapping ranges.
struct Map<D: ?Sized>(RwLock<Vec<Range<D>>>);

impl<D: ?Sized> Map<D> {
    fn insert(&self, start: u64, len: u64, device: Arc<Mutex<D>>) -> Result<(), Overlap> {
        let mut ranges = self.0.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(r) = ranges.iter().find(|r| start < r.start + r.len && r.start < start + len) {
            return Err(Overlap { start, len, other: r.start });
        }
        let at = ranges.partition_point(|r| r.start < start);
        ranges.insert(at, Range { start, len, device });
        Ok(())
    }

    fn remove(&self, start: u64) {
        let mut ranges = self.0.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        ranges.retain(|r| r.start != start);
    }

    fn find(&self, address: u64) -> Option<(u64, u64, Arc<Mutex<D>>)> {
        let ranges = self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let at = ranges.partition_point(|r| r.start <= address);
        let r = ranges.get(at.checked_sub(1)?)?;
        (address < r.start + r.len)
            .then(|| (address - r.start, r.start + r.len - address, Arc::clone(&r.device)))
    }
}

/// The machine's I/O address spaces. Ranges may come and go while vCPUs run (PCI BARs move).
pub struct Bus {
    ports: Map<dyn PortDevice>,
    mmio: Map<dyn MmioDevice>,
}

impl Default for Bus {
    fn default() -> Self {
        Self { ports: Map(RwLock::new(Vec::new())), mmio: Map(RwLock::new(Vec::new())) }
    }
}

/// Locks a device. A poisoned lock means a device panicked, which is a broken invariant reported
/// elsewhere; its state is still plain data.
pub fn lock<T: ?Sized>(device: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    device.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Bus {
    /// Lets `device` answer `len` ports from `start`.
    ///
    /// # Errors
    /// When a port of the range is taken.
    pub fn add_ports(&self, start: u16, len: u16, device: SharedPort) -> Result<(), Overlap> {
        self.ports.insert(u64::from(start), u64::from(len), device)
    }

    /// Frees the port range that starts at `start`.
    pub fn remove_ports(&self, start: u16) {
        self.ports.remove(u64::from(start));
    }

    /// Lets `device` answer `len` bytes of memory from `start`.
    ///
    /// # Errors
    /// When a byte of the range is taken.
    pub fn add_mmio(&self, start: Gpa, len: u64, device: SharedMmio) -> Result<(), Overlap> {
        self.mmio.insert(start.0, len, device)
    }

    /// Frees the memory range that starts at `start`.
    pub fn remove_mmio(&self, start: Gpa) {
        self.mmio.remove(start.0);
    }

    /// IN. A port that nobody answers reads as all ones. An access that straddles two devices, or the
    /// end of one, is split into bytes, as a bridge would split it.
    pub fn port_read(&self, port: u16, size: u8) -> u32 {
        match self.ports.find(u64::from(port)) {
            #[expect(clippy::cast_possible_truncation, reason = "port offsets fit 16 bits")]
            Some((offset, room, device)) if room >= u64::from(size) => {
                lock(&device).port_read(offset as u16, size)
            }
            None if size == 1 => 0xff,
            _ => (0..size).fold(0, |value, i| {
                value | (self.port_read(port.wrapping_add(u16::from(i)), 1) & 0xff) << (8 * i)
            }),
        }
    }

    /// OUT. See [`Bus::port_read`].
    pub fn port_write(&self, port: u16, size: u8, value: u32) {
        match self.ports.find(u64::from(port)) {
            #[expect(clippy::cast_possible_truncation, reason = "port offsets fit 16 bits")]
            Some((offset, room, device)) if room >= u64::from(size) => {
                lock(&device).port_write(offset as u16, size, value);
            }
            None if size == 1 => {}
            _ => (0..size).for_each(|i| {
                self.port_write(port.wrapping_add(u16::from(i)), 1, value >> (8 * i) & 0xff);
            }),
        }
    }

    /// A read of memory that is not RAM. Bytes that nobody answers read as 0xff.
    /// Returns whether a device answered.
    pub fn mmio_read(&self, gpa: Gpa, data: &mut [u8]) -> bool {
        match self.mmio.find(gpa.0) {
            Some((offset, room, device)) if room >= data.len() as u64 => {
                lock(&device).mmio_read(offset, data);
                true
            }
            None if data.len() <= 1 => {
                data.fill(0xff);
                false
            }
            _ => (0..data.len())
                .fold(false, |any, i| self.mmio_read(gpa.add(i as u64), &mut data[i..=i]) | any),
        }
    }

    /// A write to memory that is not RAM. Returns whether a device answered.
    pub fn mmio_write(&self, gpa: Gpa, data: &[u8]) -> bool {
        match self.mmio.find(gpa.0) {
            Some((offset, room, device)) if room >= data.len() as u64 => {
                lock(&device).mmio_write(offset, data);
                true
            }
            None if data.len() <= 1 => false,
            _ => (0..data.len()).fold(false, |any, i| self.mmio_write(gpa.add(i as u64), &data[i..=i]) | any),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Latch([u8; 4]);
    impl PortDevice for Latch {
        fn port_read(&mut self, offset: u16, size: u8) -> u32 {
            (0..u16::from(size)).fold(0, |v, i| v | u32::from(self.0[(offset + i) as usize]) << (8 * i))
        }
        fn port_write(&mut self, offset: u16, size: u8, value: u32) {
            for i in 0..size {
                self.0[offset as usize + usize::from(i)] = value.to_le_bytes()[usize::from(i)];
            }
        }
    }

    #[test]
    fn port_read_straddles_devices_bytewise() {
        let bus = Bus::default();
        bus.add_ports(0x10, 4, Arc::new(Mutex::new(Latch([1, 2, 3, 4])))).unwrap();
        bus.add_ports(0x14, 4, Arc::new(Mutex::new(Latch([5, 6, 7, 8])))).unwrap();
        assert_eq!(bus.port_read(0x12, 4), 0x0605_0403);
        assert_eq!(bus.port_read(0x16, 4), 0xffff_0807);
        assert_eq!(bus.port_read(0x18, 4), 0xffff_ffff);
        assert!(bus.add_ports(0x13, 2, Arc::new(Mutex::new(Latch([0; 4])))).is_err());
    }
}
