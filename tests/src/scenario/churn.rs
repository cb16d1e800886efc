//! Sixteen clients with traffic both ways, while others come, go, roam and are revoked: who stays must not notice.
//!
//! ```text
//!   client    0 1 2 3 4 5 6 7 | 8 9 10 11 12 13 14 15
//!   path          direct      |       relayed
//!   3 and 11  leave after a third of the time
//!   7 and 15  come only then
//!   1 and 9   lose their authorization half way
//!   2         gets another address after two thirds
//!   30 more   come after a third, in one process, and vanish without a word after two thirds
//! ```

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    Context,
    lab::{Lab, Options, host, ping},
    swarm::Swarm,
};
use crate::{
    net::{
        NetNs,
        process::{Process, Spawn, run},
        services::checksum,
        topology::LAN_HOST,
    },
    standins::client::{Command, Event, SwarmCommand},
};

const SECOND: Duration = Duration::from_secs(1);

/// curl's --limit-rate: 16 clients in both directions are 51 Mbit/s.
const PACE: &str = "200k";
/// A little less than [`PACE`] brings, in bytes per second.
const RATE: usize = 200_000;
const LEAVE: [usize; 2] = [3, 11];
const COME: [usize; 2] = [7, 15];
const REVOKED: [usize; 2] = [1, 9];
const ROAMS: usize = 2;

/// How much of it.
#[derive(Clone, Copy)]
struct Length {
    /// What the transfers take.
    time: Duration,
    /// Bytes of each transfer; at [`PACE`] it takes the whole time.
    part: usize,
    /// Echoes of each client, five per second.
    echoes: u32,
}

impl Length {
    /// Half as long where only the kernel is another: the whole is seen without that.
    fn of(cx: &Context) -> Self {
        let seconds = if cx.variation.is_kernel_varied() { 10 } else { 20 };
        Self {
            time: Duration::from_secs(seconds.into()),
            part: RATE * seconds as usize,
            echoes: (seconds - 2) * 5,
        }
    }
}

pub(super) fn sixteen(cx: &mut Context) -> Result<()> {
    let length = Length::of(cx);
    let options = Options { resources: vec![host()], ..Options::default() };
    let topology = &cx.topology;
    for client in 8..16 {
        topology.block_direct_of(client)?;
    }
    let mut lab = Lab::start(cx, &options)?;
    let source = cx.logs.file("part");
    std::fs::write(&source, &std::fs::read(&cx.big.path)?[..length.part])?;
    for index in (0..16).filter(|index| !COME.contains(index)) {
        lab.connect(index, &[host()])?;
        let relayed = lab.clients[index].path().context("a path")?.is_relayed();
        ensure!(relayed == (index >= 8), "client {index}: relayed is {relayed}");
    }
    let before = tcp(&topology.lan)?;
    let began = Instant::now();
    let mut traffic: Vec<Option<Traffic>> = (0..16).map(|_| None).collect();
    for index in (0..16).filter(|index| !COME.contains(index)) {
        traffic[index] = Some(Traffic::start(cx, index, &source, length)?);
    }
    let until = |part: u32| std::thread::sleep((length.time * part / 6).saturating_sub(began.elapsed()));

    until(2);
    for index in LEAVE {
        traffic[index] = None;
        lab.clients[index].command(&Command::Stop)?;
    }
    let login = (&*lab.portal.url(), &*lab.client_token.clone());
    lab.expect_crowd(30);
    let mut passers_by =
        Swarm::start(cx, &topology.clients[0].namespace, login, "passer-by", 30, 20_000, 100)?;
    passers_by.command(&SwarmCommand::Want { resource: host().id })?;
    for index in COME {
        lab.connect(index, &[host()])?;
        traffic[index] = Some(Traffic::start(cx, index, &source, length)?);
    }
    until(3);
    for index in REVOKED {
        lab.portal.reject_access(lab.client_id(index)?, host().id)?;
        lab.clients[index].wait_goodbye(SECOND)?;
        traffic[index] = None;
        let answers = ping(&topology.clients[index].namespace, LAN_HOST.0.into());
        ensure!(answers.is_err(), "client {index} reaches the LAN after its access was revoked");
    }
    until(4);
    passers_by.wait("sessions", SECOND, |report| report.established == 30).context("thirty more")?;
    drop(passers_by);
    let client = &topology.clients[ROAMS].namespace;
    client.ip_batch(&[
        "addr del 192.0.2.130/26 dev eth0",
        "addr add 192.0.2.131/26 dev eth0",
        "route replace default via 192.0.2.129",
    ])?;
    lab.clients[ROAMS].forget_events();
    lab.clients[ROAMS].command(&Command::Roam)?;
    lab.clients[ROAMS].wait_established(10 * SECOND)?;

    for index in 0..16 {
        let Some(traffic) = traffic[index].take() else { continue };
        let lost = traffic.finish(&lab, &source).with_context(|| format!("client {index}"))?;
        if index == ROAMS {
            println!("      the roaming client lost {lost} of {} echoes", length.echoes);
            continue;
        }
        ensure!(
            lost <= 2,
            "client {index}, which nothing happened to, lost {lost} of {} echoes",
            length.echoes
        );
        let said = |event: &Event| matches!(event, Event::Closed { .. } | Event::Goodbye { .. });
        ensure!(!lab.clients[index].events().iter().any(said), "client {index} lost its connection");
    }
    let after = tcp(&topology.lan)?;
    let (sent, again) = (after.0 - before.0, after.1 - before.1);
    println!(
        "      {:.1} s; the LAN host sent {sent} TCP segments, {again} of them again",
        began.elapsed().as_secs_f64()
    );
    // What was under way to those who left, lost access or roamed is repeated; disorder would be far more.
    ensure!(again * 50 < sent, "{again} of {sent} TCP segments were sent again");
    lab.terminate(5 * SECOND)?;
    let workers = match cx.variation.workers {
        Some(workers) => workers,
        None => std::thread::available_parallelism()?.get(),
    };
    every_worker_served(&lab, workers)
}

