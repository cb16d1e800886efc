//! The TURN client: allocations and channels (connections.md sections 8 and 9, relay-dialect.md).
//!
//! [`Relays`] is the whole of it for control: relays as the portal names them go in, datagrams go in and out, and
//! events say which candidates and channels there are. It does not know connections, ICE or WireGuard.
//!
//! After any `handle_*` or verb drain `poll_transmit` and `poll_event`, then ask `poll_timeout`.
//!
//! | file | holds |
//! |---|---|
//! | `allocation`, `allocation/answers` | the state machine of one relay; what an answer does to it |
//! | `channels` | numbers, lifetimes, who goes without |
//! | `pace` | how many binds at once, and whose is next |
//! | `requests` | what is in flight and when it is repeated |
//! | `codec` | bytes |
//! | `rtt` | which relay is fast enough |
//!
//! A datagram is a relay's if it comes from a relay's server *address*, whatever the port.

use std::{
    collections::VecDeque,
    net::{SocketAddr, SocketAddrV6},
    time::{Duration, Instant},
};

use gateway_common::{Counters, DropReason};
use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    command::{ChannelUse, StunDatagram},
    ids::RelayId,
    portal::messages,
    sink::Transmit,
};

mod allocation;
mod channels;
mod codec;
mod event;
mod pace;
mod requests;
mod rtt;
mod view;

#[cfg(test)]
mod channel_rules;
#[cfg(test)]
mod fixtures;
#[cfg(test)]
mod liveness;
#[cfg(test)]
mod model;
#[cfg(test)]
mod rules;
#[cfg(test)]
pub(crate) mod twin;
#[cfg(test)]
mod world;

pub(crate) use allocation::SILENCE;
use allocation::{Allocation, Out, Server, Servers};
use codec::Credentials;
pub use event::{LocalCandidate, RelayEvent, Use};
pub use view::{RelayState, RelayView};

/// Addresses of removed relays whose late packets are swallowed (connections.md section 9).
const REMEMBERED: usize = 64;
/// [`RelayEvent::NoneLeft`] at most this often: the portal answers it with relays, perhaps the same useless ones.
const NONE_LEFT_EVERY: Duration = Duration::from_secs(5);

/// Every relay the portal gave us.
#[derive(Debug)]
pub struct Relays {
    relays: Vec<Allocation>,
    removed: VecDeque<SocketAddr>,
    /// What the last [`RelayEvent::Servers`] said.
    announced: Vec<SocketAddr>,
    /// Every relay is gone and nobody was told yet.
    none_left_due: Option<Instant>,
    none_left_said: Option<Instant>,
    out: Out,
}

