//! ICE as a client does it: timing profiles, candidates and their text (connections.md section 6).
//!
//! The agent itself is crate `is`; this file holds what differs between the generations.

use std::net::SocketAddr;
use std::time::Duration;

use is::{Candidate, CandidateKind, IceAgent, IceCreds, Protocol};

use super::config::Generation;

/// A controlling agent with fixed credentials and the active profile.
pub(super) fn agent(local: IceCreds, remote: IceCreds) -> IceAgent {
    let mut agent = IceAgent::new(local);
    agent.set_remote_credentials(remote);
    agent.set_controlling(true);
    agent.set_timing_advance(Duration::ZERO);
    agent.set_max_candidate_pairs(100);
    set_profile(&mut agent, false);
    agent
}

/// The client's rows of the table in section 6.6; both generations share them.
pub(super) fn set_profile(agent: &mut IceAgent, idle: bool) {
    let (retransmits, cap, initial) = if idle { (4, 25_000, 25_000) } else { (12, 1_500, 250) };
    agent.set_max_stun_retransmits(retransmits);
    agent.set_max_stun_rto(Duration::from_millis(cap));
    agent.set_initial_stun_rto(Duration::from_millis(initial));
}

/// A candidate of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Local {
    Host(SocketAddr),
    Reflexive { addr: SocketAddr, base: SocketAddr },
    Relayed { addr: SocketAddr, local: SocketAddr },
}

/// Adds a candidate to the agent and returns the line to signal, if it is to be signalled.
///
/// A Nov-2025 client tells the remote of its reflexive candidate but not its own agent, and that line has
/// no ufrag (section 1.2).
pub(super) fn add_local(agent: &mut IceAgent, candidate: Local, generation: Generation) -> Option<String> {
    let candidate = match candidate {
        Local::Host(addr) => Candidate::host(addr, Protocol::Udp),
        Local::Reflexive { addr, base } => Candidate::server_reflexive(addr, base, Protocol::Udp),
        Local::Relayed { addr, local } => Candidate::relayed(addr, local, Protocol::Udp),
    }
    // Link-local, multicast and the like are not created (section 6.2).
    .ok()?;
    if generation == Generation::Nov25 && candidate.kind() == CandidateKind::ServerReflexive {
        return Some(candidate.to_sdp_string());
    }
    agent.add_local_candidate(candidate).map(Candidate::to_sdp_string)
}

/// Withdraws our relayed candidate; returns the line to signal.
pub(super) fn remove_relayed(agent: &mut IceAgent, addr: SocketAddr) -> Option<String> {
    let candidate =
        agent.local_candidates().find(|c| c.kind() == CandidateKind::Relayed && c.addr() == addr)?;
    agent.invalidate_candidate(&candidate).then(|| candidate.to_sdp_string())
}

/// Lines in the order upstream sends them: descending priority, ties by text (section 4.3).
pub(super) fn sort_lines(lines: &mut Vec<String>) {
    let priority =
        |line: &String| line.split_whitespace().nth(3).and_then(|p| p.parse::<u32>().ok()).unwrap_or(0);
    lines.sort_by(|a, b| priority(b).cmp(&priority(a)).then_with(|| a.cmp(b)));
    lines.dedup();
}

