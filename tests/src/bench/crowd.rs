//! A crowd behind one gateway, and the LAN host's end of its traffic: far ends that cost little beside the gateway.
//!
//! ```text
//!   client0: 16 members in one process == bursts sealed ahead, GRO batches counted ==> gateway <==> LAN host: one thread
//! ```

use std::{
    net::{SocketAddr, SocketAddrV4, UdpSocket},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use quinn_udp::{Transmit, UdpSocketState};
use rustix::{
    io::Errno,
    net::{RecvFlags, recv, sockopt::set_socket_recv_buffer_size_force},
};

use super::{
    accounting::{self, thread_times},
    bed,
    traffic::Direction,
};
use crate::{
    net::{
        process::Logs,
        services::BigFile,
        topology::{LAN_HOST, Topology, direct},
    },
    scenario::{
        Context, Variation,
        lab::{Lab, Launch, Options, lan4},
        swarm::Swarm,
    },
    standins::client::SwarmCommand,
};

/// Payload of a datagram.
pub(super) const BYTES: usize = 1200;
/// Datagrams of one system call, as a QUIC stack sends.
const BURST: usize = 32;
const FIRST_UDP_PORT: u16 = 53_000;
const LOGINS_PER_SECOND: u32 = 100;
const PORT: u16 = 5303;
const PATIENCE: Duration = Duration::from_secs(20);
/// How long what is under way may take behind the last burst.
const GRACE: Duration = Duration::from_millis(200);
/// What comes while the LAN host has no core.
const LAN_BUFFER: usize = 64 << 20;
/// Bursts behind schedule that are sent at once: a veth holds 256.
const CATCH_UP: u64 = 64;
/// The LAN host sleeps at least this long between bursts.
const PAUSE: Duration = Duration::from_micros(500);

/// Clients, a gateway, and who they talk to.
pub(super) struct Crowd {
    // Clients first, so that nobody complains on the way out.
    swarm: Swarm,
    clients: usize,
    far: UdpSocket,
    /// Where the LAN host heard each client.
    heard: Vec<SocketAddr>,
    /// NAPI threads of the gateway's interfaces.
    pub(super) napi: Vec<i32>,
    pub(super) lab: Lab,
    _cx: Context,
}

/// What was sent and what arrived, in datagrams.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sent {
    pub(super) sent: u64,
    pub(super) arrived: u64,
    /// Of these, how many were decrypted at the far end; outbound the kernel has looked at all.
    pub(super) opened: u64,
    pub(super) seconds: f64,
}

impl Crowd {
    /// Everything anew, up to a first datagram of each client.
    ///
    /// # Errors
    /// If something does not come up, or the gateway has another number of workers than asked for.
    pub(super) fn start(directory: &Path, gateway: &Path, workers: usize, clients: usize) -> Result<Self> {
        let cx = Context {
            topology: Topology::build(direct::plan())?,
            logs: Logs::new(directory.to_path_buf())?,
            gateway: gateway.to_path_buf(),
            big: BigFile::empty(directory)?,
            variation: Variation { workers: Some(workers), ..Variation::default() },
        };
        let napi = bed::threads_everywhere(&cx.topology)?;
        accounting::allow(0, bed::OTHERS_AND_GATEWAY)?;
        // By the same rules as in the other rows.
        cx.topology.prepare_gateway()?;
        let launch = Launch::default().without_network_setup();
        let options = Options { resources: vec![lan4()], expiry: None, launch, ..Options::default() };
        let lab = Lab::start(&cx, &options)?;
        let threads = thread_times(lab.gateway.pid(), "worker-");
        ensure!(threads.len() == workers, "the gateway has {} workers instead of {workers}", threads.len());
        // The last one on the core that the gateway has in the other rows.
        let cores = (0..workers).map(|nth| accounting::GATEWAY_CORE + 1 + nth - workers);
        for (tid, core) in threads.keys().zip(cores) {
            accounting::pin(*tid, core)?;
        }
        let namespace = &cx.topology.clients[0].namespace;
        let url = lab.portal.url();
        let login = (&*url, &*lab.client_token);
        let mut swarm =
            Swarm::start(&cx, namespace, login, "crowd", clients, FIRST_UDP_PORT, LOGINS_PER_SECOND)?;
        swarm.wait_ready(PATIENCE)?;
        swarm.command(&SwarmCommand::Want { resource: lan4().id })?;
        swarm.wait_established(PATIENCE)?;
        let far = cx.topology.lan.run(|| Ok(UdpSocket::bind((LAN_HOST.0, PORT))?))?;
        let mut crowd = Self { swarm, clients, far, heard: Vec::new(), napi, lab, _cx: cx };
        crowd.greet()?;
        Ok(crowd)
    }

