//! What a packet costs with one worker and with two, both busy at once.
//!
//! ```text
//!   client0: tun-0 .. tun-15, a process, an address and an iperf3 each --> gateway, all cores --> LAN host
//! ```
//!
//! The clients are on the same cores as the gateway: what is compared is the gateway's CPU time for a packet, not how much
//! gets through. All clients belong to one host, so their source addresses choose the tunnel.

use std::{net::IpAddr, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};

use super::{
    accounting::{self, Meter, thread_times},
    bed::{self, OTHERS_AND_GATEWAY},
    report::{Run, Spread, WorkerCount, Workers},
    traffic::{self, Direction},
};
use crate::{
    net::{
        process::{Logs, Process, Spawn},
        services::BigFile,
        topology::{LAN_HOST, Topology, direct},
    },
    scenario::{
        Context, Variation,
        client::Client,
        lab::{Lab, Options, lan4, ping},
        transfers::iperf3,
    },
    standins::client::{Config, Event},
};

/// As many as a home for half of them can be unfair to.
const CLIENTS: usize = 16;
const COUNTS: [usize; 2] = [1, 2];
/// Of the first client's UDP socket, TUN number and iperf3 server.
const FIRST_UDP_PORT: u16 = 53_000;
const FIRST_TABLE: usize = 1000;
const FIRST_SERVER_PORT: u16 = 5400;
const PATIENCE: Duration = Duration::from_secs(20);

const DIRECTIONS: [(Direction, &str); 2] =
    [(Direction::Outbound, "TCP outbound"), (Direction::Inbound, "TCP inbound")];

/// One run: its cost, and per cent of a core of the worker that did least and most.
struct Seen {
    run: Run,
    least: f64,
    most: f64,
}

/// Each round makes everything anew for each number of workers.
///
/// # Errors
/// If something does not come up, or the gateway has another number of workers than asked for.
pub(super) fn measure(directory: &Path, gateway: &Path, rounds: usize, seconds: u32) -> Result<Vec<Workers>> {
    let mut seen: Vec<Vec<Vec<Seen>>> =
        DIRECTIONS.iter().map(|_| COUNTS.iter().map(|_| Vec::new()).collect()).collect();
    for round in 1..=rounds {
        for (nth, workers) in COUNTS.into_iter().enumerate() {
            let crowd = Crowd::start(&directory.join(format!("crowd-{round}-{workers}")), gateway, workers)?;
            for ((direction, name), seen) in DIRECTIONS.iter().zip(&mut seen) {
                let one =
                    crowd.send(*direction, seconds).with_context(|| format!("{workers} workers, {name}"))?;
                println!(
                    "    run {round} of {rounds}: {workers} workers, {name}: {:.0} ns/packet, {:.2} Gbit/s, workers busy {:.0} to {:.0} %",
                    one.run.ns_per_packet(),
                    one.run.bytes as f64 * 8.0 / one.run.seconds / 1e9,
                    one.least,
                    one.most
                );
                seen[nth].push(one);
            }
        }
    }
    Ok(DIRECTIONS.iter().zip(seen).map(|((_, name), seen)| summary(name, seen)).collect())
}

fn summary(name: &str, seen: Vec<Vec<Seen>>) -> Workers {
    let count = |(workers, seen): (usize, Vec<Seen>)| {
        let over = |value: &dyn Fn(&Seen) -> f64| Spread::of(seen.iter().map(value).collect());
        WorkerCount {
            workers,
            ns_per_packet: over(&|one| one.run.ns_per_packet()),
            gbit_per_second: over(&|one| one.run.bytes as f64 * 8.0 / one.run.seconds / 1e9),
            least_busy_percent: over(&|one| one.least),
            most_busy_percent: over(&|one| one.most),
            runs: seen.into_iter().map(|one| one.run).collect(),
        }
    };
    Workers {
        name: name.to_owned(),
        clients: CLIENTS,
        counts: COUNTS.into_iter().zip(seen).map(count).collect(),
    }
}

/// Clients and what they talk to.
struct Crowd {
    // Clients first, so that nobody complains on the way out.
    clients: Vec<(Client, IpAddr)>,
    _servers: Vec<Process>,
    napi: Vec<i32>,
    workers: usize,
    lab: Lab,
    cx: Context,
}

impl Crowd {
    fn start(directory: &Path, gateway: &Path, workers: usize) -> Result<Self> {
        let mut cx = Context {
            topology: Topology::build(direct::plan())?,
            logs: Logs::new(directory.to_path_buf())?,
            gateway: gateway.to_path_buf(),
            big: BigFile::empty(directory)?,
            variation: Variation { workers: Some(workers), ..Variation::default() },
        };
        let napi = bed::interfaces(&cx.topology, OTHERS_AND_GATEWAY, OTHERS_AND_GATEWAY, &mut Vec::new())?;
        accounting::allow(0, OTHERS_AND_GATEWAY)?;
        let options = Options { resources: vec![lan4()], expiry: None, ..Options::default() };
        let lab = Lab::start(&cx, &options)?;
        let found = thread_times(lab.gateway.pid(), "worker-").len();
        ensure!(found == workers, "the gateway has {found} workers instead of {workers}");
        let clients = join_all(&mut cx, &lab)?;
        let servers = (0..CLIENTS).map(|nth| server(&cx, nth)).collect::<Result<_>>()?;
        Ok(Self { clients, _servers: servers, napi, workers, lab, cx })
    }

