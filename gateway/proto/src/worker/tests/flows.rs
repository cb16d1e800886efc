//! Flows of packets on their whole way: what is counted, and what closes them. What of a segment opens and closes a
//! flow is `flows/tests.rs`; that no packet is counted twice or not at all, whoever moves where, is `model.rs`.

use std::time::Duration;

use super::{
    fleet::*,
    names::{REAL4, REAL6, domain, example},
    *,
};
use crate::{
    addr::TunnelAddrs,
    flow::{FlowProtocol, FlowReport, Meeting, Outer, UnixTime},
    names::Names,
};

const SYN: u8 = 0x02;
const PSH: u8 = 0x18;
const RST: u8 = 0x04;
/// What the wall clock shows when a world begins.
const BEGIN: Duration = Duration::from_secs(1_700_000_000);

/// The resources of [`lan`], a DNS resource, and a network that no token came for.
fn resources() -> Vec<Resource> {
    [lan(), vec![dns(3, "*.x"), cidr(4, "10.55.0.0/24", &[])]].concat()
}

fn state(world: &World) -> ClientState {
    let path = match world.client.relayed {
        true => Path::Relayed { server: addr(SERVER), channel: Some(CHANNEL), remote: addr(REMOTE) },
        false => direct(),
    };
    let connection = Connection::Present(world.client.keys(), Some(path));
    let domains = example();
    ClientState {
        names: Arc::new(Names { domains: domains.into(), ..Names::default() }),
        attributions: attributions(&[1, 2, 3]),
        ..ClientState::new(world.client.tunnel, connection, resources().into())
    }
}

pub fn clock(world: &World) -> Command {
    Command::WallClock(Meeting { unix: UnixTime(BEGIN), at: world.now })
}

pub fn counting(relayed: bool) -> World {
    let mut world = if relayed { World::relayed(&resources()) } else { World::connected(&resources()) };
    if relayed {
        world.handshake();
    }
    world.command(Command::Accounting { on: true });
    world.command(clock(&world));
    world.tell_state(state(&world));
    world.events();
    world
}

/// TCP with these flags, 20 bytes of header.
pub fn segment(src: (&str, u16), dst: (&str, u16), flags: u8, payload: usize) -> Vec<u8> {
    let mut packet = tcp(src.0, dst.0, (src.1, dst.1));
    let transport = if packet[0] >> 4 == 4 { 20 } else { 40 };
    let mut segment = packet.split_off(transport);
    segment[13] = flags;
    segment.resize(20 + payload, 7);
    ip(src.0, dst.0, 6, &segment)
}

pub fn flows(world: &mut World) -> Vec<FlowReport> {
    let flow = |event| if let WorkerEvent::Flow(report) = event { Some(*report) } else { None };
    world.events().into_iter().filter_map(flow).collect()
}

/// Packets and bytes out, packets and bytes in; `None` if it goes on.
pub fn carried(report: &FlowReport) -> Option<[u64; 4]> {
    report.end.map(|end| [end.tx_packets, end.tx_bytes, end.rx_packets, end.rx_bytes])
}

#[track_caller]
pub fn out(world: &mut World, packet: &[u8]) {
    let before = world.sink.packets.len();
    world.outbound(packet);
    assert_eq!(world.sink.packets.len(), before + 1, "{:?}", world.worker.counters());
}

#[track_caller]
fn back(world: &mut World, packet: &[u8]) {
    world.inbound(packet);
    assert!(world.received().is_some_and(|got| !got.is_empty()), "{:?}", world.worker.counters());
}

