//! User-mode networking: a router in this process, which needs no rights. The guest sees a network of its own, as QEMU's
//! users know it: itself 10.0.2.15/24 (by DHCP), the router and this host 10.0.2.2, the name server 10.0.2.3. What it
//! sends leaves through ordinary sockets of this process. With IPv6: fec0::2, fec0::3, and an address of its own choice.
//!
//! Way of the data: a frame → [`UserNet::send`] → by protocol to [`arp`], [`dhcp`], [`ping`], [`udp`], [`tcp`] → a host's
//! socket. What comes back from sockets is put into frames in the [`Outbox`], and from there goes to the card.
//!
//! - TCP ends here and begins anew on the host (smoltcp's implementation towards the guest). A connection is accepted when the
//!   host's is there, refused when that is.
//! - UDP and echo requests are translated packet by packet, each flow on a connected socket: only who was asked can answer.
//! - INV-USER-1: everything that a guest or a peer can make more of has a limit: flows and their buffers, frames that wait.
//!
//! Both IPv4 and IPv6, whose addresses the guest makes itself of the prefix that the router advertises ([`icmp6`]).

mod arp;
mod dhcp;
mod fragments;
mod icmp6;
mod outbox;
mod ping;
mod resolver;
mod tcp;
mod udp;
mod wire;

#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use smoltcp::wire::{EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6Packet};

use crate::{Backend, Forward, Header, Interest, Mac, NetError, Offloads, Protocol};
use fragments::{Fragments, Key};
use outbox::Outbox;
use ping::Pings;
use tcp::Tcp;
use udp::Udp;

/// The guest.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The router, behind which this host is.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The name server.
pub const NAME_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// The router in IPv6, behind which this host is, too.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 2);
/// The name server.
pub const NAME_SERVER6: Ipv6Addr = Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 3);
/// Bits of the prefix that is the guest's network.
const PREFIX6: u8 = 64;
/// The router's hardware address.
const GATEWAY_MAC: Mac = [0x52, 0x55, 10, 0, 2, 2];
/// The port of name servers.
const DNS_PORT: u16 = 53;

/// What a user network is to be.
#[derive(Clone, Debug)]
pub struct UserOptions {
    /// Ports of the host that lead to the guest.
    pub forwards: Vec<Forward>,
    /// The guest reaches this host's own services at 10.0.2.2.
    pub loopback: bool,
    /// The guest reaches nothing beyond: no other addresses, no name server.
    pub restrict: bool,
}

impl Default for UserOptions {
    fn default() -> Self {
        Self { forwards: Vec::new(), loopback: true, restrict: false }
    }
}

/// A user network with one guest.
pub struct UserNet {
    outbox: Outbox,
    routes: Routes,
    fragments: Fragments,
    tcp: Tcp,
    udp: Udp,
    pings: Pings,
}

/// Where the guest's packets go.
#[derive(Clone, Copy, Debug)]
struct Routes {
    loopback: bool,
    restrict: bool,
}

impl Routes {
    /// What of the host `to` is, as the guest addresses it.
    fn host(self, to: SocketAddr) -> Option<SocketAddr> {
        let (address, port) = (to.ip(), to.port());
        if port == 0 {
            None
        } else if is_name_server(address) {
            (port == DNS_PORT && !self.restrict).then(resolver::current)
        } else if address == GATEWAY {
            self.loopback.then(|| SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
        } else if address == GATEWAY6 {
            self.loopback.then(|| SocketAddr::from((Ipv6Addr::LOCALHOST, port)))
        } else {
            self.outside(address).map(|address| SocketAddr::new(address, port))
        }
    }

    /// An address beyond the guest's network, if one can be asked for there.
    fn outside(self, address: IpAddr) -> Option<IpAddr> {
        let special = match address {
            IpAddr::V4(v4) => v4.is_broadcast() || v4.octets()[0] == 0,
            // An IPv4 address in IPv6's clothes would get past what is said of it there.
            IpAddr::V6(v6) => v6.to_ipv4().is_some() || v6.is_unicast_link_local(),
        };
        let special = special || address.is_loopback() || address.is_multicast();
        (!is_within(address) && !special && !self.restrict).then_some(address)
    }
}

/// Whether an address is of the guest's network.
fn is_within(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4 & NETMASK == GATEWAY & NETMASK,
        IpAddr::V6(v6) => v6.octets()[..8] == GATEWAY6.octets()[..8],
    }
}

fn is_name_server(address: IpAddr) -> bool {
    address == NAME_SERVER || address == NAME_SERVER6
}

fn is_router(address: IpAddr) -> bool {
    address == GATEWAY || address == GATEWAY6 || address == icmp6::LINK_LOCAL
}

/// A packet of the guest: addresses, and what it carries.
#[derive(Clone, Copy)]
struct Packet<'a> {
    from: IpAddr,
    to: IpAddr,
    payload: &'a [u8],
}

impl UserNet {
    /// The network, its forwarded ports open.
    ///
    /// # Errors
    /// When a port cannot be had.
    pub fn new(options: &UserOptions) -> Result<Self, NetError> {
        let of = |protocol| options.forwards.iter().filter(move |forward| forward.protocol == protocol);
        let routes = Routes { loopback: options.loopback, restrict: options.restrict };
        Ok(Self {
            outbox: Outbox::default(),
            routes,
            fragments: Fragments::default(),
            tcp: Tcp::new(of(Protocol::Tcp))?,
            udp: Udp::new(of(Protocol::Udp))?,
            pings: Pings::default(),
        })
    }

