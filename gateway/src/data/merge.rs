//! Which packets may be merged: exactly those that splitting gives back (packets.md section 10, "Write").
//!
//! Pure rules on two packets; `coalesce.rs` applies them and `split.rs` is their inverse.

use super::headers::{ACK, Layout, PSH, TCP_FLAGS, Transport, be16, be32};

/// An item that may still grow.
#[derive(Clone, Copy)]
pub struct Open {
    /// Payload bytes of each packet so far.
    pub segment: usize,
    /// The first packet's checksum was found right.
    pub verified: bool,
}

/// What tells flows apart.
#[derive(PartialEq, Eq, Hash)]
pub struct Flow {
    source: u128,
    destination: u128,
    ports: u32,
    v6: bool,
    transport: Transport,
}

impl Flow {
    /// The flow of a packet.
    pub fn of(layout: &Layout, packet: &[u8]) -> Self {
        let addresses = layout.addresses(packet);
        let (source, destination) = addresses.split_at(addresses.len() / 2);
        let number = |bytes: &[u8]| bytes.iter().fold(0, |n, b| n << 8 | u128::from(*b));
        Self {
            source: number(source),
            destination: number(destination),
            ports: be32(packet, layout.l4),
            v6: layout.v6,
            transport: layout.transport,
        }
    }
}

/// What may be appended to a super-packet that begins with `packet`.
pub fn begins(layout: &Layout, packet: &[u8]) -> Option<Open> {
    let segment = packet.len() - layout.payload;
    let alone = match layout.transport {
        // Only plain data: a flag says something about its own segment. PSH ends what belongs together.
        Transport::Tcp => packet[layout.l4 + TCP_FLAGS] != ACK || packet[layout.l4 + 12] & 0x0f != 0,
        Transport::Udp => false,
    };
    (segment > 0 && !alone).then_some(Open { segment, verified: false })
}

/// Would splitting give `packet` these headers, as segment number `count`, `offset` payload bytes behind `first`?
pub fn continues(layout: &Layout, first: &[u8], packet: &[u8], count: usize, offset: usize) -> bool {
    let ip = if layout.v6 {
        // Version, traffic class, flow label; next header is in the layout; hop limit.
        first[..4] == packet[..4] && first[7] == packet[7]
    } else {
        let df = 0x40;
        #[expect(clippy::cast_possible_truncation, reason = "at most MAX_MERGED")]
        let id = be16(first, 4).wrapping_add(count as u16);
        // TOS; flags; TTL. Identifications matter only where a packet may be fragmented (RFC 6864).
        first[1] == packet[1]
            && first[6..8] == packet[6..8]
            && first[8] == packet[8]
            && (packet[6] & df != 0 || be16(packet, 4) == id)
    };
    if !ip || layout.transport == Transport::Udp {
        return ip;
    }
    let (a, b) = (&first[layout.l4..layout.payload], &packet[layout.l4..layout.payload]);
    #[expect(clippy::cast_possible_truncation, reason = "less than a packet's length")]
    let sequence = be32(a, 4).wrapping_add(offset as u32);
    be32(b, 4) == sequence
        && a[8..13] == b[8..13] // acknowledgment number, data offset
        && b[TCP_FLAGS] & !PSH == ACK
        && a[14..16] == b[14..16] // window
        && a[18..] == b[18..] // urgent pointer, options
}
