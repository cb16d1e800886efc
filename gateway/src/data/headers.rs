//! The few header fields that segmentation offload has to know: read on the way in and on the way out.
//!
//! Only what offload can carry parses: TCP or UDP directly on IPv4 without options or fragments, or on IPv6 without
//! extension headers. Everything else is passed on as it is; whether it is acceptable is the worker's business.

use gateway_common::checksum;

/// Offset of the TCP checksum field within the TCP header.
pub const TCP_CHECKSUM: usize = 16;
/// Offset of the UDP checksum field within the UDP header.
pub const UDP_CHECKSUM: usize = 6;
/// Offset of the flags within the TCP header.
pub const TCP_FLAGS: usize = 13;
/// TCP flag bits (RFC 9293 section 3.1).
pub const FIN: u8 = 0x01;
/// See [`FIN`].
pub const PSH: u8 = 0x08;
/// See [`FIN`].
pub const ACK: u8 = 0x10;
/// See [`FIN`].
pub const CWR: u8 = 0x80;

/// The transport protocols that can be segmented.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// Protocol 6.
    Tcp,
    /// Protocol 17.
    Udp,
}

impl Transport {
    /// The protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// Where its checksum field is, from its own header on.
    pub fn checksum_offset(self) -> usize {
        match self {
            Self::Tcp => TCP_CHECKSUM,
            Self::Udp => UDP_CHECKSUM,
        }
    }
}

/// Where things are in a packet, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// IPv6 rather than IPv4.
    pub v6: bool,
    /// TCP or UDP.
    pub transport: Transport,
    /// The transport header: 20 or 40.
    pub l4: usize,
    /// The first byte behind all headers.
    pub payload: usize,
}

impl Layout {
    /// The layout of `packet`, whose lengths all agree; `None` if it is nothing that offload can carry.
    #[inline]
    pub fn of(packet: &[u8]) -> Option<Self> {
        let (v6, l4, protocol) = match packet.first()? {
            0x45 => {
                let header = packet.first_chunk::<20>()?;
                let whole = u16::from_be_bytes([header[6], header[7]]) & 0x3fff == 0;
                let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
                if !whole || length != packet.len() {
                    return None;
                }
                (false, 20, header[9])
            }
            0x60..=0x6f => {
                let header = packet.first_chunk::<40>()?;
                if usize::from(u16::from_be_bytes([header[4], header[5]])) + 40 != packet.len() {
                    return None;
                }
                (true, 40, header[6])
            }
            _ => return None,
        };
        let segment = &packet[l4..];
        let (transport, header_len) = match protocol {
            6 => (Transport::Tcp, usize::from(segment.first_chunk::<20>()?[12] >> 4) * 4),
            17 => (Transport::Udp, 8),
            _ => return None,
        };
        let shortest = if transport == Transport::Tcp { 20 } else { 8 };
        if header_len < shortest || header_len > segment.len() {
            return None;
        }
        Some(Self { v6, transport, l4, payload: l4 + header_len })
    }

    /// Source and destination address, as they stand in the header.
    #[inline]
    pub fn addresses<'a>(&self, packet: &'a [u8]) -> &'a [u8] {
        if self.v6 { &packet[8..40] } else { &packet[12..20] }
    }

    /// The sum over the pseudo-header of a packet of `len` bytes in all.
    #[inline]
    pub fn pseudo_header(&self, packet: &[u8], len: usize) -> u64 {
        checksum::pseudo_header(self.addresses(packet), self.transport.number(), length_field(len - self.l4))
    }

    /// Do all checksums of `packet` hold? False for UDP without one.
    #[inline]
    pub fn checksums_hold(&self, packet: &[u8]) -> bool {
        if !self.v6 && checksum::finish(checksum::sum(&packet[..20])) != [0, 0] {
            return false;
        }
        let field = self.l4 + self.transport.checksum_offset();
        if self.transport == Transport::Udp && packet[field..field + 2] == [0, 0] {
            return false;
        }
        let sum = self.pseudo_header(packet, packet.len()) + checksum::sum(&packet[self.l4..]);
        checksum::finish(sum) == [0, 0]
    }

    /// Writes the length of a packet of `len` bytes into its IP and UDP headers, and the IPv4 header's checksum.
    #[inline]
    pub fn set_length(&self, headers: &mut [u8], len: usize) {
        if self.v6 {
            headers[4..6].copy_from_slice(&length_field(len - 40).to_be_bytes());
        } else {
            headers[2..4].copy_from_slice(&length_field(len).to_be_bytes());
            self.set_ipv4_checksum(headers);
        }
        if self.transport == Transport::Udp {
            headers[self.l4 + 4..self.l4 + 6].copy_from_slice(&length_field(len - self.l4).to_be_bytes());
        }
    }

    /// Recomputes the IPv4 header's checksum.
    #[inline]
    pub fn set_ipv4_checksum(&self, headers: &mut [u8]) {
        headers[10..12].fill(0);
        let sum = checksum::finish(checksum::sum(&headers[..20]));
        headers[10..12].copy_from_slice(&sum);
    }
}

/// The 16-bit field of a length that is at most that of an IP packet.
#[inline]
fn length_field(len: usize) -> u16 {
    u16::try_from(len).unwrap_or(u16::MAX)
}

/// The big-endian 32-bit field at `at`.
#[inline]
pub fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk::<4>().map_or(0, |b| u32::from_be_bytes(*b))
}

/// The big-endian 16-bit field at `at`.
#[inline]
pub fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes[at..].first_chunk::<2>().map_or(0, |b| u16::from_be_bytes(*b))
}
