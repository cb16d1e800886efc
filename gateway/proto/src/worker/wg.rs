//! WireGuard for one client: the only user of boringtun's `Tunn`, and what hides its habits (design.md section 2.1).
//! Knows sessions and timers; no path, no policy, no other client.
//!
//! * `Tunn`'s notion of now moves only in `update_timers`: [`Wg::tick`] runs before every handshake message and at
//!   least once a second.
//! * `encapsulate` without a session starts a handshake and queues the packet. So we mirror which of `Tunn`'s eight
//!   slots hold what, and never call it unless the current session is confirmed and young enough. The mirror only
//!   ever errs towards "no session".
//! * It retries an own initiation for 90 s; we give up after 20 s (connections.md section 10.4).
//! * Its keep-alive timer compares stamps that are up to a second old and so misses data that arrived in the same
//!   second as something was sent; the peer would then start a handshake. We keep that timer ourselves as well.
//!   (For the same reason it does not miss an answer to data sent in the second in which something arrived; what is
//!   sent later is noticed, so a client that has vanished is.)
//! * A responder's successor session replaces another one in `Tunn`'s slot before anybody confirmed it.
//! * Its "data sent, nothing heard" timer runs from what was heard last, not from the first data sent: after a
//!   quiet time one push towards the client is followed by an initiation within a second. Harmless: the client
//!   answers, and one that has vanished is noticed sooner.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use boringtun::noise::{Tunn, TunnResult, errors::WireGuardError, rate_limiter::RateLimiter};
use gateway_common::DropReason;
use x25519_dalek::{PublicKey, StaticSecret};

use crate::{addr::WIREGUARD_OVERHEAD, command::ConnectionKeys};

/// The longest message that is not data: an initiation.
pub const HANDSHAKE_MAX: usize = 148;

/// Own initiations are given up after this (connections.md section 10.4, ICE connections of HEAD).
const REKEY_ATTEMPT_TIME: Duration = Duration::from_secs(20);
/// An initiator stops sending with a session of this age (connections.md section 10.3).
const INITIATOR_SENDS_FOR: Duration = Duration::from_secs(170);
/// REJECT_AFTER_TIME of the WireGuard paper.
const REJECT_AFTER_TIME: Duration = Duration::from_secs(180);
/// KEEPALIVE_TIMEOUT of the WireGuard paper.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
const SLOTS: u32 = 8;

/// One client's WireGuard state, about 11 KB.
pub struct Wg {
    tunn: Tunn,
    /// What `Tunn` holds in each of its slots.
    sessions: [Option<Session>; SLOTS as usize],
    /// Our index of the session `Tunn` sends with, if it is still there.
    current: u32,
    /// When the first initiation of an unanswered series went out.
    initiated: Option<Instant>,
    /// Data arrived and nothing was sent since.
    keepalive_due: Option<Instant>,
    life: Life,
}

#[derive(Debug, Clone, Copy)]
struct Session {
    index: u32,
    established: Instant,
    initiator: bool,
    confirmed: bool,
}

/// How far a connection has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    /// No session was ever confirmed.
    New,
    /// Some session was confirmed.
    Established,
    /// Given up.
    Expired,
}

/// What [`Wg::tick`] or an accepted handshake message asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Act {
    /// Nothing.
    Nothing,
    /// Send the first so many bytes of the buffer.
    Send(usize),
    /// Tell control that this connection is dead. Said once.
    Expired,
}

/// A data message that authenticated.
#[derive(Debug, PartialEq, Eq)]
pub struct Opened {
    /// Bytes of the IP packet at the front of the buffer, 0 for a keep-alive; or why it is no IP packet.
    pub packet: Result<usize, DropReason>,
    /// It confirmed the first session of the connection.
    pub established: bool,
}

impl Wg {
    /// State without a session. `unlimited` is shared by every client: limiting happens in front (handshake.rs).
    pub fn new(private_key: &StaticSecret, keys: &ConnectionKeys, unlimited: &Arc<RateLimiter>) -> Self {
        let tunn = Tunn::new(
            private_key.clone(),
            PublicKey::from(keys.public_key),
            Some(*keys.preshared_key),
            None,
            keys.index.get(),
            Some(Arc::clone(unlimited)),
        );
        Self {
            tunn,
            sessions: [None; SLOTS as usize],
            current: 0,
            initiated: None,
            keepalive_due: None,
            life: Life::New,
        }
    }

