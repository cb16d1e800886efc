//! From the TUN device: super-packets cut into packets of the tunnel's MTU, missing checksums completed.
//!
//! The kernel hands us what its own stack built for a NIC with offloads: up to 64 KiB of one TCP or UDP flow under
//! one header (packets.md section 10, "Read"). Everything a header says is checked before it is believed.

use std::io;

use gateway_common::{Counters, DropReason, checksum};
use gateway_proto::addr::MAX_INNER;

use super::{
    headers::{CWR, FIN, Layout, PSH, TCP_FLAGS, Transport, be16, be32},
    virtio::{self, Header},
};

/// A batch of packets read from the device, in one buffer that is made once.
pub struct Reader {
    /// What was read lies where it was read to; the segments of a super-packet follow behind it.
    bytes: Box<[u8]>,
    /// Start and end of each packet, ascending.
    packets: Vec<(usize, usize)>,
    /// Bytes in front of each packet: [`virtio::LEN`] or 0.
    header: usize,
    /// Batches in a row that were one packet, with nothing behind it.
    lonely: u8,
    /// Batches since nothing was looked for behind the first packet.
    unasked: u8,
}

/// After so many batches of one packet, only every so many looks for another: the look is a system call, and what it
/// would have found ends the next sleep at once.
const LONELY: u8 = 4;

/// One read: header and the longest packet.
const READ: usize = virtio::LEN + 65_535;
/// The segments of one super-packet with their headers (20 or 40 of IP, at most 60 of TCP).
const SEGMENTS: usize = 65_535 + MAX_SEGMENTS * 100;
/// A super-packet of more segments is not believed.
const MAX_SEGMENTS: usize = 256;
/// Enough for a batch; small enough to stay in the CPU's cache.
const BYTES: usize = 2 * (READ + SEGMENTS);
/// Reads of one batch that may fail before the device counts as broken.
const MAX_REFUSED: usize = 64;
/// Packets after which a batch is passed on.
const BATCH: usize = 128;

impl Reader {
    /// For a device that precedes packets with a virtio header, or not.
    pub fn new(vnet: bool) -> Self {
        Self {
            bytes: vec![0; BYTES].into_boxed_slice(),
            packets: Vec::with_capacity(BATCH + MAX_SEGMENTS),
            header: if vnet { virtio::LEN } else { 0 },
            lonely: 0,
            unasked: 0,
        }
    }

    /// Forgets the last batch and reads another with `read`, which is a non-blocking read of one packet. Returns
    /// whether it should be asked for more at once; if not, the device is empty, or little has arrived lately and its
    /// readiness will tell.
    ///
    /// # Errors
    /// What `read` says, other than that nothing waits.
    pub fn fill(
        &mut self,
        mut read: impl FnMut(&mut [u8]) -> io::Result<usize>,
        drops: &mut Counters,
    ) -> io::Result<bool> {
        self.packets.clear();
        let (mut used, mut refused, mut reads) = (0, 0, 0);
        while self.packets.len() < BATCH && self.bytes.len() - used >= READ + SEGMENTS {
            if reads == 1 && self.is_likely_alone() {
                return Ok(false);
            }
            let len = match read(&mut self.bytes[used..used + READ]) {
                Ok(len) => len,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.lonely = if reads == 1 { self.lonely.saturating_add(1) } else { 0 };
                    return Ok(false);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                // The kernel could not describe a packet by a virtio header; that packet is gone, the device is not.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) && refused < MAX_REFUSED => {
                    refused += 1;
                    drops.count(DropReason::MalformedOffload);
                    continue;
                }
                Err(e) => return Err(e),
            };
            reads += 1;
            match self.take(used, len) {
                Ok(end) => used = end,
                Err(Malformed) => drops.count(DropReason::MalformedOffload),
            }
        }
        self.lonely = 0;
        Ok(true)
    }

    /// Whether the look behind the first packet is left out this time.
    fn is_likely_alone(&mut self) -> bool {
        if self.lonely < LONELY || self.unasked + 1 == LONELY {
            self.unasked = 0;
            return false;
        }
        self.unasked += 1;
        true
    }

    /// The packets of the batch.
    pub fn packets(&mut self) -> impl Iterator<Item = &mut [u8]> {
        let mut rest = &mut self.bytes[..];
        let mut at = 0;
        self.packets.iter().map(move |&(start, end)| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut(end - at);
            let packet = &mut head[start - at..];
            (rest, at) = (tail, end);
            packet
        })
    }

    /// How many packets the last [`Reader::fill`] brought.
    pub fn count(&self) -> usize {
        self.packets.len()
    }

    /// Takes the `len` bytes read at `at`; returns where free space begins.
    fn take(&mut self, at: usize, len: usize) -> Result<usize, Malformed> {
        let (start, end) = (at + self.header, at + len);
        if start >= end {
            return Err(Malformed);
        }
        if self.header == 0 {
            self.packets.push((start, end));
            return Ok(end);
        }
        let header = self.bytes[at..].first_chunk().ok_or(Malformed)?;
        let header = Header::from_bytes(header);
        let (read, free) = self.bytes.split_at_mut(end);
        let packet = &mut read[start..];
        if header.gso_type & !virtio::GSO_ECN == virtio::GSO_NONE {
            complete_checksum(&header, packet)?;
            self.packets.push((start, end));
            return Ok(end);
        }
        let cut = Cut::new(&header, packet)?;
        let mut used = 0;
        for i in 0..cut.segments {
            let len = cut.write(packet, i, &mut free[used..]);
            self.packets.push((end + used, end + used + len));
            used += len;
        }
        Ok(end + used)
    }
}

