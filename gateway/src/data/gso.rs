//! Datagrams on their way out: collected per route, sent as segmented batches (packets.md section 9,
//! connections.md section 2.4).
//!
//! A worker builds each datagram in place: reserve, encrypt into the batch, commit. A datagram may only join the
//! most recent batch of its route, so that order within a route is the order of commits. Buffers are made once.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind},
    time::{Duration, Instant},
};

use gateway_common::{Counters, DropReason};
use gateway_proto::{Ecn, Route};
use quinn_udp::EcnCodepoint;
use rustc_hash::FxHashMap;

use super::udp::DataSocket;

/// One socket's way out.
pub struct Outlet {
    socket: DataSocket,
    queue: Queue,
    /// The kernel's buffer is full: wait for the socket to become writable.
    blocked: bool,
}

impl Outlet {
    /// With its buffers; pages are touched as traffic needs them.
    pub fn new(socket: DataSocket) -> Self {
        let v6 = socket.is_v6();
        let gso = socket.segments();
        Self { socket, queue: Queue::new(v6, gso), blocked: false }
    }

    /// The socket, for receiving and polling.
    pub fn socket(&self) -> &DataSocket {
        &self.socket
    }

    /// Whether batches wait for the socket to become writable.
    pub fn is_blocked(&self) -> bool {
        self.blocked
    }

    /// At least `len` bytes for one datagram of `route`; sends what waits if there is no place else. `None` while
    /// every buffer waits for the socket.
    pub fn reserve(
        &mut self,
        route: &Route,
        len: usize,
        now: Instant,
        drops: &mut Counters,
    ) -> Option<&mut [u8]> {
        if !self.queue.has_room(route, len) && !self.blocked {
            self.flush(now, drops);
        }
        self.queue.reserve(route, len)
    }

    /// Queues the first `len` bytes of the last reservation.
    pub fn commit(&mut self, len: usize) {
        self.queue.commit(len);
    }

    /// Sends what waits, as far as the kernel takes it; the rest stays, in order.
    pub fn flush(&mut self, now: Instant, drops: &mut Counters) {
        let Self { socket, queue, blocked } = self;
        let mut spoiled = false;
        let flushed = queue.flush(now, drops, |route, contents, segment_size| {
            let transmit = quinn_udp::Transmit {
                destination: route.dst,
                ecn: codepoint(route.ecn),
                contents,
                segment_size,
                src_ip: route.src.map(|src| src.ip()),
            };
            let result = socket.state.try_send((&socket.socket).into(), &transmit);
            if let Err(e) = &result
                && is_refusal(e)
            {
                spoiled = true;
            }
            result
        });
        // quinn-udp takes EINVAL for an ancient kernel and stops setting ECN for the life of its state. It is also
        // what a source address that has left this machine gets. A new state is some twenty calls, hence once.
        if spoiled {
            socket.renew();
        }
        *blocked = flushed == Flushed::Blocked;
    }
}

fn codepoint(ecn: Ecn) -> Option<EcnCodepoint> {
    EcnCodepoint::from_bits(ecn as u8)
}

/// What a NIC or route without segmentation offload answers; other causes give the same numbers.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::EINVAL))
}

/// How many batches may wait; each is for one route.
const BATCHES: usize = 64;
/// Bytes of one batch's buffer.
const CAPACITY: usize = 65_536;
/// The kernel's UDP_MAX_SEGMENTS before Linux 6.9.
const MAX_SEGMENTS: usize = 64;
/// How long segmentation offload rests after the kernel refused it: the route may change.
const GSO_REST: Duration = Duration::from_secs(60);

/// The batches of one family.
struct Queue {
    /// [`BATCHES`] buffers of [`CAPACITY`] bytes.
    bytes: Box<[u8]>,
    batches: Vec<Batch>,
    /// Batches with content, in the order they were begun.
    order: VecDeque<usize>,
    free: Vec<usize>,
    /// The most recent batch of each route in `order`.
    latest: FxHashMap<Route, usize>,
    /// The batch the last datagram went to: most datagrams follow one of their own route.
    recent: Option<usize>,
    reserved: Option<(usize, Route)>,
    /// UDP payload bytes that fit one IP packet with the longest header.
    max_payload: usize,
    gso: bool,
    gso_rests_until: Option<Instant>,
}

