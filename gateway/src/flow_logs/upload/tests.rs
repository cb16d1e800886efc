//! The uploader against a scripted server at the other end of a pipe, with the clock paused.

use std::sync::Mutex;

use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    time::timeout,
};
use uuid::Uuid;

use super::*;
use crate::flow_logs::{
    record,
    spool::Kept,
    testkit::{self, attribution_of, ended, id, numbered, report},
};

/// A request as the server saw it.
#[derive(Debug, Clone)]
struct Seen {
    at: Instant,
    /// Counts from 0, over all connections.
    number: usize,
    /// Who was dialled for it.
    origin: String,
    /// All up to the body.
    head: String,
    records: Vec<Value>,
}

enum Reply {
    Status(u16),
    Full(u16, &'static str, Value),
    /// The connection breaks in the middle of the answer.
    Half,
    /// The connection breaks before there is one.
    Reset,
    Silence,
}
use Reply::*;

type Script = Box<dyn FnMut(&Seen) -> Reply + Send>;

#[derive(Clone)]
struct Server {
    script: Arc<Mutex<Script>>,
    seen: Arc<Mutex<Vec<Seen>>>,
    /// Who was dialled, in order.
    dialled: Arc<Mutex<Vec<String>>>,
    /// Nobody accepts.
    refuse: bool,
}

impl Dial for Server {
    type Stream = DuplexStream;

    async fn dial(&mut self, host: &str, port: u16) -> Result<DuplexStream, String> {
        let origin = format!("{host}:{port}");
        self.dialled.lock().unwrap().push(origin.clone());
        if self.refuse {
            return Err("nobody there".to_owned());
        }
        let (ours, theirs) = duplex(64 << 10);
        tokio::spawn(self.clone().serve(theirs, origin));
        Ok(ours)
    }
}

impl Server {
    async fn serve(self, mut stream: DuplexStream, origin: String) {
        let mut read = Vec::new();
        loop {
            let head = loop {
                if let Some(end) = read.windows(4).position(|w| w == b"\r\n\r\n") {
                    break read.drain(..end + 4).collect::<Vec<_>>();
                }
                if stream.read_buf(&mut read).await.unwrap_or(0) == 0 {
                    return;
                }
            };
            let head = String::from_utf8(head).unwrap();
            let len =
                head.lines().find_map(|l| l.to_lowercase().strip_prefix("content-length: ")?.parse().ok());
            while read.len() < len.expect("bodies have a length") {
                assert!(stream.read_buf(&mut read).await.unwrap() > 0);
            }
            let body: Value = serde_json::from_slice(&read).unwrap();
            read.clear();
            let records = body["flow_logs"].as_array().unwrap().clone();
            assert_eq!(body, json!({"flow_logs": records}), "nothing else");
            let reply = {
                let mut all = self.seen.lock().unwrap();
                let seen =
                    Seen { at: Instant::now(), number: all.len(), origin: origin.clone(), head, records };
                all.push(seen.clone());
                (self.script.lock().unwrap())(&seen)
            };
            let (status, headers, body) = match reply {
                Status(status) => (status, "", json!({})),
                Full(status, headers, body) => (status, headers, body),
                Half => {
                    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nhalf").await.unwrap();
                    return;
                }
                Reset => return,
                Silence => std::future::pending().await,
            };
            let body = body.to_string();
            let head =
                format!("HTTP/1.1 {status} X\r\ncontent-length: {}\r\n{headers}\r\n{body}", body.len());
            // The uploader may have closed it, as it does after a pass.
            let _ = stream.write_all(head.as_bytes()).await;
        }
    }
}

/// A spool, an uploader and its server.
struct World {
    _place: tempfile::TempDir,
    spool: Arc<Spool>,
    server: Server,
    uploader: Uploader<Server>,
    began: Instant,
}

impl World {
    fn new(script: impl FnMut(&Seen) -> Reply + Send + 'static) -> Self {
        Self::with(Server {
            script: Arc::new(Mutex::new(Box::new(script))),
            seen: Arc::default(),
            dialled: Arc::default(),
            refuse: false,
        })
    }

    fn with(server: Server) -> Self {
        let place = tempfile::tempdir().unwrap();
        let spool = Arc::new(Spool::new(place.path().join("spool")));
        spool.keep_token(&testkit::attribution()).unwrap();
        let http = Http::new(server.clone(), "agent/1".to_owned());
        let uploader = Uploader::new(Arc::clone(&spool), Arc::default(), http, 1);
        Self { _place: place, spool, server, uploader, began: Instant::now() }
    }

