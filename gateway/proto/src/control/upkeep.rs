//! What happens by itself: control follows relays, connections and clocks. What comes from outside enters in the files
//! above and beside; this knows neither the portal's words nor the workers' events.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use gateway_common::DropReason;
use tracing::{debug, info};

use super::{Control, connection::Connection, shared::Shared};
use crate::{
    command::{self, ClientState, Command, StunDatagram},
    flow::{Meeting, UnixTime},
    ids::{ClientId, ConnectionIndex, RelayId},
    portal::messages::{Egress, FlowLogs},
    relay::RelayEvent,
};

impl Control {
    /// Relays first: they answer without the integrity the ICE agent asks for.
    pub(super) fn on_stun(&mut self, datagram: &StunDatagram, now: Instant) {
        if self.shared.relays.handle_stun(datagram, now) {
            return;
        }
        let StunDatagram { heard_by, local, from, via, ref payload } = *datagram;
        let mut used = false;
        if let Some((id, message)) = self.shared.router.route(payload, now) {
            self.touch(id, now, |connection, shared| {
                used = connection.handle_stun(&message, from, local, via, shared, now)
            });
            let of_its_path = used && via.is_none() && self.is_direct_path(id, local, from);
            if of_its_path && self.placement.on_heard(id, heard_by, now) {
                debug!(client = %id, worker = %heard_by, "Moving to the worker that its path reaches");
                self.mark_changed(id);
            }
        }
        if !used {
            self.counters.count(DropReason::UnmatchedStun);
        }
    }

    pub(super) fn is_direct_path(&self, id: ClientId, local: SocketAddr, remote: SocketAddr) -> bool {
        self.clients.get(&id).is_some_and(|c| c.path == Some(command::Path::Direct { local, remote }))
    }

    /// Follows the relays until they have nothing more to say, then helps those who wait for one.
    pub(super) fn settle(&mut self, now: Instant) {
        loop {
            while let Some(event) = self.shared.relays.poll_event() {
                self.on_relay_event(event, now);
            }
            if !self.help_waiting(now) {
                return;
            }
        }
    }

    pub(super) fn on_relay_event(&mut self, event: RelayEvent, now: Instant) {
        match event {
            RelayEvent::Added(candidate, relay) => {
                if self.answered_relays.insert(relay) {
                    info!(%relay, "Relay added");
                }
                for id in self.shared.users(relay) {
                    self.touch(id, now, |connection, shared| connection.add_local(&candidate, shared, now));
                }
            }
            RelayEvent::Invalidated(candidate, relay) => {
                for id in self.shared.users(relay) {
                    self.touch(id, now, |connection, shared| connection.remove_local(&candidate, shared));
                }
            }
            RelayEvent::Gone(relay) => {
                if self.answered_relays.remove(&relay) {
                    info!(%relay, "Relay removed");
                }
                for id in self.shared.users(relay) {
                    self.touch(id, now, |connection, shared| connection.lose_relay(shared));
                }
            }
            RelayEvent::Servers(servers) => self.commands.push_back(Command::Relays(servers)),
            RelayEvent::ChannelOpened { relay, server, number, peer } => {
                self.commands.push_back(Command::Channel { server, number, peer: Some(peer) });
                self.refresh_paths(relay, peer, now);
            }
            RelayEvent::ChannelBound { relay, peer, .. } => self.refresh_paths(relay, peer, now),
            RelayEvent::ChannelGone { relay, server, number, peer } => {
                self.commands.push_back(Command::Channel { server, number, peer: None });
                self.refresh_paths(relay, peer, now);
            }
            RelayEvent::NoneLeft => self.say(Egress::NoRelays, now),
        }
    }

    pub(super) fn refresh_paths(&mut self, relay: RelayId, peer: SocketAddr, now: Instant) {
        for id in self.shared.on_path(relay, peer) {
            self.touch(id, now, |_, _| ());
        }
    }

    /// Serves what waits for a relay. False when nobody waits or there is none.
    pub(super) fn help_waiting(&mut self, now: Instant) -> bool {
        if let Some(id) = self.shared.orphans.iter().next().copied() {
            let Some(relay) = self.shared.relays.sample() else { return false };
            self.touch(id, now, |connection, shared| connection.migrate(relay, shared, now));
            // Whatever became of it, it waits no longer.
            self.shared.orphans.remove(&id);
            return true;
        }
        if self.parked.deadline().is_none() || !self.shared.relays.is_usable() {
            return false;
        }
        let Some(relay) = self.shared.relays.sample() else { return false };
        let Some(authorize) = self.parked.take(now) else { return false };
        self.serve(*authorize, Some(relay), now);
        true
    }

