//! Layer-4 DNS servers on the gateway's tunnel addresses (dns.md sections 1 to 4): clients send their SRV and TXT
//! queries for DNS resources here, and any other they like. And the addresses of the resources' names, for control
//! (sections 5 and 6).
//!
//! ```text
//! udp::bind, one per address --.                               .-- upstream: one question, one nameserver
//!                                 message --> limits --> forward
//! tcp::bind, one per address --'                               '-- rtt: whom to ask first
//!      connections: which one goes when there are too many         nameservers --.
//!                                                                                 system: resolv.conf, hosts
//! LookUps::resolve ---------> resolver --> hickory --> provider: its sockets -----'
//! ```
//!
//! All of it runs on a thread of its own: a client that floods its DNS server must not delay the answers that ICE and
//! the portal wait for, nor packets. Nothing here knows resources or clients; a client is a source address, which the
//! workers have checked. Only [`look_up_afresh`] runs where it is called.

mod connections;
mod forward;
mod latency;
mod limits;
mod message;
mod nameservers;
mod provider;
mod resolver;
mod rtt;
mod server;
mod stats;
mod system;
mod tcp;
mod udp;
mod upstream;

use std::{
    cell::RefCell, collections::BTreeSet, io, net::SocketAddr, path::Path, rc::Rc, sync::Arc, thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use gateway_proto::names::{DomainName, Lookup, Resolved};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    sync::{mpsc, oneshot},
    task::{LocalSet, spawn_local},
    time::{Instant, MissedTickBehavior, interval},
};

use self::{
    connections::Connections,
    forward::Forwarder,
    resolver::Resolver,
    server::Server,
    system::{Hosts, ResolvConf, Watched},
};
pub use self::{
    latency::{BOUNDS_MS, Kind, Purpose, Seen, Verdict},
    stats::{Count, Stats},
};

const RESOLV_CONF: &str = "/etc/resolv.conf";
const HOSTS: &str = "/etc/hosts";
/// Attempts to bind; a fresh IPv6 address may be unusable for a moment (dns.md section 2).
const BIND_ATTEMPTS: usize = 3;
/// The pause after a failed one.
const BIND_PAUSE: Duration = Duration::from_millis(100);
/// How often the system's files are looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// A look-up does not go by what is older than this.
const LOOK_AGE: Duration = Duration::from_secs(1);
/// How often the counters are written to the log, if they changed.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);

/// File descriptors to ask for: twice [`upstream::SOCKETS`], a little rounded up.
const FILES: u64 = 8192;
/// How long [`Handle::close`] waits.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);
/// How much the thread stands back behind workers and the control thread where they share a core, as in nice(2).
const NICE: i32 = 5;

/// The servers' thread, from outside. It ends when this is dropped.
#[derive(Debug)]
pub struct Handle {
    orders: mpsc::UnboundedSender<Listen>,
    ended: oneshot::Receiver<()>,
}

#[derive(Debug)]
struct Listen {
    addresses: BTreeSet<SocketAddr>,
    done: oneshot::Sender<Result<()>>,
}

/// The look-ups of names, from outside.
#[derive(Debug)]
pub struct LookUps {
    names: mpsc::UnboundedSender<DomainName>,
    results: mpsc::UnboundedReceiver<(DomainName, Resolved)>,
}

/// Starts the thread, with servers on the `further` addresses only; where they cannot listen is told once, and tried
/// again every 5 s. It belongs to the network namespace of the calling thread; sockets towards nameservers get SO_MARK
/// `mark`. What happens is counted in `stats`.
///
/// # Errors
/// There is no thread or no event queue to be had.
pub fn start(mark: u32, further: BTreeSet<SocketAddr>, stats: Arc<Stats>) -> Result<(Handle, LookUps)> {
    raise_file_limit();
    let (orders, arriving) = mpsc::unbounded_channel();
    let (end, ended) = oneshot::channel();
    let (names, asked) = mpsc::unbounded_channel();
    let (found, results) = mpsc::unbounded_channel();
    let tokio = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("Cannot start the DNS servers' runtime")?;
    thread::Builder::new()
        .name("dns".to_owned())
        .spawn(move || {
            // Packets first. Of the calling thread, on Linux; being refused is no harm.
            let _ = rustix::process::nice(NICE);
            LocalSet::new().block_on(&tokio, run(mark, further, stats, arriving, asked, found));
            // Nobody waits for it where the daemon ends in a hurry.
            let _ = end.send(());
        })
        .context("Cannot start the DNS servers' thread")?;
    Ok((Handle { orders, ended }, LookUps { names, results }))
}

