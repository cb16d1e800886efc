//! Tests of the spine, with values of the recordings where there are any.

use std::time::Instant;

/// Some instant to count from: the core itself never reads a clock.
#[expect(clippy::disallowed_methods, reason = "tests need one instant to count from")]
pub(crate) fn epoch() -> Instant {
    Instant::now()
}
