//! What connections.md sections 8 and 9 demand, rule by rule, against the twin.

use std::time::Duration;

use stun_types::message::{Message, MessageClass, MessageType, MessageWrite, MessageWriteVec};

use super::{
    LocalCandidate, RelayEvent, Use,
    twin::{Flavor, Packet, Twin},
    world::{PEER, World, addr, id, secs},
};
use crate::command::ChannelUse;

const BINDING: u16 = 0x0001;
const ALLOCATE: u16 = 0x0003;
const REFRESH: u16 = 0x0004;
const BIND: u16 = 0x0009;

#[test]
fn a_relay_on_any_port_comes_up_without_a_surplus_request() {
    for (flavor, port) in [(Flavor::Firezone, 3478), (Flavor::Coturn, 3478), (Flavor::Firezone, 443)] {
        let mut world = World::with_one(flavor, port);
        let bare =
            world.sent.iter().filter(|(_, kind, p)| *kind == ALLOCATE && p.payload.len() == 20 + 28).count();
        let (kinds, bare_ones) = match flavor {
            Flavor::Firezone => (&[BINDING, ALLOCATE, ALLOCATE][..], 0),
            Flavor::Coturn => (&[BINDING, ALLOCATE, ALLOCATE, ALLOCATE][..], 1),
        };
        assert_eq!((world.take_kinds(), bare), (kinds.to_vec(), bare_ones), "{flavor:?} {port}");
        let server = std::net::SocketAddr::new(addr("203.0.113.2:0").ip(), port);
        let local = addr("198.51.100.2:52625");
        let [relayed @ LocalCandidate::Relayed { addr: at, .. }] = world.relays.relayed(id(0))[..] else {
            panic!("not one relayed candidate")
        };
        assert_eq!(relayed, LocalCandidate::Relayed { addr: at, relay: id(0), server, local });
        let host = LocalCandidate::Host(local);
        let reflexive = LocalCandidate::Reflexive { addr: local, base: local };
        assert_eq!(
            world.take_events(),
            [
                RelayEvent::Servers([server].into()),
                RelayEvent::Added(host, id(0)),
                RelayEvent::Added(reflexive, id(0)),
                RelayEvent::Added(relayed, id(0)),
            ]
        );
        assert_eq!(world.relays.host_and_reflexive(), [host, reflexive]);
        assert_eq!((world.relays.owner_of(at), world.relays.server(id(0))), (Some(id(0)), Some(server)));
        assert_eq!(world.relays.rtts().collect::<Vec<_>>(), [(id(0), Duration::from_millis(20))]);
        assert!(world.relays.is_usable() && world.relays.sample() == Some(id(0)));
    }
}

#[test]
fn a_dual_stack_relay_is_one_relay_wherever_its_entries_stand() {
    let dual = Twin::new(Flavor::Coturn, &[addr("203.0.113.2:3478"), addr("[2001:db8:1::2]:3478")], 1);
    let other = Twin::new(Flavor::Firezone, &[addr("203.0.113.3:3478")], 2);
    let mut world = World::new(vec![dual, other], 1);
    let mut entries = world.twins[0].entries(id(0));
    entries.insert(1, world.twins[1].entries(id(1)).remove(0));
    world.relays.update(&[], &entries, world.now);
    world.pump();
    world.run(secs(1));
    assert_eq!(world.relays.relayed(id(0)).len(), 2);
    assert_eq!(world.relays.host_and_reflexive().len(), 4);
    assert_eq!(world.relays.rtts().count(), 2);
    let allocates = world.sent.iter().filter(|(_, kind, p)| *kind == ALLOCATE && p.dst.is_ipv6()).count();
    assert_eq!(allocates, 0, "the first answer decides the family");
    for peer in [PEER, "[2001:db8:9::1]:4000"] {
        world.relays.bind(id(0), addr(peer), Use::Signalled, world.now);
    }
    world.pump();
    world.run(secs(1));
    assert!(world.twins[0].sins.is_empty(), "{:?}", world.twins[0].sins);
    let bound = world.events.iter().filter(|e| matches!(e, RelayEvent::ChannelBound { .. })).count();
    assert_eq!(bound, 2);
    // The same list again changes nothing.
    world.take_kinds();
    world.take_events();
    world.relays.update(&[], &entries, world.now);
    world.pump();
    assert_eq!((world.take_kinds(), world.take_events()), (vec![], vec![]));
}

