//! A client goes from one worker to another.

use super::{
    super::{Moved, peers::Entry},
    fleet::*,
    *,
};

const FROM: &str = REMOTE;

/// Three workers; the client, with a session, is the first one's.
fn connected() -> (Fleet, Client) {
    let mut fleet = Fleet::new(3);
    let mut client = Fleet::client(1);
    fleet.place(&client, at(0, 1), direct());
    fleet.handshake(0, &mut client, addr(FROM));
    fleet.events.clear();
    (fleet, client)
}

fn there(seq: u8) -> Vec<u8> {
    udp(C4, LAN4, (1, 53), &[seq])
}

/// The client's packets pass in both directions, whichever worker they reach.
#[track_caller]
fn check_traffic(fleet: &mut Fleet, client: &mut Client, by: usize) {
    for n in 0..fleet.nodes.len() {
        let back = udp(LAN4, C4, (53, 1), &[9]);
        fleet.datagram(n, addr(FROM), &client.seal(&there(8)));
        fleet.packet(n, &back);
        fleet.rest();
        assert_eq!(fleet.tun.pop_front(), Some((by, there(8))));
        let (who, _, message) = fleet.net.pop_front().expect("an answer");
        assert_eq!((who, client.open(&message)), (by, Some(back)));
    }
    fleet.check_accounts();
}

fn adopted(fleet: &mut Fleet) -> Vec<(usize, u64)> {
    let adopted = |(by, event): (usize, WorkerEvent)| match event {
        WorkerEvent::Adopted { worker, order, .. } => {
            assert_eq!(worker, id(by));
            Some((by, order))
        }
        _ => None,
    };
    fleet.events.drain(..).filter_map(adopted).collect()
}

#[test]
fn in_whatever_order_the_workers_hear_of_a_move_nothing_is_lost() {
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let (mut fleet, mut client) = connected();
        fleet.post(&client_command(&client, from_to(0, 1, 2), direct()), 0);
        let mut sent = 0;
        for turn in 0..4 {
            // Packets at every worker between any two steps, some on their way while the next step is made.
            for n in 0..3 {
                fleet.datagram(n, addr(FROM), &client.seal(&there(sent)));
                sent += 1;
                fleet.packet(n, &udp(LAN4, C4, (53, 1), &[sent]));
            }
            if let Some(next) = order.get(turn) {
                fleet.hear(*next);
                fleet.turn(*next, |all| all / 2);
            }
            fleet.check_accounts();
        }
        fleet.rest();
        assert_eq!((fleet.tun.len(), fleet.net.len()), (12, 12), "{order:?}");
        assert!(fleet.net.drain(..).all(|(_, _, message)| client.open(&message).is_some()));
        fleet.tun.clear();
        assert_eq!(fleet.holders(client.id), [(1, Some(client.index))]);
        assert_eq!(adopted(&mut fleet), [(1, 2)]);
        check_traffic(&mut fleet, &mut client, 1);
    }
}

#[test]
fn a_client_that_comes_before_its_order_is_taken_in_and_older_commands_do_not_undo_it() {
    let (mut fleet, mut client) = connected();
    fleet.post(&client_command(&client, at(0, 1), direct()), 0);
    fleet.post(&client_command(&client, from_to(0, 1, 2), direct()), 0);
    fleet.hear(0);
    fleet.turn(1, |all| all);
    assert_eq!(fleet.holders(client.id), [(1, Some(client.index))]);
    assert_eq!(adopted(&mut fleet), [(1, 2)]);
    fleet.deliver(1, 1);
    fleet.drain(1);
    assert_eq!(fleet.holders(client.id), [(1, Some(client.index))], "that command was of before");
    fleet.rest();
    assert_eq!(adopted(&mut fleet), []);
    check_traffic(&mut fleet, &mut client, 1);
}

#[test]
fn an_order_is_answered_once_and_by_empty_hands_if_need_be() {
    // The worker that is to give never heard of the client: control placed and moved it in one breath.
    let mut fleet = Fleet::new(3);
    let mut client = Fleet::client(1);
    for _ in 0..3 {
        fleet.place(&client, from_to(0, 1, 2), direct());
        fleet.rest();
    }
    assert_eq!(adopted(&mut fleet), [(1, 2)]);
    fleet.handshake(2, &mut client, addr(FROM));
    fleet.place(&client, from_to(0, 1, 2), direct());
    check_traffic(&mut fleet, &mut client, 1);
    assert_eq!(fleet.answers, 1);
}

