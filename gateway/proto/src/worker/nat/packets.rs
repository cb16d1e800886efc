//! Packets for the tests of this folder, with checksums made from scratch and as plainly as RFC 1071 has them.

use std::net::{IpAddr, SocketAddr};

use super::key::Kind;

/// A packet as a test thinks of it. For echo, `src`'s port is the identifier if `request`, else `dst`'s.
#[derive(Debug, Clone, Copy)]
pub struct Packet {
    pub kind: Kind,
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub flags: u8,
    pub payload: u16,
    pub sum: Sum,
    pub outbound: bool,
}

/// What the UDP checksum is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sum {
    /// As it should be.
    Right,
    /// 0.
    None,
}

impl Packet {
    pub fn new(kind: Kind, src: impl Into<SocketAddr>, dst: impl Into<SocketAddr>) -> Self {
        let (src, dst) = (src.into(), dst.into());
        Self { kind, src, dst, flags: 0x10, payload: 0x1234, sum: Sum::Right, outbound: true }
    }

    /// Its bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let word = u16::to_be_bytes;
        let v4 = self.src.is_ipv4();
        let (src, dst) = (self.src.port(), self.dst.port());
        let mut body = match self.kind {
            Kind::Tcp => {
                [&word(src)[..], &word(dst), &[7; 8], &[0x50, self.flags, 1, 2, 0, 0, 0, 0]].concat()
            }
            Kind::Udp => [&word(src)[..], &word(dst), &word(8 + 9), &[0, 0]].concat(),
            Kind::Echo => {
                let kind = match (v4, self.outbound) {
                    (true, true) => 8,
                    (true, false) => 0,
                    (false, true) => 128,
                    (false, false) => 129,
                };
                let id = if self.outbound { src } else { dst };
                [&[kind, 0, 0, 0][..], &word(id), &word(3)].concat()
            }
        };
        body.extend(word(self.payload));
        body.extend(*b"payload");
        let (protocol, at) = match (self.kind, v4) {
            (Kind::Tcp, _) => (6, 16),
            (Kind::Udp, _) => (17, 6),
            (Kind::Echo, true) => (1, 2),
            (Kind::Echo, false) => (58, 2),
        };
        let mut packet = header(self.src.ip(), self.dst.ip(), protocol, body.len());
        let start = packet.len();
        packet.extend(&body);
        if self.kind != Kind::Udp || self.sum == Sum::Right {
            let sum = match transport_sum(&packet, start, protocol) {
                0 if self.kind == Kind::Udp => 0xffff,
                sum => sum,
            };
            packet[start + at..start + at + 2].copy_from_slice(&word(sum));
        }
        packet
    }
}

/// An ICMP error about `embedded`: type, code and the four bytes after the checksum are `head`.
pub fn error(src: IpAddr, dst: IpAddr, ttl: u8, head: [u8; 6], embedded: &[u8]) -> Vec<u8> {
    let [kind, code, rest @ ..] = head;
    let protocol = if src.is_ipv4() { 1 } else { 58 };
    let mut packet = header(src, dst, protocol, 8 + embedded.len());
    let at = packet.len();
    packet.extend([kind, code, 0, 0]);
    packet.extend(rest);
    packet.extend(embedded);
    let sum = transport_sum(&packet, at, protocol).to_be_bytes();
    packet[at + 2..at + 4].copy_from_slice(&sum);
    if src.is_ipv4() {
        packet[8] = ttl;
        packet[10..12].fill(0);
        let sum = naive(&packet[..24]).to_be_bytes();
        packet[10..12].copy_from_slice(&sum);
    } else {
        packet[7] = ttl;
    }
    packet
}

/// An IP header with an option in IPv4 and an extension header in IPv6, so that no offset is taken for granted.
pub fn header(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> Vec<u8> {
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let total = u16::try_from(24 + len).unwrap().to_be_bytes();
            let mut header = vec![0x46, 0, total[0], total[1], 0x12, 0x34, 0x40, 0, 64, protocol, 0, 0];
            header.extend(src.octets());
            header.extend(dst.octets());
            header.extend([1, 1, 1, 0]);
            let sum = naive(&header).to_be_bytes();
            header[10..12].copy_from_slice(&sum);
            header
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let length = u16::try_from(8 + len).unwrap().to_be_bytes();
            let mut header = vec![0x60, 0, 0, 0, length[0], length[1], 60, 64];
            header.extend(src.octets());
            header.extend(dst.octets());
            header.extend([protocol, 0, 1, 4, 0, 0, 0, 0]);
            header
        }
        _ => panic!("one packet has one family"),
    }
}

/// The checksum that belongs into the transport header at `at`; 0 if the right one is in it already.
pub fn transport_sum(packet: &[u8], at: usize, protocol: u8) -> u16 {
    let mut covered = match packet[0] >> 4 {
        _ if protocol == 1 => vec![],
        4 => packet[12..20].to_vec(),
        _ => packet[8..40].to_vec(),
    };
    if protocol != 1 {
        covered.extend([0, protocol]);
        covered.extend(u16::try_from(packet.len() - at).unwrap().to_be_bytes());
    }
    covered.extend(&packet[at..]);
    naive(&covered)
}

/// RFC 1071 section 4.1, without any trick.
pub fn naive(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !u16::try_from(sum).unwrap()
}
