//! The client's WebSocket, a task on a thread beside the loop (portal-protocol.md sections 1, 3, 5).
//!
//! It logs in, joins, heartbeats and reconnects; what the messages mean is the event loop's matter.

use std::net::{SocketAddr, ToSocketAddrs as _};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use futures_util::{SinkExt as _, StreamExt as _};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::http::Request;
use url::Url;

use super::config::{Config, Generation};
use super::eventloop::{Input, Inputs};
use crate::standins::phoenix::Frame;
use crate::standins::portal::external_id;

/// Pause before the next attempt.
const RETRY: Duration = Duration::from_millis(500);
/// TCP and WebSocket handshake together.
const CONNECT_LIMIT: Duration = Duration::from_secs(15);

/// What the WebSocket's task is told.
pub(super) enum Order {
    /// Send an event; dropped while not joined.
    Say(&'static str, Value),
    /// Log in again, with this public key from now on.
    Login(String),
}

/// What it reports.
pub(super) enum Report {
    /// A push of the portal.
    Pushed(Frame),
    /// The join was acknowledged.
    Joined,
    /// The WebSocket ended, or could not be opened.
    Lost(String),
}

/// The runtime of one or many WebSockets, on a thread of its own.
pub(super) fn runtime() -> Result<Handle> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new()
        .name("portal".into())
        .spawn(move || runtime.block_on(std::future::pending::<()>()))?;
    Ok(handle)
}

/// Starts the task; `public_key` is 44 characters of base64.
pub(super) fn start(
    config: &Config,
    public_key: String,
    inputs: Inputs,
    runtime: &Handle,
) -> mpsc::UnboundedSender<Order> {
    let (orders, mut queue) = mpsc::unbounded_channel();
    let config = config.clone();
    runtime.spawn(async move {
        let mut public_key = public_key;
        loop {
            match session(&config, &public_key, &inputs, &mut queue).await {
                Ok(Some(new_key)) => {
                    public_key = new_key;
                    inputs(Input::Portal(Report::Lost("logging in again".into())));
                    continue;
                }
                // The event loop is gone.
                Ok(None) => return,
                Err(error) => inputs(Input::Portal(Report::Lost(format!("{error:#}")))),
            }
            tokio::time::sleep(RETRY).await;
        }
    });
    orders
}

/// One WebSocket, from dialling to its end. `Some(key)` asks for a new one with this key, `None` for the end.
async fn session(
    config: &Config,
    public_key: &str,
    inputs: &Inputs,
    queue: &mut mpsc::UnboundedReceiver<Order>,
) -> Result<Option<String>> {
    let (request, addr) = request(config, public_key)?;
    let connect = async {
        let stream =
            TcpStream::connect(addr).await.with_context(|| format!("cannot reach the portal at {addr}"))?;
        stream.set_nodelay(true)?;
        Ok::<_, anyhow::Error>(tokio_tungstenite::client_async(request, stream).await?.0)
    };
    let mut socket =
        tokio::time::timeout(CONNECT_LIMIT, connect).await.context("the portal does not answer")??;
    let mut next_ref = 0;
    let mut encode = |topic: &str, event: &str, payload: Value| {
        let frame = Frame { topic: topic.into(), event: event.into(), payload, reference: Some(next_ref) };
        next_ref += 1;
        Message::text(frame.encode())
    };
    socket.send(encode("client", "phx_join", Value::Null)).await?;
    let period = match config.generation {
        Generation::Head => Duration::from_secs(10),
        Generation::Nov25 => Duration::from_secs(30),
    };
    let mut heartbeat = tokio::time::interval_at(tokio::time::Instant::now() + period, period);
    let mut joined = false;
    loop {
        tokio::select! {
            _ = heartbeat.tick() => socket.send(encode("phoenix", "heartbeat", json!({}))).await?,
            order = queue.recv() => match order {
                Some(Order::Say(event, payload)) if joined => socket.send(encode("client", event, payload)).await?,
                Some(Order::Say(..)) => {}
                Some(Order::Login(public_key)) => {
                    let _ = socket.close(None).await;
                    return Ok(Some(public_key));
                }
                None => return Ok(None),
            },
            message = socket.next() => match message.context("the portal closed the connection")?? {
                Message::Text(text) => {
                    let frame = Frame::decode(text.as_str())?;
                    match (frame.event.as_str(), frame.reference) {
                        ("phx_reply", Some(0)) if frame.is_ok_reply() => {
                            joined = true;
                            inputs(Input::Portal(Report::Joined));
                        }
                        ("phx_reply", Some(0)) => bail!("the portal refused the join"),
                        ("phx_reply", _) => {}
                        _ => inputs(Input::Portal(Report::Pushed(frame))),
                    }
                }
                Message::Close(_) => bail!("the portal closed the connection"),
                _ => {}
            },
        }
    }
}