#[test]
fn packets_that_pass_are_counted_with_their_payload_and_their_way() {
    for relayed in [false, true] {
        for (client, lan) in [(C4, LAN4), (C6, LAN6)] {
            let mut world = counting(relayed);
            out(&mut world, &segment((client, 40000), (lan, 80), SYN, 0));
            world.advance(Duration::from_secs(3));
            back(&mut world, &segment((lan, 80), (client, 40000), PSH, 100));
            out(&mut world, &segment((client, 40000), (lan, 80), PSH, 9));
            back(&mut world, &segment((lan, 80), (client, 40000), PSH, 1));
            out(&mut world, &segment((client, 40000), (lan, 80), RST, 0));
            let reports = flows(&mut world);
            let [began, ended] = &reports[..] else { panic!("{reports:?}") };
            assert_eq!((carried(began), carried(ended)), (None, Some([3, 9, 2, 101])));
            let own = if relayed { addr(SERVER) } else { addr(LOCAL) };
            let start = UnixTime(BEGIN);
            assert_eq!(ended.outers, [Outer { src: Some(addr(REMOTE)), dst: own, since: start }]);
            assert_eq!(
                (ended.id, ended.client, ended.start, ended.end.unwrap().last_packet),
                (began.id, world.client.id, start, UnixTime(BEGIN + Duration::from_secs(3)))
            );
            let ends = (format!("[{client}]:40000"), format!("[{lan}]:80"));
            let ends = if client == C4 { (format!("{client}:40000"), format!("{lan}:80")) } else { ends };
            assert_eq!((ended.src.to_string(), ended.dst.to_string()), ends);
            assert_eq!((ended.protocol, &ended.domain), (FlowProtocol::Tcp, &None));
            assert_eq!(world.worker.traffic().flow_reports_lost, 0);
            world.check_accounts();
        }
    }
}

#[test]
fn translated_packets_are_counted_as_the_resource_knows_them_under_the_clients_name_for_it() {
    let mut world = counting(false);
    // Another name on the same addresses: its sessions have other ports outside.
    let twins = [("100.96.0.2", Some(REAL4)), ("fd00:2021:1111:8000::2", Some(REAL6))];
    let domains = example().into_iter().chain([domain("twin.x", &[3], &twins)]).collect();
    let names = Arc::new(Names { domains, ..Names::default() });
    world.tell_state(ClientState { names, ..state(&world) });
    let mut table = Vec::new();
    for (client, proxy, twin, real) in
        [(C4, "100.96.0.1", twins[0].0, REAL4), (C6, "fd00:2021:1111:8000::1", twins[1].0, REAL6)]
    {
        for (proxy, outside, name) in [(proxy, 40000, "git.x"), (twin, 40001, "twin.x")] {
            out(&mut world, &udp(client, proxy, (40000, 53), b"query"));
            back(&mut world, &udp(real, client, (53, outside), b"the answer"));
            out(&mut world, &udp(client, proxy, (40000, 53), b"2"));
            table.push((client.to_owned(), outside, real.to_owned(), 53, name));
        }
    }
    let began = flows(&mut world);
    let ends = |report: &FlowReport| {
        let name = report.domain.as_ref().map_or("", |name| name.as_str()).to_owned();
        (report.src.ip().to_string(), report.src.port(), report.dst.ip().to_string(), report.dst.port(), name)
    };
    let expect: Vec<_> = table.into_iter().map(|(a, b, c, d, name)| (a, b, c, d, name.to_owned())).collect();
    assert_eq!(began.iter().map(ends).collect::<Vec<_>>(), expect);
    world.advance(Duration::from_secs(122));
    let ended: Vec<_> = flows(&mut world).iter().map(carried).collect();
    assert_eq!(ended, [Some([2, 6, 1, 10]); 4]);
    world.check_accounts();
}

#[test]
fn what_does_not_pass_or_belongs_to_nobody_is_not_counted() {
    let mut world = counting(false);
    let filtered = cidr(1, "10.44.0.0/24", &[Filter::Udp { first: 53, last: 53 }]);
    world.tell_state(ClientState {
        resources: [filtered, cidr(4, "10.55.0.0/24", &[])].into(),
        ..state(&world)
    });
    for (name, packet) in [
        ("denied", udp(C4, LAN4, (1, 54), b"x")),
        ("no resource", udp(C4, "10.66.0.1", (1, 53), b"x")),
        ("no token", udp(C4, "10.55.0.1", (1, 53), b"x")),
        ("our own DNS server", udp(C4, OWN_V4, (1, 53535), b"x")),
        ("multicast", udp(C4, "224.0.0.251", (1, 53), b"x")),
        ("foreign", udp("100.64.2.2", LAN4, (1, 53), b"x")),
    ] {
        world.outbound(&packet);
        assert_eq!(flows(&mut world), [], "{name}");
    }
    // Nobody asked.
    world.inbound(&udp(LAN4, C4, (53, 1), b"x"));
    world.inbound(&udp(OWN_V4, C4, (53535, 1), b"x"));
    assert_eq!(flows(&mut world), []);

    out(&mut world, &udp(C4, LAN4, (1, 53), b"x"));
    world.sink.full = true;
    world.inbound(&udp(LAN4, C4, (53, 1), b"not sent"));
    world.outbound(&udp(C4, LAN4, (1, 53), b"not sent"));
    assert_eq!(world.count(DropReason::Backpressure), 2);
    world.sink.full = false;
    world.outbound(&udp(C4, LAN4, (1, 54), b"denied"));
    world.inbound(&udp(LAN4, C4, (54, 1), b"denied"));
    world.sink.datagrams.clear();
    world.command(Command::Shutdown);
    let reports = flows(&mut world);
    assert_eq!(reports.iter().map(carried).collect::<Vec<_>>(), [None, Some([1, 1, 0, 0])]);
}

