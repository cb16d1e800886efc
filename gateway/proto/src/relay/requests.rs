//! Requests in flight: which answers belong to what, and when to repeat (connections.md section 8.1).
//!
//! Bookkeeping only: it neither encodes nor sends. Every repetition has a transaction id of its own, and an answer
//! to any of them counts. (Upstream hears the last one only; with a round trip above the first interval it would
//! never hear anything.)

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use rustc_hash::FxHashMap;
use stun_types::message::TransactionId;

use super::codec::Request;

/// Sent at 0, 1, 2.5 and 4.75 s, failed at 8.125 s (connections.md section 8.1).
pub(super) const LADDER: &[Duration] = &[
    Duration::from_millis(1000),
    Duration::from_millis(1500),
    Duration::from_millis(2250),
    Duration::from_millis(3375),
];
/// One attempt of one second: is an unlisted relay alive (connections.md section 8.5)?
pub(super) const PROBE: &[Duration] = &[Duration::from_millis(1000)];

/// Names a request for as long as it is in flight, over all its repetitions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key(u64);

#[derive(Debug)]
pub(super) struct Pending {
    pub(super) request: Request,
    pub(super) dst: SocketAddr,
    /// Of this run of the ladder; a challenge starts another.
    pub(super) first_sent: Instant,
    /// How often an answer made us repeat it with another nonce.
    pub(super) challenges: u8,
    /// How often it was refused (401) although it had a nonce.
    pub(super) rejections: u8,
    /// Goes out without credentials (RFC 8489 section 9.2.3.1: how a client learns realm and nonce).
    pub(super) bare: bool,
    ladder: &'static [Duration],
    sent: usize,
    due: Instant,
    copies: Vec<Sent>,
}

/// One transmission.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) id: TransactionId,
    /// Which nonce it carried; 0 is none.
    pub(super) nonce: u32,
}

impl Pending {
    pub(super) fn is_bind(&self) -> bool {
        matches!(self.request, Request::Bind { .. })
    }

    /// It was sent before.
    pub(super) fn is_repeated(&self) -> bool {
        self.sent > 0
    }

    /// The first transmission's id: a BINDING is repeated unchanged.
    pub(super) fn first_id(&self) -> Option<TransactionId> {
        self.copies.first().map(|copy| copy.id)
    }

    /// The newest nonce any transmission carried.
    pub(super) fn newest_nonce(&self) -> u32 {
        self.copies.iter().map(|copy| copy.nonce).max().unwrap_or(0)
    }
}

/// What became of a request whose time has come.
#[derive(Debug)]
pub(super) enum Due {
    Repeat(Key),
    Failed(Pending),
}

#[derive(Debug, Default)]
pub(super) struct Requests {
    pending: FxHashMap<Key, Pending>,
    ids: FxHashMap<TransactionId, Key>,
    due: BTreeSet<(Instant, Key)>,
    /// How many of them are binds.
    binds: usize,
    next: u64,
}

impl Requests {
    /// Takes up a request; [`Requests::sent`] must follow.
    pub(super) fn start(
        &mut self,
        request: Request,
        dst: SocketAddr,
        ladder: &'static [Duration],
        now: Instant,
    ) -> Key {
        let key = Key(self.next);
        self.next += 1;
        let pending = Pending {
            request,
            dst,
            first_sent: now,
            challenges: 0,
            rejections: 0,
            bare: false,
            ladder,
            sent: 0,
            due: now,
            copies: Vec::new(),
        };
        self.binds += usize::from(pending.is_bind());
        self.pending.insert(key, pending);
        self.due.insert((now, key));
        key
    }

    /// Notes a transmission and sets the next deadline.
    pub(super) fn sent(&mut self, key: Key, copy: Sent, now: Instant) {
        let Some(pending) = self.pending.get_mut(&key) else { return };
        self.due.remove(&(pending.due, key));
        // The ladder's last interval ends in failure, so there is one for every transmission.
        pending.due = now + pending.ladder[pending.sent.min(pending.ladder.len() - 1)];
        pending.sent += 1;
        self.due.insert((pending.due, key));
        if pending.copies.iter().all(|known| known.id != copy.id) {
            pending.copies.push(copy);
            self.ids.insert(copy.id, key);
        }
    }

