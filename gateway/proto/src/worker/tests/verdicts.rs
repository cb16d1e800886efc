//! One row per verdict of packets.md section 12, both directions.

use super::*;

enum Expect {
    ToTun,
    /// ICMP type and code, reason.
    Denied(u8, u8, DropReason),
    Dropped(DropReason),
}
use Expect::{Denied, Dropped, ToTun};

#[track_caller]
fn check_outbound(world: &mut World, name: &str, packet: &[u8], expect: &Expect) {
    let count = |w: &World, r: DropReason| w.count(r);
    match expect {
        ToTun => {
            world.outbound(packet);
            assert_eq!(world.tun_gets().as_deref(), Some(packet), "{name}");
        }
        Denied(kind, code, reason) => {
            let before = count(world, *reason);
            world.outbound(packet);
            assert_eq!(count(world, *reason), before + 1, "{name}");
            let reply = world.received().unwrap_or_else(|| panic!("{name}: no reply"));
            let at = if reply[0] >> 4 == 4 { 20 } else { 40 };
            assert_eq!((reply[at], reply[at + 1]), (*kind, *code), "{name}");
            assert_eq!(reply[at + 8..], packet[..reply.len() - at - 8], "{name}");
        }
        Dropped(reason) => {
            let before = count(world, *reason);
            world.outbound(packet);
            assert_eq!(count(world, *reason), before + 1, "{name}: {:?}", world.worker.counters());
        }
    }
    assert_eq!(world.tun_gets(), None, "{name}");
    assert_eq!(world.client_gets(), None, "{name}");
}

