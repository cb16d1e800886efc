//! Messages as the kernel sends them, and what they make of the answers.

use rtnetlink::packet_route::route::{RouteLwEnCapType, RouteProtocol};

use super::*;

const UPLINK: u32 = 5;
const OTHER: u32 = 6;
const OURS: Mac = [2, 0, 0, 0, 0, 1];
const ROUTER: Mac = [2, 0, 0, 0, 0, 9];

fn addr(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn pair() -> Pair {
    Pair { src: None, dst: addr("198.51.100.7") }
}

fn link(index: u32, mac: Mac, mtu: u32, up: bool) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = if up { LinkFlags::Up | LinkFlags::LowerUp } else { LinkFlags::Up };
    message.attributes = vec![LinkAttribute::Address(mac.to_vec()), LinkAttribute::Mtu(mtu)];
    RouteNetlinkMessage::NewLink(message)
}

fn neighbour(interface: u32, ip: &str, state: NeighbourState, mac: Option<Mac>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.ifindex = interface;
    message.header.state = state;
    let address = match addr(ip) {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    };
    message.attributes.push(NeighbourAttribute::Destination(address));
    message.attributes.extend(mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.to_vec())));
    message
}

fn here(ip: &str, state: NeighbourState, mac: Mac) -> RouteNetlinkMessage {
    RouteNetlinkMessage::NewNeighbour(neighbour(UPLINK, ip, state, Some(mac)))
}

fn route(attributes: Vec<RouteAttribute>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.kind = RouteType::Unicast;
    message.header.protocol = RouteProtocol::Static;
    message.attributes = attributes;
    message
}

fn plain() -> Vec<RouteAttribute> {
    vec![
        RouteAttribute::Oif(UPLINK),
        RouteAttribute::Gateway(addr("192.0.2.9").into()),
        RouteAttribute::PrefSource(addr("192.0.2.1").into()),
    ]
}

/// A table in which [`pair`] is fast.
fn ready() -> Table {
    let mut table = Table::new([UPLINK]);
    assert_eq!(table.on_message(&link(UPLINK, OURS, 1500, true)), Change::Answers);
    assert_eq!(table.on_message(&here("192.0.2.9", NeighbourState::Reachable, ROUTER)), Change::Answers);
    table.on_route(pair(), Some(&route(plain())));
    assert_eq!(answer(&table), fast(ROUTER, 1500));
    table
}

fn answer(table: &Table) -> Answer {
    table.answers().find(|(of, _)| *of == pair()).expect("it was asked for").1
}

fn fast(destination: Mac, mtu: usize) -> Answer {
    Answer::Fast(Hop { interface: UPLINK, source: OURS, destination, mtu }, addr("192.0.2.1"))
}

#[test]
fn an_answer_follows_link_and_neighbour() {
    use NeighbourState::{Delay, Failed, Incomplete, Probe, Reachable, Stale};
    let moved = [2, 0, 0, 0, 0, 8];
    let gone = neighbour(UPLINK, "192.0.2.9", Stale, Some(ROUTER));
    let failed = RouteNetlinkMessage::NewNeighbour(neighbour(UPLINK, "192.0.2.9", Failed, None));
    let table = [
        ("the same once more", here("192.0.2.9", Reachable, ROUTER), Change::Nothing, fast(ROUTER, 1500)),
        ("it is asked again", here("192.0.2.9", Probe, ROUTER), Change::Nothing, fast(ROUTER, 1500)),
        ("it is waited for", here("192.0.2.9", Delay, ROUTER), Change::Nothing, fast(ROUTER, 1500)),
        ("nobody has heard of it", here("192.0.2.9", Stale, ROUTER), Change::Stale, fast(ROUTER, 1500)),
        ("it has another card", here("192.0.2.9", Stale, moved), Change::Answers, fast(moved, 1500)),
        ("it does not answer", failed, Change::Answers, Answer::Slow),
        ("it is looked for", here("192.0.2.9", Incomplete, [0; 6]), Change::Answers, Answer::Slow),
        ("it is removed", RouteNetlinkMessage::DelNeighbour(gone), Change::Answers, Answer::Slow),
        ("another is stale", here("192.0.2.8", Reachable, moved), Change::Answers, fast(ROUTER, 1500)),
        (
            "the same address elsewhere",
            RouteNetlinkMessage::NewNeighbour(neighbour(OTHER, "192.0.2.9", Reachable, Some(moved))),
            Change::Nothing,
            fast(ROUTER, 1500),
        ),
        ("a smaller MTU", link(UPLINK, OURS, 1400, true), Change::Answers, fast(ROUTER, 1400)),
        ("no carrier", link(UPLINK, OURS, 1500, false), Change::Answers, Answer::Slow),
        ("another link", link(OTHER, OURS, 1400, false), Change::Nothing, fast(ROUTER, 1500)),
        ("nothing new", link(UPLINK, OURS, 1500, true), Change::Nothing, fast(ROUTER, 1500)),
        ("a route", RouteNetlinkMessage::NewRoute(route(vec![])), Change::Routes, fast(ROUTER, 1500)),
    ];
    for (name, message, change, expect) in table {
        let mut table = ready();
        assert_eq!(table.on_message(&message), change, "{name}");
        assert_eq!(answer(&table), expect, "{name}");
    }
}

