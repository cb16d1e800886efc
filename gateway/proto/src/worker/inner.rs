//! What counts as a packet inside the tunnel (packets.md section 1): one look over the headers, nothing copied.
//! Knows no client and no rule; both directions begin here.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use gateway_common::DropReason;

use crate::addr::MAX_INNER;

/// The headers of a valid packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inner {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// What the packet carries.
    pub transport: Transport,
    /// Where the transport header begins.
    pub transport_at: usize,
}

/// What a packet carries, as far as rules look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// TCP ports.
    Tcp {
        /// Source port.
        src: u16,
        /// Destination port.
        dst: u16,
    },
    /// UDP ports.
    Udp {
        /// Source port.
        src: u16,
        /// Destination port.
        dst: u16,
    },
    /// ICMP echo, request or reply.
    IcmpEcho,
    /// An error by its type: ICMPv4 3 or 11; ICMPv6 1, 2 or 3.
    IcmpError,
    /// Any other ICMP type.
    Icmp(u8),
    /// Any other protocol number.
    Other(u8),
}

/// The packet an ICMP error is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Embedded {
    /// Its source.
    pub src: IpAddr,
    /// Its destination.
    pub dst: IpAddr,
    /// Its transport protocol number.
    pub protocol: u8,
    /// Where its transport header begins, counted from the start of the packet around it.
    pub transport_at: usize,
    /// Its length by its own header, in bytes; less of it may be there.
    pub total: usize,
}

/// Protocol numbers.
pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMPV6: u8 = 58;

/// Reads a packet.
///
/// # Errors
/// The reason to drop it.
#[inline]
pub fn view(packet: &[u8]) -> Result<Inner, DropReason> {
    if packet.len() > MAX_INNER {
        return Err(DropReason::OversizedInner);
    }
    let header = network(packet)?;
    if header.total != packet.len() {
        return Err(DropReason::MalformedInner);
    }
    let payload = packet.get(header.transport_at..).ok_or(DropReason::MalformedInner)?;
    let transport =
        transport(header.protocol, header.src.is_ipv4(), payload).ok_or(DropReason::MalformedInner)?;
    Ok(Inner { src: header.src, dst: header.dst, transport, transport_at: header.transport_at })
}

/// Does the packet want to go somewhere else than to its destination (RFC 791 section 3.1, loose and strict source route;
/// RFC 8200 section 4.4, segments left)? The rules look at the destination only.
#[inline]
pub fn is_source_routed(packet: &[u8], inner: &Inner) -> bool {
    let plain = if inner.src.is_ipv4() { 20 } else { 40 };
    inner.transport_at != plain && has_route(&packet[..inner.transport_at])
}

/// Looks through the options or extension headers of a valid packet, whose headers are `headers`.
#[cold]
fn has_route(headers: &[u8]) -> bool {
    if headers[0] >> 4 == 4 {
        let mut at = 20;
        while let Some(kind) = headers.get(at) {
            match (kind, headers.get(at + 1)) {
                // End of the list, no operation.
                (0, _) => return false,
                (1, _) => at += 1,
                // Loose and strict source route, whatever their pointer says.
                (131 | 137, _) => return true,
                (_, Some(len @ 2..)) => at += usize::from(*len),
                // What the kernel makes of this is not worth knowing.
                _ => return true,
            }
        }
        return false;
    }
    let (mut next, mut at) = (headers[6], 40);
    while let [following, units, _, left, ..] = headers[at..] {
        if next == 43 && left > 0 {
            return true;
        }
        at += match next {
            51 => (usize::from(units) + 2) * 4,
            44 => 8,
            _ => (usize::from(units) + 1) * 8,
        };
        next = following;
    }
    false
}

/// The packet an ICMP error is about, cut short or not (packets.md section 5.5 step 1).
///
/// `None` unless `inner` is an [`Transport::IcmpError`] whose body holds an IP header of the same family and the
/// first four transport bytes of something that is itself no ICMP error, no fragment.
pub fn embedded(packet: &[u8], inner: &Inner) -> Option<Embedded> {
    if inner.transport != Transport::IcmpError {
        return None;
    }
    let body_at = inner.transport_at + 8;
    let body = packet.get(body_at..)?;
    let header = network(body).ok().filter(|h| h.src.is_ipv4() == inner.src.is_ipv4())?;
    let transport = body.get(header.transport_at..)?;
    match (header.protocol, header.src.is_ipv4()) {
        (ICMP, true) => (transport.len() >= 8 && transport[0] == 8).then_some(())?,
        (ICMPV6, false) => (transport.len() >= 8 && transport[0] == 128).then_some(())?,
        (ICMP, false) | (ICMPV6, true) => return None,
        _ => (transport.len() >= 4).then_some(())?,
    }
    Some(Embedded {
        src: header.src,
        dst: header.dst,
        protocol: header.protocol,
        transport_at: body_at + header.transport_at,
        total: header.total,
    })
}

