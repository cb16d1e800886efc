//! A small TURN client: one relay (connections.md section 8, relay-dialect.md).
//!
//! Sans IO: datagrams and time come in, datagrams and events go out. Independent of gateway-proto on
//! purpose. It knows nothing of ICE or WireGuard.
//!
//! ```text
//! new -> BINDING to every server -> first success: active -> ALLOCATE (401 -> nonce -> again)
//!     -> allocated: CHANNEL_BIND on demand, REFRESH at half life, BINDING every 25 s
//! ```

mod codec;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use codec::{long_term_key, split_channel_data};
use stun_types::attribute::{ErrorCode, MessageIntegrity, Nonce, Realm, XorMappedAddress};
use stun_types::message::{IntegrityKey, Message, MessageClass, TransactionId};
use stun_types::prelude::AttributeStaticType as _;
use turn_types::attribute::{Lifetime, XorRelayedAddress};
use uuid::Uuid;

/// The realm of every relay (section 4.1).
const REALM: &str = "firezone";
/// First retransmission time-out; each further one is 1.5 times the last (section 8.1).
const FIRST_TIMEOUT: Duration = Duration::from_secs(1);
/// A request that is unanswered for longer has failed (section 8.1).
const BUDGET: Duration = Duration::from_millis(8125);
/// BINDING keep-alive (section 8.6).
const KEEP_ALIVE: Duration = Duration::from_secs(25);
/// RFC 8656 section 12: a channel lives 10 minutes, but its permission only 5; both are renewed by a bind.
const CHANNEL_REFRESH: Duration = Duration::from_secs(240);
/// First channel number (section 8.7).
const FIRST_CHANNEL: u16 = 0x4000;
/// Last channel number that works end to end (relay-dialect.md section 3).
const LAST_CHANNEL: u16 = 0x4FFF;

/// What changed at the relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TurnEvent {
    /// A socket of ours and how the relay sees it.
    Mapped { host: SocketAddr, reflexive: SocketAddr },
    /// Our address on the relay; `local` is the socket the allocation was made from.
    Allocated { relayed: SocketAddr, local: SocketAddr },
    /// All addresses on the relay are gone.
    Lost { relayed: Vec<SocketAddr> },
}

/// What a datagram from the relay turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Received<'a> {
    /// A STUN answer; it has been dealt with.
    Control,
    /// What a peer sent to our relayed address.
    Data { peer: SocketAddr, relayed: SocketAddr, payload: &'a [u8] },
    /// Junk, or ChannelData on a channel that is not ours.
    Dropped,
}

/// One relay.
pub(super) struct Turn {
    servers: Vec<SocketAddr>,
    credentials: Credentials,
    active: Option<Active>,
    mapped: BTreeMap<SocketAddr, SocketAddr>,
    allocation: Option<Allocation>,
    channels: BTreeMap<u16, Channel>,
    by_peer: HashMap<SocketAddr, u16>,
    wanted: Vec<SocketAddr>,
    requests: Vec<Request>,
    next_keep_alive: Option<Instant>,
    rtt: Option<Duration>,
    out: VecDeque<(SocketAddr, Vec<u8>)>,
    events: VecDeque<TurnEvent>,
}

struct Credentials {
    username: String,
    key: IntegrityKey,
    software: String,
    nonce: Option<String>,
    /// Ask without credentials until there is a nonce.
    unsigned: bool,
}

struct Active {
    server: SocketAddr,
    local: SocketAddr,
}

struct Allocation {
    relayed: Vec<SocketAddr>,
    expires: Instant,
    refresh: Instant,
}

struct Channel {
    peer: SocketAddr,
    bound: Option<Instant>,
    refresh: Instant,
    received: bool,
}

/// What was asked and not yet answered.
struct Request {
    what: What,
    server: SocketAddr,
    id: TransactionId,
    bytes: Vec<u8>,
    with_nonce: bool,
    first_sent: Instant,
    timeout: Duration,
    resend: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Binding,
    Allocate,
    /// `false` deletes the allocation.
    Refresh {
        keep: bool,
    },
    Bind {
        number: u16,
        peer: SocketAddr,
    },
}

impl Turn {
    /// Starts with BINDINGs to all server addresses.
    pub(super) fn new(
        servers: Vec<SocketAddr>,
        username: &str,
        password: &str,
        software: &str,
        now: Instant,
    ) -> Self {
        let mut turn = Self {
            servers,
            credentials: Credentials {
                username: username.to_owned(),
                key: long_term_key(username, password),
                software: software.to_owned(),
                nonce: None,
                unsigned: false,
            },
            active: None,
            mapped: BTreeMap::new(),
            allocation: None,
            channels: BTreeMap::new(),
            by_peer: HashMap::new(),
            wanted: Vec::new(),
            requests: Vec::new(),
            next_keep_alive: None,
            rtt: None,
            out: VecDeque::new(),
            events: VecDeque::new(),
        };
        for server in turn.servers.clone() {
            turn.ask(What::Binding, server, now);
        }
        turn
    }

