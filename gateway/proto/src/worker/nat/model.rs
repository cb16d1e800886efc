//! The slow, obvious table that the real one is compared with over random steps: one map, full searches and sweeps.
//! Every packet is compared with one built from scratch.
//!
//! `NAT_MODEL_STEPS` sets how many steps each world takes, `NAT_MODEL_SEED` where the dice begin.

#![expect(clippy::disallowed_methods, reason = "a test needs some instant to count from")]

use std::{collections::BTreeMap, net::Ipv4Addr, net::Ipv6Addr, ops::RangeInclusive, time::Duration};

use super::{
    packets::{Packet, Sum, error},
    *,
};
use crate::worker::inner::view;

type Side = (Kind, u16, IpAddr);

/// Times are milliseconds.
#[derive(Debug, Clone)]
struct Session {
    outside: Side,
    last: u64,
    last_outbound: u64,
    /// Its turn among those without an answer; `None` if there was one.
    waiting: Option<u64>,
    fins: [bool; 2],
    reset: Option<u64>,
}

impl Session {
    fn deadline(&self) -> u64 {
        let idle = if self.outside.0 == Kind::Tcp { 7_440_000 } else { 120_000 };
        let mut all = vec![self.last + idle];
        if self.waiting.is_some() {
            all.push(self.last_outbound + 60_000);
        }
        if self.fins[0] && self.fins[1] {
            all.push(self.last + 5000);
        }
        all.extend(self.reset);
        all.into_iter().min().unwrap()
    }

    fn second(&self) -> u64 {
        self.deadline().div_ceil(1000)
    }
}

struct Model {
    sessions: BTreeMap<Side, Session>,
    /// Until when.
    expired: BTreeMap<Side, u64>,
    ports: RangeInclusive<u16>,
    limit: usize,
    turns: u64,
    /// The last second that was swept.
    swept: u64,
}

impl Model {
    fn outbound(&mut self, inside: Side, real: IpAddr, flags: u8, now: u64) -> Result<Side, NatRefusal> {
        if !self.sessions.contains_key(&inside) {
            let (kind, wanted, _) = inside;
            let taken = |port: u16| self.sessions.values().any(|s| s.outside == (kind, port, real));
            let after = self.ports.clone().filter(|port| *port > wanted);
            let before = self.ports.clone().filter(|port| *port < wanted);
            let port = Some(wanted)
                .filter(|port| *port == 0 || self.ports.contains(port))
                .into_iter()
                .chain(after)
                .chain(before)
                .find(|port| !taken(*port))
                .ok_or(NatRefusal::Exhausted)?;
            if self.sessions.len() == self.limit {
                let oldest =
                    self.sessions.iter().filter(|(_, s)| s.waiting.is_some()).min_by_key(|(_, s)| s.waiting);
                let oldest = *oldest.ok_or(NatRefusal::Full)?.0;
                self.end(oldest, now);
            }
            let outside = (kind, port, real);
            self.expired.remove(&outside);
            self.turns += 1;
            let waiting = Some(self.turns);
            let new =
                Session { outside, last: now, last_outbound: now, waiting, fins: [false; 2], reset: None };
            self.sessions.insert(inside, new);
        }
        let session = self.sessions.get_mut(&inside).unwrap();
        session.last = now;
        session.last_outbound = now;
        if flags & 4 != 0 {
            session.reset = session.reset.or(Some(now));
        } else if flags & 0x12 == 2 && (session.reset.is_some() || session.fins[0] || session.fins[1]) {
            session.reset = None;
            session.fins = [false; 2];
            if session.waiting.is_none() {
                self.turns += 1;
                session.waiting = Some(self.turns);
            }
        } else if flags & 1 != 0 {
            session.fins[0] = true;
        }
        Ok(session.outside)
    }