#[test]
fn a_silent_relay_is_asked_four_times_and_freed_after_8125_ms() {
    let mut world = World::new(vec![Twin::new(Flavor::Firezone, &[addr("203.0.113.2:3478")], 1)], 1);
    world.twins[0].deaf = true;
    world.connect(&[0]);
    world.take_events();
    world.run(Duration::from_millis(8124));
    assert_eq!(world.take_events(), []);
    assert!(world.sent.windows(2).all(|w| w[0].2 == w[1].2), "a BINDING is repeated unchanged");
    let times: Vec<_> = world.take_times();
    assert_eq!(times, [(0, BINDING), (1000, BINDING), (2500, BINDING), (4750, BINDING)]);
    world.run(Duration::from_millis(1));
    let gone = [RelayEvent::Gone(id(0)), RelayEvent::Servers([].into()), RelayEvent::NoneLeft];
    assert_eq!(world.take_events(), gone);
    assert_eq!(world.relays.poll_timeout(), None);
}

#[test]
fn an_authenticated_request_is_repeated_with_new_ids() {
    let mut world = World::with_one(Flavor::Firezone, 3478);
    world.take_kinds();
    world.twins[0].deaf = true;
    world.relays.bind(id(0), addr(PEER), Use::Checked, world.now);
    world.pump();
    world.run(secs(8));
    let mut ids: Vec<_> =
        world.sent.iter().filter(|(_, k, _)| *k == BIND).map(|s| &s.2.payload[8..20]).collect();
    assert_eq!(ids.len(), 4);
    ids.dedup();
    assert_eq!(ids.len(), 4);
    world.run(secs(1));
    assert!(world.events.contains(&RelayEvent::Gone(id(0))));
}

#[test]
fn every_error_code_has_its_rule() {
    struct Row {
        name: &'static str,
        refuse: (u16, u16),
        /// Requests within 10 s after the error began.
        kinds: &'static [u16],
        allocated: bool,
        gone: bool,
    }
    let table = [
        // Once more without the attributes of ALLOCATE, then it is hopeless.
        Row {
            name: "420 on REFRESH",
            refuse: (4, 420),
            kinds: &[REFRESH, REFRESH],
            allocated: false,
            gone: true,
        },
        Row { name: "500 on REFRESH", refuse: (4, 500), kinds: &[REFRESH], allocated: true, gone: false },
        Row {
            name: "437 on REFRESH",
            refuse: (4, 437),
            // The twin still has the old allocation: 437 again, cleared by a REFRESH that it refuses as well.
            kinds: &[REFRESH, ALLOCATE, REFRESH, ALLOCATE, REFRESH, ALLOCATE, REFRESH],
            allocated: false,
            gone: false,
        },
        Row { name: "401 on REFRESH", refuse: (4, 401), kinds: &[REFRESH], allocated: false, gone: true },
    ];
    for row in table {
        let mut world = World::with_one(Flavor::Firezone, 3478);
        world.run(secs(297));
        world.take_kinds();
        world.twins[0].refuse = Some(row.refuse);
        world.run(secs(10));
        let kinds: Vec<_> = world.take_kinds().into_iter().filter(|kind| *kind != BINDING).collect();
        assert_eq!(kinds, row.kinds, "{}", row.name);
        assert_eq!(world.allocated(), row.allocated, "{}", row.name);
        assert_eq!(world.events.contains(&RelayEvent::Gone(id(0))), row.gone, "{}", row.name);
    }
}

