//! Flow logs: what workers report about flows is printed, kept on disk and uploaded (cli-and-service.md section 14).
//!
//! ```text
//! control thread --orders--> flow-writer: print, spool --settings--> flow-upload: upload over http
//!                                            '---------- disk ----------'
//! ```
//!
//! Two threads, because a disk may be slow and a server away. They share nothing but the spool. Nothing here counts or
//! decides: which packets make a flow is the workers' business, whom it is attributed to the portal's.

mod figures;
mod http;
mod print;
mod record;
mod spool;
#[cfg(test)]
mod testkit;
mod upload;

use std::{
    fmt::Display,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use gateway_proto::{
    flow::{Attribution, DeniedReport, FlowReport},
    portal::messages,
};
use tokio::sync::{oneshot, watch};

pub use self::figures::Figures;
use self::{
    figures::Tally,
    http::{Http, Tls},
    spool::{Kept, Settings, Spool},
    upload::Uploader,
};
use crate::logging::REST;

/// Reports that may wait.
const REPORTS: usize = 10_000;
/// Orders of any kind that may wait: a token is worth more than a report, without it none of its reports is kept.
const ORDERS: usize = 20_000;
/// A loss is told the first time, and then each time that many more are lost.
const TELL_EACH: u64 = 1000;
/// How long [`FlowLogs::close`] waits for what is still to be written.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);
/// How much both threads stand back behind workers and the control thread where they share a core, as in nice(2).
const NICE: i32 = 5;

/// What flow logs need to know.
pub struct Config {
    /// Where the spool is.
    pub root: PathBuf,
    /// Whom to trust.
    pub tls: Arc<rustls::ClientConfig>,
    /// SO_MARK of the upload's sockets.
    pub mark: Option<u32>,
    /// Who we say we are.
    pub user_agent: String,
}

/// Both threads, from outside. They end when this is dropped.
#[derive(Debug)]
pub struct FlowLogs {
    orders: mpsc::Sender<Order>,
    waiting: Arc<AtomicUsize>,
    /// The most that ever waited.
    most: usize,
    lost: Losses,
    /// By the workers.
    lost_before: Losses,
    spool: Arc<Spool>,
    tally: Arc<Tally>,
    writer_ended: oneshot::Receiver<()>,
    upload_ended: oneshot::Receiver<()>,
}

#[derive(Debug)]
enum Order {
    Flow(Box<FlowReport>),
    Denied(Box<DeniedReport>),
    Token(Arc<Attribution>),
    Settings(Option<Settings>),
}

impl FlowLogs {
    /// Starts both threads. What is in the spool is uploaded from now on, to where the last run was told.
    ///
    /// # Errors
    /// There is no thread or no event queue to be had.
    pub fn start(config: Config) -> Result<Self> {
        let spool = Arc::new(Spool::new(config.root));
        let tally = Arc::<Tally>::default();
        let (orders, arriving) = mpsc::channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let (settings, wanted) = watch::channel(spool.settings());
        let (end, writer_ended) = oneshot::channel();
        let writer = Writer {
            spool: Arc::clone(&spool),
            tally: Arc::clone(&tally),
            settings,
            waiting: Arc::clone(&waiting),
            failures: Losses::new("Flow logs cannot be written to disk"),
            full: Losses::new("Flow logs are not kept for the upload"),
        };
        thread::Builder::new()
            .name("flow-writer".to_owned())
            .spawn(move || {
                stand_back();
                writer.run(&arriving);
                // Nobody waits for it where the daemon ends in a hurry.
                let _ = end.send(());
            })
            .context("Cannot start the thread that writes flow logs")?;
        let (end, upload_ended) = oneshot::channel();
        let http = Http::new(Tls::new(&config.tls, config.mark), config.user_agent);
        let uploader = Uploader::new(Arc::clone(&spool), Arc::clone(&tally), http, rand::random());
        let tokio = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("Cannot start the runtime that uploads flow logs")?;
        thread::Builder::new()
            .name("flow-upload".to_owned())
            .spawn(move || {
                stand_back();
                tokio.block_on(uploader.run(wanted));
                let _ = end.send(());
            })
            .context("Cannot start the thread that uploads flow logs")?;
        let lost = Losses::new("Flow logs are written too slowly");
        let lost_before = Losses::new("Flow logs come faster than they are taken from the workers");
        Ok(Self { orders, waiting, most: 0, lost, lost_before, spool, tally, writer_ended, upload_ended })
    }

    /// Prints and keeps a record. With more than 10 000 waiting it is lost, which is counted.
    pub fn record(&mut self, report: Box<FlowReport>) {
        self.order(Order::Flow(report), REPORTS);
    }

    /// Prints that packets were denied; lost like a record.
    pub fn denied(&mut self, report: Box<DeniedReport>) {
        self.order(Order::Denied(report), REPORTS);
    }

    /// The workers have lost this many reports so far, before they came here.
    pub fn lost_by_workers(&mut self, total: u64) {
        self.lost_before.rise_to(total, &"more came at once than there is room for");
    }

    /// Keeps the token that records of an authorization are uploaded under. Without it none of them is kept.
    pub fn token(&mut self, attribution: Arc<Attribution>) {
        self.order(Order::Token(attribution), ORDERS);
    }

    /// Uploads to where the portal says, or not at all.
    pub fn configure(&mut self, wanted: &messages::FlowLogs) {
        let settings = (wanted.upload_interval_secs > 0).then(|| Settings {
            api_url: wanted.api_url.clone(),
            interval: wanted.upload_interval_secs,
            batch_size: wanted.upload_batch_size,
        });
        self.order(Order::Settings(settings), ORDERS);
    }

    /// How it is now. Waits for no thread and no disk.
    pub fn figures(&self) -> Figures {
        Figures {
            waiting: self.waiting.load(Ordering::Relaxed),
            lost: self.lost.number,
            spool: self.spool.level(),
            ..self.tally.read()
        }
    }

    /// Ends both threads; waits until all reports are written, five seconds at most.
    pub async fn close(self) {
        drop(self.orders);
        let ended = async {
            let _ = self.writer_ended.await;
            let _ = self.upload_ended.await;
        };
        let in_time = tokio::time::timeout(CLOSE_LIMIT, ended).await.is_ok();
        let orders_waiting = self.waiting.load(Ordering::Relaxed);
        if !in_time {
            tracing::warn!(orders_waiting, "Flow logs could not all be written in time");
        }
        let (orders_most, lost, lost_before) = (self.most, self.lost.number, self.lost_before.number);
        tracing::debug!(target: REST, orders_waiting, orders_most, lost, lost_before, "Flow logs at rest");
    }

    fn order(&mut self, order: Order, limit: usize) {
        // Only we add; the writer takes away.
        let waiting = self.waiting.load(Ordering::Relaxed);
        if waiting >= limit {
            self.lost.count(&"more wait than there is room for");
            return;
        }
        self.most = self.most.max(waiting + 1);
        self.waiting.fetch_add(1, Ordering::Relaxed);
        if self.orders.send(order).is_err() {
            self.lost.count(&"the thread that writes them ended");
        }
    }
}

/// The thread that prints and writes.
struct Writer {
    spool: Arc<Spool>,
    tally: Arc<Tally>,
    settings: watch::Sender<Option<Settings>>,
    waiting: Arc<AtomicUsize>,
    failures: Losses,
    full: Losses,
}

impl Writer {
    fn run(mut self, orders: &mpsc::Receiver<Order>) {
        while let Ok(order) = orders.recv() {
            self.follow(order);
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }

    fn follow(&mut self, order: Order) {
        let result = match order {
            Order::Flow(report) => {
                print::flow(&report);
                self.spool.keep(&report).map(|kept| {
                    if kept == Kept::NoRoom {
                        self.full.count(&"as much waits as may; is the portal's endpoint reached?");
                        self.tally.no_room.store(self.full.number, Ordering::Relaxed);
                    }
                })
            }
            Order::Denied(report) => {
                print::denied(&report);
                Ok(())
            }
            Order::Token(attribution) => self.spool.keep_token(&attribution),
            // Nothing was wanted and nothing is: no reason to touch the disk.
            Order::Settings(None) if self.settings.borrow().is_none() => Ok(()),
            Order::Settings(settings) => {
                let result = self.spool.keep_settings(settings.as_ref());
                // On disk or not: it is where to upload. What does not change must not break off an upload.
                self.settings.send_if_modified(|now| {
                    let changes = *now != settings;
                    *now = settings;
                    changes
                });
                result
            }
        };
        if let Err(error) = result {
            self.failures.count(&format_args!("{}: {error}", self.spool.root().display()));
            self.tally.failed.store(self.failures.number, Ordering::Relaxed);
        }
    }
}

/// What was lost, and tells of it now and then.
#[derive(Debug)]
struct Losses {
    what: &'static str,
    number: u64,
}

impl Losses {
    fn new(what: &'static str) -> Self {
        Self { what, number: 0 }
    }

    fn count(&mut self, why: &dyn Display) {
        self.rise_to(self.number + 1, why);
    }

    /// `total` are lost by now.
    fn rise_to(&mut self, total: u64, why: &dyn Display) {
        // Told are the 1st, the 1001st, and so on.
        if total.div_ceil(TELL_EACH) > self.number.div_ceil(TELL_EACH) {
            tracing::warn!(lost = total, "{}: {why}", self.what);
        }
        self.number = self.number.max(total);
    }
}

/// Packets first. Of the calling thread, on Linux; being refused is no harm.
fn stand_back() {
    let _ = rustix::process::nice(NICE);
}

#[cfg(test)]
mod tests;
