//! Every rule of packets.md sections 5.2 to 5.5 by itself.

#![expect(clippy::disallowed_methods, reason = "tests need some instant to count from")]

use std::time::Duration;

use super::{
    packets::{Packet, Sum, error, transport_sum},
    *,
};
use crate::worker::inner::view;

const CLIENT: [&str; 2] = ["100.64.2.2", "fd00:2021:1111::2"];
const PROXY: [&str; 2] = ["100.96.0.1", "fd00:2021:1111:8000::1"];
const OTHER_PROXY: [&str; 2] = ["100.96.0.2", "fd00:2021:1111:8000::2"];
const REAL: [&str; 2] = ["172.20.0.100", "2001:db8::100"];

/// A table, a clock, and one family.
struct Bench {
    nat: Nat,
    start: Instant,
    now: Instant,
    family: usize,
}

impl Bench {
    fn new(family: usize, limits: Limits) -> Self {
        let now = Instant::now();
        Self { nat: Nat::new(1, limits, now), start: now, now, family }
    }

    fn ip(&self, names: [&str; 2]) -> IpAddr {
        names[self.family].parse().unwrap()
    }

    /// The outside port of a packet from the client.
    fn out(&mut self, kind: Kind, port: u16, proxy: [&str; 2], flags: u8) -> Result<u16, NatRefusal> {
        let ends = ((self.ip(CLIENT), port), (self.ip(proxy), 443));
        let packet = Packet { flags, ..Packet::new(kind, ends.0, ends.1) };
        let mut bytes = packet.bytes();
        let mut seen = view(&bytes).unwrap();
        let outside = match self.nat.outbound(&mut bytes, &mut seen, self.ip(REAL), self.now) {
            Ok(outside) => outside,
            Err(refusal) => {
                assert_eq!(bytes, packet.bytes(), "a refused packet is unchanged");
                return Err(refusal);
            }
        };
        let src = (ends.0.0, outside.port()).into();
        let expect = Packet { src, dst: (self.ip(REAL), 443).into(), ..packet };
        assert_eq!(hex::encode(&bytes), hex::encode(expect.bytes()));
        assert_eq!(seen, view(&bytes).unwrap());
        Ok(outside.port())
    }

    /// What becomes of a packet to an outside port.
    fn back(&mut self, kind: Kind, port: u16, flags: u8) -> Inbound {
        let ends = ((self.ip(REAL), 443), (self.ip(CLIENT), port));
        let mut bytes = Packet { flags, outbound: false, ..Packet::new(kind, ends.0, ends.1) }.bytes();
        let mut seen = view(&bytes).unwrap();
        self.nat.inbound(&mut bytes, &mut seen, self.now)
    }

    fn sleep(&mut self, ms: u64) {
        self.now += Duration::from_millis(ms);
        self.nat.handle_timeout(self.now);
    }
}

const SYN: u8 = 2;
const FIN: u8 = 0x11;
const RST: u8 = 4;
const ACK: u8 = 0x10;
const KINDS: [Kind; 3] = Kind::ALL;

#[test]
fn the_test_vectors_come_out_byte_for_byte() {
    let vectors = [
        "450000201234400040115df664400202646000019c400035000cd3f661626364",
        "4500002012344000401115df64400202ac1400649c400035000c8bdf61626364",
        "4500002012344000401115df64400202ac1400649c410035000c8bde61626364",
    ]
    .map(|hex| hex::decode(hex).unwrap());
    let real = REAL[0].parse().unwrap();
    for taken in [false, true] {
        let mut bench = Bench::new(0, Limits::default());
        if taken {
            bench.out(Kind::Udp, 40_000, OTHER_PROXY, 0).unwrap();
        }
        let mut packet = vectors[0].clone();
        let mut seen = view(&packet).unwrap();
        let outside = bench.nat.outbound(&mut packet, &mut seen, real, bench.now).unwrap();
        assert_eq!(outside, Outside::new(Kind::Udp, 40_000 + u16::from(taken), real));
        assert_eq!(hex::encode(&packet), hex::encode(&vectors[1 + usize::from(taken)]));
        assert_eq!(seen, view(&packet).unwrap());
    }
}