#[test]
fn whatever_takes_a_client_away_closes_its_flows() {
    type Act = fn(&mut World);
    let table: [(&str, bool, Act); 7] = [
        ("removed", true, |world| world.revoke()),
        ("a goodbye", true, |world| world.outbound(&GOODBYE)),
        ("shutdown", true, |world| world.command(Command::Shutdown)),
        ("not counted any more", true, |world| world.command(Command::Accounting { on: false })),
        ("other addresses", true, |world| {
            let v4 = [100, 64, 9, 9].into();
            let tunnel = TunnelAddrs { v4, ..world.client.tunnel };
            world.tell_state(ClientState { tunnel, ..state(world) });
        }),
        ("no resource any more", false, |world| {
            world.tell_state(ClientState { resources: [].into(), attributions: [].into(), ..state(world) });
        }),
        ("no connection any more", false, |world| {
            let connection = Connection::Absent;
            world.tell_state(ClientState { connection, ..state(world) });
        }),
    ];
    for (name, at_once, act) in table {
        let mut world = counting(false);
        out(&mut world, &udp(C4, LAN4, (1, 53), b"12"));
        back(&mut world, &udp(LAN4, C4, (53, 1), b"3"));
        out(&mut world, &segment((C6, 5), (LAN6, 6), SYN, 0));
        assert_eq!(flows(&mut world).len(), 2, "{name}");
        world.advance(Duration::from_secs(2));
        act(&mut world);
        let mut reports = flows(&mut world);
        if !at_once {
            assert_eq!(reports, [], "{name}");
            world.advance(Duration::from_secs(117));
            assert_eq!(flows(&mut world), [], "{name}");
            world.advance(Duration::from_secs(2));
            reports = flows(&mut world);
        }
        let mut ended: Vec<_> = reports.iter().map(carried).collect();
        ended.sort_unstable();
        assert_eq!(ended, [Some([1, 0, 0, 0]), Some([1, 2, 1, 1])], "{name}");
        let length = if at_once { 2..3 } else { 120..122 };
        assert!(
            reports.iter().all(|r| length.contains(&(r.end.unwrap().end.0 - r.start.0).as_secs())),
            "{name}"
        );
        // And only once.
        world.command(Command::Shutdown);
        assert_eq!(flows(&mut world), [], "{name}");
    }
}

#[test]
fn nothing_is_counted_before_it_is_wanted_and_the_clock_is_known() {
    let mut world = World::connected(&resources());
    world.tell_state(state(&world));
    let packet = udp(C4, LAN4, (1, 53), b"x");
    let passes = |world: &mut World| {
        out(world, &packet);
        flows(world).len()
    };
    assert_eq!(passes(&mut world), 0);
    world.command(Command::Accounting { on: true });
    assert_eq!(passes(&mut world), 0, "nobody knows the time");
    world.command(clock(&world));
    assert_eq!(passes(&mut world), 1);
    assert_eq!(passes(&mut world), 0, "it is open");
    world.command(Command::Accounting { on: false });
    assert_eq!(passes(&mut world), 1, "its end");
    assert_eq!(passes(&mut world), 0);
    world.command(Command::Accounting { on: true });
    assert_eq!(passes(&mut world), 1, "another");
    // Of a client that comes later too.
    world.revoke();
    assert_eq!(flows(&mut world).len(), 1);
    world.sink.datagrams.clear();
    world.sink.packets.clear();
    world.tell_state(state(&world));
    world.handshake();
    assert_eq!(passes(&mut world), 1);
}

