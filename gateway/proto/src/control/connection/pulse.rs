//! Is the nominated relayed pair alive? A relay that was started again has forgotten our allocation and says nothing: the
//! pair goes quiet, and ICE would wait for minutes. So a pair that is too quiet makes us ask its relay
//! ([`Relays::check`]), which tells at once.
//!
//! ```text
//! active: the client checks every 1.5 s       (connections.md section 6.6)  -> expected 2 s after the last one
//! idle:   only our checks, every 25 s, are answered                         -> expected 2 s after each
//! ```
//!
//! Whether the silence is the relay's or the client's it does not know; the relay does.

use std::{net::SocketAddr, time::Instant};

#[cfg(doc)]
use crate::relay::Relays;

use super::{Connection, State};
use crate::{
    control::{shared::Shared, stun_router::is_request},
    relay,
};

impl Connection {
    /// A check or an answer came from the client on this pair.
    pub(super) fn heard_on(&mut self, local: SocketAddr, remote: SocketAddr, now: Instant) {
        if self.is_nominated(local, remote) {
            self.expect_pulse(now);
        }
    }

    /// A STUN message of ours goes out on this pair; a request is to be answered.
    pub(super) fn asked_on(&mut self, local: SocketAddr, remote: SocketAddr, message: &[u8], now: Instant) {
        if is_request(message) && self.is_nominated(local, remote) {
            self.pulse.get_or_insert(now + relay::SILENCE);
        }
    }

    /// From `now` on a sign of life is expected, if the pair is relayed and active.
    pub(super) fn expect_pulse(&mut self, now: Instant) {
        self.pulse = match self.state {
            State::Connected { pair, .. } if pair.via.is_some() => Some(now + relay::SILENCE),
            State::Connecting | State::Connected { .. } | State::Idle { .. } => None,
        };
    }

    /// Asks the relay if the sign of life is overdue.
    pub(super) fn feel_pulse(&mut self, shared: &mut Shared, now: Instant) {
        if self.pulse.take_if(|due| *due <= now).is_none() {
            return;
        }
        let Some(relay) = self.pair().and_then(|pair| pair.via) else { return };
        match shared.relays.check(relay, now) {
            again @ Some(_) => self.pulse = again,
            None => self.expect_pulse(now),
        }
    }

    /// Something else speaks against the relay of our addresses.
    pub(super) fn doubt_relay(&self, shared: &mut Shared, now: Instant) {
        if let Some(relay) = self.relay {
            shared.relays.check(relay, now);
        }
    }

    fn is_nominated(&self, local: SocketAddr, remote: SocketAddr) -> bool {
        self.pair().is_some_and(|pair| pair.via.is_some() && (pair.local, pair.remote) == (local, remote))
    }
}
