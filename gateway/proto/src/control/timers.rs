//! One deadline per key, the earliest in O(1): nobody scans all clients to learn what is due.
//!
//! Moved and removed deadlines stay in the heap until they reach its top, or until they are the majority.

use std::{cmp::Reverse, collections::BinaryHeap, hash::Hash, time::Instant};

use rustc_hash::FxHashMap;

/// Stale heap entries that are not worth a rebuild.
const SLACK: usize = 64;

/// Deadlines by key.
#[derive(Debug)]
pub(super) struct Timers<K> {
    deadlines: FxHashMap<K, Instant>,
    heap: BinaryHeap<Reverse<(Instant, K)>>,
}

impl<K: Copy + Eq + Hash + Ord> Timers<K> {
    pub(super) fn new() -> Self {
        Self { deadlines: FxHashMap::default(), heap: BinaryHeap::new() }
    }

    /// `key` is due at `deadline`; `None` forgets it.
    pub(super) fn set(&mut self, key: K, deadline: Option<Instant>) {
        match deadline {
            Some(at) if self.deadlines.insert(key, at) == Some(at) => return,
            Some(at) => self.heap.push(Reverse((at, key))),
            None => {
                self.deadlines.remove(&key);
            }
        }
        if self.heap.len() > 2 * self.deadlines.len() + SLACK {
            self.heap = self.deadlines.iter().map(|(key, at)| Reverse((*at, *key))).collect();
        }
        self.drop_stale();
    }

    /// How many keys have a deadline.
    pub(super) fn len(&self) -> usize {
        self.deadlines.len()
    }

    /// The earliest deadline.
    pub(super) fn earliest(&self) -> Option<Instant> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes a key whose deadline is `now` or earlier.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<K> {
        let Reverse((at, key)) = *self.heap.peek()?;
        if at > now {
            return None;
        }
        self.set(key, None);
        Some(key)
    }

    /// Keeps the invariant that the top of the heap is a live deadline.
    fn drop_stale(&mut self) {
        while let Some(Reverse((at, key))) = self.heap.peek() {
            if self.deadlines.get(key) == Some(at) {
                return;
            }
            self.heap.pop();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::control::tests::epoch;

    #[test]
    fn the_latest_deadline_of_a_key_counts() {
        let start = epoch();
        let at = |s| start + Duration::from_secs(s);
        let mut timers = Timers::new();
        timers.set('a', Some(at(5)));
        timers.set('b', Some(at(3)));
        assert_eq!(timers.earliest(), Some(at(3)));
        timers.set('b', Some(at(9)));
        assert_eq!(timers.earliest(), Some(at(5)));
        timers.set('a', None);
        assert_eq!(timers.earliest(), Some(at(9)));
        assert_eq!(timers.pop_due(at(8)), None);
        assert_eq!(timers.pop_due(at(9)), Some('b'));
        assert_eq!(timers.earliest(), None);
    }

    #[test]
    fn a_deadline_that_moves_often_does_not_fill_the_heap() {
        let start = epoch();
        let mut timers = Timers::new();
        timers.set(0, Some(start));
        for i in 1..10_000 {
            timers.set(1, Some(start + Duration::from_millis(i)));
        }
        assert!(timers.heap.len() <= 2 * timers.deadlines.len() + SLACK + 1);
        assert_eq!(timers.pop_due(start), Some(0));
        assert_eq!(timers.earliest(), Some(start + Duration::from_millis(9999)));
    }
}