#[derive(Clone)]
struct Batch {
    route: Option<Route>,
    /// The first datagram's length; the others are as long, but for the last.
    segment: usize,
    len: usize,
    /// Bytes that are on the wire already; the rest waits for the socket.
    sent: usize,
    /// Nothing more may be appended: the last datagram is shorter, or part of the batch is sent.
    sealed: bool,
}

const EMPTY: Batch = Batch { route: None, segment: 0, len: 0, sent: 0, sealed: false };

#[derive(Debug, PartialEq, Eq)]
enum Flushed {
    Clean,
    Blocked,
}

impl Queue {
    fn new(v6: bool, gso: bool) -> Self {
        Self {
            bytes: vec![0; BATCHES * CAPACITY].into_boxed_slice(),
            batches: vec![EMPTY; BATCHES],
            order: VecDeque::with_capacity(BATCHES),
            free: (0..BATCHES).rev().collect(),
            latest: FxHashMap::with_capacity_and_hasher(2 * BATCHES, rustc_hash::FxBuildHasher),
            recent: None,
            reserved: None,
            // 60 bytes of IPv4 header, or 40 of IPv6, and 8 of UDP (connections.md section 2.4).
            max_payload: usize::from(u16::MAX) - if v6 { 48 } else { 68 },
            gso,
            gso_rests_until: None,
        }
    }

    fn has_room(&self, route: &Route, len: usize) -> bool {
        !self.free.is_empty() || self.joinable(route, len).is_some()
    }

    fn reserve(&mut self, route: &Route, len: usize) -> Option<&mut [u8]> {
        self.reserved = None;
        if len > self.max_payload {
            return None;
        }
        let slot = self.joinable(route, len).or_else(|| self.free.last().copied())?;
        self.reserved = Some((slot, *route));
        let used = self.batches[slot].len;
        Some(&mut self.bytes[slot * CAPACITY..][used..CAPACITY])
    }

    fn commit(&mut self, len: usize) {
        let Some((slot, route)) = self.reserved.take() else { return };
        let batch = &mut self.batches[slot];
        if len == 0 || batch.len + len > CAPACITY {
            return;
        }
        if batch.route.is_none() {
            *batch = Batch { route: Some(route), segment: len, ..EMPTY };
            let taken = self.free.pop();
            debug_assert_eq!(taken, Some(slot), "a fresh batch is the top of the free list");
            self.order.push_back(slot);
            self.latest.insert(route, slot);
        } else {
            batch.sealed |= len != batch.segment;
        }
        batch.len += len;
        self.recent = Some(slot);
    }

    /// The batch that a datagram of up to `len` bytes for `route` may be appended to.
    fn joinable(&self, route: &Route, len: usize) -> Option<usize> {
        let is_recent = |slot: &usize| self.batches[*slot].route.as_ref() == Some(route);
        let slot = match self.recent.filter(is_recent) {
            Some(slot) => slot,
            None => *self.latest.get(route)?,
        };
        let batch = &self.batches[slot];
        let limit = batch.segment * (self.max_payload / batch.segment.max(1)).min(MAX_SEGMENTS);
        (!batch.sealed && len <= batch.segment && batch.len + len <= limit).then_some(slot)
    }

    /// Hands every batch to `send(route, bytes, segment size)`, in order, and counts what it refuses.
    fn flush(
        &mut self,
        now: Instant,
        drops: &mut Counters,
        mut send: impl FnMut(&Route, &[u8], Option<usize>) -> io::Result<()>,
    ) -> Flushed {
        self.reserved = None;
        while let Some(&slot) = self.order.front() {
            if self.flush_batch(slot, now, drops, &mut send) == Flushed::Blocked {
                return Flushed::Blocked;
            }
            self.order.pop_front();
            let batch = std::mem::replace(&mut self.batches[slot], EMPTY);
            if let Some(route) = batch.route
                && self.latest.get(&route) == Some(&slot)
            {
                self.latest.remove(&route);
            }
            if self.recent == Some(slot) {
                self.recent = None;
            }
            self.free.push(slot);
        }
        Flushed::Clean
    }

