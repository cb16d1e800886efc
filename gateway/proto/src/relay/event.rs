//! What the TURN client tells control. Plain values: nothing in here knows how they come about.

use std::{net::SocketAddr, sync::Arc};

use crate::ids::RelayId;

/// An address of ours that a relay made known (connections.md section 6.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LocalCandidate {
    /// The local address a relay's first BINDING answer arrived on.
    Host(SocketAddr),
    /// The mapped address a relay saw.
    Reflexive {
        /// XOR-MAPPED-ADDRESS.
        addr: SocketAddr,
        /// The local address behind it.
        base: SocketAddr,
    },
    /// An address of our allocation.
    Relayed {
        /// XOR-RELAYED-ADDRESS.
        addr: SocketAddr,
        /// Whose allocation.
        relay: RelayId,
        /// The relay's address that our requests go to.
        server: SocketAddr,
        /// Our own address and port used towards `server` (the candidate's "local", connections.md section 6.4).
        local: SocketAddr,
    },
}

/// Why a channel is wanted. When numbers run low, who is smaller goes without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Use {
    /// A remote candidate was signalled.
    Signalled,
    /// A check is sent through it.
    Checked,
    /// It is the nominated path of a connection.
    Nominated,
}

/// What control must react to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RelayEvent {
    /// A new or changed candidate of this relay.
    Added(LocalCandidate, RelayId),
    /// Only [`LocalCandidate::Relayed`]: the allocation behind it is gone.
    Invalidated(LocalCandidate, RelayId),
    /// The relay was removed, replaced or freed: its connections must migrate. Its candidates were invalidated and
    /// its channels reported gone before this.
    Gone(RelayId),
    /// Every server address of every relay, sorted; sent when the set changed.
    Servers(Arc<[SocketAddr]>),
    /// A bind for this channel was sent: from now on data may come on it, ahead of the relay's confirmation even.
    ///
    /// Until it is confirmed nobody but the relay can say so: what comes on it counts only from the relay's own address.
    /// A relay that holds the number for somebody else refuses the bind; what it sends until then bears the wrong peer,
    /// which neither ICE nor WireGuard believe.
    ChannelOpened {
        /// Whose.
        relay: RelayId,
        /// The relay's address that carries the channel.
        server: SocketAddr,
        /// The number.
        number: u16,
        /// The far end.
        peer: SocketAddr,
    },
    /// The relay confirmed this open channel (sent once per channel, not per refresh).
    ChannelBound {
        /// Whose.
        relay: RelayId,
        /// The relay's address that carries the channel.
        server: SocketAddr,
        /// The number.
        number: u16,
        /// The far end.
        peer: SocketAddr,
    },
    /// An open channel lapsed or was refused, or its allocation is gone: nothing that comes on it counts any more.
    ChannelGone {
        /// Whose.
        relay: RelayId,
        /// The relay's address that carried the channel.
        server: SocketAddr,
        /// The number.
        number: u16,
        /// The far end.
        peer: SocketAddr,
    },
    /// The last relay is gone: the portal is asked for others.
    NoneLeft,
}
