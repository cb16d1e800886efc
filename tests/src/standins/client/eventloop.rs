//! The client's loop: one thread, `poll` over two UDP sockets, the TUN and a wake-up.
//!
//! ```text
//! stdin thread --+                          +-- UDP v4, UDP v6 (datagrams in and out)
//! portal thread -+--> Inputs (eventfd) --> loop
//!                                           +-- TUN (inner packets in and out)
//! ```

use std::io::{BufRead as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use serde::{Serialize, de::DeserializeOwned};

use super::config::{Command, Config};
use super::core::{Client, Flow};
use super::portal::{self, Report};
use super::tun::Tun;
use super::udp::Inbox;

/// Everything that can wake the loop besides sockets and time.
pub(super) enum Input {
    Portal(Report),
    Command(Command),
    BadCommand(String),
}

/// The way into a loop: queues an input and wakes. It never blocks; after the loop's end it does nothing.
pub(super) type Inputs = Box<dyn Fn(Input) + Send + Sync>;

/// A queue that wakes the loop.
pub(super) fn waking<T: Send + 'static>() -> Result<(Arc<OwnedFd>, mpsc::Receiver<T>, Waking<T>)> {
    let (sender, queue) = mpsc::channel();
    let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
    Ok((wake.clone(), queue, Waking { wake, sender }))
}

/// The sender's end of [`waking`].
pub(super) struct Waking<T> {
    wake: Arc<OwnedFd>,
    sender: mpsc::Sender<T>,
}

impl<T> Waking<T> {
    /// See [`Inputs`].
    pub(super) fn send(&self, input: T) {
        let _ = self.sender.send(input);
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

impl<T> Clone for Waking<T> {
    fn clone(&self) -> Self {
        Self { wake: self.wake.clone(), sender: self.sender.clone() }
    }
}

/// Runs until a `stop` command.
pub(super) fn run(config: Config) -> Result<()> {
    let (wake, queue, inputs) = waking()?;
    let mut tun = Tun::open(&config.tun)?;
    let mut inbox = Inbox::new();
    let from_portal = {
        let inputs = inputs.clone();
        Box::new(move |input| inputs.send(input))
    };
    let mut client = Client::new(config, from_portal, Box::new(|event| say(&event)), &portal::runtime()?)?;
    read_commands(move |command| {
        inputs.send(match command {
            Ok(command) => Input::Command(command),
            Err(message) => Input::BadCommand(message),
        });
    })?;
    loop {
        let deadline = client_deadline(&mut client);
        let ready = wait(&client, &tun, &wake, deadline)?;
        let now = Instant::now();
        if ready.woken {
            let _ = rustix::io::read(&wake, &mut [0; 8]);
        }
        while let Ok(input) = queue.try_recv() {
            if client.handle_input(input, &tun, now) == Flow::Stop {
                client.stop(now);
                return Ok(());
            }
        }
        if ready.udp {
            client.read_udp(now, &mut inbox, &mut tun)?;
        }
        if ready.tun {
            client.read_tun(now, &mut tun)?;
        }
        client.advance(Instant::now());
    }
}

/// What `poll` said.
struct Ready {
    woken: bool,
    udp: bool,
    tun: bool,
}

fn client_deadline(client: &mut Client) -> Instant {
    // An upper bound only; every real deadline is earlier or can wait that long.
    let latest = Instant::now() + Duration::from_secs(1);
    client.poll_timeout().map_or(latest, |at| at.min(latest))
}

fn wait(client: &Client, tun: &Tun, wake: &OwnedFd, deadline: Instant) -> Result<Ready> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).expect("at most a second");
    let mut fds =
        vec![PollFd::new(wake, PollFlags::IN), PollFd::from_borrowed_fd(tun.as_fd(), PollFlags::IN)];
    fds.extend(client.udp_fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let readable = |fd: &PollFd<'_>| !fd.revents().is_empty();
    Ok(Ready { woken: readable(&fds[0]), tun: readable(&fds[1]), udp: fds[2..].iter().any(readable) })
}

/// Lines of stdin become commands. The end of stdin means nothing: a client may have none.
pub(super) fn read_commands<C: DeserializeOwned>(
    take: impl Fn(Result<C, String>) + Send + 'static,
) -> Result<()> {
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            take(serde_json::from_str(&line).map_err(|error| format!("{line:?} is not a command: {error}")));
        }
    })?;
    Ok(())
}

/// One line on stdout; the runner may have gone, then nobody needs it.
pub(super) fn say(event: &impl Serialize) {
    if let Ok(line) = serde_json::to_string(event) {
        let _ = writeln!(std::io::stdout(), "{line}");
    }
}