impl Relays {
    /// No relays yet. `seed` feeds transaction ids and the choice among relays: it must not be guessable, because
    /// nothing else authenticates the answer to a BINDING.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            relays: Vec::new(),
            removed: VecDeque::new(),
            announced: Vec::new(),
            none_left_due: None,
            none_left_said: None,
            out: Out {
                rng: StdRng::seed_from_u64(seed),
                transmits: VecDeque::new(),
                events: VecDeque::new(),
                counters: Counters::default(),
            },
        }
    }

    /// How many datagrams wait to be sent, and how many events to be looked at.
    #[must_use]
    pub fn waiting(&self) -> (usize, usize) {
        (self.out.transmits.len(), self.out.events.len())
    }

    /// What the portal says: drops `disconnected`, then merges `connected` (a dual-stack relay is two entries with
    /// one id, anywhere in the list). Relays named in neither are probed with a REFRESH.
    ///
    /// A relay whose address in use and credentials stay as they are keeps its allocation, and so does one that works
    /// and gets credentials under another name: they wait for its end. Otherwise it is replaced
    /// ([`RelayEvent::Gone`] and a new start). An address another relay id held is taken from it.
    pub fn update(&mut self, disconnected: &[RelayId], connected: &[messages::Relay], now: Instant) {
        let had_any = !self.relays.is_empty();
        for id in disconnected {
            self.remove(*id, now);
        }
        let connected = merge(connected);
        for (id, servers) in &connected {
            self.evict_from(servers, *id, now);
            let known = self.relays.iter_mut().find(|relay| relay.id() == *id);
            if known.is_some_and(|relay| relay.adopt(servers, now, &mut self.out)) {
                continue;
            }
            self.remove(*id, now);
            let relay = Allocation::start(*id, servers.clone(), now, &mut self.out);
            self.relays.push(relay);
        }
        for relay in &mut self.relays {
            if connected.iter().all(|(id, _)| *id != relay.id()) {
                relay.probe(now, &mut self.out);
            }
        }
        self.after_change(had_any, now);
    }

    /// A STUN message.
    ///
    /// True if it came from a known or recently removed relay itself: then it is consumed, whatever it held. One that
    /// came in ChannelData (`via`) is between peers, and shows that the relay still knows us.
    pub fn handle_stun(&mut self, datagram: &StunDatagram, now: Instant) -> bool {
        if let Some(server) = datagram.via.map(plain) {
            if let Some(relay) = self.relays.iter_mut().find(|relay| relay.active_server() == Some(server)) {
                relay.on_heard(now);
            }
            return false;
        }
        let from = plain(datagram.from);
        let Some(relay) = self.relays.iter_mut().find(|relay| relay.addresses().any(|addr| addr == from))
        else {
            let removed = self.removed.contains(&from);
            if removed {
                self.out.counters.count(DropReason::RelayUnexpected);
            }
            return removed;
        };
        match codec::decode(&datagram.payload) {
            Ok(Some(answer)) => relay.handle_answer(&answer, from, plain(datagram.local), now, &mut self.out),
            // DATA indications come from servers with permissions (coturn), for peers without a channel.
            Ok(None) => self.out.counters.count(DropReason::RelayUnexpected),
            Err(codec::Malformed) => self.out.counters.count(DropReason::MalformedStun),
        }
        self.collect_dead(now);
        true
    }

    /// The workers' report of channels that carried data.
    pub fn handle_channels_used(&mut self, used: &[ChannelUse], now: Instant) {
        for ChannelUse { server, number, received, sent } in
            used.iter().copied().filter(|u| u.received || u.sent)
        {
            let server = Some(plain(server));
            if let Some(relay) = self.relays.iter_mut().find(|relay| relay.active_server() == server) {
                relay.on_channel_used(number, received, sent, now, &mut self.out);
            }
        }
    }

    /// Nothing comes through the relay where something should, or somebody is about to depend on it: has it forgotten
    /// our allocation? At most one request in 5 s comes of this, however many ask.
    ///
    /// Returns when it is worth to ask again, should the silence last; `None` if the relay is being asked now, or holds
    /// nothing of ours.
    pub fn check(&mut self, relay: RelayId, now: Instant) -> Option<Instant> {
        self.relays.iter_mut().find(|known| known.id() == relay)?.check(now, &mut self.out)
    }

    /// A relay for a new connection, chosen by RTT (connections.md section 9). Relays that answer but refuse an
    /// allocation are chosen only if there is no other.
    pub fn sample(&mut self) -> Option<RelayId> {
        let mut known: Vec<_> =
            self.usable().map(|(relay, rtt)| (relay.id(), rtt, relay.is_suspended())).collect();
        if known.iter().any(|(_, _, suspended)| !suspended) {
            known.retain(|(_, _, suspended)| !suspended);
        }
        let rtts: Vec<_> = known.iter().map(|(_, rtt, _)| *rtt).collect();
        let limit = rtt::limit(&rtts)?;
        known.retain(|(_, rtt, _)| *rtt <= limit);
        let chosen = self.out.rng.random_range(0..known.len());
        known.get(chosen).map(|(id, _, _)| *id)
    }

    /// Has some relay answered?
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.usable().next().is_some()
    }

    /// Host and reflexive candidates of all relays, each once.
    #[must_use]
    pub fn host_and_reflexive(&self) -> Vec<LocalCandidate> {
        let mut all = Vec::new();
        for candidate in self.relays.iter().flat_map(Allocation::host_and_reflexive) {
            if !all.contains(&candidate) {
                all.push(candidate);
            }
        }
        all
    }

    /// The relayed candidates of one relay, at most one per family.
    #[must_use]
    pub fn relayed(&self, relay: RelayId) -> Vec<LocalCandidate> {
        self.get(relay).map(|relay| relay.relayed().collect()).unwrap_or_default()
    }

    /// The relay whose allocation `relayed_addr` is.
    #[must_use]
    pub fn owner_of(&self, relayed_addr: SocketAddr) -> Option<RelayId> {
        let relayed_addr = plain(relayed_addr);
        let owns =
            |candidate| matches!(candidate, LocalCandidate::Relayed { addr, .. } if addr == relayed_addr);
        self.relays.iter().find(|relay| relay.relayed().any(owns)).map(Allocation::id)
    }

    /// Wants a channel to `peer`. Repeating it is free and may raise (never lower) the earlier reason.
    pub fn bind(&mut self, relay: RelayId, peer: SocketAddr, why: Use, now: Instant) {
        if let Some(relay) = self.relays.iter_mut().find(|known| known.id() == relay) {
            relay.bind(plain(peer), why, now, &mut self.out);
        }
    }

    /// No connection wants the channel any more: it is not refreshed and lapses.
    pub fn release(&mut self, relay: RelayId, peer: SocketAddr) {
        if let Some(relay) = self.relays.iter_mut().find(|known| known.id() == relay) {
            relay.release(plain(peer));
        }
    }

    /// The channel to `peer` that data may be sent on now: (server, number).
    #[must_use]
    pub fn channel(&self, relay: RelayId, peer: SocketAddr, now: Instant) -> Option<(SocketAddr, u16)> {
        self.get(relay)?.channel(plain(peer), now)
    }

    /// The relay's address that our requests go to, once one has answered.
    #[must_use]
    pub fn server(&self, relay: RelayId) -> Option<SocketAddr> {
        self.get(relay)?.active_server()
    }

    /// ChannelData around `payload`. Without a sendable channel it starts a bind ([`Use::Checked`]) and the payload
    /// is lost (`None`).
    pub fn wrap(
        &mut self,
        relay: RelayId,
        peer: SocketAddr,
        payload: &[u8],
        now: Instant,
    ) -> Option<Transmit> {
        let peer = plain(peer);
        let Some((server, number)) = self.channel(relay, peer, now) else {
            self.out.counters.count(DropReason::NoChannel);
            self.bind(relay, peer, Use::Checked, now);
            return None;
        };
        let header = gateway_common::channel_data::header(number, payload.len())?;
        let relay = self.relays.iter_mut().find(|known| known.id() == relay)?;
        relay.bind(peer, Use::Checked, now, &mut self.out);
        relay.on_channel_used(number, false, true, now, &mut self.out);
        Some(Transmit { src: None, dst: server, payload: [&header, payload].concat() })
    }

    /// Retransmits, refreshes, expires.
    pub fn handle_timeout(&mut self, now: Instant) {
        for relay in &mut self.relays {
            if relay.poll_timeout().is_some_and(|due| due <= now) {
                relay.handle_timeout(now, &mut self.out);
            }
        }
        self.collect_dead(now);
        self.say_none_left(now);
    }

    /// The next request to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.out.transmits.pop_front()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<RelayEvent> {
        self.out.events.pop_front()
    }

    /// When [`Relays::handle_timeout`] is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.relays.iter().filter_map(Allocation::poll_timeout).chain(self.none_left_due).min()
    }

    /// Smoothed round-trip times of the relays that have answered.
    pub fn rtts(&self) -> impl Iterator<Item = (RelayId, Duration)> + '_ {
        self.relays.iter().filter_map(|relay| Some((relay.id(), relay.rtt()?)))
    }

    /// For who looks.
    #[must_use]
    pub fn views(&self) -> Vec<RelayView> {
        self.relays.iter().map(Allocation::view).collect()
    }

    /// What was dropped, by reason.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.out.counters
    }

    fn get(&self, id: RelayId) -> Option<&Allocation> {
        self.relays.iter().find(|relay| relay.id() == id)
    }

    fn usable(&self) -> impl Iterator<Item = (&Allocation, Duration)> + '_ {
        let active = self.relays.iter().filter(|relay| relay.active_server().is_some());
        active.filter_map(|relay| Some((relay, relay.rtt()?)))
    }

    /// One address is one server: whoever the portal names last has it (a relay that restarts gets a new id).
    fn evict_from(&mut self, servers: &Servers, new: RelayId, now: Instant) {
        let taken =
            |relay: &Allocation| servers.iter().flatten().any(|s| relay.addresses().any(|a| a == s.addr));
        let evicted: Vec<_> =
            self.relays.iter().filter(|r| r.id() != new && taken(r)).map(Allocation::id).collect();
        for id in evicted {
            self.remove(id, now);
        }
    }

    fn remove(&mut self, id: RelayId, now: Instant) {
        let Some(at) = self.relays.iter().position(|relay| relay.id() == id) else { return };
        let mut relay = self.relays.remove(at);
        relay.invalidate(now, &mut self.out);
        for addr in relay.addresses() {
            if self.removed.len() == REMEMBERED {
                self.removed.pop_front();
            }
            self.removed.push_back(addr);
        }
        self.out.events.push_back(RelayEvent::Gone(id));
    }

    /// Frees relays that nothing more will come of.
    fn collect_dead(&mut self, now: Instant) {
        let had_any = !self.relays.is_empty();
        let dead: Vec<_> = self.relays.iter().filter(|relay| relay.is_dead()).map(Allocation::id).collect();
        if dead.is_empty() {
            return;
        }
        for id in dead {
            tracing::info!(relay = %id, "Relay is gone");
            self.remove(id, now);
        }
        self.after_change(had_any, now);
    }

    fn after_change(&mut self, had_any: bool, now: Instant) {
        let mut servers: Vec<_> = self.relays.iter().flat_map(Allocation::addresses).collect();
        servers.sort_unstable();
        servers.dedup();
        // The ring holds each address once, and none that is in use.
        self.removed.retain(|addr| !servers.contains(addr));
        if servers != self.announced {
            self.out.events.push_back(RelayEvent::Servers(servers.as_slice().into()));
            self.announced = servers;
        }
        if !self.relays.is_empty() {
            self.none_left_due = None;
        } else if had_any {
            let earliest = self.none_left_said.map_or(now, |said| said + NONE_LEFT_EVERY);
            self.none_left_due = Some(earliest.max(now));
            self.say_none_left(now);
        }
    }

    fn say_none_left(&mut self, now: Instant) {
        if self.none_left_due.take_if(|due| *due <= now).is_some() {
            self.none_left_said = Some(now);
            self.out.events.push_back(RelayEvent::NoneLeft);
        }
    }
}

/// The portal's entries by relay. Of two entries for one family the later counts.
fn merge(entries: &[messages::Relay]) -> Vec<(RelayId, Servers)> {
    let mut merged: Vec<(RelayId, Servers)> = Vec::new();
    for entry in entries {
        let addr = plain(entry.addr);
        let credentials = Credentials::new(&entry.username, &entry.password.0);
        let (Some(credentials), true) = (credentials, codec::usable(&addr)) else {
            tracing::warn!(relay = %entry.id, "The portal sent a relay with an unusable address or user name; ignored");
            continue;
        };
        let server = Some(Server { addr, credentials });
        match merged.iter_mut().find(|(id, _)| *id == entry.id) {
            Some((_, servers)) => servers[codec::family(addr)] = server,
            None => {
                let mut servers = [None, None];
                servers[codec::family(addr)] = server;
                merged.push((entry.id, servers));
            }
        }
    }
    merged
}

/// Without flow label and scope: they are no part of who somebody is.
fn plain(addr: SocketAddr) -> SocketAddr {
    match addr {
        SocketAddr::V4(_) => addr,
        SocketAddr::V6(v6) => SocketAddrV6::new(*v6.ip(), v6.port(), 0, 0).into(),
    }
}
