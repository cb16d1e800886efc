//! The driver of one process that holds many clients.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{ChildStdin, ChildStdout},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use super::{Context, Skip};
use crate::{
    net::{
        NetNs,
        process::{Process, Spawn},
    },
    standins::client::{SwarmCommand, SwarmConfig, SwarmReport, Token},
};

/// How often a report is asked for while waiting.
const PACE: Duration = Duration::from_millis(100);

/// Many clients; they leave when this value does, without a goodbye.
pub struct Swarm {
    process: Process,
    commands: ChildStdin,
    reports: BufReader<ChildStdout>,
    count: usize,
}

impl Swarm {
    /// Starts `count` clients called `name` and a number in `namespace`, with UDP ports from `first_port`; `per_second`
    /// of them log in at the portal.
    ///
    /// # Errors
    /// If the process cannot be started; a [`Skip`] if that many files cannot be open at a time.
    pub fn start(
        cx: &Context,
        namespace: &NetNs,
        login: (&str, &str),
        name: &str,
        count: usize,
        first_port: u16,
        per_second: u32,
    ) -> Result<Self> {
        // The portal is ours: a socket for each.
        crate::net::process::raise_file_limit(3 * count as u64 + 500)
            .map_err(|error| Skip(format!("{error:#}")))?;
        let (portal, token) = login;
        let config = SwarmConfig {
            portal: portal.to_owned(),
            token: Token(token.to_owned()),
            name: name.to_owned(),
            clients: count,
            first_port,
            per_second,
        };
        let file = cx.logs.file(&format!("{name}.json"));
        std::fs::write(&file, serde_json::to_string(&config)?)?;
        let program = std::env::current_exe()?.display().to_string();
        let command = vec![program, "swarm".to_owned(), "--config".to_owned(), file.display().to_string()];
        let what = Spawn { name, command, piped: true, ..Spawn::default() };
        let mut process = Process::spawn(namespace, &cx.logs, &what)?;
        let (commands, reports) = process.pipes().context("pipes")?;
        Ok(Self { process, commands, reports: BufReader::new(reports), count })
    }

    /// Gives an order to everybody.
    ///
    /// # Errors
    /// If the process has ended.
    pub fn command(&mut self, command: &SwarmCommand) -> Result<()> {
        writeln!(self.commands, "{}", serde_json::to_string(command)?).context("the swarm has ended")
    }

    /// Where everybody stands.
    ///
    /// # Errors
    /// If the process has ended.
    pub fn report(&mut self) -> Result<SwarmReport> {
        self.command(&SwarmCommand::Report)?;
        let mut line = String::new();
        self.reports.read_line(&mut line)?;
        serde_json::from_str(&line)
            .with_context(|| format!("the swarm said {line:?}: {}", self.process.log()))
    }

    /// Waits for a report that answers `question` with true.
    ///
    /// # Errors
    /// If none does within `limit`, with the last one.
    pub fn wait(
        &mut self,
        what: &str,
        limit: Duration,
        question: impl Fn(&SwarmReport) -> bool,
    ) -> Result<SwarmReport> {
        let deadline = Instant::now() + limit;
        loop {
            let report = self.report()?;
            if question(&report) {
                return Ok(report);
            }
            if Instant::now() >= deadline {
                bail!("waited {limit:?} for {what} of {} clients; they are at {report:?}", self.count);
            }
            std::thread::sleep(PACE);
        }
    }

    /// Waits until all have logged in and have a relay.
    ///
    /// # Errors
    /// If that takes longer than `limit`.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        let count = self.count;
        self.wait("log-ins and relays", limit, |report| report.joined == count && report.relays == count)
            .map(drop)
    }

    /// Waits until all have a session.
    ///
    /// # Errors
    /// If that takes longer than `limit`.
    pub fn wait_established(&mut self, limit: Duration) -> Result<SwarmReport> {
        let count = self.count;
        self.wait("sessions", limit, |report| report.established == count)
    }

    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }
}
