//! What the portal knows and decides; no sockets, no clock of its own.
//!
//! The server hands frames in, the script's orders come in through [`super::Portal`], and everything
//! that must be sent goes into the connection's queue. One lock is around all of it.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::admit::{Login, Refusal};
use super::config::{Config, Relay, Resource};
use super::derive::{self, End};
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
    ingest_key: [u8; 32],
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
                let nth = u8::try_from(nth).unwrap_or(u8::MAX);
                let net = match login.role {
                    Role::Gateway => 1_u8,
                    Role::Client => 2,
                };
                Device {
                    id: derive::uuid_from(&format!("{} {}", login.role.topic(), login.external_id)),
                    // Planned devices may hold the low addresses.
                    ipv4: Ipv4Addr::new(100, 64, net, 100_u8.saturating_add(nth)),
                    ipv6: Ipv6Addr::new(0xfd00, 0x2021, 0x1111, 0, 0, 0, net.into(), 0x100 + u16::from(nth)),
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
                Role::Gateway => self.from_gateway(id, device, &frame, now),
                Role::Client => self.from_client(id, device, &frame, now),
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

    fn from_gateway(&mut self, id: ConnId, gateway: Uuid, frame: &Frame, now: Instant) {
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
            "no_relays" => {
                let payload = json!({ "disconnected_ids": [], "connected": self.relays_for(id) });
                self.push(id, "relays_presence", payload);
            }
            _ => self.send(id, &Frame::error(frame, "unknown_message")),
        }
    }

    fn from_client(&mut self, id: ConnId, client: Uuid, frame: &Frame, now: Instant) {
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

    // ---- authorizations -----------------------------------------------------------------------

    fn requested(&mut self, client: Uuid, frame: &Frame, now: Instant) {
        let Some(resource) = frame.payload["resource_id"].as_str().and_then(|id| Uuid::parse_str(id).ok())
        else {
            return;
        };
        let connected = uuids(&frame.payload["connected_gateway_ids"]);
        if let Err(reason) = self.authorize(client, resource, &connected, now) {
            self.tell_failure(client, resource, reason);
        }
    }

    /// Pushes an authorization to a gateway; the client hears of it after the acknowledgement.
    pub(super) fn authorize(
        &mut self,
        client: Uuid,
        resource: Uuid,
        connected: &[Uuid],
        now: Instant,
    ) -> Result<(), &'static str> {
        if self.denied.contains(&(client, resource)) {
            return Err("forbidden");
        }
        let resource = self.config.resources.iter().find(|r| r.id == resource).cloned().ok_or("not_found")?;
        // Those the client is connected to already come first (section 10).
        let mut eligible: Vec<_> = self.online(Role::Gateway);
        eligible.sort_by_key(|id| !connected.contains(id));
        let gateway = *eligible.first().ok_or("offline")?;
        let gateway_conn = self.conn_of(Role::Gateway, gateway).ok_or("offline")?;
        let client_conn = self.conn_of(Role::Client, client).ok_or("offline")?;
        self.push_authorization(gateway_conn, client_conn, &resource, now);
        Ok(())
    }

    fn push_authorization(
        &mut self,
        gateway_conn: ConnId,
        client_conn: ConnId,
        resource: &Resource,
        now: Instant,
    ) {
        let (g, c) = (&self.conns[&gateway_conn], &self.conns[&client_conn]);
        let (g_login, c_login) = (g.login.clone(), c.login.clone());
        let use_iceless = self.config.iceless && g.iceless && c.iceless;
        let (gateway, client) = (self.device(&g_login), self.device(&c_login));
        let g_end = End { id: gateway.id, public_key: &g_login.public_key, secret: &gateway.secret };
        let c_end = End { id: client.id, public_key: &c_login.public_key, secret: &client.secret };
        let (client_ice, gateway_ice) = derive::ice_credentials(c_end, g_end);
        let psk = derive::preshared_key(c_end, g_end);
        let expires_at = self.config.expiry.map(|lasts| unix_now() + lasts.as_secs());
        let token = |role| self.ingest_token(role, client.id, gateway.id, resource, expires_at);
        let (responder, initiator) = (token("responder"), token("initiator"));
        self.next_ref += 1;
        let reference = format!("standin-ref-{:08}-{:016x}", self.next_ref, rand::random::<u64>());

        let for_gateway = json!({
            "ref": reference,
            "resource": resource.for_gateway(),
            "client": {
                "id": client.id, "public_key": c_login.public_key, "preshared_key": psk,
                "ipv4": client.ipv4, "ipv6": client.ipv6, "version": "1.5.12",
                "device_os_name": "Debian", "device_os_version": null, "device_serial": null,
                "device_uuid": null, "identifier_for_vendor": null, "firebase_installation_id": null,
            },
            "subject": { "actor_id": derive::uuid_from("actor"), "actor_name": "Stand-in Actor",
                "actor_email": null, "auth_provider_id": null },
            "client_ice_credentials": client_ice.to_json(),
            "gateway_ice_credentials": gateway_ice.to_json(),
            "expires_at": expires_at,
            "use_iceless": use_iceless,
            "flow_logs_ingest_token": responder,
        });
        let mut tell_client = json!({
            "resource_id": resource.id, "preshared_key": psk,
            "client_ice_credentials": client_ice.to_json(),
            "gateway_ice_credentials": gateway_ice.to_json(),
            "gateway_id": gateway.id, "gateway_public_key": g_login.public_key,
            "gateway_ipv4": gateway.ipv4, "gateway_ipv6": gateway.ipv6,
            "use_iceless": use_iceless, "flow_logs_ingest_token": initiator,
        });
        tell_client[if c_login.v2 { "site_id" } else { "gateway_group_id" }] = json!(site());
        let secrets = [
            ("psk", psk),
            ("ice password", client_ice.password),
            ("ice password", gateway_ice.password),
            ("ingest token", responder),
            ("ingest token", initiator),
        ];
        self.secrets.extend(secrets.map(|(kind, value)| Secret { kind, value }));

        let timing = self.timings.len();
        self.timings.push(Timing {
            client: client.id,
            resource: resource.id,
            pushed: now,
            acknowledged: None,
        });
        let deadline = now + self.config.acknowledge_timeout;
        self.pending.insert(
            reference,
            Pending {
                client: client.id,
                gateway: gateway.id,
                resource: resource.id,
                use_iceless,
                expires_at,
                timing,
                deadline,
                tell_client,
            },
        );
        self.push(
            gateway_conn,
            if g_login.v2 { "create_authorization" } else { "authorize_flow" },
            for_gateway,
        );
    }

    fn acknowledge(&mut self, id: ConnId, gateway: Uuid, frame: &Frame, now: Instant) {
        let pending = frame.payload["ref"]
            .as_str()
            .filter(|reference| self.pending.get(*reference).is_some_and(|p| p.gateway == gateway))
            .and_then(|reference| self.pending.remove(reference));
        let Some(pending) = pending else {
            return self.send(id, &Frame::error(frame, "invalid_ref"));
        };
        self.timings[pending.timing].acknowledged = Some(now);
        self.granted
            .insert((pending.client, pending.resource), Grant { gateway, expires_at: pending.expires_at });
        // Both ends are told the value the pair was set up with, whatever capabilities arrived since.
        debug_assert_eq!(pending.tell_client["use_iceless"], json!(pending.use_iceless));
        if let Some(conn) = self.conn_of(Role::Client, pending.client) {
            let event = if self.conns[&conn].login.v2 { "authorization_created" } else { "flow_created" };
            self.push(conn, event, pending.tell_client);
        }
        self.send(id, &Frame::ok(frame));
    }

    /// Tells clients whose gateway did not acknowledge in time (section 8.2).
    pub(super) fn handle_timeout(&mut self, now: Instant) {
        let late: Vec<_> = self
            .pending
            .iter()
            .filter(|(_, p)| now >= p.deadline)
            .map(|(reference, _)| reference.clone())
            .collect();
        for reference in late {
            if let Some(pending) = self.pending.remove(&reference) {
                let msg = json!({ "event": "acknowledge_timeout", "payload": { "client_id": pending.client, "resource_id": pending.resource } });
                self.record(Role::Gateway, Some(pending.gateway), Direction::Note, msg);
                self.tell_failure(pending.client, pending.resource, "offline");
            }
        }
    }

    /// The spec does not record how a client hears of a failure; this pair of names is the stand-ins' own.
    fn tell_failure(&mut self, client: Uuid, resource: Uuid, reason: &str) {
        if let Some(conn) = self.conn_of(Role::Client, client) {
            let event = if self.conns[&conn].login.v2 {
                "authorization_creation_failed"
            } else {
                "flow_creation_failed"
            };
            self.push(conn, event, json!({ "resource_id": resource, "reason": reason }));
        }
    }

    /// Withdraws one authorization; returns false when no gateway that holds it is online.
    pub(super) fn reject_access(&mut self, client: Uuid, resource: Uuid) -> bool {
        let grant = self.granted.remove(&(client, resource));
        let payload = json!({ "client_id": client, "resource_id": resource });
        match grant {
            Some(grant) => self.push_to(Role::Gateway, grant.gateway, "reject_access", payload),
            None => self.push_all(Role::Gateway, "reject_access", &payload),
        }
    }

    /// Forgets an authorization without telling the gateway: the next `init` lacks it.
    pub(super) fn forget(&mut self, client: Uuid, resource: Uuid) {
        self.granted.remove(&(client, resource));
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

    /// The complete list of non-expired authorizations of this gateway (section 8.1).
    fn authorizations_of(&self, gateway: Uuid) -> Vec<Value> {
        let now = unix_now();
        self.granted
            .iter()
            .filter(|(_, grant)| grant.gateway == gateway && grant.expires_at.is_none_or(|at| at > now))
            .map(|((client, resource), grant)| {
                json!({ "client_id": client, "resource_id": resource, "expires_at": grant.expires_at })
            })
            .collect()
    }

    fn ingest_token(
        &self,
        role: &str,
        client: Uuid,
        gateway: Uuid,
        resource: &Resource,
        expires_at: Option<u64>,
    ) -> String {
        let now = unix_now();
        let expires = expires_at.unwrap_or(now + 14 * 24 * 3600);
        let claims = json!({
            "account_id": derive::uuid_from("account"), "iat": now, "exp": expires + 30 * 24 * 3600,
            "uploads_enabled": self.config.flow_logs.upload_interval_secs > 0, "role": role,
            "initiator_device_id": client, "responder_device_id": gateway,
            "policy_authorization_id": derive::uuid_from(&format!("authorization {client} {}", resource.id)),
            "policy_id": derive::uuid_from("policy"), "resource_id": resource.id, "resource_name": resource.name,
            "initiator_actor_id": derive::uuid_from("actor"), "initiator_actor_name": "Stand-in Actor",
            "authorized_at": rfc3339(now), "authorization_expires_at": rfc3339(expires),
        });
        derive::jwt(&claims, &self.ingest_key)
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

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// `2026-11-22T12:53:10Z`, from seconds since 1970 (days to civil date after Howard Hinnant's algorithm).
fn rfc3339(unix: u64) -> String {
    let (days, second) = (unix / 86_400 + 719_468, unix % 86_400);
    let era = days / 146_097;
    let doe = days % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_written_in_rfc_3339() {
        for (unix, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (1_700_000_000, "2023-11-14T22:13:20Z"),
            (2_145_916_800, "2038-01-01T00:00:00Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(unix), text);
        }
    }
}
