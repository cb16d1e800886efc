//! The client's TUN device: addresses, MTU, routes, batches.
//!
//! Offloads are on: one read may be a TCP super-packet that tun-rs cuts, one write may be one it built.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use ipnet::IpNet;
use tun_rs::{DeviceBuilder, GROTable, IDEAL_BATCH_SIZE, SyncDevice, VIRTIO_NET_HDR_LEN};

use super::inner::{MAX_INNER, spell_zero};

/// What all clients route into their tunnel: tunnel and proxy ranges (packets.md section 2).
const RANGES: [&str; 4] =
    ["100.64.0.0/11", "100.96.0.0/11", "fd00:2021:1111::/107", "fd00:2021:1111:8000::/107"];

/// Where the packets of a client come out: a TUN device, or who counts them.
pub(super) trait Inside {
    /// The portal has assigned addresses.
    fn configure(&self, ipv4: Ipv4Addr, ipv6: Ipv6Addr, routes: &[IpNet]) -> Result<()>;

    /// Packets that arrived, each behind [`HEADROOM`] bytes. The buffers are scratch afterwards.
    fn write(&mut self, batch: &mut [Vec<u8>]) -> io::Result<()>;
}

impl Inside for Tun {
    fn configure(&self, ipv4: Ipv4Addr, ipv6: Ipv6Addr, routes: &[IpNet]) -> Result<()> {
        Self::configure(self, ipv4, ipv6, routes)
    }

    fn write(&mut self, batch: &mut [Vec<u8>]) -> io::Result<()> {
        Self::write(self, batch)
    }
}

/// An open TUN device.
pub(super) struct Tun {
    device: SyncDevice,
    name: String,
    raw: Vec<u8>,
    packets: Vec<Vec<u8>>,
    sizes: Vec<usize>,
    gro: GROTable,
}

impl Tun {
    /// Creates the device.
    pub(super) fn open(name: &str) -> Result<Self> {
        let device = DeviceBuilder::new()
            .name(name)
            .mtu(u16::try_from(MAX_INNER).expect("1280 fits"))
            .offload(true)
            .build_sync()
            .with_context(|| {
                format!("cannot create the TUN device {name}; root or CAP_NET_ADMIN is needed")
            })?;
        device.set_nonblocking(true)?;
        Ok(Self {
            device,
            name: name.to_owned(),
            raw: vec![0; VIRTIO_NET_HDR_LEN + 65_535],
            packets: vec![vec![0; MAX_INNER + 256]; IDEAL_BATCH_SIZE],
            sizes: vec![0; IDEAL_BATCH_SIZE],
            gro: GROTable::default(),
        })
    }

    /// Sets addresses and routes; may be repeated.
    pub(super) fn configure(&self, ipv4: Ipv4Addr, ipv6: Ipv6Addr, routes: &[IpNet]) -> Result<()> {
        ip(&["link", "set", "dev", &self.name, "mtu", &MAX_INNER.to_string(), "up"])?;
        ip(&["-4", "address", "replace", &format!("{ipv4}/32"), "dev", &self.name])?;
        let has_v6 =
            ip(&["-6", "address", "replace", &format!("{ipv6}/128"), "dev", &self.name, "nodad"]).is_ok();
        let ranges = RANGES.iter().map(|r| r.parse().expect("the constant ranges are networks"));
        for net in ranges.chain(routes.iter().copied()) {
            let (family, source): (_, IpAddr) = match net {
                IpNet::V4(_) => ("-4", ipv4.into()),
                IpNet::V6(_) => ("-6", ipv6.into()),
            };
            if net.addr().is_ipv4() || has_v6 {
                let (net, source) = (net.to_string(), source.to_string());
                ip(&[family, "route", "replace", &net, "dev", &self.name, "src", &source])?;
            }
        }
        Ok(())
    }

    /// Sets one address and exactly these routes.
    pub(super) fn bring_up(&self, address: Ipv4Addr, routes: &[IpNet]) -> Result<()> {
        ip(&["link", "set", "dev", &self.name, "mtu", &MAX_INNER.to_string(), "up"])?;
        ip(&["-4", "address", "replace", &format!("{address}/32"), "dev", &self.name])?;
        for net in routes {
            let (net, source) = (net.to_string(), address.to_string());
            ip(&["-4", "route", "replace", &net, "dev", &self.name, "src", &source])?;
        }
        Ok(())
    }

    /// Reads once; hands every packet over. Returns false when there was nothing to read.
    pub(super) fn read(&mut self, mut each: impl FnMut(&mut [u8])) -> io::Result<bool> {
        let count = match self.device.recv_multiple(&mut self.raw, &mut self.packets, &mut self.sizes, 0) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        };
        for (packet, size) in self.packets.iter_mut().zip(&self.sizes).take(count) {
            let packet = &mut packet[..*size];
            spell_zero(packet);
            each(packet);
        }
        Ok(true)
    }

    /// Writes a batch. The buffers are scratch afterwards.
    pub(super) fn write(&mut self, batch: &mut [Vec<u8>]) -> io::Result<()> {
        self.device.send_multiple(&mut self.gro, batch, VIRTIO_NET_HDR_LEN).map(drop)
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

/// Bytes in front of each packet given to [`Tun::write`].
pub(super) const HEADROOM: usize = VIRTIO_NET_HDR_LEN;

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output().context("cannot run `ip` (package iproute2)")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {}: {}", arguments.join(" "), said.trim());
    Ok(())
}
