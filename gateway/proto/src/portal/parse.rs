//! JSON of the portal to [`Ingress`] (portal-protocol.md sections 7 and 8).
//!
//! Upstream discards a whole message for one odd member (section 14 item 11). Here only what a message cannot be
//! acted upon without is required; the rest is left out with a warning. Two rules bound the leniency: nothing that is
//! left out may widen access (so an unreadable filter never becomes "permit everything", an unreadable expiry never
//! "for ever"), and no warning quotes a value, because values are names, addresses and keys.

use std::net::{IpAddr, SocketAddr};

use base64::{Engine, engine::general_purpose::STANDARD};
use ipnet::IpNet;
use serde_json::{Map, Value};
use uuid::Uuid;
use zeroize::Zeroizing;

use super::messages::{
    AuthorizationRef, Authorize, ClientIdentity, Filter, FlowLogs, IceCredentials, Ingress, Init, Key, Relay,
    Resource, ResourceKind, Secret, UnixSeconds,
};
use crate::{
    addr::TunnelAddrs,
    ids::{ClientId, RelayId, ResourceId},
};

/// What a push of the portal turned out to be.
#[derive(Debug, Clone, PartialEq)]
pub enum Parsed {
    /// Ours.
    Message {
        /// The message.
        ingress: Ingress,
        /// One sentence per thing that was left out or corrected; free of secrets, names and addresses.
        warnings: Vec<String>,
    },
    /// An event we do not speak (the legacy connection scheme, or something newer than this gateway).
    NotOurs,
    /// Ours, but something it cannot be acted upon without is missing or unreadable. The text names the member.
    Malformed(String),
}

/// Parses one push. `event` and `payload` are the members of the Phoenix message.
#[must_use]
pub fn parse_ingress(event: &str, payload: &Value) -> Parsed {
    let mut warnings = Vec::new();
    let w = &mut warnings;
    let parsed = match event {
        "init" => init(payload, w).map(|init| Ingress::Init(Box::new(init))),
        // v2 and v1 name of one thing.
        "create_authorization" | "authorize_flow" => {
            authorize(payload, w).map(|authorize| Ingress::Authorize(Box::new(authorize)))
        }
        "reject_access" => pair(payload).map(|(client, resource)| Ingress::RejectAccess(client, resource)),
        "resource_updated" => resource(payload, "payload", w).map(Ingress::ResourceUpdated),
        "ice_candidates" => candidates(payload, w).map(|(client, list)| Ingress::IceCandidates(client, list)),
        "invalidate_ice_candidates" => {
            candidates(payload, w).map(|(client, list)| Ingress::InvalidateIceCandidates(client, list))
        }
        "relays_presence" => relays_presence(payload, w),
        "access_authorization_expiry_updated" => expiry_updated(payload),
        _ => return Parsed::NotOurs,
    };
    match parsed {
        Ok(ingress) => Parsed::Message { ingress, warnings },
        Err(Malformed(what)) => Parsed::Malformed(what),
    }
}

struct Malformed(String);

type Result<T> = std::result::Result<T, Malformed>;

fn init(payload: &Value, w: &mut Vec<String>) -> Result<Init> {
    let payload = object(payload, "payload")?;
    let interface = object(payload.get("interface").unwrap_or(&Value::Null), "interface")?;
    Ok(Init {
        interface: tunnel_addrs(interface, "interface")?,
        account_slug: optional(payload, "account_slug", w, |v| v.as_str().map(str::to_owned)),
        relays: list(payload, "relays", w).map(|entries| relays(entries, "relays", w)).unwrap_or_default(),
        // A pair that cannot be read is left out, which revokes it: the portal will grant it again when it is used.
        authorizations: list(payload, "authorizations", w)
            .map(|entries| each(entries, "authorizations", w, authorization_ref)),
        flow_logs: optional(payload, "flow_logs", w, flow_logs),
    })
}

fn authorize(payload: &Value, w: &mut Vec<String>) -> Result<Authorize> {
    let payload = object(payload, "payload")?;
    let client = object(payload.get("client").unwrap_or(&Value::Null), "client")?;
    Ok(Authorize {
        reference: required(payload, "ref", "a string", |v| v.as_str().map(str::to_owned))?,
        resource: resource(payload.get("resource").unwrap_or(&Value::Null), "resource", w)?,
        client: ClientIdentity {
            id: required(client, "id", "a client id", uuid).map(ClientId)?,
            public_key: *key(client, "public_key")?,
            preshared_key: Key(key(client, "preshared_key")?),
            tunnel: tunnel_addrs(client, "client")?,
        },
        client_ice: required(payload, "client_ice_credentials", "ICE credentials", ice_credentials)?,
        gateway_ice: required(payload, "gateway_ice_credentials", "ICE credentials", ice_credentials)?,
        expires_at: expires_at(payload)
            .ok_or_else(|| Malformed("`expires_at` is neither unix seconds nor null".to_owned()))?,
        use_iceless: optional(payload, "use_iceless", w, Value::as_bool).unwrap_or(false),
        flow_logs_ingest_token: optional(payload, "flow_logs_ingest_token", w, ingest_token),
    })
}