#[test]
fn outbound() {
    let mut world = World::connected(&[
        cidr(1, "10.44.0.0/24", &[]),
        cidr(2, "fd00:db8:20::/64", &[]),
        cidr(3, "10.50.0.0/24", &[Filter::Tcp { first: 80, last: 80 }]),
    ]);
    let u = |src, dst| udp(src, dst, (40000, 53), b"abcd");
    // GRE behind IPv4 options.
    let options = |options: &[u8]| {
        let mut packet = ip(C4, LAN4, 47, options);
        packet[0] += u8::try_from(options.len() / 4).unwrap();
        packet
    };
    let embedded = u(LAN4, C4);
    let mut fragment = u(C4, LAN4);
    fragment[6] = 0x20;
    let mut long_udp = u(C4, LAN4);
    long_udp[25] += 1;
    let mut short_total = u(C4, LAN4);
    short_total[3] -= 1;
    let table: Vec<(&str, Vec<u8>, Expect)> = vec![
        ("v4 resource", u(C4, LAN4), ToTun),
        ("v6 resource", u(C6, LAN6), ToTun),
        ("echo", icmp(C4, LAN4, 8, b""), ToTun),
        ("GRE under an empty filter", ip(C4, LAN4, 47, b"1234"), ToTun),
        ("ICMP timestamp under an empty filter", icmp(C4, LAN4, 13, &[0; 12]), ToTun),
        ("permitted port", tcp(C4, "10.50.0.1", (5, 80)), ToTun),
        ("other port", tcp(C4, "10.50.0.1", (80, 81)), Denied(3, 13, DropReason::NotAllowed)),
        ("other protocol", ip(C4, "10.50.0.1", 47, b"1234"), Denied(3, 13, DropReason::NotAllowed)),
        ("no resource", u(C4, "10.45.0.1"), Denied(3, 13, DropReason::NotAllowed)),
        ("no resource v6", u(C6, "fd00:db8:21::1"), Denied(1, 1, DropReason::NotAllowed)),
        ("foreign source", u("100.64.2.2", LAN4), Denied(3, 13, DropReason::ForeignSource)),
        ("foreign source v6", u("fd00:2021:1111::2:2", LAN6), Denied(1, 1, DropReason::ForeignSource)),
        ("another client", u(C4, "100.64.2.2"), Denied(3, 13, DropReason::TunnelDestination)),
        ("another client v6", u(C6, "fd00:2021:1111::2:2"), Denied(1, 1, DropReason::TunnelDestination)),
        ("proxy without DNS resource", u(C4, "100.96.0.1"), Denied(3, 13, DropReason::NotAllowed)),
        ("own DNS udp", udp(C4, OWN_V4, (1, 53535), b""), ToTun),
        ("own DNS tcp v6", tcp(C6, OWN_V6, (1, 53535)), ToTun),
        ("own echo", icmp(C6, OWN_V6, 128, b""), ToTun),
        ("own ssh", tcp(C4, OWN_V4, (53535, 22)), Denied(3, 13, DropReason::OwnAddressPort)),
        ("own GRE v6", ip(C6, OWN_V6, 47, b""), Denied(1, 1, DropReason::OwnAddressPort)),
        ("multicast", u(C4, "224.0.0.251"), Dropped(DropReason::Multicast)),
        ("multicast v6", u(C6, "ff02::1"), Dropped(DropReason::Multicast)),
        ("ICMP error", icmp(C4, LAN4, 3, &embedded), Dropped(DropReason::OutboundIcmpError)),
        ("ICMP error v6", icmp(C6, LAN6, 2, &u(LAN6, C6)), Dropped(DropReason::OutboundIcmpError)),
        ("error without a body, permitted", icmp(C4, LAN4, 3, b""), ToTun),
        (
            "error without a body, not permitted",
            icmp(C4, "10.45.0.1", 3, b""),
            Dropped(DropReason::NotAllowed),
        ),
        ("fragment", fragment, Dropped(DropReason::InnerFragment)),
        ("UDP length", long_udp, Dropped(DropReason::MalformedInner)),
        ("total length below UDP length", short_total, Dropped(DropReason::MalformedInner)),
        ("no IP", b"\x05hello".to_vec(), Dropped(DropReason::MalformedInner)),
        ("short TCP", ip(C4, LAN4, 6, &[0; 19]), Dropped(DropReason::MalformedInner)),
        ("ICMPv6 in IPv4", ip(C4, LAN4, 58, &[0; 8]), Dropped(DropReason::MalformedInner)),
        ("hop-by-hop cut", ip(C6, LAN6, 0, &[17, 9, 0, 0]), Dropped(DropReason::MalformedInner)),
        ("v6 fragment", ip(C6, LAN6, 44, &[17, 0, 0, 1, 0, 0, 0, 1]), Dropped(DropReason::InnerFragment)),
        ("v6 atomic fragment", ip(C6, LAN6, 44, &[47, 0, 0, 0, 0, 0, 0, 1]), ToTun),
        ("v6 options then GRE", ip(C6, LAN6, 60, &[47, 0, 0, 0, 0, 0, 0, 0, 9]), ToTun),
        ("v4 record route", options(&[7, 3, 4, 0]), ToTun),
        ("v4 loose source route", options(&[1, 131, 3, 4]), Dropped(DropReason::SourceRouted)),
        ("v4 strict source route", options(&[7, 3, 4, 137, 3, 4, 0, 0]), Dropped(DropReason::SourceRouted)),
        ("v4 source route behind the end", options(&[0, 131, 3, 4]), ToTun),
        ("v4 option without a length", options(&[1, 1, 1, 7]), Dropped(DropReason::SourceRouted)),
        ("v4 option of length 0", options(&[7, 0, 4, 0]), Dropped(DropReason::SourceRouted)),
        (
            "v6 routing header",
            ip(C6, LAN6, 43, &[47, 0, 0, 1, 0, 0, 0, 0]),
            Dropped(DropReason::SourceRouted),
        ),
        ("v6 routing header, done", ip(C6, LAN6, 43, &[47, 0, 0, 0, 0, 0, 0, 0]), ToTun),
        (
            "v6 routing header behind options",
            ip(C6, LAN6, 60, &[43, 0, 0, 9, 0, 0, 0, 0, 47, 0, 4, 2, 0, 0, 0, 0]),
            Dropped(DropReason::SourceRouted),
        ),
        (
            "v6 routing header behind an atomic fragment and authentication",
            ip(
                C6,
                LAN6,
                44,
                &[&[51, 0, 0, 0, 0, 0, 0, 1, 43, 1][..], &[0; 10], &[47, 0, 4, 1, 0, 0, 0, 0]].concat(),
            ),
            Dropped(DropReason::SourceRouted),
        ),
        ("largest packet", udp(C4, LAN4, (1, 2), &[0; 1252]), ToTun),
    ];
    for (name, packet, expect) in &table {
        check_outbound(&mut world, name, packet, expect);
    }
    world.check_accounts();
}

#[test]
fn outbound_with_dns_and_internet_resources() {
    let internet = Resource { id: resource_id(5), kind: ResourceKind::Internet };
    let mut world = World::connected(&[dns(4, "*.example.com"), internet]);
    let u = |src, dst| udp(src, dst, (40000, 53), b"abcd");
    let table: Vec<(&str, Vec<u8>, Expect)> = vec![
        ("public", u(C4, "8.8.8.8"), ToTun),
        ("public v6", u(C6, "2001:db8::1"), ToTun),
        ("private", u(C4, "10.1.1.1"), Denied(3, 0, DropReason::PrivateDestination)),
        ("private v6", u(C6, "fd12::1"), Denied(1, 3, DropReason::PrivateDestination)),
        ("proxy that nobody assigned", u(C4, "100.96.0.1"), Denied(3, 13, DropReason::NotAllowed)),
        ("the same v6", u(C6, "fd00:2021:1111:8000::1"), Denied(1, 1, DropReason::NotAllowed)),
    ];
    for (name, packet, expect) in &table {
        check_outbound(&mut world, name, packet, expect);
    }
}

