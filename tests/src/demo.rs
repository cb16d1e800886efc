//! The demo: a small internet, the real daemon, one client that reaches the LAN directly and then through the relay.
//!
//! ```text
//!   client0 --[ NAT ]--[ router ]--[ NAT ]-- gateway ---- LAN host (HTTP, iperf3, DNS)
//!                       |      |
//!                    relay0   portal
//! ```
//!
//! The direct path is hole punching through both NATs; then the router drops UDP between the two, and the client comes
//! again. Nothing here is known to the daemon: it is started with environment variables as on any machine.
//!
//! A first byte over its limit on a busy machine says nothing about the gateway. Then the client leaves and asks anew, up
//! to [`ATTEMPTS`] times; the best attempt counts, and all are shown.

use std::{
    net::IpAddr,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    net::{
        NetNs,
        janitor::{self, Janitor},
        process::{Logs, run, wait_for},
        services::BigFile,
        topology::{LAN_HOST, Topology, nat},
    },
    scenario::{
        self, Context,
        client::Client,
        lab::{Lab, Options, first_http_byte, http_both, lan4, lan6, ping_both},
        transfers::iperf3,
    },
    standins::{
        client::{Command, Generation},
        portal::Role,
    },
};

/// `gateway-tests demo`.
#[derive(Debug, Clone, clap::Args)]
pub struct Arguments {
    /// Leave everything running afterwards, until Ctrl-C.
    #[arg(long)]
    pub hold: bool,
    /// The daemon; by default `firezone-gateway` beside this program.
    #[arg(long)]
    pub gateway: Option<PathBuf>,
}

/// Authorization to first byte over HTTP, on the local network.
const LIMITS: [(Kind, Duration); 2] =
    [(Kind::Direct, Duration::from_millis(300)), (Kind::Relayed, Duration::from_millis(500))];

/// How often the first byte is measured before its limit counts as missed.
const ATTEMPTS: usize = 3;
/// Of the client; each attempt has the next one, because coturn keeps the allocation of a client that left for a while,
/// and would refuse the same address and port to the next.
const FIRST_PORT: u16 = 52626;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Direct,
    Relayed,
}

/// One line of the table.
struct Row {
    kind: Kind,
    path: String,
    /// Authorization to first byte, of each attempt.
    attempts: Vec<Duration>,
    limit: Duration,
    rtt_ms: f64,
    up: Throughput,
    down: Throughput,
}

impl Row {
    /// The best attempt.
    fn first_byte(&self) -> Duration {
        self.attempts.iter().min().copied().unwrap_or_default()
    }
}

struct Throughput {
    bits_per_second: f64,
    /// Of the gateway's process, all threads.
    cpu: Duration,
    took: Duration,
}

