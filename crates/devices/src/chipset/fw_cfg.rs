//! QEMU's firmware configuration device (QEMU docs/specs/fw_cfg): named byte strings that firmware and
//! kernels read, through ports 0x510/0x511 or by DMA through 0x514/0x518.
//!
//! The items are configuration of the machine, not state: a snapshot holds only where the guest reads.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use x86::addr::Gpa;

use crate::bus::{Bus, Overlap, PortDevice};
use crate::dma::DmaMemory;
use crate::snapshot::{RestoreError, Snapshot, StateBlob, from_blob, to_blob};

/// First port of the device.
pub const FW_CFG: u16 = 0x510;

/// Number of CPUs at start, 16 bits.
pub const NB_CPUS: u16 = 0x05;
/// Greatest number of CPUs, 16 bits.
pub const MAX_CPUS: u16 = 0x0f;
const SIGNATURE: u16 = 0x00;
const ID: u16 = 0x01;
const FILE_DIR: u16 = 0x19;
const FIRST_FILE: u16 = 0x20;
/// Most files: the selectors up to the architecture's own at 0x8000.
const MAX_FILES: usize = 1024;
const NAME_LEN: usize = 56;

const DMA_SIGNATURE: &[u8; 8] = b"QEMU CFG";
const DMA_ERROR: u32 = 1 << 0;
const DMA_READ: u32 = 1 << 1;
const DMA_SKIP: u32 = 1 << 2;
const DMA_SELECT: u32 = 1 << 3;
const DMA_WRITE: u32 = 1 << 4;
/// Zeros past the end of an item that one DMA may ask for.
///
// DEVIATION: QEMU fills any length. Nothing reads past an item by more than a structure's padding.
const MAX_PADDING: u64 = 1 << 20;

/// A file could not be added.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AddFileError {
    /// The name has no bytes, more than 55, or a NUL.
    #[error("fw_cfg file name {0:?} must have 1 to 55 bytes without NUL")]
    Name(String),
    /// A file of this name is there.
    #[error("fw_cfg file {0:?} is there already")]
    Duplicate(String),
    /// The directory is full, or the file is longer than 32 bits can say.
    #[error("fw_cfg cannot hold file {0:?}: too many files or too long")]
    Full(String),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct FwCfgState {
    selector: u16,
    offset: u64,
    dma_high: u32,
}

/// The configuration device: ports 0x510–0x51b.
pub struct FwCfg {
    state: FwCfgState,
    items: std::collections::BTreeMap<u16, Vec<u8>>,
    /// Names of the files from selector 0x20 on.
    names: Vec<String>,
    memory: Arc<dyn DmaMemory>,
}

impl FwCfg {
    const NAME: &'static str = "fw-cfg";
    const VERSION: u32 = 1;

    /// A device with signature, feature bits (traditional interface and DMA) and an empty directory.
    pub fn new(memory: Arc<dyn DmaMemory>) -> Arc<Mutex<Self>> {
        let mut device = Self {
            state: FwCfgState::default(),
            items: std::collections::BTreeMap::new(),
            names: Vec::new(),
            memory,
        };
        device.add_item(SIGNATURE, b"QEMU".to_vec());
        device.add_item(ID, 3u32.to_le_bytes().to_vec());
        device.build_directory();
        Arc::new(Mutex::new(device))
    }

    /// Puts the device on the bus.
    ///
    /// # Errors
    /// When a port is taken.
    pub fn attach(this: &Arc<Mutex<Self>>, bus: &Bus) -> Result<(), Overlap> {
        bus.add_ports(FW_CFG, 12, Arc::clone(this) as _)
    }

    /// The state after a machine reset.
    pub fn reset(&mut self) {
        self.state = FwCfgState::default();
    }

    /// Sets the item of a numbered selector, e.g. [`NB_CPUS`].
    pub fn add_item(&mut self, selector: u16, bytes: Vec<u8>) {
        self.items.insert(selector, bytes);
    }

    /// Adds a file to the directory, e.g. `etc/e820` or `opt/…`.
    ///
    /// # Errors
    /// See [`AddFileError`].
    pub fn add_file(&mut self, name: &str, bytes: Vec<u8>) -> Result<(), AddFileError> {
        if name.is_empty() || name.len() >= NAME_LEN || name.contains('\0') {
            return Err(AddFileError::Name(name.to_owned()));
        }
        if self.names.iter().any(|there| there == name) {
            return Err(AddFileError::Duplicate(name.to_owned()));
        }
        let selector = u16::try_from(self.names.len()).unwrap_or(u16::MAX).saturating_add(FIRST_FILE);
        if self.names.len() >= MAX_FILES || u32::try_from(bytes.len()).is_err() {
            return Err(AddFileError::Full(name.to_owned()));
        }
        self.names.push(name.to_owned());
        self.add_item(selector, bytes);
        self.build_directory();
        Ok(())
    }

