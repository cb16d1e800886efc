//! Random histories of several workers, with commands, clients and packets that are late: who holds what, and that
//! nothing is lost, counted twice, reordered or passed for ever. The sessions are real.
//!
//! `GATEWAY_MODEL_STEPS` sets the steps of each history, `GATEWAY_MODEL_SEEDS` how many histories there are.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::SmallRng};

use super::{
    super::{control_packet, peers::Entry},
    fleet::*,
    *,
};
use crate::{ClientId, ConnectionIndex, command::Home, flow::FlowId};

const STEPS: u64 = 1500;
const SEEDS: u64 = 24;
const CLIENTS: u8 = 6;
/// No worker is further behind than this, of the 2 s after which it would be ended: half of the shortest time between two
/// moves of one client.
const BEHIND: Duration = Duration::from_millis(450);
/// The shortest time between two moves of one client, see `control/placement.rs`.
const BETWEEN_MOVES: Duration = Duration::from_secs(1);

#[test]
fn random_histories_keep_every_invariant() {
    let from_env = |name, default| std::env::var(name).map_or(default, |n| n.parse().expect("a number"));
    let mut passed = 0;
    for seed in 0..from_env("GATEWAY_MODEL_SEEDS", SEEDS) {
        passed += Model::new(seed).run(from_env("GATEWAY_MODEL_STEPS", STEPS));
    }
    assert!(passed > 1000, "the histories are worth their time: {passed}");
}

struct Model {
    seed: u64,
    random: SmallRng,
    fleet: Fleet,
    subjects: Vec<Subject>,
    /// Control's numbers: of decisions, of changes.
    orders: u64,
    changes: u64,
    /// Subjects that the workers have not been told of since they changed.
    dirty: VecDeque<usize>,
    indices: u32,
    /// Packets that must arrive, by their numbers.
    expected: BTreeMap<u64, usize>,
    sent: u64,
    arrived: u64,
    /// When each worker last did all it had to do.
    diligent: Vec<Instant>,
    /// Flows that began and have not ended, and the packets of those that have.
    open: HashSet<(ClientId, FlowId)>,
    accounted: u64,
}

/// A client, as the model sees it from all sides.
struct Subject {
    wg: Client,
    /// Where its packets come from.
    port: u16,
    /// All its packets enter here, if anywhere in particular.
    entry: Option<usize>,
    /// Its home, or the last one it had.
    home: Home,
    is_connected: bool,
    /// What control says; `None` if it does not know the client.
    desired: Option<Arc<ClientState>>,
    moved: Instant,
    /// The last change of anything, and the last one that may lose packets.
    changed: u64,
    broken: u64,
    /// It believes to have a session of the connection it has now.
    session: bool,
    /// So does its worker.
    established: bool,
    said_goodbye: bool,
    /// Its initiations so far that were not answered.
    asked: u32,
    /// The last packet of an undisturbed time that arrived, by direction: its change and its number.
    last: HashMap<bool, (u64, u64)>,
}

impl Model {
    fn new(seed: u64) -> Self {
        let mut random = SmallRng::seed_from_u64(seed);
        let workers = random.random_range(2..=4);
        let mut fleet = Fleet::new(workers);
        let subjects = (1..=CLIENTS)
            .map(|n| {
                let mut wg = Fleet::client(n);
                wg.relayed = n % 3 == 0;
                Subject {
                    wg,
                    port: 1,
                    entry: (n % 2 == 0).then(|| random.random_range(0..workers)),
                    home: at(0, 0),
                    is_connected: false,
                    desired: None,
                    moved: fleet.now,
                    changed: 0,
                    broken: 0,
                    session: false,
                    established: false,
                    said_goodbye: false,
                    asked: 0,
                    last: HashMap::new(),
                }
            })
            .collect();
        for n in 1..=CLIENTS {
            let peer = Some(SocketAddr::from(([198, 51, 100, n], 9)));
            fleet.tell(Command::Channel { server: addr(SERVER), number: channel(n), peer });
        }
        fleet.account();
        let diligent = vec![fleet.now; workers];
        Self {
            seed,
            random,
            fleet,
            subjects,
            orders: 0,
            changes: 0,
            dirty: VecDeque::new(),
            indices: 1,
            expected: BTreeMap::new(),
            sent: 0,
            arrived: 0,
            diligent,
            open: HashSet::new(),
            accounted: 0,
        }
    }

