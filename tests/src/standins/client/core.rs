//! What a client does: log in, ask for resources, keep connections, move packets.
//!
//! Everything is called by `eventloop` with the current time; packets are in `traffic`.

mod traffic;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use is::IceCreds;
use serde_json::{Value, json};
use tokio::runtime::Handle;
use tokio::sync::mpsc::UnboundedSender;
use uuid::Uuid;

use super::config::{Command, Config, Event, Generation, Stats};
use super::connection::{Connection, Grant, Identity};
use super::eventloop::{Input, Inputs};
use super::ice::{self, Local};
use super::inner;
use super::net::Net;
use super::portal::{self, Order, Report};
use super::tun::Inside;
use super::turn::{RelayId, Turn, TurnEvent};
use super::udp::Sockets;
use super::wire::{Candidates, Granted, Init, Presence, RelayEntry, WireCreds, key};

/// A request waits this long for a relay before it is sent without one.
const RELAY_PATIENCE: Duration = Duration::from_secs(5);
/// The same resource is asked for again on demand after this long.
const REQUEST_PAUSE: Duration = Duration::from_secs(2);
/// Packets kept per resource until it is granted.
const WAITING_LIMIT: usize = 128;

/// Addresses that stand for names of DNS resources (packets.md section 2).
const PROXY_RANGES: [IpNet; 2] = [
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(100, 96, 0, 0), 11)),
    IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x2021, 0x1111, 0x8000, 0, 0, 0, 0), 107)),
];

/// Where a client's events go.
pub(super) type Emit = Box<dyn FnMut(Event)>;

/// Whether the loop goes on.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Flow {
    Continue,
    Stop,
}

/// See the file's head.
pub(super) struct Client {
    config: Config,
    emit: Emit,
    identity: Identity,
    orders: UnboundedSender<Order>,
    net: Net,
    /// What each relay was made from, to see changes.
    relay_entries: BTreeMap<RelayId, Vec<RelayEntry>>,
    connections: BTreeMap<Uuid, Connection>,
    by_index: HashMap<u32, Uuid>,
    resources: BTreeMap<Uuid, Resource>,
    deferred: Vec<(Uuid, Instant)>,
    /// Packets decrypted in this turn, each behind the TUN's header room.
    decrypted: Vec<Vec<u8>>,
    decrypted_count: usize,
    stats: Stats,
}

/// What we know of a resource.
#[derive(Default)]
struct Resource {
    network: Option<IpNet>,
    requested: Option<Instant>,
    granted: Option<Uuid>,
    waiting: VecDeque<Vec<u8>>,
}

impl Client {
    /// Binds sockets and starts the WebSocket's task on `runtime`.
    pub(super) fn new(config: Config, inputs: Inputs, emit: Emit, runtime: &Handle) -> Result<Self> {
        let identity = Identity::generate();
        let orders = portal::start(&config, STANDARD.encode(identity.public.as_bytes()), inputs, runtime);
        let net = Net::new(Sockets::bind(config.port)?);
        let deferred = config.request.iter().map(|id| (*id, Instant::now())).collect();
        Ok(Self {
            config,
            emit,
            identity,
            orders,
            net,
            relay_entries: BTreeMap::new(),
            connections: BTreeMap::new(),
            by_index: HashMap::new(),
            resources: BTreeMap::new(),
            deferred,
            decrypted: Vec::new(),
            decrypted_count: 0,
            stats: Stats::default(),
        })
    }