    /// struct FWCfgFiles: a count, then size, selector, reserved and name of each file, big-endian.
    fn build_directory(&mut self) {
        let count = u32::try_from(self.names.len()).unwrap_or(0);
        let mut directory = count.to_be_bytes().to_vec();
        for (selector, name) in (FIRST_FILE..).zip(&self.names) {
            let size = self.items.get(&selector).map_or(0, Vec::len);
            directory.extend(u32::try_from(size).unwrap_or(0).to_be_bytes());
            directory.extend(selector.to_be_bytes());
            directory.extend([0, 0]);
            let mut padded = [0; NAME_LEN];
            padded[..name.len()].copy_from_slice(name.as_bytes());
            directory.extend(padded);
        }
        self.add_item(FILE_DIR, directory);
    }

    fn select(&mut self, selector: u16) {
        self.state.selector = selector;
        self.state.offset = 0;
    }

    /// What is left of the selected item.
    fn rest(&self) -> &[u8] {
        let item = self.items.get(&self.state.selector).map_or(&[][..], Vec::as_slice);
        usize::try_from(self.state.offset).ok().and_then(|offset| item.get(offset..)).unwrap_or(&[])
    }

    fn read_byte(&mut self) -> u8 {
        let byte = self.rest().first().copied().unwrap_or(0);
        self.state.offset = self.state.offset.saturating_add(1);
        byte
    }

    /// Runs the command of the FWCfgDmaAccess structure at `at`, and says there how it went.
    fn dma(&mut self, at: Gpa) {
        let mut access = [0; 16];
        if !self.memory.read(at, &mut access) {
            return;
        }
        let [c0, c1, c2, c3, l0, l1, l2, l3, address @ ..] = access;
        let control = u32::from_be_bytes([c0, c1, c2, c3]);
        let length = u64::from(u32::from_be_bytes([l0, l1, l2, l3]));
        if control & DMA_SELECT != 0 {
            self.select(u16::from_be_bytes([c0, c1]));
        }
        let done = if control & DMA_READ != 0 {
            self.dma_read(Gpa(u64::from_be_bytes(address)), length)
        } else {
            // No item is writable.
            control & DMA_WRITE == 0 || control & DMA_SKIP != 0
        };
        if done && control & (DMA_READ | DMA_SKIP) != 0 {
            self.state.offset = self.state.offset.saturating_add(length);
        }
        let result = if done { 0 } else { DMA_ERROR };
        // A structure that could be read but not written is in ROM: nobody looks at the result.
        let _written = self.memory.write(at, &result.to_be_bytes());
    }

    fn dma_read(&self, to: Gpa, length: u64) -> bool {
        let rest = self.rest();
        let data = &rest[..rest.len().min(usize::try_from(length).unwrap_or(usize::MAX))];
        let padding = length - data.len() as u64;
        if padding > MAX_PADDING {
            return false;
        }
        let zeros = vec![0; usize::try_from(padding).unwrap_or(0)];
        (data.is_empty() || self.memory.write(to, data))
            && (zeros.is_empty() || self.memory.write(to.add(data.len() as u64), &zeros))
    }
}

impl PortDevice for FwCfg {
    fn port_read(&mut self, offset: u16, size: u8) -> u32 {
        match offset {
            1 => u32::from(self.read_byte()),
            4.. => DMA_SIGNATURE
                .iter()
                .skip(usize::from(offset - 4))
                .take(usize::from(size))
                .rev()
                .fold(0, |value, &byte| value << 8 | u32::from(byte)),
            _ => 0,
        }
    }

    fn port_write(&mut self, offset: u16, size: u8, value: u32) {
        let [low, high, ..] = value.to_le_bytes();
        match (offset, size) {
            (0, 1) => self.select(u16::from(low)),
            (0, _) => self.select(u16::from_le_bytes([low, high])),
            (4, 4) => self.state.dma_high = value.swap_bytes(),
            (8, 4) => {
                let at = u64::from(std::mem::take(&mut self.state.dma_high)) << 32;
                self.dma(Gpa(at | u64::from(value.swap_bytes())));
            }
            _ => {}
        }
    }
}

impl Snapshot for FwCfg {
    fn save(&self) -> StateBlob {
        to_blob(Self::NAME, Self::VERSION, &self.state)
    }

    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        let state: FwCfgState = from_blob(Self::NAME, Self::VERSION, blob)?;
        // Any selector and offset are safe: what is not there reads as zeros.
        self.state = state;
        Ok(())
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "parts of a random word")]
mod tests {
    use super::super::testing::Noise;
    use super::*;
    use crate::bus::lock;

    struct Ram(Mutex<Vec<u8>>);
    impl DmaMemory for Ram {
        fn read(&self, gpa: Gpa, data: &mut [u8]) -> bool {
            let ram = lock(&self.0);
            let from = usize::try_from(gpa.0).unwrap_or(usize::MAX);
            ram.get(from..from.saturating_add(data.len())).map(|bytes| data.copy_from_slice(bytes)).is_some()
        }
        fn write(&self, gpa: Gpa, data: &[u8]) -> bool {
            let mut ram = lock(&self.0);
            let to = usize::try_from(gpa.0).unwrap_or(usize::MAX);
            ram.get_mut(to..to.saturating_add(data.len())).map(|bytes| bytes.copy_from_slice(data)).is_some()
        }
    }

