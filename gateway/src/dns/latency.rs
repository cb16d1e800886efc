//! How long answers take, as histograms: one thread counts, any may read.

use std::{
    array::from_fn,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use hickory_proto::{op::ResponseCode, rr::RecordType};

/// Upper ends of the buckets, in milliseconds (`dns.lookup.duration` in cli-and-service.md section 15.3); what took longer is in
/// one more.
pub const BOUNDS_MS: [u64; 14] = [5, 10, 25, 50, 75, 100, 250, 500, 750, 1000, 2500, 5000, 7500, 10_000];

macro_rules! labels {
    ($(#[doc = $doc:literal] $enum:ident { $(#[doc = $of:literal] $name:ident = $label:literal,)+ })+) => {$(
        #[doc = $doc]
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $enum { $(#[doc = $of] $name,)+ }

        impl $enum {
            /// Each of them, in the order of the discriminants.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];
            /// What it is called in metrics.
            pub const fn label(self) -> &'static str {
                match self { $(Self::$name => $label,)+ }
            }
        }
    )+};
}

labels! {
    /// For whom something was asked.
    Purpose {
        /// A query that a client sent to our servers.
        Client = "client",
        /// The addresses of a DNS resource.
        Resource = "resource",
    }
    /// What was asked for.
    Kind {
        /// IPv4 addresses.
        A = "A",
        /// IPv6 addresses.
        Aaaa = "AAAA",
        /// Anything else.
        Other = "other",
    }
    /// What came of it: the RCODE for clients, and for resources what the look-up says.
    Verdict {
        /// The RCODE, or at least one address.
        NoError = "NOERROR",
        /// The RCODE.
        FormErr = "FORMERR",
        /// The RCODE.
        ServFail = "SERVFAIL",
        /// The RCODE.
        NxDomain = "NXDOMAIN",
        /// The RCODE.
        NotImp = "NOTIMP",
        /// The RCODE.
        Refused = "REFUSED",
        /// Another RCODE.
        Other = "other",
        /// Of resources: no address, NXDOMAIN or none of this family.
        Empty = "empty",
        /// Nobody had an answer.
        Failed = "failed",
        /// Nobody had one in time.
        TimedOut = "timed_out",
    }
}

impl From<RecordType> for Kind {
    fn from(kind: RecordType) -> Self {
        match kind {
            RecordType::A => Self::A,
            RecordType::AAAA => Self::Aaaa,
            _ => Self::Other,
        }
    }
}

impl From<ResponseCode> for Verdict {
    fn from(code: ResponseCode) -> Self {
        match code {
            ResponseCode::NoError => Self::NoError,
            ResponseCode::FormErr => Self::FormErr,
            ResponseCode::ServFail => Self::ServFail,
            ResponseCode::NXDomain => Self::NxDomain,
            ResponseCode::NotImp => Self::NotImp,
            ResponseCode::Refused => Self::Refused,
            _ => Self::Other,
        }
    }
}

/// One histogram for each combination.
#[derive(Debug)]
pub struct Latencies(Box<[Cells]>);

/// Of one combination.
#[derive(Debug, Default)]
struct Cells {
    /// The last: longer than all bounds.
    buckets: [AtomicU64; BOUNDS_MS.len() + 1],
    sum_us: AtomicU64,
}

/// What one histogram shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// For whom.
    pub purpose: Purpose,
    /// What.
    pub kind: Kind,
    /// And what came of it.
    pub verdict: Verdict,
    /// How many fell into each bucket, the last for those above all [`BOUNDS_MS`]; not cumulated.
    pub buckets: [u64; BOUNDS_MS.len() + 1],
    /// How long all of them took.
    pub sum: Duration,
}

impl Default for Latencies {
    fn default() -> Self {
        let combinations = Purpose::ALL.len() * Kind::ALL.len() * Verdict::ALL.len();
        Self((0..combinations).map(|_| Cells::default()).collect())
    }
}

impl Latencies {
    /// One more that took so long.
    pub fn note(&self, purpose: Purpose, kind: Kind, verdict: Verdict, took: Duration) {
        let cells = &self.0[index(purpose, kind, verdict)];
        let bucket = BOUNDS_MS.partition_point(|bound| Duration::from_millis(*bound) < took);
        cells.buckets[bucket].fetch_add(1, Relaxed);
        cells.sum_us.fetch_add(u64::try_from(took.as_micros()).unwrap_or(0), Relaxed);
    }

    /// Every histogram that is not empty.
    pub fn seen(&self) -> impl Iterator<Item = Seen> + '_ {
        let kinds = |purpose| Kind::ALL.iter().map(move |kind| (purpose, *kind));
        let pairs = Purpose::ALL.iter().flat_map(move |purpose| kinds(*purpose));
        let all = pairs.flat_map(|(purpose, kind)| Verdict::ALL.iter().map(move |of| (purpose, kind, *of)));
        all.filter_map(|(purpose, kind, verdict)| {
            let cells = &self.0[index(purpose, kind, verdict)];
            let buckets = from_fn(|at| cells.buckets[at].load(Relaxed));
            let sum = Duration::from_micros(cells.sum_us.load(Relaxed));
            let is_empty = buckets.iter().all(|count| *count == 0);
            (!is_empty).then_some(Seen { purpose, kind, verdict, buckets, sum })
        })
    }
}

const fn index(purpose: Purpose, kind: Kind, verdict: Verdict) -> usize {
    (purpose as usize * Kind::ALL.len() + kind as usize) * Verdict::ALL.len() + verdict as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_combination_has_its_own_cells() {
        let latencies = Latencies::default();
        assert_eq!(latencies.seen().count(), 0);
        let mut count = 0;
        for purpose in Purpose::ALL {
            for kind in Kind::ALL {
                for verdict in Verdict::ALL {
                    count += 1;
                    (0..count).for_each(|_| latencies.note(*purpose, *kind, *verdict, Duration::ZERO));
                }
            }
        }
        for (seen, expect) in latencies.seen().zip(1..) {
            assert_eq!(seen.buckets[0], expect, "{seen:?}");
        }
        assert_eq!(latencies.seen().count(), 60);
    }

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        // Microseconds, bucket.
        let table =
            [(0, 0), (5000, 0), (5001, 1), (10_000, 1), (999_999, 9), (10_000_000, 13), (10_000_001, 14)];
        for (took, bucket) in table {
            let latencies = Latencies::default();
            let took = Duration::from_micros(took);
            latencies.note(Purpose::Client, Kind::A, Verdict::NoError, took);
            let seen = latencies.seen().next().unwrap();
            let expect: [u64; 15] = from_fn(|at| u64::from(at == bucket));
            assert_eq!((seen.buckets, seen.sum), (expect, took), "{took:?}");
        }
    }
}
