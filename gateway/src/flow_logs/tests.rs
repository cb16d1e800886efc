//! Both threads together, against an HTTPS server on 127.0.0.1; and the log lines.

use std::{
    io::Write,
    net::SocketAddr,
    sync::{Mutex, PoisonError},
};

use base64::Engine as _;
use rcgen::{CertificateParams, KeyPair};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tracing_subscriber::fmt::MakeWriter;

use super::{
    testkit::{attribution, domain, ended, id, numbered, report},
    *,
};
use crate::portal::{CaFile, client_config};

const LONG: Duration = Duration::from_secs(10);

#[tokio::test]
async fn records_get_from_the_handle_to_the_server_also_by_way_of_a_restart() {
    let place = tempfile::tempdir().unwrap();
    let server = Server::bind(place.path()).await;
    let config = || Config {
        root: place.path().join("flow_logs"),
        tls: client_config(&server.ca_files).unwrap(),
        mark: None,
        user_agent: "agent/1".to_owned(),
    };
    let mut logs = FlowLogs::start(config()).unwrap();
    logs.record(Box::new(numbered(9, report())));
    logs.token(attribution());
    logs.record(Box::new(report()));
    logs.record(Box::new(ended()));
    logs.configure(&messages::FlowLogs {
        api_url: format!("https://{}", server.addr),
        upload_interval_secs: 3600,
        upload_batch_size: 0,
    });
    let (head, records) = server.request().await;
    assert!(head.starts_with("POST /ingestion/flow_logs HTTP/1.1\r\n"), "{head}");
    assert_eq!(records, [record::payload(&ended())], "the one before the token is not kept");
    logs.record(Box::new(numbered(1, ended())));
    timeout(LONG, logs.close()).await.unwrap();

    // No portal tells anything now.
    let logs = FlowLogs::start(config()).unwrap();
    assert_eq!(server.request().await.1, [record::payload(&numbered(1, ended()))]);
    timeout(LONG, logs.close()).await.unwrap();

    let mut logs = FlowLogs::start(config()).unwrap();
    logs.configure(&messages::FlowLogs {
        upload_interval_secs: 0,
        api_url: String::new(),
        upload_batch_size: 0,
    });
    timeout(LONG, logs.close()).await.unwrap();
    let left: Vec<_> = std::fs::read_dir(config().root).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["responder"], "settings are forgotten with the uploads");
}

#[tokio::test]
async fn a_server_that_nobody_vouches_for_gets_nothing() {
    let place = tempfile::tempdir().unwrap();
    let server = Server::bind(place.path()).await;
    let (host, port) = (server.addr.ip().to_string(), server.addr.port());
    let mut tls = Tls::new(&client_config(&[]).unwrap(), None);
    let accepting = tokio::spawn(server.accept_nobody());
    let error = http::Dial::dial(&mut tls, &host, port).await.map(|_| ()).unwrap_err();
    assert!(error.starts_with("TLS with 127.0.0.1 failed: invalid peer certificate"), "{error}");
    accepting.abort();
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let error = http::Dial::dial(&mut tls, &host, nobody).await.map(|_| ()).unwrap_err();
    assert!(error.starts_with("no address of 127.0.0.1 accepts connections on port"), "{error}");
}

#[test]
fn too_many_reports_are_counted_and_a_token_still_finds_its_place() {
    let (orders, arriving) = mpsc::channel();
    let (_, writer_ended) = oneshot::channel();
    let (_, upload_ended) = oneshot::channel();
    let mut logs = FlowLogs {
        orders,
        waiting: Arc::default(),
        most: 0,
        lost: Losses::new("lost"),
        lost_before: Losses::new("lost before"),
        spool: Arc::new(Spool::new(std::path::PathBuf::new())),
        tally: Arc::default(),
        writer_ended,
        upload_ended,
    };
    let lines = logged(|| {
        for number in 0..REPORTS as u64 + 1001 {
            logs.record(Box::new(numbered(number, report())));
        }
        logs.token(attribution());
        assert_eq!(logs.lost.number, 1001);
    });
    let told: Vec<_> = lines.iter().map(|line| (&line["level"], &line["lost"])).collect();
    assert_eq!(told, [(&json!("WARN"), &json!(1)), (&json!("WARN"), &json!(1001))]);
    assert_eq!((logs.waiting.load(Ordering::Relaxed), logs.most), (REPORTS + 1, REPORTS + 1));
    assert!(matches!(arriving.try_iter().last(), Some(Order::Token(_))));
    drop(arriving);
    logs.token(attribution());
    assert_eq!(logs.lost.number, 1002);
}

