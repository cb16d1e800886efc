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
use gateway_common::{Counters, DropReason};
use rustc_hash::FxHashMap;

use super::{
    checksum,
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
mod tests {
    use std::{
        cell::{Cell, RefCell},
        collections::HashMap,
    };

    use rand::{Rng as _, SeedableRng as _, rngs::SmallRng, seq::IndexedRandom as _};

    use super::{
        super::{split::Reader, test_packets::Spec},
        *,
    };

    const ALL: Offloads = Offloads { vnet: true, uso: true };

    #[test]
    fn splitting_what_was_merged_gives_every_flow_its_packets_in_order() {
        for seed in 0..40 {
            for refuse in [false, true] {
                let packets = random_traffic(seed);
                let tun = FakeTun { refuse_merged: refuse, ..FakeTun::new(ALL) };
                let drops = write(&tun, &packets);
                let got = tun.split();
                assert_eq!(by_flow(&got), by_flow(&packets), "seed {seed}, refuse {refuse}");
                assert_eq!(drops, Counters::default());
            }
        }
    }

    #[test]
    fn sixty_interleaved_flows_are_one_write_each() {
        let mut packets = Vec::new();
        for round in 0..3u32 {
            for flow in 0..60 {
                let seq = 1000 + round * 1000;
                packets.push(
                    Spec {
                        flow,
                        seq,
                        v6: flow % 2 == 0,
                        payload: vec![round as u8; 1000],
                        ..Spec::default()
                    }
                    .build(),
                );
            }
        }
        let tun = FakeTun::new(ALL);
        write(&tun, &packets);
        assert_eq!(tun.writes.borrow().len(), 60);
        assert_eq!(by_flow(&tun.split()), by_flow(&packets));
    }

    #[test]
    fn merging_follows_the_table() {
        type Change = fn(&mut Spec);
        // Two packets of 100 bytes each; the change is made to the second. Expected: number of writes.
        let table: &[(&str, Change, usize)] = &[
            ("in order", |_| {}, 1),
            ("a gap", |s| s.seq += 1, 2),
            ("a repetition", |s| s.seq -= 100, 2),
            ("another acknowledgment", |s| s.ack += 1, 2),
            ("another window", |s| s.window += 1, 2),
            ("another option", |s| s.options[11] = 9, 2),
            ("no options", |s| s.options.clear(), 2),
            ("another TOS", |s| s.tos = 3, 2),
            ("another TTL", |s| s.ttl = 3, 2),
            ("without DF", |s| s.df = false, 2),
            ("with DF, any identification", |s| s.id = 9999, 1),
            ("FIN", |s| s.flags = 0x11, 2),
            ("SYN", |s| s.flags = 0x12, 2),
            ("RST", |s| s.flags = 0x14, 2),
            ("URG", |s| s.flags = 0x30, 2),
            ("ECE", |s| s.flags = 0x50, 2),
            ("CWR", |s| s.flags = 0x90, 2),
            ("PSH", |s| s.flags = 0x18, 1),
            ("no payload", |s| s.payload.clear(), 2),
            ("a shorter payload", |s| s.payload.truncate(1), 1),
            ("a longer payload", |s| s.payload.push(1), 2),
            ("another flow", |s| s.flow = 2, 2),
        ];
        for v6 in [false, true] {
            for (name, change, writes) in table {
                if v6 && name.contains("DF") {
                    continue;
                }
                let first = Spec { v6, ..Spec::default() };
                let mut second = Spec { seq: first.seq + 100, id: first.id + 1, ..first.clone() };
                change(&mut second);
                let tun = FakeTun::new(ALL);
                let packets = [first.build(), second.build()];
                write(&tun, &packets);
                assert_eq!(tun.writes.borrow().len(), *writes, "{name}, v6 {v6}");
                assert_eq!(by_flow(&tun.split()), by_flow(&packets), "{name}, v6 {v6}");
            }
        }
    }

    #[test]
    fn packet_that_cannot_join_ends_what_later_ones_may_join() {
        let at = |seq| Spec { seq, ..Spec::default() };
        let fin = Spec { flags: 0x11, payload: vec![], ..at(1100) };
        let tun = FakeTun::new(ALL);
        let packets = [at(1000).build(), fin.build(), at(1100).build()];
        write(&tun, &packets);
        assert_eq!(tun.split(), packets, "the data stays behind the FIN");
    }

    #[test]
    fn wrong_checksum_is_never_hidden_in_a_super_packet() {
        for (bad, in_ip) in [(0, false), (1, false), (2, false), (0, true), (1, true), (2, true)] {
            let mut packets: Vec<_> = (0u16..3)
                .map(|i| Spec { id: i, seq: 1000 + u32::from(i) * 100, ..Spec::default() }.build())
                .collect();
            let at = if in_ip { 10 } else { packets[bad].len() - 1 };
            packets[bad][at] ^= 1;
            let tun = FakeTun::new(ALL);
            write(&tun, &packets);
            assert_eq!(tun.split(), packets, "packet {bad}");
        }
        let mut none = Spec { tcp: false, ..Spec::default() }.build();
        none[26..28].fill(0);
        let tun = FakeTun::new(ALL);
        write(&tun, &[none.clone(), none.clone()]);
        assert_eq!(tun.split(), [none.clone(), none]);
    }

    #[test]
    fn refused_super_packet_loses_nothing_and_merging_rests() {
        let packets: Vec<_> =
            (0..4).map(|i| Spec { seq: 1000 + i * 100, ..Spec::default() }.build()).collect();
        let tun = FakeTun { refuse_merged: true, ..FakeTun::new(ALL) };
        let mut writer = Writer::new(&tun);
        let (now, mut drops) = (Instant::now(), Counters::default());
        for (at, refused) in [(now, 1), (now, 0), (now + REST, 1)] {
            tun.writes.borrow_mut().clear();
            tun.refused.set(0);
            put(&mut writer, &packets, at, &mut drops);
            writer.flush(at, &mut drops);
            assert!(writer.is_empty());
            assert_eq!(tun.split(), packets);
            assert_eq!(tun.refused.get(), refused);
        }
        assert_eq!(drops, Counters::default());
    }

    #[test]
    fn device_without_offloads_gets_plain_packets() {
        for (offloads, writes) in
            [(Offloads { vnet: false, uso: false }, 4), (Offloads { vnet: true, uso: false }, 3), (ALL, 2)]
        {
            let tcp = |seq| Spec { seq, ..Spec::default() }.build();
            let udp = Spec { tcp: false, ..Spec::default() }.build();
            let packets = [tcp(1000), tcp(1100), udp.clone(), udp];
            let tun = FakeTun::new(offloads);
            write(&tun, &packets);
            assert_eq!(tun.writes.borrow().len(), writes, "{offloads:?}");
            assert_eq!(by_flow(&tun.split()), by_flow(&packets), "{offloads:?}");
        }
    }

    #[test]
    fn kernel_errors_are_counted_per_packet() {
        for (errno, reason) in [(libc::EIO, DropReason::TunWrite), (libc::EAGAIN, DropReason::Backpressure)] {
            let tun = FakeTun { refuse_all: Some(errno), ..FakeTun::new(ALL) };
            let packets: Vec<_> =
                (0..4).map(|i| Spec { seq: 1000 + i * 100, ..Spec::default() }.build()).collect();
            assert_eq!(write(&tun, &packets).get(reason), 4);
        }
    }

    #[test]
    fn reservation_is_forgotten_by_the_next_and_too_long_ones_are_refused() {
        let tun = FakeTun::new(ALL);
        let (mut writer, now, mut drops) = (Writer::new(&tun), Instant::now(), Counters::default());
        writer.reserve(100, now, &mut drops).unwrap().fill(0xee);
        let packet = Spec::default().build();
        put(&mut writer, std::slice::from_ref(&packet), now, &mut drops);
        writer.commit(50, now);
        assert!(writer.reserve(MAX_LEN + 1, now, &mut drops).is_none());
        writer.commit(50, now);
        assert!(writer.reserve(MAX_LEN, now, &mut drops).unwrap().len() >= MAX_LEN);
        writer.flush(now, &mut drops);
        assert_eq!(tun.split(), [packet]);
    }

    fn write(tun: &FakeTun, packets: &[Vec<u8>]) -> Counters {
        let (mut writer, mut drops) = (Writer::new(tun), Counters::default());
        put(&mut writer, packets, Instant::now(), &mut drops);
        writer.flush(Instant::now(), &mut drops);
        drops
    }

    fn put(writer: &mut Writer<&FakeTun>, packets: &[Vec<u8>], now: Instant, drops: &mut Counters) {
        for packet in packets {
            writer.reserve(packet.len(), now, drops).unwrap()[..packet.len()].copy_from_slice(packet);
            writer.commit(packet.len(), now);
        }
    }

    /// Many flows, mostly bulk data, with everything that interrupts it.
    fn random_traffic(seed: u64) -> Vec<Vec<u8>> {
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut flows: Vec<Spec> = (0..rng.random_range(1..=60))
            .map(|flow| Spec {
                v6: rng.random(),
                tcp: rng.random_bool(0.7),
                df: rng.random(),
                flow,
                seq: rng.random(),
                options: if rng.random() { vec![1; 12] } else { vec![] },
                ..Spec::default()
            })
            .collect();
        let mut packets = Vec::new();
        for _ in 0..rng.random_range(1..1500) {
            let at = rng.random_range(0..flows.len());
            let spec = &mut flows[at];
            let len = *[1200, 1200, 1200, 1200, 1200, 1199, 1, 0, 600].choose(&mut rng).unwrap();
            spec.payload = (0..len).map(|_| rng.random()).collect();
            spec.flags = *[0x10, 0x10, 0x10, 0x10, 0x10, 0x10, 0x18, 0x11, 0x02].choose(&mut rng).unwrap();
            match rng.random_range(0..40) {
                0 => spec.ack = spec.ack.wrapping_add(1),
                1 => spec.seq = spec.seq.wrapping_add(1),
                2 => spec.window ^= 1,
                3 => spec.tos ^= 3,
                4 => spec.id = rng.random(),
                _ => {}
            }
            let mut packet = spec.build();
            spec.seq = spec.seq.wrapping_add(len as u32);
            spec.id = spec.id.wrapping_add(1);
            match rng.random_range(0..60) {
                // A wrong transport checksum.
                0 if len > 0 => *packet.last_mut().unwrap() ^= 0x55,
                // ICMP, IGMP, whatever is no flow.
                1 => packet = vec![0x45, 1, 2, 3, rng.random()],
                // A fragment.
                2 if packet[0] == 0x45 => packet[6] |= 0x20,
                _ => {}
            }
            packets.push(packet);
        }
        packets
    }

    /// Packets by flow; those without one stay in order among themselves. Identifications of DF packets mean nothing.
    fn by_flow(packets: &[Vec<u8>]) -> HashMap<Vec<u8>, Vec<Vec<u8>>> {
        let mut flows: HashMap<_, Vec<_>> = HashMap::new();
        for packet in packets {
            let mut packet = packet.clone();
            let key = match Layout::of(&packet) {
                Some(layout) => {
                    if !layout.v6 && packet[6] & 0x40 != 0 {
                        packet[4..6].fill(0);
                        packet[10..12].fill(0);
                    }
                    let mut key = layout.addresses(&packet).to_vec();
                    key.extend([layout.transport.number(), u8::from(layout.v6)]);
                    key.extend(&packet[layout.l4..layout.l4 + 4]);
                    key
                }
                None => Vec::new(),
            };
            flows.entry(key).or_default().push(packet);
        }
        flows
    }

    /// A device that remembers what was written to it, and hands it back as super-packets.
    struct FakeTun {
        offloads: Offloads,
        refuse_merged: bool,
        refuse_all: Option<i32>,
        writes: RefCell<Vec<Vec<u8>>>,
        /// Super-packets refused.
        refused: Cell<usize>,
    }

    impl FakeTun {
        fn new(offloads: Offloads) -> Self {
            Self {
                offloads,
                refuse_merged: false,
                refuse_all: None,
                writes: RefCell::default(),
                refused: Cell::default(),
            }
        }

        fn split(&self) -> Vec<Vec<u8>> {
            let writes = self.writes.borrow();
            let mut writes = writes.iter();
            let (mut reader, mut drops) = (Reader::new(self.offloads.vnet), Counters::default());
            let mut packets = Vec::new();
            loop {
                let read = |buffer: &mut [u8]| {
                    let write = writes.next().ok_or(io::ErrorKind::WouldBlock)?;
                    buffer[..write.len()].copy_from_slice(write);
                    Ok(write.len())
                };
                let more = reader.fill(read, &mut drops).unwrap();
                packets.extend(reader.packets().map(|p| p.to_vec()));
                if !more {
                    assert_eq!(drops, Counters::default());
                    return packets;
                }
            }
        }
    }

    impl Device for &FakeTun {
        fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
            if let Some(errno) = self.refuse_all {
                return Err(io::Error::from_raw_os_error(errno));
            }
            if self.refuse_merged && parts.len() > 1 {
                self.refused.set(self.refused.get() + 1);
                return Err(io::Error::from_raw_os_error(libc::EINVAL));
            }
            let write: Vec<u8> = parts.iter().flat_map(|part| part.to_vec()).collect();
            assert!(write.len() <= virtio::LEN + MAX_LEN);
            self.writes.borrow_mut().push(write);
            Ok(())
        }

        fn offloads(&self) -> Offloads {
            self.offloads
        }
    }
}
