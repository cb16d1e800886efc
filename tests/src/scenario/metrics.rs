//! What `/metrics` says, read by Prometheus' own parsers, against what really happened.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use opentelemetry_proto::tonic::{
    collector::metrics::v1::ExportMetricsServiceRequest,
    metrics::v1::{NumberDataPoint, metric::Data, number_data_point},
};
use prost::Message as _;
use serde_json::Value;

use super::{
    Context, Skip,
    dns::{Nameserver, ResolvConf, dig, start_with_nameserver},
    lab::{Lab, Launch, Options, curl, health, is_up, lan4, lan6},
    transfers::iperf3,
};
use crate::{
    net::{
        process::{Process, Spawn, run, wait_for},
        topology::{LAN_HOST, PORTAL},
    },
    standins::client::Path,
};

const SECOND: Duration = Duration::from_secs(1);
/// Debian's, for Debian's package of the parser is its.
pub(super) const PYTHON: &str = "/usr/bin/python3";
/// Packets that tell nothing of our doing: what the client's kernel says on its own, iperf3's words about a test.
const ASIDE: f64 = 400.0;
/// What these may weigh, in bytes each.
const PACKET: f64 = 1280.0;

/// One page.
struct Page(Vec<(String, Value, f64)>);

impl Page {
    fn scrape(cx: &Context) -> Result<Self> {
        let (program, url) = (include_str!("scrape.py"), "http://127.0.0.1:8080/metrics");
        let gateway = &cx.topology.gateway.namespace;
        // What the gateway showed less than 250 ms ago it would show again.
        std::thread::sleep(SECOND * 3 / 10);
        let json = run(gateway, 20 * SECOND, &[PYTHON, "-c", program, url])?.success()?;
        Ok(Self(serde_json::from_str(&json)?))
    }

    /// The sum of all samples of this name that have all these labels.
    fn sum(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let name = format!("firezone_gateway_{name}");
        let is_one = |(of, has, _): &&(String, Value, f64)| {
            *of == name && labels.iter().all(|(label, value)| has[*label] == *value)
        };
        let values: Vec<f64> = self.0.iter().filter(is_one).map(|(_, _, value)| *value).collect();
        ensure!(!values.is_empty(), "there is no {name} with {labels:?}");
        Ok(values.iter().sum())
    }

    fn is(&self, name: &str, labels: &[(&str, &str)], expect: f64) -> Result<()> {
        let value = self.sum(name, labels)?;
        ensure!((value - expect).abs() < 1e-9, "{name} {labels:?} is {value}, not {expect}");
        Ok(())
    }

    /// Packets and bytes of one direction.
    fn carried(&self, direction: &str, path: &str) -> Result<[f64; 2]> {
        let labels = [("direction", direction), ("path", path)];
        Ok([self.sum("tunnel_packets_total", &labels)?, self.sum("tunnel_bytes_total", &labels)?])
    }
}

/// How many packets were dropped so far, by reason, wherever that was; reasons without any are left out.
///
/// # Errors
/// If the gateway shows no metrics.
pub(super) fn drops(cx: &Context) -> Result<BTreeMap<String, u64>> {
    let mut drops = BTreeMap::new();
    for (name, labels, value) in Page::scrape(cx)?.0 {
        if name == "firezone_gateway_dropped_packets_total" && value > 0.0 {
            let reason = labels["reason"].as_str().context("a reason")?;
            // What is counted is whole.
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a count of packets")]
            let packets = value as u64;
            *drops.entry(reason.to_owned()).or_default() += packets;
        }
    }
    Ok(drops)
}

/// Skips where the parser is not installed.
pub(super) fn need_parser(cx: &Context) -> Result<()> {
    let command = [PYTHON, "-c", "import prometheus_client.openmetrics.parser"];
    let said = run(&cx.topology.gateway.namespace, 10 * SECOND, &command)?;
    said.success()
        .map_err(|_| Skip("no Prometheus parser (package python3-prometheus-client)".to_owned()))?;
    Ok(())
}

