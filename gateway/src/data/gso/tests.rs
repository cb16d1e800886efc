//! Batches of datagrams against a kernel in memory that refuses, blocks and fails.

#![expect(clippy::cast_possible_truncation, reason = "patterns to fill packets with")]

use std::{collections::HashMap, net::Ipv4Addr};

use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

use super::*;

#[test]
fn random_datagrams_arrive_whole_in_order_and_within_limits() {
    for seed in 0..200 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut queue = Queue::new(seed % 2 == 0, true);
        let mut wire = TestWire { many: seed % 3 > 0, ..TestWire::default() };
        let mut expect: HashMap<Route, Vec<Vec<u8>>> = HashMap::new();
        let routes: u16 = rng.random_range(1..100);
        for i in 0..rng.random_range(1..600u32) {
            let route = route(rng.random_range(0..routes));
            let len = *[1316, 1316, 1316, 96, 97, 1280, 1].get(rng.random_range(0..7)).unwrap();
            if !queue.has_room(&route, len) {
                queue.flush(Instant::now(), &mut Counters::default(), &mut wire);
            }
            let bytes = queue.reserve(&route, len).expect("there is room after a flush");
            assert!(bytes.len() >= len);
            if rng.random_bool(0.1) {
                continue; // a reservation that is given up
            }
            bytes[..len].fill(i as u8);
            queue.commit(len);
            expect.entry(route).or_default().push(vec![i as u8; len]);
        }
        assert_eq!(queue.flush(Instant::now(), &mut Counters::default(), &mut wire), Flushed::Clean);
        assert_eq!(wire.got, expect, "seed {seed}");
        assert_eq!(queue.free.len(), BATCHES, "no buffer is leaked");
        assert!(queue.latest.is_empty() && queue.order.is_empty());
    }
}

#[test]
fn full_batch_is_one_send_of_49_segments() {
    let mut queue = Queue::new(false, true);
    put(&mut queue, 0, 1316, 50);
    let mut wire = TestWire::default();
    queue.flush(Instant::now(), &mut Counters::default(), &mut wire);
    assert_eq!(wire.calls, [(49 * 1316, Some(1316)), (1316, None)]);
}

#[test]
fn shorter_datagram_seals_and_longer_begins_anew() {
    let mut queue = Queue::new(false, true);
    for len in [100, 100, 60, 60, 100, 120] {
        put(&mut queue, 0, len, 1);
    }
    let mut wire = TestWire::default();
    queue.flush(Instant::now(), &mut Counters::default(), &mut wire);
    assert_eq!(wire.calls, [(260, Some(100)), (60, None), (100, None), (120, None)]);
}

#[test]
fn refused_offload_loses_nothing_and_rests_for_a_minute() {
    for (errno, many) in [(libc::EIO, false), (libc::EINVAL, false), (libc::EIO, true)] {
        let mut queue = Queue::new(false, true);
        let mut wire = TestWire { many, refuse_gso: Some(errno), ..TestWire::default() };
        let (now, mut drops) = (Instant::now(), Counters::default());
        put(&mut queue, 0, 100, 3);
        queue.flush(now, &mut drops, &mut wire);
        put(&mut queue, 0, 100, 2);
        queue.flush(now, &mut drops, &mut wire);
        wire.refuse_gso = None;
        put(&mut queue, 0, 100, 2);
        queue.flush(now + GSO_REST, &mut drops, &mut wire);
        let single = (100, None);
        assert_eq!(wire.calls, [(300, Some(100)), single, single, single, single, single, (200, Some(100))]);
        assert_eq!(wire.got[&route(0)].len(), 7);
        assert_eq!(drops, Counters::default());
    }
}

#[test]
fn bad_route_costs_its_own_datagrams_and_not_the_offload() {
    let mut queue = Queue::new(false, true);
    let mut wire = TestWire { unreachable: Some(route(1)), ..TestWire::default() };
    let mut drops = Counters::default();
    put(&mut queue, 1, 100, 3);
    put(&mut queue, 2, 100, 3);
    assert_eq!(queue.flush(Instant::now(), &mut drops, &mut wire), Flushed::Clean);
    assert_eq!(drops.get(DropReason::UdpSend), 3);
    assert_eq!(wire.got[&route(2)].len(), 3);
    assert_eq!(wire.calls.last(), Some(&(300, Some(100))));
}

