//! One turn of a worker's thread after the other: waits for devices, other workers, commands and deadlines, and feeds
//! the core batches.
//!
//! ```text
//! sleep(bell, rings, udp4, udp6, tun, deadline)
//!   -> commands                     before every batch, so that a revocation acts on the next packet
//!   -> rings                        of the fast path, if there is one; again before each batch from a socket
//!   -> moved clients, handovers     what reached other workers and is ours
//!   -> udp4, then udp6, then tun    each drained within a budget: the replay window bounds how far one path may
//!                                   run ahead of another
//!   -> timers -> flush -> events
//! ```
//!
//! Plain thread, no runtime: nothing else may delay a batch. The clock is read once per batch.

use std::{
    io::{self, ErrorKind},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use gateway_common::{Counters, DropReason};
use gateway_proto::{
    Command, Datagram, Handover, Route, Sink, WorkerEvent, WorkerId,
    worker::{Moved, Traffic, Worker},
};

use super::{
    coalesce::Writer,
    fast::Door,
    figures::Work,
    gso::Outlet,
    links::{Inbox, Outbox},
    poller::{Poller, Ready},
    queue::{Commands, Events},
    split::Reader,
    tun::Tun,
    udp::{Receiver, Sockets},
    worker_thread::Shared,
    xsk::{Fast, Refused, datagrams},
};
use crate::logging::REST;

/// All that one worker's thread has to do with.
pub struct Seat {
    /// Which worker it is.
    pub id: WorkerId,
    /// Its sockets.
    pub sockets: Sockets,
    /// Its queue of the TUN device.
    pub tun: Tun,
    /// What control says to it.
    pub commands: Arc<Commands>,
    /// What the workers say to control.
    pub events: Arc<Events>,
    /// What other workers pass to it.
    pub inbox: Inbox,
    /// What it passes to them.
    pub outbox: Outbox,
    /// Its sockets past the kernel's, if there are any.
    pub fast: Option<Fast>,
    /// Where others are put while it runs.
    pub door: Arc<Door>,
}

/// The life of the thread: until [`Command::Shutdown`] or an error.
pub fn run(core: impl Core, seat: Seat, shared: &Shared) -> Result<()> {
    let Seat { id, sockets, tun, commands, events, inbox, outbox, fast, door } = seat;
    let (tun, commands) = (&tun, &*commands);
    let now = Instant::now();
    let mut turn = Turn {
        core,
        out: Outgoing {
            tun: Writer::new(tun),
            v4: sockets.v4.map(Outlet::new),
            v6: sockets.v6.map(Outlet::new),
            outbox,
            fast,
            drops: Counters::default(),
            now,
            reserved: Exit::V4,
        },
        orders: Orders { commands, drained: Vec::new(), shut_down: false },
        inbox,
        receiver: Receiver::new(),
        reader: Reader::new(tun.has_headers()),
        socket_errors: 0,
        count_at: now,
    };
    let sockets = [&turn.out.v4, &turn.out.v6].into_iter().flatten().map(Outlet::socket);
    let mut poller = Poller::new(commands.wake(), tun, sockets).context("Failed to make an epoll set")?;
    for ring in turn.out.fast.iter().flat_map(Fast::wires) {
        poller.add_ring(ring).context("Failed to wait for an AF_XDP socket")?;
    }
    let mut spilled: Vec<WorkerEvent> = Vec::new();
    let mut reports_lost = 0;
    let (mut busy, mut ended) = (Duration::ZERO, now);
    loop {
        let ready = sleep(&mut poller, &turn.inbox, &turn.out, turn.deadline(), ended)?;
        shared.begin_turn();
        let began = Instant::now();
        turn.out.now = began;
        turn.take(&ready, tun)?;
        if let Some(next) = door.take() {
            turn.replace_fast(next, &poller)?;
            door.taken();
        }
        spilled.extend(std::iter::from_fn(|| turn.core.poll_event()));
        let refused = events.push(spilled.drain(..));
        turn.core.counters_mut().add(DropReason::ControlQueueFull, refused.others);
        reports_lost += refused.reports;
        let mut traffic = turn.core.traffic();
        traffic.flow_reports_lost += reports_lost;
        let (handed_over, given) = turn.out.outbox.passed();
        ended = Instant::now();
        busy += ended - began;
        shared.end_turn(turn.core.counters_mut(), &traffic, Work { busy, handed_over, given });
        if turn.orders.shut_down {
            turn.out.linger(Duration::from_millis(500));
            turn.say_how_it_ends(id);
            shared.say_all();
            return Ok(());
        }
    }
}

/// What the thread drives: the sans-IO worker, or a test's stand-in.
pub trait Core: Send + 'static {
    /// See [`Worker::handle_command`].
    fn handle_command(&mut self, command: Command, now: Instant, sink: &mut impl Sink);
    /// See [`Worker::handle_datagrams`].
    fn handle_datagrams<'a>(
        &mut self,
        batch: impl IntoIterator<Item = Datagram<'a>>,
        now: Instant,
        sink: &mut impl Sink,
    );
    /// See [`Worker::handle_packets`].
    fn handle_packets<'a>(
        &mut self,
        batch: impl IntoIterator<Item = &'a mut [u8]>,
        now: Instant,
        sink: &mut impl Sink,
    );
    /// See [`Worker::handle_handovers`].
    fn handle_handovers<'a>(
        &mut self,
        batch: impl IntoIterator<Item = Handover<'a>>,
        now: Instant,
        sink: &mut impl Sink,
    );
    /// See [`Worker::handle_moved`].
    fn handle_moved(&mut self, moved: Moved, now: Instant, sink: &mut impl Sink);
    /// See [`Worker::handle_timeout`].
    fn handle_timeout(&mut self, now: Instant, sink: &mut impl Sink);
    /// See [`Worker::poll_event`].
    fn poll_event(&mut self) -> Option<WorkerEvent>;
    /// See [`Worker::poll_timeout`].
    fn poll_timeout(&self) -> Option<Instant>;
    /// See [`Worker::counters_mut`].
    fn counters_mut(&mut self) -> &mut Counters;
    /// See [`Worker::traffic`].
    fn traffic(&self) -> Traffic;
}

