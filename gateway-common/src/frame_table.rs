//! One table of frames for the tests of user space and of the compiled XDP program; never in a shipped binary.
//!
//! Not a generator: each entry is a frame somebody might send, with the kind it must be counted as.

use std::boxed::Box;
use std::string::String;
use std::vec::Vec;
use std::{format, vec};

use crate::{FrameKind, classify::STUN_MAGIC};

/// A frame and what it is.
#[derive(Debug)]
pub struct Sample {
    /// Names the frame in a failing test.
    pub name: String,
    /// From the Ethernet header on.
    pub bytes: Vec<u8>,
    /// What it must be counted as.
    pub kind: FrameKind,
    /// The UDP payload, for frames that are UDP.
    pub payload: Option<Vec<u8>>,
}

/// Every sample: each payload in each wrapping, then the frames that are no UDP for us.
#[must_use]
pub fn all() -> Vec<Sample> {
    let mut samples = Vec::new();
    for (what, payload, kind) in payloads() {
        for (how, wrap) in wrappings() {
            let bytes = wrap(&payload);
            samples.push(Sample {
                name: format!("{what} in {how}"),
                bytes,
                kind,
                payload: Some(payload.clone()),
            });
        }
    }
    samples.extend(others().into_iter().map(|(name, bytes, kind)| Sample {
        name: name.into(),
        bytes,
        kind,
        payload: None,
    }));
    samples
}

type Wrap = Box<dyn Fn(&[u8]) -> Vec<u8>>;

fn wrappings() -> Vec<(&'static str, Wrap)> {
    vec![
        ("IPv4", Box::new(|p| ethernet(&[], 0x0800, &ipv4(17, &udp(p))))),
        ("IPv6", Box::new(|p| ethernet(&[], 0x86dd, &ipv6(17, &udp(p))))),
        ("IPv4 with a VLAN tag", Box::new(|p| ethernet(&[0x8100], 0x0800, &ipv4(17, &udp(p))))),
        ("IPv6 with a service tag", Box::new(|p| ethernet(&[0x88a8], 0x86dd, &ipv6(17, &udp(p))))),
        ("IPv4 with Ethernet padding", Box::new(|p| padded(ethernet(&[], 0x0800, &ipv4(17, &udp(p)))))),
    ]
}

fn payloads() -> Vec<(&'static str, Vec<u8>, FrameKind)> {
    let wg = |kind: u8, len: usize| {
        let mut bytes = vec![0xa5; len];
        bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
        bytes
    };
    let stun = |kind: [u8; 2], length: u16, body: usize| {
        let mut bytes = kind.to_vec();
        bytes.extend(length.to_be_bytes());
        bytes.extend(STUN_MAGIC);
        bytes.resize(20 + body, 7);
        bytes
    };
    let channel = |number: u16, length: u16, body: usize| {
        let mut bytes = number.to_be_bytes().to_vec();
        bytes.extend(length.to_be_bytes());
        bytes.resize(4 + body, 4);
        bytes
    };
    vec![
        ("nothing", vec![], FrameKind::Empty),
        ("one zero byte", vec![0], FrameKind::Unknown),
        ("one byte of WireGuard", vec![4], FrameKind::Unknown),
        ("three bytes of WireGuard", vec![1, 0, 0], FrameKind::Unknown),
        ("four bytes of WireGuard", wg(1, 4), FrameKind::MalformedWireGuard),
        ("seven bytes of WireGuard", wg(3, 7), FrameKind::MalformedWireGuard),
        ("initiation", wg(1, 148), FrameKind::HandshakeInitiation),
        ("long initiation", wg(1, 149), FrameKind::MalformedWireGuard),
        ("response", wg(2, 92), FrameKind::HandshakeResponse),
        ("short response", wg(2, 91), FrameKind::MalformedWireGuard),
        ("cookie reply", wg(3, 64), FrameKind::CookieReply),
        ("keepalive", wg(4, 32), FrameKind::Data),
        ("full data", wg(4, 1312), FrameKind::Data),
        ("short data", wg(4, 31), FrameKind::MalformedWireGuard),
        ("data with a reserved byte set", vec![4, 0, 1, 0, 0, 0, 0, 0, 0], FrameKind::Unknown),
        ("type five", wg(5, 64), FrameKind::Unknown),
        ("binding request", stun([0, 1], 0, 0), FrameKind::Stun),
        ("binding success", stun([1, 1], 12, 12), FrameKind::Stun),
        ("allocate error", stun([1, 0x13], 8, 8), FrameKind::Stun),
        ("STUN cut short", stun([0, 1], 12, 8), FrameKind::Unknown),
        ("STUN of odd length", stun([0, 1], 7, 7), FrameKind::Unknown),
        ("STUN without its cookie", vec![0; 20], FrameKind::Unknown),
        ("empty ChannelData", channel(0x4000, 0, 0), FrameKind::ChannelData),
        ("ChannelData", channel(0x4fff, 32, 32), FrameKind::ChannelData),
        ("ChannelData with padding", channel(0x4001, 30, 32), FrameKind::MalformedChannelData),
        ("ChannelData cut short", channel(0x7fff, 40, 32), FrameKind::MalformedChannelData),
        ("two bytes of ChannelData", vec![0x40, 1], FrameKind::MalformedChannelData),
        ("channel number out of range", channel(0x8000, 0, 0), FrameKind::Unknown),
        ("text", b"GET / HTTP/1.1\r\n\r\n".to_vec(), FrameKind::MalformedChannelData),
        ("DTLS", vec![22, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0], FrameKind::Unknown),
    ]
}

