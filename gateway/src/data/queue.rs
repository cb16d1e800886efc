//! The two queues between control and the workers: commands in, one for each, and events out, one for all.
//!
//! Commands describe state, so of two with one key only the later is kept, and none is ever dropped. Events have a
//! quota per kind, so that STUN or junk cannot crowd out what sessions have to say. Neither side ever waits for the
//! other; both locks are taken once per batch.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use gateway_proto::{Command, WorkerEvent, ids::ClientId};
use rustc_hash::FxHashMap;
use tokio::sync::Notify;

use super::wake::Wake;

/// Commands on their way to a worker, at most one per key, in the order of the latest of each key.
pub struct Commands {
    pending: Mutex<Pending>,
    /// Whether `pending` holds anything: lets a busy worker look before every batch without the lock.
    any: AtomicBool,
    /// How many `pending` holds; stored by who holds its lock.
    waiting: AtomicUsize,
    wake: Arc<Wake>,
}

impl Commands {
    /// An empty queue to the worker that `wake` wakes.
    pub fn new(wake: Arc<Wake>) -> Self {
        Self { pending: Mutex::default(), any: AtomicBool::new(false), waiting: AtomicUsize::new(0), wake }
    }

    /// Queues `command` in place of an earlier one with its key and wakes the worker. Never blocks, never drops.
    pub fn send(&self, command: Command) {
        let mut pending = lock(&self.pending);
        pending.put(command);
        self.waiting.store(pending.at.len(), Ordering::Relaxed);
        let was_any = self.any.swap(true, Ordering::Release);
        drop(pending);
        if !was_any {
            self.wake.ring();
        }
    }

    /// Moves everything that waits to the end of `into`; a [`Command::Shutdown`] comes last.
    pub fn drain(&self, into: &mut Vec<Command>) {
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        let mut pending = lock(&self.pending);
        self.any.store(false, Ordering::Release);
        self.waiting.store(0, Ordering::Relaxed);
        pending.take(into);
    }

    /// How many wait. Without the lock: who watches must not keep the worker waiting.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// The most that ever waited at once: at most one for each client, channel and kind.
    pub fn most(&self) -> usize {
        lock(&self.pending).most
    }

    /// What wakes the worker; to be cleared before [`Commands::drain`], never between drain and poll.
    pub fn wake(&self) -> &Wake {
        &self.wake
    }
}

#[derive(Default)]
struct Pending {
    order: Vec<Option<Command>>,
    at: FxHashMap<Key, usize>,
    most: usize,
}

#[derive(PartialEq, Eq, Hash, Clone, Copy)]
enum Key {
    OwnAddrs,
    Client(ClientId),
    Relays,
    Channel(SocketAddr, u16),
    Accounting,
    WallClock,
    Inquiry,
    Shutdown,
}

impl Pending {
    fn put(&mut self, command: Command) {
        if self.order.len() >= 64 && self.order.len() >= 2 * self.at.len() {
            self.compact();
        }
        let key = key_of(&command);
        if let Some(old) = self.at.insert(key, self.order.len()) {
            self.order[old] = None;
        }
        self.order.push(Some(command));
        self.most = self.most.max(self.at.len());
    }

    /// Forgets the places of replaced commands, so that a stuck worker costs memory per key, not per command.
    fn compact(&mut self) {
        self.order.retain(Option::is_some);
        for (i, command) in self.order.iter().enumerate() {
            if let Some(command) = command {
                self.at.insert(key_of(command), i);
            }
        }
    }

    fn take(&mut self, into: &mut Vec<Command>) {
        self.at.clear();
        let mut shutdown = None;
        for command in self.order.drain(..).flatten() {
            match command {
                Command::Shutdown => shutdown = Some(command),
                other => into.push(other),
            }
        }
        into.extend(shutdown);
    }
}

fn key_of(command: &Command) -> Key {
    match command {
        Command::OwnAddrs(_) => Key::OwnAddrs,
        Command::Client { id, .. } => Key::Client(*id),
        Command::Relays(_) => Key::Relays,
        Command::Channel { server, number, .. } => Key::Channel(*server, *number),
        Command::Accounting { .. } => Key::Accounting,
        Command::WallClock(_) => Key::WallClock,
        Command::Inquire(_) => Key::Inquiry,
        Command::Shutdown => Key::Shutdown,
    }
}

/// Events on their way to control: in order, with a quota per kind.
#[derive(Default)]
pub struct Events {
    pending: Mutex<Waiting>,
    notify: Notify,
}

/// How many events found no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Refused {
    /// Reports about flows and denied packets, whose packets are counted elsewhere.
    pub reports: u64,
    /// All others.
    pub others: u64,
}

impl Refused {
    fn count(&mut self, event: &WorkerEvent) {
        match event {
            WorkerEvent::Flow(_) | WorkerEvent::Denied(_) => self.reports += 1,
            _ => self.others += 1,
        }
    }
}

