//! Neighbours and routers of IPv6 (RFC 4861): the router answers for itself and the name server, and advertises the prefix of
//! which the guest makes its addresses (RFC 4862), with the name server (RFC 8106). It is a default router only where this
//! host has a way into the IPv6 Internet, so that a guest elsewhere does not try in vain.

use std::net::{IpAddr, Ipv6Addr, UdpSocket};
use std::time::{Duration, Instant};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, Icmpv6Packet, Icmpv6Repr, IpProtocol, NdiscNeighborFlags, NdiscPrefixInfoFlags,
    NdiscPrefixInformation, NdiscRepr, NdiscRouterFlags,
};

use super::outbox::{MTU, Outbox};
use super::{GATEWAY_MAC, NAME_SERVER6, PREFIX6, Packet, is_name_server, is_router};

/// The router's address of the link.
pub(super) const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// How long the router stays one without being heard of, and how often it is.
const LIFETIME: Duration = Duration::from_secs(1800);
const EVERY: Duration = Duration::from_secs(600);
/// Addresses are good for ever.
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);
/// Packets of neighbours have this limit, or came through a router (RFC 4861 6.1, 7.1).
const NEAR: u8 = 255;
/// An address of the IPv6 Internet (RFC 3849: a document's), to ask for a way to; nothing is sent.
const FAR: (Ipv6Addr, u16) = (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), 9);

/// Takes a packet of neighbours; false if it is none.
pub(super) fn answer(packet: Packet<'_>, hop_limit: u8, outbox: &mut Outbox) -> bool {
    let (IpAddr::V6(from), IpAddr::V6(to)) = (packet.from, packet.to) else { return false };
    let Ok(icmp) = Icmpv6Packet::new_checked(packet.payload) else { return false };
    let Ok(Icmpv6Repr::Ndisc(ndisc)) = Icmpv6Repr::parse(&from, &to, &icmp, &ChecksumCapabilities::default())
    else {
        return false;
    };
    if hop_limit != NEAR {
        return true;
    }
    match ndisc {
        NdiscRepr::RouterSolicit { .. } => {
            advertise(if from.is_unspecified() { ALL_NODES } else { from }, outbox)
        }
        // Who asks from no address looks whether his is taken; it is not.
        NdiscRepr::NeighborSolicit { target_addr, .. } if !from.is_unspecified() => {
            let target = IpAddr::V6(target_addr);
            if is_router(target) || is_name_server(target) {
                let reply = NdiscRepr::NeighborAdvert {
                    flags: NdiscNeighborFlags::SOLICITED
                        | NdiscNeighborFlags::OVERRIDE
                        | NdiscNeighborFlags::ROUTER,
                    target_addr,
                    lladdr: Some(EthernetAddress(GATEWAY_MAC).into()),
                };
                send(target_addr, from, &reply, &[], outbox);
            }
        }
        _ => {}
    }
    true
}

/// Advertises the router from time to time, once the guest has asked for one.
pub(super) fn work(outbox: &mut Outbox, now: Instant) {
    if outbox.advertised.is_some_and(|then| now.duration_since(then) >= EVERY) {
        advertise(ALL_NODES, outbox);
    }
}

fn advertise(to: Ipv6Addr, outbox: &mut Outbox) {
    outbox.advertised = Some(Instant::now());
    let leads_out =
        UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).and_then(|socket| socket.connect(FAR)).is_ok();
    let message = NdiscRepr::RouterAdvert {
        hop_limit: 64,
        flags: NdiscRouterFlags::empty(),
        router_lifetime: smoltcp::time::Duration::from(if leads_out { LIFETIME } else { Duration::ZERO }),
        reachable_time: Duration::ZERO.into(),
        retrans_time: Duration::ZERO.into(),
        lladdr: Some(EthernetAddress(GATEWAY_MAC).into()),
        mtu: u32::try_from(MTU).ok(),
        prefix_info: Some(NdiscPrefixInformation {
            prefix_len: PREFIX6,
            flags: NdiscPrefixInfoFlags::ON_LINK | NdiscPrefixInfoFlags::ADDRCONF,
            valid_lifetime: FOR_EVER.into(),
            preferred_lifetime: FOR_EVER.into(),
            prefix: Ipv6Addr::new(0xfec0, 0, 0, 0, 0, 0, 0, 0),
        }),
    };
    // The name server: kind 25, of 3 times 8 bytes, its lifetime in seconds (RFC 8106 5.1).
    let mut server = vec![25, 3, 0, 0];
    server.extend(u32::MAX.to_be_bytes());
    server.extend(NAME_SERVER6.octets());
    send(LINK_LOCAL, to, &message, &server, outbox);
}

/// Sends a message with another option behind its own.
fn send(from: Ipv6Addr, to: Ipv6Addr, message: &NdiscRepr<'_>, option: &[u8], outbox: &mut Outbox) {
    let sums = ChecksumCapabilities::default();
    let repr = Icmpv6Repr::Ndisc(*message);
    let len = repr.buffer_len();
    let mut bytes = vec![0; len + option.len()];
    repr.emit(&from, &to, &mut Icmpv6Packet::new_unchecked(&mut bytes[..len]), &sums);
    bytes[len..].copy_from_slice(option);
    Icmpv6Packet::new_unchecked(&mut bytes).fill_checksum(&from, &to);
    outbox.push_ip(from.into(), to.into(), IpProtocol::Icmpv6, &bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn router_is_advertised_when_asked_for_and_again() {
        let mut outbox = Outbox::default();
        let now = Instant::now();
        work(&mut outbox, now);
        assert!(outbox.pop().is_none(), "nobody asked");
        advertise(ALL_NODES, &mut outbox);
        let (_, frame) = outbox.pop().unwrap();
        assert_eq!(frame[12..14], [0x86, 0xdd]);
        assert!(frame.windows(16).any(|w| w == NAME_SERVER6.octets()));
        work(&mut outbox, now + EVERY / 2);
        assert!(outbox.pop().is_none());
        work(&mut outbox, now + EVERY * 2);
        assert!(outbox.pop().is_some());
    }
}
