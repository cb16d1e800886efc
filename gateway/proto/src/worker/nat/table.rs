//! The sessions of one client: who is found by which key, who ends when, and who makes room (packets.md sections 5.2
//! and 5.3). Knows keys, ports and TCP flags; no packet.

use std::{
    collections::HashMap,
    net::IpAddr,
    ops::RangeInclusive,
    time::{Duration, Instant},
};

use super::{
    expired::Expired,
    expiry::{Slot, Wheel},
    fifo::Fifo,
    key::{Inside, Kind, Outside, Remote, Secret},
    ports::Ports,
};

/// "idle TCP: last packet (either direction) + 2 h 4 min" (RFC 5382 REQ-5).
const IDLE_TCP: Duration = Duration::from_secs(2 * 60 * 60 + 4 * 60);
/// "idle UDP / ICMP: + 120 s".
const IDLE: Duration = Duration::from_secs(120);
/// "no inbound packet ever seen: last outbound + 60 s".
const UNCONFIRMED: Duration = Duration::from_secs(60);
/// "FIN seen in both directions: last packet + 5 s".
const FINISHED: Duration = Duration::from_secs(5);

/// How many sessions are looked at in one go: a client whose sessions all end in one second does not stop the others'
/// packets for more than a fraction of a millisecond.
const AT_ONCE: usize = 256;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// What one client's table may hold.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Sessions of all kinds together. When a new one has no place, the session that has waited longest for its first
    /// answer ends for it; if all have been answered, the new one is refused.
    pub sessions: usize,
    /// Keys of ended sessions that are remembered; beyond that the oldest is forgotten.
    pub expired: usize,
    /// The ports and echo identifiers that are given out towards each address and for each kind.
    pub ports: RangeInclusive<u16>,
}

impl Default for Limits {
    /// Sessions: what upstream gives for a single kind and address (packets.md section 13). A session takes about 300
    /// bytes, so that one client holds 20 MB at most; a table that has emptied gives its memory back.
    fn default() -> Self {
        Self { sessions: 65_536, expired: 8192, ports: 1..=u16::MAX }
    }
}

/// Why there is no new session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Every port towards this address is taken for this kind.
    Exhausted,
    /// The table is full, of sessions that have all been answered.
    Full,
}

/// Which way a packet goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Client to resource.
    Outbound,
    /// Resource to client.
    Inbound,
}

/// The sessions.
pub struct Table {
    limits: Limits,
    secret: Secret,
    by_inside: HashMap<Inside, Slot, Secret>,
    by_outside: HashMap<Outside, Slot, Secret>,
    sessions: Vec<Session>,
    /// Places in `sessions` without one.
    free: Vec<Slot>,
    ports: HashMap<Remote, Ports, Secret>,
    /// Sessions without an answer, the oldest first.
    unconfirmed: Fifo,
    expired: Expired,
    wheel: Wheel,
    /// What came up and has not been looked at.
    due: Vec<Slot>,
}

struct Session {
    inside: Inside,
    outside: Outside,
    /// The last packet of either direction.
    last: Instant,
    last_outbound: Instant,
    /// Has there been an inbound packet?
    confirmed: bool,
    /// A FIN from the client, from the resource.
    fins: [bool; 2],
    /// The first RST.
    reset: Option<Instant>,
}

impl Session {
    fn deadline(&self) -> Instant {
        let mut deadline = self.last
            + match self.inside.kind() {
                Kind::Tcp => IDLE_TCP,
                Kind::Udp | Kind::Echo => IDLE,
            };
        if !self.confirmed {
            deadline = deadline.min(self.last_outbound + UNCONFIRMED);
        }
        if self.fins == [true; 2] {
            deadline = deadline.min(self.last + FINISHED);
        }
        // "RST seen in either direction: at the next tick"
        self.reset.map_or(deadline, |at| deadline.min(at))
    }
}

impl Table {
    /// An empty table.
    pub fn new(seed: u64, limits: Limits, now: Instant) -> Self {
        let secret = Secret::new(seed);
        let expired = Expired::new(limits.expired, secret.clone());
        Self::with(secret, limits, expired, Wheel::new(now))
    }

    fn with(secret: Secret, limits: Limits, expired: Expired, wheel: Wheel) -> Self {
        Self {
            by_inside: HashMap::with_hasher(secret.clone()),
            by_outside: HashMap::with_hasher(secret.clone()),
            sessions: Vec::new(),
            free: Vec::new(),
            ports: HashMap::with_hasher(secret.clone()),
            unconfirmed: Fifo::new(),
            expired,
            wheel,
            due: Vec::new(),
            limits,
            secret,
        }
    }

    /// How many sessions there are.
    pub fn len(&self) -> usize {
        self.by_inside.len()
    }

    /// How many keys of ended sessions are remembered.
    pub fn expired_len(&self) -> usize {
        self.expired.len()
    }

    /// The session of a client's packet.
    #[inline]
    pub fn find_inside(&self, inside: &Inside) -> Option<Slot> {
        self.by_inside.get(inside).copied()
    }

    /// The session of a resource's packet.
    #[inline]
    pub fn find_outside(&self, outside: &Outside) -> Option<Slot> {
        self.by_outside.get(outside).copied()
    }

    /// Did the session with this key end a short while ago?
    pub fn is_expired(&self, outside: &Outside, now: Instant) -> bool {
        self.expired.contains(outside, now)
    }

    /// What the client calls the session.
    #[inline]
    pub fn inside(&self, slot: Slot) -> Inside {
        self.sessions[slot as usize].inside
    }

    /// What the resource calls the session.
    #[inline]
    pub fn outside(&self, slot: Slot) -> Outside {
        self.sessions[slot as usize].outside
    }

