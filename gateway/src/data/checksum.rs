//! The Internet checksum (RFC 1071), fast enough for every byte that segmentation makes us sum.
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

/// The sum over the pseudo-header of `len` bytes of `protocol` between the addresses of an IP header.
///
/// `addresses` are the source and destination as they stand in the header (8 or 32 bytes).
#[inline]
pub fn pseudo_header(addresses: &[u8], protocol: u8, len: u16) -> u64 {
    sum(addresses) + word(u16::from(protocol)) + word(len)
}

#[cfg(test)]
mod tests {
    use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};

    use super::{super::test_packets::naive_checksum as naive, *};

    #[test]
    fn equals_the_naive_sum_for_random_bytes_of_every_length() {
        let mut rng = SmallRng::seed_from_u64(1);
        for len in 0..1500 {
            let mut bytes = vec![0u8; len];
            rng.fill(&mut bytes[..]);
            if len % 3 == 0 {
                bytes.fill(0xff);
            }
            assert_eq!(finish(sum(&bytes)), naive(&bytes).to_be_bytes(), "{len} bytes");
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
        let bytes = vec![0xff; 65_535];
        assert_eq!(finish(sum(&bytes)), naive(&bytes).to_be_bytes());
    }
}
