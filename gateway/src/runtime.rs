//! The life of the daemon: one loop on the control thread, one closed list of what can wake it.
//!
//! The loop moves messages; every decision is [`Control`]'s. It never waits for the network, the disk or netlink:
//! what takes time runs in a task of its own and comes back as a [`Wake`].

use std::{
    collections::BTreeSet,
    future::pending,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use gateway_common::Counters;
use gateway_proto::{
    WorkerEvent,
    addr::{TUNNEL_DNS_PORT, TunnelAddrs},
    control::{self, Control},
    names::{DomainName, Resolved},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::{Interval, MissedTickBehavior},
};

use crate::{
    clock,
    condition::Condition,
    data::{
        Capability, Closed, DataPlane,
        fast::FastPath,
        interface::{Families, Interface},
    },
    dns,
    flow_logs::FlowLogs,
    health::Readiness,
    logging::REST,
    metrics::{Asks, Snapshot},
    operator::{self, Ask, FastPathNow, Inquiries, Known, Overview},
    portal,
};

/// How often the counters are written to the log, if they changed.
const REPORT_INTERVAL: Duration = Duration::from_secs(60);
/// How long the portal's socket may take to close at the end.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);

/// Everything that can wake the loop.
enum Wake {
    Signal(&'static str),
    Portal(Option<portal::Event>),
    Workers(Result<Vec<WorkerEvent>>),
    Interface(Option<Result<()>>),
    Resolved(Option<(DomainName, Resolved)>),
    Deadline,
    ClockSet,
    Report,
    Scrape(oneshot::Sender<Box<Snapshot>>),
    Operator(Ask),
}

/// What the loop shares with those who watch it.
pub struct Watched {
    /// What is up.
    pub readiness: Arc<Readiness>,
    /// What the DNS servers count.
    pub dns: Arc<dns::Stats>,
    /// Scrapes.
    pub asks: Asks,
    /// Questions by the control socket.
    pub operator: operator::Asks,
}

/// What the loop owns.
pub struct Runtime {
    control: Control,
    data: DataPlane,
    portal: portal::Handle,
    portal_events: mpsc::Receiver<portal::Event>,
    interface: InterfaceTask,
    look_ups: dns::LookUps,
    flow_logs: FlowLogs,
    watched: Watched,
    inquiries: Inquiries,
    started: SystemTime,
    clock_steps: clock::Steps,
    interrupt: Signal,
    terminate: Signal,
    report: Interval,
    reported: Counters,
    /// The most of the portal's events that ever waited.
    portal_events_most: usize,
}

impl Runtime {
    /// Connects the parts and starts to dial the portal. With the flow logs comes whether flows are counted even where the
    /// portal wants nothing uploaded.
    ///
    /// # Errors
    /// When signal handlers, a timer or the netlink socket cannot be had, or the clock is before 1970.
    pub fn new(
        data: DataPlane,
        interface: Interface,
        (dns, look_ups): (dns::Handle, dns::LookUps),
        (flow_logs, log_flows): (FlowLogs, bool),
        portal: portal::Client,
        watched: Watched,
    ) -> Result<Self> {
        let unix_now = clock::unix_now();
        ensure!(!unix_now.is_zero(), "The system clock is before 1970; set it");
        let control = Control::new(control::Config {
            seed: rand::random(),
            unix_now,
            now: Instant::now(),
            workers: data.workers(),
            flow_logs: log_flows,
        });
        let inquiries = Inquiries::new(data.workers().count);
        let clock_steps = clock::Steps::watch()?;
        let interrupt = signal(SignalKind::interrupt()).context("Cannot listen for SIGINT")?;
        let terminate = signal(SignalKind::terminate()).context("Cannot listen for SIGTERM")?;
        let (portal, portal_events) = portal.start();
        let interface = InterfaceTask::spawn(interface, dns, Arc::clone(&watched.readiness));
        let mut report = tokio::time::interval(REPORT_INTERVAL);
        report.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let reported = Counters::default();
        Ok(Self {
            control,
            data,
            portal,
            portal_events,
            interface,
            look_ups,
            flow_logs,
            watched,
            inquiries,
            started: SystemTime::now(),
            clock_steps,
            interrupt,
            terminate,
            report,
            reported,
            portal_events_most: 0,
        })
    }

    /// Runs until a signal (`Ok`) or a fatal event (`Err`).
    ///
    /// # Errors
    /// Fatal are only: what the portal client calls fatal (token refused, partition too long, no right to mark
    /// sockets), a worker that ended or hangs, a TUN device that takes no address, DNS servers that cannot listen on it,
    /// and the end of their thread.
    pub async fn run(mut self) -> Result<()> {
        let result = loop {
            self.drain();
            self.portal_events_most = self.portal_events_most.max(self.portal_events.len());
            match self.sleep().await {
                Wake::Signal(name) => {
                    tracing::info!("Received {name}, shutting down");
                    break Ok(());
                }
                Wake::Portal(event) => {
                    if let Err(e) = self.on_portal(event) {
                        break Err(e);
                    }
                }
                Wake::Workers(Ok(events)) => {
                    let now = Instant::now();
                    let mut flows = false;
                    for event in events {
                        if let WorkerEvent::Replied(reply) = event {
                            self.inquiries.on_reply(*reply);
                            continue;
                        }
                        match log_flow(&mut self.flow_logs, event) {
                            Some(event) => self.control.handle_worker_event(event, now),
                            None => flows = true,
                        }
                    }
                    if flows {
                        self.flow_logs.lost_by_workers(self.data.flow_reports_lost());
                    }
                }
                // There is nobody left to say goodbye with.
                Wake::Workers(Err(e)) => {
                    self.flow_logs.close().await;
                    return Err(e);
                }
                Wake::Interface(result) => {
                    let ended = || Err(anyhow!("The task that configures the TUN device ended"));
                    if let Err(e) = result.unwrap_or_else(ended) {
                        break Err(e);
                    }
                }
                Wake::Resolved(Some((name, resolved))) => {
                    self.control.handle_resolved(&name, &resolved, Instant::now());
                }
                Wake::Resolved(None) => break Err(anyhow!("The DNS thread ended")),
                Wake::Deadline => {
                    let now = Instant::now();
                    self.control.handle_wall_clock(clock::unix_now(), now);
                    self.control.handle_timeout(now);
                }
                Wake::ClockSet => self.control.handle_wall_clock(clock::unix_now(), Instant::now()),
                Wake::Report => self.report_counters(),
                // A scrape that gave up is not waited for.
                Wake::Scrape(reply) => drop(reply.send(Box::new(self.snapshot()))),
                Wake::Operator(Ask::Overview(reply)) => drop(reply.send(Box::new(self.overview()))),
                Wake::Operator(Ask::Client(id, reply)) => {
                    let client = id.and_then(|id| self.control.client_view(id));
                    drop(reply.send(Known { client, own: *self.interface.wanted.borrow() }))
                }
                Wake::Operator(Ask::FastPath(reply)) => {
                    let switcher = self.data.fast_path().map(FastPath::switcher);
                    drop(reply.send(FastPathNow { status: self.data.fast_path_status(), switcher }))
                }
                Wake::Operator(Ask::Workers(question, reply)) => {
                    let command = self.inquiries.ask(question, reply);
                    self.data.send(command);
                }
            }
        };
        self.shut_down().await;
        result
    }

    async fn sleep(&mut self) -> Wake {
        let deadline = self.control.poll_timeout();
        tokio::select! {
            // Signals and the portal before the many: a revocation must not wait behind STUN.
            biased;
            _ = self.interrupt.recv() => Wake::Signal("SIGINT"),
            _ = self.terminate.recv() => Wake::Signal("SIGTERM"),
            event = self.portal_events.recv() => Wake::Portal(event),
            result = self.interface.results.recv() => Wake::Interface(result),
            found = self.look_ups.recv() => Wake::Resolved(found),
            // Four a second at most, and a flood is when somebody looks.
            Some(reply) = self.watched.asks.recv() => Wake::Scrape(reply),
            // 200 a second at most, and each is bounded.
            Some(ask) = self.watched.operator.recv() => Wake::Operator(ask),
            events = self.data.recv() => Wake::Workers(events),
            () = sleep_until(deadline) => Wake::Deadline,
            () = self.clock_steps.next() => Wake::ClockSet,
            _ = self.report.tick() => Wake::Report,
        }
    }

    /// Moves out what control decided, in the order its crate documents: a client that acts on an answer must find the
    /// workers knowing what control knew when it gave it.
    fn drain(&mut self) {
        while let Some(command) = self.control.poll_command() {
            self.data.send(command);
        }
        while let Some(transmit) = self.control.poll_transmit() {
            self.data.transmit(&transmit);
        }
        while let Some(egress) = self.control.poll_egress() {
            self.portal.send(egress);
        }
        while let Some(event) = self.control.poll_event() {
            match event {
                control::Event::Interface(addrs) => {
                    self.interface.wanted.send_replace(Some(addrs));
                }
                control::Event::FlowLogs(wanted) => self.flow_logs.configure(&wanted),
                control::Event::Resolve(name) => self.look_ups.resolve(name),
                control::Event::IngestToken(attribution) => self.flow_logs.token(attribution),
            }
        }
        self.watched.readiness.relay.set(self.control.is_relay_usable());
    }

    fn on_portal(&mut self, event: Option<portal::Event>) -> Result<()> {
        let now = Instant::now();
        match event.ok_or_else(|| anyhow!("The portal client ended without a reason"))? {
            portal::Event::Connected { generation } => {
                tracing::debug!(?generation, "Joined the portal's channel");
                self.watched.readiness.on_portal_joined();
                self.control.handle_portal_connected(now);
            }
            portal::Event::Ingress(message) => self.control.handle_ingress(message, now),
            portal::Event::Disconnected { reason, retry_in } => {
                tracing::debug!(?retry_in, "Away from the portal: {reason}");
                self.watched.readiness.on_portal_failed();
                self.control.handle_portal_disconnected(now);
            }
            portal::Event::Fatal(e) => return Err(e),
        }
        Ok(())
    }

    /// For a scrape.
    fn snapshot(&self) -> Snapshot {
        let in_use = self.data.in_use();
        Snapshot {
            started: self.started,
            workers: self.data.worker_states(),
            clients_by_worker: self.control.clients_by_worker().collect(),
            worker_drops: self.data.own_drops(),
            control_drops: self.control.counters(),
            status: self.control.status(),
            depths: self.control.depths(),
            relay_rtts: self.control.relay_rtts().collect(),
            worker_events_waiting: self.data.events_waiting().0,
            portal_events_waiting: self.portal_events.len(),
            flow_logs: self.flow_logs.figures(),
            dns: Arc::clone(&self.watched.dns),
            readiness: Arc::clone(&self.watched.readiness),
            capabilities: Capability::ALL.iter().map(|one| (*one, in_use.has(*one))).collect(),
            left_out: self.data.left_out(),
            kernel_drops: self.data.kernel_drops(),
            frames: self.data.frame_outcomes(),
            fast_path: self.data.fast_path().map(|fast| (fast.status(), fast.carried())),
        }
    }

    /// For an operator.
    fn overview(&self) -> Overview {
        let lacking = self.data.in_use().lacking();
        Overview {
            snapshot: self.snapshot(),
            clients: self.control.client_views(operator::MAX_CLIENTS),
            relays: self.control.relay_views(),
            own: *self.interface.wanted.borrow(),
            fast_path: self.data.fast_path_status(),
            missing: lacking.map(|(what, why)| (what.word().to_owned(), why.to_owned())).collect(),
        }
    }

    /// What was dropped, by reason, since the last report.
    fn report_counters(&mut self) {
        let mut now = self.control.counters();
        now.merge(&self.data.counters());
        for (reason, packets) in now.iter() {
            let before = self.reported.get(reason);
            if packets > before {
                tracing::debug!(
                    reason = reason.label(),
                    packets = packets - before,
                    total = packets,
                    "Dropped"
                );
            }
        }
        self.reported = now;
        let mut left_out = self.data.left_out();
        left_out.retain(|(_, entries)| *entries > 0);
        if !left_out.is_empty() {
            tracing::debug!(?left_out, "The kernel's maps do not hold all");
        }
    }

    /// For who looks for a queue or a table that grows. What control still has to tell is nothing; what the workers and
    /// the portal have told since is under way, but bounded.
    fn say_how_it_ends(&self) {
        let depths = self.control.depths();
        let (events_waiting, events_most) = self.data.events_waiting();
        tracing::debug!(
            target: REST,
            to_workers = depths.to_workers,
            to_network = depths.to_network,
            to_portal = depths.to_portal,
            to_shell = depths.to_shell,
            from_relays = depths.from_relays,
            parked = depths.parked,
            resolving = depths.resolving,
            early = depths.early,
            clients = depths.clients,
            indices = depths.indices,
            usernames = depths.usernames,
            timers = depths.timers,
            homes = depths.homes,
            events_waiting,
            events_most,
            portal_events_waiting = self.portal_events.len(),
            portal_events_most = self.portal_events_most,
            "Control at rest"
        );
    }

    async fn shut_down(mut self) {
        self.control.shutdown(Instant::now());
        self.drain();
        self.report_counters();
        let (mut outbound, mut inbound) = (0, 0);
        for (worker, carried) in self.data.traffic() {
            let of_worker = (
                carried.outbound_direct.packets + carried.outbound_relayed.packets,
                carried.inbound_direct.packets + carried.inbound_relayed.packets,
            );
            tracing::debug!(%worker, outbound_packets = of_worker.0, inbound_packets = of_worker.1, "Carried");
            (outbound, inbound) = (outbound + of_worker.0, inbound + of_worker.1);
        }
        tracing::info!(
            outbound_packets = outbound,
            inbound_packets = inbound,
            dropped_packets = self.reported.iter().map(|(_, packets)| packets).sum::<u64>(),
            "Carried in all"
        );
        self.say_how_it_ends();
        self.portal.close();
        // Of what the workers tell last only reports matter: control has nothing left to decide.
        let Closed { events, flow_reports_lost, result } = self.data.close().await;
        for event in events {
            log_flow(&mut self.flow_logs, event);
        }
        self.flow_logs.lost_by_workers(flow_reports_lost);
        if let Err(e) = result {
            tracing::warn!("The data plane did not close cleanly: {e:#}");
        }
        tokio::join!(self.interface.remove(), self.flow_logs.close());
        // Closing is polite, not needed: the portal notices a lost connection by itself.
        let closed = async { while self.portal_events.recv().await.is_some() {} };
        let _ = tokio::time::timeout(CLOSE_LIMIT, closed).await;
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => pending().await,
    }
}

/// Takes what is for the flow logs, where control has nothing to decide, and gives the rest back.
fn log_flow(flow_logs: &mut FlowLogs, event: WorkerEvent) -> Option<WorkerEvent> {
    match event {
        WorkerEvent::Flow(report) => flow_logs.record(report),
        WorkerEvent::Denied(report) => flow_logs.denied(report),
        event => return Some(event),
    }
    None
}

/// Netlink work and then the DNS servers' addresses, off the loop: it always works towards the latest addresses it was
/// told.
struct InterfaceTask {
    wanted: watch::Sender<Option<TunnelAddrs>>,
    results: mpsc::Receiver<Result<()>>,
    task: JoinHandle<(Interface, dns::Handle)>,
}

impl InterfaceTask {
    fn spawn(mut interface: Interface, dns: dns::Handle, readiness: Arc<Readiness>) -> Self {
        let (wanted, mut changes) = watch::channel::<Option<TunnelAddrs>>(None);
        let (done, results) = mpsc::channel(1);
        let task = tokio::spawn(async move {
            while changes.changed().await.is_ok() {
                let Some(addrs) = *changes.borrow_and_update() else { continue };
                if done.send(configure(&mut interface, &dns, &readiness.tun, addrs).await).await.is_err() {
                    break;
                }
            }
            (interface, dns)
        });
        Self { wanted, results, task }
    }

    async fn remove(self) {
        drop((self.wanted, self.results));
        if let Ok((interface, dns)) = self.task.await {
            dns.close().await;
            interface.remove().await;
        }
    }
}

async fn configure(
    interface: &mut Interface,
    dns: &dns::Handle,
    is_up: &Condition,
    addrs: TunnelAddrs,
) -> Result<()> {
    let families = interface.configure(addrs).await?;
    if !is_up.holds() {
        tracing::info!(?families, "Tunnel interface is up");
    }
    is_up.set(true);
    let own: &[IpAddr] = match families {
        Families::Dual => &[addrs.v4.into(), addrs.v6.into()],
        Families::V4Only => &[addrs.v4.into()],
        Families::V6Only => &[addrs.v6.into()],
    };
    let listen: BTreeSet<SocketAddr> = own.iter().map(|ip| SocketAddr::new(*ip, TUNNEL_DNS_PORT)).collect();
    dns.listen(listen).await
}
