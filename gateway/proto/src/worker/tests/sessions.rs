//! From the first initiation to the last packet: sessions, indices, paths.

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
