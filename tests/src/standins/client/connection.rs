//! The connection to one gateway: an ICE agent, a WireGuard tunnel, the route between them
//! (connections.md sections 5, 6, 10).
//!
//! It does not know resources or the portal; those are in `core`.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use is::stun::{StunMessage, StunPacket};
use is::{Candidate, CandidateKind, IceAgent, IceAgentEvent, IceConnectionState, IceCreds, Protocol};
use uuid::Uuid;

use super::config::{Event, Generation, Path};
use super::ice::{self, Local};
use super::inner::GOODBYE;
use super::net::{Net, Route, WIREGUARD_OVERHEAD};
use super::turn::RelayId;

/// No remote candidate for this long: failed (section 5.2).
const CANDIDATE_LIMIT: Duration = Duration::from_secs(10);
/// ICE disconnected for this long: failed (section 6.6).
const DISCONNECT_GRACE: Duration = Duration::from_secs(2);
/// No application packet for this long: idle (section 5.2).
const IDLE_AFTER: Duration = Duration::from_secs(20);
/// A proactive handshake is suppressed for this long after the last one (section 6.7).
const HANDSHAKE_PAUSE: Duration = Duration::from_secs(20);
/// boringtun's timers are looked at this often (design.md section 2.1).
const TIMER_TICK: Duration = Duration::from_millis(250);
/// Inner packets kept until the session is there (section 1.2).
const WAITING_LIMIT: usize = 128;

/// What the portal gave for a gateway. Equal grants mean the same connection (section 5.1).
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Grant {
    pub(super) gateway: Uuid,
    pub(super) gateway_key: [u8; 32],
    pub(super) preshared_key: [u8; 32],
    pub(super) local: IceCreds,
    pub(super) remote: IceCreds,
}

/// The client's own identity, shared by all connections.
pub(super) struct Identity {
    pub(super) private: StaticSecret,
    pub(super) public: PublicKey,
    pub(super) limiter: Arc<RateLimiter>,
}

impl Identity {
    /// A fresh key.
    pub(super) fn generate() -> Self {
        let private = StaticSecret::from(rand::random::<[u8; 32]>());
        let public = PublicKey::from(&private);
        Self { limiter: Arc::new(RateLimiter::new(&public, u64::MAX)), private, public }
    }
}

/// See the file's head.
pub(super) struct Connection {
    pub(super) grant: Grant,
    /// Upper 24 bits of our sender indices (section 10.2).
    pub(super) index: u32,
    /// The relay whose addresses this connection offers.
    pub(super) relay: RelayId,
    agent: IceAgent,
    tunn: Tunn,
    route: Option<Route>,
    established: bool,
    created: Instant,
    candidate_deadline: Option<Instant>,
    disconnected_since: Option<Instant>,
    last_activity: Instant,
    idle: bool,
    last_initiation: Option<Instant>,
    /// When the first of a series of unanswered initiations was sent.
    unanswered_since: Option<Instant>,
    next_tick: Instant,
    waiting: VecDeque<Vec<u8>>,
    generation: Generation,
    relay_only: bool,
}

impl Connection {
    /// A connection that has neither candidates nor a route yet.
    pub(super) fn new(
        grant: Grant,
        identity: &Identity,
        index: u32,
        relay: RelayId,
        generation: Generation,
        relay_only: bool,
        now: Instant,
    ) -> Self {
        let mut agent = ice::agent(grant.local.clone(), grant.remote.clone());
        agent.handle_timeout(now);
        let gateway_key = PublicKey::from(grant.gateway_key);
        let limiter = Some(identity.limiter.clone());
        let tunn =
            Tunn::new(identity.private.clone(), gateway_key, Some(grant.preshared_key), None, index, limiter);
        Self {
            grant,
            index,
            relay,
            agent,
            tunn,
            route: None,
            established: false,
            created: now,
            candidate_deadline: Some(now + CANDIDATE_LIMIT),
            disconnected_since: None,
            last_activity: now,
            idle: false,
            last_initiation: None,
            unanswered_since: None,
            next_tick: now + TIMER_TICK,
            waiting: VecDeque::new(),
            generation,
            relay_only,
        }
    }

