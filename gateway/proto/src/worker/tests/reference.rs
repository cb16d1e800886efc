//! A second, slow and obvious gateway beside the real one, for one client: lists searched from end to end, packets built
//! from scratch. Both see the same random walk of authorizations, names, time, and packets both ways; after each step
//! the verdict, the bytes and the reason must be the same.
//!
//! Here is the slow one. It shares types with the real one, and no rule.

mod walk;

use std::{collections::BTreeMap, net::IpAddr};

use super::{
    super::{
        icmp::Denial,
        nat::{
            Kind,
            packets::{Packet, Sum, error, header},
        },
        policy::Class,
    },
    *,
};
use crate::ResourceId;

/// Few, so that they run out.
const PORTS: std::ops::RangeInclusive<u16> = 40000..=40003;
const SESSIONS: usize = 20;
/// What the Internet resource reaches of the addresses that are played with.
const PUBLIC: [&str; 4] = ["198.51.100.80", "203.0.113.9", "2001:db8:80::1", "2001:db8:81::9"];

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fate {
    Passes(Vec<u8>),
    Denied(Denial, DropReason),
    Dropped(DropReason),
}
use Fate::{Denied, Dropped, Passes};

/// Kind, port or identifier, address.
type Side = (Kind, u16, IpAddr);

#[derive(Debug)]
struct Session {
    inside: Side,
    outside: Side,
    last: u64,
    last_outbound: u64,
    /// Its turn among those without an answer; `None` if there was one.
    waiting: Option<u64>,
    fins: [bool; 2],
    reset: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Name {
    resources: Vec<u128>,
    proxies: BTreeMap<IpAddr, Option<IpAddr>>,
}

/// The slow gateway. Times are seconds.
#[derive(Default)]
struct Reference {
    tunnel: [Option<IpAddr>; 2],
    resources: BTreeMap<u128, Resource>,
    names: BTreeMap<String, Name>,
    sessions: Vec<Session>,
    /// Until when.
    expired: BTreeMap<Side, u64>,
    turns: u64,
    now: u64,
}

impl Reference {
    fn is_client(&self, ip: IpAddr) -> bool {
        self.tunnel.contains(&Some(ip))
    }

    fn name_of(&self, proxy: IpAddr) -> Option<(&String, &Name)> {
        self.names.iter().find(|(_, name)| name.proxies.contains_key(&proxy))
    }

    /// Section 4.3: (permits, prefix, id) of all entries around `ip`.
    fn entries(&self, ip: IpAddr, class: Class) -> Vec<(bool, u8, ResourceId)> {
        let mut entries = Vec::new();
        for resource in self.resources.values() {
            match &resource.kind {
                ResourceKind::Cidr { network, filters, .. } if network.contains(&ip) => {
                    entries.push((permits(filters, class), network.prefix_len(), resource.id));
                }
                ResourceKind::Dns { filters, .. } => {
                    let belongs = self.name_of(ip).is_some_and(|(_, name)| {
                        name.resources.iter().any(|n| resource_id(*n) == resource.id)
                    });
                    if belongs {
                        entries.push((
                            permits(filters, class),
                            if ip.is_ipv4() { 32 } else { 128 },
                            resource.id,
                        ));
                    }
                }
                _ => {}
            }
        }
        entries
    }

    /// `Err` with what the client would be told.
    fn classify(&self, ip: IpAddr, class: Class) -> Result<(), (Denial, DropReason)> {
        let entries = self.entries(ip, class);
        let internet = self.resources.values().any(|r| matches!(r.kind, ResourceKind::Internet));
        if entries.iter().max().is_some_and(|(permits, ..)| *permits) {
            return Ok(());
        }
        if internet && !is_proxy(ip) {
            if PUBLIC.iter().any(|public| parse(public) == ip) {
                return Ok(());
            }
            if entries.is_empty() {
                return Err((Denial::Unreachable, DropReason::PrivateDestination));
            }
        }
        Err((Denial::Prohibited, DropReason::NotAllowed))
    }

    fn outbound(&mut self, sent: &Sent) -> Fate {
        let (src, dst, class) = match sent {
            Sent::Flow(p) => (p.src.ip(), p.dst.ip(), class(p.kind, p.dst.port())),
            Sent::Gre(src, dst) => (*src, *dst, Class::Other),
            Sent::Error(src, dst, _) => (*src, *dst, Class::Icmp),
        };
        if dst.is_multicast() {
            return Dropped(DropReason::Multicast);
        }
        if let Sent::Error(..) = sent {
            return Dropped(DropReason::OutboundIcmpError);
        }
        if !self.is_client(src) {
            return Denied(Denial::Prohibited, DropReason::ForeignSource);
        }
        if [OWN_V4, OWN_V6].map(parse).contains(&dst) {
            return match class {
                Class::Tcp(53535) | Class::Udp(53535) | Class::Icmp => Passes(sent.bytes()),
                _ => Denied(Denial::Prohibited, DropReason::OwnAddressPort),
            };
        }
        if is_tunnel(dst) {
            return Denied(Denial::Prohibited, DropReason::TunnelDestination);
        }
        if let Err((denial, reason)) = self.classify(dst, class) {
            return Denied(denial, reason);
        }
        if !is_proxy(dst) {
            return Passes(sent.bytes());
        }
        let Some(real) = self.name_of(dst).and_then(|(_, name)| name.proxies[&dst]) else {
            return Denied(Denial::Unreachable, DropReason::NoTranslation);
        };
        let Sent::Flow(packet) = sent else { return Dropped(DropReason::UnsupportedProtocol) };
        let Some((_, port, real)) = self.translate((packet.kind, packet.src.port(), dst), real, packet.flags)
        else {
            return Dropped(DropReason::NatExhausted);
        };
        let (mut src, mut dst) = (packet.src, packet.dst);
        src.set_port(port);
        dst.set_ip(real);
        Passes(completed(Packet { src, dst, ..*packet }).bytes())
    }

