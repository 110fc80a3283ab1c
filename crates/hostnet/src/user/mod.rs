//! User-mode networking: a router in this process, which needs no rights. The guest sees a network of its own, as QEMU's
//! users know it: itself 10.0.2.15/24 (by DHCP), the router and this host 10.0.2.2, the name server 10.0.2.3. What it
//! sends leaves through ordinary sockets of this process.
//!
//! Way of the data: a frame → [`UserNet::send`] → by protocol to [`arp`], [`dhcp`], [`ping`], [`udp`], [`tcp`] → a host's
//! socket. What comes back from sockets is put into frames in the [`Outbox`], and from there goes to the card.
//!
//! - TCP ends here and begins anew on the host (smoltcp's implementation towards the guest). A connection is accepted when the
//!   host's is there, refused when that is.
//! - UDP and echo requests are translated packet by packet, each flow on a connected socket: only who was asked can answer.
//! - INV-USER-1: everything that a guest or a peer can make more of has a limit: flows and their buffers, frames that wait.
//!
//! IPv4 alone. Fragments of UDP are not put together; TCP never needs them.

mod arp;
mod dhcp;
mod outbox;
mod ping;
mod resolver;
mod tcp;
mod udp;
mod wire;

#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use smoltcp::wire::{EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet};

use crate::{Backend, Forward, Header, Interest, Mac, NetError, Offloads, Protocol};
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
    fn host(self, to: SocketAddrV4) -> Option<SocketAddr> {
        let (address, port) = (*to.ip(), to.port());
        if port == 0 {
            None
        } else if address == NAME_SERVER {
            (port == DNS_PORT && !self.restrict).then(resolver::current)
        } else if address == GATEWAY {
            self.loopback.then(|| SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
        } else {
            self.outside(address).map(|address| SocketAddr::new(address, port))
        }
    }

    /// An address beyond the guest's network, if one can be asked for there.
    fn outside(self, address: Ipv4Addr) -> Option<IpAddr> {
        let within = address & NETMASK == GATEWAY & NETMASK;
        let special = address.is_loopback()
            || address.is_multicast()
            || address.is_broadcast()
            || address.octets()[0] == 0;
        (!within && !special && !self.restrict).then_some(IpAddr::V4(address))
    }
}

/// A packet of the guest: addresses, and what it carries.
#[derive(Clone, Copy)]
struct Packet<'a> {
    from: Ipv4Addr,
    to: Ipv4Addr,
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
        let packet = Packet { from, to, payload: ip.payload() };
        if ip.next_header() == IpProtocol::Udp
            && !fragment
            && udp::destination(packet.payload) == Some(dhcp::SERVER)
        {
            dhcp::answer(packet, &mut self.outbox);
            return;
        }
        // Another address than the one it was given is the guest's affair, but it must be of its network.
        if fragment || from & NETMASK != GATEWAY & NETMASK || matches!(from, GATEWAY | NAME_SERVER) {
            return;
        }
        self.outbox.guest = from;
        match ip.next_header() {
            IpProtocol::Tcp => {
                let whole = &bytes[..usize::from(ip.total_len())];
                self.tcp.take(whole, packet, self.routes);
            }
            IpProtocol::Udp => self.udp.take(packet, self.routes),
            IpProtocol::Icmp => self.pings.take(packet, self.routes, &mut self.outbox),
            _ => {}
        }
    }
}

impl Backend for UserNet {
    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tso4: true, tso6: false }
    }

    fn start(&mut self, accepts: Offloads) {
        self.outbox.start();
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