    /// Makes a session for a key that has none, the outside port as near after `wanted`'s as there is one free.
    pub fn open(&mut self, inside: Inside, wanted: Outside, now: Instant) -> Result<Slot, Refused> {
        let remote = wanted.remote();
        let ports = self.ports.entry(remote).or_insert_with(Ports::new);
        // Never the first of its remote: no empty entry is left behind.
        let port = ports.take(wanted.port(), &self.limits.ports).ok_or(Refused::Exhausted)?;
        if self.len() >= self.limits.sessions {
            match self.unconfirmed.first() {
                Some(oldest) => self.end(oldest, now),
                None => {
                    self.give(remote, port);
                    return Err(Refused::Full);
                }
            }
        }
        let outside = wanted.with_port(port);
        let session = Session {
            inside,
            outside,
            last: now,
            last_outbound: now,
            confirmed: false,
            fins: [false; 2],
            reset: None,
        };
        let deadline = session.deadline();
        let slot = match self.free.pop() {
            Some(slot) => {
                self.sessions[slot as usize] = session;
                slot
            }
            None => {
                self.sessions.push(session);
                Slot::try_from(self.sessions.len() - 1).expect("memory ends before slots do")
            }
        };
        self.by_inside.insert(inside, slot);
        self.by_outside.insert(outside, slot);
        self.expired.remove(&outside);
        self.unconfirmed.push(slot);
        self.wheel.schedule(slot, deadline);
        Ok(slot)
    }

    /// A packet of the session passes; `flags` are its TCP flags, or 0.
    #[inline]
    pub fn on_packet(&mut self, slot: Slot, direction: Direction, flags: u8, now: Instant) {
        let session = &mut self.sessions[slot as usize];
        session.last = now;
        match direction {
            Direction::Outbound => session.last_outbound = now,
            Direction::Inbound if !session.confirmed => {
                session.confirmed = true;
                self.unconfirmed.remove(slot);
            }
            Direction::Inbound => {}
        }
        if flags & (FIN | SYN | RST) != 0 {
            self.on_flags(slot, direction, flags, now);
        }
    }

    #[cold]
    fn on_flags(&mut self, slot: Slot, direction: Direction, flags: u8, now: Instant) {
        let session = &mut self.sessions[slot as usize];
        let closing = session.reset.is_some() || session.fins != [false; 2];
        if flags & RST != 0 {
            session.reset.get_or_insert(now);
        } else if direction == Direction::Outbound && flags & (SYN | ACK) == SYN && closing {
            // A new connection from the port of one that is ending. Upstream's ends with the old one.
            session.reset = None;
            session.fins = [false; 2];
            if session.confirmed {
                session.confirmed = false;
                self.unconfirmed.push(slot);
            }
        } else if flags & FIN != 0 {
            session.fins[usize::from(direction == Direction::Inbound)] = true;
        }
        let deadline = session.deadline();
        self.wheel.hasten(slot, deadline);
    }

    /// Ends the sessions whose time is up, to the second; [`AT_ONCE`] of them, the rest at the next calls.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.due.is_empty() {
            self.wheel.turn(now, &mut self.due);
        }
        let rest = self.due.len().saturating_sub(AT_ONCE);
        while self.due.len() > rest
            && let Some(slot) = self.due.pop()
        {
            let session = &self.sessions[slot as usize];
            // It may have made room since it came up.
            if self.by_inside.get(&session.inside) != Some(&slot) {
                continue;
            }
            let deadline = session.deadline();
            if self.wheel.is_past(deadline) {
                self.end(slot, now);
            } else {
                self.wheel.schedule(slot, deadline);
            }
        }
        self.expired.handle_timeout(now);
        if self.by_inside.is_empty() && self.sessions.capacity() > 256 {
            self.release();
        }
    }

    /// When [`Table::handle_timeout`] has something to do next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if !self.due.is_empty() {
            return Some(self.wheel.present());
        }
        self.wheel.poll_timeout().into_iter().chain(self.expired.poll_timeout()).min()
    }

    /// Ends the sessions of some proxy addresses, ascending.
    pub fn forget(&mut self, proxies: &[IpAddr], now: Instant) {
        let of_these = |inside: &Inside| proxies.binary_search(&inside.proxy()).is_ok();
        let slots: Vec<Slot> =
            self.by_inside.iter().filter(|(inside, _)| of_these(inside)).map(|(_, slot)| *slot).collect();
        for slot in slots {
            self.end(slot, now);
        }
    }

    /// Forgets everything, ended sessions too.
    pub fn clear(&mut self) {
        self.expired.clear();
        self.release();
    }

    fn end(&mut self, slot: Slot, now: Instant) {
        let session = &self.sessions[slot as usize];
        let (inside, outside) = (session.inside, session.outside);
        if !session.confirmed {
            self.unconfirmed.remove(slot);
        }
        self.wheel.remove(slot);
        self.by_inside.remove(&inside);
        self.by_outside.remove(&outside);
        self.give(outside.remote(), outside.port());
        self.expired.insert(outside, now);
        self.free.push(slot);
    }

    fn give(&mut self, remote: Remote, port: u16) {
        if self.ports.get_mut(&remote).is_some_and(|ports| ports.give(port)) {
            self.ports.remove(&remote);
        }
    }

    /// Ends all sessions without a trace and gives their memory back.
    fn release(&mut self) {
        let expired = std::mem::replace(&mut self.expired, Expired::new(0, self.secret.clone()));
        *self = Self::with(self.secret.clone(), self.limits.clone(), expired, self.wheel.emptied());
    }
}
