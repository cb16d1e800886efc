//! Packets to and from DNS resources on their whole way.

use std::{net::IpAddr, time::Duration};

use super::{
    super::{
        inner,
        nat::{
            Kind, Limits, Nat,
            packets::{Packet, Sum, error, naive, transport_sum},
        },
    },
    fleet::*,
    *,
};
use crate::names::{Domain, DomainName, Names};

pub const REAL4: &str = "172.20.0.100";
pub const REAL6: &str = "2001:db8:172::100";
const PROXY4: &str = "100.96.0.1";
const PROXY6: &str = "fd00:2021:1111:8000::1";
/// Of the same name, without an address behind it.
const EMPTY4: &str = "100.96.0.7";
const EMPTY6: &str = "fd00:2021:1111:8000::7";
/// The DNS resource.
const ID: u128 = 3;

/// A proxy address and what stands behind it.
type Behind<'a> = (&'a str, Option<&'a str>);

pub fn domain(name: &str, resources: &[u128], proxies: &[Behind<'_>]) -> Arc<Domain> {
    let mut proxies: Vec<(IpAddr, Option<IpAddr>)> = proxies
        .iter()
        .map(|(proxy, real)| (proxy.parse().unwrap(), real.map(|real| real.parse().unwrap())))
        .collect();
    proxies.sort();
    Arc::new(Domain {
        name: DomainName::parse(name).unwrap(),
        resources: resources.iter().map(|n| resource_id(*n)).collect(),
        proxies: proxies.into(),
    })
}

/// One name with addresses of both families, and proxies without.
pub fn example() -> [Arc<Domain>; 1] {
    let proxies = [(PROXY4, Some(REAL4)), (PROXY6, Some(REAL6)), (EMPTY4, None), (EMPTY6, None)];
    [domain("git.x", &[ID], &proxies)]
}

fn filtered(n: u128, filters: &[Filter]) -> Resource {
    let (name, pattern) = (String::new(), "*.x".to_owned());
    Resource { id: resource_id(n), kind: ResourceKind::Dns { name, pattern, filters: filters.to_vec() } }
}

fn with_names(state: ClientState, domains: &[Arc<Domain>]) -> ClientState {
    ClientState { names: Arc::new(Names { domains: domains.into(), ..Names::default() }), ..state }
}

pub fn tell_on(world: &mut World, resources: &[Resource], path: Option<Path>, domains: &[Arc<Domain>]) {
    let connection = Connection::Present(world.client.keys(), path);
    let state = ClientState {
        attributions: attributions(&[1, 2, 3]),
        ..ClientState::new(world.client.tunnel, connection, resources.into())
    };
    world.tell_state(with_names(state, domains));
}

fn tell(world: &mut World, resources: &[Resource], domains: &[Arc<Domain>]) {
    tell_on(world, resources, Some(direct()), domains);
}

/// A connected client with [`example`] and networks besides.
fn world() -> World {
    let resources = [lan(), vec![dns(ID, "*.x")]].concat();
    let mut world = World::connected(&resources);
    tell(&mut world, &resources, &example());
    world
}

fn packet(kind: Kind, src: (&str, u16), dst: (&str, u16)) -> Packet {
    let socket = |(ip, port): (&str, u16)| (ip.parse::<IpAddr>().unwrap(), port);
    Packet::new(kind, socket(src), socket(dst))
}

/// The resource's answer: `src` and `dst` are the packet's own.
fn answer(kind: Kind, src: (&str, u16), dst: (&str, u16)) -> Packet {
    Packet { outbound: false, ..packet(kind, src, dst) }
}

#[track_caller]
fn goes_out(world: &mut World, packet: &Packet, expect: &Packet) {
    world.outbound(&packet.bytes());
    assert_eq!(world.tun_gets(), Some(expect.bytes()), "{packet:?}: {:?}", world.worker.counters());
    assert_eq!(world.client_gets(), None);
}

#[track_caller]
fn comes_in(world: &mut World, packet: &Packet, expect: &Packet) {
    world.inbound(&packet.bytes());
    assert_eq!(world.received(), Some(expect.bytes()), "{packet:?}: {:?}", world.worker.counters());
    assert_eq!(world.tun_gets(), None);
}

#[track_caller]
fn is_dropped(world: &mut World, inbound: &[u8], reason: DropReason) {
    let before = world.count(reason);
    world.inbound(inbound);
    assert_eq!(world.count(reason), before + 1, "{:?}", world.worker.counters());
    assert_eq!((world.client_gets(), world.tun_gets()), (None, None));
}

#[track_caller]
fn is_denied(world: &mut World, packet: &Packet, message: [u8; 2], reason: DropReason) {
    let (before, packet) = (world.count(reason), packet.bytes());
    world.outbound(&packet);
    assert_eq!(world.count(reason), before + 1, "{:?}", world.worker.counters());
    let reply = world.received().expect("a denial");
    let at = if reply[0] >> 4 == 4 { 20 } else { 40 };
    assert_eq!(reply[at..at + 2], message);
    assert_eq!(reply[at + 8..], packet[..reply.len() - at - 8], "as the client sent it");
    assert_eq!(world.tun_gets(), None);
}

#[test]
fn every_kind_is_translated_there_and_back_in_both_families() {
    let mut world = world();
    for (client, proxy, real) in [(C4, PROXY4, REAL4), (C6, PROXY6, REAL6)] {
        for kind in Kind::ALL {
            goes_out(
                &mut world,
                &packet(kind, (client, 40000), (proxy, 443)),
                &packet(kind, (client, 40000), (real, 443)),
            );
            comes_in(
                &mut world,
                &answer(kind, (real, 443), (client, 40000)),
                &answer(kind, (proxy, 443), (client, 40000)),
            );
        }
    }
    let none = |packet| Packet { sum: Sum::None, ..packet };
    let udp = |dst| none(packet(Kind::Udp, (C4, 40001), (dst, 53)));
    goes_out(&mut world, &udp(PROXY4), &udp(REAL4));
    world.check_accounts();
}

#[test]
fn verdicts_of_proxy_addresses() {
    let only_https = [filtered(ID, &[Filter::Tcp { first: 443, last: 443 }])];
    for (client, proxy, empty, real, unknown, prohibited, unreachable) in [
        (C4, PROXY4, EMPTY4, REAL4, "100.96.0.9", [3, 13], [3, 0]),
        (C6, PROXY6, EMPTY6, REAL6, "fd00:2021:1111:8000::9", [1, 1], [1, 3]),
    ] {
        let mut world = world();
        let tcp = |dst, port| packet(Kind::Tcp, (client, 40000), (dst, port));
        // Nobody assigned it, or nothing is behind it.
        is_denied(&mut world, &tcp(unknown, 443), prohibited, DropReason::NotAllowed);
        is_denied(&mut world, &tcp(empty, 443), unreachable, DropReason::NoTranslation);
        // What the filters permit, but no NAT can.
        for odd in [ip(client, proxy, 47, b"1234"), ip(client, proxy, 132, &[0; 12])] {
            let before = world.count(DropReason::UnsupportedProtocol);
            world.outbound(&odd);
            assert_eq!(world.count(DropReason::UnsupportedProtocol), before + 1);
            assert_eq!((world.tun_gets(), world.client_gets()), (None, None));
        }
        // No session: CIDR traffic, which nothing permits. Nobody has a proxy address.
        let back = answer(Kind::Tcp, (real, 443), (client, 40000));
        is_dropped(&mut world, &back.bytes(), DropReason::InboundNotAllowed);
        let forged = answer(Kind::Tcp, (proxy, 443), (client, 40000));
        is_dropped(&mut world, &forged.bytes(), DropReason::InboundNotAllowed);
        // With filters.
        tell(&mut world, &only_https, &example());
        goes_out(&mut world, &tcp(proxy, 443), &tcp(real, 443));
        is_denied(&mut world, &tcp(proxy, 80), prohibited, DropReason::NotAllowed);
        is_denied(&mut world, &tcp(empty, 80), prohibited, DropReason::NotAllowed);
        is_denied(
            &mut world,
            &packet(Kind::Echo, (client, 7), (proxy, 0)),
            prohibited,
            DropReason::NotAllowed,
        );
        // Inbound by the source port, of a session that is open.
        let other = answer(Kind::Tcp, (real, 80), (client, 40000));
        is_dropped(&mut world, &other.bytes(), DropReason::InboundNotAllowed);
        comes_in(&mut world, &back, &forged);
        // The Internet resource does not make an unknown name known.
        let internet = Resource { id: resource_id(9), kind: ResourceKind::Internet };
        tell(&mut world, &[internet], &example());
        is_denied(&mut world, &tcp(unknown, 443), prohibited, DropReason::NotAllowed);
        is_denied(&mut world, &tcp(proxy, 443), prohibited, DropReason::NotAllowed);
        world.check_accounts();
    }
}

#[test]
fn the_ports_run_out_and_the_table_fills_silently() {
    let mut world = world();
    for (ports, sessions) in [(7..=8, 9), (7..=99, 2)] {
        let limits = Limits { sessions, ports, ..Limits::default() };
        let slot = world.worker.peers.by_id(world.client.id).unwrap();
        world.worker.peers.get_mut(slot).unwrap().nat = Some(Box::new(Nat::new(1, limits, world.now)));
        let before = world.count(DropReason::NatExhausted);
        for port in [7, 8] {
            let p = |dst| packet(Kind::Udp, (C4, port), (dst, 53));
            goes_out(&mut world, &p(PROXY4), &p(REAL4));
            comes_in(
                &mut world,
                &answer(Kind::Udp, (REAL4, 53), (C4, port)),
                &answer(Kind::Udp, (PROXY4, 53), (C4, port)),
            );
        }
        world.outbound(&packet(Kind::Udp, (C4, 9), (PROXY4, 53)).bytes());
        assert_eq!(world.count(DropReason::NatExhausted), before + 1);
        assert_eq!((world.tun_gets(), world.client_gets()), (None, None));
    }
    world.check_accounts();
}

#[test]
fn errors_about_translated_packets_come_from_the_proxy_about_what_the_client_sent() {
    let mut world = world();
    for (client, proxy, real, router, own, head) in [
        (C4, PROXY4, REAL4, "192.0.2.77", OWN_V4, [11, 0, 0, 0, 0, 0]),
        (C6, PROXY6, REAL6, "2001:db8:77::1", OWN_V6, [3, 0, 0, 0, 0, 0]),
    ] {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        for kind in Kind::ALL {
            let sent = |dst| packet(kind, (client, 40000), (dst, 443));
            goes_out(&mut world, &sent(proxy), &sent(real));
            let expect = error(ip(proxy), ip(client), 20, head, &sent(proxy).bytes());
            // Our own kernel is a router too: the first that traceroute meets.
            for from in [router, own] {
                world.inbound(&error(ip(from), ip(client), 63, head, &sent(real).bytes()));
                assert_eq!(world.received(), Some(expect.clone()), "{kind:?} {:?}", world.worker.counters());
            }
            // About nothing that was translated: our own kernel's pass, others only if the client sent it.
            let strange = packet(kind, (client, 50000), (real, 443)).bytes();
            for from in [router, own] {
                let whole = error(ip(from), ip(client), 63, head, &strange);
                world.inbound(&whole);
                assert_eq!(world.received(), Some(whole));
            }
            let foreign = packet(kind, (router, 40000), (real, 443)).bytes();
            let foreign = error(ip(router), ip(client), 63, head, &foreign);
            is_dropped(&mut world, &foreign, DropReason::InboundNotAllowed);
            is_dropped(
                &mut world,
                &error(ip(router), ip(client), 63, head, &strange[..20]),
                DropReason::MalformedIcmpError,
            );
        }
    }
    world.check_accounts();
}

#[test]
fn sessions_end_by_time_and_what_is_late_is_no_cidr_traffic() {
    // Everything from the resource is permitted, were it not late.
    let resources = [dns(ID, "*.x"), cidr(1, "172.20.0.0/16", &[])];
    let mut world = World::connected(&resources);
    tell(&mut world, &resources, &example());
    let p = |dst| packet(Kind::Udp, (C4, 40000), (dst, 53));
    let back = |src| answer(Kind::Udp, (src, 53), (C4, 40000));
    goes_out(&mut world, &p(PROXY4), &p(REAL4));
    // Also of a client that has no connection any more.
    world.tell_connection(&resources, Connection::Absent);
    world.advance(Duration::from_secs(59));
    tell(&mut world, &resources, &example());
    let nat = |world: &mut World| {
        let slot = world.worker.peers.by_id(world.client.id).unwrap();
        let nat = world.worker.peers.get_mut(slot).unwrap().nat.as_ref().unwrap();
        (nat.sessions(), nat.expired())
    };
    // Names were gone for that time, and the session with them.
    assert_eq!(nat(&mut world), (0, 1));
    is_dropped(&mut world, &back(REAL4).bytes(), DropReason::NatExpired);

    world.handshake();
    goes_out(&mut world, &p(PROXY4), &p(REAL4));
    let absent = |world: &mut World| {
        let state = ClientState::new(world.client.tunnel, Connection::Absent, resources.clone().into());
        world.tell_state(with_names(state, &example()));
    };
    absent(&mut world);
    world.advance(Duration::from_secs(59));
    assert_eq!(nat(&mut world), (1, 0));
    world.advance(Duration::from_secs(3));
    assert_eq!(nat(&mut world), (0, 1));
    is_dropped(&mut world, &back(REAL4).bytes(), DropReason::NatExpired);
    world.advance(Duration::from_secs(901));
    assert_eq!(nat(&mut world), (0, 0));
    assert_eq!(world.worker.poll_timeout(), None, "nothing is timed any more");
    tell(&mut world, &resources, &example());
    world.handshake();
    comes_in(&mut world, &back(REAL4), &back(REAL4));
    world.check_accounts();
}

#[test]
fn two_resources_on_one_proxy_permit_what_either_permits() {
    let https = filtered(4, &[Filter::Tcp { first: 443, last: 443 }]);
    let ssh = filtered(5, &[Filter::Tcp { first: 22, last: 22 }]);
    let both = [domain("git.x", &[4, 5], &[(PROXY4, Some(REAL4))])];
    let mut world = World::connected(&[https.clone(), ssh.clone()]);
    let p = |dst, port| packet(Kind::Tcp, (C4, 40000), (dst, port));
    let back = |src, port| answer(Kind::Tcp, (src, port), (C4, 40000));
    /// Which resources are authorised, and whether 443 and 22 pass.
    type Row = (Vec<Resource>, [bool; 2]);
    let table: [Row; 5] = [
        (vec![https.clone(), ssh.clone()], [true, true]),
        (vec![https.clone()], [true, false]),
        (vec![ssh.clone()], [false, true]),
        (vec![], [false, false]),
        (vec![ssh, https], [true, true]),
    ];
    for (resources, pass) in table {
        tell(&mut world, &resources, &both);
        for (port, pass) in [443, 22].into_iter().zip(pass) {
            if pass {
                goes_out(&mut world, &p(PROXY4, port), &p(REAL4, port));
                comes_in(&mut world, &back(REAL4, port), &back(PROXY4, port));
            } else {
                is_denied(&mut world, &p(PROXY4, port), [3, 13], DropReason::NotAllowed);
                is_dropped(&mut world, &back(REAL4, port).bytes(), DropReason::InboundNotAllowed);
            }
        }
    }
    world.check_accounts();
}

#[test]
fn a_new_address_is_for_new_sessions_and_a_name_without_one_refuses_all() {
    let mut world = world();
    let resources = [dns(ID, "*.x")];
    let p = |port, dst| packet(Kind::Tcp, (C4, port), (dst, 443));
    let back = |src, port| answer(Kind::Tcp, (src, 443), (C4, port));
    goes_out(&mut world, &p(1, PROXY4), &p(1, REAL4));
    let other = "172.20.0.200";
    tell(&mut world, &resources, &[domain("git.x", &[ID], &[(PROXY4, Some(other))])]);
    goes_out(&mut world, &p(1, PROXY4), &p(1, REAL4));
    goes_out(&mut world, &p(2, PROXY4), &p(2, other));
    comes_in(&mut world, &back(REAL4, 1), &back(PROXY4, 1));
    comes_in(&mut world, &back(other, 2), &back(PROXY4, 2));
    // "A proxy that currently has no address is refused before the look-up, open sessions included".
    tell(&mut world, &resources, &[domain("git.x", &[ID], &[(PROXY4, None)])]);
    is_denied(&mut world, &p(1, PROXY4), [3, 0], DropReason::NoTranslation);
    comes_in(&mut world, &back(REAL4, 1), &back(PROXY4, 1));
    tell(&mut world, &resources, &[domain("git.x", &[ID], &[(PROXY4, Some(other))])]);
    goes_out(&mut world, &p(1, PROXY4), &p(1, REAL4));
    world.check_accounts();
}

#[test]
fn a_proxy_of_another_name_forgets_its_own_sessions_only() {
    let mut world = world();
    let resources = [dns(ID, "*.x")];
    let (second, wiki) = ("100.96.0.2", "172.20.0.201");
    let git = |proxies: &[Behind<'_>]| domain("git.x", &[ID], proxies);
    tell(&mut world, &resources, &[git(&[(PROXY4, Some(REAL4)), (second, Some(REAL4))])]);
    let p = |port, dst| packet(Kind::Tcp, (C4, port), (dst, 443));
    let back = |src, port| answer(Kind::Tcp, (src, 443), (C4, port));
    goes_out(&mut world, &p(1, PROXY4), &p(1, REAL4));
    goes_out(&mut world, &p(2, second), &p(2, REAL4));
    let moved = [git(&[(PROXY4, Some(REAL4))]), domain("wiki.x", &[ID], &[(second, Some(wiki))])];
    tell(&mut world, &resources, &moved);
    comes_in(&mut world, &back(REAL4, 1), &back(PROXY4, 1));
    is_dropped(&mut world, &back(REAL4, 2).bytes(), DropReason::NatExpired);
    goes_out(&mut world, &p(2, second), &p(2, wiki));
    comes_in(&mut world, &back(wiki, 2), &back(second, 2));
    is_dropped(&mut world, &back(REAL4, 2).bytes(), DropReason::NatExpired);
    world.check_accounts();
}

#[test]
fn a_client_with_other_addresses_begins_anew() {
    let mut world = world();
    let p = |src, dst| packet(Kind::Udp, (src, 1), (dst, 53));
    goes_out(&mut world, &p(C4, PROXY4), &p(C4, REAL4));
    world.client.tunnel.v4 = [100, 64, 2, 77].into();
    tell(&mut world, &[dns(ID, "*.x")], &example());
    let back = answer(Kind::Udp, (REAL4, 53), ("100.64.2.77", 1)).bytes();
    is_dropped(&mut world, &back, DropReason::InboundNotAllowed);
    goes_out(&mut world, &p("100.64.2.77", PROXY4), &p("100.64.2.77", REAL4));
    world.check_accounts();
}

#[test]
fn revocation_and_new_filters_act_on_the_next_packet_of_open_sessions() {
    for (client, proxy, real, prohibited) in [(C4, PROXY4, REAL4, [3, 13]), (C6, PROXY6, REAL6, [1, 1])] {
        let mut world = world();
        let p = |dst| packet(Kind::Tcp, (client, 40000), (dst, 80));
        let back = |src| answer(Kind::Tcp, (src, 80), (client, 40000));
        let with = |port| [filtered(ID, &[Filter::Tcp { first: port, last: port }])];
        for (resources, pass) in [
            (&with(80)[..], true),
            (&with(443), false),
            (&with(80), true),
            (&[], false),
            (&[dns(ID, "*.x")], true),
            (&[dns(ID + 1, "*.x")], false),
        ] {
            tell(&mut world, resources, &example());
            if pass {
                goes_out(&mut world, &p(proxy), &p(real));
                comes_in(&mut world, &back(real), &back(proxy));
            } else {
                is_denied(&mut world, &p(proxy), prohibited, DropReason::NotAllowed);
                is_dropped(&mut world, &back(real).bytes(), DropReason::InboundNotAllowed);
            }
        }
        world.check_accounts();
    }
}

#[test]
fn a_name_that_comes_to_another_resource_is_judged_anew() {
    let mut world = world();
    let https = filtered(ID, &[Filter::Tcp { first: 443, last: 443 }]);
    let connection = Connection::Present(world.client.keys(), Some(direct()));
    let state = ClientState::new(world.client.tunnel, connection, [https, dns(4, "*.x")].into());
    let p = |dst| packet(Kind::Tcp, (C4, 40000), (dst, 80));
    let back = |src| answer(Kind::Tcp, (src, 80), (C4, 40000));
    for resources in [&[ID][..], &[ID, 4], &[ID], &[4]] {
        // The resources stay what they are.
        let names = [domain("git.x", resources, &[(PROXY4, Some(REAL4))])];
        world.tell_state(with_names(state.clone(), &names));
        if resources.contains(&4) {
            goes_out(&mut world, &p(PROXY4), &p(REAL4));
            comes_in(&mut world, &back(REAL4), &back(PROXY4));
        } else {
            is_denied(&mut world, &p(PROXY4), [3, 13], DropReason::NotAllowed);
        }
    }
}

#[test]
fn three_flows_from_one_port_to_three_names_on_one_address_stay_apart() {
    let mut world = world();
    let proxies = ["100.96.0.1", "100.96.0.2", "100.96.0.3"];
    let names: Vec<_> =
        proxies.iter().map(|ip| domain(&format!("n{}.x", &ip[9..]), &[ID], &[(ip, Some(REAL4))])).collect();
    tell(&mut world, &[dns(ID, "*.x")], &names);
    let ports = [40000, 40001, 40002];
    for round in 0..3 {
        for (proxy, port) in proxies.into_iter().zip(ports) {
            let there = |src, dst| Packet { payload: round, ..packet(Kind::Tcp, (C4, src), (dst, 443)) };
            goes_out(&mut world, &there(40000, proxy), &there(port, REAL4));
        }
        for (proxy, port) in proxies.into_iter().zip(ports).rev() {
            comes_in(
                &mut world,
                &answer(Kind::Tcp, (REAL4, 443), (C4, port)),
                &answer(Kind::Tcp, (proxy, 443), (C4, 40000)),
            );
        }
    }
    world.check_accounts();
}

#[test]
fn congestion_marks_survive_translation() {
    let mut world = world();
    for (client, proxy, real, protocol) in [(C4, PROXY4, REAL4, 17), (C6, PROXY6, REAL6, 17)] {
        for (outer, inner, expect) in [
            (Ecn::Ce, Ecn::Ect0, Ecn::Ce),
            (Ecn::Ce, Ecn::Ect1, Ecn::Ce),
            (Ecn::Ce, Ecn::NotEct, Ecn::NotEct),
            (Ecn::Ect0, Ecn::Ect1, Ecn::Ect1),
        ] {
            let p = |dst| udp(client, dst, (40000, 53), b"abcd");
            let whole = |mut packet: Vec<u8>| {
                let at = if client == C4 { 20 } else { 40 };
                let sum = transport_sum(&packet, at, protocol);
                packet[at + 6..at + 8].copy_from_slice(&sum.to_be_bytes());
                packet
            };
            let message = world.client.seal(&marked(whole(p(proxy)), inner));
            world.client_sends_marked(&message, outer);
            let out = world.tun_gets().unwrap();
            assert_eq!(out, marked(whole(p(real)), expect), "{outer:?} {inner:?}");
            assert!(client != C4 || naive(&out[..20]) == 0);

            world.inbound(&marked(udp(real, client, (53, 40000), b""), inner));
            let (ecn, message) = world.client_gets_marked().unwrap();
            let received = world.client.open(&message).unwrap();
            assert_eq!((ecn, super::super::ecn::of(&received)), (inner, inner));
            assert_eq!(inner::view(&received).unwrap().src, proxy.parse::<IpAddr>().unwrap());
        }
    }
    world.check_accounts();
}

fn fleet_tell(fleet: &mut Fleet, client: &Client, home: crate::command::Home) {
    let connection = Connection::Present(client.keys(), Some(direct()));
    let state = ClientState::new(client.tunnel, connection, [dns(ID, "*.x")].into());
    let desired = Some(Arc::new(with_names(state, &example())));
    fleet.tell(Command::Client { id: client.id, home, desired });
}

/// One packet out and the answer, both through worker `by`; they come out at `holder`.
fn round(fleet: &mut Fleet, client: &mut Client, by: usize, holder: usize, port: u16) {
    let p = |dst| packet(Kind::Udp, (C4, port), (dst, 53)).bytes();
    let back = |src| answer(Kind::Udp, (src, 53), (C4, port)).bytes();
    fleet.datagram(by, addr(REMOTE), &client.seal(&p(PROXY4)));
    fleet.rest();
    assert_eq!(fleet.tun.pop_front(), Some((holder, p(REAL4))));
    fleet.packet(by, &back(REAL4));
    fleet.rest();
    let (at, _, message) = fleet.net.pop_front().expect("an answer");
    assert_eq!((at, client.open(&message)), (holder, Some(back(PROXY4))));
    fleet.check_accounts();
}

#[test]
fn packets_of_another_workers_client_are_translated_where_it_is() {
    let mut fleet = Fleet::new(2);
    let mut client = Fleet::client(1);
    fleet_tell(&mut fleet, &client, at(1, 1));
    fleet.handshake(1, &mut client, addr(REMOTE));
    for by in [0, 1, 0] {
        round(&mut fleet, &mut client, by, 1, 40000);
    }
    assert_eq!(fleet.passes, 4);
}

#[test]
fn a_client_moves_with_its_open_sessions() {
    let mut fleet = Fleet::new(2);
    let mut client = Fleet::client(1);
    fleet_tell(&mut fleet, &client, at(0, 1));
    fleet.handshake(0, &mut client, addr(REMOTE));
    // The second has another port outside, which nobody but its session knows.
    let other = "100.96.0.2";
    let connection = Connection::Present(client.keys(), Some(direct()));
    let state = ClientState::new(client.tunnel, connection, [dns(ID, "*.x")].into());
    let names =
        [domain("a.x", &[ID], &[(PROXY4, Some(REAL4))]), domain("b.x", &[ID], &[(other, Some(REAL4))])];
    let state = Arc::new(with_names(state, &names));
    let command = |home| Command::Client { id: client.id, home, desired: Some(Arc::clone(&state)) };
    let (stay, go) = (command(at(0, 1)), command(from_to(0, 1, 2)));
    fleet.tell(stay);
    round(&mut fleet, &mut client, 0, 0, 40000);
    let p = |port, dst| packet(Kind::Udp, (C4, port), (dst, 53)).bytes();
    let back = |src, port| answer(Kind::Udp, (src, 53), (C4, port)).bytes();
    fleet.datagram(0, addr(REMOTE), &client.seal(&p(40000, other)));
    assert_eq!(fleet.tun.pop_front(), Some((0, p(40001, REAL4))));

    fleet.tell(go);
    fleet.rest();
    assert_eq!(fleet.holders(client.id), [(1, Some(client.index))]);
    round(&mut fleet, &mut client, 0, 1, 40000);
    fleet.packet(0, &back(REAL4, 40001));
    fleet.rest();
    let (at, _, message) = fleet.net.pop_front().expect("an answer");
    assert_eq!((at, client.open(&message)), (1, Some(back(other, 40000))));
    // And ends there.
    for _ in 0..200 {
        fleet.advance(Duration::from_secs(1));
        fleet.time(1);
    }
    fleet.packet(0, &back(REAL4, 40001));
    fleet.rest();
    assert_eq!(fleet.count(DropReason::NatExpired), 1);
}