struct Network {
    src: IpAddr,
    dst: IpAddr,
    protocol: u8,
    transport_at: usize,
    /// The packet's length by its header.
    total: usize,
}

#[inline]
fn network(packet: &[u8]) -> Result<Network, DropReason> {
    match packet.first().map(|first| first >> 4) {
        Some(4) => network_v4(packet),
        Some(6) => network_v6(packet),
        _ => Err(DropReason::MalformedInner),
    }
}

#[inline]
fn network_v4(packet: &[u8]) -> Result<Network, DropReason> {
    let header: &[u8; 20] = packet.first_chunk().ok_or(DropReason::MalformedInner)?;
    let header_len = usize::from(header[0] & 0x0f) * 4;
    let total = usize::from(u16::from_be_bytes([header[2], header[3]]));
    if header_len < 20 || header_len > packet.len() || header_len > total {
        return Err(DropReason::MalformedInner);
    }
    // "any fragment (MF set or offset != 0) rejected"
    if u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0 {
        return Err(DropReason::InnerFragment);
    }
    Ok(Network {
        src: Ipv4Addr::new(header[12], header[13], header[14], header[15]).into(),
        dst: Ipv4Addr::new(header[16], header[17], header[18], header[19]).into(),
        protocol: header[9],
        transport_at: header_len,
        total,
    })
}

#[inline]
fn network_v6(packet: &[u8]) -> Result<Network, DropReason> {
    let (header, rest) = packet.split_first_chunk::<40>().ok_or(DropReason::MalformedInner)?;
    let address = |at: usize| -> IpAddr {
        let mut octets = [0; 16];
        octets.copy_from_slice(&header[at..at + 16]);
        Ipv6Addr::from(octets).into()
    };
    let (protocol, skipped) = extensions(header[6], rest)?;
    Ok(Network {
        src: address(8),
        dst: address(24),
        protocol,
        transport_at: 40 + skipped,
        total: 40 + usize::from(u16::from_be_bytes([header[4], header[5]])),
    })
}

/// Walks the extension headers (RFC 8200 section 4): the transport protocol and the bytes in front of it.
#[inline]
fn extensions(mut next: u8, rest: &[u8]) -> Result<(u8, usize), DropReason> {
    let mut at = 0;
    loop {
        let header = rest.get(at..).unwrap_or_default();
        let len = match (next, header) {
            // Hop-by-hop, routing, destination options, mobility, HIP, shim6.
            (0 | 43 | 60 | 135 | 139 | 140, [_, units, ..]) => (usize::from(*units) + 1) * 8,
            // Authentication (RFC 4302 section 2.2): in units of 4, minus 2.
            (51, [_, units, ..]) => (usize::from(*units) + 2) * 4,
            // An atomic fragment is a whole packet (RFC 6946); any other is not.
            (44, [_, _, offset, flags, ..]) if *offset == 0 && flags & 0xf9 == 0 => 8,
            (44, [_, _, _, _, ..]) => return Err(DropReason::InnerFragment),
            (0 | 43 | 44 | 51 | 60 | 135 | 139 | 140, _) => return Err(DropReason::MalformedInner),
            _ => return Ok((next, at)),
        };
        if len > header.len() {
            return Err(DropReason::MalformedInner);
        }
        next = header[0];
        at += len;
    }
}

#[inline]
fn transport(protocol: u8, v4: bool, payload: &[u8]) -> Option<Transport> {
    let word = |at: usize| u16::from_be_bytes([payload[at], payload[at + 1]]);
    Some(match (protocol, v4) {
        (TCP, _) => {
            let header_len = usize::from(payload.get(12)? >> 4) * 4;
            (header_len >= 20 && header_len <= payload.len()).then_some(())?;
            Transport::Tcp { src: word(0), dst: word(2) }
        }
        (UDP, _) => {
            (payload.len() >= 8 && usize::from(word(4)) == payload.len()).then_some(())?;
            Transport::Udp { src: word(0), dst: word(2) }
        }
        (ICMP, true) | (ICMPV6, false) => {
            (payload.len() >= 8).then_some(())?;
            match (payload[0], v4) {
                (0 | 8, true) | (128 | 129, false) => Transport::IcmpEcho,
                (3 | 11, true) | (1..=3, false) => Transport::IcmpError,
                (kind, _) => Transport::Icmp(kind),
            }
        }
        (ICMP, false) | (ICMPV6, true) => return None,
        (other, _) => Transport::Other(other),
    })
}
