//! The worker as a whole: every verdict of packets.md section 12 that exists, sessions, budgets, bad input.

use gateway_common::DropReason;

use super::{control_packet::GOODBYE, testkit::*};
use crate::{
    Command, Ecn, WorkerEvent,
    command::{ChannelUse, Connection, Path},
    portal::messages::{Filter, Resource, ResourceKind},
};

const C4: &str = "100.64.2.1";
const C6: &str = "fd00:2021:1111::2:1";
const LAN4: &str = "10.44.0.9";
const LAN6: &str = "fd00:db8:20::9";

fn lan() -> Vec<Resource> {
    vec![cidr(1, "10.44.0.0/24", &[]), cidr(2, "fd00:db8:20::/64", &[])]
}

mod sessions {
    use super::*;

    #[test]
    fn data_flows_both_ways_directly_and_through_a_channel() {
        for mut world in [World::new(&lan()), World::relayed(&lan())] {
            world.handshake();
            let client = (world.client.id, world.client.index);
            assert!(matches!(world.events()[..],
                [WorkerEvent::Established { id, index }] if (id, index) == client));

            for (here, there) in [(C4, LAN4), (C6, LAN6)] {
                for len in [0, 1, 64, 1180] {
                    let there_packet = udp(here, there, (40000, 53), &vec![7; len]);
                    world.outbound(&there_packet);
                    assert_eq!(world.tun_gets(), Some(there_packet));
                    let back = udp(there, here, (53, 40000), &vec![8; len]);
                    world.inbound(&back);
                    assert_eq!(world.received(), Some(back));
                }
            }
            assert_eq!(world.worker.counters().iter().count(), 0);
            let traffic = *world.worker.traffic();
            let (out, back, unused) = if world.client.relayed {
                (traffic.outbound_relayed, traffic.inbound_relayed, traffic.outbound_direct)
            } else {
                (traffic.outbound_direct, traffic.inbound_direct, traffic.inbound_relayed)
            };
            assert_eq!((out.packets, back.packets, unused.packets), (8, 8, 0));
            assert_eq!(out.bytes, 4 * (28 + 48) + 2 * (1 + 64 + 1180));
            world.check_accounts();
        }
    }

    #[test]
    fn our_indices_are_the_connection_index_and_a_counter_from_one() {
        let mut world = World::new(&lan());
        for counter in 1..=3_u32 {
            let initiation = world.client.initiate();
            world.client_sends(&initiation);
            let response = world.client_gets().unwrap();
            let sender = u32::from_le_bytes(response[4..8].try_into().unwrap());
            assert_eq!(sender, world.client.index.get() << 8 | counter);
            let keepalive = world.client.answer(&response).unwrap();
            world.client_sends(&keepalive);
        }
    }

    #[test]
    fn nothing_is_sent_before_the_client_confirms_the_session() {
        let mut world = World::new(&lan());
        let back = udp(LAN4, C4, (53, 40000), b"early");
        world.inbound(&back);
        let initiation = world.client.initiate();
        world.client_sends(&initiation);
        let response = world.client_gets().unwrap();
        world.inbound(&back);
        assert_eq!(world.count(DropReason::NoSession), 2);
        assert_eq!(world.client_gets(), None, "no packet and no initiation of ours");
        let keepalive = world.client.answer(&response).unwrap();
        world.client_sends(&keepalive);
        world.inbound(&back);
        assert_eq!(world.received(), Some(back));
        world.check_accounts();
    }

    #[test]
    fn unconfirmed_handshakes_never_take_the_confirmed_session_away_silently() {
        let mut world = World::connected(&lan());
        // Eight more initiations, none confirmed: the last one's slot is the confirmed session's.
        for _ in 0..8 {
            let initiation = world.client.initiate();
            world.client_sends(&initiation);
        }
        world.sink.datagrams.clear();
        world.inbound(&udp(LAN4, C4, (53, 40000), b"lost"));
        assert_eq!(world.count(DropReason::NoSession), 1);
        assert_eq!(world.client_gets(), None);
    }

