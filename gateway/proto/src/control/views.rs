//! Clients and relays as an operator wants to see them. It changes nothing; it looks at everything, so: not for each
//! packet.

use super::{Client, Control, PathKind};
use crate::{
    addr::TunnelAddrs,
    command::Path,
    ids::{ClientId, WorkerId},
    names::DomainName,
    portal::messages::{Resource, UnixSeconds},
    relay::RelayView,
};

/// One client.
#[derive(Debug, Clone, PartialEq)]
pub struct ClientView {
    /// The portal's name.
    pub id: ClientId,
    /// Its addresses in the tunnel.
    pub tunnel: TunnelAddrs,
    /// Who holds it, or is about to.
    pub worker: Option<WorkerId>,
    /// False after its connection failed, until it is authorized again.
    pub has_connection: bool,
    /// Which ends of its path are relays; `None` without one.
    pub kind: Option<PathKind>,
    /// The way to it.
    pub path: Option<Path>,
    /// What it may reach and until when (`None`: until it is taken back), ascending by id.
    pub resources: Vec<(Resource, Option<UnixSeconds>)>,
    /// The names that it reaches, ascending.
    pub names: Vec<DomainName>,
}

impl Control {
    /// At most so many clients, in no order.
    #[must_use]
    pub fn client_views(&self, most: usize) -> Vec<ClientView> {
        self.clients.iter().take(most).map(|(id, client)| self.view_of(*id, client)).collect()
    }

    /// One client; `None` if nobody knows it.
    #[must_use]
    pub fn client_view(&self, id: ClientId) -> Option<ClientView> {
        self.clients.get(&id).map(|client| self.view_of(id, client))
    }

    fn view_of(&self, id: ClientId, client: &Client) -> ClientView {
        ClientView {
            id,
            tunnel: client.tunnel,
            worker: self.placement.home(id),
            has_connection: client.connection.is_some(),
            kind: client.connection.as_ref().and_then(|connection| connection.path_kind()),
            path: client.path,
            resources: client.authorizations.with_expiry().map(|(r, until)| (r.clone(), until)).collect(),
            names: client.names.known().cloned().collect(),
        }
    }

    /// Every relay that the portal gave us.
    #[must_use]
    pub fn relay_views(&self) -> Vec<RelayView> {
        self.shared.relays.views()
    }
}
