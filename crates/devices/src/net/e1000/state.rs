//! The card's registers as software sees them, and its interrupts. Under one lock, which vCPUs take for an access and the
//! card's thread for a round.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hostnet::Mac;
use serde::{Deserialize, Serialize};

use super::eeprom::Eeprom;
use super::phy::Phy;
use super::receive::{Filter, Receive};
use super::regs::{self, cause, ctrl, status};
use super::ring::Ring;
use super::stats::Statistics;
use super::transmit::Transmit;
use crate::pci::Intx;

/// ITR's unit (13.4.18).
const ITR_NS: u64 = 256;
/// Bits of a ring's length that exist: multiples of 128 bytes, up to 64 KiB.
const RING_LENGTH: u32 = 0xf_ff80;
const RECEIVE_ADDRESSES: usize = 32;
const TABLE: usize = 128;
/// The packet buffer's split as after power-on: 48 KiB receive, 16 KiB transmit.
const PBA_DEFAULT: u32 = 0x0010_0030;

/// What an access asks of the card's thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// There may be frames to move.
    Ring,
    /// An interrupt waits for its time.
    Wake,
}

/// When interrupts are raised.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Interrupts {
    icr: u32,
    ims: u32,
    itr: u32,
    #[serde(skip)]
    last: Option<Instant>,
    /// The pin is high.
    #[serde(skip)]
    high: bool,
    #[serde(skip)]
    sent: u64,
}

/// All of it; what a snapshot keeps.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct State {
    /// Registers that are no more than what was written into them, by number.
    plain: Vec<u32>,
    interrupts: Interrupts,
    pub eeprom: Eeprom,
    phy: Phy,
    pub statistics: Statistics,
    pub transmit: Transmit,
    pub receive: Receive,
    pub link: bool,
}

const fn index(offset: u32) -> usize {
    (offset / 4) as usize
}

impl State {
    pub fn new(eeprom: Eeprom) -> Self {
        let mut state = Self {
            plain: Vec::new(),
            interrupts: Interrupts::default(),
            eeprom,
            phy: Phy::default(),
            statistics: Statistics::default(),
            transmit: Transmit::default(),
            receive: Receive::default(),
            link: true,
        };
        state.reset_registers();
        state
    }

    fn reset_registers(&mut self) {
        self.plain = vec![0; index(regs::END)];
        self.set(regs::PBA, PBA_DEFAULT);
        self.set(regs::VET, 0x8100);
        let mac: Mac = self.eeprom.mac();
        self.set(regs::RAL0, u32::from_le_bytes([mac[0], mac[1], mac[2], mac[3]]));
        // The address in the EEPROM is valid.
        self.set(regs::RAH0, u32::from_le_bytes([mac[4], mac[5], 0, 0x80]));
    }

    /// CTRL.RST, and what a bus reset does (14.3): everything but the PHY, whose link stays, and the EEPROM.
    pub fn reset(&mut self, intx: &Intx) {
        let sent = self.interrupts.sent;
        self.interrupts = Interrupts { sent, ..Interrupts::default() };
        intx.set(false);
        self.statistics = Statistics::default();
        self.transmit = Transmit::default();
        self.receive = Receive::default();
        self.reset_registers();
    }

    /// A plain register.
    pub fn get(&self, offset: u32) -> u32 {
        self.plain.get(index(offset)).copied().unwrap_or(0)
    }

    fn set(&mut self, offset: u32, value: u32) {
        if let Some(register) = self.plain.get_mut(index(offset)) {
            *register = value;
        }
    }

    fn table(&self, offset: u32, len: usize) -> &[u32] {
        self.plain.get(index(offset)..index(offset) + len).unwrap_or_default()
    }

