//! WireGuard's timers on a clock that the test moves (connections.md section 10.4). boringtun reads its own clock,
//! so these need its `mock-instant` feature, a target folder of their own and one thread:
//! `cargo test -p gateway-proto --features mock-instant --target-dir target/mock -- --test-threads=1`

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use boringtun::noise::{TunnResult, rate_limiter::RateLimiter};
use x25519_dalek::{PublicKey, StaticSecret};

use super::*;

fn there() -> Vec<u8> {
    udp(C4, LAN4, (40000, 53), b"there")
}

fn back() -> Vec<u8> {
    udp(LAN4, C4, (53, 40000), b"back")
}

/// A message the worker sent while its client kept silent: seconds since the start, type, length.
type Sent = (f64, u8, usize);

/// Time passes; the client says nothing.
fn silence(world: &mut World, start: Instant, seconds: u64) -> Vec<Sent> {
    let mut sent = Vec::new();
    for _ in 0..seconds * 10 {
        world.advance(Duration::from_millis(100));
        while let Some(message) = world.client_gets() {
            sent.push(((world.now - start).as_secs_f64(), message[0], message.len()));
        }
    }
    sent
}

/// Time passes; both run their timers and answer each other. The initiations the client sent.
fn conversation(world: &mut World, seconds: u64) -> usize {
    let mut initiations = 0;
    for _ in 0..seconds * 4 {
        world.advance(Duration::from_millis(250));
        let mut out = [0; 148];
        let message = match world.client.tunn.update_timers(&mut out) {
            TunnResult::WriteToNetwork(message) => Some(message.to_vec()),
            TunnResult::Err(error) => panic!("{error:?}"),
            _ => None,
        };
        if let Some(message) = message {
            initiations += usize::from(message[0] == 1);
            world.client_sends(&message);
        }
        while let Some(message) = world.client_gets() {
            if let Some(answer) = world.client.answer(&message) {
                world.client_sends(&answer);
            }
        }
    }
    initiations
}

/// Something to answer. Not in the second in which something was received: boringtun would not notice.
fn push(world: &mut World) {
    let start = world.now;
    silence(world, start, 2);
    world.inbound(&back());
    world.client_gets().unwrap();
}

fn expired(world: &mut World) -> usize {
    world.events().iter().filter(|e| matches!(e, WorkerEvent::Expired { .. })).count()
}

#[test]
fn the_client_rekeys_after_120_s_and_data_goes_on() {
    let mut world = World::connected(&lan());
    world.events();
    assert_eq!(conversation(&mut world, 1), 0);
    world.outbound(&there());
    world.inbound(&back());
    assert_eq!(world.received(), Some(back()));
    world.tun_gets().unwrap();
    assert_eq!(conversation(&mut world, 118), 0);
    assert_eq!(conversation(&mut world, 2), 1);
    world.outbound(&there());
    assert_eq!(world.tun_gets(), Some(there()));
    world.inbound(&back());
    let message = world.client_gets().unwrap();
    let receiver = u32::from_le_bytes(message[4..8].try_into().unwrap());
    assert_eq!(receiver & 0xff, 2, "sent with the client's second session");
    assert_eq!(world.client.open(&message), Some(back()));
    // Well beyond the first session's end.
    conversation(&mut world, 70);
    world.outbound(&there());
    assert_eq!(world.tun_gets(), Some(there()));
    assert!(
        world.events().iter().all(|e| matches!(e, WorkerEvent::Activity { .. })),
        "established is said once"
    );
    world.check_accounts();
}