#[test]
fn a_stale_nonce_is_replaced_and_the_request_repeated() {
    for flavor in [Flavor::Firezone, Flavor::Coturn] {
        let mut world = World::with_one(flavor, 3478);
        world.take_kinds();
        world.take_events();
        world.twins[0].drop_nonces();
        world.relays.bind(id(0), addr(PEER), Use::Checked, world.now);
        world.pump();
        world.run(secs(1));
        assert_eq!(world.take_kinds(), [BIND, BIND], "{flavor:?}");
        let server = addr("203.0.113.2:3478");
        let (relay, number, peer) = (id(0), 0x4000, addr(PEER));
        let opened = RelayEvent::ChannelOpened { relay, server, number, peer };
        let bound = RelayEvent::ChannelBound { relay, server, number, peer };
        assert_eq!(world.take_events(), [opened, bound], "{flavor:?}");
    }
}

#[test]
fn a_relay_beyond_the_first_timeout_comes_up_without_a_surplus_request() {
    let mut world = World::new(vec![Twin::new(Flavor::Firezone, &[addr("203.0.113.2:3478")], 1)], 1);
    world.delay = Duration::from_millis(700);
    world.connect(&[0]);
    world.run(secs(9));
    // The second ALLOCATE's 401 comes when one with a nonce is on its way: it means nothing any more.
    let expect = [
        (0, BINDING),
        (1000, BINDING),
        (1400, ALLOCATE),
        (2400, ALLOCATE),
        (2800, ALLOCATE),
        (3800, ALLOCATE),
    ];
    assert_eq!(world.take_times(), expect);
    assert!(world.allocated());
    assert_eq!(world.events.len(), 4, "{:?}", world.events);
}

#[test]
fn a_lost_allocation_is_replaced_and_its_channels_are_gone() {
    let mut world = World::with_one(Flavor::Firezone, 3478);
    let (peer, other) = (addr(PEER), addr("192.0.2.3:4000"));
    world.relays.bind(id(0), peer, Use::Checked, world.now);
    world.run(secs(1));
    let old = world.relays.relayed(id(0))[0];
    world.take_events();
    world.take_kinds();
    world.twins[0].drop_allocations();
    world.relays.bind(id(0), other, Use::Checked, world.now);
    world.pump();
    world.run(secs(1));
    assert_eq!(world.take_kinds(), [BIND, ALLOCATE, BIND], "the peer of the failed bind is bound again");
    let new = world.relays.relayed(id(0))[0];
    let (relay, server) = (id(0), addr("203.0.113.2:3478"));
    assert_eq!(
        world.take_events(),
        [
            RelayEvent::ChannelOpened { relay, server, number: 0x4001, peer: other },
            RelayEvent::Invalidated(old, relay),
            RelayEvent::ChannelGone { relay, server, number: 0x4000, peer },
            RelayEvent::ChannelGone { relay, server, number: 0x4001, peer: other },
            RelayEvent::Added(new, relay),
            // A copy of the bind may have come late, into the new allocation.
            RelayEvent::ChannelOpened { relay, server, number: 0x4001, peer: other },
            RelayEvent::ChannelBound { relay, server, number: 0x4001, peer: other },
        ]
    );
    assert_eq!(world.relays.channel(relay, peer, world.now), None);
}

#[test]
fn an_allocation_the_server_still_holds_is_cleared_first() {
    let mut world = World::with_one(Flavor::Firezone, 3478);
    world.relays.update(&[id(0)], &world.twins[0].entries(id(7)), world.now);
    world.take_kinds();
    world.pump();
    world.run(secs(1));
    assert_eq!(world.take_kinds(), [BINDING, ALLOCATE, ALLOCATE, REFRESH, ALLOCATE]);
    assert_eq!((world.twins[0].allocations(), world.relays.relayed(id(7)).len()), (1, 1));
}

