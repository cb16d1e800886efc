//! How many binds one relay is asked for at once, and which goes next.
//!
//! After a restart control wants a channel for every client in the same moment. A relay reads from a receive buffer of
//! perhaps a hundred small datagrams; what does not fit is lost, and its client waits for a repetition. So there is a
//! window: that many binds may be unanswered, the others wait here.
//!
//! RFC 8489 section 6.2: "a client SHOULD limit itself to ten outstanding transactions to the same server", absent other
//! limits. Ten is where we begin and never go below. While others wait, every answer widens the window, by one each until
//! the first loss, then by one per window; a bind that must be repeated halves it, once a second.
//!
//! It knows numbers and ranks only. `allocation` asks it what to send after every answer and deadline.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use rustc_hash::FxHashMap;

use super::event::Use;

/// RFC 8489 section 6.2.
pub(super) const MIN: usize = 10;
/// Fits into a receive buffer of 64 KiB together with the checks that flow meanwhile: the kernel charges about 800 bytes
/// even for the smallest datagram, and grants twice what was asked for.
pub(super) const MAX: usize = 96;
/// The first interval of the ladder: what is lost together is noticed within this time.
const EPISODE: Duration = Duration::from_secs(1);
/// One of so many goes to whoever waited longest behind the first rank, so that nobody starves.
const SHARE: u8 = 4;

/// Who goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Rank {
    /// A bound channel that carries data.
    Refresh,
    /// A client's chosen path.
    Nominated,
    /// An ICE check waits for it.
    Checked,
    /// A candidate that may be tried.
    Signalled,
}

const RANKS: [Rank; 4] = [Rank::Refresh, Rank::Nominated, Rank::Checked, Rank::Signalled];

impl From<Use> for Rank {
    fn from(why: Use) -> Self {
        match why {
            Use::Nominated => Self::Nominated,
            Use::Checked => Self::Checked,
            Use::Signalled => Self::Signalled,
        }
    }
}

/// The window of one relay and the channel numbers that wait for it, each once.
#[derive(Debug)]
pub(super) struct Pace {
    window: usize,
    /// A bind was lost: grow slowly from now on.
    cautious: bool,
    /// Answers since the window grew.
    answers: usize,
    shrunk: Option<Instant>,
    waiting: BTreeMap<(Rank, u64), u16>,
    places: FxHashMap<u16, (Rank, u64)>,
    next: u64,
    turn: u8,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            window: MIN,
            cautious: false,
            answers: 0,
            shrunk: None,
            waiting: BTreeMap::new(),
            places: FxHashMap::default(),
            next: 0,
            turn: 0,
        }
    }
}

impl Pace {
    /// `number` waits for its bind. If it waits already, a higher rank counts from now on, and its age stays.
    pub(super) fn push(&mut self, number: u16, rank: Rank) {
        if self.places.contains_key(&number) {
            return self.raise(number, rank);
        }
        let place = (rank, self.next);
        self.next += 1;
        self.places.insert(number, place);
        self.waiting.insert(place, number);
    }

    /// If `number` waits, it waits with this rank, unless it has a higher one.
    pub(super) fn raise(&mut self, number: u16, rank: Rank) {
        if let Some(place) = self.places.get_mut(&number)
            && rank < place.0
        {
            self.waiting.remove(place);
            place.0 = rank;
            self.waiting.insert(*place, number);
        }
    }

    /// `number` need not be bound any more. Did it wait?
    pub(super) fn remove(&mut self, number: u16) -> bool {
        let place = self.places.remove(&number);
        place.is_some_and(|place| self.waiting.remove(&place).is_some())
    }

    /// The allocation is gone. Those who waited, the most urgent first; the window is the server's and stays.
    pub(super) fn clear(&mut self) -> Vec<u16> {
        self.places.clear();
        std::mem::take(&mut self.waiting).into_values().collect()
    }

    /// Whose bind is to be sent now, if `unanswered` are on their way.
    pub(super) fn pop(&mut self, unanswered: usize) -> Option<u16> {
        if unanswered >= self.window {
            return None;
        }
        let (&first, _) = self.waiting.first_key_value()?;
        self.turn = (self.turn + 1) % SHARE;
        let behind = || {
            let fronts = RANKS.iter().filter(|rank| **rank > first.0).filter_map(|rank| self.front(*rank));
            fronts.min_by_key(|(_, age)| *age)
        };
        let place = if self.turn == 0 { behind().unwrap_or(first) } else { first };
        let number = self.waiting.remove(&place)?;
        self.places.remove(&number);
        Some(number)
    }