/// A header and a packet that do not fit together.
#[derive(Debug, PartialEq, Eq)]
struct Malformed;

/// Completes a checksum that the kernel left to its device.
fn complete_checksum(header: &Header, packet: &mut [u8]) -> Result<(), Malformed> {
    if header.flags & virtio::NEEDS_CSUM == 0 {
        return Ok(());
    }
    let start = usize::from(header.csum_start);
    let offset = usize::from(header.csum_offset);
    let summed = packet.get_mut(start..).ok_or(Malformed)?;
    let mut sum = checksum::finish(checksum::sum(summed));
    if offset == super::headers::UDP_CHECKSUM && sum == [0, 0] {
        // Zero would mean "no checksum" (RFC 768), which IPv6 forbids.
        sum = [0xff, 0xff];
    }
    summed.get_mut(offset..offset + 2).ok_or(Malformed)?.copy_from_slice(&sum);
    Ok(())
}

/// How one super-packet is cut.
struct Cut {
    layout: Layout,
    /// Payload bytes of every segment but the last.
    size: usize,
    segments: usize,
}

impl Cut {
    fn new(header: &Header, packet: &[u8]) -> Result<Self, Malformed> {
        let layout = Layout::of(packet).ok_or(Malformed)?;
        let fits = match header.gso_type & !virtio::GSO_ECN {
            virtio::GSO_TCPV4 => layout.transport == Transport::Tcp && !layout.v6,
            virtio::GSO_TCPV6 => layout.transport == Transport::Tcp && layout.v6,
            virtio::GSO_UDP_L4 => layout.transport == Transport::Udp,
            _ => false,
        };
        let size = usize::from(header.gso_size);
        let payload = packet.len() - layout.payload;
        if !fits || size == 0 || layout.payload + size.min(payload) > MAX_INNER {
            return Err(Malformed);
        }
        let segments = payload.div_ceil(size).max(1);
        if segments > MAX_SEGMENTS {
            return Err(Malformed);
        }
        Ok(Self { layout, size, segments })
    }

