//! What a client's flows carry, for flow logs (packets.md section 11, cli-and-service.md section 14.2): one [`Flows`]
//! per client, TCP and UDP of both families.
//!
//! This file is the order of steps for one packet; what of a segment opens and closes is `segment`, what a flow has
//! carried is `flow`. Only packets that were let through, and sent, come here, as the resource knows them: after the
//! translation outbound, before it inbound. Nothing here decides about a packet.
//!
//! ```text
//! outbound   packet -> key -> found:  another resource, SYN again, 17th way -> close and open again;  count
//!                             nothing: a segment that may open one, a token for the resource -> open;  count
//! inbound    packet -> key -> found: count
//! time       wheel -> both sides have finished, or nothing for two minutes -> close
//! ```
//!
//! A packet of an open flow allocates nothing unless it took a new way, and neither does one that belongs to none.

mod flow;
#[cfg(test)]
mod model;
mod segment;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use self::{flow::Flow, segment::Segment};
use rustc_hash::FxHashMap;

use super::{
    Volume,
    inner::{Inner, Transport},
    nat::{
        Kind, Outside, Secret,
        expiry::{Slot, Wheel},
    },
};
use crate::{
    flow::{Attribution, FlowId, FlowProtocol, FlowReport, Meeting},
    ids::{ClientId, ResourceId},
    inquiry::OpenFlow,
    names::DomainName,
};

/// "no packet for more than 120 s"
pub const IDLE: Duration = Duration::from_secs(120);
/// Flows of one client, unless a test has it otherwise.
pub const MAX_FLOWS: usize = 16_384;
/// How many are looked at for the idlest where one must go.
const SAMPLE: usize = 16;

/// Resources whose closed flows are summed up; further ones are not.
const MAX_TOTALS: usize = 1024;

/// Takes a report. It is boxed because it goes into a queue with smaller things.
pub type Out<'a> = &'a mut dyn FnMut(Box<FlowReport>);

/// The flows of one client.
pub struct Flows {
    client: ClientId,
    next: FlowId,
    limit: usize,
    slots: HashMap<Key, Slot, Secret>,
    flows: Vec<Option<Flow>>,
    free: Vec<Slot>,
    wheel: Wheel,
    due: Vec<Slot>,
    /// The flow of the last packet: batches are long runs of one flow.
    recent: Option<(Key, Slot)>,
    /// Where the next search for an idle one begins.
    hand: usize,
    /// What closed flows carried by resource: to it, from it. At most [`MAX_TOTALS`].
    totals: FxHashMap<ResourceId, (Volume, Volume)>,
}

/// Between whom the datagram of an outbound packet travelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// The client's side; through a channel of ours its peer. `None` if it is not known.
    pub client: Option<SocketAddr>,
    /// Our side.
    pub own: SocketAddr,
}

/// What is asked for only when a flow opens.
#[derive(Clone, Copy)]
pub struct Occasion<'a> {
    /// By which resource the packet was let through.
    pub resource: ResourceId,
    /// Finds the name that its destination was before the translation, if there was one.
    pub domain: &'a dyn Fn() -> Option<DomainName>,
    /// The client's, ascending by resource. A flow to a resource without one is not accounted.
    pub attributions: &'a [(ResourceId, Arc<Attribution>)],
    /// What the wall clock shows.
    pub clock: Meeting,
}

/// What tells a client's flows apart. Its own address is one per family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    /// Protocol, the client's port as the resource sees it, and the resource's address.
    outside: Outside,
    remote_port: u16,
}

impl Key {
    /// `None` for what is not accounted.
    #[inline]
    fn outbound(view: &Inner) -> Option<Self> {
        let (kind, src, dst) = ports(view)?;
        Some(Self { outside: Outside::new(kind, src, view.dst), remote_port: dst })
    }

    #[inline]
    fn inbound(view: &Inner) -> Option<Self> {
        let (kind, src, dst) = ports(view)?;
        Some(Self { outside: Outside::new(kind, dst, view.src), remote_port: src })
    }

    fn protocol(&self) -> FlowProtocol {
        match self.outside.kind() {
            Kind::Tcp => FlowProtocol::Tcp,
            Kind::Udp | Kind::Echo => FlowProtocol::Udp,
        }
    }
}

impl Occasion<'_> {
    fn attribution(&self) -> Option<&Arc<Attribution>> {
        let at = self.attributions.binary_search_by_key(&self.resource, |(resource, _)| *resource).ok()?;
        Some(&self.attributions[at].1)
    }
}