#[test]
fn path_with_a_small_mtu_does_not_cost_others_the_offload() {
    let mut queue = Queue::new(false, true);
    let mut wire = TestWire { mtu: Some(500), ..TestWire::default() };
    let mut drops = Counters::default();
    put(&mut queue, 1, 1000, 3);
    put(&mut queue, 1, 50, 1);
    put(&mut queue, 2, 100, 3);
    assert_eq!(queue.flush(Instant::now(), &mut drops, &mut wire), Flushed::Clean);
    assert_eq!(drops.iter().collect::<Vec<_>>(), [(DropReason::UdpSend, 3)]);
    assert_eq!(wire.got[&route(1)], [[7; 50]]);
    assert_eq!(wire.calls.last(), Some(&(300, Some(100))));
}

#[test]
fn blocked_socket_keeps_order_and_refuses_only_when_full() {
    let mut queue = Queue::new(false, false);
    let (now, mut drops) = (Instant::now(), Counters::default());
    let mut wire = TestWire { room: Some(2), ..TestWire::default() };
    put(&mut queue, 0, 100, 3);
    assert_eq!(queue.flush(now, &mut drops, &mut wire), Flushed::Blocked);
    put(&mut queue, 0, 100, 1);
    for i in 1..BATCHES - 1 {
        put(&mut queue, u16::try_from(i).unwrap(), 100, 1);
    }
    assert!(queue.reserve(&route(999), 100).is_none(), "every buffer waits");
    assert!(queue.reserve(&route(5), 100).is_some(), "a waiting batch of the route still takes it");
    wire.room = None;
    assert_eq!(queue.flush(now, &mut drops, &mut wire), Flushed::Clean);
    assert_eq!(wire.got[&route(0)].len(), 4);
    assert_eq!(wire.got.len(), BATCHES - 1);
    assert_eq!(drops, Counters::default());
}

#[test]
fn several_routes_leave_by_one_call_and_single_datagrams_too() {
    for (gso, calls) in [(true, vec![3]), (false, vec![64, 26])] {
        let mut queue = Queue::new(false, gso);
        let mut wire = TestWire { many: true, ..TestWire::default() };
        for n in 1..=3 {
            put(&mut queue, n, 100, 30);
        }
        queue.flush(Instant::now(), &mut Counters::default(), &mut wire);
        assert_eq!(wire.many_calls, calls);
        assert!((1..=3).all(|n| wire.got[&route(n)].len() == 30));
        put(&mut queue, 1, 100, 1);
        queue.flush(Instant::now(), &mut Counters::default(), &mut wire);
        assert_eq!(wire.many_calls, calls, "a single send needs no such call");
        assert_eq!(wire.got[&route(1)].len(), 31);
    }
}

#[test]
fn one_bad_route_among_many_costs_its_own_datagrams_only() {
    for (gso, bad) in [(true, 0), (true, 2), (false, 0), (false, 2), (false, 4)] {
        let mut queue = Queue::new(false, gso);
        let mut wire = TestWire { many: true, unreachable: Some(route(bad)), ..TestWire::default() };
        let mut drops = Counters::default();
        for n in 0..5 {
            put(&mut queue, n, 100, 3);
        }
        assert_eq!(queue.flush(Instant::now(), &mut drops, &mut wire), Flushed::Clean);
        assert_eq!(drops.iter().collect::<Vec<_>>(), [(DropReason::UdpSend, 3)]);
        for n in (0..5).filter(|n| *n != bad) {
            assert_eq!(wire.got[&route(n)].len(), 3, "route {n}, {bad} is bad");
        }
        assert_eq!(queue.free.len(), BATCHES);
        assert!(queue.gso_rests_until.is_none());
    }
}

