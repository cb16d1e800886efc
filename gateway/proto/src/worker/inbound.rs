//! The beginning of the inbound walk: whose is a packet from the TUN, and may it pass (packets.md section 7, steps
//! 1 to 8)? Knows clients and our own addresses; no session, no sink. A packet for another worker's client is passed on
//! as soon as that is known, and decided there.
//!
//! Two deliberate differences to upstream:
//! * Protocols other than TCP, UDP and echo pass if the policy permits them from that source; upstream drops every
//!   reply of GRE, ESP or SCTP.
//! * An ICMP error passes only if the packet it is about has the client's own address as its source; upstream
//!   forwards any error, so that any host could cut a client's flows to somebody else.

use gateway_common::DropReason;

use super::{
    handover::Stop,
    inner::{self, Transport},
    outbound::Own,
    peer::Peer,
    peers::Peers,
    policy::{Class, Decision},
};
use crate::addr;

/// The client that gets the packet.
#[inline]
pub fn decide<'a>(peers: &'a mut Peers, packet: &[u8], own: Own) -> Result<&'a mut Peer, Stop> {
    let inner = inner::view(packet)?;
    if !addr::is_tunnel(inner.dst) {
        return Err(DropReason::NotAPeer.into());
    }
    let slot = peers.by_tunnel(inner.dst).ok_or(DropReason::NoPeerState)?;
    let peer = peers.holder(slot, DropReason::NoPeerState)?;
    // Answers of our DNS server, echo replies, and ICMP errors of our own kernel.
    if own.addrs.is_some_and(|addrs| addrs.contains(inner.src)) {
        return Ok(peer);
    }
    if addr::is_tunnel(inner.src) {
        return Err(DropReason::TunnelSource.into());
    }
    match inner.transport {
        Transport::IcmpError => {
            // Routers on the way send these, so the filters have no say.
            let about = inner::embedded(packet, &inner).ok_or(DropReason::UnsupportedProtocol)?;
            return if peer.tunnel.contains(about.src) {
                Ok(peer)
            } else {
                Err(DropReason::InboundNotAllowed.into())
            };
        }
        // Timestamps are answers like echoes. Redirects, discovery and the like are between neighbours.
        Transport::Icmp(kind) if !(inner.src.is_ipv4() && matches!(kind, 13 | 14)) => {
            return Err(DropReason::UnsupportedProtocol.into());
        }
        _ => {}
    }
    match peer.policy.decide(inner.src, Class::of_source(inner.transport)) {
        Decision::Permitted(_) => Ok(peer),
        Decision::Denied | Decision::Private => Err(DropReason::InboundNotAllowed.into()),
    }
}