/// Ping and iperf3 both ways: packets and bytes are those that were sent, on the path that the client says it takes.
pub(super) fn agree_with_traffic(cx: &mut Context) -> Result<()> {
    need_parser(cx)?;
    let begin = Instant::now();
    let mut lab = Lab::start(cx, &Options::default())?;
    lab.connect(0, &[lan4(), lan6()])?;
    let client = &cx.topology.clients[0].namespace;
    let (path, other, connection) = match lab.clients[0].path().context("the client named no path")? {
        Path::Direct => ("direct", "relayed", "peer_to_peer"),
        Path::ToRelay => ("relayed", "direct", "relay_to_peer"),
        Path::Relayed => ("direct", "relayed", "peer_to_relay"),
        Path::RelayedToRelay => ("relayed", "direct", "relay_to_relay"),
    };
    let first = Page::scrape(cx)?;
    for (name, labels, expect) in [
        ("ready", &[][..], 1.0),
        ("condition", &[], 4.0),
        ("portal_joins_total", &[], 1.0),
        ("portal_failures_total", &[], 0.0),
        ("portal_partition_seconds", &[], 0.0),
        ("clients", &[], 1.0),
        ("worker_clients", &[], 1.0),
        ("connections", &[("path", connection)], 1.0),
        ("connections", &[], 1.0),
        ("relays", &[], 1.0),
        ("build_info", &[], 1.0),
    ] {
        first.is(name, labels, expect)?;
    }
    let rtt = first.sum("relay_rtt_seconds", &[])?;
    ensure!(rtt > 0.0 && rtt < 1.0, "{rtt} s to a relay next door");
    ensure!(first.sum("messages_total", &[("kind", "handshake")])? >= 1.0, "connected without a handshake");
    ensure!(first.sum("messages_total", &[("kind", "stun")])? >= 1.0, "connected without STUN");

    // 20 echoes of 84 bytes, and of 104 over IPv6.
    for (address, size) in [(IpAddr::V4(LAN_HOST.0), 84.0), (IpAddr::V6(LAN_HOST.1), 104.0)] {
        let before = Page::scrape(cx)?;
        let address = address.to_string();
        run(client, 10 * SECOND, &["ping", "-n", "-q", "-c", "20", "-i", "0.02", &address])?.success()?;
        let after = Page::scrape(cx)?;
        for direction in ["outbound", "inbound"] {
            let grown = grown(&before, &after, direction, path)?;
            is_within("echoes", grown[0], 20.0, 40.0)?;
            is_within("bytes of echoes", grown[1], 20.0 * size, 20.0 * size + 20.0 * PACKET)?;
        }
    }

    // UDP that leaves the client, and UDP that comes to it; what is lost behind the gateway, or before it, is not ours.
    let arguments = ["-u", "-b", "20M", "-l", "1200", "-t", "2", "-w", "2M"];
    for (address, head, reverse) in [(IpAddr::V4(LAN_HOST.0), 28.0, ""), (IpAddr::V6(LAN_HOST.1), 48.0, "-R")]
    {
        let before = Page::scrape(cx)?;
        let report = iperf3(client, address, &[&arguments[..], &[reverse]].concat())?;
        let after = Page::scrape(cx)?;
        let figure = |name: &str| report["end"]["sum"][name].as_f64().with_context(|| format!("no {name}"));
        let (sent, lost) = (figure("packets")?, figure("lost_packets")?);
        ensure!(sent > 3000.0, "iperf3 sent {sent} packets");
        let (with, against) =
            if reverse.is_empty() { ("outbound", "inbound") } else { ("inbound", "outbound") };
        let [packets, bytes] = grown(&before, &after, with, path)?;
        is_within("UDP packets", packets, sent - lost, sent + ASIDE)?;
        is_within(
            "UDP bytes",
            bytes,
            (sent - lost) * (1200.0 + head),
            sent * (1200.0 + head) + ASIDE * PACKET,
        )?;
        is_within("packets against UDP", grown(&before, &after, against, path)?[0], 1.0, ASIDE)?;
    }

    // TCP: what the receiver got passed the gateway, with its headers.
    let before = Page::scrape(cx)?;
    let report = iperf3(client, LAN_HOST.0.into(), &["-n", "20M", "-R"])?;
    let after = Page::scrape(cx)?;
    let received = report["end"]["sum_received"]["bytes"].as_f64().context("no bytes")?;
    ensure!(received > 1.9e7, "iperf3 received {received} bytes");
    let [packets, bytes] = grown(&before, &after, "inbound", path)?;
    // 40 to 80 bytes of headers for 1280 at most, and what was sent twice.
    is_within("TCP bytes", bytes, received, received * 1.2 + ASIDE * PACKET)?;
    is_within("TCP packets", packets, received / PACKET, received / 500.0)?;

    let last = Page::scrape(cx)?;
    for direction in ["outbound", "inbound"] {
        ensure!(grown(&first, &last, direction, other)?[0] < 20.0, "packets on the path that is not taken");
    }
    let share = last.sum("worker_busy_ratio", &[])?;
    let busy = last.sum("worker_busy_seconds_total", &[])?;
    // No longer than there was time, on each of 64 workers at most.
    ensure!(busy > 0.01 && busy < begin.elapsed().as_secs_f64() * 64.0, "busy for {busy} s");
    ensure!(share > 0.0, "traffic in the last 10 s, and nobody was busy");
    ensure!(last.sum("worker_turns_total", &[])? > first.sum("worker_turns_total", &[])?, "no turn was made");
    last.is("dropped_packets_total", &[("place", "tun")], 0.0)?;
    lab.finish()
}

