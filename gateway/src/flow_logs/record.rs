//! A record as JSON: what is spooled and uploaded of a report, and how a file of the spool vouches for it
//! (cli-and-service.md sections 14.3 and 14.4). Knows no disk.

use std::{fmt::Write as _, net::SocketAddr};

use chrono::{DateTime, SecondsFormat, Utc};
use gateway_proto::flow::{FlowReport, Outer, UnixTime};
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

/// The last second that RFC 3339 can write.
const LAST_SECOND: u64 = 253_402_300_799;

/// What is uploaded: no claims, the ingest endpoint has these from the token.
pub fn payload(report: &FlowReport) -> Value {
    let mut payload = Map::new();
    let mut put = |name: &str, value: Value| payload.insert(name.to_owned(), value);
    put("protocol", report.protocol.label().into());
    put("inner_src_ip", report.src.ip().to_string().into());
    put("inner_src_port", report.src.port().into());
    put("inner_dst_ip", report.dst.ip().to_string().into());
    put("inner_dst_port", report.dst.port().into());
    put("flow_start", time(report.start).into());
    if let Some(domain) = &report.domain {
        put("domain", domain.as_str().into());
    }
    if !report.outers.is_empty() {
        put("outers", outers(&report.outers));
    }
    if let Some(end) = &report.end {
        put("flow_end", time(end.end).into());
        put("last_packet", time(end.last_packet).into());
        put("rx_packets", end.rx_packets.into());
        put("tx_packets", end.tx_packets.into());
        put("rx_bytes", end.rx_bytes.into());
        put("tx_bytes", end.tx_bytes.into());
    }
    payload.into()
}

/// The list of ways. A source that is not known is left out, address and port together.
pub fn outers(outers: &[Outer]) -> Value {
    let outer = |outer: &Outer| {
        let mut all = json!({
            "dst_ip": outer.dst.ip().to_string(),
            "dst_port": outer.dst.port(),
            "path_activated_at": time(outer.since),
        });
        if let Some(src) = outer.src {
            all["src_ip"] = src.ip().to_string().into();
            all["src_port"] = src.port().into();
        }
        all
    };
    outers.iter().map(outer).collect()
}