    #[test]
    fn a_handshake_reply_waits_for_the_nominated_path() {
        let mut world = World::with(&lan(), None, false);
        let initiation = world.client.initiate();
        world.client_sends(&initiation);
        assert_eq!(world.client_gets(), None);
        // A relayed path without a channel is none yet.
        world.tell(&lan(), Some(Path::Relayed { server: addr(SERVER), channel: None, remote: addr(REMOTE) }));
        assert_eq!(world.client_gets(), None);
        world.tell(&lan(), Some(direct()));
        let response = world.client_gets().unwrap();
        assert_eq!(response.len(), 92);
        assert!(world.client.answer(&response).is_some());
        assert_eq!(world.client_gets(), None, "it is sent once");
    }

    #[test]
    fn the_ring_holds_the_last_128_replies() {
        let mut world = World::with(&lan(), None, false);
        let link = |world: &mut World| {
            let slot = world.worker.peers.by_id(world.client.id).unwrap();
            let link = world.worker.peers.get_mut(slot).unwrap().link.as_mut().unwrap();
            for n in 0..130_u8 {
                link.hold(&[n]);
            }
        };
        link(&mut world);
        world.tell(&lan(), Some(direct()));
        assert_eq!(world.sink.datagrams.len(), 128);
        assert_eq!(world.client_gets(), Some(vec![2]));
    }

    #[test]
    fn replayed_forged_and_foreign_messages_are_told_apart() {
        let mut world = World::connected(&lan());
        let packet = udp(C4, LAN4, (1, 53), b"once");
        let message = world.client.seal(&packet);
        world.client_sends(&message);
        world.client_sends(&message);
        assert_eq!(world.count(DropReason::DataReplayed), 1);
        assert_eq!(world.sink.packets.len(), 1);

        let mut forged = world.client.seal(&packet);
        *forged.last_mut().unwrap() ^= 1;
        world.client_sends(&forged);
        assert_eq!(world.count(DropReason::DataForged), 1);

        let mut old = world.client.seal(&packet);
        old[4] = old[4].wrapping_add(1);
        world.client_sends(&old);
        assert_eq!(world.count(DropReason::SessionExpired), 1);

        let mut unknown = world.client.seal(&packet);
        unknown[6] ^= 0x40;
        world.client_sends(&unknown);
        assert_eq!(world.count(DropReason::UnknownSession), 1);

        let mut oversized = world.client.seal(&packet);
        oversized.resize(1313, 0);
        world.client_sends(&oversized);
        assert_eq!(world.count(DropReason::OversizedInner), 1);
        assert_eq!(world.sink.packets.len(), 1);
        world.check_accounts();
    }

    #[test]
    fn a_client_that_pads_its_packets_is_understood() {
        let mut world = World::connected(&lan());
        let packet = udp(C4, LAN4, (1, 53), b"abc");
        let mut padded = packet.clone();
        padded.resize(packet.len().next_multiple_of(16), 0);
        world.outbound(&padded);
        assert_eq!(world.tun_gets(), Some(packet));
    }

