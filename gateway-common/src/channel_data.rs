//! ChannelData framing (RFC 8656 section 12.4; relay-dialect.md section 4).
//!
//! ```text
//! 0      2      4                         4+L
//! +------+------+-------------------------+
//! | num  |  L   | payload (L bytes)       |   big endian, UDP only, no padding
//! +------+------+-------------------------+
//! ```

/// Bytes in front of the payload.
pub const HEADER_LEN: usize = 4;
/// The channel numbers a receiver accepts (RFC 8656 section 12).
pub const NUMBERS: core::ops::RangeInclusive<u16> = 0x4000..=0x7FFF;

/// A received ChannelData message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChannelData<'a> {
    /// The channel number, within [`NUMBERS`].
    pub number: u16,
    /// What the peer sent.
    pub payload: &'a [u8],
}

/// Reads a whole datagram as ChannelData.
///
/// `None` unless the number is in [`NUMBERS`] and the length field equals the remaining bytes exactly:
/// over UDP there is no padding, and a longer datagram is not ours.
#[inline]
#[must_use]
pub fn parse(datagram: &[u8]) -> Option<ChannelData<'_>> {
    let (header, payload) = datagram.split_at_checked(HEADER_LEN)?;
    let number = u16::from_be_bytes([header[0], header[1]]);
    let length = u16::from_be_bytes([header[2], header[3]]);
    (NUMBERS.contains(&number) && usize::from(length) == payload.len())
        .then_some(ChannelData { number, payload })
}

/// The header in front of `payload_len` bytes.
///
/// `None` when the payload does not fit the 16-bit length field.
#[inline]
#[must_use]
pub fn header(number: u16, payload_len: usize) -> Option<[u8; HEADER_LEN]> {
    let length = u16::try_from(payload_len).ok()?.to_be_bytes();
    let number = number.to_be_bytes();
    Some([number[0], number[1], length[0], length[1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exact_lengths_and_legal_numbers_are_channel_data() {
        type NumberAndLength = Option<(u16, usize)>;
        let table: &[(&[u8], NumberAndLength)] = &[
            (&[0x40, 0, 0, 0], Some((0x4000, 0))),
            (&[0x40, 1, 0, 2, 7, 8], Some((0x4001, 2))),
            (&[0x7f, 0xff, 0, 1, 9], Some((0x7fff, 1))),
            (&[0x80, 0, 0, 0], None),
            (&[0x3f, 0xff, 0, 0], None),
            (&[0x40, 0, 0, 3, 7, 8], None),
            (&[0x40, 0, 0, 1, 7, 8], None),
            (&[0x40, 0, 0], None),
            (&[], None),
        ];
        for (bytes, expect) in table {
            assert_eq!(parse(bytes).map(|c| (c.number, c.payload.len())), *expect, "{bytes:02x?}");
        }
    }

    #[test]
    fn header_round_trips() {
        assert_eq!(header(0x4001, 2), Some([0x40, 1, 0, 2]));
        assert_eq!(header(0x4001, 70_000), None);
    }
}