#[test]
fn a_stale_neighbour_is_told_once_and_only_while_something_is_sent_to_it() {
    let mut table = ready();
    let stale = [("192.0.2.9", ROUTER), ("192.0.2.8", ROUTER)];
    let next = [(UPLINK, addr("192.0.2.9"))];
    assert_eq!(table.take_stale(), []);
    for _ in 0..2 {
        for (ip, mac) in stale {
            table.on_message(&here(ip, NeighbourState::Stale, mac));
        }
        assert_eq!(table.take_stale(), next);
        assert_eq!(table.take_stale(), []);
    }
    // It was stale before anybody sent to it.
    table.retain(|_| false);
    table.on_message(&here("192.0.2.9", NeighbourState::Stale, ROUTER));
    assert_eq!(table.take_stale(), []);
    table.on_route(pair(), Some(&route(plain())));
    table.on_route(Pair { dst: addr("198.51.100.8"), ..pair() }, Some(&route(plain())));
    assert_eq!(table.take_stale(), next);
    // And is not any more.
    table.on_message(&here("192.0.2.9", NeighbourState::Stale, ROUTER));
    table.on_message(&here("192.0.2.9", NeighbourState::Reachable, ROUTER));
    assert_eq!(table.take_stale(), []);
}

#[test]
fn a_route_says_who_is_next_and_which_address_is_ours() {
    use RouteAttribute::*;
    let local = Mac::from([2, 0, 0, 0, 0, 7]);
    let with = |attribute| [plain(), vec![attribute]].concat();
    let source = PrefSource(addr("192.0.2.1").into());
    let v6 = RouteVia::Inet6("fe80::9".parse().unwrap());
    let slow = Answer::Slow;
    let table = [
        ("by a router", plain(), fast(ROUTER, 1500)),
        ("on the link", vec![Oif(UPLINK), source.clone()], fast(local, 1500)),
        ("by an IPv6 router", vec![Oif(UPLINK), source.clone(), Via(v6)], fast(ROUTER, 1500)),
        (
            "with an MTU",
            with(Metrics(vec![RouteMetric::Hoplimit(9), RouteMetric::Mtu(1280)])),
            fast(ROUTER, 1280),
        ),
        (
            "with an MTU larger than the link's",
            with(Metrics(vec![RouteMetric::Mtu(9000)])),
            fast(ROUTER, 1500),
        ),
        ("without a source", vec![Oif(UPLINK)], slow),
        ("without a link", vec![source.clone()], slow),
        ("by another link", vec![Oif(OTHER), source.clone()], slow),
        (
            "to a router that nobody has met",
            vec![Oif(UPLINK), source, Gateway(addr("192.0.2.3").into())],
            slow,
        ),
        ("in a tunnel", with(EncapType(RouteLwEnCapType::Ip)), slow),
    ];
    for (name, attributes, expect) in table {
        let mut table = ready();
        table.on_message(&here("198.51.100.7", NeighbourState::Permanent, local));
        table.on_message(&here("fe80::9", NeighbourState::Reachable, ROUTER));
        table.on_route(pair(), Some(&route(attributes)));
        assert_eq!(answer(&table), expect, "{name}");
    }
    for kind in [RouteType::Local, RouteType::Broadcast, RouteType::BlackHole, RouteType::Unreachable] {
        let mut table = ready();
        let mut message = route(plain());
        message.header.kind = kind;
        table.on_route(pair(), Some(&message));
        assert_eq!(answer(&table), Answer::Slow, "{kind:?}");
    }
    let mut table = ready();
    table.on_route(pair(), None);
    assert_eq!(answer(&table), Answer::Slow, "no route");
}

#[test]
fn the_address_that_was_asked_for_is_the_source() {
    let mut table = ready();
    let pair = Pair { src: Some(addr("192.0.2.77")), ..pair() };
    table.on_route(pair, Some(&route(plain())));
    let (_, answer) = table.answers().find(|(of, _)| *of == pair).unwrap();
    let Answer::Fast(_, source) = answer else { panic!("{answer:?}") };
    assert_eq!(source, addr("192.0.2.77"));
}

#[test]
fn neighbours_that_are_not_listed_again_are_gone() {
    let mut table = ready();
    table.forget_neighbours();
    assert_eq!(answer(&table), Answer::Slow);
}