#[test]
fn a_token_that_comes_later_counts_from_then_on_and_one_that_goes_leaves_what_is_open() {
    let mut world = counting(false);
    let with = |world: &World, ids: &[u128]| ClientState { attributions: attributions(ids), ..state(world) };
    world.tell_state(with(&world, &[]));
    let [first, second] = [53, 54].map(|port| udp(C4, "10.55.0.1", (1, port), b"x"));
    out(&mut world, &first);
    assert_eq!(flows(&mut world), []);
    world.tell_state(with(&world, &[4]));
    out(&mut world, &first);
    assert_eq!(flows(&mut world).len(), 1);
    world.tell_state(with(&world, &[]));
    out(&mut world, &first);
    out(&mut world, &second);
    assert_eq!(flows(&mut world), []);
    world.command(Command::Shutdown);
    assert_eq!(flows(&mut world).iter().map(carried).collect::<Vec<_>>(), [Some([2, 2, 0, 0])]);
}

#[test]
fn a_clock_that_is_set_moves_no_flow_that_is_open() {
    let mut world = counting(false);
    let [first, second] = [53, 54].map(|port| udp(C4, LAN4, (1, port), b"x"));
    out(&mut world, &first);
    world.advance(Duration::from_secs(10));
    let unix = UnixTime(Duration::from_secs(1000));
    world.command(Command::WallClock(Meeting { unix, at: world.now }));
    out(&mut world, &first);
    out(&mut world, &second);
    let starts: Vec<_> = flows(&mut world).iter().map(|report| report.start).collect();
    assert_eq!(starts, [UnixTime(BEGIN), unix]);
    world.command(Command::Shutdown);
    let times: Vec<_> = flows(&mut world).iter().map(|r| (r.start, r.end.unwrap().end)).collect();
    assert_eq!(times, [(UnixTime(BEGIN), UnixTime(BEGIN + Duration::from_secs(10))), (unix, unix)]);
}

#[test]
fn reports_that_find_no_room_are_counted_and_the_rest_goes_on() {
    let mut world = counting(false);
    let flood = 9000;
    for port in 0..flood {
        let packet = udp(C4, LAN4, (port, 53), b"");
        world.outbound(&packet);
    }
    let kept = flows(&mut world).len() as u64;
    assert_eq!(kept + world.worker.traffic().flow_reports_lost, u64::from(flood));
    assert!(world.worker.traffic().flow_reports_lost > 0);
    out(&mut world, &udp(C4, LAN4, (flood, 53), b""));
    assert_eq!(flows(&mut world).len(), 1, "there is room again");
    world.check_accounts();
}

#[test]
fn denied_packets_are_told_within_a_budget_both_ways() {
    let mut world = counting(false);
    let told = |world: &mut World| -> Vec<_> {
        let denied = |event| if let WorkerEvent::Denied(report) = event { Some(*report) } else { None };
        world.sink.datagrams.clear();
        world.events().into_iter().filter_map(denied).collect()
    };
    let at = UnixTime(BEGIN);
    world.outbound(&segment((C4, 40000), ("10.66.0.1", 22), SYN, 0));
    world.outbound(&udp(C6, "fd00:2021:1111:8000::7", (1, 2), b""));
    world.outbound(&icmp(C4, OWN_V4, 13, &[0; 12]));
    world.outbound(&ip(C4, "100.64.7.7", 47, b""));
    world.inbound(&udp("10.66.0.1", C4, (53, 1), b""));
    // None that anybody would want to be told of.
    world.outbound(&udp(C4, "224.0.0.251", (1, 2), b""));
    world.outbound(b"\x45junk");
    world.inbound(&udp(LAN4, "100.64.7.7", (53, 1), b""));
    let reports = told(&mut world);
    let brief: Vec<_> = reports.iter().map(|r| (r.reason, r.protocol, r.ports)).collect();
    assert_eq!(
        brief,
        [
            (DropReason::NotAllowed, 6, Some((40000, 22))),
            (DropReason::NoTranslation, 17, Some((1, 2))),
            (DropReason::OwnAddressPort, 1, None),
            (DropReason::TunnelDestination, 47, None),
            (DropReason::InboundNotAllowed, 17, Some((53, 1))),
        ]
    );
    assert!(reports.iter().all(|r| (r.client, r.at, r.suppressed) == (world.client.id, at, 0)));
    assert_eq!((reports[0].src.to_string(), reports[0].dst.to_string()), (C4.into(), "10.66.0.1".into()));

    let scan = |world: &mut World, packets: u16| {
        (0..packets).for_each(|port| world.outbound(&udp(C4, "10.66.0.1", (1, port), b"")));
    };
    scan(&mut world, 40);
    assert_eq!(told(&mut world).len(), 15, "what the first five left of the burst");
    world.now += Duration::from_secs(1);
    scan(&mut world, 40);
    let suppressed: Vec<_> = told(&mut world).iter().map(|report| report.suppressed).collect();
    assert_eq!(suppressed, [25, 0, 0, 0, 0, 0, 0, 0, 0, 0]);

    world.command(Command::Accounting { on: false });
    world.now += Duration::from_secs(9);
    scan(&mut world, 1);
    assert_eq!(told(&mut world), []);
    world.check_accounts();
}

