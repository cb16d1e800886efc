//! Tests of the spine: authorizations over time, reuse and replacement.

mod homes;
mod log;
mod names;
mod records;
mod relays;
mod stun;

use std::time::{Duration, Instant};

use uuid::Uuid;
use zeroize::Zeroizing;

use super::{
    Event,
    sim::{UNIX_START, World, resource_of},
};
use crate::{
    command::{Connection, WorkerEvent},
    ids::{ClientId, ConnectionIndex, ResourceId},
    portal::messages::{
        AuthorizationRef, Authorize, Egress, Filter, Ingress, Key, Resource, ResourceKind, UnixSeconds,
    },
    relay::twin,
};

const SECOND: Duration = Duration::from_secs(1);

/// Some instant to count from: the core itself never reads a clock.
pub(crate) fn epoch() -> Instant {
    twin::start()
}

#[test]
fn the_same_authorization_again_reuses_the_connection_and_signals_every_candidate_again() {
    let mut world = settled();
    world.authorize(1);
    world.run_until("connected", 3 * SECOND, World::is_connected);
    let (index, path, first) = (world.index(), world.path(), world.said.clone());
    world.run(SECOND);
    world.authorize(2);
    let again = &world.said[first.len()..];
    assert_eq!(again[0], Egress::Authorized { reference: "ref-2".into() });
    assert_eq!(again[1..], first[1..], "candidates as the first time");
    assert_eq!((world.index(), world.path()), (index, path));
    assert_eq!(resources(&world), [1, 2]);
}

#[test]
fn what_makes_a_connection_decides_whether_it_is_reused() {
    type Change = fn(&mut Authorize);
    let table: [(&str, Change, bool); 8] = [
        ("nothing", |_| (), true),
        ("resource", |a| a.resource = resource_of(9), true),
        ("tunnel addresses", |a| a.client.tunnel.v4 = [100, 64, 9, 9].into(), true),
        ("public key", |a| a.client.public_key = [8; 32], false),
        ("preshared key", |a| a.client.preshared_key = Key(Zeroizing::new([1; 32])), false),
        ("local username", |a| a.gateway_ice.username = "xxxx".into(), false),
        ("local password", |a| a.gateway_ice.password = Zeroizing::new("y".repeat(22)), false),
        ("remote password", |a| a.client_ice.password = Zeroizing::new("y".repeat(22)), false),
    ];
    for (name, change, reused) in table {
        let mut world = settled();
        world.authorize(1);
        world.run_until("connected", 3 * SECOND, World::is_connected);
        let before = world.index();
        let mut authorize = world.client.authorize(1, None);
        change(&mut authorize);
        world.ingress(Ingress::Authorize(Box::new(authorize)));
        assert_eq!(world.index() == before, reused, "{name}");
        assert!(world.index().is_some(), "{name}");
        assert_eq!(world.path().is_some(), reused, "{name}: a new connection has no path yet");
        let acknowledgements = world.said.iter().filter(|e| matches!(e, Egress::Authorized { .. })).count();
        assert_eq!(acknowledgements, 2, "{name}");
    }
}

#[test]
fn new_tunnel_addresses_start_the_clients_access_afresh() {
    let mut world = settled();
    world.authorize(1);
    world.authorize(2);
    let mut moved = world.client.authorize(3, None);
    moved.client.tunnel.v4 = [100, 64, 7, 7].into();
    world.ingress(Ingress::Authorize(Box::new(moved.clone())));
    assert_eq!(resources(&world), [3]);
    assert_eq!(world.state().unwrap().tunnel, moved.client.tunnel);
}

