//! The walk of both gateways. It goes below WireGuard, which has models of its own, so that a million steps take seconds.
//!
//! `GATEWAY_REFERENCE_STEPS` sets how many there are, `GATEWAY_REFERENCE_SEED` where the dice begin.

use std::{
    fmt::Debug,
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::SmallRng, seq::IndexedRandom};
use x25519_dalek::StaticSecret;

use super::{
    super::super::{
        handover::Stop,
        handshake::Gate,
        inbound, inner,
        nat::{Limits, Nat},
        outbound::{self, Own, Verdict},
        peer::Peer,
        peers::{Entry, Peers},
        slot::Slot,
    },
    *,
};
use crate::{
    ClientId,
    addr::TunnelAddrs,
    names::{Domain, DomainName, Names},
};

const CLIENTS: [[&str; 2]; 2] = [[C4, "100.64.2.99"], [C6, "fd00:2021:1111::2:99"]];
/// The last is never assigned.
const PROXIES: [[&str; 4]; 2] = [
    ["100.96.0.1", "100.96.0.2", "100.96.0.3", "100.96.0.200"],
    [
        "fd00:2021:1111:8000::1",
        "fd00:2021:1111:8000::2",
        "fd00:2021:1111:8000::3",
        "fd00:2021:1111:8000::200",
    ],
];
/// Names lead to all but the last.
const REALS: [[&str; 4]; 2] = [
    ["172.20.0.100", "10.7.0.1", "198.51.100.80", "203.0.113.9"],
    ["fd12:172::100", "fd12:7::1", "2001:db8:80::1", "2001:db8:81::9"],
];
const ELSEWHERE: [[&str; 3]; 2] =
    [["100.64.9.9", OWN_V4, "224.0.0.251"], ["fd00:2021:1111::9:9", OWN_V6, "ff02::1"]];

/// Outbound? Why not, and unreachable rather than prohibited? Translated?
type Summary = (bool, Option<(DropReason, bool)>, bool);

/// Both gateways.
struct Pair {
    random: SmallRng,
    reference: Reference,
    peers: Peers,
    slot: Slot,
    gate: Gate,
    own: Own,
    start: Instant,
    /// As control has them: what does not change stays the same.
    resources: Arc<[Resource]>,
    domains: BTreeMap<String, Arc<Domain>>,
    fates: BTreeMap<Summary, u64>,
}

impl Pair {
    fn new(seed: u64) -> Self {
        #[expect(clippy::disallowed_methods, reason = "a test needs some instant to count from")]
        let start = Instant::now();
        let gate = Gate::new(StaticSecret::from([7; 32]), 1, 1);
        let tunnel = TunnelAddrs { v4: C4.parse().unwrap(), v6: C6.parse().unwrap() };
        let state = ClientState::new(tunnel, Connection::Absent, [].into());
        let id = ClientId(uuid::Uuid::from_u128(1));
        let mut peer = Peer::new(id, 0, &state, &gate, seed);
        let limits = Limits { sessions: SESSIONS, ports: PORTS, ..Limits::default() };
        peer.nat = Some(Box::new(Nat::new(seed, limits, start)));
        let mut peers = Peers::default();
        let (slot, _) = peers.put(Entry::Here(Box::new(peer)));
        let own = TunnelAddrs { v4: OWN_V4.parse().unwrap(), v6: OWN_V6.parse().unwrap() };
        let mut pair = Self {
            random: SmallRng::seed_from_u64(seed),
            reference: Reference { tunnel: [Some(parse(C4)), Some(parse(C6))], ..Reference::default() },
            peers,
            slot,
            gate,
            own: Own { addrs: Some(own), allow_all: false },
            start,
            resources: Arc::default(),
            domains: BTreeMap::new(),
            fates: BTreeMap::new(),
        };
        (0..20).for_each(|_| pair.change());
        pair
    }

    /// The table's seconds begin between ours: which of two events of one second is first is not in question.
    fn instant(&self) -> Instant {
        self.start + Duration::from_millis(500) + Duration::from_secs(self.reference.now)
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        *from.choose(&mut self.random).unwrap()
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.random.random_range(0..n) == 0
    }

    // What control says.

