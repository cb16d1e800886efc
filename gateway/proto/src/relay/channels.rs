//! The channels of one allocation: numbers, lifetimes, who goes without (connections.md section 8.7).
//!
//! Bookkeeping only: it says what to bind and when; `allocation` sends the requests.
//!
//! A channel is *open* from the first bind that is sent for it until it lapses, is refused or goes with its allocation:
//! the relay may send on it as soon as it has accepted the bind, and what it sends may overtake the success.
//!
//! ```text
//!            bind sent              success             600 s, or not refreshed      910 s after the last
//!   (free) -----------> Binding ---------------> Bound ------------------------> Lapsed ----------------> (free)
//!                          |         240 s, in use ^ |  refresh              ^       | wanted again         ^
//!                          | refused               +-+                       +- Rebinding <-+               |
//!                          +------------> Refused -- wanted again after 30 s -------^   910 s after the last+
//! ```
//!
//! A peer keeps its number until that is free, whatever the server said: an earlier copy of a bind that was refused or
//! lost may have been accepted, and a server refuses a peer it holds under another number (RFC 8656 section 12.2).
//! For the same reason a number is Kept when the allocation goes while its bind may be on the way: the bind may arrive
//! after the next allocation was granted.

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use rustc_hash::FxHashMap;

use super::event::Use;

/// The numbers that work end to end (relay-dialect.md section 3).
pub(super) const FIRST: u16 = 0x4000;
pub(super) const LAST: u16 = 0x4FFF;
const COUNT: usize = (LAST - FIRST) as usize + 1;
/// With fewer numbers left than this, merely signalled candidates go without.
const RESERVE: usize = COUNT / 8;
/// A channel's life without a refresh (RFC 8656 section 12).
pub(super) const LIFETIME: Duration = Duration::from_secs(600);
/// Refresh of a channel in use: below the 300 s a permission lives (RFC 8656 section 9), with room for a repetition.
pub(super) const REFRESH: Duration = Duration::from_secs(240);
/// No other peer gets the number before this time after its last bind was sent (RFC 8656 section 12: lifetime + 5 min).
/// The server counts from its arrival.
pub(super) const REUSE: Duration = Duration::from_secs(900).saturating_add(IN_FLIGHT);
/// A bind does not arrive later than this: more than the whole ladder of repetitions takes.
const IN_FLIGHT: Duration = Duration::from_secs(10);
/// A peer the server refused is not asked for again before this: checks would repeat it every 250 ms.
const BACKOFF: Duration = Duration::from_secs(30);

#[derive(Debug)]
struct Channel {
    peer: SocketAddr,
    why: Use,
    /// No connection wants it.
    released: bool,
    /// Control was told that data may come on it.
    open: bool,
    /// Data went either way since the last bind.
    used: bool,
    /// When the last bind was sent or the last data came.
    touched: Instant,
    /// When the last bind was sent.
    bind_sent: Option<Instant>,
    state: State,
    due: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Binding,
    Bound {
        since: Instant,
        refreshing: bool,
    },
    Lapsed,
    Rebinding,
    Refused {
        at: Instant,
    },
    /// Of a former allocation, whose late bind this one may have taken.
    Kept,
}

/// The outcome of asking for a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// There is one, or it is on its way, or the server refused it a moment ago.
    Nothing,
    /// Send a bind for this number.
    Bind(u16),
    /// No number for this kind of use.
    Exhausted,
}

/// What a deadline brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Send a bind for this bound channel.
    Refresh(u16),
    /// A bound channel lapsed: it is open no more.
    Gone(u16, SocketAddr),
    /// A number is free again.
    Free,
}

#[derive(Debug)]
pub(super) struct Channels {
    by_number: FxHashMap<u16, Channel>,
    by_peer: FxHashMap<SocketAddr, u16>,
    due: BTreeSet<(Instant, u16)>,
    next: u16,
}

impl Default for Channels {
    fn default() -> Self {
        Self {
            by_number: FxHashMap::default(),
            by_peer: FxHashMap::default(),
            due: BTreeSet::new(),
            next: FIRST,
        }
    }
}

impl Channels {
    /// Somebody wants a channel to `peer`.
    pub(super) fn want(&mut self, peer: SocketAddr, why: Use, now: Instant) -> Wanted {
        let Some(number) = self.by_peer.get(&peer).copied() else { return self.take(peer, why, now) };
        let channel = self.by_number.get_mut(&number).expect("every peer's number has its channel");
        channel.why = if channel.released { why } else { channel.why.max(why) };
        channel.released = false;
        match channel.state {
            State::Refused { at } if now < at + BACKOFF => Wanted::Nothing,
            State::Binding | State::Rebinding => Wanted::Nothing,
            State::Refused { .. } | State::Lapsed | State::Kept => {
                let is_new = channel.state == State::Kept;
                channel.state = if is_new { State::Binding } else { State::Rebinding };
                self.set_due(number, None);
                Wanted::Bind(number)
            }
            State::Bound { .. } => self.refresh_if_late(number, now),
        }
    }

