//! The names that clients assign proxy addresses to, what stands behind them, and the answers (dns.md section 5,
//! packets.md section 5.1). Knows no packet and no resolver.
//!
//! ```text
//! WorkerEvent::Assigned -> permitted? -> Event::Resolve -> handle_resolved -> Domain and Answer, in the client's next state
//! ```

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Instant,
};

use gateway_common::DropReason;
use rustc_hash::FxHashMap;
use tracing::debug;

use super::{
    Control, Event,
    resolutions::{Wait, Waiter},
};
use crate::{
    addr::{is_resource_proxy, is_tunnel},
    ids::{ClientId, ConnectionIndex, ResourceId},
    names::{Answer, AssignedIps, Domain, DomainName, Lookup, Names, Resolved},
};

/// Names of one client; the one assigned longest ago makes room for another.
const DOMAINS: usize = 4096;

/// What control knows of one client's names.
#[derive(Debug, Default)]
pub(super) struct ClientNames {
    domains: BTreeMap<DomainName, Known>,
    /// The domain of each proxy address.
    owners: FxHashMap<IpAddr, DomainName>,
    /// Counts assignments.
    assigned: u64,
    answers: Arc<[Answer]>,
    /// Shared with the workers; `None` after a change of domains.
    complete: Option<Arc<[Arc<Domain>]>>,
    /// The same with the answers; `None` after a change of either.
    names: Option<Arc<Names>>,
}

/// A name and its addresses.
#[derive(Debug)]
struct Known {
    v4: BTreeSet<Ipv4Addr>,
    v6: BTreeSet<Ipv6Addr>,
    /// [`ClientNames::assigned`] when it was assigned last.
    assigned: u64,
    /// What the workers know of it; kept while nothing changes.
    domain: Arc<Domain>,
}

impl ClientNames {
    /// The names, ascending.
    pub(super) fn known(&self) -> impl Iterator<Item = &DomainName> {
        self.domains.keys()
    }

    /// Everything, for the workers.
    pub(super) fn names(&mut self) -> Arc<Names> {
        let Self { domains, answers, complete, names, .. } = self;
        let domains = || domains.values().map(|known| Arc::clone(&known.domain)).collect();
        let mut complete = || Names {
            domains: Arc::clone(complete.get_or_insert_with(domains)),
            answers: Arc::clone(answers),
        };
        Arc::clone(names.get_or_insert_with(|| Arc::new(complete())))
    }

    /// The client is to hear this; its serial is higher than that of all before.
    fn answer(&mut self, answer: Answer) {
        let kept = &self.answers[self.answers.len().saturating_sub(Answer::KEPT - 1)..];
        self.answers = kept.iter().cloned().chain([answer]).collect();
        self.names = None;
    }

    /// `proxies` stand for `name` under `resource` from now on, instead of all that stood for it before or that they
    /// stood for before. Of a family that `resolved` does not know the addresses stay what they were.
    ///
    /// False if nothing is known of the name and time ran out, so that it is better asked for again: nothing changes.
    fn assign(
        &mut self,
        name: &DomainName,
        resource: ResourceId,
        proxies: &[IpAddr],
        resolved: &Resolved,
    ) -> bool {
        let before = self.domains.get(name);
        if before.is_none() && is_worth_another_try(resolved) {
            return false;
        }
        let (v4, v6) = (before.map(|known| &known.v4), before.map(|known| &known.v6));
        let v4 = addresses(&resolved.v4, v4, |ip| is_target((*ip).into()));
        let v6 = addresses(&resolved.v6, v6, |ip| is_target((*ip).into()));
        let resources: BTreeSet<_> = before
            .iter()
            .flat_map(|known| known.domain.resources.iter().copied())
            .chain([resource])
            .collect();
        self.take_from_others(name, proxies);
        let domain = Domain {
            name: name.clone(),
            resources: resources.into_iter().collect(),
            proxies: behind(proxies, &v4, &v6),
        };
        self.assigned += 1;
        let assigned = self.assigned;
        match self.domains.get_mut(name) {
            Some(known) => {
                if *known.domain != domain {
                    for (proxy, _) in &known.domain.proxies {
                        self.owners.remove(proxy);
                    }
                    known.domain = Arc::new(domain);
                    self.on_changed();
                }
                let known = self.domains.get_mut(name).expect("found just now");
                (known.v4, known.v6, known.assigned) = (v4, v6, assigned);
            }
            None => {
                self.make_room();
                let known = Known { v4, v6, assigned, domain: Arc::new(domain) };
                self.domains.insert(name.clone(), known);
                self.on_changed();
            }
        }
        for proxy in proxies {
            self.owners.insert(*proxy, name.clone());
        }
        true
    }

