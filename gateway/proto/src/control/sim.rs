//! A small internet in memory: our [`Control`], a client, relays, routers that translate addresses, fake time.
//!
//! ```text
//!  client --[Nat?]--+                       +--[Nat?]-- gateway (Control + the worker's demultiplexer)
//!  10.0.0.2         |       the internet    |           10.9.0.2
//!                   +--- link: latency, ----+
//!                        loss, mtu     |
//!                                    relays (twins of relay/twin.rs), 203.0.113.x:3478
//! portal: carries egress and ingress with its own latency; can be away
//! ```
//!
//! The client is the ICE library's controlling agent with a TURN client of its own. It knows nothing of [`Control`]
//! but what is on the wire.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use ipnet::IpNet;
use is::{Candidate, IceAgent, IceAgentEvent, IceConnectionState, IceCreds, Protocol, stun};
use rand::{Rng, SeedableRng, rngs::StdRng};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::{Config, Control, Event};
use crate::{
    addr::TunnelAddrs,
    command::{ChannelUse, ClientState, Command, Connection, Path, StunDatagram, WorkerEvent},
    ids::{ClientId, ConnectionIndex, RelayId, ResourceId},
    portal::messages::{
        Authorize, ClientIdentity, Egress, IceCredentials, Ingress, Init, Key, Resource, ResourceKind,
        UnixSeconds,
    },
    relay::{
        LocalCandidate, RelayEvent, Relays, Use,
        twin::{Flavor, Packet, Twin},
    },
    sink::Transmit,
};

/// The wall clock at the start of every simulation.
pub(super) const UNIX_START: u64 = 1_795_000_000;
const RELAY_PORT: u16 = 3478;

/// What every datagram passes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    pub(super) latency: Duration,
    /// One in so many is lost; 0 is none.
    pub(super) loses_one_in: u32,
    /// The longest UDP payload.
    pub(super) mtu: usize,
}

/// A translating router in front of a peer.
#[derive(Debug)]
pub(super) struct Nat {
    kind: NatKind,
    outside: SocketAddr,
    /// (inside, far end or nobody in particular) -> outside port, and which far ends it has sent to.
    mappings: BTreeMap<(SocketAddr, Option<SocketAddr>), u16>,
    opened: HashSet<(u16, SocketAddr)>,
    next_port: u16,
}

/// RFC 4787's two extremes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NatKind {
    /// One mapping for all destinations, filtered by address and port.
    Cone,
    /// A mapping for each destination.
    Symmetric,
}

impl Nat {
    pub(super) fn new(kind: NatKind, outside: &str) -> Self {
        Self {
            kind,
            outside: SocketAddr::new(outside.parse().unwrap(), 0),
            mappings: BTreeMap::new(),
            opened: HashSet::new(),
            next_port: 40_000,
        }
    }

    fn outbound(&mut self, packet: &mut Packet) {
        let far = (self.kind == NatKind::Symmetric).then_some(packet.dst);
        let port = *self.mappings.entry((packet.src, far)).or_insert_with(|| {
            self.next_port += 1;
            self.next_port
        });
        self.opened.insert((port, packet.dst));
        packet.src = SocketAddr::new(self.outside.ip(), port);
    }

    /// False if nothing lets it in.
    fn inbound(&self, packet: &mut Packet) -> bool {
        let port = packet.dst.port();
        let inside =
            self.mappings.iter().find(|(_, mapped)| **mapped == port).map(|((inside, _), _)| *inside);
        match inside {
            Some(inside) if self.opened.contains(&(port, packet.src)) => {
                packet.dst = inside;
                true
            }
            _ => false,
        }
    }
}

/// Which side of the picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Gateway,
}

/// On its way.
#[derive(Debug)]
enum Arrival {
    Datagram(Packet),
    ToGateway(Box<Ingress>),
    ToClient(Egress),
}

/// The whole picture.
pub(super) struct World {
    pub(super) now: Instant,
    pub(super) start: Instant,
    pub(super) link: Link,
    pub(super) portal_latency: Duration,
    pub(super) portal_is_up: bool,
    /// No datagram between client and gateway but through a relay.
    pub(super) direct_is_blocked: bool,
    pub(super) gateway: Control,
    pub(super) client: Client,
    pub(super) twins: Vec<(RelayId, Twin)>,
    /// Every datagram the gateway sent, before any translation.
    pub(super) sent: Vec<(Instant, Packet)>,
    /// What the gateway told the portal.
    pub(super) said: Vec<Egress>,
    pub(super) events: Vec<Event>,
    /// The last state of each client that a worker was told.
    pub(super) states: HashMap<ClientId, Option<Arc<ClientState>>>,
    channels: HashMap<(SocketAddr, u16), SocketAddr>,
    relay_servers: Arc<[SocketAddr]>,
    gateway_hosts: Vec<SocketAddr>,
    client_nat: Option<Nat>,
    gateway_nat: Option<Nat>,
    on_the_way: BTreeMap<(Instant, u64), Arrival>,
    sequence: u64,
    rng: StdRng,
    /// Turns of [`World::step`]: an endless loop at one instant is a fault, too.
    steps: usize,
}

