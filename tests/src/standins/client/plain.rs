//! A WireGuard client with one fixed peer: neither portal nor ICE, for servers that know nothing of them.
//!
//! It moves packets by the same TUN device, sockets, bursts and crypto as the whole client, so that a benchmark which
//! compares a gateway with a plain WireGuard server sends both the same bytes in the same batches.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use ipnet::IpNet;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use super::net::{Net, Route};
use super::tun::{HEADROOM, Tun};
use super::udp::{Inbox, Sockets};

/// `gateway-tests wireguard-client`.
#[derive(Debug, clap::Args)]
pub struct PlainArgs {
    /// JSON file with a `PlainConfig`.
    #[arg(long)]
    config: PathBuf,
}

/// What it is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlainConfig {
    /// Name of the TUN device.
    pub tun: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Our key, hex.
    pub private_key: String,
    /// The server's key, hex.
    pub peer_key: String,
    /// Where the server listens.
    pub endpoint: SocketAddr,
    /// Routed into the TUN.
    pub routes: Vec<IpNet>,
}

/// Runs until it is killed.
///
/// # Errors
/// When the configuration is unusable, or TUN or sockets cannot be opened.
pub fn plain_main(args: &PlainArgs) -> Result<()> {
    let path = &args.config;
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let config: PlainConfig = serde_json::from_str(&text)
        .with_context(|| format!("{} is not a client configuration", path.display()))?;
    Plain::open(&config)?.run()
}

/// Inner packets that are decrypted before they are written together.
const BATCH: usize = tun_rs::IDEAL_BATCH_SIZE;
/// Reads of one source per turn, as in the whole client.
const READS_PER_TURN: usize = 4;
/// boringtun's timers are looked at this often.
const TICK: Duration = Duration::from_millis(250);

struct Plain {
    tun: Tun,
    tunn: Tunn,
    net: Net,
    route: Route,
    decrypted: Vec<Vec<u8>>,
    count: usize,
}

impl Plain {
    fn open(config: &PlainConfig) -> Result<Self> {
        let key = |hex: &str| -> Result<[u8; 32]> {
            hex::decode(hex)?.try_into().map_err(|_| anyhow::anyhow!("a key has 32 bytes"))
        };
        let private = StaticSecret::from(key(&config.private_key)?);
        let peer = PublicKey::from(key(&config.peer_key)?);
        let tun = Tun::open(&config.tun)?;
        tun.bring_up(config.address, &config.routes)?;
        Ok(Self {
            tun,
            tunn: Tunn::new(private, peer, None, None, 1, None),
            net: Net::new(Sockets::bind(0)?),
            route: Route::Direct {
                local: SocketAddr::new(source_towards(config.endpoint)?, 0),
                remote: config.endpoint,
            },
            decrypted: vec![Vec::new(); BATCH],
            count: 0,
        })
    }

    fn run(mut self) -> Result<()> {
        let mut inbox = Inbox::new();
        let mut scratch = vec![0; 2048];
        let mut next_tick = Instant::now();
        if let TunnResult::WriteToNetwork(initiation) =
            self.tunn.format_handshake_initiation(&mut scratch, false)
        {
            self.net.send(self.route, initiation, next_tick);
        }
        loop {
            let now = Instant::now();
            if now >= next_tick {
                next_tick = now + TICK;
                if let TunnResult::WriteToNetwork(datagram) = self.tunn.update_timers(&mut scratch) {
                    self.net.send(self.route, datagram, now);
                }
            }
            let (udp, tun) = self.wait(next_tick.saturating_duration_since(now))?;
            let now = Instant::now();
            if udp {
                self.read_udp(&mut inbox, now)?;
            }
            if tun {
                self.read_tun(now)?;
            }
        }
    }

    fn wait(&self, limit: Duration) -> Result<(bool, bool)> {
        let timeout = Timespec::try_from(limit).context("a quarter of a second fits")?;
        let socket = self.net.sockets.v4.as_ref().context("a socket for IPv4")?;
        let mut fds = [
            PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.tun.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok((!fds[0].revents().is_empty(), !fds[1].revents().is_empty()))
    }

    fn read_udp(&mut self, inbox: &mut Inbox, now: Instant) -> Result<()> {
        for _ in 0..READS_PER_TURN {
            if !self.net.sockets.v4.as_ref().context("a socket for IPv4")?.read(inbox)? {
                break;
            }
            for datagram in inbox.datagrams() {
                self.decrypt(datagram.bytes, now);
                if self.count == BATCH {
                    self.write_tun();
                }
            }
        }
        self.write_tun();
        Ok(())
    }

    fn decrypt(&mut self, datagram: &[u8], now: Instant) {
        let buffer = &mut self.decrypted[self.count];
        buffer.resize(HEADROOM + datagram.len().max(256), 0);
        let mut result = self.tunn.decapsulate(None, datagram, &mut buffer[HEADROOM..]);
        loop {
            match result {
                TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                    let length = packet.len();
                    buffer.truncate(HEADROOM + length);
                    self.count += 1;
                    return;
                }
                TunnResult::WriteToNetwork(reply) => {
                    let reply = reply.to_vec();
                    self.net.send(self.route, &reply, now);
                    result = self.tunn.decapsulate(None, &[], &mut buffer[HEADROOM..]);
                }
                TunnResult::Done | TunnResult::Err(_) => return,
            }
        }
    }

    fn write_tun(&mut self) {
        let count = std::mem::take(&mut self.count);
        if count > 0 {
            // What does not fit into the device's queue is lost, as on any link.
            let _ = self.tun.write(&mut self.decrypted[..count]);
        }
    }

    fn read_tun(&mut self, now: Instant) -> Result<()> {
        let Self { tun, tunn, net, route, .. } = self;
        for _ in 0..READS_PER_TURN {
            let more = tun.read(|packet| {
                if let Some(initiation) = net.send_inner(tunn, *route, packet, now) {
                    net.send(*route, &initiation, now);
                }
            })?;
            if !more {
                break;
            }
        }
        net.flush();
        Ok(())
    }
}

/// The address that the kernel would send from.
fn source_towards(endpoint: SocketAddr) -> Result<IpAddr> {
    let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(endpoint).with_context(|| format!("no route to {endpoint}"))?;
    Ok(socket.local_addr()?.ip())
}
