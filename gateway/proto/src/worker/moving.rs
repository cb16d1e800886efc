//! Whose a client is: what control's [`Command::Client`](crate::Command::Client) does here, and how a client goes from
//! one worker to another. Knows entries and orders; no packet.
//!
//! ```text
//! control: Client { home: B, from A, order n } to all, in any order, coalesced per client
//!
//!   A     holds the client   --(order)-->  gives Moved n to B, points at B     once per order, empty-handed if need be
//!   B     points at A        --(order)-->  awaits n, points at A  --(Moved n)-->  holds it, tells control "adopted n"
//!   B     points at A        --(Moved n)-------------------------------------->   the same; the order finds it done
//!   else  points at A        --(order)-->  points at B
//! ```
//!
//! Commands coalesce, so a worker may miss any of them but the last. What it knows of a client carries the number of the
//! order it came by, and a lower number never undoes a higher one. A client that arrives after its removal is
//! recognised by what [`Gone`] remembers.

use std::{
    collections::VecDeque,
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Worker,
    bucket::Bucket,
    control_packet,
    peer::Peer,
    peers::{Elsewhere, Entry},
    send,
    slot::Slot,
    wheel::CALM,
};
use crate::{
    ClientId, Sink, WorkerEvent, WorkerId,
    addr::MAX_INNER,
    command::{ClientState, Home},
};

/// A client on its way to another worker. Whoever receives it passes it to [`Worker::handle_moved`].
pub struct Moved {
    id: ClientId,
    /// By which order, see [`Home::order`].
    order: u64,
    /// What it was to be when it left.
    state: Arc<ClientState>,
    /// `None` if the worker that was to give it had nothing.
    peer: Option<Box<Peer>>,
}

impl fmt::Debug for Moved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Moved").field("id", &self.id).field("order", &self.order).finish_non_exhaustive()
    }
}

/// It crosses threads.
const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Moved>();
};

/// Clients that control took back a moment ago, with their last orders: one of them may still be on its way here.
#[derive(Debug, Default)]
pub struct Gone(VecDeque<(Instant, ClientId, u64)>);

/// A worker that is behind by 2 s ends the process; nothing arrives later than this.
const LATEST_ARRIVAL: Duration = Duration::from_secs(5);

impl Gone {
    fn remember(&mut self, id: ClientId, order: u64, now: Instant) {
        while self.0.front().is_some_and(|(until, ..)| *until <= now) {
            self.0.pop_front();
        }
        self.0.push_back((now + LATEST_ARRIVAL, id, order));
    }

    fn covers(&self, id: ClientId, order: u64) -> bool {
        self.0.iter().any(|(_, gone, last)| *gone == id && *last >= order)
    }
}

impl Worker {
    /// Control says what a client is and who holds it.
    pub(super) fn place(
        &mut self,
        id: ClientId,
        home: Home,
        desired: Option<Arc<ClientState>>,
        now: Instant,
        sink: &mut impl Sink,
    ) {
        let order = home.order;
        let slot = self.peers.by_id(id);
        let entry = slot.and_then(|slot| self.peers.entry(slot));
        // A client that came before its order brought a later state along.
        if entry.is_some_and(|entry| entry.order() > order) {
            return;
        }
        let Some(state) = desired else { return self.forget(id, order, now, sink) };
        let from = home.from.filter(|from| *from != home.worker);
        if home.worker == self.id {
            match (from, entry) {
                (None, _) => self.hold(id, order, &state, now, sink),
                // It came before its order.
                (Some(_), Some(Entry::Here(peer))) if peer.order == order => {
                    self.hold(id, order, &state, now, sink);
                }
                // What is here in spite of that is of an earlier life.
                (Some(from), _) => {
                    let old = self.point(id, from, true, order, state);
                    self.retire_entry(old, now);
                }
            }
            return;
        }
        let asked = from == Some(self.id);
        let answered = matches!(entry, Some(Entry::There(there)) if there.order == order);
        let old = self.point(id, home.worker, false, order, Arc::clone(&state));
        if asked && !answered {
            let peer = old.and_then(Entry::into_peer);
            sink.give(home.worker, Moved { id, order, state, peer });
        } else {
            self.retire_entry(old, now);
        }
    }

