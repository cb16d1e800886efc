//! The portal against WebSockets that play gateway and client, on 127.0.0.1.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::http::Request;
use tokio_tungstenite::tungstenite::{Error, Message};

use super::*;

const CLIENT_KEY: &str = "MBjm42jMxgG4UeZ9HiTvaeermTeFEsludndtMLyCLxo=";
const GATEWAY_KEY: &str = "fHncahE8G9aCtMyaaswAq/SRbENRWUU3Q3DkGQA3JFk=";
const SOON: Duration = Duration::from_secs(5);

#[tokio::test]
async fn v2_the_client_is_told_only_after_the_acknowledgement() {
    let (portal, lab) = portal(Generation::Both);
    let mut gateway = join(&portal, "gateway", "v2", GATEWAY_KEY).await;
    let init = gateway.expect("init").await;
    assert_eq!(init["authorizations"], json!([]));
    assert_eq!(init["relays"][0]["username"], "2145916800:QiROe5zpklma29jrJ0UbH/Waw1A2hHE+E8TxcaUVhTs");
    let mut client = join(&portal, "client", "v2", CLIENT_KEY).await;
    let init = client.expect("init").await;
    assert_eq!(init["resources"][0]["id"], json!(lab.id));
    assert!(init["resources"][0]["sites"].is_array());

    client.say("request_authorization", json!({"resource_id": lab.id, "connected_gateway_ids": []})).await;
    let order = gateway.expect("create_authorization").await;
    assert_eq!(order["resource"], lab.for_gateway());
    assert_eq!(order["use_iceless"], json!(false));
    assert_eq!(portal.timings()[0].acknowledged, None);
    // Nothing for the client yet: the next thing it hears is the answer to its heartbeat.
    client.heartbeat().await;

    gateway.say("authorization_created", json!({"ref": order["ref"]})).await;
    let granted = client.expect("authorization_created").await;
    for shared in ["client_ice_credentials", "gateway_ice_credentials", "use_iceless"] {
        assert_eq!(granted[shared], order[shared], "{shared}");
    }
    assert_eq!(granted["preshared_key"], order["client"]["preshared_key"]);
    assert_eq!(granted["gateway_public_key"], GATEWAY_KEY);
    assert!(granted["site_id"].is_string());
    assert!(gateway.reply().await.is_ok_reply());
    assert!(portal.timings()[0].acknowledged.is_some());

    // The same reference a second time is not valid any more.
    gateway.say("authorization_created", json!({"ref": order["ref"]})).await;
    assert_eq!(gateway.reply().await.payload["response"]["reason"], "invalid_ref");

    let line = "candidate:1 1 udp 2130706175 198.51.100.2 52625 typ host";
    let client_id = &order["client"]["id"];
    gateway.say("broadcast_ice_candidates", json!({"client_ids": [client_id], "candidates": [line]})).await;
    let told = client.expect("ice_candidates").await;
    assert_eq!(told, json!({"gateway_id": granted["gateway_id"], "candidates": [line]}));
    client
        .say("new_gateway_ice_candidates", json!({"gateway_id": granted["gateway_id"], "candidates": [line]}))
        .await;
    assert_eq!(gateway.expect("ice_candidates").await, json!({"client_id": client_id, "candidates": [line]}));

    let secrets = portal.secrets();
    let kinds: std::collections::BTreeSet<_> = secrets.iter().map(|s| s.kind).collect();
    assert_eq!(
        kinds.into_iter().collect::<Vec<_>>(),
        ["ice password", "ingest token", "psk", "relay secret", "token", "turn password"]
    );
}

#[tokio::test]
async fn v1_uses_the_old_names_and_v2_paths_do_not_exist() {
    let (portal, lab) = portal(Generation::V1Only);
    assert_eq!(refused(&portal, "gateway", "v2", GATEWAY_KEY).await.0, 404);
    let mut gateway = join(&portal, "gateway", "v1", GATEWAY_KEY).await;
    gateway.expect("init").await;
    let mut client = join(&portal, "client", "v1", CLIENT_KEY).await;
    assert!(client.expect("init").await["resources"][0]["gateway_groups"].is_array());
    client.say("create_flow", json!({"resource_id": lab.id, "connected_gateway_ids": []})).await;
    let order = gateway.expect("authorize_flow").await;
    gateway.say("authorization_created", json!({"ref": order["ref"]})).await;
    assert_eq!(gateway.reply().await.payload["response"]["reason"], "unknown_message");
    gateway.say("no_relays", json!({})).await;
    assert_eq!(gateway.reply().await.payload["response"]["reason"], "unknown_message");
    gateway.say("flow_authorized", json!({"ref": order["ref"]})).await;
    let granted = client.expect("flow_created").await;
    assert_eq!(gateway.reply().await.payload["response"], json!({}));
    client
        .say("broadcast_ice_candidates", json!({"gateway_ids": [granted["gateway_id"]], "candidates": ["x"]}))
        .await;
    assert_eq!(gateway.expect("ice_candidates").await["candidates"], json!(["x"]));
}

