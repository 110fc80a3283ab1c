//! A disk's commands (ATA8-ACS).

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::port::{Command, Counters, Refusal, Reply, Tell};
use super::registers::status::{ABRT, IDNF, UNC};
use super::transfer::Places;
use crate::virtio::block::{Image, SECTOR_BYTES};

/// Commands (ATA8-ACS 7).
pub(super) mod op {
    pub const DATA_SET_MANAGEMENT: u8 = 0x06;
    pub const DEVICE_RESET: u8 = 0x08;
    pub const READ_SECTORS: u8 = 0x20;
    pub const READ_SECTORS_EXT: u8 = 0x24;
    pub const READ_DMA_EXT: u8 = 0x25;
    pub const READ_MULTIPLE_EXT: u8 = 0x29;
    pub const READ_LOG_EXT: u8 = 0x2f;
    pub const WRITE_SECTORS: u8 = 0x30;
    pub const WRITE_SECTORS_EXT: u8 = 0x34;
    pub const WRITE_DMA_EXT: u8 = 0x35;
    pub const WRITE_MULTIPLE_EXT: u8 = 0x39;
    pub const WRITE_DMA_FUA_EXT: u8 = 0x3d;
    pub const READ_VERIFY: u8 = 0x40;
    pub const READ_VERIFY_EXT: u8 = 0x42;
    pub const READ_LOG_DMA_EXT: u8 = 0x47;
    pub const READ_QUEUED: u8 = 0x60;
    pub const WRITE_QUEUED: u8 = 0x61;
    pub const INITIALIZE_PARAMETERS: u8 = 0x91;
    pub const PACKET: u8 = 0xa0;
    pub const IDENTIFY_PACKET: u8 = 0xa1;
    pub const READ_MULTIPLE: u8 = 0xc4;
    pub const WRITE_MULTIPLE: u8 = 0xc5;
    pub const SET_MULTIPLE: u8 = 0xc6;
    pub const READ_DMA: u8 = 0xc8;
    pub const WRITE_DMA: u8 = 0xca;
    pub const STANDBY_IMMEDIATE: u8 = 0xe0;
    pub const IDLE_IMMEDIATE: u8 = 0xe1;
    pub const CHECK_POWER: u8 = 0xe5;
    pub const FLUSH: u8 = 0xe7;
    pub const FLUSH_EXT: u8 = 0xea;
    pub const IDENTIFY: u8 = 0xec;
    pub const SET_FEATURES: u8 = 0xef;
}

/// Addresses are LBA (device register).
const LBA_MODE: u8 = 1 << 6;
/// Force unit access, of queued writes.
const FUA: u8 = 1 << 7;
/// The log of queued commands' errors (ATA8-ACS A.7).
const QUEUED_ERROR_LOG: u64 = 0x10;
/// Most blocks of 512 bytes of trim ranges that we take, as IDENTIFY says.
const MAX_TRIM_BLOCKS: u16 = 8;
/// Size of the bounce buffer.
const BOUNCE_BYTES: usize = 128 << 10;

/// A disk.
pub(super) struct Disk {
    image: Arc<Image>,
    serial: String,
    counters: Arc<Counters>,
    bounce: Vec<u8>,
    /// Writes may wait for a flush.
    pub write_cache: bool,
    /// The queued command that failed, until the guest has asked which.
    pub failed_tag: Option<u8>,
}

fn host(error: &io::Error, code: u8) -> Refusal {
    tracing::debug!(%error, "a command of an AHCI disk failed");
    Refusal::error(code)
}

impl Disk {
    pub fn new(image: &Arc<Image>, serial: &str, counters: &Arc<Counters>) -> Self {
        Self {
            image: Arc::clone(image),
            serial: serial.to_owned(),
            counters: Arc::clone(counters),
            bounce: vec![0; BOUNCE_BYTES],
            write_cache: true,
            failed_tag: None,
        }
    }

    pub fn reset(&mut self) {
        (self.write_cache, self.failed_tag) = (true, None);
    }

    pub fn sync(&self) -> io::Result<()> {
        self.image.sync()
    }

