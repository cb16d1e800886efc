//! One worker's fast path: its sockets on all queues, the ways out, and the order in which rings and sockets are read.
//!
//! Frames become [`Datagram`]s, as from a UDP socket; a datagram for a known way is built in a frame, as in the buffers
//! of `gso.rs`. Whatever cannot be done here goes through the kernel's sockets: [`Fast::prepare`] says no.

use std::{
    cell::Cell,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use gateway_common::{
    Counters, DropReason,
    frame::{ETHERNET, Frame, IPV4, IPV6, TYPE_VLAN, UDP, VLAN_TAG, parse},
};
use gateway_proto::{Datagram, Ecn, Route, addr::MAX_DATAGRAM};

use super::{
    headers::PAYLOAD_AT,
    order::{Order, Switch},
    port::{BATCH, Batch, Port, Wire},
    socket::Socket,
    ways::Ways,
};

/// Sockets of one worker, at most: what an epoll set is asked about in one go.
pub const MAX_PORTS: usize = 64;

/// Frames carried, for who wants to know whether any are.
#[derive(Debug, Default)]
pub struct Figures {
    /// From the rings to the worker.
    pub received: AtomicU64,
    /// From the worker to the rings.
    pub sent: AtomicU64,
}

/// A port, and where it is.
pub struct Place<W> {
    /// The interface's index.
    pub interface: u32,
    /// The port on one of its queues.
    pub port: Port<W>,
}

/// A worker's fast path.
pub struct Fast<W = Socket> {
    places: Vec<Place<W>>,
    ways: Ways,
    order: Order,
    switch: Arc<Switch>,
    /// The place and way of the last reservation.
    reserved: Option<(usize, usize, Ecn)>,
    figures: Arc<Figures>,
    /// Datagrams may leave here.
    sends: bool,
}

impl<W: Wire> Fast<W> {
    /// For the worker of number `worker`. Of an interface's ports, the one at `worker` modulo their number sends, so
    /// that workers are spread over the queues. `None` with more than [`MAX_PORTS`] ports.
    pub fn new(worker: usize, mut places: Vec<Place<W>>, ways: Ways, switch: Arc<Switch>) -> Option<Self> {
        if places.len() > MAX_PORTS {
            return None;
        }
        places.sort_by_key(|place| place.interface);
        // The one that sends is the first of its interface.
        for ports in places.chunk_by_mut(|a, b| a.interface == b.interface) {
            let first = worker % ports.len();
            ports.rotate_left(first);
        }
        let (order, figures) = (Order::new(worker), Arc::default());
        let sends = switch.sends();
        Some(Self { places, ways, order, switch, reserved: None, figures, sends })
    }

    /// The same, which adds what it carries to `figures`.
    #[must_use]
    pub fn counting_in(self, figures: Arc<Figures>) -> Self {
        Self { figures, ..self }
    }

    /// What it carries, kept up to date.
    #[cfg(test)]
    pub fn figures(&self) -> Arc<Figures> {
        Arc::clone(&self.figures)
    }

    /// The sockets, to wait for.
    pub fn wires(&self) -> impl Iterator<Item = &W> {
        self.places.iter().map(|place| place.port.wire())
    }

    /// How many ports there are; [`Fast::look`] and [`Fast::receive`] take numbers below it.
    pub fn ports(&self) -> usize {
        self.places.len()
    }

    // The order of reading; see `order.rs`.

    /// A turn begins.
    #[inline]
    pub fn begin_turn(&mut self) {
        self.order.begin_turn(&self.switch);
    }

    /// See [`Order::on_passed`].
    #[inline]
    pub fn on_passed(&mut self, left: bool) {
        self.order.on_passed(left, &self.switch);
    }

    /// See [`Order::on_empty`].
    #[inline]
    pub fn on_empty(&mut self, v6: bool) {
        self.order.on_empty(v6);
    }

    /// A turn ends, and everything is flushed: the thread may sleep.
    #[inline]
    pub fn end_turn(&mut self) {
        self.places.iter_mut().for_each(|place| place.port.before_sleep());
        self.order.end_turn(&self.switch);
    }

    /// Whether the thread must not sleep for long: the kernel did not take everything, or workers wait for each other.
    pub fn is_waiting(&self) -> bool {
        self.order.is_waiting() || self.places.iter().any(|place| place.port.is_blocked())
    }

    // In.

    /// How many frames wait in a port; none while its ring is not to be read.
    #[inline]
    pub fn look(&mut self, port: usize) -> usize {
        if self.order.reads_rings() { self.places[port].port.look() } else { 0 }
    }

    /// The next frames of those that [`Fast::look`] saw. Must be given back.
    #[inline]
    pub fn receive(&mut self, port: usize) -> Option<Box<Batch>> {
        let batch = self.places[port].port.receive(BATCH)?;
        self.figures.received.fetch_add(batch.len() as u64, Ordering::Relaxed);
        Some(batch)
    }

    /// The batch is done with.
    #[inline]
    pub fn recycle(&mut self, port: usize, batch: Box<Batch>) {
        self.places[port].port.recycle(batch);
    }

    // Out.

    /// What is not so any more is forgotten. Call before each batch.
    #[inline]
    pub fn begin_batch(&mut self) {
        self.ways.begin_batch();
        self.sends = self.switch.sends();
    }

    /// Reserves [`Fast::buffer`] for a datagram of up to `len` bytes. False: it must go through the kernel.
    #[inline]
    pub fn prepare(&mut self, route: &Route, len: usize) -> bool {
        self.reserved = None;
        if !self.sends {
            return false;
        }
        let Some(number) = self.ways.find(route) else { return false };
        let Some(way) = self.ways.way(number).filter(|way| len <= way.max_payload()) else { return false };
        let interface = way.hop().interface;
        let Some(place) = self.places.iter().position(|place| place.interface == interface) else {
            return false;
        };
        if self.places[place].port.reserve().is_none_or(|frame| frame.len() < PAYLOAD_AT + len) {
            return false;
        }
        self.reserved = Some((place, number, route.ecn));
        true
    }

    /// Where the datagram is to be written.
    #[inline]
    pub fn buffer(&mut self) -> Option<&mut [u8]> {
        let (place, ..) = self.reserved?;
        self.places[place].port.reserved()?.get_mut(PAYLOAD_AT..)
    }

    /// Sends the first `len` bytes of the buffer with the next [`Fast::flush`].
    #[inline]
    pub fn commit(&mut self, len: usize) {
        let Some((place, number, ecn)) = self.reserved.take() else { return };
        let Some(way) = self.ways.way(number) else { return };
        let port = &mut self.places[place].port;
        let Some(frame) = port.reserved() else { return };
        if len > 0
            && let Some(start) = way.finish(frame, len, ecn)
            && port.commit(start, PAYLOAD_AT + len - start)
        {
            self.figures.sent.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Hands everything to the kernel, as far as it takes it.
    pub fn flush(&mut self) {
        self.reserved = None;
        for place in &mut self.places {
            place.port.flush();
        }
    }

    /// Counts what the kernel has dropped since the last call.
    pub fn count_drops(&mut self, drops: &mut Counters) {
        for place in &mut self.places {
            place.port.count_drops(drops);
        }
    }
}

/// What of a batch is no datagram.
#[derive(Default)]
pub struct Refused {
    malformed: Cell<u64>,
    oversized: Cell<u64>,
}

impl Refused {
    /// Counts it.
    pub fn count(&self, drops: &mut Counters) {
        drops.add(DropReason::UnknownPayload, self.malformed.take());
        drops.add(DropReason::OversizedDatagram, self.oversized.take());
    }
}

/// The datagrams in a batch, ChannelData headers and all; or without, if the kernel has taken them off and made lengths
/// fit. What is none is added to `refused` as the iterator gets there.
pub fn datagrams<'a>(batch: &'a Batch, refused: &'a Refused) -> impl Iterator<Item = Datagram<'a>> {
    batch.frames().filter_map(|frame| {
        let Some(datagram) = datagram(frame) else {
            refused.malformed.set(refused.malformed.get() + 1);
            return None;
        };
        // "Stride > 1316: whole message dropped" (connections.md section 2.3): the same for both paths.
        if datagram.payload.len() > MAX_DATAGRAM {
            refused.oversized.set(refused.oversized.get() + 1);
            return None;
        }
        Some(datagram)
    })
}

fn datagram(frame: &[u8]) -> Option<Datagram<'_>> {
    let Frame::Udp { at, len } = parse(frame) else { return None };
    let (headers, payload) = frame.split_at_checked(at)?;
    let (headers, udp) = headers.split_last_chunk::<UDP>()?;
    let tagged = TYPE_VLAN.contains(&u16::from_be_bytes(*headers[ETHERNET - 2..].first_chunk()?));
    let ip = headers.get(if tagged { ETHERNET + VLAN_TAG } else { ETHERNET }..)?;
    // Neither options nor extension headers.
    let (from, local, tos): (IpAddr, IpAddr, u8) = match ip.len() {
        IPV4 => {
            let (from, local): ([u8; 4], [u8; 4]) = (*ip[12..].first_chunk()?, *ip[16..].first_chunk()?);
            (from.into(), local.into(), ip[1])
        }
        IPV6 => {
            let (from, local): ([u8; 16], [u8; 16]) = (*ip[8..].first_chunk()?, *ip[24..].first_chunk()?);
            (from.into(), local.into(), ip[1] >> 4)
        }
        _ => return None,
    };
    let [s0, s1, d0, d1, ..] = *udp;
    Some(Datagram {
        local: SocketAddr::new(local, u16::from_be_bytes([d0, d1])),
        from: SocketAddr::new(from, u16::from_be_bytes([s0, s1])),
        ecn: Ecn::from_bits(tos),
        payload: payload.get(..len)?,
    })
}

#[cfg(test)]
mod tests;
