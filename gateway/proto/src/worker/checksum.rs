//! The Internet checksum (RFC 1071), whole and incremental (RFC 1624). Knows no header.

/// The one's-complement sum of `bytes`, not yet inverted, on top of `sum`. An odd last byte is padded with zero.
pub fn sum(mut sum: u32, bytes: &[u8]) -> u32 {
    let mut words = bytes.chunks_exact(2);
    for word in &mut words {
        sum += u32::from(u16::from_be_bytes([word[0], word[1]]));
        // 2^16 words of 16 bits fit 32 bits; packets are far shorter, so one fold at the end is enough.
    }
    if let [last] = words.remainder() {
        sum += u32::from(u16::from_be_bytes([*last, 0]));
    }
    sum
}

/// The checksum field for a sum: folded and inverted.
pub fn finish(sum: u32) -> u16 {
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    !u16::try_from(folded).unwrap_or(u16::MAX)
}

/// The checksum after one 16-bit word changed from `old` to `new` (RFC 1624, equation 3).
pub fn replace(checksum: u16, old: u16, new: u16) -> u16 {
    finish(u32::from(!checksum) + u32::from(!old) + u32::from(new))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn incremental_equals_whole_for_every_changed_word() {
        let mut bytes = *b"\x45\x00\x00\x20\x12\x34\x40\x00\x40\x11\x00\x00\x64\x40\x02\x02\x0a\x2c\x00\x09";
        let mut checksum = finish(sum(0, &bytes));
        assert_eq!(checksum, 0xb822);
        for word in [0x4503_u16, 0x0000, 0xffff, 0x1234, 0x4500] {
            let old = u16::from_be_bytes([bytes[0], bytes[1]]);
            bytes[..2].copy_from_slice(&word.to_be_bytes());
            checksum = replace(checksum, old, word);
            assert_eq!(checksum, finish(sum(0, &bytes)), "{word:04x}");
        }
    }

    #[test]
    fn an_odd_last_byte_is_the_high_half_of_a_word() {
        assert_eq!(finish(sum(0, &[0x12, 0x34, 0x56])), finish(sum(0, &[0x12, 0x34, 0x56, 0])));
    }
}
