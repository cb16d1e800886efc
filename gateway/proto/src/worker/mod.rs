//! The data plane's state: every client belongs to exactly one worker, which alone holds its WireGuard state,
//! policy and paths.
//!
//! This file is the spine: it calls the steps in the order packets meet them, and it alone knows them all. It must
//! not know a header layout, a WireGuard message or a rule.
//!
//! ```text
//! outbound   datagram -> demux -> wg (open) -> outbound (decide) -> nat -> ecn (merge) -> Sink: packet to the TUN
//!                          |  \                   \-> icmp (deny) -> send (seal) -> Sink: datagram
//!                          |   \-> handshake (admit) -> wg -> send (message)
//!                          \-> events: STUN to control
//! inbound    packet from the TUN -> inbound (nat, decide) -> send (seal: wg, ecn) -> Sink: datagram
//! time       wheel -> nat (end sessions), flows (close), wg (tick) -> send (message)
//! ```
//!
//! What a client sent and gets is counted at the end of its walk (`account.rs`), where that is wanted.
//!
//! A packet of another worker's client leaves its walk where that is found out, see `handover.rs`; how clients come and
//! go is in `moving.rs`, what they tell us in `hear.rs`.
//!
//! Every input is counted exactly once: in [`Counters`] if it was dropped, in [`Traffic`] if it was not.

mod account;
mod answers;
mod bucket;
mod control_packet;
mod demux;
mod ecn;
mod events;
pub mod flows;
mod handover;
mod handshake;
mod hear;
mod icmp;
mod inbound;
pub mod inner;
mod moving;
mod names;
pub mod nat;
mod outbound;
mod peer;
mod peers;
mod policy;
mod send;
mod slot;
#[cfg(test)]
mod testkit;
#[cfg(test)]
mod tests;
mod wg;
mod wheel;

use std::time::Instant;

use gateway_common::{
    Counters, DropReason, PayloadKind,
    classify::{self},
};
use x25519_dalek::StaticSecret;

pub use self::moving::Moved;
use self::{
    account::Passing,
    demux::{Arrival, Demux},
    events::Events,
    handover::{Origin, Stop, pass},
    handshake::{Admission, COOKIE_REPLY, Gate},
    moving::Gone,
    outbound::{Own, Verdict},
    peer::Peer,
    peers::Peers,
    slot::Slot,
    wg::{Act, HANDSHAKE_MAX},
    wheel::{CALM, Wheel},
};
use crate::{
    Command, ConnectionIndex, Datagram, Ecn, Passed, Route, Sink, WorkerEvent, WorkerId,
    addr::MAX_INNER,
    command::StunDatagram,
    flow::{Meeting, UnixTime},
};

/// What a worker is started with.
pub struct Config {
    /// The gateway's WireGuard key.
    pub private_key: StaticSecret,
    /// Let clients reach every port of the gateway's own tunnel address, not only DNS and ICMP echo.
    pub allow_own_ip: bool,
    /// Spreads timers and hash buckets.
    pub seed: u64,
    /// The present.
    pub now: Instant,
    /// Which of the workers it is.
    pub id: WorkerId,
    /// How many workers there are, at least one: they share the budgets that are for everybody.
    pub workers: usize,
}

/// What one worker did with all that it did not drop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Client to resource, arrived on our own address.
    pub outbound_direct: Volume,
    /// Client to resource, arrived through a channel of ours.
    pub outbound_relayed: Volume,
    /// Resource to client, sent from our own address.
    pub inbound_direct: Volume,
    /// Resource to client, sent through a channel of ours.
    pub inbound_relayed: Volume,
    /// Empty data messages received.
    pub keepalives: u64,
    /// Handshake messages (initiation, response, cookie reply) accepted.
    pub handshakes: u64,
    /// Control packets received inside tunnels (packets.md section 6).
    pub control: u64,
    /// STUN messages passed to control.
    pub stun: u64,
    /// ICMP denials sent. They answer packets that are counted as dropped.
    pub denials: u64,
    /// Answers about names sent. They answer control packets.
    pub answers: u64,
    /// Reports of flows (the backend adds those of denied packets) that control's queue had no room for. They are about
    /// packets that are counted elsewhere.
    pub flow_reports_lost: u64,
}

