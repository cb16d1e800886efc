//! A core without cryptography.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use gateway_common::{Counters, DropReason, channel_data};
use gateway_proto::{
    Command, Datagram, Handover, Passed, Route, Sink, WorkerEvent, WorkerId,
    command::StunDatagram,
    worker::{Moved, Traffic},
};

use crate::data::turn::Core;

/// A core without cryptography: every packet becomes a datagram to `route`, every datagram a packet.
///
/// Of several, each owns the flows whose ports say so and passes on what belongs to others.
#[derive(Clone)]
pub struct Pipe {
    pub id: WorkerId,
    pub workers: usize,
    pub route: Option<Route>,
    pub counters: Counters,
    pub turns: Arc<AtomicU64>,
    /// Packets and datagrams that came in, by their owners' count.
    pub seen: Arc<AtomicU64>,
    /// How many of them another worker passed.
    pub passed: Arc<AtomicU64>,
    /// What came in, in order: how many datagrams, and whether they were packets of the TUN device instead.
    pub batches: Arc<Mutex<Vec<(bool, usize)>>>,
    pub stuck_deadline: bool,
    pub on_command: Option<fn(&mut Self)>,
    pub events: Vec<WorkerEvent>,
    /// An event was made of the first datagram.
    pub told: bool,
    /// What datagrams look like.
    pub dress: Dress,
}

/// What stands in front of a packet in a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dress {
    /// Nothing.
    None,
    /// They look like WireGuard data of the connection [`Pipe::connection`].
    Data,
    /// The same on channel [`CHANNEL`].
    Relayed,
}

/// A channel's number.
pub const CHANNEL: u16 = 0x4001;
/// Type, receiver index and counter of WireGuard data.
const DATA: usize = 16;

impl Dress {
    fn len(self) -> usize {
        match self {
            Self::None => 0,
            Self::Data => DATA,
            Self::Relayed => channel_data::HEADER_LEN + DATA,
        }
    }

    /// Writes what stands in front of the packet that the rest of `datagram` is.
    fn put_on(self, datagram: &mut [u8], connection: u32) {
        let data = match self {
            Self::None => return,
            Self::Data => datagram,
            Self::Relayed => {
                let (header, data) = datagram.split_at_mut(channel_data::HEADER_LEN);
                header[..2].copy_from_slice(&CHANNEL.to_be_bytes());
                header[2..].copy_from_slice(&(data.len() as u16).to_be_bytes());
                data
            }
        };
        data[..DATA].fill(0);
        data[0] = 4;
        data[4..8].copy_from_slice(&(connection << 8).to_le_bytes());
    }
}

impl Pipe {
    pub fn new(route: Option<Route>) -> Self {
        Self {
            id: WorkerId::FIRST,
            workers: 1,
            route,
            counters: Counters::default(),
            turns: Arc::default(),
            seen: Arc::default(),
            passed: Arc::default(),
            batches: Arc::default(),
            stuck_deadline: false,
            on_command: None,
            events: Vec::new(),
            told: false,
            dress: Dress::None,
        }
    }

    /// The connection of what worker `worker` sends, when it is dressed.
    pub fn connection(worker: usize) -> u32 {
        worker as u32 + 1
    }

    /// Handles `what`, or passes it to the worker that owns the flow of `packet`.
    fn take(&mut self, packet: &[u8], what: Passed<'_>, sink: &mut impl Sink) {
        let owner = self.owner(packet);
        if owner == self.id {
            self.handle(what, sink);
        } else if !sink.hand_over(owner, &Handover { hops: 1, what }) {
            self.counters.count(DropReason::HandoverFull);
        }
    }

