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
mod tests {
    use serde_json::json;

    use super::*;

    const CLIENT: &str = "11b7a9b2-3c53-4d2c-8f41-7a0d9c2e5f60";
    const RESOURCE: &str = "5b2f2d3e-7b07-4a52-9a1c-2f6d8e0b4c77";
    const RELAY: &str = "c2a4d7c0-0b0e-4c9e-9a51-5a2f4b7d9c11";

    #[test]
    fn an_init_with_nothing_but_its_interface_is_enough() {
        let Ingress::Init(init) = clean("init", &json!({ "interface": interface() })) else { panic!() };
        assert_eq!(init.interface.v4.to_string(), "100.71.12.9");
        assert_eq!((init.relays.len(), init.authorizations, init.flow_logs), (0, None, None));
    }

    #[test]
    fn one_odd_member_never_costs_an_init() {
        let whole = json!({
            "interface": interface(), "account_slug": "acme", "relays": [relay()],
            "authorizations": [{ "client_id": CLIENT, "resource_id": RESOURCE, "expires_at": 1_788_000_000 }],
            "flow_logs": { "api_url": "https://flows.example.net/", "upload_interval_secs": 60, "upload_batch_size": 0 },
            "config": { "ipv4_masquerade_enabled": true, "ipv6_masquerade_enabled": true },
        });
        let Ingress::Init(expected) = clean("init", &whole) else { panic!() };
        assert_eq!((expected.relays.len(), expected.authorizations.as_ref().unwrap().len()), (1, 1));
        assert!(expected.flow_logs.is_some());
        // member, its odd value, how many warnings
        for (member, odd, warned) in [
            ("account_slug", json!(7), 1),
            ("account_slug", Value::Null, 0),
            ("flow_logs", json!({ "api_url": "x" }), 1),
            ("flow_logs", Value::Null, 0),
            ("config", json!("off"), 0),
            ("relays", json!({}), 1),
            ("relays", json!([relay(), { "id": RELAY }, 7, null]), 1),
            ("relays", json!([{ "id": RELAY, "type": "stun", "addr": "192.0.2.1:3478" }]), 0),
            ("relays", json!([with(relay(), "addr", json!("relay.example.net:3478"))]), 1),
            ("relays", json!([with(relay(), "addr", json!("192.0.2.1:0"))]), 1),
            ("relays", json!([with(relay(), "expires_at", json!("soon"))]), 0),
            ("authorizations", json!("none"), 1),
            ("authorizations", json!([{ "client_id": "me", "resource_id": RESOURCE, "expires_at": 1 }]), 1),
            ("new_member", json!([[[]]]), 0),
        ] {
            let (ingress, warnings) = parse("init", &with(whole.clone(), member, odd.clone()));
            let Ingress::Init(init) = ingress else { panic!() };
            assert_eq!(init.interface, expected.interface, "{member}: {odd}");
            assert_eq!(warnings.len(), warned, "{member}: {odd}: {warnings:?}");
        }
    }

    #[test]
    fn an_authorization_that_cannot_be_read_is_no_authorization() {
        let entry = json!({ "client_id": CLIENT, "resource_id": RESOURCE, "expires_at": 5 });
        let table = [
            (entry.clone(), Some(Some(5))),
            (with(entry.clone(), "expires_at", Value::Null), Some(None)),
            (with(entry.clone(), "expires_at", json!(-3)), Some(Some(0))),
            (with(entry.clone(), "expires_at", json!("tomorrow")), None),
            (with(entry, "client_id", Value::Null), None),
        ];
        for (entry, expect) in table {
            let (ingress, _) = parse("init", &json!({ "interface": interface(), "authorizations": [entry] }));
            let Ingress::Init(init) = ingress else { panic!() };
            let read = init.authorizations.unwrap();
            let read: Vec<_> = read.iter().map(|a| a.expires_at.map(|at| at.0)).collect();
            assert_eq!(read, expect.into_iter().collect::<Vec<_>>(), "{entry}");
        }
    }

