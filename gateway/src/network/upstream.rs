//! The rules that upstream's `firezone-gateway-init` leaves (cli-and-service.md section 16.6), and their removal.

use super::{legacy, nft};

/// Table and rule, for both families.
const FORWARD: [(&str, &str); 2] =
    [("filter", "FORWARD -i tun-firezone -j ACCEPT"), ("filter", "FORWARD -o tun-firezone -j ACCEPT")];

/// The same for IPv4 only.
const NAT_V4: [(&str, &str); 2] = [
    ("nat", "POSTROUTING -s 100.64.0.0/11 -o e+ -j MASQUERADE"),
    ("nat", "POSTROUTING -s 100.64.0.0/11 -o w+ -j MASQUERADE"),
];

/// The same for IPv6 only.
const NAT_V6: [(&str, &str); 2] = [
    ("nat", "POSTROUTING -s fd00:2021:1111::/107 -o e+ -j MASQUERADE"),
    ("nat", "POSTROUTING -s fd00:2021:1111::/107 -o w+ -j MASQUERADE"),
];

/// Deletes each of those rules once, from whatever kind of iptables holds it; the script never adds one twice. Returns what
/// was deleted, in sentences.
///
/// # Errors
/// If there is no iptables, or it does not work.
pub async fn remove() -> Result<Vec<String>, nft::Error> {
    let mut deleted = Vec::new();
    for (iptables, nat, legacy_tables) in [
        ("iptables", NAT_V4, "/proc/net/ip_tables_names"),
        ("ip6tables", NAT_V6, "/proc/net/ip6_tables_names"),
    ] {
        let programs = programs(iptables);
        if programs.is_empty() {
            return Err(nft::Error::Missing(iptables.to_owned()));
        }
        for program in programs {
            for (table, rule) in FORWARD.into_iter().chain(nat) {
                // Asking the older kind for a table makes it.
                if program.ends_with("-legacy") && !legacy::has_table(legacy_tables, table) {
                    continue;
                }
                if delete(&program, table, rule).await? {
                    deleted.push(format!("Deleted what `{program} -t {table} -A {rule}` adds"));
                }
            }
        }
    }
    Ok(deleted)
}

/// Both kinds, or the one there is where they have no names of their own.
fn programs(iptables: &str) -> Vec<String> {
    let kinds = [format!("{iptables}-nft"), format!("{iptables}-legacy")];
    let found: Vec<String> = kinds.into_iter().filter(|program| nft::find(program).is_some()).collect();
    if found.is_empty() && nft::find(iptables).is_some() { vec![iptables.to_owned()] } else { found }
}

/// Whether the rule was there.
async fn delete(program: &str, table: &str, rule: &str) -> Result<bool, nft::Error> {
    let arguments = |command| {
        let words = ["-w", "5", "-t", table, command].into_iter().chain(rule.split(' '));
        words.collect::<Vec<_>>()
    };
    match nft::run(program, &arguments("-C"), "").await {
        Ok(_) => nft::run(program, &arguments("-D"), "").await.map(|_| true),
        // Not there, or no such table, chain or extension.
        Err(nft::Error::Said(..)) => Ok(false),
        Err(e) => Err(e),
    }
}
