//! What must be up for a gateway to serve, and since when each of it is or is not.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use serde_json::{Map, Value, json};

use crate::{
    condition::{Condition, State},
    dns::Stats,
};

/// The conditions; shared between the event loop, which sets them, and the server.
#[derive(Debug)]
pub struct Readiness {
    /// The TUN carries the addresses the portal assigned.
    pub tun: Condition,
    /// At least one relay answers, now.
    pub relay: Condition,
    /// The portal has acknowledged our join, now.
    portal: Condition,
    /// How often it has.
    joins: AtomicU64,
    /// How often the connection to the portal ended or was not made.
    failures: AtomicU64,
    dns: Arc<Stats>,
}

impl Readiness {
    /// Nothing is up. Whether DNS servers listen is for them to tell.
    pub fn new(dns: Arc<Stats>) -> Self {
        let (tun, relay, portal) = Default::default();
        Self { tun, relay, portal, joins: AtomicU64::new(0), failures: AtomicU64::new(0), dns }
    }

    /// The portal's channel is joined.
    pub fn on_portal_joined(&self) {
        self.portal.set(true);
        self.joins.fetch_add(1, Ordering::Relaxed);
    }

    /// The portal is away (still, or again).
    pub fn on_portal_failed(&self) {
        self.portal.set(false);
        self.failures.fetch_add(1, Ordering::Relaxed);
    }

    /// Joins of the portal's channel, and connections to it that failed or ended.
    pub fn portal_counts(&self) -> (u64, u64) {
        (self.joins.load(Ordering::Relaxed), self.failures.load(Ordering::Relaxed))
    }

    /// For how long the portal has been away; from the start of the daemon if it was never reached. `None` while it is
    /// there.
    pub fn partition(&self) -> Option<Duration> {
        let State { holds, age } = self.portal.state();
        (!holds).then_some(age)
    }

    /// Could a client connect?
    pub fn is_ready(&self) -> bool {
        self.missing().next().is_none()
    }

    /// The conditions for want of which no client could connect. A portal that was reached once need not be there: what it
    /// has granted goes on.
    pub fn missing(&self) -> impl Iterator<Item = &'static str> {
        let needed = [
            ("tun", self.tun.holds()),
            ("dns_listening", self.dns.listening.holds()),
            ("relay", self.relay.holds()),
            ("portal", self.portal_counts().0 > 0),
        ];
        needed.into_iter().filter(|(_, holds)| !holds).map(|(name, _)| name)
    }

    /// Each condition by its name.
    pub fn conditions(&self) -> [(&'static str, State); 4] {
        [
            ("tun", self.tun.state()),
            ("dns_listening", self.dns.listening.state()),
            ("relay", self.relay.state()),
            ("portal", self.portal.state()),
        ]
    }

    /// The body of `/readyz`. `now` is the wall clock's; of each condition the age is measured, and the time of day
    /// follows from it.
    pub fn report(&self, now: SystemTime) -> Value {
        let conditions = self.conditions().map(|(name, State { holds, age })| {
            let since = now.checked_sub(age).unwrap_or(SystemTime::UNIX_EPOCH);
            let since = humantime::format_rfc3339_seconds(since).to_string();
            (name.to_owned(), json!({ "up": holds, "since": since, "seconds": seconds(age) }))
        });
        // Looked at once, so that what is missing and the verdict agree.
        let missing: Vec<_> = self.missing().collect();
        json!({
            "ready": missing.is_empty(),
            "missing": missing,
            "conditions": Map::from_iter(conditions),
            "portal_was_reached": self.portal_counts().0 > 0,
            "portal_partition_seconds": self.partition().map(seconds),
        })
    }
}

/// To the millisecond: more digits would be noise.
#[expect(clippy::cast_precision_loss, reason = "2^53 ms are 285 000 years")]
fn seconds(age: Duration) -> f64 {
    age.as_millis() as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_means_that_a_client_could_connect() {
        // TUN, DNS, relay, what the portal did; what is missing.
        let table: [(bool, bool, bool, &str, &[&str]); 8] = [
            (true, true, true, "", &["portal"]),
            (true, true, true, "join", &[]),
            (true, true, true, "join,fail", &[]),
            (true, true, true, "fail", &["portal"]),
            (false, true, true, "join", &["tun"]),
            (true, false, true, "join", &["dns_listening"]),
            (true, true, false, "join", &["relay"]),
            (false, false, false, "", &["tun", "dns_listening", "relay", "portal"]),
        ];
        for (tun, dns, relay, portal, missing) in table {
            let ready = missing.is_empty();
            let stats = Arc::new(Stats::default());
            let readiness = Readiness::new(Arc::clone(&stats));
            readiness.tun.set(tun);
            stats.listening.set(dns);
            readiness.relay.set(relay);
            for what in portal.split(',') {
                match what {
                    "join" => readiness.on_portal_joined(),
                    "fail" => readiness.on_portal_failed(),
                    _ => {}
                }
            }
            assert_eq!(readiness.is_ready(), ready, "{tun} {dns} {relay} {portal:?}");
            let report = readiness.report(SystemTime::now());
            assert_eq!(report["ready"], ready);
            assert_eq!(report["missing"], json!(missing));
            assert_eq!(report["conditions"]["tun"]["up"], tun);
            assert_eq!(report["conditions"]["dns_listening"]["up"], dns);
            assert_eq!(report["conditions"]["relay"]["up"], relay);
            assert_eq!(report["conditions"]["portal"]["up"], portal == "join");
            assert_eq!(report["portal_was_reached"], portal.starts_with("join"));
            assert_eq!(report["portal_partition_seconds"].is_null(), portal == "join");
        }
    }

    #[test]
    fn since_is_the_time_of_day_of_the_last_change() {
        let readiness = Readiness::new(Arc::default());
        let hour = Duration::from_secs(3600);
        // As if the clock were an hour ahead of when the condition was made: the age alone counts.
        let report = readiness.report(SystemTime::UNIX_EPOCH + hour);
        let (seconds, since) =
            (&report["conditions"]["tun"]["seconds"], &report["conditions"]["tun"]["since"]);
        assert!(seconds.as_f64().is_some_and(|seconds| (0.0..60.0).contains(&seconds)), "{report}");
        let since = humantime::parse_rfc3339(since.as_str().unwrap()).unwrap();
        let back = (SystemTime::UNIX_EPOCH + hour).duration_since(since).unwrap();
        assert!(back <= Duration::from_secs(61), "{report}");
    }
}
