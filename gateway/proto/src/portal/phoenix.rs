//! Frames of the Phoenix channels protocol, serializer 1.0.0 (portal-protocol.md section 5): one JSON object per text
//! frame. It must not know what the events mean; [`super::session`] does.

use std::fmt;

use serde::Deserialize;
use serde_json::{Value, json};

/// The topic of everything but heartbeats.
pub const TOPIC_GATEWAY: &str = "gateway";
/// The topic of heartbeats.
pub const TOPIC_PHOENIX: &str = "phoenix";

/// One message to the portal. All four keys are required by the server.
#[must_use]
pub fn encode(topic: &str, event: &str, payload: &Value, reference: u64) -> String {
    json!({ "topic": topic, "event": event, "payload": payload, "ref": reference }).to_string()
}

/// One message from the portal. Its `Debug` leaves the payload out, which may hold keys.
#[derive(Clone, PartialEq)]
pub enum Frame {
    /// Not an answer.
    Push {
        /// `gateway`, normally.
        topic: String,
        /// What it is.
        event: String,
        /// What it says; null if absent.
        payload: Value,
    },
    /// The answer to our message `reference`; `None` was null or not a number.
    Reply {
        /// The number we sent.
        reference: Option<u64>,
        /// The outcome.
        status: Status,
    },
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Push { topic, event, .. } => {
                f.debug_struct("Push").field("topic", topic).field("event", event).finish_non_exhaustive()
            }
            Self::Reply { reference, status } => {
                f.debug_struct("Reply").field("reference", reference).field("status", status).finish()
            }
        }
    }
}

/// The outcome in a reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// `ok` with exactly the empty object: the only acknowledgement of joins and heartbeats (section 5.1).
    Ok,
    /// `ok` with anything else: acknowledges nothing.
    OkWith,
    /// `error`, with its reason, or with an empty text.
    Error(String),
}

/// A text frame that is not a Phoenix message. It quotes nothing of the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a Phoenix message (problem near column {column})")]
pub struct DecodeError {
    column: usize,
}

/// Reads one text frame. Unknown top-level members are ignored.
///
/// # Errors
/// Not JSON, or not an object with a text `event`.
pub fn decode(text: &str) -> Result<Frame, DecodeError> {
    // serde_json's own error text quotes values, which may be keys.
    let envelope: Envelope = serde_json::from_str(text).map_err(|e| DecodeError { column: e.column() })?;
    if envelope.event != "phx_reply" {
        return Ok(Frame::Push { topic: envelope.topic, event: envelope.event, payload: envelope.payload });
    }
    let response = envelope.payload.get("response");
    let status = match envelope.payload.get("status").and_then(Value::as_str) {
        Some("ok") if response.and_then(Value::as_object).is_some_and(serde_json::Map::is_empty) => {
            Status::Ok
        }
        Some("error") => {
            let reason = response.and_then(|response| response.get("reason")).and_then(Value::as_str);
            Status::Error(reason.unwrap_or_default().to_owned())
        }
        _ => Status::OkWith,
    };
    Ok(Frame::Reply { reference: envelope.reference.as_u64(), status })
}

#[derive(Deserialize)]
struct Envelope {
    #[serde(default)]
    topic: String,
    event: String,
    #[serde(default)]
    payload: Value,
    #[serde(default, rename = "ref")]
    reference: Value,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_have_all_four_keys() {
        let read = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        let join = encode(TOPIC_GATEWAY, "phx_join", &Value::Null, 0);
        assert_eq!(read(&join), read(r#"{"topic":"gateway","event":"phx_join","payload":null,"ref":0}"#));
        let beat = encode(TOPIC_PHOENIX, "heartbeat", &json!({}), 7);
        assert_eq!(read(&beat), read(r#"{"topic":"phoenix","event":"heartbeat","payload":{},"ref":7}"#));
    }

    #[test]
    fn replies_are_told_apart() {
        let reply = |reference, status| Ok(Frame::Reply { reference, status });
        for (text, expect) in [
            (
                r#"{"event":"phx_reply","payload":{"response":{},"status":"ok"},"ref":0,"topic":"gateway"}"#,
                reply(Some(0), Status::Ok),
            ),
            (
                r#"{"event":"phx_reply","payload":{"response":null,"status":"ok"},"ref":1,"topic":"gateway"}"#,
                reply(Some(1), Status::OkWith),
            ),
            (
                r#"{"event":"phx_reply","payload":{"response":{"x":1},"status":"ok"},"ref":1,"topic":"gateway"}"#,
                reply(Some(1), Status::OkWith),
            ),
            (
                r#"{"event":"phx_reply","payload":{"response":{"reason":"unmatched topic"},"status":"error"},"ref":12,"topic":"gateway","join_ref":null,"new":[]}"#,
                reply(Some(12), Status::Error("unmatched topic".into())),
            ),
            (
                r#"{"event":"phx_reply","payload":{"response":{},"status":"error"},"ref":null,"topic":"gateway"}"#,
                reply(None, Status::Error(String::new())),
            ),
            (r#"{"event":"phx_reply","ref":"3"}"#, reply(None, Status::OkWith)),
            (
                r#"{"event":"phx_close","payload":{},"ref":null,"topic":"gateway"}"#,
                Ok(Frame::Push { topic: "gateway".into(), event: "phx_close".into(), payload: json!({}) }),
            ),
        ] {
            assert_eq!(decode(text), expect, "{text}");
        }
    }

    #[test]
    fn junk_is_an_error_that_quotes_nothing() {
        let deep = "[".repeat(100_000);
        for text in [
            "",
            "{",
            "[]",
            "null",
            "7",
            r#"{"event":7}"#,
            r#"{"event":"secret-value"#,
            r#""secret-value""#,
            &deep,
        ] {
            let error = decode(text).unwrap_err();
            assert!(!error.to_string().contains("secret-value"));
        }
    }
}
