//! First step of the outbound walk: what is this datagram, and which way did it come (connections.md section 3)?
//! Knows relays and channels; no client, no key.
//!
//! Upstream recognises relays by port 3478; we go by their addresses only, so a relay may sit on any port and a
//! client may be mapped to 3478.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use gateway_common::{DropReason, PayloadKind, channel_data, classify};
use rustc_hash::{FxHashMap, FxHashSet};

use super::bucket::Bucket;
use crate::{Datagram, command::ChannelUse};

/// A channel's name: the relay's address and the number.
pub type ChannelKey = (SocketAddr, u16);

/// A datagram without its framing. Small, for it is handed from step to step.
#[derive(Debug, Clone, Copy)]
pub struct Arrival<'a> {
    /// What the payload claims to be: STUN or WireGuard.
    pub kind: PayloadKind,
    /// The bytes, ChannelData header removed.
    pub payload: &'a [u8],
    /// As it came.
    pub datagram: &'a Datagram<'a>,
    channel: Option<Bound>,
}

/// A channel that carried something.
#[derive(Debug, Clone, Copy)]
struct Bound {
    number: u16,
    peer: SocketAddr,
}

impl Arrival<'_> {
    /// The channel that carried it.
    #[inline]
    pub fn via(&self) -> Option<ChannelKey> {
        self.channel.map(|channel| (self.datagram.from, channel.number))
    }

    /// The sender; for a relayed datagram the channel's peer.
    #[inline]
    pub fn from(&self) -> SocketAddr {
        self.channel.map_or(self.datagram.from, |channel| channel.peer)
    }
}

/// The relays and their channels.
#[derive(Default)]
pub struct Demux {
    relays: FxHashSet<SocketAddr>,
    channels: FxHashMap<ChannelKey, Channel>,
    /// Some channel was used; its use is reported then.
    report_at: Option<Instant>,
}

struct Channel {
    peer: SocketAddr,
    handshakes: Bucket,
    received: bool,
    sent: bool,
}

/// Use of channels is reported at most this often.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

impl Demux {
    /// The whole set of relay addresses.
    pub fn set_relays(&mut self, servers: &[SocketAddr]) {
        self.relays.clear();
        self.relays.extend(servers);
    }

    /// A channel is open for `peer` (a bind was sent, and its relay may use it from the moment it accepts), or gone.
    pub fn set_channel(&mut self, key: ChannelKey, peer: Option<SocketAddr>) {
        match peer {
            Some(peer) => {
                let fresh = Channel { peer, handshakes: Bucket::FULL, received: false, sent: false };
                self.channels.entry(key).or_insert(fresh).peer = peer;
            }
            None => drop(self.channels.remove(&key)),
        }
    }

    /// Removes the framing.
    #[inline]
    pub fn unwrap<'a>(
        &mut self,
        datagram: &'a Datagram<'a>,
        now: Instant,
    ) -> Result<Arrival<'a>, DropReason> {
        let Datagram { from, payload, .. } = *datagram;
        let (kind, payload, channel) = match classify(payload) {
            PayloadKind::ChannelData => {
                let frame = channel_data::parse(payload).ok_or(DropReason::MalformedChannelData)?;
                let key = (from, frame.number);
                let Some(channel) = self.channels.get_mut(&key).filter(|_| self.relays.contains(&from))
                else {
                    let known = self.relays.contains(&from);
                    return Err(if known { DropReason::UnboundChannel } else { DropReason::UnknownRelay });
                };
                channel.received = true;
                self.report_at.get_or_insert(now + REPORT_INTERVAL);
                let bound = Bound { number: frame.number, peer: channel.peer };
                (classify(frame.payload), frame.payload, Some(bound))
            }
            kind => (kind, payload, None),
        };
        match kind {
            PayloadKind::Empty => Err(DropReason::EmptyDatagram),
            PayloadKind::MalformedWireGuard => Err(DropReason::MalformedWireGuard),
            PayloadKind::MalformedChannelData if channel.is_none() => Err(DropReason::MalformedChannelData),
            PayloadKind::Unknown | PayloadKind::ChannelData | PayloadKind::MalformedChannelData => {
                Err(DropReason::UnknownPayload)
            }
            _ => Ok(Arrival { kind, payload, datagram, channel }),
        }
    }

    /// Something went out on a channel.
    #[inline]
    pub fn on_sent(&mut self, key: ChannelKey, now: Instant) {
        if let Some(channel) = self.channels.get_mut(&key) {
            channel.sent = true;
            self.report_at.get_or_insert(now + REPORT_INTERVAL);
        }
    }

    /// The handshake budget of a bound channel.
    pub fn handshakes(&mut self, key: ChannelKey) -> Option<&mut Bucket> {
        self.channels.get_mut(&key).map(|c| &mut c.handshakes)
    }

    /// When [`Demux::report`] has something to say.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.report_at
    }

    /// Not now: control has not fetched the last report. What was used stays marked.
    pub fn postpone_report(&mut self, now: Instant) {
        self.report_at = Some(now + REPORT_INTERVAL);
    }

    /// The channels used since the last report, if one is due.
    pub fn report(&mut self, now: Instant) -> Option<Vec<ChannelUse>> {
        self.report_at.take_if(|at| *at <= now)?;
        let used =
            self.channels.iter_mut().filter(|(_, c)| c.received || c.sent).map(|(key, channel)| ChannelUse {
                server: key.0,
                number: key.1,
                received: std::mem::take(&mut channel.received),
                sent: std::mem::take(&mut channel.sent),
            });
        Some(used.collect()).filter(|used: &Vec<_>| !used.is_empty())
    }
}