    pub fn execute(&mut self, command: &Command, places: &mut Places) -> Result<Reply, Refusal> {
        let done = |tell| Ok(Reply { tell, count: 0 });
        match command.command {
            op::IDENTIFY => {
                places.write(&self.identify())?;
                done(Tell::Pio)
            }
            op::READ_DMA_EXT | op::READ_DMA => {
                self.read(command, places)?;
                done(Tell::Register)
            }
            op::READ_SECTORS | op::READ_SECTORS_EXT | op::READ_MULTIPLE | op::READ_MULTIPLE_EXT => {
                self.read(command, places)?;
                done(Tell::Pio)
            }
            op::WRITE_DMA_EXT
            | op::WRITE_DMA
            | op::WRITE_DMA_FUA_EXT
            | op::WRITE_SECTORS
            | op::WRITE_SECTORS_EXT
            | op::WRITE_MULTIPLE
            | op::WRITE_MULTIPLE_EXT => {
                self.write(command, command.command == op::WRITE_DMA_FUA_EXT, places)?;
                done(Tell::Register)
            }
            op::READ_QUEUED | op::WRITE_QUEUED => self.queued(command, places),
            op::READ_VERIFY | op::READ_VERIFY_EXT => {
                self.place(command)?;
                done(Tell::Register)
            }
            op::FLUSH | op::FLUSH_EXT | op::STANDBY_IMMEDIATE => {
                self.image.sync().map_err(|error| host(&error, ABRT))?;
                done(Tell::Register)
            }
            op::DATA_SET_MANAGEMENT => {
                self.trim(command, places)?;
                done(Tell::Register)
            }
            op::SET_FEATURES => {
                self.set_features(command)?;
                done(Tell::Register)
            }
            op::READ_LOG_EXT | op::READ_LOG_DMA_EXT => {
                self.log(command, places)?;
                done(if command.command == op::READ_LOG_EXT { Tell::Pio } else { Tell::Register })
            }
            // 255: active or idle.
            op::CHECK_POWER => Ok(Reply { tell: Tell::Register, count: 0xff }),
            op::INITIALIZE_PARAMETERS | op::IDLE_IMMEDIATE | op::SET_MULTIPLE => done(Tell::Register),
            _ => Err(Refusal::error(ABRT)),
        }
    }

    /// Address and number of sectors, if they lie on the disk. Commands with 28-bit addresses have the top bits in the device
    /// register; a count of 0 is the largest.
    fn place(&self, command: &Command) -> Result<(u64, u64), Refusal> {
        let wide = matches!(
            command.command,
            op::READ_DMA_EXT
                | op::WRITE_DMA_EXT
                | op::WRITE_DMA_FUA_EXT
                | op::READ_SECTORS_EXT
                | op::WRITE_SECTORS_EXT
                | op::READ_MULTIPLE_EXT
                | op::WRITE_MULTIPLE_EXT
                | op::READ_VERIFY_EXT
        );
        let queued = matches!(command.command, op::READ_QUEUED | op::WRITE_QUEUED);
        let (lba, count, most) = if queued {
            (command.lba, u64::from(command.features), 1 << 16)
        } else if wide {
            (command.lba, u64::from(command.count), 1 << 16)
        } else {
            let top = u64::from(command.device & 0xf) << 24;
            (command.lba & 0xff_ffff | top, u64::from(command.count & 0xff), 1 << 8)
        };
        if command.device & LBA_MODE == 0 {
            return Err(Refusal::error(ABRT));
        }
        let count = if count == 0 { most } else { count };
        if lba.saturating_add(count) > self.image.sectors() {
            return Err(Refusal::error(IDNF | ABRT));
        }
        Ok((lba, count))
    }

