//! What clients say about names, and the answers on their way to them.

use std::time::Duration;

use super::{fleet::*, *};
use crate::names::{Answer, Names};

const RESOURCE: u128 = 3;

/// A control packet of a client, of `kind`, with `payload` behind its header.
pub fn control(kind: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = GOODBYE.to_vec();
    packet[40] = kind;
    packet.extend_from_slice(payload);
    let len = u16::try_from(packet.len() - 40).unwrap();
    packet[4..6].copy_from_slice(&len.to_be_bytes());
    packet
}

fn assign(domain: &str) -> Vec<u8> {
    let resource = resource_id(RESOURCE);
    let json = format!(r#"{{"resource":"{resource}","domain":"{domain}","proxy_ips":["100.96.0.1"]}}"#);
    control(0, json.as_bytes())
}

/// What control answered so far.
fn answers(serials: impl IntoIterator<Item = u64>) -> Arc<Names> {
    let answer = |serial| Answer {
        serial,
        resource: resource_id(RESOURCE),
        said: format!("n{serial}.net").into(),
        active: serial % 2 == 0,
    };
    Arc::new(Names { answers: serials.into_iter().map(answer).collect(), ..Names::default() })
}

/// The name and the status in a packet to the client.
fn read(packet: &[u8]) -> String {
    assert_eq!(packet[40], 1, "a DomainStatus: {packet:?}");
    let json: serde_json::Value = serde_json::from_slice(&packet[48..]).unwrap();
    assert_eq!(json["resource"], resource_id(RESOURCE).to_string());
    format!("{} {}", json["domain"].as_str().unwrap(), json["status"].as_str().unwrap())
}

fn tell(world: &mut World, names: &Arc<Names>) {
    let connection = Connection::Present(world.client.keys(), Some(direct()));
    let state = ClientState::new(world.client.tunnel, connection, lan().into());
    world.tell_state(ClientState { names: Arc::clone(names), ..state });
}

fn told(world: &mut World) -> Vec<String> {
    std::iter::from_fn(|| world.received()).map(|packet| read(&packet)).collect()
}

#[test]
fn what_a_client_assigns_is_told_with_its_connection() {
    let mut world = World::connected(&lan());
    world.events();
    world.outbound(&assign("Git.Example.Net."));
    let (id, index) = (world.client.id, world.client.index);
    let [WorkerEvent::Activity { .. }, WorkerEvent::Assigned { id: whose, index: of, assigned }] =
        &world.events()[..]
    else {
        panic!("activity and an assignment")
    };
    assert_eq!((*whose, *of), (id, index));
    assert_eq!((&*assigned.said, assigned.domain.as_str()), ("Git.Example.Net", "git.example.net"));
    assert_eq!(assigned.resource, resource_id(RESOURCE));
    assert_eq!(assigned.proxies, ["100.96.0.1".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(told(&mut world), [""; 0], "control answers, not the worker");
    world.check_accounts();
}

#[test]
fn malformed_assignments_are_counted_and_other_kinds_are_ignored() {
    let mut world = World::connected(&lan());
    let whole = assign("x.net");
    let table: [(&str, Vec<u8>, bool); 7] = [
        ("nothing", control(0, b""), false),
        ("no JSON", control(0, b"hello"), false),
        ("cut JSON", control(0, &whole[48..whole.len() - 1]), false),
        ("an impossible name", assign("x..net"), false),
        ("a name too long", assign(&"x.".repeat(128)), false),
        ("a status", control(1, &whole[48..]), true),
        ("a kind of later", control(200, &whole[48..]), true),
    ];
    for (name, packet, taken) in table {
        let (malformed, control) =
            (world.count(DropReason::MalformedControl), world.worker.traffic().control);
        world.outbound(&packet);
        assert_eq!(world.count(DropReason::MalformedControl) - malformed, u64::from(!taken), "{name}");
        assert_eq!(world.worker.traffic().control - control, u64::from(taken), "{name}");
        assert!(!world.events().iter().any(|e| matches!(e, WorkerEvent::Assigned { .. })), "{name}");
        assert_eq!(world.client_gets(), None, "{name}");
        world.check_accounts();
    }
}

#[test]
fn assignments_have_a_budget_and_goodbyes_do_not_wait_for_it() {
    let mut world = World::connected(&lan());
    let assigned = |world: &mut World| {
        world.events().iter().filter(|e| matches!(e, WorkerEvent::Assigned { .. })).count()
    };
    for _ in 0..150 {
        world.outbound(&assign("x.net"));
    }
    assert_eq!((assigned(&mut world), world.count(DropReason::ControlBudget)), (100, 50));
    // What cannot be read costs as much.
    world.outbound(&control(0, b"{"));
    assert_eq!((world.count(DropReason::MalformedControl), world.count(DropReason::ControlBudget)), (0, 51));
    world.advance(Duration::from_secs(1));
    for _ in 0..30 {
        world.outbound(&assign("x.net"));
    }
    assert_eq!((assigned(&mut world), world.count(DropReason::ControlBudget)), (20, 61));
    world.check_accounts();
    world.outbound(&GOODBYE);
    assert!(world.events().iter().any(|e| matches!(e, WorkerEvent::Goodbye { .. })));
}

#[test]
fn each_answer_is_sent_once_whatever_else_is_told() {
    let mut world = World::connected(&lan());
    tell(&mut world, &answers([4]));
    assert_eq!(told(&mut world), ["n4.net Active"]);
    tell(&mut world, &answers([4]));
    assert_eq!(told(&mut world), [""; 0]);
    // Commands coalesce: this one stands for three.
    tell(&mut world, &answers([4, 5, 9, 12]));
    assert_eq!(told(&mut world), ["n5.net Inactive", "n9.net Inactive", "n12.net Active"]);
    // The oldest are forgotten at some time.
    tell(&mut world, &answers([9, 12, 13]));
    assert_eq!(told(&mut world), ["n13.net Inactive"]);
    assert_eq!(world.worker.traffic().answers, 5);
    world.check_accounts();
}

#[test]
fn what_cannot_be_sent_is_forgotten_and_an_earlier_life_is_not_answered() {
    // The client is new here, these are not its questions.
    let mut world = World::new(&lan());
    world.revoke();
    tell(&mut world, &answers([1, 2]));
    world.handshake();
    tell(&mut world, &answers([1, 2]));
    assert_eq!(told(&mut world), [""; 0]);

    let mut world = World::new(&lan());
    tell(&mut world, &answers([1, 2]));
    world.handshake();
    tell(&mut world, &answers([1, 2]));
    assert_eq!(told(&mut world), [""; 0], "there was no session when they came");
    world.sink.full = true;
    tell(&mut world, &answers([1, 2, 3]));
    world.sink.full = false;
    tell(&mut world, &answers([1, 2, 3, 4]));
    assert_eq!(told(&mut world), ["n4.net Active"]);
    assert_eq!(world.worker.traffic().answers, 1);
}

#[test]
fn an_answer_is_sent_once_over_a_move_whoever_hears_first() {
    for (name, order) in [("the old one", [0, 1]), ("the new one", [1, 0])] {
        let mut fleet = Fleet::new(2);
        let mut client = Fleet::client(1);
        let tell = |fleet: &mut Fleet, client: &Client, home, serials: &[u64]| {
            let connection = Connection::Present(client.keys(), Some(direct()));
            let state = ClientState::new(client.tunnel, connection, lan().into());
            let state = ClientState { names: answers(serials.iter().copied()), ..state };
            fleet.post(&Command::Client { id: client.id, home, desired: Some(Arc::new(state)) }, 0);
        };
        fleet.place(&client, at(0, 1), direct());
        fleet.handshake(0, &mut client, addr(REMOTE));
        tell(&mut fleet, &client, at(0, 1), &[1]);
        fleet.hear(0);
        fleet.hear(1);
        // It is told to move with one answer more, and gets another on the way.
        tell(&mut fleet, &client, from_to(0, 1, 2), &[1, 2]);
        fleet.hear(order[0]);
        tell(&mut fleet, &client, from_to(0, 1, 2), &[1, 2, 3]);
        fleet.hear(order[1]);
        fleet.rest();
        tell(&mut fleet, &client, at(1, 2), &[1, 2, 3, 4]);
        fleet.rest();
        let told: Vec<(usize, String)> =
            fleet.net.drain(..).map(|(by, _, message)| (by, read(&client.open(&message).unwrap()))).collect();
        let expect =
            [(0, "n1.net Inactive"), (1, "n2.net Active"), (1, "n3.net Inactive"), (1, "n4.net Active")];
        assert_eq!(told, expect.map(|(by, text)| (by, text.to_owned())), "{name}");
        assert_eq!(fleet.holders(client.id), [(1, Some(client.index))]);
        fleet.check_accounts();
    }
}
