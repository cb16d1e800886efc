//! What control and workers tell each other.
//!
//! Commands describe *state*, not changes: of two commands for one key only the later matters, so a queue of them
//! coalesces per key, never drops, and is drained before every batch. Events have a quota per kind.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use zeroize::Zeroizing;

use crate::{
    addr::TunnelAddrs,
    flow::{Attributions, DeniedReport, FlowReport, Meeting},
    ids::{ClientId, ConnectionIndex, WorkerId},
    inquiry::{Inquiry, Reply},
    names::{AssignedIps, Names},
    portal::messages::Resource,
};

/// Control tells a worker what is true.
#[derive(Debug, Clone)]
pub enum Command {
    /// Our own tunnel addresses (from `init`).
    OwnAddrs(TunnelAddrs),
    /// What a client is; `None` once it has no authorization left. Every worker hears it, so that each can tell whose
    /// a packet is that reached it.
    Client {
        /// Whose state this is: the coalescing key.
        id: ClientId,
        /// Who holds it.
        home: Home,
        /// The state.
        desired: Option<Arc<ClientState>>,
    },
    /// Every server address of every relay in use: only these may send ChannelData.
    Relays(Arc<[SocketAddr]>),
    /// One channel of one relay. `(server, number)` is the coalescing key.
    Channel {
        /// The relay's address that our requests go to.
        server: SocketAddr,
        /// The channel number.
        number: u16,
        /// The peer at the far end once a bind is sent; `None` when the channel is gone or was refused.
        peer: Option<SocketAddr>,
    },
    /// Count flows and report them, or cease to. Off at first.
    Accounting {
        /// Whether.
        on: bool,
    },
    /// What the wall clock shows, at the start and whenever it was set: reports carry its times.
    WallClock(Meeting),
    /// An operator asks: to be answered by [`WorkerEvent::Replied`]. A later question takes the place of one that was not
    /// heard yet.
    Inquire(Inquiry),
    /// Say goodbye to every client and forget them (graceful shutdown).
    Shutdown,
}

/// Which worker holds a client's state: exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Home {
    /// The owner.
    pub worker: WorkerId,
    /// While the client moves: who gives its sessions to `worker`. Control names it from the order to move until it
    /// has heard [`WorkerEvent::Adopted`], and does not order another move before.
    pub from: Option<WorkerId>,
    /// The number of control's decision: every placement and every move of any client has a higher one. It tells a
    /// worker that missed commands in between (they coalesce) an order from an earlier one of the same words.
    pub order: u64,
}

impl Home {
    /// A client of `worker` that does not move, by the first of all decisions.
    #[must_use]
    pub fn at(worker: WorkerId) -> Self {
        Self { worker, from: None, order: 0 }
    }
}

/// All that a worker knows of one client.
#[derive(Debug, Clone)]
pub struct ClientState {
    /// The only source addresses the client may use.
    pub tunnel: TunnelAddrs,
    /// How to reach it.
    pub connection: Connection,
    /// Where authentic ICE checks of this connection came from, not through a channel of ours: its initiations may come
    /// from there, already before a pair is nominated. Bounded; empty without a connection.
    pub heard_from: Arc<[SocketAddr]>,
    /// What it may reach, complete.
    pub resources: Arc<[Resource]>,
    /// The names it has assigned addresses to, complete, and what it is to hear about them.
    pub names: Arc<Names>,
    /// Whom its flows are attributed to.
    pub attributions: Attributions,
}

impl ClientState {
    /// A client whose checks came from nowhere yet, without names and attributions.
    #[must_use]
    pub fn new(tunnel: TunnelAddrs, connection: Connection, resources: Arc<[Resource]>) -> Self {
        let (heard_from, names, attributions) = Default::default();
        Self { tunnel, connection, heard_from, resources, names, attributions }
    }
}

/// A client's connection as control wants it to be.
#[derive(Debug, Clone)]
pub enum Connection {
    /// There is none; authorizations are kept for a client that comes back (connections.md section 5.2).
    Absent,
    /// A worker that holds another `index` for this client drops that session state and starts afresh.
    Present(Arc<ConnectionKeys>, Option<Path>),
}

