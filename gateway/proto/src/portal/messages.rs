//! What the portal says and what we answer (portal-protocol.md sections 7 to 9), as types.

use std::net::SocketAddr;

use ipnet::IpNet;
use zeroize::Zeroizing;

use crate::{
    addr::TunnelAddrs,
    ids::{ClientId, RelayId, ResourceId},
};

/// A message from the portal that concerns the gateway.
#[derive(Debug, Clone, PartialEq)]
pub enum Ingress {
    /// After every join, and when slug or addresses change.
    Init(Box<Init>),
    /// `create_authorization` on v2, `authorize_flow` on v1.
    Authorize(Box<Authorize>),
    /// Take one resource away from one client.
    RejectAccess(ClientId, ResourceId),
    /// New filters for a resource.
    ResourceUpdated(Resource),
    /// Remote candidates, SDP attribute values.
    IceCandidates(ClientId, Vec<String>),
    /// Remote candidates that no longer hold.
    InvalidateIceCandidates(ClientId, Vec<String>),
    /// Relays that went and came.
    RelaysPresence {
        /// Relays to drop, processed first.
        disconnected: Vec<RelayId>,
        /// Relays to merge.
        connected: Vec<Relay>,
    },
    /// A new expiry, from Nov-2025 portals only (section 8.8).
    ExpiryUpdated(ClientId, ResourceId, UnixSeconds),
}

/// A message to the portal, topic `gateway`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Egress {
    /// Acknowledges [`Ingress::Authorize`]; the event name depends on the endpoint.
    Authorized {
        /// The opaque reference of the request.
        reference: String,
    },
    /// New local candidates for one client.
    BroadcastIceCandidates(ClientId, Vec<String>),
    /// Local candidates that no longer hold.
    BroadcastInvalidatedIceCandidates(ClientId, Vec<String>),
    /// No relay is usable.
    NoRelays,
}

/// Seconds since 1970-01-01 UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnixSeconds(pub u64);

/// `init` (section 8.1).
#[derive(Debug, Clone, PartialEq)]
pub struct Init {
    /// Our own tunnel addresses.
    pub interface: TunnelAddrs,
    /// Telemetry label only.
    pub account_slug: Option<String>,
    /// Relays to merge; unlisted ones stay.
    pub relays: Vec<Relay>,
    /// The complete list of authorizations; `None` if the field was absent or not a list (nothing is resynced then).
    pub authorizations: Option<Vec<AuthorizationRef>>,
    /// Flow-log settings; `None` from older portals.
    pub flow_logs: Option<FlowLogs>,
}

/// One line of `init.authorizations`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuthorizationRef {
    /// The client.
    pub client: ClientId,
    /// The resource.
    pub resource: ResourceId,
    /// When it ends; `None` is never.
    pub expires_at: Option<UnixSeconds>,
}

/// `init.flow_logs`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowLogs {
    /// Where to upload.
    pub api_url: String,
    /// 0 disables uploads.
    pub upload_interval_secs: u64,
    /// 0 is the default of 1000.
    pub upload_batch_size: u64,
}

/// `create_authorization` / `authorize_flow` (section 8.2).
#[derive(Debug, Clone, PartialEq)]
pub struct Authorize {
    /// Opaque, echoed in [`Egress::Authorized`].
    pub reference: String,
    /// What may be reached.
    pub resource: Resource,
    /// Who may reach it.
    pub client: ClientIdentity,
    /// Remote ICE credentials.
    pub client_ice: IceCredentials,
    /// Our ICE credentials for this client.
    pub gateway_ice: IceCredentials,
    /// When it ends; `None` is never.
    pub expires_at: Option<UnixSeconds>,
    /// Path negotiation without ICE; only if we announced the capability.
    pub use_iceless: bool,
    /// The JWT flow logs are uploaded under.
    pub flow_logs_ingest_token: Option<Secret>,
}

/// The peer of an authorization.
#[derive(Debug, Clone, PartialEq)]
pub struct ClientIdentity {
    /// Its id.
    pub id: ClientId,
    /// X25519 public key.
    pub public_key: [u8; 32],
    /// WireGuard preshared key.
    pub preshared_key: Key,
    /// The only source addresses it may use.
    pub tunnel: TunnelAddrs,
}

/// ICE short-term credentials (RFC 8445 section 5.3).
#[derive(Clone, PartialEq, Eq)]
pub struct IceCredentials {
    /// The username fragment.
    pub username: String,
    /// The password.
    pub password: Zeroizing<String>,
}

impl std::fmt::Debug for IceCredentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IceCredentials").field("username", &self.username).finish_non_exhaustive()
    }
}

/// 32 secret bytes that never reach a log.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(pub Zeroizing<[u8; 32]>);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

/// A secret text that never reaches a log.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub Zeroizing<String>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// A resource (section 7.1).
#[derive(Debug, Clone, PartialEq)]
pub struct Resource {
    /// Its id.
    pub id: ResourceId,
    /// What it is.
    pub kind: ResourceKind,
}

/// The three kinds a gateway sees.
#[derive(Debug, Clone, PartialEq)]
pub enum ResourceKind {
    /// A network; a single address is a /32 or /128.
    Cidr {
        /// Display only.
        name: String,
        /// Host bits are zero (a lenient parser cleared them).
        network: IpNet,
        /// Empty permits everything.
        filters: Vec<Filter>,
    },
    /// Names by pattern.
    Dns {
        /// Display only.
        name: String,
        /// A glob over labels (dns.md section 5.4).
        pattern: String,
        /// Empty permits everything.
        filters: Vec<Filter>,
    },
    /// Everything public; filters never apply.
    Internet,
}

/// One permitted protocol (section 7.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// Ports first to last, inclusive; first > last never matches.
    Tcp {
        /// First port.
        first: u16,
        /// Last port.
        last: u16,
    },
    /// Ports first to last, inclusive; first > last never matches.
    Udp {
        /// First port.
        first: u16,
        /// Last port.
        last: u16,
    },
    /// All ICMP types.
    Icmp,
}

impl Filter {
    /// Permits nothing: stands for a list none of whose entries could be read, because an empty list permits everything.
    pub const NEVER: Self = Self::Tcp { first: 1, last: 0 };
}

/// One TURN server address with its credentials (section 7.3); a dual-stack relay is two entries with one id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Relay {
    /// The relay's id.
    pub id: RelayId,
    /// Where it listens.
    pub addr: SocketAddr,
    /// `<expiry>:<salt>`.
    pub username: String,
    /// The long-term password.
    pub password: Secret,
}
