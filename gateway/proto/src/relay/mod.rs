//! The TURN client: allocations and channels (connections.md sections 8 and 9, relay-dialect.md).
//!
//! [`Relays`] is the whole of it for control: relays as the portal names them go in, datagrams go in and out, and
//! events say which candidates and channels there are. It does not know connections, ICE or WireGuard.
//!
//! After any `handle_*` or verb drain `poll_transmit` and `poll_event`, then ask `poll_timeout`.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    time::{Duration, Instant},
};

use gateway_common::Counters;

use crate::{
    command::{ChannelUse, StunDatagram},
    ids::RelayId,
    portal::messages,
    sink::Transmit,
};

mod event;

pub use event::{LocalCandidate, RelayEvent, Use};

/// Every relay the portal gave us.
#[derive(Debug)]
pub struct Relays {
    servers: Vec<(SocketAddr, RelayId)>,
    events: VecDeque<RelayEvent>,
    transmits: VecDeque<Transmit>,
    counters: Counters,
}

impl Relays {
    /// No relays yet. `seed` feeds transaction ids and the choice among relays.
    #[must_use]
    pub fn new(_seed: u64) -> Self {
        Self {
            servers: Vec::new(),
            events: VecDeque::new(),
            transmits: VecDeque::new(),
            counters: Counters::default(),
        }
    }

    /// What the portal says: drops `disconnected`, then merges `connected` (a dual-stack relay is two entries with
    /// one id, anywhere in the list). Relays named in neither are probed with a REFRESH.
    pub fn update(&mut self, disconnected: &[RelayId], connected: &[messages::Relay], _now: Instant) {
        let before = self.servers.clone();
        self.servers.retain(|(_, id)| !disconnected.contains(id));
        self.servers.extend(connected.iter().map(|r| (r.addr, r.id)));
        self.servers.sort_unstable();
        self.servers.dedup();
        if before != self.servers {
            self.events.push_back(RelayEvent::Servers(self.servers.iter().map(|(addr, _)| *addr).collect()));
        }
    }

    /// A STUN message that came without ChannelData around it (`via` is `None`).
    ///
    /// True if it came from a known or recently removed relay: then it is consumed, whatever it held.
    pub fn handle_stun(&mut self, datagram: &StunDatagram, _now: Instant) -> bool {
        datagram.via.is_none() && self.servers.iter().any(|(addr, _)| *addr == datagram.from)
    }

    /// The workers' report of channels that carried data.
    pub fn handle_channels_used(&mut self, _used: &[ChannelUse], _now: Instant) {}

    /// A relay for a new connection, chosen by RTT (connections.md section 9).
    pub fn sample(&mut self) -> Option<RelayId> {
        None
    }

    /// Has some relay answered?
    #[must_use]
    pub fn is_usable(&self) -> bool {
        false
    }

    /// Host and reflexive candidates of all relays, each once.
    #[must_use]
    pub fn host_and_reflexive(&self) -> Vec<LocalCandidate> {
        Vec::new()
    }

    /// The relayed candidates of one relay, at most one per family.
    #[must_use]
    pub fn relayed(&self, _relay: RelayId) -> Vec<LocalCandidate> {
        Vec::new()
    }

    /// The relay whose allocation `relayed_addr` is.
    #[must_use]
    pub fn owner_of(&self, _relayed_addr: SocketAddr) -> Option<RelayId> {
        None
    }

    /// Wants a channel to `peer`. Repeating it is free and may raise (never lower) the earlier reason.
    pub fn bind(&mut self, _relay: RelayId, _peer: SocketAddr, _why: Use, _now: Instant) {}

    /// No connection wants the channel any more: it is not refreshed and lapses.
    pub fn release(&mut self, _relay: RelayId, _peer: SocketAddr) {}

    /// The channel to `peer` that data may be sent on now: (server, number).
    #[must_use]
    pub fn channel(&self, _relay: RelayId, _peer: SocketAddr, _now: Instant) -> Option<(SocketAddr, u16)> {
        None
    }

    /// The relay's address that our requests go to, once one has answered.
    #[must_use]
    pub fn server(&self, _relay: RelayId) -> Option<SocketAddr> {
        None
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
        let Some((server, number)) = self.channel(relay, peer, now) else {
            self.bind(relay, peer, Use::Checked, now);
            return None;
        };
        let header = gateway_common::channel_data::header(number, payload.len())?;
        Some(Transmit { src: None, dst: server, payload: [&header, payload].concat() })
    }

    /// Retransmits, refreshes, expires.
    pub fn handle_timeout(&mut self, _now: Instant) {}

    /// The next request to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<RelayEvent> {
        self.events.pop_front()
    }

    /// When [`Relays::handle_timeout`] is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        None
    }

    /// Smoothed round-trip times of the relays that have answered.
    pub fn rtts(&self) -> impl Iterator<Item = (RelayId, Duration)> + '_ {
        std::iter::empty()
    }

    /// What was dropped, by reason.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}
