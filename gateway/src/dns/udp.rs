//! A DNS server on one UDP address.

use std::{
    io,
    net::SocketAddr,
    rc::{Rc, Weak},
};

use socket2::{Domain, Protocol, Socket, Type};
use tokio::{net::UdpSocket, task::spawn_local};

use super::{
    forward::Forwarder,
    message::{Query, Rejected},
    rtt::Transport,
    server::Server,
    stats::Count,
    upstream::MAX_MESSAGE,
};

/// Listens on exactly `address`: one socket, one task. The socket has no mark, so answers go where packets to clients go;
/// those to queries in flight are lost when the server is closed.
///
/// # Errors
/// The address is not there (yet) or taken.
pub fn bind(address: SocketAddr, forwarder: Rc<Forwarder>) -> io::Result<Server> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking(), Some(Protocol::UDP))?;
    socket.bind(&address.into())?;
    let socket = UdpSocket::from_std(socket.into())?;
    let local = socket.local_addr()?;
    Ok(Server::run(local, serve(socket, forwarder)))
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
