//! One attempt: resolve, dial all addresses at once, mark, encrypt, upgrade (portal-protocol.md section 2).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use gateway_proto::{
    names::{DomainName, Lookup, Resolved},
    portal::{Generation, failure::Failure, login_url::LoginUrl},
};
use rustls_pki_types::ServerName;
use tokio::{
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tokio_rustls::TlsConnector;
use zeroize::Zeroizing;

use super::upgrade::{self, Request, WebSocket};
use crate::dns;

/// Section 2 item 3.
const TCP_LIMIT: Duration = Duration::from_secs(5);
/// Section 2 item 6: TCP, TLS and WebSocket together.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(15);
/// Why a name has no address.
const CANNOT_TELL: &str = "is not known: no nameserver can tell";
const SILENT: &str = "is not known: no nameserver answered in time";
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
        let addresses = resolve(&self.login.host(), self.mark).await?;
        let limit = HANDSHAKE_LIMIT;
        let attempt = timeout(limit, self.open(&addresses, generation)).await;
        attempt.unwrap_or(Err(Failure::TimedOut { what: "connecting to the portal", limit }))
    }

    async fn open(&self, addresses: &[IpAddr], generation: Generation) -> Result<WebSocket, Failure> {
        let tcp = dial(&self.login.host(), self.login.port(), addresses, self.mark).await?;
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
}

/// The first of `host`'s addresses that accepts wins, the others are dropped.
///
/// # Errors
/// None accepts in time, or the socket cannot have its mark.
pub async fn dial(
    host: &str,
    port: u16,
    addresses: &[IpAddr],
    mark: Option<u32>,
) -> Result<TcpStream, Failure> {
    let mut attempts = FuturesUnordered::new();
    let mut last = String::new();
    for ip in addresses {
        let address = SocketAddr::new(*ip, port);
        match marked_tcp_socket(address, mark) {
            Ok(socket) => attempts.push(async move { (address, socket.connect(address).await) }),
            Err(failure @ Failure::Mark(_)) => return Err(failure),
            // A kernel without IPv6 must not keep us from IPv4.
            Err(failure) => {
                tracing::debug!(host, %address, %failure, "Cannot dial an address");
                last = failure.to_string();
            }
        }
    }
    let first = async {
        while let Some((address, result)) = attempts.next().await {
            match result {
                Ok(stream) => return Ok(stream),
                Err(error) => {
                    tracing::debug!(host, %address, %error, "An address does not accept");
                    last = error.to_string();
                }
            }
        }
        let tried = addresses.len();
        Err(Failure::Connect(format!(
            "no address of {host} accepts connections on port {port}: {last} ({tried} tried)",
        )))
    };
    let limit = TCP_LIMIT;
    timeout(limit, first).await.unwrap_or(Err(Failure::TimedOut { what: "opening a TCP connection", limit }))
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

/// The addresses of both families, as the machine knows them now: a changed `/etc/resolv.conf` or `/etc/hosts` counts, and
/// no answer is older than this attempt. The questions are marked as the connection is.
///
/// # Errors
/// There is no address, or nobody who tells it in time.
pub async fn resolve(host: &str, mark: Option<u32>) -> Result<Vec<IpAddr>, Failure> {
    if let Ok(ip) = host.parse() {
        return Ok(vec![ip]);
    }
    let no = |why: &str| Failure::Resolve(format!("{host} {why}"));
    let name = DomainName::parse(host).ok_or_else(|| no("is no host name"))?;
    // Without the right to mark sockets nobody would answer: that has a better message.
    if let Err(failure @ Failure::Mark(_)) = marked_tcp_socket((Ipv4Addr::UNSPECIFIED, 0).into(), mark) {
        return Err(failure);
    }
    let Resolved { v4, v6 } = dns::look_up_afresh(&name, mark).await;
    let mut addresses: Vec<IpAddr> = Vec::new();
    let mut why = "has no address";
    for found in [v4.filter_map(|ip| Some(IpAddr::V4(ip))), v6.filter_map(|ip| Some(IpAddr::V6(ip)))] {
        match found {
            Lookup::Answer(ips) => addresses.extend(ips),
            Lookup::Failed => why = CANNOT_TELL,
            Lookup::TimedOut => why = SILENT,
        }
    }
    addresses.sort_unstable();
    addresses.dedup();
    addresses.truncate(MAX_ADDRESSES);
    if addresses.is_empty() { Err(no(why)) } else { Ok(addresses) }
}

fn tls_failure(error: &io::Error) -> Failure {
    match error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(why)) => Failure::Certificate(why.to_string()),
        Some(other) => Failure::Tls(other.to_string()),
        None => Failure::Tls(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_host_is_an_address_or_a_name() {
        let table: [(&str, Result<&[&str], &str>); 4] = [
            ("192.0.2.1", Ok(&["192.0.2.1"])),
            ("2001:db8::1", Ok(&["2001:db8::1"])),
            ("portal..example", Err("cannot resolve the portal's host: portal..example is no host name")),
            ("portal example", Err("cannot resolve the portal's host: portal example is no host name")),
        ];
        for (host, expect) in table {
            match (resolve(host, None).await, expect) {
                (Ok(got), Ok(expect)) => {
                    assert_eq!(got.iter().map(IpAddr::to_string).collect::<Vec<_>>(), expect, "{host}");
                }
                (got, expect) => assert_eq!(got.unwrap_err().to_string(), expect.unwrap_err(), "{host}"),
            }
        }
        // By the machine's files, without asking anybody.
        let loopback = resolve("localhost", None).await.unwrap();
        assert!(!loopback.is_empty() && loopback.iter().all(IpAddr::is_loopback), "{loopback:?}");
    }
}