#[test]
fn there_and_back_again() {
    let (mut fleet, mut client) = connected();
    for (n, (from, to)) in [(0, 1), (1, 2), (2, 1), (1, 0)].into_iter().enumerate() {
        let order = 2 + n as u64;
        fleet.place(&client, from_to(from, to, order), direct());
        fleet.rest();
        assert_eq!(adopted(&mut fleet), [(to, order)]);
        fleet.place(&client, at(to, order), direct());
        check_traffic(&mut fleet, &mut client, to);
    }
}

#[test]
fn what_control_said_while_the_client_was_on_its_way_holds_when_it_arrives() {
    let (mut fleet, mut client) = connected();
    fleet.place(&client, from_to(0, 1, 2), direct());
    let connection = Connection::Present(client.keys(), Some(direct()));
    let mut state = ClientState::clone(&client_state(&client, connection));
    state.resources = [].into();
    fleet.tell(Command::Client { id: client.id, home: from_to(0, 1, 2), desired: Some(Arc::new(state)) });
    fleet.rest();
    fleet.datagram(2, addr(FROM), &client.seal(&there(1)));
    fleet.rest();
    assert_eq!(fleet.nodes[1].worker.counters().get(DropReason::NotAllowed), 1);
}

#[test]
fn a_new_connection_made_on_the_way_starts_afresh() {
    let (mut fleet, client) = connected();
    fleet.post(&client_command(&client, from_to(0, 1, 2), direct()), 0);
    fleet.hear(0);
    let mut again = Fleet::client(1);
    again.index = crate::ConnectionIndex::new(0x77).unwrap();
    fleet.place(&again, from_to(0, 1, 2), direct());
    fleet.rest();
    assert_eq!(fleet.holders(client.id), [(1, Some(again.index))]);
    fleet.handshake(2, &mut again, addr(FROM));
    check_traffic(&mut fleet, &mut again, 1);
}

#[test]
fn a_client_removed_on_its_way_is_told_goodbye_by_whoever_has_it() {
    // Who hears of the order before the removal.
    for heard in [vec![], vec![0], vec![1], vec![0, 1]] {
        let (mut fleet, mut client) = connected();
        fleet.post(&client_command(&client, from_to(0, 1, 2), direct()), 0);
        heard.iter().for_each(|n| fleet.hear(*n));
        fleet.tell(Command::Client { id: client.id, home: from_to(0, 1, 2), desired: None });
        fleet.rest();
        let said: Vec<_> = fleet.net.drain(..).map(|(_, _, message)| client.open(&message)).collect();
        assert_eq!(said, [Some(GOODBYE.to_vec())], "{heard:?}");
        assert!(fleet.nodes.iter().all(|node| node.known() == 0), "{heard:?}");
        assert_eq!(adopted(&mut fleet), [], "{heard:?}");
        fleet.datagram(2, addr(FROM), &client.seal(&there(1)));
        assert_eq!(fleet.count(DropReason::UnknownSession), 1);
    }
}

#[test]
fn a_client_that_came_back_is_not_mistaken_for_the_one_on_its_way() {
    for heard in [vec![], vec![0], vec![1], vec![0, 1]] {
        let (mut fleet, client) = connected();
        let removed = Command::Client { id: client.id, home: from_to(0, 1, 2), desired: None };
        fleet.post(&client_command(&client, from_to(0, 1, 2), direct()), 0);
        heard.iter().for_each(|n| fleet.hear(*n));
        fleet.post(&removed, 0);
        // It comes back at once and is ordered by the same words as before.
        let mut again = Fleet::client(1);
        again.index = crate::ConnectionIndex::new(0x77).unwrap();
        fleet.post(&client_command(&again, at(0, 3), direct()), 0);
        fleet.post(&client_command(&again, from_to(0, 1, 4), direct()), 0);
        fleet.rest();
        assert_eq!(fleet.holders(client.id), [(1, Some(again.index))], "{heard:?}");
        assert!(adopted(&mut fleet).contains(&(1, 4)), "{heard:?}");
        assert!(fleet.net.is_empty(), "no goodbye to somebody who is back");
        fleet.handshake(2, &mut again, addr(FROM));
        check_traffic(&mut fleet, &mut again, 1);
    }
}

