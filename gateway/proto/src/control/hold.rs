//! Local candidates on their way to clients: one message per client and drain, held while the portal is away.
//!
//! An addition and a removal of the same candidate cancel each other (connections.md section 4.3). It knows text and
//! clients, neither ICE nor the portal's socket.

use std::collections::VecDeque;

use rustc_hash::FxHashMap;

use crate::{ids::ClientId, portal::messages::Egress};

/// What is to be signalled, by client in the order of the first change.
#[derive(Debug, Default)]
pub(super) struct Signals {
    pending: FxHashMap<ClientId, Pending>,
    order: VecDeque<ClientId>,
}

/// A candidate as the other side gets it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Signalled {
    /// The line's fourth field.
    pub(super) priority: u32,
    /// The line.
    pub(super) text: String,
}

#[derive(Debug, Default)]
struct Pending {
    added: Vec<Signalled>,
    removed: Vec<Signalled>,
}

impl Signals {
    /// The client shall know `candidate`.
    pub(super) fn add(&mut self, client: ClientId, candidate: Signalled) {
        let pending = self.of(client);
        // Not told that it is gone: the client still has it.
        if let Some(untold) = pending.removed.iter().position(|c| *c == candidate) {
            pending.removed.swap_remove(untold);
        } else if !pending.added.contains(&candidate) {
            pending.added.push(candidate);
        }
    }

    /// The client shall forget `candidate`.
    pub(super) fn remove(&mut self, client: ClientId, candidate: Signalled) {
        let pending = self.of(client);
        if let Some(untold) = pending.added.iter().position(|c| *c == candidate) {
            pending.added.swap_remove(untold);
        } else if !pending.removed.contains(&candidate) {
            pending.removed.push(candidate);
        }
    }

    /// The client's connection failed or closed: nothing of it is told any more.
    pub(super) fn forget(&mut self, client: ClientId) {
        if self.pending.remove(&client).is_some() {
            self.order.retain(|c| *c != client);
        }
    }

    /// How many clients are to be told something.
    pub(super) fn len(&self) -> usize {
        self.order.len()
    }

    /// The next message, a client's additions before its removals.
    pub(super) fn poll(&mut self) -> Option<Egress> {
        while let Some(client) = self.order.front().copied() {
            let pending = self.of(client);
            let added = lines(std::mem::take(&mut pending.added));
            if !added.is_empty() {
                return Some(Egress::BroadcastIceCandidates(client, added));
            }
            let removed = lines(std::mem::take(&mut pending.removed));
            self.forget(client);
            if !removed.is_empty() {
                return Some(Egress::BroadcastInvalidatedIceCandidates(client, removed));
            }
        }
        None
    }

    fn of(&mut self, client: ClientId) -> &mut Pending {
        self.pending.entry(client).or_insert_with(|| {
            self.order.push_back(client);
            Pending::default()
        })
    }
}

/// "Order inside the array: descending priority, ties by text" (connections.md section 4.3).
fn lines(mut candidates: Vec<Signalled>) -> Vec<String> {
    candidates.sort_by(|a, b| b.priority.cmp(&a.priority).then_with(|| a.text.cmp(&b.text)));
    candidates.into_iter().map(|c| c.text).collect()
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn additions_and_removals_of_one_candidate_cancel_each_other() {
        enum Step {
            Add(&'static str),
            Remove(&'static str),
        }
        use Step::{Add, Remove};
        type Case = (&'static str, &'static [Step], &'static [&'static str], &'static [&'static str]);
        let table: &[Case] = &[
            ("plain", &[Add("a"), Add("b")], &["a", "b"], &[]),
            ("twice is once", &[Add("a"), Add("a"), Remove("b"), Remove("b")], &["a"], &["b"]),
            ("never told, never untold", &[Add("a"), Remove("a")], &[], &[]),
            ("back before it was untold", &[Remove("a"), Add("a")], &[], &[]),
            ("gone again", &[Remove("a"), Add("a"), Remove("a")], &[], &["a"]),
        ];
        for (name, steps, added, removed) in table {
            let mut signals = Signals::default();
            for step in *steps {
                match step {
                    Add(text) => signals.add(client(1), line(1, text)),
                    Remove(text) => signals.remove(client(1), line(1, text)),
                }
            }
            let sent: Vec<_> = std::iter::from_fn(|| signals.poll()).collect();
            let mut expect = Vec::new();
            if !added.is_empty() {
                expect.push(Egress::BroadcastIceCandidates(client(1), owned(added)));
            }
            if !removed.is_empty() {
                expect.push(Egress::BroadcastInvalidatedIceCandidates(client(1), owned(removed)));
            }
            assert_eq!(sent, expect, "{name}");
        }
    }

    #[test]
    fn one_message_per_client_sorted_by_descending_priority() {
        let mut signals = Signals::default();
        for (priority, text) in [(2, "relay"), (126, "host-b"), (100, "srflx"), (126, "host-a")] {
            signals.add(client(1), line(priority, text));
        }
        signals.add(client(2), line(1, "x"));
        let sent: Vec<_> = std::iter::from_fn(|| signals.poll()).collect();
        assert_eq!(
            sent,
            [
                Egress::BroadcastIceCandidates(client(1), owned(&["host-a", "host-b", "srflx", "relay"])),
                Egress::BroadcastIceCandidates(client(2), owned(&["x"])),
            ]
        );
    }

    #[test]
    fn a_forgotten_client_is_told_nothing() {
        let mut signals = Signals::default();
        signals.add(client(1), line(1, "a"));
        signals.forget(client(1));
        assert_eq!(signals.poll(), None);
    }

    fn client(n: u128) -> ClientId {
        ClientId(Uuid::from_u128(n))
    }

    fn line(priority: u32, text: &str) -> Signalled {
        Signalled { priority, text: text.to_owned() }
    }

    fn owned(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|t| (*t).to_owned()).collect()
    }
}