/// Looks `name` up once by what the machine's files say now, without any cache; takes 10 s at most. Sockets get SO_MARK
/// `mark`.
pub async fn look_up_afresh(name: &DomainName, mark: Option<u32>) -> Resolved {
    let resolver = Resolver::new(mark, resolver::LIMIT);
    match Watched::new(Path::new(RESOLV_CONF)).look() {
        Ok(text) => resolver.set_conf(ResolvConf::parse(&text.unwrap_or_default())),
        Err(e) => tracing::debug!("Cannot read {RESOLV_CONF}: {e}; asking the nameserver on this machine"),
    }
    if let Ok(Some(text)) = Watched::new(Path::new(HOSTS)).look() {
        resolver.set_hosts(Hosts::parse(&text));
    }
    resolver.look_up(name).await
}

/// The usual soft limit of 1024 is made for programs that call select(2).
fn raise_file_limit() {
    let now = getrlimit(Resource::Nofile);
    let wanted = now.maximum.map_or(FILES, |hard| hard.min(FILES));
    if now.current.is_some_and(|soft| soft < wanted) {
        let raised = Rlimit { current: Some(wanted), maximum: now.maximum };
        if let Err(e) = setrlimit(Resource::Nofile, raised) {
            tracing::debug!("Cannot raise the limit of open files to {wanted}: {e}");
        }
    }
}

impl Handle {
    /// Makes servers listen on exactly `addresses` and the further ones, one for UDP and one for TCP on each. Those that
    /// listen already are left alone, with their connections.
    ///
    /// # Errors
    /// An address cannot be bound, three times; or the thread is gone.
    pub async fn listen(&self, addresses: BTreeSet<SocketAddr>) -> Result<()> {
        let (done, result) = oneshot::channel();
        let gone = || anyhow!("The DNS servers' thread ended");
        self.orders.send(Listen { addresses, done }).map_err(|_| gone())?;
        result.await.map_err(|_| gone())?.context("Failed to bind DNS servers on TUN interface")
    }

    /// Ends the thread, which says what it has counted; waits for that, a second at most.
    pub async fn close(self) {
        drop(self.orders);
        let _ = tokio::time::timeout(CLOSE_LIMIT, self.ended).await;
    }
}

impl LookUps {
    /// Looks up `name`; [`LookUps::recv`] gives the result, once, after 10 s at the latest.
    pub fn resolve(&self, name: DomainName) {
        // Without the thread `recv` has said so.
        let _ = self.names.send(name);
    }

    /// The next result. `None` if the thread is gone.
    pub async fn recv(&mut self) -> Option<(DomainName, Resolved)> {
        self.results.recv().await
    }
}

async fn run(
    mark: u32,
    further: BTreeSet<SocketAddr>,
    stats: Arc<Stats>,
    mut orders: mpsc::UnboundedReceiver<Listen>,
    mut names: mpsc::UnboundedReceiver<DomainName>,
    found: mpsc::UnboundedSender<(DomainName, Resolved)>,
) {
    let forwarder = Forwarder::new(Some(mark), stats);
    // Until the file is read.
    forwarder.set_nameservers(ResolvConf::parse("").servers().to_vec());
    let resolver = Arc::new(Resolver::new(Some(mark), resolver::LIMIT));
    let mut files = Files::new(Path::new(RESOLV_CONF), Path::new(HOSTS));
    let mut servers = Servers::new(Rc::clone(&forwarder), further);
    let mut look = interval(LOOK_INTERVAL);
    let mut report = interval(REPORT_INTERVAL);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    report.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            order = orders.recv() => match order {
                Some(Listen { addresses, done }) => {
                    // Who asked may be gone by now, at the end of the daemon.
                    let _ = done.send(servers.listen(&addresses).await);
                }
                None => break,
            },
            Some(name) = names.recv() => {
                if files.looked.is_none_or(|at| at.elapsed() >= LOOK_AGE) {
                    files.look(&forwarder, &resolver);
                }
                spawn_local(look_up(Arc::clone(&resolver), name, Rc::clone(&forwarder), found.clone()));
            }
            _ = look.tick() => {
                files.look(&forwarder, &resolver);
                servers.revive();
            }
            _ = report.tick() => forwarder.stats.report(),
        }
    }
    forwarder.stats.report();
}

