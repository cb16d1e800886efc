//! What the DNS servers count: one thread counts, any may read. The log gets what changed.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::latency::Latencies;
use crate::condition::Condition;

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    /// Messages that arrived over UDP.
    UdpQueries,
    /// Messages that arrived over TCP.
    TcpQueries,
    /// A nameserver's answer went back to a client.
    Answered,
    /// Of these, cut to what the client takes.
    Truncated,
    /// FORMERR, NOTIMP, or REFUSED for what we never forward.
    Rejected,
    /// REFUSED: a client was over its limit.
    OverClientLimit,
    /// SERVFAIL: all clients together were.
    OverLimit,
    /// SERVFAIL: no nameserver had an answer.
    Failed,
    /// Messages without an answer: responses, or shorter than an ID.
    Ignored,
    /// Answers that the kernel did not take.
    Unsent,
    /// TCP connections that were accepted.
    Connections,
    /// TCP connections that were closed to make room, or refused because nothing idle could be closed.
    ConnectionsDropped,
    /// A second or later nameserver, or the same again, was asked for one query.
    AskedAgain,
    /// Datagrams to an upstream socket that were no answer to its question.
    Strays,
    /// A nameserver cut its answer and was asked over TCP.
    UpstreamTruncated,
    /// Names that were looked up for control.
    LookUps,
    /// Of these, without an answer for one family at least, because nobody could tell.
    LookUpsFailed,
    /// Of these, without an answer for one family at least, because time ran out.
    LookUpsTimedOut,
}

const COUNTS: [(Count, &str); 18] = [
    (Count::UdpQueries, "UDP queries"),
    (Count::TcpQueries, "TCP queries"),
    (Count::Answered, "answered"),
    (Count::Truncated, "truncated"),
    (Count::Rejected, "rejected"),
    (Count::OverClientLimit, "over the client's limit"),
    (Count::OverLimit, "over the limit of all"),
    (Count::Failed, "failed"),
    (Count::Ignored, "ignored"),
    (Count::Unsent, "unsent"),
    (Count::Connections, "TCP connections"),
    (Count::ConnectionsDropped, "TCP connections dropped"),
    (Count::AskedAgain, "asked again"),
    (Count::Strays, "stray datagrams"),
    (Count::UpstreamTruncated, "truncated by a nameserver"),
    (Count::LookUps, "look-ups"),
    (Count::LookUpsFailed, "look-ups failed"),
    (Count::LookUpsTimedOut, "look-ups timed out"),
];

/// The counters, how long answers took, and whether the servers are there.
#[derive(Debug, Default)]
pub struct Stats {
    /// They listen on every address of the tunnel.
    pub listening: Condition,
    /// Until the answer was there, whatever it was.
    pub latencies: Latencies,
    now: [AtomicU64; COUNTS.len()],
    reported: [AtomicU64; COUNTS.len()],
}

impl Stats {
    /// One more.
    pub fn count(&self, what: Count) {
        self.now[what as usize].fetch_add(1, Relaxed);
    }

    /// How many there were since the start.
    pub fn get(&self, what: Count) -> u64 {
        self.now[what as usize].load(Relaxed)
    }

    /// Writes to the log what changed since the last call.
    pub fn report(&self) {
        for (what, label) in COUNTS {
            let total = self.get(what);
            let before = self.reported[what as usize].swap(total, Relaxed);
            if total > before {
                tracing::debug!(what = label, count = total - before, total, "DNS servers");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_count_has_its_own_cell_and_label() {
        let stats = Stats::default();
        for (index, (what, label)) in COUNTS.iter().enumerate() {
            assert_eq!(*what as usize, index, "{label}");
            (0..=index).for_each(|_| stats.count(*what));
            assert!(COUNTS[..index].iter().all(|(_, other)| other != label), "{label}");
        }
        for (index, (what, label)) in (1_u64..).zip(&COUNTS) {
            assert_eq!(stats.get(*what), index, "{label}");
        }
    }
}
