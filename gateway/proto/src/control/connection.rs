//! One client's connection: its ICE agent, its state, its path (connections.md sections 5 and 6).
//!
//! ```text
//! Connecting --(nominated)--> Connected --(20 s quiet, agent has a pair)--> Idle
//!                                 ^--------(traffic, candidates, upsert)------'
//! any --(no remote candidate 10 s | ICE disconnected 2 s)--> failed: control removes it
//! ```
//!
//! It knows the relays and the tables that lead to it ([`Shared`]); authorizations, portal and workers are control's.

mod channels;
mod nomination;
mod pulse;

use std::{
    collections::HashSet,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use is::{
    Candidate, CandidateKind, IceAgent, IceAgentEvent, IceConnectionState, Protocol,
    stun::{StunMessage, StunPacket},
};
use rustc_hash::FxBuildHasher;
use tracing::debug;
use zeroize::Zeroizing;

use self::nomination::Pair;
pub use self::nomination::PathKind;
use crate::{
    command::ConnectionKeys,
    control::{agent, candidates, shared::Shared, stun_router},
    ids::{ClientId, ConnectionIndex, RelayId},
    portal::messages::{Authorize, IceCredentials},
    relay::{LocalCandidate, Use},
    sink::Transmit,
};

/// Without any remote candidate for so long the connection fails (connections.md section 12).
const CANDIDATE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long ICE may be disconnected (connections.md section 12).
const DISCONNECT_GRACE: Duration = Duration::from_secs(2);
/// Without application data for so long ICE slows down (connections.md section 12).
const IDLE_AFTER: Duration = Duration::from_secs(20);
/// Addresses one client may send checks from in a connection's life: the agent keeps each of them.
const MAX_HEARD: usize = 256;
/// Addresses that the workers are told of, the latest: a client has a few, more after it roamed.
const MAX_TOLD: usize = 16;
/// Remote lines taken in a connection's life: the agent keeps withdrawn candidates, too. A client repeats a few with
/// every authorization.
const MAX_LINES: usize = 2048;
/// Agent ticks in one drive: each sends at most one check, so more than one per pair is a fault.
const MAX_TICKS: usize = agent::MAX_PAIRS + 2;

/// One connection, from `upsert` until it fails or is closed.
pub(super) struct Connection {
    client: ClientId,
    keys: Arc<ConnectionKeys>,
    local: IceCredentials,
    remote: IceCredentials,
    agent: IceAgent,
    state: State,
    /// When the client last nominated our pair, and how often others since.
    nominations: (Instant, u32),
    /// When no remote candidate came until then, the connection fails; `None` after the first.
    candidate_deadline: Option<Instant>,
    /// When ICE stays disconnected until then, the connection fails.
    disconnect_deadline: Option<Instant>,
    /// When the nominated relayed pair has been quiet for too long: see [`pulse`].
    pulse: Option<Instant>,
    /// The selected relay; `None` after it went, until another is found.
    relay: Option<RelayId>,
    relayed: Vec<Relayed>,
    /// Remote candidates as signalled.
    signalled: Vec<(CandidateKind, SocketAddr)>,
    /// Of [`MAX_LINES`].
    lines_left: usize,
    /// Senders of authenticated requests.
    heard: HashSet<SocketAddr, FxBuildHasher>,
    /// The latest of them that came directly: the workers are told.
    heard_from: Arc<[SocketAddr]>,
    /// The workers do not have the latest `heard_from` yet.
    has_news: bool,
    /// Channels this connection asked for and holds.
    channels: HashSet<(RelayId, SocketAddr), FxBuildHasher>,
}

/// One of our relayed candidates.
#[derive(Debug, Clone, Copy)]
struct Relayed {
    addr: SocketAddr,
    relay: RelayId,
    server: SocketAddr,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Connecting,
    Connected { pair: Pair, last_activity: Instant },
    Idle { pair: Pair },
}

/// Why a connection has to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// The portal never delivered a usable candidate.
    NoCandidates,
    /// ICE found no way for 2 s.
    Disconnected,
}