    /// A client that starts again gives its proxy addresses to other names. Their owner is for the caller to change.
    fn take_from_others(&mut self, name: &DomainName, proxies: &[IpAddr]) {
        for proxy in proxies {
            let Some(other) = self.owners.get(proxy).filter(|owner| *owner != name) else { continue };
            let known = self.domains.get_mut(other).expect("every owner is a domain");
            let left: Box<[_]> = known.domain.proxies.iter().filter(|(p, _)| p != proxy).copied().collect();
            if left.is_empty() {
                let other = other.clone();
                self.domains.remove(&other);
            } else {
                let Domain { name, resources, .. } = &*known.domain;
                let domain = Domain { name: name.clone(), resources: resources.clone(), proxies: left };
                known.domain = Arc::new(domain);
            }
            self.on_changed();
        }
    }

    fn make_room(&mut self) {
        if self.domains.len() < DOMAINS {
            return;
        }
        let oldest = self.domains.iter().max_by_key(|(_, known)| Reverse(known.assigned));
        let Some((name, known)) = oldest else { return };
        for (proxy, _) in &known.domain.proxies {
            self.owners.remove(proxy);
        }
        let name = name.clone();
        self.domains.remove(&name);
    }

    fn on_changed(&mut self) {
        (self.complete, self.names) = (None, None);
    }
}

/// What names look-ups lead to.
impl Control {
    /// The name of an [`Event::Resolve`] was looked up: once for each of these events, 10 s after it at the latest.
    pub fn handle_resolved(&mut self, name: &DomainName, resolved: &Resolved, now: Instant) {
        debug!(domain = %name, ?resolved, "Looked up");
        for waiter in self.resolutions.take(name) {
            if self.is_current(waiter.client, waiter.index) {
                self.on_resolved(name, waiter, resolved);
            }
        }
        self.settle(now);
    }

    fn on_resolved(&mut self, name: &DomainName, waiter: Waiter, resolved: &Resolved) {
        let Waiter { client: id, resource, said, proxies, .. } = waiter;
        let Some(client) = self.clients.get_mut(&id) else { return };
        // What was permitted when it asked may have been revoked since.
        let active = match client.authorizations.permits(resource, name) {
            Ok(()) => client.names.assign(name, resource, &proxies, resolved),
            Err(why) => {
                debug!(client = %id, %resource, domain = %name, "Not translated: {why}");
                false
            }
        };
        self.answer(id, resource, said, active);
    }

    /// A client assigned proxy addresses to a name.
    pub(super) fn on_assigned(&mut self, id: ClientId, index: ConnectionIndex, assigned: AssignedIps) {
        let Some(client) = self.clients.get(&id) else { return };
        let (resource, domain) = (assigned.resource, assigned.domain.clone());
        let permitted = match client.authorizations.permits(resource, &domain) {
            Ok(()) if assigned.proxies.is_empty() => Err("none of the addresses is a proxy's"),
            permitted => permitted,
        };
        if let Err(why) = permitted {
            debug!(client = %id, %resource, %domain, "Not translated: {why}");
            return self.answer(id, resource, assigned.said, false);
        }
        match self.resolutions.wait(id, index, assigned) {
            Wait::LookUp => self.events.push_back(Event::Resolve(domain)),
            Wait::Merged => {}
            Wait::Refused => {
                debug!(client = %id, %resource, %domain, "Too many names are being looked up");
                self.counters.count(DropReason::ControlQueueFull);
            }
        }
    }

