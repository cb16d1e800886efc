//! ICE candidates: our own from what relays tell, remote ones from the portal's lines (connections.md sections 6.2
//! to 6.4). It knows text, addresses and priorities; checks and pairs are the agent's.

use std::net::{IpAddr, SocketAddr};

use is::{Candidate, CandidateKind, IceAgent, Protocol};

use crate::{control::hold::Signalled, relay::LocalCandidate};

/// Optimistic candidates added by one call (connections.md section 6.4).
const OPTIMISTIC_PER_CALL: usize = 2;
/// The priority of an optimistic candidate: a server-reflexive one of the first preference (test-vectors.md section
/// 5, "Nov-2025 IPv4 srflx").
const OPTIMISTIC_PRIORITY: u32 = (100 << 24) | (65_534 << 8) | 255;

/// What the agent is given for a local candidate.
///
/// `None` for addresses that nobody can reach us on (section 6.2, "Validity").
pub(super) fn local(candidate: &LocalCandidate) -> Option<Candidate> {
    match *candidate {
        LocalCandidate::Host(addr) => Candidate::host(addr, Protocol::Udp),
        LocalCandidate::Reflexive { addr, base } => Candidate::server_reflexive(addr, base, Protocol::Udp),
        LocalCandidate::Relayed { addr, local, .. } => Candidate::relayed(addr, local, Protocol::Udp),
    }
    .ok()
}

/// The line the other side gets for a candidate that the agent took.
pub(super) fn signalled(candidate: &Candidate) -> Signalled {
    Signalled { priority: candidate.prio(), text: candidate.to_sdp_string() }
}

/// Is it one the other side is told of? (Peer-reflexive ones it found out itself.)
pub(super) fn is_signalled(candidate: &Candidate) -> bool {
    candidate.kind() != CandidateKind::PeerReflexive
}

/// The local preference of section 6.3.
///
/// `same_kind` counts the earlier candidates of this kind and family, withdrawn ones included. Among relayed ones it
/// does not count, because all but the newest are withdrawn: each is the successor of one that is dead, and with less
/// than that one's priority it would lose to (client's relay, our host), a pair that often died with the same relay. The
/// client would hold on to that for 16.5 s.
pub(super) fn local_preference(candidate: &Candidate, same_kind: usize) -> u32 {
    let start: u32 = match candidate.kind() {
        CandidateKind::Host => 65_535,
        CandidateKind::PeerReflexive => 49_151,
        CandidateKind::ServerReflexive => 32_767,
        CandidateKind::Relayed => 16_383,
    };
    let family = if candidate.addr().is_ipv4() { 1 } else { 0 };
    let translated = candidate.kind() == CandidateKind::Relayed
        && candidate.addr().is_ipv4() != candidate.local().is_ipv4();
    let earlier = match candidate.kind() {
        CandidateKind::Relayed => 0,
        _ => u32::try_from(same_kind).unwrap_or(u32::MAX),
    };
    // A long life with many relays must end at 0, not wrap around.
    start.saturating_sub(family).saturating_sub(earlier.saturating_mul(2)).saturating_sub(if translated {
        1000
    } else {
        0
    })
}

/// RFC 8445 section 6.1.2.3, with the client as the controlling side.
pub(super) fn pair_priority(client: u32, gateway: u32) -> u64 {
    let (g, d) = (u64::from(client), u64::from(gateway));
    (g.min(d) << 32) + 2 * g.max(d) + u64::from(g > d)
}

/// Why a remote line was not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    /// It does not parse.
    #[error("the line is no candidate")]
    Malformed,
    /// Component, transport or address that cannot belong to a peer.
    #[error("the candidate's component, transport or address is unusable")]
    Unusable,
    /// It belongs to other credentials.
    #[error("the candidate belongs to another session")]
    OtherSession,
}