impl Core for Worker {
    fn handle_command(&mut self, command: Command, now: Instant, sink: &mut impl Sink) {
        self.handle_command(command, now, sink);
    }
    fn handle_datagrams<'a>(
        &mut self,
        batch: impl IntoIterator<Item = Datagram<'a>>,
        now: Instant,
        sink: &mut impl Sink,
    ) {
        self.handle_datagrams(batch, now, sink);
    }
    fn handle_packets<'a>(
        &mut self,
        batch: impl IntoIterator<Item = &'a mut [u8]>,
        now: Instant,
        sink: &mut impl Sink,
    ) {
        self.handle_packets(batch, now, sink);
    }
    fn handle_handovers<'a>(
        &mut self,
        batch: impl IntoIterator<Item = Handover<'a>>,
        now: Instant,
        sink: &mut impl Sink,
    ) {
        self.handle_handovers(batch, now, sink);
    }
    fn handle_moved(&mut self, moved: Moved, now: Instant, sink: &mut impl Sink) {
        self.handle_moved(moved, now, sink);
    }
    fn handle_timeout(&mut self, now: Instant, sink: &mut impl Sink) {
        self.handle_timeout(now, sink);
    }
    fn poll_event(&mut self) -> Option<WorkerEvent> {
        self.poll_event()
    }
    fn poll_timeout(&self) -> Option<Instant> {
        self.poll_timeout()
    }
    fn counters_mut(&mut self) -> &mut Counters {
        self.counters_mut()
    }
    fn traffic(&self) -> Traffic {
        *self.traffic()
    }
}

/// Sleeps until something is to be done; `now` is when the turn before ended. A socket's writability is only waited for
/// while its outlet is blocked.
fn sleep(
    poller: &mut Poller,
    inbox: &Inbox,
    out: &Outgoing<'_>,
    deadline: Option<Instant>,
    now: Instant,
) -> io::Result<Ready> {
    for outlet in [&out.v4, &out.v6].into_iter().flatten() {
        poller.wait_for_room(outlet.socket(), outlet.is_blocked())?;
    }
    let limit = match inbox.fall_asleep() {
        true => Some(Duration::ZERO),
        false => deadline.map(|deadline| deadline.saturating_duration_since(now)),
    };
    let limit = match &out.fast {
        Some(fast) if fast.is_waiting() => Some(limit.map_or(MIN_SLEEP, |limit| limit.min(MIN_SLEEP))),
        _ => limit,
    };
    let ready = poller.sleep(limit);
    inbox.wake_up();
    ready
}

