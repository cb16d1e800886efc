//! The fast path of a running data plane: where it is, why not better, and its switch.
//!
//! ```text
//!   DataPlane --- relays, switch ---> Manager (a task of the control thread)      netlink: links, addresses, routes
//!                                       |  attaches, opens (open.rs)                     |
//!   workers <--- Door --- Fast ---------+<------------------------------------- look again
//! ```
//!
//! The interface is the one by which the kernel sends to our relays. Whatever does not work has its reason in the log, and
//! the sockets carry on: nothing here is ever fatal.

mod door;
mod manager;
mod open;

use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::Ordering},
    time::Duration,
};

use anyhow::{Result, anyhow};
use gateway_proto::Command;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

pub use self::door::Door;
use self::manager::Manager;
pub use super::xsk::Mode;
use super::{
    told::Kernel,
    xsk::{Figures, Wanted},
};
use crate::logging::REST;

/// How the operator wants it.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// `--fast-path`.
    pub wanted: Wanted,
    /// `--bpffs`: where the kernel's maps are pinned.
    pub bpffs: Option<PathBuf>,
    /// `--fast-path-clients`: for how many the kernel's maps have room; as many as they can if absent.
    pub clients: Option<u32>,
}

/// How it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// The interface that is in use, whether or not switched off.
    pub interface: Option<String>,
    /// How it is used; `None` if none is.
    pub mode: Option<Mode>,
    /// The mode with what was found on the way to it, or why there is none.
    pub outcome: String,
    /// Frames are decided about.
    pub on: bool,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.interface {
            Some(interface) if self.on => write!(f, "on, {interface}: {}", self.outcome),
            Some(interface) => write!(f, "switched off, {interface}: {}", self.outcome),
            None => write!(f, "{}", self.outcome),
        }
    }
}

#[derive(Debug)]
enum Order {
    Relays(Command),
    Switch(bool, oneshot::Sender<Result<bool>>),
    Close(oneshot::Sender<()>),
}

/// What the task and everybody else see.
#[derive(Default)]
struct Shared {
    status: Mutex<Status>,
    /// By worker.
    figures: Vec<Arc<Figures>>,
}

impl Shared {
    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The fast path, seen by the data plane.
pub struct FastPath {
    kernel: Kernel,
    orders: mpsc::UnboundedSender<Order>,
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

/// How long it may take to close.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

impl FastPath {
    /// Starts to look for the interface, in the network namespace of the calling thread. `doors` are those of all workers;
    /// `ports` our ports, IPv4 and IPv6.
    ///
    /// # Errors
    /// The kernel offers no rtnetlink here.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(wanted: Wanted, kernel: Kernel, doors: Vec<Arc<Door>>, ports: (u16, u16)) -> Result<Self> {
        let figures = doors.iter().map(|_| Arc::default()).collect();
        let shared = Arc::new(Shared { status: Mutex::default(), figures });
        let (orders, inbox) = mpsc::unbounded_channel();
        let manager = Manager::new(wanted, kernel.clone(), doors, ports, Arc::clone(&shared), inbox)?;
        Ok(Self { kernel, orders, shared, task: tokio::spawn(manager.run()) })
    }

    /// What the workers are told, as far as it matters: which relays there are.
    pub fn on_command(&self, command: &Command) {
        if matches!(command, Command::Relays(_)) {
            // Nobody listens any more at the end.
            let _closing = self.orders.send(Order::Relays(command.clone()));
        }
    }

    /// What switches it, for somebody who may wait.
    pub fn switcher(&self) -> Switcher {
        Switcher(self.orders.clone())
    }

    /// How it is now.
    pub fn status(&self) -> Status {
        let mut status = self.shared.status().clone();
        // Whoever found the map full has switched it off at once.
        status.on &= !self.kernel.lock().must_pass();
        status
    }

    /// Frames from the rings to the workers, and back.
    pub fn carried(&self) -> (u64, u64) {
        let sum = |of: fn(&Figures) -> u64| self.shared.figures.iter().map(|figures| of(figures)).sum();
        (sum(|f| f.received.load(Ordering::Relaxed)), sum(|f| f.sent.load(Ordering::Relaxed)))
    }

    /// Switches it off, detaches the program and ends. The workers keep their sockets until they end.
    pub async fn close(self) {
        let status = self.status();
        let (received, sent) = self.carried();
        let outcomes = self.kernel.lock().plane.outcomes().unwrap_or_default();
        let frames = |label: &str| {
            outcomes
                .iter()
                .find(|(outcome, _)| outcome.label() == label)
                .map_or(0, |(_, count)| count.packets)
        };
        tracing::debug!(
            target: REST,
            %status,
            passed = frames("passed"),
            no_socket = frames("no_socket"),
            redirected = frames("redirected"),
            dropped = frames("dropped"),
            received,
            sent,
            "Fast path at rest"
        );
        let (reply, closed) = oneshot::channel();
        if self.orders.send(Order::Close(reply)).is_ok() {
            let _late = tokio::time::timeout(CLOSE_LIMIT, closed).await;
        }
    }
}

/// Switches the fast path.
#[derive(Debug, Clone)]
pub struct Switcher(mpsc::UnboundedSender<Order>);

impl Switcher {
    /// Switches it on or off while packets pass; none is lost or late (`xsk/order.rs`). The program stays attached. Returns
    /// what it is then: it cannot be on where there is no interface for it, or with a map that is full.
    ///
    /// # Errors
    /// If the workers or the kernel do not follow; it is off then.
    pub async fn switch(&self, on: bool) -> Result<bool> {
        let (reply, answer) = oneshot::channel();
        let gone = || anyhow!("the fast path's task has ended");
        self.0.send(Order::Switch(on, reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

impl Drop for FastPath {
    fn drop(&mut self) {
        self.task.abort();
    }
}
