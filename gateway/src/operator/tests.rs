//! The socket end to end, without a data plane: real connections, hostile ones too.

use std::{os::unix::fs::MetadataExt as _, path::PathBuf, sync::Arc, time::Duration};

use gateway_proto::{
    addr::TunnelAddrs,
    control::{Depths, Status},
};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
    time::timeout,
};

use super::{ask::Overview, *};
use crate::{
    data::fast,
    health::Readiness,
    metrics::{self, Snapshot},
};

const SOON: Duration = Duration::from_secs(20);

fn overview() -> Box<Overview> {
    let dns = Arc::<crate::dns::Stats>::default();
    let snapshot = Snapshot {
        started: std::time::SystemTime::now(),
        workers: Vec::new(),
        clients_by_worker: Vec::new(),
        worker_drops: Default::default(),
        control_drops: Default::default(),
        status: Status::default(),
        depths: Depths::default(),
        relay_rtts: Vec::new(),
        worker_events_waiting: 0,
        portal_events_waiting: 0,
        flow_logs: Default::default(),
        dns: Arc::clone(&dns),
        readiness: Arc::new(Readiness::new(dns)),
        capabilities: Vec::new(),
        left_out: Vec::new(),
        kernel_drops: Default::default(),
        frames: None,
        fast_path: None,
    };
    let own = TunnelAddrs { v4: "100.64.0.1".parse().unwrap(), v6: "fd00:2021:1111::1".parse().unwrap() };
    Box::new(Overview {
        snapshot,
        clients: Vec::new(),
        relays: Vec::new(),
        own: Some(own),
        fast_path: fast::Status { outcome: "off (--fast-path off)".to_owned(), ..fast::Status::default() },
        missing: Vec::new(),
    })
}

/// A server whose event loop has no workers to ask.
async fn start() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("control.sock");
    let (asker, mut asks) = channel();
    tokio::spawn(async move {
        while let Some(ask) = asks.recv().await {
            match ask {
                Ask::Overview(reply) => drop(reply.send(overview())),
                Ask::Workers(_, reply) => drop(reply.send(Vec::new())),
                Ask::Client(_, reply) => drop(reply.send(Known { client: None, own: overview().own })),
                Ask::FastPath(reply) => {
                    drop(reply.send(FastPathNow { status: overview().fast_path, switcher: None }))
                }
            }
        }
    });
    let (exporter, _) = metrics::channel();
    tokio::spawn(Server::new(asker, Arc::new(exporter)).serve(path.clone()));
    let ready = async {
        while std::fs::metadata(&path).map_or(0, |file| file.mode() & 0o777) != 0o600 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, ready).await.unwrap();
    (folder, path)
}

async fn say(path: &PathBuf, bytes: &[u8]) -> Value {
    let mut stream = BufReader::new(UnixStream::connect(path).await.unwrap());
    // The other side may have had enough already.
    let _ = stream.get_mut().write_all(bytes).await;
    let mut line = String::new();
    timeout(SOON, stream.read_line(&mut line)).await.unwrap().unwrap();
    serde_json::from_str(&line).unwrap()
}

