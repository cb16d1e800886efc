//! Everything that is rare: relays, ICE, authorizations, timers. It hears STUN and TURN only.
//!
//! [`Control`] is the spine. What happened comes in by `handle_*`; it finds the client concerned, lets that client's
//! connection react, and notes what is to be told. Then drain `poll_command`, `poll_transmit`, `poll_egress` and
//! `poll_event` in this order until each is empty, and ask `poll_timeout`.
//!
//! ```text
//! Ingress ------> authorizations --+                     +--> Command::Client, one per changed client
//! WorkerEvent --> relay? router? --+--> connection (ICE) +--> Transmit, through a channel where it must
//! time ---------> due clients -----+        | relays     +--> Egress: acknowledgements, candidates
//! ```
//!
//! It must not know sockets, WireGuard or inner packets.

mod agent;
mod authorizations;
mod candidates;
mod connection;
mod depths;
mod early;
mod hold;
mod index;
mod ingress;
mod names;
mod placement;
mod resolutions;
mod shared;
mod stun_router;
mod timers;
mod upkeep;
mod views;

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use gateway_common::Counters;
use rand::{Rng, SeedableRng, rngs::StdRng};
use rustc_hash::{FxHashMap, FxHashSet};
use tracing::{debug, info};

use self::{
    authorizations::{Authorizations, Parked, WallClock},
    connection::Connection,
    early::Early,
    index::Indices,
    names::ClientNames,
    placement::Placement,
    resolutions::Resolutions,
    shared::Shared,
    timers::Timers,
};
pub use self::{connection::PathKind, depths::Depths, views::ClientView};
use crate::{
    addr::TunnelAddrs,
    command::{self, Command, WorkerEvent},
    flow::Attribution,
    ids::{ClientId, ConnectionIndex, RelayId, WorkerId},
    names::DomainName,
    portal::messages::{Egress, FlowLogs, Ingress},
    relay::Relays,
    sink::Transmit,
};

/// The portal gives up on an authorization so long after it asked (portal-protocol.md section 8.2).
const ACKNOWLEDGEMENT_LIFE: Duration = Duration::from_secs(15);
/// What control starts from.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Feeds indices, tie-breakers, transaction ids and the choice among relays. It must not be guessable.
    pub seed: u64,
    /// The time since 1970-01-01 UTC at `now`; later see [`Control::handle_wall_clock`].
    pub unix_now: Duration,
    /// The present.
    pub now: Instant,
    /// The workers that clients are placed on.
    pub workers: Workers,
    /// Account flows whatever the portal says (`--flow-logs`).
    pub flow_logs: bool,
}

/// What control must know of the data plane to place clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workers {
    /// How many there are, at least one.
    pub count: usize,
    /// Nothing steers packets to the owner of their client: the kernel brings all packets of one path to one worker of
    /// its choice, so a client is best at home where its path arrives.
    pub by_arrival: bool,
}

impl Workers {
    /// A single worker.
    pub const ONE: Self = Self { count: 1, by_arrival: false };
}

/// What the shell has to do besides sending.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Our tunnel addresses: configure the interface and bind what serves on it. Sent for every `init`.
    Interface(TunnelAddrs),
    /// New flow-log settings.
    FlowLogs(FlowLogs),
    /// Look this name up, both families, and say what became of it by [`Control::handle_resolved`].
    Resolve(DomainName),
    /// An authorization came with a token under which its flows may be uploaded. Sent whenever it comes anew.
    IngestToken(Arc<Attribution>),
}

/// How things are, for health and metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Status {
    /// Relays that have answered.
    pub relays: usize,
    /// Clients with at least one authorization.
    pub clients: usize,
    /// Connections without a path yet.
    pub connecting: usize,
    /// Connections by the kind of their path.
    pub peer_to_peer: usize,
    /// See [`PathKind::PeerToRelay`].
    pub peer_to_relay: usize,
    /// See [`PathKind::RelayToPeer`].
    pub relay_to_peer: usize,
    /// See [`PathKind::RelayToRelay`].
    pub relay_to_relay: usize,
}

/// The control plane's state machine.
pub struct Control {
    clients: FxHashMap<ClientId, Client>,
    shared: Shared,
    placement: Placement,
    timers: Timers<ClientId>,
    parked: Parked,
    early: Early,
    clock: WallClock,
    /// Account flows whatever the portal says.
    always_accounting: bool,
    /// What the workers were told.
    accounting: bool,
    /// The serial of the latest answer about a name.
    last_answer: u64,
    resolutions: Resolutions,
    indices: Indices,
    indices_in_use: FxHashSet<ConnectionIndex>,
    answered_relays: FxHashSet<RelayId>,
    rng: StdRng,
    portal_is_connected: bool,
    commands: VecDeque<Command>,
    /// Clients whose state the workers do not have yet, each once.
    changed: VecDeque<ClientId>,
    is_changed: FxHashSet<ClientId>,
    shutdown: bool,
    egress: VecDeque<(Instant, Egress)>,
    events: VecDeque<Event>,
    counters: Counters,
}