    fn translate(&mut self, inside: Side, real: IpAddr, flags: u8) -> Option<Side> {
        let now = self.now;
        let at = self.sessions.iter().position(|s| s.inside == inside);
        let at = at.or_else(|| self.open(inside, real))?;
        let session = &mut self.sessions[at];
        session.last = now;
        session.last_outbound = now;
        let flags = if inside.0 == Kind::Tcp { flags } else { 0 };
        if flags & RST != 0 {
            session.reset = session.reset.or(Some(now));
        } else if flags & (SYN | ACK) == SYN && (session.reset.is_some() || session.fins != [false; 2]) {
            session.reset = None;
            session.fins = [false; 2];
            if session.waiting.is_none() {
                self.turns += 1;
                session.waiting = Some(self.turns);
            }
        } else if flags & FIN != 0 {
            session.fins[0] = true;
        }
        Some(session.outside)
    }

    fn open(&mut self, inside: Side, real: IpAddr) -> Option<usize> {
        let (kind, wanted, _) = inside;
        let taken = |port: &u16| self.sessions.iter().any(|s| s.outside == (kind, *port, real));
        let same = (wanted == 0 || PORTS.contains(&wanted)).then_some(wanted);
        let after = PORTS.filter(|port| *port > wanted);
        let before = PORTS.filter(|port| *port < wanted);
        let port = same.into_iter().chain(after).chain(before).find(|port| !taken(port))?;
        if self.sessions.len() == SESSIONS {
            let waiting = self.sessions.iter().enumerate().filter(|(_, s)| s.waiting.is_some());
            let oldest = waiting.min_by_key(|(_, s)| s.waiting)?.0;
            self.end(oldest);
        }
        let outside = (kind, port, real);
        self.expired.remove(&outside);
        self.turns += 1;
        let (last, waiting) = (self.now, Some(self.turns));
        let fins = [false; 2];
        self.sessions.push(Session {
            inside,
            outside,
            last,
            last_outbound: last,
            waiting,
            fins,
            reset: None,
        });
        Some(self.sessions.len() - 1)
    }

    fn end(&mut self, at: usize) {
        let session = self.sessions.remove(at);
        self.expired.insert(session.outside, self.now + 900);
    }

    /// The inside of the session, if there is one.
    fn answered(&mut self, outside: Side, flags: u8) -> Result<Option<Side>, DropReason> {
        let now = self.now;
        let Some(session) = self.sessions.iter_mut().find(|s| s.outside == outside) else {
            let late = self.expired.get(&outside).is_some_and(|until| now < *until);
            return if late { Err(DropReason::NatExpired) } else { Ok(None) };
        };
        session.last = now;
        session.waiting = None;
        if outside.0 == Kind::Tcp && flags & RST != 0 {
            session.reset = session.reset.or(Some(now));
        } else if outside.0 == Kind::Tcp && flags & FIN != 0 {
            session.fins[1] = true;
        }
        Ok(Some(session.inside))
    }

    fn inbound(&mut self, received: &Received) -> Fate {
        self.try_inbound(received).unwrap_or_else(Dropped)
    }

