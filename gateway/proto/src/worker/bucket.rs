//! A token bucket: what limits handshakes and generated ICMP. Knows nothing of what it limits.

use std::time::{Duration, Instant};

/// How fast a [`Bucket`] fills and how much it holds.
#[derive(Debug, Clone, Copy)]
pub struct Rate {
    /// Tokens gained each second.
    pub per_second: u32,
    /// Tokens at most.
    pub burst: u32,
}

/// A bucket, full at first.
///
/// Stored as the instant at which it was, or will have been, empty: one word instead of a level and a time.
#[derive(Debug, Clone, Copy)]
pub struct Bucket {
    empty_at: Option<Instant>,
}

impl Bucket {
    /// A full one.
    pub const FULL: Self = Self { empty_at: None };

    /// Takes one token if there is one.
    pub fn take(&mut self, rate: Rate, now: Instant) -> bool {
        let after = self.after_one(rate, now);
        if after > now {
            return false;
        }
        self.empty_at = Some(after);
        true
    }

    /// Is there a token?
    pub fn has(&self, rate: Rate, now: Instant) -> bool {
        self.after_one(rate, now) <= now
    }

    /// `empty_at` with one token less.
    fn after_one(&self, rate: Rate, now: Instant) -> Instant {
        let token = Duration::from_secs(1) / rate.per_second;
        let full = now.checked_sub(token * rate.burst).unwrap_or(now);
        let empty_at = self.empty_at.map_or(full, |at| at.max(full));
        empty_at + token
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_burst_passes_and_then_the_rate() {
        let rate = Rate { per_second: 10, burst: 5 };
        #[expect(clippy::disallowed_methods, reason = "a test needs some instant to count from")]
        let start = Instant::now() + Duration::from_secs(3600);
        let mut bucket = Bucket::FULL;
        let took = |bucket: &mut Bucket, at| {
            let mut took = 0;
            while bucket.has(rate, at) {
                assert!(bucket.take(rate, at), "what is there can be taken");
                took += 1;
            }
            assert!(!bucket.take(rate, at), "what is not there cannot");
            took
        };
        assert_eq!(took(&mut bucket, start), 5);
        assert_eq!(took(&mut bucket, start + Duration::from_millis(99)), 0);
        assert_eq!(took(&mut bucket, start + Duration::from_millis(100)), 1);
        assert_eq!(took(&mut bucket, start + Duration::from_millis(420)), 3);
        assert_eq!(
            took(&mut bucket, start + Duration::from_secs(60)),
            5,
            "it never holds more than the burst"
        );
    }
}
