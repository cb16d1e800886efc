//! The portal's endpoint for flow logs (cli-and-service.md section 14.5): HTTPS, as strict as the spec lets it be.
//!
//! ```text
//!   script --- Ingest (handle) ---> State (lock) <--- a thread per connection: TLS, HTTP/1.1 ---> gateway
//!              tell, records, complaints   decides
//! ```
//!
//! It keeps what it took by authorization and flow, as the portal does, and counts how often each half of a record came.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{ErrorKind, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result};
use serde_json::Value;
use socket2::SockRef;

use super::portal::{self, Tls};
use crate::net::{NetNs, process::wait_for};

/// Where records are posted.
const PATH: &str = "/ingestion/flow_logs";
/// Where [`Answer::Elsewhere`] leads.
const OTHER_PATH: &str = "/elsewhere/flow_logs";
/// The portal takes this many bytes and records at most.
const MAX_BODY: usize = 10_000_000;
const MAX_RECORDS: usize = 10_000;
const MAX_HEAD: usize = 64 << 10;
/// How often the listener looks whether it is to end.
const LOOK: Duration = Duration::from_millis(10);
/// A connection that says nothing for so long is closed.
const IDLE_LIMIT: Duration = Duration::from_secs(60);

/// How the next request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// As the spec says: 200 if all is well.
    Properly,
    /// 413 for more records than this.
    AtMost(usize),
    /// 429 with this `Retry-After`, in seconds.
    Later(u64),
    /// This status, and nothing is taken.
    Status(u16),
    /// 422; what came is taken all the same.
    SomeInvalid,
    /// 302 to another path of this server.
    Elsewhere,
    /// Reset before the body was read; nothing is taken.
    ResetBefore,
    /// All is taken, and the connection is reset in the middle of the answer.
    ResetAfter,
}

/// What tells records apart, as the portal does.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// `policy_authorization_id` of the token.
    pub authorization: String,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// Inner source, `ip port`.
    pub src: String,
    /// Inner destination.
    pub dst: String,
    /// `flow_start`.
    pub start: String,
}

/// What has come of one flow.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Record {
    /// How often its open half was taken.
    pub opened: usize,
    /// How often its closed half was taken.
    pub closed: usize,
    /// The closed half if there is one, or else the open one.
    pub payload: Value,
}

/// A running endpoint. Dropping it stops it; what it took is gone then, unless it was stopped by [`Ingest::stop`].
pub struct Ingest {
    shared: Arc<Shared>,
    address: SocketAddr,
    tls: Tls,
    server: Option<Server>,
}

struct Shared {
    state: Mutex<State>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ingest {
    /// Listens on `address` in a namespace. `key` signs the tokens.
    ///
    /// # Errors
    /// If the address or the certificate cannot be used.
    pub fn start(namespace: &NetNs, address: SocketAddr, tls: Tls, key: [u8; 32]) -> Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::new(State::new(key)) });
        let mut ingest = Self { shared, address, tls, server: None };
        ingest.restart(namespace)?;
        Ok(ingest)
    }

    /// Nobody listens any more, and connections are closed. What was taken is kept.
    pub fn stop(&mut self) {
        self.server = None;
    }

    /// Listens again.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn restart(&mut self, namespace: &NetNs) -> Result<()> {
        self.server = None;
        let listener = namespace.run(|| Ok(TcpListener::bind(self.address)?))?;
        self.address = listener.local_addr()?;
        self.server = Some(Server::start(listener, Arc::new(self.tls.server_config()?), &self.shared)?);
        Ok(())
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What `api_url` is to say.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}/", self.address)
    }

    /// The next requests are answered so, one each; all others properly.
    pub fn tell(&self, answers: impl IntoIterator<Item = Answer>) {
        self.shared.lock().script.extend(answers);
    }

    /// All requests that the script says nothing about are answered so.
    pub fn always(&self, answer: Answer) {
        self.shared.lock().usual = answer;
    }

    /// What was taken so far.
    #[must_use]
    pub fn records(&self) -> BTreeMap<Key, Record> {
        self.shared.lock().records.clone()
    }

    /// The status of each answer so far; 0 is a reset.
    #[must_use]
    pub fn answers(&self) -> Vec<u16> {
        self.shared.lock().answers.clone()
    }

    /// What was wrong with requests.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        self.shared.lock().complaints.clone()
    }

    /// Waits until what was taken is as wanted.
    ///
    /// # Errors
    /// With what there is, after `limit`.
    pub fn wait(
        &self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&BTreeMap<Key, Record>) -> bool,
    ) -> Result<BTreeMap<Key, Record>> {
        wait_for(what, limit, || Ok(Some(self.records()).filter(&wanted))).with_context(|| {
            let state = self.shared.lock();
            format!(
                "the endpoint has {:?}, answered {:?}, complains {:?}",
                state.records, state.answers, state.complaints
            )
        })
    }
}