#[test]
fn what_workers_lose_is_told_the_first_time_and_then_by_the_thousand() {
    let mut lost = Losses::new("lost");
    let lines = logged(|| {
        for total in [0, 0, 3, 3, 1000, 1001, 1002, 5000, 5001] {
            lost.rise_to(total, &"why");
        }
    });
    let told: Vec<_> = lines.iter().map(|line| &line["lost"]).collect();
    assert_eq!(told, [&json!(3), &json!(1001), &json!(5000), &json!(5001)]);
}

#[test]
fn a_disk_that_fails_is_told_once_and_does_not_end_the_thread() {
    let place = tempfile::tempdir().unwrap();
    let root = place.path().join("file");
    std::fs::write(&root, "in the way").unwrap();
    let (settings, wanted) = watch::channel(None);
    let waiting = Arc::new(AtomicUsize::new(3));
    let tally = Arc::<Tally>::default();
    let failures = Losses::new("Flow logs cannot be written to disk");
    let writer = Writer {
        spool: Arc::new(Spool::new(root)),
        tally: Arc::clone(&tally),
        settings,
        waiting: Arc::clone(&waiting),
        failures,
        full: Losses::new("full"),
    };
    let (orders, arriving) = mpsc::channel();
    let told = Settings { api_url: "https://a".into(), interval: 1, batch_size: 1 };
    orders.send(Order::Token(attribution())).unwrap();
    orders.send(Order::Flow(Box::new(report()))).unwrap();
    orders.send(Order::Settings(Some(told.clone()))).unwrap();
    drop(orders);
    let lines = logged(|| writer.run(&arriving));
    let warnings: Vec<_> = lines.iter().filter(|line| line["level"] == "WARN").collect();
    assert_eq!(warnings.len(), 1, "{lines:?}");
    assert!(warnings[0]["message"].as_str().unwrap().starts_with("Flow logs cannot be written to disk: /"));
    assert_eq!(waiting.load(Ordering::Relaxed), 0);
    assert!(tally.read().failed >= 2, "the token, where to upload: {tally:?}");
    assert_eq!(*wanted.borrow(), Some(told), "what is spooled elsewhere can still be uploaded");
}

#[test]
fn a_log_line_has_every_field_and_not_the_token() {
    let mut udp = ended();
    udp.protocol = gateway_proto::flow::FlowProtocol::Udp;
    let mut bare = report();
    let mut attribution = Attribution::clone(&bare.attribution);
    attribution.claims.optional = Default::default();
    bare.attribution = attribution.into();
    let mut whole = ended();
    whole.domain = domain("db.example.net");
    let mut started = udp.clone();
    started.end = None;
    let lines = logged(|| [&whole, &bare, &udp, &started].into_iter().for_each(print::flow));
    let messages: Vec<_> = lines.iter().map(|line| line["message"].as_str().unwrap()).collect();
    assert_eq!(
        messages,
        ["TCP flow completed", "TCP flow started", "UDP flow completed", "UDP flow started"]
    );
    let mut expect = json!({
        "target": "flow_logs", "level": "TRACE", "message": "TCP flow completed",
        "protocol": "tcp", "role": "responder", "policy_authorization_id": id().to_string(),
        "inner_src_ip": "100.64.0.1", "inner_src_port": 1234, "inner_dst_ip": "10.0.0.5", "inner_dst_port": 443,
        "domain": "db.example.net",
        "outers": concat!(
            r#"[{"dst_ip":"203.0.113.4","dst_port":52625,"path_activated_at":"2026-08-01T10:00:00.000000500Z","#,
            r#""src_ip":"198.51.100.9","src_port":40112}]"#
        ),
        "flow_start": "2026-08-01T10:00:00.000000500Z", "flow_end": "2026-08-01T10:02:03Z",
        "last_packet": "2026-08-01T10:00:03.250Z",
        "rx_packets": 5, "tx_packets": 4, "rx_bytes": 3000, "tx_bytes": 77,
    });
    for claim in testkit::CLAIMED {
        expect[claim] = format!("claimed {claim}").into();
    }
    let without_time = |line: &Value| {
        let mut line = line.clone();
        line.as_object_mut().unwrap().remove("timestamp");
        line
    };
    assert_eq!(without_time(&lines[0]), expect);
    // The others lack just what they have not.
    let missing = |line: &Value| -> Vec<String> {
        let line = line.as_object().unwrap();
        expect.as_object().unwrap().keys().filter(|name| !line.contains_key(*name)).cloned().collect()
    };
    let end = ["flow_end", "last_packet", "rx_bytes", "rx_packets", "tx_bytes", "tx_packets"];
    let mut of_bare: Vec<String> =
        [&["domain", "resource_address"][..], &end].concat().iter().map(|s| (*s).into()).collect();
    let optional = ["initiator_actor_email", "initiator_auth_provider_id", "initiator_client_version"];
    of_bare.extend(optional.map(String::from));
    of_bare.extend(
        testkit::CLAIMED
            .iter()
            .filter(|name| {
                name.contains("_device_") && !name.ends_with("_id") || name.ends_with("installation_id")
            })
            .map(|name| (*name).into()),
    );
    of_bare.sort();
    assert_eq!(missing(&lines[1]), of_bare);
    assert_eq!(missing(&lines[2]), ["domain"]);

    let denied = DeniedReport {
        client: report().client,
        reason: gateway_common::DropReason::UnsupportedProtocol,
        protocol: 6,
        src: report().src.ip(),
        dst: report().dst.ip(),
        ports: Some((1, 2)),
        at: report().start,
        suppressed: 3,
    };
    let lines = logged(|| print::denied(&denied));
    assert_eq!(
        without_time(&lines[0]),
        json!({
            "target": "flow_logs", "level": "TRACE", "message": "Packet denied",
            "client": denied.client.to_string(), "reason": denied.reason.label(), "protocol": 6,
            "inner_src_ip": "100.64.0.1", "inner_src_port": 1, "inner_dst_ip": "10.0.0.5", "inner_dst_port": 2,
            "at": "2026-08-01T10:00:00.000000500Z", "suppressed": 3,
        })
    );
}