    #[test]
    fn a_wrong_preshared_key_makes_no_session() {
        let mut world = World::new(&lan());
        let private = x25519_dalek::StaticSecret::from([101; 32]);
        let gateway = x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from([7; 32]));
        world.client.tunn = boringtun::noise::Tunn::new(private, gateway, Some([99; 32]), None, 5, None);
        let initiation = world.client.initiate();
        world.client_sends(&initiation);
        let response = world.client_gets().unwrap();
        assert_eq!(world.client.answer(&response), None, "the client cannot open the answer");
        world.inbound(&udp(LAN4, C4, (53, 1), b""));
        assert_eq!(world.count(DropReason::NoSession), 1);
        assert!(world.events().is_empty());
    }

    #[test]
    fn initiations_that_are_not_for_us_are_told_apart() {
        let mut world = World::new(&lan());
        let gateway = x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from([7; 32]));
        let stranger = Client::new(9, &gateway).initiate();
        world.datagram("198.51.100.99:1", &stranger);
        assert_eq!(world.count(DropReason::UnknownPublicKey), 1);

        let other = x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from([8; 32]));
        let elsewhere = Client::new(1, &other).initiate();
        world.client_sends(&elsewhere);
        assert_eq!(world.count(DropReason::HandshakeForged), 1);

        let initiation = world.client.initiate();
        world.client_sends(&initiation);
        world.client_sends(&initiation);
        assert_eq!(world.count(DropReason::HandshakeReplayed), 1);
        assert_eq!(world.sink.datagrams.len(), 1);
        world.check_accounts();
    }

    #[test]
    fn answers_nobody_asked_for_are_dropped() {
        let mut world = World::connected(&lan());
        let receiver = (world.client.index.get() << 8 | 1).to_le_bytes();
        let mut response = [0; 92];
        response[0] = 2;
        response[8..12].copy_from_slice(&receiver);
        let mut cookie = [0; 64];
        cookie[0] = 3;
        cookie[4..8].copy_from_slice(&receiver);
        world.client_sends(&response);
        world.client_sends(&cookie);
        assert_eq!(world.count(DropReason::HandshakeReplayed), 2);
        world.check_accounts();
    }

    #[test]
    fn another_index_starts_afresh_and_the_same_index_keeps_the_session() {
        let mut world = World::connected(&lan());
        world.tell(&lan(), Some(direct()));
        let packet = udp(C4, LAN4, (1, 53), b"kept");
        world.outbound(&packet);
        assert_eq!(world.tun_gets(), Some(packet.clone()));

        let message = world.client.seal(&packet);
        world.client.index = crate::ConnectionIndex::new(0x77).unwrap();
        world.tell(&lan(), Some(direct()));
        world.client_sends(&message);
        assert_eq!(world.count(DropReason::UnknownSession), 1);
        world.inbound(&udp(LAN4, C4, (53, 1), b""));
        assert_eq!(world.count(DropReason::NoSession), 1);
        world.handshake();
        world.outbound(&packet);
        assert_eq!(world.tun_gets(), Some(packet));
        world.check_accounts();
    }

    #[test]
    fn without_a_connection_or_path_nothing_leaves() {
        let mut world = World::connected(&lan());
        let back = udp(LAN4, C4, (53, 1), b"");
        world.tell(&lan(), None);
        world.inbound(&back);
        assert_eq!(world.count(DropReason::Connecting), 1);
        world.tell(&lan(), Some(Path::Relayed { server: addr(SERVER), channel: None, remote: addr(REMOTE) }));
        world.inbound(&back);
        assert_eq!(world.count(DropReason::Connecting), 2);
        world.tell_connection(&lan(), Connection::Absent);
        world.inbound(&back);
        assert_eq!(world.count(DropReason::NotConnected), 1);
        let message = world.client.seal(&udp(C4, LAN4, (1, 53), b""));
        world.client_sends(&message);
        assert_eq!(world.count(DropReason::UnknownSession), 1);
        assert_eq!(world.client_gets(), None);
        world.check_accounts();
    }

    #[test]
    fn a_full_way_out_is_counted_and_passes() {
        let mut world = World::connected(&lan());
        world.sink.full = true;
        let packet = udp(C4, LAN4, (1, 53), b"");
        world.outbound(&packet);
        world.inbound(&udp(LAN4, C4, (53, 1), b""));
        assert_eq!(world.count(DropReason::Backpressure), 2);
        world.sink.full = false;
        world.outbound(&packet);
        assert_eq!(world.tun_gets(), Some(packet));
        world.check_accounts();
    }
}

mod verdicts {
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
            ("proxy", u(C4, "100.96.0.1"), Denied(3, 0, DropReason::NoTranslation)),
            ("proxy v6", u(C6, "fd00:2021:1111:8000::1"), Denied(1, 3, DropReason::NoTranslation)),
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
            (
                "error about another's packet",
                icmp(router, C4, 3, &others),
                Some(DropReason::InboundNotAllowed),
            ),
            ("error without a body", icmp(LAN4, C4, 3, b""), Some(DropReason::UnsupportedProtocol)),
            (
                "error about an error",
                icmp(LAN4, C4, 3, &icmp(C4, LAN4, 3, &mine)),
                Some(DropReason::UnsupportedProtocol),
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
}

mod changes {
    use super::*;

