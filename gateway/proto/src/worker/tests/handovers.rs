//! Packets that reach a worker which does not hold their client.

use super::{fleet::*, *};
use crate::WorkerId;

const FROM: &str = REMOTE;

fn there(seq: u8) -> Vec<u8> {
    udp(C4, LAN4, (1, 53), &[seq])
}

fn back(seq: u8) -> Vec<u8> {
    udp(LAN4, C4, (53, 1), &[seq])
}

/// Two workers; the client, with a session, is the second one's.
fn connected() -> (Fleet, Client) {
    let mut fleet = Fleet::new(2);
    let mut client = Fleet::client(1);
    fleet.place(&client, at(1, 1), direct());
    fleet.handshake(1, &mut client, addr(FROM));
    fleet.events.clear();
    (fleet, client)
}

#[test]
fn data_of_another_workers_client_goes_both_ways_and_is_counted_there() {
    let (mut fleet, mut client) = connected();
    let passes = fleet.passes;
    fleet.datagram(0, addr(FROM), &client.seal(&there(1)));
    fleet.packet(0, &back(2));
    assert!(fleet.tun.is_empty() && fleet.net.is_empty());
    fleet.check_accounts();
    fleet.rest();
    assert_eq!(fleet.tun.pop_front(), Some((1, there(1))));
    let (by, route, message) = fleet.net.pop_front().unwrap();
    assert_eq!((by, route.src, route.dst), (1, Some(addr(LOCAL)), addr(FROM)));
    assert_eq!(client.open(&message), Some(back(2)));
    assert_eq!(fleet.passes - passes, 2);
    let traffic = |n: usize| *fleet.nodes[n].worker.traffic();
    assert_eq!((traffic(1).outbound_direct.packets, traffic(1).inbound_direct.packets), (1, 1));
    assert_eq!(traffic(0), super::super::Traffic::default());
    assert!(
        matches!(fleet.events.pop_front(), Some((1, WorkerEvent::Activity { id, .. })) if id == client.id)
    );
    fleet.check_accounts();
}

#[test]
fn channel_data_is_passed_as_it_came() {
    let mut fleet = Fleet::new(2);
    let mut client = Fleet::client(1);
    fleet.tell(Command::Channel { server: addr(SERVER), number: CHANNEL, peer: Some(addr(REMOTE)) });
    let path = Path::Relayed { server: addr(SERVER), channel: Some(CHANNEL), remote: addr(REMOTE) };
    fleet.place(&client, at(1, 1), path);
    let frame = |message: &[u8]| {
        [&gateway_common::channel_data::header(CHANNEL, message.len()).unwrap()[..], message].concat()
    };
    let initiation = client.initiate();
    fleet.datagram(0, addr(SERVER), &frame(&initiation));
    fleet.rest();
    let (by, _, response) = fleet.net.pop_front().unwrap();
    assert_eq!(by, 1);
    let keepalive = client.answer(&response[4..]).unwrap();
    fleet.datagram(0, addr(SERVER), &frame(&keepalive));
    fleet.datagram(0, addr(SERVER), &frame(&client.seal(&there(1))));
    fleet.rest();
    assert_eq!(fleet.tun.pop_front(), Some((1, there(1))));
    assert_eq!(fleet.nodes[1].worker.traffic().outbound_relayed.packets, 1);
    // Control hears of the channel from both and takes it as one.
    fleet.advance(std::time::Duration::from_secs(1));
    (0..2).for_each(|n| fleet.time(n));
    let reports = fleet.events.iter().filter(
        |(_, event)| matches!(event, WorkerEvent::ChannelsUsed(used) if used.len() == 1 && used[0].received),
    );
    assert_eq!(reports.count(), 2);
    fleet.check_accounts();
}

#[test]
fn an_initiation_that_arrives_elsewhere_establishes_and_its_events_name_the_client() {
    let mut fleet = Fleet::new(3);
    let mut client = Fleet::client(1);
    fleet.place(&client, at(2, 1), direct());
    fleet.handshake(0, &mut client, addr(FROM));
    let established = |(by, event): &(usize, WorkerEvent)| {
        matches!(event, WorkerEvent::Established { id, index }
            if *by == 2 && (*id, *index) == (client.id, client.index))
    };
    assert!(fleet.events.iter().any(established), "{:?}", fleet.events);
    let handshakes: Vec<_> = fleet.nodes.iter().map(|n| n.worker.traffic().handshakes).collect();
    assert_eq!(handshakes, [0, 0, 1]);
    fleet.check_accounts();
}

