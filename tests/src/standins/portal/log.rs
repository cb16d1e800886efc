//! Everything that was said, in order and with its time: the script's eyes.
//!
//! One [`Entry`] corresponds to one line of spec/samples/*.portal.jsonl.

use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

/// Which kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Topic `gateway`.
    Gateway,
    /// Topic `client`.
    Client,
}

impl Role {
    /// The Phoenix topic, which is also the first segment of the path.
    #[must_use]
    pub fn topic(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Client => "client",
        }
    }
}

/// What an entry is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// A WebSocket was accepted; `msg` is `{path, query, ua, auth}`.
    Connect,
    /// A WebSocket was refused; `msg` is the problem body plus `path`.
    Refused,
    /// Device to portal; `msg` is the frame.
    ToPortal,
    /// Portal to device; `msg` is the frame.
    FromPortal,
    /// The WebSocket is gone; `msg` is `{reason}`.
    Disconnect,
    /// The portal decided something without saying it; `msg` is `{event, payload}`.
    Note,
}

/// One thing that happened.
#[derive(Debug, Clone, Serialize)]
pub struct Entry {
    /// Seconds since the portal was made.
    #[serde(serialize_with = "as_seconds")]
    pub t: Duration,
    /// The same moment on the monotonic clock.
    #[serde(skip)]
    pub at: Instant,
    /// Whose socket.
    pub peer: Role,
    /// The device's id, unknown when it was refused.
    pub device: Option<Uuid>,
    /// What kind of entry.
    pub dir: Direction,
    /// The frame, or what [`Direction`] says.
    pub msg: Value,
}

impl Entry {
    /// The frame's event, or an empty string.
    #[must_use]
    pub fn event(&self) -> &str {
        self.msg["event"].as_str().unwrap_or_default()
    }

    /// The frame's payload, or null.
    #[must_use]
    pub fn payload(&self) -> &Value {
        &self.msg["payload"]
    }

    /// Did this device say (or was it told) `event`?
    #[must_use]
    pub fn is(&self, peer: Role, dir: Direction, event: &str) -> bool {
        self.peer == peer && self.dir == dir && self.event() == event
    }

    /// Did a gateway say `event`?
    #[must_use]
    pub fn from_gateway(&self, event: &str) -> bool {
        self.is(Role::Gateway, Direction::ToPortal, event)
    }

    /// Was a gateway told `event`?
    #[must_use]
    pub fn to_gateway(&self, event: &str) -> bool {
        self.is(Role::Gateway, Direction::FromPortal, event)
    }

    /// Did a client say `event`?
    #[must_use]
    pub fn from_client(&self, event: &str) -> bool {
        self.is(Role::Client, Direction::ToPortal, event)
    }
}

/// A position in the log; waiting from a mark ignores what happened before it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mark(pub(super) usize);

/// How one authorization went.
#[derive(Debug, Clone, Copy)]
pub struct Timing {
    /// For whom.
    pub client: Uuid,
    /// For what.
    pub resource: Uuid,
    /// Sent to the gateway.
    pub pushed: Instant,
    /// The gateway's acknowledgement, after which the client was told.
    pub acknowledged: Option<Instant>,
}

/// Something that must never be written to a log of the gateway.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Secret {
    /// `token`, `psk`, `ice password`, `turn password`, `relay secret`, `ingest token`.
    pub kind: &'static str,
    /// The text to search for.
    pub value: String,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secret({})", self.kind)
    }
}

fn as_seconds<S: serde::Serializer>(t: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(t.as_secs_f64())
}
