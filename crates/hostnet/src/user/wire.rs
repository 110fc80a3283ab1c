//! The wire between smoltcp and the guest: packets in, frames out.

use std::collections::VecDeque;
use std::num::NonZeroUsize;

use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, PacketMeta, RxToken, TxToken};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket};

use super::outbox::{ETHERNET, IPV4, IPV6, MTU, Outbox};
use crate::{Header, Offloads};

/// Packets of the guest that wait (INV-USER-1): a round of its card brings fewer.
const WAITING: usize = 512;
/// Offset of the checksum in a TCP header.
const TCP_CHECKSUM: u16 = 16;

/// What the guest sent and smoltcp has not looked at.
#[derive(Default)]
pub(super) struct Wire {
    waiting: VecDeque<Vec<u8>>,
    accepts: Offloads,
}

impl Wire {
    pub fn new(mut accepts: Offloads) -> Self {
        // Segments need their sums.
        accepts.tso4 &= accepts.checksum;
        accepts.tso6 &= accepts.checksum;
        Self { waiting: VecDeque::new(), accepts }
    }

    /// An IP packet of the guest; too many are lost.
    pub fn receive(&mut self, packet: &[u8]) {
        if self.waiting.len() < WAITING {
            self.waiting.push_back(packet.to_vec());
        }
    }
}

/// The wire with the outbox at its end.
pub(super) struct Wired<'a> {
    pub wire: &'a mut Wire,
    pub outbox: &'a mut Outbox,
}

pub(super) struct Received(Vec<u8>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

pub(super) struct Sending<'a> {
    outbox: &'a mut Outbox,
    accepts: Offloads,
    meta: PacketMeta,
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; ETHERNET + len];
        let result = f(&mut frame[ETHERNET..]);
        let header = if self.accepts.checksum {
            leave_to_guest(&mut frame[ETHERNET..], self.meta)
        } else {
            Header::default()
        };
        let is_v6 = frame.get(ETHERNET).is_some_and(|first| first >> 4 == 6);
        let protocol = if is_v6 { EthernetProtocol::Ipv6 } else { EthernetProtocol::Ipv4 };
        self.outbox.push(header, protocol, frame);
        result
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.meta = meta;
    }
}

impl Device for Wired<'_> {
    type RxToken<'a>
        = Received
    where
        Self: 'a;
    type TxToken<'a>
        = Sending<'a>
    where
        Self: 'a;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        if !self.outbox.has_room_for_answers() {
            return None;
        }
        let packet = self.wire.waiting.pop_front()?;
        let (outbox, accepts) = (&mut *self.outbox, self.wire.accepts);
        Some((Received(packet), Sending { outbox, accepts, meta: PacketMeta::default() }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        let (outbox, accepts) = (&mut *self.outbox, self.wire.accepts);
        outbox.has_room().then_some(Sending { outbox, accepts, meta: PacketMeta::default() })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // What the guest sends lay in no wire, only in its memory; its card may leave sums out.
        capabilities.checksum.tcp = if self.wire.accepts.checksum { Checksum::None } else { Checksum::Tx };
        capabilities.segmentation.tcpv4 =
            self.wire.accepts.tso4.then(|| NonZeroUsize::new(LONGEST)).flatten();
        // Not of IPv6: smoltcp 0.14 drops what is longer than the MTU there, whoever is to cut it.
        capabilities
    }
}

/// The longest packet that the guest may be given to segment.
const LONGEST: usize = 65_535;

/// Prepares a TCP packet whose checksum the guest completes, and which it segments if that is asked for.
fn leave_to_guest(packet: &mut [u8], meta: PacketMeta) -> Header {
    let is_v6 = packet.first().is_some_and(|first| first >> 4 == 6);
    let (tcp, ip_len) = if is_v6 {
        let Ok(mut ip) = Ipv6Packet::new_checked(packet) else { return Header::default() };
        if ip.next_header() != IpProtocol::Tcp {
            return Header::default();
        }
        let len = ip.payload_len();
        let sum = pseudo_header(&ip.src_addr().octets(), &ip.dst_addr().octets(), len);
        (with_sum(ip.payload_mut(), sum), IPV6)
    } else {
        let Ok(mut ip) = Ipv4Packet::new_checked(packet) else { return Header::default() };
        if ip.next_header() != IpProtocol::Tcp {
            return Header::default();
        }
        let len = ip.total_len() - u16::from(ip.header_len());
        let sum = pseudo_header(&ip.src_addr().octets(), &ip.dst_addr().octets(), len);
        (with_sum(ip.payload_mut(), sum), IPV4)
    };
    let headers = u16::try_from(ETHERNET + ip_len).unwrap_or(0);
    let mut header = Header {
        flags: Header::NEEDS_CHECKSUM,
        checksum_start: headers,
        checksum_offset: TCP_CHECKSUM,
        ..Header::default()
    };
    if let Some(size) = meta.segmentation_offload_size {
        header.gso_type = if is_v6 { Header::TCP6 } else { Header::TCP4 };
        header.gso_size = size.get();
        header.header_len = headers + tcp;
    }
    header
}

/// Puts the pseudo header's sum where the checksum goes; says how long the TCP header is.
fn with_sum(segment: &mut [u8], sum: u16) -> u16 {
    let mut tcp = TcpPacket::new_unchecked(segment);
    tcp.set_checksum(sum);
    tcp.header_len().into()
}

/// The sum of TCP's pseudo header (RFC 9293 3.1), folded and not complemented.
fn pseudo_header(from: &[u8], to: &[u8], len: u16) -> u16 {
    const TCP: u32 = 6;
    let words = from.chunks(2).chain(to.chunks(2)).map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
    let mut sum: u32 = words.sum::<u32>() + TCP + u32::from(len);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(0)
}