#[test]
fn a_full_relay_stays_without_allocation_and_is_asked_again_later() {
    let mut world = World::new(vec![Twin::new(Flavor::Firezone, &[addr("203.0.113.2:3478")], 1)], 1);
    world.twins[0].refuse = Some((ALLOCATE, 508));
    world.connect(&[0]);
    world.relays.bind(id(0), addr(PEER), Use::Nominated, world.now);
    world.run(secs(30));
    assert_eq!(world.take_kinds(), [BINDING, ALLOCATE, ALLOCATE]);
    assert!(!world.allocated() && world.relays.is_usable());
    assert!(!world.events.contains(&RelayEvent::Gone(id(0))));
    world.twins[0].refuse = None;
    world.run(secs(40));
    assert_eq!(world.take_kinds(), [ALLOCATE], "the buffered bind was dropped");
    assert!(world.allocated());
}

#[test]
fn a_relay_that_wants_a_plain_refresh_gets_it_and_keeps_its_allocation() {
    let mut world = World::with_one(Flavor::Coturn, 3478);
    world.take_kinds();
    world.take_events();
    world.run(secs(910));
    let refreshes = world.take_kinds().into_iter().filter(|kind| *kind == REFRESH).count();
    assert_eq!(refreshes, 4, "the first is repeated, the other two are plain at once");
    assert_eq!(world.take_events(), []);
    assert!(world.allocated());
}

#[test]
fn an_allocation_that_only_the_relay_remembers_is_replaced() {
    for flavor in [Flavor::Firezone, Flavor::Coturn] {
        let mut world = World::with_one(flavor, 3478);
        let entries = world.twins[0].entries(id(0));
        world.relays.update(&[id(0)], &[], world.now);
        world.pump();
        assert_eq!(world.twins[0].allocations(), 1, "{flavor:?}: nothing is released");
        world.relays.update(&[], &entries, world.now);
        world.pump();
        world.run(secs(1));
        assert!(world.allocated(), "{flavor:?}");
    }
}

#[test]
fn wrong_credentials_free_the_relay() {
    for (flavor, within) in [(Flavor::Coturn, secs(1)), (Flavor::Firezone, secs(9))] {
        let mut world = World::new(vec![Twin::new(flavor, &[addr("203.0.113.2:3478")], 1)], 1);
        let entries = world.twins[0].entries(id(0));
        world.twins[0].set_password("another");
        world.relays.update(&[], &entries, world.now);
        world.pump();
        world.run(within);
        assert!(world.events.ends_with(&[RelayEvent::NoneLeft]), "{flavor:?} {:?}", world.events);
    }
}

#[test]
fn what_is_not_authenticated_cannot_end_an_allocation() {
    for code in [0_u16, 400, 401, 420, 437, 438, 500] {
        let mut world = World::with_one(Flavor::Firezone, 3478);
        world.run(secs(298));
        world.take_kinds();
        world.take_events();
        world.delay = Duration::from_millis(100);
        world.run(Duration::from_millis(150));
        // Whatever request is in flight gets a forged answer before the server's own.
        for _ in 0..5 {
            let Some((_, _, request)) =
                world.sent.iter().rev().find(|(_, kind, _)| *kind == REFRESH).cloned()
            else {
                panic!("no REFRESH")
            };
            assert!(world.receive(request.dst, &forged(&request, code)));
        }
        world.run(secs(20));
        assert!(world.allocated(), "{code}");
        assert_eq!(world.take_events(), [], "{code}");
        let refreshes = world.take_kinds().into_iter().filter(|kind| *kind == REFRESH).count();
        assert!(refreshes <= 6, "{code}: {refreshes} REFRESH");
    }
}

fn forged(request: &Packet, code: u16) -> Vec<u8> {
    use stun_types::{attribute::*, message::MessageWriteExt};
    let request = Message::from_bytes(&request.payload).unwrap();
    let class = if code == 0 { MessageClass::Success } else { MessageClass::Error };
    let kind = MessageType::from_class_method(class, request.method());
    let mut message = Message::builder(kind, request.transaction_id(), MessageWriteVec::new());
    if code == 0 {
        message.add_attribute(&turn_types::attribute::Lifetime::new(0)).unwrap();
    } else {
        message.add_attribute(&ErrorCode::builder(code).build().unwrap()).unwrap();
        message.add_attribute(&Realm::new("firezone").unwrap()).unwrap();
        message.add_attribute(&Nonce::new("forged").unwrap()).unwrap();
    }
    message.finish()
}