#[test]
fn a_client_that_moves_takes_its_flows_along() {
    let mut fleet = Fleet::new(3);
    let mut client = Fleet::client(1);
    fleet.account();
    fleet.place(&client, at(0, 1), direct());
    fleet.handshake(0, &mut client, addr(REMOTE));
    let [there, here] = [udp(C4, LAN4, (1, 53), b"12"), udp(LAN4, C4, (53, 1), b"3")];
    let passes = |fleet: &mut Fleet, client: &mut Client| {
        for n in 0..3 {
            fleet.datagram(n, addr(REMOTE), &client.seal(&there));
            fleet.packet(n, &here);
            fleet.rest();
        }
        assert_eq!((fleet.tun.drain(..).count(), fleet.net.drain(..).count()), (3, 3));
    };
    passes(&mut fleet, &mut client);
    fleet.place(&client, from_to(0, 2, 2), direct());
    fleet.rest();
    passes(&mut fleet, &mut client);
    let told = |fleet: &mut Fleet| -> Vec<_> {
        let flow =
            |(by, event)| if let WorkerEvent::Flow(report) = event { Some((by, *report)) } else { None };
        fleet.events.drain(..).filter_map(flow).collect()
    };
    let began = told(&mut fleet);
    assert_eq!(began.iter().map(|(by, report)| (*by, carried(report))).collect::<Vec<_>>(), [(0, None)]);

    // Time closes it where it is, and nowhere else.
    for _ in 0..122 {
        fleet.advance(Duration::from_secs(1));
        (0..3).for_each(|n| fleet.time(n));
    }
    let ended = told(&mut fleet);
    let brief: Vec<_> = ended.iter().map(|(by, report)| (*by, carried(report))).collect();
    assert_eq!(brief, [(2, Some([6, 12, 6, 6]))]);
    assert_eq!(ended[0].1.id, began[0].1.id);
}

#[test]
fn a_client_that_control_has_elsewhere_by_now_closes_its_flows_where_it_is_dropped() {
    // It is another's, without a move; it arrives where it is not wanted any more; it is removed on its way.
    type Act = fn(&mut Fleet, &Client);
    let table: [(&str, Act); 3] = [
        ("placed anew", |fleet, client| fleet.place(client, at(2, 5), direct())),
        ("placed anew on its way", |fleet, client| {
            fleet.post(&client_command(client, from_to(0, 1, 4), direct()), 0);
            fleet.hear(0);
            fleet.place(client, at(2, 5), direct());
        }),
        ("removed on its way", |fleet, client| {
            fleet.post(&client_command(client, from_to(0, 1, 4), direct()), 0);
            fleet.hear(0);
            fleet.tell(Command::Client { id: client.id, home: from_to(0, 1, 4), desired: None });
        }),
    ];
    for (name, act) in table {
        let mut fleet = Fleet::new(3);
        let mut client = Fleet::client(1);
        fleet.account();
        fleet.place(&client, at(0, 1), direct());
        fleet.handshake(0, &mut client, addr(REMOTE));
        let message = client.seal(&udp(C4, LAN4, (1, 53), b"12"));
        fleet.datagram(0, addr(REMOTE), &message);
        act(&mut fleet, &client);
        fleet.rest();
        let reports: Vec<_> = fleet
            .events
            .drain(..)
            .filter_map(
                |(_, event)| {
                    if let WorkerEvent::Flow(report) = event { Some(carried(&report)) } else { None }
                },
            )
            .collect();
        assert_eq!(reports, [None, Some([1, 2, 0, 0])], "{name}");
    }
}
