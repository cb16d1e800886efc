//! Random steps against the twin: whatever happens, control gets a story that makes sense, the server sees no sin,
//! and nothing ever turns in a busy loop. Mutated and truncated messages never panic.

use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{
    LocalCandidate, Use,
    fixtures::*,
    twin::{Flavor, Packet, Twin},
    world::{Ledger, World, addr, id, secs},
};
use crate::command::ChannelUse;

/// `GATEWAY_RELAY_SEEDS` sets another number.
fn seeds() -> std::ops::Range<u64> {
    0..std::env::var("GATEWAY_RELAY_SEEDS").map_or(300, |n| n.parse().expect("a number"))
}

#[test]
fn random_histories_keep_every_invariant() {
    for seed in seeds() {
        run(seed, false);
    }
}

#[test]
fn random_histories_with_crowds_keep_every_invariant() {
    for seed in seeds() {
        run(seed, true);
    }
}

fn run(seed: u64, crowds: bool) {
    let mut rng = StdRng::seed_from_u64(seed);
    let flavor = |n: u64| if n.is_multiple_of(2) { Flavor::Firezone } else { Flavor::Coturn };
    let twins = vec![
        Twin::new(flavor(seed), &[addr("203.0.113.2:3478"), addr("[2001:db8:1::2]:3478")], seed),
        Twin::new(flavor(seed / 2), &[addr("203.0.113.3:5000")], seed),
    ];
    let mut world = World::new(twins, seed);
    let mut ledger = Ledger::default();
    world.connect(&[0, 1]);
    for step in 0..120 {
        if crowds && step % 16 == 0 {
            crowd(&mut world, step / 16 % 2);
        }
        act(&mut world, &mut rng);
        world.pump();
        let time = match rng.random_range(0..10) {
            0..6 => Duration::from_millis(rng.random_range(1..2000)),
            6..9 => secs(rng.random_range(1..60)),
            _ => secs(rng.random_range(60..1500)),
        };
        world.run(time);
        let events = world.take_events();
        assert!(events.len() < 400, "seed {seed} step {step}: {} events", events.len());
        ledger.follow(&events);
        let sent = std::mem::take(&mut world.sent).len();
        assert!(sent < 600, "seed {seed} step {step}: {sent} requests in {time:?}");
        for twin in &world.twins {
            assert!(twin.sins.is_empty(), "seed {seed} step {step}: {:?}", twin.sins);
        }
        world.data.clear();
        world.delivered.clear();
    }
    // In calm weather everything comes up again.
    (world.loss, world.duplicates) = (0, 0);
    for twin in &mut world.twins {
        twin.deaf = false;
        twin.refuse = None;
    }
    world.run(secs(120));
    world.connect(&[0, 1]);
    world.run(secs(120));
    ledger.follow(&world.take_events());
    for n in 0..2 {
        assert!(!world.relays.relayed(id(n)).is_empty(), "seed {seed}: relay {n} is down");
        let peer = addr("192.0.2.77:7777");
        world.relays.bind(id(n), peer, Use::Nominated, world.now);
        world.pump();
        world.run(secs(1));
        assert!(
            world.relays.channel(id(n), peer, world.now).is_some(),
            "seed {seed}: relay {n} binds nothing"
        );
    }
}

/// More at once than a relay's window, some of whom leave at once.
fn crowd(world: &mut World, relay: u8) {
    let relay = id(u128::from(relay));
    for n in 0..40 {
        let peer = addr(&format!("192.0.3.{n}:4000"));
        let why = [Use::Signalled, Use::Checked, Use::Nominated][n % 3];
        world.relays.bind(relay, peer, why, world.now);
        if n % 5 == 4 {
            world.relays.release(relay, peer);
        }
    }
}

