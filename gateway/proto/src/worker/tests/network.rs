//! What is outside the tunnel: ECN, demultiplexing, quotas of events.

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
        ("channel in a channel", SERVER, framed(CHANNEL, &framed(CHANNEL, b"")), DropReason::UnknownPayload),
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
    let [WorkerEvent::Stun(plain), WorkerEvent::Stun(relayed)] = &events[..] else { panic!("{events:?}") };
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
    assert_eq!(reports(&mut world), [[ChannelUse { server, number: CHANNEL, received: true, sent: true }]]);
    world.advance(Duration::from_secs(3));
    assert_eq!(reports(&mut world).len(), 0);
    world.outbound(&udp(C4, LAN4, (1, 53), b""));
    world.advance(Duration::from_millis(999));
    assert_eq!(reports(&mut world).len(), 0);
    world.outbound(&udp(C4, LAN4, (1, 53), b""));
    world.advance(Duration::from_millis(1));
    assert_eq!(reports(&mut world), [[ChannelUse { server, number: CHANNEL, received: true, sent: false }]]);
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

#[test]
fn packets_of_every_length_reserve_exactly_what_they_need() {
    // A backend can join a datagram to a batch only if the reservation is no longer than the batch's segments.
    for mut world in [World::connected(&lan()), {
        let mut world = World::relayed(&lan());
        world.handshake();
        world
    }] {
        for len in [0, 1, 20, 64, 100, 1252] {
            let packet = udp(LAN4, C4, (53, 1), &vec![7; len]);
            world.inbound(&packet);
            assert_eq!(world.received(), Some(packet));
        }
        world.inbound(&tcp(LAN4, C4, (80, 1)));
        assert_eq!(world.received(), Some(tcp(LAN4, C4, (80, 1))));
        assert_eq!(world.sink.slack, 0);
        world.check_accounts();
    }
}