    // ---- getters ------------------------------------------------------------------------------

    /// Session and route are both there.
    pub(super) fn is_established(&self) -> bool {
        self.established
    }

    /// Is this STUN message for our agent?
    pub(super) fn accepts(&self, message: &StunMessage<'_>) -> bool {
        self.agent.accepts_message(message)
    }

    /// All lines to announce again on a reused connection (section 1.2).
    pub(super) fn announcement(&self) -> Vec<String> {
        self.agent.local_candidates().map(|c| c.to_sdp_string()).collect()
    }

    // ---- candidates ---------------------------------------------------------------------------

    /// Adds a candidate of ours; the line is to be signalled.
    pub(super) fn add_local(&mut self, candidate: Local) -> Option<String> {
        if self.relay_only && !matches!(candidate, Local::Relayed { .. }) {
            return None;
        }
        ice::add_local(&mut self.agent, candidate, self.generation)
    }

    /// Withdraws an address on a relay; the line is to be signalled as invalid.
    pub(super) fn remove_relayed(&mut self, addr: SocketAddr) -> Option<String> {
        ice::remove_relayed(&mut self.agent, addr)
    }

    /// A line from the gateway. Lines that do not parse are skipped one by one (section 4.3).
    pub(super) fn add_remote(&mut self, line: &str, net: &mut Net, now: Instant) {
        let Ok(candidate) = Candidate::from_sdp_string(line) else { return };
        self.candidate_deadline = None;
        if self.relay_only && candidate.kind() != CandidateKind::Relayed {
            return;
        }
        // Non-host candidates get their channel at once, hosts when a check needs one (section 6.4).
        if candidate.kind() != CandidateKind::Host
            && let Some(turn) = net.relays.get_mut(&self.relay)
        {
            turn.bind(candidate.addr(), now);
        }
        self.agent.add_remote_candidate(candidate);
        for candidate in ice::optimistic(&self.agent) {
            self.agent.add_remote_candidate(candidate);
        }
        self.wake(now);
    }

    /// A line the gateway withdraws.
    pub(super) fn remove_remote(&mut self, line: &str) {
        if let Ok(candidate) = Candidate::from_sdp_string(line) {
            self.agent.invalidate_candidate(&candidate);
        }
    }

    // ---- datagrams ----------------------------------------------------------------------------

    /// A STUN message that [`Self::accepts`] said yes to.
    pub(super) fn handle_stun(
        &mut self,
        message: &StunMessage<'_>,
        source: SocketAddr,
        destination: SocketAddr,
        now: Instant,
    ) {
        self.agent
            .handle_packet(now, StunPacket { proto: Protocol::Udp, source, destination, message: *message });
    }

