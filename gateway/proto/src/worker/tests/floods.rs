//! Handshake budgets: floods hurt nobody who is known, and nobody honest for long.

use std::time::Duration;

use super::*;

/// An initiation that passes MAC1 and whose sender never looks at the answer.
fn spoofed() -> Vec<u8> {
    let gateway = x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from([7; 32]));
    Client::new(50, &gateway).initiate()
}

#[test]
fn a_flood_from_anywhere_does_not_touch_a_known_path() {
    let mut world = World::new(&lan());
    let flood = spoofed();
    for n in 0..1000_u16 {
        world.datagram(&format!("192.0.2.{}:{}", n % 250, 1000 + n), &flood);
    }
    assert_eq!(world.count(DropReason::UnknownPublicKey), 100);
    assert_eq!(world.count(DropReason::HandshakeBudget), 200, "answered with a cookie");
    assert_eq!(world.count(DropReason::CookieBudget), 700, "not answered");
    assert_eq!(world.sink.datagrams.len(), 200);
    assert!(world.sink.datagrams.iter().all(|(_, m)| m.len() == 64 && m[0] == 3), "cookie replies");
    world.sink.datagrams.clear();
    world.handshake();
    world.check_accounts();
}

#[test]
fn a_newcomers_first_initiation_passes_from_wherever_its_checks_came() {
    let elsewhere = "192.0.2.77:1";
    // where its checks came from -> does its first initiation pass, before any pair is nominated?
    let table: [(&str, &[&str], bool); 4] = [
        ("nowhere yet", &[], false),
        ("elsewhere", &[elsewhere], false),
        ("here", &[REMOTE], true),
        ("here and elsewhere", &[REMOTE, elsewhere], true),
    ];
    for (name, heard_from, passes) in table {
        let mut world = World::with(&lan(), None, false);
        let heard_from: Vec<_> = heard_from.iter().map(|at| addr(at)).collect();
        let connection = Connection::Present(world.client.keys(), None);
        world.tell_all(&lan(), connection.clone(), &heard_from);
        let flood = spoofed();
        for n in 0..300_u16 {
            world.datagram(&format!("192.0.2.{}:{}", n % 50, 1000 + n), &flood);
        }
        world.sink.datagrams.clear();
        let initiation = world.client.initiate();
        world.client_sends(&initiation);
        assert_eq!(world.worker.traffic().handshakes, u64::from(passes), "{name}");
        if passes {
            assert_eq!(world.client_gets(), None, "{name}: the response waits for a path");
            let nominated = Connection::Present(world.client.keys(), Some(direct()));
            world.tell_all(&lan(), nominated, &heard_from);
            assert_eq!(world.client_gets().expect("the response").len(), 92, "{name}");
            // Checks do not widen the budget for ever.
            world.tell_all(&lan(), Connection::Absent, &[]);
            assert_eq!(world.count(DropReason::CookieBudget), 0, "{name}");
            world.client_sends(&flood);
            assert_eq!(world.count(DropReason::CookieBudget), 1, "{name}: it is a stranger again");
        }
        world.check_accounts();
    }
}

#[test]
fn over_budget_a_cookie_lets_an_honest_client_in() {
    for (relayed, strangers) in [(false, 0), (true, 0), (true, 1000)] {
        // The client comes from where nobody knows it: no path yet, or a channel whose budget is spent.
        let mut world = if relayed { World::relayed(&lan()) } else { World::with(&lan(), None, false) };
        let flood = spoofed();
        for _ in 0..150 {
            world.client_sends(&flood);
        }
        // A known path has cookies of its own.
        for n in 0..strangers {
            world.datagram(&format!("192.0.2.9:{n}"), &flood);
        }
        world.sink.datagrams.clear();
        let initiation = world.client.initiate();
        world.client_sends(&initiation);
        let cookie = world.client_gets().expect("a cookie reply on the way the initiation came");
        assert_eq!((cookie[0], cookie.len()), (3, 64));
        assert_eq!(world.client.answer(&cookie), None);
        let proven = world.client.initiate();
        world.client_sends(&proven);
        assert_eq!(world.worker.traffic().handshakes, 1);
        world.tell(&lan(), world.client.relayed.then(relayed_path).or(Some(direct())));
        assert_eq!(world.client_gets().expect("the response").len(), 92);
        world.check_accounts();
    }
}

