//! What the portal knows and decides; no sockets, no clock of its own.
//!
//! The server hands frames in, the script's orders come in through [`super::Portal`], and everything
//! that must be sent goes into the connection's queue. One lock is around all of it.

mod authorize;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::admit::{Login, Refusal};
use super::config::{Config, Generation, Relay};
use super::derive;
use super::log::{Direction, Entry, Role, Secret, Timing};
use crate::standins::phoenix::Frame;

/// Names one WebSocket for as long as the portal object lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ConnId(u64);

/// What a connection's task is told.
pub(super) enum Out {
    /// Send this text, not before the instant.
    Text(String, Instant),
    /// Send a close frame and end.
    Close,
    /// End without a word: the peer sees a TCP reset.
    Reset,
}

/// See the file's head.
pub(super) struct State {
    pub(super) config: Config,
    pub(super) log: Vec<Entry>,
    pub(super) secrets: BTreeSet<Secret>,
    pub(super) timings: Vec<Timing>,
    pub(super) refusals: VecDeque<(Role, Refusal)>,
    pub(super) denied: BTreeSet<(Uuid, Uuid)>,
    /// Pushes to this role wait this long.
    pub(super) delays: HashMap<Role, Duration>,
    /// Answer nothing at all, not even heartbeats.
    pub(super) silent: bool,
    /// Print each entry to stdout (the stand-alone program).
    pub(super) echo: bool,
    started: Instant,
    next_conn: u64,
    next_ref: u64,
    conns: BTreeMap<ConnId, Conn>,
    devices: HashMap<(Role, String), Device>,
    pending: HashMap<String, Pending>,
    granted: BTreeMap<(Uuid, Uuid), Grant>,
    pub(super) ingest_key: [u8; 32],
}

/// One WebSocket.
struct Conn {
    login: Login,
    device: Uuid,
    out: mpsc::UnboundedSender<Out>,
    joined: bool,
    /// `set_snownet_capabilities` said `iceless: true` since the last join.
    iceless: bool,
}

/// A gateway or client that has connected at least once.
#[derive(Clone)]
struct Device {
    id: Uuid,
    ipv4: Ipv4Addr,
    ipv6: Ipv6Addr,
    /// Its share of preshared keys (section 11.3).
    secret: [u8; 32],
}

/// Waits for a gateway's acknowledgement.
struct Pending {
    client: Uuid,
    gateway: Uuid,
    resource: Uuid,
    use_iceless: bool,
    expires_at: Option<u64>,
    timing: usize,
    deadline: Instant,
    tell_client: Value,
}

/// An acknowledged authorization.
struct Grant {
    gateway: Uuid,
    expires_at: Option<u64>,
}

impl State {
    pub(super) fn new(config: Config) -> Self {
        let mut secrets = BTreeSet::new();
        for token in [&config.gateway_token, &config.client_token] {
            secrets.insert(Secret { kind: "token", value: token.clone() });
        }
        let mut state = Self {
            log: Vec::new(),
            secrets,
            timings: Vec::new(),
            refusals: VecDeque::new(),
            denied: BTreeSet::new(),
            delays: HashMap::new(),
            silent: false,
            echo: false,
            started: Instant::now(),
            next_conn: 0,
            next_ref: 0,
            conns: BTreeMap::new(),
            devices: HashMap::new(),
            pending: HashMap::new(),
            granted: BTreeMap::new(),
            ingest_key: rand::random(),
            config,
        };
        state.note_relay_secrets();
        state
    }

    // ---- connections --------------------------------------------------------------------------

    /// Takes a WebSocket that passed all checks; the receiver is what its task has to send.
    pub(super) fn register(&mut self, login: Login) -> (ConnId, mpsc::UnboundedReceiver<Out>) {
        let device = self.device(&login).id;
        let conn = ConnId(self.next_conn);
        self.next_conn += 1;
        let msg = json!({ "path": login.path, "query": login.query, "ua": login.user_agent,
            "auth": if login.header_token { vec!["x-authorization"] } else { vec![] } });
        self.record(login.role, Some(device), Direction::Connect, msg);
        let (out, queue) = mpsc::unbounded_channel();
        self.conns.insert(conn, Conn { login, device, out, joined: false, iceless: false });
        (conn, queue)
    }

    /// The WebSocket is gone.
    pub(super) fn unregister(&mut self, conn: ConnId, reason: &str) {
        if let Some(conn) = self.conns.remove(&conn) {
            let msg = json!({ "reason": reason });
            self.record(conn.login.role, Some(conn.device), Direction::Disconnect, msg);
        }
    }

