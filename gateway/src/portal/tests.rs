//! The portal task against a real WebSocket server on 127.0.0.1, and the pump over a pipe with the clock paused.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use base64::Engine as _;
use futures_util::{SinkExt as _, StreamExt as _};
use gateway_proto::portal::failure::Failure;
use serde_json::{Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, duplex},
    net::{TcpListener, TcpStream},
    time::{Instant, sleep, timeout},
};
use tokio_tungstenite::{
    WebSocketStream, accept_hdr_async,
    tungstenite::{
        Message,
        handshake::server::{Request, Response},
        protocol::{CloseFrame, Role},
    },
};

use super::{task::Link, *};

const TOKEN: &str = ".SFMyNTY.secret+token/with=signs";

#[tokio::test]
async fn joins_then_sends_what_waited_and_closes_with_1000() {
    let (listener, url) = listen().await;
    let (handle, mut events) = Client::new(config(&url)).unwrap().start();
    let (mut socket, request) = accept(&listener).await;
    assert!(request.uri().path_and_query().unwrap().as_str().starts_with(
        "/gateway/v2/websocket?external_id=bd7662a5eeb41614e720d477abfcb2272e19a8a70a93b7e3bc8560d44ad326e9&name=gw+1&"
    ));
    let header = |name: &str| request.headers()[name].to_str().unwrap().to_owned();
    assert_eq!(header("x-authorization"), format!("Bearer {TOKEN}"));
    assert_eq!(header("host"), listener.local_addr().unwrap().to_string());
    assert!(header("user-agent").contains("gateway/1.6.1 ("), "{}", header("user-agent"));

    assert_eq!(
        read(&mut socket).await,
        json!({"topic": "gateway", "event": "phx_join", "payload": null, "ref": 0})
    );
    handle.send(Egress::NoRelays);
    handle.send(Egress::NoRelays);
    assert!(
        timeout(Duration::from_millis(100), socket.next()).await.is_err(),
        "nothing before the acknowledgement"
    );
    acknowledge(&mut socket, 0).await;
    push(&mut socket, "init", json!({"interface": {"ipv4": "100.64.1.1", "ipv6": "fd00:2021:1111::1:1"}}))
        .await;
    assert_eq!(
        read(&mut socket).await,
        json!({"topic": "gateway", "event": "no_relays", "payload": {}, "ref": 1})
    );
    assert!(matches!(next(&mut events).await, Event::Connected { generation: Generation::V2 }));
    let Event::Ingress(Ingress::Init(init)) = next(&mut events).await else { panic!() };
    assert_eq!(init.interface.v4.to_string(), "100.64.1.1");

    handle.close();
    let Some(Ok(Message::Close(Some(CloseFrame { code, reason })))) = socket.next().await else { panic!() };
    assert_eq!((u16::from(code), reason.as_str()), (1000, ""), "the duplicate was not sent");
    assert!(events.recv().await.is_none());
}

