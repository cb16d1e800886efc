//! The Internet checksum (RFC 1071), fast enough for every byte that segmentation makes us sum. Knows no header.
//!
//! Sums are kept in memory order, which RFC 1071 section 2(B) permits: only the final 16 bits go back into the
//! packet, as bytes.

/// An unfolded sum. Sums of parts may be added as long as every part but the last has an even length.
#[inline]
pub fn sum(bytes: &[u8]) -> u64 {
    // 32-bit words into 64-bit lanes: no carries to handle, and the compiler vectorises it.
    let (words, rest) = bytes.as_chunks::<4>();
    let mut total: u64 = words.iter().map(|w| u64::from(u32::from_ne_bytes(*w))).sum();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_ne_bytes(last));
    total
}

/// The sum of one 16-bit field.
#[inline]
pub fn word(value: u16) -> u64 {
    u64::from(u16::from_ne_bytes(value.to_be_bytes()))
}

/// Folds a sum into the 16 bits it stands for, not complemented.
#[inline]
pub fn fold(sum: u64) -> [u8; 2] {
    let mut sum = (sum >> 32) + (sum & 0xffff_ffff);
    sum = (sum >> 32) + (sum & 0xffff_ffff);
    sum = (sum >> 16) + (sum & 0xffff);
    sum = (sum >> 16) + (sum & 0xffff);
    sum = (sum >> 16) + (sum & 0xffff);
    #[expect(clippy::cast_possible_truncation, reason = "folded above")]
    (sum as u16).to_ne_bytes()
}

/// The checksum field for a sum over everything else.
#[inline]
pub fn finish(sum: u64) -> [u8; 2] {
    let [a, b] = fold(sum);
    [!a, !b]
}

/// The checksum field after one 16-bit word changed from `old` to `new` (RFC 1624, equation 3).
#[inline]
pub fn replace(checksum: [u8; 2], old: [u8; 2], new: [u8; 2]) -> [u8; 2] {
    let inverted = |[a, b]: [u8; 2]| [!a, !b];
    finish([inverted(checksum), inverted(old), new].iter().map(|word| sum(word)).sum())
}

/// The checksum field after a part of what it covers changed: `old` and `new` are [`sum`]s of that part, before and
/// after (RFC 1624, equation 3, for any number of words).
///
/// The part begins at an even offset. As with [`replace`], a wrong checksum stays wrong.
#[inline]
pub fn update(checksum: [u8; 2], old: u64, new: u64) -> [u8; 2] {
    let [a, b] = checksum;
    let [c, d] = fold(old);
    finish(sum(&[!a, !b]) + sum(&[!c, !d]) + new)
}

/// The sum over the pseudo-header of `len` bytes of `protocol` between the addresses of an IP header.
///
/// `addresses` are the source and destination as they stand in the header (8 or 32 bytes).
#[inline]
pub fn pseudo_header(addresses: &[u8], protocol: u8, len: u16) -> u64 {
    sum(addresses) + word(u16::from(protocol)) + word(len)
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use super::*;

    #[test]
    fn equals_the_naive_sum_for_bytes_of_every_length() {
        let mut state = 1_u32;
        for len in 0..1500 {
            let mut bytes = Vec::new();
            bytes.resize_with(len, || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_be_bytes()[0]
            });
            if len % 3 == 0 {
                bytes.fill(0xff);
            }
            assert_eq!(finish(sum(&bytes)), naive(&bytes), "{len} bytes");
        }
    }

    #[test]
    fn parts_of_even_length_add_up() {
        let bytes: Vec<u8> = (0..=255).collect();
        for cut in (0..=254).step_by(2) {
            assert_eq!(fold(sum(&bytes[..cut]) + sum(&bytes[cut..])), fold(sum(&bytes)), "cut at {cut}");
        }
    }

    #[test]
    fn example_of_rfc_1071_section_3() {
        assert_eq!(fold(sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7])), [0xdd, 0xf2]);
    }

    #[test]
    fn largest_packet_does_not_overflow() {
        let bytes = [0xff; 65_535];
        assert_eq!(finish(sum(&bytes)), naive(&bytes));
    }

    #[test]
    fn an_odd_last_byte_is_the_high_half_of_a_word() {
        assert_eq!(finish(sum(&[0x12, 0x34, 0x56])), finish(sum(&[0x12, 0x34, 0x56, 0])));
    }

    #[test]
    fn a_replaced_word_is_as_if_the_whole_were_summed_again() {
        let mut bytes = *b"\x45\x00\x00\x20\x12\x34\x40\x00\x40\x11\x00\x00\x64\x40\x02\x02\x0a\x2c\x00\x09";
        let mut checksum = finish(sum(&bytes));
        assert_eq!(checksum, [0xb8, 0x22]);
        for word in [0x4503_u16, 0x0000, 0xffff, 0x1234, 0x4500] {
            let old = [bytes[0], bytes[1]];
            bytes[..2].copy_from_slice(&word.to_be_bytes());
            checksum = replace(checksum, old, [bytes[0], bytes[1]]);
            assert_eq!(checksum, finish(sum(&bytes)), "{word:04x}");
        }
    }

    #[test]
    fn an_updated_part_is_as_if_the_whole_were_summed_again() {
        let mut state = 7_u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        };
        for round in 0..2000_usize {
            let mut bytes: Vec<u8> = (0..40).map(|_| random()).collect();
            let before = finish(sum(&bytes));
            let part = 2 * (round % 8)..2 * (round % 8) + 4 + round % 19;
            let old = sum(&bytes[part.clone()]);
            bytes[part.clone()].fill_with(|| if round % 3 == 0 { 0xff } else { random() });
            let new = sum(&bytes[part]);
            assert_eq!(update(before, old, new), finish(sum(&bytes)), "round {round}");
            let [high, low] = before;
            assert_ne!(update([high ^ 0x10, low], old, new), finish(sum(&bytes)), "wrong stays wrong");
        }
    }

    /// RFC 1071, as plainly as possible.
    fn naive(bytes: &[u8]) -> [u8; 2] {
        let mut sum = 0_u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum >> 16) + (sum & 0xffff);
        }
        let [.., high, low] = (!sum).to_be_bytes();
        [high, low]
    }
}
