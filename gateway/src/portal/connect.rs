//! One attempt: resolve, dial all addresses at once, mark, encrypt, upgrade (portal-protocol.md section 2).

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use gateway_proto::portal::{Generation, failure::Failure, login_url::LoginUrl};
use hickory_resolver::TokioResolver;
use rustls_pki_types::ServerName;
use tokio::{
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tokio_rustls::TlsConnector;
use zeroize::Zeroizing;

use super::upgrade::{self, Request, WebSocket};

/// For the whole lookup, whatever `/etc/resolv.conf` says about attempts.
const RESOLVE_LIMIT: Duration = Duration::from_secs(10);
/// Section 2 item 3.
const TCP_LIMIT: Duration = Duration::from_secs(5);
/// Section 2 item 6: TCP, TLS and WebSocket together.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(15);
/// A name with more addresses than this is a mistake; we dial them all at once.
const MAX_ADDRESSES: usize = 16;

/// All that an attempt needs; the same for each.
pub struct Dialer {
    pub login: LoginUrl,
    pub token: Zeroizing<String>,
    pub user_agent: String,
    /// `None` is `ws`.
    pub tls: Option<Tls>,
    pub mark: Option<u32>,
}

pub struct Tls {
    pub config: Arc<rustls::ClientConfig>,
    pub server_name: ServerName<'static>,
}

impl Dialer {
    /// An open WebSocket on the endpoint of `generation`.
    pub async fn connect(&self, generation: Generation) -> Result<WebSocket, Failure> {
        // Right before dialling, so that no address is older than the back-off (section 14 item 14).
        let addresses = resolve(&self.login.host()).await?;
        let limit = HANDSHAKE_LIMIT;
        let attempt = timeout(limit, self.open(&addresses, generation)).await;
        attempt.unwrap_or(Err(Failure::TimedOut { what: "connecting to the portal", limit }))
    }

    async fn open(&self, addresses: &[IpAddr], generation: Generation) -> Result<WebSocket, Failure> {
        let tcp = self.dial(addresses).await?;
        // A Nov-2025 portal knows the token only as query parameter, and it has no v2.
        let query_token = (generation == Generation::V1).then_some(self.token.as_str());
        let request = Request {
            target: Zeroizing::new(self.login.request_target(generation, query_token)),
            host: self.login.host_header(),
            user_agent: &self.user_agent,
            token: &self.token,
        };
        match &self.tls {
            None => upgrade::upgrade(tcp, request).await,
            Some(Tls { config, server_name }) => {
                let connector = TlsConnector::from(Arc::clone(config));
                let tls = connector.connect(server_name.clone(), tcp).await.map_err(|e| tls_failure(&e))?;
                upgrade::upgrade(tls, request).await
            }
        }
    }

    /// The first address that accepts wins, the others are dropped.
    async fn dial(&self, addresses: &[IpAddr]) -> Result<TcpStream, Failure> {
        let port = self.login.port();
        let mut attempts = FuturesUnordered::new();
        let mut last = String::new();
        for ip in addresses {
            let address = SocketAddr::new(*ip, port);
            match marked_tcp_socket(address, self.mark) {
                Ok(socket) => attempts.push(async move { (address, socket.connect(address).await) }),
                Err(failure @ Failure::Mark(_)) => return Err(failure),
                // A kernel without IPv6 must not keep us from IPv4.
                Err(failure) => {
                    tracing::debug!(%address, %failure, "Cannot dial an address of the portal");
                    last = failure.to_string();
                }
            }
        }
        let first = async {
            while let Some((address, result)) = attempts.next().await {
                match result {
                    Ok(stream) => return Ok(stream),
                    Err(error) => {
                        tracing::debug!(%address, %error, "An address of the portal does not accept");
                        last = error.to_string();
                    }
                }
            }
            let tried = addresses.len();
            Err(Failure::Connect(format!(
                "no address of {} accepts connections on port {port}: {last} ({tried} tried)",
                self.login.host()
            )))
        };
        let limit = TCP_LIMIT;
        timeout(limit, first)
            .await
            .unwrap_or(Err(Failure::TimedOut { what: "opening a TCP connection", limit }))
    }
}

/// A TCP socket for `address`'s family, without Nagle's delay, marked so that the kernel never routes it into our own
/// tunnel. `mark: None` leaves it unmarked.
///
/// # Errors
/// [`Failure::Mark`] if the mark is refused, [`Failure::Connect`] if there is no socket.
pub fn marked_tcp_socket(address: SocketAddr, mark: Option<u32>) -> Result<TcpSocket, Failure> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    };
    let socket = socket.map_err(|e| Failure::Connect(format!("cannot open a TCP socket: {e}")))?;
    socket.set_nodelay(true).map_err(|e| Failure::Connect(format!("cannot set TCP_NODELAY: {e}")))?;
    if let Some(mark) = mark {
        socket2::SockRef::from(&socket).set_mark(mark).map_err(|e| match e.kind() {
            io::ErrorKind::PermissionDenied => {
                Failure::Mark(format!("{e}; run as root or give the process CAP_NET_ADMIN"))
            }
            _ => Failure::Mark(e.to_string()),
        })?;
    }
    Ok(socket)
}

/// Hosts file first, then A and AAAA. The resolver is made afresh, so that a changed `/etc/resolv.conf` or `/etc/hosts`
/// counts and no answer is older than this attempt.
async fn resolve(host: &str) -> Result<Vec<IpAddr>, Failure> {
    if let Ok(ip) = host.parse() {
        return Ok(vec![ip]);
    }
    let mut builder = TokioResolver::builder_tokio()
        .map_err(|e| Failure::Resolve(format!("/etc/resolv.conf cannot be used: {e}")))?;
    builder.options_mut().ip_strategy = hickory_resolver::config::LookupIpStrategy::Ipv4AndIpv6;
    let resolver = builder.build().map_err(|e| Failure::Resolve(e.to_string()))?;
    let limit = RESOLVE_LIMIT;
    let lookup = timeout(limit, resolver.lookup_ip(host)).await;
    let lookup = lookup.map_err(|_| Failure::TimedOut { what: "resolving the portal's host", limit })?;
    let lookup = lookup.map_err(|e| Failure::Resolve(format!("{host}: {e}")))?;
    let mut addresses: Vec<IpAddr> = lookup.iter().collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses.truncate(MAX_ADDRESSES);
    if addresses.is_empty() {
        return Err(Failure::Resolve(format!("{host} has no address")));
    }
    Ok(addresses)
}

fn tls_failure(error: &io::Error) -> Failure {
    match error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(why)) => Failure::Certificate(why.to_string()),
        Some(other) => Failure::Tls(other.to_string()),
        None => Failure::Tls(error.to_string()),
    }
}
