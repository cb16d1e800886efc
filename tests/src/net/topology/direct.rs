//! Public addresses everywhere: the best path is direct.
//!
//! ```text
//!   client0 192.0.2.2 ----[ router ]---- 198.51.100.2 gateway 172.20.0.1 ---- 172.20.0.100 LAN host
//!                          |      |
//!        relay0 203.0.113.2      203.0.113.66 portal
//! ```

use super::Plan;

/// One client.
pub fn plan() -> Plan {
    Plan::new("direct")
}

/// Two clients, the second at 192.0.2.66.
pub fn two_clients() -> Plan {
    Plan { clients: 2, ..Plan::new("direct, two clients") }
}

/// Three clients, the third at 192.0.2.130.
pub fn three_clients() -> Plan {
    Plan { clients: 3, ..Plan::new("direct, three clients") }
}

/// Sixteen clients, at 192.0.2.x and 198.18.x.2.
pub fn sixteen_clients() -> Plan {
    Plan { clients: 16, ..Plan::new("direct, sixteen clients") }
}