    /// What decides about received frames.
    pub fn filter(&self) -> Filter<'_> {
        Filter {
            rctl: self.get(regs::RCTL),
            rxcsum: self.get(regs::RXCSUM),
            strip: self.get(regs::CTRL) & ctrl::VME != 0,
            tag_type: u16::try_from(self.get(regs::VET) & 0xffff).unwrap_or(0),
            addresses: self.table(regs::RAL0, RECEIVE_ADDRESSES),
            multicast: self.table(regs::MTA, TABLE),
            vlans: self.table(regs::VFTA, TABLE),
        }
    }

    /// The type of tags that are put into frames, if any are.
    pub fn tag_type(&self) -> Option<u16> {
        let kind = u16::try_from(self.get(regs::VET) & 0xffff).unwrap_or(0);
        (self.get(regs::CTRL) & ctrl::VME != 0).then_some(kind)
    }

    /// A register is read.
    pub fn read(&mut self, offset: u32, intx: &Intx) -> u32 {
        let (tx, rx) = (&self.transmit.ring, &self.receive.ring);
        match offset {
            regs::STATUS => {
                let link = if self.link { status::LINK_UP } else { 0 };
                status::FULL_DUPLEX | status::SPEED_1000 | link
            }
            regs::EECD => self.eeprom.eecd(),
            regs::EERD => self.eeprom.eerd(),
            regs::MDIC => self.phy.mdic(),
            // 13.4.17: a read clears it.
            regs::ICR => {
                let icr = std::mem::take(&mut self.interrupts.icr);
                self.settle(intx);
                icr
            }
            regs::ITR => self.interrupts.itr,
            regs::IMS => self.interrupts.ims,
            regs::ICS | regs::IMC => 0,
            regs::STATISTICS..=regs::STATISTICS_LAST => self.statistics.take(offset),
            regs::TDBAL..=regs::TDT => {
                read_ring(tx, offset - regs::TDBAL).unwrap_or_else(|| self.get(offset))
            }
            regs::RDBAL..=regs::RDT => {
                read_ring(rx, offset - regs::RDBAL).unwrap_or_else(|| self.get(offset))
            }
            _ => self.get(offset),
        }
    }

    /// A register is written.
    pub fn write(&mut self, offset: u32, value: u32, intx: &Intx) -> Effect {
        match offset {
            regs::CTRL if value & ctrl::RST != 0 => self.reset(intx),
            regs::CTRL => {
                if value & ctrl::PHY_RST != 0 {
                    self.phy = Phy::default();
                }
                self.set(offset, value & !(ctrl::RST | ctrl::PHY_RST));
            }
            regs::EECD => self.eeprom.set_eecd(value),
            regs::EERD => self.eeprom.set_eerd(value),
            regs::MDIC => self.phy.set_mdic(value, self.link),
            regs::ICR => self.interrupts.icr &= !value,
            regs::ITR => self.interrupts.itr = value & 0xffff,
            regs::ICS => self.interrupts.icr |= value & cause::ALL,
            regs::IMS => self.interrupts.ims |= value & cause::ALL,
            regs::IMC => self.interrupts.ims &= !value,
            regs::STATUS | regs::STATISTICS..=regs::STATISTICS_LAST => {}
            regs::TDBAL..=regs::TDT if write_ring(&mut self.transmit.ring, offset - regs::TDBAL, value) => {}
            regs::RDBAL..=regs::RDT if write_ring(&mut self.receive.ring, offset - regs::RDBAL, value) => {}
            _ => self.set(offset, value),
        }
        match offset {
            regs::TDT | regs::RDT | regs::TCTL | regs::RCTL => Effect::Ring,
            regs::ICR | regs::ICS | regs::IMS | regs::IMC | regs::ITR => self.settle(intx),
            _ => Effect::None,
        }
    }

    /// Causes arose.
    pub fn raise(&mut self, causes: u32, intx: &Intx) {
        self.interrupts.icr |= causes;
        self.settle(intx);
    }

    /// Drives the pin: high while there is an unmasked cause, but not again before ITR's time has passed (13.4.18).
    pub fn settle(&mut self, intx: &Intx) -> Effect {
        let wanted = self.interrupts.icr & self.interrupts.ims != 0;
        let waits = self.wait();
        let i = &mut self.interrupts;
        if !wanted {
            if std::mem::take(&mut i.high) {
                intx.set(false);
            }
            return Effect::None;
        }
        if i.high {
            return Effect::None;
        }
        if waits.is_some() {
            return Effect::Wake;
        }
        i.high = true;
        i.last = Some(Instant::now());
        i.sent += 1;
        intx.set(true);
        Effect::None
    }

    /// How long an interrupt that is wanted must wait.
    pub fn wait(&self) -> Option<Duration> {
        let i = &self.interrupts;
        if i.high || i.icr & i.ims == 0 || i.itr == 0 {
            return None;
        }
        let gap = Duration::from_nanos(u64::from(i.itr) * ITR_NS);
        gap.checked_sub(i.last?.elapsed()).filter(|left| !left.is_zero())
    }

    /// Interrupts raised so far.
    pub const fn interrupts(&self) -> u64 {
        self.interrupts.sent
    }

    /// Whether a saved one can be used.
    pub fn is_whole(&self) -> bool {
        let rings = [self.transmit.ring, self.receive.ring];
        self.plain.len() == index(regs::END)
            && self.eeprom.is_whole()
            && self.phy.is_whole()
            && self.statistics.is_whole()
            && self.transmit.is_whole()
            && rings.iter().all(|ring| ring.len_bytes & !RING_LENGTH == 0)
    }
}

/// Shared by all that may raise the card's interrupt.
pub(super) type Pin = Arc<Intx>;

fn read_ring(ring: &Ring, at: u32) -> Option<u32> {
    let [b0, b1, b2, b3, b4, b5, b6, b7] = ring.base.to_le_bytes();
    Some(match at {
        0x00 => u32::from_le_bytes([b0, b1, b2, b3]),
        0x04 => u32::from_le_bytes([b4, b5, b6, b7]),
        0x08 => ring.len_bytes,
        0x10 => ring.head,
        0x18 => ring.tail,
        _ => return None,
    })
}

/// Says whether the register is one of the ring's.
fn write_ring(ring: &mut Ring, at: u32, value: u32) -> bool {
    match at {
        0x00 => ring.base = ring.base >> 32 << 32 | u64::from(value & !15),
        0x04 => ring.base = ring.base & 0xffff_ffff | u64::from(value) << 32,
        0x08 => ring.len_bytes = value & RING_LENGTH,
        0x10 => ring.head = value & 0xffff,
        0x18 => ring.tail = value & 0xffff,
        _ => return false,
    }
    true
}