#[test]
fn a_session_ends_at_180_s_and_the_connection_at_540_s() {
    let mut world = World::connected(&lan());
    let start = world.now;
    world.events();
    let late = world.client.seal(&there());
    assert_eq!(silence(&mut world, start, 179), [], "an idle responder says nothing");
    world.inbound(&back());
    assert_eq!(world.received(), Some(back()));
    world.outbound(&there());
    assert_eq!(world.tun_gets(), Some(there()));
    silence(&mut world, start, 2);
    world.inbound(&back());
    assert_eq!(world.count(DropReason::NoSession), 1);
    world.client_sends(&late);
    assert_eq!(world.count(DropReason::SessionExpired), 1);
    assert_eq!(world.client_gets(), None);
    world.events();

    let mut idle = World::connected(&lan());
    let start = idle.now;
    silence(&mut idle, start, 538);
    assert_eq!(expired(&mut idle), 0);
    silence(&mut idle, start, 3);
    assert_eq!(expired(&mut idle), 1);
    idle.check_accounts();
}

#[test]
fn a_vanished_client_is_asked_after_15_s_and_given_up_20_s_later() {
    let mut world = World::connected(&lan());
    let start = world.now;
    silence(&mut world, start, 3);
    world.outbound(&there());
    world.tun_gets().unwrap();
    silence(&mut world, start, 1);
    world.inbound(&back());
    world.client_gets().unwrap();
    world.events();
    let sent = silence(&mut world, start, 60);
    // Heard last at 3 s (to the second, by boringtun's clock).
    assert!(sent.iter().all(|(_, kind, len)| (*kind, *len) == (1, 148)), "initiations only: {sent:?}");
    let first = sent[0].0;
    assert!((17.0..19.2).contains(&first), "{sent:?}");
    assert_eq!(sent.len(), 4, "repeated every 5 s: {sent:?}");
    for pair in sent.windows(2) {
        assert!((5.0..5.6).contains(&(pair[1].0 - pair[0].0)), "{sent:?}");
    }
    assert_eq!(expired(&mut world), 1);

    // Dead until control says something else.
    world.outbound(&there());
    assert_eq!(world.count(DropReason::SessionExpired), 1);
    world.inbound(&back());
    assert_eq!(world.count(DropReason::NoSession), 1);
    let initiation = world.client.initiate();
    world.client_sends(&initiation);
    assert_eq!(world.count(DropReason::SessionExpired), 2);
    world.client.index = crate::ConnectionIndex::new(0x55).unwrap();
    world.tell(&lan(), Some(direct()));
    world.handshake();
    world.check_accounts();
}

#[test]
fn giving_up_takes_20_s_to_the_tick() {
    let mut world = World::connected(&lan());
    let start = world.now;
    silence(&mut world, start, 2);
    world.inbound(&back());
    let mut first = None;
    let mut gone = None;
    for _ in 0..500 {
        let sent = silence(&mut world, start, 0);
        assert!(sent.is_empty());
        world.advance(Duration::from_millis(100));
        while let Some(message) = world.client_gets() {
            if message[0] == 1 {
                first.get_or_insert(world.now);
            }
        }
        if expired(&mut world) > 0 {
            gone = Some(world.now);
            break;
        }
    }
    let took = gone.expect("expired") - first.expect("an initiation");
    assert!((Duration::from_millis(19_900)..=Duration::from_millis(20_350)).contains(&took), "{took:?}");
}

#[test]
fn data_without_an_answer_is_answered_by_a_keepalive_after_10_s() {
    // Once with nothing sent before, once with something sent in the same second: boringtun alone misses that one.
    for sent_before in [false, true] {
        let mut world = World::connected(&lan());
        let start = world.now;
        silence(&mut world, start, 2);
        if sent_before {
            world.inbound(&back());
            world.client_gets().unwrap();
        }
        world.outbound(&there());
        let sent = silence(&mut world, start, 40);
        let keepalives: Vec<_> = sent.iter().filter(|(_, kind, len)| (*kind, *len) == (4, 32)).collect();
        assert_eq!(keepalives.len(), 1, "{sent:?}");
        assert!((10.0..13.1).contains(&keepalives[0].0), "{sent:?}");
    }
}

