//! How much one client, and all together, may ask. Pure: time comes in as an argument.
//!
//! A client is its tunnel address; the workers let no packet pass whose source is not the client's own.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

/// Queries in flight, of all clients (dns.md section 9).
pub const IN_FLIGHT: usize = 1000;
/// Queries in flight, of one client: a browser that starts asks some dozens at once.
pub const IN_FLIGHT_PER_CLIENT: usize = 100;
/// Queries of one client per second, in the long run.
pub const RATE: u32 = 200;
/// Queries of one client at once, after a pause.
pub const BURST: u32 = 400;
/// Clients that are remembered before those that have been quiet are forgotten.
const REMEMBERED: usize = 4096;

/// Why a query is not forwarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// This client has asked too much: REFUSED.
    Client,
    /// All together have: SERVFAIL.
    All,
}

/// Who asks how much.
#[derive(Debug, Default)]
pub struct Limits {
    clients: HashMap<IpAddr, Usage>,
    in_flight: usize,
}

#[derive(Debug)]
struct Usage {
    in_flight: usize,
    /// When the bucket of [`BURST`] queries is full again, as in the generic cell rate algorithm (ITU-T I.371 annex A).
    full_at: Instant,
}

impl Limits {
    /// A query of `client` arrived. With `Ok`, [`Limits::on_done`] must follow.
    ///
    /// # Errors
    /// It must not be forwarded.
    pub fn admit(&mut self, client: IpAddr, now: Instant) -> Result<(), Over> {
        if self.in_flight >= IN_FLIGHT {
            return Err(Over::All);
        }
        if self.clients.len() >= REMEMBERED && !self.clients.contains_key(&client) {
            // All that is left afterwards has a query in flight or asked within the last two seconds.
            self.clients.retain(|_, usage| usage.in_flight > 0 || usage.full_at > now);
        }
        let usage = self.clients.entry(client).or_insert(Usage { in_flight: 0, full_at: now });
        let each = Duration::from_secs(1) / RATE;
        let full_at = usage.full_at.max(now) + each;
        if usage.in_flight >= IN_FLIGHT_PER_CLIENT || full_at.duration_since(now) > each * BURST {
            return Err(Over::Client);
        }
        usage.full_at = full_at;
        usage.in_flight += 1;
        self.in_flight += 1;
        Ok(())
    }

    /// A query that was admitted has its answer, or never will.
    pub fn on_done(&mut self, client: IpAddr) {
        if let Some(usage) = self.clients.get_mut(&client) {
            usage.in_flight -= 1;
            self.in_flight -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

    use super::*;

    fn client(index: u32) -> IpAddr {
        Ipv4Addr::from_bits(0x6440_0000 + index).into()
    }

    #[test]
    fn one_client_is_stopped_and_the_others_are_not() {
        let (mut limits, now) = (Limits::default(), Instant::now());
        for _ in 0..IN_FLIGHT_PER_CLIENT {
            limits.admit(client(1), now).unwrap();
        }
        assert_eq!(limits.admit(client(1), now), Err(Over::Client));
        limits.admit(client(2), now).unwrap();
        limits.on_done(client(1));
        limits.admit(client(1), now).unwrap();
        assert_eq!(limits.admit(client(1), now), Err(Over::Client));
    }

    #[test]
    fn the_rate_holds_in_the_long_run() {
        let (mut limits, start) = (Limits::default(), Instant::now());
        let mut admitted = 0;
        for millisecond in 0..10_000 {
            if limits.admit(client(1), start + Duration::from_millis(millisecond)).is_ok() {
                admitted += 1;
                limits.on_done(client(1));
            }
        }
        // 10 s of a thousand a second: the burst, then the rate.
        assert!((2390..=2401).contains(&admitted), "{admitted}");
    }

    #[test]
    fn all_together_are_limited_and_memory_is_too() {
        let (mut limits, mut now) = (Limits::default(), Instant::now());
        for index in 0..1000 {
            limits.admit(client(index), now).unwrap();
        }
        assert_eq!(limits.admit(client(2000), now), Err(Over::All));
        (0..1000).for_each(|index| limits.on_done(client(index)));
        for index in 0..100_000 {
            now += Duration::from_millis(1);
            limits.admit(client(index), now).unwrap();
            limits.on_done(client(index));
            assert!(limits.clients.len() <= REMEMBERED);
        }
    }

    /// Against the obvious: a list of what is in flight, and a list of all that was admitted.
    #[test]
    fn random_walk_agrees_with_the_obvious() {
        let mut random = SmallRng::seed_from_u64(4);
        let (mut limits, start) = (Limits::default(), Instant::now());
        let (mut now, mut flying) = (start, Vec::<IpAddr>::new());
        let mut tokens: HashMap<IpAddr, (f64, Instant)> = HashMap::new();
        let (mut over_client, mut over_all) = (0, 0);
        for step in 0..200_000 {
            now += Duration::from_micros(random.random_range(0..400));
            // Phases in which answers come, and in which they do not.
            let answered = if step % 20_000 < 10_000 { 60 } else { 35 };
            if random.random_range(0..100) < answered && !flying.is_empty() {
                let done = flying.swap_remove(random.random_range(0..flying.len()));
                limits.on_done(done);
                continue;
            }
            let clients = random.random_range(1..40);
            let asking = client(random.random_range(0..clients));
            let (left, since) = tokens.get(&asking).copied().unwrap_or((f64::from(BURST), now));
            let refilled = (now - since).as_secs_f64().mul_add(f64::from(RATE), left).min(f64::from(BURST));
            let own = flying.iter().filter(|other| **other == asking).count();
            match limits.admit(asking, now) {
                Ok(()) => {
                    assert!(flying.len() < IN_FLIGHT && own < IN_FLIGHT_PER_CLIENT, "{step}");
                    assert!(refilled > 0.999, "{step}: {refilled}");
                    tokens.insert(asking, (refilled - 1.0, now));
                    flying.push(asking);
                }
                Err(Over::All) => {
                    assert_eq!(flying.len(), IN_FLIGHT);
                    over_all += 1;
                }
                Err(Over::Client) => {
                    assert!(own == IN_FLIGHT_PER_CLIENT || refilled < 1.001, "{step}: {own}, {refilled}");
                    over_client += 1;
                }
            }
        }
        assert!(over_client > 1000 && over_all > 100, "both limits were met: {over_client}, {over_all}");
    }
}
