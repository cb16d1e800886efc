//! First look at a UDP payload: which protocol it claims to be (connections.md section 3).
//!
//! It reads eight bytes and the length; nothing is verified here. The kernel plane and the workers run this very
//! code: both fill a [`Prefix`], which is all that the answer depends on.

use crate::bytes::Bytes;
use crate::channel_data;

/// What a UDP payload claims to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PayloadKind {
    /// STUN or TURN: magic cookie and length add up (RFC 8489 section 5).
    Stun,
    /// ChannelData with an exact length.
    ChannelData,
    /// WireGuard handshake initiation, 148 bytes.
    HandshakeInitiation,
    /// WireGuard handshake response, 92 bytes.
    HandshakeResponse,
    /// WireGuard cookie reply, 64 bytes.
    CookieReply,
    /// WireGuard data, at least 32 bytes.
    Data,
    /// First byte in the ChannelData range, but the length does not match.
    MalformedChannelData,
    /// The first four bytes of a WireGuard message, with a length that no such message has.
    MalformedWireGuard,
    /// No bytes at all.
    Empty,
    /// Anything else.
    Unknown,
}

/// The value of bytes 4..8 of a STUN message (RFC 8489 section 5).
pub const STUN_MAGIC: [u8; 4] = 0x2112_A442_u32.to_be_bytes();

/// What [`classify_prefix`] looks at: the first eight bytes of a UDP payload and its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefix {
    /// Bytes 0..8 of the payload. Of a payload shorter than eight bytes only the first four, or the first one if it is
    /// shorter than four, need be there; the rest is not looked at.
    pub head: [u8; 8],
    /// Length of the whole payload in bytes.
    pub len: usize,
}

impl Prefix {
    /// The prefix of the `len` bytes at `at`; `None` if they are not all there to be read.
    ///
    /// Reads 8, 4 or 1 bytes in one piece, which is what the BPF verifier can follow.
    #[inline(always)]
    #[must_use]
    pub fn read(bytes: &(impl Bytes + ?Sized), at: usize, len: usize) -> Option<Self> {
        let mut head = [0; 8];
        match len {
            8.. => head = bytes.read::<8>(at)?,
            4.. => {
                let [a, b, c, d] = bytes.read::<4>(at)?;
                head = [a, b, c, d, 0, 0, 0, 0];
            }
            1.. => head[0] = bytes.read::<1>(at)?[0],
            0 => {}
        }
        Some(Self { head, len })
    }
}

/// Classifies one UDP payload.
#[inline]
#[must_use]
pub fn classify(payload: &[u8]) -> PayloadKind {
    // A slice has all of its bytes, so the prefix is always there.
    Prefix::read(payload, 0, payload.len()).map_or(PayloadKind::Empty, |prefix| classify_prefix(&prefix))
}

/// Classifies one UDP payload by its prefix; the same answer as [`classify`] for the whole payload.
#[inline(always)]
#[must_use]
pub fn classify_prefix(prefix: &Prefix) -> PayloadKind {
    if prefix.len == 0 {
        return PayloadKind::Empty;
    }
    match prefix.head[0] {
        // A WireGuard type is followed by three zero bytes; type 1 shares its first byte with STUN
        // methods, so the cookie decides first.
        0..=3 if is_stun(prefix) => PayloadKind::Stun,
        1..=4 => wireguard(prefix),
        64..=127 if is_channel_data(prefix) => PayloadKind::ChannelData,
        64..=127 => PayloadKind::MalformedChannelData,
        _ => PayloadKind::Unknown,
    }
}

#[inline(always)]
fn is_stun(prefix: &Prefix) -> bool {
    let [_, _, l0, l1, m0, m1, m2, m3] = prefix.head;
    let length = usize::from(u16::from_be_bytes([l0, l1]));
    [m0, m1, m2, m3] == STUN_MAGIC && length.is_multiple_of(4) && length + 20 == prefix.len
}

#[inline(always)]
fn is_channel_data(prefix: &Prefix) -> bool {
    let [_, _, l0, l1, ..] = prefix.head;
    usize::from(u16::from_be_bytes([l0, l1])) + channel_data::HEADER_LEN == prefix.len
}

