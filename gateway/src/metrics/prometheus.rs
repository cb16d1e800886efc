//! The page: families in the words of OpenMetrics.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text},
    metrics::MetricType,
    registry::{self, Registry},
};

use super::family::{Family, Kind, Unit, Value};
use crate::dns::BOUNDS_MS;

/// In front of every name.
pub const PREFIX: &str = "firezone_gateway";

/// As OpenMetrics text. `None` never: strings take everything.
pub fn encode(families: Vec<Family>) -> Option<String> {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Page(families)));
    let mut page = String::with_capacity(32 << 10);
    text::encode(&mut page, &registry).ok()?;
    Some(page)
}

#[derive(Debug)]
struct Page(Vec<Family>);

impl Collector for Page {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for Family { name, help, unit, kind, samples } in &self.0 {
            let unit = match unit {
                Unit::None => None,
                Unit::Seconds => Some(registry::Unit::Seconds),
                Unit::Bytes => Some(registry::Unit::Bytes),
                Unit::Ratio => Some(registry::Unit::Other("ratio".to_owned())),
            };
            let metric_type = match kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
                Kind::Info => MetricType::Info,
                Kind::Histogram => MetricType::Histogram,
            };
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), metric_type)?;
            for sample in samples {
                match kind {
                    Kind::Info => metric.encode_info(&sample.labels)?,
                    // Without labels there would be empty braces.
                    _ if sample.labels.is_empty() => write(&mut metric, *kind, sample.value)?,
                    _ => write(&mut metric.encode_family(&sample.labels)?, *kind, sample.value)?,
                }
            }
        }
        Ok(())
    }
}

fn write(metric: &mut MetricEncoder<'_>, kind: Kind, value: Value) -> fmt::Result {
    match (kind, value) {
        (Kind::Counter, Value::Whole(value)) => metric.encode_counter::<NoLabelSet, _, u64>(&value, None),
        (Kind::Counter, Value::Real(value)) => metric.encode_counter::<NoLabelSet, _, u64>(&value, None),
        (_, Value::Whole(value)) => metric.encode_gauge(&value),
        (_, Value::Real(value)) => metric.encode_gauge(&value),
        (_, Value::Buckets(seen)) => {
            let bounds = bounds_in_seconds().chain([f64::INFINITY]);
            let buckets: Vec<_> = bounds.zip(seen.buckets).collect();
            let (sum, count) = (seen.sum.as_secs_f64(), seen.buckets.iter().sum());
            metric.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
        }
    }
}

/// The upper ends of a histogram's buckets but the last.
#[expect(clippy::cast_precision_loss, reason = "10 000 at most")]
pub fn bounds_in_seconds() -> impl Iterator<Item = f64> {
    BOUNDS_MS.iter().map(|ms| *ms as f64 / 1000.0)
}
