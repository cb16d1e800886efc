//! Which TCP connections are open, and which one goes when there are too many. Pure: time comes in as an argument.

use std::{collections::HashMap, net::IpAddr, time::Instant};

/// Open connections of one client. RFC 7766 section 6.2.2 asks clients for one; a host behind the client may be many.
pub const PER_CLIENT: usize = 16;
/// Open connections of all clients.
pub const IN_ALL: usize = 256;

/// Names an open connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id(u64);

/// All open connections of all servers; `H` is what closes one.
#[derive(Debug)]
pub struct Connections<H> {
    open: HashMap<Id, Open<H>>,
    next: u64,
}

#[derive(Debug)]
struct Open<H> {
    client: IpAddr,
    /// Since when no query of it is in flight; `None` while one is.
    idle_since: Option<Instant>,
    handle: H,
}

/// There is no room, and nobody is idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Full;

impl<H> Connections<H> {
    /// None is open.
    pub fn new() -> Self {
        Self { open: HashMap::new(), next: 0 }
    }

    /// `client` connected. Where a limit is reached, the longest idle connection that counts towards it makes room
    /// (RFC 7766 section 6.2.3): it is forgotten here, and its handle returned.
    ///
    /// # Errors
    /// The new connection must be closed.
    pub fn admit(&mut self, client: IpAddr, handle: H, now: Instant) -> Result<(Id, Option<H>), Full> {
        let of_client = self.open.values().filter(|open| open.client == client).count();
        let evicted = if of_client >= PER_CLIENT {
            Some(self.take_idle(|open| open.client == client)?)
        } else if self.open.len() >= IN_ALL {
            Some(self.take_idle(|_| true)?)
        } else {
            None
        };
        let id = Id(self.next);
        self.next += 1;
        self.open.insert(id, Open { client, idle_since: Some(now), handle });
        Ok((id, evicted))
    }

    /// It has a query in flight.
    pub fn on_busy(&mut self, id: Id) {
        if let Some(open) = self.open.get_mut(&id) {
            open.idle_since = None;
        }
    }

    /// Its last query was answered.
    pub fn on_idle(&mut self, id: Id, now: Instant) {
        if let Some(open) = self.open.get_mut(&id) {
            open.idle_since = Some(now);
        }
    }

    /// It is gone; harmless if it was taken to make room.
    pub fn on_closed(&mut self, id: Id) {
        self.open.remove(&id);
    }

    fn take_idle(&mut self, counts: impl Fn(&Open<H>) -> bool) -> Result<H, Full> {
        let idle = self.open.iter().filter(|(_, open)| counts(open));
        let idle = idle.filter_map(|(id, open)| open.idle_since.map(|since| (since, *id)));
        let (_, oldest) = idle.min().ok_or(Full)?;
        self.open.remove(&oldest).map(|open| open.handle).ok_or(Full)
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, time::Duration};

    use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

    use super::*;

    /// Against the obvious: a list in the order of becoming idle.
    #[test]
    fn random_walk_agrees_with_the_obvious() {
        let mut random = SmallRng::seed_from_u64(7766);
        let mut now = Instant::now();
        let mut connections = Connections::new();
        // (id, client, idle); who becomes idle goes to the end.
        let mut obvious: Vec<(Id, IpAddr, bool)> = Vec::new();
        let (mut full, mut evictions) = ([0, 0], [0, 0]);
        for step in 0..100_000_u32 {
            now += Duration::from_millis(1);
            let at = random.random_range(0..obvious.len().max(1));
            // Phases in which few close, and many are busy.
            match random.random_range(0..100) {
                0..10 if !obvious.is_empty() && step % 20_000 > 10_000 => {
                    connections.on_closed(obvious.remove(at).0);
                }
                10..50 if !obvious.is_empty() => {
                    connections.on_busy(obvious[at].0);
                    obvious[at].2 = false;
                }
                50..70 if !obvious.is_empty() && step % 10_000 > 5000 => {
                    let (id, client, _) = obvious.remove(at);
                    connections.on_idle(id, now);
                    obvious.push((id, client, true));
                }
                _ => {
                    let few = if step % 2 == 0 { 3 } else { 60 };
                    let client: IpAddr = Ipv4Addr::from_bits(random.random_range(0..few)).into();
                    let own = obvious.iter().filter(|(_, c, _)| *c == client).count();
                    let is_all = own < PER_CLIENT;
                    let must_go = own >= PER_CLIENT || obvious.len() >= IN_ALL;
                    let victim = obvious.iter().position(|(_, c, idle)| *idle && (is_all || *c == client));
                    match connections.admit(client, step, now) {
                        Err(Full) => {
                            assert!(must_go && victim.is_none(), "{step}");
                            full[usize::from(is_all)] += 1;
                        }
                        Ok((id, evicted)) => {
                            assert_eq!(evicted.is_some(), must_go, "{step}");
                            if evicted.is_some() {
                                let (gone, ..) = obvious.remove(victim.unwrap());
                                assert!(!connections.open.contains_key(&gone), "{step}");
                                evictions[usize::from(is_all)] += 1;
                            }
                            obvious.push((id, client, true));
                        }
                    }
                }
            }
            assert_eq!(connections.open.len(), obvious.len());
        }
        assert!(full.iter().chain(&evictions).all(|count| *count > 50), "{full:?} {evictions:?}");
    }
}
