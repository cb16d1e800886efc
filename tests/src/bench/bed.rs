//! The test bed: one small internet, one client host, and every contender in the gateway's namespace.
//!
//! ```text
//!   client0 -- router -- gateway -- LAN      ours      172.20.0.100 by tun-client  (ICE, portal)
//!   192.0.2.2     |      198.51.100.2        boringtun 172.20.0.111 by tun-c1      (fixed peer, port 51821)
//!   client1 ------+                          wg-go     172.20.0.112 by tun-c2      (fixed peer, port 51822)
//!   192.0.2.66    |                          kernel    172.20.0.113 by eth0        (no tunnel)
//!               relay                        client1 reaches the gateway by its relay only
//! ```
//!
//! Ours twice more: while it counts flows, and by a name, 100.96.0.1, that is 172.20.0.100.
//!
//! All run at once, and all but the one that is measured are silent. Which one a packet meets is decided by the LAN
//! host's address, so the way is the same for all: client, router, gateway with conntrack and masquerade, LAN.

use std::{
    cell::Cell,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use super::{
    accounting::{self, GATEWAY_CORE, OTHER_CORE},
    peers::{self, Peer},
    traffic,
};
use crate::{
    net::{
        NetNs,
        process::{Logs, Process, run, wait_for},
        services::BigFile,
        topology::{LAN_HOST, PORTAL, Topology, direct},
    },
    scenario::{
        Context, Variation,
        dns::{Nameserver, ResolvConf},
        lab::{Lab, Launch, Options, lan4, ping},
        names,
    },
    standins::{client::Path as Way, portal::Resource},
};

/// Who forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Who {
    Ours,
    BoringTun,
    WireGuardGo,
    /// No tunnel: the floor.
    Kernel,
    /// Ours while it counts flows.
    Counting,
    /// Ours, by a name: a DNS resource instead of a network.
    Named,
}

impl Who {
    /// Those that are compared with each other.
    pub(super) const ALL: [Self; 4] = [Self::Ours, Self::BoringTun, Self::WireGuardGo, Self::Kernel];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ours => "firezone-gateway",
            Self::BoringTun => "boringtun-cli",
            Self::WireGuardGo => "wireguard-go",
            Self::Kernel => "kernel routing, no tunnel",
            Self::Counting => "firezone-gateway, flows counted",
            Self::Named => "firezone-gateway, DNS resource",
        }
    }

    /// Where the client sends what is to go through it.
    pub(super) fn target(self) -> Ipv4Addr {
        if self == Self::Named { PROXY } else { self.address() }
    }

    /// The LAN host's address that is reached through it.
    pub(super) fn address(self) -> Ipv4Addr {
        let last = match self {
            Self::Ours | Self::Counting | Self::Named => return LAN_HOST.0,
            Self::BoringTun => 111,
            Self::WireGuardGo => 112,
            Self::Kernel => 113,
        };
        Ipv4Addr::new(172, 20, 0, last)
    }
}

/// Everything that runs.
pub(super) struct Bed {
    pub(super) cx: Context,
    pub(super) lab: Lab,
    peers: Vec<Peer>,
    /// iperf3 on the LAN host, by [`Who::ALL`].
    servers: Vec<Process>,
    /// NAPI threads of the gateway's interfaces.
    pub(super) napi: Vec<i32>,
    /// What was refused.
    pub(super) notes: Vec<String>,
    counting: Cell<bool>,
    /// Where the gateway keeps records of flows.
    spool: PathBuf,
    _nameserver: Nameserver,
}

/// The first of [`names::PROXIES`].
const PROXY: Ipv4Addr = Ipv4Addr::new(100, 96, 0, 1);
/// What stands for it.
const NAME: &str = "bench.lan.test";

fn named() -> Resource {
    Resource::dns("bench", "*.lan.test")
}

