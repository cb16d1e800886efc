//! A worker, its in-memory sink, and a client that speaks WireGuard and ChannelData to it. Tests only.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use boringtun::noise::{Tunn, TunnResult};
use gateway_common::{DropReason, channel_data, checksum};
use uuid::Uuid;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::{Config, Moved, Worker};
use crate::{
    ClientId, Command, ConnectionIndex, Datagram, Ecn, Handover, Passed, ResourceId, Route, Sink,
    WorkerEvent, WorkerId,
    addr::TunnelAddrs,
    command::{ClientState, Connection, ConnectionKeys, Path},
    flow::{Attribution, Attributions},
    portal::{
        ingest_token::{self, tests::token_of},
        messages::{Filter, Resource, ResourceKind},
    },
};

pub const LOCAL: &str = "192.0.2.1:52625";
pub const REMOTE: &str = "198.51.100.7:40000";
pub const SERVER: &str = "203.0.113.3:3478";
pub const CHANNEL: u16 = 0x4007;
pub const OWN_V4: &str = "100.64.0.1";
pub const OWN_V6: &str = "fd00:2021:1111::1";

/// One client and one worker, on one clock.
pub struct World {
    pub worker: Worker,
    pub sink: TestSink,
    pub client: Client,
    pub now: Instant,
    /// Datagrams and packets given to the worker.
    pub inputs: u64,
}

/// The in-memory twin of a backend.
#[derive(Default)]
pub struct TestSink {
    pub packets: Vec<Vec<u8>>,
    pub datagrams: Vec<(Route, Vec<u8>)>,
    /// For other workers, in order.
    pub passed: Vec<(WorkerId, Parcel)>,
    /// Refuse every reservation.
    pub full: bool,
    /// Refuse to pass packets on.
    pub rings_are_full: bool,
    /// Bytes that datagrams did not use of what was reserved for them.
    pub slack: usize,
    packet: Vec<u8>,
    datagram: Option<(Route, Vec<u8>)>,
}

/// What one worker passes to another.
pub enum Parcel {
    Datagram {
        hops: u8,
        local: SocketAddr,
        from: SocketAddr,
        ecn: Ecn,
        payload: Vec<u8>,
        key: Option<[u8; 32]>,
    },
    Packet {
        hops: u8,
        packet: Vec<u8>,
    },
    Client(Moved),
}

/// The far end of a tunnel.
pub struct Client {
    pub id: ClientId,
    pub tunnel: TunnelAddrs,
    pub index: ConnectionIndex,
    pub tunn: Tunn,
    pub relayed: bool,
    public_key: [u8; 32],
    psk: [u8; 32],
}

impl World {
    /// A client with a direct path, without a session.
    pub fn new(resources: &[Resource]) -> Self {
        Self::with(resources, Some(direct()), false)
    }

    /// A client behind a channel of ours, without a session.
    pub fn relayed(resources: &[Resource]) -> Self {
        let path = Path::Relayed { server: addr(SERVER), channel: Some(CHANNEL), remote: addr(REMOTE) };
        let mut world = Self::with(resources, Some(path), true);
        world.command(Command::Relays([addr(SERVER)].into()));
        world.command(Command::Channel { server: addr(SERVER), number: CHANNEL, peer: Some(addr(REMOTE)) });
        world
    }

    pub fn with(resources: &[Resource], path: Option<Path>, relayed: bool) -> Self {
        #[expect(clippy::disallowed_methods, reason = "a test needs some instant to count from")]
        let now = Instant::now();
        let private_key = StaticSecret::from([7; 32]);
        let public_key = PublicKey::from(&private_key);
        let config =
            Config { private_key, allow_own_ip: false, seed: 1, now, id: WorkerId::FIRST, workers: 1 };
        let mut client = Client::new(1, &public_key);
        client.relayed = relayed;
        let mut world =
            Self { worker: Worker::new(config), sink: TestSink::default(), client, now, inputs: 0 };
        world.command(Command::OwnAddrs(TunnelAddrs {
            v4: OWN_V4.parse().unwrap(),
            v6: OWN_V6.parse().unwrap(),
        }));
        world.tell(resources, path);
        world
    }

    /// A client with a confirmed session.
    pub fn connected(resources: &[Resource]) -> Self {
        let mut world = Self::new(resources);
        world.handshake();
        world
    }

    pub fn command(&mut self, command: Command) {
        self.worker.handle_command(command, self.now, &mut self.sink);
    }

    /// Tells the worker of the client.
    pub fn tell(&mut self, resources: &[Resource], path: Option<Path>) {
        let connection = Connection::Present(self.client.keys(), path);
        self.tell_connection(resources, connection);
    }

