//! The 24-bit connection indices (connections.md section 10.2): unique within a process and not guessable in order.
//!
//! A linear-feedback shift register visits every non-zero 24-bit value once; a random mask hides where it stands.

use rand::{Rng, rngs::StdRng};

use crate::ids::ConnectionIndex;

/// Taps of a maximal-length 24-bit register in Galois form (connections.md section 10.2).
const POLYNOMIAL: u32 = 0x00d8_0000;

/// Hands out indices; the same one again only after 2^24 - 1 others.
#[derive(Debug)]
pub(super) struct Indices {
    state: u32,
    mask: u32,
}

impl Indices {
    /// Starts anywhere in the cycle.
    pub(super) fn new(rng: &mut StdRng) -> Self {
        // Zero is the one state the register never leaves.
        Self {
            state: rng.random_range(1..=ConnectionIndex::MAX),
            mask: rng.random_range(0..=ConnectionIndex::MAX),
        }
    }

    /// The next index that `in_use` does not name.
    pub(super) fn next(&mut self, in_use: impl Fn(ConnectionIndex) -> bool) -> ConnectionIndex {
        loop {
            self.state = step(self.state);
            let index = ConnectionIndex::new(self.state ^ self.mask).expect("state and mask have 24 bits");
            if !in_use(index) {
                return index;
            }
        }
    }
}

fn step(state: u32) -> u32 {
    let shifted = state >> 1;
    if state & 1 == 1 { shifted ^ POLYNOMIAL } else { shifted }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    #[test]
    fn every_index_comes_once_before_any_comes_twice() {
        // A register whose shortest cycle has this length has visited every non-zero state by then.
        let mut state = step(1);
        let mut steps = 1;
        while state != 1 {
            state = step(state);
            steps += 1;
        }
        assert_eq!(steps, ConnectionIndex::MAX);
    }

    #[test]
    fn an_index_in_use_is_skipped() {
        let rng = || StdRng::seed_from_u64(1);
        let taken = Indices::new(&mut rng()).next(|_| false);
        let mut indices = Indices::new(&mut rng());
        assert_ne!(indices.next(|i| i == taken), taken);
    }

    #[test]
    fn another_seed_gives_another_order() {
        let order = |seed| {
            let mut indices = Indices::new(&mut StdRng::seed_from_u64(seed));
            std::array::from_fn::<_, 4, _>(|_| indices.next(|_| false))
        };
        assert_ne!(order(1), order(2));
        assert_eq!(order(1), order(1));
    }
}