fn others() -> Vec<(&'static str, Vec<u8>, FrameKind)> {
    let data = udp(&[4; 32]);
    let change = |mut bytes: Vec<u8>, at: usize, to: u8| {
        bytes[at] = to;
        bytes
    };
    let v4 = |bytes: Vec<u8>| ethernet(&[], 0x0800, &bytes);
    let v6 = |bytes: Vec<u8>| ethernet(&[], 0x86dd, &bytes);
    vec![
        ("ARP", ethernet(&[], 0x0806, &[0; 28]), FrameKind::NotIp),
        ("two VLAN tags", ethernet(&[0x88a8, 0x8100], 0x0800, &ipv4(17, &data)), FrameKind::NotIp),
        ("a VLAN tag and nothing else", ethernet(&[0x8100], 0x0800, &[])[..16].to_vec(), FrameKind::NotIp),
        ("an Ethernet header and nothing else", v4(vec![]), FrameKind::MalformedIp),
        ("IPv4 cut in its header", v4(ipv4(17, &data)[..19].to_vec()), FrameKind::MalformedIp),
        ("IPv4 cut in its payload", v4(ipv4(17, &data)[..40].to_vec()), FrameKind::MalformedIp),
        ("IPv4 with a header of four words", v4(change(ipv4(17, &data), 0, 0x44)), FrameKind::MalformedIp),
        (
            "IPv4 that says it is shorter than its header",
            v4(change(ipv4(17, &data), 3, 19)),
            FrameKind::MalformedIp,
        ),
        ("IPv6 under the IPv4 type", v4(ipv6(17, &data)), FrameKind::MalformedIp),
        ("IPv4 with options", v4(change(ipv4(17, &data), 0, 0x46)), FrameKind::IpOptions),
        ("first fragment", v4(change(ipv4(17, &data), 6, 0x20)), FrameKind::Fragment),
        ("last fragment", v4(change(ipv4(17, &data), 7, 0xb9)), FrameKind::Fragment),
        ("TCP over IPv4", v4(ipv4(6, &[0; 20])), FrameKind::NotUdp),
        ("ICMP over IPv4", v4(ipv4(1, &[8, 0, 0, 0, 0, 0, 0, 0])), FrameKind::NotUdp),
        ("IPv4 with half a UDP header", v4(ipv4(17, &data[..4])), FrameKind::MalformedUdp),
        ("UDP shorter than its header", v4(ipv4(17, &change(data.clone(), 5, 7))), FrameKind::MalformedUdp),
        ("UDP longer than the packet", v4(ipv4(17, &change(data.clone(), 5, 41))), FrameKind::MalformedUdp),
        ("IPv6 cut in its header", v6(ipv6(17, &data)[..39].to_vec()), FrameKind::MalformedIp),
        ("IPv6 cut in its payload", v6(ipv6(17, &data)[..60].to_vec()), FrameKind::MalformedIp),
        ("IPv4 under the IPv6 type", v6(ipv4(17, &data)), FrameKind::MalformedIp),
        ("IPv6 with hop-by-hop options", v6(ipv6(0, &[17, 0, 0, 0, 0, 0, 0, 0])), FrameKind::ExtensionHeader),
        ("IPv6 fragment", v6(ipv6(44, &[17, 0, 0, 1, 0, 0, 0, 0])), FrameKind::Fragment),
        ("ICMPv6", v6(ipv6(58, &[135, 0, 0, 0])), FrameKind::NotUdp),
        ("IPv6 with a cut UDP header", v6(ipv6(17, &data[..5])), FrameKind::MalformedUdp),
    ]
}

/// `tags` are the types of VLAN tags in front of `ethertype`.
pub(crate) fn ethernet(tags: &[u16], ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    for tag in tags {
        frame.extend(tag.to_be_bytes());
        frame.extend([0, 42]);
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
    frame
}

/// Six bytes nobody asked for, as a short frame has them up to 60 bytes.
fn padded(mut frame: Vec<u8>) -> Vec<u8> {
    frame.extend([0x55; 6]);
    frame
}

fn ipv4(protocol: u8, payload: &[u8]) -> Vec<u8> {
    ipv4_between([192, 0, 2, 1], [192, 0, 2, 2], protocol, payload)
}

pub(crate) fn ipv4_between(from: [u8; 4], to: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let [hi, lo] = length(20 + payload.len());
    let mut packet = vec![0x45, 0, hi, lo, 0, 1, 0x40, 0, 64, protocol, 0, 0];
    packet.extend(from);
    packet.extend(to);
    packet.extend(payload);
    packet
}

fn ipv6(next: u8, payload: &[u8]) -> Vec<u8> {
    let from = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let to = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
    ipv6_between(from, to, next, payload)
}

pub(crate) fn ipv6_between(from: [u8; 16], to: [u8; 16], next: u8, payload: &[u8]) -> Vec<u8> {
    let [hi, lo] = length(payload.len());
    let mut packet = vec![0x60, 0, 0, 0, hi, lo, next, 64];
    packet.extend(from);
    packet.extend(to);
    packet.extend(payload);
    packet
}

fn udp(payload: &[u8]) -> Vec<u8> {
    udp_between([0xcd, 0x91], [0xcd, 0x91], payload)
}

pub(crate) fn udp_between([s0, s1]: [u8; 2], [d0, d1]: [u8; 2], payload: &[u8]) -> Vec<u8> {
    let [hi, lo] = length(8 + payload.len());
    let mut datagram = vec![s0, s1, d0, d1, hi, lo, 0, 0];
    datagram.extend(payload);
    datagram
}

fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).expect("samples are shorter than 64 KiB").to_be_bytes()
}
