//! What `status` and `flows` tell, and how it is put together from what the event loop and the workers say.
//!
//! The fields are the protocol: ours may be added, none may change its meaning within one version. Volumes are in bytes of
//! inner packets with their IP headers, times in seconds.

use std::{
    collections::{BTreeMap, HashMap},
    time::SystemTime,
};

use gateway_proto::{
    ClientId,
    command::Path,
    control::{ClientView, PathKind},
    inquiry::{Answer, ClientFigures, OpenFlow, PAGE, Question},
    portal::messages::{Filter, Resource, ResourceKind},
    relay::{RelayState, RelayView},
    worker,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::ask::{Asker, Overview};
use crate::{
    data::{TUN_NAME, fast},
    dns::Count,
    portal::COMPAT_VERSION,
};

/// How a gateway is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Of the program.
    pub version: String,
    /// What it tells the portal.
    pub compat_version: String,
    /// Process id, in its own namespace.
    pub pid: u32,
    /// Since it was started.
    pub uptime_seconds: f64,
    /// As /readyz says.
    pub ready: bool,
    /// Conditions of readiness that do not hold.
    pub missing: Vec<String>,
    /// The portal.
    pub portal: Portal,
    /// The tunnel's device.
    pub tun: Tun,
    /// The DNS servers.
    pub dns: Dns,
    /// What the kernel does for us: by its name, whether it is in use.
    pub capabilities: BTreeMap<String, bool>,
    /// Why some are not.
    pub capabilities_missing: BTreeMap<String, String>,
    /// The fast path.
    pub fast_path: FastPath,
    /// Dropped packets by reason, those that there were.
    pub drops: BTreeMap<String, u64>,
    /// Each worker.
    pub workers: Vec<Worker>,
    /// Each relay, ascending by id.
    pub relays: Vec<Relay>,
    /// How many clients have an authorization.
    pub clients_total: usize,
    /// They, ascending by id; 10 000 at most.
    pub clients: Vec<Client>,
}

/// The connection to the portal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Portal {
    /// The channel is joined.
    pub connected: bool,
    /// For how long it is not.
    pub away_seconds: Option<f64>,
    /// Times that it was joined.
    pub joins: u64,
    /// Connections that were not made or ended.
    pub failures: u64,
}

/// The tunnel's device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tun {
    /// Its name.
    pub name: String,
    /// It has its addresses.
    pub up: bool,
    /// These, once the portal told.
    pub addresses: Vec<String>,
}

/// The DNS servers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Dns {
    /// On all addresses of the tunnel.
    pub listening: bool,
    /// By UDP and TCP.
    pub queries: u64,
    /// A nameserver's answer went back.
    pub answered: u64,
    /// No nameserver had one.
    pub failed: u64,
}

/// The fast path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FastPath {
    /// Frames are decided about.
    pub on: bool,
    /// The interface that it has, whether or not it is switched off.
    pub interface: Option<String>,
    /// How it has it: generic, native or zerocopy.
    pub mode: Option<String>,
    /// For people: what is in use and why not more.
    pub words: String,
}

impl From<&fast::Status> for FastPath {
    fn from(status: &fast::Status) -> Self {
        Self {
            on: status.on,
            interface: status.interface.clone(),
            mode: status.mode.map(|mode| mode.label().to_owned()),
            words: status.to_string(),
        }
    }
}

/// One worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Worker {
    /// Its number.
    pub id: usize,
    /// The share of the last 10 s in which it did not sleep.
    pub busy_share: f64,
    /// Clients that it holds.
    pub clients: usize,
    /// From clients.
    pub outbound: Volume,
    /// To clients.
    pub inbound: Volume,
    /// Packets passed to other workers.
    pub handed_over: u64,
    /// Passed to it and not read.
    pub handover_bytes_waiting: usize,
    /// Commands not seen.
    pub commands_waiting: usize,
}

/// Packets and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Volume {
    /// How many.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// One relay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Relay {
    /// The portal's name.
    pub id: String,
    /// As the portal told.
    pub addresses: Vec<String>,
    /// The one in use.
    pub active: Option<String>,
    /// silent, answering, allocated or failed.
    pub state: String,
    /// Smoothed.
    pub rtt_seconds: Option<f64>,
    /// Our addresses on it.
    pub relayed: Vec<String>,
    /// Channels that are bound.
    pub channels: usize,
}