/// The upgrade request and where to send it.
fn request(config: &Config, public_key: &str) -> Result<(Request<()>, SocketAddr)> {
    let mut url = Url::parse(&config.portal).with_context(|| format!("{} is not a URL", config.portal))?;
    if url.scheme() != "ws" {
        bail!("the stand-in client speaks ws:// only, not {}", url.scheme());
    }
    let version = match config.generation {
        Generation::Head => "client/v2/websocket",
        Generation::Nov25 => "client/websocket",
    };
    url.set_path(&format!("{}/{version}", url.path().trim_end_matches('/')));
    {
        let mut query = url.query_pairs_mut();
        query.clear();
        if config.generation == Generation::Nov25 {
            query.append_pair("token", &config.token.0);
        }
        query.append_pair("external_id", &external_id(&config.id));
        query.append_pair("name", &config.name);
        query.append_pair("public_key", public_key);
    }
    let host = url.host_str().context("the portal's URL has no host")?.to_owned();
    let port = url.port_or_known_default().unwrap_or(443);
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let addr = (bare, port).to_socket_addrs()?.next().with_context(|| format!("{host} has no address"))?;
    let version = match config.generation {
        Generation::Head => "1.5.12",
        Generation::Nov25 => "1.5.5",
    };
    let mut request = Request::builder()
        .uri(url.as_str())
        .header("Host", host)
        .header("Connection", "Upgrade")
        .header("Upgrade", "websocket")
        .header("Sec-WebSocket-Version", "13")
        .header("Sec-WebSocket-Key", generate_key())
        .header("User-Agent", format!("Debian/12.0.0 headless-client/{version} (x86_64)"));
    if config.generation == Generation::Head {
        request = request.header("X-Authorization", format!("Bearer {}", config.token.0));
    }
    Ok((request.body(())?, addr))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "MBjm42jMxgG4UeZ9HiTvaeermTeFEsludndtMLyCLxo=";

    #[test]
    fn each_generation_logs_in_as_recorded() {
        let mut config = Config::new("ws://127.0.0.1:8081/", "mock-client-token", "interop-cl");
        config.id = "22222222-2222-4222-8222-222222222222".into();
        let (head, addr) = request(&config, KEY).unwrap();
        assert_eq!(addr, "127.0.0.1:8081".parse().unwrap());
        assert_eq!(
            head.uri().to_string(),
            "ws://127.0.0.1:8081/client/v2/websocket?external_id=b454f82c5857ebabf342b7258e5cf7def78b7cd9758141194629\
             73de9a38df10&name=interop-cl&public_key=MBjm42jMxgG4UeZ9HiTvaeermTeFEsludndtMLyCLxo%3D"
        );
        assert_eq!(head.headers()["X-Authorization"], "Bearer mock-client-token");
        config.generation = Generation::Nov25;
        let (nov25, _) = request(&config, KEY).unwrap();
        assert!(
            nov25
                .uri()
                .to_string()
                .starts_with("ws://127.0.0.1:8081/client/websocket?token=mock-client-token&")
        );
        assert!(!nov25.headers().contains_key("X-Authorization"));
    }
}
