//! The TUN device (cli-and-service.md section 13.1).
//!
//! Created through tun-rs, which makes /dev/net/tun if it is missing; with IFF_MULTI_QUEUE only for several workers, and
//! then never one that exists, so that a second process fails instead of taking half of the traffic. Reads and writes
//! are our own.

use std::{
    io::{self, IoSlice},
    os::fd::{AsFd, BorrowedFd},
};

use anyhow::{Context as _, Result};
use gateway_proto::addr::MAX_INNER;
use tun_rs::{DeviceBuilder, SyncDevice};

use super::{
    capabilities::{Capabilities, Capability, InUse, NOT_OFFERED},
    coalesce::{Device, Offloads},
};

/// Packets the kernel queues for us; 500, the default, loses packets at high rates over long paths.
const QUEUE_LEN: u32 = 10_000;

/// One queue of the open device, which disappears with the last.
pub struct Tun {
    device: SyncDevice,
    offloads: Offloads,
}

impl Tun {
    /// Creates the device `name`, down and without addresses, in the namespace of the calling thread, and opens a queue
    /// for each of `workers`, in their order.
    ///
    /// # Errors
    /// One sentence: no right, no TUN driver, or another process has the device.
    pub fn create(name: &str, workers: usize, allowed: Capabilities) -> Result<Vec<Self>> {
        let several = workers > 1;
        // A device with several queues is open to everybody who may: it must be a new one. (Between this look and the
        // creation somebody might make it; another gateway does not, because it does not get past the lock.)
        if several && exists(name) {
            return Err(busy(name));
        }
        let offload = allowed.allow(Capability::TunOffload);
        let device = match build(name, several, offload) {
            Ok(device) => device,
            // A device that another process has with several queues, and we want one.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) && exists(name) => {
                return Err(busy(name));
            }
            Err(e) if offload && e.raw_os_error() == Some(libc::EINVAL) => {
                tracing::info!("The kernel offers no offloads on TUN devices: {e}");
                build(name, several, false).with_context(|| why(name, &e))?
            }
            Err(e) => {
                let why = why(name, &e);
                return Err(e).context(why);
            }
        };
        if let Err(e) = device.set_tx_queue_len(QUEUE_LEN) {
            tracing::info!("The queue of {name} keeps its length: {e}");
        }
        let mut queues = vec![device];
        while queues.len() < workers {
            let next = queues[0].try_clone();
            queues.push(next.with_context(|| {
                format!(
                    "Failed to open queue {} of the TUN device {name}; start with fewer --workers",
                    queues.len()
                )
            })?);
        }
        let queue = |device: SyncDevice| {
            device.set_nonblocking(true).context("Failed to make the TUN device non-blocking")?;
            let uso = device.udp_gso() && allowed.allow(Capability::TunUso);
            let offloads = Offloads { vnet: device.tcp_gso(), uso };
            Ok(Self { device, offloads })
        };
        queues.into_iter().map(queue).collect()
    }

    /// Says what of the offloads the kernel does not offer.
    pub fn report(&self, in_use: &mut InUse) {
        if !self.device.tcp_gso() {
            in_use.missing(Capability::TunOffload, NOT_OFFERED);
        }
        // Since Linux 6.2.
        if !self.device.udp_gso() {
            in_use.missing(Capability::TunUso, NOT_OFFERED);
        }
    }

    /// Whether packets are preceded by virtio headers.
    pub fn has_headers(&self) -> bool {
        self.offloads.vnet
    }

    /// Reads one packet, with its virtio header if there are such.
    ///
    /// # Errors
    /// `WouldBlock` when nothing waits; anything else means that the device is gone.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.device, buffer)?)
    }
}

impl Device for &Tun {
    fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        loop {
            match rustix::io::writev(&self.device, parts) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

fn build(name: &str, several: bool, offload: bool) -> io::Result<SyncDevice> {
    let mtu = u16::try_from(MAX_INNER).unwrap_or(u16::MAX);
    DeviceBuilder::new()
        .name(name)
        .mtu(mtu)
        .enable(false)
        .with(|builder| {
            builder.offload(offload).multi_queue(several).packet_information(false);
        })
        .build_sync()
}

/// Whether this network namespace has an interface `name`.
fn exists(name: &str) -> bool {
    use rustix::net::{AddressFamily, SocketType, netdevice::name_to_index, socket};
    socket(AddressFamily::INET, SocketType::DGRAM, None)
        .or_else(|_| socket(AddressFamily::INET6, SocketType::DGRAM, None))
        .is_ok_and(|socket| name_to_index(socket, name).is_ok())
}

fn busy(name: &str) -> anyhow::Error {
    let busy = io::Error::from_raw_os_error(libc::EBUSY);
    let why = why(name, &busy);
    anyhow::Error::new(busy).context(why)
}

fn why(name: &str, error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => {
            format!("Failed to create the TUN device {name}; run as root or grant CAP_NET_ADMIN")
        }
        // The capability is no permission to open the file.
        Some(libc::EACCES) => {
            format!(
                "Failed to open /dev/net/tun for the TUN device {name}; let the gateway's user read and write it"
            )
        }
        Some(libc::EBUSY) => format!("The TUN device {name} is in use by another process; stop that first"),
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            format!(
                "Failed to create the TUN device {name}: is the kernel's tun module loaded (modprobe tun)?"
            )
        }
        _ => format!("Failed to create the TUN device {name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_refusal_names_its_own_cure() {
        let table = [
            (libc::EPERM, "CAP_NET_ADMIN"),
            (libc::EACCES, "/dev/net/tun"),
            (libc::EBUSY, "another process"),
            (libc::ENODEV, "modprobe tun"),
        ];
        for (errno, cure) in table {
            let text = why("tun-x", &io::Error::from_raw_os_error(errno));
            assert!(text.contains("tun-x") && text.contains(cure), "{errno}: {text}");
        }
    }
}
