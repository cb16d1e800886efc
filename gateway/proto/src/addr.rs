//! The address plan every client has compiled in (packets.md section 2).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

/// Client and gateway tunnel addresses, IPv4.
pub const TUNNEL_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(100, 64, 0, 0), 11);
/// Client and gateway tunnel addresses, IPv6.
pub const TUNNEL_V6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x2021, 0x1111, 0, 0, 0, 0, 0), 107);
/// Proxy addresses of DNS resources, IPv4.
pub const RESOURCE_V4: Ipv4Net = Ipv4Net::new_assert(Ipv4Addr::new(100, 96, 0, 0), 11);
/// Proxy addresses of DNS resources, IPv6.
pub const RESOURCE_V6: Ipv6Net =
    Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x2021, 0x1111, 0x8000, 0, 0, 0, 0), 107);

/// The largest inner packet, in bytes, and the MTU of the TUN device.
pub const MAX_INNER: usize = 1280;
/// What a WireGuard data message adds to the inner packet: header 16, tag 16.
pub const WIREGUARD_OVERHEAD: usize = 32;
/// The largest datagram we build: ChannelData header, WireGuard, inner packet (connections.md section 2.3).
pub const MAX_DATAGRAM: usize = MAX_INNER + WIREGUARD_OVERHEAD + gateway_common::channel_data::HEADER_LEN;
/// The port of the DNS servers on the gateway's own tunnel addresses (dns.md section 1).
pub const TUNNEL_DNS_PORT: u16 = 53535;

/// Is this a client's or gateway's tunnel address?
#[inline]
#[must_use]
pub fn is_tunnel(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => TUNNEL_V4.contains(&ip),
        IpAddr::V6(ip) => TUNNEL_V6.contains(&ip),
    }
}

/// Is this a proxy address of a DNS resource?
#[inline]
#[must_use]
pub fn is_resource_proxy(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => RESOURCE_V4.contains(&ip),
        IpAddr::V6(ip) => RESOURCE_V6.contains(&ip),
    }
}

/// The two addresses a tunnel endpoint has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TunnelAddrs {
    /// Within [`TUNNEL_V4`].
    pub v4: Ipv4Addr,
    /// Within [`TUNNEL_V6`].
    pub v6: Ipv6Addr,
}

impl TunnelAddrs {
    /// Is `ip` one of the two?
    #[inline]
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        match ip {
            IpAddr::V4(ip) => ip == self.v4,
            IpAddr::V6(ip) => ip == self.v6,
        }
    }
}
