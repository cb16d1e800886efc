//! Listings of real rulesets (`samples`, by nft 1.0.6 from `tests/src/scenario/rulesets`, with what operators add to them), and
//! a table of single conditions.

use super::*;

const TUN: &str = "tun-firezone";

const DOCKER: &str = include_str!("samples/docker.json");
const FIREWALLD: &str = include_str!("samples/firewalld.json");
const OPERATOR: &str = include_str!("samples/operator.json");

fn objects(sample: &str) -> Vec<Value> {
    serde_json::from_str(sample).unwrap()
}

fn devices(names: &[&str]) -> Vec<String> {
    names.iter().map(|&name| name.to_owned()).collect()
}

/// Findings as short text: chain, directions, devices, sure or not.
fn found(objects: &[Value], names: &[&str]) -> Vec<String> {
    let describe = |finding: Finding| {
        let ways: String = finding
            .directions
            .iter()
            .map(|direction| match direction {
                Direction::Outbound => " out",
                Direction::Inbound => " in",
            })
            .collect();
        let by: String = finding.devices.iter().map(|device| format!(" {device}")).collect();
        let sure = if finding.sure { "" } else { " perhaps" };
        format!("{} {} {}:{ways}{by}{sure}", finding.family, finding.table, finding.chain)
    };
    findings(objects, TUN, &devices(names)).into_iter().map(describe).collect()
}

/// A rule in front of all others of `chain`.
fn insert(objects: &mut Vec<Value>, (family, table, chain): (&str, &str, &str), expr: &str) {
    let expr: Value = serde_json::from_str(expr).unwrap();
    let rule = serde_json::json!({"rule": {"family": family, "table": table, "chain": chain, "expr": expr}});
    let first = objects.iter().position(|object| object.get("rule").is_some()).unwrap_or(objects.len());
    objects.insert(first, rule);
}

const IN_ACCEPT: &str = r#"[{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "tun-firezone"}}, {"accept": null}]"#;
const OUT_ACCEPT: &str = r#"[{"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": "tun-firezone"}}, {"accept": null}]"#;

#[test]
fn docker_drops_until_its_chain_for_users_accepts() {
    let names = ["lo", "eth0", "eth1", "docker0", "tun-firezone"];
    let mut docker = objects(DOCKER);
    assert_eq!(found(&docker, &names), ["ip filter FORWARD: out in", "ip6 filter FORWARD: out in"]);
    insert(&mut docker, ("ip", "filter", "DOCKER-USER"), IN_ACCEPT);
    assert_eq!(found(&docker, &names), ["ip filter FORWARD: in", "ip6 filter FORWARD: out in"]);
    insert(&mut docker, ("ip", "filter", "DOCKER-USER"), OUT_ACCEPT);
    insert(&mut docker, ("ip6", "filter", "FORWARD"), IN_ACCEPT);
    insert(&mut docker, ("ip6", "filter", "FORWARD"), OUT_ACCEPT);
    assert_eq!(found(&docker, &names), Vec::<String>::new());
    assert_eq!(who_translates(&docker).as_deref(), Some("ip nat"));
}

#[test]
fn firewalld_rejects_what_is_in_no_zone() {
    let names = ["eth0", "eth1"];
    let mut firewalld = objects(FIREWALLD);
    assert_eq!(found(&firewalld, &names), ["inet firewalld filter_FORWARD: out"]);
    assert!(!findings(&firewalld, TUN, &devices(&names))[0].by_policy);
    // What `--zone=trusted --add-interface` does.
    insert(
        &mut firewalld,
        ("inet", "firewalld", "filter_FORWARD_POLICIES"),
        r#"[{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "tun-firezone"}},
            {"goto": {"target": "filter_FWD_trusted"}}]"#,
    );
    assert_eq!(found(&firewalld, &names), Vec::<String>::new());
    assert_eq!(who_translates(&firewalld), None);
}

#[test]
fn an_operators_chain_drops_what_it_does_not_name() {
    let mine = ("inet", "mine", "forward");
    let names = ["eth0", "eth1"];
    assert_eq!(found(&objects(OPERATOR), &names), ["inet mine forward: out"]);
    // Rules in front, and what remains to be said.
    let table: [(&str, &[&str]); 6] = [
        (IN_ACCEPT, &[]),
        // Limited on purpose.
        (
            r#"[{"match": {"op": "==", "left": {"meta": {"key": "iifname"}}, "right": "tun-*"}},
                {"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}}, "right": 443}},
                {"accept": null}]"#,
            &[],
        ),
        // The LAN is open to everybody, the other side is not.
        (
            r#"[{"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": "eth1"}}, {"accept": null}]"#,
            &["inet mine forward: out eth0 perhaps"],
        ),
        // Who may pass is in a set that is not listed.
        (
            r#"[{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}}, "right": "@friends"}},
                {"accept": null}]"#,
            // IPv6 packets are dropped for sure.
            &["inet mine forward: out"],
        ),
        (
            r#"[{"match": {"op": "==", "left": {"meta": {"key": "mark"}}, "right": 7}}, {"accept": null}]"#,
            &["inet mine forward: out perhaps"],
        ),
        (r#"[{"drop": null}]"#, &["inet mine forward: out in"]),
    ];
    for (rule, expect) in table {
        let mut listed = objects(OPERATOR);
        insert(&mut listed, mine, rule);
        assert_eq!(found(&listed, &names), *expect, "{rule}");
    }
}

