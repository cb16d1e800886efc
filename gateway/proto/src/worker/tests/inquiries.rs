//! What an operator hears is what is: figures, flows, and verdicts that real packets get as well.

use std::time::Duration;

use super::{
    flows::{clock, counting, out, segment},
    *,
};
use crate::{
    WorkerId,
    inquiry::{Answer, Imagined, Inquiry, Let, MAX_FLOWS_TOLD, PAGE, Question, Verdict},
    worker::{Volume, inner::Transport},
};

fn ask(world: &mut World, question: Question) -> Answer {
    world.events();
    world.command(Command::Inquire(Inquiry { serial: 7, question }));
    let events = world.events();
    let [WorkerEvent::Replied(reply)] = &events[..] else { panic!("{events:?}") };
    assert_eq!((reply.worker, reply.serial), (WorkerId::FIRST, 7));
    reply.answer.clone()
}

fn why(world: &mut World, src: &str, dst: &str, transport: Transport) -> Option<Verdict> {
    let packet = Imagined { src: src.parse().unwrap(), dst: dst.parse().unwrap(), transport };
    match ask(world, Question::Why(packet)) {
        Answer::Why(verdict) => verdict,
        other => panic!("{other:?}"),
    }
}

#[test]
fn figures_are_what_was_carried_and_how_old_the_session_is() {
    let mut world = World::connected(&lan());
    let packet = udp(C4, LAN4, (40000, 53), b"question");
    world.outbound(&packet);
    world.inbound(&udp(LAN4, C4, (53, 40000), b"the answer"));
    world.outbound(&udp(C4, "10.99.0.1", (1, 2), b"denied"));
    let (page, places) = match ask(&mut world, Question::Clients { from: 0 }) {
        Answer::Clients { clients, places } => (clients, places),
        other => panic!("{other:?}"),
    };
    let [client] = &page[..] else { panic!("{page:?}") };
    assert_eq!((client.id, places), (world.client.id, 1));
    assert_eq!(client.outbound, Volume { packets: 1, bytes: packet.len() as u64 });
    assert_eq!(client.inbound, Volume { packets: 1, bytes: packet.len() as u64 + 2 });
    assert!(client.handshake_age.is_some_and(|age| age < Duration::from_secs(1)), "{client:?}");
    assert_eq!((client.flows, client.translated, &client.by_resource[..]), (None, 0, &[][..]));
    for from in [1, PAGE, u32::MAX] {
        let answer = ask(&mut world, Question::Clients { from });
        assert!(matches!(answer, Answer::Clients { clients, places: 1 } if clients.is_empty()));
    }
    world.check_accounts();
}

#[test]
fn a_client_without_a_session_has_no_handshake() {
    let mut world = World::new(&lan());
    match ask(&mut world, Question::Clients { from: 0 }) {
        Answer::Clients { clients, .. } => assert_eq!(clients[0].handshake_age, None),
        other => panic!("{other:?}"),
    }
    let verdict = why(&mut world, C4, LAN4, Transport::IcmpEcho).unwrap();
    assert!(!verdict.has_session && verdict.outcome.is_ok(), "{verdict:?}");
}

