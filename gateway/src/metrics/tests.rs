//! A page with every metric in it: its names, its labels, and what the dashboard makes of them.

use std::collections::{BTreeMap, BTreeSet};

use gateway_common::DropReason;
use gateway_proto::{
    WorkerId,
    worker::{Traffic, Volume},
};
use opentelemetry_proto::tonic::{
    collector::metrics::v1::ExportMetricsServiceRequest,
    common::v1::{KeyValue, any_value},
    metrics::v1::{metric::Data, number_data_point},
};
use prost::Message as _;
use serde_json::Value;
use uuid::Uuid;

use super::*;
use crate::{
    data::Work,
    dns::{Kind, Purpose, Stats, Verdict},
};

/// A gateway with two workers in which everything has happened, each thing another number of times.
fn busy() -> Box<Snapshot> {
    let volume = |n: u64| Volume { packets: n, bytes: 1000 * n };
    let worker = |number: usize| WorkerState {
        id: WorkerId::new(number).unwrap(),
        traffic: Traffic {
            outbound_direct: volume(1 + number as u64),
            outbound_relayed: volume(3),
            inbound_direct: volume(4),
            inbound_relayed: volume(5),
            keepalives: 6,
            handshakes: 7,
            control: 8,
            stun: 9,
            denials: 10,
            answers: 11,
            flow_reports_lost: 28,
        },
        work: Work { busy: Duration::from_millis(1500), handed_over: 12, given: 13 },
        turns: 14,
        busy_share: 0.25,
        commands_waiting: 15,
        handover_bytes_waiting: 16,
    };
    let mut worker_drops = Counters::default();
    DropReason::ALL.iter().zip(1..).for_each(|(reason, n)| worker_drops.add(*reason, n));
    let mut kernel_drops = Counters::default();
    kernel_drops.add(DropReason::UnknownSession, 1000);
    let mut control_drops = Counters::default();
    control_drops.add(DropReason::UnmatchedStun, 17);
    let dns = Arc::<Stats>::default();
    dns.count(dns::Count::UdpQueries);
    dns.latencies.note(Purpose::Client, Kind::Aaaa, Verdict::NxDomain, Duration::from_millis(20));
    let readiness = Readiness::new(Arc::clone(&dns));
    readiness.on_portal_joined();
    readiness.on_portal_failed();
    readiness.tun.set(true);
    Box::new(Snapshot {
        started: SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000),
        workers: vec![worker(0), worker(1)],
        clients_by_worker: vec![18, 19],
        worker_drops,
        control_drops,
        status: Status { relays: 1, clients: 37, peer_to_peer: 20, ..Status::default() },
        depths: Depths { parked: 21, ..Depths::default() },
        relay_rtts: vec![(RelayId(Uuid::nil()), Duration::from_millis(35))],
        worker_events_waiting: 22,
        portal_events_waiting: 23,
        flow_logs: flow_logs::Figures {
            waiting: 24,
            lost: 25,
            no_room: 29,
            failed: 30,
            spool: Some((31, 32)),
            uploaded: 33,
            upload_fails: true,
        },
        dns,
        readiness: Arc::new(readiness),
        capabilities: Capability::ALL.iter().map(|one| (*one, true)).collect(),
        left_out: vec![("SESSIONS", 26), ("TUNNELS", 27)],
        kernel_drops,
        frames: Some(
            Outcome::ALL.iter().map(|outcome| (*outcome, FrameCount { packets: 34, bytes: 3400 })).collect(),
        ),
        fast_path: Some((
            fast::Status {
                interface: Some("eth0".to_owned()),
                mode: Some(fast::Mode::Native),
                outcome: "native".to_owned(),
                on: true,
            },
            (35, 36),
        )),
    })
}

fn page() -> String {
    prometheus::encode(busy().families()).unwrap()
}

/// Samples by name and labels.
fn samples(page: &str) -> BTreeMap<&str, &str> {
    let samples = page.lines().filter(|line| !line.starts_with('#'));
    samples.map(|line| line.rsplit_once(' ').unwrap()).collect()
}

