//! The middle of the outbound walk: what becomes of a packet that a client sent (packets.md section 3, steps 1 to
//! 10, in that order; translating is the spine's). Knows the client and our own addresses; no session, no sink.

use std::net::IpAddr;

use gateway_common::DropReason;

use super::{
    control_packet::{self, Control},
    icmp::Denial,
    inner::{self, Inner, Transport},
    peer::Peer,
    policy::{Class, Decision},
};
use crate::{
    addr::{self, TUNNEL_DNS_PORT, TunnelAddrs},
    ids::ResourceId,
};

/// What becomes of it.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// To the TUN device, as it is; let through by this resource, unless it is for ourselves.
    ToTun(Option<ResourceId>, Inner),
    /// To the TUN device, translated: to the address behind the proxy address. Let through by this resource.
    Translate(IpAddr, ResourceId, Inner),
    /// Ours.
    Control(Control),
    /// Gone, silently.
    Drop(DropReason),
    /// Gone, and the client is told.
    Deny(Denial, DropReason, Inner),
}

/// Our own tunnel addresses and what clients may do there.
#[derive(Debug, Clone, Copy, Default)]
pub struct Own {
    /// `None` before the first `init`.
    pub addrs: Option<TunnelAddrs>,
    /// Every port, not only DNS and echo.
    pub allow_all: bool,
}

/// Decides on one decrypted packet.
#[inline]
pub fn decide(peer: &mut Peer, packet: &[u8], own: Own) -> Verdict {
    let inner = match inner::view(packet) {
        Ok(inner) => inner,
        Err(reason) => return Verdict::Drop(reason),
    };
    if inner.dst.is_multicast() {
        return Verdict::Drop(DropReason::Multicast);
    }
    if let Some(control) = control_packet::parse(packet, &inner) {
        return Verdict::Control(control);
    }
    if inner::embedded(packet, &inner).is_some() {
        return Verdict::Drop(DropReason::OutboundIcmpError);
    }
    if inner::is_source_routed(packet, &inner) {
        return Verdict::Drop(DropReason::SourceRouted);
    }
    allow(peer, inner, own)
}

/// Decides by its addresses and ports on a packet that is neither odd nor for the gateway's own ears: also on one that
/// an operator only imagines.
#[inline]
pub fn allow(peer: &mut Peer, inner: Inner, own: Own) -> Verdict {
    let denied = |denial, reason| deny(denial, reason, inner);
    if !peer.tunnel.contains(inner.src) {
        return denied(Denial::Prohibited, DropReason::ForeignSource);
    }
    if own.addrs.is_some_and(|addrs| addrs.contains(inner.dst)) {
        return match inner.transport {
            _ if own.allow_all => Verdict::ToTun(None, inner),
            Transport::Udp { dst: TUNNEL_DNS_PORT, .. }
            | Transport::Tcp { dst: TUNNEL_DNS_PORT, .. }
            | Transport::IcmpEcho => Verdict::ToTun(None, inner),
            _ => denied(Denial::Prohibited, DropReason::OwnAddressPort),
        };
    }
    if addr::is_tunnel(inner.dst) {
        return denied(Denial::Prohibited, DropReason::TunnelDestination);
    }
    let class = Class::of_destination(inner.transport);
    if addr::is_resource_proxy(inner.dst) {
        // A proxy address that nobody assigned is prohibited like one whose resource is revoked: the client then asks
        // for an authorisation, and that is how it finds its names again after a restart of ours.
        return match peer.decide_proxy(inner.dst, class) {
            Decision::Permitted(by) => match peer.proxies.get(inner.dst).and_then(|proxy| proxy.real) {
                Some(real) => Verdict::Translate(real, by, inner),
                None => denied(Denial::Unreachable, DropReason::NoTranslation),
            },
            Decision::Denied | Decision::Private => denied(Denial::Prohibited, DropReason::NotAllowed),
        };
    }
    match peer.policy.decide(inner.dst, class) {
        Decision::Permitted(by) => Verdict::ToTun(Some(by), inner),
        Decision::Denied => denied(Denial::Prohibited, DropReason::NotAllowed),
        Decision::Private => denied(Denial::Unreachable, DropReason::PrivateDestination),
    }
}

/// RFC 1122 section 3.2.2: "An ICMP error message MUST NOT be sent as the result of receiving an ICMP error message".
/// Those that parse are gone by now; the others are not answered either.
#[inline]
fn deny(denial: Denial, reason: DropReason, inner: Inner) -> Verdict {
    match inner.transport {
        Transport::IcmpError => Verdict::Drop(reason),
        _ => Verdict::Deny(denial, reason, inner),
    }
}