#[test]
fn inbound() {
    let mut world = World::connected(&[
        cidr(1, "10.44.0.0/24", &[]),
        cidr(2, "fd00:db8:20::/64", &[Filter::Tcp { first: 443, last: 443 }]),
    ]);
    let mine = udp(C4, LAN4, (40000, 53), b"");
    let others = udp("100.64.2.2", LAN4, (40000, 53), b"");
    let mine6 = tcp(C6, LAN6, (40000, 443));
    let router = "192.0.2.77";
    let mut fragment = udp(LAN4, C4, (53, 1), b"");
    fragment[7] = 1;
    let table: Vec<(&str, Vec<u8>, Option<DropReason>)> = vec![
        ("udp", udp(LAN4, C4, (53, 40000), b"x"), None),
        ("tcp from the permitted port", tcp(LAN6, C6, (443, 9)), None),
        ("echo reply", icmp(LAN4, C4, 0, b""), None),
        ("GRE", ip(LAN4, C4, 47, b"1234"), None),
        ("ICMP timestamp reply", icmp(LAN4, C4, 14, &[0; 12]), None),
        ("from our own address", udp(OWN_V4, C4, (53535, 9), b""), None),
        ("from our own address v6", icmp(OWN_V6, C6, 129, b""), None),
        ("error about the client's packet", icmp(router, C4, 11, &mine[..28]), None),
        ("too big about the client's packet", icmp("fd00:99::1", C6, 2, &mine6), None),
        ("error about another's packet", icmp(router, C4, 3, &others), Some(DropReason::InboundNotAllowed)),
        ("error without a body", icmp(LAN4, C4, 3, b""), Some(DropReason::MalformedIcmpError)),
        (
            "error about an error",
            icmp(LAN4, C4, 3, &icmp(C4, LAN4, 3, &mine)),
            Some(DropReason::MalformedIcmpError),
        ),
        ("redirect", icmp(LAN4, C4, 5, &mine), Some(DropReason::UnsupportedProtocol)),
        ("neighbour discovery", icmp(LAN6, C6, 135, &[0; 16]), Some(DropReason::UnsupportedProtocol)),
        ("other port", tcp(LAN6, C6, (80, 9)), Some(DropReason::InboundNotAllowed)),
        ("echo without icmp filter", icmp(LAN6, C6, 129, b""), Some(DropReason::InboundNotAllowed)),
        ("no resource", udp("10.45.0.1", C4, (53, 1), b""), Some(DropReason::InboundNotAllowed)),
        ("not a tunnel address", udp(LAN4, "10.0.0.1", (53, 1), b""), Some(DropReason::NotAPeer)),
        ("control packet", GOODBYE.to_vec(), Some(DropReason::NotAPeer)),
        ("no such client", udp(LAN4, "100.64.9.9", (53, 1), b""), Some(DropReason::NoPeerState)),
        ("ourselves", udp(LAN4, OWN_V4, (53, 1), b""), Some(DropReason::NoPeerState)),
        ("from another client", udp("100.64.2.2", C4, (53, 1), b""), Some(DropReason::TunnelSource)),
        ("from itself", udp(C4, C4, (53, 1), b""), Some(DropReason::TunnelSource)),
        ("fragment", fragment, Some(DropReason::InnerFragment)),
        ("oversized", udp(LAN4, C4, (53, 1), &[0; 1253]), Some(DropReason::OversizedInner)),
        ("empty", Vec::new(), Some(DropReason::MalformedInner)),
    ];
    for (name, packet, expect) in &table {
        let before = expect.map(|r| world.count(r));
        world.inbound(packet);
        match expect {
            None => assert_eq!(world.received().as_ref(), Some(packet), "{name}"),
            Some(reason) => assert_eq!(Some(world.count(*reason)), before.map(|n| n + 1), "{name}"),
        }
        assert_eq!(world.client_gets(), None, "{name}");
    }
    assert!(world.sink.packets.is_empty(), "nothing is ever sent back to the LAN");
    world.check_accounts();
}

#[test]
fn allow_own_ip_opens_every_port() {
    let mut world = World::connected(&lan());
    world.worker.own.allow_all = true;
    check_outbound(&mut world, "ssh", &tcp(C4, OWN_V4, (1, 22)), &ToTun);
}

#[test]
fn denials_are_the_bytes_of_the_test_vectors_and_limited() {
    let mut world = World::connected(&lan());
    // The vector's client is 100.64.2.2.
    world.client.tunnel.v4 = [100, 64, 2, 2].into();
    world.tell(&[], Some(direct()));
    let packet = hex::decode("45000020123440004011b822644002020a2c00099c400035000c2e2361626364").unwrap();
    let reply = "45000038000000001401364f0a2c000964400202030d324e00000000\
                 45000020123440004011b822644002020a2c00099c400035000c2e23";
    for _ in 0..300 {
        world.outbound(&packet);
    }
    assert_eq!(world.count(DropReason::NotAllowed), 200);
    assert_eq!(world.count(DropReason::IcmpBudget), 100);
    let mut replies = 0;
    while let Some(received) = world.received() {
        assert_eq!(hex::encode(received), reply);
        replies += 1;
    }
    assert_eq!(replies, 200);
    assert_eq!(world.worker.traffic().denials, 200);
    world.check_accounts();
}
