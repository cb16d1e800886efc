//! One client's names as packets need them: which name a proxy address belongs to, and what stands behind it. Knows what
//! control said, as [`Names`](crate::names::Names); no packet, no session, no rule.

use std::{cmp::Ordering, collections::HashMap, net::IpAddr, sync::Arc};

use super::nat::Secret;
use crate::names::Domain;

/// The proxy addresses of all names.
pub struct ProxyTable {
    domains: Arc<[Arc<Domain>]>,
    proxies: HashMap<Key, Proxy, Secret>,
}

/// What one proxy address stands for.
pub struct Proxy {
    /// The address that new sessions go to; `None` if the name has none of this family.
    pub real: Option<IpAddr>,
    /// Its name.
    pub domain: Arc<Domain>,
}

impl ProxyTable {
    /// No names. The addresses will be the client's choice: `seed` is random and nobody else's.
    pub fn new(seed: u64) -> Self {
        Self { domains: Arc::default(), proxies: HashMap::with_hasher(Secret::new(seed)) }
    }

    /// What `ip` stands for, if it is a proxy address of some name.
    #[inline]
    pub fn get(&self, ip: IpAddr) -> Option<&Proxy> {
        self.proxies.get(&key(ip))
    }

    /// Is it made from these already?
    #[inline]
    pub fn is(&self, domains: &Arc<[Arc<Domain>]>) -> bool {
        Arc::ptr_eq(&self.domains, domains)
    }

    /// Becomes `domains` (ascending by name). An unchanged one costs a comparison of pointers. Returns the addresses that
    /// belonged to a name and now belong to another or to none, ascending.
    pub fn update(&mut self, domains: &Arc<[Arc<Domain>]>) -> Vec<IpAddr> {
        let old = std::mem::replace(&mut self.domains, Arc::clone(domains));
        let (mut old, mut new) = (old.iter().peekable(), domains.iter().peekable());
        let mut moved = Vec::new();
        loop {
            let (before, after) = match (old.peek(), new.peek()) {
                (None, None) => break,
                (Some(_), None) => (old.next(), None),
                (None, Some(_)) => (None, new.next()),
                (Some(a), Some(b)) if Arc::ptr_eq(a, b) => {
                    old.next();
                    new.next();
                    continue;
                }
                (Some(a), Some(b)) => match a.name.cmp(&b.name) {
                    Ordering::Less => (old.next(), None),
                    Ordering::Equal => (old.next(), new.next()),
                    Ordering::Greater => (None, new.next()),
                },
            };
            if let Some(before) = before {
                self.take_away(before, after, &mut moved);
            }
            let Some(after) = after else { continue };
            for (ip, real) in &after.proxies {
                self.proxies.insert(key(*ip), Proxy { real: *real, domain: Arc::clone(after) });
            }
        }
        if self.proxies.is_empty() {
            self.proxies.shrink_to_fit();
        }
        moved.sort_unstable();
        moved
    }

    /// What `before` had and `after`, the same name later, has not.
    fn take_away(&mut self, before: &Arc<Domain>, after: Option<&Arc<Domain>>, moved: &mut Vec<IpAddr>) {
        for (ip, _) in &before.proxies {
            if after.is_some_and(|after| after.proxies.binary_search_by_key(ip, |(ip, _)| *ip).is_ok()) {
                continue;
            }
            moved.push(*ip);
            // Another name may have taken it already.
            if self.get(*ip).is_some_and(|proxy| Arc::ptr_eq(&proxy.domain, before)) {
                self.proxies.remove(&key(*ip));
            }
        }
    }
}

/// An address in two words, so that hashing it is two multiplications. Proxy addresses of the two families never share
/// one: those of IPv6 do not begin with 12 bytes of zeros.
type Key = (u64, u64);

#[inline]
fn key(ip: IpAddr) -> Key {
    match ip {
        IpAddr::V4(ip) => (0, u64::from(ip.to_bits())),
        IpAddr::V6(ip) => {
            let [a, b, c, d, e, f, g, h, low @ ..] = ip.octets();
            (u64::from_be_bytes([a, b, c, d, e, f, g, h]), u64::from_be_bytes(low))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::{names::DomainName, worker::testkit::resource_id};

    fn proxy(n: u8) -> IpAddr {
        if n.is_multiple_of(2) {
            IpAddr::from([100, 96, 0, n])
        } else {
            format!("fd00:2021:1111:8000::{n:x}").parse().unwrap()
        }
    }

    #[test]
    fn a_walk_of_changes_leaves_what_the_last_state_says() {
        let mut state = 3_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            u8::try_from((state >> 33) % below).unwrap()
        };
        let mut table = ProxyTable::new(9);
        let mut current: BTreeMap<DomainName, Arc<Domain>> = BTreeMap::new();
        let (mut moves, mut kept) = (0, 0);
        for step in 0..20_000 {
            // Who had what, by name.
            let owners = |names: &BTreeMap<DomainName, Arc<Domain>>| -> BTreeMap<IpAddr, DomainName> {
                let of = |d: &Arc<Domain>| {
                    d.proxies.iter().map(|(ip, _)| (*ip, d.name.clone())).collect::<Vec<_>>()
                };
                names.values().flat_map(of).collect()
            };
            let before = owners(&current);
            // A few changes at once, as commands coalesce.
            for _ in 0..=random(3) {
                let name = DomainName::parse(&format!("n{}.net", random(8))).unwrap();
                if random(5) == 0 {
                    current.remove(&name);
                    continue;
                }
                let taken: BTreeSet<IpAddr> = (0..random(5)).map(|_| proxy(random(12))).collect();
                for other in current.values_mut().filter(|other| other.name != name) {
                    if other.proxies.iter().any(|(ip, _)| taken.contains(ip)) {
                        let mut less = Domain::clone(other);
                        less.proxies =
                            less.proxies.into_iter().filter(|(ip, _)| !taken.contains(ip)).collect();
                        *other = Arc::new(less);
                    }
                }
                let real = random(4);
                let proxies = taken.into_iter().map(|ip| {
                    let v4 = ip.is_ipv4() && real > 0;
                    (ip, v4.then(|| [10, 0, 0, real].into()))
                });
                let resources = [resource_id(u128::from(random(3)))].into();
                let domain = Domain { name: name.clone(), resources, proxies: proxies.collect() };
                current.insert(name, Arc::new(domain));
            }
            let domains: Arc<[Arc<Domain>]> = current.values().cloned().collect();
            let moved = table.update(&domains);
            assert!(table.is(&domains));

            let after = owners(&current);
            let expect: Vec<IpAddr> =
                before.iter().filter(|(ip, name)| after.get(ip) != Some(name)).map(|(ip, _)| *ip).collect();
            assert_eq!(moved, expect, "step {step}");
            moves += moved.len();
            kept += before.len() - moved.len();
            assert_eq!(table.proxies.len(), after.len(), "step {step}");
            for (domain, ip, real) in
                current.values().flat_map(|d| d.proxies.iter().map(move |(ip, r)| (d, *ip, *r)))
            {
                let found = table.get(ip).unwrap_or_else(|| panic!("step {step}: {ip}"));
                assert!(Arc::ptr_eq(&found.domain, domain) && found.real == real, "step {step}: {ip}");
            }
            for ip in (0..12).map(proxy).filter(|ip| !after.contains_key(ip)) {
                assert!(table.get(ip).is_none(), "step {step}: {ip}");
            }
        }
        assert!(moves > 5000 && kept > 5000, "{moves} {kept}");
    }
}