async fn look_up(
    resolver: Arc<Resolver>,
    name: DomainName,
    forwarder: Rc<Forwarder>,
    found: mpsc::UnboundedSender<(DomainName, Resolved)>,
) {
    // As a task of its own, so that there is an answer whatever happens in it.
    let (asked, began) = (name.clone(), Instant::now());
    let resolved = spawn_local(async move { resolver.look_up(&asked).await }).await;
    let resolved = resolved.unwrap_or_else(|e| {
        tracing::warn!("A look-up ended by an error of its own: {e}");
        Resolved { v4: Lookup::Failed, v6: Lookup::Failed }
    });
    let (v4, v6) = (&resolved.v4, &resolved.v6);
    let latencies = &forwarder.stats.latencies;
    // Both families together, for the answer waits for both.
    latencies.note(Purpose::Resource, Kind::A, verdict(v4), began.elapsed());
    latencies.note(Purpose::Resource, Kind::Aaaa, verdict(v6), began.elapsed());
    forwarder.stats.count(Count::LookUps);
    if *v4 == Lookup::Failed || *v6 == Lookup::Failed {
        forwarder.stats.count(Count::LookUpsFailed);
    }
    if *v4 == Lookup::TimedOut || *v6 == Lookup::TimedOut {
        forwarder.stats.count(Count::LookUpsTimedOut);
    }
    // Who asked may be gone by now, at the end of the daemon.
    let _ = found.send((name, resolved));
}

fn verdict<A>(lookup: &Lookup<A>) -> Verdict {
    match lookup {
        Lookup::Answer(ips) if ips.is_empty() => Verdict::Empty,
        Lookup::Answer(_) => Verdict::NoError,
        Lookup::Failed => Verdict::Failed,
        Lookup::TimedOut => Verdict::TimedOut,
    }
}

/// What the machine says about names.
struct Files {
    resolv_conf: Watched,
    hosts: Watched,
    looked: Option<Instant>,
}

impl Files {
    fn new(resolv_conf: &Path, hosts: &Path) -> Self {
        Self { resolv_conf: Watched::new(resolv_conf), hosts: Watched::new(hosts), looked: None }
    }

    /// Tells what has changed.
    fn look(&mut self, forwarder: &Forwarder, resolver: &Resolver) {
        self.looked = Some(Instant::now());
        match self.resolv_conf.look() {
            Ok(None) => {}
            Ok(Some(text)) => {
                let conf = ResolvConf::parse(&text);
                tracing::debug!(?conf, "Nameservers");
                if conf.nameservers.is_empty() {
                    tracing::info!("{RESOLV_CONF} names no nameserver; asking the one on this machine");
                }
                forwarder.set_nameservers(conf.servers().to_vec());
                resolver.set_conf(conf);
            }
            // Those that are known stay: a file that is being replaced is away for a moment.
            Err(e) => tracing::warn!("Cannot read {RESOLV_CONF}: {e}; going on as before"),
        }
        match self.hosts.look() {
            Ok(None) => {}
            Ok(Some(text)) => resolver.set_hosts(Hosts::parse(&text)),
            Err(e) => tracing::debug!("Cannot read {HOSTS}: {e}; going on as before"),
        }
    }
}

