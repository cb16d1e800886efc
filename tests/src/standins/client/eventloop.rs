//! The client's loop: one thread, `poll` over two UDP sockets, the TUN and a wake-up.
//!
//! ```text
//! stdin thread --+                          +-- UDP v4, UDP v6 (datagrams in and out)
//! portal thread -+--> Inputs (eventfd) --> loop
//!                                           +-- TUN (inner packets in and out)
//! ```

use std::io::BufRead as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use anyhow::Result;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::config::{Command, Config};
use super::core::{Client, Flow};
use super::portal::Report;
use super::tun::Tun;
use super::udp::Inbox;

/// Everything that can wake the loop besides sockets and time.
pub(super) enum Input {
    Portal(Report),
    Command(Command),
    BadCommand(String),
}

/// A queue into the loop that also wakes it.
pub(super) struct Inputs {
    wake: OwnedFd,
    sender: Mutex<mpsc::Sender<Input>>,
}

impl Inputs {
    /// Never blocks; after the loop's end it does nothing.
    pub(super) fn send(&self, input: Input) {
        let sender = self.sender.lock().expect("nothing panics while it holds the sender");
        let _ = sender.send(input);
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }
}

/// Runs until a `stop` command.
pub(super) fn run(config: Config) -> Result<()> {
    let (sender, queue) = mpsc::channel();
    let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
    let inputs = Arc::new(Inputs { wake, sender: Mutex::new(sender) });
    let mut tun = Tun::open(&config.tun)?;
    let mut inbox = Inbox::new();
    let mut client = Client::new(config, inputs.clone())?;
    read_commands(inputs.clone())?;
    loop {
        let deadline = client_deadline(&mut client);
        let ready = wait(&client, &tun, &inputs, deadline)?;
        let now = Instant::now();
        if ready.woken {
            let _ = rustix::io::read(&inputs.wake, &mut [0; 8]);
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

fn wait(client: &Client, tun: &Tun, inputs: &Inputs, deadline: Instant) -> Result<Ready> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = Timespec::try_from(left).expect("at most a second");
    let mut fds =
        vec![PollFd::new(&inputs.wake, PollFlags::IN), PollFd::from_borrowed_fd(tun.as_fd(), PollFlags::IN)];
    fds.extend(client.udp_fds().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let readable = |fd: &PollFd<'_>| !fd.revents().is_empty();
    Ok(Ready { woken: readable(&fds[0]), tun: readable(&fds[1]), udp: fds[2..].iter().any(readable) })
}

/// Lines of stdin become commands. The end of stdin means nothing: a client may have none.
fn read_commands(inputs: Arc<Inputs>) -> Result<()> {
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            let input = match serde_json::from_str(&line) {
                Ok(command) => Input::Command(command),
                Err(error) => Input::BadCommand(format!("{line:?} is not a command: {error}")),
            };
            inputs.send(input);
        }
    })?;
    Ok(())
}
