//! The denials a client gets instead of silence (packets.md section 4.5), byte for byte. Knows packets only; who
//! may have how many is peer.rs.

use std::net::IpAddr;

use gateway_common::checksum;

use super::inner::Inner;
use crate::addr::MAX_INNER;

/// Which answer: the client reads them differently.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denial {
    /// "My authorisation is gone": the client asks the portal again.
    Prohibited,
    /// Nothing the client could do about it.
    Unreachable,
}

/// The header of a reply starts with TTL or hop limit 20.
const TTL: u8 = 20;
const HEADER_V4: usize = 20;
const HEADER_V6: usize = 40;
const HEADER_ICMP: usize = 8;

/// Writes the denial of `packet` (valid, described by `inner`) to `out`; its length.
///
/// "Source = original destination, destination = original source", in the embedded packet the addresses are as the
/// client sent them. The checksum is complete.
pub fn deny(denial: Denial, packet: &[u8], inner: &Inner, out: &mut [u8; MAX_INNER]) -> usize {
    match (inner.src, inner.dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            // "body = original IP header (with options) + 8 bytes"
            let body = &packet[..packet.len().min(inner.transport_at + 8)];
            let total = HEADER_V4 + HEADER_ICMP + body.len();
            let (header, icmp) = out[..total].split_at_mut(HEADER_V4);
            header.fill(0);
            header[0] = 0x45;
            header[2..4].copy_from_slice(&be16(total));
            header[8] = TTL;
            header[9] = 1;
            header[12..16].copy_from_slice(&dst.octets());
            header[16..20].copy_from_slice(&src.octets());
            let sum = checksum::finish(checksum::sum(header));
            header[10..12].copy_from_slice(&sum);
            let code = match denial {
                Denial::Prohibited => 13,
                Denial::Unreachable => 0,
            };
            message(3, code, body, 0, icmp);
            total
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let body = &packet[..packet.len().min(MAX_INNER - HEADER_V6 - HEADER_ICMP)];
            let length = HEADER_ICMP + body.len();
            let (header, icmp) = out[..HEADER_V6 + length].split_at_mut(HEADER_V6);
            header.fill(0);
            header[0] = 0x60;
            header[4..6].copy_from_slice(&be16(length));
            header[6] = 58;
            header[7] = TTL;
            header[8..24].copy_from_slice(&dst.octets());
            header[24..40].copy_from_slice(&src.octets());
            // RFC 8200 section 8.1: addresses, length, next header.
            let pseudo =
                checksum::pseudo_header(&header[8..40], 58, u16::from_be_bytes([header[4], header[5]]));
            let code = match denial {
                Denial::Prohibited => 1,
                Denial::Unreachable => 3,
            };
            message(1, code, body, pseudo, icmp);
            HEADER_V6 + length
        }
        // One packet has addresses of one family.
        _ => 0,
    }
}

fn message(kind: u8, code: u8, body: &[u8], pseudo: u64, out: &mut [u8]) {
    out[..HEADER_ICMP].fill(0);
    out[0] = kind;
    out[1] = code;
    out[HEADER_ICMP..].copy_from_slice(body);
    let sum = checksum::finish(pseudo + checksum::sum(out));
    out[2..4].copy_from_slice(&sum);
}

fn be16(length: usize) -> [u8; 2] {
    // At most MAX_INNER.
    u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::{super::inner, *};

    fn denied(denial: Denial, packet: &[u8]) -> Vec<u8> {
        let mut out = [0xaa; MAX_INNER];
        let len = deny(denial, packet, &inner::view(packet).unwrap(), &mut out);
        out[..len].to_vec()
    }

    #[test]
    fn the_test_vectors_come_out_byte_for_byte() {
        let v4 = hex::decode("45000020123440004011b822644002020a2c00099c400035000c2e2361626364").unwrap();
        let prohibited = "45000038000000001401364f0a2c000964400202030d324e00000000\
                          45000020123440004011b822644002020a2c00099c400035000c2e23";
        assert_eq!(hex::encode(denied(Denial::Prohibited, &v4)), prohibited);
        let unreachable = prohibited.replace("030d324e", "0300325b");
        assert_eq!(hex::encode(denied(Denial::Unreachable, &v4)), unreachable);

        let v6 = hex::decode(
            "60000000000c1140fd002021111100000000000000020002fd000db800200000\
             00000000000000099c400035000c658161626364",
        )
        .unwrap();
        let prohibited = "60000000003c3a14fd000db8002000000000000000000009fd002021111100000000000000020002\
                          010154400000000060000000000c1140fd0020211111000000000000000200\
                          02fd000db80020000000000000000000099c400035000c658161626364";
        assert_eq!(hex::encode(denied(Denial::Prohibited, &v6)), prohibited);
        let unreachable = denied(Denial::Unreachable, &v6);
        assert_eq!(unreachable[40..44], [1, 3, 0x54, 0x3e]);
    }

    #[test]
    fn options_are_embedded_and_long_ipv6_packets_are_cut() {
        let mut v4 = vec![0u8; 24 + 100];
        v4[0] = 0x46;
        v4[3] = 124;
        v4[9] = 132;
        assert_eq!(denied(Denial::Prohibited, &v4).len(), 20 + 8 + 24 + 8);

        let mut v6 = vec![0u8; 1280];
        v6[0] = 0x60;
        v6[4..6].copy_from_slice(&1240_u16.to_be_bytes());
        v6[6] = 132;
        let reply = denied(Denial::Prohibited, &v6);
        assert_eq!(reply.len(), 1280);
        assert_eq!(reply[48..], v6[..1232]);
    }
}
