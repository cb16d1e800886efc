//! What one client may reach (packets.md section 4): compiled once per change, asked for every packet both ways.
//! Knows resources and addresses; no packet, no session.
//!
//! "Among all entries whose network contains the IP, choose the maximum by (filter permits this protocol, prefix
//! length, resource id)": since a winner that does not permit means denied, that is the first *permitting* entry in
//! the order of [`Table`].

use std::{
    cmp::Reverse,
    hash::{Hash, Hasher},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    ops::{BitAnd, Range},
};

use ipnet::IpNet;
use rustc_hash::{FxHashMap, FxHasher};

use super::inner::Transport;
use crate::{
    addr,
    ids::ResourceId,
    portal::messages::{Filter, Resource, ResourceKind},
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
    has_dns: bool,
    rules: Vec<Rule>,
    v4: Table<u32>,
    v6: Table<u128>,
    memo: Memo,
}

impl Policy {
    /// What every client's memo takes.
    #[cfg(test)]
    pub const MEMO_BYTES: usize = size_of::<[Option<Remembered>; MEMO]>();

    /// Compiles `resources`, all of them.
    pub fn new(resources: &[Resource]) -> Self {
        let mut policy = Self {
            internet: None,
            has_dns: false,
            rules: Vec::new(),
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
        self.internet = None;
        self.has_dns = false;
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
                ResourceKind::Dns { .. } => self.has_dns = true,
                ResourceKind::Internet => self.internet = self.internet.max(Some(resource.id)),
            }
        }
        self.v4 = Table::new(v4, &self.rules);
        self.v6 = Table::new(v6, &self.rules);
        self.memo.forget();
    }

    /// Is some DNS resource authorised, so that proxy addresses may mean something to the client?
    pub fn has_dns(&self) -> bool {
        self.has_dns
    }

    /// May traffic of this class pass between the client and `ip`?
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
        match self.internet {
            // Section 4.4: "CIDR resources of the same client are not consulted any more", and no filter applies.
            Some(_) if !addr::is_resource_proxy(ip) && is_private(ip) => Decision::Private,
            Some(id) if !addr::is_resource_proxy(ip) => Decision::Permitted(id),
            _ => {
                let found = match ip {
                    IpAddr::V4(ip) => self.v4.find(ip.to_bits(), &self.rules, class),
                    IpAddr::V6(ip) => self.v6.find(ip.to_bits(), &self.rules, class),
                };
                found.map_or(Decision::Denied, |rule| Decision::Permitted(rule.id))
            }
        }
    }
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

/// The filter engine (section 4.2).
struct Filters {
    everything: bool,
    icmp: bool,
    /// Sorted, disjoint.
    tcp: Box<[(u16, u16)]>,
    udp: Box<[(u16, u16)]>,
}

impl Filters {
    fn new(filters: &[Filter]) -> Self {
        let (mut tcp, mut udp, mut icmp) = (Vec::new(), Vec::new(), false);
        for filter in filters {
            match *filter {
                Filter::Tcp { first, last } => tcp.push((first, last)),
                Filter::Udp { first, last } => udp.push((first, last)),
                Filter::Icmp => icmp = true,
            }
        }
        // "Empty list = permit everything" is about the list: one whose ranges never match permits nothing.
        Self { everything: filters.is_empty(), icmp, tcp: union(tcp), udp: union(udp) }
    }

    #[inline]
    fn permit(&self, class: Class) -> bool {
        self.everything
            || match class {
                Class::Tcp(port) => within(&self.tcp, port),
                Class::Udp(port) => within(&self.udp, port),
                Class::Icmp => self.icmp,
                Class::Other => false,
            }
    }
}

/// "Overlapping ranges simply union"; one with first > last never matches.
fn union(mut ranges: Vec<(u16, u16)>) -> Box<[(u16, u16)]> {
    ranges.retain(|(first, last)| first <= last);
    ranges.sort_unstable();
    let mut merged: Vec<(u16, u16)> = Vec::with_capacity(ranges.len());
    for (first, last) in ranges {
        match merged.last_mut() {
            Some(previous) if u32::from(first) <= u32::from(previous.1) + 1 => {
                previous.1 = previous.1.max(last)
            }
            _ => merged.push((first, last)),
        }
    }
    merged.into()
}

#[inline]
fn within(ranges: &[(u16, u16)], port: u16) -> bool {
    let after = ranges.partition_point(|(first, _)| *first <= port);
    after > 0 && port <= ranges[after - 1].1
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

    fn find<'r>(&self, ip: A, rules: &'r [Rule], class: Class) -> Option<&'r Rule> {
        let permitting = |entries: &[Entry<A>]| {
            entries
                .iter()
                .filter(|e| ip & e.mask == e.network)
                .map(|e| &rules[e.rule as usize])
                .find(|rule| rule.filters.permit(class))
        };
        if self.lengths.is_empty() {
            return permitting(&self.entries);
        }
        self.lengths
            .iter()
            .filter_map(|mask| self.index.get(&(*mask, ip & *mask)))
            .find_map(|range| permitting(&self.entries[range.start as usize..range.end as usize]))
    }
}

