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
/// `same_kind` counts the earlier candidates of this kind and family, withdrawn ones included.
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
    let earlier = u32::try_from(same_kind).unwrap_or(u32::MAX);
    // A long life with many relays must end at 0, not wrap around.
    start.saturating_sub(family).saturating_sub(earlier.saturating_mul(2)).saturating_sub(if translated {
        1000
    } else {
        0
    })
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