#[test]
fn without_a_relay_an_authorization_waits_and_is_acknowledged_when_served() {
    let mut world = World::bare(epoch(), 1, None, None);
    world.portal_returns();
    let init = world.init(Some(vec![]));
    let relays = init.relays.clone();
    let no_relays = Ingress::Init(Box::new(crate::portal::messages::Init { relays: vec![], ..init }));
    world.ingress(no_relays);
    world.authorize(1);
    assert_eq!(world.said, [Egress::NoRelays], "at once, and not acknowledged");
    assert!(world.state().is_none());
    world.run(11 * SECOND);
    world.ingress(Ingress::RelaysPresence { disconnected: vec![], connected: relays });
    world.run(Duration::from_millis(100));
    assert_eq!(world.said[1], Egress::Authorized { reference: "ref-1".into() });
    assert_eq!(resources(&world), [1]);
}

#[test]
fn a_waiting_authorization_is_forgotten_when_it_is_superseded_or_too_old() {
    let init = |world: &mut World, list| {
        let init = world.init(list);
        Ingress::Init(Box::new(crate::portal::messages::Init { relays: vec![], ..init }))
    };
    type Between = Box<dyn Fn(&mut World)>;
    let client = ClientId(Uuid::from_u128(0xC));
    let reject = move |n| Ingress::RejectAccess(client, ResourceId(Uuid::from_u128(n)));
    let table: [(&str, Between, bool); 6] = [
        ("nothing", Box::new(|_| ()), true),
        ("rejected", Box::new(move |w| w.ingress(reject(1))), false),
        ("another one rejected", Box::new(move |w| w.ingress(reject(2))), true),
        (
            "init",
            Box::new(move |w| {
                let i = init(w, Some(vec![]));
                w.ingress(i)
            }),
            false,
        ),
        (
            "init without a list",
            Box::new(move |w| {
                let i = init(w, None);
                w.ingress(i)
            }),
            true,
        ),
        ("12 s", Box::new(|w| w.run(12 * SECOND)), false),
    ];
    for (name, between, served) in table {
        let mut world = World::bare(epoch(), 1, None, None);
        world.portal_returns();
        world.authorize(1);
        between(&mut world);
        let connected = world.init(None).relays;
        world.ingress(Ingress::RelaysPresence { disconnected: vec![], connected });
        world.run(SECOND);
        let acknowledged = world.said.contains(&Egress::Authorized { reference: "ref-1".into() });
        assert_eq!(acknowledged, served, "{name}: {:?}", world.said);
        assert_eq!(world.state().is_some(), served, "{name}");
    }
}

#[test]
fn access_ends_when_it_expires_to_the_second() {
    let mut world = settled();
    let expiring = |world: &World, n, after: u64| {
        Ingress::Authorize(Box::new(world.client.authorize(n, Some(UNIX_START + after))))
    };
    let (first, second) = (expiring(&world, 1, 30), expiring(&world, 2, 40));
    world.ingress(first);
    world.ingress(second);
    world.run(world.start + 30 * SECOND - world.now - Duration::from_millis(1));
    assert_eq!(resources(&world), [1, 2]);
    world.run(Duration::from_millis(1));
    assert_eq!(resources(&world), [2]);
    // The portal of Nov-2025 moves the end.
    let client = world.client.id;
    let id = ResourceId(Uuid::from_u128(2));
    world.ingress(Ingress::ExpiryUpdated(client, id, UnixSeconds(UNIX_START + 60)));
    world.run(15 * SECOND);
    assert_eq!(resources(&world), [2]);
    world.run(15 * SECOND);
    assert!(world.states[&client].is_none(), "the last one: goodbye and gone");
    assert_eq!(world.gateway.status().clients, 0);
}