impl Flows {
    /// None yet. `seed` is random and this table's own: remote addresses and ports are the client's choice. Of more than
    /// `limit` flows the idlest found is closed, and opened again if it goes on: accounts get longer, never wrong.
    #[must_use]
    pub fn new(client: ClientId, seed: u64, limit: usize, now: Instant) -> Self {
        Self {
            client,
            next: FlowId(seed),
            limit: limit.max(1),
            slots: HashMap::with_hasher(Secret::new(seed)),
            flows: Vec::new(),
            free: Vec::new(),
            wheel: Wheel::new(now),
            due: Vec::new(),
            recent: None,
            hand: 0,
            totals: FxHashMap::default(),
        }
    }

    /// How many are open.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Is none open?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// A client's packet went out to the resource, in this form; `view` is its own.
    #[inline]
    pub fn outbound(
        &mut self,
        packet: &[u8],
        view: &Inner,
        way: Way,
        occasion: &Occasion<'_>,
        now: Instant,
        out: Out<'_>,
    ) {
        let Some(key) = Key::outbound(view) else { return };
        let segment = Segment::read(packet, view);
        let mut found = self.find(&key);
        if let Some(slot) = found
            && self.flow(slot).is_ended_by(&segment, occasion.resource)
        {
            self.close(slot, now, out);
            found = None;
        }
        let slot = match found {
            Some(slot) => slot,
            None => match self.open(key, view.src, &segment, way, occasion, now, out) {
                Some(slot) => slot,
                None => return,
            },
        };
        let flow = self.flow(slot);
        if flow.is_new_way(way) && !flow.add_way(way, now) && !segment.rst {
            self.split(slot, way, occasion, now, out);
        }
        let flow = self.flow(slot);
        flow.count_outbound(&segment, now);
        self.after(slot, &segment, now, out);
    }

    /// A resource's packet was sent to the client. `view` is from before the translation, which leaves all of `packet`
    /// as it is that is counted.
    #[inline]
    pub fn inbound(&mut self, packet: &[u8], view: &Inner, now: Instant, out: Out<'_>) {
        let Some(slot) = Key::inbound(view).and_then(|key| self.find(&key)) else { return };
        let segment = Segment::read(packet, view);
        self.flow(slot).count_inbound(&segment, now);
        self.after(slot, &segment, now, out);
    }

    /// Closes the flows whose time has come. Costs what it closes, and one look per flow and two minutes.
    pub fn handle_timeout(&mut self, now: Instant, out: Out<'_>) {
        let mut due = std::mem::take(&mut self.due);
        self.wheel.turn(now, &mut due);
        for slot in due.drain(..) {
            let Some(flow) = &self.flows[slot as usize] else { continue };
            if flow.has_finished() || self.wheel.is_past(flow.idle_at()) {
                self.close(slot, now, out);
            } else {
                let idle_at = flow.idle_at();
                self.wheel.schedule(slot, idle_at);
            }
        }
        self.due = due;
    }