/// The client.
pub(super) struct Client {
    pub(super) id: ClientId,
    pub(super) agent: IceAgent,
    relays: Relays,
    relay: RelayId,
    hosts: Vec<SocketAddr>,
    relayed: Vec<SocketAddr>,
    channels: HashMap<(SocketAddr, u16), SocketAddr>,
    /// Its local candidates as it signals them.
    pub(super) signalled: Vec<String>,
    to_signal: Vec<String>,
    out: Vec<Transmit>,
    /// What reached it that is neither STUN nor TURN.
    pub(super) inbox: Vec<Vec<u8>>,
    pub(super) nominated: Option<(SocketAddr, SocketAddr)>,
    /// Told to start by the gateway's acknowledgement.
    pub(super) authorized: usize,
    started: bool,
    silent: bool,
}

impl World {
    /// One IPv4 client and gateway without translation, `relays` IPv4 relays, 5 ms everywhere, the portal connected
    /// and `init` delivered.
    pub(super) fn new(start: Instant, relays: u8) -> Self {
        Self::with_nats(start, relays, None, None)
    }

    pub(super) fn with_nats(
        start: Instant,
        relays: u8,
        client_nat: Option<Nat>,
        gateway_nat: Option<Nat>,
    ) -> Self {
        let mut world = Self::bare(start, relays, client_nat, gateway_nat);
        world.gateway.handle_portal_connected(start);
        let init = world.init(Some(Vec::new()));
        world.ingress(Ingress::Init(Box::new(init)));
        world.client_starts();
        world
    }

    /// Like [`World::new`], before anything happened.
    pub(super) fn bare(
        start: Instant,
        relays: u8,
        client_nat: Option<Nat>,
        gateway_nat: Option<Nat>,
    ) -> Self {
        let unix_now = Duration::from_secs(UNIX_START);
        let twins: Vec<_> = (1..=relays)
            .map(|n| {
                let listen = [SocketAddr::from(([203, 0, 113, n], RELAY_PORT))];
                (RelayId(Uuid::from_u128(n.into())), Twin::new(Flavor::Firezone, &listen, n.into()))
            })
            .collect();
        let client_host: SocketAddr =
            if client_nat.is_some() { "10.0.0.2:52625" } else { "192.0.2.2:52625" }.parse().unwrap();
        let gateway_host: SocketAddr =
            if gateway_nat.is_some() { "10.9.0.2:52625" } else { "198.51.100.2:52625" }.parse().unwrap();
        Self {
            now: start,
            start,
            link: Link { latency: Duration::from_millis(5), loses_one_in: 0, mtu: 1316 },
            portal_latency: Duration::from_millis(3),
            portal_is_up: true,
            direct_is_blocked: false,
            gateway: Control::new(Config { seed: 1, unix_now, now: start }),
            client: Client::new(client_host, start),
            twins,
            sent: Vec::new(),
            said: Vec::new(),
            events: Vec::new(),
            states: HashMap::new(),
            channels: HashMap::new(),
            relay_servers: Arc::default(),
            gateway_hosts: vec![gateway_host],
            client_nat,
            gateway_nat,
            on_the_way: BTreeMap::new(),
            sequence: 0,
            rng: StdRng::seed_from_u64(3),
            steps: 0,
        }
    }

    /// An `init` that lists every relay.
    pub(super) fn init(
        &self,
        authorizations: Option<Vec<crate::portal::messages::AuthorizationRef>>,
    ) -> Init {
        Init {
            interface: TunnelAddrs { v4: [100, 64, 1, 1].into(), v6: "fd00:2021:1111::1:1".parse().unwrap() },
            account_slug: None,
            relays: self.twins.iter().flat_map(|(id, twin)| twin.entries(*id)).collect(),
            authorizations,
            flow_logs: None,
        }
    }

    /// The client's TURN client starts with the first relay.
    fn client_starts(&mut self) {
        if let Some((id, twin)) = self.twins.first() {
            self.client.relay = *id;
            self.client.relays.update(&[], &twin.entries(*id), self.now);
        }
        self.after_anything();
    }

    /// The portal says it now.
    pub(super) fn ingress(&mut self, message: Ingress) {
        self.gateway.handle_ingress(message, self.now);
        self.after_anything();
    }

    /// The portal's answer to a client that asks for a resource.
    pub(super) fn authorize(&mut self, resource: u128) {
        let authorize = self.client.authorize(resource, None);
        self.ingress(Ingress::Authorize(Box::new(authorize)));
    }

    pub(super) fn worker_event(&mut self, event: WorkerEvent) {
        self.gateway.handle_worker_event(event, self.now);
        self.after_anything();
    }

    pub(super) fn portal_goes(&mut self) {
        self.portal_is_up = false;
        self.gateway.handle_portal_disconnected(self.now);
        self.after_anything();
    }

    pub(super) fn portal_returns(&mut self) {
        self.portal_is_up = true;
        self.gateway.handle_portal_connected(self.now);
        self.after_anything();
    }

    /// Lets time pass.
    pub(super) fn run(&mut self, duration: Duration) {
        let until = self.now + duration;
        while self.step(until) {}
        self.now = until;
    }

    /// Lets time pass until `condition` holds; how long it took.
    pub(super) fn run_until(
        &mut self,
        what: &str,
        limit: Duration,
        condition: impl Fn(&Self) -> bool,
    ) -> Duration {
        let began = self.now;
        while !condition(self) {
            assert!(self.step(began + limit), "not within {limit:?}: {what}\n{self:#?}");
        }
        self.now - began
    }