#[test]
fn access_ends_by_the_wall_clock_wherever_it_is_set() {
    // Granted for 100 s. After 10 s the clock steps by so many seconds; the access ends so many seconds after the grant.
    let table = [(0, 100), (30, 70), (-50, 150), (89, 11), (90, 10), (100_000, 10), (-1_000_000, 1_000_100)];
    for (step, ends) in table {
        let mut world = settled();
        let granted = UNIX_START + 1;
        let grant = |world: &World, n| world.client.authorize(n, Some(granted + 100));
        let first = grant(&world, 1);
        world.ingress(Ingress::Authorize(Box::new(first)));
        world.authorize(2);
        world.run(10 * SECOND);
        let unix = i64::try_from(granted + 10).unwrap() + step;
        // Twice: a tick tells what is known already.
        for _ in 0..2 {
            world.wall_clock(Duration::from_secs(u64::try_from(unix).unwrap()));
        }
        let left = Duration::from_secs(ends - 10);
        if !left.is_zero() {
            let nearly = left - Duration::from_millis(1);
            world.skip(nearly);
            assert_eq!(resources(&world), [1, 2], "{step}");
            world.skip(Duration::from_millis(1));
        }
        assert_eq!(resources(&world), [2], "{step}");
    }
}

#[test]
fn a_clock_that_is_corrected_bit_by_bit_is_followed_within_a_quarter_of_a_second() {
    let mut world = settled();
    let first = world.client.authorize(1, Some(UNIX_START + 1 + 1000));
    world.ingress(Ingress::Authorize(Box::new(first)));
    world.authorize(2);
    // It runs 1 % fast, as a clock does that catches up.
    let mut ended = None;
    for tick in 1..=1000_u64 {
        world.skip(SECOND);
        world.wall_clock(Duration::from_secs(UNIX_START + 1) + Duration::from_millis(1010 * tick));
        if ended.is_none() && resources(&world) == [2] {
            ended = Some(tick);
        }
    }
    assert!(matches!(ended, Some(990..=991)), "{ended:?}");
}

#[test]
fn an_authorization_that_ended_in_the_past_is_not_served() {
    let mut world = settled();
    let past = world.client.authorize(1, Some(UNIX_START - 1));
    world.ingress(Ingress::Authorize(Box::new(past)));
    assert!(world.said.is_empty() && world.state().is_none(), "{:?}", world.said);
    world.authorize(1);
    let past = world.client.authorize(1, Some(UNIX_START - 1));
    world.ingress(Ingress::Authorize(Box::new(past)));
    assert!(world.states[&world.client.id].is_none(), "and ends what there was");
}

#[test]
fn times_beyond_reckoning_never_come() {
    let mut world = settled();
    let far = world.client.authorize(1, Some(u64::MAX));
    world.ingress(Ingress::Authorize(Box::new(far)));
    world.run(60 * SECOND);
    assert_eq!(resources(&world), [1]);
}

#[test]
fn an_init_takes_away_what_it_does_not_list() {
    let listed = |world: &World, n, expires: Option<u64>| AuthorizationRef {
        client: world.client.id,
        resource: ResourceId(Uuid::from_u128(n)),
        expires_at: expires.map(|after| UnixSeconds(UNIX_START + after)),
    };
    type List = Option<&'static [(u128, Option<u64>)]>;
    // Name, seconds between grant and init, the list, what is left.
    let table: [(&str, u64, List, &[u128]); 8] = [
        ("all listed", 10, Some(&[(1, None), (2, None)]), &[1, 2]),
        ("one listed", 10, Some(&[(2, None)]), &[2]),
        ("none listed", 10, Some(&[]), &[]),
        ("none listed, but granted just before", 4, Some(&[]), &[1, 2]),
        ("none listed, granted 5 s before", 5, Some(&[]), &[]),
        ("no list at all", 10, None, &[1, 2]),
        ("listed as past", 10, Some(&[(1, Some(0)), (2, None)]), &[2]),
        (
            "listed twice: the longer counts",
            10,
            Some(&[(1, Some(0)), (1, None), (2, None), (2, Some(0))]),
            &[1, 2],
        ),
    ];
    for (name, age, list, left) in table {
        let mut world = settled();
        world.authorize(1);
        world.authorize(2);
        world.run(Duration::from_secs(age));
        let list = list.map(|list| list.iter().map(|(n, expires)| listed(&world, *n, *expires)).collect());
        let init = world.init(list);
        world.ingress(Ingress::Init(Box::new(init)));
        assert_eq!(resources(&world), left, "{name}");
        assert_eq!(world.states[&world.client.id].is_none(), left.is_empty(), "{name}");
    }
}

