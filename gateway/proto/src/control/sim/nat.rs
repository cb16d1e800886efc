//! A router that translates addresses, in the two extremes of RFC 4787.

use std::{
    collections::{BTreeMap, HashSet},
    net::SocketAddr,
};

use crate::relay::twin::Packet;

/// A translating router in front of a peer.
#[derive(Debug)]
pub(in crate::control) struct Nat {
    kind: NatKind,
    pub(super) outside: SocketAddr,
    /// (inside, far end or nobody in particular) -> outside port, and which far ends it has sent to.
    mappings: BTreeMap<(SocketAddr, Option<SocketAddr>), u16>,
    opened: HashSet<(u16, SocketAddr)>,
    next_port: u16,
}

/// RFC 4787's two extremes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::control) enum NatKind {
    /// One mapping for all destinations, filtered by address and port.
    Cone,
    /// A mapping for each destination.
    Symmetric,
}

impl Nat {
    pub(in crate::control) fn new(kind: NatKind, outside: &str) -> Self {
        Self {
            kind,
            outside: SocketAddr::new(outside.parse().unwrap(), 0),
            mappings: BTreeMap::new(),
            opened: HashSet::new(),
            next_port: 40_000,
        }
    }

    pub(super) fn outbound(&mut self, packet: &mut Packet) {
        let far = (self.kind == NatKind::Symmetric).then_some(packet.dst);
        let port = *self.mappings.entry((packet.src, far)).or_insert_with(|| {
            self.next_port += 1;
            self.next_port
        });
        self.opened.insert((port, packet.dst));
        packet.src = SocketAddr::new(self.outside.ip(), port);
    }

    /// False if nothing lets it in.
    pub(super) fn inbound(&self, packet: &mut Packet) -> bool {
        let port = packet.dst.port();
        let inside =
            self.mappings.iter().find(|(_, mapped)| **mapped == port).map(|((inside, _), _)| *inside);
        match inside {
            Some(inside) if self.opened.contains(&(port, packet.src)) => {
                packet.dst = inside;
                true
            }
            _ => false,
        }
    }
}
