//! Last step of the inbound walk: encrypt, frame, hand to the sink. Also the way out of everything we say ourselves.
//! Knows a client's link and the channels; no rule.

use std::time::Instant;

use gateway_common::{DropReason, channel_data};

use super::{
    demux::{ChannelKey, Demux},
    ecn,
    peer::Link,
};
use crate::{Ecn, Route, Sink, addr::WIREGUARD_OVERHEAD, command::Path};

/// Encrypts one inner packet to the client; the outer packet carries its ECN codepoint. True if it left by a relay.
#[inline]
pub fn seal(
    link: &mut Link,
    packet: &[u8],
    demux: &mut Demux,
    now: Instant,
    sink: &mut impl Sink,
) -> Result<bool, DropReason> {
    let way = way(link.path, ecn::of(packet)).ok_or(DropReason::Connecting)?;
    if !link.wg.is_sendable(now) {
        return Err(DropReason::NoSession);
    }
    // To the byte: a datagram joins a batch only if it cannot be longer than those in it.
    let len = packet.len() + WIREGUARD_OVERHEAD;
    let out = sink.reserve_datagram(&way.route, way.header_len() + len).ok_or(DropReason::Backpressure)?;
    let len = link.wg.seal(packet, &mut out[way.header_len()..], now).ok_or(DropReason::NoSession)?;
    way.finish(out, len).ok_or(DropReason::OversizedInner)?;
    sink.commit_datagram(way.header_len() + len);
    if let Some(key) = way.channel {
        demux.on_sent(key, now);
    }
    Ok(way.channel.is_some())
}

/// Sends a WireGuard message that `link.wg` made, or holds it until there is a path ("a handshake response is not
/// sent on the arrival path but on the nominated one").
pub fn message(link: &mut Link, message: &[u8], demux: &mut Demux, now: Instant, sink: &mut impl Sink) {
    match way(link.path, Ecn::NotEct) {
        Some(way) => copy(&way, message, demux, now, sink),
        None => link.hold(message),
    }
}

/// The path may have changed: what waited for one leaves.
pub fn held(link: &mut Link, demux: &mut Demux, now: Instant, sink: &mut impl Sink) {
    if let Some(way) = way(link.path, Ecn::NotEct) {
        for message in link.held.drain(..) {
            copy(&way, &message, demux, now, sink);
        }
    }
}

/// Sends `message` back the way a datagram came.
pub fn reply(
    route: Route,
    channel: Option<ChannelKey>,
    message: &[u8],
    demux: &mut Demux,
    now: Instant,
    sink: &mut impl Sink,
) {
    copy(&Way { route, channel }, message, demux, now, sink);
}

/// Our own messages are repeated by timers, so a full way out needs no answer here.
fn copy(way: &Way, message: &[u8], demux: &mut Demux, now: Instant, sink: &mut impl Sink) {
    let header = way.header_len();
    let Some(out) = sink.reserve_datagram(&way.route, header + message.len()) else { return };
    out[header..header + message.len()].copy_from_slice(message);
    if way.finish(out, message.len()).is_none() {
        return;
    }
    sink.commit_datagram(header + message.len());
    if let Some(key) = way.channel {
        demux.on_sent(key, now);
    }
}

struct Way {
    route: Route,
    channel: Option<ChannelKey>,
}

/// `None` without a path, and while control is still binding its channel.
#[inline]
fn way(path: Option<Path>, ecn: Ecn) -> Option<Way> {
    Some(match path? {
        Path::Direct { local, remote } => {
            Way { route: Route { src: Some(local), dst: remote, ecn }, channel: None }
        }
        Path::Relayed { server, channel, .. } => {
            Way { route: Route { src: None, dst: server, ecn }, channel: Some((server, channel?)) }
        }
    })
}

impl Way {
    #[inline]
    fn header_len(&self) -> usize {
        if self.channel.is_some() { channel_data::HEADER_LEN } else { 0 }
    }

    /// Writes the ChannelData header in front of `len` bytes, if the way needs one.
    #[inline]
    fn finish(&self, out: &mut [u8], len: usize) -> Option<()> {
        if let Some((_, number)) = self.channel {
            *out.first_chunk_mut()? = channel_data::header(number, len)?;
        }
        Some(())
    }
}
