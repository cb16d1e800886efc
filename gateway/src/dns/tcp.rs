//! A DNS server on one TCP address (RFC 7766): many queries on a connection, answered as the answers come.

use std::{cell::RefCell, io, net::SocketAddr, rc::Rc, time::Duration};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::Notify,
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use super::{
    connections::{Connections, Id},
    forward::Forwarder,
    message::{Query, Rejected},
    rtt::Transport,
    server::Server,
    stats::Count,
    upstream::framed,
};

/// A connection without query or answer is closed after this (RFC 7766 section 6.2.3: "of the order of a few seconds").
pub const IDLE_LIMIT: Duration = Duration::from_secs(20);
/// A message that began must be complete after this.
pub const READ_LIMIT: Duration = Duration::from_secs(5);
/// An answer must have left after this: a client that does not read is no client.
const WRITE_LIMIT: Duration = Duration::from_secs(5);
/// Queries of one connection in flight; the next waits in the socket's buffer.
pub const PIPELINE: usize = 32;
/// Connections that wait for accept.
const BACKLOG: i32 = 128;

/// All TCP connections of all servers; what is notified ends its connection.
pub type Open = Rc<RefCell<Connections<Rc<Notify>>>>;

/// Listens on exactly `address`. The sockets have no mark, so answers go where packets to clients go. Connections end with
/// the server.
///
/// # Errors
/// The address is not there (yet) or taken.
pub fn bind(address: SocketAddr, forwarder: Rc<Forwarder>, open: Open) -> io::Result<Server> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    // Connections of an earlier server on this address may still be closing.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    let listener = TcpListener::from_std(socket.into())?;
    let local = listener.local_addr()?;
    Ok(Server::run(local, accept(listener, forwarder, open)))
}

async fn accept(listener: TcpListener, forwarder: Rc<Forwarder>, open: Open) {
    // Dropped with the task, and the connections with it.
    let mut running = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, client)) => {
                    if let Some(connection) = Connection::admit(client, &forwarder, &open) {
                        running.spawn_local(connection.serve(stream));
                    }
                }
                // Out of file descriptors, usually: leave the processor to those who can free some.
                Err(error) => {
                    tracing::debug!("Cannot accept a DNS connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
            Some(_) = running.join_next() => {}
        }
    }
}

struct Connection {
    id: Id,
    client: SocketAddr,
    evicted: Rc<Notify>,
    forwarder: Rc<Forwarder>,
    open: Open,
}

/// Why a connection ends. All of it is DEBUG: clients do as they like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Closed,
    Idle,
    MadeRoom,
    SlowQuery,
    SlowReader,
    NoQuery,
    Broken,
}

impl Connection {
    fn admit(client: SocketAddr, forwarder: &Rc<Forwarder>, open: &Open) -> Option<Self> {
        let evicted = Rc::new(Notify::new());
        let admitted = open.borrow_mut().admit(client.ip(), Rc::clone(&evicted), Instant::now().into_std());
        forwarder.stats.count(Count::Connections);
        match admitted {
            Ok((id, oldest)) => {
                if let Some(oldest) = oldest {
                    forwarder.stats.count(Count::ConnectionsDropped);
                    oldest.notify_one();
                }
                let (forwarder, open) = (Rc::clone(forwarder), Rc::clone(open));
                Some(Self { id, client, evicted, forwarder, open })
            }
            Err(_) => {
                tracing::debug!(%client, "Too many DNS connections, and none is idle");
                forwarder.stats.count(Count::ConnectionsDropped);
                None
            }
        }
    }

    async fn serve(self, stream: TcpStream) {
        // Failing costs milliseconds, not answers.
        let _ = stream.set_nodelay(true);
        let (reader, writer) = stream.into_split();
        let end = tokio::select! {
            end = self.converse(reader, writer) => end,
            () = self.evicted.notified() => End::MadeRoom,
        };
        tracing::debug!(client = %self.client, ?end, "A DNS connection ended");
    }