    #[test]
    fn revocation_and_new_filters_act_on_the_next_packet_both_ways() {
        let mut world = World::connected(&lan());
        let packet = tcp(C4, LAN4, (40000, 80));
        let back = tcp(LAN4, C4, (80, 40000));
        world.outbound(&packet);
        world.inbound(&back);
        assert_eq!((world.tun_gets().is_some(), world.received().is_some()), (true, true));

        world.tell(&[cidr(1, "10.44.0.0/24", &[Filter::Tcp { first: 443, last: 443 }])], Some(direct()));
        world.outbound(&packet);
        world.inbound(&back);
        assert_eq!((world.count(DropReason::NotAllowed), world.count(DropReason::InboundNotAllowed)), (1, 1));
        world.received().expect("the denial");

        world.tell(&[cidr(1, "10.44.0.0/24", &[Filter::Tcp { first: 80, last: 80 }])], Some(direct()));
        world.outbound(&packet);
        world.inbound(&back);
        assert_eq!((world.tun_gets().is_some(), world.received().is_some()), (true, true));

        world.tell(&[], Some(direct()));
        world.outbound(&packet);
        world.inbound(&back);
        assert_eq!((world.count(DropReason::NotAllowed), world.count(DropReason::InboundNotAllowed)), (2, 2));
        assert_eq!(world.tun_gets(), None);
        world.check_accounts();
    }

    #[test]
    fn the_last_authorization_gone_is_a_goodbye_through_the_tunnel() {
        for by_shutdown in [false, true] {
            let mut world = World::connected(&lan());
            if by_shutdown {
                world.command(Command::Shutdown)
            } else {
                world.revoke()
            }
            assert_eq!(world.received(), Some(GOODBYE.to_vec()));
            assert_eq!(world.client_gets(), None);
            world.inbound(&udp(LAN4, C4, (53, 1), b""));
            assert_eq!(world.count(DropReason::NoPeerState), 1);
            world.outbound(&udp(C4, LAN4, (1, 53), b""));
            assert_eq!(world.count(DropReason::UnknownSession), 1);
            let initiation = world.client.initiate();
            world.client_sends(&initiation);
            assert_eq!(world.count(DropReason::UnknownPublicKey), 1);
            world.check_accounts();
        }
    }

    #[test]
    fn a_connection_taken_away_is_silent() {
        let mut world = World::connected(&lan());
        world.tell_connection(&lan(), Connection::Absent);
        world.revoke();
        assert_eq!(world.client_gets(), None);
        let mut without_session = World::new(&lan());
        without_session.revoke();
        assert_eq!(without_session.client_gets(), None);
    }

    #[test]
    fn a_clients_goodbye_forgets_it_and_assigned_ips_are_counted() {
        let mut world = World::connected(&lan());
        world.events();
        let mut assigned = GOODBYE;
        assigned[40] = 0;
        world.outbound(&assigned);
        assert_eq!(world.worker.traffic().control, 1);
        assert!(world.sink.packets.is_empty() && world.sink.datagrams.is_empty());
        world.outbound(&GOODBYE);
        let client = (world.client.id, world.client.index);
        let events = world.events();
        assert!(
            matches!(events.last(),
            Some(WorkerEvent::Goodbye { id, index }) if (*id, *index) == client),
            "{events:?}"
        );
        world.outbound(&udp(C4, LAN4, (1, 53), b""));
        assert_eq!(world.count(DropReason::UnknownSession), 1);
        world.check_accounts();
    }

    #[test]
    fn a_tunnel_address_claimed_twice_belongs_to_the_later_and_falls_back() {
        let mut world = World::connected(&lan());
        let gateway = x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from([7; 32]));
        let mut later = Client::new(2, &gateway);
        later.tunnel = world.client.tunnel;
        std::mem::swap(&mut world.client, &mut later);
        world.tell(&lan(), None);
        let back = udp(LAN4, C4, (53, 1), b"");
        world.inbound(&back);
        assert_eq!(world.count(DropReason::Connecting), 1, "the later one has no path");
        world.revoke();
        std::mem::swap(&mut world.client, &mut later);
        world.inbound(&back);
        assert_eq!(world.received(), Some(back));
    }

