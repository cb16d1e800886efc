//! The task that keeps the fast path on the right interface: looks, attaches, hands out, switches, and looks again when
//! something of that has changed.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::{pending, ready},
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use aya::programs::xdp::XdpLinkId;
use futures_util::{StreamExt as _, TryStreamExt as _};
use gateway_proto::Command;
use rtnetlink::{Handle, MulticastGroup, packet_route::address::AddressAttribute};
use tokio::{
    sync::{Notify, mpsc, oneshot},
    task::JoinHandle,
    time::MissedTickBehavior,
};

use super::{
    Order, Shared, Status,
    door::Door,
    open::{Opened, attempt},
};
use crate::data::{
    told::Kernel,
    xsk::{Board, Facts, Fast, Outcome, Stage, Switch, Wanted, Watch, Ways, facts, probe, route_interface},
};

/// Things are looked at at most this often, however often they change.
const CALM: Duration = Duration::from_millis(200);
/// How often they are looked at without a reason: the kernel drops what it tells to a socket that is full, and does not
/// tell everything.
const REPEAT: Duration = Duration::from_secs(30);
/// What the link of an interface does for so long after it was taken into use is of its own making.
const SETTLE: Duration = Duration::from_secs(5);
/// How long workers may take to do what they are asked. One that takes longer has come to a halt.
const PATIENCE: Duration = Duration::from_secs(5);

const GROUPS: [MulticastGroup; 7] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
];

/// The task.
pub(super) struct Manager {
    wanted: Wanted,
    kernel: Kernel,
    doors: Vec<Arc<Door>>,
    /// Ours, IPv4 and IPv6; 0 for a family that is not there.
    ports: (u16, u16),
    shared: Arc<Shared>,
    orders: mpsc::UnboundedReceiver<Order>,
    handle: Handle,
    /// The kernel has told something.
    changed: Arc<Notify>,
    /// What listens to it.
    listeners: [JoinHandle<()>; 2],
    look_at: Option<Instant>,
    /// The last that there were: between two lists nobody's route changes.
    relays: Arc<[SocketAddr]>,
    local: BTreeSet<SocketAddr>,
    /// What the operator says at run time.
    switched_on: bool,
    current: Option<Current>,
    /// Interfaces that were tried in vain, as they were.
    in_vain: BTreeMap<u32, Facts>,
    /// What was said about each interface last.
    said: BTreeMap<String, Outcome>,
}

/// The interface in use.
struct Current {
    facts: Facts,
    link: XdpLinkId,
    switch: Arc<Switch>,
    watch: JoinHandle<std::io::Result<()>>,
    on: bool,
    entered: Instant,
}

impl Manager {
    pub(super) fn new(
        wanted: Wanted,
        kernel: Kernel,
        doors: Vec<Arc<Door>>,
        ports: (u16, u16),
        shared: Arc<Shared>,
        orders: mpsc::UnboundedReceiver<Order>,
    ) -> Result<Self> {
        let (connection, handle, messages) =
            rtnetlink::new_multicast_connection(&GROUPS).context("Failed to open a netlink socket")?;
        let changed = Arc::new(Notify::new());
        let news = messages.for_each({
            let changed = Arc::clone(&changed);
            move |_| {
                changed.notify_one();
                ready(())
            }
        });
        shared.status().outcome = "off (no relay is known yet)".to_owned();
        Ok(Self {
            wanted,
            kernel,
            doors,
            ports,
            shared,
            orders,
            handle,
            changed,
            listeners: [tokio::spawn(connection), tokio::spawn(news)],
            look_at: None,
            relays: [].into(),
            local: BTreeSet::new(),
            switched_on: true,
            current: None,
            in_vain: BTreeMap::new(),
            said: BTreeMap::new(),
        })
    }

    pub(super) async fn run(mut self) {
        let mut repeat = tokio::time::interval(REPEAT);
        repeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let look_at = self.look_at;
            let calm = async {
                match look_at {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                order = self.orders.recv() => match order {
                    Some(Order::Relays(Command::Relays(relays))) => {
                        if !relays.is_empty() && relays != self.relays {
                            self.relays = relays;
                            self.look().await;
                        }
                    }
                    Some(Order::Relays(_)) => {}
                    Some(Order::Switch(on, reply)) => {
                        // Who asked may have gone.
                        let _gone = reply.send(self.switch(on).await);
                    }
                    Some(Order::Close(reply)) => return self.close(reply),
                    None => return,
                },
                () = self.changed.notified() => {
                    self.look_at.get_or_insert(Instant::now() + CALM);
                }
                () = calm => self.look().await,
                _ = repeat.tick() => self.look().await,
            }
        }
    }