    fn filters(&mut self) -> Vec<Filter> {
        let lists: [&[Filter]; 5] = [
            &[],
            &[],
            &[Filter::Tcp { first: 80, last: 443 }, Filter::Icmp],
            &[Filter::Tcp { first: 22, last: 22 }, Filter::Udp { first: 53, last: 80 }],
            &[Filter::Icmp, Filter::Udp { first: 80, last: 53 }],
        ];
        self.pick(&lists).to_vec()
    }

    /// A resource is authorised, has other filters, is revoked or expired.
    fn authorise(&mut self) {
        let n = self.random.random_range(1..=9_u128);
        if self.one_in(4) {
            self.reference.resources.remove(&n);
            self.resources = self.reference.resources.values().cloned().collect();
            return;
        }
        let filters = self.filters();
        let name = || String::new();
        let kind = match n {
            1..=4 => ResourceKind::Dns { name: name(), pattern: "**".to_owned(), filters },
            9 => ResourceKind::Internet,
            _ => {
                let networks = ["10.0.0.0/8", "172.20.0.0/16", "100.96.0.2/32", "fd12:7::/32"];
                let network = networks[usize::try_from(n - 5).unwrap()].parse().unwrap();
                ResourceKind::Cidr { name: name(), network, filters }
            }
        };
        self.reference.resources.insert(n, Resource { id: resource_id(n), kind });
        self.resources = self.reference.resources.values().cloned().collect();
    }

    /// A name is assigned anew, has other addresses, or is forgotten.
    fn name(&mut self, names: &mut BTreeMap<String, Name>) {
        let key = format!("n{}.x", self.random.random_range(0..4));
        match self.random.random_range(0..10) {
            0 => _ = names.remove(&key),
            1..=5 => {
                if let Some(name) = names.get_mut(&key) {
                    self.resolve(name);
                }
            }
            _ => {
                let mut proxies = BTreeMap::new();
                for family in PROXIES {
                    for proxy in &family[..3] {
                        if self.one_in(2) {
                            proxies.insert(parse(proxy), None);
                        }
                    }
                }
                for other in names.values_mut() {
                    other.proxies.retain(|proxy, _| !proxies.contains_key(proxy));
                }
                let resources = (1..=4).filter(|_| self.one_in(2)).collect();
                let mut name = Name { resources, proxies };
                self.resolve(&mut name);
                names.insert(key, name);
            }
        }
    }

    fn resolve(&mut self, name: &mut Name) {
        let found = [0, 1].map(|family| (!self.one_in(6)).then(|| self.pick(&REALS[family][..3])));
        for (proxy, real) in &mut name.proxies {
            *real = found[usize::from(proxy.is_ipv6())].map(parse);
        }
    }

    /// Something changes, and the worker hears of it: of several changes at once, as commands coalesce.
    fn change(&mut self) {
        let mut names = self.reference.names.clone();
        for _ in 0..self.random.random_range(1..3) {
            if self.one_in(2) { self.authorise() } else { self.name(&mut names) }
        }
        if self.one_in(100) {
            self.reference.tunnel[0] = Some(parse(self.pick(&CLIENTS[0])));
        }
        self.reference.rename(names);
        let Some(IpAddr::V4(v4)) = self.reference.tunnel[0] else { panic!("IPv4") };
        let mut domains = BTreeMap::new();
        for (key, name) in &self.reference.names {
            let domain = Domain {
                name: DomainName::parse(key).unwrap(),
                resources: name.resources.iter().map(|n| resource_id(*n)).collect(),
                proxies: name.proxies.iter().map(|(proxy, real)| (*proxy, *real)).collect(),
            };
            let kept = self.domains.get(key).filter(|kept| ***kept == domain).cloned();
            domains.insert(key.clone(), kept.unwrap_or_else(|| Arc::new(domain)));
        }
        self.domains = domains;
        let names = Names { domains: self.domains.values().cloned().collect(), ..Names::default() };
        let tunnel = TunnelAddrs { v4, v6: C6.parse().unwrap() };
        let state = ClientState {
            names: Arc::new(names),
            ..ClientState::new(tunnel, Connection::Absent, Arc::clone(&self.resources))
        };
        let now = self.instant();
        let moved = self.peers.get_mut(self.slot).unwrap().tunnel != tunnel;
        if moved {
            self.reference.sessions.clear();
            self.reference.expired.clear();
        }
        let apply = |entry: &mut Entry| match entry {
            Entry::Here(peer) => _ = peer.apply(&state, &self.gate, now),
            Entry::There(_) => panic!("it is here"),
        };
        self.peers.update(self.slot, apply).unwrap();
    }