impl Connection {
    /// A new connection on `relay`, with every local candidate signalled.
    pub(super) fn new(
        authorize: &Authorize,
        index: ConnectionIndex,
        tie_breaker: u64,
        relay: RelayId,
        shared: &mut Shared,
        now: Instant,
    ) -> Self {
        let client = &authorize.client;
        let keys = ConnectionKeys {
            index,
            public_key: client.public_key,
            preshared_key: Zeroizing::new(*client.preshared_key.0),
            ufrag: stun_router::first_four(&authorize.gateway_ice, &authorize.client_ice),
        };
        let mut connection = Self {
            client: client.id,
            keys: Arc::new(keys),
            local: authorize.gateway_ice.clone(),
            remote: authorize.client_ice.clone(),
            agent: agent::new(&authorize.gateway_ice, &authorize.client_ice, tie_breaker, now),
            state: State::Connecting,
            nominations: (now, 0),
            candidate_deadline: Some(now + CANDIDATE_TIMEOUT),
            disconnect_deadline: None,
            pulse: None,
            relay: Some(relay),
            relayed: Vec::new(),
            signalled: Vec::new(),
            lines_left: MAX_LINES,
            heard: HashSet::default(),
            heard_from: [].into(),
            has_news: false,
            channels: HashSet::default(),
        };
        agent::set_timing(&mut connection.agent, &agent::ACTIVE);
        shared.router.insert(&connection.local, &connection.remote, connection.client);
        shared.select(relay, connection.client);
        connection.add_known_locals(shared, now);
        shared.relays.check(relay, now);
        connection
    }

    /// The reuse rule of section 5.1.
    pub(super) fn is_reusable_for(&self, authorize: &Authorize) -> bool {
        self.local == authorize.gateway_ice
            && self.remote == authorize.client_ice
            && self.keys.public_key == authorize.client.public_key
            && *self.keys.preshared_key == *authorize.client.preshared_key.0
    }

    /// The connection is authorized again: wakes it, adds what it lacks, signals every local candidate again.
    pub(super) fn renew(&mut self, shared: &mut Shared, now: Instant) {
        self.on_activity(now);
        self.add_known_locals(shared, now);
        // The client may come back because it noticed first.
        self.doubt_relay(shared, now);
        for candidate in self.agent.local_candidates().filter(candidates::is_signalled) {
            shared.signals.add(self.client, candidates::signalled(&candidate));
        }
    }

    /// Lines the portal delivered. Every one is read on its own.
    pub(super) fn add_remote(&mut self, lines: &[String], shared: &mut Shared, now: Instant) {
        for line in lines {
            let candidate = match candidates::remote(line, &self.remote.username) {
                Ok(candidate) => candidate,
                Err(why) => {
                    debug!(client = %self.client, %line, "Ignoring a remote candidate: {why}");
                    continue;
                }
            };
            self.candidate_deadline = None;
            let (kind, addr) = (candidate.kind(), candidate.addr());
            // Nov-2025 clients signal a reflexive candidate that equals the host one, again with every
            // authorization; the agent would pair none of them and keep them all.
            let redundant =
                kind != CandidateKind::Host && self.signalled.contains(&(CandidateKind::Host, addr));
            // One of a family we have no address of is paired with nothing, so the agent would keep every copy.
            let waits = self.signalled.contains(&(kind, addr))
                && !self.agent.local_candidates().any(|c| c.addr().is_ipv4() == addr.is_ipv4());
            if !redundant && !waits {
                if self.lines_left == 0 {
                    debug!(client = %self.client, "Too many remote candidates, ignoring the rest");
                    return;
                }
                let before = self.agent.remote_candidates().count();
                debug!(client = %self.client, ?candidate, "Remote candidate");
                self.agent.add_remote_candidate(candidate);
                // A client repeats its lines with every authorization; the agent keeps few of them twice.
                self.lines_left -= usize::from(self.agent.remote_candidates().count() > before);
            }
            if !self.signalled.contains(&(kind, addr)) {
                self.signalled.push((kind, addr));
            }
            if kind != CandidateKind::Host {
                self.want_channel(addr, Use::Signalled, shared, now);
            }
            for guess in candidates::optimistic(&self.agent) {
                self.agent.add_remote_candidate(guess);
            }
        }
        self.on_activity(now);
    }

