//! What a client is told when it starts, what it can be told later, and what it reports.
//!
//! Configuration is one JSON file; commands are JSON lines on stdin; events are JSON lines on stdout.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The configuration file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `ws://ADDR:PORT/`: the portal, without the endpoint's path.
    pub portal: String,
    /// Client token.
    pub token: Token,
    /// Firezone id; hashed to `external_id` when it is a UUID.
    #[serde(default = "default_id")]
    pub id: String,
    /// Device name; a portal plan is found by it.
    #[serde(default = "default_name")]
    pub name: String,
    /// Which upstream client this one behaves like (connections.md section 1.2).
    #[serde(default)]
    pub generation: Generation,
    /// Offer and accept relay candidates only.
    #[serde(default)]
    pub relay_only: bool,
    /// Name of the TUN device.
    #[serde(default = "default_tun")]
    pub tun: String,
    /// Local UDP port; another is taken when it is in use.
    #[serde(default = "default_port")]
    pub port: u16,
    /// Resources to request as soon as `init` has come.
    #[serde(default)]
    pub request: Vec<Uuid>,
    /// Request a resource when its first packet is seen, and again after ICMP "prohibited".
    #[serde(default)]
    pub on_demand: bool,
    /// Destinations routed into the TUN although no resource of `init` covers them.
    #[serde(default)]
    pub extra_routes: Vec<IpNet>,
    /// Rewrites the source of every IPv4 packet sent into the tunnel (a client that lies).
    #[serde(default)]
    pub spoof_source: Option<std::net::Ipv4Addr>,
}

/// A token that does not show itself in Debug output.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Token(pub String);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token")
    }
}

impl Config {
    /// A HEAD client of this portal that requests nothing by itself.
    #[must_use]
    pub fn new(portal: &str, token: &str, name: &str) -> Self {
        Self {
            portal: portal.into(),
            token: Token(token.into()),
            id: name.into(),
            name: name.into(),
            generation: Generation::default(),
            relay_only: false,
            tun: default_tun(),
            port: default_port(),
            request: Vec::new(),
            on_demand: false,
            extra_routes: Vec::new(),
            spoof_source: None,
        }
    }
}

/// Which upstream client to imitate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Generation {
    /// Aug-2026: v2 endpoint, `request_authorization`, srflx in the agent.
    #[default]
    Head,
    /// Nov-2025: v1 endpoint, `create_flow`, srflx only told to the remote.
    Nov25,
}

fn default_id() -> String {
    "standin-client".into()
}

fn default_name() -> String {
    "standin-client".into()
}

fn default_tun() -> String {
    "tun-client".into()
}

fn default_port() -> u16 {
    52625
}

/// A line on stdin.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "snake_case")]
pub enum Command {
    /// Ask the portal for a resource.
    Request {
        /// Its id.
        resource: Uuid,
    },
    /// Assign these proxy addresses to a name of a DNS resource, at the gateway that granted it, or else at any.
    Assign {
        /// The resource.
        resource: Uuid,
        /// The name.
        domain: String,
        /// Of the ranges that are for it (packets.md section 2).
        proxies: Vec<IpAddr>,
    },
    /// Send this inner packet through the tunnel (of the first gateway), as it is.
    SendInner {
        /// The IP packet.
        hex: String,
    },
    /// Send this datagram from the client's UDP socket, outside of any tunnel.
    SendOuter {
        /// Where to.
        to: SocketAddr,
        /// The UDP payload.
        hex: String,
    },
    /// Close the WebSocket and log in again; tunnels stay.
    Reconnect,
    /// What a network change does: new key, new login, all connections and allocations anew.
    Roam,
    /// Forget the connections without a goodbye, as if the process had been killed, and stay logged in.
    Vanish,
    /// Print [`Event::Stats`].
    Stats,
    /// Say goodbye to every gateway and exit 0.
    Stop,
}