#[test]
fn a_client_that_arrives_where_it_no_longer_belongs_is_dropped_in_silence() {
    let (mut fleet, client) = connected();
    fleet.post(&client_command(&client, from_to(0, 1, 2), direct()), 0);
    fleet.hear(0);
    let mut again = Fleet::client(1);
    again.index = crate::ConnectionIndex::new(0x77).unwrap();
    fleet.place(&again, at(2, 3), direct());
    fleet.rest();
    assert_eq!(fleet.answers, 1);
    assert_eq!(fleet.holders(client.id), [(2, Some(again.index))]);
    assert_eq!((adopted(&mut fleet), fleet.net.len()), (vec![], 0));
    fleet.handshake(1, &mut again, addr(FROM));
    check_traffic(&mut fleet, &mut again, 2);
}

#[test]
fn a_client_that_left_by_itself_before_its_order_came_leaves_no_wait_behind() {
    let (mut fleet, mut client) = connected();
    fleet.post(&client_command(&client, from_to(0, 1, 2), direct()), 0);
    fleet.hear(0);
    fleet.turn(1, |all| all);
    fleet.datagram(1, addr(FROM), &client.seal(&GOODBYE));
    fleet.rest();
    assert_eq!(adopted(&mut fleet), [(1, 2)]);
    // Control, which has not heard of the goodbye, says that the move is over.
    fleet.place(&client, at(1, 2), direct());
    assert_eq!(fleet.holders(client.id), [(1, Some(client.index))]);
}

#[test]
fn a_worker_that_missed_a_removal_drops_what_it_held_in_silence() {
    let (mut fleet, client) = connected();
    let mut again = Fleet::client(1);
    again.index = crate::ConnectionIndex::new(0x77).unwrap();
    fleet.place(&again, at(2, 2), direct());
    assert_eq!(fleet.holders(client.id), [(2, Some(again.index))]);
    assert!(fleet.net.is_empty());
    fleet.handshake(0, &mut again, addr(FROM));
    check_traffic(&mut fleet, &mut again, 2);
}

#[test]
fn timers_and_held_replies_go_along() {
    let mut fleet = Fleet::new(2);
    let mut client = Fleet::client(1);
    let pathless = |home| {
        let connection = Connection::Present(client.keys(), None);
        Command::Client { id: client.id, home, desired: Some(client_state(&client, connection)) }
    };
    let (first, moving) = (pathless(at(0, 1)), pathless(from_to(0, 1, 2)));
    fleet.tell(first);
    let initiation = client.initiate();
    fleet.datagram(0, addr(FROM), &initiation);
    assert!(fleet.net.is_empty(), "no path yet");
    fleet.tell(moving);
    fleet.rest();
    assert!(fleet.nodes[1].worker.poll_timeout().is_some(), "somebody looks at its timers");
    fleet.place(&client, at(1, 2), direct());
    let (by, _, response) = fleet.net.pop_front().expect("the reply that waited");
    assert_eq!(by, 1);
    let keepalive = client.answer(&response).unwrap();
    fleet.datagram(0, addr(FROM), &keepalive);
    fleet.rest();
    // The first worker looks once more, at nobody.
    fleet.advance(std::time::Duration::from_secs(2));
    fleet.time(0);
    assert_eq!(fleet.nodes[0].worker.poll_timeout(), None);
}

#[test]
fn a_shutdown_says_goodbye_once_to_each_client() {
    let (mut fleet, mut client) = connected();
    fleet.tell(Command::Shutdown);
    assert_eq!(fleet.net.len(), 1);
    let (by, _, message) = fleet.net.pop_front().unwrap();
    assert_eq!((by, client.open(&message)), (0, Some(GOODBYE.to_vec())));
    assert!(fleet.nodes.iter().all(|node| node.known() == 0));
}

#[test]
fn a_client_on_its_way_shows_no_secret() {
    let (mut fleet, client) = connected();
    let node = &mut fleet.nodes[0];
    node.worker.handle_command(
        client_command(&client, from_to(0, 1, 2), direct()),
        fleet.now,
        &mut node.sink,
    );
    let Some((_, Parcel::Client(moved))) = node.sink.passed.pop() else { panic!("given") };
    assert_eq!(format!("{moved:?}"), format!("Moved {{ id: {}, order: 2, .. }}", client.id));
    let entry = node.entry(client.id);
    assert!(matches!(entry, Some(Entry::There(there)) if there.worker == id(1) && !there.awaited));
    let _: Moved = moved;
}