    fn flush_batch(
        &mut self,
        slot: usize,
        now: Instant,
        drops: &mut Counters,
        send: &mut impl FnMut(&Route, &[u8], Option<usize>) -> io::Result<()>,
    ) -> Flushed {
        let batch = &mut self.batches[slot];
        let Some(route) = batch.route else { return Flushed::Clean };
        let bytes = &self.bytes[slot * CAPACITY..][..batch.len];
        let mut gso = self.gso && self.gso_rests_until.is_none_or(|until| now >= until);
        let mut refused = None;
        while batch.sent < batch.len {
            let rest = &bytes[batch.sent..];
            let segmented = gso && rest.len() > batch.segment;
            let part = if segmented { rest } else { &rest[..rest.len().min(batch.segment)] };
            match send(&route, part, segmented.then_some(batch.segment)) {
                Ok(()) => {
                    batch.sent += part.len();
                    // A path with a small MTU refuses the batch, and its full datagrams, but takes a short last one.
                    if let Some(e) = refused.take_if(|_| part.len() == batch.segment) {
                        tracing::info!(
                            "The kernel refused segmentation offload ({e}); sending singly for a minute"
                        );
                        self.gso_rests_until = Some(now + GSO_REST);
                    }
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    batch.sealed |= batch.sent > 0;
                    return Flushed::Blocked;
                }
                // The same bytes once more, one by one: nothing is lost to a NIC without the offload. Only if that
                // works was the offload to blame.
                Err(e) if segmented && is_refusal(&e) => {
                    gso = false;
                    refused = Some(e);
                }
                Err(e) => {
                    tracing::trace!(dst = %route.dst, "The kernel refused a datagram: {e}");
                    drops.add(DropReason::UdpSend, part.len().div_ceil(batch.segment) as u64);
                    batch.sent += part.len();
                }
            }
        }
        Flushed::Clean
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "patterns to fill packets with")]
mod tests {
    use std::{collections::HashMap, net::Ipv4Addr};

    use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

    use super::*;

