//! Statistics (13.7): counters that a read clears and that stick at their end.

use serde::{Deserialize, Serialize};

use super::regs;

const COUNT: usize = 64;

/// Offsets that are counted here.
mod at {
    pub const RXERRC: u32 = 0x400c;
    pub const RNBC: u32 = 0x40a0;
    pub const MPC: u32 = 0x4010;
    /// Packets of 64 bytes, up to 127, 255, 511, 1023, beyond: six registers.
    pub const PRC64: u32 = 0x405c;
    pub const PTC64: u32 = 0x40d8;
    pub const GPRC: u32 = 0x4074;
    pub const BPRC: u32 = 0x4078;
    pub const MPRC: u32 = 0x407c;
    pub const GPTC: u32 = 0x4080;
    pub const GORCL: u32 = 0x4088;
    pub const GOTCL: u32 = 0x4090;
    pub const ROC: u32 = 0x40ac;
    pub const TORL: u32 = 0x40c0;
    pub const TOTL: u32 = 0x40c8;
    pub const TPR: u32 = 0x40d0;
    pub const TPT: u32 = 0x40d4;
    pub const MPTC: u32 = 0x40f0;
    pub const BPTC: u32 = 0x40f4;
    pub const TSCTC: u32 = 0x40f8;
}

/// Bytes of the checksum at a frame's end, which octet counters count.
const FCS: usize = 4;

/// The counters.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Statistics(Vec<u32>);

impl Default for Statistics {
    fn default() -> Self {
        Self(vec![0; COUNT])
    }
}

const fn index(offset: u32) -> usize {
    ((offset - regs::STATISTICS) / 4) as usize
}

impl Statistics {
    /// Reads and clears. The high half of an octet counter is read after the low one, which both clear on their own.
    pub fn take(&mut self, offset: u32) -> u32 {
        self.0.get_mut(index(offset)).map_or(0, std::mem::take)
    }

    fn add(&mut self, offset: u32, by: u32) {
        if let Some(counter) = self.0.get_mut(index(offset)) {
            *counter = counter.saturating_add(by);
        }
    }

    fn add_wide(&mut self, low: u32, by: usize) {
        let at = index(low);
        let Some([l, h]) = self.0.get_mut(at..at + 2) else { return };
        let sum = (u64::from(*h) << 32 | u64::from(*l)).saturating_add(by as u64);
        let bytes = sum.to_le_bytes();
        *l = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        *h = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
    }

    fn size(&mut self, first: u32, len: usize) {
        let class = match len {
            0..=64 => 0,
            65..=127 => 1,
            128..=255 => 2,
            256..=511 => 3,
            512..=1023 => 4,
            _ => 5,
        };
        self.add(first + 4 * class, 1);
    }

    /// A frame was put into buffers.
    pub fn received(&mut self, frame: &[u8]) {
        let len = frame.len() + FCS;
        self.add(at::GPRC, 1);
        self.add(at::TPR, 1);
        self.add_wide(at::GORCL, len);
        self.add_wide(at::TORL, len);
        self.size(at::PRC64, len);
        match kind(frame) {
            Kind::Broadcast => self.add(at::BPRC, 1),
            Kind::Multicast => self.add(at::MPRC, 1),
            Kind::Unicast => {}
        }
    }

    /// A frame left, as `count` of them on a wire.
    pub fn sent(&mut self, frame: &[u8], count: usize) {
        let len = frame.len() + FCS;
        let count = u32::try_from(count).unwrap_or(u32::MAX);
        self.add(at::GPTC, count);
        self.add(at::TPT, count);
        self.add_wide(at::GOTCL, len);
        self.add_wide(at::TOTL, len);
        self.size(at::PTC64, len);
        match kind(frame) {
            Kind::Broadcast => self.add(at::BPTC, count),
            Kind::Multicast => self.add(at::MPTC, count),
            Kind::Unicast => {}
        }
    }

    /// A packet was segmented.
    pub fn segmented(&mut self) {
        self.add(at::TSCTC, 1);
    }

    /// A frame waits, as there are no buffers.
    pub fn no_buffers(&mut self) {
        self.add(at::RNBC, 1);
    }

    /// A frame was longer than the driver takes.
    pub fn oversize(&mut self) {
        self.add(at::ROC, 1);
    }

    /// A frame was lost.
    pub fn missed(&mut self) {
        self.add(at::MPC, 1);
    }

    /// Buffers were not in memory.
    pub fn receive_error(&mut self) {
        self.add(at::RXERRC, 1);
    }

    /// Whether a saved one can be used.
    pub fn is_whole(&self) -> bool {
        self.0.len() == COUNT
    }
}

/// To whom a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Unicast,
    Multicast,
    Broadcast,
}

/// To whom a frame goes.
pub(super) fn kind(frame: &[u8]) -> Kind {
    match frame.get(..6) {
        Some([0xff, 0xff, 0xff, 0xff, 0xff, 0xff]) => Kind::Broadcast,
        Some([first, ..]) if first & 1 != 0 => Kind::Multicast,
        _ => Kind::Unicast,
    }
}
