//! A topology in which everything runs: relays, the LAN's servers, a portal, the real daemon, clients.
//!
//! Scenarios read like what a person would do: start, request, `ping`, `curl`, revoke, look.

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use uuid::Uuid;

use super::{Context, checksums::Checksums, client::Client, fast_path::Proof, rest};
use crate::{
    net::{
        NetNs,
        process::{self, Outcome, Process, Spawn, run, wait_for},
        services::{LanServers, Relay},
        topology::{LAN_HOST, LAN_HOST_2, PORTAL},
    },
    standins::{
        client,
        portal::{self, Portal, Resource, Role},
    },
};

/// Where the portal listens.
pub const PORTAL_PORT: u16 = 8081;

/// How long one step of a set-up may take. A lost TURN request is repeated after 1 s, a lost WireGuard handshake
/// message only after 5 s and a bit, and on a lossy path two may be lost.
pub const PATIENCE: Duration = Duration::from_secs(15);

/// The name the gateway connects under.
pub const GATEWAY_NAME: &str = "lab-gateway";

/// What a scenario wants different from the usual.
#[derive(Clone)]
pub struct Options {
    /// The daemon's RUST_LOG.
    pub rust_log: &'static str,
    /// Which endpoints the portal serves.
    pub portal: portal::Generation,
    /// Which generation of client connects.
    pub client: client::Generation,
    /// No relay is offered until the scenario says so.
    pub hold_relays: bool,
    /// How long authorizations last.
    pub expiry: Option<Duration>,
    /// What can be authorized.
    pub resources: Vec<Resource>,
    /// Where the portal listens.
    pub listen: SocketAddr,
    /// How the daemon is told to reach the portal, if not by the address that it listens on.
    pub gateway_url: Option<String>,
    /// How the clients are.
    pub client_url: Option<String>,
    /// How the daemon is started.
    pub launch: Launch,
    /// What the portal wants of flow logs.
    pub flow_logs: portal::FlowLogs,
    /// How long each step of coming up may take.
    pub patience: Duration,
}

/// How the daemon is started, where that differs from root with environment variables.
#[derive(Clone, Default)]
pub struct Launch {
    /// Programs and their arguments in front of the daemon, that become it: `setpriv ... --`.
    pub wrapper: Vec<String>,
    /// Further variables; they replace the usual ones of the same name.
    pub environment: Vec<(&'static str, String)>,
    /// Usual variables that are left out.
    pub without: &'static [&'static str],
}

impl Launch {
    /// As its own but for one more variable.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl Into<String>) -> Self {
        self.environment.push((key, value.into()));
        self
    }

    /// The daemon leaves forwarding and nftables alone; [`Topology::prepare_gateway`] does that.
    ///
    /// [`Topology::prepare_gateway`]: crate::net::topology::Topology::prepare_gateway
    #[must_use]
    pub fn without_network_setup(self) -> Self {
        self.with("FIREZONE_NO_NETWORK_SETUP", "true")
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rust_log: "info",
            portal: portal::Generation::Both,
            client: client::Generation::Head,
            hold_relays: false,
            expiry: Some(Duration::from_secs(3600)),
            resources: vec![lan4(), lan6()],
            listen: SocketAddr::new(PORTAL.into(), PORTAL_PORT),
            gateway_url: None,
            client_url: None,
            launch: Launch::default(),
            flow_logs: portal::FlowLogs::default(),
            patience: PATIENCE,
        }
    }
}

/// The LAN's IPv4 network.
pub fn lan4() -> Resource {
    Resource::cidr("lan4", "172.20.0.0/24")
}

/// The LAN's IPv6 network.
pub fn lan6() -> Resource {
    Resource::cidr("lan6", "fd00:db8:20::/64")
}

/// Only the LAN host's first IPv4 address.
pub fn host() -> Resource {
    Resource::cidr("host", &format!("{}/32", LAN_HOST.0))
}

/// Only the LAN host's second IPv4 address.
pub fn host_2() -> Resource {
    Resource::cidr("host 2", &format!("{}/32", LAN_HOST_2.0))
}

