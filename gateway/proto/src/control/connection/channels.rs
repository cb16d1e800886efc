//! The channels a connection holds on relays: to the addresses its client signalled, to those it checks, and to the
//! nominated one.

use std::{net::SocketAddr, time::Instant};

use is::CandidateKind;

use super::Connection;
use crate::{control::shared::Shared, ids::RelayId, relay::Use};

impl Connection {
    /// Wants a channel to `peer` on the selected relay, if there is one.
    pub(super) fn want_channel(&mut self, peer: SocketAddr, why: Use, shared: &mut Shared, now: Instant) {
        if let Some(relay) = self.relay {
            self.hold(relay, peer, shared);
            shared.relays.bind(relay, peer, why, now);
        }
    }

    /// `relay` has an address for us: binds what the client's checks and ours will need, ahead of them.
    pub(super) fn want_known_channels(&mut self, relay: RelayId, shared: &mut Shared, now: Instant) {
        if self.relay != Some(relay) {
            return;
        }
        for (kind, addr) in self.signalled.clone() {
            if kind != CandidateKind::Host {
                self.want_channel(addr, Use::Signalled, shared, now);
            }
        }
        // Where the client was until now it most likely still is.
        if let Some(pair) = self.pair().filter(|pair| pair.via == Some(relay)) {
            self.want_channel(pair.remote, Use::Checked, shared, now);
        }
    }

    /// Notes that a channel is asked for; it is this connection's until [`Connection::let_go`].
    pub(super) fn hold(&mut self, relay: RelayId, peer: SocketAddr, shared: &mut Shared) {
        if self.channels.insert((relay, peer)) {
            shared.hold(relay, peer);
        }
    }

    /// Nobody signals `peer` any more.
    pub(super) fn drop_channel(&mut self, peer: SocketAddr, shared: &mut Shared) {
        // Another candidate of the same address may still want it.
        if !self.signalled.iter().any(|(_, addr)| *addr == peer) {
            self.let_go(|(_, to)| to == peer, shared);
        }
    }

    /// Gives up those channels; one that no other connection holds either may lapse.
    pub(super) fn let_go(&mut self, which: impl Fn((RelayId, SocketAddr)) -> bool, shared: &mut Shared) {
        self.channels.retain(|(relay, peer)| {
            let unwanted = which((*relay, *peer));
            if unwanted {
                shared.let_go(*relay, *peer);
            }
            !unwanted
        });
    }
}