#[tokio::test]
async fn connects_that_must_fail_get_their_problem() {
    let (portal, _) = portal(Generation::Both);
    portal.refuse_next(Role::Gateway, &Refusal::busy(2), 1);
    let (status, body, retry_after) = refused(&portal, "gateway", "v2", GATEWAY_KEY).await;
    assert_eq!((status, body["code"].as_str(), retry_after.as_deref()), (503, Some("rate_limit"), Some("2")));
    let (status, body, _) = refused(&portal, "gateway", "v2", "short").await;
    assert_eq!((status, body["code"].as_str()), (400, Some("invalid_connect_params")));
    portal.configure(|c| c.gateway_token = "other".into());
    let (status, body, _) = refused(&portal, "gateway", "v2", GATEWAY_KEY).await;
    assert_eq!((status, body["code"].as_str()), (401, Some("invalid_token")));
    portal.configure(|c| c.gateway_token = Config::default().gateway_token);
    let _first = join(&portal, "gateway", "v2", GATEWAY_KEY).await;
    let (status, body, _) = refused(&portal, "gateway", "v2", GATEWAY_KEY).await;
    assert_eq!((status, body["code"].as_str()), (409, Some("gateway_already_connected")));
}

#[tokio::test]
async fn a_gateway_that_does_not_acknowledge_is_offline_for_the_client() {
    let (portal, lab) = portal(Generation::Both);
    portal.configure(|c| c.acknowledge_timeout = Duration::from_millis(200));
    let _gateway = join(&portal, "gateway", "v2", GATEWAY_KEY).await;
    let mut client = join(&portal, "client", "v2", CLIENT_KEY).await;
    client.expect("init").await;
    client.say("request_authorization", json!({"resource_id": lab.id, "connected_gateway_ids": []})).await;
    let failed = client.expect("authorization_creation_failed").await;
    assert_eq!(failed, json!({"resource_id": lab.id, "reason": "offline"}));
}

#[tokio::test]
async fn authorizations_outlive_a_restart_and_rejected_ones_do_not() {
    let (mut portal, lab) = portal(Generation::Both);
    let mut gateway = join(&portal, "gateway", "v2", GATEWAY_KEY).await;
    gateway.expect("init").await;
    let mut client = join(&portal, "client", "v2", CLIENT_KEY).await;
    client.expect("init").await;
    client.say("request_authorization", json!({"resource_id": lab.id, "connected_gateway_ids": []})).await;
    let order = gateway.expect("create_authorization").await;
    gateway.say("authorization_created", json!({"ref": order["ref"]})).await;
    client.expect("authorization_created").await;

    portal.stop();
    assert!(gateway.ended().await && client.ended().await, "stop resets the sockets");
    assert!(TcpStream::connect(portal.addr()).await.is_err(), "nobody listens");
    portal.restart().unwrap();
    let mut gateway = join(&portal, "gateway", "v2", GATEWAY_KEY).await;
    let listed = gateway.expect("init").await["authorizations"].clone();
    assert_eq!(listed[0]["resource_id"], json!(lab.id));
    let id =
        portal.id_of(Role::Client, "tester-client").or_else(|| portal.id_of(Role::Client, "client")).unwrap();
    portal.reject_access(id, lab.id).unwrap();
    assert_eq!(gateway.expect("reject_access").await, json!({"client_id": id, "resource_id": lab.id}));
    portal.push_init();
    assert_eq!(gateway.expect("init").await["authorizations"], json!([]));
}

#[tokio::test]
async fn relays_are_held_back_until_the_script_says_so() {
    let (portal, _) = portal(Generation::Both);
    portal.hold_relays(true);
    let mut gateway = join(&portal, "gateway", "v2", GATEWAY_KEY).await;
    assert_eq!(gateway.expect("init").await["relays"], json!([]));
    gateway.say("no_relays", json!({})).await;
    assert_eq!(gateway.expect("relays_presence").await, json!({"disconnected_ids": [], "connected": []}));
    portal.hold_relays(false);
    assert_eq!(gateway.expect("relays_presence").await["connected"][0]["addr"], "203.0.113.2:3478");
    let other = Relay::coturn(["203.0.113.3:3478".parse().unwrap()], "south");
    let old = portal.shared.with(|s| s.config.relays[0].id);
    portal.set_relays(vec![other.clone()]);
    let presence = gateway.expect("relays_presence").await;
    assert_eq!(presence["disconnected_ids"], json!([old]));
    assert_eq!(presence["connected"][0]["id"], json!(other.id));
}

// ---- helpers ----------------------------------------------------------------------------------

fn portal(generation: Generation) -> (Portal, Resource) {
    let lab = Resource::cidr("Lab", "10.44.0.0/16");
    let relays = vec![Relay::coturn(["203.0.113.2:3478".parse().unwrap()], "north-secret")];
    let config = Config { generation, resources: vec![lab.clone()], relays, ..Config::default() };
    (Portal::start(None, config).unwrap(), lab)
}

