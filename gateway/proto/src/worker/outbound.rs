//! The middle of the outbound walk: what becomes of a packet that a client sent (packets.md section 3, steps 1 to
//! 10, in that order). Knows the client and our own addresses; no session, no sink.

use gateway_common::DropReason;

use super::{
    control_packet::{self, Control},
    icmp::Denial,
    inner::{self, Inner, Transport},
    peer::Peer,
    policy::{Class, Decision},
};
use crate::addr::{self, TUNNEL_DNS_PORT, TunnelAddrs};

/// What becomes of it.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// To the TUN device, as it is.
    ToTun,
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
    let denied = |denial, reason| deny(denial, reason, inner);
    if !peer.tunnel.contains(inner.src) {
        return denied(Denial::Prohibited, DropReason::ForeignSource);
    }
    if own.addrs.is_some_and(|addrs| addrs.contains(inner.dst)) {
        return match inner.transport {
            _ if own.allow_all => Verdict::ToTun,
            Transport::Udp { dst: TUNNEL_DNS_PORT, .. } | Transport::Tcp { dst: TUNNEL_DNS_PORT, .. } => {
                Verdict::ToTun
            }
            Transport::IcmpEcho => Verdict::ToTun,
            _ => denied(Denial::Prohibited, DropReason::OwnAddressPort),
        };
    }
    if addr::is_tunnel(inner.dst) {
        return denied(Denial::Prohibited, DropReason::TunnelDestination);
    }
    let decision = peer.policy.decide(inner.dst, Class::of_destination(inner.transport));
    // Proxy addresses never leave the gateway untranslated. While some DNS resource is authorised, "prohibited"
    // would make the client ask for an authorisation it has.
    if addr::is_resource_proxy(inner.dst) && (decision != Decision::Denied || peer.policy.has_dns()) {
        return denied(Denial::Unreachable, DropReason::NoTranslation);
    }
    match decision {
        Decision::Permitted(_) => Verdict::ToTun,
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
