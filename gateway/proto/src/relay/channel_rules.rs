//! What connections.md section 8.7 demands of channels, rule by rule, against the twin; and a crowd that wants them.

use std::time::Duration;

use gateway_common::DropReason;

use super::{
    LocalCandidate, RelayEvent, Use,
    channels::REUSE,
    pace::{MAX, MIN},
    twin::{Flavor, Packet, Twin},
    world::{PEER, World, addr, id, secs},
};

const BINDING: u16 = 0x0001;
const REFRESH: u16 = 0x0004;
const BIND: u16 = 0x0009;

/// A crowd's binds overrun a relay's receive buffer: four lost packets of one bind say nothing about the relay.
#[test]
fn an_unanswered_bind_costs_its_channel_and_not_a_relay_that_answers_others() {
    let mut world = World::with_one(Flavor::Firezone, 3478);
    world.take_events();
    let (lost, other) = (addr(PEER), addr("198.51.100.77:40000"));
    let bind = |world: &mut World, peer| {
        world.relays.bind(id(0), peer, Use::Checked, world.now);
        world.pump();
    };
    world.twins[0].deaf = true;
    bind(&mut world, lost);
    world.run(Duration::from_millis(1500));
    world.twins[0].deaf = false;
    bind(&mut world, other);
    world.run(Duration::from_millis(500));
    world.twins[0].deaf = true;
    world.run(secs(4));
    world.twins[0].deaf = false;
    world.run(secs(3));
    let is_gone = |event: &RelayEvent| {
        matches!(event, RelayEvent::Gone(_) | RelayEvent::Invalidated(..) | RelayEvent::NoneLeft)
    };
    assert!(world.allocated() && !world.events.iter().any(is_gone), "{:?}", world.events);
    let closed = |event: &RelayEvent| matches!(event, RelayEvent::ChannelGone { peer, .. } if *peer == lost);
    assert_eq!(world.events.iter().filter(|event| closed(event)).count(), 1, "{:?}", world.events);
    // Whoever still wants it gets it, at once.
    world.take_events();
    bind(&mut world, lost);
    world.run(secs(1));
    let bound = |event: &RelayEvent| matches!(event, RelayEvent::ChannelBound { peer, .. } if *peer == lost);
    assert!(world.events.iter().any(bound), "{:?}", world.events);
}

#[test]
fn a_refused_channel_is_forgotten_and_not_asked_for_at_every_check() {
    let mut world = World::with_one(Flavor::Coturn, 3478);
    world.take_kinds();
    world.twins[0].refuse = Some((BIND, 403));
    let mut lost = 0;
    for _ in 0..40 {
        lost += usize::from(world.relays.wrap(id(0), addr(PEER), b"check", world.now).is_none());
        world.pump();
        world.run(Duration::from_millis(250));
    }
    assert_eq!((world.take_kinds(), lost), (vec![BIND], 40));
    assert_eq!(world.relays.counters().get(DropReason::NoChannel), 40);
    assert!(world.allocated());
}

/// The server counts a number's 900 s from the arrival of its bind, and this one was slow.
#[test]
fn a_number_is_not_thought_free_before_the_server_thinks_so() {
    for after in [Duration::from_millis(899_900), Duration::from_millis(900_300), REUSE + secs(1)] {
        let mut world = World::with_one(Flavor::Firezone, 3478);
        world.delay = Duration::from_millis(700);
        let sent = world.now;
        world.relays.bind(id(0), addr(PEER), Use::Checked, world.now);
        world.run(secs(5));
        world.delay = Duration::from_millis(1);
        world.run(after - (world.now - sent));
        world.take_events();
        world.relays.bind(id(0), addr(PEER), Use::Checked, world.now);
        world.run(secs(1));
        assert!(world.twins[0].sins.is_empty(), "{after:?}: {:?}", world.twins[0].sins);
        assert_eq!(bound(&world), [if after < REUSE { 0x4000 } else { 0x4001 }], "{after:?}");
    }
}

