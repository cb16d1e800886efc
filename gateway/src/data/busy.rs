//! How busy a thread was of late, from the time that it has worked in all, looked at once a second.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// How far back [`Window::share`] looks.
const LENGTH: Duration = Duration::from_secs(10);

/// The looks of the last 10 s.
#[derive(Debug)]
pub struct Window {
    /// When, and what was worked by then. Never empty; all but the first are younger than [`LENGTH`].
    looks: VecDeque<(Instant, Duration)>,
}

impl Window {
    /// Of a thread that begins now.
    pub fn new(now: Instant) -> Self {
        Self { looks: [(now, Duration::ZERO)].into() }
    }

    /// Call once a second: by `now` the thread has worked for `busy`.
    pub fn note(&mut self, busy: Duration, now: Instant) {
        let is_old = |look: Option<&(Instant, Duration)>| look.is_some_and(|(at, _)| *at + LENGTH <= now);
        while is_old(self.looks.get(1)) {
            self.looks.pop_front();
        }
        self.looks.push_back((now, busy));
    }

    /// The share of the last 10 s (or less at the beginning), from 0 to 1, in which the thread worked; `busy` is what it
    /// has worked by `now`. What it works on at the moment is not in it.
    pub fn share(&self, busy: Duration, now: Instant) -> f64 {
        // The youngest that is old enough, else the oldest.
        let old = self.looks.iter().take_while(|(at, _)| *at + LENGTH <= now).last();
        let Some((at, before)) = old.or(self.looks.front()) else { return 0.0 };
        let passed = now.saturating_duration_since(*at);
        if passed.is_zero() {
            return 0.0;
        }
        (busy.saturating_sub(*before).as_secs_f64() / passed.as_secs_f64()).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks at each second that is named, at a thread that works half of the time until second 60, and then always.
    #[test]
    fn share_is_that_of_the_last_ten_seconds_however_seldom_somebody_looks() {
        let worked = |at: u32| match at {
            0..=60 => Duration::from_millis(500) * at,
            _ => Duration::from_secs((at - 30).into()),
        };
        // When is looked, at which second is asked, the share.
        let table: [(&[u32], u32, f64); 8] = [
            (&[], 0, 0.0),
            (&[], 4, 0.5),
            (&[1, 2, 3], 4, 0.5),
            (&[50, 55], 60, 0.5),
            (&[52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62], 62, 0.6),
            (&[60, 61, 62, 63, 64, 65, 66, 67, 68, 69], 70, 1.0),
            // Nobody looked for a minute: the whole minute counts, not what came before.
            (&[60, 120], 125, 1.0),
            (&[40, 120], 125, 75.0 / 85.0),
        ];
        let start = Instant::now();
        let at = |second: u32| start + Duration::from_secs(second.into());
        for (looks, asked, expect) in table {
            let mut window = Window::new(start);
            looks.iter().for_each(|second| window.note(worked(*second), at(*second)));
            let share = window.share(worked(asked), at(asked));
            assert!((share - expect).abs() < 1e-9, "{looks:?}, at {asked}: {share}, not {expect}");
            assert!(window.looks.len() <= 12);
        }
    }

    #[test]
    fn more_work_than_time_is_a_full_share() {
        let start = Instant::now();
        let window = Window::new(start);
        assert!((window.share(Duration::from_secs(3), start + Duration::from_secs(1)) - 1.0).abs() < 1e-9);
    }
}
