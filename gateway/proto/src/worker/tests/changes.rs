//! What control changes acts on the next packet.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use uuid::Uuid;

use super::*;
use crate::{ClientId, addr::TunnelAddrs, command::ClientState};

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
fn a_clients_goodbye_forgets_it_and_what_it_says_besides_is_counted() {
    let mut world = World::connected(&lan());
    world.events();
    let mut other = GOODBYE;
    other[40] = 77;
    world.outbound(&other);
    assert_eq!(world.worker.traffic().control, 1);
    // `AssignedIps` without any.
    other[40] = 0;
    world.outbound(&other);
    assert_eq!((world.worker.traffic().control, world.count(DropReason::MalformedControl)), (1, 1));
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

#[test]
fn a_key_claimed_by_three_falls_back_until_nobody_is_left() {
    let mut world = World::connected(&lan());
    let owner = |world: &mut World| {
        world.inbound(&udp(LAN4, C4, (53, 1), b"?"));
        let ours = world.client_gets().is_some();
        let strange = world.count(DropReason::NotConnected);
        (ours, strange)
    };
    let claim = |world: &mut World, n: u128, claims: bool| {
        let state = ClientState::new(world.client.tunnel, Connection::Absent, lan().into());
        let desired = claims.then(|| Arc::new(state));
        world.command(Command::Client {
            id: ClientId(Uuid::from_u128(n)),
            home: crate::command::Home::at(crate::WorkerId::FIRST),
            desired,
        });
    };
    assert_eq!(owner(&mut world), (true, 0));
    claim(&mut world, 501, true);
    claim(&mut world, 502, true);
    assert_eq!(owner(&mut world), (false, 1));
    claim(&mut world, 501, false);
    assert_eq!(owner(&mut world), (false, 2));
    claim(&mut world, 502, false);
    assert_eq!(owner(&mut world), (true, 2));
    world.revoke();
    world.client_gets();
    world.inbound(&udp(LAN4, C4, (53, 1), b"?"));
    assert_eq!(world.count(DropReason::NoPeerState), 1);
    world.check_accounts();
}

#[test]
#[expect(clippy::disallowed_methods, reason = "measures the real time")]
fn thousands_of_clients_that_come_and_leave_at_once_stall_nobody() {
    const CLIENTS: u32 = 10_000;
    let mut world = World::connected(&lan());
    let resources: Arc<[Resource]> = lan().into();
    let id = |n: u32| ClientId(Uuid::from_u128(1000 + u128::from(n)));
    let began = Instant::now();
    for n in 0..CLIENTS {
        let tunnel = TunnelAddrs {
            v4: (0x6440_8000 + n).into(),
            v6: (0xfd00_2021_1111_u128 << 80 | u128::from(n)).into(),
        };
        let state = ClientState::new(tunnel, Connection::Absent, Arc::clone(&resources));
        world.command(Command::Client {
            id: id(n),
            home: crate::command::Home::at(crate::WorkerId::FIRST),
            desired: Some(Arc::new(state)),
        });
    }
    for n in 0..CLIENTS {
        world.command(Command::Client {
            id: id(n),
            home: crate::command::Home::at(crate::WorkerId::FIRST),
            desired: None,
        });
    }
    // Quadratic work took a minute here. A worker that is busy for 2 s ends the process.
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    world.inbound(&udp(LAN4, C4, (53, 1), b"?"));
    assert!(world.client_gets().is_some(), "who stayed is served");
}
