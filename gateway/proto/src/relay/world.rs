//! The tests' network: our [`Relays`], some twins, and wires with delay, loss and duplicates between them.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::SocketAddr,
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::StdRng};
use uuid::Uuid;

use super::{
    LocalCandidate, RelayEvent, Relays,
    twin::{Flavor, Packet, Twin, start},
};
use crate::{command::StunDatagram, ids::RelayId};

pub(super) const PEER: &str = "192.0.2.2:4000";

pub(super) fn id(n: u128) -> RelayId {
    RelayId(Uuid::from_u128(n))
}

pub(super) fn addr(text: &str) -> SocketAddr {
    text.parse().expect("a literal address")
}

pub(super) fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

pub(super) struct World {
    pub(super) now: Instant,
    pub(super) relays: Relays,
    pub(super) twins: Vec<Twin>,
    /// One way.
    pub(super) delay: Duration,
    /// Of 1000 packets.
    pub(super) loss: u32,
    /// Of 1000 packets.
    pub(super) duplicates: u32,
    /// Every event so far.
    pub(super) events: Vec<RelayEvent>,
    /// Every request so far: when, STUN type, bytes.
    pub(super) sent: Vec<(Duration, u16, Packet)>,
    /// What peers received.
    pub(super) delivered: Vec<Packet>,
    /// ChannelData we received: server, number, payload.
    pub(super) data: Vec<(SocketAddr, u16, Vec<u8>)>,
    wires: BTreeMap<(Instant, u64), Packet>,
    next: u64,
    rng: StdRng,
}

impl World {
    pub(super) fn new(twins: Vec<Twin>, seed: u64) -> Self {
        Self {
            now: start(),
            relays: Relays::new(seed),
            twins,
            delay: Duration::from_millis(10),
            loss: 0,
            duplicates: 0,
            events: Vec::new(),
            sent: Vec::new(),
            delivered: Vec::new(),
            data: Vec::new(),
            wires: BTreeMap::new(),
            next: 0,
            rng: StdRng::seed_from_u64(seed),
        }
    }

    /// One relay, IPv4, on `port`, known to us and given two seconds to come up.
    pub(super) fn with_one(flavor: Flavor, port: u16) -> Self {
        let twin = Twin::new(flavor, &[SocketAddr::new(addr("203.0.113.2:0").ip(), port)], 1);
        let mut world = Self::new(vec![twin], 1);
        world.connect(&[0]);
        world.run(secs(2));
        world
    }

    /// The portal lists these twins; twin n has id n.
    pub(super) fn connect(&mut self, twins: &[usize]) {
        let entries: Vec<_> = twins.iter().flat_map(|n| self.twins[*n].entries(id(*n as u128))).collect();
        self.relays.update(&[], &entries, self.now);
        self.pump();
    }

    /// Lets time pass, one deadline or datagram after the other.
    pub(super) fn run(&mut self, time: Duration) {
        self.pump();
        let end = self.now + time;
        let mut steps = 0;
        loop {
            let wire = self.wires.keys().next().map(|(at, _)| *at);
            let timer = self.relays.poll_timeout();
            let Some(next) = wire.into_iter().chain(timer).min().filter(|next| *next <= end) else { break };
            self.now = self.now.max(next);
            steps += 1;
            assert!(steps < 200_000, "a busy loop");
            if timer.is_some_and(|at| at <= self.now) {
                self.relays.handle_timeout(self.now);
                assert!(self.relays.poll_timeout().is_none_or(|at| at > self.now), "a deadline in the past");
            } else if let Some(entry) = self.wires.first_entry() {
                let packet = entry.remove();
                self.arrive(&packet);
            }
            self.pump();
        }
        self.now = end;
    }

    /// A peer sends to `dst`.
    pub(super) fn send(&mut self, packet: Packet) {
        if self.rng.random_range(0..1000) < self.loss {
            return;
        }
        let copies = 1 + u32::from(self.rng.random_range(0..1000) < self.duplicates);
        for _ in 0..copies {
            let jitter = if self.duplicates + self.loss > 0 { self.rng.random_range(0..40) } else { 0 };
            let at = self.now + self.delay + Duration::from_millis(jitter);
            self.next += 1;
            self.wires.insert((at, self.next), packet.clone());
        }
    }