    /// Each client says something to the LAN host, who remembers where it came from.
    fn greet(&mut self) -> Result<()> {
        self.far.set_read_timeout(Some(GRACE))?;
        let deadline = Instant::now() + PATIENCE;
        let mut buffer = [0; BYTES];
        while self.heard.len() < self.clients {
            ensure!(Instant::now() < deadline, "the LAN host heard {} clients", self.heard.len());
            self.seal(BURST)?;
            let once = SwarmCommand::Send { per_second: 10_000, burst: 1, ms: 2 * self.clients as u64 };
            self.swarm.command(&once)?;
            while let Ok((_, from)) = self.far.recv_from(&mut buffer) {
                if !self.heard.contains(&from) {
                    self.heard.push(from);
                }
            }
        }
        let state = UdpSocketState::new((&self.far).into())?;
        ensure!(state.max_gso_segments() >= BURST, "the kernel has no UDP segmentation offload");
        set_socket_recv_buffer_size_force(&self.far, LAN_BUFFER)?;
        self.swarm.command(&SwarmCommand::Count { bytes: BYTES })
    }

    fn seal(&mut self, each: usize) -> Result<()> {
        self.swarm.command(&SwarmCommand::Seal {
            to: SocketAddrV4::new(LAN_HOST.0, PORT),
            bytes: BYTES,
            each,
        })?;
        self.swarm.wait("sealed datagrams", PATIENCE, |report| !report.working)?;
        Ok(())
    }

    /// Gets ready for [`Self::send`]: nothing of this is to be measured.
    ///
    /// # Errors
    /// If the clients have no session any more.
    pub(super) fn prepare(&mut self, direction: Direction, per_second: u64, time: Duration) -> Result<()> {
        if direction == Direction::Inbound {
            return Ok(());
        }
        let packets = usize::try_from(time.as_micros() * u128::from(per_second) / 1_000_000)?;
        self.seal((packets.div_ceil(self.clients * BURST) + 1) * BURST)
    }

    /// Sends datagrams of [`BYTES`] for `time`, evenly between all clients.
    ///
    /// # Errors
    /// If somebody cannot send.
    pub(super) fn send(&mut self, direction: Direction, per_second: u64, time: Duration) -> Result<Sent> {
        let before = self.swarm.report()?;
        let far_end = match direction {
            Direction::Outbound => {
                let ms = u64::try_from(time.as_millis())?;
                self.swarm.command(&SwarmCommand::Send { per_second, burst: BURST, ms })?;
                receive(&self.far, Instant::now() + time + GRACE)?
            }
            Direction::Inbound => {
                let sent = send(&self.far, &self.heard, per_second, time)?;
                self.settle()?;
                sent
            }
        };
        let after = self.swarm.report()?;
        if after.errors != before.errors {
            bail!("the clients: {:?}", after.errors);
        }
        let seconds = time.as_secs_f64();
        Ok(match direction {
            Direction::Outbound => {
                Sent { sent: after.sent - before.sent, arrived: far_end, opened: far_end, seconds }
            }
            Direction::Inbound => {
                let opened = after.opened - before.opened;
                Sent { sent: far_end, arrived: after.skimmed - before.skimmed + opened, opened, seconds }
            }
        })
    }

    /// Waits until the clients have counted what waits in their sockets: it would count as the next run's.
    fn settle(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut counted = None;
        loop {
            std::thread::sleep(GRACE);
            let report = self.swarm.report()?;
            let now = (report.skimmed, report.opened);
            if counted.replace(now) == Some(now) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the clients still count what came to them");
        }
    }
}

/// Datagrams that arrive until `end`. The kernel has checked and merged them; nobody needs their bytes.
fn receive(socket: &UdpSocket, end: Instant) -> Result<u64> {
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(GRACE / 4))?;
    let mut arrived = 0;
    while Instant::now() < end {
        match recv(socket, &mut [0; 1], RecvFlags::TRUNC) {
            Ok((_, bytes)) => arrived += (bytes / BYTES) as u64,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error).context("receiving on the LAN host"),
        }
    }
    Ok(arrived)
}

/// Sends bursts to one after the other, evenly over `time`; returns the number of datagrams.
fn send(socket: &UdpSocket, to: &[SocketAddr], per_second: u64, time: Duration) -> Result<u64> {
    let state = UdpSocketState::new(socket.into())?;
    socket.set_nonblocking(false)?;
    let contents = vec![0x5a; BYTES * BURST];
    let started = Instant::now();
    let mut bursts = 0;
    let mut next = to.iter().cycle();
    while started.elapsed() < time {
        let packets = started.elapsed().as_micros() * u128::from(per_second) / 1_000_000;
        let due = u64::try_from(packets / BURST as u128)?;
        for _ in 0..due.saturating_sub(bursts).min(CATCH_UP) {
            let transmit = Transmit {
                destination: *next.next().context("nobody was heard")?,
                ecn: None,
                contents: &contents,
                segment_size: Some(BYTES),
                src_ip: None,
            };
            state.try_send(socket.into(), &transmit)?;
            bursts += 1;
        }
        std::thread::sleep(PAUSE);
    }
    Ok(bursts * BURST as u64)
}
