//! What one worker counts, where others may read it at any time: one writer, no lock, nothing that two workers share.
//!
//! The worker stores everything once at the end of each turn, however many packets that was: plain stores to lines that
//! its core owns until somebody asks. A reader may see figures of two turns mixed, or bytes without their packets; they
//! only ever grow, and the next look has the rest.

use std::{
    array::from_fn,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use gateway_common::{Counters, DropReason};
use gateway_proto::worker::{Traffic, Volume};

/// The figures. Two lines apart from everything else: processors fetch lines in pairs.
#[derive(Debug)]
#[repr(align(128))]
pub struct Figures {
    drops: [AtomicU64; DropReason::COUNT],
    traffic: [AtomicU64; TRAFFIC],
    /// In nanoseconds.
    busy: AtomicU64,
    handed_over: AtomicU64,
    given: AtomicU64,
}

/// Numbers in a [`Traffic`].
const TRAFFIC: usize = 15;

/// What a worker did besides packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Work {
    /// How long it did not sleep.
    pub busy: Duration,
    /// Packets that it passed to other workers.
    pub handed_over: u64,
    /// Clients that it gave to other workers.
    pub given: u64,
}

impl Default for Figures {
    fn default() -> Self {
        let zero = AtomicU64::default;
        Self {
            drops: from_fn(|_| zero()),
            traffic: from_fn(|_| zero()),
            busy: zero(),
            handed_over: zero(),
            given: zero(),
        }
    }
}

impl Figures {
    /// The worker's: this is what it did since it began.
    #[inline]
    pub fn store(&self, drops: &Counters, traffic: &Traffic, work: Work) {
        for (cell, value) in self.drops.iter().zip(drops.values()) {
            cell.store(*value, Relaxed);
        }
        for (cell, value) in self.traffic.iter().zip(to_array(traffic)) {
            cell.store(value, Relaxed);
        }
        // 584 years.
        self.busy.store(u64::try_from(work.busy.as_nanos()).unwrap_or(u64::MAX), Relaxed);
        self.handed_over.store(work.handed_over, Relaxed);
        self.given.store(work.given, Relaxed);
    }

    /// Packets dropped, by reason.
    pub fn drops(&self) -> Counters {
        Counters::from(from_fn(|at| self.drops[at].load(Relaxed)))
    }

    /// What was not dropped.
    pub fn traffic(&self) -> Traffic {
        from_array(from_fn(|at| self.traffic[at].load(Relaxed)))
    }

    /// The rest.
    pub fn work(&self) -> Work {
        Work {
            busy: Duration::from_nanos(self.busy.load(Relaxed)),
            handed_over: self.handed_over.load(Relaxed),
            given: self.given.load(Relaxed),
        }
    }
}

/// Every field, so that one more does not compile.
#[inline]
fn to_array(traffic: &Traffic) -> [u64; TRAFFIC] {
    let Traffic {
        outbound_direct,
        outbound_relayed,
        inbound_direct,
        inbound_relayed,
        keepalives,
        handshakes,
        control,
        stun,
        denials,
        answers,
        flow_reports_lost,
    } = *traffic;
    let volumes = [outbound_direct, outbound_relayed, inbound_direct, inbound_relayed];
    let [[a, b], [c, d], [e, f], [g, h]] = volumes.map(|volume| [volume.packets, volume.bytes]);
    let others = [keepalives, handshakes, control, stun, denials, answers, flow_reports_lost];
    let [i, j, k, l, m, n, o] = others;
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o]
}

fn from_array(array: [u64; TRAFFIC]) -> Traffic {
    let volume = |at: usize| Volume { packets: array[at], bytes: array[at + 1] };
    let [.., keepalives, handshakes, control, stun, denials, answers, flow_reports_lost] = array;
    Traffic {
        outbound_direct: volume(0),
        outbound_relayed: volume(2),
        inbound_direct: volume(4),
        inbound_relayed: volume(6),
        keepalives,
        handshakes,
        control,
        stun,
        denials,
        answers,
        flow_reports_lost,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_stored_is_what_is_read_and_no_figure_takes_another_ones_place() {
        let mut drops = Counters::default();
        for (at, reason) in (1..).zip(DropReason::ALL) {
            drops.add(*reason, at);
        }
        let traffic = from_array(from_fn(|at| at as u64 + 1000));
        let volumes = [
            traffic.outbound_direct,
            traffic.outbound_relayed,
            traffic.inbound_direct,
            traffic.inbound_relayed,
        ];
        assert_eq!(volumes.map(|volume| volume.packets), [1000, 1002, 1004, 1006]);
        assert_eq!((traffic.keepalives, traffic.flow_reports_lost), (1008, 1014));
        let work = Work { busy: Duration::from_nanos(7_000_000_001), handed_over: 8, given: 9 };
        let figures = Figures::default();
        figures.store(&drops, &traffic, work);
        assert_eq!(figures.drops(), drops);
        assert_eq!(figures.traffic(), traffic);
        assert_eq!(figures.work(), work);
    }
}
