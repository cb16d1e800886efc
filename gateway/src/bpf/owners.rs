//! Whose each client is: the two maps that steering and `uplink` both ask, and their one writer.

use std::{fmt, net::IpAddr};

use anyhow::Result;
use aya::maps::{HashMap, MapData};
use gateway_common::maps::{self, Owner, SessionKey, TunnelKey};
use gateway_proto::{ConnectionIndex, WorkerId};

use super::{KernelPlane, take};

// aya's Pod is not ours to implement for the types of the contract; their bytes are cast instead.
type SessionBytes = [u8; size_of::<SessionKey>()];
type TunnelBytes = [u8; size_of::<TunnelKey>()];
type OwnerBytes = [u8; size_of::<Owner>()];

/// [`maps::SESSIONS`] and [`maps::TUNNELS`] of one plane.
pub struct Owners {
    sessions: HashMap<MapData, SessionBytes, OwnerBytes>,
    tunnels: HashMap<MapData, TunnelBytes, OwnerBytes>,
    left_out: LeftOut,
}

/// How often a map did not take an entry (it was full), so that a client's packets go the slow way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Connections that [`Owners::set_session`] could not enter.
    pub sessions: u64,
    /// Addresses that [`Owners::set_tunnel`] could not enter.
    pub tunnels: u64,
}

impl Owners {
    /// Takes the maps out of `plane`.
    ///
    /// # Errors
    /// If they were taken before.
    pub fn take(plane: &mut KernelPlane) -> Result<Self> {
        Ok(Self {
            sessions: take(&mut plane.ebpf, &maps::SESSIONS)?.try_into()?,
            tunnels: take(&mut plane.ebpf, &maps::TUNNELS)?.try_into()?,
            left_out: LeftOut::default(),
        })
    }

    /// Datagrams whose WireGuard index belongs to `connection` go to `worker` from now on. With `None` steering leaves them
    /// to the kernel's hash, and `uplink` drops them.
    pub fn set_session(&mut self, connection: ConnectionIndex, worker: Option<WorkerId>) {
        let key = bytemuck::cast(SessionKey { connection: connection.get() });
        self.left_out.sessions += u64::from(!set(&mut self.sessions, &key, worker));
    }

    /// Packets that the kernel routes to `tunnel`, an address of a client in the tunnel, go to the queue of `worker` from
    /// now on; with `None`, to the first queue.
    pub fn set_tunnel(&mut self, tunnel: IpAddr, worker: Option<WorkerId>) {
        let key = bytemuck::cast(match tunnel {
            IpAddr::V4(tunnel) => TunnelKey::v4(tunnel.octets()),
            IpAddr::V6(tunnel) => TunnelKey::v6(tunnel.octets()),
        });
        self.left_out.tunnels += u64::from(!set(&mut self.tunnels, &key, worker));
    }

    /// What did not fit so far.
    #[must_use]
    pub fn left_out(&self) -> LeftOut {
        self.left_out
    }

    /// The kernel's numbers of the two maps.
    #[cfg(test)]
    pub(super) fn map_ids(&self) -> Result<[u32; 2]> {
        use aya::maps::IterableMap as _;
        Ok([self.sessions.map().info()?.id(), self.tunnels.map().info()?.id()])
    }
}

impl fmt::Debug for Owners {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Owners").field("left_out", &self.left_out).finish_non_exhaustive()
    }
}

/// False if the map did not take the entry. Removing what is not there is no failure.
fn set<K: aya::Pod>(map: &mut HashMap<MapData, K, OwnerBytes>, key: &K, worker: Option<WorkerId>) -> bool {
    let Some(worker) = worker else {
        let _not_there = map.remove(key);
        return true;
    };
    let worker = u32::try_from(worker.get()).expect("workers are fewer than MAX_WORKERS");
    let owner: OwnerBytes = bytemuck::cast(Owner { worker });
    map.insert(key, owner, 0).is_ok()
}