    fn run(mut self, steps: u64) -> u64 {
        for step in 0..steps {
            self.step();
            if step % 32 == 0 {
                self.check_always();
            }
            if step % 500 == 499 || step + 1 == steps {
                self.rest();
                self.check_at_rest();
            }
        }
        self.check_flows();
        self.arrived
    }

    fn step(&mut self) {
        self.fleet.advance(Duration::from_millis(self.random.random_range(0..8)));
        let n = self.random.random_range(0..self.subjects.len());
        match self.random.random_range(0..100) {
            0..26 => self.client_sends(n),
            26..48 => self.resource_sends(n),
            48..58 => self.client_asks(n),
            58..80 => self.worker_works(),
            80..88 => self.control_works(),
            88..92 => self.order_move(n),
            92..94 => self.junk(),
            94..96 => self.new_path(n),
            _ => self.change(n),
        }
        for worker in 0..self.fleet.nodes.len() {
            if self.fleet.now - self.diligent[worker] >= BEHIND {
                self.tell_all();
                self.works_fully(worker);
            }
        }
    }

    // What clients and resources do.

    fn entry(&mut self, n: usize) -> usize {
        let workers = self.fleet.nodes.len();
        self.subjects[n].entry.unwrap_or_else(|| self.random.random_range(0..workers))
    }

    fn client_sends(&mut self, n: usize) {
        if !self.subjects[n].session {
            return;
        }
        let tunnel = self.subjects[n].wg.tunnel;
        let number = self.number(n, true);
        let packet = udp(&tunnel.v4.to_string(), LAN4, (1, 53), &number);
        let message = self.subjects[n].wg.seal(&packet);
        self.send_as(n, &message);
    }

    fn resource_sends(&mut self, n: usize) {
        let tunnel = self.subjects[n].wg.tunnel;
        let number = self.number(n, false);
        let packet = udp(LAN4, &tunnel.v4.to_string(), (53, 1), &number);
        let at = self.entry(n);
        self.fleet.packet(at, &packet);
        self.settle();
    }

    /// The next packet's number, and the change in whose undisturbed time it is sent.
    fn number(&mut self, n: usize, outbound: bool) -> Vec<u8> {
        self.sent += 1;
        let subject = &self.subjects[n];
        let carried = subject.is_connected && subject.session && (outbound || subject.established);
        if carried
            && self.heard_by_all(n, subject.broken)
            && subject.desired.is_some()
            && !subject.said_goodbye
        {
            self.expected.insert(self.sent, n);
        }
        let subject = &self.subjects[n];
        let moving = subject.home.from.is_some();
        let calm = !moving && self.heard_by_all(n, subject.changed) && !self.dirty.contains(&n);
        let time = if calm && subject.entry.is_some() { subject.changed } else { 0 };
        [self.sent.to_be_bytes(), time.to_be_bytes()].concat()
    }

    fn client_asks(&mut self, n: usize) {
        let subject = &mut self.subjects[n];
        // Renewals are rare, and one at a time.
        if subject.session && (subject.asked > 0 || !self.random.random_ratio(1, 8)) {
            subject.asked = 0;
            return;
        }
        subject.asked += 1;
        let message = subject.wg.initiate();
        self.send_as(n, &message);
    }

    fn send_as(&mut self, n: usize, message: &[u8]) {
        let at = self.entry(n);
        let Subject { wg, port, .. } = &self.subjects[n];
        let name = name(wg.id);
        if wg.relayed {
            let header = gateway_common::channel_data::header(channel(name), message.len()).unwrap();
            self.fleet.datagram(at, addr(SERVER), &[&header[..], message].concat());
        } else {
            self.fleet.datagram(at, SocketAddr::from(([198, 51, 100, name], *port)), message);
        }
        self.settle();
    }