/// One client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Client {
    /// The portal's name.
    pub id: String,
    /// IPv4, IPv6.
    pub tunnel: [String; 2],
    /// Who holds it.
    pub worker: Option<usize>,
    /// none, connecting or connected.
    pub connection: String,
    /// The way to it.
    pub path: Option<Way>,
    /// Since its session was made; without one there is none.
    pub handshake_age_seconds: Option<f64>,
    /// From it. Volumes and what follows are those that its worker knows; one that moves at this moment has none.
    pub outbound: Volume,
    /// To it.
    pub inbound: Volume,
    /// Translated sessions to DNS resources.
    pub translated: usize,
    /// `None` while flows are not counted.
    pub flows: Option<usize>,
    /// Names of DNS resources that it uses.
    pub names: usize,
    /// What it may reach, ascending by id.
    pub resources: Vec<Granted>,
}

/// The way to a client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// direct, or relayed through a relay of ours.
    pub kind: String,
    /// `peer_to_peer` and so on, as the metric's label: our end, then the client's.
    pub ends: String,
    /// The client's address and port, or those on its relay.
    pub endpoint: String,
    /// Our address and port, where it is direct.
    pub local: Option<String>,
    /// Our relay, where it is not.
    pub relay: Option<String>,
    /// The channel on it, once it is bound.
    pub channel: Option<u16>,
}

/// A resource that a client may reach.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    /// The portal's name.
    pub id: String,
    /// For people; empty for the Internet resource.
    pub name: String,
    /// cidr, dns or internet.
    pub kind: String,
    /// Network or pattern.
    pub address: String,
    /// What it permits; empty for everything.
    pub filters: Vec<String>,
    /// Since 1970-01-01 UTC; `None` if it does not end.
    pub expires_at: Option<u64>,
    /// To it by flows, payload only; `None` while flows are not counted.
    pub to_resource: Option<Volume>,
    /// From it.
    pub from_resource: Option<Volume>,
}

/// What `flows` tells.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Flows {
    /// Whether flows are counted.
    pub counted: bool,
    /// How many are open.
    pub open: usize,
    /// There were too many to look at all: newer ones may be missing.
    pub incomplete: bool,
    /// The newest first.
    pub flows: Vec<Flow>,
}

/// An open flow. Volumes are those of the payload.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Flow {
    /// Whose.
    pub client: String,
    /// To which resource.
    pub resource: String,
    /// tcp or udp.
    pub protocol: String,
    /// The client's side.
    pub src: String,
    /// The resource's side.
    pub dst: String,
    /// The name that the client reached it by.
    pub domain: Option<String>,
    /// Since it began.
    pub age_seconds: f64,
    /// Since its last packet.
    pub quiet_seconds: f64,
    /// To the resource.
    pub to_resource: Volume,
    /// From it.
    pub from_resource: Volume,
}

/// Asks and joins. `None` if somebody does not answer in time.
pub async fn look(asker: &Asker) -> Option<Value> {
    let overview = asker.overview().await?;
    let mut figures = Vec::new();
    let mut from = 0;
    loop {
        let mut all = 0;
        for answer in asker.workers(Question::Clients { from }).await? {
            if let Answer::Clients { clients, places } = answer {
                figures.extend(clients);
                all = all.max(places);
            }
        }
        from = from.saturating_add(PAGE);
        if from >= all {
            break;
        }
    }
    // Not on the event loop's thread.
    tokio::task::spawn_blocking(move || serde_json::to_value(assemble(&overview, figures)).ok()).await.ok()?
}

/// The newest open flows of all workers.
pub async fn flows(asker: &Asker, client: Option<ClientId>, most: usize) -> Option<Value> {
    let mut told = Flows { counted: false, open: 0, incomplete: false, flows: Vec::new() };
    for answer in asker.workers(Question::Flows { client, most }).await? {
        if let Answer::Flows { counted, open, flows, looked_at_all } = answer {
            told.counted |= counted;
            told.open += open;
            told.incomplete |= !looked_at_all;
            told.flows.extend(flows.iter().map(Flow::from));
        }
    }
    told.flows.sort_by(|a, b| a.age_seconds.total_cmp(&b.age_seconds));
    told.flows.truncate(most);
    serde_json::to_value(told).ok()
}