    fn answer(&mut self, id: ClientId, resource: ResourceId, said: Arc<str>, active: bool) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        self.last_answer += 1;
        client.names.answer(Answer { serial: self.last_answer, resource, said, active });
        self.mark_changed(id);
    }
}

/// A name without addresses is translated to "unreachable", which tells applications at once; but where nobody answered
/// at all the client had better ask again (dns.md section 5.2, no. 5).
fn is_worth_another_try(resolved: &Resolved) -> bool {
    let (v4, v6) = (&resolved.v4, &resolved.v6);
    let is_answered = matches!(v4, Lookup::Answer(_)) || matches!(v6, Lookup::Answer(_));
    !is_answered && (*v4 == Lookup::TimedOut || *v6 == Lookup::TimedOut)
}

fn addresses<A: Copy + Ord>(
    found: &Lookup<A>,
    before: Option<&BTreeSet<A>>,
    is_target: impl Fn(&A) -> bool,
) -> BTreeSet<A> {
    match found {
        Lookup::Answer(ips) => ips.iter().copied().filter(is_target).collect(),
        Lookup::Failed | Lookup::TimedOut => before.cloned().unwrap_or_default(),
    }
}

/// Each family's addresses in turn, from the first again when they are used up; nothing is translated between families
/// (dns.md section 5.3).
fn behind(
    proxies: &[IpAddr],
    v4: &BTreeSet<Ipv4Addr>,
    v6: &BTreeSet<Ipv6Addr>,
) -> Box<[(IpAddr, Option<IpAddr>)]> {
    let (mut v4, mut v6) = (v4.iter().cycle(), v6.iter().cycle());
    let behind = |proxy: &IpAddr| match proxy {
        IpAddr::V4(_) => (*proxy, v4.next().map(|ip| IpAddr::V4(*ip))),
        IpAddr::V6(_) => (*proxy, v6.next().map(|ip| IpAddr::V6(*ip))),
    };
    // Ascending, as the worker read them.
    proxies.iter().map(behind).collect()
}

