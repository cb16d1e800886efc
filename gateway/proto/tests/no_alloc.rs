//! The packet path allocates nothing: direct and relayed, both directions, permitted, denied, dropped, passed and
//! translated packets.
//!
//! Its own binary, because the counting allocator is global.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use boringtun::noise::{Tunn, TunnResult};
use gateway_common::{DropReason, channel_data};
use gateway_proto::{
    ClientId, Command, ConnectionIndex, Datagram, Ecn, Handover, Passed, ResourceId, Route, Sink,
    WorkerEvent, WorkerId,
    addr::TunnelAddrs,
    command::{ClientState, Connection, ConnectionKeys, Home, Path},
    flow::{FlowReport, Meeting, UnixTime},
    names::{Domain, DomainName, Names},
    portal::{
        ingest_token,
        messages::{Filter, Resource, ResourceKind, Secret},
    },
    worker::{
        Config, Moved, Worker,
        flows::{Flows, MAX_FLOWS, Occasion, Way},
        inner,
        nat::{Inbound, Limits, Nat},
    },
};
use uuid::Uuid;
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

#[path = "../../src/count_allocations.rs"]
mod count_allocations;

const ROUNDS: usize = 2000;
/// A multiple of what the rounds repeat.
const WARM: usize = 120;
const CHANNEL: u16 = 0x4001;
/// Is the client behind a channel, and are its flows counted?
const CASES: [[bool; 2]; 4] = [[false, false], [true, false], [false, true], [true, true]];

#[test]
fn packets_of_an_established_session_allocate_nothing() {
    for [relayed, accounted] in CASES {
        let mut setup = Setup::new(relayed, accounted);
        let client = "100.64.2.1";
        let outbound = [
            (udp(client, "10.0.3.9", 53), 1_u64),
            (udp(client, "10.0.3.9", 54), 0),
            (udp("100.64.2.9", "10.0.3.9", 53), 0),
            (udp(client, "224.0.0.1", 53), 0),
            (b"\x05junk".to_vec(), 0),
        ];
        let inbound =
            [(udp("10.0.3.9", client, 53), 1_u64), (udp("10.9.3.9", client, 53), 0), (vec![0x45; 19], 0)];

        // What the client encrypts is prepared: its side may allocate.
        let mut datagrams: Vec<Vec<u8>> =
            (0..ROUNDS).map(|n| setup.seal(&outbound[n % outbound.len()].0)).collect();
        let mut junk = setup.seal(&outbound[0].0);
        *junk.last_mut().unwrap() ^= 1;
        datagrams.push(junk);
        let mut packets: Vec<Vec<u8>> = (0..ROUNDS).map(|n| inbound[n % inbound.len()].0.clone()).collect();
        // The first activity event grows no queue, the first use of a channel no list; yet let them be over, and the
        // denied packets that are told.
        setup.run(&datagrams[..WARM], &mut packets[..WARM]);

        let before = count_allocations::so_far();
        setup.run(&datagrams[WARM..], &mut packets[WARM..]);
        assert_eq!(count_allocations::so_far() - before, 0, "relayed: {relayed}, accounted: {accounted}");

        let traffic = setup.worker.traffic();
        let (out, back) = if relayed {
            (traffic.outbound_relayed, traffic.inbound_relayed)
        } else {
            (traffic.outbound_direct, traffic.inbound_direct)
        };
        assert_eq!(out.packets, (ROUNDS / outbound.len()) as u64);
        assert_eq!(back.packets, ROUNDS.div_ceil(inbound.len()) as u64);
        assert!(traffic.denials > 100, "denials are part of the path");
        assert_eq!(setup.worker.counters().get(DropReason::DataForged), 1);
        assert_eq!(setup.sink.packets, out.packets);
        assert_eq!(setup.sink.datagrams, back.packets + traffic.denials);
        assert_eq!(setup.flows(), usize::from(accounted));
    }
}