    fn front(&self, rank: Rank) -> Option<(Rank, u64)> {
        self.waiting.range((rank, 0)..=(rank, u64::MAX)).next().map(|(place, _)| *place)
    }

    /// The relay answered a bind.
    pub(super) fn on_answered(&mut self) {
        // A window that nobody had to wait for was not tried.
        if self.waiting.is_empty() || self.window >= MAX {
            return;
        }
        self.answers += 1;
        if !self.cautious || self.answers >= self.window {
            self.answers = 0;
            self.window += 1;
        }
    }

    /// A bind has to be repeated.
    pub(super) fn on_lost(&mut self, now: Instant) {
        if self.shrunk.is_some_and(|at| now < at + EPISODE) {
            return;
        }
        self.shrunk = Some(now);
        self.cautious = true;
        self.answers = 0;
        self.window = (self.window / 2).max(MIN);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::twin::start;

    #[test]
    fn the_window_follows_answers_and_losses() {
        let lost = |at| move |pace: &mut Pace| pace.on_lost(start() + Duration::from_millis(at));
        let answered = |n: usize| move |pace: &mut Pace| (0..n).for_each(|_| pace.on_answered());
        let both = |n: usize, at: u64| move |pace: &mut Pace| (answered(n)(pace), lost(at)(pace)).1;
        type Act = Box<dyn Fn(&mut Pace)>;
        let table: [(&str, bool, Vec<Act>, usize); 8] = [
            ("at first", true, vec![], MIN),
            ("every answer widens it", true, vec![Box::new(answered(5))], MIN + 5),
            ("up to a bound", true, vec![Box::new(answered(1000))], MAX),
            ("not if nobody waits", false, vec![Box::new(answered(1000))], MIN),
            ("a loss halves it", true, vec![Box::new(both(1000, 0))], MAX / 2),
            ("once a second", true, vec![Box::new(both(1000, 0)), Box::new(lost(999))], MAX / 2),
            ("and again", true, vec![Box::new(both(1000, 0)), Box::new(lost(1000))], MAX / 4),
            ("never below ten", true, vec![Box::new(lost(0)), Box::new(lost(5000))], MIN),
        ];
        for (name, waits, acts, expect) in table {
            let mut pace = Pace::default();
            if waits {
                pace.push(1, Rank::Checked);
            }
            acts.iter().for_each(|act| act(&mut pace));
            assert_eq!(pace.window, expect, "{name}");
        }
        let mut pace = Pace::default();
        pace.push(1, Rank::Checked);
        lost(0)(&mut pace);
        answered(MIN - 1)(&mut pace);
        assert_eq!(pace.window, MIN, "after a loss it takes a window of answers");
        answered(1 + MIN + 1)(&mut pace);
        assert_eq!(pace.window, MIN + 2);
    }

    #[test]
    fn ranks_go_first_ages_keep_their_order_and_a_quarter_is_for_those_behind() {
        let mut pace = Pace::default();
        for (number, rank) in (0..).zip([
            Rank::Signalled,
            Rank::Checked,
            Rank::Checked,
            Rank::Signalled,
            Rank::Nominated,
            Rank::Refresh,
            Rank::Checked,
        ]) {
            pace.push(number, rank);
        }
        pace.push(6, Rank::Signalled);
        pace.raise(3, Rank::Nominated);
        assert!(pace.remove(2) && !pace.remove(2) && !pace.remove(99));
        assert_eq!(pace.pop(MIN), None, "the window is full");
        let order: Vec<_> = std::iter::from_fn(|| pace.pop(MIN - 1)).collect();
        // The fourth is the oldest behind.
        assert_eq!(order, [5, 3, 4, 0, 1, 6]);
        assert!(pace.waiting.is_empty() && pace.places.is_empty());
    }

    #[test]
    fn an_endless_stream_of_the_urgent_starves_nobody() {
        let mut pace = Pace::default();
        for number in 0..30 {
            pace.push(number, RANKS[usize::from(number % 3) + 1]);
        }
        let mut left: Vec<u16> = (0..30).collect();
        for urgent in 1000..1000 + 30 * u16::from(SHARE) {
            pace.push(urgent, Rank::Refresh);
            let number = pace.pop(0).unwrap();
            if number < 1000 {
                assert!(left.contains(&number));
                left.retain(|n| *n != number);
            }
        }
        assert!(left.is_empty(), "{left:?}");
    }
}
