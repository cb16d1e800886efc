//! The headers that we would send with, as the kernel's routing changes under them.

use std::{
    net::UdpSocket,
    sync::Arc,
    time::{Duration, Instant},
};

use gateway_proto::{Ecn, Route};

use super::{Bed, SIZES};
use crate::data::{
    netns_tests::{in_netns, ip},
    xsk::{Board, Hop, PAYLOAD_AT, Watch, Ways},
};

fn route(dst: &str) -> Route {
    Route { src: None, dst: dst.parse().unwrap(), ecn: Ecn::Ect0 }
}

/// Waits until what is known about `route` is as `wanted`, and lets the task work.
async fn until(ways: &mut Ways, route: &Route, what: &str, wanted: impl Fn(Option<&Hop>) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        ways.begin_batch();
        let found = ways.find(route);
        let hop = found.and_then(|way| ways.way(way)).map(|way| *way.hop());
        if wanted(hop.as_ref()) {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {hop:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn xsk_ways_follow_neighbours_links_routes_and_rules() {
    in_netns(async {
        let bed = Bed::new();
        // What the bed has said about neighbours is to be found out.
        for address in ["192.0.2.2", "2001:db8::2"] {
            ip(&format!("neigh del {address} dev veth-a"));
        }
        ip("route add 198.51.100.0/24 via 192.0.2.2 mtu 1300");
        ip("-6 route add 2001:db8:1::/48 via 2001:db8::2");
        let board = Arc::new(Board::default());
        let task = tokio::spawn(Watch::new(Arc::clone(&board), [bed.interface]).unwrap().run());
        let mut ways = Ways::new(board, 52_625, 52_625);
        let table = [
            ("192.0.2.2:9", "192.0.2.2", 1500),
            ("[2001:db8::2]:9", "2001:db8::2", 1500),
            ("198.51.100.7:9", "192.0.2.2", 1300),
            ("[2001:db8:1::7]:9", "2001:db8::2", 1500),
        ];
        for (dst, next, mtu) in table {
            let route = route(dst);
            ip(&format!("neigh del {next} dev veth-a"));
            until(&mut ways, &route, "nobody knows the neighbour", |hop| hop.is_none()).await;
            // Ourselves, nowhere, and another interface than those we can send on.
            for other in ["192.0.2.1:9", "[2001:db8::1]:9", "203.0.113.1:9", "127.0.0.1:9"] {
                assert!(ways.find(&self::route(other)).is_none(), "{other}");
            }
            // The slow path sends, and so the kernel asks.
            let socket = UdpSocket::bind(if dst.starts_with('[') { "[::]:0" } else { "0.0.0.0:0" }).unwrap();
            socket.send_to(b"slow", dst).unwrap();
            let expect = Hop {
                interface: bed.interface,
                source: [2, 0, 0, 0, 0, 1],
                destination: [2, 0, 0, 0, 0, 2],
                mtu,
            };
            until(&mut ways, &route, "the neighbour is known", |hop| hop == Some(&expect)).await;

            ip(&format!("neigh replace {next} lladdr 02:00:00:00:00:99 nud reachable dev veth-a"));
            let moved = Hop { destination: [2, 0, 0, 0, 0, 0x99], ..expect };
            until(&mut ways, &route, "the neighbour has another card", |hop| hop == Some(&moved)).await;
            ip(&format!("neigh replace {next} lladdr 02:00:00:00:00:02 nud stale dev veth-a"));
            until(&mut ways, &route, "and the first one again", |hop| hop == Some(&expect)).await;
            ip(&format!("neigh change {next} lladdr 02:00:00:00:00:02 nud stale dev veth-a"));
            let deadline = Instant::now() + Duration::from_secs(10);
            while ip(&format!("neigh show {next} dev veth-a")).contains("STALE") {
                assert!(Instant::now() < deadline, "nobody asks whether the neighbour is still there");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }

            let family = if dst.starts_with('[') { "-6" } else { "-4" };
            ip(&format!("{family} rule add fwmark 0xfd002021 prio 50 unreachable"));
            until(&mut ways, &route, "our mark is not routed", |hop| hop.is_none()).await;
            ip(&format!("{family} rule del fwmark 0xfd002021 prio 50 unreachable"));
            until(&mut ways, &route, "it is again", |hop| hop == Some(&expect)).await;
            ip("link set veth-a mtu 1290");
            until(&mut ways, &route, "a smaller MTU", |hop| hop.is_some_and(|hop| hop.mtu == 1290)).await;
            ip("link set veth-a mtu 1500");
            until(&mut ways, &route, "the old MTU", |hop| hop == Some(&expect)).await;
        }
        let to = route("192.0.2.2:9");
        ip("addr del 192.0.2.1/24 dev veth-a");
        until(&mut ways, &to, "no address, no route", |hop| hop.is_none()).await;
        ip("addr add 192.0.2.1/24 dev veth-a");
        ip("neigh replace 192.0.2.2 lladdr 02:00:00:00:00:02 dev veth-a");
        until(&mut ways, &to, "both are back", |hop| hop.is_some()).await;
        ip("link set veth-a down");
        until(&mut ways, &to, "the link is down", |hop| hop.is_none()).await;
        ip("link set veth-a up");
        ip("neigh replace 192.0.2.2 lladdr 02:00:00:00:00:02 dev veth-a");
        until(&mut ways, &to, "the link is up", |hop| hop.is_some()).await;
        task.abort();
        until(&mut ways, &to, "nobody looks any more", |hop| hop.is_none()).await;
    });
}

#[test]
fn xsk_datagrams_with_our_headers_are_taken_by_real_sockets() {
    in_netns(async {
        let bed = Bed::new();
        let board = Arc::new(Board::default());
        let task = tokio::spawn(Watch::new(Arc::clone(&board), [bed.interface]).unwrap().run());
        let mut ways = Ways::new(board, 52_625, 52_626);
        let (_queue, mut ports) = bed.open(0, 1, SIZES);
        for (there, from) in [("192.0.2.2", "192.0.2.1:52625"), ("2001:db8::2", "[2001:db8::1]:52626")] {
            let socket = bed.socket(there);
            let to = Route { src: None, dst: socket.local_addr().unwrap(), ecn: Ecn::Ect0 };
            until(&mut ways, &to, "the bed has said it", |hop| hop.is_some()).await;
            let found = ways.find(&to).unwrap();
            let way = ways.way(found).unwrap();
            for len in (0..=way.max_payload()).step_by(131).chain([way.max_payload()]) {
                let sender = &mut ports[0];
                let payload: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
                let start = {
                    let frame = sender.reserve().unwrap();
                    frame[PAYLOAD_AT..PAYLOAD_AT + len].copy_from_slice(&payload);
                    way.finish(frame, len, Ecn::Ect0).unwrap()
                };
                assert!(sender.commit(start, PAYLOAD_AT + len - start));
                sender.flush();
                let mut buffer = [0; 2048];
                let (got, sender) = socket.recv_from(&mut buffer).expect("a right checksum");
                assert!(buffer[..got] == payload, "{len} bytes");
                assert_eq!(sender, from.parse().unwrap());
            }
        }
        task.abort();
    });
}