#[test]
fn an_answered_initiation_makes_us_the_initiator_and_we_keep_the_session_alive() {
    let mut world = World::connected(&lan());
    let start = world.now;
    world.events();
    push(&mut world);
    let mut initiations = Vec::new();
    for _ in 0..400 * 4 {
        world.advance(Duration::from_millis(250));
        while let Some(message) = world.client_gets() {
            if message[0] == 1 {
                initiations.push((world.now - start).as_secs_f64());
            }
            if let Some(answer) = world.client.answer(&message) {
                world.client_sends(&answer);
            }
        }
        let mut out = [0; 148];
        let _ = world.client.tunn.update_timers(&mut out);
        // Silence until we have asked once; traffic after that.
        if initiations.is_empty() {
            continue;
        }
        world.inbound(&back());
        world.received().expect("there is always a session");
        world.outbound(&there());
        world.tun_gets().expect("both ways");
    }
    assert_eq!(initiations.len(), 4, "{initiations:?}");
    assert!((15.0..17.5).contains(&initiations[0]), "{initiations:?}");
    for pair in initiations.windows(2) {
        assert!((119.9..122.0).contains(&(pair[1] - pair[0])), "{initiations:?}");
    }
    assert_eq!(expired(&mut world), 0);
    world.check_accounts();
}

#[test]
fn an_idle_session_of_our_own_is_renewed_when_it_ends() {
    let mut world = World::connected(&lan());
    push(&mut world);
    let start = world.now;
    let sent = silence(&mut world, start, 17);
    let answer = |world: &mut World| {
        let mut message = Vec::new();
        while let Some(next) = world.client_gets() {
            message = next;
        }
        message
    };
    assert_eq!(sent.last().map(|(_, kind, _)| *kind), Some(1));
    // The next repetition is answered; then both are silent.
    let mut initiation = Vec::new();
    for _ in 0..30 * 4 {
        if !initiation.is_empty() {
            break;
        }
        world.advance(Duration::from_millis(250));
        initiation = answer(&mut world);
    }
    let response = world.client.answer(&initiation).unwrap();
    world.client_sends(&response);
    let keepalive = world.client_gets().unwrap();
    assert_eq!(world.client.open(&keepalive), Some(Vec::new()));
    let established = world.now;
    let sent = silence(&mut world, established, 175);
    assert_eq!(sent.iter().map(|s| s.1).collect::<Vec<_>>(), [1], "{sent:?}");
    assert!((170.0..171.3).contains(&sent[0].0), "{sent:?}");
}

#[test]
fn a_cookie_is_carried_by_the_next_initiation() {
    let mut world = World::connected(&lan());
    let client_key = StaticSecret::from([101; 32]);
    let gateway = PublicKey::from(&StaticSecret::from([7; 32]));
    let strict = Arc::new(RateLimiter::new(&PublicKey::from(&client_key), 0));
    world.client.tunn =
        boringtun::noise::Tunn::new(client_key, gateway, Some([1; 32]), None, 9, Some(strict));
    push(&mut world);
    let next = |world: &mut World| {
        let mut message = None;
        for _ in 0..30 * 4 {
            world.advance(Duration::from_millis(250));
            message = world.client_gets();
            if message.is_some() {
                break;
            }
        }
        message.expect("an initiation")
    };
    let initiation = next(&mut world);
    assert_eq!(initiation[132..], [0; 16], "no MAC2");
    let mut out = [0; 2048];
    let gateway_ip = Some(addr(LOCAL).ip());
    let TunnResult::WriteToNetwork(cookie) = world.client.tunn.decapsulate(gateway_ip, &initiation, &mut out)
    else {
        panic!("no cookie reply")
    };
    let cookie = cookie.to_vec();
    world.client_sends(&cookie);
    let initiation = next(&mut world);
    assert_ne!(initiation[132..], [0; 16], "MAC2");
    let TunnResult::WriteToNetwork(response) =
        world.client.tunn.decapsulate(gateway_ip, &initiation, &mut out)
    else {
        panic!("no response")
    };
    assert_eq!(response[0], 2);
    let response = response.to_vec();
    world.client_sends(&response);
    assert_eq!(world.worker.traffic().handshakes, 3);
    world.check_accounts();
}
