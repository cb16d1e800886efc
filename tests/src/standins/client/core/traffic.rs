//! Packets through the client: datagrams to the TUN, the TUN to datagrams.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use anyhow::{Context as _, Result};
use boringtun::noise::handshake::parse_handshake_anon;
use boringtun::noise::{Packet, Tunn};
use is::stun::StunMessage;
use uuid::Uuid;

use super::{Client, REQUEST_PAUSE, WAITING_LIMIT};
use crate::standins::client::config::Event;
use crate::standins::client::inner::{self, DomainStatus, Meaning};
use crate::standins::client::tun::{HEADROOM, Inside, Tun};
use crate::standins::client::turn::Received;
use crate::standins::client::udp::{Datagram, Inbox, Skimmed};

/// Reads of one source per turn of the loop.
const READS_PER_TURN: usize = 4;

impl Client {
    // ---- datagrams in -------------------------------------------------------------------------

    /// Reads both sockets and writes what was in them to the inside.
    pub(in crate::standins::client) fn read_udp(
        &mut self,
        now: Instant,
        inbox: &mut Inbox,
        inside: &mut dyn Inside,
    ) -> Result<()> {
        for v6 in [false, true] {
            for _ in 0..READS_PER_TURN {
                let sockets = &self.net.sockets;
                let Some(socket) = (if v6 { &sockets.v6 } else { &sockets.v4 }) else { break };
                if !socket.read(inbox)? {
                    break;
                }
                for datagram in inbox.datagrams() {
                    self.handle_datagram(&datagram, now);
                    if self.decrypted_count == tun_rs::IDEAL_BATCH_SIZE {
                        self.write_inside(inside);
                    }
                }
            }
        }
        self.write_inside(inside);
        Ok(())
    }

    fn write_inside(&mut self, inside: &mut dyn Inside) {
        let count = std::mem::take(&mut self.decrypted_count);
        if count > 0 && inside.write(&mut self.decrypted[..count]).is_err() {
            self.stats.dropped += 1;
        }
    }

    fn handle_datagram(&mut self, datagram: &Datagram<'_>, now: Instant) {
        let Datagram { from, local, congested, bytes } = *datagram;
        let Some(relay) = self.net.relay_by_server(from) else {
            return self.handle_peer(bytes, from, local, congested, now);
        };
        let Some(turn) = self.net.relays.get_mut(&relay) else { return };
        match turn.handle(local, bytes, now) {
            Received::Control => {}
            Received::Dropped => self.stats.dropped += 1,
            Received::Data { peer, relayed, payload } => {
                self.stats.rx_channel_data += 1;
                self.handle_peer(payload, peer, relayed, congested, now);
            }
        }
    }

    /// STUN or WireGuard, from a gateway's candidate to one of ours.
    fn handle_peer(&mut self, bytes: &[u8], from: SocketAddr, to: SocketAddr, congested: bool, now: Instant) {
        if let Ok(message) = StunMessage::parse(bytes) {
            match self.connections.values_mut().find(|c| c.accepts(&message)) {
                Some(connection) => connection.handle_stun(&message, from, to, now),
                None => self.stats.dropped += 1,
            }
            return;
        }
        let gateway = match Tunn::parse_incoming_packet(bytes) {
            Ok(Packet::HandshakeInit(init)) => {
                let half = parse_handshake_anon(&self.identity.private, &self.identity.public, &init).ok();
                half.and_then(|half| {
                    self.connections
                        .values()
                        .find(|c| c.grant.gateway_key == half.peer_static_public)
                        .map(|c| c.grant.gateway)
                })
            }
            Ok(Packet::HandshakeResponse(p)) => self.by_index.get(&(p.receiver_idx >> 8)).copied(),
            Ok(Packet::PacketCookieReply(p)) => self.by_index.get(&(p.receiver_idx >> 8)).copied(),
            Ok(Packet::PacketData(p)) => self.by_index.get(&(p.receiver_idx >> 8)).copied(),
            Err(_) => None,
        };
        match gateway {
            Some(gateway) => self.decrypt(gateway, bytes, congested, now),
            None => self.stats.dropped += 1,
        }
    }

    fn decrypt(&mut self, gateway: Uuid, bytes: &[u8], congested: bool, now: Instant) {
        let Some(connection) = self.connections.get_mut(&gateway) else { return };
        if self.decrypted_count == self.decrypted.len() {
            self.decrypted.push(Vec::new());
        }
        let buffer = &mut self.decrypted[self.decrypted_count];
        buffer.resize(HEADROOM + bytes.len().max(256), 0);
        let mut length = None;
        let good = connection
            .handle_wireguard(bytes, &mut buffer[HEADROOM..], &mut self.net, now, |n| length = Some(n));
        if !good {
            self.stats.dropped += 1;
        }
        let Some(length) = length else { return };
        buffer.truncate(HEADROOM + length);
        let packet = &mut buffer[HEADROOM..];
        if congested {
            inner::mark_congestion(packet);
        }
        self.stats.rx_packets += 1;
        self.stats.rx_bytes += length as u64;
        self.stats.rx_ce += u64::from(inner::ecn(packet) == 3);
        match inner::meaning(packet) {
            Meaning::Ordinary => self.decrypted_count += 1,
            Meaning::Prohibited(dst) => {
                self.decrypted_count += 1;
                (self.emit)(Event::IcmpProhibited { dst });
                if self.config.on_demand {
                    self.request_again(dst, now);
                }
            }
            Meaning::Unreachable(dst) => {
                self.decrypted_count += 1;
                (self.emit)(Event::IcmpUnreachable { dst });
            }
            Meaning::Goodbye => {
                (self.emit)(Event::Goodbye { gateway });
                self.close(gateway, "goodbye");
            }
            Meaning::DomainStatus(DomainStatus { resource, domain, status }) => {
                (self.emit)(Event::DomainStatus { resource, domain, status });
            }
            Meaning::Control => {}
        }
    }