struct Peer {
    socket: WebSocketStream<TcpStream>,
    topic: &'static str,
    next_ref: u64,
    pushes: std::collections::VecDeque<super::super::phoenix::Frame>,
    replies: std::collections::VecDeque<super::super::phoenix::Frame>,
}

fn request(portal: &Portal, topic: &str, version: &str, key: &str) -> Request<()> {
    let path = if version == "v2" { format!("{topic}/v2/websocket") } else { format!("{topic}/websocket") };
    let query: String = url::form_urlencoded::Serializer::new(String::new())
        .extend_pairs([("external_id", topic), ("name", &format!("tester-{topic}")), ("public_key", key)])
        .finish();
    let defaults = Config::default();
    let token = if topic == "gateway" { defaults.gateway_token } else { defaults.client_token };
    let mut request = Request::builder()
        .uri(format!("{}{path}?{query}", portal.url()))
        .header("Host", "portal")
        .header(
            "User-Agent",
            if topic == "gateway" {
                "Debian/12.0.0 gateway/1.6.1"
            } else {
                "Debian/12.0.0 headless-client/1.5.12"
            },
        )
        .header("Connection", "Upgrade")
        .header("Upgrade", "websocket")
        .header("Sec-WebSocket-Version", "13")
        .header("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==")
        .body(())
        .unwrap();
    request.headers_mut().insert("X-Authorization", format!("Bearer {token}").parse().unwrap());
    request
}

async fn connect(portal: &Portal, request: Request<()>) -> Result<WebSocketStream<TcpStream>, Error> {
    let stream = TcpStream::connect(portal.addr()).await.unwrap();
    Ok(tokio_tungstenite::client_async(request, stream).await?.0)
}

async fn refused(portal: &Portal, topic: &str, version: &str, key: &str) -> (u16, Value, Option<String>) {
    match connect(portal, request(portal, topic, version, key)).await {
        Err(Error::Http(response)) => {
            let retry_after = response.headers().get("Retry-After").map(|v| v.to_str().unwrap().to_owned());
            let body = response.body().as_deref().unwrap_or_default();
            (response.status().as_u16(), serde_json::from_slice(body).unwrap_or_default(), retry_after)
        }
        other => panic!("expected a refusal, got {other:?}"),
    }
}

async fn join(portal: &Portal, topic: &'static str, version: &str, key: &str) -> Peer {
    let socket = connect(portal, request(portal, topic, version, key)).await.unwrap();
    let mut peer =
        Peer { socket, topic, next_ref: 0, pushes: Default::default(), replies: Default::default() };
    peer.say("too_early", Value::Null).await;
    assert_eq!(peer.reply().await.payload["response"]["reason"], "unmatched topic");
    peer.say("phx_join", Value::Null).await;
    let reply = peer.reply().await;
    assert!(reply.is_ok_reply());
    assert_eq!(reply.payload["response"], json!({}));
    assert_eq!(reply.reference, Some(1));
    peer
}

impl Peer {
    async fn say(&mut self, event: &str, payload: Value) {
        let text = json!({ "topic": self.topic, "event": event, "payload": payload, "ref": self.next_ref })
            .to_string();
        self.next_ref += 1;
        self.socket.send(Message::text(text)).await.unwrap();
    }

    async fn heartbeat(&mut self) {
        let text = json!({ "topic": "phoenix", "event": "heartbeat", "payload": {}, "ref": self.next_ref })
            .to_string();
        self.next_ref += 1;
        self.socket.send(Message::text(text)).await.unwrap();
        assert!(self.reply().await.is_ok_reply());
        assert_eq!(self.pushes.pop_front(), None);
    }

    /// The payload of the next push, which must be this event.
    async fn expect(&mut self, event: &str) -> Value {
        while self.pushes.is_empty() {
            self.read().await;
        }
        let frame = self.pushes.pop_front().unwrap();
        assert_eq!(frame.event, event);
        assert_eq!(frame.reference, None);
        frame.payload
    }

    async fn reply(&mut self) -> super::super::phoenix::Frame {
        while self.replies.is_empty() {
            self.read().await;
        }
        self.replies.pop_front().unwrap()
    }

    async fn read(&mut self) {
        let message = tokio::time::timeout(SOON, self.socket.next()).await.expect("a message in time");
        let text = message.unwrap().unwrap().into_text().unwrap();
        let frame = super::super::phoenix::Frame::decode(text.as_str()).unwrap();
        let queue = if frame.event == "phx_reply" { &mut self.replies } else { &mut self.pushes };
        queue.push_back(frame);
    }

    async fn ended(&mut self) -> bool {
        loop {
            match tokio::time::timeout(SOON, self.socket.next()).await {
                Err(_) => return false,
                Ok(None | Some(Err(_))) => return true,
                Ok(Some(Ok(Message::Close(_)))) => return false,
                Ok(Some(Ok(_))) => {}
            }
        }
    }
}