    /// What the workers believe about the client's way.
    pub(super) fn path(&self) -> Option<Path> {
        match self.state()?.connection {
            Connection::Absent => None,
            Connection::Present(_, path) => path,
        }
    }

    pub(super) fn index(&self) -> Option<ConnectionIndex> {
        match &self.state()?.connection {
            Connection::Absent => None,
            Connection::Present(keys, _) => Some(keys.index),
        }
    }

    pub(super) fn state(&self) -> Option<&ClientState> {
        self.states.get(&self.client.id)?.as_deref()
    }

    /// Both sides agree on a way, and it carries data.
    pub(super) fn is_connected(&self) -> bool {
        let sendable = match self.path() {
            Some(Path::Direct { .. }) => true,
            Some(Path::Relayed { channel, .. }) => channel.is_some(),
            None => false,
        };
        sendable && self.client.nominated.is_some() && self.gateway_pair_is_confirmed()
    }

    fn gateway_pair_is_confirmed(&self) -> bool {
        self.gateway.connection(self.client.id).is_some_and(|c| c.is_confirmed())
    }

    /// Sends `payload` the way a worker would; does it reach the client?
    pub(super) fn reaches_the_client(&mut self, payload: &[u8]) -> bool {
        let transmit = match self.path() {
            Some(Path::Direct { local, remote }) => {
                Transmit { src: Some(local), dst: remote, payload: payload.to_vec() }
            }
            Some(Path::Relayed { server, channel: Some(number), .. }) => {
                let header = gateway_common::channel_data::header(number, payload.len()).unwrap();
                Transmit { src: None, dst: server, payload: [&header, payload].concat() }
            }
            _ => return false,
        };
        self.transmit(Side::Gateway, transmit);
        self.run(self.link.latency * 4);
        self.client.inbox.iter().any(|got| got == payload)
    }

    /// The relay the gateway's connection uses.
    fn selected(&self) -> RelayId {
        self.gateway.connection(self.client.id).and_then(|c| c.relay()).unwrap()
    }

    fn has_relay(&self) -> bool {
        self.gateway.connection(self.client.id).is_some_and(|c| c.relay().is_some())
    }

    /// One thing happens, at `until` at the latest; false if nothing does before.
    fn step(&mut self, until: Instant) -> bool {
        self.steps += 1;
        assert!(self.steps < 200_000, "something is due all the time\n{self:#?}");
        let arrival = self.on_the_way.keys().next().map(|(at, _)| *at);
        let due =
            [arrival, self.gateway.poll_timeout(), self.client.poll_timeout()].into_iter().flatten().min();
        let Some(at) = due.filter(|at| *at <= until) else { return false };
        self.now = self.now.max(at);
        let arrived = arrival.filter(|at| *at <= self.now).and_then(|_| self.on_the_way.pop_first());
        match arrived.map(|(_, arrival)| arrival) {
            Some(Arrival::Datagram(packet)) => self.deliver(packet),
            Some(Arrival::ToGateway(message)) if self.portal_is_up => {
                self.gateway.handle_ingress(*message, self.now);
            }
            Some(Arrival::ToClient(message)) if self.portal_is_up => self.client.hears(message, self.now),
            Some(Arrival::ToGateway(_) | Arrival::ToClient(_)) => {}
            None => {
                self.gateway.handle_timeout(self.now);
                self.client.handle_timeout(self.now);
            }
        }
        self.after_anything();
        true
    }

    fn after_anything(&mut self) {
        while let Some(command) = self.gateway.poll_command() {
            match command {
                Command::Client { id, desired } => {
                    self.states.insert(id, desired);
                }
                Command::Channel { server, number, peer: Some(peer) } => {
                    self.channels.insert((server, number), peer);
                }
                Command::Channel { server, number, peer: None } => {
                    self.channels.remove(&(server, number));
                }
                Command::Relays(servers) => self.relay_servers = servers,
                Command::OwnAddrs(_) | Command::Shutdown => {}
            }
        }
        while let Some(transmit) = self.gateway.poll_transmit() {
            self.transmit(Side::Gateway, transmit);
        }
        while let Some(egress) = self.gateway.poll_egress() {
            self.said.push(egress.clone());
            self.later(self.portal_latency, Arrival::ToClient(egress));
        }
        while let Some(event) = self.gateway.poll_event() {
            self.events.push(event);
        }
        while let Some(transmit) = self.client.poll_transmit() {
            self.transmit(Side::Client, transmit);
        }
        let lines = std::mem::take(&mut self.client.to_signal);
        if !lines.is_empty() {
            let message = Ingress::IceCandidates(self.client.id, lines);
            self.later(self.portal_latency, Arrival::ToGateway(Box::new(message)));
        }
        // Whatever was done, nothing may be left to say.
        assert!(self.gateway.poll_command().is_none());
    }

