//! Which worker is told to hold a client.

use super::*;
use crate::{
    command::{Home, Path},
    control::Workers,
    ids::WorkerId,
};

const TWO: Workers = Workers { count: 2, by_arrival: true };

/// A world whose relay has answered.
fn settled_with(workers: Workers) -> World {
    let mut world = World::with_workers(epoch(), workers);
    world.run(SECOND);
    world
}

fn second() -> WorkerId {
    WorkerId::new(1).unwrap()
}

fn last_home(world: &World) -> Home {
    world.homes.iter().rfind(|(id, _)| *id == world.client.id).expect("told").1
}

#[test]
fn without_steering_a_client_lives_where_its_direct_path_arrives() {
    let mut world = settled_with(TWO);
    world.heard_by = second();
    world.authorize(1);
    assert_eq!(last_home(&world), Home { order: 1, ..Home::at(WorkerId::FIRST) });
    world.run_until("connected", 3 * SECOND, World::is_connected);
    world.run(SECOND);
    assert!(matches!(world.path(), Some(Path::Direct { .. })));
    let order = last_home(&world);
    assert_eq!((order.worker, order.from), (second(), Some(WorkerId::FIRST)));
    assert_eq!(world.gateway.home_of(world.client.id), Some(second()));

    // It is said until the client has arrived, and nothing else is ordered.
    world.heard_by = WorkerId::FIRST;
    world.run(10 * SECOND);
    world.authorize(2);
    assert_eq!(last_home(&world), order);
    world.worker_event(WorkerEvent::Adopted { id: world.client.id, worker: second(), order: order.order });
    assert_eq!(last_home(&world), Home { from: None, ..order }, "nobody need wait for it");
    world.run(40 * SECOND);
    assert_eq!(last_home(&world).worker, WorkerId::FIRST, "the path arrives elsewhere now");
}

#[test]
fn steered_packets_and_relayed_paths_move_nobody() {
    for (by_arrival, direct_is_blocked) in [(false, false), (true, true)] {
        let mut world = settled_with(Workers { count: 2, by_arrival });
        world.direct_is_blocked = direct_is_blocked;
        world.heard_by = second();
        world.authorize(1);
        world.run_until("connected", 10 * SECOND, World::is_connected);
        world.run(5 * SECOND);
        assert!(world.homes.iter().all(|(_, home)| home.worker == WorkerId::FIRST && home.from.is_none()));
    }
}

#[test]
fn a_home_outlives_the_connection_and_ends_with_the_client() {
    let mut world = settled_with(TWO);
    // Somebody else has the first worker.
    let mut other = world.client.authorize(9, None);
    other.client.id = ClientId(Uuid::from_u128(99));
    world.ingress(Ingress::Authorize(Box::new(other)));
    world.authorize(1);
    let home = last_home(&world);
    assert_eq!(home.worker, second());
    let (id, index) = (world.client.id, world.index().unwrap());
    world.worker_event(WorkerEvent::Expired { id, index });
    world.authorize(1);
    assert_ne!(world.index(), Some(index), "a new connection");
    assert_eq!(last_home(&world), home);

    let index = world.index().unwrap();
    world.worker_event(WorkerEvent::Goodbye { id, index });
    assert_eq!((world.states[&id].is_none(), last_home(&world)), (true, home));
    assert_eq!(world.gateway.home_of(id), None);
    world.authorize(1);
    assert!(last_home(&world).order > home.order, "another life");
}

#[test]
fn a_single_worker_has_everybody_and_no_timer() {
    let mut world = settled_with(Workers { count: 1, by_arrival: true });
    world.heard_by = second();
    world.authorize(1);
    world.run_until("connected", 3 * SECOND, World::is_connected);
    let (id, index) = (world.client.id, world.index().unwrap());
    world.worker_event(WorkerEvent::Activity { id, index, at: world.now });
    world.run(20 * SECOND);
    assert!(world.homes.iter().all(|(_, home)| home.worker == WorkerId::FIRST && home.from.is_none()));
    assert_eq!(world.gateway.home_of(id), Some(WorkerId::FIRST));
}

#[test]
fn the_balance_is_restored_by_ordering_active_clients_elsewhere() {
    let mut world = settled_with(Workers { count: 2, by_arrival: false });
    let mut clients = Vec::new();
    for n in 0..8 {
        let mut authorize = world.client.authorize(1, None);
        authorize.client.id = ClientId(Uuid::from_u128(500 + n));
        clients.push(authorize.client.id);
        world.ingress(Ingress::Authorize(Box::new(authorize)));
    }
    let active: Vec<_> = clients.into_iter().step_by(2).collect();
    for id in &active {
        let state = world.states[id].clone().unwrap();
        let Connection::Present(keys, _) = &state.connection else { panic!("connected") };
        let (index, at) = (keys.index, world.now);
        world.worker_event(WorkerEvent::Activity { id: *id, index, at });
    }
    let before = world.homes.len();
    world.run(3 * SECOND);
    let orders: Vec<_> = world.homes[before..].iter().filter(|(_, home)| home.from.is_some()).collect();
    assert_eq!(orders.len(), 1, "4 and 0 become 3 and 1");
    let (id, home) = orders[0];
    assert!(active.contains(id));
    assert_eq!((home.worker, home.from), (second(), Some(WorkerId::FIRST)));
}
