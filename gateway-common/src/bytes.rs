//! Bounded access to bytes that may end anywhere: a slice in user space, a frame between `data` and `data_end` in XDP,
//! a packet that a helper reads in the steering programs.
//!
//! Every parser of this crate that both sides run reads through [`Bytes`]. Each read is one piece with one bounds check,
//! because that is what the BPF verifier can follow; a slice made of packet pointers is not.

/// Bytes that can be read in pieces of a fixed size.
pub trait Bytes {
    /// How many bytes there are.
    fn len(&self) -> usize;

    /// True if there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The `N` bytes from `at` on; `None` if they are not all there.
    fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]>;
}

impl Bytes for [u8] {
    #[inline]
    fn len(&self) -> usize {
        <[u8]>::len(self)
    }

    #[inline]
    fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.get(at..)?.first_chunk().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::Bytes;

    #[test]
    fn a_piece_that_is_not_all_there_is_not_read() {
        let bytes: &[u8] = &[1, 2, 3];
        assert_eq!(Bytes::read::<2>(bytes, 1), Some([2, 3]));
        assert_eq!(Bytes::read::<2>(bytes, 2), None);
        assert_eq!(Bytes::read::<0>(bytes, 3), Some([]));
        assert_eq!(Bytes::read::<1>(bytes, usize::MAX), None);
    }
}
