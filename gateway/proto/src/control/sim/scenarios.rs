//! What must hold in the small internet: ways found, lost and found again.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use super::{
    Link, World,
    nat::{Nat, NatKind},
};
use crate::{
    command::{Path, WorkerEvent},
    control::{PathKind, tests::epoch},
    portal::messages::{Egress, Ingress},
    relay::twin::Packet,
};

const SOON: Duration = Duration::from_secs(3);

#[test]
fn without_translation_the_direct_pair_is_nominated() {
    let mut world = World::new(epoch(), 1);
    let took = world.connect();
    assert!(took < Duration::from_millis(300), "{took:?}");
    assert_eq!(
        world.path(),
        Some(Path::Direct { local: at("198.51.100.2:52625"), remote: at("192.0.2.2:52625") })
    );
    assert!(world.reaches_the_client(b"data"));
    assert_eq!(world.gateway.status().peer_to_peer, 1);
    // Acknowledged first, then all candidates in one message, the best first, none twice.
    let [Egress::Authorized { reference }, Egress::BroadcastIceCandidates(_, lines)] = &world.said[..] else {
        panic!("{:?}", world.said)
    };
    assert_eq!(reference, "ref-1");
    let kinds: Vec<_> = lines.iter().map(|l| l.split(' ').nth(7).unwrap()).collect();
    assert_eq!(kinds, ["host", "relay"], "a reflexive one would be redundant");
    assert!(world.twins[0].1.sins.is_empty(), "{:?}", world.twins[0].1.sins);
}

#[test]
fn through_relays_only_a_relayed_pair_is_nominated() {
    let mut world = World::new(epoch(), 1);
    world.direct_is_blocked = true;
    world.connect();
    assert!(matches!(world.path(), Some(Path::Relayed { channel: Some(_), .. })), "{world:#?}");
    assert!(world.reaches_the_client(b"relayed data"));
    assert!(world.twins[0].1.sins.is_empty(), "{:?}", world.twins[0].1.sins);
}

#[test]
fn with_both_families_the_direct_ipv6_pair_wins_and_relays_serve_both() {
    let mut world = World::dual_stack(epoch());
    world.connect();
    world.run(SOON);
    let (local, remote) = (at("[2001:db8:2::2]:52625"), at("[2001:db8:1::2]:52625"));
    assert_eq!(world.path(), Some(Path::Direct { local, remote }));
    let lines = lines_since(&world, 0, true).join("\n");
    for part in
        ["198.51.100.2 52625 typ host", "2001:db8:2::2 52625 typ host", " 203.0.113.1 ", " 2001:db8:ffff::1 "]
    {
        assert!(lines.contains(part), "{part} in {lines}");
    }
    assert!(world.reaches_the_client(b"over IPv6"));
    assert!(world.twins[0].1.sins.is_empty(), "{:?}", world.twins[0].1.sins);

    let mut world = World::dual_stack(epoch());
    world.direct_is_blocked = true;
    world.connect();
    world.run(SOON);
    // The relay is reached over IPv4, so its IPv4 address is preferred (connections.md section 6.3).
    assert!(matches!(world.path(), Some(Path::Relayed { remote, .. }) if remote.is_ipv4()), "{world:#?}");
    assert!(world.reaches_the_client(b"relayed"));
}

#[test]
fn every_kind_of_translation_finds_a_way() {
    use NatKind::{Cone, Symmetric};
    let client = |kind| Some(Nat::new(kind, "192.0.2.1"));
    let gateway = |kind| Some(Nat::new(kind, "198.51.100.1"));
    // The last column: can the two meet without a relay? A symmetric side meets a cone that filters by port not
    // at all, because its port for the other is not the one the relay saw.
    let table = [
        ("client cone", client(Cone), None, true),
        ("client symmetric", client(Symmetric), None, true),
        ("gateway cone", None, gateway(Cone), true),
        ("gateway symmetric", None, gateway(Symmetric), true),
        ("both cone", client(Cone), gateway(Cone), true),
        ("cone and symmetric", client(Cone), gateway(Symmetric), false),
        ("both symmetric", client(Symmetric), gateway(Symmetric), false),
    ];
    for (name, client, gateway, direct) in table {
        let mut world = World::with_nats(epoch(), 1, client, gateway);
        world.run(Duration::from_secs(1));
        world.authorize(1);
        world.run_until(name, SOON, World::is_connected);
        world.run(SOON);
        let status = world.gateway.status();
        assert_eq!(status.peer_to_peer == 1, direct, "{name}: {world:#?}");
        assert!(world.reaches_the_client(name.as_bytes()), "{name}: {world:#?}");
    }
}

