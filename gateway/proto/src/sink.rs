//! Bytes in and bytes out, in batches: what a worker reads and where its output goes.
//!
//! The worker never learns where a batch came from; the kernel backend, the XSK backend and the tests' in-memory
//! twin all implement [`Sink`].

use std::net::SocketAddr;

use crate::{ids::WorkerId, worker::Moved};

/// The ECN codepoint of an IP header (RFC 3168 section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum Ecn {
    /// 00
    #[default]
    NotEct = 0,
    /// 01
    Ect1 = 1,
    /// 10
    Ect0 = 2,
    /// 11: congestion experienced
    Ce = 3,
}

impl Ecn {
    /// The codepoint in the low two bits of a TOS byte or traffic class.
    #[inline]
    #[must_use]
    pub fn from_bits(tos: u8) -> Self {
        match tos & 3 {
            0 => Self::NotEct,
            1 => Self::Ect1,
            2 => Self::Ect0,
            _ => Self::Ce,
        }
    }
}

/// One received datagram: a UDP payload with the addresses it travelled between.
#[derive(Debug, Clone, Copy)]
pub struct Datagram<'a> {
    /// Our address and port: the packet's destination, never a wildcard.
    pub local: SocketAddr,
    /// The sender.
    pub from: SocketAddr,
    /// The outer codepoint.
    pub ecn: Ecn,
    /// The UDP payload.
    pub payload: &'a [u8],
}

/// Where a datagram goes. Datagrams with equal routes may share one GSO send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Route {
    /// The source address; `None` lets the kernel choose (towards relays, connections.md section 2.4).
    pub src: Option<SocketAddr>,
    /// The destination.
    pub dst: SocketAddr,
    /// The outer codepoint.
    pub ecn: Ecn,
}

/// One datagram of the control plane (STUN, TURN, ChannelData around a STUN check).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// The source address; `None` lets the kernel choose.
    pub src: Option<SocketAddr>,
    /// The destination.
    pub dst: SocketAddr,
    /// The UDP payload.
    pub payload: Vec<u8>,
}

/// What reached a worker and belongs to a client of another.
#[derive(Debug, Clone, Copy)]
pub struct Handover<'a> {
    /// How many workers have passed it on; a client that moves may be met one worker late.
    pub hops: u8,
    /// The thing itself.
    pub what: Passed<'a>,
}

/// See [`Handover`].
#[derive(Debug, Clone, Copy)]
pub enum Passed<'a> {
    /// A datagram as received, ChannelData header included.
    Datagram(Datagram<'a>),
    /// The same, an initiation that was checked (MAC1, budget) and opened where it arrived; it names this public key.
    Initiation(Datagram<'a>, [u8; 32]),
    /// An IP packet from the TUN device, checksums complete.
    Packet(&'a [u8]),
}

/// Where a worker's output goes: two reserve-then-commit queues.
///
/// A reservation that is not committed is forgotten by the next one of its kind. Both queues keep order within a
/// flow. `None` means the way out is full: the worker counts the packet as `Backpressure` and goes on.
pub trait Sink {
    /// At least `len` bytes to build one inner IP packet in, which [`Sink::commit_packet`] sends to the TUN.
    fn reserve_packet(&mut self, len: usize) -> Option<&mut [u8]>;
    /// Sends the first `len` bytes of the last packet reservation.
    fn commit_packet(&mut self, len: usize);
    /// At least `len` bytes to build one UDP payload for `route` in, which [`Sink::commit_datagram`] sends.
    fn reserve_datagram(&mut self, route: &Route, len: usize) -> Option<&mut [u8]>;
    /// Sends the first `len` bytes of the last datagram reservation.
    fn commit_datagram(&mut self, len: usize);
    /// Passes `handover` to worker `to`, behind everything passed to it before. False if there is no room for it: the
    /// worker counts it as `HandoverFull`.
    fn hand_over(&mut self, to: WorkerId, handover: &Handover<'_>) -> bool;
    /// Passes a client to worker `to`: that one sees it before anything that is handed over later. Never refused.
    fn give(&mut self, to: WorkerId, moved: Moved);
}