/// Everything that runs. Fields go in this order: clients first, so that nobody complains on the way out.
pub struct Lab {
    /// Connected clients, by index of their node.
    pub clients: Vec<Client>,
    /// The daemon.
    pub gateway: Process,
    /// The portal.
    pub portal: Portal,
    /// coturns, by index of their node.
    pub relays: Vec<Relay>,
    /// What coturn and portal share.
    pub relay_secret: String,
    /// The LAN host's servers.
    pub lan: LanServers,
    /// What the daemon presents to the portal.
    pub gateway_token: String,
    /// What clients present.
    pub client_token: String,
    expected_warnings: Vec<&'static str>,
    most_clients: usize,
    crowd: usize,
    checksums: Checksums,
    /// The gateway must have taken the fast path.
    fast: Option<Proof>,
}

impl Lab {
    /// Starts relays, servers, portal and the daemon, and waits until the daemon has joined the portal; then the clients.
    ///
    /// # Errors
    /// If one of them does not come up.
    pub fn start(cx: &Context, options: &Options) -> Result<Self> {
        let topology = &cx.topology;
        let secret = format!("relay secret {}", Uuid::new_v4());
        let (mut relays, mut offers) = (Vec::new(), Vec::new());
        for (index, node) in topology.relays.iter().enumerate() {
            let addresses = topology.relay_addresses(index);
            relays.push(Relay::start(
                &node.namespace,
                &cx.logs,
                &format!("relay{index}"),
                &addresses,
                &secret,
            )?);
            let addresses: Vec<SocketAddr> =
                addresses.into_iter().map(|ip| SocketAddr::new(ip, 3478)).collect();
            offers.push(portal::Relay::coturn(addresses, &secret));
        }
        let lan = LanServers::start(&topology.lan, &cx.logs, cx.big.clone())?;
        let config = portal::Config {
            listen: options.listen,
            generation: options.portal,
            gateway_token: format!("gateway-token.{}", Uuid::new_v4()),
            client_token: format!("client-token.{}", Uuid::new_v4()),
            resources: options.resources.clone(),
            relays: offers,
            expiry: options.expiry,
            hold_relays: options.hold_relays,
            flow_logs: options.flow_logs.clone(),
            ..portal::Config::default()
        };
        let (gateway_token, client_token) = (config.gateway_token.clone(), config.client_token.clone());
        let portal = Portal::start(Some(&topology.portal.namespace.path()), config)?;
        let url = options.gateway_url.clone().unwrap_or_else(|| portal.url());
        let mut gateway = launch(cx, "gateway", &gateway_token, &url, options.rust_log, &options.launch)?;
        if let Err(error) = portal.wait_online(Role::Gateway, 1, options.patience) {
            return Err(match gateway.poll() {
                Some(status) => error.context(format!("the gateway has ended: {status}")),
                None => error,
            });
        }
        let mut lab = Self {
            clients: Vec::new(),
            gateway,
            portal,
            relays,
            relay_secret: secret,
            lan,
            gateway_token,
            client_token,
            expected_warnings: Vec::new(),
            most_clients: 0,
            crowd: 0,
            checksums: Checksums::of(topology),
            fast: cx.variation.is_fast().then(|| Proof::of(topology)),
        };
        for index in 0..topology.clients.len() {
            let url = options.client_url.clone().unwrap_or_else(|| lab.portal.url());
            let client = Client::start(cx, index, &url, &lab.client_token, options.client)?;
            lab.clients.push(client);
        }
        for client in &mut lab.clients {
            client.wait_joined(options.patience)?;
            if !options.hold_relays {
                client.wait_relay(options.patience)?;
            }
        }
        Ok(lab)
    }

    /// Kills coturn `index` and starts it again on the same addresses: it knows nobody any more.
    ///
    /// # Errors
    /// If it does not come up.
    pub fn restart_relay(&mut self, cx: &Context, index: usize) -> Result<()> {
        self.relays[index].process().signal(Signal::KILL)?;
        self.relays[index].process().wait(Duration::from_secs(2))?;
        let (node, addresses) = (&cx.topology.relays[index], cx.topology.relay_addresses(index));
        let name = format!("relay{index}-again");
        self.relays[index] = Relay::start(&node.namespace, &cx.logs, &name, &addresses, &self.relay_secret)?;
        Ok(())
    }

    /// Client `index` requests each resource and is connected.
    ///
    /// # Errors
    /// If one of its steps takes longer than [`PATIENCE`].
    pub fn connect(&mut self, index: usize, resources: &[Resource]) -> Result<()> {
        self.connect_within(index, resources, PATIENCE)
    }