    fn owner(&self, packet: &[u8]) -> WorkerId {
        let ports = match packet.first() {
            Some(first) if first >> 4 == 6 => packet.get(40..44),
            _ => packet.get(20..24),
        };
        let Some(&[a, b, c, d]) = ports else { return self.id };
        let owner = Self::owner_of([u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])], self.workers);
        WorkerId::new(owner).expect("below 64")
    }

    /// Which of `workers` owns the flow between these ports, in either direction.
    pub fn owner_of([a, b]: [u16; 2], workers: usize) -> usize {
        let both = u32::from(a ^ b);
        usize::from((both.wrapping_mul(0x9e37_79b9) >> 16) as u16) % workers
    }

    fn handle(&mut self, what: Passed<'_>, sink: &mut impl Sink) {
        self.seen.fetch_add(1, Ordering::Relaxed);
        let done = match what {
            Passed::Packet(packet) => self.send(packet, sink),
            Passed::Datagram(datagram) | Passed::Initiation(datagram, _) => self.write(&datagram, sink),
        };
        if done.is_none() {
            self.counters.count(DropReason::Backpressure);
        }
    }

    fn send(&self, packet: &[u8], sink: &mut impl Sink) -> Option<()> {
        let len = self.dress.len() + packet.len();
        let buffer = sink.reserve_datagram(self.route.as_ref()?, len)?;
        buffer[self.dress.len()..len].copy_from_slice(packet);
        self.dress.put_on(&mut buffer[..len], Self::connection(self.id.get()));
        sink.commit_datagram(len);
        Some(())
    }

    fn write(&mut self, datagram: &Datagram<'_>, sink: &mut impl Sink) -> Option<()> {
        let Datagram { local, from, payload, .. } = *datagram;
        let payload = payload.get(self.dress.len()..)?;
        let buffer = sink.reserve_packet(payload.len())?;
        buffer[..payload.len()].copy_from_slice(payload);
        sink.commit_packet(payload.len());
        if !std::mem::replace(&mut self.told, true) {
            let (heard_by, via, payload) = (self.id, None, Vec::new());
            self.events.push(WorkerEvent::Stun(StunDatagram { heard_by, local, from, via, payload }));
        }
        Some(())
    }
}

impl Core for Pipe {
    fn handle_command(&mut self, command: Command, _: Instant, _: &mut impl Sink) {
        if let (Some(action), false) = (self.on_command, matches!(command, Command::Shutdown)) {
            action(self);
        }
    }

    fn handle_datagrams<'a>(
        &mut self,
        batch: impl IntoIterator<Item = Datagram<'a>>,
        _: Instant,
        sink: &mut impl Sink,
    ) {
        let mut count = 0;
        for datagram in batch {
            count += 1;
            let packet = datagram.payload.get(self.dress.len()..).unwrap_or_default();
            self.take(packet, Passed::Datagram(datagram), sink);
        }
        self.batches.lock().unwrap().push((false, count));
    }

    fn handle_packets<'a>(
        &mut self,
        batch: impl IntoIterator<Item = &'a mut [u8]>,
        _: Instant,
        sink: &mut impl Sink,
    ) {
        let mut count = 0;
        for packet in batch {
            count += 1;
            self.take(packet, Passed::Packet(packet), sink);
        }
        self.batches.lock().unwrap().push((true, count));
    }

    fn handle_handovers<'a>(
        &mut self,
        batch: impl IntoIterator<Item = Handover<'a>>,
        _: Instant,
        sink: &mut impl Sink,
    ) {
        for Handover { what, .. } in batch {
            self.passed.fetch_add(1, Ordering::Relaxed);
            self.handle(what, sink);
        }
    }

    fn handle_moved(&mut self, _: Moved, _: Instant, _: &mut impl Sink) {}

    fn handle_timeout(&mut self, _: Instant, _: &mut impl Sink) {}

    fn poll_event(&mut self) -> Option<WorkerEvent> {
        if self.events.is_empty() {
            self.turns.fetch_add(1, Ordering::Relaxed);
        }
        self.events.pop()
    }

    fn poll_timeout(&self) -> Option<Instant> {
        self.stuck_deadline.then(|| Instant::now() - Duration::from_millis(100))
    }

    fn counters_mut(&mut self) -> &mut Counters {
        &mut self.counters
    }

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}
