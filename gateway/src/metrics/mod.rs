//! Metrics for Prometheus: what is shown, and how a scrape gets it.
//!
//! ```text
//! GET /metrics --> Exporter --ask--> event loop: Snapshot --> page --> prometheus (OpenMetrics) --> classic (0.0.4)
//! each minute --> export ---ask-----------'                     '--> otlp --> grpc --> collector
//! ```
//!
//! Nobody counts for metrics: a [`Snapshot`] is what the parts know anyway, taken by the event loop when somebody asks.
//! Labels are bounded: by what the program knows, by the number of workers, and by the relays that the portal names.
//! Clients and resources are no labels.

mod classic;
mod export;
mod family;
mod grpc;
mod otlp;
mod page;
mod prometheus;
#[cfg(test)]
mod tests;

pub use self::export::{Destination, resource, run as export};

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use gateway_common::{Counters, FrameCount, maps::Outcome};
use gateway_proto::{
    control::{Depths, Status},
    ids::RelayId,
};
use hyper::body::Bytes;
use tokio::{
    sync::{Mutex, mpsc, oneshot},
    time::timeout,
};

use crate::{
    data::{Capability, WorkerState, fast},
    dns, flow_logs,
    health::Readiness,
};

/// A page that is younger is shown again: whoever asks more often learns no more and costs no more.
const FRESH: Duration = Duration::from_millis(250);
/// For how long the event loop may leave a scrape waiting. Prometheus itself waits 10 s.
const PATIENCE: Duration = Duration::from_secs(5);

/// How the gateway is at one moment.
#[derive(Debug)]
pub struct Snapshot {
    /// When the daemon was started.
    pub started: SystemTime,
    /// Each worker.
    pub workers: Vec<WorkerState>,
    /// Clients of each worker.
    pub clients_by_worker: Vec<usize>,
    /// What the workers and their devices dropped.
    pub worker_drops: Counters,
    /// What control dropped.
    pub control_drops: Counters,
    /// Relays, clients, connections.
    pub status: Status,
    /// Control's queues.
    pub depths: Depths,
    /// Of the relays that have answered.
    pub relay_rtts: Vec<(RelayId, Duration)>,
    /// Events of the workers that control has not fetched.
    pub worker_events_waiting: usize,
    /// Events of the portal that control has not fetched.
    pub portal_events_waiting: usize,
    /// What became of flow logs.
    pub flow_logs: flow_logs::Figures,
    /// What the DNS servers count.
    pub dns: Arc<dns::Stats>,
    /// What is up, and the portal's figures.
    pub readiness: Arc<Readiness>,
    /// What of the kernel's batching and steering is in use.
    pub capabilities: Vec<(Capability, bool)>,
    /// How often each of the kernel's maps had no room.
    pub left_out: Vec<(&'static str, u64)>,
    /// What the kernel dropped for us.
    pub kernel_drops: Counters,
    /// Frames on the uplink by what came of them; `None` where nothing decides about them.
    pub frames: Option<Vec<(Outcome, FrameCount)>>,
    /// How the fast path is, and what it carried in and out, in frames; `None` if it is not wanted, or cannot be.
    pub fast_path: Option<(fast::Status, (u64, u64))>,
}

/// Where the event loop hears of scrapes.
pub type Asks = mpsc::Receiver<oneshot::Sender<Box<Snapshot>>>;

/// Where the server gets its page.
#[derive(Debug)]
pub struct Exporter {
    asks: mpsc::Sender<oneshot::Sender<Box<Snapshot>>>,
    /// The last page. Held while the next is made, so that any number of scrapes asks the loop once.
    last: Mutex<Option<(Instant, Bytes)>>,
}

/// The two ends: the server's and the event loop's.
pub fn channel() -> (Exporter, Asks) {
    let (asks, asked) = mpsc::channel(1);
    (Exporter { asks, last: Mutex::default() }, asked)
}

/// Who asks for which of the two formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus' text format 0.0.4.
    Classic,
}

impl Format {
    /// By the request's Accept header: OpenMetrics only for those that name it.
    pub fn accepted(accept: &str) -> Self {
        let names =
            |part: &str| part.split(';').next().is_some_and(|t| t.trim() == "application/openmetrics-text");
        if accept.split(',').any(names) { Self::OpenMetrics } else { Self::Classic }
    }

    /// The Content-Type of the answer.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Classic => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

impl Exporter {
    /// The page, at most 250 ms old. `None` if the event loop does not answer within 5 s.
    pub async fn page(&self, format: Format) -> Option<Bytes> {
        // Waiting for those who asked before included, or a loop that hangs would collect scrapes.
        let page = timeout(PATIENCE, self.open_metrics()).await.ok()??;
        Some(match format {
            Format::OpenMetrics => page,
            Format::Classic => classic::from_open_metrics(std::str::from_utf8(&page).ok()?).into(),
        })
    }

    async fn open_metrics(&self) -> Option<Bytes> {
        let mut last = self.last.lock().await;
        if let Some((_, page)) = last.as_ref().filter(|(at, _)| at.elapsed() < FRESH) {
            return Some(page.clone());
        }
        let snapshot = self.snapshot().await?;
        let page = Bytes::from(prometheus::encode(snapshot.families())?);
        *last = Some((Instant::now(), page.clone()));
        Some(page)
    }

    /// How the gateway is now. `None` if the event loop does not answer within 5 s.
    async fn snapshot(&self) -> Option<Box<Snapshot>> {
        let (reply, answer) = oneshot::channel();
        let ask = async {
            self.asks.send(reply).await.ok()?;
            answer.await.ok()
        };
        timeout(PATIENCE, ask).await.ok()?
    }
}