/// Recent decisions, direct mapped. An entry holds only under the epoch it was made in.
struct Memo {
    epoch: u32,
    entries: Box<[Option<Remembered>; MEMO]>,
}

#[derive(Clone, Copy)]
struct Remembered {
    epoch: u32,
    ip: IpAddr,
    class: Class,
    decision: Decision,
}

/// A client talks to few services at a time; 64 entries are 4 KB.
const MEMO: usize = 64;

impl Memo {
    fn new() -> Self {
        Self { epoch: 0, entries: Box::new([None; MEMO]) }
    }

    fn forget(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        if self.epoch == 0 {
            *self.entries = [None; MEMO];
        }
    }

    #[inline]
    fn get(&self, ip: IpAddr, class: Class) -> Option<Decision> {
        self.entries[place(ip, class)]
            .as_ref()
            .filter(|e| e.epoch == self.epoch && e.class == class && e.ip == ip)
            .map(|e| e.decision)
    }

    #[inline]
    fn put(&mut self, ip: IpAddr, class: Class, decision: Decision) {
        self.entries[place(ip, class)] = Some(Remembered { epoch: self.epoch, ip, class, decision });
    }
}

#[inline]
fn place(ip: IpAddr, class: Class) -> usize {
    let mut hasher = FxHasher::default();
    match ip {
        IpAddr::V4(ip) => hasher.write_u32(ip.to_bits()),
        IpAddr::V6(ip) => hasher.write_u128(ip.to_bits()),
    }
    hasher.write_u32(match class {
        Class::Tcp(port) => u32::from(port),
        Class::Udp(port) => 0x1_0000 | u32::from(port),
        Class::Icmp => 0x2_0000,
        Class::Other => 0x3_0000,
    });
    usize::from(hasher.finish().to_le_bytes()[0]) % MEMO
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::worker::testkit::{cidr, resource_id};

    fn tcp(first: u16, last: u16) -> Filter {
        Filter::Tcp { first, last }
    }

    fn permitted(n: u128) -> Decision {
        Decision::Permitted(resource_id(n))
    }

    #[track_caller]
    fn check(resources: &[Resource], table: &[(&str, Class, Decision)]) {
        let mut policy = Policy::new(resources);
        for (ip, class, expect) in table {
            for round in ["first", "memorised"] {
                assert_eq!(policy.decide(ip.parse().unwrap(), *class), *expect, "{ip} {class:?} {round}");
            }
        }
    }

    #[test]
    fn filters_are_inclusive_unions_and_an_empty_list_permits_everything() {
        let resources = [
            cidr(1, "10.0.0.1/32", &[]),
            cidr(2, "10.0.0.2/32", &[tcp(80, 80), tcp(443, 500), tcp(450, 600), tcp(9, 3)]),
            cidr(3, "10.0.0.3/32", &[Filter::Icmp, Filter::Udp { first: 53, last: 53 }]),
            cidr(4, "10.0.0.4/32", &[tcp(9, 3)]),
        ];
        check(
            &resources,
            &[
                ("10.0.0.1", Class::Tcp(1), permitted(1)),
                ("10.0.0.1", Class::Icmp, permitted(1)),
                ("10.0.0.1", Class::Other, permitted(1)),
                ("10.0.0.2", Class::Tcp(79), Decision::Denied),
                ("10.0.0.2", Class::Tcp(80), permitted(2)),
                ("10.0.0.2", Class::Tcp(81), Decision::Denied),
                ("10.0.0.2", Class::Tcp(443), permitted(2)),
                ("10.0.0.2", Class::Tcp(600), permitted(2)),
                ("10.0.0.2", Class::Tcp(601), Decision::Denied),
                ("10.0.0.2", Class::Tcp(5), Decision::Denied),
                ("10.0.0.2", Class::Udp(80), Decision::Denied),
                ("10.0.0.2", Class::Icmp, Decision::Denied),
                ("10.0.0.2", Class::Other, Decision::Denied),
                ("10.0.0.3", Class::Icmp, permitted(3)),
                ("10.0.0.3", Class::Udp(53), permitted(3)),
                ("10.0.0.3", Class::Tcp(53), Decision::Denied),
                ("10.0.0.3", Class::Other, Decision::Denied),
                ("10.0.0.4", Class::Tcp(5), Decision::Denied),
                ("10.0.0.5", Class::Tcp(80), Decision::Denied),
            ],
        );
    }

    #[test]
    fn any_covering_resource_may_permit_and_the_most_specific_one_wins() {
        let resources = [
            cidr(1, "10.0.0.0/8", &[tcp(80, 80), tcp(22, 22)]),
            cidr(2, "10.1.0.0/16", &[tcp(443, 443), tcp(22, 22)]),
            cidr(3, "10.1.0.0/16", &[tcp(22, 22)]),
            cidr(4, "0.0.0.0/0", &[Filter::Icmp]),
            cidr(5, "fd00:db8::/32", &[]),
        ];
        check(
            &resources,
            &[
                ("10.1.2.3", Class::Tcp(80), permitted(1)),
                ("10.1.2.3", Class::Tcp(443), permitted(2)),
                ("10.1.2.3", Class::Tcp(22), permitted(3)),
                ("10.2.2.3", Class::Tcp(22), permitted(1)),
                ("10.2.2.3", Class::Tcp(443), Decision::Denied),
                ("10.1.2.3", Class::Icmp, permitted(4)),
                ("8.8.8.8", Class::Icmp, permitted(4)),
                ("8.8.8.8", Class::Udp(53), Decision::Denied),
                ("fd00:db8::1", Class::Other, permitted(5)),
                ("fd00:db9::1", Class::Other, Decision::Denied),
            ],
        );
    }

    #[test]
    fn many_resources_decide_like_few() {
        // The hashed table against the plain definition of section 4.3.
        let mut state = 1_u64;
        let mut random = |below: u32| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            u32::try_from(state >> 33).unwrap() % below
        };
        let resources: Vec<Resource> = (1..=400)
            .map(|n| {
                let prefix = 18 + random(15);
                let ip = Ipv4Addr::from_bits(0x0a00_0000 | random(1 << 12) << 4);
                let filters = match random(3) {
                    0 => vec![],
                    1 => vec![tcp(80, 80)],
                    _ => vec![Filter::Icmp],
                };
                let net = ipnet::Ipv4Net::new(ip, u8::try_from(prefix).unwrap()).unwrap().trunc();
                cidr(n, &net.to_string(), &filters)
            })
            .collect();
        let mut policy = Policy::new(&resources);
        let mut seen = [0; 2];
        for _ in 0..5000 {
            let ip = IpAddr::from(Ipv4Addr::from_bits(0x0a00_0000 | random(1 << 17)));
            let class = [Class::Tcp(80), Class::Icmp, Class::Other][random(3) as usize];
            let expect = resources
                .iter()
                .filter_map(|r| match &r.kind {
                    ResourceKind::Cidr { network, filters, .. } if network.contains(&ip) => {
                        let permits = filters.is_empty()
                            || (class == Class::Icmp && filters.contains(&Filter::Icmp))
                            || (class == Class::Tcp(80) && filters.contains(&tcp(80, 80)));
                        Some((permits, network.prefix_len(), r.id))
                    }
                    _ => None,
                })
                .max()
                .filter(|(permits, ..)| *permits)
                .map_or(Decision::Denied, |(_, _, id)| Decision::Permitted(id));
            seen[usize::from(expect == Decision::Denied)] += 1;
            assert_eq!(policy.decide(ip, class), expect, "{ip} {class:?}");
        }
        assert!(seen[0] > 500 && seen[1] > 100, "the sample covers both outcomes: {seen:?}");
    }

    #[test]
    fn the_internet_resource_masks_networks_and_refuses_private_addresses() {
        let internet = Resource { id: resource_id(9), kind: ResourceKind::Internet };
        let resources = [cidr(1, "10.0.0.0/8", &[]), cidr(2, "100.96.0.0/11", &[]), internet];
        let private = [
            "10.0.0.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "127.0.0.1",
            "169.254.1.1",
            "100.64.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::1",
            "::ffff:1.2.3.4",
            "fc00::1",
            "fe80::1",
            "ff02::1",
        ];
        let private = private.map(|ip| (ip, Class::Tcp(80), Decision::Private));
        check(&resources, &private);
        let public = ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2001:db8::1", "0.0.0.1"];
        check(&resources, &public.map(|ip| (ip, Class::Other, permitted(9))));
        check(&resources, &[("100.96.0.1", Class::Icmp, permitted(2))]);
    }

    #[test]
    fn a_change_acts_on_what_was_memorised() {
        let ip = "10.0.0.1".parse().unwrap();
        let mut policy = Policy::new(&[cidr(1, "10.0.0.0/8", &[])]);
        assert_eq!(policy.decide(ip, Class::Icmp), permitted(1));
        policy.replace(&[cidr(1, "10.0.0.0/8", &[tcp(80, 80)])]);
        assert_eq!(policy.decide(ip, Class::Icmp), Decision::Denied);
        policy.replace(&[]);
        assert_eq!(policy.decide(ip, Class::Tcp(80)), Decision::Denied);
    }
}
