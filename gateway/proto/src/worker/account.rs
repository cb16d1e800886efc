//! Where the walks meet the accounting of flows: whose flows are counted, what is told of packets that are denied, and
//! how a client goes. Knows clients and what is told; what makes a flow is `flows`, and nothing here decides about a
//! packet.
//!
//! ```text
//! Command::Accounting, WallClock, Client -> account: Peer::flows is made, or closed        (on, a clock, a token)
//! the walks  -> outbound, inbound -> Flows -> WorkerEvent::Flow
//!            -> tell_denied                -> WorkerEvent::Denied                          (within a budget)
//! whoever lets a client go -> retire -> Flows::close_all -> WorkerEvent::Flow
//! ```
//!
//! A report that control's queue has no room for is lost, and counted. Where nothing is counted, a packet costs a look
//! at an empty [`Peer::flows`].

use std::{net::IpAddr, time::Instant};

use gateway_common::DropReason;

use super::{
    Traffic, Worker,
    bucket::{Bucket, Rate},
    demux::Arrival,
    events::Events,
    flows::{Flows, MAX_FLOWS, Occasion, Way},
    inner::{self, ICMP, ICMPV6, Inner, TCP, Transport, UDP},
    peer::Peer,
    peers::Entry,
    slot::Slot,
};
use crate::{
    WorkerEvent,
    addr::TunnelAddrs,
    flow::{DeniedReport, FlowReport, Meeting, UnixTime},
    ids::{ClientId, ResourceId},
};

/// Denied packets of one client that are told one by one. More of them say the same again and again.
const DENIED: Rate = Rate { per_second: 10, burst: 20 };

/// A client's packet that goes out.
#[derive(Debug, Clone, Copy)]
pub struct Passing {
    /// By which resource it was let through; `None` if it is for ourselves.
    pub by: Option<ResourceId>,
    /// The proxy address that it was sent to, if it was translated.
    pub proxy: Option<IpAddr>,
    /// Its view as it goes out.
    pub view: Inner,
}

/// What is told of a client's denied packets.
#[derive(Debug, Clone, Copy)]
pub struct Denials {
    budget: Bucket,
    /// Those that were not told, since the last that was.
    suppressed: u64,
}

impl Default for Denials {
    fn default() -> Self {
        Self { budget: Bucket::FULL, suppressed: 0 }
    }
}

/// A client's packet is about to leave for the TUN, which never refuses one that it has reserved.
#[inline]
pub fn outbound(
    peer: &mut Peer,
    packet: &[u8],
    passing: &Passing,
    arrival: &Arrival<'_>,
    clock: Option<Meeting>,
    now: Instant,
    mut out: impl FnMut(Box<FlowReport>),
) {
    let (Some(flows), Some(resource), Some(clock)) = (&mut peer.flows, passing.by, clock) else { return };
    let own = arrival.via().map_or(arrival.datagram.local, |(relay, _)| relay);
    let way = Way { client: Some(arrival.from()), own };
    let (proxies, attributions) = (&peer.proxies, &*peer.attributions);
    let domain = || Some(proxies.get(passing.proxy?)?.domain.name.clone());
    let occasion = Occasion { resource, domain: &domain, attributions, clock };
    flows.outbound(packet, &passing.view, way, &occasion, now, &mut out);
}

/// A resource's packet was sent to the client; `sent` is its view as the resource sent it.
#[inline]
pub fn inbound(
    peer: &mut Peer,
    packet: &[u8],
    sent: Option<Inner>,
    now: Instant,
    mut out: impl FnMut(Box<FlowReport>),
) {
    if let (Some(flows), Some(view)) = (&mut peer.flows, sent) {
        flows.inbound(packet, &view, now, &mut out);
    }
}

/// Takes reports to control, as far as there is room.
pub fn told<'a>(events: &'a mut Events, traffic: &'a mut Traffic) -> impl FnMut(Box<FlowReport>) + 'a {
    |report| {
        if !events.push(WorkerEvent::Flow(report)) {
            traffic.flow_reports_lost += 1;
        }
    }
}

impl Worker {
    /// Flows are counted from now on, or not any more.
    pub(super) fn set_accounting(&mut self, on: bool, now: Instant) {
        self.accounting = on;
        self.account_all(now);
    }

