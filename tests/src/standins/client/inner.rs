//! What a client reads in inner packets: destination, ICMP denials, the goodbye, ECN.
//!
//! Only as much parsing as that takes; packets themselves go to and from the TUN unchanged.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV4};

use serde::Deserialize;
use serde_json::json;
use uuid::Uuid;

/// The largest inner packet (packets.md section 1).
pub(super) const MAX_INNER: usize = 1280;

/// The goodbye packet (packets.md section 6, test-vectors.md section 7.3): IPv6 from `::` to `::`, next
/// header 0xFF, hop limit 0, eight bytes of which the first is event 2.
pub(super) const GOODBYE: [u8; 48] = {
    let mut packet = [0; 48];
    packet[0] = 0x60;
    packet[5] = 8;
    packet[6] = 0xFF;
    packet[40] = 2;
    packet
};

/// What a packet from the gateway means to the client itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Meaning {
    /// Nothing; it belongs on the TUN.
    Ordinary,
    /// A packet to this destination was refused: "administratively prohibited".
    Prohibited(IpAddr),
    /// A packet to this destination had nowhere to go.
    Unreachable(IpAddr),
    /// The gateway closed the connection.
    Goodbye,
    /// What became of a name.
    DomainStatus(DomainStatus),
    /// Another in-tunnel control event; not for the TUN.
    Control,
}

/// The answer to [`assigned_ips`] (packets.md section 6.2).
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct DomainStatus {
    pub(super) resource: Uuid,
    pub(super) domain: String,
    pub(super) status: String,
}

/// The control packet that assigns proxy addresses to a name (packets.md section 6.2).
pub(super) fn assigned_ips(resource: Uuid, domain: &str, proxies: &[IpAddr]) -> Vec<u8> {
    // In the order of test-vectors.md section 7.1.
    let json = format!(
        r#"{{"resource":{},"domain":{},"proxy_ips":{}}}"#,
        json!(resource),
        json!(domain),
        json!(proxies)
    );
    let mut packet = [&GOODBYE[..], json.as_bytes()].concat();
    let length = u16::try_from(packet.len() - 40).expect("a name has at most 253 bytes");
    packet[4..6].copy_from_slice(&length.to_be_bytes());
    packet[40] = 0;
    packet
}

/// The destination address, or `None` for what is not an IP packet.
pub(super) fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(Ipv4Addr::from(*packet.get(16..)?.first_chunk::<4>()?).into()),
        6 => Some(Ipv6Addr::from(*packet.get(24..)?.first_chunk::<16>()?).into()),
        _ => None,
    }
}

/// Looks at a packet that came out of the tunnel.
pub(super) fn meaning(packet: &[u8]) -> Meaning {
    match packet.first().map(|byte| byte >> 4) {
        Some(4) => meaning_v4(packet),
        Some(6) => meaning_v6(packet),
        _ => Meaning::Ordinary,
    }
}

fn meaning_v4(packet: &[u8]) -> Meaning {
    let header = usize::from(packet[0] & 15) * 4;
    if packet.get(9) != Some(&1) {
        return Meaning::Ordinary;
    }
    let Some(icmp) = packet.get(header..) else { return Meaning::Ordinary };
    let refused = icmp.get(8..).and_then(destination);
    match (icmp.first_chunk::<2>(), refused) {
        (Some([3, 9 | 10 | 13]), Some(refused)) => Meaning::Prohibited(refused),
        (Some([3, 0 | 1]), Some(refused)) => Meaning::Unreachable(refused),
        _ => Meaning::Ordinary,
    }
}

fn meaning_v6(packet: &[u8]) -> Meaning {
    let (Some(next), Some(body)) = (packet.get(6), packet.get(40..)) else { return Meaning::Ordinary };
    if *next == 0xFF && packet[8..40].iter().all(|byte| *byte == 0) && body.len() >= 8 {
        let status = || serde_json::from_slice(&body[8..]).ok();
        return match body[0] {
            1 => status().map_or(Meaning::Control, Meaning::DomainStatus),
            2 => Meaning::Goodbye,
            _ => Meaning::Control,
        };
    }
    if *next != 58 {
        return Meaning::Ordinary;
    }
    let refused = body.get(8..).and_then(destination);
    match (body.first_chunk::<2>(), refused) {
        (Some([1, 1]), Some(refused)) => Meaning::Prohibited(refused),
        (Some([1, 0 | 3]), Some(refused)) => Meaning::Unreachable(refused),
        _ => Meaning::Ordinary,
    }
}

