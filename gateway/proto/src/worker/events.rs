//! What control must hear. Each kind has its bound, so that STUN or junk cannot crowd out session events.
//! Knows no client state.

use std::collections::VecDeque;

use crate::{WorkerEvent, command::StunDatagram};

/// Queues, drained in the order session events, then STUN.
pub struct Events {
    /// Established, Expired and Goodbye need no quota: each comes at most once per connection control made.
    session: VecDeque<WorkerEvent>,
    activity: usize,
    channels: usize,
    assigned: usize,
    flows: usize,
    denied: usize,
    stun: VecDeque<StunDatagram>,
}

/// One batch of 32 from each of a few hundred clients checking at once.
const STUN_QUOTA: usize = 512;
/// More clients than that are active again five seconds later at the latest.
const ACTIVITY_QUOTA: usize = 4096;
/// Clients repeat what found no answer after 2 s (dns.md section 5.1).
const ASSIGNED_QUOTA: usize = 1024;
/// What opens and closes in one batch, or when many clients go at once.
const FLOW_QUOTA: usize = 8192;
/// Denied packets are a sample anyway.
const DENIED_QUOTA: usize = 256;

impl Events {
    /// Empty ones.
    pub fn new() -> Self {
        Self {
            session: VecDeque::with_capacity(64),
            activity: 0,
            channels: 0,
            assigned: 0,
            flows: 0,
            denied: 0,
            stun: VecDeque::with_capacity(STUN_QUOTA),
        }
    }

    /// False if the quota of the event's kind is used up; the event is gone then.
    pub fn push(&mut self, event: WorkerEvent) -> bool {
        match event {
            WorkerEvent::Stun(_) if self.stun.len() >= STUN_QUOTA => return false,
            WorkerEvent::Stun(datagram) => {
                self.stun.push_back(datagram);
                return true;
            }
            WorkerEvent::Activity { .. } if self.activity >= ACTIVITY_QUOTA => return false,
            WorkerEvent::Activity { .. } => self.activity += 1,
            WorkerEvent::ChannelsUsed(_) => self.channels += 1,
            WorkerEvent::Assigned { .. } if self.assigned >= ASSIGNED_QUOTA => return false,
            WorkerEvent::Assigned { .. } => self.assigned += 1,
            WorkerEvent::Flow(_) if self.flows >= FLOW_QUOTA => return false,
            WorkerEvent::Flow(_) => self.flows += 1,
            WorkerEvent::Denied(_) if self.denied >= DENIED_QUOTA => return false,
            WorkerEvent::Denied(_) => self.denied += 1,
            WorkerEvent::Established { .. }
            | WorkerEvent::Expired { .. }
            | WorkerEvent::Goodbye { .. }
            // One per question, and the next is asked when all have answered.
            | WorkerEvent::Replied(_)
            | WorkerEvent::Adopted { .. } => {}
        }
        self.session.push_back(event);
        true
    }

    /// Has control not yet fetched the last report of channels?
    pub fn holds_channels(&self) -> bool {
        self.channels > 0
    }

    /// Can another STUN message be queued?
    pub fn has_room_for_stun(&self) -> bool {
        self.stun.len() < STUN_QUOTA
    }

    /// The next one.
    pub fn pop(&mut self) -> Option<WorkerEvent> {
        let event = self.session.pop_front().or_else(|| self.stun.pop_front().map(WorkerEvent::Stun))?;
        match event {
            WorkerEvent::Activity { .. } => self.activity -= 1,
            WorkerEvent::ChannelsUsed(_) => self.channels -= 1,
            WorkerEvent::Assigned { .. } => self.assigned -= 1,
            WorkerEvent::Flow(_) => self.flows -= 1,
            WorkerEvent::Denied(_) => self.denied -= 1,
            _ => {}
        }
        Some(event)
    }
}