    fn ipv4(&mut self, bytes: &[u8]) {
        let Ok(ip) = Ipv4Packet::new_checked(bytes) else { return };
        // The header's sum is there even where those of TCP and UDP are left out; UDP's and TCP's data lay in no wire.
        if ip.version() != 4 || usize::from(ip.header_len()) < outbox::IPV4 || !ip.verify_checksum() {
            return;
        }
        let (from, to) = (ip.src_addr(), ip.dst_addr());
        let fragment = ip.more_frags() || ip.frag_offset() != 0;
        let packet = Packet { from: from.into(), to: to.into(), payload: ip.payload() };
        if ip.next_header() == IpProtocol::Udp
            && !fragment
            && udp::destination(packet.payload) == Some(dhcp::SERVER)
        {
            dhcp::answer(packet, &mut self.outbox);
            return;
        }
        // Another address than the one it was given is the guest's affair, but it must be of its network.
        if !is_within(packet.from) || matches!(from, GATEWAY | NAME_SERVER) {
            return;
        }
        self.outbox.guest = from;
        if fragment {
            let (protocol, identification) = (ip.next_header().into(), ip.ident().into());
            let key = Key { from: packet.from, to: packet.to, protocol, identification };
            return self.piece(key, ip.frag_offset().into(), ip.more_frags(), packet.payload);
        }
        let whole = &bytes[..usize::from(ip.total_len())];
        self.pass(ip.next_header(), whole, packet);
    }

    /// RFC 8200; a packet with extension headers is none that we would carry.
    fn ipv6(&mut self, bytes: &[u8]) {
        let Ok(ip) = Ipv6Packet::new_checked(bytes) else { return };
        if ip.version() != 6 {
            return;
        }
        let (from, to) = (ip.src_addr(), ip.dst_addr());
        let packet = Packet { from: from.into(), to: to.into(), payload: ip.payload() };
        if ip.next_header() == IpProtocol::Icmpv6 && icmp6::answer(packet, ip.hop_limit(), &mut self.outbox) {
            return;
        }
        if !is_within(packet.from) || is_router(packet.from) || is_name_server(packet.from) {
            return;
        }
        if ip.next_header() == IpProtocol::Ipv6Frag {
            // Next header, reserved, offset and flag, identification (RFC 8200 4.5).
            let Some((&[protocol, _, o0, o1, i0, i1, i2, i3], rest)) = packet.payload.split_first_chunk()
            else {
                return;
            };
            let (offset, identification) =
                (u16::from_be_bytes([o0, o1]), u32::from_be_bytes([i0, i1, i2, i3]));
            let key = Key { from: packet.from, to: packet.to, protocol, identification };
            return self.piece(key, usize::from(offset & !7), offset & 1 != 0, rest);
        }
        self.pass(ip.next_header(), &bytes[..ip.total_len()], packet);
    }

    /// A piece of a packet. TCP never makes any.
    fn piece(&mut self, key: Key, at: usize, more: bool, bytes: &[u8]) {
        let protocol = IpProtocol::from(key.protocol);
        if protocol == IpProtocol::Tcp {
            return;
        }
        if let Some(whole) = self.fragments.take(key, at, more, bytes) {
            self.pass(protocol, &[], Packet { from: key.from, to: key.to, payload: &whole });
        }
    }

    /// A packet of the guest, and the bytes of all of it.
    fn pass(&mut self, protocol: IpProtocol, whole: &[u8], packet: Packet<'_>) {
        match protocol {
            IpProtocol::Tcp => self.tcp.take(whole, packet, self.routes),
            IpProtocol::Udp => self.udp.take(packet, self.routes),
            IpProtocol::Icmp | IpProtocol::Icmpv6 => self.pings.take(packet, self.routes, &mut self.outbox),
            _ => {}
        }
    }
}

impl Backend for UserNet {
    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tso4: true, tso6: true }
    }

    fn start(&mut self, accepts: Offloads) {
        self.outbox.start();
        self.fragments.clear();
        self.tcp.start(accepts);
        self.udp.clear();
        self.pings = Pings::default();
    }

    fn send(&mut self, _header: &Header, frame: &[u8]) {
        let Ok(ethernet) = EthernetFrame::new_checked(frame) else { return };
        let source = ethernet.src_addr();
        if !source.is_unicast() {
            return;
        }
        self.outbox.guest_mac = source.0;
        match ethernet.ethertype() {
            EthernetProtocol::Arp => arp::answer(ethernet.payload(), &mut self.outbox),
            EthernetProtocol::Ipv4 => self.ipv4(ethernet.payload()),
            EthernetProtocol::Ipv6 => self.ipv6(ethernet.payload()),
            _ => {}
        }
    }

    fn receive(&mut self, to: &mut Vec<u8>) -> Option<Header> {
        let (header, frame) = self.outbox.pop()?;
        to.extend_from_slice(&frame);
        Some(header)
    }

    fn work(&mut self) {
        let now = Instant::now();
        self.tcp.work(&mut self.outbox, now);
        self.udp.work(&mut self.outbox, now);
        self.pings.work(&mut self.outbox, now);
        icmp6::work(&mut self.outbox, now);
    }

    fn sleep_on<'a>(&'a self, _room: bool, list: &mut Vec<Interest<'a>>) -> Option<Duration> {
        self.tcp.interests(|_, fd, flags| list.push((fd, flags)));
        if self.outbox.has_room() {
            self.udp.sockets(|fd| list.push((fd, PollFlags::IN)));
            self.pings.sockets(|fd| list.push((fd, PollFlags::IN)));
        }
        self.tcp.deadline(&self.outbox).map(|at| at.saturating_duration_since(Instant::now()))
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("tcp_connections", self.tcp.opened),
            ("udp_flows", self.udp.opened),
            ("refused", self.tcp.refused),
            ("out_of_room", self.outbox.lost),
        ]
    }
}
