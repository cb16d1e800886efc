//! One table of datagrams and packets with their owners, for the tests of [`steer`](crate::steer) in user space and of the
//! steering programs in the kernel; never in a shipped binary.

use std::vec;
use std::vec::Vec;

use crate::maps::TunnelKey;
use crate::{channel_data, classify::STUN_MAGIC};

/// A UDP payload, or several that GRO merged into one.
#[derive(Debug)]
pub struct Datagram {
    /// Names the sample in a failing test.
    pub name: &'static str,
    /// From the first byte after the UDP header on.
    pub bytes: Vec<u8>,
    /// The connection it must be found to belong to.
    pub connection: Option<u32>,
}

/// A packet on its way into the TUN.
#[derive(Debug)]
pub struct Packet {
    /// Names the sample in a failing test.
    pub name: &'static str,
    /// From the IP header on.
    pub bytes: Vec<u8>,
    /// The address it must be found to go to.
    pub tunnel: Option<TunnelKey>,
}

/// The connection of every sample that has one; the merged ones go to it by their first message.
pub const CONNECTION: u32 = 0x6c_4c25;
/// The connection of what follows the first message of a merged sample.
pub const OTHER: u32 = 0x00_0001;

/// Every sample of a UDP payload.
#[must_use]
pub fn datagrams() -> Vec<Datagram> {
    let data = |len| message(4, CONNECTION, len);
    let some = Some(CONNECTION);
    let sample = |name, bytes, connection| Datagram { name, bytes, connection };
    vec![
        sample("data", data(1312), some),
        sample("keepalive", data(32), some),
        sample("the first index of all", message(4, 0, 32), Some(0)),
        sample("the last index of all", message(4, 0xff_ffff, 32), Some(0xff_ffff)),
        sample("response", message(2, CONNECTION, 92), some),
        sample("cookie reply", message(3, CONNECTION, 64), some),
        sample("data on a channel", channel(0x4000, &data(1312)), some),
        sample("keepalive on a channel", channel(0x7fff, &data(32)), some),
        sample("response on a channel", channel(0x4001, &message(2, CONNECTION, 92)), some),
        sample("cookie reply on a channel", channel(0x4001, &message(3, CONNECTION, 64)), some),
        sample("merged data", [data(1312), data(1312), data(40)].concat(), some),
        sample(
            "merged data of two clients on channels",
            [channel(0x4000, &data(96)), channel(0x4001, &message(4, OTHER, 96))].concat(),
            some,
        ),
        sample("nothing", vec![], None),
        sample("one byte of data", vec![4], None),
        sample("data cut to the first word", data(32)[..4].to_vec(), None),
        sample("data of 31 bytes", data(31), None),
        sample("initiation", message(1, CONNECTION, 148), None),
        sample("response of 91 bytes", message(2, CONNECTION, 91), None),
        sample("cookie reply of 63 bytes", message(3, CONNECTION, 63), None),
        sample("type five", message(5, CONNECTION, 200), None),
        sample("data with a reserved byte set", [&[4, 0, 1, 0], &data(64)[4..]].concat(), None),
        sample("initiation on a channel", channel(0x4001, &message(1, CONNECTION, 148)), None),
        sample("31 bytes of data on a channel", channel(0x4001, &data(31)), None),
        sample(
            "31 bytes of data on a channel, and more",
            [channel(0x4001, &data(31)), vec![0; 40]].concat(),
            None,
        ),
        sample("an empty channel, and more", [channel(0x4001, &[]), data(64)].concat(), None),
        sample("a channel cut short", channel(0x4001, &data(64))[..67].to_vec(), None),
        sample("a channel number out of range", channel(0x8000, &data(64)), None),
        sample("ChannelData in ChannelData", channel(0x4001, &channel(0x4002, &data(64))), None),
        sample("STUN", [&[1, 1, 0, 44][..], &STUN_MAGIC, &[7; 56]].concat(), None),
        sample("text", b"GET / HTTP/1.1\r\nHost: example.net\r\n\r\n".to_vec(), None),
    ]
}

/// Every sample of an IP packet.
#[must_use]
pub fn packets() -> Vec<Packet> {
    let v6: [u8; 16] = [0xfd, 0, 0x20, 0x21, 0x11, 0x11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
    let sample = |name, bytes, tunnel| Packet { name, bytes, tunnel };
    let v4_key = Some(TunnelKey::v4([100, 64, 1, 7]));
    vec![
        sample("IPv4", ipv4(0x45, 28), v4_key),
        sample("IPv4 that is only a header", ipv4(0x45, 20), v4_key),
        sample("IPv4 with options", ipv4(0x46, 60), v4_key),
        sample("IPv4 of full length", ipv4(0x45, 1280), v4_key),
        sample("IPv6", ipv6(v6, 48), Some(TunnelKey::v6(v6))),
        sample("IPv6 that is only a header", ipv6(v6, 40), Some(TunnelKey::v6(v6))),
        sample("IPv6 cut in its address", ipv6(v6, 40)[..39].to_vec(), None),
        sample("neither", vec![0x55; 40], None),
    ]
}

/// A WireGuard message of `len` bytes whose receiver index is in `connection`; the sender's index of a response and
/// everything else is filled with what must not be taken for it.
#[must_use]
pub fn message(kind: u8, connection: u32, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xa5; len.max(12)];
    bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
    let receiver = (connection << 8 | 0x9d).to_le_bytes();
    let at = if kind == 2 { 8 } else { 4 };
    bytes[at..at + 4].copy_from_slice(&receiver);
    bytes.truncate(len);
    bytes
}

/// `payload` behind a ChannelData header.
#[must_use]
pub fn channel(number: u16, payload: &[u8]) -> Vec<u8> {
    let header = channel_data::header(number, payload.len()).expect("samples are shorter than 64 KiB");
    [&header, payload].concat()
}

fn ipv4(first: u8, len: usize) -> Vec<u8> {
    let [hi, lo] = u16::try_from(len).expect("samples are shorter than 64 KiB").to_be_bytes();
    let mut packet = vec![first, 0, hi, lo, 0, 1, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 1, 100, 64, 1, 7];
    packet.resize(len, 0x5a);
    packet
}

fn ipv6(to: [u8; 16], len: usize) -> Vec<u8> {
    let [hi, lo] = u16::try_from(len - 40).expect("samples are shorter than 64 KiB").to_be_bytes();
    let mut packet = vec![0x60, 0, 0, 0, hi, lo, 17, 64];
    packet.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend(to);
    packet.resize(len, 0x5a);
    packet
}