    fn read(&mut self, command: &Command, places: &mut Places) -> Result<(), Refusal> {
        let (lba, count) = self.place(command)?;
        let (mut offset, mut left) = (lba * SECTOR_BYTES, count * SECTOR_BYTES);
        self.counters.bytes_read.fetch_add(left, Ordering::Relaxed);
        while left > 0 {
            let now = usize::try_from(left).unwrap_or(BOUNCE_BYTES).min(BOUNCE_BYTES);
            let block = &mut self.bounce[..now];
            self.image.read(offset, block).map_err(|error| host(&error, UNC))?;
            places.write(block)?;
            offset += now as u64;
            left -= now as u64;
        }
        Ok(())
    }

    fn write(&mut self, command: &Command, fua: bool, places: &mut Places) -> Result<(), Refusal> {
        let (lba, count) = self.place(command)?;
        if self.image.read_only() {
            return Err(Refusal::error(ABRT));
        }
        let (mut offset, mut left) = (lba * SECTOR_BYTES, count * SECTOR_BYTES);
        self.counters.bytes_written.fetch_add(left, Ordering::Relaxed);
        while left > 0 {
            let now = usize::try_from(left).unwrap_or(BOUNCE_BYTES).min(BOUNCE_BYTES);
            let block = &mut self.bounce[..now];
            places.read(block)?;
            self.image.write(offset, block).map_err(|error| host(&error, ABRT))?;
            offset += now as u64;
            left -= now as u64;
        }
        if fua || !self.write_cache {
            self.image.sync().map_err(|error| host(&error, ABRT))?;
        }
        Ok(())
    }

    /// Native command queuing (ATA8-ACS 7.33, 7.73): count in the features, tag in the count.
    fn queued(&mut self, command: &Command, places: &mut Places) -> Result<Reply, Refusal> {
        let tag = u8::try_from(command.count >> 3 & 31).unwrap_or(0);
        let result = if command.command == op::READ_QUEUED {
            self.read(command, places)
        } else {
            self.write(command, command.device & FUA != 0, places)
        };
        match result {
            Ok(()) => Ok(Reply { tell: Tell::Queued(tag), count: 0 }),
            Err(refusal) => {
                self.failed_tag = Some(tag);
                Err(Refusal { queued: Some(tag), ..refusal })
            }
        }
    }

    /// Trim (ATA8-ACS 7.5): ranges of 48 bits of address and 16 of length.
    fn trim(&mut self, command: &Command, places: &mut Places) -> Result<(), Refusal> {
        if command.features & 1 == 0
            || self.image.read_only()
            || !(1..=MAX_TRIM_BLOCKS).contains(&command.count)
        {
            return Err(Refusal::error(ABRT));
        }
        let mut block = [0; 512];
        for _ in 0..command.count {
            places.read(&mut block)?;
            for range in block.as_chunks::<8>().0 {
                let range = u64::from_le_bytes(*range);
                let (lba, count) = (range & ((1 << 48) - 1), range >> 48);
                if lba.saturating_add(count) > self.image.sectors() {
                    return Err(Refusal::error(IDNF | ABRT));
                }
                if count > 0 {
                    let discarded = self.image.discard(lba * SECTOR_BYTES, count * SECTOR_BYTES);
                    discarded.map_err(|error| host(&error, ABRT))?;
                }
            }
        }
        Ok(())
    }

    fn set_features(&mut self, command: &Command) -> Result<(), Refusal> {
        match command.features & 0xff {
            0x02 => self.write_cache = true,
            0x82 => {
                self.image.sync().map_err(|error| host(&error, ABRT))?;
                self.write_cache = false;
            }
            // Transfer mode, look-ahead: nothing of it is real here.
            0x03 | 0x55 | 0xaa => {}
            _ => return Err(Refusal::error(ABRT)),
        }
        Ok(())
    }

    /// The logs: their directory, and the one that says which queued command failed, which ends that state.
    fn log(&mut self, command: &Command, places: &mut Places) -> Result<(), Refusal> {
        let mut page = [0u8; 512];
        match (command.lba & 0xff, command.count) {
            (0, 1) => {
                page[0] = 1; // version of the directory
                page[2 * 0x10] = 1; // pages of log 10H
            }
            (QUEUED_ERROR_LOG, 1) => {
                match self.failed_tag.take() {
                    Some(tag) => {
                        (page[0], page[2], page[3]) = (tag, super::registers::status::GOOD | 1, ABRT)
                    }
                    None => page[0] = 1 << 7,
                }
                // All bytes add up to 0.
                page[511] = page[..511].iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
            }
            _ => return Err(Refusal::error(ABRT)),
        }
        Ok(places.write(&page)?)
    }