    #[test]
    fn random_datagrams_arrive_whole_in_order_and_within_limits() {
        for seed in 0..200 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut queue = Queue::new(seed % 2 == 0, true);
            let mut wire = Wire::default();
            let mut expect: HashMap<Route, Vec<Vec<u8>>> = HashMap::new();
            let routes: u16 = rng.random_range(1..100);
            for i in 0..rng.random_range(1..600u32) {
                let route = route(rng.random_range(0..routes));
                let len = *[1316, 1316, 1316, 96, 97, 1280, 1].get(rng.random_range(0..7)).unwrap();
                if !queue.has_room(&route, len) {
                    queue.flush(Instant::now(), &mut Counters::default(), |r, b, s| wire.send(r, b, s));
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
            assert_eq!(
                queue.flush(Instant::now(), &mut Counters::default(), |r, b, s| wire.send(r, b, s)),
                Flushed::Clean
            );
            assert_eq!(wire.got, expect, "seed {seed}");
            assert_eq!(queue.free.len(), BATCHES, "no buffer is leaked");
            assert!(queue.latest.is_empty() && queue.order.is_empty());
        }
    }

    #[test]
    fn full_batch_is_one_send_of_49_segments() {
        let mut queue = Queue::new(false, true);
        put(&mut queue, 0, 1316, 50);
        let mut wire = Wire::default();
        queue.flush(Instant::now(), &mut Counters::default(), |r, b, s| wire.send(r, b, s));
        assert_eq!(wire.calls, [(49 * 1316, Some(1316)), (1316, None)]);
    }

    #[test]
    fn shorter_datagram_seals_and_longer_begins_anew() {
        let mut queue = Queue::new(false, true);
        for len in [100, 100, 60, 60, 100, 120] {
            put(&mut queue, 0, len, 1);
        }
        let mut wire = Wire::default();
        queue.flush(Instant::now(), &mut Counters::default(), |r, b, s| wire.send(r, b, s));
        assert_eq!(wire.calls, [(260, Some(100)), (60, None), (100, None), (120, None)]);
    }

    #[test]
    fn refused_offload_loses_nothing_and_rests_for_a_minute() {
        for errno in [libc::EIO, libc::EINVAL] {
            let mut queue = Queue::new(false, true);
            let mut wire = Wire { refuse_gso: Some(errno), ..Wire::default() };
            let (now, mut drops) = (Instant::now(), Counters::default());
            put(&mut queue, 0, 100, 3);
            queue.flush(now, &mut drops, |r, b, s| wire.send(r, b, s));
            put(&mut queue, 0, 100, 2);
            queue.flush(now, &mut drops, |r, b, s| wire.send(r, b, s));
            wire.refuse_gso = None;
            put(&mut queue, 0, 100, 2);
            queue.flush(now + GSO_REST, &mut drops, |r, b, s| wire.send(r, b, s));
            let single = (100, None);
            assert_eq!(
                wire.calls,
                [(300, Some(100)), single, single, single, single, single, (200, Some(100))]
            );
            assert_eq!(wire.got[&route(0)].len(), 7);
            assert_eq!(drops, Counters::default());
        }
    }

    #[test]
    fn bad_route_costs_its_own_datagrams_and_not_the_offload() {
        let mut queue = Queue::new(false, true);
        let mut wire = Wire { unreachable: Some(route(1)), ..Wire::default() };
        let mut drops = Counters::default();
        put(&mut queue, 1, 100, 3);
        put(&mut queue, 2, 100, 3);
        assert_eq!(queue.flush(Instant::now(), &mut drops, |r, b, s| wire.send(r, b, s)), Flushed::Clean);
        assert_eq!(drops.get(DropReason::UdpSend), 3);
        assert_eq!(wire.got[&route(2)].len(), 3);
        assert_eq!(wire.calls.last(), Some(&(300, Some(100))));
    }

    #[test]
    fn path_with_a_small_mtu_does_not_cost_others_the_offload() {
        let mut queue = Queue::new(false, true);
        let mut wire = Wire { mtu: Some(500), ..Wire::default() };
        let mut drops = Counters::default();
        put(&mut queue, 1, 1000, 3);
        put(&mut queue, 1, 50, 1);
        put(&mut queue, 2, 100, 3);
        assert_eq!(queue.flush(Instant::now(), &mut drops, |r, b, s| wire.send(r, b, s)), Flushed::Clean);
        assert_eq!(drops.iter().collect::<Vec<_>>(), [(DropReason::UdpSend, 3)]);
        assert_eq!(wire.got[&route(1)], [[7; 50]]);
        assert_eq!(wire.calls.last(), Some(&(300, Some(100))));
    }

    #[test]
    fn blocked_socket_keeps_order_and_refuses_only_when_full() {
        let mut queue = Queue::new(false, false);
        let (now, mut drops) = (Instant::now(), Counters::default());
        let mut wire = Wire { room: Some(2), ..Wire::default() };
        put(&mut queue, 0, 100, 3);
        assert_eq!(queue.flush(now, &mut drops, |r, b, s| wire.send(r, b, s)), Flushed::Blocked);
        put(&mut queue, 0, 100, 1);
        for i in 1..BATCHES - 1 {
            put(&mut queue, u16::try_from(i).unwrap(), 100, 1);
        }
        assert!(queue.reserve(&route(999), 100).is_none(), "every buffer waits");
        assert!(queue.reserve(&route(5), 100).is_some(), "a waiting batch of the route still takes it");
        wire.room = None;
        assert_eq!(queue.flush(now, &mut drops, |r, b, s| wire.send(r, b, s)), Flushed::Clean);
        assert_eq!(wire.got[&route(0)].len(), 4);
        assert_eq!(wire.got.len(), BATCHES - 1);
        assert_eq!(drops, Counters::default());
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
    struct Wire {
        got: HashMap<Route, Vec<Vec<u8>>>,
        calls: Vec<(usize, Option<usize>)>,
        refuse_gso: Option<i32>,
        unreachable: Option<Route>,
        mtu: Option<usize>,
        room: Option<usize>,
    }

    impl Wire {
        fn send(&mut self, route: &Route, bytes: &[u8], segment: Option<usize>) -> io::Result<()> {
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
}