    fn wait(&mut self) {
        let seconds = self.pick(&[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4, 5, 6, 20, 59, 61, 121, 400]);
        self.reference.now += if self.one_in(200) { 7441 } else { seconds };
        self.reference.sweep();
        let now = self.instant();
        let peer = self.peers.get_mut(self.slot).unwrap();
        while peer.end_sessions(now) {}
    }

    // Packets.

    fn flags(&mut self) -> u8 {
        self.pick(&[ACK, ACK, ACK, ACK, SYN, SYN | ACK, FIN | ACK, FIN | ACK, RST, RST | ACK])
    }

    fn flow(&mut self, kind: Kind, src: (IpAddr, u16), dst: (IpAddr, u16), outbound: bool) -> Packet {
        let sum = if self.one_in(4) { Sum::None } else { Sum::Right };
        let (flags, payload) = (self.flags(), self.random.random());
        Packet { flags, payload, sum, outbound, ..Packet::new(kind, src, dst) }
    }

    fn service(&mut self) -> u16 {
        self.pick(&[22, 53, 80, 443, 444, 53535])
    }

    fn sends(&mut self) -> Sent {
        let family = usize::from(self.one_in(2));
        let me = self.reference.tunnel[family].unwrap();
        let src = if self.one_in(30) { parse(self.pick(&CLIENTS[family])) } else { me };
        let dst = match self.random.random_range(0..20) {
            0 => self.pick(&ELSEWHERE[family]),
            1 => PROXIES[family][3],
            2..5 => self.pick(&REALS[family]),
            _ => self.pick(&PROXIES[family][..3]),
        };
        let dst = parse(dst);
        let kind = self.pick(&Kind::ALL);
        let port = self.pick(&[40000, 40000, 40001, 40002, 40003, 40004, 5, 0, 65535]);
        let service = self.service();
        match self.random.random_range(0..50) {
            0 => Sent::Gre(src, dst),
            1 => {
                let about = self.flow(kind, (dst, 80), (src, 40000), false);
                // Only an echo request may be embedded.
                let kind = if kind == Kind::Echo { Kind::Udp } else { kind };
                Sent::Error(src, dst, Packet { kind, ..about })
            }
            _ => Sent::Flow(self.flow(kind, (src, port), (dst, service), true)),
        }
    }

    /// One that a session has, or had, or any.
    fn outside(&mut self, family: usize) -> Side {
        let of_family = |side: &&Side| usize::from(side.2.is_ipv6()) == family;
        let open: Vec<Side> = self.reference.sessions.iter().map(|s| s.outside).collect();
        let open: Vec<Side> = open.iter().filter(of_family).copied().collect();
        let late: Vec<Side> = self.reference.expired.keys().filter(of_family).copied().collect();
        match self.random.random_range(0..10) {
            0..7 if !open.is_empty() => self.pick(&open),
            7 if !late.is_empty() => self.pick(&late),
            _ => {
                let ip = match self.random.random_range(0..20) {
                    0 => self.pick(&ELSEWHERE[family][..2]),
                    1 => self.pick(&PROXIES[family]),
                    _ => self.pick(&REALS[family]),
                };
                (self.pick(&Kind::ALL), self.random.random_range(39999..40005), parse(ip))
            }
        }
    }

    fn receives(&mut self) -> Received {
        let family = usize::from(self.one_in(2));
        let me = self.reference.tunnel[family].unwrap();
        let to = match self.random.random_range(0..40) {
            0 => parse(self.pick(&CLIENTS[family])),
            1 => parse(REALS[family][0]),
            _ => me,
        };
        let (kind, port, ip) = self.outside(family);
        let service = self.service();
        if !self.one_in(5) {
            return Received::Flow(self.flow(kind, (ip, service), (to, port), false));
        }
        let sender = if self.one_in(8) { parse(self.pick(&CLIENTS[family])) } else { to };
        let about = self.flow(kind, (sender, port), (ip, service), true);
        let from = match self.random.random_range(0..4) {
            0 => ip,
            1 => parse([OWN_V4, OWN_V6][family]),
            _ => parse(["192.0.2.77", "2001:db8:77::1"][family]),
        };
        let heads: [&[[u8; 6]]; 2] = [
            &[[3, 1, 0, 0, 0, 0], [3, 4, 0, 0, 4, 0], [11, 0, 0, 0, 0, 0]],
            &[[1, 0, 0, 0, 0, 0], [2, 0, 0, 0, 4, 0x60], [3, 0, 0, 0, 0, 0]],
        ];
        let head = self.pick(heads[family]);
        let whole = about.bytes().len();
        // The header, which is 24 or 48 long, and 8 bytes; or any more.
        let least = [32, 56][family];
        let cut = if self.one_in(2) { least.min(whole) } else { self.random.random_range(least..=whole) };
        Received::Error { from, to, about, cut, head }
    }

