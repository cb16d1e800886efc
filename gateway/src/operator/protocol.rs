//! The lines of the control socket: one request, one answer, JSON each, with the version of the protocol in both.
//!
//! ```text
//! {"version":1,"request":"why","src":"100.64.0.7","dst":"10.0.0.5","protocol":"tcp","port":443}
//! {"version":1,"ok":{...}}        {"version":1,"error":{"code":"unknown_request","message":"..."}}
//! ```

use std::net::IpAddr;

use gateway_proto::{
    ClientId,
    inquiry::{Imagined, MAX_FLOWS_TOLD},
    worker::inner::Transport,
};
use serde_json::{Map, Value, json};

/// The version of requests and answers. Fields may be added without a new one.
pub const VERSION: u64 = 1;
/// The longest request, in bytes, with its end of line.
pub const MAX_REQUEST: usize = 64 << 10;

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// How everything is.
    Status,
    /// The page of /metrics.
    Metrics,
    /// What would become of a packet.
    Why(Imagined),
    /// Which flows are open.
    Flows {
        /// Whose; `None` for everybody's.
        client: Option<ClientId>,
        /// At most so many.
        most: usize,
    },
    /// To switch the fast path.
    FastPath(FastPathMode),
}

/// How the fast path is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FastPathMode {
    /// In use, where it can be.
    On,
    /// Not in use.
    Off,
    /// As `--fast-path` says.
    Auto,
}

/// The names of all requests.
const NAMES: [&str; 5] = ["status", "metrics", "why", "flows", "fast-path"];
/// Flows that are told if nobody says how many.
pub const FLOWS: usize = 50;

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// For programs.
    pub code: &'static str,
    /// For people: what is wrong, and what to do.
    pub message: String,
}

impl Refusal {
    /// One.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// Reads one line, without its end.
///
/// # Errors
/// What is wrong with it.
pub fn parse(line: &[u8]) -> Result<Request, Refusal> {
    let not_json = |why: String| Refusal::new("not_json", why);
    let value: Value = serde_json::from_slice(line)
        .map_err(|e| not_json(format!("The request is no JSON ({e}); send one JSON object per line")))?;
    let Value::Object(mut fields) = value else {
        return Err(not_json("The request is no JSON object; send one object per line".to_owned()));
    };
    match fields.remove("version") {
        Some(version) if version == VERSION => {}
        Some(version) => {
            return Err(Refusal::new(
                "version",
                format!(
                    "This gateway speaks version {VERSION} of the protocol, not {}; use the firezone-gateway of the \
                     same version",
                    short(&version)
                ),
            ));
        }
        None => return Err(Refusal::new("version", format!("Name the version: \"version\":{VERSION}"))),
    }
    let name = fields.remove("request");
    let request = match name.as_ref().and_then(Value::as_str) {
        Some("status") => Request::Status,
        Some("metrics") => Request::Metrics,
        Some("why") => Request::Why(imagined(&mut fields)?),
        Some("flows") => flows(&mut fields)?,
        Some("fast-path") => fast_path(&mut fields)?,
        _ => {
            let name = name.as_ref().map_or_else(|| "nothing".to_owned(), short);
            let known = NAMES.join(", ");
            let message = format!("{name} is no request of this gateway; \"request\" must be one of {known}");
            return Err(Refusal::new("unknown_request", message));
        }
    };
    match fields.keys().next() {
        None => Ok(request),
        Some(field) => {
            Err(bad(format!("{} means nothing here; leave it out", short(&Value::String(field.clone())))))
        }
    }
}

fn bad(message: String) -> Refusal {
    Refusal::new("bad_argument", message)
}

/// What somebody sent, cut to what a message can bear.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(40) {
        Some((at, _)) => format!("{}...", &text[..at]),
        None => text,
    }
}

fn imagined(fields: &mut Map<String, Value>) -> Result<Imagined, Refusal> {
    let (src, dst) = (address(fields, "src")?, address(fields, "dst")?);
    if src.is_ipv4() != dst.is_ipv4() {
        return Err(bad("\"src\" and \"dst\" must be of one family, IPv4 or IPv6".to_owned()));
    }
    let protocol = match fields.remove("protocol") {
        Some(Value::String(word)) => word.to_lowercase(),
        Some(Value::Number(number)) => number.to_string(),
        _ => return Err(bad("\"protocol\" must be tcp, udp, icmp or a protocol number".to_owned())),
    };
    let port = match fields.remove("port") {
        None | Some(Value::Null) => None,
        Some(port) => {
            let port = port.as_u64().and_then(|port| u16::try_from(port).ok());
            Some(port.ok_or_else(|| bad("\"port\" must be from 0 to 65535".to_owned()))?)
        }
    };
    let transport = transport(&protocol, port).map_err(bad)?;
    Ok(Imagined { src, dst, transport })
}

