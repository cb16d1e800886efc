//! What the portal tells a client, as far as this client reads it (spec/samples/*.portal.jsonl).

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::Value;
use uuid::Uuid;

use super::turn::RelayId;

/// What a client needs of its `init`.
#[derive(Deserialize)]
pub(super) struct Init {
    pub(super) interface: Interface,
    #[serde(default)]
    pub(super) resources: Vec<Value>,
    #[serde(default)]
    pub(super) relays: Vec<RelayEntry>,
}

/// Our tunnel addresses.
#[derive(Deserialize)]
pub(super) struct Interface {
    pub(super) ipv4: Ipv4Addr,
    pub(super) ipv6: Ipv6Addr,
}

/// One address of a relay; a dual-stack relay is two entries (portal-protocol.md section 7.3).
#[derive(Clone, PartialEq, Deserialize)]
pub(super) struct RelayEntry {
    pub(super) id: RelayId,
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) addr: SocketAddr,
    #[serde(default)]
    pub(super) username: String,
    #[serde(default)]
    pub(super) password: String,
}

/// `relays_presence`.
#[derive(Deserialize)]
pub(super) struct Presence {
    pub(super) disconnected_ids: Vec<RelayId>,
    pub(super) connected: Vec<RelayEntry>,
}

/// `authorization_created`, or `flow_created` of Nov-2025.
#[derive(Deserialize)]
pub(super) struct Granted {
    pub(super) resource_id: Uuid,
    pub(super) gateway_id: Uuid,
    pub(super) gateway_public_key: String,
    pub(super) preshared_key: String,
    pub(super) client_ice_credentials: WireCreds,
    pub(super) gateway_ice_credentials: WireCreds,
    #[serde(default)]
    pub(super) use_iceless: bool,
}

/// ufrag and password.
#[derive(Deserialize)]
pub(super) struct WireCreds {
    pub(super) username: String,
    pub(super) password: String,
}

/// `ice_candidates` and `invalidate_ice_candidates`.
#[derive(Deserialize)]
pub(super) struct Candidates {
    pub(super) gateway_id: Uuid,
    pub(super) candidates: Vec<Value>,
}

/// A WireGuard key: base64 of exactly 32 bytes.
pub(super) fn key(text: &str) -> Result<[u8; 32]> {
    let bytes = STANDARD.decode(text)?;
    <[u8; 32]>::try_from(bytes).map_err(|bytes| anyhow::anyhow!("a key has 32 bytes, not {}", bytes.len()))
}
