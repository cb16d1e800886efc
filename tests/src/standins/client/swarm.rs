//! Many clients in one process, for scenarios that need hundreds or thousands of them.
//!
//! ```text
//! stdin thread ---------------+
//! portal thread (all sockets) +--> one queue --> loop -- epoll over everybody's UDP sockets
//!                                                  +-- per member: `core`, a counter instead of a TUN
//! ```
//!
//! `load` makes a swarm a source and a sink of many packets a second.
//!
//! A member is the whole client of `core`; only what would come out of a TUN device is counted and thrown away. What a
//! user's traffic would do is done here: who wants a resource asks again when the connection is gone or refused.

mod load;

use std::cell::RefCell;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use ipnet::IpNet;
use rustix::buffer::spare_capacity;
use rustix::event::{Timespec, epoll};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use self::load::Load;
use super::config::{Command, Config, Event, Token};
use super::core::Client;
use super::eventloop::{Input, read_commands, say, waking};
use super::inner::echo_request;
use super::portal;
use super::tun::{HEADROOM, Inside};
use super::udp::Inbox;

/// Deadlines of all members are looked at this often: none of them needs more.
const TICK: Duration = Duration::from_millis(10);
/// After a refusal a member asks again after this long, as the next packet of a user would.
const REFUSED_PAUSE: Duration = Duration::from_secs(2);
/// A request or a connection from which nothing came for this long is asked for again.
const SILENCE: Duration = Duration::from_secs(15);
/// An echo request that is not answered is sent again after this long.
const ECHO_PAUSE: Duration = Duration::from_millis(500);
/// Members do not act in step: a swarm acts within this many milliseconds for each member, and at least
/// [`MIN_JITTER_MS`].
const JITTER_MS: u64 = 1;
const MIN_JITTER_MS: u64 = 200;
/// epoll's name for the queue.
const WAKE: u64 = u64::MAX;

/// `gateway-tests swarm`.
#[derive(Debug, clap::Args)]
pub struct SwarmArgs {
    /// JSON file with a `SwarmConfig`.
    #[arg(long)]
    config: PathBuf,
}

/// The configuration file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwarmConfig {
    /// `ws://ADDR:PORT/`.
    pub portal: String,
    /// Client token.
    pub token: Token,
    /// Member `i` is called `<name><i>`.
    pub name: String,
    /// How many.
    pub clients: usize,
    /// Member `i` has UDP port `first_port + i`.
    pub first_port: u16,
    /// How many log in per second.
    pub per_second: u32,
}

/// A line on stdin.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "cmd", rename_all = "snake_case")]
pub enum SwarmCommand {
    /// From now on everybody wants this resource, and asks for it whenever there is no connection.
    Want {
        /// Its id.
        resource: Uuid,
    },
    /// Everybody sends ICMP echo requests, one at a time, until one is answered.
    Echo {
        /// To this address.
        to: Ipv4Addr,
    },
    /// Everybody encrypts UDP datagrams, to be sent later: encryption must not cost while something is measured.
    Seal {
        /// Where they are to go, from the same port.
        to: SocketAddrV4,
        /// Of payload.
        bytes: usize,
        /// How many.
        each: usize,
    },
    /// Sends them, evenly over time and members, as many by one system call as `burst` says.
    Send {
        /// Of all members together.
        per_second: u64,
        /// Datagrams.
        burst: usize,
        /// For how long, milliseconds.
        ms: u64,
    },
    /// From now on datagrams of so many bytes of UDP payload that come through the tunnel are counted without being
    /// decrypted, all but a sample.
    Count {
        /// Of payload.
        bytes: usize,
    },
    /// Print a [`SwarmReport`].
    Report,
}

