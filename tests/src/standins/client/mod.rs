//! A client as its own process, with a real TUN device (connections.md sections 1 to 10).
//!
//! `curl`, `ping` and `iperf3` in its namespace are ordinary programs; the runner talks to it by JSON
//! lines. It shares no code with gateway-proto: TURN (`turn`), candidates (`ice`) and the connection's
//! life (`connection`) are written from the spec a second time.
//!
//! ```text
//! eventloop -- core ----+-- connection (per gateway): ICE agent, WireGuard, route
//!                       +-- net: sockets (udp), relays (turn), ChannelData
//!                       +-- portal thread: WebSocket
//!                       +-- tun, inner
//! plain: a fixed peer instead of portal and ICE, on the same net, udp and tun
//! swarm: many of `core` in one process
//! ```
//!
//! It never announces ICE-less, so a portal gives it plain ICE (connections.md section 1.1).

mod config;
mod connection;
mod core;
mod eventloop;
mod ice;
mod inner;
mod net;
mod plain;
mod portal;
mod swarm;
mod tun;
mod turn;
mod udp;
mod wire;

use std::path::PathBuf;

use anyhow::{Context as _, Result};

pub use config::{Command, Config, Event, Generation, Path, Stats, Token};
pub use plain::{PlainArgs, PlainConfig, plain_main};
pub use swarm::{SwarmArgs, SwarmCommand, SwarmConfig, SwarmReport, swarm_main};

/// `gateway-tests client`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// JSON file with a `Config`.
    #[arg(long)]
    config: PathBuf,
}

/// Runs until a `stop` command; events on stdout, commands on stdin.
///
/// # Errors
/// When the configuration is unusable, or TUN or sockets cannot be opened.
pub fn main(args: &Args) -> Result<()> {
    let path = &args.config;
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let config = serde_json::from_str(&text)
        .with_context(|| format!("{} is not a client configuration", path.display()))?;
    eventloop::run(config)
}