#[test]
fn each_figure_stands_under_its_name() {
    let page = page();
    let samples = samples(&page);
    let table = [
        ("start_time_seconds", "1800000000.0"),
        ("ready", "0"),
        ("condition{condition=\"tun\"}", "1"),
        ("condition{condition=\"dns_listening\"}", "0"),
        ("portal_joins_total", "1"),
        ("portal_failures_total", "1"),
        ("clients", "37"),
        ("connections{path=\"peer_to_peer\"}", "20"),
        ("connections{path=\"relay_to_relay\"}", "0"),
        ("relays", "1"),
        ("relay_rtt_seconds{relay=\"00000000-0000-0000-0000-000000000000\"}", "0.035"),
        ("tunnel_packets_total{worker=\"1\",direction=\"outbound\",path=\"direct\"}", "2"),
        ("tunnel_packets_total{worker=\"0\",direction=\"outbound\",path=\"relayed\"}", "3"),
        ("tunnel_packets_total{worker=\"0\",direction=\"inbound\",path=\"direct\"}", "4"),
        ("tunnel_bytes_total{worker=\"0\",direction=\"inbound\",path=\"relayed\"}", "5000"),
        ("messages_total{kind=\"handshake\"}", "14"),
        ("messages_total{kind=\"keepalive\"}", "12"),
        ("messages_total{kind=\"control\"}", "16"),
        ("messages_total{kind=\"stun\"}", "18"),
        ("answers_total{kind=\"icmp_denial\"}", "20"),
        ("answers_total{kind=\"name\"}", "22"),
        ("dropped_packets_total{place=\"worker\",reason=\"unknown_payload\"}", "1"),
        ("dropped_packets_total{place=\"control\",reason=\"unmatched_stun\"}", "17"),
        ("worker_busy_ratio{worker=\"0\"}", "0.25"),
        ("worker_busy_seconds_total{worker=\"1\"}", "1.5"),
        ("worker_turns_total{worker=\"0\"}", "14"),
        ("worker_handed_over_packets_total{worker=\"0\"}", "12"),
        ("worker_moved_clients_total{worker=\"0\"}", "13"),
        ("worker_clients{worker=\"1\"}", "19"),
        ("worker_commands_waiting{worker=\"0\"}", "15"),
        ("worker_handover_waiting_bytes{worker=\"0\"}", "16"),
        ("queue_length{queue=\"authorizations_without_relay\"}", "21"),
        ("queue_length{queue=\"from_workers\"}", "22"),
        ("queue_length{queue=\"from_portal\"}", "23"),
        ("queue_length{queue=\"flow_logs\"}", "24"),
        ("flow_logs_lost_total{stage=\"writer\"}", "25"),
        ("flow_logs_lost_total{stage=\"workers\"}", "56"),
        ("flow_logs_lost_total{stage=\"spool\"}", "29"),
        ("flow_logs_lost_total{stage=\"disk\"}", "30"),
        ("flow_logs_spool_files", "31"),
        ("flow_logs_spool_bytes", "32"),
        ("flow_logs_uploaded_total", "33"),
        ("flow_logs_upload_failing", "1"),
        ("dns_queries_total{transport=\"udp\"}", "1"),
        ("dns_queries_total{transport=\"tcp\"}", "0"),
        (
            "dns_lookup_duration_seconds_count{purpose=\"client\",question_type=\"AAAA\",response_code=\"NXDOMAIN\"}",
            "1",
        ),
        ("capability_in_use{capability=\"udp-gso\"}", "1"),
        ("map_entries_left_out_total{map=\"SESSIONS\"}", "26"),
        ("map_entries_left_out_total{map=\"TUNNELS\"}", "27"),
        ("dropped_packets_total{place=\"xdp\",reason=\"unknown_session\"}", "1000"),
        ("fast_path_on{interface=\"eth0\",mode=\"native\"}", "1"),
        ("fast_path_frames_total{outcome=\"redirected\"}", "34"),
        ("fast_path_carried_frames_total{direction=\"rx\"}", "35"),
        ("fast_path_carried_frames_total{direction=\"tx\"}", "36"),
    ];
    for (name, value) in table {
        let name = format!("{}_{name}", prometheus::PREFIX);
        assert_eq!(samples.get(name.as_str()), Some(&value), "{name} in\n{page}");
    }
    let build = format!("{}_build_info{{version=\"{}\",", prometheus::PREFIX, env!("CARGO_PKG_VERSION"));
    assert!(samples.keys().any(|name| name.starts_with(&build)), "{build} in\n{page}");
}