    /// All clients at once; packets and bytes are sums.
    fn send(&self, direction: Direction, seconds: u32) -> Result<Seen> {
        let client = &self.cx.topology.clients[0].namespace;
        let pid = self.lab.gateway.pid();
        let meter = Meter::new(Some(pid), &self.napi);
        let (before, times) = (meter.read()?, thread_times(pid, "worker-"));
        let reports = std::thread::scope(|scope| {
            let one = |(nth, (_, address)): (usize, &(Client, IpAddr))| {
                let (address, port) =
                    (address.to_string(), (usize::from(FIRST_SERVER_PORT) + nth).to_string());
                scope.spawn(move || {
                    let time = seconds.to_string();
                    let back = if direction == Direction::Inbound { "-R" } else { "" };
                    let arguments = ["-B", &address, "-p", &port, "-t", &time, back];
                    iperf3(client, LAN_HOST.0.into(), &arguments)
                })
            };
            let threads: Vec<_> = self.clients.iter().enumerate().map(one).collect();
            let reports = threads.into_iter().map(|thread| thread.join().expect("iperf3() does not panic"));
            reports.collect::<Result<Vec<_>>>()
        })?;
        let cost = before.until(&meter.read()?);
        let after = thread_times(pid, "worker-");
        let busy = after.iter().map(|(tid, time)| {
            let ns = time.saturating_sub(times.get(tid).copied().unwrap_or(0));
            100.0 * ns as f64 / cost.wall_ns as f64
        });
        let busy: Vec<f64> = busy.collect();
        ensure!(busy.len() == self.workers, "a worker has ended");
        let runs: Vec<Run> = reports
            .iter()
            .map(|report| traffic::arrived(report, traffic::Load::Tcp))
            .collect::<Result<_>>()?;
        let mean_seconds = runs.iter().map(|run| run.seconds).sum::<f64>() / runs.len() as f64;
        let run = Run {
            packets: runs.iter().map(|run| run.packets).sum(),
            bytes: runs.iter().map(|run| run.bytes).sum(),
            seconds: mean_seconds,
            lost_percent: 0.0,
            cost,
            // The gateway has no core of its own here: what else the cores did is the clients'.
            void: false,
            repeated: 0,
        };
        let least = busy.iter().copied().fold(f64::INFINITY, f64::min);
        let most = busy.iter().copied().fold(0.0, f64::max);
        Ok(Seen { run, least, most })
    }
}

/// Starts the clients, connects them, and sends each one's packets into its own tunnel.
fn join_all(cx: &mut Context, lab: &Lab) -> Result<Vec<(Client, IpAddr)>> {
    let (namespace, url) = (&cx.topology.clients[0].namespace, lab.portal.url());
    let mut clients = Vec::new();
    for nth in 0..CLIENTS {
        let config = Config {
            port: FIRST_UDP_PORT + u16::try_from(nth)?,
            tun: format!("tun-{nth}"),
            ..Config::new(&url, &lab.client_token, &format!("crowd{nth}"))
        };
        clients.push(Client::start_with(&config, cx, namespace)?);
    }
    let mut joined = Vec::new();
    for (nth, mut client) in clients.into_iter().enumerate() {
        client.wait_joined(PATIENCE)?;
        client.wait_relay(PATIENCE)?;
        client.request(lan4().id)?;
        client.wait_established(PATIENCE)?;
        let address = client.events().iter().rev().find_map(|event| match event {
            Event::Joined { ipv4, .. } => Some(*ipv4),
            _ => None,
        });
        let address = address.context("a tunnel address")?;
        let table = FIRST_TABLE + nth;
        namespace.ip_batch(&[
            format!("route add 172.20.0.0/24 dev tun-{nth} table {table}"),
            format!("rule add from {address} lookup {table}"),
        ])?;
        joined.push((client, address));
    }
    ping(namespace, LAN_HOST.0.into())?;
    Ok(joined)
}

fn server(cx: &Context, nth: usize) -> Result<Process> {
    let port = (usize::from(FIRST_SERVER_PORT) + nth).to_string();
    let command = ["iperf3", "-s", "-p", &port].map(str::to_owned).to_vec();
    let name = format!("iperf3-{nth}");
    Process::spawn(&cx.topology.lan, &cx.logs, &Spawn { name: &name, command, ..Spawn::default() })
}