/// One client: what it may reach and how it is reached.
struct Client {
    tunnel: TunnelAddrs,
    authorizations: Authorizations,
    /// `None` after it failed, until the client is authorized again (connections.md section 5.2).
    connection: Option<Box<Connection>>,
    path: Option<command::Path>,
    names: ClientNames,
}

impl Control {
    /// Knows nobody; the portal counts as away until [`Control::handle_portal_connected`].
    #[must_use]
    pub fn new(config: Config) -> Self {
        let mut rng = StdRng::seed_from_u64(config.seed);
        let mut control = Self {
            clients: FxHashMap::default(),
            shared: Shared::new(Relays::new(rng.random())),
            placement: Placement::new(config.workers),
            timers: Timers::new(),
            parked: Parked::default(),
            early: Early::default(),
            clock: WallClock::new(config.unix_now, config.now),
            always_accounting: config.flow_logs,
            accounting: false,
            last_answer: 0,
            resolutions: Resolutions::default(),
            indices: Indices::new(&mut rng),
            indices_in_use: FxHashSet::default(),
            answered_relays: FxHashSet::default(),
            rng,
            portal_is_connected: false,
            commands: VecDeque::new(),
            changed: VecDeque::new(),
            is_changed: FxHashSet::default(),
            shutdown: false,
            egress: VecDeque::new(),
            events: VecDeque::new(),
            counters: Counters::default(),
        };
        control.tell_clock(config.unix_now, config.now);
        control.account(None);
        control
    }

    /// The portal's channel is joined: what was held is sent.
    pub fn handle_portal_connected(&mut self, now: Instant) {
        self.portal_is_connected = true;
        self.egress.retain(|(at, _)| now.duration_since(*at) < ACKNOWLEDGEMENT_LIFE);
    }

    /// The portal is away: candidates are held, everything else goes on.
    pub fn handle_portal_disconnected(&mut self, _now: Instant) {
        self.portal_is_connected = false;
        // The `init` after the next join brings relays anyway.
        self.egress.retain(|(_, egress)| *egress != Egress::NoRelays);
    }

    /// The portal says something.
    pub fn handle_ingress(&mut self, message: Ingress, now: Instant) {
        match message {
            Ingress::Init(init) => self.on_init(*init, now),
            Ingress::Authorize(authorize) => self.on_authorize(authorize, now),
            Ingress::RejectAccess(client, resource) => self.on_reject_access(client, resource, now),
            Ingress::ResourceUpdated(resource) => self.on_resource_updated(&resource),
            Ingress::IceCandidates(client, lines) => self.on_candidates(client, lines, now),
            Ingress::InvalidateIceCandidates(client, lines) => {
                self.early.invalidate(client, &lines);
                self.touch(client, now, |c, shared| c.remove_remote(&lines, shared, now));
            }
            Ingress::RelaysPresence { disconnected, connected } => {
                self.shared.relays.update(&disconnected, &connected, now);
            }
            Ingress::ExpiryUpdated(client, resource, expires) => {
                self.on_expiry_updated(client, resource, expires, now);
            }
        }
        self.settle(now);
    }

    /// A worker saw something.
    pub fn handle_worker_event(&mut self, event: WorkerEvent, now: Instant) {
        match event {
            WorkerEvent::Stun(datagram) => self.on_stun(&datagram, now),
            WorkerEvent::Adopted { id, order, .. } => {
                if self.placement.on_adopted(id, order) {
                    self.mark_changed(id);
                }
            }
            WorkerEvent::Established { id, index } => {
                if self.is_current(id, index) {
                    debug!(client = %id, "Session established");
                    self.touch(id, now, |connection, _| connection.on_activity(now));
                }
            }
            WorkerEvent::Expired { id, index } => {
                if self.is_current(id, index) {
                    debug!(client = %id, "WireGuard gave up");
                    self.fail(id);
                }
            }
            WorkerEvent::Activity { id, index, at } => {
                if self.is_current(id, index) {
                    self.placement.on_activity(id, at);
                    self.touch(id, now, |connection, _| connection.on_activity(at));
                }
            }
            WorkerEvent::Goodbye { id, index } => {
                if self.is_current(id, index) {
                    info!(client = %id, "Client said goodbye");
                    self.remove_client(id);
                }
            }
            WorkerEvent::Assigned { id, index, assigned } => {
                if self.is_current(id, index) {
                    self.on_assigned(id, index, *assigned);
                }
            }
            // The shell's.
            WorkerEvent::Flow(_) | WorkerEvent::Denied(_) | WorkerEvent::Replied(_) => {}
            WorkerEvent::ChannelsUsed(used) => self.shared.relays.handle_channels_used(&used, now),
        }
        self.settle(now);
    }

