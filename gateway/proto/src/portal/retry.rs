//! When to try again (portal-protocol.md section 6). It must not know why, beyond what [`Failure`] says.

use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::failure::Failure;

/// Before the first join: one attempt a second (the portal's rate limit is one a second) for 15 s, so that a wrong
/// setting ends the process while somebody is looking.
const INITIAL_DELAY: Duration = Duration::from_secs(1);
const INITIAL_BUDGET: Duration = Duration::from_secs(15);
/// A portal notices after 37 s that our predecessor crashed, and answers 409 until then (section 14 item 6); plus slack.
const PREDECESSOR_BUDGET: Duration = Duration::from_secs(45);
const BASE: Duration = Duration::from_millis(500);
const FACTOR: f64 = 1.5;
const CAP: Duration = Duration::from_secs(60);

/// What to do after a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Wait, then try.
    Retry {
        /// How long.
        delay: Duration,
        /// How much waiting is allowed after that.
        budget_left: Duration,
    },
    /// The failure is fatal.
    Fatal,
    /// The budget is used up.
    GiveUp {
        /// The budget.
        budget: Duration,
    },
}

/// The state of the reconnect policy.
#[derive(Debug)]
pub struct Retry {
    partition_budget: Duration,
    joined_once: bool,
    waited: Duration,
    waited_as_told: Duration,
    base: Duration,
    rng: SmallRng,
}

impl Retry {
    /// `partition_budget` is `--max-partition-time`; `seed` feeds the jitter.
    #[must_use]
    pub fn new(partition_budget: Duration, seed: u64) -> Self {
        Self {
            partition_budget,
            joined_once: false,
            waited: Duration::ZERO,
            waited_as_told: Duration::ZERO,
            base: BASE,
            rng: SmallRng::seed_from_u64(seed),
        }
    }

    /// A join succeeded: everything starts over, and from now on the long budget holds.
    pub fn handle_joined(&mut self) {
        self.joined_once = true;
        self.reset();
        self.waited_as_told = Duration::ZERO;
    }

    /// Decides about the next attempt.
    pub fn handle_failure(&mut self, failure: &Failure) -> Verdict {
        if failure.is_fatal() {
            return Verdict::Fatal;
        }
        if let Some(delay) = failure.retry_after() {
            return self.as_told(delay);
        }
        if !self.joined_once {
            let already_connected = failure.is_already_connected();
            let budget = if already_connected { PREDECESSOR_BUDGET } else { INITIAL_BUDGET };
            // Up to a quarter more, uncounted: gateways that were started together drift apart, and the portal's
            // bucket of one a second is never missed by a hair. The budget counts nominal seconds: 15 retries.
            let jitter = self.rng.random_range(1.0..1.25);
            return self.spend(INITIAL_DELAY, budget, INITIAL_DELAY.mul_f64(jitter));
        }
        let delay = self.base.mul_f64(self.rng.random_range(1.0..2.0));
        self.base = self.base.mul_f64(FACTOR).min(CAP);
        self.spend(delay, self.partition_budget, delay)
    }

    /// The server names the delay. That has a budget of its own: a server that says so for ever must not keep a
    /// gateway alive that is no use (section 14 item 4).
    fn as_told(&mut self, delay: Duration) -> Verdict {
        let budget = self.partition_budget;
        // A delay of zero still counts, or an endless stream of zeros would spin.
        let counted = delay.max(Duration::from_secs(1));
        self.waited_as_told += counted;
        if self.waited_as_told > budget {
            return Verdict::GiveUp { budget };
        }
        if delay.is_zero() {
            self.reset();
        }
        Verdict::Retry { delay, budget_left: budget - self.waited_as_told }
    }

    fn spend(&mut self, counted: Duration, budget: Duration, delay: Duration) -> Verdict {
        if self.waited + counted > budget {
            return Verdict::GiveUp { budget };
        }
        self.waited += counted;
        Verdict::Retry { delay, budget_left: budget - self.waited }
    }

    fn reset(&mut self) {
        self.waited = Duration::ZERO;
        self.base = BASE;
    }
}

#[cfg(test)]
mod tests {
    use super::{super::failure::Refusal, *};