#[test]
fn every_kind_of_either_family_goes_there_and_back_with_right_checksums() {
    // Over payloads of all values, UDP's sum is once 0.
    let mut zeros = 0;
    for family in 0..2 {
        for kind in KINDS {
            let mut bench = Bench::new(family, Limits::default());
            // Another session has the port: the answer's is to be changed, too.
            bench.out(kind, 5000, OTHER_PROXY, SYN).unwrap();
            assert_eq!(bench.out(kind, 5000, PROXY, SYN), Ok(5001));
            let [client, proxy, real] = [CLIENT, PROXY, REAL].map(|names| bench.ip(names));
            for payload in (0..=u16::MAX).step_by(if kind == Kind::Udp { 1 } else { 97 }) {
                let there = Packet { payload, ..Packet::new(kind, (client, 5000), (proxy, 443)) };
                let mut bytes = there.bytes();
                let mut seen = view(&bytes).unwrap();
                bench.nat.outbound(&mut bytes, &mut seen, real, bench.now).unwrap();
                let src = (client, 5001).into();
                assert_eq!(bytes, Packet { src, dst: (real, 443).into(), ..there }.bytes(), "{there:?}");
                if kind == Kind::Udp {
                    zeros += u32::from(bytes[seen.transport_at + 6..][..2] == [0xff; 2]);
                }

                let back = Packet::new(kind, (real, 443), (client, 5001));
                let back = Packet { payload, outbound: false, ..back };
                let mut bytes = back.bytes();
                let mut seen = view(&bytes).unwrap();
                let outside = Outside::new(kind, 5001, real);
                assert_eq!(bench.nat.inbound(&mut bytes, &mut seen, bench.now), Inbound::Rewritten(outside));
                let dst = (client, 5000).into();
                assert_eq!(bytes, Packet { src: (proxy, 443).into(), dst, ..back }.bytes(), "{back:?}");
                assert_eq!(seen, view(&bytes).unwrap());
            }
        }
    }
    assert!(zeros >= 2, "a sum of 0 was met in both families: {zeros}");
}

#[test]
fn udp_without_a_checksum_stays_so_in_ipv4_and_gets_one_in_ipv6() {
    for family in 0..2 {
        let mut bench = Bench::new(family, Limits::default());
        let [client, proxy, real] = [CLIENT, PROXY, REAL].map(|names| bench.ip(names));
        for outbound in [true, false] {
            let (src, dst) = if outbound { (client, proxy) } else { (real, client) };
            let packet = Packet::new(Kind::Udp, (src, 7), (dst, 7));
            let mut bytes = Packet { sum: Sum::None, ..packet }.bytes();
            let mut seen = view(&bytes).unwrap();
            if outbound {
                bench.nat.outbound(&mut bytes, &mut seen, real, bench.now).unwrap();
            } else {
                bench.nat.inbound(&mut bytes, &mut seen, bench.now);
            }
            let (src, dst) = if outbound { (client, real) } else { (proxy, client) };
            let sum = [Sum::None, Sum::Right][family];
            assert_eq!(bytes, Packet { sum, src: (src, 7).into(), dst: (dst, 7).into(), ..packet }.bytes());
        }
    }
}

#[test]
fn a_wrong_checksum_stays_wrong() {
    for family in 0..2 {
        for (kind, at, protocol) in [(Kind::Tcp, 16, 6), (Kind::Udp, 6, 17), (Kind::Echo, 2, [1, 58][family])]
        {
            let mut bench = Bench::new(family, Limits::default());
            let [client, proxy, real] = [CLIENT, PROXY, REAL].map(|names| bench.ip(names));
            let mut bytes = Packet::new(kind, (client, 7), (proxy, 7)).bytes();
            let mut seen = view(&bytes).unwrap();
            bytes[seen.transport_at + at] ^= 0x55;
            bench.nat.outbound(&mut bytes, &mut seen, real, bench.now).unwrap();
            assert_ne!(transport_sum(&bytes, seen.transport_at, protocol), 0, "{kind:?} {family}");
        }
    }
}