/// What a client asks the DNS servers, and what it may not reach; then the portal goes.
pub(super) fn dns_denials_and_partition(cx: &mut Context) -> Result<()> {
    need_parser(cx)?;
    let _nameserver = Nameserver::start(cx, "names", PORTAL, "hello")?;
    let (mut lab, own) = start_with_nameserver(cx, &ResolvConf::new(cx, &[PORTAL])?)?;
    let client = &cx.topology.clients[0].namespace;
    let before = Page::scrape(cx)?;
    for _ in 0..5 {
        dig(client, own[0], &["+notcp", "_note.lan.test", "TXT"])?;
        dig(client, own[0], &["+tcp", "nobody.lan.test", "A"])?;
    }
    let after = Page::scrape(cx)?;
    let more = |name: &str, labels: &[(&str, &str)]| -> Result<f64> {
        Ok(after.sum(name, labels)? - before.sum(name, labels).unwrap_or(0.0))
    };
    for (name, labels, expect) in [
        ("dns_queries_total", &[("transport", "udp")][..], 5.0),
        ("dns_queries_total", &[("transport", "tcp")], 5.0),
        ("dns_outcomes_total", &[("outcome", "answered")], 10.0),
        ("dns_outcomes_total", &[("outcome", "failed")], 0.0),
        (
            "dns_lookup_duration_seconds_count",
            &[("purpose", "client"), ("question_type", "other"), ("response_code", "NOERROR")],
            5.0,
        ),
        (
            "dns_lookup_duration_seconds_count",
            &[("purpose", "client"), ("question_type", "A"), ("response_code", "NXDOMAIN")],
            5.0,
        ),
        // All were answered within 10 s.
        ("dns_lookup_duration_seconds_bucket", &[("le", "10.0")], 10.0),
    ] {
        let grown = more(name, labels)?;
        ensure!((grown - expect).abs() < 1e-9, "{name} {labels:?} grew by {grown}, not {expect}");
    }

    // The port of the gateway's own that no client may reach: denied, and told so.
    let refused = curl(client, &["-m", "2", &format!("http://{}:8080/metrics", own[0])])?;
    ensure!(!refused.status.success(), "a client reads the metrics through the tunnel");
    let denied = Page::scrape(cx)?;
    let drop = [("place", "worker"), ("reason", "own_address_port")];
    let grown = |name, labels| -> Result<f64> { Ok(denied.sum(name, labels)? - after.sum(name, labels)?) };
    is_within("denied packets", grown("dropped_packets_total", &drop)?, 1.0, 20.0)?;
    is_within("denials", grown("answers_total", &[("kind", "icmp_denial")])?, 1.0, 20.0)?;

    lab.portal.stop();
    wait_for("/readyz to notice", 5 * SECOND, || Ok((!is_up(cx, "portal")?).then_some(())))?;
    std::thread::sleep(2 * SECOND);
    let away = Page::scrape(cx)?;
    away.is("ready", &[], 1.0)?;
    away.is("condition", &[("condition", "portal")], 0.0)?;
    away.is("condition", &[("condition", "dns_listening")], 1.0)?;
    is_within("s of partition", away.sum("portal_partition_seconds", &[])?, 2.0, 30.0)?;
    is_within("failures", away.sum("portal_failures_total", &[])?, 1.0, 100.0)?;
    let (status, body) = health(cx, "/readyz")?;
    let body: Value = serde_json::from_str(&body)?;
    let said = body["portal_partition_seconds"].as_f64().context("no duration of the partition")?;
    is_within("s of partition in /readyz", said, 2.0, 30.0)?;
    ensure!(status == 200 && body["portal_was_reached"] == true, "{status} {body}");
    lab.finish()
}

