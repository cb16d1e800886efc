//! Round-trip times and the choice among relays (connections.md sections 8.1 and 9). Pure arithmetic.

use std::time::Duration;

/// An exponential average with weight 1/8 for each new sample; the first counts whole.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Rtt(Option<Duration>);

impl Rtt {
    pub(super) fn sample(&mut self, sample: Duration) {
        self.0 = Some(self.0.map_or(sample, |average| (average * 7 + sample) / 8));
    }

    pub(super) fn get(self) -> Option<Duration> {
        self.0
    }
}

/// The longest round-trip time a relay may have to be chosen among these. `None` if there are none.
pub(super) fn limit(rtts: &[Duration]) -> Option<Duration> {
    const DEVIATION_FLOOR: Duration = Duration::from_millis(2);
    if rtts.len() < 3 {
        return rtts.iter().min().map(|min| *min * 3 / 2);
    }
    let middle = median(rtts.to_vec());
    let deviation = median(rtts.iter().map(|rtt| rtt.abs_diff(middle)).collect());
    Some(middle + deviation.max(DEVIATION_FLOOR) * 3)
}

/// Of an even number, the mean of the middle two. Never called with none.
fn median(mut values: Vec<Duration>) -> Duration {
    values.sort_unstable();
    let half = values.len() / 2;
    if values.len().is_multiple_of(2) { (values[half - 1] + values[half]) / 2 } else { values[half] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_sample_counts_whole_and_later_ones_an_eighth() {
        let mut rtt = Rtt::default();
        rtt.sample(Duration::from_millis(80));
        assert_eq!(rtt.get(), Some(Duration::from_millis(80)));
        rtt.sample(Duration::from_millis(160));
        assert_eq!(rtt.get(), Some(Duration::from_millis(90)));
    }

    #[test]
    fn relays_far_from_the_rest_are_not_chosen() {
        let table: [(&[u64], Option<u64>); 6] = [
            (&[], None),
            (&[10_000], Some(15_000)),
            (&[10_000, 30_000], Some(15_000)),
            (&[10_000, 12_000, 200_000], Some(18_000)),
            (&[10_000, 10_100, 10_200], Some(16_100)),
            (&[10_000, 20_000, 30_000, 40_000], Some(55_000)),
        ];
        for (rtts, expect) in table {
            let rtts: Vec<_> = rtts.iter().map(|us| Duration::from_micros(*us)).collect();
            assert_eq!(limit(&rtts), expect.map(Duration::from_micros), "{rtts:?}");
        }
    }
}
