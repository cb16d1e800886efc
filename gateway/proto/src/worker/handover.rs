//! Packets that reached a worker and belong to another's client: when they are passed on, and what becomes of those that
//! arrive that way. Knows where clients are; no header, no key.
//!
//! ```text
//! walk -> Peers::holder -> Stop::Pass(worker) -> Sink::hand_over ==ring==> handle_handovers -> the same walk
//! ```
//!
//! STUN is nobody's and goes to control from where it arrived. Everything else is counted once: by the worker that
//! holds the client, or by the one that could not pass it on.

use std::time::Instant;

use gateway_common::DropReason;

use super::Worker;
use crate::{Handover, Passed, Sink, WorkerId, addr::MAX_INNER};

/// Why a walk ends before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The packet is dropped.
    Drop(DropReason),
    /// It belongs to a client of this worker.
    Pass(WorkerId),
}

impl From<DropReason> for Stop {
    #[inline]
    fn from(reason: DropReason) -> Self {
        Self::Drop(reason)
    }
}

/// How a datagram came to this worker.
#[derive(Debug, Clone, Copy)]
pub struct Origin<'a> {
    /// How many workers have passed it on.
    pub hops: u8,
    /// One of them opened it: an initiation that names this public key.
    pub opened: Option<&'a [u8; 32]>,
}

impl Origin<'_> {
    /// By its own socket.
    pub const OUTSIDE: Self = Self { hops: 0, opened: None };
}

/// How often a packet is passed on at most. While a client moves from A to B, one may go to B, which waits, to A, which
/// has just given the client away, and to B; more is a disagreement that only dropping ends.
const MAX_HOPS: u8 = 3;

impl Worker {
    /// A batch of what other workers passed to this one. Before it, [`Worker::handle_moved`] must have had every client
    /// that was given earlier than the last of these was passed.
    pub fn handle_handovers<'a>(
        &mut self,
        batch: impl IntoIterator<Item = Handover<'a>>,
        now: Instant,
        sink: &mut impl Sink,
    ) {
        for Handover { hops, what } in batch {
            let done = match &what {
                Passed::Datagram(datagram) => {
                    self.handle_datagram(datagram, Origin { hops, opened: None }, now, sink)
                }
                Passed::Initiation(datagram, key) => {
                    self.handle_datagram(datagram, Origin { hops, opened: Some(key) }, now, sink)
                }
                Passed::Packet(packet) => self.handle_passed_packet(packet, now, sink),
            };
            if let Err(stop) = done {
                self.stop(stop, hops, what, sink);
            }
        }
    }

    /// The ring's copy is not ours to change.
    fn handle_passed_packet(
        &mut self,
        packet: &[u8],
        now: Instant,
        sink: &mut impl Sink,
    ) -> Result<(), Stop> {
        let mut copy = [0; MAX_INNER];
        let copy = copy.get_mut(..packet.len()).ok_or(DropReason::OversizedInner)?;
        copy.copy_from_slice(packet);
        self.handle_packet(copy, now, sink)
    }

    /// A walk that ended early: counts what is dropped and passes on what belongs elsewhere.
    pub(super) fn stop(&mut self, stop: Stop, hops: u8, what: Passed<'_>, sink: &mut impl Sink) {
        let passed = match stop {
            Stop::Pass(to) => pass(to, hops, what, sink),
            Stop::Drop(reason) => Err(reason),
        };
        if let Err(reason) = passed {
            self.counters.count(reason);
        }
    }
}

/// Passes `what`, which has been passed `hops` times before, to worker `to`.
pub fn pass(to: WorkerId, hops: u8, what: Passed<'_>, sink: &mut impl Sink) -> Result<(), DropReason> {
    let passed = hops < MAX_HOPS && sink.hand_over(to, &Handover { hops: hops + 1, what });
    if passed { Ok(()) } else { Err(DropReason::HandoverFull) }
}
