//! How soon each nameserver answers, and whom to ask first. Pure: time comes in as an argument.
//!
//! One number per nameserver and transport: the answer time to expect. Answers pull it towards what was measured,
//! failures push it up, and time halves it each [`HALF_LIFE`]. So one that was slow or dead gets another chance by
//! itself, sooner if the others are slow too, and nothing has to be asked for the sake of asking. Nobody is known at
//! first: then the order of the configuration decides.

use std::time::{Duration, Instant};

/// How long until a number that nobody renewed counts half.
pub const HALF_LIFE: Duration = Duration::from_secs(60);
/// Expected of a nameserver that was never asked: slower than a good one in the same network, so that no query is spent
/// on curiosity there; faster than one on another continent.
const UNKNOWN: Duration = Duration::from_millis(100);
/// Expected of one that just failed, at least: what failed at once must not look fast.
const FAILED: Duration = Duration::from_secs(1);
/// No number is higher: the longest that a client is kept waiting.
const WORST: Duration = Duration::from_secs(5);

/// The transport towards a nameserver; each has its own numbers, since a firewall may let only one pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// One datagram each way.
    Udp,
    /// A connection for the query.
    Tcp,
}

/// The numbers of all nameservers, by their place in the configuration.
#[derive(Debug, Clone)]
pub struct Table {
    rows: Vec<[Estimate; 2]>,
}

#[derive(Debug, Clone, Copy)]
struct Estimate {
    seconds: f64,
    measured: bool,
    at: Instant,
}

impl Table {
    /// Nothing is known of `servers` nameservers.
    pub fn new(servers: usize, now: Instant) -> Self {
        let unknown = Estimate { seconds: UNKNOWN.as_secs_f64(), measured: false, at: now };
        Self { rows: vec![[unknown; 2]; servers] }
    }

    /// All nameservers, the one to ask first at the front; equal ones as configured.
    pub fn order(&self, transport: Transport, now: Instant) -> Vec<usize> {
        let mut order: Vec<(usize, f64)> =
            self.rows.iter().map(|row| row[transport as usize].expected(now)).enumerate().collect();
        // A stable sort: the configured order stays where nothing speaks against it.
        order.sort_by(|a, b| a.1.total_cmp(&b.1));
        order.into_iter().map(|(server, _)| server).collect()
    }

    /// How soon an answer is to be expected; at most 5 s.
    pub fn expected(&self, server: usize, transport: Transport, now: Instant) -> Duration {
        let row = self.rows.get(server).map(|row| row[transport as usize]);
        row.map_or(UNKNOWN, |estimate| Duration::from_secs_f64(estimate.expected(now)))
    }

    /// It answered after `took`. The weight is that of RFC 6298 section 2 (1/8); a first measurement counts alone.
    pub fn on_answer(&mut self, server: usize, transport: Transport, took: Duration, now: Instant) {
        self.change(server, transport, now, |expected, measured| {
            let took = took.as_secs_f64();
            // What failed before and answers now is as fast as it answers.
            if measured && expected < FAILED.as_secs_f64() {
                expected + (took - expected) / 8.0
            } else {
                took
            }
        });
    }

    /// It did not answer within `waited`, or with a failure of its own.
    pub fn on_failure(&mut self, server: usize, transport: Transport, waited: Duration, now: Instant) {
        let floor = waited.max(FAILED).as_secs_f64();
        self.change(server, transport, now, |expected, _| (expected * 2.0).max(floor));
    }

    /// Another was asked too and answered first, `waited` after this one was asked: it is at least that slow.
    pub fn on_overtaken(&mut self, server: usize, transport: Transport, waited: Duration, now: Instant) {
        self.change(server, transport, now, |expected, _| expected.max(waited.as_secs_f64()));
    }

    fn change(
        &mut self,
        server: usize,
        transport: Transport,
        now: Instant,
        seconds: impl FnOnce(f64, bool) -> f64,
    ) {
        if let Some(row) = self.rows.get_mut(server) {
            let estimate = &mut row[transport as usize];
            let seconds = seconds(estimate.expected(now), estimate.measured).min(WORST.as_secs_f64());
            *estimate = Estimate { seconds, measured: true, at: now };
        }
    }
}

