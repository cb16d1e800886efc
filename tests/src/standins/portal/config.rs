//! What a portal knows before anybody connects: tokens, devices, resources, relays.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use uuid::Uuid;

use super::derive::{self, Credentials};

/// Everything [`super::Portal::start`] needs. All fields have a usable default.
#[derive(Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where to listen inside the namespace; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Which generations of endpoints are served.
    pub generation: Generation,
    /// What a gateway must present.
    pub gateway_token: String,
    /// What a client must present.
    pub client_token: String,
    /// Account slug in `init`.
    pub account_slug: String,
    /// Devices with fixed ids and addresses; others get derived ones when they connect.
    pub devices: Vec<Device>,
    /// What clients may ask for.
    pub resources: Vec<Resource>,
    /// Relays offered to everybody.
    pub relays: Vec<Relay>,
    /// Account feature "iceless"; used for a pair only when both ends announced the capability.
    pub iceless: bool,
    /// How long authorizations last from now on; `None` sends no `expires_at`.
    pub expiry: Option<Duration>,
    /// How long the gateway may take to acknowledge (portal-protocol.md section 8.2: 15 s).
    pub acknowledge_timeout: Duration,
    /// Start with relays held back: `init` without relays, `no_relays` answered with none.
    pub hold_relays: bool,
    /// Tokens with `uploads_enabled`, and the intervals of `init.flow_logs`.
    pub flow_logs: FlowLogs,
    /// Claims that ingest tokens have instead of the usual ones.
    pub ingest_claims: serde_json::Map<String, Value>,
    /// PEM certificate chain and key: serves `wss://` instead of `ws://`.
    pub tls: Option<Tls>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            generation: Generation::Both,
            gateway_token: "standin-gateway-token.c3RhbmQtaW4tZ2F0ZXdheQ".into(),
            client_token: "standin-client-token.c3RhbmQtaW4tY2xpZW50".into(),
            account_slug: "standin".into(),
            devices: Vec::new(),
            resources: Vec::new(),
            relays: Vec::new(),
            iceless: false,
            expiry: Some(Duration::from_secs(14 * 24 * 3600)),
            acknowledge_timeout: Duration::from_secs(15),
            hold_relays: false,
            flow_logs: FlowLogs::default(),
            ingest_claims: serde_json::Map::new(),
            tls: None,
        }
    }
}

/// Which endpoints exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Generation {
    /// v2 and v1, like the portal at HEAD.
    Both,
    /// Only `/gateway/websocket` and `/client/websocket`, like Nov-2025: v2 paths answer 404.
    V1Only,
}

/// A gateway or a client the script wants to know by id.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Device {
    /// Matched against the `name` parameter of the connect URL.
    pub name: String,
    /// The id at the portal.
    pub id: Uuid,
    /// Tunnel address within 100.64.0.0/11.
    pub ipv4: Ipv4Addr,
    /// Tunnel address within fd00:2021:1111::/107.
    pub ipv6: Ipv6Addr,
}

/// A resource (portal-protocol.md section 7.1).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Resource {
    /// Its id.
    pub id: Uuid,
    /// Display name.
    pub name: String,
    /// What it covers.
    #[serde(flatten)]
    pub target: Target,
    /// Empty allows everything; ignored for the Internet.
    #[serde(default)]
    pub filters: Vec<Filter>,
}

/// What a resource covers; the tag is the wire's `type`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Target {
    /// A network, host bits zero: `10.44.0.0/16`.
    Cidr {
        /// The network.
        address: String,
    },
    /// A DNS pattern: `*.git.example.net`.
    Dns {
        /// The pattern.
        address: String,
    },
    /// Everything public.
    Internet,
}

/// One entry of a resource's filter list (section 7.2); the tag is the wire's `protocol`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "protocol", rename_all = "lowercase")]
pub enum Filter {
    /// TCP, destination ports from..=to; both absent means all.
    Tcp {
        /// First port.
        #[serde(skip_serializing_if = "Option::is_none")]
        port_range_start: Option<u16>,
        /// Last port.
        #[serde(skip_serializing_if = "Option::is_none")]
        port_range_end: Option<u16>,
    },
    /// UDP, likewise.
    Udp {
        /// First port.
        #[serde(skip_serializing_if = "Option::is_none")]
        port_range_start: Option<u16>,
        /// Last port.
        #[serde(skip_serializing_if = "Option::is_none")]
        port_range_end: Option<u16>,
    },
    /// All of ICMP.
    Icmp,
}