/// Remote reflexive addresses nobody announced: each reflexive IP with each host port, two at most per call
/// (section 6.4, "optimistic").
pub(super) fn optimistic(agent: &IceAgent) -> Vec<Candidate> {
    let of = |kind| agent.remote_candidates().filter(move |c| c.kind() == kind && c.addr().is_ipv4());
    let mut new: Vec<Candidate> = Vec::new();
    for reflexive in of(CandidateKind::ServerReflexive) {
        for host in of(CandidateKind::Host) {
            let addr = SocketAddr::new(reflexive.addr().ip(), host.addr().port());
            let known = agent.remote_candidates().chain(new.iter().cloned()).any(|c| c.addr() == addr);
            if !known && new.len() < 2 {
                new.extend(Candidate::server_reflexive(addr, addr, Protocol::Udp));
            }
        }
    }
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    fn creds(ufrag: &str) -> IceCreds {
        IceCreds { ufrag: ufrag.into(), pass: "5dm2b4nl6bk6m77jluz5md".into() }
    }

    /// Everything but the hash part of the foundation, which is build-specific (section 6.2).
    fn shape(line: &str) -> String {
        let (foundation, rest) = line.split_once(' ').unwrap();
        format!("{} {rest}", &foundation[.."candidate:".len() + 8])
    }

    #[test]
    fn lines_of_both_generations_are_the_recorded_ones() {
        let host: SocketAddr = "192.0.2.2:52625".parse().unwrap();
        let relayed: SocketAddr = "203.0.113.2:58035".parse().unwrap();
        let all = [
            Local::Host(host),
            Local::Reflexive { addr: host, base: host },
            Local::Relayed { addr: relayed, local: host },
        ];
        let lines = |generation, ufrag| {
            let mut agent = agent(creds(ufrag), creds("7swh"));
            all.iter()
                .filter_map(|c| add_local(&mut agent, *c, generation))
                .map(|l| shape(&l))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            lines(Generation::Head, "o7vl"),
            [
                "candidate:fffeff7e 1 udp 2130706175 192.0.2.2 52625 typ host ufrag o7vl",
                "candidate:fffe3f02 1 udp 37748479 203.0.113.2 58035 typ relay raddr 0.0.0.0 rport 0 ufrag o7vl",
            ]
        );
        assert_eq!(
            lines(Generation::Nov25, "xq3p"),
            [
                "candidate:fffeff7e 1 udp 2130706175 192.0.2.2 52625 typ host ufrag xq3p",
                "candidate:fffeff64 1 udp 1694498559 192.0.2.2 52625 typ srflx raddr 0.0.0.0 rport 0",
                "candidate:fffe3f02 1 udp 37748479 203.0.113.2 58035 typ relay raddr 0.0.0.0 rport 0 ufrag xq3p",
            ]
        );
    }

    #[test]
    fn priorities_are_those_of_vector_5() {
        let v6: SocketAddr = "[2001:db8::2]:52625".parse().unwrap();
        let v4: SocketAddr = "192.0.2.2:52625".parse().unwrap();
        let relay6: SocketAddr = "[2001:db8:ffff::1]:50000".parse().unwrap();
        let mapped: SocketAddr = "198.51.100.9:7".parse().unwrap();
        for (candidate, priority) in [
            (Local::Host(v6), 2_130_706_431),
            (Local::Reflexive { addr: mapped, base: v4 }, 1_686_109_951),
            (Local::Relayed { addr: relay6, local: v6 }, 37_748_735),
            (Local::Relayed { addr: relay6, local: v4 }, 37_492_735),
        ] {
            let mut agent = agent(creds("aaaa"), creds("bbbb"));
            let line = add_local(&mut agent, candidate, Generation::Head).unwrap();
            assert_eq!(line.split(' ').nth(3), Some(&*priority.to_string()), "{line}");
        }
    }

    #[test]
    fn lines_are_signalled_best_first() {
        let mut lines: Vec<String> =
            ["candidate:b 1 udp 5 h", "candidate:a 1 udp 7 h", "candidate:a 1 udp 5 h"]
                .map(String::from)
                .into();
        sort_lines(&mut lines);
        assert_eq!(lines, ["candidate:a 1 udp 7 h", "candidate:a 1 udp 5 h", "candidate:b 1 udp 5 h"]);
    }

    #[test]
    fn optimistic_candidates_join_reflexive_addresses_and_host_ports() {
        let mut agent = agent(creds("aaaa"), creds("bbbb"));
        for line in
            ["candidate:1 1 udp 9 10.0.0.1 52625 typ host", "candidate:2 1 udp 8 198.51.100.9 7 typ srflx"]
        {
            agent.add_remote_candidate(Candidate::from_sdp_string(line).unwrap());
        }
        let new: Vec<_> = optimistic(&agent).iter().map(Candidate::addr).collect();
        assert_eq!(new, ["198.51.100.9:52625".parse().unwrap()]);
    }
}