/// Everything the thread works with.
struct Turn<'a, C> {
    core: C,
    out: Outgoing<'a>,
    orders: Orders<'a>,
    inbox: Inbox,
    receiver: Receiver,
    reader: Reader,
    /// Failed receives in a row.
    socket_errors: u32,
    /// When the kernel is asked next what it has dropped on the fast path.
    count_at: Instant,
}

/// What control says.
struct Orders<'a> {
    commands: &'a Commands,
    drained: Vec<Command>,
    shut_down: bool,
}

/// Packets after which a turn goes on to the next socket or device, a few milliseconds of work: what counts is
/// packets, for one `recvmmsg` may bring 32 of them or 2048. It also bounds how far one path runs ahead of another.
const BUDGET: usize = 1024;
/// Packets that a worker takes from each other worker's ring in one turn, however many there are.
const MIN_SHARE: usize = 32;
/// Failed receives in a row after which a socket is given up.
const MAX_SOCKET_ERRORS: u32 = 1000;
/// The thread sleeps at least this long before a deadline that has passed already: a deadline that does not move is
/// a bug, but must not become a busy loop.
const MIN_SLEEP: Duration = Duration::from_millis(1);
/// How long frames that the kernel does not take may hold up the change to another fast path.
const LAST_FRAMES: Duration = Duration::from_millis(5);
/// How often the kernel is asked what it has dropped on the fast path.
const COUNT_INTERVAL: Duration = Duration::from_secs(1);

