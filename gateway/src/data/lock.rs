//! One gateway per network namespace and TUN name.
//!
//! The lock is an abstract Unix socket: such names belong to the network namespace, as the TUN device does, and
//! vanish with the process that holds them, however it ends. It is taken before anything else is touched.

use std::{
    io::{self, ErrorKind},
    os::{
        fd::OwnedFd,
        linux::net::SocketAddrExt as _,
        unix::net::{SocketAddr, UnixListener},
    },
};

use anyhow::{Context as _, Result, bail};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Held for the life of the process.
#[derive(Debug)]
pub struct InstanceLock {
    /// Never accepts: being bound is its whole use, and whoever connects learns our pid from the kernel.
    _listener: UnixListener,
}

impl InstanceLock {
    /// Takes the lock of `tun_name` in this network namespace.
    ///
    /// # Errors
    /// One sentence with the holder's pid when another gateway has it.
    pub fn acquire(tun_name: &str) -> Result<Self> {
        let name = format!("firezone-gateway/{tun_name}");
        let address = SocketAddr::from_abstract_name(&name)
            .context("The TUN name is too long for the instance lock")?;
        match UnixListener::bind_addr(&address) {
            Ok(listener) => Ok(Self { _listener: listener }),
            Err(e) if e.kind() == ErrorKind::AddrInUse => match holder(&name) {
                Some(pid) => bail!(
                    "Another gateway (pid {pid}) already serves {tun_name} in this network namespace; stop it first"
                ),
                None => bail!(
                    "Another gateway already serves {tun_name} in this network namespace; stop it first"
                ),
            },
            Err(e) => Err(e).with_context(|| format!("Failed to take the instance lock of {tun_name}")),
        }
    }
}

/// The pid of whoever listens on the abstract socket `name`; `None` if it cannot be told (it runs in a pid
/// namespace we cannot see into, it has just ended, or its backlog is full).
fn holder(name: &str) -> Option<i32> {
    let connect = || -> io::Result<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
        Ok(socket)
    };
    let pid = getsockopt(&connect().ok()?, PeerCredentials).ok()?.pid();
    (pid > 0).then_some(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_instance_is_told_the_pid_of_the_first() {
        let name = format!("t{}", std::process::id());
        let first = InstanceLock::acquire(&name).unwrap();
        let error = InstanceLock::acquire(&name).unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
        assert!(InstanceLock::acquire(&format!("{name}x")).is_ok(), "another TUN name is another lock");
        drop(first);
        InstanceLock::acquire(&name).unwrap();
    }

    #[test]
    fn many_refused_instances_neither_hang_nor_steal_the_lock() {
        let name = format!("m{}", std::process::id());
        let _first = InstanceLock::acquire(&name).unwrap();
        for _ in 0..5000 {
            assert!(InstanceLock::acquire(&name).unwrap_err().to_string().contains("Another gateway"));
        }
    }
}
