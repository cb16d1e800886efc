//! Tests of the spine: authorizations over time, reuse and replacement, recorded and hostile STUN.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use gateway_common::DropReason;
use is::{
    DefaultSha1HmacProvider, Sha1HmacProvider,
    stun::{StunMessage, TransId},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::{
    Event,
    sim::{UNIX_START, World, resource_of},
};
use crate::{
    command::{Connection, Path, StunDatagram, WorkerEvent},
    ids::{ClientId, ConnectionIndex, ResourceId},
    portal::messages::{
        AuthorizationRef, Authorize, Egress, Filter, IceCredentials, Ingress, Key, Resource, ResourceKind,
        UnixSeconds,
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

/// head-direct, frames 15, 16, 20 and 24: the client's request, the gateway's answer, with USE-CANDIDATE.
const DIRECT: [(&str, &str); 2] = [
    (
        "000100442112a44204aabf89ded5a3d7d712e61800060009377377683a6f37766c000000802a0008d8c03a1af0d48407002400046efffeff00080014823948aac6e276abf90a77dc8ed081bf3df3c0f08028000487665989",
        "0101002c2112a44204aabf89ded5a3d7d712e618002000080001ec83e112a6400008001412872ce8bc3c1c05085ae1506fbb72280cf76f038028000422ad8911",
    ),
    (
        "000100482112a442020331ce84a4537117d9d83b00060009377377683a6f37766c000000802a0008d8c03a1af0d48407002400046efffeff0025000000080014ad5a5979f3ec75f17149dd644afe0ac68593bccd8028000432ac60dd",
        "0101002c2112a442020331ce84a4537117d9d83b002000080001ec83e112a6400008001473d845aa30464bcf7bbe8a3bae0ee9dd3c0eebec80280004dde6754c",
    ),
];
/// nov25-relayed, frames 13 and 15.
const NOV25: (&str, &str) = (
    "000100442112a442d821f0c54ad8a140e9df1a3d00060009357a68753a78713370000000802a0008c875c49400245ab2002400046e3ffeff000800142f6824b08c2076f7be8dd97ad6ee16bf52b8517e80280004a95967aa",
    "0101002c2112a442d821f0c54ad8a140e9df1a3d002000080001f0aeea12d54000080014e5e4c1fe99255d03ccd2a403ee052660f3c93170802800046d173871",
);

#[test]
fn recorded_checks_get_the_recorded_answers() {
    let mut world = settled();
    world.authorize(1);
    let from: SocketAddr = "192.0.2.2:52625".parse().unwrap();
    for (i, (request, answer)) in DIRECT.iter().enumerate() {
        assert_eq!(world.path(), None, "before the nomination");
        let answers = answers_to(&mut world, &unhex(request), from);
        assert_eq!(answers, [unhex(answer)], "{i}");
        let parsed = StunMessage::parse(&answers[0]).unwrap();
        let hmac = |key: &[u8], payloads: &[&[u8]]| DefaultSha1HmacProvider.sha1_hmac(key, payloads);
        assert!(parsed.verify(b"v4gth7yrtmrzjum2tyhguq", hmac), "keyed with our own password");
        assert_eq!(parsed.mapped_address(), Some(from));
    }
    // "marks the pair nominated even before our own check succeeded" (connections.md section 6.7).
    let local = "198.51.100.2:52625".parse().unwrap();
    assert_eq!(state_path(&mut world), Some(Path::Direct { local, remote: from }));
}

#[test]
fn a_nov25_client_gets_its_recorded_answer() {
    let mut world = settled();
    let mut authorize = world.client.authorize(1, None);
    let ice = |username: &str, password: &str| IceCredentials {
        username: username.to_owned(),
        password: Zeroizing::new(password.to_owned()),
    };
    authorize.gateway_ice = ice("5zhu", "b7sdelehjyg2hjmvisvtyq");
    authorize.client_ice = ice("xq3p", "ekiwkaxl4fqvtjw4fybrlp");
    world.ingress(Ingress::Authorize(Box::new(authorize)));
    let answers = answers_to(&mut world, &unhex(NOV25.0), "203.0.113.2:53692".parse().unwrap());
    assert_eq!(answers, [unhex(NOV25.1)]);
}

#[test]
fn stun_for_nobody_is_counted_and_not_answered() {
    let request = unhex(DIRECT[0].0);
    let with = |at: usize, byte: u8| {
        let mut changed = request.clone();
        changed[at] = byte;
        changed
    };
    let table = [
        ("message integrity", with(70, 0)),
        ("our username", with(24, b'x')),
        ("their username", with(30, b'x')),
        ("claims our role", with(37, 0x29)),
        ("indication", with(1, 0x11)),
        ("error response", {
            let mut m = with(0, 1);
            m[1] = 0x11;
            m
        }),
        (
            "an answer to nothing",
            unhex(
                "0101002c2112a4427af4726cb3b42bdca991deda002000080001ec83e721c040000800141ab3232cb69d8a8c05911596cbf278db9e82ca7780280004e1d73941",
            ),
        ),
        ("cut", request[..40].to_vec()),
        ("no cookie", with(4, 0)),
    ];
    for (name, message) in table {
        let mut world = settled();
        world.authorize(1);
        let before = world.gateway.counters().get(DropReason::UnmatchedStun);
        assert_eq!(answers_to(&mut world, &message, "192.0.2.2:52625".parse().unwrap()).len(), 0, "{name}");
        let counted = world.gateway.counters().get(DropReason::UnmatchedStun) - before;
        assert_eq!(counted, 1, "{name}");
        assert_eq!(world.path(), None, "{name}");
    }
}

#[test]
fn a_peer_that_claims_our_role_is_ignored_and_we_keep_it() {
    // Authentic, and with a tie-breaker that would win.
    let request = StunMessage::binding_request("7swh:o7vl", TransId::new(), false, u64::MAX, 7, false);
    let mut claim = vec![0; 256];
    let hmac = |key: &[u8], payloads: &[&[u8]]| DefaultSha1HmacProvider.sha1_hmac(key, payloads);
    let len = request.to_bytes(Some(b"v4gth7yrtmrzjum2tyhguq"), &mut claim, hmac).unwrap();
    let mut world = settled();
    world.authorize(1);
    let answers = answers_to(&mut world, &claim[..len], "192.0.2.2:52625".parse().unwrap());
    assert_eq!(answers.len(), 0);
    world.run_until("connected", 3 * SECOND, World::is_connected);
    let checks: Vec<_> = world.sent.iter().filter(|(_, p)| p.payload.starts_with(&[0, 1, 0, 0x44])).collect();
    assert!(!checks.is_empty());
    for (_, check) in checks {
        assert!(StunMessage::parse(&check.payload).unwrap().ice_controlled().is_some());
    }
}

#[test]
fn no_secret_reaches_the_log_at_any_level() {
    let log = Log::default();
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(log.clone()).finish();
    // The client of the simulation is no part of the gateway: it is made without a log, and the ICE library writes
    // no credentials after that.
    let [first, second] = [(); 2].map(|()| World::bare(epoch(), 2, None, None));
    let (text, world) = tracing::subscriber::with_default(subscriber, || {
        // A log statement that another test's thread meets first, just now, may be cached as disabled: the first
        // turn is for that.
        life_of_a_client(first);
        tracing::callsite::rebuild_interest_cache();
        let world = life_of_a_client(second);
        (log.text(), world)
    });
    assert!(text.contains("Access allowed") && text.contains("TRACE"), "the log was looked at: {text}");
    assert!(!text.contains(" WARN "), "normal operation logs no WARN: {text}");
    let turn = world.init(None).relays.into_iter().map(|r| r.password.0.to_string());
    let ice = ["v4gth7yrtmrzjum2tyhguq".to_owned(), "5dm2b4nl6bk6m77jluz5md".to_owned()];
    for secret in turn.chain(ice) {
        assert!(!text.contains(&secret), "{secret}");
    }
}

#[test]
fn a_sender_of_many_ports_cannot_fill_our_memory() {
    let mut world = settled();
    world.authorize(1);
    let request = unhex(DIRECT[0].0);
    for port in 1000..3000 {
        answers_to(&mut world, &request, SocketAddr::from(([192, 0, 2, 2], port)));
    }
    assert_eq!(world.gateway.counters().get(DropReason::UnmatchedStun), 2000 - 256);
}

#[test]
fn repeated_and_withdrawn_candidates_cannot_fill_our_memory() {
    let mut world = settled();
    world.authorize(1);
    let client = world.client.id;
    // As a Nov-2025 client without translation repeats them.
    let lines = ["typ host ufrag o7vl", "typ srflx raddr 0.0.0.0 rport 0"]
        .map(|end| format!("candidate:1 1 udp 2130706175 192.0.2.2 52625 {end}"));
    for _ in 0..1000 {
        let now = world.now;
        world.gateway.handle_ingress(Ingress::IceCandidates(client, lines.to_vec()), now);
    }
    assert_eq!(world.gateway.connection(client).unwrap().remotes(), 1);
    for n in 0..4000_u32 {
        let [a, b] = [n / 250, n % 250];
        let line = vec![format!("candidate:1 1 udp 7 10.{a}.{b}.1 9 typ host")];
        let now = world.now;
        world.gateway.handle_ingress(Ingress::IceCandidates(client, line), now);
    }
    let kept = world.gateway.connection(client).unwrap().remotes();
    assert!((900..=2048).contains(&kept), "{kept}");
}

#[test]
fn malformed_stun_never_panics() {
    let mut world = settled();
    world.authorize(1);
    world.run_until("connected", 3 * SECOND, World::is_connected);
    let mut rng = StdRng::seed_from_u64(5);
    let seeds: Vec<Vec<u8>> = DIRECT.iter().flat_map(|(a, b)| [unhex(a), unhex(b)]).collect();
    let relay = world.twins[0].1.entries(world.twins[0].0)[0].addr;
    for round in 0..20_000 {
        let mut payload = seeds[round % seeds.len()].clone();
        for _ in 0..rng.random_range(0..6) {
            let at = rng.random_range(0..payload.len());
            payload[at] = rng.random();
        }
        if rng.random_ratio(1, 4) {
            payload.truncate(rng.random_range(0..=payload.len()));
        }
        if rng.random_ratio(1, 2) && payload.len() >= 20 {
            // A length that fits, so that the attributes are read.
            payload.truncate(payload.len() / 4 * 4);
            let length = u16::try_from(payload.len() - 20).unwrap().to_be_bytes();
            payload[2..4].copy_from_slice(&length);
        }
        let via = [None, Some(relay), Some("192.0.2.99:3478".parse().unwrap())][rng.random_range(0..3)];
        let from = [relay, "192.0.2.2:52625".parse().unwrap(), "[2001:db8::9]:1".parse().unwrap()]
            [rng.random_range(0..3)];
        let local = "198.51.100.2:52625".parse().unwrap();
        let now = world.now;
        world.gateway.handle_worker_event(WorkerEvent::Stun(StunDatagram { local, from, via, payload }), now);
        while world.gateway.poll_transmit().is_some() {}
    }
    world.run(SECOND);
    assert!(world.is_connected(), "and the connection does not mind\n{world:#?}");
}

#[test]
fn random_lines_from_the_portal_never_panic() {
    let mut world = settled();
    world.authorize(1);
    world.run_until("connected", 3 * SECOND, World::is_connected);
    let mut rng = StdRng::seed_from_u64(6);
    let seed = "candidate:1 1 udp 2130706175 10.1.2.3 52625 typ srflx raddr 0.0.0.0 rport 0 ufrag o7vl";
    let client = world.client.id;
    for _ in 0..3000 {
        let mut words: Vec<String> = seed.split(' ').map(str::to_owned).collect();
        let at = rng.random_range(0..words.len());
        words[at] = match rng.random_range(0..4) {
            0 => String::new(),
            1 => rng.random::<u32>().to_string(),
            2 => format!("10.{}.2.3", rng.random::<u8>()),
            _ => char::from_u32(rng.random_range(0..0xD800)).unwrap().to_string(),
        };
        let lines = vec![words.join(" ")];
        let now = world.now;
        world.gateway.handle_ingress(Ingress::IceCandidates(client, lines.clone()), now);
        if rng.random_ratio(1, 2) {
            world.gateway.handle_ingress(Ingress::InvalidateIceCandidates(client, lines), now);
        }
        while world.gateway.poll_transmit().is_some() {}
    }
    assert!(world.is_connected());
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

/// From `init` to the last rejected resource, with a relay lost in between.
fn life_of_a_client(mut world: World) -> World {
    world.portal_returns();
    let init = world.init(Some(vec![]));
    world.ingress(Ingress::Init(Box::new(init)));
    world.run(SECOND);
    world.authorize(1);
    world.authorize(1);
    world.run(5 * SECOND);
    let removed = world.twins[0].0;
    world.ingress(Ingress::RelaysPresence { disconnected: vec![removed], connected: vec![] });
    world.run(5 * SECOND);
    let client = world.client.id;
    world.ingress(Ingress::RejectAccess(client, ResourceId(Uuid::from_u128(1))));
    world
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

/// What the gateway sends back to `from` because of `payload`.
fn answers_to(world: &mut World, payload: &[u8], from: SocketAddr) -> Vec<Vec<u8>> {
    let local = "198.51.100.2:52625".parse().unwrap();
    let datagram = StunDatagram { local, from, via: None, payload: payload.to_vec() };
    let now = world.now;
    world.gateway.handle_worker_event(WorkerEvent::Stun(datagram), now);
    std::iter::from_fn(|| world.gateway.poll_transmit())
        .filter(|t| t.dst == from && t.src == Some(local) && t.payload.starts_with(&[1, 1]))
        .map(|t| t.payload)
        .collect()
}

/// The path after what the gateway has to say was taken in.
fn state_path(world: &mut World) -> Option<Path> {
    world.run(Duration::ZERO);
    world.portal_returns();
    world.path()
}

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl tracing_subscriber::fmt::MakeWriter<'_> for Log {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

fn unhex(text: &str) -> Vec<u8> {
    hex::decode(text).unwrap()
}
