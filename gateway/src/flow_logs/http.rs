//! One HTTP request after the other to where flow logs go: POST, bearer token, JSON, over a connection that is kept
//! (cli-and-service.md section 14.5). Knows no records and no retries.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use gateway_proto::portal::{
    failure::{Failure, parse_retry_after},
    messages::Secret,
};
use http_body_util::{BodyExt as _, Full};
use hyper::{
    HeaderMap, Method, Request, Response,
    body::{Bytes, Incoming},
    client::conn::http1,
    header,
};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use url::{Host, Url};
use zeroize::Zeroizing;

use crate::portal::connect;

/// The path, whatever the base URL's is.
const PATH: &str = "/ingestion/flow_logs";
/// For TCP and TLS together.
const DIAL_LIMIT: Duration = Duration::from_secs(15);
/// For a request and its answer: 8 MB at 1 Mbit/s.
const REQUEST_LIMIT: Duration = Duration::from_secs(64);
/// More of an answer than this is not read; the ingest endpoint's has a line per invalid record.
const MAX_BODY: usize = 1 << 20;

/// An `https` URL without credentials.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target(Url);

impl Target {
    /// Where to send records, by the base URL that the portal tells.
    ///
    /// # Errors
    /// Why nothing can be sent there.
    pub fn ingestion(api_url: &str) -> Result<Self, String> {
        let base = Url::parse(api_url).map_err(|e| format!("{api_url:?} is no URL: {e}"))?;
        Self::checked(base.join(PATH).map_err(|e| format!("{api_url:?} is no base of a URL: {e}"))?)
    }

    /// Where a redirection leads.
    ///
    /// # Errors
    /// Why nothing can be sent there.
    pub fn redirected(&self, location: &str) -> Result<Self, String> {
        Self::checked(self.0.join(location).map_err(|e| format!("a redirection leads to no URL: {e}"))?)
    }

    fn checked(url: Url) -> Result<Self, String> {
        let complaint = if url.scheme() != "https" {
            "is not https: flow logs and their tokens are not sent for everybody to read"
        } else if !url.username().is_empty() || url.password().is_some() {
            return Err("the URL has credentials in it".to_owned());
        } else if url.host().is_none() {
            "names no host"
        } else {
            return Ok(Self(url));
        };
        Err(format!("{url} {complaint}"))
    }

    /// Whom to connect to: a name or an address, and the port.
    pub fn origin(&self) -> (String, u16) {
        let host = match self.0.host() {
            Some(Host::Ipv6(ip)) => ip.to_string(),
            Some(host) => host.to_string(),
            None => String::new(),
        };
        (host, self.0.port_or_known_default().unwrap_or(443))
    }

    fn host_header(&self) -> String {
        let host = self.0.host_str().unwrap_or_default();
        self.0.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
    }
}

/// Opens connections.
pub trait Dial {
    /// What is read and written in the clear.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    /// A connection to `host`, a name or an address.
    ///
    /// # Errors
    /// Why there is none.
    async fn dial(&mut self, host: &str, port: u16) -> Result<Self::Stream, String>;
}

/// The real ones: TLS over a TCP socket with our mark, to any address that accepts.
pub struct Tls {
    config: Arc<rustls::ClientConfig>,
    mark: Option<u32>,
}

impl Tls {
    /// With the roots of `config`. Sockets get SO_MARK `mark`.
    pub fn new(config: &rustls::ClientConfig, mark: Option<u32>) -> Self {
        let mut config = config.clone();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Self { config: config.into(), mark }
    }
}

impl Dial for Tls {
    type Stream = TlsStream<TcpStream>;

