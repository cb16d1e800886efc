//! Recorded portal sessions of both generations, replayed through parser, session and encoder.

use std::time::Instant;

use base64::{Engine, engine::general_purpose::STANDARD};
use gateway_proto::{
    ids::ClientId,
    portal::{
        Generation, Parsed, egress,
        login_url::LoginUrl,
        messages::{Egress, Ingress},
        phoenix::{self, Frame, Status},
        session::{Session, SessionEvent},
    },
};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};

const SAMPLES: [(&str, Generation, &str); 4] = [
    ("head-direct", Generation::V2, include_str!("samples/head-direct.gateway.jsonl")),
    ("head-relayed", Generation::V2, include_str!("samples/head-relayed.gateway.jsonl")),
    ("head-relayed-iceless", Generation::V2, include_str!("samples/head-relayed-iceless.gateway.jsonl")),
    ("nov25-relayed", Generation::V1, include_str!("samples/nov25-relayed.gateway.jsonl")),
];

#[test]
fn every_recorded_push_parses_without_a_warning() {
    for (name, _, lines) in SAMPLES {
        let (mut inits, mut authorizations, mut candidates, mut replies) = (0, 0, 0, 0);
        for line in messages(lines, "from-portal") {
            match phoenix::decode(&line.to_string()).unwrap() {
                Frame::Reply { reference, status } => {
                    assert_eq!((reference.is_some(), status), (true, Status::Ok), "{name}");
                    replies += 1;
                }
                Frame::Push { topic, event, payload } => {
                    assert_eq!(topic, "gateway");
                    let Parsed::Message { ingress, warnings } =
                        gateway_proto::portal::parse_ingress(&event, &payload)
                    else {
                        panic!("{name}: {event} was not understood")
                    };
                    assert_eq!(warnings, Vec::<String>::new(), "{name}: {event}");
                    match ingress {
                        Ingress::Init(init) => {
                            inits += 1;
                            assert_eq!(init.interface.v4.to_string(), "100.64.1.1");
                            assert_eq!(init.relays.len(), 1);
                            assert_eq!(init.authorizations.as_deref(), Some(&[][..]));
                            assert_eq!(init.account_slug.as_deref(), Some("interop"));
                        }
                        Ingress::Authorize(authorize) => {
                            authorizations += 1;
                            let client = &payload["client"];
                            assert_eq!(STANDARD.encode(authorize.client.public_key), client["public_key"]);
                            assert_eq!(
                                STANDARD.encode(*authorize.client.preshared_key.0),
                                client["preshared_key"]
                            );
                            assert_eq!(
                                *authorize.gateway_ice.password,
                                payload["gateway_ice_credentials"]["password"]
                            );
                            assert_eq!(
                                authorize.client_ice.username,
                                payload["client_ice_credentials"]["username"]
                            );
                            assert_eq!(authorize.expires_at.map(|at| at.0), payload["expires_at"].as_u64());
                            assert_eq!(authorize.use_iceless, name == "head-relayed-iceless");
                        }
                        Ingress::IceCandidates(_, list) => {
                            candidates += 1;
                            assert_eq!(Some(list.len()), payload["candidates"].as_array().map(Vec::len));
                        }
                        other => panic!("{name}: unexpected {other:?}"),
                    }
                }
            }
        }
        assert_eq!((inits, authorizations, candidates, replies), (1, 3, 3, 4), "{name}");
    }
}

#[test]
fn what_upstream_sent_is_what_we_send() {
    for (name, generation, lines) in SAMPLES {
        let mut compared = 0;
        for line in messages(lines, "to-portal") {
            let payload = &line["payload"];
            let reference = line["ref"].as_u64().unwrap();
            let frame = match line["event"].as_str().unwrap() {
                "phx_join" => phoenix::encode("gateway", "phx_join", &Value::Null, reference),
                // We announce no capabilities.
                "set_snownet_capabilities" => continue,
                "authorization_created" | "flow_authorized" => {
                    let message =
                        Egress::Authorized { reference: payload["ref"].as_str().unwrap().to_owned() };
                    encode(&message, generation, reference)
                }
                "broadcast_ice_candidates" => {
                    let client = ClientId(payload["client_ids"][0].as_str().unwrap().parse().unwrap());
                    let list = payload["candidates"].as_array().unwrap();
                    let list = list.iter().map(|c| c.as_str().unwrap().to_owned()).collect();
                    encode(&Egress::BroadcastIceCandidates(client, list), generation, reference)
                }
                other => panic!("{name}: {other} is not covered"),
            };
            assert_eq!(serde_json::from_str::<Value>(&frame).unwrap(), line, "{name}");
            compared += 1;
        }
        assert_eq!(compared, 7, "{name}");
    }
}