    fn arrive(&mut self, packet: &Packet) {
        if let Some(twin) = self.twins.iter_mut().find(|twin| twin.owns(packet.dst)) {
            for answer in twin.handle(packet, self.now) {
                self.send(answer);
            }
        } else if packet.dst == Self::local(packet.dst) {
            if let Some(data) = gateway_common::channel_data::parse(&packet.payload) {
                self.data.push((packet.src, data.number, data.payload.to_vec()));
            } else {
                self.receive(packet.src, &packet.payload);
            }
        } else {
            self.delivered.push(packet.clone());
        }
    }

    /// A STUN message reaches us.
    pub(super) fn receive(&mut self, from: SocketAddr, payload: &[u8]) -> bool {
        let datagram = StunDatagram {
            heard_by: crate::WorkerId::FIRST,
            local: Self::local(from),
            from,
            via: None,
            payload: payload.to_vec(),
        };
        let consumed = self.relays.handle_stun(&datagram, self.now);
        self.pump();
        consumed
    }

    /// Our address of the family.
    pub(super) fn local(like: SocketAddr) -> SocketAddr {
        if like.is_ipv4() { addr("198.51.100.2:52625") } else { addr("[2001:db8::2]:52625") }
    }

    pub(super) fn pump(&mut self) {
        while let Some(transmit) = self.relays.poll_transmit() {
            let packet =
                Packet { src: Self::local(transmit.dst), dst: transmit.dst, payload: transmit.payload };
            let kind = u16::from_be_bytes([packet.payload[0], packet.payload[1]]);
            self.sent.push((self.now - start(), kind, packet.clone()));
            self.send(packet);
        }
        while let Some(event) = self.relays.poll_event() {
            self.events.push(event);
        }
    }

    /// STUN types of our requests since the last call.
    pub(super) fn take_kinds(&mut self) -> Vec<u16> {
        std::mem::take(&mut self.sent).into_iter().map(|(_, kind, _)| kind).collect()
    }

    /// Times in ms and STUN types of our requests since the last call.
    pub(super) fn take_times(&mut self) -> Vec<(u128, u16)> {
        std::mem::take(&mut self.sent).into_iter().map(|(at, kind, _)| (at.as_millis(), kind)).collect()
    }

    pub(super) fn take_events(&mut self) -> Vec<RelayEvent> {
        std::mem::take(&mut self.events)
    }

    pub(super) fn allocated(&self) -> bool {
        !self.relays.relayed(id(0)).is_empty()
    }
}

/// Follows the events and objects to what control could not make sense of.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    candidates: HashSet<LocalCandidate>,
    channels: HashMap<(SocketAddr, u16), SocketAddr>,
    pub(super) none_left: usize,
}

impl Ledger {
    pub(super) fn follow(&mut self, events: &[RelayEvent]) {
        for event in events {
            match event {
                RelayEvent::Added(candidate @ LocalCandidate::Relayed { .. }, _) => {
                    assert!(self.candidates.insert(*candidate), "{candidate:?} was added twice");
                }
                RelayEvent::Added(..) | RelayEvent::Servers(_) => {}
                RelayEvent::Invalidated(candidate, _) => {
                    assert!(self.candidates.remove(candidate), "{candidate:?} was not there");
                }
                RelayEvent::Gone(gone) => {
                    let of_it = |c: &LocalCandidate| matches!(c, LocalCandidate::Relayed { relay, .. } if relay == gone);
                    assert!(!self.candidates.iter().any(of_it), "{gone} went without its candidates");
                }
                RelayEvent::ChannelOpened { server, number, peer, .. } => {
                    assert!(self.channels.values().all(|p| p != peer) || self.other_server(*server, *peer));
                    assert_eq!(
                        self.channels.insert((*server, *number), *peer),
                        None,
                        "{number:#x} opened twice"
                    );
                }
                RelayEvent::ChannelBound { server, number, peer, .. } => {
                    let open = self.channels.get(&(*server, *number));
                    assert_eq!(open, Some(peer), "{number:#x} was bound without being opened");
                }
                RelayEvent::ChannelGone { server, number, peer, .. } => {
                    assert_eq!(
                        self.channels.remove(&(*server, *number)),
                        Some(*peer),
                        "{number:#x} was not open"
                    );
                }
                RelayEvent::NoneLeft => self.none_left += 1,
            }
        }
    }

    fn other_server(&self, server: SocketAddr, peer: SocketAddr) -> bool {
        self.channels.iter().all(|((s, _), p)| *s != server || *p != peer)
    }
}
