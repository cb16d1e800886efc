//! Inner packets made by hand, byte for byte the same in every run, and what is worth comparing of those that arrive.

use std::{
    fmt::Write as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use anyhow::{Context as _, Result, ensure};
use gateway_common::checksum;

pub const ICMP: u8 = 1;
pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMPV6: u8 = 58;

/// TCP's flags (RFC 9293 section 3.1).
pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const ACK: u8 = 0x10;

/// What IP needs to know of a packet, besides the transport's bytes.
#[derive(Clone, Copy)]
pub struct Head {
    pub from: IpAddr,
    pub to: IpAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// DSCP and ECN, a byte.
    pub tos: u8,
    /// IPv4's Identification; also the low 16 bits of IPv6's flow label.
    pub id: u16,
    /// Without IPv4's DF bit.
    pub fragmentable: bool,
}

impl Head {
    pub fn new(from: IpAddr, to: IpAddr, id: u16) -> Self {
        Self { from, to, ttl: 64, tos: 0, id, fragmentable: false }
    }

    /// A whole packet around the transport's bytes.
    pub fn packet(self, protocol: u8, transport: &[u8]) -> Vec<u8> {
        let [high, low] = self.id.to_be_bytes();
        match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let [len_high, len_low] = length(transport.len() + 20);
                let flags = if self.fragmentable { 0 } else { 0x40 };
                let mut header =
                    [0x45, self.tos, len_high, len_low, high, low, flags, 0, self.ttl, protocol, 0, 0]
                        .to_vec();
                header.extend(from.octets());
                header.extend(to.octets());
                seal(&mut header);
                [&header, transport].concat()
            }
            (from, to) => {
                let [len_high, len_low] = length(transport.len());
                let mut header = vec![0x60 | self.tos >> 4, self.tos << 4, high, low, len_high, len_low];
                header.extend([protocol, self.ttl]);
                header.extend(v6(from).octets());
                header.extend(v6(to).octets());
                [&header, transport].concat()
            }
        }
    }

    pub fn udp(self, source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
        let mut bytes = [source.to_be_bytes(), destination.to_be_bytes(), length(payload.len() + 8)].concat();
        bytes.extend([0, 0]);
        bytes.extend(payload);
        let mut sum = self.sum(UDP, &bytes);
        if sum == [0, 0] {
            // RFC 768: a sum of zero is sent as all ones.
            sum = [0xff, 0xff];
        }
        bytes[6..8].copy_from_slice(&sum);
        self.packet(UDP, &bytes)
    }

    pub fn tcp(self, [source, destination]: [u16; 2], sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = [source.to_be_bytes(), destination.to_be_bytes()].concat();
        bytes.extend(sequence.to_be_bytes());
        bytes.extend([0, 0, 0, 0, 0x50, flags, 0x20, 0, 0, 0, 0, 0]);
        bytes.extend(payload);
        let sum = self.sum(TCP, &bytes);
        bytes[16..18].copy_from_slice(&sum);
        self.packet(TCP, &bytes)
    }

    pub fn echo(self, id: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
        let kind = if self.from.is_ipv4() { 8 } else { 128 };
        self.icmp(kind, 0, &[&id.to_be_bytes(), &sequence.to_be_bytes(), payload].concat())
    }

    pub fn icmp(self, kind: u8, code: u8, rest: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind, code, 0, 0];
        bytes.extend(rest);
        let protocol = if self.from.is_ipv4() { ICMP } else { ICMPV6 };
        let sum = if self.from.is_ipv4() {
            checksum::finish(checksum::sum(&bytes))
        } else {
            self.sum(ICMPV6, &bytes)
        };
        bytes[2..4].copy_from_slice(&sum);
        self.packet(protocol, &bytes)
    }

    fn sum(self, protocol: u8, transport: &[u8]) -> [u8; 2] {
        let addresses = match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
            (from, to) => [v6(from).octets(), v6(to).octets()].concat(),
        };
        let [high, low] = length(transport.len());
        let pseudo = checksum::pseudo_header(&addresses, protocol, u16::from_be_bytes([high, low]));
        checksum::finish(pseudo + checksum::sum(transport))
    }
}

/// Writes the checksum of an IPv4 header.
pub fn seal(header: &mut [u8]) {
    header[10..12].fill(0);
    let sum = checksum::finish(checksum::sum(header));
    header[10..12].copy_from_slice(&sum);
}

fn v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V6(address) => address,
        IpAddr::V4(address) => address.to_ipv6_mapped(),
    }
}

fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).expect("no handmade packet is that long").to_be_bytes()
}

/// Where a packet came from and went to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    pub from: IpAddr,
    pub to: IpAddr,
    pub protocol: u8,
    /// Of TCP and UDP: both ports. Of ICMP: type and code.
    pub about: [u16; 2],
}

/// One packet that arrived, as it is compared: every byte but those that the sender's kernel chooses as it likes.
#[derive(Debug, Clone)]
pub struct Arrived {
    pub flow: Flow,
    /// DSCP and ECN, TTL, identification or flow label, whether the transport's checksum is right, the transport's bytes.
    pub text: String,
}

