//! Port and memory-mapped I/O: who answers which address.

use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
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

/// Sorted, non-overlapping ranges. Accesses look at them without a lock; who changes them puts others in their place.
struct Map<D: ?Sized> {
    ranges: ArcSwap<Vec<Range<D>>>,
    /// Held by who changes them.
    change: Mutex<()>,
}

impl<D: ?Sized> Map<D> {
    fn new() -> Self {
        Self { ranges: ArcSwap::from_pointee(Vec::new()), change: Mutex::new(()) }
    }

    fn insert(&self, start: u64, len: u64, device: Arc<Mutex<D>>) -> Result<(), Overlap> {
        let _changing = lock(&self.change);
        let mut ranges = Vec::clone(&self.ranges.load());
        if let Some(r) = ranges.iter().find(|r| start < r.start + r.len && r.start < start + len) {
            return Err(Overlap { start, len, other: r.start });
        }
        let at = ranges.partition_point(|r| r.start < start);
        ranges.insert(at, Range { start, len, device });
        self.ranges.store(Arc::new(ranges));
        Ok(())
    }

    fn remove(&self, start: u64) {
        let _changing = lock(&self.change);
        let mut ranges = Vec::clone(&self.ranges.load());
        ranges.retain(|r| r.start != start);
        self.ranges.store(Arc::new(ranges));
    }

    /// Has the device that answers all of `len` units from an address do something, from an offset of its range on. None if no single one does.
    fn whole<T>(&self, address: u64, len: u64, act: impl FnOnce(u64, &mut D) -> T) -> Option<T> {
        let ranges = self.ranges.load();
        let at = ranges.partition_point(|r| r.start <= address);
        let r = ranges.get(at.checked_sub(1)?)?;
        let offset = address - r.start;
        (offset < r.len && len <= r.len - offset).then(|| act(offset, &mut lock(&r.device)))
    }
}

/// The machine's I/O address spaces. Ranges may come and go while vCPUs run (PCI BARs move).
pub struct Bus {
    ports: Map<dyn PortDevice>,
    mmio: Map<dyn MmioDevice>,
}

impl Default for Bus {
    fn default() -> Self {
        Self { ports: Map::new(), mmio: Map::new() }
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
    #[expect(clippy::cast_possible_truncation, reason = "port offsets fit 16 bits")]
    pub fn port_read(&self, port: u16, size: u8) -> u32 {
        let whole = self.ports.whole(u64::from(port), u64::from(size), |at, d| d.port_read(at as u16, size));
        whole.unwrap_or_else(|| match size {
            1 => 0xff,
            _ => (0..size).fold(0, |value, i| {
                value | (self.port_read(port.wrapping_add(u16::from(i)), 1) & 0xff) << (8 * i)
            }),
        })
    }

    /// OUT. See [`Bus::port_read`].
    #[expect(clippy::cast_possible_truncation, reason = "port offsets fit 16 bits")]
    pub fn port_write(&self, port: u16, size: u8, value: u32) {
        let whole =
            self.ports.whole(u64::from(port), u64::from(size), |at, d| d.port_write(at as u16, size, value));
        if whole.is_none() && size > 1 {
            (0..size).for_each(|i| {
                self.port_write(port.wrapping_add(u16::from(i)), 1, value >> (8 * i) & 0xff);
            });
        }
    }

    /// A read of memory that is not RAM. Bytes that nobody answers read as 0xff.
    /// Returns whether a device answered.
    pub fn mmio_read(&self, gpa: Gpa, data: &mut [u8]) -> bool {
        if self.mmio.whole(gpa.0, data.len() as u64, |at, d| d.mmio_read(at, data)).is_some() {
            return true;
        }
        if data.len() <= 1 {
            data.fill(0xff);
            return false;
        }
        (0..data.len()).fold(false, |any, i| self.mmio_read(gpa.add(i as u64), &mut data[i..=i]) | any)
    }

    /// A write to memory that is not RAM. Returns whether a device answered.
    pub fn mmio_write(&self, gpa: Gpa, data: &[u8]) -> bool {
        if self.mmio.whole(gpa.0, data.len() as u64, |at, d| d.mmio_write(at, data)).is_some() {
            return true;
        }
        data.len() > 1
            && (0..data.len()).fold(false, |any, i| self.mmio_write(gpa.add(i as u64), &data[i..=i]) | any)
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