    /// The inside, or what it is otherwise.
    fn inbound(&mut self, outside: Side, flags: u8, now: u64) -> Result<Side, Inbound> {
        let Some((inside, session)) = self.sessions.iter_mut().find(|(_, s)| s.outside == outside) else {
            let late = self.expired.get(&outside).is_some_and(|until| now < *until);
            return Err(if late { Inbound::Expired } else { Inbound::Miss });
        };
        session.last = now;
        session.waiting = None;
        if flags & 4 != 0 {
            session.reset = session.reset.or(Some(now));
        } else if flags & 1 != 0 {
            session.fins[1] = true;
        }
        Ok(*inside)
    }

    fn sweep(&mut self, now: u64) {
        self.expired.retain(|_, until| now < *until);
        if now / 1000 > self.swept {
            self.swept = now / 1000;
            let over: Vec<_> = self.sessions.iter().filter(|(_, s)| s.second() <= self.swept).collect();
            let over: Vec<_> = over.into_iter().map(|(inside, _)| *inside).collect();
            over.into_iter().for_each(|inside| self.end(inside, now));
        }
    }

    fn end(&mut self, inside: Side, now: u64) {
        let session = self.sessions.remove(&inside).unwrap();
        self.expired.insert(session.outside, now + 900_000);
    }
}

struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[usize::try_from(self.roll(of.len() as u64)).unwrap()]
    }
}

fn address(v6: bool, v4: [u8; 4], v6_prefix: u128) -> IpAddr {
    if v6 {
        Ipv6Addr::from_bits(v6_prefix | u128::from(u32::from_be_bytes(v4))).into()
    } else {
        Ipv4Addr::from(v4).into()
    }
}

/// How often each outcome was met.
#[derive(Debug, Default)]
struct Seen {
    translated: u64,
    opened: u64,
    exhausted: u64,
    full: u64,
    back: u64,
    errors: u64,
    late: u64,
    miss: u64,
    ended: u64,
    cleared: u64,
}

struct World {
    nat: Nat,
    model: Model,
    dice: Dice,
    start: Instant,
    now: u64,
    seen: Seen,
}

impl World {
    fn new(seed: u64, limits: Limits) -> Self {
        let start = Instant::now();
        let model = Model {
            sessions: BTreeMap::new(),
            expired: BTreeMap::new(),
            ports: limits.ports.clone(),
            limit: limits.sessions,
            turns: 0,
            swept: 0,
        };
        Self {
            nat: Nat::new(seed, limits, start),
            model,
            dice: Dice(seed),
            start,
            now: 0,
            seen: Seen::default(),
        }
    }

    fn instant(&self) -> Instant {
        self.start + Duration::from_millis(self.now)
    }

    fn step(&mut self) {
        match self.dice.roll(100) {
            0..45 => self.outbound(),
            45..83 => self.inbound(),
            83..89 => self.inbound_error(),
            89..99 => self.pass_time(),
            _ if self.dice.roll(20) == 0 => {
                self.nat.clear();
                self.model.sessions.clear();
                self.model.expired.clear();
                self.seen.cleared += 1;
            }
            _ => {}
        }
        assert_eq!(self.nat.sessions(), self.model.sessions.len());
        let first = self.model.sessions.values().map(Session::second).min();
        let first = first.map(|second| self.start + Duration::from_secs(second.max(self.model.swept + 1)));
        assert!(self.nat.poll_timeout() <= first || first.is_none(), "wakes too late");
    }

    fn packet(&mut self, kind: Kind, src: (IpAddr, u16), dst: (IpAddr, u16), outbound: bool) -> Packet {
        let flags = self.dice.pick(&[0x10, 0x10, 0x10, 0x10, 0x02, 0x12, 0x11, 0x04, 0x14]);
        let payload = u16::try_from(self.dice.roll(65_536)).unwrap();
        let sum =
            if src.0.is_ipv4() { self.dice.pick(&[Sum::Right, Sum::Right, Sum::None]) } else { Sum::Right };
        Packet { flags, payload, sum, outbound, ..Packet::new(kind, src, dst) }
    }