#[test]
fn what_cannot_be_translated_is_refused_and_unchanged() {
    let mut bench = Bench::new(0, Limits::default());
    let gre = packets::header(bench.ip(CLIENT), bench.ip(PROXY), 47, 0);
    let redirect = {
        let mut packet = packets::header(bench.ip(CLIENT), bench.ip(PROXY), 1, 8);
        packet.extend([5, 0, 0, 0, 0, 0, 0, 0]);
        packet
    };
    for packet in [gre, redirect] {
        let (mut bytes, real) = (packet.clone(), bench.ip(REAL));
        let mut seen = view(&bytes).unwrap();
        let refused = bench.nat.outbound(&mut bytes, &mut seen, real, bench.now);
        assert_eq!((refused, &bytes), (Err(NatRefusal::Unsupported), &packet));
        assert_eq!(bench.nat.inbound(&mut bytes, &mut seen, bench.now), Inbound::Miss);
    }
    let mut bytes = Packet::new(Kind::Tcp, (bench.ip(CLIENT), 7), (bench.ip(PROXY), 7)).bytes();
    let mut seen = view(&bytes).unwrap();
    let refused = bench.nat.outbound(&mut bytes, &mut seen, REAL[1].parse().unwrap(), bench.now);
    assert_eq!((refused, bench.nat.sessions()), (Err(NatRefusal::OtherFamily), 0));
}

#[test]
fn a_session_keeps_its_real_address_and_kinds_do_not_share_ports() {
    let mut bench = Bench::new(0, Limits::default());
    for kind in KINDS {
        assert_eq!(bench.out(kind, 7, PROXY, SYN), Ok(7));
    }
    let mut bytes = Packet::new(Kind::Udp, (bench.ip(CLIENT), 7), (bench.ip(PROXY), 53)).bytes();
    let mut seen = view(&bytes).unwrap();
    bench.nat.outbound(&mut bytes, &mut seen, "172.20.0.200".parse().unwrap(), bench.now).unwrap();
    assert_eq!(seen.dst, bench.ip(REAL));
    assert_eq!(bench.nat.sessions(), 3, "the destination port is no part of the key");
}

/// Milliseconds that pass, whether the packet is outbound, its TCP flags.
type Step = (u64, bool, u8);

/// A session of `kind` with these packets, then silence: how many milliseconds until it ends.
fn lifetime(kind: Kind, packets: &[Step]) -> u64 {
    let mut bench = Bench::new(0, Limits::default());
    for (ms, outbound, flags) in packets {
        bench.sleep(*ms);
        if *outbound {
            assert_eq!(bench.out(kind, 7, PROXY, *flags), Ok(7));
        } else {
            assert!(matches!(bench.back(kind, 7, *flags), Inbound::Rewritten(_)));
        }
    }
    let last = bench.now;
    while bench.nat.sessions() > 0 {
        let next = bench.nat.poll_timeout().expect("a session has a deadline");
        assert!(next > bench.now);
        // Just before, nothing happens.
        bench.nat.handle_timeout(next - Duration::from_millis(1));
        assert_eq!(bench.nat.sessions(), 1);
        bench.now = next;
        bench.nat.handle_timeout(next);
    }
    assert_eq!(bench.back(kind, 7, ACK), Inbound::Expired);
    u64::try_from((bench.now - last).as_millis()).unwrap()
}

