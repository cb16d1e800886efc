//! A portal a script can steer (portal-protocol.md).
//!
//! ```text
//!   script --- Portal (handle) ---+                    +--- server: task per WebSocket --- gateway
//!              authorize, revoke, |---> State (lock) --+--- server: task per WebSocket --- client
//!              wait_for, secrets  |     decides all    +--- server: accept, tick
//! ```
//!
//! Reading order: `config` (what it knows), `admit` (who gets in), `state` (what it says), `server`
//! (how it is sent), `derive` (the values), `log` (what a script sees). Nothing here knows the gateway.

mod admit;
mod config;
mod derive;
mod log;
mod server;
mod state;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use uuid::Uuid;

pub use admit::Refusal;
pub use config::{Config, Device, Filter, FlowLogs, Generation, Relay, Resource, Scheme, Target, Tls};
#[cfg(test)]
pub(in crate::standins) use derive::jwt;
pub(in crate::standins) use derive::verified_claims;
pub use derive::{external_id, relay_id, uuid_from};
pub use log::{Direction, Entry, Mark, Role, Secret, Timing};

use server::Server;
use state::State;

/// A running portal. Dropping it stops it.
pub struct Portal {
    shared: Arc<Shared>,
    server: Option<Server>,
    addr: SocketAddr,
    netns: Option<PathBuf>,
}

impl Portal {
    /// Runs a portal on a thread of its own, which entered the namespace at `netns` first
    /// (`/run/netns/NAME` or `/proc/PID/ns/net`).
    ///
    /// # Errors
    /// When the namespace cannot be entered, the address cannot be bound, or the TLS files are unusable.
    pub fn start(netns: Option<&Path>, config: Config) -> Result<Self> {
        let (listen, tls) = (config.listen, config.tls.clone());
        let shared = Arc::new(Shared { state: Mutex::new(State::new(config)), changed: Condvar::new() });
        let netns = netns.map(Path::to_path_buf);
        let server = Server::start(shared.clone(), netns.clone(), listen, tls.as_ref())?;
        Ok(Self { shared, addr: server.addr, server: Some(server), netns })
    }

    // ---- where and who ------------------------------------------------------------------------

