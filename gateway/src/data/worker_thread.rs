//! The thread of one worker as control sees it: how it starts and ends, whether it is alive, and its figures.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail};
use gateway_common::Counters;
use gateway_proto::{Command, WorkerId, worker::Traffic};

use super::{
    busy::Window,
    figures::{Figures, Work},
    queue::{Commands, Events},
    ring::Level,
    turn::{Core, Seat, run},
};

/// What an operator may want to know of a worker. Everything but the last three grows only.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WorkerState {
    /// Which one it is.
    pub id: WorkerId,
    /// What it carried.
    pub traffic: Traffic,
    /// What else it did.
    pub work: Work,
    /// Turns that it ended: how often it woke, or went on without sleep.
    pub turns: u64,
    /// The share of the last 10 s, from 0 to 1, in which it did not sleep.
    pub busy_share: f64,
    /// Commands that it has not seen.
    pub commands_waiting: usize,
    /// Bytes that other workers passed to it and it has not read.
    pub handover_bytes_waiting: usize,
}

/// Control's view of the thread.
pub struct WorkerThread {
    id: WorkerId,
    commands: Arc<Commands>,
    /// Of the rings that others pass packets to it by.
    levels: Vec<Level>,
    shared: Arc<Shared>,
    busy: Window,
    thread: Option<JoinHandle<Result<()>>>,
    /// The turn that the last look found under way, and how many looks found the same.
    seen: (u64, u32),
}

/// Looks, a second apart, that must find one turn unfinished before the worker counts as stalled: 2 s at least, and
/// never only because the whole machine stood still.
const STALLED_LOOKS: u32 = 2;

impl WorkerThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// It cannot be created.
    pub fn spawn(core: impl Core, seat: Seat) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let (id, commands, levels) = (seat.id, Arc::clone(&seat.commands), seat.inbox.levels());
        let ended = Ended { shared: shared.clone(), events: seat.events.clone() };
        let thread = std::thread::Builder::new()
            .name(format!("worker-{id}"))
            .spawn(move || run(core, seat, &ended.shared))
            .with_context(|| format!("Failed to start the thread of worker {id}"))?;
        let busy = Window::new(Instant::now());
        Ok(Self { id, commands, levels, shared, busy, thread: Some(thread), seen: (0, 0) })
    }

    /// Which one it is.
    pub fn id(&self) -> WorkerId {
        self.id
    }

    /// Tells it what is true; see [`Commands::send`].
    pub fn send(&self, command: Command) {
        self.commands.send(command);
    }

    /// # Errors
    /// The thread has ended, by an error or a panic, or as ordered; no event will come any more.
    pub fn check_ended(&mut self) -> Result<()> {
        if !self.shared.ended.load(Ordering::Acquire) {
            return Ok(());
        }
        let id = self.id;
        if let Some(thread) = self.thread.take() {
            join(id, thread)?;
        }
        bail!("Worker {id} has ended");
    }

    /// Call once a second.
    ///
    /// # Errors
    /// The thread works on one batch for 2 s.
    pub fn check_stalled(&mut self) -> Result<()> {
        self.busy.note(self.shared.figures.work().busy, Instant::now());
        let turn = self.shared.turn.load(Ordering::Acquire);
        let (seen, looks) = &mut self.seen;
        if turn.is_multiple_of(2) || turn != *seen {
            (*seen, *looks) = (turn, 0);
            return Ok(());
        }
        *looks += 1;
        if *looks >= STALLED_LOOKS {
            bail!(
                "Worker {} has been busy with one batch for 2 s; giving up so that a fresh process can take over",
                self.id
            );
        }
        Ok(())
    }

    /// Drops by reason, as of the last turn.
    pub fn counters(&self) -> Counters {
        self.shared.figures.drops()
    }

    /// Volumes, as of the last turn.
    pub fn traffic(&self) -> Traffic {
        self.shared.figures.traffic()
    }

    /// How it is, as of the last turn.
    pub fn state(&self) -> WorkerState {
        let work = self.shared.figures.work();
        WorkerState {
            id: self.id,
            traffic: self.traffic(),
            work,
            busy_share: self.busy.share(work.busy, Instant::now()),
            turns: self.shared.turn.load(Ordering::Relaxed) / 2,
            commands_waiting: self.commands.waiting(),
            handover_bytes_waiting: self.levels.iter().map(Level::bytes).sum(),
        }
    }

    /// Waits for the thread, which ends after [`Command::Shutdown`].
    ///
    /// # Errors
    /// It failed, or has not said goodbye to all by the deadline. Whether its descriptors are closed by then does not
    /// matter: a queue of a TUN device waits for the kernel's lock of all network devices, of every namespace.
    pub async fn join(&mut self, deadline: Instant) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        while !thread.is_finished() {
            if Instant::now() >= deadline {
                if self.shared.said_all.load(Ordering::Acquire) {
                    tracing::debug!(worker = %self.id, "The kernel takes its time to close the device");
                    return Ok(());
                }
                bail!("Worker {} did not end in time", self.id);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        join(self.id, thread)
    }
}

fn join(id: WorkerId, thread: JoinHandle<Result<()>>) -> Result<()> {
    thread.join().unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        Err(anyhow!("Worker {id} panicked: {}", text.unwrap_or("no message")))
    })
}

/// What both threads see.
#[derive(Default)]
pub struct Shared {
    /// Odd while a turn is under way, even while the thread waits.
    turn: AtomicU64,
    /// Everything is sent; what follows is closing.
    said_all: AtomicBool,
    ended: AtomicBool,
    figures: Figures,
}

impl Shared {
    /// The thread has sent the last of what it was to send.
    pub fn say_all(&self) {
        self.said_all.store(true, Ordering::Release);
    }

    /// The thread has something to do.
    pub fn begin_turn(&self) {
        self.turn.fetch_add(1, Ordering::Release);
    }

    /// The thread has done it; this is what it did since it began.
    pub fn end_turn(&self, counters: &Counters, traffic: &Traffic, work: Work) {
        self.figures.store(counters, traffic, work);
        self.turn.fetch_add(1, Ordering::Release);
    }
}

/// Tells control when the thread ends, however it does.
struct Ended {
    shared: Arc<Shared>,
    events: Arc<Events>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        self.events.wake();
    }
}
