//! One relay: from the first BINDING to a living allocation (connections.md sections 8.2 to 8.6).
//!
//! ```text
//!            BINDING to all           first answer: ALLOCATE          success
//!  start ---------------> Searching ------------------> Unallocated -------------> Allocated
//!                            ^                            |  ^ |                    |     |
//!                            | suspended, portal update   |  | +-- 437: REFRESH 0 --+     | 437, deadline
//!                            +----------------------------+  +--------------------- | ----+
//!  Failed <--- 401 with nonce, 420, or the active server is silent for 8 s <--------+
//! ```
//!
//! It knows nothing of other relays. Answers are handled in `answers`, the portal's later words in `adopt`, children of
//! this file. Credentials that wait for the end of the allocation turn each way to `Failed` into one to Searching.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

use gateway_common::{Counters, DropReason};
use rand::{Rng, rngs::StdRng};
use stun_types::{attribute::Nonce, message::TransactionId};

use super::{
    channels::{self, Channels, Wanted},
    codec::{self, Credentials, RefreshForm, Request, family},
    event::{LocalCandidate, RelayEvent, Use},
    pace::{Pace, Rank},
    requests::{Due, Key, LADDER, PROBE, Pending, Requests, Sent},
    rtt::Rtt,
    view::{RelayState, RelayView},
};
use crate::{ids::RelayId, sink::Transmit};

mod adopt;
mod answers;

/// BINDING to the active server, restarted by ChannelData (connections.md section 8.6) that is answered.
const KEEP_ALIVE: Duration = Duration::from_secs(25);
/// Binds that wait for the allocation (connections.md section 8.7).
const MAX_BUFFERED: usize = 100;
/// A relay that answers but grants nothing is asked again this often. The spec lets it sit until the portal says
/// something; a full relay (508) empties without the portal's knowing.
const RETRY: Duration = Duration::from_secs(60);
/// More 437 than this within [`RETRY`], and the server contradicts itself: pause rather than loop at its pace.
const MAX_MISMATCHES: u8 = 6;
/// A server that answers every nonce with yet another one is not followed any further.
const MAX_CHALLENGES: u8 = 3;
/// However short a lifetime is: not a refresh at every tick.
const MIN_REFRESH: Duration = Duration::from_secs(5);
/// A relay that was heard of this allocation so lately has not forgotten it. A client checks its nominated pair every
/// 1.5 s (connections.md section 6.6), so that one check is missing when this has passed.
pub(crate) const SILENCE: Duration = Duration::from_secs(2);
/// Whoever doubts the allocation, and however many do: one REFRESH in this time.
const CHECK_EVERY: Duration = Duration::from_secs(5);
/// Workers report what came on channels once a second, so that it may be so old.
const REPORT_AGE: Duration = Duration::from_secs(1);

/// One server address of a relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Server {
    pub(super) addr: SocketAddr,
    pub(super) credentials: Credentials,
}

/// IPv4 and IPv6.
pub(super) type Servers = [Option<Server>; 2];

/// What a relay needs from its owner: randomness, and where its output goes.
#[derive(Debug)]
pub(super) struct Out {
    pub(super) rng: StdRng,
    pub(super) transmits: VecDeque<Transmit>,
    pub(super) events: VecDeque<RelayEvent>,
    pub(super) counters: Counters,
}

#[derive(Debug)]
pub(super) struct Allocation {
    id: RelayId,
    servers: Servers,
    /// The active server with what the portal said of it since: credentials under another name, while ours work.
    successor: Option<Server>,
    state: State,
    /// Per family, what BINDING answers told.
    mappings: [Option<Mapping>; 2],
    nonce: Option<Nonce>,
    /// Counts the nonces, so that an answer to a request with an older one is known as such.
    nonce_number: u32,
    /// What this server takes.
    refresh_form: RefreshForm,
    requests: Requests,
    channels: Channels,
    pace: Pace,
    buffered: VecDeque<(SocketAddr, Use)>,
    rtt: Rtt,
    /// 437 answers since the first one of the last [`RETRY`].
    mismatches: (u8, Option<Instant>),
    /// When [`Allocation::check`] asked last.
    checked: Option<Instant>,
}

#[derive(Debug)]
enum State {
    /// No server has answered.
    Searching,
    /// ALLOCATE or a deallocating REFRESH is in flight, or, if nothing is, the relay is suspended until `retry_at`.
    Unallocated {
        active: Active,
        retry_at: Option<Instant>,
    },
    Allocated {
        active: Active,
        granted: Granted,
    },
    /// To be freed.
    Failed,
}