#[test]
fn what_does_not_drop_is_not_reported() {
    let chain = |family: &str, table: &str, hook: &str, policy: &str| {
        serde_json::json!({"chain": {"family": family, "table": table, "name": "c", "type": "filter", "hook": hook,
            "prio": 0, "policy": policy}})
    };
    let table = [
        (chain("inet", "t", "forward", "accept"), false),
        (chain("inet", "t", "forward", "drop"), true),
        (chain("inet", "t", "input", "drop"), false),
        (chain("bridge", "t", "forward", "drop"), false),
        (chain("inet", "firezone_gateway", "forward", "drop"), false),
    ];
    for (chain, expect) in table {
        assert_eq!(!found(std::slice::from_ref(&chain), &[]).is_empty(), expect, "{chain}");
    }
    assert_eq!(found(&[], &["eth0"]), Vec::<String>::new());
}

#[test]
fn conditions_hold_or_not_or_cannot_be_told() {
    use Truth::{Maybe, No, Yes};
    let meta = |key: &str, right: &str| {
        format!(r#"{{"op": "==", "left": {{"meta": {{"key": "{key}"}}}}, "right": {right}}}"#)
    };
    let ip = |field: &str, right: &str| {
        let left = format!(r#"{{"payload": {{"protocol": "ip", "field": "{field}"}}}}"#);
        format!(r#"{{"op": "==", "left": {left}, "right": {right}}}"#)
    };
    let prefix = |addr: &str, len: u8| format!(r#"{{"prefix": {{"addr": "{addr}", "len": {len}}}}}"#);
    // condition; for an outbound packet; for an inbound one; both IPv4, by eth1
    let table = [
        (meta("iifname", r#""tun-firezone""#), Yes, No),
        (meta("iifname", r#""tun-*""#), Yes, No),
        (meta("iifname", r#""eth1""#), No, Yes),
        (meta("oifname", r#"{"set": ["lo", "eth*"]}"#), Yes, No),
        (meta("oifname", r#""@devices""#), Maybe, Maybe),
        (meta("oifname", r#""tun-firezone""#).replace("==", "!="), Yes, No),
        (meta("nfproto", r#""ipv4""#), Yes, Yes),
        (meta("nfproto", r#""ipv6""#), No, No),
        (meta("mark", "1"), Maybe, Maybe),
        (
            r#"{"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established", "related"]}"#
                .to_owned(),
            No,
            Yes,
        ),
        (r#"{"op": "in", "left": {"ct": {"key": "state"}}, "right": "new"}"#.to_owned(), Yes, No),
        (r#"{"op": "in", "left": {"ct": {"key": "status"}}, "right": "dnat"}"#.to_owned(), No, No),
        (ip("saddr", &prefix("100.64.0.0", 10)), Yes, Maybe),
        (ip("saddr", &prefix("100.64.0.0", 11)), Yes, No),
        (ip("saddr", &prefix("100.64.7.0", 24)), Maybe, No),
        (ip("saddr", &prefix("10.0.0.0", 8)), No, Maybe),
        (ip("saddr", r#""100.64.0.9""#), Maybe, No),
        (ip("saddr", r#"{"range": ["100.64.0.0", "100.64.0.9"]}"#), Maybe, Maybe),
        (ip("daddr", &prefix("100.64.0.0", 11)), No, Yes),
        (ip("daddr", &prefix("10.0.0.0", 8)), Maybe, No),
        (ip("saddr", &prefix("100.64.0.0", 10)).replace("\"ip\"", "\"ip6\""), No, No),
        (ip("dport", "80").replace("\"ip\"", "\"tcp\""), Maybe, Maybe),
        (meta("nfproto", r#""ipv4""#).replace("==", "<"), Maybe, Maybe),
    ];
    for (text, outbound, inbound) in table {
        let condition: Value = serde_json::from_str(&text).unwrap();
        for (direction, expect) in [(Direction::Outbound, outbound), (Direction::Inbound, inbound)] {
            let rules = HashMap::new();
            let walk = Walk::new(&rules, TUN, Some("eth1"), Family::V4, direction);
            assert_eq!(walk.condition(&condition), expect, "{direction:?} {text}");
        }
    }
}

#[test]
fn chains_that_call_each_other_end() {
    let mut listed =
        vec![serde_json::json!({"chain": {"family": "ip", "table": "t", "name": "a", "type": "filter",
        "hook": "forward", "prio": 0, "policy": "drop"}})];
    insert(&mut listed, ("ip", "t", "a"), r#"[{"jump": {"target": "b"}}]"#);
    insert(&mut listed, ("ip", "t", "b"), r#"[{"jump": {"target": "a"}}]"#);
    assert_eq!(found(&listed, &["eth0"]), ["ip t a: out in"]);
}

#[test]
fn a_maze_of_chains_is_left_undecided() {
    let mut listed =
        vec![serde_json::json!({"chain": {"family": "ip", "table": "t", "name": "c0", "type": "filter",
        "hook": "forward", "prio": 0, "policy": "drop"}})];
    // Each chain calls the next one twenty times: 20^15 ways.
    for level in 0..15 {
        for _ in 0..20 {
            let jump = format!(r#"[{{"jump": {{"target": "c{}"}}}}]"#, level + 1);
            insert(&mut listed, ("ip", "t", &format!("c{level}")), &jump);
        }
    }
    assert_eq!(found(&listed, &["eth0"]), ["ip t c0: out in perhaps"]);
}
