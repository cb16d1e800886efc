//! A relay that forgot us is found out by asking it, seldom, and only if nothing speaks for it.

use std::time::Duration;

use super::{
    LocalCandidate, RelayEvent, Use,
    twin::{Flavor, Packet},
    world::{PEER, World, addr, id, secs},
};
use crate::command::{ChannelUse, StunDatagram};

const REFRESH: u16 = 0x0004;
const BIND: u16 = 0x0009;

#[test]
fn a_relay_that_was_restarted_is_replaced_within_three_round_trips_of_the_question() {
    for flavor in [Flavor::Firezone, Flavor::Coturn] {
        let mut world = World::with_one(flavor, 3478);
        world.relays.bind(id(0), addr(PEER), Use::Nominated, world.now);
        world.run(secs(10));
        let old = world.relays.relayed(id(0))[0];
        world.take_events();
        world.twins[0].restart();
        assert_eq!(world.relays.check(id(0), world.now), None);
        // 438 or 401, 437, 438 or 401 again for the ALLOCATE: 20 ms each way and back.
        world.run(Duration::from_millis(80));
        let events = world.take_events();
        assert_eq!(events[0], RelayEvent::Invalidated(old, id(0)), "{flavor:?}");
        assert!(world.allocated() && world.relays.relayed(id(0))[0] != old, "{flavor:?}: {events:?}");
    }
}

#[test]
fn however_many_doubt_it_a_relay_is_asked_every_five_seconds() {
    let mut world = World::with_one(Flavor::Firezone, 3478);
    world.run(secs(10));
    world.take_kinds();
    for _ in 0..200 {
        for _ in 0..100 {
            let again = world.relays.check(id(0), world.now);
            assert!(again.is_none_or(|at| at > world.now), "asking again at once is of no use");
        }
        world.run(Duration::from_millis(100));
    }
    assert_eq!(refreshes(&mut world), 4, "in 20 s");
    assert!(world.allocated());
    assert_eq!(world.relays.check(id(1), world.now), None, "of a relay nobody knows");
}

#[test]
fn what_comes_through_the_allocation_speaks_for_it() {
    let server = addr("203.0.113.2:3478");
    let stun = || StunDatagram {
        heard_by: crate::WorkerId::FIRST,
        local: addr("198.51.100.2:52625"),
        from: addr(PEER),
        via: Some(server),
        payload: Vec::new(),
    };
    let used = |received| [ChannelUse { server, number: 0x4000, received, sent: true }];
    type Step = fn(&mut World, StunDatagram, [ChannelUse; 1], [ChannelUse; 1]);
    let table: [(&str, Step, Option<u64>); 4] = [
        ("nothing", |_, _, _, _| (), None),
        ("a check", |w, stun, _, _| assert!(!w.relays.handle_stun(&stun, w.now)), Some(2000)),
        // The report is up to 1 s old.
        ("data", |w, _, got, _| w.relays.handle_channels_used(&got, w.now), Some(1000)),
        ("our own data", |w, _, _, sent| w.relays.handle_channels_used(&sent, w.now), None),
    ];
    for (name, step, again) in table {
        let mut world = World::with_one(Flavor::Firezone, 3478);
        world.relays.bind(id(0), addr(PEER), Use::Nominated, world.now);
        world.run(secs(10));
        world.take_kinds();
        step(&mut world, stun(), used(true), used(false));
        let expect = again.map(|ms| world.now + Duration::from_millis(ms));
        assert_eq!(world.relays.check(id(0), world.now), expect, "{name}");
        world.pump();
        assert_eq!(refreshes(&mut world), usize::from(again.is_none()), "{name}");
        if let Some(at) = expect {
            world.run(at - world.now);
            assert_eq!(world.relays.check(id(0), world.now), None, "{name}: then it is asked");
        }
    }
}

#[test]
fn a_silent_relay_is_freed_unless_data_comes_through_it() {
    for (data, freed) in [(false, true), (true, false)] {
        let mut world = World::with_one(Flavor::Firezone, 3478);
        world.relays.bind(id(0), addr(PEER), Use::Nominated, world.now);
        world.run(secs(10));
        let LocalCandidate::Relayed { addr: relayed, server, .. } = world.relays.relayed(id(0))[0] else {
            panic!("not relayed")
        };
        world.take_kinds();
        world.take_events();
        // Only what we ask is lost: a way that is bad in one direction.
        world.twins[0].deaf = true;
        world.relays.check(id(0), world.now);
        for _ in 0..9 {
            world.run(secs(1));
            if data {
                world.send(Packet { src: addr(PEER), dst: relayed, payload: b"data".to_vec() });
                let used = ChannelUse { server, number: 0x4000, received: true, sent: false };
                world.relays.handle_channels_used(&[used], world.now);
            }
        }
        assert_eq!(world.events.contains(&RelayEvent::Gone(id(0))), freed, "data: {data}");
        world.twins[0].deaf = false;
        world.run(secs(20));
        assert_eq!(world.allocated(), !freed, "data: {data}");
        assert!(refreshes(&mut world) >= 4);
    }
}

#[test]
fn a_refused_bind_makes_us_ask_what_else_the_relay_forgot() {
    // coturn answers a bind without an allocation with 400, as it answers a bind that is wrong in itself.
    for (code, asked) in [(400, 1), (403, 0), (508, 0)] {
        let mut world = World::with_one(Flavor::Coturn, 3478);
        world.run(secs(10));
        world.take_kinds();
        world.twins[0].refuse = Some((BIND, code));
        for port in 1..=20 {
            world.relays.bind(id(0), format!("192.0.2.9:{port}").parse().unwrap(), Use::Signalled, world.now);
            world.pump();
        }
        world.run(secs(1));
        // The first REFRESH to this server has attributes that it does not want.
        assert_eq!(refreshes(&mut world), 2 * asked, "{code}");
    }
}

fn refreshes(world: &mut World) -> usize {
    world.take_kinds().into_iter().filter(|kind| *kind == REFRESH).count()
}