#[test]
fn packets_on_their_way_between_workers_allocate_nothing() {
    for [relayed, accounted] in CASES {
        let mut setup = Setup::new(relayed, accounted);
        let mut stranger = setup.worker_of(1);
        let outbound = udp("100.64.2.1", "10.0.3.9", 53);
        let mut inbound = udp("10.0.3.9", "100.64.2.1", 53);
        let datagrams: Vec<Vec<u8>> = (0..ROUNDS).map(|_| setup.seal(&outbound)).collect();
        let (from, now) = (setup.from(), setup.now);
        fn datagram(from: SocketAddr, payload: &[u8]) -> Datagram<'_> {
            Datagram { local: local(), from, ecn: Ecn::NotEct, payload }
        }
        setup.sink.passed = 0;
        let mut pass = |setup: &mut Setup, payload: &[u8]| {
            stranger.handle_datagrams([datagram(from, payload)], now, &mut setup.sink);
            stranger.handle_packets([&mut inbound[..]], now, &mut setup.sink);
            let what = [Passed::Datagram(datagram(from, payload)), Passed::Packet(&inbound)];
            let batch = what.map(|what| Handover { hops: 1, what });
            setup.worker.handle_handovers(batch, now, &mut setup.sink);
        };
        pass(&mut setup, &datagrams[0]);
        let before = count_allocations::so_far();
        datagrams[1..].iter().for_each(|payload| pass(&mut setup, payload));
        assert_eq!(count_allocations::so_far() - before, 0, "relayed: {relayed}, accounted: {accounted}");
        let rounds = ROUNDS as u64;
        assert_eq!(
            (setup.sink.passed, setup.sink.packets, setup.sink.datagrams),
            (2 * rounds, rounds, rounds)
        );
    }
}

