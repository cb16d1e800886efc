//! First look at a UDP payload: which protocol it claims to be (connections.md section 3).
//!
//! It reads a few bytes and the length; nothing is verified here.

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

/// Classifies one UDP payload.
#[inline]
#[must_use]
pub fn classify(payload: &[u8]) -> PayloadKind {
    let Some(first) = payload.first() else { return PayloadKind::Empty };
    match first {
        // A WireGuard type is followed by three zero bytes; type 1 shares its first byte with STUN
        // methods, so the cookie decides first.
        0..=3 if is_stun(payload) => PayloadKind::Stun,
        1..=4 => wireguard(payload),
        64..=127 if channel_data::parse(payload).is_some() => PayloadKind::ChannelData,
        64..=127 => PayloadKind::MalformedChannelData,
        _ => PayloadKind::Unknown,
    }
}

#[inline]
fn is_stun(payload: &[u8]) -> bool {
    let Some(header) = payload.first_chunk::<20>() else { return false };
    let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
    header[4..8] == STUN_MAGIC && length.is_multiple_of(4) && length + 20 == payload.len()
}

#[inline]
fn wireguard(payload: &[u8]) -> PayloadKind {
    let Some(kind) = payload.first_chunk::<4>() else { return PayloadKind::Unknown };
    match (u32::from_le_bytes(*kind), payload.len()) {
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

    fn wg(kind: u8, len: usize) -> [u8; 200] {
        let mut b = [0; 200];
        b[0] = kind;
        let _ = len;
        b
    }

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
            assert_eq!(classify(&wg(kind, len)[..len]), expect, "type {kind}, {len} bytes");
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
        let mut m = wg(4, 32);
        m[4..8].copy_from_slice(&[1, 0x25, 0x4c, 0x6c]);
        assert_eq!(receiver_index(PayloadKind::Data, &m), Some(0x6c4c_2501));
        assert_eq!(receiver_index(PayloadKind::Stun, &m), None);
    }
}