#[test]
fn an_unlisted_relay_is_probed_and_a_dead_one_freed_after_a_second() {
    let mut world = World::with_one(Flavor::Firezone, 3478);
    world.twins.push(Twin::new(Flavor::Firezone, &[addr("203.0.113.3:3478")], 2));
    world.take_kinds();
    world.connect(&[1]);
    world.run(secs(2));
    assert_eq!(world.take_kinds()[..2], [BINDING, REFRESH]);
    assert!(world.allocated());
    world.twins[0].deaf = true;
    world.connect(&[1]);
    world.take_events();
    world.run(Duration::from_millis(1001));
    assert!(world.events.contains(&RelayEvent::Gone(id(0))) && !world.events.contains(&RelayEvent::NoneLeft));
    assert_eq!(world.relays.sample(), Some(id(1)));
}

#[test]
fn a_relay_with_other_credentials_is_replaced() {
    let mut world = World::with_one(Flavor::Firezone, 3478);
    let old = world.relays.relayed(id(0))[0];
    world.take_events();
    world.twins[0].set_password("the second password");
    world.twins[0].restart();
    world.connect(&[0]);
    assert_eq!(world.take_events(), [RelayEvent::Invalidated(old, id(0)), RelayEvent::Gone(id(0))]);
    world.run(secs(1));
    assert!(world.allocated());
}

#[test]
fn a_relay_that_works_is_kept_when_the_portal_says_other_credentials_under_another_name() {
    for flavor in [Flavor::Firezone, Flavor::Coturn] {
        let mut world = World::with_one(flavor, 3478);
        let relayed = world.relays.relayed(id(0));
        let peer = addr("192.0.2.77:7777");
        world.relays.bind(id(0), peer, Use::Nominated, world.now);
        world.run(secs(1));
        let channel = world.relays.channel(id(0), peer, world.now);
        assert!(channel.is_some(), "{flavor:?}");
        world.take_events();
        world.take_kinds();
        // A portal of Nov-2025 does so with each `init`; the latest counts.
        for name in ["1800000000:twin", "1800000100:twin"] {
            world.twins[0].add_credentials(name, &format!("the password of {name}"));
            world.connect(&[0]);
            world.run(secs(2));
            // coturn may have to be asked in another form.
            let asked = world.take_kinds();
            assert!(matches!(asked[..], [REFRESH] | [REFRESH, REFRESH]), "{flavor:?}: {asked:?}");
        }
        world.run(secs(900));
        assert_eq!(world.relays.relayed(id(0)), relayed, "{flavor:?}");
        assert_eq!(world.relays.channel(id(0), peer, world.now), channel, "{flavor:?}");
        assert_eq!(world.take_events(), [], "{flavor:?}");

        // The old ones end, or the relay forgets the allocation: the new ones are there, nobody has to be asked.
        if flavor == Flavor::Firezone {
            world.twins[0].drop_allocations();
        } else {
            world.twins[0].expire_credentials();
        }
        world.run(secs(320));
        let events = world.take_events();
        assert!(events.contains(&RelayEvent::Invalidated(relayed[0], id(0))), "{flavor:?}: {events:?}");
        assert!(!events.contains(&RelayEvent::Gone(id(0))), "{flavor:?}: {events:?}");
        world.twins[0].expire_credentials();
        world.run(secs(900));
        assert!(world.allocated(), "{flavor:?}: by the latest credentials");
        assert_eq!(world.twins[0].allocations(), 1, "{flavor:?}");
    }
}