    /// Lines that no longer hold.
    pub(super) fn remove_remote(&mut self, lines: &[String], shared: &mut Shared, now: Instant) {
        for line in lines {
            let Ok(candidate) = candidates::remote(line, &self.remote.username) else { continue };
            let (kind, addr) = (candidate.kind(), candidate.addr());
            // The agent looks at its own side first: a peer that sends our lines back must not blind us.
            if self.agent.local_candidates().any(|c| c.addr() == addr && c.kind() == kind) {
                continue;
            }
            debug!(client = %self.client, ?candidate, "Remote candidate is gone");
            self.agent.invalidate_candidate(&candidate);
            self.signalled.retain(|known| *known != (kind, addr));
            self.drop_channel(addr, shared);
        }
        // If the client lost its address on a relay, that relay may be ours, too.
        self.doubt_relay(shared, now);
        self.on_activity(now);
    }

    /// A STUN message routed to us. False if it was not used.
    ///
    /// `via` is the relay's address whose channel carried it, `local` where it arrived otherwise.
    pub(super) fn handle_stun(
        &mut self,
        message: &StunMessage<'_>,
        from: SocketAddr,
        local: SocketAddr,
        via: Option<SocketAddr>,
        shared: &mut Shared,
        now: Instant,
    ) -> bool {
        let destination = match via {
            None => local,
            Some(server) => {
                let ours = |r: &&Relayed| r.server == server && r.addr.is_ipv4() == from.is_ipv4();
                let Some(relayed) = self.relayed.iter().find(ours) else { return false };
                relayed.addr
            }
        };
        let (is_request, nominates) = (message.is_binding_request(), message.use_candidate());
        // The agent would keep a candidate for every port a client sends from.
        if is_request && self.heard.len() >= MAX_HEARD && !self.heard.contains(&from) {
            return false;
        }
        let packet = StunPacket { proto: Protocol::Udp, source: from, destination, message: *message };
        let accepted = self.agent.handle_packet(now, packet);
        if accepted {
            self.heard_on(destination, from, now);
        }
        if accepted && is_request {
            self.heard.insert(from);
            if via.is_none() {
                self.note_address(from);
            }
            if nominates {
                self.take_at_its_word(destination, from, shared, now);
            }
        }
        accepted
    }

    /// The client holds `from`. Its first initiation comes as soon as it has the answer to this check, together with its
    /// nomination; the worker must know whose it is without control.
    fn note_address(&mut self, from: SocketAddr) {
        if self.heard_from.contains(&from) {
            return;
        }
        let surplus = (self.heard_from.len() + 1).saturating_sub(MAX_TOLD);
        self.heard_from = self.heard_from.iter().skip(surplus).copied().chain([from]).collect();
        self.has_news = true;
    }

    /// Relays found a candidate that concerns this connection.
    pub(super) fn add_local(&mut self, found: &LocalCandidate, shared: &mut Shared, now: Instant) {
        let Some(candidate) = candidates::local(found) else { return };
        if let LocalCandidate::Relayed { addr, relay, server, .. } = *found
            && !self.relayed.iter().any(|r| r.addr == addr)
        {
            self.relayed.push(Relayed { addr, relay, server });
            self.want_known_channels(relay, shared, now);
        }
        let known = |c: &Candidate| c.addr() == candidate.addr() && c.kind() == candidate.kind();
        if self.agent.local_candidates().any(|c| known(&c)) {
            return;
        }
        if let Some(added) = self.agent.add_local_candidate(candidate) {
            debug!(client = %self.client, candidate = ?added, "Local candidate");
            shared.signals.add(self.client, candidates::signalled(added));
        }
    }

