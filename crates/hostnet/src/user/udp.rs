//! UDP: each pair of the guest's port and a destination has a connected socket of the host, so that the host's kernel lets in
//! only answers of that destination. What comes to a forwarded port gets a port of the router, to which the guest answers.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use smoltcp::wire::UdpPacket;

use super::outbox::Outbox;
use super::{DNS_PORT, GATEWAY, Packet, Routes};
use crate::{Forward, NetError};

/// Most flows; the one that was quiet longest gives way (INV-USER-1).
const FLOWS: usize = 256;
/// A flow that is quiet for so long ends.
const QUIET: Duration = Duration::from_secs(120);
/// The same where one answer is all.
const QUIET_DNS: Duration = Duration::from_secs(20);
/// Datagrams taken from one socket in a round.
const BURST: usize = 32;
/// Ports that the router lends to peers of forwarded ports.
const LENT: std::ops::Range<u16> = 32_768..61_000;

/// Who is at the host's end.
enum Peer {
    /// The destination that the guest chose.
    Connected(UdpSocket),
    /// Who came to the forwarded port of this number.
    Came(usize, SocketAddr),
}

struct Flow {
    guest: (IpAddr, u16),
    /// The other end as the guest sees it.
    other: SocketAddr,
    peer: Peer,
    used: Instant,
}

impl Flow {
    /// Passes on what the destination sent.
    fn answers(&mut self, outbox: &mut Outbox, now: Instant, buffer: &mut [u8]) {
        let Peer::Connected(socket) = &self.peer else { return };
        for _ in 0..BURST {
            if !outbox.has_room() {
                return;
            }
            match socket.recv(buffer) {
                Ok(len) => {
                    self.used = now;
                    outbox.push_udp((self.other.ip(), self.other.port()), self.guest, &buffer[..len]);
                }
                // A refusal is told once, and the next may be an answer.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(_) => return,
            }
        }
    }

    fn quiet(&self) -> Duration {
        if self.other.port() == DNS_PORT { QUIET_DNS } else { QUIET }
    }
}

/// All flows.
pub(super) struct Udp {
    forwards: Vec<(UdpSocket, Forward)>,
    flows: Vec<Flow>,
    next_lent: u16,
    pub opened: u64,
}

/// The destination port of a datagram.
pub(super) fn destination(payload: &[u8]) -> Option<u16> {
    UdpPacket::new_checked(payload).ok().map(|udp| udp.dst_port())
}