impl Bed {
    /// Starts all of it; the calling thread is on [`OTHER_CORE`] already.
    ///
    /// # Errors
    /// If something that is not optional does not come up.
    pub(super) fn start(directory: &Path, gateway: &Path) -> Result<Self> {
        let cx = Context {
            topology: Topology::build(direct::two_clients())?,
            logs: Logs::new(directory.to_path_buf())?,
            gateway: gateway.to_path_buf(),
            big: BigFile::empty(directory)?,
            variation: Variation { workers: Some(1), ..Variation::default() },
        };
        let mut notes = Vec::new();
        let napi = interfaces(&cx.topology, &[GATEWAY_CORE], &[OTHER_CORE], Behind::Rps, &mut notes)?;
        routes(&cx.topology)?;
        // All contenders have the same rules in their way.
        cx.topology.prepare_gateway()?;
        let record = format!("{NAME},{}", LAN_HOST.0);
        let nameserver = Nameserver::start_with(&cx, "nameserver", PORTAL, "-", &[record])?;
        let core = GATEWAY_CORE.to_string();
        let pinned = ["taskset", "-c", &core].map(str::to_owned).into_iter();
        let spool = directory.join("flow_logs");
        let options = Options {
            resources: vec![lan4(), named()],
            expiry: None,
            launch: Launch {
                wrapper: pinned.chain(ResolvConf::new(&cx, &[PORTAL])?.launch(&cx)?.wrapper).collect(),
                environment: vec![("FIREZONE_FLOW_LOGS_DIR", spool.display().to_string())],
                ..Launch::default()
            }
            .without_network_setup(),
            ..Options::default()
        };
        let mut lab = Lab::start(&cx, &options)?;
        // Tokens say whether records are kept for an upload when access is granted.
        wish_flow_logs(&lab, true);
        for (index, relayed) in [(0, false), (1, true)] {
            lab.connect(index, &[lan4(), named()])?;
            ping(&cx.topology.clients[index].namespace, LAN_HOST.0.into())?;
            let way = lab.clients[index].path().context("the client named no path")?;
            ensure!((way != Way::Direct) == relayed, "client {index}: the path is {way:?}");
        }
        wish_flow_logs(&lab, false);
        let servers = Who::ALL.into_iter().map(|who| traffic::server(&cx, who)).collect::<Result<_>>()?;
        let counting = Cell::new(false);
        let mut bed = Self {
            cx,
            lab,
            peers: Vec::new(),
            servers,
            napi,
            notes,
            counting,
            spool,
            _nameserver: nameserver,
        };
        for who in [Who::BoringTun, Who::WireGuardGo] {
            match peers::start(&bed.cx, who) {
                Ok(peer) => bed.peers.push(peer),
                Err(error) => bed.notes.push(format!("{} is missing: {error:#}", who.name())),
            }
        }
        for who in bed.contenders() {
            let client = &bed.cx.topology.clients[0].namespace;
            wait_for(&format!("a ping through {}", who.name()), Duration::from_secs(10), || {
                Ok(ping(client, who.target().into()).ok())
            })?;
        }
        Ok(bed)
    }

    /// Who can be measured.
    pub(super) fn contenders(&self) -> Vec<Who> {
        let there = |who: &Who| match who {
            Who::Ours | Who::Kernel | Who::Counting | Who::Named => true,
            _ => self.peers.iter().any(|peer| peer.who == *who),
        };
        Who::ALL.into_iter().filter(there).collect()
    }

    /// The process that forwards.
    pub(super) fn pid(&self, who: Who) -> Option<u32> {
        match who {
            Who::Ours | Who::Counting | Who::Named => Some(self.lab.gateway.pid()),
            Who::Kernel => None,
            _ => self.peers.iter().find(|peer| peer.who == who).map(|peer| peer.server.pid()),
        }
    }

    /// From now on the client has a name for the LAN host, too. Not before all others are measured: a client that was once
    /// translated has a table that its other packets are looked up in, as well.
    ///
    /// # Errors
    /// If the gateway does not find it.
    pub(super) fn assign_name(&mut self) -> Result<()> {
        let status = names::assign(&mut self.lab, &named(), NAME)?;
        ensure!(status == "Active", "{NAME} is {status}");
        ping(&self.cx.topology.clients[0].namespace, PROXY.into())
    }

