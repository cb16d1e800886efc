//! One run: iperf3 from the client host to the LAN host, and what it cost the gateway.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{
    accounting::{self, Meter},
    bed::{Bed, Who},
    report::{Cost, Run},
};
use crate::{
    net::process::{Process, Spawn},
    scenario::{Context, transfers::iperf3},
};

/// What travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Load {
    /// One stream, as fast as it goes.
    Tcp,
    /// Datagrams of this many bytes of payload at this many Mbit/s.
    Udp { bytes: u32, mbit: u32 },
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
    let (address, port) = (who.target().to_string(), PORT.to_string());
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
    let mut arguments = ["-p", &PORT.to_string(), "-t", &seconds.to_string()].map(str::to_owned).to_vec();
    if let Load::Udp { bytes, mbit } = load {
        arguments.extend(["-u", "-b", &format!("{mbit}M"), "-l", &bytes.to_string()].map(str::to_owned));
    }
    if direction == Direction::Inbound {
        arguments.push("-R".to_owned());
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let meter = Meter::new(bed.pid(who), &bed.napi);
    let before = meter.read()?;
    let client = &bed.cx.topology.clients[index].namespace;
    let report = iperf3(client, IpAddr::V4(who.target()), &arguments)?;
    let cost = before.until(&meter.read()?);
    let arrived = arrived(&report, load)?;
    Ok(Run { cost, void: accounting::is_void(&cost), ..arrived })
}

/// iperf3's report as the receiver sees it; without a cost.
///
/// # Errors
/// If it lacks something.
pub(super) fn arrived(report: &Value, load: Load) -> Result<Run> {
    let end = &report["end"];
    let (packets, bytes, seconds, lost_percent) = match load {
        Load::Tcp => {
            let sum = &end["sum_received"];
            let bytes = whole(&sum["bytes"]).context("iperf3's bytes")?;
            (bytes / SEGMENT, bytes, sum["seconds"].as_f64(), 0.0)
        }
        Load::Udp { bytes: size, .. } => {
            let sum = &end["sum"];
            let sent = whole(&sum["packets"]).context("iperf3's packets")?;
            let lost = whole(&sum["lost_packets"]).context("iperf3's losses")?;
            let packets = sent.saturating_sub(lost);
            let percent = 100.0 * lost as f64 / sent.max(1) as f64;
            (packets, packets * u64::from(size), sum["seconds"].as_f64(), percent)
        }
    };
    let seconds = seconds.context("iperf3's seconds")?;
    Ok(Run { packets, bytes, seconds, lost_percent, cost: Cost::default(), void: false, repeated: 0 })
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