fn assemble(overview: &Overview, figures: Vec<ClientFigures>) -> Status {
    let snapshot = &overview.snapshot;
    let readiness = &snapshot.readiness;
    let missing = readiness.missing().map(str::to_owned).collect::<Vec<_>>();
    let (joins, failures) = readiness.portal_counts();
    let away = readiness.partition();
    let figures: HashMap<_, _> = figures.into_iter().map(|figures| (figures.id, figures)).collect();
    let mut clients: Vec<_> = overview.clients.iter().collect();
    clients.sort_unstable_by_key(|client| client.id);
    let mut relays: Vec<_> = overview.relays.iter().collect();
    relays.sort_unstable_by_key(|relay| relay.id);
    let mut drops = snapshot.worker_drops.clone();
    drops.merge(&snapshot.control_drops);
    drops.merge(&snapshot.kernel_drops);
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        compat_version: COMPAT_VERSION.to_owned(),
        pid: std::process::id(),
        uptime_seconds: SystemTime::now().duration_since(snapshot.started).unwrap_or_default().as_secs_f64(),
        ready: missing.is_empty(),
        missing,
        portal: Portal {
            connected: away.is_none(),
            away_seconds: away.map(|away| away.as_secs_f64()),
            joins,
            failures,
        },
        tun: Tun {
            name: TUN_NAME.to_owned(),
            up: readiness.tun.holds(),
            addresses: overview.own.map_or_else(Vec::new, |own| vec![own.v4.to_string(), own.v6.to_string()]),
        },
        dns: Dns {
            listening: snapshot.dns.listening.holds(),
            queries: snapshot.dns.get(Count::UdpQueries) + snapshot.dns.get(Count::TcpQueries),
            answered: snapshot.dns.get(Count::Answered),
            failed: snapshot.dns.get(Count::Failed),
        },
        capabilities: snapshot
            .capabilities
            .iter()
            .map(|(capability, in_use)| (capability.word().to_owned(), *in_use))
            .collect(),
        capabilities_missing: overview.missing.iter().cloned().collect(),
        fast_path: FastPath::from(&overview.fast_path),
        drops: drops.iter().map(|(reason, packets)| (reason.label().to_owned(), packets)).collect(),
        workers: snapshot.workers.iter().zip(&snapshot.clients_by_worker).map(worker).collect(),
        relays: relays.into_iter().map(Relay::from).collect(),
        clients_total: snapshot.status.clients,
        clients: clients.into_iter().map(|view| client(view, figures.get(&view.id))).collect(),
    }
}

fn worker((state, clients): (&crate::data::WorkerState, &usize)) -> Worker {
    let traffic = &state.traffic;
    let sum = |a: worker::Volume, b: worker::Volume| Volume {
        packets: a.packets + b.packets,
        bytes: a.bytes + b.bytes,
    };
    Worker {
        id: state.id.get(),
        busy_share: state.busy_share,
        clients: *clients,
        outbound: sum(traffic.outbound_direct, traffic.outbound_relayed),
        inbound: sum(traffic.inbound_direct, traffic.inbound_relayed),
        handed_over: state.work.handed_over,
        handover_bytes_waiting: state.handover_bytes_waiting,
        commands_waiting: state.commands_waiting,
    }
}

fn client(view: &ClientView, figures: Option<&ClientFigures>) -> Client {
    let by_resource = figures.map_or(&[][..], |figures| &figures.by_resource);
    let resources = view.resources.iter().map(|(resource, expires)| {
        let carried = by_resource.iter().find(|(id, ..)| *id == resource.id);
        Granted {
            expires_at: expires.map(|expires| expires.0),
            to_resource: carried.map(|(_, to, _)| (*to).into()),
            from_resource: carried.map(|(_, _, from)| (*from).into()),
            ..Granted::from(resource)
        }
    });
    Client {
        id: view.id.to_string(),
        tunnel: [view.tunnel.v4.to_string(), view.tunnel.v6.to_string()],
        worker: view.worker.map(gateway_proto::WorkerId::get),
        connection: match (view.has_connection, view.path) {
            (false, _) => "none",
            (true, None) => "connecting",
            (true, Some(_)) => "connected",
        }
        .to_owned(),
        path: view.path.map(|path| way(path, view.kind)),
        handshake_age_seconds: figures.and_then(|figures| Some(figures.handshake_age?.as_secs_f64())),
        outbound: figures.map(|figures| figures.outbound.into()).unwrap_or_default(),
        inbound: figures.map(|figures| figures.inbound.into()).unwrap_or_default(),
        translated: figures.map_or(0, |figures| figures.translated),
        flows: figures.and_then(|figures| figures.flows),
        names: view.names.len(),
        resources: resources.collect(),
    }
}

