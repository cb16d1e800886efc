//! Remote candidates that came before their authorization, kept for a moment instead of being dropped.
//!
//! It knows lines and clients only.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use crate::ids::ClientId;

/// How long a candidate waits for its connection. The portal sends the authorization first, so anything that is not
/// followed by one at once belongs to a connection that failed.
const LIFE: Duration = Duration::from_secs(2);
/// Messages kept for all clients together; the oldest goes first.
const PLACES: usize = 256;
/// Lines kept of one message.
const LINES: usize = 32;

/// What came too early, in the order it came.
#[derive(Debug, Default)]
pub(super) struct Early {
    messages: VecDeque<(Instant, ClientId, Vec<String>)>,
}

impl Early {
    /// Keeps `lines` for the client.
    pub(super) fn keep(&mut self, client: ClientId, mut lines: Vec<String>, now: Instant) {
        if self.messages.len() == PLACES {
            self.messages.pop_front();
        }
        lines.truncate(LINES);
        self.messages.push_back((now + LIFE, client, lines));
    }

    /// How many messages are kept.
    pub(super) fn len(&self) -> usize {
        self.messages.len()
    }

    /// These lines no longer hold.
    pub(super) fn invalidate(&mut self, client: ClientId, lines: &[String]) {
        for (_, _, kept) in self.messages.iter_mut().filter(|(_, of, _)| *of == client) {
            kept.retain(|line| !lines.contains(line));
        }
    }

    /// What is kept for the client.
    pub(super) fn take(&mut self, client: ClientId, now: Instant) -> Vec<String> {
        self.expire(now);
        let mut taken = Vec::new();
        self.messages.retain_mut(|(_, of, lines)| {
            let mine = *of == client;
            if mine {
                taken.append(lines);
            }
            !mine
        });
        taken
    }

    /// Forgets what is too old.
    pub(super) fn expire(&mut self, now: Instant) {
        while self.messages.front().is_some_and(|(until, _, _)| *until <= now) {
            self.messages.pop_front();
        }
    }

    /// When the first message is too old.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.messages.front().map(|(until, _, _)| *until)
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::control::tests::epoch;

    #[test]
    fn candidates_wait_two_seconds_for_their_client() {
        let now = epoch();
        let mut early = Early::default();
        early.keep(client(1), lines(&["a"]), now);
        early.keep(client(2), lines(&["x"]), now);
        early.keep(client(1), lines(&["b", "c"]), now + Duration::from_secs(1));
        early.invalidate(client(1), &lines(&["c"]));
        assert_eq!(early.deadline(), Some(now + LIFE));
        assert_eq!(early.take(client(1), now + Duration::from_millis(1999)), ["a", "b"]);
        assert_eq!(early.take(client(1), now), [""; 0]);
        assert_eq!(early.take(client(2), now + LIFE), [""; 0], "too old");
    }

    #[test]
    fn what_waits_is_bounded() {
        let now = epoch();
        let mut early = Early::default();
        for n in 0..2 * PLACES as u128 {
            early.keep(client(n), vec!["x".to_owned(); 2 * LINES], now);
        }
        assert_eq!(early.messages.len(), PLACES);
        assert!(early.messages.iter().all(|(_, _, lines)| lines.len() == LINES));
        assert_eq!(early.messages[0].1, client(PLACES as u128));
    }

    fn client(n: u128) -> ClientId {
        ClientId(Uuid::from_u128(n))
    }

    fn lines(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|t| (*t).to_owned()).collect()
    }
}
