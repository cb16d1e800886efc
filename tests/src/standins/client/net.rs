//! How datagrams leave: directly, or as ChannelData through one of our relays.
//!
//! Holds the sockets and the relays, because almost everything that is sent needs both.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Instant;

use boringtun::noise::{Tunn, TunnResult};

use super::inner;
use super::turn::{RelayId, Turn};
use super::udp::{Burst, Sockets};

/// What WireGuard adds to an inner packet.
pub(super) const WIREGUARD_OVERHEAD: usize = 32;
/// boringtun wants room for a handshake even when it writes data.
const MIN_BUFFER: usize = 148;

/// The pair ICE chose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// From this socket of ours.
    Direct { local: SocketAddr, remote: SocketAddr },
    /// Through this relay.
    Relayed { relay: RelayId, remote: SocketAddr },
}

/// See the file's head.
pub(super) struct Net {
    pub(super) sockets: Sockets,
    pub(super) relays: BTreeMap<RelayId, Turn>,
    burst: Burst,
}

impl Net {
    pub(super) fn new(sockets: Sockets) -> Self {
        Self { sockets, relays: BTreeMap::new(), burst: Burst::default() }
    }

    /// Which of our relays has this address?
    pub(super) fn relay_of(&self, relayed: SocketAddr) -> Option<RelayId> {
        self.relays.iter().find(|(_, turn)| turn.relayed().contains(&relayed)).map(|(id, _)| *id)
    }

    /// The relay whose server this is.
    pub(super) fn relay_by_server(&self, server: SocketAddr) -> Option<RelayId> {
        self.relays.iter().find(|(_, turn)| turn.is_server(server)).map(|(id, _)| *id)
    }

    /// The nearest relay with an allocation.
    pub(super) fn best_relay(&self) -> Option<RelayId> {
        let usable = self.relays.iter().filter(|(_, turn)| !turn.relayed().is_empty());
        usable.min_by_key(|(_, turn)| turn.rtt()).map(|(id, _)| *id)
    }

    /// Sends one datagram: STUN, handshakes, keep-alives. Without a channel, a bind is started and it is lost.
    pub(super) fn send(&mut self, route: Route, bytes: &[u8], now: Instant) {
        self.burst.flush(&self.sockets);
        match route {
            Route::Direct { local, remote } => self.sockets.send(Some(local.ip()), remote, 0, None, bytes),
            Route::Relayed { relay, remote } => {
                let Some(turn) = self.relays.get_mut(&relay) else { return };
                let (Some((server, number)), Ok(length)) = (turn.channel(remote), u16::try_from(bytes.len()))
                else {
                    turn.bind(remote, now);
                    return;
                };
                let mut framed = Vec::with_capacity(bytes.len() + 4);
                framed.extend(number.to_be_bytes());
                framed.extend(length.to_be_bytes());
                framed.extend(bytes);
                self.sockets.send(None, server, 0, None, &framed);
            }
        }
    }

    /// Encrypts an inner packet into the current burst. Call [`Self::flush`] at the end of a batch.
    ///
    /// Returns a handshake initiation if the session had run out.
    pub(super) fn send_inner(
        &mut self,
        tunn: &mut Tunn,
        route: Route,
        packet: &[u8],
        now: Instant,
    ) -> Option<Vec<u8>> {
        let encrypted = packet.len() + WIREGUARD_OVERHEAD;
        let (source, to, channel) = match route {
            Route::Direct { local, remote } => (Some(local.ip()), remote, None),
            Route::Relayed { relay, remote } => {
                let turn = self.relays.get_mut(&relay)?;
                let Some((server, number)) = turn.channel(remote) else {
                    turn.bind(remote, now);
                    return None;
                };
                (None, server, Some(number))
            }
        };
        let framing = if channel.is_some() { 4 } else { 0 };
        let mut initiation = None;
        self.burst.add(&self.sockets, source, to, inner::ecn(packet), encrypted + framing, |buffer| {
            let start = buffer.len();
            if let (Some(number), Ok(length)) = (channel, u16::try_from(encrypted)) {
                buffer.extend(number.to_be_bytes());
                buffer.extend(length.to_be_bytes());
            }
            let body = buffer.len();
            buffer.resize(body + encrypted.max(MIN_BUFFER), 0);
            let written = match tunn.encapsulate(packet, &mut buffer[body..]) {
                TunnResult::WriteToNetwork(datagram) if datagram.first() == Some(&4) => Some(datagram.len()),
                TunnResult::WriteToNetwork(datagram) => {
                    initiation = Some(datagram.to_vec());
                    None
                }
                _ => None,
            };
            buffer.truncate(written.map_or(start, |length| body + length));
        });
        initiation
    }

    /// Sends what [`Self::send_inner`] collected.
    pub(super) fn flush(&mut self) {
        self.burst.flush(&self.sockets);
    }

    /// Sends what the relays want sent.
    pub(super) fn drain_relays(&mut self) {
        for turn in self.relays.values_mut() {
            while let Some((server, bytes)) = turn.poll_transmit() {
                self.sockets.send(None, server, 0, None, &bytes);
            }
        }
    }
}