    /// A WireGuard message; an inner packet is handed to `deliver`. Returns false when it was no good.
    pub(super) fn handle_wireguard(
        &mut self,
        datagram: &[u8],
        scratch: &mut [u8],
        net: &mut Net,
        now: Instant,
        deliver: impl FnOnce(usize),
    ) -> bool {
        let mut replies = Vec::new();
        match self.tunn.decapsulate(None, datagram, scratch) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                let length = packet.len();
                self.unanswered_since = None;
                self.note_activity(now);
                deliver(length);
                return true;
            }
            TunnResult::Done => {
                self.unanswered_since = None;
                return true;
            }
            TunnResult::Err(_) => return false,
            TunnResult::WriteToNetwork(reply) => replies.push(reply.to_vec()),
        }
        // Flush whatever boringtun held back for the new session.
        while let TunnResult::WriteToNetwork(more) = self.tunn.decapsulate(None, &[], scratch) {
            replies.push(more.to_vec());
        }
        self.unanswered_since = None;
        if let Some(route) = self.route {
            for reply in replies {
                net.send(route, &reply, now);
            }
        }
        true
    }

    /// An inner packet for the gateway; kept while there is no session.
    pub(super) fn send(&mut self, packet: &[u8], net: &mut Net, now: Instant) {
        self.note_activity(now);
        match self.route.filter(|_| self.established) {
            Some(route) => {
                if let Some(initiation) = net.send_inner(&mut self.tunn, route, packet, now) {
                    self.note_initiation(now);
                    net.send(route, &initiation, now);
                }
            }
            None => {
                if self.waiting.len() == WAITING_LIMIT {
                    self.waiting.pop_front();
                }
                self.waiting.push_back(packet.to_vec());
            }
        }
    }

    /// Appends an inner packet, encrypted for this connection's session, to `sealed`.
    ///
    /// # Errors
    /// If there is no session.
    pub(super) fn seal(&mut self, packet: &[u8], sealed: &mut Vec<u8>) -> Result<()> {
        let start = sealed.len();
        sealed.resize(start + packet.len() + WIREGUARD_OVERHEAD, 0);
        match self.tunn.encapsulate(packet, &mut sealed[start..]) {
            TunnResult::WriteToNetwork([4, ..]) => Ok(()),
            _ => {
                sealed.truncate(start);
                bail!("there is no session to seal a packet with")
            }
        }
    }

    /// The pair of addresses in use, if no relay of ours is in between.
    pub(super) fn direct(&self) -> Option<(SocketAddr, SocketAddr)> {
        match self.route? {
            Route::Direct { local, remote } => Some((local, remote)),
            Route::Relayed { .. } => None,
        }
    }

    /// Tells the gateway that we are leaving.
    pub(super) fn goodbye(&mut self, net: &mut Net, now: Instant) {
        if self.established {
            self.send(&GOODBYE, net, now);
            net.flush();
        }
    }

    /// Starts a handshake unless one was started in the last 20 s.
    pub(super) fn handshake(&mut self, net: &mut Net, now: Instant) {
        let recent = self.last_initiation.is_some_and(|at| now < at + HANDSHAKE_PAUSE);
        let Some(route) = self.route.filter(|_| !recent) else { return };
        let mut buffer = [0; 256];
        // boringtun's clock moves only in its timers (design.md section 2.1).
        self.run_timers(net, now);
        if let TunnResult::WriteToNetwork(initiation) =
            self.tunn.format_handshake_initiation(&mut buffer, false)
        {
            let initiation = initiation.to_vec();
            self.note_initiation(now);
            net.send(route, &initiation, now);
        }
    }

    // ---- time ---------------------------------------------------------------------------------

    /// Advances everything; `Some(reason)` means that the connection has failed.
    pub(super) fn advance(
        &mut self,
        net: &mut Net,
        now: Instant,
        emit: &mut impl FnMut(Event),
    ) -> Option<String> {
        while self.agent.poll_timeout().is_none_or(|at| at <= now) {
            self.agent.handle_timeout(now);
            if self.agent.poll_timeout().is_none_or(|at| at <= now) && !self.drain(net, now, emit) {
                break;
            }
        }
        self.drain(net, now, emit);
        self.note_established(net, now, emit);
        if now >= self.next_tick {
            self.next_tick = now + TIMER_TICK;
            if self.run_timers(net, now) {
                return Some("WireGuard expired".into());
            }
            if !self.idle
                && now >= self.last_activity + IDLE_AFTER
                && self.agent.state() == IceConnectionState::Connected
            {
                self.idle = true;
                ice::set_profile(&mut self.agent, true);
            }
        }
        let attempts = Duration::from_secs(if self.generation == Generation::Head { 20 } else { 15 });
        if self.candidate_deadline.is_some_and(|at| now >= at) {
            Some("no candidate within 10 s".into())
        } else if self.disconnected_since.is_some_and(|at| now >= at + DISCONNECT_GRACE) {
            Some("ICE disconnected".into())
        } else if self.unanswered_since.is_some_and(|at| now >= at + attempts) {
            Some("handshake unanswered".into())
        } else {
            None
        }
    }

    /// When [`Self::advance`] has something to do.
    pub(super) fn poll_timeout(&mut self) -> Option<Instant> {
        let grace = self.disconnected_since.map(|at| at + DISCONNECT_GRACE);
        [self.agent.poll_timeout(), Some(self.next_tick), self.candidate_deadline, grace]
            .into_iter()
            .flatten()
            .min()
    }

    /// Sends checks and follows the agent's events. Returns false when there was nothing.
    fn drain(&mut self, net: &mut Net, now: Instant, emit: &mut impl FnMut(Event)) -> bool {
        let mut any = false;
        while let Some(transmit) = self.agent.poll_transmit() {
            any = true;
            let route = self.route_for(net, transmit.source, transmit.destination);
            net.send(route, &transmit.contents, now);
        }
        while let Some(event) = self.agent.poll_event() {
            any = true;
            match event {
                IceAgentEvent::NominatedSend { source, destination, .. } => {
                    self.on_nominated(net, source, destination, now, emit);
                }
                IceAgentEvent::IceConnectionStateChange(IceConnectionState::Disconnected) => {
                    self.disconnected_since = Some(now);
                }
                IceAgentEvent::IceConnectionStateChange(_) => self.disconnected_since = None,
                _ => {}
            }
        }
        any
    }

    fn on_nominated(
        &mut self,
        net: &mut Net,
        local: SocketAddr,
        remote: SocketAddr,
        now: Instant,
        emit: &mut impl FnMut(Event),
    ) {
        let route = self.route_for(net, local, remote);
        if self.route == Some(route) {
            return;
        }
        self.route = Some(route);
        let to_relay =
            self.agent.remote_candidates().any(|c| c.addr() == remote && c.kind() == CandidateKind::Relayed);
        let kind = match (route, to_relay) {
            (Route::Direct { .. }, false) => Path::Direct,
            (Route::Direct { .. }, true) => Path::ToRelay,
            (Route::Relayed { .. }, false) => Path::Relayed,
            (Route::Relayed { .. }, true) => Path::RelayedToRelay,
        };
        emit(Event::Path { gateway: self.grant.gateway, kind, local, remote });
        self.handshake(net, now);
    }

    fn route_for(&self, net: &Net, local: SocketAddr, remote: SocketAddr) -> Route {
        match net.relay_of(local) {
            Some(relay) => Route::Relayed { relay, remote },
            None => Route::Direct { local, remote },
        }
    }

    fn note_established(&mut self, net: &mut Net, now: Instant, emit: &mut impl FnMut(Event)) {
        if self.established || self.route.is_none() || self.tunn.time_since_last_handshake().is_none() {
            return;
        }
        self.established = true;
        let ms = u64::try_from((now - self.created).as_millis()).unwrap_or(u64::MAX);
        emit(Event::Established { gateway: self.grant.gateway, ms });
        for packet in std::mem::take(&mut self.waiting) {
            self.send(&packet, net, now);
        }
        net.flush();
    }

    /// Returns true when the tunnel has expired.
    fn run_timers(&mut self, net: &mut Net, now: Instant) -> bool {
        let mut buffer = [0; 256];
        match self.tunn.update_timers(&mut buffer) {
            TunnResult::WriteToNetwork(datagram) => {
                let datagram = datagram.to_vec();
                if datagram.first() == Some(&1) {
                    self.note_initiation(now);
                }
                if let Some(route) = self.route {
                    net.send(route, &datagram, now);
                }
                false
            }
            TunnResult::Err(_) => true,
            _ => false,
        }
    }

    fn note_initiation(&mut self, now: Instant) {
        self.last_initiation = Some(now);
        self.unanswered_since.get_or_insert(now);
    }

    fn note_activity(&mut self, now: Instant) {
        self.last_activity = now;
        self.wake(now);
    }

    fn wake(&mut self, now: Instant) {
        self.last_activity = now;
        if std::mem::take(&mut self.idle) {
            ice::set_profile(&mut self.agent, false);
        }
    }
}
