//! Addresses, ports and echo identifiers changed in place, and the checksums with them (packets.md section 5.4). Knows
//! headers, no session.
//!
//! Checksums are updated, not made anew (RFC 1624): a packet that came damaged stays damaged. One is made where there
//! is none: UDP over IPv6 with checksum 0, which receivers discard (RFC 8200 section 8.1).

use std::net::IpAddr;

use gateway_common::checksum;

use crate::worker::inner::{Inner, Transport, UDP};

/// Which address and port of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Those of the sender.
    Source,
    /// Those of the receiver.
    Destination,
}

/// A change of what a checksum covers: the sums before and after.
#[derive(Debug, Clone, Copy, Default)]
pub struct Change {
    old: u64,
    new: u64,
}

impl Change {
    /// From `old` to `new`, [`checksum::sum`]s of the same bytes.
    pub fn new(old: u64, new: u64) -> Self {
        Self { old, new }
    }

    /// Both changes.
    #[inline]
    pub fn and(self, other: Self) -> Self {
        Self { old: self.old + other.old, new: self.new + other.new }
    }

    /// Brings the checksum at `at` up to date.
    #[inline]
    pub fn apply(self, packet: &mut [u8], at: usize) {
        let old = [packet[at], packet[at + 1]];
        packet[at..at + 2].copy_from_slice(&checksum::update(old, self.old, self.new));
    }

    /// The same for UDP: "checksum 0 stays 0; a computed 0 is written as 0xFFFF" (RFC 768).
    #[inline]
    pub fn apply_udp(self, packet: &mut [u8], at: usize) {
        if packet[at..at + 2] == [0, 0] {
            return;
        }
        self.apply(packet, at);
        if packet[at..at + 2] == [0, 0] {
            packet[at..at + 2].fill(0xff);
        }
    }
}

/// The echo identifier, or the port of `side`, of a packet that `view` describes; `None` if it has neither.
#[inline]
pub fn port(packet: &[u8], view: &Inner, side: Side) -> Option<u16> {
    match (view.transport, side) {
        (Transport::Tcp { src, .. } | Transport::Udp { src, .. }, Side::Source) => Some(src),
        (Transport::Tcp { dst, .. } | Transport::Udp { dst, .. }, Side::Destination) => Some(dst),
        (Transport::IcmpEcho, _) => {
            let at = view.transport_at + 4;
            Some(u16::from_be_bytes([packet[at], packet[at + 1]]))
        }
        _ => None,
    }
}

/// Sets the address of one side, and the port of the other (or the echo identifier), in `packet` and in its `view`.
///
/// `ip` is of the packet's family.
#[inline]
pub fn rewrite(packet: &mut [u8], view: &mut Inner, address: Side, ip: IpAddr, new_port: u16) {
    let at = view.transport_at;
    let pseudo = set_address(packet, 0, address, ip);
    match address {
        Side::Source => view.src = ip,
        Side::Destination => view.dst = ip,
    }
    let port_at = match address {
        Side::Source => at + 2,
        Side::Destination => at,
    };
    match (&mut view.transport, address) {
        (Transport::Tcp { dst: port, .. }, Side::Source) | (Transport::Tcp { src: port, .. }, _) => {
            *port = new_port;
            set_port(packet, port_at, new_port).and(pseudo).apply(packet, at + 16);
        }
        (Transport::Udp { dst: port, .. }, Side::Source) | (Transport::Udp { src: port, .. }, _) => {
            *port = new_port;
            let change = set_port(packet, port_at, new_port).and(pseudo);
            if ip.is_ipv6() && packet[at + 6..at + 8] == [0, 0] {
                complete_udp_v6(packet, at);
            } else {
                change.apply_udp(packet, at + 6);
            }
        }
        (Transport::IcmpEcho, _) => {
            let change = set_port(packet, at + 4, new_port);
            // "ICMPv4 only for the identifier change": it has no pseudo-header.
            let change = if ip.is_ipv6() { change.and(pseudo) } else { change };
            change.apply(packet, at + 2);
        }
        _ => {}
    }
}

/// Sets an address of the IP header at `at`, with the header checksum of IPv4. The change is that of a pseudo-header.
#[inline]
pub fn set_address(packet: &mut [u8], at: usize, side: Side, ip: IpAddr) -> Change {
    let field = match (ip, side) {
        (IpAddr::V4(_), Side::Source) => at + 12,
        (IpAddr::V4(_), Side::Destination) => at + 16,
        (IpAddr::V6(_), Side::Source) => at + 8,
        (IpAddr::V6(_), Side::Destination) => at + 24,
    };
    match ip {
        IpAddr::V4(ip) => {
            let change = set(packet, field, ip.octets());
            change.apply(packet, at + 10);
            change
        }
        IpAddr::V6(ip) => set(packet, field, ip.octets()),
    }
}

/// Sets a port or identifier.
#[inline]
pub fn set_port(packet: &mut [u8], at: usize, port: u16) -> Change {
    set(packet, at, port.to_be_bytes())
}

#[inline]
fn set<const N: usize>(packet: &mut [u8], at: usize, value: [u8; N]) -> Change {
    let field = &mut packet[at..at + N];
    let old = checksum::sum(field);
    field.copy_from_slice(&value);
    Change { old, new: checksum::sum(&value) }
}

#[cold]
fn complete_udp_v6(packet: &mut [u8], at: usize) {
    let len = u16::from_be_bytes([packet[at + 4], packet[at + 5]]);
    let pseudo = checksum::pseudo_header(&packet[8..40], UDP, len);
    let sum = match checksum::finish(pseudo + checksum::sum(&packet[at..])) {
        [0, 0] => [0xff; 2],
        sum => sum,
    };
    packet[at + 6..at + 8].copy_from_slice(&sum);
}
