//! What stands in front of a datagram that we send ourselves: Ethernet, IP and UDP headers.
//!
//! ```text
//!   frame  |.....|Ethernet 14|IPv4 20 or IPv6 40|UDP 8|payload ............|
//!                ^ where it begins                    ^ PAYLOAD_AT
//! ```
//!
//! The headers of one way are made once; each datagram gets its lengths, codepoint, identification and checksums. It
//! must look as the kernel's own: a checksum always, because receivers merge nothing without one, and an identification
//! that counts, because constant ones with DF make receivers build what forwarders must cut again.

use std::net::{IpAddr, SocketAddr};

use gateway_common::{
    checksum,
    frame::{ETHERNET, IPV4, IPV6, PROTOCOL_UDP, TYPE_IPV4, TYPE_IPV6, UDP},
};
use gateway_proto::Ecn;

/// Where the payload begins in a frame: behind the longest headers, aligned.
pub const PAYLOAD_AT: usize = 64;

/// The kernel's default (`net.ipv4.ip_default_ttl`, `net.ipv6.conf.*.hop_limit`).
const TTL: u8 = 64;

/// A hardware address.
pub type Mac = [u8; 6];

/// The link that a datagram leaves by, and the next machine on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hop {
    /// Index of the interface.
    pub interface: u32,
    /// Its hardware address.
    pub source: Mac,
    /// That of the next machine.
    pub destination: Mac,
    /// The longest IP packet, in bytes.
    pub mtu: usize,
}

/// The headers of all datagrams between two addresses.
#[derive(Debug, Clone)]
pub struct Way {
    hop: Hop,
    headers: [u8; PAYLOAD_AT],
    /// Where they begin.
    start: usize,
    v6: bool,
    /// Sum of what never changes of the IPv4 header, and of pseudo-header and ports.
    ip_sum: u64,
    udp_sum: u64,
    /// Of the next datagram (IPv4).
    id: u16,
}

impl Way {
    /// From `src` to `dst` over `hop`; `None` if they are of different families.
    pub fn new(hop: Hop, src: SocketAddr, dst: SocketAddr, first_id: u16) -> Option<Self> {
        let mut headers = [0; PAYLOAD_AT];
        let udp = PAYLOAD_AT - UDP;
        headers[udp..udp + 2].copy_from_slice(&src.port().to_be_bytes());
        headers[udp + 2..udp + 4].copy_from_slice(&dst.port().to_be_bytes());
        let (v6, ip, ethertype, addresses) = match (src.ip(), dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let ip = udp - IPV4;
                headers[ip] = 0x45;
                // "Don't fragment", as the sockets of the slow path.
                headers[ip + 6] = 0x40;
                headers[ip + 8] = TTL;
                headers[ip + 9] = PROTOCOL_UDP;
                headers[ip + 12..ip + 16].copy_from_slice(&src.octets());
                headers[ip + 16..ip + 20].copy_from_slice(&dst.octets());
                (false, ip, TYPE_IPV4, ip + 12..ip + 20)
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let ip = udp - IPV6;
                headers[ip] = 0x60;
                headers[ip + 6] = PROTOCOL_UDP;
                headers[ip + 7] = TTL;
                headers[ip + 8..ip + 24].copy_from_slice(&src.octets());
                headers[ip + 24..ip + 40].copy_from_slice(&dst.octets());
                (true, ip, TYPE_IPV6, ip + 8..ip + 40)
            }
            _ => return None,
        };
        let start = ip - ETHERNET;
        headers[start..start + 6].copy_from_slice(&hop.destination);
        headers[start + 6..start + 12].copy_from_slice(&hop.source);
        headers[start + 12..ip].copy_from_slice(&ethertype.to_be_bytes());
        let ip_sum = if v6 { 0 } else { checksum::sum(&headers[ip..udp]) };
        let udp_sum = checksum::pseudo_header(&headers[addresses], PROTOCOL_UDP, 0)
            + checksum::sum(&headers[udp..udp + 4]);
        Some(Self { hop, headers, start, v6, ip_sum, udp_sum, id: first_id })
    }

    /// The link.
    pub fn hop(&self) -> &Hop {
        &self.hop
    }

    /// The longest payload, in bytes.
    #[inline]
    pub fn max_payload(&self) -> usize {
        self.hop.mtu.min(usize::from(u16::MAX)).saturating_sub(if self.v6 { IPV6 + UDP } else { IPV4 + UDP })
    }

    /// Writes the headers in front of the `len` bytes of payload at [`PAYLOAD_AT`]. Where the frame begins; `None` if
    /// it would be longer than the MTU, or is not all there.
    #[inline]
    pub fn finish(&mut self, frame: &mut [u8], len: usize, ecn: Ecn) -> Option<usize> {
        if len > self.max_payload() {
            return None;
        }
        let payload_sum = checksum::sum(frame.get(PAYLOAD_AT..PAYLOAD_AT + len)?);
        let headers = frame.first_chunk_mut::<PAYLOAD_AT>()?;
        headers[self.start..].copy_from_slice(&self.headers[self.start..]);
        // Fits, by the check above.
        let udp_len = u16::try_from(UDP + len).ok()?;
        let (udp, ip) = (PAYLOAD_AT - UDP, self.start + ETHERNET);
        if self.v6 {
            // Traffic class: its low bits are in the high half of the second byte.
            headers[ip + 1] = (ecn as u8) << 4;
            headers[ip + 4..ip + 6].copy_from_slice(&udp_len.to_be_bytes());
        } else {
            let total = u16::try_from(IPV4 + UDP + len).ok()?;
            headers[ip + 1] = ecn as u8;
            headers[ip + 2..ip + 4].copy_from_slice(&total.to_be_bytes());
            headers[ip + 4..ip + 6].copy_from_slice(&self.id.to_be_bytes());
            let sum = self.ip_sum
                + checksum::word(u16::from(ecn as u8))
                + checksum::word(total)
                + checksum::word(self.id);
            headers[ip + 10..ip + 12].copy_from_slice(&checksum::finish(sum));
            self.id = self.id.wrapping_add(1);
        }
        headers[udp + 4..udp + 6].copy_from_slice(&udp_len.to_be_bytes());
        // The length is summed twice: it is in the pseudo-header, too.
        let sum = self.udp_sum + 2 * checksum::word(udp_len) + payload_sum;
        let sum = match checksum::finish(sum) {
            // "If the computed checksum is zero, it is transmitted as all ones" (RFC 768).
            [0, 0] => [0xff, 0xff],
            sum => sum,
        };
        headers[udp + 6..udp + 8].copy_from_slice(&sum);
        Some(self.start)
    }
}

