//! What clients share on a relay, and how a relay that forgot us is found out.

use super::*;
use crate::relay::twin::Packet;

/// The STUN type of CHANNEL_BIND.
const BIND: u16 = 0x0009;
const REFRESH: u16 = 0x0004;

#[test]
fn a_channel_of_two_clients_lives_until_the_second_leaves() {
    for leave in [0_u128, 1, 2] {
        let mut world = settled();
        let began = world.now;
        // Two clients behind one router: one relayed address signalled by both.
        let line = "candidate:1 1 udp 37748479 203.0.113.9 5000 typ relay raddr 0.0.0.0 rport 0 ufrag o7vl";
        let clients: Vec<ClientId> = [51, 52].map(|n| ClientId(Uuid::from_u128(n))).into();
        for (n, client) in clients.iter().enumerate() {
            let mut authorize = world.client.authorize(1, None);
            authorize.client.id = *client;
            authorize.gateway_ice.username = format!("g{n}");
            world.ingress(Ingress::Authorize(Box::new(authorize)));
            world.ingress(Ingress::IceCandidates(*client, vec![line.to_owned()]));
        }
        assert_eq!(world.gateway.shared.held_channels(), 1);
        world.run(began + 239 * SECOND - world.now);
        for client in &clients[..usize::try_from(leave).unwrap()] {
            world.ingress(Ingress::RejectAccess(*client, ResourceId(Uuid::from_u128(1))));
        }
        assert_eq!(world.gateway.shared.held_channels(), usize::from(leave < 2));
        // The success came 10 ms after the bind, and the next check, which would ask again, is due at 240.75 s.
        let due = began + 240 * SECOND + Duration::from_millis(10);
        world.run(due - world.now);
        let refreshed = world.sent.iter().any(|(at, packet)| *at == due && kind(packet) == BIND);
        assert_eq!(refreshed, leave < 2, "{leave} of two left");
    }
}

#[test]
fn a_relay_that_forgot_everybody_is_found_out_in_seconds() {
    // Name, client idle before, how long until data flows again.
    let table = [("active", false, Duration::from_millis(3600)), ("idle", true, 29 * SECOND)];
    for (name, idle, limit) in table {
        for phase in 0..8 {
            let mut world = relayed();
            world.run(30 * SECOND + phase * Duration::from_millis(190));
            if !idle {
                active(&mut world, 4);
            }
            let (index, before) = (world.index(), world.path());
            world.twins[0].1.restart();
            let restarted = world.now;
            while !world.reaches_the_client(format!("{:?}", world.now).as_bytes()) {
                assert!(world.now - restarted < limit, "{name} {phase}: {world:#?}");
                if !idle {
                    active(&mut world, 1);
                }
                world.run(Duration::from_millis(50));
            }
            assert_eq!(world.index(), index, "{name}: the same connection");
            assert!(before.is_some() && world.path().is_some(), "{name}");
            assert!(world.twins[0].1.sins.is_empty(), "{:?}", world.twins[0].1.sins);
        }
    }
}

#[test]
fn a_client_that_comes_back_first_makes_us_ask_its_relay() {
    let mut world = relayed();
    world.run(60 * SECOND);
    world.twins[0].1.restart();
    let before = world.said.len();
    // Not at an instant when the relay has just proved itself.
    world.run(5 * SECOND);
    world.authorize(2);
    world.run(Duration::from_millis(100));
    let relayed = |egress: &Egress| matches!(egress, Egress::BroadcastIceCandidates(_, lines) if lines.iter().any(|l| l.contains("typ relay")));
    let told = world.said[before..].iter().filter(|egress| relayed(egress)).count();
    assert_eq!(told, 2, "the one that is dead, again, and the new one: {:?}", &world.said[before..]);
}

#[test]
fn a_quiet_relay_with_many_clients_is_asked_no_more_often() {
    let mut world = relayed();
    active(&mut world, 3);
    world.client.falls_silent();
    let began = world.now;
    world.run(100 * SECOND);
    let asked: Vec<_> = requests(&world, began, REFRESH);
    // 20 s until the connection is idle, then our own checks every 25 s.
    assert!((3..=8).contains(&asked.len()), "{asked:?}");
    assert!(asked.windows(2).all(|pair| pair[1] - pair[0] >= 5000), "{asked:?}");
    assert!(world.path().is_some(), "the relay answers, so nothing is lost but the client");
}

#[test]
fn a_healthy_relayed_connection_asks_nothing() {
    let mut world = relayed();
    active(&mut world, 30);
    let began = world.now;
    active(&mut world, 60);
    world.run(200 * SECOND);
    assert_eq!(requests(&world, began, REFRESH), [], "before the half of the allocation's life");
}

#[test]
fn a_relayed_path_survives_every_init_of_a_nov_2025_portal() {
    let mut world = relayed();
    active(&mut world, 3);
    let (index, path, channels) = (world.index(), world.path(), world.gateway.shared.held_channels());
    for n in 0..4 {
        // The portal was away, and names the relays with new credentials.
        world.twins[0].1.add_credentials(&format!("18000000{n}0:twin"), &format!("password {n}"));
        let init = world.init(None);
        world.ingress(Ingress::Init(Box::new(init)));
        let began = world.now;
        while world.now < began + 5 * SECOND {
            assert!(world.reaches_the_client(format!("{:?}", world.now).as_bytes()), "{n}: {world:#?}");
            active(&mut world, 1);
        }
        assert_eq!((world.index(), world.path()), (index, path), "{n}");
        assert_eq!(world.gateway.shared.held_channels(), channels, "{n}");
    }
    assert!(world.twins[0].1.sins.is_empty(), "{:?}", world.twins[0].1.sins);
}

/// Connected, through the one relay there is.
fn relayed() -> World {
    let mut world = World::new(epoch(), 1);
    world.direct_is_blocked = true;
    world.run(SECOND);
    world.authorize(1);
    world.run_until("connected", 3 * SECOND, World::is_connected);
    world
}

/// Data flows for so many seconds.
fn active(world: &mut World, seconds: u32) {
    for _ in 0..seconds {
        let (id, index, at) = (world.client.id, world.index().unwrap(), world.now);
        world.worker_event(WorkerEvent::Activity { id, index, at });
        world.run(SECOND);
    }
}

/// When requests of this kind were sent, in milliseconds since `since`.
fn requests(world: &World, since: Instant, stun: u16) -> Vec<u128> {
    let sent = world.sent.iter().filter(|(at, packet)| *at >= since && kind(packet) == stun);
    sent.map(|(at, _)| (*at - since).as_millis()).collect()
}

fn kind(packet: &Packet) -> u16 {
    u16::from_be_bytes([packet.payload[0], packet.payload[1]])
}
