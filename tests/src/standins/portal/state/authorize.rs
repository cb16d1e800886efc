//! Authorizations: asked for, pushed, acknowledged, withdrawn (portal-protocol.md sections 8.2, 8.3, 10, 11.5).

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use uuid::Uuid;

use super::{ConnId, Grant, Pending, State, site, uuids};
use crate::standins::phoenix::Frame;
use crate::standins::portal::config::Resource;
use crate::standins::portal::derive::{self, End};
use crate::standins::portal::log::{Direction, Role, Secret, Timing};

impl State {
    pub(super) fn requested(&mut self, client: Uuid, frame: &Frame, now: Instant) {
        let Some(resource) = frame.payload["resource_id"].as_str().and_then(|id| Uuid::parse_str(id).ok())
        else {
            return;
        };
        let connected = uuids(&frame.payload["connected_gateway_ids"]);
        if let Err(reason) = self.authorize(client, resource, &connected, now) {
            self.tell_failure(client, resource, reason);
        }
    }

    /// Pushes an authorization to a gateway; the client hears of it after the acknowledgement.
    pub(in crate::standins::portal) fn authorize(
        &mut self,
        client: Uuid,
        resource: Uuid,
        connected: &[Uuid],
        now: Instant,
    ) -> Result<(), &'static str> {
        if self.denied.contains(&(client, resource)) {
            return Err("forbidden");
        }
        let resource = self.config.resources.iter().find(|r| r.id == resource).cloned().ok_or("not_found")?;
        // Those the client is connected to already come first (section 10).
        let client_conn = self.conn_of(Role::Client, client).ok_or("offline")?;
        let mut gateways = self.online(Role::Gateway);
        gateways.sort_by_key(|id| !connected.contains(id));
        if gateways.is_empty() {
            return Err("offline");
        }
        let client_version = version(&self.conns[&client_conn].login.user_agent);
        let suits =
            |conn: &ConnId| is_compatible(client_version, version(&self.conns[conn].login.user_agent));
        let gateway_conn = gateways
            .iter()
            .filter_map(|id| self.conn_of(Role::Gateway, *id))
            .find(suits)
            .ok_or("version_mismatch")?;
        self.push_authorization(gateway_conn, client_conn, &resource, now);
        Ok(())
    }

    fn push_authorization(
        &mut self,
        gateway_conn: ConnId,
        client_conn: ConnId,
        resource: &Resource,
        now: Instant,
    ) {
        let (g, c) = (&self.conns[&gateway_conn], &self.conns[&client_conn]);
        let (g_login, c_login) = (g.login.clone(), c.login.clone());
        let use_iceless = self.config.iceless && g.iceless && c.iceless;
        let (gateway, client) = (self.device(&g_login), self.device(&c_login));
        let g_end = End { id: gateway.id, public_key: &g_login.public_key, secret: &gateway.secret };
        let c_end = End { id: client.id, public_key: &c_login.public_key, secret: &client.secret };
        let (client_ice, gateway_ice) = derive::ice_credentials(c_end, g_end);
        let psk = derive::preshared_key(c_end, g_end);
        let expires_at = self.config.expiry.map(|lasts| unix_now() + lasts.as_secs());
        let token = |role| self.ingest_token(role, client.id, gateway.id, resource, expires_at);
        let (responder, initiator) = (token("responder"), token("initiator"));
        self.next_ref += 1;
        let reference = format!("standin-ref-{:08}-{:016x}", self.next_ref, rand::random::<u64>());

        let for_gateway = json!({
            "ref": reference,
            "resource": resource.for_gateway(),
            "client": {
                "id": client.id, "public_key": c_login.public_key, "preshared_key": psk,
                "ipv4": client.ipv4, "ipv6": client.ipv6, "version": full_version(&c_login.user_agent),
                "device_os_name": "Debian", "device_os_version": null, "device_serial": null,
                "device_uuid": null, "identifier_for_vendor": null, "firebase_installation_id": null,
            },
            "subject": { "actor_id": derive::uuid_from("actor"), "actor_name": "Stand-in Actor",
                "actor_email": null, "auth_provider_id": null },
            "client_ice_credentials": client_ice.to_json(),
            "gateway_ice_credentials": gateway_ice.to_json(),
            "expires_at": expires_at,
            "use_iceless": use_iceless,
            "flow_logs_ingest_token": responder,
        });
        let mut tell_client = json!({
            "resource_id": resource.id, "preshared_key": psk,
            "client_ice_credentials": client_ice.to_json(),
            "gateway_ice_credentials": gateway_ice.to_json(),
            "gateway_id": gateway.id, "gateway_public_key": g_login.public_key,
            "gateway_ipv4": gateway.ipv4, "gateway_ipv6": gateway.ipv6,
            "use_iceless": use_iceless, "flow_logs_ingest_token": initiator,
        });
        tell_client[if c_login.v2 { "site_id" } else { "gateway_group_id" }] = json!(site());
        let psk_hex = STANDARD.decode(&psk).map(hex::encode).unwrap_or_default();
        let secrets = [
            ("psk", psk),
            ("psk", psk_hex),
            ("ice password", client_ice.password),
            ("ice password", gateway_ice.password),
            ("ingest token", responder),
            ("ingest token", initiator),
        ];
        self.secrets.extend(secrets.map(|(kind, value)| Secret { kind, value }));

        let timing = self.timings.len();
        self.timings.push(Timing {
            client: client.id,
            resource: resource.id,
            pushed: now,
            acknowledged: None,
        });
        let deadline = now + self.config.acknowledge_timeout;
        self.pending.insert(
            reference,
            Pending {
                client: client.id,
                gateway: gateway.id,
                resource: resource.id,
                use_iceless,
                expires_at,
                timing,
                deadline,
                tell_client,
            },
        );
        self.push(
            gateway_conn,
            if g_login.v2 { "create_authorization" } else { "authorize_flow" },
            for_gateway,
        );
    }

    pub(super) fn acknowledge(&mut self, id: ConnId, gateway: Uuid, frame: &Frame, now: Instant) {
        let pending = frame.payload["ref"]
            .as_str()
            .filter(|reference| self.pending.get(*reference).is_some_and(|p| p.gateway == gateway))
            .and_then(|reference| self.pending.remove(reference));
        let Some(pending) = pending else {
            return self.send(id, &Frame::error(frame, "invalid_ref"));
        };
        self.timings[pending.timing].acknowledged = Some(now);
        self.granted
            .insert((pending.client, pending.resource), Grant { gateway, expires_at: pending.expires_at });
        // Both ends are told the value the pair was set up with, whatever capabilities arrived since.
        debug_assert_eq!(pending.tell_client["use_iceless"], json!(pending.use_iceless));
        if let Some(conn) = self.conn_of(Role::Client, pending.client) {
            let event = if self.conns[&conn].login.v2 { "authorization_created" } else { "flow_created" };
            self.push(conn, event, pending.tell_client);
        }
        self.send(id, &Frame::ok(frame));
    }

    /// Tells clients whose gateway did not acknowledge in time (section 8.2).
    pub(in crate::standins::portal) fn handle_timeout(&mut self, now: Instant) {
        let late: Vec<_> = self
            .pending
            .iter()
            .filter(|(_, p)| now >= p.deadline)
            .map(|(reference, _)| reference.clone())
            .collect();
        for reference in late {
            if let Some(pending) = self.pending.remove(&reference) {
                let msg = json!({ "event": "acknowledge_timeout", "payload": { "client_id": pending.client, "resource_id": pending.resource } });
                self.record(Role::Gateway, Some(pending.gateway), Direction::Note, msg);
                self.tell_failure(pending.client, pending.resource, "offline");
            }
        }
    }

    /// The spec does not record how a client hears of a failure; this pair of names is the stand-ins' own.
    fn tell_failure(&mut self, client: Uuid, resource: Uuid, reason: &str) {
        if let Some(conn) = self.conn_of(Role::Client, client) {
            let event = if self.conns[&conn].login.v2 {
                "authorization_creation_failed"
            } else {
                "flow_creation_failed"
            };
            self.push(conn, event, json!({ "resource_id": resource, "reason": reason }));
        }
    }

    /// Withdraws one authorization; returns false when no gateway that holds it is online.
    pub(in crate::standins::portal) fn reject_access(&mut self, client: Uuid, resource: Uuid) -> bool {
        let grant = self.granted.remove(&(client, resource));
        let payload = json!({ "client_id": client, "resource_id": resource });
        match grant {
            Some(grant) => self.push_to(Role::Gateway, grant.gateway, "reject_access", payload),
            None => self.push_all(Role::Gateway, "reject_access", &payload),
        }
    }

    /// Forgets an authorization without telling the gateway: the next `init` lacks it.
    pub(in crate::standins::portal) fn forget(&mut self, client: Uuid, resource: Uuid) {
        self.granted.remove(&(client, resource));
    }

    /// The complete list of non-expired authorizations of this gateway (section 8.1).
    pub(super) fn authorizations_of(&self, gateway: Uuid) -> Vec<Value> {
        let now = unix_now();
        self.granted
            .iter()
            .filter(|(_, grant)| grant.gateway == gateway && grant.expires_at.is_none_or(|at| at > now))
            .map(|((client, resource), grant)| {
                json!({ "client_id": client, "resource_id": resource, "expires_at": grant.expires_at })
            })
            .collect()
    }

    fn ingest_token(
        &self,
        role: &str,
        client: Uuid,
        gateway: Uuid,
        resource: &Resource,
        expires_at: Option<u64>,
    ) -> String {
        let now = unix_now();
        let expires = expires_at.unwrap_or(now + 14 * 24 * 3600);
        let mut claims = json!({
            "account_id": derive::uuid_from("account"), "iat": now, "exp": expires + 30 * 24 * 3600,
            "uploads_enabled": self.config.flow_logs.upload_interval_secs > 0, "role": role,
            "initiator_device_id": client, "responder_device_id": gateway,
            "policy_authorization_id": derive::uuid_from(&format!("authorization {client} {}", resource.id)),
            "policy_id": derive::uuid_from("policy"), "resource_id": resource.id, "resource_name": resource.name,
            "initiator_actor_id": derive::uuid_from("actor"), "initiator_actor_name": "Stand-in Actor",
            "authorized_at": rfc3339(now), "authorization_expires_at": rfc3339(expires),
        });
        for (name, value) in &self.config.ingest_claims {
            claims[name] = value.clone();
        }
        derive::jwt(&claims, &self.ingest_key)
    }
}

