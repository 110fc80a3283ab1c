//! ICMP echo. The router answers for itself; others are asked through the host's unprivileged echo sockets (icmp(7),
//! `net.ipv4.ping_group_range`), and where the host does not allow these there is no answer.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, ipproto, recv, send, socket_with,
};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr, IpProtocol};

use super::outbox::Outbox;
use super::{GATEWAY, NAME_SERVER, Packet, Routes};

/// Most destinations at a time (INV-USER-1).
const FLOWS: usize = 32;
const QUIET: Duration = Duration::from_secs(30);
const BURST: usize = 16;

struct Flow {
    guest: Ipv4Addr,
    identification: u16,
    to: Ipv4Addr,
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
        let Ok(icmp) = Icmpv4Packet::new_checked(packet.payload) else { return };
        let Ok(Icmpv4Repr::EchoRequest { ident, seq_no, data }) =
            Icmpv4Repr::parse(&icmp, &ChecksumCapabilities::default())
        else {
            return;
        };
        if matches!(packet.to, GATEWAY | NAME_SERVER) {
            reply(packet.to, packet.from, ident, seq_no, data, outbox);
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
                let Ok(icmp) = Icmpv4Packet::new_checked(&buffer[..len.min(65_536)]) else { continue };
                if let Ok(Icmpv4Repr::EchoReply { seq_no, data, .. }) =
                    Icmpv4Repr::parse(&icmp, &ChecksumCapabilities::default())
                {
                    reply(flow.to, flow.guest, flow.identification, seq_no, data, outbox);
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
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, flags, Some(ipproto::ICMP))?;
    connect(&socket, &to)?;
    Ok(socket)
}

fn reply(from: Ipv4Addr, to: Ipv4Addr, ident: u16, seq_no: u16, data: &[u8], outbox: &mut Outbox) {
    let repr = Icmpv4Repr::EchoReply { ident, seq_no, data };
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(&mut Icmpv4Packet::new_unchecked(&mut bytes), &ChecksumCapabilities::default());
    outbox.push_ipv4(from, to, IpProtocol::Icmp, &bytes);
}
