//! Sockets of the portal: one thread, one single-threaded runtime, one task per WebSocket.

use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};

use super::Shared;
use super::admit;
use super::config::Tls;
use super::state::{ConnId, Out};

/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(50);
/// The portal closes a socket that said nothing for this long (portal-protocol.md section 5.2).
const IDLE_LIMIT: Duration = Duration::from_secs(37);

/// A running server thread; dropping it ends the thread.
pub(super) struct Server {
    /// Where it listens.
    pub(super) addr: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    /// Starts listening on `listen`, inside the network namespace at `netns` if one is given.
    pub(super) fn start(
        shared: Arc<Shared>,
        netns: Option<PathBuf>,
        listen: SocketAddr,
        tls: Option<&Tls>,
    ) -> Result<Self> {
        let acceptor = tls.map(tls_acceptor).transpose()?;
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::Builder::new().name("portal".into()).spawn(move || {
            let listener = enter(netns.as_deref()).and_then(|()| runtime_and_listener(listen));
            match listener {
                Ok((runtime, listener, addr)) => {
                    let _ = ready.send(Ok(addr));
                    runtime.block_on(serve(shared, listener, acceptor, stopped));
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })?;
        let addr = is_ready.recv().context("the portal's thread ended before it listened")??;
        Ok(Self { addr, stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic in there was printed already.
            let _ = thread.join();
        }
    }
}

/// Moves the calling thread into the network namespace at this path.
fn enter(netns: Option<&std::path::Path>) -> Result<()> {
    let Some(path) = netns else { return Ok(()) };
    let file = std::fs::File::open(path).with_context(|| format!("network namespace {}", path.display()))?;
    rustix::thread::move_into_link_name_space(file.as_fd(), Some(rustix::thread::LinkNameSpaceType::Network))
        .with_context(|| format!("cannot enter network namespace {}", path.display()))
}

fn runtime_and_listener(listen: SocketAddr) -> Result<(tokio::runtime::Runtime, TcpListener, SocketAddr)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = runtime
        .block_on(TcpListener::bind(listen))
        .with_context(|| format!("the portal cannot listen on {listen}"))?;
    let addr = listener.local_addr()?;
    Ok((runtime, listener, addr))
}

async fn serve(
    shared: Arc<Shared>,
    listener: TcpListener,
    tls: Option<tokio_rustls::TlsAcceptor>,
    mut stopped: oneshot::Receiver<()>,
) {
    let mut tasks = tokio::task::JoinSet::new();
    let mut tick = tokio::time::interval(TICK);
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            _ = tick.tick() => shared.with(|state| state.handle_timeout(Instant::now())),
            Some(_) = tasks.join_next() => {}
            accepted = listener.accept() => {
                if let Ok((stream, _)) = accepted {
                    tasks.spawn(accept(shared.clone(), stream, tls.clone()));
                }
            }
        }
    }
    drop(listener);
    // Give everybody their last word, then cut.
    let finish = async { while tasks.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(Duration::from_millis(300), finish).await;
}

/// Any byte stream a WebSocket can live on.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

async fn accept(shared: Arc<Shared>, stream: TcpStream, tls: Option<tokio_rustls::TlsAcceptor>) {
    let _ = stream.set_nodelay(true);
    let Ok(raw) = stream.as_fd().try_clone_to_owned().map(socket2::Socket::from) else { return };
    let stream: Box<dyn Stream> = match tls {
        Some(tls) => match tls.accept(stream).await {
            Ok(stream) => Box::new(stream),
            Err(_) => return,
        },
        None => Box::new(stream),
    };
    let mut admitted = None;
    #[expect(clippy::result_large_err, reason = "tungstenite's callback has this signature")]
    let check = |request: &Request, response: Response| -> Result<Response, ErrorResponse> {
        // Check and registration are one step, or two connections of one gateway could both pass.
        shared.with(|state| match admit::admit(state, request) {
            Ok(login) => {
                admitted = Some(state.register(login));
                Ok(response)
            }
            Err(refusal) => Err(refusal.response()),
        })
    };
    let socket = tokio_tungstenite::accept_hdr_async(stream, check).await;
    let Some((conn, queue)) = admitted else { return };
    let reason = match socket {
        Ok(socket) => converse(&shared, conn, socket, queue, &raw).await,
        Err(error) => format!("handshake: {error}"),
    };
    shared.with(|state| state.unregister(conn, &reason));
}

/// Until the socket ends; the reason is for the log.
async fn converse(
    shared: &Shared,
    conn: ConnId,
    socket: WebSocketStream<Box<dyn Stream>>,
    mut queue: mpsc::UnboundedReceiver<Out>,
    raw: &socket2::Socket,
) -> String {
    let (mut sink, mut source) = socket.split();
    let write = async {
        while let Some(out) = queue.recv().await {
            match out {
                Out::Text(text, due) => {
                    tokio::time::sleep_until(due.into()).await;
                    if let Err(error) = sink.send(Message::text(text)).await {
                        return format!("write: {error}");
                    }
                }
                Out::Close => {
                    let _ = sink.send(Message::Close(None)).await;
                    return "closed by the portal".to_owned();
                }
                Out::Reset => {
                    // Linger 0 turns the close into a reset.
                    let _ = raw.set_linger(Some(Duration::ZERO));
                    return "reset by the portal".to_owned();
                }
            }
        }
        "portal stopped".to_owned()
    };
    let read = async {
        loop {
            match tokio::time::timeout(IDLE_LIMIT, source.next()).await {
                Err(_) => return "silent for 37 s".to_owned(),
                Ok(None) => return "end of stream".to_owned(),
                Ok(Some(Err(error))) => return format!("read: {error}"),
                Ok(Some(Ok(Message::Text(text)))) => {
                    shared.with(|state| state.handle_text(conn, text.as_str(), Instant::now()));
                }
                Ok(Some(Ok(Message::Close(frame)))) => {
                    return format!("closed by the device: {}", frame.map_or(1005, |f| f.code.into()));
                }
                Ok(Some(Ok(_))) => {}
            }
        }
    };
    tokio::select! {
        reason = write => reason,
        reason = read => reason,
    }
}

fn tls_acceptor(tls: &Tls) -> Result<tokio_rustls::TlsAcceptor> {
    Ok(tokio_rustls::TlsAcceptor::from(Arc::new(tls.server_config()?)))
}
