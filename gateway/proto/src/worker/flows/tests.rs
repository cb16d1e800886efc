//! Sequences of packets, and the records they make.

use std::{cell::RefCell, sync::LazyLock};

use uuid::Uuid;

use super::{flow::MAX_WAYS, *};
use crate::{
    flow::UnixTime,
    portal::ingest_token::{self, tests as token},
    relay::twin,
    worker::inner,
};

pub const CLIENT: ClientId = ClientId(Uuid::from_u128(1));
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
const FIN: u8 = 0x11;
const RST: u8 = 0x04;
const SYN_ACK: u8 = 0x12;
const PSH: u8 = 0x18;

/// Resources 1 and 2 have a token, others have none.
pub static ATTRIBUTIONS: LazyLock<Vec<(ResourceId, Arc<Attribution>)>> = LazyLock::new(|| {
    let attribution = Arc::new(ingest_token::parse(token::token_of(&token::claims())).unwrap());
    [1, 2].map(|id| (resource(id), Arc::clone(&attribution))).to_vec()
});

pub fn resource(id: u128) -> ResourceId {
    ResourceId(Uuid::from_u128(id))
}

/// A valid packet: IPv4 with an option or IPv6 with an extension header, TCP with options, no checksums.
pub fn packet(
    protocol: FlowProtocol,
    src: SocketAddr,
    dst: SocketAddr,
    flags: u8,
    payload: usize,
) -> Vec<u8> {
    let mut body = [src.port().to_be_bytes(), dst.port().to_be_bytes()].concat();
    let number = match protocol {
        FlowProtocol::Tcp => {
            body.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x70, flags, 0, 0, 0, 0, 0, 0]);
            body.extend([1, 1, 1, 1, 3, 3, 7, 0]);
            6
        }
        FlowProtocol::Udp => {
            body.extend(u16::try_from(8 + payload).unwrap().to_be_bytes());
            body.extend([0, 0]);
            17
        }
    };
    body.extend(vec![0xaa; payload]);
    let mut packet = match (src.ip(), dst.ip()) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            let total = u16::try_from(24 + body.len()).unwrap().to_be_bytes();
            let mut header = vec![0x46, 0, total[0], total[1], 0, 0, 0, 0, 64, number, 0, 0];
            header.extend([src.octets(), dst.octets(), [1, 1, 1, 0]].concat());
            header
        }
        (IpAddr::V6(src), IpAddr::V6(dst)) => {
            let len = u16::try_from(8 + body.len()).unwrap().to_be_bytes();
            let mut header = vec![0x60, 0, 0, 0, len[0], len[1], 60, 64];
            header.extend([src.octets(), dst.octets()].concat());
            header.extend([number, 0, 1, 4, 0, 0, 0, 0]);
            header
        }
        _ => panic!("one packet has one family"),
    };
    packet.extend(body);
    packet
}

/// A way that is not that of other numbers.
pub fn way(number: u16) -> Way {
    let client = (number != 99).then(|| SocketAddr::from(([198, 51, 100, 9], number)));
    Way { client, own: "203.0.113.4:52625".parse().unwrap() }
}

/// One client, one resource, and what was reported.
struct World {
    flows: Flows,
    reports: RefCell<Vec<FlowReport>>,
    now: Instant,
    clock: Meeting,
    protocol: FlowProtocol,
    ends: (SocketAddr, SocketAddr),
    resource: ResourceId,
    domain: Option<DomainName>,
    way: Way,
}

/// What is done to it. Times in seconds, payloads in bytes.
#[derive(Debug, Clone, Copy)]
enum Do {
    Out(u8, usize),
    In(u8, usize),
    Pass(u64),
    Take(u16),
    Resource(u128),
    CloseAll,
}
use Do::*;

/// What is reported of it: that one began, or its end, its last packet (both in seconds since its beginning), packets and
/// bytes out, packets and bytes in.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Began,
    Ended(u64, u64, (u64, u64), (u64, u64)),
}
use Told::*;

impl World {
    fn new() -> Self {
        let now = twin::start();
        Self {
            flows: Flows::new(CLIENT, 5, MAX_FLOWS, now),
            reports: RefCell::default(),
            now,
            clock: Meeting { unix: UnixTime(Duration::from_secs(1_700_000_000)), at: now },
            protocol: FlowProtocol::Tcp,
            ends: ("100.64.0.1:1234".parse().unwrap(), "10.0.0.5:443".parse().unwrap()),
            resource: resource(1),
            domain: None,
            way: way(1),
        }
    }