#[derive(Default)]
struct Waiting {
    events: VecDeque<WorkerEvent>,
    of_kind: [usize; KINDS],
    most: usize,
}

impl Events {
    /// Queues `events` as far as their quotas go and wakes control.
    pub fn push(&self, events: impl IntoIterator<Item = WorkerEvent>) -> Refused {
        let mut events = events.into_iter().peekable();
        if events.peek().is_none() {
            return Refused::default();
        }
        let mut refused = Refused::default();
        let mut waiting = lock(&self.pending);
        for event in events {
            let (kind, quota) = kind_of(&event);
            if waiting.of_kind[kind] < quota {
                waiting.of_kind[kind] += 1;
                waiting.events.push_back(event);
            } else {
                refused.count(&event);
            }
        }
        waiting.most = waiting.most.max(waiting.events.len());
        drop(waiting);
        self.notify.notify_one();
        refused
    }

    /// How many wait, and the most that ever did.
    pub fn waiting(&self) -> (usize, usize) {
        let waiting = lock(&self.pending);
        (waiting.events.len(), waiting.most)
    }

    /// Everything that waits.
    pub fn take(&self) -> Vec<WorkerEvent> {
        let mut waiting = lock(&self.pending);
        waiting.of_kind = [0; KINDS];
        waiting.events.drain(..).collect()
    }

    /// Wakes whoever waits in [`Events::notified`] without an event (the worker has ended).
    pub fn wake(&self) {
        self.notify.notify_one();
    }

    /// Completes after the next [`Events::push`] or [`Events::wake`], at once if there was one since the last time.
    pub async fn notified(&self) {
        self.notify.notified().await;
    }
}

const KINDS: usize = 11;

/// The place of an event's kind in the quota table, and how many of it may wait.
///
/// Session events are bounded by the number of clients, not by what strangers send: their quota only guards
/// against our own mistakes. STUN is what anybody may send; assignments have a budget per client and are repeated;
/// reports of flows are as many as clients open and close connections, and what is refused is lost.
fn kind_of(event: &WorkerEvent) -> (usize, usize) {
    match event {
        WorkerEvent::Stun(_) => (0, 1024),
        WorkerEvent::Established { .. } => (1, 65_536),
        WorkerEvent::Expired { .. } => (2, 65_536),
        WorkerEvent::Activity { .. } => (3, 65_536),
        WorkerEvent::Goodbye { .. } => (4, 65_536),
        WorkerEvent::ChannelsUsed(_) => (5, 64),
        WorkerEvent::Adopted { .. } => (6, 65_536),
        WorkerEvent::Assigned { .. } => (7, 4096),
        WorkerEvent::Flow(_) => (8, 20_000),
        WorkerEvent::Denied(_) => (9, 1024),
        // One of each worker; a few more of workers that were slow to answer an earlier question.
        WorkerEvent::Replied(_) => (10, 256),
    }
}