    fn step(&mut self, step: u64) {
        let now = self.instant();
        let dice = self.random.random_range(0..100);
        let outbound = dice < 55;
        let (what, before, expect, fate): (Box<dyn Debug>, _, _, _) = match dice {
            0..2 => return self.change(),
            2..6 => return self.wait(),
            _ if outbound => {
                let sent = self.sends();
                let expect = self.reference.outbound(&sent);
                let mut packet = sent.bytes();
                let before = packet.clone();
                let peer = self.peers.get_mut(self.slot).unwrap();
                let fate = match outbound::decide(peer, &packet, self.own) {
                    Verdict::ToTun(..) => Passes(packet),
                    Verdict::Translate(real, _, mut inner) => {
                        match peer.translate(&mut packet, &mut inner, real, now) {
                            Ok(()) => {
                                assert_eq!(inner::view(&packet), Ok(inner), "step {step}: {sent:?}");
                                Passes(packet)
                            }
                            Err(reason) => Dropped(reason),
                        }
                    }
                    Verdict::Drop(reason) => Dropped(reason),
                    Verdict::Deny(denial, reason, _) => Denied(denial, reason),
                    Verdict::Control(control) => panic!("{control:?}"),
                };
                (Box::new(sent), before, expect, fate)
            }
            _ => {
                let received = self.receives();
                let expect = self.reference.inbound(&received);
                let mut packet = received.bytes();
                let before = packet.clone();
                let fate = match inbound::decide(&mut self.peers, &mut packet, self.own, now) {
                    Ok(_) => Passes(packet),
                    Err(Stop::Drop(reason)) => Dropped(reason),
                    Err(Stop::Pass(worker)) => panic!("passed to {worker:?}"),
                };
                (Box::new(received), before, expect, fate)
            }
        };
        assert_eq!(fate, expect, "step {step}: {what:?}\n{:?}", self.reference.sessions);
        let (reason, translated) = match fate {
            Passes(packet) => (None, packet != before),
            Denied(denial, reason) => (Some((reason, denial == Denial::Unreachable)), false),
            Dropped(reason) => (Some((reason, false)), false),
        };
        *self.fates.entry((outbound, reason, translated)).or_default() += 1;
        let nat = self.peers.get_mut(self.slot).unwrap().nat.as_ref().unwrap();
        let (sessions, expired) = (self.reference.sessions.len(), self.reference.expired.len());
        assert_eq!((nat.sessions(), nat.expired()), (sessions, expired), "step {step}: {what:?}");
    }
}

/// One of four walks, which run beside each other.
fn walk(quarter: u64) {
    let variable = |name, default: u64| std::env::var(name).map_or(default, |n| n.parse().expect("a number"));
    let steps = variable("GATEWAY_REFERENCE_STEPS", 1_000_000) / 4;
    let mut pair = Pair::new(variable("GATEWAY_REFERENCE_SEED", 1) * 4 + quarter);
    (0..steps).for_each(|step| pair.step(step));
    pair.fates.iter().for_each(|fate| println!("{fate:?}"));
    if steps >= 100_000 {
        assert!(pair.fates.len() >= 19, "every verdict: {:#?}", pair.fates);
        assert!(pair.fates.values().all(|times| *times > 20), "each of them often: {:#?}", pair.fates);
    }
}

#[test]
fn both_gateways_agree_first_quarter() {
    walk(0);
}

#[test]
fn both_gateways_agree_second_quarter() {
    walk(1);
}

#[test]
fn both_gateways_agree_third_quarter() {
    walk(2);
}

#[test]
fn both_gateways_agree_fourth_quarter() {
    walk(3);
}
