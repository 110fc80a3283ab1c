//! ICMP echo. The router answers for itself; others are asked through the host's unprivileged echo sockets (icmp(7),
//! `net.ipv4.ping_group_range`), and where the host does not allow these there is no answer.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, ipproto, recv, send, socket_with,
};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, Icmpv6Packet, Icmpv6Repr, IpProtocol};

use super::outbox::Outbox;
use super::{Packet, Routes, is_name_server, is_router};

/// Most destinations at a time (INV-USER-1).
const FLOWS: usize = 32;
const QUIET: Duration = Duration::from_secs(30);
const BURST: usize = 16;

struct Flow {
    guest: IpAddr,
    identification: u16,
    to: IpAddr,
    socket: OwnedFd,
    used: Instant,
}

/// Who is being asked.
#[derive(Default)]
pub(super) struct Pings {
    flows: Vec<Flow>,
}

impl Pings {
    /// A packet of the guest.
    pub fn take(&mut self, packet: Packet<'_>, routes: Routes, outbox: &mut Outbox) {
        let Some((Kind::Request, Echo { ident, seq_no, data })) = parse(packet, true) else { return };
        if is_router(packet.to) || is_name_server(packet.to) {
            reply(packet.to, packet.from, &Echo { ident, seq_no, data }, outbox);
            return;
        }
        let of = |flow: &Flow| (flow.guest, flow.identification, flow.to) == (packet.from, ident, packet.to);
        let index = self.flows.iter().position(of).or_else(|| {
            let address = routes.outside(packet.to)?;
            let socket = open(SocketAddr::new(address, 0)).ok()?;
            if self.flows.len() == FLOWS {
                self.flows.remove(0);
            }
            let (guest, to) = (packet.from, packet.to);
            self.flows.push(Flow { guest, identification: ident, to, socket, used: Instant::now() });
            Some(self.flows.len() - 1)
        });
        let Some(flow) = index.and_then(|index| self.flows.get_mut(index)) else { return };
        flow.used = Instant::now();
        // The kernel puts an identification of its own in, and the checksum.
        let _ = send(&flow.socket, packet.payload, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }

    /// Takes answers.
    pub fn work(&mut self, outbox: &mut Outbox, now: Instant) {
        self.flows.retain(|flow| now.duration_since(flow.used) < QUIET);
        let mut buffer = [0; 65_536];
        for flow in &self.flows {
            for _ in 0..BURST {
                if !outbox.has_room() {
                    return;
                }
                let Ok((_, len)) = recv(&flow.socket, &mut buffer[..], RecvFlags::DONTWAIT) else { break };
                let payload = &buffer[..len.min(65_536)];
                // The kernel has looked at the sum, over addresses that we do not know.
                let answer = Packet { from: flow.to, to: flow.guest, payload };
                if let Some((Kind::Reply, echo)) = parse(answer, false) {
                    let echo = Echo { ident: flow.identification, ..echo };
                    reply(flow.to, flow.guest, &echo, outbox);
                }
            }
        }
    }

    pub fn sockets<'a>(&'a self, mut add: impl FnMut(BorrowedFd<'a>)) {
        self.flows.iter().for_each(|flow| add(flow.socket.as_fd()));
    }
}

fn open(to: SocketAddr) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (family, protocol) = match to {
        SocketAddr::V4(_) => (AddressFamily::INET, ipproto::ICMP),
        SocketAddr::V6(_) => (AddressFamily::INET6, ipproto::ICMPV6),
    };
    let socket = socket_with(family, SocketType::DGRAM, flags, Some(protocol))?;
    connect(&socket, &to)?;
    Ok(socket)
}

/// What an echo carries.
struct Echo<'a> {
    ident: u16,
    seq_no: u16,
    data: &'a [u8],
}

#[derive(PartialEq, Eq)]
enum Kind {
    Request,
    Reply,
}

fn parse<'a>(packet: Packet<'a>, check: bool) -> Option<(Kind, Echo<'a>)> {
    let sums = if check { ChecksumCapabilities::default() } else { ChecksumCapabilities::ignored() };
    match (packet.from, packet.to) {
        (IpAddr::V4(_), IpAddr::V4(_)) => {
            let icmp = Icmpv4Packet::new_checked(packet.payload).ok()?;
            match Icmpv4Repr::parse(&icmp, &sums).ok()? {
                Icmpv4Repr::EchoRequest { ident, seq_no, data } => {
                    Some((Kind::Request, Echo { ident, seq_no, data }))
                }
                Icmpv4Repr::EchoReply { ident, seq_no, data } => {
                    Some((Kind::Reply, Echo { ident, seq_no, data }))
                }
                _ => None,
            }
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let icmp = Icmpv6Packet::new_checked(packet.payload).ok()?;
            match Icmpv6Repr::parse(&from, &to, &icmp, &sums).ok()? {
                Icmpv6Repr::EchoRequest { ident, seq_no, data } => {
                    Some((Kind::Request, Echo { ident, seq_no, data }))
                }
                Icmpv6Repr::EchoReply { ident, seq_no, data } => {
                    Some((Kind::Reply, Echo { ident, seq_no, data }))
                }
                _ => None,
            }
        }
        _ => None,
    }
}

fn reply(from: IpAddr, to: IpAddr, echo: &Echo<'_>, outbox: &mut Outbox) {
    let &Echo { ident, seq_no, data } = echo;
    let sums = ChecksumCapabilities::default();
    match (from, to) {
        (IpAddr::V4(_), IpAddr::V4(_)) => {
            let repr = Icmpv4Repr::EchoReply { ident, seq_no, data };
            let mut bytes = vec![0; repr.buffer_len()];
            repr.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes), &sums);
            outbox.push_ip(from, to, IpProtocol::Icmp, &bytes);
        }
        (IpAddr::V6(source), IpAddr::V6(target)) => {
            let repr = Icmpv6Repr::EchoReply { ident, seq_no, data };
            let mut bytes = vec![0; repr.buffer_len()];
            repr.emit(&source, &target, &mut Icmpv6Packet::new_unchecked(&mut bytes), &sums);
            outbox.push_ip(from, to, IpProtocol::Icmpv6, &bytes);
        }
        _ => {}
    }
}