    /// The gateway counts flows if it is to be measured with that, and not otherwise.
    pub(super) fn set_counting(&self, who: Who) {
        let wanted = who == Who::Counting;
        if self.counting.replace(wanted) != wanted {
            wish_flow_logs(&self.lab, wanted);
            // One message to the gateway, one command to its worker.
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Records of flows that the gateway has kept, beginnings and ends.
    ///
    /// # Errors
    /// If there is no spool.
    pub(super) fn records(&self) -> Result<usize> {
        let mut records = 0;
        for authorization in std::fs::read_dir(self.spool.join("responder"))? {
            let names = std::fs::read_dir(authorization?.path())?;
            records +=
                names.flatten().filter(|file| file.path().extension() == Some("json".as_ref())).count();
        }
        Ok(records)
    }

    /// Segmentation offloads of every link: on is a virtual machine's or a NIC's, off is one datagram a frame.
    ///
    /// # Errors
    /// With what `ethtool` said.
    pub(super) fn set_offloads(&self, on: bool) -> Result<()> {
        let topology = &self.cx.topology;
        for (namespace, interface) in links(topology)? {
            let word = |on: bool| if on { "on" } else { "off" };
            // A veth hands what it receives to NAPI only if the other end has no TSO. Towards the gateway that matters
            // more: TCP arrives there as from a NIC, in frames that GRO merges.
            let tso = word(on && !is_towards_gateway(topology, namespace, &interface));
            // What the gateway forwards is merged where it arrives, as README.md advises.
            let merge = word(on && namespace.name() == topology.gateway.namespace.name());
            let features = ["gso", word(on), "tso", tso, "tx-udp-segmentation", word(on)];
            let command = ["ethtool", "-K", &interface].into_iter().chain(features);
            let command: Vec<&str> = command.chain(["rx-udp-gro-forwarding", merge]).collect();
            run(namespace, Duration::from_secs(5), &command)?.success()?;
        }
        Ok(())
    }

    /// A new iperf3 for what goes through `who`: one whose client vanished waits for it for a long time.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(super) fn renew_server(&mut self, who: Who) -> Result<()> {
        let place = Who::ALL.iter().position(|one| *one == who).context("one of all")?;
        // The old one must be gone before the new one can listen.
        drop(self.servers.remove(place));
        self.servers.insert(place, traffic::server(&self.cx, who)?);
        std::thread::sleep(Duration::from_millis(300));
        Ok(())
    }

    /// From now on client0 and the portal's host each have a queue of their own in the router, until the offloads are set
    /// again: what one of them sends too much is not lost to the other.
    ///
    /// # Errors
    /// With what `ethtool` said.
    pub(super) fn separate_queues(&self) -> Result<()> {
        let topology = &self.cx.topology;
        for namespace in [&topology.clients[0].namespace, &topology.portal.namespace] {
            let command = ["ethtool", "-K", "eth0", "tso", "off"];
            run(namespace, Duration::from_secs(5), &command)?.success()?;
        }
        Ok(())
    }
}

/// The portal wants flow logs, or does not any more. Nobody takes them: they are kept on disk.
fn wish_flow_logs(lab: &Lab, on: bool) {
    lab.portal.configure(|config| {
        config.flow_logs.api_url = "https://127.0.0.1:9".to_owned();
        config.flow_logs.upload_interval_secs = if on { 3600 } else { 0 };
    });
    lab.portal.push_init();
}

/// The other ends of the gateway's two links.
fn is_towards_gateway(topology: &Topology, namespace: &NetNs, interface: &str) -> bool {
    let uplink = namespace.name() == topology.router.name() && interface == "gw";
    uplink || namespace.name() == topology.lan.name()
}

/// Every veth end, with its namespace.
fn links(topology: &Topology) -> Result<Vec<(&NetNs, String)>> {
    let mut links = Vec::new();
    for namespace in topology.namespaces() {
        let said = run(namespace, Duration::from_secs(5), &["ip", "-o", "link", "show", "type", "veth"])?;
        for line in said.success()?.lines() {
            // 2: eth0@if3: <...
            let name = line.split(": ").nth(1).and_then(|name| name.split('@').next());
            links.push((namespace, name.context("a name in `ip -o link`")?.to_owned()));
        }
    }
    Ok(links)
}

/// Where nobody has a core of its own.
pub(super) const OTHERS_AND_GATEWAY: &[usize] = &[OTHER_CORE, GATEWAY_CORE];

/// Every frame is handled by a NAPI thread of the interface where it arrives, on any core: then no one's time holds another's
/// work, not even where worker and far ends share a core. Returns the gateway's NAPI threads.
///
/// # Errors
/// If something is refused.
pub(super) fn threads_everywhere(topology: &Topology) -> Result<Vec<i32>> {
    for (namespace, interface) in links(topology)? {
        // A veth hands what it receives to NAPI only if the other end has no TSO.
        let command = ["ethtool", "-K", &interface, "gso", "on", "tso", "off", "tx-udp-segmentation", "on"];
        run(namespace, Duration::from_secs(5), &command)?.success()?;
    }
    let mut refused = Vec::new();
    let threads =
        interfaces(topology, OTHERS_AND_GATEWAY, OTHERS_AND_GATEWAY, Behind::Threads, &mut refused)?;
    ensure!(refused.is_empty(), "{}", refused.join("; "));
    Ok(threads)
}

/// As a NIC's interrupt moderation: a NAPI thread that has found packets looks again after 50 us, and no packet wakes it before.
/// It sleeps for good after a look that finds nothing.
const MODERATION: &str = "echo 1 > $dev/napi_defer_hard_irqs; echo 50000 > $dev/gro_flush_timeout";

/// Who handles what the gateway sends, at the other ends of its two links.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Behind {
    /// The softirq of another core.
    Rps,
    /// NAPI threads, as everywhere else.
    Threads,
}

