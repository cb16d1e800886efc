//! Looks up the names of DNS resources as the machine itself would (dns.md sections 5.2 and 6): the hosts file first, by
//! family, then the search list and the nameservers of resolv.conf. The asking, its repetitions and the cache are
//! hickory's; what the files say and what an answer means is decided here.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use gateway_proto::{
    addr::TUNNEL_DNS_PORT,
    names::{DomainName, Lookup, Resolved},
};
use hickory_resolver::{
    config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    net::{DnsError, NetError},
    proto::{
        op::ResponseCode,
        rr::{Name, RData, RecordType},
    },
};
use rustix::process::{Resource, getrlimit};
use tokio::{
    sync::Semaphore,
    time::{Instant, timeout_at},
};

use super::{
    provider::Provider,
    system::{Hosts, ResolvConf},
};
use crate::data::PORT;

type Hickory = hickory_resolver::Resolver<Provider>;

/// For both families together (dns.md section 5.2).
pub const LIMIT: Duration = Duration::from_secs(10);
/// Look-ups that are being asked about at a time, at most; the others wait, and that counts as part of their time. Each
/// may have four sockets open: two families, two nameservers at once.
const AT_ONCE: usize = 500;
/// For one try, whatever resolv.conf says, and how often one is repeated: a dead nameserver must leave time for another.
const TRY_LIMIT: Duration = Duration::from_secs(3);
const REPEATS: usize = 1;
/// Answers that are kept for as long as they say they are good (dns.md section 6).
const CACHED: u64 = 512;

/// Looks names up, by what it was last told of the system.
pub struct Resolver {
    mark: Option<u32>,
    limit: Duration,
    places: Semaphore,
    /// Held for a pointer's copy.
    system: Mutex<Arc<System>>,
}

/// What one look-up goes by from its begin to its end.
struct System {
    conf: ResolvConf,
    hosts: Arc<Hosts>,
    /// With a cache.
    all: Hickory,
    /// Each nameserver alone, where there is more than one.
    each: Vec<Hickory>,
}

impl Resolver {
    /// Sockets get SO_MARK `mark`; each look-up takes `limit` at most. Nothing is known of the system yet, which is what
    /// an empty `/etc/resolv.conf` would say.
    pub fn new(mark: Option<u32>, limit: Duration) -> Self {
        // A sixteenth of the descriptors for the look-ups, of four each, so that they leave three quarters.
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let places = usize::try_from(descriptors / 16).map_or(AT_ONCE, |some| some.clamp(1, AT_ONCE));
        let system = System::new(mark, ResolvConf::parse(""), Arc::default());
        Self { mark, limit, places: Semaphore::new(places), system: Mutex::new(Arc::new(system)) }
    }

    /// From the next look-up on this is what resolv.conf says. What was cached is forgotten; who is looking up goes on.
    pub fn set_conf(&self, conf: ResolvConf) {
        let before = self.system();
        if before.conf != conf {
            self.replace(System::new(self.mark, conf, Arc::clone(&before.hosts)));
        }
    }

    /// From the next look-up on this is what the hosts file says.
    pub fn set_hosts(&self, hosts: Hosts) {
        let System { conf, all, each, .. } = &*self.system();
        let (conf, all, each) = (conf.clone(), all.clone(), each.clone());
        self.replace(System { conf, hosts: Arc::new(hosts), all, each });
    }

    /// Whom it asks.
    #[cfg(test)]
    pub fn nameservers(&self) -> Vec<SocketAddr> {
        self.system().conf.servers().to_vec()
    }