#[tokio::test]
async fn a_401_is_fatal_and_tells_the_portal_s_reason_even_if_it_comes_late() {
    let (listener, url) = listen().await;
    let (_handle, mut events) = Client::new(config(&url)).unwrap().start();
    let problem =
        json!({"code": "invalid_token", "detail": "The token was revoked", "status": 401}).to_string();
    let (first, second) = problem.split_at(20);
    let mut stream = request(&listener).await.0;
    let head = format!(
        "HTTP/1.1 401 Unauthorized\r\ncontent-type: application/problem+json\r\ncontent-length: {}\r\n\r\n",
        problem.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    for part in [first, second] {
        sleep(Duration::from_millis(50)).await;
        stream.write_all(part.as_bytes()).await.unwrap();
    }
    let Event::Fatal(error) = next(&mut events).await else { panic!() };
    assert_eq!(
        error.to_string(),
        "the portal does not accept the token: HTTP 401 The token was revoked (invalid_token); check FIREZONE_TOKEN and \
         --api-url"
    );
    assert!(events.recv().await.is_none());
}

#[tokio::test]
async fn a_503_is_retried_when_the_portal_says_so() {
    let (listener, url) = listen().await;
    let (_handle, mut events) = Client::new(config(&url)).unwrap().start();
    refuse(&listener, "503 Service Unavailable\r\nretry-after: 1", "busy").await;
    let refused = Instant::now();
    let Event::Disconnected { reason, retry_in } = next(&mut events).await else { panic!() };
    assert_eq!(
        (reason.as_str(), retry_in),
        ("the portal refused the connection: HTTP 503 busy", Duration::from_secs(1))
    );
    accept(&listener).await;
    assert!(refused.elapsed() >= Duration::from_millis(950), "{:?}", refused.elapsed());
}

#[tokio::test]
async fn a_portal_without_v2_is_spoken_to_on_v1() {
    let (listener, url) = listen().await;
    let (handle, mut events) = Client::new(config(&url)).unwrap().start();
    let target = refuse(&listener, "404 Not Found", "Not Found").await;
    assert!(target.starts_with("/gateway/v2/websocket?external_id="), "no token in a v2 URL: {target}");
    let (mut socket, request) = accept(&listener).await;
    let target = request.uri().path_and_query().unwrap().as_str();
    assert!(
        target.starts_with("/gateway/websocket?token=.SFMyNTY.secret%2Btoken%2Fwith%3Dsigns&external_id="),
        "{target}"
    );
    assert_eq!(request.headers()["x-authorization"], format!("Bearer {TOKEN}"));
    join(&mut socket).await;
    assert!(matches!(next(&mut events).await, Event::Connected { generation: Generation::V1 }));
    handle.send(Egress::Authorized { reference: "r".into() });
    let sent = read(&mut socket).await;
    assert_eq!((&sent["event"], &sent["payload"]), (&json!("flow_authorized"), &json!({"ref": "r"})));

    // And it stays there after an outage.
    drop(socket);
    assert!(matches!(next(&mut events).await, Event::Disconnected { .. }));
    let (_socket, request) = accept(&listener).await;
    assert_eq!(request.uri().path(), "/gateway/websocket");
}

#[tokio::test]
async fn a_forced_endpoint_does_not_fall_back() {
    let (listener, url) = listen().await;
    let (_handle, mut events) =
        Client::new(Config { generation: Some(Generation::V2), ..config(&url) }).unwrap().start();
    refuse(&listener, "404 Not Found", "").await;
    let Event::Disconnected { reason, .. } = next(&mut events).await else { panic!() };
    assert_eq!(reason, "the portal refused the connection: HTTP 404");
}

#[tokio::test]
async fn a_page_that_echoes_the_token_does_not_reach_the_log() {
    let (listener, url) = listen().await;
    let (_handle, mut events) =
        Client::new(Config { generation: Some(Generation::V1), ..config(&url) }).unwrap().start();
    let encoded = ".SFMyNTY.secret%2Btoken%2Fwith%3Dsigns";
    refuse(&listener, "500 Oops", &format!("GET /gateway/websocket?token={encoded} and {TOKEN}")).await;
    let Event::Disconnected { reason, .. } = next(&mut events).await else { panic!() };
    assert!(reason.contains("token=[redacted] and [redacted]"), "{reason}");
}

#[tokio::test]
async fn answers_that_are_no_upgrade_are_retried() {
    for (answer, expect) in [
        ("HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n", "something else"),
        (
            "HTTP/1.1 101 Ok\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-accept: x\r\n\r\n",
            "Accept",
        ),
        ("SSH-2.0-OpenSSH_9.2\r\n\r\n", "invalid"),
        ("", "invalid"),
        ("HTTP/1.1 302 Found\r\nlocation: http://elsewhere/\r\ncontent-length: 0\r\n\r\n", "HTTP 302"),
        ("HTTP/1.1 502 Bad\r\ntransfer-encoding: chunked\r\n\r\n3\r\nbad\r\n0\r\n\r\n", "HTTP 502 bad"),
    ] {
        let (listener, url) = listen().await;
        let (_handle, mut events) = Client::new(config(&url)).unwrap().start();
        let mut stream = request(&listener).await.0;
        stream.write_all(answer.as_bytes()).await.unwrap();
        drop(stream);
        let Event::Disconnected { reason, .. } = next(&mut events).await else { panic!("{answer}") };
        assert!(reason.contains(expect), "{answer}: {reason}");
    }
}

#[tokio::test]
async fn a_closed_port_is_retried_and_a_close_ends_the_wait() {
    let (listener, url) = listen().await;
    drop(listener);
    let (handle, mut events) = Client::new(config(&url)).unwrap().start();
    let Event::Disconnected { reason, retry_in } = next(&mut events).await else { panic!() };
    assert!(reason.contains("refused") && reason.contains("127.0.0.1"), "{reason}");
    assert!(retry_in >= Duration::from_secs(1));
    let asked = Instant::now();
    handle.send(Egress::NoRelays);
    handle.close();
    assert!(events.recv().await.is_none());
    assert!(asked.elapsed() < Duration::from_millis(500));
}

#[tokio::test]
async fn a_server_s_close_is_echoed_and_followed_by_a_reconnect() {
    let (listener, url) = listen().await;
    let (_handle, mut events) = Client::new(config(&url)).unwrap().start();
    let mut socket = accept(&listener).await.0;
    join(&mut socket).await;
    assert!(matches!(next(&mut events).await, Event::Connected { .. }));
    socket.close(Some(CloseFrame { code: 1012.into(), reason: "restarting".into() })).await.unwrap();
    assert!(
        matches!(socket.next().await, Some(Ok(Message::Close(Some(frame)))) if u16::from(frame.code) == 1012)
    );
    drop(socket);
    let Event::Disconnected { reason, retry_in } = next(&mut events).await else { panic!() };
    assert_eq!(reason, "the portal closed the connection (code 1012, restarting)");
    assert!(retry_in < Duration::from_secs(1), "exponential after a join: {retry_in:?}");
    let mut socket = accept(&listener).await.0;
    join(&mut socket).await;
    assert!(matches!(next(&mut events).await, Event::Connected { .. }));
}

#[tokio::test]
async fn a_private_ca_is_trusted_only_if_named() {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = params.self_signed(&ca_key).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let issuer = rcgen::Issuer::from_params(&params, &ca_key);
    let certificate =
        rcgen::CertificateParams::new(["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            rustls_pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap(),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
    let file = tempfile::NamedTempFile::new().unwrap();
    let pem = format!(
        "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
        base64::engine::general_purpose::STANDARD.encode(ca.der())
    );
    std::fs::write(file.path(), pem).unwrap();

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("wss://localhost:{}", listener.local_addr().unwrap().port());
    let (_refusing, mut events) = Client::new(config(&url)).unwrap().start();
    assert!(acceptor.accept(listener.accept().await.unwrap().0).await.is_err());
    let Event::Disconnected { reason, .. } = next(&mut events).await else { panic!() };
    assert!(reason.contains("not trusted") && reason.contains("--ca-file"), "{reason}");
    drop(events);
    drop(_refusing);

    let ca_files = vec![CaFile { path: PathBuf::from(file.path()), named_by: "--ca-file" }];
    let (_trusting, mut events) = Client::new(Config { ca_files, ..config(&url) }).unwrap().start();
    let stream = acceptor.accept(listener.accept().await.unwrap().0).await.unwrap();
    assert_eq!(stream.get_ref().1.server_name(), Some("localhost"));
    let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
    join(&mut socket).await;
    assert!(matches!(next(&mut events).await, Event::Connected { .. }));
}

#[tokio::test(start_paused = true)]
async fn a_silent_portal_is_noticed_after_forty_seconds() {
    let (mut portal, mut link, socket, _handle, _events) = pipe().await;
    let opened = Instant::now();
    let silent = async {
        join(&mut portal).await;
        let mut heartbeats = Vec::new();
        while let Some(Ok(Message::Text(_))) = portal.next().await {
            heartbeats.push(opened.elapsed().as_secs());
        }
        heartbeats
    };
    let (failure, heartbeats) = tokio::join!(link.pump(socket, Generation::V2), silent);
    assert_eq!(failure.ok(), Some(Failure::HeartbeatsLost));
    assert_eq!(heartbeats, [10, 20, 30]);
    assert_eq!(opened.elapsed().as_secs(), 40);
}

#[tokio::test(start_paused = true)]
async fn an_unanswered_join_is_given_up_after_five_seconds() {
    let (_portal, mut link, socket, _handle, _events) = pipe().await;
    let opened = Instant::now();
    assert_eq!(link.pump(socket, Generation::V2).await.ok(), Some(Failure::JoinTimeout));
    assert_eq!(opened.elapsed().as_secs(), 5);
}

#[tokio::test(start_paused = true)]
async fn a_portal_that_stops_reading_blocks_nothing() {
    let (portal, mut link, socket, handle, _events) = pipe().await;
    let opened = Instant::now();
    let stuck = async {
        let mut portal = portal;
        join(&mut portal).await;
        // The pipe holds 4 KiB; this is far more, and nobody reads it.
        for n in 0..1000 {
            handle.send(Egress::Authorized { reference: format!("{n:0100}") });
        }
        sleep(Duration::from_secs(3600)).await;
        portal
    };
    tokio::select! {
        failure = link.pump(socket, Generation::V2) => assert_eq!(failure.ok(), Some(Failure::HeartbeatsLost)),
        _ = stuck => panic!("the pump hangs"),
    }
    assert!(opened.elapsed().as_secs() <= 41, "{:?}", opened.elapsed());
}

#[tokio::test(start_paused = true)]
async fn junk_from_the_portal_is_survived() {
    let (mut portal, mut link, socket, handle, mut events) = pipe().await;
    let script = async {
        join(&mut portal).await;
        for junk in ["", "{", "[]", r#"{"event":7}"#, r#"{"event":"init","topic":"gateway","payload":3}"#] {
            portal.send(Message::text(junk)).await.unwrap();
        }
        portal.send(Message::binary(vec![0xff; 10])).await.unwrap();
        portal.send(Message::Ping(vec![1].into())).await.unwrap();
        push(&mut portal, "relays_presence", json!({"disconnected_ids": [], "connected": []})).await;
        assert!(matches!(next(&mut events).await, Event::Connected { .. }));
        assert!(matches!(next(&mut events).await, Event::Ingress(Ingress::RelaysPresence { .. })));
        handle.close();
        while let Some(Ok(_)) = portal.next().await {}
    };
    let (end, ()) = tokio::join!(link.pump(socket, Generation::V2), script);
    assert!(end.is_err(), "ended by our own close");
}

#[tokio::test]
async fn the_portal_socket_is_marked_or_says_what_is_missing() {
    let address = SocketAddr::from(([127, 0, 0, 1], 1));
    match connect::marked_tcp_socket(address, Some(crate::data::MARK)) {
        Ok(socket) => {
            assert_eq!(socket2::SockRef::from(&socket).mark().unwrap(), 0xfd00_2021);
            assert!(socket.nodelay().unwrap());
        }
        Err(failure) => {
            assert!(failure.is_fatal());
            assert!(failure.to_string().contains("CAP_NET_ADMIN"), "{failure}");
        }
    }
}

#[tokio::test]
async fn a_token_that_cannot_be_sent_is_refused_at_start() {
    for token in ["", " \n", "tökén", "a\u{0}b"] {
        let error = Client::new(Config { token: secret(token), ..config("ws://127.0.0.1:1") })
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("FIREZONE_TOKEN"), "{error}");
        assert!(token.is_empty() || !error.contains(token), "{error}");
    }
}

#[test]
fn a_bad_ca_file_is_refused_whatever_the_url_is() {
    for url in ["ws://127.0.0.1:1", "wss://127.0.0.1:1"] {
        let ca_files = vec![CaFile { path: PathBuf::from("/nonexistent/ca.pem"), named_by: "--ca-file" }];
        let error = Client::new(Config { ca_files, ..config(url) }).err().expect("a mistake");
        assert!(format!("{error:#}").starts_with("--ca-file: cannot read /nonexistent/ca.pem"), "{error:#}");
    }
}

#[tokio::test]
async fn the_log_at_trace_shows_the_messages_and_none_of_their_secrets() {
    let sample = include_str!("../../proto/tests/samples/nov25-relayed.gateway.jsonl");
    let pushes: Vec<Value> = sample
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|line| line["dir"] == "from-portal" && line["msg"]["event"] != "phx_reply")
        .map(|mut line| line["msg"].take())
        .collect();
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_writer(move || writer.clone())
        .with_ansi(false)
        .finish();
    // The runtime of a test is this thread.
    let _guard = tracing::subscriber::set_default(subscriber);
    let (listener, url) = listen().await;
    let (handle, mut events) =
        Client::new(Config { generation: Some(Generation::V1), ..config(&url) }).unwrap().start();
    let mut socket = accept(&listener).await.0;
    join(&mut socket).await;
    assert!(matches!(next(&mut events).await, Event::Connected { .. }));
    let mut secrets = vec![TOKEN.to_owned(), ".SFMyNTY.secret%2Btoken%2Fwith%3Dsigns".to_owned()];
    for message in pushes {
        let payload = &message["payload"];
        let members = [
            &payload["client"]["preshared_key"],
            &payload["flow_logs_ingest_token"],
            &payload["client_ice_credentials"]["password"],
            &payload["gateway_ice_credentials"]["password"],
            &payload["relays"][0]["password"],
        ];
        secrets.extend(members.into_iter().filter_map(Value::as_str).map(str::to_owned));
        push(&mut socket, message["event"].as_str().unwrap(), payload.clone()).await;
        tracing::debug!(event = ?next(&mut events).await, "What main sees");
    }
    handle.send(Egress::NoRelays);
    read(&mut socket).await;
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    for shown in
        ["wire::api::recv", "wire::api::send", "authorize_flow", "no_relays", "[redacted]", "What main sees"]
    {
        assert!(log.contains(shown), "{shown} is missing in {log}");
    }
    assert_eq!(secrets.len(), 2 + 1 + 3 * 4);
    for secret in secrets {
        assert!(!log.contains(&secret), "{secret} is in {log}");
    }
}

/// What a subscriber wrote.
#[derive(Clone, Default)]
struct Log(Arc<std::sync::Mutex<Vec<u8>>>);

impl std::io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn config(url: &str) -> Config {
    let login = LoginUrl::new(url, "11111111-1111-4111-8111-111111111111", "gw 1", &[7; 32]).unwrap();
    Config {
        login,
        token: secret(&format!(" {TOKEN}\n")),
        ca_files: Vec::new(),
        max_partition_time: Duration::from_secs(3600),
        generation: None,
        version: COMPAT_VERSION.to_owned(),
        mark: false,
    }
}

fn secret(text: &str) -> Secret {
    Secret(Zeroizing::new(text.to_owned()))
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}", listener.local_addr().unwrap());
    (listener, url)
}

