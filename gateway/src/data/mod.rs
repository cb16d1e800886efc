//! The data plane of the daemon, on the kernel's own devices: UDP sockets, TUN, worker threads.
//!
//! ```text
//!            udp::Receiver --datagrams--> +--------+ --reserve/commit--> coalesce::Writer --> tun
//!   sockets                               | Worker |
//!            gso::Queue <--reserve/commit-+--------+ <------packets----- split::Reader <----- tun
//!                                          ^      |
//!                         queue::Commands -+      +-> queue::Events      (control, tokio)
//!                            links::Inbox -+      +-> links::Outbox      (other workers)
//! ```
//!
//! Every worker has a thread, sockets and a queue of the TUN of its own. A worker sees batches, never devices; this
//! folder moves bytes and never looks past the headers that segmentation offload needs. Start-up order: [`lock`],
//! [`sysctl`], [`DataPlane::start`], and with the first `init` [`interface`].
//!
//! `xsk` is a second way in and out for datagrams, past the sockets; [`fast`] finds where it can be used.

pub mod interface;
pub mod lock;
pub mod sysctl;

mod busy;
pub mod capabilities;
mod coalesce;
pub mod fast;
mod figures;
mod gso;
mod headers;
mod links;
mod merge;
#[cfg(test)]
mod netns_tests;
mod poller;
mod queue;
mod ring;
mod sendmmsg;
mod split;
mod steering;
mod tables;
#[cfg(test)]
mod test_packets;
mod told;
mod tun;
mod turn;
mod udp;
mod virtio;
mod wake;
mod worker_thread;
mod xsk;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use gateway_common::{Counters, DropReason, FrameCount, maps::Outcome};
use gateway_proto::{
    Command, Transmit, WorkerEvent, WorkerId, control,
    worker::{self, Traffic, Worker},
};
use tokio::time::{Interval, MissedTickBehavior};
use x25519_dalek::StaticSecret;

#[cfg(test)]
pub use self::figures::Work;
pub use self::{
    capabilities::{Capabilities, Capability, InUse},
    udp::{BufferSizes, MARK, PORT},
    worker_thread::WorkerState,
    xsk::Wanted,
};
use self::{
    fast::{Door, FastPath},
    links::links,
    queue::{Commands, Events},
    told::{Kernel, Told},
    tun::Tun,
    turn::{Core, Seat},
    udp::Sockets,
    wake::Wake,
    worker_thread::WorkerThread,
    xsk::Fast,
};
use crate::bpf;

/// The name of the TUN device.
pub const TUN_NAME: &str = "tun-firezone";

/// What the data plane is started with.
pub struct Config {
    /// The TUN device's name, normally [`TUN_NAME`].
    pub tun_name: String,
    /// How many workers, at least one.
    pub workers: usize,
    /// The gateway's WireGuard key.
    pub private_key: StaticSecret,
    /// Let clients reach every port of the gateway's own tunnel address.
    pub allow_own_ip: bool,
    /// Seeds the spread of timers.
    pub seed: u64,
    /// Kernel buffers of the UDP sockets.
    pub buffers: BufferSizes,
    /// What of the kernel's batching and steering may be used.
    pub allowed: Capabilities,
    /// How the fast path is wanted.
    pub fast_path: fast::Config,
}

/// Sockets, TUN device and the workers that serve them.
pub struct DataPlane {
    events: Arc<Events>,
    /// Of the first worker.
    sockets: Sockets,
    workers: Vec<WorkerThread>,
    told: Option<Told>,
    fast: Option<FastPath>,
    /// Why there is none.
    no_fast: String,
    /// Nothing brings datagrams to the owner of their client.
    by_arrival: bool,
    in_use: InUse,
    watch: Interval,
    /// What [`DataPlane::transmit`] could not send.
    drops: AtomicU64,
}

impl DataPlane {
    /// Opens the sockets and the TUN device in the network namespace of the calling thread and starts the workers.
    ///
    /// # Errors
    /// One sentence: no socket in either family, no right to mark them, no TUN device, or a second process has it.
    ///
    /// # Panics
    /// Outside a tokio runtime with timers.
    pub fn start(config: Config) -> Result<Self> {
        let Config { tun_name, workers, private_key, allow_own_ip, seed, buffers, allowed, fast_path } =
            config;
        let core = |id: WorkerId| {
            Worker::new(worker::Config {
                private_key: private_key.clone(),
                allow_own_ip,
                seed: seed.wrapping_add(id.get() as u64),
                now: Instant::now(),
                id,
                workers,
            })
        };
        Self::start_with(&tun_name, workers, buffers, allowed, &fast_path, core, |_, _| None)
    }

