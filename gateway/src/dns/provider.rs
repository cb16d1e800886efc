//! The sockets of hickory's resolver: marked, so that the kernel never routes a question into our own tunnel, and
//! connected, so that it drops what others send and tells when nobody listens.

use std::{
    io,
    net::{SocketAddr, SocketAddrV6},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use hickory_resolver::net::runtime::{RuntimeProvider, TokioHandle, TokioTime, iocompat::AsyncIoTokioAsStd};
use socket2::{Protocol, Type};
use tokio::{
    net::{TcpSocket, TcpStream, UdpSocket},
    time::timeout,
};

use super::upstream::marked_socket;

/// For a TCP connection, where the resolver names no limit.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);

type Opening<S> = Pin<Box<dyn Future<Output = io::Result<S>> + Send>>;

/// Makes the sockets.
#[derive(Clone)]
pub struct Provider {
    /// `None` leaves them unmarked.
    mark: Option<u32>,
    /// The nameservers that have one: the resolver knows addresses without.
    scopes: Arc<[SocketAddrV6]>,
    tasks: TokioHandle,
}

impl Provider {
    /// For questions to `nameservers`. Of two with the same link-local address on different links the first is asked.
    pub fn new(mark: Option<u32>, nameservers: &[SocketAddr]) -> Self {
        let scoped = nameservers.iter().filter_map(|server| match server {
            SocketAddr::V6(server) if server.scope_id() != 0 => Some(*server),
            _ => None,
        });
        Self { mark, scopes: scoped.collect(), tasks: TokioHandle::default() }
    }

    fn with_scope(&self, server: SocketAddr) -> SocketAddr {
        let SocketAddr::V6(asked) = server else { return server };
        let own = self.scopes.iter().find(|own| (own.ip(), own.port()) == (asked.ip(), asked.port()));
        own.map_or(server, |own| SocketAddr::V6(*own))
    }
}

impl RuntimeProvider for Provider {
    type Handle = TokioHandle;
    type Timer = TokioTime;
    type Udp = UdpSocket;
    type Tcp = AsyncIoTokioAsStd<TcpStream>;

    fn create_handle(&self) -> Self::Handle {
        self.tasks.clone()
    }

    fn connect_tcp(
        &self,
        server: SocketAddr,
        own: Option<SocketAddr>,
        limit: Option<Duration>,
    ) -> Opening<Self::Tcp> {
        let (server, mark) = (self.with_scope(server), self.mark);
        Box::pin(async move {
            let socket = marked_socket(server, Type::STREAM, Protocol::TCP, mark)?;
            socket.set_tcp_nodelay(true)?;
            if let Some(own) = own {
                socket.bind(&own.into())?;
            }
            let connecting = TcpSocket::from_std_stream(socket.into()).connect(server);
            let stream = timeout(limit.unwrap_or(CONNECT_LIMIT), connecting).await;
            stream.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?.map(AsyncIoTokioAsStd)
        })
    }

    fn bind_udp(&self, own: SocketAddr, server: SocketAddr) -> Opening<Self::Udp> {
        let (server, mark) = (self.with_scope(server), self.mark);
        Box::pin(async move {
            let socket = marked_socket(server, Type::DGRAM, Protocol::UDP, mark)?;
            socket.bind(&own.into())?;
            // Sending to the same address without its scope is still sending to it.
            socket.connect(&server.into())?;
            UdpSocket::from_std(socket.into())
        })
    }
}

#[cfg(test)]
mod tests {
    use socket2::SockRef;

    use super::*;

    #[tokio::test]
    async fn sockets_are_marked_and_connected_or_there_are_none() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = listener.local_addr().unwrap();
        let own = SocketAddr::from(([0, 0, 0, 0], 0));
        for mark in [None, Some(crate::data::MARK)] {
            let provider = Provider::new(mark, &[server]);
            let udp = provider.bind_udp(own, server).await;
            let tcp = provider.connect_tcp(server, None, None).await;
            match (udp, tcp) {
                (Ok(udp), Ok(tcp)) => {
                    assert_eq!((udp.peer_addr().unwrap(), tcp.0.peer_addr().unwrap()), (server, server));
                    let marks = (SockRef::from(&udp).mark().unwrap(), SockRef::from(&tcp.0).mark().unwrap());
                    assert_eq!(marks, (mark.unwrap_or(0), mark.unwrap_or(0)));
                }
                (Err(udp), Err(tcp)) => {
                    // Without CAP_NET_ADMIN.
                    let refused = io::ErrorKind::PermissionDenied;
                    assert_eq!((udp.kind(), tcp.kind()), (refused, refused));
                    assert!(mark.is_some());
                }
                (udp, tcp) => panic!("{udp:?}, {:?}", tcp.map(|tcp| tcp.0)),
            }
        }
    }

    #[test]
    fn a_scope_is_that_of_the_nameserver_with_this_address_and_port() {
        let servers: Vec<SocketAddr> =
            ["192.0.2.1:53", "[fe80::1%7]:53", "[2001:db8::1]:53", "[fe80::1%8]:53", "[fe80::2%9]:53"]
                .map(|server| server.parse().unwrap())
                .to_vec();
        let provider = Provider::new(None, &servers);
        for (asked, expect) in [
            ("192.0.2.1:53", "192.0.2.1:53"),
            ("[fe80::1]:53", "[fe80::1%7]:53"),
            ("[fe80::2]:53", "[fe80::2%9]:53"),
            ("[fe80::2]:54", "[fe80::2]:54"),
            ("[2001:db8::1]:53", "[2001:db8::1]:53"),
        ] {
            let got = provider.with_scope(asked.parse().unwrap());
            assert_eq!(got, expect.parse().unwrap(), "{asked}");
        }
    }
}
