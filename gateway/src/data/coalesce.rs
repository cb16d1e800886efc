//! To the TUN device: packets of a batch, merged per flow into super-packets (packets.md section 10, "Write").
//!
//! The kernel's stack then works once per super-packet instead of once per packet. Packets stay where the worker
//! built them; a super-packet is a rewritten copy of its first packet's headers and the payloads of all:
//!
//! ```text
//! arena    | 10 | packet a1 | 10 | packet b1 | 10 | packet a2 | 10 | packet a3 |      10: room for a virtio header
//! item A = a1 -> a2 -> a3     writev: [virtio, headers of A] [payload a1] [payload a2] [payload a3]
//! item B = b1                 write:  [10 zeros, b1]
//! ```
//!
//! A packet may only join the most recent item of its flow, so that order within a flow is the order of commits,
//! for any number of interleaved flows. What is merged can be split again into the same packets, but for the IPv4
//! identification of packets with DF, which RFC 6864 makes meaningless.

use std::{
    io::{self, IoSlice},
    time::{Duration, Instant},
};

use arrayvec::ArrayVec;
use gateway_common::{Counters, DropReason, checksum};
use rustc_hash::FxHashMap;

use super::{
    headers::{Layout, PSH, TCP_FLAGS, Transport},
    merge::{Flow, Open, begins, continues},
    virtio::{self, Header},
};

/// Where packets go.
pub trait Device {
    /// Writes one packet (with its virtio header, if the device has them) given in parts.
    ///
    /// # Errors
    /// The kernel's.
    fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<()>;
    /// What the device understands.
    fn offloads(&self) -> Offloads;
}

/// What a TUN device understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offloads {
    /// Every packet is preceded by a virtio header; TCP may be segmented.
    pub vnet: bool,
    /// UDP may be segmented.
    pub uso: bool,
}

/// Collects packets and writes them.
pub struct Writer<D> {
    device: D,
    offloads: Offloads,
    arena: Box<[u8]>,
    used: usize,
    reserved: Option<usize>,
    packets: Vec<Packet>,
    items: Vec<Item>,
    /// The most recent item of each flow.
    flows: FxHashMap<Flow, usize>,
    /// Super-packets of this transport were refused; rest until then.
    tcp_rests_until: Option<Instant>,
    udp_rests_until: Option<Instant>,
}

/// Bytes of packets that wait for [`Writer::flush`]; small enough to stay in the CPU's cache.
const ARENA: usize = 256 << 10;
/// Packets that wait for [`Writer::flush`].
const PACKETS: usize = 512;
/// The longest IP packet.
const MAX_LEN: usize = 65_535;
/// Packets of one item.
const MAX_MERGED: usize = 64;
/// How long merging rests after the kernel refused a super-packet.
const REST: Duration = Duration::from_secs(60);

#[derive(Clone, Copy)]
struct Packet {
    start: usize,
    len: usize,
    next: Option<usize>,
}

/// One write.
struct Item {
    first: usize,
    last: usize,
    count: usize,
    /// The packet's length once written.
    len: usize,
    /// `None`: nothing may join.
    open: Option<Open>,
    layout: Option<Layout>,
}

impl<D: Device> Writer<D> {
    /// With its buffers.
    pub fn new(device: D) -> Self {
        Self {
            offloads: device.offloads(),
            device,
            arena: vec![0; ARENA].into_boxed_slice(),
            used: 0,
            reserved: None,
            packets: Vec::with_capacity(PACKETS),
            items: Vec::with_capacity(PACKETS),
            flows: FxHashMap::with_capacity_and_hasher(PACKETS, rustc_hash::FxBuildHasher),
            tcp_rests_until: None,
            udp_rests_until: None,
        }
    }

    /// Packets that wait for [`Writer::flush`].
    pub fn waiting(&self) -> usize {
        self.packets.len()
    }

    /// At least `len` bytes for one packet; writes what waits if there is no place else. `None` only if no packet
    /// can be that long.
    pub fn reserve(&mut self, len: usize, now: Instant, drops: &mut Counters) -> Option<&mut [u8]> {
        self.reserved = None;
        if len > MAX_LEN {
            return None;
        }
        if self.packets.len() == PACKETS || self.arena.len() - self.used < virtio::LEN + len {
            self.flush(now, drops);
        }
        let start = self.used + virtio::LEN;
        self.reserved = Some(start);
        self.arena.get_mut(start..)
    }

    /// Queues the first `len` bytes of the last reservation.
    pub fn commit(&mut self, len: usize, now: Instant) {
        let Some(start) = self.reserved.take() else { return };
        if len == 0 || start + len > self.arena.len() {
            return;
        }
        // An earlier batch left a packet's bytes here.
        self.arena[start - virtio::LEN..start].fill(0);
        self.used = start + len;
        let index = self.packets.len();
        self.packets.push(Packet { start, len, next: None });
        let packet = &self.arena[start..start + len];
        let Some(layout) = self.mergeable(packet, now) else {
            self.items.push(Item { first: index, last: index, count: 1, len, open: None, layout: None });
            return;
        };
        let (flow, open) = (Flow::of(&layout, packet), begins(&layout, packet));
        if let Some(&item) = self.flows.get(&flow)
            && self.join(item, index, &layout)
        {
            return;
        }
        self.flows.insert(flow, self.items.len());
        self.items.push(Item { first: index, last: index, count: 1, len, open, layout: Some(layout) });
    }

    /// Writes everything that waits.
    pub fn flush(&mut self, now: Instant, drops: &mut Counters) {
        self.reserved = None;
        for i in 0..self.items.len() {
            self.write_item(i, now, drops);
        }
        self.items.clear();
        self.packets.clear();
        self.flows.clear();
        self.used = 0;
    }