    /// A relayed candidate no longer holds.
    pub(super) fn remove_local(&mut self, gone: &LocalCandidate, shared: &mut Shared) {
        let LocalCandidate::Relayed { addr, relay, .. } = *gone else { return };
        self.relayed.retain(|r| (r.addr, r.relay) != (addr, relay));
        let known = |c: &Candidate| c.addr() == addr && c.kind() == CandidateKind::Relayed;
        let Some(candidate) = self.agent.local_candidates().find(known) else { return };
        debug!(client = %self.client, ?candidate, "Local candidate is gone");
        self.agent.invalidate_candidate(&candidate);
        shared.signals.remove(self.client, candidates::signalled(&candidate));
    }

    /// The selected relay is gone; [`Connection::migrate`] gives another one as soon as there is one.
    pub(super) fn lose_relay(&mut self, shared: &mut Shared) {
        if let Some(relay) = self.relay.take() {
            shared.deselect(relay, self.client);
            self.let_go(|(on, _)| on == relay, shared);
        }
        shared.orphans.insert(self.client);
    }

    /// Uses `relay` from now on: its candidates are added and signalled.
    pub(super) fn migrate(&mut self, relay: RelayId, shared: &mut Shared, now: Instant) {
        debug!(client = %self.client, %relay, "Migrating to another relay");
        self.relay = Some(relay);
        shared.select(relay, self.client);
        for found in shared.relays.relayed(relay) {
            self.add_local(&found, shared, now);
        }
        self.want_known_channels(relay, shared, now);
        self.on_activity(now);
    }

    /// Application data flowed, or something happened that checks should follow closely.
    pub(super) fn on_activity(&mut self, at: Instant) {
        match &mut self.state {
            State::Connecting => {}
            State::Connected { last_activity, .. } => *last_activity = at.max(*last_activity),
            State::Idle { pair } => {
                self.state = State::Connected { pair: *pair, last_activity: at };
                agent::set_timing(&mut self.agent, &agent::ACTIVE);
                self.expect_pulse(at);
            }
        }
    }

    /// Runs the agent until it has nothing more to do at `now`, and the timers that are due.
    ///
    /// Returns why the connection has to go, if it has.
    pub(super) fn drive(&mut self, shared: &mut Shared, now: Instant) -> Option<Failure> {
        // A nomination takes effect in a tick only, and the next one may be seconds away.
        self.agent.handle_timeout(now);
        for _ in 0..MAX_TICKS {
            self.send_checks(shared, now);
            self.follow_agent(shared, now);
            match self.agent.poll_timeout() {
                Some(at) if at > now => break,
                _ => self.agent.handle_timeout(now),
            }
        }
        self.send_checks(shared, now);
        self.follow_agent(shared, now);
        self.rest_if_quiet(now);
        self.feel_pulse(shared, now);

        let due = |deadline: Option<Instant>| deadline.is_some_and(|at| at <= now);
        if due(self.candidate_deadline) {
            return Some(Failure::NoCandidates);
        }
        due(self.disconnect_deadline).then_some(Failure::Disconnected)
    }

    /// When [`Connection::drive`] is due again.
    pub(super) fn deadline(&mut self) -> Option<Instant> {
        let idle = match self.state {
            State::Connected { last_activity, .. } if self.has_pair() => Some(last_activity + IDLE_AFTER),
            _ => None,
        };
        [self.agent.poll_timeout(), idle, self.pulse, self.candidate_deadline, self.disconnect_deadline]
            .into_iter()
            .flatten()
            .min()
    }

    /// Takes it out of every table that leads here.
    pub(super) fn close(&mut self, shared: &mut Shared) {
        shared.router.remove(&self.local, &self.remote, self.client);
        shared.signals.forget(self.client);
        shared.orphans.remove(&self.client);
        if let Some(relay) = self.relay {
            shared.deselect(relay, self.client);
        }
        if let Some(pair) = self.pair() {
            shared.leave_path(pair.via, pair.remote, self.client);
        }
        self.let_go(|_| true, shared);
    }