    pub fn tell_connection(&mut self, resources: &[Resource], connection: Connection) {
        self.tell_all(resources, connection, &[]);
    }

    pub fn tell_all(&mut self, resources: &[Resource], connection: Connection, heard_from: &[SocketAddr]) {
        let state = ClientState {
            heard_from: heard_from.into(),
            ..ClientState::new(self.client.tunnel, connection, resources.into())
        };
        self.tell_state(state);
    }

    pub fn tell_state(&mut self, state: ClientState) {
        self.command(Command::Client {
            id: self.client.id,
            home: crate::command::Home::at(WorkerId::FIRST),
            desired: Some(Arc::new(state)),
        });
    }

    pub fn revoke(&mut self) {
        self.command(Command::Client {
            id: self.client.id,
            home: crate::command::Home::at(WorkerId::FIRST),
            desired: None,
        });
    }

    /// The client's initiation, the answer, and the keep-alive that confirms.
    pub fn handshake(&mut self) {
        let initiation = self.client.initiate();
        self.client_sends(&initiation);
        let response = self.client_gets().expect("a handshake response");
        let keepalive = self.client.answer(&response).expect("a keep-alive");
        self.client_sends(&keepalive);
        assert!(self.sink.packets.is_empty() && self.sink.datagrams.is_empty());
    }

    /// One WireGuard message from the client by its own way.
    pub fn client_sends(&mut self, message: &[u8]) {
        self.client_sends_marked(message, Ecn::NotEct);
    }

    pub fn client_sends_marked(&mut self, message: &[u8], ecn: Ecn) {
        if self.client.relayed {
            let mut frame = channel_data::header(CHANNEL, message.len()).unwrap().to_vec();
            frame.extend_from_slice(message);
            self.datagram_marked(SERVER, &frame, ecn);
        } else {
            self.datagram_marked(REMOTE, message, ecn);
        }
    }

    pub fn datagram(&mut self, from: &str, payload: &[u8]) {
        self.datagram_marked(from, payload, Ecn::NotEct);
    }

    pub fn datagram_marked(&mut self, from: &str, payload: &[u8], ecn: Ecn) {
        self.inputs += 1;
        let datagram = Datagram { local: addr(LOCAL), from: addr(from), ecn, payload };
        self.worker.handle_datagrams([datagram], self.now, &mut self.sink);
    }

    /// One inner packet from the client.
    pub fn outbound(&mut self, packet: &[u8]) {
        let message = self.client.seal(packet);
        self.client_sends(&message);
    }

    /// One packet from the TUN device.
    pub fn inbound(&mut self, packet: &[u8]) {
        self.inputs += 1;
        self.worker.handle_packets([&mut packet.to_vec()[..]], self.now, &mut self.sink);
    }

    /// The next datagram to the client, framing and route checked and removed.
    pub fn client_gets(&mut self) -> Option<Vec<u8>> {
        self.client_gets_marked().map(|(_, message)| message)
    }

    pub fn client_gets_marked(&mut self) -> Option<(Ecn, Vec<u8>)> {
        if self.sink.datagrams.is_empty() {
            return None;
        }
        let (route, payload) = self.sink.datagrams.remove(0);
        if !self.client.relayed {
            assert_eq!((route.src, route.dst), (Some(addr(LOCAL)), addr(REMOTE)));
            return Some((route.ecn, payload));
        }
        assert_eq!((route.src, route.dst), (None, addr(SERVER)));
        let frame = channel_data::parse(&payload).expect("ChannelData");
        assert_eq!(frame.number, CHANNEL);
        Some((route.ecn, frame.payload.to_vec()))
    }

    /// The next inner packet to the client, decrypted by it.
    pub fn received(&mut self) -> Option<Vec<u8>> {
        let message = self.client_gets()?;
        Some(self.client.open(&message).expect("a data message"))
    }

    /// The next packet to the TUN device.
    pub fn tun_gets(&mut self) -> Option<Vec<u8>> {
        (!self.sink.packets.is_empty()).then(|| self.sink.packets.remove(0))
    }

    pub fn events(&mut self) -> Vec<WorkerEvent> {
        std::iter::from_fn(|| self.worker.poll_event()).collect()
    }

    pub fn count(&self, reason: DropReason) -> u64 {
        self.worker.counters().get(reason)
    }

    /// Every input was dropped, passed on or taken, exactly once.
    #[track_caller]
    pub fn check_accounts(&self) {
        let dropped: u64 = self.worker.counters().iter().map(|(_, n)| n).sum();
        let t = self.worker.traffic();
        let volumes = [t.outbound_direct, t.outbound_relayed, t.inbound_direct, t.inbound_relayed];
        let passed: u64 = volumes.iter().map(|v| v.packets).sum();
        let taken = t.keepalives + t.handshakes + t.control + t.stun;
        let counters: Vec<_> = self.worker.counters().iter().collect();
        assert_eq!(dropped + passed + taken, self.inputs, "{counters:?} {t:?}");
        assert!(self.sink.passed.is_empty(), "there is one worker");
    }