    /// Is a device with this identity connected?
    pub(super) fn is_connected(&self, role: Role, external_id: &str) -> bool {
        self.conns.values().any(|c| c.login.role == role && c.login.external_id == external_id)
    }

    /// The ids of all joined devices of this role.
    pub(super) fn online(&self, role: Role) -> Vec<Uuid> {
        self.conns.values().filter(|c| c.login.role == role && c.joined).map(|c| c.device).collect()
    }

    /// The id of a device that has connected, by its `name` parameter or `external_id`.
    pub(super) fn id_of(&self, role: Role, name: &str) -> Option<Uuid> {
        let planned = self.config.devices.iter().find(|d| d.name == name).map(|d| d.id);
        let named =
            || self.conns.values().find(|c| c.login.role == role && c.login.name == name).map(|c| c.device);
        planned.or_else(named).or_else(|| self.devices.get(&(role, name.to_owned())).map(|d| d.id))
    }

    /// The public key of a connected device.
    pub(super) fn public_key_of(&self, role: Role, name: &str) -> Option<String> {
        let login = self.conns.values().map(|c| &c.login).find(|l| l.role == role && l.name == name);
        login.map(|login| login.public_key.clone())
    }

    /// Ends every WebSocket, with or without a close frame.
    pub(super) fn end_all(&mut self, role: Option<Role>, abrupt: bool) {
        for conn in self.conns.values().filter(|c| role.is_none_or(|r| r == c.login.role)) {
            // A task that ended already has no use for the order.
            let _ = conn.out.send(if abrupt { Out::Reset } else { Out::Close });
        }
    }

    fn device(&mut self, login: &Login) -> Device {
        let key = (login.role, login.external_id.clone());
        if let Some(device) = self.devices.get(&key) {
            return device.clone();
        }
        let planned = self.config.devices.iter().find(|d| d.name == login.name);
        let device = match planned {
            Some(plan) => Device { id: plan.id, ipv4: plan.ipv4, ipv6: plan.ipv6, secret: rand::random() },
            None => {
                let nth = self.devices.keys().filter(|(role, _)| *role == login.role).count() + 1;
                let nth = u16::try_from(nth).unwrap_or(u16::MAX);
                let net = match login.role {
                    Role::Gateway => 1_u8,
                    Role::Client => 2,
                };
                Device {
                    id: derive::uuid_from(&format!("{} {}", login.role.topic(), login.external_id)),
                    // Planned devices may hold the low addresses.
                    ipv4: Ipv4Addr::from_bits(Ipv4Addr::new(100, 64, net, 100).to_bits() + u32::from(nth)),
                    ipv6: Ipv6Addr::new(
                        0xfd00,
                        0x2021,
                        0x1111,
                        0,
                        0,
                        0,
                        net.into(),
                        nth.saturating_add(0x100),
                    ),
                    secret: rand::random(),
                }
            }
        };
        self.devices.insert(key, device.clone());
        device
    }

    // ---- frames -------------------------------------------------------------------------------

    /// One text frame of a device.
    pub(super) fn handle_text(&mut self, id: ConnId, text: &str, now: Instant) {
        let Some(conn) = self.conns.get(&id) else { return };
        let (role, device, joined) = (conn.login.role, conn.device, conn.joined);
        let frame = match Frame::decode(text) {
            Ok(frame) => frame,
            Err(error) => {
                self.record(
                    role,
                    Some(device),
                    Direction::Note,
                    json!({ "event": "undecodable", "payload": format!("{error:#}") }),
                );
                return;
            }
        };
        let msg = serde_json::to_value(&frame).unwrap_or_default();
        self.record(role, Some(device), Direction::ToPortal, msg);
        if self.silent {
            return;
        }
        match (frame.topic.as_str(), frame.event.as_str()) {
            ("phoenix", "heartbeat") => self.send(id, &Frame::ok(&frame)),
            (topic, "phx_join") if topic == role.topic() => self.join(id, &frame),
            (topic, _) if topic != role.topic() || !joined => {
                self.send(id, &Frame::error(&frame, "unmatched topic"))
            }
            _ => match role {
                Role::Gateway => self.gateway_said(id, device, &frame, now),
                Role::Client => self.client_said(id, device, &frame, now),
            },
        }
    }

