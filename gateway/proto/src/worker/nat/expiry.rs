//! When each session is looked at next, so that time-outs cost what they end and nothing more. Knows slots and seconds,
//! no session.
//!
//! Every slot is in exactly one list. A deadline that moves away is not followed: the slot comes up at the old time,
//! and is entered again. One that comes nearer moves the slot at once. That bounds the memory by the number of
//! sessions, and the work by one look per session and lifetime.
//!
//! ```text
//! fine    128 spokes of 1 s    deadlines within the next 127 s       spoke = second mod 128
//! coarse  128 spokes of 64 s   deadlines within the next 8064 s      spoke = second / 64 mod 128; then into fine
//! ```

use std::time::{Duration, Instant};

const SPOKES: u64 = 128;
const COARSE: u64 = 64;
/// The heads of the coarse spokes stand behind the fine ones.
const COARSE_HEADS: u8 = 128;
const HEADS: usize = 256;
/// The furthest deadline that finds a place, in seconds from now.
const HORIZON: u64 = (SPOKES - 2) * COARSE;

/// A session's place in its table.
pub type Slot = u32;
/// No slot.
pub const NONE: Slot = Slot::MAX;

/// The wheel.
pub struct Wheel {
    start: Instant,
    /// The last second that was dealt with.
    done: u64,
    heads: [Slot; HEADS],
    /// Spokes with a slot.
    fine: u128,
    coarse: u128,
    links: Vec<Link>,
}

#[derive(Clone, Copy)]
struct Link {
    previous: Slot,
    next: Slot,
    /// Index into the heads; `None` if in no list.
    spoke: Option<u8>,
    /// When it comes up.
    second: u64,
}

impl Wheel {
    /// A wheel whose seconds are counted from `now`.
    pub fn new(now: Instant) -> Self {
        Self { start: now, done: 0, heads: [NONE; HEADS], fine: 0, coarse: 0, links: Vec::new() }
    }

    /// The same time in a wheel without slots.
    pub fn emptied(&self) -> Self {
        Self { done: self.done, ..Self::new(self.start) }
    }

    /// Enters `slot`, or moves it, so that it comes up at the first turn at or after `deadline`, in whole seconds.
    pub fn schedule(&mut self, slot: Slot, deadline: Instant) {
        self.remove(slot);
        self.enter(slot, self.second(deadline));
    }

    /// Has the last turn gone beyond `deadline`?
    pub fn is_past(&self, deadline: Instant) -> bool {
        self.second(deadline) <= self.done
    }

    /// Moves `slot` if `deadline` is before the time it would come up.
    pub fn hasten(&mut self, slot: Slot, deadline: Instant) {
        let link = self.links[slot as usize];
        if link.spoke.is_none() || self.start + Duration::from_secs(link.second) > deadline {
            self.schedule(slot, deadline);
        }
    }

    /// Takes `slot` out, if it is in.
    pub fn remove(&mut self, slot: Slot) {
        let Some(link) = self.links.get_mut(slot as usize) else { return };
        let Some(spoke) = link.spoke.take() else { return };
        let (previous, next) = (link.previous, link.next);
        if previous == NONE {
            self.heads[usize::from(spoke)] = next;
            if next == NONE {
                self.unmark(spoke);
            }
        } else {
            self.links[previous as usize].next = next;
        }
        if next != NONE {
            self.links[next as usize].previous = previous;
        }
    }

    /// The beginning of the last second that was dealt with.
    pub fn present(&self) -> Instant {
        self.start + Duration::from_secs(self.done)
    }

    /// Takes all that has come up by `now` out and into `due`.
    ///
    /// The owner enters those again that have time left.
    pub fn turn(&mut self, now: Instant, due: &mut Vec<Slot>) {
        let present = now.saturating_duration_since(self.start).as_secs();
        if present <= self.done {
            return;
        }
        let mut moved = NONE;
        for spoke in spokes(self.coarse, self.done / COARSE, present / COARSE) {
            // Several coarse spokes in one turn are rare: joined slot by slot.
            let mut slot = self.take(COARSE_HEADS + spoke);
            while slot != NONE {
                let next = self.links[slot as usize].next;
                self.links[slot as usize].next = moved;
                moved = slot;
                slot = next;
            }
        }
        for spoke in spokes(self.fine, self.done, present) {
            let mut slot = self.take(spoke);
            while slot != NONE {
                let link = &mut self.links[slot as usize];
                link.spoke = None;
                due.push(slot);
                slot = link.next;
            }
        }
        self.done = present;
        while moved != NONE {
            let link = &mut self.links[moved as usize];
            link.spoke = None;
            let (slot, second) = (moved, link.second);
            moved = link.next;
            if second <= present {
                due.push(slot);
            } else {
                self.enter(slot, second);
            }
        }
    }