    async fn dial(&mut self, host: &str, port: u16) -> Result<Self::Stream, String> {
        let say = |failure: Failure| match failure {
            Failure::Resolve(why) | Failure::Connect(why) => why,
            Failure::TimedOut { limit, .. } => {
                format!("reaching {host} took longer than {} s", limit.as_secs())
            }
            failure => failure.to_string(),
        };
        let addresses = connect::resolve(host, self.mark).await.map_err(say)?;
        let name = ServerName::try_from(host.to_owned()).map_err(|e| format!("{host}: {e}"))?;
        let open = async {
            let tcp = connect::dial(host, port, &addresses, self.mark).await.map_err(say)?;
            let tls = TlsConnector::from(Arc::clone(&self.config)).connect(name, tcp).await;
            tls.map_err(|e| format!("TLS with {host} failed: {e}"))
        };
        let late = |_| Err(format!("connecting to {host} took longer than {} s", DIAL_LIMIT.as_secs()));
        timeout(DIAL_LIMIT, open).await.unwrap_or_else(late)
    }
}

/// What the server said.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// `Retry-After`, at most five minutes.
    pub retry_after: Option<Duration>,
    /// `Location`, if it is text.
    pub location: Option<String>,
    /// The beginning of the body.
    pub body: Vec<u8>,
}

/// The client. One connection is kept, for who asks the same host again.
pub struct Http<D> {
    dial: D,
    user_agent: String,
    open: Option<Connection>,
}

struct Connection {
    origin: (String, u16),
    sender: http1::SendRequest<Full<Bytes>>,
    /// Drives the bytes, and ends with the connection.
    _driver: JoinSet<hyper::Result<()>>,
}

impl<D: Dial> Http<D> {
    /// A client that opens its connections by `dial`.
    pub fn new(dial: D, user_agent: String) -> Self {
        Self { dial, user_agent, open: None }
    }

    /// Sends `body`, which is JSON, under `token`.
    ///
    /// # Errors
    /// There is no complete answer, and why. It is not known then whether the server took the body.
    pub async fn post(&mut self, target: &Target, token: &Secret, body: Bytes) -> Result<Answer, String> {
        let request = self.request(target, token, body)?;
        let mut connection = match self.kept(target).await {
            Some(connection) => connection,
            None => self.connect(target).await?,
        };
        let exchange = async {
            let response = connection.sender.send_request(request).await.map_err(|e| describe(&e))?;
            read(response).await
        };
        let late = |_| Err(format!("there was no answer within {} s", REQUEST_LIMIT.as_secs()));
        let (answer, whole) = timeout(REQUEST_LIMIT, exchange).await.unwrap_or_else(late)?;
        self.open = whole.then_some(connection);
        Ok(answer)
    }

    /// Lets go of the connection: nothing is to be sent for some time.
    pub fn close(&mut self) {
        self.open = None;
    }

    fn request(&self, target: &Target, token: &Secret, body: Bytes) -> Result<Request<Full<Bytes>>, String> {
        let bearer = Zeroizing::new(format!("Bearer {}", token.0.as_str()));
        let mut authorization = header::HeaderValue::from_str(&bearer)
            .map_err(|_| "the token cannot be sent in a header".to_owned())?;
        // Keeps it out of the header map's Debug.
        authorization.set_sensitive(true);
        let query = target.0.query().map_or_else(String::new, |query| format!("?{query}"));
        Request::builder()
            .method(Method::POST)
            .uri(format!("{}{query}", target.0.path()))
            .header(header::HOST, target.host_header())
            .header(header::USER_AGENT, &self.user_agent)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::ACCEPT, "application/json")
            .header(header::AUTHORIZATION, authorization)
            .body(Full::new(body))
            .map_err(|e| format!("the request cannot be built: {e}"))
    }

    /// The connection of the request before, if it leads there and the server has not closed it.
    async fn kept(&mut self, target: &Target) -> Option<Connection> {
        let mut connection = self.open.take().filter(|open| open.origin == target.origin())?;
        connection.sender.ready().await.ok()?;
        Some(connection)
    }

    async fn connect(&mut self, target: &Target) -> Result<Connection, String> {
        let origin = target.origin();
        let stream = self.dial.dial(&origin.0, origin.1).await?;
        let (sender, driver) = http1::handshake(TokioIo::new(stream)).await.map_err(|e| describe(&e))?;
        let mut tasks = JoinSet::new();
        tasks.spawn(driver);
        Ok(Connection { origin, sender, _driver: tasks })
    }
}