impl Filter {
    /// TCP ports `from..=to`.
    #[must_use]
    pub fn tcp(from: u16, to: u16) -> Self {
        Self::Tcp { port_range_start: Some(from), port_range_end: Some(to) }
    }

    /// UDP ports `from..=to`.
    #[must_use]
    pub fn udp(from: u16, to: u16) -> Self {
        Self::Udp { port_range_start: Some(from), port_range_end: Some(to) }
    }
}

impl Resource {
    /// A network, without filters; the id is derived from the name.
    #[must_use]
    pub fn cidr(name: &str, network: &str) -> Self {
        Self::new(name, Target::Cidr { address: network.into() })
    }

    /// A DNS pattern, without filters; the id is derived from the name.
    #[must_use]
    pub fn dns(name: &str, pattern: &str) -> Self {
        Self::new(name, Target::Dns { address: pattern.into() })
    }

    /// The Internet resource; the id is derived from the name.
    #[must_use]
    pub fn internet(name: &str) -> Self {
        Self::new(name, Target::Internet)
    }

    /// The same with these filters.
    #[must_use]
    pub fn with_filters(mut self, filters: impl Into<Vec<Filter>>) -> Self {
        self.filters = filters.into();
        self
    }

    fn new(name: &str, target: Target) -> Self {
        Self {
            id: derive::uuid_from(&format!("resource {name}")),
            name: name.into(),
            target,
            filters: vec![],
        }
    }

    /// As a gateway sees it.
    #[must_use]
    pub(super) fn for_gateway(&self) -> Value {
        match &self.target {
            Target::Internet => json!({ "type": "internet", "id": self.id }),
            Target::Cidr { address } => self.addressed("cidr", address),
            Target::Dns { address } => self.addressed("dns", address),
        }
    }

    /// As a client of this generation sees it in its `init`.
    #[must_use]
    pub(super) fn for_client(&self, v2: bool, site: Uuid) -> Value {
        let mut value = self.for_gateway();
        let sites = json!([{ "id": site, "name": "standin-site" }]);
        value[if v2 { "sites" } else { "gateway_groups" }] = sites;
        match &self.target {
            Target::Internet => value["name"] = json!(self.name),
            Target::Cidr { .. } => value["address_description"] = Value::Null,
            Target::Dns { .. } => {
                value["address_description"] = Value::Null;
                value["ip_stack"] = json!("dual");
            }
        }
        value
    }

    fn addressed(&self, kind: &str, address: &str) -> Value {
        json!({ "type": kind, "id": self.id, "name": self.name, "address": address, "filters": self.filters })
    }
}

/// A relay everybody is offered.
#[derive(Clone, Serialize, Deserialize)]
pub struct Relay {
    /// Its id.
    pub id: Uuid,
    /// One address, or one per family; each becomes an entry with the same id.
    pub addrs: Vec<SocketAddr>,
    /// How credentials are made.
    pub scheme: Scheme,
    /// Seconds since 1970; the 2038 default is what HEAD portals send (section 7.3).
    #[serde(default = "expires_2038")]
    pub expires_at: u64,
}

/// How a relay checks passwords.
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheme {
    /// coturn with `use-auth-secret` and `static-auth-secret`: the shared secret.
    Rest(String),
    /// Upstream's relay: the stamp secret.
    Stamp(String),
}

impl Relay {
    /// A coturn with this shared secret; the id is derived from its first address.
    #[must_use]
    pub fn coturn(addrs: impl Into<Vec<SocketAddr>>, shared_secret: &str) -> Self {
        let addrs = addrs.into();
        Self {
            id: derive::uuid_from(&format!("relay {addrs:?}")),
            addrs,
            scheme: Scheme::Rest(shared_secret.into()),
            expires_at: expires_2038(),
        }
    }