impl Estimate {
    fn expected(&self, now: Instant) -> f64 {
        let age = now.saturating_duration_since(self.at).as_secs_f64();
        self.seconds * (-age / HALF_LIFE.as_secs_f64()).exp2()
    }
}

#[cfg(test)]
mod tests {
    use super::{Transport::*, *};

    const MS: Duration = Duration::from_millis(1);
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_configured_order_holds_until_something_is_known() {
        let start = Instant::now();
        let mut table = Table::new(3, start);
        assert_eq!(table.order(Udp, start), [0, 1, 2]);
        table.on_failure(0, Udp, 500 * MS, start);
        assert_eq!(table.order(Udp, start), [1, 2, 0]);
        table.on_answer(2, Udp, 5 * MS, start);
        assert_eq!(table.order(Udp, start), [2, 1, 0]);
        assert_eq!(table.order(Tcp, start), [0, 1, 2], "nothing is known of TCP");
    }

    #[test]
    fn one_fast_answer_does_not_count_for_ever() {
        let start = Instant::now();
        let mut table = Table::new(2, start);
        table.on_answer(0, Udp, MS / 10, start);
        table.on_answer(1, Udp, 3 * MS, start);
        for second in 1..=40 {
            table.on_answer(0, Udp, 20 * MS, start + second * SECOND);
            table.on_answer(1, Udp, 3 * MS, start + second * SECOND);
        }
        assert_eq!(table.order(Udp, start + 40 * SECOND), [1, 0]);
    }

    #[test]
    fn a_dead_one_is_tried_again_after_minutes_and_a_recovered_one_wins_at_once() {
        let start = Instant::now();
        let mut table = Table::new(2, start);
        table.on_failure(0, Udp, 500 * MS, start);
        let mut tried_after = None;
        for second in 0..3600 {
            let now = start + second * SECOND;
            table.on_answer(1, Udp, 20 * MS, now);
            if table.order(Udp, now)[0] == 0 {
                tried_after = Some(second);
                break;
            }
        }
        // 1 s is halved to 20 ms in log2(50) = 5.6 minutes.
        assert!(tried_after.is_some_and(|second| (330..350).contains(&second)), "{tried_after:?}");
        let mut back = Table::new(2, start);
        back.on_answer(1, Udp, 20 * MS, start);
        back.on_failure(0, Udp, 5 * SECOND, start);
        back.on_answer(0, Udp, 2 * MS, start + SECOND);
        assert_eq!(back.order(Udp, start + SECOND), [0, 1]);
    }

    #[test]
    fn numbers_stay_in_bounds_whatever_happens() {
        use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
        let mut random = SmallRng::seed_from_u64(3);
        let mut now = Instant::now();
        let mut table = Table::new(4, now);
        for _ in 0..100_000 {
            now += Duration::from_micros(random.random_range(0..2_000_000));
            // One more than there are: the list may have become shorter while a query was on its way.
            let server = random.random_range(0..5);
            let transport = if random.random() { Udp } else { Tcp };
            let took = Duration::from_micros(random.random_range(0..20_000_000));
            let before = table.expected(server, transport, now);
            match random.random_range(0..3) {
                0 => table.on_answer(server, transport, took, now),
                1 => {
                    table.on_failure(server, transport, took, now);
                    assert!(server == 4 || table.expected(server, transport, now) >= before.max(FAILED));
                }
                _ => {
                    table.on_overtaken(server, transport, took, now);
                    assert!(table.expected(server, transport, now) >= before);
                }
            }
            assert!(table.expected(server, transport, now) <= WORST);
            let order = table.order(transport, now);
            let expected: Vec<_> = order.iter().map(|&s| table.expected(s, transport, now)).collect();
            assert!(expected.is_sorted(), "{expected:?}");
            let mut all = order;
            all.sort_unstable();
            assert_eq!(all, [0, 1, 2, 3]);
        }
    }
}