    /// What the wall clock shows. Flows that are open keep the time that they began at.
    pub(super) fn set_clock(&mut self, clock: Meeting, now: Instant) {
        self.clock = Some(clock);
        self.account_all(now);
    }

    fn account_all(&mut self, now: Instant) {
        for slot in self.peers.slots() {
            self.account(slot, now);
        }
    }

    /// Begins or ceases to count the flows of the client at `slot`, as is wanted now. A client that none of its resources
    /// has a token for has nothing to count; one that had some loses them, and what it has open goes on.
    pub(super) fn account(&mut self, slot: Slot, now: Instant) {
        let wanted = self.accounting && self.clock.is_some();
        let Some(peer) = self.peers.get_mut(slot) else { return };
        if !wanted {
            close_flows(peer, now, told(&mut self.events, &mut self.traffic));
        } else if peer.flows.is_none() && !peer.attributions.is_empty() {
            // Another for each table, far from the others: ids of flows count up from it.
            self.spread = self.spread.wrapping_add(1);
            let seed = (self.spread ^ peer.id.0.as_u64_pair().1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            peer.flows = Some(Box::new(Flows::new(peer.id, seed, MAX_FLOWS, now)));
        }
    }

    /// The client at `slot` is about to have these addresses: its flows were between others.
    pub(super) fn on_tunnel(&mut self, slot: Slot, tunnel: TunnelAddrs, now: Instant) {
        if let Some(peer) = self.peers.get_mut(slot).filter(|peer| peer.tunnel != tunnel) {
            close_flows(peer, now, told(&mut self.events, &mut self.traffic));
        }
    }

    /// A client goes: what it has open is closed.
    pub(super) fn retire(&mut self, mut peer: Box<Peer>, now: Instant) {
        close_flows(&mut peer, now, told(&mut self.events, &mut self.traffic));
    }

    /// What was known of a client is replaced.
    pub(super) fn retire_entry(&mut self, entry: Option<Entry>, now: Instant) {
        if let Some(peer) = entry.and_then(Entry::into_peer) {
            self.retire(peer, now);
        }
    }

    /// A resource's packet was denied. It may be translated by now: the client's names for both ends are told.
    #[cold]
    pub(super) fn tell_denied_inbound(&mut self, packet: &[u8], reason: DropReason, now: Instant) {
        let Ok(view) = inner::view(packet) else { return };
        if let Some(slot) = self.peers.by_tunnel(view.dst) {
            self.tell_denied(slot, &view, reason, now);
        }
    }

    /// A packet of the client at `slot`, or to it, was denied.
    #[cold]
    pub(super) fn tell_denied(&mut self, slot: Slot, view: &Inner, reason: DropReason, now: Instant) {
        let Some(clock) = self.clock.filter(|_| self.accounting) else { return };
        let Some(peer) = self.peers.get_mut(slot) else { return };
        let denials = &mut peer.denials;
        if denials.budget.take(DENIED, now) {
            let report = denied(peer.id, view, reason, clock.unix_time(now), denials.suppressed);
            if self.events.push(WorkerEvent::Denied(Box::new(report))) {
                denials.suppressed = 0;
                return;
            }
        }
        denials.suppressed += 1;
    }
}

/// What is still open is closed, and no more is counted.
fn close_flows(peer: &mut Peer, now: Instant, mut out: impl FnMut(Box<FlowReport>)) {
    if let Some(mut flows) = peer.flows.take() {
        flows.close_all(now, &mut out);
    }
}

fn denied(client: ClientId, view: &Inner, reason: DropReason, at: UnixTime, suppressed: u64) -> DeniedReport {
    let (protocol, ports) = match view.transport {
        Transport::Tcp { src, dst } => (TCP, Some((src, dst))),
        Transport::Udp { src, dst } => (UDP, Some((src, dst))),
        Transport::IcmpEcho | Transport::IcmpError | Transport::Icmp(_) => {
            (if view.src.is_ipv4() { ICMP } else { ICMPV6 }, None)
        }
        Transport::Other(protocol) => (protocol, None),
    };
    DeniedReport { client, reason, protocol, src: view.src, dst: view.dst, ports, at, suppressed }
}
