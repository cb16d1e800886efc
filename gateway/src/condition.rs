//! Something that holds or does not, and since when: set by one thread, read by any.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// A condition that does not hold until it is set.
#[derive(Debug)]
pub struct Condition {
    made: Instant,
    /// In one word, so that no reader sees a state with another one's age: milliseconds between `made` and the last
    /// change, and in the lowest bit whether it holds.
    word: AtomicU64,
}

/// What a [`Condition`] was at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// It held.
    pub holds: bool,
    /// For how long it had been so; to the millisecond.
    pub age: Duration,
}

impl Default for Condition {
    fn default() -> Self {
        Self { made: Instant::now(), word: AtomicU64::new(0) }
    }
}

impl Condition {
    /// It holds from now on, or not. Saying again what is known changes nothing. Only one thread may say it.
    pub fn set(&self, holds: bool) {
        if self.state().holds != holds {
            let at = u64::try_from(self.made.elapsed().as_millis()).unwrap_or(u64::MAX >> 1);
            self.word.store((at << 1) | u64::from(holds), Ordering::Relaxed);
        }
    }

    /// Whether it holds.
    pub fn holds(&self) -> bool {
        self.word.load(Ordering::Relaxed) & 1 == 1
    }

    /// Whether it holds, and for how long it has, or has not.
    pub fn state(&self) -> State {
        let word = self.word.load(Ordering::Relaxed);
        let age = self.made.elapsed().saturating_sub(Duration::from_millis(word >> 1));
        State { holds: word & 1 == 1, age }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn age_counts_from_the_last_change_not_from_the_last_word_about_it() {
        let condition =
            Condition { made: Instant::now() - Duration::from_secs(100), word: AtomicU64::new(0) };
        let is_about = |state: State, holds: bool, seconds: u64| {
            let age = state.age.as_secs();
            state.holds == holds && (seconds..seconds + 60).contains(&age)
        };
        assert!(is_about(condition.state(), false, 100), "{condition:?}");
        condition.set(false);
        assert!(is_about(condition.state(), false, 100), "{condition:?}");
        condition.set(true);
        assert!(is_about(condition.state(), true, 0) && condition.holds(), "{condition:?}");
        let condition = Condition { made: condition.made, word: AtomicU64::new((40_000 << 1) | 1) };
        condition.set(true);
        assert!(is_about(condition.state(), true, 60), "{condition:?}");
        condition.set(false);
        assert!(is_about(condition.state(), false, 0) && !condition.holds(), "{condition:?}");
    }
}
