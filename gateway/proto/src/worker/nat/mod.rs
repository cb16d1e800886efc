//! The address translation for DNS resources (packets.md section 5): a client talks to proxy addresses, the resource
//! sees its own. One [`Nat`] per client, both families.
//!
//! This file is the order of steps for one packet. It must not know a checksum, a lifetime or a free port.
//!
//! ```text
//! outbound   packet -> key Inside  -> table (find, or open: ports) -> rewrite: dst := real,  src port := outside
//! inbound    packet -> key Outside -> table (find, or expired)     -> rewrite: src := proxy, dst port := inside
//! error      packet -> icmp (whose packet is embedded) -> table    -> icmp (translate outside and inside)
//! time       wheel -> table (end) -> expired
//! ```
//!
//! Hits allocate nothing. No clock is read: `now` comes in, and must not go backwards by much.

mod expired;
pub(super) mod expiry;
mod fifo;
#[cfg(test)]
mod garbage;
mod icmp;
mod key;
#[cfg(test)]
mod model;
#[cfg(test)]
pub(super) mod packets;
mod ports;
mod rewrite;
mod table;
#[cfg(test)]
mod tests;

use std::{net::IpAddr, time::Instant};

pub(super) use self::key::Secret;
pub use self::{
    expired::EXPIRED_FOR,
    key::{Inside, Kind, Outside},
    table::Limits,
};
use self::{
    expiry::Slot,
    rewrite::Side,
    table::{Direction, Refused, Table},
};
use super::inner::{Inner, Transport};

/// One client's translation.
pub struct Nat {
    table: Table,
}

/// Why a client's packet is not translated. It is unchanged then, and to be dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NatRefusal {
    /// "Works for TCP, UDP, ICMP echo" only.
    #[error("only TCP, UDP and ICMP echo can be translated")]
    Unsupported,
    /// There is no NAT64: the real address must be of the packet's family.
    #[error("the real address is of the other family")]
    OtherFamily,
    /// All ports towards the real address are taken for this kind.
    #[error("no port is free towards the real address")]
    Exhausted,
    /// The client has as many sessions as one may have, and all were answered.
    #[error("the client has too many sessions")]
    Full,
}

impl From<Refused> for NatRefusal {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Exhausted => Self::Exhausted,
            Refused::Full => Self::Full,
        }
    }
}

/// What became of a resource's packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inbound {
    /// It is translated; this is the session's outside key, as the packet named it before.
    Rewritten(Outside),
    /// It is late: its session has ended. Drop it; it is no CIDR traffic.
    Expired,
    /// It belongs to no session and is unchanged: CIDR traffic, if anything.
    Miss,
}

impl Nat {
    /// An empty table. `seed` is random and this table's own: the keys are the client's choice.
    #[must_use]
    pub fn new(seed: u64, limits: Limits, now: Instant) -> Self {
        Self { table: Table::new(seed, limits, now) }
    }