    /// When [`Wheel::turn`] has something to do next.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let fine = nearest(self.fine, self.done).map(|distance| self.done + distance);
        let round = self.done / COARSE;
        let coarse = nearest(self.coarse, round).map(|distance| (round + distance) * COARSE);
        let second = fine.into_iter().chain(coarse).min()?;
        Some(self.start + Duration::from_secs(second))
    }

    /// The first whole second that is not before `time`.
    fn second(&self, time: Instant) -> u64 {
        let passed = time.saturating_duration_since(self.start);
        passed.as_secs() + u64::from(passed.subsec_nanos() > 0)
    }

    fn enter(&mut self, slot: Slot, second: u64) {
        let second = second.clamp(self.done + 1, self.done + HORIZON);
        let spoke = if second - self.done < SPOKES {
            let spoke = spoke(second);
            self.fine |= 1 << spoke;
            spoke
        } else {
            let spoke = spoke(second / COARSE);
            self.coarse |= 1 << spoke;
            COARSE_HEADS + spoke
        };
        let at = slot as usize;
        if at >= self.links.len() {
            self.links.resize(at + 1, Link { previous: NONE, next: NONE, spoke: None, second: 0 });
        }
        let next = std::mem::replace(&mut self.heads[usize::from(spoke)], slot);
        if next != NONE {
            self.links[next as usize].previous = slot;
        }
        self.links[at] = Link { previous: NONE, next, spoke: Some(spoke), second };
    }

    /// The whole list of a spoke, linked by `next`.
    fn take(&mut self, spoke: u8) -> Slot {
        self.unmark(spoke);
        std::mem::replace(&mut self.heads[usize::from(spoke)], NONE)
    }

    fn unmark(&mut self, spoke: u8) {
        match spoke.checked_sub(COARSE_HEADS) {
            None => self.fine &= !(1 << spoke),
            Some(coarse) => self.coarse &= !(1 << coarse),
        }
    }
}

fn spoke(number: u64) -> u8 {
    (number % SPOKES) as u8
}

/// The spokes with a slot whose number is above `done` and at most `present`.
fn spokes(marked: u128, done: u64, present: u64) -> impl Iterator<Item = u8> {
    let count = (present - done).min(SPOKES);
    let from = done + 1;
    (from..from + count).map(spoke).filter(move |spoke| marked >> spoke & 1 == 1)
}

/// How far after `done` the next marked spoke is.
fn nearest(marked: u128, done: u64) -> Option<u64> {
    let next = spoke(done + 1);
    (marked != 0).then(|| u64::from(marked.rotate_right(next.into()).trailing_zeros()) + 1)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test needs some instant to count from")]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn slots_come_up_at_their_second_and_once_whatever_the_steps() {
        let mut state = 5_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            usize::try_from((state >> 33) % below).unwrap()
        };
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let (mut wheel, mut model, mut now) = (Wheel::new(start), BTreeMap::<Slot, u64>::new(), 0);
        let (mut due, mut ups) = (Vec::new(), 0);
        for step in 0..100_000 {
            match random(8) {
                0..=3 => {
                    let slot = u32::try_from(random(200)).unwrap();
                    let lifetime = [1, 900, 5000, 60_000, 126_500, 127_000, 128_000, 7_440_000][random(8)];
                    let deadline: u64 = now + lifetime;
                    let second = deadline.div_ceil(1000).max(now / 1000 + 1);
                    if random(3) == 0 && model.contains_key(&slot) {
                        wheel.hasten(slot, at(deadline));
                        let old = model[&slot];
                        model.insert(slot, if old * 1000 > deadline { second } else { old });
                    } else {
                        wheel.schedule(slot, at(deadline));
                        model.insert(slot, second);
                    }
                }
                4 => {
                    let slot = u32::try_from(random(200)).unwrap();
                    wheel.remove(slot);
                    model.remove(&slot);
                }
                _ => {
                    now += [3, 400, 1000, 1001, 20_000, 70_000, 200_000, 9_000_000][random(8)];
                    due.clear();
                    wheel.turn(at(now), &mut due);
                    due.sort_unstable();
                    let expect: Vec<_> = model.extract_if(.., |_, second| *second <= now / 1000).collect();
                    assert!(
                        due.iter().eq(expect.iter().map(|(slot, _)| slot)),
                        "step {step}: {due:?} {expect:?}"
                    );
                    ups += due.len();
                }
            }
            // The wheel may wake for a coarse spoke, never late.
            let first = model.values().min().map(|second| at(second * 1000));
            assert_eq!(wheel.poll_timeout().is_some(), first.is_some());
            assert!(
                wheel.poll_timeout() <= first
                    && wheel.poll_timeout().is_none_or(|t| t > at(now / 1000 * 1000))
            );
        }
        assert!(ups > 10_000, "{ups}");
    }

    #[test]
    fn a_lone_far_deadline_wakes_twice() {
        let start = Instant::now();
        let mut wheel = Wheel::new(start);
        wheel.schedule(0, start + Duration::from_secs(7440));
        let mut due = Vec::new();
        let mut wakes = 0;
        while let Some(next) = wheel.poll_timeout() {
            wheel.turn(next, &mut due);
            wakes += 1;
        }
        assert_eq!((wakes, due), (2, vec![0]));
    }
}
