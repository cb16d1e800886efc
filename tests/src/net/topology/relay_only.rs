//! Nothing but a relay connects client and gateway.
//!
//! ```text
//!   client0 192.0.2.2 ----[ router ]--X UDP X-- 198.51.100.2 gateway 172.20.0.1 ---- 172.20.0.100 LAN host
//!                          |      |
//!        relay0 203.0.113.2      203.0.113.66 portal
//! ```

use super::Plan;

/// One client.
pub fn plan() -> Plan {
    Plan { relay_only: true, ..Plan::new("relay_only") }
}