#[test]
fn a_client_behind_a_symmetric_router_is_learned_from_its_checks() {
    let mut world = World::with_nats(epoch(), 1, Some(Nat::new(NatKind::Symmetric, "192.0.2.1")), None);
    world.run(Duration::from_secs(1));
    world.authorize(1);
    world.run_until("direct", SOON, |w| matches!(w.path(), Some(Path::Direct { .. })) && w.is_connected());
    let Some(Path::Direct { remote, .. }) = world.path() else { unreachable!() };
    let signalled = world.client.signalled.join("\n");
    let text = format!("{} {}", remote.ip(), remote.port());
    assert!(remote.ip() == at("192.0.2.1:1").ip() && !signalled.contains(&text), "{remote} in {signalled}");
    assert!(world.reaches_the_client(b"data"));
}

#[test]
fn loss_and_latency_only_delay() {
    let mut world = World::new(epoch(), 1);
    world.link = Link { latency: Duration::from_millis(120), loses_one_in: 5, mtu: 1316 };
    world.run(Duration::from_secs(20));
    world.authorize(1);
    world.run_until("connected", Duration::from_secs(8), World::is_connected);
    world.run(Duration::from_secs(120));
    assert!(world.is_connected(), "{world:#?}");
}

#[test]
fn when_the_relay_is_removed_the_connection_migrates() {
    let mut world = World::new(epoch(), 2);
    world.direct_is_blocked = true;
    world.connect();
    let used = world.selected();
    let other = world.twins.iter().map(|(id, _)| *id).find(|id| *id != used).unwrap();
    let before = world.said.len();
    let index = world.index();
    world.ingress(Ingress::RelaysPresence { disconnected: vec![used], connected: vec![] });
    assert_eq!(world.selected(), other, "at once");
    let (added, removed) = (lines_since(&world, before, true), lines_since(&world, before, false));
    assert!(added.len() == 1 && added[0].contains("typ relay"), "{added:?}");
    assert!(removed.len() == 1 && removed[0].contains("typ relay"), "{removed:?}");
    world.run(Duration::from_secs(5));
    assert!(world.is_connected(), "{world:#?}");
    assert!(world.reaches_the_client(b"after"), "{world:#?}");
    assert_eq!(world.index(), index, "the same connection all along");
}

#[test]
fn without_another_relay_the_connection_waits_for_one() {
    let mut world = World::new(epoch(), 2);
    let init = world.init(None).relays;
    let (first, second) = (world.twins[0].0, world.twins[1].0);
    world.ingress(Ingress::RelaysPresence { disconnected: vec![second], connected: vec![] });
    world.connect();
    assert_eq!(world.selected(), first);
    world.ingress(Ingress::RelaysPresence { disconnected: vec![first], connected: vec![] });
    world.run(SOON);
    assert_eq!(world.said.iter().filter(|e| **e == Egress::NoRelays).count(), 1, "{:?}", world.said);
    assert_eq!(world.gateway.status().peer_to_peer, 1, "a direct path does not need it");
    let before = world.said.len();
    let second_only: Vec<_> = init.into_iter().filter(|r| r.id == second).collect();
    world.ingress(Ingress::RelaysPresence { disconnected: vec![], connected: second_only });
    world.run_until("migrated", SOON, |w| w.has_relay() && !lines_since(w, before, true).is_empty());
    assert_eq!(world.selected(), second);
    assert!(world.is_connected());
}