#[test]
fn packets_of_a_translated_session_allocate_nothing() {
    for [relayed, accounted] in CASES {
        let mut setup = Setup::new(relayed, accounted);
        let (client, real) = ("100.64.2.1", "172.20.0.100");
        // The second name shares the address of the first: its session has another port outside.
        let outbound =
            [udp(client, "100.96.0.1", 53), udp(client, "100.96.0.2", 53), udp(client, "100.96.0.3", 53)];
        let mut second = udp(real, client, 53);
        second[23] = 54;
        let inbound = [udp(real, client, 53), second, udp(real, client, 55)];
        let datagrams: Vec<Vec<u8>> = (0..ROUNDS).map(|n| setup.seal(&outbound[n % 3])).collect();
        let mut packets: Vec<Vec<u8>> = (0..ROUNDS).map(|n| inbound[n % 3].clone()).collect();
        setup.run(&datagrams[..WARM], &mut packets[..WARM]);
        let before = count_allocations::so_far();
        setup.run(&datagrams[WARM..], &mut packets[WARM..]);
        assert_eq!(count_allocations::so_far() - before, 0, "relayed: {relayed}, accounted: {accounted}");
        let pass = (ROUNDS as u64 * 2).div_ceil(3);
        assert_eq!(setup.sink.packets, pass);
        let counters = setup.worker.counters();
        assert_eq!(
            counters.get(DropReason::NoTranslation) + counters.get(DropReason::IcmpBudget),
            ROUNDS as u64 - pass
        );
        assert_eq!(counters.get(DropReason::InboundNotAllowed), ROUNDS as u64 - pass);
        assert_eq!(setup.sink.datagrams, pass + setup.worker.traffic().denials);
        assert_eq!(setup.flows(), if accounted { 2 } else { 0 });
    }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a test needs some instant to count from")]
fn looking_at_a_session_in_time_allocates_nothing() {
    let (client, proxy, real) = ("100.64.2.1", "100.96.0.1", "10.0.3.9");
    let start = Instant::now();
    let mut nat = Nat::new(1, Limits::default(), start);
    let mut turn = |second: u64| {
        let now = start + Duration::from_secs(second);
        let [mut there, mut back] = [udp(client, proxy, 53), udp(real, client, 53)];
        let mut view = [&there, &back].map(|packet| inner::view(packet).unwrap());
        let before = count_allocations::so_far();
        assert!(nat.outbound(&mut there, &mut view[0], real.parse().unwrap(), now).is_ok());
        assert!(matches!(nat.inbound(&mut back, &mut view[1], now), Inbound::Rewritten(_)));
        nat.handle_timeout(now);
        count_allocations::so_far() - before
    };
    assert!(turn(0) > 0, "a new session has to be put somewhere");
    // The first session that comes up makes the list of those that did.
    (1..=60).for_each(|second| _ = turn(second));
    assert_eq!((61..1000).map(turn).sum::<u64>(), 0);
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a test needs some instant to count from")]
fn counting_packets_of_open_flows_allocates_nothing() {
    let start = Instant::now();
    let resource = ResourceId(Uuid::from_u128(1));
    let attributions = [(resource, Arc::new(ingest_token::parse(token()).unwrap()))];
    let clock = Meeting { unix: UnixTime(Duration::from_secs(1)), at: start };
    let occasion = Occasion { resource, domain: &|| None, attributions: &attributions, clock };
    let way = Way { client: Some(remote()), own: local() };
    let mut flows = Flows::new(ClientId(Uuid::from_u128(1)), 1, MAX_FLOWS, start);
    let of = |resource| [udp("100.64.2.1", resource, 53), udp(resource, "100.64.2.1", 53)];
    let stranger = udp("10.0.3.11", "100.64.2.1", 53);
    let packets = [of("10.0.3.9"), of("10.0.3.10")];
    let mut reports = 0;
    let mut turn = |second: u64| {
        let now = start + Duration::from_secs(second);
        let mut out = |_: Box<FlowReport>| reports += 1;
        let before = count_allocations::so_far();
        for [there, back] in &packets {
            flows.outbound(there, &inner::view(there).unwrap(), way, &occasion, now, &mut out);
            flows.inbound(back, &inner::view(back).unwrap(), now, &mut out);
            flows.inbound(&stranger, &inner::view(&stranger).unwrap(), now, &mut out);
        }
        flows.handle_timeout(now, &mut out);
        count_allocations::so_far() - before
    };
    assert!(turn(0) > 0, "a new flow has to be put somewhere");
    // The first flow that comes up makes the list of those that did.
    (1..=200).for_each(|second| _ = turn(second));
    assert_eq!((201..2000).map(turn).sum::<u64>(), 0);
    assert_eq!((reports, flows.len()), (2, 2));
}

/// With all the claims that one must have.
fn token() -> Secret {
    let mut claims = serde_json::json!({
        "iat": 1, "exp": 2, "uploads_enabled": true, "role": "responder",
        "policy_authorization_id": Uuid::from_u128(1).to_string(),
    });
    for name in [
        "account_id",
        "initiator_device_id",
        "responder_device_id",
        "policy_id",
        "resource_id",
        "resource_name",
        "initiator_actor_id",
        "initiator_actor_name",
        "authorized_at",
        "authorization_expires_at",
    ] {
        claims[name] = name.into();
    }
    let claims = URL_SAFE_NO_PAD.encode(claims.to_string());
    Secret(Zeroizing::new(format!("e30.{claims}.c2ln")))
}

/// Reservations come from two fixed buffers.
struct FixedSink {
    packet: [u8; 2048],
    datagram: [u8; 2048],
    packets: u64,
    datagrams: u64,
    last: usize,
    passed: u64,
}

impl FixedSink {
    fn new() -> Self {
        let empty = [0; 2048];
        Self { packet: empty, datagram: empty, packets: 0, datagrams: 0, last: 0, passed: 0 }
    }
}

impl Sink for FixedSink {
    fn reserve_packet(&mut self, len: usize) -> Option<&mut [u8]> {
        self.packet.get_mut(..len)
    }
    fn commit_packet(&mut self, _: usize) {
        self.packets += 1;
    }
    fn reserve_datagram(&mut self, _: &Route, len: usize) -> Option<&mut [u8]> {
        self.datagram.get_mut(..len)
    }
    fn commit_datagram(&mut self, len: usize) {
        self.datagrams += 1;
        self.last = len;
    }
    fn hand_over(&mut self, to: WorkerId, handover: &Handover<'_>) -> bool {
        assert_eq!((to, handover.hops), (WorkerId::FIRST, 1));
        self.passed += 1;
        true
    }
    fn give(&mut self, _: WorkerId, _: Moved) {
        unreachable!("nobody moves")
    }
}

struct Setup {
    worker: Worker,
    sink: FixedSink,
    client: Tunn,
    relayed: bool,
    accounted: bool,
    now: Instant,
}

impl Setup {
    #[expect(clippy::disallowed_methods, reason = "a test needs some instant to count from")]
    fn new(relayed: bool, accounted: bool) -> Self {
        let now = Instant::now();
        let gateway = PublicKey::from(&StaticSecret::from([7; 32]));
        let client = Tunn::new(StaticSecret::from([8; 32]), gateway, Some([9; 32]), None, 77, None);
        let worker = worker(0, relayed, accounted, now);
        let mut setup = Self { worker, sink: FixedSink::new(), client, relayed, accounted, now };
        setup.handshake();
        setup
    }

    /// Another of the workers, which knows the same.
    fn worker_of(&self, id: usize) -> Worker {
        worker(id, self.relayed, self.accounted, self.now)
    }

    fn from(&self) -> SocketAddr {
        if self.relayed { server() } else { remote() }
    }

    fn handshake(&mut self) {
        let mut out = [0; 2048];
        let TunnResult::WriteToNetwork(initiation) = self.client.format_handshake_initiation(&mut out, false)
        else {
            panic!("no initiation")
        };
        let initiation = self.frame(initiation);
        self.run(&[initiation], &mut []);
        let skip = if self.relayed { channel_data::HEADER_LEN } else { 0 };
        let response = self.sink.datagram[skip..self.sink.last].to_vec();
        let TunnResult::WriteToNetwork(keepalive) = self.client.decapsulate(None, &response, &mut out) else {
            panic!("no keep-alive")
        };
        let keepalive = self.frame(keepalive);
        self.run(&[keepalive], &mut []);
        while self.worker.poll_event().is_some() {}
        self.sink.datagrams = 0;
    }

    fn seal(&mut self, packet: &[u8]) -> Vec<u8> {
        let mut out = [0; 2048];
        match self.client.encapsulate(packet, &mut out) {
            TunnResult::WriteToNetwork(message) => self.frame(message),
            other => panic!("{other:?}"),
        }
    }

    fn frame(&self, message: &[u8]) -> Vec<u8> {
        if !self.relayed {
            return message.to_vec();
        }
        [&channel_data::header(CHANNEL, message.len()).unwrap()[..], message].concat()
    }

    /// Flows that began.
    fn flows(&mut self) -> usize {
        let events = std::iter::from_fn(|| self.worker.poll_event());
        events.filter(|event| matches!(event, WorkerEvent::Flow(_))).count()
    }

    fn run(&mut self, datagrams: &[Vec<u8>], packets: &mut [Vec<u8>]) {
        let from = self.from();
        let batch = datagrams.iter().map(|payload| Datagram { local: local(), from, ecn: Ecn::Ce, payload });
        self.worker.handle_datagrams(batch, self.now, &mut self.sink);
        self.worker.handle_packets(packets.iter_mut().map(|p| &mut p[..]), self.now, &mut self.sink);
    }
}

/// One of two workers; the client is the first one's.
fn worker(id: usize, relayed: bool, accounted: bool, now: Instant) -> Worker {
    let private_key = StaticSecret::from([7; 32]);
    let public_key = *PublicKey::from(&StaticSecret::from([8; 32])).as_bytes();
    let mut worker = Worker::new(Config {
        private_key,
        allow_own_ip: false,
        seed: 3,
        now,
        id: WorkerId::new(id).unwrap(),
        workers: 2,
    });

    let keys = ConnectionKeys {
        index: ConnectionIndex::new(5).unwrap(),
        public_key,
        preshared_key: Zeroizing::new([9; 32]),
        ufrag: *b"abcd",
    };
    let path = if relayed {
        Path::Relayed { server: server(), channel: Some(CHANNEL), remote: remote() }
    } else {
        Path::Direct { local: local(), remote: remote() }
    };
    // Enough resources for the hashed table.
    let dns = ResourceKind::Dns { name: String::new(), pattern: "**".to_owned(), filters: vec![] };
    let resources: Vec<Resource> = (0..40)
        .map(|n| Resource {
            id: ResourceId(Uuid::from_u128(n)),
            kind: ResourceKind::Cidr {
                name: String::new(),
                network: format!("10.0.{n}.0/24").parse().unwrap(),
                filters: vec![Filter::Udp { first: 53, last: 53 }],
            },
        })
        .chain([Resource { id: dns_resource(), kind: dns }])
        .collect();
    let tunnel =
        TunnelAddrs { v4: "100.64.2.1".parse().unwrap(), v6: "fd00:2021:1111::2:1".parse().unwrap() };
    let connection = Connection::Present(Arc::new(keys), Some(path));
    let attribution = Arc::new(ingest_token::parse(token()).unwrap());
    let attributions = resources.iter().map(|resource| (resource.id, Arc::clone(&attribution))).collect();
    let state = ClientState {
        names: names(),
        attributions,
        ..ClientState::new(tunnel, connection, resources.into())
    };
    for command in [
        Command::Accounting { on: accounted },
        Command::WallClock(Meeting { unix: UnixTime(Duration::from_secs(1)), at: now }),
        Command::Relays([server()].into()),
        Command::Channel { server: server(), number: CHANNEL, peer: Some(remote()) },
        Command::Client {
            id: ClientId(Uuid::from_u128(1)),
            home: Home::at(WorkerId::FIRST),
            desired: Some(Arc::new(state)),
        },
    ] {
        worker.handle_command(command, now, &mut FixedSink::new());
    }
    worker
}

fn dns_resource() -> ResourceId {
    ResourceId(Uuid::from_u128(77))
}

/// Two names on one address, and one without.
fn names() -> Arc<Names> {
    let real = |text: &str| Some(text.parse().unwrap());
    let domains = [("a", 1, real("172.20.0.100")), ("b", 2, real("172.20.0.100")), ("c", 3, None)];
    let domains = domains.map(|(name, n, real)| {
        Arc::new(Domain {
            name: DomainName::parse(name).unwrap(),
            resources: [dns_resource()].into(),
            proxies: [(IpAddr::from([100, 96, 0, n]), real)].into(),
        })
    });
    Arc::new(Names { domains: domains.into(), ..Names::default() })
}

fn local() -> SocketAddr {
    "192.0.2.1:52625".parse().unwrap()
}

fn remote() -> SocketAddr {
    "198.51.100.7:40000".parse().unwrap()
}

fn server() -> SocketAddr {
    "203.0.113.3:3478".parse().unwrap()
}

/// IPv4 and UDP with both ports `port`, ECT(0).
fn udp(src: &str, dst: &str, port: u16) -> Vec<u8> {
    let address = |text: &str| text.parse::<std::net::Ipv4Addr>().unwrap().octets();
    let mut packet = vec![0x45, 2, 0, 128, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend(address(src));
    packet.extend(address(dst));
    packet.extend([port.to_be_bytes(), port.to_be_bytes(), 108_u16.to_be_bytes(), [0, 0]].concat());
    packet.resize(128, 1);
    packet
}