#[test]
fn a_nominated_channel_outlives_the_permissions_of_rfc_8656() {
    let mut world = World::with_one(Flavor::Coturn, 3478);
    world.relays.bind(id(0), addr(PEER), Use::Nominated, world.now);
    world.pump();
    let LocalCandidate::Relayed { addr: relayed, .. } = world.relays.relayed(id(0))[0] else { panic!() };
    for second in 0..2000_u32 {
        world.run(secs(1));
        let payload = second.to_be_bytes().to_vec();
        world.send(Packet { src: addr(PEER), dst: relayed, payload });
    }
    world.run(secs(1));
    assert_eq!(world.data.len(), 2000);
    assert!(world.twins[0].sins.is_empty(), "{:?}", world.twins[0].sins);
}

#[test]
fn checks_travel_through_the_channel_while_its_bind_is_in_flight() {
    let mut world = World::with_one(Flavor::Firezone, 3478);
    assert_eq!(world.relays.wrap(id(0), addr(PEER), b"first", world.now), None);
    let second = world.relays.wrap(id(0), addr(PEER), b"second", world.now).unwrap();
    assert_eq!(second.payload, [&[0x40, 0, 0, 6][..], b"second"].concat());
    world.pump();
    world.send(Packet { src: addr("198.51.100.2:52625"), dst: second.dst, payload: second.payload });
    world.run(secs(1));
    assert_eq!(world.delivered.len(), 1);
    assert_eq!((world.delivered[0].dst, world.delivered[0].payload.as_slice()), (addr(PEER), &b"second"[..]));
}

#[test]
fn a_channel_is_open_from_its_bind_to_its_refusal_or_the_end_of_the_allocation() {
    let open = |world: &mut World| {
        let mut open = false;
        for event in world.take_events() {
            match event {
                RelayEvent::ChannelOpened { .. } => open = true,
                RelayEvent::ChannelGone { .. } => open = false,
                _ => {}
            }
        }
        open
    };
    let mut world = World::with_one(Flavor::Firezone, 3478);
    world.relays.bind(id(0), addr(PEER), Use::Checked, world.now);
    world.pump();
    assert!(open(&mut world), "before any answer: what the relay sends may overtake its success");

    for refused in [Some((BIND, 400)), Some((BIND, 443)), None] {
        let mut world = World::with_one(Flavor::Firezone, 3478);
        world.twins[0].refuse = refused;
        // Without a refusal it is the silence that ends it.
        world.twins[0].deaf = refused.is_none();
        world.relays.bind(id(0), addr(PEER), Use::Checked, world.now);
        world.pump();
        assert!(open(&mut world), "{refused:?}");
        world.run(secs(9));
        assert!(world.events.iter().any(|e| matches!(e, RelayEvent::ChannelGone { .. })), "{refused:?}");
        assert!(!open(&mut world), "{refused:?}");
        world.run(secs(20));
        assert!(!open(&mut world), "{refused:?}");
    }
}

#[test]
fn binds_wait_for_the_allocation_a_hundred_at_most() {
    let mut world = World::new(vec![Twin::new(Flavor::Firezone, &[addr("203.0.113.2:3478")], 1)], 1);
    world.connect(&[0]);
    world.relays.bind(id(0), addr(PEER), Use::Nominated, world.now);
    for port in 1..=150 {
        world.relays.bind(id(0), format!("192.0.2.9:{port}").parse().unwrap(), Use::Signalled, world.now);
    }
    world.relays.release(id(0), addr("192.0.2.9:150"));
    world.run(secs(1));
    assert_eq!(world.take_kinds().into_iter().filter(|kind| *kind == BIND).count(), 99);
    assert!(world.relays.channel(id(0), addr(PEER), world.now).is_some(), "what matters most is kept");
    assert!(world.relays.channel(id(0), addr("192.0.2.9:149"), world.now).is_some());
    assert!(world.relays.channel(id(0), addr("192.0.2.9:50"), world.now).is_none());
}