    /// Writes segment `i` of `packet` to the front of `out`; returns its length.
    #[inline]
    fn write(&self, packet: &[u8], i: usize, out: &mut [u8]) -> usize {
        let Layout { v6, transport, l4, payload: headers } = self.layout;
        let from = headers + i * self.size;
        let to = (from + self.size).min(packet.len());
        let len = headers + to - from;
        let out = &mut out[..len];
        out[..headers].copy_from_slice(&packet[..headers]);
        out[headers..].copy_from_slice(&packet[from..to]);
        if !v6 {
            #[expect(clippy::cast_possible_truncation, reason = "at most MAX_SEGMENTS")]
            let id = be16(packet, 4).wrapping_add(i as u16);
            out[4..6].copy_from_slice(&id.to_be_bytes());
        }
        self.layout.set_length(out, len);
        if transport == Transport::Tcp {
            #[expect(clippy::cast_possible_truncation, reason = "less than a packet's length")]
            let sequence = be32(packet, l4 + 4).wrapping_add((i * self.size) as u32);
            out[l4 + 4..l4 + 8].copy_from_slice(&sequence.to_be_bytes());
            if i + 1 < self.segments {
                out[l4 + TCP_FLAGS] &= !(FIN | PSH);
            }
            if i > 0 {
                // RFC 3168 section 6.1.2: CWR is set on the first data segment sent after the reduction.
                out[l4 + TCP_FLAGS] &= !CWR;
            }
        }
        let field = l4 + transport.checksum_offset();
        out[field..field + 2].fill(0);
        let mut sum = checksum::finish(self.layout.pseudo_header(out, len) + checksum::sum(&out[l4..]));
        if transport == Transport::Udp && sum == [0, 0] {
            sum = [0xff, 0xff];
        }
        out[field..field + 2].copy_from_slice(&sum);
        len
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "patterns to fill packets with")]
mod tests {
    use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

    use super::{super::test_packets::Spec, *};

    #[test]
    fn super_packets_become_the_packets_a_sender_without_offload_would_send() {
        for (v6, tcp) in [(false, true), (true, true), (false, false), (true, false)] {
            for (size, len) in
                [(1000, 5000), (1000, 5001), (1200, 65_000), (900, 899), (900, 900), (500, 1), (300, 60_000)]
            {
                let whole =
                    Spec { v6, tcp, flags: 0x99, id: 65_530, payload: pattern(len), ..Spec::default() };
                let header = header_of(&whole, size);
                let (got, drops) = split(&[(header, whole.build())]);
                assert_eq!(got, expected(&whole, size.into()), "v6 {v6}, tcp {tcp}, {len} bytes in {size}");
                assert_eq!(drops, 0);
            }
        }
    }

    #[test]
    fn tcp_ecn_bit_of_the_type_is_understood() {
        let whole = Spec { flags: 0x90, payload: pattern(3000), ..Spec::default() };
        let header = Header { gso_type: virtio::GSO_TCPV4 | virtio::GSO_ECN, ..header_of(&whole, 1000) };
        assert_eq!(split(&[(header, whole.build())]), (expected(&whole, 1000), 0));
    }

    #[test]
    fn missing_checksums_are_completed() {
        for (v6, tcp) in [(false, true), (true, true), (false, false), (true, false)] {
            for len in [0, 1, 2, 777, 1200] {
                let spec = Spec { v6, tcp, payload: pattern(len), ..Spec::default() };
                let whole = spec.build();
                let layout = Layout::of(&whole).unwrap();
                let field = layout.l4 + layout.transport.checksum_offset();
                let mut partial = whole.clone();
                let pseudo = checksum::fold(layout.pseudo_header(&whole, whole.len()));
                partial[field..field + 2].copy_from_slice(&pseudo);
                let header = Header { gso_type: 0, ..header_of(&spec, 0) };
                assert_eq!(split(&[(header, partial)]), (vec![whole], 0), "v6 {v6}, tcp {tcp}, {len} bytes");
            }
        }
    }

    #[test]
    fn udp_checksum_that_sums_up_to_zero_is_sent_as_ones() {
        let mut rng = SmallRng::seed_from_u64(3);
        let spec = std::iter::repeat_with(|| {
            let payload = rng.random::<[u8; 4]>().to_vec();
            Spec { v6: true, tcp: false, payload, ..Spec::default() }
        })
        .find(|spec| spec.build()[46..48] == [0xff, 0xff])
        .unwrap();
        let mut partial = spec.build();
        let layout = Layout::of(&partial).unwrap();
        let pseudo = checksum::fold(layout.pseudo_header(&partial, partial.len()));
        partial[46..48].copy_from_slice(&pseudo);
        assert_eq!(
            split(&[(Header { gso_type: 0, ..header_of(&spec, 0) }, partial)]),
            (vec![spec.build()], 0)
        );
    }