fn candidates(payload: &Value, w: &mut Vec<String>) -> Result<(ClientId, Vec<String>)> {
    let payload = object(payload, "payload")?;
    let client = required(payload, "client_id", "a client id", uuid).map(ClientId)?;
    let entries = required(payload, "candidates", "a list", Value::as_array)?;
    Ok((client, each(entries, "candidates", w, candidate)))
}

fn relays_presence(payload: &Value, w: &mut Vec<String>) -> Result<Ingress> {
    let payload = object(payload, "payload")?;
    let disconnected = list(payload, "disconnected_ids", w)
        .map(|entries| each(entries, "disconnected_ids", w, |id| uuid(id).map(RelayId)))
        .unwrap_or_default();
    let connected =
        list(payload, "connected", w).map(|entries| relays(entries, "connected", w)).unwrap_or_default();
    Ok(Ingress::RelaysPresence { disconnected, connected })
}

fn expiry_updated(payload: &Value) -> Result<Ingress> {
    let (client, resource) = pair(payload)?;
    let expires_at = required(object(payload, "payload")?, "expires_at", "unix seconds", unix_seconds)?;
    Ok(Ingress::ExpiryUpdated(client, resource, expires_at))
}

fn pair(payload: &Value) -> Result<(ClientId, ResourceId)> {
    let payload = object(payload, "payload")?;
    let client = required(payload, "client_id", "a client id", uuid).map(ClientId)?;
    let resource = required(payload, "resource_id", "a resource id", uuid).map(ResourceId)?;
    Ok((client, resource))
}

fn authorization_ref(entry: &Value) -> Option<AuthorizationRef> {
    let entry = entry.as_object()?;
    Some(AuthorizationRef {
        client: ClientId(uuid(entry.get("client_id")?)?),
        resource: ResourceId(uuid(entry.get("resource_id")?)?),
        expires_at: expires_at(entry)?,
    })
}

fn flow_logs(value: &Value) -> Option<FlowLogs> {
    Some(FlowLogs {
        api_url: value.get("api_url")?.as_str()?.to_owned(),
        upload_interval_secs: value.get("upload_interval_secs")?.as_u64()?,
        upload_batch_size: value.get("upload_batch_size")?.as_u64()?,
    })
}

/// Section 7.1. `at` is where the object stands, for the texts.
fn resource(value: &Value, at: &str, w: &mut Vec<String>) -> Result<Resource> {
    let resource = object(value, at)?;
    let id = required(resource, "id", "a resource id", uuid).map(ResourceId)?;
    let name = || resource.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
    let kind = match resource.get("type").and_then(Value::as_str) {
        // Portals render `ip` as `cidr`; one that does not means the same.
        Some("cidr" | "ip") => {
            let given = required(resource, "address", "a network", network)?;
            let network = given.trunc();
            if network != given {
                w.push(format!("{at}: `address` has host bits set; they are cleared"));
            }
            ResourceKind::Cidr { name: name(), network, filters: filters(resource, at, w) }
        }
        Some("dns") => {
            let pattern = required(resource, "address", "a name", |v| v.as_str().map(str::to_owned))?;
            ResourceKind::Dns { name: name(), pattern, filters: filters(resource, at, w) }
        }
        Some("internet") => ResourceKind::Internet,
        _ => return Err(Malformed(format!("{at}: `type` is not one this gateway knows"))),
    };
    Ok(Resource { id, kind })
}

/// Section 7.2. Only a list that arrived empty permits everything.
fn filters(resource: &Map<String, Value>, at: &str, w: &mut Vec<String>) -> Vec<Filter> {
    let Some(entries) = resource.get("filters").and_then(Value::as_array) else {
        w.push(format!("{at}: `filters` is missing or not a list; the resource permits nothing"));
        return vec![Filter::NEVER];
    };
    let filters = each(entries, "filters", w, filter);
    if filters.is_empty() && !entries.is_empty() {
        w.push(format!("{at}: no entry of `filters` could be read; the resource permits nothing"));
        return vec![Filter::NEVER];
    }
    filters
}

fn filter(entry: &Value) -> Option<Filter> {
    let port = |key: &str, default: u16| match entry.get(key) {
        None => Some(default),
        Some(port) => u16::try_from(port.as_u64()?).ok(),
    };
    let range = || Some((port("port_range_start", 0)?, port("port_range_end", u16::MAX)?));
    match entry.get("protocol")?.as_str()? {
        "tcp" => range().map(|(first, last)| Filter::Tcp { first, last }),
        "udp" => range().map(|(first, last)| Filter::Udp { first, last }),
        "icmp" => Some(Filter::Icmp),
        _ => None,
    }
}

/// Section 7.3. `stun` entries are not for gateways.
fn relays(entries: &[Value], at: &str, w: &mut Vec<String>) -> Vec<Relay> {
    each(entries, at, w, |entry| match entry.get("type")?.as_str()? {
        "stun" => Some(None),
        "turn" => Some(Some(Relay {
            id: RelayId(uuid(entry.get("id")?)?),
            addr: entry.get("addr")?.as_str()?.parse::<SocketAddr>().ok().filter(|addr| addr.port() != 0)?,
            username: entry.get("username")?.as_str()?.to_owned(),
            password: Secret(Zeroizing::new(entry.get("password")?.as_str()?.to_owned())),
        })),
        _ => None,
    })
    .into_iter()
    .flatten()
    .collect()
}