#[test]
fn handshake_answers_are_passed_and_judged_by_the_owner() {
    let (mut fleet, client) = connected();
    let mut response = vec![0; 92];
    response[0] = 2;
    response[8..12].copy_from_slice(&(client.index.get() << 8 | 1).to_le_bytes());
    fleet.datagram(0, addr(FROM), &response);
    fleet.rest();
    assert_eq!(fleet.nodes[1].worker.counters().get(DropReason::HandshakeReplayed), 1);
    fleet.check_accounts();
}

#[test]
fn a_flood_of_handshakes_at_one_worker_leaves_the_clients_of_another_alone() {
    let mut fleet = Fleet::new(2);
    let mut known = Fleet::client(1);
    let mut unknown = Fleet::client(2);
    fleet.place(&known, at(1, 1), direct());
    let elsewhere = Path::Direct { local: addr(LOCAL), remote: addr("198.51.100.99:9") };
    fleet.place(&unknown, at(1, 2), elsewhere);
    // Genuine initiations of a stranger, and forged ones.
    let stranger = Fleet::client(50).initiate();
    let mut forged = stranger.clone();
    forged[130] ^= 1;
    for n in 0..300_u16 {
        let from = SocketAddr::from(([192, 0, 2, 1], 1000 + n));
        fleet.datagram(0, from, &stranger);
        fleet.datagram(0, from, &forged);
    }
    let count = |reason| fleet.nodes[0].worker.counters().get(reason);
    assert_eq!(count(DropReason::UnknownPublicKey), 50, "its share of 100");
    assert_eq!(count(DropReason::HandshakeBudget), 100, "its share of 200 cookies");
    // Beyond that nobody looks whether one is forged.
    let (forged, unseen) = (count(DropReason::HandshakeForged), count(DropReason::CookieBudget));
    assert_eq!((forged, unseen), (149, 301));
    assert_eq!(fleet.passes, 0, "nobody else hears of it");
    fleet.net.clear();
    // A known path has its own budget even where the flood arrives; an unknown one has what is left elsewhere.
    fleet.handshake(0, &mut known, addr(FROM));
    let initiation = unknown.initiate();
    fleet.datagram(1, addr("192.0.2.77:7"), &initiation);
    fleet.rest();
    assert_eq!(fleet.nodes[1].worker.traffic().handshakes, 2);
    fleet.check_accounts();
}

#[test]
fn the_budget_of_a_known_path_holds_where_its_packets_arrive() {
    let mut fleet = Fleet::new(2);
    let mut client = Fleet::client(1);
    fleet.place(&client, at(1, 1), direct());
    for _ in 0..30 {
        let initiation = client.initiate();
        fleet.datagram(0, addr(FROM), &initiation);
    }
    assert_eq!(fleet.passes, 10);
    assert_eq!(fleet.count(DropReason::HandshakeBudget), 20);
    let cookies = fleet.net.iter().filter(|(by, _, message)| (*by, message[0]) == (0, 3)).count();
    assert_eq!(cookies, 20, "said by the worker that counts");
    fleet.rest();
    fleet.check_accounts();
}

#[test]
fn an_initiation_passes_one_gate() {
    let mut fleet = Fleet::new(2);
    let mut client = Fleet::client(1);
    fleet.place(&client, at(1, 1), direct());
    let stranger = Fleet::client(50).initiate();
    (0..60).for_each(|_| fleet.datagram(1, addr("192.0.2.1:1"), &stranger));
    fleet.net.clear();
    let initiation = client.initiate();
    fleet.datagram(0, addr("192.0.2.2:2"), &initiation);
    fleet.rest();
    assert_eq!(fleet.net.pop_front().map(|(by, _, message)| (by, message[0])), Some((1, 2)));
    fleet.check_accounts();
}

