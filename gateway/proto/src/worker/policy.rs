//! What one client may reach (packets.md section 4): compiled once per change, asked for every packet both ways.
//! Knows resources and addresses; no packet, no session.
//!
//! "Among all entries whose network contains the IP, choose the maximum by (filter permits this protocol, prefix
//! length, resource id)": since a winner that does not permit means denied, that is the first *permitting* entry in
//! the order of [`Table`].

mod filters;
mod memo;
#[cfg(test)]
mod tests;

use std::{
    cmp::Reverse,
    hash::Hash,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::{BitAnd, Range},
};

use ipnet::IpNet;
use rustc_hash::FxHashMap;

use self::{filters::Filters, memo::Memo};
use super::inner::Transport;
use crate::{
    ids::ResourceId,
    portal::messages::{Resource, ResourceKind},
};

/// What a rule looks at in a packet: the resource's side of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// TCP with the resource's port.
    Tcp(u16),
    /// UDP with the resource's port.
    Udp(u16),
    /// Any ICMP: "`icmp` also permits all other ICMP types".
    Icmp,
    /// GRE, SCTP, ESP, ...: permitted by an empty filter list only.
    Other,
}

impl Class {
    /// Outbound, the resource is the destination.
    #[inline]
    pub fn of_destination(transport: Transport) -> Self {
        match transport {
            Transport::Tcp { dst, .. } => Self::Tcp(dst),
            Transport::Udp { dst, .. } => Self::Udp(dst),
            Transport::IcmpEcho | Transport::IcmpError | Transport::Icmp(_) => Self::Icmp,
            Transport::Other(_) => Self::Other,
        }
    }

    /// Inbound, the resource is the source.
    #[inline]
    pub fn of_source(transport: Transport) -> Self {
        match transport {
            Transport::Tcp { src, .. } => Self::Tcp(src),
            Transport::Udp { src, .. } => Self::Udp(src),
            Transport::IcmpEcho | Transport::IcmpError | Transport::Icmp(_) => Self::Icmp,
            Transport::Other(_) => Self::Other,
        }
    }
}

/// The answer for one address and class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// This resource permits it.
    Permitted(ResourceId),
    /// No resource permits it.
    Denied,
    /// The Internet resource does not reach private and special addresses.
    Private,
}

/// One client's rules.
pub struct Policy {
    internet: Option<ResourceId>,
    /// Of CIDR resources.
    rules: Vec<Rule>,
    /// DNS resources, ascending.
    dns: Vec<Rule>,
    v4: Table<u32>,
    v6: Table<u128>,
    memo: Memo,
}

impl Policy {
    /// What every client's memo takes.
    #[cfg(test)]
    pub const MEMO_BYTES: usize = memo::BYTES;

    /// Compiles `resources`, all of them.
    pub fn new(resources: &[Resource]) -> Self {
        let mut policy = Self {
            internet: None,
            rules: Vec::new(),
            dns: Vec::new(),
            v4: Table::default(),
            v6: Table::default(),
            memo: Memo::new(),
        };
        policy.replace(resources);
        policy
    }

    /// Compiles `resources`, all of them; what was decided before is forgotten.
    pub fn replace(&mut self, resources: &[Resource]) {
        self.rules.clear();
        self.dns.clear();
        self.internet = None;
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for resource in resources {
            match &resource.kind {
                ResourceKind::Cidr { network, filters, .. } => {
                    let rule = u32::try_from(self.rules.len()).unwrap_or(u32::MAX);
                    self.rules.push(Rule { id: resource.id, filters: Filters::new(filters) });
                    match network {
                        IpNet::V4(net) => v4.push(Entry {
                            network: net.network().to_bits(),
                            mask: net.netmask().to_bits(),
                            prefix: net.prefix_len(),
                            rule,
                        }),
                        IpNet::V6(net) => v6.push(Entry {
                            network: net.network().to_bits(),
                            mask: net.netmask().to_bits(),
                            prefix: net.prefix_len(),
                            rule,
                        }),
                    }
                }
                ResourceKind::Dns { filters, .. } => {
                    self.dns.push(Rule { id: resource.id, filters: Filters::new(filters) });
                }
                ResourceKind::Internet => self.internet = self.internet.max(Some(resource.id)),
            }
        }
        self.v4 = Table::new(v4, &self.rules);
        self.v6 = Table::new(v6, &self.rules);
        self.dns.sort_unstable_by_key(|rule| rule.id);
        self.memo.forget();
    }

    /// The client's names have changed: what was decided about proxy addresses is forgotten.
    pub fn on_names_changed(&mut self) {
        self.memo.forget();
    }

    /// May traffic of this class pass between the client and the proxy address `ip`, whose name belongs to `resources`
    /// (ascending)?
    ///
    /// "Each proxy IP -> one /32 or /128 entry per DNS resource that the proxy IP belongs to (only if that resource is
    /// authorised)", beside the networks; the Internet resource has no say.
    #[inline]
    pub fn decide_proxy(&mut self, ip: IpAddr, resources: &[ResourceId], class: Class) -> Decision {
        if let Some(decision) = self.memo.get(ip, class) {
            return decision;
        }
        let decision = self.look_up_proxy(ip, resources, class).map_or(Decision::Denied, Decision::Permitted);
        self.memo.put(ip, class, decision);
        decision
    }