    /// Whether nothing waits.
    #[cfg(test)]
    fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    fn mergeable(&self, packet: &[u8], now: Instant) -> Option<Layout> {
        if !self.offloads.vnet {
            return None;
        }
        let layout = Layout::of(packet)?;
        let (able, rests_until) = match layout.transport {
            Transport::Tcp => (true, self.tcp_rests_until),
            Transport::Udp => (self.offloads.uso, self.udp_rests_until),
        };
        (able && rests_until.is_none_or(|until| now >= until)).then_some(layout)
    }

    /// Appends packet `index` to `item` if the two can be split again.
    fn join(&mut self, item: usize, index: usize, layout: &Layout) -> bool {
        let Self { arena, packets, items, .. } = self;
        let item = &mut items[item];
        let (Some(open), Some(first_layout)) = (&mut item.open, item.layout) else { return false };
        let bytes = |p: Packet| &arena[p.start..p.start + p.len];
        let (first, packet) = (bytes(packets[item.first]), bytes(packets[index]));
        let payload = packet.len() - layout.payload;
        let grown = item.len + payload;
        let fits = *layout == first_layout
            && payload > 0
            && payload <= open.segment
            && grown <= MAX_LEN
            && item.count < MAX_MERGED
            && continues(layout, first, packet, item.count, item.len - layout.payload);
        if !fits {
            return false;
        }
        // The kernel will take the checksum of a super-packet for granted: a wrong one must not be hidden in it.
        if !open.verified {
            open.verified = layout.checksums_hold(first);
            if !open.verified {
                item.open = None;
                return false;
            }
        }
        if !layout.checksums_hold(packet) {
            return false;
        }
        let pushed = layout.transport == Transport::Tcp && packet[layout.l4 + TCP_FLAGS] & PSH != 0;
        if pushed || payload < open.segment {
            item.open = None;
        }
        packets[item.last].next = Some(index);
        item.last = index;
        item.count += 1;
        item.len = grown;
        true
    }

    fn write_item(&mut self, i: usize, now: Instant, drops: &mut Counters) {
        let item = &self.items[i];
        let (Some(layout), true) = (item.layout, item.count > 1) else {
            self.write_single(item.first, drops);
            return;
        };
        match self.write_merged(item, &layout) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                tracing::info!(
                    "The TUN device refused merged {:?} packets; writing singly for a minute",
                    layout.transport
                );
                match layout.transport {
                    Transport::Tcp => self.tcp_rests_until = Some(now + REST),
                    Transport::Udp => self.udp_rests_until = Some(now + REST),
                }
                let mut next = Some(item.first);
                while let Some(index) = next {
                    self.write_single(index, drops);
                    next = self.packets[index].next;
                }
            }
            Err(e) => count_failure(&e, item.count, drops),
        }
    }

    fn write_single(&self, index: usize, drops: &mut Counters) {
        let Packet { start, len, .. } = self.packets[index];
        let start = if self.offloads.vnet { start - virtio::LEN } else { start };
        let end = self.packets[index].start + len;
        if let Err(e) = self.device.write(&[IoSlice::new(&self.arena[start..end])]) {
            count_failure(&e, 1, drops);
        }
    }

    fn write_merged(&self, item: &Item, layout: &Layout) -> io::Result<()> {
        let first = self.packets[item.first];
        // 40 bytes of IPv6 header, 60 of TCP.
        let mut head = [0u8; virtio::LEN + 100];
        let head = &mut head[..virtio::LEN + layout.payload];
        let (virtio, headers) = head.split_at_mut(virtio::LEN);
        headers.copy_from_slice(&self.arena[first.start..][..layout.payload]);
        layout.set_length(headers, item.len);
        if layout.transport == Transport::Tcp {
            let last = self.packets[item.last];
            headers[layout.l4 + TCP_FLAGS] |= self.arena[last.start + layout.l4 + TCP_FLAGS] & PSH;
        }
        let field = layout.l4 + layout.transport.checksum_offset();
        let pseudo = checksum::fold(layout.pseudo_header(headers, item.len));
        headers[field..field + 2].copy_from_slice(&pseudo);
        virtio.copy_from_slice(&virtio_header(layout, first.len - layout.payload).to_bytes());
        let mut parts = ArrayVec::<IoSlice<'_>, { MAX_MERGED + 1 }>::new();
        parts.push(IoSlice::new(head));
        let mut next = Some(item.first);
        while let Some(index) = next {
            let Packet { start, len, next: following } = self.packets[index];
            parts.push(IoSlice::new(&self.arena[start + layout.payload..start + len]));
            next = following;
        }
        self.device.write(&parts)
    }
}

fn virtio_header(layout: &Layout, segment: usize) -> Header {
    let field = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
    Header {
        flags: virtio::NEEDS_CSUM,
        gso_type: match (layout.transport, layout.v6) {
            (Transport::Tcp, false) => virtio::GSO_TCPV4,
            (Transport::Tcp, true) => virtio::GSO_TCPV6,
            (Transport::Udp, _) => virtio::GSO_UDP_L4,
        },
        hdr_len: field(layout.payload),
        gso_size: field(segment),
        csum_start: field(layout.l4),
        csum_offset: field(layout.transport.checksum_offset()),
    }
}

fn count_failure(error: &io::Error, packets: usize, drops: &mut Counters) {
    let reason = match error.kind() {
        io::ErrorKind::WouldBlock => DropReason::Backpressure,
        _ => DropReason::TunWrite,
    };
    drops.add(reason, packets as u64);
    tracing::trace!("The TUN device refused {packets} packets: {error}");
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "patterns to fill packets with")]
mod tests;
