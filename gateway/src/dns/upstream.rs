//! One question to one nameserver over one transport (dns.md section 4.3). No retry and no time limit in here.

use std::{cell::RefCell, io, net::SocketAddr};

use rustix::process::{Resource, getrlimit};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest},
    net::{TcpSocket, UdpSocket},
    sync::Semaphore,
};

use super::{
    message::{Answer, Query},
    stats::{Count, Stats},
};

/// Open sockets towards nameservers, at most: four for each query in flight.
pub const SOCKETS: usize = 4000;
/// The longest datagram, in bytes.
pub const MAX_MESSAGE: usize = 65_535;

/// What all exchanges share.
#[derive(Debug)]
pub struct Upstream {
    /// SO_MARK, so that the kernel never routes a question into our own tunnel. `None` leaves sockets unmarked.
    pub mark: Option<u32>,
    /// One for each socket that may be open; what finds none waits, and that counts as its nameserver's time: with so
    /// many open, it is.
    pub sockets: Semaphore,
    /// Where datagrams are received: never across an await, so that one is enough.
    scratch: RefCell<Vec<u8>>,
}

impl Upstream {
    /// Nothing is opened yet. A silent nameserver keeps sockets open for 5 s each; they leave half of the descriptors
    /// that the process may have to everybody else.
    pub fn new(mark: Option<u32>) -> Self {
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let sockets = usize::try_from(descriptors / 2).map_or(SOCKETS, |half| half.min(SOCKETS));
        Self { mark, sockets: Semaphore::new(sockets), scratch: RefCell::new(vec![0; MAX_MESSAGE]) }
    }

    /// Asks over UDP: a socket, a port and an ID for this question alone. The socket is connected, so the kernel drops
    /// what others send; what the nameserver itself sends and is no answer to this question is not listened to either.
    ///
    /// # Errors
    /// There is no way to the nameserver, or nothing listens there.
    pub async fn ask_udp(&self, query: &Query, server: SocketAddr, stats: &Stats) -> io::Result<Answer> {
        let _place = self.sockets.acquire().await.map_err(io::Error::other)?;
        let socket = marked_socket(server, Type::DGRAM, Protocol::UDP, self.mark)?;
        socket.connect(&server.into())?;
        let socket = UdpSocket::from_std(socket.into())?;
        let id = rand::random();
        socket.send(&query.with_id(id)).await?;
        loop {
            // An ICMP error is no reading matter, but it ends the waiting.
            if socket.ready(Interest::READABLE | Interest::ERROR).await?.is_error() {
                return Err(socket.take_error()?.unwrap_or_else(|| io::ErrorKind::ConnectionRefused.into()));
            }
            let mut scratch = self.scratch.borrow_mut();
            let length = match socket.try_recv(&mut scratch) {
                Ok(length) => length,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => continue,
                Err(e) => return Err(e),
            };
            match query.accept(&scratch[..length], id) {
                Ok(answer) => return Ok(answer),
                Err(_) => stats.count(Count::Strays),
            }
        }
    }

    /// Asks over TCP, with a connection for this question.
    ///
    /// # Errors
    /// It does not connect, ends early, or sends something else than the answer.
    pub async fn ask_tcp(&self, query: &Query, server: SocketAddr) -> io::Result<Answer> {
        let _place = self.sockets.acquire().await.map_err(io::Error::other)?;
        let socket = marked_socket(server, Type::STREAM, Protocol::TCP, self.mark)?;
        socket.set_tcp_nodelay(true)?;
        let mut stream = TcpSocket::from_std_stream(socket.into()).connect(server).await?;
        let id = rand::random();
        stream.write_all(&framed(&query.with_id(id))).await?;
        let length = stream.read_u16().await?;
        let mut answer = vec![0; length.into()];
        stream.read_exact(&mut answer).await?;
        query.accept(&answer, id).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not the answer"))
    }
}

/// A socket that does not block, with SO_MARK `mark`, so that the kernel never routes what it sends into our own tunnel.
///
/// # Errors
/// There is none to be had, or the mark is refused.
pub fn marked_socket(
    server: SocketAddr,
    kind: Type,
    protocol: Protocol,
    mark: Option<u32>,
) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(server), kind.nonblocking(), Some(protocol))?;
    if let Some(mark) = mark {
        socket.set_mark(mark)?;
    }
    Ok(socket)
}

/// With its length in front (RFC 1035 section 4.2.2), in one piece (RFC 7766 section 8).
pub fn framed(message: &[u8]) -> Vec<u8> {
    // Nothing longer was ever received, and what is written here is shorter than what was received.
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    let mut framed = Vec::with_capacity(2 + message.len());
    framed.extend(length.to_be_bytes());
    framed.extend(&message[..length.into()]);
    framed
}