    /// May traffic of this class pass between the client and `ip`, which is no proxy address?
    #[inline]
    pub fn decide(&mut self, ip: IpAddr, class: Class) -> Decision {
        if let Some(decision) = self.memo.get(ip, class) {
            return decision;
        }
        let decision = self.look_up(ip, class);
        self.memo.put(ip, class, decision);
        decision
    }

    fn look_up(&self, ip: IpAddr, class: Class) -> Decision {
        match (self.network(ip, class), self.internet) {
            (Some(found), _) => Decision::Permitted(found.id),
            (None, Some(id)) if !is_private(ip) => Decision::Permitted(id),
            // Section 4.4 without its first half: a network that is authorised besides is reached, and one that does not
            // permit this packet is prohibited, not unreachable.
            (None, Some(_)) if !self.is_covered(ip) => Decision::Private,
            (None, _) => Decision::Denied,
        }
    }

    fn look_up_proxy(&self, ip: IpAddr, resources: &[ResourceId], class: Class) -> Option<ResourceId> {
        let authorised =
            |id: &ResourceId| self.dns.binary_search_by_key(id, |rule| rule.id).ok().map(|at| &self.dns[at]);
        let by_name = resources.iter().rev().filter_map(authorised).find(|rule| rule.filters.permit(class));
        match (by_name, self.network(ip, class)) {
            // As specific as an entry of a proxy.
            (Some(name), Some(net)) if net.is_host => Some(name.id.max(net.id)),
            (Some(name), _) => Some(name.id),
            (None, net) => net.map(|net| net.id),
        }
    }

    /// The network that permits it.
    fn network(&self, ip: IpAddr, class: Class) -> Option<Found> {
        match ip {
            IpAddr::V4(ip) => self.v4.find(ip.to_bits(), |rule| self.rules[rule].filters.permit(class)),
            IpAddr::V6(ip) => self.v6.find(ip.to_bits(), |rule| self.rules[rule].filters.permit(class)),
        }
        .map(|(rule, prefix)| Found {
            id: self.rules[rule].id,
            is_host: prefix == if ip.is_ipv4() { 32 } else { 128 },
        })
    }

    /// Is it in some network, whatever that permits?
    fn is_covered(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => self.v4.find(ip.to_bits(), |_| true).is_some(),
            IpAddr::V6(ip) => self.v6.find(ip.to_bits(), |_| true).is_some(),
        }
    }
}

/// A network that permits a packet.
struct Found {
    id: ResourceId,
    /// It is one address.
    is_host: bool,
}

/// What the Internet resource does not reach (section 4.4).
fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let shared = |ip: Ipv4Addr| ip.octets()[0] == 100 && ip.octets()[1] & 0xc0 == 64;
            ip.is_private()
                || ip.is_loopback()
                || ip.is_link_local()
                || shared(ip)
                || ip.is_multicast()
                || ip.octets()[0] >= 240
        }
        IpAddr::V6(ip) => {
            ip == Ipv6Addr::LOCALHOST
                || ip.to_ipv4_mapped().is_some()
                || ip.is_unique_local()
                || ip.is_unicast_link_local()
                || ip.is_multicast()
        }
    }
}

struct Rule {
    id: ResourceId,
    filters: Filters,
}

/// The networks of one family, ordered by (longer prefix, network, larger resource id) first.
///
/// Up to [`LINEAR`] entries are walked; above that, each prefix length in use costs one hash look-up.
struct Table<A> {
    entries: Vec<Entry<A>>,
    lengths: Vec<A>,
    index: FxHashMap<(A, A), Range<u32>>,
}

#[derive(Clone, Copy)]
struct Entry<A> {
    network: A,
    mask: A,
    prefix: u8,
    rule: u32,
}

/// Entries up to which walking beats hashing.
const LINEAR: usize = 16;

impl<A> Default for Table<A> {
    fn default() -> Self {
        Self { entries: Vec::new(), lengths: Vec::new(), index: FxHashMap::default() }
    }
}

impl<A: Copy + Ord + Hash + BitAnd<Output = A>> Table<A> {
    fn new(mut entries: Vec<Entry<A>>, rules: &[Rule]) -> Self {
        entries.sort_unstable_by_key(|e| (Reverse(e.prefix), e.network, Reverse(rules[e.rule as usize].id)));
        let mut table = Self { entries, ..Self::default() };
        if table.entries.len() > LINEAR {
            for (at, entry) in (0..).zip(&table.entries) {
                if table.lengths.last() != Some(&entry.mask) {
                    table.lengths.push(entry.mask);
                }
                table.index.entry((entry.mask, entry.network)).or_insert(at..at).end = at + 1;
            }
        }
        table
    }

    /// The first entry around `ip` whose rule is accepted: the rule's number and the length of the prefix.
    fn find(&self, ip: A, accept: impl Fn(usize) -> bool) -> Option<(usize, u8)> {
        let first = |entries: &[Entry<A>]| {
            entries
                .iter()
                .filter(|e| ip & e.mask == e.network)
                .map(|e| (e.rule as usize, e.prefix))
                .find(|(rule, _)| accept(*rule))
        };
        if self.lengths.is_empty() {
            return first(&self.entries);
        }
        self.lengths
            .iter()
            .filter_map(|mask| self.index.get(&(*mask, ip & *mask)))
            .find_map(|range| first(&self.entries[range.start as usize..range.end as usize]))
    }
}
