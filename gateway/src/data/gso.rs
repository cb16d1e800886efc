//! Datagrams on their way out: collected per route, sent as segmented batches (packets.md section 9,
//! connections.md section 2.4).
//!
//! A worker builds each datagram in place: reserve, encrypt into the batch, commit. A datagram may only join the
//! most recent batch of its route, so that order within a route is the order of commits. Buffers are made once.
//! Where several sends wait, they leave by one system call; one that fails is repeated alone, to learn what is wrong.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind},
    os::fd::AsFd as _,
    time::{Duration, Instant},
};

use arrayvec::ArrayVec;
use gateway_common::{Counters, DropReason};
use gateway_proto::{Ecn, Route};
use quinn_udp::EcnCodepoint;
use rustc_hash::FxHashMap;

use super::{
    sendmmsg::{self, MOST, Message},
    udp::DataSocket,
};

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

    /// Batches that are not free: none, once everything is sent.
    pub fn batches_in_use(&self) -> usize {
        BATCHES - self.queue.free.len()
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
        let mut kernel = Kernel { socket, spoiled: false };
        let flushed = queue.flush(now, drops, &mut kernel);
        // quinn-udp takes EINVAL for an ancient kernel and stops setting ECN for the life of its state. It is also
        // what a source address that has left this machine gets. A new state is some twenty calls, hence once.
        if kernel.spoiled {
            socket.renew();
        }
        *blocked = flushed == Flushed::Blocked;
    }
}

/// What sends: the kernel, or a test's stand-in.
trait Wire {
    /// Whether [`Wire::send_many`] may be used.
    fn takes_many(&self) -> bool;
    /// See [`sendmmsg::send`].
    fn send_many(&mut self, messages: &[Message<'_>]) -> io::Result<usize>;
    /// One send.
    fn send(&mut self, message: &Message<'_>) -> io::Result<()>;
}

struct Kernel<'a> {
    socket: &'a DataSocket,
    /// quinn-udp has met one of its errors.
    spoiled: bool,
}

impl Wire for Kernel<'_> {
    fn takes_many(&self) -> bool {
        self.socket.takes_many()
    }

    fn send_many(&mut self, messages: &[Message<'_>]) -> io::Result<usize> {
        sendmmsg::send(self.socket.as_fd(), messages)
    }

    fn send(&mut self, message: &Message<'_>) -> io::Result<()> {
        let Message { route, bytes, segment } = *message;
        let transmit = quinn_udp::Transmit {
            destination: route.dst,
            ecn: codepoint(route.ecn),
            contents: bytes,
            segment_size: segment,
            src_ip: route.src.map(|src| src.ip()),
        };
        let result = self.socket.state.try_send((&self.socket.socket).into(), &transmit);
        self.spoiled |= result.as_ref().is_err_and(is_refusal);
        result
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

    /// Sends every batch by `wire`, in order, and counts what that refuses.
    fn flush(&mut self, now: Instant, drops: &mut Counters, wire: &mut impl Wire) -> Flushed {
        self.reserved = None;
        while let Some(&slot) = self.order.front() {
            let flushed = match self.flush_many(now, wire) {
                Some(flushed) => flushed,
                None => self.flush_batch(slot, now, drops, wire),
            };
            self.retire();
            if flushed == Flushed::Blocked {
                return Flushed::Blocked;
            }
        }
        Flushed::Clean
    }

    /// Forgets the batches that are sent.
    fn retire(&mut self) {
        while let Some(&slot) = self.order.front()
            && self.batches[slot].sent >= self.batches[slot].len
        {
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
    }

    /// Sends what one call takes. `None` if there is only one send, or the first of them failed.
    fn flush_many(&mut self, now: Instant, wire: &mut impl Wire) -> Option<Flushed> {
        if !wire.takes_many() {
            return None;
        }
        let gso = self.may_segment(now);
        let mut messages = ArrayVec::<Message<'_>, MOST>::new();
        let mut origins = ArrayVec::<(usize, usize), MOST>::new();
        for &slot in &self.order {
            let batch = &self.batches[slot];
            let Some(route) = &batch.route else { continue };
            let mut rest = &self.bytes[slot * CAPACITY..][batch.sent..batch.len];
            while !rest.is_empty() && !messages.is_full() {
                let segmented = gso && rest.len() > batch.segment;
                let (bytes, behind) =
                    rest.split_at(if segmented { rest.len() } else { rest.len().min(batch.segment) });
                messages.push(Message { route, bytes, segment: segmented.then_some(batch.segment) });
                origins.push((slot, bytes.len()));
                rest = behind;
            }
            if messages.is_full() {
                break;
            }
        }
        if messages.len() < 2 {
            return None;
        }
        let (sent, flushed) = match wire.send_many(&messages) {
            Ok(sent) if sent > 0 => (sent, Flushed::Clean),
            Err(e) if e.kind() == ErrorKind::WouldBlock => (0, Flushed::Blocked),
            _ => return None,
        };
        drop(messages);
        for (slot, len) in origins.drain(..sent.min(origins.len())) {
            let batch = &mut self.batches[slot];
            batch.sent += len;
            batch.sealed = true;
        }
        Some(flushed)
    }

    fn may_segment(&self, now: Instant) -> bool {
        self.gso && self.gso_rests_until.is_none_or(|until| now >= until)
    }

    fn flush_batch(
        &mut self,
        slot: usize,
        now: Instant,
        drops: &mut Counters,
        wire: &mut impl Wire,
    ) -> Flushed {
        let mut gso = self.may_segment(now);
        let batch = &mut self.batches[slot];
        let Some(route) = batch.route else { return Flushed::Clean };
        let bytes = &self.bytes[slot * CAPACITY..][..batch.len];
        let mut refused = None;
        while batch.sent < batch.len {
            let rest = &bytes[batch.sent..];
            let segmented = gso && rest.len() > batch.segment;
            let part = if segmented { rest } else { &rest[..rest.len().min(batch.segment)] };
            let segment = segmented.then_some(batch.segment);
            match wire.send(&Message { route: &route, bytes: part, segment }) {
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
mod tests;