    fn fw_cfg() -> (Arc<Ram>, Arc<Mutex<FwCfg>>, Bus) {
        let ram = Arc::new(Ram(Mutex::new(vec![0; 0x10000])));
        let device = FwCfg::new(Arc::clone(&ram) as _);
        let bus = Bus::default();
        FwCfg::attach(&device, &bus).unwrap();
        (ram, device, bus)
    }

    fn read(bus: &Bus, selector: u32, len: usize) -> Vec<u8> {
        bus.port_write(0x510, 2, selector);
        (0..len).map(|_| bus.port_read(0x511, 1) as u8).collect()
    }

    fn dma(ram: &Ram, bus: &Bus, control: u32, length: u32, address: u64) -> u32 {
        let mut access = control.to_be_bytes().to_vec();
        access.extend(length.to_be_bytes());
        access.extend(address.to_be_bytes());
        ram.write(Gpa(0x100), &access);
        bus.port_write(0x514, 4, 0);
        bus.port_write(0x518, 4, 0x100u32.swap_bytes());
        let mut result = [0; 4];
        ram.read(Gpa(0x100), &mut result);
        u32::from_be_bytes(result)
    }

    #[test]
    fn signature_and_features_read_bytewise() {
        let (_, _, bus) = fw_cfg();
        assert_eq!(read(&bus, 0, 6), b"QEMU\0\0");
        assert_eq!(read(&bus, 1, 4), [3, 0, 0, 0]);
        assert_eq!(bus.port_read(0x514, 4).to_le_bytes(), *b"QEMU");
        assert_eq!(bus.port_read(0x518, 4).to_le_bytes(), *b" CFG");
    }

    #[test]
    fn added_file_is_in_directory_and_readable() {
        let (_, device, bus) = fw_cfg();
        lock(&device).add_file("etc/one", vec![1, 2, 3]).unwrap();
        lock(&device).add_file("opt/two", vec![9]).unwrap();
        let directory = read(&bus, 0x19, 4 + 128);
        assert_eq!(directory[..4], [0, 0, 0, 2]);
        assert_eq!(directory[4..12], [0, 0, 0, 3, 0, 0x20, 0, 0]);
        assert_eq!(&directory[12..20], b"etc/one\0");
        assert_eq!(read(&bus, 0x21, 2), [9, 0]);
        assert!(lock(&device).add_file("opt/two", vec![]).is_err());
        assert!(lock(&device).add_file(&"x".repeat(56), vec![]).is_err());
    }

    #[test]
    fn dma_select_read_skip_copies_into_memory() {
        let (ram, device, bus) = fw_cfg();
        lock(&device).add_file("f", (0..100).collect()).unwrap();
        assert_eq!(dma(&ram, &bus, 0x20 << 16 | DMA_SELECT | DMA_SKIP, 10, 0), 0);
        assert_eq!(dma(&ram, &bus, DMA_READ, 4, 0x2000), 0);
        assert_eq!(lock(&ram.0)[0x2000..0x2004], [10, 11, 12, 13]);
        assert_eq!(dma(&ram, &bus, DMA_READ, 100, 0x2000), 0);
        assert_eq!(lock(&ram.0)[0x2000 + 85..0x2000 + 88], [99, 0, 0]);
    }

    #[test]
    fn dma_bad_address_write_or_length_is_error() {
        let (ram, _, bus) = fw_cfg();
        assert_eq!(dma(&ram, &bus, DMA_SELECT | DMA_READ, 4, u64::MAX - 1), DMA_ERROR);
        assert_eq!(dma(&ram, &bus, DMA_WRITE, 4, 0x2000), DMA_ERROR);
        assert_eq!(dma(&ram, &bus, DMA_READ, u32::MAX, 0), DMA_ERROR);
        bus.port_write(0x514, 4, u32::MAX);
        bus.port_write(0x518, 4, u32::MAX);
    }

    #[test]
    fn restore_continues_in_the_middle_of_an_item() {
        let (_, device, bus) = fw_cfg();
        read(&bus, 0, 2);
        let blob = lock(&device).save();
        read(&bus, 1, 1);
        lock(&device).restore(&blob).unwrap();
        assert_eq!(bus.port_read(0x511, 1), u32::from(b'M'));
    }

    #[test]
    fn nonsense_writes_are_survived() {
        let (ram, _, bus) = fw_cfg();
        let mut noise = Noise(3);
        for _ in 0..20_000 {
            let word = noise.next();
            ram.write(Gpa(word & 0xfff0), &word.to_le_bytes());
            let (port, size) = (0x510 + (word >> 32) as u16 % 12, 1 << (word >> 48 & 3).min(2));
            bus.port_write(
                port,
                size,
                if word >> 63 == 0 { word as u32 } else { (word as u32 & 0xffff).swap_bytes() },
            );
            bus.port_read(port, size);
        }
    }
}