#[tokio::test]
async fn good_bad_and_hostile_requests_get_one_answer_each() {
    let (_folder, path) = start().await;
    let long = [&[b' '; 70_000][..], b"\n"].concat();
    let deep = ["[".repeat(60_000).as_bytes(), b"\n"].concat();
    let table: [(&[u8], &str, &str); 11] = [
        (b"{\"version\":1,\"request\":\"status\"}\n", "/ok/fast_path/words", "off (--fast-path off)"),
        (b"{\"version\":1,\"request\":\"fast-path\",\"mode\":\"off\"}\n", "/ok/on", "false"),
        (b"{\"version\":1,\"request\":\"fast-path\",\"mode\":\"auto\"}\n", "/ok/on", "false"),
        (b"{\"version\":1,\"request\":\"reboot\"}\n", "/error/code", "unknown_request"),
        (b"{\"version\":1,\"request\":\"flows\"}\n", "/ok/counted", "false"),
        (b"{\"version\":1,\"request\":\"fast-path\",\"mode\":\"on\"}\n", "/error/code", "no_fast_path"),
        (b"GET / HTTP/1.1\r\n\r\n", "/error/code", "not_json"),
        (b"\0\xff\n", "/error/code", "not_json"),
        (b"{\"version\":9,\"request\":\"status\"}\n", "/error/code", "version"),
        (&long, "/error/code", "too_long"),
        (&deep, "/error/code", "not_json"),
    ];
    for (request, pointer, expect) in table {
        let answer = say(&path, request).await;
        assert_eq!(answer["version"], 1, "{answer}");
        let found = answer.pointer(pointer).map(|value| value.to_string().replace('"', ""));
        assert_eq!(found.as_deref(), Some(expect), "{answer}");
    }
    let why = b"{\"version\":1,\"request\":\"why\",\"src\":\"100.64.0.1\",\"dst\":\"10.0.0.1\",\"protocol\":\"icmp\"}\n";
    let answer = say(&path, why).await;
    assert_eq!(answer["ok"]["verdict"], "unknown");
    assert!(
        answer["ok"]["words"].as_str().is_some_and(|words| words.contains("the gateway's own")),
        "{answer}"
    );
    // An exporter whose loop is gone.
    assert_eq!(say(&path, b"{\"version\":1,\"request\":\"metrics\"}\n").await["error"]["code"], "busy");
}

#[tokio::test]
async fn a_connection_may_ask_again_and_a_ninth_is_refused_until_one_goes() {
    let (_folder, path) = start().await;
    let mut open = Vec::new();
    for _ in 0..8 {
        let mut stream = BufReader::new(UnixStream::connect(&path).await.unwrap());
        for _ in 0..2 {
            stream.get_mut().write_all(b"{}\n").await.unwrap();
            let mut line = String::new();
            timeout(SOON, stream.read_line(&mut line)).await.unwrap().unwrap();
            assert!(line.contains("Name the version"), "{line}");
        }
        open.push(stream);
    }
    let refused = say(&path, b"").await;
    assert_eq!(refused["error"]["code"], "busy", "{refused}");
    drop(open.pop());
    let again = async {
        while say(&path, b"{}\n").await["error"]["code"] != "version" {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(SOON, again).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn who_says_nothing_or_half_a_request_is_sent_away() {
    let (_folder, path) = start().await;
    for (said, code) in [(&b""[..], "timeout"), (b"{\"version\":1", "timeout")] {
        let mut stream = UnixStream::connect(&path).await.unwrap();
        stream.write_all(said).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["error"]["code"], code, "{answer}");
    }
}

#[tokio::test]
async fn the_commands_say_in_one_sentence_what_is_wrong() {
    let (_folder, path) = start().await;
    let asked = tokio::task::spawn_blocking(move || {
        let mut client = client::Client::connect(&path).unwrap();
        let status: status::Status = client.ask_for("status", Value::Null).unwrap();
        let refused = client.ask("fast-path", serde_json::json!({ "mode": "on" })).unwrap_err();
        let nobody = client::Client::connect(&path.with_extension("other")).unwrap_err();
        (show::status(&status), format!("{refused:#}"), format!("{nobody:#}"))
    });
    let (status, refused, nobody) = asked.await.unwrap();
    for expect in
        ["gateway: firezone-gateway", "ready: no, for want of tun", "100.64.0.1", "dropped: nothing"]
    {
        assert!(status.contains(expect), "{expect}: {status}");
    }
    assert!(
        refused.contains("no fast path to switch on") && refused.contains("--fast-path auto"),
        "{refused}"
    );
    assert!(nobody.contains("No gateway listens") && nobody.contains("--control-socket"), "{nobody}");
}
