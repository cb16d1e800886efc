//! One flow: who it is between, what it has carried, and its report. Knows no other.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Instant,
};

use super::{IDLE, Key, Occasion, Way, segment::Segment};
use crate::{
    flow::{Attribution, FlowEnd, FlowId, FlowReport, Outer, UnixTime},
    ids::{ClientId, ResourceId},
    inquiry::OpenFlow,
    names::DomainName,
    worker::Volume,
};

/// "At most 16 per flow"
pub const MAX_WAYS: usize = 16;

/// A flow.
pub struct Flow {
    key: Key,
    /// The client's address.
    src: IpAddr,
    id: FlowId,
    resource: ResourceId,
    attribution: Arc<Attribution>,
    domain: Option<DomainName>,
    /// By the wall clock as it was then: a step since changes nothing, so both halves agree and no flow ends before it
    /// began.
    start: UnixTime,
    opened: Instant,
    last: Instant,
    rx: Carried,
    tx: Carried,
    /// The way of the last outbound packet.
    way: Way,
    ways: Vec<Outer>,
    /// The client has sent something else than a SYN.
    past_syn: bool,
    outbound_fin: bool,
    inbound_fin: bool,
}

#[derive(Clone, Copy, Default)]
struct Carried {
    packets: u64,
    bytes: u64,
}

impl Flow {
    /// One that nothing was counted for yet.
    pub fn new(
        id: FlowId,
        key: Key,
        src: IpAddr,
        attribution: &Arc<Attribution>,
        way: Way,
        occasion: &Occasion<'_>,
        now: Instant,
    ) -> Self {
        let start = occasion.clock.unix_time(now);
        Self {
            key,
            src,
            id,
            resource: occasion.resource,
            attribution: Arc::clone(attribution),
            domain: (occasion.domain)(),
            start,
            opened: now,
            last: now,
            rx: Carried::default(),
            tx: Carried::default(),
            way,
            ways: vec![outer(way, start)],
            past_syn: false,
            outbound_fin: false,
            inbound_fin: false,
        }
    }

    /// The next record of the same connection.
    pub fn begin_again(&mut self, id: FlowId, way: Way, occasion: &Occasion<'_>, now: Instant) {
        // A token that was taken back meanwhile still says whose this is.
        let attribution = Arc::clone(occasion.attribution().unwrap_or(&self.attribution));
        let (past_syn, outbound_fin, inbound_fin) = (self.past_syn, self.outbound_fin, self.inbound_fin);
        let new = Self::new(id, self.key, self.src, &attribution, way, occasion, now);
        *self = Self { past_syn, outbound_fin, inbound_fin, ..new };
    }

    /// What it is found by.
    pub fn key(&self) -> Key {
        self.key
    }

    /// To which resource.
    pub fn resource(&self) -> ResourceId {
        self.resource
    }

    /// What it carried: to the resource, from it.
    pub fn carried(&self) -> (Volume, Volume) {
        let volume = |carried: Carried| Volume { packets: carried.packets, bytes: carried.bytes };
        (volume(self.tx), volume(self.rx))
    }

    /// For an operator. `client` is whose it is.
    pub fn open(&self, client: ClientId, now: Instant) -> OpenFlow {
        let (outbound, inbound) = self.carried();
        let (src, dst) = self.ends();
        OpenFlow {
            client,
            resource: self.resource,
            protocol: self.key.protocol(),
            src,
            dst,
            domain: self.domain.clone(),
            age: now.saturating_duration_since(self.opened),
            quiet: now.saturating_duration_since(self.last),
            outbound,
            inbound,
        }
    }

    /// Is an outbound segment, let through by `resource`, not of this flow but of the next with the same key?
    #[inline]
    pub fn is_ended_by(&self, segment: &Segment, resource: ResourceId) -> bool {
        self.resource != resource || (segment.syn && self.past_syn && !segment.rst)
    }

    /// Is this not the way that the last outbound packet took?
    #[inline]
    pub fn is_new_way(&self, way: Way) -> bool {
        self.way != way
    }

    /// False if the record has as many as there may be.
    #[cold]
    pub fn add_way(&mut self, way: Way, now: Instant) -> bool {
        let room = self.ways.len() < MAX_WAYS;
        if room {
            self.way = way;
            self.ways.push(outer(way, self.unix_time(now)));
        }
        room
    }

    /// Counts a packet from the client.
    #[inline]
    pub fn count_outbound(&mut self, segment: &Segment, now: Instant) {
        self.tx.count(segment);
        self.last = now;
        self.past_syn |= !segment.syn;
        self.outbound_fin |= segment.fin;
    }

    /// Counts a packet to the client.
    #[inline]
    pub fn count_inbound(&mut self, segment: &Segment, now: Instant) {
        self.rx.count(segment);
        self.last = now;
        self.inbound_fin |= segment.fin;
    }

    /// Have both sides sent all they will?
    #[inline]
    pub fn has_finished(&self) -> bool {
        self.outbound_fin && self.inbound_fin
    }

    /// When it counts as idle if nothing comes any more.
    pub fn idle_at(&self) -> Instant {
        self.last + IDLE
    }

    /// What there is to say, at its beginning or at its end at `ended`. One that both sides have finished ended with its
    /// last packet.
    pub fn report(&self, client: ClientId, ended: Option<Instant>) -> FlowReport {
        let end = ended.map(|ended| FlowEnd {
            end: self.unix_time(if self.has_finished() { self.last } else { ended }),
            last_packet: self.unix_time(self.last),
            rx_packets: self.rx.packets,
            tx_packets: self.tx.packets,
            rx_bytes: self.rx.bytes,
            tx_bytes: self.tx.bytes,
        });
        let (src, dst) = self.ends();
        FlowReport {
            id: self.id,
            client,
            attribution: Arc::clone(&self.attribution),
            protocol: self.key.protocol(),
            src,
            dst,
            domain: self.domain.clone(),
            outers: self.ways.clone(),
            start: self.start,
            end,
        }
    }

    /// The client's side and the resource's.
    fn ends(&self) -> (SocketAddr, SocketAddr) {
        let Key { outside, remote_port } = &self.key;
        (SocketAddr::new(self.src, outside.port()), SocketAddr::new(outside.real(), *remote_port))
    }

    fn unix_time(&self, instant: Instant) -> UnixTime {
        UnixTime(self.start.0.saturating_add(instant.saturating_duration_since(self.opened)))
    }
}

impl Carried {
    fn count(&mut self, segment: &Segment) {
        self.packets += 1;
        self.bytes += segment.payload;
    }
}

pub fn outer(way: Way, since: UnixTime) -> Outer {
    Outer { src: way.client, dst: way.own, since }
}