    /// Is there a session to encrypt with?
    #[inline]
    pub fn is_sendable(&self, now: Instant) -> bool {
        self.current().is_some_and(|session| {
            let age = now.saturating_duration_since(session.established);
            age < if session.initiator { INITIATOR_SENDS_FOR } else { REJECT_AFTER_TIME }
        })
    }

    /// How long ago the session was made that is encrypted with; `None` without one that may be.
    pub fn handshake_age(&self, now: Instant) -> Option<Duration> {
        let current = self.current().filter(|_| self.is_sendable(now))?;
        Some(now.saturating_duration_since(current.established))
    }

    /// Is an own initiation unanswered? Then [`Wg::tick`] wants to run often.
    pub fn is_handshaking(&self) -> bool {
        self.initiated.is_some() && self.life != Life::Expired
    }

    /// Encrypts one IP packet to the front of `out` (at least `packet + 32` bytes); the message's length.
    ///
    /// `encapsulate` wants 148 bytes only where it would start a handshake; with less it then fails, and panics never.
    ///
    /// `None` without a sendable session.
    #[inline]
    pub fn seal(&mut self, packet: &[u8], out: &mut [u8], now: Instant) -> Option<usize> {
        if !self.is_sendable(now) {
            return None;
        }
        match self.tunn.encapsulate(packet, out) {
            TunnResult::WriteToNetwork(message) if message.len() == packet.len() + WIREGUARD_OVERHEAD => {
                self.keepalive_due = None;
                Some(message.len())
            }
            _ => None,
        }
    }