    /// The same with another limit for each step.
    ///
    /// # Errors
    /// If a step takes longer than `limit`.
    pub fn connect_within(&mut self, index: usize, resources: &[Resource], limit: Duration) -> Result<()> {
        for resource in resources {
            self.clients[index].request(resource.id)?;
        }
        for resource in resources {
            self.clients[index].wait_authorized(resource.id, limit)?;
        }
        self.clients[index].wait_established(limit)
    }

    /// The id of client `index` at the portal.
    ///
    /// # Errors
    /// If it has never connected.
    pub fn client_id(&self, index: usize) -> Result<Uuid> {
        self.portal.id_of(Role::Client, &Client::name(index)).context("the client has not connected")
    }

    /// Lines at WARN or ERROR that contain `text` are not held against the daemon.
    pub fn expect_warning(&mut self, text: &'static str) {
        self.expected_warnings.push(text);
    }

    /// Besides the topology's clients the gateway has this many more at once.
    pub fn expect_crowd(&mut self, clients: usize) {
        self.crowd += clients;
    }

    /// The daemon lives, ends in order when it is told to, and has logged nothing above INFO that was not expected. The
    /// clients go first.
    ///
    /// # Errors
    /// As [`Lab::terminate`].
    pub fn finish(mut self) -> Result<()> {
        if let Some(status) = self.gateway.poll() {
            bail!("the gateway has ended: {status}");
        }
        self.most_clients = self.most_clients.max(self.clients.len());
        self.clients.clear();
        // What was on its way arrives: a worker that ends earlier than others takes in no more of what they pass to it.
        std::thread::sleep(Duration::from_millis(50));
        self.terminate(Duration::from_secs(10))
    }

    /// SIGTERM; the daemon ends within `limit`, with code 0, without a warning, and with every queue and buffer empty. Until
    /// then no host has refused a packet for its checksum.
    ///
    /// # Errors
    /// With its exit status, the lines, what is left in one of its queues, or the counters of bad checksums.
    pub fn terminate(&mut self, limit: Duration) -> Result<()> {
        self.checksums.check()?;
        self.fast.as_ref().map_or(Ok(()), Proof::check)?;
        self.most_clients = self.most_clients.max(self.clients.len());
        rest::terminate(&mut self.gateway, limit, self.most_clients + self.crowd)?;
        self.no_warnings()
    }

    /// What each worker said about itself when it ended.
    pub fn workers_at_rest(&self) -> Vec<String> {
        rest::workers(&self.gateway.log())
    }

    fn no_warnings(&self) -> Result<()> {
        let log = self.gateway.log();
        let warnings: Vec<&str> = log
            .lines()
            .filter(|line| matches!(line.split_whitespace().nth(1), Some("WARN" | "ERROR")))
            .filter(|line| !self.expected_warnings.iter().any(|expected| line.contains(expected)))
            .collect();
        ensure!(warnings.is_empty(), "the gateway warned: {}", warnings.join("; "));
        Ok(())
    }
}

/// Starts the daemon as a user would: environment variables, no test hooks.
///
/// # Errors
/// If the binary does not exist.
pub fn start_gateway(cx: &Context, log: &str, token: &str, url: &str, rust_log: &str) -> Result<Process> {
    launch(cx, log, token, url, rust_log, &Launch::default())
}