/// An ICMP echo request of 32 bytes in an IPv4 packet.
pub(super) fn echo_request(source: Ipv4Addr, destination: Ipv4Addr) -> [u8; 52] {
    let mut packet = [0x5a; 52];
    packet[..28].copy_from_slice(&[
        0x45, 0, 0, 52, 0, 0, 0, 0, 64, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // IPv4
        8, 0, 0, 0, 0xc0, 0x0d, 0, 0, // echo request, an identifier, a sequence number
    ]);
    packet[12..16].copy_from_slice(&source.octets());
    packet[16..20].copy_from_slice(&destination.octets());
    fix_v4_checksum(&mut packet);
    let words = packet[20..].chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])));
    let sum = !fold(words.sum());
    packet[22..24].copy_from_slice(&sum.to_be_bytes());
    packet
}

/// A UDP datagram in an IPv4 packet that may not be fragmented, with both checksums.
///
/// # Panics
/// If it is longer than 65535 bytes.
pub(super) fn udp_datagram(source: SocketAddrV4, destination: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let length = |bytes: usize| u16::try_from(bytes).expect("an IPv4 packet").to_be_bytes();
    let bytes = payload.len();
    let mut packet = [&[0; 28], payload].concat();
    packet[..20].copy_from_slice(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    packet[2..4].copy_from_slice(&length(28 + bytes));
    packet[12..16].copy_from_slice(&source.ip().octets());
    packet[16..20].copy_from_slice(&destination.ip().octets());
    packet[20..22].copy_from_slice(&source.port().to_be_bytes());
    packet[22..24].copy_from_slice(&destination.port().to_be_bytes());
    packet[24..26].copy_from_slice(&length(8 + bytes));
    fix_v4_checksum(&mut packet);
    // RFC 768: over addresses, protocol, length, and the datagram.
    let word = |w: &[u8]| u32::from(w[0]) << 8 | w.get(1).map_or(0, |low| u32::from(*low));
    let sum: u32 = packet[12..].chunks(2).map(word).sum::<u32>() + 17 + word(&packet[24..26]);
    let checksum = match !fold(sum) {
        0 => u16::MAX,
        checksum => checksum,
    };
    packet[26..28].copy_from_slice(&checksum.to_be_bytes());
    packet
}

/// The ECN bits of an IP packet.
pub(super) fn ecn(packet: &[u8]) -> u8 {
    match packet {
        [first, tos, ..] if first >> 4 == 4 => tos & 3,
        [first, second, ..] if first >> 4 == 6 => (u16::from_be_bytes([*first, *second]) >> 4 & 3) as u8,
        _ => 0,
    }
}

/// Copies CE of the outer header onto an ECN-capable packet (connections.md section 11).
pub(super) fn mark_congestion(packet: &mut [u8]) {
    if !matches!(ecn(packet), 1 | 2) {
        return;
    }
    match packet[0] >> 4 {
        4 => {
            packet[1] |= 3;
            fix_v4_checksum(packet);
        }
        _ => packet[1] |= 0x30,
    }
}

/// Where the kernel left a UDP checksum to its device, tun-rs 2.8.16 completes it without the exception for a sum of zero, which
/// is spelled as ones (RFC 768): zero means "none", and over IPv6 the receiver refuses that (RFC 8200 section 8.1).
///
/// Over IPv4 a sender may leave the checksum out, so nothing is to be done there.
pub(super) fn spell_zero(packet: &mut [u8]) {
    if packet.len() >= 48 && packet[0] >> 4 == 6 && packet[6] == 17 && packet[46..48] == [0, 0] {
        packet[46..48].fill(0xff);
    }
}

/// Gives an IPv4 packet another source, repairing header and transport checksums (RFC 1624, equation 3).
pub(super) fn set_source(packet: &mut [u8], source: Ipv4Addr) {
    if packet.len() < 20 || packet[0] >> 4 != 4 {
        return;
    }
    let old = [packet[12], packet[13], packet[14], packet[15]];
    packet[12..16].copy_from_slice(&source.octets());
    fix_v4_checksum(packet);
    let header = usize::from(packet[0] & 15) * 4;
    let at = match packet[9] {
        6 => header + 16,
        17 => header + 6,
        _ => return,
    };
    let Some(field) = packet.get_mut(at..at + 2) else { return };
    let stored = u16::from_be_bytes([field[0], field[1]]);
    if stored == 0 && packet[9] == 17 {
        return;
    }
    let words = |octets: [u8; 4]| {
        u32::from(u16::from_be_bytes([octets[0], octets[1]]))
            + u32::from(u16::from_be_bytes([octets[2], octets[3]]))
    };
    let negated_old = 0x1_FFFE - words(old);
    let sum = fold(u32::from(!stored) + negated_old + words(source.octets()));
    let checksum = match !sum {
        0 if packet[9] == 17 => u16::MAX,
        checksum => checksum,
    };
    packet[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
}

fn fix_v4_checksum(packet: &mut [u8]) {
    let header = (usize::from(packet[0] & 15) * 4).min(packet.len());
    if header < 20 {
        return;
    }
    packet[10..12].fill(0);
    let sum = packet[..header].chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    let sum = !fold(sum);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    u16::try_from(sum).expect("folded to 16 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_goodbye_is_vector_7_3() {
        let vector = "600000000008ff00000000000000000000000000000000000000000000000000\
                      00000000000000000200000000000000";
        assert_eq!(hex::encode(GOODBYE), vector);
        assert_eq!(meaning(&GOODBYE), Meaning::Goodbye);
    }

    #[test]
    fn names_are_vectors_7_1_and_7_2() {
        let resource = "2b6f3f0e-7a53-4d0b-9a4f-2f1f5d1f9a10".parse().unwrap();
        let v4 = (1..=4).map(|n| Ipv4Addr::new(100, 96, 0, n).into());
        let v6 = (0..4).map(|n| Ipv6Addr::new(0xfd00, 0x2021, 0x1111, 0x8000, 0, 0, 0, n).into());
        let packet = assigned_ips(resource, "git.example.net", &v4.chain(v6).collect::<Vec<IpAddr>>());
        assert_eq!((packet.len(), &packet[4..8]), (291, &[0, 0xfb, 0xff, 0][..]));
        let head = r#"{"resource":"2b6f3f0e-7a53-4d0b-9a4f-2f1f5d1f9a10","domain":"git.example.net","#;
        let ips = r#""proxy_ips":["100.96.0.1","100.96.0.2","100.96.0.3","100.96.0.4","fd00:2021:1111:8000::","fd00:2021:1111:8000::1","fd00:2021:1111:8000::2","fd00:2021:1111:8000::3"]}"#;
        assert_eq!(std::str::from_utf8(&packet[48..]).unwrap(), format!("{head}{ips}"));
        assert_eq!(meaning(&packet), Meaning::Control);

        let json = format!(r#"{head}"status":"Active"}}"#);
        let mut answer = [&GOODBYE[..], json.as_bytes()].concat();
        answer[40] = 1;
        let expect = DomainStatus { resource, domain: "git.example.net".into(), status: "Active".into() };
        assert_eq!(meaning(&answer), Meaning::DomainStatus(expect));
        assert_eq!(meaning(&answer[..100]), Meaning::Control, "cut");
    }

    #[test]
    fn denials_of_vector_8_are_recognised() {
        let v4 = "45000038000000001401364f0a2c000964400202030d324e0000000045000020\
                  123440004011b822644002020a2c00099c400035000c2e23";
        assert_eq!(meaning(&hex::decode(v4).unwrap()), Meaning::Prohibited("10.44.0.9".parse().unwrap()));
        let unreachable = v4.replace("030d324e", "0300325b");
        assert_eq!(
            meaning(&hex::decode(unreachable).unwrap()),
            Meaning::Unreachable("10.44.0.9".parse().unwrap())
        );
        let v6 = "60000000003c3a14fd000db8002000000000000000000009fd00202111110000\
                  0000000000020002010154400000000060000000000c1140fd00202111110000\
                  0000000000020002fd000db80020000000000000000000099c400035000c6581\
                  61626364";
        assert_eq!(
            meaning(&hex::decode(v6).unwrap()),
            Meaning::Prohibited("fd00:db8:20::9".parse().unwrap())
        );
    }

    #[test]
    fn a_datagram_is_vector_8_s() {
        let (source, to) = ("100.64.2.2:40000".parse().unwrap(), "10.44.0.9:53".parse().unwrap());
        let mut packet = udp_datagram(source, to, b"abcd");
        // The vector has an identification.
        packet[4..6].copy_from_slice(&[0x12, 0x34]);
        fix_v4_checksum(&mut packet);
        assert_eq!(hex::encode(packet), "45000020123440004011b822644002020a2c00099c400035000c2e2361626364");
    }

    #[test]
    fn a_changed_source_keeps_checksums_right() {
        // Vector 8's UDP packet from 100.64.2.2.
        let mut packet =
            hex::decode("45000020123440004011b822644002020a2c00099c400035000c2e2361626364").unwrap();
        let original = packet.clone();
        set_source(&mut packet, Ipv4Addr::new(100, 64, 9, 9));
        assert_ne!(packet, original);
        assert_eq!(udp_sum(&packet), 0xFFFF);
        set_source(&mut packet, Ipv4Addr::new(100, 64, 2, 2));
        assert_eq!(packet, original);
    }

    #[test]
    fn a_changed_source_never_makes_a_udp_checksum_none() {
        for last in 0..=u16::MAX {
            let mut packet =
                hex::decode("45000020123440004011b822644002020a2c00099c400035000c2e2361626364").unwrap();
            let [high, low] = last.to_be_bytes();
            set_source(&mut packet, Ipv4Addr::new(100, 64, high, low));
            assert_ne!(packet[26..28], [0, 0], "{last:04x}");
        }
    }

    #[test]
    fn a_zero_is_spelled_as_ones_in_udp_over_ipv6_only() {
        // UDP over IPv6, TCP over IPv6, UDP over IPv4; cut before the checksum's end.
        for (first, protocol, length, expect) in
            [(0x60, 17, 48, true), (0x60, 6, 48, false), (0x45, 17, 48, false), (0x60, 17, 47, false)]
        {
            let mut packet = [&[first, 0, 0, 0, 0, 8, protocol][..], &[1; 39], &[0, 0]].concat();
            packet.truncate(length);
            let before = packet.clone();
            spell_zero(&mut packet);
            assert_eq!(packet != before, expect, "{first:02x}, {protocol}, {length}");
            assert_eq!(packet.ends_with(&[0xff, 0xff]), expect);
        }
    }

    #[test]
    fn an_echo_request_has_good_checksums() {
        let packet = echo_request(Ipv4Addr::new(100, 64, 2, 101), Ipv4Addr::new(172, 20, 0, 100));
        let sum = |bytes: &[u8]| {
            fold(bytes.chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum())
        };
        assert_eq!((sum(&packet[..20]), sum(&packet[20..])), (0xFFFF, 0xFFFF));
        assert_eq!(destination(&packet), Some(Ipv4Addr::new(172, 20, 0, 100).into()));
    }

    fn udp_sum(packet: &[u8]) -> u16 {
        let words: u32 = packet[12..].chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
        fold(words + 17 + u32::try_from(packet.len() - 20).unwrap())
    }

    #[test]
    fn congestion_is_marked_only_on_capable_packets() {
        let not_capable =
            hex::decode("45000020123440004011b822644002020a2c00099c400035000c2e2361626364").unwrap();
        let mut packet = not_capable.clone();
        mark_congestion(&mut packet);
        assert_eq!(packet, not_capable);
        packet[1] = 2;
        mark_congestion(&mut packet);
        assert_eq!(ecn(&packet), 3);
    }

    #[test]
    fn truncated_packets_mean_nothing_and_do_not_panic() {
        let v6 = hex::decode(
            "60000000003c3a14fd000db8002000000000000000000009fd002021111100000000000000020002010154400000",
        )
        .unwrap();
        for length in 0..v6.len() {
            assert_eq!(meaning(&v6[..length]), Meaning::Ordinary);
            let _ = (destination(&v6[..length]), ecn(&v6[..length]));
        }
    }
}