    /// Reply first, `init` right after it (section 5.1).
    fn join(&mut self, id: ConnId, frame: &Frame) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.joined = true;
            conn.iceless = false;
        }
        self.send(id, &Frame::ok(frame));
        self.push_init(id);
    }

    fn gateway_said(&mut self, id: ConnId, gateway: Uuid, frame: &Frame, now: Instant) {
        let Some(v2) = self.conns.get(&id).map(|c| c.login.v2) else { return };
        match frame.event.as_str() {
            "set_snownet_capabilities" => self.set_capabilities(id, frame),
            "authorization_created" if v2 => self.acknowledge(id, gateway, frame, now),
            "flow_authorized" if !v2 => self.acknowledge(id, gateway, frame, now),
            event @ ("broadcast_ice_candidates" | "broadcast_invalidated_ice_candidates") => {
                let event = relayed_event(event);
                let candidates = frame.payload["candidates"].clone();
                for client in uuids(&frame.payload["client_ids"]) {
                    let payload = json!({ "gateway_id": gateway, "candidates": candidates });
                    self.push_to(Role::Client, client, event, payload);
                }
            }
            // Since 1.5.2 (portal-protocol.md section 12).
            "no_relays" if self.config.generation == Generation::Both => {
                let payload = json!({ "disconnected_ids": [], "connected": self.relays_for(id) });
                self.push(id, "relays_presence", payload);
            }
            _ => self.send(id, &Frame::error(frame, "unknown_message")),
        }
    }

    fn client_said(&mut self, id: ConnId, client: Uuid, frame: &Frame, now: Instant) {
        let Some(v2) = self.conns.get(&id).map(|c| c.login.v2) else { return };
        let gateways = match frame.event.as_str() {
            "set_snownet_capabilities" => return self.set_capabilities(id, frame),
            "request_authorization" if v2 => return self.requested(client, frame, now),
            "create_flow" if !v2 => return self.requested(client, frame, now),
            "new_gateway_ice_candidates" | "invalidated_gateway_ice_candidates" if v2 => {
                uuids(&json!([frame.payload["gateway_id"]]))
            }
            "broadcast_ice_candidates" | "broadcast_invalidated_ice_candidates" => {
                uuids(&frame.payload["gateway_ids"])
            }
            _ => return self.send(id, &Frame::error(frame, "unknown_message")),
        };
        let payload = json!({ "client_id": client, "candidates": frame.payload["candidates"] });
        for gateway in gateways {
            self.push_to(Role::Gateway, gateway, relayed_event(&frame.event), payload.clone());
        }
    }

    fn set_capabilities(&mut self, id: ConnId, frame: &Frame) {
        if let Some(conn) = self.conns.get_mut(&id) {
            // connections.md section 1.1: only the JSON value `true` counts.
            conn.iceless = frame.payload["iceless"] == json!(true);
        }
    }

    // ---- pushes -------------------------------------------------------------------------------

    /// Sends `init` to this connection.
    pub(super) fn push_init(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get(&id) else { return };
        let login = conn.login.clone();
        let device = self.device(&login);
        let relays = self.relays_for(id);
        let flow_logs = serde_json::to_value(&self.config.flow_logs).unwrap_or_default();
        let payload = match login.role {
            Role::Gateway => json!({
                "interface": { "ipv4": device.ipv4, "ipv6": device.ipv6 },
                "config": { "ipv4_masquerade_enabled": true, "ipv6_masquerade_enabled": true },
                "account_slug": self.config.account_slug,
                "relays": relays,
                "flow_logs": flow_logs,
                "authorizations": self.authorizations_of(device.id),
            }),
            Role::Client => json!({
                "interface": { "ipv4": device.ipv4, "ipv6": device.ipv6, "search_domain": null,
                    "upstream_dns": [], "upstream_do53": [], "upstream_doh": [] },
                "resources": self.config.resources.iter().map(|r| r.for_client(login.v2, site())).collect::<Vec<_>>(),
                "relays": relays,
                "authorizations": [],
                "flow_logs": flow_logs,
            }),
        };
        self.push(id, "init", payload);
    }

    /// Sends `init` again to every joined gateway.
    pub(super) fn push_init_to_gateways(&mut self) {
        for id in self.conns_of(Role::Gateway) {
            self.push_init(id);
        }
    }

    /// Replaces the relay list and tells everybody the difference (section 8.7).
    pub(super) fn set_relays(&mut self, relays: Vec<Relay>) {
        let old = std::mem::replace(&mut self.config.relays, relays);
        self.note_relay_secrets();
        let listed = |id: Uuid, list: &[Relay]| list.iter().any(|r| r.id == id);
        let disconnected: Vec<_> =
            old.iter().map(|r| r.id).filter(|id| !listed(*id, &self.config.relays)).collect();
        let added: Vec<_> = self.config.relays.iter().filter(|r| !listed(r.id, &old)).cloned().collect();
        self.push_presence(&disconnected, &added);
    }

    /// Sends `relays_presence` to everybody who joined.
    pub(super) fn push_presence(&mut self, disconnected: &[Uuid], connected: &[Relay]) {
        for id in self.conns_of(Role::Gateway).into_iter().chain(self.conns_of(Role::Client)) {
            let connected = self.entries_for(id, connected);
            self.push(
                id,
                "relays_presence",
                json!({ "disconnected_ids": disconnected, "connected": connected }),
            );
        }
    }

    /// Pushes to one device; false when it is not joined.
    pub(super) fn push_to(&mut self, role: Role, device: Uuid, event: &str, payload: Value) -> bool {
        let Some(id) = self.conn_of(role, device) else { return false };
        self.push(id, event, payload);
        true
    }

    /// Pushes to every joined device of this role; false when there was none.
    pub(super) fn push_all(&mut self, role: Role, event: &str, payload: &Value) -> bool {
        let ids = self.conns_of(role);
        for id in &ids {
            self.push(*id, event, payload.clone());
        }
        !ids.is_empty()
    }

    /// Sends text that need not be a frame, to every joined device of this role.
    pub(super) fn push_text(&mut self, role: Role, text: &str) {
        for id in self.conns_of(role) {
            self.queue(id, text.to_owned(), Duration::ZERO);
        }
    }

    fn push(&mut self, id: ConnId, event: &str, payload: Value) {
        let Some(conn) = self.conns.get(&id) else { return };
        let (role, device) = (conn.login.role, conn.device);
        let frame = Frame::push(role.topic(), event, payload);
        self.record(
            role,
            Some(device),
            Direction::FromPortal,
            serde_json::to_value(&frame).unwrap_or_default(),
        );
        let delay = self.delays.get(&role).copied().unwrap_or_default();
        self.queue(id, frame.encode(), delay);
    }

    fn send(&mut self, id: ConnId, frame: &Frame) {
        let Some(conn) = self.conns.get(&id) else { return };
        let (role, device) = (conn.login.role, conn.device);
        self.record(
            role,
            Some(device),
            Direction::FromPortal,
            serde_json::to_value(frame).unwrap_or_default(),
        );
        self.queue(id, frame.encode(), Duration::ZERO);
    }

    fn queue(&self, id: ConnId, text: String, delay: Duration) {
        if let Some(conn) = self.conns.get(&id) {
            // A task that ended already has no use for it; `unregister` follows.
            let _ = conn.out.send(Out::Text(text, Instant::now() + delay));
        }
    }

    // ---- small look-ups -----------------------------------------------------------------------

    fn conn_of(&self, role: Role, device: Uuid) -> Option<ConnId> {
        let matches = |c: &Conn| c.login.role == role && c.device == device && c.joined;
        self.conns.iter().rev().find(|(_, c)| matches(c)).map(|(id, _)| *id)
    }

    fn conns_of(&self, role: Role) -> Vec<ConnId> {
        self.conns.iter().filter(|(_, c)| c.login.role == role && c.joined).map(|(id, _)| *id).collect()
    }

    fn relays_for(&mut self, id: ConnId) -> Vec<Value> {
        if self.config.hold_relays {
            return Vec::new();
        }
        let relays = self.config.relays.clone();
        self.entries_for(id, &relays)
    }

    fn entries_for(&mut self, id: ConnId, relays: &[Relay]) -> Vec<Value> {
        let Some(conn) = self.conns.get(&id) else { return Vec::new() };
        let mut entries = Vec::new();
        for relay in relays {
            let credentials = relay.credentials(&conn.login.public_key);
            entries.extend(relay.entries(&credentials));
            self.secrets.insert(Secret { kind: "turn password", value: credentials.password });
        }
        entries
    }

    fn note_relay_secrets(&mut self) {
        use super::config::Scheme::{Rest, Stamp};
        for relay in &self.config.relays {
            let (Rest(secret) | Stamp(secret)) = &relay.scheme;
            self.secrets.insert(Secret { kind: "relay secret", value: secret.clone() });
        }
    }

    pub(super) fn record(&mut self, peer: Role, device: Option<Uuid>, dir: Direction, msg: Value) {
        let at = Instant::now();
        let entry = Entry { t: at.duration_since(self.started), at, peer, device, dir, msg };
        if self.echo {
            println!("{}", serde_json::to_string(&entry).unwrap_or_default());
        }
        self.log.push(entry);
    }
}

/// The one site all stand-in gateways belong to.
fn site() -> Uuid {
    derive::uuid_from("site")
}

/// What the other end is told when one end broadcast candidates.
fn relayed_event(event: &str) -> &'static str {
    if event.contains("invalidated") { "invalidate_ice_candidates" } else { "ice_candidates" }
}

fn uuids(list: &Value) -> Vec<Uuid> {
    let parse = |id: &Value| id.as_str().and_then(|id| Uuid::parse_str(id).ok());
    list.as_array().into_iter().flatten().filter_map(parse).collect()
}
