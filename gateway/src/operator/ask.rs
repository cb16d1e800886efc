//! The way of a question from a connection to the event loop, and through it to the workers.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use gateway_proto::{
    ClientId, Command,
    addr::TunnelAddrs,
    control::ClientView,
    inquiry::{Answer, Inquiry, Question, Reply},
    relay::RelayView,
};
use tokio::{
    sync::{Mutex, mpsc, oneshot},
    time::timeout,
};

use crate::{data::fast, metrics::Snapshot};

/// For how long the event loop or a worker may leave a question waiting. A worker that is busy for 2 s ends the process.
const PATIENCE: Duration = Duration::from_secs(4);
/// Between two questions: packets come first.
const PACE: Duration = Duration::from_millis(5);
/// Clients that one status tells of.
pub const MAX_CLIENTS: usize = 10_000;

/// What the event loop knows.
#[derive(Debug)]
pub struct Overview {
    /// As for a scrape.
    pub snapshot: Snapshot,
    /// At most [`MAX_CLIENTS`], in no order.
    pub clients: Vec<ClientView>,
    /// All of them.
    pub relays: Vec<RelayView>,
    /// The gateway's own addresses, once the portal said.
    pub own: Option<TunnelAddrs>,
    /// The fast path.
    pub fast_path: fast::Status,
    /// What each capability lacks that is allowed and not in use.
    pub missing: Vec<(String, String)>,
}

/// What the event loop is asked.
#[derive(Debug)]
pub enum Ask {
    /// What it knows itself.
    Overview(oneshot::Sender<Box<Overview>>),
    /// What the workers know.
    Workers(Question, oneshot::Sender<Vec<Answer>>),
    /// One client, if it is asked for, and who the gateway is.
    Client(Option<ClientId>, oneshot::Sender<Known>),
    /// How the fast path is.
    FastPath(oneshot::Sender<FastPathNow>),
}

/// What `why` has to know besides the workers' verdict.
#[derive(Debug)]
pub struct Known {
    /// Who was asked for; `None` if nobody was, or it has gone.
    pub client: Option<ClientView>,
    /// The gateway's own addresses, once the portal said.
    pub own: Option<TunnelAddrs>,
}

/// The fast path at this moment.
#[derive(Debug)]
pub struct FastPathNow {
    /// How it is.
    pub status: fast::Status,
    /// By what it can be switched; `None` if there is none.
    pub switcher: Option<fast::Switcher>,
}

/// Where the event loop hears of questions.
pub type Asks = mpsc::Receiver<Ask>;

/// The connections' end. One question is under way at a time.
#[derive(Debug, Clone)]
pub struct Asker(Arc<Turn>);

#[derive(Debug)]
struct Turn {
    asks: mpsc::Sender<Ask>,
    /// When the last question was asked.
    last: Mutex<Option<Instant>>,
}

/// The two ends.
pub fn channel() -> (Asker, Asks) {
    let (asks, asked) = mpsc::channel(1);
    (Asker(Arc::new(Turn { asks, last: Mutex::default() })), asked)
}

impl Asker {
    /// What the event loop knows. `None` if it does not answer in time.
    pub async fn overview(&self) -> Option<Box<Overview>> {
        self.ask(Ask::Overview).await
    }

    /// What all workers say. `None` if one of them does not answer in time.
    pub async fn workers(&self, question: Question) -> Option<Vec<Answer>> {
        self.ask(|reply| Ask::Workers(question, reply)).await
    }

    /// One client, and who the gateway is. `None` if the event loop does not answer in time.
    pub async fn client(&self, id: Option<ClientId>) -> Option<Known> {
        self.ask(|reply| Ask::Client(id, reply)).await
    }

    /// The fast path. `None` if the event loop does not answer in time.
    pub async fn fast_path(&self) -> Option<FastPathNow> {
        self.ask(Ask::FastPath).await
    }

    async fn ask<T>(&self, ask: impl FnOnce(oneshot::Sender<T>) -> Ask) -> Option<T> {
        let answer = async {
            let mut last = self.0.last.lock().await;
            if let Some(wait) = last.and_then(|last| PACE.checked_sub(last.elapsed())) {
                tokio::time::sleep(wait).await;
            }
            let (reply, answer) = oneshot::channel();
            self.0.asks.send(ask(reply)).await.ok()?;
            let answer = answer.await.ok();
            *last = Some(Instant::now());
            answer
        };
        timeout(PATIENCE, answer).await.ok()?
    }
}

/// The event loop's side of questions to workers: joins what they answer.
#[derive(Debug)]
pub struct Inquiries {
    workers: usize,
    serial: u64,
    under_way: Option<(Vec<Answer>, oneshot::Sender<Vec<Answer>>)>,
}

impl Inquiries {
    /// None yet.
    pub fn new(workers: usize) -> Self {
        Self { workers, serial: 0, under_way: None }
    }

    /// Every worker is to be told this. One that was not answered by all is given up: whoever asked does not wait any
    /// more.
    pub fn ask(&mut self, question: Question, reply: oneshot::Sender<Vec<Answer>>) -> Command {
        self.serial += 1;
        self.under_way = Some((Vec::with_capacity(self.workers), reply));
        Command::Inquire(Inquiry { serial: self.serial, question })
    }

    /// A worker has answered.
    pub fn on_reply(&mut self, reply: Reply) {
        let Some((answers, _)) = self.under_way.as_mut().filter(|_| reply.serial == self.serial) else {
            return;
        };
        answers.push(reply.answer);
        if answers.len() >= self.workers
            && let Some((answers, waiting)) = self.under_way.take()
        {
            // Whoever gave up is not waited for.
            let _ = waiting.send(answers);
        }
    }
}

#[cfg(test)]
mod tests {
    use gateway_proto::WorkerId;

    use super::*;

    fn reply(worker: usize, command: &Command, places: u32) -> Reply {
        let Command::Inquire(inquiry) = command else { panic!("{command:?}") };
        let answer = Answer::Clients { clients: Vec::new(), places };
        Reply { worker: WorkerId::new(worker).unwrap(), serial: inquiry.serial, answer }
    }

    #[test]
    fn an_answer_is_complete_when_every_worker_has_said_something_about_this_question() {
        let mut inquiries = Inquiries::new(2);
        let question = Question::Clients { from: 0 };
        let (given_up, forgotten) = oneshot::channel();
        let old = inquiries.ask(question, given_up);
        drop(forgotten);
        inquiries.on_reply(reply(0, &old, 1));
        let (waiting, mut answer) = oneshot::channel();
        let new = inquiries.ask(question, waiting);
        // A worker that was slow answers the former question only now.
        inquiries.on_reply(reply(1, &old, 2));
        inquiries.on_reply(reply(0, &new, 3));
        assert!(answer.try_recv().is_err());
        inquiries.on_reply(reply(1, &new, 4));
        let places: Vec<_> = answer
            .try_recv()
            .unwrap()
            .into_iter()
            .map(|answer| match answer {
                Answer::Clients { places, .. } => places,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(places, [3, 4]);
        inquiries.on_reply(reply(1, &new, 5));
    }

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_hangs_is_not_waited_for_forever_and_neither_is_whoever_waits_for_it() {
        let (asker, _asks) = channel();
        let other = asker.clone();
        let both = tokio::join!(asker.overview(), other.workers(Question::Clients { from: 0 }));
        assert!(both.0.is_none() && both.1.is_none());
    }
}