    fn transmit(&mut self, from: Side, transmit: Transmit) {
        let (hosts, nat) = match from {
            Side::Client => (&self.client.hosts, &mut self.client_nat),
            Side::Gateway => (&self.gateway_hosts, &mut self.gateway_nat),
        };
        let family = |addr: &&SocketAddr| addr.is_ipv4() == transmit.dst.is_ipv4();
        let Some(src) = transmit.src.or_else(|| hosts.iter().find(family).copied()) else { return };
        assert!(hosts.contains(&src), "sent from {src}, which is not ours");
        let mut packet = Packet { src, dst: transmit.dst, payload: transmit.payload };
        if from == Side::Gateway {
            self.sent.push((self.now, packet.clone()));
        }
        if let Some(nat) = nat {
            nat.outbound(&mut packet);
        }
        self.launch(packet);
    }

    fn launch(&mut self, packet: Packet) {
        let lost = self.link.loses_one_in > 0 && self.rng.random_ratio(1, self.link.loses_one_in);
        if !lost && packet.payload.len() <= self.link.mtu {
            self.later(self.link.latency, Arrival::Datagram(packet));
        }
    }

    fn later(&mut self, latency: Duration, arrival: Arrival) {
        self.sequence += 1;
        self.on_the_way.insert((self.now + latency, self.sequence), arrival);
    }

    fn deliver(&mut self, mut packet: Packet) {
        let now = self.now;
        if let Some((_, twin)) = self.twins.iter_mut().find(|(_, twin)| twin.owns(packet.dst)) {
            for answer in twin.handle(&packet, now) {
                self.launch(answer);
            }
            return;
        }
        let from_relay = self.twins.iter().any(|(_, twin)| twin.owns(packet.src));
        if self.direct_is_blocked && !from_relay {
            return;
        }
        for side in [Side::Client, Side::Gateway] {
            let (hosts, nat) = match side {
                Side::Client => (&self.client.hosts, &self.client_nat),
                Side::Gateway => (&self.gateway_hosts, &self.gateway_nat),
            };
            let mine = match nat {
                Some(nat) => packet.dst.ip() == nat.outside.ip() && nat.inbound(&mut packet),
                None => hosts.contains(&packet.dst),
            };
            if mine {
                match side {
                    Side::Client => self.client.receives(&packet, now),
                    Side::Gateway => self.gateway_receives(packet),
                }
                return;
            }
        }
    }

    /// The worker's part: takes ChannelData apart and hands STUN on.
    fn gateway_receives(&mut self, packet: Packet) {
        let Packet { src, dst, payload } = packet;
        let stun = match gateway_common::channel_data::parse(&payload) {
            Some(data) => {
                if !self.relay_servers.contains(&src) {
                    return;
                }
                let Some(peer) = self.channels.get(&(src, data.number)).copied() else { return };
                let used = ChannelUse { server: src, number: data.number, received: true, sent: false };
                self.gateway.handle_worker_event(WorkerEvent::ChannelsUsed(vec![used]), self.now);
                StunDatagram { local: dst, from: peer, via: Some(src), payload: data.payload.to_vec() }
            }
            None => StunDatagram { local: dst, from: src, via: None, payload },
        };
        if gateway_common::classify(&stun.payload) == gateway_common::PayloadKind::Stun {
            self.gateway.handle_worker_event(WorkerEvent::Stun(stun), self.now);
        }
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("World")
            .field("elapsed", &(self.now - self.start))
            .field("status", &self.gateway.status())
            .field("counters", &self.gateway.counters().iter().collect::<Vec<_>>())
            .field("states", &self.states)
            .field("said", &self.said)
            .field("client_nominated", &self.client.nominated)
            .field("client_state", &self.client.agent.state())
            .field("client_remotes", &self.client.agent.remote_candidates().collect::<Vec<_>>())
            .field("client_nat", &self.client_nat)
            .field("gateway_nat", &self.gateway_nat)
            .finish_non_exhaustive()
    }
}

impl Client {
    fn new(host: SocketAddr, now: Instant) -> Self {
        let creds = |c: IceCredentials| IceCreds { ufrag: c.username, pass: c.password.to_string() };
        let (gateway, client) = credentials();
        let mut agent = IceAgent::new(creds(client));
        agent.set_remote_credentials(creds(gateway));
        agent.set_controlling(true);
        agent.set_timing_advance(Duration::ZERO);
        // "HEAD client active" (connections.md section 6.6).
        agent.set_max_stun_retransmits(12);
        agent.set_max_stun_rto(Duration::from_millis(1500));
        agent.handle_timeout(now);
        Self {
            id: ClientId(Uuid::from_u128(0xC)),
            agent,
            relays: Relays::new(99),
            relay: RelayId(Uuid::nil()),
            hosts: vec![host],
            relayed: Vec::new(),
            channels: HashMap::new(),
            signalled: Vec::new(),
            to_signal: Vec::new(),
            out: Vec::new(),
            inbox: Vec::new(),
            nominated: None,
            authorized: 0,
            started: false,
            silent: false,
        }
    }

    /// What the portal tells the gateway when this client asks for `resource`.
    pub(super) fn authorize(&self, resource: u128, expires_at: Option<u64>) -> Authorize {
        let (gateway_ice, client_ice) = credentials();
        Authorize {
            reference: format!("ref-{resource}"),
            resource: resource_of(resource),
            client: ClientIdentity {
                id: self.id,
                public_key: [7; 32],
                preshared_key: Key(Zeroizing::new([9; 32])),
                tunnel: TunnelAddrs {
                    v4: [100, 64, 2, 2].into(),
                    v6: "fd00:2021:1111::2:2".parse().unwrap(),
                },
            },
            client_ice,
            gateway_ice,
            expires_at: expires_at.map(UnixSeconds),
            use_iceless: false,
            flow_logs_ingest_token: None,
        }
    }