#[test]
fn lifetimes_are_those_of_section_5_3() {
    const TCP: u64 = 7_440_000;
    let out = |flags| (0, true, flags);
    let back = |flags| (0, false, flags);
    let cases: &[(&str, Kind, &[Step], u64)] = &[
        ("no answer, TCP", Kind::Tcp, &[out(SYN)], 60_000),
        ("no answer, UDP", Kind::Udp, &[out(0)], 60_000),
        ("no answer, echo", Kind::Echo, &[out(0)], 60_000),
        ("no answer, counted from the last", Kind::Udp, &[out(0), (50_000, true, 0)], 60_000),
        ("answered TCP", Kind::Tcp, &[out(SYN), back(SYN | ACK)], TCP),
        ("answered UDP", Kind::Udp, &[out(0), back(0)], 120_000),
        ("answered echo", Kind::Echo, &[out(0), back(0)], 120_000),
        ("the last of either direction", Kind::Udp, &[out(0), back(0), (90_000, true, 0)], 120_000),
        ("the last of the other", Kind::Udp, &[out(0), (50_000, false, 0), (119_000, false, 0)], 120_000),
        ("one FIN", Kind::Tcp, &[out(SYN), back(ACK), out(FIN)], TCP),
        ("two FINs of one side", Kind::Tcp, &[out(SYN), back(ACK), out(FIN), out(FIN)], TCP),
        ("both FINs", Kind::Tcp, &[out(SYN), back(FIN), out(FIN)], 5000),
        ("both FINs, the last packet later", Kind::Tcp, &[out(FIN), back(FIN), (3000, true, ACK)], 5000),
        ("RST of the client", Kind::Tcp, &[out(SYN), back(ACK), (0, true, RST)], 1000),
        ("RST of the resource", Kind::Tcp, &[out(SYN), (300, false, RST | ACK)], 700),
        ("RST, and more", Kind::Tcp, &[out(RST), (500, false, ACK), (400, true, ACK)], 100),
        ("the first of several RSTs", Kind::Tcp, &[out(RST), (999, false, RST)], 1),
        ("UDP has no flags", Kind::Udp, &[out(RST), back(RST)], 120_000),
        ("SYN after RST", Kind::Tcp, &[out(ACK), back(ACK), out(RST), out(SYN)], 60_000),
        ("SYN after both FINs", Kind::Tcp, &[out(FIN), back(FIN), (2000, true, SYN), back(SYN | ACK)], TCP),
        ("SYN ACK after RST", Kind::Tcp, &[out(SYN), back(RST), back(SYN | ACK)], 1000),
        ("a resource's SYN after RST", Kind::Tcp, &[out(SYN), out(RST), back(SYN)], 1000),
    ];
    for (name, kind, packets, expect) in cases {
        let mut packets = packets.to_vec();
        // Not at 0, so that a tick has something before it.
        packets[0].0 = 10_000;
        assert_eq!(lifetime(*kind, &packets), *expect, "{name}");
    }
}

#[test]
fn ended_sessions_are_remembered_for_a_time_and_up_to_a_number() {
    let mut bench = Bench::new(1, Limits { expired: 3, ..Limits::default() });
    for port in 1..=4 {
        bench.out(Kind::Tcp, port, PROXY, RST).unwrap();
        bench.sleep(1000);
    }
    assert_eq!((bench.nat.sessions(), bench.nat.expired()), (0, 3));
    assert_eq!(bench.back(Kind::Tcp, 1, ACK), Inbound::Miss, "the oldest is forgotten");
    assert_eq!(bench.back(Kind::Tcp, 2, ACK), Inbound::Expired);
    assert_eq!(bench.back(Kind::Udp, 2, ACK), Inbound::Miss, "another kind");
    bench.out(Kind::Tcp, 3, PROXY, SYN).unwrap();
    assert!(matches!(bench.back(Kind::Tcp, 3, ACK), Inbound::Rewritten(_)), "used again");

    // The last of them ended just now.
    let ended = bench.now;
    bench.now = ended + EXPIRED_FOR - Duration::from_millis(1);
    assert_eq!(bench.back(Kind::Tcp, 4, ACK), Inbound::Expired);
    bench.now = ended + EXPIRED_FOR;
    assert_eq!(bench.back(Kind::Tcp, 4, ACK), Inbound::Miss);
    bench.sleep(0);
    assert_eq!(bench.nat.expired(), 0);
}

#[test]
fn a_full_table_ends_who_has_waited_longest_for_an_answer() {
    let mut bench = Bench::new(0, Limits { sessions: 3, ..Limits::default() });
    for port in 1..=3 {
        bench.out(Kind::Udp, port, PROXY, 0).unwrap();
        bench.sleep(1);
    }
    assert!(matches!(bench.back(Kind::Udp, 1, 0), Inbound::Rewritten(_)));
    bench.out(Kind::Udp, 2, PROXY, 0).unwrap();
    assert_eq!(bench.out(Kind::Udp, 4, PROXY, 0), Ok(4));
    assert_eq!(bench.back(Kind::Udp, 2, 0), Inbound::Expired, "2 is the oldest of those without an answer");
    for port in [3, 4] {
        assert!(matches!(bench.back(Kind::Udp, port, 0), Inbound::Rewritten(_)));
    }
    assert_eq!(bench.out(Kind::Udp, 5, PROXY, 0), Err(NatRefusal::Full));
    assert_eq!(bench.out(Kind::Udp, 3, PROXY, 0), Ok(3), "who has a session keeps it");
    assert_eq!(bench.nat.sessions(), 3);
}

