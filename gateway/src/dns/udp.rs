//! A DNS server on one UDP address.

use std::{
    io,
    net::SocketAddr,
    rc::{Rc, Weak},
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::UdpSocket,
    task::{JoinHandle, spawn_local},
};

use super::{
    forward::Forwarder,
    message::{Query, Rejected},
    rtt::Transport,
    stats::Count,
    upstream::MAX_MESSAGE,
};

/// One socket, one task; it ends with [`Server::close`].
#[derive(Debug)]
pub struct Server {
    local: SocketAddr,
    task: JoinHandle<()>,
}

impl Server {
    /// Listens on exactly `address`. The socket has no mark, so answers go where packets to clients go.
    ///
    /// # Errors
    /// The address is not there (yet) or taken.
    pub fn bind(address: SocketAddr, forwarder: Rc<Forwarder>) -> io::Result<Self> {
        let socket =
            Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
        socket.bind(&address.into())?;
        let socket = UdpSocket::from_std(socket.into())?;
        let local = socket.local_addr()?;
        Ok(Self { local, task: spawn_local(serve(socket, forwarder)) })
    }

    /// Where it listens.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Whether it still does. Nothing but a panic ends it before [`Server::close`].
    pub fn is_running(&self) -> bool {
        !self.task.is_finished()
    }

    /// Frees the address. Answers to queries in flight are lost.
    pub async fn close(self) {
        self.task.abort();
        // Cancelled, as just ordered.
        let _ = self.task.await;
    }
}

async fn serve(socket: UdpSocket, forwarder: Rc<Forwarder>) {
    let socket = Rc::new(socket);
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        match socket.recv_from(&mut buffer).await {
            Ok((length, client)) => on_datagram(&buffer[..length], client, &socket, &forwarder),
            // An ICMP error for an answer, for example: it concerns that client only.
            Err(error) => {
                tracing::debug!("A DNS server's socket reports an error: {error}");
                tokio::task::yield_now().await;
            }
        }
    }
}

fn on_datagram(bytes: &[u8], client: SocketAddr, socket: &Rc<UdpSocket>, forwarder: &Rc<Forwarder>) {
    forwarder.stats.count(Count::UdpQueries);
    let query = match Query::read(bytes) {
        Ok(query) => query,
        Err(Rejected::Silent) => return forwarder.stats.count(Count::Ignored),
        Err(Rejected::Answer { code, bytes }) => {
            tracing::debug!(%client, %code, "Rejected a DNS query over UDP");
            forwarder.stats.count(Count::Rejected);
            return send(socket, &bytes, client, forwarder);
        }
    };
    match forwarder.admit(client.ip()) {
        Ok(permit) => {
            // A query in flight must not keep the address taken when the server is closed.
            let (socket, forwarder) = (Rc::downgrade(socket), Rc::clone(forwarder));
            spawn_local(async move {
                let answer = permit.forward(&query, Transport::Udp).await;
                if let Some(socket) = Weak::upgrade(&socket) {
                    send(&socket, &answer, client, &forwarder);
                }
            });
        }
        Err(code) => send(socket, &query.error(code), client, forwarder),
    }
}

/// Without waiting: an answer that finds the socket full is one that the client asks for again.
fn send(socket: &UdpSocket, bytes: &[u8], client: SocketAddr, forwarder: &Forwarder) {
    if let Err(error) = socket.try_send_to(bytes, client) {
        tracing::debug!(%client, "Cannot send a DNS answer: {error}");
        forwarder.stats.count(Count::Unsent);
    }
}