    /// Takes back a candidate: the line, for the portal.
    pub(super) fn withdraws(&mut self, kind: is::CandidateKind) -> String {
        let candidate = self.agent.local_candidates().find(|c| c.kind() == kind).unwrap();
        self.agent.invalidate_candidate(&candidate);
        candidate.to_sdp_string()
    }

    /// It neither signals nor checks nor answers any more.
    pub(super) fn falls_silent(&mut self) {
        self.silent = true;
    }

    fn hears(&mut self, message: Egress, now: Instant) {
        if self.silent {
            return;
        }
        match message {
            Egress::Authorized { .. } => {
                self.authorized += 1;
                if !std::mem::replace(&mut self.started, true) {
                    let mut known = self.relays.host_and_reflexive();
                    known.extend(self.relays.relayed(self.relay));
                    known.iter().for_each(|candidate| self.adds(candidate));
                }
            }
            Egress::BroadcastIceCandidates(_, lines) => {
                for line in lines {
                    let candidate = Candidate::from_sdp_string(&line).unwrap();
                    if candidate.kind() != is::CandidateKind::Host {
                        self.relays.bind(self.relay, candidate.addr(), Use::Signalled, now);
                    }
                    self.agent.add_remote_candidate(candidate);
                }
            }
            Egress::BroadcastInvalidatedIceCandidates(_, lines) => {
                for line in lines {
                    self.agent.invalidate_candidate(&Candidate::from_sdp_string(&line).unwrap());
                }
            }
            Egress::NoRelays => {}
        }
        self.drive(now);
    }

    fn adds(&mut self, found: &LocalCandidate) {
        let candidate = match *found {
            LocalCandidate::Host(addr) => Candidate::host(addr, Protocol::Udp),
            LocalCandidate::Reflexive { addr, base } => {
                Candidate::server_reflexive(addr, base, Protocol::Udp)
            }
            LocalCandidate::Relayed { addr, local, .. } => {
                self.relayed.push(addr);
                Candidate::relayed(addr, local, Protocol::Udp)
            }
        };
        if let Some(added) = self.agent.add_local_candidate(candidate.unwrap()) {
            self.signalled.push(added.to_sdp_string());
            self.to_signal.push(added.to_sdp_string());
        }
    }

    fn receives(&mut self, packet: &Packet, now: Instant) {
        let Packet { src, dst, payload } = packet;
        if let Some(data) = gateway_common::channel_data::parse(payload) {
            let Some(peer) = self.channels.get(&(*src, data.number)).copied() else { return };
            let used = ChannelUse { server: *src, number: data.number, received: true, sent: false };
            self.relays.handle_channels_used(&[used], now);
            let Some(destination) = self.relayed.last().copied() else { return };
            self.takes(data.payload, peer, destination, now);
            return;
        }
        let datagram = StunDatagram { local: *dst, from: *src, via: None, payload: payload.clone() };
        if !self.relays.handle_stun(&datagram, now) {
            self.takes(payload, *src, *dst, now);
        }
        self.drive(now);
    }

    fn takes(&mut self, payload: &[u8], source: SocketAddr, destination: SocketAddr, now: Instant) {
        match stun::StunMessage::parse(payload) {
            Ok(message) => {
                let packet = stun::StunPacket { proto: Protocol::Udp, source, destination, message };
                self.agent.handle_packet(now, packet);
            }
            Err(_) => self.inbox.push(payload.to_vec()),
        }
        self.drive(now);
    }

    fn handle_timeout(&mut self, now: Instant) {
        self.relays.handle_timeout(now);
        self.drive(now);
    }

    fn drive(&mut self, now: Instant) {
        while let Some(event) = self.relays.poll_event() {
            match event {
                RelayEvent::Added(found, relay) if self.started && relay == self.relay => self.adds(&found),
                RelayEvent::ChannelBound { server, number, peer, .. } => {
                    self.channels.insert((server, number), peer);
                }
                RelayEvent::ChannelGone { server, number, .. } => {
                    self.channels.remove(&(server, number));
                }
                _ => {}
            }
        }
        if !self.started || self.silent {
            return;
        }
        loop {
            self.agent.handle_timeout(now);
            while let Some(check) = self.agent.poll_transmit() {
                let payload = Vec::from(check.contents);
                if self.relayed.contains(&check.source) {
                    self.out.extend(self.relays.wrap(self.relay, check.destination, &payload, now));
                } else {
                    self.out.push(Transmit { src: Some(check.source), dst: check.destination, payload });
                }
            }
            while let Some(event) = self.agent.poll_event() {
                match event {
                    IceAgentEvent::NominatedSend { source, destination, .. } => {
                        self.nominated = Some((source, destination));
                    }
                    IceAgentEvent::IceConnectionStateChange(IceConnectionState::Disconnected) => {
                        self.nominated = None;
                    }
                    _ => {}
                }
            }
            if self.agent.poll_timeout().is_none_or(|at| at > now) {
                return;
            }
        }
    }

