//! Every client, here or at another worker, and the five ways to find one. Knows where clients are, not what they do.

use std::{
    hash::Hash,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
};

use gateway_common::DropReason;
use rustc_hash::{FxHashMap, FxHashSet};

use super::{bucket::Bucket, handover::Stop, peer::Peer, slot::Slot};
use crate::{
    addr::TunnelAddrs,
    command::{ClientState, Connection, Path},
    ids::{ClientId, ConnectionIndex, WorkerId},
};

/// All clients.
#[derive(Default)]
pub struct Peers {
    slots: Vec<Option<Entry>>,
    free: Vec<Slot>,
    ids: FxHashMap<ClientId, Slot>,
    indices: Owners<ConnectionIndex>,
    public_keys: Owners<[u8; 32]>,
    v4: Owners<Ipv4Addr>,
    v6: Owners<Ipv6Addr>,
    remotes: Owners<SocketAddr>,
}

/// One client, as this worker knows it.
pub enum Entry {
    /// It is this worker's.
    Here(Box<Peer>),
    /// It is another's.
    There(Box<Elsewhere>),
}

/// A client that another worker holds: enough to tell whose a packet is.
pub struct Elsewhere {
    /// The portal's name.
    pub id: ClientId,
    /// Where its packets go.
    pub worker: WorkerId,
    /// It has been ordered to this worker; until it arrives its packets go to `worker`, which has it.
    pub awaited: bool,
    /// The order that said so, see [`Home::order`](crate::command::Home::order).
    pub order: u64,
    /// What control wants it to be.
    pub state: Arc<ClientState>,
    /// Budget of initiations that arrive here from its direct path and from where its checks came from.
    pub handshakes: Bucket,
}

/// Who is found by a key: the last to claim it.
///
/// Commands coalesce, so that of two clients that claim one key at the same moment one worker may take the one for the
/// last and another the other. Harmless: a packet that they pass to each other is dropped after a few hops.
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
    remotes: Remotes,
}

/// The addresses that ICE authenticated for a client.
struct Remotes {
    heard_from: Arc<[SocketAddr]>,
    /// The far end of its direct nominated path, unless checks came from there.
    path: Option<SocketAddr>,
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

    /// By the far end of its direct nominated path, or where its checks came from.
    pub fn by_remote(&self, remote: SocketAddr) -> Option<Slot> {
        self.remotes.slots.get(&remote).copied()
    }

    /// How many slots there are.
    pub fn places(&self) -> u32 {
        u32::try_from(self.slots.len()).unwrap_or(u32::MAX)
    }

    /// Every slot there is, taken or not.
    pub fn slots(&self) -> impl Iterator<Item = Slot> + use<> {
        (0..self.places()).map(Slot)
    }

    /// The client at `slot` if this worker holds it.
    #[inline]
    pub fn get_mut(&mut self, slot: Slot) -> Option<&mut Peer> {
        match self.slots.get_mut(slot.0 as usize)? {
            Some(Entry::Here(peer)) => Some(peer),
            _ => None,
        }
    }

    /// The same where a packet needs it: it is passed to the client's worker, or dropped for `missing`.
    #[inline]
    pub fn holder(&mut self, slot: Slot, missing: DropReason) -> Result<&mut Peer, Stop> {
        match self.slots.get_mut(slot.0 as usize) {
            Some(Some(Entry::Here(peer))) => Ok(peer),
            Some(Some(Entry::There(there))) => Err(Stop::Pass(there.worker)),
            _ => Err(Stop::Drop(missing)),
        }
    }

    /// What is known of the client at `slot`.
    pub fn entry(&self, slot: Slot) -> Option<&Entry> {
        self.slots.get(slot.0 as usize)?.as_ref()
    }

    /// The budget of initiations from where ICE authenticated the client at `slot`, relays of ours aside.
    pub fn handshakes(&mut self, slot: Slot) -> Option<&mut Bucket> {
        Some(match self.slots.get_mut(slot.0 as usize)?.as_mut()? {
            Entry::Here(peer) => &mut peer.handshakes,
            Entry::There(there) => &mut there.handshakes,
        })
    }

    /// How many clients are known, wherever they are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Takes in a client, in place of what was known of it; that is returned.
    pub fn put(&mut self, entry: Entry) -> (Slot, Option<Entry>) {
        let (id, keys) = (entry.id(), Keys::of(&entry));
        let slot = self.by_id(id).or_else(|| self.free.pop()).unwrap_or_else(|| {
            self.slots.push(None);
            Slot(u32::try_from(self.slots.len() - 1).unwrap_or(u32::MAX))
        });
        let old = self.slots[slot.0 as usize].replace(entry);
        self.ids.insert(id, slot);
        let before = old.as_ref().map_or_else(Keys::none, Keys::of);
        self.relink(slot, &before, &keys);
        (slot, old)
    }

