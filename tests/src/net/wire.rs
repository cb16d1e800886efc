//! A link with delay, loss and a rate, as plain fields.
//!
//! ```text
//!   namespace A                    this thread                     namespace B
//!   [ TAP end A ] --> read --> loss? rate? --> queue(due) --> write --> [ TAP end B ]
//!   [ TAP end A ] <-- write <-- queue(due) <-- loss? rate? <-- read <-- [ TAP end B ]
//! ```
//!
//! The kernel here has no netem. TAP ends offer the kernel no offloads, so what is read is whole frames with checksums.
//! A link without delay, loss and rate is a plain veth pair instead ([`connect`] decides).

use std::{
    collections::VecDeque,
    io::ErrorKind,
    os::fd::AsFd as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rand::{Rng as _, SeedableRng as _, rngs::SmallRng};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tun_rs::{DeviceBuilder, Layer, SyncDevice};

use super::netns::{self, NetNs};

/// What a link does to frames, the same in each direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Link {
    /// One way.
    pub delay: Duration,
    /// Share of frames that is lost, 0 to 1.
    pub loss: f64,
    /// Bits per second; `None` is as fast as it goes.
    pub rate: Option<u64>,
    /// Bytes of IP packet.
    pub mtu: u32,
}

impl Default for Link {
    fn default() -> Self {
        Self { delay: Duration::ZERO, loss: 0.0, rate: None, mtu: 1500 }
    }
}

impl Link {
    fn is_plain(&self) -> bool {
        self.delay.is_zero() && self.loss == 0.0 && self.rate.is_none()
    }
}

/// The forwarder behind a link that is not plain; the link is gone when this is.
#[derive(Debug)]
pub struct Wire {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Connects `(namespace, interface name)` one and two; both ends exist and are up afterwards.
///
/// # Errors
/// If an interface cannot be made.
pub fn connect(one: (&NetNs, &str), two: (&NetNs, &str), link: Link) -> Result<Option<Wire>> {
    let wire = if link.is_plain() {
        netns::veth(one, two)?;
        None
    } else {
        let ends = [tap(one)?, tap(two)?];
        let stop = Arc::new(AtomicBool::new(false));
        let thread = std::thread::Builder::new().name("wire".to_owned()).spawn({
            let stop = Arc::clone(&stop);
            move || forward(&ends, link, &stop)
        })?;
        Some(Wire { stop, thread: Some(thread) })
    };
    for (namespace, name) in [one, two] {
        namespace.ip_batch(&[format!("link set {name} mtu {} up", link.mtu)])?;
    }
    Ok(wire)
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _panicked_and_said_so = thread.join();
        }
    }
}

fn tap((namespace, name): (&NetNs, &str)) -> Result<SyncDevice> {
    namespace.run(|| {
        let device = DeviceBuilder::new()
            .name(name)
            .layer(Layer::L2)
            .build_sync()
            .with_context(|| format!("cannot make TAP {name}"))?;
        device.set_nonblocking(true)?;
        Ok(device)
    })
}

/// Frames on their way in one direction.
struct Direction {
    queue: VecDeque<(Instant, Vec<u8>)>,
    /// When the last frame has left at the link's rate.
    free_at: Instant,
}

/// What a router's queue holds before it drops at the tail.
const QUEUE_FRAMES: usize = 2_000;

fn forward(ends: &[SyncDevice; 2], link: Link, stop: &AtomicBool) {
    let mut random = SmallRng::seed_from_u64(0x11ce);
    let start = Instant::now();
    let mut directions = [(); 2].map(|()| Direction { queue: VecDeque::new(), free_at: start });
    let mut buffer = vec![0; 65_536];
    while !stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        for (from, direction) in directions.iter_mut().enumerate() {
            while let Some((due, frame)) = direction.queue.front()
                && *due <= now
            {
                match ends[1 - from].send(frame) {
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    // Anything else (the end is down) is a lost frame, which is a link's right.
                    _ => direction.queue.pop_front(),
                };
            }
            while let Ok(length) = ends[from].recv(&mut buffer) {
                if direction.queue.len() >= QUEUE_FRAMES || random.random_bool(link.loss) {
                    continue;
                }
                let sent_in = link.rate.map_or(Duration::ZERO, |rate| {
                    Duration::from_nanos((length as u64).saturating_mul(8_000_000_000) / rate.max(1))
                });
                direction.free_at = direction.free_at.max(now) + sent_in;
                direction.queue.push_back((direction.free_at + link.delay, buffer[..length].to_vec()));
            }
        }
        // At most 100 ms, so that `stop` is seen.
        let next =
            directions.iter().filter_map(|direction| direction.queue.front()).map(|(due, _)| *due).min();
        let wait =
            next.map_or(Duration::from_millis(100), |due| due.saturating_duration_since(Instant::now()));
        let wait = Timespec::try_from(wait.min(Duration::from_millis(100)))
            .unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
        let mut ready = [0, 1].map(|end| PollFd::from_borrowed_fd(ends[end].as_fd(), PollFlags::IN));
        let _interrupted_is_as_good_as_woken = poll(&mut ready, Some(&wait));
    }
}