#[test]
fn exhaustion_is_counted_and_harms_nobody_else() {
    let mut world = World::with_one(Flavor::Firezone, 3478);
    let nominated = addr("192.0.2.1:1");
    world.relays.bind(id(0), nominated, Use::Nominated, world.now);
    let peer = |n: u32| addr(&format!("10.{}.{}.{}:9", n >> 16, (n >> 8) & 255, n & 255));
    let exhausted = |world: &World| world.relays.counters().get(DropReason::ChannelsExhausted);
    let mut next = 0_u32;
    let mut first_exhausted = None;
    // Checks to six new peers a second would take 5400 of the 4096 numbers before the first is free again.
    for second in 0..2000_u64 {
        for _ in 0..6 {
            world.relays.bind(id(0), peer(next), Use::Checked, world.now);
            next += 1;
        }
        world.run(secs(1));
        if exhausted(&world) > 0 {
            first_exhausted.get_or_insert(second);
        }
        assert_eq!(
            world.relays.channel(id(0), nominated, world.now).map(|(_, n)| n),
            Some(0x4000),
            "at {second}"
        );
        world.take_events();
        world.take_kinds();
    }
    assert_eq!(first_exhausted, Some(4095 / 6));
    assert!(world.twins[0].sins.is_empty(), "{:?}", world.twins[0].sins);
    assert_eq!(world.relays.counters().iter().count(), 1, "{:?}", world.relays.counters());

    // Whoever is nominated while there is no number at all gets the next one that is free.
    while world.relays.channel(id(0), peer(next - 1), world.now).is_some() {
        next += 1;
        world.relays.bind(id(0), peer(next - 1), Use::Checked, world.now);
    }
    let late = addr("192.0.2.1:2");
    world.relays.bind(id(0), late, Use::Nominated, world.now);
    assert_eq!(world.relays.channel(id(0), late, world.now), None);
    world.run(REUSE);
    assert!(world.relays.channel(id(0), late, world.now).is_some());
    assert!(world.twins[0].sins.is_empty(), "{:?}", world.twins[0].sins);
}

/// The `n`th of a crowd.
fn one_of(n: usize) -> std::net::SocketAddr {
    addr(&format!("10.9.{}.{}:4000", n / 200, n % 200 + 1))
}

fn crowd(world: &mut World, relay: u128, n: std::ops::Range<usize>, why: Use) {
    for n in n {
        world.relays.bind(id(relay), one_of(n), why, world.now);
    }
    world.pump();
}

/// Channel numbers are given in the order of wanting, so they tell the order of sending, too.
fn bound(world: &World) -> Vec<u16> {
    let number = |event: &RelayEvent| match event {
        RelayEvent::ChannelBound { number, .. } => Some(*number),
        _ => None,
    };
    world.events.iter().filter_map(number).collect()
}

#[test]
fn a_crowd_is_bound_in_order_with_no_more_binds_unanswered_than_the_window() {
    for flavor in [Flavor::Firezone, Flavor::Coturn] {
        let mut world = World::with_one(flavor, 3478);
        world.take_kinds();
        crowd(&mut world, 0, 0..2000, Use::Checked);
        assert_eq!(world.sent.len(), MIN);
        assert_eq!(world.relays.channel(id(0), one_of(MIN), world.now), None, "nothing to send on yet");
        world.run(secs(2));
        assert_eq!(bound(&world), (0x4000..0x4000 + 2000).collect::<Vec<u16>>(), "{flavor:?}");
        let binds: Vec<_> = world.take_times().into_iter().filter(|(_, kind)| *kind == BIND).collect();
        assert_eq!(binds.len(), 2000, "{flavor:?}: none is repeated");
        // A round trip takes 20 ms.
        let flying = |at: u128| binds.iter().filter(|(t, _)| *t <= at && at < *t + 20).count();
        let most = binds.iter().map(|(at, _)| flying(*at)).max();
        assert_eq!(most, Some(MAX), "{flavor:?}");
    }
}

#[test]
fn what_is_waited_for_most_goes_first() {
    let mut world = World::with_one(Flavor::Firezone, 3478);
    world.relays.bind(id(0), addr(PEER), Use::Nominated, world.now);
    world.run(secs(239));
    world.take_kinds();
    crowd(&mut world, 0, 0..500, Use::Signalled);
    // A check of one that waits: it is lost, but raises its rank. One nobody had signalled.
    assert_eq!(world.relays.wrap(id(0), one_of(400), b"check", world.now), None);
    world.relays.bind(id(0), one_of(600), Use::Checked, world.now);
    world.relays.bind(id(0), one_of(450), Use::Nominated, world.now);
    world.run(Duration::from_millis(20));
    world.events.clear();
    world.run(Duration::from_millis(20));
    let number = |n: u16| 0x4001 + n;
    let second: Vec<_> = bound(&world).into_iter().take(4).collect();
    let urgent: Vec<_> = second.iter().copied().filter(|n| *n >= number(400)).collect();
    // The fourth is a merely signalled one: a share of the window is theirs.
    assert_eq!(urgent, [number(450), number(400), number(500)], "{second:x?}");
    // The refresh of the channel in use is due at 240 s.
    let mut world = World::with_one(Flavor::Firezone, 3478);
    world.relays.bind(id(0), addr(PEER), Use::Nominated, world.now);
    world.run(Duration::from_millis(240_000));
    world.take_times();
    crowd(&mut world, 0, 0..500, Use::Checked);
    let before = world.sent.len();
    world.run(Duration::from_millis(40));
    let refreshed = |packet: &Packet| packet.payload.windows(4).any(|w| w == [0x40, 0, 0, 0]);
    let at = world.sent.iter().position(|(_, kind, p)| *kind == BIND && refreshed(p));
    assert!(at.is_some_and(|at| at <= before + 1), "{at:?} of {}", world.sent.len());
}

