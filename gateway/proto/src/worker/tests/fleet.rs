//! Several workers joined in memory, each step by hand.
//!
//! ```text
//!  post -> posted --deliver--> queue (coalesced) --drain--> worker -+-> ring to each other worker \ taken by `turn`,
//!                                                                   +-> mailbox of the other one  / in the shell's order
//!                                                                   +-> tun, net, events
//! ```

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

use x25519_dalek::{PublicKey, StaticSecret};

use super::{
    super::{Config, Moved, Worker, peers::Entry},
    *,
};
use crate::{
    ClientId, Datagram, Handover, Route, WorkerId,
    addr::TunnelAddrs,
    command::Home,
    flow::{Meeting, UnixTime},
};

pub struct Fleet {
    pub nodes: Vec<Node>,
    pub now: Instant,
    /// Datagrams and packets given to any worker.
    pub inputs: u64,
    /// What came out, with the worker that said it.
    pub tun: VecDeque<(usize, Vec<u8>)>,
    pub net: VecDeque<(usize, Route, Vec<u8>)>,
    pub events: VecDeque<(usize, WorkerEvent)>,
    /// Packets passed from one worker to another, and answers to orders to move.
    pub passes: u64,
    pub answers: u64,
}

pub struct Node {
    pub worker: Worker,
    pub sink: TestSink,
    /// Commands on their way to the queue, with the tag of each.
    posted: VecDeque<(Command, u64)>,
    queue: Vec<(Command, u64)>,
    mailbox: Vec<Moved>,
    /// By source.
    rings: Vec<VecDeque<Parcel>>,
    /// The tag of the last command about a client that the worker was given.
    pub heard: HashMap<ClientId, u64>,
}

impl Fleet {
    pub fn new(workers: usize) -> Self {
        #[expect(clippy::disallowed_methods, reason = "a test needs some instant to count from")]
        let now = Instant::now();
        let node = |n| Node {
            worker: Worker::new(Config {
                private_key: StaticSecret::from([7; 32]),
                allow_own_ip: false,
                seed: 1,
                now,
                id: id(n),
                workers,
            }),
            sink: TestSink::default(),
            posted: VecDeque::new(),
            queue: Vec::new(),
            mailbox: Vec::new(),
            rings: (0..workers).map(|_| VecDeque::new()).collect(),
            heard: HashMap::new(),
        };
        let mut fleet = Self {
            nodes: (0..workers).map(node).collect(),
            now,
            inputs: 0,
            tun: VecDeque::new(),
            net: VecDeque::new(),
            events: VecDeque::new(),
            passes: 0,
            answers: 0,
        };
        let own = TunnelAddrs { v4: OWN_V4.parse().unwrap(), v6: OWN_V6.parse().unwrap() };
        fleet.tell(Command::OwnAddrs(own));
        fleet.tell(Command::Relays([addr(SERVER)].into()));
        fleet
    }

    pub fn client(n: u8) -> Client {
        Client::new(n, &PublicKey::from(&StaticSecret::from([7; 32])))
    }

    /// Sends a command on its way to everybody.
    pub fn post(&mut self, command: &Command, tag: u64) {
        self.nodes.iter_mut().for_each(|node| node.posted.push_back((command.clone(), tag)));
    }

    /// Everybody hears it at once.
    pub fn tell(&mut self, command: Command) {
        self.post(&command, 0);
        (0..self.nodes.len()).for_each(|n| self.hear(n));
    }

    /// Flows are counted from now on.
    pub fn account(&mut self) {
        self.tell(Command::Accounting { on: true });
        self.tell(Command::WallClock(Meeting { unix: UnixTime(Duration::from_secs(1 << 30)), at: self.now }));
    }

    pub fn place(&mut self, client: &Client, home: Home, path: Path) {
        self.tell(client_command(client, home, path));
    }

    /// Brings all that was posted to worker `n`.
    pub fn hear(&mut self, n: usize) {
        self.deliver(n, usize::MAX);
        self.drain(n);
    }

    /// Brings up to `count` posted commands to the queue of worker `n`, where a later one replaces an earlier one.
    pub fn deliver(&mut self, n: usize, count: usize) {
        let Node { posted, queue, .. } = &mut self.nodes[n];
        for (command, tag) in posted.drain(..count.min(posted.len())) {
            if let Command::Client { id, .. } = &command {
                queue.retain(|(c, _)| !matches!(c, Command::Client { id: other, .. } if other == id));
            }
            queue.push((command, tag));
        }
    }

    pub fn drain(&mut self, n: usize) {
        for (command, tag) in std::mem::take(&mut self.nodes[n].queue) {
            if let Command::Client { id, .. } = &command {
                self.nodes[n].heard.insert(*id, tag);
            }
            self.call(n, |worker, sink, now| worker.handle_command(command, now, sink));
        }
    }

    pub fn datagram(&mut self, n: usize, from: SocketAddr, payload: &[u8]) {
        self.inputs += 1;
        let datagram = Datagram { local: addr(LOCAL), from, ecn: Ecn::NotEct, payload };
        self.call(n, |worker, sink, now| worker.handle_datagrams([datagram], now, sink));
    }

    pub fn packet(&mut self, n: usize, packet: &[u8]) {
        self.inputs += 1;
        let mut packet = packet.to_vec();
        self.call(n, |worker, sink, now| worker.handle_packets([&mut packet[..]], now, sink));
    }

