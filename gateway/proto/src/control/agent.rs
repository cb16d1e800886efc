//! The ICE agent of one connection, set up as the protocol wants it (connections.md sections 6.1 and 6.6). Knows
//! credentials and timing; candidates and what the agent says are the connection's.

use std::time::{Duration, Instant};

use is::{IceAgent, IceCreds};

use crate::{
    control::{candidates, stun_router::quietly},
    portal::messages::IceCredentials,
};

/// Pairs an agent may have (connections.md section 12).
pub(super) const MAX_PAIRS: usize = 100;

/// A controlled agent with the portal's credentials, without pacing between checks (section 6.1).
pub(super) fn new(
    local: &IceCredentials,
    remote: &IceCredentials,
    tie_breaker: u64,
    now: Instant,
) -> IceAgent {
    let creds =
        |c: &IceCredentials| IceCreds { ufrag: c.username.clone(), pass: c.password.as_str().to_owned() };
    let mut agent = IceAgent::new(creds(local));
    agent.set_controlling(false);
    agent.set_control_tie_breaker(tie_breaker);
    agent.set_timing_advance(Duration::ZERO);
    agent.set_max_candidate_pairs(MAX_PAIRS);
    agent.set_local_preference(candidates::local_preference);
    // These calls write both passwords to the log.
    quietly(|| {
        agent.set_remote_credentials(creds(remote));
        agent.handle_timeout(now);
        while agent.poll_event().is_some() {}
    });
    agent
}

/// A row of the table in connections.md section 6.6.
pub(super) struct Timing {
    retransmissions: usize,
    cap: Duration,
    initial: Duration,
}

/// While data flows, and until a pair is nominated.
pub(super) const ACTIVE: Timing =
    Timing { retransmissions: 45, cap: Duration::from_secs(15), initial: Duration::from_millis(250) };
/// After a quiet time.
pub(super) const IDLE: Timing =
    Timing { retransmissions: 40, cap: Duration::from_secs(25), initial: Duration::from_secs(25) };

/// From the next check on.
pub(super) fn set_timing(agent: &mut IceAgent, timing: &Timing) {
    agent.set_max_stun_retransmits(timing.retransmissions);
    agent.set_max_stun_rto(timing.cap);
    agent.set_initial_stun_rto(timing.initial);
}
