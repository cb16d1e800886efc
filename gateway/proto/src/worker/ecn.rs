//! Explicit congestion notification across the tunnel (packets.md section 8). Knows IP headers only.
//!
//! Outbound: a CE mark of the outer packet is merged into an inner packet that is ECN-capable. Inbound: the outer
//! packet carries the inner codepoint. Nothing is ever cleared, ECT(0) and ECT(1) are never swapped, DSCP is not
//! copied.

use crate::Ecn;
use gateway_common::checksum;

/// The codepoint of a valid IP packet.
#[inline]
pub fn of(packet: &[u8]) -> Ecn {
    match packet {
        [first, tos, ..] if first >> 4 == 4 => Ecn::from_bits(*tos),
        [_, second, ..] => Ecn::from_bits(second >> 4),
        _ => Ecn::NotEct,
    }
}

/// Copies CE from the outer packet onto an ECN-capable inner one and repairs its IPv4 header checksum.
#[inline]
pub fn merge(outer: Ecn, packet: &mut [u8]) {
    if outer != Ecn::Ce || !matches!(of(packet), Ecn::Ect0 | Ecn::Ect1) {
        return;
    }
    if packet[0] >> 4 == 6 {
        packet[1] |= 0x30;
        return;
    }
    let Some(header) = packet.first_chunk_mut::<20>() else { return };
    let old = [header[0], header[1]];
    header[1] |= 3;
    let checksum = checksum::replace([header[10], header[11]], old, [header[0], header[1]]);
    header[10..12].copy_from_slice(&checksum);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ce_is_merged_and_only_onto_capable_packets() {
        let table = [
            (Ecn::Ce, Ecn::Ect0, Ecn::Ce),
            (Ecn::Ce, Ecn::Ect1, Ecn::Ce),
            (Ecn::Ce, Ecn::NotEct, Ecn::NotEct),
            (Ecn::Ce, Ecn::Ce, Ecn::Ce),
            (Ecn::NotEct, Ecn::Ce, Ecn::Ce),
            (Ecn::Ect0, Ecn::Ect1, Ecn::Ect1),
            (Ecn::NotEct, Ecn::Ect0, Ecn::Ect0),
        ];
        for (outer, inner, expect) in table {
            let mut v4 = [0u8; 20];
            v4[0] = 0x45;
            v4[1] = 0xb8 | inner as u8;
            let whole = |p: &[u8]| checksum::finish(checksum::sum(p));
            let c = whole(&v4);
            v4[10..12].copy_from_slice(&c);
            merge(outer, &mut v4);
            assert_eq!(of(&v4), expect, "v4 {outer:?} over {inner:?}");
            assert_eq!(v4[1] & 0xfc, 0xb8, "DSCP stays");
            assert_eq!(whole(&v4), [0, 0], "the header checksum still holds");

            let mut v6 = [0u8; 40];
            v6[0] = 0x6b;
            v6[1] = 0x8f | (inner as u8) << 4;
            merge(outer, &mut v6);
            assert_eq!(of(&v6), expect, "v6 {outer:?} over {inner:?}");
            assert_eq!((v6[0], v6[1] & 0xcf), (0x6b, 0x8f), "DSCP and flow label stay");
        }
    }
}