#[test]
fn every_init_names_the_interface_and_flow_logs_only_when_they_come() {
    let mut world = settled();
    let init = world.init(Some(vec![]));
    let interface = init.interface;
    world.ingress(Ingress::Init(Box::new(init)));
    assert_eq!(world.events, [Event::Interface(interface), Event::Interface(interface)]);
}

#[test]
fn the_last_rejected_resource_closes_the_connection() {
    let mut world = settled();
    world.authorize(1);
    world.authorize(2);
    world.run_until("connected", 3 * SECOND, World::is_connected);
    let (client, index) = (world.client.id, world.index());
    let reject = |n| Ingress::RejectAccess(client, ResourceId(Uuid::from_u128(n)));
    world.ingress(reject(3));
    assert_eq!(resources(&world), [1, 2]);
    world.ingress(reject(1));
    assert_eq!(resources(&world), [2]);
    assert_eq!(world.index(), index);
    world.ingress(reject(2));
    assert!(world.states[&client].is_none());
    assert_eq!(world.gateway.status().clients, 0);
    let said = world.said.len();
    world.run(60 * SECOND);
    assert_eq!(world.said.len(), said, "nothing more about it");
}

#[test]
fn only_filters_of_a_resource_change() {
    let cidr = |network: &str, filters| ResourceKind::Cidr {
        name: "new name".into(),
        network: network.parse().unwrap(),
        filters,
    };
    let only_icmp = vec![Filter::Icmp];
    let table = [
        ("filters", cidr("172.20.1.0/24", only_icmp.clone()), only_icmp.clone()),
        ("filters and address", cidr("10.0.0.0/8", only_icmp.clone()), only_icmp.clone()),
        ("type", ResourceKind::Internet, vec![]),
    ];
    for (name, kind, expect) in table {
        let mut world = settled();
        world.authorize(1);
        world.ingress(Ingress::ResourceUpdated(Resource { id: ResourceId(Uuid::from_u128(1)), kind }));
        let ResourceKind::Cidr { network, filters, name: display } =
            &world.state().unwrap().resources[0].kind
        else {
            panic!("{name}: the type changed")
        };
        assert_eq!((network.to_string().as_str(), filters), ("172.20.1.0/24", &expect), "{name}");
        assert_eq!(display, "lan 1");
    }
}

#[test]
fn a_goodbye_takes_everything_and_an_expired_session_only_the_connection() {
    let mut world = settled();
    world.authorize(1);
    world.run_until("connected", 3 * SECOND, World::is_connected);
    let (id, index) = (world.client.id, world.index().unwrap());
    let older = ConnectionIndex::new(index.get() ^ 1).unwrap();
    for event in [WorkerEvent::Goodbye { id, index: older }, WorkerEvent::Expired { id, index: older }] {
        world.worker_event(event);
        assert_eq!(world.index(), Some(index), "about an older connection");
    }
    world.worker_event(WorkerEvent::Established { id, index });
    world.worker_event(WorkerEvent::Expired { id, index });
    assert!(matches!(world.state().unwrap().connection, Connection::Absent));
    assert_eq!(resources(&world), [1], "authorizations stay");
    world.authorize(1);
    let index = world.index().unwrap();
    world.worker_event(WorkerEvent::Goodbye { id, index });
    assert!(world.states[&id].is_none());
    assert_eq!(world.gateway.status().clients, 0);
}

#[test]
fn a_connection_without_candidates_fails_after_ten_seconds() {
    let mut world = settled();
    let mut stranger = world.client.authorize(1, None);
    stranger.client.id = ClientId(Uuid::from_u128(77));
    let id = stranger.client.id;
    let began = world.now;
    world.ingress(Ingress::Authorize(Box::new(stranger)));
    world.run_until("failed", 11 * SECOND, |w| {
        matches!(w.states[&id].as_ref().unwrap().connection, Connection::Absent)
    });
    assert_eq!(world.now - began, 10 * SECOND);
    assert_eq!(world.states[&id].as_ref().unwrap().resources.len(), 1);
}