/// Reads one remote line.
///
/// `ufrag` is the remote credentials' username: a line that names another is refused, one that names none is fine.
pub(super) fn remote(line: &str, ufrag: &str) -> Result<Candidate, Refused> {
    let candidate = Candidate::from_sdp_string(line).map_err(|_| Refused::Malformed)?;
    // The agent ignores other components without a word; the accessor is not public.
    let component = line.split_whitespace().nth(1);
    if component != Some("1") || candidate.proto() != Protocol::Udp || !is_destination(candidate.addr()) {
        return Err(Refused::Unusable);
    }
    match candidate.ufrag() {
        Some(other) if other != ufrag => Err(Refused::OtherSession),
        _ => Ok(candidate),
    }
}

/// Can a datagram to one peer be sent there? (Private, loopback and link-local addresses may well be a peer.)
fn is_destination(addr: SocketAddr) -> bool {
    let ip = addr.ip();
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    addr.port() != 0 && !ip.is_unspecified() && !ip.is_multicast() && !broadcast
}

/// Guesses for peers whose NAT forwards the port it is bound to: every remote (reflexive IPv4) x (IPv4 host's port)
/// that is no remote candidate yet, at most [`OPTIMISTIC_PER_CALL`].
pub(super) fn optimistic(agent: &IceAgent) -> Vec<Candidate> {
    let remotes: Vec<(CandidateKind, SocketAddr)> =
        agent.remote_candidates().map(|c| (c.kind(), c.addr())).filter(|(_, addr)| addr.is_ipv4()).collect();
    let of = |kind| remotes.iter().filter(move |(k, _)| *k == kind).map(|(_, addr)| *addr);
    let mut guesses: Vec<SocketAddr> = Vec::new();
    for reflexive in of(CandidateKind::ServerReflexive) {
        for host in of(CandidateKind::Host) {
            let guess = SocketAddr::new(reflexive.ip(), host.port());
            if guesses.len() == OPTIMISTIC_PER_CALL {
                break;
            }
            if !guesses.contains(&guess) && !remotes.iter().any(|(_, known)| *known == guess) {
                guesses.push(guess);
            }
        }
    }
    guesses
        .into_iter()
        .map(|addr| {
            let foundation = "optimistic".to_owned();
            let kind = CandidateKind::ServerReflexive;
            Candidate::from_parts(
                foundation,
                1,
                Protocol::Udp,
                OPTIMISTIC_PRIORITY,
                addr,
                kind,
                None,
                None,
                None,
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use is::{IceCreds, stun::StunMessage};

    use super::*;
    use crate::{control::tests::epoch, ids::RelayId};

    const HOST4: &str = "198.51.100.2:52625";
    const HOST6: &str = "[2001:db8::2]:52625";
    const RELAY4: &str = "203.0.113.2:64276";
    const RELAY6: &str = "[2001:db8:ffff::1]:64276";

    #[test]
    fn priorities_are_those_of_the_test_vectors() {
        // test-vectors.md section 5: earlier candidates, this candidate, priority, first digits of the foundation.
        let reflexive = |base, addr| LocalCandidate::Reflexive { addr: at(addr), base: at(base) };
        let host = |addr| LocalCandidate::Host(at(addr));
        let table = [
            ("first IPv4 host", vec![], host(HOST4), 2_130_706_175, "fffeff7e"),
            ("second IPv4 host", vec![host(HOST4)], host("198.51.100.3:52625"), 2_130_705_663, "fffcff7e"),
            ("first IPv6 host", vec![host(HOST4)], host(HOST6), 2_130_706_431, "ffffff7e"),
            ("IPv4 srflx", vec![], reflexive(HOST4, "192.0.2.9:1"), 1_686_109_951, "fffe7f64"),
            ("IPv6 srflx", vec![], reflexive(HOST6, "[2001:db8::9]:1"), 1_686_110_207, "ffff7f64"),
            ("IPv4 relay over IPv4", vec![], relayed(RELAY4, HOST4), 37_748_479, "fffe3f02"),
            ("IPv6 relay over IPv4", vec![], relayed(RELAY6, HOST4), 37_492_735, "ff173c02"),
            ("IPv4 relay over IPv6", vec![], relayed(RELAY4, HOST6), 37_492_479, "ff163c02"),
            ("IPv6 relay over IPv6", vec![], relayed(RELAY6, HOST6), 37_748_735, "ffff3f02"),
        ];
        for (name, earlier, candidate, priority, digits) in table {
            let mut agent = agent();
            for candidate in &earlier {
                assert!(agent.add_local_candidate(local(candidate).unwrap()).is_some());
            }
            let line = signalled(agent.add_local_candidate(local(&candidate).unwrap()).unwrap());
            assert_eq!(line.priority, priority, "{name}");
            assert!(line.text.starts_with(&format!("candidate:{digits}")), "{name}: {}", line.text);
            assert!(line.text.contains(&format!(" 1 udp {priority} ")), "{name}: {}", line.text);
        }
    }

    #[test]
    fn lines_have_the_recorded_form() {
        // All but the foundation, which is arbitrary; recorded in head-direct.portal.jsonl.
        let table = [
            (LocalCandidate::Host(at(HOST4)), "1 udp 2130706175 198.51.100.2 52625 typ host ufrag 7swh"),
            (
                relayed(RELAY4, HOST4),
                "1 udp 37748479 203.0.113.2 64276 typ relay raddr 0.0.0.0 rport 0 ufrag 7swh",
            ),
            (
                LocalCandidate::Reflexive { addr: at("192.0.2.9:7"), base: at(HOST4) },
                "1 udp 1686109951 192.0.2.9 7 typ srflx raddr 0.0.0.0 rport 0 ufrag 7swh",
            ),
            (
                relayed(RELAY6, HOST4),
                "1 udp 37492735 2001:db8:ffff::1 64276 typ relay raddr :: rport 0 ufrag 7swh",
            ),
        ];
        for (candidate, expect) in table {
            let line = signalled(agent().add_local_candidate(local(&candidate).unwrap()).unwrap());
            let (foundation, rest) = line.text.split_once(' ').unwrap();
            assert_eq!(rest, expect);
            let foundation = foundation.strip_prefix("candidate:").unwrap();
            assert!((9..=24).contains(&foundation.len()), "{foundation}");
        }
    }

    #[test]
    fn checks_carry_the_priorities_of_the_test_vectors() {
        let table = [
            (LocalCandidate::Host(at(HOST4)), 1_862_270_719),
            (LocalCandidate::Host(at(HOST6)), 1_862_270_975),
            (relayed(RELAY4, HOST4), 1_849_687_807),
            (relayed(RELAY6, HOST4), 1_849_432_063),
        ];
        for (candidate, priority) in table {
            let mut agent = agent();
            let candidate = agent.add_local_candidate(local(&candidate).unwrap()).unwrap().addr();
            let peer = if candidate.is_ipv4() { "192.0.2.2" } else { "2001:db8::7" };
            let line = format!("candidate:x 1 UDP 2130706175 {peer} 52625 typ host");
            agent.add_remote_candidate(remote(&line, "o7vl").unwrap());
            let now = epoch();
            agent.handle_timeout(now);
            agent.handle_timeout(now);
            let check = agent.poll_transmit().unwrap();
            assert_eq!(StunMessage::parse(&check.contents).unwrap().prio(), Some(priority));
        }
    }

    #[test]
    fn pair_priorities_are_those_of_the_test_vectors() {
        let (host, relay) = (2_130_706_175, 37_748_479);
        let table = [
            (host, host, 9_151_313_343_271_665_150),
            (host, relay, 162_128_487_040_155_135),
            (relay, host, 162_128_487_040_155_134),
            (relay, relay, 162_128_482_854_239_742),
        ];
        for (client, gateway, expect) in table {
            assert_eq!(pair_priority(client, gateway), expect);
        }
    }

    #[test]
    fn remote_lines_are_read_one_by_one() {
        use Refused::{Malformed, OtherSession, Unusable};
        type Case = (&'static str, Result<(CandidateKind, &'static str, u32), Refused>);
        let table: &[Case] = &[
            // Recorded: HEAD host and relay, Nov-2025 srflx without ufrag.
            (
                "candidate:fffeff7e1d9a12f01a558ef0 1 udp 2130706175 192.0.2.2 52625 typ host ufrag o7vl",
                Ok((CandidateKind::Host, "192.0.2.2:52625", 2_130_706_175)),
            ),
            (
                "candidate:fffe3f02b25718dd1f11852f 1 udp 37748479 203.0.113.2 58035 typ relay raddr 0.0.0.0 rport 0 ufrag o7vl",
                Ok((CandidateKind::Relayed, "203.0.113.2:58035", 37_748_479)),
            ),
            (
                "candidate:fffeff641d38890487cb79d3 1 udp 1694498559 198.51.100.2 52625 typ srflx raddr 0.0.0.0 rport 0",
                Ok((CandidateKind::ServerReflexive, "198.51.100.2:52625", 1_694_498_559)),
            ),
            // Without raddr, with what we do not know, with loopback and IPv6.
            (
                "candidate:1 1 UDP 7 192.0.2.2 1 typ srflx",
                Ok((CandidateKind::ServerReflexive, "192.0.2.2:1", 7)),
            ),
            (
                "candidate:1 1 udp 7 127.0.0.1 1 typ host generation 0 network-id 3",
                Ok((CandidateKind::Host, "127.0.0.1:1", 7)),
            ),
            ("candidate:1 1 udp 7 fe80::1 9 typ host", Ok((CandidateKind::Host, "[fe80::1]:9", 7))),
            ("candidate:1 1 udp 7 192.0.2.2 1 typ host ufrag 7swh", Err(OtherSession)),
            ("candidate:1 2 udp 7 192.0.2.2 1 typ host", Err(Unusable)),
            ("candidate:1 1 tcp 7 192.0.2.2 1 typ host tcptype active", Err(Unusable)),
            ("candidate:1 1 udp 7 192.0.2.2 0 typ host", Err(Unusable)),
            ("candidate:1 1 udp 7 0.0.0.0 1 typ host", Err(Unusable)),
            ("candidate:1 1 udp 7 ff02::1 1 typ host", Err(Unusable)),
            ("a=candidate:1 1 udp 7 192.0.2.2 1 typ host", Err(Malformed)),
            ("candidate:1 1 udp 7 [::1] 1 typ host", Err(Malformed)),
            ("candidate:1 1 udp 99999999999 192.0.2.2 1 typ host", Err(Malformed)),
            ("candidate:1 1 udp 7 192.0.2.2 70000 typ host", Err(Malformed)),
            ("candidate:1 1 udp 7 192.0.2.2 1 typ moon", Err(Malformed)),
            ("candidate:1 1 udp 7 192.0.2.2", Err(Malformed)),
            ("", Err(Malformed)),
        ];
        for (line, expect) in table {
            let read = remote(line, "o7vl").map(|c| (c.kind(), c.addr(), c.prio()));
            assert_eq!(read, expect.map(|(kind, addr, prio)| (kind, at(addr), prio)), "{line}");
        }
    }

    #[test]
    fn own_candidates_have_addresses_others_can_reach() {
        let table = [
            ("169.254.0.1:1", false),
            ("255.255.255.255:1", false),
            ("224.0.0.1:1", false),
            ("0.0.0.0:1", false),
            ("[ff02::1]:1", false),
            ("[::]:1", false),
            ("10.0.0.1:1", true),
            ("127.0.0.1:1", true),
            ("[fe80::1]:1", true),
        ];
        for (addr, valid) in table {
            assert_eq!(local(&LocalCandidate::Host(at(addr))).is_some(), valid, "{addr}");
        }
    }

    #[test]
    fn a_reflexive_candidate_that_equals_the_host_one_is_redundant() {
        let mut agent = agent();
        agent.add_local_candidate(local(&LocalCandidate::Host(at(HOST4))).unwrap());
        let same = LocalCandidate::Reflexive { addr: at(HOST4), base: at(HOST4) };
        assert!(agent.add_local_candidate(local(&same).unwrap()).is_none());
    }

    #[test]
    fn many_candidates_in_one_life_never_overflow_the_preference() {
        let reflexive = LocalCandidate::Reflexive { addr: at("[2001:db8::9]:1"), base: at(HOST6) };
        let candidate = local(&reflexive).unwrap();
        assert_eq!(local_preference(&candidate, usize::MAX), 0);
        assert_eq!(local_preference(&candidate, 16_383), 1);
        assert_eq!(local_preference(&candidate, 16_384), 0);
    }

    #[test]
    fn a_relayed_candidate_succeeds_to_the_priority_of_the_one_before() {
        let mut agent = agent();
        let first = local(&relayed(RELAY4, HOST4)).unwrap();
        let first = signalled(agent.add_local_candidate(first).unwrap());
        agent.invalidate_candidate(&local(&relayed(RELAY4, HOST4)).unwrap());
        let second = local(&relayed("203.0.113.2:64277", HOST4)).unwrap();
        let second = signalled(agent.add_local_candidate(second).unwrap());
        assert_eq!(first.priority, second.priority);
        // A client's relay reached from our host was worth as much; ours reached from its host is preferred.
        let (host, relay) = (2_130_706_175, second.priority);
        assert!(pair_priority(host, relay) > pair_priority(relay, host));
    }

    #[test]
    fn optimistic_candidates_join_reflexive_addresses_with_host_ports() {
        let mut agent = agent();
        let mut add = |line: &str| {
            agent.add_remote_candidate(remote(line, "o7vl").unwrap());
            let guesses = optimistic(&agent);
            for guess in &guesses {
                agent.add_remote_candidate(guess.clone());
            }
            guesses.iter().map(|c| c.addr().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(add("candidate:1 1 udp 9 10.0.0.2 52625 typ host"), [""; 0]);
        assert_eq!(add("candidate:1 1 udp 8 192.0.2.7 61000 typ srflx"), ["192.0.2.7:52625"]);
        assert_eq!(add("candidate:1 1 udp 9 2001:db8::7 52625 typ host"), [""; 0], "IPv4 only");
        assert_eq!(add("candidate:1 1 udp 7 10.0.0.3 1111 typ host"), ["192.0.2.7:1111"]);
        assert_eq!(
            add("candidate:1 1 udp 8 192.0.2.8 61000 typ srflx"),
            ["192.0.2.8:52625", "192.0.2.8:1111"],
            "at most two of one call"
        );
        assert_eq!(add("candidate:1 1 udp 2 203.0.113.2 5 typ relay"), [""; 0]);
    }

    fn at(addr: &str) -> SocketAddr {
        addr.parse().unwrap()
    }

    fn relayed(addr: &str, local: &str) -> LocalCandidate {
        let relay = RelayId(uuid::Uuid::from_u128(1));
        LocalCandidate::Relayed { addr: at(addr), relay, server: at("203.0.113.2:3478"), local: at(local) }
    }

    fn agent() -> IceAgent {
        let creds = |ufrag: &str| IceCreds { ufrag: ufrag.to_owned(), pass: "p".repeat(22) };
        let mut agent = IceAgent::new(creds("7swh"));
        agent.set_local_preference(local_preference);
        agent.set_remote_credentials(creds("o7vl"));
        agent
    }
}
