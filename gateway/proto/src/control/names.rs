//! The names that clients assign proxy addresses to, and the answers they get (dns.md section 5). Knows no packet and
//! no resolver.
//!
//! ```text
//! WorkerEvent::Assigned -> authorized? -> Event::Resolve -> handle_resolved -> Answer, with the client's next state
//! ```
//!
//! No worker translates yet, so every answer is "inactive": the client drops what it has for the name, and asks again
//! when somebody looks the name up.

use std::{sync::Arc, time::Instant};

use gateway_common::DropReason;
use tracing::debug;

use super::{
    Control, Event,
    resolutions::{Wait, Waiter},
};
use crate::{
    ids::{ClientId, ConnectionIndex, ResourceId},
    names::{Answer, AssignedIps, DomainName, Names, Resolved},
};

/// What control knows of one client's names.
#[derive(Debug, Default)]
pub(super) struct ClientNames {
    /// Shared with the workers.
    complete: Arc<Names>,
}

impl ClientNames {
    /// Everything, for the workers.
    pub(super) fn names(&self) -> Arc<Names> {
        Arc::clone(&self.complete)
    }

    /// The client is to hear this; its serial is higher than that of all before.
    fn answer(&mut self, answer: Answer) {
        let Names { domains, answers } = &*self.complete;
        let kept = &answers[answers.len().saturating_sub(Answer::KEPT - 1)..];
        let answers = kept.iter().cloned().chain([answer]).collect();
        self.complete = Arc::new(Names { domains: Arc::clone(domains), answers });
    }
}

impl Control {
    /// The name of an [`Event::Resolve`] was looked up: once for each of these events, 10 s after it at the latest.
    pub fn handle_resolved(&mut self, name: &DomainName, resolved: &Resolved, now: Instant) {
        debug!(domain = %name, ?resolved, "Looked up");
        for Waiter { client, index, resource, said, .. } in self.resolutions.take(name) {
            if self.is_current(client, index) {
                self.answer(client, resource, said, false);
            }
        }
        self.settle(now);
    }

    /// A client assigned proxy addresses to a name.
    pub(super) fn on_assigned(&mut self, id: ClientId, index: ConnectionIndex, assigned: AssignedIps) {
        let Some(client) = self.clients.get(&id) else { return };
        let AssignedIps { resource, domain, .. } = &assigned;
        if !client.authorizations.is_dns(*resource) {
            debug!(client = %id, %resource, %domain, "A name of a resource without access");
            return self.answer(id, *resource, assigned.said, false);
        }
        let (resource, domain) = (*resource, domain.clone());
        match self.resolutions.wait(id, index, assigned) {
            Wait::LookUp => self.events.push_back(Event::Resolve(domain)),
            Wait::Merged => {}
            Wait::Refused => {
                debug!(client = %id, %resource, %domain, "Too many names are being looked up");
                self.counters.count(DropReason::ControlQueueFull);
            }
        }
    }

    fn answer(&mut self, id: ClientId, resource: ResourceId, said: Arc<str>, active: bool) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        self.last_answer += 1;
        client.names.answer(Answer { serial: self.last_answer, resource, said, active });
        self.mark_changed(id);
    }
}