/// The server that all requests go to.
#[derive(Debug, Clone, Copy)]
struct Active {
    server: SocketAddr,
    /// Our address its answers arrive on.
    local: SocketAddr,
}

#[derive(Debug, Clone, Copy)]
struct Granted {
    relayed: [Option<SocketAddr>; 2],
    deadline: Instant,
    /// `None` while a REFRESH is in flight.
    refresh_at: Option<Instant>,
    keep_alive_at: Instant,
    /// The relay was last known to hold it: it confirmed something, or data came on a channel.
    proven: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mapping {
    host: SocketAddr,
    reflexive: SocketAddr,
}

impl Allocation {
    pub(super) fn start(id: RelayId, servers: Servers, now: Instant, out: &mut Out) -> Self {
        let mut new = Self {
            id,
            servers,
            successor: None,
            state: State::Searching,
            mappings: [None; 2],
            nonce: None,
            nonce_number: 0,
            refresh_form: RefreshForm::default(),
            requests: Requests::default(),
            channels: Channels::default(),
            pace: Pace::default(),
            buffered: VecDeque::new(),
            rtt: Rtt::default(),
            mismatches: (0, None),
            checked: None,
        };
        new.search(now, out);
        new
    }

    pub(super) fn id(&self) -> RelayId {
        self.id
    }

    pub(super) fn addresses(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        self.servers.iter().flatten().map(|server| server.addr)
    }

    pub(super) fn view(&self) -> RelayView {
        let relayed = self.relayed().filter_map(|candidate| match candidate {
            LocalCandidate::Relayed { addr, .. } => Some(addr),
            _ => None,
        });
        RelayView {
            id: self.id,
            addresses: self.addresses().collect(),
            active: self.active_server(),
            rtt: self.rtt(),
            state: match self.state {
                State::Searching => RelayState::Silent,
                State::Unallocated { .. } => RelayState::Answering,
                State::Allocated { .. } => RelayState::Allocated,
                State::Failed => RelayState::Failed,
            },
            relayed: relayed.collect(),
            channels: self.channels.bound(),
        }
    }

    pub(super) fn rtt(&self) -> Option<Duration> {
        self.rtt.get()
    }

    /// The address requests go to, once one has answered.
    pub(super) fn active_server(&self) -> Option<SocketAddr> {
        self.active().map(|active| active.server)
    }

    /// Answers, but grants nothing and is not being asked.
    pub(super) fn is_suspended(&self) -> bool {
        matches!(self.state, State::Unallocated { .. }) && self.requests.is_empty()
    }

    /// Nothing more will come of it (connections.md section 9, GC).
    pub(super) fn is_dead(&self) -> bool {
        match self.state {
            State::Failed => true,
            State::Searching => self.requests.is_empty(),
            State::Unallocated { .. } | State::Allocated { .. } => false,
        }
    }

    pub(super) fn host_and_reflexive(&self) -> impl Iterator<Item = LocalCandidate> + '_ {
        self.mappings.iter().flatten().flat_map(|mapping| mapping.candidates())
    }

