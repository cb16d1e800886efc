//! What an operator hears of a worker (see [`inquiry`](crate::inquiry)). It changes nothing but a memo of the policy, and
//! looks at no more than one question may.

use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
    net::IpAddr,
    time::{Duration, Instant},
};

use gateway_common::DropReason;

use super::{Worker, inbound, inner::Inner, nat::Nat, outbound, peer::Peer, slot::Slot};
use crate::{
    WorkerEvent,
    ids::ClientId,
    inquiry::{
        Answer, ClientFigures, Imagined, Inquiry, Let, MAX_FLOWS_SEEN, MAX_FLOWS_TOLD, OpenFlow, PAGE,
        Question, Reply, Verdict,
    },
};

impl Worker {
    /// Answers.
    #[cold]
    pub(super) fn answer(&mut self, inquiry: &Inquiry, now: Instant) {
        let answer = match inquiry.question {
            Question::Clients { from } => self.tell_clients(from, now),
            Question::Flows { client, most } => self.tell_flows(client, most, now),
            Question::Why(packet) => Answer::Why(self.imagine(&packet, now)),
        };
        let reply = Reply { worker: self.id, serial: inquiry.serial, answer };
        self.events.push(WorkerEvent::Replied(Box::new(reply)));
    }

    fn tell_clients(&mut self, from: u32, now: Instant) -> Answer {
        let places = self.peers.places();
        let mut flows_left = MAX_FLOWS_SEEN;
        let page = (from..from.saturating_add(PAGE).min(places)).map(Slot);
        let mut clients = Vec::new();
        for slot in page {
            if let Some(peer) = self.peers.get_mut(slot) {
                clients.push(figures(peer, &mut flows_left, now));
            }
        }
        Answer::Clients { clients, places }
    }

    fn tell_flows(&mut self, client: Option<ClientId>, most: usize, now: Instant) -> Answer {
        let most = most.min(MAX_FLOWS_TOLD);
        let mut left = MAX_FLOWS_SEEN;
        let (mut open, mut seen) = (0, 0);
        let mut newest = BinaryHeap::with_capacity(most.saturating_add(1));
        for slot in self.peers.slots() {
            let Some(peer) = self.peers.get_mut(slot) else { continue };
            let Some(flows) = peer.flows.as_ref().filter(|_| client.is_none_or(|id| id == peer.id)) else {
                continue;
            };
            open += flows.len();
            for flow in flows.open_flows(now).take(left) {
                seen += 1;
                left -= 1;
                newest.push(ByAge(flow));
                if newest.len() > most {
                    newest.pop();
                }
            }
        }
        let flows = newest.into_sorted_vec().into_iter().map(|ByAge(flow)| flow).collect();
        Answer::Flows { counted: self.accounting, open, flows, looked_at_all: seen == open }
    }

    /// `None` if it is neither from a client of this worker nor to one.
    fn imagine(&mut self, packet: &Imagined, now: Instant) -> Option<Verdict> {
        let Imagined { src, dst, transport } = *packet;
        let (own, inner) = (self.own, Inner { src, dst, transport, transport_at: 0 });
        let is_ours = |ip| own.addrs.is_some_and(|addrs| addrs.contains(ip));
        let sender = self.peers.by_tunnel(src).filter(|_| !is_ours(src));
        let is_outbound = sender.is_some();
        let slot = sender.or_else(|| self.peers.by_tunnel(dst))?;
        let peer = self.peers.get_mut(slot)?;
        let outcome = match is_outbound {
            true if dst.is_multicast() => Err(DropReason::Multicast),
            true => match outbound::allow(peer, inner, own) {
                outbound::Verdict::ToTun(by, _) => Ok(Let { by, real: None }),
                outbound::Verdict::Translate(real, by, _) => Ok(Let { by: Some(by), real: Some(real) }),
                outbound::Verdict::Control(_) => Ok(Let { by: None, real: None }),
                outbound::Verdict::Drop(reason) | outbound::Verdict::Deny(_, reason, _) => Err(reason),
            },
            false => inbound::imagine(peer, &inner, own).map(|by| Let { by, real: None }),
        };
        let domain = |ip: IpAddr| Some(peer.proxies.get(ip)?.domain.name.clone());
        Some(Verdict {
            client: peer.id,
            is_outbound,
            has_session: peer.link.as_ref().is_some_and(|link| link.wg.is_sendable(now)),
            domain: domain(dst),
            outcome,
        })
    }
}

fn figures(peer: &Peer, flows_left: &mut usize, now: Instant) -> ClientFigures {
    let by_resource = match &peer.flows {
        Some(flows) if flows.len() <= *flows_left => {
            *flows_left -= flows.len();
            flows.by_resource()
        }
        _ => Vec::new(),
    };
    ClientFigures {
        id: peer.id,
        handshake_age: peer.link.as_ref().and_then(|link| link.wg.handshake_age(now)),
        outbound: peer.outbound,
        inbound: peer.inbound,
        translated: peer.nat.as_deref().map_or(0, Nat::sessions),
        flows: peer.flows.as_ref().map(|flows| flows.len()),
        by_resource,
    }
}

/// The older, the greater; of two of one age the one that was quiet for longer.
struct ByAge(OpenFlow);

impl ByAge {
    fn key(&self) -> (Duration, Duration, Reverse<(ClientId, u16)>) {
        (self.0.age, self.0.quiet, Reverse((self.0.client, self.0.src.port())))
    }
}

impl PartialEq for ByAge {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for ByAge {}

impl PartialOrd for ByAge {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for ByAge {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}
