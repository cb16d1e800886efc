//! What clients say about names, and what the workers are told to answer.

use super::*;
use crate::names::{Answer, AssignedIps, DomainName, Lookup, Resolved};

fn assigned(resource: u128, domain: &str) -> Box<AssignedIps> {
    let resource = ResourceId(Uuid::from_u128(resource));
    let json = format!(r#"{{"resource":"{resource}","domain":"{domain}","proxy_ips":["100.96.0.1"]}}"#);
    Box::new(AssignedIps::parse(json.as_bytes()).unwrap())
}

fn answers(world: &World) -> Vec<Answer> {
    world.state().expect("a client").names.answers.to_vec()
}

fn connected() -> World {
    let mut world = settled();
    world.authorize(1);
    world.run_until("connected", 3 * SECOND, World::is_connected);
    world
}

fn assign(world: &mut World, resource: u128, domain: &str) {
    let (id, index) = (world.client.id, world.index().expect("a connection"));
    world.worker_event(WorkerEvent::Assigned { id, index, assigned: assigned(resource, domain) });
}

#[test]
fn an_assignment_is_answered_in_the_clients_words() {
    let mut world = connected();
    assign(&mut world, 1, "Git.Example.Net.");
    assign(&mut world, 7, "x.net");
    let got = answers(&world);
    let brief: Vec<_> = got.iter().map(|a| (a.resource.0.as_u128(), &*a.said, a.active)).collect();
    assert_eq!(brief, [(1, "Git.Example.Net", false), (7, "x.net", false)]);
    assert!(got[0].serial < got[1].serial);
}

/// Authorizes a DNS resource.
fn authorize_names(world: &mut World, resource: u128) {
    let mut authorize = world.client.authorize(resource, None);
    let (name, pattern, filters) = (String::new(), "**.net".into(), vec![]);
    authorize.resource.kind = ResourceKind::Dns { name, pattern, filters };
    world.ingress(Ingress::Authorize(Box::new(authorize)));
}

fn wanted(world: &mut World) -> Vec<String> {
    let name = |event: Event| match event {
        Event::Resolve(name) => Some(name.to_string()),
        _ => None,
    };
    world.events.drain(..).filter_map(name).collect()
}

#[test]
fn a_name_of_a_dns_resource_is_looked_up_once_for_all_and_answered_to_who_is_still_there() {
    let nothing = Resolved { v4: Lookup::Answer(vec![]), v6: Lookup::Failed };
    let name = DomainName::parse("x.net").unwrap();
    let mut world = connected();
    authorize_names(&mut world, 2);
    authorize_names(&mut world, 3);
    assign(&mut world, 2, "x.net");
    assign(&mut world, 3, "X.net.");
    assign(&mut world, 2, "x.net");
    assert_eq!(wanted(&mut world), ["x.net"]);
    assert_eq!(answers(&world), [], "nothing is known yet");
    world.resolved(&name, &nothing);
    let brief: Vec<_> =
        answers(&world).iter().map(|a| (a.resource.0.as_u128(), a.said.to_string(), a.active)).collect();
    assert_eq!(brief, [(2, "x.net".into(), false), (3, "X.net".into(), false)]);
    world.resolved(&name, &nothing);
    assert_eq!(answers(&world).len(), 2, "nobody waits any more");

    assign(&mut world, 2, "x.net");
    assert_eq!(wanted(&mut world), ["x.net"]);
    let (id, index) = (world.client.id, world.index().unwrap());
    world.worker_event(WorkerEvent::Expired { id, index });
    world.resolved(&name, &nothing);
    assert_eq!(answers(&world).len(), 2, "its connection is gone");
}

#[test]
fn the_latest_answers_are_kept_in_order() {
    let mut world = connected();
    for n in 0..Answer::KEPT + 10 {
        assign(&mut world, 1, &format!("n{n}.net"));
    }
    let got = answers(&world);
    assert_eq!(got.len(), Answer::KEPT);
    assert_eq!((&*got[0].said, &*got[Answer::KEPT - 1].said), ("n10.net", "n73.net"));
    assert!(got.is_sorted_by(|a, b| a.serial < b.serial));
}

#[test]
fn an_older_connection_is_not_answered_and_a_new_client_has_no_answers() {
    let mut world = connected();
    let (id, index) = (world.client.id, world.index().unwrap());
    let older = ConnectionIndex::new(index.get() ^ 1).unwrap();
    world.worker_event(WorkerEvent::Assigned { id, index: older, assigned: assigned(1, "x.net") });
    let nobody = ClientId(Uuid::nil());
    world.worker_event(WorkerEvent::Assigned { id: nobody, index, assigned: assigned(1, "x.net") });
    assert_eq!(answers(&world), []);
    assign(&mut world, 1, "x.net");
    let first = answers(&world)[0].serial;
    world.worker_event(WorkerEvent::Goodbye { id, index });
    world.authorize(1);
    assert_eq!(answers(&world), []);
    assign(&mut world, 1, "x.net");
    assert!(answers(&world)[0].serial > first, "a worker that was not told of the end sends it all the same");
}
