//! A CD-ROM's commands: ATA's few, and packets (MMC-5, SPC-3).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::ata::{Words, op};
use super::port::{Command, Counters, Refusal, Reply, Tell};
use super::registers::status::ABRT;
use super::transfer::Places;
use crate::virtio::block::{Image, SECTOR_BYTES};

/// Bytes of a block of the medium.
const BLOCK_BYTES: u64 = 2048;
/// Blocks read at a time.
const AT_A_TIME: u64 = 64;

/// Packet commands.
mod packet {
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const INQUIRY: u8 = 0x12;
    pub const START_STOP: u8 = 0x1b;
    pub const PREVENT_REMOVAL: u8 = 0x1e;
    pub const READ_CAPACITY: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const SEEK: u8 = 0x2b;
    pub const SYNCHRONIZE: u8 = 0x35;
    pub const READ_TOC: u8 = 0x43;
    pub const GET_CONFIGURATION: u8 = 0x46;
    pub const GET_EVENT_STATUS: u8 = 0x4a;
    pub const READ_DISC_INFORMATION: u8 = 0x51;
    pub const MODE_SENSE_10: u8 = 0x5a;
    pub const READ_12: u8 = 0xa8;
    pub const SET_SPEED: u8 = 0xbb;
    pub const MECHANISM_STATUS: u8 = 0xbd;
}

/// Why the last command failed (SPC-3 4.5): key, additional code.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sense {
    key: u8,
    code: u8,
}

impl Sense {
    const ILLEGAL_COMMAND: Self = Self { key: 5, code: 0x20 };
    const OUT_OF_RANGE: Self = Self { key: 5, code: 0x21 };
    const ILLEGAL_FIELD: Self = Self { key: 5, code: 0x24 };
    const READ_ERROR: Self = Self { key: 3, code: 0x11 };
}

/// Why a packet fails.
enum Failure {
    Check(Sense),
    Transfer(Refusal),
}

impl From<super::transfer::Trouble> for Failure {
    fn from(trouble: super::transfer::Trouble) -> Self {
        Self::Transfer(trouble.into())
    }
}

/// A drive with a medium that stays in it.
pub(super) struct Cdrom {
    image: Arc<Image>,
    serial: String,
    counters: Arc<Counters>,
    pub sense: Sense,
}

fn be16(packet: &[u8; 16], at: usize) -> u16 {
    u16::from_be_bytes([packet[at], packet[at + 1]])
}

fn be32(packet: &[u8; 16], at: usize) -> u32 {
    u32::from_be_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]])
}

/// Minute, second and frame of a block, two seconds into the disc (MMC-5 annex on addressing).
fn msf(block: u32) -> [u8; 4] {
    let frames = block.saturating_add(150);
    let byte = |value: u32| u8::try_from(value).unwrap_or(u8::MAX);
    [0, byte(frames / (75 * 60)), byte(frames / 75 % 60), byte(frames % 75)]
}

impl Cdrom {
    pub fn new(image: &Arc<Image>, serial: &str, counters: &Arc<Counters>) -> Self {
        Self {
            image: Arc::clone(image),
            serial: serial.to_owned(),
            counters: Arc::clone(counters),
            sense: Sense::default(),
        }
    }

    pub fn reset(&mut self) {
        self.sense = Sense::default();
    }

    /// Blocks of the medium; what is left of the last one reads as zeros.
    fn blocks(&self) -> u32 {
        u32::try_from((self.image.sectors() * SECTOR_BYTES).div_ceil(BLOCK_BYTES)).unwrap_or(u32::MAX)
    }

    pub fn execute(&mut self, command: &Command, places: &mut Places) -> Result<Reply, Refusal> {
        // Interrupt reason in the count: the command is over, and was read from us.
        const OVER: u16 = 3;
        match command.command {
            op::PACKET => match self.packet(&command.packet, places) {
                Ok(()) => {
                    self.sense = Sense::default();
                    Ok(Reply { tell: Tell::Register, count: OVER })
                }
                Err(Failure::Check(sense)) => {
                    self.sense = sense;
                    // The sense key stands in the error register, too.
                    Err(Refusal::error(sense.key << 4 | ABRT))
                }
                Err(Failure::Transfer(refusal)) => Err(refusal),
            },
            op::IDENTIFY_PACKET => {
                places.write(&self.identify())?;
                Ok(Reply { tell: Tell::Pio, count: 0 })
            }
            op::SET_FEATURES if matches!(command.features & 0xff, 3 | 0x55 | 0xaa) => {
                Ok(Reply { tell: Tell::Register, count: 0 })
            }
            op::DEVICE_RESET | op::IDLE_IMMEDIATE | op::STANDBY_IMMEDIATE | op::FLUSH => {
                Ok(Reply { tell: Tell::Register, count: 0 })
            }
            op::CHECK_POWER => Ok(Reply { tell: Tell::Register, count: 0xff }),
            _ => Err(Refusal::error(ABRT)),
        }
    }