/// Each of them ended orderly, and carried packets of some client.
fn every_worker_served(lab: &Lab, workers: usize) -> Result<()> {
    let lines = lab.workers_at_rest();
    ensure!(lines.len() == workers, "{} of {workers} workers ended orderly", lines.len());
    for line in lines {
        ensure!(!line.contains("outbound_packets=0"), "a worker carried nothing: {line}");
    }
    Ok(())
}

/// A download, an upload and echoes of one client.
struct Traffic {
    index: usize,
    length: Length,
    down: (Process, PathBuf),
    up: Process,
    echoes: Process,
}

impl Traffic {
    fn start(cx: &Context, index: usize, source: &std::path::Path, length: Length) -> Result<Self> {
        let namespace = &cx.topology.clients[index].namespace;
        let spawn = |what: &str, command: &[&str]| {
            let command = command.iter().map(|&word| word.to_owned()).collect();
            let name = format!("{what}-{index}");
            Process::spawn(namespace, &cx.logs, &Spawn { name: &name, command, ..Spawn::default() })
        };
        let file = cx.logs.file(&format!("came-{index}"));
        let (to, from) = (file.display().to_string(), source.display().to_string());
        let range = format!("0-{}", length.part - 1);
        let url = format!("http://{}/big", LAN_HOST.0);
        let put = format!("http://{}/put/went-{index}", LAN_HOST.0);
        let curl = ["curl", "-sS", "-f", "--limit-rate", PACE];
        let down = [&curl[..], &["-r", &range, "-o", &to, &url]].concat();
        let up = [&curl[..], &["-T", &from, &put]].concat();
        let (count, address) = (length.echoes.to_string(), LAN_HOST.0.to_string());
        let ping = ["ping", "-n", "-q", "-i", "0.2", "-W", "2", "-c", &count, &address];
        Ok(Self {
            index,
            length,
            down: (spawn("down", &down)?, file),
            up: spawn("up", &up)?,
            echoes: spawn("ping", &ping)?,
        })
    }

    /// Waits for the end; every byte must be right. How many echoes were lost.
    fn finish(mut self, lab: &Lab, source: &std::path::Path) -> Result<u32> {
        let limit = self.length.time * 2;
        let status = self.down.0.wait(limit)?;
        ensure!(status.success(), "down: curl ended with {status}: {}", self.down.0.log());
        let status = self.up.wait(limit)?;
        ensure!(status.success(), "up: curl ended with {status}: {}", self.up.log());
        let wanted = checksum(source)?;
        ensure!(checksum(&self.down.1)? == wanted, "what came down is not what is there");
        let name = format!("went-{}", self.index);
        ensure!(lab.lan.uploaded(&name)? == wanted, "what came up is not what was sent");
        // ping's exit code is about any answer at all.
        self.echoes.wait(limit)?;
        let said = self.echoes.log();
        let received = said.split_once("transmitted, ").and_then(|(_, rest)| rest.split(' ').next());
        let received: u32 = received.context("ping's summary")?.parse()?;
        Ok(self.length.echoes.saturating_sub(received))
    }
}

/// TCP segments that a host has sent, and how many of them were sent again (`/proc/net/snmp`).
fn tcp(namespace: &NetNs) -> Result<(u64, u64)> {
    let said = run(namespace, 2 * SECOND, &["cat", "/proc/net/snmp"])?.success()?;
    let mut lines = said.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().context("names")?, lines.next().context("values")?);
    let field = |name: &str| -> Result<u64> {
        let found = names.split(' ').zip(values.split(' ')).find(|(known, _)| *known == name);
        Ok(found.with_context(|| format!("/proc/net/snmp has no {name}"))?.1.parse()?)
    };
    Ok((field("OutSegs")?, field("RetransSegs")?))
}
