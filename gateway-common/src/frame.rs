//! Ethernet to UDP: finds the UDP payload of a frame, or says why the kernel's own stack must look at it.
//!
//! ```text
//! Ethernet 14 | one VLAN tag 4 (or none) | IPv4 20, no options | UDP 8 | payload
//!                                        | IPv6 40, no extension headers |
//! ```
//!
//! Run by XDP `uplink` and by user space. It knows nothing of ports, relays or sessions; what the payload is, says
//! [`classify`](mod@crate::classify). Everything it does not understand is left to the kernel, so "not ours" is no error.

use crate::bytes::Bytes;
use crate::maps::Endpoint;

/// Where the UDP payload of a frame is, or why there is none for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// UDP. `at` is the offset of the payload in the frame, `len` its length; all of it is inside the frame.
    Udp {
        /// Offset of the payload in bytes.
        at: usize,
        /// Length of the payload in bytes, by the UDP header.
        len: usize,
    },
    /// ARP, a second VLAN tag, or anything else that is neither IPv4 nor IPv6.
    NotIp,
    /// The IP header is cut short or does not add up.
    MalformedIp,
    /// IPv4 with options.
    IpOptions,
    /// A fragment, the first one included.
    Fragment,
    /// IPv6 with an extension header other than the fragment header.
    ExtensionHeader,
    /// IP with another protocol inside.
    NotUdp,
    /// The UDP header is cut short or its length does not fit the IP packet.
    MalformedUdp,
}

/// Bytes of an Ethernet header (IEEE 802.3).
pub const ETHERNET: usize = 14;
/// Bytes of an IEEE 802.1Q tag.
pub const VLAN_TAG: usize = 4;
/// Bytes of an IPv4 header without options (RFC 791 section 3.1).
pub const IPV4: usize = 20;
/// Bytes of an IPv6 header (RFC 8200 section 3).
pub const IPV6: usize = 40;
/// Bytes of a UDP header (RFC 768).
pub const UDP: usize = 8;

/// The EtherType of IPv4.
pub const TYPE_IPV4: u16 = 0x0800;
/// The EtherType of IPv6.
pub const TYPE_IPV6: u16 = 0x86dd;
/// IEEE 802.1Q and 802.1ad.
pub const TYPE_VLAN: [u16; 2] = [0x8100, 0x88a8];

/// The protocol number of UDP.
pub const PROTOCOL_UDP: u8 = 17;
const IPV6_FRAGMENT: u8 = 44;
/// Hop-by-hop, routing, ESP, AH, destination options, mobility, HIP, shim6 (IANA "IPv6 Extension Header Types").
const IPV6_EXTENSIONS: [u8; 8] = [0, 43, 50, 51, 60, 135, 139, 140];

/// Finds the UDP payload of an Ethernet frame.
///
/// Always inlined: called as a function of its own it would hand packet pointers through memory, where the verifier
/// loses their bounds.
#[inline(always)]
#[must_use]
pub fn parse(frame: &(impl Bytes + ?Sized)) -> Frame {
    let Some(mut ethertype) = read_u16(frame, ETHERNET - 2) else { return Frame::NotIp };
    let mut at = ETHERNET;
    if TYPE_VLAN.contains(&ethertype) {
        at += VLAN_TAG;
        let Some(inner) = read_u16(frame, at - 2) else { return Frame::NotIp };
        ethertype = inner;
    }
    match ethertype {
        TYPE_IPV4 => ipv4(frame, at),
        TYPE_IPV6 => ipv6(frame, at),
        _ => Frame::NotIp,
    }
}

/// RFC 791 section 3.1. The header checksum is the kernel's business: the frame is handed on as it is.
#[inline(always)]
fn ipv4(frame: &(impl Bytes + ?Sized), at: usize) -> Frame {
    let Some([version, _, len_hi, len_lo]) = frame.read::<4>(at) else { return Frame::MalformedIp };
    let Some([frag_hi, frag_lo, _, protocol]) = frame.read::<4>(at + 6) else { return Frame::MalformedIp };
    let total = usize::from(u16::from_be_bytes([len_hi, len_lo]));
    match version {
        0x45 => {}
        0x46..=0x4f => return Frame::IpOptions,
        _ => return Frame::MalformedIp,
    }
    // Ethernet pads short packets, so the frame may be longer than the packet, never shorter.
    if total < IPV4 || at + total > frame.len() {
        return Frame::MalformedIp;
    }
    // More-fragments and the offset; don't-fragment and the reserved bit are not looked at.
    if u16::from_be_bytes([frag_hi, frag_lo]) & 0x3fff != 0 {
        return Frame::Fragment;
    }
    match protocol {
        PROTOCOL_UDP => udp(frame, at + IPV4, total - IPV4),
        _ => Frame::NotUdp,
    }
}

