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
use crate::{addr, ids::ResourceId};

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
    match origin(&inner, ours)? {
        Origin::Ourselves => return Ok((peer, None)),
        Origin::Error => {
            decide_error(peer, packet, &mut inner, ours, now)?;
            return Ok((peer, None));
        }
        Origin::Resource => {}
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

/// What would become of a packet to `peer` that an operator imagines and that belongs to no translated session.
///
/// # Errors
/// Why it is dropped.
pub fn imagine(peer: &mut Peer, inner: &Inner, own: Own) -> Result<Option<ResourceId>, DropReason> {
    let ours = own.addrs.is_some_and(|addrs| addrs.contains(inner.src));
    match origin(inner, ours)? {
        Origin::Ourselves | Origin::Error => Ok(None),
        Origin::Resource => match peer.policy.decide(inner.src, Class::of_source(inner.transport)) {
            Decision::Permitted(by) => Ok(Some(by)),
            Decision::Denied | Decision::Private => Err(DropReason::InboundNotAllowed),
        },
    }
}

/// Who sent a packet to a client.
enum Origin {
    /// The gateway's own kernel.
    Ourselves,
    /// Somebody who has no place for a packet of the client.
    Error,
    /// What rules are about.
    Resource,
}

#[inline]
fn origin(inner: &Inner, ours: bool) -> Result<Origin, DropReason> {
    if ours && inner.transport != Transport::IcmpError {
        return Ok(Origin::Ourselves);
    }
    if addr::is_tunnel(inner.src) && !ours {
        return Err(DropReason::TunnelSource);
    }
    // Nothing out there has a proxy address.
    if addr::is_resource_proxy(inner.src) {
        return Err(DropReason::InboundNotAllowed);
    }
    match inner.transport {
        Transport::IcmpError => Ok(Origin::Error),
        // Timestamps are answers like echoes. Redirects, discovery and the like are between neighbours.
        Transport::Icmp(kind) if !(inner.src.is_ipv4() && matches!(kind, 13 | 14)) => {
            Err(DropReason::UnsupportedProtocol)
        }
        _ => Ok(Origin::Resource),
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
