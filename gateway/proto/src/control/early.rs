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