/// Inner packets passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Volume {
    /// How many.
    pub packets: u64,
    /// Their bytes, IP headers included.
    pub bytes: u64,
}

/// One worker.
pub struct Worker {
    id: WorkerId,
    workers: usize,
    gate: Gate,
    own: Own,
    demux: Demux,
    peers: Peers,
    gone: Gone,
    wheel: Wheel,
    /// The next new connection's place within a second of the wheel.
    spread: u64,
    events: Events,
    counters: Counters,
    traffic: Traffic,
    accounting: bool,
    clock: Option<Meeting>,
}

impl Worker {
    /// A worker without clients.
    #[must_use]
    pub fn new(config: Config) -> Self {
        Self {
            id: config.id,
            workers: config.workers,
            gate: Gate::new(config.private_key, config.seed, config.workers),
            own: Own { addrs: None, allow_all: config.allow_own_ip },
            demux: Demux::default(),
            peers: Peers::default(),
            gone: Gone::default(),
            wheel: Wheel::new(config.now),
            spread: config.seed,
            events: Events::new(),
            counters: Counters::default(),
            traffic: Traffic::default(),
            accounting: false,
            clock: None,
        }
    }

    /// Control says what is true now. Goodbyes, and handshake replies that waited for a path, go out by `sink`.
    pub fn handle_command(&mut self, command: Command, now: Instant, sink: &mut impl Sink) {
        match command {
            Command::OwnAddrs(addrs) => self.own.addrs = Some(addrs),
            Command::Client { id, home, desired } => self.place(id, home, desired, now, sink),
            Command::Relays(servers) => self.demux.set_relays(&servers),
            Command::Channel { server, number, peer } => self.demux.set_channel((server, number), peer),
            Command::Accounting { on } => self.set_accounting(on, now),
            Command::WallClock(clock) => self.set_clock(clock, now),
            Command::Inquire(inquiry) => self.answer(&inquiry, now),
            Command::Shutdown => {
                for peer in self.peers.drain() {
                    self.say_goodbye(peer, now, sink);
                }
            }
        }
    }