/// What `protocol` and `port` mean. Both ports are the one that is named: rules look at the resource's only, and which
/// side that is the gateway finds out.
fn transport(protocol: &str, port: Option<u16>) -> Result<Transport, String> {
    let port_of = |name| port.ok_or_else(|| format!("{name} needs a \"port\", the resource's"));
    Ok(match protocol {
        "tcp" | "6" => {
            let port = port_of("tcp")?;
            Transport::Tcp { src: port, dst: port }
        }
        "udp" | "17" => {
            let port = port_of("udp")?;
            Transport::Udp { src: port, dst: port }
        }
        _ if port.is_some() => return Err(format!("{protocol} has no ports; leave \"port\" out")),
        "icmp" | "icmpv6" | "1" | "58" => Transport::IcmpEcho,
        number => {
            let number = number.parse().map_err(|_| {
                format!("{} is no protocol: tcp, udp, icmp or a protocol number", short(&json!(number)))
            })?;
            Transport::Other(number)
        }
    })
}

fn address(fields: &mut Map<String, Value>, name: &str) -> Result<IpAddr, Refusal> {
    let value = fields.remove(name).unwrap_or(Value::Null);
    let address = value.as_str().and_then(|text| text.parse().ok());
    address.ok_or_else(|| bad(format!("\"{name}\" must be an IP address, not {}", short(&value))))
}

fn flows(fields: &mut Map<String, Value>) -> Result<Request, Refusal> {
    let client = match fields.remove("client") {
        None | Some(Value::Null) => None,
        Some(value) => {
            let id = value.as_str().and_then(|text| text.parse().ok()).map(ClientId);
            let id =
                id.ok_or_else(|| bad(format!("\"client\" must be a client's id, not {}", short(&value))))?;
            Some(id)
        }
    };
    let most = match fields.remove("limit") {
        None | Some(Value::Null) => FLOWS,
        Some(value) => {
            let most = value.as_u64().and_then(|most| usize::try_from(most).ok());
            let most = most.filter(|most| (1..=MAX_FLOWS_TOLD).contains(most));
            most.ok_or_else(|| bad(format!("\"limit\" must be from 1 to {MAX_FLOWS_TOLD}")))?
        }
    };
    Ok(Request::Flows { client, most })
}

fn fast_path(fields: &mut Map<String, Value>) -> Result<Request, Refusal> {
    Ok(Request::FastPath(match fields.remove("mode").as_ref().and_then(Value::as_str) {
        Some("on") => FastPathMode::On,
        Some("off") => FastPathMode::Off,
        Some("auto") => FastPathMode::Auto,
        _ => return Err(bad("\"mode\" must be on, off or auto".to_owned())),
    }))
}

