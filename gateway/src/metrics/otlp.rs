//! The same families as one message of OTLP (opentelemetry-proto, metrics v1).
//!
//! Names are those of Prometheus without what Prometheus puts behind them (`_total`, the unit), so that a collector that
//! serves Prometheus arrives at the names of `/metrics` again. Counters are cumulative, since the start of the daemon.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use opentelemetry_proto::tonic::{
    collector::metrics::v1::ExportMetricsServiceRequest,
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value},
    metrics::v1::{
        AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint,
        ResourceMetrics, ScopeMetrics, Sum, metric::Data, number_data_point,
    },
    resource::v1::Resource,
};

use super::{
    family::{Family, Kind, Sample, Unit, Value},
    prometheus::{PREFIX, bounds_in_seconds},
};

/// The message. `resource` says who we are; `started` and `now` are of the wall clock.
pub fn request(
    families: &[Family],
    resource: &[(String, String)],
    started: SystemTime,
    now: SystemTime,
) -> ExportMetricsServiceRequest {
    let times = (nanos(started), nanos(now));
    let scope = InstrumentationScope {
        name: env!("CARGO_PKG_NAME").to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..InstrumentationScope::default()
    };
    let attributes = resource.iter().map(|(key, value)| attribute(key, value)).collect();
    ExportMetricsServiceRequest {
        resource_metrics: vec![ResourceMetrics {
            resource: Some(Resource { attributes, ..Resource::default() }),
            scope_metrics: vec![ScopeMetrics {
                scope: Some(scope),
                // A metric without points is none.
                metrics: families
                    .iter()
                    .filter(|f| !f.samples.is_empty())
                    .map(|f| metric(f, times))
                    .collect(),
                ..ScopeMetrics::default()
            }],
            ..ResourceMetrics::default()
        }],
    }
}

fn metric(family: &Family, times: (u64, u64)) -> Metric {
    let numbers = || family.samples.iter().map(|sample| number(sample, times)).collect();
    let temporality = AggregationTemporality::Cumulative.into();
    let data = match family.kind {
        Kind::Counter => Data::Sum(Sum {
            data_points: numbers(),
            aggregation_temporality: temporality,
            is_monotonic: true,
        }),
        Kind::Gauge | Kind::Info => Data::Gauge(Gauge { data_points: numbers() }),
        Kind::Histogram => Data::Histogram(Histogram {
            data_points: family.samples.iter().filter_map(|sample| histogram(sample, times)).collect(),
            aggregation_temporality: temporality,
        }),
    };
    // UCUM.
    let unit = match family.unit {
        Unit::None => "",
        Unit::Seconds => "s",
        Unit::Bytes => "By",
        Unit::Ratio => "1",
    };
    let suffix = if family.kind == Kind::Info { "_info" } else { "" };
    Metric {
        name: format!("{PREFIX}_{}{suffix}", family.name),
        description: family.help.to_owned(),
        unit: unit.to_owned(),
        data: Some(data),
        ..Metric::default()
    }
}

fn number(sample: &Sample, (started, now): (u64, u64)) -> NumberDataPoint {
    let value = match sample.value {
        Value::Whole(value) => number_data_point::Value::AsInt(i64::try_from(value).unwrap_or(i64::MAX)),
        Value::Real(value) => number_data_point::Value::AsDouble(value),
        Value::Buckets(_) => number_data_point::Value::AsInt(0),
    };
    NumberDataPoint {
        attributes: attributes(sample),
        start_time_unix_nano: started,
        time_unix_nano: now,
        value: Some(value),
        ..NumberDataPoint::default()
    }
}

fn histogram(sample: &Sample, (started, now): (u64, u64)) -> Option<HistogramDataPoint> {
    let Value::Buckets(seen) = &sample.value else { return None };
    Some(HistogramDataPoint {
        attributes: attributes(sample),
        start_time_unix_nano: started,
        time_unix_nano: now,
        count: seen.buckets.iter().sum(),
        sum: Some(seen.sum.as_secs_f64()),
        bucket_counts: seen.buckets.to_vec(),
        explicit_bounds: bounds_in_seconds().collect(),
        ..HistogramDataPoint::default()
    })
}

fn attributes(sample: &Sample) -> Vec<KeyValue> {
    sample.labels.iter().map(|(key, value)| attribute(key, value)).collect()
}

fn attribute(key: &str, value: &str) -> KeyValue {
    let value = AnyValue { value: Some(any_value::Value::StringValue(value.to_owned())) };
    KeyValue { key: key.to_owned(), value: Some(value), ..KeyValue::default() }
}

fn nanos(time: SystemTime) -> u64 {
    let since: Duration = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