    pub(super) fn relayed(&self) -> impl Iterator<Item = LocalCandidate> + '_ {
        let (active, relayed) = match &self.state {
            State::Allocated { active, granted } => (Some(*active), granted.relayed),
            _ => (None, [None; 2]),
        };
        relayed
            .into_iter()
            .flatten()
            .zip(active.into_iter().cycle())
            .map(|(addr, active)| self.candidate(addr, active))
    }

    /// The portal did not mention the relay: is it alive (connections.md section 8.5)?
    pub(super) fn probe(&mut self, now: Instant, out: &mut Out) {
        if self.is_suspended() {
            self.search(now, out);
        } else if let State::Allocated { active, granted } = &mut self.state {
            // Without a deadline for the next refresh one is in flight already.
            if granted.refresh_at.take().is_some() {
                let server = active.server;
                self.request(Request::Refresh, server, PROBE, now, out);
            }
        }
    }

    /// Somebody misses what should come through this allocation: does the relay still hold it? Asked by a REFRESH,
    /// which a relay that was restarted answers with 437, unless the allocation was proven or asked for a moment ago.
    ///
    /// Returns when it is worth to doubt it again; `None` if it is being asked now, or there is none.
    pub(super) fn check(&mut self, now: Instant, out: &mut Out) -> Option<Instant> {
        let State::Allocated { active, granted } = &mut self.state else { return None };
        let asked = self.checked.map(|at| at + CHECK_EVERY);
        let again = asked.into_iter().fold(granted.proven + SILENCE, Instant::max);
        if now < again {
            return Some(again);
        }
        // Without a deadline for the next refresh one is in flight already.
        if granted.refresh_at.take().is_some() {
            let server = active.server;
            self.checked = Some(now);
            tracing::debug!(relay = %self.id, "Quiet: does the relay still know us?");
            self.request(Request::Refresh, server, LADDER, now, out);
        }
        None
    }

    /// Something came through the allocation at `at`.
    pub(super) fn on_heard(&mut self, at: Instant) {
        if let State::Allocated { granted, .. } = &mut self.state {
            granted.proven = granted.proven.max(at);
        }
    }

    /// Wants a channel; silently refused for a family the relay has no address of (connections.md section 8.7).
    pub(super) fn bind(&mut self, peer: SocketAddr, why: Use, now: Instant, out: &mut Out) {
        if !codec::usable(&peer) || self.is_suspended() {
            return;
        }
        let State::Allocated { granted, .. } = &self.state else { return self.buffer(peer, why) };
        if granted.relayed[family(peer)].is_none() {
            return;
        }
        match self.channels.want(peer, why, now) {
            // Its bind may wait, for less than this.
            Wanted::Nothing => {
                if let Some(number) = self.channels.number(peer) {
                    self.pace.raise(number, why.into());
                }
            }
            Wanted::Bind(number) => self.request_bind(number, now, out),
            Wanted::Exhausted => {
                out.counters.count(DropReason::ChannelsExhausted);
                if why == Use::Nominated && self.buffered.iter().all(|(waiting, _)| *waiting != peer) {
                    self.channels.give_up_a_signalled_one();
                    self.buffer(peer, why);
                }
            }
        }
    }

    pub(super) fn release(&mut self, peer: SocketAddr) {
        self.buffered.retain(|(waiting, _)| *waiting != peer);
        self.channels.release(peer);
        if let Some(number) = self.channels.number(peer)
            && self.pace.remove(number)
        {
            self.channels.withdraw(number);
        }
    }

    /// The channel that `peer`'s data may be sent on now.
    pub(super) fn channel(&self, peer: SocketAddr, now: Instant) -> Option<(SocketAddr, u16)> {
        let State::Allocated { active, .. } = &self.state else { return None };
        self.channels.sendable(peer, now).map(|number| (active.server, number))
    }

    /// ChannelData went over `number`.
    pub(super) fn on_channel_used(
        &mut self,
        number: u16,
        received: bool,
        sent: bool,
        now: Instant,
        out: &mut Out,
    ) {
        let State::Allocated { granted, .. } = &mut self.state else { return };
        if received {
            granted.proven = granted.proven.max(now.checked_sub(REPORT_AGE).unwrap_or(granted.proven));
        }
        // Counted from what came back: unanswered checks on a spare pair would hide for minutes that a relay is dead.
        if sent {
            granted.keep_alive_at = granted.keep_alive_at.max(granted.proven + KEEP_ALIVE);
        }
        if let Wanted::Bind(number) = self.channels.on_used(number, received, now) {
            self.request_bind(number, now, out);
        }
    }

    pub(super) fn handle_timeout(&mut self, now: Instant, out: &mut Out) {
        while let Some(due) = self.requests.pop_due(now) {
            match due {
                Due::Repeat(key) => {
                    if self.requests.get_mut(key).is_some_and(|p| p.is_bind() && p.is_repeated()) {
                        self.pace.on_lost(now);
                    }
                    self.transmit(key, now, out);
                }
                Due::Failed(pending) => self.on_unanswered(&pending, now, out),
            }
        }
        self.on_channel_deadlines(now, out);
        self.send_binds(now, out);
        match &mut self.state {
            State::Allocated { active, granted } => {
                let server = active.server;
                if granted.deadline <= now {
                    tracing::debug!(relay = %self.id, "Allocation expired");
                    self.allocate_again(Request::Allocate, now, out);
                    return;
                }
                let refresh = granted.refresh_at.take_if(|at| *at <= now).is_some();
                let keep_alive = granted.keep_alive_at <= now;
                if keep_alive {
                    granted.keep_alive_at = now + KEEP_ALIVE;
                }
                if refresh {
                    self.request(Request::Refresh, server, LADDER, now, out);
                }
                if keep_alive && !self.requests.any(|p| p.request == Request::Binding && p.dst == server) {
                    self.request(Request::Binding, server, LADDER, now, out);
                }
            }
            State::Unallocated { active, retry_at } => {
                let server = active.server;
                if retry_at.take_if(|at| *at <= now).is_some() {
                    self.request(Request::Allocate, server, LADDER, now, out);
                }
            }
            State::Searching | State::Failed => {}
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let own = match &self.state {
            State::Allocated { granted, .. } => {
                let first = granted.deadline.min(granted.keep_alive_at);
                Some(granted.refresh_at.map_or(first, |at| at.min(first)))
            }
            State::Unallocated { retry_at, .. } => *retry_at,
            State::Searching | State::Failed => None,
        };
        // What outlives an allocation waits for the next one.
        let channels = self.channels.poll_timeout().filter(|_| matches!(self.state, State::Allocated { .. }));
        [own, self.requests.poll_timeout(), channels].into_iter().flatten().min()
    }

    /// Withdraws what the allocation gave, forgets channels and requests (connections.md section 8.4, 437).
    pub(super) fn invalidate(&mut self, now: Instant, out: &mut Out) {
        self.requests.clear();
        for number in self.pace.clear() {
            if let Some((peer, why)) = self.channels.peer(number) {
                self.buffer(peer, why);
            }
        }
        let open = self.channels.clear(now);
        let State::Allocated { active, granted } = &self.state else { return };
        let (active, relayed) = (*active, granted.relayed);
        for addr in relayed.into_iter().flatten() {
            out.events.push_back(RelayEvent::Invalidated(self.candidate(addr, active), self.id));
        }
        for (number, peer) in open {
            let (relay, server) = (self.id, active.server);
            out.events.push_back(RelayEvent::ChannelGone { relay, server, number, peer });
        }
        self.state = State::Unallocated { active, retry_at: None };
    }

    /// Asks every server for a first sign of life.
    fn search(&mut self, now: Instant, out: &mut Out) {
        self.state = State::Searching;
        let servers: Vec<_> = self.addresses().collect();
        for server in servers {
            self.request(Request::Binding, server, LADDER, now, out);
        }
    }

    /// Invalidates and sends `request` (ALLOCATE, or the REFRESH that clears the way for it).
    fn allocate_again(&mut self, request: Request, now: Instant, out: &mut Out) {
        self.invalidate(now, out);
        if self.succeed(now, out) {
            return;
        }
        if let State::Unallocated { active, .. } = &self.state {
            let server = active.server;
            self.request(request, server, LADDER, now, out);
        }
    }

    /// No allocation, nothing in flight: wait.
    fn suspend(&mut self, now: Instant) {
        self.buffered.clear();
        if let State::Unallocated { retry_at, .. } = &mut self.state {
            *retry_at = Some(now + RETRY);
        }
    }

    fn give_up(&mut self, now: Instant, out: &mut Out) {
        self.invalidate(now, out);
        if !self.succeed(now, out) {
            self.state = State::Failed;
        }
    }

    /// A whole ladder without an answer. From the other family's server it means nothing.
    fn on_unanswered(&mut self, pending: &Pending, now: Instant, out: &mut Out) {
        if let State::Allocated { granted, .. } = &mut self.state
            && granted.proven > pending.first_sent
        {
            // Data or another answer came meanwhile: the relay lives, the way to it is bad or crowded.
            match pending.request {
                Request::Refresh => granted.refresh_at = Some(now + MIN_REFRESH),
                Request::Bind { number, .. } => {
                    let closed = self.channels.on_unanswered(number, now);
                    self.on_closed(number, closed, pending.dst, out);
                }
                Request::Binding | Request::Allocate | Request::Deallocate => {}
            }
            return;
        }
        if self.active_server() == Some(pending.dst) {
            tracing::debug!(relay = %self.id, request = ?pending.request.method(), "Relay does not respond");
            self.invalidate(now, out);
            if !self.succeed(now, out) {
                self.state = State::Searching;
            }
        }
    }

    /// The channel to `peer` was open until now.
    fn on_closed(&self, number: u16, peer: Option<SocketAddr>, server: SocketAddr, out: &mut Out) {
        if let Some(peer) = peer {
            out.events.push_back(RelayEvent::ChannelGone { relay: self.id, server, number, peer });
        }
    }

    fn on_channel_deadlines(&mut self, now: Instant, out: &mut Out) {
        let State::Allocated { active, .. } = &self.state else { return };
        let (relay, server) = (self.id, active.server);
        let mut freed = false;
        while let Some(due) = self.channels.pop_due(now) {
            match due {
                channels::Due::Refresh(number) => self.request_bind(number, now, out),
                channels::Due::Gone(number, peer) => {
                    out.events.push_back(RelayEvent::ChannelGone { relay, server, number, peer });
                }
                channels::Due::Free => freed = true,
            }
        }
        if freed {
            self.bind_buffered(now, out);
        }
    }

    /// Those who waited for the allocation, or for a number.
    fn bind_buffered(&mut self, now: Instant, out: &mut Out) {
        for (peer, why) in std::mem::take(&mut self.buffered) {
            self.bind(peer, why, now, out);
        }
    }

    /// The ring of binds that wait; when it is full the oldest of the least important is lost.
    fn buffer(&mut self, peer: SocketAddr, why: Use) {
        if let Some((_, known)) = self.buffered.iter_mut().find(|(waiting, _)| *waiting == peer) {
            *known = why.max(*known);
            return;
        }
        if self.buffered.len() == MAX_BUFFERED {
            let least = self.buffered.iter().enumerate().min_by_key(|(at, (_, why))| (*why, *at));
            if let Some(at) = least.map(|(at, _)| at) {
                self.buffered.remove(at);
            }
        }
        self.buffered.push_back((peer, why));
    }

    fn request_bind(&mut self, number: u16, now: Instant, out: &mut Out) {
        if let Some((_, why)) = self.channels.peer(number) {
            let rank = if self.channels.is_bound(number) { Rank::Refresh } else { why.into() };
            self.pace.push(number, rank);
            self.send_binds(now, out);
        }
    }

    /// As many of the waiting binds as the relay can be asked for. Their time counts from here.
    fn send_binds(&mut self, now: Instant, out: &mut Out) {
        let State::Allocated { active, .. } = &self.state else { return };
        let server = active.server;
        while let Some(number) = self.pace.pop(self.requests.binds()) {
            if let Some((peer, _)) = self.channels.peer(number) {
                self.request(Request::Bind { number, peer }, server, LADDER, now, out);
            }
        }
    }

    fn request(
        &mut self,
        request: Request,
        dst: SocketAddr,
        ladder: &'static [Duration],
        now: Instant,
        out: &mut Out,
    ) {
        let key = self.requests.start(request, dst, ladder, now);
        self.transmit(key, now, out);
    }

    /// Sends a request or its repetition: freshly authenticated, with a new id; a BINDING unchanged.
    fn transmit(&mut self, key: Key, now: Instant, out: &mut Out) {
        let Some(pending) = self.requests.get_mut(key) else { return };
        let (request, dst, bare) = (pending.request, pending.dst, pending.bare);
        let id = match (request, pending.first_id()) {
            (Request::Binding, Some(first)) => first,
            _ => TransactionId::from(out.rng.random::<u128>()),
        };
        let Some(server) = self.servers.iter().flatten().find(|server| server.addr == dst) else {
            // The portal took this address of the relay away meanwhile.
            self.requests.remove(key);
            return;
        };
        let credentials = (!bare).then_some(&server.credentials);
        let payload = codec::encode(request, id, credentials, self.nonce.as_ref(), self.refresh_form);
        self.requests.sent(key, Sent { id, nonce: if bare { 0 } else { self.nonce_number } }, now);
        if let Request::Bind { number, .. } = request
            && let Some(peer) = self.channels.on_bind_sent(number, now)
        {
            out.events.push_back(RelayEvent::ChannelOpened { relay: self.id, server: dst, number, peer });
        }
        out.transmits.push_back(Transmit { src: None, dst, payload });
    }

    fn active(&self) -> Option<Active> {
        match &self.state {
            State::Unallocated { active, .. } | State::Allocated { active, .. } => Some(*active),
            State::Searching | State::Failed => None,
        }
    }

    fn candidate(&self, addr: SocketAddr, active: Active) -> LocalCandidate {
        LocalCandidate::Relayed { addr, relay: self.id, server: active.server, local: active.local }
    }
}

impl Mapping {
    fn candidates(self) -> [LocalCandidate; 2] {
        [LocalCandidate::Host(self.host), LocalCandidate::Reflexive { addr: self.reflexive, base: self.host }]
    }
}