    /// The wall clock shows `unix_now`, counted from 1970-01-01 UTC: to be told with every tick and whenever the clock
    /// was set, because what the portal grants ends by it. It costs nothing while the two clocks agree.
    pub fn handle_wall_clock(&mut self, unix_now: Duration, now: Instant) {
        if !self.clock.set(unix_now, now) {
            return;
        }
        info!("The wall clock was set, access ends by what it shows now");
        self.tell_clock(unix_now, now);
        let ids: Vec<ClientId> = self.clients.keys().copied().collect();
        for id in ids {
            self.expire_authorizations(id, now);
            self.schedule(id);
        }
        self.settle(now);
    }

    /// Time passed: does what is due, for those only for whom it is.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.shared.relays.handle_timeout(now);
        self.early.expire(now);
        let unserved = self.parked.expire(now);
        if unserved > 0 {
            info!(unserved, "Authorizations found no relay in time");
        }
        if let Some(id) = self.placement.handle_timeout(now) {
            debug!(client = %id, "Moving to another worker, for balance");
            self.mark_changed(id);
        }
        while let Some(id) = self.timers.pop_due(now) {
            self.expire_authorizations(id, now);
            self.touch(id, now, |_, _| ());
        }
        self.settle(now);
    }

    /// Says goodbye to everybody.
    pub fn shutdown(&mut self, _now: Instant) {
        self.shutdown = true;
    }

    /// The next command for the workers.
    pub fn poll_command(&mut self) -> Option<Command> {
        if let Some(command) = self.commands.pop_front() {
            return Some(command);
        }
        if let Some(id) = self.changed.pop_front() {
            self.is_changed.remove(&id);
            let home = self.placement.tell(id);
            return Some(Command::Client { id, home, desired: self.client_state(id) });
        }
        std::mem::take(&mut self.shutdown).then_some(Command::Shutdown)
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        // A CHANNEL_BIND must be on its way before what uses its channel.
        self.shared.relays.poll_transmit().or_else(|| self.shared.transmits.pop_front())
    }

    /// The next message for the portal; none while it is away.
    pub fn poll_egress(&mut self) -> Option<Egress> {
        if !self.portal_is_connected {
            return None;
        }
        let queued = self.egress.pop_front().map(|(_, egress)| egress);
        queued.or_else(|| self.shared.signals.poll())
    }

    /// The next thing for the shell to do.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Control::handle_timeout`] is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        [
            self.shared.relays.poll_timeout(),
            self.timers.earliest(),
            self.parked.deadline(),
            self.placement.poll_timeout(),
            self.early.deadline(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// What was dropped, by reason.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut counters = self.counters.clone();
        counters.merge(self.shared.relays.counters());
        counters
    }

    /// Could a connection be made now?
    #[must_use]
    pub fn is_relay_usable(&self) -> bool {
        self.shared.relays.is_usable()
    }

    /// The worker that holds the client, or is about to.
    #[must_use]
    pub fn home_of(&self, client: ClientId) -> Option<WorkerId> {
        self.placement.home(client)
    }

    /// Clients of each worker, in the order of the workers; who is on the way counts where it goes to.
    pub fn clients_by_worker(&self) -> impl Iterator<Item = usize> + '_ {
        self.placement.clients()
    }

    /// Smoothed round-trip times of the relays that have answered.
    pub fn relay_rtts(&self) -> impl Iterator<Item = (RelayId, Duration)> + '_ {
        self.shared.relays.rtts()
    }

    /// How things are. Looks at every client: not for each packet.
    #[must_use]
    pub fn status(&self) -> Status {
        let mut status = Status {
            relays: self.shared.relays.rtts().count(),
            clients: self.clients.len(),
            ..Status::default()
        };
        for connection in self.clients.values().filter_map(|c| c.connection.as_ref()) {
            *match connection.path_kind() {
                None => &mut status.connecting,
                Some(PathKind::PeerToPeer) => &mut status.peer_to_peer,
                Some(PathKind::PeerToRelay) => &mut status.peer_to_relay,
                Some(PathKind::RelayToPeer) => &mut status.relay_to_peer,
                Some(PathKind::RelayToRelay) => &mut status.relay_to_relay,
            } += 1;
        }
        status
    }
}

#[cfg(test)]
mod replay;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;