#[test]
fn every_drop_reason_has_one_series_per_place_and_each_device_its_own() {
    let page = page();
    let samples = samples(&page);
    let drops: Vec<_> =
        samples.keys().filter(|name| name.starts_with("firezone_gateway_dropped_packets_total")).collect();
    let expect = DropReason::COUNT + 1 + gateway_common::decide::REASONS.len();
    assert_eq!(drops.len(), expect, "all of the workers', one of control's, those of the kernel");
    for (place, reason) in [("tun", "tun_write"), ("udp", "udp_send"), ("xdp", "xsk_refused")] {
        let name = format!("firezone_gateway_dropped_packets_total{{place=\"{place}\",reason=\"{reason}\"}}");
        assert!(samples.contains_key(name.as_str()), "{name}");
    }
}

#[test]
fn the_page_has_a_line_of_help_and_type_for_each_family_and_an_end() {
    let page = page();
    assert!(page.ends_with("# EOF\n"));
    let mut families = BTreeSet::new();
    for line in page.lines().filter(|line| line.starts_with("# TYPE")) {
        let family = line.split(' ').nth(2).unwrap();
        assert!(families.insert(family), "{family} twice");
        assert!(family.starts_with("firezone_gateway_") && !family.ends_with("_total"), "{family}");
        let help = page.lines().find(|line| line.starts_with(&format!("# HELP {family} "))).unwrap();
        assert!(help.ends_with('.') && !help.contains('\\'), "{help}");
        let unit =
            ["seconds", "bytes", "ratio"].into_iter().find(|unit| family.ends_with(&format!("_{unit}")));
        assert_eq!(
            unit.map(|unit| format!("# UNIT {family} {unit}")),
            page.lines().find(|line| line.starts_with(&format!("# UNIT {family} "))).map(str::to_owned)
        );
    }
    assert!(!page.contains("{}"), "no labels, no braces");
}

