//! The data plane of the daemon, on the kernel's own devices: UDP sockets, TUN, one worker thread.
//!
//! ```text
//!            udp::Receiver --datagrams--> +--------+ --reserve/commit--> coalesce::Writer --> tun
//!   sockets                               | Worker |
//!            gso::Queue <--reserve/commit-+--------+ <------packets----- split::Reader <----- tun
//!                                          ^      |
//!                         queue::Commands -+      +-> queue::Events      (control, tokio)
//! ```
//!
//! The worker sees batches, never devices; this folder moves bytes and never looks past the headers that
//! segmentation offload needs. Start-up order: [`lock`], [`sysctl`], [`DataPlane::start`], and with the first
//! `init` [`interface`].

pub mod interface;
pub mod lock;
pub mod sysctl;

pub mod capabilities;
mod coalesce;
mod gso;
mod headers;
mod merge;
#[cfg(test)]
mod netns_tests;
mod queue;
mod sendmmsg;
mod split;
#[cfg(test)]
mod test_packets;
mod tun;
mod udp;
mod virtio;
mod worker_thread;

use std::{sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use gateway_common::{Counters, DropReason};
use gateway_proto::{
    Command, Transmit, WorkerEvent,
    worker::{self, Traffic, Worker},
};
use tokio::time::{Interval, MissedTickBehavior};
use x25519_dalek::StaticSecret;

pub use self::{
    capabilities::Capabilities,
    udp::{BufferSizes, MARK},
};
use self::{
    capabilities::InUse,
    queue::{Commands, Events},
    tun::Tun,
    udp::Sockets,
    worker_thread::WorkerThread,
};

/// The name of the TUN device.
pub const TUN_NAME: &str = "tun-firezone";

/// What the data plane is started with.
pub struct Config {
    /// The TUN device's name, normally [`TUN_NAME`].
    pub tun_name: String,
    /// The gateway's WireGuard key.
    pub private_key: StaticSecret,
    /// Let clients reach every port of the gateway's own tunnel address.
    pub allow_own_ip: bool,
    /// Seeds the spread of timers.
    pub seed: u64,
    /// Kernel buffers of the UDP sockets.
    pub buffers: BufferSizes,
    /// What of the kernel's batching may be used.
    pub allowed: Capabilities,
}

/// Sockets, TUN device and the worker that serves them.
pub struct DataPlane {
    commands: Arc<Commands>,
    events: Arc<Events>,
    sockets: Sockets,
    worker: WorkerThread,
    watch: Interval,
    /// What [`DataPlane::transmit`] could not send.
    drops: std::sync::atomic::AtomicU64,
}

impl DataPlane {
    /// Opens the sockets and the TUN device in the network namespace of the calling thread and starts the worker.
    ///
    /// # Errors
    /// One sentence: no socket in either family, no right to mark them, no TUN device, or a second process has it.
    ///
    /// # Panics
    /// Outside a tokio runtime with timers.
    pub fn start(config: Config) -> Result<Self> {
        let sockets = Sockets::open(config.buffers, config.allowed)?;
        let for_control = sockets.try_clone().context("Failed to duplicate the UDP sockets")?;
        let commands = Arc::new(Commands::new().context("Failed to create an eventfd")?);
        let events = Arc::new(Events::default());
        let core = Worker::new(worker::Config {
            private_key: config.private_key,
            allow_own_ip: config.allow_own_ip,
            seed: config.seed,
            now: std::time::Instant::now(),
            id: gateway_proto::WorkerId::FIRST,
            workers: 1,
        });
        let tun = Tun::create(&config.tun_name, config.allowed)?;
        let mut in_use = InUse::new(config.allowed);
        sockets.report(&mut in_use);
        tun.report(&mut in_use);
        tracing::info!("In use: {}", in_use.describe());
        let worker = WorkerThread::spawn(core, sockets, tun, commands.clone(), events.clone())?;
        Ok(Self::of(commands, events, for_control, worker))
    }

    fn of(commands: Arc<Commands>, events: Arc<Events>, sockets: Sockets, worker: WorkerThread) -> Self {
        let mut watch = tokio::time::interval(Duration::from_secs(1));
        watch.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { commands, events, sockets, worker, watch, drops: 0.into() }
    }

    /// Tells the worker what is true. Replaces an earlier command of the same key that it has not seen yet; takes
    /// effect before the worker's next batch. Never blocks, never drops.
    pub fn send(&self, command: Command) {
        self.commands.send(command);
    }

    /// What the worker saw since the last call; waits until there is something. Cancel-safe.
    ///
    /// # Errors
    /// The worker has ended or hangs: the process must end too.
    pub async fn recv(&mut self) -> Result<Vec<WorkerEvent>> {
        loop {
            let events = self.events.take();
            if !events.is_empty() {
                return Ok(events);
            }
            self.worker.check_ended()?;
            tokio::select! {
                () = self.events.notified() => {}
                _ = self.watch.tick() => self.worker.check_stalled()?,
            }
        }
    }

    /// Sends one of control's own datagrams from the same sockets, at once.
    pub fn transmit(&self, transmit: &Transmit) {
        if let Err(e) = self.sockets.transmit(transmit) {
            self.drops.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            tracing::debug!(dst = %transmit.dst, "A control datagram was not sent: {e}");
        }
    }

    /// Packets dropped so far, by reason: the worker's and the backend's.
    pub fn counters(&self) -> Counters {
        let mut counters = self.worker.counters();
        counters.add(DropReason::UdpSend, self.drops.load(std::sync::atomic::Ordering::Relaxed));
        counters
    }

    /// What the worker carried so far.
    pub fn traffic(&self) -> Traffic {
        self.worker.traffic()
    }

    /// Says goodbye to every client, waits until that is sent (at most a second), and closes sockets and device.
    ///
    /// # Errors
    /// The worker had ended before, or did not end in time.
    pub async fn close(mut self) -> Result<()> {
        self.commands.send(Command::Shutdown);
        self.worker.join(Duration::from_secs(1)).await
    }
}

impl Drop for DataPlane {
    fn drop(&mut self) {
        // A worker that nobody listens to says goodbye and ends.
        self.commands.send(Command::Shutdown);
    }
}
