//! Transmit descriptors (3.3): legacy ones, data, and contexts for checksums and segmentation.
//!
//! A packet is gathered whole from its descriptors (INV-E1000-1: up to [`LONGEST`] bytes, whatever a driver chains), and
//! then passed on: as it is, with sums put in or left to the backend, or segmented.

use guestmem::{Gpa, GuestMemory};
use hostnet::{Backend, Header, MAX_FRAME, Offloads};
use serde::{Deserialize, Serialize};

use super::ring::{Descriptor, Ring};
use super::segment::segment;
use super::stats::Statistics;
use crate::net::sum;

/// The longest packet that is not segmented (3.3.6: 16288 bytes).
const LONGEST_PLAIN: usize = 16_288;
/// The longest that is: 20 bits of payload, and its headers.
const LONGEST: usize = (1 << 20) + 256;
/// A frame without its checksum is at least so long (TCTL.PSP).
const SHORTEST: usize = 60;
/// Bytes of a VLAN tag, and where it goes.
const TAG_AT: usize = 12;

/// Command bits of a descriptor, in its twelfth byte (3.3.3.1, 3.3.6.1, 3.3.7.1).
mod command {
    pub const EOP: u8 = 1;
    /// Legacy: insert a checksum. Context: the packet is TCP; data: segment it (bit 2).
    pub const IC: u8 = 1 << 2;
    pub const TCP: u8 = 1;
    pub const IP: u8 = 1 << 1;
    pub const TSE: u8 = 1 << 2;
    pub const RS: u8 = 1 << 3;
    pub const DEXT: u8 = 1 << 5;
    pub const VLE: u8 = 1 << 6;
}
/// Descriptor done.
const STATUS_DD: u8 = 1;
/// Options of a packet, in the first of its data descriptors.
const OPTION_IP: u8 = 1;
const OPTION_TRANSPORT: u8 = 1 << 1;

/// What a context descriptor said (3.3.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Context {
    pub ip_start: u8,
    pub ip_offset: u8,
    /// The last byte that the IP checksum covers.
    pub ip_end: u16,
    pub start: u8,
    pub offset: u8,
    /// The last byte that the checksum covers; 0: to the end.
    pub end: u16,
    pub header_len: u8,
    pub mss: u16,
    pub is_v4: bool,
    pub is_tcp: bool,
}

impl Context {
    fn parse(d: &Descriptor) -> Self {
        Self {
            ip_start: d[0],
            ip_offset: d[1],
            ip_end: u16::from_le_bytes([d[2], d[3]]),
            start: d[4],
            offset: d[5],
            end: u16::from_le_bytes([d[6], d[7]]),
            header_len: d[13],
            mss: u16::from_le_bytes([d[14], d[15]]),
            is_v4: d[11] & command::IP != 0,
            is_tcp: d[11] & command::TCP != 0,
        }
    }
}

/// What is to be done with the packet under way; its first descriptor says it.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Plan {
    segment: bool,
    ip_sum: bool,
    transport_sum: bool,
    tag: Option<u16>,
}

/// The transmitter's state between descriptors.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Transmit {
    pub ring: Ring,
    /// Contexts for checksums and for segmentation are kept apart.
    plain: Context,
    segmenting: Context,
    packet: Vec<u8>,
    plan: Plan,
    /// A descriptor of the packet was taken.
    begun: bool,
    /// The packet cannot be had: too long, or not in memory.
    spoilt: bool,
    #[serde(skip)]
    scratch: Vec<u8>,
}

/// What transmitting needs besides.
pub(super) struct Surroundings<'a> {
    pub memory: &'a GuestMemory,
    pub backend: &'a mut dyn Backend,
    pub offloads: Offloads,
    pub statistics: &'a mut Statistics,
    /// Short frames are padded.
    pub pad: bool,
    /// The tag's type, if tags are put in (CTRL.VME).
    pub tag_type: Option<u16>,
}

/// What taking a descriptor came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Taken {
    /// Packets that left, as the guest made them; and their bytes.
    pub packets: usize,
    pub bytes: usize,
    /// Packets that could not.
    pub dropped: usize,
    /// The driver asked for a report.
    pub reported: bool,
}

impl Transmit {
    /// Takes the next descriptor; None when there is none.
    pub fn take(&mut self, around: &mut Surroundings<'_>) -> Option<Taken> {
        if self.ring.filled() == 0 {
            return None;
        }
        let mut taken = Taken::default();
        let gpa = self.ring.at(0);
        // A ring that is not in memory reads as descriptors of nothing, which go by.
        let descriptor = self.ring.read(around.memory, 0).unwrap_or_default();
        let commands = descriptor[11];
        if commands & command::DEXT == 0 {
            self.legacy(&descriptor, around, &mut taken);
        } else if descriptor[10] >> 4 == 0 {
            let context = Context::parse(&descriptor);
            let to = if commands & command::TSE != 0 { &mut self.segmenting } else { &mut self.plain };
            *to = context;
        } else {
            self.data(&descriptor, around, &mut taken);
        }
        if commands & command::RS != 0 {
            taken.reported = true;
            let _not_ram = around.memory.write(Gpa(gpa.0.wrapping_add(12)), &[descriptor[12] | STATUS_DD]);
        }
        self.ring.advance(1);
        Some(taken)
    }

    fn legacy(&mut self, d: &Descriptor, around: &mut Surroundings<'_>, taken: &mut Taken) {
        self.begin(|| Plan { tag: tag(d, around.tag_type), ..Plan::default() });
        self.gather(d, u16::from_le_bytes([d[8], d[9]]).into(), around.memory);
        if d[11] & command::EOP == 0 {
            return;
        }
        let (offset, start) = (usize::from(d[10]), usize::from(d[13]));
        if d[11] & command::IC != 0 {
            insert_sum(&mut self.packet, start, 0, offset);
        }
        self.finish(around, taken);
    }

