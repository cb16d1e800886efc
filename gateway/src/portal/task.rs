//! The portal task: connect, pump, wait, again (portal-protocol.md section 6).
//!
//! Whatever it does, it reads its command queue meanwhile: a sender is never blocked, a close acts at once.

use std::{future::poll_fn, ops::ControlFlow, task::ready, time::Duration};

use anyhow::anyhow;
use futures_util::{Sink, SinkExt as _, StreamExt as _};
use gateway_proto::portal::{
    Generation, Parsed,
    endpoint::Endpoints,
    failure::Failure,
    retry::{Retry, Verdict},
    session::{Session, SessionEvent},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::mpsc,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Error as WsError, Message,
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};
use tracing::Level;

use super::{Command, Event, connect::Dialer, redact::redact};
use crate::logging::REST;

/// How long a close may take.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

pub struct Task {
    dialer: Dialer,
    link: Link,
}

/// What outlives a socket: the policy and the channels.
pub struct Link {
    retry: Retry,
    endpoints: Endpoints,
    commands: mpsc::UnboundedReceiver<Command>,
    /// The most of them that ever waited. They are many only if this task does not get to run.
    commands_most: usize,
    events: mpsc::Sender<Event>,
}

/// Somebody asked us to end, or nobody listens any more.
pub struct Closed;

impl Task {
    pub fn new(
        dialer: Dialer,
        max_partition_time: Duration,
        generation: Option<Generation>,
        commands: mpsc::UnboundedReceiver<Command>,
        events: mpsc::Sender<Event>,
    ) -> Self {
        Self { dialer, link: Link::new(max_partition_time, generation, commands, events) }
    }

    pub async fn run(mut self) {
        while self.attempt().await.is_continue() {}
        let Link { commands, commands_most, .. } = &self.link;
        tracing::debug!(target: REST, commands_waiting = commands.len(), commands_most, "Portal at rest");
    }

    async fn attempt(&mut self) -> ControlFlow<()> {
        let generation = self.link.endpoints.current();
        tracing::debug!(url = self.dialer.login.display(generation), "Connecting to the portal");
        let opened = tokio::select! {
            opened = self.dialer.connect(generation) => opened,
            Closed = discard(&mut self.link.commands) => return ControlFlow::Break(()),
        };
        let failure = match opened {
            Ok(socket) => match self.link.pump(socket, generation).await {
                Ok(failure) => failure,
                Err(Closed) => return ControlFlow::Break(()),
            },
            Err(failure) => failure,
        };
        if self.link.endpoints.handle_failure(&failure) {
            let other = self.link.endpoints.current();
            tracing::info!(%failure, "The portal has no {generation} endpoint, trying {other}");
            return ControlFlow::Continue(());
        }
        let (delay, budget_left) = match self.link.retry.handle_failure(&failure) {
            Verdict::Retry { delay, budget_left } => (delay, budget_left),
            verdict => {
                let _ = self.link.emit(Event::Fatal(fatal(&failure, verdict))).await;
                return ControlFlow::Break(());
            }
        };
        tracing::info!(?delay, ?budget_left, "Hiccup in the connection to the portal: {failure}");
        let event = Event::Disconnected { reason: failure.to_string(), retry_in: delay };
        let Ok(()) = self.link.emit(event).await else { return ControlFlow::Break(()) };
        tokio::select! {
            () = sleep(delay) => ControlFlow::Continue(()),
            Closed = discard(&mut self.link.commands) => ControlFlow::Break(()),
        }
    }
}

impl Link {
    pub fn new(
        max_partition_time: Duration,
        generation: Option<Generation>,
        commands: mpsc::UnboundedReceiver<Command>,
        events: mpsc::Sender<Event>,
    ) -> Self {
        let retry = Retry::new(max_partition_time, rand::random());
        Self { retry, endpoints: Endpoints::new(generation), commands, commands_most: 0, events }
    }

