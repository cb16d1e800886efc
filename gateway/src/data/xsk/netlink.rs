//! Keeps the answers on a [`Board`] at what the kernel's routing says, by rtnetlink: a task of the control thread.
//!
//! ```text
//!   links, neighbours: listed once, then told by the kernel      routes: asked for one by one
//!        +---------------------------> Table <-------------------------+
//!                                        +--> Board::publish
//! ```
//!
//! A route is asked for as the slow path's sockets would: with their mark. The kernel's own tables stay in charge;
//! what they do that headers cannot express (a tunnel of the route's, another interface) is answered with "slow".

use std::{
    future::pending,
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use rtnetlink::{
    Handle, MulticastGroup,
    packet_core::{NetlinkMessage, NetlinkPayload},
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        neighbour::{NeighbourFlags, NeighbourState},
        route::{RouteAttribute, RouteMessage},
    },
};
use tokio::time::MissedTickBehavior;

use super::{
    neighbours::{Change, Table},
    ways::{Answer, Board, Pair},
};
use crate::data::MARK;

/// Routes are asked for at most this often, however often they change.
const CALM: Duration = Duration::from_millis(100);
/// How often everything is listed again: the kernel drops what it tells to a socket that is full.
const REPEAT: Duration = Duration::from_secs(30);

/// What changes answers.
const GROUPS: [MulticastGroup; 8] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
];

/// The task's side.
pub struct Watch {
    board: Arc<Board>,
    table: Table,
    handle: Handle,
    messages: BoxStream<'static, NetlinkMessage<RouteNetlinkMessage>>,
    connection: tokio::task::JoinHandle<()>,
    /// Routes may have changed; ask for them then.
    ask_at: Option<Instant>,
}

impl Watch {
    /// For datagrams on `uplinks`, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel offers no rtnetlink here.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new(board: Arc<Board>, uplinks: impl IntoIterator<Item = u32>) -> io::Result<Self> {
        let (connection, handle, messages) = rtnetlink::new_multicast_connection(&GROUPS)?;
        Ok(Self {
            board,
            table: Table::new(uplinks),
            handle,
            messages: messages.map(|(message, _)| message).boxed(),
            connection: tokio::spawn(connection),
            ask_at: None,
        })
    }

    /// Answers until it is dropped.
    ///
    /// # Errors
    /// The netlink socket is gone. Nothing is answered any more; all of it is slow then.
    pub async fn run(mut self) -> io::Result<()> {
        let mut repeat = tokio::time::interval(REPEAT);
        repeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let board = Arc::clone(&self.board);
        loop {
            let ask_at = self.ask_at;
            let calm = async {
                match ask_at {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                message = self.messages.next() => match message {
                    Some(message) => self.on_message(message).await,
                    None => return Err(io::ErrorKind::UnexpectedEof.into()),
                },
                () = board.asked() => {
                    let open = board.take_open();
                    self.resolve(open).await;
                }
                () = calm => self.resolve_all().await,
                _ = repeat.tick() => {
                    self.list().await;
                    self.resolve_all().await;
                }
            }
        }
    }

    async fn on_message(&mut self, message: NetlinkMessage<RouteNetlinkMessage>) {
        let NetlinkPayload::InnerMessage(message) = message.payload else { return };
        match self.table.on_message(&message) {
            Change::Nothing => {}
            Change::Stale => self.use_stale().await,
            Change::Answers => self.publish().await,
            Change::Routes => {
                self.ask_at.get_or_insert(Instant::now() + CALM);
            }
        }
    }

    /// Says what is known now, and that what is sent to is in use.
    async fn publish(&mut self) {
        self.board.publish(self.table.answers());
        self.use_stale().await;
    }

    async fn use_stale(&mut self) {
        for (interface, next) in self.table.take_stale() {
            self.use_neighbour(interface, next).await;
        }
    }

    async fn resolve_all(&mut self) {
        self.ask_at = None;
        self.table.retain(|pair| self.board.is_known(pair));
        self.resolve(self.table.pairs().collect()).await;
    }

    async fn resolve(&mut self, pairs: Vec<Pair>) {
        for pair in pairs {
            let route = self.handle.route().get(question(pair)).execute().try_next().await;
            // No route is an error, too.
            self.table.on_route(pair, route.ok().flatten().as_ref());
        }
        self.publish().await;
    }

    /// Lists links and neighbours. If that fails, what is known stays, and the next time it is tried again.
    async fn list(&mut self) {
        let links: Result<Vec<_>, _> = self.handle.link().get().execute().try_collect().await;
        for link in links.into_iter().flatten() {
            self.table.on_message(&RouteNetlinkMessage::NewLink(link));
        }
        let neighbours: Result<Vec<_>, _> = self.handle.neighbours().get().execute().try_collect().await;
        match neighbours {
            Ok(neighbours) => {
                self.table.forget_neighbours();
                for neighbour in neighbours {
                    self.table.on_message(&RouteNetlinkMessage::NewNeighbour(neighbour));
                }
            }
            Err(e) => tracing::debug!("Failed to list neighbours: {e}"),
        }
    }

    /// What we send does not tell the kernel that it uses a neighbour. This does, so that the kernel asks whether it is
    /// still there (NTF_USE), as it would if it had sent a packet.
    async fn use_neighbour(&mut self, interface: u32, next: IpAddr) {
        let request = self.handle.neighbours().add(interface, next).state(NeighbourState::None);
        if let Err(e) = request.flags(NeighbourFlags::Use).replace().execute().await {
            tracing::debug!("Failed to have a neighbour confirmed: {e}");
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Nobody will say when an answer is not true any more.
        self.board.publish(self.table.pairs().map(|pair| (pair, Answer::Slow)));
        self.connection.abort();
    }
}

/// By which interface the kernel sends to `dst`, as one of our sockets would.
pub async fn route_interface(handle: &Handle, dst: IpAddr) -> Option<u32> {
    let route = handle.route().get(question(Pair { src: None, dst })).execute().try_next().await.ok()??;
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

/// RTM_GETROUTE as one of our sockets would be routed.
fn question(pair: Pair) -> RouteMessage {
    let mut message = RouteMessage::default();
    let (family, len) = match pair.dst {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    message.header.address_family = family;
    message.header.destination_prefix_length = len;
    message.attributes = vec![RouteAttribute::Destination(pair.dst.into()), RouteAttribute::Mark(MARK)];
    if let Some(src) = pair.src {
        message.header.source_prefix_length = len;
        message.attributes.push(RouteAttribute::Source(src.into()));
    }
    message
}