/// What decides. Knows no socket and no TLS.
struct State {
    key: [u8; 32],
    usual: Answer,
    script: VecDeque<Answer>,
    records: BTreeMap<Key, Record>,
    answers: Vec<u16>,
    complaints: Vec<String>,
}

/// A request up to its body.
#[derive(Debug, Default, Clone)]
struct Head {
    method: String,
    target: String,
    authorization: Option<String>,
    content_type: Option<String>,
    length: Option<usize>,
}

/// What the connection does.
#[derive(Debug, PartialEq, Eq)]
enum Reply {
    Whole(u16, Vec<(&'static str, String)>),
    /// A part of it, then a reset.
    Torn,
}

impl State {
    fn new(key: [u8; 32]) -> Self {
        Self {
            key,
            usual: Answer::Properly,
            script: VecDeque::new(),
            records: BTreeMap::new(),
            answers: Vec::new(),
            complaints: Vec::new(),
        }
    }

    fn next(&mut self) -> Answer {
        self.script.pop_front().unwrap_or(self.usual)
    }

    /// A request has come whole, and is to be answered so.
    fn handle(&mut self, answer: Answer, head: &Head, body: &[u8]) -> Reply {
        let (status, headers) = match self.checked(head, body) {
            Err((status, complaint)) => {
                self.complaints.push(format!("{status}: {complaint}"));
                (status, vec![])
            }
            Ok((authorization, records)) => match answer {
                Answer::AtMost(most) if records.len() > most => (413, vec![]),
                Answer::Later(seconds) => (429, vec![("retry-after", seconds.to_string())]),
                Answer::Status(status) => (status, vec![]),
                Answer::Elsewhere => (302, vec![("location", OTHER_PATH.to_owned())]),
                Answer::Properly
                | Answer::AtMost(_)
                | Answer::SomeInvalid
                | Answer::ResetBefore
                | Answer::ResetAfter => {
                    records.into_iter().for_each(|record| self.take(&authorization, record));
                    match answer {
                        Answer::SomeInvalid => (422, vec![]),
                        Answer::ResetAfter => (0, vec![]),
                        _ => (200, vec![]),
                    }
                }
            },
        };
        self.answers.push(status);
        if status == 0 { Reply::Torn } else { Reply::Whole(status, headers) }
    }

    /// The authorization and the records, or the status and what is wrong.
    fn checked(&self, head: &Head, body: &[u8]) -> Result<(String, Vec<Value>), (u16, String)> {
        let wrong = |status, what: &str| Err((status, what.to_owned()));
        if head.method != "POST" {
            return wrong(405, &format!("{} is not POST", head.method));
        }
        if ![PATH, OTHER_PATH].contains(&head.target.as_str()) {
            return wrong(404, &format!("nothing is at {:?}", head.target));
        }
        if head.content_type.as_deref() != Some("application/json") {
            return wrong(415, &format!("content-type {:?}", head.content_type));
        }
        let Some(token) = head.authorization.as_deref().and_then(|text| text.strip_prefix("Bearer ")) else {
            return wrong(401, "no bearer token");
        };
        let Some(claims) = portal::verified_claims(token, &self.key) else {
            return wrong(401, "a token that the portal has not signed");
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        if claims["exp"].as_u64().is_none_or(|expiry| expiry <= now) {
            return wrong(401, "an expired token");
        }
        if claims["uploads_enabled"] != true {
            return wrong(401, "uploads are not enabled");
        }
        if claims["role"] != "responder" {
            return wrong(401, "the token is not a gateway's");
        }
        let Some(authorization) = claims["policy_authorization_id"].as_str() else {
            return wrong(401, "the token is of no authorization");
        };
        let Ok(Value::Object(mut body)) = serde_json::from_slice(body) else {
            return wrong(400, "the body is no JSON object");
        };
        let Some(Value::Array(records)) = body.remove("flow_logs") else {
            return wrong(400, "flow_logs is no array");
        };
        if !body.is_empty() {
            return wrong(400, &format!("there is more than flow_logs: {:?}", body.keys()));
        }
        if records.is_empty() || records.len() > MAX_RECORDS {
            return wrong(400, &format!("{} records", records.len()));
        }
        for record in &records {
            if let Err(what) = check_record(record) {
                return wrong(422, &format!("{what} in {record}"));
            }
        }
        Ok((authorization.to_owned(), records))
    }

    fn take(&mut self, authorization: &str, payload: Value) {
        let text = |name: &str| payload[name].as_str().unwrap_or_default().to_owned();
        let end = |side: &str| {
            format!("{} {}", text(&format!("inner_{side}_ip")), payload[format!("inner_{side}_port")])
        };
        let key = Key {
            authorization: authorization.to_owned(),
            protocol: text("protocol"),
            src: end("src"),
            dst: end("dst"),
            start: text("flow_start"),
        };
        let closes = payload.get("flow_end").is_some();
        let record = self.records.entry(key).or_default();
        // A close record replaces the open one, never the other way round.
        if closes || record.closed == 0 {
            record.payload = payload;
        }
        *(if closes { &mut record.closed } else { &mut record.opened }) += 1;
    }
}

const CLOSING: [&str; 6] = ["flow_end", "last_packet", "rx_packets", "tx_packets", "rx_bytes", "tx_bytes"];
const OPENING: [&str; 6] =
    ["protocol", "inner_src_ip", "inner_src_port", "inner_dst_ip", "inner_dst_port", "flow_start"];

/// What the ingest schema asks of a record (section 14.5), and that it has no other member than section 14.4 names.
fn check_record(record: &Value) -> Result<(), String> {
    let members = record.as_object().ok_or("no object")?;
    let known = |name: &str| {
        OPENING.contains(&name) || CLOSING.contains(&name) || ["domain", "outers"].contains(&name)
    };
    if let Some(name) = members.keys().find(|name| !known(name)) {
        return Err(format!("unknown member {name}"));
    }
    if let Some(name) = OPENING.iter().find(|name| !members.contains_key(**name)) {
        return Err(format!("no {name}"));
    }
    let closing = CLOSING.iter().filter(|name| members.contains_key(**name)).count();
    if closing != 0 && closing != CLOSING.len() {
        return Err(format!("{closing} of {} closing members", CLOSING.len()));
    }
    if closing != 0 && !members.contains_key("outers") {
        return Err("a closed record without outers".to_owned());
    }
    for (name, value) in members {
        let well = match name.as_str() {
            "protocol" => value == "tcp" || value == "udp",
            "domain" => value.as_str().is_some_and(|name| !name.is_empty() && name.len() <= 253),
            "outers" => {
                value.as_array().is_some_and(|all| (1..=16).contains(&all.len()) && all.iter().all(is_outer))
            }
            name if name.ends_with("_ip") => is_ip(value),
            name if name.ends_with("_port") => is_port(value),
            "flow_start" | "flow_end" | "last_packet" => instant(value).is_some(),
            _ => value.is_u64(),
        };
        if !well {
            return Err(format!("{name} is {value}"));
        }
    }
    let [start, last, end] =
        ["flow_start", "last_packet", "flow_end"].map(|name| members.get(name).and_then(instant));
    if closing != 0 && !(start <= last && last <= end) {
        return Err("times out of order".to_owned());
    }
    Ok(())
}

fn is_outer(outer: &Value) -> bool {
    let Some(members) = outer.as_object() else { return false };
    let has = |name: &str| members.contains_key(name);
    has("dst_ip")
        && has("dst_port")
        && has("path_activated_at")
        && has("src_ip") == has("src_port")
        && members.iter().all(|(name, value)| match name.as_str() {
            "src_ip" | "dst_ip" => is_ip(value),
            "src_port" | "dst_port" => is_port(value),
            "path_activated_at" => instant(value).is_some(),
            _ => false,
        })
}

fn is_ip(value: &Value) -> bool {
    value.as_str().is_some_and(|text| text.parse::<std::net::IpAddr>().is_ok())
}

fn is_port(value: &Value) -> bool {
    value.as_u64().is_some_and(|port| (1..=65535).contains(&port))
}

/// RFC 3339 in UTC with up to nine digits behind the second, as something that can be compared.
fn instant(value: &Value) -> Option<(String, String)> {
    const SHAPE: &[u8] = b"0000-00-00T00:00:00";
    let text = value.as_str()?.strip_suffix('Z')?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, "0"));
    let digit = |(is, shape): (u8, &u8)| if *shape == b'0' { is.is_ascii_digit() } else { is == *shape };
    let well = whole.len() == SHAPE.len()
        && whole.bytes().zip(SHAPE).all(digit)
        && (1..=9).contains(&fraction.len())
        && fraction.bytes().all(|byte| byte.is_ascii_digit());
    well.then(|| (whole.to_owned(), format!("{fraction:0<9}")))
}

/// The listener's thread; its connections have threads of their own. Dropping it ends them all.
struct Server {
    ends: Arc<AtomicBool>,
    listener: Option<JoinHandle<()>>,
}

impl Server {
    fn start(listener: TcpListener, tls: Arc<rustls::ServerConfig>, shared: &Arc<Shared>) -> Result<Self> {
        listener.set_nonblocking(true)?;
        let ends = Arc::new(AtomicBool::new(false));
        let (end, shared) = (Arc::clone(&ends), Arc::clone(shared));
        let listener = thread::Builder::new().name("ingest".into()).spawn(move || {
            let mut connections: Vec<(TcpStream, JoinHandle<()>)> = Vec::new();
            while !end.load(Ordering::Relaxed) {
                connections.retain(|(_, thread)| !thread.is_finished());
                let Ok((stream, _)) = listener.accept() else {
                    thread::sleep(LOOK);
                    continue;
                };
                let Ok(handle) = stream.try_clone() else { continue };
                let (tls, shared) = (Arc::clone(&tls), Arc::clone(&shared));
                let thread = thread::spawn(move || {
                    // The other end went away, or was sent away.
                    let _ = converse(stream, tls, &shared);
                });
                connections.push((handle, thread));
            }
            for (stream, thread) in connections {
                let _ = stream.shutdown(Shutdown::Both);
                // A panic in there was printed already.
                let _ = thread.join();
            }
        })?;
        Ok(Self { ends, listener: Some(listener) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}

/// One request after the other, until the connection ends.
fn converse(stream: TcpStream, tls: Arc<rustls::ServerConfig>, shared: &Shared) -> Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(IDLE_LIMIT))?;
    let mut stream = rustls::StreamOwned::new(rustls::ServerConnection::new(tls)?, stream);
    let mut waiting = Vec::new();
    while let Some(text) = read_head(&mut stream, &mut waiting)? {
        let head = parse_head(&text);
        let length = head.length.filter(|length| *length <= MAX_BODY);
        let Some(length) = length else {
            let mut state = shared.lock();
            state.complaints.push(format!("content-length {:?}", head.length));
            state.answers.push(413);
            drop(state);
            return write_reply(&mut stream, 413, &[]);
        };
        let answer = shared.lock().next();
        if answer == Answer::ResetBefore {
            shared.lock().answers.push(0);
            return reset(&stream);
        }
        while waiting.len() < length {
            if !read_some(&mut stream, &mut waiting)? {
                return Ok(());
            }
        }
        let body: Vec<u8> = waiting.drain(..length).collect();
        let reply = shared.lock().handle(answer, &head, &body);
        match reply {
            Reply::Whole(status, headers) => write_reply(&mut stream, status, &headers)?,
            Reply::Torn => {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 26\r\n\r\n{\"data\"")?;
                stream.flush()?;
                return reset(&stream);
            }
        }
    }
    Ok(())
}

/// Linger 0 turns the close into a reset. The listener drops its handle, the last, at its next look.
fn reset(stream: &rustls::StreamOwned<rustls::ServerConnection, TcpStream>) -> Result<()> {
    SockRef::from(&stream.sock).set_linger(Some(Duration::ZERO))?;
    Ok(())
}

fn read_head(stream: &mut impl Read, waiting: &mut Vec<u8>) -> Result<Option<String>> {
    loop {
        if let Some(end) = waiting.windows(4).position(|four| four == b"\r\n\r\n") {
            let head: Vec<u8> = waiting.drain(..end + 4).collect();
            return Ok(Some(String::from_utf8(head).context("a head that is not text")?));
        }
        anyhow::ensure!(waiting.len() <= MAX_HEAD, "a head without end");
        if !read_some(stream, waiting)? {
            return Ok(None);
        }
    }
}

/// False at the end.
fn read_some(stream: &mut impl Read, waiting: &mut Vec<u8>) -> Result<bool> {
    let mut some = [0; 16 << 10];
    match stream.read(&mut some) {
        Ok(0) => Ok(false),
        Ok(length) => {
            waiting.extend_from_slice(&some[..length]);
            Ok(true)
        }
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn parse_head(text: &str) -> Head {
    let mut lines = text.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ').map(str::to_owned);
    let mut head = Head {
        method: words.next().unwrap_or_default(),
        target: words.next().unwrap_or_default(),
        ..Head::default()
    };
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "authorization" => head.authorization = Some(value.to_owned()),
            "content-type" => head.content_type = Some(value.to_owned()),
            "content-length" => head.length = value.parse().ok(),
            _ => {}
        }
    }
    head
}

fn write_reply(stream: &mut impl Write, status: u16, headers: &[(&'static str, String)]) -> Result<()> {
    let body =
        if status == 200 { r#"{"data":{"status":"ok"}}"# } else { r#"{"error":{"reason":"told so"}}"# };
    let mut text = format!("HTTP/1.1 {status} Said\r\ncontent-type: application/json\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    text += &format!("content-length: {}\r\n\r\n{body}", body.len());
    stream.write_all(text.as_bytes())?;
    stream.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests;