fn act(world: &mut World, rng: &mut StdRng) {
    let which = rng.random_range(0..2_usize);
    let relay = id(which as u128);
    let peer = if rng.random_bool(0.2) {
        format!("[2001:db8:9::{:x}]:4000", rng.random_range(1..9)).parse().unwrap()
    } else {
        format!("192.0.2.{}:4000", rng.random_range(1..30)).parse().unwrap()
    };
    match rng.random_range(0..24) {
        0..6 => {
            let why = [Use::Signalled, Use::Checked, Use::Nominated][rng.random_range(0..3)];
            world.relays.bind(relay, peer, why, world.now);
        }
        6..9 => world.relays.release(relay, peer),
        9..12 => {
            if let Some(transmit) = world.relays.wrap(relay, peer, b"a check", world.now) {
                let src = World::local(transmit.dst);
                world.send(Packet { src, dst: transmit.dst, payload: transmit.payload });
            }
        }
        12..14 => {
            if let Some((server, number)) = world.relays.channel(relay, peer, world.now) {
                let (received, sent) = (rng.random(), rng.random());
                world
                    .relays
                    .handle_channels_used(&[ChannelUse { server, number, received, sent }], world.now);
            }
        }
        14 => world.loss = [0, 0, 50, 300][rng.random_range(0..4)],
        15 => world.duplicates = [0, 0, 50, 300][rng.random_range(0..4)],
        16 => world.delay = Duration::from_millis([1, 10, 150, 700][rng.random_range(0..4)]),
        17 => world.twins[which].restart(),
        18 => world.twins[which].drop_allocations(),
        19 => world.twins[which].deaf = rng.random_bool(0.3),
        20 => {
            let method = [3, 4, 9][rng.random_range(0..3)];
            let code = [400, 420, 437, 441, 486, 500, 508][rng.random_range(0..7)];
            world.twins[which].refuse = rng.random_bool(0.5).then_some((method, code));
        }
        21 => {
            let password = format!("password {}", rng.random::<u32>());
            let name = format!("{}:twin", rng.random::<u32>());
            match rng.random_range(0..4) {
                0 => world.twins[which].set_password(&password),
                1 => world.twins[which].set_credentials(&name, &password),
                2 => world.twins[which].add_credentials(&name, &password),
                _ => world.twins[which].expire_credentials(),
            }
        }
        22 => world.connect([&[0, 1][..], &[0], &[1], &[]][rng.random_range(0..4)]),
        _ => {
            let entries = world.twins[which].entries(relay);
            world.relays.update(&[relay], if rng.random() { &entries } else { &[] }, world.now);
        }
    }
    if let Some(LocalCandidate::Relayed { addr: dst, .. }) = world.relays.relayed(relay).first().copied()
        && dst.is_ipv4() == peer.is_ipv4()
    {
        world.send(Packet { src: peer, dst, payload: b"from a peer".to_vec() });
    }
}

#[test]
fn mutated_messages_never_panic_and_are_consumed() {
    let recorded: Vec<Vec<u8>> = [
        DIRECT_BINDING,
        DIRECT_BINDING_SUCCESS,
        DIRECT_CHALLENGE,
        DIRECT_ALLOCATE_SUCCESS,
        DIRECT_BIND_SUCCESS,
        NOV25_BIND_SUCCESS,
    ]
    .iter()
    .map(|text| hex::decode(text).unwrap())
    .collect();
    let mut rng = StdRng::seed_from_u64(7);
    let mut world = World::with_one(Flavor::Coturn, 3478);
    world.loss = 1000;
    let server = addr("203.0.113.2:3478");
    for round in 0..40_000 {
        let mut bytes = recorded[rng.random_range(0..recorded.len())].clone();
        // Half of them answer what is in flight, so that they get past the transaction id.
        if rng.random()
            && let Some((_, _, request)) = world.sent.last()
        {
            bytes[8..20].copy_from_slice(&request.payload[8..20]);
            bytes[1] = (bytes[1] & 0xF0) | (request.payload[1] & 0x0F);
        }
        for _ in 0..rng.random_range(0..6) {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = rng.random();
        }
        if rng.random_bool(0.3) {
            bytes.truncate(rng.random_range(0..bytes.len()));
        }
        if rng.random_bool(0.2) {
            bytes.extend((0..rng.random_range(1..40)).map(|_| rng.random::<u8>()));
        }
        if rng.random_bool(0.5) && bytes.len() >= 20 {
            let length = u16::try_from((bytes.len() - 20) & !3).unwrap();
            bytes.truncate(20 + usize::from(length));
            bytes[2..4].copy_from_slice(&length.to_be_bytes());
        }
        if world.relays.server(id(0)).is_none() {
            world.loss = 0;
            world.relays.update(&[id(0)], &world.twins[0].entries(id(0)), world.now);
            world.run(secs(1));
            world.loss = 1000;
        }
        assert!(world.receive(server, &bytes), "round {round}");
        if round % 16 == 0 {
            world.relays.bind(id(0), addr("192.0.2.2:4000"), Use::Checked, world.now);
            world.run(Duration::from_millis(700));
        }
        if round % 1000 == 0 {
            world.take_events();
            let keep = world.sent.len().saturating_sub(4);
            world.sent.drain(..keep);
        }
    }
    let dropped: u64 = world.relays.counters().iter().map(|(_, n)| n).sum();
    assert!(dropped > 30_000, "{dropped}");
}