    fn junk(&mut self) {
        let mut junk: Vec<u8> = (0..self.random.random_range(0..160)).map(|_| self.random.random()).collect();
        if let Some(first) = junk.first_mut() {
            *first %= 6;
        }
        let from = SocketAddr::from(([198, 51, 100, self.random.random_range(0..9)], 1));
        let at = self.random.random_range(0..self.fleet.nodes.len());
        self.fleet.datagram(at, from, &junk);
        let at = self.random.random_range(0..self.fleet.nodes.len());
        self.fleet.packet(at, &junk);
        self.settle();
    }

    /// Takes in what came out of the workers; there is no delay outside.
    fn settle(&mut self) {
        while let Some((_, packet)) = self.fleet.tun.pop_front() {
            let n = usize::from(packet[15]) - 1;
            self.arrives(n, true, &packet);
        }
        while let Some((_, route, mut payload)) = self.fleet.net.pop_front() {
            let name = match (route.dst.ip(), gateway_common::channel_data::parse(&payload)) {
                (ip, Some(frame)) if ip == addr(SERVER).ip() => (frame.number & 0xff) as u8,
                (std::net::IpAddr::V4(ip), _) => ip.octets()[3],
                other => panic!("to nobody: {other:?}"),
            };
            if route.dst == addr(SERVER) {
                payload.drain(..4);
            }
            // Cookies go back to whoever it was.
            if (1..=CLIENTS).contains(&name) {
                self.client_hears(usize::from(name - 1), &payload);
            }
        }
    }

    fn client_hears(&mut self, n: usize, message: &[u8]) {
        let subject = &mut self.subjects[n];
        match message[0] {
            4 => {
                let packet = subject.wg.open(message);
                if let Some(packet) = packet.filter(|packet| !packet.is_empty() && *packet != GOODBYE) {
                    self.arrives(n, false, &packet);
                }
            }
            2 | 3 => {
                let answer = subject.wg.answer(message);
                if let Some(keepalive) = answer {
                    let index = u32::from_le_bytes(message[4..8].try_into().unwrap()) >> 8;
                    subject.session = index == subject.wg.index.get();
                    subject.asked = 0;
                    self.send_as(n, &keepalive);
                }
            }
            other => panic!("seed {}: a message of type {other}", self.seed),
        }
    }

    #[track_caller]
    fn arrives(&mut self, n: usize, outbound: bool, packet: &[u8]) {
        let tail = packet.len() - 16;
        let number = |at: usize| u64::from_be_bytes(packet[at..at + 8].try_into().unwrap());
        let (number, time) = (number(tail), number(tail + 8));
        if let Some(whose) = self.expected.remove(&number) {
            assert_eq!(whose, n, "seed {}", self.seed);
        }
        self.arrived += 1;
        if time > 0
            && let Some((last_time, last)) = self.subjects[n].last.insert(outbound, (time, number))
        {
            assert!(last_time != time || last < number, "seed {}: {number} after {last}", self.seed);
        }
    }

    // What control does.

    fn change(&mut self, n: usize) {
        match (self.random.random_range(0..10), self.subjects[n].desired.is_some()) {
            (_, false) | (0, true) => self.connect(n),
            (1..=3, true) => self.fail(n),
            (4..=6, true) => self.remove(n),
            // Gone and back at once.
            (7, true) => {
                self.remove(n);
                self.connect(n);
            }
            _ => {
                if self.subjects[n].session {
                    self.breaks(n);
                    self.subjects[n].said_goodbye = true;
                    let goodbye = self.subjects[n].wg.seal(&control_packet::GOODBYE);
                    self.send_as(n, &goodbye);
                }
            }
        }
    }

    /// A new connection, of a new client or a known one.
    fn connect(&mut self, n: usize) {
        self.indices += 1;
        self.orders += 1;
        let worker = id(self.random.random_range(0..self.fleet.nodes.len()));
        let subject = &mut self.subjects[n];
        let mut fresh = Fleet::client(name(subject.wg.id));
        (fresh.relayed, fresh.index) = (subject.wg.relayed, ConnectionIndex::new(self.indices).unwrap());
        subject.wg = fresh;
        if subject.desired.is_none() {
            subject.home = Home { worker, from: None, order: self.orders };
        }
        subject.is_connected = true;
        self.breaks(n);
    }

    /// The connection goes, the authorizations stay.
    fn fail(&mut self, n: usize) {
        self.subjects[n].is_connected = false;
        self.breaks(n);
    }