    fn start_with<C: Core>(
        tun_name: &str,
        workers: usize,
        buffers: BufferSizes,
        allowed: Capabilities,
        fast_path: &fast::Config,
        core: impl Fn(WorkerId) -> C,
        fast: impl Fn(WorkerId, &Sockets) -> Option<Fast>,
    ) -> Result<Self> {
        let sockets = Sockets::open(workers, buffers, allowed)?;
        let tuns = Tun::create(tun_name, workers, allowed)?;
        let (first, tun) = sockets.first().zip(tuns.first()).context("There must be a worker")?;
        let for_control = first.try_clone().context("Failed to duplicate the UDP sockets")?;
        let mut in_use = InUse::new(allowed);
        first.report(&mut in_use);
        tun.report(&mut in_use);
        let (kernel, no_fast) = start_kernel(fast_path, &sockets, &tuns, &mut in_use);
        let kernel = kernel.map(Kernel::new);
        let port = |socket: &Option<udp::DataSocket>| socket.as_ref().map_or(0, udp::DataSocket::port);
        let ports = (port(&first.v4), port(&first.v6));
        tracing::info!(workers, "In use: {}", in_use.describe());

        let events = Arc::new(Events::default());
        let wakes = (0..workers).map(|_| Wake::new().map(Arc::new)).collect::<io::Result<Vec<_>>>();
        let wakes = wakes.context("Failed to create an eventfd")?;
        let doors: Vec<_> = wakes.iter().map(|wake| Arc::new(Door::new(Arc::clone(wake)))).collect();
        let seats = sockets.into_iter().zip(tuns).zip(links(&wakes)).zip(wakes).enumerate();
        let threads = seats.map(|(number, (((sockets, tun), (inbox, outbox)), wake))| {
            let id = WorkerId::new(number).context("There are too many workers")?;
            let (commands, events) = (Arc::new(Commands::new(wake)), Arc::clone(&events));
            let fast = fast(id, &sockets);
            let door = Arc::clone(&doors[number]);
            WorkerThread::spawn(
                core(id),
                Seat { id, sockets, tun, commands, events, inbox, outbox, fast, door },
            )
        });
        let threads = threads.collect::<Result<_>>()?;
        let has_uplink = |kernel: &&Kernel| kernel.lock().uplink.is_some();
        let fast = kernel.as_ref().filter(has_uplink);
        let fast = fast.map(|kernel| FastPath::start(fast_path.wanted, kernel.clone(), doors, ports));
        let fast = fast.transpose()?;
        let mut watch = tokio::time::interval(Duration::from_secs(1));
        watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            events,
            sockets: for_control,
            workers: threads,
            told: kernel.map(Told::new),
            fast,
            no_fast,
            by_arrival: workers > 1 && !in_use.has(Capability::ReuseportSteering),
            in_use,
            watch,
            drops: AtomicU64::new(0),
        })
    }

    /// What control must know to place clients.
    pub fn workers(&self) -> control::Workers {
        control::Workers { count: self.workers.len(), by_arrival: self.by_arrival }
    }

    /// Tells the workers what is true. Replaces an earlier command of the same key that they have not seen yet; takes
    /// effect before a worker's next batch. Never blocks, never drops.
    pub fn send(&mut self, command: Command) {
        if let Some(told) = &mut self.told {
            told.on_command(&command);
        }
        if let Some(fast) = &self.fast {
            fast.on_command(&command);
        }
        if let Some((first, others)) = self.workers.split_first() {
            others.iter().for_each(|worker| worker.send(command.clone()));
            first.send(command);
        }
    }

    /// What the workers saw since the last call; waits until there is something. Cancel-safe.
    ///
    /// # Errors
    /// A worker has ended or hangs: the process must end too.
    pub async fn recv(&mut self) -> Result<Vec<WorkerEvent>> {
        loop {
            let events = self.events.take();
            if let Some(told) = &mut self.told {
                events.iter().for_each(|event| told.on_event(event));
            }
            if !events.is_empty() {
                return Ok(events);
            }
            self.workers.iter_mut().try_for_each(WorkerThread::check_ended)?;
            tokio::select! {
                () = self.events.notified() => {}
                _ = self.watch.tick() => self.workers.iter_mut().try_for_each(WorkerThread::check_stalled)?,
            }
        }
    }

    /// Sends one of control's own datagrams from the same sockets, at once.
    pub fn transmit(&self, transmit: &Transmit) {
        if let Err(e) = self.sockets.transmit(transmit) {
            self.drops.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(dst = %transmit.dst, "A control datagram was not sent: {e}");
        }
    }

    /// Packets dropped so far, by reason: ours and the kernel's.
    pub fn counters(&self) -> Counters {
        let mut counters = self.own_drops();
        counters.merge(&self.kernel_drops());
        counters
    }

    /// What was dropped here: all workers' and the backend's.
    pub fn own_drops(&self) -> Counters {
        let mut counters = Counters::default();
        counters.add(DropReason::UdpSend, self.drops.load(Ordering::Relaxed));
        self.workers.iter().for_each(|worker| counters.merge(&worker.counters()));
        counters
    }

    /// What the kernel dropped for us, before anybody here saw it.
    pub fn kernel_drops(&self) -> Counters {
        self.told.as_ref().map(Told::drops).unwrap_or_default()
    }

    /// Frames on the uplink by what came of them; `None` where nothing decides about them.
    pub fn frame_outcomes(&self) -> Option<Vec<(Outcome, FrameCount)>> {
        self.told.as_ref()?.outcomes()
    }

    /// How often one of the kernel's maps had no room, by its name; what is left out goes the slow way.
    pub fn left_out(&self) -> Vec<(&'static str, u64)> {
        self.told.as_ref().map(Told::left_out).unwrap_or_default()
    }

    /// The fast path, to look at it and to switch it; `None` if it is not wanted, or cannot be.
    pub fn fast_path(&self) -> Option<&FastPath> {
        self.fast.as_ref()
    }

    /// How the fast path is, and why not better.
    pub fn fast_path_status(&self) -> fast::Status {
        let none = || fast::Status { outcome: self.no_fast.clone(), ..fast::Status::default() };
        self.fast.as_ref().map_or_else(none, FastPath::status)
    }

    /// Events of the workers that wait for [`DataPlane::recv`], and the most that ever did.
    pub fn events_waiting(&self) -> (usize, usize) {
        self.events.waiting()
    }

    /// What each worker carried so far.
    pub fn traffic(&self) -> impl Iterator<Item = (WorkerId, Traffic)> {
        self.workers.iter().map(|worker| (worker.id(), worker.traffic()))
    }

    /// How each worker is.
    pub fn worker_states(&self) -> Vec<WorkerState> {
        self.workers.iter().map(WorkerThread::state).collect()
    }

    /// What of the kernel's batching and steering is in use.
    pub fn in_use(&self) -> &InUse {
        &self.in_use
    }

    /// Reports about flows that found no room on their way from the workers so far.
    pub fn flow_reports_lost(&self) -> u64 {
        self.traffic().map(|(_, traffic)| traffic.flow_reports_lost).sum()
    }

    /// Says goodbye to every client, waits until that is sent (at most a second), and closes sockets and device.
    pub async fn close(mut self) -> Closed {
        // First, so that goodbyes and what comes last go by one way.
        if let Some(fast) = self.fast.take() {
            fast.close().await;
        }
        self.send(Command::Shutdown);
        let deadline = Instant::now() + Duration::from_secs(1);
        let mut result = Ok(());
        for worker in &mut self.workers {
            result = result.and(worker.join(deadline).await);
        }
        Closed { events: self.events.take(), flow_reports_lost: self.flow_reports_lost(), result }
    }
}

