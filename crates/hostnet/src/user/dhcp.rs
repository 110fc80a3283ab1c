//! The DHCP server (RFC 2131): one address, one lease that everybody gets who asks.

use std::net::Ipv4Addr;

use smoltcp::wire::{DhcpMessageType, DhcpPacket, DhcpRepr, UdpPacket};

use super::outbox::Outbox;
use super::{GATEWAY, GUEST, NAME_SERVER, NETMASK, Packet};

/// The server's port.
pub(super) const SERVER: u16 = 67;
const CLIENT: u16 = 68;
const LEASE_SECONDS: u32 = 86_400;

/// Answers what a client sends.
pub(super) fn answer(packet: Packet<'_>, outbox: &mut Outbox) {
    let Ok(udp) = UdpPacket::new_checked(packet.payload) else { return };
    let Ok(message) = DhcpPacket::new_checked(udp.payload()) else { return };
    let Ok(request) = DhcpRepr::parse(&message) else { return };
    let Some(kind) = reply_to(&request) else { return };
    let refused = kind == DhcpMessageType::Nak;
    let reply = DhcpRepr {
        message_type: kind,
        your_ip: if refused { Ipv4Addr::UNSPECIFIED } else { GUEST },
        server_ip: Ipv4Addr::UNSPECIFIED,
        server_identifier: Some(GATEWAY),
        router: (!refused).then_some(GATEWAY),
        subnet_mask: (!refused).then_some(NETMASK),
        dns_servers: (!refused).then(|| {
            let mut servers = request.dns_servers.clone().unwrap_or_default();
            servers.clear();
            let _fits = servers.push(NAME_SERVER);
            servers
        }),
        lease_duration: (!refused).then_some(LEASE_SECONDS),
        requested_ip: None,
        client_identifier: None,
        parameter_request_list: None,
        max_size: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
        ..request
    };
    let mut bytes = vec![0; reply.buffer_len()];
    if reply.emit(&mut DhcpPacket::new_unchecked(&mut bytes)).is_ok() {
        // RFC 2131 4.1: to everybody, unless the client has its address already.
        let client = if request.client_ip == GUEST { GUEST } else { Ipv4Addr::BROADCAST };
        outbox.push_udp((GATEWAY.into(), SERVER), (client.into(), CLIENT), &bytes);
    }
}

/// RFC 2131 4.3. A request for another server's offer, or what needs no answer, gets none.
fn reply_to(request: &DhcpRepr<'_>) -> Option<DhcpMessageType> {
    match request.message_type {
        DhcpMessageType::Discover => Some(DhcpMessageType::Offer),
        DhcpMessageType::Inform => Some(DhcpMessageType::Ack),
        DhcpMessageType::Request => {
            if request.server_identifier.is_some_and(|server| server != GATEWAY) {
                return None;
            }
            let wanted = request.requested_ip.unwrap_or(request.client_ip);
            Some(if wanted == GUEST { DhcpMessageType::Ack } else { DhcpMessageType::Nak })
        }
        _ => None,
    }
}