#[test]
fn exhaustion_is_per_kind_and_address_and_ends() {
    let mut bench = Bench::new(0, Limits { ports: 10..=12, ..Limits::default() });
    assert_eq!(bench.out(Kind::Tcp, 11, PROXY, SYN), Ok(11));
    assert_eq!(bench.out(Kind::Tcp, 11, OTHER_PROXY, SYN), Ok(12));
    assert_eq!(bench.out(Kind::Tcp, 12, PROXY, SYN), Ok(10), "from the start again");
    assert_eq!(bench.out(Kind::Tcp, 10, PROXY, SYN), Err(NatRefusal::Exhausted));
    assert_eq!(bench.out(Kind::Udp, 10, PROXY, SYN), Ok(10));
    bench.sleep(60_000);
    assert_eq!(bench.out(Kind::Tcp, 10, PROXY, SYN), Ok(10));
}

#[test]
fn a_cleared_table_knows_nothing_and_goes_on() {
    let mut bench = Bench::new(0, Limits::default());
    bench.out(Kind::Tcp, 1, PROXY, RST).unwrap();
    bench.sleep(5000);
    bench.out(Kind::Tcp, 2, PROXY, SYN).unwrap();
    bench.nat.clear();
    assert_eq!((bench.nat.sessions(), bench.nat.expired(), bench.nat.poll_timeout()), (0, 0, None));
    for port in [1, 2] {
        assert_eq!(bench.back(Kind::Tcp, port, ACK), Inbound::Miss);
        assert_eq!(bench.out(Kind::Tcp, port, PROXY, SYN), Ok(port));
    }
    assert_eq!(bench.nat.poll_timeout(), Some(bench.start + Duration::from_secs(65)));
}

#[test]
fn a_wave_of_sessions_ends_and_gives_its_memory_back() {
    let mut bench = Bench::new(0, Limits::default());
    for port in 0..=u16::MAX {
        assert_eq!(bench.out(Kind::Udp, port, PROXY, 0), Ok(port));
    }
    assert_eq!(bench.out(Kind::Udp, 9, OTHER_PROXY, 0), Err(NatRefusal::Exhausted));
    bench.sleep(60_000);
    // Not all in one go: the first call leaves some, and asks for the next at once.
    let (mut calls, mut left) = (1, bench.nat.sessions());
    while bench.nat.poll_timeout().is_some_and(|next| next <= bench.now) {
        bench.sleep(0);
        assert!(left - bench.nat.sessions() <= 256);
        (calls, left) = (calls + 1, bench.nat.sessions());
        // What is still there is used as before.
        if calls == 10 {
            let mut ports = 0..=u16::MAX;
            assert!(ports.any(|port| matches!(bench.back(Kind::Udp, port, 0), Inbound::Rewritten(_))));
        }
    }
    assert_eq!((calls, bench.nat.sessions(), bench.nat.expired()), (256, 1, Limits::default().expired));
    bench.sleep(120_000);
    assert_eq!(bench.nat.sessions(), 0);
    assert_eq!(bench.out(Kind::Udp, 9, OTHER_PROXY, 0), Ok(9));
}

/// Lets an error about a session's packet arrive: the outside port is 5001, the client's 5000.
fn arrive(
    kind: Kind,
    family: usize,
    sum: Sum,
    arrives: impl Fn(&[u8]) -> Vec<u8>,
) -> (Inbound, Vec<u8>, Vec<u8>) {
    let mut bench = Bench::new(family, Limits::default());
    bench.out(kind, 5000, OTHER_PROXY, SYN).unwrap();
    assert_eq!(bench.out(kind, 5000, PROXY, SYN), Ok(5001));
    let [client, proxy, real] = [CLIENT, PROXY, REAL].map(|names| bench.ip(names));
    let sent = Packet { sum, ..Packet::new(kind, (client, 5000), (proxy, 443)) };
    let left = Packet { src: (client, 5001).into(), dst: (real, 443).into(), ..sent };
    let mut bytes = arrives(&left.bytes());
    let mut seen = view(&bytes).unwrap();
    let became = bench.nat.inbound_error(&mut bytes, &mut seen, bench.now);
    assert_eq!(seen, view(&bytes).unwrap());
    (became, bytes, sent.bytes())
}