/// What makes a connection: fixed for its life. A new one gets a new index.
pub struct ConnectionKeys {
    /// The upper 24 bits of our WireGuard indices.
    pub index: ConnectionIndex,
    /// The client's X25519 public key.
    pub public_key: [u8; 32],
    /// The pair's preshared key.
    pub preshared_key: Zeroizing<[u8; 32]>,
    /// The first four bytes of the USERNAME in connectivity checks that are for us (connections.md section 5).
    pub ufrag: [u8; 4],
}

impl std::fmt::Debug for ConnectionKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConnectionKeys").field("index", &self.index).finish_non_exhaustive()
    }
}

/// The way to a client's nominated candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Path {
    /// From our host address; the peer may be a relay candidate of the client.
    Direct {
        /// Our address and port.
        local: SocketAddr,
        /// The client's (mapped or relayed) address.
        remote: SocketAddr,
    },
    /// ChannelData through our own allocation.
    Relayed {
        /// The relay's address.
        server: SocketAddr,
        /// The channel bound to the client's address; `None` while control is still binding one.
        channel: Option<u16>,
        /// The client's address, as the relay sees it.
        remote: SocketAddr,
    },
}

/// A worker tells control what it saw. Every variant has its own quota.
#[derive(Debug, Clone)]
pub enum WorkerEvent {
    /// A STUN or TURN message.
    Stun(StunDatagram),
    /// The first WireGuard session of this connection is confirmed: data flowed under it.
    Established {
        /// Whose.
        id: ClientId,
        /// Which connection: an event about an older one must be ignored.
        index: ConnectionIndex,
    },
    /// WireGuard gave up: an own initiation unanswered for 20 s, or every session long expired.
    Expired {
        /// Whose.
        id: ClientId,
        /// Which connection.
        index: ConnectionIndex,
    },
    /// Application data flowed. Sent at once after a quiet time of 5 s or more, then at most every 5 s.
    Activity {
        /// Whose.
        id: ClientId,
        /// Which connection.
        index: ConnectionIndex,
        /// When.
        at: Instant,
    },
    /// The client said goodbye through the tunnel (packets.md section 6.2).
    Goodbye {
        /// Whose.
        id: ClientId,
        /// Which connection.
        index: ConnectionIndex,
    },
    /// The client assigned proxy addresses to a name; the answer is one of [`Names::answers`].
    Assigned {
        /// Whose.
        id: ClientId,
        /// Which connection.
        index: ConnectionIndex,
        /// What it said.
        assigned: Box<AssignedIps>,
    },
    /// A flow began or ended. For the shell; control ignores it.
    Flow(Box<FlowReport>),
    /// A packet was denied. For the shell; control ignores it.
    Denied(Box<DeniedReport>),
    /// The answer to [`Command::Inquire`]. For the shell; control ignores it.
    Replied(Box<Reply>),
    /// A client that moved has arrived, with whatever sessions it had.
    Adopted {
        /// Whose.
        id: ClientId,
        /// Where it is now.
        worker: WorkerId,
        /// By which order, see [`Home::order`].
        order: u64,
    },
    /// Channels that carried data since the last such event, at most one event a second.
    ChannelsUsed(Vec<ChannelUse>),
}

/// Use of one channel since the last report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChannelUse {
    /// The relay's address.
    pub server: SocketAddr,
    /// The channel number.
    pub number: u16,
    /// Data came in on it.
    pub received: bool,
    /// Data went out on it.
    pub sent: bool,
}

/// A STUN message on its way to control.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StunDatagram {
    /// The worker whose socket it reached: where the kernel brings this path's packets when nothing steers them.
    pub heard_by: WorkerId,
    /// Our address and port it arrived on.
    pub local: SocketAddr,
    /// The sender; for a relayed message the channel's peer.
    pub from: SocketAddr,
    /// The relay whose channel carried it; `None` if it came without a ChannelData header.
    pub via: Option<SocketAddr>,
    /// The STUN message.
    pub payload: Vec<u8>,
}
