//! The portal's WebSocket: one task that keeps it up and turns its frames into events.
//!
//! The protocol itself is sans-IO, in [`gateway_proto::portal`]; here are only its shell: [`task`] waits, connects and
//! pumps, [`connect`] resolves, dials and encrypts, [`upgrade`] speaks HTTP, [`tls`] knows the roots, [`user_agent`]
//! says who we are, [`redact`] keeps secrets out of the wire log. It must not know what a message means.

pub mod connect;
mod redact;
mod task;
mod tls;
mod upgrade;
mod user_agent;

#[cfg(test)]
mod tests;

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use gateway_proto::portal::{
    Generation,
    login_url::LoginUrl,
    messages::{Egress, Ingress, Secret},
};
use rustls_pki_types::ServerName;
use tokio::sync::mpsc;
use zeroize::Zeroizing;

pub use tls::{CaFile, client_config};
pub use user_agent::user_agent;

/// The version we report. Portals offer a gateway only to clients whose minor version is at most one above and at most
/// one below its own (portal-protocol.md section 10), counted in upstream's versions: 1.6 serves the 1.5, 1.6 and 1.7
/// clients of today. Our own version number would hide us from all of them.
pub const COMPAT_VERSION: &str = "1.6.1";

/// What the portal client needs to know.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to connect and who we are: URL, gateway ID, name, WireGuard public key.
    pub login: LoginUrl,
    /// The gateway's token.
    pub token: Secret,
    /// PEM files with roots beside the bundled ones.
    pub ca_files: Vec<CaFile>,
    /// `--max-partition-time`.
    pub max_partition_time: Duration,
    /// Pins an endpoint; `None` is v2 with fallback to v1.
    pub generation: Option<Generation>,
    /// The version in the user agent, normally [`COMPAT_VERSION`].
    pub version: String,
    /// Mark the socket with [`MARK`](crate::data::MARK); false only for tests without `CAP_NET_ADMIN`.
    pub mark: bool,
}

/// What the portal task tells. After `Fatal` and after a close the channel ends.
#[derive(Debug)]
pub enum Event {
    /// Joined. The portal sends `init` next.
    Connected {
        /// The endpoint that works.
        generation: Generation,
    },
    /// A message.
    Ingress(Ingress),
    /// Not connected (any more); also after each failed attempt. Messages sent meanwhile are dropped.
    Disconnected {
        /// The cause.
        reason: String,
        /// When the next attempt is made.
        retry_in: Duration,
    },
    /// The process has to end with this error.
    Fatal(anyhow::Error),
}

/// Talks to the portal task.
#[derive(Debug, Clone)]
pub struct Handle {
    commands: mpsc::UnboundedSender<Command>,
}

#[derive(Debug)]
enum Command {
    Send(Egress),
    Close,
}

impl Handle {
    /// Queues a message; dropped while the portal is not connected.
    pub fn send(&self, message: Egress) {
        // A task that has ended told so by ending the event channel.
        let _ = self.commands.send(Command::Send(message));
    }

    /// Asks for a graceful close (code 1000). It is done when the event channel ends, at most about a second later.
    pub fn close(&self) {
        let _ = self.commands.send(Command::Close);
    }
}

/// A checked configuration, ready to connect.
pub struct Client {
    dialer: connect::Dialer,
    max_partition_time: Duration,
    generation: Option<Generation>,
}

impl Client {
    /// Checks everything that can be wrong without a network.
    ///
    /// # Errors
    /// A start-up mistake in one sentence: a CA file without certificates, a token that cannot be sent.
    pub fn new(config: Config) -> Result<Self> {
        // "all whitespace inside the token removed" (portal-protocol.md section 3).
        let token = Zeroizing::new(config.token.0.chars().filter(|c| !c.is_whitespace()).collect::<String>());
        ensure!(!token.is_empty(), "the token is empty; pass it as FIREZONE_TOKEN or as systemd credential");
        ensure!(
            token.bytes().all(|b| b.is_ascii_graphic()),
            "the token (FIREZONE_TOKEN) contains characters no token has; copy it again from the portal"
        );
        // Read for `ws` too: a file that is bad shall not lie in wait for the day the URL becomes `wss`.
        let tls_config = tls::client_config(&config.ca_files)?;
        let tls = match config.login.is_tls() {
            true => Some(connect::Tls {
                config: tls_config,
                server_name: ServerName::try_from(config.login.host()).with_context(|| {
                    format!("--api-url (FIREZONE_API_URL): no certificate can name {}", config.login.host())
                })?,
            }),
            false => None,
        };
        let dialer = connect::Dialer {
            user_agent: user_agent(&config.version),
            login: config.login,
            token,
            tls,
            mark: config.mark.then_some(crate::data::MARK),
        };
        Ok(Self { dialer, max_partition_time: config.max_partition_time, generation: config.generation })
    }

    /// Starts the portal task on the current tokio runtime. Dropping all handles or the receiver ends it.
    #[must_use]
    pub fn start(self) -> (Handle, mpsc::Receiver<Event>) {
        if self.dialer.tls.is_none() {
            tracing::info!(
                "The portal's URL is not encrypted: whoever is on the way can read token and keys"
            );
        }
        let (commands, command_queue) = mpsc::unbounded_channel();
        let (events, event_queue) = mpsc::channel(256);
        let task =
            task::Task::new(self.dialer, self.max_partition_time, self.generation, command_queue, events);
        tokio::spawn(task.run());
        (Handle { commands }, event_queue)
    }
}
