//! The two steering programs: how they are loaded and attached.
//!
//! With them every packet of a client reaches the worker that owns it: `steer_socket` chooses among the sockets of a
//! SO_REUSEPORT group, `steer_tun` among the queues of the TUN. Without them, and for what no map knows, packets arrive
//! anywhere and are passed on between workers; so nothing here is ever fatal. What they are attached to keeps them, with
//! the maps as they are, also after the plane is dropped.

use std::os::fd::{AsFd as _, BorrowedFd};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    maps::ReusePortSockArray,
    programs::{SkReuseport, SocketFilter},
};
use gateway_common::maps::{self, MAX_WORKERS, socket_key};

use super::{KernelPlane, tun_ioctl};

impl KernelPlane {
    /// Loads the steering programs, attached to nothing. Needs CAP_BPF, no other right.
    ///
    /// # Errors
    /// If the kernel does not take them.
    pub fn load_steering(&mut self) -> Result<()> {
        steer_socket(&mut self.ebpf)?.load().context("the kernel does not take the program steer_socket")?;
        steer_tun(&mut self.ebpf)?.load().context("the kernel does not take the program steer_tun")
    }

    /// Steers a group of UDP sockets of one family: `sockets[n]` is worker n's, all bound with SO_REUSEPORT to one
    /// address and port.
    ///
    /// # Errors
    /// If they are no such group or more than [`MAX_WORKERS`]; the kernel's hash chooses then, as before.
    pub fn attach_sockets(&mut self, ipv6: bool, sockets: &[BorrowedFd<'_>]) -> Result<()> {
        let first = sockets.first().context("there is no socket to steer")?;
        ensure!(sockets.len() <= MAX_WORKERS, "{} sockets are more than {MAX_WORKERS}", sockets.len());
        let map = self.ebpf.map_mut(maps::SOCKETS.name);
        let map = map.with_context(|| format!("the map {} is gone", maps::SOCKETS.name))?;
        let mut map = ReusePortSockArray::try_from(map)?;
        for (worker, socket) in (0..).zip(sockets) {
            map.set(socket_key(worker, ipv6), socket, 0).with_context(|| {
                format!("the socket of worker {worker} cannot be steered (is it bound, with SO_REUSEPORT?)")
            })?;
        }
        steer_socket(&mut self.ebpf)?
            .attach(first)
            .context("the sockets do not take the program steer_socket")
    }

    /// Steers the TUN device that `queue` is any queue of. The order in which its queues were opened is that of the
    /// workers.
    ///
    /// # Errors
    /// If it is no queue of a TUN device; the kernel's own choice of queues remains then.
    pub fn attach_tun(&mut self, queue: BorrowedFd<'_>) -> Result<()> {
        let program = steer_tun(&mut self.ebpf)?.fd()?;
        tun_ioctl::set_steering(queue, program.as_fd())
            .context("the TUN device does not take the program steer_tun")
    }
}

#[cfg(test)]
impl KernelPlane {
    /// How often `steer_socket` ran while statistics were on, and how long in all.
    pub(super) fn socket_runs(&mut self) -> Result<(u64, std::time::Duration)> {
        let info = steer_socket(&mut self.ebpf)?.info()?;
        Ok((info.run_count(), info.run_time()))
    }
}

fn steer_socket(ebpf: &mut Ebpf) -> Result<&mut SkReuseport> {
    Ok(ebpf.program_mut("steer_socket").context("the BPF object has no program steer_socket")?.try_into()?)
}

pub(super) fn steer_tun(ebpf: &mut Ebpf) -> Result<&mut SocketFilter> {
    Ok(ebpf.program_mut("steer_tun").context("the BPF object has no program steer_tun")?.try_into()?)
}