    async fn converse(&self, mut reader: impl AsyncRead + Unpin, mut writer: impl AsyncWrite + Unpin) -> End {
        let mut received = Vec::new();
        let mut running = FuturesUnordered::new();
        // Since when nothing happened: for the message that is not complete, or for the connection.
        let mut quiet_since = Instant::now();
        let mut at_end = false;
        loop {
            let mut taken = 0;
            while running.len() < PIPELINE
                && let Some(message) = first_message(&received[taken..])
            {
                taken += 2 + message.len();
                quiet_since = Instant::now();
                match self.on_message(message) {
                    Ok((permit, query)) => {
                        if running.is_empty() {
                            self.open.borrow_mut().on_busy(self.id);
                        }
                        running.push(async move { permit.forward(&query, Transport::Tcp).await });
                    }
                    Err(None) => return End::NoQuery,
                    Err(Some(answer)) => {
                        if let Err(end) = write(&mut writer, &answer).await {
                            return end;
                        }
                    }
                }
            }
            // Once for all of them: many small messages in a long buffer must not be moved again and again.
            received.drain(..taken);
            if at_end && running.is_empty() {
                return End::Closed;
            }
            let deadline = match (running.is_empty(), received.is_empty()) {
                // Their answers come within 5 s.
                (false, true) => None,
                (true, true) => Some((quiet_since + IDLE_LIMIT, End::Idle)),
                // What waits for its turn is not slow.
                (_, false) if running.len() == PIPELINE => None,
                (_, false) => Some((quiet_since + READ_LIMIT, End::SlowQuery)),
            };
            tokio::select! {
                Some(answer) = running.next() => {
                    if let Err(end) = write(&mut writer, &answer).await {
                        return end;
                    }
                    if running.is_empty() {
                        if received.is_empty() {
                            quiet_since = Instant::now();
                        }
                        self.open.borrow_mut().on_idle(self.id, Instant::now().into_std());
                    }
                }
                read = reader.read_buf(&mut received), if !at_end && running.len() < PIPELINE => {
                    let was_empty = matches!(read, Ok(length) if length == received.len());
                    match read {
                        Ok(0) => at_end = true,
                        Ok(_) if was_empty => quiet_since = Instant::now(),
                        Ok(_) => {}
                        Err(_) => return End::Broken,
                    }
                }
                end = expire(deadline) => return end,
            }
        }
    }

    /// What to forward, or what to say instead; `Err(None)` where there is nothing to say.
    fn on_message(&self, bytes: &[u8]) -> Result<(super::forward::Permit, Query), Option<Vec<u8>>> {
        let stats = &self.forwarder.stats;
        stats.count(Count::TcpQueries);
        let query = Query::read(bytes).map_err(|rejected| match rejected {
            Rejected::Silent => {
                stats.count(Count::Ignored);
                None
            }
            Rejected::Answer { code, bytes } => {
                tracing::debug!(client = %self.client, %code, "Rejected a DNS query over TCP");
                stats.count(Count::Rejected);
                Some(bytes)
            }
        })?;
        match self.forwarder.admit(self.client.ip()) {
            Ok(permit) => Ok((permit, query)),
            Err(code) => Err(Some(query.error(code))),
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.open.borrow_mut().on_closed(self.id);
    }
}

/// The first message, without its length, if it is complete.
fn first_message(received: &[u8]) -> Option<&[u8]> {
    let (length, rest) = received.split_first_chunk()?;
    rest.get(..u16::from_be_bytes(*length).into())
}

async fn write(writer: &mut (impl AsyncWrite + Unpin), message: &[u8]) -> Result<(), End> {
    match timeout(WRITE_LIMIT, writer.write_all(&framed(message))).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(End::Broken),
        Err(_) => Err(End::SlowReader),
    }
}

async fn expire(deadline: Option<(Instant, End)>) -> End {
    match deadline {
        Some((deadline, end)) => {
            sleep_until(deadline).await;
            end
        }
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
