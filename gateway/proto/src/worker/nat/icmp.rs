//! ICMP errors from the network about packets that we translated (packets.md section 5.5): the client is to see the
//! packet it sent, inside and outside. Knows layouts, no session.
//!
//! ```text
//! IP      src := proxy, TTL := 20             | header checksum
//! ICMP    MTU := at most the tunnel's         | checksum: all that changes below, and over IPv6 the addresses
//!   IP    dst := proxy                        | header checksum
//!   TCP.. src port or id := the client's      | transport checksum, if the error is long enough to hold it
//! ```
//!
//! Changed in place and updated (RFC 1624), as in [`super::rewrite`]: what came damaged stays damaged.

use std::net::IpAddr;

use gateway_common::checksum;

use super::{
    key::{Inside, Kind, Outside},
    rewrite::{self, Change, Side},
};
use crate::{
    addr::MAX_INNER,
    worker::inner::{self, Embedded, ICMP, ICMPV6, Inner, TCP, UDP},
};

/// "TTL 20", as in our own errors.
const TTL: u8 = 20;

/// Where an error's parts are, and whose packet it is about.
#[derive(Debug, Clone, Copy)]
pub struct About {
    embedded: Embedded,
    kind: Kind,
    /// Where the embedded source port or identifier is.
    port_at: usize,
    /// The session that sent the packet.
    pub outside: Outside,
}

/// What the error is about; `None` if it is about nothing that we translate.
///
/// A packet that is not from whom the error goes to was not sent by this client.
pub fn about(packet: &[u8], view: &Inner) -> Option<About> {
    let embedded = inner::embedded(packet, view)?;
    let kind = match embedded.protocol {
        TCP => Kind::Tcp,
        UDP => Kind::Udp,
        ICMP | ICMPV6 => Kind::Echo,
        _ => return None,
    };
    let port_at = match kind {
        Kind::Tcp | Kind::Udp => embedded.transport_at,
        Kind::Echo => embedded.transport_at + 4,
    };
    let port = u16::from_be_bytes([*packet.get(port_at)?, *packet.get(port_at + 1)?]);
    let outside = Outside::new(kind, port, embedded.dst);
    (embedded.src == view.dst).then_some(About { embedded, kind, port_at, outside })
}

/// Translates the error for the client that knows the session as `inside`.
pub fn translate(packet: &mut [u8], view: &mut Inner, about: &About, inside: Inside) {
    let at = view.transport_at;
    let body = at + 8;
    let end = datagram_end(packet, view, about);
    // The ICMP checksum covers everything from here on, and nothing of it before.
    let before = checksum::sum(&packet[at + 4..]);
    clamp_mtu(packet, at);
    let address = rewrite::set_address(packet, body, Side::Destination, inside.proxy());
    let port = rewrite::set_port(packet, about.port_at, inside.port());
    embedded_checksum(packet, about, address, port, end);
    let change = Change::new(before, checksum::sum(&packet[at + 4..]));

    set_ttl(packet);
    let address = rewrite::set_address(packet, 0, Side::Source, inside.proxy());
    view.src = inside.proxy();
    let change = if inside.proxy().is_ipv6() { change.and(address) } else { change };
    change.apply(packet, at + 2);
}

/// The checksum of the embedded transport header, if all of it is there: not what was cut away, and no RFC 4884
/// extension that stands in its place.
fn embedded_checksum(packet: &mut [u8], about: &About, address: Change, port: Change, end: usize) {
    let at = about.embedded.transport_at;
    let field = match about.kind {
        Kind::Tcp => at + 16,
        Kind::Udp => at + 6,
        Kind::Echo => at + 2,
    };
    if field + 2 > end {
        return;
    }
    match (about.kind, about.embedded.dst) {
        (Kind::Tcp, _) | (Kind::Echo, IpAddr::V6(_)) => address.and(port).apply(packet, field),
        // 0 stays, also over IPv6: a cut packet can not be summed.
        (Kind::Udp, _) => address.and(port).apply_udp(packet, field),
        (Kind::Echo, IpAddr::V4(_)) => port.apply(packet, field),
    }
}

/// Where the embedded packet ends: with the error, by its own length, or where RFC 4884 (sections 4.1 to 4.4) says that
/// extensions begin.
fn datagram_end(packet: &[u8], view: &Inner, about: &About) -> usize {
    let at = view.transport_at;
    let declared = match (view.src, packet[at]) {
        // Destination unreachable and time exceeded, in words of 4 bytes.
        (IpAddr::V4(_), _) => usize::from(packet[at + 5]) * 4,
        // Packet too big has its MTU there.
        (IpAddr::V6(_), 2) => 0,
        (IpAddr::V6(_), _) => usize::from(packet[at + 4]) * 8,
    };
    let declared = if declared == 0 { usize::MAX } else { declared };
    packet.len().min(at + 8 + declared.min(about.embedded.total))
}

/// "PTB MTU is passed through although the tunnel MTU is lower": a client's packets never exceed the tunnel's.
fn clamp_mtu(packet: &mut [u8], at: usize) {
    let most = u16::try_from(MAX_INNER).unwrap_or(u16::MAX).to_be_bytes();
    let v4 = packet[0] >> 4 == 4;
    match (v4, packet[at], packet[at + 1]) {
        // RFC 1191 section 4: the lower half; 0 from a router that does not know.
        (true, 3, 4) if packet[at + 6..at + 8] > most[..] => packet[at + 6..at + 8].copy_from_slice(&most),
        // RFC 4443 section 3.2: all four bytes.
        (false, 2, _) if packet[at + 4..at + 8] > [0, 0, most[0], most[1]][..] => {
            packet[at + 4..at + 8].copy_from_slice(&[0, 0, most[0], most[1]]);
        }
        _ => {}
    }
}

fn set_ttl(packet: &mut [u8]) {
    if packet[0] >> 4 == 4 {
        let old = [packet[8], packet[9]];
        packet[8] = TTL;
        Change::new(checksum::sum(&old), checksum::sum(&[TTL, old[1]])).apply(packet, 10);
    } else {
        packet[7] = TTL;
    }
}
