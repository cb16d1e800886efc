//! The table of all scenarios. Adding one is adding a line here and a function in the file of its subject.

use std::time::Duration;

use super::{
    Scenario, access, churn, crowd, dns, fast_faults, fast_floods, firewall, floods, flow_ends, flow_logs,
    flow_spool, hostile_names, links, metrics, names, network, operator, paths, relays, resources, script,
    start, transfers, translation, trouble,
};
use crate::net::topology::{Plan, direct, dual_stack, nat, relay_only, symmetric_nat, two_relays};

const fn scenario(
    name: &'static str,
    plan: fn() -> Plan,
    limit_seconds: u64,
    run: fn(&mut super::Context) -> anyhow::Result<()>,
) -> Scenario {
    Scenario {
        name,
        plan,
        limit: Duration::from_secs(limit_seconds),
        run,
        core: false,
        once: false,
        alone: false,
    }
}

impl Scenario {
    const fn core(mut self) -> Self {
        self.core = true;
        self
    }

    const fn once(mut self) -> Self {
        self.once = true;
        self
    }

    const fn alone(mut self) -> Self {
        self.alone = true;
        self
    }
}

/// In the order in which they run: the network itself first, then what stands on it. (Side by side, those that must be
/// alone come last.)
pub static SCENARIOS: &[Scenario] = &[
    scenario(
        "network: nodes reach the internet, clients do not reach the LAN",
        direct::plan,
        20,
        network::reachability,
    )
    .once(),
    scenario("network: IPv6 too", dual_stack::plan, 20, network::reachability).once(),
    scenario("network: the LAN's servers serve", direct::plan, 20, network::lan_servers).once(),
    scenario("network: coturn allocates and relays", relay_only::plan, 20, network::turn_allocation).once(),
    scenario("network: coturn relays over IPv6", dual_stack::plan, 20, network::turn_allocation).once(),
    scenario("network: a port-preserving NAT shows one port to all", nat::plan, 20, network::nat_mapping)
        .once(),
    scenario(
        "network: a symmetric NAT shows each destination another port",
        symmetric_nat::plan,
        20,
        network::nat_mapping,
    )
    .once(),
    scenario("network: blocked UDP does not pass, a relay does", two_relays::plan, 20, network::blocked_udp)
        .once(),
    scenario("network: a wire delays and loses", network::wire_plan, 20, network::wire).once().alone(),
    scenario(
        "operator errors are one sentence with exit code 1 or 2",
        direct::plan,
        20,
        trouble::operator_errors,
    )
    .once(),
    scenario("without CAP_NET_ADMIN: one sentence", direct::plan, 20, start::no_capability).once(),
    scenario("CAP_NET_ADMIN and nothing else, as nobody", direct::plan, 20, start::one_capability),
    scenario("CAP_NET_ADMIN by the file: nft is not permitted to", direct::plan, 30, start::file_capability)
        .once(),
    scenario("the token as a systemd credential", direct::plan, 20, start::credential).once(),
    scenario("/readyz before, with and without a portal", direct::plan, 20, start::readiness).once(),
    scenario("a portal with a private certificate authority", direct::plan, 30, start::private_authority)
        .once(),
    scenario("a portal by name, and its name server moves", direct::plan, 40, start::portal_by_name).once(),
    scenario("a gateway without IPv6", direct::plan, 30, start::without_ipv6),
    scenario("a gateway without IPv4", dual_stack::plan, 30, start::without_ipv4),
    scenario("network set-up: made, made again, removed", direct::plan, 40, firewall::own_setup).once(),
    scenario("network set-up: by README.md's lines instead", direct::plan, 30, firewall::opt_out).once(),
    scenario("network set-up: a killed gateway's is removed", direct::plan, 40, firewall::killed).once(),
    scenario("network set-up: beside Docker", direct::plan, 60, firewall::docker).once(),
    scenario("network set-up: beside iptables of the older kind", direct::plan, 60, firewall::legacy).once(),
    scenario("network set-up: beside firewalld", direct::plan, 60, firewall::firewalld).once(),
    scenario(
        "network set-up: a firewall that comes later is noticed",
        direct::plan,
        60,
        firewall::comes_later,
    )
    .once(),
    scenario(
        "network set-up: beside an operator's rules, which are flushed",
        direct::plan,
        90,
        firewall::operator,
    )
    .once(),
    scenario("network set-up: without nft", direct::plan, 30, firewall::without_nft).once(),
    scenario(
        "network set-up: settings that cannot be written",
        direct::plan,
        30,
        firewall::read_only_settings,
    )
    .once(),
    scenario(
        "network set-up: an IPv6 route that a router advertised",
        dual_stack::plan,
        30,
        firewall::advertised_route,
    )
    .once(),
    scenario(
        "network set-up: upstream's rules are deleted, and no others",
        direct::plan,
        30,
        firewall::upstream,
    )
    .once(),
    scenario("direct: ping and HTTP over IPv4 and IPv6", direct::plan, 20, paths::direct).core(),
    scenario("relayed: ping and HTTP over IPv4 and IPv6", relay_only::plan, 20, paths::relayed).core(),
    scenario("dual stack, direct: ping and HTTP", dual_stack::plan, 20, paths::direct),
    scenario("dual stack, relayed: ping and HTTP", dual_stack::relay_only, 20, paths::relayed).core(),
    scenario("port-preserving NAT on both sides: direct", nat::plan, 20, paths::direct),
    scenario("symmetric NAT on both sides: relayed", symmetric_nat::plan, 20, paths::relayed).core(),
    scenario("two relays: ping and HTTP", two_relays::plan, 20, paths::relayed),
    scenario("two relays: the one in use dies", two_relays::plan, 60, paths::relay_dies),
    scenario("the relay is started again and knows nobody", relay_only::plan, 60, relays::restarted),
    scenario("a relay is replaced while traffic flows", two_relays::plan, 60, relays::replaced),
    scenario("all relays go and come back, the direct path stays", direct::plan, 60, relays::all_gone),
    scenario("a relay is away for a while, at a Nov-2025 portal", direct::plan, 100, relays::away_at_nov25)
        .once(),
    scenario("Nov-2025 client and portal: direct", direct::plan, 20, paths::nov25),
    scenario("Nov-2025 client at a portal of today: relayed", relay_only::plan, 20, paths::nov25_client),
    scenario(
        "an authorization that arrives before any relay is served when one comes",
        relay_only::plan,
        20,
        paths::relay_arrives_late,
    )
    .once(),
    scenario("the direct way closes: the relay takes over", direct::plan, 90, paths::direct_way_closes),
    scenario("the client's network changes", direct::plan, 30, paths::client_roams),
    scenario("the client's network changes mid-transfer", direct::plan, 60, relays::roams_mid_transfer)
        .core(),
    scenario("the client dies and comes again, relayed", relay_only::plan, 30, paths::client_vanishes),
    scenario("20 ms and 1 % loss: ping and HTTP", paths::lossy_plan, 60, paths::lossy),
    scenario("a fifth of all packets is lost: TCP", links::fifth_lost_plan, 120, links::fifth_lost).alone(),
    scenario("50 ms: throughput and order", links::far_plan, 120, links::far).alone(),
    scenario("refused ports are refused at once", direct::plan, 30, links::refusals).core(),
    scenario("congestion marks cross the tunnel", direct::plan, 60, links::congestion_marks).core(),
    scenario("direct: TCP, 100 MB each way, same checksum", direct::plan, 60, transfers::hundred_megabytes)
        .core()
        .alone(),
    scenario(
        "relayed: TCP, 100 MB each way, same checksum",
        relay_only::plan,
        60,
        transfers::hundred_megabytes,
    )
    .core()
    .alone(),
    scenario("direct: UDP and DNS", direct::plan, 30, transfers::udp).core(),
    scenario("relayed: UDP and DNS", relay_only::plan, 30, transfers::udp).core(),
    scenario("fast path off and on, direct: the same comes out", direct::plan, 60, script::fast_vs_slow)
        .once(),
    scenario("fast path off and on, relayed: the same comes out", relay_only::plan, 60, script::fast_vs_slow)
        .once(),
    scenario("metrics agree with traffic, direct", direct::plan, 60, metrics::agree_with_traffic),
    scenario("metrics agree with traffic, relayed", relay_only::plan, 60, metrics::agree_with_traffic),
    scenario(
        "metrics: DNS, denials, a portal that is away",
        direct::plan,
        60,
        metrics::dns_denials_and_partition,
    ),
    scenario("metrics: an OpenTelemetry collector gets them", direct::plan, 40, metrics::collected).once(),
    scenario("an idle gateway with a connected client sleeps", direct::plan, 30, transfers::idle).alone(),
    scenario("portal killed while traffic flows, and back", direct::plan, 60, trouble::portal_dies),
    scenario("the portal falls silent", direct::plan, 90, trouble::portal_silent).once(),
    scenario("portal sockets reset again and again", direct::plan, 60, trouble::sockets_drop).once(),
    scenario("portal refuses: busy, then the token", direct::plan, 60, trouble::portal_refuses).once(),
    scenario("one of two resources revoked mid-transfer", direct::plan, 30, access::revoke_one).core(),
    scenario("the last resource revoked mid-transfer: goodbye", direct::plan, 30, access::revoke_last),
    scenario("an authorization expires", direct::plan, 30, access::expiry),
    scenario(
        "status tells the path and what it carries, direct",
        direct::plan,
        60,
        operator::status_during_ping,
    ),
    scenario(
        "status tells the path and what it carries, relayed",
        relay_only::plan,
        60,
        operator::status_during_ping,
    )
    .once(),
    scenario("why tells what packets meet", direct::plan, 60, operator::why).once(),
    scenario("top, flows and bundle show a daemon that works", direct::plan, 90, operator::top_flows_bundle)
        .once(),
    scenario(
        "fast path: switched off and on while 100 MB pass each way",
        direct::plan,
        90,
        operator::fast_path_switched,
    )
    .once()
    .alone(),
    scenario("filters, and new ones", direct::plan, 30, access::filters),
    scenario(
        "two clients with overlapping resources",
        direct::two_clients,
        30,
        access::overlapping_resources,
    ),
    scenario(
        "a foreign source address inside the tunnel is refused",
        direct::plan,
        20,
        access::spoofed_source,
    ),
    scenario("the gateway's own tunnel address", direct::plan, 20, access::gateway_own_address),
    scenario("flow logs: what was carried is what is uploaded", direct::plan, 60, flow_logs::counted),
    scenario(
        "flow logs: resets, datagrams, denied packets",
        direct::plan,
        60,
        flow_ends::resets_and_datagrams,
    ),
    scenario("flow logs: of a DNS resource", direct::plan, 60, flow_ends::of_a_name),
    scenario(
        "flow logs: nothing is kept where nothing is to be uploaded",
        direct::plan,
        40,
        flow_ends::not_uploaded,
    ),
    scenario(
        "flow logs: an outage, a restart and a kill lose no record",
        direct::plan,
        150,
        flow_spool::outage,
    )
    .once(),
    scenario("flow logs: hostile tokens and files", direct::plan, 90, flow_spool::hostile),
    scenario(
        "flow logs: an endpoint in trouble gets every record",
        direct::plan,
        150,
        flow_logs::endpoint_trouble,
    )
    .once(),
    scenario("DNS resources: what becomes of a name", direct::plan, 40, names::statuses),
    scenario("DNS resources: reached, moved, revoked", direct::plan, 60, names::reached),
    scenario("DNS resources: relayed", relay_only::plan, 40, resources::relayed),
    scenario("DNS resources: names that share an address", direct::plan, 60, resources::shared_address),
    scenario("DNS resources: many addresses, or of one family", direct::plan, 60, resources::many_or_one),
    scenario("DNS resources: traceroute and path MTU", direct::plan, 60, translation::hops_and_mtu),
    scenario(
        "DNS resources: filters, revoked and granted mid-transfer",
        direct::plan,
        60,
        translation::filters_and_revocation,
    ),
    scenario("DNS resources: ends of connections free their ports", direct::plan, 60, translation::ends),
    scenario(
        "DNS resources: the client is killed and starts again",
        direct::plan,
        60,
        translation::client_again,
    ),
    scenario(
        "DNS resources: the gateway is killed and starts again",
        direct::plan,
        60,
        translation::gateway_again,
    ),
    scenario("DNS resources: a nameserver falls silent", direct::plan, 40, translation::failover),
    scenario("UDP over IPv6 of every checksum", direct::plan, 120, translation::every_checksum).once(),
    scenario("DNS resources: hostile control packets", direct::plan, 60, hostile_names::control_packets),
    scenario("DNS servers: SRV and TXT, long answers, bad queries", direct::plan, 40, dns::queries),
    scenario("DNS servers: a connection outlives an init", direct::plan, 40, dns::connection_stays).once(),
    scenario("DNS servers: a nameserver dies, another is configured", direct::plan, 60, dns::failover).once(),
    scenario("DNS servers: one client floods, another is served", direct::two_clients, 40, dns::flood),
    scenario("DNS servers: the port is taken", direct::plan, 30, dns::port_taken).once(),
    scenario(
        "malformed and hostile datagrams while traffic flows",
        direct::plan,
        40,
        trouble::hostile_datagrams,
    )
    .core(),
    scenario("a flood of random datagrams", direct::plan, 60, floods::random).alone(),
    scenario("a flood of forged handshakes", direct::plan, 60, floods::forged).alone(),
    scenario(
        "a flood of forged handshakes with proven addresses",
        direct::plan,
        60,
        floods::forged_with_cookies,
    )
    .alone(),
    scenario("fast path: a stranger's flood dies in XDP", direct::plan, 60, fast_floods::from_a_stranger)
        .once()
        .alone(),
    scenario(
        "fast path: a flood from everywhere and through the relay dies in XDP",
        relay_only::plan,
        60,
        fast_floods::from_everywhere_and_through_the_relay,
    )
    .once()
    .alone(),
    scenario("a second instance is refused in one sentence", direct::plan, 20, trouble::second_instance)
        .once(),
    scenario("SIGTERM: goodbye to every client, exit code 0", direct::two_clients, 20, trouble::terminate)
        .core(),
    scenario("a gateway that is started again serves again", direct::plan, 30, trouble::restart).core(),
    scenario("a gateway is killed and started again, direct", direct::plan, 60, relays::gateway_killed),
    scenario("a gateway is killed and started again, relayed", relay_only::plan, 60, relays::gateway_killed),
    scenario(
        "fast path: the gateway is killed, its pins are replaced",
        direct::plan,
        90,
        fast_faults::killed,
    )
    .once(),
    scenario("fast path: the link goes down and up", direct::plan, 60, fast_faults::link_down).once(),
    scenario("fast path: another XDP program was first", direct::plan, 40, fast_faults::other_program).once(),
    scenario("fast path: jumbo frames come and go", direct::plan, 40, fast_faults::jumbo_frames).once(),
    scenario("fast path: more clients than its maps hold", direct::three_clients, 40, fast_faults::full_maps)
        .once(),
    scenario("fast path: without the right to it", direct::plan, 20, fast_faults::no_rights).once(),
    scenario("fast path: the rings run full", direct::plan, 40, fast_faults::starved).once(),
    scenario("sixteen clients come, go, roam and lose access", direct::sixteen_clients, 120, churn::sixteen)
        .core(),
    scenario("two hundred clients at once", direct::plan, 120, crowd::all_at_once).alone(),
    scenario(
        "two thousand clients, and the gateway starts again",
        direct::plan,
        400,
        crowd::restart_with_thousands,
    )
    .once()
    .alone(),
    scenario("no secret in the TRACE log, direct", direct::plan, 40, trouble::no_secret_in_trace).once(),
    scenario("no secret in the TRACE log, relayed", relay_only::plan, 40, trouble::no_secret_in_trace).once(),
];