    /// Forgets a client.
    pub fn remove(&mut self, slot: Slot) -> Option<Entry> {
        let entry = self.slots.get_mut(slot.0 as usize)?.take()?;
        self.ids.remove(&entry.id());
        self.relink(slot, &Keys::of(&entry), &Keys::none());
        self.free.push(slot);
        Some(entry)
    }

    /// Changes a client, whatever it is found by included.
    pub fn update<R>(&mut self, slot: Slot, change: impl FnOnce(&mut Entry) -> R) -> Option<R> {
        let entry = self.slots.get_mut(slot.0 as usize)?.as_mut()?;
        let before = Keys::of(entry);
        let result = change(entry);
        let after = Keys::of(entry);
        self.relink(slot, &before, &after);
        Some(result)
    }

    /// Forgets everybody; the clients of this worker are returned.
    pub fn drain(&mut self) -> impl Iterator<Item = Box<Peer>> + use<> {
        std::mem::take(self).slots.into_iter().flatten().filter_map(Entry::into_peer)
    }

    fn relink(&mut self, slot: Slot, before: &Keys, after: &Keys) {
        let Self { slots, indices, public_keys, v4, v6, remotes, .. } = self;
        relink(indices, slots, slot, before.index, after.index, |k, key| k.index == Some(key));
        relink(public_keys, slots, slot, before.public_key, after.public_key, |k, key| {
            k.public_key == Some(key)
        });
        relink(v4, slots, slot, before.v4, after.v4, |k, key| k.v4 == Some(key));
        relink(v6, slots, slot, before.v6, after.v6, |k, key| k.v6 == Some(key));
        for gone in before.remotes.iter().filter(|at| !after.remotes.contains(*at)) {
            relink(remotes, slots, slot, Some(gone), None, |k, key| k.remotes.contains(key));
        }
        for new in after.remotes.iter().filter(|at| !before.remotes.contains(*at)) {
            relink(remotes, slots, slot, None, Some(new), |k, key| k.remotes.contains(key));
        }
    }
}

/// Moves one key of `slot`. A key that somebody else claims as well falls to them when its owner leaves.
fn relink<K: Copy + Eq + Hash>(
    Owners { slots: map, contested }: &mut Owners<K>,
    slots: &[Option<Entry>],
    slot: Slot,
    before: Option<K>,
    after: Option<K>,
    claims: impl Fn(&Keys, K) -> bool,
) {
    if before == after {
        return;
    }
    if let Some(before) = before.filter(|k| map.get(k) == Some(&slot)) {
        map.remove(&before);
        let search = || {
            (0..).zip(slots).find_map(|(at, entry)| {
                let is_heir = Slot(at) != slot && claims(&Keys::of(entry.as_ref()?), before);
                is_heir.then_some(Slot(at))
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
    fn none() -> Self {
        let remotes = Remotes { heard_from: [].into(), path: None };
        Self { index: None, public_key: None, v4: None, v6: None, remotes }
    }

    fn of(entry: &Entry) -> Self {
        let (tunnel, index, public_key, path, heard_from) = match entry {
            Entry::Here(peer) => {
                let link = peer.link.as_deref();
                let path = link.and_then(|l| l.path);
                (peer.tunnel, link.map(|l| l.index), link.map(|l| l.public_key), path, &peer.heard_from)
            }
            Entry::There(there) => {
                let ClientState { tunnel, connection, heard_from, .. } = &*there.state;
                match connection {
                    Connection::Present(keys, path) => {
                        (*tunnel, Some(keys.index), Some(keys.public_key), *path, heard_from)
                    }
                    Connection::Absent => (*tunnel, None, None, None, heard_from),
                }
            }
        };
        let TunnelAddrs { v4, v6 } = tunnel;
        let path = match path {
            Some(Path::Direct { remote, .. }) if !heard_from.contains(&remote) => Some(remote),
            Some(_) | None => None,
        };
        let remotes = Remotes { heard_from: Arc::clone(heard_from), path };
        Self { index, public_key, v4: Some(v4), v6: Some(v6), remotes }
    }
}

impl Remotes {
    fn iter(&self) -> impl Iterator<Item = SocketAddr> {
        self.heard_from.iter().copied().chain(self.path)
    }

    fn contains(&self, at: SocketAddr) -> bool {
        self.path == Some(at) || self.heard_from.contains(&at)
    }
}

impl Entry {
    fn id(&self) -> ClientId {
        match self {
            Self::Here(peer) => peer.id,
            Self::There(there) => there.id,
        }
    }

    /// The latest order of control that it follows.
    pub fn order(&self) -> u64 {
        match self {
            Self::Here(peer) => peer.order,
            Self::There(there) => there.order,
        }
    }

    /// The client itself, if it is here.
    pub fn into_peer(self) -> Option<Box<Peer>> {
        match self {
            Self::Here(peer) => Some(peer),
            Self::There(_) => None,
        }
    }
}