/// To a collector that refuses the first call, and is spoken to by a gRPC library that is not ours: who we are, and the
/// figures of the page.
pub(super) fn collected(cx: &mut Context) -> Result<()> {
    let host = &cx.topology.gateway.namespace;
    let said = run(host, 10 * SECOND, &[PYTHON, "-c", "import grpc"])?;
    said.success().map_err(|_| Skip("no gRPC library (package python3-grpcio)".to_owned()))?;
    let endpoint = "127.0.0.1:4317";
    let command = [PYTHON, "-c", include_str!("collector.py"), endpoint].map(str::to_owned).to_vec();
    let collector =
        Process::spawn(host, &cx.logs, &Spawn { name: "collector", command, ..Spawn::default() })?;
    wait_for("the collector", 10 * SECOND, || Ok(collector.log().contains("listens").then_some(())))?;
    let environment = vec![
        ("FIREZONE_METRICS", "otel-collector".to_owned()),
        ("OTLP_GRPC_ENDPOINT", endpoint.to_owned()),
        ("OTEL_RESOURCE_ATTRIBUTES", "site=the%20lab".to_owned()),
        ("OTEL_METRIC_EXPORT_INTERVAL", "500".to_owned()),
    ];
    let options = Options { launch: Launch { environment, ..Launch::default() }, ..Options::default() };
    let mut lab = Lab::start(cx, &options)?;
    lab.expect_warning("Metrics do not reach their collector, trying on");
    lab.connect(0, &[lan4(), lan6()])?;
    let address = LAN_HOST.0.to_string();
    let client = &cx.topology.clients[0].namespace;
    run(client, 10 * SECOND, &["ping", "-n", "-q", "-c", "20", "-i", "0.02", &address])?.success()?;
    let is_told = |request: &ExportMetricsServiceRequest| {
        let (packets, clients) = (figure(request, "tunnel_packets"), figure(request, "clients"));
        packets.is_some_and(|packets| (40.0..200.0).contains(&packets)) && clients == Some(1.0)
    };
    let request = wait_for("the collector to hear of 20 echoes", 5 * SECOND, || {
        let log = collector.log();
        let last = log.lines().rev().find_map(|line| hex::decode(line).ok());
        let last = last.map(|message| ExportMetricsServiceRequest::decode(&*message)).transpose()?;
        Ok(last.filter(is_told))
    })?;
    let resource = request.resource_metrics[0].resource.as_ref().context("no resource")?;
    let told: Vec<_> =
        resource.attributes.iter().map(|pair| format!("{}={:?}", pair.key, pair.value)).collect();
    for expect in ["service.name=", "service.version=", "service.instance.id=", "os.type=", "site="] {
        ensure!(told.iter().any(|pair| pair.starts_with(expect)), "no {expect} in {told:?}");
    }
    ensure!(told.iter().any(|pair| pair.contains("\"the lab\"")), "{told:?}");
    let log = lab.gateway.log();
    for expect in ["status 14: not yet", "reach their collector again"] {
        ensure!(log.contains(expect), "the log does not say {expect:?}");
    }
    lab.finish()
}

/// The sum of a metric's points.
fn figure(request: &ExportMetricsServiceRequest, name: &str) -> Option<f64> {
    let name = format!("firezone_gateway_{name}");
    let scopes = request.resource_metrics.iter().flat_map(|resource| &resource.scope_metrics);
    let metric = scopes
        .flat_map(|scope| &scope.metrics)
        .find(|metric| metric.name == name && metric.unit.is_empty())?;
    let points = match metric.data.as_ref()? {
        Data::Sum(sum) => &sum.data_points,
        Data::Gauge(gauge) => &gauge.data_points,
        _ => return None,
    };
    let value = |point: &NumberDataPoint| match point.value {
        #[expect(clippy::cast_precision_loss, reason = "counts of a few seconds")]
        Some(number_data_point::Value::AsInt(value)) => value as f64,
        Some(number_data_point::Value::AsDouble(value)) => value,
        None => 0.0,
    };
    Some(points.iter().map(value).sum())
}

fn grown(before: &Page, after: &Page, direction: &str, path: &str) -> Result<[f64; 2]> {
    let (before, after) = (before.carried(direction, path)?, after.carried(direction, path)?);
    Ok([after[0] - before[0], after[1] - before[1]])
}

fn is_within(what: &str, value: f64, least: f64, most: f64) -> Result<()> {
    ensure!(value >= least && value <= most, "{what}: {value}, not from {least} to {most}");
    Ok(())
}