/// Every line is asked, and then sent: both must get the same.
#[test]
fn an_imagined_packet_gets_the_verdict_of_a_real_one() {
    let resources = [lan(), vec![cidr(5, "10.50.0.0/16", &[Filter::Tcp { first: 443, last: 443 }])]].concat();
    let mut world = World::connected(&resources);
    let by = |n| Ok(Let { by: Some(resource_id(n)), real: None });
    let port = |port| (Transport::Udp { src: port, dst: port }, false);
    let tcp_port = |port| (Transport::Tcp { src: port, dst: port }, true);
    let table = [
        (C4, LAN4, port(53), by(1)),
        (C6, LAN6, port(53), by(2)),
        (C4, "10.50.1.2", tcp_port(443), by(5)),
        (C4, "10.50.1.2", tcp_port(80), Err(DropReason::NotAllowed)),
        (C4, "10.50.1.2", port(443), Err(DropReason::NotAllowed)),
        (C4, "192.168.7.7", port(53), Err(DropReason::NotAllowed)),
        (C4, "224.0.0.1", port(53), Err(DropReason::Multicast)),
        (C4, "100.64.9.9", port(53), Err(DropReason::TunnelDestination)),
        (C4, OWN_V4, port(53), Err(DropReason::OwnAddressPort)),
        (C4, OWN_V4, port(53535), Ok(Let { by: None, real: None })),
        (C4, "100.96.0.9", port(53), Err(DropReason::NotAllowed)),
    ];
    for (src, dst, (transport, is_tcp), expect) in table {
        let name = format!("{src} {dst} {transport:?}");
        let verdict = why(&mut world, src, dst, transport).expect(&name);
        assert_eq!((verdict.client, verdict.is_outbound), (world.client.id, true), "{name}");
        assert_eq!(verdict.outcome, expect, "{name}");
        let port = match transport {
            Transport::Udp { dst, .. } | Transport::Tcp { dst, .. } => dst,
            _ => 0,
        };
        let packet = if is_tcp { tcp(src, dst, (40000, port)) } else { udp(src, dst, (40000, port), b"x") };
        let before = world.sink.packets.len();
        let counted = expect.err().map(|reason| world.count(reason));
        world.outbound(&packet);
        assert_eq!(world.sink.packets.len() - before, usize::from(expect.is_ok()), "{name}");
        assert_eq!(expect.err().map(|reason| world.count(reason)), counted.map(|count| count + 1), "{name}");
    }
    // To the client.
    for (src, port, expect) in [
        (LAN4, 53, by(1)),
        ("10.50.1.2", 443, Err(DropReason::InboundNotAllowed)),
        ("192.168.7.7", 53, Err(DropReason::InboundNotAllowed)),
        ("100.96.0.1", 53, Err(DropReason::InboundNotAllowed)),
    ] {
        let verdict = why(&mut world, src, C4, Transport::Udp { src: port, dst: port }).unwrap();
        assert_eq!((verdict.is_outbound, verdict.outcome), (false, expect), "{src}");
        let counted = expect.err().map(|reason| world.count(reason));
        world.inbound(&udp(src, C4, (port, 40000), b"x"));
        assert_eq!(expect.err().map(|reason| world.count(reason)), counted.map(|count| count + 1), "{src}");
    }
    // Nobody's.
    assert_eq!(why(&mut world, LAN4, "10.1.2.3", Transport::IcmpEcho), None);
    assert_eq!(why(&mut world, OWN_V4, LAN4, Transport::IcmpEcho), None);
}

#[test]
fn open_flows_come_newest_first_and_as_many_as_are_wanted() {
    let mut world = counting(false);
    world.command(clock(&world));
    for port in 40000..40005 {
        out(&mut world, &segment((C4, port), (LAN4, 80), 2, 0));
        world.advance(Duration::from_secs(1));
    }
    let mut told = |client, most| match ask(&mut world, Question::Flows { client, most }) {
        Answer::Flows { counted, open, flows, looked_at_all } => {
            assert!(counted && looked_at_all);
            (open, flows.into_iter().map(|flow| flow.src.port()).collect::<Vec<_>>())
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(told(None, 3), (5, vec![40004, 40003, 40002]));
    assert_eq!(told(None, usize::MAX).1.len(), 5);
    assert_eq!(told(None, 0), (5, vec![]));
    assert_eq!(told(Some(crate::ClientId(uuid::Uuid::from_u128(99))), MAX_FLOWS_TOLD), (0, vec![]));
    // What closed flows carried is not forgotten.
    out(&mut world, &segment((C4, 40000), (LAN4, 80), 0x18, 100));
    out(&mut world, &segment((C4, 40000), (LAN4, 80), 4, 0));
    match ask(&mut world, Question::Clients { from: 0 }) {
        Answer::Clients { clients, .. } => {
            let carried = Volume { packets: 7, bytes: 100 };
            assert_eq!(clients[0].by_resource, [(resource_id(1), carried, Volume::default())]);
            assert_eq!(clients[0].flows, Some(4));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn where_flows_are_not_counted_that_is_said() {
    let mut world = World::connected(&lan());
    let answer = ask(&mut world, Question::Flows { client: None, most: 9 });
    assert!(matches!(answer, Answer::Flows { counted: false, open: 0, .. }), "{answer:?}");
}