    /// Moves frames and events until the connection ends.
    pub async fn pump<S>(
        &mut self,
        socket: WebSocketStream<S>,
        generation: Generation,
    ) -> Result<Failure, Closed>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (mut sink, mut stream) = socket.split();
        let mut session = Session::new(generation, now());
        let mut writing = false;
        loop {
            while let Some(event) = session.poll_event() {
                if let Some(failure) = self.on_session_event(event, generation).await? {
                    let _ = timeout(CLOSE_LIMIT, sink.close()).await;
                    return Ok(failure);
                }
            }
            writing |= session.has_transmit();
            let deadline = session.poll_timeout().map_or_else(Instant::now, Instant::from_std);
            tokio::select! {
                written = write(&mut sink, &mut session), if writing => match written {
                    Ok(()) => writing = false,
                    Err(error) => return Ok(Failure::Broken(error.to_string())),
                },
                message = stream.next() => match message {
                    Some(Ok(Message::Text(text))) => {
                        if tracing::enabled!(target: "wire::api::recv", Level::TRACE) {
                            tracing::trace!(target: "wire::api::recv", "{}", redact(&text));
                        }
                        session.handle_text(&text, now());
                    }
                    Some(Ok(Message::Binary(bytes))) => {
                        tracing::debug!(len = bytes.len(), "Ignored a binary frame from the portal");
                    }
                    Some(Ok(Message::Close(frame))) => {
                        // Reading on sends the library's echo.
                        let _ = timeout(CLOSE_LIMIT, async { while let Some(Ok(_)) = stream.next().await {} }).await;
                        return Ok(Failure::Closed(describe(frame)));
                    }
                    Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                    Some(Err(error)) => return Ok(Failure::Broken(error.to_string())),
                    None => return Ok(Failure::Closed(String::new())),
                },
                command = self.next_command() => match command {
                    Some(Command::Send(message)) => {
                        if !session.send(message) {
                            tracing::debug!("Dropped a message to the portal, too many are waiting");
                        }
                    }
                    Some(Command::Close) | None => {
                        let frame = CloseFrame { code: CloseCode::Normal, reason: "".into() };
                        let _ = timeout(CLOSE_LIMIT, async {
                            sink.send(Message::Close(Some(frame))).await?;
                            sink.close().await
                        })
                        .await;
                        return Err(Closed);
                    }
                },
                () = sleep_until(deadline) => session.handle_timeout(now()),
            }
        }
    }

    /// Cancel-safe.
    async fn next_command(&mut self) -> Option<Command> {
        let command = self.commands.recv().await;
        self.commands_most = self.commands_most.max(self.commands.len() + usize::from(command.is_some()));
        command
    }

    async fn on_session_event(
        &mut self,
        event: SessionEvent,
        generation: Generation,
    ) -> Result<Option<Failure>, Closed> {
        match event {
            SessionEvent::Joined => {
                self.retry.handle_joined();
                self.endpoints.handle_joined();
                tracing::info!(endpoint = %generation, "Connected to the portal");
                self.emit(Event::Connected { generation }).await?;
            }
            SessionEvent::Push { event, parsed: Parsed::Message { ingress, warnings } } => {
                for warning in warnings {
                    tracing::warn!("The portal's `{event}` is odd: {warning}");
                }
                self.emit(Event::Ingress(ingress)).await?;
            }
            SessionEvent::Push { event, parsed: Parsed::NotOurs } => {
                tracing::debug!(event, "Ignored a portal event this gateway does not speak");
            }
            SessionEvent::Push { event, parsed: Parsed::Malformed(what) } => {
                tracing::warn!("Ignored the portal's `{event}`: {what}");
            }
            SessionEvent::Ended(failure) => return Ok(Some(failure)),
        }
        Ok(None)
    }

    async fn emit(&self, event: Event) -> Result<(), Closed> {
        self.events.send(event).await.map_err(|_| Closed)
    }
}

/// Sends what the session has, as fast as the socket takes it, and flushes. Dropping it half-way loses nothing: a
/// message leaves the session only when the socket is ready for it, so what waits is still de-duplicated.
async fn write<W>(sink: &mut W, session: &mut Session) -> Result<(), WsError>
where
    W: Sink<Message, Error = WsError> + Unpin,
{
    poll_fn(|cx| {
        loop {
            ready!(sink.poll_ready_unpin(cx))?;
            let Some(text) = session.poll_transmit() else { break };
            if tracing::enabled!(target: "wire::api::send", Level::TRACE) {
                tracing::trace!(target: "wire::api::send", "{}", redact(&text));
            }
            sink.start_send_unpin(Message::text(text))?;
        }
        sink.poll_flush_unpin(cx)
    })
    .await
}

/// Section 6: "messages submitted while not connected are dropped". Returns when told to close.
async fn discard(commands: &mut mpsc::UnboundedReceiver<Command>) -> Closed {
    while let Some(Command::Send(_)) = commands.recv().await {
        tracing::debug!("Dropped a message, the portal is not connected");
    }
    Closed
}

fn fatal(failure: &Failure, verdict: Verdict) -> anyhow::Error {
    match (failure, verdict) {
        (_, Verdict::GiveUp { budget }) => {
            anyhow!("gave up connecting to the portal after {} s of waiting: {failure}", budget.as_secs())
        }
        (Failure::Refused(refusal), _) if refusal.status == 401 => {
            let token = refusal
                .problem
                .as_ref()
                .is_some_and(|p| matches!(&*p.code, "invalid_token" | "missing_token"));
            let what = if token { "the portal does not accept the token" } else { "authentication failed" };
            anyhow!("{what}: {refusal}; check FIREZONE_TOKEN and --api-url")
        }
        _ => anyhow!("{failure}"),
    }
}

fn describe(frame: Option<CloseFrame>) -> String {
    let Some(frame) = frame else { return String::new() };
    let reason: String = frame.reason.chars().filter(|c| !c.is_control()).take(100).collect();
    match reason.is_empty() {
        true => format!(" (code {})", u16::from(frame.code)),
        false => format!(" (code {}, {reason})", u16::from(frame.code)),
    }
}

/// The runtime's clock, so that tests can pause it.
fn now() -> std::time::Instant {
    Instant::now().into_std()
}