#[test]
fn socket_that_blocks_in_the_middle_of_a_call_keeps_order() {
    for (gso, room) in (0..12).flat_map(|room| [(true, room), (false, room)]) {
        let mut queue = Queue::new(false, gso);
        let mut wire = TestWire { many: true, room: Some(room), ..TestWire::default() };
        let (now, mut drops, mut number) = (Instant::now(), Counters::default(), 0);
        let mut put = |queue: &mut Queue| {
            for n in 0..4 {
                for _ in 0..3 {
                    queue.reserve(&route(n), 100).expect("there is room")[..100].fill(number);
                    queue.commit(100);
                    number += 1;
                }
            }
        };
        put(&mut queue);
        let blocked = room < if gso { 4 } else { 12 };
        assert_eq!(queue.flush(now, &mut drops, &mut wire) == Flushed::Blocked, blocked);
        put(&mut queue);
        wire.room = None;
        assert_eq!(queue.flush(now, &mut drops, &mut wire), Flushed::Clean);
        for n in 0..4u8 {
            let expect: Vec<_> =
                [0, 12].iter().flat_map(|at| (0..3).map(move |i| vec![at + 3 * n + i; 100])).collect();
            assert_eq!(wire.got[&route(n.into())], expect, "room for {room}, segmentation {gso}");
        }
        assert_eq!(drops, Counters::default());
    }
}

#[test]
fn more_than_a_packet_holds_is_refused() {
    let mut queue = Queue::new(false, true);
    assert!(queue.reserve(&route(0), 65_535 - 68).is_some());
    assert!(queue.reserve(&route(0), 65_535 - 67).is_none());
    queue.commit(10);
    assert!(queue.order.is_empty(), "nothing was reserved");
}

/// A kernel: cuts what it is given, after checking the limits.
#[derive(Default)]
struct TestWire {
    /// It takes several sends with one call.
    many: bool,
    /// How many sends each such call took, at least one.
    many_calls: Vec<usize>,
    got: HashMap<Route, Vec<Vec<u8>>>,
    calls: Vec<(usize, Option<usize>)>,
    refuse_gso: Option<i32>,
    unreachable: Option<Route>,
    mtu: Option<usize>,
    room: Option<usize>,
}

impl Wire for TestWire {
    fn takes_many(&self) -> bool {
        self.many
    }

    fn send_many(&mut self, messages: &[Message<'_>]) -> io::Result<usize> {
        assert!(self.many && (2..=MOST).contains(&messages.len()));
        for (sent, message) in messages.iter().enumerate() {
            match self.send(message) {
                Err(e) if sent == 0 => return Err(e),
                Err(_) => {
                    self.many_calls.push(sent);
                    return Ok(sent);
                }
                Ok(()) => {}
            }
        }
        self.many_calls.push(messages.len());
        Ok(messages.len())
    }

    fn send(&mut self, message: &Message<'_>) -> io::Result<()> {
        let Message { route, bytes, segment } = *message;
        if self.room == Some(0) {
            return Err(ErrorKind::WouldBlock.into());
        }
        self.room = self.room.map(|room| room - 1);
        self.calls.push((bytes.len(), segment));
        if self.unreachable == Some(*route) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        if self.mtu.is_some_and(|mtu| segment.unwrap_or(bytes.len()) > mtu) {
            let errno = if segment.is_some() { libc::EINVAL } else { libc::EMSGSIZE };
            return Err(io::Error::from_raw_os_error(errno));
        }
        if let (Some(errno), Some(_)) = (self.refuse_gso, segment) {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let segment = segment.unwrap_or(bytes.len());
        assert!(bytes.len() <= 65_535 - 48 && bytes.len().div_ceil(segment) <= MAX_SEGMENTS);
        self.got.entry(*route).or_default().extend(bytes.chunks(segment).map(<[u8]>::to_vec));
        Ok(())
    }
}

fn put(queue: &mut Queue, n: u16, len: usize, times: usize) {
    for _ in 0..times {
        queue.reserve(&route(n), len).expect("there is room")[..len].fill(7);
        queue.commit(len);
    }
}

fn route(n: u16) -> Route {
    Route { src: None, dst: (Ipv4Addr::new(192, 0, 2, 1), 1000 + n).into(), ecn: Ecn::NotEct }
}
