//! What all connections share: the relays, the tables that lead to a connection, and the ways out.
//!
//! Connections and this are two fields of control, so that one connection can use it while the others stay put.

use std::{collections::VecDeque, net::SocketAddr};

use rustc_hash::{FxHashMap, FxHashSet};

use crate::{
    control::{hold::Signals, stun_router::StunRouter},
    ids::{ClientId, RelayId},
    relay::Relays,
    sink::Transmit,
};

pub(super) struct Shared {
    pub(super) relays: Relays,
    pub(super) router: StunRouter,
    pub(super) signals: Signals,
    /// Checks and answers on their way out.
    pub(super) transmits: VecDeque<Transmit>,
    /// Whose connection has no relay any more.
    pub(super) orphans: FxHashSet<ClientId>,
    /// Who selected a relay.
    users: FxHashMap<RelayId, FxHashSet<ClientId>>,
    /// Whose nominated pair goes through our relay to a peer address. A list, because nothing stops two clients
    /// from signalling one address.
    paths: FxHashMap<(RelayId, SocketAddr), Vec<ClientId>>,
    /// How many connections hold a channel: two clients behind one router may signal one address.
    holders: FxHashMap<(RelayId, SocketAddr), usize>,
}

impl Shared {
    pub(super) fn new(relays: Relays) -> Self {
        Self {
            relays,
            router: StunRouter::default(),
            signals: Signals::default(),
            transmits: VecDeque::new(),
            orphans: FxHashSet::default(),
            users: FxHashMap::default(),
            paths: FxHashMap::default(),
            holders: FxHashMap::default(),
        }
    }

    /// One more connection wants our channel on `relay` to `peer`; every call is answered by one of
    /// [`Shared::let_go`].
    pub(super) fn hold(&mut self, relay: RelayId, peer: SocketAddr) {
        *self.holders.entry((relay, peer)).or_default() += 1;
    }

    /// One connection less wants it; nobody at all: it may lapse.
    pub(super) fn let_go(&mut self, relay: RelayId, peer: SocketAddr) {
        let Some(holders) = self.holders.get_mut(&(relay, peer)) else { return };
        *holders -= 1;
        if *holders == 0 {
            self.holders.remove(&(relay, peer));
            self.relays.release(relay, peer);
        }
    }

    /// The client's connection uses `relay` from now on.
    pub(super) fn select(&mut self, relay: RelayId, client: ClientId) {
        self.orphans.remove(&client);
        self.users.entry(relay).or_default().insert(client);
    }

    /// It no longer does.
    pub(super) fn deselect(&mut self, relay: RelayId, client: ClientId) {
        if let Some(users) = self.users.get_mut(&relay) {
            users.remove(&client);
            if users.is_empty() {
                self.users.remove(&relay);
            }
        }
    }

    /// The clients whose connections use `relay`.
    pub(super) fn users(&self, relay: RelayId) -> Vec<ClientId> {
        self.users.get(&relay).into_iter().flatten().copied().collect()
    }

    /// The client's nominated pair goes to `remote`, through our relay `via` if there is one.
    pub(super) fn enter_path(&mut self, via: Option<RelayId>, remote: SocketAddr, client: ClientId) {
        if let Some(relay) = via {
            self.paths.entry((relay, remote)).or_default().push(client);
        }
    }

    /// It no longer does.
    pub(super) fn leave_path(&mut self, via: Option<RelayId>, remote: SocketAddr, client: ClientId) {
        let Some(relay) = via else { return };
        if let Some(clients) = self.paths.get_mut(&(relay, remote)) {
            clients.retain(|c| *c != client);
            if clients.is_empty() {
                self.paths.remove(&(relay, remote));
            }
        }
    }

    /// The clients whose nominated pairs go through `relay` to `remote`.
    pub(super) fn on_path(&self, relay: RelayId, remote: SocketAddr) -> Vec<ClientId> {
        self.paths.get(&(relay, remote)).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
impl Shared {
    /// Channels that some connection holds.
    pub(super) fn held_channels(&self) -> usize {
        self.holders.len()
    }
}
