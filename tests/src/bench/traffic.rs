//! One run: iperf3, or bursts, from the client host to the LAN host, and what it cost the gateway.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{
    accounting::{self, Meter},
    bed::{Bed, Who},
    burst::{self, Bursts},
    report::Run,
};
use crate::{
    net::process::{Process, Spawn},
    scenario::{Context, transfers::iperf3},
};

/// What travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    /// Streams side by side, as fast as they go.
    Tcp { streams: u16 },
    /// Datagrams of this many bytes of payload at this many Mbit/s.
    Udp { bytes: u32, mbit: u32 },
    /// Datagrams of which one system call sends several.
    Bursts(Bursts),
}

/// Client to resource, or back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    Outbound,
    Inbound,
}

/// Payload of a full TCP segment in a packet of 1280 bytes: without both headers and the timestamp option.
const SEGMENT: u64 = 1280 - 20 - 20 - 12;
/// Where iperf3 listens on each contender's address: a server on all addresses would answer UDP from the first.
const PORT: u16 = 5301;

/// The LAN host's iperf3 for everything that goes through `who`.
///
/// # Errors
/// If it cannot be started.
pub(super) fn server(cx: &Context, who: Who) -> Result<Process> {
    let (address, port) = (who.address().to_string(), PORT.to_string());
    let command = ["iperf3", "-s", "-B", &address, "-p", &port].map(str::to_owned).to_vec();
    let name = format!("iperf3 for {}", who.name());
    Process::spawn(&cx.topology.lan, &cx.logs, &Spawn { name: &name, command, ..Spawn::default() })
}

/// Sends for `seconds` through `who`, from client `index`.
///
/// # Errors
/// If iperf3 fails.
pub(super) fn run(
    bed: &Bed,
    who: Who,
    index: usize,
    load: Load,
    direction: Direction,
    seconds: u32,
) -> Result<Run> {
    bed.set_counting(who);
    let client = &bed.cx.topology.clients[index].namespace;
    let meter = Meter::new(bed.pid(who), &bed.napi);
    let before = meter.read()?;
    let seen = match load {
        Load::Tcp { .. } | Load::Udp { .. } => {
            let words = arguments(load, direction, seconds);
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            arrived(&iperf3(client, IpAddr::V4(who.target()), &words)?, load)?
        }
        Load::Bursts(bursts) => {
            let seen = burst::run(client, &bed.cx.topology.lan, who, bursts, direction, seconds)?;
            Arrived::datagrams(seen.sent, seen.arrived, bursts.bytes, seen.seconds)
        }
    };
    let cost = before.until(&meter.read()?);
    let Arrived { packets, bytes, seconds, lost_percent } = seen;
    Ok(Run { packets, bytes, seconds, lost_percent, cost, void: accounting::is_void(&cost), repeated: 0 })
}

/// What the receiver saw.
struct Arrived {
    packets: u64,
    bytes: u64,
    seconds: f64,
    lost_percent: f64,
}

impl Arrived {
    /// Datagrams of `size` bytes of payload.
    fn datagrams(sent: u64, arrived: u64, size: u32, seconds: f64) -> Self {
        Self {
            packets: arrived,
            bytes: arrived * u64::from(size),
            seconds,
            lost_percent: 100.0 * (sent - arrived) as f64 / sent.max(1) as f64,
        }
    }
}

/// Of iperf3.
fn arguments(load: Load, direction: Direction, seconds: u32) -> Vec<String> {
    let mut arguments = ["-p", &PORT.to_string(), "-t", &seconds.to_string()].map(str::to_owned).to_vec();
    match load {
        Load::Tcp { streams } => arguments.extend(["-P", &streams.to_string()].map(str::to_owned)),
        Load::Udp { bytes, mbit } => {
            arguments.extend(["-u", "-b", &format!("{mbit}M"), "-l", &bytes.to_string()].map(str::to_owned));
        }
        Load::Bursts(_) => {}
    }
    if direction == Direction::Inbound {
        arguments.push("-R".to_owned());
    }
    arguments
}

/// iperf3's report as the receiver sees it.
///
/// # Errors
/// If it lacks something.
fn arrived(report: &Value, load: Load) -> Result<Arrived> {
    let end = &report["end"];
    let sum = if matches!(load, Load::Tcp { .. }) { &end["sum_received"] } else { &end["sum"] };
    let seconds = sum["seconds"].as_f64().context("iperf3's seconds")?;
    match load {
        Load::Tcp { .. } => {
            let bytes = whole(&sum["bytes"]).context("iperf3's bytes")?;
            Ok(Arrived { packets: bytes / SEGMENT, bytes, seconds, lost_percent: 0.0 })
        }
        Load::Udp { bytes: size, .. } | Load::Bursts(Bursts { bytes: size, .. }) => {
            let sent = whole(&sum["packets"]).context("iperf3's packets")?;
            let lost = whole(&sum["lost_packets"]).context("iperf3's losses")?;
            Ok(Arrived::datagrams(sent, sent.saturating_sub(lost), size, seconds))
        }
    }
}

/// iperf3 writes large numbers with an exponent.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counts below 2^53, never negative"
)]
fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_f64().map(|value| value as u64))
}
