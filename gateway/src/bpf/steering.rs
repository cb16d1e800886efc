//! The two steering programs, and the maps that tell them whose a client is.
//!
//! With them every packet of a client reaches the worker that owns it: `steer_socket` chooses among the sockets of a
//! SO_REUSEPORT group, `steer_tun` among the queues of the TUN. Without them, and for what no map knows, packets arrive
//! anywhere and are passed on between workers; so nothing here is ever fatal.

use std::{
    fmt, io,
    net::IpAddr,
    os::fd::{AsFd as _, BorrowedFd},
};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    maps::{HashMap, MapData, ReusePortSockArray},
    programs::{SkReuseport, SocketFilter},
};
use gateway_common::maps::{self, MAX_WORKERS, Owner, SessionKey, TunnelKey, socket_key};
use gateway_proto::{ConnectionIndex, WorkerId};

use super::{KernelPlane, built_in_steering, take, tun_ioctl};

// aya's Pod is not ours to implement for the types of the contract; their bytes are cast instead.
type SessionBytes = [u8; size_of::<SessionKey>()];
type TunnelBytes = [u8; size_of::<TunnelKey>()];
type OwnerBytes = [u8; size_of::<Owner>()];

/// The loaded steering programs. What they are attached to keeps them, with the maps as they are, after this is dropped.
pub struct Steering {
    pub(super) plane: KernelPlane,
    sessions: HashMap<MapData, SessionBytes, OwnerBytes>,
    tunnels: HashMap<MapData, TunnelBytes, OwnerBytes>,
    sockets: ReusePortSockArray<MapData>,
    left_out: LeftOut,
}

/// How often a map did not take an entry (it was full), so that a client's packets go the slow way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Connections that [`Steering::set_session`] could not enter.
    pub sessions: u64,
    /// Addresses that [`Steering::set_tunnel`] could not enter.
    pub tunnels: u64,
}

impl Steering {
    /// Loads the built-in object's steering programs, with empty maps and attached to nothing. Needs CAP_BPF, no other
    /// right.
    ///
    /// # Errors
    /// One sentence: built without the object, no CAP_BPF, or a kernel that does not take the programs.
    pub fn load() -> Result<Self> {
        Self::load_object(built_in_steering().context("built without the kernel programs")?)
            .map_err(name_the_right)
    }

    fn load_object(object: &[u8]) -> Result<Self> {
        let mut plane = KernelPlane::open(object)?;
        steer_socket(&mut plane.ebpf)?.load().context("the kernel does not take the program steer_socket")?;
        steer_tun(&mut plane.ebpf)?.load().context("the kernel does not take the program steer_tun")?;
        Ok(Self {
            sessions: take(&mut plane.ebpf, &maps::SESSIONS)?.try_into()?,
            tunnels: take(&mut plane.ebpf, &maps::TUNNELS)?.try_into()?,
            sockets: take(&mut plane.ebpf, &maps::SOCKETS)?.try_into()?,
            plane,
            left_out: LeftOut::default(),
        })
    }

    /// Steers a group of UDP sockets of one family: `sockets[n]` is worker n's, all bound with SO_REUSEPORT to one
    /// address and port.
    ///
    /// # Errors
    /// If they are no such group or more than [`MAX_WORKERS`]; the kernel's hash chooses then, as before.
    pub fn attach_sockets(&mut self, ipv6: bool, sockets: &[BorrowedFd<'_>]) -> Result<()> {
        let first = sockets.first().context("there is no socket to steer")?;
        ensure!(sockets.len() <= MAX_WORKERS, "{} sockets are more than {MAX_WORKERS}", sockets.len());
        for (worker, socket) in (0..).zip(sockets) {
            self.sockets.set(socket_key(worker, ipv6), socket, 0).with_context(|| {
                format!("the socket of worker {worker} cannot be steered (is it bound, with SO_REUSEPORT?)")
            })?;
        }
        steer_socket(&mut self.plane.ebpf)?
            .attach(first)
            .context("the sockets do not take the program steer_socket")
    }

    /// Steers the TUN device that `queue` is any queue of. The order in which its queues were opened is that of the
    /// workers.
    ///
    /// # Errors
    /// If it is no queue of a TUN device; the kernel's own choice of queues remains then.
    pub fn attach_tun(&mut self, queue: BorrowedFd<'_>) -> Result<()> {
        let program = steer_tun(&mut self.plane.ebpf)?.fd()?;
        tun_ioctl::set_steering(queue, program.as_fd())
            .context("the TUN device does not take the program steer_tun")
    }

    /// Datagrams whose WireGuard index belongs to `connection` go to `worker` from now on; with `None`, where the
    /// kernel's hash says.
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
}

#[cfg(test)]
impl Steering {
    /// How often `steer_socket` ran while statistics were on, and how long in all.
    pub(super) fn socket_runs(&mut self) -> Result<(u64, std::time::Duration)> {
        let info = steer_socket(&mut self.plane.ebpf)?.info()?;
        Ok((info.run_count(), info.run_time()))
    }

    /// The kernel's numbers of [`maps::SESSIONS`] and [`maps::TUNNELS`].
    pub(super) fn map_ids(&self) -> Result<[u32; 2]> {
        use aya::maps::IterableMap as _;
        Ok([self.sessions.map().info()?.id(), self.tunnels.map().info()?.id()])
    }
}

impl fmt::Debug for Steering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Steering").field("left_out", &self.left_out).finish_non_exhaustive()
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

fn steer_socket(ebpf: &mut Ebpf) -> Result<&mut SkReuseport> {
    Ok(ebpf.program_mut("steer_socket").context("the BPF object has no program steer_socket")?.try_into()?)
}

pub(super) fn steer_tun(ebpf: &mut Ebpf) -> Result<&mut SocketFilter> {
    Ok(ebpf.program_mut("steer_tun").context("the BPF object has no program steer_tun")?.try_into()?)
}

/// The kernel says EPERM where a right is missing, not which; the verifier says something else.
fn name_the_right(error: anyhow::Error) -> anyhow::Error {
    let refused = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|e| e.raw_os_error() == Some(libc::EPERM))
    };
    if error.chain().any(refused) {
        return error.context(
            "no BPF rights: grant CAP_BPF (in a container, its seccomp profile must let bpf(2) pass too)",
        );
    }
    error
}
