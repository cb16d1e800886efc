//! The HTTP upgrade (RFC 6455 section 4.1, portal-protocol.md section 3). Done with an HTTP library of its own and not
//! by the WebSocket library: that one keeps of a refusal's body only what came with the headers, and traces the request
//! with the token in it.

use std::time::{Duration, SystemTime};

use futures_util::TryFutureExt as _;
use gateway_proto::portal::failure::{Failure, Refusal};
use http_body_util::{BodyExt as _, Empty};
use hyper::{
    HeaderMap, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1,
    header,
    upgrade::Upgraded,
};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    task::JoinSet,
    time::timeout,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        handshake::{client::generate_key, derive_accept_key},
        protocol::{Role, WebSocketConfig},
    },
};
use url::form_urlencoded;
use zeroize::Zeroizing;

/// The open connection, whatever is below.
pub type WebSocket = WebSocketStream<TokioIo<Upgraded>>;

/// Section 2 item 8.
const MAX_MESSAGE: usize = 64 << 20;
const MAX_FRAME: usize = 16 << 20;
/// More of a refusal than this helps nobody.
const MAX_BODY: usize = 64 << 10;
/// A body without length ends with the connection, which a server may keep open.
const BODY_LIMIT: Duration = Duration::from_secs(2);

/// The varying parts of the request.
pub struct Request<'a> {
    /// Path and query; on v1 it holds the token.
    pub target: Zeroizing<String>,
    pub host: String,
    pub user_agent: &'a str,
    pub token: &'a str,
}

/// Upgrades `stream`. The caller limits the time.
pub async fn upgrade<S>(stream: S, request: Request<'_>) -> Result<WebSocket, Failure>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let broken = |e: hyper::Error| Failure::Upgrade(e.to_string());
    let builder = {
        let mut builder = http1::Builder::new();
        // Some middleboxes know only the usual spelling.
        builder.title_case_headers(true);
        builder
    };
    let (mut sender, connection) = builder.handshake(TokioIo::new(stream)).await.map_err(broken)?;
    // Drives the bytes; ends with the upgrade, and with this set if there is none.
    let mut driver = JoinSet::new();
    driver.spawn(connection.with_upgrades());
    let key = generate_key();
    let http_request = build(&request, &key)?;
    let response = sender.send_request(http_request).await.map_err(broken)?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(Failure::Refused(read_refusal(response, request.token).await));
    }
    check(response.headers(), &key)?;
    let upgraded = hyper::upgrade::on(response).map_err(broken).await?;
    driver.detach_all();
    let config =
        WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_FRAME));
    Ok(WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Client, Some(config)).await)
}

fn build(request: &Request<'_>, key: &str) -> Result<hyper::Request<Empty<Bytes>>, Failure> {
    let bearer = Zeroizing::new(format!("Bearer {}", request.token));
    let mut authorization = header::HeaderValue::from_str(&bearer)
        .map_err(|_| Failure::Upgrade("the token cannot be sent in a header".to_owned()))?;
    // Keeps it out of the header map's Debug.
    authorization.set_sensitive(true);
    hyper::Request::get(request.target.as_str())
        .header(header::HOST, &request.host)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "websocket")
        .header(header::SEC_WEBSOCKET_VERSION, "13")
        .header(header::SEC_WEBSOCKET_KEY, key)
        .header(header::USER_AGENT, request.user_agent)
        .header("x-authorization", authorization)
        .body(Empty::new())
        .map_err(|e| Failure::Upgrade(format!("the request cannot be built: {e}")))
}

/// RFC 6455 section 4.1, the client's list of what a 101 must say.
fn check(headers: &HeaderMap, key: &str) -> Result<(), Failure> {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let has_token =
        |name, token: &str| text(name).split(',').any(|part| part.trim().eq_ignore_ascii_case(token));
    let complaint = if !has_token(header::UPGRADE, "websocket") {
        "it upgrades to something else than a WebSocket"
    } else if !has_token(header::CONNECTION, "upgrade") {
        "its Connection header does not say Upgrade"
    } else if text(header::SEC_WEBSOCKET_ACCEPT) != derive_accept_key(key.as_bytes()) {
        "its Sec-WebSocket-Accept does not match"
    } else if headers.contains_key(header::SEC_WEBSOCKET_EXTENSIONS)
        || headers.contains_key(header::SEC_WEBSOCKET_PROTOCOL)
    {
        "it names an extension or subprotocol nobody asked for"
    } else {
        return Ok(());
    };
    Err(Failure::Upgrade(complaint.to_owned()))
}

async fn read_refusal(response: Response<Incoming>, token: &str) -> Refusal {
    let (head, mut body) = response.into_parts();
    let mut read = Vec::new();
    // However many reads it takes; what came before an error or the limit still tells something.
    let _ = timeout(BODY_LIMIT, async {
        while read.len() < MAX_BODY
            && let Some(Ok(frame)) = body.frame().await
        {
            if let Some(data) = frame.data_ref() {
                read.extend_from_slice(&data[..data.len().min(MAX_BODY - read.len())]);
            }
        }
    })
    .await;
    let text = |name| head.headers.get(name).and_then(|value: &header::HeaderValue| value.to_str().ok());
    let unix_now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Refusal::new(
        head.status.as_u16(),
        text(header::CONTENT_TYPE),
        text(header::RETRY_AFTER),
        without_token(&read, token).as_bytes(),
        unix_now,
    )
}

/// An error page may echo the request, and with it our token.
fn without_token(body: &[u8], token: &str) -> String {
    let encoded: String = form_urlencoded::byte_serialize(token.as_bytes()).collect();
    String::from_utf8_lossy(body).replace(token, "[redacted]").replace(&encoded, "[redacted]")
}
