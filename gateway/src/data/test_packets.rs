//! Packets for the tests of segmentation: built field by field, with checksums by the naive algorithm, so that a
//! mistake in the code under test is not repeated here.

/// A TCP segment or UDP datagram in an IP packet.
#[derive(Debug, Clone)]
pub struct Spec {
    /// IPv6 rather than IPv4.
    pub v6: bool,
    /// TCP rather than UDP.
    pub tcp: bool,
    /// Tells flows apart: last byte of both addresses.
    pub flow: u8,
    /// TOS or traffic class.
    pub tos: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// IPv4 identification.
    pub id: u16,
    /// IPv4 DF.
    pub df: bool,
    /// TCP sequence number.
    pub seq: u32,
    /// TCP acknowledgment number.
    pub ack: u32,
    /// TCP flags.
    pub flags: u8,
    /// TCP window.
    pub window: u16,
    /// TCP options, a multiple of 4 bytes.
    pub options: Vec<u8>,
    /// What follows the headers.
    pub payload: Vec<u8>,
}

impl Default for Spec {
    fn default() -> Self {
        Self {
            v6: false,
            tcp: true,
            flow: 1,
            tos: 0,
            ttl: 64,
            id: 7,
            df: true,
            seq: 1000,
            ack: 5,
            flags: 0x10,
            window: 512,
            options: vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2],
            payload: vec![1; 100],
        }
    }
}

impl Spec {
    /// The packet.
    pub fn build(&self) -> Vec<u8> {
        let l4 = self.transport();
        let mut p = if self.v6 { self.ipv6(l4.len()) } else { self.ipv4(l4.len()) };
        let (start, field) = (p.len(), if self.tcp { 16 } else { 6 });
        p.extend(l4);
        let addresses = if self.v6 { p[8..40].to_vec() } else { p[12..20].to_vec() };
        let mut summed = addresses;
        summed.extend([0, if self.tcp { 6 } else { 17 }]);
        summed.extend(u16::try_from(p.len() - start).unwrap().to_be_bytes());
        summed.extend(&p[start..]);
        let sum = match naive_checksum(&summed) {
            0 if !self.tcp => 0xffff,
            sum => sum,
        };
        p[start + field..start + field + 2].copy_from_slice(&sum.to_be_bytes());
        p
    }

    fn transport(&self) -> Vec<u8> {
        let mut p = Vec::new();
        p.extend([0x10, self.flow, 0x20, 0x53]);
        if self.tcp {
            p.extend(self.seq.to_be_bytes());
            p.extend(self.ack.to_be_bytes());
            p.push(u8::try_from((20 + self.options.len()) / 4).unwrap() << 4);
            p.push(self.flags);
            p.extend(self.window.to_be_bytes());
            p.extend([0, 0, 0, 0]);
            p.extend(&self.options);
        } else {
            p.extend(u16::try_from(8 + self.payload.len()).unwrap().to_be_bytes());
            p.extend([0, 0]);
        }
        p.extend(&self.payload);
        p
    }

    fn ipv4(&self, l4: usize) -> Vec<u8> {
        let mut p = vec![0x45, self.tos];
        p.extend(u16::try_from(20 + l4).unwrap().to_be_bytes());
        p.extend(self.id.to_be_bytes());
        p.extend([if self.df { 0x40 } else { 0 }, 0, self.ttl, if self.tcp { 6 } else { 17 }, 0, 0]);
        p.extend([10, 0, 0, self.flow, 100, 64, 0, self.flow]);
        let sum = naive_checksum(&p);
        p[10..12].copy_from_slice(&sum.to_be_bytes());
        p
    }

    fn ipv6(&self, l4: usize) -> Vec<u8> {
        let mut p = vec![0x60 | self.tos >> 4, self.tos << 4, 0, 9];
        p.extend(u16::try_from(l4).unwrap().to_be_bytes());
        p.extend([if self.tcp { 6 } else { 17 }, self.ttl]);
        p.extend([0xfd; 15]);
        p.push(self.flow);
        p.extend([0xfe; 15]);
        p.push(self.flow);
        p
    }
}

/// RFC 1071, as plainly as possible.
pub fn naive_checksum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !u16::try_from(sum).unwrap()
}
