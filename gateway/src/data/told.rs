//! What the kernel's maps are told: of each command before the workers hear it, and of each event.
//!
//! So a client that acts on an answer of control's finds kernel and workers knowing the same.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use gateway_common::{Counters, FrameCount, maps::Outcome};
use gateway_proto::{Command, WorkerEvent};

use super::{steering::Steering, tables::Tables};
use crate::bpf;

/// The kernel's part, shared with whoever attaches it.
#[derive(Clone)]
pub struct Kernel(Arc<Mutex<bpf::Kernel>>);

impl Kernel {
    /// Shares it.
    pub fn new(kernel: bpf::Kernel) -> Self {
        Self(Arc::new(Mutex::new(kernel)))
    }

    /// Alone with it. Never across an await.
    pub fn lock(&self) -> MutexGuard<'_, bpf::Kernel> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The writers of all maps.
pub struct Told {
    kernel: Kernel,
    steering: Steering,
    tables: Tables,
    warned: bool,
}

impl Told {
    /// Nothing yet.
    pub fn new(kernel: Kernel) -> Self {
        Self { kernel, steering: Steering::default(), tables: Tables::default(), warned: false }
    }

    /// What the workers are about to be told.
    pub fn on_command(&mut self, command: &Command) {
        let Self { kernel, steering, tables, warned } = self;
        let mut kernel = kernel.lock();
        steering.on_command(command, &mut kernel.owners);
        if let Some(uplink) = &mut kernel.uplink {
            tables.on_command(command, uplink);
        }
        if !*warned && kernel.must_pass() {
            *warned = true;
            let full: Vec<_> = kernel.left_out().filter(|(_, entries)| *entries > 0).collect();
            match kernel.enable(false) {
                Ok(_) => tracing::warn!(
                    ?full,
                    "The fast path is off until the gateway is started again: a map of the kernel's is full; \
                     --fast-path-clients makes them larger"
                ),
                Err(e) => tracing::error!(?full, "A map of the kernel's is full: {e:#}"),
            }
        }
    }

    /// What a worker said.
    pub fn on_event(&mut self, event: &WorkerEvent) {
        self.steering.on_event(event, &mut self.kernel.lock().owners);
    }

    /// How often each map had no room.
    pub fn left_out(&self) -> Vec<(&'static str, u64)> {
        self.kernel.lock().left_out().collect()
    }

    /// Frames by what came of them; `None` without `uplink`.
    pub fn outcomes(&self) -> Option<Vec<(Outcome, FrameCount)>> {
        let kernel = self.kernel.lock();
        kernel.uplink.as_ref()?;
        kernel.plane.outcomes().ok()
    }

    /// What `uplink` has dropped.
    pub fn drops(&self) -> Counters {
        let mut counters = Counters::default();
        let kernel = self.kernel.lock();
        if kernel.uplink.is_some() {
            for (reason, count) in kernel.plane.drops().unwrap_or_default() {
                counters.add(reason, count.packets);
            }
        }
        counters
    }
}
