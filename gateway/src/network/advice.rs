//! What an operator is told about a chain that drops clients' packets: one sentence, with the line that cures it for this
//! firewall. We never run that line: those rules are not ours.

use super::foreign::{Direction, Finding};

/// The sentence.
pub fn sentence(finding: &Finding, tun: &str) -> String {
    let Finding { family, table, chain, .. } = finding;
    let which = match (finding.directions.contains(&Direction::Outbound), finding.directions.len()) {
        (true, 1) => "Packets of clients",
        (false, _) => "Answers to clients",
        _ => "Packets of clients, and answers to them",
    };
    let drops = if finding.sure { "are dropped" } else { "may be dropped" };
    let devices: Vec<_> = finding.devices.iter().map(String::as_str).collect();
    let by =
        if devices.is_empty() { String::new() } else { format!(" on their way by {}", devices.join(" or ")) };
    let how = if finding.by_policy { "policy drop" } else { "a rule that drops the rest" };
    format!(
        "{which}{by} {drops} by the nftables table {family} {table} (chain {chain}, {how}), which no table of ours can change; \
         accept them there: {}",
        cure(finding, tun)
    )
}

/// The line for the firewall whose table it is, as far as that can be told.
fn cure(finding: &Finding, tun: &str) -> String {
    let Finding { family, table, chain, .. } = finding;
    let has = |name: &str| finding.chains.iter().any(|chain| chain == name);
    let each = |line: &dyn Fn(&str, &str) -> String| {
        let lines = finding.directions.iter().map(|direction| match direction {
            Direction::Outbound => line("i", "in"),
            Direction::Inbound => line("o", "out"),
        });
        lines.collect::<Vec<_>>().join(" && ")
    };
    let iptables = if family == "ip6" { "ip6tables" } else { "iptables" };
    let of_iptables = ["ip", "ip6"].contains(&&**family) && table == "filter" && chain == "FORWARD";
    if table == "firewalld" {
        format!("firewall-cmd --permanent --zone=trusted --add-interface={tun} && firewall-cmd --reload")
    } else if of_iptables && has("DOCKER-USER") {
        // Docker keeps its hands off this chain, and puts its own in front of FORWARD again when it starts.
        each(&|flag, _| format!("{iptables} -I DOCKER-USER -{flag} {tun} -j ACCEPT"))
    } else if of_iptables && ["ufw-user-forward", "ufw6-user-forward"].into_iter().any(has) {
        each(&|_, way| format!("ufw route allow {way} on {tun}"))
    } else if of_iptables {
        each(&|flag, _| format!("{iptables} -I FORWARD -{flag} {tun} -j ACCEPT"))
    } else {
        each(&|flag, _| format!("nft insert rule {family} {table} {chain} {flag}ifname {tun} accept"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_firewall_has_its_line() {
        use Direction::{Inbound, Outbound};
        let both = &[Outbound, Inbound][..];
        // family, table, chain, further chains, directions, the line
        type Case<'a> = (&'a str, &'a str, &'a str, &'a [&'a str], &'a [Direction], &'a str);
        let table: &[Case<'_>] = &[
            (
                "inet",
                "firewalld",
                "filter_FORWARD",
                &[],
                &[Outbound],
                "firewall-cmd --permanent --zone=trusted --add-interface=tun-x && firewall-cmd --reload",
            ),
            (
                "ip",
                "filter",
                "FORWARD",
                &["DOCKER", "DOCKER-USER"],
                both,
                "iptables -I DOCKER-USER -i tun-x -j ACCEPT && iptables -I DOCKER-USER -o tun-x -j ACCEPT",
            ),
            (
                "ip6",
                "filter",
                "FORWARD",
                &["DOCKER-USER"],
                &[Inbound],
                "ip6tables -I DOCKER-USER -o tun-x -j ACCEPT",
            ),
            (
                "ip",
                "filter",
                "FORWARD",
                &["ufw-user-forward"],
                both,
                "ufw route allow in on tun-x && ufw route allow out on tun-x",
            ),
            ("ip6", "filter", "FORWARD", &[], &[Outbound], "ip6tables -I FORWARD -i tun-x -j ACCEPT"),
            (
                "inet",
                "mine",
                "fw",
                &["DOCKER-USER"],
                both,
                "nft insert rule inet mine fw iifname tun-x accept && nft insert rule inet mine fw oifname tun-x accept",
            ),
        ];
        for &(family, name, chain, chains, directions, line) in table {
            let finding = Finding {
                family: family.to_owned(),
                table: name.to_owned(),
                chain: chain.to_owned(),
                directions: directions.iter().copied().collect(),
                devices: std::collections::BTreeSet::new(),
                by_policy: true,
                sure: true,
                chains: chains.iter().map(|&chain| chain.to_owned()).collect(),
            };
            let said = sentence(&finding, "tun-x");
            assert!(said.ends_with(&format!(": {line}")), "{said}");
            assert!(said.contains(&format!("{family} {name} (chain {chain}, policy drop)")), "{said}");
        }
    }
}
