//! The table of all scenarios. Adding one is adding a line here and a function in the file of its subject.

use std::time::Duration;

use super::{Scenario, network};
use crate::net::topology::{Plan, direct, dual_stack, nat, relay_only, symmetric_nat, two_relays};

const fn scenario(
    name: &'static str,
    plan: fn() -> Plan,
    limit_seconds: u64,
    run: fn(&mut super::Context) -> anyhow::Result<()>,
) -> Scenario {
    Scenario { name, plan, limit: Duration::from_secs(limit_seconds), run }
}

/// In the order in which they run: the network itself first, then what stands on it.
pub static SCENARIOS: &[Scenario] = &[
    scenario(
        "network: nodes reach the internet, clients do not reach the LAN",
        direct::plan,
        20,
        network::reachability,
    ),
    scenario("network: IPv6 too", dual_stack::plan, 20, network::reachability),
    scenario("network: the LAN's servers serve", direct::plan, 20, network::lan_servers),
    scenario("network: coturn allocates and relays", relay_only::plan, 20, network::turn_allocation),
    scenario("network: coturn relays over IPv6", dual_stack::plan, 20, network::turn_allocation),
    scenario("network: a port-preserving NAT shows one port to all", nat::plan, 20, network::nat_mapping),
    scenario(
        "network: a symmetric NAT shows each destination another port",
        symmetric_nat::plan,
        20,
        network::nat_mapping,
    ),
    scenario("network: blocked UDP does not pass, a relay does", two_relays::plan, 20, network::blocked_udp),
    scenario("network: a wire delays and loses", network::wire_plan, 20, network::wire),
];