    #[test]
    fn a_moved_tunnel_address_moves_inbound_traffic() {
        let mut world = World::connected(&lan());
        world.client.tunnel.v4 = [100, 64, 7, 7].into();
        world.tell(&lan(), Some(direct()));
        world.inbound(&udp(LAN4, C4, (53, 1), b""));
        assert_eq!(world.count(DropReason::NoPeerState), 1);
        let back = udp(LAN4, "100.64.7.7", (53, 1), b"");
        world.inbound(&back);
        assert_eq!(world.received(), Some(back));
        world.outbound(&udp(C4, LAN4, (1, 53), b""));
        assert_eq!(world.count(DropReason::ForeignSource), 1);
    }
}

mod network {
    use super::*;
    use crate::worker::ecn;

    #[test]
    fn ecn_is_copied_out_and_ce_is_merged_in() {
        let mut world = World::connected(&lan());
        for (here, there) in [(C4, LAN4), (C6, LAN6)] {
            for inner in [Ecn::NotEct, Ecn::Ect0, Ecn::Ect1, Ecn::Ce] {
                let back = marked(udp(there, here, (53, 1), b""), inner);
                world.inbound(&back);
                let (outer, message) = world.client_gets_marked().unwrap();
                assert_eq!(outer, inner);
                assert_eq!(world.client.open(&message), Some(back));

                let packet = marked(udp(here, there, (1, 53), b""), inner);
                let message = world.client.seal(&packet);
                world.client_sends_marked(&message, Ecn::Ce);
                let expect = if inner == Ecn::NotEct { Ecn::NotEct } else { Ecn::Ce };
                let got = world.tun_gets().unwrap();
                assert_eq!(ecn::of(&got), expect);
                assert_eq!(got, marked(packet, expect), "nothing else changes but the header checksum");
            }
        }
    }

    #[test]
    fn datagrams_are_told_apart() {
        let mut world = World::relayed(&lan());
        let stun = {
            let mut m = vec![0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42];
            m.resize(20, 9);
            m
        };
        let framed = |number: u16, payload: &[u8]| {
            let mut frame = gateway_common::channel_data::header(number, payload.len()).unwrap().to_vec();
            frame.extend_from_slice(payload);
            frame
        };
        let table: Vec<(&str, &str, Vec<u8>, DropReason)> = vec![
            ("empty", REMOTE, vec![], DropReason::EmptyDatagram),
            ("junk", REMOTE, b"\xffjunk".to_vec(), DropReason::UnknownPayload),
            ("ChannelData length", SERVER, vec![0x40, 7, 0, 9, 1], DropReason::MalformedChannelData),
            ("ChannelData from elsewhere", REMOTE, framed(CHANNEL, &stun), DropReason::UnknownRelay),
            ("unbound channel", SERVER, framed(CHANNEL + 1, &stun), DropReason::UnboundChannel),
            ("empty in a channel", SERVER, framed(CHANNEL, b""), DropReason::EmptyDatagram),
            (
                "channel in a channel",
                SERVER,
                framed(CHANNEL, &framed(CHANNEL, b"")),
                DropReason::UnknownPayload,
            ),
            ("short WireGuard", REMOTE, vec![4, 0, 0, 0, 1, 2, 3], DropReason::MalformedWireGuard),
        ];
        for (name, from, payload, reason) in &table {
            let before = world.count(*reason);
            world.datagram(from, payload);
            assert_eq!(world.count(*reason), before + 1, "{name}");
        }
        world.datagram(REMOTE, &stun);
        world.datagram(SERVER, &framed(CHANNEL, &stun));
        let events = world.events();
        let [WorkerEvent::Stun(plain), WorkerEvent::Stun(relayed)] = &events[..] else {
            panic!("{events:?}")
        };
        assert_eq!((plain.from, plain.via, &plain.payload), (addr(REMOTE), None, &stun));
        assert_eq!((relayed.from, relayed.via, &relayed.payload), (addr(REMOTE), Some(addr(SERVER)), &stun));
        assert_eq!(relayed.local, addr(LOCAL));

        world.command(Command::Channel { server: addr(SERVER), number: CHANNEL, peer: None });
        world.datagram(SERVER, &framed(CHANNEL, &stun));
        assert_eq!(world.count(DropReason::UnboundChannel), 2);
        world.command(Command::Relays([].into()));
        world.datagram(SERVER, &framed(CHANNEL, &stun));
        assert_eq!(world.count(DropReason::UnknownRelay), 2);
        world.check_accounts();
    }