/// Runs the demo.
///
/// # Errors
/// If this machine cannot run it, or something does not work; everything is removed in any case.
pub fn run_demo(arguments: &Arguments) -> Result<ExitCode> {
    if let Some(reason) = scenario::cannot_run() {
        anyhow::bail!("the demo cannot run here: {reason}");
    }
    let started = Instant::now();
    let step = |text: &str| println!("[{:6.2} s] {text}", started.elapsed().as_secs_f64());
    let janitor = Janitor::start()?;
    let directory = janitor::directory(std::process::id());
    let result = show(arguments, &directory, &step);
    if result.is_err() {
        print!("{}", Logs::new(directory.clone())?.tails(25));
        println!("logs in {}", directory.display());
        janitor::keep(&directory);
    } else {
        let _ = std::fs::remove_dir_all(&directory);
        step("everything is removed");
    }
    drop(janitor);
    let rows = result?;
    let slow: Vec<&Row> = rows.iter().filter(|row| row.first_byte() > row.limit).collect();
    for row in &slow {
        println!(
            "{:?}: the first byte took {:?}, more than {:?}, in the best of {ATTEMPTS} attempts",
            row.kind,
            row.first_byte(),
            row.limit
        );
    }
    Ok(if slow.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn show(arguments: &Arguments, directory: &std::path::Path, step: &dyn Fn(&str)) -> Result<Vec<Row>> {
    step("making a small internet: client, two NAT routers, router, relay, portal, gateway, LAN");
    let cx = Context {
        topology: Topology::build(nat::plan())?,
        logs: Logs::new(directory.to_path_buf())?,
        gateway: scenario::gateway_path(arguments.gateway.as_deref()),
        big: BigFile::make(directory)?,
        variation: scenario::Variation::default(),
    };
    step("starting coturn, nginx, iperf3, dnsmasq, the portal, the gateway and the client");
    let mut lab = Lab::start(&cx, &Options::default())?;
    let mut rows = Vec::new();
    let mut ports = FIRST_PORT..;
    let mut come_again = |lab: &mut Lab| come_again(&cx, lab, ports.next().context("a free port")?);
    for (kind, limit) in LIMITS {
        if kind == Kind::Relayed {
            step(
                "the client leaves; the router now drops UDP between client and gateway; the client comes again",
            );
            leave(&mut lab)?;
            cx.topology.block_direct()?;
            come_again(&mut lab)?;
        }
        rows.push(measure(&cx, &mut lab, kind, limit, step, &mut come_again)?);
    }
    print_table(&rows);
    if arguments.hold {
        hold(&cx, &lab);
    }
    step("SIGTERM to the gateway");
    lab.terminate(Duration::from_secs(5))?;
    lab.clients[0].wait_goodbye(Duration::from_secs(2))?;
    step("the gateway said goodbye to the client and ended with code 0");
    Ok(rows)
}

fn leave(lab: &mut Lab) -> Result<()> {
    lab.clients[0].command(&Command::Stop)?;
    lab.clients[0].process().wait(Duration::from_secs(5))?;
    lab.clients.clear();
    wait_for("the portal to see the client go", Duration::from_secs(5), || {
        Ok(lab.portal.online(Role::Client).is_empty().then_some(()))
    })
}

fn come_again(cx: &Context, lab: &mut Lab, port: u16) -> Result<()> {
    let url = lab.portal.url();
    lab.clients.push(Client::start_on_port(port, cx, 0, &url, &lab.client_token, Generation::Head)?);
    lab.clients[0].wait_joined(Duration::from_secs(5))?;
    lab.clients[0].wait_relay(Duration::from_secs(5))
}

fn measure(
    cx: &Context,
    lab: &mut Lab,
    kind: Kind,
    limit: Duration,
    step: &dyn Fn(&str),
    come_again: &mut dyn FnMut(&mut Lab) -> Result<()>,
) -> Result<Row> {
    let client = &cx.topology.clients[0].namespace;
    let lan_host = IpAddr::V4(LAN_HOST.0);
    let mut attempts = Vec::new();
    loop {
        step("the client asks for the LAN");
        let took = first_byte(client, lab, lan_host)?;
        step(&format!("first byte over HTTP {:.0} ms after the authorization", took.as_secs_f64() * 1e3));
        attempts.push(took);
        if took <= limit || attempts.len() == ATTEMPTS {
            break;
        }
        step(&format!("more than {} ms: the client leaves and comes again", limit.as_millis()));
        leave(lab)?;
        come_again(lab)?;
    }

    lab.clients[0].request(lan6().id)?;
    lab.clients[0].wait_authorized(lan6().id, Duration::from_secs(5))?;
    ping_both(client)?;
    http_both(client)?;
    let path = lab.clients[0].path().context("the client named no path")?;
    ensure!(path.is_relayed() == (kind == Kind::Relayed), "the path is {path:?}");
    step(&format!("ping and HTTP over IPv4 and IPv6 work, path: {path:?}"));
    let rtt_ms = ping_average(client, lan_host)?;
    step("iperf3, client to LAN");
    let up = throughput(client, lab, lan_host, &[])?;
    step("iperf3, LAN to client");
    let down = throughput(client, lab, lan_host, &["-R"])?;
    Ok(Row { kind, path: format!("{path:?}"), attempts, limit, rtt_ms, up, down })
}

/// From the portal's push of the authorization to the first byte of an HTTP answer.
fn first_byte(client: &NetNs, lab: &mut Lab, lan_host: IpAddr) -> Result<Duration> {
    lab.clients[0].request(lan4().id)?;
    let arrived = first_http_byte(client, lan_host, Duration::from_secs(5))?;
    let timing = lab.portal.timings().into_iter().rfind(|timing| timing.resource == lan4().id);
    Ok(arrived.saturating_duration_since(timing.context("the portal pushed an authorization")?.pushed))
}

/// Milliseconds.
fn ping_average(client: &NetNs, address: IpAddr) -> Result<f64> {
    let command = ["ping", "-n", "-q", "-c", "40", "-i", "0.05", &address.to_string()];
    let said = run(client, Duration::from_secs(10), &command)?.success()?;
    // rtt min/avg/max/mdev = 0.1/0.2/0.3/0.0 ms
    let numbers = said.split_once("mdev = ").map(|(_, numbers)| numbers).context("ping's summary")?;
    numbers.split('/').nth(1).context("ping's average")?.parse().context("ping's average")
}

fn throughput(client: &NetNs, lab: &Lab, server: IpAddr, direction: &[&str]) -> Result<Throughput> {
    let (cpu, started) = (lab.gateway.cpu_time()?, Instant::now());
    let arguments: Vec<&str> = ["-t", "3"].iter().chain(direction).copied().collect();
    let report = iperf3(client, server, &arguments)?;
    let bits_per_second =
        report["end"]["sum_received"]["bits_per_second"].as_f64().context("iperf3's sum")?;
    Ok(Throughput {
        bits_per_second,
        cpu: lab.gateway.cpu_time()?.saturating_sub(cpu),
        took: started.elapsed(),
    })
}

fn print_table(rows: &[Row]) {
    println!();
    println!(
        "{:<9} {:<16} {:>21} {:>9} {:>24} {:>24}",
        "", "path used", "first byte (limit)", "RTT", "client to LAN, CPU", "LAN to client, CPU"
    );
    for row in rows {
        let throughput = |t: &Throughput| {
            format!(
                "{:.0} Mbit/s, {:.0} % {:.2} s",
                t.bits_per_second / 1e6,
                100.0 * t.cpu.as_secs_f64() / t.took.as_secs_f64(),
                t.cpu.as_secs_f64()
            )
        };
        let first_byte =
            format!("{:.0} ms (< {} ms)", row.first_byte().as_secs_f64() * 1e3, row.limit.as_millis());
        println!(
            "{:<9} {:<16} {:>21} {:>9} {:>24} {:>24}",
            format!("{:?}", row.kind).to_lowercase(),
            row.path,
            first_byte,
            format!("{:.2} ms", row.rtt_ms),
            throughput(&row.up),
            throughput(&row.down)
        );
    }
    for row in rows.iter().filter(|row| row.attempts.len() > 1) {
        let all: Vec<String> =
            row.attempts.iter().map(|took| format!("{:.0} ms", took.as_secs_f64() * 1e3)).collect();
        println!("{:?}, first byte of each attempt, the best counts: {}", row.kind, all.join(", "));
    }
    println!(
        "first byte: from the portal's authorization to the first byte of an HTTP answer; CPU: the gateway's process,"
    );
    println!(
        "user and system, % of one core and seconds. Client, relay, routers and servers share this machine's cores.\n"
    );
}

/// Until Ctrl-C, whose handler removes everything.
fn hold(cx: &Context, lab: &Lab) {
    println!("Everything keeps running. To look around, each in a terminal of its own:\n");
    for namespace in cx.topology.namespaces() {
        println!("  nsenter --net={} bash", namespace.path().display());
    }
    println!(
        "\nFrom client0, for example:  curl http://{}/   ping {}   iperf3 -c {}",
        LAN_HOST.0, LAN_HOST.1, LAN_HOST.0
    );
    println!("Logs: {}; the gateway's pid is {}.", cx.logs.directory().display(), lab.gateway.pid());
    println!("Ctrl-C ends it and removes everything.");
    janitor::ctrl_c_is_the_way_out();
    loop {
        std::thread::park();
    }
}