    fn packet(&mut self, cdb: &[u8; 16], places: &mut Places) -> Result<(), Failure> {
        // A reply is cut off where the guest says; more is no fault of its (SPC-3 4.3.4.6).
        let mut reply = |data: &[u8], room: u16| places.write(&data[..data.len().min(room.into())]);
        match cdb[0] {
            packet::TEST_UNIT_READY
            | packet::PREVENT_REMOVAL
            | packet::SEEK
            | packet::SYNCHRONIZE
            | packet::SET_SPEED
            | packet::START_STOP => {}
            packet::REQUEST_SENSE => reply(&self.request_sense(), cdb[4].into())?,
            packet::INQUIRY if cdb[1] & 1 == 0 => reply(&inquiry(), be16(cdb, 3))?,
            packet::READ_CAPACITY => {
                let last = self.blocks().saturating_sub(1).to_be_bytes();
                let length = u32::try_from(BLOCK_BYTES).unwrap_or(0).to_be_bytes();
                reply(&[last, length].concat(), 8)?;
            }
            packet::READ_10 => self.read(be32(cdb, 2), be16(cdb, 7).into(), places)?,
            packet::READ_12 => self.read(be32(cdb, 2), be32(cdb, 6), places)?,
            packet::READ_TOC => reply(&self.contents(cdb)?, be16(cdb, 7))?,
            packet::GET_CONFIGURATION => reply(&configuration(be16(cdb, 2), cdb[1] & 3), be16(cdb, 7))?,
            packet::GET_EVENT_STATUS => {
                // Polled for; media events are what there is.
                if cdb[1] & 1 == 0 {
                    return Err(Failure::Check(Sense::ILLEGAL_FIELD));
                }
                let media = cdb[4] & 1 << 4 != 0;
                let event: &[u8] = if media { &[0, 6, 4, 1 << 4, 0, 2, 0, 0] } else { &[0, 2, 0x80, 1 << 4] };
                reply(event, be16(cdb, 7))?;
            }
            packet::READ_DISC_INFORMATION => {
                let mut data = [0; 34];
                // Complete, not erasable; one session, one track.
                (data[1], data[2], data[3], data[4], data[5], data[6]) = (32, 0x0e, 1, 1, 1, 1);
                reply(&data, be16(cdb, 7))?;
            }
            packet::MODE_SENSE_10 => reply(&mode_page(cdb[2] & 0x3f)?, be16(cdb, 7))?,
            packet::MECHANISM_STATUS => reply(&[0, 0, 0, 0, 0, 1, 0, 0], be16(cdb, 8))?,
            _ => return Err(Failure::Check(Sense::ILLEGAL_COMMAND)),
        }
        Ok(())
    }

    fn read(&self, block: u32, count: u32, places: &mut Places) -> Result<(), Failure> {
        let (mut block, mut left) = (u64::from(block), u64::from(count));
        if block.saturating_add(left) > self.blocks().into() {
            return Err(Failure::Check(Sense::OUT_OF_RANGE));
        }
        self.counters.bytes_read.fetch_add(left * BLOCK_BYTES, Ordering::Relaxed);
        let mut data = vec![0; usize::try_from(left.min(AT_A_TIME) * BLOCK_BYTES).unwrap_or(0)];
        while left > 0 {
            let now = left.min(AT_A_TIME);
            let data = &mut data[..usize::try_from(now * BLOCK_BYTES).unwrap_or(0)];
            self.image.read(block * BLOCK_BYTES, data).map_err(|error| {
                tracing::debug!(%error, "reading a CD-ROM failed");
                Failure::Check(Sense::READ_ERROR)
            })?;
            places.write(data)?;
            block += now;
            left -= now;
        }
        Ok(())
    }