    #[test]
    fn what_does_not_add_up_is_counted_and_the_batch_goes_on() {
        let whole = Spec { payload: pattern(3000), ..Spec::default() };
        let good = header_of(&whole, 1000);
        let plain = Header { gso_type: 0, ..good };
        let bytes = whole.build();
        let changed = |at: usize, value: u8| {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            bytes
        };
        let table: &[(&str, Header, Vec<u8>)] = &[
            ("segment size 0", Header { gso_size: 0, ..good }, bytes.clone()),
            ("segments above the MTU", Header { gso_size: 1281 - 52, ..good }, bytes.clone()),
            ("too many segments", Header { gso_size: 10, ..good }, bytes.clone()),
            ("UDP type on TCP", Header { gso_type: virtio::GSO_UDP_L4, ..good }, bytes.clone()),
            ("IPv6 type on IPv4", Header { gso_type: virtio::GSO_TCPV6, ..good }, bytes.clone()),
            ("UFO", Header { gso_type: 3, ..good }, bytes.clone()),
            ("unknown type", Header { gso_type: 77, ..good }, bytes.clone()),
            ("IP options", good, changed(0, 0x46)),
            ("version 5", good, changed(0, 0x55)),
            ("total length wrong", good, changed(3, 1)),
            ("a fragment", good, changed(6, 0x20)),
            ("another protocol", good, changed(9, 1)),
            ("TCP header too short", good, changed(32, 0x40)),
            ("cut within the IP header", good, bytes[..19].to_vec()),
            ("no packet", good, Vec::new()),
            ("no packet, no offload", plain, Vec::new()),
            ("checksum behind the end", Header { csum_start: 3100, ..plain }, bytes.clone()),
            ("checksum field behind the end", Header { csum_offset: 3031, ..plain }, bytes.clone()),
            ("all ones", Header::from_bytes(&[0xff; 10]), bytes.clone()),
        ];
        for (name, header, packet) in table {
            let (got, drops) = split(&[(*header, packet.clone()), (good, bytes.clone())]);
            assert_eq!((got.len(), drops), (3, 1), "{name}");
        }
    }

    #[test]
    fn random_bytes_neither_panic_nor_grow() {
        let mut rng = SmallRng::seed_from_u64(4);
        let whole = Spec { payload: pattern(3000), ..Spec::default() };
        let mut reader = Reader::new(true);
        for _ in 0..20_000 {
            let mut bytes = header_of(&whole, 1000).to_bytes().to_vec();
            bytes.extend(whole.build());
            for _ in 0..rng.random_range(1..6) {
                let at = rng.random_range(0..70);
                bytes[at] = rng.random();
            }
            bytes.truncate(rng.random_range(0..=bytes.len()));
            let mut reads = [bytes].into_iter();
            reader.fill(|buffer| copy(reads.next(), buffer), &mut Counters::default()).unwrap();
            assert!(reader.packets().count() <= MAX_SEGMENTS);
        }
    }

    #[test]
    fn batch_ends_before_the_buffer_does() {
        let whole = Spec { payload: pattern(65_000), ..Spec::default() };
        let mut one = header_of(&whole, 300).to_bytes().to_vec();
        one.extend(whole.build());
        let mut reader = Reader::new(true);
        let mut total = 0;
        for _ in 0..3 {
            let more =
                reader.fill(|buffer| copy(Some(one.clone()), buffer), &mut Counters::default()).unwrap();
            assert!(more, "the device always has another");
            total += reader.packets().count();
        }
        assert_eq!(total % 65_000usize.div_ceil(300), 0);
    }

    #[test]
    fn device_without_headers_is_read_as_it_is() {
        let packet = Spec::default().build();
        let mut reads = vec![packet.clone(), vec![], packet.clone()].into_iter();
        let mut reader = Reader::new(false);
        let mut drops = Counters::default();
        assert!(!reader.fill(|buffer| copy(reads.next(), buffer), &mut drops).unwrap());
        assert_eq!(reader.packets().map(|p| p.to_vec()).collect::<Vec<_>>(), [packet.clone(), packet]);
        assert_eq!(drops.get(DropReason::MalformedOffload), 1, "the empty read");
    }

