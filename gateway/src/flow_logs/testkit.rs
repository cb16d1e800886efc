//! What the tests of flow logs have in common: one authorization, one flow.

use std::{sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use gateway_proto::{
    flow::{Attribution, FlowEnd, FlowId, FlowProtocol, FlowReport, Outer, UnixTime},
    ids::{ClientId, PolicyAuthorizationId},
    names::DomainName,
    portal::{ingest_token, messages::Secret},
};
use serde_json::{Value, json};
use uuid::Uuid;
use zeroize::Zeroizing;

/// 2026-08-01T10:00:00 and 500 ns.
const START: Duration = Duration::new(1_785_578_400, 500);

/// When tokens expire.
pub const EXPIRY: u64 = 1_900_000_000;

pub fn id() -> PolicyAuthorizationId {
    PolicyAuthorizationId(Uuid::from_u128(0x0d1c_7a55_9b7e_4f6c_8a3e_5f1b_2c3d_4e5f))
}

/// All claims there are; each text one `claimed <name>`.
pub fn claims() -> Value {
    let mut claims = json!({
        "iat": 1_760_000_000, "exp": EXPIRY, "uploads_enabled": true, "role": "responder",
        "policy_authorization_id": id().to_string(),
    });
    for name in CLAIMED {
        claims[name] = format!("claimed {name}").into();
    }
    claims["account_id"] = "the account".into();
    claims
}

/// The claims that are printed as they are.
pub const CLAIMED: [&str; 19] = [
    "initiator_device_id",
    "responder_device_id",
    "policy_id",
    "resource_id",
    "resource_name",
    "resource_address",
    "initiator_actor_id",
    "initiator_actor_name",
    "initiator_actor_email",
    "initiator_auth_provider_id",
    "authorized_at",
    "authorization_expires_at",
    "initiator_client_version",
    "initiator_device_os_name",
    "initiator_device_os_version",
    "initiator_device_serial",
    "initiator_device_uuid",
    "initiator_device_identifier_for_vendor",
    "initiator_device_firebase_installation_id",
];

pub fn token_of(claims: &Value) -> Secret {
    let claims = URL_SAFE_NO_PAD.encode(claims.to_string());
    Secret(Zeroizing::new(format!("eyJhbGciOiJIUzI1NiJ9.{claims}.c2lnbmF0dXJl")))
}

pub fn attribution() -> Arc<Attribution> {
    attribution_of(id())
}

pub fn attribution_of(id: PolicyAuthorizationId) -> Arc<Attribution> {
    let mut claims = claims();
    claims["policy_authorization_id"] = id.to_string().into();
    Arc::new(ingest_token::parse(token_of(&claims)).unwrap())
}

pub fn domain(name: &str) -> Option<DomainName> {
    Some(DomainName::parse(name).unwrap())
}

/// A TCP flow that goes on.
pub fn report() -> FlowReport {
    FlowReport {
        id: FlowId(7),
        client: ClientId(Uuid::from_u128(1)),
        attribution: attribution(),
        protocol: FlowProtocol::Tcp,
        src: "100.64.0.1:1234".parse().unwrap(),
        dst: "10.0.0.5:443".parse().unwrap(),
        domain: None,
        outers: vec![Outer {
            src: Some("198.51.100.9:40112".parse().unwrap()),
            dst: "203.0.113.4:52625".parse().unwrap(),
            since: UnixTime(START),
        }],
        start: UnixTime(START),
        end: None,
    }
}

/// The same at its end.
pub fn ended() -> FlowReport {
    let end = FlowEnd {
        end: UnixTime(START + Duration::new(122, 999_999_500)),
        last_packet: UnixTime(START + Duration::new(3, 249_999_500)),
        rx_packets: 5,
        tx_packets: 4,
        rx_bytes: 3000,
        tx_bytes: 77,
    };
    FlowReport { end: Some(end), ..report() }
}

/// One of many flows: they began `number` seconds later.
pub fn numbered(number: u64, report: FlowReport) -> FlowReport {
    let later = Duration::from_secs(number);
    FlowReport { id: FlowId(number), start: UnixTime(report.start.0 + later), ..report }
}