    fn act(&mut self, act: Do) {
        let (client, remote) = self.ends;
        let mut out = |report: Box<FlowReport>| self.reports.borrow_mut().push(*report);
        match act {
            Out(flags, payload) => {
                let packet = packet(self.protocol, client, remote, flags, payload);
                let view = inner::view(&packet).unwrap();
                let occasion = Occasion {
                    resource: self.resource,
                    domain: &|| self.domain.clone(),
                    attributions: &ATTRIBUTIONS,
                    clock: self.clock,
                };
                self.flows.outbound(&packet, &view, self.way, &occasion, self.now, &mut out);
            }
            In(flags, payload) => {
                let packet = packet(self.protocol, remote, client, flags, payload);
                self.flows.inbound(&packet, &inner::view(&packet).unwrap(), self.now, &mut out);
            }
            Pass(seconds) => {
                self.now += Duration::from_secs(seconds);
                self.flows.handle_timeout(self.now, &mut out);
            }
            Take(number) => self.way = way(number),
            Resource(id) => self.resource = resource(id),
            CloseAll => self.flows.close_all(self.now, &mut out),
        }
    }

    fn run(&mut self, acts: &[Do]) -> Vec<Told> {
        acts.iter().for_each(|act| self.act(*act));
        self.reports.borrow().iter().map(told).collect()
    }
}

fn told(report: &FlowReport) -> Told {
    let since = |time: UnixTime| (time.0 - report.start.0).as_secs();
    report.end.map_or(Began, |end| {
        Ended(
            since(end.end),
            since(end.last_packet),
            (end.tx_packets, end.tx_bytes),
            (end.rx_packets, end.rx_bytes),
        )
    })
}

#[test]
fn flags_decide_when_a_tcp_flow_begins_and_ends() {
    // Each ends by closing all, two seconds later.
    let table: &[(&str, &[Do], &[Told])] = &[
        ("a SYN opens", &[Out(SYN, 0)], &[Began, Ended(2, 0, (1, 0), (0, 0))]),
        ("data opens", &[Out(PSH, 7)], &[Began, Ended(2, 0, (1, 7), (0, 0))]),
        ("an ACK does not", &[Out(ACK, 0)], &[]),
        ("an ACK with PSH does not", &[Out(PSH, 0)], &[]),
        ("an ACK with data does", &[Out(ACK, 1)], &[Began, Ended(2, 0, (1, 1), (0, 0))]),
        ("a FIN does not", &[Out(FIN, 5)], &[]),
        ("a RST does not", &[Out(RST, 0)], &[]),
        ("a SYN that resets does not", &[Out(SYN | RST, 0)], &[]),
        ("the resource's packets do not", &[In(SYN, 0), In(PSH, 5)], &[]),
        (
            "a whole connection",
            &[
                Out(SYN, 0),
                In(SYN_ACK, 0),
                Out(ACK, 0),
                Out(PSH, 100),
                Pass(3),
                In(PSH, 1000),
                Out(FIN, 0),
                In(FIN, 4),
                Out(ACK, 0),
                Pass(1),
                In(ACK, 0),
            ],
            &[Began, Ended(3, 3, (5, 100), (3, 1004))],
        ),
        (
            "half closed goes on",
            &[Out(SYN, 0), Out(FIN, 0), Pass(100)],
            &[Began, Ended(102, 0, (2, 0), (0, 0))],
        ),
        (
            "the resource's FIN first",
            &[Out(SYN, 0), In(FIN, 0), Pass(100), Out(FIN, 0), Pass(1)],
            &[Began, Ended(100, 100, (2, 0), (1, 0))],
        ),
        (
            "the client resets",
            &[Out(SYN, 0), Pass(5), Out(RST, 0), Out(ACK, 0)],
            &[Began, Ended(5, 5, (2, 0), (0, 0))],
        ),
        (
            "the resource resets",
            &[Out(SYN, 0), In(RST | ACK, 0), In(ACK, 0)],
            &[Began, Ended(0, 0, (1, 0), (1, 0))],
        ),
        (
            "a repeated SYN is the same",
            &[Out(SYN, 0), Pass(1), Out(SYN, 0), In(SYN_ACK, 0), Out(SYN_ACK, 0)],
            &[Began, Ended(3, 1, (3, 0), (1, 0))],
        ),
        (
            "a SYN after more is another",
            &[Out(SYN, 0), Out(ACK, 0), Pass(9), Out(SYN, 0), In(SYN_ACK, 0)],
            &[Began, Ended(9, 0, (2, 0), (0, 0)), Began, Ended(2, 0, (1, 0), (1, 0))],
        ),
        (
            "a SYN between both FINs and the tick",
            &[Out(PSH, 1), Out(FIN, 0), In(FIN, 0), Out(SYN, 0)],
            &[Began, Ended(0, 0, (2, 1), (1, 0)), Began, Ended(2, 0, (1, 0), (0, 0))],
        ),
        (
            "a SYN that resets after more ends it",
            &[Out(PSH, 1), Out(SYN | RST, 0)],
            &[Began, Ended(0, 0, (2, 1), (0, 0))],
        ),
        ("idle for two minutes", &[Out(SYN, 0), Pass(119), Pass(1)], &[Began, Ended(120, 0, (1, 0), (0, 0))]),
        (
            "not idle, by the resource's packets",
            &[Out(SYN, 0), Pass(119), In(ACK, 3), Pass(119), Pass(1)],
            &[Began, Ended(239, 119, (1, 0), (1, 3))],
        ),
        (
            "after idling it begins anew",
            &[Out(PSH, 1), Pass(121), Out(ACK, 0), In(ACK, 0), Out(PSH, 2)],
            &[Began, Ended(121, 0, (1, 1), (0, 0)), Began, Ended(2, 0, (1, 2), (0, 0))],
        ),
        ("no token for the resource", &[Resource(3), Out(SYN, 0), In(SYN_ACK, 0)], &[]),
        (
            "by another resource",
            &[Out(PSH, 1), Pass(1), Resource(2), Out(PSH, 2)],
            &[Began, Ended(1, 0, (1, 1), (0, 0)), Began, Ended(2, 0, (1, 2), (0, 0))],
        ),
        (
            "by another resource, which has no token, and back",
            &[Out(PSH, 1), Resource(3), Out(PSH, 2), Resource(1), Out(ACK, 0)],
            &[Began, Ended(0, 0, (1, 1), (0, 0))],
        ),
        (
            "all closed",
            &[Out(PSH, 1), CloseAll, In(ACK, 0), Out(ACK, 0)],
            &[Began, Ended(0, 0, (1, 1), (0, 0))],
        ),
    ];
    for v6 in [false, true] {
        for (name, acts, expect) in table {
            let mut world = World::new();
            if v6 {
                world.ends = ("[fd00::1]:1234".parse().unwrap(), "[2001:db8::5]:443".parse().unwrap());
            }
            let mut got = world.run(acts);
            world.now += Duration::from_secs(2);
            let before = got.len();
            got.extend(world.run(&[CloseAll]).drain(before..));
            assert_eq!(got, *expect, "{name}, IPv6: {v6}");
            assert!(world.flows.is_empty() && world.flows.poll_timeout().is_none(), "{name}");
        }
    }
}