    /// Next-fit over the numbers nobody holds.
    fn take(&mut self, peer: SocketAddr, why: Use, now: Instant) -> Wanted {
        let free = COUNT - self.by_number.len();
        if free == 0 || (why == Use::Signalled && free < RESERVE) {
            return Wanted::Exhausted;
        }
        while self.by_number.contains_key(&self.next) {
            self.next = after(self.next);
        }
        let number = self.next;
        self.next = after(number);
        let channel = Channel {
            peer,
            why,
            released: false,
            open: false,
            used: false,
            touched: now,
            bind_sent: None,
            state: State::Binding,
            due: None,
        };
        self.by_number.insert(number, channel);
        self.by_peer.insert(peer, number);
        Wanted::Bind(number)
    }

    /// Nobody wants the channel any more: it lapses unless that changes.
    pub(super) fn release(&mut self, peer: SocketAddr) {
        if let Some(channel) = self.by_peer.get(&peer).and_then(|number| self.by_number.get_mut(number)) {
            channel.released = true;
        }
    }

    /// All numbers are taken and a nominated path has none: the merely signalled channel that was touched longest
    /// ago is not refreshed any more. Its number is free [`REUSE`] after its last bind: earlier the server would refuse it.
    pub(super) fn give_up_a_signalled_one(&mut self) {
        let signalled = self.by_number.values_mut().filter(|c| c.why == Use::Signalled && !c.released);
        if let Some(channel) = signalled.min_by_key(|c| c.touched) {
            channel.released = true;
        }
    }

    /// The number `peer`'s data may be sent on: its first bind is in flight, or it was confirmed less than 600 s ago.
    pub(super) fn sendable(&self, peer: SocketAddr, now: Instant) -> Option<u16> {
        let number = *self.by_peer.get(&peer)?;
        let channel = self.by_number.get(&number)?;
        match channel.state {
            State::Binding => channel.open.then_some(number),
            State::Bound { since, .. } => (now < since + LIFETIME).then_some(number),
            State::Lapsed | State::Rebinding | State::Refused { .. } | State::Kept => None,
        }
    }

    /// A bind of `number` went out: the server may hold the number from now on, and data may come on it before the
    /// success does. The peer, if that is news.
    pub(super) fn on_bind_sent(&mut self, number: u16, now: Instant) -> Option<SocketAddr> {
        let channel = self.by_number.get_mut(&number)?;
        channel.touched = now;
        channel.bind_sent = Some(now);
        (!std::mem::replace(&mut channel.open, true)).then_some(channel.peer)
    }

    /// The server confirmed `number`. The peer and whether the channel opens by that only, if it was not bound before.
    pub(super) fn on_bound(&mut self, number: u16, now: Instant) -> Option<(SocketAddr, bool)> {
        let channel = self.by_number.get_mut(&number)?;
        let was_bound = matches!(channel.state, State::Bound { .. });
        channel.state = State::Bound { since: now, refreshing: false };
        channel.used = false;
        let opens = !std::mem::replace(&mut channel.open, true);
        let peer = channel.peer;
        self.set_due(number, Some(now + REFRESH));
        (!was_bound).then_some((peer, opens))
    }

    /// The server refused `number`. The peer, if the channel was open until now.
    pub(super) fn on_refused(&mut self, number: u16, now: Instant) -> Option<SocketAddr> {
        let channel = self.by_number.get_mut(&number)?;
        channel.state = State::Refused { at: now };
        let was_open = std::mem::take(&mut channel.open);
        let (peer, free_at) = (channel.peer, channel.touched + REUSE);
        self.set_due(number, Some(free_at.max(now + BACKOFF)));
        was_open.then_some(peer)
    }

    /// A bind of `number` was lost, however often it was repeated, on the way to a server that answers others. A bound
    /// channel lives on until it lapses; another is asked for again by whoever still wants it. The peer, if the channel
    /// was open until now.
    pub(super) fn on_unanswered(&mut self, number: u16, now: Instant) -> Option<SocketAddr> {
        let channel = self.by_number.get_mut(&number)?;
        match &mut channel.state {
            State::Bound { refreshing, .. } => *refreshing = false,
            state @ (State::Binding | State::Rebinding) => {
                *state = State::Lapsed;
                let was_open = std::mem::take(&mut channel.open);
                let (peer, free_at) = (channel.peer, channel.touched + REUSE);
                self.set_due(number, Some(free_at.max(now + BACKOFF)));
                return was_open.then_some(peer);
            }
            State::Lapsed | State::Refused { .. } | State::Kept => {}
        }
        None
    }

    /// Data went over `number`. A bind for it, if the refresh is overdue.
    pub(super) fn on_used(&mut self, number: u16, received: bool, now: Instant) -> Wanted {
        let Some(channel) = self.by_number.get_mut(&number) else { return Wanted::Nothing };
        channel.used = true;
        if received {
            channel.touched = channel.touched.max(now);
        }
        match channel.state {
            State::Bound { .. } => self.refresh_if_late(number, now),
            State::Lapsed | State::Refused { .. } | State::Kept if received => {
                let free_at = channel.touched + REUSE;
                self.set_due(number, Some(free_at));
                Wanted::Nothing
            }
            _ => Wanted::Nothing,
        }
    }