    fn outbound(&mut self) {
        let v6 = self.dice.roll(2) == 1;
        let client = address(v6, [100, 64, 0, 2], 0xfd00_2021_1111 << 80);
        let n = u8::try_from(self.dice.roll(4)).unwrap();
        let proxy = address(v6, [100, 96, 0, n], 0xfd00_2021_1111_8000 << 64);
        // Two real addresses, exchanged from time to time.
        let turn = u8::try_from(self.now / 600_000 % 2).unwrap();
        let real = address(v6, [10, 0, 0, (n + turn) % 2], 0x2001_0db8 << 96);
        let kind = self.dice.pick(&Kind::ALL);
        let port = self.dice.pick(&[0, 999, 1000, 1001, 1002, 65_535]);
        let packet = self.packet(kind, (client, port), (proxy, 80), true);

        let new = !self.model.sessions.contains_key(&(kind, port, proxy));
        let flags = if kind == Kind::Tcp { packet.flags } else { 0 };
        let expect = self.model.outbound((kind, port, proxy), real, flags, self.now);
        let mut bytes = packet.bytes();
        let mut seen = view(&bytes).unwrap();
        let got = self.nat.outbound(&mut bytes, &mut seen, real, self.instant());
        assert_eq!(got.map(|outside| (outside.kind(), outside.port(), outside.real())), expect);
        let expect = match expect {
            Ok((_, port, real)) => {
                self.seen.translated += 1;
                self.seen.opened += u64::from(new);
                Packet { src: (client, port).into(), dst: (real, 80).into(), ..packet }
            }
            Err(refusal) => {
                self.seen.exhausted += u64::from(refusal == NatRefusal::Exhausted);
                self.seen.full += u64::from(refusal == NatRefusal::Full);
                packet
            }
        };
        assert_eq!(hex::encode(&bytes), hex::encode(expect.bytes()));
        assert_eq!(seen, view(&bytes).unwrap());
    }

    /// The outside of a session, of one that has ended, or of none.
    fn some_outside(&mut self) -> Side {
        let sessions = self.model.sessions.len() as u64;
        let expired = self.model.expired.len() as u64;
        let any = (self.dice.pick(&Kind::ALL), 1001, address(false, [10, 0, 0, 1], 0));
        let at = |n: u64| usize::try_from(n).unwrap();
        match self.dice.roll(10) {
            0..7 if sessions > 0 => {
                let n = self.dice.roll(sessions);
                self.model.sessions.values().nth(at(n)).unwrap().outside
            }
            7 | 8 if expired > 0 => {
                let n = self.dice.roll(expired);
                *self.model.expired.keys().nth(at(n)).unwrap()
            }
            _ => any,
        }
    }

    fn inbound(&mut self) {
        let outside = self.some_outside();
        let (kind, port, real) = outside;
        let client = address(real.is_ipv6(), [100, 64, 0, 2], 0xfd00_2021_1111 << 80);
        let packet = self.packet(kind, (real, 80), (client, port), false);
        let flags = if kind == Kind::Tcp { packet.flags } else { 0 };
        let expect = self.model.inbound(outside, flags, self.now);
        let mut bytes = packet.bytes();
        let mut seen = view(&bytes).unwrap();
        let got = self.nat.inbound(&mut bytes, &mut seen, self.instant());
        let expect = match expect {
            Ok((_, port, proxy)) => {
                self.seen.back += 1;
                assert_eq!(got, Inbound::Rewritten(Outside::new(kind, outside.1, real)));
                Packet { src: (proxy, 80).into(), dst: (client, port).into(), ..packet }
            }
            Err(other) => {
                self.seen.late += u64::from(other == Inbound::Expired);
                self.seen.miss += u64::from(other == Inbound::Miss);
                assert_eq!(got, other);
                packet
            }
        };
        assert_eq!(hex::encode(&bytes), hex::encode(expect.bytes()));
        assert_eq!(seen, view(&bytes).unwrap());
    }