    /// A batch of received UDP payloads.
    pub fn handle_datagrams<'a>(
        &mut self,
        batch: impl IntoIterator<Item = Datagram<'a>>,
        now: Instant,
        sink: &mut impl Sink,
    ) {
        for datagram in batch {
            if let Err(stop) = self.handle_datagram(&datagram, Origin::OUTSIDE, now, sink) {
                self.stop(stop, 0, Passed::Datagram(datagram), sink);
            }
        }
    }

    /// A batch of IP packets from the TUN device, checksums complete.
    pub fn handle_packets<'a>(
        &mut self,
        batch: impl IntoIterator<Item = &'a mut [u8]>,
        now: Instant,
        sink: &mut impl Sink,
    ) {
        for packet in batch {
            if let Err(stop) = self.handle_packet(packet, now, sink) {
                self.stop(stop, 0, Passed::Packet(packet), sink);
            }
        }
    }

    /// The deadline of [`Worker::poll_timeout`] has passed.
    pub fn handle_timeout(&mut self, now: Instant, sink: &mut impl Sink) {
        while let Some(entries) = self.wheel.turn(now) {
            for (due, slot) in &entries {
                if self.peers.get_mut(*slot).is_some_and(|peer| peer.due == *due) {
                    self.run_timers(*slot, now, sink);
                }
            }
            self.wheel.turned(entries);
        }
        if self.events.holds_channels() && self.demux.poll_timeout().is_some_and(|at| at <= now) {
            self.demux.postpone_report(now);
        } else if let Some(used) = self.demux.report(now) {
            self.events.push(WorkerEvent::ChannelsUsed(used));
        }
    }

    /// What control must hear; `None` once the queue is empty.
    pub fn poll_event(&mut self) -> Option<WorkerEvent> {
        self.events.pop()
    }

    /// When [`Worker::handle_timeout`] wants to be called next; `None` while there is nothing to time.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        [self.wheel.poll_timeout(), self.demux.poll_timeout()].into_iter().flatten().min()
    }

    /// Packets dropped so far, by reason.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// For what the backend drops on its side.
    pub fn counters_mut(&mut self) -> &mut Counters {
        &mut self.counters
    }

    /// What was not dropped so far.
    #[must_use]
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Are flows to be counted?
    #[must_use]
    pub fn is_accounting(&self) -> bool {
        self.accounting
    }

    /// What the wall clock shows at `instant`; `None` until [`Command::WallClock`] has said.
    #[must_use]
    pub fn unix_time(&self, instant: Instant) -> Option<UnixTime> {
        self.clock.map(|clock| clock.unix_time(instant))
    }

    // Outbound: from the network.

    // One copy of the walk for all that enters it, so that everything below is inlined there.
    #[inline(never)]
    fn handle_datagram(
        &mut self,
        datagram: &Datagram<'_>,
        origin: Origin<'_>,
        now: Instant,
        sink: &mut impl Sink,
    ) -> Result<(), Stop> {
        let arrival = self.demux.unwrap(datagram, now)?;
        match arrival.kind {
            PayloadKind::Data => self.handle_data(&arrival, now, sink),
            PayloadKind::Stun => self.handle_stun(&arrival),
            PayloadKind::HandshakeInitiation => self.handle_initiation(&arrival, origin, now, sink),
            _ => self.handle_answer(&arrival, now, sink),
        }
    }

    #[inline]
    fn handle_data(&mut self, arrival: &Arrival<'_>, now: Instant, sink: &mut impl Sink) -> Result<(), Stop> {
        let slot = self.receiver(arrival)?;
        let peer = self.peers.holder(slot, DropReason::UnknownSession)?;
        let link = peer.link.as_deref_mut().ok_or(DropReason::UnknownSession)?;
        // Header 16; what remains is the packet and its tag.
        let room = arrival.payload.len().saturating_sub(16);
        if room > MAX_INNER + 16 {
            return Err(DropReason::OversizedInner.into());
        }
        let buffer = sink.reserve_packet(room).ok_or(DropReason::Backpressure)?;
        let opened = link.wg.open(arrival.payload, buffer, now)?;
        let index = link.index;
        if opened.established {
            self.events.push(WorkerEvent::Established { id: peer.id, index });
        }
        let packet = match opened.packet? {
            0 => {
                self.traffic.keepalives += 1;
                return Ok(());
            }
            len => &mut buffer[..len],
        };
        tell_activity(peer, index, &mut self.events, now);

        let passing = match outbound::decide(peer, packet, self.own) {
            Verdict::ToTun(by, view) => Passing { by, proxy: None, view },
            Verdict::Translate(real, by, mut view) => {
                let proxy = Some(view.dst);
                peer.translate(packet, &mut view, real, now)?;
                Passing { by: Some(by), proxy, view }
            }
            Verdict::Control(control) => return Ok(self.handle_control(slot, control, packet, now)?),
            Verdict::Drop(reason) => return Err(reason.into()),
            Verdict::Deny(denial, reason, inner) => {
                let mut reply = [0; MAX_INNER];
                let len = icmp::deny(denial, packet, &inner, &mut reply);
                self.tell_denied(slot, &inner, reason, now);
                self.deny(slot, &reply[..len], now, sink)?;
                return Err(reason.into());
            }
        };
        ecn::merge(arrival.datagram.ecn, packet);
        if peer.flows.is_some() {
            let out = account::told(&mut self.events, &mut self.traffic);
            account::outbound(peer, packet, &passing, arrival, self.clock, now, out);
        }
        let len = packet.len();
        peer.outbound.add(len);
        sink.commit_packet(len);
        let relayed = arrival.via().is_some();
        let volume =
            if relayed { &mut self.traffic.outbound_relayed } else { &mut self.traffic.outbound_direct };
        volume.add(len);
        Ok(())
    }

    /// What the client hears is best effort; that it hears no more is [`DropReason::IcmpBudget`].
    #[cold]
    fn deny(
        &mut self,
        slot: Slot,
        reply: &[u8],
        now: Instant,
        sink: &mut impl Sink,
    ) -> Result<(), DropReason> {
        let Some(peer) = self.peers.get_mut(slot) else { return Ok(()) };
        if !peer.take_icmp(now) {
            return Err(DropReason::IcmpBudget);
        }
        let Some(link) = peer.link.as_deref_mut() else { return Ok(()) };
        if send::seal(link, reply, &mut self.demux, now, sink).is_ok() {
            self.traffic.denials += 1;
        }
        Ok(())
    }

    fn handle_stun(&mut self, arrival: &Arrival<'_>) -> Result<(), Stop> {
        if !self.events.has_room_for_stun() {
            return Err(DropReason::ControlQueueFull.into());
        }
        self.events.push(WorkerEvent::Stun(StunDatagram {
            heard_by: self.id,
            local: arrival.datagram.local,
            from: arrival.from(),
            via: arrival.via().map(|(server, _)| server),
            payload: arrival.payload.to_vec(),
        }));
        self.traffic.stun += 1;
        Ok(())
    }

    fn handle_initiation(
        &mut self,
        arrival: &Arrival<'_>,
        origin: Origin<'_>,
        now: Instant,
        sink: &mut impl Sink,
    ) -> Result<(), Stop> {
        // The gate is asked once, where it arrives.
        let key = match origin.opened {
            Some(key) => *key,
            None => self.admit(arrival, now, sink)?,
        };
        let slot = self.peers.by_public_key(&key).ok_or(DropReason::UnknownPublicKey)?;
        match self.shake_hands(slot, arrival, DropReason::UnknownPublicKey, now, sink) {
            Err(Stop::Pass(to)) => {
                Ok(pass(to, origin.hops, Passed::Initiation(*arrival.datagram, key), sink)?)
            }
            done => done,
        }
    }

    /// Opens an initiation; the public key that is in it.
    fn admit(
        &mut self,
        arrival: &Arrival<'_>,
        now: Instant,
        sink: &mut impl Sink,
    ) -> Result<[u8; 32], DropReason> {
        let known = match arrival.via() {
            Some(channel) => self.demux.handshakes(channel),
            None => self.peers.by_remote(arrival.from()).and_then(|slot| self.peers.handshakes(slot)),
        };
        let mut cookie = [0; COOKIE_REPLY];
        match self.gate.admit(arrival.payload, arrival.from().ip(), known, &mut cookie, now)? {
            Admission::Admitted(key) => Ok(key),
            Admission::Cookie => {
                self.reply(arrival, &cookie, now, sink);
                Err(DropReason::HandshakeBudget)
            }
        }
    }

    /// A handshake response or a cookie reply: the answer to an own initiation.
    fn handle_answer(
        &mut self,
        arrival: &Arrival<'_>,
        now: Instant,
        sink: &mut impl Sink,
    ) -> Result<(), Stop> {
        let slot = self.receiver(arrival)?;
        let peer = self.peers.holder(slot, DropReason::UnknownSession)?;
        // Without an open handshake this costs a look-up and nothing more.
        if !peer.link.as_deref().is_some_and(|link| link.wg.is_handshaking()) {
            return Err(DropReason::HandshakeReplayed.into());
        }
        self.shake_hands(slot, arrival, DropReason::UnknownSession, now, sink)
    }

    /// A handshake message for the client at `slot`; without its connection it is dropped for `missing`.
    fn shake_hands(
        &mut self,
        slot: Slot,
        arrival: &Arrival<'_>,
        missing: DropReason,
        now: Instant,
        sink: &mut impl Sink,
    ) -> Result<(), Stop> {
        self.run_timers(slot, now, sink);
        let peer = self.peers.holder(slot, missing)?;
        let link = peer.link.as_deref_mut().ok_or(missing)?;
        let mut out = [0; HANDSHAKE_MAX];
        let len = match arrival.kind {
            PayloadKind::HandshakeInitiation => link.wg.handle_initiation(arrival.payload, &mut out, now)?,
            PayloadKind::CookieReply => {
                link.wg.handle_cookie_reply(arrival.payload)?;
                0
            }
            _ => {
                let (len, established) = link.wg.handle_response(arrival.payload, &mut out, now)?;
                if established {
                    self.events.push(WorkerEvent::Established { id: peer.id, index: link.index });
                }
                len
            }
        };
        if len > 0 {
            send::message(link, &out[..len], &mut self.demux, now, sink);
        }
        self.traffic.handshakes += 1;
        Ok(())
    }

    #[inline]
    fn receiver(&self, arrival: &Arrival<'_>) -> Result<Slot, DropReason> {
        classify::receiver_index(arrival.kind, arrival.payload)
            .and_then(|receiver| self.peers.by_index(ConnectionIndex::of_receiver(receiver)))
            .ok_or(DropReason::UnknownSession)
    }

    /// Back the way `arrival` came: a cookie is bound to the address it came from.
    fn reply(&mut self, arrival: &Arrival<'_>, message: &[u8], now: Instant, sink: &mut impl Sink) {
        let route = match arrival.via() {
            Some((server, _)) => Route { src: None, dst: server, ecn: Ecn::NotEct },
            None => Route { src: Some(arrival.datagram.local), dst: arrival.from(), ecn: Ecn::NotEct },
        };
        send::reply(route, arrival.via(), message, &mut self.demux, now, sink);
    }

    // Inbound: from the TUN device.

    #[inline(never)]
    fn handle_packet(&mut self, packet: &mut [u8], now: Instant, sink: &mut impl Sink) -> Result<(), Stop> {
        let (peer, sent) = match inbound::decide(&mut self.peers, packet, self.own, now) {
            Ok(found) => found,
            Err(stop) => {
                if stop == Stop::Drop(DropReason::InboundNotAllowed) {
                    self.tell_denied_inbound(packet, DropReason::InboundNotAllowed, now);
                }
                return Err(stop);
            }
        };
        let link = peer.link.as_deref_mut().ok_or(DropReason::NotConnected)?;
        let index = link.index;
        let relayed = send::seal(link, packet, &mut self.demux, now, sink)?;
        peer.inbound.add(packet.len());
        tell_activity(peer, index, &mut self.events, now);
        if sent.is_some() {
            account::inbound(peer, packet, sent, now, account::told(&mut self.events, &mut self.traffic));
        }
        let volume =
            if relayed { &mut self.traffic.inbound_relayed } else { &mut self.traffic.inbound_direct };
        volume.add(packet.len());
        Ok(())
    }

    // Time and commands.

    /// WireGuard's timers, the sessions and the flows of one client, and when they are looked at next.
    fn run_timers(&mut self, slot: Slot, now: Instant, sink: &mut impl Sink) {
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let mut ticks = if peer.end_sessions(now) { 1 } else { CALM };
        if let Some(flows) = &mut peer.flows {
            flows.handle_timeout(now, &mut account::told(&mut self.events, &mut self.traffic));
        }
        if let Some(link) = peer.link.as_deref_mut() {
            let mut out = [0; HANDSHAKE_MAX];
            match link.wg.tick(&mut out, now) {
                Act::Nothing => {}
                Act::Send(len) => send::message(link, &out[..len], &mut self.demux, now, sink),
                Act::Expired => {
                    self.events.push(WorkerEvent::Expired { id: peer.id, index: link.index });
                }
            }
            if link.wg.is_handshaking() {
                ticks = 1;
            }
        }
        if peer.is_timed() {
            peer.due = self.wheel.schedule(slot, ticks, now);
        }
    }

    /// A client's path may have changed: what waited for one leaves.
    fn send_held(&mut self, slot: Slot, now: Instant, sink: &mut impl Sink) {
        if let Some(link) = self.peers.get_mut(slot).and_then(|peer| peer.link.as_deref_mut()) {
            send::held(link, &mut self.demux, now, sink);
        }
    }

    /// "Sends a goodbye packet through the tunnel if Connected/Idle; silent otherwise".
    fn say_goodbye(&mut self, mut peer: Box<Peer>, now: Instant, sink: &mut impl Sink) {
        if let Some(link) = peer.link.as_deref_mut() {
            // A client that cannot be told finds out by its own timers.
            let _ = send::seal(link, &control_packet::GOODBYE, &mut self.demux, now, sink);
        }
        self.retire(peer, now);
    }
}

impl Volume {
    #[inline]
    pub(crate) fn add(&mut self, len: usize) {
        self.packets += 1;
        self.bytes += len as u64;
    }

    /// Adds another one.
    pub(crate) fn merge(&mut self, other: Self) {
        self.packets += other.packets;
        self.bytes += other.bytes;
    }
}

#[inline]
fn tell_activity(peer: &mut Peer, index: ConnectionIndex, events: &mut Events, now: Instant) {
    if peer.is_activity_due(now) && events.push(WorkerEvent::Activity { id: peer.id, index, at: now }) {
        peer.on_activity_told(now);
    }
}
