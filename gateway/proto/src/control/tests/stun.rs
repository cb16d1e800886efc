//! Recorded STUN gets the recorded answers; hostile STUN and hostile candidate lines get counted.

use std::net::SocketAddr;

use gateway_common::DropReason;
use is::{
    DefaultSha1HmacProvider, Sha1HmacProvider,
    stun::{StunMessage, TransId},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use zeroize::Zeroizing;

use super::*;
use crate::{
    command::{Command, Path, StunDatagram, WorkerEvent},
    portal::messages::IceCredentials,
};

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

/// The client nominates, and sends its first initiation, as soon as it has the answer to its first check. The shell takes
/// commands before datagrams.
#[test]
fn workers_know_where_a_check_came_from_when_its_answer_leaves() {
    let mut world = settled();
    world.authorize(1);
    told_addresses(&mut world);
    let from = |port| SocketAddr::from(([192, 0, 2, 2], port));
    let check = unhex(DIRECT[0].0);
    let mut forged = check.clone();
    forged[70] ^= 1;
    assert_eq!(answers_to(&mut world, &forged, from(1)).len(), 0);
    assert_eq!(told_addresses(&mut world), None, "a forged check");
    assert_eq!(answers_to(&mut world, &check, from(1)).len(), 1);
    assert_eq!(told_addresses(&mut world), Some(vec![from(1)]));
    assert_eq!(world.path(), None, "nothing is nominated");
    assert_eq!(answers_to(&mut world, &check, from(1)).len(), 1);
    assert_eq!(told_addresses(&mut world), None, "that is no news");
    for port in 2..=40 {
        answers_to(&mut world, &check, from(port));
    }
    let latest: Vec<_> = (25..=40).map(from).collect();
    assert_eq!(told_addresses(&mut world), Some(latest), "a bounded number, the latest");
    let mut again = world.client.authorize(1, None);
    again.client_ice.password = Zeroizing::new("another".to_owned());
    let now = world.now;
    world.gateway.handle_ingress(Ingress::Authorize(Box::new(again)), now);
    assert_eq!(told_addresses(&mut world), Some(vec![]), "a new connection has to prove them anew");
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
fn lines_repeated_with_every_authorization_do_not_use_the_bound_up() {
    let mut world = settled();
    world.authorize(1);
    let client = world.client.id;
    let mut says = |lines: &[&str]| {
        let lines = lines.iter().map(|&line| line.to_owned()).collect();
        let now = world.now;
        world.gateway.handle_ingress(Ingress::IceCandidates(client, lines), now);
        world.gateway.connection(client).unwrap().remotes()
    };
    let repeated = [
        "candidate:1 1 udp 2130706175 192.0.2.2 52625 typ host ufrag o7vl",
        "candidate:2 1 udp 2130706431 2001:db8:1::2 52625 typ host ufrag o7vl",
        "candidate:3 1 udp 37748479 203.0.113.1 5000 typ relay raddr 0.0.0.0 rport 0 ufrag o7vl",
    ];
    for _ in 0..3000 {
        assert_eq!(says(&repeated), 3);
    }
    assert_eq!(says(&["candidate:4 1 udp 37748479 203.0.113.9 6000 typ relay"]), 4, "its new relay is heard");
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
        world.gateway.handle_worker_event(
            WorkerEvent::Stun(StunDatagram { heard_by: crate::WorkerId::FIRST, local, from, via, payload }),
            now,
        );
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

/// What the gateway sends back to `from` because of `payload`.
/// What the workers hear of the client's addresses; `None` if they hear nothing of it.
fn told_addresses(world: &mut World) -> Option<Vec<SocketAddr>> {
    std::iter::from_fn(|| world.gateway.poll_command())
        .filter_map(|command| match command {
            Command::Client { desired: Some(state), .. } => Some(state.heard_from.to_vec()),
            _ => None,
        })
        .last()
}

fn answers_to(world: &mut World, payload: &[u8], from: SocketAddr) -> Vec<Vec<u8>> {
    let local = "198.51.100.2:52625".parse().unwrap();
    let datagram =
        StunDatagram { heard_by: crate::WorkerId::FIRST, local, from, via: None, payload: payload.to_vec() };
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

fn unhex(text: &str) -> Vec<u8> {
    hex::decode(text).unwrap()
}
