//! Receive descriptors (3.2): which frames the card takes, and how they come into buffers.

use guestmem::{Gpa, GuestMemory};
use serde::{Deserialize, Serialize};

use super::regs::{rctl, rxcsum};
use super::ring::Ring;
use super::stats::{Kind, Statistics, kind};
use crate::net::{sum, word};

/// The shortest frame without its checksum; shorter ones are filled up, as on a wire.
const SHORTEST: usize = 60;
/// The longest without and with a VLAN tag where long packets are off (RCTL.LPE), and where they are on.
const LONGEST: usize = 1514;
const LONGEST_TAGGED: usize = 1518;
const LONGEST_JUMBO: usize = 16_384;
/// Bytes of a frame's checksum.
const FCS: usize = 4;
const ETHERNET: usize = 14;
const IPV4: u16 = 0x0800;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Status bits of a receive descriptor (3.2.3.1).
mod status {
    pub const DD: u8 = 1;
    pub const EOP: u8 = 1 << 1;
    pub const IXSM: u8 = 1 << 2;
    pub const VP: u8 = 1 << 3;
    pub const TCPCS: u8 = 1 << 5;
    pub const IPCS: u8 = 1 << 6;
    pub const PIF: u8 = 1 << 7;
}
/// Error bits (3.2.3.2).
const ERROR_TRANSPORT: u8 = 1 << 5;
const ERROR_IP: u8 = 1 << 6;

/// What of the registers decides about a frame.
pub(super) struct Filter<'a> {
    pub rctl: u32,
    pub rxcsum: u32,
    /// The VLAN tag's type, if tags are taken out (CTRL.VME), and what it is in any case (VET).
    pub strip: bool,
    pub tag_type: u16,
    /// RAL and RAH, MTA, VFTA.
    pub addresses: &'a [u32],
    pub multicast: &'a [u32],
    pub vlans: &'a [u32],
}

/// How a delivery ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    /// It is in buffers.
    Done,
    /// The driver does not want it, or can never take it.
    Refused,
    /// It waits for buffers.
    NoRoom,
}

/// The receiver's state.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Receive {
    pub ring: Ring,
    /// The frame that waits was counted as such.
    waits: bool,
}

impl Filter<'_> {
    /// Whether the driver wants a frame (13.4.22, 13.5.1 to 13.5.3).
    fn accepts(&self, frame: &[u8]) -> bool {
        let Some(to) = frame.first_chunk::<6>() else { return false };
        if self.rctl & rctl::VFE != 0 && word(frame, 12) == self.tag_type {
            let vlan = word(frame, 14) & 0xfff;
            let bits = self.vlans.get(usize::from(vlan >> 5)).copied().unwrap_or(0);
            if bits >> (vlan & 31) & 1 == 0 {
                return false;
            }
        }
        match kind(frame) {
            Kind::Broadcast => self.rctl & (rctl::BAM | rctl::MPE) != 0,
            Kind::Multicast => self.rctl & rctl::MPE != 0 || self.hashed(to) || self.is_ours(to),
            Kind::Unicast => self.rctl & rctl::UPE != 0 || self.is_ours(to),
        }
    }

    fn is_ours(&self, to: &[u8; 6]) -> bool {
        const VALID: u32 = 1 << 31;
        self.addresses.chunks_exact(2).any(|pair| {
            let [l0, l1, l2, l3] = pair[0].to_le_bytes();
            let [h0, h1, ..] = pair[1].to_le_bytes();
            pair[1] & VALID != 0 && *to == [l0, l1, l2, l3, h0, h1]
        })
    }

    /// The multicast table (13.5.1): twelve bits of the address, which ones RCTL.MO says.
    fn hashed(&self, to: &[u8; 6]) -> bool {
        let shift = [4, 3, 2, 0][(self.rctl >> 12 & 3) as usize];
        let bits = (u32::from(to[5]) << 8 | u32::from(to[4])) >> shift & 0xfff;
        let row = self.multicast.get((bits >> 5) as usize).copied().unwrap_or(0);
        row >> (bits & 31) & 1 != 0
    }

    fn fits(&self, frame: &[u8]) -> bool {
        let tagged = word(frame, 12) == self.tag_type;
        let most = match (self.rctl & rctl::LPE != 0, tagged) {
            (true, _) => LONGEST_JUMBO - FCS,
            (false, true) => LONGEST_TAGGED,
            (false, false) => LONGEST,
        };
        frame.len() <= most
    }

    /// Bytes of a buffer (RCTL.BSIZE and BSEX).
    const fn buffer(&self) -> usize {
        let size = 2048usize >> (self.rctl >> 16 & 3);
        if self.rctl & rctl::BSEX != 0 && size < 2048 { size * 16 } else { size }
    }

    /// Checksums of a frame (3.2.9): bits of status and errors.
    fn sums(&self, frame: &[u8]) -> (u8, u8) {
        let Some(ip) = ipv4(frame) else { return (status::IXSM, 0) };
        let (mut found, mut errors) = (0, 0);
        let header = usize::from(ip[0] & 15) * 4;
        if self.rxcsum & rxcsum::IPOFL != 0 {
            found |= status::IPCS;
            errors |= if sum(&ip[..header], 0) == 0xffff { 0 } else { ERROR_IP };
        }
        // Neither fragments nor datagrams without a sum are looked at.
        let fragment = word(ip, 6) & 0x3fff != 0;
        let body = &ip[header..];
        let sum_at = match ip[9] {
            TCP if body.len() >= 20 => 16,
            UDP if body.len() >= 8 => 6,
            _ => return (found, errors),
        };
        if self.rxcsum & rxcsum::TUOFL != 0 && !fragment && (ip[9] == TCP || word(body, sum_at) != 0) {
            found |= status::TCPCS;
            let len = u32::try_from(body.len()).unwrap_or(0);
            let pseudo = u32::from(sum(&ip[12..20], 0)) + u32::from(ip[9]) + len;
            errors |= if sum(body, pseudo) == 0xffff { 0 } else { ERROR_TRANSPORT };
        }
        (if found == 0 { status::IXSM } else { found }, errors)
    }
}