#[test]
fn while_the_portal_is_away_candidates_are_held() {
    let mut world = World::new(epoch(), 2);
    world.connect();
    let used = world.selected();
    let before = world.said.len();
    world.portal_goes();
    world
        .gateway
        .handle_ingress(Ingress::RelaysPresence { disconnected: vec![used], connected: vec![] }, world.now);
    world.run(Duration::from_secs(30));
    assert_eq!(world.said.len(), before, "nobody to tell");
    assert!(world.reaches_the_client(b"the data plane does not care"));
    world.portal_returns();
    assert_eq!(lines_since(&world, before, true).len(), 1);
    assert_eq!(lines_since(&world, before, false).len(), 1);
    let first = &world.said[before];
    assert!(matches!(first, Egress::BroadcastIceCandidates(..)), "additions first: {first:?}");
}

#[test]
fn a_client_that_falls_silent_keeps_its_path_and_one_that_withdraws_everything_loses_it() {
    let mut world = World::new(epoch(), 1);
    world.connect();
    let relay = world.client.withdraws(is::CandidateKind::Relayed);
    world.ingress(Ingress::InvalidateIceCandidates(world.client.id, vec![relay]));
    assert!(matches!(world.path(), Some(Path::Direct { .. })));
    world.run(SOON);
    let host = world.client.withdraws(is::CandidateKind::Host);
    let at = world.now;
    world.ingress(Ingress::InvalidateIceCandidates(world.client.id, vec![host]));
    world.run_until("failed", Duration::from_secs(3), |w| w.index().is_none());
    assert_eq!(world.now - at, Duration::from_secs(2), "the grace, exactly");
    assert_eq!(world.state().unwrap().resources.len(), 1, "authorizations stay");
}

#[test]
fn checks_follow_the_recorded_schedule() {
    // test-vectors.md section 6: 0, 0.25, 0.75, 1.75, 3.75 s for HEAD, and no pacing between pairs.
    let mut world = World::new(epoch(), 1);
    world.run(Duration::from_secs(1));
    world.authorize(1);
    world.link.mtu = 0;
    let host = |n| format!("candidate:1 1 udp 2130706175 192.0.2.{n} 52625 typ host ufrag o7vl");
    let began = world.now;
    world.ingress(Ingress::IceCandidates(world.client.id, vec![host(2), host(3)]));
    world.run(Duration::from_secs(4));
    for peer in ["192.0.2.2:52625", "192.0.2.3:52625"] {
        assert_eq!(checks(&world, began, |p| p.dst == at(peer)), [0, 250, 750, 1750, 3750], "{peer}");
    }
}

#[test]
fn a_signalled_relay_is_checked_at_once_and_a_host_with_the_second_try() {
    // connections.md section 6.4: the first check through our relay to a host only starts the binding.
    let relay = "candidate:1 1 udp 37748479 203.0.113.9 5000 typ relay raddr 0.0.0.0 rport 0 ufrag o7vl";
    let host = "candidate:1 1 udp 2130706175 192.0.2.2 52625 typ host ufrag o7vl";
    for (line, expect) in [(relay, [0, 250, 750]), (host, [250, 750, 1750])] {
        let mut world = World::new(epoch(), 1);
        world.run(Duration::from_secs(1));
        world.authorize(1);
        let began = world.now;
        world.direct_is_blocked = true;
        world.ingress(Ingress::IceCandidates(world.client.id, vec![line.to_owned()]));
        world.client.falls_silent();
        world.run(Duration::from_secs(2));
        let relayed = checks(&world, began, |p| gateway_common::channel_data::parse(&p.payload).is_some());
        assert_eq!(relayed[..3], expect, "{line}");
    }
}

