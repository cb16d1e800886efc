//! IPv4 and IPv6 on the internet and on the LAN.
//!
//! ```text
//!   client0 192.0.2.2      ----[ router ]---- 198.51.100.2  gateway 172.20.0.1     ---- 172.20.0.100     LAN host
//!           2001:db8:c::2       |      |      2001:db8:9::2         fd00:db8:20::1      fd00:db8:20::100
//!             relay0 203.0.113.2      203.0.113.66 portal
//!                    2001:db8:4::2
//! ```

use super::Plan;

/// One client.
pub fn plan() -> Plan {
    Plan { internet_v6: true, ..Plan::new("dual_stack") }
}

/// The same, but nothing but the relay connects client and gateway.
pub fn relay_only() -> Plan {
    Plan { internet_v6: true, relay_only: true, ..Plan::new("dual_stack, relay only") }
}