    #[test]
    fn stun_has_a_quota_and_crowds_nobody_out() {
        let mut world = World::new(&lan());
        let mut stun = vec![0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42];
        stun.resize(20, 9);
        for _ in 0..600 {
            world.datagram(REMOTE, &stun);
        }
        assert_eq!(world.count(DropReason::ControlQueueFull), 88);
        world.handshake();
        let events = world.events();
        assert!(matches!(events[0], WorkerEvent::Established { .. }));
        assert_eq!(events.len(), 513);
        world.datagram(REMOTE, &stun);
        assert_eq!(world.events().len(), 1);
        world.check_accounts();
    }

    #[test]
    fn use_of_channels_is_reported_once_a_second() {
        use std::time::Duration;
        let mut world = World::relayed(&lan());
        world.handshake();
        world.events();
        let reports = |world: &mut World| -> Vec<Vec<ChannelUse>> {
            let used = |e| if let WorkerEvent::ChannelsUsed(used) = e { Some(used) } else { None };
            world.events().into_iter().filter_map(used).collect()
        };
        let server = addr(SERVER);
        world.advance(Duration::from_millis(1001));
        assert_eq!(
            reports(&mut world),
            [[ChannelUse { server, number: CHANNEL, received: true, sent: true }]]
        );
        world.advance(Duration::from_secs(3));
        assert_eq!(reports(&mut world).len(), 0);
        world.outbound(&udp(C4, LAN4, (1, 53), b""));
        world.advance(Duration::from_millis(999));
        assert_eq!(reports(&mut world).len(), 0);
        world.outbound(&udp(C4, LAN4, (1, 53), b""));
        world.advance(Duration::from_millis(1));
        assert_eq!(
            reports(&mut world),
            [[ChannelUse { server, number: CHANNEL, received: true, sent: false }]]
        );
    }

    #[test]
    fn activity_is_coarse() {
        use std::time::Duration;
        let mut world = World::connected(&lan());
        world.events();
        let count = |world: &mut World| {
            world.events().iter().filter(|e| matches!(e, WorkerEvent::Activity { .. })).count()
        };
        for _ in 0..5 {
            world.outbound(&udp(C4, LAN4, (1, 53), b""));
            world.inbound(&udp(LAN4, C4, (53, 1), b""));
        }
        assert_eq!(count(&mut world), 1);
        world.now += Duration::from_millis(4999);
        world.inbound(&udp(LAN4, C4, (53, 1), b""));
        assert_eq!(count(&mut world), 0);
        world.now += Duration::from_millis(1);
        world.inbound(&udp(LAN4, C4, (53, 1), b""));
        assert_eq!(count(&mut world), 1);
    }
}

mod floods {
    use super::*;

    /// An initiation that passes MAC1 and whose sender never looks at the answer.
    fn spoofed() -> Vec<u8> {
        let gateway = x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from([7; 32]));
        Client::new(50, &gateway).initiate()
    }

    #[test]
    fn a_flood_from_anywhere_does_not_touch_a_known_path() {
        let mut world = World::new(&lan());
        let flood = spoofed();
        for n in 0..300_u16 {
            world.datagram(&format!("192.0.2.{}:{}", n % 250, 1000 + n), &flood);
        }
        assert_eq!(world.count(DropReason::UnknownPublicKey), 100);
        assert_eq!(world.count(DropReason::HandshakeBudget), 200);
        assert_eq!(world.sink.datagrams.len(), 200);
        assert!(world.sink.datagrams.iter().all(|(_, m)| m.len() == 64 && m[0] == 3), "cookie replies");
        world.sink.datagrams.clear();
        world.handshake();
        world.check_accounts();
    }

    #[test]
    fn over_budget_a_cookie_lets_an_honest_client_in() {
        for relayed in [false, true] {
            // The client comes from where nobody knows it: no path yet, or a channel whose budget is spent.
            let mut world = if relayed { World::relayed(&lan()) } else { World::with(&lan(), None, false) };
            let flood = spoofed();
            for _ in 0..150 {
                world.client_sends(&flood);
            }
            world.sink.datagrams.clear();
            let initiation = world.client.initiate();
            world.client_sends(&initiation);
            let cookie = world.client_gets().expect("a cookie reply on the way the initiation came");
            assert_eq!((cookie[0], cookie.len()), (3, 64));
            assert_eq!(world.client.answer(&cookie), None);
            let proven = world.client.initiate();
            world.client_sends(&proven);
            assert_eq!(world.worker.traffic().handshakes, 1);
            world.tell(&lan(), world.client.relayed.then(relayed_path).or(Some(direct())));
            assert_eq!(world.client_gets().expect("the response").len(), 92);
            world.check_accounts();
        }
    }

    fn relayed_path() -> Path {
        Path::Relayed { server: addr(SERVER), channel: Some(CHANNEL), remote: addr(REMOTE) }
    }

    #[test]
    fn mac1_costs_an_attacker_no_budget_of_others() {
        let mut world = World::with(&lan(), None, false);
        let mut flood = spoofed();
        flood[130] ^= 1;
        for _ in 0..500 {
            world.datagram("192.0.2.9:9", &flood);
        }
        assert_eq!(world.count(DropReason::HandshakeForged), 500);
        let initiation = world.client.initiate();
        world.client_sends(&initiation);
        assert_eq!(world.worker.traffic().handshakes, 1);
    }
}

