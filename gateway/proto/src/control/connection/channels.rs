//! The channels a connection holds on relays: to the addresses its client signalled, to those it checks, and to the
//! nominated one.

use std::{net::SocketAddr, time::Instant};

use super::Connection;
use crate::{control::shared::Shared, relay::Use};

impl Connection {
    pub(super) fn want_channel(&mut self, peer: SocketAddr, why: Use, shared: &mut Shared, now: Instant) {
        if let Some(relay) = self.relay {
            self.channels.insert((relay, peer));
            shared.relays.bind(relay, peer, why, now);
        }
    }

    pub(super) fn drop_channel(&mut self, peer: SocketAddr, shared: &mut Shared) {
        // Another candidate of the same address may still want it.
        if self.signalled.iter().any(|(_, addr)| *addr == peer) {
            return;
        }
        let unwanted: Vec<_> = self.channels.iter().filter(|(_, p)| *p == peer).copied().collect();
        for (relay, peer) in unwanted {
            self.channels.remove(&(relay, peer));
            shared.relays.release(relay, peer);
        }
    }
}