    fn data(&mut self, d: &Descriptor, around: &mut Surroundings<'_>, taken: &mut Taken) {
        self.begin(|| Plan {
            segment: d[11] & command::TSE != 0,
            ip_sum: d[13] & OPTION_IP != 0,
            transport_sum: d[13] & OPTION_TRANSPORT != 0,
            tag: tag(d, around.tag_type),
        });
        let len = u32::from_le_bytes([d[8], d[9], d[10], 0]) & 0xf_ffff;
        self.gather(d, len as usize, around.memory);
        if d[11] & command::EOP != 0 {
            self.finish(around, taken);
        }
    }

    fn begin(&mut self, plan: impl FnOnce() -> Plan) {
        if !std::mem::replace(&mut self.begun, true) {
            self.plan = plan();
            self.packet.clear();
            self.spoilt = false;
        }
    }

    /// Adds a descriptor's buffer to the packet.
    fn gather(&mut self, d: &Descriptor, len: usize, memory: &GuestMemory) {
        let [a, b, c, d0, e, f, g, h, ..] = *d;
        let gpa = u64::from_le_bytes([a, b, c, d0, e, f, g, h]);
        let start = self.packet.len();
        let most = if self.plan.segment { LONGEST } else { LONGEST_PLAIN };
        if self.spoilt || start + len > most || gpa.checked_add(len as u64).is_none() {
            self.spoilt = true;
            return;
        }
        self.packet.resize(start + len, 0);
        if memory.read(Gpa(gpa), &mut self.packet[start..]).is_err() {
            self.spoilt = true;
        }
    }

    /// The packet is whole: sends it.
    fn finish(&mut self, around: &mut Surroundings<'_>, taken: &mut Taken) {
        self.begun = false;
        let len = self.packet.len();
        let sent = if self.spoilt || len <= 2 * 6 {
            0
        } else if self.plan.segment {
            self.send_segmented(around)
        } else {
            self.send_plain(around)
        };
        if sent == 0 {
            taken.dropped = 1;
        } else {
            taken.packets = 1;
            taken.bytes = len;
            around.statistics.sent(&self.packet, sent);
        }
        // Nothing of it is needed again, and one long packet is no reason to keep so much.
        self.packet.clear();
        self.packet.shrink_to(MAX_FRAME);
    }

    fn send_segmented(&mut self, around: &mut Surroundings<'_>) -> usize {
        let Self { packet, segmenting, plan, scratch, .. } = self;
        let backend = &mut *around.backend;
        around.statistics.segmented();
        let mut tagged = Vec::new();
        // The tag stands before all that the context speaks of, so a tagged packet is cut here.
        let offloads = if plan.tag.is_some() { Offloads::default() } else { around.offloads };
        let mut send = |header: &Header, frame: &[u8]| match (plan.tag, around.tag_type) {
            (Some(tag), Some(kind)) => {
                tagged.clear();
                tagged.extend(frame);
                insert_tag(&mut tagged, kind, tag);
                backend.send(header, &tagged);
            }
            _ if frame.len() <= MAX_FRAME => backend.send(header, frame),
            _ => {}
        };
        segment(packet, segmenting, offloads, scratch, &mut send)
    }

    fn send_plain(&mut self, around: &mut Surroundings<'_>) -> usize {
        let Context { ip_start, ip_end, ip_offset, start, end, offset, .. } = self.plain;
        let packet = &mut self.packet;
        if self.plan.ip_sum {
            insert_sum(packet, ip_start.into(), ip_end.into(), ip_offset.into());
        }
        let mut header = Header::default();
        if self.plan.transport_sum {
            let left = around.offloads.checksum && self.plan.tag.is_none() && end == 0;
            if left && offset >= start && usize::from(offset) + 2 <= packet.len() {
                header.flags = Header::NEEDS_CHECKSUM;
                header.checksum_start = start.into();
                header.checksum_offset = u16::from(offset - start);
            } else {
                insert_sum(packet, start.into(), end.into(), offset.into());
            }
        }
        if let (Some(tag), Some(kind)) = (self.plan.tag, around.tag_type) {
            insert_tag(packet, kind, tag);
        }
        if around.pad && packet.len() < SHORTEST {
            packet.resize(SHORTEST, 0);
        }
        around.backend.send(&header, packet);
        1
    }

    /// Whether a saved one can be used.
    pub fn is_whole(&self) -> bool {
        self.packet.len() <= LONGEST
    }
}

/// The tag that a descriptor asks for.
fn tag(d: &Descriptor, kind: Option<u16>) -> Option<u16> {
    (d[11] & command::VLE != 0 && kind.is_some()).then(|| u16::from_le_bytes([d[14], d[15]]))
}

fn insert_tag(frame: &mut Vec<u8>, kind: u16, tag: u16) {
    if frame.len() >= TAG_AT {
        let [k0, k1] = kind.to_be_bytes();
        let [t0, t1] = tag.to_be_bytes();
        frame.splice(TAG_AT..TAG_AT, [k0, k1, t0, t1]);
    }
}

/// Puts the checksum of `start..=end` (to the end of the packet if `end` is 0) at `offset`. What lies outside the packet
/// changes nothing.
fn insert_sum(packet: &mut [u8], start: usize, end: usize, offset: usize) {
    let end = if end == 0 { packet.len() } else { packet.len().min(end + 1) };
    let Some(covered) = packet.get(start..end) else { return };
    let sum = (!sum(covered, 0)).to_be_bytes();
    if let Some(to) = packet.get_mut(offset..offset + 2) {
        to.copy_from_slice(&sum);
    }
}