#[cfg(test)]
mod tests {
    use gateway_common::frame::{Frame, parse};
    use rand::{Rng as _, RngCore as _, SeedableRng as _, rngs::SmallRng};

    use super::*;
    use crate::data::headers::Layout;

    const HOP: Hop =
        Hop { interface: 3, source: [2, 0, 0, 0, 0, 1], destination: [2, 0, 0, 0, 0, 2], mtu: 1500 };

    fn way(src: &str, dst: &str, mtu: usize) -> Option<Way> {
        Way::new(Hop { mtu, ..HOP }, src.parse().unwrap(), dst.parse().unwrap(), 0xfffe)
    }

    fn ways(mtu: usize) -> [Way; 2] {
        let v4 = way("192.0.2.1:52625", "198.51.100.7:3478", mtu).unwrap();
        let v6 = way("[2001:db8::1]:52625", "[2001:db8:ffff::7]:443", mtu).unwrap();
        [v4, v6]
    }

    #[test]
    fn every_byte_of_the_headers_is_as_it_should_be() {
        let [mut v4, mut v6] = ways(1500);
        let mut frame = vec![0xee; 2048];
        frame[PAYLOAD_AT..PAYLOAD_AT + 4].copy_from_slice(b"data");
        let start = v4.finish(&mut frame, 4, Ecn::Ect0).unwrap();
        assert_eq!(start, 22);
        let expect = "020000000002 020000000001 0800 45020020fffe40004011 ---- c0000201 c6336407 cd910d96000c ---- 64617461";
        compare(&frame[start..PAYLOAD_AT + 4], expect);
        v4.finish(&mut frame, 4, Ecn::Ce).unwrap();
        assert_eq!(frame[start + 14..][..6], [0x45, 3, 0, 32, 0xff, 0xff], "the identification counts");
        v4.finish(&mut frame, 4, Ecn::NotEct).unwrap();
        assert_eq!(frame[start + 14..][..6], [0x45, 0, 0, 32, 0, 0], "and wraps");
        let start = v6.finish(&mut frame, 4, Ecn::Ect1).unwrap();
        assert_eq!(start, 2);
        let addresses = "20010db8000000000000000000000001 20010db8ffff00000000000000000007";
        let expect =
            format!("020000000002 020000000001 86dd 60100000000c1140 {addresses} cd9101bb000c ---- 64617461");
        compare(&frame[start..PAYLOAD_AT + 4], &expect);
    }

