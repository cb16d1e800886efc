//! The one nftables table that is ours: masquerade for the tunnel ranges, and, as comments, what the daemon has changed
//! elsewhere, so that whoever comes after a crash can put it back. It belongs to the network namespace and is gone after a
//! reboot, as those changes are.
//!
//! There is no chain at the hook `forward`: its `accept` would end itself only, every other chain there still decides (nft(8),
//! "Verdict statements"), and each packet would pay for it. What others drop is found and said ([`super::foreign`]).

use gateway_proto::addr::{TUNNEL_V4, TUNNEL_V6};
use serde_json::Value;

use super::forwarding::Change;

/// Family and name.
pub const TABLE: &str = "inet firezone_gateway";

/// The name alone.
pub const NAME: &str = "firezone_gateway";

/// A script that makes the table, in the place of one that an earlier life left.
///
/// Packets from a tunnel range are masqueraded on whatever interface routing chooses, except back into the tunnel: what one
/// client sends to another keeps its source.
pub fn install(tun: &str, changed: &[Change]) -> String {
    let remembered: String =
        changed.iter().map(|change| format!("    return comment \"{change}\"\n")).collect();
    format!(
        r#"table {TABLE}
delete table {TABLE}
table {TABLE} {{
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept;
    ip saddr {TUNNEL_V4} oifname != "{tun}" masquerade
    ip6 saddr {TUNNEL_V6} oifname != "{tun}" masquerade
  }}
  chain {REMEMBERED} {{
{remembered}  }}
}}
"#
    )
}

/// A script that removes the table; it fails if there is none.
pub fn remove() -> String {
    format!("delete table {TABLE}\n")
}

/// No packet ever comes here.
const REMEMBERED: &str = "remembered";

/// What the table (its objects in JSON) remembers.
pub fn remembered(objects: &[Value]) -> Vec<Change> {
    let rules = objects.iter().filter_map(|object| object.get("rule"));
    let ours = rules.filter(|rule| rule["chain"] == REMEMBERED);
    ours.filter_map(|rule| Change::parse(rule["comment"].as_str()?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_comes_back() {
        // What nft 1.0.6 prints for such a table.
        let listed: Value = serde_json::from_str(
            r#"[{"metainfo": {"version": "1.0.6"}}, {"table": {"family": "inet", "name": "firezone_gateway", "handle": 3}},
            {"chain": {"family": "inet", "table": "firezone_gateway", "name": "remembered", "handle": 3}},
            {"rule": {"family": "inet", "table": "firezone_gateway", "chain": "forward", "handle": 4,
              "comment": "net/ipv4/ip_forward was 5, is 6", "expr": [{"accept": null}]}},
            {"rule": {"family": "inet", "table": "firezone_gateway", "chain": "remembered", "handle": 7,
              "expr": [{"return": null}]}},
            {"rule": {"family": "inet", "table": "firezone_gateway", "chain": "remembered", "handle": 8,
              "comment": "net/ipv4/ip_forward was 0, is 1", "expr": [{"return": null}]}}]"#,
        )
        .unwrap();
        let changed = remembered(listed.as_array().unwrap());
        assert_eq!(changed, [Change::parse("net/ipv4/ip_forward was 0, is 1").unwrap()]);
        let script = install("tun-firezone", &changed);
        assert!(script.contains("return comment \"net/ipv4/ip_forward was 0, is 1\"\n"), "{script}");
    }

    #[test]
    fn both_ranges_are_masqueraded_except_into_the_tunnel() {
        let script = install("tun-firezone", &[]);
        assert!(!script.contains("hook forward"), "{script}");
        for line in [
            r#"ip saddr 100.64.0.0/11 oifname != "tun-firezone" masquerade"#,
            r#"ip6 saddr fd00:2021:1111::/107 oifname != "tun-firezone" masquerade"#,
        ] {
            assert!(script.contains(line), "{script}");
        }
    }
}