    fn remove(&mut self, n: usize) {
        self.breaks(n);
        self.subjects[n].desired = None;
    }

    fn new_path(&mut self, n: usize) {
        if self.subjects[n].desired.is_some() && self.subjects[n].is_connected {
            self.subjects[n].port = self.random.random_range(1..5);
            self.changes(n);
        }
    }

    fn order_move(&mut self, n: usize) {
        let worker = id(self.random.random_range(0..self.fleet.nodes.len()));
        let subject = &mut self.subjects[n];
        let Home { worker: from, from: moving, .. } = subject.home;
        let rested = self.fleet.now - subject.moved >= BETWEEN_MOVES;
        if subject.desired.is_some() && moving.is_none() && rested && worker != from {
            self.orders += 1;
            subject.home = Home { worker, from: Some(from), order: self.orders };
            subject.moved = self.fleet.now;
            self.changes(n);
        }
    }

    /// A change that may lose packets.
    fn breaks(&mut self, n: usize) {
        self.changes(n);
        let subject = &mut self.subjects[n];
        subject.broken = subject.changed;
        (subject.session, subject.established, subject.said_goodbye) = (false, false, false);
        self.expected.retain(|_, whose| *whose != n);
    }

    fn changes(&mut self, n: usize) {
        self.changes += 1;
        let subject = &mut self.subjects[n];
        subject.changed = self.changes;
        let connection = match subject.is_connected {
            true => Connection::Present(subject.wg.keys(), Some(subject.path())),
            false => Connection::Absent,
        };
        subject.desired = Some(client_state(&subject.wg, connection));
        if !self.dirty.contains(&n) {
            self.dirty.push_back(n);
        }
    }

    fn control_works(&mut self) {
        for _ in 0..self.random.random_range(0..4) {
            self.control_hears();
        }
        for _ in 0..self.random.random_range(0..4) {
            self.tell();
        }
    }

    fn tell(&mut self) {
        let Some(n) = self.dirty.pop_front() else { return };
        let Subject { wg, home, desired, changed, .. } = &self.subjects[n];
        self.fleet.post(&Command::Client { id: wg.id, home: *home, desired: desired.clone() }, *changed);
    }

    fn tell_all(&mut self) {
        while !self.dirty.is_empty() {
            self.tell();
        }
    }

    fn control_hears(&mut self) {
        let Some((by, event)) = self.fleet.events.pop_front() else { return };
        let of = |id: ClientId| usize::from(name(id) - 1);
        match event {
            WorkerEvent::Adopted { id: whose, worker, order } => {
                assert_eq!(worker, id(by));
                let home = &mut self.subjects[of(whose)].home;
                if home.order == order && home.from.take().is_some() {
                    assert_eq!(home.worker, worker);
                    if self.subjects[of(whose)].desired.is_some() {
                        self.changes(of(whose));
                    }
                }
            }
            WorkerEvent::Established { id, index } => {
                let subject = &mut self.subjects[of(id)];
                subject.established |= subject.is_connected && subject.wg.index == index;
            }
            WorkerEvent::Goodbye { id, index } => {
                let n = of(id);
                if self.subjects[n].is_connected && self.subjects[n].wg.index == index {
                    self.remove(n);
                }
            }
            WorkerEvent::Stun(datagram) => assert_eq!(datagram.heard_by, id(by)),
            WorkerEvent::Expired { .. } => panic!("seed {}: a session that nobody left has ended", self.seed),
            WorkerEvent::Assigned { .. } => panic!("seed {}: nobody has assigned anything", self.seed),
            WorkerEvent::Activity { .. } | WorkerEvent::ChannelsUsed(_) | WorkerEvent::Denied(_) => {}
            WorkerEvent::Replied(_) => panic!("seed {}: nobody has asked anything", self.seed),
            WorkerEvent::Flow(report) => {
                let flow = (report.client, report.id);
                match report.end {
                    None => assert!(self.open.insert(flow), "seed {}: {report:?}", self.seed),
                    Some(end) => {
                        assert!(self.open.remove(&flow), "seed {}: {report:?}", self.seed);
                        self.accounted += end.tx_packets;
                    }
                }
            }
        }
    }

    // What workers do.