/// The same in another way.
///
/// # Errors
/// If the binary does not exist.
pub fn launch(
    cx: &Context,
    log: &str,
    token: &str,
    url: &str,
    rust_log: &str,
    launch: &Launch,
) -> Result<Process> {
    ensure!(
        cx.gateway.exists(),
        "{} does not exist; build it with `cargo build --bin firezone-gateway`",
        cx.gateway.display()
    );
    let rust_log = format!("{rust_log},{}", rest::DIRECTIVE);
    let control = cx.logs.file("control.sock").display().to_string();
    let environment = [
        ("FIREZONE_TOKEN", token),
        ("FIREZONE_CONTROL_SOCKET", &control),
        ("FIREZONE_API_URL", url),
        ("FIREZONE_ID", "bd7662a5-eeb4-4161-8e72-0d477abfcb22"),
        ("FIREZONE_NAME", GATEWAY_NAME),
        ("HEALTH_CHECK_ADDR", "127.0.0.1:8080"),
        ("FIREZONE_NO_TELEMETRY", "true"),
        ("RUST_LOG", &rust_log),
        ("RUST_BACKTRACE", "1"),
        ("NO_COLOR", "1"),
    ];
    let usual = environment.iter().filter(|(key, _)| !launch.without.contains(key));
    let mut environment: Vec<(String, String)> =
        usual.map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
    environment.extend(cx.variation.environment());
    environment.extend(launch.environment.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
    let command = launch.wrapper.iter().cloned().chain([cx.gateway.display().to_string()]).collect();
    Process::spawn(
        &cx.topology.gateway.namespace,
        &cx.logs,
        &Spawn { name: log, command, environment, ..Spawn::default() },
    )
}

/// One echo each to the LAN host's IPv4 and IPv6 address.
///
/// # Errors
/// If one does not come back.
pub fn ping_both(namespace: &NetNs) -> Result<()> {
    for address in [IpAddr::V4(LAN_HOST.0), IpAddr::V6(LAN_HOST.1)] {
        ping(namespace, address)?;
    }
    Ok(())
}

/// One echo.
///
/// # Errors
/// If it does not come back within 2 s.
pub fn ping(namespace: &NetNs, address: IpAddr) -> Result<()> {
    let said = ping_raw(namespace, &[&address.to_string()])?;
    ensure!(said.status.success(), "no echo from {address}: {}{}", said.stdout, said.stderr);
    Ok(())
}

/// `ping -n -c 1 -W 2` with further arguments, whatever comes of it.
///
/// # Errors
/// If `ping` does not end.
pub fn ping_raw(namespace: &NetNs, arguments: &[&str]) -> Result<Outcome> {
    let command: Vec<&str> = ["ping", "-n", "-c", "1", "-W", "2"].iter().chain(arguments).copied().collect();
    run(namespace, Duration::from_secs(5), &command)
}

/// Waits until an echo request to `address` is answered with "administratively prohibited".
///
/// # Errors
/// If that takes longer than `limit`.
pub fn wait_prohibited(namespace: &NetNs, address: IpAddr, limit: Duration) -> Result<()> {
    let mut last = String::new();
    wait_for(&format!("ICMP prohibited from {address}"), limit, || {
        let said = run(
            namespace,
            Duration::from_secs(3),
            // The answer to one that went out just before is refused on its way back, so that nothing comes: ask again.
            &["ping", "-n", "-c", "1", "-W", "0.2", &address.to_string()],
        )?;
        last = said.stdout;
        Ok(is_prohibited(&last).then_some(()))
    })
    .with_context(|| format!("ping said: {last}"))
}

/// What iputils prints for ICMP 3/13 and ICMPv6 1/1.
pub fn is_prohibited(ping: &str) -> bool {
    ping.contains("Packet filtered") || ping.contains("Administratively prohibited")
}

/// HTTP over IPv4 and IPv6.
///
/// # Errors
/// If one of them fails.
pub fn http_both(namespace: &NetNs) -> Result<()> {
    for host in [LAN_HOST.0.to_string(), format!("[{}]", LAN_HOST.1)] {
        let body = curl(namespace, &[&format!("http://{host}/")])?
            .success()
            .with_context(|| format!("HTTP to {host}"))?;
        ensure!(body == "hello from the LAN\n", "{body:?}");
    }
    Ok(())
}

/// `curl -sS --max-time 5` with further arguments.
///
/// # Errors
/// If curl does not end.
pub fn curl(namespace: &NetNs, arguments: &[&str]) -> Result<Outcome> {
    let command: Vec<&str> = ["curl", "-sS", "--max-time", "5"].iter().chain(arguments).copied().collect();
    run(namespace, Duration::from_secs(10), &command)
}

/// When the first byte of `http://address:80/` arrives, trying again every 30 ms.
///
/// # Errors
/// If there is none after `limit`.
pub fn first_http_byte(namespace: &NetNs, address: IpAddr, limit: Duration) -> Result<Instant> {
    namespace.run(|| {
        let attempt = || -> std::io::Result<()> {
            // A lost SYN would be repeated after a whole second only.
            let mut stream =
                TcpStream::connect_timeout(&SocketAddr::new(address, 80), Duration::from_millis(30))?;
            stream.set_read_timeout(Some(limit))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            stream.read_exact(&mut [0])
        };
        wait_for("the first byte over HTTP", limit, || Ok(attempt().is_ok().then(Instant::now)))
    })
}

/// Status and body of a GET at the daemon's health port, seen from its own namespace.
///
/// # Errors
/// If curl does not end.
pub fn health(cx: &Context, path: &str) -> Result<(u16, String)> {
    let url = format!("http://127.0.0.1:8080{path}");
    let said = curl(&cx.topology.gateway.namespace, &["-w", "\n%{http_code}", &url])?;
    let (body, status) = said.stdout.rsplit_once('\n').unwrap_or_default();
    // 000 is what curl prints when nobody listens.
    Ok((status.parse().unwrap_or(0), body.to_owned()))
}

/// Whether a condition of `/readyz` holds.
///
/// # Errors
/// If it does not answer with JSON that has the condition in it.
pub fn is_up(cx: &Context, condition: &str) -> Result<bool> {
    let (status, body) = health(cx, "/readyz")?;
    let report: serde_json::Value =
        serde_json::from_str(&body).with_context(|| format!("/readyz answered {status} {body:?}"))?;
    report["conditions"][condition]["up"].as_bool().with_context(|| format!("no {condition} in {body}"))
}

/// A download that runs on the side and grows a file.
pub struct Download {
    /// The curl process.
    pub process: Process,
    file: PathBuf,
}

impl Download {
    /// Fetches `url` into a file named `name`.
    ///
    /// # Errors
    /// If curl cannot be started or brings nothing within 3 s.
    pub fn start(cx: &Context, namespace: &NetNs, name: &str, url: &str) -> Result<Self> {
        Self::begin(cx, namespace, name, &[url])
    }

    /// Fetches the first `length` bytes of `/slow` into a file named `name`.
    ///
    /// # Errors
    /// If curl cannot be started or brings nothing within 3 s.
    pub fn start_part(cx: &Context, namespace: &NetNs, name: &str, length: usize) -> Result<Self> {
        let range = format!("0-{}", length - 1);
        Self::begin(cx, namespace, name, &["-r", &range, &format!("http://{}/slow", LAN_HOST.0)])
    }

    fn begin(cx: &Context, namespace: &NetNs, name: &str, arguments: &[&str]) -> Result<Self> {
        let file = cx.logs.file(name);
        let path = file.display().to_string();
        let command = ["curl", "-sS", "-f", "-o", &path].into_iter().chain(arguments.iter().copied());
        let command = command.map(str::to_owned).collect();
        let name = format!("curl-{name}");
        let process =
            Process::spawn(namespace, &cx.logs, &Spawn { name: &name, command, ..Spawn::default() })?;
        let download = Self { process, file };
        process::wait_for("the download to begin", Duration::from_secs(3), || {
            Ok((download.length() > 0).then_some(()))
        })?;
        Ok(download)
    }

    /// Waits for the end; what came must be the first `length` bytes of the big file.
    ///
    /// # Errors
    /// If it takes longer than `limit`, curl fails, or one byte differs.
    pub fn finish_part(mut self, cx: &Context, length: usize, limit: Duration) -> Result<()> {
        let status = self.process.wait(limit).with_context(|| format!("{} bytes came", self.length()))?;
        ensure!(status.success(), "curl ended with {status}: {}", self.process.log());
        let (came, sent) = (std::fs::read(&self.file)?, std::fs::read(&cx.big.path)?);
        ensure!(came.len() == length, "{} bytes came instead of {length}", came.len());
        ensure!(came == sent[..length], "what came is not what was sent");
        Ok(())
    }

    /// Bytes so far.
    pub fn length(&self) -> u64 {
        std::fs::metadata(&self.file).map_or(0, |metadata| metadata.len())
    }

    /// Waits until at least 500 kB more have arrived than now.
    ///
    /// # Errors
    /// If that takes longer than `limit`.
    pub fn wait_growth(&self, limit: Duration) -> Result<()> {
        let before = self.length();
        wait_for(&format!("{} to grow", self.file.display()), limit, || {
            Ok((self.length() >= before + 500_000).then_some(()))
        })
    }

    /// Bytes that arrive within `time` from now.
    pub fn growth_within(&self, time: Duration) -> u64 {
        let before = self.length();
        std::thread::sleep(time);
        self.length() - before
    }
}
