//! How long control's queues and tables are: for who looks for one that grows. It changes nothing.

use super::Control;

/// Lengths. The queues are empty whenever everything was drained; the tables have at most one entry per client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Depths {
    /// Clients with at least one authorization.
    pub clients: usize,
    /// Queue: commands and changed clients that the workers were not told of.
    pub to_workers: usize,
    /// Queue: datagrams, ours and to relays.
    pub to_network: usize,
    /// Queue: messages and candidates. Not empty while the portal is away.
    pub to_portal: usize,
    /// Queue: [`Event`](super::Event)s.
    pub to_shell: usize,
    /// Queue: what relays told and control did not look at.
    pub from_relays: usize,
    /// Authorizations that wait for a relay, 12 s at most.
    pub parked: usize,
    /// Candidates that wait for an authorization, 2 s at most.
    pub early: usize,
    /// Names that are being looked up, 10 s at most.
    pub resolving: usize,
    /// Table: the connections' indices.
    pub indices: usize,
    /// Table: credentials that checks are recognised by.
    pub usernames: usize,
    /// Table: deadlines.
    pub timers: usize,
    /// Table: homes of clients, with those whose end the workers were not told.
    pub homes: usize,
}

impl Control {
    /// See [`Depths`].
    #[must_use]
    pub fn depths(&self) -> Depths {
        Depths {
            clients: self.clients.len(),
            to_workers: self.commands.len() + self.changed.len(),
            to_network: self.shared.transmits.len() + self.shared.relays.waiting().0,
            to_portal: self.egress.len() + self.shared.signals.len(),
            to_shell: self.events.len(),
            from_relays: self.shared.relays.waiting().1,
            parked: self.parked.len(),
            early: self.early.len(),
            resolving: self.resolutions.len(),
            indices: self.indices_in_use.len(),
            usernames: self.shared.router.usernames(),
            timers: self.timers.len(),
            homes: self.placement.len(),
        }
    }
}
