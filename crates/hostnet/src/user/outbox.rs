//! Frames on their way to the guest, and how packets become frames.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv4Repr, Ipv6Packet, Ipv6Repr,
    UdpPacket, UdpRepr,
};

use super::{GATEWAY_MAC, GUEST};
use crate::{Header, Mac};

/// Length of an Ethernet header.
pub(super) const ETHERNET: usize = 14;
/// Length of an IPv4 header without options.
pub(super) const IPV4: usize = 20;
/// Length of an IPv6 header.
pub(super) const IPV6: usize = 40;
/// And of its fragment header (RFC 8200 4.5), whose number in a chain of headers is this.
const FRAGMENT: usize = 8;
const FRAGMENT_HEADER: u8 = 44;
const UDP: usize = 8;
/// The longest packet of the guest's network.
pub(super) const MTU: usize = 1500;
/// Frames that wait, before their sources are asked for no more.
const FRAMES: usize = 64;
/// Frames that wait at most: answers to what the guest sends itself.
const MOST_FRAMES: usize = 1024;

/// What waits for the guest, and what is known of it.
pub(super) struct Outbox {
    frames: VecDeque<(Header, Vec<u8>)>,
    pub guest_mac: Mac,
    pub guest: Ipv4Addr,
    /// Frames that found no room.
    pub lost: u64,
    identification: u16,
    /// When the router was last advertised.
    pub advertised: Option<Instant>,
}

impl Default for Outbox {
    fn default() -> Self {
        Self {
            frames: VecDeque::new(),
            guest_mac: [0xff; 6],
            guest: GUEST,
            lost: 0,
            identification: 0,
            advertised: None,
        }
    }
}

impl Outbox {
    /// Another driver begins.
    pub fn start(&mut self) {
        *self = Self { lost: self.lost, ..Self::default() };
    }

    /// Whether a source may bring more.
    pub fn has_room(&self) -> bool {
        self.frames.len() < FRAMES
    }

    /// Whether an answer finds room.
    pub fn has_room_for_answers(&self) -> bool {
        self.frames.len() < MOST_FRAMES
    }

    pub fn pop(&mut self) -> Option<(Header, Vec<u8>)> {
        self.frames.pop_front()
    }

    /// A frame for the guest, complete but for its Ethernet header.
    pub fn push(&mut self, header: Header, protocol: EthernetProtocol, mut frame: Vec<u8>) {
        if !self.has_room_for_answers() {
            self.lost += 1;
            return;
        }
        let mut ethernet = EthernetFrame::new_unchecked(&mut frame);
        ethernet.set_dst_addr(EthernetAddress(self.guest_mac));
        ethernet.set_src_addr(EthernetAddress(GATEWAY_MAC));
        ethernet.set_ethertype(protocol);
        self.frames.push_back((header, frame));
    }

    /// A packet with `payload`, in fragments if it must be.
    pub fn push_ip(&mut self, from: IpAddr, to: IpAddr, protocol: IpProtocol, payload: &[u8]) {
        match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => self.push_ipv4(from, to, protocol, payload),
            (IpAddr::V6(from), IpAddr::V6(to)) => self.push_ipv6(from, to, protocol, payload),
            _ => {}
        }
    }

    fn push_ipv6(&mut self, from: Ipv6Addr, to: Ipv6Addr, protocol: IpProtocol, payload: &[u8]) {
        let whole = payload.len() <= MTU - IPV6;
        let most = if whole { MTU } else { (MTU - IPV6 - FRAGMENT) & !7 };
        self.identification = self.identification.wrapping_add(1);
        for (at, part) in (0..).step_by(most).zip(payload.chunks(most)) {
            let extra = if whole { 0 } else { FRAGMENT };
            let mut frame = vec![0; ETHERNET + IPV6 + extra + part.len()];
            let repr = Ipv6Repr {
                src_addr: from,
                dst_addr: to,
                next_header: if whole { protocol } else { IpProtocol::from(FRAGMENT_HEADER) },
                payload_len: extra + part.len(),
                // Neighbours know by it that a packet came from nowhere else (RFC 4861 6.1).
                hop_limit: 255,
            };
            let mut packet = Ipv6Packet::new_unchecked(&mut frame[ETHERNET..]);
            repr.emit(&mut packet);
            let body = packet.payload_mut();
            if !whole {
                let more = u16::from(at + part.len() < payload.len());
                let [o0, o1] = (u16::try_from(at).unwrap_or(0) | more).to_be_bytes();
                let [i0, i1] = self.identification.to_be_bytes();
                body[..FRAGMENT].copy_from_slice(&[protocol.into(), 0, o0, o1, 0, 0, i0, i1]);
            }
            body[extra..].copy_from_slice(part);
            self.push(Header::default(), EthernetProtocol::Ipv6, frame);
        }
    }

    fn push_ipv4(&mut self, from: Ipv4Addr, to: Ipv4Addr, protocol: IpProtocol, payload: &[u8]) {
        self.identification = self.identification.wrapping_add(1);
        // All fragments but the last are multiples of 8 bytes (RFC 791 3.2).
        let most = (MTU - IPV4) & !7;
        let pieces = payload.len().div_ceil(most).max(1);
        for piece in 0..pieces {
            let at = piece * most;
            let part = &payload[at..payload.len().min(at + most)];
            let mut frame = vec![0; ETHERNET + IPV4 + part.len()];
            let repr = Ipv4Repr {
                src_addr: from,
                dst_addr: to,
                next_header: protocol,
                payload_len: part.len(),
                hop_limit: 64,
            };
            let mut packet = Ipv4Packet::new_unchecked(&mut frame[ETHERNET..]);
            repr.emit(&mut packet, &ChecksumCapabilities::default());
            if pieces > 1 {
                packet.set_ident(self.identification);
                packet.set_dont_frag(false);
                packet.set_more_frags(piece + 1 < pieces);
                packet.set_frag_offset(u16::try_from(at).unwrap_or(0));
                packet.fill_checksum();
            }
            packet.payload_mut().copy_from_slice(part);
            self.push(Header::default(), EthernetProtocol::Ipv4, frame);
        }
    }

    /// A datagram.
    pub fn push_udp(&mut self, from: (IpAddr, u16), to: (IpAddr, u16), payload: &[u8]) {
        let repr = UdpRepr { src_port: from.1, dst_port: to.1 };
        let mut datagram = vec![0; UDP + payload.len()];
        repr.emit(
            &mut UdpPacket::new_unchecked(&mut datagram),
            &from.0.into(),
            &to.0.into(),
            payload.len(),
            |to| to.copy_from_slice(payload),
            &ChecksumCapabilities::default(),
        );
        self.push_ip(from.0, to.0, IpProtocol::Udp, &datagram);
    }
}
