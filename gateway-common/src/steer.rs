//! Whose packet is this? The two questions of the steering programs, answered from the first bytes.
//!
//! Run by `steer_socket` and `steer_tun` in the kernel, and by the tests in user space. An answer is a hint, not a
//! verdict: a packet that reaches another worker than its owner is passed on, so nothing is verified here that the
//! owner verifies anyway.

use crate::bytes::Bytes;
use crate::channel_data;
use crate::maps::{SessionKey, TunnelKey};

/// Bytes from the start of a datagram up to the furthest index: ChannelData header 4, type 4, sender 4, receiver 4. The
/// shortest message with a receiver index has 32 bytes, so these are always there.
const HEAD: usize = 16;

/// The connection that the UDP payload from `at` on belongs to, by its WireGuard receiver index, ChannelData header or
/// not; `None` if it has no such index.
///
/// What GRO has merged is one payload here: several messages, one after the other, all but the last as long as the
/// first. The first one decides. Its length is not known, so a message is asked to be no shorter than it must be, and
/// ChannelData to be no longer than the payload; where one message is the whole payload, this finds the same index as
/// [`receiver_index`](crate::classify::receiver_index).
#[inline(always)]
#[must_use]
pub fn session_of(datagram: &(impl Bytes + ?Sized), at: usize) -> Option<SessionKey> {
    let len = datagram.len().checked_sub(at)?;
    let [b0, b1, b2, b3, w1 @ .., c0, c1, c2, c3, d0, d1, d2, d3] = datagram.read::<HEAD>(at)?;
    let first = [b0, b1, b2, b3];
    let third = [c0, c1, c2, c3];
    match first[0] {
        // relay-dialect.md section 4.
        64..=127 => {
            let claimed = usize::from(u16::from_be_bytes([b2, b3]));
            if claimed + channel_data::HEADER_LEN > len {
                return None;
            }
            session(w1, third, [d0, d1, d2, d3], claimed)
        }
        _ => session(first, w1, third, len),
    }
}

/// `second` and `third` are the words after the message's type; lengths as in connections.md section 3.
#[inline(always)]
fn session(kind: [u8; 4], second: [u8; 4], third: [u8; 4], len: usize) -> Option<SessionKey> {
    let receiver = match (u32::from_le_bytes(kind), len) {
        (2, 92..) => third,
        (3, 64..) | (4, 32..) => second,
        _ => return None,
    };
    Some(SessionKey { connection: u32::from_le_bytes(receiver) >> 8 })
}

/// The tunnel address that an IP packet on its way into the TUN goes to; `None` if it is no IP packet.
///
/// The kernel has routed it, so the header adds up; options and extension headers do not matter.
#[inline(always)]
#[must_use]
pub fn tunnel_of(packet: &(impl Bytes + ?Sized)) -> Option<TunnelKey> {
    // The whole IPv4 header, or half of the IPv6 header.
    let [first, .., a, b, c, d] = packet.read::<20>(0)?;
    match first >> 4 {
        4 => Some(TunnelKey::v4([a, b, c, d])),
        6 => packet.read::<16>(24).map(TunnelKey::v6),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{PayloadKind, classify, classify::receiver_index, frame_table, steer_table};

    #[test]
    fn datagrams_go_where_the_table_says() {
        for sample in steer_table::datagrams() {
            let found = session_of(&*sample.bytes, 0).map(|key| key.connection);
            assert_eq!(found, sample.connection, "{}", sample.name);
        }
    }

    #[test]
    fn packets_go_where_the_table_says() {
        for sample in steer_table::packets() {
            assert_eq!(tunnel_of(&*sample.bytes), sample.tunnel, "{}", sample.name);
        }
    }

    #[test]
    fn no_cut_of_a_sample_panics_or_finds_another_owner() {
        for sample in steer_table::datagrams() {
            for cut in 0..sample.bytes.len() {
                let found = session_of(&sample.bytes[..cut], 0).map(|key| key.connection);
                assert!(found.is_none() || found == sample.connection, "{} cut to {cut}", sample.name);
            }
        }
        for sample in steer_table::packets() {
            for cut in 0..sample.bytes.len() {
                let found = tunnel_of(&sample.bytes[..cut]);
                assert!(found.is_none() || found == sample.tunnel, "{} cut to {cut}", sample.name);
            }
        }
    }

    #[test]
    fn an_index_that_the_worker_finds_is_found_here_too() {
        let mut found = 0;
        let tables = frame_table::all().into_iter().filter_map(|sample| sample.payload);
        for payload in tables.chain(steer_table::datagrams().into_iter().map(|sample| sample.bytes)) {
            for channel in [None, Some(0x4001)] {
                let mut datagram = std::vec::Vec::new();
                datagram.extend(
                    channel
                        .and_then(|number| channel_data::header(number, payload.len()))
                        .into_iter()
                        .flatten(),
                );
                datagram.extend(&payload);
                let worker = by_worker(&datagram);
                if let Some(receiver) = worker {
                    found += 1;
                    let here = session_of(&*datagram, 0).map(|key| key.connection);
                    assert_eq!(here, Some(receiver >> 8), "{datagram:02x?}");
                }
            }
        }
        assert!(found > 10, "the tables lack messages with an index");
    }

    fn by_worker(datagram: &[u8]) -> Option<u32> {
        match classify(datagram) {
            PayloadKind::ChannelData => {
                let inner = channel_data::parse(datagram)?.payload;
                receiver_index(classify(inner), inner)
            }
            kind => receiver_index(kind, datagram),
        }
    }
}