    fn system(&self) -> Arc<System> {
        Arc::clone(&self.system.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn replace(&self, system: System) {
        *self.system.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(system);
    }

    /// Looks up both families.
    pub async fn look_up(&self, name: &DomainName) -> Resolved {
        let deadline = Instant::now() + self.limit;
        let Ok(Ok(_place)) = timeout_at(deadline, self.places.acquire()).await else {
            return Resolved { v4: Lookup::TimedOut, v6: Lookup::TimedOut };
        };
        let system = self.system();
        let (hosts_v4, hosts_v6) = system.hosts.get(name.as_str());
        let mut found = Resolved { v4: Lookup::Answer(Vec::new()), v6: Lookup::Answer(Vec::new()) };
        if hosts_v4.is_empty() || hosts_v6.is_empty() {
            found = system.ask_nameservers(name, hosts_v4.is_empty(), hosts_v6.is_empty(), deadline).await;
        }
        if !hosts_v4.is_empty() {
            found.v4 = Lookup::Answer(hosts_v4.to_vec());
        }
        if !hosts_v6.is_empty() {
            found.v6 = Lookup::Answer(hosts_v6.to_vec());
        }
        found
    }
}

impl System {
    fn new(mark: Option<u32>, conf: ResolvConf, hosts: Arc<Hosts>) -> Self {
        let servers = conf.servers();
        let all = hickory(mark, &conf, servers, REPEATS, CACHED);
        let alone = |server: &SocketAddr| hickory(mark, &conf, std::slice::from_ref(server), 0, 0);
        let each = if servers.len() > 1 { servers.iter().map(alone).collect() } else { Vec::new() };
        Self { hosts, all, each, conf }
    }

    /// Goes through the search list until a name has an address of either family; what then is known of the other is
    /// known of the same name.
    async fn ask_nameservers(&self, name: &DomainName, v4: bool, v6: bool, deadline: Instant) -> Resolved {
        let mut all = Resolved { v4: Lookup::Answer(Vec::new()), v6: Lookup::Answer(Vec::new()) };
        for candidate in self.candidates(name) {
            let (v4, v6) = tokio::join!(
                self.ask(v4.then_some(RecordType::A), &candidate, deadline),
                self.ask(v6.then_some(RecordType::AAAA), &candidate, deadline),
            );
            let this = Resolved { v4: v4.filter_map(v4_of), v6: v6.filter_map(v6_of) };
            if has_any(&this.v4) || has_any(&this.v6) {
                return this;
            }
            all = Resolved { v4: less_certain(all.v4, this.v4), v6: less_certain(all.v6, this.v6) };
            if Instant::now() >= deadline {
                break;
            }
        }
        all
    }

    /// The names that are tried, in order (dns.md section 6.1, resolv.conf(5)).
    fn candidates(&self, name: &DomainName) -> Vec<Name> {
        let own = labels(name);
        let searched =
            self.conf.search.iter().map(|domain| own.iter().copied().chain(labels(domain)).collect());
        let searched: Vec<Vec<&[u8]>> = searched.collect();
        let dots = own.len() - 1;
        let mut candidates = searched;
        // Nobody but this machine is to be asked about "localhost" (RFC 6761 section 6.3).
        let is_first = dots >= self.conf.ndots || own.last() == Some(&&b"localhost"[..]);
        let at = if is_first { 0 } else { candidates.len() };
        candidates.insert(at, own);
        // With what is appended it may be too long.
        candidates.into_iter().filter_map(|labels| Name::from_labels(labels).ok()).collect()
    }

    /// `None` asks nothing.
    async fn ask(&self, kind: Option<RecordType>, name: &Name, deadline: Instant) -> Lookup<IpAddr> {
        let Some(kind) = kind else { return Lookup::Answer(Vec::new()) };
        let asked = async {
            let mut answer = ask(&self.all, name, kind).await;
            // Who declines may be alone with that, but hickory asks the others only when somebody is silent.
            for one in &self.each {
                if answer != Lookup::Failed {
                    break;
                }
                answer = ask(one, name, kind).await;
            }
            answer
        };
        timeout_at(deadline, asked).await.unwrap_or(Lookup::TimedOut)
    }
}

async fn ask(hickory: &Hickory, name: &Name, kind: RecordType) -> Lookup<IpAddr> {
    match hickory.lookup(name.clone(), kind).await {
        // Whatever name a record is of: it is where the chain of aliases led (dns.md section 5.2).
        Ok(found) => {
            let mut ips: Vec<_> = found.answers().iter().filter_map(|record| address(&record.data)).collect();
            ips.sort_unstable();
            ips.dedup();
            Lookup::Answer(ips)
        }
        Err(NetError::Dns(DnsError::NoRecordsFound(none)))
            if matches!(none.response_code, ResponseCode::NoError | ResponseCode::NXDomain) =>
        {
            Lookup::Answer(Vec::new())
        }
        Err(NetError::Timeout) => Lookup::TimedOut,
        Err(NetError::Io(e)) if e.kind() == std::io::ErrorKind::TimedOut => Lookup::TimedOut,
        Err(e) => {
            tracing::debug!(%name, %kind, "A look-up failed: {e}");
            Lookup::Failed
        }
    }
}

fn hickory(
    mark: Option<u32>,
    conf: &ResolvConf,
    servers: &[SocketAddr],
    repeats: usize,
    cache: u64,
) -> Hickory {
    let with_port = |server: &SocketAddr| {
        let mut config = NameServerConfig::udp_and_tcp(server.ip());
        let set_port = |connection: &mut ConnectionConfig| connection.port = server.port();
        config.connections.iter_mut().for_each(set_port);
        config
    };
    let config = ResolverConfig::from_name_servers(servers.iter().map(with_port).collect());
    let provider = Provider::new(mark, servers);
    let mut builder = Hickory::builder_with_config(config, provider);
    let options: &mut ResolverOpts = builder.options_mut();
    options.timeout = conf.timeout.min(TRY_LIMIT);
    // Ours are tries, theirs are repetitions.
    options.attempts = (conf.attempts - 1).min(repeats);
    options.edns0 = conf.edns0;
    options.cache_size = cache;
    options.use_hosts_file = ResolveHosts::Never;
    // It takes any port; these two are spoken for, if only in a moment.
    options.avoid_local_udp_ports = Arc::new(HashSet::from([PORT, TUNNEL_DNS_PORT]));
    builder.build().expect("only TLS can fail, and there is none")
}

fn labels(name: &DomainName) -> Vec<&[u8]> {
    name.as_str().split('.').map(str::as_bytes).collect()
}

fn address(data: &RData) -> Option<IpAddr> {
    match data {
        RData::A(a) => Some(a.0.into()),
        RData::AAAA(aaaa) => Some(aaaa.0.into()),
        _ => None,
    }
}

fn v4_of(ip: IpAddr) -> Option<Ipv4Addr> {
    match ip {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    }
}

fn v6_of(ip: IpAddr) -> Option<Ipv6Addr> {
    match ip {
        IpAddr::V6(ip) => Some(ip),
        IpAddr::V4(_) => None,
    }
}

fn has_any<A>(found: &Lookup<A>) -> bool {
    matches!(found, Lookup::Answer(ips) if !ips.is_empty())
}

/// Of two without an address: that a name has none is certain only if all that were tried have none.
fn less_certain<A>(one: Lookup<A>, other: Lookup<A>) -> Lookup<A> {
    match (one, other) {
        (Lookup::TimedOut, _) | (_, Lookup::TimedOut) => Lookup::TimedOut,
        (Lookup::Failed, _) | (_, Lookup::Failed) => Lookup::Failed,
        (_, none) => none,
    }
}

#[cfg(test)]
mod tests;