#[test]
fn stun_stays_where_it_was_heard() {
    let (mut fleet, _) = connected();
    let mut stun = vec![0; 20];
    stun[..8].copy_from_slice(&[0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42]);
    for n in 0..2 {
        fleet.datagram(n, addr(FROM), &stun);
        let Some((by, WorkerEvent::Stun(datagram))) = fleet.events.pop_front() else { panic!("no STUN") };
        assert_eq!((by, datagram.heard_by), (n, id(n)));
    }
    fleet.check_accounts();
}

#[test]
fn a_full_ring_is_counted_and_passes() {
    let (mut fleet, mut client) = connected();
    fleet.nodes[0].sink.rings_are_full = true;
    let initiation = client.initiate();
    fleet.datagram(0, addr(FROM), &client.seal(&there(1)));
    fleet.datagram(0, addr(FROM), &initiation);
    fleet.packet(0, &back(1));
    assert_eq!(fleet.nodes[0].worker.counters().get(DropReason::HandoverFull), 3);
    fleet.nodes[0].sink.rings_are_full = false;
    fleet.datagram(0, addr(FROM), &client.seal(&there(2)));
    fleet.rest();
    assert_eq!(fleet.tun.pop_front(), Some((1, there(2))));
    fleet.check_accounts();
}

#[test]
fn workers_that_disagree_pass_a_packet_a_few_times_and_then_drop_it() {
    let mut fleet = Fleet::new(2);
    let client = Fleet::client(1);
    let command = |n| client_command(&client, at(n, 1), direct());
    for n in 0..2 {
        let (node, now) = (&mut fleet.nodes[n], fleet.now);
        node.worker.handle_command(command(1 - n), now, &mut node.sink);
    }
    fleet.packet(0, &back(1));
    fleet.rest();
    assert_eq!((fleet.passes, fleet.count(DropReason::HandoverFull)), (3, 1));
    fleet.check_accounts();
}

#[test]
fn what_the_owner_may_not_let_through_it_drops_and_denies() {
    let (mut fleet, mut client) = connected();
    fleet.datagram(0, addr(FROM), &client.seal(&udp(C4, "10.9.9.9", (1, 53), b"")));
    fleet.packet(0, &udp("10.9.9.9", C4, (53, 1), b""));
    fleet.packet(0, &udp("100.64.2.2", C4, (53, 1), b""));
    let mut forged = client.seal(&there(1));
    *forged.last_mut().unwrap() ^= 1;
    fleet.datagram(0, addr(FROM), &forged);
    fleet.rest();
    use DropReason::{DataForged, InboundNotAllowed, NotAllowed, TunnelSource};
    for reason in [NotAllowed, InboundNotAllowed, TunnelSource, DataForged] {
        assert_eq!(fleet.nodes[1].worker.counters().get(reason), 1, "{reason:?}");
    }
    assert_eq!(fleet.nodes[1].worker.traffic().denials, 1);
    fleet.check_accounts();
}

#[test]
fn a_revocation_holds_at_the_owner_whatever_others_know() {
    let (mut fleet, mut client) = connected();
    let revoked = Command::Client { id: client.id, home: at(1, 1), desired: None };
    fleet.post(&revoked, 0);
    fleet.hear(1);
    fleet.net.clear();
    fleet.datagram(0, addr(FROM), &client.seal(&there(1)));
    fleet.packet(0, &back(1));
    fleet.turn(1, |all| all);
    assert_eq!(fleet.nodes[1].worker.counters().get(DropReason::UnknownSession), 1);
    assert_eq!(fleet.nodes[1].worker.counters().get(DropReason::NoPeerState), 1);
    fleet.check_accounts();
}

#[test]
fn one_worker_never_passes_anything() {
    let mut fleet = Fleet::new(1);
    let mut client = Fleet::client(1);
    fleet.place(&client, at(0, 1), direct());
    fleet.handshake(0, &mut client, addr(FROM));
    fleet.datagram(0, addr(FROM), &client.seal(&there(1)));
    assert_eq!(fleet.tun.pop_front(), Some((0, there(1))));
    assert_eq!((fleet.passes, WorkerId::FIRST), (0, id(0)));
    fleet.check_accounts();
}
