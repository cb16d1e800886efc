//! The portal names a relay again (connections.md section 9): what stays, what waits, what makes it another relay.

use std::time::Instant;

use super::{Allocation, Out, Server, Servers, State};
use crate::relay::{
    codec::{Request, family},
    requests::LADDER,
};

impl Allocation {
    /// The portal names the relay again, perhaps with other addresses or credentials. False if that makes it
    /// another relay: then it must be replaced.
    ///
    /// Only what is in use counts: the other family's server may come, go and change.
    ///
    /// A portal of Nov-2025 makes new credentials with each `init` (portal-protocol.md section 12), and a relay takes the
    /// old ones until they expire. An allocation is worth more than the newer name, so it is kept, asked whether it
    /// lives, and the new credentials wait for its end. Another password under the same name is another secret: the
    /// relay has started anew.
    pub(in crate::relay) fn adopt(&mut self, servers: &Servers, now: Instant, out: &mut Out) -> bool {
        let mut servers = servers.clone();
        let later = match (&self.state, self.active().map(|active| family(active.server))) {
            (State::Allocated { .. }, Some(at)) => match (&self.servers[at], &servers[at]) {
                (Some(known), Some(new)) if known.is_renamed(new) => {
                    std::mem::replace(&mut servers[at], self.servers[at].clone())
                }
                _ => None,
            },
            _ => None,
        };
        let same = |at: usize| self.servers[at] == servers[at];
        let keep = match self.active() {
            Some(active) => same(family(active.server)),
            None => same(0) && same(1),
        };
        if !keep {
            return false;
        }
        let suspended = self.is_suspended();
        let known = std::mem::replace(&mut self.servers, servers.clone());
        for server in servers.iter().flatten().filter(|server| !known.iter().flatten().any(|k| k == *server))
        {
            if !suspended {
                self.request(Request::Binding, server.addr, LADDER, now, out);
            }
        }
        if suspended {
            self.search(now, out);
        }
        self.successor = later;
        if self.successor.is_some() {
            tracing::debug!(relay = %self.id, "Other credentials for a relay that works; they wait");
            self.ask_twice(now, out);
        }
        true
    }

    /// Does it still know us? One lost datagram is no answer.
    fn ask_twice(&mut self, now: Instant, out: &mut Out) {
        let State::Allocated { active, granted } = &mut self.state else { return };
        // Without a deadline for the next refresh one is in flight already.
        if granted.refresh_at.take().is_some() {
            let server = active.server;
            self.request(Request::Refresh, server, &LADDER[..2], now, out);
        }
    }

    /// Is the portal's later word on the relay waiting for the end of the allocation?
    pub(super) fn has_successor(&self) -> bool {
        self.successor.is_some()
    }

    /// Starts again by the portal's later word, if there is one.
    pub(super) fn succeed(&mut self, now: Instant, out: &mut Out) -> bool {
        let Some(server) = self.successor.take() else { return false };
        tracing::debug!(relay = %self.id, "Starting again with the credentials that the portal sent last");
        let at = family(server.addr);
        self.servers[at] = Some(server);
        (self.nonce, self.nonce_number) = (None, 0);
        self.search(now, out);
        true
    }
}

impl Server {
    /// The same server, by credentials under another name.
    fn is_renamed(&self, new: &Self) -> bool {
        self.addr == new.addr && self.credentials.has_another_name_than(&new.credentials)
    }
}