    fn refresh_if_late(&mut self, number: u16, now: Instant) -> Wanted {
        let channel = self.by_number.get_mut(&number).expect("the caller found it");
        let in_use = !channel.released && (channel.used || channel.why == Use::Nominated);
        match &mut channel.state {
            State::Bound { since, refreshing } if in_use && !*refreshing && now >= *since + REFRESH => {
                *refreshing = true;
                Wanted::Bind(number)
            }
            _ => Wanted::Nothing,
        }
    }

    /// The bind that was asked for `number` is not sent, because nobody wants it any more. A number that was never asked
    /// for is free at once.
    pub(super) fn withdraw(&mut self, number: u16) {
        let Some(channel) = self.by_number.get_mut(&number) else { return };
        let free_at = match &mut channel.state {
            State::Bound { refreshing, .. } => {
                *refreshing = false;
                return;
            }
            State::Binding if channel.bind_sent.is_none() => channel.touched,
            State::Binding | State::Rebinding => channel.touched + REUSE,
            State::Lapsed | State::Refused { .. } | State::Kept => return,
        };
        channel.state = State::Lapsed;
        self.set_due(number, Some(free_at));
    }

    /// The number that `peer` has, whatever became of it.
    pub(super) fn number(&self, peer: SocketAddr) -> Option<u16> {
        self.by_peer.get(&peer).copied()
    }

    /// How many are bound.
    pub(super) fn bound(&self) -> usize {
        let is_bound = |channel: &&Channel| matches!(channel.state, State::Bound { .. });
        self.by_number.values().filter(is_bound).count()
    }

    /// Is a bind of `number` a refresh?
    pub(super) fn is_bound(&self, number: u16) -> bool {
        self.by_number.get(&number).is_some_and(|channel| matches!(channel.state, State::Bound { .. }))
    }

    /// The peer of `number` and why it is wanted.
    pub(super) fn peer(&self, number: u16) -> Option<(SocketAddr, Use)> {
        self.by_number.get(&number).map(|channel| (channel.peer, channel.why))
    }

    /// The allocation is gone and all channels with it. Those that were open, in order of number.
    ///
    /// A bind that is still on its way may arrive after the next allocation was granted, and then counts there: its peer
    /// keeps its number. The others go on from where they were, so that late data does not meet another peer's channel.
    pub(super) fn clear(&mut self, now: Instant) -> Vec<(u16, SocketAddr)> {
        let mut gone = Vec::new();
        let mut kept = Vec::new();
        self.by_number.retain(|number, channel| {
            let was_open = std::mem::take(&mut channel.open);
            if was_open {
                gone.push((*number, channel.peer));
            }
            let keep = channel.bind_sent.is_some_and(|at| now < at + IN_FLIGHT);
            if keep {
                channel.state = State::Kept;
                kept.push((*number, channel.touched + REUSE));
            } else {
                self.by_peer.remove(&channel.peer);
            }
            keep
        });
        self.due.clear();
        for (number, free_at) in kept {
            self.set_due(number, Some(free_at));
        }
        gone.sort_unstable();
        gone
    }

    /// The next thing that is due.
    pub(super) fn pop_due(&mut self, now: Instant) -> Option<Due> {
        loop {
            let (due, number) = *self.due.first()?;
            if due > now {
                return None;
            }
            let channel = self.by_number.get_mut(&number).expect("every deadline has its channel");
            let peer = channel.peer;
            match channel.state {
                State::Bound { since, refreshing } if now < since + LIFETIME => {
                    self.set_due(number, Some(since + LIFETIME));
                    if !refreshing && let Wanted::Bind(number) = self.refresh_if_late(number, now) {
                        return Some(Due::Refresh(number));
                    }
                }
                State::Bound { refreshing, .. } => {
                    // A refresh in flight may still confirm it.
                    channel.state = if refreshing { State::Rebinding } else { State::Lapsed };
                    channel.open = false;
                    let free_at = channel.touched + REUSE;
                    self.set_due(number, (!refreshing).then_some(free_at));
                    return Some(Due::Gone(number, peer));
                }
                State::Lapsed | State::Refused { .. } | State::Kept => {
                    self.set_due(number, None);
                    self.by_number.remove(&number);
                    self.by_peer.remove(&peer);
                    return Some(Due::Free);
                }
                State::Binding | State::Rebinding => self.set_due(number, None),
            }
        }
    }

    pub(super) fn poll_timeout(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }

    fn set_due(&mut self, number: u16, due: Option<Instant>) {
        let channel = self.by_number.get_mut(&number).expect("the caller found it");
        if let Some(old) = std::mem::replace(&mut channel.due, due) {
            self.due.remove(&(old, number));
        }
        if let Some(due) = due {
            self.due.insert((due, number));
        }
    }
}

fn after(number: u16) -> u16 {
    if number >= LAST { FIRST } else { number + 1 }
}

#[cfg(test)]
mod tests;