#[test]
fn any_datagram_begins_a_udp_flow_and_only_time_ends_it() {
    let mut world = World::new();
    world.protocol = FlowProtocol::Udp;
    let acts = [Out(0, 0), In(0, 40), Out(0, 9), Pass(60), In(0, 2), Pass(119), Pass(1), In(0, 5)];
    assert_eq!(world.run(&acts), [Began, Ended(180, 60, (2, 9), (2, 42))]);
    let report = &world.reports.borrow()[1];
    assert_eq!((report.protocol, report.client), (FlowProtocol::Udp, CLIENT));
}

#[test]
fn a_report_says_between_whom_by_which_name_under_which_token_and_since_when() {
    let mut world = World::new();
    world.domain = DomainName::parse("db.example.net");
    world.run(&[Pass(5), Out(SYN, 0)]);
    // Somebody sets the clock.
    world.clock = Meeting { unix: UnixTime(Duration::from_secs(5)), at: world.now };
    world.run(&[Pass(3), Take(99), Out(ACK, 0), In(RST, 0)]);
    let start = UnixTime(Duration::from_secs(1_700_000_005));
    let later = UnixTime(Duration::from_secs(1_700_000_008));
    let began = FlowReport {
        id: FlowId(5),
        client: CLIENT,
        attribution: Arc::clone(&ATTRIBUTIONS[0].1),
        protocol: FlowProtocol::Tcp,
        src: world.ends.0,
        dst: world.ends.1,
        domain: world.domain.clone(),
        outers: vec![flow::outer(way(1), start)],
        start,
        end: None,
    };
    let mut ended = began.clone();
    ended.outers.push(crate::flow::Outer { src: None, dst: way(1).own, since: later });
    ended.end = Some(crate::flow::FlowEnd {
        end: later,
        last_packet: later,
        rx_packets: 1,
        tx_packets: 2,
        rx_bytes: 0,
        tx_bytes: 0,
    });
    assert_eq!(*world.reports.borrow(), [began, ended]);
}