    // ---- getters ------------------------------------------------------------------------------

    /// Is this one of the relay's own addresses?
    pub(super) fn is_server(&self, addr: SocketAddr) -> bool {
        self.servers.contains(&addr)
    }

    /// Our addresses on the relay.
    pub(super) fn relayed(&self) -> &[SocketAddr] {
        self.allocation.as_ref().map_or(&[], |a| &a.relayed)
    }

    /// The socket the allocation was made from.
    pub(super) fn local(&self) -> Option<SocketAddr> {
        self.active.as_ref().map(|a| a.local)
    }

    /// Known (host, reflexive) pairs.
    pub(super) fn mapped(&self) -> impl Iterator<Item = (SocketAddr, SocketAddr)> + '_ {
        self.mapped.iter().map(|(host, reflexive)| (*host, *reflexive))
    }

    /// Round-trip time, once measured.
    pub(super) fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    /// Where and on which channel to send to `peer`: bound, or optimistically while the first bind is open
    /// (section 8.7).
    pub(super) fn channel(&self, peer: SocketAddr) -> Option<(SocketAddr, u16)> {
        let number = *self.by_peer.get(&peer)?;
        Some((self.active.as_ref()?.server, number))
    }

    // ---- what happened ------------------------------------------------------------------------

    /// A datagram from one of the relay's addresses; `local` is the socket it arrived on.
    pub(super) fn handle<'a>(&mut self, local: SocketAddr, datagram: &'a [u8], now: Instant) -> Received<'a> {
        match datagram.first() {
            Some(0x40..=0x4F) => self.handle_channel_data(datagram),
            _ => match Message::from_bytes(datagram) {
                Ok(message) => {
                    self.handle_stun(&message, local, now);
                    Received::Control
                }
                Err(_) => Received::Dropped,
            },
        }
    }

    fn handle_channel_data<'a>(&mut self, datagram: &'a [u8]) -> Received<'a> {
        let Some((number, payload)) = split_channel_data(datagram) else { return Received::Dropped };
        let Some(channel) = self.channels.get_mut(&number).filter(|c| c.bound.is_some()) else {
            return Received::Dropped;
        };
        channel.received = true;
        let peer = channel.peer;
        match self.relayed().iter().find(|r| r.is_ipv4() == peer.is_ipv4()) {
            Some(relayed) => Received::Data { peer, relayed: *relayed, payload },
            None => Received::Dropped,
        }
    }

    fn handle_stun(&mut self, message: &Message<'_>, local: SocketAddr, now: Instant) {
        let Some(nth) = self.requests.iter().position(|r| r.id == message.transaction_id()) else { return };
        let authentic = message.validate_integrity_with_key(&self.credentials.key).is_ok();
        let request = &self.requests[nth];
        match message.class() {
            // Success answers always carry MESSAGE-INTEGRITY, except BINDING (relay-dialect.md section 2).
            MessageClass::Success if authentic || request.what == What::Binding => {
                let request = self.requests.swap_remove(nth);
                self.measure(now - request.first_sent);
                self.succeeded(&request, message, local, now);
            }
            MessageClass::Error => {
                let Ok(code) = message.attribute::<ErrorCode>().map(|e| e.code()) else { return };
                // A 401 or 438 comes without integrity from RFC 8489 servers such as coturn; anything else
                // without it could be forged.
                if authentic || matches!(code, 401 | 438) || !message.has_attribute(MessageIntegrity::TYPE) {
                    let request = self.requests.swap_remove(nth);
                    self.measure(now - request.first_sent);
                    self.failed(&request, code, message, now);
                }
            }
            _ => {}
        }
    }

    fn succeeded(&mut self, request: &Request, message: &Message<'_>, local: SocketAddr, now: Instant) {
        match request.what {
            What::Binding => self.on_binding(request.server, message, local, now),
            What::Allocate => self.on_allocated(message, now),
            What::Refresh { keep } => {
                let lifetime = message.attribute::<Lifetime>().map_or(0, |l| l.seconds());
                match &mut self.allocation {
                    Some(allocation) if keep => {
                        *allocation = Allocation::new(allocation.relayed.clone(), lifetime, now)
                    }
                    _ => self.allocate(now),
                }
            }
            What::Bind { number, peer } => {
                if let Some(channel) = self.channels.get_mut(&number).filter(|c| c.peer == peer) {
                    *channel =
                        Channel { peer, bound: Some(now), refresh: now + CHANNEL_REFRESH, received: false };
                }
            }
        }
    }

    fn on_binding(&mut self, server: SocketAddr, message: &Message<'_>, local: SocketAddr, now: Instant) {
        let id = message.transaction_id();
        let Ok(reflexive) = message.attribute::<XorMappedAddress>().map(|a| a.addr(id)) else { return };
        if self.mapped.insert(local, reflexive) != Some(reflexive) {
            self.events.push_back(TurnEvent::Mapped { host: local, reflexive });
        }
        if self.active.is_none() {
            self.active = Some(Active { server, local });
            self.allocate(now);
        }
    }

    fn on_allocated(&mut self, message: &Message<'_>, now: Instant) {
        let id = message.transaction_id();
        let relayed: Vec<_> = (0..2)
            .filter_map(|n| message.nth_attribute::<XorRelayedAddress>(n).ok())
            .map(|a| a.addr(id))
            .collect();
        let (Ok(lifetime), false, Some(local)) =
            (message.attribute::<Lifetime>(), relayed.is_empty(), self.local())
        else {
            return;
        };
        for relayed in &relayed {
            self.events.push_back(TurnEvent::Allocated { relayed: *relayed, local });
        }
        self.allocation = Some(Allocation::new(relayed, lifetime.seconds(), now));
        self.next_keep_alive = Some(now + KEEP_ALIVE);
        for peer in std::mem::take(&mut self.wanted) {
            self.bind(peer, now);
        }
    }

    fn failed(&mut self, request: &Request, code: u16, message: &Message<'_>, now: Instant) {
        let realm_is_ours = message.attribute::<Realm>().is_ok_and(|r| r.realm() == REALM);
        if let Ok(nonce) = message.attribute::<Nonce>() {
            self.credentials.nonce = Some(nonce.nonce().to_owned());
        }
        match (code, request.what) {
            // A 401 although the nonce was there means that the credentials are wrong (section 8.4).
            (401, _) if request.with_nonce => self.lose(),
            (401 | 438, _) if !realm_is_ours => {}
            (401 | 438, what) => self.ask(what, request.server, now),
            // coturn refuses a signed request that has no nonce; RFC 8489 section 9.2.3 starts without both.
            (400, what) if !request.with_nonce && !self.credentials.unsigned => {
                self.credentials.unsigned = true;
                self.ask(what, request.server, now);
            }
            (437, What::Allocate) => self.ask(What::Refresh { keep: false }, request.server, now),
            (437, What::Bind { peer, .. }) => {
                self.lose();
                self.wanted.push(peer);
                self.allocate(now);
            }
            (437, _) => {
                self.lose();
                self.allocate(now);
            }
            (_, What::Bind { number, peer }) => {
                self.channels.remove(&number);
                self.by_peer.remove(&peer);
            }
            _ => {}
        }
    }

    fn measure(&mut self, sample: Duration) {
        self.rtt = Some(self.rtt.map_or(sample, |rtt| (rtt * 7 + sample) / 8));
    }

    /// Retransmissions, refreshes, keep-alives.
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        self.retransmit(now);
        if self.allocation.as_ref().is_some_and(|a| now >= a.expires) {
            self.lose();
        }
        let Some(server) = self.active.as_ref().map(|a| a.server) else { return };
        if let Some(allocation) = self.allocation.as_mut().filter(|a| now >= a.refresh) {
            allocation.refresh = allocation.expires;
            self.ask(What::Refresh { keep: true }, server, now);
        }
        if self.next_keep_alive.is_some_and(|at| now >= at) {
            self.next_keep_alive = Some(now + KEEP_ALIVE);
            self.ask(What::Binding, server, now);
        }
        let due: Vec<_> = self
            .channels
            .iter_mut()
            .filter(|(_, c)| c.bound.is_some() && c.received && now >= c.refresh)
            .map(|(number, c)| {
                c.refresh = now + CHANNEL_REFRESH;
                What::Bind { number: *number, peer: c.peer }
            })
            .collect();
        for bind in due {
            self.ask(bind, server, now);
        }
    }

    fn retransmit(&mut self, now: Instant) {
        let (due, open): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.requests).into_iter().partition(|r| now >= r.resend);
        self.requests = open;
        let mut active_failed = false;
        for request in due {
            if now >= request.first_sent + BUDGET {
                // Without any answer yet it goes on asking: a relay may be too busy for a while.
                active_failed |= self.active.as_ref().is_none_or(|a| a.server == request.server);
                continue;
            }
            let timeout = request.timeout.mul_f64(1.5);
            let give_up = request.first_sent + BUDGET;
            let mut again = match request.what {
                // BINDING is repeated unchanged, everything else is a fresh copy (section 8.1).
                What::Binding => request,
                what => Request { first_sent: request.first_sent, ..self.build(what, request.server, now) },
            };
            again.timeout = timeout;
            again.resend = (now + timeout).min(give_up);
            self.out.push_back((again.server, again.bytes.clone()));
            self.requests.push(again);
        }
        if active_failed {
            self.lose();
            self.active = None;
            for server in self.servers.clone() {
                self.ask(What::Binding, server, now);
            }
        }
    }

    // ---- orders -------------------------------------------------------------------------------

    /// A connection over this relay has failed: asks whether the allocation is still there.
    pub(super) fn verify(&mut self, now: Instant) {
        let server = self.active.as_ref().map(|active| active.server);
        if let (Some(server), true) = (server, self.allocation.is_some()) {
            self.ask(What::Refresh { keep: true }, server, now);
        }
    }

    /// Wants to exchange datagrams with `peer` through the relay.
    pub(super) fn bind(&mut self, peer: SocketAddr, now: Instant) {
        if self.by_peer.contains_key(&peer) {
            return;
        }
        let (Some(allocation), Some(active)) = (&self.allocation, &self.active) else {
            self.wanted.push(peer);
            return;
        };
        if !allocation.relayed.iter().any(|r| r.is_ipv4() == peer.is_ipv4()) {
            return;
        }
        let server = active.server;
        let Some(number) = (FIRST_CHANNEL..=LAST_CHANNEL).find(|n| !self.channels.contains_key(n)) else {
            return;
        };
        self.channels
            .insert(number, Channel { peer, bound: None, refresh: now + CHANNEL_REFRESH, received: false });
        self.by_peer.insert(peer, number);
        self.ask(What::Bind { number, peer }, server, now);
    }

    /// Gives the allocation back, so that the relay's ports are free again.
    pub(super) fn release(&mut self, now: Instant) {
        if let (Some(active), Some(_)) = (&self.active, &self.allocation) {
            let request = self.build(What::Refresh { keep: false }, active.server, now);
            self.out.push_back((request.server, request.bytes));
        }
        self.requests.clear();
        self.lose();
    }

    // ---- what to do next ----------------------------------------------------------------------

    /// Next datagram and the server it goes to.
    pub(super) fn poll_transmit(&mut self) -> Option<(SocketAddr, Vec<u8>)> {
        self.out.pop_front()
    }

    /// Next change.
    pub(super) fn poll_event(&mut self) -> Option<TurnEvent> {
        self.events.pop_front()
    }

    /// When [`Self::handle_timeout`] has something to do.
    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        let requests = self.requests.iter().map(|r| r.resend);
        let allocation = self.allocation.iter().flat_map(|a| [a.refresh, a.expires]);
        let channels = self.channels.values().filter(|c| c.received).map(|c| c.refresh);
        requests.chain(allocation).chain(channels).chain(self.next_keep_alive).min()
    }

    // ---- helpers ------------------------------------------------------------------------------

    fn allocate(&mut self, now: Instant) {
        if let Some(server) = self.active.as_ref().map(|a| a.server) {
            self.ask(What::Allocate, server, now);
        }
    }

    /// Forgets the allocation with all channels and open requests.
    fn lose(&mut self) {
        if let Some(allocation) = self.allocation.take() {
            self.events.push_back(TurnEvent::Lost { relayed: allocation.relayed });
        }
        self.channels.clear();
        self.by_peer.clear();
        self.requests.clear();
        self.next_keep_alive = None;
    }

    fn ask(&mut self, what: What, server: SocketAddr, now: Instant) {
        let request = self.build(what, server, now);
        self.out.push_back((server, request.bytes.clone()));
        self.requests.push(request);
    }

    fn build(&self, what: What, server: SocketAddr, now: Instant) -> Request {
        let id = TransactionId::generate();
        Request {
            what,
            server,
            id,
            bytes: self.credentials.encode(what, id),
            with_nonce: self.credentials.nonce.is_some(),
            first_sent: now,
            timeout: FIRST_TIMEOUT,
            resend: now + FIRST_TIMEOUT,
        }
    }
}

impl Allocation {
    fn new(relayed: Vec<SocketAddr>, lifetime: u32, now: Instant) -> Self {
        let lifetime = Duration::from_secs(lifetime.into());
        Self { relayed, expires: now + lifetime, refresh: now + lifetime / 2 }
    }
}

/// Names a relay in the client's tables.
pub(super) type RelayId = Uuid;

#[cfg(test)]
mod tests;