/// The IPv4 packet in a frame, without what fills the frame up.
fn ipv4(frame: &[u8]) -> Option<&[u8]> {
    let ip = frame.get(ETHERNET..).filter(|_| word(frame, 12) == IPV4)?;
    let header = usize::from(*ip.first()? & 15) * 4;
    let len = usize::from(word(ip, 2));
    (ip[0] >> 4 == 4 && header >= 20 && len >= header).then(|| ip.get(..len)).flatten()
}

impl Receive {
    /// Whether no more than RCTL.RDMTS says of the buffers are left: a half, a quarter or an eighth of the ring.
    pub const fn runs_low(&self, rctl: u32) -> bool {
        self.ring.filled() <= self.ring.size() >> (1 + (rctl >> 8 & 3))
    }

    /// Puts a frame into buffers. It may be changed on the way.
    pub fn deliver(
        &mut self,
        frame: &mut Vec<u8>,
        filter: &Filter<'_>,
        memory: &GuestMemory,
        statistics: &mut Statistics,
    ) -> Delivery {
        if !filter.accepts(frame) {
            return Delivery::Refused;
        }
        if !filter.fits(frame) {
            statistics.oversize();
            return Delivery::Refused;
        }
        let fcs = if filter.rctl & rctl::SECRC != 0 { 0 } else { FCS };
        let needed = (frame.len().max(SHORTEST) + fcs).div_ceil(filter.buffer());
        let needed = u32::try_from(needed).unwrap_or(u32::MAX);
        if needed > self.ring.filled() {
            // A ring of n descriptors holds n - 1.
            if needed >= self.ring.size() {
                statistics.missed();
                return Delivery::Refused;
            }
            if !std::mem::replace(&mut self.waits, true) {
                statistics.no_buffers();
            }
            return Delivery::NoRoom;
        }
        self.waits = false;
        statistics.received(frame);
        let tag = take_tag(frame, filter);
        if frame.len() < SHORTEST {
            frame.resize(SHORTEST, 0);
        }
        let (found, errors) = filter.sums(frame);
        // DEVIATION: the frame's own checksum is four zeros; there was no wire on which it could be wrong.
        frame.resize(frame.len() + fcs, 0);
        let inexact =
            kind(frame) == Kind::Multicast && !frame.first_chunk().is_some_and(|to| filter.is_ours(to));
        let flags =
            found | if tag.is_some() { status::VP } else { 0 } | if inexact { status::PIF } else { 0 };
        let last = Last { flags, errors, tag: tag.unwrap_or(0) };
        if !self.fill(frame, filter.buffer(), memory, &last) {
            statistics.receive_error();
        }
        Delivery::Done
    }

    /// Writes the frame and its descriptors; false if a buffer is not in memory, whose part of the frame is lost then.
    fn fill(&mut self, frame: &[u8], buffer: usize, memory: &GuestMemory, last: &Last) -> bool {
        let pieces = frame.chunks(buffer);
        let count = pieces.len();
        let mut whole = true;
        for (nth, piece) in (1..=count).zip(pieces) {
            let gpa = self.ring.at(0);
            let descriptor = self.ring.read(memory, 0).unwrap_or_default();
            let [a, b, c, d, e, f, g, h, ..] = descriptor;
            let to = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
            let fits = to.checked_add(piece.len() as u64).is_some();
            whole &= fits && memory.write(Gpa(to), piece).is_ok();
            let end = nth == count;
            let len = u16::try_from(piece.len()).unwrap_or(0).to_le_bytes();
            let tag = last.tag.to_le_bytes();
            let errors = if end { last.errors } else { 0 };
            let flags = status::DD | if end { status::EOP | last.flags } else { status::IXSM };
            // The status comes last: with it the driver may take the descriptor.
            let write = |at: u64, bytes: &[u8]| memory.write(Gpa(gpa.0.wrapping_add(at)), bytes).is_ok();
            whole &= write(8, &[len[0], len[1], 0, 0]);
            whole &= write(13, &[errors, tag[0], tag[1]]);
            std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
            whole &= write(12, &[flags]);
            self.ring.advance(1);
        }
        whole
    }
}

/// What the last descriptor of a frame says.
struct Last {
    flags: u8,
    errors: u8,
    tag: u16,
}

/// Takes the VLAN tag out, where the driver wants that.
fn take_tag(frame: &mut Vec<u8>, filter: &Filter<'_>) -> Option<u16> {
    const TAG: std::ops::Range<usize> = 12..16;
    if !filter.strip || frame.len() < TAG.end || word(frame, 12) != filter.tag_type {
        return None;
    }
    let tag = word(frame, 14);
    frame.drain(TAG);
    Some(tag)
}