/// A line on stdout.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// `init` has come; the TUN is up with these addresses.
    Joined {
        /// Tunnel address.
        ipv4: IpAddr,
        /// Tunnel address.
        ipv6: IpAddr,
    },
    /// The WebSocket ended.
    PortalLost {
        /// Why.
        reason: String,
    },
    /// An allocation exists on this relay.
    Relay {
        /// Its id.
        relay: Uuid,
        /// Our address on it.
        address: SocketAddr,
    },
    /// The portal granted a resource.
    Authorized {
        /// Which.
        resource: Uuid,
        /// At which gateway.
        gateway: Uuid,
        /// Milliseconds since it was requested.
        ms: u64,
    },
    /// The portal refused a resource, or the gateway did not answer it.
    Refused {
        /// Which.
        resource: Uuid,
        /// The portal's reason.
        reason: String,
    },
    /// ICE nominated a pair; a later one replaces it.
    Path {
        /// The gateway.
        gateway: Uuid,
        /// How packets go.
        kind: Path,
        /// Our end of the pair.
        local: SocketAddr,
        /// The gateway's end.
        remote: SocketAddr,
    },
    /// The first WireGuard handshake with this gateway is done.
    Established {
        /// The gateway.
        gateway: Uuid,
        /// Milliseconds since the connection was created.
        ms: u64,
    },
    /// The gateway answered a packet with "administratively prohibited".
    IcmpProhibited {
        /// Destination of the packet that was refused.
        dst: IpAddr,
    },
    /// The gateway answered a packet with "unreachable".
    IcmpUnreachable {
        /// Destination of the packet that was refused.
        dst: IpAddr,
    },
    /// What the gateway says of a name that was assigned addresses.
    DomainStatus {
        /// Under which resource.
        resource: Uuid,
        /// The name.
        domain: String,
        /// `Active` or `Inactive`.
        status: String,
    },
    /// The gateway closed the connection.
    Goodbye {
        /// The gateway.
        gateway: Uuid,
    },
    /// The connection is gone, for whatever reason.
    Closed {
        /// The gateway.
        gateway: Uuid,
        /// Why.
        reason: String,
    },
    /// Counters since the start.
    Stats(Stats),
    /// A command could not be understood or done.
    Error {
        /// Why.
        message: String,
    },
}

/// How the packets of a connection travel (connections.md section 5.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Path {
    /// Host to host.
    Direct,
    /// Bare datagrams to the gateway's relay candidate.
    ToRelay,
    /// ChannelData to our relay, which talks to the gateway's own socket.
    Relayed,
    /// ChannelData to our relay, which talks to the gateway's relay candidate.
    RelayedToRelay,
}

impl Path {
    /// Is any relay involved?
    #[must_use]
    pub fn is_relayed(self) -> bool {
        self != Self::Direct
    }
}

/// Packet counters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Inner packets sent.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Inner packets received.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Inner packets received with ECN CE.
    pub rx_ce: u64,
    /// Datagrams received as ChannelData.
    pub rx_channel_data: u64,
    /// Datagrams or packets that could not be used.
    pub dropped: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_what_the_readme_shows() {
        let command: Command = serde_json::from_str(r#"{"cmd":"send_inner","hex":"45"}"#).unwrap();
        assert!(matches!(command, Command::SendInner { .. }));
        let event = Event::IcmpProhibited { dst: "10.44.0.9".parse().unwrap() };
        assert_eq!(
            serde_json::to_string(&event).unwrap(),
            r#"{"event":"icmp_prohibited","dst":"10.44.0.9"}"#
        );
        let stats = serde_json::to_value(Event::Stats(Stats::default())).unwrap();
        assert_eq!((stats["event"].as_str(), stats["rx_packets"].as_u64()), (Some("stats"), Some(0)));
    }

    #[test]
    fn the_debug_form_hides_the_token() {
        let config = Config::new("ws://portal/", "very-secret", "c");
        assert!(!format!("{config:?}").contains("very-secret"));
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&text).unwrap().token.0, "very-secret");
    }
}