impl Udp {
    pub fn new<'a>(forwards: impl Iterator<Item = &'a Forward>) -> Result<Self, NetError> {
        let open = |forward: &Forward| {
            let socket = UdpSocket::bind((forward.address, forward.port))
                .and_then(|socket| socket.set_nonblocking(true).map(|()| socket));
            socket.map(|socket| (socket, *forward)).map_err(|source| super::tcp::cannot(forward, source))
        };
        let forwards = forwards.map(open).collect::<Result<_, _>>()?;
        Ok(Self { forwards, flows: Vec::new(), next_lent: LENT.start, opened: 0 })
    }

    pub fn clear(&mut self) {
        self.flows.clear();
    }

    /// A datagram of the guest.
    pub fn take(&mut self, packet: Packet<'_>, routes: Routes) {
        let Ok(udp) = UdpPacket::new_checked(packet.payload) else { return };
        let guest = (packet.from, udp.src_port());
        let other = SocketAddr::new(packet.to, udp.dst_port());
        let known = self.flows.iter().position(|flow| flow.guest == guest && flow.other == other);
        let index = match known {
            Some(index) => index,
            None => {
                let Some(socket) = routes.host(other).and_then(|to| connect(to).ok()) else { return };
                self.insert(Flow { guest, other, peer: Peer::Connected(socket), used: Instant::now() })
            }
        };
        let flow = &mut self.flows[index];
        flow.used = Instant::now();
        // What finds no room, or nobody, is lost, as datagrams are.
        let _ = match &flow.peer {
            Peer::Connected(socket) => socket.send(udp.payload()),
            Peer::Came(forward, peer) => match self.forwards.get(*forward) {
                Some((socket, _)) => socket.send_to(udp.payload(), peer),
                None => Ok(0),
            },
        };
    }

    /// Adds a flow, in the place of the quietest if there are too many; says where.
    fn insert(&mut self, flow: Flow) -> usize {
        self.opened += 1;
        if self.flows.len() < FLOWS {
            self.flows.push(flow);
            return self.flows.len() - 1;
        }
        let oldest = (0..self.flows.len()).min_by_key(|&index| self.flows[index].used).unwrap_or(0);
        self.flows[oldest] = flow;
        oldest
    }

    /// Takes what came in.
    pub fn work(&mut self, outbox: &mut Outbox, now: Instant) {
        self.flows.retain(|flow| now.duration_since(flow.used) < flow.quiet());
        let (forwarded, flows) = self.ready();
        if !forwarded.iter().chain(&flows).any(|&ready| ready) {
            return;
        }
        let mut buffer = vec![0; 65_536];
        for (flow, _) in self.flows.iter_mut().zip(flows).filter(|(_, ready)| *ready) {
            flow.answers(outbox, now, &mut buffer);
        }
        for (index, _) in forwarded.into_iter().enumerate().filter(|(_, ready)| *ready) {
            self.forwarded(index, outbox, &mut buffer);
        }
    }

    /// Which forwarded ports and which flows have something.
    fn ready(&self) -> (Vec<bool>, Vec<bool>) {
        let mut list = Vec::with_capacity(self.forwards.len() + self.flows.len());
        let mut wait = |fd| list.push(PollFd::from_borrowed_fd(fd, PollFlags::IN));
        self.forwards.iter().for_each(|(socket, _)| wait(socket.as_fd()));
        // Flows of forwarded ports have no socket of their own.
        let mut own = Vec::with_capacity(self.flows.len());
        for flow in &self.flows {
            own.push(matches!(flow.peer, Peer::Connected(_)));
            if let Peer::Connected(socket) = &flow.peer {
                wait(socket.as_fd());
            }
        }
        if list.is_empty() || poll(&mut list, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_err() {
            return (Vec::new(), Vec::new());
        }
        let mut found = list.iter().map(|fd| !fd.revents().is_empty());
        let forwarded = found.by_ref().take(self.forwards.len()).collect();
        (forwarded, own.into_iter().map(|own| own && found.next() == Some(true)).collect())
    }

    /// Takes what came to a forwarded port.
    fn forwarded(&mut self, index: usize, outbox: &mut Outbox, buffer: &mut [u8]) {
        for _ in 0..BURST {
            if !outbox.has_room() {
                return;
            }
            let Some((socket, forward)) = self.forwards.get(index) else { return };
            let Ok((len, from)) = socket.recv_from(buffer) else { return };
            let guest = (outbox.guest.into(), forward.guest_port);
            let same = |flow: &Flow| {
                matches!(flow.peer, Peer::Came(forward, peer) if forward == index && peer == from)
                    && flow.guest == guest
            };
            let at = match self.flows.iter().position(same) {
                Some(at) => at,
                None => {
                    let other = SocketAddr::new(GATEWAY.into(), self.lend());
                    let peer = Peer::Came(index, from);
                    self.insert(Flow { guest, other, peer, used: Instant::now() })
                }
            };
            let flow = &mut self.flows[at];
            flow.used = Instant::now();
            outbox.push_udp((GATEWAY.into(), flow.other.port()), guest, &buffer[..len]);
        }
    }

    /// A port of the router that no flow has.
    fn lend(&mut self) -> u16 {
        loop {
            let port = self.next_lent;
            self.next_lent = if port + 1 < LENT.end { port + 1 } else { LENT.start };
            // There are many times as many ports as flows.
            if !self.flows.iter().any(|flow| flow.other.ip() == GATEWAY && flow.other.port() == port) {
                return port;
            }
        }
    }

    /// Every socket that may have something.
    pub fn sockets<'a>(&'a self, mut add: impl FnMut(BorrowedFd<'a>)) {
        self.forwards.iter().for_each(|(socket, _)| add(socket.as_fd()));
        for flow in &self.flows {
            if let Peer::Connected(socket) = &flow.peer {
                add(socket.as_fd());
            }
        }
    }
}

fn connect(to: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = if to.is_ipv4() {
        (Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let socket = UdpSocket::bind(any)?;
    socket.set_nonblocking(true)?;
    socket.connect(to)?;
    Ok(socket)
}
