//! `struct virtio_net_hdr` in its legacy form, which precedes every packet on a TUN device with IFF_VNET_HDR.
//!
//! ```text
//! 0       1         2         4          6            8             10
//! +-------+---------+---------+----------+------------+-------------+
//! | flags | gso_type| hdr_len | gso_size | csum_start | csum_offset |   native endian
//! +-------+---------+---------+----------+------------+-------------+
//! ```

/// Bytes in front of each packet.
pub const LEN: usize = 10;
/// `flags`: the checksum from `csum_start` on is missing; its field holds the pseudo-header's sum.
pub const NEEDS_CSUM: u8 = 1;
/// `gso_type`: one packet.
pub const GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// `gso_type`: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// `gso_type`: UDP datagrams of equal length.
pub const GSO_UDP_L4: u8 = 5;
/// A bit beside the types for TCP: CWR is set, and belongs to the first segment only.
pub const GSO_ECN: u8 = 0x80;

/// One header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// [`NEEDS_CSUM`] or 0; other bits are hints.
    pub flags: u8,
    /// One of the `GSO_` constants.
    pub gso_type: u8,
    /// Length of all headers, in bytes; a hint.
    pub hdr_len: u16,
    /// Payload bytes of each segment.
    pub gso_size: u16,
    /// Where the summed part begins, in bytes from the packet's start.
    pub csum_start: u16,
    /// Where the checksum field is, in bytes from `csum_start`.
    pub csum_offset: u16,
}

impl Header {
    /// Reads a header.
    pub fn from_bytes(b: &[u8; LEN]) -> Self {
        let at = |i: usize| u16::from_ne_bytes([b[i], b[i + 1]]);
        Self {
            flags: b[0],
            gso_type: b[1],
            hdr_len: at(2),
            gso_size: at(4),
            csum_start: at(6),
            csum_offset: at(8),
        }
    }

    /// Writes a header.
    pub fn to_bytes(self) -> [u8; LEN] {
        let ([h0, h1], [g0, g1]) = (self.hdr_len.to_ne_bytes(), self.gso_size.to_ne_bytes());
        let ([s0, s1], [o0, o1]) = (self.csum_start.to_ne_bytes(), self.csum_offset.to_ne_bytes());
        [self.flags, self.gso_type, h0, h1, g0, g1, s0, s1, o0, o1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_round_trips() {
        let header =
            Header { flags: 1, gso_type: 4, hdr_len: 60, gso_size: 1220, csum_start: 40, csum_offset: 16 };
        assert_eq!(Header::from_bytes(&header.to_bytes()), header);
        assert_eq!(header.to_bytes()[..2], [1, 4]);
    }
}