#[test]
fn the_recorded_connect_requests_are_ours() {
    for (name, generation, lines) in SAMPLES {
        let connect = messages(lines, "connect").next().unwrap();
        let query = connect["query"].as_object().unwrap();
        let key = STANDARD.decode(query["public_key"].as_str().unwrap()).unwrap().try_into().unwrap();
        let id = "11111111-1111-4111-8111-111111111111";
        let login = LoginUrl::new("ws://203.0.113.66:8081", id, "interop-gw", &key).unwrap();
        let token = query.get("token").map(|token| token.as_str().unwrap());
        let target = login.request_target(generation, token);
        let target = url::Url::parse(&format!("ws://h{target}")).unwrap();
        assert_eq!(target.path(), connect["path"], "{name}");
        let ours = target.query_pairs().map(|(k, v)| (k.into_owned(), Value::from(v.into_owned()))).collect();
        assert_eq!(*query, ours, "{name}");
    }
}

/// Damaged in its bytes, or with a member replaced by something of another type.
#[test]
fn damaged_messages_never_panic() {
    let mut rng = SmallRng::seed_from_u64(2);
    #[expect(clippy::disallowed_methods, reason = "a test needs some instant to start from")]
    let now = Instant::now();
    let (mut messages_read, mut malformed) = (0, 0);
    for (_, generation, lines) in SAMPLES {
        for line in messages(lines, "from-portal") {
            for _ in 0..200 {
                let mut session = Session::new(generation, now);
                let mut damaged = line.clone();
                replace_one(&mut damaged["payload"], &mut rng);
                session.handle_text(&damaged.to_string(), now);
                let mut bytes = line.to_string().into_bytes();
                for _ in 0..rng.random_range(1..4) {
                    let at = rng.random_range(0..bytes.len());
                    bytes[at] = rng.random();
                }
                bytes.truncate(rng.random_range(0..=bytes.len() * 2));
                session.handle_text(&String::from_utf8_lossy(&bytes), now);
                while let Some(event) = session.poll_event() {
                    match event {
                        SessionEvent::Push { parsed: Parsed::Message { .. }, .. } => messages_read += 1,
                        SessionEvent::Push { parsed: Parsed::Malformed(_), .. } => malformed += 1,
                        _ => {}
                    }
                }
            }
        }
    }
    // Both outcomes are met often, or the damage is not what it should be.
    assert!(messages_read > 1000 && malformed > 500, "{messages_read} {malformed}");
}

/// Walks down a random path and replaces what is there.
fn replace_one(value: &mut Value, rng: &mut SmallRng) {
    let deeper = rng.random_bool(0.8);
    match value {
        Value::Object(members) if deeper && !members.is_empty() => {
            let at = rng.random_range(0..members.len());
            replace_one(members.values_mut().nth(at).expect("the index is in range"), rng);
        }
        Value::Array(values) if deeper && !values.is_empty() => {
            let at = rng.random_range(0..values.len());
            replace_one(&mut values[at], rng);
        }
        other => {
            let odd = [
                json!(null),
                json!(-1),
                json!(1e300),
                json!(""),
                json!([]),
                json!({}),
                json!(u64::MAX),
                json!("é/:"),
            ];
            *other = odd[rng.random_range(0..odd.len())].clone();
        }
    }
}

fn encode(message: &Egress, generation: Generation, reference: u64) -> String {
    let (event, payload) = egress::encode(message, generation);
    phoenix::encode("gateway", event, &payload, reference)
}

fn messages<'a>(lines: &'a str, direction: &'a str) -> impl Iterator<Item = Value> + 'a {
    lines.lines().filter_map(move |line| {
        let mut line: Value = serde_json::from_str(line).expect("each recorded line is JSON");
        (line["dir"] == direction).then(|| line["msg"].take())
    })
}