/// RFC 8200 section 3.
#[inline(always)]
fn ipv6(frame: &(impl Bytes + ?Sized), at: usize) -> Frame {
    let Some([version]) = frame.read::<1>(at) else { return Frame::MalformedIp };
    let Some([len_hi, len_lo, next, _]) = frame.read::<4>(at + 4) else { return Frame::MalformedIp };
    let payload = usize::from(u16::from_be_bytes([len_hi, len_lo]));
    if version >> 4 != 6 || at + IPV6 + payload > frame.len() {
        return Frame::MalformedIp;
    }
    match next {
        PROTOCOL_UDP => udp(frame, at + IPV6, payload),
        IPV6_FRAGMENT => Frame::Fragment,
        next if IPV6_EXTENSIONS.contains(&next) => Frame::ExtensionHeader,
        _ => Frame::NotUdp,
    }
}

/// RFC 768. `room` is what the IP header leaves for UDP.
#[inline(always)]
fn udp(frame: &(impl Bytes + ?Sized), at: usize, room: usize) -> Frame {
    let Some(len) = read_u16(frame, at + 4) else { return Frame::MalformedUdp };
    let len = usize::from(len);
    if len < UDP || len > room {
        return Frame::MalformedUdp;
    }
    Frame::Udp { at: at + UDP, len: len - UDP }
}

/// Where a datagram comes from and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    /// Source address and port.
    pub from: Endpoint,
    /// Destination address and port.
    pub to: Endpoint,
}

/// The addresses and ports of the datagram whose payload [`parse`] has found at `at`.
///
/// `None` if an IPv6 address is IPv4 mapped into IPv6 (RFC 4291 section 2.5.5.2): such a packet has no business on a wire,
/// and would be taken for the IPv4 one.
#[inline(always)]
#[must_use]
pub fn ends(frame: &(impl Bytes + ?Sized), at: usize) -> Option<Ends> {
    let [s0, s1, d0, d1] = frame.read::<4>(at - UDP)?;
    let (from_port, to_port) = ([s0, s1], [d0, d1]);
    // There are no options, so the offset says which header is in front, tag or not.
    if at < ETHERNET + IPV6 + UDP {
        let from = frame.read::<4>(at - UDP - 8)?;
        let to = frame.read::<4>(at - UDP - 4)?;
        return Some(Ends { from: Endpoint::v4(from, from_port), to: Endpoint::v4(to, to_port) });
    }
    let from = frame.read::<16>(at - UDP - 32)?;
    let to = frame.read::<16>(at - UDP - 16)?;
    if is_mapped(&from) || is_mapped(&to) {
        return None;
    }
    Some(Ends { from: Endpoint::v6(from, from_port), to: Endpoint::v6(to, to_port) })
}

const _: () = assert!(ETHERNET + VLAN_TAG + IPV4 + UDP < ETHERNET + IPV6 + UDP);

#[inline(always)]
fn is_mapped(address: &[u8; 16]) -> bool {
    let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = *address;
    u64::from_ne_bytes([a, b, c, d, e, f, g, h]) == 0 && u32::from_be_bytes([i, j, k, l]) == 0xffff
}

#[inline(always)]
fn read_u16(frame: &(impl Bytes + ?Sized), at: usize) -> Option<u16> {
    frame.read::<2>(at).map(u16::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame_table;

    #[test]
    fn the_payload_is_found_where_the_table_put_it() {
        for sample in frame_table::all() {
            if let Some(payload) = &sample.payload {
                let Frame::Udp { at, len } = parse(&*sample.bytes) else {
                    panic!("{}: {:?}", sample.name, parse(&*sample.bytes));
                };
                assert_eq!(&sample.bytes[at..at + len], payload, "{}", sample.name);
            }
        }
    }

    #[test]
    fn a_payload_found_in_a_cut_frame_is_inside_it() {
        for sample in frame_table::all() {
            for cut in 0..=sample.bytes.len() {
                if let Frame::Udp { at, len } = parse(&sample.bytes[..cut]) {
                    assert!(at + len <= cut, "{} cut to {cut}", sample.name);
                }
            }
        }
    }
}