mod garbage {
    use rand::{Rng, RngCore, SeedableRng, rngs::SmallRng};

    use super::*;

    #[test]
    fn no_bytes_panic_and_each_input_is_counted_once() {
        for seed in 0..20 {
            let mut random = SmallRng::seed_from_u64(seed);
            let mut world = if seed % 2 == 0 { World::new(&lan()) } else { World::relayed(&lan()) };
            world.handshake();
            world.tell(&[cidr(1, "10.44.0.0/24", &[]), dns(3, "**.x")], (seed % 3 > 0).then(direct));
            let samples = [
                udp(C4, LAN4, (1, 53), b"abcdefgh"),
                tcp(C6, LAN6, (1, 443)),
                icmp(C4, LAN4, 3, &udp(LAN4, C4, (53, 1), b"")),
                icmp(LAN4, C4, 11, &udp(C4, LAN4, (53, 1), b"")),
                udp(LAN4, C4, (53, 1), b"abcdefgh"),
                ip(C6, LAN6, 0, &[44, 0, 0, 0, 0, 0, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0, 0]),
                udp(C4, "100.96.0.1", (1, 53), b""),
            ];
            for round in 0..1500 {
                let mut packet = samples[random.random_range(0..samples.len())].clone();
                mutate(&mut random, &mut packet);
                match round % 4 {
                    // Any plaintext a client may encrypt, a goodbye excepted.
                    0 => world.outbound(&packet),
                    1 => world.inbound(&packet),
                    // Any message on the wire.
                    2 => {
                        let mut message = match random.random_range(0..3) {
                            0 => world.client.seal(&packet),
                            1 => world.client.initiate(),
                            _ => vec![0x40, 7, 0, 0],
                        };
                        mutate(&mut random, &mut message);
                        if random.random() {
                            world.datagram(REMOTE, &message)
                        } else {
                            world.client_sends(&message)
                        }
                    }
                    _ => {
                        let mut junk = vec![0; random.random_range(0..200)];
                        random.fill_bytes(&mut junk);
                        if let Some(first) = junk.first_mut() {
                            *first %= 128;
                        }
                        world.datagram(if random.random() { SERVER } else { REMOTE }, &junk);
                    }
                }
                world.sink.packets.clear();
                world.sink.datagrams.clear();
                world.check_accounts();
            }
            let counters = world.worker.counters();
            assert!(counters.iter().count() > 8, "the sample reaches many reasons: {counters:?}");
        }
    }

    fn mutate(random: &mut SmallRng, bytes: &mut Vec<u8>) {
        for _ in 0..random.random_range(0..4) {
            match random.random_range(0..6) {
                0 => bytes.truncate(random.random_range(0..=bytes.len())),
                1 => bytes.resize(bytes.len() + random.random_range(0..60), 0xaa),
                _ if !bytes.is_empty() => {
                    let at = random.random_range(0..bytes.len());
                    bytes[at] = random.random();
                }
                _ => {}
            }
        }
    }
}