#[test]
fn the_seventeenth_way_splits_a_flow_that_stays_what_it_was() {
    let mut world = World::new();
    let last = u16::try_from(MAX_WAYS).unwrap();
    world.run(&[Out(SYN, 0), In(SYN_ACK, 0)]);
    for number in 2..=last {
        world.run(&[Take(number), Out(PSH, 1), Out(PSH, 1)]);
    }
    assert_eq!(world.reports.borrow().len(), 1);
    // By packets that would open nothing.
    world.run(&[Out(FIN, 0), Pass(2), Take(1), Out(ACK, 0), Out(ACK, 0), In(FIN, 7), Pass(1)]);
    let reports = world.reports.borrow();
    let expect = [Began, Ended(2, 0, (32, 30), (1, 0)), Began, Ended(0, 0, (2, 0), (1, 7))];
    assert_eq!(reports.iter().map(told).collect::<Vec<_>>(), expect);
    let ways: Vec<_> =
        reports.iter().map(|r| r.outers.iter().map(|o| o.src.unwrap().port()).collect::<Vec<_>>()).collect();
    let all: Vec<u16> = (1..=last).collect();
    assert_eq!(ways, [vec![1], all, vec![1], vec![1]]);
    assert!(
        reports[0].id == reports[1].id && reports[1].id != reports[2].id && reports[2].id == reports[3].id
    );
    drop(reports);

    let mut world = World::new();
    for number in 1..=last {
        world.run(&[Take(number), Out(PSH, 1)]);
    }
    assert_eq!(
        world.run(&[Take(99), Out(RST, 0)]),
        [Began, Ended(0, 0, (17, 16), (0, 0))],
        "an end needs no split"
    );
}

#[test]
fn going_back_to_an_earlier_way_is_a_change_too() {
    let mut world = World::new();
    world.run(&[Out(PSH, 1), Take(2), Out(PSH, 1), In(PSH, 1), Take(1), Out(PSH, 1), Out(PSH, 1), CloseAll]);
    let ports: Vec<_> = world.reports.borrow()[1].outers.iter().map(|o| o.src.unwrap().port()).collect();
    assert_eq!(ports, [1, 2, 1]);
}

#[test]
fn what_is_neither_tcp_nor_udp_is_not_accounted() {
    let mut world = World::new();
    let echo = {
        let mut packet = packet(FlowProtocol::Udp, world.ends.0, world.ends.1, 0, 8);
        packet[9] = 1;
        packet[24] = 8;
        packet
    };
    let view = inner::view(&echo).unwrap();
    assert_eq!(view.transport, Transport::IcmpEcho);
    let occasion = Occasion {
        resource: world.resource,
        domain: &|| None,
        attributions: &ATTRIBUTIONS,
        clock: world.clock,
    };
    let mut none = |report: Box<FlowReport>| panic!("{report:?}");
    world.flows.outbound(&echo, &view, way(1), &occasion, world.now, &mut none);
    world.flows.inbound(&echo, &view, world.now, &mut none);
    assert!(world.flows.is_empty());
}

#[test]
fn of_too_many_flows_an_idle_one_is_closed_and_every_byte_is_still_in_some_record() {
    let limit = 64;
    let mut world = World::new();
    world.flows = Flows::new(CLIENT, 5, limit, world.now);
    for round in 0..10 {
        for port in 1000..1100 {
            world.ends.0.set_port(port);
            world.run(&[Out(PSH, 3)]);
            assert!(world.flows.len() <= limit, "round {round}");
        }
        world.run(&[Pass(1)]);
    }
    world.run(&[CloseAll]);
    let reports = world.reports.borrow();
    let bytes: u64 = reports.iter().filter_map(|report| Some(report.end?.tx_bytes)).sum();
    assert_eq!(bytes, 3 * 1000);
    let (began, ended): (Vec<_>, Vec<_>) = reports.iter().partition(|report| report.end.is_none());
    assert!(began.len() == ended.len() && began.len() > limit);
    assert!(world.flows.flows.len() <= limit, "slots are used again");
}

#[test]
fn a_busy_flow_is_never_the_one_that_goes() {
    let mut world = World::new();
    world.flows = Flows::new(CLIENT, 5, SAMPLE, world.now);
    for port in 0..200 {
        world.ends.0.set_port(1);
        world.act(Out(PSH, 1));
        world.ends.0.set_port(1000 + port);
        world.act(Out(PSH, 1));
        world.act(Pass(1));
    }
    let of_busy = |report: &&FlowReport| report.src.port() == 1;
    assert_eq!(world.reports.borrow().iter().filter(of_busy).count(), 1, "it began, and goes on");
}
