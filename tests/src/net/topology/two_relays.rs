//! Two relays, and nothing but a relay connects client and gateway.
//!
//! ```text
//!   client0 192.0.2.2 ----[ router ]--X UDP X-- 198.51.100.2 gateway 172.20.0.1 ---- 172.20.0.100 LAN host
//!                          |   |   |
//!        relay0 203.0.113.2    |   203.0.113.66 portal
//!                  203.0.113.130 relay1
//! ```

use super::Plan;

/// One client.
pub fn plan() -> Plan {
    Plan { relays: 2, relay_only: true, ..Plan::new("two_relays") }
}