/// Section 7.4: starts with `candidate:`, the fourth field is a decimal u32 priority.
fn candidate(value: &Value) -> Option<String> {
    let text = value.as_str()?;
    if !text.starts_with("candidate:") {
        return None;
    }
    text.split_whitespace().nth(3)?.parse::<u32>().ok()?;
    Some(text.to_owned())
}

fn ice_credentials(value: &Value) -> Option<IceCredentials> {
    Some(IceCredentials {
        username: value.get("username")?.as_str()?.to_owned(),
        password: Zeroizing::new(value.get("password")?.as_str()?.to_owned()),
    })
}

/// Three base64url segments (RFC 7515 section 7.1); the claims are read where they are used.
fn ingest_token(value: &Value) -> Option<Secret> {
    let text = value.as_str()?;
    let is_segment =
        |s: &str| !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
    (text.split('.').count() == 3 && text.split('.').all(is_segment))
        .then(|| Secret(Zeroizing::new(text.to_owned())))
}

/// `None` if unreadable, `Some(None)` if absent or null, which is "never ends".
fn expires_at(object: &Map<String, Value>) -> Option<Option<UnixSeconds>> {
    match object.get("expires_at") {
        None | Some(Value::Null) => Some(None),
        Some(value) => unix_seconds(value).map(Some),
    }
}

/// A time before 1970 is as expired as 1970.
fn unix_seconds(value: &Value) -> Option<UnixSeconds> {
    value.as_u64().or_else(|| value.as_i64().map(|_| 0)).map(UnixSeconds)
}

/// A network; a bare address is a network of one.
fn network(value: &Value) -> Option<IpNet> {
    let text = value.as_str()?;
    text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// Standard base64 of exactly 32 bytes; anything else rejects the message (section 7).
fn key(object: &Map<String, Value>, name: &str) -> Result<Zeroizing<[u8; 32]>> {
    required(object, name, "32 bytes in base64", |value| {
        // 44 characters decode to at most 33 bytes.
        let text = value.as_str().filter(|text| text.len() == 44)?;
        let mut decoded = Zeroizing::new([0; 33]);
        let len = STANDARD.decode_slice(text, &mut *decoded).ok()?;
        let key = decoded[..len].try_into().ok()?;
        Some(Zeroizing::new(key))
    })
}

fn tunnel_addrs(object: &Map<String, Value>, at: &str) -> Result<TunnelAddrs> {
    let at = |Malformed(what): Malformed| Malformed(format!("{at}: {what}"));
    Ok(TunnelAddrs {
        v4: required(object, "ipv4", "an IPv4 address", |v| v.as_str()?.parse().ok()).map_err(at)?,
        v6: required(object, "ipv6", "an IPv6 address", |v| v.as_str()?.parse().ok()).map_err(at)?,
    })
}

fn uuid(value: &Value) -> Option<Uuid> {
    value.as_str()?.parse().ok()
}

fn object<'a>(value: &'a Value, at: &str) -> Result<&'a Map<String, Value>> {
    value.as_object().ok_or_else(|| Malformed(format!("{at} is missing or not an object")))
}

fn required<'a, T>(
    object: &'a Map<String, Value>,
    name: &str,
    kind: &str,
    read: impl FnOnce(&'a Value) -> Option<T>,
) -> Result<T> {
    object.get(name).and_then(read).ok_or_else(|| Malformed(format!("`{name}` is missing or not {kind}")))
}

/// Absent and null are ordinary; present and unreadable is a warning.
fn optional<T>(
    object: &Map<String, Value>,
    name: &str,
    w: &mut Vec<String>,
    read: impl FnOnce(&Value) -> Option<T>,
) -> Option<T> {
    let value = object.get(name).filter(|value| !value.is_null())?;
    let read = read(value);
    if read.is_none() {
        w.push(format!("`{name}` could not be read and is left out"));
    }
    read
}

fn list<'a>(object: &'a Map<String, Value>, name: &str, w: &mut Vec<String>) -> Option<&'a [Value]> {
    let value = object.get(name).filter(|value| !value.is_null())?;
    let list = value.as_array().map(Vec::as_slice);
    if list.is_none() {
        w.push(format!("`{name}` is not a list and is left out"));
    }
    list
}

/// Reads what can be read; one warning counts the rest, however many.
fn each<T>(entries: &[Value], name: &str, w: &mut Vec<String>, read: impl Fn(&Value) -> Option<T>) -> Vec<T> {
    let readable: Vec<T> = entries.iter().filter_map(read).collect();
    let lost = entries.len() - readable.len();
    if lost > 0 {
        w.push(format!("`{name}`: {lost} of {} entries could not be read and are left out", entries.len()));
    }
    readable
}

#[cfg(test)]
mod tests;
