//! Both sides behind ordinary NAT routers that keep ports: hole punching works with what the relay's STUN tells.
//!
//! ```text
//!   client0 10.10.0.2 --[ NAT 192.0.2.2 ]--[ router ]--[ NAT 198.51.100.2 ]-- 10.20.0.2 gateway ---- LAN host
//!                                           |      |
//!                         relay0 203.0.113.2      203.0.113.66 portal
//! ```

use super::{Nat, Plan};

/// One client.
pub fn plan() -> Plan {
    Plan { client_nat: Nat::PortPreserving, gateway_nat: Nat::PortPreserving, ..Plan::new("nat") }
}