/// The answer, and whether that was all of it: another request may follow then.
async fn read(response: Response<Incoming>) -> Result<(Answer, bool), String> {
    let (head, mut body) = response.into_parts();
    let unix_now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut answer = Answer {
        status: head.status.as_u16(),
        retry_after: text(&head.headers, header::RETRY_AFTER).and_then(|v| parse_retry_after(v, unix_now)),
        location: text(&head.headers, header::LOCATION).map(str::to_owned),
        body: Vec::new(),
    };
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|e| format!("its answer broke off: {}", describe(&e)))?;
        let data = frame.data_ref().map_or(&[][..], |data| data);
        let room = MAX_BODY - answer.body.len();
        if data.len() > room {
            answer.body.extend_from_slice(&data[..room]);
            return Ok((answer, false));
        }
        answer.body.extend_from_slice(data);
    }
    Ok((answer, true))
}

fn text(headers: &HeaderMap, name: header::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

/// With what is behind it: hyper's own word is just "connection error".
fn describe(error: &hyper::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_https_without_credentials_and_its_path_is_ours() {
        for (api_url, expect) in [
            ("https://flows.example.net", Ok("https://flows.example.net/ingestion/flow_logs")),
            ("https://flows.example.net/", Ok("https://flows.example.net/ingestion/flow_logs")),
            ("https://flows.example.net/a/b?c#d", Ok("https://flows.example.net/ingestion/flow_logs")),
            ("HTTPS://[2001:DB8::1]:8443", Ok("https://[2001:db8::1]:8443/ingestion/flow_logs")),
            ("http://flows.example.net", Err("is not https")),
            ("ftp://flows.example.net", Err("is not https")),
            ("https://user@flows.example.net", Err("has credentials")),
            ("https://:secret@flows.example.net", Err("has credentials")),
            ("mailto:a@example.net", Err("is no base")),
            ("flows.example.net", Err("is no URL")),
            ("", Err("is no URL")),
        ] {
            match (Target::ingestion(api_url), expect) {
                (Ok(target), Ok(expect)) => assert_eq!(target.0.as_str(), expect, "{api_url}"),
                (Err(error), Err(expect)) => {
                    assert!(error.contains(expect) && !error.contains("secret"), "{api_url}: {error}");
                }
                (got, _) => panic!("{api_url}: {got:?}"),
            }
        }
    }

    #[test]
    fn whom_to_connect_to_and_what_host_says() {
        for (api_url, origin, host) in [
            ("https://flows.example.net", ("flows.example.net", 443), "flows.example.net"),
            ("https://flows.example.net:443", ("flows.example.net", 443), "flows.example.net"),
            ("https://192.0.2.1:8443", ("192.0.2.1", 8443), "192.0.2.1:8443"),
            ("https://[2001:db8::1]:8443", ("2001:db8::1", 8443), "[2001:db8::1]:8443"),
        ] {
            let target = Target::ingestion(api_url).unwrap();
            assert_eq!(target.origin(), (origin.0.to_owned(), origin.1), "{api_url}");
            assert_eq!(target.host_header(), host, "{api_url}");
        }
    }

    #[test]
    fn a_redirection_may_be_relative_but_stays_https() {
        let target = Target::ingestion("https://a.example").unwrap();
        for (location, expect) in [
            ("/v2/logs?x=1", Some("https://a.example/v2/logs?x=1")),
            ("other", Some("https://a.example/ingestion/other")),
            ("//b.example/logs", Some("https://b.example/logs")),
            ("https://b.example:8443/logs", Some("https://b.example:8443/logs")),
            ("http://a.example/ingestion/flow_logs", None),
            ("https://user:pw@a.example/", None),
            ("https://", None),
        ] {
            let got = target.redirected(location).ok();
            assert_eq!(got.as_ref().map(|target| target.0.as_str()), expect, "{location}");
        }
    }
}