    fn poll_transmit(&mut self) -> Option<Transmit> {
        self.relays.poll_transmit().or_else(|| (!self.out.is_empty()).then(|| self.out.remove(0)))
    }

    fn poll_timeout(&mut self) -> Option<Instant> {
        let agent = (self.started && !self.silent).then(|| self.agent.poll_timeout()).flatten();
        [agent, self.relays.poll_timeout()].into_iter().flatten().min()
    }
}

/// (gateway's, client's), as in the recording `head-direct`.
pub(super) fn credentials() -> (IceCredentials, IceCredentials) {
    let of = |username: &str, password: &str| IceCredentials {
        username: username.to_owned(),
        password: Zeroizing::new(password.to_owned()),
    };
    (of("7swh", "v4gth7yrtmrzjum2tyhguq"), of("o7vl", "5dm2b4nl6bk6m77jluz5md"))
}

/// A network that differs by id, without filters.
pub(super) fn resource_of(id: u128) -> Resource {
    let network = IpNet::new([172, 20, u8::try_from(id).unwrap(), 0].into(), 24).unwrap();
    let kind = ResourceKind::Cidr { name: format!("lan {id}"), network, filters: Vec::new() };
    Resource { id: ResourceId(Uuid::from_u128(id)), kind }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{PathKind, tests::epoch};

    const SOON: Duration = Duration::from_secs(3);

    #[test]
    fn without_translation_the_direct_pair_is_nominated() {
        let mut world = World::new(epoch(), 1);
        world.run(Duration::from_secs(1));
        world.authorize(1);
        let took = world.run_until("connected", SOON, World::is_connected);
        assert!(took < Duration::from_millis(300), "{took:?}");
        assert_eq!(
            world.path(),
            Some(Path::Direct { local: at("198.51.100.2:52625"), remote: at("192.0.2.2:52625") })
        );
        assert!(world.reaches_the_client(b"data"));
        assert_eq!(world.gateway.status().peer_to_peer, 1);
        // Acknowledged first, then all candidates in one message, the best first, none twice.
        let [Egress::Authorized { reference }, Egress::BroadcastIceCandidates(_, lines)] = &world.said[..]
        else {
            panic!("{:?}", world.said)
        };
        assert_eq!(reference, "ref-1");
        let kinds: Vec<_> = lines.iter().map(|l| l.split(' ').nth(7).unwrap()).collect();
        assert_eq!(kinds, ["host", "relay"], "a reflexive one would be redundant");
        assert!(world.twins[0].1.sins.is_empty(), "{:?}", world.twins[0].1.sins);
    }

    #[test]
    fn through_relays_only_a_relayed_pair_is_nominated() {
        let mut world = World::new(epoch(), 1);
        world.direct_is_blocked = true;
        world.run(Duration::from_secs(1));
        world.authorize(1);
        world.run_until("connected", SOON, World::is_connected);
        assert!(matches!(world.path(), Some(Path::Relayed { channel: Some(_), .. })), "{world:#?}");
        assert!(world.reaches_the_client(b"relayed data"));
        assert!(world.twins[0].1.sins.is_empty(), "{:?}", world.twins[0].1.sins);
    }

    #[test]
    fn every_kind_of_translation_finds_a_way() {
        use NatKind::{Cone, Symmetric};
        let client = |kind| Some(Nat::new(kind, "192.0.2.1"));
        let gateway = |kind| Some(Nat::new(kind, "198.51.100.1"));
        // The last column: can the two meet without a relay? A symmetric side meets a cone that filters by port not
        // at all, because its port for the other is not the one the relay saw.
        let table = [
            ("client cone", client(Cone), None, true),
            ("client symmetric", client(Symmetric), None, true),
            ("gateway cone", None, gateway(Cone), true),
            ("gateway symmetric", None, gateway(Symmetric), true),
            ("both cone", client(Cone), gateway(Cone), true),
            ("cone and symmetric", client(Cone), gateway(Symmetric), false),
            ("both symmetric", client(Symmetric), gateway(Symmetric), false),
        ];
        for (name, client, gateway, direct) in table {
            let mut world = World::with_nats(epoch(), 1, client, gateway);
            world.run(Duration::from_secs(1));
            world.authorize(1);
            world.run_until(name, SOON, World::is_connected);
            world.run(SOON);
            let status = world.gateway.status();
            assert_eq!(status.peer_to_peer == 1, direct, "{name}: {world:#?}");
            assert!(world.reaches_the_client(name.as_bytes()), "{name}: {world:#?}");
        }
    }

    #[test]
    fn a_client_behind_a_symmetric_router_is_learned_from_its_checks() {
        let mut world = World::with_nats(epoch(), 1, Some(Nat::new(NatKind::Symmetric, "192.0.2.1")), None);
        world.run(Duration::from_secs(1));
        world.authorize(1);
        world
            .run_until("direct", SOON, |w| matches!(w.path(), Some(Path::Direct { .. })) && w.is_connected());
        let Some(Path::Direct { remote, .. }) = world.path() else { unreachable!() };
        let signalled = world.client.signalled.join("\n");
        let text = format!("{} {}", remote.ip(), remote.port());
        assert!(
            remote.ip() == at("192.0.2.1:1").ip() && !signalled.contains(&text),
            "{remote} in {signalled}"
        );
        assert!(world.reaches_the_client(b"data"));
    }

    #[test]
    fn loss_and_latency_only_delay() {
        let mut world = World::new(epoch(), 1);
        world.link = Link { latency: Duration::from_millis(120), loses_one_in: 5, mtu: 1316 };
        world.run(Duration::from_secs(20));
        world.authorize(1);
        world.run_until("connected", Duration::from_secs(8), World::is_connected);
        world.run(Duration::from_secs(120));
        assert!(world.is_connected(), "{world:#?}");
    }

    #[test]
    fn when_the_relay_is_removed_the_connection_migrates() {
        let mut world = World::new(epoch(), 2);
        world.direct_is_blocked = true;
        world.run(Duration::from_secs(1));
        world.authorize(1);
        world.run_until("connected", SOON, World::is_connected);
        let used = world.selected();
        let other = world.twins.iter().map(|(id, _)| *id).find(|id| *id != used).unwrap();
        let before = world.said.len();
        let index = world.index();
        world.ingress(Ingress::RelaysPresence { disconnected: vec![used], connected: vec![] });
        assert_eq!(world.selected(), other, "at once");
        let (added, removed) = (lines_since(&world, before, true), lines_since(&world, before, false));
        assert!(added.len() == 1 && added[0].contains("typ relay"), "{added:?}");
        assert!(removed.len() == 1 && removed[0].contains("typ relay"), "{removed:?}");
        world.run(Duration::from_secs(5));
        assert!(world.is_connected(), "{world:#?}");
        assert!(world.reaches_the_client(b"after"), "{world:#?}");
        assert_eq!(world.index(), index, "the same connection all along");
    }

    #[test]
    fn without_another_relay_the_connection_waits_for_one() {
        let mut world = World::new(epoch(), 2);
        let init = world.init(None).relays;
        let (first, second) = (world.twins[0].0, world.twins[1].0);
        world.ingress(Ingress::RelaysPresence { disconnected: vec![second], connected: vec![] });
        world.run(Duration::from_secs(1));
        world.authorize(1);
        world.run_until("connected", SOON, World::is_connected);
        assert_eq!(world.selected(), first);
        world.ingress(Ingress::RelaysPresence { disconnected: vec![first], connected: vec![] });
        world.run(SOON);
        assert_eq!(world.said.iter().filter(|e| **e == Egress::NoRelays).count(), 1, "{:?}", world.said);
        assert_eq!(world.gateway.status().peer_to_peer, 1, "a direct path does not need it");
        let before = world.said.len();
        let second_only: Vec<_> = init.into_iter().filter(|r| r.id == second).collect();
        world.ingress(Ingress::RelaysPresence { disconnected: vec![], connected: second_only });
        world.run_until("migrated", SOON, |w| w.has_relay() && !lines_since(w, before, true).is_empty());
        assert_eq!(world.selected(), second);
        assert!(world.is_connected());
    }

    #[test]
    fn while_the_portal_is_away_candidates_are_held() {
        let mut world = World::new(epoch(), 2);
        world.run(Duration::from_secs(1));
        world.authorize(1);
        world.run_until("connected", SOON, World::is_connected);
        let used = world.selected();
        let before = world.said.len();
        world.portal_goes();
        world.gateway.handle_ingress(
            Ingress::RelaysPresence { disconnected: vec![used], connected: vec![] },
            world.now,
        );
        world.run(Duration::from_secs(30));
        assert_eq!(world.said.len(), before, "nobody to tell");
        assert!(world.reaches_the_client(b"the data plane does not care"));
        world.portal_returns();
        assert_eq!(lines_since(&world, before, true).len(), 1);
        assert_eq!(lines_since(&world, before, false).len(), 1);
        let first = &world.said[before];
        assert!(matches!(first, Egress::BroadcastIceCandidates(..)), "additions first: {first:?}");
    }

    #[test]
    fn a_client_that_falls_silent_keeps_its_path_and_one_that_withdraws_everything_loses_it() {
        let mut world = World::new(epoch(), 1);
        world.run(Duration::from_secs(1));
        world.authorize(1);
        world.run_until("connected", SOON, World::is_connected);
        let relay = world.client.withdraws(is::CandidateKind::Relayed);
        world.ingress(Ingress::InvalidateIceCandidates(world.client.id, vec![relay]));
        assert!(matches!(world.path(), Some(Path::Direct { .. })));
        world.run(SOON);
        let host = world.client.withdraws(is::CandidateKind::Host);
        let at = world.now;
        world.ingress(Ingress::InvalidateIceCandidates(world.client.id, vec![host]));
        world.run_until("failed", Duration::from_secs(3), |w| w.index().is_none());
        assert_eq!(world.now - at, Duration::from_secs(2), "the grace, exactly");
        assert_eq!(world.state().unwrap().resources.len(), 1, "authorizations stay");
    }

    #[test]
    fn checks_follow_the_recorded_schedule() {
        // test-vectors.md section 6: 0, 0.25, 0.75, 1.75, 3.75 s for HEAD, and no pacing between pairs.
        let mut world = World::new(epoch(), 1);
        world.run(Duration::from_secs(1));
        world.authorize(1);
        world.link.mtu = 0;
        let host = |n| format!("candidate:1 1 udp 2130706175 192.0.2.{n} 52625 typ host ufrag o7vl");
        let began = world.now;
        world.ingress(Ingress::IceCandidates(world.client.id, vec![host(2), host(3)]));
        world.run(Duration::from_secs(4));
        for peer in ["192.0.2.2:52625", "192.0.2.3:52625"] {
            assert_eq!(checks(&world, began, |p| p.dst == at(peer)), [0, 250, 750, 1750, 3750], "{peer}");
        }
    }

    #[test]
    fn a_signalled_relay_is_checked_at_once_and_a_host_with_the_second_try() {
        // connections.md section 6.4: the first check through our relay to a host only starts the binding.
        let relay = "candidate:1 1 udp 37748479 203.0.113.9 5000 typ relay raddr 0.0.0.0 rport 0 ufrag o7vl";
        let host = "candidate:1 1 udp 2130706175 192.0.2.2 52625 typ host ufrag o7vl";
        for (line, expect) in [(relay, [0, 250, 750]), (host, [250, 750, 1750])] {
            let mut world = World::new(epoch(), 1);
            world.run(Duration::from_secs(1));
            world.authorize(1);
            let began = world.now;
            world.direct_is_blocked = true;
            world.ingress(Ingress::IceCandidates(world.client.id, vec![line.to_owned()]));
            world.client.falls_silent();
            world.run(Duration::from_secs(2));
            let relayed =
                checks(&world, began, |p| gateway_common::channel_data::parse(&p.payload).is_some());
            assert_eq!(relayed[..3], expect, "{line}");
        }
    }

    #[test]
    fn an_idle_connection_checks_every_25_seconds_until_data_flows() {
        let mut world = World::new(epoch(), 1);
        world.run(Duration::from_secs(1));
        world.authorize(1);
        world.run_until("connected", SOON, World::is_connected);
        world.run(Duration::from_secs(60));
        let to_client = |p: &Packet| p.dst == at("192.0.2.2:52625") && p.payload.starts_with(&[0, 1]);
        let idle_since = world.now;
        world.run(Duration::from_secs(100));
        assert_eq!(checks(&world, idle_since, to_client).len(), 4);
        let (id, index) = (world.client.id, world.index().unwrap());
        let now = world.now;
        world.worker_event(WorkerEvent::Activity { id, index, at: now });
        assert!(!world.gateway.connection(id).unwrap().is_idle());
        world.run(Duration::from_millis(19_999));
        assert!(!world.gateway.connection(id).unwrap().is_idle());
        world.run(Duration::from_millis(1));
        assert!(world.gateway.connection(id).unwrap().is_idle(), "20 s later, exactly");
        assert!(world.is_connected());
        assert!(checks(&world, now, to_client).len() >= 2, "every 15 s while data flows");
    }

    #[test]
    fn a_path_through_an_allocation_that_went_is_none() {
        let mut world = World::new(epoch(), 1);
        world.direct_is_blocked = true;
        world.run(Duration::from_secs(1));
        world.authorize(1);
        world.run_until("connected", SOON, World::is_connected);
        world.run(SOON);
        assert!(matches!(world.path(), Some(Path::Relayed { .. })));
        let relay = world.selected();
        let before = world.sent.len();
        world.ingress(Ingress::RelaysPresence { disconnected: vec![relay], connected: vec![] });
        assert_eq!(world.path(), None);
        assert!(world.index().is_some(), "another relay may come");
        world.run(Duration::from_millis(500));
        let (_, twin) = &world.twins[0];
        let servers: Vec<_> = twin.entries(relay).iter().map(|r| r.addr).collect();
        assert!(world.sent[before..].iter().all(|(_, p)| !servers.contains(&p.dst)));
    }

    #[test]
    fn the_kind_of_a_path_names_the_relays_on_it() {
        let mut world = World::new(epoch(), 1);
        world.direct_is_blocked = true;
        world.run(Duration::from_secs(1));
        world.authorize(1);
        world.run_until("connected", SOON, World::is_connected);
        world.run(SOON);
        // "without a direct path both sides settle on client host <-> gateway's relay" (test-vectors.md section 5).
        let kind = world.gateway.connection(world.client.id).unwrap().path_kind();
        assert_eq!(kind, Some(PathKind::RelayToPeer), "{world:#?}");
    }

    /// When datagrams that `select` knows were sent, in milliseconds since `since`.
    fn checks(world: &World, since: Instant, select: impl Fn(&Packet) -> bool) -> Vec<u128> {
        let sent = world.sent.iter().filter(|(at, packet)| *at >= since && select(packet));
        sent.map(|(at, _)| (*at - since).as_millis()).collect()
    }

    fn lines_since(world: &World, before: usize, added: bool) -> Vec<String> {
        let lines = |egress: &Egress| match egress {
            Egress::BroadcastIceCandidates(_, lines) if added => lines.clone(),
            Egress::BroadcastInvalidatedIceCandidates(_, lines) if !added => lines.clone(),
            _ => Vec::new(),
        };
        world.said[before..].iter().flat_map(lines).collect()
    }

    fn at(addr: &str) -> SocketAddr {
        addr.parse().unwrap()
    }
}