    /// Fixed format (SPC-3 4.5.3).
    fn request_sense(&self) -> [u8; 18] {
        let mut data = [0; 18];
        (data[0], data[2], data[7], data[12]) = (0x70, self.sense.key, 10, self.sense.code);
        data
    }

    /// The table of contents: one session, one data track (MMC-5 6.26).
    fn contents(&self, cdb: &[u8; 16]) -> Result<Vec<u8>, Failure> {
        let address = |block: u32| if cdb[1] & 2 != 0 { msf(block) } else { block.to_be_bytes() };
        // The format stands in the control byte for old drivers.
        let format = if cdb[2] & 0xf != 0 { cdb[2] & 0xf } else { cdb[9] >> 6 };
        let track = |number: u8, block: u32| [&[0, 0x14, number, 0][..], &address(block)].concat();
        let tracks = match format {
            0 if cdb[6] <= 1 => [track(1, 0), track(0xaa, self.blocks())].concat(),
            0 if cdb[6] == 0xaa => track(0xaa, self.blocks()),
            1 => track(1, 0),
            _ => return Err(Failure::Check(Sense::ILLEGAL_FIELD)),
        };
        let len = u16::try_from(tracks.len() + 2).unwrap_or(2).to_be_bytes();
        Ok([&len[..], &[1, 1], &tracks].concat())
    }

    /// IDENTIFY PACKET DEVICE data (ATA8-ACS 7.17).
    fn identify(&self) -> [u8; 512] {
        let mut words = Words::new(&self.serial, "Trellis CD-ROM");
        words.set(0, 0x85c0); // a removable CD-ROM with packets of 12 bytes
        words.set(49, 0x0f00);
        words.set(53, 0x0007);
        words.common();
        words.set(76, 0x0006);
        words.set(82, 0x4010); // packets, NOP
        words.set(83, 0x4000);
        words.set(84, 0x4000);
        words.set(85, 0x4010);
        words.set(87, 0x4000);
        words.finish()
    }
}

/// Standard INQUIRY data (SPC-3 6.4.2): a removable CD-ROM.
fn inquiry() -> [u8; 36] {
    let mut data = [b' '; 36];
    data[..8].copy_from_slice(&[5, 0x80, 5, 0x21, 31, 0, 0, 0]);
    data[8..15].copy_from_slice(b"Trellis");
    data[16..22].copy_from_slice(b"CD-ROM");
    data[32..35].copy_from_slice(b"1.0");
    data
}

/// Profile list and core feature (MMC-5 5.3): a CD-ROM with a CD-ROM in it. `what` 2 asks for one feature.
fn configuration(first: u16, what: u8) -> Vec<u8> {
    const FEATURES: [(u16, [u8; 8]); 2] = [(0, [0, 0, 3, 4, 0, 8, 1, 0]), (1, [0, 1, 3, 4, 0, 0, 0, 2])];
    let wanted = |number: u16| if what == 2 { number == first } else { number >= first };
    let features: Vec<u8> =
        FEATURES.iter().filter(|(number, _)| wanted(*number)).flat_map(|(_, bytes)| *bytes).collect();
    let len = u32::try_from(features.len() + 4).unwrap_or(4).to_be_bytes();
    [&len[..], &[0, 0, 0, 8], &features].concat()
}

/// Mode pages (MMC-5 7): error recovery, and what old drivers ask a drive for.
fn mode_page(page: u8) -> Result<Vec<u8>, Failure> {
    let recovery = [1, 6, 0, 5, 0, 0, 0, 0];
    let mut capabilities = [0; 22];
    (capabilities[0], capabilities[1], capabilities[2], capabilities[6]) = (0x2a, 20, 0x3b, 0x28);
    let pages = match page {
        1 => recovery.to_vec(),
        0x2a => capabilities.to_vec(),
        0x3f => [&recovery[..], &capabilities].concat(),
        _ => return Err(Failure::Check(Sense::ILLEGAL_FIELD)),
    };
    let len = u16::try_from(pages.len() + 6).unwrap_or(6).to_be_bytes();
    Ok([&len[..], &[0x70, 0, 0, 0, 0, 0], &pages].concat())
}
