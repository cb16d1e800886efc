//! Which of the portal's two gateway endpoints is spoken, and when to try the other (portal-protocol.md section 12).

use std::fmt;

use super::failure::{Failure, Refusal};

/// A generation of the portal's gateway endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Generation {
    /// `/gateway/websocket`: every portal has it, a Nov-2025 portal has nothing else.
    V1,
    /// `/gateway/v2/websocket`: portals since 1.6.0.
    V2,
}

impl Generation {
    fn other(self) -> Self {
        match self {
            Self::V1 => Self::V2,
            Self::V2 => Self::V1,
        }
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        })
    }
}

/// Starts with v2, moves to the other endpoint when the portal has no such route, and stays with what works.
#[derive(Debug)]
pub struct Endpoints {
    current: Generation,
    forced: bool,
    /// The other endpoint was already tried since the last success or delay.
    switched: bool,
}

impl Endpoints {
    /// `forced` pins one endpoint; there is no fallback then.
    #[must_use]
    pub fn new(forced: Option<Generation>) -> Self {
        Self { current: forced.unwrap_or(Generation::V2), forced: forced.is_some(), switched: false }
    }

    /// The endpoint of the next attempt.
    #[must_use]
    pub fn current(&self) -> Generation {
        self.current
    }

    /// Returns true if the next attempt should be made at once, on the other endpoint.
    pub fn handle_failure(&mut self, failure: &Failure) -> bool {
        let Failure::Refused(refusal) = failure else {
            self.switched = false;
            return false;
        };
        if self.forced || !is_missing_route(refusal) {
            self.switched = false;
            return false;
        }
        self.current = self.current.other();
        // Both endpoints refused one after the other: this portal (or proxy) is broken, wait before the next round.
        self.switched = !self.switched;
        self.switched
    }

    /// The join succeeded: keep this endpoint.
    pub fn handle_joined(&mut self) {
        self.switched = false;
    }
}

/// Phoenix answers a path without route by 404. A 403 may be a portal that blocks our country: to go on to v1 would
/// put the token into a query string for nothing.
fn is_missing_route(refusal: &Refusal) -> bool {
    refusal.status == 404
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_missing_route_moves_to_the_other_endpoint_once_per_round() {
        let mut endpoints = Endpoints::new(None);
        assert_eq!(endpoints.current(), Generation::V2);
        assert!(endpoints.handle_failure(&refused(404)), "v1 is tried at once");
        assert_eq!(endpoints.current(), Generation::V1);
        assert!(!endpoints.handle_failure(&refused(404)), "neither exists: wait");
        assert_eq!(endpoints.current(), Generation::V2, "and begin again with v2");
        assert!(endpoints.handle_failure(&refused(404)));
        endpoints.handle_joined();
        assert_eq!(endpoints.current(), Generation::V1, "the working endpoint is remembered");
        assert!(!endpoints.handle_failure(&Failure::JoinTimeout));
        assert_eq!(endpoints.current(), Generation::V1);
        assert!(endpoints.handle_failure(&refused(404)), "the portal changed: back to v2");
        assert_eq!(endpoints.current(), Generation::V2);
    }

    #[test]
    fn other_refusals_and_forced_endpoints_stay() {
        let mut endpoints = Endpoints::new(None);
        for status in [401, 403, 409, 503] {
            assert!(!endpoints.handle_failure(&refused(status)), "{status}");
        }
        let problem = br#"{"code":"unauthenticated","detail":"no","title":"Forbidden","status":403}"#;
        let refusal = Refusal::new(403, Some("application/problem+json"), None, problem, Duration::ZERO);
        assert!(!endpoints.handle_failure(&Failure::Refused(refusal)));
        assert_eq!(endpoints.current(), Generation::V2);
        let mut forced = Endpoints::new(Some(Generation::V1));
        assert!(!forced.handle_failure(&refused(404)));
        assert_eq!(forced.current(), Generation::V1);
    }

    fn refused(status: u16) -> Failure {
        Failure::Refused(Refusal::new(status, None, None, b"", Duration::ZERO))
    }
}