    /// Makes everything as it should be now.
    async fn look(&mut self) {
        self.look_at = None;
        self.update_local().await;
        if self.relays.is_empty() || self.wanted == Wanted::Off {
            return;
        }
        let candidates = self.candidates().await;
        if let Some(current) = &self.current {
            let index = current.facts.index;
            let settling = current.entered + SETTLE;
            let change = match self.facts(index).await {
                // Many drivers reset their link when they get a program.
                Some(facts) if facts.up != current.facts.up && Instant::now() < settling => {
                    self.look_at = Some(settling);
                    None
                }
                _ if !candidates.contains(&index) => Some("no relay is reached through it any more"),
                Some(facts) => current.facts.change(&facts),
                None => Some("it is gone"),
            };
            if let Some(why) = change {
                tracing::info!("The fast path leaves {}: {why}", current.facts.name);
                self.leave().await;
            }
        }
        for index in candidates {
            if self.current.as_ref().is_some_and(|current| current.facts.index == index) {
                return;
            }
            let Some(facts) = self.facts(index).await else { continue };
            if self.current.is_some() || self.in_vain.get(&index) == Some(&facts) {
                continue;
            }
            self.enter(facts).await;
        }
        if self.current.is_none() && self.said.is_empty() {
            self.shared.status().outcome = "off (no relay is reached)".to_owned();
        }
    }

    /// By which interfaces the kernel sends to relays, the most used first.
    async fn candidates(&self) -> Vec<u32> {
        let mut uses: BTreeMap<u32, usize> = BTreeMap::new();
        let addresses: BTreeSet<IpAddr> = self.relays.iter().map(SocketAddr::ip).collect();
        for address in addresses {
            if let Some(index) = route_interface(&self.handle, address).await {
                *uses.entry(index).or_default() += 1;
            }
        }
        let mut candidates: Vec<u32> = uses.keys().copied().collect();
        candidates.sort_by_key(|index| std::cmp::Reverse(uses[index]));
        candidates
    }

    async fn facts(&self, index: u32) -> Option<Facts> {
        let mut facts = facts(&self.handle, index).await.ok()?;
        let ours = self.kernel.lock().plane.uplink_id();
        facts.program = facts.program.filter(|program| Some(*program) != ours);
        Some(facts)
    }

    /// Tries an interface, and switches the fast path on.
    async fn enter(&mut self, facts: Facts) {
        let (kernel, workers, wanted) = (self.kernel.clone(), self.doors.len(), self.wanted);
        let tried = facts.clone();
        // Opening waits while a queue is in use.
        let probed = tokio::task::spawn_blocking(move || {
            let mut opened = None;
            let outcome = probe(wanted, &tried, |mode| {
                opened = Some(attempt(&kernel, &tried, workers, mode)?);
                Ok(())
            });
            (outcome, opened)
        });
        let Ok((outcome, opened)) = probed.await else { return };
        self.say(&facts.name, &outcome);
        let Some(opened) = opened else {
            *self.shared.status() = Status { outcome: outcome.to_string(), ..Status::default() };
            self.in_vain.insert(facts.index, facts);
            return;
        };
        self.in_vain.remove(&facts.index);
        *self.shared.status() = Status {
            interface: Some(facts.name.clone()),
            mode: outcome.mode,
            outcome: outcome.to_string(),
            on: false,
        };
        if let Err(e) = self.hand_out(facts, opened).await {
            tracing::warn!("The fast path stays off: {e:#}");
        } else if self.switched_on
            && let Err(e) = self.turn_on().await
        {
            tracing::warn!("The fast path stays off: {e:#}");
        }
    }

    /// One line for each step down, and one for where it ended; only if that is news.
    fn say(&mut self, interface: &str, outcome: &Outcome) {
        if self.said.get(interface) == Some(outcome) {
            return;
        }
        self.said.insert(interface.to_owned(), outcome.clone());
        for (mode, reason) in &outcome.reasons {
            match mode {
                Some(mode) => tracing::info!("Fast path on {interface}: not {mode}: {reason}"),
                None => tracing::info!("Fast path on {interface}: {reason}"),
            }
        }
        match (outcome.mode, self.wanted) {
            (Some(mode), _) => tracing::info!("Fast path on {interface}: {mode}"),
            (None, Wanted::Exactly(mode)) => {
                tracing::warn!("Fast path: off, though {mode} is asked for; the sockets carry on");
            }
            (None, _) => tracing::info!("Fast path: off"),
        }
    }

    /// Each worker gets its ports.
    async fn hand_out(&mut self, facts: Facts, opened: Opened) -> Result<()> {
        let Opened { link, places } = opened;
        let board = Arc::new(Board::default());
        let watch = Watch::new(Arc::clone(&board), [facts.index]).map(|watch| tokio::spawn(watch.run()));
        let watch = match watch {
            Ok(watch) => watch,
            Err(e) => {
                self.kernel.lock().plane.detach_uplink(link)?;
                return Err(e).context("Failed to open a netlink socket");
            }
        };
        let switch = Arc::new(Switch::new(self.doors.len()));
        self.current = Some(Current {
            facts,
            link,
            switch: Arc::clone(&switch),
            watch,
            on: false,
            entered: Instant::now(),
        });
        for (worker, (door, places)) in self.doors.iter().zip(places).enumerate() {
            let ways = Ways::new(Arc::clone(&board), self.ports.0, self.ports.1);
            let fast = Fast::new(worker, places, ways, Arc::clone(&switch));
            door.put(fast.map(|fast| fast.counting_in(Arc::clone(&self.shared.figures[worker]))));
        }
        self.wait("take their AF_XDP sockets", |doors| doors.iter().all(|door| door.is_taken())).await
    }

