//! iptables of the older kind (`iptables-legacy`): its rules are no nftables and appear in none of its listings.

use super::nft;

/// What these rules do to clients' packets: sentences for WARN, usually none.
pub async fn findings(tun: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (iptables, tables) in
        [("iptables", "/proc/net/ip_tables_names"), ("ip6tables", "/proc/net/ip6_tables_names")]
    {
        // Asking for a table makes it; where nobody has made one there is nothing to ask.
        if !has_table(tables, "filter") {
            continue;
        }
        let program = format!("{iptables}-legacy");
        match nft::run(&program, &["-w", "2", "-S"], "").await {
            Ok(rules) => {
                found.extend(drops(&rules, tun).map(|ways| sentence(iptables, &program, &ways, tun)))
            }
            Err(e) => tracing::debug!("The rules of {program} are not known, because {e}"),
        }
    }
    found
}

/// Whether the kernel has legacy table `name`, by the list in `file`.
pub fn has_table(file: &str, name: &str) -> bool {
    std::fs::read_to_string(file).is_ok_and(|tables| tables.lines().any(|table| table == name))
}

/// The flags (`-i`, `-o`) of the directions that nothing in `rules` (`iptables -S`) accepts, if the policy drops.
fn drops<'a>(rules: &str, tun: &str) -> Option<Vec<&'a str>> {
    if !rules.lines().any(|line| line == "-P FORWARD DROP") {
        return None;
    }
    let is_accepted = |flag: &str| {
        let device = format!(" {flag} {tun} ");
        rules.lines().any(|line| line.contains(&device) && line.ends_with("-j ACCEPT"))
    };
    let answers = rules.lines().any(|line| {
        line.starts_with("-A FORWARD ") && line.contains("ESTABLISHED -j ACCEPT") && !line.contains(" -o ")
    });
    let mut ways = Vec::new();
    if !is_accepted("-i") {
        ways.push("-i");
    }
    if !is_accepted("-o") && !answers {
        ways.push("-o");
    }
    (!ways.is_empty()).then_some(ways)
}

fn sentence(iptables: &str, program: &str, ways: &[&str], tun: &str) -> String {
    let lines: Vec<_> =
        ways.iter().map(|way| format!("{program} -I FORWARD {way} {tun} -j ACCEPT")).collect();
    format!(
        "Packets of clients are dropped by {iptables} of the older kind (chain FORWARD, policy drop), which no table of ours \
         can change; accept them there: {}",
        lines.join(" && ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policy_drops_what_no_rule_accepts() {
        let table: &[(&str, Option<&[&str]>)] = &[
            ("-P FORWARD ACCEPT\n", None),
            ("-P FORWARD DROP\n", Some(&["-i", "-o"])),
            (
                "-P FORWARD DROP\n-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n",
                Some(&["-i"]),
            ),
            (
                "-P FORWARD DROP\n-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n",
                Some(&["-i", "-o"]),
            ),
            ("-P FORWARD DROP\n-A FORWARD -i tun-x -j ACCEPT\n-A FORWARD -o tun-x -j ACCEPT\n", None),
            ("-P FORWARD DROP\n-A DOCKER-USER -i tun-x -j ACCEPT\n", Some(&["-o"])),
            (
                "-P FORWARD DROP\n-A FORWARD -i tun-xy -j ACCEPT\n-A FORWARD -o tun-x -j DROP\n",
                Some(&["-i", "-o"]),
            ),
        ];
        for (rules, expect) in table {
            assert_eq!(drops(rules, "tun-x").as_deref(), *expect, "{rules}");
        }
    }
}
