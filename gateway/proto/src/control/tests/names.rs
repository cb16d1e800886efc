//! What clients say about names, and what the workers are told to answer.

use super::*;
use std::sync::Arc;

use crate::names::{Answer, AssignedIps, Domain, DomainName, Lookup, Resolved};

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

fn goodbye(world: &mut World) {
    let (id, index) = (world.client.id, world.index().unwrap());
    world.worker_event(WorkerEvent::Goodbye { id, index });
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
    authorize_pattern(world, resource, "**.net");
}

fn authorize_pattern(world: &mut World, resource: u128, pattern: &str) {
    let authorize = by_pattern(world, resource, pattern, None);
    world.ingress(Ingress::Authorize(Box::new(authorize)));
}

fn by_pattern(world: &World, resource: u128, pattern: &str, expires: Option<u64>) -> Authorize {
    let mut authorize = world.client.authorize(resource, expires);
    authorize.resource.kind =
        ResourceKind::Dns { name: String::new(), pattern: pattern.into(), filters: vec![] };
    authorize
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
    assert_eq!(brief, [(2, "x.net".into(), true), (3, "X.net".into(), true)]);
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

fn found(v4: &[[u8; 4]]) -> Resolved {
    Resolved { v4: Lookup::Answer(v4.iter().map(|ip| (*ip).into()).collect()), v6: Lookup::Answer(vec![]) }
}

/// The names that the workers know, with what stands behind their first proxy address.
fn domains(world: &World) -> Vec<String> {
    let brief = |domain: &Arc<Domain>| {
        let (proxy, real) = domain.proxies[0];
        format!("{} {proxy} {}", domain.name, real.map_or("-".into(), |ip| ip.to_string()))
    };
    world.state().expect("a client").names.domains.iter().map(brief).collect()
}

#[test]
fn what_is_not_permitted_is_inactive_at_once_and_nobody_is_asked() {
    // Name, resource, pattern of resource 2, whether it is looked up.
    let table = [
        ("a.example.net", 2, "*.example.net", true),
        ("A.Example.NET.", 2, "*.example.net", true),
        ("a.example.net", 2, "**", true),
        ("b.a.example.net", 2, "*.example.net", false),
        ("a.example.org", 2, "*.example.net", false),
        ("a.example.net", 2, "a**b", false),
        ("a.example.net", 2, "[", false),
        // Not by names, not authorised.
        ("a.example.net", 1, "**", false),
        ("a.example.net", 3, "**", false),
    ];
    for (domain, resource, pattern, looked_up) in table {
        let mut world = connected();
        authorize_pattern(&mut world, 2, pattern);
        assign(&mut world, resource, domain);
        assert_eq!(wanted(&mut world).len(), usize::from(looked_up), "{domain} {resource} {pattern}");
        let active: Vec<bool> = answers(&world).iter().map(|a| a.active).collect();
        assert_eq!(active, if looked_up { vec![] } else { vec![false] }, "{domain} {resource} {pattern}");
        assert_eq!(domains(&world), [""; 0], "{domain} {resource} {pattern}");
    }
    // No address that would be a proxy's.
    let mut world = connected();
    authorize_names(&mut world, 2);
    let (id, index) = (world.client.id, world.index().unwrap());
    let mut nothing = assigned(2, "x.net");
    nothing.proxies.clear();
    world.worker_event(WorkerEvent::Assigned { id, index, assigned: nothing });
    assert!(wanted(&mut world).is_empty() && !answers(&world)[0].active);
}

#[test]
fn the_workers_know_a_name_no_later_than_its_answer() {
    let name = DomainName::parse("x.net").unwrap();
    let mut world = connected();
    authorize_names(&mut world, 2);
    assign(&mut world, 2, "x.net");
    world.resolved(&name, &found(&[[192, 0, 2, 1]]));
    // One state has both.
    assert_eq!(domains(&world), ["x.net 100.96.0.1 192.0.2.1"]);
    assert_eq!(answers(&world).iter().map(|a| a.active).collect::<Vec<_>>(), [true]);
    // Again, elsewhere now.
    assign(&mut world, 2, "x.net");
    world.resolved(&name, &found(&[[192, 0, 2, 2]]));
    assert_eq!(domains(&world), ["x.net 100.96.0.1 192.0.2.2"]);
    // Another name takes the address over: the client has started again.
    assign(&mut world, 2, "y.net");
    world.resolved(&DomainName::parse("y.net").unwrap(), &found(&[]));
    assert_eq!(domains(&world), ["y.net 100.96.0.1 -"]);
    assert_eq!(answers(&world).iter().map(|a| a.active).collect::<Vec<_>>(), [true, true, true]);
}

#[test]
fn what_happens_while_a_name_is_looked_up_counts() {
    let client = ClientId(Uuid::from_u128(0xC));
    let revoke = move |n| Ingress::RejectAccess(client, ResourceId(Uuid::from_u128(n)));
    let name = DomainName::parse("x.net").unwrap();
    type Between = Box<dyn Fn(&mut World)>;
    // What is answered: the names' state, or nothing because there is nobody.
    let table: [(&str, Between, Option<bool>); 8] = [
        ("nothing", Box::new(|_| ()), Some(true)),
        ("revoked", Box::new(move |w| w.ingress(revoke(2))), Some(false)),
        ("another revoked", Box::new(move |w| w.ingress(revoke(1))), Some(true)),
        (
            "revoked, with all else",
            Box::new(move |w| {
                w.ingress(revoke(1));
                w.ingress(revoke(2));
            }),
            None,
        ),
        ("expired", Box::new(|w| w.skip(60 * SECOND)), Some(false)),
        ("goodbye", Box::new(goodbye), None),
        (
            "goodbye and back",
            Box::new(|w| {
                goodbye(w);
                w.authorize(1);
                authorize_names(w, 2);
            }),
            None,
        ),
        (
            "goodbye, back, and asked again",
            Box::new(|w| {
                goodbye(w);
                w.authorize(1);
                authorize_names(w, 2);
                assign(w, 2, "x.net");
            }),
            Some(true),
        ),
    ];
    for (what, between, expect) in table {
        let mut world = connected();
        let authorize = by_pattern(&world, 2, "**.net", Some(UNIX_START + 50));
        world.ingress(Ingress::Authorize(Box::new(authorize)));
        assign(&mut world, 2, "x.net");
        between(&mut world);
        world.resolved(&name, &found(&[[192, 0, 2, 1]]));
        let state = world.states[&world.client.id].clone();
        let names = state.map(|state| Arc::clone(&state.names)).unwrap_or_default();
        let got: Vec<bool> = names.answers.iter().map(|a| a.active).collect();
        assert_eq!(got, Vec::from_iter(expect), "{what}");
        assert_eq!(names.domains.len(), usize::from(expect == Some(true)), "{what}");
        assert_eq!(world.gateway.depths().resolving, 0, "{what}");
    }
}

#[test]
fn a_name_survives_its_resource_and_goes_with_its_client() {
    let name = DomainName::parse("x.net").unwrap();
    let mut world = connected();
    authorize_names(&mut world, 2);
    assign(&mut world, 2, "x.net");
    world.resolved(&name, &found(&[[192, 0, 2, 1]]));
    let (id, index) = (world.client.id, world.index().unwrap());
    world.ingress(Ingress::RejectAccess(id, ResourceId(Uuid::from_u128(2))));
    // The policy knows that nothing is granted; open flows go on when it is granted again.
    assert_eq!(domains(&world), ["x.net 100.96.0.1 192.0.2.1"]);
    authorize_names(&mut world, 2);
    assert_eq!(domains(&world), ["x.net 100.96.0.1 192.0.2.1"]);
    world.worker_event(WorkerEvent::Goodbye { id, index });
    assert!(world.states[&id].is_none());
    world.authorize(1);
    assert_eq!(domains(&world), [""; 0]);
    // Other tunnel addresses are another client, as far as names go.
    authorize_names(&mut world, 2);
    assign(&mut world, 2, "x.net");
    world.resolved(&name, &found(&[[192, 0, 2, 1]]));
    assert_eq!(domains(&world).len(), 1);
    let mut moved = world.client.authorize(1, None);
    moved.client.tunnel.v4 = [100, 64, 7, 7].into();
    world.ingress(Ingress::Authorize(Box::new(moved)));
    assert_eq!(domains(&world), [""; 0]);
}

#[test]
fn one_look_up_serves_two_clients_each_with_its_own_addresses() {
    let name = DomainName::parse("x.net").unwrap();
    let mut world = connected();
    authorize_names(&mut world, 2);
    let other = ClientId(Uuid::from_u128(0xD));
    let mut authorize = by_pattern(&world, 2, "x.*", None);
    authorize.client.id = other;
    authorize.client.tunnel.v4 = [100, 64, 0, 77].into();
    world.ingress(Ingress::Authorize(Box::new(authorize)));
    let Some(Connection::Present(keys, _)) = world.states[&other].as_ref().map(|state| &state.connection)
    else {
        panic!("no connection")
    };
    let index = keys.index;
    assign(&mut world, 2, "x.net");
    let mut theirs = assigned(2, "X.net");
    theirs.proxies = vec!["100.96.0.9".parse().unwrap()];
    world.worker_event(WorkerEvent::Assigned { id: other, index, assigned: theirs });
    assert_eq!(wanted(&mut world), ["x.net"]);
    world.resolved(&name, &found(&[[192, 0, 2, 1]]));
    assert_eq!(domains(&world), ["x.net 100.96.0.1 192.0.2.1"]);
    let names = &world.states[&other].as_ref().unwrap().names;
    assert_eq!(&*names.domains[0].proxies, [("100.96.0.9".parse().unwrap(), Some([192, 0, 2, 1].into()))]);
    assert_eq!((&*names.answers[0].said, names.answers[0].active), ("X.net", true));
}

#[test]
fn above_the_limits_nothing_is_answered_and_it_is_counted() {
    let mut world = connected();
    authorize_names(&mut world, 2);
    for n in 0..251 {
        assign(&mut world, 2, &format!("n{n}.net"));
    }
    assert_eq!(wanted(&mut world).len(), 250);
    assert_eq!(answers(&world), [], "the client asks again");
    assert_eq!(world.gateway.counters().get(gateway_common::DropReason::ControlQueueFull), 1);
    assert_eq!(world.gateway.depths().resolving, 250);
}
