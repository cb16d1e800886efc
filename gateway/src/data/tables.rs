//! What `uplink` must know besides owners, kept at what the workers are told: relays, channels, peers, ufrags.
//!
//! Commands describe state, and repeat most of it; only what differs from before is written. Two clients may have one
//! address or the same first four bytes of a username: an entry goes when the last of them does.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    net::SocketAddr,
};

use gateway_proto::{
    ClientId, Command,
    command::{ClientState, Connection, Path},
};
use rustc_hash::FxHashMap;

use crate::bpf;

/// The kernel's maps, or a test's.
pub trait Known {
    /// See [`bpf::Uplink::set_relay`].
    fn set_relay(&mut self, relay: SocketAddr, known: bool);
    /// See [`bpf::Uplink::set_channel`].
    fn set_channel(&mut self, relay: SocketAddr, number: u16, bound: bool);
    /// See [`bpf::Uplink::set_peer`].
    fn set_peer(&mut self, peer: SocketAddr, authenticated: bool);
    /// See [`bpf::Uplink::set_ufrag`].
    fn set_ufrag(&mut self, ufrag: [u8; 4], known: bool);
}

impl Known for bpf::Uplink {
    fn set_relay(&mut self, relay: SocketAddr, known: bool) {
        self.set_relay(relay, known);
    }
    fn set_channel(&mut self, relay: SocketAddr, number: u16, bound: bool) {
        self.set_channel(relay, number, bound);
    }
    fn set_peer(&mut self, peer: SocketAddr, authenticated: bool) {
        self.set_peer(peer, authenticated);
    }
    fn set_ufrag(&mut self, ufrag: [u8; 4], known: bool) {
        self.set_ufrag(ufrag, known);
    }
}

/// What the kernel was told.
#[derive(Default)]
pub struct Tables {
    relays: BTreeSet<SocketAddr>,
    /// Of every relay, also of one that is not in the list (yet): the workers keep those too.
    channels: BTreeSet<(SocketAddr, u16)>,
    clients: FxHashMap<ClientId, Client>,
    peers: BTreeMap<SocketAddr, usize>,
    ufrags: BTreeMap<[u8; 4], usize>,
}

#[derive(Default, PartialEq, Eq)]
struct Client {
    ufrag: Option<[u8; 4]>,
    /// Where its handshakes may come from: what the workers have a budget of its own for.
    peers: BTreeSet<SocketAddr>,
}

impl Client {
    fn of(state: &ClientState) -> Self {
        let Connection::Present(keys, path) = &state.connection else { return Self::default() };
        let direct = match path {
            Some(Path::Direct { remote, .. }) => Some(*remote),
            _ => None,
        };
        let peers = state.heard_from.iter().copied().chain(direct).collect();
        Self { ufrag: Some(keys.ufrag), peers }
    }
}

impl Tables {
    /// What the workers are about to be told.
    pub fn on_command(&mut self, command: &Command, known: &mut impl Known) {
        match command {
            Command::Relays(relays) => self.set_relays(relays, known),
            Command::Channel { server, number, peer } => {
                let changed = match peer {
                    Some(_) => self.channels.insert((*server, *number)),
                    None => self.channels.remove(&(*server, *number)),
                };
                if changed && self.relays.contains(server) {
                    known.set_channel(*server, *number, peer.is_some());
                }
            }
            Command::Client { id, desired, .. } => {
                self.set_client(*id, desired.as_deref().map(Client::of), known);
            }
            _ => {}
        }
    }

    fn set_relays(&mut self, relays: &[SocketAddr], known: &mut impl Known) {
        let new: BTreeSet<_> = relays.iter().copied().collect();
        for gone in self.relays.difference(&new) {
            known.set_relay(*gone, false);
        }
        for added in new.difference(&self.relays) {
            known.set_relay(*added, true);
            for (_, number) in self.channels.range((*added, 0)..=(*added, u16::MAX)) {
                known.set_channel(*added, *number, true);
            }
        }
        self.relays = new;
    }

    fn set_client(&mut self, id: ClientId, new: Option<Client>, known: &mut impl Known) {
        let none = Client::default();
        let old = match new {
            Some(_) => self.clients.get(&id).unwrap_or(&none),
            None => &self.clients.remove(&id).unwrap_or_default(),
        };
        let next = new.as_ref().unwrap_or(&none);
        if old == next {
            return;
        }
        // What is new first: an entry that stays must not go and come again, its budget would.
        if old.ufrag != next.ufrag {
            next.ufrag
                .iter()
                .for_each(|ufrag| enter(&mut self.ufrags, *ufrag, |key| known.set_ufrag(key, true)));
            old.ufrag
                .iter()
                .for_each(|ufrag| leave(&mut self.ufrags, *ufrag, |key| known.set_ufrag(key, false)));
        }
        for added in next.peers.difference(&old.peers) {
            enter(&mut self.peers, *added, |key| known.set_peer(key, true));
        }
        for gone in old.peers.difference(&next.peers) {
            leave(&mut self.peers, *gone, |key| known.set_peer(key, false));
        }
        if let Some(new) = new {
            self.clients.insert(id, new);
        }
    }
}