    fn worker_works(&mut self) {
        let worker = self.random.random_range(0..self.fleet.nodes.len());
        self.fleet.deliver(worker, self.random.random_range(0..4));
        if self.random.random() {
            self.fleet.drain(worker);
        }
        if self.random.random() {
            let random = &mut self.random;
            self.fleet.turn(worker, |all| random.random_range(0..=all));
        }
        self.fleet.time(worker);
        self.settle();
    }

    fn works_fully(&mut self, worker: usize) {
        self.fleet.hear(worker);
        self.fleet.turn(worker, |all| all);
        self.fleet.time(worker);
        self.diligent[worker] = self.fleet.now;
        self.settle();
    }

    /// Until nothing is on its way.
    fn rest(&mut self) {
        for _ in 0..20 {
            self.tell_all();
            self.fleet.rest();
            self.settle();
            while !self.fleet.events.is_empty() {
                self.control_hears();
            }
        }
        assert!(self.dirty.is_empty());
    }

    fn heard_by_all(&self, n: usize, change: u64) -> bool {
        let id = self.subjects[n].wg.id;
        self.fleet.nodes.iter().all(|node| node.heard.get(&id).is_some_and(|last| *last >= change))
    }

    // What always holds.

    fn check_always(&self) {
        self.fleet.check_accounts();
        for subject in &self.subjects {
            let mut held: Vec<_> =
                self.fleet.holders(subject.wg.id).iter().filter_map(|(_, index)| *index).collect();
            let all = held.len();
            held.sort_unstable();
            held.dedup();
            assert_eq!(held.len(), all, "seed {}: one connection is held twice", self.seed);
        }
    }

    /// Each of the clients' packets that passed is in exactly one record, and each record has its end.
    fn check_flows(&mut self) {
        self.fleet.tell(Command::Shutdown);
        self.rest();
        assert_eq!(self.open, HashSet::new(), "seed {}", self.seed);
        let mut passed = 0;
        for node in &self.fleet.nodes {
            let traffic = node.worker.traffic();
            passed += traffic.outbound_direct.packets + traffic.outbound_relayed.packets;
            assert_eq!(traffic.flow_reports_lost, 0);
        }
        assert_eq!(self.accounted, passed, "seed {}", self.seed);
        assert!(passed > 0, "seed {}", self.seed);
    }

    fn check_at_rest(&self) {
        self.check_always();
        let seed = self.seed;
        let drops: Vec<Vec<_>> =
            self.fleet.nodes.iter().map(|node| node.worker.counters().iter().collect()).collect();
        assert!(
            self.expected.is_empty(),
            "seed {seed}: lost {:?}, drops by worker: {drops:?}",
            self.expected
        );
        let alive = self.subjects.iter().filter(|subject| subject.desired.is_some()).count();
        for (n, node) in self.fleet.nodes.iter().enumerate() {
            assert_eq!(node.known(), alive, "seed {seed}, worker {n}");
        }
        for subject in self.subjects.iter().filter(|subject| subject.desired.is_some()) {
            assert_eq!(subject.home.from, None, "seed {seed}: never adopted");
            let home = subject.home.worker;
            let index = subject.is_connected.then_some(subject.wg.index);
            let who = (subject.wg.id, subject.home, subject.said_goodbye, subject.session);
            assert_eq!(self.fleet.holders(subject.wg.id), [(home.get(), index)], "seed {seed}: {who:?}");
            for node in &self.fleet.nodes {
                let Some(Entry::There(there)) = node.entry(subject.wg.id) else { continue };
                assert_eq!((there.worker, there.awaited), (home, false), "seed {seed}");
            }
        }
    }
}

impl Subject {
    fn path(&self) -> Path {
        let name = name(self.wg.id);
        let remote = SocketAddr::from(([198, 51, 100, name], self.port));
        if self.wg.relayed {
            Path::Relayed { server: addr(SERVER), channel: Some(channel(name)), remote }
        } else {
            Path::Direct { local: addr(LOCAL), remote }
        }
    }
}

/// A client's small number, from 1.
fn name(id: ClientId) -> u8 {
    id.0.as_u128().to_be_bytes()[15]
}

fn channel(name: u8) -> u16 {
    0x4000 | u16::from(name)
}
