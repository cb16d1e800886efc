//! Metrics that are sent instead of asked for: once a minute, to an OpenTelemetry collector or to standard output
//! (cli-and-service.md section 15.2).

use std::{
    io::Write as _,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result};
use opentelemetry_proto::tonic::collector::metrics::v1::{
    ExportMetricsPartialSuccess, ExportMetricsServiceResponse,
};
use prost::Message as _;
use tokio::time::{MissedTickBehavior, interval};

use super::{Exporter, Snapshot, grpc, otlp, prometheus};

/// How often, unless OTEL_METRIC_EXPORT_INTERVAL says otherwise: what OpenTelemetry does where nobody says.
const INTERVAL: Duration = Duration::from_secs(60);
const EXPORT: &str = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export";

/// Where they go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// The page of `/metrics`.
    Stdout,
    /// OTLP over gRPC, without TLS.
    Collector {
        /// Host and port.
        endpoint: String,
        /// Who we are.
        resource: Vec<(String, String)>,
    },
}

/// Sends them until the runtime ends. A collector that is away is told once, and when it is back.
pub async fn run(exporter: Arc<Exporter>, to: Destination) {
    let mut tick = interval(period(std::env::var("OTEL_METRIC_EXPORT_INTERVAL").ok().as_deref()));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut fails = false;
    loop {
        tick.tick().await;
        let Some(snapshot) = exporter.snapshot().await else { continue };
        let result = send(&snapshot, &to).await;
        match (&result, fails) {
            (Ok(()), true) => tracing::info!("Metrics reach their collector again"),
            (Err(e), false) => tracing::warn!("Metrics do not reach their collector, trying on: {e:#}"),
            (Err(e), true) => tracing::debug!("Metrics do not reach their collector: {e:#}"),
            (Ok(()), false) => {}
        }
        fails = result.is_err();
    }
}

async fn send(snapshot: &Snapshot, to: &Destination) -> Result<()> {
    match to {
        Destination::Stdout => {
            let page = prometheus::encode(snapshot.families()).unwrap_or_default();
            let mut stdout = std::io::stdout().lock();
            // Not print!, which panics where nobody reads.
            stdout.write_all(page.as_bytes()).and_then(|()| stdout.flush()).context("standard output")
        }
        Destination::Collector { endpoint, resource } => {
            let now = SystemTime::now();
            let request = otlp::request(&snapshot.families(), resource, snapshot.started, now);
            let answer = grpc::call(endpoint, EXPORT, &request.encode_to_vec()).await;
            let answer = answer.with_context(|| format!("the collector at {endpoint}"))?;
            let answer = ExportMetricsServiceResponse::decode(answer)
                .context("the collector's answer is malformed")?;
            if let Some(ExportMetricsPartialSuccess { rejected_data_points: 1.., error_message }) =
                answer.partial_success
            {
                tracing::debug!("The collector refused a part of the metrics: {error_message}");
            }
            Ok(())
        }
    }
}

/// In milliseconds; what is no number above 0 is as if it were not there.
fn period(text: Option<&str>) -> Duration {
    let given = text.and_then(|text| text.trim().parse().ok()).filter(|ms| *ms > 0);
    given.map_or(INTERVAL, Duration::from_millis)
}

/// Who we are (cli-and-service.md section 15.2): `instance` is the hashed gateway ID, and `further` is what
/// OTEL_RESOURCE_ATTRIBUTES says, `key=value` separated by commas, which wins.
pub fn resource(instance: &str, further: &str) -> Vec<(String, String)> {
    let own = [
        ("service.name", "firezone-gateway"),
        ("service.version", env!("CARGO_PKG_VERSION")),
        ("service.instance.id", instance),
        ("os.type", std::env::consts::OS),
    ];
    let given = further.split(',').filter_map(|pair| pair.split_once('='));
    let given: Vec<_> = given.map(|(key, value)| (key.trim().to_owned(), decoded(value.trim()))).collect();
    let own = own.into_iter().filter(|(key, _)| !given.iter().any(|(other, _)| other == key));
    let own = own.map(|(key, value)| (key.to_owned(), value.to_owned()));
    own.chain(given.iter().filter(|(key, _)| !key.is_empty()).cloned()).collect()
}

/// Values are percent-encoded (W3C Baggage section 3.3.1.3); what is no such byte stays as it is.
fn decoded(value: &str) -> String {
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let [first, tail @ ..] = rest {
        let byte = match (first, tail.first_chunk::<2>()) {
            (b'%', Some(digits)) => hex::decode(digits).ok().and_then(|byte| byte.first().copied()),
            _ => None,
        };
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &tail[2..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resource_attributes_of_the_environment_win() {
        let of = |further| -> Vec<String> {
            resource("id", further).into_iter().map(|(key, value)| format!("{key}={value}")).collect()
        };
        let version = concat!("service.version=", env!("CARGO_PKG_VERSION"));
        let usual = ["service.name=firezone-gateway", version, "service.instance.id=id", "os.type=linux"];
        assert_eq!(of(""), usual);
        assert_eq!(of("no pair,=x"), usual);
        assert_eq!(of("site=a%20b%2, os.type = x"), [&usual[..3], &["site=a b%2", "os.type=x"]].concat());
    }

    #[test]
    fn a_period_is_in_milliseconds() {
        let table = [(None, 60_000), (Some("500"), 500), (Some("0"), 60_000), (Some("1s"), 60_000)];
        for (text, expect) in table {
            assert_eq!(period(text), Duration::from_millis(expect), "{text:?}");
        }
    }
}
