//! Phoenix serializer 1.0.0: one text frame is one JSON object (portal-protocol.md section 5).
//!
//! Both stand-ins frame with this file; what the events mean is not known here.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// One message in either direction.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Frame {
    /// `gateway`, `client` or `phoenix`.
    pub topic: String,
    /// The event's name.
    pub event: String,
    /// Whatever the event carries.
    #[serde(default)]
    pub payload: Value,
    /// The sender's counter; pushes from the portal carry `null`.
    #[serde(rename = "ref", default)]
    pub reference: Option<u64>,
}

impl Frame {
    /// A push: portal to device, without a ref.
    #[must_use]
    pub fn push(topic: &str, event: &str, payload: Value) -> Self {
        Self { topic: topic.into(), event: event.into(), payload, reference: None }
    }

    /// The good answer to `request`: status ok and exactly the empty object (section 5.1).
    #[must_use]
    pub fn ok(request: &Self) -> Self {
        Self::reply(request, "ok", json!({}))
    }

    /// The bad answer to `request`.
    #[must_use]
    pub fn error(request: &Self, reason: &str) -> Self {
        Self::reply(request, "error", json!({ "reason": reason }))
    }

    fn reply(request: &Self, status: &str, response: Value) -> Self {
        Self {
            topic: request.topic.clone(),
            event: "phx_reply".into(),
            payload: json!({ "status": status, "response": response }),
            reference: request.reference,
        }
    }

    /// Reads one text frame.
    ///
    /// # Errors
    /// When it is not a JSON object with at least `topic` and `event`.
    pub fn decode(text: &str) -> Result<Self> {
        serde_json::from_str(text).context("not a Phoenix 1.0.0 message")
    }

    /// Writes one text frame.
    #[must_use]
    pub fn encode(&self) -> String {
        serde_json::to_string(self).expect("strings, numbers and JSON values always serialize")
    }

    /// For a `phx_reply`: was it a success?
    #[must_use]
    pub fn is_ok_reply(&self) -> bool {
        self.event == "phx_reply" && self.payload["status"] == "ok"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_written_as_the_samples_show_them() {
        let join = r#"{"topic":"gateway","event":"phx_join","payload":null,"ref":0}"#;
        let frame = Frame::decode(join).unwrap();
        assert_eq!(frame.encode(), join);
        let reply: Value = serde_json::from_str(&Frame::ok(&frame).encode()).unwrap();
        assert_eq!(
            reply,
            json!({"event":"phx_reply","payload":{"response":{},"status":"ok"},"ref":0,"topic":"gateway"})
        );
        let error = Frame::error(&frame, "unmatched topic");
        assert_eq!(error.payload, json!({"response":{"reason":"unmatched topic"},"status":"error"}));
        assert!(!error.is_ok_reply());
    }

    #[test]
    fn pushes_carry_a_null_ref() {
        let push: Value = serde_json::from_str(&Frame::push("gateway", "init", json!({})).encode()).unwrap();
        assert_eq!(push, json!({"event":"init","payload":{},"ref":null,"topic":"gateway"}));
    }

    #[test]
    fn every_recorded_message_survives_a_round_trip() {
        const SAMPLES: [&str; 4] = [
            include_str!("../../../gateway/proto/tests/samples/head-direct.gateway.jsonl"),
            include_str!("../../../gateway/proto/tests/samples/head-relayed.gateway.jsonl"),
            include_str!("../../../gateway/proto/tests/samples/head-relayed-iceless.gateway.jsonl"),
            include_str!("../../../gateway/proto/tests/samples/nov25-relayed.gateway.jsonl"),
        ];
        for text in SAMPLES {
            let mut messages = 0;
            for line in text.lines() {
                let entry: Value = serde_json::from_str(line).unwrap();
                if entry["dir"] == "to-portal" || entry["dir"] == "from-portal" {
                    let frame = Frame::decode(&entry["msg"].to_string()).unwrap();
                    assert_eq!(serde_json::from_str::<Value>(&frame.encode()).unwrap(), entry["msg"]);
                    messages += 1;
                }
            }
            assert!(messages > 5, "a recording of {messages} messages");
        }
    }
}