fn way(path: Path, kind: Option<PathKind>) -> Way {
    let ends = match kind {
        Some(PathKind::PeerToPeer) => "peer_to_peer",
        Some(PathKind::PeerToRelay) => "peer_to_relay",
        Some(PathKind::RelayToPeer) => "relay_to_peer",
        Some(PathKind::RelayToRelay) => "relay_to_relay",
        None => "none",
    }
    .to_owned();
    match path {
        Path::Direct { local, remote } => Way {
            kind: "direct".to_owned(),
            ends,
            endpoint: remote.to_string(),
            local: Some(local.to_string()),
            relay: None,
            channel: None,
        },
        Path::Relayed { server, channel, remote } => Way {
            kind: "relayed".to_owned(),
            ends,
            endpoint: remote.to_string(),
            local: None,
            relay: Some(server.to_string()),
            channel,
        },
    }
}

impl From<worker::Volume> for Volume {
    fn from(worker::Volume { packets, bytes }: worker::Volume) -> Self {
        Self { packets, bytes }
    }
}

impl From<&Resource> for Granted {
    /// Without expiry and volumes.
    fn from(resource: &Resource) -> Self {
        let (kind, name, address, filters) = match &resource.kind {
            ResourceKind::Cidr { name, network, filters } => {
                ("cidr", name.as_str(), network.to_string(), &filters[..])
            }
            ResourceKind::Dns { name, pattern, filters } => {
                ("dns", name.as_str(), pattern.clone(), &filters[..])
            }
            ResourceKind::Internet => ("internet", "", String::new(), &[][..]),
        };
        Self {
            id: resource.id.to_string(),
            name: name.to_owned(),
            kind: kind.to_owned(),
            address,
            filters: filters.iter().map(filter).collect(),
            expires_at: None,
            to_resource: None,
            from_resource: None,
        }
    }
}

fn filter(filter: &Filter) -> String {
    let ports = |name: &str, first: u16, last: u16| match (first, last) {
        (0 | 1, u16::MAX) => name.to_owned(),
        _ if first == last => format!("{name} {first}"),
        _ if first > last => format!("{name} no port"),
        _ => format!("{name} {first}-{last}"),
    };
    match *filter {
        Filter::Tcp { first, last } => ports("tcp", first, last),
        Filter::Udp { first, last } => ports("udp", first, last),
        Filter::Icmp => "icmp".to_owned(),
    }
}

impl From<&RelayView> for Relay {
    fn from(view: &RelayView) -> Self {
        Self {
            id: view.id.to_string(),
            addresses: view.addresses.iter().map(ToString::to_string).collect(),
            active: view.active.map(|at| at.to_string()),
            state: match view.state {
                RelayState::Silent => "silent",
                RelayState::Answering => "answering",
                RelayState::Allocated => "allocated",
                RelayState::Failed => "failed",
            }
            .to_owned(),
            rtt_seconds: view.rtt.map(|rtt| rtt.as_secs_f64()),
            relayed: view.relayed.iter().map(ToString::to_string).collect(),
            channels: view.channels,
        }
    }
}

impl From<&OpenFlow> for Flow {
    fn from(flow: &OpenFlow) -> Self {
        Self {
            client: flow.client.to_string(),
            resource: flow.resource.to_string(),
            protocol: flow.protocol.label().to_owned(),
            src: flow.src.to_string(),
            dst: flow.dst.to_string(),
            domain: flow.domain.as_ref().map(|name| name.as_str().to_owned()),
            age_seconds: flow.age.as_secs_f64(),
            quiet_seconds: flow.quiet.as_secs_f64(),
            to_resource: flow.outbound.into(),
            from_resource: flow.inbound.into(),
        }
    }
}