#[test]
fn a_relay_that_started_anew_with_other_credentials_is_back_within_seconds() {
    for flavor in [Flavor::Firezone, Flavor::Coturn] {
        let mut world = World::with_one(flavor, 3478);
        let old = world.relays.relayed(id(0))[0];
        world.take_events();
        world.twins[0].set_credentials("1800000000:twin", "of another secret");
        world.twins[0].restart();
        world.connect(&[0]);
        world.run(secs(4));
        let events = world.take_events();
        assert!(events.contains(&RelayEvent::Invalidated(old, id(0))), "{flavor:?}: {events:?}");
        assert!(!events.contains(&RelayEvent::NoneLeft), "{flavor:?}: {events:?}");
        assert!(world.allocated(), "{flavor:?}");
    }
}

#[test]
fn a_removed_relays_late_packets_are_swallowed_and_strangers_are_not() {
    let mut world = World::with_one(Flavor::Firezone, 3478);
    world.relays.update(&[id(0)], &[], world.now);
    world.pump();
    assert!(world.events.ends_with(&[
        RelayEvent::Gone(id(0)),
        RelayEvent::Servers([].into()),
        RelayEvent::NoneLeft
    ]));
    let stun = hex::decode(super::fixtures::DIRECT_BINDING_SUCCESS).unwrap();
    assert!(world.receive(addr("203.0.113.2:3478"), &stun));
    assert!(!world.receive(addr("203.0.113.2:50000"), &stun), "another relay's peer behind the same address");
    assert!(!world.receive(addr("192.0.2.2:3478"), &stun));
    let mut relayed = crate::command::StunDatagram {
        heard_by: crate::WorkerId::FIRST,
        local: addr("198.51.100.2:52625"),
        from: addr("203.0.113.2:3478"),
        via: Some(addr("203.0.113.9:3478")),
        payload: stun,
    };
    assert!(!world.relays.handle_stun(&relayed, world.now));
    relayed.via = None;
    assert!(world.relays.handle_stun(&relayed, world.now));
}

#[test]
fn keep_alives_come_every_25_s_unless_channel_data_flows_both_ways() {
    let mut world = World::with_one(Flavor::Firezone, 3478);
    world.relays.bind(id(0), addr(PEER), Use::Nominated, world.now);
    world.take_kinds();
    world.pump();
    world.run(secs(60));
    assert_eq!(world.take_kinds(), [BIND, BINDING, BINDING]);
    for (received, expect) in [(true, vec![]), (false, vec![BINDING, BINDING])] {
        for _ in 0..60 {
            let used = ChannelUse { server: addr("203.0.113.2:3478"), number: 0x4000, received, sent: true };
            world.relays.handle_channels_used(&[used], world.now);
            world.run(secs(1));
        }
        assert_eq!(world.take_kinds(), expect, "answered: {received}");
    }
}

#[test]
fn the_portal_hears_that_none_is_left_at_most_every_5_s() {
    let mut world = World::new(vec![Twin::new(Flavor::Coturn, &[addr("203.0.113.2:3478")], 1)], 1);
    let entries = world.twins[0].entries(id(0));
    world.twins[0].set_password("another");
    let mut said = 0;
    for _ in 0..200 {
        if world.relays.rtts().next().is_none() {
            world.relays.update(&[], &entries, world.now);
        }
        world.run(Duration::from_millis(100));
        said += world.take_events().iter().filter(|e| **e == RelayEvent::NoneLeft).count();
    }
    assert!(said <= 5, "{said}");
    world.run(secs(6));
    assert!(world.take_events().contains(&RelayEvent::NoneLeft), "but it does hear it");
}

#[test]
fn an_expired_allocation_is_asked_for_again() {
    let mut world = World::with_one(Flavor::Firezone, 3478);
    let old = world.relays.relayed(id(0))[0];
    world.take_events();
    // The machine slept.
    world.now += secs(4000);
    world.run(secs(1));
    assert!(world.events.starts_with(&[RelayEvent::Invalidated(old, id(0))]));
    assert!(world.allocated());
}

#[test]
fn nothing_secret_is_printed() {
    let world = World::with_one(Flavor::Firezone, 3478);
    let shown = format!("{:?}", world.relays);
    assert!(!shown.contains("2145916800") && !shown.contains("password"), "{shown}");
}