    /// Lets the client's connection react to something, then follows what it made of it.
    pub(super) fn touch(
        &mut self,
        id: ClientId,
        now: Instant,
        react: impl FnOnce(&mut Connection, &mut Shared),
    ) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if let Some(connection) = &mut client.connection {
            react(connection, &mut self.shared);
            if let Some(why) = connection.drive(&mut self.shared, now) {
                debug!(client = %id, ?why, "Connection failed");
                self.fail(id);
                return;
            }
            let path = connection.path(&self.shared, now);
            if connection.take_news() || client.path != path {
                client.path = path;
                self.mark_changed(id);
            }
        }
        self.schedule(id);
    }

    /// The connection is gone, the authorizations stay: the client decides when to come back.
    pub(super) fn fail(&mut self, id: ClientId) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        client.path = None;
        if let Some(mut connection) = client.connection.take() {
            connection.close(&mut self.shared);
            self.indices_in_use.remove(&connection.keys().index);
            self.mark_changed(id);
        }
        self.schedule(id);
    }

    pub(super) fn expire_authorizations(&mut self, id: ClientId, now: Instant) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let expired = client.authorizations.expire(&self.clock, now);
        for resource in &expired {
            info!(client = %id, %resource, "Access expired");
        }
        if !expired.is_empty() {
            self.mark_changed(id);
            self.remove_if_nothing_left(id);
        }
    }

    pub(super) fn remove_if_nothing_left(&mut self, id: ClientId) {
        if self.clients.get(&id).is_some_and(|client| client.authorizations.is_empty()) {
            self.remove_client(id);
        }
    }

    pub(super) fn remove_client(&mut self, id: ClientId) {
        self.fail(id);
        if self.clients.remove(&id).is_some() {
            self.placement.leave(id);
            self.mark_changed(id);
        }
        self.timers.set(id, None);
    }

    pub(super) fn schedule(&mut self, id: ClientId) {
        let deadline = self.clients.get_mut(&id).and_then(|client| {
            let connection = client.connection.as_mut().and_then(|c| c.deadline());
            [connection, client.authorizations.next_expiry(&self.clock)].into_iter().flatten().min()
        });
        self.timers.set(id, deadline);
    }

    pub(super) fn mark_changed(&mut self, id: ClientId) {
        if self.is_changed.insert(id) {
            self.changed.push_back(id);
        }
    }

    pub(super) fn say(&mut self, egress: Egress, now: Instant) {
        let repeated = egress == Egress::NoRelays && self.egress.iter().any(|(_, e)| *e == egress);
        if !repeated {
            self.egress.push_back((now, egress));
        }
    }

    pub(super) fn connection(&self, id: ClientId) -> Option<&Connection> {
        self.clients.get(&id)?.connection.as_deref()
    }

    /// Events about an older connection of the client are ignored.
    pub(super) fn is_current(&self, id: ClientId, index: ConnectionIndex) -> bool {
        self.connection(id).is_some_and(|c| c.keys().index == index)
    }

    pub(super) fn client_state(&mut self, id: ClientId) -> Option<Arc<ClientState>> {
        let client = self.clients.get_mut(&id)?;
        let (connection, heard_from) = match &client.connection {
            Some(c) => {
                (command::Connection::Present(Arc::clone(c.keys()), client.path), Arc::clone(c.heard_from()))
            }
            None => (command::Connection::Absent, [].into()),
        };
        Some(Arc::new(ClientState {
            tunnel: client.tunnel,
            connection,
            heard_from,
            resources: client.authorizations.resources(),
            names: client.names.names(),
            attributions: client.authorizations.attributions(),
        }))
    }

    /// The wall clock shows `unix` at `at`: what workers report has its times.
    pub(super) fn tell_clock(&mut self, unix: Duration, at: Instant) {
        self.commands.push_back(Command::WallClock(Meeting { unix: UnixTime(unix), at }));
    }

    /// Flows are accounted while the portal wants uploads, or the operator wants them in the log
    /// (cli-and-service.md section 14).
    pub(super) fn account(&mut self, wanted: Option<&FlowLogs>) {
        let on = self.always_accounting || wanted.is_some_and(|flow_logs| flow_logs.upload_interval_secs > 0);
        if on != self.accounting {
            self.accounting = on;
            self.commands.push_back(Command::Accounting { on });
        }
    }
}
