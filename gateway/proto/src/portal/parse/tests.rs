//! Tests of the parser: odd members, missing members, filters, junk.

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
        let (ingress, warnings) = parse("create_authorization", &with(authorization(), member, odd.clone()));
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
    let (tcp, udp) = (|first, last| Filter::Tcp { first, last }, |first, last| Filter::Udp { first, last });
    for (filters, expect) in [
        (json!([]), vec![]),
        (json!([{ "protocol": "tcp", "port_range_start": 443, "port_range_end": 443 }]), vec![tcp(443, 443)]),
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
            let payload = json!({ "type": kind.0, "id": RESOURCE, "address": kind.1, "filters": filters });
            let (Ingress::ResourceUpdated(resource), warnings) = parse("resource_updated", &payload) else {
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
    let Ingress::ResourceUpdated(Resource { kind: ResourceKind::Dns { filters, .. }, .. }) = ingress else {
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
        let (Ingress::IceCandidates(_, read) | Ingress::InvalidateIceCandidates(_, read)) = ingress else {
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
    for secret in ["b3VyIG93", "h5t2w6m4n7p3q8r9s2v6x4", "a7c3e5g2j4l6n8q3s5u7w9", "eyJh", "112, 115, 107"] {
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
