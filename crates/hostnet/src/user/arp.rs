//! ARP (RFC 826): the router answers for itself and the name server.

use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetProtocol};

use super::outbox::{ETHERNET, Outbox};
use super::{GATEWAY, GATEWAY_MAC, NAME_SERVER};
use crate::Header;

/// Answers a request.
pub(super) fn answer(bytes: &[u8], outbox: &mut Outbox) {
    let Ok(ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr,
        source_protocol_addr,
        target_protocol_addr,
        ..
    }) = ArpPacket::new_checked(bytes).and_then(|packet| ArpRepr::parse(&packet))
    else {
        return;
    };
    if !matches!(target_protocol_addr, GATEWAY | NAME_SERVER) {
        return;
    }
    let reply = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: EthernetAddress(GATEWAY_MAC),
        source_protocol_addr: target_protocol_addr,
        target_hardware_addr: source_hardware_addr,
        target_protocol_addr: source_protocol_addr,
    };
    let mut frame = vec![0; ETHERNET + reply.buffer_len()];
    reply.emit(&mut ArpPacket::new_unchecked(&mut frame[ETHERNET..]));
    outbox.push(Header::default(), EthernetProtocol::Arp, frame);
}