#[test]
fn an_idle_connection_checks_every_25_seconds_until_data_flows() {
    let mut world = World::new(epoch(), 1);
    world.connect();
    world.run(Duration::from_secs(60));
    let to_client = |p: &Packet| p.dst == at("192.0.2.2:52625") && p.payload.starts_with(&[0, 1]);
    let idle_since = world.now;
    world.run(Duration::from_secs(100));
    assert_eq!(checks(&world, idle_since, to_client).len(), 4);
    let (id, index) = (world.client.id, world.index().unwrap());
    let now = world.now;
    world.worker_event(WorkerEvent::Activity { id, index, at: now });
    assert!(!world.gateway.connection(id).unwrap().is_idle());
    world.run(Duration::from_millis(19_999));
    assert!(!world.gateway.connection(id).unwrap().is_idle());
    world.run(Duration::from_millis(1));
    assert!(world.gateway.connection(id).unwrap().is_idle(), "20 s later, exactly");
    assert!(world.is_connected());
    assert!(checks(&world, now, to_client).len() >= 2, "every 15 s while data flows");
}

#[test]
fn a_path_through_an_allocation_that_went_is_none() {
    let mut world = World::new(epoch(), 1);
    world.direct_is_blocked = true;
    world.connect();
    world.run(SOON);
    assert!(matches!(world.path(), Some(Path::Relayed { .. })));
    let relay = world.selected();
    let before = world.sent.len();
    world.ingress(Ingress::RelaysPresence { disconnected: vec![relay], connected: vec![] });
    assert_eq!(world.path(), None);
    assert!(world.index().is_some(), "another relay may come");
    world.run(Duration::from_millis(500));
    let (_, twin) = &world.twins[0];
    let servers: Vec<_> = twin.entries(relay).iter().map(|r| r.addr).collect();
    assert!(world.sent[before..].iter().all(|(_, p)| !servers.contains(&p.dst)));
}

#[test]
fn when_the_direct_way_dies_the_client_is_followed_to_the_relayed_one_and_back() {
    let mut world = World::new(epoch(), 1);
    world.connect();
    world.run(Duration::from_secs(5));
    assert!(matches!(world.path(), Some(Path::Direct { .. })));
    world.direct_is_blocked = true;
    // The client gives its pair up after 16.5 s (connections.md section 6.6), the agent would keep it for 615 s.
    world.run_until("relayed", Duration::from_secs(40), |w| matches!(w.path(), Some(Path::Relayed { .. })));
    assert!(world.reaches_the_client(b"the long way"), "{world:#?}");
    world.run(Duration::from_secs(60));
    assert!(world.reaches_the_client(b"and it stays"), "{world:#?}");
    // Our checks on the direct pair go on, so that the client learns of it again.
    world.direct_is_blocked = false;
    world.run_until("direct", Duration::from_secs(30), |w| matches!(w.path(), Some(Path::Direct { .. })));
    world.run(Duration::from_secs(60));
    assert!(matches!(world.path(), Some(Path::Direct { .. })), "{world:#?}");
    assert!(world.reaches_the_client(b"the short way"), "{world:#?}");
}

#[test]
fn the_kind_of_a_path_names_the_relays_on_it() {
    let mut world = World::new(epoch(), 1);
    world.direct_is_blocked = true;
    world.connect();
    world.run(SOON);
    // "without a direct path both sides settle on client host <-> gateway's relay" (test-vectors.md section 5).
    let kind = world.gateway.connection(world.client.id).unwrap().path_kind();
    assert_eq!(kind, Some(PathKind::RelayToPeer), "{world:#?}");
}

/// When datagrams that `select` knows were sent, in milliseconds since `since`.
fn checks(world: &World, since: Instant, select: impl Fn(&Packet) -> bool) -> Vec<u128> {
    let sent = world.sent.iter().filter(|(at, packet)| *at >= since && select(packet));
    sent.map(|(at, _)| (*at - since).as_millis()).collect()
}

fn lines_since(world: &World, before: usize, added: bool) -> Vec<String> {
    let lines = |egress: &Egress| match egress {
        Egress::BroadcastIceCandidates(_, lines) if added => lines.clone(),
        Egress::BroadcastInvalidatedIceCandidates(_, lines) if !added => lines.clone(),
        _ => Vec::new(),
    };
    world.said[before..].iter().flat_map(lines).collect()
}

fn at(addr: &str) -> SocketAddr {
    addr.parse().unwrap()
}