fn relayed_path() -> Path {
    Path::Relayed { server: addr(SERVER), channel: Some(CHANNEL), remote: addr(REMOTE) }
}

#[test]
fn the_budget_of_cookies_fills_again_and_whoever_has_one_needs_no_other() {
    let mut world = World::with(&lan(), None, false);
    let flood = spoofed();
    let overwhelm = |world: &mut World| {
        for n in 0..1000_u16 {
            world.datagram(&format!("192.0.2.9:{n}"), &flood);
        }
        std::mem::take(&mut world.sink.datagrams).len()
    };
    assert_eq!(overwhelm(&mut world), 200);
    let initiation = world.client.initiate();
    world.client_sends(&initiation);
    assert_eq!(world.client_gets(), None, "neither opened nor answered");
    world.now += Duration::from_millis(50);
    let initiation = world.client.initiate();
    world.client_sends(&initiation);
    // 50 ms are 50 cookies and 5 initiations, of which this is one.
    assert_eq!(world.worker.traffic().handshakes, 1);
    assert_eq!(overwhelm(&mut world), 50);

    world.now += Duration::from_millis(1);
    let initiation = world.client.initiate();
    world.client_sends(&initiation);
    let cookie = world.client_gets().expect("the one cookie of this millisecond");
    assert_eq!(world.client.answer(&cookie), None);
    overwhelm(&mut world);
    let proven = world.client.initiate();
    world.client_sends(&proven);
    assert_eq!(world.worker.traffic().handshakes, 2, "what it proves counts, however many others there are");
    // The same MAC2 from elsewhere proves nothing, and a MAC2 of noise costs no cookie.
    let before = world.count(DropReason::CookieBudget);
    let proven = world.client.initiate();
    world.datagram("192.0.2.9:9", &proven);
    assert_eq!(world.count(DropReason::CookieBudget), before + 1);
    assert_eq!(std::mem::take(&mut world.sink.datagrams).len(), 0);
    world.check_accounts();
}

#[test]
fn whoever_owns_many_addresses_has_no_more_than_all_that_prove_theirs() {
    let mut world = World::with(&lan(), None, false);
    let gateway = x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from([7; 32]));
    let flood = spoofed();
    for _ in 0..100 {
        world.datagram("192.0.2.250:1", &flood);
    }
    let opened = |world: &World| world.count(DropReason::UnknownPublicKey) - 100;
    for last in 1..=20_u8 {
        let from = format!("192.0.2.{last}:9");
        let mut attacker = Client::new(last + 50, &gateway);
        let initiation = attacker.initiate();
        world.datagram(&from, &initiation);
        let (_, cookie) = world.sink.datagrams.remove(0);
        assert_eq!(attacker.answer(&cookie), None);
        let before = opened(&world);
        for _ in 0..60 {
            let proven = attacker.initiate();
            world.datagram(&from, &proven);
        }
        assert!(opened(&world) - before <= 40, "one address");
        world.sink.datagrams.clear();
    }
    assert_eq!(opened(&world), 100, "all together");
    world.check_accounts();
}

#[test]
fn mac1_costs_an_attacker_no_budget_of_others() {
    let mut world = World::with(&lan(), None, false);
    let mut flood = spoofed();
    flood[130] ^= 1;
    for _ in 0..500 {
        world.datagram("192.0.2.9:9", &flood);
    }
    assert_eq!(world.count(DropReason::HandshakeForged), 500);
    let initiation = world.client.initiate();
    world.client_sends(&initiation);
    assert_eq!(world.worker.traffic().handshakes, 1);
}
