//! The worker's thread.
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use gateway_common::Counters;
use gateway_proto::worker::{Traffic, Worker};

use super::{
    queue::{Commands, Events},
    udp::Sockets,
};

/// Control's view of the thread.
pub struct WorkerThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Default)]
struct Shared {
    turn: AtomicU64,
    ended: AtomicBool,
    figures: Mutex<(Counters, Traffic)>,
}

impl WorkerThread {
    pub fn spawn(
        _core: Worker,
        _sockets: Sockets,
        _tun_name: &str,
        _commands: Arc<Commands>,
        _events: Arc<Events>,
    ) -> Result<Self> {
        bail!("The data plane of this build is not complete")
    }

    pub fn check_ended(&mut self) -> Result<()> {
        if !self.shared.ended.load(Ordering::Acquire) {
            return Ok(());
        }
        let thread = self.thread.take().context("The worker has ended")?;
        thread.join().ok().context("worker-0 panicked")?
    }

    pub fn check_stalled(&mut self) -> Result<()> {
        let _ = (&self.shared.turn, Instant::now());
        Ok(())
    }

    pub fn counters(&self) -> Counters {
        self.shared.figures.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    pub fn traffic(&self) -> Traffic {
        self.shared.figures.lock().unwrap_or_else(PoisonError::into_inner).1
    }

    pub async fn join(self, within: Duration) -> Result<()> {
        let _ = within;
        Ok(())
    }
}