    /// What the workers know it by.
    pub(super) fn keys(&self) -> &Arc<ConnectionKeys> {
        &self.keys
    }

    /// Where its checks came from, see [`ClientState::heard_from`](crate::command::ClientState::heard_from).
    pub(super) fn heard_from(&self) -> &Arc<[SocketAddr]> {
        &self.heard_from
    }

    /// Has [`Connection::heard_from`] changed since the last call?
    pub(super) fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.has_news)
    }

    /// Does the agent hold a working pair? Upstream asks for exactly *Connected* and so never rests once every
    /// other pair is pruned (*Completed*).
    fn has_pair(&self) -> bool {
        self.agent.state().is_connected()
    }

    fn rest_if_quiet(&mut self, now: Instant) {
        if let State::Connected { pair, last_activity } = self.state
            && self.has_pair()
            && now.duration_since(last_activity) >= IDLE_AFTER
        {
            self.state = State::Idle { pair };
            agent::set_timing(&mut self.agent, &agent::IDLE);
            self.pulse = None;
        }
    }

    /// Host and reflexive candidates of all relays and the relayed ones of the selected relay, best first: a
    /// reflexive candidate that equals the host one is then seen to be redundant.
    fn add_known_locals(&mut self, shared: &mut Shared, now: Instant) {
        let mut found = shared.relays.host_and_reflexive();
        found.sort_by_key(|c| matches!(c, LocalCandidate::Reflexive { .. }));
        found.extend(self.relay.into_iter().flat_map(|relay| shared.relays.relayed(relay)));
        for candidate in &found {
            self.add_local(candidate, shared, now);
        }
    }

    fn send_checks(&mut self, shared: &mut Shared, now: Instant) {
        while let Some(check) = self.agent.poll_transmit() {
            let payload = Vec::from(check.contents);
            shared.router.sent(&payload, self.client, now);
            self.asked_on(check.source, check.destination, &payload, now);
            let transmit = match self.relayed.iter().find(|r| r.addr == check.source) {
                Some(relayed) => {
                    let relay = relayed.relay;
                    self.hold(relay, check.destination, shared);
                    shared.relays.wrap(relay, check.destination, &payload, now)
                }
                None => Some(Transmit { src: Some(check.source), dst: check.destination, payload }),
            };
            shared.transmits.extend(transmit);
        }
    }

    fn follow_agent(&mut self, shared: &mut Shared, now: Instant) {
        while let Some(event) = self.agent.poll_event() {
            match event {
                IceAgentEvent::IceConnectionStateChange(state) => {
                    debug!(client = %self.client, ?state, "ICE state");
                    // Every other state clears it: upstream forgets Disconnected -> Completed.
                    self.disconnect_deadline = (state == IceConnectionState::Disconnected)
                        .then(|| self.disconnect_deadline.unwrap_or(now + DISCONNECT_GRACE));
                    if state == IceConnectionState::Disconnected {
                        self.doubt_relay(shared, now);
                    }
                }
                IceAgentEvent::NominatedSend { source, destination, .. } => {
                    self.on_nominated(source, destination, true, shared, now);
                }
                IceAgentEvent::IceRestart(_) | IceAgentEvent::DiscoveredRecv { .. } => {}
            }
        }
    }
}

#[cfg(test)]
impl Connection {
    /// Did our own check confirm the nominated pair?
    pub(super) fn is_confirmed(&self) -> bool {
        self.pair().is_some_and(|pair| pair.confirmed)
    }

    pub(super) fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle { .. })
    }

    pub(super) fn relay(&self) -> Option<RelayId> {
        self.relay
    }

    pub(super) fn remotes(&self) -> usize {
        self.agent.remote_candidates().count()
    }
}