/// The version in the first `name/version` word that names one of our programs (section 3).
fn full_version(user_agent: &str) -> Option<&str> {
    let ours = |word: &'_ str| {
        let (name, _) = word.split_once('/')?;
        ["gateway", "connlib", "headless-client"].contains(&name).then_some(name.len() + 1)
    };
    user_agent.split(' ').find_map(|word| word.get(ours(word)?..))
}

/// Its major and minor number.
fn version(user_agent: &str) -> Option<(u32, u32)> {
    let version = full_version(user_agent)?;
    let mut numbers = version.split(['.', '-', '+']).map(|n| n.parse::<u32>().ok());
    let (major, minor, _patch) = (numbers.next()??, numbers.next()??, numbers.next()??);
    Some((major, minor))
}

/// Section 10: `client.minor - 1 <= gateway.minor < client.minor + 2` within the same major version.
fn is_compatible(client: Option<(u32, u32)>, gateway: Option<(u32, u32)>) -> bool {
    match (client, gateway) {
        (Some(client), Some(gateway)) => {
            client.0 == gateway.0 && client.1 <= gateway.1 + 1 && gateway.1 < client.1 + 2
        }
        _ => false,
    }
}

fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// `2026-11-22T12:53:10Z`, from seconds since 1970 (days to civil date after Howard Hinnant's algorithm).
fn rfc3339(unix: u64) -> String {
    let (days, second) = (unix / 86_400 + 719_468, unix % 86_400);
    let era = days / 146_097;
    let doe = days % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_sent_only_to_gateways_of_neighbouring_versions() {
        let client = "Debian/12.0.0 headless-client/1.5.12 (x86_64; 6.1.0)";
        for (gateway, expect) in [
            ("Debian/12.0.0 gateway/1.6.1 (x86_64; 6.1.0)", true),
            ("Debian/12.0.0 gateway/1.4.18", true),
            ("Debian/12.0.0 gateway/1.7.0", false),
            ("Debian/12.0.0 gateway/1.3.9", false),
            ("Debian/12.0.0 gateway/2.5.0", false),
            ("Debian/12.0.0 gateway/1.6.1-dev", true),
            ("Debian/12.0.0 gateway/dev", false),
            ("", false),
        ] {
            assert_eq!(is_compatible(version(client), version(gateway)), expect, "{gateway}");
        }
    }

    #[test]
    fn dates_are_written_in_rfc_3339() {
        for (unix, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (1_700_000_000, "2023-11-14T22:13:20Z"),
            (2_145_916_800, "2038-01-01T00:00:00Z"),
            (1_709_164_800, "2024-02-29T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(unix), text);
        }
    }
}