impl<C: Core> Turn<'_, C> {
    fn deadline(&self) -> Option<Instant> {
        self.core.poll_timeout().map(|deadline| deadline.max(self.out.now + MIN_SLEEP))
    }

    /// For who looks for a leak or a queue that grows: what is still in use or waits, which is nothing, and the most
    /// that ever waited.
    fn say_how_it_ends(&self, id: WorkerId) {
        let outlets = [&self.out.v4, &self.out.v6];
        let carried = self.core.traffic();
        tracing::debug!(
            target: REST,
            worker = %id,
            batches_in_use = outlets.into_iter().flatten().map(Outlet::batches_in_use).sum::<usize>(),
            packets_waiting = self.out.tun.waiting(),
            rings_waiting = self.inbox.rings_waiting(),
            mail_waiting = self.inbox.mail_waiting(),
            ring_bytes_most = self.inbox.ring_bytes_most(),
            commands_most = self.orders.commands.most(),
            outbound_packets = carried.outbound_direct.packets + carried.outbound_relayed.packets,
            "Worker at rest"
        );
    }

    fn take(&mut self, ready: &Ready, tun: &Tun) -> Result<()> {
        if ready.called {
            self.orders.commands.wake().clear();
        }
        self.begin_fast();
        self.orders.take(&mut self.core, &mut self.inbox, &mut self.out);
        if ready.v4_out || ready.v6_out {
            self.out.flush();
        }
        self.read_rings();
        self.take_handovers();
        for (family, waits) in [(Family::V4, ready.v4_in), (Family::V6, ready.v6_in)] {
            match waits {
                true => self.receive(family)?,
                false => self.on_empty(family),
            }
        }
        // What came into them while handovers were taken, or since they may be read again.
        self.read_rings();
        if ready.tun {
            self.read(tun)?;
        }
        if self.core.poll_timeout().is_some_and(|deadline| deadline <= self.out.now) {
            self.core.handle_timeout(self.out.now, &mut self.out);
        }
        self.end_batch();
        if let Some(fast) = &mut self.out.fast {
            fast.end_turn();
        }
        Ok(())
    }

    /// Another fast path, or none. What the rings of the old one hold is dealt with before it is closed; nothing comes
    /// into them any more.
    #[cold]
    fn replace_fast(&mut self, next: Option<Fast>, poller: &Poller) -> Result<()> {
        self.read_rings();
        self.end_batch();
        self.out.linger(LAST_FRAMES);
        if let Some(mut old) = self.out.fast.take() {
            old.count_drops(&mut self.out.drops);
        }
        for ring in next.iter().flat_map(Fast::wires) {
            poller.add_ring(ring).context("Failed to wait for an AF_XDP socket")?;
        }
        self.out.fast = next;
        self.end_batch();
        Ok(())
    }

    /// The fast path's part of a turn begins.
    fn begin_fast(&mut self) {
        let Some(fast) = &mut self.out.fast else { return };
        fast.begin_turn();
        fast.begin_batch();
        if self.count_at <= self.out.now {
            self.count_at = self.out.now + COUNT_INTERVAL;
            fast.count_drops(&mut self.out.drops);
        }
    }

    /// Everything that the rings hold now.
    fn read_rings(&mut self) {
        let ports = self.out.fast.as_ref().map_or(0, Fast::ports);
        for port in 0..ports {
            let Some(mut waiting) = self.out.fast.as_mut().map(|fast| fast.look(port)) else { return };
            while waiting > 0 {
                let Some(batch) = self.out.fast.as_mut().and_then(|fast| fast.receive(port)) else { break };
                waiting = waiting.saturating_sub(batch.len());
                self.begin_batch();
                let refused = Refused::default();
                self.core.handle_datagrams(datagrams(&batch, &refused), self.out.now, &mut self.out);
                refused.count(&mut self.out.drops);
                if let Some(fast) = &mut self.out.fast {
                    fast.recycle(port, batch);
                }
                self.end_batch();
            }
        }
    }

    fn on_empty(&mut self, family: Family) {
        if let Some(fast) = &mut self.out.fast {
            fast.on_empty(matches!(family, Family::V6));
        }
    }

    /// What other workers passed to this one: clients first, then a fair share of each one's packets.
    fn take_handovers(&mut self) {
        let rings = self.inbox.rings();
        for moved in self.inbox.look() {
            self.core.handle_moved(moved, self.out.now, &mut self.out);
        }
        let share = (BUDGET / rings.max(1)).max(MIN_SHARE);
        for ring in 0..rings {
            if !self.inbox.holds(ring) {
                continue;
            }
            self.core.handle_handovers(self.inbox.records(ring, share), self.out.now, &mut self.out);
            self.inbox.release(ring);
            self.end_batch();
            self.begin_batch();
        }
        if let Some(fast) = &mut self.out.fast {
            fast.on_passed(self.inbox.rings_waiting() > 0);
        }
    }

    fn receive(&mut self, family: Family) -> Result<()> {
        let mut taken = 0;
        loop {
            let outlet = match family {
                Family::V4 => &self.out.v4,
                Family::V6 => &self.out.v6,
            };
            let Some(outlet) = outlet else { return Ok(()) };
            let received = match self.receiver.recv(outlet.socket()) {
                Ok(received) => received,
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    self.on_empty(family);
                    return Ok(());
                }
                Err(e) => {
                    self.socket_errors += 1;
                    if self.socket_errors >= MAX_SOCKET_ERRORS {
                        return Err(e)
                            .with_context(|| format!("The {family:?} UDP socket cannot receive any more"));
                    }
                    tracing::debug!("Failed to receive on the {family:?} UDP socket: {e}");
                    return Ok(());
                }
            };
            self.socket_errors = 0;
            taken += received.count();
            let full = received.is_full();
            let more = full && taken < BUDGET;
            // Once more: what a client sends because of an answer of control's may have come in since, and the order
            // that control gave before it answered is about just that.
            self.orders.take(&mut self.core, &mut self.inbox, &mut self.out);
            let datagrams = received.datagrams(&mut self.out.drops);
            self.core.handle_datagrams(datagrams, self.out.now, &mut self.out);
            self.end_batch();
            if !full {
                self.on_empty(family);
            }
            if !more {
                return Ok(());
            }
            self.read_rings();
            self.begin_batch();
        }
    }

    fn read(&mut self, tun: &Tun) -> Result<()> {
        let mut taken = 0;
        loop {
            let more = self
                .reader
                .fill(|buffer| tun.read(buffer), &mut self.out.drops)
                .context("The TUN device is gone; was it deleted?")?;
            taken += self.reader.count();
            if self.reader.count() > 0 {
                self.core.handle_packets(self.reader.packets(), self.out.now, &mut self.out);
                self.end_batch();
            }
            if !more || taken >= BUDGET {
                return Ok(());
            }
            self.begin_batch();
        }
    }

    fn begin_batch(&mut self) {
        self.out.now = Instant::now();
        if let Some(fast) = &mut self.out.fast {
            fast.begin_batch();
        }
        self.orders.take(&mut self.core, &mut self.inbox, &mut self.out);
    }

    fn end_batch(&mut self) {
        self.out.flush();
        let drops = std::mem::take(&mut self.out.drops);
        self.core.counters_mut().merge(&drops);
    }
}

