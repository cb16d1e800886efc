//! The beginning of the inbound walk: whose is a packet from the TUN, and may it pass (packets.md section 7, steps
//! 1 to 8)? Knows clients and our own addresses; no sink. A packet for another worker's client is passed on
//! as soon as that is known, and decided there.
//!
//! Deliberate differences to upstream:
//! * Protocols other than TCP, UDP and echo pass if the policy permits them from that source; upstream drops every
//!   reply of GRE, ESP or SCTP.
//! * An ICMP error passes only if the packet it is about has the client's own address as its source; upstream
//!   forwards any error, so that any host could cut a client's flows to somebody else. One of our own kernel is
//!   translated like any other: a client that traces the way to a name recognises its own packet.
//! * A packet that comes *from* a proxy address is refused; upstream lets it pass if the name's resource permits it.

use std::time::Instant;

use gateway_common::DropReason;

use super::{
    handover::Stop,
    inner::{self, Inner, Transport},
    nat::Inbound as Translation,
    outbound::Own,
    peer::Peer,
    peers::Peers,
    policy::{Class, Decision},
};
use crate::addr;

/// The client that gets the packet, and the packet's view as the resource sent it if that client's flows are counted. One
/// that belongs to a session is translated; any other, and one for another worker, is as it was.
#[inline]
pub fn decide<'a>(
    peers: &'a mut Peers,
    packet: &mut [u8],
    own: Own,
    now: Instant,
) -> Result<(&'a mut Peer, Option<Inner>), Stop> {
    let mut inner = inner::view(packet)?;
    if !addr::is_tunnel(inner.dst) {
        return Err(DropReason::NotAPeer.into());
    }
    let slot = peers.by_tunnel(inner.dst).ok_or(DropReason::NoPeerState)?;
    let peer = peers.holder(slot, DropReason::NoPeerState)?;
    // Answers of our DNS server and echo replies; ICMP errors of our own kernel are like those of any router.
    let ours = own.addrs.is_some_and(|addrs| addrs.contains(inner.src));
    if ours && inner.transport != Transport::IcmpError {
        return Ok((peer, None));
    }
    if addr::is_tunnel(inner.src) && !ours {
        return Err(DropReason::TunnelSource.into());
    }
    // Nothing out there has a proxy address.
    if addr::is_resource_proxy(inner.src) {
        return Err(DropReason::InboundNotAllowed.into());
    }
    match inner.transport {
        Transport::IcmpError => {
            decide_error(peer, packet, &mut inner, ours, now)?;
            return Ok((peer, None));
        }
        // Timestamps are answers like echoes. Redirects, discovery and the like are between neighbours.
        Transport::Icmp(kind) if !(inner.src.is_ipv4() && matches!(kind, 13 | 14)) => {
            return Err(DropReason::UnsupportedProtocol.into());
        }
        _ => {}
    }
    let sent = peer.flows.is_some().then_some(inner);
    let translated = match &mut peer.nat {
        Some(nat) => is_translated(nat.inbound(packet, &mut inner, now))?,
        None => false,
    };
    let class = Class::of_source(inner.transport);
    let decision =
        if translated { peer.decide_proxy(inner.src, class) } else { peer.policy.decide(inner.src, class) };
    match decision {
        Decision::Permitted(_) => Ok((peer, sent)),
        Decision::Denied | Decision::Private => Err(DropReason::InboundNotAllowed.into()),
    }
}

/// Routers on the way send these, so the filters have no say.
#[cold]
fn decide_error(
    peer: &mut Peer,
    packet: &mut [u8],
    inner: &mut Inner,
    ours: bool,
    now: Instant,
) -> Result<(), DropReason> {
    if let Some(nat) = &mut peer.nat
        && is_translated(nat.inbound_error(packet, inner, now))?
    {
        return Ok(());
    }
    if ours {
        return Ok(());
    }
    let about = inner::embedded(packet, inner).ok_or(DropReason::MalformedIcmpError)?;
    if peer.tunnel.contains(about.src) { Ok(()) } else { Err(DropReason::InboundNotAllowed) }
}

#[inline]
fn is_translated(what: Translation) -> Result<bool, DropReason> {
    match what {
        Translation::Rewritten(_) => Ok(true),
        Translation::Miss => Ok(false),
        Translation::Expired => Err(DropReason::NatExpired),
    }
}
