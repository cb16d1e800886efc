//! What workers report about flows, for flow logs (packets.md section 11, cli-and-service.md section 14). Types only:
//! who counts is a worker, who writes and uploads is the shell.
//!
//! The token that a report is uploaded under is a secret: nothing in here shows it.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use gateway_common::DropReason;

use crate::{
    ids::{ClientId, ResourceId},
    names::DomainName,
    portal::{ingest_token::Claims, messages::Secret},
};

/// A time by the wall clock: what passed since 1970-01-01 UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixTime(pub Duration);

/// Where wall clock and monotonic clock met last: tells what the one showed when the other showed something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meeting {
    /// What the wall clock showed.
    pub unix: UnixTime,
    /// What the monotonic clock showed.
    pub at: Instant,
}

impl Meeting {
    /// The wall clock's time at `instant`, also before the two met; not before 1970.
    #[must_use]
    pub fn unix_time(&self, instant: Instant) -> UnixTime {
        let unix = match instant.checked_duration_since(self.at) {
            Some(later) => self.unix.0.saturating_add(later),
            None => self.unix.0.saturating_sub(self.at.saturating_duration_since(instant)),
        };
        UnixTime(unix)
    }
}

/// Whom and what a flow is attributed to, by the ingest token that came with the authorization.
#[derive(Clone, PartialEq, Eq)]
pub struct Attribution {
    /// The token itself, for the upload.
    pub token: Secret,
    /// What stands in it.
    pub claims: Claims,
}

impl fmt::Debug for Attribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Attribution({})", self.claims.policy_authorization_id)
    }
}

/// Whom the flows to a client's resources are attributed to, ascending by resource; not every resource has a token.
pub type Attributions = Arc<[(ResourceId, Arc<Attribution>)]>;

/// Tells flows apart: both halves of a record have the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowId(pub u64);

/// The protocols that are accounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FlowProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl FlowProtocol {
    /// `tcp` or `udp`, as records and commands say.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// A flow that began, or one that ended. `src` is the client's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowReport {
    /// Which flow.
    pub id: FlowId,
    /// Whose.
    pub client: ClientId,
    /// Under which authorization.
    pub attribution: Arc<Attribution>,
    /// TCP or UDP.
    pub protocol: FlowProtocol,
    /// Inner source: the client's tunnel address and port.
    pub src: SocketAddr,
    /// Inner destination, as it is on our side of the translation.
    pub dst: SocketAddr,
    /// The name that the client reached it by, for a DNS resource.
    pub domain: Option<DomainName>,
    /// The ways that outbound packets took, in the order of their first use; at most 16.
    pub outers: Vec<Outer>,
    /// When it began; the same in both halves.
    pub start: UnixTime,
    /// `None` while it goes on.
    pub end: Option<FlowEnd>,
}

/// How a flow ended. Bytes are those of the payload of TCP or UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowEnd {
    /// When.
    pub end: UnixTime,
    /// When its last packet passed.
    pub last_packet: UnixTime,
    /// Resource to client.
    pub rx_packets: u64,
    /// Client to resource.
    pub tx_packets: u64,
    /// Resource to client.
    pub rx_bytes: u64,
    /// Client to resource.
    pub tx_bytes: u64,
}

/// Between which outer addresses a flow's packets travelled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outer {
    /// The client's side; through a channel of ours its peer. `None` if it is not known.
    pub src: Option<SocketAddr>,
    /// Our side; through a channel of ours the relay's address.
    pub dst: SocketAddr,
    /// Since when.
    pub since: UnixTime,
}

/// A packet that was not let through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeniedReport {
    /// Whose.
    pub client: ClientId,
    /// Why.
    pub reason: DropReason,
    /// The IP protocol number.
    pub protocol: u8,
    /// Its source, as the client sent it.
    pub src: IpAddr,
    /// Its destination, as the client sent it.
    pub dst: IpAddr,
    /// Source and destination port, if the protocol has such.
    pub ports: Option<(u16, u16)>,
    /// When.
    pub at: UnixTime,
    /// Denied packets of this client since its last report that got none of their own.
    pub suppressed: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        portal::ingest_token::{self, tests::token_of},
        relay::twin,
    };

    #[test]
    fn the_wall_clock_is_known_before_and_after_the_clocks_met() {
        let at = twin::start();
        let second = Duration::from_secs(1);
        let clock = Meeting { unix: UnixTime(10 * second), at };
        for (name, instant, expect) in [
            ("then", at, 10),
            ("later", at + 5 * second, 15),
            ("earlier", at - 4 * second, 6),
            ("never before 1970", at - 11 * second, 0),
        ] {
            assert_eq!(clock.unix_time(instant), UnixTime(expect * second), "{name}");
        }
    }

    #[test]
    fn the_token_shows_nowhere() {
        let token = token_of(&ingest_token::tests::claims());
        let attribution = ingest_token::parse(token.clone()).unwrap();
        let shown = format!("{attribution:?} {attribution:#?}");
        assert!(shown.contains(&attribution.claims.policy_authorization_id.to_string()));
        assert!(token.0.split('.').all(|part| !shown.contains(part)), "{shown}");
    }
}