#[inline(always)]
fn wireguard(prefix: &Prefix) -> PayloadKind {
    let [a, b, c, d, ..] = prefix.head;
    match (u32::from_le_bytes([a, b, c, d]), prefix.len) {
        (_, ..4) => PayloadKind::Unknown,
        (1, 148) => PayloadKind::HandshakeInitiation,
        (2, 92) => PayloadKind::HandshakeResponse,
        (3, 64) => PayloadKind::CookieReply,
        (4, 32..) => PayloadKind::Data,
        (1..=4, _) => PayloadKind::MalformedWireGuard,
        _ => PayloadKind::Unknown,
    }
}

/// The receiver index (host order) of a WireGuard response, cookie reply or data message.
#[inline]
#[must_use]
pub fn receiver_index(kind: PayloadKind, payload: &[u8]) -> Option<u32> {
    let at = match kind {
        PayloadKind::HandshakeResponse => 8,
        PayloadKind::CookieReply | PayloadKind::Data => 4,
        _ => return None,
    };
    payload.get(at..at + 4).and_then(|b| b.first_chunk::<4>()).map(|b| u32::from_le_bytes(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wireguard_messages_have_exact_sizes() {
        let table = [
            (1, 148, PayloadKind::HandshakeInitiation),
            (1, 147, PayloadKind::MalformedWireGuard),
            (2, 92, PayloadKind::HandshakeResponse),
            (2, 93, PayloadKind::MalformedWireGuard),
            (3, 64, PayloadKind::CookieReply),
            (4, 31, PayloadKind::MalformedWireGuard),
            (4, 32, PayloadKind::Data),
            (4, 200, PayloadKind::Data),
            (5, 64, PayloadKind::Unknown),
            (1, 3, PayloadKind::Unknown),
        ];
        for (kind, len, expect) in table {
            assert_eq!(classify(&wg(kind)[..len]), expect, "type {kind}, {len} bytes");
        }
    }

    #[test]
    fn stun_needs_cookie_and_length() {
        let mut m = [0u8; 28];
        m[0..4].copy_from_slice(&[0, 1, 0, 8]);
        m[4..8].copy_from_slice(&STUN_MAGIC);
        assert_eq!(classify(&m), PayloadKind::Stun);
        assert_eq!(classify(&m[..24]), PayloadKind::Unknown);
        m[3] = 7;
        assert_eq!(classify(&m), PayloadKind::Unknown);
    }

    #[test]
    fn receiver_index_is_little_endian() {
        let mut m = wg(4);
        m[4..8].copy_from_slice(&[1, 0x25, 0x4c, 0x6c]);
        assert_eq!(receiver_index(PayloadKind::Data, &m), Some(0x6c4c_2501));
        assert_eq!(receiver_index(PayloadKind::Stun, &m), None);
    }

    #[test]
    fn channel_data_agrees_with_its_parser() {
        let mut bytes = [0; 40];
        for first in 0..=255 {
            for len in 0..bytes.len() {
                for claimed in 0..40 {
                    bytes[0] = first;
                    bytes[3] = claimed;
                    let payload = &bytes[..len];
                    let parsed = channel_data::parse(payload).is_some();
                    assert_eq!(classify(payload) == PayloadKind::ChannelData, parsed, "{payload:02x?}");
                }
            }
        }
    }

    #[test]
    fn bytes_beyond_a_short_payload_do_not_matter() {
        for first in 0..=255 {
            for len in 0..8 {
                let clean = classify(&[first, 0, 0, 0, 0, 0, 0, 0][..len]);
                let mut head = [0xff; 8];
                head[..len].copy_from_slice(&[first, 0, 0, 0, 0, 0, 0, 0][..len]);
                assert_eq!(classify_prefix(&Prefix { head, len }), clean, "first byte {first}, {len} bytes");
            }
        }
    }

    fn wg(kind: u8) -> [u8; 200] {
        let mut b = [0; 200];
        b[0] = kind;
        b
    }
}