    /// With so many records, which began at second 0, 1, ... of the flow's own.
    fn holding(self, records: u64) -> Self {
        (0..records).for_each(|number| {
            assert_eq!(self.spool.keep(&numbered(number, ended())).unwrap(), Kept::OnDisk)
        });
        self
    }

    async fn pass(&mut self) -> Pass {
        self.uploader.pass(&settings(0)).await
    }

    fn left(&self) -> usize {
        self.spool.batch(id(), usize::MAX, usize::MAX, &FxHashSet::default()).unwrap().records.len()
    }

    fn seen(&self) -> Vec<Seen> {
        self.server.seen.lock().unwrap().clone()
    }

    /// How many records each request had.
    fn sizes(&self) -> Vec<usize> {
        self.seen().iter().map(|seen| seen.records.len()).collect()
    }
}

fn settings(batch_size: u64) -> Settings {
    Settings { api_url: "https://flows.example.net/base".to_owned(), interval: 60, batch_size }
}

/// Files as [`Spool::keep`] makes them, without its waiting for the disk.
fn fill(spool: &Spool, records: u64, padding: usize) {
    let folder = spool.root().join("responder").join(id().to_string());
    for number in 0..records {
        let report = numbered(number, report());
        let mut payload = record::payload(&report);
        payload["domain"] = "x".repeat(padding).into();
        let path = folder.join(format!("{}.start.json", record::stem(&report)));
        std::fs::write(path, record::seal(&payload)).unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_taken_is_removed_and_was_sent_as_the_endpoint_asks() {
    let mut world = World::new(|_| Full(200, "", json!({"data": {"status": "ok"}}))).holding(3);
    world.spool.keep(&numbered(1, report())).unwrap();
    assert_eq!(world.pass().await, Pass::Done);
    let [seen] = &world.seen()[..] else { panic!("{:?}", world.seen()) };
    let expect: Vec<_> = (0..3).map(|number| record::payload(&numbered(number, ended()))).collect();
    assert_eq!(seen.records, expect);
    assert_eq!(seen.origin, "flows.example.net:443");
    let bearer = format!("authorization: Bearer {}", testkit::attribution().token.0.as_str());
    for line in [
        "POST /ingestion/flow_logs HTTP/1.1",
        "host: flows.example.net",
        "content-type: application/json",
        "user-agent: agent/1",
        &bearer,
    ] {
        assert!(seen.head.lines().any(|l| l == line), "{line}: {}", seen.head);
    }
    let folder = world.spool.root().join("responder").join(id().to_string());
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 1, "only the token is left");
    assert_eq!(world.pass().await, Pass::Done);
    assert_eq!(world.seen().len(), 1, "nothing to send");
}

#[tokio::test(start_paused = true)]
async fn answers_decide_what_stays_and_how_often_it_is_sent() {
    type Table = &'static [(&'static str, fn(usize) -> Reply, &'static [usize], usize, Pass)];
    let table: Table = &[
        ("taken", |_| Status(201), &[5], 0, Pass::Done),
        ("partly invalid", |_| Full(422, "", json!({"validation_errors": [{}, {}]})), &[5], 0, Pass::Done),
        ("too large, all of it", |_| Status(413), &[5, 2, 1, 1, 3, 1, 2, 1, 1], 5, Pass::Done),
        ("too large once", |n| Status(if n == 0 { 413 } else { 200 }), &[5, 2, 3], 0, Pass::Done),
        ("busy", |n| Status(if n < 3 { 429 } else { 200 }), &[5, 5, 5, 5], 0, Pass::Done),
        ("fails once", |n| Status(if n == 0 { 500 } else { 200 }), &[5, 5], 0, Pass::Done),
        ("times out once", |n| Status(if n == 0 { 408 } else { 200 }), &[5, 5], 0, Pass::Done),
        ("breaks off", |n| if n == 0 { Half } else { Status(200) }, &[5, 5], 0, Pass::Done),
        ("resets", |n| if n == 0 { Reset } else { Status(200) }, &[5, 5], 0, Pass::Done),
        ("is silent", |n| if n == 0 { Silence } else { Status(200) }, &[5, 5], 0, Pass::Done),
        ("fails after a half", |n| Status([413, 200, 503, 200][n]), &[5, 2, 3, 3], 0, Pass::Done),
        ("unauthorized", |_| Status(401), &[5], 5, Pass::Done),
        ("bad request", |_| Status(400), &[5], 5, Pass::Done),
        ("unauthorized after a half", |n| Status([413, 200, 401][n]), &[5, 2, 3], 3, Pass::Done),
        ("see other", |_| Full(303, "location: /x\r\n", json!({})), &[5], 5, Pass::Done),
        ("redirects nowhere", |_| Status(307), &[5], 5, Pass::Done),
        ("redirects to http", |_| Full(307, "location: http://a/\r\n", json!({})), &[5], 5, Pass::Done),
        (
            "redirects with credentials",
            |_| Full(307, "location: https://u:p@a/\r\n", json!({})),
            &[5],
            5,
            Pass::Done,
        ),
        ("redirects in a circle", |_| Full(302, "location: /x\r\n", json!({})), &[5; 6], 5, Pass::Done),
    ];
    for (name, script, sizes, left, pass) in table {
        let mut world = World::new(|seen| script(seen.number)).holding(5);
        assert_eq!(world.pass().await, *pass, "{name}");
        assert_eq!((world.sizes(), world.left()), (sizes.to_vec(), *left), "{name}");
        // Each record is gone or waits, and both are counted.
        let figures = world.uploader.tally.read();
        assert_eq!(figures.uploaded, 5 - *left as u64, "{name}");
        assert_eq!(world.spool.level().map(|(files, _)| files), Some(*left as u64), "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_record_that_is_too_large_stays_and_does_not_hold_up_the_others() {
    let second = record::time(numbered(2, ended()).start);
    let too_large = move |record: &Value| record["flow_start"] == second.as_str();
    let mut world =
        World::new(move |seen| Status(if seen.records.iter().any(&too_large) { 413 } else { 200 }))
            .holding(5);
    world.pass().await;
    assert_eq!((world.sizes(), world.left()), (vec![5, 2, 3, 1, 2], 1));
    world.spool.keep(&numbered(9, ended())).unwrap();
    world.pass().await;
    assert_eq!((world.sizes(), world.left()), (vec![5, 2, 3, 1, 2, 1], 1), "it is not sent again");
    // By the next run of the daemon it is.
    let http = Http::new(world.server.clone(), String::new());
    world.uploader = Uploader::new(Arc::clone(&world.spool), Arc::default(), http, 1);
    world.pass().await;
    assert_eq!((world.sizes()[6..].to_vec(), world.left()), (vec![1], 1));
}

#[tokio::test(start_paused = true)]
async fn a_busy_server_is_asked_again_when_it_says_for_as_long_as_it_takes() {
    let busy = |n| match n {
        0 => Full(429, "retry-after: 7\r\n", json!({})),
        1 => Status(429),
        2..=10 => Full(429, "retry-after: 300\r\n", json!({})),
        11 => Full(429, "retry-after: 86400\r\n", json!({})),
        12..=14 => Status(500),
        _ => Status(200),
    };
    let mut world = World::new(move |seen| busy(seen.number)).holding(1);
    world.pass().await;
    let at: Vec<_> = world.seen().iter().map(|seen| (seen.at - world.began).as_secs()).collect();
    assert_eq!(at[..4], [0, 7, 8, 308]);
    assert_eq!(at[12], 8 + 10 * 300, "five minutes are the longest it may ask for");
    assert_eq!((at.len(), world.left()), (16, 0), "waiting took nothing from what failures may take");
}

#[tokio::test(start_paused = true)]
async fn pauses_grow_and_after_five_minutes_the_pass_is_over() {
    for refuse in [false, true] {
        let mut world = World::new(|_| Status(503));
        world.uploader.http = Http::new(Server { refuse, ..world.server.clone() }, String::new());
        let mut world = world.holding(2);
        let other = attribution_of(other_id(u128::MAX));
        world.spool.keep_token(&other).unwrap();
        world.spool.keep(&gateway_proto::flow::FlowReport { attribution: other, ..ended() }).unwrap();
        world.pass().await;
        let took = world.began.elapsed();
        assert!((Duration::from_secs(200)..=BUDGET).contains(&took), "{took:?}");
        let attempts = world.server.dialled.lock().unwrap().len();
        if refuse {
            assert!((8..30).contains(&attempts), "{attempts}");
            assert_eq!(world.left(), 2);
            continue;
        }
        assert_eq!(attempts, 1, "one connection is enough");
        let seen = world.seen();
        let pauses: Vec<_> = seen.windows(2).map(|w| (w[1].at - w[0].at).as_secs_f64()).collect();
        let mut base = 0.5;
        for pause in &pauses {
            let expect = base * 0.49..=f64::min(base * 1.51, 60.1);
            assert!(expect.contains(pause), "{pauses:?}");
            base = f64::min(base * 2.0, 60.0);
        }
        assert!(pauses.len() >= 8, "{pauses:?}");
        assert!(seen.iter().all(|seen| seen.records.len() == 2), "the other authorization was not tried");
        assert_eq!(world.left(), 2);
        assert!(world.uploader.failing);
        *world.server.script.lock().unwrap() = Box::new(|_| Status(200));
        world.pass().await;
        assert_eq!((world.left(), world.uploader.failing), (0, false));
        assert_eq!(world.sizes()[seen.len()..], [2, 1]);
    }
}

fn other_id(id: u128) -> PolicyAuthorizationId {
    PolicyAuthorizationId(Uuid::from_u128(id))
}

#[tokio::test(start_paused = true)]
async fn a_503_may_say_how_long() {
    let mut world = World::new(|seen| match seen.number {
        0 => Full(503, "retry-after: 100\r\n", json!({})),
        1 => Full(503, "retry-after: 250\r\n", json!({})),
        _ => panic!("beyond five minutes"),
    })
    .holding(1);
    world.pass().await;
    assert_eq!((world.seen()[1].at - world.seen()[0].at).as_secs(), 100);
    assert_eq!(world.left(), 1);
}

#[tokio::test(start_paused = true)]
async fn redirections_are_followed_with_all_of_the_request_and_kept_for_the_pass() {
    let mut world = World::new(|seen| match seen.number {
        0 => Full(301, "location: /one?a=b\r\n", json!({})),
        1 => Full(302, "location: //b.example/two\r\n", json!({})),
        2 => Full(307, "location: https://c.example:8443/three\r\n", json!({})),
        3 => Full(308, "location: four\r\n", json!({})),
        4 => Full(307, "location: /five\r\n", json!({})),
        _ => Status(200),
    })
    .holding(2);
    let other = attribution_of(other_id(u128::MAX));
    world.spool.keep_token(&other).unwrap();
    world.spool.keep(&gateway_proto::flow::FlowReport { attribution: other, ..ended() }).unwrap();
    world.pass().await;
    let went: Vec<_> = world
        .seen()
        .iter()
        .map(|seen| {
            assert!(seen.head.contains("authorization: Bearer "), "{}", seen.head);
            let path = seen.head.strip_prefix("POST ").and_then(|rest| rest.split(' ').next()).unwrap();
            format!("{}{path} {}", seen.origin, seen.records.len())
        })
        .collect();
    let expect = [
        "flows.example.net:443/ingestion/flow_logs 2",
        "flows.example.net:443/one?a=b 2",
        "b.example:443/two 2",
        "c.example:8443/three 2",
        "c.example:8443/four 2",
        "c.example:8443/five 2",
        "c.example:8443/five 1",
    ];
    assert_eq!(went, expect);
    let dialled = world.server.dialled.lock().unwrap().clone();
    assert_eq!(dialled, ["flows.example.net:443", "b.example:443", "c.example:8443"]);
    world.spool.keep(&ended()).unwrap();
    world.pass().await;
    assert_eq!(world.seen()[7].origin, "flows.example.net:443", "the next pass asks where it is told");
}

#[tokio::test(start_paused = true)]
async fn batches_have_bounds_in_records_and_in_bytes() {
    let mut world = World::new(|_| Status(200)).holding(5);
    let two = settings(2);
    let mut passes = Vec::new();
    for _ in 0..3 {
        passes.push(world.uploader.pass(&two).await);
    }
    assert_eq!((passes, world.sizes()), (vec![Pass::Backlog, Pass::Backlog, Pass::Done], vec![2, 2, 1]));

    for (batch_size, records, expect) in [(0, 1001, 1000), (u64::MAX, 10_001, 10_000)] {
        let mut world = World::new(|_| Status(200));
        fill(&world.spool, records, 0);
        assert_eq!(world.uploader.pass(&settings(batch_size)).await, Pass::Backlog);
        assert_eq!((world.sizes(), world.left()), (vec![expect], 1));
    }

    let mut world = World::new(|seen| {
        let len = seen.head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
        assert!((MAX_BODY - 60_500..=MAX_BODY).contains(&len.unwrap()), "{len:?}");
        Status(200)
    });
    fill(&world.spool, 150, 60_000);
    assert_eq!(world.pass().await, Pass::Backlog);
    assert_eq!(world.sizes().iter().sum::<usize>() + world.left(), 150);
}

#[tokio::test(start_paused = true)]
async fn each_authorization_has_its_own_token_and_its_own_answer() {
    let mut world = World::new(|seen| Status(if seen.number == 0 { 401 } else { 200 })).holding(1);
    let other = attribution_of(other_id(u128::MAX));
    world.spool.keep_token(&other).unwrap();
    world
        .spool
        .keep(&gateway_proto::flow::FlowReport { attribution: Arc::clone(&other), ..ended() })
        .unwrap();
    // Without a token: made by nobody we know.
    let stranger = world.spool.root().join("responder").join(Uuid::from_u128(2).to_string());
    std::fs::create_dir(&stranger).unwrap();
    std::fs::write(stranger.join("0000000001-0123456789abcdef.start.json"), record::seal(&json!({})))
        .unwrap();
    world.pass().await;
    let seen = world.seen();
    assert_eq!(seen.len(), 2);
    for (seen, attribution) in seen.iter().zip([testkit::attribution(), other]) {
        assert!(seen.head.contains(attribution.token.0.as_str()));
    }
    assert_eq!(world.left(), 1);
    assert!(world.uploader.failing);
}

#[tokio::test(start_paused = true)]
async fn passes_come_each_interval_and_each_second_while_there_is_more() {
    let world = World::new(|_| Status(200)).holding(3);
    let (settings, wanted) = watch::channel(None);
    let (spool, server, began) = (world.spool, world.server, world.began);
    let running = tokio::spawn(world.uploader.run(wanted));
    sleep(Duration::from_secs(100)).await;
    assert!(server.seen.lock().unwrap().is_empty(), "nobody has said where to");
    settings.send_replace(Some(self::settings(2)));
    sleep(Duration::from_secs(10)).await;
    spool.keep(&ended()).unwrap();
    sleep(Duration::from_secs(100)).await;
    let at: Vec<_> = server.seen.lock().unwrap().iter().map(|seen| (seen.at - began).as_secs()).collect();
    assert_eq!(at, [100, 101, 161]);
    drop(settings);
    timeout(Duration::from_secs(1), running).await.expect("it ends with its settings").unwrap();
}

#[tokio::test(start_paused = true)]
async fn other_settings_and_the_end_break_off_what_is_under_way() {
    let world =
        World::new(|seen| if seen.origin.starts_with("flows") { Silence } else { Status(200) }).holding(1);
    let (settings, wanted) = watch::channel(Some(self::settings(0)));
    let (server, began) = (world.server, world.began);
    let running = tokio::spawn(world.uploader.run(wanted));
    sleep(Duration::from_secs(1)).await;
    settings.send_replace(Some(Settings { api_url: "https://b.example".into(), ..self::settings(0) }));
    sleep(Duration::from_secs(1)).await;
    let seen: Vec<_> =
        server.seen.lock().unwrap().iter().map(|s| ((s.at - began).as_secs(), s.origin.clone())).collect();
    assert_eq!(seen, [(0, "flows.example.net:443".into()), (1, "b.example:443".into())]);
    settings.send_replace(Some(self::settings(0)));
    sleep(Duration::from_secs(1)).await;
    drop(settings);
    timeout(Duration::from_millis(100), running).await.expect("at once").unwrap();
}

#[tokio::test(start_paused = true)]
async fn nothing_goes_to_where_everybody_could_read_it_and_expired_tokens_are_removed() {
    let mut world = World::new(|_| Status(200)).holding(1);
    let http = Settings { api_url: "http://flows.example.net".into(), ..settings(0) };
    assert_eq!(world.uploader.pass(&http).await, Pass::Done);
    assert!(world.server.dialled.lock().unwrap().is_empty() && world.uploader.failing);
    assert_eq!(world.left(), 1);

    let mut expired = testkit::claims();
    expired["exp"] = 1_000_000_000.into();
    let expired = gateway_proto::portal::ingest_token::parse(testkit::token_of(&expired)).unwrap();
    world.spool.keep_token(&expired).unwrap();
    let (_settings, wanted) = watch::channel(Some(settings(0)));
    let (spool, server) = (world.spool, world.server);
    tokio::spawn(world.uploader.run(wanted));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(spool.authorizations().unwrap(), []);
    assert!(server.dialled.lock().unwrap().is_empty());
}