    /// Time passes, timers run as a backend would run them.
    pub fn advance(&mut self, by: Duration) {
        let end = self.now + by;
        while let Some(at) = self.worker.poll_timeout().filter(|at| *at <= end) {
            self.set_clock(at.max(self.now));
            self.worker.handle_timeout(self.now, &mut self.sink);
        }
        self.set_clock(end);
    }

    fn set_clock(&mut self, to: Instant) {
        #[cfg(feature = "mock-instant")]
        mock_instant::MockClock::advance(to - self.now);
        self.now = to;
    }
}

impl Client {
    pub fn new(n: u8, gateway: &PublicKey) -> Self {
        let private_key = StaticSecret::from([100 + n; 32]);
        let psk = [n; 32];
        Self {
            id: ClientId(Uuid::from_u128(n.into())),
            tunnel: TunnelAddrs {
                v4: [100, 64, 2, n].into(),
                v6: format!("fd00:2021:1111::2:{n:x}").parse().unwrap(),
            },
            index: ConnectionIndex::new(0x0a_0b_00 + u32::from(n)).unwrap(),
            public_key: *PublicKey::from(&private_key).as_bytes(),
            tunn: Tunn::new(private_key, *gateway, Some(psk), None, 0x0c_0d_00 + u32::from(n), None),
            relayed: false,
            psk,
        }
    }

    pub fn keys(&self) -> Arc<ConnectionKeys> {
        Arc::new(ConnectionKeys {
            index: self.index,
            public_key: self.public_key,
            preshared_key: Zeroizing::new(self.psk),
            ufrag: *b"abcd",
        })
    }

    pub fn initiate(&mut self) -> Vec<u8> {
        // Initiations made at one instant carry one timestamp: all but the first would be replays.
        #[cfg(feature = "mock-instant")]
        mock_instant::MockClock::advance(Duration::from_micros(1));
        let mut out = [0; 148];
        match self.tunn.format_handshake_initiation(&mut out, true) {
            TunnResult::WriteToNetwork(message) => message.to_vec(),
            other => panic!("no initiation: {other:?}"),
        }
    }

    /// What the client says to a handshake message.
    pub fn answer(&mut self, message: &[u8]) -> Option<Vec<u8>> {
        let mut out = [0; 2048];
        match self.tunn.decapsulate(None, message, &mut out) {
            TunnResult::WriteToNetwork(message) => Some(message.to_vec()),
            _ => None,
        }
    }

    pub fn seal(&mut self, packet: &[u8]) -> Vec<u8> {
        let mut out = [0; 2048];
        match self.tunn.encapsulate(packet, &mut out) {
            TunnResult::WriteToNetwork(message) => {
                assert_eq!(message[0], 4, "the client has a session");
                message.to_vec()
            }
            other => panic!("not sealed: {other:?}"),
        }
    }

    /// The packet inside a data message; empty for a keep-alive.
    pub fn open(&mut self, message: &[u8]) -> Option<Vec<u8>> {
        let mut out = [0; 2048];
        match self.tunn.decapsulate(None, message, &mut out) {
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                Some(packet.to_vec())
            }
            TunnResult::Done => Some(Vec::new()),
            _ => None,
        }
    }
}

impl Sink for TestSink {
    fn reserve_packet(&mut self, len: usize) -> Option<&mut [u8]> {
        self.packet = vec![0xee; len];
        (!self.full).then_some(&mut self.packet[..])
    }

    fn commit_packet(&mut self, len: usize) {
        self.packets.push(self.packet[..len].to_vec());
    }

    fn reserve_datagram(&mut self, route: &Route, len: usize) -> Option<&mut [u8]> {
        let (_, buffer) = self.datagram.insert((*route, vec![0xee; len]));
        (!self.full).then_some(&mut buffer[..])
    }

    fn commit_datagram(&mut self, len: usize) {
        let (route, mut buffer) = self.datagram.take().expect("a reservation");
        self.slack += buffer.len() - len;
        buffer.truncate(len);
        self.datagrams.push((route, buffer));
    }

    fn hand_over(&mut self, to: WorkerId, handover: &Handover<'_>) -> bool {
        if !self.rings_are_full {
            self.passed.push((to, Parcel::of(handover)));
        }
        !self.rings_are_full
    }

    fn give(&mut self, to: WorkerId, moved: Moved) {
        self.passed.push((to, Parcel::Client(moved)));
    }
}