/// The line of an answer, with its end.
pub fn line(answer: Result<Value, Refusal>) -> String {
    let mut line = match answer {
        Ok(value) => json!({ "version": VERSION, "ok": value }),
        Err(Refusal { code, message }) => {
            json!({ "version": VERSION, "error": { "code": code, "message": message } })
        }
    }
    .to_string();
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(src: &str, dst: &str, transport: Transport) -> Request {
        Request::Why(Imagined { src: src.parse().unwrap(), dst: dst.parse().unwrap(), transport })
    }

    #[test]
    fn good_requests_are_read() {
        let id = "11111111-2222-3333-4444-555555555555";
        let tcp = Transport::Tcp { src: 443, dst: 443 };
        let table = [
            (r#"{"version":1,"request":"status"}"#.to_owned(), Request::Status),
            (r#" {"request":"metrics" , "version":1} "#.to_owned(), Request::Metrics),
            (r#"{"version":1,"request":"flows"}"#.to_owned(), Request::Flows { client: None, most: FLOWS }),
            (
                format!(r#"{{"version":1,"request":"flows","client":"{id}","limit":500}}"#),
                Request::Flows { client: Some(ClientId(id.parse().unwrap())), most: 500 },
            ),
            (
                r#"{"version":1,"request":"why","src":"100.64.0.7","dst":"10.0.0.5","protocol":"tcp","port":443}"#
                    .to_owned(),
                why("100.64.0.7", "10.0.0.5", tcp),
            ),
            (
                r#"{"version":1,"request":"why","src":"fd00::1","dst":"fd00::2","protocol":"ICMP","port":null}"#
                    .to_owned(),
                why("fd00::1", "fd00::2", Transport::IcmpEcho),
            ),
            (
                r#"{"version":1,"request":"why","src":"1.1.1.1","dst":"2.2.2.2","protocol":47}"#.to_owned(),
                why("1.1.1.1", "2.2.2.2", Transport::Other(47)),
            ),
            (
                r#"{"version":1,"request":"fast-path","mode":"on"}"#.to_owned(),
                Request::FastPath(FastPathMode::On),
            ),
            (
                r#"{"version":1,"request":"fast-path","mode":"off"}"#.to_owned(),
                Request::FastPath(FastPathMode::Off),
            ),
            (
                r#"{"version":1,"request":"fast-path","mode":"auto"}"#.to_owned(),
                Request::FastPath(FastPathMode::Auto),
            ),
        ];
        for (line, expect) in table {
            assert_eq!(parse(line.as_bytes()), Ok(expect), "{line}");
        }
    }

    #[test]
    fn every_other_line_is_refused_with_a_code_and_the_cure() {
        let why = |rest: &str| format!(r#"{{"version":1,"request":"why",{rest}}}"#);
        let table = [
            (String::new(), "not_json", "one JSON object per line"),
            ("status".to_owned(), "not_json", "one JSON object per line"),
            ("[1]".to_owned(), "not_json", "one object per line"),
            ("null".to_owned(), "not_json", "one object per line"),
            (r#"{"version":1"#.to_owned(), "not_json", "one JSON object per line"),
            (r#"{"version":1,"request":"status"}{}"#.to_owned(), "not_json", "one JSON object per line"),
            ("[".repeat(60_000), "not_json", "one JSON object per line"),
            (r#"{"request":"status"}"#.to_owned(), "version", r#""version":1"#),
            (r#"{"version":2,"request":"status"}"#.to_owned(), "version", "version 1"),
            (r#"{"version":"1","request":"status"}"#.to_owned(), "version", "version 1"),
            (r#"{"version":1.5,"request":"status"}"#.to_owned(), "version", "version 1"),
            (r#"{"version":1}"#.to_owned(), "unknown_request", "status, metrics, why, flows, fast-path"),
            (r#"{"version":1,"request":"Status"}"#.to_owned(), "unknown_request", "must be one of"),
            (r#"{"version":1,"request":7}"#.to_owned(), "unknown_request", "must be one of"),
            (r#"{"version":1,"request":"status","x":1}"#.to_owned(), "bad_argument", "leave it out"),
            (why(r#""src":"x""#), "bad_argument", "\"src\" must be an IP address"),
            (why(r#""src":"1.1.1.1""#), "bad_argument", "\"dst\" must be an IP address"),
            (
                why(r#""src":"1.1.1.1","dst":"::1","protocol":"tcp","port":1"#),
                "bad_argument",
                "of one family",
            ),
            (why(r#""src":"1.1.1.1","dst":"1.1.1.2""#), "bad_argument", "\"protocol\" must be"),
            (why(r#""src":"1.1.1.1","dst":"1.1.1.2","protocol":"tcp""#), "bad_argument", "needs a \"port\""),
            (
                why(r#""src":"1.1.1.1","dst":"1.1.1.2","protocol":"tcp","port":65536"#),
                "bad_argument",
                "0 to 65535",
            ),
            (
                why(r#""src":"1.1.1.1","dst":"1.1.1.2","protocol":"icmp","port":1"#),
                "bad_argument",
                "no ports",
            ),
            (why(r#""src":"1.1.1.1","dst":"1.1.1.2","protocol":"gre""#), "bad_argument", "is no protocol"),
            (why(r#""src":"1.1.1.1","dst":"1.1.1.2","protocol":256"#), "bad_argument", "is no protocol"),
            (r#"{"version":1,"request":"flows","client":"bob"}"#.to_owned(), "bad_argument", "client's id"),
            (r#"{"version":1,"request":"flows","limit":0}"#.to_owned(), "bad_argument", "from 1 to 500"),
            (r#"{"version":1,"request":"flows","limit":501}"#.to_owned(), "bad_argument", "from 1 to 500"),
            (r#"{"version":1,"request":"flows","limit":-1}"#.to_owned(), "bad_argument", "from 1 to 500"),
            (r#"{"version":1,"request":"fast-path"}"#.to_owned(), "bad_argument", "on, off or auto"),
            (
                r#"{"version":1,"request":"fast-path","mode":true}"#.to_owned(),
                "bad_argument",
                "on, off or auto",
            ),
            (
                r#"{"version":1,"request":"fast-path","mode":"ON"}"#.to_owned(),
                "bad_argument",
                "on, off or auto",
            ),
        ];
        for (line, code, cure) in table {
            let refusal = parse(line.as_bytes()).expect_err(&line);
            assert_eq!(refusal.code, code, "{line}: {refusal:?}");
            assert!(refusal.message.contains(cure), "{line}: {refusal:?}");
        }
        assert_eq!(parse(b"\xff\xfe").unwrap_err().code, "not_json");
    }

    #[test]
    fn what_was_sent_comes_back_shortened() {
        let line = format!(r#"{{"version":1,"request":"{}"}}"#, "é".repeat(10_000));
        let refusal = parse(line.as_bytes()).unwrap_err();
        assert!(refusal.message.len() < 300, "{}", refusal.message.len());
    }

    #[test]
    fn an_answer_is_one_line() {
        for answer in [Ok(json!("a\nb")), Err(Refusal::new("code", "a\nb"))] {
            let line = line(answer);
            assert!(line.ends_with('\n') && line.matches('\n').count() == 1, "{line:?}");
        }
    }
}