    /// Where it listens (or did, while stopped).
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The API URL for gateways and clients: `ws://ADDR/`, or `wss://`.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = self.shared.with(|s| if s.config.tls.is_some() { "wss" } else { "ws" });
        format!("{scheme}://{}/", self.addr)
    }

    /// What ingest tokens are signed with.
    #[must_use]
    pub fn ingest_key(&self) -> [u8; 32] {
        self.shared.with(|s| s.ingest_key)
    }

    /// The ids of all joined devices of this role.
    #[must_use]
    pub fn online(&self, role: Role) -> Vec<Uuid> {
        self.shared.with(|s| s.online(role))
    }

    /// The id of a planned or connected device, by its name or external id.
    #[must_use]
    pub fn id_of(&self, role: Role, name: &str) -> Option<Uuid> {
        self.shared.with(|s| s.id_of(role, name))
    }

    /// The public key, base64, of a connected device, by its name.
    #[must_use]
    pub fn public_key_of(&self, role: Role, name: &str) -> Option<String> {
        self.shared.with(|s| s.public_key_of(role, name))
    }

    /// Waits until this many devices of this role have joined.
    ///
    /// # Errors
    /// After `timeout`.
    pub fn wait_online(&self, role: Role, count: usize, timeout: Duration) -> Result<()> {
        let what = format!("{count} {}(s) online", role.topic());
        self.shared.wait(&what, timeout, |s| (s.online(role).len() >= count).then_some(()))
    }

    // ---- authorizations -----------------------------------------------------------------------

    /// Pushes an authorization now, without the client having asked.
    ///
    /// # Errors
    /// When the resource is unknown or denied, or one of the ends is not connected.
    pub fn authorize(&self, client: Uuid, resource: Uuid) -> Result<()> {
        let done = self.shared.with(|s| s.authorize(client, resource, &[], Instant::now()));
        done.map_err(|reason| anyhow::anyhow!("cannot authorize {resource} for {client}: {reason}"))
    }

    /// From now on this client's requests for this resource fail.
    pub fn deny(&self, client: Uuid, resource: Uuid) {
        self.shared.with(|s| s.denied.insert((client, resource)));
    }

    /// Undoes [`Self::deny`].
    pub fn allow(&self, client: Uuid, resource: Uuid) {
        self.shared.with(|s| s.denied.remove(&(client, resource)));
    }

    /// Withdraws an authorization and tells the gateway (section 8.3).
    ///
    /// # Errors
    /// When no gateway is connected to be told.
    pub fn reject_access(&self, client: Uuid, resource: Uuid) -> Result<()> {
        ensure!(
            self.shared.with(|s| s.reject_access(client, resource)),
            "no gateway is connected to be told"
        );
        Ok(())
    }

    /// Withdraws an authorization silently: the gateway learns of it from the next `init`.
    pub fn forget(&self, client: Uuid, resource: Uuid) {
        self.shared.with(|s| s.forget(client, resource));
    }

    /// How long authorizations last from now on; `None` means for ever.
    pub fn set_expiry(&self, expiry: Option<Duration>) {
        self.shared.with(|s| s.config.expiry = expiry);
    }

    /// Replaces (or adds) a resource and broadcasts `resource_updated` to gateways (section 8.4).
    pub fn resource_updated(&self, resource: &Resource) {
        self.shared.with(|s| {
            match s.config.resources.iter_mut().find(|r| r.id == resource.id) {
                Some(known) => *known = resource.clone(),
                None => s.config.resources.push(resource.clone()),
            }
            s.push_all(Role::Gateway, "resource_updated", &resource.for_gateway());
        });
    }

    // ---- relays -------------------------------------------------------------------------------

    /// Replaces the relays and pushes the difference as `relays_presence` (section 8.7).
    pub fn set_relays(&self, relays: Vec<Relay>) {
        self.shared.with(|s| s.set_relays(relays));
    }

    /// Pushes `relays_presence` with exactly these lists, leaving the portal's own list alone.
    pub fn push_relays_presence(&self, disconnected: &[Uuid], connected: &[Relay]) {
        self.shared.with(|s| s.push_presence(disconnected, connected));
    }

    /// While held, `init` carries no relays and `no_relays` is answered with none. Ending it pushes all.
    pub fn hold_relays(&self, hold: bool) {
        self.shared.with(|s| {
            s.config.hold_relays = hold;
            if !hold {
                let relays = s.config.relays.clone();
                s.push_presence(&[], &relays);
            }
        });
    }

    // ---- trouble ------------------------------------------------------------------------------

    /// Ends the WebSockets (of one role, or all) without a close frame: a TCP reset.
    pub fn drop_sockets(&self, role: Option<Role>) {
        self.shared.with(|s| s.end_all(role, true));
    }

    /// Ends the WebSockets with a close frame.
    pub fn close_sockets(&self, role: Option<Role>) {
        self.shared.with(|s| s.end_all(role, false));
    }

    /// Portal down: resets everything and stops listening; what it knows is kept.
    pub fn stop(&mut self) {
        self.shared.with(|s| s.end_all(None, true));
        self.server = None;
    }

    /// Listens again on the same address.
    ///
    /// # Errors
    /// When the address cannot be bound any more.
    pub fn restart(&mut self) -> Result<()> {
        if self.server.is_none() {
            let tls = self.shared.with(|s| s.config.tls.clone());
            self.server =
                Some(Server::start(self.shared.clone(), self.netns.clone(), self.addr, tls.as_ref())?);
        }
        Ok(())
    }

    /// The next `count` connects of this role get this answer.
    pub fn refuse_next(&self, role: Role, refusal: &Refusal, count: usize) {
        self.shared.with(|s| s.refusals.extend(std::iter::repeat_n((role, refusal.clone()), count)));
    }

    /// Pushes to this role wait this long from now on, in order; replies do not.
    pub fn set_delay(&self, role: Role, delay: Duration) {
        self.shared.with(|s| s.delays.insert(role, delay));
    }

    /// Stays connected but answers nothing, not even heartbeats.
    pub fn set_silent(&self, silent: bool) {
        self.shared.with(|s| s.silent = silent);
    }

    /// Pushes any event to all gateways or all clients: `disconnect`, obsolete or invented ones.
    pub fn push(&self, role: Role, event: &str, payload: &Value) {
        self.shared.with(|s| s.push_all(role, event, payload));
    }

    /// Sends any text to all gateways or all clients.
    pub fn push_text(&self, role: Role, text: &str) {
        self.shared.with(|s| s.push_text(role, text));
    }

    /// Sends `init` again to all gateways, as after a change of their account.
    pub fn push_init(&self) {
        self.shared.with(State::push_init_to_gateways);
    }

    /// Changes anything else of the configuration for what happens from now on.
    pub fn configure(&self, change: impl FnOnce(&mut Config)) {
        self.shared.with(|s| change(&mut s.config));
    }

    // ---- what happened ------------------------------------------------------------------------

    /// The log's end as of now.
    #[must_use]
    pub fn mark(&self) -> Mark {
        self.shared.with(|s| Mark(s.log.len()))
    }

    /// Waits for an entry anywhere in the log, past or to come.
    ///
    /// # Errors
    /// After `timeout`, naming the last few entries.
    pub fn wait_for(&self, timeout: Duration, matches: impl Fn(&Entry) -> bool) -> Result<Entry> {
        self.wait_since(Mark::default(), timeout, matches)
    }

    /// Waits for an entry after `mark`.
    ///
    /// # Errors
    /// After `timeout`, naming the last few entries.
    pub fn wait_since(
        &self,
        mark: Mark,
        timeout: Duration,
        matches: impl Fn(&Entry) -> bool,
    ) -> Result<Entry> {
        self.shared.wait("the expected message", timeout, |s| {
            s.log.iter().skip(mark.0).find(|e| matches(e)).cloned()
        })
    }

    /// The log since `mark`.
    #[must_use]
    pub fn log_since(&self, mark: Mark) -> Vec<Entry> {
        self.shared.with(|s| s.log.get(mark.0..).unwrap_or_default().to_vec())
    }

    /// The whole log as JSON lines, like spec/samples. It contains secrets of this run.
    #[must_use]
    pub fn log_jsonl(&self) -> String {
        let line = |e: &Entry| serde_json::to_string(e).unwrap_or_default() + "\n";
        self.shared.with(|s| s.log.iter().map(line).collect())
    }

    /// When each authorization was pushed and acknowledged, in order.
    #[must_use]
    pub fn timings(&self) -> Vec<Timing> {
        self.shared.with(|s| s.timings.clone())
    }

    /// Everything secret that was configured or issued so far.
    #[must_use]
    pub fn secrets(&self) -> Vec<Secret> {
        self.shared.with(|s| s.secrets.iter().cloned().collect())
    }
}