    /// A client that another worker gave to this one.
    pub fn handle_moved(&mut self, moved: Moved, now: Instant, sink: &mut impl Sink) {
        let Moved { id, order, mut state, peer } = moved;
        match self.peers.by_id(id).and_then(|slot| self.peers.entry(slot)) {
            // Control may have said more since.
            Some(Entry::There(there)) if there.awaited && there.order == order => {
                state = Arc::clone(&there.state);
            }
            // Of an earlier life: what control wants now was made without it.
            Some(entry) if entry.order() >= order => {
                self.retire_entry(peer.map(Entry::Here), now);
                return;
            }
            None if self.gone.covers(id, order) => {
                if let Some(peer) = peer {
                    self.say_goodbye(peer, now, sink);
                }
                return;
            }
            // Its order is on the way.
            _ => {}
        }
        if let Some(mut peer) = peer {
            peer.order = order;
            let (slot, old) = self.peers.put(Entry::Here(peer));
            self.retire_entry(old, now);
            // Whatever its timers were about, they look at it soon.
            self.schedule(slot, 1, now);
        }
        self.hold(id, order, &state, now, sink);
        self.events.push(WorkerEvent::Adopted { id, worker: self.id, order });
    }

    /// The client is here and is to be `state`.
    fn hold(&mut self, id: ClientId, order: u64, state: &ClientState, now: Instant, sink: &mut impl Sink) {
        let slot = self.peers.by_id(id).filter(|slot| self.peers.get_mut(*slot).is_some());
        if let Some(slot) = slot {
            self.on_tunnel(slot, state.tunnel, now);
        }
        let (slot, connected) = match slot {
            Some(slot) => {
                let apply = |entry: &mut Entry| match entry {
                    Entry::Here(peer) => {
                        peer.order = order;
                        peer.apply(state, &self.gate, now)
                    }
                    Entry::There(_) => false,
                };
                (slot, self.peers.update(slot, apply).unwrap_or_default())
            }
            None => {
                // Random as all of the worker's numbers, and no other client's.
                let seed = self.spread ^ id.0.as_u64_pair().1;
                let peer = Box::new(Peer::new(id, order, state, &self.gate, seed));
                (self.peers.put(Entry::Here(peer)).0, true)
            }
        };
        if connected {
            self.spread = self.spread.wrapping_add(1);
            self.schedule(slot, 1 + self.spread % CALM, now);
        }
        self.account(slot, now);
        self.send_held(slot, now, sink);
        self.send_answers(slot, now, sink);
    }

    /// What the client has not heard yet about its names. They are in force by now: every packet that it sends when it
    /// has heard comes after this command.
    fn send_answers(&mut self, slot: Slot, now: Instant, sink: &mut impl Sink) {
        let Some((answers, link)) = self.peers.get_mut(slot).and_then(Peer::take_answers) else { return };
        let mut packet = [0; MAX_INNER];
        for answer in answers {
            let Some(len) = control_packet::status(answer, &mut packet) else { continue };
            if send::seal(link, &packet[..len], &mut self.demux, now, sink).is_ok() {
                self.traffic.answers += 1;
            }
        }
    }

    /// The client is `worker`'s, for all this worker knows. What was known of it before is returned.
    fn point(
        &mut self,
        id: ClientId,
        worker: WorkerId,
        awaited: bool,
        order: u64,
        state: Arc<ClientState>,
    ) -> Option<Entry> {
        let known = self.peers.by_id(id).and_then(|slot| self.peers.handshakes(slot));
        let handshakes = known.map_or(Bucket::FULL, |budget| *budget);
        let there = Elsewhere { id, worker, awaited, order, state, handshakes };
        self.peers.put(Entry::There(Box::new(there))).1
    }

    fn forget(&mut self, id: ClientId, order: u64, now: Instant, sink: &mut impl Sink) {
        if self.workers > 1 {
            self.gone.remember(id, order, now);
        }
        let entry = self.peers.by_id(id).and_then(|slot| self.peers.remove(slot));
        if let Some(peer) = entry.and_then(Entry::into_peer) {
            self.say_goodbye(peer, now, sink);
        }
    }

    fn schedule(&mut self, slot: Slot, ticks: u64, now: Instant) {
        if let Some(peer) = self.peers.get_mut(slot)
            && peer.is_timed()
        {
            peer.due = self.wheel.schedule(slot, ticks, now);
        }
    }
}