/// What of us goes into the kernel, with what of it is attached to sockets and device; and why there is no fast path, where
/// there is none.
fn start_kernel(
    fast_path: &fast::Config,
    sockets: &[Sockets],
    tuns: &[Tun],
    in_use: &mut InUse,
) -> (Option<bpf::Kernel>, String) {
    let mut no_fast = "off (--fast-path off)".to_owned();
    let whole = match fast_path.wanted {
        Wanted::Off => None,
        wanted => bpf::Kernel::whole(fast_path.clients, fast_path.bpffs.as_deref())
            .inspect_err(|e| match wanted {
                Wanted::Exactly(_) => tracing::warn!("Fast path: off: {e}"),
                _ => tracing::info!("Fast path: off: {e}"),
            })
            // With what the verifier said, which is long.
            .inspect_err(|e| tracing::debug!("No fast path: {e:#}"))
            .inspect_err(|e| no_fast = format!("off ({e})"))
            .ok(),
    };
    let wants_steering = sockets.len() > 1 && steering::BOTH.iter().any(|capability| in_use.has(*capability));
    if !wants_steering {
        steering::BOTH.iter().for_each(|capability| in_use.missing(*capability, "one worker"));
        return (whole, no_fast);
    }
    // Steering needs less: it may work where the fast path does not.
    let kernel = whole.map_or_else(bpf::Kernel::steering, Ok);
    let mut kernel = kernel.inspect_err(|e| tracing::debug!("No kernel programs: {e:#}"));
    steering::attach(kernel.as_mut().map_err(|e| &*e), sockets, tuns, in_use);
    (kernel.ok(), no_fast)
}

/// What is left of a data plane.
#[derive(Debug)]
pub struct Closed {
    /// What the workers told last, the ends of flows among it.
    pub events: Vec<WorkerEvent>,
    /// See [`DataPlane::flow_reports_lost`].
    pub flow_reports_lost: u64,
    /// The error: a worker had ended before, or did not end in time. What the others told is there all the same.
    pub result: Result<()>,
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        // Workers that nobody listens to say goodbye and end.
        self.send(Command::Shutdown);
    }
}