    /// Decrypts one data message (type 4, at least 32 bytes) to the front of `out` (at least `message - 16` bytes).
    #[inline]
    pub fn open(&mut self, message: &[u8], out: &mut [u8], now: Instant) -> Result<Opened, DropReason> {
        if self.life == Life::Expired {
            return Err(DropReason::SessionExpired);
        }
        let index = message.get(4..8).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b));
        let packet = match self.tunn.decapsulate(None, message, out) {
            TunnResult::Done => Ok(0),
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                self.keepalive_due = Some(now + KEEPALIVE_TIMEOUT);
                Ok(packet.len())
            }
            // Authentic, but no IP packet.
            TunnResult::Err(WireGuardError::InvalidPacket) => Err(DropReason::MalformedInner),
            TunnResult::Err(error) => return Err(data_error(&error)),
            TunnResult::WriteToNetwork(_) => return Err(DropReason::SessionExpired),
        };
        Ok(Opened { packet, established: self.on_authentic(index) })
    }

    /// Answers an initiation; call [`Wg::tick`] first. The reply is at the front of `out` (at least 148 bytes).
    pub fn handle_initiation(
        &mut self,
        message: &[u8],
        out: &mut [u8],
        now: Instant,
    ) -> Result<usize, DropReason> {
        if self.life == Life::Expired {
            return Err(DropReason::SessionExpired);
        }
        match self.tunn.decapsulate(None, message, out) {
            TunnResult::WriteToNetwork(reply) => {
                let len = reply.len();
                let index =
                    reply.get(4..8).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b));
                self.hold(Session { index, established: now, initiator: false, confirmed: false });
                self.initiated = None;
                Ok(len)
            }
            TunnResult::Err(error) => Err(handshake_error(&error)),
            _ => Err(DropReason::HandshakeRejected),
        }
    }

    /// Takes the answer to our initiation; call [`Wg::tick`] first. The keep-alive that confirms the session to the
    /// peer is at the front of `out`. The flag says whether it is the first session of the connection.
    pub fn handle_response(
        &mut self,
        message: &[u8],
        out: &mut [u8],
        now: Instant,
    ) -> Result<(usize, bool), DropReason> {
        if self.life == Life::Expired {
            return Err(DropReason::SessionExpired);
        }
        let index = message.get(8..12).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b));
        match self.tunn.decapsulate(None, message, out) {
            TunnResult::WriteToNetwork(keepalive) => {
                let len = keepalive.len();
                self.hold(Session { index, established: now, initiator: true, confirmed: true });
                self.initiated = None;
                self.keepalive_due = None;
                Ok((len, self.on_authentic(index)))
            }
            // Both are what a second copy looks like: the handshake it belongs to is over.
            TunnResult::Err(WireGuardError::UnexpectedPacket) => Err(DropReason::HandshakeReplayed),
            TunnResult::Err(error) => Err(handshake_error(&error)),
            _ => Err(DropReason::HandshakeRejected),
        }
    }

    /// Takes a cookie; our next initiation will carry it. Call [`Wg::tick`] first.
    pub fn handle_cookie_reply(&mut self, message: &[u8]) -> Result<(), DropReason> {
        if self.life == Life::Expired {
            return Err(DropReason::SessionExpired);
        }
        match self.tunn.decapsulate(None, message, &mut []) {
            TunnResult::Done => Ok(()),
            TunnResult::Err(error) => Err(handshake_error(&error)),
            _ => Err(DropReason::HandshakeRejected),
        }
    }

    /// Runs the timers. What is to be sent is at the front of `out` (at least 148 bytes).
    pub fn tick(&mut self, out: &mut [u8], now: Instant) -> Act {
        if self.life == Life::Expired {
            return Act::Nothing;
        }
        if self.initiated.is_some_and(|since| now.saturating_duration_since(since) >= REKEY_ATTEMPT_TIME) {
            return self.expire();
        }
        let ours_ended = self.current().is_some_and(|s| s.initiator) && !self.is_sendable(now);
        let sent = match self.tunn.update_timers(out) {
            TunnResult::WriteToNetwork(message) => Some((message.len(), message[0])),
            TunnResult::Err(WireGuardError::ConnectionExpired) => return self.expire(),
            _ => None,
        };
        self.forget_old(now);
        match sent {
            Some((len, 1)) => {
                self.initiated.get_or_insert(now);
                Act::Send(len)
            }
            Some((len, _)) => {
                self.keepalive_due = None;
                Act::Send(len)
            }
            // "Initiator of the previous session re-initiates when its current session expired": the client, being
            // the responder, would wait for us for ever.
            None if ours_ended && self.initiated.is_none() => self.initiate(out, now),
            None if self.keepalive_due.is_some_and(|due| due <= now) => {
                self.keepalive_due = None;
                self.seal(&[], out, now).map_or(Act::Nothing, Act::Send)
            }
            None => Act::Nothing,
        }
    }

    fn initiate(&mut self, out: &mut [u8], now: Instant) -> Act {
        match self.tunn.format_handshake_initiation(out, true) {
            TunnResult::WriteToNetwork(message) => {
                self.initiated = Some(now);
                Act::Send(message.len())
            }
            _ => Act::Nothing,
        }
    }

    fn expire(&mut self) -> Act {
        self.life = Life::Expired;
        self.sessions = [None; SLOTS as usize];
        Act::Expired
    }

    #[inline]
    fn current(&self) -> Option<&Session> {
        self.sessions[(self.current % SLOTS) as usize]
            .as_ref()
            .filter(|s| s.index == self.current && s.confirmed)
    }

    fn hold(&mut self, session: Session) {
        self.sessions[(session.index % SLOTS) as usize] = Some(session);
    }

    /// The peer proved that it holds session `index`: the same switch of the current session that `Tunn` makes.
    /// True if it is the first confirmed session of the connection.
    #[inline]
    fn on_authentic(&mut self, index: u32) -> bool {
        if index == self.current && self.current().is_some() {
            return false;
        }
        let established = match &mut self.sessions[(index % SLOTS) as usize] {
            Some(session) if session.index == index => {
                session.confirmed = true;
                session.established
            }
            _ => return false,
        };
        let current = self.sessions[(self.current % SLOTS) as usize];
        if current.is_none_or(|current| established >= current.established) {
            self.current = index;
        }
        let first = self.life == Life::New;
        self.life = Life::Established;
        first
    }

    /// `Tunn` drops sessions in `update_timers` only, by its own clock: follow it, and where the clocks disagree
    /// (its one counts time asleep) believe the one that says gone.
    fn forget_old(&mut self, now: Instant) {
        for slot in &mut self.sessions {
            slot.take_if(|s| now.saturating_duration_since(s.established) >= REJECT_AFTER_TIME);
        }
        if self.tunn.time_since_last_handshake().is_none() {
            self.sessions[(self.current % SLOTS) as usize]
                .take_if(|s| s.index == self.current && s.confirmed);
        }
    }
}

fn data_error(error: &WireGuardError) -> DropReason {
    match error {
        WireGuardError::InvalidAeadTag => DropReason::DataForged,
        WireGuardError::InvalidCounter | WireGuardError::DuplicateCounter => DropReason::DataReplayed,
        // Another session took the slot, or none is there any more.
        _ => DropReason::SessionExpired,
    }
}

fn handshake_error(error: &WireGuardError) -> DropReason {
    match error {
        WireGuardError::InvalidMac | WireGuardError::InvalidAeadTag => DropReason::HandshakeForged,
        WireGuardError::WrongTai64nTimestamp => DropReason::HandshakeReplayed,
        _ => DropReason::HandshakeRejected,
    }
}