#[test]
fn who_asks_for_open_metrics_gets_it() {
    let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
                      application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2";
    let table = [
        (prometheus, Format::OpenMetrics),
        ("application/openmetrics-text", Format::OpenMetrics),
        ("text/plain", Format::Classic),
        ("*/*", Format::Classic),
        ("", Format::Classic),
        ("text/plain; x=application/openmetrics-text", Format::Classic),
    ];
    for (accept, format) in table {
        assert_eq!(Format::accepted(accept), format, "{accept:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn scrapes_at_the_same_time_ask_once() {
    let (exporter, mut asks) = channel();
    let answering = tokio::spawn(async move {
        let mut asked = 0;
        while let Some(reply) = asks.recv().await {
            asked += 1;
            tokio::time::sleep(Duration::from_millis(10)).await;
            reply.send(busy()).unwrap();
        }
        asked
    });
    let formats = [Format::OpenMetrics, Format::Classic];
    let pages = futures_util::future::join_all((0..20).map(|n| exporter.page(formats[n % 2]))).await;
    assert!(pages.iter().all(|page| page.as_ref().is_some_and(|page| page.len() > 1000)));
    drop(exporter);
    assert_eq!(answering.await.unwrap(), 1);
}

/// Names and labels that an expression of the dashboard uses must be on the page, and every family must be looked at.
#[test]
fn the_dashboard_shows_what_there_is() {
    let page = page();
    let dashboard: Value =
        serde_json::from_str(include_str!("../../../contrib/grafana/firezone-gateway.json")).unwrap();
    let mut expressions = Vec::new();
    collect(&dashboard, &mut expressions);
    assert!(expressions.len() > 20, "{expressions:?}");
    let samples: BTreeSet<&str> =
        samples(&page).into_keys().map(|name| name.split('{').next().unwrap()).collect();
    let labels: BTreeSet<&str> =
        page.split(['{', ',']).filter_map(|part| part.split_once("=\"")).map(|l| l.0).collect();
    let mut used = BTreeSet::new();
    for expression in &expressions {
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let names: Vec<_> = words.filter(|word| word.starts_with(prometheus::PREFIX)).collect();
        assert!(!names.is_empty(), "{expression} shows nothing of ours");
        for name in names {
            assert!(samples.contains(name), "{expression}: there is no {name}");
            used.insert(name.to_owned());
        }
        for by in expression.split("by (").skip(1).chain(expression.split("by(").skip(1)) {
            for label in by.split(')').next().unwrap_or_default().split(',').map(str::trim) {
                let known = labels.contains(label) || ["job", "instance"].contains(&label);
                assert!(known, "{expression}: there is no label {label}");
            }
        }
    }
    let families = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    for family in families {
        assert!(used.iter().any(|name| name.starts_with(family)), "no panel shows {family}");
    }
}

/// Every sample of the page is in the message, with the same number under the name that a collector makes of it.
#[test]
fn otlp_says_what_the_page_says() {
    let snapshot = busy();
    let now = snapshot.started + Duration::from_secs(60);
    let resource = vec![("service.name".to_owned(), "x".to_owned())];
    let request = otlp::request(&snapshot.families(), &resource, snapshot.started, now);
    let request = ExportMetricsServiceRequest::decode(&*request.encode_to_vec()).unwrap();
    let [resource] = &*request.resource_metrics else { panic!("one resource") };
    assert_eq!(resource.resource.as_ref().unwrap().attributes.len(), 1);
    let [scope] = &*resource.scope_metrics else { panic!("one scope") };
    let mut told = BTreeMap::new();
    for metric in &scope.metrics {
        let (points, suffix) = match metric.data.as_ref().unwrap() {
            Data::Sum(sum) => {
                assert!(sum.is_monotonic && sum.aggregation_temporality == 2, "{metric:?}");
                (&sum.data_points, "_total")
            }
            Data::Gauge(gauge) => (&gauge.data_points, ""),
            Data::Histogram(histogram) => {
                let [point] = &*histogram.data_points else { panic!("{histogram:?}") };
                assert_eq!(
                    (point.count, point.bucket_counts.len(), point.explicit_bounds.len()),
                    (1, 15, 14)
                );
                continue;
            }
            other => panic!("{other:?}"),
        };
        let unit = match &*metric.unit {
            "s" => "_seconds",
            "By" => "_bytes",
            "1" => "_ratio",
            _ => "",
        };
        for point in points {
            assert_eq!(
                (point.start_time_unix_nano, point.time_unix_nano % 1_000_000_000),
                (1_800_000_000_000_000_000, 0)
            );
            let labels: Vec<_> = point
                .attributes
                .iter()
                .map(|KeyValue { key, value, .. }| {
                    let Some(any_value::Value::StringValue(value)) = &value.as_ref().unwrap().value else {
                        panic!("{key}")
                    };
                    format!("{key}=\"{value}\"")
                })
                .collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            let value = match point.value.unwrap() {
                number_data_point::Value::AsInt(value) => value.to_string(),
                number_data_point::Value::AsDouble(value) => format!("{value:?}"),
            };
            told.insert(format!("{}{unit}{suffix}{labels}", metric.name), value);
        }
    }
    let page = page();
    let samples = samples(&page).into_iter().filter(|(name, _)| !name.contains("lookup_duration"));
    let shown: BTreeMap<_, _> = samples.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    // How long the portal has been away is of two moments.
    let differ: Vec<_> = shown.iter().filter(|(name, value)| told.get(*name) != Some(value)).collect();
    assert!(differ.iter().all(|(name, _)| name.ends_with("portal_partition_seconds")), "{differ:?}");
    assert_eq!(shown.len(), told.len());
}

fn collect(value: &Value, expressions: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::String(text) if key == "expr" => expressions.push(text.clone()),
                    other => collect(other, expressions),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| collect(value, expressions)),
        _ => {}
    }
}