impl Orders<'_> {
    fn take(&mut self, core: &mut impl Core, inbox: &mut Inbox, out: &mut Outgoing<'_>) {
        self.commands.drain(&mut self.drained);
        for command in self.drained.drain(..) {
            if matches!(command, Command::Shutdown) {
                self.shut_down = true;
                // Clients that have just arrived hear the goodbye, too. (One that is given later, by a worker that
                // reads its commands later, does not; it finds out by its own timers.)
                for moved in inbox.look() {
                    core.handle_moved(moved, out.now, out);
                }
            }
            core.handle_command(command, out.now, out);
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Family {
    V4,
    V6,
}

/// The worker's ways out.
struct Outgoing<'a> {
    tun: Writer<&'a Tun>,
    v4: Option<Outlet>,
    v6: Option<Outlet>,
    outbox: Outbox,
    fast: Option<Fast>,
    drops: Counters,
    now: Instant,
    reserved: Exit,
}

/// By which way the datagram leaves that was reserved last.
#[derive(Clone, Copy)]
enum Exit {
    V4,
    V6,
    Fast,
}

impl Outgoing<'_> {
    fn flush(&mut self) {
        self.tun.flush(self.now, &mut self.drops);
        for outlet in [&mut self.v4, &mut self.v6].into_iter().flatten() {
            outlet.flush(self.now, &mut self.drops);
        }
        if let Some(fast) = &mut self.fast {
            fast.flush();
        }
        self.outbox.publish();
    }

    /// Sends what still waits, for at most `limit`: the last goodbyes, the last frames of a ring.
    fn linger(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        let waits = |out: &Self| {
            let blocked = [&out.v4, &out.v6].into_iter().flatten().any(Outlet::is_blocked);
            blocked || out.fast.as_ref().is_some_and(Fast::is_waiting)
        };
        while waits(self) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
            self.flush();
        }
    }
}

impl Sink for Outgoing<'_> {
    fn reserve_packet(&mut self, len: usize) -> Option<&mut [u8]> {
        self.tun.reserve(len, self.now, &mut self.drops)
    }

    fn commit_packet(&mut self, len: usize) {
        self.tun.commit(len, self.now);
    }

    fn reserve_datagram(&mut self, route: &Route, len: usize) -> Option<&mut [u8]> {
        if let Some(fast) = &mut self.fast
            && fast.prepare(route, len)
        {
            self.reserved = Exit::Fast;
            return fast.buffer();
        }
        let v6 = route.dst.is_ipv6();
        self.reserved = if v6 { Exit::V6 } else { Exit::V4 };
        let outlet = if v6 { &mut self.v6 } else { &mut self.v4 };
        outlet.as_mut()?.reserve(route, len, self.now, &mut self.drops)
    }

    fn commit_datagram(&mut self, len: usize) {
        let outlet = match self.reserved {
            Exit::V4 => &mut self.v4,
            Exit::V6 => &mut self.v6,
            Exit::Fast => {
                if let Some(fast) = &mut self.fast {
                    fast.commit(len);
                }
                return;
            }
        };
        if let Some(outlet) = outlet {
            outlet.commit(len);
        }
    }

    fn hand_over(&mut self, to: WorkerId, handover: &Handover<'_>) -> bool {
        self.outbox.hand_over(to, handover)
    }

    fn give(&mut self, to: WorkerId, moved: Moved) {
        self.outbox.give(to, moved);
    }
}