    #[test]
    fn packet_that_the_kernel_cannot_describe_costs_itself_only() {
        let packet = Spec::default().build();
        let invalid = || Err::<Vec<u8>, _>(io::Error::from_raw_os_error(libc::EINVAL));
        let mut reads = [invalid(), Ok(packet.clone()), invalid(), Ok(packet.clone())].into_iter();
        let (mut reader, mut drops) = (Reader::new(false), Counters::default());
        let mut read = |buffer: &mut [u8]| match reads.next() {
            Some(Err(e)) => Err(e),
            other => copy(other.map(Result::unwrap), buffer),
        };
        assert!(!reader.fill(&mut read, &mut drops).unwrap());
        assert_eq!(reader.packets().map(|p| p.to_vec()).collect::<Vec<_>>(), [packet.clone(), packet]);
        assert_eq!(drops.get(DropReason::MalformedOffload), 2);
        let broken = reader.fill(|_| invalid().map(|p| p.len()), &mut drops).unwrap_err();
        assert_eq!(broken.raw_os_error(), Some(libc::EINVAL), "a device that only fails is broken");
    }

    #[test]
    fn a_trickle_is_not_asked_for_more_each_time_and_a_flood_soon_is() {
        let packet = Spec::default().build();
        let mut reader = Reader::new(false);
        let asked = std::cell::Cell::new(0);
        let mut fill = |waiting: &mut usize| {
            let read = |buffer: &mut [u8]| {
                asked.set(asked.get() + 1);
                let some = *waiting > 0;
                *waiting -= usize::from(some);
                copy(some.then(|| packet.clone()), buffer)
            };
            let more = reader.fill(read, &mut Counters::default()).unwrap();
            (more, reader.count())
        };
        for _ in 0..100 {
            assert_eq!(fill(&mut 1), (false, 1), "one packet, and sleep");
        }
        assert!((105..150).contains(&asked.get()), "{} reads for 100 single packets", asked.get());
        // Nothing is lost if more arrives: each turn takes at least one, and after a few it takes all.
        let mut waiting = 1000;
        let turns = std::iter::repeat_with(|| {
            while fill(&mut waiting).0 {}
            waiting
        });
        let left: Vec<usize> = turns.take_while(|waiting| *waiting > 0).collect();
        assert!(left.len() < usize::from(LONELY), "{left:?}");
        assert_eq!(fill(&mut 0), (false, 0), "empty is empty");
    }

    /// What a sender without offload would have sent.
    fn expected(whole: &Spec, size: usize) -> Vec<Vec<u8>> {
        let last = whole.payload.chunks(size).count() - 1;
        let segment = |(i, chunk): (usize, &[u8])| {
            let mut flags = whole.flags;
            if i < last {
                flags &= !0x09;
            }
            if i > 0 {
                flags &= !0x80;
            }
            let i = u32::try_from(i).unwrap();
            Spec {
                seq: whole.seq.wrapping_add(i * u32::try_from(size).unwrap()),
                id: whole.id.wrapping_add(u16::try_from(i).unwrap()),
                flags,
                payload: chunk.to_vec(),
                ..whole.clone()
            }
            .build()
        };
        whole.payload.chunks(size).enumerate().map(segment).collect()
    }

    fn header_of(spec: &Spec, size: u16) -> Header {
        let l4 = if spec.v6 { 40 } else { 20 };
        let gso_type = match (spec.tcp, spec.v6) {
            (true, false) => virtio::GSO_TCPV4,
            (true, true) => virtio::GSO_TCPV6,
            (false, _) => virtio::GSO_UDP_L4,
        };
        let csum_offset = if spec.tcp { 16 } else { 6 };
        Header {
            flags: virtio::NEEDS_CSUM,
            gso_type,
            hdr_len: 0,
            gso_size: size,
            csum_start: l4,
            csum_offset,
        }
    }

    fn split(reads: &[(Header, Vec<u8>)]) -> (Vec<Vec<u8>>, u64) {
        let mut reads = reads.iter().map(|(header, packet)| [&header.to_bytes()[..], packet].concat());
        let (mut reader, mut drops) = (Reader::new(true), Counters::default());
        let mut got = Vec::new();
        while reader.fill(|buffer| copy(reads.next(), buffer), &mut drops).unwrap() {
            got.extend(reader.packets().map(|p| p.to_vec()));
        }
        got.extend(reader.packets().map(|p| p.to_vec()));
        (got, drops.get(DropReason::MalformedOffload))
    }

    fn copy(read: Option<Vec<u8>>, buffer: &mut [u8]) -> io::Result<usize> {
        let read = read.ok_or(io::ErrorKind::WouldBlock)?;
        buffer[..read.len()].copy_from_slice(&read);
        Ok(read.len())
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 7 % 251) as u8).collect()
    }
}
