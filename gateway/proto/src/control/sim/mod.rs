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
//! [`World`] owns all of it and the queue of what is on its way; `scenarios` are the tests.

mod client;
mod nat;
mod scenarios;

use std::{
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use uuid::Uuid;

pub(super) use self::client::resource_of;
use self::{client::Client, nat::Nat};
use super::{Config, Control, Event, Workers};
use crate::{
    addr::TunnelAddrs,
    command::{ChannelUse, ClientState, Command, Connection, Home, Path, StunDatagram, WorkerEvent},
    ids::{ClientId, ConnectionIndex, RelayId, WorkerId},
    names::{DomainName, Resolved},
    portal::messages::{AuthorizationRef, Egress, Ingress, Init},
    relay::twin::{Flavor, Packet, Twin},
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
    /// Every home that the workers were told, in order.
    pub(super) homes: Vec<(ClientId, Home)>,
    /// The worker that the kernel brings datagrams to.
    pub(super) heard_by: WorkerId,
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

impl World {
    /// One IPv4 client and gateway without translation, `relays` IPv4 relays, 5 ms everywhere, the portal connected
    /// and `init` delivered.
    pub(super) fn new(start: Instant, relays: u8) -> Self {
        Self::with_nats(start, relays, None, None)
    }

    /// The same with several workers.
    pub(super) fn with_workers(start: Instant, workers: Workers) -> Self {
        let mut world = Self::bare(start, 1, None, None);
        let unix_now = Duration::from_secs(UNIX_START);
        world.gateway = Control::new(Config { seed: 1, unix_now, now: start, workers, flow_logs: false });
        world.begins();
        world
    }

    pub(super) fn with_nats(
        start: Instant,
        relays: u8,
        client_nat: Option<Nat>,
        gateway_nat: Option<Nat>,
    ) -> Self {
        let mut world = Self::bare(start, relays, client_nat, gateway_nat);
        world.begins();
        world
    }

    /// Like [`World::new`] with one relay, where everybody has IPv6, too.
    pub(super) fn dual_stack(start: Instant) -> Self {
        let mut world = Self::bare(start, 1, None, None);
        let listen = ["203.0.113.1:3478", "[2001:db8:ffff::1]:3478"].map(|a| a.parse().unwrap());
        world.twins[0].1 = Twin::new(Flavor::Firezone, &listen, 1);
        world.client.hosts.push("[2001:db8:1::2]:52625".parse().unwrap());
        world.gateway_hosts.push("[2001:db8:2::2]:52625".parse().unwrap());
        world.begins();
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
            gateway: Control::new(Config {
                seed: 1,
                unix_now,
                now: start,
                workers: Workers::ONE,
                flow_logs: false,
            }),
            client: Client::new(client_host, start),
            twins,
            sent: Vec::new(),
            said: Vec::new(),
            events: Vec::new(),
            states: HashMap::new(),
            homes: Vec::new(),
            heard_by: WorkerId::FIRST,
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
    pub(super) fn init(&self, authorizations: Option<Vec<AuthorizationRef>>) -> Init {
        Init {
            interface: TunnelAddrs { v4: [100, 64, 1, 1].into(), v6: "fd00:2021:1111::1:1".parse().unwrap() },
            account_slug: None,
            relays: self.twins.iter().flat_map(|(id, twin)| twin.entries(*id)).collect(),
            authorizations,
            flow_logs: None,
        }
    }

    /// The portal is there, says `init`, and the client finds its relay.
    fn begins(&mut self) {
        self.portal_returns();
        let init = self.init(Some(Vec::new()));
        self.ingress(Ingress::Init(Box::new(init)));
        self.client_starts();
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

    /// When all has come to rest the portal lets the client in; how long that took.
    pub(super) fn connect(&mut self) -> Duration {
        self.run(Duration::from_secs(1));
        self.authorize(1);
        self.run_until("connected", Duration::from_secs(3), Self::is_connected)
    }

    /// The shell tells what the wall clock shows.
    pub(super) fn wall_clock(&mut self, unix_now: Duration) {
        self.gateway.handle_wall_clock(unix_now, self.now);
        self.after_anything();
    }

    /// Time passes in which nobody but the gateway's timers does anything: cheap, however long it is.
    pub(super) fn skip(&mut self, duration: Duration) {
        self.now += duration;
        self.gateway.handle_timeout(self.now);
        self.after_anything();
    }

    pub(super) fn worker_event(&mut self, event: WorkerEvent) {
        self.gateway.handle_worker_event(event, self.now);
        self.after_anything();
    }

    pub(super) fn resolved(&mut self, name: &DomainName, resolved: &Resolved) {
        self.gateway.handle_resolved(name, resolved, self.now);
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
                Command::Client { id, home, desired } => {
                    self.homes.push((id, home));
                    self.states.insert(id, desired);
                }
                Command::Channel { server, number, peer: Some(peer) } => {
                    self.channels.insert((server, number), peer);
                }
                Command::Channel { server, number, peer: None } => {
                    self.channels.remove(&(server, number));
                }
                Command::Relays(servers) => self.relay_servers = servers,
                Command::OwnAddrs(_)
                | Command::Accounting { .. }
                | Command::WallClock(_)
                | Command::Inquire(_)
                | Command::Shutdown => {}
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
                StunDatagram {
                    heard_by: self.heard_by,
                    local: dst,
                    from: peer,
                    via: Some(src),
                    payload: data.payload.to_vec(),
                }
            }
            None => StunDatagram { heard_by: self.heard_by, local: dst, from: src, via: None, payload },
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