    /// Starts the ladder anew, for a repetition with another nonce or `bare`; [`Requests::sent`] must follow.
    pub(super) fn restart(&mut self, key: Key, bare: bool, now: Instant) {
        if let Some(pending) = self.pending.get_mut(&key) {
            pending.bare = bare;
            pending.sent = 0;
            pending.first_sent = now;
        }
    }

    pub(super) fn get_mut(&mut self, key: Key) -> Option<&mut Pending> {
        self.pending.get_mut(&key)
    }

    /// The request an answer belongs to, and which transmission of it.
    pub(super) fn find(&self, id: TransactionId) -> Option<(Key, Sent, &Pending)> {
        let key = *self.ids.get(&id)?;
        let pending = self.pending.get(&key)?;
        let copy = *pending.copies.iter().find(|copy| copy.id == id)?;
        Some((key, copy, pending))
    }

    /// A transmission was answered: another answer to it means nothing.
    pub(super) fn forget_copy(&mut self, key: Key, id: TransactionId) {
        self.ids.remove(&id);
        if let Some(pending) = self.pending.get_mut(&key) {
            pending.copies.retain(|copy| copy.id != id);
        }
    }

    pub(super) fn remove(&mut self, key: Key) -> Option<Pending> {
        let pending = self.pending.remove(&key)?;
        self.binds -= usize::from(pending.is_bind());
        self.due.remove(&(pending.due, key));
        for copy in &pending.copies {
            self.ids.remove(&copy.id);
        }
        Some(pending)
    }

    pub(super) fn clear(&mut self) {
        self.pending.clear();
        self.ids.clear();
        self.due.clear();
        self.binds = 0;
    }

    /// Binds that have no answer yet.
    pub(super) fn binds(&self) -> usize {
        self.binds
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    pub(super) fn any(&self, is: impl Fn(&Pending) -> bool) -> bool {
        self.pending.values().any(is)
    }

    /// A request that is due; one that had its last chance is removed.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<Due> {
        let (due, key) = *self.due.first()?;
        if due > now {
            return None;
        }
        let pending = self.pending.get(&key).expect("every deadline has its request");
        if pending.sent < pending.ladder.len() {
            return Some(Due::Repeat(key));
        }
        self.remove(key).map(Due::Failed)
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_sent_four_times_and_fails_after_8125_ms() {
        let start = crate::relay::twin::start();
        let mut requests = Requests::default();
        let key = requests.start(Request::Allocate, "192.0.2.1:3478".parse().unwrap(), LADDER, start);
        let mut times = Vec::new();
        let mut now = start;
        let mut id = 0_u128;
        loop {
            match requests.pop_due(now) {
                Some(Due::Repeat(k)) => {
                    assert_eq!(k, key);
                    times.push((now - start).as_millis());
                    id += 1;
                    requests.sent(k, Sent { id: id.into(), nonce: 0 }, now);
                }
                Some(Due::Failed(_)) => break,
                None => now = requests.poll_timeout().unwrap(),
            }
        }
        assert_eq!(times, [0, 1000, 2500, 4750]);
        assert_eq!((now - start).as_millis(), 8125);
        assert!(requests.is_empty() && requests.poll_timeout().is_none());
        assert!(requests.find(1.into()).is_none());
    }

    #[test]
    fn an_answer_to_any_transmission_finds_the_request_once() {
        let start = crate::relay::twin::start();
        let mut requests = Requests::default();
        let key = requests.start(Request::Allocate, "192.0.2.1:3478".parse().unwrap(), LADDER, start);
        requests.sent(key, Sent { id: 1.into(), nonce: 0 }, start);
        requests.sent(key, Sent { id: 2.into(), nonce: 3 }, start);
        assert_eq!(
            requests.find(1.into()).map(|(k, copy, p)| (k, copy.nonce, p.newest_nonce())),
            Some((key, 0, 3))
        );
        requests.forget_copy(key, 1.into());
        assert!(requests.find(1.into()).is_none() && requests.find(2.into()).is_some());
        requests.remove(key);
        assert!(requests.find(2.into()).is_none() && requests.poll_timeout().is_none());
        let bind = Request::Bind { number: 0x4000, peer: "192.0.2.2:4000".parse().unwrap() };
        let keys = [(); 3].map(|()| requests.start(bind, "192.0.2.1:3478".parse().unwrap(), LADDER, start));
        requests.remove(keys[0]);
        requests.remove(keys[0]);
        assert_eq!(requests.binds(), 2);
        requests.clear();
        assert_eq!(requests.binds(), 0);
    }
}