    #[test]
    fn odd_optional_members_never_cost_an_authorization() {
        for (member, odd, warned) in [
            ("use_iceless", json!("yes"), 1),
            ("use_iceless", Value::Null, 0),
            ("flow_logs_ingest_token", json!("not a token"), 1),
            ("flow_logs_ingest_token", json!({}), 1),
            ("flow_logs_ingest_token", Value::Null, 0),
            ("expires_at", Value::Null, 0),
            ("subject", json!(3), 0),
        ] {
            let (ingress, warnings) =
                parse("create_authorization", &with(authorization(), member, odd.clone()));
            let Ingress::Authorize(authorize) = ingress else { panic!() };
            assert_eq!(authorize.reference, "SFMyNTY.opaque.signature");
            assert_eq!(warnings.len(), warned, "{member}: {odd}: {warnings:?}");
            assert!(!authorize.use_iceless);
        }
    }

    #[test]
    fn what_an_authorization_needs_is_required_and_named_but_not_quoted() {
        let key33 = STANDARD.encode([7; 33]);
        let key31 = STANDARD.encode([7; 31]);
        for (path, odd, named) in [
            ("ref", Value::Null, "ref"),
            ("client", Value::Null, "client"),
            ("client.public_key", json!(key33), "public_key"),
            ("client.public_key", json!(key31), "public_key"),
            ("client.preshared_key", json!("c2VjcmV0LXZhbHVl"), "preshared_key"),
            ("client.preshared_key", json!(format!("secret-value{}", "=".repeat(32))), "preshared_key"),
            ("client.ipv6", json!("100.64.0.1"), "ipv6"),
            ("client_ice_credentials", json!({ "username": "k3zq" }), "client_ice_credentials"),
            ("gateway_ice_credentials", json!("secret-value"), "gateway_ice_credentials"),
            ("expires_at", json!("secret-value"), "expires_at"),
            ("expires_at", json!(1.5e300), "expires_at"),
            ("resource", json!({ "type": "static_pool", "id": RESOURCE }), "type"),
            ("resource", json!({ "type": "cidr", "id": RESOURCE, "address": "secret-value" }), "address"),
        ] {
            let mut payload = authorization();
            match path.split_once('.') {
                Some((outer, inner)) => payload[outer][inner] = odd.clone(),
                None => payload[path] = odd.clone(),
            }
            let Parsed::Malformed(what) = parse_ingress("authorize_flow", &payload) else {
                panic!("{path}: {odd}")
            };
            assert!(what.contains(named) && !what.contains("secret-value"), "{path}: {what}");
        }
    }

    #[test]
    fn filters_are_read_and_never_widen() {
        let (tcp, udp) =
            (|first, last| Filter::Tcp { first, last }, |first, last| Filter::Udp { first, last });
        for (filters, expect) in [
            (json!([]), vec![]),
            (
                json!([{ "protocol": "tcp", "port_range_start": 443, "port_range_end": 443 }]),
                vec![tcp(443, 443)],
            ),
            (json!([{ "protocol": "tcp" }, { "protocol": "icmp" }]), vec![tcp(0, 65535), Filter::Icmp]),
            (json!([{ "protocol": "udp", "port_range_start": 5 }]), vec![udp(5, 65535)]),
            (json!([{ "protocol": "udp", "port_range_start": 9, "port_range_end": 5 }]), vec![udp(9, 5)]),
            // Unreadable entries go, and a list that becomes empty by that permits nothing.
            (json!([{ "protocol": "sctp" }, { "protocol": "icmp" }]), vec![Filter::Icmp]),
            (json!([{ "protocol": "sctp" }]), vec![Filter::NEVER]),
            (json!([{ "protocol": "tcp", "port_range_start": 70000 }]), vec![Filter::NEVER]),
            (json!([{ "protocol": "tcp", "port_range_start": null }]), vec![Filter::NEVER]),
            (
                json!([{ "protocol": "tcp", "port_range_start": "22", "port_range_end": "22" }]),
                vec![Filter::NEVER],
            ),
            (json!(["tcp", null, 7]), vec![Filter::NEVER]),
            (json!("tcp"), vec![Filter::NEVER]),
            (json!({}), vec![Filter::NEVER]),
            (Value::Null, vec![Filter::NEVER]),
        ] {
            for kind in [("cidr", "10.44.0.0/16"), ("dns", "*.example.net")] {
                let payload =
                    json!({ "type": kind.0, "id": RESOURCE, "address": kind.1, "filters": filters });
                let (Ingress::ResourceUpdated(resource), warnings) = parse("resource_updated", &payload)
                else {
                    panic!()
                };
                let (ResourceKind::Cidr { filters: read, .. } | ResourceKind::Dns { filters: read, .. }) =
                    resource.kind
                else {
                    panic!()
                };
                assert_eq!(read, expect, "{filters}");
                assert!(read != [Filter::NEVER] || !warnings.is_empty(), "{filters} is not silent");
            }
        }
        let (ingress, _) =
            parse("resource_updated", &json!({ "type": "dns", "id": RESOURCE, "address": "a.example.net" }));
        let Ingress::ResourceUpdated(Resource { kind: ResourceKind::Dns { filters, .. }, .. }) = ingress
        else {
            panic!()
        };
        assert_eq!(filters, [Filter::NEVER], "absent is not empty");
    }

