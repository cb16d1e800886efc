//! When each client's WireGuard timers are looked at next. Knows slots and ticks, no WireGuard.
//!
//! boringtun has no deadline to ask for, so every client is looked at once a second, or every tick while a
//! handshake is open (design.md section 2.1). An entry is never taken out early: it is stale, and skipped, when
//! its owner's `due` has moved on.
//!
//! ```text
//! tick  ..  41   42   43   44   45   46   47   48      1 tick = 250 ms
//!          [..] [..] [..] [..] [..] [..] [..] [..]     spoke = tick mod 8, furthest entry: now + 4
//! ```

use std::time::{Duration, Instant};

use super::slot::Slot;

/// The length of a tick: how often an open handshake is looked at.
pub const TICK: Duration = Duration::from_millis(250);
/// Ticks between two looks at a client without an open handshake.
pub const CALM: u64 = 4;
const SPOKES: usize = 8;
/// A look further ahead than this finds nothing.
const ROUND: u64 = SPOKES as u64;

/// A tick's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Tick(pub u64);

/// Who is looked at, and when.
pub type Entry = (Tick, Slot);

/// The wheel.
pub struct Wheel {
    start: Instant,
    done: Tick,
    spokes: [Vec<Entry>; SPOKES],
    /// The list being walked; kept for its capacity.
    turning: Vec<Entry>,
}

impl Wheel {
    /// A wheel whose tick 0 begins at `now`.
    pub fn new(now: Instant) -> Self {
        Self { start: now, done: Tick(0), spokes: Default::default(), turning: Vec::new() }
    }

    /// Enters `slot` `ticks` (at least 1, at most [`CALM`]) after now. The owner remembers the returned tick.
    pub fn schedule(&mut self, slot: Slot, ticks: u64, now: Instant) -> Tick {
        let due = Tick(self.tick(now).max(self.done).0 + ticks.clamp(1, CALM));
        self.spoke(due).push((due, slot));
        due
    }

    /// Entries that are due by `now`; `None` once there are none.
    ///
    /// Give the list back with [`Wheel::turned`]. Entries whose owner's `due` is another tick are to be skipped.
    pub fn turn(&mut self, now: Instant) -> Option<Vec<Entry>> {
        let present = self.tick(now);
        while self.done < present {
            self.done.0 += 1;
            // After a long sleep every spoke is walked once; the ticks between hold nothing.
            if present.0 - self.done.0 >= ROUND {
                self.done.0 = present.0 - ROUND + 1;
            }
            let spoke = (self.done.0 % ROUND) as usize;
            // Made while the wheel stood still, an entry can lie on a spoke that is walked for an earlier tick.
            self.turning.extend(self.spokes[spoke].extract_if(.., |(due, _)| *due <= present));
            if !self.turning.is_empty() {
                return Some(std::mem::take(&mut self.turning));
            }
        }
        None
    }

    /// Takes back the list of [`Wheel::turn`].
    pub fn turned(&mut self, mut entries: Vec<Entry>) {
        entries.clear();
        self.turning = entries;
    }

    /// When the next tick with an entry begins.
    pub fn poll_timeout(&self) -> Option<Instant> {
        (self.done.0 + 1..=self.done.0 + ROUND)
            .find(|tick| !self.spokes[(tick % ROUND) as usize].is_empty())
            .map(|tick| self.start + TICK * u32::try_from(tick).unwrap_or(u32::MAX))
    }

    fn tick(&self, now: Instant) -> Tick {
        let ticks = now.saturating_duration_since(self.start).as_millis() / TICK.as_millis();
        Tick(u64::try_from(ticks).unwrap_or(u64::MAX))
    }

    fn spoke(&mut self, tick: Tick) -> &mut Vec<Entry> {
        &mut self.spokes[(tick.0 % ROUND) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn due(wheel: &mut Wheel, now: Instant) -> Vec<u32> {
        let mut all = Vec::new();
        while let Some(entries) = wheel.turn(now) {
            all.extend(entries.iter().map(|(_, slot)| slot.0));
            wheel.turned(entries);
        }
        all
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test needs some instant to count from")]
    fn entries_come_at_their_tick_and_once() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut wheel = Wheel::new(start);
        assert_eq!(wheel.poll_timeout(), None);
        wheel.schedule(Slot(1), CALM, at(100));
        wheel.schedule(Slot(2), 1, at(100));
        assert_eq!(wheel.poll_timeout(), Some(at(250)));
        assert!(due(&mut wheel, at(249)).is_empty());
        assert_eq!(due(&mut wheel, at(250)), [2]);
        assert_eq!(wheel.poll_timeout(), Some(at(1000)));
        assert!(due(&mut wheel, at(999)).is_empty());
        assert_eq!(due(&mut wheel, at(1000)), [1]);
        assert_eq!(wheel.poll_timeout(), None);
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test needs some instant to count from")]
    fn a_long_sleep_loses_no_entry_and_repeats_none() {
        let start = Instant::now();
        let mut wheel = Wheel::new(start);
        for slot in 1..=4 {
            wheel.schedule(Slot(slot), u64::from(slot), start);
        }
        let later = start + Duration::from_secs(1000);
        let mut slots = due(&mut wheel, later);
        slots.sort_unstable();
        assert_eq!(slots, [1, 2, 3, 4]);
        let tick = wheel.schedule(Slot(9), 1, later);
        assert_eq!(tick, Tick(4001));
        assert_eq!(wheel.poll_timeout(), Some(later + TICK));
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "a test needs some instant to count from")]
    fn entries_made_after_a_long_sleep_are_not_mistaken_for_older_ones() {
        let start = Instant::now();
        for asleep in 1..40 {
            let mut wheel = Wheel::new(start);
            let made = start + TICK * asleep;
            for ticks in 1..=CALM {
                wheel.schedule(Slot(u32::try_from(ticks).unwrap()), ticks, made);
            }
            let seen: Vec<_> = (1..=4).map(|ticks| due(&mut wheel, made + TICK * ticks)).collect();
            assert_eq!(seen, [[1], [2], [3], [4]], "asleep for {asleep} ticks");
        }
    }
}