/// A line on stdout: counts of members, and of events since the start.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SwarmReport {
    /// Members that have an address from the portal.
    pub joined: usize,
    /// Members with an allocation on a relay.
    pub relays: usize,
    /// Members with a WireGuard session.
    pub established: usize,
    /// Members whose chosen path goes through a relay.
    pub relayed: usize,
    /// How often the gateway said goodbye.
    pub goodbyes: u64,
    /// How often a connection ended, for whatever reason.
    pub closed: u64,
    /// How often the portal refused a request.
    pub refused: u64,
    /// Echo requests sent.
    pub echoes_sent: u64,
    /// Echo replies that came back.
    pub echoes: u64,
    /// Members that had an answer since the last [`SwarmCommand::Echo`].
    pub reached: usize,
    /// Milliseconds from a connection's creation to its session: the slowest so far.
    pub slowest_ms: u64,
    /// Datagrams that wait to be sent.
    pub sealed: u64,
    /// Of these, how many have been sent.
    pub sent: u64,
    /// Is a [`SwarmCommand::Seal`] or [`SwarmCommand::Send`] under way?
    pub working: bool,
    /// Datagrams that came and were not decrypted.
    pub skimmed: u64,
    /// UDP datagrams that came and were decrypted.
    pub opened: u64,
    /// Why connections ended other than by goodbye, and what else went wrong: the last few.
    pub errors: Vec<String>,
}

/// Runs until it is killed.
///
/// # Errors
/// When the configuration is unusable, or there are not enough file descriptors.
pub fn swarm_main(args: &SwarmArgs) -> Result<()> {
    let text = std::fs::read_to_string(&args.config)
        .with_context(|| format!("cannot read {}", args.config.display()))?;
    Swarm::new(serde_json::from_str(&text)?)?.run()
}

/// Everything that can wake the loop besides sockets and time.
enum Wake {
    Member(usize, Input),
    Command(SwarmCommand),
    BadCommand(String),
}

struct Swarm {
    config: SwarmConfig,
    members: Vec<Member>,
    /// What members said in this turn.
    said: Rc<RefCell<Vec<(usize, Event)>>>,
    wanted: Option<Uuid>,
    load: Load,
    report: SwarmReport,
}

struct Member {
    client: Client,
    counter: Counter,
    address: Option<Ipv4Addr>,
    established: bool,
    relayed: bool,
    /// When it asks for what it wants, unless something happens before.
    ask_at: Option<Instant>,
    /// Where echo requests go until one is answered, how many answers there were before, and when to send the next.
    echo: Option<(Ipv4Addr, u64, Instant)>,
    deadline: Instant,
    /// See [`Load`].
    sealed: load::Sealed,
}

/// Instead of a TUN.
#[derive(Default)]
struct Counter {
    echoes: u64,
    /// In IPv4 packets.
    datagrams: u64,
}

impl Inside for Counter {
    fn configure(&self, _: Ipv4Addr, _: std::net::Ipv6Addr, _: &[IpNet]) -> Result<()> {
        Ok(())
    }

    fn write(&mut self, batch: &mut [Vec<u8>]) -> io::Result<()> {
        // IPv4 without options, ICMP, echo reply: what answers `echo_request`.
        let is_reply = |packet: &[u8]| {
            packet.first() == Some(&0x45) && packet.get(9) == Some(&1) && packet.get(20) == Some(&0)
        };
        let replies = batch.iter().filter(|packet| packet.get(HEADROOM..).is_some_and(is_reply)).count();
        self.echoes += replies as u64;
        let is_udp = |packet: &[u8]| packet.first() == Some(&0x45) && packet.get(9) == Some(&17);
        let datagrams = batch.iter().filter(|packet| packet.get(HEADROOM..).is_some_and(is_udp)).count();
        self.datagrams += datagrams as u64;
        Ok(())
    }
}

impl Swarm {
    fn new(config: SwarmConfig) -> Result<Self> {
        // Two UDP sockets and a WebSocket each.
        crate::net::process::raise_file_limit(3 * config.clients as u64 + 100)?;
        let members = Vec::with_capacity(config.clients);
        Ok(Self {
            config,
            members,
            said: Rc::default(),
            wanted: None,
            load: Load::default(),
            report: SwarmReport::default(),
        })
    }