/// Would a packet to it leave this machine for one other? Whoever owns a name must not reach what is ours, nor a tunnel.
fn is_target(ip: IpAddr) -> bool {
    let is_odd = match ip {
        // 0.0.0.0/8 is "this network" (RFC 1122 section 3.2.1.3).
        IpAddr::V4(v4) => v4.octets()[0] == 0 || v4.is_broadcast(),
        // A link-local address is nothing without its link, and a mapped one is an IPv4 address in disguise.
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    !(is_odd
        || ip.is_unspecified()
        || ip.is_loopback()
        || ip.is_multicast()
        || is_tunnel(ip)
        || is_resource_proxy(ip))
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
    use uuid::Uuid;

    use super::*;

    fn name(text: &str) -> DomainName {
        DomainName::parse(text).unwrap()
    }

    fn resource(n: u128) -> ResourceId {
        ResourceId(Uuid::from_u128(n))
    }

    /// Addresses, separated by blanks.
    fn ips<A: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> Vec<A> {
        text.split_whitespace().map(|ip| ip.parse().unwrap()).collect()
    }

    /// `failed`, `late`, or addresses.
    fn lookup<A: std::str::FromStr<Err: std::fmt::Debug>>(text: &str) -> Lookup<A> {
        match text {
            "failed" => Lookup::Failed,
            "late" => Lookup::TimedOut,
            text => Lookup::Answer(ips(text)),
        }
    }

    fn resolved(v4: &str, v6: &str) -> Resolved {
        Resolved { v4: lookup(v4), v6: lookup(v6) }
    }

    /// One line for a domain: `proxy=address`, `-` for none.
    fn shown(names: &mut ClientNames, of: &str) -> Option<String> {
        let names = names.names();
        let domain = names.domains.iter().find(|domain| domain.name == name(of))?;
        let pair = |(proxy, real): &(IpAddr, Option<IpAddr>)| {
            format!("{proxy}={}", real.map_or("-".into(), |ip| ip.to_string()))
        };
        Some(domain.proxies.iter().map(pair).collect::<Vec<_>>().join(" "))
    }

    #[test]
    fn what_was_found_stands_behind_the_proxies_and_what_was_not_stays() {
        const PROXIES: &str =
            "100.96.0.1 100.96.0.2 100.96.0.3 fd00:2021:1111:8000::1 fd00:2021:1111:8000::2";
        const KNOWN: (&str, &str) = ("192.0.2.77", "2001:db8::77");
        // A, AAAA; then for a new name and for a known one: addresses of the five proxies, or `None` for "inactive".
        type Row = (&'static str, &'static str, Option<[&'static str; 5]>, Option<[&'static str; 5]>);
        let new = |row: [&'static str; 5]| (Some(row), Some(row));
        let (a, b, six) = ("192.0.2.1", "192.0.2.2", "2001:db8::1");
        let (old4, old6) = KNOWN;
        let row = |v4, v6, (new, known)| -> Row { (v4, v6, new, known) };
        let table: [Row; 13] = [
            row("192.0.2.2 192.0.2.1", six, new([a, b, a, six, six])),
            row(a, "", new([a, a, a, "-", "-"])),
            row("", "2001:db8::2 2001:db8::1", new(["-", "-", "-", six, "2001:db8::2"])),
            row("", "", new(["-"; 5])),
            row(a, "failed", (Some([a, a, a, "-", "-"]), Some([a, a, a, old6, old6]))),
            row(a, "late", (Some([a, a, a, "-", "-"]), Some([a, a, a, old6, old6]))),
            row("failed", six, (Some(["-", "-", "-", six, six]), Some([old4, old4, old4, six, six]))),
            row("late", "", (Some(["-"; 5]), Some([old4, old4, old4, "-", "-"]))),
            row("failed", "failed", (Some(["-"; 5]), Some([old4, old4, old4, old6, old6]))),
            row("failed", "late", (None, Some([old4, old4, old4, old6, old6]))),
            row("late", "failed", (None, Some([old4, old4, old4, old6, old6]))),
            row("late", "late", (None, Some([old4, old4, old4, old6, old6]))),
            // What is no target is as if it had not been said.
            row("127.0.0.1 192.0.2.1", "::1 fe80::1 ::ffff:10.0.0.1", new([a, a, a, "-", "-"])),
        ];
        let proxies: Vec<IpAddr> = ips(PROXIES);
        for (v4, v6, new, known) in table {
            for (is_known, expect) in [(false, new), (true, known)] {
                let mut names = ClientNames::default();
                if is_known {
                    assert!(names.assign(&name("x.test"), resource(1), &proxies, &resolved(old4, old6)));
                }
                let active = names.assign(&name("x.test"), resource(1), &proxies, &resolved(v4, v6));
                let expect = expect.map(|row| {
                    let pairs = PROXIES.split(' ').zip(row).map(|(proxy, real)| format!("{proxy}={real}"));
                    pairs.collect::<Vec<_>>().join(" ")
                });
                assert_eq!(active, expect.is_some(), "{v4}, {v6}, known before: {is_known}");
                assert_eq!(shown(&mut names, "x.test"), expect, "{v4}, {v6}, known before: {is_known}");
            }
        }
    }

    #[test]
    fn what_is_ours_is_no_target() {
        for (ip, expect) in [
            ("0.0.0.0", false),
            ("0.1.2.3", false),
            ("127.0.0.1", false),
            ("127.255.255.255", false),
            ("224.0.0.1", false),
            ("239.255.255.255", false),
            ("255.255.255.255", false),
            ("100.64.0.1", false),
            ("100.95.255.255", false),
            ("100.96.0.0", false),
            ("100.127.255.255", false),
            ("100.63.255.255", true),
            ("100.128.0.0", true),
            ("10.0.0.1", true),
            ("172.20.0.100", true),
            ("192.168.0.1", true),
            ("169.254.1.1", true),
            ("1.1.1.1", true),
            ("::", false),
            ("::1", false),
            ("ff02::1", false),
            ("fe80::1", false),
            ("febf::1", false),
            ("::ffff:10.0.0.1", false),
            ("fd00:2021:1111::1", false),
            ("fd00:2021:1111:8000::1", false),
            ("fd00:2021:1112::1", true),
            ("fec0::1", true),
            ("2001:db8::1", true),
            ("64:ff9b::a00:1", true),
        ] {
            assert_eq!(is_target(ip.parse().unwrap()), expect, "{ip}");
        }
    }

    #[test]
    fn what_does_not_change_stays_the_same_arc() {
        let mut names = ClientNames::default();
        let proxies = |n: u8| -> Vec<IpAddr> { vec![[100, 96, 0, n].into()] };
        names.assign(&name("a.test"), resource(1), &proxies(1), &resolved("192.0.2.1", ""));
        names.assign(&name("b.test"), resource(1), &proxies(2), &resolved("192.0.2.2", ""));
        let first = names.names();
        assert!(Arc::ptr_eq(&first, &names.names()));
        // The same again: only the answer is new.
        names.assign(&name("b.test"), resource(1), &proxies(2), &resolved("192.0.2.2", ""));
        let said: Arc<str> = "b.test".into();
        names.answer(Answer { serial: 1, resource: resource(1), said, active: true });
        let second = names.names();
        assert!(Arc::ptr_eq(&first.domains, &second.domains));
        assert_eq!((first.answers.len(), second.answers.len()), (0, 1));
        // Another resource: one domain of the two is new, in its place.
        names.assign(&name("b.test"), resource(2), &proxies(2), &resolved("192.0.2.2", ""));
        let third = names.names();
        assert!(Arc::ptr_eq(&second.domains[0], &third.domains[0]));
        assert_eq!(&*third.domains[1].resources, [resource(1), resource(2)]);
        assert!(Arc::ptr_eq(&second.answers, &third.answers));
    }

    #[test]
    fn the_name_assigned_longest_ago_makes_room() {
        let mut names = ClientNames::default();
        let proxy = |n: u32| -> Vec<IpAddr> {
            vec![Ipv4Addr::from(u32::from(Ipv4Addr::new(100, 96, 0, 0)) + n).into()]
        };
        let assign = |names: &mut ClientNames, n: u32| {
            names.assign(&name(&format!("n{n}.test")), resource(1), &proxy(n), &resolved("192.0.2.1", ""))
        };
        let bound = u32::try_from(DOMAINS).unwrap();
        for n in 0..bound {
            assert!(assign(&mut names, n));
        }
        // Again, so that the second is the oldest.
        assign(&mut names, 0);
        assign(&mut names, bound);
        assert_eq!((names.names().domains.len(), names.owners.len()), (DOMAINS, DOMAINS));
        assert_eq!(shown(&mut names, "n1.test"), None);
        for n in [0, 2, bound] {
            assert!(shown(&mut names, &format!("n{n}.test")).is_some(), "{n}");
        }
    }

    /// Each proxy address and the last word about it, without any table by name.
    #[derive(Default)]
    struct Model {
        /// Proxy address, name, its place among the name's proxies.
        proxies: Vec<(IpAddr, String)>,
        /// Name, resource.
        resources: BTreeSet<(String, u128)>,
        /// Name, addresses of either family.
        addresses: BTreeMap<String, Vec<IpAddr>>,
    }

    #[test]
    fn a_random_walk_leads_where_a_simple_model_does() {
        let mut rng = SmallRng::seed_from_u64(53);
        let pool: Vec<IpAddr> = ips(
            "100.96.0.1 100.96.0.2 100.96.0.3 100.96.0.4 fd00:2021:1111:8000::1 fd00:2021:1111:8000::2 fd00:2021:1111:8000::3",
        );
        let (mut names, mut model) = (ClientNames::default(), Model::default());
        let mut most = 0;
        for step in 0..20_000 {
            let of = ["a.test", "b.test", "c.test", "d.test"][rng.random_range(0..4)];
            let by = rng.random_range(1..=2);
            let mut proxies: Vec<IpAddr> = pool.iter().copied().filter(|_| rng.random_ratio(1, 3)).collect();
            if proxies.is_empty() {
                proxies.push(pool[0]);
            }
            let v4 = ["failed", "late", "", "192.0.2.1", "192.0.2.1 192.0.2.2"][rng.random_range(0..5)];
            let v6 = ["failed", "late", "", "2001:db8::1"][rng.random_range(0..4)];
            let active = names.assign(&name(of), resource(by), &proxies, &resolved(v4, v6));

            // A name whose last proxy another took is unknown, as if it had never been assigned.
            let is_known = model.proxies.iter().any(|(_, name)| name == of);
            if !is_known {
                model.addresses.remove(of);
                model.resources.retain(|(name, _)| name != of);
            }
            let is_late = ["failed", "late"].contains(&v4)
                && ["failed", "late"].contains(&v6)
                && v4.len() + v6.len() < 12;
            assert_eq!(active, is_known || !is_late, "step {step}");
            if active {
                let known = model.addresses.entry(of.into()).or_default();
                for (said, is_family) in [(v4, IpAddr::is_ipv4 as fn(&IpAddr) -> bool), (v6, IpAddr::is_ipv6)]
                {
                    if !["failed", "late"].contains(&said) {
                        known.retain(|ip| !is_family(ip));
                        known.extend(ips::<IpAddr>(said));
                    }
                }
                model.resources.insert((of.into(), by));
                model.proxies.retain(|(proxy, name)| name != of && !proxies.contains(proxy));
                model.proxies.extend(proxies.iter().map(|proxy| (*proxy, of.to_owned())));
                model.proxies.sort();
            }

            let got = names.names();
            assert!(got.domains.is_sorted_by(|a, b| a.name < b.name), "step {step}");
            let mut all: Vec<(IpAddr, String)> = Vec::new();
            for domain in got.domains.iter() {
                let of = domain.name.as_str();
                all.extend(domain.proxies.iter().map(|(proxy, _)| (*proxy, of.to_owned())));
                assert!(domain.proxies.is_sorted() && domain.resources.is_sorted(), "step {step}");
                let resources: Vec<u128> = domain.resources.iter().map(|r| r.0.as_u128()).collect();
                let expect: Vec<u128> =
                    model.resources.iter().filter(|(name, _)| name == of).map(|(_, r)| *r).collect();
                assert_eq!(resources, expect, "step {step}, {of}");
                for (proxy, real) in &domain.proxies {
                    let family: Vec<_> =
                        model.addresses[of].iter().filter(|ip| ip.is_ipv4() == proxy.is_ipv4()).collect();
                    assert_eq!(real.is_none(), family.is_empty(), "step {step}, {of}, {proxy}");
                    assert!(real.is_none_or(|real| family.contains(&&real)), "step {step}, {of}, {proxy}");
                }
            }
            all.sort();
            assert_eq!(all, model.proxies, "step {step}");
            assert_eq!(names.owners.len(), all.len(), "step {step}");
            most = most.max(got.domains.len());
        }
        assert_eq!(most, 4, "all four names at once");
    }
}