/// All servers.
struct Servers {
    udp: Vec<Server>,
    tcp: Vec<Server>,
    /// Where they must listen; they do, but for one that died since the last look.
    wanted: BTreeSet<SocketAddr>,
    /// Where the operator wants them besides, as soon as there is such an address.
    further: BTreeSet<SocketAddr>,
    /// Of these, where they could not at the last look.
    missing: BTreeSet<SocketAddr>,
    forwarder: Rc<Forwarder>,
    connections: tcp::Open,
}

impl Servers {
    fn new(forwarder: Rc<Forwarder>, further: BTreeSet<SocketAddr>) -> Self {
        let connections = Rc::new(RefCell::new(Connections::new()));
        let (wanted, missing) = (BTreeSet::new(), BTreeSet::new());
        Self { udp: Vec::new(), tcp: Vec::new(), wanted, further, missing, forwarder, connections }
    }

    async fn listen(&mut self, addresses: &BTreeSet<SocketAddr>) -> Result<()> {
        let further = &self.further;
        let is_stale =
            |server: &mut Server| !addresses.contains(&server.local()) && !further.contains(&server.local());
        if self.wanted != *addresses {
            self.forwarder.stats.listening.set(false);
        }
        for stale in self.udp.extract_if(.., is_stale) {
            tracing::debug!(address = %stale.local(), "The DNS servers move away");
            stale.close().await;
        }
        for stale in self.tcp.extract_if(.., is_stale) {
            stale.close().await;
        }
        for attempt in 1.. {
            match addresses.iter().try_for_each(|address| self.bind(*address)) {
                Ok(()) => {
                    self.wanted.clone_from(addresses);
                    break;
                }
                Err(e) if attempt == BIND_ATTEMPTS => return Err(e),
                Err(e) => {
                    tracing::debug!(attempt, "{e:#}");
                    tokio::time::sleep(BIND_PAUSE).await;
                }
            }
        }
        self.tell();
        Ok(())
    }

    /// Says whether the servers are there.
    fn tell(&self) {
        let is_there = |address: &SocketAddr| {
            [&self.udp, &self.tcp].iter().all(|servers| servers.iter().any(|s| s.local() == *address))
        };
        let listening = !self.wanted.is_empty() && self.wanted.iter().all(is_there);
        self.forwarder.stats.listening.set(listening);
    }

    /// One query that brings a server down must not end the service.
    fn revive(&mut self) {
        let before = self.udp.len() + self.tcp.len();
        self.udp.retain(Server::is_running);
        self.tcp.retain(Server::is_running);
        if self.udp.len() + self.tcp.len() < before {
            tracing::warn!("A DNS server ended by an error of its own; starting it again");
        }
        // Those that run are not touched; what fails is tried at the next look.
        for address in self.wanted.clone() {
            if let Err(e) = self.bind(address) {
                tracing::debug!("{e:#}");
            }
        }
        for address in self.further.clone() {
            match self.bind(address) {
                Ok(()) => {
                    self.missing.remove(&address);
                }
                Err(e) if self.missing.insert(address) => {
                    tracing::warn!("{e:#}; trying again every {} s", LOOK_INTERVAL.as_secs());
                }
                Err(e) => tracing::debug!("{e:#}"),
            }
        }
        self.tell();
    }

    /// What is bound already stays so.
    fn bind(&mut self, address: SocketAddr) -> Result<()> {
        let cannot =
            |transport: &str, e: io::Error| anyhow!("Cannot listen on {address} over {transport}: {e}");
        let mut is_new = false;
        if !self.udp.iter().any(|server| server.local() == address) {
            let server = udp::bind(address, Rc::clone(&self.forwarder)).map_err(|e| cannot("UDP", e))?;
            self.udp.push(server);
            is_new = true;
        }
        if !self.tcp.iter().any(|server| server.local() == address) {
            let (forwarder, connections) = (Rc::clone(&self.forwarder), Rc::clone(&self.connections));
            let server = tcp::bind(address, forwarder, connections).map_err(|e| cannot("TCP", e))?;
            self.tcp.push(server);
            is_new = true;
        }
        if is_new {
            tracing::info!(%address, "DNS servers listen");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