/// Nothing is left half-done under these locks, so a panic elsewhere does not make their contents wrong.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, time::Duration};

    use gateway_proto::{command::StunDatagram, ids::ConnectionIndex};
    use uuid::Uuid;

    use super::*;

    #[test]
    fn only_the_latest_command_of_each_key_is_kept_in_the_order_of_sending() {
        let queue = queue();
        queue.send(channel(1, Some(5)));
        queue.send(client(1));
        queue.send(Command::Shutdown);
        queue.send(channel(1, None));
        queue.send(client(2));
        queue.send(client(1));
        let mut out = Vec::new();
        queue.drain(&mut out);
        let got: Vec<String> = out.iter().map(brief).collect();
        assert_eq!(got, ["channel 1 gone", "client 2", "client 1", "shutdown"]);
        out.clear();
        queue.drain(&mut out);
        assert!(out.is_empty());
    }

    #[test]
    fn a_stuck_worker_costs_memory_per_key_only() {
        let queue = queue();
        for i in 0..100_000u32 {
            queue.send(client(u128::from(i % 10)));
        }
        assert!(lock(&queue.pending).order.len() <= 64);
        assert_eq!(queue.waiting(), 10);
        let mut out = Vec::new();
        queue.drain(&mut out);
        assert_eq!((queue.waiting(), queue.most()), (0, 10));
        assert_eq!(
            out.iter().map(brief).collect::<Vec<_>>(),
            (0..10).map(|i| format!("client {i}")).collect::<Vec<_>>()
        );
    }

    #[test]
    fn eventfd_is_readable_exactly_while_commands_wait() {
        let queue = queue();
        assert!(!readable(&queue));
        queue.send(client(1));
        queue.send(client(2));
        assert!(readable(&queue));
        queue.wake().clear();
        queue.drain(&mut Vec::new());
        assert!(!readable(&queue));
        queue.send(client(1));
        assert!(readable(&queue));
    }

    #[test]
    fn stun_does_not_crowd_out_session_events() {
        let queue = Events::default();
        assert_eq!(queue.push((0..5000).map(|_| stun())), Refused { reports: 0, others: 5000 - 1024 });
        let goodbye = WorkerEvent::Goodbye {
            id: ClientId(Uuid::nil()),
            index: ConnectionIndex::new(7).expect("7 fits 24 bits"),
        };
        assert_eq!(queue.push([goodbye]), Refused::default());
        assert_eq!(queue.waiting(), (1025, 1025));
        let got = queue.take();
        assert_eq!(got.len(), 1025);
        assert_eq!(queue.waiting(), (0, 1025));
        assert!(matches!(got.last(), Some(WorkerEvent::Goodbye { .. })));
        assert_eq!(queue.push([stun()]), Refused::default(), "the quota is free again");
    }

    #[test]
    fn assignments_reports_of_flows_and_denials_have_quotas_of_their_own() {
        let queue = Events::default();
        let [refused, reports] =
            [Refused { reports: 0, others: 5000 - 4096 }, Refused { reports: 2000 - 1024, others: 0 }];
        assert_eq!(queue.push((0..5000).map(|_| assigned())), refused);
        assert_eq!(queue.push((0..2000).map(|_| denied())), reports);
        assert_eq!(queue.push([stun()]), Refused::default());
        assert_eq!(queue.take().len(), 4096 + 1024 + 1);
        assert_eq!(queue.push([assigned(), denied()]), Refused::default(), "the quotas are free again");
    }

    #[test]
    fn accounting_and_clock_are_told_as_they_are_last() {
        let queue = queue();
        let clock = |seconds| {
            let unix = gateway_proto::flow::UnixTime(Duration::from_secs(seconds));
            Command::WallClock(gateway_proto::flow::Meeting { unix, at: std::time::Instant::now() })
        };
        for (on, seconds) in [(true, 1), (false, 2), (true, 3)] {
            queue.send(Command::Accounting { on });
            queue.send(clock(seconds));
        }
        let mut out = Vec::new();
        queue.drain(&mut out);
        assert!(matches!(out[..], [Command::Accounting { on: true }, Command::WallClock(last)]
            if last.unix.0.as_secs() == 3));
    }

    #[tokio::test]
    async fn control_is_woken_by_events_of_another_thread() {
        let queue = Arc::new(Events::default());
        let worker = queue.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            worker.push([stun()]);
        });
        tokio::time::timeout(Duration::from_secs(5), queue.notified()).await.expect("was woken");
        assert_eq!(queue.take().len(), 1);
    }

    fn queue() -> Commands {
        Commands::new(Arc::new(Wake::new().unwrap()))
    }

    fn client(n: u128) -> Command {
        Command::Client {
            id: ClientId(Uuid::from_u128(n)),
            home: gateway_proto::command::Home::at(gateway_proto::WorkerId::FIRST),
            desired: None,
        }
    }

    fn channel(number: u16, peer: Option<u16>) -> Command {
        let addr = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Command::Channel { server: addr(3478), number, peer: peer.map(addr) }
    }

    fn stun() -> WorkerEvent {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        WorkerEvent::Stun(StunDatagram {
            heard_by: gateway_proto::WorkerId::FIRST,
            local: addr,
            from: addr,
            via: None,
            payload: Vec::new(),
        })
    }

    fn assigned() -> WorkerEvent {
        let json = r#"{"resource":"2b6f3f0e-7a53-4d0b-9a4f-2f1f5d1f9a10","domain":"x.net","proxy_ips":[]}"#;
        let assigned = gateway_proto::names::AssignedIps::parse(json.as_bytes()).expect("well-formed");
        WorkerEvent::Assigned {
            id: ClientId(Uuid::nil()),
            index: ConnectionIndex::new(7).expect("7 fits 24 bits"),
            assigned: Box::new(assigned),
        }
    }

    fn denied() -> WorkerEvent {
        WorkerEvent::Denied(Box::new(gateway_proto::flow::DeniedReport {
            client: ClientId(Uuid::nil()),
            reason: gateway_common::DropReason::NotAllowed,
            protocol: 1,
            src: Ipv4Addr::LOCALHOST.into(),
            dst: Ipv4Addr::LOCALHOST.into(),
            ports: None,
            at: gateway_proto::flow::UnixTime(Duration::ZERO),
            suppressed: 0,
        }))
    }

    fn brief(command: &Command) -> String {
        match command {
            Command::Client { id, .. } => format!("client {}", id.0.as_u128()),
            Command::Channel { number, peer, .. } => {
                format!("channel {number} {}", if peer.is_some() { "bound" } else { "gone" })
            }
            Command::Shutdown => "shutdown".into(),
            other => format!("{other:?}"),
        }
    }

    fn readable(queue: &Commands) -> bool {
        let mut fds = [rustix::event::PollFd::new(queue.wake(), rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
    }
}
