//! From the TUN device: super-packets cut into packets of the tunnel's MTU, missing checksums completed.
//!
//! The kernel hands us what its own stack built for a NIC with offloads: up to 64 KiB of one TCP or UDP flow under
//! one header (packets.md section 10, "Read"). Everything a header says is checked before it is believed.

use std::io;

use gateway_common::{Counters, DropReason};
use gateway_proto::addr::MAX_INNER;

use super::{
    checksum,
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
}

/// One read: header and the longest packet.
const READ: usize = virtio::LEN + 65_535;
/// The segments of one super-packet with their headers (20 or 40 of IP, at most 60 of TCP).
const SEGMENTS: usize = 65_535 + MAX_SEGMENTS * 100;
/// A super-packet of more segments is not believed.
const MAX_SEGMENTS: usize = 256;
/// Enough for a batch; small enough to stay in the CPU's cache.
const BYTES: usize = 2 * (READ + SEGMENTS);
/// Packets after which a batch is passed on.
const BATCH: usize = 128;

impl Reader {
    /// For a device that precedes packets with a virtio header, or not.
    pub fn new(vnet: bool) -> Self {
        Self {
            bytes: vec![0; BYTES].into_boxed_slice(),
            packets: Vec::with_capacity(BATCH + MAX_SEGMENTS),
            header: if vnet { virtio::LEN } else { 0 },
        }
    }

    /// Forgets the last batch and reads another with `read`, which is a non-blocking read of one packet. Returns
    /// whether the device may hold more.
    ///
    /// # Errors
    /// What `read` says, other than that nothing waits.
    pub fn fill(
        &mut self,
        mut read: impl FnMut(&mut [u8]) -> io::Result<usize>,
        drops: &mut Counters,
    ) -> io::Result<bool> {
        self.packets.clear();
        let mut used = 0;
        while self.packets.len() < BATCH && self.bytes.len() - used >= READ + SEGMENTS {
            let len = match read(&mut self.bytes[used..used + READ]) {
                Ok(len) => len,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            match self.take(used, len) {
                Ok(end) => used = end,
                Err(Malformed) => drops.count(DropReason::MalformedOffload),
            }
        }
        Ok(true)
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

    /// Whether the last [`Reader::fill`] brought nothing.
    pub fn is_empty(&self) -> bool {
        self.packets.is_empty()
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