#[test]
fn a_dead_relay_holds_nobody_at_another_and_time_counts_from_sending() {
    let twins =
        ["203.0.113.2:3478", "203.0.113.3:3478"].map(|at| Twin::new(Flavor::Firezone, &[addr(at)], 1));
    let mut world = World::new(twins.into(), 1);
    world.connect(&[0, 1]);
    world.run(secs(2));
    world.take_kinds();
    world.twins[0].deaf = true;
    crowd(&mut world, 0, 0..300, Use::Checked);
    crowd(&mut world, 1, 0..300, Use::Checked);
    world.run(secs(1));
    assert_eq!(bound(&world).len(), 300);
    world.run(secs(6));
    let to_dead =
        |(_, kind, p): &&(Duration, u16, Packet)| *kind == BIND && p.dst == addr("203.0.113.2:3478");
    assert_eq!(world.sent.iter().filter(to_dead).count(), 4 * MIN, "nobody follows into the silence");
    // It comes back in the last moment: those who waited are not too late.
    world.twins[0].deaf = false;
    let one_lost = |event: &RelayEvent| matches!(event, RelayEvent::ChannelGone { .. } | RelayEvent::Gone(_));
    world.relays.check(id(0), world.now);
    world.run(secs(3));
    let lost = world.events.iter().filter(|event| one_lost(event)).count();
    assert_eq!((lost, bound(&world).len()), (MIN, 600 - MIN));
}

#[test]
fn who_leaves_while_waiting_costs_no_request_and_no_number() {
    let mut world = World::with_one(Flavor::Firezone, 3478);
    world.take_kinds();
    for _ in 0..5 {
        crowd(&mut world, 0, 0..2000, Use::Checked);
        for n in MIN..2000 {
            world.relays.release(id(0), one_of(n));
        }
        world.run(Duration::from_millis(1));
    }
    world.run(secs(1));
    assert_eq!(world.take_kinds(), [BIND; MIN]);
    crowd(&mut world, 0, 0..4096, Use::Checked);
    world.run(secs(4));
    assert_eq!(bound(&world).len(), 4096);
    assert_eq!(world.relays.counters().get(DropReason::ChannelsExhausted), 0);
}

#[test]
fn who_waits_when_the_allocation_is_lost_is_bound_in_the_next() {
    let mut world = World::with_one(Flavor::Firezone, 3478);
    world.twins[0].drop_allocations();
    crowd(&mut world, 0, 0..MIN + 50, Use::Checked);
    world.take_kinds();
    world.run(secs(1));
    // Of those in flight only the one whose answer told of the loss.
    assert_eq!(bound(&world).len(), 51);
    let kinds = world.take_kinds();
    assert_eq!((kinds.len(), kinds.contains(&BINDING), kinds.contains(&REFRESH)), (52, false, false));
}

#[test]
fn a_lossy_way_delays_and_loses_nobody() {
    for seed in 0..10 {
        let mut world = World::with_one(Flavor::Coturn, 3478);
        (world.loss, world.duplicates) = (50 + 10 * seed, 50);
        crowd(&mut world, 0, 0..300, Use::Checked);
        world.run(secs(40));
        world.loss = 0;
        for n in 0..300 {
            world.relays.bind(id(0), one_of(n), Use::Checked, world.now);
        }
        world.run(secs(10));
        let all = (0..300).all(|n| world.relays.channel(id(0), one_of(n), world.now).is_some());
        assert!(all && world.twins[0].sins.is_empty(), "{seed}: {:?}", world.twins[0].sins);
    }
}
