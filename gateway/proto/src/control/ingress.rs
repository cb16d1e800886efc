//! What the portal says, event by event (portal-protocol.md section 8).
//!
//! The part of [`Control`] that changes who may reach what; it finds or makes the client's connection and leaves the
//! rest to it.

use std::{sync::Arc, time::Instant};

use rand::Rng;
use rustc_hash::FxHashMap;
use tracing::{debug, info, warn};

use super::{
    Client, Control, Event,
    authorizations::{Authorizations, Update},
    connection::Connection,
    names::ClientNames,
};
use crate::{
    command::Command,
    flow::Attribution,
    ids::{ClientId, RelayId, ResourceId},
    portal::{
        ingest_token,
        messages::{self, Authorize, Egress, IceCredentials, Init, Secret, UnixSeconds},
    },
};

/// The longest USERNAME the ICE library writes.
const MAX_USERNAME: usize = 128;

/// What the portal says.
impl Control {
    /// In the order of portal-protocol.md section 8.1.
    pub(super) fn on_init(&mut self, init: Init, now: Instant) {
        self.account(init.flow_logs.as_ref());
        self.events.extend(init.flow_logs.map(Event::FlowLogs));
        self.shared.relays.update(&[], &init.relays, now);
        self.commands.push_back(Command::OwnAddrs(init.interface));
        if let Some(listed) = init.authorizations {
            self.parked.clear();
            self.resync(&listed, now);
        }
        self.events.push_back(Event::Interface(init.interface));
    }

    fn resync(&mut self, listed: &[messages::AuthorizationRef], now: Instant) {
        let mut expiries: FxHashMap<(ClientId, ResourceId), Option<UnixSeconds>> = FxHashMap::default();
        for line in listed {
            let expires = line.expires_at;
            let known = expiries.entry((line.client, line.resource)).or_insert(expires);
            // Of several the longest counts; `None` is never.
            *known = known.zip(expires).map(|(a, b)| a.max(b));
        }
        let ids: Vec<ClientId> = self.clients.keys().copied().collect();
        for id in ids {
            let client = self.clients.get_mut(&id).expect("just listed");
            let revoked = client.authorizations.resync(|r| expiries.get(&(id, r)).copied(), now);
            for resource in &revoked {
                info!(client = %id, %resource, "Access revoked by the portal's list");
            }
            if !revoked.is_empty() {
                self.mark_changed(id);
            }
            self.expire_authorizations(id, now);
            self.remove_if_nothing_left(id);
            self.schedule(id);
        }
    }

    pub(super) fn on_authorize(&mut self, authorize: Box<Authorize>, now: Instant) {
        let (client, resource) = (authorize.client.id, authorize.resource.id);
        if authorize.use_iceless {
            warn!(%client, %resource, "Refusing an authorization without ICE, which we never announced");
            return;
        }
        if !are_usable(&authorize.gateway_ice, &authorize.client_ice) {
            warn!(%client, %resource, "Refusing an authorization with unusable ICE credentials");
            return;
        }
        if self.clock.deadline(authorize.expires_at).is_some_and(|at| at <= now) {
            info!(%client, %resource, "Refusing an authorization that ended in the past");
            self.on_expiry_updated(client, resource, authorize.expires_at.unwrap_or(UnixSeconds(0)), now);
            return;
        }
        let reusable = self.connection(client).is_some_and(|c| c.is_reusable_for(&authorize));
        let relay = self.shared.relays.sample();
        if relay.is_none() && !reusable {
            debug!(%client, %resource, "No relay yet, the authorization waits");
            self.say(Egress::NoRelays, now);
            self.parked.park(authorize, now);
            return;
        }
        self.parked.reject(client, resource);
        self.serve(*authorize, relay, now);
    }

    /// Connects and allows. `relay` is only missing where a connection is reused.
    pub(super) fn serve(&mut self, authorize: Authorize, relay: Option<RelayId>, now: Instant) {
        let id = authorize.client.id;
        self.placement.enter(id);
        self.connect(&authorize, relay, now);
        let expires = authorize.expires_at;
        let resource = authorize.resource.id;
        let attribution = authorize.flow_logs_ingest_token.and_then(|token| attribute(id, resource, token));
        let client = self.clients.get_mut(&id).expect("connected just now");
        if client.authorizations.grant(authorize.resource, expires, now) == Update::Refused {
            warn!(client = %id, %resource, "A known resource came with another address or type, which is ignored");
        }
        info!(client = %id, %resource, "Access allowed");
        if client.authorizations.is_unmatchable(resource) {
            warn!(client = %id, %resource, "The resource's address is no pattern: no name will match it");
        }
        client.authorizations.attribute(resource, attribution.clone());
        self.events.extend(attribution.filter(|a| a.claims.uploads_enabled).map(Event::IngestToken));
        self.mark_changed(id);
        self.say(Egress::Authorized { reference: authorize.reference }, now);
        let early = self.early.take(id, now);
        self.touch(id, now, |connection, shared| {
            if !early.is_empty() {
                connection.add_remote(&early, shared, now);
            }
        });
    }

