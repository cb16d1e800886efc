//! Which pair a connection sends on: the agent's choice, or the client's word until there is one, and the [`Path`] that
//! comes of it (connections.md sections 5.2 and 6.7).
//!
//! It decides on the pair only; candidates, checks and their timing are the parent's.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use is::{Candidate, CandidateKind};
use tracing::debug;

use super::{Connection, State};
use crate::{
    command::Path,
    control::{candidates, shared::Shared},
    ids::RelayId,
    relay::Use,
};

/// The client nominated other pairs so often, and ours not once for so long: it gave ours up.
const ABANDONED: (u32, Duration) = (4, Duration::from_secs(6));

/// The nominated pair.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    /// The agent's choice. Otherwise it is the client's word alone: see [`Connection::take_at_its_word`].
    pub(super) confirmed: bool,
    priority: u64,
    /// The host or relayed address we send from.
    pub(super) local: SocketAddr,
    /// The relay `local` is on; `None` for a host address.
    pub(super) via: Option<RelayId>,
    pub(super) remote: SocketAddr,
    remote_is_relay: bool,
}

/// Which ends of a path are relays (connections.md section 5.2); also metric labels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PathKind {
    /// No relay at all.
    PeerToPeer,
    /// The client's relay.
    PeerToRelay,
    /// Our relay.
    RelayToPeer,
    /// Both.
    RelayToRelay,
}

impl Connection {
    /// The way to the client, once a pair is nominated; `None` too while its relay has no address to send to.
    pub(in crate::control) fn path(&self, shared: &Shared, now: Instant) -> Option<Path> {
        let Pair { local, via, remote, .. } = self.pair()?;
        let Some(relay) = via else { return Some(Path::Direct { local, remote }) };
        // A path through an allocation that went is none: the relay would drop what we send.
        if !self.relayed.iter().any(|r| r.addr == local) {
            return None;
        }
        match shared.relays.channel(relay, remote, now) {
            Some((server, number)) => Some(Path::Relayed { server, channel: Some(number), remote }),
            None => shared.relays.server(relay).map(|server| Path::Relayed { server, channel: None, remote }),
        }
    }

    /// The kind of the nominated pair.
    pub(in crate::control) fn path_kind(&self) -> Option<PathKind> {
        self.pair().map(|pair| match (pair.via, pair.remote_is_relay) {
            (None, false) => PathKind::PeerToPeer,
            (None, true) => PathKind::PeerToRelay,
            (Some(_), false) => PathKind::RelayToPeer,
            (Some(_), true) => PathKind::RelayToRelay,
        })
    }

    pub(super) fn pair(&self) -> Option<Pair> {
        match self.state {
            State::Connecting => None,
            State::Connected { pair, .. } | State::Idle { pair } => Some(pair),
        }
    }

    /// The client nominates this pair (again).
    ///
    /// "A request with USE-CANDIDATE marks the pair nominated even before our own check succeeded" (section 6.7);
    /// the agent waits for its check, and the client's first handshake would wait with it. So the client's word
    /// counts until the agent makes its first choice, which it alone keeps up to date from then on.
    ///
    /// With one exception: "the client repeats USE-CANDIDATE on every check of the nominated pair" and gives a dead
    /// pair up after 16.5 s, where the agent sends into it for 615 s (section 6.6). So a pair that the client has
    /// ceased to nominate loses to one that it does nominate, until it nominates a better one.
    pub(super) fn take_at_its_word(
        &mut self,
        local: SocketAddr,
        remote: SocketAddr,
        shared: &mut Shared,
        now: Instant,
    ) {
        let ours = |c: &Candidate| matches!(c.kind(), CandidateKind::Host | CandidateKind::Relayed);
        let known = self.agent.local_candidates().any(|c| ours(&c) && c.addr() == local)
            && self.agent.remote_candidates().any(|c| c.addr() == remote);
        if !known {
            return;
        }
        let better = match self.pair() {
            None => true,
            Some(pair) if (pair.local, pair.remote) == (local, remote) => {
                self.nominations = (now, 0);
                false
            }
            // Its allocation is gone, and with it all that was said for it.
            Some(pair) if pair.via.is_some() && !self.relayed.iter().any(|r| r.addr == pair.local) => true,
            Some(pair) => {
                let (last, others) = &mut self.nominations;
                *others = others.saturating_add(1);
                let abandoned = *others >= ABANDONED.0 && now.duration_since(*last) >= ABANDONED.1;
                abandoned || (!pair.confirmed && pair.priority < self.priority(local, remote))
            }
        };
        if better {
            self.on_nominated(local, remote, false, shared, now);
        }
    }

    pub(super) fn on_nominated(
        &mut self,
        local: SocketAddr,
        remote: SocketAddr,
        confirmed: bool,
        shared: &mut Shared,
        now: Instant,
    ) {
        let via = self.relayed.iter().find(|r| r.addr == local).map(|r| r.relay);
        let remote_is_relay =
            self.agent.remote_candidates().any(|c| c.addr() == remote && c.kind() == CandidateKind::Relayed);
        let pair =
            Pair { confirmed, priority: self.priority(local, remote), local, via, remote, remote_is_relay };
        if let Some(old) = self.pair() {
            shared.leave_path(old.via, old.remote, self.client);
        }
        shared.enter_path(via, remote, self.client);
        if let Some(relay) = via {
            self.hold(relay, remote, shared);
            shared.relays.bind(relay, remote, Use::Nominated, now);
        }
        self.nominations = (now, 0);
        debug!(client = %self.client, %local, %remote, relayed = via.is_some(), confirmed, "Pair nominated");
        match &mut self.state {
            State::Connecting => self.state = State::Connected { pair, last_activity: now },
            State::Connected { pair: old, .. } | State::Idle { pair: old } => *old = pair,
        }
        self.expect_pulse(now);
    }

    /// The priority of a pair; the client controls.
    fn priority(&self, local: SocketAddr, remote: SocketAddr) -> u64 {
        let best = |of: &mut dyn Iterator<Item = Candidate>, addr| {
            of.filter(|c| c.addr() == addr).map(|c| c.prio()).max().unwrap_or(0)
        };
        let ours = best(&mut self.agent.local_candidates(), local);
        candidates::pair_priority(best(&mut self.agent.remote_candidates(), remote), ours)
    }
}