    /// IDENTIFY DEVICE data (ATA8-ACS 7.16).
    fn identify(&self) -> [u8; 512] {
        let mut words = Words::new(&self.serial, "Trellis disk");
        let sectors = self.image.sectors();
        let narrow = u32::try_from(sectors.min(0x0fff_ffff)).unwrap_or(0);
        let cylinders = u16::try_from((sectors / (16 * 63)).min(16383)).unwrap_or(16383);
        words.set(0, 0x0040);
        words.set(1, cylinders);
        words.set(3, 16);
        words.set(6, 63);
        words.set(47, 0x8010); // at most 16 sectors a block of READ MULTIPLE
        words.set(48, 0x4000);
        words.set(49, 0x0f00); // DMA, LBA, IORDY
        words.set(50, 0x4000);
        words.set(53, 0x0007); // words 54-58, 64-70, 88 are valid
        words.set(54, cylinders);
        words.set(55, 16);
        words.set(56, 63);
        words.set(59, 0x0110);
        words.set32(60, narrow);
        words.common();
        words.set(69, 0x4000); // reads after trim: see word 169
        words.set(75, 31); // queue depth less one
        words.set(76, 0x0106); // queuing, both speeds
        words.set(82, 0x4060); // NOP, look-ahead, write cache
        words.set(83, 0x7400); // 48-bit addresses, both flushes
        words.set(84, 0x4040); // FUA
        words.set(85, 0x4040 | if self.write_cache { 0x20 } else { 0 });
        words.set(86, 0x3400);
        words.set(87, 0x4040);
        words.set64(100, sectors);
        words.set(105, MAX_TRIM_BLOCKS);
        words.set(106, 0x6003); // 8 logical sectors a physical one
        words.set(169, u16::from(!self.image.read_only())); // trim
        words.set(217, 1); // no moving parts
        words.finish()
    }
}

/// The words of IDENTIFY data.
pub(super) struct Words([u8; 512]);

impl Words {
    pub fn new(serial: &str, model: &str) -> Self {
        let mut words = Self([0; 512]);
        words.text(10, 10, serial);
        words.text(23, 4, env!("CARGO_PKG_VERSION"));
        words.text(27, 20, model);
        words
    }

    pub fn set(&mut self, at: usize, value: u16) {
        self.0[2 * at..2 * at + 2].copy_from_slice(&value.to_le_bytes());
    }

    fn set32(&mut self, at: usize, value: u32) {
        self.0[2 * at..2 * at + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn set64(&mut self, at: usize, value: u64) {
        self.0[2 * at..2 * at + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// What a disk and a CD-ROM have alike: timing and modes, of which nothing is real, and the standard.
    pub fn common(&mut self) {
        self.set(63, 0x0007);
        self.set(64, 0x0003);
        (65..69).for_each(|word| self.set(word, 120));
        self.set(80, 0x01f0); // ATA-4 to ATA8-ACS
        self.set(88, 0x203f); // UDMA 5 is selected
        self.set(93, 0x0000); // serial
    }

    /// Text: filled up with blanks, two characters a word, the first in the high byte.
    fn text(&mut self, at: usize, words: usize, text: &str) {
        let mut bytes = text.bytes().map(|b| if b.is_ascii_graphic() { b } else { b' ' });
        for pair in self.0[2 * at..2 * (at + words)].as_chunks_mut::<2>().0 {
            pair[1] = bytes.next().unwrap_or(b' ');
            pair[0] = bytes.next().unwrap_or(b' ');
        }
    }

    /// With the checksum (word 255).
    pub fn finish(mut self) -> [u8; 512] {
        self.0[510] = 0xa5;
        self.0[511] = self.0[..511].iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
        self.0
    }
}