async fn accept(listener: &TcpListener) -> (WebSocketStream<TcpStream>, Request) {
    let (stream, _) =
        timeout(Duration::from_secs(5), listener.accept()).await.expect("a connection").unwrap();
    let mut seen = None;
    #[expect(clippy::result_large_err, reason = "the library's signature")]
    let callback = |request: &Request, response: Response| {
        seen = Some(request.clone());
        Ok(response)
    };
    let socket = accept_hdr_async(stream, callback).await.unwrap();
    (socket, seen.unwrap())
}

/// Accepts a connection and reads the request; returns its target.
async fn request(listener: &TcpListener) -> (TcpStream, String) {
    let (mut stream, _) =
        timeout(Duration::from_secs(5), listener.accept()).await.expect("a connection").unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    let target = head.split(' ').nth(1).unwrap().to_owned();
    (stream, target)
}

async fn refuse(listener: &TcpListener, status: &str, body: &str) -> String {
    let (mut stream, target) = request(listener).await;
    let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(answer.as_bytes()).await.unwrap();
    target
}

type Pipe =
    (WebSocketStream<DuplexStream>, Link, WebSocketStream<DuplexStream>, Handle, mpsc::Receiver<Event>);

/// A pump over a pipe, without HTTP: the portal's end, the pump and its socket, and what main has.
async fn pipe() -> Pipe {
    let (ours, portals) = duplex(4096);
    let portal = WebSocketStream::from_raw_socket(portals, Role::Server, None).await;
    let socket = WebSocketStream::from_raw_socket(ours, Role::Client, None).await;
    let (commands, command_queue) = mpsc::unbounded_channel();
    let (events, event_queue) = mpsc::channel(16);
    let link = Link::new(Duration::from_secs(3600), None, command_queue, events);
    (portal, link, socket, Handle { commands }, event_queue)
}

async fn join<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut WebSocketStream<S>) {
    let join = read(socket).await;
    assert_eq!(join["event"], "phx_join");
    acknowledge(socket, join["ref"].as_u64().unwrap()).await;
}

async fn acknowledge<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut WebSocketStream<S>, reference: u64) {
    let reply = json!({
        "event": "phx_reply", "topic": "gateway", "ref": reference, "payload": {"status": "ok", "response": {}},
    });
    socket.send(Message::text(reply.to_string())).await.unwrap();
}

async fn push<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut WebSocketStream<S>,
    event: &str,
    payload: Value,
) {
    let push = json!({"event": event, "topic": "gateway", "ref": null, "payload": payload});
    socket.send(Message::text(push.to_string())).await.unwrap();
}

async fn read<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut WebSocketStream<S>) -> Value {
    match socket.next().await {
        Some(Ok(Message::Text(text))) => serde_json::from_str(&text).unwrap(),
        other => panic!("expected a text frame, got {other:?}"),
    }
}

async fn next(events: &mut mpsc::Receiver<Event>) -> Event {
    timeout(Duration::from_secs(60), events.recv()).await.expect("an event in time").expect("the task lives")
}