    /// The sockets to poll.
    pub(super) fn udp_fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.net.sockets.v4.iter().chain(&self.net.sockets.v6).map(|socket| socket.as_fd())
    }

    /// Is there an allocation on any relay?
    pub(super) fn has_relay(&self) -> bool {
        self.net.best_relay().is_some()
    }

    // ---- inputs -------------------------------------------------------------------------------

    /// A command or something from the portal.
    pub(super) fn handle_input(&mut self, input: Input, inside: &dyn Inside, now: Instant) -> Flow {
        match input {
            Input::Portal(Report::Joined) => {}
            Input::Portal(Report::Lost(reason)) => (self.emit)(Event::PortalLost { reason }),
            Input::Portal(Report::Pushed(frame)) => {
                if let Err(error) = self.handle_push(&frame.event, frame.payload, inside, now) {
                    (self.emit)(Event::Error { message: format!("{}: {error:#}", frame.event) });
                }
            }
            Input::BadCommand(message) => (self.emit)(Event::Error { message }),
            Input::Command(Command::Stop) => return Flow::Stop,
            Input::Command(command) => self.handle_command(command, now),
        }
        Flow::Continue
    }

    fn handle_command(&mut self, command: Command, now: Instant) {
        match command {
            Command::Request { resource } => self.deferred.push((resource, now)),
            Command::Assign { resource, domain, proxies } => {
                let packet = inner::assigned_ips(resource, &domain, &proxies);
                let granted = self.resources.get(&resource).and_then(|known| known.granted);
                // Without a grant the gateway shall be the one to refuse it.
                let gateway = granted.or_else(|| self.connections.keys().next().copied());
                match gateway.and_then(|gateway| self.connections.get_mut(&gateway)) {
                    Some(connection) => {
                        connection.send(&packet, &mut self.net, now);
                        self.net.flush();
                    }
                    None => (self.emit)(Event::Error { message: "assign: there is no connection".into() }),
                }
            }
            Command::SendInner { hex } => match (hex::decode(&hex), self.connections.values_mut().next()) {
                (Ok(packet), Some(connection)) => {
                    connection.send(&packet, &mut self.net, now);
                    self.net.flush();
                }
                (Err(error), _) => (self.emit)(Event::Error { message: format!("send_inner: {error}") }),
                (_, None) => {
                    (self.emit)(Event::Error { message: "send_inner: there is no connection".into() })
                }
            },
            Command::SendOuter { to, hex } => match hex::decode(&hex) {
                Ok(bytes) => self.net.sockets.send(None, to, 0, None, &bytes),
                Err(error) => (self.emit)(Event::Error { message: format!("send_outer: {error}") }),
            },
            Command::Reconnect => self.login(),
            Command::Roam => self.roam(now),
            Command::Vanish => {
                for gateway in self.connections.keys().copied().collect::<Vec<_>>() {
                    self.close(gateway, "vanished");
                }
            }
            Command::Stats => (self.emit)(Event::Stats(self.stats.clone())),
            Command::Stop => {}
        }
    }

    /// Says goodbye to everybody and gives the relays back.
    pub(super) fn stop(&mut self, now: Instant) {
        for connection in self.connections.values_mut() {
            connection.goodbye(&mut self.net, now);
        }
        self.release_relays(now);
    }

    /// connections.md section 5.3: everything anew, with a new key.
    fn roam(&mut self, now: Instant) {
        // Nothing is released: from the new address the relays would not know whose allocations are meant.
        self.net.relays.clear();
        self.relay_entries.clear();
        self.identity = Identity::generate();
        for (id, resource) in &mut self.resources {
            let (requested, granted) = (resource.requested.take(), resource.granted.take());
            if requested.is_some() || granted.is_some() {
                self.deferred.push((*id, now));
            }
        }
        for gateway in self.connections.keys().copied().collect::<Vec<_>>() {
            self.close(gateway, "roamed");
        }
        self.login();
    }

    fn release_relays(&mut self, now: Instant) {
        for turn in self.net.relays.values_mut() {
            turn.release(now);
        }
        self.net.drain_relays();
    }

    fn login(&self) {
        let _ = self.orders.send(Order::Login(STANDARD.encode(self.identity.public.as_bytes())));
    }

    // ---- portal -------------------------------------------------------------------------------

    fn handle_push(&mut self, event: &str, payload: Value, inside: &dyn Inside, now: Instant) -> Result<()> {
        match event {
            "init" => self.on_init(serde_json::from_value(payload)?, inside, now)?,
            "authorization_created" | "flow_created" => {
                self.on_granted(serde_json::from_value(payload)?, now)?
            }
            "authorization_creation_failed" | "flow_creation_failed" => {
                let resource: Uuid = serde_json::from_value(payload["resource_id"].clone())?;
                let known = self.resources.entry(resource).or_default();
                known.requested = None;
                known.waiting.clear();
                let reason = payload["reason"].as_str().unwrap_or_default().to_owned();
                (self.emit)(Event::Refused { resource, reason });
            }
            "ice_candidates" => {
                let message: Candidates = serde_json::from_value(payload)?;
                if let Some(connection) = self.connections.get_mut(&message.gateway_id) {
                    for line in message.candidates.iter().filter_map(Value::as_str) {
                        connection.add_remote(line, &mut self.net, now);
                    }
                }
            }
            "invalidate_ice_candidates" => {
                let message: Candidates = serde_json::from_value(payload)?;
                if let Some(connection) = self.connections.get_mut(&message.gateway_id) {
                    message
                        .candidates
                        .iter()
                        .filter_map(Value::as_str)
                        .for_each(|line| connection.remove_remote(line));
                }
            }
            "relays_presence" => {
                let message: Presence = serde_json::from_value(payload)?;
                for id in message.disconnected_ids {
                    self.remove_relay(id, now);
                }
                self.merge_relays(message.connected, now);
            }
            _ => {}
        }
        Ok(())
    }

    fn on_init(&mut self, init: Init, inside: &dyn Inside, now: Instant) -> Result<()> {
        let mut names = false;
        for resource in &init.resources {
            let Ok(id) = serde_json::from_value::<Uuid>(resource["id"].clone()) else { continue };
            let network = resource["address"].as_str().and_then(|address| address.parse().ok());
            names |= resource["type"] == "dns";
            self.resources.entry(id).or_default().network = network;
        }
        let networks = self.resources.values().filter_map(|r| r.network);
        let proxies = names.then_some(PROXY_RANGES).into_iter().flatten();
        let routes = networks.chain(self.config.extra_routes.iter().copied()).chain(proxies);
        let routes: Vec<_> = routes.collect();
        inside.configure(init.interface.ipv4, init.interface.ipv6, &routes)?;
        self.merge_relays(init.relays, now);
        (self.emit)(Event::Joined { ipv4: init.interface.ipv4.into(), ipv6: init.interface.ipv6.into() });
        Ok(())
    }

    /// Same id and same entries: kept. Otherwise replaced (connections.md section 9).
    fn merge_relays(&mut self, entries: Vec<RelayEntry>, now: Instant) {
        let mut by_id: BTreeMap<RelayId, Vec<RelayEntry>> = BTreeMap::new();
        for entry in entries.into_iter().filter(|e| e.kind == "turn") {
            by_id.entry(entry.id).or_default().push(entry);
        }
        for (id, entries) in by_id {
            if self.relay_entries.get(&id) == Some(&entries) {
                continue;
            }
            self.remove_relay(id, now);
            let servers = entries.iter().map(|e| e.addr).collect();
            let software = match self.config.generation {
                Generation::Head => "snownet".to_owned(),
                Generation::Nov25 => format!("snownet; session={:016x}", rand::random::<u64>()),
            };
            let turn = Turn::new(servers, &entries[0].username, &entries[0].password, &software, now);
            self.net.relays.insert(id, turn);
            self.relay_entries.insert(id, entries);
        }
        self.net.drain_relays();
    }

    fn remove_relay(&mut self, id: RelayId, now: Instant) {
        self.relay_entries.remove(&id);
        if let Some(turn) = self.net.relays.remove(&id) {
            self.on_relay_lost(id, turn.relayed(), now);
        }
    }

    /// Withdraws a relay's addresses and moves its connections to another one.
    fn on_relay_lost(&mut self, id: RelayId, relayed: &[SocketAddr], now: Instant) {
        let next = self.net.best_relay().filter(|next| *next != id);
        let mut messages = Vec::new();
        for connection in self.connections.values_mut() {
            let gone: Vec<_> = relayed.iter().filter_map(|addr| connection.remove_relayed(*addr)).collect();
            messages.push((connection.grant.gateway, true, gone));
            if connection.relay == id
                && let Some(next) = next
            {
                connection.relay = next;
                let lines =
                    relayed_candidates(&self.net, next).filter_map(|c| connection.add_local(c)).collect();
                messages.push((connection.grant.gateway, false, lines));
            }
        }
        for (gateway, invalidated, lines) in messages {
            self.signal(gateway, invalidated, lines);
        }
        self.advance(now);
    }

    // ---- resources ----------------------------------------------------------------------------

    /// Sends requests that were waiting for a relay.
    fn send_requests(&mut self, now: Instant) {
        let ready = self.net.best_relay().is_some();
        let (due, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.deferred)
            .into_iter()
            .partition(|(_, since)| ready || now >= *since + RELAY_PATIENCE);
        self.deferred = later;
        for (resource, _) in due {
            self.resources.entry(resource).or_default().requested = Some(now);
            let event = match self.config.generation {
                Generation::Head => "request_authorization",
                Generation::Nov25 => "create_flow",
            };
            let connected: Vec<_> = self.connections.keys().collect();
            self.say(event, json!({ "resource_id": resource, "connected_gateway_ids": connected }));
        }
    }

    fn on_granted(&mut self, granted: Granted, now: Instant) -> Result<()> {
        anyhow::ensure!(
            !granted.use_iceless,
            "the portal chose ICE-less although this client never offered it"
        );
        let gateway = granted.gateway_id;
        let creds = |c: WireCreds| IceCreds { ufrag: c.username, pass: c.password };
        let grant = Grant {
            gateway,
            gateway_key: key(&granted.gateway_public_key)?,
            preshared_key: key(&granted.preshared_key)?,
            local: creds(granted.client_ice_credentials),
            remote: creds(granted.gateway_ice_credentials),
        };
        let known = self.resources.entry(granted.resource_id).or_default();
        known.granted = Some(gateway);
        let since = known.requested.take().unwrap_or(now);
        let waiting = std::mem::take(&mut known.waiting);
        let ms = u64::try_from((now - since).as_millis()).unwrap_or(u64::MAX);
        (self.emit)(Event::Authorized { resource: granted.resource_id, gateway, ms });
        self.upsert(grant, now)?;
        if let Some(connection) = self.connections.get_mut(&gateway) {
            for packet in waiting {
                connection.send(&packet, &mut self.net, now);
            }
            self.net.flush();
        }
        Ok(())
    }

    /// connections.md section 5.1.
    fn upsert(&mut self, grant: Grant, now: Instant) -> Result<()> {
        let gateway = grant.gateway;
        if let Some(connection) = self.connections.get_mut(&gateway)
            && connection.grant == grant
        {
            let lines = match self.config.generation {
                Generation::Head => connection.announcement(),
                Generation::Nov25 => {
                    reflexive_candidates(&self.net).filter_map(|c| connection.add_local(c)).collect()
                }
            };
            connection.handshake(&mut self.net, now);
            self.signal(gateway, false, lines);
            return Ok(());
        }
        // A relay that does not work at the moment told our address, and may come back.
        let relay = self.net.best_relay().or_else(|| self.net.relays.keys().next().copied());
        let relay = relay.context("there is no relay, so there are no candidates to offer")?;
        if self.connections.contains_key(&gateway) {
            self.close(gateway, "replaced");
        }
        let index = loop {
            let index = rand::random_range(1..1 << 24);
            if !self.by_index.contains_key(&index) {
                break index;
            }
        };
        let (generation, relay_only) = (self.config.generation, self.config.relay_only);
        let mut connection =
            Connection::new(grant, &self.identity, index, relay, generation, relay_only, now);
        let all = host_candidates(&self.net)
            .chain(reflexive_candidates(&self.net))
            .chain(relayed_candidates(&self.net, relay));
        let lines = all.filter_map(|c| connection.add_local(c)).collect();
        self.by_index.insert(index, gateway);
        self.connections.insert(gateway, connection);
        self.signal(gateway, false, lines);
        Ok(())
    }

    /// Tells the gateway, through the portal, about candidates.
    fn signal(&self, gateway: Uuid, invalidated: bool, mut lines: Vec<String>) {
        if lines.is_empty() {
            return;
        }
        ice::sort_lines(&mut lines);
        match (self.config.generation, invalidated) {
            (Generation::Head, false) => {
                self.say("new_gateway_ice_candidates", json!({ "gateway_id": gateway, "candidates": lines }));
            }
            (Generation::Head, true) => {
                self.say(
                    "invalidated_gateway_ice_candidates",
                    json!({ "gateway_id": gateway, "candidates": lines }),
                );
            }
            (Generation::Nov25, false) => {
                self.say(
                    "broadcast_ice_candidates",
                    json!({ "gateway_ids": [gateway], "candidates": lines }),
                );
            }
            (Generation::Nov25, true) => {
                self.say(
                    "broadcast_invalidated_ice_candidates",
                    json!({ "gateway_ids": [gateway], "candidates": lines }),
                );
            }
        }
    }

    fn say(&self, event: &'static str, payload: Value) {
        let _ = self.orders.send(Order::Say(event, payload));
    }

    fn close(&mut self, gateway: Uuid, reason: &str) {
        if let Some(connection) = self.connections.remove(&gateway) {
            self.by_index.remove(&connection.index);
            for resource in self.resources.values_mut().filter(|r| r.granted == Some(gateway)) {
                resource.granted = None;
            }
            (self.emit)(Event::Closed { gateway, reason: reason.into() });
        }
    }

    // ---- time ---------------------------------------------------------------------------------

    /// Lets everything act whose time has come.
    pub(super) fn advance(&mut self, now: Instant) {
        self.advance_relays(now);
        self.send_requests(now);
        let mut failed = Vec::new();
        for (gateway, connection) in &mut self.connections {
            if let Some(reason) = connection.advance(&mut self.net, now, &mut self.emit) {
                failed.push((*gateway, reason));
            }
        }
        for (gateway, reason) in failed {
            let relay = self.connections.get(&gateway).and_then(|c| self.net.relays.get_mut(&c.relay));
            if let Some(turn) = relay {
                turn.verify(now);
            }
            self.close(gateway, &reason);
        }
        self.net.drain_relays();
    }

    fn advance_relays(&mut self, now: Instant) {
        let mut happened = Vec::new();
        for (id, turn) in &mut self.net.relays {
            turn.handle_timeout(now);
            happened.extend(std::iter::from_fn(|| turn.poll_event()).map(|event| (*id, event)));
        }
        for (id, event) in happened {
            match event {
                TurnEvent::Mapped { host, reflexive } => {
                    self.offer(id, &[Local::Host(host), Local::Reflexive { addr: reflexive, base: host }]);
                }
                TurnEvent::Allocated { relayed, local } => {
                    (self.emit)(Event::Relay { relay: id, address: relayed });
                    self.offer(id, &[Local::Relayed { addr: relayed, local }]);
                }
                TurnEvent::Lost { relayed } => self.on_relay_lost(id, &relayed, now),
            }
        }
        self.net.drain_relays();
    }

    /// New candidates of a relay go to the connections that selected it (section 6.4).
    fn offer(&mut self, relay: RelayId, candidates: &[Local]) {
        let mut messages = Vec::new();
        for connection in self.connections.values_mut().filter(|c| c.relay == relay) {
            let lines: Vec<_> = candidates.iter().filter_map(|c| connection.add_local(*c)).collect();
            messages.push((connection.grant.gateway, lines));
        }
        for (gateway, lines) in messages {
            self.signal(gateway, false, lines);
        }
    }

    /// When [`Self::advance`] has something to do.
    pub(super) fn poll_timeout(&mut self) -> Option<Instant> {
        let relays = self.net.relays.values().filter_map(Turn::poll_timeout).min();
        let deferred = self.deferred.iter().map(|(_, since)| *since + RELAY_PATIENCE).min();
        let connections = self.connections.values_mut().filter_map(Connection::poll_timeout).min();
        [relays, deferred, connections].into_iter().flatten().min()
    }
}

fn host_candidates(net: &Net) -> impl Iterator<Item = Local> + '_ {
    net.relays.values().flat_map(Turn::mapped).map(|(host, _)| Local::Host(host))
}

fn reflexive_candidates(net: &Net) -> impl Iterator<Item = Local> + '_ {
    net.relays.values().flat_map(Turn::mapped).map(|(base, addr)| Local::Reflexive { addr, base })
}

fn relayed_candidates(net: &Net, relay: RelayId) -> impl Iterator<Item = Local> + '_ {
    let turn = net.relays.get(&relay);
    turn.into_iter().flat_map(|turn| {
        let local = turn.local();
        turn.relayed().iter().filter_map(move |addr| Some(Local::Relayed { addr: *addr, local: local? }))
    })
}