/// RFC 3339, UTC, with as many digits behind the second as it takes: none, 3, 6 or 9.
pub fn time(UnixTime(time): UnixTime) -> String {
    let second = i64::try_from(time.as_secs().min(LAST_SECOND)).expect("it has 38 bits");
    let time: DateTime<Utc> = DateTime::from_timestamp(second, time.subsec_nanos())
        .expect("chrono reaches further than the year 9999");
    time.to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

/// What the names of both files of a flow begin with: when it began, so that they sort by age, and what tells it from
/// others of that second.
pub fn stem(report: &FlowReport) -> String {
    let mut hash = Sha256::new();
    hash.update(report.protocol.label());
    for end in [report.src, report.dst] {
        match end {
            SocketAddr::V4(end) => hash.update(end.ip().octets()),
            SocketAddr::V6(end) => hash.update(end.ip().octets()),
        }
        hash.update(end.port().to_be_bytes());
    }
    // Resources of one address: the same flow may be two, one after the other.
    hash.update(report.id.0.to_be_bytes());
    hash.update(report.start.0.as_nanos().to_be_bytes());
    let second = report.start.0.as_secs().min(9_999_999_999);
    hash.finalize()[..8].iter().fold(format!("{second:010}-"), |mut stem, byte| {
        write!(stem, "{byte:02x}").expect("writing to a String cannot fail");
        stem
    })
}

/// The content of a file: `payload` and the CRC-32 (IEEE) of its compact JSON with sorted members.
pub fn seal(payload: &Value) -> String {
    let compact = payload.to_string();
    format!(r#"{{"checksum":{},"payload":{compact}}}"#, crc32fast::hash(compact.as_bytes()))
}

/// The payload in a file's content, as compact JSON. `None` if it is corrupt.
pub fn unseal(content: &[u8]) -> Option<String> {
    let mut content: Value = serde_json::from_slice(content).ok()?;
    let checksum = content.get("checksum")?.as_u64()?;
    let payload = content.get_mut("payload").filter(|payload| payload.is_object())?.take().to_string();
    (checksum == u64::from(crc32fast::hash(payload.as_bytes()))).then_some(payload)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::flow_logs::testkit;

    /// test-vectors.md section 11.
    const VECTOR: &str = r#"{"checksum":3755809084,"payload":{"flow_start":"2023-11-14T22:13:20Z","inner_dst_ip":"10.0.0.5","inner_dst_port":443,"inner_src_ip":"100.64.0.1","inner_src_port":1234,"protocol":"tcp"}}"#;

    fn vector() -> FlowReport {
        let start = UnixTime(Duration::from_secs(1_700_000_000));
        FlowReport { outers: Vec::new(), start, ..testkit::report() }
    }

    #[test]
    fn a_file_is_that_of_the_test_vector() {
        assert_eq!(seal(&payload(&vector())), VECTOR);
        assert!(stem(&vector()).starts_with("1700000000-"));
        assert_eq!(unseal(VECTOR.as_bytes()).unwrap(), payload(&vector()).to_string());
    }

    #[test]
    fn a_closed_flow_has_all_that_the_ingest_schema_asks_for() {
        let mut report = testkit::ended();
        report.domain = testkit::domain("db.example.net");
        report.outers.push(Outer { src: None, ..report.outers[0] });
        let outer = json!({
            "src_ip": "198.51.100.9", "src_port": 40112, "dst_ip": "203.0.113.4", "dst_port": 52625,
            "path_activated_at": "2026-08-01T10:00:00.000000500Z",
        });
        let mut second = outer.clone();
        second.as_object_mut().unwrap().retain(|name, _| !name.starts_with("src"));
        let expect = json!({
            "protocol": "tcp", "inner_src_ip": "100.64.0.1", "inner_src_port": 1234,
            "inner_dst_ip": "10.0.0.5", "inner_dst_port": 443, "domain": "db.example.net",
            "outers": [outer, second],
            "flow_start": "2026-08-01T10:00:00.000000500Z",
            "flow_end": "2026-08-01T10:02:03Z", "last_packet": "2026-08-01T10:00:03.250Z",
            "rx_packets": 5, "tx_packets": 4, "rx_bytes": 3000, "tx_bytes": 77,
        });
        assert_eq!(payload(&report), expect);
    }

    #[test]
    fn both_halves_of_a_flow_have_one_stem_and_other_flows_another() {
        let report = testkit::report();
        assert_eq!(stem(&testkit::ended()), stem(&report));
        let digits = stem(&report).split_once('-').map(|(start, id)| (start.len(), id.len()));
        assert_eq!(digits, Some((10, 16)));
        let mut others = vec![report.clone(); 5];
        others[0].protocol = gateway_proto::flow::FlowProtocol::Udp;
        others[1].src.set_port(1);
        others[2].dst.set_ip("fd00::1".parse().unwrap());
        others[3].start.0 += Duration::from_nanos(1);
        others[4].id.0 += 1;
        let mut stems: Vec<_> = others.iter().chain([&report]).map(stem).collect();
        stems.sort();
        stems.dedup();
        assert_eq!(stems.len(), 6);
    }

    #[test]
    fn times_are_rfc_3339_however_odd_the_clock_is() {
        for (time, expect) in [
            (Duration::ZERO, "1970-01-01T00:00:00Z"),
            (Duration::new(1, 1_000_000), "1970-01-01T00:00:01.001Z"),
            (Duration::new(1, 1_000), "1970-01-01T00:00:01.000001Z"),
            (Duration::MAX, "9999-12-31T23:59:59.999999999Z"),
        ] {
            assert_eq!(super::time(UnixTime(time)), expect);
        }
        let odd = FlowReport { start: UnixTime(Duration::MAX), ..testkit::report() };
        assert!(stem(&odd).starts_with("9999999999-"));
    }

    #[test]
    fn a_corrupt_file_is_no_record() {
        let mut broken: Vec<Vec<u8>> =
            (0..VECTOR.len()).map(|len| VECTOR.as_bytes()[..len].to_vec()).collect();
        broken.extend((0..VECTOR.len()).map(|at| {
            let mut flipped = VECTOR.as_bytes().to_vec();
            flipped[at] ^= 1;
            flipped
        }));
        broken.extend(
            ["", "null", "[]", "{}", r#"{"checksum":-1,"payload":{}}"#, r#"{"checksum":"1","payload":{}}"#]
                .map(|text| text.as_bytes().to_vec()),
        );
        // The right sum of something that is no record.
        for payload in ["[1]", "null", "\"text\""] {
            let sum = crc32fast::hash(payload.as_bytes());
            broken.push(format!(r#"{{"checksum":{sum},"payload":{payload}}}"#).into_bytes());
        }
        broken.push("[".repeat(100_000).into_bytes());
        for content in broken {
            assert_eq!(unseal(&content), None, "{}", String::from_utf8_lossy(&content));
        }
    }
}