/// What arrived at an interface as one: cut into `pieces` bytes of UDP payload if it is a super-packet. `left` says that
/// the transport's checksum is left to the hardware. `chosen` says that the identification was chosen by us and must
/// arrive. `None` is a packet that has nothing to do with us.
///
/// # Errors
/// If it is no packet.
pub fn arrived(bytes: &[u8], pieces: usize, left: bool, chosen: bool) -> Result<Vec<Arrived>> {
    let version = bytes.first().context("an empty packet")? >> 4;
    let (header, protocol, from, to, tos, ttl, id): (_, _, IpAddr, IpAddr, _, _, _);
    if version == 4 {
        header = usize::from(bytes[0] & 0xf) * 4;
        ensure!(
            checksum::fold(checksum::sum(&bytes[..header])) == [0xff, 0xff],
            "a wrong IPv4 header checksum: {bytes:02x?}"
        );
        let [a, b, c, d, e, f, g, h] = bytes[12..20].try_into()?;
        (from, to) = (Ipv4Addr::new(a, b, c, d).into(), Ipv4Addr::new(e, f, g, h).into());
        (protocol, tos, ttl) = (bytes[9], bytes[1], bytes[8]);
        // RFC 6864 section 4.1: of a datagram that may not be fragmented the field means nothing, and pieces of what was
        // put together get new ones.
        let atomic = bytes[6] & 0x40 != 0;
        id = if atomic { [0, 0, bytes[6], bytes[7]] } else { [bytes[4], bytes[5], bytes[6], bytes[7]] };
    } else {
        ensure!(version == 6 && bytes.len() >= 40, "no IP packet: {bytes:02x?}");
        header = 40;
        (from, to) = (octets(&bytes[8..24])?.into(), octets(&bytes[24..40])?.into());
        (protocol, tos, ttl) = (bytes[6], bytes[0] << 4 | bytes[1] >> 4, bytes[7]);
        id = [0, bytes[1] & 0xf, bytes[2], bytes[3]];
    }
    let transport = &bytes[header..];
    let (head, id) = (Head { ttl, tos, ..Head::new(from, to, 0) }, chosen.then_some(id));
    if protocol == UDP && pieces > 0 && transport.len() > 8 + pieces {
        let cut = |payload: &[u8]| {
            let piece = [&transport[..4], &length(payload.len() + 8), &[0, 0], payload].concat();
            one(head, protocol, id, &piece, true)
        };
        return transport[8..].chunks(pieces).map(cut).collect();
    }
    ensure!(pieces == 0 || protocol == UDP, "a super-packet of protocol {protocol}");
    Ok(vec![one(head, protocol, id, transport, left)?])
}

fn one(head: Head, protocol: u8, id: Option<[u8; 4]>, transport: &[u8], left: bool) -> Result<Arrived> {
    let Head { from, to, ttl, tos, .. } = head;
    let word = |at: usize| transport.get(at..at + 2).map_or(0, |word| u16::from_be_bytes([word[0], word[1]]));
    let (about, at) = match protocol {
        UDP => ([word(0), word(2)], 6),
        TCP => ([word(0), word(2)], 16),
        _ => (
            [transport.first().copied().unwrap_or(0).into(), transport.get(1).copied().unwrap_or(0).into()],
            2,
        ),
    };
    let sum = if left {
        "right"
    } else if protocol == UDP && word(6) == 0 {
        "none"
    } else {
        let whole = if protocol == ICMP {
            checksum::finish(checksum::sum(transport))
        } else {
            head.sum(protocol, transport)
        };
        if whole == [0, 0] { "right" } else { "wrong" }
    };
    let mut text = format!("tos {tos:02x} ttl {ttl} sum {sum}");
    if let Some(id) = id {
        write!(text, " id {}", hex::encode(id))?;
    }
    let mut bytes = transport.to_vec();
    if let Some(field) = bytes.get_mut(at..at + 2)
        && sum == "right"
    {
        field.fill(0);
    }
    write!(text, " {}", hex::encode(bytes))?;
    Ok(Arrived { flow: Flow { from, to, protocol, about }, text })
}

fn octets(bytes: &[u8]) -> Result<Ipv6Addr> {
    Ok(<[u8; 16]>::try_from(bytes)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOUR: [&str; 2] = ["100.64.0.1", "172.20.0.100"];
    const SIX: [&str; 2] = ["fd00:2021:1111::1", "fd00:db8:20::100"];

    fn head([from, to]: [&str; 2]) -> Head {
        Head { tos: 0xb9, ttl: 33, ..Head::new(from.parse().unwrap(), to.parse().unwrap(), 0x1234) }
    }

    #[test]
    fn what_is_made_by_hand_is_right_when_it_arrives() {
        for (ends, fragmentable, id) in
            [(FOUR, false, "00004000"), (FOUR, true, "12340000"), (SIX, false, "00001234")]
        {
            let head = Head { fragmentable, ..head(ends) };
            for packet in [head.udp(1, 2, b"odd"), head.tcp([1, 2], 7, SYN, b""), head.echo(1, 2, b"payload")]
            {
                let [arrived] = <[Arrived; 1]>::try_from(arrived(&packet, 0, false, true).unwrap()).unwrap();
                let begin = format!("tos b9 ttl 33 sum right id {id} ");
                assert!(arrived.text.starts_with(&begin), "{}", arrived.text);
            }
        }
    }

    #[test]
    fn one_wrong_bit_is_seen() {
        for ends in [FOUR, SIX] {
            let mut packet = head(ends).udp(1, 2, b"payload");
            *packet.last_mut().unwrap() ^= 1;
            let arrived = arrived(&packet, 0, false, false).unwrap();
            assert!(arrived[0].text.contains("sum wrong"), "{}", arrived[0].text);
        }
    }

    #[test]
    fn a_super_packet_is_its_pieces() {
        for ends in [FOUR, SIX] {
            let whole = arrived(&head(ends).udp(1, 2, b"aaaabbbbcc"), 4, true, false).unwrap();
            let pieces = [b"aaaa".as_slice(), b"bbbb", b"cc"];
            assert_eq!(whole.len(), pieces.len());
            for (one, piece) in whole.iter().zip(pieces) {
                let alone = arrived(&head(ends).udp(1, 2, piece), 0, false, false).unwrap();
                assert_eq!((&one.flow, &one.text), (&alone[0].flow, &alone[0].text));
            }
        }
    }
}