#[test]
fn candidates_that_come_first_are_used_when_their_client_comes() {
    let mut world = settled();
    let client = world.client.id;
    let line = "candidate:1 1 udp 2130706175 192.0.2.2 52625 typ host ufrag o7vl".to_owned();
    world.ingress(Ingress::IceCandidates(client, vec![line]));
    world.run(SECOND);
    world.gateway.handle_ingress(Ingress::Authorize(Box::new(world.client.authorize(1, None))), world.now);
    let to_client = std::iter::from_fn(|| world.gateway.poll_transmit())
        .filter(|t| t.dst == "192.0.2.2:52625".parse().unwrap())
        .count();
    assert_eq!(to_client, 1, "a check at once");
}

#[test]
fn what_cannot_be_served_is_refused_without_an_acknowledgement() {
    type Change = fn(&mut Authorize);
    let table: [(&str, Change); 5] = [
        ("without ICE", |a| a.use_iceless = true),
        ("no local username", |a| a.gateway_ice.username.clear()),
        ("a colon in the username", |a| a.client_ice.username = "a:b".into()),
        ("a username that cannot be written", |a| a.client_ice.username = "x".repeat(124)),
        ("white space", |a| a.client_ice.username = "a b".into()),
    ];
    for (name, change) in table {
        let mut world = settled();
        let mut authorize = world.client.authorize(1, None);
        change(&mut authorize);
        world.ingress(Ingress::Authorize(Box::new(authorize)));
        assert!(world.said.is_empty() && world.state().is_none(), "{name}");
    }
    // The longest that can be written is served, and its checks go out.
    let mut world = settled();
    let mut authorize = world.client.authorize(1, None);
    authorize.client_ice.username = "x".repeat(123);
    world.ingress(Ingress::Authorize(Box::new(authorize)));
    let line = "candidate:1 1 udp 2130706175 192.0.2.2 52625 typ host".to_owned();
    world.ingress(Ingress::IceCandidates(world.client.id, vec![line]));
    assert!(world.state().is_some());
    world.run(SECOND);
}

#[test]
fn acknowledgements_wait_for_the_portal_for_a_while() {
    for (away, told) in [(10, true), (15, false)] {
        let mut world = settled();
        world.portal_goes();
        world.authorize(1);
        world.run(Duration::from_secs(away));
        world.portal_returns();
        let acknowledged = world.said.contains(&Egress::Authorized { reference: "ref-1".into() });
        assert_eq!(acknowledged, told, "after {away} s");
    }
}

#[test]
fn many_clients_cost_the_spine_nothing_when_one_is_due() {
    let mut world = settled();
    for n in 0..500_u128 {
        let mut authorize = world.client.authorize(1, Some(UNIX_START + 1000));
        authorize.client.id = ClientId(Uuid::from_u128(1000 + n));
        authorize.gateway_ice.username = format!("g{n}");
        world.gateway.handle_ingress(Ingress::Authorize(Box::new(authorize)), world.now);
    }
    while world.gateway.poll_command().is_some() {}
    // All 500 fail for want of candidates at one instant; then nobody is due before the expiry but relays.
    world.run(11 * SECOND);
    assert_eq!(world.gateway.status(), super::Status { relays: 1, clients: 500, ..super::Status::default() });
}

/// A world whose relay has answered.
fn settled() -> World {
    let mut world = World::new(epoch(), 1);
    world.run(SECOND);
    world
}

/// The numbers of the resources the client may reach.
fn resources(world: &World) -> Vec<u128> {
    world.state().map(|s| s.resources.iter().map(|r| r.id.0.as_u128()).collect()).unwrap_or_default()
}