    /// Worker `n` looks at what others passed to it, at most `take(length)` of each ring.
    pub fn turn(&mut self, n: usize, mut take: impl FnMut(usize) -> usize) {
        for source in 0..self.nodes.len() {
            // The shell's order: the tail, then the mailbox, then the ring up to that tail.
            let Node { rings, mailbox, .. } = &mut self.nodes[n];
            let tail = take(rings[source].len()).min(rings[source].len());
            let batch: Vec<Parcel> = rings[source].drain(..tail).collect();
            for moved in std::mem::take(mailbox) {
                self.call(n, |worker, sink, now| worker.handle_moved(moved, now, sink));
            }
            let batch: Vec<Handover<'_>> = batch.iter().filter_map(Parcel::handover).collect();
            assert!(batch.iter().all(|handover| (1..=3).contains(&handover.hops)));
            self.call(n, |worker, sink, now| worker.handle_handovers(batch, now, sink));
        }
    }

    pub fn time(&mut self, n: usize) {
        if self.nodes[n].worker.poll_timeout().is_some_and(|at| at <= self.now) {
            self.call(n, |worker, sink, now| worker.handle_timeout(now, sink));
        }
    }

    /// Until nothing is on its way between workers any more.
    pub fn rest(&mut self) {
        for _ in 0..100 {
            (0..self.nodes.len()).for_each(|n| {
                self.hear(n);
                self.turn(n, |all| all);
            });
            if self
                .nodes
                .iter()
                .all(|node| node.mailbox.is_empty() && node.rings.iter().all(VecDeque::is_empty))
            {
                return;
            }
        }
        panic!("packets are passed for ever");
    }

    fn call(&mut self, n: usize, act: impl FnOnce(&mut Worker, &mut TestSink, Instant)) {
        let Node { worker, sink, .. } = &mut self.nodes[n];
        act(worker, sink, self.now);
        self.events.extend(std::iter::from_fn(|| worker.poll_event()).map(|event| (n, event)));
        self.tun.extend(sink.packets.drain(..).map(|packet| (n, packet)));
        self.net.extend(sink.datagrams.drain(..).map(|(route, payload)| (n, route, payload)));
        for (to, parcel) in std::mem::take(&mut sink.passed) {
            assert_ne!(to.get(), n, "passed to itself");
            match parcel {
                Parcel::Client(moved) => {
                    self.answers += 1;
                    self.nodes[to.get()].mailbox.push(moved);
                }
                parcel => {
                    self.passes += 1;
                    self.nodes[to.get()].rings[n].push_back(parcel);
                }
            }
        }
    }

    /// A whole handshake through worker `n`, the answers found wherever they come out.
    pub fn handshake(&mut self, n: usize, client: &mut Client, from: SocketAddr) {
        let initiation = client.initiate();
        self.datagram(n, from, &initiation);
        self.rest();
        let (_, _, response) = self.net.pop_front().expect("a response");
        let keepalive = client.answer(&response).expect("a keep-alive");
        self.datagram(n, from, &keepalive);
        self.rest();
        assert!(self.net.is_empty() && self.tun.is_empty());
    }

    pub fn advance(&mut self, by: Duration) {
        self.now += by;
    }

    /// Drops at all workers.
    pub fn count(&self, reason: DropReason) -> u64 {
        self.nodes.iter().map(|node| node.worker.counters().get(reason)).sum()
    }

    /// Every input was dropped, passed on or taken by exactly one worker, or is on its way between two.
    #[track_caller]
    pub fn check_accounts(&self) {
        let mut counted = 0;
        for node in &self.nodes {
            let t = node.worker.traffic();
            let volumes = [t.outbound_direct, t.outbound_relayed, t.inbound_direct, t.inbound_relayed];
            counted += node.worker.counters().iter().map(|(_, n)| n).sum::<u64>();
            counted += volumes.iter().map(|v| v.packets).sum::<u64>();
            counted += t.keepalives + t.handshakes + t.control + t.stun;
            counted += node.rings.iter().map(|ring| ring.len() as u64).sum::<u64>();
        }
        assert_eq!(counted, self.inputs);
    }

    /// Workers that hold the client, with the connection it has there.
    pub fn holders(&self, client: ClientId) -> Vec<(usize, Option<crate::ConnectionIndex>)> {
        let holds = |(n, node): (usize, &Node)| match node.entry(client) {
            Some(Entry::Here(peer)) => Some((n, peer.link.as_ref().map(|link| link.index))),
            _ => None,
        };
        self.nodes.iter().enumerate().filter_map(holds).collect()
    }
}

impl Node {
    pub fn entry(&self, client: ClientId) -> Option<&Entry> {
        self.worker.peers.by_id(client).and_then(|slot| self.worker.peers.entry(slot))
    }

    /// Clients it knows, its own or not.
    pub fn known(&self) -> usize {
        self.worker.peers.len()
    }
}

pub fn id(n: usize) -> WorkerId {
    WorkerId::new(n).unwrap()
}

/// The client lives at worker `n` by order `order`.
pub fn at(n: usize, order: u64) -> Home {
    Home { worker: id(n), from: None, order }
}

/// It moves.
pub fn from_to(from: usize, to: usize, order: u64) -> Home {
    Home { worker: id(to), from: Some(id(from)), order }
}

pub fn client_state(client: &Client, connection: Connection) -> Arc<ClientState> {
    let state = ClientState::new(client.tunnel, connection, lan().into());
    Arc::new(ClientState { attributions: attributions(&[1, 2]), ..state })
}

pub fn client_command(client: &Client, home: Home, path: Path) -> Command {
    let connection = Connection::Present(client.keys(), Some(path));
    Command::Client { id: client.id, home, desired: Some(client_state(client, connection)) }
}
