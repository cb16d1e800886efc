//! Recorded portal sessions of both generations, replayed through parser, session and encoder.

use base64::{Engine, engine::general_purpose::STANDARD};
use gateway_proto::{
    ids::ClientId,
    portal::{
        Generation, Parsed, egress,
        login_url::LoginUrl,
        messages::{Egress, Ingress},
        phoenix::{self, Frame, Status},
    },
};
use serde_json::Value;

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
