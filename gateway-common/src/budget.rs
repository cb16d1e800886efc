//! How many handshakes the kernel lets through: a token bucket in one word, the same in the kernel and in user space.
//!
//! The word is the moment at which the bucket will be full again ("generic cell rate algorithm", ITU-T I.371 annex A), so
//! nothing has to be refilled. Time is an argument.

/// What a bucket lets through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// One packet in this time in the long run, ns.
    pub interval: u64,
    /// So many at once after silence.
    pub burst: u64,
}

/// Handshakes of one peer whose address ICE has authenticated, or on one channel. An honest peer sends one in two
/// minutes, or one in five seconds while it is not answered (connections.md section 10).
pub const PEER: Rate = Rate { interval: 200_000_000, burst: 10 };
/// Handshakes of everybody else together: 100 a second (design.md section 3).
pub const ANYONE: Rate = Rate { interval: 10_000_000, burst: 100 };

/// A bucket; all zeros is a full one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "user", derive(bytemuck::Pod, bytemuck::Zeroable))]
#[repr(C)]
pub struct Budget {
    /// When it will be full again, ns on the clock of [`spend`](Self::spend).
    pub full_at: u64,
}

const _: () = assert!(size_of::<Budget>() == 8);

impl Budget {
    /// Takes one packet out; false, and nothing changed, if there is none. `now` is in ns on any clock that only goes
    /// forward (in the kernel CLOCK_MONOTONIC).
    #[inline(always)]
    #[must_use]
    pub fn spend(&mut self, rate: Rate, now: u64) -> bool {
        let start = if self.full_at > now { self.full_at } else { now };
        let after = start.wrapping_add(rate.interval);
        if after.wrapping_sub(now) > rate.interval.wrapping_mul(rate.burst) {
            return false;
        }
        self.full_at = after;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_what_counting_tokens_says() {
        for rate in [PEER, ANYONE, Rate { interval: 7, burst: 1 }] {
            let mut bucket = Budget::default();
            // In units of `1 / interval` tokens, so that the model needs no fractions.
            let (mut tokens, mut last) = (rate.interval * rate.burst, 0);
            let (mut now, mut state, mut passed) = (0, 1_u64, 0);
            for _ in 0..100_000 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                now += (state >> 33) % rate.interval;
                if state >> 54 == 0 {
                    now += rate.interval * rate.burst;
                }
                tokens = (rate.interval * rate.burst).min(tokens + (now - last));
                last = now;
                let expect = tokens >= rate.interval;
                if expect {
                    tokens -= rate.interval;
                    passed += 1;
                }
                assert_eq!(bucket.spend(rate, now), expect, "{rate:?} at {now}");
            }
            assert!(passed < 100_000, "the bucket was never empty");
        }
    }

    #[test]
    fn a_burst_passes_and_then_one_in_each_interval() {
        let mut bucket = Budget::default();
        let now = 1 << 40;
        let passed = |bucket: &mut Budget, now| (0..1000).filter(|_| bucket.spend(ANYONE, now)).count();
        assert_eq!(passed(&mut bucket, now), 100);
        assert_eq!(passed(&mut bucket, now + ANYONE.interval), 1);
        assert_eq!(passed(&mut bucket, now + 1_000_000_000), 99);
    }
}