fn enter<K: Ord + Copy>(count: &mut BTreeMap<K, usize>, key: K, mut first: impl FnMut(K)) {
    let users = count.entry(key).or_default();
    *users += 1;
    if *users == 1 {
        first(key);
    }
}

fn leave<K: Ord + Copy>(count: &mut BTreeMap<K, usize>, key: K, mut last: impl FnMut(K)) {
    let Entry::Occupied(mut users) = count.entry(key) else { return };
    *users.get_mut() -= 1;
    if *users.get() == 0 {
        users.remove();
        last(key);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use gateway_proto::{
        ConnectionIndex, WorkerId,
        addr::TunnelAddrs,
        command::{ConnectionKeys, Home},
    };
    use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
    use uuid::Uuid;
    use zeroize::Zeroizing;

    use super::*;

    /// As the kernel: a channel needs its relay, and goes with it.
    #[derive(Default, Debug, PartialEq, Eq)]
    struct Maps {
        relays: BTreeSet<SocketAddr>,
        channels: BTreeSet<(SocketAddr, u16)>,
        peers: BTreeSet<SocketAddr>,
        ufrags: BTreeSet<[u8; 4]>,
    }

    fn set<K: Ord>(set: &mut BTreeSet<K>, key: K, there: bool) {
        let news = if there { set.insert(key) } else { set.remove(&key) };
        assert!(news, "written twice");
    }

    impl Known for Maps {
        fn set_relay(&mut self, relay: SocketAddr, known: bool) {
            set(&mut self.relays, relay, known);
            self.channels.retain(|(of, _)| known || *of != relay);
        }
        fn set_channel(&mut self, relay: SocketAddr, number: u16, bound: bool) {
            assert!(self.relays.contains(&relay));
            set(&mut self.channels, (relay, number), bound);
        }
        fn set_peer(&mut self, peer: SocketAddr, authenticated: bool) {
            set(&mut self.peers, peer, authenticated);
        }
        fn set_ufrag(&mut self, ufrag: [u8; 4], known: bool) {
            set(&mut self.ufrags, ufrag, known);
        }
    }

    fn address(n: u16) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, 1], n))
    }

    fn client(rng: &mut SmallRng) -> Option<Arc<ClientState>> {
        let tunnel = TunnelAddrs { v4: [100, 64, 0, 7].into(), v6: [0xfd00; 8].into() };
        let keys = ConnectionKeys {
            index: ConnectionIndex::new(1).expect("24 bits"),
            public_key: [1; 32],
            preshared_key: Zeroizing::new([2; 32]),
            ufrag: [rng.random_range(0..5); 4],
        };
        let remote = address(rng.random_range(0..8));
        let path = match rng.random_range(0..3) {
            0 => None,
            1 => Some(Path::Direct { local: address(99), remote }),
            _ => Some(Path::Relayed { server: address(1), channel: None, remote }),
        };
        let connection = match rng.random_range(0..4) {
            0 => Connection::Absent,
            _ => Connection::Present(Arc::new(keys), path),
        };
        let mut state = ClientState::new(tunnel, connection, Arc::new([]));
        if matches!(state.connection, Connection::Present(..)) {
            state.heard_from = (0..rng.random_range(0..4)).map(|_| address(rng.random_range(0..8))).collect();
        }
        (rng.random_range(0..5) > 0).then(|| Arc::new(state))
    }

    #[test]
    fn maps_hold_what_the_latest_commands_say_and_nothing_is_written_twice() {
        for seed in 0..20 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let (mut tables, mut maps) = (Tables::default(), Maps::default());
            let (mut relays, mut channels) = (BTreeSet::new(), BTreeSet::new());
            let mut clients = BTreeMap::new();
            for _ in 0..2000 {
                let command = match rng.random_range(0..4) {
                    0 => {
                        relays =
                            (0..rng.random_range(0..4)).map(|_| address(rng.random_range(0..5))).collect();
                        Command::Relays(relays.iter().copied().collect())
                    }
                    1 => {
                        let (server, number) = (address(rng.random_range(0..5)), rng.random_range(0..4));
                        let peer = rng.random_bool(0.6).then(|| address(0));
                        match peer {
                            Some(_) => channels.insert((server, number)),
                            None => channels.remove(&(server, number)),
                        };
                        Command::Channel { server, number, peer }
                    }
                    _ => {
                        let id = ClientId(Uuid::from_u128(rng.random_range(0..6)));
                        let desired = client(&mut rng);
                        clients.insert(id, desired.clone());
                        Command::Client { id, home: Home::at(WorkerId::FIRST), desired }
                    }
                };
                tables.on_command(&command, &mut maps);
                let present: Vec<_> = clients.values().flatten().map(|state| Client::of(state)).collect();
                let expect = Maps {
                    relays: relays.clone(),
                    channels: channels.iter().copied().filter(|(relay, _)| relays.contains(relay)).collect(),
                    peers: present.iter().flat_map(|client| client.peers.iter().copied()).collect(),
                    ufrags: present.iter().filter_map(|client| client.ufrag).collect(),
                };
                assert_eq!(maps, expect, "seed {seed}: after {command:?}");
            }
        }
    }
}