    /// About a packet of a session, of one that has ended, or of none; cut anywhere behind the ports.
    fn inbound_error(&mut self) {
        let outside = self.some_outside();
        let (kind, port, real) = outside;
        let v6 = real.is_ipv6();
        let client = address(v6, [100, 64, 0, 2], 0xfd00_2021_1111 << 80);
        let router = address(v6, [10, 9, 9, 9], 0x2001_0db9 << 96);
        let left = self.packet(kind, (client, port), (real, 80), true);
        let ttl = u8::try_from(self.dice.roll(256)).unwrap();
        let whole = left.bytes();
        let least = if v6 { 48 + 8 } else { 24 + 8 };
        let mut cut = least + usize::try_from(self.dice.roll((whole.len() - least + 1) as u64)).unwrap();
        // Half a checksum (TCP's) cannot be repaired.
        cut += usize::from(cut == least + 9 && kind == Kind::Tcp);
        let head = if v6 { [3, 0, 0, 0, 0, 0] } else { [11, 0, 0, 0, 0, 0] };
        let arrives = error(router, client, ttl, head, &whole[..cut]);
        let expect = self.model.inbound(outside, 0, self.now);
        let mut bytes = arrives.clone();
        let mut seen = view(&bytes).unwrap();
        let got = self.nat.inbound_error(&mut bytes, &mut seen, self.instant());
        let expect = match expect {
            Ok((_, port, proxy)) => {
                self.seen.errors += 1;
                assert_eq!(got, Inbound::Rewritten(Outside::new(kind, outside.1, real)));
                let sent = Packet { src: (client, port).into(), dst: (proxy, 80).into(), ..left };
                error(proxy, client, 20, head, &sent.bytes()[..cut])
            }
            Err(other) => {
                assert_eq!(got, other);
                arrives
            }
        };
        assert_eq!(hex::encode(&bytes), hex::encode(expect));
        assert_eq!(seen, view(&bytes).unwrap());
    }

    fn pass_time(&mut self) {
        self.now += match self.dice.roll(200) {
            0 => self.dice.roll(8_000_000),
            1..4 => self.dice.roll(200_000),
            4..16 => self.dice.roll(30_000),
            16..60 => self.dice.roll(3000),
            // Whole seconds are where off-by-one errors live.
            60..100 => 1000 - self.now % 1000,
            _ => self.dice.roll(300),
        };
        if self.dice.roll(4) > 0 {
            let before = self.model.sessions.len();
            self.model.sweep(self.now);
            self.seen.ended += (before - self.model.sessions.len()) as u64;
            self.nat.handle_timeout(self.instant());
            assert_eq!(self.nat.expired(), self.model.expired.len());
            assert!(
                self.nat.poll_timeout().is_none_or(|next| next > self.instant() - Duration::from_secs(1))
            );
        }
    }
}

fn walk(name: &str, limits: Limits) -> Seen {
    let variable = |name, default| match std::env::var(name) {
        Ok(value) => value.parse().expect("a number"),
        Err(_) => default,
    };
    let steps = variable("NAT_MODEL_STEPS", 100_000);
    let seed = variable("NAT_MODEL_SEED", 1);
    let mut world = World::new(seed, limits);
    (0..steps).for_each(|_| world.step());
    println!("{name}, seed {seed}, {steps} steps: {:?}", world.seen);
    let Seen { translated, opened, back, errors, late, miss, ended, cleared, .. } = world.seen;
    let rare = [translated, opened, back, errors, late, miss, ended, cleared].into_iter().min().unwrap();
    assert!(rare >= steps / 5000, "every outcome is met: {:?}", world.seen);
    world.seen
}

#[test]
fn random_steps_with_all_ports_agree_with_the_model() {
    let seen = walk("all ports", Limits { expired: 1_000_000, ..Limits::default() });
    assert_eq!((seen.exhausted, seen.full), (0, 0));
}

#[test]
fn random_steps_with_few_ports_agree_with_the_model() {
    let seen = walk("few ports", Limits { expired: 1_000_000, ports: 1000..=1003, ..Limits::default() });
    assert!(seen.exhausted > 100, "{seen:?}");
}

#[test]
fn random_steps_with_few_sessions_agree_with_the_model() {
    let seen = walk("few sessions", Limits { sessions: 9, expired: 1_000_000, ..Limits::default() });
    assert!(seen.full > 100, "{seen:?}");
}