impl Drop for Portal {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The state and the way to wait for its next change.
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock().expect("nothing panics while it holds the state");
        let before = state.log.len();
        let done = act(&mut state);
        if state.log.len() != before {
            self.changed.notify_all();
        }
        done
    }

    fn wait<T>(&self, what: &str, timeout: Duration, mut look: impl FnMut(&State) -> Option<T>) -> Result<T> {
        let deadline = Instant::now() + timeout;
        let mut state = self.state.lock().expect("nothing panics while it holds the state");
        loop {
            if let Some(found) = look(&state) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let last: Vec<_> = state.log.iter().rev().take(6).rev().map(summary).collect();
                bail!(
                    "{what} did not come within {timeout:?}; the portal's log ends with: {}",
                    last.join(" | ")
                );
            }
            state =
                self.changed.wait_timeout(state, left).expect("nothing panics while it holds the state").0;
        }
    }
}

fn summary(entry: &Entry) -> String {
    format!("{:.3} {:?} {:?} {}", entry.t.as_secs_f64(), entry.peer, entry.dir, entry.event())
}

/// `gateway-tests portal`: the same portal without a script.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Address and port to listen on.
    #[arg(long, default_value = "127.0.0.1:8081")]
    listen: SocketAddr,
    /// JSON file with any of the fields of `Config`; the other options add to it.
    #[arg(long)]
    config: Option<PathBuf>,
    /// A network clients may ask for; may be repeated.
    #[arg(long, value_name = "CIDR")]
    resource: Vec<String>,
    /// Address of a coturn with `use-auth-secret`; may be repeated, one relay each.
    #[arg(long, value_name = "ADDR:PORT", requires = "relay_secret")]
    relay: Vec<SocketAddr>,
    /// coturn's `static-auth-secret`.
    #[arg(long, value_name = "SECRET")]
    relay_secret: Option<String>,
    /// Serve only the Nov-2025 endpoints.
    #[arg(long)]
    v1_only: bool,
}

/// Runs until it is interrupted; prints tokens first, then every message as a JSON line.
///
/// # Errors
/// When the configuration is unreadable or the address cannot be bound.
pub fn main(args: Args) -> Result<()> {
    let mut config = match &args.config {
        Some(path) => {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            serde_json::from_str(&text)
                .with_context(|| format!("{} is not a portal configuration", path.display()))?
        }
        None => Config::default(),
    };
    config.listen = args.listen;
    config.resources.extend(args.resource.iter().map(|network| Resource::cidr(network, network)));
    let secret = args.relay_secret.unwrap_or_default();
    config.relays.extend(args.relay.into_iter().map(|addr| Relay::coturn([addr], &secret)));
    if args.v1_only {
        config.generation = Generation::V1Only;
    }
    let (gateway_token, client_token) = (config.gateway_token.clone(), config.client_token.clone());
    let portal = Portal::start(None, config)?;
    portal.shared.with(|s| s.echo = true);
    eprintln!("portal listens on {}", portal.url());
    eprintln!("gateway: FIREZONE_API_URL={} FIREZONE_TOKEN={gateway_token} firezone-gateway", portal.url());
    eprintln!("client token: {client_token}");
    loop {
        std::thread::park();
    }
}