    #[test]
    fn networks_lose_their_host_bits_with_a_warning() {
        for (kind, address, network, warned) in [
            ("cidr", "10.44.0.0/16", "10.44.0.0/16", false),
            ("cidr", "10.44.3.9/16", "10.44.0.0/16", true),
            ("cidr", "fd00:db8:20::1/64", "fd00:db8:20::/64", true),
            ("cidr", "0.0.0.0/0", "0.0.0.0/0", false),
            ("ip", "172.20.0.100", "172.20.0.100/32", false),
            ("cidr", "2001:db8::5", "2001:db8::5/128", false),
        ] {
            let payload = json!({ "type": kind, "id": RESOURCE, "address": address, "filters": [] });
            let (Ingress::ResourceUpdated(resource), warnings) = parse("resource_updated", &payload) else {
                panic!()
            };
            let ResourceKind::Cidr { network: read, .. } = resource.kind else { panic!() };
            assert_eq!((read.to_string().as_str(), !warnings.is_empty()), (network, warned), "{address}");
        }
    }

    #[test]
    fn the_small_events_are_read() {
        let (client, resource) = (ClientId(CLIENT.parse().unwrap()), ResourceId(RESOURCE.parse().unwrap()));
        let pair = json!({ "client_id": CLIENT, "resource_id": RESOURCE });
        assert_eq!(clean("reject_access", &pair), Ingress::RejectAccess(client, resource));
        assert_eq!(
            clean("access_authorization_expiry_updated", &with(pair, "expires_at", json!(9))),
            Ingress::ExpiryUpdated(client, resource, UnixSeconds(9))
        );
        let internet = json!({ "type": "internet", "id": RESOURCE });
        assert_eq!(
            clean("resource_updated", &internet),
            Ingress::ResourceUpdated(Resource { id: resource, kind: ResourceKind::Internet })
        );
        let presence = json!({ "disconnected_ids": [RELAY], "connected": [relay(), with(relay(), "addr", json!("[2001:db8::80]:3478"))] });
        let Ingress::RelaysPresence { disconnected, connected } = clean("relays_presence", &presence) else {
            panic!()
        };
        assert_eq!((disconnected.len(), connected.len()), (1, 2));
        let (ingress, warnings) =
            parse("relays_presence", &json!({ "disconnected_ids": ["x", RELAY], "connected": 3 }));
        assert_eq!(
            (ingress, warnings.len()),
            (
                Ingress::RelaysPresence {
                    disconnected: vec![RelayId(RELAY.parse().unwrap())],
                    connected: vec![]
                },
                2
            )
        );
    }

