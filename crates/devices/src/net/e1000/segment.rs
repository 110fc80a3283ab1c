//! TCP segmentation (3.5): one long packet behind a prototype of its headers becomes packets of a wire's size, or one frame
//! that is left to the backend to be cut.

use hostnet::{Header, MAX_FRAME, Offloads};

use super::transmit::Context;
use crate::net::{sum, word};

/// Most packets of one: 64 KiB in pieces that a network might have, with room.
const MOST_SEGMENTS: usize = 2048;
/// Offsets in an IPv4 header.
const V4_LENGTH: usize = 2;
const V4_IDENTIFICATION: usize = 4;
/// And an IPv6 header: its payload length, and its own length.
const V6_LENGTH: usize = 4;
const V6_HEADER: usize = 40;
/// Offsets in a TCP header, and its flags FIN and PSH.
const TCP_SEQUENCE: usize = 4;
const TCP_FLAGS: usize = 13;
const TCP_LAST: u8 = 0x09;
const TCP_HEADER: usize = 20;
/// Offset of the length in a UDP header.
const UDP_LENGTH: usize = 4;

/// Where things are in a packet, all within its headers.
#[derive(Clone, Copy)]
struct Shape {
    ip: usize,
    ip_sum: usize,
    /// First byte after the IP header's sum.
    ip_end: usize,
    transport: usize,
    transport_sum: usize,
    headers: usize,
    mss: usize,
    is_v4: bool,
    is_tcp: bool,
}

impl Shape {
    /// None when offsets contradict each other or the packet.
    fn new(context: &Context, len: usize) -> Option<Self> {
        let shape = Self {
            ip: context.ip_start.into(),
            ip_sum: context.ip_offset.into(),
            ip_end: usize::from(context.ip_end) + 1,
            transport: context.start.into(),
            transport_sum: context.offset.into(),
            headers: context.header_len.into(),
            mss: context.mss.into(),
            is_v4: context.is_v4,
            is_tcp: context.is_tcp,
        };
        let Self { ip, transport, headers, .. } = shape;
        let ip_fits = if shape.is_v4 {
            ip + 20 <= transport
                && shape.ip_end <= headers
                && shape.ip_sum >= ip
                && shape.ip_sum + 2 <= shape.ip_end
        } else {
            ip + V6_HEADER <= transport
        };
        let least = if shape.is_tcp { TCP_HEADER } else { 8 };
        let fits = ip_fits
            && transport + least <= headers
            && shape.transport_sum >= transport
            && shape.transport_sum + 2 <= headers
            && headers <= len
            && shape.mss > 0
            && (len - headers).div_ceil(shape.mss.max(1)) <= MOST_SEGMENTS;
        fits.then_some(shape)
    }

    /// Completes the headers of a packet, all but the transport's checksum, to which its length is added: the driver left it
    /// out of the pseudo header's sum (3.5.7).
    fn lengths(&self, packet: &mut [u8], nth: usize) {
        let len = packet.len();
        if self.is_v4 {
            put(packet, self.ip + V4_LENGTH, low(len - self.ip));
            let identification = word(packet, self.ip + V4_IDENTIFICATION).wrapping_add(low(nth));
            put(packet, self.ip + V4_IDENTIFICATION, identification);
            put(packet, self.ip_sum, 0);
            let sum = !sum(&packet[self.ip..self.ip_end], 0);
            put(packet, self.ip_sum, sum);
        } else {
            put(packet, self.ip + V6_LENGTH, low(len - self.ip - V6_HEADER));
        }
        if !self.is_tcp {
            put(packet, self.transport + UDP_LENGTH, low(len - self.transport));
        }
        let length = u32::try_from(len - self.transport).unwrap_or(0);
        let pseudo = u32::from(word(packet, self.transport_sum)) + length;
        put(packet, self.transport_sum, sum(&[], pseudo));
    }
}

/// The low 16 bits, as lengths in headers have them.
fn low(value: usize) -> u16 {
    u16::try_from(value & 0xffff).unwrap_or(0)
}

fn put(packet: &mut [u8], at: usize, value: u16) {
    if let Some(to) = packet.get_mut(at..at + 2) {
        to.copy_from_slice(&value.to_be_bytes());
    }
}

/// Passes on `packet`, as one frame to be segmented or as several; says how many a wire would have seen. Zero for a packet
/// that makes no sense.
pub(super) fn segment(
    packet: &mut [u8],
    context: &Context,
    offloads: Offloads,
    scratch: &mut Vec<u8>,
    send: &mut dyn FnMut(&Header, &[u8]),
) -> usize {
    let Some(shape) = Shape::new(context, packet.len()) else { return 0 };
    let payload = packet.len() - shape.headers;
    let count = payload.div_ceil(shape.mss).max(1);
    let taken_over = if shape.is_v4 { offloads.tso4 } else { offloads.tso6 };
    if taken_over && shape.is_tcp && packet.len() <= MAX_FRAME && packet.len() - shape.ip <= 0xffff {
        shape.lengths(packet, 0);
        let kind = if shape.is_v4 { Header::TCP4 } else { Header::TCP6 };
        let header = Header {
            flags: Header::NEEDS_CHECKSUM,
            gso_type: if count > 1 { kind } else { 0 },
            header_len: low(shape.headers),
            gso_size: if count > 1 { low(shape.mss) } else { 0 },
            checksum_start: low(shape.transport),
            checksum_offset: low(shape.transport_sum - shape.transport),
        };
        send(&header, packet);
        return count;
    }
    let (headers, payload) = packet.split_at(shape.headers);
    for nth in 0..count {
        let start = nth * shape.mss;
        let part = &payload[start..payload.len().min(start + shape.mss)];
        scratch.clear();
        scratch.extend(headers);
        scratch.extend(part);
        shape.lengths(scratch, nth);
        if shape.is_tcp {
            let at = shape.transport + TCP_SEQUENCE;
            let sequence = u32::from(word(scratch, at)) << 16 | u32::from(word(scratch, at + 2));
            let sequence = sequence.wrapping_add(u32::try_from(start).unwrap_or(0));
            scratch[at..at + 4].copy_from_slice(&sequence.to_be_bytes());
            if nth + 1 < count {
                scratch[shape.transport + TCP_FLAGS] &= !TCP_LAST;
            }
        }
        let sum = !sum(&scratch[shape.transport..], 0);
        // A UDP checksum of zero would say that there is none (RFC 768).
        let sum = if sum == 0 && !shape.is_tcp { 0xffff } else { sum };
        put(scratch, shape.transport_sum, sum);
        send(&Header::default(), scratch);
    }
    count
}