const ROUTER: [&str; 2] = ["10.9.9.9", "2001:db8:9::9"];

#[test]
fn errors_are_about_the_packet_that_the_client_sent() {
    // Head as it arrives, head as the client gets it.
    let heads: [&[([u8; 6], [u8; 6])]; 2] = [
        &[
            ([3, 3, 0, 0, 0, 0], [3, 3, 0, 0, 0, 0]),
            ([3, 13, 0, 0, 0, 0], [3, 13, 0, 0, 0, 0]),
            ([11, 0, 0, 0, 0, 0], [11, 0, 0, 0, 0, 0]),
            ([3, 4, 0, 0, 0, 0], [3, 4, 0, 0, 0, 0]),
            ([3, 4, 0, 0, 2, 64], [3, 4, 0, 0, 2, 64]),
            ([3, 4, 0, 0, 5, 0], [3, 4, 0, 0, 5, 0]),
            ([3, 4, 0, 0, 5, 1], [3, 4, 0, 0, 5, 0]),
            ([3, 4, 0, 0, 5, 220], [3, 4, 0, 0, 5, 0]),
        ],
        &[
            ([1, 4, 0, 0, 0, 0], [1, 4, 0, 0, 0, 0]),
            ([3, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0]),
            ([2, 0, 0, 0, 5, 0], [2, 0, 0, 0, 5, 0]),
            ([2, 0, 0, 0, 5, 220], [2, 0, 0, 0, 5, 0]),
            ([2, 0, 1, 0, 0, 0], [2, 0, 0, 0, 5, 0]),
        ],
    ];
    for family in 0..2 {
        let at = [24, 48][family];
        let ip = |names: [&str; 2]| names[family].parse::<IpAddr>().unwrap();
        for kind in KINDS {
            // From the four bytes of ports, or the eight of an echo, to the whole packet.
            let least = at + if kind == Kind::Echo { 8 } else { 4 };
            let whole = Packet::new(kind, (ip(CLIENT), 1), (ip(REAL), 1)).bytes().len();
            let half = at + [17, 7, 3][kind as usize];
            // Half a checksum cannot be repaired.
            for cut in (least..=whole).filter(|cut| *cut != half) {
                for (head, expect_head) in heads[family] {
                    let arrives = |left: &[u8]| error(ip(ROUTER), ip(CLIENT), 3, *head, &left[..cut]);
                    let (became, bytes, sent) = arrive(kind, family, Sum::Right, arrives);
                    assert_eq!(became, Inbound::Rewritten(Outside::new(kind, 5001, ip(REAL))));
                    let expect = error(ip(PROXY), ip(CLIENT), 20, *expect_head, &sent[..cut]);
                    let name = format!("{kind:?}, family {family}, {cut} bytes, {head:?}");
                    assert_eq!(hex::encode(bytes), hex::encode(expect), "{name}");
                }
            }
        }
    }
}

#[test]
fn an_embedded_udp_checksum_of_0_stays() {
    for family in 0..2 {
        let ip = |names: [&str; 2]| names[family].parse::<IpAddr>().unwrap();
        let head = [[3, 3, 0, 0, 0, 0], [1, 4, 0, 0, 0, 0]][family];
        let arrives = |left: &[u8]| error(ip(ROUTER), ip(CLIENT), 3, head, left);
        let (_, bytes, sent) = arrive(Kind::Udp, family, Sum::None, arrives);
        assert_eq!(hex::encode(bytes), hex::encode(error(ip(PROXY), ip(CLIENT), 20, head, &sent)));
    }
}