    /// `upsert_connection` (connections.md section 5.1).
    fn connect(&mut self, authorize: &Authorize, relay: Option<RelayId>, now: Instant) {
        let id = authorize.client.id;
        let tunnel = authorize.client.tunnel;
        let client = self.clients.entry(id).or_insert_with(|| Client {
            tunnel,
            authorizations: Authorizations::default(),
            connection: None,
            path: None,
            names: ClientNames::default(),
        });
        if client.tunnel != tunnel {
            debug!(client = %id, "The client's tunnel addresses changed, its access starts afresh");
            client.tunnel = tunnel;
            client.authorizations = Authorizations::default();
            client.names = ClientNames::default();
        }
        match (&mut client.connection, relay) {
            (Some(connection), _) if connection.is_reusable_for(authorize) => {
                connection.renew(&mut self.shared, now);
            }
            (connection, Some(relay)) => {
                if let Some(mut old) = connection.take() {
                    debug!(client = %id, "Replacing the connection");
                    old.close(&mut self.shared);
                    self.indices_in_use.remove(&old.keys().index);
                }
                let index = self.indices.next(|i| self.indices_in_use.contains(&i));
                self.indices_in_use.insert(index);
                let tie_breaker = self.rng.random();
                let new = Connection::new(authorize, index, tie_breaker, relay, &mut self.shared, now);
                *connection = Some(Box::new(new));
                client.path = None;
            }
            (_, None) => unreachable!("a new connection is made with a relay only"),
        }
    }

    pub(super) fn on_reject_access(&mut self, id: ClientId, resource: ResourceId, now: Instant) {
        self.parked.reject(id, resource);
        let Some(client) = self.clients.get_mut(&id) else { return };
        if client.authorizations.revoke(resource) {
            info!(client = %id, %resource, "Access revoked");
            self.mark_changed(id);
            self.remove_if_nothing_left(id);
            self.touch(id, now, |_, _| ());
        }
    }

    /// Rare and for everybody who holds it (portal-protocol.md section 8.4), so a walk over all clients.
    pub(super) fn on_resource_updated(&mut self, resource: &messages::Resource) {
        let mut holders = Vec::new();
        for (id, client) in &mut self.clients {
            match client.authorizations.update(resource) {
                Update::Applied => holders.push(*id),
                Update::Refused => {
                    warn!(client = %id, resource = %resource.id, "Only filters of a resource can change");
                    holders.push(*id);
                }
                Update::Unknown => {}
            }
        }
        for id in holders {
            self.mark_changed(id);
        }
    }

    pub(super) fn on_candidates(&mut self, id: ClientId, lines: Vec<String>, now: Instant) {
        if self.connection(id).is_some() {
            self.touch(id, now, |connection, shared| connection.add_remote(&lines, shared, now));
        } else {
            debug!(client = %id, "Candidates for a client without a connection, keeping them for a moment");
            self.early.keep(id, lines, now);
        }
    }

    pub(super) fn on_expiry_updated(
        &mut self,
        id: ClientId,
        resource: ResourceId,
        expires: UnixSeconds,
        now: Instant,
    ) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if client.authorizations.set_expiry(resource, Some(expires)) {
            self.expire_authorizations(id, now);
            self.schedule(id);
        }
    }
}

/// Access does not depend on what flow logs say about it.
fn attribute(client: ClientId, resource: ResourceId, token: Secret) -> Option<Arc<Attribution>> {
    match ingest_token::parse(token) {
        Ok(attribution) => Some(Arc::new(attribution)),
        Err(e) => {
            warn!(%client, %resource, "Flow logs will lack this authorization, its token cannot be used: {e}");
            None
        }
    }
}

/// Credentials the agent can write into a USERNAME that the other side can split again.
fn are_usable(local: &IceCredentials, remote: &IceCredentials) -> bool {
    let part = |name: &str| !name.is_empty() && !name.contains(':') && !name.contains(char::is_whitespace);
    part(&local.username)
        && part(&remote.username)
        && local.username.len() + 1 + remote.username.len() <= MAX_USERNAME
}
