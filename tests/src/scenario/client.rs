//! The driver of one client process: commands to its standard input, events from its standard output, a JSON object a
//! line each way.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::ChildStdin,
    sync::mpsc::{self, Receiver},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use uuid::Uuid;

use super::Context;
use crate::{
    net::{
        NetNs,
        process::{Process, Spawn},
    },
    standins::client::{Command, Config, Event, Generation, Path, Stats},
};

/// The interface that a client makes in its namespace.
pub const INTERFACE: &str = "tun-client";

/// A client's UDP port if nobody says another.
const PORT: u16 = 52625;

/// A running client.
pub struct Client {
    process: Process,
    commands: ChildStdin,
    arriving: Receiver<Event>,
    /// Everything it said since [`Client::forget_events`], in order.
    events: Vec<Event>,
}

impl Client {
    /// Starts client `index` in its namespace; it connects to the portal at `url` and requests nothing by itself.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub fn start(cx: &Context, index: usize, url: &str, token: &str, generation: Generation) -> Result<Self> {
        Self::start_on_port(PORT, cx, index, url, token, generation)
    }

    /// The same on another UDP port: coturn keeps the allocation of a client that left for a while, and would refuse the
    /// same address and port to a client with other credentials.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub fn start_on_port(
        port: u16,
        cx: &Context,
        index: usize,
        url: &str,
        token: &str,
        generation: Generation,
    ) -> Result<Self> {
        let config = Config {
            generation,
            port,
            tun: INTERFACE.to_owned(),
            ..Config::new(url, token, &Self::name(index))
        };
        Self::start_with(&config, cx, &cx.topology.clients[index].namespace)
    }

    /// Starts a client with any configuration in any namespace; its name there must be unique.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub fn start_with(config: &Config, cx: &Context, namespace: &NetNs) -> Result<Self> {
        let name = config.name.clone();
        let file = cx.logs.file(&format!("{name}.json"));
        std::fs::write(&file, serde_json::to_string(config)?)?;
        let program = std::env::current_exe()?.display().to_string();
        let command = vec![program, "client".to_owned(), "--config".to_owned(), file.display().to_string()];
        let environment = vec![("RUST_LOG".to_owned(), "info".to_owned())];
        let what = Spawn { name: &name, command, environment, piped: true };
        let mut process = Process::spawn(namespace, &cx.logs, &what)?;
        let (commands, events) = process.pipes().context("pipes")?;
        let (sender, arriving) = mpsc::channel();
        std::thread::Builder::new().name(format!("{name} events")).spawn(move || {
            for line in BufReader::new(events).lines().map_while(Result::ok) {
                let event = serde_json::from_str(&line)
                    .unwrap_or_else(|error| Event::Error { message: format!("{line} is no event: {error}") });
                if sender.send(event).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { process, commands, arriving, events: Vec::new() })
    }

    /// The name under which client `index` connects.
    pub fn name(index: usize) -> String {
        format!("client{index}")
    }

    /// Asks the portal for a resource.
    ///
    /// # Errors
    /// If the client has ended.
    pub fn request(&mut self, resource: Uuid) -> Result<()> {
        self.command(&Command::Request { resource })
    }

    /// Any command.
    ///
    /// # Errors
    /// If the client has ended.
    pub fn command(&mut self, command: &Command) -> Result<()> {
        writeln!(self.commands, "{}", serde_json::to_string(command)?).context("the client has ended")
    }

    /// Waits until the client has logged in and its interface is up.
    ///
    /// # Errors
    /// If that takes longer than `limit`.
    pub fn wait_joined(&mut self, limit: Duration) -> Result<()> {
        self.wait_for("joined", limit, |event| matches!(event, Event::Joined { .. }))
    }

    /// Waits until the client has an allocation on a relay: without one it cannot offer candidates.
    ///
    /// # Errors
    /// If that takes longer than `limit`.
    pub fn wait_relay(&mut self, limit: Duration) -> Result<()> {
        self.wait_for("relay", limit, |event| matches!(event, Event::Relay { .. }))
    }

    /// Waits until the portal has granted a resource.
    ///
    /// # Errors
    /// If that takes longer than `limit`.
    pub fn wait_authorized(&mut self, wanted: Uuid, limit: Duration) -> Result<()> {
        self.wait_for(
            "authorized",
            limit,
            |event| matches!(event, Event::Authorized { resource, .. } if *resource == wanted),
        )
    }

    /// Waits until there is a WireGuard session with the gateway.
    ///
    /// # Errors
    /// If that takes longer than `limit`.
    pub fn wait_established(&mut self, limit: Duration) -> Result<()> {
        self.wait_for("established", limit, |event| matches!(event, Event::Established { .. }))
    }

    /// Waits until the gateway has closed the connection.
    ///
    /// # Errors
    /// If that takes longer than `limit`.
    pub fn wait_goodbye(&mut self, limit: Duration) -> Result<()> {
        self.wait_for("goodbye", limit, |event| matches!(event, Event::Goodbye { .. }))
    }

    /// The path in use.
    pub fn path(&mut self) -> Option<Path> {
        self.drain();
        self.events.iter().rev().find_map(|event| match event {
            Event::Path { kind, .. } => Some(*kind),
            _ => None,
        })
    }

    /// The client's counters, now.
    ///
    /// # Errors
    /// If it does not answer within a second.
    pub fn stats(&mut self) -> Result<Stats> {
        self.drain();
        self.events.retain(|event| !matches!(event, Event::Stats(_)));
        self.command(&Command::Stats)?;
        self.wait_for("stats", Duration::from_secs(1), |event| matches!(event, Event::Stats(_)))?;
        let stats = self.events.iter().rev().find_map(|event| match event {
            Event::Stats(stats) => Some(stats.clone()),
            _ => None,
        });
        stats.context("the counters that were just waited for")
    }

    /// What it has said since [`Client::forget_events`].
    pub fn events(&mut self) -> &[Event] {
        self.drain();
        &self.events
    }

    /// Forgets what was said so far, so that the next `wait` means something new.
    pub fn forget_events(&mut self) {
        self.drain();
        self.events.clear();
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits for an event, past or to come.
    ///
    /// # Errors
    /// If it does not come within `limit`, with what was said instead.
    pub fn wait_for(&mut self, what: &str, limit: Duration, matches: impl Fn(&Event) -> bool) -> Result<()> {
        let deadline = Instant::now() + limit;
        self.drain();
        if self.events.iter().any(&matches) {
            return Ok(());
        }
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let event = self.arriving.recv_timeout(left).map_err(|_| {
                anyhow!("the client did not say `{what}` within {limit:?}; it said {:?}", self.events)
            })?;
            let found = matches(&event);
            self.events.push(event);
            if found {
                return Ok(());
            }
        }
    }

    fn drain(&mut self) {
        self.events.extend(self.arriving.try_iter());
    }
}