    /// The credentials of the device with this public key.
    #[must_use]
    pub(super) fn credentials(&self, public_key: &str) -> Credentials {
        match &self.scheme {
            Scheme::Rest(secret) => derive::rest_credentials(public_key, self.expires_at, secret),
            Scheme::Stamp(secret) => derive::stamp_credentials(public_key, self.expires_at, secret),
        }
    }

    /// Its entries in a relay list, one per address (section 7.3).
    #[must_use]
    pub(super) fn entries(&self, credentials: &Credentials) -> Vec<Value> {
        let entry = |addr: &SocketAddr| {
            json!({
                "id": self.id,
                "type": "turn",
                "addr": addr.to_string(),
                "username": credentials.username,
                "password": credentials.password,
                "expires_at": self.expires_at,
            })
        };
        self.addrs.iter().map(entry).collect()
    }
}

/// 2038-01-01, as HEAD portals send to gateways.
fn expires_2038() -> u64 {
    2_145_916_800
}

/// `init.flow_logs` and the tokens that go with it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FlowLogs {
    /// Where logs would be uploaded.
    pub api_url: String,
    /// 0 disables uploads.
    pub upload_interval_secs: u64,
    /// 0 is 1000.
    pub upload_batch_size: u64,
}

impl Default for FlowLogs {
    fn default() -> Self {
        Self { api_url: "http://127.0.0.1:9".into(), upload_interval_secs: 0, upload_batch_size: 0 }
    }
}

/// PEM files for `wss://` and `https://`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tls {
    /// Certificate chain, leaf first.
    pub certificates: std::path::PathBuf,
    /// Private key.
    pub key: std::path::PathBuf,
}

impl Tls {
    /// A server that shows this certificate.
    ///
    /// # Errors
    /// When the files are unusable.
    pub(in crate::standins) fn server_config(&self) -> Result<rustls::ServerConfig> {
        use rustls::pki_types::pem::PemObject as _;
        use rustls::pki_types::{CertificateDer, PrivateKeyDer};
        let chain: Vec<_> = CertificateDer::pem_file_iter(&self.certificates)
            .and_then(Iterator::collect)
            .with_context(|| format!("certificates in {}", self.certificates.display()))?;
        let key = PrivateKeyDer::from_pem_file(&self.key)
            .with_context(|| format!("key in {}", self.key.display()))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        Ok(rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resources_read_like_the_spec_writes_them() {
        let lab = Resource::cidr("Lab", "10.44.0.0/16").with_filters([Filter::tcp(443, 443), Filter::Icmp]);
        assert_eq!(
            lab.for_gateway(),
            json!({"type":"cidr","id":lab.id,"name":"Lab","address":"10.44.0.0/16","filters":[
                {"protocol":"tcp","port_range_start":443,"port_range_end":443},{"protocol":"icmp"}]})
        );
        let internet = Resource::internet("all");
        assert_eq!(internet.for_gateway(), json!({"type":"internet","id":internet.id}));
    }

    #[test]
    fn a_dual_stack_relay_is_two_entries_with_one_id() {
        let relay = Relay::coturn(
            ["203.0.113.80:3478".parse().unwrap(), "[2001:db8::80]:3478".parse().unwrap()],
            "north",
        );
        let entries = relay.entries(&relay.credentials("key"));
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0]["id"], entries[1]["id"]);
        assert_eq!(entries[1]["addr"], "[2001:db8::80]:3478");
    }

    #[test]
    fn a_config_file_may_name_only_what_it_changes() {
        let text = r#"{"listen":"[::1]:8080","generation":"v1_only",
            "resources":[{"id":"0c77a1de-2a65-4b7e-8c1f-0d6c5a4b3e21","name":"Lab","type":"cidr","address":"10.44.0.0/16"}]}"#;
        let config: Config = serde_json::from_str(text).unwrap();
        assert_eq!(config.generation, Generation::V1Only);
        assert_eq!(config.resources[0].target, Target::Cidr { address: "10.44.0.0/16".into() });
        assert_eq!(config.acknowledge_timeout, Duration::from_secs(15));
    }
}