    /// When [`Flows::handle_timeout`] has something to do next.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.wheel.poll_timeout()
    }

    /// Closes them all: the client goes, we do, or flows are not counted any more.
    pub fn close_all(&mut self, now: Instant, out: Out<'_>) {
        for slot in 0..self.flows.len() {
            if self.flows[slot].is_some() {
                self.close(Slot::try_from(slot).expect("as many as slots"), now, out);
            }
        }
    }

    #[inline]
    fn find(&mut self, key: &Key) -> Option<Slot> {
        if let Some((recent, slot)) = &self.recent
            && recent == key
        {
            return Some(*slot);
        }
        let slot = *self.slots.get(key)?;
        self.recent = Some((*key, slot));
        Some(slot)
    }

    #[inline]
    fn flow(&mut self, slot: Slot) -> &mut Flow {
        self.flows[slot as usize].as_mut().expect("the slot of a key is taken")
    }

    /// `None` if the packet opens none.
    #[cold]
    #[expect(clippy::too_many_arguments, reason = "it is the second half of outbound()")]
    fn open(
        &mut self,
        key: Key,
        src: IpAddr,
        segment: &Segment,
        way: Way,
        occasion: &Occasion<'_>,
        now: Instant,
        out: Out<'_>,
    ) -> Option<Slot> {
        if !segment.opens {
            return None;
        }
        let attribution = occasion.attribution()?;
        if self.slots.len() >= self.limit {
            self.close_an_idle_one(now, out);
        }
        let id = self.next_id();
        let flow = Flow::new(id, key, src, attribution, way, occasion, now);
        out(Box::new(flow.report(self.client, None)));
        let slot = match self.free.pop() {
            Some(slot) => {
                self.flows[slot as usize] = Some(flow);
                slot
            }
            None => {
                self.flows.push(Some(flow));
                Slot::try_from(self.flows.len() - 1).expect("the limit is far below")
            }
        };
        self.slots.insert(key, slot);
        self.recent = Some((key, slot));
        self.wheel.schedule(slot, now + IDLE);
        Some(slot)
    }

    /// The same flow as a new record, because the old one has all the ways that one may have.
    #[cold]
    fn split(&mut self, slot: Slot, way: Way, occasion: &Occasion<'_>, now: Instant, out: Out<'_>) {
        let (id, client) = (self.next_id(), self.client);
        let flow = self.flow(slot);
        out(Box::new(flow.report(client, Some(now))));
        let (resource, carried) = (flow.resource(), flow.carried());
        flow.begin_again(id, way, occasion, now);
        out(Box::new(flow.report(client, None)));
        self.add_up(resource, carried);
    }

    /// What all flows carried by resource so far: to it, from it; ascending. Looks at every open flow.
    #[must_use]
    pub fn by_resource(&self) -> Vec<(ResourceId, Volume, Volume)> {
        let mut totals = self.totals.clone();
        for flow in self.flows.iter().flatten() {
            let (outbound, inbound) = totals.entry(flow.resource()).or_default();
            let carried = flow.carried();
            outbound.merge(carried.0);
            inbound.merge(carried.1);
        }
        let mut totals: Vec<_> = totals.into_iter().map(|(id, (to, from))| (id, to, from)).collect();
        totals.sort_unstable_by_key(|(id, ..)| *id);
        totals
    }

    /// The open flows, in no order.
    pub fn open_flows(&self, now: Instant) -> impl Iterator<Item = OpenFlow> + '_ {
        self.flows.iter().flatten().map(move |flow| flow.open(self.client, now))
    }

    fn sum_up(&mut self, flow: &Flow) {
        self.add_up(flow.resource(), flow.carried());
    }

    fn add_up(&mut self, resource: ResourceId, carried: (Volume, Volume)) {
        if self.totals.len() >= MAX_TOTALS && !self.totals.contains_key(&resource) {
            return;
        }
        let (outbound, inbound) = self.totals.entry(resource).or_default();
        outbound.merge(carried.0);
        inbound.merge(carried.1);
    }

    #[cold]
    fn close(&mut self, slot: Slot, now: Instant, out: Out<'_>) {
        let Some(flow) = self.flows[slot as usize].take() else { return };
        out(Box::new(flow.report(self.client, Some(now))));
        self.sum_up(&flow);
        self.slots.remove(&flow.key());
        self.free.push(slot);
        self.wheel.remove(slot);
        self.recent = self.recent.filter(|(_, recent)| *recent != slot);
    }

    /// What closes at once, and what at the next look.
    #[inline]
    fn after(&mut self, slot: Slot, segment: &Segment, now: Instant, out: Out<'_>) {
        if segment.rst {
            self.close(slot, now, out);
        } else if segment.fin && self.flow(slot).has_finished() {
            self.wheel.hasten(slot, now);
        }
    }

    #[cold]
    fn close_an_idle_one(&mut self, now: Instant, out: Out<'_>) {
        let all = self.flows.len();
        let sample = (0..all.min(SAMPLE)).map(|step| (self.hand + step) % all);
        let idlest = sample
            .filter_map(|slot| Some((self.flows[slot].as_ref()?.idle_at(), slot)))
            .min()
            .map(|(_, slot)| Slot::try_from(slot).expect("as many as slots"));
        self.hand = (self.hand + SAMPLE) % all.max(1);
        if let Some(slot) = idlest {
            self.close(slot, now, out);
        }
    }

    fn next_id(&mut self) -> FlowId {
        let id = self.next;
        self.next.0 = id.0.wrapping_add(1);
        id
    }
}

/// Protocol, source and destination port of what is accounted.
#[inline]
fn ports(view: &Inner) -> Option<(Kind, u16, u16)> {
    match view.transport {
        Transport::Tcp { src, dst } => Some((Kind::Tcp, src, dst)),
        Transport::Udp { src, dst } => Some((Kind::Udp, src, dst)),
        Transport::IcmpEcho | Transport::IcmpError | Transport::Icmp(_) | Transport::Other(_) => None,
    }
}