/// What `act` logs, on this thread, whatever its level. Panics if a part of the token is in it.
fn logged(act: impl FnOnce()) -> Vec<Value> {
    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);
    impl Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    impl<'a> MakeWriter<'a> for Buffer {
        type Writer = Self;
        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }
    let buffer = Buffer::default();
    let subscriber = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_max_level(tracing::Level::TRACE)
        .with_writer(buffer.clone())
        .finish();
    tracing::subscriber::with_default(subscriber, act);
    let text = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
    for part in attribution().token.0.split('.') {
        assert!(!text.contains(part), "{text}");
    }
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// An HTTPS server for 127.0.0.1 that takes one request per connection.
struct Server {
    listener: TcpListener,
    addr: SocketAddr,
    acceptor: TlsAcceptor,
    ca_files: Vec<CaFile>,
}

impl Server {
    async fn bind(place: &std::path::Path) -> Self {
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new(vec!["127.0.0.1".to_owned()]).unwrap().self_signed(&key).unwrap();
        let path = place.join("ca.pem");
        let pem = format!(
            "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n",
            base64::engine::general_purpose::STANDARD.encode(certificate.der())
        );
        std::fs::write(&path, pem).unwrap();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config =
            rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(vec![certificate.der().clone()], key)
                .unwrap();
        // As the portal's does, which prefers the other: the handshake fails for who offers neither.
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        Self { listener, addr, acceptor, ca_files: vec![CaFile { path, named_by: "--ca-file" }] }
    }

    async fn request(&self) -> (String, Vec<Value>) {
        timeout(LONG, self.take()).await.expect("nobody uploads")
    }

    async fn take(&self) -> (String, Vec<Value>) {
        let (stream, _) = self.listener.accept().await.unwrap();
        let mut stream = self.acceptor.accept(stream).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
        let mut read = Vec::new();
        loop {
            assert!(stream.read_buf(&mut read).await.unwrap() > 0, "{}", String::from_utf8_lossy(&read));
            let text = std::str::from_utf8(&read).unwrap();
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            if let Ok(mut body) = serde_json::from_str::<Value>(body) {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}").await.unwrap();
                // It is removed after the answer; a restart must not come in between.
                while stream.read_buf(&mut Vec::new()).await.is_ok_and(|len| len > 0) {}
                sleep(Duration::from_millis(1)).await;
                let records = body["flow_logs"].take().as_array().unwrap().clone();
                return (head.to_owned() + "\r\n", records);
            }
        }
    }

    async fn accept_nobody(self) {
        let (stream, _) = self.listener.accept().await.unwrap();
        assert!(self.acceptor.accept(stream).await.is_err());
    }
}