    #[test]
    fn bad_candidates_are_skipped_one_by_one() {
        let good = "candidate:fffeff7e1d9a 1 udp 2130706175 192.0.2.2 52625 typ host ufrag o7vl";
        let bad = [
            json!("candidate:1 1 udp 4294967296 192.0.2.2 1 typ host"),
            json!("candidate:1 1 udp"),
            json!("a=candidate:1 1 udp 5 192.0.2.2 1 typ host"),
            json!(7),
            json!(""),
        ];
        let list: Vec<_> = bad.into_iter().chain([json!(good)]).collect();
        for event in ["ice_candidates", "invalidate_ice_candidates"] {
            let (ingress, warnings) = parse(event, &json!({ "client_id": CLIENT, "candidates": list }));
            let (Ingress::IceCandidates(_, read) | Ingress::InvalidateIceCandidates(_, read)) = ingress
            else {
                panic!()
            };
            assert_eq!(read, [good]);
            assert_eq!(warnings, ["`candidates`: 5 of 6 entries could not be read and are left out"]);
        }
    }

    #[test]
    fn events_of_others_are_not_ours_and_junk_is_malformed() {
        for event in ["allow_access", "request_connection", "something_new", "phx_reply", ""] {
            assert_eq!(parse_ingress(event, &authorization()), Parsed::NotOurs, "{event}");
        }
        let ours = [
            "init",
            "create_authorization",
            "authorize_flow",
            "reject_access",
            "resource_updated",
            "ice_candidates",
            "invalidate_ice_candidates",
            "relays_presence",
            "access_authorization_expiry_updated",
        ];
        for event in ours {
            for junk in [Value::Null, json!([]), json!("x"), json!(1), json!(true)] {
                assert!(matches!(parse_ingress(event, &junk), Parsed::Malformed(_)), "{event}: {junk}");
            }
        }
    }

    #[test]
    fn secrets_do_not_show_in_debug() {
        let parsed = format!("{:?}", parse_ingress("create_authorization", &authorization()));
        for secret in
            ["b3VyIG93", "h5t2w6m4n7p3q8r9s2v6x4", "a7c3e5g2j4l6n8q3s5u7w9", "eyJh", "112, 115, 107"]
        {
            assert!(!parsed.contains(secret), "{parsed}");
        }
        assert!(!format!("{:?}", relays(&[relay()], "relays", &mut Vec::new())).contains("Zb0w1c"));
    }

    fn parse(event: &str, payload: &Value) -> (Ingress, Vec<String>) {
        match parse_ingress(event, payload) {
            Parsed::Message { ingress, warnings } => (ingress, warnings),
            other => panic!("{event}: {other:?}"),
        }
    }

    fn clean(event: &str, payload: &Value) -> Ingress {
        let (ingress, warnings) = parse(event, payload);
        assert_eq!(warnings, Vec::<String>::new());
        ingress
    }

    fn with(mut object: Value, member: &str, value: Value) -> Value {
        object[member] = value;
        object
    }

    fn interface() -> Value {
        json!({ "ipv4": "100.71.12.9", "ipv6": "fd00:2021:1111::1b:40c7", "upstream_dns": [] })
    }

    fn relay() -> Value {
        json!({ "id": RELAY, "type": "turn", "addr": "203.0.113.80:3478", "username": "2145916800:kq1uU0",
                "password": "Zb0w1c", "expires_at": 2_145_916_800 })
    }

    fn authorization() -> Value {
        json!({
            "ref": "SFMyNTY.opaque.signature",
            "resource": { "type": "cidr", "id": RESOURCE, "name": "Lab", "address": "10.44.0.0/16", "filters": [] },
            "client": {
                "id": CLIENT, "public_key": "2Qm0o1aD7n0m0bY8m8l2q3b2l7xq9c4u1Yk0n3b8r1E=",
                "preshared_key": "b3VyIG93biBleGFtcGxlIHZhbHVlLCAzMiBieXRlcyE=",
                "ipv4": "100.80.3.4", "ipv6": "fd00:2021:1111::3:8", "version": "1.5.12",
            },
            "client_ice_credentials": { "username": "k3zq", "password": "h5t2w6m4n7p3q8r9s2v6x4" },
            "gateway_ice_credentials": { "username": "p9wd", "password": "a7c3e5g2j4l6n8q3s5u7w9" },
            "expires_at": 1_788_000_000,
            "flow_logs_ingest_token": "eyJh.eyJh.c2ln",
        })
    }
}
