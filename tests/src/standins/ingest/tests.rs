//! What the endpoint takes and what it finds wrong.

use serde_json::json;

use super::*;

const ID: &str = "0d1c7a55-9b7e-4f6c-8a3e-5f1b2c3d4e5f";

fn open() -> Value {
    json!({"protocol":"tcp","inner_src_ip":"100.64.0.1","inner_src_port":1234,"inner_dst_ip":"10.0.0.5",
        "inner_dst_port":443,"flow_start":"2026-08-01T10:00:00.0000005Z"})
}

fn closed() -> Value {
    let mut record = open();
    let rest = json!({"outers":[{"dst_ip":"203.0.113.4","dst_port":52625,"path_activated_at":"2026-08-01T10:00:00Z"}],
        "last_packet":"2026-08-01T10:00:03.25Z","flow_end":"2026-08-01T10:02:03Z","rx_packets":5,"tx_packets":4,
        "rx_bytes":3000,"tx_bytes":0});
    for (name, value) in rest.as_object().unwrap() {
        record[name] = value.clone();
    }
    record
}

fn token(change: Value) -> String {
    let mut claims = json!({"exp": 4_000_000_000_u64, "uploads_enabled": true, "role": "responder",
        "policy_authorization_id": ID});
    for (name, value) in change.as_object().unwrap() {
        claims[name] = value.clone();
    }
    portal::jwt(&claims, &[7; 32])
}

fn head(token: &str) -> Head {
    parse_head(&format!(
        "POST {PATH} HTTP/1.1\r\nhost: a\r\nAuthorization: Bearer {token}\r\nContent-Type: application/json\r\n\r\n"
    ))
}

fn post(state: &mut State, answer: Answer, records: &[Value]) -> Reply {
    let body = json!({ "flow_logs": records }).to_string();
    state.handle(answer, &head(&token(json!({}))), body.as_bytes())
}

#[test]
fn a_record_is_what_the_schema_says() {
    assert_eq!(check_record(&open()), Ok(()));
    assert_eq!(check_record(&closed()), Ok(()));
    for (change, expect) in [
        (json!({"inner_src_port": 0}), "inner_src_port"),
        (json!({"inner_src_ip": "here"}), "inner_src_ip"),
        (json!({"protocol": "icmp"}), "protocol"),
        (json!({"role": "responder"}), "unknown member"),
        (json!({"outers": []}), "outers"),
        (
            json!({"outers": [{"dst_ip":"10.0.0.1","dst_port":1,"src_ip":"10.0.0.2","path_activated_at":"2026-08-01T10:00:00Z"}]}),
            "outers",
        ),
        (json!({"rx_bytes": -1}), "rx_bytes"),
        (json!({"flow_end": "2026-08-01T10:02:03+00:00"}), "flow_end"),
        (json!({"flow_end": "2026-08-01T10:00:03.2Z"}), "out of order"),
        (json!({"flow_start": "2026-08-01T10:00:00.0000000001Z"}), "flow_start"),
    ] {
        let mut record = closed();
        for (name, value) in change.as_object().unwrap() {
            record[name] = value.clone();
        }
        let said = check_record(&record).unwrap_err();
        assert!(said.contains(expect), "{change}: {said}");
    }
    for name in ["flow_end", "tx_packets", "outers", "flow_start", "protocol"] {
        let mut record = closed();
        record.as_object_mut().unwrap().remove(name);
        assert!(check_record(&record).is_err(), "without {name}");
    }
}

#[test]
fn a_request_is_refused_for_its_token_path_type_or_body() {
    let body = json!({"flow_logs": [open()]}).to_string();
    let good = head(&token(json!({})));
    for (name, head, body, status) in [
        ("as it should be", good.clone(), body.as_str(), 200),
        ("GET", Head { method: "GET".into(), ..good.clone() }, &body, 405),
        ("elsewhere", Head { target: "/api/ingestion/flow_logs".into(), ..good.clone() }, &body, 404),
        ("text", Head { content_type: Some("text/plain".into()), ..good.clone() }, &body, 415),
        ("no token", Head { authorization: None, ..good.clone() }, &body, 401),
        ("unsigned", Head { authorization: Some("Bearer a.b.c".into()), ..good.clone() }, &body, 401),
        ("expired", head(&token(json!({"exp": 1}))), &body, 401),
        ("not enabled", head(&token(json!({"uploads_enabled": false}))), &body, 401),
        ("a client's", head(&token(json!({"role": "initiator"}))), &body, 401),
        ("no array", good.clone(), r#"{"flow_logs":{}}"#, 400),
        ("nothing", good.clone(), r#"{"flow_logs":[]}"#, 400),
        ("more members", good.clone(), r#"{"flow_logs":[],"token":""}"#, 400),
        ("no JSON", good.clone(), r#"{"flow_logs":["#, 400),
        ("a bad record", good, r#"{"flow_logs":[{}]}"#, 422),
    ] {
        let mut state = State::new([7; 32]);
        let reply = state.handle(Answer::Properly, &head, body.as_bytes());
        assert_eq!(reply, Reply::Whole(status, vec![]), "{name}");
        assert_eq!(state.complaints.is_empty(), status == 200, "{name}: {:?}", state.complaints);
        assert_eq!(state.records.len(), usize::from(status == 200), "{name}");
    }
}

#[test]
fn what_it_is_told_decides_what_is_taken() {
    let late = Reply::Whole(429, vec![("retry-after", "3".to_owned())]);
    let other = Reply::Whole(302, vec![("location", OTHER_PATH.to_owned())]);
    for (answer, reply, taken) in [
        (Answer::Properly, Reply::Whole(200, vec![]), 1),
        (Answer::AtMost(2), Reply::Whole(200, vec![]), 1),
        (Answer::AtMost(1), Reply::Whole(413, vec![]), 0),
        (Answer::Later(3), late, 0),
        (Answer::Status(500), Reply::Whole(500, vec![]), 0),
        (Answer::Elsewhere, other, 0),
        (Answer::SomeInvalid, Reply::Whole(422, vec![]), 1),
        (Answer::ResetAfter, Reply::Torn, 1),
    ] {
        let mut state = State::new([7; 32]);
        assert_eq!(post(&mut state, answer, &[closed(), open()]), reply, "{answer:?}");
        assert_eq!(state.records.len(), taken, "{answer:?}");
        for (key, record) in &state.records {
            assert_eq!(key.authorization, ID);
            assert_eq!((record.opened, record.closed), (1, 1), "{answer:?}");
            // The open half came later, and takes nothing away.
            assert_eq!(record.payload, closed(), "{answer:?}");
        }
        assert!(state.complaints.is_empty(), "{answer:?}: {:?}", state.complaints);
    }
}