    #[test]
    fn before_the_first_join_there_are_fifteen_retries_a_second_apart() {
        let mut retry = Retry::new(Duration::from_secs(86_400), 1);
        for n in 1..=15 {
            let Verdict::Retry { delay, budget_left } = retry.handle_failure(&Failure::JoinTimeout) else {
                panic!("gave up at {n}")
            };
            assert!((Duration::from_secs(1)..Duration::from_millis(1250)).contains(&delay), "{delay:?}");
            assert_eq!(budget_left, Duration::from_secs(15 - n));
        }
        assert_eq!(retry.handle_failure(&Failure::JoinTimeout), Verdict::GiveUp { budget: INITIAL_BUDGET });
    }

    #[test]
    fn a_predecessor_the_portal_still_holds_is_outlived() {
        let mut retry = Retry::new(Duration::from_secs(86_400), 1);
        let failure = already_connected();
        let retries =
            (0..100).take_while(|_| matches!(retry.handle_failure(&failure), Verdict::Retry { .. })).count();
        assert_eq!(retries, 45);
    }

    #[test]
    fn after_a_join_the_delay_grows_by_half_to_a_minute_and_the_budget_is_the_partition_time() {
        let budget = Duration::from_secs(3600);
        let mut retry = Retry::new(budget, 7);
        retry.handle_joined();
        let (mut base, mut sum) = (0.5_f64, 0.0);
        loop {
            match retry.handle_failure(&Failure::HeartbeatsLost) {
                Verdict::Retry { delay, .. } => {
                    let delay = delay.as_secs_f64();
                    assert!(delay >= base * 0.999 && delay < base * 2.001, "{delay} for base {base}");
                    sum += delay;
                    base = (base * 1.5).min(60.0);
                }
                Verdict::GiveUp { budget: reported } => break assert_eq!(reported, budget),
                Verdict::Fatal => panic!("not fatal"),
            }
        }
        assert!(sum <= 3600.0 && sum > 3600.0 - 120.0, "{sum}");
        retry.handle_joined();
        let Verdict::Retry { delay, .. } = retry.handle_failure(&Failure::HeartbeatsLost) else { panic!() };
        assert!(delay < Duration::from_secs(1), "a join resets the back-off: {delay:?}");
    }

    #[test]
    fn retry_after_is_obeyed_to_the_second_and_leaves_the_initial_budget_alone() {
        let mut retry = Retry::new(Duration::from_secs(100), 1);
        for _ in 0..30 {
            let verdict = retry.handle_failure(&told("2"));
            assert!(matches!(verdict, Verdict::Retry { delay, .. } if delay == Duration::from_secs(2)));
        }
        let Verdict::Retry { budget_left, .. } = retry.handle_failure(&Failure::JoinTimeout) else {
            panic!()
        };
        assert_eq!(budget_left, Duration::from_secs(14));
    }

    #[test]
    fn an_endless_stream_of_retry_after_ends() {
        for value in ["0", "2", "9999"] {
            let mut retry = Retry::new(Duration::from_secs(3600), 1);
            let n = (0..10_000)
                .take_while(|_| matches!(retry.handle_failure(&told(value)), Verdict::Retry { .. }));
            assert!(n.count() <= 3600, "{value}");
        }
    }

    #[test]
    fn a_retry_after_of_zero_resets_the_backoff() {
        let mut retry = Retry::new(Duration::from_secs(3600), 1);
        retry.handle_joined();
        for _ in 0..12 {
            retry.handle_failure(&Failure::JoinTimeout);
        }
        retry.handle_failure(&told("0"));
        let Verdict::Retry { delay, .. } = retry.handle_failure(&Failure::JoinTimeout) else { panic!() };
        assert!(delay < Duration::from_secs(1), "{delay:?}");
    }

    #[test]
    fn fatal_failures_are_not_retried() {
        assert_eq!(Retry::new(CAP, 1).handle_failure(&Failure::TokenExpired), Verdict::Fatal);
    }

    fn told(value: &str) -> Failure {
        Failure::Refused(Refusal::new(503, None, Some(value), b"", Duration::ZERO))
    }

    fn already_connected() -> Failure {
        let body = br#"{"code":"gateway_already_connected"}"#;
        Failure::Refused(Refusal::new(409, Some("application/problem+json"), None, body, Duration::ZERO))
    }
}