    fn try_inbound(&mut self, received: &Received) -> Result<Fate, DropReason> {
        let (src, dst) = match received {
            Received::Flow(p) => (p.src.ip(), p.dst.ip()),
            Received::Error { from, to, .. } => (*from, *to),
        };
        if !is_tunnel(dst) {
            return Err(DropReason::NotAPeer);
        }
        if !self.is_client(dst) {
            return Err(DropReason::NoPeerState);
        }
        let ours = [OWN_V4, OWN_V6].map(parse).contains(&src);
        if is_tunnel(src) && !ours {
            return Err(DropReason::TunnelSource);
        }
        if is_proxy(src) {
            return Err(DropReason::InboundNotAllowed);
        }
        match received {
            Received::Flow(_) if ours => Ok(Passes(received.bytes())),
            Received::Flow(packet) => {
                let inside = self.answered((packet.kind, packet.dst.port(), src), packet.flags)?;
                let (mut from, mut to) = (packet.src, packet.dst);
                if let Some((_, port, proxy)) = inside {
                    from.set_ip(proxy);
                    to.set_port(port);
                }
                let permitted = self.classify(from.ip(), class(packet.kind, from.port()));
                permitted.map_err(|_| DropReason::InboundNotAllowed)?;
                let packet = Packet { src: from, dst: to, ..*packet };
                Ok(Passes(if inside.is_some() { completed(packet) } else { packet }.bytes()))
            }
            Received::Error { about, cut, head, .. } => {
                let its = (about.kind, about.src.port(), about.dst.ip());
                let inside = if about.src.ip() == dst { self.answered(its, 0)? } else { None };
                if let Some((_, port, proxy)) = inside {
                    let (its_bytes, mut about) = (about.bytes(), *about);
                    about.src.set_port(port);
                    about.dst.set_ip(proxy);
                    let mut embedded = about.bytes();
                    // Of a checksum that is cut in two, the half that is there stays.
                    let half = if dst.is_ipv4() { 24 } else { 48 } + 16;
                    if about.kind == Kind::Tcp && *cut == half + 1 {
                        embedded[half] = its_bytes[half];
                    }
                    return Ok(Passes(error(proxy, dst, 20, *head, &embedded[..*cut])));
                }
                if ours || self.is_client(about.src.ip()) {
                    Ok(Passes(received.bytes()))
                } else {
                    Err(DropReason::InboundNotAllowed)
                }
            }
        }
    }

    fn sweep(&mut self) {
        self.expired.retain(|_, until| self.now < *until);
        while let Some(at) = self.sessions.iter().position(|s| s.deadline() < self.now) {
            self.end(at);
        }
    }

    fn rename(&mut self, names: BTreeMap<String, Name>) {
        let owner = |this: &Self, proxy| this.name_of(proxy).map(|(name, _)| name.clone());
        let before: Vec<_> = self.sessions.iter().map(|s| owner(self, s.inside.2)).collect();
        self.names = names;
        for at in (0..before.len()).rev() {
            if owner(self, self.sessions[at].inside.2) != before[at] {
                self.end(at);
            }
        }
    }
}

impl Session {
    /// Section 5.3.
    fn deadline(&self) -> u64 {
        let idle = if self.inside.0 == Kind::Tcp { 7440 } else { 120 };
        let unanswered = self.waiting.map(|_| self.last_outbound + 60);
        let finished = (self.fins == [true; 2]).then_some(self.last + 5);
        [Some(self.last + idle), unanswered, finished, self.reset].into_iter().flatten().min().unwrap()
    }
}

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;

fn permits(filters: &[Filter], class: Class) -> bool {
    let one = |filter: &Filter| match (filter, class) {
        (Filter::Tcp { first, last }, Class::Tcp(port)) => *first <= port && port <= *last,
        (Filter::Udp { first, last }, Class::Udp(port)) => *first <= port && port <= *last,
        (Filter::Icmp, Class::Icmp) => true,
        _ => false,
    };
    filters.is_empty() || filters.iter().any(one)
}

fn class(kind: Kind, port: u16) -> Class {
    match kind {
        Kind::Tcp => Class::Tcp(port),
        Kind::Udp => Class::Udp(port),
        Kind::Echo => Class::Icmp,
    }
}

/// Over IPv6 a checksum is made where there was none.
fn completed(packet: Packet) -> Packet {
    let sum = if packet.src.is_ipv6() { Sum::Right } else { packet.sum };
    Packet { sum, ..packet }
}

fn parse(text: &str) -> IpAddr {
    text.parse().unwrap()
}

// Only of what the walk plays with.
fn is_proxy(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.octets()[..2] == [100, 96],
        IpAddr::V6(ip) => ip.segments()[..4] == [0xfd00, 0x2021, 0x1111, 0x8000],
    }
}

fn is_tunnel(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.octets()[..2] == [100, 64],
        IpAddr::V6(ip) => ip.segments()[..4] == [0xfd00, 0x2021, 0x1111, 0],
    }
}

/// What a client sends.
#[derive(Debug)]
enum Sent {
    Flow(Packet),
    Gre(IpAddr, IpAddr),
    Error(IpAddr, IpAddr, Packet),
}

impl Sent {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Flow(packet) => packet.bytes(),
            Self::Gre(src, dst) => [header(*src, *dst, 47, 4), b"1234".to_vec()].concat(),
            Self::Error(src, dst, about) => error(*src, *dst, 64, [3, 1, 0, 0, 0, 0], &about.bytes()),
        }
    }
}

/// What comes for a client.
#[derive(Debug)]
enum Received {
    Flow(Packet),
    Error {
        from: IpAddr,
        to: IpAddr,
        about: Packet,
        /// So much of it.
        cut: usize,
        head: [u8; 6],
    },
}

impl Received {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Flow(packet) => packet.bytes(),
            Self::Error { from, to, about, cut, head } => {
                let embedded = about.bytes();
                error(*from, *to, 63, *head, &embedded[..*cut])
            }
        }
    }
}
