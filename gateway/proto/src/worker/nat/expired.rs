//! Which outside keys belonged to a session that has ended: what still arrives for them is late, not new
//! (packets.md section 5.3). Bounded and aged; upstream's grows for the life of a client.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use super::key::{Outside, Secret};

/// How long: a Linux server repeats unanswered data for 924.6 s with its default `tcp_retries2` of 15. After that, and
/// beyond the limit, a late packet is judged like any other from its source.
pub const EXPIRED_FOR: Duration = Duration::from_secs(15 * 60);

/// The set.
pub struct Expired {
    limit: usize,
    /// A key's number in `order`; another number there is an entry from before a re-use.
    keys: HashMap<Outside, u64, Secret>,
    order: VecDeque<Entry>,
    number: u64,
}

struct Entry {
    key: Outside,
    number: u64,
    until: Instant,
}

impl Expired {
    pub fn new(limit: usize, secret: Secret) -> Self {
        Self { limit, keys: HashMap::with_hasher(secret), order: VecDeque::new(), number: 0 }
    }

    /// A session with this key has ended. Over the limit the oldest is forgotten.
    pub fn insert(&mut self, key: Outside, now: Instant) {
        if self.limit == 0 {
            return;
        }
        if self.order.len() >= self.limit {
            self.forget_first();
        }
        self.number += 1;
        self.keys.insert(key, self.number);
        self.order.push_back(Entry { key, number: self.number, until: now + EXPIRED_FOR });
    }

    /// The key has a session again.
    pub fn remove(&mut self, key: &Outside) {
        // Its entry in `order` ages, and counts towards the limit until then.
        self.keys.remove(key);
    }

    /// Did a session with this key end within the last [`EXPIRED_FOR`]?
    pub fn contains(&self, key: &Outside, now: Instant) -> bool {
        let Some(number) = self.keys.get(key) else { return false };
        // Numbers in `order` are consecutive: the entry is found by arithmetic.
        let first = self.order.front().map_or(0, |entry| entry.number);
        usize::try_from(number - first).ok().and_then(|at| self.order.get(at)).is_some_and(|e| now < e.until)
    }

    /// Forgets what is too old.
    pub fn handle_timeout(&mut self, now: Instant) {
        while self.order.front().is_some_and(|entry| entry.until <= now) {
            self.forget_first();
        }
        if self.order.is_empty() && self.order.capacity() > 64 {
            self.order = VecDeque::new();
            self.keys.shrink_to(0);
        }
    }

    /// When the oldest is old enough.
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.order.front().map(|entry| entry.until)
    }

    /// How many keys.
    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn clear(&mut self) {
        self.keys.clear();
        self.order.clear();
    }

    fn forget_first(&mut self) {
        if let Some(entry) = self.order.pop_front()
            && self.keys.get(&entry.key) == Some(&entry.number)
        {
            self.keys.remove(&entry.key);
        }
    }
}