    /// How many sessions there are.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.table.len()
    }

    /// How many ended sessions are remembered.
    #[must_use]
    pub fn expired(&self) -> usize {
        self.table.expired_len()
    }

    /// Translates a client's packet to a proxy address, whose real address is `real` at present. Says how the resource
    /// knows the session.
    ///
    /// `view` is that of `packet`, and is kept up to date. A session that exists keeps the real address it began with.
    ///
    /// # Errors
    /// The packet is unchanged and to be dropped.
    #[inline]
    pub fn outbound(
        &mut self,
        packet: &mut [u8],
        view: &mut Inner,
        real: IpAddr,
        now: Instant,
    ) -> Result<Outside, NatRefusal> {
        let (kind, port) = session_key(packet, view, Side::Source).ok_or(NatRefusal::Unsupported)?;
        let inside = Inside::new(kind, port, view.dst);
        let slot = match self.table.find_inside(&inside) {
            Some(slot) => slot,
            None => self.open(inside, real, now)?,
        };
        let flags = flags(packet, view);
        self.table.on_packet(slot, Direction::Outbound, flags, now);
        let outside = self.table.outside(slot);
        rewrite::rewrite(packet, view, Side::Destination, outside.real(), outside.port());
        Ok(outside)
    }

    /// Translates a resource's packet back, if it belongs to a session.
    ///
    /// `view` is that of `packet`, and is kept up to date.
    #[inline]
    pub fn inbound(&mut self, packet: &mut [u8], view: &mut Inner, now: Instant) -> Inbound {
        let Some((kind, port)) = session_key(packet, view, Side::Destination) else { return Inbound::Miss };
        let outside = Outside::new(kind, port, view.src);
        let slot = match self.find(&outside, now) {
            Ok(slot) => slot,
            Err(other) => return other,
        };
        let flags = flags(packet, view);
        self.table.on_packet(slot, Direction::Inbound, flags, now);
        let inside = self.table.inside(slot);
        rewrite::rewrite(packet, view, Side::Source, inside.proxy(), inside.port());
        Inbound::Rewritten(outside)
    }

    /// Translates an ICMP error of the network that is about a session's packet: the client sees it about the packet it
    /// sent, and from the proxy address, whichever router it is from.
    ///
    /// `view` is that of `packet`, and is kept up to date. A miss is an error about CIDR traffic, or about nothing that
    /// the client sent, or not readable: see [`embedded`](super::inner::embedded). A hit is an answer: it confirms the
    /// session and prolongs its life.
    pub fn inbound_error(&mut self, packet: &mut [u8], view: &mut Inner, now: Instant) -> Inbound {
        let Some(about) = icmp::about(packet, view) else { return Inbound::Miss };
        let slot = match self.find(&about.outside, now) {
            Ok(slot) => slot,
            Err(other) => return other,
        };
        self.table.on_packet(slot, Direction::Inbound, 0, now);
        icmp::translate(packet, view, &about, self.table.inside(slot));
        Inbound::Rewritten(about.outside)
    }

    /// Ends the sessions whose time is up. Costs what it ends, and one look per session and lifetime; if many end at
    /// once, it stops after 256, and [`Nat::poll_timeout`] is in the past.
    ///
    /// A lifetime ends at the first call in or after the whole second (counted from the table's beginning) it falls
    /// into, rounded up.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.table.handle_timeout(now);
    }

    /// When [`Nat::handle_timeout`] has something to do next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.table.poll_timeout()
    }

    /// Ends the sessions of `proxies` (ascending): these were given to another name (packets.md section 5.1). Looks at
    /// every session, once.
    pub fn forget(&mut self, proxies: &[IpAddr], now: Instant) {
        self.table.forget(proxies, now);
    }

    /// Forgets all sessions, the ended ones too: the client is another.
    pub fn clear(&mut self) {
        self.table.clear();
    }

    #[cold]
    fn open(&mut self, inside: Inside, real: IpAddr, now: Instant) -> Result<Slot, NatRefusal> {
        if real.is_ipv4() != inside.proxy().is_ipv4() {
            return Err(NatRefusal::OtherFamily);
        }
        Ok(self.table.open(inside, Outside::new(inside.kind(), inside.port(), real), now)?)
    }

    #[inline]
    fn find(&self, outside: &Outside, now: Instant) -> Result<Slot, Inbound> {
        match self.table.find_outside(outside) {
            Some(slot) => Ok(slot),
            None if self.table.is_expired(outside, now) => Err(Inbound::Expired),
            None => Err(Inbound::Miss),
        }
    }
}

#[inline]
fn session_key(packet: &[u8], view: &Inner, side: Side) -> Option<(Kind, u16)> {
    let kind = match view.transport {
        Transport::Tcp { .. } => Kind::Tcp,
        Transport::Udp { .. } => Kind::Udp,
        Transport::IcmpEcho => Kind::Echo,
        Transport::IcmpError | Transport::Icmp(_) | Transport::Other(_) => return None,
    };
    Some((kind, rewrite::port(packet, view, side)?))
}

/// The TCP flags, or 0.
#[inline]
fn flags(packet: &[u8], view: &Inner) -> u8 {
    match view.transport {
        Transport::Tcp { .. } => packet[view.transport_at + 13],
        _ => 0,
    }
}