#[test]
fn an_extension_behind_a_short_datagram_is_not_mistaken_for_its_checksum() {
    // RFC 4884: 32 bytes (8 words) of the packet, then something else.
    let [router, client, proxy] = [ROUTER, CLIENT, PROXY].map(|ip| ip[0].parse::<IpAddr>().unwrap());
    let head = [11, 0, 0, 8, 0, 0];
    let with = |datagram: &[u8]| [&datagram[..32], &[0x20, 0, 1, 2, 0, 8, 1, 1, 9, 9, 9, 9][..]].concat();
    let arrives = |left: &[u8]| error(router, client, 3, head, &with(left));
    let (_, bytes, sent) = arrive(Kind::Tcp, 0, Sum::Right, arrives);
    assert_eq!(hex::encode(bytes), hex::encode(error(proxy, client, 20, head, &with(&sent))));
    // The same over IPv6, in words of 8 bytes.
    let [router, client, proxy] = [ROUTER, CLIENT, PROXY].map(|ip| ip[1].parse::<IpAddr>().unwrap());
    let head = [3, 0, 7, 0, 0, 0];
    let with = |datagram: &[u8]| [&datagram[..56], &[0x20, 0, 1, 2, 0, 8, 1, 1, 9, 9, 9, 9][..]].concat();
    let arrives = |left: &[u8]| error(router, client, 3, head, &with(left));
    let (_, bytes, sent) = arrive(Kind::Tcp, 1, Sum::Right, arrives);
    assert_eq!(hex::encode(bytes), hex::encode(error(proxy, client, 20, head, &with(&sent))));
}

#[test]
fn errors_that_are_not_about_a_session_are_left_alone() {
    let [client, proxy, real, router] =
        [CLIENT, PROXY, REAL, ROUTER].map(|ip| ip[0].parse::<IpAddr>().unwrap());
    let head = [3, 3, 0, 0, 0, 0];
    let about = |src: (IpAddr, u16), dst: (IpAddr, u16), cut: usize| {
        move |_: &[u8]| error(router, client, 3, head, &Packet::new(Kind::Udp, src, dst).bytes()[..cut])
    };
    let reply = Packet { outbound: false, ..Packet::new(Kind::Echo, (client, 1), (real, 5001)) }.bytes();
    let gre = [packets::header(client, real, 47, 8), vec![0; 8]].concat();
    type Case<'a> = (&'a str, Kind, Box<dyn Fn(&[u8]) -> Vec<u8> + 'a>);
    let cases: [Case<'_>; 8] = [
        ("another port", Kind::Udp, Box::new(about((client, 5002), (real, 443), 32))),
        ("another address", Kind::Udp, Box::new(about((client, 5001), (proxy, 443), 32))),
        ("another kind", Kind::Tcp, Box::new(about((client, 5001), (real, 443), 32))),
        ("another sender", Kind::Udp, Box::new(about((router, 5001), (real, 443), 32))),
        ("cut before the ports", Kind::Udp, Box::new(about((client, 5001), (real, 443), 27))),
        ("an echo reply", Kind::Echo, Box::new(|_| error(router, client, 3, head, &reply))),
        ("another protocol", Kind::Udp, Box::new(|_| error(router, client, 3, head, &gre))),
        ("no error at all", Kind::Udp, Box::new(|left| left.to_vec())),
    ];
    for (name, kind, arrives) in cases {
        let (became, bytes, _) = arrive(kind, 0, Sum::Right, &arrives);
        let left = Packet::new(kind, (client, 5001), (real, 443)).bytes();
        assert_eq!((became, bytes), (Inbound::Miss, arrives(&left)), "{name}");
    }
}

#[test]
fn an_error_confirms_a_session_and_one_about_an_ended_session_is_late() {
    let mut bench = Bench::new(0, Limits::default());
    bench.out(Kind::Udp, 7, PROXY, 0).unwrap();
    let [client, real, router] = [CLIENT, REAL, ROUTER].map(|names| bench.ip(names));
    let about = Packet::new(Kind::Udp, (client, 7), (real, 443)).bytes();
    let bytes = error(router, client, 3, [3, 3, 0, 0, 0, 0], &about);
    let arrive = |bench: &mut Bench| {
        let mut bytes = bytes.clone();
        let mut seen = view(&bytes).unwrap();
        bench.nat.inbound_error(&mut bytes, &mut seen, bench.now)
    };
    bench.sleep(10_000);
    assert!(matches!(arrive(&mut bench), Inbound::Rewritten(_)));
    bench.sleep(119_000);
    assert_eq!(bench.nat.sessions(), 1);
    bench.sleep(1000);
    assert_eq!((bench.nat.sessions(), arrive(&mut bench)), (0, Inbound::Expired));
}