    /// `expect` in hexadecimal; what is `-` is anything.
    fn compare(bytes: &[u8], expect: &str) {
        let expect: String = expect.split_whitespace().collect();
        let got = hex::encode(bytes);
        let differs = got.len() != expect.len()
            || got.chars().zip(expect.chars()).any(|(got, expect)| expect != '-' && got != expect);
        assert!(!differs, "\n{got}\n{expect}");
    }

    #[test]
    fn checksums_hold_and_are_never_absent_whatever_the_payload() {
        let mut rng = SmallRng::seed_from_u64(7);
        let mut frame = vec![0; 2048];
        for mut way in ways(1500) {
            for round in 0..20_000_u32 {
                let len = rng.random_range(0..=way.max_payload());
                let payload = &mut frame[PAYLOAD_AT..PAYLOAD_AT + len];
                match round % 3 {
                    0 => payload.fill(0xff),
                    1 => payload.fill(0),
                    _ => rng.fill_bytes(payload),
                }
                let ecn = Ecn::from_bits(round.to_le_bytes()[0]);
                let start = way.finish(&mut frame, len, ecn).unwrap();
                let whole = &frame[start..PAYLOAD_AT + len];
                let udp = Frame::Udp { at: PAYLOAD_AT - start, len };
                assert_eq!(parse(whole), udp);
                let packet = &whole[ETHERNET..];
                let layout = Layout::of(packet).unwrap();
                assert!(layout.checksums_hold(packet), "{}", hex::encode(packet));
                let tos = if way.v6 { packet[1] >> 4 } else { packet[1] };
                assert_eq!(tos, ecn as u8);
            }
        }
    }

    #[test]
    fn a_sum_of_zero_is_sent_as_all_ones() {
        for mut way in ways(1500) {
            let mut frame = vec![0; 2048];
            let field = PAYLOAD_AT - 2;
            way.finish(&mut frame, 2, Ecn::NotEct).unwrap();
            // With the checksum itself as payload the sum is all ones, so the checksum is zero.
            let sum = [frame[field], frame[field + 1]];
            frame[PAYLOAD_AT..PAYLOAD_AT + 2].copy_from_slice(&sum);
            let start = way.finish(&mut frame, 2, Ecn::NotEct).unwrap();
            assert_eq!(frame[field..PAYLOAD_AT], [0xff, 0xff]);
            let packet = &frame[start + ETHERNET..PAYLOAD_AT + 2];
            assert!(Layout::of(packet).unwrap().checksums_hold(packet));
        }
    }

    #[test]
    fn nothing_is_longer_than_the_mtu_or_than_the_frame() {
        for (mtu, v4, v6) in
            [(1500, 1472, 1452), (1280, 1252, 1232), (9000, 8972, 8952), (30, 2, 0), (0, 0, 0)]
        {
            for (mut way, most) in ways(mtu).into_iter().zip([v4, v6]) {
                assert_eq!(way.max_payload(), most, "MTU {mtu}");
                let mut frame = vec![0; 16_384];
                assert!(way.finish(&mut frame, most, Ecn::NotEct).is_some(), "MTU {mtu}");
                assert!(way.finish(&mut frame, most + 1, Ecn::NotEct).is_none(), "MTU {mtu}");
                assert!(way.finish(&mut frame[..PAYLOAD_AT - 1], 0, Ecn::NotEct).is_none());
                assert!(
                    most == 0 || way.finish(&mut frame[..PAYLOAD_AT + most - 1], most, Ecn::NotEct).is_none()
                );
            }
        }
    }

    #[test]
    fn families_do_not_mix() {
        assert!(way("192.0.2.1:1", "[2001:db8::1]:2", 1500).is_none());
        assert!(way("[::ffff:192.0.2.1]:1", "192.0.2.2:2", 1500).is_none());
    }
}