/// What arrives at the gateway's interfaces is handled by their own NAPI threads on the cores `of_gateway`; what it sends, at
/// the other end of its links, on the cores `of_others`, by RPS: otherwise the sender's core would do the receiver's work.
/// All other links have threads of their own on `of_others`. Returns the gateway's NAPI threads; what is refused becomes a
/// note.
///
/// # Errors
/// With what `ethtool` said.
fn interfaces(
    topology: &Topology,
    of_gateway: &[usize],
    of_others: &[usize],
    behind_gateway: Behind,
    notes: &mut Vec<String>,
) -> Result<Vec<i32>> {
    let napi_threads = || -> Vec<i32> {
        let threads = accounting::kernel_threads().into_iter();
        threads.filter(|(_, name)| name.starts_with("napi/")).map(|(pid, _)| pid).collect()
    };
    let mask = of_others.iter().fold(0, |mask, core| mask | 1 << core);
    let mut threads = Vec::new();
    for (namespace, interface) in links(topology)? {
        let ours = namespace.name() == topology.gateway.namespace.name();
        run(namespace, Duration::from_secs(5), &["ethtool", "-K", &interface, "gro", "on"])?.success()?;
        let from_gateway =
            behind_gateway == Behind::Rps && is_towards_gateway(topology, namespace, &interface);
        let (setting, what) = if from_gateway {
            (format!("for f in $dev/queues/rx-*/rps_cpus; do echo {mask:x} > $f; done"), "RPS")
        } else {
            ("echo 1 > $dev/threaded".to_owned(), "threaded NAPI")
        };
        let setting =
            if ours && behind_gateway == Behind::Rps { format!("{setting}; {MODERATION}") } else { setting };
        // A namespace's interfaces are seen in a sysfs that was mounted inside it.
        let script = format!("set -e; mount -t sysfs sysfs /sys; dev=/sys/class/net/{interface}; {setting}");
        let before = napi_threads();
        let said = run(namespace, Duration::from_secs(5), &["unshare", "-m", "sh", "-c", &script])?;
        if let Err(error) = said.success() {
            notes.push(format!("no {what} on {} of {}: {error:#}", interface, namespace.name()));
            continue;
        }
        for thread in napi_threads().into_iter().filter(|pid| !before.contains(pid)) {
            accounting::allow(thread, if ours { of_gateway } else { of_others })?;
            accounting::prefer(thread)?;
            if ours {
                threads.push(thread);
            }
        }
    }
    if threads.len() < 2 {
        notes.push(format!("the gateway has {} NAPI threads instead of 2", threads.len()));
    }
    Ok(threads)
}

/// Addresses and routes of the contenders besides ours; client1 can use a relay only.
fn routes(topology: &Topology) -> Result<()> {
    let others = [Who::BoringTun, Who::WireGuardGo, Who::Kernel];
    topology.lan.ip_batch(&others.map(|who| format!("addr add {}/24 dev eth0", who.target())))?;
    let gateway = topology.gateway.v4;
    topology.router.ip_batch(&[format!("route add 172.20.0.0/24 via {gateway}")])?;
    let client = &topology.clients[0];
    let router = Ipv4Addr::from_bits(client.v4.to_bits() - 1);
    let target = Who::Kernel.target();
    // The same segments as in the tunnels.
    client.namespace.ip_batch(&[format!("route add {target}/32 via {router} mtu lock 1280 advmss 1240")])?;
    // As README.md's lines do for the tunnel's own range.
    topology.gateway.namespace.nft(
        r#"table inet bench {
          chain postrouting {
            type nat hook postrouting priority srcnat;
            ip saddr { 10.77.0.0/16, 192.0.2.0/24 } oifname "eth1" masquerade
          }
        }"#,
    )?;
    let (client, relay) = (topology.clients[1].v4, topology.relays[0].v4);
    topology.router.nft(&format!(
        r#"table inet bench {{
          chain forward {{
            type filter hook forward priority filter; policy accept;
            ip saddr {client} ip daddr {gateway} meta l4proto udp drop
            ip saddr {gateway} ip daddr {client} meta l4proto udp drop
            ip saddr {gateway} ip daddr {relay} udp dport != 3478 drop
            ip saddr {relay} ip daddr {gateway} udp sport != 3478 drop
          }}
        }}"#
    ))
}

/// Where a plain WireGuard server is reached.
pub(super) fn endpoint(topology: &Topology, port: u16) -> SocketAddr {
    SocketAddr::new(topology.gateway.v4.into(), port)
}