impl Parcel {
    fn of(handover: &Handover<'_>) -> Self {
        let hops = handover.hops;
        let datagram = |Datagram { local, from, ecn, payload }, key| {
            let payload = <[u8]>::to_vec(payload);
            Self::Datagram { hops, local, from, ecn, payload, key }
        };
        match handover.what {
            Passed::Datagram(it) => datagram(it, None),
            Passed::Initiation(it, key) => datagram(it, Some(key)),
            Passed::Packet(packet) => Self::Packet { hops, packet: packet.to_vec() },
        }
    }

    /// `None` for a client.
    pub fn handover(&self) -> Option<Handover<'_>> {
        let (hops, what) = match self {
            Self::Datagram { hops, local, from, ecn, payload, key } => {
                let datagram = Datagram { local: *local, from: *from, ecn: *ecn, payload };
                let datagram =
                    key.map_or(Passed::Datagram(datagram), |key| Passed::Initiation(datagram, key));
                (hops, datagram)
            }
            Self::Packet { hops, packet } => (hops, Passed::Packet(packet)),
            Self::Client(_) => return None,
        };
        Some(Handover { hops: *hops, what })
    }
}

pub fn direct() -> Path {
    Path::Direct { local: addr(LOCAL), remote: addr(REMOTE) }
}

pub fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

pub fn resource_id(n: u128) -> ResourceId {
    ResourceId(Uuid::from_u128(n))
}

/// Each of these resources has a token.
pub fn attributions(resources: &[u128]) -> Attributions {
    static ATTRIBUTION: LazyLock<Arc<Attribution>> =
        LazyLock::new(|| Arc::new(ingest_token::parse(token_of(&ingest_token::tests::claims())).unwrap()));
    resources.iter().map(|n| (resource_id(*n), Arc::clone(&ATTRIBUTION))).collect()
}

pub fn cidr(n: u128, network: &str, filters: &[Filter]) -> Resource {
    let kind = ResourceKind::Cidr {
        name: format!("net {n}"),
        network: network.parse().unwrap(),
        filters: filters.to_vec(),
    };
    Resource { id: resource_id(n), kind }
}

pub fn dns(n: u128, pattern: &str) -> Resource {
    let kind =
        ResourceKind::Dns { name: pattern.to_owned(), pattern: pattern.to_owned(), filters: Vec::new() };
    Resource { id: resource_id(n), kind }
}

/// An IP packet around `payload`, header checksum included.
pub fn ip(src: &str, dst: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = match (src.parse().unwrap(), dst.parse().unwrap()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let mut header = vec![0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, 64, protocol, 0, 0];
            header[2..4].copy_from_slice(&be16(20 + payload.len()));
            header.extend_from_slice(&src.octets());
            header.extend_from_slice(&dst.octets());
            let sum = checksum::finish(checksum::sum(&header));
            header[10..12].copy_from_slice(&sum);
            header
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let mut header = vec![0x60, 0, 0, 0, 0, 0, protocol, 64];
            header[4..6].copy_from_slice(&be16(payload.len()));
            header.extend_from_slice(&src.octets());
            header.extend_from_slice(&dst.octets());
            header
        }
        other => panic!("mixed families: {other:?}"),
    };
    packet.extend_from_slice(payload);
    packet
}

pub fn udp(src: &str, dst: &str, ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
    let mut datagram = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    datagram.extend_from_slice(&be16(8 + payload.len()));
    datagram.extend_from_slice(&[0, 0]);
    datagram.extend_from_slice(payload);
    ip(src, dst, 17, &datagram)
}

pub fn tcp(src: &str, dst: &str, ports: (u16, u16)) -> Vec<u8> {
    let mut segment = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
    segment.resize(20, 0);
    segment[12] = 0x50;
    ip(src, dst, 6, &segment)
}

/// An ICMP message of the addresses' family, `body` after the 8-byte header.
pub fn icmp(src: &str, dst: &str, kind: u8, body: &[u8]) -> Vec<u8> {
    let protocol = if src.contains(':') { 58 } else { 1 };
    let mut message = vec![kind, 0, 0, 0, 0, 1, 0, 1];
    message.extend_from_slice(body);
    ip(src, dst, protocol, &message)
}

/// The same packet with another ECN codepoint.
pub fn marked(mut packet: Vec<u8>, ecn: Ecn) -> Vec<u8> {
    if packet[0] >> 4 == 6 {
        packet[1] |= (ecn as u8) << 4;
        return packet;
    }
    packet[1] |= ecn as u8;
    packet[10..12].fill(0);
    let sum = checksum::finish(checksum::sum(&packet[..20]));
    packet[10..12].copy_from_slice(&sum);
    packet
}

fn be16(length: usize) -> [u8; 2] {
    u16::try_from(length).unwrap().to_be_bytes()
}