    fn run(mut self) -> Result<()> {
        let (wake, queue, inputs) = waking()?;
        let runtime = portal::runtime()?;
        let poller = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&poller, &wake, epoll::EventData::new_u64(WAKE), epoll::EventFlags::IN)?;
        let commands = inputs.clone();
        read_commands(move |command| commands.send(command.map_or_else(Wake::BadCommand, Wake::Command)))?;
        let mut inbox = Inbox::new();
        let mut ready = Vec::with_capacity(1024);
        let started = Instant::now();
        let mut next_tick = started;
        loop {
            let next = self.load.poll_timeout().map_or(next_tick, |at| at.min(next_tick));
            let left = next.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).expect("at most a tick");
            ready.clear();
            match epoll::wait(&poller, spare_capacity(&mut ready), Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            let now = Instant::now();
            for event in &ready {
                let index = event.data.u64();
                if index == WAKE {
                    let _ = rustix::io::read(&wake, &mut [0; 8]);
                } else if let Some(member) = self.members.get_mut(usize::try_from(index)?)
                    && self.load.skim(member)?
                {
                    member.client.read_udp(now, &mut inbox, &mut member.counter)?;
                    member.advance(now);
                }
            }
            while let Ok(input) = queue.try_recv() {
                self.take(input, now);
            }
            if now >= next_tick {
                next_tick = now + TICK;
                let due = (now - started).as_millis() * u128::from(self.config.per_second) / 1000;
                while self.members.len() < self.config.clients && (self.members.len() as u128) < due {
                    let index = self.members.len();
                    let inputs = inputs.clone();
                    let input = Box::new(move |input| inputs.send(Wake::Member(index, input)));
                    let member = self.member(index, input, &runtime, now)?;
                    for socket in member.client.udp_fds() {
                        let data = epoll::EventData::new_u64(index as u64);
                        epoll::add(&poller, socket, data, epoll::EventFlags::IN)?;
                    }
                    self.members.push(member);
                }
                self.tick(now);
            }
            if let Err(error) = self.load.advance(&mut self.members, now) {
                self.complain(format!("load: {error:#}"));
            }
            self.listen(now);
        }
    }

    fn member(
        &self,
        index: usize,
        input: super::eventloop::Inputs,
        runtime: &tokio::runtime::Handle,
        now: Instant,
    ) -> Result<Member> {
        let config = Config {
            port: self.config.first_port + u16::try_from(index)?,
            ..Config::new(&self.config.portal, &self.config.token.0, &format!("{}{index}", self.config.name))
        };
        let said = self.said.clone();
        let emit = Box::new(move |event| said.borrow_mut().push((index, event)));
        Ok(Member {
            client: Client::new(config, input, emit, runtime)?,
            counter: Counter::default(),
            address: None,
            established: false,
            relayed: false,
            ask_at: self.wanted.map(|_| now),
            echo: None,
            deadline: now,
            sealed: load::Sealed::default(),
        })
    }

    fn take(&mut self, input: Wake, now: Instant) {
        match input {
            Wake::Member(index, input) => {
                if let Some(member) = self.members.get_mut(index) {
                    member.client.handle_input(input, &member.counter, now);
                    member.advance(now);
                }
            }
            Wake::Command(SwarmCommand::Want { resource }) => {
                self.wanted = Some(resource);
                for index in 0..self.members.len() {
                    self.members[index].ask_at = Some(self.soon(now));
                }
                self.tick(now);
            }
            Wake::Command(SwarmCommand::Echo { to }) => {
                for member in &mut self.members {
                    member.echo = Some((to, member.counter.echoes, now));
                }
                self.tick(now);
            }
            Wake::Command(SwarmCommand::Seal { to, bytes, each }) => self.load.seal(to, bytes, each),
            Wake::Command(SwarmCommand::Send { per_second, burst, ms }) => {
                self.load.send(per_second, burst, Duration::from_millis(ms), now);
            }
            Wake::Command(SwarmCommand::Count { bytes }) => {
                if let Err(error) = self.load.count(&self.members, bytes) {
                    self.complain(format!("load: {error:#}"));
                }
            }
            Wake::Command(SwarmCommand::Report) => {
                let count = |is: fn(&Member) -> bool| self.members.iter().filter(|member| is(member)).count();
                let report = SwarmReport {
                    joined: count(|member| member.address.is_some()),
                    relays: count(|member| member.client.has_relay()),
                    established: count(|member| member.established),
                    relayed: count(|member| member.established && member.relayed),
                    reached: count(|member| member.is_reached()),
                    sealed: self.members.iter().map(|member| member.sealed.left()).sum(),
                    sent: self.load.sent(),
                    working: self.load.is_working(),
                    skimmed: self.load.skimmed(),
                    opened: self.members.iter().map(|member| member.counter.datagrams).sum(),
                    echoes: self.members.iter().map(|member| member.counter.echoes).sum(),
                    ..self.report.clone()
                };
                say(&report);
            }
            Wake::BadCommand(message) => self.complain(message),
        }
    }

    /// Lets those act whose time has come.
    fn tick(&mut self, now: Instant) {
        for member in &mut self.members {
            if let Some(resource) = self.wanted
                && member.ask_at.is_some_and(|at| now >= at)
            {
                member.ask_at = Some(now + SILENCE);
                let command = Input::Command(Command::Request { resource });
                member.client.handle_input(command, &member.counter, now);
                member.deadline = now;
            }
            if member.send_echo(now) {
                self.report.echoes_sent += 1;
            }
            if now >= member.deadline {
                member.advance(now);
            }
        }
    }

    /// Follows what members said.
    fn listen(&mut self, now: Instant) {
        let said = std::mem::take(&mut *self.said.borrow_mut());
        for (index, event) in said {
            let soon = self.soon(now);
            let Some(member) = self.members.get_mut(index) else { continue };
            match event {
                Event::Joined { ipv4: std::net::IpAddr::V4(address), .. } => member.address = Some(address),
                Event::Established { ms, .. } => {
                    member.established = true;
                    member.ask_at = None;
                    self.report.slowest_ms = self.report.slowest_ms.max(ms);
                }
                Event::Path { kind, .. } => member.relayed = kind.is_relayed(),
                Event::Goodbye { .. } => self.report.goodbyes += 1,
                Event::Closed { reason, .. } => {
                    member.established = false;
                    member.ask_at = self.wanted.map(|_| soon);
                    self.report.closed += 1;
                    if reason != "goodbye" {
                        self.complain(format!("{index}: {reason}"));
                    }
                }
                Event::Refused { .. } => {
                    member.ask_at = Some(soon + REFUSED_PAUSE);
                    self.report.refused += 1;
                }
                Event::Error { message } => self.complain(format!("{index}: {message}")),
                Event::PortalLost { reason } => self.complain(format!("{index}: portal: {reason}")),
                _ => {}
            }
        }
    }

    /// When a member acts that has a reason to act now.
    fn soon(&self, now: Instant) -> Instant {
        let within = (self.config.clients as u64 * JITTER_MS).max(MIN_JITTER_MS);
        now + Duration::from_millis(rand::random_range(0..within))
    }

    fn complain(&mut self, message: String) {
        let errors = &mut self.report.errors;
        if errors.len() == 8 {
            errors.remove(0);
        }
        errors.push(message);
    }
}

impl Member {
    fn is_reached(&self) -> bool {
        self.echo.is_some_and(|(_, before, _)| self.counter.echoes > before)
    }

    /// Sends an echo request if one is due; true if so.
    fn send_echo(&mut self, now: Instant) -> bool {
        let (Some(source), true, false) = (self.address, self.established, self.is_reached()) else {
            return false;
        };
        let Some((to, _, due)) = &mut self.echo else { return false };
        if now < *due {
            return false;
        }
        *due = now + ECHO_PAUSE;
        let hex = hex::encode(echo_request(source, *to));
        self.client.handle_input(Input::Command(Command::SendInner { hex }), &self.counter, now);
        true
    }

    fn advance(&mut self, now: Instant) {
        self.client.advance(now);
        self.deadline = self.client.poll_timeout().unwrap_or(now + SILENCE);
    }
}
