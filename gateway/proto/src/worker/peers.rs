//! Every client of this worker, and the five ways to find one. Knows where clients are, not what they do.

use std::{
    hash::Hash,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use rustc_hash::{FxHashMap, FxHashSet};

use super::{peer::Peer, slot::Slot};
use crate::{
    command::Path,
    ids::{ClientId, ConnectionIndex},
};

/// All clients.
#[derive(Default)]
pub struct Peers {
    slots: Vec<Option<Box<Peer>>>,
    free: Vec<Slot>,
    ids: FxHashMap<ClientId, Slot>,
    indices: Owners<ConnectionIndex>,
    public_keys: Owners<[u8; 32]>,
    v4: Owners<Ipv4Addr>,
    v6: Owners<Ipv6Addr>,
    remotes: Owners<SocketAddr>,
}

/// Who is found by a key: the last to claim it.
struct Owners<K> {
    slots: FxHashMap<K, Slot>,
    /// Keys that more than one client may claim. All others need no search for an heir, which looks at every client.
    contested: FxHashSet<K>,
}

impl<K> Default for Owners<K> {
    fn default() -> Self {
        Self { slots: FxHashMap::default(), contested: FxHashSet::default() }
    }
}

/// What a client is found by.
struct Keys {
    index: Option<ConnectionIndex>,
    public_key: Option<[u8; 32]>,
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
    remote: Option<SocketAddr>,
}

impl Peers {
    /// By the portal's name.
    pub fn by_id(&self, id: ClientId) -> Option<Slot> {
        self.ids.get(&id).copied()
    }

    /// By the upper bits of our WireGuard index.
    #[inline]
    pub fn by_index(&self, index: ConnectionIndex) -> Option<Slot> {
        self.indices.slots.get(&index).copied()
    }

    /// By its WireGuard key.
    pub fn by_public_key(&self, key: &[u8; 32]) -> Option<Slot> {
        self.public_keys.slots.get(key).copied()
    }

    /// By its tunnel address. "Two clients with the same tunnel IP: the later one owns inbound traffic".
    #[inline]
    pub fn by_tunnel(&self, ip: IpAddr) -> Option<Slot> {
        match ip {
            IpAddr::V4(ip) => self.v4.slots.get(&ip).copied(),
            IpAddr::V6(ip) => self.v6.slots.get(&ip).copied(),
        }
    }

    /// By the far end of its direct nominated path.
    pub fn by_remote(&self, remote: SocketAddr) -> Option<Slot> {
        self.remotes.slots.get(&remote).copied()
    }

    /// Whoever is there.
    #[inline]
    pub fn get_mut(&mut self, slot: Slot) -> Option<&mut Peer> {
        self.slots.get_mut(slot.0 as usize)?.as_deref_mut()
    }

    /// Takes in a new client.
    pub fn insert(&mut self, peer: Box<Peer>) -> Slot {
        let keys = Keys::of(&peer);
        let id = peer.id;
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            Slot(u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX))
        });
        self.slots[slot.0 as usize] = Some(peer);
        self.ids.insert(id, slot);
        self.relink(slot, &Keys::NONE, &keys);
        slot
    }

    /// Forgets a client.
    pub fn remove(&mut self, slot: Slot) -> Option<Box<Peer>> {
        let peer = self.slots.get_mut(slot.0 as usize)?.take()?;
        self.ids.remove(&peer.id);
        self.relink(slot, &Keys::of(&peer), &Keys::NONE);
        self.free.push(slot);
        Some(peer)
    }

    /// Changes a client, whatever it is found by included.
    pub fn update<R>(&mut self, slot: Slot, change: impl FnOnce(&mut Peer) -> R) -> Option<R> {
        let peer = self.slots.get_mut(slot.0 as usize)?.as_deref_mut()?;
        let before = Keys::of(peer);
        let result = change(peer);
        let after = Keys::of(peer);
        self.relink(slot, &before, &after);
        Some(result)
    }

    /// Takes all clients out.
    pub fn drain(&mut self) -> impl Iterator<Item = Box<Peer>> + use<> {
        std::mem::take(self).slots.into_iter().flatten()
    }

    fn relink(&mut self, slot: Slot, before: &Keys, after: &Keys) {
        let Self { slots, indices, public_keys, v4, v6, remotes, .. } = self;
        relink(indices, slots, slot, before.index, after.index, |k| k.index);
        relink(public_keys, slots, slot, before.public_key, after.public_key, |k| k.public_key);
        relink(v4, slots, slot, before.v4, after.v4, |k| k.v4);
        relink(v6, slots, slot, before.v6, after.v6, |k| k.v6);
        relink(remotes, slots, slot, before.remote, after.remote, |k| k.remote);
    }
}

/// Moves one key of `slot`. A key that somebody else claims as well falls to them when its owner leaves.
fn relink<K: Copy + Eq + Hash>(
    Owners { slots: map, contested }: &mut Owners<K>,
    slots: &[Option<Box<Peer>>],
    slot: Slot,
    before: Option<K>,
    after: Option<K>,
    key: impl Fn(&Keys) -> Option<K>,
) {
    if before == after {
        return;
    }
    if let Some(before) = before.filter(|k| map.get(k) == Some(&slot)) {
        map.remove(&before);
        let search = || {
            (0..).zip(slots).find_map(|(at, peer)| {
                let claims = Slot(at) != slot && key(&Keys::of(peer.as_deref()?)) == Some(before);
                claims.then_some(Slot(at))
            })
        };
        let heir = contested.contains(&before).then(search).flatten();
        match heir {
            Some(heir) => drop(map.insert(before, heir)),
            None => drop(contested.remove(&before)),
        }
    }
    if let Some(after) = after
        && map.insert(after, slot).is_some_and(|owner| owner != slot)
    {
        contested.insert(after);
    }
}

impl Keys {
    const NONE: Self = Self { index: None, public_key: None, v4: None, v6: None, remote: None };

    fn of(peer: &Peer) -> Self {
        let link = peer.link.as_deref();
        Self {
            index: link.map(|l| l.index),
            public_key: link.map(|l| l.public_key),
            v4: Some(peer.tunnel.v4),
            v6: Some(peer.tunnel.v6),
            remote: link.and_then(|l| match l.path? {
                Path::Direct { remote, .. } => Some(remote),
                Path::Relayed { .. } => None,
            }),
        }
    }
}