    /// Nothing of it is in use any more.
    async fn leave(&mut self) {
        if let Err(e) = self.turn_off() {
            tracing::warn!("The fast path cannot be switched off: {e:#}");
        }
        let Some(current) = self.current.take() else { return };
        self.said.remove(&current.facts.name);
        current.watch.abort();
        self.doors.iter().for_each(|door| door.put(None));
        let given =
            self.wait("give their AF_XDP sockets", |doors| doors.iter().all(|door| door.is_taken())).await;
        if let Err(e) = given {
            tracing::warn!("{e:#}");
        }
        if let Err(e) = self.kernel.lock().plane.detach_uplink(current.link) {
            // The interface has gone, and the program with it.
            tracing::debug!("{e:#}");
        }
        *self.shared.status() =
            Status { outcome: format!("off ({} was left)", current.facts.name), ..Status::default() };
    }

    /// What the operator says.
    async fn switch(&mut self, on: bool) -> Result<bool> {
        if self.switched_on != on {
            tracing::info!("Fast path: the operator switches it {}", if on { "on" } else { "off" });
        }
        self.switched_on = on;
        if on { self.turn_on().await } else { self.turn_off().map(|()| false) }
    }

    /// What is in the sockets is read before what comes into the rings: see `xsk/order.rs`.
    async fn turn_on(&mut self) -> Result<bool> {
        let Some(current) = self.current.as_ref().filter(|current| !current.on) else {
            return Ok(self.current.is_some());
        };
        let switch = Arc::clone(&current.switch);
        switch.set(Stage::Hold);
        let held = self.wait("leave their rings alone", |_| switch.is_seen()).await;
        let enabled = held.and_then(|()| self.kernel.lock().enable(true));
        switch.send(matches!(enabled, Ok(true)));
        switch.set(Stage::Catch);
        let settled = self.wait("empty their sockets", |_| switch.is_settled()).await;
        let on = match settled.and(enabled) {
            Ok(on) => on,
            Err(e) => {
                self.turn_off()?;
                return Err(e);
            }
        };
        self.set_on(on);
        Ok(on)
    }

    /// The workers read their rings first, always: nothing has to be awaited.
    fn turn_off(&mut self) -> Result<()> {
        self.set_on(false);
        if let Some(current) = &self.current {
            current.switch.send(false);
        }
        self.kernel.lock().enable(false).map(drop)
    }

    fn set_on(&mut self, on: bool) {
        if let Some(current) = &mut self.current {
            current.on = on;
        }
        self.shared.status().on = on;
    }

    /// Wakes the workers until `done`.
    async fn wait(&self, what: &str, done: impl Fn(&[Arc<Door>]) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.doors.iter().for_each(|door| door.ring());
            if done(&self.doors) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                bail!("the workers did not {what} in {PATIENCE:?}");
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// LOCAL: every address of the namespace, with our ports.
    async fn update_local(&mut self) {
        let Some(addresses) = self.addresses().await else { return };
        let (v4, v6) = self.ports;
        let with_port = |ip: IpAddr| SocketAddr::new(ip, if ip.is_ipv4() { v4 } else { v6 });
        let new: BTreeSet<_> =
            addresses.into_iter().map(with_port).filter(|address| address.port() != 0).collect();
        let mut kernel = self.kernel.lock();
        if let Some(uplink) = &mut kernel.uplink {
            self.local.difference(&new).for_each(|gone| uplink.set_local(*gone, false));
            new.difference(&self.local).for_each(|added| uplink.set_local(*added, true));
        }
        drop(kernel);
        self.local = new;
    }

    /// `None` if the kernel does not say; what is known stays.
    async fn addresses(&self) -> Option<BTreeSet<IpAddr>> {
        let listed: Result<Vec<_>, _> = self.handle.address().get().execute().try_collect().await;
        let listed = listed.inspect_err(|e| tracing::debug!("Failed to list addresses: {e}")).ok()?;
        // On a link with two ends, IFA_LOCAL is ours and IFA_ADDRESS the other one's.
        let of = |attributes: &[AddressAttribute]| {
            let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| attributes.iter().find_map(wanted);
            find(|a| if let AddressAttribute::Local(ip) = a { Some(*ip) } else { None })
                .or_else(|| find(|a| if let AddressAttribute::Address(ip) = a { Some(*ip) } else { None }))
        };
        Some(listed.iter().filter_map(|message| of(&message.attributes)).collect())
    }

    fn close(mut self, reply: oneshot::Sender<()>) {
        // The kernel keeps nothing of it in any case: the link is this process's.
        if let Err(e) = self.turn_off() {
            tracing::debug!("{e:#}");
        }
        if let Some(current) = self.current.take() {
            current.watch.abort();
            if let Err(e) = self.kernel.lock().plane.detach_uplink(current.link) {
                tracing::debug!("{e:#}");
            }
        }
        // It waits for a limited time only.
        let _late = reply.send(());
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.listeners.iter().for_each(JoinHandle::abort);
        if let Some(current) = &self.current {
            current.watch.abort();
        }
    }
}