    // ---- loads --------------------------------------------------------------------------------

    /// Appends a packet, encrypted for the one gateway, to `sealed`; [`Self::send_sealed`] sends it later.
    ///
    /// # Errors
    /// If there is no session.
    pub(in crate::standins::client) fn seal(&mut self, packet: &[u8], sealed: &mut Vec<u8>) -> Result<()> {
        let connection = self.connections.values_mut().next().context("there is no connection")?;
        connection.seal(packet, sealed)
    }

    /// Sends datagrams of `segment` bytes each by one call.
    ///
    /// # Errors
    /// If there is no direct path, or the socket refuses.
    pub(in crate::standins::client) fn send_sealed(&mut self, segment: usize, sealed: &[u8]) -> Result<()> {
        let connection = self.connections.values().next().context("there is no connection")?;
        let (local, remote) = connection.direct().context("the path is not direct")?;
        let sockets = &self.net.sockets;
        let socket = if remote.is_ipv4() { &sockets.v4 } else { &sockets.v6 };
        let socket = socket.as_ref().context("no socket of this family")?;
        Ok(socket.send(Some(local.ip()), remote, 0, Some(segment), sealed)?)
    }

    /// Lets the IPv4 socket hold what a load brings while we have no core.
    ///
    /// # Errors
    /// Without the right to go beyond the kernel's limit.
    pub(in crate::standins::client) fn widen(&self) -> Result<()> {
        Ok(self.net.sockets.v4.as_ref().context("a socket for IPv4")?.widen()?)
    }

    /// Counts and throws away WireGuard data messages of `length` bytes that wait on the IPv4 socket, up to the first
    /// datagram that is something else.
    ///
    /// # Errors
    /// If the socket fails.
    pub(in crate::standins::client) fn skim(&self, length: usize) -> Result<Skimmed> {
        Ok(self.net.sockets.v4.as_ref().context("a socket for IPv4")?.skim(length)?)
    }

    /// "My authorization is gone" (packets.md section 4.5).
    fn request_again(&mut self, dst: IpAddr, now: Instant) {
        if let Some(id) = self.resource_for(dst)
            && let Some(resource) = self.resources.get_mut(&id)
            && resource.requested.is_none_or(|at| now >= at + REQUEST_PAUSE)
        {
            resource.granted = None;
            resource.requested = Some(now);
            self.deferred.push((id, now));
        }
    }

    // ---- packets out --------------------------------------------------------------------------

    /// Reads the TUN and encrypts what was in it.
    pub(in crate::standins::client) fn read_tun(&mut self, now: Instant, tun: &mut Tun) -> Result<()> {
        for _ in 0..READS_PER_TURN {
            if !tun.read(|packet| self.handle_packet(packet, now))? {
                break;
            }
        }
        self.net.flush();
        Ok(())
    }

    fn handle_packet(&mut self, packet: &mut [u8], now: Instant) {
        let Some(dst) = inner::destination(packet) else { return };
        if let Some(source) = self.config.spoof_source {
            inner::set_source(packet, source);
        }
        let resource = self.resource_for(dst);
        let granted = resource.and_then(|id| self.resources.get(&id)?.granted);
        if let Some(id) = resource
            && granted.is_none()
            && let Some(known) = self.resources.get_mut(&id)
        {
            let asked = known.requested.is_some();
            if asked || self.config.on_demand {
                if known.waiting.len() == WAITING_LIMIT {
                    known.waiting.pop_front();
                }
                known.waiting.push_back(packet.to_vec());
                if known.requested.is_none_or(|at| self.config.on_demand && now >= at + REQUEST_PAUSE) {
                    known.requested = Some(now);
                    self.deferred.push((id, now));
                }
                return;
            }
        }
        // Without a grant the gateway shall be the one to refuse it, if there is a gateway.
        let connection = match granted {
            Some(gateway) => self.connections.get_mut(&gateway),
            None => self.connections.values_mut().find(|c| c.is_established()),
        };
        match connection {
            Some(connection) => {
                self.stats.tx_packets += 1;
                self.stats.tx_bytes += packet.len() as u64;
                connection.send(packet, &mut self.net, now);
            }
            None => self.stats.dropped += 1,
        }
    }

    /// The most specific resource that covers this address; among equals a granted one.
    fn resource_for(&self, dst: IpAddr) -> Option<Uuid> {
        self.resources
            .iter()
            .filter_map(|(id, r)| {
                r.network.filter(|n| n.contains(&dst)).map(|n| (n.prefix_len(), r.granted.is_some(), *id))
            })
            .max()
            .map(|(_, _, id)| id)
    }
}
